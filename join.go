package mxfed

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
)

// Join joins a user to a room through another server: make_join, an event of our own making, send_join, and a check of
// the whole answer. Servers are tried in turn while another one may do better; the error of a failed join holds an *Error
// of every server that was asked, and ClientError picks what to tell the user.
// https://spec.matrix.org/v1.19/server-server-api/#joining-rooms
func (c *Client) Join(ctx context.Context, req *JoinRequest) (*JoinResult, error) {
	content, err := memberContent(req.Content, "join")
	if err != nil {
		return nil, err
	}
	if _, err := c.signerOf(req.User); err != nil {
		return nil, err
	}
	servers, errs := c.candidates(req.Via)
	for _, via := range servers {
		try := joinTry{Client: c, req: req, via: via, content: content}
		result, err := try.join(ctx)
		if err == nil {
			return result, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil || try.sunk || !nextMayHelp(err) {
			break
		}
	}
	if len(errs) == 0 {
		return nil, errNoCandidate()
	}
	return nil, fmt.Errorf("mxfed: join %s: %w", req.Room, errors.Join(append(errs, ctx.Err())...))
}

// nextMayHelp tells whether another server may let a join through that failed with err.
func nextMayHelp(err error) bool {
	var e *Error
	if !errors.As(err, &e) || e.Server == "" {
		return false
	}
	switch e.Code {
	case ErrUnableToAuthoriseJoin, ErrUnableToGrantJoin, ErrNotFound, ErrLimitExceeded:
		return true
	case ErrIncompatibleRoomVersion, ErrUnsupportedRoomVersion:
		return false // the room's version is the same everywhere
	}
	switch e.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusTooManyRequests:
		return true
	}
	return e.Status < 400 || e.Status >= 500
}

// joinTry is the attempt to join through one server.
type joinTry struct {
	*Client
	req     *JoinRequest
	via     ServerName
	content value
	sunk    bool // the sink was called: the host has events of this server
}

func (t *joinTry) join(ctx context.Context) (*JoinResult, error) {
	join, template, err := t.memberEvent(ctx, t.via, newMemberDraft(t.req.Room, t.req.User, "join"), t.content)
	if err != nil {
		return nil, err
	}
	known := template.Version != ""
	result, err := t.prove(ctx, join, known, t.req.OmitMembers)
	var lacking *lackingError
	// If the answer left out more than members, all of it is asked for.
	if errors.As(err, &lacking) && t.req.OmitMembers && !t.sunk && ctx.Err() == nil {
		result, err = t.prove(ctx, join, known, false)
	}
	return result, err
}

// prove sends the join and proves the answer.
func (t *joinTry) prove(ctx context.Context, join *Event, known, omitMembers bool) (*JoinResult, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	body, v1, err := t.sendJoin(ctx, t.via, &SendJoinRequest{Event: join, OmitMembers: omitMembers})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	check := newJoinCheck(&t.verifier, join.rules, known, t.req)
	reader := &answerReader{in: body, max: t.maxAnswer}
	rest, err := check.read(ctx, reader, v1, t.progress)
	if err == nil {
		err = check.settle()
	}
	if err == nil {
		err = t.accept(ctx, check, join, rest, omitMembers)
	}
	t.sunk = t.sunk || check.sunk
	if err != nil {
		return nil, t.faulty(ctx, t.via, "send_join", reader, err)
	}
	return check.result, nil
}

// faulty is the error for an answer that could not be read or did not pass; it names the server, unless the host's own sink
// failed.
func (c *Client) faulty(ctx context.Context, via ServerName, endpoint string, reader *answerReader, err error) error {
	var own *sinkError
	switch {
	case errors.As(err, &own):
		return own
	case ctx.Err() != nil || reader.broken != nil:
		return brokenOff(via, endpoint, errors.Join(ctx.Err(), err))
	case unverified(err):
		return &Error{Code: ErrUnknown, Server: via, Endpoint: endpoint, Message: "answer could not be verified", Err: err}
	}
	return c.malformed(via, endpoint, err)
}

// unverified tells whether err says that keys could not be fetched: nothing is known against the answer then.
func unverified(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Server == "" && e.Status == http.StatusBadGateway
}

func (t *joinTry) progress(events int, bytes int64) {
	if t.req.Progress != nil {
		t.req.Progress(t.via, events, bytes)
	}
}

// accept checks what the answer says about the join itself and completes the result.
func (t *joinTry) accept(ctx context.Context, check *joinCheck, join *Event, rest map[string]value, omitMembers bool) (err error) {
	result := check.result
	result.Via = t.via
	if result.Servers, err = omittedServers(rest, omitMembers); err != nil {
		return err
	}
	if join.rules != check.rules { // make_join named no version: the create event did
		if t.offers(check.rules.version) == nil {
			return incompatible(check.rules.version)
		}
		retagged := *join
		retagged.rules = check.rules
		join = &retagged
	}
	if result.Event, err = t.accepted(ctx, join, rest["event"]); err != nil {
		return err
	}
	if err := t.completeAuth(ctx, check, join); err != nil {
		return err
	}
	if err := check.checkEvent(join, len(result.Servers) > 0); err != nil {
		return err
	}
	result.Event = result.Event.withPolicySignature(check.entries()(typePolicy, ""), rest["event"])
	check.collect()
	return nil
}

// accepted returns the join with the other server's signature, if that server sent the event back. A restricted join is
// void without the signature of the server that authorised it.
func (t *joinTry) accepted(ctx context.Context, join *Event, event value) (*Event, error) {
	demanded := join.authoriserID() != ""
	if event == "" && !demanded {
		return join, nil
	}
	if event == "" {
		return nil, errors.New("event is missing, which a restricted join needs")
	}
	signed, err := t.countersigned(ctx, t.via, join, event)
	var unsigned *signatureError
	if errors.As(err, &unsigned) && !demanded {
		return join, nil
	}
	return signed, err
}

// lackingError says that the answer is without auth events of the join.
type lackingError struct{ err error }

func (e *lackingError) Error() string { return "auth events of the join are missing: " + e.err.Error() }
func (e *lackingError) Unwrap() error { return e.err }

// completeAuth fetches auth events of the join that the answer lacks: with members omitted, some servers leave out the
// member events that the join itself names.
func (t *joinTry) completeAuth(ctx context.Context, check *joinCheck, join *Event) error {
	c := &completion{Client: t.Client, from: t.signer(t.req.User.Server()), via: t.via, check: check, left: maxCompletions}
	if err := c.follow(ctx, check.missing(join)); err != nil {
		return err
	}
	for _, id := range join.refs[join.prevs:] {
		check.visit(check.graph[id])
	}
	return check.checkCreate() // what was fetched may hold another one
}

// maxCompletions bounds the events that are fetched one by one to complete an answer.
const maxCompletions = 64

// completion fetches, from the server that gave an answer, events that the answer lacks.
type completion struct {
	*Client
	from  *Signer
	via   ServerName
	check *joinCheck
	left  int // how many more may be fetched
}

// follow fetches missing events and those that they name in turn, as far as the answer lacks them. Its error is a
// *lackingError, or that of the host's sink.
func (c *completion) follow(ctx context.Context, missing []EventID) error {
	for ; len(missing) > 0; c.left-- {
		if c.left == 0 {
			return &lackingError{errors.New("too many")}
		}
		node, err := c.event(ctx, missing[0])
		if err != nil {
			c.left--
			return &lackingError{err}
		}
		e := node.event
		c.check.graph[e.id] = node
		if err := c.check.handOn(node, e, false); err != nil {
			return err
		}
		missing = slices.DeleteFunc(append(missing, c.check.missing(e)...), func(id EventID) bool { return c.check.graph[id] != nil })
	}
	return nil
}

// event fetches one event of the room and checks its signatures.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1eventeventid
func (c *completion) event(ctx context.Context, id EventID) (*joinNode, error) {
	answer, err := c.ask(ctx, &call{from: c.from, to: c.via, endpoint: "event", method: http.MethodGet, uri: federationURI("v1", "event", string(id))})
	if err != nil {
		return nil, err
	}
	for pdu := range answer.get("pdus").elements() {
		var p eventParser
		e, err := p.parse(c.check.rules, []byte(pdu))
		if err != nil {
			return nil, err
		}
		if e.id != id || e.room != c.check.room {
			return nil, fmt.Errorf("%s was answered with another event", id)
		}
		c.check.keys.fetch(ctx, []*Event{e})
		v := c.check.keys.judge(&p, e)
		return &joinNode{event: v.event, authorised: v.authorised}, v.err
	}
	return nil, fmt.Errorf("%s was not answered", id)
}
