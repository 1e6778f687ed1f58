package mxfed

import (
	"context"
	"fmt"
	"net/http"
	"slices"
)

// This file is about events by which users of other servers change their own membership in a room of this server: what is
// checked when one is sent here, and again when the host stores it.

// Membership is a join, leave or knock of another server's user: verified, allowed by the facts that Config.Rooms answered
// to Ask, and carrying this server's signature, after that of the room's policy server if it has one.
type Membership struct {
	Event *Event
	// Ask is the question whose answer the checks were made on; Origin and To are in it.
	Ask RoomQuery
	// OmitMembers: the answer to this join may leave out member events.
	OmitMembers bool
}

// MemberHost stores leaves, or knocks, of other servers' users in its rooms.
type MemberHost interface {
	// Accept stores the event atomically, once per event ID, and passes it on to the room's servers. In the transaction
	// that stores it the host reads the facts of m.Ask again and calls m.Check. The event is verified, was allowed by the
	// facts that Rooms answered, and carries this server's signature. An Error or ErrorCode decides the answer, other
	// errors are 500.
	Accept(ctx context.Context, m *Membership) error
}

// MemberHostFunc is a MemberHost that is one function.
type MemberHostFunc func(ctx context.Context, m *Membership) error

// Accept calls f.
func (f MemberHostFunc) Accept(ctx context.Context, m *Membership) error { return f(ctx, m) }

// Check repeats the room's checks on facts read again. It does no I/O, so a host calls it inside the transaction that
// stores the event, with the answer to m.Ask as of then: a join that has become forbidden meanwhile is refused, and no
// retry loop is needed. An event that now.Events already holds passes. Errors are of type *Error; for whatever reason, the
// event is not let in.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (m *Membership) Check(now *Room) error {
	if now == nil {
		return errNoRoom()
	}
	if err := now.checkACL(m.Ask.Origin); err != nil {
		return err
	}
	known, err := m.Event.checkBefore(now)
	if err != nil || known {
		return err
	}
	if err := m.checkRestricted(now); err != nil {
		return err
	}
	return m.Event.checkNow(now)
}

// checkRestricted checks, for a join that a user of this server is to authorise, what the authorisation rules do not know:
// the conditions under which the room lets users in, and that the user may let others in at this moment, needed or not.
// https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func (m *Membership) checkRestricted(now *Room) error {
	user := m.Event.authoriserID()
	if m.Event.membership != "join" || user == "" || user.Server() != m.Ask.To {
		return nil
	}
	if now.needsCondition(m.Event.sender) {
		if err := now.checkConditions(); err != nil {
			return err
		}
	}
	if !mayInvite(now.state, user) {
		return refuse(ErrUnableToGrantJoin, "%s cannot authorise joins any more", user)
	}
	return nil
}

// needsCondition tells whether user, being neither invited nor joined, may only join by meeting a condition.
func (r *Room) needsCondition(user UserID) bool {
	switch joinRuleOf(r.Version.rules(), r.state) {
	case "restricted", "knock_restricted":
		member := membershipOf(r.state, user)
		return member != "invite" && member != "join"
	}
	return false
}

// conditions are the rooms of which one must have joined the user.
func (r *Room) conditions() (rooms []RoomID) {
	rule := r.state(typeJoinRules, "")
	if rule == nil {
		return nil
	}
	for entry := range rule.content.get("allow").elements() {
		typ, _ := entry.get("type").str()
		room, ok := entry.get("room_id").str()
		if typ == "m.room_membership" && ok && !slices.Contains(rooms, RoomID(room)) {
			rooms = append(rooms, RoomID(room))
		}
	}
	return rooms
}

// maxConditions bounds how many rooms a host is asked about for one join; more cannot be checked.
const maxConditions = 64

// checkable are the conditions that a host is asked about.
func (r *Room) checkable() []RoomID {
	rooms := r.conditions()
	return rooms[:min(len(rooms), maxConditions)]
}

// checkConditions tells whether the user asked about is in one of the rooms that the join rule names. One satisfied
// condition is enough; one that cannot be checked leaves the decision to other servers.
func (r *Room) checkConditions() error {
	unknown := false
	for _, room := range r.conditions() {
		joined, checked := r.Joined[room]
		if joined {
			return nil
		}
		unknown = unknown || !checked
	}
	if unknown {
		return refuse(ErrUnableToAuthoriseJoin, "this server is not in the rooms that decide about the join")
	}
	return refuse(ErrForbidden, "no condition of the room lets the user join")
}

// factsFor is the question whose answer decides about an event of a member; facts are what is known of the room so far.
func factsFor(e *Event, origin, to ServerName, facts *Room) RoomQuery {
	ask := e.Query()
	ask.Origin, ask.To, ask.Servers = origin, to, facts.policyServers()
	if user := e.authoriserID(); user != "" && e.membership == "join" {
		ask.User, ask.Allow = e.sender, facts.checkable()
	}
	return ask
}

// memberSent makes every check of a member event that another server sends about its own user, and adds our signature.
// more are entries that the caller wants in room besides.
func (s *Server) memberSent(ctx context.Context, in *incoming, membership string, more ...StateKey) (m *Membership, room *Room, err error) {
	ask := RoomQuery{Origin: in.Origin, To: in.To, State: slices.Clone(admissionState)}
	room, rules, err := readRoom(ctx, s.client.rooms, in.room(), ask)
	if err != nil {
		return nil, nil, err
	}
	if err := room.checkACL(in.Origin); err != nil {
		return nil, nil, err
	}
	e, err := s.readMember(ctx, in, rules, membership)
	if err != nil {
		return nil, nil, err
	}
	m = &Membership{Event: e, Ask: factsFor(e, in.Origin, in.To, room)}
	ask = m.Ask
	ask.State = withKeys(slices.Clone(ask.State), more...)
	if room, _, err = readRoom(ctx, s.client.rooms, in.room(), ask); err != nil {
		return nil, nil, err
	}
	return m, room, s.approve(ctx, m, room, in.signer)
}

// readMember reads the event and makes the checks that need no facts of the room.
func (s *Server) readMember(ctx context.Context, in *incoming, rules *roomRules, membership string) (*Event, error) {
	var p eventParser
	e, err := p.parse(rules, []byte(in.body))
	if err != nil {
		return nil, err
	}
	if err := checkMemberForm(e, in, membership); err != nil {
		return nil, err
	}
	v := s.client.events(ctx, []*Event{e})[0]
	if v.err != nil {
		return nil, v.err
	}
	if !e.hashOK {
		return nil, refuse(ErrInvalidParam, "content hash is wrong")
	}
	return e, checkAuthoriser(e, in.To, v.authorised)
}

// checkMemberForm checks what the event says against who sends it and where.
func checkMemberForm(e *Event, in *incoming, membership string) error {
	switch {
	case e.room != in.room():
		return refuse(ErrInvalidParam, "room_id differs from the path")
	case e.id != EventID(in.id()):
		return refuse(ErrInvalidParam, "event ID differs from the path")
	case e.typ != typeMember:
		return refuse(ErrInvalidParam, "event is not of type %s", typeMember)
	case e.membership != membership:
		return refuse(ErrInvalidParam, "membership is not %s", membership)
	case e.sender.Server() != in.Origin:
		return refuse(ErrInvalidParam, "sender is not of %s", in.Origin)
	case !e.isState || e.stateKey != string(e.sender):
		return refuse(ErrInvalidParam, "state_key is not the sender")
	}
	return nil
}

// checkAuthoriser checks who is said to authorise a join: a user of ours, about whom the room decides, or one of a server
// that has signed already.
func checkAuthoriser(e *Event, to ServerName, signed bool) error {
	if !e.rules.restricted || e.authoriser == "" {
		return nil
	}
	user := e.authoriserID()
	if !user.valid() {
		return refuse(ErrInvalidParam, "join_authorised_via_users_server is no user ID")
	}
	if user.Server() != to && !signed {
		return refuse(ErrInvalidParam, "%s has not signed the event that its user authorises", user.Server())
	}
	return nil
}

// approve judges the event by the room's facts, signs it and makes sure that the signature holds.
func (s *Server) approve(ctx context.Context, m *Membership, room *Room, signer *Signer) error {
	if err := m.Check(room); err != nil {
		return err
	}
	e, err := s.client.policySigned(ctx, signer, room, m.Event)
	if err != nil {
		return err
	}
	signed, err := approved{e.withoutOldSignatures(signer)}.sign(signer)
	if err != nil {
		return err
	}
	m.Event = signed
	var p eventParser
	keys := keySet{verifier: &s.client.verifier}
	keys.fetchKeys(ctx, []Key{{Server: signer.name, ID: signer.id}})
	if pub := keys.known[keyName{signer.name, signer.id}].Public; pub == nil {
		return fmt.Errorf("signer of %s does not know its own key", signer.name)
	} else if sig, _ := signed.signatures(signer.name).get(string(signer.id)).str(); !verify(pub, p.signedBytes(signed), sig) {
		return fmt.Errorf("signer of %s made a signature that does not verify", signer.name)
	}
	return nil
}

// withoutOldSignatures returns e without what came under the IDs of our old keys: if such a signature is wrong, the new one
// beside it is void for others. https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func (e *Event) withoutOldSignatures(s *Signer) *Event {
	entries := e.signatures(s.name)
	if !entries.isObject() || len(s.old) == 0 {
		return e
	}
	for _, old := range s.old {
		entries = entries.with(string(old.ID), "")
	}
	clean := *e
	clean.text = e.text.with("signatures", e.text.get("signatures").with(string(s.name), entries))
	return &clean
}

// sendVersions are the versions of send_join and send_leave that are served.
func (s *Server) sendVersions() []string {
	if s.client.noV1 {
		return []string{"v2"}
	}
	return []string{"v1", "v2"}
}

// memberCall is the request that sends a finished event by which a local user changes their own membership.
func (c *Client) memberCall(to ServerName, version, membership string, e *Event) (*call, error) {
	if e == nil || e.membership != membership || !e.is(typeMember, string(e.sender)) {
		return nil, refuse(ErrInvalidParam, "event is no %s of its sender", membership)
	}
	signer, err := c.signerOf(e.sender)
	if err != nil {
		return nil, err
	}
	endpoint := "send_" + membership
	return &call{from: signer, to: to, endpoint: endpoint, method: http.MethodPut, body: e.text,
		uri: federationURI(version, endpoint, string(e.room), string(e.id))}, nil
}

// signerOf is the signer of a local user's server.
func (c *Client) signerOf(user UserID) (*Signer, error) {
	if signer := c.signer(user.Server()); signer != nil && user.valid() {
		return signer, nil
	}
	return nil, refuse(ErrInvalidParam, "%q is no user of this server", user)
}

// candidates are those of via that can be asked: other servers, each once. Names that are none come as errors: such lists
// are made of links and of what other servers say.
func (c *Client) candidates(via []ServerName) (servers []ServerName, errs []error) {
	for _, name := range via {
		switch {
		case slices.Contains(servers, name) || c.signer(name) != nil:
		case !name.valid():
			errs = append(errs, refuse(ErrInvalidParam, "%.64q is no server name", name))
		default:
			servers = append(servers, name)
		}
	}
	return servers, errs
}

func errNoCandidate() error {
	return refuse(ErrNotFound, "no other server is known that may be in the room")
}
