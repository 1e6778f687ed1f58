package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestReject turns an invite down, with and without the inviter's server.
func TestReject(t *testing.T) {
	onEach(t, func(w *world) {
		a, b := w.start("a.example"), w.start("b.example")
		alice, bob := w.user(a, "alice"), w.user(b, "bob")
		id := w.room(a, alice, roomRequest{})
		require.NoError(w, a.inviteUser(w.Context(), alice, id, bob, nil))
		require.NoError(w, b.leaveRoom(w.Context(), bob, id, nil))
		require.Equal(w, "leave", w.knows(b, id, bob).Membership)
		require.Equal(w, "leave", w.stands(a, id, bob))

		id = w.room(a, alice, roomRequest{})
		require.NoError(w, a.inviteUser(w.Context(), alice, id, bob, nil))
		require.NoError(w, w.Serve("a.example", http.NotFoundHandler()))
		require.NoError(w, b.leaveRoom(w.Context(), bob, id, nil))
		require.Equal(w, "leave", w.knows(b, id, bob).Membership)
	})
}

// TestRescind takes an invite back, and refuses to have it taken back by others.
func TestRescind(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	id := w.room(a, alice, roomRequest{})
	require.NoError(t, a.inviteUser(t.Context(), alice, id, bob, nil))
	require.Equal(t, "invite", w.knows(b, id, bob).Membership)
	require.NoError(t, a.setMembership(t.Context(), alice, id, bob, "leave", nil))
	w.eventually(func() bool { return w.knows(b, id, bob).Membership == "leave" })
}

func TestKnock(t *testing.T) {
	onEach(t, func(w *world) {
		a, b := w.start("a.example"), w.start("b.example")
		alice, bob := w.user(a, "alice"), w.user(b, "bob")
		knocking := stateEntry{Type: "m.room.join_rules", Content: json.RawMessage(`{"join_rule":"knock"}`)}
		id := w.room(a, alice, roomRequest{Name: "N", State: []stateEntry{knocking}})
		via := []mxfed.ServerName{"a.example"}
		require.NoError(w, b.knockOn(w.Context(), bob, id, via, nil))
		require.Equal(w, "knock", w.stands(a, id, bob))
		require.Contains(w, fmt.Sprintf("%s", w.knows(b, id, bob).Shown), `"N"`)
		require.NoError(w, b.leaveRoom(w.Context(), bob, id, nil))
		require.Equal(w, "leave", w.stands(a, id, bob))

		require.NoError(w, b.knockOn(w.Context(), bob, id, via, nil))
		require.NoError(w, a.setMembership(w.Context(), alice, id, bob, "leave", nil))
		w.eventually(func() bool { return w.knows(b, id, bob).Membership == "leave" })

		require.NoError(w, b.knockOn(w.Context(), bob, id, via, nil))
		require.NoError(w, a.inviteUser(w.Context(), alice, id, bob, nil))
		require.NoError(w, b.joinRoom(w.Context(), bob, id, nil, nil))
		require.Equal(w, w.state(a, id), w.state(b, id))
	})
}

// TestRestricted joins a room by being in another one, through the other server and through the own one.
func TestRestricted(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob, bill := w.user(a, "alice"), w.user(b, "bob"), w.user(b, "bill")
	lobby := w.room(a, alice, roomRequest{Preset: "public_chat"})
	rule := asJSON(map[string]any{"join_rule": "restricted", "allow": []any{map[string]any{"type": "m.room_membership", "room_id": lobby}}})
	id := w.room(a, alice, roomRequest{State: []stateEntry{{Type: "m.room.join_rules", Content: rule}}})
	via := []mxfed.ServerName{"a.example"}
	require.ErrorIs(t, b.joinRoom(t.Context(), bob, id, via, nil), mxfed.ErrForbidden)
	require.NoError(t, b.joinRoom(t.Context(), bob, lobby, via, nil))
	require.NoError(t, b.joinRoom(t.Context(), bob, id, via, nil))
	require.ErrorIs(t, b.joinRoom(t.Context(), bill, id, via, nil), mxfed.ErrForbidden)
	require.NoError(t, b.joinRoom(t.Context(), bill, lobby, via, nil))
	require.NoError(t, b.joinRoom(t.Context(), bill, id, via, nil))
	w.eventually(func() bool { return w.stands(a, id, bill) == "join" })
}

// TestGap has a server miss many events, and find them again by those that follow: few between, and more than are fetched.
func TestGap(t *testing.T) {
	for name, missed := range map[string]int{"narrow": 5, "wide": 3 * maxGap} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			a, b := w.start("a.example"), w.start("b.example")
			alice, bob := w.user(a, "alice"), w.user(b, "bob")
			id := w.room(a, alice, roomRequest{Preset: "public_chat"})
			require.NoError(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
			exec := func(query string, args ...any) {
				require.NoError(t, a.db.update(t.Context(), "", func(tx *tx) error { return tx.exec(query, args...) }))
			}
			exec(`INSERT INTO destinations (name, held_until) VALUES ('b.example', $1) ON CONFLICT (name) DO UPDATE SET held_until = $1`, int64(1)<<60)
			w.set(a, alice, id, "m.room.name", "", map[string]any{"name": "while away"})
			for n := range missed {
				w.say(a, alice, id, fmt.Sprint(n))
			}
			exec(`DELETE FROM outbox`)
			w.say(a, alice, id, "last")
			exec(`UPDATE destinations SET held_until = 0`)
			w.eventually(func() bool { texts := w.bodies(b, id); return len(texts) > 0 && texts[len(texts)-1] == "last" })
			require.Equal(t, w.state(a, id), w.state(b, id))
			require.Equal(t, missed+1 <= maxGap, len(w.bodies(b, id)) == missed+1)
			w.say(b, bob, id, "and on")
			w.eventually(func() bool { texts := w.bodies(a, id); return texts[len(texts)-1] == "and on" })
			var ends int // the new event follows both sides of what is left of the gap
			require.NoError(t, b.db.view(t.Context(), func(t *tx) error {
				_, err := t.row(`SELECT count(*) FROM extremities WHERE room = $1`, []any{id}, &ends)
				return err
			}))
			require.Equal(t, 1, ends)
		})
	}
}

// TestQueue keeps events for a server that is down, over a restart of this one, and in order.
func TestQueue(t *testing.T) {
	onEach(t, func(w *world) {
		a, stop := w.startStoppable("a.example")
		b := w.start("b.example")
		alice, bob := w.user(a, "alice"), w.user(b, "bob")
		id := w.room(a, alice, roomRequest{Preset: "public_chat"})
		require.NoError(w, b.joinRoom(w.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
		require.NoError(w, w.Serve("b.example", http.NotFoundHandler()))
		var texts []string
		for n := range maxPDUs + 10 {
			texts = append(texts, fmt.Sprint(n))
			w.say(a, alice, id, texts[n])
		}
		stop()
		w.start("a.example")
		require.NoError(w, w.Serve("b.example", b.federation()))
		w.eventually(func() bool { return len(w.bodies(b, id)) == len(texts) })
		require.Equal(w, texts, w.bodies(b, id))
	})
}

// TestTransaction_Again sends a transaction twice.
func TestTransaction_Again(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	id := w.room(a, alice, roomRequest{Preset: "public_chat"})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
	e, err := a.fed.Build(t.Context(), &mxfed.Draft{Room: id, Type: "m.room.message", Sender: alice, Content: json.RawMessage(`{"body":"once"}`)})
	require.NoError(t, err)
	for range 2 {
		var answer struct {
			PDUs map[mxfed.EventID]struct{ Error string }
		}
		body := map[string]any{"pdus": []*mxfed.Event{e}}
		require.NoError(t, a.fed.Client().Do(t.Context(), "", "b.example", http.MethodPut, "/_matrix/federation/v1/send/x", body, &answer))
		require.Equal(t, map[mxfed.EventID]struct{ Error string }{e.ID(): {}}, answer.PDUs)
	}
	require.Equal(t, []string{"once"}, w.bodies(b, id))
}

// TestSoftFail bans a user whose server does not know yet: what the user says is not shown, but known.
func TestSoftFail(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	id := w.room(a, alice, roomRequest{Preset: "public_chat"})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
	e, err := b.fed.Build(t.Context(), &mxfed.Draft{Room: id, Type: "m.room.message", Sender: bob, Content: json.RawMessage(`{"body":"late"}`)})
	require.NoError(t, err)
	require.NoError(t, a.setMembership(t.Context(), alice, id, bob, "ban", nil))
	require.NoError(t, a.receiveEvent(t.Context(), "b.example", e))
	require.Empty(t, w.bodies(a, id))
	status := -1
	require.NoError(t, a.db.view(t.Context(), func(t *tx) error {
		_, err := t.row(`SELECT status FROM events WHERE id = $1`, []any{e.ID()}, &status)
		return err
	}))
	require.Equal(t, statusSoftFailed, status)
}

// TestBackfill reads the past of a room from another server.
func TestBackfill(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.start("a.example"), w.start("b.example"), w.start("c.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	w.user(c, "carol")
	id := w.room(a, alice, roomRequest{Preset: "public_chat"})
	w.say(a, alice, id, "before")
	require.NoError(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
	last := w.say(a, alice, id, "after")
	uri := "/_matrix/federation/v1/backfill/" + url.PathEscape(string(id)) + "?limit=4&v=" + url.QueryEscape(string(last))
	var answer struct{ PDUs []json.RawMessage }
	require.NoError(t, b.fed.Client().Do(t.Context(), "", "a.example", http.MethodGet, uri, nil, &answer))
	require.Len(t, answer.PDUs, 4)
	require.ErrorIs(t, c.fed.Client().Do(t.Context(), "", "a.example", http.MethodGet, uri, nil, &answer), mxfed.ErrForbidden)
	require.ErrorIs(t, b.fed.Client().Do(t.Context(), "", "a.example", http.MethodPost, uri, nil, &answer), mxfed.ErrUnrecognized)
}

// TestACL shuts a server out.
func TestACL(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	id := w.room(a, alice, roomRequest{Preset: "public_chat"})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
	w.set(a, alice, id, "m.room.server_acl", "", map[string]any{"allow": []string{"*"}, "deny": []string{"b.example"}})
	e, err := b.fed.Build(context.WithoutCancel(t.Context()), &mxfed.Draft{Room: id, Type: "m.room.message", Sender: bob, Content: json.RawMessage(`{"body":"x"}`)})
	require.NoError(t, err)
	require.ErrorIs(t, a.receiveEvent(t.Context(), "b.example", e), mxfed.ErrForbidden)
	require.Empty(t, w.bodies(a, id))
}
