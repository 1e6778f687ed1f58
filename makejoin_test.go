package mxfed_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// srvTemplate decodes the answer of make_join, make_leave and make_knock.
func srvTemplate(t *testing.T, body []byte) (version mxfed.RoomVersion, event map[string]any) {
	var answer struct {
		Version mxfed.RoomVersion `json:"room_version"`
		Event   map[string]any
	}
	require.NoError(t, json.Unmarshal(body, &answer))
	return answer.Version, answer.Event
}

// A template says what only a server in the room knows, in the form of the room version, and nothing more.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_joinroomiduserid
func TestMakeJoin(t *testing.T) {
	for _, v := range srvVersions {
		t.Run("version "+string(v), func(t *testing.T) {
			s := newSrvSite(t)
			room := newSrvRoom(t, s, v, nil)
			s.reset()
			w := room.makeJoin(t, s.domain, "@alice:domain", "nonsense", string(v))
			room.requireTemplate(t, w, "join", mxfed.StateKey{Type: "m.room.power_levels"}, mxfed.StateKey{Type: "m.room.join_rules"})
			require.EqualValues(t, 1, s.asks.Load())
		})
	}
}

// requireTemplate demands the template of @alice:domain at the end of the room. It names as auth events these entries and,
// where the room version wants that, the create event.
func (r *srvRoom) requireTemplate(t *testing.T, w *httptest.ResponseRecorder, membership string, named ...mxfed.StateKey) {
	require.Equal(t, 200, w.Code, "%s", w.Body)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	require.Len(t, srvObject(t, w.Body.Bytes()), 2)
	version, event := srvTemplate(t, w.Body.Bytes())
	require.Equal(t, r.version, version)
	want := map[string]any{"type": "m.room.member", "room_id": string(r.id), "sender": "@alice:domain", "state_key": "@alice:domain",
		"content": map[string]any{"membership": membership}, "origin_server_ts": float64(srvNow.UnixMilli()), "depth": float64(r.depth + 1)}
	if r.version != "11" && r.version != "12" {
		want["origin"] = "us.example"
	}
	prev, auth := event["prev_events"], event["auth_events"]
	delete(event, "prev_events")
	delete(event, "auth_events")
	require.Equal(t, want, event)
	require.Equal(t, []mxfed.EventID{r.latest.ID()}, srvIDs(t, r.version, prev))
	if r.version != "12" {
		named = append(named, mxfed.StateKey{Type: "m.room.create"})
	}
	require.ElementsMatch(t, srvEventIDs(srvEntries(r.state, named)), srvIDs(t, r.version, auth))
}

// srvIDs are the IDs in a list of references, which must have the form of the room version.
func srvIDs(t *testing.T, v mxfed.RoomVersion, refs any) (ids []mxfed.EventID) {
	for _, ref := range refs.([]any) {
		if srvGivenIDs(v) {
			pair := ref.([]any)
			require.Len(t, pair, 2)
			require.Len(t, pair[1].(map[string]any)["sha256"], 43)
			ref = pair[0]
		}
		ids = append(ids, mxfed.EventID(ref.(string)))
	}
	return ids
}

func srvEventIDs(events []*mxfed.Event) (ids []mxfed.EventID) {
	for _, e := range events {
		ids = append(ids, e.ID())
	}
	return ids
}

// Whoever signs a template signs what this server wrote; this server has not signed it itself, whatever the room is like.
func TestTemplate_HasNoSignature(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		s.signing.made.Store(0)
		check := func(membership string, room *srvRoom) {
			w := room.make(t, s.domain, membership, "@alice:domain", string(v))
			require.Equal(t, 200, w.Code, "%s", w.Body)
			_, event := srvTemplate(t, w.Body.Bytes())
			for _, member := range []string{"signatures", "hashes", "event_id", "unsigned"} {
				require.NotContains(t, event, member)
			}
			require.Zero(t, s.signing.made.Load())
		}
		for _, membership := range srvMemberships(v) {
			check(membership, newSrvMemberRoom(t, s, v, membership))
		}
		if srvRestricted(v) {
			check("join", newSrvRestrictedRoom(t, s, v, "restricted", map[mxfed.RoomID]bool{"!in:us.example": true}))
		}
	}
}

// Heads of the room's graph are named up to a limit, the deepest first, and depth stays within what the version allows.
func TestMakeJoin_PlaceInTheGraph(t *testing.T) {
	for v, deepest := range map[mxfed.RoomVersion]json.Number{"1": "9223372036854775807", "10": "9007199254740991"} {
		s := newSrvSite(t)
		room := newSrvRoom(t, s, v, nil)
		var heads []*mxfed.Event
		for i := range 30 {
			depth := json.Number([]byte{'0' + byte(i/10), '0' + byte(i%10)})
			if i < 10 {
				depth = depth[1:]
			}
			p := room.pdu(room.admin, "m.room.topic", "", map[string]any{"n": i}).with("depth", depth)
			if srvGivenIDs(v) {
				p = p.with("event_id", "$"+depth.String()+":us.example")
			}
			heads = append(heads, srvEvent(t, v, p.sign(t, v, s.own)))
		}
		room.edit = func(r *mxfed.Room) { r.Latest = heads }
		w := room.makeJoin(t, s.domain, "@alice:domain", string(v))
		_, event := srvTemplate(t, w.Body.Bytes())
		require.EqualValues(t, 30, event["depth"])
		require.ElementsMatch(t, srvEventIDs(heads[10:]), srvIDs(t, v, event["prev_events"]))

		p := room.pdu(room.admin, "m.room.topic", "", map[string]any{}).with("depth", deepest)
		room.edit = func(r *mxfed.Room) { r.Latest = []*mxfed.Event{srvEvent(t, v, p.sign(t, v, s.own))} }
		w = room.makeJoin(t, s.domain, "@alice:domain", string(v))
		require.Contains(t, w.Body.String(), `"depth":`+deepest.String()+",")
		room.edit = func(r *mxfed.Room) { r.Latest = nil }
		requireSrvError(t, room.makeJoin(t, s.domain, "@alice:domain", string(v)), 500, mxfed.ErrUnknown)
	}
}

// The first of several defects decides, in this order: the path, the caller, the room, its ACL, the versions offered, the
// conditions of a restricted room, the authorisation rules.
func TestMakeJoin_Order(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRestrictedRoom(t, s, "10", "restricted", nil)
	room.set(t, s.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "ban"})
	room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"elsewhere"}})
	refused := func(user string, status int, code mxfed.ErrorCode, ver ...string) map[string]any {
		t.Helper()
		s.reset()
		return s.requireRefused(t, room.makeJoin(t, s.domain, user, ver...), status, code)
	}
	delete(s.rooms, room.id)
	refused("alice", 400, mxfed.ErrInvalidParam)
	require.Zero(t, s.asks.Load())
	refused("@alice:third.example", 403, mxfed.ErrForbidden)
	require.Zero(t, s.asks.Load())
	refused("@alice:domain", 404, mxfed.ErrNotFound)
	s.rooms[room.id] = room
	refused("@alice:domain", 403, mxfed.ErrForbidden)
	room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"*"}})
	require.Equal(t, "10", refused("@alice:domain", 400, mxfed.ErrIncompatibleRoomVersion)["room_version"])
	require.EqualValues(t, 1, s.asks.Load())
	refused("@alice:domain", 400, mxfed.ErrUnableToAuthoriseJoin, "10")
	require.EqualValues(t, 2, s.asks.Load())
	room.joined = map[mxfed.RoomID]bool{"!in:us.example": true}
	refused("@alice:domain", 403, mxfed.ErrForbidden, "10")
	require.EqualValues(t, 2, s.asks.Load())
	room.set(t, s.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "leave"})
	require.Equal(t, 200, room.makeJoin(t, s.domain, "@alice:domain", "10").Code)
}

// The caller must support the room's version; one that names none supports version 1.
func TestMakeJoin_Versions(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		room := newSrvRoom(t, s, v, nil)
		for name, c := range map[string]struct {
			ver []string
			ok  bool
		}{
			"none":          {nil, v == "1"},
			"it":            {[]string{string(v)}, true},
			"all":           {[]string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"}, true},
			"others":        {[]string{"org.example", "99"}, false},
			"like it":       {[]string{string(v) + ".0", "0" + string(v), string(v) + " "}, false},
			"a list in one": {[]string{string(v) + "," + string(v)}, false},
			"empty":         {[]string{""}, false},
		} {
			s.reset()
			w := room.makeJoin(t, s.domain, "@alice:domain", c.ver...)
			if c.ok {
				require.Equal(t, 200, w.Code, "%s: %s", name, w.Body)
			} else {
				body := s.requireRefused(t, w, 400, mxfed.ErrIncompatibleRoomVersion)
				require.EqualValues(t, v, body["room_version"])
			}
		}
		s.reset()
		broken := srvURI("v1/make_join", string(room.id), "@alice:domain") + "?ver=%zz"
		s.requireRefused(t, s.send(t, s.domain, http.MethodGet, broken, nil), 400, mxfed.ErrInvalidParam)
	}
}

// srvRoomEvent is one more state event of a room, by its admin unless it is said.
type srvRoomEvent struct {
	typ, key string
	content  map[string]any
	sender   string
}

// Who may not join gets no template. https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func TestMakeJoin_NotAllowed(t *testing.T) {
	member := func(membership string) srvRoomEvent {
		return srvRoomEvent{typ: "m.room.member", key: "@alice:domain", content: map[string]any{"membership": membership}}
	}
	rule := func(rule any) srvRoomEvent {
		return srvRoomEvent{typ: "m.room.join_rules", content: map[string]any{"join_rule": rule}}
	}
	for name, c := range map[string]struct {
		events []srvRoomEvent
		ok     bool
	}{
		"public":                    {nil, true},
		"banned":                    {[]srvRoomEvent{member("ban")}, false},
		"kicked":                    {[]srvRoomEvent{member("leave")}, true},
		"invite only":               {[]srvRoomEvent{rule("invite")}, false},
		"invited":                   {[]srvRoomEvent{rule("invite"), member("invite")}, true},
		"invited and banned later":  {[]srvRoomEvent{rule("invite"), member("invite"), member("ban")}, false},
		"joined already":            {[]srvRoomEvent{rule("invite"), member("invite"), {typ: "m.room.member", key: "@alice:domain", sender: "@alice:domain", content: map[string]any{"membership": "join"}}}, true},
		"knock":                     {[]srvRoomEvent{rule("knock")}, false},
		"private":                   {[]srvRoomEvent{member("invite"), rule("private")}, false},
		"unknown rule":              {[]srvRoomEvent{member("invite"), rule("org.example")}, false},
		"rule is no string":         {[]srvRoomEvent{rule([]string{"public"})}, false},
		"no rule":                   {[]srvRoomEvent{{typ: "m.room.join_rules", content: map[string]any{}}}, false},
		"restricted, no conditions": {[]srvRoomEvent{rule("restricted")}, false},
	} {
		for _, v := range []mxfed.RoomVersion{"1", "7", "10", "12"} {
			t.Run(name+", version "+string(v), func(t *testing.T) {
				s := newSrvSite(t)
				room := newSrvRoom(t, s, v, nil)
				for _, e := range c.events {
					by, sender := s.own, room.admin
					if e.sender != "" {
						by, sender = s.domain, e.sender
					}
					room.set(t, by, sender, e.typ, e.key, e.content)
				}
				s.reset()
				w := room.makeJoin(t, s.domain, "@alice:domain", string(v))
				if c.ok {
					require.Equal(t, 200, w.Code, "%s", w.Body)
				} else {
					s.requireRefused(t, w, 403, mxfed.ErrForbidden)
				}
			})
		}
	}
}

// A room that is closed to other servers stays so. https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func TestMake_NotFederated(t *testing.T) {
	for _, v := range srvVersions {
		for _, membership := range srvMemberships(v) {
			testSrvNotFederated(t, v, membership)
		}
	}
}

func testSrvNotFederated(t *testing.T, v mxfed.RoomVersion, membership string) {
	for federate, open := range map[any]bool{false: false, true: true, "false": true, 0: true} {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, v, membership)
		closed := room.pdu(room.admin, "m.room.create", "", map[string]any{"room_version": v, "creator": room.admin, "m.federate": federate})
		if v == "12" {
			closed = closed.with("room_id", nil)
		}
		create := srvEvent(t, v, closed.with("prev_events", []any{}).sign(t, v, s.own))
		room.id = create.RoomID()
		s.rooms[room.id] = room
		room.edit = func(r *mxfed.Room) {
			i := slices.IndexFunc(r.State, func(e *mxfed.Event) bool { return e.Type() == "m.room.create" })
			r.State[i] = create
		}
		s.reset()
		if w := room.make(t, s.domain, membership, "@alice:domain", string(v)); open {
			require.Equal(t, 200, w.Code, "%s: %s", v, w.Body)
		} else {
			s.requireRefused(t, w, 403, mxfed.ErrForbidden)
		}
	}
}

// A fact that the host leaves out lets nobody in.
func TestMakeJoin_FactsMissing(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	for _, typ := range []string{"m.room.create", "m.room.join_rules"} {
		room.edit = func(r *mxfed.Room) {
			r.State = slices.DeleteFunc(r.State, func(e *mxfed.Event) bool { return e.Type() == typ })
		}
		s.requireRefused(t, room.makeJoin(t, s.domain, "@alice:domain", "10"), 403, mxfed.ErrForbidden)
	}
	room.edit = func(r *mxfed.Room) { r.Version = "" }
	s.requireRefused(t, room.makeJoin(t, s.domain, "@alice:domain", "10"), 400, mxfed.ErrIncompatibleRoomVersion)
}

// newSrvRestrictedRoom is a room that members of !in:us.example may join; joined is what is known about its members.
func newSrvRestrictedRoom(t testing.TB, s *srvSite, v mxfed.RoomVersion, rule string, joined map[mxfed.RoomID]bool, more ...any) *srvRoom {
	allow := append([]any{map[string]any{"type": "m.room_membership", "room_id": "!in:us.example"}}, more...)
	room := newSrvRoom(t, s, v, map[string]any{"join_rule": rule, "allow": allow})
	room.joined = joined
	return room
}

// srvCondition is what a restricted room demands and what is known, and what becomes of a join.
type srvCondition struct {
	more   []any // in allow, after the membership of !in:us.example
	only   any   // instead of the whole of allow, if set
	joined map[mxfed.RoomID]bool
	local  string // whom the host names: "" the admin; of "-", nobody, and others the admin has left
	level  int    // that it takes to invite, 0: 50
	mod    bool   // @mod:us.example, of power 50, is in the room
	by     string // who authorises the join: "" the admin
	status int
	code   mxfed.ErrorCode
}

func srvConditions() map[string]srvCondition {
	in := func(room any) map[string]any { return map[string]any{"type": "m.room_membership", "room_id": room} }
	met, failed := map[mxfed.RoomID]bool{"!in:us.example": true}, map[mxfed.RoomID]bool{"!in:us.example": false}
	other := func(joined map[mxfed.RoomID]bool, is bool) map[mxfed.RoomID]bool {
		joined = maps.Clone(joined)
		joined["!other:domain"] = is
		return joined
	}
	malformed := []any{"!other:domain", nil, 1, []any{}, map[string]any{}, in(7), map[string]any{"type": "m.room_membership"},
		map[string]any{"type": "org.example", "room_id": "!other:domain"}, map[string]any{"Type": "m.room_membership", "room_id": "!other:domain"}}
	many := make([]any, 64)
	for i := range many {
		many[i] = in(fmt.Sprintf("!many%d:us.example", i))
	}
	known := map[mxfed.RoomID]bool{"!in:us.example": false}
	for i := range many {
		known[mxfed.RoomID(fmt.Sprintf("!many%d:us.example", i))] = i == 63
	}
	cannotTell, forbidden, cannotGrant := mxfed.ErrUnableToAuthoriseJoin, mxfed.ErrForbidden, mxfed.ErrUnableToGrantJoin
	return map[string]srvCondition{
		"met":                              {joined: met, status: 200},
		"met twice":                        {more: []any{in("!other:domain")}, joined: other(met, true), status: 200},
		"one met, one failed":              {more: []any{in("!other:domain")}, joined: other(met, false), status: 200},
		"one failed, one met":              {more: []any{in("!other:domain")}, joined: other(failed, true), status: 200},
		"one met, one cannot be checked":   {more: []any{in("!other:domain")}, joined: met, status: 200},
		"one cannot be checked, one met":   {more: []any{in("!other:domain")}, joined: other(map[mxfed.RoomID]bool{}, true), status: 200},
		"met among malformed ones":         {only: append(slices.Clone(malformed), in("!in:us.example")), joined: met, status: 200},
		"failed":                           {joined: failed, status: 403, code: forbidden},
		"all failed":                       {more: []any{in("!other:domain")}, joined: other(failed, false), status: 403, code: forbidden},
		"cannot be checked":                {status: 400, code: cannotTell},
		"one failed, one can't be checked": {more: []any{in("!other:domain")}, joined: failed, status: 400, code: cannotTell},
		"one can't be checked, one failed": {more: []any{in("!other:domain")}, joined: other(map[mxfed.RoomID]bool{}, false), status: 400, code: cannotTell},
		"malformed and failed":             {more: malformed, joined: failed, status: 403, code: forbidden},
		"malformed":                        {only: malformed, joined: other(met, true), status: 403, code: forbidden},
		"no list":                          {only: in("!in:us.example"), joined: met, status: 403, code: forbidden},
		"empty list":                       {only: []any{}, joined: met, status: 403, code: forbidden},
		"null":                             {only: json.RawMessage("null"), joined: met, status: 403, code: forbidden},
		"more than can be asked":           {more: many, joined: known, status: 400, code: cannotTell},
		"nobody of us may let others in":   {joined: met, local: "-", status: 400, code: cannotGrant},
		"only one of us without power":     {joined: met, local: "@bob:us.example", status: 400, code: cannotGrant},
		"only one who has left":            {joined: met, local: "@gone:us.example", status: 400, code: cannotGrant},
		"only one of another server":       {joined: met, local: "@mod:third.example", status: 400, code: cannotGrant},
		"failed, and nobody of us may":     {joined: failed, local: "-", status: 403, code: forbidden},
		"a moderator beside the admin":     {joined: met, mod: true, status: 200},
		"a moderator beside one without":   {joined: met, mod: true, local: "@bob:us.example", by: "@mod:us.example", status: 200},
		"a moderator without enough":       {joined: met, mod: true, level: 51, local: "@bob:us.example", status: 400, code: cannotGrant},
		"anybody of us may":                {joined: met, level: -1, local: "@bob:us.example", by: "@bob:us.example", status: 200},
	}
}

// room makes the room of c.
func (c *srvCondition) room(t *testing.T, s *srvSite, v mxfed.RoomVersion, rule string) *srvRoom {
	room := newSrvRestrictedRoom(t, s, v, rule, c.joined, c.more...)
	if c.only != nil {
		room.set(t, s.own, room.admin, "m.room.join_rules", "", map[string]any{"join_rule": rule, "allow": c.only})
	}
	member := func(by *srvPeer, user, membership string) *mxfed.Event {
		return room.set(t, by, room.admin, "m.room.member", user, map[string]any{"membership": membership})
	}
	locals := map[string]*mxfed.Event{"": room.local, "-": nil, "@bob:us.example": member(s.own, "@bob:us.example", "join"),
		"@gone:us.example": member(s.own, "@gone:us.example", "leave"), "@mod:third.example": member(s.third, "@mod:third.example", "join")}
	users := map[string]any{"@mod:third.example": 50, "@mod:us.example": 50}
	if v != "12" {
		users[room.admin] = 100
	}
	room.set(t, s.own, room.admin, "m.room.power_levels", "", map[string]any{"users": users, "invite": cmp.Or(c.level, 50)})
	if c.mod {
		locals["@mod:us.example"] = member(s.own, "@mod:us.example", "join")
	}
	if c.local != "" {
		room.set(t, s.own, room.admin, "m.room.member", room.admin, map[string]any{"membership": "leave"})
	}
	room.local = locals[c.local]
	return room
}

func forEachRestricted(t *testing.T, test func(t *testing.T, v mxfed.RoomVersion, rule string, c *srvCondition)) {
	for _, v := range []mxfed.RoomVersion{"8", "9", "10", "11", "12"} {
		for _, rule := range []string{"restricted", "knock_restricted"} {
			if rule == "knock_restricted" && (v == "8" || v == "9") {
				continue
			}
			for name, c := range srvConditions() {
				t.Run(name+", "+rule+", version "+string(v), func(t *testing.T) { test(t, v, rule, &c) })
			}
		}
	}
}

// Who meets one condition of a restricted room gets a template that names a local user who may let others in. What cannot
// be checked is not what has failed. https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func TestMakeJoin_Restricted(t *testing.T) {
	forEachRestricted(t, func(t *testing.T, v mxfed.RoomVersion, rule string, c *srvCondition) {
		s := newSrvSite(t)
		room := c.room(t, s, v, rule)
		s.reset()
		w := room.makeJoin(t, s.domain, "@alice:domain", string(v))
		require.LessOrEqual(t, s.asks.Load(), int64(2))
		if c.status != 200 {
			s.requireRefused(t, w, c.status, c.code)
			return
		}
		require.Equal(t, 200, w.Code, "%s", w.Body)
		_, event := srvTemplate(t, w.Body.Bytes())
		by := cmp.Or(c.by, room.admin)
		require.Equal(t, map[string]any{"membership": "join", "join_authorised_via_users_server": by}, event["content"])
		require.Contains(t, srvIDs(t, v, event["auth_events"]), room.state[mxfed.StateKey{Type: "m.room.member", Key: by}].ID())
	})
}

// A local user's own join needs the same, and is refused for the same reasons.
func TestBuild_RestrictedJoin(t *testing.T) {
	forEachRestricted(t, func(t *testing.T, v mxfed.RoomVersion, rule string, c *srvCondition) {
		s := newSrvSite(t)
		room := c.room(t, s, v, rule)
		user := "@carol:us.example"
		s.reset()
		draft := &mxfed.Draft{Room: room.id, Type: "m.room.member", StateKey: &user, Sender: mxfed.UserID(user), Content: json.RawMessage(`{"membership":"join"}`)}
		e, err := s.server.Build(t.Context(), draft)
		if c.status != 200 {
			require.ErrorIs(t, err, c.code)
			require.Zero(t, s.signing.made.Load())
			return
		}
		require.NoError(t, err)
		by := cmp.Or(c.by, room.admin)
		require.Equal(t, map[string]any{"membership": "join", "join_authorised_via_users_server": by}, srvObject(t, e.Content()))
		require.Contains(t, e.Auth(), room.state[mxfed.StateKey{Type: "m.room.member", Key: by}].ID())
		require.NoError(t, s.server.Verify(t.Context(), e)[0])
		require.NoError(t, e.Check(room.facts(e.Query())))

		draft.Content = json.RawMessage(`{"membership":"join","join_authorised_via_users_server":"@nobody:us.example"}`)
		_, err = s.server.Build(t.Context(), draft)
		require.ErrorIs(t, err, mxfed.ErrForbidden)

		room.set(t, s.own, room.admin, "m.room.member", user, map[string]any{"membership": "invite"})
		draft.Content = json.RawMessage(`{"membership":"join"}`)
		e, err = s.server.Build(t.Context(), draft)
		if c.local == "" { // the admin, who invites, is there
			require.NoError(t, err)
			require.JSONEq(t, string(draft.Content), string(e.Content()))
		}
	})
}

// Who is invited or in the room needs no condition, and nobody's authorisation.
func TestMakeJoin_RestrictedButInvited(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"8", "10", "12"} {
		s := newSrvSite(t)
		room := newSrvRestrictedRoom(t, s, v, "restricted", nil)
		invite := room.set(t, s.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "invite"})
		require.Equal(t, "invite", srvObject(t, invite.Content())["membership"])
		for _, membership := range []string{"invite", "join"} {
			if membership == "join" {
				room.set(t, s.domain, "@alice:domain", "m.room.member", "@alice:domain", map[string]any{"membership": "join"})
			}
			s.reset()
			w := room.makeJoin(t, s.domain, "@alice:domain", string(v))
			require.Equal(t, 200, w.Code, "%s", w.Body)
			_, event := srvTemplate(t, w.Body.Bytes())
			require.Equal(t, map[string]any{"membership": "join"}, event["content"])
			require.EqualValues(t, 1, s.asks.Load())
		}
	}
}

// Before they were invented, these join rules let nobody in.
func TestMakeJoin_RestrictedUnknown(t *testing.T) {
	for _, v := range srvVersions {
		for _, rule := range []string{"restricted", "knock_restricted"} {
			if srvRestricted(v) && (rule == "restricted" || v != "8" && v != "9") {
				continue
			}
			s := newSrvSite(t)
			room := newSrvRestrictedRoom(t, s, v, rule, map[mxfed.RoomID]bool{"!in:us.example": true})
			s.reset()
			s.requireRefused(t, room.makeJoin(t, s.domain, "@alice:domain", string(v)), 403, mxfed.ErrForbidden)
			require.EqualValues(t, 1, s.asks.Load(), "nobody is asked for conditions")
			room.set(t, s.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "invite"})
			s.reset()
			s.requireRefused(t, room.makeJoin(t, s.domain, "@alice:domain", string(v)), 403, mxfed.ErrForbidden)
		}
	}
}
