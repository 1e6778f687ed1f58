package mxfed_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
	"example.org/mxfed/internal/synthroom"
)

// This file tests joins between whole servers over TLS: every one listens on an address of its own, which is its name.

// joinSite is a server on a port of the loopback interface.
type joinSite struct {
	*memhost.Host
	name     mxfed.ServerName
	resolver *mxfed.Resolver
	listener *httptest.Server

	mu    sync.Mutex
	asked []string
}

// newJoinSite starts a server. fault, if set, sees each request first and may answer it; cfg alters its Config.
func newJoinSite(t testing.TB, fault func(w http.ResponseWriter, r *http.Request) bool, cfg func(*mxfed.Config)) *joinSite {
	s := &joinSite{listener: httptest.NewUnstartedServer(nil)}
	s.name = mxfed.ServerName(s.listener.Listener.Addr().String())
	_, key, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	signer, err := mxfed.NewSigner(s.name, "ed25519:1", key)
	require.NoError(t, err)
	s.listener.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.URL.Path)
		s.mu.Unlock()
		if fault == nil || !fault(w, r) {
			mxfed.NewHandler(s.Server, mxfed.Hosts{Invite: s, Join: s, Leave: s, Knock: s}).ServeHTTP(w, r)
		}
	})
	s.listener.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.listener.StartTLS()
	t.Cleanup(s.close)
	roots := x509.NewCertPool()
	roots.AddCert(s.listener.Certificate()) // all of them have the same
	s.resolver = &mxfed.Resolver{Base: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, AllowIP: netip.Addr.IsLoopback}
	config := mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: s.resolver}
	if cfg != nil {
		cfg(&config)
	}
	s.Host, err = memhost.New(config)
	require.NoError(t, err)
	return s
}

func (s *joinSite) close() {
	s.resolver.CloseIdleConnections()
	s.listener.CloseClientConnections()
	s.listener.Close()
}

// count is how often a path with this part was asked for.
func (s *joinSite) count(part string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, line := range s.asked {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}

func (s *joinSite) user() mxfed.UserID { return mxfed.UserID("@user:" + string(s.name)) }

// publicRoom makes a room that anybody may join.
func (s *joinSite) publicRoom(t testing.TB, v mxfed.RoomVersion) mxfed.RoomID {
	id, err := s.CreateRoom(t.Context(), v, s.user(), memhost.State("m.room.join_rules", "", `{"join_rule":"public"}`))
	require.NoError(t, err)
	return id
}

func (s *joinSite) join(ctx context.Context, room mxfed.RoomID, via ...mxfed.ServerName) (*mxfed.JoinResult, error) {
	return s.Server.Client().Join(ctx, &mxfed.JoinRequest{Room: room, User: s.user(), Via: via})
}

// An invite, a join of the invited user, and a join under a condition, through every check of both sides.
func TestJoin_BetweenServers(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "6", "10", "12"} {
		a, b := newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
		room, err := a.CreateRoom(t.Context(), v, a.user())
		require.NoError(t, err)
		_, err = b.join(t.Context(), room, a.name)
		require.ErrorIs(t, err, mxfed.ErrForbidden)
		_, err = a.Invite(t.Context(), room, a.user(), b.user())
		require.NoError(t, err)
		require.Len(t, b.Invites(), 1)
		result, err := b.join(t.Context(), room, a.name)
		require.NoError(t, err, v)
		require.Empty(t, result.Dropped)
		require.Len(t, result.State, 3)
		if v == "1" || v == "6" {
			continue
		}
		condition := fmt.Sprintf(`{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":%q}]}`, room)
		second, err := a.CreateRoom(t.Context(), v, a.user(), memhost.State("m.room.join_rules", "", condition))
		require.NoError(t, err)
		result, err = b.join(t.Context(), second, a.name)
		require.NoError(t, err, v)
		require.Contains(t, string(result.Event.Content()), `"join_authorised_via_users_server":"`+string(a.user()))
		require.Empty(t, result.Dropped)
	}
}

// joinFailure is how a server fails: at one endpoint, with a status and a body. next: another server may do better.
type joinFailure struct {
	status int
	body   string
	next   bool
}

func joinFailures() (all []joinFailure) {
	code := func(c string) string { return `{"errcode":"` + c + `","error":"no","room_version":"99"}` }
	for _, status := range []int{302, 400, 401, 403, 404, 405, 408, 410, 413, 418, 429, 500, 501, 502, 503, 504, 520} {
		byStatus := status < 400 || status >= 500 || status == 401 || status == 403 || status == 404 || status == 405 || status == 429
		for _, body := range []string{``, `<html>`, `{}`, code("M_FORBIDDEN"), code("M_UNKNOWN"), code("M_BAD_JSON"), code("M_INVALID_PARAM"), code("ORG_EXAMPLE")} {
			all = append(all, joinFailure{status, body, byStatus})
		}
		for _, c := range []string{"M_UNABLE_TO_AUTHORISE_JOIN", "M_UNABLE_TO_GRANT_JOIN", "M_NOT_FOUND", "M_LIMIT_EXCEEDED"} {
			all = append(all, joinFailure{status, code(c), true})
		}
		for _, c := range []string{"M_INCOMPATIBLE_ROOM_VERSION", "M_UNSUPPORTED_ROOM_VERSION"} {
			all = append(all, joinFailure{status, code(c), false})
		}
	}
	return all
}

// Whether the next server is asked depends on what the first one answers, at either step, and each answer is reported.
// https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func TestJoin_Failover(t *testing.T) {
	var endpoint string
	var failure joinFailure
	first := newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, endpoint) {
			w.Write(templateFor(r))
			return true
		}
		w.WriteHeader(failure.status)
		io.WriteString(w, failure.body)
		return true
	}, nil)
	second, joiner := newJoinSite(t, nil, nil), newJoinSite(t, nil, func(c *mxfed.Config) { c.NoV1 = true })
	for _, endpoint = range []string{"/make_join/", "/send_join/", "/make_knock/", "/send_knock/"} {
		room := second.publicRoom(t, "10")
		try := func(via ...mxfed.ServerName) (err error) {
			_, err = joiner.join(t.Context(), room, via...)
			return err
		}
		if strings.HasSuffix(endpoint, "knock/") {
			room = second.knockRoom(t, "10")
			try = func(via ...mxfed.ServerName) (err error) {
				_, err = joiner.knock(t.Context(), room, via...)
				return err
			}
		}
		for _, failure = range joinFailures() {
			before := second.count("/make_")
			err := try(first.name, second.name)
			require.Equal(t, failure.next, err == nil, "%s %+v: %v", endpoint, failure, err)
			require.Equal(t, failure.next, second.count("/make_") > before, "%s %+v", endpoint, failure)
			if err != nil {
				var answer *mxfed.Error
				require.ErrorAs(t, err, &answer)
				require.Equal(t, []any{failure.status, first.name, strings.Trim(endpoint, "/")}, []any{answer.Status, answer.Server, answer.Endpoint})
			}
		}
	}
}

// templateFor is a template for whatever is asked for.
func templateFor(r *http.Request) []byte {
	parts := strings.Split(r.URL.Path, "/")
	if len(parts) < 7 {
		return []byte(`{}`)
	}
	return fmt.Appendf(nil, `{"room_version":"10","event":{"type":"m.room.member","room_id":%q,"sender":%q,"state_key":%[2]q,"content":{"membership":%q},"depth":5,"prev_events":["$x"],"auth_events":["$y"]}}`,
		parts[5], parts[6], strings.TrimPrefix(parts[4], "make_"))
}

// When all fail, the error tells of each, and ClientError picks what a user can make most of.
func TestJoin_AllFail(t *testing.T) {
	answers := map[string]joinFailure{
		"down":      {status: 502, body: ``},
		"unknown":   {status: 404, body: `{"errcode":"M_NOT_FOUND","error":"never heard of it"}`},
		"forbidden": {status: 403, body: `{"errcode":"M_FORBIDDEN","error":"you are banned"}`},
		"limited":   {status: 429, body: `{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":1500}`},
		"grant":     {status: 400, body: `{"errcode":"M_UNABLE_TO_GRANT_JOIN","error":"not me"}`},
		"version":   {status: 400, body: `{"errcode":"M_INCOMPATIBLE_ROOM_VERSION","error":"too old","room_version":"99"}`},
	}
	sites := make(map[string]*joinSite)
	for name, answer := range answers {
		sites[name] = newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(answer.status)
			io.WriteString(w, answer.body)
			return true
		}, nil)
	}
	sites["gone"] = newJoinSite(t, nil, nil)
	sites["gone"].listener.Close()
	joiner := newJoinSite(t, nil, nil)
	for name, c := range map[string]struct {
		via    []string
		status int
		code   mxfed.ErrorCode
	}{
		"nobody answers":   {[]string{"gone"}, 504, mxfed.ErrUnknown},
		"one is down":      {[]string{"gone", "down"}, 502, mxfed.ErrUnknown},
		"nobody knows it":  {[]string{"unknown", "down"}, 404, mxfed.ErrNotFound},
		"one says why not": {[]string{"unknown", "forbidden", "down", "gone"}, 403, mxfed.ErrForbidden},
		"later perhaps":    {[]string{"unknown", "limited", "down"}, 429, mxfed.ErrLimitExceeded},
		"somebody else":    {[]string{"gone", "grant", "unknown"}, 400, mxfed.ErrUnableToGrantJoin},
		"too new":          {[]string{"gone", "forbidden", "version"}, 400, mxfed.ErrIncompatibleRoomVersion},
	} {
		var via []mxfed.ServerName
		for _, n := range c.via {
			via = append(via, sites[n].name)
		}
		_, joining := joiner.join(t.Context(), "!x:y.example", via...)
		_, knocking := joiner.knock(t.Context(), "!x:y.example", via...)
		for _, err := range []error{joining, knocking} {
			for _, n := range via {
				require.ErrorContains(t, err, string(n), name)
			}
			told := mxfed.ClientError(err)
			require.Equal(t, []any{c.status, c.code}, []any{told.Status, told.Code}, "%s: %v", name, err)
		}
	}
}

// joinBodies are bodies of status 200 that lead nowhere.
func joinBodies(other mxfed.ServerName) map[string]func(w http.ResponseWriter, r *http.Request) {
	return map[string]func(w http.ResponseWriter, r *http.Request){
		"gzip bomb": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			io.WriteString(z, `{"auth_chain":[],"state":[`)
			for range 1 << 10 {
				if _, err := z.Write(bytes.Repeat([]byte("0,"), 1<<19)); err != nil {
					return
				}
			}
		},
		"spaces without end": func(w http.ResponseWriter, r *http.Request) {
			for {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 1<<20)); err != nil {
					return
				}
			}
		},
		"breaks off": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, `{"auth_chain":[],"state":[`)
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+string(other)+r.URL.Path, http.StatusTemporaryRedirect)
		},
		"error of 64 MiB": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			for range 64 {
				if _, err := w.Write(bytes.Repeat([]byte("x"), 1<<20)); err != nil {
					return
				}
			}
		},
		"connection closed": func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) },
	}
}

// Bodies without end are left when their limit is reached, and the next server is asked.
func TestJoin_HostileBodies(t *testing.T) {
	witness, honest := newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
	room := honest.publicRoom(t, "10")
	for name, answer := range joinBodies(witness.name) {
		for _, endpoint := range []string{"/make_join/", "/send_join/"} {
			hostile := newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, endpoint) {
					answer(w, r)
				} else {
					w.Write(templateFor(r))
				}
				return true
			}, nil)
			joiner := newJoinSite(t, nil, func(c *mxfed.Config) { c.MaxAnswer = 4 << 20 })
			result, err := joiner.join(t.Context(), room, hostile.name, honest.name)
			require.NoError(t, err, "%s %s", endpoint, name)
			require.Equal(t, honest.name, result.Via)
			_, err = joiner.join(t.Context(), room, hostile.name)
			require.Error(t, err)
			hostile.close()
		}
	}
	require.Empty(t, witness.asked, "redirects are not followed")
}

// MaxAnswer is a limit to the byte.
func TestJoin_MaxAnswer(t *testing.T) {
	room := synthroom.New(20, 3, false)
	answer := room.Answer([]byte("{}"))
	answer = bytes.Replace(answer, []byte(`"event":{},`), nil, 1)
	for _, limit := range []int{len(answer), len(answer) - 1} {
		s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(t, benchUser.Server())}, Keys: newBenchKeys(room.Servers),
			HTTP: recorded{room.Template(string(benchUser)), answer}, MaxAnswer: int64(limit)})
		require.NoError(t, err)
		_, err = s.Client().Join(t.Context(), &mxfed.JoinRequest{Room: mxfed.RoomID(room.ID), User: benchUser, Via: []mxfed.ServerName{benchVia}})
		require.Equal(t, limit == len(answer), err == nil, err)
	}
}

// One bad event among thousands, in more than one window, is dropped and reported; the join goes well.
func TestJoin_OneBadEventOfMany(t *testing.T) {
	room := synthroom.New(8_000, 40, false)
	bad, err := mxfed.ParseEvent(synthroom.Version, room.State[7_000])
	require.NoError(t, err)
	room.State[7_000] = bytes.Replace(room.State[7_000], []byte(`"depth":`), []byte(`"depth":1`), 1)
	moved, err := mxfed.ParseEvent(synthroom.Version, room.State[7_000])
	require.NoError(t, err)
	result := benchJoin(t, benchClient(t, room, resident{room}), room, nil)
	require.Len(t, result.State, 7_999)
	require.Len(t, result.Dropped, 1)
	require.ErrorContains(t, result.Dropped[moved.ID()], "bad signature")
	require.NotContains(t, result.Dropped, bad.ID())
}
