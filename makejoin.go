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

// MakeJoinRequest asks for the template of a user's join. The room versions that the caller supports are those of its
// Config. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_joinroomiduserid
type MakeJoinRequest struct {
	Room RoomID
	User UserID
}

// MakeJoinResponse is a template: material for an event, never signed as it is.
type MakeJoinResponse struct {
	// Version is the room's version. Servers of the time before room versions leave it out: then it is "1" or "2".
	Version RoomVersion
	// Event is the unfinished event as the other server wrote it, in canonical form.
	Event json.RawMessage
}

// MarshalJSON returns the answer as it goes over the wire.
func (r *MakeJoinResponse) MarshalJSON() ([]byte, error) {
	return []byte(object(field{"room_version", quoted(r.Version)}, field{"event", value(r.Event)})), nil
}

// NewMakeJoinHandler serves GET make_join from the facts of Config.Rooms: without it every room is unknown.
// https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func NewMakeJoinHandler(s *Server) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		answer, err := s.makeJoin(ctx, in)
		if err != nil {
			return err
		}
		body, _ := answer.MarshalJSON()
		writeJSON(w, http.StatusOK, value(body))
		return nil
	}
	return &endpoint{server: s, name: "make_join", method: http.MethodGet, versions: []string{"v1"}, params: 2, serve: serve}
}

// makeJoin makes the template for a join that the room would let in now.
func (s *Server) makeJoin(ctx context.Context, in *incoming) (*MakeJoinResponse, error) {
	user := UserID(in.id())
	if err := checkCaller(user, in.Origin); err != nil {
		return nil, err
	}
	ask := RoomQuery{Origin: in.Origin, To: in.To, State: append(slices.Clone(admissionState), StateKey{typeMember, string(user)})}
	room, rules, err := readRoom(ctx, s.client.rooms, in.room(), ask)
	if err != nil {
		return nil, err
	}
	if err := room.checkACL(in.Origin); err != nil {
		return nil, err
	}
	if err := checkVersions(rules, in.query); err != nil {
		return nil, err
	}
	d := newMemberDraft(in.room(), user, "join")
	if room.needsCondition(user) {
		ask.User, ask.Allow, ask.Local = user, room.checkable(), true
		if room, rules, err = readRoom(ctx, s.client.rooms, in.room(), ask); err != nil {
			return nil, err
		}
		if err := room.authoriseJoin(d, in.To); err != nil {
			return nil, err
		}
	}
	return s.template(d, rules, room, in.To)
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

// checkVersions demands that the caller supports the room's version. One that names none supports "1".
func checkVersions(rules *roomRules, query url.Values) error {
	supported := query["ver"]
	if len(supported) == 0 {
		supported = []string{"1"}
	}
	if !slices.Contains(supported, string(rules.version)) {
		return incompatible(rules.version)
	}
	return nil
}

// newMemberDraft is the start of an event by which a user changes their own membership.
func newMemberDraft(room RoomID, user UserID, membership string) *draft {
	key := string(user)
	return &draft{room: room, typ: typeMember, stateKey: &key, sender: user, content: object(field{"membership", quoted(membership)})}
}

// authoriseJoin checks the conditions of a restricted room and names a local user who may let the joiner in.
// https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func (r *Room) authoriseJoin(d *draft, to ServerName) error {
	if !r.needsCondition(d.sender) { // the room has changed since it was asked first
		return nil
	}
	if err := r.checkConditions(); err != nil {
		return err
	}
	local := r.Local
	if local == nil || !local.is(typeMember, local.stateKey) || UserID(local.stateKey).Server() != to {
		return refuse(ErrUnableToGrantJoin, "no user of %s can authorise the join", to)
	}
	if r.state(typeMember, local.stateKey) == nil {
		r.State = append(slices.Clone(r.State), local)
	}
	if !mayInvite(r.state, UserID(local.stateKey)) {
		return refuse(ErrUnableToGrantJoin, "no user of %s can authorise the join", to)
	}
	d.content = d.content.with("join_authorised_via_users_server", quoted(local.stateKey))
	return nil
}

// template completes d for the room as it is and runs the authorisation rules on it.
func (s *Server) template(d *draft, rules *roomRules, room *Room, to ServerName) (*MakeJoinResponse, error) {
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
	return &MakeJoinResponse{Version: rules.version, Event: json.RawMessage(object(d.fields()...))}, nil
}

// MakeJoin asks one server for the template of a user's join, offering all versions of Config.Versions. An answer that is
// not about this user and room is an error. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_joinroomiduserid
func (c *Client) MakeJoin(ctx context.Context, to ServerName, req *MakeJoinRequest) (*MakeJoinResponse, error) {
	q := &call{to: to, endpoint: "make_join", method: http.MethodGet,
		uri: federationURI("v1", "make_join", string(req.Room), string(req.User)) + "?" + c.supported()}
	answer, err := c.askTemplate(ctx, q, req.User)
	if err != nil {
		return nil, err
	}
	if _, _, err := c.readTemplate(answer, newMemberDraft(req.Room, req.User, "join"), to); err != nil {
		return nil, c.malformed(to, q.endpoint, err)
	}
	return answer, nil
}

// supported is the query that lists the room versions of this server.
func (c *Client) supported() string {
	query := url.Values{}
	for _, r := range c.versions {
		query.Add("ver", string(r.version))
	}
	return query.Encode()
}

// askTemplate asks for a template as the server of user.
func (c *Client) askTemplate(ctx context.Context, q *call, user UserID) (*MakeJoinResponse, error) {
	if q.from = c.signer(user.Server()); q.from == nil || !user.valid() {
		return nil, refuse(ErrInvalidParam, "%q is no user of this server", user)
	}
	answer, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	version, ok := answer.get("room_version").str()
	event := answer.get("event")
	if !ok && answer.get("room_version") != "" || !event.isObject() {
		return nil, c.malformed(q.to, q.endpoint, errors.New("room_version is no string or event no object"))
	}
	return &MakeJoinResponse{Version: RoomVersion(version), Event: json.RawMessage(event)}, nil
}

// readTemplate takes over from a template what only a server in the room can know, and writes everything else itself: d
// says what is wanted and is completed. The rules are those of room version 1 if the server names none.
// https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func (c *Client) readTemplate(answer *MakeJoinResponse, d *draft, to ServerName) (*draft, *roomRules, error) {
	version := answer.Version
	if version == "" {
		version = "1"
	}
	rules := c.offers(version)
	if rules == nil {
		return nil, nil, incompatible(version)
	}
	if !d.room.fits(rules) {
		return nil, nil, fmt.Errorf("room version %s has no such room IDs", version)
	}
	v := value(answer.Event)
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
