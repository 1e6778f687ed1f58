package memhost

import (
	"maps"
	"slices"

	"example.org/mxfed"
)

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
	place int      // in the log
	prev  []*entry // what the event was built on
}

// enter puts the first join of this server at the end of the state before it, as another server has told it.
func (r *room) enter(join *mxfed.Event, state, auth []*mxfed.Event) {
	before := make([]*entry, 0, len(state)+len(auth))
	for _, e := range slices.Concat(state, auth) {
		before = append(before, r.add(e, nil))
	}
	r.add(join, before[:len(state)])
}

// joined is whom the event makes a member of the room.
func (e *entry) joined() mxfed.UserID {
	if e.Membership() != "join" {
		return ""
	}
	user, _ := e.StateKey()
	return mxfed.UserID(user)
}

// outside tells whether neither prev nor the state at the event are known here.
func (e *entry) outside() bool { return e.prev == nil }

// add puts an event, once, into the log. It becomes the room's latest unless what it was built on is not known.
func (r *room) add(e *mxfed.Event, prev []*entry) *entry {
	if known := r.index[e.ID()]; known != nil {
		return known
	}
	added := &entry{Event: e, place: len(r.log), prev: prev}
	r.log, r.index[e.ID()] = append(r.log, added), added
	if prev != nil {
		r.latest = append(slices.DeleteFunc(r.latest, func(l *entry) bool { return slices.Contains(prev, l) }), added)
		r.state = r.after(r.latest)
	}
	return added
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
		if e.joined() != "" {
			present[e.joined().Server()] = true
		}
	}
	return present
}

// knows tells whether the room can be spoken of: if as a server's, that must be in it, unless its first user is about to join;
// and to others only by one that knows all of it.
func (r *room) knows(own, other mxfed.ServerName) bool {
	if r == nil || other != "" && r.partial {
		return false
	}
	return own == "" || servers(r.state)[own] || other == "" && len(r.log) == 1
}

func events(entries []*entry) []*mxfed.Event {
	list := make([]*mxfed.Event, len(entries))
	for i, e := range entries {
		list[i] = e.Event
	}
	return list
}

func ids(entries []*entry) []mxfed.EventID {
	list := make([]mxfed.EventID, len(entries))
	for i, e := range entries {
		list[i] = e.ID()
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
	answer.State, answer.Auth = mxfed.PDUs(events(state)), mxfed.PDUs(events(r.authChain(append(state, join))))
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
