package mxfed_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"example.org/mxfed"
	"example.org/mxfed/internal/synthroom"
	"github.com/stretchr/testify/require"
)

// The benchmarks measure four jobs through the public API, every check on: taking in an answer to send_join (BenchmarkJoin),
// giving one (BenchmarkSendJoin), accepting an invite (BenchmarkInvite), and the canonical form and the signing of one event
// (BenchmarkCanonicalJSON, BenchmarkBuild). benchmarks/ runs the same data through other libraries.

const (
	benchUser = mxfed.UserID("@bob:joiner.example")
	benchVia  = mxfed.ServerName("s0.example")
)

func benchSigner(tb testing.TB, name mxfed.ServerName) *mxfed.Signer {
	s, err := mxfed.NewSigner(name, synthroom.KeyID, synthroom.Key(string(name)))
	require.NoError(tb, err)
	return s
}

// benchKeys knows the key of every synthetic server.
type benchKeys struct {
	known map[mxfed.ServerName]ed25519.PublicKey
}

func newBenchKeys(servers []string) benchKeys {
	k := benchKeys{make(map[mxfed.ServerName]ed25519.PublicKey)}
	for _, s := range append([]string{string(benchUser.Server()), string(benchVia)}, servers...) {
		k.known[mxfed.ServerName(s)] = synthroom.Key(s).Public().(ed25519.PublicKey)
	}
	return k
}

func (k benchKeys) Keys(_ context.Context, keys []mxfed.Key) error {
	for i := range keys {
		keys[i].Public, keys[i].ValidUntil = k.known[keys[i].Server], time.Now().Add(time.Hour)
	}
	return nil
}

// resident answers make_join and send_join for a synthetic room, from memory.
type resident struct{ room *synthroom.Room }

func (r resident) RoundTrip(q *http.Request) (*http.Response, error) {
	answer := r.room.Template(string(benchUser))
	if strings.Contains(q.URL.Path, "/send_join/") {
		join, err := io.ReadAll(q.Body)
		if err != nil {
			return nil, err
		}
		answer = r.room.Answer(join)
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(answer)), Request: q}, nil
}

// recorded is a resident whose answers were made before: nothing but the library is measured.
type recorded struct{ template, answer []byte }

func (r recorded) RoundTrip(q *http.Request) (*http.Response, error) {
	body := r.template
	if strings.Contains(q.URL.Path, "/send_join/") {
		body = r.answer
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)), Request: q}, nil
}

func benchClient(tb testing.TB, room *synthroom.Room, via http.RoundTripper) *mxfed.Client {
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(tb, benchUser.Server())}, Keys: newBenchKeys(room.Servers), HTTP: via})
	require.NoError(tb, err)
	return s.Client()
}

func benchJoin(tb testing.TB, c *mxfed.Client, room *synthroom.Room, sink func(*mxfed.Event, bool) error) *mxfed.JoinResult {
	result, err := c.Join(context.Background(), &mxfed.JoinRequest{Room: mxfed.RoomID(room.ID), User: benchUser, Via: []mxfed.ServerName{benchVia}, Sink: sink})
	require.NoError(tb, err)
	return result
}

// TestJoin_Synthetic keeps the benchmarks honest: every event of the room arrives and none is dropped.
func TestJoin_Synthetic(t *testing.T) {
	room := synthroom.New(12_000, 60, false) // more than one window
	c := benchClient(t, room, resident{room})
	result := benchJoin(t, c, room, nil)
	require.Empty(t, result.Dropped)
	require.Len(t, result.State, 12_000)
	require.Len(t, result.Auth, 4)
	var state, auth int
	result = benchJoin(t, c, room, func(_ *mxfed.Event, inState bool) error {
		if inState {
			state++
		} else {
			auth++
		}
		return nil
	})
	require.Empty(t, result.Dropped)
	require.Equal(t, []int{12_000, 4}, []int{state, auth})
}

func BenchmarkJoin(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		for _, spread := range []bool{false, true} {
			servers, name := max(n/40, 10), "zipf"
			if spread {
				servers, name = n, "spread"
			}
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				room := synthroom.New(n, servers, spread)
				answer := room.Answer([]byte("{}"))
				answer = bytes.Replace(answer, []byte(`"event":{},`), nil, 1)
				c := benchClient(b, room, recorded{room.Template(string(benchUser)), answer})
				b.SetBytes(int64(len(answer)))
				b.ReportAllocs()
				for b.Loop() {
					benchJoin(b, c, room, func(*mxfed.Event, bool) error { return nil })
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/event")
			})
		}
	}
}

// BenchmarkVerify parses the events of a room and checks their hashes and signatures, without authorisation.
func BenchmarkVerify(b *testing.B) {
	room := synthroom.New(10_000, 250, false)
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(b, benchUser.Server())}, Keys: newBenchKeys(room.Servers)})
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		events := make([]*mxfed.Event, len(room.State))
		for i, pdu := range room.State {
			events[i], _ = mxfed.ParseEvent(synthroom.Version, pdu)
		}
		for _, err := range s.Verify(context.Background(), events...) {
			require.NoError(b, err)
		}
	}
}

// discard is a client that reads an answer and keeps nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

func BenchmarkSendJoin(b *testing.B) {
	room := synthroom.New(10_000, 250, false)
	events := make(map[mxfed.EventID]*mxfed.Event)
	var state []*mxfed.Event
	for _, pdu := range room.State[:4] {
		e, err := mxfed.ParseEvent(synthroom.Version, pdu)
		require.NoError(b, err)
		events[e.ID()] = e
		state = append(state, e)
	}
	rooms := mxfed.RoomSourceFunc(func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
		return &mxfed.Room{Version: synthroom.Version, Latest: state[3:], State: state, Before: state, Events: state}, nil
	})
	server, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(b, benchVia)}, Keys: newBenchKeys(nil), Rooms: rooms})
	require.NoError(b, err)
	sequence := func(pdus [][]byte) func(func([]byte, error) bool) {
		return func(yield func([]byte, error) bool) {
			for _, pdu := range pdus {
				if !yield(pdu, nil) {
					return
				}
			}
		}
	}
	handler := mxfed.NewSendJoinHandler(server, mxfed.JoinHostFunc(func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		return &mxfed.SendJoinResponse{State: sequence(room.State), Auth: sequence(room.Auth)}, nil
	}))
	request := captureSendJoin(b, room)
	b.ReportAllocs()
	for b.Loop() {
		w := discard{http.Header{}}
		handler.ServeHTTP(w, request())
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/10_004, "ns/event")
}

// captureSendJoin has the client make a signed send_join, and returns a way to repeat it.
func captureSendJoin(tb testing.TB, room *synthroom.Room) func() *http.Request {
	var uri, authorization string
	var body []byte
	capture := roundTripFunc(func(q *http.Request) (*http.Response, error) {
		if strings.Contains(q.URL.Path, "/send_join/") {
			uri, authorization = q.URL.RequestURI(), q.Header.Get("Authorization")
			body, _ = io.ReadAll(q.Body)
		}
		return resident{room}.RoundTrip(&http.Request{URL: q.URL, Body: io.NopCloser(bytes.NewReader(body))})
	})
	benchJoin(tb, benchClient(tb, room, capture), room, nil)
	require.NotEmpty(tb, uri)
	return func() *http.Request {
		r := httptest.NewRequest(http.MethodPut, uri, bytes.NewReader(body))
		r.Header.Set("Authorization", authorization)
		return r
	}
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(q *http.Request) (*http.Response, error) { return f(q) }

func BenchmarkInvite(b *testing.B) {
	inviter := benchServer(b, "inviter.example")
	invite, err := inviter.Build(context.Background(), benchDraft("@alice:inviter.example", "invite", benchUser))
	require.NoError(b, err)
	body := fmt.Appendf(nil, `{"event":%s,"invite_room_state":[],"room_version":"10"}`, invite.JSON())
	uri := "/_matrix/federation/v2/invite/" + url.PathEscape(string(invite.RoomID())) + "/" + url.PathEscape(string(invite.ID()))
	template := httptest.NewRequest(http.MethodPut, uri, nil)
	require.NoError(b, benchSigner(b, "inviter.example").SignRequest(template, benchUser.Server(), body))
	keys := newBenchKeys([]string{"inviter.example"})
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(b, benchUser.Server())}, Keys: keys})
	require.NoError(b, err)
	handler := mxfed.NewInviteHandler(s, mxfed.InviteHostFunc(func(context.Context, *mxfed.Invite) error { return nil }))
	b.ReportAllocs()
	for b.Loop() {
		r := httptest.NewRequest(http.MethodPut, uri, bytes.NewReader(body))
		r.Header = template.Header
		w := httptest.NewRecorder()
		if handler.ServeHTTP(w, r); w.Code != http.StatusOK {
			b.Fatal(w.Code, w.Body)
		}
	}
}

// benchServer is a server in one room, whose facts never change.
func benchServer(tb testing.TB, name mxfed.ServerName) *mxfed.Server {
	var state []*mxfed.Event
	rooms := mxfed.RoomSourceFunc(func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
		return &mxfed.Room{Version: synthroom.Version, Latest: state[len(state)-1:], State: state}, nil
	})
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(tb, name)}, Rooms: rooms, Keys: newBenchKeys(nil)})
	require.NoError(tb, err)
	alice := mxfed.UserID("@alice:" + string(name))
	create := &mxfed.Draft{Room: mxfed.RoomID("!bench:" + string(name)), Version: synthroom.Version, Type: "m.room.create", StateKey: new(string),
		Sender: alice, Content: json.RawMessage(`{"creator":"` + string(alice) + `","room_version":"10"}`)}
	for _, d := range []*mxfed.Draft{create, benchDraft(alice, "join", alice)} {
		d.Room = create.Room
		e, err := s.Build(context.Background(), d)
		require.NoError(tb, err)
		state = append(state, e)
	}
	return s
}

func benchDraft(sender mxfed.UserID, membership string, user mxfed.UserID) *mxfed.Draft {
	key := string(user)
	return &mxfed.Draft{Room: mxfed.RoomID("!bench:" + string(sender.Server())), Type: "m.room.member", StateKey: &key, Sender: sender,
		Content: json.RawMessage(`{"membership":"` + membership + `"}`)}
}

func BenchmarkCanonicalJSON(b *testing.B) {
	pdu := synthroom.New(20, 3, false).State[10]
	b.SetBytes(int64(len(pdu)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := mxfed.CanonicalJSON(pdu); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkBuild completes, authorises, hashes and signs one event.
func BenchmarkBuild(b *testing.B) {
	s := benchServer(b, "builder.example")
	d := benchDraft("@alice:builder.example", "invite", benchUser)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Build(context.Background(), d); err != nil {
			b.Fatal(err)
		}
	}
}
