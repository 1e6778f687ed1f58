package mxfed

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// What this server makes is an event like any other: it reads as what it was meant to be, its hash is right, and it has the
// members that its room version has. https://spec.matrix.org/v1.19/server-server-api/#pdus
func TestDraft_Finished(t *testing.T) {
	for _, v := range joinVersions {
		r := newJoinRoom(t, v, "public")
		d := r.draft(joinAlice, "m.room.name", "", `{"name":"tea"}`)
		e, err := d.build(r.rules)
		require.NoError(t, err)
		require.True(t, e.hashOK)
		require.Equal(t, []any{r.id, "m.room.name", "", true, joinAlice, d.depth, d.ts}, []any{e.room, e.typ, e.stateKey, e.isState, e.sender, e.depth, e.ts})
		want := []string{"auth_events", "content", "depth", "hashes", "origin_server_ts", "prev_events", "room_id", "sender", "signatures", "state_key", "type"}
		if v.rules().eventID == idGiven {
			want = append(want, "event_id")
			require.Equal(t, joinAlice.Server(), e.id.server())
		}
		if v != "11" && v != "12" {
			want = append(want, "origin")
		}
		var keys []string
		for k := range e.text.members() {
			keys = append(keys, k)
		}
		require.ElementsMatch(t, want, keys, v)
		again, err := d.build(r.rules)
		require.NoError(t, err)
		require.Equal(t, e.text, again.text, "the same event of the same material")
		d.content = `{"name":"coffee"}`
		other, err := d.build(r.rules)
		require.NoError(t, err)
		require.NotEqual(t, e.id, other.id)
		d.stateKey = nil
		message, err := d.build(r.rules)
		require.NoError(t, err)
		require.False(t, message.isState)
		require.Empty(t, message.text.get("state_key"))
	}
}

// draftTips are n events of different depths, in no order.
func draftTips(r *joinRoom, n int) (tips []*Event) {
	for i := range n {
		d := r.draft(joinAlice, "m.room.message", "", `{}`)
		d.stateKey, d.depth = nil, int64(100+i*7%n)
		tips = append(tips, r.sign(d))
	}
	return tips
}

// A new event stands behind all ends of the graph, or the 20 deepest, and is deeper than all of them.
// https://spec.matrix.org/v1.19/server-server-api/#pdus
func TestDraft_Place(t *testing.T) {
	for _, v := range joinVersions {
		r := newJoinRoom(t, v, "public")
		for _, n := range []int{1, 2, 20, 21, 50} {
			tips := draftTips(r, n)
			given := slices.Clone(tips)
			d := r.draft(joinAlice, "m.room.name", "", `{}`)
			require.NoError(t, d.place(r.rules, &Room{Latest: tips, State: r.state}))
			require.Equal(t, given, tips, "the host's list is left alone")
			e, err := d.build(r.rules)
			require.NoError(t, err)
			slices.SortStableFunc(tips, func(a, b *Event) int { return int(b.depth - a.depth) })
			require.Equal(t, joinIDs(tips[:min(n, 20)]), e.Prev())
			require.Equal(t, tips[0].depth+1, e.depth)
			for i, tip := range tips[:min(n, 20)] { // hashes where references have them
				require.Equal(t, tip.reference(), slices.Collect(e.text.get("prev_events").elements())[i])
			}
			require.NoError(t, checkAuthEvents(e, authEventsOf(r, e)))
			require.NoError(t, authorise(e, stateOf(authEventsOf(r, e), r.entry(typeCreate, "")), true))
		}
		d := r.draft(joinAlice, "m.room.name", "", `{}`)
		require.ErrorIs(t, d.place(r.rules, &Room{State: r.state}), errNoLatest)
	}
}

// authEventsOf looks up what an event names.
func authEventsOf(r *joinRoom, e *Event) (auth []*Event) {
	for _, id := range e.Auth() {
		auth = append(auth, findEvent(r.all, id))
	}
	return auth
}

// Depth has a limit, which differs from version to version. https://spec.matrix.org/v1.19/rooms/v6/
func TestDraft_Depth(t *testing.T) {
	for _, v := range joinVersions {
		r := newJoinRoom(t, v, "public")
		for _, depth := range []int64{r.rules.maxDepth - 1, r.rules.maxDepth} {
			d := r.draft(joinAlice, "m.room.message", "", `{}`)
			d.depth = depth
			tip := r.sign(d)
			require.NoError(t, d.place(r.rules, &Room{Latest: []*Event{draftTips(r, 1)[0], tip}, State: r.state}))
			require.Equal(t, r.rules.maxDepth, d.depth)
			_, err := d.build(r.rules)
			require.NoError(t, err)
		}
	}
}

// The auth events are the entries of the state that the room version selects, and no others.
// https://spec.matrix.org/v1.19/server-server-api/#auth-events-selection
func TestDraft_AuthEvents(t *testing.T) {
	create, levels, rules := StateKey{typeCreate, ""}, StateKey{typePowerLevels, ""}, StateKey{typeJoinRules, ""}
	member := func(user UserID) StateKey { return StateKey{typeMember, string(user)} }
	for _, v := range joinVersions {
		for name, c := range map[string]struct {
			sender             UserID
			typ, key, content  string
			want               []StateKey
			authoriser, create bool
		}{
			"name":                 {joinAlice, "m.room.name", "", `{}`, []StateKey{levels, member(joinAlice)}, false, true},
			"join":                 {joinUser, typeMember, string(joinUser), `{"membership":"join"}`, []StateKey{levels, member(joinUser), rules}, false, true},
			"join authorised":      {joinUser, typeMember, string(joinUser), `{"join_authorised_via_users_server":"@alice:r.example","membership":"join"}`, []StateKey{levels, member(joinUser), rules}, true, true},
			"invite":               {joinAlice, typeMember, string(joinUser), `{"membership":"invite"}`, []StateKey{levels, member(joinAlice), member(joinUser), rules}, false, true},
			"invite of a stranger": {joinAlice, typeMember, "@new:us.example", `{"membership":"invite"}`, []StateKey{levels, member(joinAlice), rules}, false, true},
			"leave":                {joinUser, typeMember, string(joinUser), `{"membership":"leave"}`, []StateKey{levels, member(joinUser)}, false, true},
			"kick":                 {joinAlice, typeMember, string(joinCarol), `{"membership":"leave"}`, []StateKey{levels, member(joinAlice), member(joinCarol)}, false, true},
			"create":               {joinAlice, typeCreate, "", `{}`, nil, false, false},
		} {
			r := newJoinRoom(t, v, "invite")
			d := r.draft(c.sender, c.typ, c.key, c.content)
			require.Subset(t, append(d.authKeys(), create), c.want, "what is asked of the host")
			if c.authoriser && r.rules.restricted {
				c.want = append(c.want, member(joinAlice))
			}
			if c.create && v != "12" {
				c.want = append(c.want, create)
			}
			var got []StateKey
			for _, ref := range slices.Collect(d.auth.elements()) {
				i := slices.IndexFunc(r.state, func(e *Event) bool { return e.reference() == ref })
				require.GreaterOrEqual(t, i, 0)
				got = append(got, StateKey{r.state[i].typ, r.state[i].stateKey})
			}
			require.ElementsMatch(t, c.want, got, "%s %s", v, name)
		}
	}
}

// What does not make an event is refused where it is made.
func TestDraft_Refused(t *testing.T) {
	for name, change := range map[string]func(d *draft){
		"too large":         func(d *draft) { d.content = value(`{"x":"` + strings.Repeat("x", maxEventSize) + `"}`) },
		"type too long":     func(d *draft) { d.typ = strings.Repeat("x", 256) },
		"key too long":      func(d *draft) { key := strings.Repeat("x", 256); d.stateKey = &key },
		"a strange room":    func(d *draft) { d.room = "room" },
		"negative depth":    func(d *draft) { d.depth = -1 },
		"content no object": func(d *draft) { d.content = "[]" },
	} {
		r := newJoinRoom(t, "10", "public")
		d := r.draft(joinAlice, "m.room.name", "", `{}`)
		change(d)
		_, err := d.build(r.rules)
		require.Error(t, err, name)
	}
}
