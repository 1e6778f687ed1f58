package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	"example.org/mxfed"
)

// This file is what users do to rooms.

// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3createroom
func (c *clientAPI) postRoom(q *request) (any, error) {
	var body struct {
		Preset          string            `json:"preset"`
		Visibility      string            `json:"visibility"`
		Version         mxfed.RoomVersion `json:"room_version"`
		Name            string            `json:"name"`
		Topic           string            `json:"topic"`
		Alias           string            `json:"room_alias_name"`
		Direct          bool              `json:"is_direct"`
		Invite          []mxfed.UserID    `json:"invite"`
		State           []stateEntry      `json:"initial_state"`
		CreationContent json.RawMessage   `json:"creation_content"`
		PowerLevels     json.RawMessage   `json:"power_level_content_override"`
	}
	if err := decode(q.Request, &body); err != nil {
		return nil, err
	}
	if body.Version != "" && !slices.Contains(roomVersions(), string(body.Version)) {
		return nil, mxfed.ErrUnsupportedRoomVersion
	}
	preset := "private_chat"
	if body.Visibility == "public" {
		preset = "public_chat"
	}
	room, err := c.createRoom(q.Context(), q.User, &roomRequest{Version: body.Version, Preset: cmp.Or(body.Preset, preset), Name: body.Name,
		Topic: body.Topic, Alias: body.Alias, Direct: body.Direct, Invite: body.Invite, State: body.State,
		CreationContent: body.CreationContent, PowerLevels: body.PowerLevels})
	if errors.Is(err, errRoomInUse) { // the directory has another status for it
		err = &mxfed.Error{Code: errRoomInUse, Message: "the alias is taken", Status: http.StatusBadRequest, Err: err}
	}
	return roomAnswer(room), err
}

func roomAnswer(room mxfed.RoomID) any { return map[string]any{"room_id": room} }

// https://spec.matrix.org/v1.19/client-server-api/#joining-rooms
func (c *clientAPI) join(q *request) (any, error) {
	room, via, content, err := c.entrance(q)
	if err == nil {
		err = c.joinRoom(q.Context(), q.User, room, via, content)
	}
	return roomAnswer(room), err
}

// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3knockroomidoralias
func (c *clientAPI) knock(q *request) (any, error) {
	room, via, content, err := c.entrance(q)
	if err == nil {
		err = c.knockOn(q.Context(), q.User, room, via, content)
	}
	return roomAnswer(room), err
}

// entrance reads which room is meant, by ID or alias, through which servers one may get there, and the reason that is given.
func (c *clientAPI) entrance(q *request) (room mxfed.RoomID, via []mxfed.ServerName, content json.RawMessage, err error) {
	var body reason
	if err := decode(q.Request, &body); err != nil {
		return "", nil, nil, err
	}
	query := q.URL.Query()
	for _, name := range append(query["via"], query["server_name"]...) {
		via = append(via, mxfed.ServerName(name))
	}
	room = q.room()
	if strings.HasPrefix(string(room), "#") {
		found, err := c.resolveAlias(q.Context(), mxfed.RoomAlias(room))
		if err != nil {
			return "", nil, nil, err
		}
		room, via = found.Room, append(via, found.Servers...)
	}
	if !strings.HasPrefix(string(room), "!") {
		err = &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "neither a room ID nor an alias"}
	}
	return room, via, body.content(), err
}

// reason is all that goes from such requests into the member event.
type reason struct {
	Reason string `json:"reason"`
}

func (r reason) content() json.RawMessage {
	if r.Reason == "" {
		return nil
	}
	return asJSON(map[string]string{"reason": r.Reason})
}

// https://spec.matrix.org/v1.19/client-server-api/#leaving-rooms
func (c *clientAPI) leave(q *request) (any, error) {
	var body reason
	if err := decode(q.Request, &body); err != nil {
		return nil, err
	}
	return empty{}, c.leaveRoom(q.Context(), q.User, q.room(), body.content())
}

func (c *clientAPI) postForget(q *request) (any, error) {
	return empty{}, c.forget(q.Context(), q.User, q.room())
}

// target is whom an invite, kick or ban is about.
type target struct {
	User mxfed.UserID `json:"user_id"`
	reason
}

func (q *request) target() (t target, err error) {
	if err = decode(q.Request, &t); err != nil {
		return t, err
	}
	if t.User == "" {
		return t, &mxfed.Error{Code: mxfed.ErrMissingParam, Message: "user_id is missing"}
	}
	if !strings.HasPrefix(string(t.User), "@") || t.User.Server() == "" {
		return t, &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "user_id is none"}
	}
	return t, nil
}

// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3roomsroomidinvite
func (c *clientAPI) invite(q *request) (any, error) {
	t, err := q.target()
	if err != nil {
		return nil, err
	}
	return empty{}, c.inviteUser(q.Context(), q.User, q.room(), t.User, t.content())
}

// moderate kicks, bans or unbans. Somebody who is not there cannot be kicked, nor unbanned who is not banned: the rules of
// the room would let both happen. https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3roomsroomidkick
func (c *clientAPI) moderate(membership string, of ...string) func(*request) (any, error) {
	return func(q *request) (any, error) {
		t, err := q.target()
		if err != nil {
			return nil, err
		}
		now, err := c.member(q, t.User)
		if err != nil {
			return nil, err
		}
		if len(of) > 0 && !slices.Contains(of, now.Membership()) {
			return nil, &mxfed.Error{Code: mxfed.ErrForbidden, Message: "the user's membership is not " + strings.Join(of, " or ")}
		}
		return empty{}, c.setMembership(q.Context(), q.User, q.room(), t.User, membership, t.content())
	}
}

// member is the room's member event about a user, nil if there is none.
func (c *clientAPI) member(q *request, user mxfed.UserID) (*mxfed.Event, error) {
	found, err := c.roomState(q.Context(), q.User, q.room(), mxfed.StateKey{Type: "m.room.member", Key: string(user)})
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return found[0].Event, nil
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3roomsroomidsendeventtypetxnid
func (c *clientAPI) putEvent(q *request) (any, error) {
	m := &message{Sender: q.User, Room: q.room(), Type: q.PathValue("type"), Device: q.Device, Txn: q.PathValue("txn")}
	if err := decode(q.Request, &m.Content); err != nil {
		return nil, err
	}
	if m.Type == "m.room.redaction" { // in all room versions the endpoint of its own takes it to the right place
		return nil, &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "redact events with /redact"}
	}
	return eventAnswer(c.send(q.Context(), m))
}

func eventAnswer(id mxfed.EventID, err error) (any, error) {
	return map[string]any{"event_id": id}, err
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3roomsroomidredacteventidtxnid
func (c *clientAPI) redact(q *request) (any, error) {
	var body reason
	if err := decode(q.Request, &body); err != nil {
		return nil, err
	}
	return eventAnswer(c.send(q.Context(), &message{Sender: q.User, Room: q.room(), Type: "m.room.redaction", Content: asJSON(body),
		Redacts: mxfed.EventID(q.PathValue("event")), Device: q.Device, Txn: q.PathValue("txn")}))
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3roomsroomidstateeventtypestatekey
func (c *clientAPI) putState(q *request) (any, error) {
	key := q.PathValue("key")
	m := &message{Sender: q.User, Room: q.room(), Type: q.PathValue("type"), StateKey: &key}
	if err := decode(q.Request, &m.Content); err != nil {
		return nil, err
	}
	if m.Type == "m.room.member" {
		return c.putMember(q, mxfed.UserID(key), m)
	}
	return eventAnswer(c.send(q.Context(), m))
}

// putMember takes member events to where their kind is dealt with, as other servers may have to be asked.
func (c *clientAPI) putMember(q *request, user mxfed.UserID, m *message) (any, error) {
	var content struct {
		Membership string `json:"membership"`
	}
	if err := json.Unmarshal(m.Content, &content); err != nil {
		return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "membership is no string"}
	}
	var err error
	switch {
	case content.Membership == "invite":
		err = c.inviteUser(q.Context(), q.User, q.room(), user, m.Content)
	case content.Membership == "join" && user == q.User:
		err = c.joinRoom(q.Context(), user, q.room(), nil, m.Content)
	case content.Membership == "knock" && user == q.User:
		err = c.knockOn(q.Context(), user, q.room(), nil, m.Content)
	case content.Membership == "leave" && user == q.User:
		err = c.leaveRoom(q.Context(), user, q.room(), m.Content)
	default:
		return eventAnswer(c.send(q.Context(), m))
	}
	if err != nil {
		return nil, err
	}
	now, err := c.member(q, user)
	return eventAnswer(now.ID(), err)
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3joined_rooms
func (c *clientAPI) joinedRooms(q *request) (any, error) {
	all, err := c.memberships(q.Context(), q.User, 0)
	rooms := make([]mxfed.RoomID, 0, len(all))
	for _, m := range all {
		if m.Membership == "join" {
			rooms = append(rooms, m.Room)
		}
	}
	return map[string]any{"joined_rooms": rooms}, err
}
