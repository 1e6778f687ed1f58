package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"example.org/mxfed"
)

// This file brings states of other servers' rooms in: to join a room, or to bridge a gap in its graph. What arrives is stored
// at once, batch by batch, apart from all that is proven; one transaction makes it part of the room.

// joinTime is how long events of a room wait for a join that may still be under way.
const joinTime = time.Minute

// joinRoom joins through this server if it is in the room, else through one of via, those that an invite came from, or that
// of the room ID. content holds reason and the like, or nothing; the profile is added.
func (s *server) joinRoom(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, via []mxfed.ServerName, content json.RawMessage) error {
	here, err := s.here(ctx, id)
	switch {
	case err != nil:
		return err
	case here:
		_, err := s.sendMember(ctx, user, id, user, "join", content)
		return err
	}
	if err := s.joinThrough(ctx, user, id, via, content); err != nil {
		return err
	}
	return s.awaitMembers(ctx, id)
}

// patience is how long a join waits for the members of a room, which arrive even if nobody waits.
const patience = 5 * time.Second

// awaitMembers waits until a room is whole, but not for ever.
func (s *server) awaitMembers(ctx context.Context, id mxfed.RoomID) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		heard := s.db.wake.heard()
		r, err := query(ctx, s.db, func(t *tx) *room { return t.room(id) })
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil || r == nil || r.Partial == "":
			return err
		}
		wait(ctx, heard, patience)
	}
}

// joinThrough joins through another server.
func (s *server) joinThrough(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, via []mxfed.ServerName, content json.RawMessage) error {
	content, err := s.memberContent(ctx, user, content, "join")
	if err != nil {
		return err
	}
	m, err := query(ctx, s.db, func(t *tx) *membership { return t.membership(user, id) })
	if err == nil {
		err = s.db.exec(ctx, `INSERT INTO joining VALUES (?, ?) ON CONFLICT (room) DO UPDATE SET until = excluded.until`, id, now()+joinTime.Milliseconds())
	}
	if err != nil {
		return err
	}
	if m != nil {
		via = append(via, m.via...)
	}
	var result *mxfed.JoinResult
	ask := func(k *intake) (map[mxfed.EventID]error, error) {
		result, err = s.fed.Client().Join(ctx, &mxfed.JoinRequest{Room: id, User: user, Via: append(via, namedBy(id)...), Content: content, OmitMembers: true,
			Sink: func(e *mxfed.Event, entry bool) error { return k.take(ctx, e, entry) }, Progress: k.progress})
		if err != nil {
			return nil, err
		}
		return result.Dropped, nil
	}
	return s.takeIn(ctx, id, ask, func(t *tx, k *intake) error { return t.enter(k, result) })
}

// intake stores what a fetched state is made of.
type intake struct {
	*server
	name string // of its rows in incoming
	room mxfed.RoomID
	rows map[mxfed.EventID]*incomingRow // not written yet
	done progress
	tell func(progress)
}

// incomingRow is a row of incoming.
type incomingRow struct {
	Intake     string
	ID         mxfed.EventID
	Room       mxfed.RoomID
	Type       string
	StateKey   string `db:"state_key"`
	Membership string
	Server     mxfed.ServerName
	Sender     mxfed.UserID
	Auth       string
	JSON       string
	Entry      int
	Received   int64
}

// takeIn has ask fetch a state, and then use make something of it in one transaction, in which the room is held and all
// events are stored that ask did not say to drop.
func (s *server) takeIn(ctx context.Context, id mxfed.RoomID, ask func(*intake) (dropped map[mxfed.EventID]error, err error),
	use func(*tx, *intake) error) error {
	k := &intake{server: s, name: rand.Text(), room: id, rows: make(map[mxfed.EventID]*incomingRow), tell: s.progress(id)}
	dropped, err := ask(k)
	if err == nil {
		err = k.flush(ctx)
	}
	if err == nil {
		err = s.db.update(ctx, id, func(t *tx) error {
			for id := range dropped {
				t.exec(`DELETE FROM incoming WHERE intake = ? AND id = ?`, k.name, id)
			}
			t.exec(`INSERT INTO events (id, room, sender, auth, json, status) SELECT id, room, sender, auth, json, 0 FROM incoming WHERE intake = ?
				ON CONFLICT (id) DO NOTHING`, k.name)
			return use(t, k)
		})
	}
	k.done.Done, k.done.Dropped, k.done.Err = true, len(dropped), err
	k.tell(k.done)
	k.clean(context.WithoutCancel(ctx))
	return err
}

// take stores one event, which may be an entry of the state, sooner or later.
func (k *intake) take(ctx context.Context, e *mxfed.Event, entry bool) error {
	if storable(e) != nil {
		k.log.Warn("event cannot be stored", "room", k.room, "event", e.ID())
		return nil
	}
	row := &incomingRow{k.name, e.ID(), k.room, e.Type(), keyOf(e).Key, e.Membership(), aboutServer(e), e.Sender(), authJSON(e), string(e.JSON()), 0, now()}
	if old := k.rows[e.ID()]; entry || old != nil && old.Entry == 1 {
		row.Entry = 1
	}
	k.rows[e.ID()] = row
	if k.done.Events++; len(k.rows) < batch {
		return nil
	}
	return k.flush(ctx)
}

// flush writes a batch.
func (k *intake) flush(ctx context.Context) error {
	rows := slices.Collect(maps.Values(k.rows))
	clear(k.rows)
	return k.db.update(ctx, "", func(t *tx) error {
		for rows := range slices.Chunk(rows, rowBatch) {
			_, err := t.NamedExecContext(ctx, `INSERT INTO incoming (intake, id, room, type, state_key, membership, server, sender, auth, json, entry, received)
				VALUES (:intake, :id, :room, :type, :state_key, :membership, :server, :sender, :auth, :json, :entry, :received)
				ON CONFLICT (intake, id) DO UPDATE SET json = excluded.json, entry = CASE WHEN incoming.entry = 1 THEN 1 ELSE excluded.entry END`, rows)
			if err != nil {
				t.fail(err)
			}
		}
		return nil
	})
}

// fetchState takes the state before an event in.
func (k *intake) fetchState(ctx context.Context, req *mxfed.StateRequest) (dropped map[mxfed.EventID]error, err error) {
	req.Sink, req.Progress = func(e *mxfed.Event) error { return k.take(ctx, e, false) }, k.progress
	result, err := k.fed.Client().FetchState(ctx, req)
	if err == nil {
		err = k.flush(ctx)
	}
	if err != nil {
		return nil, err
	}
	return result.Dropped, k.db.update(ctx, "", func(t *tx) error {
		for names := range slices.Chunk(result.StateIDs, batch) {
			t.exec(`UPDATE incoming SET entry = 1 WHERE intake = ? AND id IN (?)`, k.name, names)
		}
		return nil
	})
}

func (k *intake) progress(via mxfed.ServerName, _ int, bytes int64) {
	k.done.Via, k.done.Bytes = via, bytes
	k.tell(k.done)
}

// clean throws away what has been taken in, here or by a process that died.
func (k *intake) clean(ctx context.Context) {
	err := k.db.update(ctx, "", func(t *tx) error {
		t.exec(`DELETE FROM joining WHERE room = ?`, k.room)
		t.exec(`DELETE FROM incoming WHERE intake = ? OR received < ?`, k.name, now()-(24*time.Hour).Milliseconds())
		return nil
	})
	if err != nil {
		k.log.Warn("what was taken in is not cleaned up", "room", k.room, "err", err)
	}
}

// enter makes a room of what a join has brought. What this server knew of the room when it was in it before stays, but the
// join is the one end of its graph. If another user's join was faster, this one joins the graph as it is.
func (t *tx) enter(k *intake, result *mxfed.JoinResult) error {
	join := result.Event
	if old := t.room(k.room); old != nil && old.Version != join.Version() { // its server has made it anew
		return &mxfed.Error{Code: mxfed.ErrIncompatibleRoomVersion, Message: "the room was of another version", RoomVersion: join.Version()}
	}
	t.exec(`INSERT INTO rooms (id, version) VALUES (?, ?) ON CONFLICT DO NOTHING`, k.room, join.Version())
	r := cmp.Or(t.room(k.room), &room{})
	if t.hasServer(k.room, t.db.own) {
		return t.add(r, &addition{event: join, before: t.fetchedState(r, k)})
	}
	r.Now = t.advance()
	t.exec(`UPDATE state SET until = ? WHERE room = ? AND until = ? AND event NOT IN (SELECT id FROM incoming WHERE intake = ? AND entry = 1)`,
		r.Now, r.ID, int64(forever), k.name)
	t.exec(`INSERT INTO state SELECT i.room, i.type, i.state_key, i.id, i.membership, i.server, CAST(? AS BIGINT), CAST(? AS BIGINT) FROM incoming i
		WHERE i.intake = ? AND i.entry = 1 AND NOT EXISTS (SELECT 1 FROM state s WHERE s.room = i.room AND s.type = i.type
			AND s.state_key = i.state_key AND s.until = ?)`,
		r.Now, int64(forever), k.name, int64(forever))
	t.exec(`UPDATE events SET latest = 0 WHERE room = ? AND latest = 1`, r.ID)
	if len(result.Servers) > 0 {
		r.Partial = string(asJSON(append([]mxfed.ServerName{result.Via}, result.Servers...)))
	}
	t.exec(`UPDATE rooms SET entered = ?, partial = ?, completed = 0, held_until = 0 WHERE id = ?`, r.Now, r.Partial, r.ID)
	return t.add(r, &addition{event: join, before: snapshot{base: r.Now}})
}

// fetchedState is a fetched state, told by how it differs from the current one.
func (t *tx) fetchedState(r *room, k *intake) snapshot {
	s := snapshot{base: r.Now, differs: make(map[mxfed.StateKey]mxfed.EventID)}
	rows := list[entryRow](t, `SELECT type, state_key, '' AS event FROM state WHERE room = ? AND until = ?
			AND event NOT IN (SELECT id FROM incoming WHERE intake = ? AND entry = 1)
		UNION ALL SELECT i.type, i.state_key, i.id FROM incoming i WHERE i.intake = ? AND i.entry = 1
			AND i.id NOT IN (SELECT event FROM state WHERE room = ? AND until = ?)
		ORDER BY 3`, r.ID, int64(forever), k.name, k.name, r.ID, int64(forever))
	for _, row := range rows { // what is not set comes first
		s.differs[row.key()] = row.Event
	}
	return s
}

// completeTime is how long a process has to fetch the members of a room before another one tries, or it does again.
const completeTime = time.Minute

// completeRooms fetches the members of rooms that were joined without them, until ctx ends. It goes on with what a process
// has left that died.
func (s *server) completeRooms(ctx context.Context) error {
	due := func(t *tx) []mxfed.RoomID {
		return list[mxfed.RoomID](t, `SELECT id FROM rooms WHERE partial <> '' AND held_until < ?`, now())
	}
	return work(ctx, s, due, func(id mxfed.RoomID) {
		if err := s.complete(ctx, id); err != nil && ctx.Err() == nil {
			s.log.Warn("room is not complete yet", "room", id, "err", err)
		}
	})
}

// complete fetches the whole state before the join by which this server came into a room.
func (s *server) complete(ctx context.Context, id mxfed.RoomID) error {
	var req *mxfed.StateRequest
	err := s.db.update(ctx, id, func(t *tx) error {
		req = nil
		if t.exec(`UPDATE rooms SET held_until = ? WHERE id = ? AND partial <> '' AND held_until < ?`, now()+completeTime.Milliseconds(), id, now()) {
			r := t.room(id)
			for _, join := range t.stored(`e.room = ? AND e.position > 0 AND e.position = ?`, id, r.Entered+1) {
				req = &mxfed.StateRequest{Event: join.Event, Via: r.partly()}
			}
		}
		return nil
	})
	if err != nil || req == nil {
		return err
	}
	return s.takeIn(ctx, id, func(k *intake) (map[mxfed.EventID]error, error) { return k.fetchState(ctx, req) }, func(t *tx, k *intake) error {
		t.complete(k)
		return nil
	})
}

// complete adds members to the room's state at the time of the join, and so to all states since. What was accepted
// meanwhile, by what each event said of its sender, is judged again.
func (t *tx) complete(k *intake) {
	r := t.room(k.room)
	if r == nil || r.Partial == "" {
		return
	}
	r.Now, r.Partial = t.advance(), ""
	t.exec(`INSERT INTO state SELECT i.room, i.type, i.state_key, i.id, i.membership, i.server, CAST(? AS BIGINT),
			COALESCE((SELECT min(n.since) FROM state n WHERE n.room = i.room AND n.type = i.type AND n.state_key = i.state_key AND n.since > ?), CAST(? AS BIGINT))
		FROM incoming i WHERE i.intake = ? AND i.entry = 1 AND NOT EXISTS (SELECT 1 FROM state s WHERE s.room = i.room AND s.type = i.type
			AND s.state_key = i.state_key AND s.since <= ? AND s.until > ?)`, r.Entered, r.Entered, int64(forever), k.name, r.Entered, r.Entered)
	t.exec(`UPDATE rooms SET partial = '', completed = ? WHERE id = ?`, r.Now, r.ID)
	for _, e := range t.stored(`e.room = ? AND e.position > 0 AND e.position > ? AND e.status = ? ORDER BY e.position`, r.ID, r.Entered+1, statusAccepted) {
		if status, _ := t.judge(r, e.Event, e.before); status == statusRejected {
			t.expel(r, e)
		}
	}
}

// expel rejects an event that was accepted. What it replaced holds again, and what it followed can be followed
// again, even if others do already.
func (t *tx) expel(r *room, e *roomEvent) {
	if t.exec(`UPDATE events SET latest = 0 WHERE id = ? AND latest = 1`, e.ID()) {
		t.exec(`UPDATE events SET latest = 1 WHERE room = ? AND position > 0 AND status = ? AND id IN (?)`, r.ID, statusAccepted, e.Prev())
	}
	t.exec(`UPDATE events SET status = ? WHERE id = ?`, statusRejected, e.ID())
	for _, was := range list[entryRow](t, `SELECT type, state_key, since, until FROM state WHERE room = ? AND event = ?`, r.ID, e.ID()) {
		t.exec(`DELETE FROM state WHERE room = ? AND event = ?`, r.ID, e.ID())
		t.exec(`UPDATE state SET until = ? WHERE room = ? AND type = ? AND state_key = ? AND until = ?`, was.Until, r.ID, was.Type, was.StateKey, was.Since)
	}
}
