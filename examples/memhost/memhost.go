// Package memhost is a host of maps: what mxfed leaves to the program around it, over rooms held in memory. It is meant to
// be read before writing a host with a database, and serves tests as the other side.
//
// What a host has to do is in memhost.go. Room states facts of a room. Invited stores an invite. AcceptJoin stores a join,
// and Accept a leave or knock, in one critical section that reads the facts again. EventsByID and StateIDs let other servers
// read. users.go is what a program does for its own users, and room.go how a room is kept.
//
// Five things are simpler than in a real host. Rooms are gone when the program ends, and their IDs are counted, not drawn
// at random. Where branches of a room meet, the state that was accepted last wins, in place of state resolution. Nothing
// is sent on to the other servers of a room: a real host would queue each event for them in the transaction that stores
// it. The first user of a server stands for all when it lets others in. And history is visible to all servers of a room.
package memhost

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"example.org/mxfed"
)

// Host is a mxfed.RoomSource, and takes and gives what mxfed.Hosts is about. It is safe for concurrent use; its lock is
// never held across a call of another server.
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

// Hosts offers all that the host can do.
func (h *Host) Hosts() mxfed.Hosts {
	return mxfed.Hosts{Invite: h, Join: h, Leave: h, Knock: h, Events: h}
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
	if !r.knows(ask.To, ask.Origin) {
		return nil, mxfed.ErrNotFound
	}
	now := &mxfed.Room{Version: r.log[0].Version(), Latest: events(r.latest), State: events(r.state), Events: events(r.find(append(slices.Clone(ask.Events), ask.Event))),
		Joined: make(map[mxfed.RoomID]bool), Present: make(map[mxfed.ServerName]bool)}
	here := servers(r.state)
	for _, name := range ask.Servers {
		now.Present[name] = here[name] // false is an answer too
	}
	if prev := r.find(ask.Prev); len(prev) == len(ask.Prev) && !slices.ContainsFunc(prev, (*entry).outside) {
		now.Before = events(r.after(prev))
	}
	for _, id := range ask.Allow {
		if other := h.rooms[id]; other.knows(ask.To, ask.Origin) {
			now.Joined[id] = slices.ContainsFunc(other.state, func(e *entry) bool { return e.joined() != "" && e.joined() == ask.User })
		}
	}
	if i := slices.IndexFunc(r.state, func(e *entry) bool { return e.joined().Server() == ask.To }); i >= 0 {
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

// AcceptJoin implements mxfed.JoinHost. A join that the room has already gets the same answer again: nothing that it is
// made of ever changes.
func (h *Host) AcceptJoin(_ context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r, join, err := h.accept(m)
	if err != nil {
		return nil, err
	}
	return r.answer(join, m.OmitMembers)
}

// Accept implements mxfed.MemberHost, for leaves and knocks.
func (h *Host) Accept(_ context.Context, m *mxfed.Membership) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, _, err := h.accept(m)
	return err
}

// accept stores an event of another server's user. The caller holds the lock, so that nobody can change the room between
// the look at the facts and the end, as in a serialisable transaction.
func (h *Host) accept(m *mxfed.Membership) (*room, *entry, error) {
	now, err := h.facts(m.Event.RoomID(), m.Ask)
	if err != nil {
		return nil, nil, err
	}
	if err := m.Check(now); err != nil {
		return nil, nil, err
	}
	r := h.rooms[m.Event.RoomID()]
	return r, r.add(m.Event, r.find(m.Event.Prev())), nil
}

// EventsByID implements mxfed.EventHost. Whoever is in a room may see all of it.
func (h *Host) EventsByID(_ context.Context, _ mxfed.ServerName, ids []mxfed.EventID) (found []*mxfed.Event, _ error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.rooms {
		found = append(found, events(r.find(ids))...)
	}
	return found, nil
}

// StateIDs implements mxfed.EventHost.
func (h *Host) StateIDs(_ context.Context, id mxfed.RoomID, event mxfed.EventID) (state, auth []mxfed.EventID, _ error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.rooms[id]
	if r == nil || r.index[event] == nil || r.index[event].outside() {
		return nil, nil, mxfed.ErrNotFound
	}
	before := r.after(r.index[event].prev)
	return ids(before), ids(r.authChain(before)), nil
}
