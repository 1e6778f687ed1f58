package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"maps"
	"math"
	"slices"
	"strconv"

	"example.org/mxfed"
	"example.org/mxfed/gmslbridge"
)

// This file resolves states by the algorithms of room versions 2 and 12, for hundreds of states at once: many joins at the
// same time leave a room with as many ends. Room version 1 has its own algorithm, which is gomatrixserverlib's affair.
// https://spec.matrix.org/v1.19/rooms/v2/#state-resolution https://spec.matrix.org/v1.19/rooms/v12/#state-resolution

// resolution is one run of the algorithm.
type resolution struct {
	version  mxfed.RoomVersion
	chain    map[mxfed.EventID]*mxfed.Event // all events concerned, with all that authorises them
	rejected map[mxfed.EventID]bool
	create   *mxfed.Event
	state    map[mxfed.StateKey]*mxfed.Event // the outcome so far
}

// idSet is a set of events.
type idSet map[mxfed.EventID]bool

// run resolves states, of which each says something else about the disputed entries, "" for not set, and the same about
// others, of which agreed are those that matter. It returns the outcome, agreed entries included.
func (r *resolution) run(agreed []*mxfed.Event, states [][]mxfed.EventID) (map[mxfed.StateKey]*mxfed.Event, error) {
	unconflicted := make(map[mxfed.StateKey]*mxfed.Event)
	for _, e := range agreed {
		unconflicted[keyOf(e)] = e
	}
	if r.version == "1" {
		return r.runElsewhere(agreed, states)
	}
	if r.create = unconflicted[mxfed.StateKey{Type: "m.room.create"}]; r.create == nil {
		return nil, errors.New("the states do not agree about the create event")
	}
	r.state = make(map[mxfed.StateKey]*mxfed.Event)
	if r.version != "12" {
		maps.Copy(r.state, unconflicted)
	}
	full := r.conflicted(agreed, states)
	power := r.powerEvents(full)
	r.apply(r.byPower(power))
	maps.DeleteFunc(full, func(id mxfed.EventID, _ bool) bool { return power[id] })
	r.apply(r.byMainline(full))
	maps.Copy(r.state, unconflicted)
	return r.state, nil
}

// runElsewhere has gomatrixserverlib run the algorithm of room version 1.
func (r *resolution) runElsewhere(agreed []*mxfed.Event, states [][]mxfed.EventID) (map[mxfed.StateKey]*mxfed.Event, error) {
	sets := make([][]*mxfed.Event, len(states))
	for i, state := range states {
		sets[i] = slices.Clone(agreed)
		for _, id := range state {
			if e := r.chain[id]; e != nil {
				sets[i] = append(sets[i], e)
			}
		}
	}
	events, err := gmslbridge.ResolveState(r.version, sets, slices.Collect(maps.Values(r.chain)), func(id mxfed.EventID) bool { return r.rejected[id] })
	outcome := make(map[mxfed.StateKey]*mxfed.Event)
	for _, e := range events {
		outcome[keyOf(e)] = e
	}
	return outcome, err
}

// conflicted is the full conflicted set: disputed entries, what is not in the auth chains of all states, and from version
// 12 on what lies between disputed entries in the graph of auth events.
func (r *resolution) conflicted(agreed []*mxfed.Event, states [][]mxfed.EventID) idSet {
	full, common := make(idSet), make(idSet)
	for _, e := range agreed {
		r.ancestors(e, common)
	}
	chains := make(map[mxfed.EventID]int) // in those of how many states an event is
	for _, state := range states {
		above := make(idSet)
		for _, id := range state {
			if e := r.chain[id]; e != nil {
				full[id] = true
				r.ancestors(e, above)
			}
		}
		for a := range above {
			chains[a]++
		}
	}
	between := r.between(full)
	for a, n := range chains {
		if n < len(states) && !common[a] {
			full[a] = true
		}
	}
	maps.Copy(full, between)
	return full
}

// between is the conflicted state subgraph: what authorises a disputed event and is authorised by another one.
func (r *resolution) between(disputed idSet) idSet {
	found, above, below := make(idSet), make(idSet), make(idSet)
	if r.version != "12" {
		return found
	}
	for id := range disputed {
		r.ancestors(r.chain[id], above)
	}
	for _, id := range r.inOrder(above) { // what authorises an event comes before it
		below[id] = slices.ContainsFunc(r.chain[id].Auth(), func(a mxfed.EventID) bool { return disputed[a] || below[a] })
		if below[id] {
			found[id] = true
		}
	}
	return found
}

// inOrder lists events, and what authorises them, so that each comes after what authorises it.
func (r *resolution) inOrder(set idSet) (order []mxfed.EventID) {
	done := make(idSet)
	var visit func(id mxfed.EventID)
	visit = func(id mxfed.EventID) {
		if e := r.chain[id]; e != nil && !done[id] {
			done[id] = true
			for _, a := range e.Auth() {
				visit(a)
			}
			order = append(order, id)
		}
	}
	for id := range set {
		visit(id)
	}
	return order
}

// ancestors adds the auth chain of an event, without the event, to seen.
func (r *resolution) ancestors(e *mxfed.Event, seen idSet) {
	for next := e.Auth(); len(next) > 0; {
		id := next[len(next)-1]
		next = next[:len(next)-1]
		if of := r.chain[id]; of != nil && !seen[id] {
			seen[id] = true
			next = append(next, of.Auth()...)
		}
	}
}

// powerEvents are those that decide about the power of users, with all of set that authorises them.
func (r *resolution) powerEvents(set idSet) idSet {
	power, chain := make(idSet), make(idSet)
	for id := range set {
		e := r.chain[id]
		key, _ := e.StateKey()
		expels := e.Type() == "m.room.member" && key != string(e.Sender()) && (e.Membership() == "leave" || e.Membership() == "ban")
		if !expels && (key != "" || e.Type() != "m.room.power_levels" && e.Type() != "m.room.join_rules") {
			continue
		}
		power[id] = true
		r.ancestors(e, chain)
	}
	for id := range chain {
		if set[id] {
			power[id] = true
		}
	}
	return power
}

// byPower orders events so that each comes after what authorises it; among others, those of the mighty come first.
func (r *resolution) byPower(set idSet) (sorted []*mxfed.Event) {
	levels, times := make(map[mxfed.EventID]int64), r.times(set)
	for id := range set {
		levels[id] = r.senderLevel(r.chain[id])
	}
	order := r.inOrder(set)
	waiting := make(map[mxfed.EventID]int) // for how many others each event has to wait
	allows := make(map[mxfed.EventID][]mxfed.EventID)
	var ready []*mxfed.Event // of set, the next one last
	free := func(id mxfed.EventID) {
		e := r.chain[id]
		at, _ := slices.BinarySearchFunc(ready, e, func(a, b *mxfed.Event) int {
			return cmp.Or(cmp.Compare(levels[a.ID()], levels[b.ID()]), times.compare(b, a))
		})
		ready = slices.Insert(ready, at, e)
	}
	var pass func(id mxfed.EventID)
	pass = func(id mxfed.EventID) { // those of others than set take no turn
		if set[id] {
			free(id)
			return
		}
		for _, next := range allows[id] {
			if waiting[next]--; waiting[next] == 0 {
				pass(next)
			}
		}
	}
	for _, id := range order {
		for _, a := range r.chain[id].Auth() {
			if r.chain[a] != nil {
				waiting[id]++
				allows[a] = append(allows[a], id)
			}
		}
	}
	for _, id := range slices.DeleteFunc(order, func(id mxfed.EventID) bool { return waiting[id] > 0 }) {
		pass(id)
	}
	for len(ready) > 0 {
		next := ready[len(ready)-1]
		ready = ready[:len(ready)-1]
		sorted = append(sorted, next)
		for _, id := range allows[next.ID()] {
			if waiting[id]--; waiting[id] == 0 {
				pass(id)
			}
		}
	}
	return sorted
}

// times tells when events say that they were sent.
type times map[mxfed.EventID]int64

func (r *resolution) times(set idSet) times {
	at := make(times)
	for id := range set {
		var claim struct {
			At int64 `json:"origin_server_ts"`
		}
		json.Unmarshal(r.chain[id].JSON(), &claim) // room versions demand an integer
		at[id] = claim.At
	}
	return at
}

func (at times) compare(a, b *mxfed.Event) int {
	return cmp.Or(cmp.Compare(at[a.ID()], at[b.ID()]), cmp.Compare(a.ID(), b.ID()))
}

// senderLevel is the power of an event's sender by the event's own auth events.
func (r *resolution) senderLevel(e *mxfed.Event) int64 {
	var create struct {
		Creator mxfed.UserID
		More    []mxfed.UserID `json:"additional_creators"`
	}
	json.Unmarshal(r.create.Content(), &create) // the create event was accepted
	creator := r.create.Sender() == e.Sender() || create.Creator == e.Sender()
	if r.version == "12" && (r.create.Sender() == e.Sender() || slices.Contains(create.More, e.Sender())) {
		return math.MaxInt64
	}
	levels := r.levels(e)
	if levels == nil && creator {
		return 100
	}
	var content struct {
		Users   map[mxfed.UserID]json.RawMessage
		Default json.RawMessage `json:"users_default"`
	}
	json.Unmarshal(levels.Content(), &content) // the event was accepted
	if level, ok := content.Users[e.Sender()]; ok {
		return levelOf(level)
	}
	return levelOf(content.Default)
}

// levelOf reads a number, which old room versions let be a string.
func levelOf(text json.RawMessage) int64 {
	var level json.Number
	var quoted string
	if json.Unmarshal(text, &level) != nil && json.Unmarshal(text, &quoted) == nil {
		level = json.Number(quoted)
	}
	n, err := strconv.ParseInt(string(level), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// levels is the power levels event among an event's auth events.
func (r *resolution) levels(e *mxfed.Event) *mxfed.Event {
	for _, id := range e.Auth() {
		if a := r.chain[id]; a != nil && keyOf(a) == (mxfed.StateKey{Type: "m.room.power_levels"}) {
			return a
		}
	}
	return nil
}

// byMainline orders events by how old the power levels are that they were sent under.
func (r *resolution) byMainline(set idSet) []*mxfed.Event {
	mainline := make(map[mxfed.EventID]int)
	for e := r.state[mxfed.StateKey{Type: "m.room.power_levels"}]; e != nil; e = r.levels(e) {
		mainline[e.ID()] = len(mainline)
	}
	age := make(map[mxfed.EventID]int)
	events := make([]*mxfed.Event, 0, len(set))
	for id := range set {
		e := r.chain[id]
		events, age[id] = append(events, e), math.MaxInt
		for ; e != nil; e = r.levels(e) {
			if place, ok := mainline[e.ID()]; ok {
				age[id] = place
				break
			}
		}
	}
	times := r.times(set)
	slices.SortFunc(events, func(a, b *mxfed.Event) int { return cmp.Or(cmp.Compare(age[b.ID()], age[a.ID()]), times.compare(a, b)) })
	return events
}

// apply sets those events, one after the other, that the outcome so far allows. Where it says nothing, an event's own auth
// events count.
func (r *resolution) apply(events []*mxfed.Event) {
	for _, e := range events {
		if r.rejected[e.ID()] {
			continue
		}
		found := make(map[mxfed.StateKey]*mxfed.Event)
		found[keyOf(r.create)] = r.create
		var auth []*mxfed.Event
		for _, id := range e.Auth() {
			if a := r.chain[id]; a != nil && !r.rejected[id] {
				auth, found[keyOf(a)] = append(auth, a), a
			}
		}
		for _, k := range e.Query().State {
			if now := r.state[k]; now != nil {
				found[k] = now
			}
		}
		state := slices.Collect(maps.Values(found))
		if e.Check(&mxfed.Room{Version: r.version, Events: auth, Before: state, State: state}) == nil {
			r.state[keyOf(e)] = e
		}
	}
}
