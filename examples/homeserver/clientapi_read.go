package main

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"time"

	"example.org/mxfed"
)

// This file is what users see of rooms, and events in the form that clients get.

// clientEvent is an event without what only servers need.
// https://spec.matrix.org/v1.19/client-server-api/#room-event-format
type clientEvent struct {
	Type     string          `json:"type"`
	StateKey *string         `json:"state_key,omitempty"`
	Content  json.RawMessage `json:"content"`
	Sender   mxfed.UserID    `json:"sender"`
	ID       mxfed.EventID   `json:"event_id"`
	Room     mxfed.RoomID    `json:"room_id,omitempty"`
	Time     int64           `json:"origin_server_ts"`
	Redacts  mxfed.EventID   `json:"redacts,omitempty"`
	Unsigned unsigned        `json:"unsigned"`
}

// unsigned is what this server says about an event.
type unsigned struct {
	Age         int64           `json:"age"` // milliseconds
	PrevContent json.RawMessage `json:"prev_content,omitempty"`
	PrevSender  mxfed.UserID    `json:"prev_sender,omitempty"`
	Replaces    mxfed.EventID   `json:"replaces_state,omitempty"`
	Txn         string          `json:"transaction_id,omitempty"`
}

// format shows an event to a session; in a sync the room is clear and left out. A transaction ID is shown to the device
// that made it up.
func (in session) format(e *roomEvent, inSync bool) *clientEvent {
	var more struct {
		Time    int64         `json:"origin_server_ts"`
		Redacts mxfed.EventID `json:"redacts"`
		Content struct {
			Redacts any `json:"redacts"`
		} `json:"content"`
	}
	_ = json.Unmarshal(e.JSON(), &more) // fields that other servers filled with something else are not shown
	shown := &clientEvent{Type: e.Type(), Content: e.Content(), Sender: e.Sender(), ID: e.ID(), Time: more.Time, Redacts: more.Redacts,
		Unsigned: unsigned{Age: time.Now().UnixMilli() - more.Time}}
	if text, ok := more.Content.Redacts.(string); ok && e.Type() == "m.room.redaction" && shown.Redacts == "" {
		shown.Redacts = mxfed.EventID(text) // where room versions from 11 on have it; clients read both
	}
	if key, ok := e.StateKey(); ok {
		shown.StateKey = &key
	}
	if !inSync {
		shown.Room = e.RoomID()
	}
	if e.Replaced != nil {
		shown.Unsigned.PrevContent, shown.Unsigned.PrevSender, shown.Unsigned.Replaces = e.Replaced.Content(), e.Replaced.Sender(), e.Replaced.ID()
	}
	if e.Sender() == in.User && e.Device == in.Device {
		shown.Unsigned.Txn = e.Txn
	}
	return shown
}

// formatAll never returns nil, which clients would see as null.
func (in session) formatAll(events []*roomEvent, inSync bool) []*clientEvent {
	shown := make([]*clientEvent, len(events))
	for i, e := range events {
		shown[i] = in.format(e, inSync)
	}
	return shown
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidstate
func (c *clientAPI) getState(q *request) (any, error) {
	state, err := c.roomState(q.Context(), q.User, q.room())
	return q.formatAll(state, false), err
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidstateeventtypestatekey
func (c *clientAPI) getStateEntry(q *request) (any, error) {
	found, err := c.roomState(q.Context(), q.User, q.room(), mxfed.StateKey{Type: q.PathValue("type"), Key: q.PathValue("key")})
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, &mxfed.Error{Code: mxfed.ErrNotFound, Message: "that is not set"}
	case q.URL.Query().Get("format") == "event":
		return q.format(found[0], false), nil
	}
	return found[0].Content(), nil
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidmembers
func (c *clientAPI) members(q *request) (any, error) {
	state, err := c.roomState(q.Context(), q.User, q.room())
	want, unwanted := q.URL.Query().Get("membership"), q.URL.Query().Get("not_membership")
	state = slices.DeleteFunc(state, func(e *roomEvent) bool {
		m := e.Membership()
		return m == "" || want != "" && m != want || m == unwanted
	})
	return map[string]any{"chunk": q.formatAll(state, false)}, err
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidjoined_members
func (c *clientAPI) joinedMembers(q *request) (any, error) {
	m, err := c.standing(q)
	if err != nil {
		return nil, err
	}
	if m.Membership != "join" {
		return nil, &mxfed.Error{Code: mxfed.ErrForbidden, Message: "you are not in the room"}
	}
	state, err := c.roomState(q.Context(), q.User, q.room())
	joined := make(map[string]any)
	for _, e := range state {
		if e.Membership() == "join" {
			var shown struct {
				DisplayName any `json:"display_name,omitempty"`
				AvatarURL   any `json:"avatar_url,omitempty"`
			}
			content := make(map[string]any)
			_ = json.Unmarshal(e.Content(), &content) // of an event it is an object
			shown.DisplayName, shown.AvatarURL = content["displayname"], content["avatar_url"]
			user, _ := e.StateKey()
			joined[user] = shown
		}
	}
	return map[string]any{"joined": joined}, err
}

// standing is how the user stands to the room; ErrForbidden for one who never was in it.
func (c *clientAPI) standing(q *request) (*membership, error) {
	all, err := c.memberships(q.Context(), q.User, 0)
	i := slices.IndexFunc(all, func(m *membership) bool { return m.Room == q.room() })
	switch {
	case err != nil:
		return nil, err
	case i < 0 || all[i].Joined == 0:
		return nil, &mxfed.Error{Code: mxfed.ErrForbidden, Message: "you are not in the room"}
	}
	return all[i], nil
}

func (c *clientAPI) getEvent(q *request) (any, error) {
	e, err := c.roomEvent(q.Context(), q.User, q.room(), mxfed.EventID(q.PathValue("event")))
	if err != nil {
		return nil, err
	}
	return q.format(e, false), nil
}

// messages goes back in time through what this server has of a room since it is there.
// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidmessages
func (c *clientAPI) messages(q *request) (any, error) {
	query := q.URL.Query()
	if query.Get("dir") != "b" {
		return nil, &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "only dir=b is known"}
	}
	m, err := c.standing(q)
	if err != nil {
		return nil, err
	}
	from, err := c.position(q.Context())
	if token := query.Get("from"); token != "" && err == nil {
		from, err = parsePosition(token)
	}
	if err != nil {
		return nil, err
	}
	if m.Membership != "join" {
		from = min(from, m.Position)
	}
	floor, err := c.floor(q.Context(), q.User, m)
	if err != nil {
		return nil, err
	}
	events, limited, err := c.timeline(q.Context(), m.Room, floor, from, limitOf(query.Get("limit"), 10))
	if err != nil {
		return nil, err
	}
	answer := map[string]any{"start": formatPosition(from), "state": []any{}}
	if limited {
		answer["end"] = formatPosition(events[0].Position - 1)
	}
	slices.Reverse(events)
	answer["chunk"] = q.formatAll(events, false)
	return answer, nil
}

// maxEvents bounds a timeline.
const maxEvents = 1000

func limitOf(text string, preset int) int {
	if n, err := strconv.Atoi(text); err == nil && n > 0 {
		return min(n, maxEvents)
	}
	return preset
}

// Positions of the stream are what clients see as tokens: each stands for all that was accepted up to it.

func formatPosition(p int64) string { return "s" + strconv.FormatInt(p, 10) }

func parsePosition(token string) (int64, error) {
	if len(token) > 1 && token[0] == 's' {
		if p, err := strconv.ParseInt(token[1:], 10, 64); err == nil && p >= 0 && p < math.MaxInt64 {
			return p, nil
		}
	}
	return 0, &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "that token is not from here"}
}
