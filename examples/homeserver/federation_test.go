package main

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
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
	a, b, e := w.start("a.example"), w.start("b.example"), w.start("e.example")
	alice, bob, eve := w.user(a, "alice"), w.user(b, "bob"), w.user(e, "eve")
	id := w.room(a, alice, roomRequest{})
	require.NoError(t, a.inviteUser(t.Context(), alice, id, bob, nil))
	require.Equal(t, "invite", w.knows(b, id, bob).Membership)
	invite := []mxfed.EventID{w.knows(b, id, bob).Event.ID()}
	forged := w.forge(e, "12", map[string]any{"room_id": id, "type": "m.room.member", "state_key": bob, "sender": eve,
		"content": map[string]any{"membership": "leave"}, "prev_events": invite, "auth_events": invite})
	require.Contains(t, w.put(e, "b.example", "x", forged)[forged.ID()], "does not end")
	require.Equal(t, "invite", w.knows(b, id, bob).Membership)
	w.member(a, alice, id, bob, "leave")
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
		w.member(a, alice, id, bob, "leave")
		w.eventually(func() bool { return w.knows(b, id, bob).Membership == "leave" })

		require.NoError(w, b.knockOn(w.Context(), bob, id, via, nil))
		require.NoError(w, a.inviteUser(w.Context(), alice, id, bob, nil))
		require.NoError(w, b.joinRoom(w.Context(), bob, id, nil, nil))
		w.agree(a, b, id)
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

// TestPolicyServer has a server send what the room's policy server, of which it does not know yet, has not signed.
func TestPolicyServer(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.start("a.example"), w.start("b.example"), w.start("c.example")
	alice, bob, carol := w.user(a, "alice"), w.user(b, "bob"), w.user(c, "carol")
	seed := make([]byte, ed25519.SeedSize)
	key := ed25519.NewKeyFromSeed(seed)
	mux := http.NewServeMux()
	mux.Handle("/", b.federation())
	mux.Handle("/_matrix/policy/v1/sign", b.endpoint(http.MethodPost, func(_ *http.Request, in *mxfed.Request) (any, error) {
		if strings.Contains(string(in.Body), "spam") {
			return nil, mxfed.ErrForbidden
		}
		var e map[string]any
		require.NoError(t, json.Unmarshal(in.Body, &e))
		if e["type"] == "m.room.message" { // of which redaction leaves nothing
			e["content"] = map[string]any{}
		}
		delete(e, "signatures")
		text, err := mxfed.CanonicalJSON(asJSON(e))
		require.NoError(t, err)
		return map[string]any{"b.example": map[string]string{"ed25519:policy_server": base64.RawStdEncoding.EncodeToString(ed25519.Sign(key, text))}}, nil
	}))
	require.NoError(t, w.Serve("b.example", mux))
	id := w.room(a, alice, roomRequest{Preset: "public_chat"})
	for s, user := range map[*server]mxfed.UserID{b: bob, c: carol} {
		require.NoError(t, s.joinRoom(t.Context(), user, id, []mxfed.ServerName{"a.example"}, nil))
	}
	w.exec(a, `INSERT INTO destinations (name) VALUES ('c.example') ON CONFLICT DO NOTHING`)
	w.exec(a, `UPDATE destinations SET held_until = ? WHERE name = 'c.example'`, int64(forever)) // c is not told of the policy
	w.set(a, alice, id, "m.room.policy", "", map[string]any{"via": "b.example",
		"public_keys": map[string]string{"ed25519": base64.RawStdEncoding.EncodeToString(key.Public().(ed25519.PublicKey))}})
	w.say(c, carol, id, "spam")
	w.say(c, carol, id, "something else")
	w.eventually(func() bool { return len(w.bodies(a, id)) > 0 })
	require.Equal(t, []string{"something else"}, w.bodies(a, id))
	require.Equal(t, statusSoftFailed, ask[int](w, a, `SELECT status FROM events WHERE json LIKE '%"spam"%'`))
	require.Contains(t, ask[string](w, a, `SELECT json FROM events WHERE json LIKE '%"something else"%'`), "policy_server")
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
			w.exec(a, `INSERT INTO destinations (name, held_until) VALUES ('b.example', 1) ON CONFLICT DO NOTHING`)
			w.exec(a, `UPDATE destinations SET held_until = ?`, int64(forever))
			w.set(a, alice, id, "m.room.name", "", map[string]any{"name": "while away"})
			for n := range missed {
				w.say(a, alice, id, fmt.Sprint(n))
			}
			w.exec(a, `DELETE FROM outbox`)
			w.say(a, alice, id, "last")
			w.exec(a, `UPDATE destinations SET held_until = 0`)
			w.eventually(func() bool { texts := w.bodies(b, id); return len(texts) > 0 && texts[len(texts)-1] == "last" })
			w.agree(a, b, id)
			require.Equal(t, missed+1 <= maxGap, len(w.bodies(b, id)) == missed+1)
			w.say(b, bob, id, "and on")
			w.eventually(func() bool { texts := w.bodies(a, id); return texts[len(texts)-1] == "and on" })
			require.Equal(t, 1, ask[int](w, b, `SELECT count(*) FROM events WHERE latest = 1`), "the new event follows both sides of what is left of the gap")
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
	say := func(text string) *mxfed.Event {
		e, err := a.fed.Build(t.Context(), &mxfed.Draft{Room: id, Type: "m.room.message", Sender: alice, Content: asJSON(map[string]any{"body": text})})
		require.NoError(t, err)
		return e
	}
	first, second := say("first"), say("second")
	taken := map[mxfed.EventID]string{first.ID(): ""}
	require.Equal(t, taken, w.put(a, "b.example", "x", first))
	require.Equal(t, taken, w.put(a, "b.example", "x", second), "what was answered")
	require.Equal(t, []string{"first"}, w.bodies(b, id))
	require.Equal(t, map[mxfed.EventID]string{second.ID(): ""}, w.put(a, "b.example", "y", second))
	require.Equal(t, []string{"first", "second"}, w.bodies(b, id))
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
	w.member(a, alice, id, bob, "ban")
	require.NoError(t, a.receiveEvent(t.Context(), "b.example", e))
	require.Empty(t, w.bodies(a, id))
	require.Equal(t, statusSoftFailed, ask[int](w, a, `SELECT status FROM events WHERE id = ?`, e.ID()))
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
