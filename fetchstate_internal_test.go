package mxfed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// fetchNet is a network of servers that tell Bob's server the state before his join, honestly or not.
type fetchNet struct {
	*joinNet
	join    *Event
	change  map[ServerName]func(a *joinAnswer) // of an answer to state
	body    map[ServerName]string              // the whole answer, "" for the honest one
	noEvent bool                               // single events are not to be had
	chain   func(of EventID) io.Reader         // answers event_auth; nil: 404
}

func newFetchNet(t testing.TB, v RoomVersion, rule string) *fetchNet {
	n := &fetchNet{joinNet: &joinNet{room: newJoinRoom(t, v, rule)}, change: make(map[ServerName]func(a *joinAnswer)), body: make(map[ServerName]string)}
	n.join = n.room.fuzzedJoin()
	n.serve = n.answerState
	return n
}

func (n *fetchNet) answerState(q *http.Request, endpoint string) *http.Response {
	server := ServerName(q.URL.Host)
	switch {
	case endpoint == "event" && n.noEvent, endpoint == "event_auth" && n.chain == nil:
		return joinReply(404, `{"errcode":"M_NOT_FOUND"}`)
	case endpoint == "event_auth":
		path := strings.Split(q.URL.EscapedPath(), "/")
		room, err := url.PathUnescape(path[5])
		require.NoError(n.room.t, err)
		require.Equal(n.room.t, n.room.id, RoomID(room))
		of, err := url.PathUnescape(path[6])
		require.NoError(n.room.t, err)
		return &http.Response{StatusCode: 200, Body: io.NopCloser(n.chain(EventID(of)))}
	case endpoint != "state":
		return nil
	}
	require.Equal(n.room.t, string(n.join.id), q.URL.Query().Get("event_id"))
	require.Contains(n.room.t, q.Header.Get("Authorization"), `origin="us.example"`)
	if body := n.body[server]; body != "" {
		return joinReply(200, body)
	}
	a := n.room.answer(n.join.text)
	if change := n.change[server]; change != nil {
		change(a)
	}
	return joinReply(200, string(fetchText(a)))
}

// fetchText is what a server answers with that would answer a join with a.
func fetchText(a *joinAnswer) value {
	return object(field{"pdus", array(a.state...)}, field{"auth_chain", array(a.auth...)})
}

// fetch asks for the state; change alters the request.
func (n *fetchNet) fetch(t testing.TB, change func(*StateRequest)) (*StateResult, error) {
	c, _ := n.server(t, nil)
	req := &StateRequest{Event: n.join, Via: []ServerName{joinVia}}
	if change != nil {
		change(req)
	}
	return c.FetchState(context.Background(), req)
}

// fetchSink keeps what it is given as a host would.
type fetchSink struct {
	t      testing.TB
	events map[EventID]*Event
	again  int // events that replaced a damaged copy
}

func (s *fetchSink) take(e *Event) error {
	if old := s.events[e.id]; old != nil {
		if !old.redacted || e.redacted || old.hash != e.hash {
			return fmt.Errorf("%s comes twice", e.id)
		}
		s.again++
	}
	s.events[e.id] = e
	return nil
}

// requireSame demands that what the sink got, less what is to be taken back, is what the result of a call without one holds.
func (s *fetchSink) requireSame(result, plain *StateResult) {
	for id := range result.Dropped {
		delete(s.events, id)
	}
	require.Equal(s.t, plain.StateIDs, result.StateIDs)
	require.Equal(s.t, joinIDs(plain.State), result.StateIDs)
	require.Nil(s.t, result.State)
	require.Nil(s.t, result.Auth)
	ids := joinIDs(slices.Concat(plain.State, plain.Auth))
	slices.Sort(ids)
	require.Equal(s.t, slices.Compact(ids), slices.Sorted(maps.Keys(s.events)))
	for _, e := range slices.Concat(plain.State, plain.Auth) {
		require.Equal(s.t, e.text.with("signatures", ""), s.events[e.id].text.with("signatures", ""))
	}
}

func TestFetchState_Honest(t *testing.T) {
	for _, v := range joinVersions {
		for _, rule := range []string{"public", "invite", "restricted"} {
			if rule == "restricted" && !v.rules().restricted {
				continue
			}
			n := newFetchNet(t, v, rule)
			result, err := n.fetch(t, nil)
			require.NoError(t, err, "%s %s", v, rule)
			require.Equal(t, []string{"v1 state r.example"}, n.asked)
			honest := n.room.answer(n.join.text)
			require.Equal(t, array(honest.state...), texts(result.State))
			require.Equal(t, array(honest.auth...), texts(result.Auth))
			require.Equal(t, joinIDs(n.room.state), result.StateIDs)
			require.Equal(t, n.room.entry(typeCreate, "").text, result.Create.text)
			require.Equal(t, joinVia, result.Via)
			require.Empty(t, result.Dropped)
			sink := &fetchSink{t: t, events: make(map[EventID]*Event)}
			sunk, err := n.fetch(t, func(r *StateRequest) { r.Sink = sink.take })
			require.NoError(t, err)
			require.Zero(t, sink.again)
			sink.requireSame(sunk, result)
		}
	}
}

// Whatever an answer holds, its state is that of a join which got the same lists, and what fails one fails the other.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestFetchState_LikeJoin(t *testing.T) {
	for _, v := range joinVersions {
		for name, c := range joinCases {
			rule := c.rule
			if rule == "" {
				rule = map[bool]string{true: "restricted", false: "public"}[v.rules().restricted]
			}
			n := newFetchNet(t, v, rule)
			n.noEvent = true
			n.change[joinVia] = func(a *joinAnswer) { c.change(n.room, a) }
			n.answer = n.change[joinVia]
			joined, joinErr := n.joinNet.join(t, nil)
			plain, err := n.fetch(t, nil)
			if c.err != "" {
				require.ErrorContains(t, joinErr, c.err, "%s %s", v, name)
				require.ErrorContains(t, err, c.err, "%s %s", v, name)
				continue
			}
			require.NoError(t, err, "%s %s", v, name)
			require.Equal(t, joinIDs(joined.State), plain.StateIDs, "%s %s", v, name)
			require.Equal(t, joinIDs(joined.Auth), joinIDs(plain.Auth), "%s %s", v, name)
			require.Equal(t, slices.Sorted(maps.Keys(joined.Dropped)), slices.Sorted(maps.Keys(plain.Dropped)), "%s %s", v, name)
			sink := &fetchSink{t: t, events: make(map[EventID]*Event)}
			sunk, err := n.fetch(t, func(r *StateRequest) { r.Sink = sink.take })
			require.NoError(t, err, "%s %s", v, name)
			sink.requireSame(sunk, plain)
		}
		for name, lists := range map[string][2]bool{"state": {true, false}, "auth chain": {false, true}} {
			n := newFetchNet(t, v, "public")
			n.change[joinVia] = func(a *joinAnswer) { joinAdd(a, joinSecondCreate(n.room), lists[0], lists[1]) }
			result, err := n.fetch(t, nil)
			if v == "12" { // it would have made another room
				require.Len(t, result.Dropped, 1)
				continue
			}
			require.ErrorContains(t, err, "create event", "%s two create events, %s", v, name)
		}
	}
}

// An answer that is not of the form is refused, and the next server asked.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1stateroomid
func TestFetchState_MalformedAnswer(t *testing.T) {
	texts := map[string]string{"the answer to a join": string(newJoinRoom(t, "10", "public").answer(newFetchNet(t, "10", "public").join.text).text())}
	for name, text := range joinMalformed {
		texts[name] = strings.NewReplacer(`"state"`, `"pdus"`, `"event"`, `"pdus"`).Replace(text)
	}
	for name, text := range texts {
		if text == "" {
			text = " "
		}
		n := newFetchNet(t, "10", "public")
		n.body[joinVia] = text
		result, err := n.fetch(t, func(r *StateRequest) { r.Via = []ServerName{joinVia, "next.example"} })
		require.NoError(t, err, name)
		require.Equal(t, ServerName("next.example"), result.Via)
		require.Equal(t, []string{"v1 state r.example", "v1 state next.example"}, n.asked, name)
		_, err = n.fetch(t, nil)
		var answer *Error
		require.ErrorAs(t, err, &answer, name)
		require.Equal(t, []any{joinVia, "state", 200}, []any{answer.Server, answer.Endpoint, answer.Status})
	}
}

// A state that is not the one before the event, or does not allow it, is refused.
func TestFetchState_NotBefore(t *testing.T) {
	for _, v := range joinVersions {
		for name, c := range map[string]struct {
			rule   string
			change func(n *fetchNet)
			err    string
		}{
			"state after the event": {"public", func(n *fetchNet) {
				n.change[joinVia] = func(a *joinAnswer) { a.state = append(a.state, n.join.text) }
			}, "precede"},
			"no longer invited": {"invite", func(n *fetchNet) {
				n.room.add(joinAlice, typeMember, string(joinUser), `{"membership":"leave"}`)
			}, "by the state"},
			"invite left out": {"invite", func(n *fetchNet) {
				n.change[joinVia] = func(a *joinAnswer) {
					invite := n.room.entry(typeMember, string(joinUser)).text
					joinReplace(a, invite)
				}
			}, "by the state"},
			"its auth events are not to be had": {"invite", func(n *fetchNet) {
				n.noEvent = true
				n.change[joinVia] = func(a *joinAnswer) { joinReplace(a, n.room.entry(typeMember, string(joinUser)).text) }
			}, "by its auth events"},
		} {
			n := newFetchNet(t, v, c.rule)
			c.change(n)
			_, err := n.fetch(t, nil)
			require.ErrorContains(t, err, c.err, "%s %s", v, name)
		}
	}
}

// fetchLacking is a room with n users more, who have changed their names, every other one twice: first joins authorise the
// changes, and the answer lacks them.
func fetchLacking(t testing.TB, n int) (net *fetchNet, lacking []*Event) {
	net = newFetchNet(t, "10", "public")
	for i := range n {
		user := UserID(fmt.Sprintf("@u%d:r.example", i))
		e := net.room.add(user, typeMember, string(user), `{"membership":"join"}`)
		for j := range 1 + i%2 { // the first change is authorised by the join, the second one by the first
			net.room.add(user, typeMember, string(user), fmt.Sprintf(`{"displayname":"%d","membership":"join"}`, j))
		}
		lacking = append(lacking, e)
	}
	net.change[joinVia] = func(a *joinAnswer) {
		for _, e := range lacking {
			joinReplace(a, e.text)
		}
	}
	net.join = net.room.fuzzedJoin()
	return net, lacking
}

// honestChain is what the resident says to event_auth.
func (n *fetchNet) honestChain(of EventID) io.Reader {
	chain, todo := []value{}, []EventID{of}
	if of == n.join.id {
		todo = n.join.Auth()
	}
	for i := 0; i < len(todo); i++ {
		e := findEvent(n.room.all, todo[i])
		if e.id != of && !slices.Contains(chain, e.text) {
			chain = append(chain, e.text)
		}
		todo = append(todo, e.Auth()...)
	}
	return bytes.NewReader([]byte(object(field{"auth_chain", array(chain...)})))
}

// asks counts the requests to an endpoint.
func (n *fetchNet) asks(endpoint string) (count int) {
	for _, a := range n.asked {
		if strings.Contains(a, " "+endpoint+" ") {
			count++
		}
	}
	return count
}

// Auth events that the answer lacks are fetched: few of them one by one, many by the chains of events that need them.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1eventeventid
func TestFetchState_Completion(t *testing.T) {
	for size, chains := range map[int]int{manyGaps: 0, manyGaps + 3: 3, manyGaps + 20: maxChains} {
		for _, sinking := range []bool{false, true} {
			n, lacking := fetchLacking(t, size)
			n.chain = n.honestChain
			sink := &fetchSink{t: t, events: make(map[EventID]*Event)}
			result, err := n.fetch(t, func(r *StateRequest) {
				if sinking {
					r.Sink = sink.take
				}
			})
			require.NoError(t, err)
			require.Empty(t, result.Dropped)
			require.Equal(t, joinIDs(n.room.state), result.StateIDs)
			if sinking {
				for _, e := range lacking {
					require.Contains(t, sink.events, e.id)
				}
			} else {
				require.Subset(t, joinIDs(result.Auth), joinIDs(lacking))
			}
			require.Equal(t, []int{chains, size - chains}, []int{n.asks("event_auth"), n.asks("event")}, "each chain brings one of them")
		}
	}
}

// What cannot be had is not asked for without end, and what depends on it is dropped and reported, as in a join.
func TestFetchState_CompletionFails(t *testing.T) {
	read := 0
	endless := func(EventID) io.Reader {
		return io.TeeReader(io.MultiReader(strings.NewReader(`{"auth_chain":[`), joinEndless(' ')), fetchCounter{&read})
	}
	text := func(s string) func(EventID) io.Reader {
		return func(EventID) io.Reader { return strings.NewReader(s) }
	}
	for name, chain := range map[string]func(EventID) io.Reader{"not found": nil, "no list": text(`{}`), "no JSON": text(`x`), "empty": text(`{"auth_chain":[]}`),
		"broken off": text(`{"auth_chain":[`), "null": text(`{"auth_chain":null}`), "junk": text(`{"auth_chain":[1,{}]}`), "without end": endless} {
		n, lacking := fetchLacking(t, 80)
		n.chain, n.noEvent = chain, true
		c, _ := n.server(t, func(cfg *Config) { cfg.MaxAnswer = 4 << 20 })
		result, err := c.FetchState(t.Context(), &StateRequest{Event: n.join, Via: []ServerName{joinVia}})
		require.NoError(t, err, name)
		require.Equal(t, []int{1, maxCompletions}, []int{n.asks("event_auth"), n.asks("event")}, name)
		require.Len(t, result.StateIDs, len(n.room.state)-len(lacking))
		delete(result.Dropped, "")
		require.Len(t, result.Dropped, len(lacking)+len(lacking)/2)
		for id, err := range result.Dropped {
			require.Regexp(t, "missing or not genuine|was dropped", err.Error(), id)
		}
	}
	require.Less(t, read, 5<<20)
	n, _ := fetchLacking(t, 3) // single events that are others
	serve := n.serve
	n.serve = func(q *http.Request, endpoint string) *http.Response {
		if endpoint == "event" {
			return joinReply(200, `{"pdus":[`+string(n.room.entry("m.room.topic", "").text)+`]}`)
		}
		return serve(q, endpoint)
	}
	result, err := n.fetch(t, nil)
	require.NoError(t, err)
	require.Len(t, result.Dropped, 4)
	require.Equal(t, 3, n.asks("event"))
}

// fetchCounter counts bytes.
type fetchCounter struct{ n *int }

func (c fetchCounter) Write(b []byte) (int, error) {
	*c.n += len(b)
	return len(b), nil
}

// An event that came and was not genuine is not asked for again.
func TestFetchState_NotGenuine(t *testing.T) {
	n := newFetchNet(t, "10", "public")
	n.change[joinVia] = func(a *joinAnswer) {
		carol := n.room.entry(typeMember, string(joinCarol)).text
		joinReplace(a, carol, carol.with("signatures", "{}"))
		joinAdd(a, n.room.sign(n.room.draft(joinCarol, typeMember, string(joinCarol), `{"membership":"join","displayname":"C"}`)), true, false)
	}
	result, err := n.fetch(t, nil)
	require.NoError(t, err)
	require.Len(t, result.Dropped, 2)
	require.Equal(t, []string{"v1 state r.example"}, n.asked)
}

// Events that a server gave before it failed stay with the host, each once, and what turns out not to belong to the state
// is to be taken back: the result is as if only the server that was honest had been asked.
func TestFetchState_SinkOverServers(t *testing.T) {
	fail := value(`{"type":"m.room.create","state_key":""}`) // makes an answer fail at its end
	for _, v := range []RoomVersion{"1", "6", "10", "12"} {
		damaged := func(n *fetchNet, a *joinAnswer) {
			joinTampered("m.room.topic", "", "content", `{"topic":"poison"}`)(n.room, a)
		}
		for name, c := range map[string]struct {
			first, second func(n *fetchNet, a *joinAnswer) // what they are before the failure; a nil second is like the first
			again         int
			extra         func(n *fetchNet) []EventID // to be taken back
		}{
			"the same events": {first: func(*fetchNet, *joinAnswer) {}},
			"half of them":    {first: func(_ *fetchNet, a *joinAnswer) { a.state, a.auth = a.state[:3], a.auth[:1] }},
			"old state": {first: func(n *fetchNet, a *joinAnswer) { // part of the auth chain, as a state entry
				a.state = nil
				for _, e := range n.room.all {
					a.state = append(a.state, e.text)
				}
			}},
			"others": {first: func(n *fetchNet, a *joinAnswer) {
				a.state = append(a.state, n.room.sign(n.room.draft(joinAlice, "org.example", "", `{}`)).text)
			}, extra: func(n *fetchNet) []EventID {
				return []EventID{n.room.sign(n.room.draft(joinAlice, "org.example", "", `{}`)).id}
			}},
			"a damaged copy":                   {first: damaged, again: 1},
			"a damaged copy, then a whole one": {first: damaged, second: func(*fetchNet, *joinAnswer) {}, again: 1},
			"a whole copy, then a damaged one": {first: func(*fetchNet, *joinAnswer) {}, second: damaged},
		} {
			n := newFetchNet(t, v, "invite")
			n.change[joinVia] = func(a *joinAnswer) {
				c.first(n, a)
				joinReplace(a, n.room.entry(typeCreate, "").text, fail)
			}
			n.change["second.example"] = n.change[joinVia]
			if c.second != nil {
				n.change["second.example"] = func(a *joinAnswer) {
					c.second(n, a)
					joinReplace(a, n.room.entry(typeCreate, "").text, fail)
				}
			}
			via := []ServerName{joinVia, "second.example", "third.example"}
			plain, err := n.fetch(t, func(r *StateRequest) { r.Via = via[2:] })
			require.NoError(t, err)
			sink := &fetchSink{t: t, events: make(map[EventID]*Event)}
			result, err := n.fetch(t, func(r *StateRequest) { r.Via, r.Sink = via, sink.take })
			require.NoError(t, err, "%s %s", v, name)
			require.Equal(t, ServerName("third.example"), result.Via)
			require.Equal(t, c.again, sink.again, "%s %s", v, name)
			var extra []EventID
			if c.extra != nil {
				extra = c.extra(n)
			}
			require.ElementsMatch(t, extra, slices.Collect(maps.Keys(result.Dropped)), "%s %s", v, name)
			sink.requireSame(result, plain)
		}
	}
}

// Where IDs are given and not computed, two servers may have two events with one ID. The host has got the first one, whole
// or not, which does not become the second one.
func TestFetchState_OneIDTwoEvents(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		n := newFetchNet(t, "1", "public")
		topic := n.room.entry("m.room.topic", "")
		d := n.room.draft(joinAlice, "m.room.topic", "", `{"topic":"coffee"}`)
		d.ts++
		twin := fetchSigned(t, n.room.sign(d).text.with("event_id", quoted(topic.id)))
		n.change[joinVia] = func(a *joinAnswer) {
			text := twin.text
			if damaged {
				text = text.with("content", `{"topic":"poison"}`)
			}
			joinReplace(a, topic.text, text)
			joinReplace(a, n.room.entry(typeCreate, "").text)
		}
		sink := &fetchSink{t: t, events: make(map[EventID]*Event)}
		result, err := n.fetch(t, func(r *StateRequest) { r.Via, r.Sink = []ServerName{joinVia, "third.example"}, sink.take })
		require.NoError(t, err)
		require.Equal(t, twin.hash, sink.events[topic.id].hash)
		require.Equal(t, damaged, sink.events[topic.id].redacted)
		require.ErrorContains(t, result.Dropped[topic.id], "another event has the ID")
		require.NotContains(t, result.StateIDs, topic.id)
	}
}

// fetchSigned hashes and signs an event of version 1 again.
func fetchSigned(t testing.TB, text value) *Event {
	text = text.with("signatures", "").with("hashes", "")
	sum := sha256.Sum256([]byte(text))
	text = text.with("hashes", object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(sum[:]))})).with("signatures", "{}")
	e, err := ParseEvent("1", []byte(text))
	require.NoError(t, err)
	require.True(t, e.hashOK)
	e, err = approved{e}.sign(joinSigner(t, e.sender.Server()))
	require.NoError(t, err)
	return e
}

// An error of the sink ends the call, wherever it comes, and is no server's.
func TestFetchState_SinkFails(t *testing.T) {
	n, lacking := fetchLacking(t, 2)
	many, manyLacking := fetchLacking(t, manyGaps+1)
	many.chain = many.honestChain
	for name, c := range map[string]struct {
		net *fetchNet
		at  EventID
	}{
		"state": {n, n.room.entry("m.room.topic", "").id}, "event": {n, lacking[1].id}, "event_auth": {many, manyLacking[0].id},
	} {
		c.net.asked = nil
		_, err := c.net.fetch(t, func(r *StateRequest) {
			r.Via = append(r.Via, "next.example")
			r.Sink = func(e *Event) error {
				if e.id == c.at {
					return errJoinSink
				}
				return nil
			}
		})
		require.ErrorIs(t, err, errJoinSink, name)
		var server *Error
		require.False(t, errors.As(err, &server), name)
		require.NotContains(t, c.net.asked, "v1 state next.example", name)
	}
}

// Who is asked: other servers with names, each once, ten at most; and in whose name.
func TestFetchState_Via(t *testing.T) {
	n := newFetchNet(t, "10", "public")
	n.serve = func(*http.Request, string) *http.Response {
		return joinReply(404, `{"errcode":"M_NOT_FOUND","error":"?"}`)
	}
	var many []ServerName
	for i := range 12 {
		many = append(many, ServerName(fmt.Sprintf("s%d.example", i)))
	}
	for name, c := range map[string]struct {
		via   []ServerName
		asked int
		err   error
	}{
		"none":         {nil, 0, ErrNotFound},
		"us":           {[]ServerName{"us.example"}, 0, ErrNotFound},
		"no name":      {[]ServerName{"no name"}, 0, ErrInvalidParam},
		"one twice":    {[]ServerName{"us.example", "no name", joinVia, joinVia, ""}, 1, ErrNotFound},
		"ten, not all": {append([]ServerName{"us.example", "no name"}, many...), 10, ErrNotFound},
	} {
		n.asked = nil
		_, err := n.fetch(t, func(r *StateRequest) { r.Via = c.via })
		require.ErrorIs(t, err, c.err, name)
		require.Len(t, n.asked, c.asked, name)
		for i, a := range n.asked {
			require.ErrorContains(t, err, strings.Fields(a)[2], "%s %d: every error is kept", name, i)
		}
	}
	for name, change := range map[string]func(*StateRequest){
		"no event":        func(r *StateRequest) { r.Event = nil },
		"create event":    func(r *StateRequest) { r.Event = n.room.entry(typeCreate, "") },
		"not in our name": func(r *StateRequest) { r.From = "third.example" },
	} {
		n.asked = nil
		_, err := n.fetch(t, change)
		require.Error(t, err, name)
		require.Empty(t, n.asked, name)
	}
	n = newFetchNet(t, "10", "public") // an event of another server's user
	n.join = n.room.sign(n.room.draft(joinCarol, "org.example", "", `{}`))
	levels := n.room.entry(typePowerLevels, "")
	_, err := n.fetch(t, nil)
	require.ErrorContains(t, err, "by its auth events", "Carol has no power, %s", levels.id)
	require.Len(t, n.asked, 1)
}

// FuzzStateAnswer gives answers about the state of rooms of two formats. Whatever is taken must be proven.
func FuzzStateAnswer(f *testing.F) {
	versions := []RoomVersion{"1", "10", "12"}
	var rooms []*joinRoom
	for i, v := range versions {
		r := newJoinRoom(f, v, "restricted")
		rooms = append(rooms, r)
		honest := r.answer(r.fuzzedJoin().text)
		f.Add(i, false, []byte(fetchText(honest)))
		honest.state[5] = honest.state[5].with("content", "{}")
		f.Add(i, true, []byte(fetchText(honest)))
	}
	for _, text := range joinMalformed {
		f.Add(1, false, []byte(strings.ReplaceAll(text, `"state"`, `"pdus"`)))
	}
	f.Fuzz(func(t *testing.T, version int, sinking bool, answer []byte) {
		if version < 0 || version >= len(versions) {
			return
		}
		room := *rooms[version]
		room.t = t
		n := &fetchNet{joinNet: &joinNet{room: &room}, join: room.fuzzedJoin(), noEvent: true, body: map[ServerName]string{joinVia: string(answer) + " "}}
		n.serve = n.answerState
		sink := &fetchSink{t: t, events: make(map[EventID]*Event)}
		result, err := n.fetch(t, func(r *StateRequest) {
			if sinking {
				r.Sink = sink.take
			}
		})
		if err != nil {
			require.Nil(t, result)
			return
		}
		require.True(t, result.Create.is(typeCreate, ""))
		require.NotContains(t, result.StateIDs, n.join.id)
		if !sinking {
			requireProven(t, n.joinNet, &JoinResult{Create: result.Create, State: result.State, Auth: result.Auth, Dropped: result.Dropped})
		}
	})
}
