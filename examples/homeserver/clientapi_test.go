package main

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// oneServer is a server with two users.
func oneServer(t *testing.T) (alice, bob *phone) {
	t.Helper()
	w := newWorld(t)
	base := w.api(w.start("a.example"))
	return newPhone(t, base, "alice"), newPhone(t, base, "bob")
}

// twoServers has a user on each.
func twoServers(t *testing.T) (alice, bob *phone) {
	t.Helper()
	w := newWorld(t)
	return newPhone(t, w.api(w.start("a.example")), "alice"), newPhone(t, w.api(w.start("b.example")), "bob")
}

func TestUnrecognized(t *testing.T) {
	w := newWorld(t)
	s := w.start("a.example")
	alice := newPhone(t, w.api(s), "alice")
	for name, c := range map[string]struct {
		method, path string
		status       int
	}{
		"path":           {"GET", "v3/nothing", 404},
		"prefix":         {"GET", "../nothing", 404},
		"version":        {"GET", "v2/sync", 404},
		"key":            {"GET", "v3/rooms/!a/state/a/b/c/d", 403},
		"method":         {"DELETE", "v3/sync", 405},
		"method on list": {"POST", "versions", 405},
		"unauthorized":   {"PUT", "v3/login", 405},
	} {
		t.Run(name, func(t *testing.T) {
			status, got := alice.try(c.method, c.path, nil)
			require.Equal(t, c.status, status)
			if status != 403 {
				require.Equal(t, "M_UNRECOGNIZED", got["errcode"])
			}
		})
	}
	for path, status := range map[string]int{"/_matrix/federation/v1/nothing": 404, "/_matrix/key/v9/x": 404, "/x": 404, "/_matrix/client/versions": 404} {
		t.Run(path, func(t *testing.T) {
			q, err := http.NewRequestWithContext(t.Context(), "GET", "https://a.example"+path, nil)
			require.NoError(t, err)
			r, err := w.Transport.RoundTrip(q)
			require.NoError(t, err)
			defer r.Body.Close()
			require.Equal(t, status, r.StatusCode)
		})
	}
}

func TestCrossOrigin(t *testing.T) {
	alice, _ := oneServer(t)
	for _, method := range []string{"OPTIONS", "GET"} {
		q, err := http.NewRequestWithContext(t.Context(), method, alice.base+"v3/sync", nil)
		require.NoError(t, err)
		r, err := http.DefaultClient.Do(q)
		require.NoError(t, err)
		r.Body.Close()
		require.Equal(t, "*", r.Header.Get("Access-Control-Allow-Origin"))
		require.Contains(t, r.Header.Get("Access-Control-Allow-Headers"), "Authorization")
		require.Equal(t, map[string]int{"OPTIONS": 200, "GET": 401}[method], r.StatusCode)
	}
}

func TestRegister(t *testing.T) {
	alice, _ := oneServer(t)
	guest := &phone{T: t, base: alice.base}
	status, got := guest.try("POST", "v3/register", answer{"username": "carol"})
	require.Equal(t, 401, status)
	require.Equal(t, "m.login.dummy", got.at("flows", 0, "stages", 0))

	dummy := answer{"type": "m.login.dummy"}
	guest.must("GET", "v3/register/available?username=carol", nil)
	got = guest.must("POST", "v3/register", answer{"username": "carol", "password": "secret", "device_id": "D", "auth": dummy})
	require.Equal(t, "@carol:a.example", got["user_id"])
	require.Equal(t, "D", got["device_id"])
	guest.fails(400, "M_INVALID_USERNAME", "GET", "v3/register/available?username=Carol", nil)
	guest.fails(400, "M_USER_IN_USE", "GET", "v3/register/available?username=carol", nil)
	guest.fails(400, "M_USER_IN_USE", "POST", "v3/register", answer{"username": "carol", "auth": dummy})
	guest.fails(400, "M_INVALID_USERNAME", "POST", "v3/register", answer{"username": "Carol!", "auth": dummy})
	guest.fails(403, "M_GUEST_ACCESS_FORBIDDEN", "POST", "v3/register?kind=guest", answer{"auth": dummy})
	guest.fails(400, "M_NOT_JSON", "POST", "v3/register", "{")
	guest.fails(400, "M_BAD_JSON", "POST", "v3/register", "[]")
	guest.fails(400, "M_BAD_JSON", "POST", "v3/register", answer{"username": 1})
	guest.fails(413, "M_TOO_LARGE", "POST", "v3/register", answer{"username": strings.Repeat("x", maxBody)})
	require.NotContains(t, guest.must("POST", "v3/register", answer{"inhibit_login": true, "auth": dummy}), "access_token")
}

func TestSession(t *testing.T) {
	alice, _ := oneServer(t)
	require.Equal(t, "@alice:a.example", alice.must("GET", "v3/account/whoami", nil)["user_id"])
	require.Equal(t, "@alice:a.example", alice.must("GET", "r0/account/whoami", nil)["user_id"])
	guest := &phone{T: t, base: alice.base}
	guest.must("GET", "v3/account/whoami?access_token="+alice.token, nil)
	guest.fails(401, "M_MISSING_TOKEN", "GET", "v3/account/whoami", nil)
	guest.fails(401, "M_UNKNOWN_TOKEN", "GET", "v3/account/whoami?access_token=x", nil)

	guest.must("POST", "v3/register", answer{"username": "carol", "password": "secret", "auth": answer{"type": "m.login.dummy"}})
	require.Equal(t, "m.login.password", guest.must("GET", "v3/login", nil).at("flows", 0, "type"))
	login := answer{"type": "m.login.password", "identifier": answer{"type": "m.id.user", "user": "carol"}, "password": "secret"}
	got := guest.must("POST", "v3/login", login)
	guest.token = got["access_token"].(string)
	guest.must("GET", "v3/account/whoami", nil)
	guest.must("POST", "v3/logout", nil)
	guest.fails(401, "M_UNKNOWN_TOKEN", "GET", "v3/account/whoami", nil)
	login["password"] = "wrong"
	guest.fails(403, "M_FORBIDDEN", "POST", "v3/login", login)
	login["identifier"] = answer{"type": "m.id.user", "user": "@alice:a.example"}
	login["password"] = ""
	guest.fails(403, "M_FORBIDDEN", "POST", "v3/login", login)
	login["type"] = "m.login.sso"
	guest.fails(400, "M_UNKNOWN", "POST", "v3/login", login)
}

func TestCapabilities(t *testing.T) {
	alice, _ := oneServer(t)
	require.Contains(t, alice.must("GET", "versions", nil)["versions"], "v1.19")
	got := alice.must("GET", "v3/capabilities", nil)
	require.Equal(t, string(defaultVersion), got.at("capabilities", "m.room_versions", "default"))
	available := got.at("capabilities", "m.room_versions", "available").(map[string]any)
	require.Len(t, available, 12)
	for version := range available {
		room := alice.create(answer{"room_version": version})
		created := find(t, alice.must("GET", in3(room, "state"), nil)[""], "m.room.create", "")
		require.Equal(t, version, created.at("content", "room_version"))
		require.Equal(t, room, created["room_id"])
	}
	alice.fails(400, "M_UNSUPPORTED_ROOM_VERSION", "POST", "v3/createRoom", answer{"room_version": "13"})
}

func TestProfile(t *testing.T) {
	alice, bob := twoServers(t)
	room := alice.create(nil)
	alice.must("PUT", "v3/profile/@alice:a.example/displayname", answer{"displayname": "Alice"})
	alice.must("PUT", "v3/profile/@alice:a.example/avatar_url", answer{"avatar_url": "mxc://a.example/x"})
	for _, p := range []*phone{alice, bob} {
		require.Equal(t, answer{"displayname": "Alice", "avatar_url": "mxc://a.example/x"}, p.must("GET", "v3/profile/@alice:a.example", nil))
		require.Equal(t, answer{"displayname": "Alice"}, p.must("GET", "v3/profile/@alice:a.example/displayname", nil))
		p.fails(404, "M_NOT_FOUND", "GET", "v3/profile/@nobody:a.example", nil)
	}
	require.Equal(t, "Alice", alice.must("GET", in3(room, "state/m.room.member/@alice:a.example"), nil)["displayname"])
	bob.fails(403, "M_FORBIDDEN", "PUT", "v3/profile/@alice:a.example/displayname", answer{"displayname": "x"})
	bob.fails(403, "M_FORBIDDEN", "PUT", "v3/profile/@bob:b.example/tz", answer{"tz": "x"})
	alice.must("PUT", "v3/profile/@alice:a.example/displayname", answer{"displayname": nil})
	alice.fails(404, "M_NOT_FOUND", "GET", "v3/profile/@alice:a.example/displayname", nil)
}

func TestCreateRoom(t *testing.T) {
	alice, bob := oneServer(t)
	for name, c := range map[string]struct {
		ask  answer
		want map[string]any // content by type
	}{
		"nothing":     {nil, map[string]any{"m.room.join_rules": answer{"join_rule": "invite"}, "m.room.history_visibility": answer{"history_visibility": "shared"}}},
		"public":      {answer{"preset": "public_chat"}, map[string]any{"m.room.join_rules": answer{"join_rule": "public"}}},
		"visible":     {answer{"visibility": "public"}, map[string]any{"m.room.join_rules": answer{"join_rule": "public"}}},
		"named":       {answer{"name": "N", "topic": "T"}, map[string]any{"m.room.name": answer{"name": "N"}, "m.room.topic": answer{"topic": "T"}}},
		"alias":       {answer{"room_alias_name": "x"}, map[string]any{"m.room.canonical_alias": answer{"alias": "#x:a.example"}}},
		"state":       {answer{"initial_state": []answer{{"type": "m.room.join_rules", "content": answer{"join_rule": "knock"}}}}, map[string]any{"m.room.join_rules": answer{"join_rule": "knock"}}},
		"content":     {answer{"room_version": "11", "creation_content": answer{"m.federate": false}}, map[string]any{"m.room.create": answer{"room_version": "11", "m.federate": false}}},
		"old creator": {answer{"room_version": "6"}, map[string]any{"m.room.create": answer{"room_version": "6", "creator": "@alice:a.example"}}},
	} {
		t.Run(name, func(t *testing.T) {
			state := alice.must("GET", in3(alice.create(c.ask), "state"), nil)[""]
			for typ, content := range c.want {
				require.EqualValues(t, content, find(t, state, typ, "")["content"])
			}
			require.Equal(t, "join", find(t, state, "m.room.member", "@alice:a.example").at("content", "membership"))
		})
	}
	room := alice.create(answer{"invite": []string{"@bob:a.example"}, "is_direct": true, "preset": "trusted_private_chat", "room_version": "10"})
	invited := find(t, bob.sync("").at("rooms", "invite", room, "invite_state", "events"), "m.room.member", "@bob:a.example")
	require.Equal(t, true, invited.at("content", "is_direct"))
	require.EqualValues(t, 100, alice.must("GET", in3(room, "state/m.room.power_levels"), nil).at("users", "@bob:a.example"))
	alice.fails(400, "M_ROOM_IN_USE", "POST", "v3/createRoom", answer{"room_alias_name": "x"})
}

func TestState(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(answer{"preset": "public_chat"})
	id := alice.must("PUT", in3(room, "state/m.room.topic"), answer{"topic": "T"})["event_id"]
	require.Equal(t, answer{"topic": "T"}, alice.must("GET", in3(room, "state/m.room.topic"), nil))
	require.Equal(t, answer{"topic": "T"}, alice.must("GET", in3(room, "state/m.room.topic/"), nil))
	whole := alice.must("GET", in3(room, "state/m.room.topic?format=event"), nil)
	require.Equal(t, id, whole["event_id"])
	require.Equal(t, room, whole["room_id"])
	key := "a/b:%é"
	alice.must("PUT", in3(room, "state/x.y/"+url.PathEscape(key)), answer{"n": 1})
	require.EqualValues(t, 1, alice.must("GET", in3(room, "state/x.y/"+url.PathEscape(key)), nil)["n"])
	require.EqualValues(t, 1, find(t, alice.must("GET", in3(room, "state"), nil)[""], "x.y", key).at("content", "n"))

	alice.fails(404, "M_NOT_FOUND", "GET", in3(room, "state/x.y/z"), nil)
	bob.fails(403, "M_FORBIDDEN", "GET", in3(room, "state"), nil)
	bob.fails(403, "M_FORBIDDEN", "GET", in3(room, "state/m.room.topic"), nil)
	bob.fails(403, "M_FORBIDDEN", "PUT", in3(room, "state/m.room.topic"), answer{"topic": "mine"})
	bob.must("POST", "v3/join/"+url.PathEscape(room), nil)
	bob.fails(403, "M_FORBIDDEN", "PUT", in3(room, "state/m.room.topic"), answer{"topic": "mine"})
	alice.fails(400, "M_BAD_JSON", "PUT", in3(room, "state/x.y"), `{"n":1.5}`)
	alice.fails(413, "M_TOO_LARGE", "PUT", in3(room, "state/x.y"), answer{"n": strings.Repeat("x", 70000)})
}

// TestMemberEvents changes memberships by setting state.
func TestMemberEvents(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(nil)
	path := in3(room, "state/m.room.member/@bob:a.example")
	set := func(p *phone, membership string) {
		t.Helper()
		id := p.must("PUT", path, answer{"membership": membership, "reason": "so"})["event_id"]
		state := alice.must("GET", in3(room, "state"), nil)[""]
		require.Equal(t, id, find(t, state, "m.room.member", "@bob:a.example")["event_id"])
		require.Equal(t, answer{"membership": membership, "reason": "so"}, alice.must("GET", path, nil))
	}
	bob.fails(403, "M_FORBIDDEN", "PUT", path, answer{"membership": "join"})
	set(alice, "invite")
	set(bob, "join")
	bob.must("PUT", path, answer{"membership": "join", "displayname": "Bobby"})
	require.Equal(t, "Bobby", alice.must("GET", path, nil)["displayname"])
	set(bob, "leave")
	set(alice, "ban")
	set(alice, "leave")
	alice.fails(400, "M_BAD_JSON", "PUT", path, answer{"membership": 1})
}

func TestSend(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", in3(room, "join"), nil)
	id := alice.say(room, "1", "hello")
	require.Equal(t, id, alice.say(room, "1", "hello"), "the same transaction")
	require.NotEqual(t, id, alice.say(room, "2", "hello"))
	require.NotEqual(t, id, bob.say(room, "1", "hello"), "another device")
	event := in3(room, "event/"+url.PathEscape(id))
	require.Equal(t, "1", alice.must("GET", event, nil).at("unsigned", "transaction_id"))
	require.Nil(t, bob.must("GET", event, nil).at("unsigned", "transaction_id"))

	redaction := bob.must("PUT", in3(room, "redact/"+url.PathEscape(bob.say(room, "2", "oops"))+"/3"), answer{"reason": "typo"})
	shown := alice.must("GET", in3(room, "event/"+url.PathEscape(redaction["event_id"].(string))), nil)
	require.NotEmpty(t, shown["redacts"])
	require.Equal(t, "typo", shown.at("content", "reason"))
	alice.fails(400, "M_INVALID_PARAM", "PUT", in3(room, "send/m.room.redaction/9"), answer{})
	alice.fails(404, "M_NOT_FOUND", "GET", in3(room, "event/$x"), nil)
}

func TestAliases(t *testing.T) {
	alice, bob := twoServers(t)
	room := alice.create(answer{"preset": "public_chat"})
	path := "v3/directory/room/" + url.PathEscape("#x/y:a.example")
	alice.must("PUT", path, answer{"room_id": room})
	for _, p := range []*phone{alice, bob} {
		require.Equal(t, answer{"room_id": room, "servers": []any{"a.example"}}, p.must("GET", path, nil))
	}
	require.Equal(t, room, bob.must("POST", "v3/join/"+url.PathEscape("#x/y:a.example"), nil)["room_id"])
	alice.fails(409, "M_ROOM_IN_USE", "PUT", path, answer{"room_id": room})
	bob.fails(400, "M_INVALID_PARAM", "PUT", path, answer{"room_id": room})
	alice.must("DELETE", path, nil)
	for _, p := range []*phone{alice, bob} {
		p.fails(404, "M_NOT_FOUND", "GET", path, nil)
	}
	alice.fails(400, "M_INVALID_PARAM", "GET", "v3/directory/room/x", nil)
	alice.fails(400, "M_INVALID_PARAM", "POST", "v3/join/x", nil)
}

func TestModeration(t *testing.T) {
	alice, bob := twoServers(t)
	room := alice.create(answer{"preset": "public_chat"})
	about := answer{"user_id": "@bob:b.example", "reason": "so"}
	member := in3(room, "state/m.room.member/@bob:b.example")
	join := "v3/join/" + url.PathEscape(room) + "?via=a.example"
	alice.fails(403, "M_FORBIDDEN", "POST", in3(room, "kick"), about)
	bob.must("POST", join, nil)
	alice.must("POST", in3(room, "kick"), about)
	require.Equal(t, answer{"membership": "leave", "reason": "so"}, alice.must("GET", member, nil))
	bob.syncUntil("rooms", "leave", room)
	bob.must("POST", join, nil)
	bob.fails(403, "M_FORBIDDEN", "POST", in3(room, "ban"), answer{"user_id": "@alice:a.example"})
	alice.fails(403, "M_FORBIDDEN", "POST", in3(room, "unban"), about)
	alice.must("POST", in3(room, "ban"), about)
	bob.syncUntil("rooms", "leave", room)
	bob.fails(403, "M_FORBIDDEN", "POST", join, nil)
	alice.must("POST", in3(room, "unban"), about)
	bob.must("POST", join, nil)
	alice.fails(400, "M_MISSING_PARAM", "POST", in3(room, "kick"), answer{})
	alice.fails(400, "M_INVALID_PARAM", "POST", in3(room, "invite"), answer{"user_id": "bob"})
}

func TestLists(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(answer{"invite": []string{"@bob:a.example"}})
	require.Equal(t, []any{room}, alice.must("GET", "v3/joined_rooms", nil)["joined_rooms"])
	require.Equal(t, []any{}, bob.must("GET", "v3/joined_rooms", nil)["joined_rooms"])
	require.Len(t, alice.must("GET", in3(room, "members"), nil)["chunk"], 2)
	require.Len(t, alice.must("GET", in3(room, "members?membership=invite"), nil)["chunk"], 1)
	require.Len(t, alice.must("GET", in3(room, "members?not_membership=invite"), nil)["chunk"], 1)
	require.Len(t, alice.must("GET", in3(room, "joined_members"), nil)["joined"], 1)
	bob.fails(403, "M_FORBIDDEN", "GET", in3(room, "joined_members"), nil)
	bob.fails(403, "M_FORBIDDEN", "GET", in3(room, "messages?dir=b"), nil)
}

// TestUnreachable invites a user of a server that does not exist.
func TestUnreachable(t *testing.T) {
	alice, _ := oneServer(t)
	room := alice.create(nil)
	alice.fails(504, string(mxfed.ErrUnknown), "POST", in3(room, "invite"), answer{"user_id": "@x:nowhere.example"})
	alice.fails(504, string(mxfed.ErrUnknown), "POST", "v3/join/!x:nowhere.example", nil)
}
