package mxfed_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// srvXMatrix is an Authorization header that is made by hand. What is empty is what a good one has; "-" leaves it out.
type srvXMatrix struct {
	origin, destination, key, sig string // as sent
	// What is signed instead of what is sent.
	method, uri, to, content string
	by                       *srvPeer
}

// header signs the request r, which domain sends to us.example.
func (x srvXMatrix) header(t testing.TB, s *srvSite, r *http.Request, body string) string {
	or := func(text, usual string) string {
		if text == "" {
			return usual
		}
		return strings.TrimPrefix(text, "-")
	}
	by := x.by
	if by == nil {
		by = s.domain
	}
	signed := map[string]any{"method": or(x.method, r.Method), "uri": or(x.uri, r.RequestURI), "origin": or(x.origin, "domain"), "destination": or(x.to, "us.example")}
	if content := or(x.content, body); content != "" {
		var v any
		require.NoError(t, json.Unmarshal([]byte(content), &v))
		signed["content"] = v
	}
	sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(by.key, srvJSON(t, signed)))
	var params []string
	for _, p := range [][2]string{{"origin", or(x.origin, "domain")}, {"destination", or(x.destination, "us.example")}, {"key", or(x.key, "ed25519:k")}, {"sig", or(x.sig, sig)}} {
		if p[1] != "" {
			params = append(params, p[0]+`="`+p[1]+`"`)
		}
	}
	return "X-Matrix " + strings.Join(params, ",")
}

// srvAuthCase is a request to GET make_join or PUT send_join of a room that us.example is in. It is answered with 200, 400
// or 401, as its Authorization headers deserve.
type srvAuthCase struct {
	headers []srvXMatrix
	edit    func(header string) string
	status  int
	code    mxfed.ErrorCode // M_UNAUTHORIZED if empty
	lookups int64           // of keys
}

func srvAuthCases(t *testing.T) map[string]srvAuthCase {
	one := func(x srvXMatrix) []srvXMatrix { return []srvXMatrix{x} }
	other := newSrvPeer(t, "other.example")
	good := srvXMatrix{}
	return map[string]srvAuthCase{
		"good":                               {headers: one(good), status: 200},
		"no header":                          {status: 401},
		"another scheme":                     {headers: one(good), edit: srvReplace("X-Matrix", "Bearer"), status: 401},
		"scheme alone":                       {headers: one(good), edit: func(string) string { return "X-Matrix" }, status: 401},
		"scheme and space":                   {headers: one(good), edit: func(string) string { return "X-Matrix " }, status: 401},
		"no parameters":                      {headers: one(good), edit: func(string) string { return "X-Matrix nonsense" }, status: 401},
		"unterminated":                       {headers: one(good), edit: func(h string) string { return h[:len(h)-1] }, status: 401},
		"junk at the end":                    {headers: one(good), edit: func(h string) string { return h + " junk" }, status: 401},
		"scheme in another case":             {headers: one(good), edit: srvReplace("X-Matrix", "x-MATRIX"), status: 200},
		"names in another case":              {headers: one(good), edit: srvReplace("origin=", "ORIGIN="), status: 200},
		"spaces and tabs":                    {headers: one(good), edit: func(h string) string { return strings.ReplaceAll(strings.Replace(h, " ", "   ", 1), ",", "\t ,  ") }, status: 200},
		"values without quotes":              {headers: one(good), edit: srvReplace(`"ed25519:k"`, "ed25519:k"), status: 200},
		"escaped values":                     {headers: one(good), edit: srvReplace(`"domain"`, `"\d\omain"`), status: 200},
		"unknown parameter":                  {headers: one(good), edit: func(h string) string { return h + `,extra="a,b=\"c"` }, status: 200},
		"parameter twice":                    {headers: one(good), edit: func(h string) string { return h + `,origin="domain"` }, status: 401},
		"signature under another name":       {headers: one(good), edit: srvReplace("sig=", "signature="), status: 401},
		"origin missing":                     {headers: one(srvXMatrix{origin: "-"}), status: 401},
		"key missing":                        {headers: one(srvXMatrix{key: "-"}), status: 401},
		"signature missing":                  {headers: one(srvXMatrix{sig: "-"}), status: 401},
		"destination missing":                {headers: one(srvXMatrix{destination: "-"}), status: 200},
		"destination missing, not signed":    {headers: one(srvXMatrix{destination: "-", to: "-"}), status: 401, lookups: 1},
		"destination empty":                  {headers: one(good), edit: srvReplace(`destination="us.example"`, `destination=""`), status: 401},
		"destination is another":             {headers: one(srvXMatrix{destination: "third.example", to: "third.example"}), status: 401},
		"destination in another case":        {headers: one(srvXMatrix{destination: "US.example", to: "US.example"}), status: 401},
		"destination with a port":            {headers: one(srvXMatrix{destination: "us.example:8448", to: "us.example:8448"}), status: 401},
		"signed for another":                 {headers: one(srvXMatrix{to: "third.example"}), status: 401, lookups: 1},
		"origin is us":                       {headers: one(srvXMatrix{origin: "us.example", by: newSrvPeer(t, "us.example")}), status: 401},
		"origin no server name":              {headers: one(srvXMatrix{origin: "localhost:http"}), status: 400, code: mxfed.ErrInvalidParam},
		"origin a URL":                       {headers: one(srvXMatrix{origin: "https://domain"}), status: 400, code: mxfed.ErrInvalidParam},
		"origin with a path":                 {headers: one(srvXMatrix{origin: "domain/.."}), status: 400, code: mxfed.ErrInvalidParam},
		"origin with an underscore":          {headers: one(srvXMatrix{origin: "do_main"}), status: 400, code: mxfed.ErrInvalidParam},
		"origin is a third server":           {headers: one(srvXMatrix{origin: "third.example"}), status: 401, lookups: 1},
		"origin unknown":                     {headers: one(srvXMatrix{origin: "nobody.example"}), status: 401, lookups: 1},
		"key unknown":                        {headers: one(srvXMatrix{key: "ed25519:unknown"}), status: 401, lookups: 1},
		"key of another algorithm":           {headers: one(srvXMatrix{key: "rsa:k"}), status: 401, lookups: 1},
		"wrong key":                          {headers: one(srvXMatrix{by: other}), status: 401, lookups: 1},
		"signature no base64":                {headers: one(srvXMatrix{sig: "!!!"}), status: 401, lookups: 1},
		"signature too short":                {headers: one(srvXMatrix{sig: "AAAA"}), status: 401, lookups: 1},
		"signature padded":                   {headers: one(good), edit: func(h string) string { return h[:len(h)-1] + `=="` }, status: 200},
		"another method signed":              {headers: one(srvXMatrix{method: "POST"}), status: 401, lookups: 1},
		"another URI signed":                 {headers: one(srvXMatrix{uri: "/_matrix/federation/v1/make_join/!x:d/@u:d"}), status: 401, lookups: 1},
		"a body signed that there is not":    {headers: one(srvXMatrix{content: `{"a":1}`}), status: 401, lookups: 1},
		"a key that is valid to this moment": {headers: one(srvXMatrix{key: "ed25519:now"}), status: 200},
		"a key that has run out":             {headers: one(srvXMatrix{key: "ed25519:past"}), status: 401, lookups: 1},
		"a key that was replaced":            {headers: one(srvXMatrix{key: "ed25519:old"}), status: 401, lookups: 1},
		"two keys":                           {headers: []srvXMatrix{good, {key: "ed25519:now"}}, status: 200},
		"two keys, one unknown":              {headers: []srvXMatrix{{key: "ed25519:unknown", by: other}, good}, status: 200},
		"two keys, one replaced":             {headers: []srvXMatrix{{key: "ed25519:old", by: other}, good}, status: 200},
		"two keys, one wrong":                {headers: []srvXMatrix{good, {key: "ed25519:now", by: other}}, status: 401, lookups: 1},
		"two origins":                        {headers: []srvXMatrix{good, {origin: "third.example", by: newSrvPeer(t, "third.example")}}, status: 401},
		"two destinations":                   {headers: []srvXMatrix{good, {destination: "-"}}, status: 401},
		"two headers, one unreadable":        {headers: []srvXMatrix{good, {key: "-"}}, status: 401},
		"nine headers":                       {headers: make([]srvXMatrix, 9), status: 401},
	}
}

// A request counts as the origin's only with a signature over all of it by a key that is valid now. Everything that can be
// refused without keys is, so that nobody can make this server look up anything.
// https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func TestRequestAuthentication(t *testing.T) {
	s := newSrvSite(t)
	known := s.keys.byName["domain"]["ed25519:k"]
	for id, k := range map[mxfed.KeyID]mxfed.Key{"ed25519:now": {ValidUntil: srvNow}, "ed25519:past": {ValidUntil: srvNow.Add(-time.Millisecond)},
		"ed25519:old": {ValidUntil: known.ValidUntil, Expired: srvNow.Add(time.Hour)}, "rsa:k": {ValidUntil: known.ValidUntil}} {
		k.Public = known.Public
		s.keys.byName["domain"][id] = k
	}
	room := newSrvRoom(t, s, "10", nil)
	join := room.joinOf("@alice:domain", "").sign(t, "10", s.domain)
	for name, c := range srvAuthCases(t) {
		for _, body := range []string{"", string(join)} {
			method, uri := http.MethodGet, srvURI("v1/make_join", string(room.id), "@alice:domain")+"?ver=10"
			if body != "" {
				method, uri = http.MethodPut, room.memberURI("v2/send_join", join)
			}
			t.Run(name+", "+method, func(t *testing.T) {
				s.reset()
				r := httptest.NewRequest(method, uri, strings.NewReader(body))
				for _, x := range c.headers {
					h := x.header(t, s, r, body)
					if c.edit != nil {
						h = c.edit(h)
					}
					r.Header.Add("Authorization", h)
				}
				w := s.serve(r)
				if c.status == 200 {
					require.Equal(t, 200, w.Code, "%s", w.Body)
					require.Equal(t, s.domain.name, s.allowed[0].Origin)
					return
				}
				code := mxfed.ErrUnauthorized
				if c.code != "" {
					code = c.code
				}
				s.requireRefused(t, w, c.status, code)
				require.Equal(t, c.lookups, s.keys.asked.Load(), "look-ups of keys")
				require.Empty(t, s.allowed)
				require.Zero(t, s.asks.Load())
			})
		}
	}
}

// Keys that cannot be fetched are the caller's affair, not a failure of this server.
func TestRequestAuthentication_KeysUnreachable(t *testing.T) {
	s := newSrvSite(t)
	s.keys.fail = errors.New("no route to nobody.example")
	w := s.send(t, newSrvPeer(t, "nobody.example"), "GET", srvURI("v1/make_join", "!r:us.example", "@u:nobody.example"), nil)
	s.requireRefused(t, w, 401, mxfed.ErrUnauthorized)
	require.NotContains(t, w.Body.String(), "route")
}

// The signature covers query and escapes byte for byte; a proxy's absolute form and a mux that rewrites URLs change
// nothing.
func TestRequestAuthentication_URI(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	uri := srvURI("v1/make_join", string(room.id), "@alice:domain") + "?ver=1&ver=10"
	for name, c := range map[string]struct {
		signed, sent string
		status       int
	}{
		"the same":          {uri, uri, 200},
		"absolute":          {uri, "https://us.example" + uri, 200},
		"query in order":    {uri, strings.Replace(uri, "ver=1&ver=10", "ver=10&ver=1", 1), 401},
		"query cut off":     {uri, strings.TrimSuffix(uri, "&ver=10"), 401},
		"other escapes":     {uri, strings.Replace(uri, "@", "%40", 1), 401},
		"escapes as signed": {strings.Replace(uri, "@", "%40", 1), strings.Replace(uri, "@", "%40", 1), 200},
		"lower-case escape": {strings.Replace(uri, ":", "%3a", 1), strings.Replace(uri, ":", "%3a", 1), 200},
		"empty query":       {strings.TrimSuffix(uri, "ver=1&ver=10"), strings.TrimSuffix(uri, "ver=1&ver=10"), 400}, // no versions
		"question mark":     {strings.TrimSuffix(uri, "?ver=1&ver=10"), strings.TrimSuffix(uri, "ver=1&ver=10"), 401},
		"plus":              {uri + "&x=a+b", uri + "&x=a%20b", 401},
		"double slash":      {"/" + uri, uri, 401},
	} {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest("GET", c.sent, nil)
			r.Header.Set("Authorization", srvXMatrix{uri: c.signed}.header(t, s, r, ""))
			r.URL.Path, r.URL.RawPath = "/rewritten", "" // by a mux
			require.Equal(t, c.status, s.serve(r).Code)
			r.URL.Path = "/"
		})
	}
	r := httptest.NewRequest("GET", uri, nil)
	r.Header.Set("Authorization", srvXMatrix{}.header(t, s, r, ""))
	r.RequestURI = "" // as of requests that no server has read
	require.Equal(t, 200, s.serve(r).Code)
}

// Which of several own names a request is for is what it says, or else what Host says.
func TestRequestAuthentication_OwnNames(t *testing.T) {
	second := newSrvPeer(t, "second.example:8448")
	s := newSrvSite(t, func(cfg *mxfed.Config) { cfg.Signers = append(cfg.Signers, second.signer) })
	s.allow = func(_ context.Context, r *mxfed.Request) error {
		return &mxfed.Error{Code: "M_TEST", Message: string(r.To)}
	}
	for name, c := range map[string]struct{ destination, host, to string }{
		"said":                 {"second.example:8448", "us.example", "second.example:8448"},
		"said, default":        {"us.example", "second.example:8448", "us.example"},
		"not said":             {"-", "second.example:8448", "second.example:8448"},
		"not said, other Host": {"-", "10.0.0.1", "us.example"},
		"not said, near Host":  {"-", "second.example", "us.example"},
	} {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest("GET", srvURI("v1/make_join", "!r:d", "@u:domain"), nil)
			r.Host = c.host
			r.Header.Set("Authorization", srvXMatrix{destination: c.destination, to: c.to}.header(t, s, r, ""))
			require.Equal(t, c.to, requireSrvError(t, s.serve(r), 400, "M_TEST")["error"])
		})
	}
}

// srvBody counts what is read of it.
type srvBody struct {
	io.Reader
	n int
}

func (b *srvBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.n += n
	return n, err
}

// Bodies are read once the header is in order, up to the limit, and before keys are fetched. Those of GET are not read.
func TestRequestAuthentication_Body(t *testing.T) {
	s := newSrvSite(t, func(cfg *mxfed.Config) { cfg.MaxRequest = 1000 })
	room := newSrvRoom(t, s, "10", nil)
	for name, c := range map[string]struct {
		body   string
		status int
		code   mxfed.ErrorCode
	}{
		"empty":            {"", 400, mxfed.ErrNotJSON},
		"white space":      {" \n", 400, mxfed.ErrNotJSON},
		"no JSON":          {"hello", 400, mxfed.ErrNotJSON},
		"half an object":   {`{"a":`, 400, mxfed.ErrNotJSON},
		"two objects":      {"{}{}", 400, mxfed.ErrNotJSON},
		"byte order mark":  {"\ufeff{}", 400, mxfed.ErrNotJSON},
		"UTF-16":           {"{\x00}\x00", 400, mxfed.ErrNotJSON},
		"too deep":         {strings.Repeat("[", 300) + strings.Repeat("]", 300), 400, mxfed.ErrNotJSON},
		"much too big":     {`{"a":"` + strings.Repeat("x", 100_000) + `"}`, 413, mxfed.ErrTooLarge},
		"one byte too big": {`{"a":"` + strings.Repeat("x", 1000-7) + `"}`, 413, mxfed.ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			s.reset()
			body := &srvBody{Reader: strings.NewReader(c.body)}
			r := httptest.NewRequest("PUT", srvURI("v2/send_join", string(room.id), "$e"), body)
			r.Header.Set("Authorization", srvXMatrix{}.header(t, s, r, ""))
			s.requireRefused(t, s.serve(r), c.status, c.code)
			require.Zero(t, s.keys.asked.Load())
			require.LessOrEqual(t, body.n, 1001)
		})
	}
	for _, text := range []string{"null", "[]", `"x"`, "1", "true"} {
		s.reset()
		s.requireRefused(t, s.send(t, s.domain, "PUT", srvURI("v2/send_join", "!unknown:us.example", "$e"), []byte(text)), 400, mxfed.ErrBadJSON)
	}
	largest := `{"a":"` + strings.Repeat("x", 1000-8) + `"}`
	s.requireRefused(t, s.send(t, s.domain, "PUT", srvURI("v2/send_join", string(room.id), "$e"), []byte(largest)), 400, mxfed.ErrInvalidParam)

	unread := &srvBody{Reader: strings.NewReader("{}")}
	r := httptest.NewRequest("PUT", srvURI("v2/send_join", string(room.id), "$e"), unread)
	r.Header.Set("Authorization", srvXMatrix{destination: "third.example"}.header(t, s, r, "{}"))
	s.requireRefused(t, s.serve(r), 401, mxfed.ErrUnauthorized)
	require.Zero(t, unread.n, "the header is judged first")

	r = httptest.NewRequest("PUT", srvURI("v2/send_join", string(room.id), "$e"), io.MultiReader(strings.NewReader("{"), &srvBroken{}))
	r.Header.Set("Authorization", srvXMatrix{}.header(t, s, r, "{}"))
	s.requireRefused(t, s.serve(r), 400, mxfed.ErrNotJSON)
	r.Body = nil
	s.requireRefused(t, s.serve(r), 400, mxfed.ErrNotJSON)
}

type srvBroken struct{}

func (*srvBroken) Read([]byte) (int, error) { return 0, errors.New("broken off") }

// The body of a GET is neither read nor signed nor handed on.
func TestRequestAuthentication_GETWithBody(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	body := &srvBody{Reader: strings.NewReader(`{"sender":"@eve:domain"}`)}
	r := httptest.NewRequest("GET", srvURI("v1/make_join", string(room.id), "@alice:domain")+"?ver=10", body)
	r.Header.Set("Authorization", srvXMatrix{}.header(t, s, r, ""))
	require.Equal(t, 200, s.serve(r).Code)
	require.Zero(t, body.n)
	require.Empty(t, s.allowed[0].Body)
}

// What was signed is what the sender's JSON means, not how it is written, and that is what is handed on. The type of the
// content need not be said.
func TestRequestAuthentication_Content(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	join := string(room.joinOf("@alice:domain", "").sign(t, "10", s.domain))
	for name, body := range map[string]string{
		"spaces":  " " + strings.ReplaceAll(join, `,"`, ",\n \"") + "\n",
		"escapes": strings.ReplaceAll(join, "m.room.member", `m\u002eroom\u002Emember`),
	} {
		for _, contentType := range []string{"", "application/json", "text/plain", "nonsense/"} {
			s.reset()
			r := httptest.NewRequest("PUT", room.memberURI("v2/send_join", []byte(join)), strings.NewReader(body))
			r.Header.Set("Authorization", srvXMatrix{}.header(t, s, r, join))
			r.Header.Set("Content-Type", contentType)
			require.Equal(t, 200, s.serve(r).Code, name)
			require.Equal(t, join, string(s.allowed[0].Body))
		}
	}
}

// A host's own endpoint is authenticated in the same way, whatever its path.
func TestAuthenticate(t *testing.T) {
	s := newSrvSite(t)
	for method, body := range map[string]string{"GET": "", "PUT": `{"pdus":[], "a":1}`, "POST": `[]`} {
		s.reset()
		var content []byte
		if body != "" {
			content = []byte(body)
		}
		r := httptest.NewRequest(method, "/_matrix/federation/v1/send/%2F1?x=%20", bytes.NewReader(content))
		require.NoError(t, s.domain.signer.SignRequest(r, s.own.name, content))
		got, err := s.server.Authenticate(r)
		require.NoError(t, err)
		want := &mxfed.Request{Origin: "domain", To: "us.example", Body: []byte{}}
		if body != "" {
			want.Body = srvCanonical(t, content)
		}
		require.Equal(t, want, got)
		require.Len(t, s.allowed, 1)

		r.Body = io.NopCloser(strings.NewReader(body))
		r.RequestURI += "y"
		_, err = s.server.Authenticate(r)
		require.ErrorIs(t, err, mxfed.ErrUnauthorized)
		w := httptest.NewRecorder()
		mxfed.WriteError(w, err)
		requireSrvError(t, w, 401, mxfed.ErrUnauthorized)
	}
	s.allow = func(context.Context, *mxfed.Request) error { return fmt.Errorf("full: %w", mxfed.ErrLimitExceeded) }
	r := s.request(t, s.domain, "GET", "/_matrix/federation/v1/state/!r:d?event_id=$e", nil)
	_, err := s.server.Authenticate(r)
	require.ErrorIs(t, err, mxfed.ErrLimitExceeded)
}

// srvEndpoints are the published endpoints that a host can offer here: what an unsigned request with an empty body gets.
var srvEndpoints = map[string]int{
	"PUT v1/invite": 401, "PUT v2/invite": 401, "GET v1/make_join": 401, "PUT v1/send_join": 401, "PUT v2/send_join": 401,
	"GET v1/make_leave": 401, "PUT v1/send_leave": 401, "PUT v2/send_leave": 401, "GET v1/make_knock": 401, "PUT v1/send_knock": 401,
	"PUT v1/exchange_third_party_invite": 401, "GET v1/query": 401,
	"GET v1/state": 401, "GET v1/state_ids": 401, "GET v1/event": 401, "GET v1/event_auth": 401,
	"PUT v1/3pid": 400, "GET v1/version": 200, "GET /_matrix/key/v2/server": 200,
}

// srvNobody is a host that must not be asked.
type srvNobody struct {
	mxfed.EventHost
	mxfed.BindHost
	mxfed.DirectoryHost
}

// Of the published endpoints, those that a host offers are served, and only open ones without a signature; those of a
// notary need a KeyRing. A server without hosts publishes its keys and nothing else.
// https://spec.matrix.org/v1.19/server-server-api/#unsupported-endpoints
func TestEndpoints(t *testing.T) {
	var file struct {
		Endpoints []struct{ Method, Path, Auth string }
	}
	require.NoError(t, srvReadVector("endpoints.json", &file))
	require.Len(t, file.Endpoints, 26)
	s := newSrvSite(t)
	member, nobody := mxfed.MemberHostFunc(s.takeMember), srvNobody{}
	everything := mxfed.NewHandler(s.server, mxfed.Hosts{Invite: mxfed.InviteHostFunc(s.takeInvite), Join: mxfed.JoinHostFunc(s.takeJoin),
		Leave: member, Knock: member, Events: nobody, ThirdParty: nobody, Bind: nobody, Directory: nobody, Version: mxfed.ServerVersion{Name: "x"}})
	nothing := mxfed.NewHandler(s.server, mxfed.Hosts{})
	served := maps.Clone(srvEndpoints)
	for _, e := range file.Endpoints {
		uri := strings.NewReplacer("{roomId}", "!r:us.example", "{eventId}", "$e", "{userId}", "@u:domain", "{txnId}", "1", "{serverName}", "domain").Replace(e.Path)
		name := uri
		if path, ok := strings.CutPrefix(uri, "/_matrix/federation/"); ok {
			name = strings.Join(strings.Split(path, "/")[:2], "/")
		}
		name = e.Method + " " + name
		want, ok := served[name]
		delete(served, name)
		for i, handler := range []http.Handler{everything, nothing} {
			s.reset()
			status, w := want, httptest.NewRecorder()
			if i == 1 && name != "GET /_matrix/key/v2/server" {
				status = 0
			}
			handler.ServeHTTP(w, httptest.NewRequest(e.Method, uri, strings.NewReader("{}")))
			switch {
			case status == 0:
				s.requireRefused(t, w, 404, mxfed.ErrUnrecognized)
			case status == 401:
				s.requireRefused(t, w, 401, mxfed.ErrUnauthorized)
			default:
				require.Equal(t, status, w.Code, name)
			}
		}
		require.True(t, !ok || (e.Auth == "X-Matrix") == (want == 401), name)
	}
	require.Empty(t, served)
}
