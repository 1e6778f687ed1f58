package main

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// versions are those with rules of their own for IDs, references or states.
var versions = []mxfed.RoomVersion{"1", "2", "3", "6", "10", "11", "12"}

func TestInviteJoinLeave(t *testing.T) {
	onEach(t, func(w *world) {
		a, b := w.start("a.example"), w.start("b.example")
		alice, bob := w.user(a, "alice"), w.user(b, "bob")
		for _, version := range versions {
			w.inviteJoinLeave(a, b, alice, bob, version)
		}
	})
}

func (w *world) inviteJoinLeave(a, b *server, alice, bob mxfed.UserID, version mxfed.RoomVersion) {
	id := w.room(a, alice, roomRequest{Version: version, Name: "the room"})
	require.ErrorIs(w, b.joinRoom(w.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil), mxfed.ErrForbidden)
	require.NoError(w, a.inviteUser(w.Context(), alice, id, bob, nil))
	m := w.knows(b, id, bob)
	require.Equal(w, "invite", m.Membership)
	require.NotEmpty(w, m.Shown)
	require.NoError(w, b.joinRoom(w.Context(), bob, id, nil, nil))
	require.Equal(w, "join", w.stands(a, id, bob))
	w.agree(a, b, id)

	w.say(a, alice, id, "hello")
	w.eventually(func() bool { return len(w.bodies(b, id)) == 1 })
	w.say(b, bob, id, "hi")
	w.eventually(func() bool { return len(w.bodies(a, id)) == 2 })
	require.Equal(w, w.bodies(a, id), w.bodies(b, id))

	require.NoError(w, b.leaveRoom(w.Context(), bob, id, nil))
	w.eventually(func() bool { return w.stands(a, id, bob) == "leave" })
	require.Equal(w, "leave", w.knows(b, id, bob).Membership)
	require.ErrorIs(w, b.joinRoom(w.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil), mxfed.ErrForbidden)
}

// TestFork lets users join that know nothing of each other, and an admin act meanwhile.
func TestFork(t *testing.T) {
	onEach(t, func(w *world) {
		a, b, c := w.start("a.example"), w.start("b.example"), w.start("c.example")
		alice, bob, carol := w.user(a, "alice"), w.user(b, "bob"), w.user(c, "carol")
		for _, version := range versions {
			id := w.room(a, alice, roomRequest{Version: version, Preset: "public_chat"})
			var joined sync.WaitGroup
			joined.Go(func() { assert.NoError(w, b.joinRoom(w.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil)) })
			joined.Go(func() { assert.NoError(w, c.joinRoom(w.Context(), carol, id, []mxfed.ServerName{"a.example"}, nil)) })
			joined.Go(func() { w.set(a, alice, id, "m.room.topic", "", map[string]any{"topic": "x"}) })
			joined.Wait()
			w.say(a, alice, id, "merged")
			w.eventually(func() bool { return len(w.bodies(b, id)) == 1 && len(w.bodies(c, id)) == 1 })
			state := w.state(a, id)
			require.Contains(w, state, mxfed.StateKey{Type: "m.room.member", Key: string(bob)})
			require.Contains(w, state, mxfed.StateKey{Type: "m.room.member", Key: string(carol)})
			require.Contains(w, state, mxfed.StateKey{Type: "m.room.topic"})
			require.Equal(w, state, w.state(b, id))
			require.Equal(w, state, w.state(c, id))
		}
	})
}
