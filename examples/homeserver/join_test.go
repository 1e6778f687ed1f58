package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestPartial joins without members, is told of something new by one whom it does not know, and is stopped before it has
// fetched the members. When it is started again it does.
func TestPartial(t *testing.T) {
	onEach(t, func(w *world) {
		a := w.start("a.example")
		alice, anna := w.user(a, "alice"), w.user(a, "anna")
		id := w.room(a, alice, roomRequest{Preset: "public_chat", Name: "members give their names to a room without one"})
		require.NoError(w, a.joinRoom(w.Context(), anna, id, nil, nil))

		b, err := openServer(w.Context(), settings{Name: "b.example", Database: w.database("b.example"), HTTP: w.Transport, Log: testLog()})
		require.NoError(w, err)
		require.NoError(w, w.Serve("b.example", b.federation()))
		bob := w.user(b, "bob")
		require.NoError(w, b.joinThrough(w.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
		require.Empty(w, w.stands(b, id, anna))
		w.say(a, anna, id, "hello")
		w.eventually(func() bool { return len(w.bodies(b, id)) == 1 })
		_, err = b.host.Room(w.Context(), id, mxfed.RoomQuery{Origin: "c.example", To: "b.example"})
		require.ErrorIs(w, err, mxfed.ErrNotFound, "who does not know the members cannot speak for the room")
		require.NoError(w, b.close())

		b = w.start("b.example")
		w.eventually(func() bool { return w.stands(b, id, anna) == "join" })
		w.agree(a, b, id)
		require.Equal(w, []string{"hello"}, w.bodies(b, id))
		_, err = b.host.Room(w.Context(), id, mxfed.RoomQuery{Origin: "c.example", To: "b.example"})
		require.NoError(w, err)
	})
}

// TestRejoin comes back into a room that went on meanwhile.
func TestRejoin(t *testing.T) {
	onEach(t, func(w *world) {
		a, b := w.start("a.example"), w.start("b.example")
		alice, bob := w.user(a, "alice"), w.user(b, "bob")
		id := w.room(a, alice, roomRequest{Preset: "public_chat"})
		via := []mxfed.ServerName{"a.example"}
		require.NoError(w, b.joinRoom(w.Context(), bob, id, via, nil))
		require.NoError(w, b.leaveRoom(w.Context(), bob, id, nil))
		w.eventually(func() bool { return w.stands(a, id, bob) == "leave" })
		w.set(a, alice, id, "m.room.name", "", map[string]any{"name": "N"})
		require.NoError(w, b.joinRoom(w.Context(), bob, id, via, nil))
		w.agree(a, b, id)
		w.say(b, bob, id, "back")
		w.eventually(func() bool { return len(w.bodies(a, id)) == 1 })
	})
}

// TestJoin_Failed leaves nothing of a room behind that could not be joined.
func TestJoin_Failed(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	id := w.room(a, alice, roomRequest{})
	require.ErrorIs(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil), mxfed.ErrForbidden)
	require.Nil(t, w.knows(b, id, bob))
	for _, table := range []string{"rooms", "events", "state", "incoming", "joining"} {
		require.Zero(t, ask[int](w, b, `SELECT count(*) FROM `+table), table)
	}
	require.NoError(t, a.inviteUser(t.Context(), alice, id, bob, nil))
	require.NoError(t, b.joinRoom(t.Context(), bob, id, nil, nil))
}
