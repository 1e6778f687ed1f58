package mxfed

import (
	"cmp"
	"context"
	"encoding/json"
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
func (r *MakeJoinResponse) MarshalJSON() ([]byte, error) { return []byte((*template)(r).wire()), nil }

// NewMakeJoinHandler serves GET make_join from the facts of Config.Rooms: without it every room is unknown.
// https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func NewMakeJoinHandler(s *Server) http.Handler {
	return newTemplateEndpoint(s, "make_join", s.makeJoin)
}

// makeJoin makes the template for a join that the room would let in now.
func (s *Server) makeJoin(ctx context.Context, in *incoming) (*template, error) {
	room, rules, ask, err := s.memberRoom(ctx, in)
	if err != nil {
		return nil, err
	}
	if err := checkVersions(rules, in.query); err != nil {
		return nil, err
	}
	d := newMemberDraft(in.room(), UserID(in.id()), "join")
	if room.needsCondition(d.sender) {
		if room, rules, err = s.client.conditionalJoin(ctx, d, ask, room); err != nil {
			return nil, err
		}
	}
	return s.template(d, rules, room, in.To)
}

// conditionalJoin asks for what decides about a join that needs a condition, room being the answer to ask, and completes
// the draft of one that is let in.
func (c *Client) conditionalJoin(ctx context.Context, d *draft, ask RoomQuery, room *Room) (*Room, *roomRules, error) {
	ask.User, ask.Allow, ask.Local = d.sender, room.checkable(), true
	ask.State = withKeys(ask.State, room.powerful(ask.To)...)
	room, rules, err := readRoom(ctx, c.rooms, d.room, ask)
	if err == nil {
		err = room.authoriseJoin(d, ask.To)
	}
	return room, rules, err
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

// authoriseJoin checks the conditions of a restricted room and names a local user who may let the joiner in.
// https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func (r *Room) authoriseJoin(d *draft, to ServerName) error {
	if !r.needsCondition(d.sender) { // the room has changed since it was asked first
		return nil
	}
	if err := r.checkConditions(); err != nil {
		return err
	}
	candidates := r.powerful(to)
	if local := r.Local; local != nil && local.is(typeMember, local.stateKey) && UserID(local.stateKey).Server() == to {
		if r.state(typeMember, local.stateKey) == nil {
			r.State = append(slices.Clone(r.State), local)
		}
		candidates = append(candidates, StateKey{typeMember, local.stateKey})
	}
	for _, member := range candidates {
		if mayInvite(r.state, UserID(member.Key)) {
			d.content = d.content.with("join_authorised_via_users_server", quoted(member.Key))
			return nil
		}
	}
	return refuse(ErrUnableToGrantJoin, "no user of %s can authorise the join", to)
}

// maxPowerful bounds how many users a host is asked about beside any of its own.
const maxPowerful = 32

// powerful are the member entries of those users of a server who have a power of their own, the mightiest first.
func (r *Room) powerful(server ServerName) (members []StateKey) {
	s, err := readState(r.state)
	if err != nil {
		return nil
	}
	users := slices.Collect(creators(s.create))
	if s.levels != nil {
		for _, l := range s.levels.users {
			users = append(users, UserID(l.key))
		}
	}
	users = slices.DeleteFunc(users, func(user UserID) bool { return user.Server() != server })
	slices.SortStableFunc(users, func(a, b UserID) int { return cmp.Compare(s.power(b), s.power(a)) })
	for _, user := range users[:min(len(users), maxPowerful)] {
		members = withKeys(members, StateKey{typeMember, string(user)})
	}
	return members
}

// MakeJoin asks one server for the template of a user's join, offering all versions of Config.Versions. An answer that is
// not about this user and room is an error. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_joinroomiduserid
func (c *Client) MakeJoin(ctx context.Context, to ServerName, req *MakeJoinRequest) (*MakeJoinResponse, error) {
	t, _, _, err := c.askTemplate(ctx, to, newMemberDraft(req.Room, req.User, "join"))
	return (*MakeJoinResponse)(t), err
}
