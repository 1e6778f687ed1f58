package mxfed_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
)

// joinSteps are the requests of a join through a server that refuses it and one that lets it in and forgets an event.
var joinSteps = []string{"first make_join", "second make_join", "second send_join", "second key", "second event"}

// joinStage is a moment at which a join is given up.
type joinStage struct {
	sent int  // how many of joinSteps are asked for; the answer to the last one never ends, but for that of the first server
	read int  // given up when that many bytes of the last answer were read; 0: when it was asked for
	sink bool // given up in the sink instead
	hold bool // the answer to send_join does not end either, which is more than one window
}

var joinStages = map[string]joinStage{
	"before anything is sent":               {sent: 0},
	"between servers":                       {sent: 1},
	"before the template":                   {sent: 2},
	"in the template":                       {sent: 2, read: 20},
	"before the answer":                     {sent: 3},
	"in the answer":                         {sent: 3, read: 20},
	"before keys":                           {sent: 4},
	"in keys":                               {sent: 4, read: 20},
	"before keys, while the answer goes on": {sent: 4, hold: true},
	"in the sink":                           {sent: 4, sink: true},
	"in the sink, while the answer goes on": {sent: 4, sink: true, hold: true},
	"before an event that the answer lacks": {sent: 5},
	"in an event that the answer lacks":     {sent: 5, read: 20},
}

// joinHeld is how much arrives of an answer that is held up: enough to start checking.
const joinHeld = 600 << 10

// joinLeaver is a world in which a join is given up at its stage.
type joinLeaver struct {
	joinStage
	http.RoundTripper // the joiner's
	leave             func()
	gone              chan struct{} // closed when the held answer is left
	sites             [4]*joinSite  // a server that refuses, one that lets everybody in, another one, the joiner

	mu    sync.Mutex
	tried []string
}

func newJoinLeaver(t *testing.T, stage joinStage, leave func()) *joinLeaver {
	l := &joinLeaver{joinStage: stage, leave: leave, gone: make(chan struct{})}
	refuse := func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusNotFound); return true }
	l.sites = [4]*joinSite{newJoinSite(t, refuse, nil), newJoinSite(t, l.answer, nil), newJoinSite(t, nil, nil),
		newJoinSite(t, nil, func(c *mxfed.Config) { l.RoundTripper, c.HTTP = c.HTTP, l })}
	return l
}

// step names a request as joinSteps does.
func (l *joinLeaver) step(host mxfed.ServerName, path string) string {
	names := map[mxfed.ServerName]string{l.sites[0].name: "first ", l.sites[1].name: "second ", l.sites[2].name: "third "}
	parts := strings.Split(path, "/")
	if parts[2] == "key" {
		return names[host] + "key"
	}
	return names[host] + parts[4]
}

func (l *joinLeaver) last(step string) bool {
	return !l.sink && l.sent > 0 && step == joinSteps[l.sent-1]
}

// answer is how the second server answers: as it should, up to where its answer is to stop.
func (l *joinLeaver) answer(w http.ResponseWriter, r *http.Request) bool {
	step, s := l.step(l.sites[1].name, r.URL.Path), l.sites[1]
	recorded := httptest.NewRecorder()
	mxfed.NewHandler(s.Server, mxfed.Hosts{Invite: s, Join: s}).ServeHTTP(recorded, r)
	io.Copy(io.Discard, r.Body) // else the server would not see its caller go
	body, held := recorded.Body.Bytes(), l.hold && step == "second send_join"
	if step == "second send_join" && l.sent == 5 {
		body = withoutJoinRules(body)
	}
	switch {
	case held:
		body = body[:joinHeld]
	case l.last(step):
		body = body[:l.read]
	}
	if len(body) > 0 {
		w.WriteHeader(recorded.Code)
		w.Write(body)
		http.NewResponseController(w).Flush()
	}
	if !held && !l.last(step) {
		return true
	}
	if !held && l.read == 0 {
		l.leave()
	}
	<-r.Context().Done()
	if held {
		close(l.gone)
	}
	panic(http.ErrAbortHandler) // an answer that ended well might still be read
}

// withoutJoinRules leaves one event out of an answer to send_join.
func withoutJoinRules(answer []byte) []byte {
	var all map[string]any
	json.Unmarshal(answer, &all)
	for _, list := range []string{"state", "auth_chain"} {
		all[list] = slices.DeleteFunc(all[list].([]any), func(e any) bool { return e.(map[string]any)["type"] == "m.room.join_rules" })
	}
	answer, _ = json.Marshal(all)
	return answer
}

// RoundTrip carries the joiner's requests.
func (l *joinLeaver) RoundTrip(q *http.Request) (*http.Response, error) {
	step := l.step(mxfed.ServerName(q.URL.Host), q.URL.Path)
	l.mu.Lock()
	l.tried = append(l.tried, step)
	l.mu.Unlock()
	answer, err := l.RoundTripper.RoundTrip(q)
	if err == nil && l.last(step) {
		if l.sent == 1 {
			l.leave()
		}
		answer.Body = &joinReader{answer.Body, l.read, l.leave}
	}
	return answer, err
}

// joinReader leaves when it has read so much.
type joinReader struct {
	io.ReadCloser
	left  int
	leave func()
}

func (r *joinReader) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	if r.left -= n; r.left <= 0 {
		r.leave()
	}
	return n, err
}

// close stops all servers and returns what they were asked.
func (l *joinLeaver) close() (asked []string) {
	for _, s := range l.sites {
		s.close()
	}
	for _, s := range l.sites[:3] {
		for _, line := range s.asked {
			_, path, _ := strings.Cut(line, " ")
			asked = append(asked, l.step(s.name, path))
		}
	}
	return asked
}

// joinConnections are what may be left of a join as long as the servers run.
var joinConnections = []goleak.Option{goleak.IgnoreAnyFunction("net/http.(*Server).Serve"), goleak.IgnoreAnyFunction("net/http.(*conn).serve"),
	goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop")}

// Whoever gives up a join, at whatever moment, is rid of it: nothing more is asked of that server or of another one, nothing
// more is handed on, and nothing goes on.
func TestJoin_Cancelled(t *testing.T) {
	for name, stage := range joinStages {
		t.Run(name, func(t *testing.T) {
			ignore := goleak.IgnoreCurrent()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			l := newJoinLeaver(t, stage, cancel)
			joiner, handed := l.sites[3], 0
			req := &mxfed.JoinRequest{Room: largeRoom(t, l.sites[1]), User: joiner.user(), OmitMembers: true}
			for _, s := range l.sites[:3] {
				req.Via = append(req.Via, s.name)
			}
			if stage.sent == 0 {
				cancel()
			}
			if stage.sink {
				req.Sink = func(*mxfed.Event, bool) error {
					cancel()
					if stage.hold {
						<-l.gone
						time.Sleep(20 * time.Millisecond) // a Join that did not wait would be over by now
					}
					handed++ // without a lock: Join waits for it
					return nil
				}
			}
			_, err := joiner.Server.Client().Join(ctx, req)
			require.Equal(t, map[bool]int{true: 1}[stage.sink], handed)
			goleak.VerifyNone(t, append(slices.Clone(joinConnections), ignore)...)
			require.ErrorIs(t, err, context.Canceled)
			require.NotErrorIs(t, err, context.DeadlineExceeded, "the library's own, later")
			require.Equal(t, joinSteps[:stage.sent], append([]string{}, l.close()...))
			require.Equal(t, joinSteps[:max(stage.sent, 1)], l.tried, "not even to be stopped on the way")
			goleak.VerifyNone(t, ignore)
		})
	}
}

// largeRoom is a public room whose state does not fit a first window.
func largeRoom(t *testing.T, s *joinSite) mxfed.RoomID {
	state := []*mxfed.Draft{memhost.State("m.room.join_rules", "", `{"join_rule":"public"}`)}
	for i := range 12 {
		state = append(state, memhost.State("org.example", fmt.Sprint(i), `{"x":"`+strings.Repeat("x", 60_000)+`"}`))
	}
	room, err := s.CreateRoom(t.Context(), "10", s.user(), state...)
	require.NoError(t, err)
	return room
}

// doRequest is what the other server got.
type doRequest struct {
	origin, to mxfed.ServerName
	method     string
	uri        string
	body       string // as it came, byte for byte
	typ        string
}

// newDoSite is a server that authenticates every request and notes it, and then answers.
func newDoSite(t *testing.T, got *[]doRequest, answer func(w http.ResponseWriter, r *http.Request)) *joinSite {
	var s *joinSite
	s = newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/_matrix/key/") {
			return false
		}
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		req, err := s.Server.Authenticate(r)
		if err != nil {
			mxfed.WriteError(w, err)
			return true
		}
		*got = append(*got, doRequest{req.Origin, req.To, r.Method, r.RequestURI, string(body), r.Header.Get("Content-Type")})
		answer(w, r)
		return true
	}, func(c *mxfed.Config) {
		c.Keys = doKeys{newBenchKeys([]string{"a.example", "b.example"}), &mxfed.KeyRing{HTTP: c.HTTP}}
	})
	return s
}

// doKeys knows the keys of some servers and fetches those of others.
type doKeys struct {
	known benchKeys
	rest  mxfed.Keys
}

func (k doKeys) Keys(ctx context.Context, keys []mxfed.Key) error {
	if k.known.known[keys[0].Server] != nil {
		return k.known.Keys(ctx, keys)
	}
	return k.rest.Keys(ctx, keys)
}

// Do makes any call, signed as one of the own names. https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func TestClient_Do(t *testing.T) {
	var got []doRequest
	to := newDoSite(t, &got, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"pdus":{"$x":{}},"n":7}`) })
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(t, "a.example"), benchSigner(t, "b.example")}, HTTP: to.resolver})
	require.NoError(t, err)
	var out struct {
		PDUs map[string]json.RawMessage
		N    int
	}
	const uri, version = "/_matrix/federation/v1/send/1%2F2?a=b%20c&d", "/_matrix/federation/v1/version"
	require.NoError(t, s.Client().Do(t.Context(), "", to.name, "PUT", uri, map[string]any{"pdus": []any{1e3}, "origin": "<&>\u2028"}, &out))
	require.Equal(t, 7, out.N)
	require.Contains(t, out.PDUs, "$x")
	for _, call := range []struct {
		from   mxfed.ServerName
		method string
		uri    string
		in     any
	}{{"a.example", "GET", version, nil}, {"b.example", "GET", version, nil}, {"b.example", "POST", "/_matrix/x", struct{}{}},
		{"b.example", "POST", "/_matrix/x", json.RawMessage("{ \"b\":1, \"a\":\"\\u00e9\" }")}} {
		require.NoError(t, s.Client().Do(t.Context(), call.from, to.name, call.method, call.uri, call.in, nil))
	}
	require.Equal(t, []doRequest{
		{"a.example", to.name, "PUT", uri, "{\"origin\":\"<&>\u2028\",\"pdus\":[1000]}", "application/json"},
		{"a.example", to.name, "GET", version, "", ""},
		{"b.example", to.name, "GET", version, "", ""},
		{"b.example", to.name, "POST", "/_matrix/x", "{}", "application/json"},
		{"b.example", to.name, "POST", "/_matrix/x", `{"a":"é","b":1}`, "application/json"},
	}, got)
}

// What another server answers is read up to 2 MiB.
func TestClient_DoLimit(t *testing.T) {
	var got []doRequest
	var size int
	to := newDoSite(t, &got, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `"`+strings.Repeat("x", size-2)+`"`) })
	c := newJoinSite(t, nil, nil).Server.Client()
	for _, size = range []int{2 << 20, 2<<20 + 1} {
		var out string
		err := c.Do(t.Context(), "", to.name, "GET", "/_matrix/x", nil, &out)
		require.Equal(t, size == 2<<20, err == nil, err)
		require.Equal(t, map[bool]int{true: size - 2}[err == nil], len(out))
	}
}

// What cannot be asked is not: nothing leaves.
func TestClient_DoRefused(t *testing.T) {
	var got []doRequest
	to := newDoSite(t, &got, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{}`) })
	c := newJoinSite(t, nil, nil).Server.Client()
	type call struct {
		from, to    mxfed.ServerName
		method, uri string
		in          any
	}
	for name, q := range map[string]call{
		"not our name":     {"other.example", to.name, "GET", "/x", nil},
		"no server name":   {"", "no name", "GET", "/x", nil},
		"user information": {"", "a@" + to.name, "GET", "/x", nil},
		"server and path":  {"", to.name + "/y", "GET", "/x", nil},
		"no path":          {"", to.name, "GET", "x", nil},
		"empty path":       {"", to.name, "GET", "", nil},
		"another host":     {"", "a.example", "GET", "@" + string(to.name) + "/x", nil},
		"a fragment":       {"", to.name, "GET", "/x#y", nil},
		"not escaped":      {"", to.name, "GET", "/x y", nil},
		"beyond ASCII":     {"", to.name, "GET", "/é", nil},
		"badly escaped":    {"", to.name, "GET", "/%zz", nil},
		"two lines":        {"", to.name, "GET", "/x\r\nA: b", nil},
		"no method":        {"", to.name, "G ET", "/x", nil},
		"no JSON":          {"", to.name, "PUT", "/x", func() {}},
		"bad JSON":         {"", to.name, "PUT", "/x", json.RawMessage(`{"a":1,"a":2}`)},
		"a lone surrogate": {"", to.name, "PUT", "/x", json.RawMessage(`"\ud800"`)},
	} {
		require.Error(t, c.Do(t.Context(), q.from, q.to, q.method, q.uri, q.in, nil), name)
		require.Zero(t, to.count(""), name)
	}
	require.NoError(t, c.Do(t.Context(), "", to.name, "GET", "/x", nil, nil))
	require.Len(t, got, 1)
}

// doAnswers are answers and what Do makes of them.
var doAnswers = map[string]struct {
	status      int
	header      http.Header
	body        string
	code        mxfed.ErrorCode
	temporary   bool
	retry       time.Duration
	roomVersion mxfed.RoomVersion
}{
	"not found":       {404, nil, `{"errcode":"M_NOT_FOUND","error":"no"}`, mxfed.ErrNotFound, false, 0, ""},
	"limited":         {429, http.Header{"Retry-After": {"7"}}, `{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":1}`, mxfed.ErrLimitExceeded, true, 7 * time.Second, ""},
	"by milliseconds": {429, nil, `{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":1500}`, mxfed.ErrLimitExceeded, true, 1500 * time.Millisecond, ""},
	"room version":    {400, nil, `{"errcode":"M_INCOMPATIBLE_ROOM_VERSION","room_version":"99"}`, mxfed.ErrIncompatibleRoomVersion, false, 0, "99"},
	"gateway":         {502, nil, `<html>`, mxfed.ErrUnknown, true, 0, ""},
	"redirect":        {307, http.Header{"Location": {"https://elsewhere.example/"}}, ``, mxfed.ErrUnknown, false, 0, ""},
	"no content":      {204, nil, ``, mxfed.ErrUnknown, false, 0, ""},
	"created":         {201, nil, `{}`, mxfed.ErrUnknown, false, 0, ""},
	"no JSON":         {200, nil, `x`, mxfed.ErrUnknown, false, 0, ""},
	"twice":           {200, nil, `{"n":1,"n":2}`, mxfed.ErrUnknown, false, 0, ""},
	"another type":    {200, nil, `{"n":"x"}`, mxfed.ErrUnknown, false, 0, ""},
	"too large":       {200, nil, `"` + strings.Repeat("x", 2<<20) + `"`, mxfed.ErrUnknown, false, 0, ""},
	"cut":             {200, http.Header{"Content-Length": {"100"}}, `{}`, mxfed.ErrUnknown, true, 0, ""},
}

// Every answer that is not a good one is an Error that names the server and says what it said.
func TestClient_DoErrors(t *testing.T) {
	var got []doRequest
	var name string
	to := newDoSite(t, &got, func(w http.ResponseWriter, r *http.Request) {
		for key, values := range doAnswers[name].header {
			w.Header()[key] = values
		}
		w.WriteHeader(doAnswers[name].status)
		io.WriteString(w, doAnswers[name].body)
	})
	c := newJoinSite(t, nil, nil).Server.Client()
	for name = range doAnswers {
		want := doAnswers[name]
		var out struct{ N int }
		err := c.Do(t.Context(), "", to.name, http.MethodGet, "/_matrix/x?y=z", nil, &out)
		var e *mxfed.Error
		require.ErrorAs(t, err, &e, name)
		require.ErrorIs(t, err, want.code, name)
		require.Equal(t, []any{to.name, "/_matrix/x", want.retry, want.roomVersion, want.temporary}, []any{e.Server, e.Endpoint, e.RetryAfter, e.RoomVersion, e.Temporary()}, name)
		if want.status != 200 {
			require.Equal(t, want.status, e.Status, name)
		}
	}
	require.Len(t, got, len(doAnswers))
	gone := newJoinSite(t, nil, nil)
	gone.listener.Close()
	err := c.Do(t.Context(), "", gone.name, http.MethodGet, "/_matrix/x", nil, nil)
	var e *mxfed.Error
	require.ErrorAs(t, err, &e)
	require.True(t, e.Temporary())
	require.Equal(t, 504, mxfed.ClientError(err).Status)
}

// A caller's context ends a call, whatever the other server does.
func TestClient_DoCancelled(t *testing.T) {
	for _, start := range []string{"", `{"n":`} {
		ignore := goleak.IgnoreCurrent()
		ctx, cancel := context.WithCancel(t.Context())
		var got []doRequest
		to := newDoSite(t, &got, func(w http.ResponseWriter, r *http.Request) {
			if start != "" {
				io.WriteString(w, start)
				http.NewResponseController(w).Flush()
			}
			cancel()
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		})
		from := newJoinSite(t, nil, nil)
		require.ErrorIs(t, from.Server.Client().Do(ctx, "", to.name, http.MethodPut, "/_matrix/x", struct{}{}, nil), context.Canceled)
		require.True(t, slices.ContainsFunc(got, func(r doRequest) bool { return r.method == http.MethodPut }))
		to.close()
		from.close()
		goleak.VerifyNone(t, ignore)
	}
}
