package mxfed

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
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
		require.NotContains(t, sunk[state], e.ID(), "%s %s: once per list", v, name)
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
		for i := range 300 {
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

var _ = context.Background
var _ = io.EOF
var _ = runtime.Gosched
var _ = time.Now
