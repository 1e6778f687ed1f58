package memhost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	"example.org/mxfed"
)

// This file is what a program does for its own users.

// State drafts a state event for CreateRoom or Send; content is JSON text.
func State(typ, key, content string) *mxfed.Draft {
	return &mxfed.Draft{Type: typ, StateKey: &key, Content: json.RawMessage(content)}
}

// CreateRoom makes a room with its creator in it and then sets state in order, such as
// State("m.room.join_rules", "", `{"join_rule":"public"}`). Without join rules only invited users can join; without power
// levels the creator has all power.
func (h *Host) CreateRoom(ctx context.Context, v mxfed.RoomVersion, creator mxfed.UserID, state ...*mxfed.Draft) (mxfed.RoomID, error) {
	n := h.created.Add(1)
	create := State("m.room.create", "", fmt.Sprintf(`{"creator":%q,"example.number":%d}`, creator, n)) // 11 and 12 ignore creator
	create.Version, create.Sender = v, creator
	if v != "12" { // there the event's hash is the room's ID, so the number is in the event
		create.Room = mxfed.RoomID(fmt.Sprintf("!%d:%s", n, creator.Server()))
	}
	e, err := h.Send(ctx, create)
	state = append([]*mxfed.Draft{State("m.room.member", string(creator), `{"membership":"join"}`)}, state...)
	for i := 0; err == nil && i < len(state); i++ {
		draft := *state[i]
		draft.Room, draft.Sender = e.RoomID(), creator
		_, err = h.Send(ctx, &draft)
	}
	return e.RoomID(), err
}

// Send makes and stores an event of a local user. Two that are made at the same time become two branches of the room.
func (h *Host) Send(ctx context.Context, d *mxfed.Draft) (*mxfed.Event, error) {
	return h.store(h.Server.Build(ctx, d))
}

// Invite invites a user, of this server or another, and stores the invite.
func (h *Host) Invite(ctx context.Context, room mxfed.RoomID, sender, user mxfed.UserID) (*mxfed.Event, error) {
	return h.store(h.Server.Client().InviteUser(ctx, room, sender, user, nil))
}

// store keeps an event of a local user, if it was made and the room still allows it.
func (h *Host) store(e *mxfed.Event, err error) (*mxfed.Event, error) {
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if e.Type() != "m.room.create" {
		now, err := h.facts(e.RoomID(), e.Query())
		if err == nil {
			err = e.Check(now)
		}
		if err != nil {
			return nil, err
		}
	}
	r := h.room(e)
	r.add(e, r.find(e.Prev()))
	return e, nil
}

// room returns the room of e, new if e is the first event of it. The caller holds the lock.
func (h *Host) room(e *mxfed.Event) *room {
	if h.rooms[e.RoomID()] == nil {
		h.rooms[e.RoomID()] = &room{index: make(map[mxfed.EventID]*entry)}
	}
	return h.rooms[e.RoomID()]
}

// Join joins a local user to a room through another server and stores the room. req.Sink must be nil. For a room that
// this server is in already, Send the join.
func (h *Host) Join(ctx context.Context, req *mxfed.JoinRequest) (*mxfed.JoinResult, error) {
	result, err := h.Server.Client().Join(ctx, req)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.rooms, result.Event.RoomID()) // what it was before this server left has no place in it any more
	r := h.room(result.Event)
	r.enter(result.Event, result.State, result.Auth)
	r.partial = len(result.Servers) > 0
	return result, nil
}

// Complete fetches what a join with JoinRequest.OmitMembers has left out. Only then does this server speak for the room.
func (h *Host) Complete(ctx context.Context, joined *mxfed.JoinResult) (*mxfed.StateResult, error) {
	req := &mxfed.StateRequest{Event: joined.Event, Via: append([]mxfed.ServerName{joined.Via}, joined.Servers...)}
	result, err := h.Server.Client().FetchState(ctx, req)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.rooms[joined.Event.RoomID()]
	delete(h.rooms, joined.Event.RoomID())
	r := h.room(joined.Event)
	r.enter(joined.Event, result.State, result.Auth)
	for _, e := range old.log { // what has happened since
		if e.outside() {
			r.add(e.Event, nil)
		} else {
			r.add(e.Event, r.find(e.Prev()))
		}
	}
	return result, nil
}

// Reject turns an invite down. If no server of the room can be told, nobody but this server knows.
func (h *Host) Reject(ctx context.Context, inv *mxfed.Invite) error {
	_, err := h.Server.Client().Leave(ctx, inv.Rejection())
	if untold := (*mxfed.LeaveError)(nil); err != nil && !errors.As(err, &untold) {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.invites, inv.Event.ID())
	return nil
}

// Invites returns the invites that were taken and not rejected.
func (h *Host) Invites() map[mxfed.EventID]*mxfed.Invite {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.invites)
}

// Events returns the current state of a room and all events that are known of it, both in order of acceptance; nothing of
// a room that is not known.
func (h *Host) Events(id mxfed.RoomID) (state, all []*mxfed.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.rooms[id]; r != nil {
		state, all = events(r.state), events(r.log)
	}
	return state, all
}
