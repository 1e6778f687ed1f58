package main

import (
	"context"
	"iter"
	"slices"

	"example.org/mxfed"
)

// This file is what a program has to write to be a host: the interfaces of mxfed over its own storage. It states facts of
// rooms, stores what other servers send, and lets them read.

// host implements what mxfed.Hosts is about.
type host struct{ *server }

// hosts offers all of it.
func (h *host) hosts() mxfed.Hosts {
	return mxfed.Hosts{Invite: h, Join: h, Leave: h, Knock: h, Events: h, Directory: h, Version: mxfed.ServerVersion{Name: "mxfed-homeserver", Version: "1"}}
}

// Room implements mxfed.RoomSource.
func (h *host) Room(ctx context.Context, id mxfed.RoomID, ask mxfed.RoomQuery) (facts *mxfed.Room, err error) {
	err = h.db.view(ctx, func(t *tx) (err error) {
		var r *room
		if r, facts, err = t.facts(id, ask); err == nil {
			facts.Latest = t.latest(r, ask.State)
		}
		return err
	})
	return facts, err
}

// facts answers ask as of this transaction, but for Room.Latest.
func (t *tx) facts(id mxfed.RoomID, ask mxfed.RoomQuery) (*room, *mxfed.Room, error) {
	r := t.room(id)
	if !t.knows(r, ask) {
		return nil, nil, mxfed.ErrNotFound
	}
	now := &mxfed.Room{Version: r.Version, Joined: make(map[mxfed.RoomID]bool), Present: make(map[mxfed.ServerName]bool), State: t.current(r, ask.State...)}
	if s, known := t.stateAfter(r, ask.Prev); known {
		now.Before = t.stateEvents(r, s, ask.State...)
	}
	now.Events = t.accepted(id, ask.Events, ask.Event)
	for _, name := range ask.Servers {
		now.Present[name] = t.hasServer(id, name)
	}
	for _, other := range ask.Allow {
		if joined, known := t.joined(other, ask.User); known {
			now.Joined[other] = joined
		}
	}
	if ask.Local {
		now.Local = t.local(r)
	}
	return r, now, nil
}

// knows tells whether this server can speak of a room: it is in it, and knows all of it if another one asks. Nobody but the
// creator's own server knows a room that nobody has joined yet.
func (t *tx) knows(r *room, ask mxfed.RoomQuery) bool {
	if r == nil || ask.Origin != "" && r.Partial != "" {
		return false
	}
	if t.hasServer(r.ID, ask.To) {
		return true
	}
	_, members := one[int](t, `SELECT 1 FROM state WHERE room = ? AND type = 'm.room.member' LIMIT 1`, r.ID)
	return ask.Origin == "" && !members
}

// joined tells whether a user is in a room, if this server knows.
func (t *tx) joined(id mxfed.RoomID, user mxfed.UserID) (joined, known bool) {
	r := t.room(id)
	if r == nil || r.Partial != "" || !t.hasServer(id, t.db.own) {
		return false, false
	}
	member := t.current(r, mxfed.StateKey{Type: "m.room.member", Key: string(user)})
	return len(member) > 0 && member[0].Membership() == "join", true
}

// local finds a joined user of this server.
func (t *tx) local(r *room) *mxfed.Event {
	for _, e := range t.stored(`e.id IN (SELECT event FROM state WHERE room = ? AND server = ? AND membership = 'join' AND until = 9223372036854775807 LIMIT 1)`,
		r.ID, t.db.own) {
		return e.Event
	}
	return nil
}

// Invited implements mxfed.InviteHost: users take every invite. The same invite may come again, and late.
func (h *host) Invited(ctx context.Context, inv *mxfed.Invite) error {
	return h.db.update(ctx, "", func(t *tx) error { return t.outside(inv.User, inv.Event, inv.State, inv.Rejection().Via) })
}

// AcceptJoin implements mxfed.JoinHost. A join that the room has already gets the same answer again.
func (h *host) AcceptJoin(ctx context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	stored, err := h.accept(ctx, m)
	if err != nil {
		return nil, err
	}
	of, answer := &excerpt{room: stored.RoomID(), snapshot: stored.before}, &mxfed.SendJoinResponse{Event: stored.Event}
	if m.OmitMembers {
		answer.Servers, err = query(ctx, h.db, func(t *tx) []mxfed.ServerName {
			t.omitMembers(of, stored.Sender())
			return t.servers(of.room, of.base)
		})
	}
	answer.State, answer.Auth = h.stateOf(ctx, of), h.authOf(ctx, of, stored.Auth())
	return answer, err
}

// Accept implements mxfed.MemberHost, for leaves and knocks.
func (h *host) Accept(ctx context.Context, m *mxfed.Membership) error {
	_, err := h.accept(ctx, m)
	return err
}

// accept stores an event of another server's user, once, and returns it as stored. The room is held, so that what Check
// looks at is what the event meets.
func (h *host) accept(ctx context.Context, m *mxfed.Membership) (stored *roomEvent, err error) {
	id := m.Event.RoomID()
	err = h.db.update(ctx, id, func(t *tx) error {
		r, now, err := t.facts(id, m.Ask)
		if err != nil {
			return err
		}
		if err := m.Check(now); err != nil {
			return err
		}
		if stored = t.placed(id, m.Event.ID()); stored != nil {
			return nil
		}
		before, known := t.stateAfter(r, m.Event.Prev())
		if !known { // the event came as part of a state: what was before it is not known here
			return mxfed.ErrNotFound
		}
		stored = &roomEvent{Event: m.Event, before: before}
		return t.add(r, &addition{event: m.Event, before: before, toAll: true})
	})
	return stored, err
}

// stateOf pages through a state, without a transaction that a slow reader could keep open.
func (h *host) stateOf(ctx context.Context, of *excerpt) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		err := h.eachEntry(ctx, of, func(_ mxfed.EventID, text string) bool { return yield([]byte(text), nil) })
		if err != nil {
			yield(nil, err)
		}
	}
}

// authOf pages through the auth chain of a state, of which only IDs are in memory as a whole.
func (h *host) authOf(ctx context.Context, of *excerpt, more []mxfed.EventID) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		chain, err := h.authIDs(ctx, of, more)
		for names := range slices.Chunk(chain, batch) {
			var texts []string
			if err == nil {
				texts, err = h.texts(ctx, names)
			}
			for _, text := range texts {
				if !yield([]byte(text), nil) {
					return
				}
			}
		}
		if err != nil {
			yield(nil, err)
		}
	}
}

// EventsByID implements mxfed.EventHost.
func (h *host) EventsByID(ctx context.Context, origin mxfed.ServerName, names []mxfed.EventID) ([]*mxfed.Event, error) {
	return query(ctx, h.db, func(t *tx) []*mxfed.Event {
		return t.visible(origin, t.stored(`e.id IN (?) AND e.status <> ?`, names, statusRejected))
	})
}

// StateIDs implements mxfed.EventHost.
func (h *host) StateIDs(ctx context.Context, id mxfed.RoomID, event mxfed.EventID) (state, auth []mxfed.EventID, err error) {
	e, err := query(ctx, h.db, func(t *tx) *roomEvent { return t.placed(id, event) })
	if err != nil || e == nil {
		return nil, nil, orNotFound(err)
	}
	of := &excerpt{room: id, snapshot: e.before}
	err = h.eachEntry(ctx, of, func(entry mxfed.EventID, _ string) bool { state = append(state, entry); return true })
	if err == nil {
		auth, err = h.authIDs(ctx, of, nil)
	}
	return state, auth, err
}

func orNotFound(err error) error {
	if err == nil {
		err = mxfed.ErrNotFound
	}
	return err
}

// ResolveAlias implements mxfed.DirectoryHost.
func (h *host) ResolveAlias(ctx context.Context, alias mxfed.RoomAlias) (answer *mxfed.AliasResponse, err error) {
	err = h.db.view(ctx, func(t *tx) error {
		room, found := one[mxfed.RoomID](t, `SELECT room FROM aliases WHERE alias = ?`, alias)
		if !found {
			return mxfed.ErrNotFound
		}
		answer = &mxfed.AliasResponse{Room: room, Servers: t.servers(room, forever-1)}
		return nil
	})
	return answer, err
}
