package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	"example.org/mxfed"
)

// This file is what users do to rooms, what they see of them, and what rooms and users are called.

// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3createroom
func (c *clientAPI) postRoom(q *request) (any, error) {
	var body roomRequest
	if err := q.decode(&body); err != nil {
		return nil, err
	}
	if body.Version != "" && !slices.Contains(roomVersions(), string(body.Version)) {
		return nil, mxfed.ErrUnsupportedRoomVersion
	}
	room, err := c.createRoom(q.Context(), q.User, &body)
	if errors.Is(err, errRoomInUse) { // the directory has another status for it
		err = refusal(http.StatusBadRequest, errRoomInUse, "there is such an alias")
	}
	return map[string]any{"room_id": room}, err
}

// reason is all that goes from such requests into the member event.
type reason struct {
	Reason string `json:"reason,omitempty"`
}

// postOwn has users join, knock and leave. https://spec.matrix.org/v1.19/client-server-api/#joining-rooms
func (c *clientAPI) postOwn(membership string) endpoint {
	return func(q *request) (any, error) {
		var body reason
		if err := q.decode(&body); err != nil {
			return nil, err
		}
		room, via, err := c.entrance(q)
		if err == nil {
			err = c.setMember(q, room, q.User, membership, via, asJSON(body))
		}
		return map[string]any{"room_id": room}, err
	}
}

// entrance reads which room is meant, by ID or alias, and through which servers one may get there.
func (c *clientAPI) entrance(q *request) (room mxfed.RoomID, via []mxfed.ServerName, err error) {
	query := q.URL.Query()
	for _, name := range append(query["via"], query["server_name"]...) {
		via = append(via, mxfed.ServerName(name))
	}
	name := q.PathValue("room")
	if strings.HasPrefix(name, "!") {
		return mxfed.RoomID(name), via, nil
	}
	found, err := c.resolveAlias(q.Context(), mxfed.RoomAlias(name))
	if err != nil {
		return "", nil, err
	}
	return found.Room, append(via, found.Servers...), nil
}

// postOther has users invite, kick, ban and unban others. Somebody who is not there cannot be kicked, nor unbanned who is not
// banned: the rules of the room would let both happen. https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3roomsroomidkick
func (c *clientAPI) postOther(membership string, of ...string) endpoint {
	return func(q *request) (any, error) {
		var body struct {
			User mxfed.UserID `json:"user_id"`
			reason
		}
		if err := q.decode(&body); err != nil {
			return nil, err
		}
		if !strings.HasPrefix(string(body.User), "@") || body.User.Server() == "" {
			return nil, refusal(http.StatusBadRequest, mxfed.ErrInvalidParam, "user_id is none")
		}
		if len(of) > 0 {
			now, err := c.member(q, body.User)
			if err != nil || !slices.Contains(of, now.Membership()) {
				return nil, orForbidden(err, "the user's membership is not "+strings.Join(of, " or "))
			}
		}
		return empty{}, c.setMember(q, q.room(), body.User, membership, nil, asJSON(body.reason))
	}
}

func (q *request) room() mxfed.RoomID { return mxfed.RoomID(q.PathValue("room")) }

// member is the room's member event about a user, nil if there is none.
func (c *clientAPI) member(q *request, user mxfed.UserID) (*mxfed.Event, error) {
	found, err := c.roomState(q.Context(), q.User, q.room(), mxfed.StateKey{Type: "m.room.member", Key: string(user)})
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return found[0].Event, nil
}

// setMember takes a change of membership to where its kind is dealt with, as other servers may have to be asked.
func (c *clientAPI) setMember(q *request, room mxfed.RoomID, user mxfed.UserID, membership string, via []mxfed.ServerName,
	content json.RawMessage) error {
	own := user == q.User
	switch {
	case membership == "invite":
		return c.inviteUser(q.Context(), q.User, room, user, content)
	case membership == "join" && own:
		return c.joinRoom(q.Context(), user, room, via, content)
	case membership == "knock" && own:
		return c.knockOn(q.Context(), user, room, via, content)
	case membership == "leave" && own:
		return c.leaveRoom(q.Context(), user, room, content)
	}
	_, err := c.sendMember(q.Context(), q.User, room, user, membership, content)
	return err
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3roomsroomidsendeventtypetxnid
func (c *clientAPI) putEvent(q *request) (any, error) {
	return c.put(q, &message{Sender: q.User, Room: q.room(), Type: q.PathValue("type"), Device: q.Device, Txn: q.PathValue("txn")})
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3roomsroomidstateeventtypestatekey
func (c *clientAPI) putState(q *request) (any, error) {
	key := q.PathValue("key")
	return c.put(q, &message{Sender: q.User, Room: q.room(), Type: q.PathValue("type"), StateKey: &key})
}

// put sends an event with the content in the body.
func (c *clientAPI) put(q *request, m *message) (any, error) {
	if err := q.decode(&m.Content); err != nil {
		return nil, err
	}
	if m.Type != "m.room.member" || m.StateKey == nil {
		id, err := c.send(q.Context(), m)
		return map[string]any{"event_id": id}, err
	}
	var content struct{ Membership string }
	if err := json.Unmarshal(m.Content, &content); err != nil {
		return nil, refusal(http.StatusBadRequest, mxfed.ErrBadJSON, "membership is no string")
	}
	user := mxfed.UserID(*m.StateKey)
	if err := c.setMember(q, m.Room, user, content.Membership, nil, m.Content); err != nil {
		return nil, err
	}
	now, err := c.member(q, user)
	return map[string]any{"event_id": now.ID()}, err
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidstate
func (c *clientAPI) getState(q *request) (any, error) {
	state, err := c.roomState(q.Context(), q.User, q.room())
	return q.format(q.room(), state), err
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3roomsroomidstateeventtypestatekey
func (c *clientAPI) getStateEntry(q *request) (any, error) {
	found, err := c.roomState(q.Context(), q.User, q.room(), mxfed.StateKey{Type: q.PathValue("type"), Key: q.PathValue("key")})
	if err != nil || len(found) == 0 {
		return nil, orNotFound(err)
	}
	return found[0].Content(), nil
}

// getProfile answers with the whole profile, or one field. https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3profileuserid
func (c *clientAPI) getProfile(q *request) (any, error) {
	p, err := c.profileOf(q.Context(), mxfed.UserID(q.PathValue("user")))
	name := q.PathValue("field")
	if err != nil || name == "" {
		return p, err
	}
	field := p.field(name)
	if field == nil || *field == "" {
		return nil, mxfed.ErrNotFound
	}
	return map[string]string{name: *field}, nil
}

// field is one of those that this server keeps, or nil.
func (p *profile) field(name string) *string {
	return map[string]*string{"displayname": &p.DisplayName, "avatar_url": &p.AvatarURL}[name]
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3profileuseridkeyname
func (c *clientAPI) putProfile(q *request) (any, error) {
	if q.PathValue("user") != string(q.User) {
		return nil, orForbidden(nil, "that is somebody else's profile")
	}
	var body map[string]string
	if err := q.decode(&body); err != nil {
		return nil, err
	}
	p, err := c.profileOf(q.Context(), q.User)
	if err != nil {
		return nil, err
	}
	field := p.field(q.PathValue("field"))
	if field == nil {
		return nil, orForbidden(nil, "only displayname and avatar_url are kept here")
	}
	*field = body[q.PathValue("field")]
	return empty{}, c.setProfile(q.Context(), q.User, p)
}

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3directoryroomroomalias
func (c *clientAPI) getAlias(q *request) (any, error) {
	found, err := c.resolveAlias(q.Context(), mxfed.RoomAlias(q.PathValue("alias")))
	if err != nil {
		return nil, err
	}
	return map[string]any{"room_id": found.Room, "servers": found.Servers}, nil
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3directoryroomroomalias
func (c *clientAPI) putAlias(q *request) (any, error) {
	var body struct {
		Room mxfed.RoomID `json:"room_id"`
	}
	if err := q.decode(&body); err != nil {
		return nil, err
	}
	return empty{}, c.setAlias(q.Context(), q.User, mxfed.RoomAlias(q.PathValue("alias")), body.Room)
}
