package main

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"example.org/mxfed"
)

// This file is how clients learn what is new, and events in the form that they get.
// https://spec.matrix.org/v1.19/client-server-api/#syncing

const (
	maxWait       = 2 * time.Minute // of a sync for something to happen
	timelineLimit = 20              // events of a room, unless a filter says otherwise
	maxTimeline   = 1000
)

// syncQuery is what a client wants to know.
type syncQuery struct {
	session
	since int64 // all up to this position the client has; 0: nothing yet
	leave bool  // if it has nothing yet, it wants the rooms too that the user has left
	limit int   // of timelines
}

// syncAnswer is what is new since then: Next is the position up to which it tells everything. Rooms are by the user's
// membership.
type syncAnswer struct {
	Next  string                          `json:"next_batch"`
	Rooms map[string]map[mxfed.RoomID]any `json:"rooms"`
}

// syncRoom is what is new in a room that the user is in, or was in.
type syncRoom struct {
	State struct {
		Events []*clientEvent `json:"events"`
	} `json:"state"`
	Timeline struct {
		Events  []*clientEvent `json:"events"`
		Limited bool           `json:"limited"`
	} `json:"timeline"`
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
		if err != nil || len(answer.Rooms) > 0 || ask.since == 0 || ctx.Err() != nil {
			return answer, err
		}
		if err := c.changed(ctx, now); err != nil {
			return nil, err
		}
	}
}

func newSyncQuery(q *request) (*syncQuery, error) {
	var filter struct {
		Room struct {
			Leave    bool `json:"include_leave"`
			Timeline struct{ Limit int }
		}
	}
	filter.Room.Timeline.Limit = timelineLimit
	query := q.URL.Query()
	since, err := strconv.ParseUint(cmp.Or(query.Get("since"), "0"), 10, 63)
	if err == nil {
		err = json.Unmarshal([]byte(cmp.Or(query.Get("filter"), "{}")), &filter)
	}
	if err != nil {
		return nil, refusal(http.StatusBadRequest, mxfed.ErrInvalidParam, "since is no token from here, or filter no JSON object")
	}
	return &syncQuery{q.session, int64(since), filter.Room.Leave, min(max(filter.Room.Timeline.Limit, 1), maxTimeline)}, nil
}

// news collects what is new, up to one position in all rooms.
func (c *clientAPI) news(ctx context.Context, ask *syncQuery) (now int64, answer *syncAnswer, err error) {
	now, all, err := c.snapshot(ctx, ask.User)
	answer = &syncAnswer{Next: strconv.FormatInt(now, 10), Rooms: make(map[string]map[mxfed.RoomID]any)}
	for _, m := range all {
		section, room := m.Membership, (*syncRoom)(nil)
		changed := m.Position > ask.since
		switch {
		case section == "join":
			room, err = c.room(ctx, ask, m, now)
		case section == "invite" || section == "knock":
			if changed {
				answer.add(section, m.Room, map[string]any{section + "_state": map[string]any{"events": m.Shown}})
			}
		case changed && (ask.since > 0 || ask.leave):
			section = "leave"
			room, err = c.left(ctx, ask, m)
		}
		if err != nil {
			return 0, nil, err
		}
		if room != nil {
			answer.add(section, m.Room, room)
		}
	}
	return now, answer, err
}

func (a *syncAnswer) add(section string, id mxfed.RoomID, room any) {
	if a.Rooms[section] == nil {
		a.Rooms[section] = make(map[mxfed.RoomID]any)
	}
	a.Rooms[section][id] = room
}

// snapshot reads a user's memberships, and the position as of which they are all there is to know.
func (c *clientAPI) snapshot(ctx context.Context, user mxfed.UserID) (now int64, all []*membership, err error) {
	err = c.db.view(ctx, func(t *tx) error {
		now, all = t.position(), t.memberships(user)
		return nil
	})
	return now, all, err
}

// left is what is new in a room that the user has left: all up to the leave. Who was not in it before that, but invited or
// banned, sees nothing but the member event; which is not known if no other server could be told.
func (c *clientAPI) left(ctx context.Context, ask *syncQuery, m *membership) (*syncRoom, error) {
	if m.Left == m.Position {
		if room, err := c.room(ctx, ask, m, m.Position); room != nil || err != nil {
			return room, err
		}
	}
	if m.Event == nil {
		return newSyncRoom(ask, nil, nil), nil
	}
	return newSyncRoom(ask, nil, []*roomEvent{{Event: m.Event}}), nil
}

func newSyncRoom(ask *syncQuery, state, timeline []*roomEvent) *syncRoom {
	room := &syncRoom{}
	room.State.Events, room.Timeline.Events = ask.format("", state), ask.format("", timeline)
	return room
}

// room shows the events of a room up to a position, and of its state what the client cannot know by them; nil if there is
// nothing new.
func (c *clientAPI) room(ctx context.Context, ask *syncQuery, m *membership, upTo int64) (*syncRoom, error) {
	after, known, unknown := ask.since, ask.since, false
	if m.Completed > ask.since { // of the state that this server was told, members were missing
		known, unknown = m.Entered-1, true
	}
	if m.Joined > ask.since { // the client has nothing of this stay
		floor, err := c.floor(ctx, ask.User, m)
		if err != nil {
			return nil, err
		}
		after, known, unknown = floor, 0, true
	}
	events, more, err := c.timeline(ctx, m.Room, after, upTo, ask.limit)
	if err != nil || len(events) == 0 && !unknown {
		return nil, err
	}
	if len(events) > 0 {
		upTo = events[0].Position - 1
	}
	var state []*roomEvent
	if more || unknown {
		if state, err = c.stateAt(ctx, m.Room, known, upTo); err != nil {
			return nil, err
		}
	}
	room := newSyncRoom(ask, state, events)
	room.Timeline.Limited = more || m.Entered > ask.since // what was before this server came it does not know
	return room, nil
}

// floor is the position up to which a user who has joined does not see a room. This server has nothing of the time when it
// was not there; and the room may hide its history from those who were not, as the setting of now has it.
// https://spec.matrix.org/v1.19/client-server-api/#room-history-visibility
func (c *clientAPI) floor(ctx context.Context, user mxfed.UserID, m *membership) (int64, error) {
	found, err := c.roomState(ctx, user, m.Room, mxfed.StateKey{Type: "m.room.history_visibility"})
	if err != nil {
		return 0, err
	}
	var content struct {
		Visibility string `json:"history_visibility"`
	}
	if len(found) > 0 && json.Unmarshal(found[0].Content(), &content) == nil && (content.Visibility == "invited" || content.Visibility == "joined") {
		return m.Joined - 1, nil
	}
	return min(m.Entered, m.Joined) - 1, nil
}

// clientEvent is an event without what only servers need.
// https://spec.matrix.org/v1.19/client-server-api/#room-event-format
type clientEvent struct {
	Type     string          `json:"type"`
	StateKey *string         `json:"state_key,omitempty"`
	Content  json.RawMessage `json:"content"`
	Sender   mxfed.UserID    `json:"sender"`
	ID       mxfed.EventID   `json:"event_id"`
	Room     mxfed.RoomID    `json:"room_id,omitempty"`
	Unsigned unsigned        `json:"unsigned"`
	eventRest
}

// eventRest is what the library does not read: what another server filled with something else is not shown.
type eventRest struct {
	Time    int64         `json:"origin_server_ts"`
	Redacts mxfed.EventID `json:"redacts,omitempty"`
}

// unsigned is what this server says about an event.
type unsigned struct {
	Age         int64           `json:"age"` // milliseconds
	PrevContent json.RawMessage `json:"prev_content,omitempty"`
	PrevSender  mxfed.UserID    `json:"prev_sender,omitempty"`
	Txn         string          `json:"transaction_id,omitempty"`
}

// format shows events to a session; in a sync the room is clear and left out. A transaction ID is shown to the device that
// made it up. It never returns nil, which clients would see as null.
func (in session) format(room mxfed.RoomID, events []*roomEvent) []*clientEvent {
	all := make([]*clientEvent, len(events))
	for i, e := range events {
		shown := &clientEvent{Type: e.Type(), Content: e.Content(), Sender: e.Sender(), ID: e.ID(), Room: room}
		if key, ok := e.StateKey(); ok {
			shown.StateKey = &key
		}
		_ = json.Unmarshal(e.JSON(), &shown.eventRest)
		shown.Unsigned.Age = time.Now().UnixMilli() - shown.Time
		if e.Replaced != nil {
			shown.Unsigned.PrevContent, shown.Unsigned.PrevSender = e.Replaced.Content(), e.Replaced.Sender()
		}
		if e.Sender() == in.User && e.Device == in.Device {
			shown.Unsigned.Txn = e.Txn
		}
		all[i] = shown
	}
	return all
}
