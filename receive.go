package mxfed

import (
	"errors"
	"slices"
)

// This file judges events that come from elsewhere by what their room knows: which facts those are, and what follows.

// Reasons that errors.Is finds in what Event.Check and Membership.Check return. Any other error says that the facts are not
// about this event: they are of another room or room version, or hold another event under its ID. Then nothing is stored
// under that ID.
var (
	// ErrRejected: the event was never allowed. The host may keep it, so as not to fetch it again, but it counts for nothing.
	ErrRejected = errors.New("rejected")
	// ErrMissing: events that this one is built on are not known here. The host fetches them and checks again.
	ErrMissing = errors.New("events are missing")
	// ErrSoftFailed: the event was allowed when it was sent, but the room as it is now does not allow it. The host keeps it,
	// since others may build on it, and neither shows it to users nor makes it a forward extremity.
	// https://spec.matrix.org/v1.19/server-server-api/#soft-failure
	ErrSoftFailed = errors.New("soft-failed")
)

// Query names the facts that Check decides by. Room.State of the answer also holds what AllowedByACL and
// SignedByPolicyServer are asked about. Origin and To are empty: whether this server is in the room, and may be told of it
// by the server that sent the event, is for the host to look at.
func (e *Event) Query() RoomQuery {
	if e == nil {
		return RoomQuery{}
	}
	return RoomQuery{Prev: e.Prev(), Events: e.Auth(), Event: e.ID(), State: withKeys(slices.Clone(admissionState), authKeys(e)...)}
}

// admissionState are the entries that every request of another server about a room is judged by.
var admissionState = []StateKey{{typeCreate, ""}, {typePowerLevels, ""}, {typeJoinRules, ""}, {typeServerACL, ""}, {typePolicy, ""}}

// Check decides, by the answer to Query, what becomes of an event of any type that comes from elsewhere: nil means that the
// room takes it, or has it already; else the reason is ErrRejected, ErrSoftFailed or ErrMissing. It does no I/O, so a host
// calls it inside the transaction that stores the event. Before that, Server.Verify says whether the event is genuine;
// an access control list and a policy server are not looked at here. Errors are of type *Error.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (e *Event) Check(now *Room) error {
	known, err := e.checkBefore(now)
	if err != nil || known {
		return err
	}
	return e.checkNow(now)
}

// checkBefore checks an event against its auth events and the state before it, and tells whether the room has it already.
func (e *Event) checkBefore(now *Room) (known bool, err error) {
	if err := e.fits(now); err != nil {
		return false, err
	}
	if same := findEvent(now.Events, e.id); same != nil {
		if same.hash != e.hash { // possible where IDs are given, not computed
			return false, refuse(ErrInvalidParam, "another event has the ID %s", e.id)
		}
		return true, nil
	}
	auth := make([]*Event, 0, maxAuthEvents)
	for _, id := range e.refs[e.prevs:] {
		event := findEvent(now.Events, id)
		if event == nil {
			return false, because(ErrMissing, ErrForbidden, "auth event %s is not known here", id)
		}
		auth = append(auth, event)
	}
	create := now.state(typeCreate, "")
	if e.typ == typeCreate && create != nil {
		return false, because(ErrRejected, ErrForbidden, "the room has a create event")
	}
	if err := checkAuthEvents(e, auth); err != nil {
		return false, reason(ErrRejected, err)
	}
	if err := authorise(e, stateOf(auth, create), true); err != nil {
		return false, reason(ErrRejected, err)
	}
	if now.Before == nil {
		return false, because(ErrMissing, ErrForbidden, "prev_events are not known here")
	}
	return false, reason(ErrRejected, authorise(e, stateOf(now.Before, create), true))
}

// reason adds to a refusal what follows from it.
func reason(why, err error) error {
	if refused := (*Error)(nil); errors.As(err, &refused) {
		return because(why, refused.Code, "%s", refused.Message)
	}
	return err
}

// fits checks that the facts are about the event's room.
func (e *Event) fits(now *Room) error {
	if now == nil {
		return errNoRoom()
	}
	if e == nil || now.Version != e.rules.version {
		return refuse(ErrInvalidParam, "event is not of room version %s", now.Version)
	}
	foreign := func(f *Event) bool { return f != nil && f.room != e.room }
	if slices.ContainsFunc(now.State, foreign) || slices.ContainsFunc(now.Before, foreign) {
		return refuse(ErrForbidden, "event is built on events of another room")
	}
	return nil
}

func findEvent(events []*Event, id EventID) *Event {
	if i := slices.IndexFunc(events, func(e *Event) bool { return e.ID() == id }); i >= 0 {
		return events[i]
	}
	return nil
}

// checkNow checks an event that was allowed where it was sent against the current state.
func (e *Event) checkNow(now *Room) error {
	return reason(ErrSoftFailed, authorise(e.notFirst(now), stateOf(now.State, now.state(typeCreate, "")), true))
}

// notFirst hides, in a room that knows the user, that a join is built on the create event alone: the rule by which that lets
// a room's creator in, whatever has happened since, is about the beginning of a room.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func (e *Event) notFirst(now *Room) *Event {
	if e.membership != "join" || now.state(typeMember, e.stateKey) == nil {
		return e
	}
	late := *e
	late.refs, late.prevs = e.refs[e.prevs:], 0
	return &late
}
