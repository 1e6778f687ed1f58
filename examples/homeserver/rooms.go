package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"example.org/mxfed"
)

// This file is what local users do in rooms: each event is built by the library from the room's facts, judged again under
// the room's lock, stored and queued for the other servers.

// send makes, stores and sends on any event but an invite, which inviteUser sends. Member events of the sender that ask for
// join or leave are taken to joinRoom and leaveRoom by the caller.
func (s *server) send(ctx context.Context, m *message) (mxfed.EventID, error) {
	if id, err := s.sent(ctx, m); err != nil || id != "" {
		return id, err
	}
	e, err := s.fed.Build(ctx, &mxfed.Draft{Room: m.Room, Type: m.Type, StateKey: m.StateKey, Sender: m.Sender, Content: m.Content, Redacts: m.Redacts})
	if err != nil {
		return "", err
	}
	return s.store(ctx, e, m)
}

// sent is what the device has sent already under the same transaction ID.
func (s *server) sent(ctx context.Context, m *message) (id mxfed.EventID, err error) {
	if m.Txn == "" {
		return "", nil
	}
	err = s.db.view(ctx, func(t *tx) error {
		id, err = t.sent(m)
		return err
	})
	return id, err
}

func (t *tx) sent(m *message) (id mxfed.EventID, err error) {
	if m.Txn != "" {
		_, err = t.row(`SELECT event FROM client_txns WHERE user_id = $1 AND device = $2 AND txn = $3`, []any{m.Sender, m.Device, m.Txn}, &id)
	}
	return id, err
}

// store adds an event of a local user to its room. That the room has moved on meanwhile does no harm: the event is on a
// branch then, and is refused only if it has become forbidden.
func (s *server) store(ctx context.Context, e *mxfed.Event, m *message) (id mxfed.EventID, err error) {
	err = s.db.update(ctx, string(e.RoomID()), func(t *tx) error {
		if id, err = t.sent(m); err != nil || id != "" {
			return err
		}
		id = e.ID()
		if e.Type() == "m.room.create" {
			return t.found(e)
		}
		r, err := t.room(e.RoomID())
		if err != nil {
			return err
		}
		if known, _, err := t.known(r, id); err != nil || known != nil {
			return err
		}
		before, ok, err := t.stateAfter(r, e.Prev())
		if err != nil || !ok {
			return orNotFound(err)
		}
		status, err := t.judge(r, e, before)
		if err != nil || status != statusAccepted {
			return err
		}
		return t.add(r, &addition{event: e, before: before, device: m.Device, txn: m.Txn, toAll: true})
	})
	return id, err
}

// found makes the room of a create event.
func (t *tx) found(create *mxfed.Event) error {
	r := &room{id: create.RoomID(), version: create.Version()}
	if err := t.exec(`INSERT INTO rooms (id, version) VALUES ($1, $2)`, r.id, r.version); err != nil {
		return err
	}
	return t.add(r, &addition{event: create})
}

// judge tells what becomes of an event that is genuine: it is rejected if its auth events or the state before it do not
// allow it, and soft-failed if the current state does not. The error says why, or that the database failed.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (t *tx) judge(r *room, e *mxfed.Event, before state) (status int, err error) {
	auth, err := t.accepted(r, e.Auth(), "")
	if err != nil {
		return 0, err
	}
	keys := deciding(map[mxfed.EventID]*mxfed.Event{e.ID(): e})
	then, err := t.stateEvents(r.version, before, keys)
	if err != nil {
		return 0, err
	}
	now, err := t.current(r, keys...)
	if err != nil {
		return 0, err
	}
	if r.partial != nil { // members are missing: those that the event names stand for them until the state is whole
		then, now = withMembers(then, auth), withMembers(now, auth)
	}
	check := &mxfed.Membership{Event: e}
	if err := check.Check(&mxfed.Room{Version: r.version, Events: auth, Before: then, State: then}); err != nil {
		return statusRejected, err
	}
	if err := check.Check(&mxfed.Room{Version: r.version, Events: auth, Before: then, State: now}); err != nil {
		return statusSoftFailed, err
	}
	return statusAccepted, nil
}

// withMembers adds member events to a state that does not tell about these users.
func withMembers(state, named []*mxfed.Event) []*mxfed.Event {
	for _, e := range named {
		user, _ := e.StateKey()
		if e.Type() == "m.room.member" && !slices.ContainsFunc(state, func(s *mxfed.Event) bool {
			key, _ := s.StateKey()
			return s.Type() == e.Type() && key == user
		}) {
			state = append(state, e)
		}
	}
	return state
}

// createRoom makes a room, its first state and invites.
func (s *server) createRoom(ctx context.Context, creator mxfed.UserID, req *roomRequest) (mxfed.RoomID, error) {
	version := cmp.Or(req.Version, defaultVersion)
	content, err := createContent(creator, version, req)
	if err != nil {
		return "", err
	}
	create := &mxfed.Draft{Version: version, Type: "m.room.create", StateKey: new(string), Sender: creator, Content: content}
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
	state, err := s.firstState(ctx, creator, id, version, req)
	for i := 0; err == nil && i < len(state); i++ {
		_, err = s.send(ctx, &message{Sender: creator, Room: id, Type: state[i].Type, StateKey: &state[i].StateKey, Content: state[i].Content})
	}
	for i := 0; err == nil && i < len(req.Invite); i++ {
		err = s.inviteUser(ctx, creator, id, req.Invite[i], asJSON(map[string]any{"is_direct": req.Direct}))
	}
	return id, err
}

// defaultVersion is that of new rooms.
const defaultVersion mxfed.RoomVersion = "12"

// createContent is the content of the create event. Versions before 11 name the creator in it; from 12 on those who are
// trusted like the creator are named there too.
func createContent(creator mxfed.UserID, version mxfed.RoomVersion, req *roomRequest) (json.RawMessage, error) {
	content := make(map[string]any)
	if len(req.CreationContent) > 0 {
		if err := json.Unmarshal(req.CreationContent, &content); err != nil {
			return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "creation_content is no object", Err: err}
		}
	}
	content["room_version"] = version
	if version != "11" && version != "12" {
		content["creator"] = creator
	}
	if version == "12" && req.Preset == "trusted_private_chat" && len(req.Invite) > 0 {
		content["additional_creators"] = req.Invite
	}
	return asJSON(content), nil
}

// asJSON encodes what can be encoded: maps and slices of strings, numbers and raw JSON that was decoded before.
func asJSON(v any) json.RawMessage {
	text, err := json.Marshal(v)
	if err != nil {
		return json.RawMessage("null")
	}
	return text
}

// firstState is what a room is made of after its creator has joined.
// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3createroom
func (s *server) firstState(ctx context.Context, creator mxfed.UserID, id mxfed.RoomID, version mxfed.RoomVersion, req *roomRequest) ([]stateEntry, error) {
	levels, err := powerLevels(creator, version, req)
	if err != nil {
		return nil, err
	}
	entry := func(typ string, content any) stateEntry { return stateEntry{Type: typ, Content: asJSON(content)} }
	state := []stateEntry{entry("m.room.power_levels", levels)}
	if req.Alias != "" {
		alias := mxfed.RoomAlias("#" + req.Alias + ":" + string(s.name))
		if err := s.setAlias(ctx, creator, alias, id); err != nil {
			return nil, err
		}
		state = append(state, entry("m.room.canonical_alias", map[string]any{"alias": alias}))
	}
	rule, guests := "invite", "can_join"
	if req.Preset == "public_chat" {
		rule, guests = "public", "forbidden"
	}
	state = append(state, entry("m.room.join_rules", map[string]any{"join_rule": rule}),
		entry("m.room.history_visibility", map[string]any{"history_visibility": "shared"}), entry("m.room.guest_access", map[string]any{"guest_access": guests}))
	state = slices.DeleteFunc(state, func(preset stateEntry) bool {
		return slices.ContainsFunc(req.State, func(e stateEntry) bool { return e.Type == preset.Type && e.StateKey == "" })
	})
	state = append(state, req.State...)
	if req.Name != "" {
		state = append(state, entry("m.room.name", map[string]any{"name": req.Name}))
	}
	if req.Topic != "" {
		state = append(state, entry("m.room.topic", map[string]any{"topic": req.Topic}))
	}
	return state, nil
}

// powerLevels gives the creator all power, where that is not a matter of course.
func powerLevels(creator mxfed.UserID, version mxfed.RoomVersion, req *roomRequest) (map[string]any, error) {
	users := make(map[mxfed.UserID]int)
	if version != "12" {
		users[creator] = 100
		for _, user := range req.Invite {
			if req.Preset == "trusted_private_chat" {
				users[user] = 100
			}
		}
	}
	levels := map[string]any{"users": users, "users_default": 0, "events_default": 0, "state_default": 50, "ban": 50, "kick": 50, "redact": 50, "invite": 0,
		"events": map[string]int{"m.room.name": 50, "m.room.power_levels": 100, "m.room.history_visibility": 100, "m.room.canonical_alias": 50,
			"m.room.avatar": 50, "m.room.tombstone": map[bool]int{true: 150, false: 100}[version == "12"], "m.room.server_acl": 100, "m.room.encryption": 100}}
	if len(req.PowerLevels) == 0 {
		return levels, nil
	}
	var more map[string]any
	if err := json.Unmarshal(req.PowerLevels, &more); err != nil {
		return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "power_level_content_override is no object", Err: err}
	}
	maps.Copy(levels, more)
	return levels, nil
}

// sendMember changes a user's membership in a room that this server is in. content may be nil.
func (s *server) sendMember(ctx context.Context, sender mxfed.UserID, id mxfed.RoomID, user mxfed.UserID, membership string, content json.RawMessage) (mxfed.EventID, error) {
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
		if err != nil && !errors.Is(err, mxfed.ErrNotFound) {
			return nil, err
		}
		if p != nil && p.DisplayName != "" {
			full["displayname"] = p.DisplayName
		}
		if p != nil && p.AvatarURL != "" {
			full["avatar_url"] = p.AvatarURL
		}
	}
	if len(content) > 0 {
		if err := json.Unmarshal(content, &full); err != nil {
			return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "content is no object", Err: err}
		}
	}
	full["membership"] = membership
	return asJSON(full), nil
}

// here tells whether this server is in a room.
func (s *server) here(ctx context.Context, id mxfed.RoomID) (here bool, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		here, err = t.hasServer(id, s.name)
		return err
	})
	return here, err
}

// joinHere joins a user to a room that this server is in.
func (s *server) joinHere(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, content json.RawMessage) error {
	authoriser, err := s.authoriser(ctx, user, id)
	if err != nil {
		return err
	}
	if authoriser != "" {
		full := make(map[string]any)
		if len(content) > 0 {
			if err := json.Unmarshal(content, &full); err != nil {
				return &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "content is no object", Err: err}
			}
		}
		full["join_authorised_via_users_server"] = authoriser
		content = asJSON(full)
	}
	_, err = s.sendMember(ctx, user, id, user, "join", content)
	return err
}

// authoriser is the local user who lets another one into a restricted room; empty if nobody has to.
// https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func (s *server) authoriser(ctx context.Context, user mxfed.UserID, id mxfed.RoomID) (mxfed.UserID, error) {
	var facts *mxfed.Room
	var rule struct {
		Rule  string `json:"join_rule"`
		Allow []struct {
			Room mxfed.RoomID `json:"room_id"`
		}
	}
	err := s.db.view(ctx, func(t *tx) (err error) {
		ask := mxfed.RoomQuery{To: s.name, User: user, Local: true, State: []mxfed.StateKey{{Type: "m.room.member", Key: string(user)}}}
		r, err := t.room(id)
		if err != nil {
			return err
		}
		rules, err := t.current(r, mxfed.StateKey{Type: "m.room.join_rules"})
		if err != nil || len(rules) == 0 || json.Unmarshal(rules[0].Content(), &rule) != nil {
			return err
		}
		for _, allow := range rule.Allow {
			ask.Allow = append(ask.Allow, allow.Room)
		}
		_, facts, err = t.facts(id, ask)
		return err
	})
	if err != nil || rule.Rule != "restricted" && rule.Rule != "knock_restricted" || facts == nil || facts.Local == nil {
		return "", err
	}
	if len(facts.State) > 0 && (facts.State[0].Membership() == "invite" || facts.State[0].Membership() == "join") {
		return "", nil
	}
	if !slices.Contains(slices.Collect(maps.Values(facts.Joined)), true) {
		return "", &mxfed.Error{Code: mxfed.ErrForbidden, Message: "no condition of the room lets you join"}
	}
	who, _ := facts.Local.StateKey()
	return mxfed.UserID(who), nil
}

// inviteUser invites a user of any server.
func (s *server) inviteUser(ctx context.Context, sender mxfed.UserID, id mxfed.RoomID, user mxfed.UserID, content json.RawMessage) error {
	full, err := s.memberContent(ctx, user, content, "invite")
	if err != nil {
		return err
	}
	if user.Server() == s.name {
		if _, err := s.profileOf(ctx, user); err != nil {
			return err
		}
	}
	e, err := s.fed.Client().InviteUser(ctx, id, sender, user, full)
	if err != nil {
		return err
	}
	_, err = s.store(ctx, e, &message{Sender: sender})
	return err
}

// setMembership kicks (leave), bans (ban) or unbans (leave) another user.
func (s *server) setMembership(ctx context.Context, sender mxfed.UserID, id mxfed.RoomID, user mxfed.UserID, membership string, content json.RawMessage) error {
	_, err := s.sendMember(ctx, sender, id, user, membership, content)
	return err
}

// leaveRoom leaves a room, rejects an invite or retracts a knock. If no server of the room can be told of that, nobody but
// this one knows.
func (s *server) leaveRoom(ctx context.Context, user mxfed.UserID, id mxfed.RoomID, content json.RawMessage) error {
	var m *membership
	err := s.db.view(ctx, func(t *tx) (err error) {
		m, err = t.membership(user, id)
		return err
	})
	switch {
	case err != nil:
		return err
	case m == nil:
		return &mxfed.Error{Code: mxfed.ErrForbidden, Message: "you are not in the room"}
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
		row := &memberRow{user: user, room: id, membership: "leave", version: m.version, outside: string(left.JSON())}
		position, err := t.advance()
		if err != nil {
			return err
		}
		return t.setMembership(row, position)
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
	shown := make([]json.RawMessage, 0, len(result.State)+1)
	for _, e := range result.State {
		shown = append(shown, stripped(&e))
	}
	return s.db.update(ctx, "", func(t *tx) error {
		row := &memberRow{user: user, room: id, membership: "knock", version: result.Event.Version(), via: append([]mxfed.ServerName{result.Via}, via...)}
		return t.outside(row, result.Event, shown)
	})
}

// namedBy is the server that a room ID names, which may still be in the room.
func namedBy(id mxfed.RoomID) []mxfed.ServerName {
	if name := mxfed.UserID(id).Server(); name != "" {
		return []mxfed.ServerName{name}
	}
	return nil
}

// stripped is an entry as clients are shown it.
func stripped(e *mxfed.Stripped) json.RawMessage {
	return asJSON(map[string]any{"type": e.Type, "state_key": e.StateKey, "sender": e.Sender, "content": e.Content})
}

// forget hides a room that the user has left.
func (s *server) forget(ctx context.Context, user mxfed.UserID, id mxfed.RoomID) error {
	return s.db.update(ctx, "", func(t *tx) error {
		done, err := t.changes(`UPDATE memberships SET forgotten = 1 WHERE user_id = $1 AND room = $2 AND membership IN ('leave', 'ban')`, user, id)
		if err == nil && !done {
			err = &mxfed.Error{Code: mxfed.ErrUnknown, Status: 400, Message: fmt.Sprintf("you have not left %s", id)}
		}
		return err
	})
}
