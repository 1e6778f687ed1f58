package mxfed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
)

// This file is about templates: what make_join, make_leave and make_knock answer, how a template is made of a room's
// facts, and how our own event is made of another server's template.

// template is material for an event by which a user changes their own membership, never signed as it is. version is empty
// if the server, of the time before room versions, left it out: then it is "1" or "2".
type template struct {
	Version RoomVersion
	Event   json.RawMessage // in canonical form
}

// wire is the answer as it goes over the wire.
func (t *template) wire() value {
	return object(field{"room_version", quoted(t.Version)}, field{"event", value(t.Event)})
}

// newTemplateEndpoint serves one of the endpoints that hand out templates.
func newTemplateEndpoint(s *Server, name string, answer func(ctx context.Context, in *incoming) (*template, error)) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		t, err := answer(ctx, in)
		if err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, t.wire())
		return nil
	}
	return &endpoint{server: s, name: name, method: http.MethodGet, versions: []string{"v1"}, params: 2, serve: serve}
}

// memberRoom reads the facts by which the template for a user is made, after the checks that every request for one has
// to pass. ask is the question that was asked.
func (s *Server) memberRoom(ctx context.Context, in *incoming) (room *Room, rules *roomRules, ask RoomQuery, err error) {
	user := UserID(in.id())
	if err := checkCaller(user, in.Origin); err != nil {
		return nil, nil, ask, err
	}
	ask = RoomQuery{Origin: in.Origin, To: in.To, State: append(slices.Clone(admissionState), StateKey{typeMember, string(user)})}
	if room, rules, err = readRoom(ctx, s.client.rooms, in.room(), ask); err == nil {
		err = room.checkACL(in.Origin)
	}
	return room, rules, ask, err
}

// checkCaller demands that a server asks for a user of its own.
func checkCaller(user UserID, origin ServerName) error {
	if !user.valid() {
		return refuse(ErrInvalidParam, "path holds no user ID")
	}
	if user.Server() != origin {
		return refuse(ErrForbidden, "%s is no user of %s", user, origin)
	}
	return nil
}

// newMemberDraft is the start of an event by which a user changes their own membership.
func newMemberDraft(room RoomID, user UserID, membership string) *draft {
	key := string(user)
	return &draft{room: room, typ: typeMember, stateKey: &key, sender: user, content: object(field{"membership", quoted(membership)})}
}

// template completes d for the room as it is and runs the authorisation rules on it.
func (s *Server) template(d *draft, rules *roomRules, room *Room, to ServerName) (*template, error) {
	d.ts, d.origin = s.client.now().UnixMilli(), originFor(rules, to)
	if err := d.place(rules, room); err != nil {
		return nil, err
	}
	event, err := d.build(rules)
	if err != nil {
		return nil, err
	}
	if err := authorise(event, stateOf(room.State, nil), true); err != nil {
		return nil, err
	}
	return &template{rules.version, json.RawMessage(object(d.fields()...))}, nil
}

// memberEvent makes the event that d describes by the template of another server, with content of our own.
func (c *Client) memberEvent(ctx context.Context, to ServerName, d *draft, content value) (*Event, *template, error) {
	t, ready, rules, err := c.askTemplate(ctx, to, d)
	if err != nil {
		return nil, nil, err
	}
	authoriser := ready.content.get("join_authorised_via_users_server")
	ready.content, ready.ts = content.with("join_authorised_via_users_server", authoriser), c.now().UnixMilli()
	event, err := ready.build(rules)
	if err != nil {
		return nil, nil, err
	}
	// The event says that our own user changes their own membership, and nothing else that is not ours but its place in the
	// graph.
	event, err = approved{event}.sign(c.signer(d.sender.Server()))
	return event, t, err
}

// askTemplate asks a server for the template of d, as the server of d's sender, and completes d by it.
func (c *Client) askTemplate(ctx context.Context, to ServerName, d *draft) (*template, *draft, *roomRules, error) {
	signer, err := c.signerOf(d.sender)
	if err != nil {
		return nil, nil, nil, err
	}
	membership, _ := d.content.get("membership").str()
	q := &call{from: signer, to: to, endpoint: "make_" + membership, method: http.MethodGet}
	q.uri = federationURI("v1", q.endpoint, string(d.room), string(d.sender))
	if membership != "leave" { // whoever leaves has to, in whatever version
		q.uri += "?" + c.supported()
	}
	answer, err := c.ask(ctx, q)
	if err != nil {
		return nil, nil, nil, err
	}
	version, ok := answer.get("room_version").str()
	event := answer.get("event")
	if !ok && answer.get("room_version") != "" || !event.isObject() {
		return nil, nil, nil, c.malformed(to, q.endpoint, errors.New("room_version is no string or event no object"))
	}
	t := &template{RoomVersion(version), json.RawMessage(event)}
	ready, rules, err := c.readTemplate(t, d, to)
	if err != nil {
		return nil, nil, nil, c.malformed(to, q.endpoint, err)
	}
	return t, ready, rules, nil
}

// supported is the query that lists the room versions of this server.
func (c *Client) supported() string {
	query := url.Values{}
	for _, r := range c.versions {
		query.Add("ver", string(r.version))
	}
	return query.Encode()
}

// readTemplate takes over from a template what only a server in the room can know, and writes everything else itself: d
// says what is wanted and is completed. The rules are those of room version 1 if the server names none.
// https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func (c *Client) readTemplate(t *template, d *draft, to ServerName) (*draft, *roomRules, error) {
	version := t.Version
	if version == "" {
		version = "1"
	}
	rules := c.offers(version)
	if rules == nil {
		return nil, nil, incompatible(version)
	}
	if d.content.get("membership") == `"knock"` && !rules.knock { // nor do servers that name no version
		return nil, nil, fmt.Errorf("rooms of version %s do not know knocks", version)
	}
	if !d.room.fits(rules) {
		return nil, nil, fmt.Errorf("room version %s has no such room IDs", version)
	}
	v := value(t.Event)
	if err := d.matches(v); err != nil {
		return nil, nil, err
	}
	ready := *d
	var err error
	if ready.prev, err = templateReferences(rules, "prev_events", v, maxPrevEvents); err != nil {
		return nil, nil, err
	}
	if ready.auth, err = templateReferences(rules, "auth_events", v, maxAuthEvents); err != nil {
		return nil, nil, err
	}
	depth, ok := v.get("depth").int()
	if !ok || depth < 0 || depth > rules.maxDepth {
		return nil, nil, errors.New("depth is missing or out of range")
	}
	ready.depth = depth
	own := d.sender.Server()
	if ready.origin = originFor(rules, own); v.get("origin") != "" {
		ready.origin = own // some servers that send it refuse an event without
	}
	err = ready.takeAuthoriser(rules, v.get("content").get("join_authorised_via_users_server"), to)
	return &ready, rules, err
}

// matches checks that a template is for the event that d describes.
func (d *draft) matches(v value) error {
	membership := d.content.get("membership")
	for key, want := range map[string]value{"room_id": quoted(d.room), "sender": quoted(d.sender), "state_key": quoted(*d.stateKey),
		"type": quoted(d.typ)} {
		if v.get(key) != want {
			return fmt.Errorf("%s of the template is not %s", key, want)
		}
	}
	if v.get("content").get("membership") != membership {
		return fmt.Errorf("membership of the template is not %s", membership)
	}
	return nil
}

// templateReferences rewrites a list of events so that nothing but IDs, and hashes where the version has them, is kept.
func templateReferences(rules *roomRules, key string, template value, limit int) (value, error) {
	list := template.get(key)
	ids, err := appendReferences(nil, rules, key, list)
	if err != nil {
		return "", err
	}
	if len(ids) > limit {
		return "", fmt.Errorf("%s has more than %d entries", key, limit)
	}
	refs := make([]value, 0, len(ids))
	for entry := range list.elements() {
		ref := quoted(ids[len(refs)])
		if rules.eventID == idGiven {
			pair := slices.AppendSeq(make([]value, 0, 2), entry.elements())
			hash, ok := pair[1].get("sha256").str() // not always a hash: some servers know the event by its ID alone
			if !ok && pair[1].get("sha256") != "" || len(hash) > maxIDLength {
				return "", fmt.Errorf("%s holds something else than pairs of ID and hash", key)
			}
			ref = array(ref, object(field{"sha256", quoted(hash)}))
		}
		refs = append(refs, ref)
	}
	return array(refs...), nil
}

// takeAuthoriser takes over who authorises a restricted join: a user of the server that is asked, and nobody else.
func (d *draft) takeAuthoriser(rules *roomRules, authoriser value, to ServerName) error {
	if authoriser == "" || !rules.restricted || d.content.get("membership") != `"join"` {
		return nil
	}
	user, ok := authoriser.str()
	if !ok || !UserID(user).valid() || UserID(user).Server() != to {
		return fmt.Errorf("the template is authorised by %s, who is no user of the server", authoriser)
	}
	d.content = d.content.with("join_authorised_via_users_server", authoriser)
	return nil
}
