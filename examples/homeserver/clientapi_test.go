package main

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestClientAPI runs on every kind of database. Alice and Bob are users of one server, Carol of another.
func TestClientAPI(t *testing.T) {
	onEach(t, func(w *world) {
		a, b := w.api(w.start("a.example")), w.api(w.start("b.example"))
		for name, test := range map[string]func(alice, bob, carol *phone){
			"register":         testRegister,
			"capabilities":     testCapabilities,
			"profile":          testProfile,
			"create a room":    testCreateRoom,
			"state":            testState,
			"member events":    testMemberEvents,
			"send":             testSend,
			"aliases":          testAliases,
			"moderation":       testModeration,
			"unreachable":      testUnreachable,
			"sync":             testSync,
			"sync: limited":    testSyncLimited,
			"sync: invite":     testSyncInvite,
			"sync: knock":      testSyncKnock,
			"sync: left":       testSyncLeft,
			"sync: rejoined":   testSyncRejoined,
			"sync: visibility": testSyncVisibility,
			"sync: everything": testSyncEverything,
		} {
			w.Run(name, func(t *testing.T) {
				suffix := strings.Map(func(r rune) rune { return map[bool]rune{true: r, false: '_'}[r >= 'a' && r <= 'z'] }, name)
				test(newPhone(t, a, "alice."+suffix), newPhone(t, a, "bob."+suffix), newPhone(t, b, "carol."+suffix))
			})
		}
	})
}

func TestUnrecognized(t *testing.T) {
	w := newWorld(t)
	alice := newPhone(t, w.api(w.start("a.example")), "alice")
	for name, c := range map[string]struct {
		method, path string
		status       int
		code         string
	}{
		"path":           {"GET", "v3/nothing", 404, "M_UNRECOGNIZED"},
		"prefix":         {"GET", "../nothing", 404, "M_UNRECOGNIZED"},
		"version":        {"GET", "v2/sync", 404, "M_UNRECOGNIZED"},
		"key":            {"GET", "v3/rooms/!a/state/a/b/c/d", 403, "M_FORBIDDEN"},
		"method":         {"DELETE", "v3/sync", 405, "M_UNRECOGNIZED"},
		"method on list": {"POST", "versions", 405, "M_UNRECOGNIZED"},
		"unauthorized":   {"PUT", "v3/register", 405, "M_UNRECOGNIZED"},
	} {
		t.Run(name, func(t *testing.T) { alice.fails(c.status, c.code, c.method, c.path, nil) })
	}
	for _, path := range []string{"/_matrix/federation/v1/nothing", "/_matrix/key/v9/x", "/x", "/_matrix/client/versions"} {
		t.Run(path, func(t *testing.T) {
			q, err := http.NewRequestWithContext(t.Context(), "GET", "https://a.example"+path, nil)
			require.NoError(t, err)
			r, err := w.Transport.RoundTrip(q)
			require.NoError(t, err)
			defer r.Body.Close()
			require.Equal(t, 404, r.StatusCode)
		})
	}
}

func testRegister(alice, _, _ *phone) {
	guest, dummy := &phone{T: alice.T, base: alice.base}, answer{"type": "m.login.dummy"}
	status, got := guest.try("POST", "v3/register", answer{"username": "dave"})
	require.Equal(alice, 401, status)
	require.Equal(alice, "m.login.dummy", got.at("flows", 0, "stages", 0))
	got = guest.must("POST", "v3/register", answer{"username": "dave", "device_id": "D", "auth": dummy})
	require.Equal(alice, "@dave:a.example", got["user_id"])
	require.Equal(alice, "D", got["device_id"])
	guest.must("POST", "v3/register", answer{"auth": dummy})
	guest.fails(400, "M_USER_IN_USE", "POST", "v3/register", answer{"username": "dave", "auth": dummy})
	guest.fails(400, "M_INVALID_USERNAME", "POST", "v3/register", answer{"username": "Dave!", "auth": dummy})
	guest.fails(400, "M_NOT_JSON", "POST", "v3/register", "{")
	guest.fails(400, "M_BAD_JSON", "POST", "v3/register", "[]")
	guest.fails(400, "M_BAD_JSON", "POST", "v3/register", answer{"username": 1})
	guest.fails(413, "M_TOO_LARGE", "POST", "v3/register", answer{"username": strings.Repeat("x", maxBody)})

	require.EqualValues(alice, alice.user, alice.must("GET", "v3/account/whoami", nil)["user_id"])
	guest.must("GET", "v3/account/whoami?access_token="+alice.token, nil)
	guest.fails(401, "M_MISSING_TOKEN", "GET", "v3/account/whoami", nil)
	guest.fails(401, "M_UNKNOWN_TOKEN", "GET", "v3/account/whoami?access_token=x", nil)
}

func testCapabilities(alice, _, _ *phone) {
	require.Contains(alice, alice.must("GET", "versions", nil)["versions"], "v1.19")
	got := alice.must("GET", "v3/capabilities", nil)
	require.Equal(alice, string(defaultVersion), got.at("capabilities", "m.room_versions", "default"))
	available := got.at("capabilities", "m.room_versions", "available").(map[string]any)
	require.Len(alice, available, 12)
	for version := range available {
		room := alice.create(answer{"room_version": version})
		created := find(alice, alice.must("GET", in3(room, "state"), nil)[""], "m.room.create", "")
		require.Equal(alice, version, created.at("content", "room_version"))
		require.Equal(alice, room, created["room_id"])
	}
	alice.fails(400, "M_UNSUPPORTED_ROOM_VERSION", "POST", "v3/createRoom", answer{"room_version": "13"})
}

func testProfile(alice, bob, carol *phone) {
	room, path := alice.create(nil), "v3/profile/"+string(alice.user)
	alice.must("PUT", path+"/displayname", answer{"displayname": "Alice"})
	alice.must("PUT", path+"/avatar_url", answer{"avatar_url": "mxc://a.example/x"})
	for _, p := range []*phone{alice, carol} {
		require.Equal(p, answer{"displayname": "Alice", "avatar_url": "mxc://a.example/x"}, p.must("GET", path, nil))
		require.Equal(p, answer{"displayname": "Alice"}, p.must("GET", path+"/displayname", nil))
		p.fails(404, "M_NOT_FOUND", "GET", "v3/profile/@nobody:a.example", nil)
	}
	require.Equal(alice, "Alice", alice.must("GET", in3(room, "state/m.room.member/"+string(alice.user)), nil)["displayname"])
	bob.fails(403, "M_FORBIDDEN", "PUT", path+"/displayname", answer{"displayname": "x"})
	alice.fails(403, "M_FORBIDDEN", "PUT", path+"/tz", answer{"tz": "x"})
	alice.must("PUT", path+"/displayname", answer{"displayname": nil})
	alice.fails(404, "M_NOT_FOUND", "GET", path+"/displayname", nil)
}

func testCreateRoom(alice, bob, _ *phone) {
	for name, c := range map[string]struct {
		ask  answer
		want map[string]any // content by type
	}{
		"nothing":     {nil, map[string]any{"m.room.join_rules": answer{"join_rule": "invite"}, "m.room.history_visibility": answer{"history_visibility": "shared"}}},
		"public":      {answer{"preset": "public_chat"}, map[string]any{"m.room.join_rules": answer{"join_rule": "public"}}},
		"named":       {answer{"name": "N"}, map[string]any{"m.room.name": answer{"name": "N"}}},
		"alias":       {answer{"room_alias_name": "x"}, map[string]any{"m.room.canonical_alias": answer{"alias": "#x:a.example"}}},
		"state":       {answer{"initial_state": []answer{{"type": "m.room.join_rules", "content": answer{"join_rule": "knock"}}}}, map[string]any{"m.room.join_rules": answer{"join_rule": "knock"}}},
		"old creator": {answer{"room_version": "6"}, map[string]any{"m.room.create": answer{"room_version": "6", "creator": string(alice.user)}}},
	} {
		alice.Run(name, func(t *testing.T) {
			state := alice.must("GET", in3(alice.create(c.ask), "state"), nil)[""]
			for typ, content := range c.want {
				require.EqualValues(t, content, find(t, state, typ, "")["content"])
			}
			require.Equal(t, "join", find(t, state, "m.room.member", string(alice.user)).at("content", "membership"))
		})
	}
	room := alice.create(answer{"invite": []any{bob.user}, "is_direct": true, "preset": "trusted_private_chat", "room_version": "10"})
	invited := find(bob, bob.sync("").at("rooms", "invite", room, "invite_state", "events"), "m.room.member", string(bob.user))
	require.Equal(bob, true, invited.at("content", "is_direct"))
	require.EqualValues(bob, 100, alice.must("GET", in3(room, "state/m.room.power_levels"), nil).at("users", string(bob.user)))
	alice.fails(400, "M_ROOM_IN_USE", "POST", "v3/createRoom", answer{"room_alias_name": "x"})
}

func testState(alice, bob, _ *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	id := alice.must("PUT", in3(room, "state/m.room.topic"), answer{"topic": "T"})["event_id"]
	require.Equal(alice, answer{"topic": "T"}, alice.must("GET", in3(room, "state/m.room.topic"), nil))
	require.Equal(alice, answer{"topic": "T"}, alice.must("GET", in3(room, "state/m.room.topic/"), nil))
	whole := find(alice, alice.must("GET", in3(room, "state"), nil)[""], "m.room.topic", "")
	require.Equal(alice, id, whole["event_id"])
	require.Equal(alice, room, whole["room_id"])
	key := "a/b:%é"
	alice.must("PUT", in3(room, "state/x.y/"+url.PathEscape(key)), answer{"n": 1})
	require.EqualValues(alice, 1, alice.must("GET", in3(room, "state/x.y/"+url.PathEscape(key)), nil)["n"])
	require.EqualValues(alice, 1, find(alice, alice.must("GET", in3(room, "state"), nil)[""], "x.y", key).at("content", "n"))

	alice.fails(404, "M_NOT_FOUND", "GET", in3(room, "state/x.y/z"), nil)
	bob.fails(403, "M_FORBIDDEN", "GET", in3(room, "state"), nil)
	bob.fails(403, "M_FORBIDDEN", "GET", in3(room, "state/m.room.topic"), nil)
	bob.fails(403, "M_FORBIDDEN", "PUT", in3(room, "state/m.room.topic"), answer{"topic": "mine"})
	bob.must("POST", "v3/join/"+url.PathEscape(room), nil)
	bob.fails(403, "M_FORBIDDEN", "PUT", in3(room, "state/m.room.topic"), answer{"topic": "mine"})
	for _, content := range []string{`{"n":1.5}`, `[]`, `null`, `7`} {
		alice.fails(400, "M_BAD_JSON", "PUT", in3(room, "state/x.y"), content)
	}
	alice.fails(413, "M_TOO_LARGE", "PUT", in3(room, "state/x.y"), answer{"n": strings.Repeat("x", 70000)})
}

// testMemberEvents changes memberships by setting state.
func testMemberEvents(alice, bob, _ *phone) {
	room := alice.create(nil)
	path := in3(room, "state/m.room.member/"+string(bob.user))
	set := func(p *phone, membership string) {
		p.Helper()
		id := p.must("PUT", path, answer{"membership": membership, "reason": "so"})["event_id"]
		state := alice.must("GET", in3(room, "state"), nil)[""]
		require.Equal(p, id, find(p, state, "m.room.member", string(bob.user))["event_id"])
		require.Equal(p, answer{"membership": membership, "reason": "so"}, alice.must("GET", path, nil))
	}
	bob.fails(403, "M_FORBIDDEN", "PUT", path, answer{"membership": "join"})
	set(alice, "invite")
	set(bob, "join")
	bob.must("PUT", path, answer{"membership": "join", "displayname": "Bobby"})
	require.Equal(bob, "Bobby", alice.must("GET", path, nil)["displayname"])
	set(bob, "leave")
	set(alice, "ban")
	set(alice, "leave")
	alice.fails(400, "M_BAD_JSON", "PUT", path, answer{"membership": 1})
	alice.fails(400, "M_BAD_JSON", "PUT", path, "null")
}

func testSend(alice, bob, _ *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", in3(room, "join"), nil)
	alice.sync("")
	bob.sync("")
	id := alice.say(room, "1", "hello")
	require.Equal(alice, id, alice.say(room, "1", "hello"), "the same transaction")
	require.NotEqual(alice, id, alice.say(room, "2", "hello"))
	require.NotEqual(alice, id, bob.say(room, "1", "hello"), "another device")
	require.NotEqual(alice, id, alice.say(alice.create(nil), "1", "hello"), "another room")
	shown := alice.sync("").at("rooms", "join", room, "timeline", "events").([]any)
	require.Len(alice, shown, 3)
	require.Equal(alice, "1", answer(shown[0].(map[string]any)).at("unsigned", "transaction_id"))
	require.Nil(alice, answer(shown[2].(map[string]any)).at("unsigned", "transaction_id"))
	require.Nil(bob, bob.sync("").at("rooms", "join", room, "timeline", "events", 0, "unsigned", "transaction_id"))
}

func testAliases(alice, bob, carol *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	path := "v3/directory/room/" + url.PathEscape("#x/y:a.example")
	for range 2 {
		bob.fails(403, "M_FORBIDDEN", "PUT", path, answer{"room_id": room})
		alice.must("POST", in3(room, "invite"), answer{"user_id": bob.user})
	}
	alice.must("PUT", path, answer{"room_id": room})
	for _, p := range []*phone{alice, carol} {
		require.Equal(p, answer{"room_id": room, "servers": []any{"a.example"}}, p.must("GET", path, nil))
		p.fails(404, "M_NOT_FOUND", "GET", "v3/directory/room/"+url.PathEscape("#none:a.example"), nil)
	}
	require.Equal(carol, room, carol.must("POST", "v3/join/"+url.PathEscape("#x/y:a.example"), nil)["room_id"])
	alice.fails(409, "M_ROOM_IN_USE", "PUT", path, answer{"room_id": room})
	carol.fails(400, "M_INVALID_PARAM", "PUT", path, answer{"room_id": room})
	alice.fails(400, "M_INVALID_PARAM", "GET", "v3/directory/room/x", nil)
	alice.fails(400, "M_INVALID_PARAM", "POST", "v3/join/x", nil)
}

func testModeration(alice, _, carol *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	about := answer{"user_id": carol.user, "reason": "so"}
	member := in3(room, "state/m.room.member/"+string(carol.user))
	join := "v3/join/" + url.PathEscape(room) + "?via=a.example"
	alice.fails(403, "M_FORBIDDEN", "POST", in3(room, "kick"), about)
	carol.must("POST", join, nil)
	alice.must("POST", in3(room, "kick"), about)
	require.Equal(alice, answer{"membership": "leave", "reason": "so"}, alice.must("GET", member, nil))
	carol.syncUntil("rooms", "leave", room)
	carol.must("POST", join, nil)
	carol.fails(403, "M_FORBIDDEN", "POST", in3(room, "ban"), answer{"user_id": alice.user})
	alice.fails(403, "M_FORBIDDEN", "POST", in3(room, "unban"), about)
	alice.must("POST", in3(room, "ban"), about)
	carol.syncUntil("rooms", "leave", room)
	carol.fails(403, "M_FORBIDDEN", "POST", join, nil)
	alice.must("POST", in3(room, "unban"), about)
	carol.must("POST", join, nil)
	alice.fails(400, "M_INVALID_PARAM", "POST", in3(room, "kick"), answer{})
	alice.fails(400, "M_INVALID_PARAM", "POST", in3(room, "invite"), answer{"user_id": "carol"})
}

// testUnreachable asks servers that do not exist.
func testUnreachable(alice, _, _ *phone) {
	alice.fails(504, string(mxfed.ErrUnknown), "POST", in3(alice.create(nil), "invite"), answer{"user_id": "@x:nowhere.example"})
	alice.fails(504, string(mxfed.ErrUnknown), "POST", "v3/join/!x:nowhere.example", nil)
}
