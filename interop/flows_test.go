//go:build unix

package interop

import (
	"net/http"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// world is a room's server, and the server of a user who wants to get in.
type world struct {
	*testing.T
	peer       *peer // that one of the servers is, and the other is mxfed
	version    mxfed.RoomVersion
	here       *server
	there      *server
	alice, bob *phone // alice is here, bob is there
	users      string // what makes the names of this world's users their own
}

// newUser registers one more user.
func (w *world) newUser(on *server, name string) *phone {
	w.Helper()
	return newPhone(w.T, on, name+w.users)
}

// flow is something that users do.
type flow struct {
	name        string
	since       int     // first room version in which they can
	here, there feature // that a peer must have which is alice's server, or bob's
	run         func(w *world)
}

// flows are in the order of the report.
var flows = []flow{
	{"invite, join", 1, "", "", inviteJoin},
	{"invite, reject", 1, "", "", inviteReject},
	{"uninvited join", 1, "", "", uninvitedJoin},
	{"join by alias", 1, "", "", joinByAlias},
	{"restricted join", 8, "", "", restrictedJoin},              // https://spec.matrix.org/v1.19/rooms/v8/
	{"knock_restricted join", 10, "", "", knockRestrictedJoin},  // https://spec.matrix.org/v1.19/rooms/v10/
	{"knock, invite, join", 7, servesKnocks, knocks, knockJoin}, // https://spec.matrix.org/v1.19/rooms/v7/
	{"knock, reject", 7, servesKnocks, knocks, knockReject},
	{"knock, retract", 7, servesKnocks, retracts, knockRetract},
	{"uninvited knock", 7, servesKnocks, knocks, uninvitedKnock},
	{"knock_restricted knock", 10, servesKnocks, knocks, knockRestrictedKnock},
	{"leave", 1, "", "", leave},
	{"re-invite", 1, "", "", reinvite},
	{"ban", 1, "", "", ban},
}

// TestFlows plays all flows between mxfed and each peer, in both directions and every room version.
func TestFlows(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			servers := p.meet(t)
			for v := 1; v <= 12; v++ {
				t.Run("v"+strconv.Itoa(v), func(t *testing.T) {
					theirs, ours := servers(t)
					playAll(t, p, v, theirs, ours)
				})
			}
		})
	}
}

// playAll plays all flows in one room version, with the same users: to register takes about as long as a flow.
func playAll(t *testing.T, p *peer, v int, theirs, ours *server) {
	version, users := mxfed.RoomVersion(strconv.Itoa(v)), ".v"+strconv.Itoa(v)
	play := func(direction string, here, there *server, needs func(flow) feature) {
		alice, bob := newPhone(t, here, "alice"+users), newPhone(t, there, "bob"+users)
		for i, flow := range flows {
			if v < flow.since || slices.Contains(p.lacks, needs(flow)) {
				continue
			}
			t.Run(flow.name+"/"+direction, func(t *testing.T) {
				results.add(t, p.String(), flow.name, direction, version)
				for _, s := range []*server{here, there} {
					s.tape.mark(version, flow.name+", "+direction)
				}
				alice.T, bob.T = t, t
				flow.run(&world{T: t, peer: p, version: version, here: here, there: there, alice: alice, bob: bob, users: users + "." + strconv.Itoa(i)})
			})
		}
	}
	play(ourUser, theirs, ours, func(f flow) feature { return f.here })
	play(theirUser, ours, theirs, func(f flow) feature { return f.there })
}

// Directions of flows: on whose side alice is, and bob.
const (
	ourUser   = "our user, their room"
	theirUser = "their user, our room"
)

// TestNotOffered has flows that a peer cannot play. If it learns them, that is to be said in peers.
func TestNotOffered(t *testing.T) {
	t.Parallel()
	play := func(p *peer, direction string, run func(w *world)) {
		require.True(t, slices.Contains(peers, p))
		t.Run(p.name+"/"+direction, func(t *testing.T) {
			at := newSite(t)
			w := &world{T: t, peer: p, version: "10", here: startHomeserver(t, at), there: p.start(t, at)}
			if direction == ourUser {
				w.here, w.there = w.there, w.here
			}
			w.alice, w.bob = w.newUser(w.here, "alice"), w.newUser(w.there, "bob")
			run(w)
		})
	}
	play(dendrite, ourUser, func(w *world) { // that it has no such endpoints is no fault of our client's
		room := w.alice.create(w.version, ruled("knock"))
		w.bob.fails(http.StatusBadGateway, "M_UNKNOWN", "POST", knocking(room, w.here), object{})
	})
	play(dendrite, theirUser, func(w *world) {
		room := w.alice.create(w.version, ruled("knock"))
		w.bob.fails(http.StatusNotFound, "M_UNRECOGNIZED", "POST", knocking(room, w.here), object{})
	})
	play(synapse, theirUser, func(w *world) { // the room is not told, where he goes on knocking
		room := w.alice.create(w.version, ruled("knock"))
		w.knock(room)
		w.bob.must("POST", in(room, "leave"), object{})
		w.alice.hear(w.alice.say(room, "still there"), "still there")
		w.alice.see(room, w.bob, "knock")
	})
}

// inviteJoin invites bob, who sees what the room is, joins and talks with alice.
func inviteJoin(w *world) {
	room := w.alice.create(w.version, nil)
	w.invite(room)
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
}

// invite invites bob, and waits until he is shown what he needs to know.
func (w *world) invite(room mxfed.RoomID) {
	w.Helper()
	w.alice.must("POST", in(room, "invite"), about(w.bob))
	w.bob.await(func() bool { return w.bob.invites[room] != nil })
	shown := stateOf(w.bob.invites[room])
	member := shown["m.room.member "+string(w.bob.user)]
	require.Equal(w, "invite", member.Content.Membership)
	require.Equal(w, w.alice.user, member.Sender)
	require.Contains(w, shown, "m.room.join_rules ")
}

// stateOf sorts events by type and state key.
func stateOf(events []event) map[string]event {
	state := make(map[string]event)
	for _, e := range events {
		if e.StateKey != nil {
			state[e.Type+" "+*e.StateKey] = e
		}
	}
	return state
}

// talk lets alice and bob, who has just joined, see and hear each other.
func (w *world) talk(room mxfed.RoomID) {
	w.Helper()
	w.alice.see(room, w.bob, "join")
	w.bob.see(room, w.bob, "join")
	w.bob.see(room, w.alice, "join")
	w.bob.hear(w.alice.say(room, "here"), "here")
	w.alice.hear(w.bob.say(room, "there"), "there")
}

// inviteReject invites bob, who does not want to come, and after that cannot any more.
func inviteReject(w *world) {
	room := w.alice.create(w.version, nil)
	w.invite(room)
	w.bob.must("POST", in(room, "leave"), object{})
	require.Equal(w, w.bob.user, w.alice.see(room, w.bob, "leave").Sender)
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
}

// uninvitedJoin keeps bob out of a room that he was not invited to.
func uninvitedJoin(w *world) {
	room := w.alice.create(w.version, nil)
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.alice.hear(w.alice.say(room, "alone"), "alone") // all that came before is known now
	require.NotContains(w, w.alice.members, place{room, w.bob.user})
}

// joinByAlias gives bob nothing but the name of a public room.
func joinByAlias(w *world) {
	room, alias := w.public()
	got := w.bob.must("POST", "join/"+alias, nil)
	require.Equal(w, room, got.Room)
	w.talk(room)
}

// public makes a room for everybody.
func (w *world) public() (room mxfed.RoomID, alias string) {
	w.Helper()
	local := "room" + w.users
	room = w.alice.create(w.version, object{"preset": "public_chat", "room_alias_name": local})
	return room, "%23" + local + ":" + string(w.here.name)
}

// restrictedJoin lets bob in as soon as he is in another room, on alice's authority.
func restrictedJoin(w *world) { w.throughClub("restricted") }

// knockRestrictedJoin does the same where bob could knock as well.
func knockRestrictedJoin(w *world) { w.throughClub("knock_restricted") }

func (w *world) throughClub(rule string) {
	w.Helper()
	club, room := w.club(rule)
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.bob.must("POST", joining(string(club), w.here), nil)
	w.alice.see(club, w.bob, "join")
	w.bob.must("POST", joining(string(room), w.here), nil)
	require.Equal(w, w.alice.user, w.alice.see(room, w.bob, "join").Content.Authoriser)
	w.talk(room)
}

// club makes a public room, and a room that its members may join.
func (w *world) club(rule string) (club, room mxfed.RoomID) {
	w.Helper()
	club = w.alice.create(w.version, object{"preset": "public_chat"})
	return club, w.alice.create(w.version, ruled(rule, object{"type": "m.room_membership", "room_id": club}))
}

// ruled is for a room that is joined by this rule.
func ruled(rule string, allow ...object) object {
	content := object{"join_rule": rule}
	if allow != nil {
		content["allow"] = allow
	}
	return object{"initial_state": []object{{"type": "m.room.join_rules", "state_key": "", "content": content}}}
}

// knockJoin lets bob ask to be invited. What he is shown of the room meanwhile says how it can be joined.
func knockJoin(w *world) {
	room := w.alice.create(w.version, ruled("knock"))
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.knock(room)
	w.invite(room)
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
}

// knock lets bob knock, and waits until both have seen that he has.
func (w *world) knock(room mxfed.RoomID) {
	w.Helper()
	delete(w.bob.knocks, room)
	w.bob.must("POST", knocking(room, w.here), object{"reason": "let me in"})
	w.bob.await(func() bool { return w.bob.knocks[room] != nil })
	shown := stateOf(w.bob.knocks[room])
	require.Equal(w, "knock", shown["m.room.member "+string(w.bob.user)].Content.Membership)
	require.Contains(w, shown, "m.room.join_rules ")
	require.Equal(w, "let me in", w.alice.see(room, w.bob, "knock").Content.Reason)
}

// knockReject sends bob away. Whether he is told is up to the servers; he may knock again.
func knockReject(w *world) {
	room := w.alice.create(w.version, ruled("knock"))
	w.knock(room)
	w.alice.must("POST", in(room, "kick"), about(w.bob))
	w.alice.see(room, w.bob, "leave")
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.knock(room)
}

// knockRetract lets bob change his mind.
func knockRetract(w *world) {
	room := w.alice.create(w.version, ruled("knock"))
	w.knock(room)
	w.bob.must("POST", in(room, "leave"), object{})
	require.Equal(w, w.bob.user, w.alice.see(room, w.bob, "leave").Sender)
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
}

// uninvitedKnock keeps bob from knocking on a room that is only for the invited, and on one that he is banned from.
func uninvitedKnock(w *world) {
	w.bob.forbidden("POST", knocking(w.alice.create(w.version, nil), w.here), object{})
	room := w.alice.create(w.version, ruled("knock"))
	w.alice.must("POST", in(room, "ban"), about(w.bob))
	w.bob.forbidden("POST", knocking(room, w.here), object{})
	require.NotContains(w, w.bob.knocks, room)
}

// knockRestrictedKnock lets bob knock on a room that he may not join yet.
func knockRestrictedKnock(w *world) {
	_, room := w.club("knock_restricted")
	w.knock(room)
	w.invite(room)
	w.bob.must("POST", joining(string(room), w.here), nil)
	require.Empty(w, w.alice.see(room, w.bob, "join").Content.Authoriser)
	w.talk(room)
}

// leave lets bob go again, who then hears nothing more and cannot come back.
func leave(w *world) {
	room := w.alice.create(w.version, nil)
	w.invite(room)
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
	w.bob.must("POST", in(room, "leave"), object{})
	require.Equal(w, w.bob.user, w.alice.see(room, w.bob, "leave").Sender)
	w.bob.see(room, w.bob, "leave")
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
}

// ban throws bob out of a public room, which is then closed to him until he is unbanned.
func ban(w *world) {
	room, _ := w.public()
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
	w.alice.must("POST", in(room, "ban"), about(w.bob))
	require.Equal(w, w.alice.user, w.bob.see(room, w.bob, "ban").Sender)
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.alice.must("POST", in(room, "unban"), about(w.bob))
	w.alice.see(room, w.bob, "leave")
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
}
