package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"example.org/mxfed"
	"example.org/mxfed/gmslbridge"
)

// This file keeps the states of rooms. A state is a group: the entries that it sets, on top of another group. Groups form a
// tree; the one at depth d says all that changed since depth d without its lowest bit, so that no state, however long its
// history, is spread over more than log2(d) groups, and each entry is copied log2(d) times at most.

// state is a group and what is different from it. A changed entry without an event is not set.
type state struct {
	group   int64
	changes map[mxfed.StateKey]mxfed.EventID
}

// with is the state after an event, which sets an entry if it is state.
func (s state) with(e *mxfed.Event) state {
	key, ok := e.StateKey()
	if !ok {
		return s
	}
	changes := maps.Clone(s.changes)
	if changes == nil {
		changes = make(map[mxfed.StateKey]mxfed.EventID)
	}
	changes[mxfed.StateKey{Type: e.Type(), Key: key}] = e.ID()
	return state{s.group, changes}
}

// group is a row of state_groups.
type group struct{ id, depth, skip int64 }

// path lists the groups that make up a state, the first one to be asked first.
func (t *tx) path(id int64) ([]group, error) {
	paths, err := t.paths([]int64{id})
	return paths[0], err
}

// paths lists those of several states.
func (t *tx) paths(of []int64) ([][]group, error) {
	paths, place := make([][]group, len(of)), make(map[int64]int)
	for i, id := range of {
		place[id] = i
	}
	for of := range slices.Chunk(of, batch) {
		var args []any
		err := t.each(func(scan func(...any) error) error {
			var head int64
			var g group
			err := scan(&head, &g.id, &g.depth, &g.skip)
			paths[place[head]] = append(paths[place[head]], g)
			return err
		}, `WITH RECURSIVE path (head, id, depth, skip) AS (
			SELECT id, id, depth, skip FROM state_groups WHERE id IN (`+in(&args, of)+`)
			UNION ALL SELECT p.head, g.id, g.depth, g.skip FROM path p JOIN state_groups g ON g.id = p.skip)
			SELECT head, id, depth, skip FROM path ORDER BY depth DESC`, args...)
		if err != nil {
			return paths, err
		}
	}
	return paths, nil
}

// newGroup makes an empty group.
func (t *tx) newGroup(room mxfed.RoomID, depth, skip int64) (id int64, err error) {
	_, err = t.row(`INSERT INTO state_groups (room, depth, skip) VALUES ($1, $2, $3) RETURNING id`, []any{room, depth, skip}, &id)
	return id, err
}

// keep makes a group of a state, unless it is one already.
func (t *tx) keep(room mxfed.RoomID, s state) (int64, error) {
	if len(s.changes) == 0 && s.group != 0 {
		return s.group, nil
	}
	path, err := t.path(s.group)
	if err != nil {
		return 0, err
	}
	var depth int64
	if len(path) > 0 {
		depth = path[0].depth + 1
	}
	bottom := slices.IndexFunc(path, func(g group) bool { return g.depth <= depth&(depth-1) })
	if bottom < 0 {
		bottom = len(path)
	}
	var skip int64
	if bottom < len(path) {
		skip = path[bottom].id
	}
	id, err := t.newGroup(room, depth, skip)
	if err != nil {
		return 0, err
	}
	for rows := range slices.Chunk(slices.Collect(maps.Keys(s.changes)), rowBatch) {
		var args []any
		var values [][]any
		for _, k := range rows {
			values = append(values, []any{id, k.Type, k.Key, s.changes[k]})
		}
		if err := t.exec(`INSERT INTO state_entries VALUES `+tuples(&args, values...), args...); err != nil {
			return 0, err
		}
	}
	for _, g := range path[:bottom] {
		err := t.exec(`INSERT INTO state_entries SELECT CAST($1 AS BIGINT), type, state_key, event FROM state_entries WHERE state_group = $2
			ON CONFLICT DO NOTHING`, id, g.id)
		if err != nil {
			return 0, err
		}
	}
	return id, nil
}

// entries looks entries of a state up.
func (t *tx) entries(s state, keys []mxfed.StateKey) (map[mxfed.StateKey]mxfed.EventID, error) {
	path, err := t.path(s.group)
	if err != nil {
		return nil, err
	}
	found, err := t.lookUp(path, keys)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if id, ok := s.changes[k]; ok {
			found[k] = id
		}
	}
	maps.DeleteFunc(found, func(_ mxfed.StateKey, id mxfed.EventID) bool { return id == "" })
	return found, nil
}

// lookUp finds the first of a path's groups that has each key. Entries may be found to be unset.
func (t *tx) lookUp(path []group, keys []mxfed.StateKey) (map[mxfed.StateKey]mxfed.EventID, error) {
	found, err := t.lookUpAll([][]group{path}, keys)
	return found[0], err
}

// lookUpAll is lookUp for several paths.
func (t *tx) lookUpAll(paths [][]group, keys []mxfed.StateKey) ([]map[mxfed.StateKey]mxfed.EventID, error) {
	said := make(map[int64]map[mxfed.StateKey]mxfed.EventID) // by group
	for _, path := range paths {
		for _, g := range path {
			said[g.id] = nil
		}
	}
	found := make([]map[mxfed.StateKey]mxfed.EventID, len(paths))
	keys = slices.DeleteFunc(slices.Clone(keys), func(k mxfed.StateKey) bool { return strings.ContainsRune(k.Type+k.Key, 0) }) // see storable
	for groups := range slices.Chunk(slices.Collect(maps.Keys(said)), batch) {
		for keys := range slices.Chunk(keys, batch) {
			var args []any
			err := t.each(func(scan func(...any) error) error {
				var k mxfed.StateKey
				var id mxfed.EventID
				var g int64
				err := scan(&k.Type, &k.Key, &id, &g)
				if said[g] == nil {
					said[g] = make(map[mxfed.StateKey]mxfed.EventID)
				}
				said[g][k] = id
				return err
			}, `SELECT type, state_key, event, state_group FROM state_entries WHERE state_group IN (`+in(&args, groups)+`)
				AND (type, state_key) IN (VALUES `+tuples(&args, pairs(keys)...)+`)`, args...)
			if err != nil {
				return found, err
			}
		}
	}
	for i, path := range paths {
		found[i] = make(map[mxfed.StateKey]mxfed.EventID)
		for _, g := range slices.Backward(path) {
			maps.Copy(found[i], said[g.id])
		}
	}
	return found, nil
}

func pairs(keys []mxfed.StateKey) [][]any {
	rows := make([][]any, len(keys))
	for i, k := range keys {
		rows[i] = []any{k.Type, k.Key}
	}
	return rows
}

// entry is one entry of a state.
type entry struct {
	key   mxfed.StateKey
	event mxfed.EventID
	auth  []mxfed.EventID
	json  string
}

// page reads entries of a group's state in the order of their keys, behind after, batch at most; none: that was all. Member
// events can be left out.
func (t *tx) page(group int64, after mxfed.StateKey, members bool) (page []entry, last mxfed.StateKey, more bool, err error) {
	path, err := t.path(group)
	if err != nil || len(path) == 0 {
		return nil, after, false, err
	}
	args := []any{after.Type, after.Key}
	var union []string
	for _, g := range path {
		args = append(args, g.id, g.depth)
		union = append(union, fmt.Sprintf(`SELECT * FROM (SELECT type, state_key, event, CAST($%d AS BIGINT) AS depth FROM state_entries
			WHERE state_group = $%d AND (type, state_key) > ($1, $2)%s ORDER BY type, state_key LIMIT %d) AS g%d`,
			len(args), len(args)-1, map[bool]string{false: ` AND type <> 'm.room.member'`}[members], batch, g.id))
	}
	query := `SELECT s.type, s.state_key, s.event, COALESCE(e.auth, '[]'), COALESCE(e.json, '') FROM (` + strings.Join(union, ` UNION ALL `) +
		fmt.Sprintf(` ORDER BY type, state_key, depth DESC LIMIT %d) AS s LEFT JOIN events e ON e.id = s.event ORDER BY s.type, s.state_key, s.depth DESC`, batch)
	rows := 0
	err = t.each(func(scan func(...any) error) error {
		var e entry
		var auth string
		if err := scan(&e.key.Type, &e.key.Key, &e.event, &auth, &e.json); err != nil {
			return err
		}
		rows++
		if rows > 1 && e.key == last { // overridden
			return nil
		}
		last = e.key
		if e.event == "" {
			return nil
		}
		err := json.Unmarshal([]byte(auth), &e.auth)
		page = append(page, e)
		return err
	}, query, args...)
	return page, last, rows == batch, err
}

// stateAfter is the state after all of events, resolved; ok is false if that of one of them is not known.
func (t *tx) stateAfter(r *room, events []mxfed.EventID) (s state, ok bool, err error) {
	events = slices.Compact(slices.Sorted(slices.Values(events)))
	var heads []int64
	for events := range slices.Chunk(events, batch) {
		args := []any{r.id}
		found, err := list[int64](t, `SELECT state_after FROM events WHERE room = $1 AND state_after IS NOT NULL AND id IN (`+in(&args, events)+`)`, args...)
		if err != nil || len(found) < len(events) {
			return state{}, false, err
		}
		heads = append(heads, found...)
	}
	if len(heads) == 0 {
		return state{}, false, nil
	}
	slices.Sort(heads)
	s, err = t.resolve(r, slices.Compact(heads))
	return s, err == nil, err
}

// fork is a set of states that differ. Only keys that some group names above their common ancestor can.
type fork struct {
	keys   []mxfed.StateKey
	values [][]mxfed.EventID // what each state says about each key
}

// fork reads where states differ.
func (t *tx) fork(heads []int64) (*fork, error) {
	paths, err := t.paths(heads)
	if err != nil {
		return nil, err
	}
	count := make(map[int64]int)
	for _, path := range paths {
		for _, g := range path {
			count[g.id]++
		}
	}
	var shared []group // the end that all paths have in common
	if i := slices.IndexFunc(paths[0], func(g group) bool { return count[g.id] == len(heads) }); i >= 0 {
		shared = paths[0][i:]
	}
	for _, g := range shared {
		delete(count, g.id)
	}
	f := &fork{}
	own, err := t.ownEntries(f, slices.Collect(maps.Keys(count)))
	if err != nil {
		return nil, err
	}
	base, err := t.lookUp(shared, f.keys)
	if err != nil {
		return nil, err
	}
	common := make([]mxfed.EventID, len(f.keys))
	for i, k := range f.keys {
		common[i] = base[k]
	}
	for _, path := range paths {
		values := slices.Clone(common)
		for _, g := range slices.Backward(path) {
			for _, e := range own[g.id] {
				values[e.key] = e.event
			}
		}
		f.values = append(f.values, values)
	}
	return f, nil
}

// ownEntry is an entry by the index of its key.
type ownEntry struct {
	key   int
	event mxfed.EventID
}

// ownEntries reads what groups say themselves, and lists the keys.
func (t *tx) ownEntries(f *fork, groups []int64) (map[int64][]ownEntry, error) {
	own, index := make(map[int64][]ownEntry), make(map[mxfed.StateKey]int)
	for groups := range slices.Chunk(groups, batch) {
		var args []any
		err := t.each(func(scan func(...any) error) error {
			var g int64
			var k mxfed.StateKey
			var id mxfed.EventID
			if err := scan(&g, &k.Type, &k.Key, &id); err != nil {
				return err
			}
			if _, known := index[k]; !known {
				index[k] = len(f.keys)
				f.keys = append(f.keys, k)
			}
			own[g] = append(own[g], ownEntry{index[k], id})
			return nil
		}, `SELECT state_group, type, state_key, event FROM state_entries WHERE state_group IN (`+in(&args, groups)+`)`, args...)
		if err != nil {
			return nil, err
		}
	}
	return own, nil
}

// conflicts are the keys, by index, about which the first n states do not agree.
func (f *fork) conflicts(n int) (keys []int) {
	for k := range f.keys {
		if slices.ContainsFunc(f.values[:n], func(state []mxfed.EventID) bool { return state[k] != f.values[0][k] }) {
			keys = append(keys, k)
		}
	}
	return keys
}

func compareKeys(a, b mxfed.StateKey) int {
	return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Key, b.Key))
}

// resolve makes one state of several, by the algorithm of the room version.
// https://spec.matrix.org/v1.19/server-server-api/#room-state-resolution
func (t *tx) resolve(r *room, heads []int64) (state, error) {
	if len(heads) == 1 {
		return state{group: heads[0]}, nil
	}
	asked := fmt.Sprint(heads)
	if known, ok := t.resolved[asked]; ok {
		return known, nil
	}
	n, all := len(heads), slices.Clone(heads)
	if r.state != 0 && !slices.Contains(heads, r.state) { // the outcome will hardly differ from it
		all = append(all, r.state)
	}
	f, err := t.fork(all)
	if err != nil {
		return state{}, err
	}
	conflicts := f.conflicts(n)
	if len(conflicts) == 0 {
		return state{group: heads[0]}, nil
	}
	outcome, err := t.settle(r.version, f, n, heads[0], conflicts)
	if err != nil {
		return state{}, fmt.Errorf("resolve state of %s: %w", r.id, err)
	}
	best := state{}
	for i, head := range all { // of what can be built on, the one with the fewest changes
		changes := make(map[mxfed.StateKey]mxfed.EventID)
		for k, key := range f.keys {
			if f.values[i][k] != outcome[k] {
				changes[key] = outcome[k]
			}
		}
		if i == 0 || len(changes) < len(best.changes) {
			best = state{head, changes}
		}
	}
	if t.resolved == nil {
		t.resolved = make(map[string]state)
	}
	t.resolved[asked] = best
	return best, nil
}

// settle resolves conflicts between the first n states and returns what to say about each of f.keys.
func (t *tx) settle(version mxfed.RoomVersion, f *fork, n int, any int64, conflicts []int) ([]mxfed.EventID, error) {
	d, err := t.dispute(version, f, n, any, conflicts)
	if err != nil {
		return nil, err
	}
	settled, err := t.settleDispute(version, d)
	if err != nil {
		return nil, err
	}
	outcome := slices.Clone(f.values[0])
	for _, k := range conflicts {
		outcome[k] = settled[f.keys[k]].ID()
	}
	return outcome, nil
}

// dispute is what states do not agree about, each a list of events with "" for what it does not set; of what they agree
// about, those events that decide about these; and all that authorises any of them.
type dispute struct {
	states [][]mxfed.EventID
	agreed []*mxfed.Event
	chain  map[mxfed.EventID]*mxfed.Event
}

// dispute reads it. any is one of the states.
func (t *tx) dispute(version mxfed.RoomVersion, f *fork, n int, any int64, conflicts []int) (*dispute, error) {
	d := &dispute{states: make([][]mxfed.EventID, n)}
	disputed := make(map[mxfed.StateKey]bool)
	named := make(map[mxfed.EventID]bool)
	for _, k := range conflicts {
		disputed[f.keys[k]] = true
		for i := range n {
			named[f.values[i][k]] = true
			d.states[i] = append(d.states[i], f.values[i][k])
		}
	}
	delete(named, "")
	var err error
	if d.chain, err = t.withAuthChain(version, slices.Collect(maps.Keys(named)), nil); err != nil {
		return nil, err
	}
	entries, err := t.entries(state{group: any}, slices.DeleteFunc(deciding(d.chain), func(k mxfed.StateKey) bool { return disputed[k] }))
	if err != nil {
		return nil, err
	}
	if d.chain, err = t.withAuthChain(version, slices.Collect(maps.Values(entries)), d.chain); err != nil {
		return nil, err
	}
	for _, id := range entries {
		if e := d.chain[id]; e != nil {
			d.agreed = append(d.agreed, e)
		}
	}
	return d, nil
}

// settleDispute runs the algorithm of the room version.
func (t *tx) settleDispute(version mxfed.RoomVersion, d *dispute) (map[mxfed.StateKey]*mxfed.Event, error) {
	if version == "1" {
		return d.settleElsewhere(version)
	}
	rejected := make(map[mxfed.EventID]bool)
	for names := range slices.Chunk(slices.Collect(maps.Keys(d.chain)), batch) {
		var args []any
		found, err := list[mxfed.EventID](t, fmt.Sprintf(`SELECT id FROM events WHERE status = %d AND id IN (`, statusRejected)+in(&args, names)+`)`, args...)
		if err != nil {
			return nil, err
		}
		for _, id := range found {
			rejected[id] = true
		}
	}
	create := slices.IndexFunc(d.agreed, func(e *mxfed.Event) bool { return keyOf(e) == mxfed.StateKey{Type: "m.room.create"} })
	if create < 0 {
		return nil, errors.New("the states do not agree about the create event")
	}
	r := &resolution{version: version, chain: d.chain, rejected: rejected, create: d.agreed[create]}
	return r.run(d.agreed, d.states), nil
}

// settleElsewhere has gomatrixserverlib run it.
func (d *dispute) settleElsewhere(version mxfed.RoomVersion) (outcome map[mxfed.StateKey]*mxfed.Event, err error) {
	defer func() {
		if p := recover(); p != nil { // what other servers have sent must not end this one
			err = fmt.Errorf("state resolution: %v", p)
		}
	}()
	sets := make([][]*mxfed.Event, len(d.states))
	for i, state := range d.states {
		sets[i] = slices.Clone(d.agreed)
		for _, id := range state {
			if e := d.chain[id]; e != nil {
				sets[i] = append(sets[i], e)
			}
		}
	}
	events, err := gmslbridge.ResolveState(version, sets, slices.Collect(maps.Values(d.chain)), nil)
	outcome = make(map[mxfed.StateKey]*mxfed.Event)
	for _, e := range events {
		outcome[keyOf(e)] = e
	}
	return outcome, err
}

// withAuthChain reads events and all that authorises them, beyond what chain has already.
func (t *tx) withAuthChain(version mxfed.RoomVersion, names []mxfed.EventID, chain map[mxfed.EventID]*mxfed.Event) (map[mxfed.EventID]*mxfed.Event, error) {
	if chain == nil {
		chain = make(map[mxfed.EventID]*mxfed.Event)
	}
	names = slices.DeleteFunc(names, func(id mxfed.EventID) bool { return chain[id] != nil })
	for len(names) > 0 {
		events, err := t.events(version, names...)
		if err != nil {
			return nil, err
		}
		next := make(map[mxfed.EventID]bool)
		for _, e := range events {
			chain[e.ID()] = e
		}
		for _, e := range events {
			for _, id := range e.Auth() {
				if chain[id] == nil {
					next[id] = true
				}
			}
		}
		names = slices.Collect(maps.Keys(next))
	}
	return chain, nil
}

// deciding names the entries that decide about events.
// https://spec.matrix.org/v1.19/server-server-api/#auth-events-selection
func deciding(events map[mxfed.EventID]*mxfed.Event) []mxfed.StateKey {
	keys := map[mxfed.StateKey]bool{{Type: "m.room.create"}: true, {Type: "m.room.power_levels"}: true, {Type: "m.room.join_rules"}: true}
	for _, e := range events {
		keys[mxfed.StateKey{Type: "m.room.member", Key: string(e.Sender())}] = true
		if e.Type() != "m.room.member" {
			continue
		}
		user, _ := e.StateKey()
		keys[mxfed.StateKey{Type: "m.room.member", Key: user}] = true
		var content struct {
			Authoriser string `json:"join_authorised_via_users_server"`
			ThirdParty struct {
				Signed struct{ Token string }
			} `json:"third_party_invite"`
		}
		if json.Unmarshal(e.Content(), &content) != nil { // other servers write what they like
			continue
		}
		keys[mxfed.StateKey{Type: "m.room.member", Key: content.Authoriser}] = true
		keys[mxfed.StateKey{Type: "m.room.third_party_invite", Key: content.ThirdParty.Signed.Token}] = true
	}
	return slices.SortedFunc(maps.Keys(keys), compareKeys)
}
