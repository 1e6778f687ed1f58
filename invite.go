package mxfed

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
)

// InviteRequest is an invite on its way: a finished event and the full PDUs that describe the room, the create event
// among them. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
type InviteRequest struct {
	Event *Event
	State []*Event
}

// MarshalJSON returns the body of version 2.
func (r *InviteRequest) MarshalJSON() ([]byte, error) {
	if r.Event == nil {
		return nil, errNoEventGiven
	}
	return []byte(r.v2()), nil
}

var errNoEventGiven = errors.New("mxfed: Event is nil")

func (r *InviteRequest) v2() value {
	return object(field{"room_version", quoted(r.Event.Version())}, field{"event", r.Event.text}, field{"invite_room_state", texts(r.State)})
}

// v1 is the body of version 1: the event with the preview in unsigned, as far as the size limit leaves room for it; the
// create event comes first.
func (r *InviteRequest) v1() value {
	state := slices.Clone(r.State)
	slices.SortStableFunc(state, func(a, b *Event) int {
		if a.is(typeCreate, "") && !b.is(typeCreate, "") {
			return -1
		}
		return 0
	})
	body, shown := r.Event.text, state[:0]
	for _, e := range state {
		longer := r.Event.text.with("unsigned", object(field{"invite_room_state", texts(append(shown, e))}))
		if len(longer) <= maxEventSize {
			body, shown = longer, append(shown, e)
		}
	}
	return body
}

func texts(events []*Event) value {
	list := make([]value, 0, len(events))
	for _, e := range events {
		if e != nil {
			list = append(list, e.text)
		}
	}
	return array(list...)
}

// InviteResponse is the answer to an invite: the event with the signature of the invited user's server.
type InviteResponse struct {
	Event *Event
}

// MarshalJSON returns the answer of version 2.
func (r *InviteResponse) MarshalJSON() ([]byte, error) {
	if r.Event == nil {
		return nil, errNoEventGiven
	}
	return []byte(object(field{"event", r.Event.text})), nil
}

// Invite is an invite to a local user that has passed every check that the specification demands.
type Invite struct {
	// Event carries the signatures of both servers, but has not left yet.
	Event *Event
	// Create is the room's create event, verified; nil if it was not sent or did not verify. Keep it with the invite.
	Create *Event
	// User is the invited user, of the own name To. Origin is the inviter's server.
	User       UserID
	Origin, To ServerName
	// State describes the room; see Stripped. StateErr says what was wrong with it, nil for full and verified PDUs.
	// Return StateErr from Invited to be as strict as room version 12 recommends; many servers still send entries that
	// are no PDUs.
	State    []Stripped
	StateErr error
}

// InviteHost decides about invites to its own users.
type InviteHost interface {
	// Invited stores the invite, once per event ID, and returns nil, or refuses it: ErrForbidden if the user or this
	// server takes no such invites, ErrInviteBlocked if the user blocks invites, any Error or ErrorCode as it is, and
	// other errors as 500. The event is verified and signed when Invited is asked; it leaves only after nil.
	//
	// The inviter's server puts the invite into the room after it has got this answer. So a host that joins on the user's
	// behalf does so after Invited has returned, and tries again for a while if it is told ErrForbidden, as examples/bot
	// does. If this server is in the room, the same event may come with the room's others as well.
	Invited(ctx context.Context, inv *Invite) error
}

// InviteHostFunc is an InviteHost that is one function.
type InviteHostFunc func(ctx context.Context, inv *Invite) error

// Invited calls f.
func (f InviteHostFunc) Invited(ctx context.Context, inv *Invite) error { return f(ctx, inv) }

// NewInviteHandler serves PUT invite of versions 1 and 2 for the users of all own names.
// https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func NewInviteHandler(s *Server, host InviteHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		inv, answer, err := s.invited(ctx, in)
		if err != nil {
			return err
		}
		if err := host.Invited(ctx, inv); err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, versioned(in.version, object(field{"event", answer})))
		return nil
	}
	return &endpoint{server: s, name: "invite", method: http.MethodPut, versions: []string{"v1", "v2"}, params: 2, serve: serve}
}

// versioned wraps an answer as version 1 of an endpoint does. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1inviteroomideventid
func versioned(version string, answer value) value {
	if version == "v1" {
		return array("200", answer)
	}
	return answer
}

// invited makes every check that needs no host, signs, and returns the invite with the event to answer with.
func (s *Server) invited(ctx context.Context, in *incoming) (*Invite, value, error) {
	rules, event, list, err := s.readInvite(in)
	if err != nil {
		return nil, "", err
	}
	var p eventParser
	e, err := p.parse(rules, []byte(event))
	if err != nil {
		return nil, "", err
	}
	if err := checkInviteForm(e, in); err != nil {
		return nil, "", err
	}
	if err := s.checkInviteACL(ctx, in); err != nil {
		return nil, "", err
	}
	preview := readPreview(rules, e.room, list)
	verdicts := s.client.events(ctx, append([]*Event{e}, preview.events()...))
	checked, err := checkInvite(e, in, verdicts[0])
	if err != nil {
		return nil, "", err
	}
	preview.settle(verdicts[1:])
	signed, err := checked.sign(in.signer)
	if err != nil {
		return nil, "", err
	}
	inv := &Invite{Event: signed, Create: preview.create, User: UserID(e.stateKey), Origin: in.Origin, To: in.To,
		State: preview.entries, StateErr: preview.err}
	// All other members of the answer are as they came, unsigned included.
	return inv, event.with("signatures", signed.text.get("signatures")), nil
}

// readInvite takes the body apart as its version demands.
func (s *Server) readInvite(in *incoming) (rules *roomRules, event, state value, err error) {
	if in.version == "v1" {
		state = in.body.get("unsigned").get("invite_room_state")
		version := versionOfPreview(state)
		if rules = s.client.offers(version); rules == nil {
			return nil, "", "", incompatible(version)
		}
		return rules, in.body, state, nil
	}
	version, ok := in.body.get("room_version").str()
	event = in.body.get("event")
	if !ok || !event.isObject() {
		return nil, "", "", refuse(ErrBadJSON, "room_version or event is missing or of the wrong type")
	}
	if rules = s.client.offers(RoomVersion(version)); rules == nil {
		return nil, "", "", incompatible(RoomVersion(version))
	}
	return rules, event, in.body.get("invite_room_state"), nil
}

// versionOfPreview is the room version of an invite of version 1, which does not name it: "1" or "2", whose events have the
// same form. The difference is one of state resolution alone, so what the unverified preview says will do.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1inviteroomideventid
func versionOfPreview(state value) RoomVersion {
	for entry := range state.elements() {
		if entry.get("type") == quoted(typeCreate) && entry.get("content").get("room_version") == `"2"` {
			return "2"
		}
	}
	return "1"
}

// checkInviteForm checks what the event says against who sends it and where: only an invite of the caller's own user to a
// user of the name that was addressed may ever get that name's signature.
func checkInviteForm(e *Event, in *incoming) error {
	user := UserID(e.stateKey)
	switch {
	case e.room != in.room():
		return refuse(ErrInvalidParam, "room_id differs from the path")
	case e.id != EventID(in.id()):
		return refuse(ErrInvalidParam, "event ID differs from the path")
	case e.typ != typeMember:
		return refuse(ErrInvalidParam, "event is not of type %s", typeMember)
	case e.membership != "invite":
		return refuse(ErrInvalidParam, "membership is not invite")
	case e.sender.Server() != in.Origin:
		return refuse(ErrInvalidParam, "sender is not of %s", in.Origin)
	case !e.isState || !user.valid() || user.Server() != in.To:
		return refuse(ErrInvalidParam, "state_key is no user of %s", in.To)
	}
	return nil
}

// checkInviteACL asks for the room's access control list, if this server is in the room already.
func (s *Server) checkInviteACL(ctx context.Context, in *incoming) error {
	ask := RoomQuery{Origin: in.Origin, To: in.To, State: []StateKey{{typeServerACL, ""}}}
	room, _, err := readRoom(ctx, s.client.rooms, in.room(), ask)
	if err != nil {
		if answerTo(err).Code == ErrNotFound {
			return nil
		}
		return err
	}
	return room.checkACL(in.Origin)
}

// checkInvite judges hash and signatures. The sender's server must have signed, third-party invites included: here it is
// the one that asks.
func checkInvite(e *Event, in *incoming, v verdict) (approved, error) {
	if v.err != nil {
		return approved{}, v.err
	}
	if !e.hashOK {
		return approved{}, refuse(ErrInvalidParam, "content hash is wrong")
	}
	if e.signatures(in.Origin) == "" {
		return approved{}, refuse(ErrInvalidParam, "signature of %s is missing", in.Origin)
	}
	return approved{e}, nil
}

// Invite sends a finished invite to the invited user's server and returns it with that server's signature added, verified.
// Servers that only know version 1 are asked again in that form, in room versions 1 and 2. Sending the event on to the
// servers in the room is up to the host. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func (c *Client) Invite(ctx context.Context, to ServerName, req *InviteRequest) (*InviteResponse, error) {
	e := req.Event
	if e == nil || e.membership != "invite" {
		return nil, refuse(ErrInvalidParam, "event is no invite")
	}
	if UserID(e.stateKey).Server() != to {
		return nil, refuse(ErrInvalidParam, "%s is no user of %s", e.stateKey, to)
	}
	signer := c.signer(e.sender.Server())
	if signer == nil {
		return nil, refuse(ErrInvalidParam, "sender %s is no user of this server", e.sender)
	}
	q := &call{from: signer, to: to, endpoint: "invite", method: http.MethodPut, body: req.v2(),
		uri: federationURI("v2", "invite", string(e.room), string(e.id))}
	answer, err := c.ask(ctx, q)
	if old, isOld := err.(*Error); isOld && e.rules.eventID == idGiven && old.inviteV1Helps() {
		q.body, q.uri = req.v1(), federationURI("v1", "invite", string(e.room), string(e.id))
		if answer, err = c.ask(ctx, q); err == nil {
			answer, err = unwrapV1(answer)
		}
	}
	if err != nil {
		return nil, err
	}
	signed, err := c.countersigned(ctx, to, e, answer.get("event"))
	if err != nil {
		return nil, c.malformed(to, "invite", err)
	}
	return &InviteResponse{Event: signed}, nil
}

// inviteV1Helps tells whether an answer to version 2 makes version 1 worth a try: a 404, or any sign that the endpoint is
// missing. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func (e *Error) inviteV1Helps() bool { return e.Status == http.StatusNotFound || e.unimplemented() }

// unwrapV1 reads the pair that version 1 answers with.
func unwrapV1(answer value) (value, error) {
	pair := slices.AppendSeq([]value{}, answer.elements())
	if len(pair) != 2 || !pair[1].isObject() {
		return "", fmt.Errorf("answer is no pair of status and object")
	}
	return pair[1], nil
}

// countersigned checks that answer is the event that was sent with a valid signature of server added, and returns our copy
// with that signature: whatever else the answer holds is not used.
func (c *Client) countersigned(ctx context.Context, server ServerName, sent *Event, answer value) (*Event, error) {
	var p eventParser
	got, err := p.parse(sent.rules, []byte(answer))
	if err != nil {
		return nil, err
	}
	if got.id != sent.id || got.text.with("signatures", "") != sent.text.with("signatures", "") {
		return nil, fmt.Errorf("answer is another event than %s", sent.id)
	}
	for id, sig := range sent.signatures(sent.sender.Server()).members() {
		if got.signatures(sent.sender.Server()).get(id) != sig {
			return nil, fmt.Errorf("answer lacks our signature")
		}
	}
	keys := keySet{verifier: &c.verifier}
	var wanted []Key
	for id := range got.signatures(server).members() {
		wanted = append(wanted, Key{Server: server, ID: KeyID(id), At: millis(got.ts)})
	}
	keys.fetchKeys(ctx, wanted)
	return merge(&p, &keys, sent, got, server)
}

// merge adds those signatures of server in got to sent that verify; there must be one.
func merge(p *eventParser, keys *keySet, sent, got *Event, server ServerName) (*Event, error) {
	signed, found, message, usable := sent, false, slices.Clone(p.signedBytes(sent)), keys.usable(sent)
	for id, sig := range got.signatures(server).members() {
		text, _ := sig.str()
		pub := usable(server, KeyID(id))
		if pub == nil || !verify(pub, message, text) {
			continue
		}
		if found = true; KeyID(id) == policyKeyID && sent.signatures(server).get(id) != "" {
			continue // that of the room's policy server, which is judged by the key that the room names
		}
		raw, _ := decodeBase64(text) // as verify has; others may be less liberal about its form
		var err error
		if signed, err = signed.withSignature(server, KeyID(id), base64.RawStdEncoding.EncodeToString(raw)); err != nil {
			return nil, err
		}
	}
	if !found {
		return nil, keys.explain(got, &signatureError{server: server})
	}
	return signed, nil
}

// InviteUser builds an invite of user by the local user sender into a room of Config.Rooms, checks that the room allows
// it, and has the user's server sign it. A user of an own name is signed for without a call, and without asking InviteHost.
// If the room has a policy server, that one signs first: what it refuses reaches nobody. The host stores the event, after
// Event.Check in its transaction, as other servers were asked meanwhile, and sends it to the room's servers. content may hold
// displayname, reason and the like; membership is set here. What the room's rules or its policy server forbid is
// ErrForbidden. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func (c *Client) InviteUser(ctx context.Context, room RoomID, sender, user UserID, content json.RawMessage) (*Event, error) {
	if !user.valid() {
		return nil, refuse(ErrInvalidParam, "%q is no user ID", user)
	}
	withMembership, err := memberContent(content, "invite")
	if err != nil {
		return nil, err
	}
	key := string(user)
	d := &Draft{Room: room, Type: typeMember, StateKey: &key, Sender: sender, Content: json.RawMessage(withMembership)}
	event, facts, err := c.build(ctx, d, previewState...)
	if err != nil {
		return nil, err
	}
	return c.deliver(ctx, event, facts)
}

// deliver has the server of the invited user sign a finished invite, which is sent there unless that is an own name.
func (c *Client) deliver(ctx context.Context, event *Event, facts *Room) (*Event, error) {
	to := UserID(event.stateKey).Server()
	if own := c.signer(to); own != nil {
		if event.signatures(to).get(string(own.id)) != "" {
			return event, nil
		}
		return approved{event}.sign(own)
	}
	shown := append(slices.Clone(previewState), StateKey{typeMember, string(event.sender)})
	answer, err := c.Invite(ctx, to, &InviteRequest{Event: event, State: facts.entries(shown)})
	if err != nil {
		return nil, err
	}
	return answer.Event, nil
}

// memberContent is the host's content for a member event with the membership set; what only the library may decide is
// taken out.
func memberContent(content json.RawMessage, membership string) (value, error) {
	v := value("{}")
	if len(content) > 0 {
		var r jsonReader
		text, err := r.canonical(content, numbersEncoded)
		if err != nil {
			return "", because(err, ErrBadJSON, "content")
		}
		v = value(text)
	}
	if !v.isObject() {
		return "", refuse(ErrBadJSON, "content is no JSON object")
	}
	return v.with("join_authorised_via_users_server", "").with("membership", quoted(membership)), nil
}
