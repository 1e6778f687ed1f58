package mxfed

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

// joinElement is what answerReader hands on.
type joinElement struct {
	list string
	text string
}

// readAnswer reads an answer from in.
func readAnswer(in io.Reader, v1 bool) (elements []joinElement, rest map[string]value, err error) {
	r := &answerReader{in: in, max: 1 << 30}
	rest, err = r.read(v1, func(list string, text []byte) error {
		elements = append(elements, joinElement{list, string(text)})
		return nil
	})
	return elements, rest, err
}

// The lists may come in any order, with white space and members that mean nothing; what is handed on is their text.
func TestJoinAnswer_Read(t *testing.T) {
	const text = " { \"x\" : {\"state\":[1]} , \"auth_chain\" :\n[ {\"a\":\"]}\\\"\"} ,\t{} ] , \"origin\":\"o\",\"n\":-1.5e3,\"t\":true,\r\n" +
		`"st\u0061te":[[1,[2]],"s,]","\\",null,7 ] ,"event":{"b":1,"a":"\u00e9"}, "servers_in_room":["a"],"members_omitted": true ,"x":0 } `
	want := []joinElement{{"auth_chain", `{"a":"]}\""}`}, {"auth_chain", `{}`}, {"state", `[1,[2]]`}, {"state", `"s,]"`}, {"state", `"\\"`},
		{"state", `null`}, {"state", `7`}}
	wantRest := map[string]value{"event": `{"a":"é","b":1}`, "servers_in_room": `["a"]`, "members_omitted": "true"}
	for name, in := range map[string]func(string) io.Reader{
		"at once":          func(s string) io.Reader { return strings.NewReader(s) },
		"a byte at a time": func(s string) io.Reader { return iotest.OneByteReader(strings.NewReader(s)) },
		"with the end":     func(s string) io.Reader { return iotest.DataErrReader(strings.NewReader(s)) },
	} {
		for _, v1 := range []bool{false, true} {
			whole := text
			if v1 {
				whole = " [ 200 ," + text + "] "
			}
			elements, rest, err := readAnswer(in(whole), v1)
			require.NoError(t, err, name)
			require.Equal(t, want, elements, name)
			require.Equal(t, wantRest, rest, name)
			_, _, err = readAnswer(in(whole), !v1)
			require.Error(t, err, name)
		}
	}
	for i := range len(text) - 2 { // up to the white space at the end
		_, _, err := readAnswer(strings.NewReader(text[:i]), false)
		require.Error(t, err, "%d bytes", i)
		_, _, err = readAnswer(iotest.DataErrReader(io.MultiReader(strings.NewReader(text[:i]), iotest.ErrReader(errJoinSink))), false)
		require.ErrorIs(t, err, errJoinSink, "%d bytes", i)
	}
}

// joinMalformed are answers that are refused as a whole.
var joinMalformed = map[string]string{
	"nothing":                 ``,
	"white space":             "\n",
	"an empty object":         `{}`,
	"a status":                `[200]`,
	"a status and nothing":    `[200,{}]`,
	"an empty list":           `[]`,
	"null":                    `null`,
	"a string":                `"x"`,
	"a number":                `200`,
	"text":                    `<html>`,
	"no state":                `{"auth_chain":[]}`,
	"no auth_chain":           `{"state":[]}`,
	"state null":              `{"auth_chain":[],"state":null}`,
	"state an object":         `{"auth_chain":[],"state":{}}`,
	"state a string":          `{"auth_chain":[],"state":"[]"}`,
	"auth_chain a number":     `{"auth_chain":0,"state":[]}`,
	"state twice":             `{"auth_chain":[],"state":[],"state":[]}`,
	"event twice":             `{"auth_chain":[],"event":{},"event":{},"state":[]}`,
	"state in another case":   `{"auth_chain":[],"State":[]}`,
	"a version 1 answer":      `[200,{"auth_chain":[],"state":[]}]`,
	"more after it":           `{"auth_chain":[],"state":[]}{}`,
	"a comma after it":        `{"auth_chain":[],"state":[]},`,
	"not closed":              `{"auth_chain":[],"state":[]`,
	"closed by a bracket":     `{"auth_chain":[],"state":[]]`,
	"list not closed":         `{"auth_chain":[],"state":[}`,
	"list without commas":     `{"auth_chain":[],"state":[{} {}]}`,
	"list with two commas":    `{"auth_chain":[],"state":[{},,{}]}`,
	"list ends with a comma":  `{"auth_chain":[],"state":[{},]}`,
	"list starts with one":    `{"auth_chain":[],"state":[,{}]}`,
	"members without commas":  `{"auth_chain":[] "state":[]}`,
	"object ends with one":    `{"auth_chain":[],"state":[],}`,
	"object starts with one":  `{,"auth_chain":[],"state":[]}`,
	"no colon":                `{"auth_chain" [],"state":[]}`,
	"no value":                `{"auth_chain":[],"state":[],"x":}`,
	"a name that is none":     `{auth_chain:[],"state":[]}`,
	"a name that is a number": `{1:[],"auth_chain":[],"state":[]}`,
	"event no JSON":           `{"auth_chain":[],"event":{x},"state":[]}`,
	"a name with bad UTF-8":   "{\"auth_chain\":[],\"\xff\":1,\"state\":[]}",
	"a string without end":    `{"auth_chain":[],"state":[],"x":"`,
	"a BOM":                   "\ufeff{\"auth_chain\":[],\"state\":[]}",
}

func TestJoinAnswer_Malformed(t *testing.T) {
	for name, text := range joinMalformed {
		for _, in := range []io.Reader{strings.NewReader(text), iotest.OneByteReader(strings.NewReader(text))} {
			_, _, err := readAnswer(in, false)
			require.Error(t, err, name)
		}
	}
	for _, text := range []string{`[200]`, `[200,]`, `[200,{}`, `[200,[]]`, `[,{"auth_chain":[],"state":[]}]`, `[200,{"auth_chain":[],"state":[]},1]`,
		`[200,{"auth_chain":[],"state":[]}`, `[200,{"auth_chain":[],"state":[]}]x`, `[{"auth_chain":[],"state":[]}]`, `{"auth_chain":[],"state":[]}`} {
		_, _, err := readAnswer(strings.NewReader(text), true)
		require.Error(t, err, text)
	}
}

// The same answers fail a join, whichever version of the endpoint gives them, and the next server is asked.
func TestJoin_MalformedAnswer(t *testing.T) {
	for name, text := range joinMalformed {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		n.serve = func(q *http.Request, endpoint string) *http.Response {
			if endpoint == "send_join" && q.URL.Host == string(joinVia) {
				return joinReply(200, text)
			}
			return nil
		}
		result, err := n.join(t, func(r *JoinRequest) { r.Via = []ServerName{joinVia, "next.example"} })
		require.NoError(t, err, name)
		require.Equal(t, ServerName("next.example"), result.Via)
		require.Equal(t, []string{"v1 make_join r.example", "v2 send_join r.example", "v1 make_join next.example", "v2 send_join next.example"}, n.asked, name)
	}
}

// Every part of an answer has its limit, and nothing that is passed over is kept.
func TestJoinAnswer_Limits(t *testing.T) {
	element := func(n int) string { return `"` + strings.Repeat("x", n-2) + `"` }
	answer := func(state, event, unknown string) string {
		return `{"auth_chain":[],"x":` + unknown + `,"event":` + event + `,"state":[` + state + `]}`
	}
	for name, c := range map[string]struct {
		text string
		ok   bool
	}{
		"large":                 {answer(element(maxEventText), element(maxMemberText), element(maxMemberText)), true},
		"event too large":       {answer(element(maxEventText+1), `1`, `1`), false},
		"event without end":     {`{"auth_chain":[` + strings.Repeat("[", 2*maxEventText), false},
		"member too large":      {answer(`1`, element(maxMemberText+1), `1`), false},
		"unknown one too large": {answer(`1`, `1`, element(maxMemberText+1)), false},
		"name too large":        {`{` + element(maxEventText+1) + `:1,"auth_chain":[],"state":[]}`, false},
		"number too large":      {answer(strings.Repeat("1", maxEventText+1), `1`, `1`), false},
	} {
		_, _, err := readAnswer(strings.NewReader(c.text), false)
		require.Equal(t, c.ok, err == nil, "%s: %v", name, err)
	}
	white := &answerReader{in: io.LimitReader(joinEndless(' '), 1<<40), max: 1 << 20}
	_, err := white.read(false, nil)
	require.ErrorContains(t, err, "larger than")
	require.LessOrEqual(t, cap(white.buf), 64<<10)
	long := &answerReader{in: io.MultiReader(strings.NewReader(`{"x":"`), joinEndless('x')), max: 1 << 40}
	_, err = long.read(false, nil)
	require.ErrorIs(t, err, errMalformed)
	require.LessOrEqual(t, cap(long.buf), 2*maxMemberText)
}

// joinEndless is a reader that never ends.
type joinEndless byte

func (c joinEndless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(c)
	}
	return len(b), nil
}

// The memory that reading takes does not grow with the answer, as long as nothing of it is kept.
func TestJoinAnswer_Memory(t *testing.T) {
	entries := func(count int) int64 {
		one := []byte(`{"x":"` + strings.Repeat("x", 1000) + `"},`)
		in := io.MultiReader(strings.NewReader(`{"auth_chain":[],"state":[`), &joinRepeat{text: one, left: count}, strings.NewReader(`1]}`))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := (&answerReader{in: in, max: 1 << 30}).read(false, func(string, []byte) error { return nil })
		require.NoError(t, err)
		runtime.ReadMemStats(&after)
		return int64(after.TotalAlloc - before.TotalAlloc)
	}
	entries(1)
	require.Less(t, entries(20_000)-entries(200), int64(256<<10))
}

// joinRepeat is text, left times.
type joinRepeat struct {
	text []byte
	left int
	rest []byte
}

func (r *joinRepeat) Read(b []byte) (int, error) {
	if len(r.rest) == 0 {
		if r.left == 0 {
			return 0, io.EOF
		}
		r.left--
		r.rest = r.text
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// SendJoin returns what the server said, unverified, in its order.
func TestSendJoin_Client(t *testing.T) {
	n := &joinNet{room: newJoinRoom(t, "10", "public")}
	c, _ := n.server(t, nil)
	join, _, err := c.memberEvent(context.Background(), joinVia, newMemberDraft(n.room.id, joinUser, "join"), `{"membership":"join"}`)
	require.NoError(t, err)
	n.answer = func(a *joinAnswer) {
		a.state = []value{`1`, `{"b":1,"a":2}`}
		a.rest["members_omitted"], a.rest["servers_in_room"] = "true", `["a.example"]`
	}
	req := &SendJoinRequest{Event: join, OmitMembers: true}
	answer, err := c.SendJoin(context.Background(), joinVia, req)
	require.NoError(t, err)
	var state []string
	for pdu, err := range answer.State {
		require.NoError(t, err)
		state = append(state, string(pdu))
	}
	require.Equal(t, []string{`1`, `{"b":1,"a":2}`}, state)
	for range answer.Auth {
		break
	}
	require.Equal(t, join.id, answer.Event.ID())
	require.Equal(t, []ServerName{"a.example"}, answer.Servers)
	n.answer = func(a *joinAnswer) { a.rest["event"] = "" }
	answer, err = c.SendJoin(context.Background(), joinVia, &SendJoinRequest{Event: join})
	require.NoError(t, err)
	require.Nil(t, answer.Event)
	for name, change := range map[string]func(a *joinAnswer){
		"event":   func(a *joinAnswer) { a.rest["event"] = "{}" },
		"omitted": func(a *joinAnswer) { a.rest["members_omitted"] = "1" },
	} {
		n.answer = change
		_, err := c.SendJoin(context.Background(), joinVia, req)
		require.ErrorContains(t, err, "malformed answer", name)
	}
	n.serve = func(*http.Request, string) *http.Response { return joinReply(200, `{"auth_chain":[`) }
	_, err = c.SendJoin(context.Background(), joinVia, req)
	require.ErrorContains(t, err, "malformed answer")
	n.serve = func(*http.Request, string) *http.Response {
		return &http.Response{StatusCode: 200, Body: io.NopCloser(iotest.ErrReader(errJoinSink))}
	}
	_, err = c.SendJoin(context.Background(), joinVia, req)
	require.ErrorIs(t, err, errJoinSink)
	var broken *Error
	require.ErrorAs(t, err, &broken)
	require.True(t, broken.Temporary(), "it says nothing against the answer")
	for name, req := range map[string]*SendJoinRequest{"no event": {}, "no member event": {Event: n.room.entry("m.room.topic", "")}, "of another server": {Event: n.room.entry(typeMember, string(joinCarol))}} {
		_, err := c.SendJoin(context.Background(), joinVia, req)
		require.ErrorIs(t, err, ErrInvalidParam, name)
	}
}

// FuzzSendJoinAnswer gives answers to the joins of rooms of two formats. Whatever is taken must be proven.
func FuzzSendJoinAnswer(f *testing.F) {
	versions := []RoomVersion{"1", "10", "12"}
	var rooms []*joinRoom
	for i, v := range versions {
		r := newJoinRoom(f, v, "restricted")
		rooms = append(rooms, r)
		honest := r.answer(r.fuzzedJoin().text)
		f.Add(i, false, false, honest.text())
		tampered := *honest
		tampered.state = slices.Clone(honest.state)
		tampered.state[5] = tampered.state[5].with("content", "{}")
		f.Add(i, false, true, tampered.text())
		honest.v1 = true
		f.Add(i, true, false, honest.text())
	}
	for _, x := range recordedAnswers(f, "send_join") {
		f.Add(max(slices.Index(versions, x.RoomVersion), 0), false, false, []byte(x.Response))
	}
	for _, text := range joinMalformed {
		f.Add(1, false, false, []byte(text))
	}
	f.Fuzz(func(t *testing.T, version int, v1, sink bool, answer []byte) {
		if version < 0 || version >= len(versions) {
			return
		}
		room := *rooms[version]
		room.t = t
		n, join := &joinNet{room: &room}, room.fuzzedJoin()
		c, _ := n.server(t, nil)
		req := &JoinRequest{Room: n.room.id, User: joinUser}
		got := 0
		if sink {
			req.Sink = func(e *Event, _ bool) error { got += len(e.JSON()); return nil }
		}
		n.serve = func(q *http.Request, endpoint string) *http.Response {
			switch {
			case v1 && strings.HasPrefix(q.URL.Path, "/_matrix/federation/v2/"):
				return joinReply(404, "")
			case endpoint == "event":
				return joinReply(404, "")
			}
			return &http.Response{StatusCode: 200, Body: io.NopCloser(bytes.NewReader(answer))}
		}
		try := joinTry{Client: c, req: req, via: joinVia}
		result, err := try.prove(context.Background(), join, true, false)
		require.LessOrEqual(t, got, 2*len(answer))
		if err != nil {
			require.Nil(t, result)
			return
		}
		require.Equal(t, join.text.with("signatures", ""), result.Event.text.with("signatures", ""))
		if !sink {
			requireProven(t, n, result)
		}
	})
}

// fuzzedJoin is Bob's join, the same every time.
func (r *joinRoom) fuzzedJoin() *Event {
	d := r.draft(joinUser, typeMember, string(joinUser), string(r.template().get("content")))
	return r.sign(d)
}
