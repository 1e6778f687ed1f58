package mxfed

import (
	"context"
	"strings"
)

// RoomQuery lists the facts of a room that are wanted. Each field names the field of Room that answers it; what is not
// asked for may be left out of the answer.
type RoomQuery struct {
	// Origin is the server on whose behalf is asked, empty for this server itself. To is the own name that must be in the
	// room.
	Origin, To ServerName
	// State names entries of Room.State and, with Prev, of Room.Before; 64 at most.
	State []StateKey
	// Prev are the prev_events of an event that is being checked: see Room.Before.
	Prev []EventID
	// Events are the auth_events of an event that is being checked: see Room.Events.
	Events []EventID
	// Event is the event that is being checked. It is wanted in Room.Events too, but only if it is part of the room.
	Event EventID
	// User and Allow ask whether the user is joined to these rooms: see Room.Joined.
	User  UserID
	Allow []RoomID
	// Servers asks which of these are in the room: see Room.Present.
	Servers []ServerName
	// Local asks for Room.Local.
	Local bool
}

// Room is one snapshot of a room's facts. A fact that is left out means "cannot tell" and never lets anyone in, but for State
// and Before: there a key that was asked for and is left out counts as not set. A host that loses a ban, an access control
// list or the power levels opens the room; if it cannot read them it returns an error.
type Room struct {
	Version RoomVersion
	// Latest are the forward extremities: the prev_events of the next event.
	Latest []*Event
	// State holds the current state entries asked for; keys that are not set are left out.
	State []*Event
	// Before holds the same keys as they were after RoomQuery.Prev: if there are several with different states, resolved by
	// the algorithm of the room version, which this package does not have (see gmslbridge). Nil: some of Prev is not known
	// here; empty: nothing was set.
	Before []*Event
	// Events are those of RoomQuery.Events that this room has accepted, soft-failed ones included and rejected ones left out;
	// and RoomQuery.Event, if the room has accepted it and it was not soft-failed.
	Events []*Event
	// Joined tells of each room in RoomQuery.Allow whether the user is joined; no entry: this server is not in that room.
	Joined map[RoomID]bool
	// Present tells of each server in RoomQuery.Servers whether it has a joined user. One without an entry counts as there
	// where that is stricter: a policy server then has to be asked.
	Present map[ServerName]bool
	// Local is the member event of a joined user of RoomQuery.To, whichever; those with a power of their own are asked for in
	// RoomQuery.State.
	Local *Event
}

// RoomSource states facts of the rooms that this host is in. It is asked two or three times for one request, possibly by
// many requests at once.
type RoomSource interface {
	// Room returns a snapshot. ErrNotFound: the host does not know the room, RoomQuery.To has no user in it (any more), or
	// another server asks (RoomQuery.Origin) and the host has not the whole of its state yet. For this server itself a room
	// of which only the create event exists is known: its creator is about to join.
	Room(ctx context.Context, id RoomID, ask RoomQuery) (*Room, error)
}

// RoomSourceFunc is a RoomSource that is one function.
type RoomSourceFunc func(ctx context.Context, id RoomID, ask RoomQuery) (*Room, error)

// Room calls f.
func (f RoomSourceFunc) Room(ctx context.Context, id RoomID, ask RoomQuery) (*Room, error) {
	return f(ctx, id, ask)
}

// readRoom asks source for facts and gives every way of not having them the same answer.
func readRoom(ctx context.Context, source RoomSource, id RoomID, ask RoomQuery) (*Room, *roomRules, error) {
	if source == nil {
		return nil, nil, errNoRoom()
	}
	room, err := source.Room(ctx, id, ask)
	if err != nil {
		if answerTo(err).Code == ErrNotFound {
			err = errNoRoom()
		}
		return nil, nil, err
	}
	if room == nil {
		return nil, nil, errNoRoom()
	}
	rules := room.Version.rules()
	if rules == nil {
		return nil, nil, incompatible(room.Version)
	}
	return room, rules, nil
}

// errNoRoom is the answer about rooms that are unknown, left or not yet complete alike.
func errNoRoom() error { return refuse(ErrNotFound, "room is not known here") }

// state looks entries up in the current state.
func (r *Room) state(typ, key string) *Event { return stateOf(r.State, nil)(typ, key) }

// entries are those of keys that are set in the current state.
func (r *Room) entries(keys []StateKey) (set []*Event) {
	for _, k := range keys {
		if e := r.state(k.Type, k.Key); e != nil {
			set = append(set, e)
		}
	}
	return set
}

// checkACL refuses servers that the room's access control list shuts out.
// https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func (r *Room) checkACL(origin ServerName) error {
	if origin != "" && !AllowedByACL(r.state(typeServerACL, ""), origin) {
		return refuse(ErrForbidden, "%s is shut out of the room by its access control list", origin)
	}
	return nil
}

// AllowedByACL tells whether an m.room.server_acl event admits a server; nil admits all. Handlers of this package ask it
// themselves; hosts need it for their own endpoints. https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func AllowedByACL(acl *Event, name ServerName) bool {
	if acl == nil {
		return true
	}
	address, ok := name.parse()
	if !ok {
		return false
	}
	if acl.content.get("allow_ip_literals") == "false" && address.lit {
		return false
	}
	host := string(name) // without the port, but with the brackets of an IPv6 literal
	if address.port != "" {
		host = host[:len(host)-len(address.port)-1]
	}
	host = strings.ToLower(host)
	return !anyGlob(acl.content.get("deny"), host) && anyGlob(acl.content.get("allow"), host)
}

// anyGlob tells whether one of a list of globs matches the whole of host; entries that are no strings match nothing.
func anyGlob(globs value, host string) bool {
	for g := range globs.elements() {
		if glob, ok := g.str(); ok && matchGlob(strings.ToLower(glob), host) {
			return true
		}
	}
	return false
}

// matchGlob matches * to any run and ? to any one byte of s, which is ASCII. It goes back to the last * only, so its time
// is bounded by len(glob)*len(s).
func matchGlob(glob, s string) bool {
	g, i, star, mark := 0, 0, -1, 0
	for i < len(s) {
		switch {
		case g < len(glob) && glob[g] == '*':
			star, mark = g, i
			g++
		case g < len(glob) && (glob[g] == '?' || glob[g] == s[i]):
			g++
			i++
		case star >= 0:
			mark++
			g, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(glob[g:], "*") == ""
}
