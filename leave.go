package mxfed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
)

// MakeLeaveRequest asks for the template of a user's leave.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_leaveroomiduserid
type MakeLeaveRequest struct {
	Room RoomID
	User UserID
}

// MakeLeaveResponse is a template: material for an event, never signed as it is. Its fields are those of
// MakeJoinResponse.
type MakeLeaveResponse struct {
	Version RoomVersion
	Event   json.RawMessage
}

// MarshalJSON returns the answer as it goes over the wire.
func (r *MakeLeaveResponse) MarshalJSON() ([]byte, error) { return []byte((*template)(r).wire()), nil }

// SendLeaveRequest is a finished leave on its way; its answer is empty.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_leaveroomideventid
type SendLeaveRequest struct {
	Event *Event
}

// NewMakeLeaveHandler serves GET make_leave from the facts of Config.Rooms: without it every room is unknown.
// https://spec.matrix.org/v1.19/server-server-api/#leaving-rooms-rejecting-invites
func NewMakeLeaveHandler(s *Server) http.Handler {
	return newTemplateEndpoint(s, "make_leave", func(ctx context.Context, in *incoming) (*template, error) {
		room, rules, _, err := s.memberRoom(ctx, in)
		if err != nil {
			return nil, err
		}
		return s.template(newMemberDraft(in.room(), UserID(in.id()), "leave"), rules, room, in.To)
	})
}

// NewSendLeaveHandler serves PUT send_leave of version 2 and, unless Config.NoV1, version 1, which the specification has
// dropped. It takes what a user does to themselves: leaves, rejected invites and retracted knocks. It needs Config.Rooms:
// without it every room is unknown. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_leaveroomideventid
func NewSendLeaveHandler(s *Server, host MemberHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		m, _, err := s.memberSent(ctx, in, "leave")
		if err != nil {
			return err
		}
		if err := host.Accept(ctx, m); err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, versioned(in.version, "{}"))
		return nil
	}
	return &endpoint{server: s, name: "send_leave", method: http.MethodPut, versions: s.sendVersions(), params: 2, serve: serve}
}

// LeaveRequest takes User, who is invited, knocking or joined, out of a room that this server is not in, through the first
// of Via that takes it. A server that is in the room builds the leave itself, with Server.Build.
type LeaveRequest struct {
	Room RoomID
	// User is a user of an own name.
	User UserID
	// Via are servers that may be in the room, in the order in which they are asked: ten at most.
	Via []ServerName
	// Version is the room's version as the invite or knock has it; a template of another one is refused. Empty: not known.
	Version RoomVersion
	// Content holds a reason and the like, or nothing; membership is set here.
	Content json.RawMessage
}

// Rejection returns the request that rejects the invite: it asks the inviter's server first, then others whose users have
// set what the invite shows of the room.
func (inv *Invite) Rejection() *LeaveRequest {
	via := []ServerName{inv.Origin}
	for _, s := range inv.State {
		if name := s.Sender.Server(); name != inv.To && !slices.Contains(via, name) && len(via) < maxLeaveServers {
			via = append(via, name)
		}
	}
	return &LeaveRequest{Room: inv.Event.room, User: inv.User, Via: via, Version: inv.Event.Version()}
}

// Rescinded tells whether a member event, received while this server is not in the room, takes the invite back: a leave or
// ban of the invited user, by the inviter's server, that was built on the invite. The event has to be verified, as by
// Server.Verify; nobody outside the room can check more of it. It comes by PUT send like the events of rooms that this
// server is in, so a host looks for invites before it refuses a room that it does not know.
func (inv *Invite) Rescinded(by *Event) bool {
	return by.is(typeMember, string(inv.User)) && (by.membership == "leave" || by.membership == "ban") &&
		by.room == inv.Event.room && by.sender.Server() == inv.Event.sender.Server() && slices.Contains(by.Auth(), inv.Event.id)
}

// LeaveError says that no server took a leave: none is in the room any more, reachable or willing. The host then ends the
// invite or knock on its own side alone. https://spec.matrix.org/v1.19/server-server-api/#leaving-rooms-rejecting-invites
type LeaveError struct {
	Room RoomID
	// Err holds an *Error of every server that was asked.
	Err error
}

// Error names the room and what each server said.
func (e *LeaveError) Error() string { return fmt.Sprintf("mxfed: leave %s: %v", e.Room, e.Err) }

// Unwrap returns the cause.
func (e *LeaveError) Unwrap() error { return e.Err }

// maxLeaveServers bounds how many servers are asked to take one leave: most come from what other servers say.
const maxLeaveServers = 10

// Leave rejects an invite, retracts a knock or leaves a room through a server that is in it, and returns the leave as it
// was sent. Servers are tried in turn; when all have failed the error is a *LeaveError.
// https://spec.matrix.org/v1.19/server-server-api/#leaving-rooms-rejecting-invites
func (c *Client) Leave(ctx context.Context, req *LeaveRequest) (*Event, error) {
	content, err := memberContent(req.Content, "leave")
	if err != nil {
		return nil, err
	}
	if _, err := c.signerOf(req.User); err != nil {
		return nil, err
	}
	servers, errs := c.candidates(req.Via)
	for _, via := range servers[:min(len(servers), maxLeaveServers)] {
		event, err := c.leave(ctx, via, req, content)
		if err == nil {
			return event, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("mxfed: leave %s: %w", req.Room, errors.Join(append(errs, ctx.Err())...))
		}
	}
	if len(errs) == 0 {
		errs = append(errs, errNoCandidate())
	}
	return nil, &LeaveError{Room: req.Room, Err: errors.Join(errs...)}
}

// leave leaves through one server.
func (c *Client) leave(ctx context.Context, via ServerName, req *LeaveRequest, content value) (*Event, error) {
	event, t, err := c.memberEvent(ctx, via, newMemberDraft(req.Room, req.User, "leave"), content)
	if err != nil {
		return nil, err
	}
	unnamed := t.Version == "" && (req.Version == "1" || req.Version == "2")
	if req.Version != "" && t.Version != req.Version && !unnamed {
		return nil, c.malformed(via, "make_leave", fmt.Errorf("room version is %q, not %s", t.Version, req.Version))
	}
	return event, c.SendLeave(ctx, via, &SendLeaveRequest{Event: event})
}

// MakeLeave asks one server for the template of a user's leave. An answer that is not about this user and room is an
// error. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_leaveroomiduserid
func (c *Client) MakeLeave(ctx context.Context, to ServerName, req *MakeLeaveRequest) (*MakeLeaveResponse, error) {
	t, _, _, err := c.askTemplate(ctx, to, newMemberDraft(req.Room, req.User, "leave"))
	return (*MakeLeaveResponse)(t), err
}

// SendLeave sends a finished leave to one server, in version 1 if that server does not know version 2.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_leaveroomideventid
func (c *Client) SendLeave(ctx context.Context, to ServerName, req *SendLeaveRequest) error {
	q, err := c.memberCall(to, "v2", "leave", req.Event)
	if err != nil {
		return err
	}
	_, err = c.ask(ctx, q)
	if old, ok := err.(*Error); !ok || c.noV1 || !old.unimplemented() {
		return err
	}
	q.uri = federationURI("v1", "send_leave", string(req.Event.room), string(req.Event.id))
	answer, err := c.ask(ctx, q)
	if err != nil {
		return err
	}
	if _, err := unwrapV1(answer); err != nil {
		return c.malformed(to, "send_leave", err)
	}
	return nil
}
