package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"example.org/mxfed"
)

// This file brings rooms of other servers in. What arrives is stored at once, batch by batch, as not proven; one
// transaction makes a room of it when it is, or throws it away.

// joinRoom joins through this server if it is in the room, else through one of via, those that an invite came from, or that
// of the room ID. content holds reason and the like, or nothing; the profile is added.
func (s *server) joinRoom(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, via []mxfed.ServerName, content json.RawMessage) error {
	if err := s.db.update(ctx, "", func(t *tx) error {
		return t.exec(`INSERT INTO rooms (id) VALUES ($1) ON CONFLICT DO NOTHING`, id)
	}); err != nil {
		return err
	}
	for {
		if here, err := s.here(ctx, id); err != nil || here {
			if err == nil {
				err = s.joinHere(ctx, user, id, content)
			}
			return err
		}
		held, err := s.db.hold(ctx, "rooms", "id", string(id), func(ctx context.Context) error {
			return s.joinThrough(ctx, user, id, via, content)
		})
		if held || err != nil {
			return firstOf(err, s.completed(ctx, id))
		}
		if sleep(ctx, 200*time.Millisecond); ctx.Err() != nil { // another user is just joining
			return ctx.Err()
		}
	}
}

// leaseTime is how long a process that has died holds what it held.
const leaseTime = 15 * time.Second

// hold runs f while no other process, and no other call of this one, does the same for a row with a held_until column; held
// is false if one does.
func (db *database) hold(ctx context.Context, table, key, value string, f func(context.Context) error) (held bool, err error) {
	set := `UPDATE ` + table + ` SET held_until = $2 WHERE ` + key + ` = $1`
	now := func() int64 { return time.Now().UnixMilli() }
	err = db.update(ctx, "", func(t *tx) error {
		held, err = t.changes(set+` AND held_until < $3`, value, now()+leaseTime.Milliseconds(), now())
		return err
	})
	if err != nil || !held {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var renewing sync.WaitGroup
	renewing.Go(func() {
		for sleep(ctx, leaseTime/3); ctx.Err() == nil; sleep(ctx, leaseTime/3) {
			if err := db.update(ctx, "", func(t *tx) error { return t.exec(set, value, now()+leaseTime.Milliseconds()) }); err != nil && ctx.Err() == nil {
				db.log.Warn("lease not renewed", "of", value, "err", err)
			}
		}
	})
	defer func() {
		cancel()
		renewing.Wait()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseTime)
		defer cancel()
		if freed := db.update(ctx, "", func(t *tx) error { return t.exec(set, value, 0) }); freed != nil {
			db.log.Warn("lease not given back", "of", value, "err", freed)
		}
	}()
	return true, f(ctx)
}

// joinThrough joins through another server.
func (s *server) joinThrough(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, via []mxfed.ServerName, content json.RawMessage) error {
	content, err := s.memberContent(ctx, user, content, "join")
	if err != nil {
		return err
	}
	err = s.db.view(ctx, func(t *tx) error {
		m, err := t.membership(user, id)
		if m != nil {
			via = append(via, m.via...)
		}
		return err
	})
	if err != nil {
		return err
	}
	taken := &intake{server: s, room: id}
	if err := taken.discard(ctx); err != nil { // what a process has left that died
		return err
	}
	result, err := s.fed.Client().Join(ctx, &mxfed.JoinRequest{Room: id, User: user, Via: append(via, namedBy(id)...), Content: content, OmitMembers: true,
		Sink: func(e *mxfed.Event, entry bool) error { return taken.take(ctx, e, entry) }, Progress: taken.progress})
	if err == nil {
		err = taken.flush(ctx)
	}
	if err == nil {
		err = s.enter(ctx, result)
	}
	if err != nil {
		s.progress(progress{Room: id, Done: true, Err: err})
		taken.discard(context.WithoutCancel(ctx)) // the next join does it otherwise
		return err
	}
	s.progress(progress{Room: id, Via: result.Via, Events: taken.count, Bytes: taken.bytes, Dropped: len(result.Dropped), Done: true})
	return nil
}

// intake stores what a fetched state is made of.
type intake struct {
	*server
	room  mxfed.RoomID
	rows  map[mxfed.EventID][]any
	via   mxfed.ServerName
	count int
	bytes int64
}

// take stores one event, which may be an entry of the state, sooner or later.
func (k *intake) take(ctx context.Context, e *mxfed.Event, entry bool) error {
	if storable(e) != nil {
		k.log.Warn("event cannot be stored", "room", k.room, "event", e.ID())
		return nil
	}
	staged := 1
	if entry {
		staged = 2
	}
	if k.rows == nil {
		k.rows = make(map[mxfed.EventID][]any, batch)
	}
	if old := k.rows[e.ID()]; old != nil {
		staged = max(staged, old[11].(int))
	}
	k.rows[e.ID()] = description(e, statusStaged, staged)
	k.count++
	if len(k.rows) < batch {
		return nil
	}
	return k.flush(ctx)
}

// flush writes a batch.
func (k *intake) flush(ctx context.Context) error {
	if len(k.rows) == 0 {
		return nil
	}
	rows := slices.Collect(maps.Values(k.rows))
	clear(k.rows)
	return k.db.update(ctx, "", func(t *tx) error {
		for rows := range slices.Chunk(rows, rowBatch) {
			var args []any
			err := t.exec(fmt.Sprintf(`INSERT INTO events (`+columns+`) VALUES `+tuples(&args, rows...)+` ON CONFLICT (id) DO UPDATE SET
				staged = CASE WHEN excluded.staged > events.staged THEN excluded.staged ELSE events.staged END,
				json = CASE WHEN events.status = %d THEN excluded.json ELSE events.json END`, statusStaged), args...)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (k *intake) progress(via mxfed.ServerName, _ int, bytes int64) {
	k.via, k.bytes = via, bytes
	k.server.progress(progress{Room: k.room, Via: via, Events: k.count, Bytes: bytes})
}

// discard throws away what has been taken.
func (k *intake) discard(ctx context.Context) error {
	clear(k.rows)
	return k.db.update(ctx, string(k.room), func(t *tx) error {
		if err := t.exec(fmt.Sprintf(`DELETE FROM events WHERE room = $1 AND staged > 0 AND status = %d`, statusStaged), k.room); err != nil {
			return err
		}
		return t.exec(`UPDATE events SET staged = 0 WHERE room = $1 AND staged > 0`, k.room)
	})
}

// drop takes back events that were not proven.
func (t *tx) drop(dropped map[mxfed.EventID]error) error {
	for id := range dropped {
		if err := t.exec(fmt.Sprintf(`DELETE FROM events WHERE id = $1 AND status = %d`, statusStaged), id); err != nil {
			return err
		}
		if err := t.exec(`UPDATE events SET staged = 0 WHERE id = $1`, id); err != nil {
			return err
		}
	}
	return nil
}

// wholeGroup makes a group of the entries that have been taken in.
func (t *tx) wholeGroup(id mxfed.RoomID) (int64, error) {
	group, err := t.newGroup(id, 0, 0)
	if err == nil {
		err = t.exec(`INSERT INTO state_entries SELECT CAST($2 AS BIGINT), type, state_key, id FROM events WHERE room = $1 AND staged = 2`, id, group)
	}
	return group, err
}

// acceptStaged makes all that has been taken in, and proven, part of the room.
func (t *tx) acceptStaged(id mxfed.RoomID) error {
	return t.exec(fmt.Sprintf(`UPDATE events SET staged = 0, status = %d WHERE room = $1 AND staged > 0`, statusAccepted), id)
}

// enter makes a room of what a join has brought. What this server knew of the room when it was in it before stays, but the
// join is the one end of its graph.
func (s *server) enter(ctx context.Context, result *mxfed.JoinResult) error {
	join := result.Event
	return s.db.update(ctx, string(join.RoomID()), func(t *tx) error {
		if err := t.drop(result.Dropped); err != nil {
			return err
		}
		group, err := t.wholeGroup(join.RoomID())
		if err != nil {
			return err
		}
		if err := t.acceptStaged(join.RoomID()); err != nil {
			return err
		}
		r := &room{id: join.RoomID(), version: join.Version(), partial: result.Servers}
		partial := ""
		if len(result.Servers) > 0 {
			partial = string(asJSON(append([]mxfed.ServerName{result.Via}, result.Servers...)))
		}
		if err := t.exec(`UPDATE rooms SET version = $2, partial = $3, entered = $4 WHERE id = $1`, r.id, r.version, partial, join.ID()); err != nil {
			return err
		}
		if err := t.exec(`DELETE FROM extremities WHERE room = $1`, r.id); err != nil {
			return err
		}
		return t.add(r, &addition{event: join, before: state{group: group}})
	})
}

// completeTime is how long a join waits for the members of a room, which arrive even if nobody waits.
const completeTime = 5 * time.Second

// completed waits until a room is whole, but not for ever.
func (s *server) completed(ctx context.Context, id mxfed.RoomID) error {
	ctx, cancel := context.WithTimeout(ctx, completeTime)
	defer cancel()
	for {
		heard := s.db.wake.heard()
		var r *room
		err := s.db.view(ctx, func(t *tx) (err error) {
			r, err = t.room(id)
			return err
		})
		if ctx.Err() != nil || err == nil && r.partial == nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-heard:
		case <-ctx.Done():
		}
	}
}

// completeRooms fetches the members of rooms that were joined without them, until ctx ends. It goes on with what a process
// has left that died.
func (s *server) completeRooms(ctx context.Context) error {
	var all sync.WaitGroup
	defer all.Wait()
	var running sync.Map
	for ctx.Err() == nil {
		heard := s.db.wake.heard()
		var partial []mxfed.RoomID
		err := s.db.view(ctx, func(t *tx) (err error) {
			partial, err = list[mxfed.RoomID](t, `SELECT id FROM rooms WHERE partial <> ''`)
			return err
		})
		if err != nil && ctx.Err() == nil {
			s.log.Error("partial rooms", "err", err)
		}
		for _, id := range partial {
			if _, busy := running.LoadOrStore(id, true); !busy {
				all.Go(func() {
					defer running.Delete(id)
					s.completeRoom(ctx, id)
				})
			}
		}
		wait, cancel := context.WithTimeout(ctx, leaseTime)
		select {
		case <-heard:
		case <-wait.Done():
		}
		cancel()
	}
	return nil
}

// completeRoom tries to complete a room until it is whole.
func (s *server) completeRoom(ctx context.Context, id mxfed.RoomID) {
	for wait := time.Second; ctx.Err() == nil; wait = min(2*wait, 5*time.Minute) {
		held, err := s.db.hold(ctx, "rooms", "id", string(id), func(ctx context.Context) error { return s.complete(ctx, id) })
		if held && err == nil {
			return
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("room is not complete yet", "room", id, "err", err)
		}
		if !held {
			wait = 100 * time.Millisecond // the join itself is about to end
		}
		sleep(ctx, wait)
	}
}

// complete fetches the whole state before the join and builds what has happened since on it.
func (s *server) complete(ctx context.Context, id mxfed.RoomID) error {
	var r *room
	var join *mxfed.Event
	err := s.db.view(ctx, func(t *tx) (err error) {
		if r, err = t.room(id); err == nil && r.partial != nil {
			join, err = t.event(r.version, r.entered)
		}
		return err
	})
	if err != nil || r.partial == nil {
		return err
	}
	taken := &intake{server: s, room: id}
	return taken.fetch(ctx, &mxfed.StateRequest{Event: join, Via: r.partial}, func(t *tx) error {
		if r, err = t.room(id); err != nil {
			return err
		}
		group, err := t.wholeGroup(id)
		if err != nil {
			return err
		}
		return t.rebase(r, group)
	})
}

// fetch fetches the state before an event. When all of it is stored, and its entries are marked, use makes something of it.
func (k *intake) fetch(ctx context.Context, req *mxfed.StateRequest, use func(*tx) error) error {
	if err := k.discard(ctx); err != nil {
		return err
	}
	req.Sink, req.Progress = func(e *mxfed.Event) error { return k.take(ctx, e, false) }, k.progress
	result, err := k.fed.Client().FetchState(ctx, req)
	if err == nil {
		err = k.flush(ctx)
	}
	if err == nil {
		err = k.db.update(ctx, string(k.room), func(t *tx) error {
			if err := t.drop(result.Dropped); err != nil {
				return err
			}
			for names := range slices.Chunk(result.StateIDs, batch) {
				var args []any
				if err := t.exec(`UPDATE events SET staged = 2 WHERE id IN (`+in(&args, names)+`)`, args...); err != nil {
					return err
				}
			}
			if err := use(t); err != nil {
				return err
			}
			return t.acceptStaged(k.room)
		})
	}
	if err != nil {
		k.server.progress(progress{Room: k.room, Done: true, Err: err})
		k.discard(context.WithoutCancel(ctx))
		return err
	}
	k.server.progress(progress{Room: k.room, Via: result.Via, Events: k.count, Bytes: k.bytes, Dropped: len(result.Dropped), Done: true})
	return nil
}

// rebase judges and places anew all that has been accepted since this server came into the room, on the state before that.
func (t *tx) rebase(r *room, group int64) error {
	names, err := list[mxfed.EventID](t, fmt.Sprintf(`SELECT id FROM events WHERE room = $1 AND status IN (%d, %d) AND
		position >= (SELECT position FROM events WHERE id = $2) ORDER BY position`, statusAccepted, statusSoftFailed), r.id, r.entered)
	if err != nil {
		return err
	}
	since, err := t.events(r.version, names...)
	if err != nil {
		return err
	}
	order := make(map[mxfed.EventID]int)
	for i, id := range names {
		order[id] = i
		if err := t.exec(fmt.Sprintf(`UPDATE events SET status = %d WHERE id = $1`, statusStaged), id); err != nil {
			return err
		}
	}
	slices.SortFunc(since, func(a, b *mxfed.Event) int { return order[a.ID()] - order[b.ID()] })
	if err := t.exec(`DELETE FROM extremities WHERE room = $1`, r.id); err != nil {
		return err
	}
	if err := t.exec(`UPDATE rooms SET partial = '' WHERE id = $1`, r.id); err != nil {
		return err
	}
	r.partial, r.state = nil, group
	for _, e := range since {
		if err := t.replace(r, e, group); err != nil {
			return err
		}
	}
	position, err := t.advance()
	if err != nil {
		return err
	}
	return t.moveState(r, 0, position)
}

// replace places one event anew.
func (t *tx) replace(r *room, e *mxfed.Event, group int64) error {
	a := &addition{event: e, before: state{group: group}}
	if e.ID() != r.entered { // the join was proven with the state
		before, ok, err := t.stateAfter(r, e.Prev())
		if err != nil {
			return err
		}
		if ok { // else it came after a gap, with a state of its own
			a.before = before
		} else if _, err := t.row(`SELECT state_before FROM events WHERE id = $1`, []any{e.ID()}, &a.before.group); err != nil {
			return err
		}
		if a.status, err = t.judge(r, e, a.before); err != nil && a.status == statusAccepted {
			return err
		}
	}
	return t.place(r, a)
}
