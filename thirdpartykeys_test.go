package mxfed_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// This file tests which keys a promise is kept for, and how identity servers are asked about them.

// A key that was revoked, or of which that cannot be found out, signs nothing any more.
// https://spec.matrix.org/v1.19/client-server-api/#mroomthird_party_invite
func TestExchangeThirdPartyInvite_KeyValidity(t *testing.T) {
	const at = "https://id.example/valid"
	redirect := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/valid" {
			io.WriteString(w, `{"valid":true}`)
			return
		}
		http.Redirect(w, r, "https://id.example/elsewhere", http.StatusFound)
	}
	for name, c := range map[string]struct {
		url    any
		answer http.HandlerFunc
		asked  string // "" if nobody is
		status int    // 200 if nothing is wrong
	}{
		"valid":           {at, tpSay(200, `{"valid":true,"more":1}`), "/valid?", 200},
		"with a query":    {at + "?a=%2F+b", tpSay(200, `{"valid":true}`), "/valid?a=%2F+b&", 200},
		"an escaped path": {"https://id.example/a%2Fb//%20?", tpSay(200, `{"valid":true}`), "/a%2Fb//%20?", 200},
		"with a fragment": {at + "#f", tpSay(200, `{"valid":true}`), "/valid?", 200},
		"no URL":          {nil, tpSay(200, `{"valid":false}`), "", 200},
		"revoked":         {at, tpSay(200, `{"valid":false}`), "/valid?", 403},
		"says text":       {at, tpSay(200, `{"valid":"true"}`), "/valid?", 403},
		"says 1":          {at, tpSay(200, `{"valid":1}`), "/valid?", 403},
		"says nothing":    {at, tpSay(200, `{}`), "/valid?", 403},
		"a list":          {at, tpSay(200, `[{"valid":true}]`), "/valid?", 403},
		"only true":       {at, tpSay(200, `true`), "/valid?", 403},
		"no JSON":         {at, tpSay(200, `valid`), "/valid?", 502},
		"twice":           {at, tpSay(200, `{"valid":true,"valid":true}`), "/valid?", 502},
		"empty":           {at, tpSay(200, ``), "/valid?", 502},
		"not found":       {at, tpSay(404, `{"valid":true}`), "/valid?", 502},
		"fails":           {at, tpSay(500, `{"valid":true}`), "/valid?", 502},
		"no content":      {at, tpSay(204, ``), "/valid?", 502},
		"a redirect":      {at, redirect, "/valid?", 502},
		"too large":       {at, tpSay(200, `{"valid":true}`+strings.Repeat(" ", 64<<10)), "/valid?", 502},
		"broken off": {at, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "99")
			io.WriteString(w, `{"valid":true}`)
		}, "/valid?", 502},
		"aborted":          {at, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "/valid?", 502},
		"nobody is there":  {"https://gone.example/", nil, "", 502},
		"http":             {"http://id.example/valid", tpSay(200, `{"valid":true}`), "", 403},
		"ftp":              {"ftp://id.example/valid", nil, "", 403},
		"no host":          {"https:///valid", nil, "", 403},
		"relative":         {"/valid", nil, "", 403},
		"no URL at all":    {"https://%zz", nil, "", 403},
		"null":             {json.RawMessage("null"), nil, "", 403},
		"a number":         {7, nil, "", 403},
		"an empty string":  {"", nil, "", 403},
		"a list of URLs":   {[]any{at}, nil, "", 403},
		"endless, then up": {at, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, io.LimitReader(tpEndless{}, 10<<20)) }, "/valid?", 502},
	} {
		t.Run(name, func(t *testing.T) {
			s := newTPSite(t, "10")
			s.promise["key_validity_url"] = c.url
			if c.url == nil {
				delete(s.promise, "key_validity_url")
			}
			s.keep(t)
			s.validity = c.answer
			w := s.exchange(t, s.body(t))
			code := map[int]mxfed.ErrorCode{403: mxfed.ErrForbidden, 502: mxfed.ErrUnknown}[c.status]
			if code == "" {
				require.Equal(t, 200, w.Code, "%s", w.Body)
				require.Len(t, s.stored, 1)
			} else {
				s.requireNothing(t, w, c.status, code)
			}
			want := []string{}
			if c.asked != "" {
				want = append(want, "GET "+c.asked+"public_key="+url.QueryEscape(s.promise["public_key"].(string)))
			}
			require.Equal(t, want, s.idServer.seen())
		})
	}
}

type tpEndless struct{}

func (tpEndless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	return len(b), nil
}

// Whoever asked and goes away is not worked for any longer, however slow the identity server is.
func TestExchangeThirdPartyInvite_SlowIdentityServer(t *testing.T) {
	s := newTPSite(t, "10")
	ctx, cancel := context.WithCancel(t.Context())
	s.validity = func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"val`)
		http.NewResponseController(w).Flush()
		cancel()
		<-r.Context().Done()
	}
	r := s.request(t, s.domain, http.MethodPut, "/_matrix/federation/v1/exchange_third_party_invite/"+url.PathEscape(string(s.room.id)), srvJSON(t, s.body(t)))
	s.requireNothing(t, s.serve(r.WithContext(ctx)), 502, mxfed.ErrUnknown)
}

// An identity server's URL cannot lead into the own network, with a Resolver or with any other Config.HTTP.
func TestExchangeThirdPartyInvite_PrivateAddress(t *testing.T) {
	for name, transport := range map[string]http.RoundTripper{"Resolver": &mxfed.Resolver{}, "without Web": struct{ http.RoundTripper }{}} {
		s := newTPSite(t, "10", func(c *mxfed.Config) { c.HTTP = transport })
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		knocked := make(chan bool, 1)
		go func() {
			_, err := listener.Accept()
			knocked <- err == nil
		}()
		s.promise["key_validity_url"] = "https://" + listener.Addr().String() + "/"
		s.keep(t)
		s.requireNothing(t, s.exchange(t, s.body(t)), 502, mxfed.ErrUnknown)
		listener.Close()
		require.False(t, <-knocked, name)
	}
}

// Keys may be anywhere in the list, in either alphabet; one that is valid and has signed is enough.
func TestExchangeThirdPartyInvite_Keys(t *testing.T) {
	entry := func(key any, at string) map[string]any {
		e := map[string]any{"public_key": key}
		if at != "" {
			e["key_validity_url"] = "https://id.example/" + at
		}
		return e
	}
	urlSafe := func(s *tpSite) string { return tpKey(s.identity, base64.URLEncoding) }
	for name, c := range map[string]struct {
		list  func(s *tpSite) []any
		more  bool // id.example signs and third.example too
		asked []string
		code  int
	}{
		"second in the list": {func(s *tpSite) []any {
			return []any{entry(tpKey(s.third, base64.RawStdEncoding), "a"), entry(urlSafe(s), "b")}
		}, false, []string{"b"}, 200},
		"after junk": {func(s *tpSite) []any {
			return []any{1, nil, []any{}, map[string]any{}, entry(1, "a"), entry("", "a"), entry("AAAA", "a"), entry("!", "a"), entry(urlSafe(s), "b")}
		}, false, []string{"b"}, 200},
		"without URL": {func(s *tpSite) []any { return []any{entry(urlSafe(s), "")} }, false, []string{}, 200},
		"revoked, then valid": {func(s *tpSite) []any {
			return []any{entry(tpKey(s.third, base64.RawStdEncoding), "revoked"), entry(urlSafe(s), "b")}
		}, true, []string{"revoked", "b"}, 200},
		"unreachable, then valid": {func(s *tpSite) []any {
			return []any{entry(tpKey(s.third, base64.RawStdEncoding), "down"), entry(urlSafe(s), "b")}
		}, true, []string{"down", "b"}, 200},
		"unreachable and revoked": {func(s *tpSite) []any {
			return []any{entry(tpKey(s.third, base64.RawStdEncoding), "down"), entry(urlSafe(s), "revoked")}
		}, true, []string{"down", "revoked"}, 502},
		"only others":   {func(s *tpSite) []any { return []any{entry(tpKey(s.third, base64.RawStdEncoding), "a")} }, false, []string{}, 403},
		"none":          {func(s *tpSite) []any { return []any{} }, false, []string{}, 403},
		"17th":          {func(s *tpSite) []any { return append(make([]any, 15), entry(urlSafe(s), "b")) }, false, []string{}, 403},
		"16th":          {func(s *tpSite) []any { return append(make([]any, 14), entry(urlSafe(s), "b")) }, false, []string{"b"}, 200},
		"asked 4 times": {func(s *tpSite) []any { return tpTimes(6, entry(urlSafe(s), "revoked")) }, false, []string{"revoked", "revoked", "revoked", "revoked"}, 403},
	} {
		t.Run(name, func(t *testing.T) {
			s := newTPSite(t, "11")
			s.validity = func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/down" {
					w.WriteHeader(503)
				}
				fmt.Fprintf(w, `{"valid":%t}`, r.URL.Path == "/b")
			}
			s.promise = map[string]any{"display_name": "x", "public_keys": c.list(s)}
			s.keep(t)
			by := []*srvPeer{s.identity}
			if c.more {
				by = append(by, s.third)
			}
			w := s.exchange(t, s.withSigned(t, tpSigned(t, "@bob:domain", tpToken, nil, by...)))
			require.Equal(t, c.code, w.Code, "%s", w.Body)
			require.Equal(t, c.code == 200, len(s.stored) == 1)
			asked := []string{}
			for _, line := range s.idServer.seen() {
				path, key, _ := strings.Cut(strings.TrimPrefix(line, "GET /"), "?public_key=")
				if asked = append(asked, path); path == "b" {
					require.Equal(t, url.QueryEscape(urlSafe(s)), key, "as it stands in the event")
				}
			}
			require.Equal(t, c.asked, asked)
		})
	}
}

func tpTimes(n int, v any) (list []any) {
	for range n {
		list = append(list, v)
	}
	return list
}

// Web goes to the very host and port of a URL, with that host's certificate, and to no address that servers may not have.
func TestResolver_Web(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("id.example. A 127.0.0.1", "_matrix-fed._tcp.id.example. SRV 0 0 1 elsewhere.example.")
	s := n.Serve(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, "/there", http.StatusFound)
		}
	}, "id.example")
	n.Detour("id.example", "443", s)
	get := func(r *mxfed.Resolver, at string) (int, error) {
		u, err := url.Parse(at)
		require.NoError(t, err)
		answer, err := r.Web().RoundTrip((&http.Request{Method: http.MethodGet, URL: u, Header: http.Header{}}).WithContext(t.Context()))
		if err != nil {
			return 0, err
		}
		return answer.StatusCode, answer.Body.Close()
	}
	for at, want := range map[string]int{"https://id.example/x": 200, "https://id.example:" + s.Port + "/x": 200, "https://id.example/redirect": 302} {
		status, err := get(n.Resolver, at)
		require.NoError(t, err, at)
		require.Equal(t, want, status, at)
	}
	require.Len(t, s.Seen(), 3)
	for _, hit := range s.Seen() {
		require.Equal(t, "id.example", hit.SNI)
		require.Contains(t, []string{"/x", "/redirect"}, hit.URI)
	}
	for _, at := range []string{"http://id.example/x", "https://id.example:65536/x", "https:///x", "https://127.0.0.01:" + s.Port + "/x", "https://127.0.0.1:" + s.Port + "/x", "https://under_score.example/x"} {
		_, err := get(n.Resolver, at)
		require.Error(t, err, at)
	}
	n.Resolver.AllowIP = onlyIPs("127.0.0.2")
	_, err := get(n.Resolver, "https://id.example/x")
	require.ErrorContains(t, err, "127.0.0.1 is not allowed")
	require.Len(t, s.Seen(), 3)
	body := &closeNoter{Reader: strings.NewReader("x")}
	_, err = n.Resolver.Web().RoundTrip(&http.Request{URL: &url.URL{Scheme: "http"}, Body: body})
	require.Error(t, err)
	require.True(t, body.closed)
}
