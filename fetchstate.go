package mxfed

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/url"
)

// This file fetches the state of a room from servers that are in it, after a join whose answer left members out, and proves
// it like the answer to a join. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1stateroomid

// StateRequest asks for the state of a room before one of its events. A host that was stopped in between can make it again
// from what it has stored.
type StateRequest struct {
	// Event is the join, or any other verified event of the room but its create event: also one whose prev_events are not
	// known here, since its Room.Before is what is fetched.
	Event *Event
	// From is the own name that asks; empty is the server of Event's sender, or the first own name if that is another one's.
	From ServerName
	// Via are servers in the room, in the order in which they are asked: JoinResult.Via, then JoinResult.Servers. Own names
	// are passed over, and ten servers are asked at most.
	Via []ServerName
	// Sink receives events in order of arrival, their signatures checked, each ID once, whichever servers are tried. The one
	// exception is an event of which a first server had only a damaged copy, of the form that redaction leaves: a whole one
	// follows and replaces it. It blocks reading. What an event turns out to be comes in StateResult: nothing of what Sink
	// got may be relied on before. An error from Sink ends the call. Nil keeps all events in StateResult.
	Sink func(e *Event) error
	// Progress, if set, is called now and then with the events and bytes that have arrived so far from a server.
	Progress func(via ServerName, events int, bytes int64)
}

// StateResult is a proven state.
type StateResult struct {
	// Via is the server whose answer it is.
	Via ServerName
	// Create is the room's create event.
	Create *Event
	// StateIDs are the events that make up the state, one for each key, with and without a Sink.
	StateIDs []EventID
	// State holds these events, Auth their auth chain; nil if there was a Sink.
	State, Auth []*Event
	// Dropped events failed a check, or came from a server that was given up and are no part of the answer that held, by
	// ID; those whose ID could not be read share the empty ID. Those that are in the Sink are to be taken back.
	Dropped map[EventID]error
}

// maxStateServers bounds how many servers are asked for one state.
const maxStateServers = 10

// FetchState fetches the state of a room before an event and proves it as Join proves an answer: one create event, of the
// right room and version, genuine events that are allowed by their auth events, one for each state key, and a state that
// allows the event. Auth events that the answer lacks are fetched one by one or by auth chains, as far as limits allow.
//
// When it returns no error the state is whole: it is what a join without omitted members would have brought. What was
// dropped from it would have been dropped there too. Servers are tried in turn until the answer of one holds, whatever is
// wrong with the others; the error of a failed call holds an *Error of every server that was asked, and all that a Sink got
// is to be taken back then. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1stateroomid
func (c *Client) FetchState(ctx context.Context, req *StateRequest) (*StateResult, error) {
	e := req.Event
	if e == nil || e.typ == typeCreate {
		return nil, refuse(ErrInvalidParam, "there is no state before this event")
	}
	name := req.From
	if own := e.sender.Server(); name == "" && c.signer(own) != nil {
		name = own
	}
	from, err := c.asking(name)
	if err != nil {
		return nil, err
	}
	fetch := &stateFetch{Client: c, req: req, from: from, handed: make(map[EventID]handedOn)}
	servers, errs := c.candidates(req.Via)
	for _, via := range servers[:min(len(servers), maxStateServers)] {
		result, err := fetch.try(ctx, via)
		if err == nil {
			return result, nil
		}
		errs = append(errs, err)
		if fatal(ctx, err) {
			break
		}
	}
	if len(errs) == 0 {
		return nil, errNoCandidate()
	}
	return nil, fmt.Errorf("mxfed: state of %s: %w", e.room, errors.Join(append(errs, ctx.Err())...))
}

// fatal tells whether nothing more is to be tried after err: the host's sink failed, or ctx has ended.
func fatal(ctx context.Context, err error) bool {
	var own *sinkError
	return err != nil && (ctx.Err() != nil || errors.As(err, &own))
}

// stateFetch is one call of FetchState.
type stateFetch struct {
	*Client
	req    *StateRequest
	from   *Signer
	handed map[EventID]handedOn // what the sink got of answers that failed
}

// handedOn tells one copy of an event from another: by the reference hash, and whether its content was cut down.
type handedOn struct {
	hash [sha256.Size]byte
	cut  bool
}

// stateForm is an answer to state, chainForm one to event_auth.
var (
	stateForm = answerForm{lists: map[string]string{"pdus": listState, "auth_chain": listAuth}}
	chainForm = answerForm{lists: map[string]string{"auth_chain": listAuth}}
)

// try fetches the state from one server.
func (f *stateFetch) try(ctx context.Context, via ServerName) (*StateResult, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	e := f.req.Event
	answer, err := f.send(ctx, stateCall(f.from, via, "state", e.room, e.id))
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	check := f.newCheck()
	reader := &answerReader{in: answer.Body, max: f.maxAnswer, form: &stateForm}
	_, err = check.read(ctx, reader, false, func(events int, bytes int64) {
		if f.req.Progress != nil {
			f.req.Progress(via, events, bytes)
		}
	})
	if err == nil {
		err = f.complete(ctx, via, check)
	}
	if err == nil {
		f.compare(check)
		err = check.settle()
	}
	if err == nil {
		err = check.checkBefore(e)
	}
	if err != nil {
		f.remember(check)
		return nil, f.faulty(ctx, via, "state", reader, err)
	}
	return f.result(via, check), nil
}

// stateCall asks for the state before an event.
func stateCall(from *Signer, to ServerName, endpoint string, room RoomID, event EventID) *call {
	return &call{from: from, to: to, endpoint: endpoint, method: http.MethodGet,
		uri: federationURI("v1", endpoint, string(room)) + "?event_id=" + url.QueryEscape(string(event))}
}

// newCheck makes the check of one answer. Its sink passes on what the host has not got yet.
func (f *stateFetch) newCheck() *joinCheck {
	check := newJoinCheck(&f.verifier, f.req.Event.rules, true, &JoinRequest{Room: f.req.Event.room})
	if f.req.Sink == nil {
		return check
	}
	check.sink = func(e *Event, _ bool) error {
		if node := check.graph[e.id]; node.inState && node.inAuth { // the other list had it before
			return nil
		}
		if old, ok := f.handed[e.id]; ok && !old.replacedBy(e) {
			return nil
		}
		return f.req.Sink(e)
	}
	return check
}

// replacedBy tells whether e is the whole event of which h is a part.
func (h handedOn) replacedBy(e *Event) bool { return h.hash == e.hash && h.cut && !e.redacted }

// Limits of completing an answer that lacks auth events: of how many on whole chains are asked for, how many chains that may
// be, and how large one of them, in bytes.
const (
	manyGaps       = 8
	maxChains      = 4
	maxChainAnswer = 64 << 20
)

// complete fetches auth events that the answer lacks. One that cannot be had is no error: what it authorises is dropped.
func (f *stateFetch) complete(ctx context.Context, via ServerName, check *joinCheck) error {
	gaps := check.gaps(f.req.Event)
	for n := 0; n < maxChains && len(gaps) > manyGaps; n++ {
		if err := f.chain(ctx, via, check, gaps[0].by); fatal(ctx, err) {
			return err
		}
		before := len(gaps)
		if gaps = check.gaps(f.req.Event); len(gaps) >= before {
			break
		}
	}
	single := &completion{Client: f.Client, from: f.from, via: via, check: check, left: maxCompletions}
	for _, g := range gaps {
		if check.graph[g.missing] != nil {
			continue
		}
		if err := single.follow(ctx, []EventID{g.missing}); fatal(ctx, err) {
			return err
		}
	}
	return nil
}

// gap is an auth event that an answer lacks, and an event that names it.
type gap struct{ missing, by EventID }

// gaps lists, in order of arrival, what the answer lacks: for the event that it is about, and for its own events. What came
// and was not genuine is not asked for again.
func (j *joinCheck) gaps(about *Event) (gaps []gap) {
	listed := make(map[EventID]bool)
	list := func(e *Event) {
		for _, id := range j.missing(e) {
			if _, came := j.result.Dropped[id]; !came && !listed[id] {
				listed[id], gaps = true, append(gaps, gap{id, e.id})
			}
		}
	}
	list(about)
	for _, node := range j.state {
		list(node.event)
	}
	for _, node := range j.auth {
		list(node.event)
	}
	return gaps
}

// chain takes in the auth chain of one event.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1event_authroomideventid
func (f *stateFetch) chain(ctx context.Context, via ServerName, check *joinCheck, of EventID) error {
	answer, err := f.send(ctx, &call{from: f.from, to: via, endpoint: "event_auth", method: http.MethodGet,
		uri: federationURI("v1", "event_auth", string(f.req.Event.room), string(of))})
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	reader := &answerReader{in: answer.Body, max: min(f.maxAnswer, maxChainAnswer), form: &chainForm}
	_, err = check.read(ctx, reader, false, func(int, int64) {})
	return err
}

// compare gives up events of which the sink got another one with the same ID from an earlier server: possible where IDs are
// given, not computed.
func (f *stateFetch) compare(check *joinCheck) {
	for id, old := range f.handed {
		if node := check.graph[id]; node != nil && node.event.hash != old.hash {
			node.err = refuse(ErrInvalidParam, "another event has the ID %s", id)
		}
	}
}

// checkBefore checks the state as that before e.
func (j *joinCheck) checkBefore(e *Event) error {
	if node := j.graph[e.id]; node != nil && node.inState {
		return errors.New("state holds the event that it is to precede")
	}
	return j.checkEvent(e, false)
}

// remember keeps in mind what the sink got of an answer that failed.
func (f *stateFetch) remember(check *joinCheck) {
	if f.req.Sink == nil {
		return
	}
	for id, node := range check.graph {
		if old, ok := f.handed[id]; !ok || old.replacedBy(node.event) {
			f.handed[id] = handedOn{node.event.hash, node.event.redacted}
		}
	}
}

// result puts together what the check has found.
func (f *stateFetch) result(via ServerName, check *joinCheck) *StateResult {
	check.collect()
	found := check.result
	r := &StateResult{Via: via, Create: found.Create, State: found.State, Auth: found.Auth, Dropped: found.Dropped}
	for _, e := range accepted(check.state) {
		r.StateIDs = append(r.StateIDs, e.id)
	}
	for id := range f.handed {
		if check.graph[id] == nil {
			check.drop(id, fmt.Errorf("event %s is no part of the answer of %s", id, via))
		}
	}
	return r
}

// idsForm is an answer to state_ids.
var idsForm = answerForm{lists: map[string]string{"pdu_ids": listState, "auth_chain_ids": listAuth}}

// Limits of such an answer, in bytes and IDs: those of room versions 1 and 2 may be short, and each takes memory.
const (
	maxIDsAnswer = 64 << 20
	maxIDs       = 1 << 20
)

// StateIDs asks one server for the state before an event of a room, and for its auth chain, by ID: so a host can tell how
// much of it it has already. Nothing of the answer is proven but the form of the IDs; it is refused beyond 64 MiB or 1,048,576
// IDs. from is the own name that asks; empty is the first signer's.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1state_idsroomid
func (c *Client) StateIDs(ctx context.Context, from, to ServerName, room RoomID, event EventID) (state, auth []EventID, err error) {
	signer, err := c.asking(from)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	answer, err := c.send(ctx, stateCall(signer, to, "state_ids", room, event))
	if err != nil {
		return nil, nil, err
	}
	defer answer.Body.Close()
	var json jsonReader
	reader := &answerReader{in: answer.Body, max: min(c.maxAnswer, maxIDsAnswer), form: &idsForm}
	_, err = reader.read(false, func(list string, text []byte) error {
		canonical, err := json.canonical(text, numbersAsReceived)
		if err != nil {
			return err
		}
		id, ok := value(canonical).str()
		switch {
		case !ok || !EventID(id).valid():
			return fmt.Errorf("%.64q is no event ID", canonical)
		case len(state)+len(auth) == maxIDs:
			return errors.New("too many event IDs")
		case list == listState:
			state = append(state, EventID(id))
		default:
			auth = append(auth, EventID(id))
		}
		return nil
	})
	if err != nil {
		return nil, nil, c.faulty(ctx, to, "state_ids", reader, err)
	}
	return state, auth, nil
}
