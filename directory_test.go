package mxfed_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// dirSite is us.example with aliases, and domain that asks it over TLS.
type dirSite struct {
	*srvSite
	net    *tpNet
	us     *tpServer
	client *mxfed.Client
	asked  []mxfed.RoomAlias
	answer *mxfed.AliasResponse
	fails  error
}

func newDirSite(t testing.TB) *dirSite {
	s := &dirSite{srvSite: newSrvSite(t), net: newTPNet(t), answer: &mxfed.AliasResponse{Room: "!r:us.example", Servers: []mxfed.ServerName{"us.example", "b.example:8448"}}}
	s.handler = mxfed.NewDirectoryHandler(s.server, mxfed.DirectoryHostFunc(func(_ context.Context, alias mxfed.RoomAlias) (*mxfed.AliasResponse, error) {
		s.asked = append(s.asked, alias)
		return s.answer, s.fails
	}))
	s.us = s.net.serve("us.example", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }))
	server, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{s.domain.signer}, Keys: &s.keys, HTTP: s.net})
	require.NoError(t, err)
	s.client = server.Client()
	return s
}

const dirURI = "/_matrix/federation/v1/query/directory"

// An alias is resolved from server to server. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1querydirectory
func TestDirectory(t *testing.T) {
	s := newDirSite(t)
	for _, alias := range []mxfed.RoomAlias{"#room:us.example", "#:us.example", "#ä +&%/?#=\x01\":us.example", mxfed.RoomAlias("#" + strings.Repeat("a", 243) + ":us.example")} {
		answer, err := s.client.ResolveAlias(t.Context(), alias)
		require.NoError(t, err, alias)
		require.Equal(t, s.answer, answer)
		require.Equal(t, alias, s.asked[len(s.asked)-1])
	}
	w := s.send(t, s.domain, "GET", dirURI+"?room_alias=%23a:us.example", nil)
	require.Equal(t, 200, w.Code)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	require.JSONEq(t, `{"room_id":"!r:us.example","servers":["us.example","b.example:8448"]}`, w.Body.String())
	text, err := json.Marshal(s.answer)
	require.NoError(t, err)
	require.JSONEq(t, w.Body.String(), string(text))
	s.answer = &mxfed.AliasResponse{Room: "!r"}
	require.JSONEq(t, `{"room_id":"!r","servers":[]}`, s.send(t, s.domain, "GET", dirURI+"?room_alias=%23a:us.example", nil).Body.String())
}

// What is wrong with a question is said before the host hears of it.
func TestDirectory_Refused(t *testing.T) {
	s := newDirSite(t)
	for name, c := range map[string]struct {
		method, uri string
		status      int
		code        mxfed.ErrorCode
	}{
		"no alias":       {"GET", dirURI, 400, mxfed.ErrMissingParam},
		"another key":    {"GET", dirURI + "?alias=%23a:us.example", 400, mxfed.ErrMissingParam},
		"empty":          {"GET", dirURI + "?room_alias=", 400, mxfed.ErrInvalidParam},
		"a room ID":      {"GET", dirURI + "?room_alias=!a:us.example", 400, mxfed.ErrInvalidParam},
		"no server":      {"GET", dirURI + "?room_alias=%23a", 400, mxfed.ErrInvalidParam},
		"bad server":     {"GET", dirURI + "?room_alias=%23a:us_example", 400, mxfed.ErrInvalidParam},
		"another server": {"GET", dirURI + "?room_alias=%23a:domain", 400, mxfed.ErrInvalidParam},
		"another port":   {"GET", dirURI + "?room_alias=%23a:us.example:8448", 400, mxfed.ErrInvalidParam},
		"NUL":            {"GET", dirURI + "?room_alias=%23a%00:us.example", 400, mxfed.ErrInvalidParam},
		"no UTF-8":       {"GET", dirURI + "?room_alias=%23%ff:us.example", 400, mxfed.ErrInvalidParam},
		"too long":       {"GET", dirURI + "?room_alias=%23" + strings.Repeat("a", 244) + ":us.example", 400, mxfed.ErrInvalidParam},
		"bad escape":     {"GET", dirURI + "?room_alias=%2", 400, mxfed.ErrInvalidParam},
		"PUT":            {"PUT", dirURI + "?room_alias=%23a:us.example", 405, mxfed.ErrUnrecognized},
		"version 2":      {"GET", strings.Replace(dirURI, "v1", "v2", 1) + "?room_alias=%23a:us.example", 404, mxfed.ErrUnrecognized},
		"profile":        {"GET", "/_matrix/federation/v1/query/profile?user_id=@a:us.example", 404, mxfed.ErrUnrecognized},
		"no query":       {"GET", "/_matrix/federation/v1/query", 404, mxfed.ErrUnrecognized},
		"longer":         {"GET", dirURI + "/x", 404, mxfed.ErrUnrecognized},
	} {
		t.Run(name, func(t *testing.T) {
			s.requireRefused(t, s.send(t, s.domain, c.method, c.uri, []byte("{}")), c.status, c.code)
			if c.status == 404 { // whoever asks
				requireSrvError(t, s.serve(httptest.NewRequest(c.method, c.uri, nil)), 404, mxfed.ErrUnrecognized)
			}
			require.Empty(t, s.asked)
		})
	}
	requireSrvError(t, s.serve(httptest.NewRequest("GET", dirURI+"?room_alias=%23a:us.example", nil)), 401, mxfed.ErrUnauthorized)
	require.Empty(t, s.asked)
	s.fails = mxfed.ErrNotFound
	s.requireRefused(t, s.send(t, s.domain, "GET", dirURI+"?room_alias=%23a:us.example", nil), 404, mxfed.ErrNotFound)
	_, err := s.client.ResolveAlias(t.Context(), "#a:us.example")
	require.ErrorIs(t, err, mxfed.ErrNotFound)
	s.fails = io.ErrUnexpectedEOF
	s.requireRefused(t, s.send(t, s.domain, "GET", dirURI+"?room_alias=%23a:us.example", nil), 500, mxfed.ErrUnknown)
	s.fails, s.answer = nil, nil
	s.requireRefused(t, s.send(t, s.domain, "GET", dirURI+"?room_alias=%23a:us.example", nil), 404, mxfed.ErrNotFound)
}

// The client calls nobody for what is no alias of another server.
func TestClient_ResolveAliasRefused(t *testing.T) {
	s := newDirSite(t)
	for _, alias := range []mxfed.RoomAlias{"", "#", "room:us.example", "!r:us.example", "#r", "#r:", "#r:domain", "#r\x00:us.example", "#\xff:us.example", "#r:us_example", mxfed.RoomAlias("#" + strings.Repeat("a", 244) + ":us.example")} {
		_, err := s.client.ResolveAlias(t.Context(), alias)
		require.ErrorIs(t, err, mxfed.ErrInvalidParam, alias)
	}
	require.Empty(t, s.us.seen())
}

// Of an answer, only what has the right form is handed on.
func TestClient_ResolveAliasAnswers(t *testing.T) {
	s := newDirSite(t)
	many := make([]mxfed.ServerName, 300)
	for i := range many {
		many[i] = mxfed.ServerName(fmt.Sprintf("s%d.example", i))
	}
	v12 := "!" + strings.Repeat("a", 43)
	for name, c := range map[string]struct {
		body    string
		room    mxfed.RoomID
		servers []mxfed.ServerName
	}{
		"version 12":        {`{"room_id":"` + v12 + `","servers":["a.example"]}`, mxfed.RoomID(v12), []mxfed.ServerName{"a.example"}},
		"junk and repeated": {`{"room_id":"!r:x","servers":["a.example",1,"","a_b","a.example",null,"1.2.3.4:5","x:y"],"more":1}`, "!r:x", []mxfed.ServerName{"a.example", "1.2.3.4:5"}},
		"no servers":        {`{"room_id":"!r:x"}`, "!r:x", nil},
		"servers an object": {`{"room_id":"!r:x","servers":{"a.example":1}}`, "!r:x", nil},
		"no room":           {`{"servers":["a.example"]}`, "", nil},
		"room an alias":     {`{"room_id":"#r:x","servers":[]}`, "", nil},
		"room a number":     {`{"room_id":1,"servers":[]}`, "", nil},
		"room too short":    {`{"room_id":"!` + strings.Repeat("a", 42) + `","servers":[]}`, "", nil},
		"room too long":     {`{"room_id":"!` + strings.Repeat("a", 300) + `:x","servers":[]}`, "", nil},
		"a list":            {`[]`, "", nil},
		"no JSON":           {`x`, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s.handler = tpSay(200, c.body)
			answer, err := s.client.ResolveAlias(t.Context(), "#a:us.example")
			if c.room == "" {
				var e *mxfed.Error
				require.ErrorAs(t, err, &e)
				require.Equal(t, []any{mxfed.ServerName("us.example"), "query", mxfed.ErrUnknown}, []any{e.Server, e.Endpoint, e.Code})
				return
			}
			require.NoError(t, err)
			require.Equal(t, &mxfed.AliasResponse{Room: c.room, Servers: c.servers}, answer)
		})
	}
	s.handler = tpSay(200, string(srvJSON(t, map[string]any{"room_id": "!r:x", "servers": many})))
	answer, err := s.client.ResolveAlias(t.Context(), "#a:us.example")
	require.NoError(t, err)
	require.Equal(t, many[:100], answer.Servers)
	require.Equal(t, mxfed.ServerName("us.example"), mxfed.RoomAlias("#a:us.example").Server())
	require.Equal(t, mxfed.ServerName("us.example:1"), mxfed.RoomAlias("#a:us.example:1").Server())
}

// Anybody may ask for the version. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1version
func TestVersion(t *testing.T) {
	const uri = "/_matrix/federation/v1/version"
	s := newDirSite(t)
	s.handler = mxfed.NewVersionHandler(s.server, mxfed.ServerVersion{Name: "My \"server\" <&>", Version: "1.0\xff"})
	w := s.serve(httptest.NewRequest("GET", uri, nil))
	require.Equal(t, 200, w.Code)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	require.JSONEq(t, `{"server":{"name":"My \"server\" <&>","version":"1.0\ufffd"}}`, w.Body.String())
	require.Empty(t, s.allowed)
	got, err := s.client.Version(t.Context(), "us.example")
	require.NoError(t, err)
	require.Equal(t, &mxfed.ServerVersion{Name: "My \"server\" <&>", Version: "1.0\ufffd"}, got)
	text, err := json.Marshal(got)
	require.NoError(t, err)
	require.JSONEq(t, w.Body.String(), string(text))
	requireSrvError(t, s.serve(httptest.NewRequest("PUT", uri, nil)), 405, mxfed.ErrUnrecognized)
	for _, other := range []string{uri + "/", uri + "/x", strings.Replace(uri, "v1", "v2", 1), "/version"} {
		requireSrvError(t, s.serve(httptest.NewRequest("GET", other, nil)), 404, mxfed.ErrUnrecognized)
	}
	for body, want := range map[string]*mxfed.ServerVersion{`{}`: {}, `{"server":[]}`: {}, `{"server":{"name":1,"version":"2"}}`: {Version: "2"}, `{"server":{"name":"` + strings.Repeat("n", 256) + `"}}`: nil, `x`: nil} {
		s.handler = tpSay(200, body)
		got, err := s.client.Version(t.Context(), "us.example")
		require.Equal(t, want == nil, err != nil, body)
		require.Equal(t, want, got)
	}
	_, err = s.client.Version(t.Context(), "no name")
	require.ErrorIs(t, err, mxfed.ErrInvalidParam)
}
