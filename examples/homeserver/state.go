package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"example.org/mxfed"
)

// This file is about states. The state of a room has a history, told by positions of the stream; the state after an event is
// that of a position. It differs from it only for an event that knew nothing of others, as when many users join at the same
// time; where branches of the room come together, their states are resolved into one.

// snapshot is a state of a room: that at a position, but for some entries. One without an event is not set. Whatever has
// to be stored with an event is as long as its branch.
type snapshot struct {
	base    int64
	differs map[mxfed.StateKey]mxfed.EventID
}

// with is the state after an entry is set to id; empty: not set.
func (s snapshot) with(k mxfed.StateKey, id mxfed.EventID) snapshot {
	differs := make(map[mxfed.StateKey]mxfed.EventID, len(s.differs)+1)
	maps.Copy(differs, s.differs)
	differs[k] = id
	return snapshot{s.base, differs}
}

func keyOf(e *mxfed.Event) mxfed.StateKey {
	key, _ := e.StateKey()
	return mxfed.StateKey{Type: e.Type(), Key: key}
}

// encoded is how differs is stored: a list of type, state key and event.
func (s snapshot) encoded() string {
	if len(s.differs) == 0 {
		return ""
	}
	var entries [][3]string
	for k, id := range s.differs {
		entries = append(entries, [3]string{k.Type, k.Key, string(id)})
	}
	return string(asJSON(entries))
}

func (t *tx) decode(base int64, differs string) snapshot {
	s := snapshot{base: base}
	if differs == "" {
		return s
	}
	var entries [][3]string
	if err := json.Unmarshal([]byte(differs), &entries); err != nil {
		t.fail(err)
	}
	s.differs = make(map[mxfed.StateKey]mxfed.EventID, len(entries))
	for _, e := range entries {
		s.differs[mxfed.StateKey{Type: e[0], Key: e[1]}] = mxfed.EventID(e[2])
	}
	return s
}

// entryRow is a row of state.
type entryRow struct {
	Type     string
	StateKey string `db:"state_key"`
	Event    mxfed.EventID
	Since    int64
	Until    int64
}

func (r entryRow) key() mxfed.StateKey { return mxfed.StateKey{Type: r.Type, Key: r.StateKey} }

// read looks keys up in states: the events by state and key, empty for what is not set.
func (t *tx) read(r *room, keys []mxfed.StateKey, states ...snapshot) [][]mxfed.EventID {
	said, index := make([][]mxfed.EventID, len(states)), make(map[mxfed.StateKey]int)
	first, last := states[0].base, states[0].base
	for i, s := range states {
		said[i] = make([]mxfed.EventID, len(keys))
		first, last = min(first, s.base), max(last, s.base)
	}
	for i, k := range keys {
		index[k] = i
	}
	storable := slices.DeleteFunc(slices.Clone(keys), func(k mxfed.StateKey) bool { return strings.ContainsRune(k.Type+k.Key, 0) })
	for keys := range slices.Chunk(storable, batch) {
		args := []any{r.ID, last, first}
		for _, k := range keys {
			args = append(args, k.Type, k.Key)
		}
		rows := list[entryRow](t, `SELECT type, state_key, event, since, until FROM state WHERE room = ? AND since <= ? AND until > ?
			AND (type, state_key) IN (VALUES (?, ?)`+strings.Repeat(", (?, ?)", len(keys)-1)+`)`, args...)
		for _, row := range rows {
			for i, s := range states {
				if row.Since <= s.base && s.base < row.Until {
					said[i][index[row.key()]] = row.Event
				}
			}
		}
	}
	for i, s := range states {
		for k, id := range s.differs {
			if j, asked := index[k]; asked {
				said[i][j] = id
			}
		}
	}
	return said
}

// stateEvents reads entries of a state.
func (t *tx) stateEvents(r *room, s snapshot, keys ...mxfed.StateKey) []*mxfed.Event {
	return t.events(slices.DeleteFunc(t.read(r, keys, s)[0], func(id mxfed.EventID) bool { return id == "" })...)
}

// current reads entries of a room's current state.
func (t *tx) current(r *room, keys ...mxfed.StateKey) []*mxfed.Event {
	return t.stateEvents(r, snapshot{base: r.Now}, keys...)
}

// stateAfter is the state after all of events, resolved; ok is false if that of one of them is not known.
func (t *tx) stateAfter(r *room, events []mxfed.EventID) (s snapshot, ok bool) {
	events = slices.Compact(slices.Sorted(slices.Values(events)))
	if slices.Equal(t.ends(r), events) {
		return snapshot{base: r.Now}, true
	}
	states := t.statesAfter(r, events)
	if len(states) < len(events) || len(events) == 0 {
		return snapshot{}, false
	}
	asked := fmt.Sprint(events)
	if s, ok = t.resolved[asked]; !ok {
		s = t.resolve(r, states)
		if t.resolved == nil {
			t.resolved = make(map[string]snapshot)
		}
		t.resolved[asked] = s
	}
	return s, true
}

// ends are the room's forward extremities, sorted.
func (t *tx) ends(r *room) []mxfed.EventID {
	return slices.Sorted(slices.Values(list[mxfed.EventID](t, `SELECT id FROM events WHERE room = ? AND latest = 1`, r.ID)))
}

// statesAfter are the states after events, as far as they have their place in the room.
func (t *tx) statesAfter(r *room, events []mxfed.EventID) (states []snapshot) {
	for events := range slices.Chunk(events, batch) {
		rows := list[struct {
			Base    int64
			Differs string
		}](t, `SELECT base, differs FROM events WHERE room = ? AND position > 0 AND id IN (?)`, r.ID, events)
		for _, row := range rows {
			states = append(states, t.decode(row.Base, row.Differs))
		}
	}
	return states
}

// resolve makes one state of several, by the algorithm of the room version.
// https://spec.matrix.org/v1.19/server-server-api/#room-state-resolution
func (t *tx) resolve(r *room, states []snapshot) snapshot {
	if len(states) == 1 {
		return states[0]
	}
	keys := t.changeable(r, states)
	n, then, now := len(states), snapshot{base: states[0].base}, snapshot{base: r.Now}
	said := t.read(r, keys, append(slices.Clone(states), then, now)...)
	var disputed []int // keys, by index, about which the states do not agree
	for k := range keys {
		if slices.ContainsFunc(said[1:n], func(state []mxfed.EventID) bool { return state[k] != said[0][k] }) {
			disputed = append(disputed, k)
		}
	}
	if len(disputed) == 0 {
		return states[0]
	}
	outcome := t.settle(r, states[0], keys, said[:n], disputed)
	then.differs, now.differs = differences(keys, said[n], outcome), differences(keys, said[n+1], outcome)
	if len(then.differs) < len(now.differs) {
		return then
	}
	return now
}

// changeable names the entries that may be different in states, and now.
func (t *tx) changeable(r *room, states []snapshot) []mxfed.StateKey {
	first := r.Now
	keys := make(map[mxfed.StateKey]bool)
	for _, s := range states {
		first = min(first, s.base)
		for k := range s.differs {
			keys[k] = true
		}
	}
	for _, row := range list[entryRow](t, `SELECT type, state_key FROM state WHERE room = ? AND since > ?
		UNION SELECT type, state_key FROM state WHERE room = ? AND until > ? AND until < ?`, r.ID, first, r.ID, first, int64(forever)) {
		keys[row.key()] = true
	}
	return slices.Collect(maps.Keys(keys))
}

// differences is what has to be changed in a state to make it another one.
func differences(keys []mxfed.StateKey, from, to []mxfed.EventID) map[mxfed.StateKey]mxfed.EventID {
	changes := make(map[mxfed.StateKey]mxfed.EventID)
	for i, k := range keys {
		if from[i] != to[i] {
			changes[k] = to[i]
		}
	}
	return changes
}

// settle resolves what states do not agree about, and returns what to say about each of keys.
func (t *tx) settle(r *room, first snapshot, keys []mxfed.StateKey, said [][]mxfed.EventID, disputed []int) []mxfed.EventID {
	states, named := make([][]mxfed.EventID, len(said)), make(map[mxfed.EventID]bool)
	known := make(map[mxfed.StateKey]bool)
	for _, k := range disputed {
		known[keys[k]] = true
		for i := range said {
			states[i] = append(states[i], said[i][k])
			named[said[i][k]] = true
		}
	}
	delete(named, "")
	all := &resolution{version: r.Version, chain: make(map[mxfed.EventID]*mxfed.Event), rejected: make(idSet)}
	t.addAuthChain(all, slices.Collect(maps.Keys(named)))
	undisputed := make(map[mxfed.StateKey]bool) // of what decides about these events
	for _, e := range all.chain {
		for _, k := range e.Query().State {
			undisputed[k] = true
		}
	}
	maps.DeleteFunc(undisputed, func(k mxfed.StateKey, _ bool) bool { return known[k] })
	agreed := t.stateEvents(r, first, slices.Collect(maps.Keys(undisputed))...)
	names := make([]mxfed.EventID, len(agreed))
	for i, e := range agreed {
		names[i] = e.ID()
	}
	t.addAuthChain(all, names)
	settled, err := all.run(agreed, states)
	if err != nil {
		t.fail(fmt.Errorf("resolve state of %s: %w", r.ID, err))
	}
	outcome := slices.Clone(said[0])
	for _, k := range disputed {
		outcome[k] = settled[keys[k]].ID()
	}
	return outcome
}

// addAuthChain reads events and all that authorises them.
func (t *tx) addAuthChain(of *resolution, names []mxfed.EventID) {
	for names := range slices.Chunk(names, batch) {
		for _, e := range t.stored(`e.id IN (WITH RECURSIVE chain (id) AS (SELECT id FROM events WHERE id IN (?)
			UNION SELECT a.value FROM chain c JOIN events e ON e.id = c.id CROSS JOIN `+t.db.authOf()+`) SELECT id FROM chain)`, names) {
			of.chain[e.ID()] = e.Event
			of.rejected[e.ID()] = e.status == statusRejected
		}
	}
}

// authOf is the table a (value) of an event's auth events, which is what the databases name differently.
func (db *database) authOf() string {
	if db.postgres() {
		return `json_array_elements_text(e.auth::json) AS a (value)`
	}
	return `json_each(e.auth) AS a`
}
