package mxfed

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"net/http"
	"time"
)

// SendJoinRequest is a finished join on its way. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
type SendJoinRequest struct {
	Event *Event
	// OmitMembers tells the other server that it may leave member events out of the answer.
	OmitMembers bool
}

// SendJoinResponse is the room before the join, in PDUs as they are stored.
type SendJoinResponse struct {
	// Event is the join with the resident server's signature. A host leaves it nil for the event as accepted; for a join
	// that was accepted before it may return the stored copy.
	Event *Event
	// State is the state before the join, Auth the auth chains of the join and of State: joiners refuse an answer in which
	// they are not whole. The create event of a room whose events do not name it may be left out of Auth. A sequence opens
	// nothing before it is ranged over, which happens once at most; an error ends it and the answer. See PDUs.
	State, Auth iter.Seq2[[]byte, error]
	// Servers have joined users. It is set exactly if member events were left out of State, as Membership.OmitMembers
	// allows. A host that does so keeps in Auth the member events that authorise the join and the rest of State. In a room
	// with neither name nor canonical alias it also keeps in State the members by whom clients name it: the first five
	// that are joined or invited, without the joiner, or that have left if there are no others.
	// https://spec.matrix.org/v1.19/client-server-api/#calculating-the-display-name-for-a-room
	Servers []ServerName
}

// JoinHost stores joins of other servers' users in its rooms.
type JoinHost interface {
	// AcceptJoin stores the join atomically, once per event ID, passes it on to the room's servers and returns the room as
	// it was before. In the transaction that stores it the host reads the facts of m.Ask again and calls m.Check. The
	// event is verified, was allowed by the facts that Rooms answered, and carries this server's signature. A join that is
	// stored already gets the same answer again, or ErrNotFound if the state before it is not known. An Error or ErrorCode
	// decides the answer, other errors are 500.
	AcceptJoin(ctx context.Context, m *Membership) (*SendJoinResponse, error)
}

// JoinHostFunc is a JoinHost that is one function.
type JoinHostFunc func(ctx context.Context, m *Membership) (*SendJoinResponse, error)

// AcceptJoin calls f.
func (f JoinHostFunc) AcceptJoin(ctx context.Context, m *Membership) (*SendJoinResponse, error) {
	return f(ctx, m)
}

// NewSendJoinHandler serves PUT send_join of version 2 and, unless Config.NoV1, version 1, which the specification has
// dropped. It needs Config.Rooms: without it every room is unknown.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
func NewSendJoinHandler(s *Server, host JoinHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		m, room, err := s.memberSent(ctx, in, "join")
		if err != nil {
			return err
		}
		m.OmitMembers = in.version == "v2" && in.query.Get("omit_members") == "true"
		answer, err := host.AcceptJoin(ctx, m)
		if err != nil {
			return err
		}
		if answer == nil {
			return errors.New("JoinHost gave neither an answer nor an error")
		}
		if len(answer.Servers) > 0 && !m.OmitMembers {
			return errors.New("JoinHost left members out of an answer that was to have them")
		}
		told := *answer // the host's own may be kept by it
		if told.Event == nil {
			told.Event = m.Event
		}
		if create := room.state(typeCreate, ""); create != nil && m.Event.rules.hashRoomID {
			told.Auth = withCreate(create, told.Auth)
		}
		return streamAnswer(ctx, w, func(b *bufio.Writer) error { return told.encode(ctx, b, in.To, in.version) })
	}
	return &endpoint{server: s, name: "send_join", method: http.MethodPut, versions: s.sendVersions(), params: 2, serve: serve}
}

// withCreate puts the create event before an auth chain, whether or not the host has. Events of these room versions depend
// on it without naming it among their auth_events. https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func withCreate(create *Event, chain iter.Seq2[[]byte, error]) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		text := create.JSON()
		if !yield(text, nil) || chain == nil {
			return
		}
		for pdu, err := range chain {
			if err == nil && bytes.Equal(pdu, text) {
				continue
			}
			if !yield(pdu, err) {
				return
			}
		}
	}
}

// streamAnswer writes an answer of any size. An error before anything was sent is returned; afterwards the answer is left
// unfinished, so that the caller cannot take it for whole.
func streamAnswer(ctx context.Context, w http.ResponseWriter, encode func(b *bufio.Writer) error) error {
	w.Header().Set("Content-Type", "application/json")
	sent := &answerWriter{ctx: ctx, w: w}
	defer sent.finish()
	b := bufio.NewWriterSize(sent, 64<<10)
	err := encode(b)
	if err == nil {
		err = b.Flush()
	}
	if err == nil || sent.n == 0 {
		return err
	}
	return &unfinishedError{err}
}

// answerWriter counts what was sent. Once it has begun, its writes fail when ctx ends: a caller who does not read cannot
// hold the handler any longer.
type answerWriter struct {
	ctx   context.Context
	w     http.ResponseWriter
	n     int
	stop  func() bool // nil until the first write
	ended chan struct{}
}

func (a *answerWriter) Write(b []byte) (int, error) {
	if a.stop == nil {
		a.ended = make(chan struct{})
		a.stop = context.AfterFunc(a.ctx, func() {
			defer close(a.ended)
			http.NewResponseController(a.w).SetWriteDeadline(time.Unix(1, 0)) // a w that has no deadlines ends with its connection
		})
	}
	n, err := a.w.Write(b)
	a.n += n
	return n, err
}

// finish waits until nothing touches w any more.
func (a *answerWriter) finish() {
	if a.stop != nil && !a.stop() {
		<-a.ended
	}
}

// encode writes the answer of either version.
func (r *SendJoinResponse) encode(ctx context.Context, b *bufio.Writer, origin ServerName, version string) error {
	if version == "v1" {
		b.WriteString("[200,")
	}
	b.WriteString(`{"auth_chain":[`)
	if err := writeEvents(ctx, b, r.Auth); err != nil {
		return err
	}
	b.WriteString(`],"event":`)
	b.WriteString(string(r.Event.text))
	if len(r.Servers) > 0 {
		b.WriteString(`,"members_omitted":true`)
	}
	b.WriteString(`,"origin":`)
	b.WriteString(string(quoted(origin)))
	if len(r.Servers) > 0 {
		names := make([]value, len(r.Servers))
		for i, n := range r.Servers {
			names[i] = quoted(n)
		}
		b.WriteString(`,"servers_in_room":`)
		b.WriteString(string(array(names...)))
	}
	b.WriteString(`,"state":[`)
	if err := writeEvents(ctx, b, r.State); err != nil {
		return err
	}
	b.WriteString("]}")
	if version == "v1" {
		b.WriteString("]")
	}
	return nil
}

func writeEvents(ctx context.Context, b *bufio.Writer, events iter.Seq2[[]byte, error]) error {
	if events == nil {
		return nil
	}
	first := true
	for pdu, err := range events {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if !first {
			b.WriteByte(',')
		}
		first = false
		if _, err := b.Write(pdu); err != nil {
			return err
		}
	}
	return nil
}

// SendJoin sends a finished join to one server and returns its answer as it is: unverified, and whole in memory. Join is
// the way to join a room; SendJoin serves tests and tools. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
func (c *Client) SendJoin(ctx context.Context, to ServerName, req *SendJoinRequest) (*SendJoinResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	body, v1, err := c.sendJoin(ctx, to, req)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var state, auth [][]byte
	reader := answerReader{in: body, max: c.maxAnswer}
	rest, err := reader.read(v1, func(list string, text []byte) error {
		if list == listState {
			state = append(state, bytes.Clone(text))
		} else {
			auth = append(auth, bytes.Clone(text))
		}
		return nil
	})
	switch {
	case reader.broken != nil:
		return nil, brokenOff(to, "send_join", err)
	case err != nil:
		return nil, c.malformed(to, "send_join", err)
	}
	answer := &SendJoinResponse{State: sequence(state), Auth: sequence(auth)}
	if event := rest["event"]; event != "" {
		if answer.Event, err = ParseEvent(req.Event.Version(), []byte(event)); err != nil {
			return nil, c.malformed(to, "send_join", err)
		}
	}
	if answer.Servers, err = omittedServers(rest, req.OmitMembers); err != nil {
		return nil, c.malformed(to, "send_join", err)
	}
	return answer, nil
}

// PDUs yields events as State and Auth of a SendJoinResponse want them, for hosts that have them in memory.
func PDUs(events []*Event) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, e := range events {
			if !yield(e.JSON(), nil) {
				return
			}
		}
	}
}

func sequence(pdus [][]byte) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, pdu := range pdus {
			if !yield(pdu, nil) {
				return
			}
		}
	}
}

// sendJoin sends a join in version 2 or, if the other server does not know it, in version 1, and returns the body of the
// answer, which the caller closes.
func (c *Client) sendJoin(ctx context.Context, to ServerName, req *SendJoinRequest) (body io.ReadCloser, v1 bool, err error) {
	q, err := c.memberCall(to, "v2", "join", req.Event)
	if err != nil {
		return nil, false, err
	}
	if req.OmitMembers {
		q.uri += "?omit_members=true"
	}
	answer, err := c.send(ctx, q)
	if old, ok := err.(*Error); ok && !c.noV1 && old.unimplemented() {
		q.uri, v1 = federationURI("v1", "send_join", string(req.Event.room), string(req.Event.id)), true
		answer, err = c.send(ctx, q)
	}
	if err != nil {
		return nil, false, err
	}
	return answer.Body, v1, nil
}

// omittedServers reads who is in the room, which an answer that leaves members out must say.
func omittedServers(rest map[string]value, asked bool) ([]ServerName, error) {
	switch rest["members_omitted"] {
	case "", "null", "false":
		return nil, nil
	case "true":
	default:
		return nil, errors.New("members_omitted is no boolean")
	}
	if !asked {
		return nil, errors.New("members were omitted without being asked for")
	}
	var servers []ServerName
	for entry := range rest["servers_in_room"].elements() {
		name, ok := entry.str()
		if !ok {
			return nil, errors.New("servers_in_room holds something else than strings")
		}
		if ServerName(name).valid() { // old rooms have members of servers that nobody can reach
			servers = append(servers, ServerName(name))
		}
	}
	if len(servers) == 0 {
		return nil, errors.New("members were omitted without servers_in_room")
	}
	return servers, nil
}
