package mxfed

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// joinCase is a change to an honest answer. With err the join fails, otherwise it succeeds without what dropped names.
type joinCase struct {
	rule    string // "": restricted, or public where there is no such rule
	change  func(r *joinRoom, a *joinAnswer)
	err     string
	dropped []StateKey
}

// joinKeyed names an event in an answer; those that are not parsed have no name.
func joinKeyed(r *joinRoom, all []value, ids []EventID) (keys []StateKey) {
	for _, id := range ids {
		key := StateKey{}
		for _, text := range all {
			var p eventParser
			if e, err := p.parse(r.rules, []byte(text)); err == nil && e.id == id {
				key = StateKey{e.typ, e.stateKey}
			}
		}
		keys = append(keys, key)
	}
	return keys
}

// run joins with and without a sink, which must not make a difference.
func (c *joinCase) run(t *testing.T, v RoomVersion, name string) {
	rule := c.rule
	if rule == "" {
		rule = map[bool]string{true: "restricted", false: "public"}[v.rules().restricted]
	}
	r := newJoinRoom(t, v, rule)
	var all []value
	n := &joinNet{room: r, answer: func(a *joinAnswer) {
		c.change(r, a)
		all = slices.Concat(a.state, a.auth)
	}}
	sunk := map[bool]map[EventID]value{true: {}, false: {}}
	for _, sink := range []func(*Event, bool) error{nil, func(e *Event, state bool) error {
		if _, again := sunk[state][e.ID()]; again {
			return fmt.Errorf("%s more than once", e.ID())
		}
		sunk[state][e.ID()] = e.text
		return nil
	}} {
		result, err := n.join(t, func(req *JoinRequest) { req.Sink = sink })
		if c.err != "" {
			require.ErrorContains(t, err, c.err, "%s %s", v, name)
			require.True(t, nextMayHelp(err), "%s %s: another server may be honest", v, name)
			continue
		}
		require.NoError(t, err, "%s %s", v, name)
		require.ElementsMatch(t, c.dropped, joinKeyed(r, all, slices.Collect(maps.Keys(result.Dropped))), "%s %s: %v", v, name, result.Dropped)
		if sink == nil {
			requireProven(t, n, result)
			continue
		}
		for id := range result.Dropped { // what is to be taken back
			delete(sunk[true], id)
			delete(sunk[false], id)
		}
		plain, err := n.join(t, nil)
		require.NoError(t, err)
		for state, events := range map[bool][]*Event{true: plain.State, false: plain.Auth} {
			require.ElementsMatch(t, joinIDs(events), slices.Collect(maps.Keys(sunk[state])), "%s %s", v, name)
			for _, e := range events {
				require.Equal(t, e.text.with("signatures", ""), sunk[state][e.ID()].with("signatures", ""))
			}
		}
	}
}

// requireProven checks what must hold of every result.
func requireProven(t testing.TB, n *joinNet, result *JoinResult) {
	keys, seen := eventKeys(joinSigner(t, joinVia), joinSigner(t, "third.example"), joinSigner(t, "us.example")), make(map[StateKey]bool)
	for _, e := range slices.Concat(result.State, result.Auth) {
		require.Equal(t, n.room.id, e.room)
		require.Equal(t, n.room.rules, e.rules)
		require.NotContains(t, result.Dropped, e.id)
		_, err := new(eventParser).checkSignatures(e, keys)
		require.NoError(t, err)
		require.True(t, e.hashOK || e.redacted)
	}
	for _, e := range result.State {
		key := StateKey{e.typ, e.stateKey}
		require.True(t, e.isState)
		require.False(t, seen[key])
		seen[key] = true
	}
	require.True(t, seen[StateKey{typeCreate, ""}])
	require.True(t, result.Create.is(typeCreate, ""))
	require.Equal(t, n.room.rules.version, createdVersion(result.Create))
}

// joinAdd puts a signed event that the room need not allow into the answer's lists.
func joinAdd(a *joinAnswer, e *Event, state, auth bool) {
	if state {
		a.state = append(a.state, e.text)
	}
	if auth {
		a.auth = append(a.auth, e.text)
	}
}

// joinTampered changes an event without signing it again.
func joinTampered(typ, key, member string, to value) func(*joinRoom, *joinAnswer) {
	return func(r *joinRoom, a *joinAnswer) {
		e := r.entry(typ, key).text
		joinReplace(a, e, e.with(member, to))
	}
}

// joinSecondCreate is another create event for the same room ID, if the version can have that.
func joinSecondCreate(r *joinRoom) *Event {
	d := r.draft(joinAlice, typeCreate, "", string(r.entry(typeCreate, "").content.with("x", "1")))
	d.prev, d.auth, d.depth = "[]", "[]", 1
	if r.rules.hashRoomID {
		d.room = ""
	}
	return r.sign(d)
}

var joinTopic = StateKey{"m.room.topic", ""}

// joinCases hold in every room version.
var joinCases = map[string]joinCase{
	"no create event in state": {change: func(r *joinRoom, a *joinAnswer) { a.state = a.state[1:] }, err: "no create event"},
	"no create event at all":   {change: func(r *joinRoom, a *joinAnswer) { joinReplace(a, r.entry(typeCreate, "").text) }, err: "no create event"},
	"empty lists":              {change: func(_ *joinRoom, a *joinAnswer) { a.state, a.auth = nil, nil }, err: "no create event"},
	"another room altogether": {change: func(r *joinRoom, a *joinAnswer) {
		other := newJoinRoom(r.t, r.rules.version, "public")
		other.id = "!other:r.example"
		if r.rules.hashRoomID {
			*other = *newJoinRoom(r.t, r.rules.version, "public")
			e := joinSecondCreate(r)
			other.state = []*Event{e}
		} else {
			other.state = []*Event{other.sign(&draft{room: other.id, typ: typeCreate, stateKey: new(string), sender: joinAlice, prev: "[]", auth: "[]",
				content: r.entry(typeCreate, "").content, depth: 1, ts: 1})}
		}
		a.state, a.auth = []value{other.state[0].text}, nil
	}, err: "belongs to another room"},
	"an event of another room": {change: func(r *joinRoom, a *joinAnswer) {
		d := r.draft(joinAlice, "m.room.name", "", `{"name":"x"}`)
		if d.room = "!other:r.example"; r.rules.hashRoomID {
			d.room = RoomID("!" + strings.Repeat("A", 43))
		}
		joinAdd(a, r.sign(d), true, true)
	}, dropped: []StateKey{{"m.room.name", ""}}},
	"a message in state": {change: func(r *joinRoom, a *joinAnswer) {
		d := r.draft(joinAlice, "m.room.message", "", `{"body":"x"}`)
		d.stateKey = nil
		joinAdd(a, r.sign(d), true, false)
	}, dropped: []StateKey{{"m.room.message", ""}}},
	"two entries for one key": {change: func(r *joinRoom, a *joinAnswer) {
		joinAdd(a, r.sign(r.draft(joinAlice, "m.room.topic", "", `{"topic":"x"}`)), true, false)
	}, err: "two entries for m.room.topic"},
	"one event twice": {change: func(r *joinRoom, a *joinAnswer) {
		a.state, a.auth = append(a.state, a.state...), append(a.auth, a.auth...)
	}},
	"one event twice, its first copy bad": {change: func(r *joinRoom, a *joinAnswer) {
		for _, e := range slices.Clone(a.state) {
			a.auth = append([]value{joinEchoSigned(joinVia, "ed25519:1", `"AAAA"`)(r, e)}, a.auth...)
		}
		a.state = append([]value{joinEchoSigned("third.example", "ed25519:1", `"AAAA"`)(r, r.entry(typeMember, string(joinCarol)).text)}, a.state...)
	}},
	"junk among the events": {change: func(_ *joinRoom, a *joinAnswer) {
		for _, junk := range []value{`0`, `null`, `""`, `[]`, `{}`, `[[]]`, `{"type":"m.room.create"}`, `{"type":"m.room.topic","state_key":""}`} {
			a.state, a.auth = append(a.state, junk), append(a.auth, junk)
		}
	}, dropped: []StateKey{{}}},
	"one bad event of many": {change: func(r *joinRoom, a *joinAnswer) {
		for i := range 100 {
			joinAdd(a, r.sign(r.draft(joinAlice, "org.example", fmt.Sprint(i), `{}`)), true, false)
		}
		joinTampered("m.room.topic", "", "signatures", `{"r.example":{"ed25519:1":"AAAA"}}`)(r, a)
	}, dropped: []StateKey{joinTopic}},
	"no signature":               {change: joinTampered("m.room.topic", "", "signatures", `{}`), dropped: []StateKey{joinTopic}},
	"signed by another server":   {change: joinTampered("m.room.topic", "", "signatures", `{"third.example":{"ed25519:1":"AAAA"}}`), dropped: []StateKey{joinTopic}},
	"signed with an unknown key": {change: joinTampered("m.room.topic", "", "signatures", `{"r.example":{"ed25519:2":"AAAA"}}`), dropped: []StateKey{joinTopic}},
	"not allowed": {change: func(r *joinRoom, a *joinAnswer) {
		joinAdd(a, r.sign(r.draft(joinCarol, "m.room.name", "", `{"name":"x"}`)), true, false)
	}, dropped: []StateKey{{"m.room.name", ""}}},
	"not allowed, nor what names it": {change: func(r *joinRoom, a *joinAnswer) {
		coup := r.sign(r.draft(joinCarol, typePowerLevels, "", `{"users":{"@carol:third.example":100}}`))
		d := r.draft(joinCarol, "m.room.name", "", `{"name":"x"}`)
		d.auth = references([]*Event{coup, r.entry(typeMember, string(joinCarol))})
		if !r.rules.hashRoomID {
			d.auth = references([]*Event{r.entry(typeCreate, ""), coup, r.entry(typeMember, string(joinCarol))})
		}
		joinAdd(a, r.sign(d), true, false)
		joinAdd(a, coup, false, true)
	}, dropped: []StateKey{{"m.room.name", ""}, {typePowerLevels, ""}}},
	"an auth event of another kind": {change: func(r *joinRoom, a *joinAnswer) {
		d := r.draft(joinAlice, "m.room.name", "", `{"name":"x"}`)
		d.auth = references(append(slices.Clone(r.state[:3]), r.entry("m.room.topic", "")))
		joinAdd(a, r.sign(d), true, false)
	}, dropped: []StateKey{{"m.room.name", ""}}},
	"an auth event missing": {rule: "invite", change: func(r *joinRoom, a *joinAnswer) {
		for _, e := range r.all { // the join rule under which Carol came
			if e.typ == typeJoinRules && e.content.get("join_rule") == `"public"` {
				joinReplace(a, e.text)
			}
		}
	}, dropped: []StateKey{{typeMember, string(joinCarol)}}},
}

// An answer is proven event by event: what fails is dropped and reported, and what the room cannot be without fails the join.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestJoin_HostileLists(t *testing.T) {
	for _, v := range joinVersions {
		for name, c := range joinCases {
			c.run(t, v, name)
		}
	}
}

// A room has one create event. In room version 12 another one would have made another room.
func TestJoin_TwoCreateEvents(t *testing.T) {
	for _, v := range joinVersions {
		for name, lists := range map[string][2]bool{"state": {true, false}, "auth chain": {false, true}, "both": {true, true}} {
			c := joinCase{change: func(r *joinRoom, a *joinAnswer) { joinAdd(a, joinSecondCreate(r), lists[0], lists[1]) }, err: "create event"}
			if v == "12" {
				c.err, c.dropped = "", []StateKey{{typeCreate, ""}}
			}
			c.run(t, v, name)
		}
	}
}

// The create event is of the version that make_join named.
func TestJoin_CreateOfAnotherVersion(t *testing.T) {
	for _, v := range joinVersions {
		for _, named := range []string{"", `"room_version":"1",`, `"room_version":"2",`, `"room_version":"9",`, `"room_version":"12",`, `"room_version":"x",`, `"room_version":7,`, `"room_version":null,`} {
			if named == `"room_version":"`+string(v)+`",` || named == "" && v == "1" {
				continue
			}
			n := &joinNet{room: newJoinRoom(t, v, "public")}
			d := n.room.draft(joinAlice, typeCreate, "", `{"creator":"@alice:r.example",`+named+`"x":1}`)
			if d.prev, d.auth, d.depth = "[]", "[]", 1; v == "12" {
				d.room = ""
			}
			n.answer = func(a *joinAnswer) { a.state, a.auth = []value{n.room.sign(d).text}, nil }
			_, err := n.join(t, nil)
			require.ErrorContains(t, err, "create", "%s %s", v, named)
			require.Len(t, n.asked, 2)
		}
	}
}

// An event whose content hash is wrong goes on as its redacted copy. https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestJoin_WrongContentHash(t *testing.T) {
	for _, v := range joinVersions {
		n := &joinNet{room: newJoinRoom(t, v, "public")}
		topic := n.room.entry("m.room.topic", "")
		n.answer = func(a *joinAnswer) { joinTampered("m.room.topic", "", "content", `{"topic":"poison"}`)(n.room, a) }
		result, err := n.join(t, nil)
		require.NoError(t, err, v)
		require.Empty(t, result.Dropped)
		got := stateOf(result.State, nil)("m.room.topic", "")
		require.Equal(t, topic.id, got.id)
		require.JSONEq(t, `{}`, string(got.Content()))
		c := joinCase{change: func(r *joinRoom, a *joinAnswer) { // the member event keeps what authorises
			e := r.entry(typeMember, string(joinCarol))
			joinReplace(a, e.text, e.text.with("content", e.content.with("displayname", `"x"`)))
		}}
		c.run(t, v, "member")
	}
}

// Without power levels, join rules or the create event nobody can tell what the room allows: an answer in which they do not
// hold is refused, however they fail.
func TestJoin_NeededEvents(t *testing.T) {
	defects := map[string]func(e value) value{
		"no signature":    func(e value) value { return e.with("signatures", `{}`) },
		"wrong signature": func(e value) value { return e.with("signatures", `{"r.example":{"ed25519:1":"AAAA"}}`) },
		"no event":        func(e value) value { return e.with("auth_events", `7`) },
		"too large":       func(e value) value { return e.with("x", quoted(strings.Repeat("x", maxEventSize))) },
		"no sender":       func(e value) value { return e.with("sender", ``) },
		"no state":        func(e value) value { return e.with("state_key", ``) },
	}
	for _, v := range joinVersions {
		for _, key := range neededState {
			for name, defect := range defects {
				c := joinCase{change: func(r *joinRoom, a *joinAnswer) {
					e := r.entry(key.Type, key.Key).text
					joinReplace(a, e, defect(e))
				}, err: key.Type + " cannot be done without"}
				if key.Type == typeCreate {
					c.err = "create"
				}
				c.run(t, v, key.Type+": "+name)
			}
		}
		c := joinCase{change: func(r *joinRoom, a *joinAnswer) { // a second, unreadable copy does no harm
			a.state = append(a.state, r.entry(typePowerLevels, "").text.with("auth_events", `7`))
		}, dropped: []StateKey{{}}}
		c.run(t, v, "a copy")
	}
}

// Events of servers whose keys cannot be had are dropped and reported; if the room needs them, the join fails and may go
// well later. https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestJoin_UnobtainableKeys(t *testing.T) {
	carol := func(n *joinNet) EventID { return n.room.entry(typeMember, string(joinCarol)).id }
	for name, keys := range map[string]*joinKeys{
		"unknown": {unknown: map[ServerName]bool{"third.example": true}}, "down": {down: map[ServerName]bool{"third.example": true}}} {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		c, _ := n.server(t, func(cfg *Config) { cfg.Keys = keys })
		result, err := n.joinWith(c, nil)
		require.NoError(t, err, name)
		require.Len(t, result.Dropped, 1)
		require.Error(t, result.Dropped[carol(n)])
		status := answerTo(result.Dropped[carol(n)]).Status
		require.Equal(t, name == "down", status == http.StatusBadGateway)
		require.NotContains(t, joinIDs(result.State), carol(n))
		require.Equal(t, n.bodies[1].get("signatures").with("r.example", result.Event.text.get("signatures").get("r.example")), result.Event.text.get("signatures"))
	}
	for name, keys := range map[string]*joinKeys{
		"unknown": {unknown: map[ServerName]bool{joinVia: true}}, "down": {down: map[ServerName]bool{joinVia: true}}} {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		c, _ := n.server(t, func(cfg *Config) { cfg.Keys = keys })
		_, err := n.joinWith(c, nil)
		require.ErrorContains(t, err, "create", name)
		var failed *Error
		require.ErrorAs(t, err, &failed)
		require.Equal(t, name == "down", failed.Temporary())
		require.True(t, nextMayHelp(err))
	}
	n := &joinNet{room: newJoinRoom(t, "10", "public")} // an event without a signature is bad whatever cannot be reached
	n.answer = func(a *joinAnswer) { joinTampered("m.room.topic", "", "signatures", `{}`)(n.room, a) }
	c, _ := n.server(t, func(cfg *Config) { cfg.Keys = &joinKeys{down: map[ServerName]bool{"third.example": true}} })
	result, err := n.joinWith(c, nil)
	require.NoError(t, err)
	require.ErrorIs(t, result.Dropped[n.room.entry("m.room.topic", "").id], ErrInvalidParam)
}

// However many servers are in a room, their keys are asked for together.
func TestJoin_KeyRounds(t *testing.T) {
	r := newJoinRoom(t, "10", "public")
	keys := &joinKeys{unknown: make(map[ServerName]bool)}
	for i := range 259 {
		user := UserID(fmt.Sprintf("@user:s%d.example", i))
		keys.unknown[user.Server()] = true
		e := r.sign(r.draft(user, typeMember, string(user), `{"membership":"join"}`))
		r.state, r.all = append(r.state, e), append(r.all, e)
	}
	n := &joinNet{room: r}
	c, _ := n.server(t, func(cfg *Config) { cfg.Keys = keys })
	result, err := n.joinWith(c, nil)
	require.NoError(t, err)
	require.Len(t, result.Dropped, 259)
	require.LessOrEqual(t, len(keys.calls), 3)
	asked := make(map[keyName]int)
	for _, k := range keys.calls[0] {
		asked[keyName{k.Server, k.ID}]++
		require.False(t, k.At.IsZero())
	}
	require.Len(t, asked, 261)
	for name, n := range asked {
		require.Equal(t, 1, n, name)
		require.NotEqual(t, joinUser.Server(), name.server, "own keys are known here")
	}
}

// joinNamed is a finished event with an ID of one's choice, as room versions 1 and 2 allow.
func (r *joinRoom) named(id EventID, d *draft) *Event {
	fields := append(d.fields(), field{"event_id", quoted(id)})
	var p eventParser
	sum := sha256.Sum256([]byte(object(slices.Clone(fields)...)))
	hashes := object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(sum[:]))})
	e, err := p.parse(r.rules, []byte(object(append(fields, field{"hashes", hashes}, field{"signatures", "{}"})...)))
	require.NoError(r.t, err)
	e, err = approved{e}.sign(joinSigner(r.t, d.sender.Server()))
	require.NoError(r.t, err)
	require.True(r.t, e.hashOK)
	return e
}

// Where IDs are given, events can authorise one another in a circle: none of them counts.
func TestJoin_AuthCycles(t *testing.T) {
	reference := func(id EventID) value { return array(quoted(id), `{"sha256":"AAAA"}`) }
	for _, v := range []RoomVersion{"1", "2"} {
		for length := 1; length <= 4; length++ {
			c := joinCase{dropped: []StateKey{{"m.room.name", ""}}}
			c.change = func(r *joinRoom, a *joinAnswer) {
				create, alice := r.entry(typeCreate, ""), r.entry(typeMember, string(joinAlice))
				for i := range length {
					d := r.draft(joinAlice, typePowerLevels, fmt.Sprint("x", i), `{}`)
					if i == 0 || length > 1 { // power levels and member events may name each other
						d.typ, *d.stateKey = typeMember, fmt.Sprintf("@user%d:r.example", i)
					}
					next := reference(EventID(fmt.Sprintf("$cycle%d:r.example", (i+1)%length)))
					d.auth = array(create.reference(), next)
					joinAdd(a, r.named(EventID(fmt.Sprintf("$cycle%d:r.example", i)), d), false, true)
				}
				d := r.draft(joinAlice, "m.room.name", "", `{"name":"x"}`)
				d.auth = array(create.reference(), reference("$cycle0:r.example"), alice.reference())
				joinAdd(a, r.sign(d), true, false)
			}
			for i := range length {
				c.dropped = append(c.dropped, StateKey{typeMember, fmt.Sprintf("@user%d:r.example", i)})
			}
			c.run(t, v, fmt.Sprint("cycle of ", length))
		}
		c := joinCase{change: func(r *joinRoom, a *joinAnswer) { // what the first one of an ID says, stays said
			topic := r.entry("m.room.topic", "")
			joinAdd(a, r.named(topic.id, r.draft(joinAlice, "m.room.name", "", `{"name":"x"}`)), true, true)
		}}
		c.run(t, v, "one ID, two events")
	}
}

// joinGraph is a graph of events whose signatures are taken for right.
func joinGraph(t testing.TB, events ...*Event) *joinCheck {
	j := newJoinCheck(&verifier{now: time.Now}, RoomVersion("10").rules(), true, &JoinRequest{Room: events[0].room})
	for _, e := range events {
		j.graph[e.id] = &joinNode{event: e}
	}
	return j
}

// A chain of 100,000 events is followed to its end, from any start; if its first event does not hold, none does.
func TestJoin_LongChain(t *testing.T) {
	const length = 100_000
	r := newJoinRoom(t, "10", "public")
	create, alice, levels := r.entry(typeCreate, ""), r.entry(typeMember, string(joinAlice)), r.entry(typePowerLevels, "")
	for _, whole := range []bool{true, false} {
		events := []*Event{create, alice, levels}
		for i := range length {
			e := *levels
			e.id = EventID(fmt.Sprint("$", i))
			e.refs = []EventID{alice.id, create.id, alice.id, events[len(events)-1].id}
			e.prevs = 1
			events = append(events, &e)
		}
		if !whole {
			events = slices.Delete(events, 1, 2)
		}
		j := joinGraph(t, events...)
		j.visit(j.graph[events[len(events)-1].id])
		for _, e := range events[2:] {
			require.Equal(t, visited, j.graph[e.id].visited)
			require.Equal(t, whole, j.graph[e.id].err == nil, j.graph[e.id].err)
		}
	}
}

// joinStream serves an answer and counts what was read of it.
type joinStream struct {
	io.Reader
	read atomic.Int64
}

func (s *joinStream) Read(b []byte) (int, error) {
	n, err := s.Reader.Read(b)
	s.read.Add(int64(n))
	return n, err
}

func (s *joinStream) Close() error { return nil }

// bigAnswer has the resident answer with n state events of 60 KiB.
func bigAnswer(t testing.TB, n *joinNet, count int) *joinStream {
	stream := new(joinStream)
	var state []value
	for i := range count {
		state = append(state, n.room.sign(n.room.draft(joinAlice, "org.example.big", fmt.Sprint(i), `{"x":"`+strings.Repeat("x", 60<<10)+`"}`)).text)
	}
	n.serve = func(q *http.Request, endpoint string) *http.Response {
		if endpoint != "send_join" {
			return nil
		}
		a := n.room.answer(n.bodies[len(n.bodies)-1])
		a.state = append(a.state, state...)
		stream.Reader = bytes.NewReader(a.text())
		return &http.Response{StatusCode: 200, Header: http.Header{}, Body: stream}
	}
	return stream
}

// The sink gets events while the answer arrives, and holds it back: two windows are ahead of it at most.
func TestJoin_BackPressure(t *testing.T) {
	n := &joinNet{room: newJoinRoom(t, "10", "public")}
	stream := bigAnswer(t, n, 350)
	var taken, last int64
	sinking := atomic.Bool{}
	result, err := n.join(t, func(r *JoinRequest) {
		r.Sink = func(e *Event, _ bool) error {
			require.True(t, sinking.CompareAndSwap(false, true), "one at a time")
			defer sinking.Store(false)
			runtime.Gosched()
			taken += int64(len(e.JSON()))
			require.Less(t, stream.read.Load()-taken, int64(2*windowBytes+1<<20))
			return nil
		}
		r.Progress = func(via ServerName, events int, bytes int64) {
			require.False(t, sinking.Load(), "not while the sink is at work")
			require.Equal(t, joinVia, via)
			require.Greater(t, bytes, last)
			require.LessOrEqual(t, int64(events)*200, bytes)
			last = bytes
		}
	})
	require.NoError(t, err)
	require.Empty(t, result.Dropped)
	require.Nil(t, result.State)
	require.Nil(t, result.Auth)
	require.Greater(t, taken, int64(20<<20))
	require.Equal(t, stream.read.Load(), last)
}

// An answer of very many tiny entries takes no more memory than one of events, also if nobody says which version they are of.
func TestJoin_TinyEntries(t *testing.T) {
	for _, named := range []bool{true, false} {
		n := &joinNet{room: newJoinRoom(t, "1", "public")}
		if !named {
			n.template = func(answer value) value { return answer.with("room_version", "") }
		}
		n.answer = func(a *joinAnswer) { a.state = append(a.state, slices.Repeat([]value{"0"}, 10*windowEvents)...) }
		before, largest := 0, 0
		result, err := n.join(t, func(r *JoinRequest) {
			r.Progress = func(_ ServerName, events int, _ int64) {
				largest, before = max(largest, events-before), events
			}
		})
		require.NoError(t, err)
		require.Len(t, result.Dropped, 1)
		require.Greater(t, before, 10*windowEvents)
		require.LessOrEqual(t, largest, windowEvents)
	}
}

// An error of the sink is the host's own: it ends the join, and no other server is asked. Nor is one once the sink has
// events of the first.
func TestJoin_SinkDecides(t *testing.T) {
	fail := func(*Event, bool) error { return errJoinSink }
	take := func(*Event, bool) error { return nil }
	broken := func(r *joinRoom, a *joinAnswer) { a.state = a.state[1:] }
	for name, c := range map[string]struct {
		sink   func(*Event, bool) error
		change func(r *joinRoom, a *joinAnswer)
		next   bool
		own    bool
	}{
		"fails":                         {fail, func(*joinRoom, *joinAnswer) {}, false, true},
		"has events of a bad answer":    {take, broken, false, false},
		"none, bad answer":              {nil, broken, true, false},
		"has no events of a bad answer": {take, func(_ *joinRoom, a *joinAnswer) { a.state, a.auth = []value{"1"}, nil }, true, false},
	} {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		n.answer = func(a *joinAnswer) { c.change(n.room, a) }
		_, err := n.join(t, func(r *JoinRequest) { r.Sink, r.Via = c.sink, []ServerName{joinVia, "next.example"} })
		require.Equal(t, c.own, errors.Is(err, errJoinSink), name)
		require.Equal(t, c.next, slices.Contains(n.asked, "v1 make_join next.example"), name)
		if c.own {
			require.Equal(t, 500, ClientError(err).Status)
		}
	}
}
