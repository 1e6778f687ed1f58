package mxfed_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// srvCall is one request that us.example accepts from domain.
type srvCall struct {
	endpoint, method, uri string
	body                  []byte
	room                  mxfed.RoomID
	user                  string // of whom it speaks
}

// newSrvCalls makes one good request for every endpoint and version. The rooms are us.example's own, with these ACLs, so
// that one list shows what every endpoint does.
func newSrvCalls(t testing.TB, s *srvSite, acl map[string]any) []srvCall {
	alice, bob := s.domain.user("alice"), s.own.user("bob")
	newRoom := func(v mxfed.RoomVersion, membership string) *srvRoom {
		room := newSrvMemberRoom(t, s, v, membership)
		if acl != nil {
			room.set(t, s.own, room.admin, "m.room.server_acl", "", acl)
		}
		return room
	}
	var calls []srvCall
	for endpoint, v := range map[string]mxfed.RoomVersion{"v1/invite": "1", "v2/invite": "9"} {
		room := newRoom(v, "join")
		body := room.pdu(alice, "m.room.member", bob, map[string]any{"membership": "invite"}).sign(t, v, s.domain)
		uri := srvURI(endpoint, string(room.id), string(srvEvent(t, v, body).ID()))
		if endpoint == "v2/invite" {
			body = fmt.Appendf(nil, `{"room_version":"%s","event":%s}`, v, body)
		}
		calls = append(calls, srvCall{endpoint, http.MethodPut, uri, body, room.id, bob})
	}
	for membership, v := range map[string]mxfed.RoomVersion{"join": "10", "leave": "8", "knock": "7"} {
		room := newRoom(v, membership)
		make := srvURI("v1/make_"+membership, string(room.id), alice) + "?ver=" + string(v)
		calls = append(calls, srvCall{"v1/make_" + membership, http.MethodGet, make, nil, room.id, alice})
		event := room.memberOf(alice, membership).sign(t, v, s.domain)
		for _, endpoint := range srvSends[membership] {
			calls = append(calls, srvCall{endpoint, http.MethodPut, room.memberURI(endpoint, event), event, room.id, alice})
		}
	}
	return calls
}

// The requests of the tables below are good ones. Each is told to Config.Allow, before anything else is done.
func TestServer_Calls(t *testing.T) {
	s := newSrvSite(t)
	for _, c := range newSrvCalls(t, s, nil) {
		s.reset()
		w := s.send(t, s.domain, c.method, c.uri, c.body)
		require.Equal(t, 200, w.Code, "%s: %s", c.endpoint, w.Body)
		require.Equal(t, "application/json", w.Header().Get("Content-Type"))
		require.Len(t, s.allowed, 1)
		_, endpoint, _ := strings.Cut(c.endpoint, "/")
		want := mxfed.Request{Origin: s.domain.name, To: s.own.name, Endpoint: endpoint, Room: c.room, User: mxfed.UserID(c.user), Body: []byte{}}
		if c.body != nil {
			want.Body = srvCanonical(t, c.body)
		}
		require.Equal(t, want, s.allowed[0], c.endpoint)
	}
}

func srvCanonical(t testing.TB, text []byte) []byte {
	b, err := mxfed.CanonicalJSON(text)
	require.NoError(t, err)
	return b
}

// Every endpoint and version asks Config.Allow, the room's ACL and, at the end, the host.
func TestHooks_CalledOnEveryEndpoint(t *testing.T) {
	t.Run("limit", func(t *testing.T) {
		s := newSrvSite(t)
		s.allow = func(context.Context, *mxfed.Request) error {
			return &mxfed.Error{Code: mxfed.ErrLimitExceeded, RetryAfter: 1500 * time.Millisecond}
		}
		for _, c := range newSrvCalls(t, s, nil) {
			s.reset()
			w := s.send(t, s.domain, c.method, c.uri, c.body)
			require.EqualValues(t, 1500, s.requireRefused(t, w, 429, mxfed.ErrLimitExceeded)["retry_after_ms"], c.endpoint)
			require.Equal(t, "2", w.Header().Get("Retry-After"))
			require.Zero(t, s.asks.Load(), "no work is done")
		}
	})
	t.Run("block list", func(t *testing.T) {
		s := newSrvSite(t)
		s.allow = func(_ context.Context, r *mxfed.Request) error {
			return errors.Join(errors.New("secret"), mxfed.ErrForbidden)
		}
		for _, c := range newSrvCalls(t, s, nil) {
			s.reset()
			w := s.send(t, s.domain, c.method, c.uri, c.body)
			s.requireRefused(t, w, 403, mxfed.ErrForbidden)
			require.NotContains(t, w.Body.String(), "secret")
		}
	})
	t.Run("ACL", func(t *testing.T) {
		s := newSrvSite(t)
		for _, c := range newSrvCalls(t, s, map[string]any{"allow": []string{"*"}, "deny": []string{"d?MAIN"}}) {
			s.reset()
			s.requireRefused(t, s.send(t, s.domain, c.method, c.uri, c.body), 403, mxfed.ErrForbidden)
			require.EqualValues(t, 1, s.keys.asked.Load(), "keys of events are not fetched")
			require.EqualValues(t, 1, s.asks.Load())
		}
	})
	t.Run("host", func(t *testing.T) {
		s := newSrvSite(t)
		s.invited = func(context.Context, *mxfed.Invite) error { return mxfed.ErrForbidden }
		s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
			return nil, mxfed.ErrForbidden
		}
		s.take = func(context.Context, *mxfed.Membership) error { return mxfed.ErrForbidden }
		for _, c := range newSrvCalls(t, s, nil) {
			if c.method == http.MethodPut {
				s.reset()
				requireSrvError(t, s.send(t, s.domain, c.method, c.uri, c.body), 403, mxfed.ErrForbidden)
				require.Equal(t, 1, len(s.invites)+len(s.joins)+len(s.members), c.endpoint)
			}
		}
	})
}

// Before a request is authenticated nothing can be learnt about a room; afterwards no more than that it is not one of
// ours, whether it never was or was left.
func TestNoOracle(t *testing.T) {
	s := newSrvSite(t)
	calls := newSrvCalls(t, s, map[string]any{"allow": []string{"elsewhere"}})
	answers := make(map[string][]string)
	for _, known := range []bool{true, false} {
		if !known {
			clear(s.rooms)
		}
		for _, c := range calls {
			r := httptest.NewRequest(c.method, c.uri, bytes.NewReader(c.body))
			forged := s.request(t, s.third, c.method, c.uri, c.body)
			forged.Header.Set("Authorization", strings.Replace(forged.Header.Get("Authorization"), "third.example", "domain", 1))
			for _, r := range []*http.Request{r, forged} {
				w := s.serve(r)
				s.requireRefused(t, w, 401, mxfed.ErrUnauthorized)
				answers[c.endpoint] = append(answers[c.endpoint], w.Body.String())
			}
			require.Zero(t, s.asks.Load(), "the room was looked up")
		}
	}
	for endpoint, a := range answers {
		require.Equal(t, a[:2], a[2:], endpoint)
	}
	unknown := make(map[string]bool)
	for name, source := range map[string]mxfed.RoomSource{
		"nil":         nil,
		"not found":   srvSource(nil, mxfed.ErrNotFound),
		"left":        srvSource(nil, &mxfed.Error{Code: mxfed.ErrNotFound, Message: "we have left it"}),
		"partly here": srvSource(nil, fmt.Errorf("joining: %w", mxfed.ErrNotFound)),
		"no room":     srvSource(nil, nil),
	} {
		s := newSrvSite(t, func(cfg *mxfed.Config) { cfg.Rooms = source })
		for _, c := range calls {
			if !strings.HasSuffix(c.endpoint, "invite") { // which is about rooms that are not known here
				w := s.send(t, s.domain, c.method, c.uri, c.body)
				s.requireRefused(t, w, 404, mxfed.ErrNotFound)
				unknown[w.Body.String()] = true
				require.Len(t, unknown, 1, name)
			}
		}
	}
}

func srvSource(room *mxfed.Room, err error) mxfed.RoomSource {
	return mxfed.RoomSourceFunc(func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) { return room, err })
}

// Both versions of an endpoint take and refuse the same.
func TestParity_v1_v2(t *testing.T) {
	s := newSrvSite(t)
	for name, c := range srvBadInvites() {
		s.reset()
		i := newSrvInvitation(t, s, "1")
		pdu, from := c.pdu(t, s, "1", i.event), c.sender(s)
		requireSrvParity(t, name, i.send(t, s, from, "v1", pdu, i.state), i.send(t, s, from, "v2", pdu, i.state))
	}
	for _, membership := range []string{"join", "leave"} {
		room := newSrvMemberRoom(t, s, "10", membership)
		v1, v2 := srvSends[membership][0], srvSends[membership][1]
		for name, c := range srvBadMembers(membership) {
			pdu, from := c.pdu(t, s, "10", room.memberOf("@alice:domain", membership)), c.sender(s)
			requireSrvParity(t, name, room.sendMember(t, from, v1, pdu), room.sendMember(t, from, v2, pdu))
		}
		pdu := room.memberOf("@alice:domain", membership).sign(t, "10", s.domain)
		old, latest := room.sendMember(t, s.domain, v1, pdu), room.sendMember(t, s.domain, v2, pdu)
		require.Equal(t, 200, latest.Code)
		require.Equal(t, "[200,"+latest.Body.String()+"]", old.Body.String())
	}
}

func requireSrvParity(t *testing.T, name string, a, b *httptest.ResponseRecorder) {
	require.GreaterOrEqual(t, a.Code, 400, name)
	require.Equal(t, a.Code, b.Code, name)
	require.Equal(t, a.Body.String(), b.Body.String(), name)
}

// What is not served is answered in JSON. https://spec.matrix.org/v1.19/server-server-api/#unsupported-endpoints
func TestUnknownEndpoints(t *testing.T) {
	s := newSrvSite(t)
	for _, c := range newSrvCalls(t, s, nil) {
		for _, method := range []string{"GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS"} {
			if method != c.method {
				s.requireRefused(t, s.send(t, s.domain, method, c.uri, c.body), 405, mxfed.ErrUnrecognized)
			}
		}
	}
	for _, uri := range []string{"/", "/_matrix", "/_matrix/federation", "/_matrix/federation/v1", "/_matrix/federation/v1/version",
		"/_matrix/federation/v1/nonsense/!r:d/$e", "/_matrix/federation/v3/invite/!r:d/$e", "/_matrix/federation/v2/make_join/!r:d/@u:d",
		"/_matrix/federation/v2/invite", "/_matrix/federation/v2/invite/!r:d", "/_matrix/federation/v2/invite/!r:d/$e/", "/_matrix/federation/v2/invite/!r:d/$e/more",
		"/_matrix/federation//v2/invite/!r:d/$e", "//_matrix/federation/v2/invite/!r:d/$e", "/_matrix/federation/V2/invite/!r:d/$e", "/_matrix/federation/v2/Invite/!r:d/$e",
		"/_matrix/client/v3/sync", "/_matrix/federation/v2/invite%2F!r:d%2F$e"} {
		for _, method := range []string{"GET", "PUT"} {
			s.requireRefused(t, s.send(t, s.domain, method, uri, []byte("{}")), 404, mxfed.ErrUnrecognized)
		}
	}
	for _, uri := range []string{"/_matrix/federation/v2/invite//$e", "/_matrix/federation/v2/invite/!r:d/?x"} {
		s.requireRefused(t, s.send(t, s.domain, "PUT", uri, []byte("{}")), 400, mxfed.ErrInvalidParam)
	}
	require.Empty(t, s.allowed, "no signature was looked at")
}

// An endpoint without a host, and version 1 of send_join and send_leave if it is switched off, do not exist.
func TestHandler_WithoutHosts(t *testing.T) {
	s := newSrvSite(t)
	calls := newSrvCalls(t, s, nil)
	for name, c := range map[string]struct {
		hosts  mxfed.Hosts
		served []string
	}{
		"nothing": {mxfed.Hosts{}, nil},
		"invites": {mxfed.Hosts{Invite: mxfed.InviteHostFunc(s.takeInvite)}, []string{"v1/invite", "v2/invite"}},
		"joins":   {mxfed.Hosts{Join: mxfed.JoinHostFunc(s.takeJoin)}, []string{"v1/make_join", "v1/send_join", "v2/send_join"}},
		"leaves":  {mxfed.Hosts{Leave: mxfed.MemberHostFunc(s.takeMember)}, []string{"v1/make_leave", "v1/send_leave", "v2/send_leave"}},
		"knocks":  {mxfed.Hosts{Knock: mxfed.MemberHostFunc(s.takeMember)}, []string{"v1/make_knock", "v1/send_knock"}},
	} {
		s.handler = mxfed.NewHandler(s.server, c.hosts)
		for _, call := range calls {
			s.reset()
			w := s.send(t, s.domain, call.method, call.uri, call.body)
			if slices.Contains(c.served, call.endpoint) {
				require.Equal(t, 200, w.Code, name)
			} else {
				s.requireRefused(t, w, 404, mxfed.ErrUnrecognized)
			}
		}
	}
	s = newSrvSite(t, func(cfg *mxfed.Config) { cfg.NoV1 = true })
	for _, c := range newSrvCalls(t, s, nil) {
		s.reset()
		if w := s.send(t, s.domain, c.method, c.uri, c.body); c.endpoint == "v1/send_join" || c.endpoint == "v1/send_leave" {
			s.requireRefused(t, w, 404, mxfed.ErrUnrecognized)
		} else {
			require.Equal(t, 200, w.Code, c.endpoint)
		}
	}
}

// The path names room and event once more; both must be those of the body, whatever way they are escaped.
func TestPathBodyMismatch(t *testing.T) {
	s := newSrvSite(t)
	for _, c := range newSrvCalls(t, s, nil) {
		if c.method != http.MethodPut {
			continue
		}
		parts := strings.Split(c.uri, "/") // "", _matrix, federation, v2, invite, room, event
		path := func(room, event string) string {
			return strings.Join(append(slices.Clone(parts[:5]), room, event), "/")
		}
		room, event := parts[5], parts[6]
		foreign := "!unknown:us.example"
		for name, uri := range map[string]string{
			"another event":         path(room, event+"A"),
			"event in another case": path(room, strings.ToUpper(event)),
			"event without $":       path(room, strings.TrimPrefix(strings.TrimPrefix(event, "%24"), "$")),
			"event escaped twice":   path(room, strings.ReplaceAll(event, "$", "%2524")),
			"event with a space":    path(room, event+"%20"),
			"event of the room":     path(room, room),
			"swapped":               path(event, room),
		} {
			s.reset()
			w := s.send(t, s.domain, c.method, uri, c.body)
			if name == "swapped" && !strings.HasSuffix(c.endpoint, "invite") {
				s.requireRefused(t, w, 404, mxfed.ErrNotFound) // no such room
				continue
			}
			s.requireRefused(t, w, 400, mxfed.ErrInvalidParam)
		}
		for name, other := range map[string]string{"another room": foreign, "room with a slash": string(c.room) + "%2F", "room with a zero byte": string(c.room) + "%00"} {
			s.reset()
			s.rooms["!unknown:us.example"], s.rooms[c.room+"/"], s.rooms[c.room+"\x00"] = s.rooms[c.room], s.rooms[c.room], s.rooms[c.room]
			t.Log(name)
			s.requireRefused(t, s.send(t, s.domain, c.method, path(other, event), c.body), 400, mxfed.ErrInvalidParam)
		}
		for _, uri := range []string{c.uri + "/", c.uri + "%2F", c.uri + "/x"} {
			s.reset()
			w := s.send(t, s.domain, c.method, uri, c.body)
			require.Contains(t, []int{400, 404}, w.Code)
			s.requireRefused(t, w, w.Code, map[int]mxfed.ErrorCode{400: mxfed.ErrInvalidParam, 404: mxfed.ErrUnrecognized}[w.Code])
		}
		s.reset()
		escaped := path(srvEscapeAll(string(c.room)), srvEscapeAll(srvUnescape(t, event)))
		require.Equal(t, 200, s.send(t, s.domain, c.method, escaped, c.body).Code, "the same path, escaped in another way")
	}
}

// srvEscapeAll escapes every byte.
func srvEscapeAll(s string) string {
	return fmt.Sprintf("%%%s", strings.ReplaceAll(fmt.Sprintf("% x", s), " ", "%"))
}

func srvUnescape(t testing.TB, s string) string {
	plain, err := url.PathUnescape(s)
	require.NoError(t, err)
	return plain
}

// A user is spoken for by the user's own server and by no other, however well the event is signed.
func TestSend_OriginMismatch(t *testing.T) {
	s := newSrvSite(t)
	for _, c := range newSrvCalls(t, s, nil) {
		s.reset()
		status, code := 400, mxfed.ErrInvalidParam
		if c.method == http.MethodGet {
			status, code = 403, mxfed.ErrForbidden
		}
		s.requireRefused(t, s.send(t, s.third, c.method, c.uri, c.body), status, code)
		s.reset()
		require.Equal(t, 200, s.send(t, s.domain, c.method, c.uri, c.body).Code, c.endpoint)
	}
}

// srvSignatures are the signatures of an event, good by domain's, and what becomes of it.
type srvSignatures struct {
	change func(own map[string]any) // those of domain
	others map[string]any
	status int
	code   mxfed.ErrorCode
}

func srvSignatureCases(t *testing.T, other string) map[string]srvSignatures {
	many := func(n int, format string) func(map[string]any) {
		return func(own map[string]any) {
			for i := range n {
				own[fmt.Sprintf(format, i)] = 0
			}
		}
	}
	add := func(id string, sig any) func(map[string]any) { return func(own map[string]any) { own[id] = sig } }
	invalid := mxfed.ErrInvalidParam
	return map[string]srvSignatures{
		"good":                               {status: 200},
		"none":                               {change: func(own map[string]any) { clear(own) }, status: 400, code: invalid},
		"no string":                          {change: add("ed25519:k", 1), status: 400, code: invalid},
		"no base64":                          {change: add("ed25519:k", "!"), status: 400, code: invalid},
		"too short":                          {change: add("ed25519:k", "AAAA"), status: 400, code: invalid},
		"of another event":                   {change: add("ed25519:k", other), status: 400, code: invalid},
		"padded":                             {change: func(own map[string]any) { own["ed25519:k"] = own["ed25519:k"].(string) + "==" }, status: 200},
		"one more, wrong":                    {change: add("ed25519:second", other), status: 400, code: invalid},
		"one more of an unknown key":         {change: add("ed25519:unknown", other), status: 200},
		"one more of another algorithm":      {change: add("rsa:k", other), status: 200},
		"one more of a replaced key":         {change: add("ed25519:old", other), status: 200},
		"only another algorithm":             {change: func(own map[string]any) { clear(own); own["rsa:k"] = other }, status: 400, code: invalid},
		"only an unknown key":                {change: func(own map[string]any) { own["ed25519:unknown"] = own["ed25519:k"]; delete(own, "ed25519:k") }, status: 400, code: invalid},
		"only a replaced key":                {change: func(own map[string]any) { own["ed25519:old"] = own["ed25519:k"]; delete(own, "ed25519:k") }, status: 400, code: invalid},
		"of a policy server":                 {change: add("ed25519:policy_server", other), status: 200},
		"wrong one of another server":        {others: map[string]any{"third.example": map[string]any{"ed25519:k": other}}, status: 200},
		"nonsense of another server":         {others: map[string]any{"": []any{1}, "x y": nil}, status: 200},
		"3,000 of unknown keys":              {change: many(3000, "ed25519:%d"), status: 200},
		"5,000 that are more than one event": {change: many(5000, "ed25519:%d"), status: 413, code: mxfed.ErrTooLarge},
	}
}

// All signatures of the sender's server whose keys are known must be right, and there must be one. Those of others and of
// unknown keys are passed over. https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestSend_SignatureMatrix(t *testing.T) {
	s := newSrvSite(t)
	known := s.keys.byName["domain"]["ed25519:k"]
	second := newSrvPeer(t, "second.example").key.Public().(ed25519.PublicKey)
	s.keys.byName["domain"]["ed25519:second"] = mxfed.Key{Public: second, ValidUntil: known.ValidUntil}
	s.keys.byName["domain"]["ed25519:old"] = mxfed.Key{Public: known.Public, Expired: srvNow.Add(-time.Hour)}
	s.keys.byName["domain"]["rsa:k"] = known
	for _, v := range []mxfed.RoomVersion{"1", "4", "10", "12"} {
		invite := newSrvInvitation(t, s, v)
		for name, c := range srvSignatureCases(t, srvSignatureOf(t, invite.event.with("depth", 99), v, s.domain)) {
			sign := func(p srvPDU) json.RawMessage {
				own := map[string]any{"ed25519:k": srvSignatureOf(t, p, v, s.domain)}
				if c.change != nil {
					c.change(own)
				}
				all := map[string]any{"domain": own}
				maps.Copy(all, c.others)
				return p.with("signatures", all).sign(t, v)
			}
			check := func(t *testing.T, w *httptest.ResponseRecorder) {
				if c.status == 200 {
					require.Equal(t, 200, w.Code, "%.500s", w.Body)
					require.LessOrEqual(t, s.keys.asked.Load(), int64(2), "one look-up for the request, one for the event")
				} else {
					s.requireRefused(t, w, c.status, c.code)
				}
			}
			t.Run(name+", invite, version "+string(v), func(t *testing.T) {
				s.reset()
				check(t, invite.send(t, s, s.domain, "v2", sign(invite.event), invite.state))
			})
			for _, membership := range srvMemberships(v) {
				t.Run(name+", "+membership+", version "+string(v), func(t *testing.T) {
					room := newSrvMemberRoom(t, s, v, membership)
					s.reset()
					check(t, room.sendMember(t, s.domain, srvNewest(membership), sign(room.memberOf("@alice:domain", membership))))
				})
			}
		}
	}
}

// srvSignatureOf is the signature of an event alone.
func srvSignatureOf(t *testing.T, p srvPDU, v mxfed.RoomVersion, by *srvPeer) string {
	signatures := srvObject(t, p.with("signatures", nil).sign(t, v, by))["signatures"].(map[string]any)
	return signatures[string(by.name)].(map[string]any)[string(by.id)].(string)
}

// Verify tells of each event by itself, with one look-up of keys for all of them.
func TestVerify(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	gone := newSrvPeer(t, "gone.example")
	event := func(local string, by *srvPeer) srvPDU { return room.joinOf("@"+local+":"+string(by.name), "") }
	good := event("good", s.domain).sign(t, "10", s.domain)
	wrongHash := strings.Replace(string(good), `"membership":"join"`, `"displayname":"x","membership":"join"`, 1)
	parse := func(pdu []byte) *mxfed.Event { return srvEvent(t, "10", pdu) }
	events := []*mxfed.Event{parse(good), nil, parse(event("u", s.domain).sign(t, "10", s.third)), parse(event("own", s.own).sign(t, "10", s.own)),
		parse([]byte(wrongHash)), parse(event("u", gone).sign(t, "10", gone)), parse(event("other", s.third).sign(t, "10", s.third)), room.latest,
		parse(event("u", s.domain).with("signatures", map[string]any{"domain": map[string]any{"ed25519:k": "AAAA"}}).sign(t, "10"))}
	s.keys.fail = errors.New("no answer from gone.example")
	s.reset()
	errs := s.server.Verify(t.Context(), events...)
	require.EqualValues(t, 1, s.keys.asked.Load())
	require.Len(t, errs, len(events))
	want := []mxfed.ErrorCode{"", mxfed.ErrBadJSON, mxfed.ErrInvalidParam, "", mxfed.ErrInvalidParam, mxfed.ErrUnknown, "", "", mxfed.ErrInvalidParam}
	s.keys.fail = nil
	errs[2] = s.server.Verify(t.Context(), events[2])[0] // while no other look-up fails
	for i, code := range want {
		if code == "" {
			require.NoError(t, errs[i], i)
		} else {
			require.ErrorIs(t, errs[i], code, i)
		}
	}
	require.Empty(t, s.server.Verify(t.Context()))

	many := slices.Repeat([]*mxfed.Event{events[0], events[2], events[6]}, 400)
	for i, err := range s.server.Verify(t.Context(), many...) {
		require.Equal(t, i%3 == 1, err != nil, i)
	}
}

// Build makes what the room allows, and signs nothing else.
func TestBuild(t *testing.T) {
	for _, v := range srvVersions {
		t.Run("version "+string(v), func(t *testing.T) {
			s := newSrvSite(t)
			room := newSrvRoom(t, s, v, nil)
			key := ""
			draft := mxfed.Draft{Room: room.id, Type: "m.room.topic", StateKey: &key, Sender: mxfed.UserID(room.admin), Content: json.RawMessage(`{ "topic": "a" }`)}
			e, err := s.server.Build(t.Context(), &draft)
			require.NoError(t, err)
			require.EqualValues(t, 1, s.signing.made.Load())
			require.NoError(t, s.server.Verify(t.Context(), e)[0])
			require.Equal(t, []mxfed.EventID{room.latest.ID()}, e.Prev())
			require.Equal(t, `{"topic":"a"}`, string(e.Content()))
			sent := srvObject(t, e.JSON())
			require.EqualValues(t, 5, sent["depth"])
			require.EqualValues(t, srvNow.UnixMilli(), sent["origin_server_ts"])
			require.NotContains(t, sent, "unsigned")
			auth := 3
			if v == "12" {
				auth = 2
			}
			require.Len(t, e.Auth(), auth)

			message := draft
			message.StateKey, message.Type = nil, "m.room.message"
			e, err = s.server.Build(t.Context(), &message)
			require.NoError(t, err)
			_, isState := e.StateKey()
			require.False(t, isState)

			s.reset()
			for name, c := range map[string]struct {
				change func(d *mxfed.Draft)
				code   mxfed.ErrorCode
			}{
				"not in the room":   {func(d *mxfed.Draft) { d.Sender = "@bob:us.example" }, mxfed.ErrForbidden},
				"another server's":  {func(d *mxfed.Draft) { d.Sender = "@alice:domain" }, mxfed.ErrInvalidParam},
				"no user":           {func(d *mxfed.Draft) { d.Sender = "us.example" }, mxfed.ErrInvalidParam},
				"unknown room":      {func(d *mxfed.Draft) { d.Room = "!none:us.example" }, mxfed.ErrNotFound},
				"content no object": {func(d *mxfed.Draft) { d.Content = json.RawMessage("[]") }, mxfed.ErrBadJSON},
				"content missing":   {func(d *mxfed.Draft) { d.Content = nil }, mxfed.ErrBadJSON},
				"no type":           {func(d *mxfed.Draft) { d.Type = "" }, mxfed.ErrInvalidParam},
				"another version":   {func(d *mxfed.Draft) { d.Version = "13" }, mxfed.ErrInvalidParam},
				"create, no state":  {func(d *mxfed.Draft) { d.Type, d.Version, d.StateKey = "m.room.create", v, nil }, mxfed.ErrInvalidParam},
				"content a float":   {func(d *mxfed.Draft) { d.Content = json.RawMessage(`{"a":1.5}`) }, mxfed.ErrBadJSON},
				"not allowed": {func(d *mxfed.Draft) {
					other := "@alice:domain"
					d.StateKey = &other
				}, mxfed.ErrForbidden},
				"too large": {func(d *mxfed.Draft) {
					d.Content = json.RawMessage(`{"topic":"` + strings.Repeat("x", 65536) + `"}`)
				}, mxfed.ErrTooLarge},
				"another create of the room": {func(d *mxfed.Draft) { d.Type, d.Version = "m.room.create", "13" }, mxfed.ErrIncompatibleRoomVersion},
			} {
				bad := draft
				c.change(&bad)
				_, err := s.server.Build(t.Context(), &bad)
				require.ErrorIs(t, err, c.code, name)
				require.Zero(t, s.signing.made.Load(), name)
			}
		})
	}
}

// The create event is built from nothing; that of room version 12 names the room.
func TestBuild_Create(t *testing.T) {
	s := newSrvSite(t)
	key := ""
	for _, v := range srvVersions {
		draft := mxfed.Draft{Room: "!new:us.example", Version: v, Type: "m.room.create", StateKey: &key, Sender: "@admin:us.example", Content: json.RawMessage(`{"x":1}`)}
		if v == "12" {
			draft.Room = ""
		}
		e, err := s.server.Build(t.Context(), &draft)
		require.NoError(t, err, v)
		require.NoError(t, s.server.Verify(t.Context(), e)[0])
		require.Equal(t, v, e.Version())
		require.Empty(t, e.Prev())
		want := map[string]any{"x": 1.0, "room_version": string(v)}
		if !slices.Contains([]mxfed.RoomVersion{"11", "12"}, v) {
			want["creator"] = "@admin:us.example"
		}
		require.Equal(t, want, srvObject(t, e.Content()))
		if v == "12" {
			require.Equal(t, "!"+string(e.ID()[1:]), string(e.RoomID()))
		} else {
			require.Equal(t, draft.Room, e.RoomID())
		}
	}
}

// A configuration that cannot work is an error that names the field.
func TestNewServer(t *testing.T) {
	a, b := newSrvPeer(t, "a.example").signer, newSrvPeer(t, "b.example").signer
	for name, c := range map[string]struct {
		cfg   mxfed.Config
		field string
	}{
		"nothing":         {mxfed.Config{}, "Config.Signers"},
		"no signer":       {mxfed.Config{Signers: []*mxfed.Signer{}}, "Config.Signers"},
		"nil signer":      {mxfed.Config{Signers: []*mxfed.Signer{a, nil}}, "Config.Signers"},
		"empty signer":    {mxfed.Config{Signers: []*mxfed.Signer{{}}}, "Config.Signers"},
		"two for a name":  {mxfed.Config{Signers: []*mxfed.Signer{a, b, a}}, "Config.Signers"},
		"unknown version": {mxfed.Config{Signers: []*mxfed.Signer{a}, Versions: []mxfed.RoomVersion{"10", "org.example"}}, "Config.Versions"},
		"request limit":   {mxfed.Config{Signers: []*mxfed.Signer{a}, MaxRequest: -1}, "Config.MaxRequest"},
		"answer limit":    {mxfed.Config{Signers: []*mxfed.Signer{a}, MaxAnswer: -1}, "Config.MaxAnswer"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := mxfed.NewServer(c.cfg)
			require.ErrorContains(t, err, "mxfed: ")
			require.ErrorContains(t, err, c.field)
		})
	}
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{a, b}})
	require.NoError(t, err, "everything else has a zero value that works")
	require.NotNil(t, s.Client())
}

// What is refused is logged with its cause, which the answer keeps to itself.
func TestServer_Log(t *testing.T) {
	var log bytes.Buffer
	s := newSrvSite(t, func(cfg *mxfed.Config) {
		cfg.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	i := newSrvInvitation(t, s, "10")
	pdu := i.event.sign(t, "10", s.domain)
	for level, err := range map[string]error{"ERROR": errors.New("secret of the database"), "DEBUG": errors.Join(mxfed.ErrForbidden, errors.New("secret of the database"))} {
		log.Reset()
		s.invited = func(context.Context, *mxfed.Invite) error { return err }
		w := i.send(t, s, s.domain, "v2", pdu, i.state)
		require.NotContains(t, w.Body.String(), "secret")
		require.Contains(t, log.String(), "level="+level)
		require.Contains(t, log.String(), "secret of the database")
		require.Contains(t, log.String(), i.uri("v2", pdu))
	}
}
