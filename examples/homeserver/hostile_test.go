package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// This file tests what another server's users or the server itself try against a room.

// forge makes an event that nobody would build: hashed, and signed by a server that need not be allowed to.
func (w *world) forge(by *server, version mxfed.RoomVersion, e map[string]any) *mxfed.Event {
	w.Helper()
	canonical := func() []byte {
		text, err := mxfed.CanonicalJSON(asJSON(e))
		require.NoError(w, err)
		return text
	}
	e["depth"], e["origin_server_ts"] = 100, now()
	hash := sha256.Sum256(canonical())
	e["hashes"] = map[string]string{"sha256": base64.RawStdEncoding.EncodeToString(hash[:])}
	seed, err := hex.DecodeString(ask[string](w, by, `SELECT value FROM settings WHERE name = 'signing_key'`))
	require.NoError(w, err)
	key := ed25519.NewKeyFromSeed(seed)
	content := e["content"]
	if e["type"] == "m.room.message" { // of which redaction leaves nothing
		e["content"] = map[string]any{}
	}
	signature := base64.RawStdEncoding.EncodeToString(ed25519.Sign(key, canonical()))
	e["content"] = content
	e["signatures"] = map[string]any{string(by.name): map[string]string{"ed25519:" + hex.EncodeToString(key.Public().(ed25519.PublicKey)[:4]): signature}}
	made, err := mxfed.ParseEvent(version, canonical())
	require.NoError(w, err)
	return made
}

// put sends events in a transaction, and returns what was wrong with each.
func (w *world) put(from *server, to mxfed.ServerName, txn string, events ...*mxfed.Event) map[mxfed.EventID]string {
	w.Helper()
	var answer struct {
		PDUs map[mxfed.EventID]struct{ Error string }
	}
	uri := "/_matrix/federation/v1/send/" + txn
	require.NoError(w, from.fed.Client().Do(w.Context(), "", to, http.MethodPut, uri, map[string]any{"pdus": events}, &answer))
	wrong := make(map[mxfed.EventID]string)
	for id, result := range answer.PDUs {
		wrong[id] = result.Error
	}
	return wrong
}

// TestForgedJoin has a server send a join that says it was let in by a user of another one, which has not signed it.
func TestForgedJoin(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob, bill := w.user(a, "alice"), w.user(b, "bob"), w.user(b, "bill")
	rule := stateEntry{Type: "m.room.join_rules", Content: json.RawMessage(`{"join_rule":"restricted","allow":[]}`)}
	id := w.room(a, alice, roomRequest{Version: "10", State: []stateEntry{rule}, Invite: []mxfed.UserID{bob}})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, nil, nil))
	w.agree(a, b, id)
	state := w.state(b, id)
	e := w.forge(b, "10", map[string]any{"room_id": id, "type": "m.room.member", "state_key": bill, "sender": bill,
		"content":     map[string]any{"membership": "join", "join_authorised_via_users_server": alice},
		"prev_events": []mxfed.EventID{state[mxfed.StateKey{Type: "m.room.member", Key: string(bob)}]},
		"auth_events": []mxfed.EventID{state[mxfed.StateKey{Type: "m.room.create"}], state[mxfed.StateKey{Type: "m.room.power_levels"}],
			state[mxfed.StateKey{Type: "m.room.join_rules"}], state[mxfed.StateKey{Type: "m.room.member", Key: string(alice)}]}})
	require.Contains(t, w.put(b, "a.example", "x", e)[e.ID()], "authorises")
	require.Empty(t, w.stands(a, id, bill))
}

// TestForgedVersion has a server that is not in a room invite to it, as one of another version: events of the room are still
// read by its own.
func TestForgedVersion(t *testing.T) {
	w := newWorld(t)
	a, c, e := w.start("a.example"), w.start("c.example"), w.start("e.example")
	alice, carol, dave, eve := w.user(a, "alice"), w.user(c, "carol"), w.user(c, "dave"), w.user(e, "eve")
	id := w.room(a, alice, roomRequest{Version: "11", Preset: "public_chat"})
	invite := w.forge(e, "10", map[string]any{"room_id": id, "type": "m.room.member", "state_key": dave, "sender": eve,
		"content": map[string]any{"membership": "invite"}, "prev_events": []string{}, "auth_events": []string{}})
	_, err := e.fed.Client().Invite(t.Context(), "c.example", &mxfed.InviteRequest{Event: invite})
	require.NoError(t, err, "nobody knows better yet")
	require.NoError(t, c.joinRoom(t.Context(), carol, id, []mxfed.ServerName{"a.example"}, nil))
	require.NoError(t, c.joinRoom(t.Context(), dave, id, nil, nil))
	_, err = e.fed.Client().Invite(t.Context(), "c.example", &mxfed.InviteRequest{Event: invite})
	require.ErrorIs(t, err, mxfed.ErrInvalidParam)
	w.agree(a, c, id)
	w.member(a, alice, id, dave, "ban")
	w.eventually(func() bool { return w.stands(c, id, dave) == "ban" })
}

// TestForgedID has a user give an event of their own the ID that another one has, which the room versions of old let them.
func TestForgedID(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.start("a.example"), w.start("b.example"), w.start("c.example")
	alice, mallory, carol := w.user(a, "alice"), w.user(b, "mallory"), w.user(c, "carol")
	id := w.room(a, alice, roomRequest{Version: "1", Preset: "public_chat"})
	require.NoError(t, b.joinRoom(t.Context(), mallory, id, []mxfed.ServerName{"a.example"}, nil))
	require.NoError(t, c.joinRoom(t.Context(), carol, id, []mxfed.ServerName{"a.example"}, nil))
	w.agree(a, c, id)
	state := w.state(c, id)
	own := state[mxfed.StateKey{Type: "m.room.member", Key: string(mallory)}]
	ref := func(id mxfed.EventID) any { return []any{id, map[string]string{"sha256": ""}} }
	e := w.forge(b, "1", map[string]any{"event_id": own, "room_id": id, "type": "m.room.power_levels", "state_key": "", "sender": mallory,
		"content": map[string]any{"users": map[mxfed.UserID]int{mallory: 100}}, "prev_events": []any{ref(ask[mxfed.EventID](w, c, `SELECT id FROM events WHERE latest = 1`))},
		"auth_events": []any{ref(state[mxfed.StateKey{Type: "m.room.create"}]), ref(state[mxfed.StateKey{Type: "m.room.power_levels"}])}})
	require.Contains(t, w.put(b, "c.example", "x", e)[own], "another event has the ID")
	require.Equal(t, "m.room.member", c.eventOf(w, own).Type())
	w.member(a, alice, id, mallory, "ban")
	w.eventually(func() bool { return w.stands(c, id, mallory) == "ban" })
}

// eventOf is an event as it is stored.
func (s *server) eventOf(w *world, id mxfed.EventID) *mxfed.Event {
	events, err := query(w.Context(), s.db, func(t *tx) []*mxfed.Event { return t.events(id) })
	require.NoError(w, err)
	require.Len(w, events, 1)
	return events[0]
}

// TestFollowedElsewhere has an event of one room follow one of another: that is no reason for the other room to go on
// without it.
func TestFollowedElsewhere(t *testing.T) {
	w := newWorld(t)
	a := w.start("a.example")
	alice := w.user(a, "alice")
	id, other := w.room(a, alice, roomRequest{}), w.room(a, alice, roomRequest{})
	next, err := a.fed.Build(t.Context(), &mxfed.Draft{Room: id, Type: "m.room.message", Sender: alice, Content: json.RawMessage(`{"body":"next"}`)})
	require.NoError(t, err)
	e := w.forge(a, "12", map[string]any{"room_id": other, "type": "m.room.message", "sender": alice, "content": map[string]any{},
		"prev_events": []mxfed.EventID{next.ID()}, "auth_events": []mxfed.EventID{}})
	require.NoError(t, a.db.update(t.Context(), id, func(t *tx) error {
		require.True(w, t.follow(t.room(other), e))
		require.True(w, t.follow(t.room(id), next))
		return nil
	}))
}

// TestJoinOfThePast sends a join again to a server that knows it as part of a state only, and so not what was before it.
func TestJoinOfThePast(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.start("a.example"), w.start("b.example"), w.start("c.example")
	alice, bob, carol := w.user(a, "alice"), w.user(b, "bob"), w.user(c, "carol")
	id := w.room(a, alice, roomRequest{Preset: "public_chat"})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, []mxfed.ServerName{"a.example"}, nil))
	require.NoError(t, c.joinRoom(t.Context(), carol, id, []mxfed.ServerName{"a.example"}, nil))
	w.agree(a, c, id)
	join := w.state(a, id)[mxfed.StateKey{Type: "m.room.member", Key: string(bob)}]
	uri := "/_matrix/federation/v2/send_join/" + url.PathEscape(string(id)) + "/" + url.PathEscape(string(join))
	err := b.fed.Client().Do(t.Context(), "", "c.example", http.MethodPut, uri, b.eventOf(w, join), nil)
	require.ErrorIs(t, err, mxfed.ErrNotFound)
	require.Zero(t, ask[int](w, c, `SELECT position FROM events WHERE id = ?`, join))
}

// TestSecretHistory asks for events that a server may not see: it is told nothing of them, and they are not looked through
// at any price.
func TestSecretHistory(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	via := []mxfed.ServerName{"a.example"}
	id := w.room(a, alice, roomRequest{Preset: "public_chat", State: []stateEntry{{Type: "m.room.history_visibility", Content: json.RawMessage(`{"history_visibility":"joined"}`)}}})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, via, nil))
	require.NoError(t, b.leaveRoom(t.Context(), bob, id, nil))
	w.eventually(func() bool { return w.stands(a, id, bob) == "leave" })
	for range 30 {
		w.say(a, alice, id, "secret")
	}
	require.NoError(t, b.joinRoom(t.Context(), bob, id, via, nil))
	last := w.say(a, alice, id, "welcome")
	history := func(limit int) (types []string) {
		events, err := query(t.Context(), a.db, func(t *tx) []*mxfed.Event { return t.history(id, "b.example", []mxfed.EventID{last}, nil, limit) })
		require.NoError(t, err)
		for _, e := range events {
			require.NotContains(t, string(e.Content()), "secret")
			types = append(types, e.Type())
		}
		return types
	}
	require.Equal(t, []string{"m.room.message"}, history(2))
	require.Equal(t, []string{"m.room.message", "m.room.member"}, history(10)[:2], "that by which bob left")
}

// TestRemadeRoom has a room come back under its ID as one of another version: what is known of it would not be readable.
func TestRemadeRoom(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a.example"), w.start("b.example")
	alice, bob := w.user(a, "alice"), w.user(b, "bob")
	via := []mxfed.ServerName{"a.example"}
	id := w.room(a, alice, roomRequest{Version: "10", Preset: "public_chat"})
	require.NoError(t, b.joinRoom(t.Context(), bob, id, via, nil))
	_, err := b.host.Room(t.Context(), id, mxfed.RoomQuery{To: "b.example"})
	require.NoError(t, err)
	require.NoError(t, b.leaveRoom(t.Context(), bob, id, nil))
	_, err = b.host.Room(t.Context(), id, mxfed.RoomQuery{To: "b.example"})
	require.ErrorIs(t, err, mxfed.ErrNotFound, "a room that was left")
	join := w.forge(b, "11", map[string]any{"room_id": id, "type": "m.room.member", "state_key": bob, "sender": bob,
		"content": map[string]any{"membership": "join"}, "prev_events": []string{"$x"}, "auth_events": []string{}})
	err = b.db.update(t.Context(), id, func(t *tx) error { return t.enter(&intake{room: id}, &mxfed.JoinResult{Event: join}) })
	require.ErrorIs(t, err, mxfed.ErrIncompatibleRoomVersion)
}

// TestExpel rejects events that had been accepted: the room goes on without them.
func TestExpel(t *testing.T) {
	w := newWorld(t)
	a := w.start("a.example")
	alice := w.user(a, "alice")
	id := w.room(a, alice, roomRequest{})
	first := w.set(a, alice, id, "m.room.topic", "", map[string]any{"topic": "first"})
	second := w.set(a, alice, id, "m.room.topic", "", map[string]any{"topic": "second"})
	require.NoError(t, a.db.update(t.Context(), id, func(t *tx) error {
		t.expel(t.room(id), t.placed(id, second))
		return nil
	}))
	require.Equal(t, first, w.state(a, id)[mxfed.StateKey{Type: "m.room.topic"}])
	require.Equal(t, []mxfed.EventID{first}, a.eventOf(w, w.say(a, alice, id, "next")).Prev())
}

// TestLongBranch adds an event whose state is so far from the room's that it would take too much to keep.
func TestLongBranch(t *testing.T) {
	w := newWorld(t)
	a := w.start("a.example")
	alice := w.user(a, "alice")
	id := w.room(a, alice, roomRequest{})
	e, err := a.fed.Build(t.Context(), &mxfed.Draft{Room: id, Type: "m.room.message", Sender: alice, Content: json.RawMessage(`{}`)})
	require.NoError(t, err)
	before := snapshot{differs: make(map[mxfed.StateKey]mxfed.EventID)}
	for n := range maxDiffers + 1 {
		before.differs[mxfed.StateKey{Type: "m.room.member", Key: fmt.Sprint(n)}] = ""
	}
	err = a.db.update(t.Context(), id, func(t *tx) error { return t.add(t.room(id), &addition{event: e, before: before}) })
	require.ErrorIs(t, err, mxfed.ErrTooLarge)
}
