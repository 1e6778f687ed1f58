package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"maps"
	"slices"

	"example.org/mxfed"
)

// This file is what local users do in rooms: each event is built by the library from the room's facts, judged again under
// the room's lock, stored and queued for the other servers.

// send makes, stores and sends on any event but an invite, which inviteUser sends. Member events of the sender that ask for
// join or leave are taken to joinRoom and leaveRoom by the caller.
func (s *server) send(ctx context.Context, m *message) (id mxfed.EventID, err error) {
	id, err = query(ctx, s.db, func(t *tx) mxfed.EventID { return t.sent(m) })
	if err != nil || id != "" {
		return id, err
	}
	e, err := s.fed.Build(ctx, &mxfed.Draft{Room: m.Room, Type: m.Type, StateKey: m.StateKey, Sender: m.Sender, Content: m.Content})
	if err != nil {
		return "", err
	}
	return s.store(ctx, e, m)
}

// sent is what the device has sent already under the same transaction ID.
func (t *tx) sent(m *message) (id mxfed.EventID) {
	if m.Txn != "" {
		id, _ = one[mxfed.EventID](t, `SELECT id FROM events WHERE sender = ? AND device = ? AND txn = ? AND txn <> '' AND room = ?`,
			m.Sender, m.Device, m.Txn, m.Room)
	}
	return id
}

// store adds an event of a local user to its room. That the room has moved on meanwhile does no harm: the event is on a
// branch then, and is refused only if it has become forbidden.
func (s *server) store(ctx context.Context, e *mxfed.Event, m *message) (id mxfed.EventID, err error) {
	err = s.db.update(ctx, e.RoomID(), func(t *tx) error {
		if id = t.sent(m); id != "" {
			return nil
		}
		id = e.ID()
		if e.Type() == "m.room.create" {
			t.exec(`INSERT INTO rooms (id, version) VALUES (?, ?)`, e.RoomID(), e.Version())
		}
		r := t.room(e.RoomID())
		if r == nil {
			return mxfed.ErrNotFound
		}
		if t.placed(r.ID, id) != nil {
			return nil
		}
		before := snapshot{base: r.Now}
		if len(e.Prev()) > 0 {
			var known bool
			if before, known = t.stateAfter(r, e.Prev()); !known {
				return mxfed.ErrNotFound
			}
			if _, err := t.judge(r, e, before); err != nil {
				return err
			}
		}
		return t.add(r, &addition{event: e, before: before, device: m.Device, txn: m.Txn, toAll: true})
	})
	return id, err
}

// judge tells what becomes of an event that is genuine: it is rejected if its auth events, of which none is missing, or the
// state before it do not allow it, and soft-failed if the current state does not. The error says why.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (t *tx) judge(r *room, e *mxfed.Event, before snapshot) (status int, why error) {
	ask := e.Query()
	auth := t.accepted(r.ID, ask.Events, "")
	then, now := t.stateEvents(r, before, ask.State...), t.current(r, ask.State...)
	if r.Partial != "" { // members are missing: those that the event names stand for them until the state is whole
		then, now = withMembers(then, auth), withMembers(now, auth)
	}
	why = e.Check(&mxfed.Room{Version: r.Version, Events: auth, Before: then, State: now})
	switch {
	case why == nil:
		return statusAccepted, nil
	case errors.Is(why, mxfed.ErrSoftFailed):
		return statusSoftFailed, why
	case errors.Is(why, mxfed.ErrRejected) || errors.Is(why, mxfed.ErrMissing): // what is missing has been rejected
		return statusRejected, why
	}
	return statusAnother, why
}

// withMembers adds member events to a state that does not tell about these users.
func withMembers(state, named []*mxfed.Event) []*mxfed.Event {
	for _, e := range named {
		if e.Type() == "m.room.member" && !slices.ContainsFunc(state, func(s *mxfed.Event) bool { return keyOf(s) == keyOf(e) }) {
			state = append(state, e)
		}
	}
	return state
}

// defaultVersion is that of new rooms.
const defaultVersion mxfed.RoomVersion = "12"

// createRoom makes a room, its first state and invites.
// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3createroom
func (s *server) createRoom(ctx context.Context, creator mxfed.UserID, req *roomRequest) (mxfed.RoomID, error) {
	version := cmp.Or(req.Version, defaultVersion)
	create := &mxfed.Draft{Version: version, Type: "m.room.create", StateKey: new(string), Sender: creator, Content: createContent(version, req)}
	if version != "12" { // there the event's hash is the room's ID
		create.Room = mxfed.RoomID("!" + rand.Text() + ":" + string(s.name))
	}
	e, err := s.fed.Build(ctx, create)
	if err != nil {
		return "", err
	}
	id := e.RoomID()
	if _, err := s.store(ctx, e, &message{Sender: creator}); err != nil {
		return "", err
	}
	if _, err := s.sendMember(ctx, creator, id, creator, "join", nil); err != nil {
		return "", err
	}
	state := firstState(creator, version, req)
	if req.Alias != "" {
		alias := mxfed.RoomAlias("#" + req.Alias + ":" + string(s.name))
		err = s.setAlias(ctx, creator, alias, id)
		state = append(state, stateEntry{Type: "m.room.canonical_alias", Content: asJSON(map[string]any{"alias": alias})})
	}
	for i := 0; err == nil && i < len(state); i++ {
		_, err = s.send(ctx, &message{Sender: creator, Room: id, Type: state[i].Type, StateKey: &state[i].StateKey, Content: state[i].Content})
	}
	for i := 0; err == nil && i < len(req.Invite); i++ {
		err = s.inviteUser(ctx, creator, id, req.Invite[i], asJSON(map[string]any{"is_direct": req.Direct}))
	}
	return id, err
}

// createContent is what the library does not fill in: from room version 12 on, those who are trusted like the creator are named
// in the create event.
func createContent(version mxfed.RoomVersion, req *roomRequest) json.RawMessage {
	content := make(map[string]any)
	if version == "12" && req.Preset == "trusted_private_chat" && len(req.Invite) > 0 {
		content["additional_creators"] = req.Invite
	}
	return asJSON(content)
}

// asJSON encodes what can be encoded: maps and slices of strings, numbers and raw JSON that was decoded before.
func asJSON(v any) json.RawMessage {
	text, err := json.Marshal(v)
	if err != nil {
		return json.RawMessage("null")
	}
	return text
}

// firstState is what a room is made of after its creator has joined: what the preset says, unless the client says more.
func firstState(creator mxfed.UserID, version mxfed.RoomVersion, req *roomRequest) []stateEntry {
	rule, guests := "invite", "can_join"
	if req.Preset == "public_chat" {
		rule, guests = "public", "forbidden"
	}
	var state []stateEntry
	preset := func(typ string, content any) {
		if !slices.ContainsFunc(req.State, func(e stateEntry) bool { return e.Type == typ && e.StateKey == "" }) {
			state = append(state, stateEntry{Type: typ, Content: asJSON(content)})
		}
	}
	preset("m.room.power_levels", powerLevels(creator, version, req))
	preset("m.room.join_rules", map[string]any{"join_rule": rule})
	preset("m.room.history_visibility", map[string]any{"history_visibility": "shared"})
	preset("m.room.guest_access", map[string]any{"guest_access": guests})
	state = append(state, req.State...)
	if req.Name != "" {
		state = append(state, stateEntry{Type: "m.room.name", Content: asJSON(map[string]any{"name": req.Name})})
	}
	return state
}

// powerLevels gives the creator all power, where that is not a matter of course.
func powerLevels(creator mxfed.UserID, version mxfed.RoomVersion, req *roomRequest) map[string]any {
	users, tombstone := make(map[mxfed.UserID]int), 150
	if version != "12" {
		users[creator], tombstone = 100, 100
		for _, user := range req.Invite {
			if req.Preset == "trusted_private_chat" {
				users[user] = 100
			}
		}
	}
	levels := map[string]any{"users": users, "users_default": 0, "events_default": 0, "state_default": 50, "ban": 50, "kick": 50, "redact": 50, "invite": 0,
		"events": map[string]int{"m.room.name": 50, "m.room.power_levels": 100, "m.room.history_visibility": 100, "m.room.canonical_alias": 50,
			"m.room.avatar": 50, "m.room.tombstone": tombstone, "m.room.server_acl": 100, "m.room.encryption": 100}}
	maps.Copy(levels, req.PowerLevels)
	return levels
}

// sendMember changes a user's membership in a room that this server is in. content may be nil.
func (s *server) sendMember(ctx context.Context, sender mxfed.UserID, id mxfed.RoomID, user mxfed.UserID, membership string,
	content json.RawMessage) (mxfed.EventID, error) {
	full, err := s.memberContent(ctx, user, content, membership)
	if err != nil {
		return "", err
	}
	return s.send(ctx, &message{Sender: sender, Room: id, Type: "m.room.member", StateKey: (*string)(&user), Content: full})
}

// memberContent adds membership to content, and for those who are about to be in the room what their profile says.
func (s *server) memberContent(ctx context.Context, user mxfed.UserID, content json.RawMessage, membership string) (json.RawMessage, error) {
	full := make(map[string]any)
	if user.Server() == s.name && (membership == "join" || membership == "knock" || membership == "invite") {
		p, err := s.profileOf(ctx, user)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(asJSON(p), &full); err != nil {
			return nil, err
		}
	}
	if len(content) > 0 {
		if err := json.Unmarshal(content, &full); err != nil {
			return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "content is no object", Err: err}
		}
	}
	full["membership"] = membership
	delete(full, "join_authorised_via_users_server") // which the library says
	return asJSON(full), nil
}

// here tells whether this server is in a room.
func (s *server) here(ctx context.Context, id mxfed.RoomID) (bool, error) {
	return query(ctx, s.db, func(t *tx) bool { return t.hasServer(id, s.name) })
}

// inviteUser invites a user of any server.
func (s *server) inviteUser(ctx context.Context, sender mxfed.UserID, id mxfed.RoomID, user mxfed.UserID, content json.RawMessage) error {
	full, err := s.memberContent(ctx, user, content, "invite")
	if err != nil {
		return err
	}
	e, err := s.fed.Client().InviteUser(ctx, id, sender, user, full)
	if err != nil {
		return err
	}
	_, err = s.store(ctx, e, &message{Sender: sender})
	return err
}

// leaveRoom leaves a room, rejects an invite or retracts a knock. If no server of the room can be told of that, nobody but
// this one knows.
func (s *server) leaveRoom(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, content json.RawMessage) error {
	m, err := query(ctx, s.db, func(t *tx) *membership { return t.membership(user, id) })
	switch {
	case err != nil || m == nil:
		return orForbidden(err, "you are not in the room")
	case m.Membership == "leave":
		return nil
	}
	if here, err := s.here(ctx, id); err != nil {
		return err
	} else if here {
		_, err := s.sendMember(ctx, user, id, user, "leave", content)
		if m.Membership == "join" || !errors.Is(err, mxfed.ErrForbidden) { // the invite may not have got into the room here
			return err
		}
	}
	left, err := s.fed.Client().Leave(ctx, &mxfed.LeaveRequest{Room: id, User: user, Via: m.via, Version: m.version, Content: content})
	if untold := (*mxfed.LeaveError)(nil); err != nil && !errors.As(err, &untold) {
		return err
	}
	return s.db.update(ctx, "", func(t *tx) error {
		t.setOutside(user, &membership{Room: id, Membership: "leave", Event: left, version: m.version})
		return nil
	})
}

// knockOn asks for an invite, through this server if it is in the room, else through one of via or that of the room ID.
func (s *server) knockOn(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, via []mxfed.ServerName, content json.RawMessage) error {
	if here, err := s.here(ctx, id); err != nil {
		return err
	} else if here {
		_, err := s.sendMember(ctx, user, id, user, "knock", content)
		return err
	}
	full, err := s.memberContent(ctx, user, content, "knock")
	if err != nil {
		return err
	}
	result, err := s.fed.Client().Knock(ctx, &mxfed.KnockRequest{Room: id, User: user, Via: append(via, namedBy(id)...), Content: full})
	if err != nil {
		return err
	}
	return s.db.update(ctx, "", func(t *tx) error {
		return t.outside(user, result.Event, result.State, append([]mxfed.ServerName{result.Via}, via...))
	})
}

// namedBy is the server that a room ID names, which may still be in the room.
func namedBy(id mxfed.RoomID) []mxfed.ServerName {
	if name := mxfed.UserID(id).Server(); name != "" {
		return []mxfed.ServerName{name}
	}
	return nil
}

// outside notes down how a local user stands to a room by an event of a room that this server may not be in, once. Who is
// joined stays so: what the room says counts.
func (t *tx) outside(user mxfed.UserID, e *mxfed.Event, state []mxfed.Stripped, via []mxfed.ServerName) error {
	if err := storable(e); err != nil {
		return err
	}
	if r := t.room(e.RoomID()); r != nil && r.Version != e.Version() {
		return &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "the room is of another version"}
	}
	if _, known := one[int](t, `SELECT 1 FROM users WHERE id = ?`, user); !known {
		return mxfed.ErrNotFound
	}
	now := t.membership(user, e.RoomID())
	if now != nil && (now.Membership == "join" || now.Event.ID() == e.ID()) {
		return nil
	}
	var shown []json.RawMessage
	for _, entry := range state {
		shown = append(shown, stripped(&entry))
	}
	t.setOutside(user, &membership{Room: e.RoomID(), Membership: e.Membership(), Event: e, Shown: append(shown, strippedEvent(e)),
		version: e.Version(), via: via})
	return nil
}

func (t *tx) setOutside(user mxfed.UserID, m *membership) {
	t.exec(`INSERT INTO outside VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (user_id, room) DO UPDATE SET membership = excluded.membership,
		version = excluded.version, event = excluded.event, shown = excluded.shown, via = excluded.via, position = excluded.position`,
		user, m.Room, m.Membership, m.version, string(m.Event.JSON()), string(asJSON(m.Shown)), string(asJSON(m.via)), t.advance())
}
