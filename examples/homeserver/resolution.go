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
	in := make(map[mxfed.EventID][]bool) // which states have an entry, and later, which have an event in their auth chains
	for i, state := range states {
		for _, id := range state {
			if id == "" || r.chain[id] == nil {
				continue
			}
			if in[id] == nil {
				full[id], in[id] = true, make([]bool, len(states))
			}
			in[id][i] = true
		}
	}
	chains := make(map[mxfed.EventID][]bool)
	for id, of := range in {
		above := make(idSet)
		r.ancestors(r.chain[id], above)
		for a := range above {
			if common[a] {
				continue
			}
			if chains[a] == nil {
				chains[a] = make([]bool, len(states))
			}
			for i := range of {
				chains[a][i] = chains[a][i] || of[i]
			}
		}
	}
	between := r.between(in)
	for a, of := range chains {
		if slices.Contains(of, false) {
			full[a] = true
		}
	}
	maps.Copy(full, between)
	return full
}

// between is the conflicted state subgraph.
func (r *resolution) between(disputed map[mxfed.EventID][]bool) idSet {
	found, above := make(idSet), make(idSet)
	if r.version != "12" {
		return found
	}
	for id := range disputed {
		r.ancestors(r.chain[id], above)
	}
	for a := range above {
		chain := make(idSet)
		r.ancestors(r.chain[a], chain)
		for id := range chain {
			found[a] = found[a] || disputed[id] != nil
		}
	}
	maps.DeleteFunc(found, func(_ mxfed.EventID, is bool) bool { return !is })
	return found
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
	power := make(idSet)
	for id := range set {
		e := r.chain[id]
		key, _ := e.StateKey()
		expels := e.Type() == "m.room.member" && key != string(e.Sender()) && (e.Membership() == "leave" || e.Membership() == "ban")
		if !expels && (key != "" || e.Type() != "m.room.power_levels" && e.Type() != "m.room.join_rules") {
			continue
		}
		power[id] = true
		chain := make(idSet)
		r.ancestors(e, chain)
		for other := range chain {
			if set[other] {
				power[other] = true
			}
		}
	}
	return power
}

// byPower orders events so that each comes after what authorises it; among others, those of the mighty come first.
func (r *resolution) byPower(set idSet) (sorted []*mxfed.Event) {
	waiting := make(map[mxfed.EventID]idSet) // for which others each has to wait
	for id := range set {
		chain := make(idSet)
		r.ancestors(r.chain[id], chain)
		maps.DeleteFunc(chain, func(other mxfed.EventID, _ bool) bool { return !set[other] })
		waiting[id] = chain
	}
	levels := make(map[mxfed.EventID]int64)
	for id := range set {
		levels[id] = r.senderLevel(r.chain[id])
	}
	times := r.times(set)
	for len(waiting) > 0 {
		var next *mxfed.Event
		for id, others := range waiting {
			e := r.chain[id]
			if len(others) == 0 && (next == nil || cmp.Or(cmp.Compare(levels[next.ID()], levels[id]), times.compare(e, next)) < 0) {
				next = e
			}
		}
		if next == nil { // a cycle, which hashes exclude
			return sorted
		}
		sorted = append(sorted, next)
		delete(waiting, next.ID())
		for _, others := range waiting {
			delete(others, next.ID())
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
