package main

import (
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"time"

	"example.org/mxfed"
)

// This file is how clients learn what is new. https://spec.matrix.org/v1.19/client-server-api/#syncing

const (
	maxWait       = 2 * time.Minute // of a sync for something to happen
	timelineLimit = 20              // events of a room, unless a filter says otherwise
)

// syncQuery is what a client wants to know.
type syncQuery struct {
	session
	initial bool  // there was no sync before
	since   int64 // all up to here the client has
	full    bool  // it wants the whole state none the less
	leave   bool  // and in an initial sync the rooms that the user has left
	limit   int   // of timelines
}

// syncAnswer is what is new since then.
type syncAnswer struct {
	Next  string    `json:"next_batch"`
	Rooms syncRooms `json:"rooms"`
}

type syncRooms struct {
	Join   map[mxfed.RoomID]*syncRoom `json:"join,omitempty"`
	Invite map[mxfed.RoomID]any       `json:"invite,omitempty"`
	Knock  map[mxfed.RoomID]any       `json:"knock,omitempty"`
	Leave  map[mxfed.RoomID]*syncRoom `json:"leave,omitempty"`
}

func (r *syncRooms) empty() bool { return len(r.Join)+len(r.Invite)+len(r.Knock)+len(r.Leave) == 0 }

type syncRoom struct {
	State    syncEvents   `json:"state"`
	Timeline syncTimeline `json:"timeline"`
}

type syncEvents struct {
	Events []*clientEvent `json:"events"`
}

type syncTimeline struct {
	Events  []*clientEvent `json:"events"`
	Limited bool           `json:"limited"`
	Prev    string         `json:"prev_batch,omitempty"`
}

// sync answers as soon as there is something new, or with nothing when time is up.
func (c *clientAPI) sync(q *request) (any, error) {
	ask, err := newSyncQuery(q)
	if err != nil {
		return nil, err
	}
	wait, _ := strconv.Atoi(q.URL.Query().Get("timeout"))
	ctx, cancel := context.WithTimeout(q.Context(), min(max(time.Duration(wait), 0)*time.Millisecond, maxWait))
	defer cancel()
	defer context.AfterFunc(c.stopping, cancel)()
	for {
		now, answer, err := c.news(q.Context(), ask)
		if err != nil || !answer.Rooms.empty() || ask.initial || ask.full || ctx.Err() != nil {
			return answer, err
		}
		if err := c.changed(ctx, now); err != nil {
			return nil, err
		}
	}
}

func newSyncQuery(q *request) (ask *syncQuery, err error) {
	query := q.URL.Query()
	ask = &syncQuery{session: q.session, initial: true, full: query.Get("full_state") == "true", limit: timelineLimit}
	if token := query.Get("since"); token != "" {
		ask.initial = false
		if ask.since, err = parsePosition(token); err != nil {
			return nil, err
		}
	}
	var filter struct {
		Room struct {
			Leave    bool `json:"include_leave"`
			Timeline struct {
				Limit int `json:"limit"`
			} `json:"timeline"`
		} `json:"room"`
	}
	if text := query.Get("filter"); text != "" {
		if err := json.Unmarshal([]byte(text), &filter); err != nil {
			return nil, &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "the filter is no JSON object"}
		}
	}
	ask.leave, ask.limit = filter.Room.Leave, limitOf(strconv.Itoa(filter.Room.Timeline.Limit), timelineLimit)
	return ask, nil
}

// news collects what is new, up to one position in all rooms.
func (c *clientAPI) news(ctx context.Context, ask *syncQuery) (now int64, answer *syncAnswer, err error) {
	now, all, err := c.snapshot(ctx, ask.User)
	if err != nil {
		return 0, nil, err
	}
	answer = &syncAnswer{Next: formatPosition(now), Rooms: syncRooms{Join: make(map[mxfed.RoomID]*syncRoom),
		Invite: make(map[mxfed.RoomID]any), Knock: make(map[mxfed.RoomID]any), Leave: make(map[mxfed.RoomID]*syncRoom)}}
	for _, m := range all {
		changed := ask.initial || m.Position > ask.since
		var room *syncRoom
		switch {
		case m.Membership == "join":
			if room, err = c.joined(ctx, ask, m, now); room != nil {
				answer.Rooms.Join[m.Room] = room
			}
		case m.Membership == "invite" && changed:
			answer.Rooms.Invite[m.Room] = map[string]any{"invite_state": map[string]any{"events": m.Shown}}
		case m.Membership == "knock" && changed:
			answer.Rooms.Knock[m.Room] = map[string]any{"knock_state": map[string]any{"events": m.Shown}}
		case changed && !m.Forgotten && (!ask.initial || ask.leave):
			room, err = c.left(ctx, ask, m)
			answer.Rooms.Leave[m.Room] = room
		}
		if err != nil {
			return 0, nil, err
		}
	}
	return now, answer, nil
}

// snapshot reads a user's memberships, and the position as of which they are all there is to know. A membership that changes
// between the two reads is read again.
func (c *clientAPI) snapshot(ctx context.Context, user mxfed.UserID) (now int64, all []*membership, err error) {
	for {
		if now, err = c.position(ctx); err == nil {
			all, err = c.memberships(ctx, user, 0)
		}
		if err != nil || !slices.ContainsFunc(all, func(m *membership) bool { return m.Position > now }) {
			return now, all, err
		}
	}
}

// joined is what is new in a room that the user is in, nil for nothing.
func (c *clientAPI) joined(ctx context.Context, ask *syncQuery, m *membership, now int64) (*syncRoom, error) {
	if ask.initial || m.Joined > ask.since {
		return c.fromStart(ctx, ask, m, now)
	}
	room, err := c.between(ctx, ask, m.Room, ask.since, now)
	if err != nil || len(room.Timeline.Events) == 0 && !ask.full {
		return nil, err
	}
	return room, nil
}

// left is what is new in a room that the user has left, up to the leave. Who was not in it before that sees nothing but the
// member event.
func (c *clientAPI) left(ctx context.Context, ask *syncQuery, m *membership) (*syncRoom, error) {
	last, _, err := c.timeline(ctx, m.Room, m.Position-1, m.Position, 1)
	if err != nil {
		return nil, err
	}
	if len(last) == 1 && last[0].Replaced.Membership() == "join" {
		if ask.initial || m.Joined > ask.since {
			return c.fromStart(ctx, ask, m, m.Position)
		}
		return c.between(ctx, ask, m.Room, ask.since, m.Position)
	}
	if len(last) == 0 && m.Event != nil { // this server is not in the room
		last = []*roomEvent{{Event: m.Event, Position: m.Position}}
	}
	return &syncRoom{State: syncEvents{ask.formatAll(nil, true)}, Timeline: syncTimeline{Events: ask.formatAll(last, true)}}, nil
}

// fromStart shows a room to somebody who has not seen it before: its last events, and the state before them.
func (c *clientAPI) fromStart(ctx context.Context, ask *syncQuery, m *membership, upTo int64) (*syncRoom, error) {
	floor, err := c.floor(ctx, ask.User, m)
	if err != nil {
		return nil, err
	}
	all := *ask
	all.full = true
	return c.between(ctx, &all, m.Room, floor, upTo)
}

// floor is the position up to which the history of a room is hidden from a user. The setting of now counts for all that was
// before the user joined. https://spec.matrix.org/v1.19/client-server-api/#room-history-visibility
func (c *clientAPI) floor(ctx context.Context, user mxfed.UserID, m *membership) (int64, error) {
	found, err := c.roomState(ctx, user, m.Room, mxfed.StateKey{Type: "m.room.history_visibility"})
	if err != nil || len(found) == 0 {
		return 0, err
	}
	var content struct {
		Visibility string `json:"history_visibility"`
	}
	if json.Unmarshal(found[0].Content(), &content) == nil && (content.Visibility == "invited" || content.Visibility == "joined") {
		return m.Joined - 1, nil
	}
	return 0, nil
}

// between shows the events of a room between two positions, and of its state what the client cannot know by them.
func (c *clientAPI) between(ctx context.Context, ask *syncQuery, id mxfed.RoomID, after, upTo int64) (*syncRoom, error) {
	events, limited, err := c.timeline(ctx, id, after, upTo, ask.limit)
	if err != nil {
		return nil, err
	}
	before := upTo
	if len(events) > 0 {
		before = events[0].Position - 1
	}
	room := &syncRoom{Timeline: syncTimeline{Events: ask.formatAll(events, true), Limited: limited, Prev: formatPosition(before)}}
	var state []*roomEvent
	if ask.full {
		state, err = c.stateAt(ctx, id, 0, before)
	} else if limited {
		state, err = c.stateAt(ctx, id, after, before)
	}
	room.State.Events = ask.formatAll(state, true)
	return room, err
}
