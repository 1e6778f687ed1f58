package mxfed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
)

// This file proves an answer that describes a room, such as that to send_join: events are parsed and their signatures
// checked while they arrive, in windows; the authorisation of the whole graph follows at the end.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu

// JoinRequest joins User to Room through the first of Via that lets it. It is for a room that this server is not in; in one
// that it is in, Server.Build makes the join.
type JoinRequest struct {
	Room RoomID
	// User is a user of an own name.
	User UserID
	// Via are servers that may be in the room, in the order in which they are asked.
	Via []ServerName
	// Content holds displayname, reason and the like, or nothing; membership is set here.
	Content json.RawMessage
	// OmitMembers asks for an answer without most of the room's member events; see JoinResult.Servers.
	OmitMembers bool
	// Sink receives events in order of arrival, their signatures checked, each once per list (state: it is part of the
	// state before the join; else of the auth chain). It blocks reading. What only the whole answer shows comes in
	// JoinResult.Dropped, to be taken back. An error from Sink ends the join, and after the first call no other server is
	// tried. Nil keeps all events in JoinResult.
	Sink func(e *Event, state bool) error
	// Progress, if set, is called now and then with the events and bytes of the answer that have arrived so far.
	Progress func(via ServerName, events int, bytes int64)
}

// JoinResult is a join that the other server accepted, with an answer that was proven.
type JoinResult struct {
	// Event is the join with the signatures of both servers. Create is the room's create event.
	Event, Create *Event
	// Via is the server that accepted the join.
	Via ServerName
	// State is the state before the join, Auth the auth chain; nil if there was a Sink.
	State, Auth []*Event
	// Dropped events failed a check, by ID; those whose ID could not be read share the empty ID. They are not in State and
	// Auth, but some may be in the Sink.
	Dropped map[EventID]error
	// Servers had joined users before the join. It is set exactly if member events were left out of State: then the rest
	// of the state is to be fetched from one of them, see Client.FetchState.
	Servers []ServerName
}

// How much is gathered before its keys are fetched together and its signatures checked: text and, because what is read of
// an event has a size of its own, events. Two windows are in memory at a time: one is read while the other is checked.
const (
	windowBytes  = 4 << 20
	windowEvents = 16 << 10
)

// joinCheck proves one answer.
type joinCheck struct {
	keys  keySet
	rules *roomRules
	room  RoomID
	sink  func(e *Event, state bool) error // nil: events are kept in result

	texts   map[uint64]*joinNode // of texts that were judged
	seed    maphash.Seed
	shared  map[string]string     // types, memberships and the like, see share
	graph   map[EventID]*joinNode // events whose signatures are right
	state   []*joinNode           // entries of the list state, in order
	auth    []*joinNode           // those of the list auth_chain
	result  *JoinResult
	lost    map[StateKey]error // needed state entries that were dropped
	sunk    bool               // the sink was called
	version bool               // the room version is known, not assumed
}

// joinNode is one distinct event of the answer.
type joinNode struct {
	event      *Event // as far as authorisation needs it
	authorised bool   // the server of a restricted join's authoriser has signed
	err        error  // why it was dropped
	inState    bool
	inAuth     bool
	visited    visit
}

type visit byte

const (
	unvisited visit = iota
	visiting
	visited
)

// windowItem is one element of one list.
type windowItem struct {
	state      bool
	start, end int // of the text in the window
	event      *Event
	err        error
	hash       uint64
	node       *joinNode
	fresh      bool // the item that decides about its node
}

// window gathers elements until they are checked together.
type window struct {
	text  []byte
	items []windowItem
}

func (w *window) add(list string, text []byte) {
	start := len(w.text)
	if need := start + len(text); need > cap(w.text) { // grown by doubling it would cost twice its size
		size := windowBytes / 16
		if need > size {
			size = max(windowBytes+maxEventText, 2*start)
		}
		w.text = append(make([]byte, 0, size), w.text...)
	}
	w.text = append(w.text, text...)
	w.items = append(w.items, windowItem{state: list == listState, start: start, end: len(w.text)})
}

func newJoinCheck(v *verifier, rules *roomRules, known bool, req *JoinRequest) *joinCheck {
	return &joinCheck{keys: keySet{verifier: v}, rules: rules, version: known, room: req.Room, sink: req.Sink,
		lost: make(map[StateKey]error), shared: make(map[string]string), texts: make(map[uint64]*joinNode),
		seed: maphash.MakeSeed(), graph: make(map[EventID]*joinNode),
		result: &JoinResult{Dropped: make(map[EventID]error)}}
}

// read takes in the whole answer and returns its other members. While one window is checked the next one is read.
func (j *joinCheck) read(ctx context.Context, r *answerReader, v1 bool, progress func(events int, bytes int64)) (map[string]value, error) {
	filling, spare := new(window), new(window)
	var checked chan error // of the window being checked
	wait := func() error {
		if checked == nil {
			return nil
		}
		err := <-checked
		checked = nil
		return err
	}
	events, limit := 0, windowBytes
	if j.version { // checking starts soon, unless the first window has to show the room version
		limit = windowBytes / 8
	}
	flush := func() error {
		limit = windowBytes
		if err := wait(); err != nil {
			return err
		}
		full := filling
		filling, spare = spare, filling
		filling.text, filling.items = filling.text[:0], filling.items[:0]
		events += len(full.items)
		progress(events, r.total)
		done := make(chan error, 1)
		checked = done
		go func() { done <- j.check(ctx, full) }()
		return nil
	}
	rest, err := r.read(v1, func(list string, text []byte) error {
		filling.add(list, text)
		if len(filling.text) < limit && len(filling.items) < windowEvents {
			return nil
		}
		return flush()
	})
	if err == nil {
		err = flush()
	}
	return rest, errors.Join(err, wait())
}

// check judges one window and hands its events on in order of arrival.
func (j *joinCheck) check(ctx context.Context, w *window) error {
	if !j.version {
		j.findVersion(w)
	}
	items := w.items
	inParallel(len(items), func(p *eventParser, i int) {
		item := &items[i]
		if item.event, item.err = p.parse(j.rules, w.text[item.start:item.end]); item.err == nil {
			item.hash = maphash.String(j.seed, string(item.event.text))
		}
	})
	j.keys.fetch(ctx, j.link(items))
	inParallel(len(items), func(p *eventParser, i int) {
		item := &items[i]
		if item.fresh {
			v := j.keys.judge(p, item.event)
			item.node.event, item.node.authorised, item.node.err = v.event, v.authorised, v.err
		}
	})
	for i := range items {
		if err := ctx.Err(); err != nil {
			return err
		}
		if item := &items[i]; item.err != nil {
			j.loseText(item, w.text[item.start:item.end])
		} else if err := j.deliver(item); err != nil {
			return err
		}
	}
	return nil
}

// findVersion settles a room version that make_join did not name: versions 1 and 2 share a format, and the create event
// tells them apart. One that does not come in the first window is taken for one of version 1.
func (j *joinCheck) findVersion(w *window) {
	var p eventParser
	for _, item := range w.items {
		e, err := p.parse(j.rules, w.text[item.start:item.end])
		if err == nil && e.is(typeCreate, "") && createdVersion(e) == "2" {
			j.rules = RoomVersion("2").rules()
		}
	}
	j.version = true
}

// link gives every item its node and returns the events that are new, each distinct text once.
func (j *joinCheck) link(items []windowItem) (fresh []*Event) {
	for i := range items {
		item := &items[i]
		if item.err != nil {
			continue
		}
		if item.node = j.texts[item.hash]; item.node == nil {
			item.node, item.fresh = new(joinNode), true
			if item.event.room != j.room {
				item.node.err, item.fresh = refuse(ErrInvalidParam, "event %s belongs to another room", item.event.id), false
			} else {
				fresh = append(fresh, item.event)
			}
			j.texts[item.hash] = item.node
		}
	}
	return fresh
}

// deliver enters one item into the graph and hands its event on.
func (j *joinCheck) deliver(item *windowItem) error {
	node, e := item.node, item.event
	if node.err != nil {
		j.lose(item, node.err)
		return nil
	}
	if item.state && !e.isState {
		j.lose(item, refuse(ErrInvalidParam, "event %s is listed as state, but is none", e.id))
		return nil
	}
	if known := j.graph[e.id]; known == nil {
		j.graph[EventID(strings.Clone(string(e.id)))] = node // a given ID is a piece of the event's text, which need not stay
	} else if known != node {
		if known.event.hash != node.event.hash { // possible where IDs are given, not computed
			j.lose(item, refuse(ErrInvalidParam, "another event has the ID %s", e.id))
			return nil
		}
		node = known // the same event with other signatures
	}
	if item.state && node.inState || !item.state && node.inAuth {
		return nil
	}
	full := node.event
	if node.event.text == "" { // an earlier window has it, slim; the text is the same
		if full = e; !e.hashOK {
			full, _ = e.redact()
		}
	}
	return j.handOn(node, full, item.state)
}

// handOn gives an event to the sink, or keeps it for the result.
func (j *joinCheck) handOn(node *joinNode, e *Event, state bool) error {
	if state {
		node.inState = true
		j.state = append(j.state, node)
	} else {
		node.inAuth = true
		j.auth = append(j.auth, node)
	}
	if j.sink == nil {
		return nil
	}
	j.sunk = true
	if err := j.sink(e, state); err != nil {
		return &sinkError{err}
	}
	node.event = j.slim(node.event)
	return nil
}

// sinkError marks an error of the host's own sink: no other server is to blame.
type sinkError struct{ err error }

func (e *sinkError) Error() string { return "sink: " + e.err.Error() }
func (e *sinkError) Unwrap() error { return e.err }

// lose drops an item.
func (j *joinCheck) lose(item *windowItem, err error) {
	j.drop(item.event.id, err)
	if key := (StateKey{item.event.typ, item.event.stateKey}); item.state && slices.Contains(neededState[:], key) {
		j.lost[key] = err
	}
}

// neededState are the entries without which nobody can tell what the room allows.
var neededState = [...]StateKey{{typeCreate, ""}, {typePowerLevels, ""}, {typeJoinRules, ""}}

// loseText drops an item that is no event, whatever entry it claims to be.
func (j *joinCheck) loseText(item *windowItem, text []byte) {
	j.drop("", item.err)
	var r jsonReader
	canonical, err := r.canonical(text, numbersAsReceived)
	if err != nil || !item.state {
		return
	}
	typ, _ := value(canonical).get("type").str()
	key, ok := value(canonical).get("state_key").str()
	if k := (StateKey{typ, key}); ok && slices.Contains(neededState[:], k) {
		j.lost[k] = item.err
	}
}

// drop reports an event; those without a usable ID share one entry.
func (j *joinCheck) drop(id EventID, err error) {
	if _, ok := j.result.Dropped[id]; !ok {
		j.result.Dropped[id] = err
	}
}

// slim is what authorisation needs of e, in memory of its own, which it shares with other events as far as they agree.
// Events of which authorisation reads more stay as they are.
func (j *joinCheck) slim(e *Event) *Event {
	switch {
	case e.typ == typeCreate, e.typ == typePowerLevels, e.typ == typeJoinRules, e.typ == typeThirdPartyInvite, e.typ == typeRedaction, e.typ == typePolicy,
		e.typ == typeMember && (e.content.get("third_party_invite") != "" || e.authoriser != ""):
		return e
	}
	s := *e
	s.text, s.content = "", "{}"
	if membership := e.content.get("membership"); membership != "" {
		s.content = value(j.share(`{"membership":` + string(membership) + "}"))
	}
	s.id, s.room, s.typ, s.membership = EventID(strings.Clone(string(e.id))), j.room, j.share(e.typ), j.share(e.membership)
	s.stateKey, s.sender = strings.Clone(e.stateKey), UserID(j.share(string(e.sender)))
	if e.stateKey == string(e.sender) {
		s.sender = UserID(s.stateKey)
	}
	prevs := min(e.prevs, 2) // authorisation asks only whether the create event is the single one
	s.refs, s.prevs = append(make([]EventID, 0, prevs+len(e.refs)-e.prevs), e.refs[:prevs]...), prevs
	s.refs = append(s.refs, e.refs[e.prevs:]...)
	for i, id := range s.refs {
		if node := j.graph[id]; node != nil {
			s.refs[i] = node.event.id
		} else {
			s.refs[i] = EventID(strings.Clone(string(id)))
		}
	}
	return &s
}

// share returns a copy of text that all events of the answer have in common.
func (j *joinCheck) share(text string) string {
	shared, ok := j.shared[text]
	if !ok {
		shared = strings.Clone(text)
		j.shared[shared] = shared
	}
	return shared
}

// settle authorises the graph and judges it as a whole: from here on nothing more arrives.
func (j *joinCheck) settle() error {
	if j.rules.hashRoomID { // no event names its create event, so it is judged before all of them
		if create := j.graph[EventID("$"+j.room[1:])]; create != nil {
			j.visit(create)
		}
	}
	for _, node := range j.graph {
		j.visit(node)
	}
	for id, node := range j.graph {
		if node.err != nil {
			j.drop(id, node.err)
		} else {
			delete(j.result.Dropped, id) // what was dropped was another copy
		}
	}
	if err := j.checkCreate(); err != nil {
		return err
	}
	return j.checkState()
}

// visit authorises node after all events it names, without recursion: chains may be very long.
func (j *joinCheck) visit(root *joinNode) {
	stack := []*joinNode{root}
	for len(stack) > 0 {
		node := stack[len(stack)-1]
		if node.visited == unvisited {
			node.visited = visiting
			for _, id := range node.event.refs[node.event.prevs:] {
				next := j.graph[id]
				if next != nil && next.visited == visiting && node.err == nil {
					node.err = refuse(ErrInvalidParam, "event %s is in a cycle of auth events", node.event.id)
				}
				if next != nil && next.visited == unvisited {
					stack = append(stack, next)
				}
			}
			continue
		}
		stack = stack[:len(stack)-1]
		if node.visited == visiting {
			node.visited = visited
			if node.err == nil {
				node.err = j.authorise(node)
			}
		}
	}
}

// authorise checks one event against its own auth events, which have been judged.
func (j *joinCheck) authorise(node *joinNode) error {
	e := node.event
	auth := make([]*Event, 0, maxAuthEvents)
	for _, id := range e.refs[e.prevs:] {
		next := j.graph[id]
		switch {
		case next == nil:
			return refuse(ErrInvalidParam, "auth event %s of %s is missing or not genuine", id, e.id)
		case next.err != nil:
			return refuse(ErrForbidden, "auth event %s of %s was dropped", id, e.id)
		}
		auth = append(auth, next.event)
	}
	if err := checkAuthEvents(e, auth); err != nil {
		return err
	}
	return authorise(e, stateOf(auth, j.implicitCreate()), node.authorised)
}

// implicitCreate is the create event that the room ID names, in room versions whose events do not name it themselves.
func (j *joinCheck) implicitCreate() *Event {
	if !j.rules.hashRoomID {
		return nil
	}
	node := j.graph[EventID("$"+j.room[1:])]
	if node == nil || node.err != nil {
		return nil
	}
	return node.event
}

// checkCreate demands one create event, of the version and room that were asked for.
func (j *joinCheck) checkCreate() error {
	for _, node := range j.state {
		switch {
		case !node.event.is(typeCreate, ""):
		case node.err != nil:
			j.lost[StateKey{typeCreate, ""}] = node.err
		case j.result.Create != nil && j.result.Create.id != node.event.id:
			return errors.New("state has two create events")
		default:
			j.result.Create = node.event
		}
	}
	if j.result.Create == nil {
		if err := j.lost[StateKey{typeCreate, ""}]; err != nil {
			return fmt.Errorf("the room's %s cannot be done without: %w", typeCreate, err)
		}
		return errors.New("state has no create event")
	}
	if v := createdVersion(j.result.Create); v != j.rules.version {
		return fmt.Errorf("create event is of room version %q, not %s", v, j.rules.version)
	}
	for _, node := range j.graph {
		if node.event.is(typeCreate, "") && node.event.id != j.result.Create.id {
			return errors.New("auth_chain has another create event than state")
		}
	}
	return nil
}

// checkState demands that no two accepted entries of the state are for the same key, and that the needed ones were not lost.
func (j *joinCheck) checkState() error {
	keys := make(map[StateKey]EventID, len(j.state))
	for _, node := range j.state {
		key := StateKey{node.event.typ, node.event.stateKey}
		if node.err != nil {
			if slices.Contains(neededState[:], key) {
				j.lost[key] = node.err
			}
			continue
		}
		if _, twice := keys[key]; twice {
			return fmt.Errorf("state has two entries for %s %.64q", key.Type, key.Key)
		}
		keys[key] = node.event.id
	}
	for _, key := range neededState {
		if _, ok := keys[key]; !ok && j.lost[key] != nil {
			return fmt.Errorf("the room's %s cannot be done without: %w", key.Type, j.lost[key])
		}
	}
	return nil
}

// collect puts the lists together, for a host without a sink.
func (j *joinCheck) collect() {
	if j.sink == nil {
		j.result.State, j.result.Auth = accepted(j.state), accepted(j.auth)
	}
}

func accepted(nodes []*joinNode) (events []*Event) {
	for _, node := range nodes {
		if node.err == nil {
			events = append(events, node.event)
		}
	}
	return events
}

// entries looks up the accepted state.
func (j *joinCheck) entries() stateFunc {
	state := make(map[StateKey]*Event, len(j.state))
	for _, node := range j.state {
		if node.err == nil {
			state[StateKey{node.event.typ, node.event.stateKey}] = node.event
		}
	}
	return func(typ, key string) *Event { return state[StateKey{typ, key}] }
}

// checkEvent authorises the event that the answer is about, such as our join: by the auth events it names, and by the
// state before it. With members omitted the state cannot tell about members, so the auth events stand for them.
func (j *joinCheck) checkEvent(e *Event, omitted bool) error {
	own := &joinNode{event: e, authorised: true}
	if err := j.authorise(own); err != nil {
		return fmt.Errorf("the event is not allowed by its auth events: %w", err)
	}
	state := j.entries()
	if omitted {
		known, auth := state, make([]*Event, 0, maxAuthEvents)
		for _, id := range e.refs[e.prevs:] {
			auth = append(auth, j.graph[id].event)
		}
		named := stateOf(auth, nil)
		state = func(typ, key string) *Event {
			if entry := known(typ, key); entry != nil || typ != typeMember {
				return entry
			}
			return named(typ, key)
		}
	}
	if err := authorise(e, state, true); err != nil {
		return fmt.Errorf("the event is not allowed by the state: %w", err)
	}
	return nil
}

// missing lists the auth events of e that the answer lacks.
func (j *joinCheck) missing(e *Event) (missing []EventID) {
	for _, id := range e.refs[e.prevs:] {
		if j.graph[id] == nil {
			missing = append(missing, id)
		}
	}
	return missing
}
