package mxfed

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// The URI that was signed is that of the request line, without what only proxies write there.
func TestRequestURI(t *testing.T) {
	for line, want := range map[string]string{
		"/_matrix/a?b=c":                      "/_matrix/a?b=c",
		"/_matrix/%2F%2f+%20?":                "/_matrix/%2F%2f+%20?",
		"https://us.example/_matrix/a?b":      "/_matrix/a?b",
		"http://us.example:8448/_matrix/a//b": "/_matrix/a//b",
		"https://us.example":                  "/",
		"/_matrix/a?u=https://x/y":            "/_matrix/a?u=https://x/y",
		"*":                                   "*",
	} {
		require.Equal(t, want, requestURI(&http.Request{RequestURI: line, URL: &url.URL{Path: "/rewritten"}}), line)
	}
	require.Equal(t, "/_matrix/a%2Fb?c", requestURI(&http.Request{URL: &url.URL{Path: "/_matrix/a/b", RawPath: "/_matrix/a%2Fb", RawQuery: "c"}}))
}

// Path parameters are split on the escaped path and unescaped once.
func TestParseTarget(t *testing.T) {
	for uri, want := range map[string][]string{
		"/_matrix/federation/v2/send_join/!r:x/$e":               {"!r:x", "$e"},
		"/_matrix/federation/v2/send_join/%21r%3Ax/%24a%2Fb+c":   {"!r:x", "$a/b+c"},
		"/_matrix/federation/v2/send_join/a%252Fb/%2E%2E":        {"a%2Fb", ".."},
		"/_matrix/federation/v2/send_join/a%20b/c%3Fd?e=f%20g":   {"a b", "c?d"},
		"/_matrix/federation/v2/send_join/%ff/%00":               {"\xff", "\x00"},
		"/_matrix/federation/v2/send_join/a/b/":                  {"a", "b", ""},
		"/_matrix/federation/v2/send_join":                       nil,
		"/_matrix/federation/v2/send_join//":                     {"", ""},
		"https://us.example/_matrix/federation/v2/send_join/a/b": {"a", "b"},
	} {
		got, err := parseTarget(&http.Request{RequestURI: uri})
		require.NoError(t, err, uri)
		require.Equal(t, want, got.params, uri)
		require.Equal(t, []string{"v2", "send_join"}, []string{got.version, got.endpoint})
	}
	for uri, code := range map[string]ErrorCode{
		"/_matrix/federation/v2/send_join/%zz/b":      ErrInvalidParam,
		"/_matrix/federation/v2/send_join/a/%2":       ErrInvalidParam,
		"/_matrix/federation/v2/send_join/a/b?c=%zz":  ErrInvalidParam,
		"/_matrix/federation/v2/send_join/a/b?c=1;d=": ErrInvalidParam,
		"/_matrix/federation/v2":                      ErrUnrecognized,
		"/_matrix/client/v3/sync":                     ErrUnrecognized,
		"/":                                           ErrUnrecognized,
		"*":                                           ErrUnrecognized,
		"":                                            ErrUnrecognized,
	} {
		r := &http.Request{RequestURI: uri, URL: &url.URL{}}
		_, err := parseTarget(r)
		require.ErrorIs(t, err, code, uri)
	}
}

// Whom a request speaks of is read where its endpoint will read it.
func TestTarget_Subject(t *testing.T) {
	for name, c := range map[string]struct {
		target target
		body   value
		user   UserID
	}{
		"make_join":         {target{version: "v1", endpoint: "make_join", params: []string{"!r:x", "@u:x"}}, "", "@u:x"},
		"send_join":         {target{version: "v2", endpoint: "send_join", params: []string{"!r:x", "$e"}}, `{"event":{"state_key":"@decoy:x"},"state_key":"@u:x"}`, "@u:x"},
		"invite, version 1": {target{version: "v1", endpoint: "invite", params: []string{"!r:x", "$e"}}, `{"event":{"state_key":"@decoy:x"},"state_key":"@u:x"}`, "@u:x"},
		"invite, version 2": {target{version: "v2", endpoint: "invite", params: []string{"!r:x", "$e"}}, `{"event":{"state_key":"@u:x"},"state_key":"@decoy:x"}`, "@u:x"},
		"no event":          {target{version: "v2", endpoint: "invite", params: []string{"!r:x", "$e"}}, `{"state_key":"@decoy:x"}`, ""},
		"no object":         {target{version: "v2", endpoint: "send_join", params: []string{"!r:x", "$e"}}, `[]`, ""},
		"no string":         {target{version: "v2", endpoint: "send_join", params: []string{"!r:x", "$e"}}, `{"state_key":1}`, ""},
	} {
		room, user := c.target.subject(c.body)
		require.Equal(t, c.user, user, name)
		require.Equal(t, RoomID("!r:x"), room)
	}
	room, user := (&target{params: []string{"one"}}).subject("{}")
	require.Empty(t, string(room)+string(user))
}

// An answer that has begun cannot become an error any more.
func TestServer_RefuseUnfinished(t *testing.T) {
	signer, err := NewSigner("us.example", "ed25519:k", ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
	require.NoError(t, err)
	s, err := NewServer(Config{Signers: []*Signer{signer}})
	require.NoError(t, err)
	w := httptest.NewRecorder()
	s.refuse(w, httptest.NewRequest("PUT", "/", nil), &unfinishedError{refuse(ErrForbidden, "late")})
	require.Empty(t, w.Body.String())
	s.refuse(w, httptest.NewRequest("PUT", "/", nil), refuse(ErrForbidden, "in time"))
	require.Equal(t, 403, w.Code)
}
