package mxfed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
)

// MakeKnockRequest asks for the template of a user's knock. The room versions that the caller supports are those of its
// Config. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_knockroomiduserid
type MakeKnockRequest struct {
	Room RoomID
	User UserID
}

// MakeKnockResponse is a template: material for an event, never signed as it is. Its fields are those of
// MakeJoinResponse.
type MakeKnockResponse struct {
	Version RoomVersion
	Event   json.RawMessage
}

// MarshalJSON returns the answer as it goes over the wire.
func (r *MakeKnockResponse) MarshalJSON() ([]byte, error) { return []byte((*template)(r).wire()), nil }

// SendKnockRequest is a finished knock on its way.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1send_knockroomideventid
type SendKnockRequest struct {
	Event *Event
}

// SendKnockResponse is what the room shows to a user who knocks. StateErr says what was wrong with it, nil for full and
// verified PDUs; entries that are badly signed are left out.
type SendKnockResponse struct {
	State    []Stripped
	StateErr error
}

// NewMakeKnockHandler serves GET make_knock, in rooms of version 7 and later, from the facts of Config.Rooms: without it
// every room is unknown. https://spec.matrix.org/v1.19/server-server-api/#knocking-upon-a-room
func NewMakeKnockHandler(s *Server) http.Handler {
	return newTemplateEndpoint(s, "make_knock", func(ctx context.Context, in *incoming) (*template, error) {
		room, rules, _, err := s.memberRoom(ctx, in)
		if err != nil {
			return nil, err
		}
		if !in.query.Has("ver") {
			return nil, refuse(ErrMissingParam, "ver is missing")
		}
		if err := checkVersions(rules, in.query); err != nil {
			return nil, err
		}
		return s.template(newMemberDraft(in.room(), UserID(in.id()), "knock"), rules, room, in.To)
	})
}

// NewSendKnockHandler serves PUT send_knock. What the user is shown of the room comes from Config.Rooms: without it every
// room is unknown. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1send_knockroomideventid
func NewSendKnockHandler(s *Server, host MemberHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		m, room, err := s.memberSent(ctx, in, "knock", previewState...)
		if err != nil {
			return err
		}
		if err := host.Accept(ctx, m); err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, object(field{"knock_room_state", texts(room.entries(previewState))}))
		return nil
	}
	return &endpoint{server: s, name: "send_knock", method: http.MethodPut, versions: []string{"v1"}, params: 2, serve: serve}
}

// Answers tells whether the invite is to the user and room of an earlier knock. An invite does not mention the knock that
// it answers; a host may accept one that does on the user's behalf.
// https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func (inv *Invite) Answers(knock *Event) bool {
	return knock.is(typeMember, string(inv.User)) && knock.membership == "knock" && knock.room == inv.Event.room
}

// KnockRequest knocks on Room, for User, through the first of Via that lets it.
type KnockRequest struct {
	Room RoomID
	// User is a user of an own name.
	User UserID
	// Via are servers that may be in the room, in the order in which they are asked.
	Via []ServerName
	// Content holds displayname, reason and the like, or nothing; membership is set here.
	Content json.RawMessage
}

// KnockResult is a knock that another server took.
type KnockResult struct {
	// Event is the knock as it was sent. Via is the server that took it; Leave asks it first to retract the knock.
	Event *Event
	Via   ServerName
	SendKnockResponse
}

// Knock asks for an invite to a room: make_knock, an event of our own making, send_knock. Servers are tried in turn while
// another one may do better; the error of a failed knock holds an *Error of every server that was asked, and ClientError
// picks what to tell the user. https://spec.matrix.org/v1.19/server-server-api/#knocking-upon-a-room
func (c *Client) Knock(ctx context.Context, req *KnockRequest) (*KnockResult, error) {
	content, err := memberContent(req.Content, "knock")
	if err != nil {
		return nil, err
	}
	if _, err := c.signerOf(req.User); err != nil {
		return nil, err
	}
	servers, errs := c.candidates(req.Via)
	for _, via := range servers {
		result, err := c.knock(ctx, via, newMemberDraft(req.Room, req.User, "knock"), content)
		if err == nil {
			return result, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil || !nextMayHelp(err) {
			break
		}
	}
	if len(errs) == 0 {
		return nil, errNoCandidate()
	}
	return nil, fmt.Errorf("mxfed: knock on %s: %w", req.Room, errors.Join(append(errs, ctx.Err())...))
}

// knock knocks through one server.
func (c *Client) knock(ctx context.Context, via ServerName, d *draft, content value) (*KnockResult, error) {
	event, _, err := c.memberEvent(ctx, via, d, content)
	if err != nil {
		return nil, err
	}
	shown, err := c.SendKnock(ctx, via, &SendKnockRequest{Event: event})
	if err != nil {
		return nil, err
	}
	return &KnockResult{Event: event, Via: via, SendKnockResponse: *shown}, nil
}

// MakeKnock asks one server for the template of a user's knock, offering all versions of Config.Versions. An answer that
// is not about this user and room is an error.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_knockroomiduserid
func (c *Client) MakeKnock(ctx context.Context, to ServerName, req *MakeKnockRequest) (*MakeKnockResponse, error) {
	t, _, _, err := c.askTemplate(ctx, to, newMemberDraft(req.Room, req.User, "knock"))
	return (*MakeKnockResponse)(t), err
}

// SendKnock sends a finished knock to one server and returns what the room shows. An answer that shows nothing is none the
// less a knock that was taken. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1send_knockroomideventid
func (c *Client) SendKnock(ctx context.Context, to ServerName, req *SendKnockRequest) (*SendKnockResponse, error) {
	q, err := c.memberCall(to, "v1", "knock", req.Event)
	if err != nil {
		return nil, err
	}
	answer, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	shown := readPreview(req.Event.rules, req.Event.room, answer.get("knock_room_state"))
	shown.settle(c.events(ctx, shown.events()))
	return &SendKnockResponse{State: shown.entries, StateErr: shown.err}, nil
}
