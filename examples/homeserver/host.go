package main

import (
	"context"
	"encoding/json"
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
	err = h.db.view(ctx, func(t *tx) error {
		r, now, err := t.facts(id, ask)
		if err != nil {
			return err
		}
		facts = now
		facts.Latest, err = t.latest(r, ask.State)
		return err
	})
	return facts, err
}

// facts answers ask as of this transaction, but for Room.Latest.
func (t *tx) facts(id mxfed.RoomID, ask mxfed.RoomQuery) (r *room, now *mxfed.Room, err error) {
	if r, err = t.room(id); err != nil {
		return nil, nil, err
	}
	if ask.Origin != "" {
		if here, err := t.hasServer(id, ask.To); err != nil || !here || r.partial != nil {
			return nil, nil, orNotFound(err)
		}
	}
	now = &mxfed.Room{Version: r.version, Joined: make(map[mxfed.RoomID]bool), Present: make(map[mxfed.ServerName]bool)}
	if now.State, err = t.current(r, ask.State...); err == nil && len(ask.Prev) > 0 {
		now.Before, err = t.before(r, ask)
	}
	if err == nil && ask.Event != "" {
		now.Events, err = t.accepted(r, append(slices.Clone(ask.Events), ask.Event), ask.Event)
	}
	for _, name := range ask.Servers {
		if err == nil {
			now.Present[name], err = t.hasServer(id, name)
		}
	}
	for _, other := range ask.Allow {
		if err == nil {
			err = t.joined(now.Joined, other, ask)
		}
	}
	if err == nil && ask.Local {
		now.Local, err = t.local(r, ask.To)
	}
	return r, now, err
}

func orNotFound(err error) error {
	if err == nil {
		err = mxfed.ErrNotFound
	}
	return err
}

// before reads the state after ask.Prev, nil if it is not known.
func (t *tx) before(r *room, ask mxfed.RoomQuery) ([]*mxfed.Event, error) {
	s, ok, err := t.stateAfter(r, ask.Prev)
	if err != nil || !ok {
		return nil, err
	}
	return t.stateEvents(r.version, s, ask.State)
}

// joined notes down whether a user is in another room, if this server can tell.
func (t *tx) joined(joined map[mxfed.RoomID]bool, id mxfed.RoomID, ask mxfed.RoomQuery) error {
	other, err := t.room(id)
	if err == mxfed.ErrNotFound {
		return nil
	}
	here, err := t.hasServer(id, ask.To)
	if err != nil || !here || other.partial != nil {
		return err
	}
	member, err := t.current(other, mxfed.StateKey{Type: "m.room.member", Key: string(ask.User)})
	joined[id] = len(member) > 0 && member[0].Membership() == "join"
	return err
}

// Invited implements mxfed.InviteHost: users take every invite. The same invite may come again, and late.
func (h *host) Invited(ctx context.Context, inv *mxfed.Invite) error {
	shown := make([]json.RawMessage, 0, len(inv.State)+1)
	via := inv.Rejection().Via
	for _, s := range inv.State {
		shown = append(shown, stripped(&s))
	}
	return h.db.update(ctx, "", func(t *tx) error {
		return t.outside(&memberRow{user: inv.User, room: inv.Event.RoomID(), membership: "invite", version: inv.Event.Version(), via: via}, inv.Event, shown)
	})
}

// AcceptJoin implements mxfed.JoinHost. A join that the room has already gets the same answer again.
func (h *host) AcceptJoin(ctx context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	answer := &mxfed.SendJoinResponse{}
	var before int64
	err := h.db.update(ctx, string(m.Event.RoomID()), func(t *tx) (err error) {
		if m.OmitMembers {
			if answer.Servers, err = t.servers(m.Event.RoomID()); err != nil {
				return err
			}
		}
		answer.Event, before, err = t.accept(m)
		return err
	})
	if err != nil {
		return nil, err
	}
	answer.State = h.stateOf(ctx, before, !m.OmitMembers)
	answer.Auth = h.authOf(ctx, before, answer.Event, !m.OmitMembers)
	return answer, nil
}

// Accept implements mxfed.MemberHost, for leaves and knocks.
func (h *host) Accept(ctx context.Context, m *mxfed.Membership) error {
	return h.db.update(ctx, string(m.Event.RoomID()), func(t *tx) error {
		_, _, err := t.accept(m)
		return err
	})
}

// accept stores an event of another server's user, once, and returns it as stored, with the state before it. The room is
// held, so that what Check looks at is what the event meets.
func (t *tx) accept(m *mxfed.Membership) (*mxfed.Event, int64, error) {
	r, now, err := t.facts(m.Event.RoomID(), m.Ask)
	if err != nil {
		return nil, 0, err
	}
	if err := m.Check(now); err != nil {
		return nil, 0, err
	}
	if stored, before, err := t.known(r, m.Event.ID()); err != nil || stored != nil {
		return stored, before, err
	}
	s, ok, err := t.stateAfter(r, m.Event.Prev())
	if err != nil || !ok {
		return nil, 0, orNotFound(err)
	}
	before, err := t.keep(r.id, s)
	if err != nil {
		return nil, 0, err
	}
	return m.Event, before, t.add(r, &addition{event: m.Event, before: state{group: before}, toAll: true})
}

// stateOf pages through a state, without a transaction that a slow reader could keep open.
func (h *host) stateOf(ctx context.Context, group int64, members bool) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		err := h.eachEntry(ctx, group, members, func(e *entry) bool { return yield([]byte(e.json), nil) })
		if err != nil {
			yield(nil, err)
		}
	}
}

// authOf pages through the auth chains of a state and of an event. Only IDs are in memory as a whole.
func (h *host) authOf(ctx context.Context, group int64, e *mxfed.Event, members bool) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		chain, err := h.authIDs(ctx, group, e.Auth(), members)
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
func (h *host) EventsByID(ctx context.Context, origin mxfed.ServerName, names []mxfed.EventID) (events []*mxfed.Event, err error) {
	err = h.db.view(ctx, func(t *tx) error {
		if origin == "" {
			events, err = t.open(names)
		} else {
			events, err = t.visible(origin, names)
		}
		return err
	})
	return events, err
}

// StateIDs implements mxfed.EventHost.
func (h *host) StateIDs(ctx context.Context, id mxfed.RoomID, event mxfed.EventID) (state, auth []mxfed.EventID, err error) {
	var before int64
	err = h.db.view(ctx, func(t *tx) error {
		found, err := t.row(`SELECT state_before FROM events WHERE id = $1 AND room = $2 AND state_before IS NOT NULL`, []any{event, id}, &before)
		if !found {
			return orNotFound(err)
		}
		return nil
	})
	if err == nil {
		err = h.eachEntry(ctx, before, true, func(e *entry) bool { state = append(state, e.event); return true })
	}
	if err == nil {
		auth, err = h.authIDs(ctx, before, nil, true)
	}
	return state, auth, err
}

// ResolveAlias implements mxfed.DirectoryHost.
func (h *host) ResolveAlias(ctx context.Context, alias mxfed.RoomAlias) (answer *mxfed.AliasResponse, err error) {
	err = h.db.view(ctx, func(t *tx) error {
		answer = &mxfed.AliasResponse{}
		found, err := t.row(`SELECT room FROM aliases WHERE alias = $1`, []any{alias}, &answer.Room)
		if !found {
			return orNotFound(err)
		}
		answer.Servers, err = t.servers(answer.Room)
		return err
	})
	return answer, err
}
