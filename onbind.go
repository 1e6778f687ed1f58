package mxfed

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"
)

// This file hears from identity servers that an address which was invited to rooms now belongs to a local user. Anybody can
// claim so: the request is not authenticated, and its signatures can only be judged by those who know the rooms.

// Binding is the claim that an address belongs to a local user.
type Binding struct {
	// Medium is the kind of address, such as "email".
	Medium, Address string
	// User is of an own name; whether there is such a user is not known.
	User UserID
	// Invites are promises made to the address, 1 to 50, all of them to be kept to User. Their form is right, no more.
	Invites []ThirdPartyInvite
}

// BindHost takes the news of identity servers.
type BindHost interface {
	// Bound is asked before anything is done about a claim: nobody is called, and Rooms is not asked, unless it returns
	// nil. Anybody can make claims, and each has this server call the servers that it names. So a host should return nil
	// only for a user who exists, takes invites from strangers, and has just bound that address through this host, and
	// should limit how often it does so for one user. An Error or ErrorCode decides the answer, other errors are 500;
	// one answer for users who do not exist and users who do not want it tells strangers nothing.
	Bound(ctx context.Context, b *Binding) error
	// ThirdPartyInvited stores the invites that this server could make by itself, as it is in their rooms. The others
	// arrive at the InviteHost.
	ThirdPartyHost
}

const (
	maxBoundInvites = 50
	bindTimeout     = 2 * time.Minute // for all invites of one claim
)

// NewOnBindHandler serves PUT and POST 3pid/onbind: the specification has the one, identity servers use the other. The
// invites of a claim are redeemed one after the other, in rooms that this server is in by itself, in others by asking the
// inviter's server; the answer is 200 if all were, and 502 if not. There is no X-Matrix and no Config.Allow here: wrap the
// handler to limit requests by network address, or to let in known identity servers only.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv13pidonbind
func NewOnBindHandler(s *Server, host BindHost) http.Handler {
	serve := func(w http.ResponseWriter, r *http.Request) error {
		body, err := s.readBody(r)
		if err != nil {
			return err
		}
		claim, redemptions, err := s.readBinding(body)
		if err != nil {
			return err
		}
		if err := host.Bound(r.Context(), claim); err != nil {
			return err
		}
		if err := s.redeemAll(r.Context(), host, redemptions); err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, "{}")
		return nil
	}
	return &openEndpoint{server: s, name: "3pid", params: []string{"onbind"}, methods: []string{http.MethodPut, http.MethodPost}, serve: serve}
}

// openEndpoint is an endpoint of version 1 that anybody may use.
type openEndpoint struct {
	server  *Server
	name    string
	params  []string
	methods []string
	serve   func(w http.ResponseWriter, r *http.Request) error
}

// ServeHTTP implements http.Handler.
func (e *openEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t, err := parseTarget(r)
	switch {
	case err != nil:
	case t.version != "v1" || t.endpoint != e.name || !slices.Equal(t.params, e.params):
		err = errUnrecognized(http.StatusNotFound)
	case !slices.Contains(e.methods, r.Method):
		err = errUnrecognized(http.StatusMethodNotAllowed)
	default:
		err = e.serve(w, r)
	}
	if err != nil {
		e.server.refuse(w, r, err)
	}
}

// readBinding checks the form of a claim.
func (s *Server) readBinding(body value) (*Binding, []*redemption, error) {
	medium, hasMedium := body.get("medium").str()
	address, hasAddress := body.get("address").str()
	user, hasUser := body.get("mxid").str()
	b := &Binding{Medium: medium, Address: address, User: UserID(user)}
	invites := body.get("invites")
	switch {
	case !hasMedium || !hasAddress || !hasUser || !invites.isArray():
		return nil, nil, refuse(ErrBadJSON, "medium, address, mxid or invites is missing or of the wrong type")
	case !b.User.valid() || s.client.signer(b.User.Server()) == nil:
		return nil, nil, refuse(ErrInvalidParam, "mxid is no user of this server")
	}
	var redemptions []*redemption
	for invite := range invites.elements() {
		if len(redemptions) == maxBoundInvites {
			return nil, nil, refuse(ErrTooLarge, "more than %d invites", maxBoundInvites)
		}
		t, err := readBoundInvite(invite, b.User)
		if err != nil {
			return nil, nil, err
		}
		r, err := t.read()
		if err != nil {
			return nil, nil, err
		}
		b.Invites, redemptions = append(b.Invites, *t), append(redemptions, r)
	}
	if len(redemptions) == 0 {
		return nil, nil, refuse(ErrInvalidParam, "there are no invites")
	}
	return b, redemptions, nil
}

func readBoundInvite(invite value, user UserID) (*ThirdPartyInvite, error) {
	room, hasRoom := invite.get("room_id").str()
	sender, hasSender := invite.get("sender").str()
	mxid, hasUser := invite.get("mxid").str()
	signed := invite.get("signed")
	if !hasRoom || !hasSender || !hasUser || !signed.isObject() {
		return nil, refuse(ErrBadJSON, "room_id, sender, mxid or signed of an invite is missing or of the wrong type")
	}
	if mxid != string(user) {
		return nil, refuse(ErrInvalidParam, "an invite is for another user")
	}
	return &ThirdPartyInvite{Room: RoomID(room), Sender: UserID(sender), User: user, Signed: json.RawMessage(signed)}, nil
}

// redeemAll goes on after failures; what failed is not for strangers to know.
func (s *Server) redeemAll(ctx context.Context, host ThirdPartyHost, redemptions []*redemption) error {
	ctx, cancel := context.WithTimeout(ctx, bindTimeout)
	defer cancel()
	var failed []error
	for _, r := range redemptions {
		if err := s.redeemBound(ctx, host, r); err != nil {
			failed = append(failed, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return &Error{Code: ErrUnknown, Status: http.StatusBadGateway, Message: "not all invites could be redeemed", Err: errors.Join(failed...)}
}

// redeemBound redeems one promise: here, if this server is in the room, elsewhere if not.
// https://spec.matrix.org/v1.19/server-server-api/#third-party-invites
func (s *Server) redeemBound(ctx context.Context, host ThirdPartyHost, r *redemption) error {
	c := s.client
	maker := c.signer(r.sender.Server())
	local := maker != nil
	if !local {
		maker = c.signer(r.user.Server())
	}
	ask := RoomQuery{To: maker.name, State: r.entries(), Servers: []ServerName{maker.name}}
	room, _, err := readRoom(ctx, c.rooms, r.room, ask)
	if err == nil && room.Present[maker.name] {
		return s.keepPromise(ctx, host, maker, room, r)
	}
	if err == nil { // a room that this server has left
		err = errNoRoom()
	}
	if local || answerTo(err).Code != ErrNotFound {
		return err
	}
	err = c.exchange(ctx, r.sender.Server(), r)
	if other := c.otherKeeper(r); other != "" && err != nil && !errors.Is(err, ErrForbidden) && ctx.Err() == nil {
		if second := c.exchange(ctx, other, r); second != nil {
			return errors.Join(err, second)
		}
		return nil
	}
	return err
}

// otherKeeper is a server beside the sender's that may know the room: the one that room versions before 12 name in the
// room's ID.
func (c *Client) otherKeeper(r *redemption) ServerName {
	_, name, _ := strings.Cut(string(r.room), ":")
	server := ServerName(name)
	if server == r.sender.Server() || c.signer(server) != nil {
		return ""
	}
	return server
}
