package mxfed_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"example.org/mxfed"
)

// Members are left out only if the caller says true, in version 2, and then it learns which servers are in the room.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
func TestSendJoin_OmitMembers(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	join := room.joinOf("@alice:domain", "").sign(t, "10", s.domain)
	for query, omit := range map[string]bool{"": false, "?omit_members=true": true, "?omit_members=false": false, "?omit_members": false, "?omit_members=": false,
		"?omit_members=1": false, "?omit_members=True": false, "?omit_members=yes": false, "?Omit_members=true": false, "?x=1&omit_members=true": true} {
		for _, endpoint := range []string{"v1/send_join", "v2/send_join"} {
			s.reset()
			w := s.send(t, s.domain, http.MethodPut, room.memberURI(endpoint, join)+query, join)
			require.Equal(t, 200, w.Code, "%s", w.Body)
			answer := srvJoinAnswer(t, endpoint, w.Body.Bytes())
			require.Equal(t, omit && endpoint == "v2/send_join", s.joins[0].OmitMembers, query)
			if s.joins[0].OmitMembers {
				require.Equal(t, true, answer["members_omitted"])
				require.Equal(t, []any{"us.example"}, answer["servers_in_room"])
				require.Len(t, answer["state"], 3)
			} else {
				require.NotContains(t, answer, "members_omitted")
				require.NotContains(t, answer, "servers_in_room")
				require.Len(t, answer["state"], 4)
			}
		}
	}
}

// An answer that the protocol does not allow is this server's failure, and does not leave.
func TestSendJoin_HostAnswers(t *testing.T) {
	secret := errors.New("secret of the database")
	for name, c := range map[string]struct {
		answer *mxfed.SendJoinResponse
		err    error
		status int
		code   mxfed.ErrorCode
	}{
		"none":                     {nil, nil, 500, mxfed.ErrUnknown},
		"members left out unasked": {&mxfed.SendJoinResponse{Servers: []mxfed.ServerName{"us.example"}}, nil, 500, mxfed.ErrUnknown},
		"state fails at once":      {&mxfed.SendJoinResponse{State: srvBrokenOff(0, secret)}, nil, 500, mxfed.ErrUnknown},
		"state fails early":        {&mxfed.SendJoinResponse{State: srvBrokenOff(10, secret)}, nil, 500, mxfed.ErrUnknown},
		"auth fails early":         {&mxfed.SendJoinResponse{Auth: srvBrokenOff(10, mxfed.ErrNotFound)}, nil, 404, mxfed.ErrNotFound},
		"refused":                  {nil, fmt.Errorf("full: %w", &mxfed.Error{Code: mxfed.ErrForbidden, Message: "no"}), 403, mxfed.ErrForbidden},
		"failed":                   {nil, secret, 500, mxfed.ErrUnknown},
	} {
		for _, endpoint := range []string{"v1/send_join", "v2/send_join"} {
			t.Run(name+", "+endpoint, func(t *testing.T) {
				s := newSrvSite(t)
				s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) { return c.answer, c.err }
				room := newSrvRoom(t, s, "10", nil)
				w := room.sendMember(t, s.domain, endpoint, room.joinOf("@alice:domain", "").sign(t, "10", s.domain))
				requireSrvError(t, w, c.status, c.code)
				require.NotContains(t, w.Body.String(), "secret")
			})
		}
	}
}

// srvBrokenOff yields n events and then an error.
func srvBrokenOff(n int, err error) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for range n {
			if !yield([]byte(`{}`), nil) {
				return
			}
		}
		yield(nil, err)
	}
}

func TestSendJoin_EmptyAndUnfinished(t *testing.T) {
	t.Run("empty", func(t *testing.T) {
		s := newSrvSite(t)
		s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
			return &mxfed.SendJoinResponse{}, nil
		}
		room := newSrvRoom(t, s, "10", nil)
		w := room.sendMember(t, s.domain, "v2/send_join", room.joinOf("@alice:domain", "").sign(t, "10", s.domain))
		answer := srvObject(t, w.Body.Bytes())
		require.Equal(t, []any{}, answer["state"])
		require.Equal(t, []any{}, answer["auth_chain"])
		require.NotEmpty(t, answer["event"])
	})
	t.Run("late failure", func(t *testing.T) { // the caller must not take what it got for whole
		s := newSrvSite(t)
		s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
			return &mxfed.SendJoinResponse{State: srvBrokenOff(1<<17, errors.New("secret"))}, nil
		}
		room := newSrvRoom(t, s, "10", nil)
		w := room.sendMember(t, s.domain, "v2/send_join", room.joinOf("@alice:domain", "").sign(t, "10", s.domain))
		require.Equal(t, 200, w.Code)
		require.False(t, bytes.HasSuffix(w.Body.Bytes(), []byte("}]}")))
		require.NotContains(t, w.Body.String(), "errcode")
		require.NotContains(t, w.Body.String(), "secret")
	})
}

// The same request, twice or 50 times at once, is one invite, join, leave or knock, and all answers are the same.
func TestIdempotent(t *testing.T) {
	s := newSrvSite(t)
	stored := make(map[mxfed.EventID]bool)
	writes := 0
	s.invited = func(_ context.Context, inv *mxfed.Invite) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !stored[inv.Event.ID()] {
			writes++
		}
		stored[inv.Event.ID()] = true
		return nil
	}
	calls := newSrvCalls(t, s, nil)
	for _, c := range calls {
		answers := make([]string, 52)
		send := func(i int) {
			w := s.send(t, s.domain, c.method, c.uri, c.body)
			answers[i] = strconv.Itoa(w.Code) + w.Body.String()
		}
		send(0)
		send(1)
		srvAtOnce(50, func(i int) { send(i + 2) })
		require.True(t, strings.HasPrefix(answers[0], "200"), answers[0])
		for _, a := range answers {
			require.Equal(t, answers[0], a, c.endpoint)
		}
	}
	require.Equal(t, 2, writes, "an invite of each version")
	for _, c := range calls {
		if !strings.HasSuffix(c.endpoint, "invite") {
			require.Len(t, s.rooms[c.room].before, 1, "one event by either version")
		}
	}
}

// srvAtOnce calls do for every index below n, each in a goroutine of its own.
func srvAtOnce(n int, do func(i int)) {
	var group sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		group.Go(func() {
			<-start
			do(i)
		})
	}
	close(start)
	group.Wait()
}

// Of a thousand joins at once, each is in the room once or refused, and none by a state of the room that has passed: here
// the room is closed in the middle of it all, in a transaction like those of the joins.
func TestConcurrentJoins(t *testing.T) {
	const joins, open = 1000, 600
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	requests := make([]*http.Request, joins)
	for i := range requests {
		pdu := room.joinOf(fmt.Sprintf("@u%d:domain", i), "").sign(t, "10", s.domain)
		requests[i] = s.request(t, s.domain, http.MethodPut, room.memberURI("v2/send_join", pdu)+"?omit_members=true", pdu)
	}
	closing := room.pdu(room.admin, "m.room.join_rules", "", map[string]any{"join_rule": "invite"}).sign(t, "10", s.own)
	closed := srvEvent(t, "10", closing)
	s.accept = func(_ context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		room.mu.Lock()
		defer room.mu.Unlock()
		if len(room.before) == open {
			room.state[mxfed.StateKey{Type: "m.room.join_rules"}] = closed
		}
		return room.store(m)
	}
	answers := make([]*httptest.ResponseRecorder, joins)
	srvAtOnce(joins, func(i int) { answers[i] = s.serve(requests[i]) })
	accepted := 0
	for _, w := range answers {
		if w.Code == 200 {
			accepted++
			answer := srvObject(t, w.Body.Bytes())
			require.Contains(t, answer["event"].(map[string]any)["signatures"], "us.example")
			require.Len(t, answer["state"], 3)
			continue
		}
		requireSrvError(t, w, 403, mxfed.ErrForbidden)
	}
	require.Equal(t, open, accepted)
	require.Len(t, room.before, open)
	require.Len(t, room.events, 4+open)
	members := 0
	for key, e := range room.state {
		if key.Type == "m.room.member" {
			members++
			require.Equal(t, key.Key, string(e.Sender()))
		}
	}
	require.Equal(t, 1+open, members)
}

// srvHuge yields n events of a kilobyte and counts how far the reader has come. at is called before each.
func srvHuge(n int, pulled *atomic.Int64, at func(i int)) iter.Seq2[[]byte, error] {
	pdu := []byte(`{"content":{"body":"` + strings.Repeat("x", 1000) + `"}}`)
	return func(yield func([]byte, error) bool) {
		for i := range n {
			if at != nil {
				at(i)
			}
			pulled.Add(1)
			if !yield(pdu, nil) {
				return
			}
		}
	}
}

// The first byte of an answer leaves before the last event is read from the host.
func TestSendJoin_Streams(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	const n = 1000
	var pulled atomic.Int64
	arrived := make(chan struct{})
	s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		return &mxfed.SendJoinResponse{State: srvHuge(n, &pulled, func(i int) {
			if i == n-1 {
				<-arrived // for ever, if the answer were gathered first
			}
		})}, nil
	}
	web := httptest.NewTLSServer(s.handler)
	defer web.Close()
	answer, err := web.Client().Do(srvOver(t, s, room, web.URL))
	require.NoError(t, err)
	defer answer.Body.Close()
	body := bufio.NewReader(answer.Body)
	_, err = body.ReadByte()
	require.NoError(t, err)
	close(arrived)
	rest := new(bytes.Buffer)
	_, err = rest.ReadFrom(body)
	require.NoError(t, err)
	require.Len(t, srvObject(t, append([]byte("{"), rest.Bytes()...))["state"], n)
}

// srvOver is a join as a request to a real listener.
func srvOver(t *testing.T, s *srvSite, room *srvRoom, base string) *http.Request {
	pdu := room.joinOf("@alice:domain", "").sign(t, "10", s.domain)
	r, err := http.NewRequest(http.MethodPut, base+room.memberURI("v2/send_join", pdu), bytes.NewReader(pdu))
	require.NoError(t, err)
	require.NoError(t, s.domain.signer.SignRequest(r, s.own.name, pdu))
	return r
}

// srvPipes is a listener whose connections buffer nothing: what is written waits for its reader. wrote gets a value when
// the server begins to write.
type srvPipes struct {
	conns chan net.Conn
	wrote chan struct{}
}

func (l *srvPipes) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return &srvPipe{c, l}, nil
}
func (l *srvPipes) Close() error   { close(l.conns); return nil }
func (l *srvPipes) Addr() net.Addr { return &net.TCPAddr{} }

type srvPipe struct {
	net.Conn
	of *srvPipes
}

func (c *srvPipe) Write(b []byte) (int, error) {
	select {
	case c.of.wrote <- struct{}{}:
	default:
	}
	return c.Conn.Write(b)
}

// A caller who does not read holds no more than a buffer, and not for longer than the request's context lasts.
func TestSendJoin_SlowReader(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	const n = 100_000
	var pulled atomic.Int64
	s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		return &mxfed.SendJoinResponse{State: srvHuge(n, &pulled, nil)}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		s.handler.ServeHTTP(w, r.WithContext(ctx))
	})}
	pipes := &srvPipes{conns: make(chan net.Conn, 1), wrote: make(chan struct{}, 1)}
	served := make(chan error, 1)
	go func() { served <- web.Serve(pipes) }()
	theirs, ours := net.Pipe()
	pipes.conns <- ours
	require.NoError(t, srvOver(t, s, room, "http://us.example").Write(theirs))
	<-pipes.wrote // and nobody reads
	cancel()
	<-ended
	require.Positive(t, pulled.Load())
	require.Less(t, pulled.Load(), int64(200), "kilobytes were taken from the host")
	theirs.Close()
	require.NoError(t, web.Close())
	require.ErrorIs(t, <-served, http.ErrServerClosed)
}

// A context that ends while the host is read ends the answer.
func TestSendJoin_ContextEnds(t *testing.T) {
	for _, at := range []int{0, 5, 1000} {
		s := newSrvSite(t)
		room := newSrvRoom(t, s, "10", nil)
		var pulled atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
			return &mxfed.SendJoinResponse{State: srvHuge(100_000, &pulled, func(i int) {
				if i == at {
					cancel()
				}
			})}, nil
		}
		pdu := room.joinOf("@alice:domain", "").sign(t, "10", s.domain)
		w := s.serve(s.request(t, s.domain, http.MethodPut, room.memberURI("v2/send_join", pdu), pdu).WithContext(ctx))
		require.EqualValues(t, at+1, pulled.Load())
		if at < 50 { // nothing has left yet
			requireSrvError(t, w, 503, mxfed.ErrUnknown)
		} else {
			require.False(t, bytes.HasSuffix(w.Body.Bytes(), []byte("]}")))
		}
	}
}
