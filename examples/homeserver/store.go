package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"example.org/mxfed"
)

// This file stores events and says what follows from them: the ends of a room's graph, its state, who is in it, and whom to
// tell.

// The values of events.status.
const (
	statusAccepted = iota
	statusSoftFailed
	statusRejected
	statusStaged
)

// room is a row of rooms.
type room struct {
	id      mxfed.RoomID
	version mxfed.RoomVersion
	state   int64 // the group of the current state; 0: this server has never been in the room
	partial []mxfed.ServerName
	entered mxfed.EventID // the join by which this server came in
}

// room reads a room that this server is or was in: mxfed.ErrNotFound if there is none.
func (t *tx) room(id mxfed.RoomID) (*room, error) {
	r := &room{id: id}
	var partial string
	found, err := t.row(`SELECT version, state, partial, entered FROM rooms WHERE id = $1 AND state <> 0`, []any{id},
		&r.version, &r.state, &partial, &r.entered)
	if err == nil && !found {
		return nil, mxfed.ErrNotFound
	}
	if err == nil && partial != "" {
		err = json.Unmarshal([]byte(partial), &r.partial)
	}
	return r, err
}

// events reads events by ID; those that are not known, or not proven, are left out.
func (t *tx) events(version mxfed.RoomVersion, names ...mxfed.EventID) (events []*mxfed.Event, err error) {
	for names := range slices.Chunk(names, batch) {
		var args []any
		err := t.each(func(scan func(...any) error) error {
			var text string
			if err := scan(&text); err != nil {
				return err
			}
			e, err := mxfed.ParseEvent(version, []byte(text))
			events = append(events, e)
			return err
		}, fmt.Sprintf(`SELECT json FROM events WHERE status <> %d AND id IN (`, statusStaged)+in(&args, names)+`)`, args...)
		if err != nil {
			return nil, err
		}
	}
	return events, nil
}

// event reads one event, nil if it is not known.
func (t *tx) event(version mxfed.RoomVersion, id mxfed.EventID) (*mxfed.Event, error) {
	events, err := t.events(version, id)
	if err != nil || len(events) == 0 {
		return nil, err
	}
	return events[0], nil
}

// current reads entries of a room's current state.
func (t *tx) current(r *room, keys ...mxfed.StateKey) ([]*mxfed.Event, error) {
	return t.stateEvents(r.version, state{group: r.state}, keys)
}

// stateEvents reads entries of a state.
func (t *tx) stateEvents(version mxfed.RoomVersion, s state, keys []mxfed.StateKey) ([]*mxfed.Event, error) {
	found, err := t.entries(s, keys)
	if err != nil {
		return nil, err
	}
	names := make([]mxfed.EventID, 0, len(found))
	for _, id := range found {
		names = append(names, id)
	}
	return t.events(version, names...)
}

// maxPrev is how many events one event can follow.
const maxPrev = 20

// latest reads forward extremities: all if one event can follow them all. Else those are chosen that stand for the current
// state under keys, by which an event is about to be judged, and others at random, so that all are followed soon.
func (t *tx) latest(r *room, keys []mxfed.StateKey) ([]*mxfed.Event, error) {
	var names []mxfed.EventID
	var after []int64
	err := t.each(func(scan func(...any) error) error {
		var id mxfed.EventID
		var group int64
		err := scan(&id, &group)
		names, after = append(names, id), append(after, group)
		return err
	}, `SELECT e.id, e.state_after FROM extremities x JOIN events e ON e.id = x.event WHERE x.room = $1 ORDER BY random()`, r.id)
	if err != nil || len(names) <= maxPrev {
		return t.eventsOr(err, r.version, names)
	}
	chosen, err := t.speakers(r, keys, names, after)
	for _, id := range names {
		if len(chosen) < maxPrev && !slices.Contains(chosen, id) {
			chosen = append(chosen, id)
		}
	}
	return t.eventsOr(err, r.version, chosen)
}

func (t *tx) eventsOr(err error, version mxfed.RoomVersion, names []mxfed.EventID) ([]*mxfed.Event, error) {
	if err != nil {
		return nil, err
	}
	return t.events(version, names...)
}

// speakers chooses ends so that for each key one of them says what the current state says.
func (t *tx) speakers(r *room, keys []mxfed.StateKey, names []mxfed.EventID, after []int64) (chosen []mxfed.EventID, err error) {
	now, err := t.entries(state{group: r.state}, keys)
	if err != nil {
		return nil, err
	}
	paths, err := t.paths(after)
	if err != nil {
		return nil, err
	}
	said, err := t.lookUpAll(paths, keys)
	if err != nil {
		return nil, err
	}
	for k, id := range now {
		agrees := func(i int) bool { return said[i][k] == id }
		if slices.ContainsFunc(chosen, func(c mxfed.EventID) bool { return agrees(slices.Index(names, c)) }) {
			continue
		}
		for i, name := range names {
			if agrees(i) && len(chosen) < maxPrev {
				chosen = append(chosen, name)
				break
			}
		}
	}
	return chosen, nil
}

// hasServer tells whether a server has a joined user in the room.
func (t *tx) hasServer(id mxfed.RoomID, name mxfed.ServerName) (bool, error) {
	var one int
	return t.row(`SELECT 1 FROM current_state WHERE room = $1 AND membership = 'join' AND server = $2 LIMIT 1`, []any{id, name}, &one)
}

// servers are those that have joined users.
func (t *tx) servers(id mxfed.RoomID) ([]mxfed.ServerName, error) {
	return list[mxfed.ServerName](t, `SELECT DISTINCT server FROM current_state WHERE room = $1 AND membership = 'join' ORDER BY server`, id)
}

// advance takes the next position of the stream. Whoever else wants one waits until this transaction has ended, so that
// positions become visible in order. It must be the last lock that a transaction takes.
func (t *tx) advance() (position int64, err error) {
	t.moved = true
	_, err = t.row(`UPDATE stream SET position = position + 1 RETURNING position`, nil, &position)
	return position, err
}

// storable refuses what PostgreSQL cannot hold: U+0000 in text.
func storable(e *mxfed.Event) error {
	key, _ := e.StateKey()
	if strings.ContainsRune(e.Type()+key+string(e.ID()), 0) {
		return &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "U+0000 in an event type or state key"}
	}
	return nil
}

// addition is an event on its way into a room.
type addition struct {
	event  *mxfed.Event
	before state // the state that it was sent in
	status int
	// device and txn are those of a local user's request.
	device, txn string
	// toAll: this server tells the room's servers.
	toAll bool
}

// add stores an event that has been judged, as the newest of its room. Once it is in, the room's ends, state and members
// are what they are with it, and the servers to be told are noted down. The caller holds the room.
func (t *tx) add(r *room, a *addition) error {
	old := r.state
	if err := t.place(r, a); err != nil {
		return err
	}
	position, err := t.advance()
	if err != nil {
		return err
	}
	if err := t.exec(`UPDATE events SET position = $2 WHERE id = $1`, a.event.ID(), position); err != nil {
		return err
	}
	if a.toAll { // whoever was in the room before hears of it too
		if err := t.post(r, a.event, position); err != nil {
			return err
		}
	}
	return t.moveState(r, old, position)
}

// place gives an event its place in the room's graph, and the room the state with it.
func (t *tx) place(r *room, a *addition) error {
	if err := storable(a.event); err != nil {
		return err
	}
	before, err := t.keep(r.id, a.before)
	if err != nil {
		return err
	}
	after := before
	if a.status != statusRejected {
		if after, err = t.keep(r.id, state{group: before}.with(a.event)); err != nil {
			return err
		}
	}
	replaced, err := t.replaced(before, a.event)
	if err != nil {
		return err
	}
	if err := t.insertPlaced(&eventRow{addition: a, before: before, after: after, replaced: replaced}); err != nil {
		return err
	}
	if a.status == statusAccepted {
		if err := t.newEnd(r, a.event); err != nil {
			return err
		}
		if err := t.resolveEnds(r); err != nil {
			return err
		}
	}
	return t.exec(`UPDATE events SET room_state = $2 WHERE id = $1`, a.event.ID(), r.state)
}

// replaced is the entry that a state event takes the place of.
func (t *tx) replaced(before int64, e *mxfed.Event) (mxfed.EventID, error) {
	key, ok := e.StateKey()
	if !ok {
		return "", nil
	}
	k := mxfed.StateKey{Type: e.Type(), Key: key}
	found, err := t.entries(state{group: before}, []mxfed.StateKey{k})
	return found[k], err
}

// eventRow is an event as a row.
type eventRow struct {
	*addition
	before, after int64
	replaced      mxfed.EventID
}

// columns are those that say what an event is; description gives their values.
const columns = `id, room, type, state_key, sender, membership, server, depth, auth, json, status, staged, received`

func description(e *mxfed.Event, status, staged int) []any {
	var key any
	server := ""
	if k, ok := e.StateKey(); ok {
		key = k
		if e.Type() == "m.room.member" {
			server = string(mxfed.UserID(k).Server())
		}
	}
	return []any{e.ID(), e.RoomID(), e.Type(), key, e.Sender(), e.Membership(), server, depthOf(e), string(asJSON(append([]mxfed.EventID{}, e.Auth()...))), string(e.JSON()),
		status, staged, time.Now().UnixMilli()}
}

// depthOf is the depth that an event claims. Some room versions allow larger ones than fit, which order nothing.
func depthOf(e *mxfed.Event) int64 {
	var claim struct{ Depth int64 }
	if json.Unmarshal(e.JSON(), &claim) != nil {
		return 1<<63 - 1
	}
	return claim.Depth
}

// insertPlaced stores an event with its place in the graph. One that was known as part of a state only gets its place
// now.
func (t *tx) insertPlaced(row *eventRow) error {
	args := append(description(row.event, row.status, 0), row.before, row.after, row.replaced, row.device, row.txn)
	values := tuples(&[]any{}, args)
	err := t.exec(`INSERT INTO events (`+columns+`, state_before, state_after, replaced, device, txn) VALUES `+values+`
		ON CONFLICT (id) DO UPDATE SET status = excluded.status, json = excluded.json, received = excluded.received, state_before = excluded.state_before,
		state_after = excluded.state_after, replaced = excluded.replaced`, args...)
	for _, parent := range row.event.Prev() {
		if err == nil {
			err = t.exec(`INSERT INTO edges VALUES ($1, $2) ON CONFLICT DO NOTHING`, parent, row.event.ID())
		}
	}
	if err == nil && row.txn != "" {
		err = t.exec(`INSERT INTO client_txns VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`, row.event.Sender(), row.device, row.txn, row.event.ID())
	}
	return err
}

// newEnd makes an event a forward extremity in place of those that it follows. One that others follow already is none.
func (t *tx) newEnd(r *room, e *mxfed.Event) error {
	for _, parent := range e.Prev() {
		if err := t.exec(`DELETE FROM extremities WHERE room = $1 AND event = $2`, r.id, parent); err != nil {
			return err
		}
	}
	return t.exec(fmt.Sprintf(`INSERT INTO extremities SELECT $1, $2 WHERE NOT EXISTS (
		SELECT 1 FROM edges x JOIN events e ON e.id = x.child WHERE x.parent = $2 AND e.room = $1 AND e.status = %d)`, statusAccepted),
		r.id, e.ID())
}

// resolveEnds makes the state after all ends the current one.
func (t *tx) resolveEnds(r *room) error {
	ends, err := list[mxfed.EventID](t, `SELECT event FROM extremities WHERE room = $1`, r.id)
	if err != nil {
		return err
	}
	now, ok, err := t.stateAfter(r, ends)
	if err != nil || !ok {
		return errors.Join(err, errIf(!ok, "an end of the room's graph is without a state"))
	}
	if r.state, err = t.keep(r.id, now); err != nil {
		return err
	}
	return t.exec(`UPDATE rooms SET state = $2 WHERE id = $1`, r.id, r.state)
}

func errIf(wrong bool, text string) error {
	if wrong {
		return errors.New(text)
	}
	return nil
}

// moveState brings current_state and the memberships of local users from an old group to r.state.
func (t *tx) moveState(r *room, old, position int64) error {
	if old == r.state {
		return nil
	}
	if old == 0 {
		if err := t.fillState(r); err != nil {
			return err
		}
		users, err := list[string](t, `SELECT state_key FROM current_state WHERE room = $1 AND type = 'm.room.member' AND server = $2`, r.id, t.db.own)
		if err != nil {
			return err
		}
		return t.moveMembers(r, users, position)
	}
	f, err := t.fork([]int64{old, r.state})
	if err != nil {
		return err
	}
	var users []string
	for _, i := range f.conflicts(2) {
		k := f.keys[i]
		if err := t.setEntry(r, k, f.values[1][i]); err != nil {
			return err
		}
		if k.Type == "m.room.member" && mxfed.UserID(k.Key).Server() == t.db.own {
			users = append(users, k.Key)
		}
	}
	return t.moveMembers(r, users, position)
}

// setEntry changes one entry of the current state.
func (t *tx) setEntry(r *room, k mxfed.StateKey, id mxfed.EventID) error {
	if id == "" {
		return t.exec(`DELETE FROM current_state WHERE room = $1 AND type = $2 AND state_key = $3`, r.id, k.Type, k.Key)
	}
	return t.exec(`INSERT INTO current_state SELECT room, type, state_key, id, membership, server FROM events WHERE id = $1
		ON CONFLICT (room, type, state_key) DO UPDATE SET event = excluded.event, membership = excluded.membership`, id)
}

// fillState fills current_state with the whole of a state.
func (t *tx) fillState(r *room) error {
	if err := t.exec(`DELETE FROM current_state WHERE room = $1`, r.id); err != nil {
		return err
	}
	path, err := t.path(r.state)
	if err != nil {
		return err
	}
	for _, g := range path {
		err := t.exec(`INSERT INTO current_state SELECT e.room, s.type, s.state_key, s.event, COALESCE(e.membership, ''), COALESCE(e.server, '')
			FROM state_entries s JOIN events e ON e.id = s.event WHERE s.state_group = $1 ON CONFLICT DO NOTHING`, g.id)
		if err != nil {
			return err
		}
	}
	return nil
}

// moveMembers tells local users how they now stand to the room.
func (t *tx) moveMembers(r *room, users []string, position int64) error {
	for _, user := range users {
		var membership, event string
		found, err := t.row(`SELECT membership, event FROM current_state WHERE room = $1 AND type = 'm.room.member' AND state_key = $2`,
			[]any{r.id, user}, &membership, &event)
		if err != nil {
			return err
		}
		if !found { // the member event has lost against another branch of the room
			membership = "leave"
		}
		row := &memberRow{user: mxfed.UserID(user), room: r.id, membership: membership, version: r.version, event: mxfed.EventID(event)}
		if membership == "invite" || membership == "knock" {
			if row.shown, err = t.preview(r, user); err != nil {
				return err
			}
		}
		if err := t.setMembership(row, position); err != nil {
			return err
		}
	}
	return nil
}

// preview is what a room shows to a local user who is invited or knocks.
// https://spec.matrix.org/v1.19/client-server-api/#stripped-state
func (t *tx) preview(r *room, user string) (string, error) {
	keys := []mxfed.StateKey{{Type: "m.room.member", Key: user}}
	for _, typ := range []string{"create", "join_rules", "canonical_alias", "name", "avatar", "topic", "encryption"} {
		keys = append(keys, mxfed.StateKey{Type: "m.room." + typ})
	}
	events, err := t.current(r, keys...)
	shown := make([]json.RawMessage, 0, len(events))
	for _, e := range events {
		shown = append(shown, strippedEvent(e))
	}
	return string(asJSON(shown)), err
}

// strippedEvent is an event as it is shown to those who are not in the room.
func strippedEvent(e *mxfed.Event) json.RawMessage {
	key, _ := e.StateKey()
	return stripped(&mxfed.Stripped{Type: e.Type(), StateKey: key, Sender: e.Sender(), Content: e.Content()})
}

// memberRow is a row of memberships. event is the ID of a stored event, or the text of one that is not part of a room here.
type memberRow struct {
	user       mxfed.UserID
	room       mxfed.RoomID
	membership string
	version    mxfed.RoomVersion
	event      mxfed.EventID
	outside    string // the member event, if this server is not in the room
	shown      string
	via        []mxfed.ServerName
}

// setMembership changes how a local user stands to a room.
func (t *tx) setMembership(m *memberRow, position int64) error {
	var joined int64
	if m.membership == "join" {
		joined = position
	}
	return t.exec(`INSERT INTO memberships (user_id, room, membership, position, joined, version, event, outside, shown, via)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
		ON CONFLICT (user_id, room) DO UPDATE SET joined = CASE WHEN excluded.membership IN ('invite', 'knock') THEN 0
			WHEN excluded.membership = 'join' AND memberships.membership <> 'join' THEN excluded.joined ELSE memberships.joined END,
			left_at = CASE WHEN excluded.membership = 'join' THEN 0 WHEN memberships.membership = 'join' THEN excluded.position ELSE memberships.left_at END,
			membership = excluded.membership, position = excluded.position,
			version = excluded.version, event = excluded.event, outside = excluded.outside, shown = excluded.shown, via = excluded.via, forgotten = 0`,
		m.user, m.room, m.membership, position, joined, m.version, m.event, m.outside, cmp.Or(m.shown, "[]"), string(asJSON(append([]mxfed.ServerName{}, m.via...))))
}

// post notes down whom to send an event to: all servers in the room, and that of a user whom it is about.
func (t *tx) post(r *room, e *mxfed.Event, position int64) error {
	targets := make(map[mxfed.ServerName]bool)
	servers, err := t.servers(r.id)
	if err != nil {
		return err
	}
	for _, name := range append(servers, r.partial...) {
		targets[name] = true
	}
	if key, _ := e.StateKey(); e.Type() == "m.room.member" && e.Membership() != "invite" { // an invite has been there
		targets[mxfed.UserID(key).Server()] = true
	}
	delete(targets, e.Sender().Server())
	for name := range targets {
		if name == t.db.own {
			continue
		}
		if err := t.exec(`INSERT INTO outbox VALUES ($1, $2, $3)`, name, position, e.ID()); err != nil {
			return err
		}
		if err := t.exec(`INSERT INTO destinations (name) VALUES ($1) ON CONFLICT DO NOTHING`, name); err != nil {
			return err
		}
	}
	return nil
}

// outside notes down how a local user stands to a room by an event of a room that this server may not be in, once. Who is
// joined stays so: what the room says counts.
func (t *tx) outside(m *memberRow, e *mxfed.Event, shown []json.RawMessage) error {
	if err := storable(e); err != nil {
		return err
	}
	var one int
	if known, err := t.row(`SELECT 1 FROM users WHERE id = $1`, []any{m.user}, &one); err != nil || !known {
		return orNotFound(err)
	}
	now, err := t.membership(m.user, m.room)
	if err != nil || now != nil && (now.Membership == "join" || now.Event != nil && now.Event.ID() == e.ID()) {
		return err
	}
	m.shown, m.outside = string(asJSON(append(shown, strippedEvent(e)))), string(e.JSON())
	position, err := t.advance()
	if err != nil {
		return err
	}
	return t.setMembership(m, position)
}
