package mxfed_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// srvInviteAPIs are the versions of the endpoint, each with the room versions that it is tried with.
var srvInviteAPIs = map[string][]mxfed.RoomVersion{"v1": {"1"}, "v2": {"1", "2", "3", "5", "6", "8", "10", "11", "12"}}

func forEachInvite(t *testing.T, test func(t *testing.T, api string, v mxfed.RoomVersion)) {
	for api, versions := range srvInviteAPIs {
		for _, v := range versions {
			t.Run(api+", room version "+string(v), func(t *testing.T) { test(t, api, v) })
		}
	}
}

// An invite comes back with the invited server's signature and with everything else as it was sent; the host gets it
// verified and pruned. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func TestInvite(t *testing.T) {
	forEachInvite(t, func(t *testing.T, api string, v mxfed.RoomVersion) {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		// An entry under the invited server's own name proves nothing and is kept.
		foreign := map[string]any{string(s.own.name): map[string]any{"ed25519:other": "AAAA"}}
		pdu := i.event.with("signatures", foreign).with("member_of_the_future", 1).sign(t, v, s.domain)
		w := i.send(t, s, s.domain, api, pdu, i.state)
		require.Equal(t, http.StatusOK, w.Code, "%s", w.Body)
		require.Equal(t, "application/json", w.Header().Get("Content-Type"))
		require.EqualValues(t, 1, s.signing.made.Load())

		answer := w.Body.Bytes()
		sent := srvObject(t, pdu)
		if api == "v1" {
			var pair []json.RawMessage
			require.NoError(t, json.Unmarshal(answer, &pair))
			require.Len(t, pair, 2)
			require.Equal(t, "200", string(pair[0]))
			answer = pair[1]
			sent["unsigned"] = map[string]any{"invite_room_state": []any{srvObject(t, i.state[0]), srvObject(t, i.state[1])}}
		}
		want := srvObject(t, i.event.with("signatures", sent["signatures"]).with("member_of_the_future", 1).sign(t, v, s.own))
		sent["signatures"] = want["signatures"]
		require.Equal(t, map[string]any{"event": sent}, srvObject(t, answer))

		require.Len(t, s.invites, 1)
		inv := s.invites[0]
		require.NoError(t, inv.StateErr)
		require.Equal(t, mxfed.UserID("@bob:us.example"), inv.User)
		require.Equal(t, s.domain.name, inv.Origin)
		require.Equal(t, s.own.name, inv.To)
		require.NotContains(t, string(inv.Event.JSON()), "unsigned")
		require.JSONEq(t, string(srvJSON(t, want["signatures"])), string(srvJSON(t, srvObject(t, inv.Event.JSON())["signatures"])))
		require.Equal(t, "m.room.create", inv.Create.Type())
		require.Len(t, inv.State, 2)
		for n, entry := range inv.State {
			require.Equal(t, entry.Type, entry.Event.Type())
			require.JSONEq(t, string(i.state[n]), string(entry.Event.JSON()))
			require.Equal(t, entry.Event.Content(), entry.Content)
		}
	})
}

// Version 1 names no room version. It is "1" or "2", as the create event says.
func TestInvite_V1RoomVersion(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "2"} {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		w := i.send(t, s, s.domain, "v1", i.event.sign(t, v, s.domain), i.state)
		require.Equal(t, http.StatusOK, w.Code)
		require.Equal(t, v, s.invites[0].Event.Version())
		require.Equal(t, v, s.invites[0].Create.Version())
		require.NoError(t, s.invites[0].StateErr)
	}
	s := newSrvSite(t, func(cfg *mxfed.Config) { cfg.Versions = []mxfed.RoomVersion{"10"} })
	i := newSrvInvitation(t, s, "1")
	body := s.requireRefused(t, i.send(t, s, s.domain, "v1", i.event.sign(t, "1", s.domain), nil), 400, mxfed.ErrIncompatibleRoomVersion)
	require.Equal(t, "1", body["room_version"])
}

func srvSet(key string, v any) func(srvPDU) srvPDU {
	return func(p srvPDU) srvPDU { return p.with(key, v) }
}

func srvMembership(v any) func(srvPDU) srvPDU {
	return srvSet("content", map[string]any{"membership": v})
}

func srvReplace(old, new string) func(string) string {
	return func(pdu string) string { return strings.Replace(pdu, old, new, 1) }
}

// srvBadInvites are events that must never get the invited server's signature, whatever their sender signs.
func srvBadInvites() map[string]srvDefect {
	invalid, badJSON := mxfed.ErrInvalidParam, mxfed.ErrBadJSON
	null := json.RawMessage("null")
	all := map[string]srvDefect{
		"power levels for the user":              {event: srvSet("type", "m.room.power_levels"), code: invalid},
		"message":                                {event: func(p srvPDU) srvPDU { return p.with("type", "m.room.message").with("state_key", nil) }, code: invalid},
		"message with the state key":             {event: srvSet("type", "m.room.message"), code: invalid},
		"create event":                           {event: func(p srvPDU) srvPDU { return p.with("type", "m.room.create").with("state_key", "") }, code: invalid},
		"type in another case":                   {event: srvSet("type", "M.room.member"), code: invalid},
		"type with a space":                      {event: srvSet("type", "m.room.member "), code: invalid},
		"type missing":                           {event: srvSet("type", nil), code: invalid},
		"type null":                              {event: srvSet("type", null), code: invalid},
		"type a list":                            {event: srvSet("type", []string{"m.room.member"}), code: invalid},
		"sender is the invited user":             {event: srvSet("sender", "@bob:us.example"), code: invalid},
		"sender is of us, signed by us":          {event: srvSet("sender", "@bob:us.example"), by: "us", code: invalid},
		"sender on a third server":               {event: srvSet("sender", "@eve:third.example"), by: "third", code: invalid},
		"sent by a third server":                 {from: "third", code: invalid},
		"sent by a third server that signed too": {by: "both", from: "third", code: invalid},
		"sender no user ID":                      {event: srvSet("sender", "alice"), code: invalid},
		"sender missing":                         {event: srvSet("sender", nil), code: invalid},
		"sender a number":                        {event: srvSet("sender", 1), code: invalid},
		"state_key empty":                        {event: srvSet("state_key", ""), code: invalid},
		"state_key missing":                      {event: srvSet("state_key", nil), code: invalid},
		"state_key null":                         {event: srvSet("state_key", null), code: invalid},
		"state_key a number":                     {event: srvSet("state_key", 7), code: invalid},
		"content missing":                        {event: srvSet("content", nil), code: badJSON},
		"content null":                           {event: srvSet("content", null), code: badJSON},
		"content a string":                       {event: srvSet("content", "invite"), code: badJSON},
		"content a list":                         {event: srvSet("content", []string{"invite"}), code: badJSON},
		"membership absent":                      {event: srvSet("content", map[string]any{}), code: invalid},
		"membership in the event":                {event: func(p srvPDU) srvPDU { return p.with("content", map[string]any{}).with("membership", "invite") }, code: invalid},
		"member name in another case":            {event: srvSet("content", map[string]any{"Membership": "invite"}), code: invalid},
		"no signature":                           {by: "nobody", code: invalid},
		"signed by a third server":               {by: "third", code: invalid},
		"signed by us":                           {by: "us", code: invalid},
		"signatures a list":                      {event: srvSet("signatures", []any{}), by: "nobody", code: badJSON},
		"our signature a string":                 {event: srvSet("signatures", map[string]any{"domain": "x", "us.example": "x"}), by: "nobody", code: invalid},
		"other bytes signed":                     {text: srvReplace(`"depth":3`, `"depth":4`), code: invalid},
		"content hash wrong":                     {text: srvReplace(`"membership":"invite"`, `"a":1,"membership":"invite"`), code: invalid},
		"hashes missing":                         {event: srvSet("hashes", map[string]any{}), code: badJSON},
		"membership twice":                       {text: srvReplace(`"membership":"invite"`, `"membership":"invite","membership":"join"`), code: mxfed.ErrNotJSON},
		"state_key twice":                        {text: srvReplace(`"state_key":`, `"state_key":"@eve:domain","state_key":`), code: mxfed.ErrNotJSON},
		"unpaired surrogate":                     {text: srvReplace(`"membership":"invite"`, `"a":"\ud800","membership":"invite"`), code: mxfed.ErrNotJSON},
		"invalid UTF-8":                          {text: srvReplace(`"membership":"invite"`, "\"a\":\"\xff\",\"membership\":\"invite\""), code: mxfed.ErrNotJSON},
		"third-party, sender unsigned": {event: srvSet("content", map[string]any{"membership": "invite", "third_party_invite": map[string]any{
			"signed": map[string]any{"mxid": "@bob:us.example", "token": "t", "signatures": map[string]any{}}}}), by: "nobody", code: invalid},
		"room_id missing":        {event: srvSet("room_id", nil), code: invalid},
		"room_id a number":       {event: srvSet("room_id", 1), code: invalid},
		"depth missing":          {event: srvSet("depth", nil), code: badJSON},
		"depth negative":         {event: srvSet("depth", -1), code: badJSON},
		"depth beyond 64 bits":   {event: srvSet("depth", json.RawMessage("9223372036854775808")), code: badJSON},
		"time missing":           {event: srvSet("origin_server_ts", nil), code: badJSON},
		"time a string":          {event: srvSet("origin_server_ts", "1"), code: badJSON},
		"state_key of 256 bytes": {event: srvSet("state_key", "@"+strings.Repeat("b", 244)+":us.example"), status: 413, code: mxfed.ErrTooLarge},
		"event of 64 KiB":        {event: srvSet("content", map[string]any{"membership": "invite", "reason": strings.Repeat("x", 65536)}), status: 413, code: mxfed.ErrTooLarge},
	}
	srvAddBadMembers(all)
	return all
}

// srvAddBadMembers adds memberships that are not invite and users that are not of us.example.
func srvAddBadMembers(all map[string]srvDefect) {
	invalid, null := mxfed.ErrInvalidParam, json.RawMessage("null")
	for _, m := range []any{"leave", "join", "ban", "knock", "Invite", "INVITE", " invite", "invite\x00", "", []string{"invite"}, 1, true, null, map[string]any{"invite": true}} {
		all[fmt.Sprintf("membership %q", fmt.Sprint(m))] = srvDefect{event: srvMembership(m), code: invalid}
	}
	for _, user := range []string{"@bob:elsewhere.example", "@bob:us.example.evil", "@bob:us.example:8448", "@bob:US.EXAMPLE", "@bob:us.example ", "@bob:evil:us.example",
		"@bob:us.example\x00", "bob:us.example", "@us.example", "@bob:us.ex\u0430mple", "@bob:us\u3002example", "@bob:us.example.", "#bob:us.example", "us.example", "@bob"} {
		all[fmt.Sprintf("state_key %q", user)] = srvDefect{event: srvSet("state_key", user), code: invalid}
	}
}

// The invited server's signature is only ever put on an invite of the caller's user to one of its own: its signature under
// any other member event could let somebody in. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func TestInvite_NeverSigns(t *testing.T) {
	cases := srvBadInvites()
	require.GreaterOrEqual(t, len(cases), 40)
	forEachInvite(t, func(t *testing.T, api string, v mxfed.RoomVersion) {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		for name, c := range cases {
			t.Run(name, func(t *testing.T) {
				s.reset()
				w := i.send(t, s, c.sender(s), api, c.pdu(t, s, v, i.event), i.state)
				s.requireRefused(t, w, cmp.Or(c.status, 400), c.code)
			})
		}
		s.reset()
		require.Equal(t, 200, i.send(t, s, s.domain, api, i.event.sign(t, v, s.domain), i.state).Code, "without a defect")
	})
}

// What is wrong with the body as a whole is told apart from what is wrong with the event.
func TestInvite_Body(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "10")
	pdu := i.event.sign(t, "10", s.domain)
	old := newSrvInvitation(t, s, "1")
	oldPDU := old.event.sign(t, "1", s.domain)
	v2 := func(version, event string) string { return `{"room_version":` + version + `,"event":` + event + `}` }
	for name, c := range map[string]struct {
		api, body string
		code      mxfed.ErrorCode
		version   any // of the room, in the answer
	}{
		"empty":                        {"v2", "", mxfed.ErrNotJSON, nil},
		"no JSON":                      {"v2", "{", mxfed.ErrNotJSON, nil},
		"two values":                   {"v2", "{}{}", mxfed.ErrNotJSON, nil},
		"null":                         {"v2", "null", mxfed.ErrBadJSON, nil},
		"list":                         {"v2", "[]", mxfed.ErrBadJSON, nil},
		"string":                       {"v1", `"x"`, mxfed.ErrBadJSON, nil},
		"list as version 1":            {"v1", "[]", mxfed.ErrBadJSON, nil},
		"nothing in it":                {"v2", "{}", mxfed.ErrBadJSON, nil},
		"nothing in it as version 1":   {"v1", "{}", mxfed.ErrInvalidParam, nil},
		"no room version":              {"v2", `{"event":` + string(pdu) + `}`, mxfed.ErrBadJSON, nil},
		"room version is a number":     {"v2", v2("10", string(pdu)), mxfed.ErrBadJSON, nil},
		"room version is null":         {"v2", v2("null", string(pdu)), mxfed.ErrBadJSON, nil},
		"no event":                     {"v2", `{"room_version":"10"}`, mxfed.ErrBadJSON, nil},
		"event is null":                {"v2", v2(`"10"`, "null"), mxfed.ErrBadJSON, nil},
		"event is a list":              {"v2", v2(`"10"`, "["+string(pdu)+"]"), mxfed.ErrBadJSON, nil},
		"event is a string":            {"v2", v2(`"10"`, `"x"`), mxfed.ErrBadJSON, nil},
		"room version unknown":         {"v2", v2(`"13"`, string(pdu)), mxfed.ErrIncompatibleRoomVersion, "13"},
		"room version empty":           {"v2", v2(`""`, string(pdu)), mxfed.ErrIncompatibleRoomVersion, nil},
		"room version with a zero":     {"v2", v2(`"010"`, string(pdu)), mxfed.ErrIncompatibleRoomVersion, "010"},
		"unknown version, event is {}": {"v2", v2(`"org.example"`, "{}"), mxfed.ErrIncompatibleRoomVersion, "org.example"},
		"version 10 as version 1":      {"v1", string(pdu), mxfed.ErrInvalidParam, nil},
		"event of 10 said to be of 1":  {"v2", v2(`"1"`, string(pdu)), mxfed.ErrInvalidParam, nil},
		"event of 1 said to be of 10":  {"v2", v2(`"10"`, string(oldPDU)), mxfed.ErrBadJSON, nil},
		"a v2 body as version 1":       {"v1", v2(`"10"`, string(pdu)), mxfed.ErrInvalidParam, nil},
		"a v1 body as version 2":       {"v2", string(oldPDU), mxfed.ErrBadJSON, nil},
		"float in room version 6":      {"v2", v2(`"6"`, strings.Replace(string(pdu), `"depth":3`, `"depth":3.0`, 1)), mxfed.ErrBadJSON, nil},
		"exponent in room version 12":  {"v2", v2(`"12"`, strings.Replace(string(pdu), `"depth":3`, `"depth":3e0`, 1)), mxfed.ErrBadJSON, nil},
		"2^53 in room version 6":       {"v2", v2(`"6"`, strings.Replace(string(pdu), `"depth":3`, `"a":9007199254740992,"depth":3`, 1)), mxfed.ErrBadJSON, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s.reset()
			w := s.send(t, s.domain, http.MethodPut, i.uri(c.api, pdu), []byte(c.body))
			require.Equal(t, c.version, s.requireRefused(t, w, 400, c.code)["room_version"])
		})
	}
}

// A room version that Config leaves out is not supported. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func TestInvite_ConfiguredVersions(t *testing.T) {
	s := newSrvSite(t, func(cfg *mxfed.Config) { cfg.Versions = []mxfed.RoomVersion{"11"} })
	for _, v := range []mxfed.RoomVersion{"10", "11", "12"} {
		s.reset()
		i := newSrvInvitation(t, s, v)
		w := i.send(t, s, s.domain, "v2", i.event.sign(t, v, s.domain), i.state)
		if v == "11" {
			require.Equal(t, 200, w.Code)
		} else {
			require.EqualValues(t, v, s.requireRefused(t, w, 400, mxfed.ErrIncompatibleRoomVersion)["room_version"])
		}
	}
}

// Whatever the host refuses with is the answer, and nothing of the signed event leaves.
func TestInvite_HostRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		status int
		code   mxfed.ErrorCode
	}{
		"code":               {mxfed.ErrForbidden, 403, mxfed.ErrForbidden},
		"blocked":            {mxfed.ErrInviteBlocked, 403, mxfed.ErrInviteBlocked},
		"wrapped":            {fmt.Errorf("host: %w", mxfed.ErrInviteBlocked), 403, mxfed.ErrInviteBlocked},
		"error of its own":   {&mxfed.Error{Code: "M_CUSTOM", Status: 418, Message: "tea"}, 418, "M_CUSTOM"},
		"limit":              {&mxfed.Error{Code: mxfed.ErrLimitExceeded, RetryAfter: 3 * time.Second}, 429, mxfed.ErrLimitExceeded},
		"any other error":    {errors.New("secret of the database"), 500, mxfed.ErrUnknown},
		"another server's":   {&mxfed.Error{Code: mxfed.ErrNotFound, Status: 404, Server: "x", Message: "secret"}, 502, mxfed.ErrUnknown},
		"the end of context": {context.DeadlineExceeded, 503, mxfed.ErrUnknown},
	} {
		for api, v := range map[string]mxfed.RoomVersion{"v1": "1", "v2": "12"} {
			t.Run(name+", "+api, func(t *testing.T) {
				s := newSrvSite(t)
				s.invited = func(context.Context, *mxfed.Invite) error { return c.err }
				i := newSrvInvitation(t, s, v)
				w := i.send(t, s, s.domain, api, i.event.sign(t, v, s.domain), i.state)
				requireSrvError(t, w, c.status, c.code)
				require.NotContains(t, w.Body.String(), "signatures")
				require.NotContains(t, w.Body.String(), "secret")
				require.Equal(t, c.status == 429, w.Header().Get("Retry-After") == "3")
			})
		}
	}
}

// A room that the server is in may shut the inviter's server out. That is judged after the event's form, so that other
// servers cannot probe for rooms with anything but an invite, and before keys are fetched.
func TestInvite_ACL(t *testing.T) {
	for api, v := range map[string]mxfed.RoomVersion{"v1": "1", "v2": "10"} {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		room := newSrvRoom(t, s, v, nil)
		room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"*"}, "deny": []string{"DOMAIN"}})
		s.rooms[mxfed.RoomID(i.room)] = room
		pdu := i.event.sign(t, v, s.domain)
		lookups := func() int64 { return s.keys.asked.Load() }
		s.reset()
		s.requireRefused(t, i.send(t, s, s.domain, api, pdu, i.state), 403, mxfed.ErrForbidden)
		require.EqualValues(t, 1, lookups(), "that of the request")
		require.EqualValues(t, 1, s.asks.Load())

		s.reset()
		s.requireRefused(t, i.send(t, s, s.domain, api, i.event.with("type", "m.room.name").sign(t, v, s.domain), i.state), 400, mxfed.ErrInvalidParam)
		require.Zero(t, s.asks.Load())

		room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"dom*"}})
		s.reset()
		require.Equal(t, 200, i.send(t, s, s.domain, api, pdu, i.state).Code)
	}
}

// A host that cannot say whether the room shuts the server out is no reason to let it in.
func TestInvite_RoomSourceFails(t *testing.T) {
	s := newSrvSite(t, func(cfg *mxfed.Config) {
		cfg.Rooms = mxfed.RoomSourceFunc(func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
			return nil, errors.New("secret of the database")
		})
	})
	i := newSrvInvitation(t, s, "10")
	w := i.send(t, s, s.domain, "v2", i.event.sign(t, "10", s.domain), i.state)
	s.requireRefused(t, w, 500, mxfed.ErrUnknown)
	require.NotContains(t, w.Body.String(), "secret")
}

// From room version 5 on a key counts for events only while its server vouches for it.
// https://spec.matrix.org/v1.19/rooms/v5/#signing-key-validity-period
func TestInvite_KeyValidity(t *testing.T) {
	forEachInvite(t, func(t *testing.T, api string, v mxfed.RoomVersion) {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		late := i.event.with("origin_server_ts", srvNow.Add(24*time.Hour).UnixMilli()+1).sign(t, v, s.domain)
		w := i.send(t, s, s.domain, api, late, i.state)
		if slices.Contains([]mxfed.RoomVersion{"1", "2", "3", "4"}, v) {
			require.Equal(t, 200, w.Code)
		} else {
			s.requireRefused(t, w, 400, mxfed.ErrInvalidParam)
		}
		s.reset()
		intime := i.event.with("origin_server_ts", srvNow.Add(24*time.Hour).UnixMilli()).sign(t, v, s.domain)
		require.Equal(t, 200, i.send(t, s, s.domain, api, intime, i.state).Code)
	})
}

// In room versions 1 and 2 the server that the event ID names must have signed as well.
// https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestInvite_EventIDServer(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "1")
	i.event["event_id"] = "$e:third.example"
	s.requireRefused(t, i.send(t, s, s.domain, "v1", i.event.sign(t, "1", s.domain), i.state), 400, mxfed.ErrInvalidParam)
	i.event["event_id"] = "$e:us.example"
	s.requireRefused(t, i.send(t, s, s.domain, "v2", i.event.sign(t, "1", s.domain), i.state), 400, mxfed.ErrInvalidParam)
	i.event["event_id"] = "$e:third.example"
	require.Equal(t, 200, i.send(t, s, s.domain, "v2", i.event.sign(t, "1", s.domain, s.third), i.state).Code)
}

// The keys of the event's servers may be out of reach for the moment: that is no refutation.
func TestInvite_KeysUnreachable(t *testing.T) {
	s := newSrvSite(t)
	s.keys.fail = errors.New("unreachable")
	i := newSrvInvitation(t, s, "2")
	i.event["event_id"] = "$e:gone.example"
	gone := newSrvPeer(t, "gone.example")
	s.requireRefused(t, i.send(t, s, s.domain, "v2", i.event.sign(t, "2", s.domain, gone), i.state), 502, mxfed.ErrUnknown)
}

// An entry under our name and key ID is replaced by our signature. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func TestInvite_ReplacesOwnEntry(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "10")
	for _, entry := range []any{map[string]any{string(s.own.id): "AAAA", "ed25519:old": 5}, "text", []any{}, json.RawMessage("null")} {
		event := i.event.with("signatures", map[string]any{string(s.own.name): entry})
		w := i.send(t, s, s.domain, "v2", event.sign(t, "10", s.domain), i.state)
		require.Equal(t, 200, w.Code, "%s", w.Body)
		signatures := srvObject(t, w.Body.Bytes())["event"].(map[string]any)["signatures"].(map[string]any)
		want := srvObject(t, i.event.sign(t, "10", s.own))["signatures"].(map[string]any)[string(s.own.name)].(map[string]any)
		if kept, ok := entry.(map[string]any); ok {
			want["ed25519:old"] = float64(kept["ed25519:old"].(int))
		}
		require.Equal(t, want, signatures[string(s.own.name)])
	}
}

// Size is measured without unsigned, in which version 1 carries the preview, and again with our signature.
// https://spec.matrix.org/v1.19/client-server-api/#size-limits
func TestInvite_Size(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "1")
	name := i.create.with("type", "m.room.name").with("event_id", "$n:domain").with("content", map[string]any{"name": strings.Repeat("n", 60000)})
	state := append(slices.Clone(i.state), name.sign(t, "1", s.domain), name.with("type", "m.room.topic").sign(t, "1", s.domain))
	w := i.send(t, s, s.domain, "v1", i.event.sign(t, "1", s.domain), state)
	require.Equal(t, 200, w.Code, "%s", w.Body)
	require.Len(t, s.invites[0].State, 4)

	s.reset()
	large := i.event.with("content", map[string]any{"membership": "invite", "reason": ""})
	room := 65536 - len(large.sign(t, "1", s.domain))
	large = large.with("content", map[string]any{"membership": "invite", "reason": strings.Repeat("x", room)})
	w = i.send(t, s, s.domain, "v2", large.sign(t, "1", s.domain), i.state)
	requireSrvError(t, w, 413, mxfed.ErrTooLarge)
	require.Empty(t, s.invites)
}

// Config.Allow is told whom the request speaks of, by the member that the invite will be read from.
func TestInvite_AllowSeesTheUser(t *testing.T) {
	s := newSrvSite(t)
	for api, v := range map[string]mxfed.RoomVersion{"v1": "1", "v2": "10"} {
		s.reset()
		i := newSrvInvitation(t, s, v)
		decoy := i.event.with("event", map[string]any{"state_key": "@decoy:us.example"})
		require.Equal(t, 200, i.send(t, s, s.domain, api, decoy.sign(t, v, s.domain), i.state).Code)
		require.Len(t, s.allowed, 1)
		require.Equal(t, mxfed.UserID("@bob:us.example"), s.allowed[0].User)
		require.Equal(t, mxfed.RoomID(i.room), s.allowed[0].Room)
		require.Equal(t, "invite", s.allowed[0].Endpoint)
	}
}
