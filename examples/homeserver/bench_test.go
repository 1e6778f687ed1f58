package main

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/internal/synthroom"
)

// BenchmarkBigRoom has one process join a room of 50,000 members that another one is in, with SQLite on both sides. It
// reports how long it takes until the user is in the room and until all of the state is there, how many bytes the state has,
// and the most memory that each process ever had.
func BenchmarkBigRoom(b *testing.B) {
	const members = 50_000
	room := synthroom.New(members, 500, false)
	for b.Loop() {
		ca, ports := testCA(b), freePorts(b, 4)
		there, here := b.TempDir(), b.TempDir()
		resident, joiner := mxfed.ServerName("127.0.0.1:"+ports[0]), mxfed.ServerName("127.0.0.1:"+ports[2])
		size := prepareBigRoom(b, room, resident, filepath.Join(there, "homeserver.db"))
		knowKeys(b, room, joiner, filepath.Join(here, "homeserver.db"))
		a := startProcess(b, ca, there, ports[:2])
		j := startProcess(b, ca, here, ports[2:])

		began := time.Now()
		phone := &phone{base: j.base}
		_, got, err := phone.request(b.Context(), "POST", "v3/register", answer{"username": "bob", "auth": answer{"type": "m.login.dummy"}})
		require.NoError(b, err)
		phone.token = fmt.Sprint(got["access_token"])
		status, got, err := phone.request(b.Context(), "POST", "v3/join/"+url.PathEscape(room.ID)+"?server_name="+string(resident), answer{})
		require.NoError(b, err)
		require.Equal(b, 200, status, "%v", got)
		b.ReportMetric(time.Since(began).Seconds(), "s-until-joined")
		waitWhole(b, joiner, filepath.Join(here, "homeserver.db"), mxfed.RoomID(room.ID), members)
		b.ReportMetric(time.Since(began).Seconds(), "s-until-whole")
		b.ReportMetric(float64(size)/1e6, "MB-of-state")
		b.ReportMetric(peakMemory(b, a.Pid), "MB-peak-resident")
		b.ReportMetric(peakMemory(b, j.Pid), "MB-peak-joiner")
	}
}

// prepareBigRoom makes a database of a server that is in the room, and returns the size of the room's state.
func prepareBigRoom(b *testing.B, big *synthroom.Room, name mxfed.ServerName, file string) (size int) {
	b.Helper()
	s, err := openServer(b.Context(), settings{Name: name, Database: file})
	require.NoError(b, err)
	defer s.close()
	result, id := &mxfed.JoinResult{}, mxfed.RoomID(big.ID)
	require.NoError(b, s.takeIn(b.Context(), id, func(k *intake) (map[mxfed.EventID]error, error) {
		for _, pdu := range big.State {
			if result.Event, err = mxfed.ParseEvent(synthroom.Version, pdu); err != nil {
				return nil, err
			}
			if err := k.take(b.Context(), result.Event, true); err != nil {
				return nil, err
			}
			size += len(pdu)
		}
		return nil, nil
	}, func(t *tx, k *intake) error { return t.enter(k, result) }))
	in, _, err := s.register(b.Context(), "resident", "")
	require.NoError(b, err)
	const door = "a server has to be in a room before its users can be"
	require.NoError(b, s.db.exec(b.Context(), `INSERT INTO state VALUES (?, 'm.room.member', ?, '', 'join', ?, 0, ?)`, id, door, name, int64(forever)))
	_, err = s.sendMember(b.Context(), in.User, id, in.User, "join", nil)
	require.NoError(b, err)
	require.NoError(b, s.db.exec(b.Context(), `DELETE FROM state WHERE state_key = ?`, door))
	return size
}

// knowKeys has a server know the keys of all others, which exist in name only.
func knowKeys(b *testing.B, room *synthroom.Room, name mxfed.ServerName, file string) {
	b.Helper()
	s, err := openServer(b.Context(), settings{Name: name, Database: file})
	require.NoError(b, err)
	defer s.close()
	var keys []mxfed.Key
	for _, server := range room.Servers {
		keys = append(keys, mxfed.Key{Server: mxfed.ServerName(server), ID: synthroom.KeyID, Public: synthroom.Key(server).Public().(ed25519.PublicKey),
			ValidUntil: time.Now().Add(24 * time.Hour)})
	}
	require.NoError(b, (&keyStore{s.db}).SaveKeys(b.Context(), keys))
}

// waitWhole waits until all members are in the room's current state.
func waitWhole(b *testing.B, name mxfed.ServerName, file string, id mxfed.RoomID, members int) {
	b.Helper()
	db, err := openDatabase(b.Context(), file, name, testLog())
	require.NoError(b, err)
	defer db.close()
	for n := 0; n < members; time.Sleep(50 * time.Millisecond) {
		require.NoError(b, db.view(context.Background(), func(t *tx) error {
			n, _ = one[int](t, `SELECT count(*) FROM state WHERE room = ? AND until = ?`, id, int64(forever))
			return nil
		}))
	}
}

// peakMemory is the largest resident set of a process, in MB.
func peakMemory(b *testing.B, pid int) (mb float64) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(b, err)
	_, after, _ := strings.Cut(string(text), "VmHWM:")
	_, err = fmt.Sscan(after, &mb)
	require.NoError(b, err)
	return mb / 1e3
}
