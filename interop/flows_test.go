//go:build unix

package interop

import (
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// world is a room's server, and the server of a user who wants to get in.
type world struct {
	*testing.T
	version    mxfed.RoomVersion
	here       *server
	there      *server
	alice, bob *phone // alice is here, bob is there
}

// flows are what users do, and the first room version in which they can.
var flows = []struct {
	name  string
	since int
	run   func(w *world)
}{
	{"invite, join", 1, inviteJoin},
	{"invite, reject", 1, inviteReject},
	{"uninvited join", 1, uninvitedJoin},
	{"join by alias", 1, joinByAlias},
	{"restricted join", 8, restrictedJoin}, // https://spec.matrix.org/v1.19/rooms/v8/
	{"leave", 1, leave},
	{"ban", 1, ban},
}

// TestFlows plays all flows between mxfed and Dendrite, in both directions and every room version. Each version has servers
// of its own: after some errors a server does not call another one for a while.
func TestFlows(t *testing.T) {
	dendrite, homeserver := buildDendrite(t), buildHomeserver(t)
	for v := 1; v <= 12; v++ {
		t.Run("v"+strconv.Itoa(v), func(t *testing.T) {
			dir := newFolder(t)
			ca := newAuthority(t, dir)
			theirs, ours := startDendrite(t, dendrite, dir, ca), startHomeserver(t, homeserver, dir, ca)
			for i, flow := range flows {
				if v < flow.since {
					continue // there is no such thing
				}
				play := func(direction string, here, there *server) {
					t.Run(flow.name+"/"+direction, func(t *testing.T) {
						version := mxfed.RoomVersion(strconv.Itoa(v))
						results.add(t, "Dendrite "+dendriteVersion, flow.name, direction, version)
						n := strconv.Itoa(i)
						flow.run(&world{t, version, here, there, newPhone(t, here, "alice"+n), newPhone(t, there, "bob"+n)})
					})
				}
				play("our user, their room", theirs, ours)
				play("their user, our room", ours, theirs)
			}
		})
	}
}

// TestNotOffered has flows that Dendrite cannot play. If it learns them, they belong into the table of TestFlows.
func TestNotOffered(t *testing.T) {
	dendrite, homeserver := buildDendrite(t), buildHomeserver(t)
	dir := newFolder(t)
	ca := newAuthority(t, dir)
	theirs, ours := startDendrite(t, dendrite, dir, ca), startHomeserver(t, homeserver, dir, ca)
	knocking := object{"initial_state": []object{{"type": "m.room.join_rules", "state_key": "", "content": object{"join_rule": "knock"}}}}
	knock := func(on *phone) string {
		return "knock/" + strings.TrimPrefix(joining(string(on.create("10", knocking)), on.on), "join/")
	}
	alice, bob := newPhone(t, ours, "alice"), newPhone(t, theirs, "bob")
	// It has neither the endpoints for servers that want to knock, which is no fault of our client's, nor the one for its own.
	alice.fails(http.StatusBadGateway, "M_UNKNOWN", "POST", knock(bob), object{})
	bob.fails(http.StatusNotFound, "M_UNRECOGNIZED", "POST", knock(alice), object{})
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
	shown := make(map[string]event)
	for _, e := range w.bob.invites[room] {
		if e.StateKey != nil {
			shown[e.Type+" "+*e.StateKey] = e
		}
	}
	member := shown["m.room.member "+string(w.bob.user)]
	require.Equal(w, "invite", member.Content.Membership)
	require.Equal(w, w.alice.user, member.Sender)
	require.Contains(w, shown, "m.room.join_rules ")
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
	local, _, _ := strings.Cut(string(w.alice.user)[1:], ":")
	room = w.alice.create(w.version, object{"preset": "public_chat", "room_alias_name": local})
	return room, "%23" + local + ":" + string(w.here.name)
}

// restrictedJoin lets bob in as soon as he is in another room, on alice's authority.
func restrictedJoin(w *world) {
	club := w.alice.create(w.version, object{"preset": "public_chat"})
	room := w.alice.create(w.version, object{"initial_state": []object{{"type": "m.room.join_rules", "state_key": "", "content": object{
		"join_rule": "restricted", "allow": []object{{"type": "m.room_membership", "room_id": club}}}}}})
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.bob.must("POST", joining(string(club), w.here), nil)
	w.alice.see(club, w.bob, "join")
	w.bob.must("POST", joining(string(room), w.here), nil)
	require.Equal(w, w.alice.user, w.alice.see(room, w.bob, "join").Content.Authoriser)
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
