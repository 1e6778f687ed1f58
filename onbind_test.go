package mxfed_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// This file tests third-party invites from the invited user's side: an identity server tells us.example that an address is
// now @bob's.

// bindSite is us.example as the invited user's server. @alice:domain has made promises: in a room of us.example's too, and
// in rooms that it is not in.
type bindSite struct {
	*tpSite
	present  bool // us.example has a user in the room
	claims   []*mxfed.Binding
	refuses  error
	domainIs http.HandlerFunc // what domain answers
}

const bindURI = "/_matrix/federation/v1/3pid/onbind"

func newBindSite(t testing.TB, v mxfed.RoomVersion) *bindSite {
	s := &bindSite{tpSite: newTPSite(t, v), present: true, domainIs: tpSay(200, `{}`)}
	s.handler = mxfed.NewOnBindHandler(s.server, s)
	s.bobServer = s.net.serve("domain", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.domainIs(w, r) }))
	s.room.set(t, s.own, s.room.admin, "m.room.join_rules", "", map[string]any{"join_rule": "public"})
	s.room.set(t, s.domain, "@alice:domain", "m.room.member", "@alice:domain", map[string]any{"membership": "join"})
	powers := map[string]any{"@alice:domain": 50, s.room.admin: 100}
	if v == "12" {
		delete(powers, s.room.admin) // the creator has all power
	}
	s.room.set(t, s.own, s.room.admin, "m.room.power_levels", "", map[string]any{"users": powers, "invite": 50})
	s.room.set(t, s.domain, "@alice:domain", "m.room.third_party_invite", tpToken, s.promise)
	s.room.edit = func(r *mxfed.Room) {
		if s.present {
			r.Present = map[mxfed.ServerName]bool{"us.example": true}
		}
	}
	s.reset()
	return s
}

// Bound implements mxfed.BindHost.
func (s *bindSite) Bound(_ context.Context, b *mxfed.Binding) error {
	s.claims = append(s.claims, b)
	return s.refuses
}

// ThirdPartyInvited implements mxfed.BindHost.
func (s *bindSite) ThirdPartyInvited(ctx context.Context, e *mxfed.Event) error {
	return s.take(ctx, e)
}

// invite is one entry of a claim, for @bob.
func (s *bindSite) invite(t testing.TB, room, sender string) srvPDU {
	return srvPDU{"medium": "email", "address": "bob@example.org", "mxid": "@bob:us.example", "room_id": room, "sender": sender,
		"signed": tpSigned(t, "@bob:us.example", tpToken, nil, s.identity)}
}

// claim is a good request about these invites.
func (s *bindSite) claim(invites ...any) srvPDU {
	return srvPDU{"medium": "email", "address": "bob@example.org", "mxid": "@bob:us.example", "invites": invites}
}

// bind sends a claim as identity servers do: nobody signs it.
func (s *bindSite) bind(t testing.TB, method string, body []byte) *httptest.ResponseRecorder {
	return s.serve(httptest.NewRequest(method, bindURI, bytes.NewReader(body)))
}

// In a room that this server is in, it makes the invite itself: in the name of the promise's sender, whose signature is not
// needed. Another server that joins later finds nothing wrong with it.
// https://spec.matrix.org/v1.19/server-server-api/#cases-where-an-association-does-not-exist-for-a-third-party-identifier
func TestOnBind_InTheRoom(t *testing.T) {
	for _, v := range srvVersions {
		for _, method := range []string{http.MethodPut, http.MethodPost} {
			s := newBindSite(t, v)
			claim := s.claim(s.invite(t, string(s.room.id), "@alice:domain"))
			w := s.bind(t, method, srvJSON(t, claim))
			require.Equal(t, 200, w.Code, "%s %s", v, w.Body)
			require.JSONEq(t, `{}`, w.Body.String())
			require.Empty(t, s.bobServer.seen())
			require.Len(t, s.idServer.seen(), 1)
			require.Len(t, s.stored, 1)
			e := s.stored[0]
			require.Equal(t, mxfed.UserID("@alice:domain"), e.Sender())
			require.Equal(t, "invite", e.Membership())
			require.Contains(t, string(e.Content()), `"display_name":"b...@e..."`)
			signatures := srvObject(t, e.JSON())["signatures"].(map[string]any)
			require.Contains(t, signatures, "us.example")
			require.Len(t, signatures, 1)
			if srvGivenIDs(v) {
				require.True(t, strings.HasSuffix(string(e.ID()), ":us.example"), "%s", e.ID())
			}
			require.Equal(t, []error{nil}, s.newPeerServer(t, s.third).Verify(t.Context(), e))
			require.Len(t, s.claims, 1)
			b := s.claims[0]
			require.Equal(t, []any{"email", "bob@example.org", mxfed.UserID("@bob:us.example"), 1}, []any{b.Medium, b.Address, b.User, len(b.Invites)})
			require.JSONEq(t, string(srvJSON(t, claim["invites"].([]any)[0].(srvPDU)["signed"])), string(b.Invites[0].Signed))
			require.Equal(t, 200, s.bind(t, method, srvJSON(t, claim)).Code, "again")
			require.Len(t, s.stored, 1)
		}
	}
}

// A server that joins the room later checks that invite as every event of the room.
func TestOnBind_OthersAccept(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "6", "10", "12"} {
		s := newBindSite(t, v)
		require.Equal(t, 200, s.bind(t, "POST", srvJSON(t, s.claim(s.invite(t, string(s.room.id), "@alice:domain")))).Code)
		all := slices.Collect(maps.Values(s.room.events))
		s.accept = func(_ context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
			answer, err := s.room.join(m)
			answer.Auth = srvSequence(all, false)
			return answer, err
		}
		s.net.serve("us.example", mxfed.NewHandler(s.server, mxfed.Hosts{Join: mxfed.JoinHostFunc(s.takeJoin)}))
		result, err := s.newPeerServer(t, s.third).Client().Join(t.Context(), &mxfed.JoinRequest{Room: s.room.id, User: "@u:third.example", Via: []mxfed.ServerName{"us.example"}})
		require.NoError(t, err)
		require.Empty(t, result.Dropped)
		require.True(t, slices.ContainsFunc(result.State, func(e *mxfed.Event) bool { return e.ID() == s.stored[0].ID() }))
	}
}

// In any other room, the sender's server is asked, and after it the one that the room's ID names.
func TestOnBind_Exchange(t *testing.T) {
	const path = "PUT /_matrix/federation/v1/exchange_third_party_invite/"
	fails := tpSay(500, `{}`)
	for name, c := range map[string]struct {
		room            string
		domain, third   http.HandlerFunc
		domainN, thirdN int
		status          int
	}{
		"sender's server":       {"!r:third.example", tpSay(200, `{}`), fails, 1, 0, 200},
		"room's server":         {"!r:third.example", fails, tpSay(200, `{}`), 1, 1, 200},
		"sender's is not in it": {"!r:third.example", tpSay(404, `{"errcode":"M_NOT_FOUND"}`), tpSay(200, `{}`), 1, 1, 200},
		"sender's refuses":      {"!r:third.example", tpSay(403, `{"errcode":"M_FORBIDDEN"}`), tpSay(200, `{}`), 1, 0, 502},
		"both fail":             {"!r:third.example", fails, fails, 1, 1, 502},
		"one server":            {"!r:domain", fails, nil, 1, 0, 502},
		"our room":              {"!r:us.example", fails, nil, 1, 0, 502},
		"no server in the ID":   {"!" + strings.Repeat("a", 43), fails, nil, 1, 0, 502},
		"no server name":        {"!r:under_score", fails, nil, 1, 0, 502},
		"no JSON":               {"!r:domain", tpSay(200, `x`), nil, 1, 0, 502},
	} {
		t.Run(name, func(t *testing.T) {
			s := newBindSite(t, "10")
			s.domainIs = func(w http.ResponseWriter, r *http.Request) {
				var body map[string]any
				require.NoError(t, json.NewDecoder(r.Body).Decode(&body))
				want := s.withSigned(t, tpSigned(t, "@bob:us.example", tpToken, nil, s.identity)).with("room_id", c.room).with("sender", "@alice:domain").with("state_key", "@bob:us.example")
				require.JSONEq(t, string(srvJSON(t, want)), string(srvJSON(t, body)))
				require.Contains(t, r.Header.Get("Authorization"), `origin="us.example"`)
				c.domain(w, r)
			}
			third := s.net.serve("third.example", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { c.third(w, r) }))
			w := s.bind(t, "PUT", srvJSON(t, s.claim(s.invite(t, c.room, "@alice:domain"))))
			require.Equal(t, c.status, w.Code, "%s", w.Body)
			require.Equal(t, slices.Repeat([]string{path + url.PathEscape(c.room)}, c.domainN), s.bobServer.seen())
			require.Len(t, third.seen(), c.thirdN)
			require.EqualValues(t, c.domainN+c.thirdN, s.signing.made.Load(), "nobody else was called")
			require.Empty(t, s.stored)
		})
	}
}

// A room that this server has left, or cannot tell that it is in, is not one that it could send anything to.
func TestOnBind_LeftRoom(t *testing.T) {
	s := newBindSite(t, "10")
	s.present = false
	require.Equal(t, 200, s.bind(t, "PUT", srvJSON(t, s.claim(s.invite(t, string(s.room.id), "@alice:domain")))).Code)
	require.Len(t, s.bobServer.seen(), 1)
	require.Empty(t, s.stored)
	s.keep(t) // a local user's promise: there is nobody to ask
	requireSrvError(t, s.bind(t, "PUT", srvJSON(t, s.claim(s.invite(t, string(s.room.id), s.room.admin)))), 502, mxfed.ErrUnknown)
	require.Len(t, s.bobServer.seen(), 1)
	require.Zero(t, s.signing.made.Load())
	s.present = true
	require.Equal(t, 200, s.bind(t, "PUT", srvJSON(t, s.claim(s.invite(t, string(s.room.id), s.room.admin)))).Code)
	require.Len(t, s.stored, 1)
}

// What is wrong with an invite is found before anything is signed; the answer does not tell strangers what it was.
func TestOnBind_NotRedeemed(t *testing.T) {
	for name, change := range map[string]func(s *bindSite, invite srvPDU) srvPDU{
		"signed by another": func(s *bindSite, i srvPDU) srvPDU {
			return i.with("signed", tpSigned(t, "@bob:us.example", tpToken, nil, s.third))
		},
		"another token": func(s *bindSite, i srvPDU) srvPDU {
			return i.with("signed", tpSigned(t, "@bob:us.example", "other", nil, s.identity))
		},
		"another sender": func(s *bindSite, i srvPDU) srvPDU { return i.with("sender", "@carol:domain") },
		"revoked":        func(s *bindSite, i srvPDU) srvPDU { s.validity = tpSay(200, `{"valid":false}`); return i },
		"unreachable":    func(s *bindSite, i srvPDU) srvPDU { s.validity = tpSay(500, ``); return i },
		"banned": func(s *bindSite, i srvPDU) srvPDU {
			s.room.set(t, s.own, s.room.admin, "m.room.member", "@bob:us.example", map[string]any{"membership": "ban"})
			return i
		},
		"in the room": func(s *bindSite, i srvPDU) srvPDU {
			s.room.set(t, s.own, "@bob:us.example", "m.room.member", "@bob:us.example", map[string]any{"membership": "join"})
			return i
		},
		"a local stranger's": func(s *bindSite, i srvPDU) srvPDU { return i.with("sender", "@eve:us.example") },
		"our own, no room": func(s *bindSite, i srvPDU) srvPDU {
			return i.with("sender", "@eve:us.example").with("room_id", "!gone:domain")
		},
		"the host fails": func(s *bindSite, i srvPDU) srvPDU {
			s.room.edit = func(r *mxfed.Room) { r.Version = "" }
			return i
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newBindSite(t, "10")
			invite := change(s, s.invite(t, string(s.room.id), "@alice:domain"))
			s.reset()
			w := s.bind(t, "POST", srvJSON(t, s.claim(invite)))
			s.requireNothing(t, w, 502, mxfed.ErrUnknown)
			require.JSONEq(t, `{"errcode":"M_UNKNOWN","error":"not all invites could be redeemed"}`, w.Body.String())
		})
	}
}

// bindForms are requests that are refused before the host is asked.
var bindForms = map[string]struct {
	claim  func(s *bindSite, good srvPDU) any
	status int
	code   mxfed.ErrorCode
}{
	"a list":     {func(_ *bindSite, good srvPDU) any { return []any{good} }, 400, mxfed.ErrBadJSON},
	"no medium":  {func(_ *bindSite, good srvPDU) any { return good.with("medium", nil) }, 400, mxfed.ErrBadJSON},
	"no address": {func(_ *bindSite, good srvPDU) any { return good.with("address", 7) }, 400, mxfed.ErrBadJSON},
	"no user":    {func(_ *bindSite, good srvPDU) any { return good.with("mxid", nil) }, 400, mxfed.ErrBadJSON},
	"user no ID": {func(_ *bindSite, good srvPDU) any { return good.with("mxid", "bob") }, 400, mxfed.ErrInvalidParam},
	"user of another": {func(s *bindSite, good srvPDU) any {
		return good.with("mxid", "@bob:domain").with("invites", []any{good["invites"].([]any)[0].(srvPDU).with("mxid", "@bob:domain").
			with("signed", tpSigned(s.net.t, "@bob:domain", tpToken, nil, s.identity))})
	}, 400, mxfed.ErrInvalidParam},
	"no invites":          {func(_ *bindSite, good srvPDU) any { return good.with("invites", nil) }, 400, mxfed.ErrBadJSON},
	"invites an object":   {func(_ *bindSite, good srvPDU) any { return good.with("invites", srvPDU{}) }, 400, mxfed.ErrBadJSON},
	"empty invites":       {func(_ *bindSite, good srvPDU) any { return good.with("invites", []any{}) }, 400, mxfed.ErrInvalidParam},
	"invite null":         {func(_ *bindSite, good srvPDU) any { return good.with("invites", []any{nil}) }, 400, mxfed.ErrBadJSON},
	"invite for another":  bindChange("mxid", "@eve:us.example", 400, mxfed.ErrInvalidParam),
	"invite for nobody":   bindChange("mxid", nil, 400, mxfed.ErrBadJSON),
	"invite, no room":     bindChange("room_id", nil, 400, mxfed.ErrBadJSON),
	"invite, room no ID":  bindChange("room_id", "room", 400, mxfed.ErrInvalidParam),
	"invite, no sender":   bindChange("sender", nil, 400, mxfed.ErrBadJSON),
	"invite, sender bad":  bindChange("sender", "@alice", 400, mxfed.ErrInvalidParam),
	"invite, not signed":  bindChange("signed", nil, 400, mxfed.ErrBadJSON),
	"invite, signed text": bindChange("signed", "x", 400, mxfed.ErrBadJSON),
	"signed for another": {func(s *bindSite, good srvPDU) any {
		return good.with("invites", []any{good["invites"].([]any)[0].(srvPDU).with("signed", tpSigned(s.net.t, "@eve:us.example", tpToken, nil, s.identity))})
	}, 400, mxfed.ErrInvalidParam},
	"second one is bad": {func(_ *bindSite, good srvPDU) any {
		return good.with("invites", append(good["invites"].([]any), srvPDU{}))
	}, 400, mxfed.ErrBadJSON},
	"51 invites":     {func(_ *bindSite, good srvPDU) any { return bindMany(good, 51) }, 413, mxfed.ErrTooLarge},
	"10,000 invites": {func(_ *bindSite, good srvPDU) any { return bindMany(good, 10_000) }, 413, mxfed.ErrTooLarge},
}

// bindChange changes one member of the invite.
func bindChange(key string, v any, status int, code mxfed.ErrorCode) struct {
	claim  func(s *bindSite, good srvPDU) any
	status int
	code   mxfed.ErrorCode
} {
	return struct {
		claim  func(s *bindSite, good srvPDU) any
		status int
		code   mxfed.ErrorCode
	}{func(_ *bindSite, good srvPDU) any {
		return good.with("invites", []any{good["invites"].([]any)[0].(srvPDU).with(key, v)})
	}, status, code}
}

func bindMany(good srvPDU, n int) srvPDU {
	return good.with("invites", slices.Repeat(good["invites"].([]any), n))
}

// A request of the wrong form leads to nothing at all, whoever sends it.
func TestOnBind_Refused(t *testing.T) {
	requireRefused := func(t *testing.T, s *bindSite, w *httptest.ResponseRecorder, status int, code mxfed.ErrorCode) {
		s.requireNothing(t, w, status, code)
		require.Empty(t, s.idServer.seen())
		require.Zero(t, s.asks.Load())
	}
	for name, c := range bindForms {
		t.Run(name, func(t *testing.T) {
			s := newBindSite(t, "10")
			w := s.bind(t, "POST", srvJSON(t, c.claim(s, s.claim(s.invite(t, string(s.room.id), "@alice:domain")))))
			requireRefused(t, s, w, c.status, c.code)
			require.Empty(t, s.claims)
		})
	}
	s := newBindSite(t, "10")
	for body, code := range map[string]mxfed.ErrorCode{"": mxfed.ErrNotJSON, "x": mxfed.ErrNotJSON, `{"mxid":1,"mxid":1}`: mxfed.ErrNotJSON, "{}": mxfed.ErrBadJSON,
		`{"a":"` + strings.Repeat("x", 3<<20) + `"}`: mxfed.ErrTooLarge} {
		w := s.bind(t, "PUT", []byte(body))
		requireRefused(t, s, w, map[bool]int{true: 413, false: 400}[code == mxfed.ErrTooLarge], code)
	}
	requireRefused(t, s, s.bind(t, "GET", nil), 405, mxfed.ErrUnrecognized)
	for _, uri := range []string{strings.Replace(bindURI, "v1", "v2", 1), bindURI + "/", bindURI + "/x", strings.TrimSuffix(bindURI, "/onbind"), strings.Replace(bindURI, "onbind", "other", 1)} {
		requireRefused(t, s, s.serve(httptest.NewRequest("PUT", uri, strings.NewReader("{}"))), 404, mxfed.ErrUnrecognized)
	}
	require.Empty(t, s.claims)
	good := srvJSON(t, s.claim(s.invite(t, string(s.room.id), "@alice:domain"), s.invite(t, "!r:domain", "@alice:domain")))
	s.refuses = mxfed.ErrForbidden
	requireRefused(t, s, s.bind(t, "PUT", good), 403, mxfed.ErrForbidden)
	s.refuses = io.ErrUnexpectedEOF
	requireRefused(t, s, s.bind(t, "PUT", good), 500, mxfed.ErrUnknown)
	require.Len(t, s.claims, 2)
}

// One invite that fails does not keep the others from their user.
func TestOnBind_GoesOn(t *testing.T) {
	s := newBindSite(t, "10")
	s.domainIs = func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.RequestURI, "good") {
			w.WriteHeader(500)
		}
		io.WriteString(w, `{}`)
	}
	all := []any{s.invite(t, "!bad:domain", "@alice:domain"), s.invite(t, "!r:gone.example", "@x:gone.example"),
		s.invite(t, string(s.room.id), "@alice:domain"), s.invite(t, "!good:domain", "@alice:domain")}
	requireSrvError(t, s.bind(t, "POST", srvJSON(t, s.claim(all...))), 502, mxfed.ErrUnknown)
	require.Len(t, s.stored, 1)
	require.Len(t, s.bobServer.seen(), 2)
	require.Equal(t, 200, s.bind(t, "POST", srvJSON(t, s.claim(all[2:]...))).Code)
	require.Equal(t, 413, s.bind(t, "POST", srvJSON(t, s.claim(slices.Repeat(all[3:], 51)...))).Code)
	require.Equal(t, 200, s.bind(t, "POST", srvJSON(t, s.claim(slices.Repeat(all[3:], 50)...))).Code)
	require.Len(t, s.bobServer.seen(), 2+1+50)
}

// When the caller has gone, the rest is left.
func TestOnBind_Cancelled(t *testing.T) {
	s := newBindSite(t, "10")
	ctx, cancel := context.WithCancel(t.Context())
	s.domainIs = func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		cancel()
		<-r.Context().Done()
	}
	body := srvJSON(t, s.claim(s.invite(t, "!a:third.example", "@alice:domain"), s.invite(t, "!b:domain", "@alice:domain")))
	third := s.net.serve("third.example", tpSay(200, `{}`))
	w := s.serve(httptest.NewRequest("POST", bindURI, bytes.NewReader(body)).WithContext(ctx))
	requireSrvError(t, w, 502, mxfed.ErrUnknown)
	require.Len(t, s.bobServer.seen(), 1)
	require.Empty(t, third.seen())
	require.EqualValues(t, 1, s.signing.made.Load())
	require.EqualValues(t, 1, s.asks.Load())
}

// The whole way: @admin invites an address, @bob binds it, his server hears of it and asks for the invite, which arrives
// there; and then he joins.
func TestOnBind_WholeFlow(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "6", "10", "11", "12"} {
		s := newTPSite(t, v)
		s.net.serve("us.example", mxfed.NewHandler(s.server, mxfed.Hosts{Join: mxfed.JoinHostFunc(s.takeJoin), ThirdParty: mxfed.ThirdPartyHostFunc(s.take)}))
		bob := mxfed.NewHandler(s.bob, mxfed.Hosts{Bind: bindAll{}})
		claim := srvPDU{"medium": "email", "address": "bob@example.org", "mxid": "@bob:domain", "invites": []any{srvPDU{
			"medium": "email", "address": "bob@example.org", "mxid": "@bob:domain", "room_id": s.room.id, "sender": s.room.admin,
			"signed": tpSigned(t, "@bob:domain", tpToken, nil, s.identity)}}}
		join := &mxfed.JoinRequest{Room: s.room.id, User: "@bob:domain", Via: []mxfed.ServerName{"us.example"}}
		_, err := s.bob.Client().Join(t.Context(), join)
		require.ErrorIs(t, err, mxfed.ErrForbidden, "not yet")
		w := httptest.NewRecorder()
		bob.ServeHTTP(w, httptest.NewRequest("POST", bindURI, bytes.NewReader(srvJSON(t, claim))))
		require.Equal(t, 200, w.Code, "%s", w.Body)
		require.Len(t, s.bobInvites, 1)
		require.Equal(t, mxfed.UserID("@bob:domain"), s.bobInvites[0].User)
		result, err := s.bob.Client().Join(t.Context(), join)
		require.NoError(t, err, "%s", v)
		require.Empty(t, result.Dropped)
		require.True(t, slices.ContainsFunc(result.State, func(e *mxfed.Event) bool { return e.ID() == s.stored[0].ID() }))
		require.WithinDuration(t, srvNow, time.UnixMilli(int64(srvObject(t, s.stored[0].JSON())["origin_server_ts"].(float64))), 0)
	}
}

// bindAll believes every claim.
type bindAll struct{ mxfed.ThirdPartyHost }

func (bindAll) Bound(context.Context, *mxfed.Binding) error { return nil }
