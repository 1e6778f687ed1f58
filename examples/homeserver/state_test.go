package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestConvergence has three servers not hear of each other for a while, in which their users act against each other. When
// they do again, they agree about the room.
func TestConvergence(t *testing.T) {
	for _, version := range []mxfed.RoomVersion{"2", "10", "12"} {
		t.Run(string(version), func(t *testing.T) { newWorld(t).converge(version) })
	}
}

func (w *world) converge(version mxfed.RoomVersion) {
	servers := []*server{w.start("a.example"), w.start("b.example"), w.start("c.example")}
	var users []mxfed.UserID
	for i, s := range servers {
		users = append(users, w.user(s, fmt.Sprint("user", i)))
	}
	id := w.room(servers[0], users[0], roomRequest{Version: version, Preset: "public_chat", State: []stateEntry{{Type: "m.room.power_levels", Content: randomLevels(version, users, 50, 50)}}})
	for i := 1; i < 3; i++ {
		require.NoError(w, servers[i].joinRoom(w.Context(), users[i], id, []mxfed.ServerName{"a.example"}, nil))
	}
	random := rand.New(rand.NewPCG(3, 4))
	for range 3 {
		w.exchange(servers)
		w.partition(servers, int64(1)<<60)
		for range 20 {
			i := random.IntN(3)
			w.act(random, version, servers[i], users, i, id)
		}
		w.partition(servers, 0)
		w.exchange(servers)
		for i := range servers { // whoever is still in the room joins what has been apart
			servers[i].send(w.Context(), &message{Sender: users[i], Room: id, Type: "m.room.message", Content: json.RawMessage(`{"body":"x"}`)})
			w.exchange(servers)
		}
		state := w.state(servers[0], id)
		for i, s := range servers {
			if here, err := s.here(w.Context(), id); err == nil && here && w.stands(servers[0], id, users[i]) == "join" {
				require.Equal(w, state, w.state(s, id))
			}
		}
	}
}

// exchange waits until everything is sent.
func (w *world) exchange(servers []*server) {
	for _, s := range servers {
		w.eventually(func() bool { return ask[int](w, s, `SELECT count(*) FROM outbox`) == 0 })
	}
}

// randomLevels lets the first user have all power, the others little.
func randomLevels(version mxfed.RoomVersion, users []mxfed.UserID, level, topic int) json.RawMessage {
	powers := map[mxfed.UserID]int{users[0]: 100, users[1]: 60, users[2]: level}
	if version == "12" {
		delete(powers, users[0])
	}
	return asJSON(map[string]any{"users": powers, "events": map[string]int{"m.room.power_levels": 60, "m.room.topic": topic}})
}

// partition lets servers send nothing to each other until a time.
func (w *world) partition(servers []*server, until int64) {
	w.Helper()
	for _, s := range servers {
		for _, other := range servers {
			w.exec(s, `INSERT INTO destinations (name) VALUES (?) ON CONFLICT DO NOTHING`, other.name)
		}
		w.exec(s, `UPDATE destinations SET held_until = ?, retry_at = 0`, until)
	}
}

// act does something in a room, which may or may not be allowed.
func (w *world) act(random *rand.Rand, version mxfed.RoomVersion, s *server, users []mxfed.UserID, i int, id mxfed.RoomID) {
	set := func(typ string, content json.RawMessage) {
		s.send(w.Context(), &message{Sender: users[i], Room: id, Type: typ, StateKey: new(string), Content: content})
	}
	switch other := users[random.IntN(3)]; random.IntN(6) {
	case 0:
		set("m.room.power_levels", randomLevels(version, users, 10*random.IntN(7), 10*random.IntN(7)))
	case 1:
		set("m.room.join_rules", asJSON(map[string]any{"join_rule": []string{"public", "invite"}[random.IntN(2)]}))
	case 2:
		if other != users[i] && other != users[0] {
			s.sendMember(w.Context(), users[i], id, other, "leave", nil)
		}
	case 3:
		s.sendMember(w.Context(), users[i], id, users[i], "join", nil)
	default:
		set("m.room.topic", asJSON(map[string]any{"topic": random.IntN(1000)}))
	}
}
