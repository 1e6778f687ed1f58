package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"

	"example.org/mxfed"
)

// This file reads much of a room: states and auth chains in pages, each in a transaction of its own, so that it does not
// matter how slow the one is who gets them.

// eachEntry calls f with the entries of a state, until f returns false. What a group says never changes.
func (s *server) eachEntry(ctx context.Context, group int64, members bool, f func(*entry) bool) error {
	var last mxfed.StateKey
	for more := true; more; {
		var page []entry
		err := s.db.view(ctx, func(t *tx) (err error) {
			page, last, more, err = t.page(group, last, members)
			return err
		})
		if err != nil {
			return err
		}
		for i := range page {
			if !f(&page[i]) {
				return nil
			}
		}
	}
	return nil
}

// authIDs names what authorises the entries of a state and an event with the auth events more.
func (s *server) authIDs(ctx context.Context, group int64, more []mxfed.EventID, members bool) (chain []mxfed.EventID, err error) {
	seen := make(map[mxfed.EventID]bool)
	list := func(names []mxfed.EventID) {
		for _, id := range names {
			if !seen[id] {
				seen[id] = true
				chain = append(chain, id)
			}
		}
	}
	list(more)
	if err := s.eachEntry(ctx, group, members, func(e *entry) bool {
		if e.key.Type == "m.room.create" { // from room version 12 on no event names it, but all depend on it
			list([]mxfed.EventID{e.event})
		}
		list(e.auth)
		return true
	}); err != nil {
		return nil, err
	}
	for next := 0; next < len(chain); {
		names := chain[next:min(next+batch, len(chain))]
		next += len(names)
		if err := s.db.view(ctx, func(t *tx) error { return t.authEvents(names, list) }); err != nil {
			return nil, err
		}
	}
	return chain, nil
}

// authEvents lists the auth events of events.
func (t *tx) authEvents(of []mxfed.EventID, list func([]mxfed.EventID)) error {
	var args []any
	return t.each(func(scan func(...any) error) error {
		var text string
		if err := scan(&text); err != nil {
			return err
		}
		var auth []mxfed.EventID
		err := json.Unmarshal([]byte(text), &auth)
		list(auth)
		return err
	}, `SELECT auth FROM events WHERE id IN (`+in(&args, of)+`)`, args...)
}

// texts reads events as they are stored.
func (s *server) texts(ctx context.Context, names []mxfed.EventID) (texts []string, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		var args []any
		texts, err = list[string](t, fmt.Sprintf(`SELECT json FROM events WHERE status <> %d AND id IN (`, statusStaged)+in(&args, names)+`)`, args...)
		return err
	})
	return texts, err
}

// known returns an event of the room that has its place there, and the state before it; nil if there is none.
func (t *tx) known(r *room, id mxfed.EventID) (e *mxfed.Event, before int64, err error) {
	found, err := t.row(`SELECT state_before FROM events WHERE id = $1 AND room = $2 AND state_before IS NOT NULL`, []any{id, r.id}, &before)
	if err != nil || !found {
		return nil, 0, err
	}
	e, err = t.event(r.version, id)
	return e, before, err
}

// accepted reads those of events that the room has accepted. They may have been soft-failed, but for the one that is being
// checked, which counts only if it is part of the room.
func (t *tx) accepted(r *room, names []mxfed.EventID, checked mxfed.EventID) (events []*mxfed.Event, err error) {
	var args []any
	marks := in(&args, names)
	args = append(args, r.id, checked)
	found, err := list[mxfed.EventID](t, fmt.Sprintf(`SELECT id FROM events WHERE id IN (%s) AND room = $%d AND (status = %d OR status = %d AND id <> $%d)`,
		marks, len(args)-1, statusAccepted, statusSoftFailed, len(args)), args...)
	if err != nil {
		return nil, err
	}
	return t.events(r.version, found...)
}

// open reads events for those who may see all of them.
func (t *tx) open(names []mxfed.EventID) (events []*mxfed.Event, err error) {
	for names := range slices.Chunk(names, batch) {
		var args []any
		err := t.each(func(scan func(...any) error) error {
			var version mxfed.RoomVersion
			var text string
			if err := scan(&version, &text); err != nil {
				return err
			}
			e, err := mxfed.ParseEvent(version, []byte(text))
			events = append(events, e)
			return err
		}, fmt.Sprintf(`SELECT r.version, e.json FROM events e JOIN rooms r ON r.id = e.room WHERE e.status IN (%d, %d) AND e.id IN (`,
			statusAccepted, statusSoftFailed)+in(&args, names)+`)`, args...)
		if err != nil {
			return nil, err
		}
	}
	return events, nil
}

// visible reads events that a server may see, which is in the room now.
func (t *tx) visible(origin mxfed.ServerName, names []mxfed.EventID) (events []*mxfed.Event, err error) {
	known, err := t.open(names)
	for _, e := range known {
		if err != nil {
			return nil, err
		}
		var before int64
		if _, err := t.row(`SELECT COALESCE(state_before, 0) FROM events WHERE id = $1`, []any{e.ID()}, &before); err != nil {
			return nil, err
		}
		shown := before == 0 // state from before this server was in the room is open to all who are in it
		if !shown {
			shown, err = t.sees(&room{id: e.RoomID(), version: e.Version()}, before, origin)
		}
		if shown {
			events = append(events, e)
		}
	}
	return events, err
}

// sees tells whether a server that is in the room now may see what was sent in a state.
// https://spec.matrix.org/v1.19/client-server-api/#room-history-visibility
func (t *tx) sees(r *room, before int64, origin mxfed.ServerName) (bool, error) {
	rule, err := t.stateEvents(r.version, state{group: before}, []mxfed.StateKey{{Type: "m.room.history_visibility"}})
	if err != nil {
		return false, err
	}
	var content struct {
		Visibility string `json:"history_visibility"`
	}
	if len(rule) > 0 {
		json.Unmarshal(rule[0].Content(), &content) // what is no visibility is the default one
	}
	if content.Visibility != "joined" && content.Visibility != "invited" {
		return true, nil
	}
	users, err := list[string](t, `SELECT DISTINCT state_key FROM events WHERE room = $1 AND server = $2`, r.id, origin)
	if err != nil {
		return false, err
	}
	keys := make([]mxfed.StateKey, len(users))
	for i, user := range users {
		keys[i] = mxfed.StateKey{Type: "m.room.member", Key: user}
	}
	members, err := t.stateEvents(r.version, state{group: before}, keys)
	return slices.ContainsFunc(members, func(e *mxfed.Event) bool {
		return e.Membership() == "join" || e.Membership() == "invite" && content.Visibility == "invited"
	}), err
}

// history walks from events back along prev_events, these included, and returns what a server may see: limit at most, as
// far as events are known here, and none of stop.
func (t *tx) history(r *room, origin mxfed.ServerName, from, stop []mxfed.EventID, limit int) (events []*mxfed.Event, err error) {
	seen := make(map[mxfed.EventID]bool)
	for _, id := range stop {
		seen[id] = true
	}
	for queue := from; len(queue) > 0 && len(events) < limit; queue = queue[1:] {
		if seen[queue[0]] {
			continue
		}
		seen[queue[0]] = true
		e, _, err := t.known(r, queue[0])
		if err != nil || e == nil {
			if err != nil {
				return nil, err
			}
			continue
		}
		queue = append(queue, e.Prev()...)
		shown, err := t.visible(origin, []mxfed.EventID{e.ID()})
		if err != nil {
			return nil, err
		}
		events = append(events, shown...)
	}
	return events, nil
}

// position is where the stream of accepted events ends now.
func (s *server) position(ctx context.Context) (now int64, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		_, err := t.row(`SELECT position FROM stream`, nil, &now)
		return err
	})
	return now, err
}

// memberships are the user's, changed after since; 0 for all.
func (s *server) memberships(ctx context.Context, user mxfed.UserID, since int64) (all []*membership, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		all, err = t.memberships(`m.user_id = $1 AND m.position > $2`, user, since)
		return err
	})
	return all, err
}

// memberships reads how users stand to rooms.
func (t *tx) memberships(condition string, args ...any) (all []*membership, err error) {
	err = t.each(func(scan func(...any) error) error {
		m := &membership{}
		var version mxfed.RoomVersion
		var text, shown, via string
		var forgotten int
		err := scan(&m.Room, &m.Membership, &m.Position, &m.Joined, &version, &text, &shown, &via, &forgotten)
		if err != nil {
			return err
		}
		m.version, m.Forgotten = version, forgotten != 0
		if text != "" {
			if m.Event, err = mxfed.ParseEvent(version, []byte(text)); err != nil {
				return err
			}
		}
		if err := json.Unmarshal([]byte(shown), &m.Shown); err != nil {
			return err
		}
		all = append(all, m)
		return json.Unmarshal([]byte(via), &m.via)
	}, `SELECT m.room, m.membership, m.position, m.joined, m.version, COALESCE(e.json, m.outside), m.shown, m.via, m.forgotten
		FROM memberships m LEFT JOIN events e ON e.id = m.event WHERE `+condition+` ORDER BY m.position`, args...)
	return all, err
}

// membership is how a user stands to a room; nil if the user never had to do with it.
func (t *tx) membership(user mxfed.UserID, id mxfed.RoomID) (*membership, error) {
	all, err := t.memberships(`m.user_id = $1 AND m.room = $2`, user, id)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[0], nil
}

// timeline returns the last of a room's events that were accepted after after and not after upTo, in order, limit at most;
// limited tells that there are more. It checks nothing: ask only for what a membership lets the user see.
func (s *server) timeline(ctx context.Context, id mxfed.RoomID, after, upTo int64, limit int) (events []*roomEvent, limited bool, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		events, err = t.roomEvents(fmt.Sprintf(`e.room = $1 AND e.position > $2 AND e.position <= $3 AND e.status = %d ORDER BY e.position DESC LIMIT %d`,
			statusAccepted, limit+1), id, after, upTo)
		return err
	})
	if limited = len(events) > limit; limited {
		events = events[:limit]
	}
	slices.Reverse(events)
	return events, limited, err
}

// roomEvents reads events as clients are to see them.
func (t *tx) roomEvents(condition string, args ...any) (events []*roomEvent, err error) {
	err = t.each(func(scan func(...any) error) error {
		e := &roomEvent{}
		var version mxfed.RoomVersion
		var text, replaced string
		var received int64
		if err := scan(&version, &text, &e.Position, &received, &e.Device, &e.Txn, &replaced); err != nil {
			return err
		}
		e.Received = timeOf(received)
		if e.Event, err = mxfed.ParseEvent(version, []byte(text)); err != nil {
			return err
		}
		if replaced != "" {
			e.Replaced, err = mxfed.ParseEvent(version, []byte(replaced))
		}
		events = append(events, e)
		return err
	}, `SELECT r.version, e.json, COALESCE(e.position, 0), e.received, e.device, e.txn, COALESCE(p.json, '')
		FROM events e JOIN rooms r ON r.id = e.room LEFT JOIN events p ON p.id = e.replaced WHERE `+condition, args...)
	return events, err
}

// stateAt is the state of a room at a position, those entries of it that were set after after (0: all).
func (s *server) stateAt(ctx context.Context, id mxfed.RoomID, after, at int64) (events []*roomEvent, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		now, err := t.groupAt(id, at)
		if err != nil || now == 0 {
			return err
		}
		var old int64
		if after > 0 {
			if old, err = t.groupAt(id, after); err != nil {
				return err
			}
		}
		if old == 0 {
			events, err = t.wholeState(now)
			return err
		}
		f, err := t.fork([]int64{old, now})
		if err != nil {
			return err
		}
		var names []mxfed.EventID
		for _, k := range f.conflicts(2) {
			names = append(names, f.values[1][k])
		}
		events, err = t.roomEventsByID(names)
		return err
	})
	return events, err
}

// groupAt is the current state of a room as of a position, 0 if this server was not in it.
func (t *tx) groupAt(id mxfed.RoomID, position int64) (group int64, err error) {
	found, err := t.row(`SELECT room_state FROM events WHERE room = $1 AND position <= $2 ORDER BY position DESC LIMIT 1`, []any{id, position}, &group)
	if err == nil && !found { // the state that this server was told when it joined
		_, err = t.row(`SELECT COALESCE(state_before, 0) FROM events WHERE room = $1 AND position > $2 ORDER BY position LIMIT 1`, []any{id, position}, &group)
	}
	return group, err
}

func (t *tx) wholeState(group int64) (events []*roomEvent, err error) {
	var last mxfed.StateKey
	for more := true; more; {
		var page []entry
		if page, last, more, err = t.page(group, last, true); err != nil {
			return nil, err
		}
		names := make([]mxfed.EventID, len(page))
		for i, e := range page {
			names[i] = e.event
		}
		found, err := t.roomEventsByID(names)
		if err != nil {
			return nil, err
		}
		events = append(events, found...)
	}
	return events, nil
}

func (t *tx) roomEventsByID(names []mxfed.EventID) (events []*roomEvent, err error) {
	for names := range slices.Chunk(names, batch) {
		var args []any
		found, err := t.roomEvents(`e.id IN (`+in(&args, names)+`)`, args...)
		if err != nil {
			return nil, err
		}
		events = append(events, found...)
	}
	return events, nil
}

// sight is up to which position a user sees a room: to the end if joined, to where they left if they were. Everybody else
// gets ErrForbidden.
func (t *tx) sight(user mxfed.UserID, id mxfed.RoomID) (upTo int64, err error) {
	var membership string
	found, err := t.row(`SELECT membership, left_at FROM memberships WHERE user_id = $1 AND room = $2`, []any{user, id}, &membership, &upTo)
	switch {
	case err != nil:
		return 0, err
	case found && membership == "join":
		return math.MaxInt64, nil
	case !found || upTo == 0:
		return 0, orForbidden(nil, "you are not in the room")
	}
	return upTo, nil
}

// roomState is the state of a room for a user; keys, if any, restrict it.
func (s *server) roomState(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, keys ...mxfed.StateKey) (events []*roomEvent, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		upTo, err := t.sight(user, id)
		if err != nil {
			return err
		}
		group, err := t.groupAt(id, upTo)
		if err != nil {
			return err
		}
		if len(keys) == 0 {
			events, err = t.wholeState(group)
			return err
		}
		found, err := t.entries(state{group: group}, keys)
		if err != nil {
			return err
		}
		var names []mxfed.EventID
		for _, id := range found {
			names = append(names, id)
		}
		events, err = t.roomEventsByID(names)
		return err
	})
	return events, err
}

// roomEvent is one event of the room.
func (s *server) roomEvent(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, event mxfed.EventID) (e *roomEvent, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		upTo, err := t.sight(user, id)
		if err != nil {
			return err
		}
		events, err := t.roomEvents(fmt.Sprintf(`e.id = $1 AND e.room = $2 AND COALESCE(e.position, 0) <= $3 AND e.status = %d`, statusAccepted), event, id, upTo)
		if err != nil || len(events) == 0 {
			return orNotFound(err)
		}
		e = events[0]
		return nil
	})
	return e, err
}

// local finds the joined user of this server who has the most power in the room.
func (t *tx) local(r *room, own mxfed.ServerName) (*mxfed.Event, error) {
	state, err := t.current(r, mxfed.StateKey{Type: "m.room.create"}, mxfed.StateKey{Type: "m.room.power_levels"})
	if err != nil {
		return nil, err
	}
	powers := make(map[string]int64)
	for _, e := range state {
		var content struct{ Users map[string]json.Number }
		json.Unmarshal(e.Content(), &content) // without levels everybody is as good
		for user, level := range content.Users {
			powers[user], _ = level.Int64()
		}
		if e.Type() == "m.room.create" && (r.version == "12" || len(state) == 1) {
			powers[string(e.Sender())] = 1 << 62
		}
	}
	names := slices.SortedFunc(maps.Keys(powers), func(a, b string) int { return int(min(1, max(-1, powers[b]-powers[a]))) })
	for _, user := range names {
		member, err := t.current(r, mxfed.StateKey{Type: "m.room.member", Key: user})
		if err != nil || len(member) > 0 && member[0].Membership() == "join" && mxfed.UserID(user).Server() == own {
			return first(member), err
		}
	}
	found, err := list[mxfed.EventID](t, `SELECT event FROM current_state WHERE room = $1 AND membership = 'join' AND server = $2 LIMIT 1`, r.id, own)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return t.event(r.version, found[0])
}

func first(events []*mxfed.Event) *mxfed.Event {
	if len(events) == 0 {
		return nil
	}
	return events[0]
}
