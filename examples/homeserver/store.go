package main

import (
	"encoding/json"
	"slices"
	"strings"

	"example.org/mxfed"
)

// This file stores events and says what follows from them: the ends of a room's graph, its state, and whom to tell.

// The values of events.status.
const (
	statusAccepted = iota
	statusSoftFailed
	statusRejected
	statusAnother // never stored: what is known is about another event
)

// room is a room that this server is or was in, in a transaction.
type room struct {
	ID      mxfed.RoomID
	Version mxfed.RoomVersion
	Now     int64 // the current state is that of this position
	Entered int64 // the position of the state that another server told
	Partial string
}

// partly lists servers that know the members of a room that was joined without them; none: it is whole.
func (r *room) partly() (servers []mxfed.ServerName) {
	if r.Partial != "" {
		json.Unmarshal([]byte(r.Partial), &servers) // as it was written here
	}
	return servers
}

// room reads a room, nil if there is none.
func (t *tx) room(id mxfed.RoomID) *room {
	r, found := one[room](t, `SELECT r.id, r.version, s.position AS now, r.entered, r.partial FROM rooms r, stream s WHERE r.id = ?`, id)
	if !found {
		return nil
	}
	return &r
}

// roomEvent is an event as it is stored.
type roomEvent struct {
	*mxfed.Event
	// Position is where the event stands in the stream of all that this server has accepted; 0 for one that came as part of
	// a state.
	Position int64
	// Replaced is the entry that a state event took the place of, nil if there was none.
	Replaced *mxfed.Event
	// Device and Txn are those of message, for the sender's own device.
	Device, Txn string

	status        int
	before, after snapshot // states of the room, if it has a position
}

// stored reads events.
func (t *tx) stored(condition string, args ...any) (events []*roomEvent) {
	rows := list[struct {
		Version                                        mxfed.RoomVersion
		JSON, Differs, Replaced, Previous, Device, Txn string
		Status                                         int
		Position, Base                                 int64
	}](t, `SELECT r.version, e.json, e.status, e.position, e.base, e.differs, e.replaced, COALESCE(p.json, '') AS previous, e.device, e.txn
		FROM events e JOIN rooms r ON r.id = e.room LEFT JOIN events p ON p.id = e.replaced WHERE `+condition, args...)
	for _, row := range rows {
		e := &roomEvent{Event: t.parse(row.Version, row.JSON), Replaced: t.parse(row.Version, row.Previous), Position: row.Position,
			Device: row.Device, Txn: row.Txn, status: row.Status, after: t.decode(row.Base, row.Differs)}
		e.before = e.after
		if _, isState := e.StateKey(); isState && e.status != statusRejected {
			e.before = e.after.with(keyOf(e.Event), mxfed.EventID(row.Replaced))
		}
		events = append(events, e)
	}
	return events
}

// parse reads an event that is stored, nil if there is none.
func (t *tx) parse(version mxfed.RoomVersion, text string) *mxfed.Event {
	if text == "" {
		return nil
	}
	e, err := mxfed.ParseEvent(version, []byte(text))
	if err != nil {
		t.fail(err)
	}
	return e
}

// events reads events by ID; those that are not known are left out.
func (t *tx) events(names ...mxfed.EventID) (events []*mxfed.Event) {
	for names := range slices.Chunk(names, batch) {
		for _, e := range t.stored(`e.id IN (?)`, names) {
			events = append(events, e.Event)
		}
	}
	return events
}

// placed returns an event that has its place in the room; nil if there is none.
func (t *tx) placed(id mxfed.RoomID, event mxfed.EventID) *roomEvent {
	found := t.stored(`e.id = ? AND e.room = ? AND e.position > 0`, event, id)
	if len(found) == 0 {
		return nil
	}
	return found[0]
}

// accepted reads those of names that the room has accepted, soft-failed ones included, and the event that is being checked
// if it is part of the room.
func (t *tx) accepted(id mxfed.RoomID, names []mxfed.EventID, checked mxfed.EventID) (events []*mxfed.Event) {
	for names := range slices.Chunk(append(slices.Clone(names), checked), batch) {
		for _, e := range t.stored(`e.id IN (?) AND e.room = ?`, names, id) {
			if e.status == statusAccepted || e.status == statusSoftFailed && e.ID() != checked {
				events = append(events, e.Event)
			}
		}
	}
	return events
}

// maxPrev is how many events one event can follow.
const maxPrev = 20

// latest reads forward extremities: all if one event can follow them all. Else those are chosen that stand for the current
// state under keys, by which an event is about to be judged, and others at random, so that all are followed soon.
func (t *tx) latest(r *room, keys []mxfed.StateKey) []*mxfed.Event {
	ends := t.stored(`e.room = ? AND e.latest = 1 ORDER BY random()`, r.ID)
	if len(ends) > maxPrev {
		now := t.read(r, keys, snapshot{base: r.Now})[0]
		for k := range keys { // the first end that says what the current state says comes to the front
			i := slices.IndexFunc(ends, func(e *roomEvent) bool { return t.read(r, keys[k:k+1], e.after)[0][0] == now[k] })
			if i > 0 {
				end := ends[i]
				ends = slices.Insert(slices.Delete(ends, i, i+1), 0, end)
			}
		}
		ends = ends[:maxPrev]
	}
	events := make([]*mxfed.Event, len(ends))
	for i, e := range ends {
		events[i] = e.Event
	}
	return events
}

// hasServer tells whether a server has a joined user in the room.
func (t *tx) hasServer(id mxfed.RoomID, name mxfed.ServerName) bool {
	_, has := one[int](t, `SELECT 1 FROM state WHERE room = ? AND server = ? AND membership = 'join' AND until = 9223372036854775807 LIMIT 1`, id, name)
	return has
}

// servers are those that had joined users at a position.
func (t *tx) servers(id mxfed.RoomID, at int64) []mxfed.ServerName {
	return list[mxfed.ServerName](t, `SELECT DISTINCT server FROM state WHERE room = ? AND server <> '' AND membership = 'join' AND since <= ? AND until > ?
		ORDER BY server`, id, at, at)
}

// advance takes the next position of the stream. Whoever else wants one waits until this transaction has ended, so that
// positions become visible in order. It must be the last lock that a transaction takes.
func (t *tx) advance() int64 {
	t.moved = true
	position, _ := one[int64](t, `UPDATE stream SET position = position + 1 RETURNING position`)
	return position
}

// storable refuses what PostgreSQL cannot hold: U+0000 in text.
func storable(e *mxfed.Event) error {
	if k := keyOf(e); strings.ContainsRune(k.Type+k.Key+string(e.ID()), 0) {
		return &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "U+0000 in an event type or state key"}
	}
	return nil
}

// addition is an event on its way into a room.
type addition struct {
	event  *mxfed.Event
	before snapshot // the state that it was sent in
	status int
	// device and txn are those of a local user's request.
	device, txn string
	// toAll: this server tells the room's servers.
	toAll bool
}

// maxDiffers bounds what has to be stored with an event of a branch: one that long is not taken up again.
const maxDiffers = 20_000

// add stores an event that has been judged, as the newest of its room. Once it is in, the room's ends and state are what
// they are with it, and the servers to be told are noted down. The caller holds the room.
func (t *tx) add(r *room, a *addition) error {
	e := a.event
	if err := storable(e); err != nil {
		return err
	}
	if len(a.before.differs) > maxDiffers {
		return &mxfed.Error{Code: mxfed.ErrTooLarge, Message: "the event knows too little of the room"}
	}
	for _, same := range t.events(e.ID()) { // where senders give IDs, it may be another event
		if err := e.Check(&mxfed.Room{Version: r.Version, Events: []*mxfed.Event{same}}); err != nil {
			return err
		}
	}
	t.exec(`INSERT INTO events (id, room, sender, auth, json, status, device, txn) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET json = excluded.json, status = excluded.status`, // it may have come as part of a state
		e.ID(), r.ID, e.Sender(), authJSON(e), string(e.JSON()), a.status, a.device, a.txn)
	after, replaced := a.before, mxfed.EventID("")
	if _, isState := e.StateKey(); isState && a.status != statusRejected {
		replaced, after = t.read(r, []mxfed.StateKey{keyOf(e)}, a.before)[0][0], a.before.with(keyOf(e), e.ID())
	}
	latest, alone := 0, false
	var changes map[mxfed.StateKey]mxfed.EventID
	if a.status == statusAccepted && t.follow(r, e) {
		beside := t.ends(r) // without e, which has no place yet
		latest, alone = 1, len(beside) == 0
		changes = t.changesTo(r, t.resolve(r, append(t.statesAfter(r, beside), after)))
	}
	before := r.Now
	if r.Now = t.advance(); alone { // the state after the event is the room's
		after = snapshot{base: r.Now}
	}
	t.exec(`UPDATE events SET position = ?, base = ?, differs = ?, replaced = ?, latest = ? WHERE id = ?`, r.Now, after.base, after.encoded(), replaced,
		latest, e.ID())
	if a.toAll { // whoever was in the room before hears of it too
		t.post(r, e, before)
	}
	t.change(r, changes)
	return nil
}

func authJSON(e *mxfed.Event) string { return string(asJSON(append([]mxfed.EventID{}, e.Auth()...))) }

// follow has those that an event follows be no forward extremities any more, and tells whether the event becomes one: not if
// others follow it already.
func (t *tx) follow(r *room, e *mxfed.Event) bool {
	for _, id := range e.Prev() {
		t.exec(`INSERT INTO followed VALUES (?, ?) ON CONFLICT DO NOTHING`, r.ID, id)
		t.exec(`UPDATE events SET latest = 0 WHERE id = ? AND room = ?`, id, r.ID)
	}
	_, followed := one[int](t, `SELECT 1 FROM followed WHERE room = ? AND event = ?`, r.ID, e.ID())
	return !followed
}

// changesTo tells how a state differs from the current one.
func (t *tx) changesTo(r *room, s snapshot) map[mxfed.StateKey]mxfed.EventID {
	keys := t.changeable(r, []snapshot{s})
	said := t.read(r, keys, snapshot{base: r.Now}, s)
	return differences(keys, said[0], said[1])
}

// change sets entries of the room's state as of r.Now.
func (t *tx) change(r *room, changes map[mxfed.StateKey]mxfed.EventID) {
	for k, id := range changes {
		t.exec(`UPDATE state SET until = ? WHERE room = ? AND type = ? AND state_key = ? AND until = ?`, r.Now, r.ID, k.Type, k.Key, int64(forever))
		for _, e := range t.events(id) {
			t.exec(`INSERT INTO state VALUES (?, ?, ?, ?, ?, ?, ?, ?)`, r.ID, k.Type, k.Key, id, e.Membership(), aboutServer(e), r.Now, int64(forever))
		}
	}
}

// aboutServer is the server of the user whom a member event is about.
func aboutServer(e *mxfed.Event) mxfed.ServerName {
	if e.Type() == "m.room.member" {
		return mxfed.UserID(keyOf(e).Key).Server()
	}
	return ""
}

// post notes down whom to send an event to: all servers that were in the room at a position, and that of a user whom it is
// about.
func (t *tx) post(r *room, e *mxfed.Event, at int64) {
	targets := append(t.servers(r.ID, at), r.partly()...)
	if e.Membership() != "invite" { // which has been there
		targets = append(targets, aboutServer(e))
	}
	slices.Sort(targets)
	for _, name := range slices.Compact(targets) {
		if name != "" && name != t.db.own && name != e.Sender().Server() {
			t.exec(`INSERT INTO outbox VALUES (?, ?, ?)`, name, r.Now, e.ID())
			t.exec(`INSERT INTO destinations (name) VALUES (?) ON CONFLICT DO NOTHING`, name)
		}
	}
}
