package main

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/internal/loopback"
)

// TestMain makes the test binary the program itself when a test starts it as a process.
func TestMain(m *testing.M) {
	if os.Getenv(actAsProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// world is a set of servers on one network.
type world struct {
	*testing.T
	*loopback.Network
	database func(name mxfed.ServerName) string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	network, err := loopback.New()
	require.NoError(t, err)
	t.Cleanup(network.Close)
	dir := t.TempDir()
	w := &world{T: t, Network: network}
	w.database = func(name mxfed.ServerName) string { return filepath.Join(dir, string(name)+".db") }
	return w
}

// testLog is silent unless MXFED_LOG is set.
func testLog() *slog.Logger {
	var out io.Writer = io.Discard
	if os.Getenv("MXFED_LOG") != "" {
		out = os.Stderr
	}
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start starts a server that runs until the test ends.
func (w *world) start(name mxfed.ServerName) *server {
	w.Helper()
	s, stop := w.startStoppable(name)
	w.Cleanup(stop)
	return s
}

// startStoppable starts a server that runs until stop is called.
func (w *world) startStoppable(name mxfed.ServerName) (s *server, stop func()) {
	w.Helper()
	s, err := openServer(w.Context(), settings{Name: name, Database: w.database(name), HTTP: w.Transport, Log: testLog().With("server", string(name))})
	require.NoError(w, err)
	require.NoError(w, w.Serve(name, s.federation()))
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.run(ctx) })
	return s, sync.OnceFunc(func() {
		cancel()
		running.Wait()
		s.close()
	})
}

// user registers a user.
func (w *world) user(s *server, localpart string) mxfed.UserID {
	w.Helper()
	in, _, err := s.register(w.Context(), localpart, "")
	require.NoError(w, err)
	return in.User
}

// room makes a room.
func (w *world) room(s *server, creator mxfed.UserID, req roomRequest) mxfed.RoomID {
	w.Helper()
	id, err := s.createRoom(w.Context(), creator, &req)
	require.NoError(w, err)
	return id
}

// say sends a message.
func (w *world) say(s *server, user mxfed.UserID, id mxfed.RoomID, text string) mxfed.EventID {
	w.Helper()
	event, err := s.send(w.Context(), &message{Sender: user, Room: id, Type: "m.room.message", Content: asJSON(map[string]any{"msgtype": "m.text", "body": text})})
	require.NoError(w, err)
	return event
}

// set sets an entry of the state.
func (w *world) set(s *server, user mxfed.UserID, id mxfed.RoomID, typ, key string, content any) mxfed.EventID {
	w.Helper()
	event, err := s.send(w.Context(), &message{Sender: user, Room: id, Type: typ, StateKey: &key, Content: asJSON(content)})
	require.NoError(w, err)
	return event
}

// member changes a membership.
func (w *world) member(s *server, sender mxfed.UserID, id mxfed.RoomID, user mxfed.UserID, membership string) {
	w.Helper()
	_, err := s.sendMember(w.Context(), sender, id, user, membership, nil)
	require.NoError(w, err)
}

// ask reads one row of a server's database.
func ask[T any](w *world, s *server, query string, args ...any) (row T) {
	w.Helper()
	require.NoError(w, s.db.view(w.Context(), func(t *tx) error {
		row, _ = one[T](t, query, args...)
		return nil
	}))
	return row
}

// exec changes a server's database.
func (w *world) exec(s *server, query string, args ...any) {
	w.Helper()
	require.NoError(w, s.db.exec(w.Context(), query, args...))
}

// stands is how the room's current state has a user.
func (w *world) stands(s *server, id mxfed.RoomID, user mxfed.UserID) (membership string) {
	w.Helper()
	return ask[string](w, s, `SELECT membership FROM state WHERE room = ? AND type = 'm.room.member' AND state_key = ? AND until = ?`, id, user, int64(forever))
}

// knows is how a server's own user stands to a room, whether the server is in it or not.
func (w *world) knows(s *server, id mxfed.RoomID, user mxfed.UserID) *membership {
	w.Helper()
	m, err := query(w.Context(), s.db, func(t *tx) *membership { return t.membership(user, id) })
	require.NoError(w, err)
	return m
}

// state is the current state of a room by event ID.
func (w *world) state(s *server, id mxfed.RoomID) map[mxfed.StateKey]mxfed.EventID {
	w.Helper()
	state, err := query(w.Context(), s.db, func(t *tx) map[mxfed.StateKey]mxfed.EventID { return t.wholeState(id) })
	require.NoError(w, err)
	return state
}

// agree waits until two servers know the same current state of a room.
func (w *world) agree(a, b *server, id mxfed.RoomID) {
	w.Helper()
	w.eventually(func() bool { return maps.Equal(w.state(a, id), w.state(b, id)) })
}

func (t *tx) wholeState(id mxfed.RoomID) map[mxfed.StateKey]mxfed.EventID {
	state := make(map[mxfed.StateKey]mxfed.EventID)
	for _, row := range list[entryRow](t, `SELECT type, state_key, event FROM state WHERE room = ? AND until = ?`, id, int64(forever)) {
		state[row.key()] = row.Event
	}
	return state
}

// bodies are the texts of a room's messages, in order of acceptance.
func (w *world) bodies(s *server, id mxfed.RoomID) (texts []string) {
	w.Helper()
	events, _, err := s.timeline(w.Context(), id, 0, 1<<62, 10000)
	require.NoError(w, err)
	for _, e := range events {
		if e.Type() == "m.room.message" {
			var content struct{ Body string }
			require.NoError(w, json.Unmarshal(e.Content(), &content))
			texts = append(texts, content.Body)
		}
	}
	return texts
}

// eventually waits until something holds. It has no limit: a test that hangs shows where.
func (w *world) eventually(holds func() bool) {
	w.Helper()
	for !holds() {
		require.NoError(w, w.Context().Err())
		time.Sleep(10 * time.Millisecond)
	}
}
