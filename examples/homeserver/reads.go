package main

import (
	"context"
	"encoding/json"
	"maps"
	"slices"

	"example.org/mxfed"
)

// This file reads much of a room: states and auth chains in pages, each in a transaction of its own, so that it does not
// matter how slow the one is who gets them; and what users and servers may see of the past.

// excerpt is a state of a room, or that without members but a few.
type excerpt struct {
	snapshot
	room    mxfed.RoomID
	members []string // nil: all
}

// omitMembers leaves members out, but for some by whom clients name a room that has no name, and not for the joiner.
// https://spec.matrix.org/v1.19/client-server-api/#calculating-the-display-name-for-a-room
func (t *tx) omitMembers(of *excerpt, joiner mxfed.UserID) {
	of.members = []string{""}
	names := t.stateEvents(&room{ID: of.room}, of.snapshot, mxfed.StateKey{Type: "m.room.name"}, mxfed.StateKey{Type: "m.room.canonical_alias"})
	if len(names) == 0 {
		of.members = append(of.members, list[string](t, `SELECT state_key FROM state WHERE room = ? AND type = 'm.room.member' AND since <= ? AND until > ?
			AND state_key <> ? ORDER BY CASE WHEN membership IN ('join', 'invite') THEN 0 ELSE 1 END, since, state_key LIMIT 5`,
			of.room, of.base, of.base, joiner)...)
	}
}

// where is the condition for the rows s of state at the excerpt's base.
func (of *excerpt) where() (condition string, args []any) {
	condition, args = `s.room = ? AND s.since <= ? AND s.until > ?`, []any{of.room, of.base, of.base}
	if of.members != nil {
		condition, args = condition+` AND (s.type <> 'm.room.member' OR s.state_key IN (?))`, append(args, of.members)
	}
	return condition, args
}

// has tells whether an entry belongs to the excerpt.
func (of *excerpt) has(k mxfed.StateKey) bool {
	return of.members == nil || k.Type != "m.room.member" || slices.Contains(of.members, k.Key)
}

// eachEntry calls f with the entries of a state, until f returns false.
func (s *server) eachEntry(ctx context.Context, of *excerpt, f func(entry mxfed.EventID, text string) bool) error {
	type row struct {
		entryRow
		JSON string
	}
	condition, args := of.where()
	var last entryRow
	for more := true; more; {
		page, err := query(ctx, s.db, func(t *tx) []row {
			return list[row](t, `SELECT s.type, s.state_key, s.event, e.json FROM state s JOIN events e ON e.id = s.event WHERE `+condition+`
				AND (s.type, s.state_key) > (?, ?) ORDER BY s.type, s.state_key LIMIT ?`, append(slices.Clone(args), last.Type, last.StateKey, batch)...)
		})
		if err != nil {
			return err
		}
		for _, row := range page {
			last = row.entryRow
			if _, differs := of.differs[row.key()]; !differs && !f(row.Event, row.JSON) {
				return nil
			}
		}
		more = len(page) == batch
	}
	others, err := query(ctx, s.db, func(t *tx) []*mxfed.Event { return t.events(slices.Collect(maps.Values(of.differs))...) })
	for _, e := range others {
		if of.has(keyOf(e)) && !f(e.ID(), string(e.JSON())) {
			break
		}
	}
	return err
}

// authIDs names all that authorises the entries of a state, and more with what authorises these. The create event is among
// them, though from room version 12 on no event names it: all depend on it.
func (s *server) authIDs(ctx context.Context, of *excerpt, more []mxfed.EventID) ([]mxfed.EventID, error) {
	keys := slices.DeleteFunc(slices.Collect(maps.Keys(of.differs)), func(k mxfed.StateKey) bool { return !of.has(k) })
	condition, args := of.where()
	return query(ctx, s.db, func(t *tx) []mxfed.EventID {
		said := t.read(&room{ID: of.room}, keys, snapshot{base: of.base}, of.snapshot)
		return list[mxfed.EventID](t, `WITH RECURSIVE chain (id) AS (
			SELECT a.value FROM state s JOIN events e ON e.id = s.event CROSS JOIN `+t.db.authOf()+` WHERE `+condition+` AND s.event NOT IN (?)
			UNION SELECT a.value FROM events e CROSS JOIN `+t.db.authOf()+` WHERE e.id IN (?)
			UNION SELECT e.id FROM events e WHERE e.id IN (?)
			UNION SELECT s.event FROM state s WHERE s.room = ? AND s.type = 'm.room.create'
			UNION SELECT a.value FROM chain c JOIN events e ON e.id = c.id CROSS JOIN `+t.db.authOf()+`)
			SELECT id FROM chain`, append(args, append(said[0], ""), append(said[1], ""), append(more, ""), of.room)...)
	})
}

// texts reads events as they are stored.
func (s *server) texts(ctx context.Context, names []mxfed.EventID) ([]string, error) {
	return query(ctx, s.db, func(t *tx) []string { return list[string](t, `SELECT json FROM events WHERE id IN (?)`, names) })
}

// visible keeps those of events that a server may see, which is in the room now; an empty origin may see all. State from
// before this server was in the room is open to all who are in it.
func (t *tx) visible(origin mxfed.ServerName, of []*roomEvent) (events []*mxfed.Event) {
	for _, e := range of {
		if origin == "" || e.Position == 0 || t.sees(origin, e) {
			events = append(events, e.Event)
		}
	}
	return events
}

// sees tells whether a server that is in the room now may see an event.
// https://spec.matrix.org/v1.19/client-server-api/#room-history-visibility
func (t *tx) sees(origin mxfed.ServerName, e *roomEvent) bool {
	r := &room{ID: e.RoomID()}
	visibility := visibilityOf(t.stateEvents(r, e.before, mxfed.StateKey{Type: "m.room.history_visibility"}))
	if visibility != "joined" && visibility != "invited" {
		return true
	}
	var keys []mxfed.StateKey
	for _, user := range list[string](t, `SELECT DISTINCT state_key FROM state WHERE room = ? AND type = 'm.room.member' AND server = ?`, r.ID, origin) {
		keys = append(keys, mxfed.StateKey{Type: "m.room.member", Key: user})
	}
	return slices.ContainsFunc(t.stateEvents(r, e.before, keys...), func(m *mxfed.Event) bool {
		return m.Membership() == "join" || m.Membership() == "invite" && visibility == "invited"
	})
}

// visibilityOf reads the entry of a state that says who may see what happens; what is none is the default one.
func visibilityOf(rule []*mxfed.Event) string {
	var content struct {
		Visibility string `json:"history_visibility"`
	}
	if len(rule) > 0 && json.Unmarshal(rule[0].Content(), &content) == nil {
		return content.Visibility
	}
	return "shared"
}

// history walks from events back along prev_events, these included, and returns what a server may see: limit at most, as
// far as events are known here, and none of stop. It looks at ten times as many at most, whoever may not see them.
func (t *tx) history(id mxfed.RoomID, origin mxfed.ServerName, from, stop []mxfed.EventID, limit int) (events []*mxfed.Event) {
	seen := make(map[mxfed.EventID]bool)
	for _, id := range stop {
		seen[id] = true
	}
	for queue := from; len(queue) > 0 && len(events) < limit && len(seen) < len(stop)+10*limit; queue = queue[1:] {
		if seen[queue[0]] {
			continue
		}
		seen[queue[0]] = true
		if e := t.placed(id, queue[0]); e != nil && e.status != statusRejected {
			queue = append(queue, e.Prev()...)
			events = append(events, t.visible(origin, []*roomEvent{e})...)
		}
	}
	return events
}

// position is where the stream of accepted events ends now.
func (t *tx) position() int64 {
	position, _ := one[int64](t, `SELECT position FROM stream`)
	return position
}

// membership is how a local user stands to a room.
type membership struct {
	Room       mxfed.RoomID
	Membership string // join, invite, knock, leave, ban
	// Position is that of the last change. Joined is where the last stay began, and Left where it ended; 0 for one who never
	// was in the room, or still is. Entered is the position of the state that another server told when this one came in last,
	// and Completed that at which the members were there that it had left out; 0 if there was nothing like it.
	Position, Joined, Left, Entered, Completed int64
	// Event is the member event; nil if none is known, as for one who has lost against another branch of the room.
	Event *mxfed.Event
	// Shown is what a room shows to the invited or knocking: stripped state, objects of type, state_key, sender and content,
	// the user's own member event among them.
	Shown []json.RawMessage

	version mxfed.RoomVersion
	via     []mxfed.ServerName // servers that may know the room
}

// memberships are the user's, by the rooms' states as far as this server is in them, and by what it was told as far as it is
// not: whatever is newer counts.
func (t *tx) memberships(user mxfed.UserID, in ...mxfed.RoomID) (all []*membership) {
	only, args := "", []any{user}
	if len(in) > 0 {
		only, args = ` AND m.room IN (?)`, append(args, in)
	}
	rows := list[struct {
		Room                             mxfed.RoomID
		Version                          mxfed.RoomVersion
		Membership                       string
		Entered, Completed, Since, Until int64
		Text, Shown, Via                 string
	}](t, `SELECT m.room, r.version, m.membership, r.entered, r.completed, m.since, m.until, e.json AS text, '' AS shown, '[]' AS via
		FROM state m JOIN rooms r ON r.id = m.room JOIN events e ON e.id = m.event WHERE m.type = 'm.room.member' AND m.state_key = ?`+only+`
		UNION ALL SELECT room, version, membership, 0, 0, position, 9223372036854775807, event, shown, via FROM outside m WHERE user_id = ?`+only+`
		ORDER BY 6`, append(args, args...)...)
	found, last := make(map[mxfed.RoomID]*membership), make(map[mxfed.RoomID]int)
	for i, row := range rows {
		m := found[row.Room]
		if m == nil {
			m = &membership{Room: row.Room}
			found[row.Room], all = m, append(all, m)
		}
		m.follow(row.Membership, row.Since)
		m.Entered, m.Completed = max(m.Entered, row.Entered), max(m.Completed, row.Completed)
		m.version, last[row.Room] = row.Version, i
	}
	for _, m := range all {
		row := rows[last[m.Room]]
		if row.Until != forever {
			m.follow("leave", row.Until)
			continue
		}
		m.Event = t.parse(row.Version, row.Text)
		json.Unmarshal([]byte(row.Via), &m.via) // as it was written here, like Shown
		if row.Shown != "" {
			json.Unmarshal([]byte(row.Shown), &m.Shown)
		} else if m.Membership == "invite" || m.Membership == "knock" {
			m.Shown = t.preview(m.Room, user)
		}
	}
	return all
}

// follow takes the next change of a membership in.
func (m *membership) follow(membership string, position int64) {
	switch {
	case membership == "join" && m.Membership != "join":
		m.Joined, m.Left = position, 0
	case membership != "join" && m.Membership == "join":
		m.Left = position
	}
	m.Membership, m.Position = membership, position
}

// membership is how a user stands to one room; nil if the user never had to do with it.
func (t *tx) membership(user mxfed.UserID, id mxfed.RoomID) *membership {
	all := t.memberships(user, id)
	if len(all) == 0 {
		return nil
	}
	return all[0]
}

// preview is what a room shows to a local user who is invited or knocks.
// https://spec.matrix.org/v1.19/client-server-api/#stripped-state
func (t *tx) preview(id mxfed.RoomID, user mxfed.UserID) (shown []json.RawMessage) {
	keys := []mxfed.StateKey{{Type: "m.room.member", Key: string(user)}}
	for _, typ := range []string{"create", "join_rules", "canonical_alias", "name", "avatar", "topic", "encryption"} {
		keys = append(keys, mxfed.StateKey{Type: "m.room." + typ})
	}
	for _, e := range t.stateEvents(&room{ID: id}, snapshot{base: forever - 1}, keys...) {
		shown = append(shown, strippedEvent(e))
	}
	return shown
}

// strippedEvent is an event as it is shown to those who are not in the room.
func strippedEvent(e *mxfed.Event) json.RawMessage {
	return stripped(&mxfed.Stripped{Type: e.Type(), StateKey: keyOf(e).Key, Sender: e.Sender(), Content: e.Content()})
}

func stripped(e *mxfed.Stripped) json.RawMessage {
	return asJSON(map[string]any{"type": e.Type, "state_key": e.StateKey, "sender": e.Sender, "content": e.Content})
}

// timeline returns the last of a room's events that were accepted after after and not after upTo, in order, limit at most;
// limited tells that there are more. It checks nothing: ask only for what a membership lets the user see.
func (s *server) timeline(ctx context.Context, id mxfed.RoomID, after, upTo int64, limit int) (events []*roomEvent, limited bool, err error) {
	events, err = query(ctx, s.db, func(t *tx) []*roomEvent {
		return t.stored(`e.room = ? AND e.position > 0 AND e.position > ? AND e.position <= ? AND e.status = ? ORDER BY e.position DESC LIMIT ?`,
			id, after, upTo, statusAccepted, limit+1)
	})
	if limited = len(events) > limit; limited {
		events = events[:limit]
	}
	slices.Reverse(events)
	return events, limited, err
}

// stateAt is the state of a room at a position, those entries of it that were set after after (0: all).
func (s *server) stateAt(ctx context.Context, id mxfed.RoomID, after, at int64) ([]*roomEvent, error) {
	return query(ctx, s.db, func(t *tx) []*roomEvent {
		return t.stored(`e.id IN (SELECT event FROM state WHERE room = ? AND since > ? AND since <= ? AND until > ?)`, id, after, at, at)
	})
}

// roomState is the state of a room for a user: as it is for one who is in the room, and as it was for one who was. Everybody
// else gets ErrForbidden. A key restricts it.
func (s *server) roomState(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, keys ...mxfed.StateKey) (events []*roomEvent, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		m := t.membership(user, id)
		if m == nil || m.Joined == 0 {
			return orForbidden(nil, "you are not in the room")
		}
		at := int64(forever - 1)
		if m.Left > 0 {
			at = m.Left
		}
		query, args := `e.id IN (SELECT event FROM state WHERE room = ? AND since <= ? AND until > ?`, []any{id, at, at}
		for _, k := range keys {
			query, args = query+` AND type = ? AND state_key = ?`, append(args, k.Type, k.Key)
		}
		events = t.stored(query+`)`, args...)
		return nil
	})
	return events, err
}
