package mxfed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"
)

// This file turns invites of e-mail addresses and the like into invites of users. A room's m.room.third_party_invite event
// promises an invite to whoever an identity server says the address belongs to; the server of the user who sent it keeps
// the promise. https://spec.matrix.org/v1.19/server-server-api/#third-party-invites

// ThirdPartyInvite asks that a promise be kept: User owns the address that Sender has invited.
type ThirdPartyInvite struct {
	Room RoomID
	// Sender sent the room's m.room.third_party_invite event.
	Sender UserID
	User   UserID
	// DisplayName stands for the address, so that it need not be told; it may be empty.
	DisplayName string
	// Signed is the statement of the identity server: an object with mxid (User), token (the state key of Sender's event)
	// and signatures, 16 at most.
	Signed json.RawMessage
}

// MarshalJSON returns the body of a request to exchange the promise.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1exchange_third_party_inviteroomid
func (t *ThirdPartyInvite) MarshalJSON() ([]byte, error) {
	r, err := t.read()
	if err != nil {
		return nil, err
	}
	return []byte(r.body()), nil
}

// redemption is a ThirdPartyInvite of good form.
type redemption struct {
	room         RoomID
	sender, user UserID
	name         string
	signed       value // without unsigned, which nobody vouches for
	token        string
}

// maxInviteSignatures and maxInviteKeys bound what one third-party invite costs to check. Real ones have one signature and
// two keys.
const (
	maxInviteSignatures = 16
	maxInviteKeys       = 16
)

// read checks the form of t.
func (t *ThirdPartyInvite) read() (*redemption, error) {
	var reader jsonReader
	text, err := reader.canonical(t.Signed, numbersAsReceived)
	if err != nil {
		return nil, because(err, ErrInvalidParam, "signed cannot be read")
	}
	r := &redemption{room: t.Room, sender: t.Sender, user: t.User, name: strings.ToValidUTF8(t.DisplayName, "\uFFFD")}
	if !value(text).isObject() {
		return nil, refuse(ErrInvalidParam, "signed is no object")
	}
	r.signed = value(text).with("unsigned", "")
	count := 0
	for _, signatures := range r.signed.get("signatures").members() {
		for range signatures.members() {
			count++
		}
	}
	token, ok := r.signed.get("token").str()
	r.token = token
	switch {
	case !strings.HasPrefix(string(r.room), "!") || len(r.room) > maxIDLength || !utf8.ValidString(string(r.room)):
		return nil, refuse(ErrInvalidParam, "room_id is no room ID")
	case !r.sender.valid():
		return nil, refuse(ErrInvalidParam, "sender is no user ID")
	case !r.user.valid():
		return nil, refuse(ErrInvalidParam, "the invited user is no user ID")
	case r.signed.get("mxid") != quoted(r.user):
		return nil, refuse(ErrInvalidParam, "signed.mxid is not the invited user")
	case !ok || len(token) > maxIDLength:
		return nil, refuse(ErrInvalidParam, "signed.token is no string or longer than %d bytes", maxIDLength)
	case count == 0 || count > maxInviteSignatures:
		return nil, refuse(ErrInvalidParam, "signed has %d signatures, not 1 to %d", count, maxInviteSignatures)
	}
	return r, nil
}

// body is the partial event that a request holds.
func (r *redemption) body() value {
	var name value
	if r.name != "" {
		name = quoted(r.name)
	}
	return object(field{"type", quoted(typeMember)}, field{"room_id", quoted(r.room)}, field{"sender", quoted(r.sender)},
		field{"state_key", quoted(r.user)}, field{"content", r.content(name)})
}

// content is that of the invite.
func (r *redemption) content(name value) value {
	return object(field{"membership", `"invite"`},
		field{"third_party_invite", object(field{"display_name", name}, field{"signed", r.signed})})
}

// ThirdPartyHost stores the invites that third-party invites have become.
type ThirdPartyHost interface {
	// ThirdPartyInvited stores a finished invite as part of its room, once per event ID, passes it on to the room's servers
	// and, if the invited user is one of the host's own, shows it to that user. The event is allowed by what Rooms answered
	// before other servers were asked, so that Event.Check belongs into the transaction; it carries the signatures of the
	// server that made it and of the invited user's server, which has seen it already. Its sender may be another server's
	// user. An Error or ErrorCode decides the answer, other errors are 500; the exchange is then made anew, with another
	// event, when somebody asks again.
	ThirdPartyInvited(ctx context.Context, e *Event) error
}

// ThirdPartyHostFunc is a ThirdPartyHost that is one function.
type ThirdPartyHostFunc func(ctx context.Context, e *Event) error

// ThirdPartyInvited calls f.
func (f ThirdPartyHostFunc) ThirdPartyInvited(ctx context.Context, e *Event) error { return f(ctx, e) }

// NewExchangeThirdPartyInviteHandler serves PUT exchange_third_party_invite, by which the servers of invited users have
// this server keep its users' promises: the invite is made, allowed, sent to the user's server and signed there before the
// host gets it. A user who is invited already by the same promise is not invited again. It needs Config.Rooms. Access
// control lists do not apply here. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1exchange_third_party_inviteroomid
func NewExchangeThirdPartyInviteHandler(s *Server, host ThirdPartyHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		r, err := readExchange(in)
		if err != nil {
			return err
		}
		if r.sender.Server() != in.To {
			return refuse(ErrForbidden, "%s is no user of %s", r.sender, in.To)
		}
		room, _, err := readRoom(ctx, s.client.rooms, r.room, RoomQuery{Origin: in.Origin, To: in.To, State: r.entries()})
		if err != nil {
			return err
		}
		if err := s.keepPromise(ctx, host, in.signer, room, r); err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, "{}")
		return nil
	}
	return &endpoint{server: s, name: "exchange_third_party_invite", method: http.MethodPut, versions: []string{"v1"}, params: 1, serve: serve}
}

// readExchange checks what the partial event says, as far as the room is not needed for it.
func readExchange(in *incoming) (*redemption, error) {
	content := in.body.get("content")
	switch {
	case in.body.get("room_id") != quoted(in.params[0]):
		return nil, refuse(ErrInvalidParam, "room_id differs from the path")
	case in.body.get("type") != quoted(typeMember):
		return nil, refuse(ErrInvalidParam, "event is not of type %s", typeMember)
	case content.get("membership") != `"invite"`:
		return nil, refuse(ErrInvalidParam, "membership is not invite")
	}
	sender, _ := in.body.get("sender").str()
	user, _ := in.body.get("state_key").str()
	t := ThirdPartyInvite{Room: in.room(), Sender: UserID(sender), User: UserID(user),
		Signed: json.RawMessage(content.get("third_party_invite").get("signed"))}
	return t.read()
}

// entries are those that decide about r.
func (r *redemption) entries() []StateKey {
	return []StateKey{{typeCreate, ""}, {typeThirdPartyInvite, r.token}, {typeMember, string(r.user)}}
}

// keepPromise makes the invite that r asks for, as signer's server, and gives it to host.
func (s *Server) keepPromise(ctx context.Context, host ThirdPartyHost, signer *Signer, room *Room, r *redemption) error {
	event, err := s.client.redeem(ctx, signer, room, r)
	if err != nil || event == nil {
		return err
	}
	return host.ThirdPartyInvited(ctx, event)
}

// redeem makes the invite that r asks for in room, as signer's server, and has the invited user's server sign it. It
// returns nil if the room has that invite already.
func (c *Client) redeem(ctx context.Context, signer *Signer, room *Room, r *redemption) (*Event, error) {
	promise := room.state(typeThirdPartyInvite, r.token)
	if promise == nil || promise.sender != r.sender {
		return nil, refuse(ErrForbidden, "%s has made no such third-party invite", r.sender)
	}
	keys := signedWith(promise.content, r.signed)
	if len(keys) == 0 {
		return nil, refuse(ErrForbidden, "the third-party invite has no valid signature")
	}
	if r.invitedIn(room) {
		return nil, nil
	}
	if err := r.checkMember(room); err != nil {
		return nil, err
	}
	if err := c.checkValidity(ctx, keys); err != nil {
		return nil, err
	}
	event, facts, err := c.complete(ctx, signer, r, promise)
	if err != nil {
		return nil, err
	}
	if err := r.checkMember(facts); err != nil { // what it was asked before has become old while the key was checked
		return nil, err
	}
	return c.deliver(ctx, event, facts)
}

// promisedKey is a key of an m.room.third_party_invite event.
type promisedKey struct {
	text     string // as it is there
	validity value  // key_validity_url: "" if the key does not expire
}

// signedWith returns those keys of an m.room.third_party_invite event that have signed.
// https://spec.matrix.org/v1.19/client-server-api/#mroomthird_party_invite
func signedWith(content, signed value) (keys []promisedKey) {
	listed := []value{content}
	for entry := range content.get("public_keys").elements() {
		listed = append(listed, entry)
	}
	for _, entry := range listed[:min(len(listed), maxInviteKeys)] {
		text := entry.get("public_key")
		if text != "" && signedByAny(signed, inviteKeys(object(field{"public_key", text}))) {
			key := promisedKey{validity: entry.get("key_validity_url")}
			key.text, _ = text.str()
			keys = append(keys, key)
		}
	}
	return keys
}

// invitedIn tells whether the room has the invite already.
func (r *redemption) invitedIn(room *Room) bool {
	e := room.state(typeMember, string(r.user))
	return e != nil && e.membership == "invite" && e.sender == r.sender &&
		e.content.get("third_party_invite").get("signed").get("token") == quoted(r.token)
}

// checkMember refuses what would do harm: the authorisation rules let a third-party invite through to a user who is in the
// room, and would so take them out of it.
func (r *redemption) checkMember(room *Room) error {
	switch membershipOf(room.state, r.user) {
	case "ban":
		return refuse(ErrForbidden, "%s is banned", r.user)
	case "join":
		return refuse(ErrForbidden, "%s is in the room already", r.user)
	}
	return nil
}

// checkValidity demands that one of the keys has not been revoked.
// https://spec.matrix.org/v1.19/server-server-api/#verifying-the-invite
func (c *Client) checkValidity(ctx context.Context, keys []promisedKey) error {
	ctx, cancel := context.WithTimeout(ctx, validityTimeout)
	defer cancel()
	var failed error
	for _, k := range keys[:min(len(keys), maxValidityChecks)] {
		valid, err := c.stillValid(ctx, k)
		if valid {
			return nil
		}
		if err != nil {
			failed = err
		}
	}
	if failed != nil {
		return &Error{Code: ErrUnknown, Status: http.StatusBadGateway, Err: failed,
			Message: "the identity server could not be asked whether its key is valid"}
	}
	return refuse(ErrForbidden, "the key of the third-party invite is not valid any more")
}

const (
	validityTimeout   = 15 * time.Second // of all questions about the keys of one invite
	maxValidityChecks = 4
	maxValidityAnswer = 64 << 10 // bytes
)

// stillValid asks whether a key is valid, at the URL that the room's event gives, and nowhere else.
// https://spec.matrix.org/v1.19/identity-service-api/#get_matrixidentityv2pubkeyisvalid
func (c *Client) stillValid(ctx context.Context, k promisedKey) (bool, error) {
	if k.validity == "" {
		return true, nil
	}
	text, _ := k.validity.str()
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return false, nil // nobody can ever be asked
	}
	if u.RawQuery != "" {
		u.RawQuery += "&"
	}
	u.RawQuery += "public_key=" + url.QueryEscape(k.text)
	q := &http.Request{Method: http.MethodGet, URL: u, Header: make(http.Header)}
	answer, err := c.web().RoundTrip(q.WithContext(ctx))
	if err != nil {
		return false, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK { // redirects among them
		return false, fmt.Errorf("%s: status %d", u.Host, answer.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxValidityAnswer+1))
	if err == nil && len(body) > maxValidityAnswer {
		err = fmt.Errorf("more than %d bytes", maxValidityAnswer)
	}
	var reader jsonReader
	if err == nil {
		body, err = reader.canonical(body, numbersAsReceived)
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", u.Host, err)
	}
	return value(body).get("valid") == "true", nil
}

// web carries requests to hosts that are no Matrix servers.
func (c *Client) web() http.RoundTripper {
	if t, ok := c.http.(interface{ Web() http.RoundTripper }); ok {
		return t.Web()
	}
	return new(Resolver).Web()
}

// complete builds the invite, in the name of signer's server, from the room as it is now. If that is the invited user's
// server, the sender is another server's user, whose signature such an invite does not need.
// https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func (c *Client) complete(ctx context.Context, signer *Signer, r *redemption, promise *Event) (*Event, *Room, error) {
	name := promise.content.get("display_name")
	if _, ok := name.str(); !ok {
		name = `""`
	}
	key := string(r.user)
	d := &Draft{Room: r.room, Type: typeMember, StateKey: &key, Sender: r.sender, Content: json.RawMessage(r.content(name))}
	event, facts, err := c.buildAs(ctx, signer, d, previewState...)
	var other *Error
	if errors.As(err, &other) && other.Server != "" && other.Code == ErrForbidden {
		err = because(err, ErrForbidden, "the room's policy server refuses the invite")
	}
	return event, facts, err
}

// ExchangeThirdPartyInvite asks server to, mostly that of t.Sender, to keep the promise of a third-party invite to t.User, a
// local user. When it returns nil, the invite has been through the InviteHost of this server. NewOnBindHandler does it when
// an identity server reports an address. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1exchange_third_party_inviteroomid
func (c *Client) ExchangeThirdPartyInvite(ctx context.Context, to ServerName, t *ThirdPartyInvite) error {
	r, err := t.read()
	if err != nil {
		return err
	}
	return c.exchange(ctx, to, r)
}

func (c *Client) exchange(ctx context.Context, to ServerName, r *redemption) error {
	signer := c.signer(r.user.Server())
	if signer == nil {
		return refuse(ErrInvalidParam, "%s is no user of this server", r.user)
	}
	q := &call{from: signer, to: to, endpoint: "exchange_third_party_invite", method: http.MethodPut, body: r.body(),
		uri: federationURI("v1", "exchange_third_party_invite", string(r.room))}
	_, err := c.ask(ctx, q)
	return err
}
