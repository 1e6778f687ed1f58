// Package memhost is a host of maps: what mxfed leaves to the program around it, over rooms held in memory. It is meant to
// be read before writing a host with a database, and serves tests as the other side.
//
// What a host has to do is in three methods. Room states facts of a room. Invited stores an invite. AcceptJoin stores a
// join, in one critical section that reads the facts again. The other methods are what a program does with its rooms:
// create them, send events, invite, join, look.
//
// Four things are simpler than in a real host. Rooms are gone when the program ends, and their IDs are counted, not drawn
// at random. Where branches of a room meet, the state that was accepted last wins, in place of state resolution. Nothing
// is sent on to the other servers of a room: a real host would queue each event for them in the transaction that stores
// it. And the first user of a server stands for all when it lets others in.
package memhost

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"example.org/mxfed"
)

// Host is a mxfed.RoomSource, a mxfed.InviteHost and a mxfed.JoinHost. It is safe for concurrent use; its lock is never
// held across a call of another server.
type Host struct {
	// Server is what New made of its Config.
	Server *mxfed.Server

	created atomic.Int64 // rooms
	mu      sync.Mutex   // guards the rest
	rooms   map[mxfed.RoomID]*room
	invites map[mxfed.EventID]*mxfed.Invite
}

// New returns a host that is in no room. Config.Rooms is the host itself, whatever cfg says.
func New(cfg mxfed.Config) (h *Host, err error) {
	h = &Host{rooms: make(map[mxfed.RoomID]*room), invites: make(map[mxfed.EventID]*mxfed.Invite)}
	cfg.Rooms = h
	h.Server, err = mxfed.NewServer(cfg)
	return h, err
}

// Room implements mxfed.RoomSource.
func (h *Host) Room(_ context.Context, id mxfed.RoomID, ask mxfed.RoomQuery) (*mxfed.Room, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.facts(id, ask)
}

// facts answers ask as of now, with the whole state: a host may always tell more than was asked. The caller holds the
// lock.
func (h *Host) facts(id mxfed.RoomID, ask mxfed.RoomQuery) (*mxfed.Room, error) {
	r := h.rooms[id]
	if r == nil || ask.Origin != "" && !r.speaks(ask.To) {
		return nil, mxfed.ErrNotFound
	}
	now := &mxfed.Room{Version: r.log[0].Version(), Latest: events(r.latest), State: events(r.state), Events: events(r.find(ask.Events)),
		Joined: make(map[mxfed.RoomID]bool), Present: servers(r.state)}
	if prev := r.find(ask.Prev); len(prev) == len(ask.Prev) && !slices.ContainsFunc(prev, (*entry).outside) {
		now.Before = events(r.after(prev))
	}
	for _, id := range ask.Allow {
		if other := h.rooms[id]; other != nil && other.speaks(ask.To) {
			now.Joined[id] = slices.ContainsFunc(other.state, func(e *entry) bool { return e.joined != "" && e.joined == ask.User })
		}
	}
	if i := slices.IndexFunc(r.state, func(e *entry) bool { return e.joined != "" && e.joined.Server() == ask.To }); i >= 0 {
		now.Local = r.state[i].Event
	}
	return now, nil
}

// Invited implements mxfed.InviteHost. It takes every invite: a program that is more particular passes an InviteHost of
// its own, which calls this one.
func (h *Host) Invited(_ context.Context, inv *mxfed.Invite) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.invites[inv.Event.ID()] = inv // the same invite may come again
	return nil
}

// AcceptJoin implements mxfed.JoinHost. Nobody can change the room between the look at the facts and the end, as in a
// serialisable transaction. A join that the room has already gets the same answer again: nothing that it is made of ever
// changes.
func (h *Host) AcceptJoin(_ context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now, err := h.facts(m.Event.RoomID(), m.Ask)
	if err != nil {
		return nil, err
	}
	if err := m.Check(now); err != nil {
		return nil, err
	}
	r := h.rooms[m.Event.RoomID()]
	return r.answer(r.add(m.Event, r.find(m.Event.Prev())), m.OmitMembers)
}

// State drafts a state event for CreateRoom or Send; content is JSON text.
func State(typ, key, content string) *mxfed.Draft {
	return &mxfed.Draft{Type: typ, StateKey: &key, Content: json.RawMessage(content)}
}

// CreateRoom makes a room with its creator in it and then sets state in order, such as
// State("m.room.join_rules", "", `{"join_rule":"public"}`). Without join rules only invited users can join; without power
// levels the creator has all power.
func (h *Host) CreateRoom(ctx context.Context, v mxfed.RoomVersion, creator mxfed.UserID, state ...*mxfed.Draft) (mxfed.RoomID, error) {
	create := State("m.room.create", "", fmt.Sprintf(`{"creator":%q}`, creator)) // versions 11 and 12 ignore it
	create.Version, create.Sender = v, creator
	if v != "12" { // there the event's hash is the room's ID
		create.Room = mxfed.RoomID(fmt.Sprintf("!%d:%s", h.created.Add(1), creator.Server()))
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

// store keeps an event of a local user, if it was made.
func (h *Host) store(e *mxfed.Event, err error) (*mxfed.Event, error) {
	if err == nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		r := h.room(e)
		r.add(e, r.find(e.Prev()))
	}
	return e, err
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
	r := h.room(result.Event)
	before := make([]*entry, 0, len(result.State)+len(result.Auth))
	for _, e := range slices.Concat(result.State, result.Auth) {
		before = append(before, r.add(e, nil))
	}
	r.add(result.Event, before[:len(result.State)])
	r.partial = len(result.Servers) > 0
	return result, nil
}

// Invites returns the invites that were taken.
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

// room is a log of events in the order in which they were accepted: each stands behind those that it was built on.
type room struct {
	log     []*entry
	index   map[mxfed.EventID]*entry
	latest  []*entry // the forward extremities
	state   []*entry // after them
	partial bool     // members were left out when this server joined
}

type entry struct {
	*mxfed.Event
	joined mxfed.UserID // whom the event makes a member of the room
	place  int          // in the log
	prev   []*entry     // what the event was built on
}

// outside tells whether neither prev nor the state at the event are known here.
func (e *entry) outside() bool { return e.prev == nil }

// add puts an event, once, into the log. It becomes the room's latest unless what it was built on is not known.
func (r *room) add(e *mxfed.Event, prev []*entry) *entry {
	if known := r.index[e.ID()]; known != nil {
		return known
	}
	added := &entry{Event: e, joined: joined(e), place: len(r.log), prev: prev}
	r.log, r.index[e.ID()] = append(r.log, added), added
	if prev != nil {
		r.latest = append(slices.DeleteFunc(r.latest, func(l *entry) bool { return slices.Contains(prev, l) }), added)
		r.state = r.after(r.latest)
	}
	return added
}

// joined reads a member event. A map tells names apart that differ in case, a struct would not.
func joined(e *mxfed.Event) mxfed.UserID {
	var content map[string]any
	user, _ := e.StateKey()
	if e.Type() != "m.room.member" || json.Unmarshal(e.Content(), &content) != nil || content["membership"] != "join" {
		return ""
	}
	return mxfed.UserID(user)
}

// find looks up events. Those that are not known are left out.
func (r *room) find(ids []mxfed.EventID) []*entry {
	found := make([]*entry, 0, len(ids))
	for _, id := range ids {
		if e := r.index[id]; e != nil {
			found = append(found, e)
		}
	}
	return found
}

// after returns the state after all of heads: for each key the last entry among these events and all that they are built
// on. A database would store the state at each event, or what each changed.
func (r *room) after(heads []*entry) (state []*entry) {
	counts, set := make([]bool, len(r.log)), make(map[mxfed.StateKey]bool)
	for _, e := range heads {
		counts[e.place] = true
	}
	for _, e := range slices.Backward(r.log) {
		for _, p := range e.prev {
			counts[p.place] = counts[p.place] || counts[e.place]
		}
		key, ok := e.StateKey()
		if k := (mxfed.StateKey{Type: e.Type(), Key: key}); ok && counts[e.place] && !set[k] {
			set[k] = true
			state = append(state, e)
		}
	}
	slices.Reverse(state)
	return state
}

// servers are those of joined users.
func servers(state []*entry) map[mxfed.ServerName]bool {
	present := make(map[mxfed.ServerName]bool)
	for _, e := range state {
		if e.joined != "" {
			present[e.joined.Server()] = true
		}
	}
	return present
}

// speaks tells whether a server is in the room and knows all of it.
func (r *room) speaks(name mxfed.ServerName) bool {
	return !r.partial && servers(r.state)[name]
}

func events(entries []*entry) []*mxfed.Event {
	list := make([]*mxfed.Event, len(entries))
	for i, e := range entries {
		list[i] = e.Event
	}
	return list
}

// answer tells a server that has joined about the room before the join.
func (r *room) answer(join *entry, omitMembers bool) (*mxfed.SendJoinResponse, error) {
	if join.outside() { // it was part of the room before this server was
		return nil, mxfed.ErrNotFound
	}
	answer, state := &mxfed.SendJoinResponse{Event: join.Event}, r.after(join.prev)
	if omitMembers {
		answer.Servers = slices.Sorted(maps.Keys(servers(state)))
		state = slices.DeleteFunc(state, func(e *entry) bool { return e.Type() == "m.room.member" })
	}
	answer.State, answer.Auth = pdus(state), pdus(r.authChain(append(state, join)))
	return answer, nil
}

// authChain returns the auth events of entries, theirs, and so on.
func (r *room) authChain(of []*entry) []*entry {
	chain, seen := slices.Clone(of), make(map[*entry]bool)
	for i := 0; i < len(chain); i++ {
		for _, e := range r.find(chain[i].Auth()) {
			if !seen[e] {
				seen[e] = true
				chain = append(chain, e)
			}
		}
	}
	return chain[len(of):]
}

// pdus yields events as they are stored.
func pdus(entries []*entry) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, e := range entries {
			if !yield(e.JSON(), nil) {
				return
			}
		}
	}
}
