package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// killRounds is how often a server is killed.
const killRounds = 20

// TestKill kills a server with SIGKILL at random points under load. What was acknowledged is there afterwards, the database
// is consistent, and whoever repeats a request gets the same answer.
func TestKill(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) { testKill(t, filepath.Join(t.TempDir(), "hs.db")) })
	t.Run("postgres", func(t *testing.T) { testKill(t, newPostgres(t).create(t)) })
}

func testKill(t *testing.T, source string) {
	ca, dir, ports := testCA(t), t.TempDir(), freePorts(t, 2)
	start := func() *process { return startProcess(t, ca, dir, ports, "-db", source) }
	p := start()
	alice := newPhone(t, p.base, "alice")
	l := &load{room: mxfed.RoomID(alice.create(answer{"preset": "public_chat", "room_version": replicaVersion})), via: p.name, alice: alice, peer: newPeer(t, ca),
		sent: make(map[string]string)}
	repeated := 0
	for range killRounds {
		ctx, stop := context.WithCancel(t.Context())
		var workers sync.WaitGroup
		for range 6 {
			workers.Go(func() { l.joins(ctx) })
		}
		for range 2 {
			workers.Go(func() { l.messages(ctx) })
		}
		time.Sleep(time.Duration(100+rand.IntN(400)) * time.Millisecond)
		require.NoError(t, p.Kill())
		p.wait()
		stop()
		workers.Wait()
		l.checkDatabase(t, p.name, source)
		p = start()
		repeated += l.repeat(t)
	}
	joins, messages := len(l.joined), len(l.sent)
	require.NotZero(t, joins)
	require.NotZero(t, messages)
	t.Logf("%d rounds: %d joins and %d messages acknowledged, none lost; %d requests repeated with the same answer", killRounds, joins, messages, repeated)
}

// load is what goes on while a server is killed, and what it has acknowledged.
type load struct {
	room  mxfed.RoomID
	via   mxfed.ServerName
	alice *phone
	peer  *peer

	mu     sync.Mutex
	users  int
	joined []*mxfed.JoinResult
	sent   map[string]string // messages by transaction ID
}

// number is a new one each time.
func (l *load) number() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.users++
	return l.users
}

// joins lets one user after the other join, until ctx ends.
func (l *load) joins(ctx context.Context) {
	for ctx.Err() == nil {
		user := mxfed.UserID(fmt.Sprintf("@user%d:%s", l.number(), l.peer.own))
		result, err := l.peer.fed.Client().Join(ctx, &mxfed.JoinRequest{Room: l.room, User: user, Via: []mxfed.ServerName{l.via}})
		if err != nil {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		l.mu.Lock()
		l.joined = append(l.joined, result)
		l.mu.Unlock()
	}
}

// messages lets Alice say something again and again.
func (l *load) messages(ctx context.Context) {
	for ctx.Err() == nil {
		txn := fmt.Sprint("t", l.number())
		status, got, err := l.alice.request(ctx, "PUT", l.saying(txn), answer{"body": txn, "msgtype": "m.text"})
		if err != nil || status != 200 {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		l.mu.Lock()
		l.sent[txn] = fmt.Sprint(got["event_id"])
		l.mu.Unlock()
	}
}

func (l *load) saying(txn string) string {
	return in3(string(l.room), "send/m.room.message/"+url.PathEscape(txn))
}

// checkDatabase looks into the database of a server that was killed.
func (l *load) checkDatabase(t *testing.T, name mxfed.ServerName, source string) {
	db, err := openDatabase(t.Context(), source, name, testLog())
	require.NoError(t, err)
	defer db.close()
	require.NoError(t, db.view(t.Context(), func(t *tx) error {
		if !db.postgres() {
			if verdict, _ := one[string](t, `PRAGMA integrity_check`); verdict != "ok" {
				return errors.New(verdict)
			}
		}
		state := t.wholeState(l.room)
		for _, j := range l.joined {
			if id := state[keyOf(j.Event)]; id != j.Event.ID() {
				return fmt.Errorf("%s has %q in place of its join %s", j.Event.Sender(), id, j.Event.ID())
			}
		}
		for what, query := range map[string]string{
			"an event without its place":      `SELECT count(*) FROM events WHERE position = 0`,
			"two events of one position":      `SELECT count(*) - count(DISTINCT position) FROM events`,
			"a position that was not counted": `SELECT count(*) FROM events WHERE position > (SELECT position FROM stream)`,
			"a room without an end":           `SELECT count(*) FROM rooms r WHERE NOT EXISTS (SELECT 1 FROM events WHERE room = r.id AND latest = 1)`,
			"an end that is followed":         `SELECT count(*) FROM events e JOIN followed f ON f.event = e.id WHERE e.latest = 1`,
			"two entries for one key":         `SELECT count(*) FROM state a JOIN state b ON a.room = b.room AND a.type = b.type AND a.state_key = b.state_key AND a.since < b.since AND a.until > b.since`,
			"an event to be sent that is not": `SELECT count(*) FROM outbox o LEFT JOIN events e ON e.id = o.event WHERE e.position IS NULL OR e.position <> o.position`,
			"a message sent twice":            `SELECT count(*) - count(DISTINCT txn) FROM events WHERE txn <> ''`,
		} {
			if n, _ := one[int](t, query); n != 0 {
				return fmt.Errorf("%s: %d", what, n)
			}
		}
		return nil
	}))
	require.NoError(t, db.view(t.Context(), func(tx *tx) error {
		for txn, id := range l.sent {
			if len(tx.events(mxfed.EventID(id))) == 0 {
				return fmt.Errorf("message %s is lost", txn)
			}
		}
		return nil
	}))
}

// repeat sends some of what was acknowledged again, to the server that has been started anew.
func (l *load) repeat(t *testing.T) (n int) {
	for _, j := range l.joined[max(0, len(l.joined)-3):] {
		again, err := l.peer.fed.Client().SendJoin(t.Context(), l.via, &mxfed.SendJoinRequest{Event: j.Event})
		require.NoError(t, err)
		require.Equal(t, string(j.Event.JSON()), string(again.Event.JSON()))
		var state, before []string
		for pdu, err := range again.State {
			require.NoError(t, err)
			state = append(state, string(pdu))
		}
		for _, e := range j.State {
			before = append(before, string(e.JSON()))
		}
		slices.Sort(state)
		slices.Sort(before)
		require.Equal(t, before, state)
		n++
	}
	for txn, id := range l.sent {
		require.Equal(t, id, l.alice.must("PUT", l.saying(txn), answer{"body": txn, "msgtype": "m.text"})["event_id"])
		if n++; n%5 == 0 {
			break
		}
	}
	return n
}
