package mxfed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strings"
)

// This file lets servers that are in a room read it: the state before one of its events, single events, and what events
// are authorised by. A server that has joined without being told of all members needs it to learn the rest.
// https://spec.matrix.org/v1.19/server-server-api/#retrieving-events

// EventHost reads events and states of the rooms that the host is in. Methods may be called at any time from any goroutine.
// An Error or ErrorCode decides the answer, other errors are 500.
type EventHost interface {
	// EventsByID returns those of ids, of whatever room, that this host has accepted, in any order; others are left out. It is
	// asked for 500 at most. Those that origin may not see, by the room's history visibility, are left out as well; an empty
	// origin may see all of them: then they are state or authorise state, which is open to every server that is in the room.
	// https://spec.matrix.org/v1.19/client-server-api/#room-history-visibility
	EventsByID(ctx context.Context, origin ServerName, ids []EventID) ([]*Event, error)
	// StateIDs returns the state of a room before one of its events, and the auth chain of that state, each ID once. The
	// create event of a room whose events do not name it may be left out of the chain.
	// ErrNotFound: that state is not known.
	StateIDs(ctx context.Context, room RoomID, event EventID) (state, auth []EventID, err error)
}

// NewStateHandler serves GET state: the state before an event and its auth chain, to servers with a joined user in the
// room. The answer is streamed, and the host is asked for its events in batches; still no other request costs as much, so
// Config.Allow may want to limit it. Like all handlers of this file it needs Config.Rooms: without it every room is unknown.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1stateroomid
func NewStateHandler(s *Server, host EventHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		state, auth, err := s.stateIDs(ctx, host, in)
		if err != nil {
			return err
		}
		return streamAnswer(ctx, w, func(b *bufio.Writer) error {
			b.WriteString(`{"auth_chain":[`)
			if err := writeEvents(ctx, b, storedEvents(ctx, host, in.room(), auth)); err != nil {
				return err
			}
			b.WriteString(`],"pdus":[`)
			if err := writeEvents(ctx, b, storedEvents(ctx, host, in.room(), state)); err != nil {
				return err
			}
			_, err := b.WriteString("]}")
			return err
		})
	}
	return &endpoint{server: s, name: "state", method: http.MethodGet, versions: []string{"v1"}, params: 1, serve: serve}
}

// NewStateIDsHandler serves GET state_ids: what NewStateHandler serves, by ID.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1state_idsroomid
func NewStateIDsHandler(s *Server, host EventHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		state, auth, err := s.stateIDs(ctx, host, in)
		if err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, object(field{"auth_chain_ids", eventIDs(auth)}, field{"pdu_ids", eventIDs(state)}))
		return nil
	}
	return &endpoint{server: s, name: "state_ids", method: http.MethodGet, versions: []string{"v1"}, params: 1, serve: serve}
}

func eventIDs(ids []EventID) value {
	list := make([]value, len(ids))
	for i, id := range ids {
		list[i] = quoted(id)
	}
	return array(list...)
}

// stateIDs checks a request for the state before an event and asks the host for it.
func (s *Server) stateIDs(ctx context.Context, host EventHost, in *incoming) (state, auth []EventID, err error) {
	id := EventID(in.query.Get("event_id"))
	if id == "" {
		return nil, nil, refuse(ErrMissingParam, "event_id is missing")
	}
	e, err := s.readable(ctx, in, in.room(), id)
	if err != nil {
		return nil, nil, err
	}
	state, auth, err = host.StateIDs(ctx, in.room(), id)
	if err != nil && answerTo(err).Code == ErrNotFound {
		err = errNoEvent(err)
	}
	if create := e.impliedCreate(); create != "" && err == nil && !slices.Contains(auth, create) {
		auth = append([]EventID{create}, auth...)
	}
	return state, auth, err
}

// impliedCreate is the create event on which e depends without naming it among its auth_events, empty if it names it.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func (e *Event) impliedCreate() EventID {
	if !e.rules.hashRoomID || e.typ == typeCreate {
		return ""
	}
	return EventID("$" + e.room[1:])
}

// readable demands that the asking server is in the room at this moment and not shut out of it, and returns the event of
// the room that it asks about.
// https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func (s *Server) readable(ctx context.Context, in *incoming, id RoomID, event EventID) (*Event, error) {
	room, _, err := readRoom(ctx, s.client.rooms, id, RoomQuery{Origin: in.Origin, To: in.To, State: []StateKey{{typeServerACL, ""}},
		Servers: []ServerName{in.Origin}, Event: event})
	if err != nil {
		return nil, err
	}
	if err := room.checkACL(in.Origin); err != nil {
		return nil, err
	}
	if !room.Present[in.Origin] {
		return nil, refuse(ErrForbidden, "%s has no user in the room", in.Origin)
	}
	e := findEvent(room.Events, event)
	if e == nil || e.room != id {
		return nil, errNoEvent(nil)
	}
	return e, nil
}

// errNoEvent is the answer about events that are unknown, of another room or not for the caller's eyes alike.
func errNoEvent(cause error) error { return because(cause, ErrNotFound, "event is not known here") }

// eventBatch is how many events a host is asked for at a time: a room is never in memory as a whole.
const eventBatch = 500

// storedEvents yields the events of a room that the host has named by ids.
func storedEvents(ctx context.Context, host EventHost, room RoomID, ids []EventID) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for batch := range slices.Chunk(ids, eventBatch) {
			events, err := readEvents(ctx, host, room, batch)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, e := range events {
				if !yield(e.JSON(), nil) {
					return
				}
			}
		}
	}
}

// readEvents returns the events of a room with these IDs, in order. All must be there: without one of them the answer would
// seem to be whole, and is not.
func readEvents(ctx context.Context, host EventHost, room RoomID, ids []EventID) ([]*Event, error) {
	found, err := host.EventsByID(ctx, "", ids)
	if err != nil {
		return nil, err
	}
	known := make(map[EventID]*Event, len(found))
	for _, e := range found {
		if e.RoomID() == room {
			known[e.id] = e
		}
	}
	events := make([]*Event, len(ids))
	for i, id := range ids {
		if events[i] = known[id]; events[i] == nil {
			return nil, fmt.Errorf("EventHost has no event %s, which the state of %s is made of", id, room)
		}
	}
	return events, nil
}

// NewEventHandler serves GET event: one event, to servers with a joined user in its room that may see it. To all others it
// is as if the event did not exist. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1eventeventid
func NewEventHandler(s *Server, host EventHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		id := EventID(in.params[0])
		events, err := host.EventsByID(ctx, in.Origin, []EventID{id})
		e := findEvent(events, id)
		if err == nil && e != nil {
			_, err = s.readable(ctx, in, e.room, id)
		}
		switch {
		case err != nil && answerTo(err).Status >= 500:
			return err
		case err != nil || e == nil:
			return errNoEvent(err)
		}
		writeJSON(w, http.StatusOK, object(field{"origin", quoted(in.To)},
			field{"origin_server_ts", integer(s.client.now().UnixMilli())}, field{"pdus", array(e.text)}))
		return nil
	}
	return &endpoint{server: s, name: "event", method: http.MethodGet, versions: []string{"v1"}, params: 1, serve: serve}
}

// NewEventAuthHandler serves GET event_auth: the auth chain of an event, to servers with a joined user in the room.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1event_authroomideventid
func NewEventAuthHandler(s *Server, host EventHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		e, err := s.readable(ctx, in, in.room(), EventID(in.id()))
		if err != nil {
			return err
		}
		return streamAnswer(ctx, w, func(b *bufio.Writer) error {
			b.WriteString(`{"auth_chain":[`)
			if err := writeEvents(ctx, b, authChain(ctx, host, e)); err != nil {
				return err
			}
			_, err := b.WriteString("]}")
			return err
		})
	}
	return &endpoint{server: s, name: "event_auth", method: http.MethodGet, versions: []string{"v1"}, params: 2, serve: serve}
}

// maxAuthChain bounds the auth chain of one event. Rooms that are much reconfigured have chains of some thousands.
const maxAuthChain = 100_000

var errLongChain = errors.New("auth chain is too long")

// authChain yields the auth events of e, theirs, and so on, each once.
func authChain(ctx context.Context, host EventHost, e *Event) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		seen := make(map[EventID]bool)
		var todo []EventID
		add := func(ids []EventID) {
			for _, id := range ids {
				if !seen[id] {
					id = EventID(strings.Clone(string(id))) // it is a piece of its event's text, which need not stay
					seen[id], todo = true, append(todo, id)
				}
			}
		}
		if add(e.Auth()); e.impliedCreate() != "" {
			add([]EventID{e.impliedCreate()})
		}
		for len(todo) > 0 {
			batch := todo[:min(len(todo), eventBatch)]
			todo = todo[len(batch):]
			events, err := readEvents(ctx, host, e.room, batch)
			if err == nil && len(seen) > maxAuthChain {
				err = errLongChain
			}
			if err != nil {
				yield(nil, err)
				return
			}
			for _, a := range events {
				if !yield(a.JSON(), nil) {
					return
				}
				add(a.Auth())
			}
		}
	}
}
