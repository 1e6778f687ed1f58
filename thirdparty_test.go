package mxfed_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// This file tests third-party invites from the inviter's side: us.example has made a promise, an identity server and the
// invited user's server are there over TLS.

// tpNet is a network in which names lead to listeners of this test.
type tpNet struct {
	*http.Transport
	t         testing.TB
	mu        sync.Mutex
	listeners map[string]string // by host
}

// tpServer notes what it is asked.
type tpServer struct {
	mu    sync.Mutex
	asked []string
}

func newTPNet(t testing.TB) *tpNet {
	n := &tpNet{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "example.com"}},
		t: t, listeners: make(map[string]string)}
	n.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(address)
		n.mu.Lock()
		to, ok := n.listeners[host]
		n.mu.Unlock()
		if !ok {
			return nil, fmt.Errorf("nobody is %s", host)
		}
		return new(net.Dialer).DialContext(ctx, network, to)
	}
	t.Cleanup(n.CloseIdleConnections)
	return n
}

// Web carries what goes to the identity server.
func (n *tpNet) Web() http.RoundTripper { return n.Transport }

// serve starts a server that has this name.
func (n *tpNet) serve(name string, h http.Handler) *tpServer {
	s := &tpServer{}
	listener := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.RequestURI)
		s.mu.Unlock()
		h.ServeHTTP(w, r)
	}))
	listener.Config.ErrorLog = log.New(io.Discard, "", 0)
	listener.StartTLS()
	n.t.Cleanup(listener.Close)
	n.TLSClientConfig.RootCAs.AddCert(listener.Certificate())
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[name] = listener.Listener.Addr().String()
	return s
}

func (s *tpServer) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string{}, s.asked...)
}

// tpSite is us.example, whose @admin has promised an invite in a room, with @bob's server and an identity server.
type tpSite struct {
	*srvSite
	net        *tpNet
	room       *srvRoom
	promise    map[string]any // content
	identity   *srvPeer
	idServer   *tpServer
	validity   http.HandlerFunc // what the identity server answers
	bobServer  *tpServer
	bob        *mxfed.Server
	bobInvites []*mxfed.Invite
	bobRefuses error
	bobPolicy  bool // the first thing that it is asked for is a policy server's signature
	stored     []*mxfed.Event
	hostFails  error
}

const tpToken = "token/+?"

func newTPSite(t testing.TB, v mxfed.RoomVersion, change ...func(*mxfed.Config)) *tpSite {
	s := &tpSite{net: newTPNet(t), identity: newSrvPeer(t, "id.example")}
	s.srvSite = newSrvSite(t, append([]func(*mxfed.Config){func(c *mxfed.Config) { c.HTTP = s.net }}, change...)...)
	s.handler = mxfed.NewExchangeThirdPartyInviteHandler(s.server, mxfed.ThirdPartyHostFunc(s.take))
	s.room = newSrvRoom(t, s.srvSite, v, map[string]any{"join_rule": "invite"})
	s.validity = func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"valid":true}`) }
	s.idServer = s.net.serve("id.example", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.validity(w, r) }))
	s.promise = map[string]any{"display_name": "b...@e...", "public_key": tpKey(s.identity, base64.RawStdEncoding), "key_validity_url": "https://id.example/valid"}
	s.bob = s.newPeerServer(t, s.domain)
	invites := mxfed.NewInviteHandler(s.bob, mxfed.InviteHostFunc(func(_ context.Context, inv *mxfed.Invite) error {
		s.bobInvites = append(s.bobInvites, inv)
		return s.bobRefuses
	}))
	s.bobServer = s.net.serve("domain", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.bobPolicy {
			s.signAsPolicy(t, w, r)
			return
		}
		invites.ServeHTTP(w, r)
	}))
	s.keep(t)
	return s
}

// signAsPolicy answers once as a policy server with bob's server's key.
func (s *tpSite) signAsPolicy(t testing.TB, w http.ResponseWriter, r *http.Request) {
	s.bobPolicy = false
	var pdu srvPDU
	require.NoError(t, json.NewDecoder(r.Body).Decode(&pdu))
	sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(s.domain.key, srvJSON(t, pdu.redacted(t, s.room.version))))
	w.Write(srvJSON(t, map[string]any{"domain": map[string]any{"ed25519:policy_server": sig}}))
}

// newPeerServer is the server of a peer, which knows the keys of all.
func (s *tpSite) newPeerServer(t testing.TB, p *srvPeer) *mxfed.Server {
	keys := &srvKeys{}
	for _, other := range []*srvPeer{s.own, s.domain, s.third} {
		keys.add(other)
	}
	server, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{p.signer}, Keys: keys, HTTP: s.net, Now: func() time.Time { return srvNow }})
	require.NoError(t, err)
	return server
}

// tpKey is a peer's public key.
func tpKey(p *srvPeer, encoding *base64.Encoding) string {
	return encoding.EncodeToString(p.key.Public().(ed25519.PublicKey))
}

// keep puts the promise, as it is now, into the room.
func (s *tpSite) keep(t testing.TB) {
	s.room.set(t, s.own, s.room.admin, "m.room.third_party_invite", tpToken, s.promise)
	s.reset()
}

// take is the host of us.example.
func (s *tpSite) take(_ context.Context, e *mxfed.Event) error {
	s.stored = append(s.stored, e)
	if s.hostFails == nil {
		tpStore(s.room, e)
	}
	return s.hostFails
}

// tpStore puts a state event at the end of the room.
func tpStore(r *srvRoom, e *mxfed.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key, _ := e.StateKey()
	r.events[e.ID()], r.latest = e, e
	r.state[mxfed.StateKey{Type: e.Type(), Key: key}] = e
	r.after[e.ID()] = maps.Clone(r.state)
	r.depth++
}

// tpSigned is the statement that user owns the address, signed by all of by.
func tpSigned(t testing.TB, user, token string, more map[string]any, by ...*srvPeer) map[string]any {
	signed := map[string]any{"mxid": user, "token": token}
	maps.Copy(signed, more)
	message := srvJSON(t, signed)
	signatures := map[string]any{}
	for _, p := range by {
		signatures[string(p.name)] = map[string]any{"ed25519:0": base64.RawStdEncoding.EncodeToString(ed25519.Sign(p.key, message))}
	}
	signed["signatures"] = signatures
	return signed
}

// body is a good request to exchange the promise.
func (s *tpSite) body(t testing.TB) srvPDU {
	bob := s.domain.user("bob")
	return srvPDU{"type": "m.room.member", "room_id": s.room.id, "sender": s.room.admin, "state_key": bob, "content": map[string]any{
		"membership": "invite", "third_party_invite": map[string]any{"display_name": "whatever", "signed": tpSigned(t, bob, tpToken, nil, s.identity)}}}
}

// withSigned is the body with another statement in it.
func (s *tpSite) withSigned(t testing.TB, signed any) srvPDU {
	return s.body(t).with("content", map[string]any{"membership": "invite", "third_party_invite": map[string]any{"signed": signed}})
}

func (s *tpSite) exchange(t testing.TB, body any) *httptest.ResponseRecorder {
	return s.send(t, s.domain, http.MethodPut, "/_matrix/federation/v1/exchange_third_party_invite/"+url.PathEscape(string(s.room.id)), srvJSON(t, body))
}

// requireNothing demands a refusal before which nothing was signed, sent or stored.
func (s *tpSite) requireNothing(t testing.TB, w *httptest.ResponseRecorder, status int, code mxfed.ErrorCode) {
	t.Helper()
	s.requireRefused(t, w, status, code)
	require.Empty(t, s.stored)
	require.Empty(t, s.bobServer.seen())
}

// The promise is kept: an invite that all checks of the other server let pass, signed by both.
// https://spec.matrix.org/v1.19/server-server-api/#third-party-invites
func TestExchangeThirdPartyInvite(t *testing.T) {
	for _, v := range srvVersions {
		s := newTPSite(t, v)
		signed := tpSigned(t, s.domain.user("bob"), tpToken, map[string]any{"sender": "x", "more": []any{map[string]any{"a": 1}}}, s.identity)
		signed["unsigned"] = map[string]any{"nobody": "vouches for it"}
		body := srvJSON(t, s.withSigned(t, signed))
		delete(signed, "unsigned")
		w := s.exchange(t, json.RawMessage(body))
		require.Equal(t, 200, w.Code, "%s %s", v, w.Body)
		require.JSONEq(t, `{}`, w.Body.String())
		require.Equal(t, "application/json", w.Header().Get("Content-Type"))
		require.Len(t, s.stored, 1)
		require.Len(t, s.bobInvites, 1)
		e, inv := s.stored[0], s.bobInvites[0]
		require.Equal(t, inv.Event.ID(), e.ID())
		require.NoError(t, inv.StateErr)
		require.NotNil(t, inv.Create)
		require.Equal(t, s.room.admin, string(e.Sender()))
		key, _ := e.StateKey()
		require.Equal(t, s.domain.user("bob"), key)
		require.JSONEq(t, string(srvJSON(t, map[string]any{"membership": "invite", "third_party_invite": map[string]any{"display_name": "b...@e...", "signed": signed}})), string(e.Content()))
		signatures := srvObject(t, e.JSON())["signatures"].(map[string]any)
		require.Contains(t, signatures, "us.example")
		require.Contains(t, signatures, "domain")
		require.Equal(t, []error{nil}, s.newPeerServer(t, s.third).Verify(t.Context(), e))
		require.Contains(t, e.Auth(), s.room.state[mxfed.StateKey{Type: "m.room.third_party_invite", Key: tpToken}].ID())
		require.Equal(t, []string{"GET /valid?public_key=" + url.QueryEscape(s.promise["public_key"].(string))}, s.idServer.seen())
		require.Equal(t, "exchange_third_party_invite", s.allowed[0].Endpoint)
		require.Equal(t, s.domain.user("bob"), string(s.allowed[0].User))
	}
}

// tpSet changes one member of a body.
func tpSet(key string, v any) func(*testing.T, *tpSite) srvPDU {
	return func(t *testing.T, s *tpSite) srvPDU { return s.body(t).with(key, v) }
}

// tpMembership changes the membership alone.
func tpMembership(v any) func(*testing.T, *tpSite) srvPDU {
	return func(t *testing.T, s *tpSite) srvPDU {
		body := s.body(t)
		body["content"].(map[string]any)["membership"] = v
		return body
	}
}

// tpWith puts another statement into a body.
func tpWith(make func(t *testing.T, s *tpSite) any) func(*testing.T, *tpSite) srvPDU {
	return func(t *testing.T, s *tpSite) srvPDU { return s.withSigned(t, make(t, s)) }
}

// tpState changes the room first.
func tpState(change func(t *testing.T, s *tpSite)) func(*testing.T, *tpSite) srvPDU {
	return func(t *testing.T, s *tpSite) srvPDU {
		change(t, s)
		s.reset()
		return s.body(t)
	}
}

// tpRefusals are requests with one thing wrong.
var tpRefusals = map[string]struct {
	body   func(*testing.T, *tpSite) srvPDU
	status int
	code   mxfed.ErrorCode
}{
	"another room":       {tpSet("room_id", "!other:us.example"), 400, mxfed.ErrInvalidParam},
	"no room":            {tpSet("room_id", nil), 400, mxfed.ErrInvalidParam},
	"another type":       {tpSet("type", "m.room.power_levels"), 400, mxfed.ErrInvalidParam},
	"no type":            {tpSet("type", nil), 400, mxfed.ErrInvalidParam},
	"no content":         {tpSet("content", nil), 400, mxfed.ErrInvalidParam},
	"another membership": {tpMembership("join"), 400, mxfed.ErrInvalidParam},
	"membership a list":  {tpMembership([]any{"invite"}), 400, mxfed.ErrInvalidParam},
	"no membership":      {tpMembership(nil), 400, mxfed.ErrInvalidParam},
	"no third party":     {tpSet("content", map[string]any{"membership": "invite"}), 400, mxfed.ErrInvalidParam},
	"third party a list": {tpSet("content", map[string]any{"membership": "invite", "third_party_invite": []any{}}), 400, mxfed.ErrInvalidParam},
	"no sender":          {tpSet("sender", nil), 400, mxfed.ErrInvalidParam},
	"sender no user":     {tpSet("sender", "admin"), 400, mxfed.ErrInvalidParam},
	"no state key":       {tpSet("state_key", nil), 400, mxfed.ErrInvalidParam},
	"state key no user":  {tpSet("state_key", "bob"), 400, mxfed.ErrInvalidParam},
	"state key empty":    {tpSet("state_key", ""), 400, mxfed.ErrInvalidParam},
	"a statement about no user": {func(t *testing.T, s *tpSite) srvPDU {
		return s.withSigned(t, tpSigned(t, "bob", tpToken, nil, s.identity)).with("state_key", "bob")
	}, 400, mxfed.ErrInvalidParam},
	"another state key":  {tpSet("state_key", "@eve:domain"), 400, mxfed.ErrInvalidParam},
	"signed a string":    {tpWith(func(*testing.T, *tpSite) any { return "signed" }), 400, mxfed.ErrInvalidParam},
	"signed null":        {tpWith(func(*testing.T, *tpSite) any { return nil }), 400, mxfed.ErrInvalidParam},
	"signed for another": {tpWith(func(t *testing.T, s *tpSite) any { return tpSigned(t, "@eve:domain", tpToken, nil, s.identity) }), 400, mxfed.ErrInvalidParam},
	"no token": {tpWith(func(t *testing.T, s *tpSite) any {
		return srvPDU(tpSigned(t, "@bob:domain", tpToken, nil, s.identity)).with("token", nil)
	}), 400, mxfed.ErrInvalidParam},
	"a long token": {tpWith(func(t *testing.T, s *tpSite) any {
		return tpSigned(t, "@bob:domain", strings.Repeat("t", 256), nil, s.identity)
	}), 400, mxfed.ErrInvalidParam},
	"not signed": {tpWith(func(t *testing.T, s *tpSite) any { return tpSigned(t, "@bob:domain", tpToken, nil) }), 400, mxfed.ErrInvalidParam},
	"signatures a list": {tpWith(func(t *testing.T, s *tpSite) any {
		return srvPDU(tpSigned(t, "@bob:domain", tpToken, nil)).with("signatures", []any{})
	}), 400, mxfed.ErrInvalidParam},
	"17 signatures": {tpWith(func(t *testing.T, s *tpSite) any {
		signed := tpSigned(t, "@bob:domain", tpToken, nil, s.identity)
		for i := range 16 {
			signed["signatures"].(map[string]any)[fmt.Sprint("id", i)] = map[string]any{"ed25519:0": "AAAA"}
		}
		return signed
	}), 400, mxfed.ErrInvalidParam},
	"an unknown room": {tpState(func(_ *testing.T, s *tpSite) { delete(s.rooms, s.room.id) }), 404, mxfed.ErrNotFound},
	"another token": {tpWith(func(t *testing.T, s *tpSite) any { return tpSigned(t, "@bob:domain", "other", nil, s.identity) }), 403,
		mxfed.ErrForbidden},
	"another sender of ours": {tpSet("sender", "@other:us.example"), 403, mxfed.ErrForbidden},
	"a sender of theirs":     {tpSet("sender", "@alice:domain"), 403, mxfed.ErrForbidden},
	"promised by another's user": {func(t *testing.T, s *tpSite) srvPDU {
		s.room.set(t, s.domain, "@alice:domain", "m.room.third_party_invite", tpToken, s.promise)
		s.reset()
		return s.body(t).with("sender", "@alice:domain")
	}, 403, mxfed.ErrForbidden},
	"signed by another": {tpWith(func(t *testing.T, s *tpSite) any { return tpSigned(t, "@bob:domain", tpToken, nil, s.third) }), 403,
		mxfed.ErrForbidden},
	"changed afterwards": {tpWith(func(t *testing.T, s *tpSite) any {
		return srvPDU(tpSigned(t, "@bob:domain", tpToken, nil, s.identity)).with("more", 1)
	}), 403, mxfed.ErrForbidden},
	"signed with another algorithm": {tpWith(func(t *testing.T, s *tpSite) any {
		signed := tpSigned(t, "@bob:domain", tpToken, nil, s.identity)
		sig := signed["signatures"].(map[string]any)["id.example"].(map[string]any)["ed25519:0"]
		return srvPDU(signed).with("signatures", map[string]any{"id.example": map[string]any{"rsa:0": sig}})
	}), 403, mxfed.ErrForbidden},
	"the promise is taken back": {tpState(func(t *testing.T, s *tpSite) { s.promise = map[string]any{}; s.keep(t) }), 403, mxfed.ErrForbidden},
	"the user is banned": {tpState(func(t *testing.T, s *tpSite) {
		s.room.set(t, s.own, s.room.admin, "m.room.member", "@bob:domain", map[string]any{"membership": "ban"})
	}), 403, mxfed.ErrForbidden},
	"the user is in the room": {tpState(func(t *testing.T, s *tpSite) {
		s.room.set(t, s.domain, "@bob:domain", "m.room.member", "@bob:domain", map[string]any{"membership": "join"})
	}), 403, mxfed.ErrForbidden},
	"a room of no version": {tpState(func(_ *testing.T, s *tpSite) { s.rooms[s.room.id].edit = func(r *mxfed.Room) { r.Version = "" } }), 400, mxfed.ErrIncompatibleRoomVersion},
}

// Whatever is wrong: nothing is signed, nobody is called, not even the identity server.
func TestExchangeThirdPartyInvite_Refused(t *testing.T) {
	for name, c := range tpRefusals {
		t.Run(name, func(t *testing.T) {
			s := newTPSite(t, "10")
			s.requireNothing(t, s.exchange(t, c.body(t, s)), c.status, c.code)
			require.Empty(t, s.idServer.seen())
		})
	}
	s := newTPSite(t, "10")
	const uri = "/_matrix/federation/v1/exchange_third_party_invite/"
	for name, c := range map[string]struct {
		method, uri, body string
		status            int
		code              mxfed.ErrorCode
	}{
		"no JSON":      {"PUT", uri + url.PathEscape(string(s.room.id)), "x", 400, mxfed.ErrNotJSON},
		"empty":        {"PUT", uri + url.PathEscape(string(s.room.id)), "", 400, mxfed.ErrNotJSON},
		"no object":    {"PUT", uri + url.PathEscape(string(s.room.id)), "[]", 400, mxfed.ErrBadJSON},
		"no room ID":   {"PUT", uri + "room", string(srvJSON(t, s.body(t).with("room_id", "room"))), 400, mxfed.ErrInvalidParam},
		"no room":      {"PUT", uri, "{}", 400, mxfed.ErrInvalidParam},
		"longer path":  {"PUT", uri + "a/b", "{}", 404, mxfed.ErrUnrecognized},
		"version 2":    {"PUT", strings.Replace(uri, "v1", "v2", 1) + "a", "{}", 404, mxfed.ErrUnrecognized},
		"other method": {"POST", uri + "a", "{}", 405, mxfed.ErrUnrecognized},
	} {
		t.Run(name, func(t *testing.T) {
			s.requireNothing(t, s.send(t, s.domain, c.method, c.uri, []byte(c.body)), c.status, c.code)
		})
	}
	unsigned := httptest.NewRequest("PUT", uri+url.PathEscape(string(s.room.id)), bytes.NewReader(srvJSON(t, s.body(t))))
	s.requireNothing(t, s.serve(unsigned), 401, mxfed.ErrUnauthorized)
}

// The room's access control list does not count here. https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func TestExchangeThirdPartyInvite_NoACL(t *testing.T) {
	s := newTPSite(t, "10")
	s.room.set(t, s.own, s.room.admin, "m.room.server_acl", "", map[string]any{"allow": []any{"us.example"}})
	require.Equal(t, 200, s.exchange(t, s.body(t)).Code)
}

// A promise without a name for the address gives an invite with an empty one.
func TestExchangeThirdPartyInvite_NoDisplayName(t *testing.T) {
	for _, name := range []any{nil, 7} {
		s := newTPSite(t, "10")
		s.promise["display_name"] = name
		s.keep(t)
		require.Equal(t, 200, s.exchange(t, s.body(t)).Code)
		require.Contains(t, string(s.stored[0].Content()), `"third_party_invite":{"display_name":"","signed"`)
	}
}

// A repeated request finds the invite in the room; only who has left can be invited by it again.
func TestExchangeThirdPartyInvite_Repeated(t *testing.T) {
	s := newTPSite(t, "10")
	for range 3 {
		require.Equal(t, 200, s.exchange(t, s.body(t)).Code)
	}
	require.Len(t, s.stored, 1)
	require.Len(t, s.bobServer.seen(), 1)
	require.Len(t, s.idServer.seen(), 1)
	forged := s.withSigned(t, tpSigned(t, "@bob:domain", tpToken, nil, s.third))
	requireSrvError(t, s.exchange(t, forged), 403, mxfed.ErrForbidden)
	bob := func(membership string) {
		s.room.set(t, s.domain, "@bob:domain", "m.room.member", "@bob:domain", map[string]any{"membership": membership})
	}
	bob("join")
	requireSrvError(t, s.exchange(t, s.body(t)), 403, mxfed.ErrForbidden)
	require.Len(t, s.stored, 1)
	bob("leave")
	require.Equal(t, 200, s.exchange(t, s.body(t)).Code)
	require.Len(t, s.stored, 2)
	kick := srvObject(t, s.stored[1].Content())
	kick["membership"] = "leave"
	s.room.set(t, s.own, s.room.admin, "m.room.member", "@bob:domain", kick)
	require.Equal(t, 200, s.exchange(t, s.body(t)).Code)
	require.Len(t, s.stored, 3, "whatever the kick says")
	s.promise["display_name"] = "again"
	s.room.set(t, s.own, s.room.admin, "m.room.third_party_invite", "t2", s.promise)
	require.Equal(t, 200, s.exchange(t, s.withSigned(t, tpSigned(t, "@bob:domain", "t2", nil, s.identity))).Code)
	require.Len(t, s.stored, 4, "another promise")
}

// A user who joins, or is banned, while the identity server is asked is not taken out of the room.
func TestExchangeThirdPartyInvite_Race(t *testing.T) {
	for _, membership := range []string{"join", "ban"} {
		s := newTPSite(t, "10")
		s.validity = func(w http.ResponseWriter, r *http.Request) {
			s.room.set(t, s.own, s.room.admin, "m.room.member", "@bob:domain", map[string]any{"membership": membership})
			io.WriteString(w, `{"valid":true}`)
		}
		requireSrvError(t, s.exchange(t, s.body(t)), 403, mxfed.ErrForbidden)
		require.Empty(t, s.stored)
		require.Empty(t, s.bobServer.seen())
	}
}

// What the invited user's server or the host refuses leaves no trace in the room.
func TestExchangeThirdPartyInvite_RefusedLater(t *testing.T) {
	s := newTPSite(t, "10")
	s.bobRefuses = mxfed.ErrInviteBlocked
	requireSrvError(t, s.exchange(t, s.body(t)), 502, mxfed.ErrUnknown)
	require.Empty(t, s.stored)
	s.bobRefuses, s.hostFails = nil, mxfed.ErrLimitExceeded
	requireSrvError(t, s.exchange(t, s.body(t)), 429, mxfed.ErrLimitExceeded)
	s.hostFails = nil
	require.Equal(t, 200, s.exchange(t, s.body(t)).Code, "another try")
	require.Len(t, s.bobServer.seen(), 3)
}

// A local user is invited without a call.
func TestExchangeThirdPartyInvite_LocalUser(t *testing.T) {
	s := newTPSite(t, "10")
	body := s.withSigned(t, tpSigned(t, "@bob:us.example", tpToken, nil, s.identity)).with("state_key", "@bob:us.example")
	require.Equal(t, 200, s.exchange(t, body).Code)
	require.Len(t, s.stored, 1)
	require.Empty(t, s.bobServer.seen())
}

// tpSay answers with this status and body.
func tpSay(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status); io.WriteString(w, body) }
}

// Where a policy server is in use, the invite is nobody's before that server has signed it.
// https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func TestExchangeThirdPartyInvite_PolicyServer(t *testing.T) {
	s := newTPSite(t, "10")
	answer := tpSay(400, `{"errcode":"M_FORBIDDEN","error":"no"}`)
	server := s.net.serve("policy.example", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
	use := func(via *srvPeer) {
		s.room.set(t, s.own, s.room.admin, "m.room.policy", "", map[string]any{"via": via.name, "public_keys": map[string]any{"ed25519": tpKey(via, base64.RawStdEncoding)}})
	}
	use(newSrvPeer(t, "policy.example"))
	requireSrvError(t, s.exchange(t, s.body(t)), 403, mxfed.ErrForbidden)
	require.Equal(t, []string{"POST /_matrix/policy/v1/sign"}, server.seen())
	answer = tpSay(500, `{}`)
	requireSrvError(t, s.exchange(t, s.body(t)), 502, mxfed.ErrUnknown)
	require.Empty(t, s.stored)
	require.Empty(t, s.bobServer.seen())
	s.bobPolicy = true // also if it is the very server that the invite goes to
	use(s.domain)
	require.Equal(t, 200, s.exchange(t, s.body(t)).Code)
	signatures := srvObject(t, s.stored[0].JSON())["signatures"].(map[string]any)["domain"]
	require.Contains(t, signatures, "ed25519:policy_server")
	require.Contains(t, signatures, "ed25519:k")
	require.Len(t, s.bobInvites, 1)
}

// The client sends what the handler reads, and signs as the invited user's server.
func TestClient_ExchangeThirdPartyInvite(t *testing.T) {
	s := newTPSite(t, "12")
	us := s.net.serve("us.example", s.handler)
	c := s.bob.Client()
	signed := srvJSON(t, tpSigned(t, "@bob:domain", tpToken, nil, s.identity))
	good := mxfed.ThirdPartyInvite{Room: s.room.id, Sender: mxfed.UserID(s.room.admin), User: "@bob:domain", DisplayName: "b", Signed: signed}
	for name, change := range map[string]func(*mxfed.ThirdPartyInvite){
		"another's user": func(i *mxfed.ThirdPartyInvite) {
			i.User, i.Signed = "@bob:third.example", srvJSON(t, tpSigned(t, "@bob:third.example", tpToken, nil, s.identity))
		},
		"another user":    func(i *mxfed.ThirdPartyInvite) { i.User = "@eve:domain" },
		"no user":         func(i *mxfed.ThirdPartyInvite) { i.User = "bob" },
		"no sender":       func(i *mxfed.ThirdPartyInvite) { i.Sender = "" },
		"no room":         func(i *mxfed.ThirdPartyInvite) { i.Room = "" },
		"a broken room":   func(i *mxfed.ThirdPartyInvite) { i.Room = "!\xff" },
		"a long room":     func(i *mxfed.ThirdPartyInvite) { i.Room = mxfed.RoomID("!" + strings.Repeat("r", 255)) },
		"nothing signed":  func(i *mxfed.ThirdPartyInvite) { i.Signed = nil },
		"signed no JSON":  func(i *mxfed.ThirdPartyInvite) { i.Signed = json.RawMessage(`{"mxid":`) },
		"signed a string": func(i *mxfed.ThirdPartyInvite) { i.Signed = json.RawMessage(`"x"`) },
	} {
		i := good
		change(&i)
		require.ErrorIs(t, c.ExchangeThirdPartyInvite(t.Context(), "us.example", &i), mxfed.ErrInvalidParam, name)
	}
	require.Empty(t, us.seen())
	require.NoError(t, c.ExchangeThirdPartyInvite(t.Context(), "us.example", &good))
	require.Len(t, s.stored, 1)
	text, err := json.Marshal(&good)
	require.NoError(t, err)
	require.JSONEq(t, fmt.Sprintf(`{"type":"m.room.member","room_id":%q,"sender":%q,"state_key":"@bob:domain","content":{"membership":"invite",`+
		`"third_party_invite":{"display_name":"b","signed":%s}}}`, s.room.id, s.room.admin, signed), string(text))
	good.Signed = json.RawMessage(`{`)
	_, err = json.Marshal(&good)
	require.Error(t, err)
	gone := mxfed.ThirdPartyInvite{Room: "!gone:us.example", Sender: good.Sender, User: good.User, Signed: signed}
	err = c.ExchangeThirdPartyInvite(t.Context(), "us.example", &gone)
	require.ErrorIs(t, err, mxfed.ErrNotFound)
	var e *mxfed.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, []any{mxfed.ServerName("us.example"), "exchange_third_party_invite", 404}, []any{e.Server, e.Endpoint, e.Status})
}
