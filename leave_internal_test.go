package mxfed

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// This file tests the leaving and knocking side against answers of every kind.

// memberNet is a network in which every server answers as one in the room does: with a template of Bob's leave or knock,
// and then that it has taken the event.
type memberNet struct {
	*joinNet
	membership string
	taken      string                                                // the answer to send_*
	change     func(answer value) value                              // alters the answer to make_*
	fault      func(q *http.Request, endpoint string) *http.Response // answers before all that; nil: goes on
}

func newMemberNet(t testing.TB, v RoomVersion, membership string) *memberNet {
	n := &memberNet{joinNet: &joinNet{room: newJoinRoom(t, v, "knock")}, membership: membership, taken: "{}"}
	n.serve = func(q *http.Request, endpoint string) *http.Response {
		if n.fault != nil {
			if r := n.fault(q, endpoint); r != nil {
				return r
			}
		}
		switch {
		case endpoint == "make_"+membership && n.change != nil:
			return joinReply(200, string(n.change(n.room.templateOf(membership))))
		case endpoint == "make_"+membership:
			return joinReply(200, string(n.room.templateOf(membership)))
		case endpoint == "send_leave" && strings.Contains(q.URL.Path, "/v1/"):
			return joinReply(200, "[200,"+n.taken+"]")
		case endpoint == "send_"+membership:
			return joinReply(200, n.taken)
		}
		return nil
	}
	return n
}

// leave is Bob's attempt to leave; change alters his request.
func (n *memberNet) leave(t testing.TB, change func(*LeaveRequest)) (*Event, error) {
	c, _ := n.server(t, nil)
	return n.leaveWith(c, change)
}

func (n *memberNet) leaveWith(c *Client, change func(*LeaveRequest)) (*Event, error) {
	req := &LeaveRequest{Room: n.room.id, User: joinUser, Via: []ServerName{joinVia}}
	if change != nil {
		change(req)
	}
	return c.Leave(context.Background(), req)
}

// knock is Bob's attempt to knock.
func (n *memberNet) knock(t testing.TB, change func(*KnockRequest)) (*KnockResult, error) {
	c, _ := n.server(t, nil)
	req := &KnockRequest{Room: n.room.id, User: joinUser, Via: []ServerName{joinVia}}
	if change != nil {
		change(req)
	}
	return c.Knock(context.Background(), req)
}

// Bob leaves, knowing the room's version or not, with the event that is returned and no other.
func TestLeave_Honest(t *testing.T) {
	for _, v := range joinVersions {
		for _, known := range []RoomVersion{"", v} {
			n := newMemberNet(t, v, "leave")
			c, key := n.server(t, nil)
			event, err := n.leaveWith(c, func(r *LeaveRequest) { r.Version, r.Content = known, []byte(`{"reason":"tea","membership":"join"}`) })
			require.NoError(t, err)
			require.Equal(t, []string{"v1 make_leave r.example", "v2 send_leave r.example"}, n.asked)
			require.Equal(t, n.bodies[1], event.text)
			require.Len(t, key.events(), 1)
			require.Equal(t, `{"membership":"leave","reason":"tea"}`, string(event.content))
			require.True(t, event.is(typeMember, string(joinUser)) && event.sender == joinUser && event.room == n.room.id)
			require.Equal(t, v, event.Version())
		}
	}
}

// What a host asks for in vain reaches no other server.
func TestMember_RefusedHere(t *testing.T) {
	for name, c := range map[string]struct {
		user    UserID
		content string
	}{
		"user of another server": {joinCarol, `{}`},
		"no user":                {"bob:us.example", `{}`},
		"no user at all":         {"", `{}`},
		"content no object":      {joinUser, `[]`},
		"content no JSON":        {joinUser, `{`},
		"content with floats":    {joinUser, `{"x":0.5}`},
	} {
		n := newMemberNet(t, "10", "leave")
		_, err := n.leave(t, func(r *LeaveRequest) { r.User, r.Content = c.user, []byte(c.content) })
		require.Error(t, err, name)
		require.NotErrorAs(t, err, new(*LeaveError), name) // no server had a chance to take it
		_, err = n.knock(t, func(r *KnockRequest) { r.User, r.Content = c.user, []byte(c.content) })
		require.Error(t, err, name)
		require.Empty(t, n.asked, name)
	}
}

// SendLeave and SendKnock send what they are named after, of local users, and nothing else.
func TestSendMember_RefusedHere(t *testing.T) {
	n := newMemberNet(t, "10", "leave")
	c, _ := n.server(t, nil)
	made := func(sender UserID, membership string) *Event {
		return n.room.sign(n.room.draft(sender, typeMember, string(sender), `{"membership":"`+membership+`"}`))
	}
	topic := n.room.sign(n.room.draft(joinUser, "m.room.topic", "", `{"membership":"leave"}`))
	for name, c := range map[string]struct {
		send func(e *Event) error
		own  string
	}{
		"leave": {func(e *Event) error { return c.SendLeave(context.Background(), joinVia, &SendLeaveRequest{Event: e}) }, "leave"},
		"knock": {func(e *Event) error {
			_, err := c.SendKnock(context.Background(), joinVia, &SendKnockRequest{Event: e})
			return err
		}, "knock"},
	} {
		for _, membership := range []string{"join", "leave", "knock", "ban", "invite"} {
			if membership != c.own {
				require.ErrorIs(t, c.send(made(joinUser, membership)), ErrInvalidParam, name)
			}
		}
		require.ErrorIs(t, c.send(nil), ErrInvalidParam)
		require.ErrorIs(t, c.send(topic), ErrInvalidParam)
		require.ErrorIs(t, c.send(made(joinAlice, c.own)), ErrInvalidParam)
	}
	require.Empty(t, n.asked)
}

// A room whose version this server does not know, or which is not that of the invite, is left without a word to others.
func TestLeave_Version(t *testing.T) {
	for name, c := range map[string]struct {
		room, wanted RoomVersion
		answer       value // room_version in the template; "" for none
		ok           bool
	}{
		"not known":                  {"10", "", `"10"`, true},
		"as it was":                  {"10", "10", `"10"`, true},
		"another one":                {"10", "11", `"10"`, false},
		"an older one":               {"10", "9", `"10"`, false},
		"of another form":            {"10", "1", `"10"`, false},
		"unknown to us":              {"10", "", `"org.example"`, false},
		"unknown to us, was known":   {"10", "10", `"org.example"`, false},
		"not named, is 1":            {"1", "1", "", true},
		"not named, is 2":            {"2", "2", "", true},
		"empty, is 2":                {"2", "2", `""`, true},
		"not named, nothing known":   {"1", "", "", true},
		"not named, was a newer one": {"1", "3", "", false},
		"not named, of another form": {"10", "10", "", false},
		"2 for 1":                    {"2", "1", `"2"`, false},
		"null":                       {"10", "10", `null`, false},
		"a number":                   {"10", "10", `10`, false},
	} {
		n := newMemberNet(t, c.room, "leave")
		n.change = func(answer value) value { return answer.with("room_version", c.answer) }
		_, err := n.leave(t, func(r *LeaveRequest) { r.Version = c.wanted })
		if c.ok {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorAs(t, err, new(*LeaveError), name)
		require.Equal(t, []string{"v1 make_leave r.example"}, n.asked, "%s: nothing is sent", name)
	}
	n := newMemberNet(t, "10", "leave")
	c, key := n.server(t, func(cfg *Config) { cfg.Versions = []RoomVersion{"9", "11"} })
	_, err := n.leaveWith(c, nil)
	require.ErrorAs(t, err, new(*LeaveError))
	require.ErrorIs(t, err, ErrIncompatibleRoomVersion)
	require.Empty(t, key.events(), "what is not understood is not signed")
}

// Servers are asked in order, each once, ten at most, and each error is kept.
func TestLeave_Via(t *testing.T) {
	via := []ServerName{"", "no name", "us.example", "x.example/", joinVia, joinVia}
	for i := range 12 {
		via = append(via, ServerName(fmt.Sprintf("s%d.example", i)), "us.example")
	}
	n := newMemberNet(t, "10", "leave")
	for last := range 13 {
		n.asked = nil
		n.fault = func(q *http.Request, endpoint string) *http.Response {
			if q.Host == fmt.Sprintf("s%d.example", last-1) || q.Host == "r.example" && last == 0 {
				return nil
			}
			return joinReply(403, `{"errcode":"M_FORBIDDEN","error":"says `+q.Host+`"}`)
		}
		_, err := n.leave(t, func(r *LeaveRequest) { r.Via = via })
		want := []string{"v1 make_leave r.example"}
		for i := range min(last, maxLeaveServers-1) {
			want = append(want, fmt.Sprintf("v1 make_leave s%d.example", i))
		}
		if last < maxLeaveServers {
			require.NoError(t, err)
			want = append(want, strings.Replace(want[last], "v1 make", "v2 send", 1))
		}
		require.Equal(t, want, n.asked)
		if last < maxLeaveServers {
			continue
		}
		var failed *LeaveError
		require.ErrorAs(t, err, &failed)
		require.Equal(t, n.room.id, failed.Room)
		require.ErrorContains(t, err, "mxfed: leave !room:r.example: ")
		var servers []ServerName
		walkErrors(err, func(e *Error) { servers = append(servers, e.Server) })
		require.Equal(t, append([]ServerName{"", "", ""}, "r.example", "s0.example", "s1.example", "s2.example", "s3.example", "s4.example",
			"s5.example", "s6.example", "s7.example", "s8.example"), servers)
		require.ErrorContains(t, err, "says s8.example")
		require.ErrorContains(t, err, "no name")
		told := ClientError(err)
		require.Equal(t, []any{403, ErrForbidden, "says r.example"}, []any{told.Status, told.Code, told.Message})
	}
}

// That there is nobody to ask is a LeaveError too: the host then ends the invite alone.
func TestLeave_Nobody(t *testing.T) {
	n := newMemberNet(t, "10", "leave")
	for name, via := range map[string][]ServerName{"none": nil, "us": {"us.example"}, "no names": {"", "x y"}} {
		_, err := n.leave(t, func(r *LeaveRequest) { r.Via = via })
		var failed *LeaveError
		require.ErrorAs(t, err, &failed, name)
		require.Error(t, failed.Err, name)
		require.Equal(t, name != "no names", errors.Is(err, ErrNotFound), name)
		require.Equal(t, name == "no names", errors.Is(err, ErrInvalidParam), name)
		_, err = n.knock(t, func(r *KnockRequest) { r.Via = via })
		require.Equal(t, name != "no names", errors.Is(err, ErrNotFound), name)
		require.Equal(t, name == "no names", errors.Is(err, ErrInvalidParam), name)
	}
	require.Empty(t, n.asked)
}

// When its context ends, nobody is asked any more, and it is not known that nobody would take the leave.
func TestMember_ContextEnds(t *testing.T) {
	for _, membership := range []string{"leave", "knock"} {
		for _, at := range []string{"make_", "send_"} {
			n := newMemberNet(t, "10", membership)
			ctx, cancel := context.WithCancel(context.Background())
			n.fault = func(q *http.Request, endpoint string) *http.Response {
				if strings.HasPrefix(endpoint, at) {
					cancel()
					return joinReply(502, `{}`)
				}
				return nil
			}
			c, _ := n.server(t, nil)
			via := []ServerName{joinVia, "next.example"}
			var err error
			if membership == "leave" {
				_, err = c.Leave(ctx, &LeaveRequest{Room: n.room.id, User: joinUser, Via: via})
			} else {
				_, err = c.Knock(ctx, &KnockRequest{Room: n.room.id, User: joinUser, Via: via})
			}
			require.ErrorIs(t, err, context.Canceled)
			require.NotErrorAs(t, err, new(*LeaveError))
			var answer *Error
			require.ErrorAs(t, err, &answer)
			require.Equal(t, joinVia, answer.Server)
			require.False(t, slices.ContainsFunc(n.asked, func(a string) bool { return strings.Contains(a, "next") }))
			require.Len(t, n.asked, map[string]int{"make_": 1, "send_": 2}[at])
		}
	}
}

// A leave goes to the older version of the endpoint when the newer one is missing, and only then; never with NoV1. A knock
// has none to go to.
func TestLeave_OlderVersion(t *testing.T) {
	forEachOlder(func(status int, body string, noV1, retried bool) {
		for _, membership := range []string{"leave", "knock"} {
			n := newMemberNet(t, "10", membership)
			newest := map[string]string{"leave": "/_matrix/federation/v2/send_leave/", "knock": "/_matrix/federation/v1/send_knock/"}[membership]
			n.fault = func(q *http.Request, endpoint string) *http.Response {
				if strings.HasPrefix(q.URL.Path, newest) {
					return joinReply(status, body)
				}
				return nil
			}
			c, _ := n.server(t, func(cfg *Config) { cfg.NoV1 = noV1 })
			var err error
			if membership == "leave" {
				_, err = n.leaveWith(c, nil)
			} else {
				_, err = c.Knock(context.Background(), &KnockRequest{Room: n.room.id, User: joinUser, Via: []ServerName{joinVia}})
			}
			if membership == "knock" || !retried {
				require.Error(t, err, "%d %s", status, body)
				require.Len(t, n.asked, 2, "%d %s", status, body)
				continue
			}
			require.NoError(t, err, "%d %s", status, body)
			require.Equal(t, []string{"v1 make_leave r.example", "v2 send_leave r.example", "v1 send_leave r.example"}, n.asked)
			require.Equal(t, n.bodies[1], n.bodies[2])
		}
	})
}

// What the older version of send_leave answers is a pair; what the newer one does, any JSON.
func TestLeave_Answers(t *testing.T) {
	for answer, ok := range map[string][2]bool{ // by version 1, by version 2
		`{}`: {false, true}, `{"x":1}`: {false, true}, `[200,{}]`: {true, true}, `[200,{"x":1}]`: {true, true}, `[]`: {false, true},
		`[200]`: {false, true}, `[200,[]]`: {false, true}, `[200,{},1]`: {false, true}, `null`: {false, true}, ``: {false, false}, `{`: {false, false},
		`<html>`: {false, false}, `{}{}`: {false, false},
	} {
		for i, version := range []string{"/v1/", "/v2/"} {
			n := newMemberNet(t, "10", "leave")
			n.fault = func(q *http.Request, endpoint string) *http.Response {
				switch {
				case endpoint != "send_leave":
					return nil
				case strings.Contains(q.URL.Path, version):
					return joinReply(200, answer)
				}
				return joinReply(404, ``)
			}
			_, err := n.leave(t, nil)
			require.Equal(t, ok[i], err == nil, "%s %s: %v", version, answer, err)
			if err != nil {
				require.Equal(t, 502, ClientError(err).Status)
			}
		}
	}
}

// The knock that is sent is the one that is returned, with what the room shows.
func TestKnock_Honest(t *testing.T) {
	for _, v := range joinVersions {
		n := newMemberNet(t, v, "knock")
		n.taken = `{"knock_room_state":` + string(texts([]*Event{n.room.entry(typeCreate, ""), n.room.entry(typeJoinRules, "")})) + `}`
		result, err := n.knock(t, func(r *KnockRequest) { r.Content = []byte(`{"reason":"tea","membership":"join","displayname":"Bob"}`) })
		if !v.rules().knock { // https://spec.matrix.org/v1.19/rooms/v7/
			require.ErrorContains(t, err, "do not know knocks")
			require.Len(t, n.asked, 1)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, []string{"v1 make_knock r.example", "v1 send_knock r.example"}, n.asked)
		require.Equal(t, n.bodies[1], result.Event.text)
		require.Equal(t, `{"displayname":"Bob","membership":"knock","reason":"tea"}`, string(result.Event.content))
		require.True(t, result.Event.is(typeMember, string(joinUser)) && result.Event.sender == joinUser && result.Event.room == n.room.id)
		require.Equal(t, joinVia, result.Via)
		require.NoError(t, result.StateErr)
		require.Len(t, result.State, 2)
		require.Equal(t, n.room.entry(typeCreate, "").text, result.State[0].Event.text)
	}
}

// Rooms that know knocks are younger than room versions: a template without one is none.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_knockroomiduserid
func TestKnock_VersionNotNamed(t *testing.T) {
	for _, v := range joinVersions {
		for _, unnamed := range []value{"", `""`} {
			n := newMemberNet(t, v, "knock")
			n.change = func(answer value) value { return answer.with("room_version", unnamed) }
			_, err := n.knock(t, func(r *KnockRequest) { r.Via = []ServerName{joinVia, "next.example"} })
			require.Error(t, err)
			require.Equal(t, []string{"v1 make_knock r.example", "v1 make_knock next.example"}, n.asked, "nothing is sent")
		}
	}
}

// memberShown is what a server shows to Bob and what is made of it.
type memberShown struct {
	answer string
	types  []string // of State, in order
	full   int      // how many of them are PDUs
	wrong  string   // part of StateErr; empty: nil
}

func memberShownCases(r *joinRoom) map[string]memberShown {
	create, rules, topic := r.entry(typeCreate, "").text, r.entry(typeJoinRules, "").text, r.entry("m.room.topic", "").text
	list := func(entries ...value) string { return `{"knock_room_state":` + string(array(entries...)) + `}` }
	stripped := func(typ string) value {
		return object(field{"content", `{"a":1}`}, field{"sender", quoted(joinAlice)}, field{"state_key", `""`}, field{"type", quoted(typ)})
	}
	signed := func(change func(d *draft)) value {
		d := r.draft(joinAlice, "m.room.name", "", `{"name":"x"}`)
		change(d)
		return r.sign(d).text
	}
	others := signed(func(d *draft) {
		if d.room = "!other:r.example"; r.rules.hashRoomID {
			d.room = "!ckKSZ9vP7FTFzKQE9KZFH6ayI9HDvziQvo4Thq_HYn8"
		}
	})
	message := signed(func(d *draft) { d.stateKey = nil })
	second := signed(func(d *draft) { d.typ = "m.room.topic" })
	noCreate := "create event is missing"
	cases := map[string]memberShown{
		"all":                 {list(create, rules, topic), []string{typeCreate, typeJoinRules, "m.room.topic"}, 3, ""},
		"more members":        {`{"x":1,"knock_room_state":[` + string(create) + `]}`, []string{typeCreate}, 1, ""},
		"no create event":     {list(rules), []string{typeJoinRules}, 1, noCreate},
		"signature is wrong":  {list(create, topic.with("depth", "99")), []string{typeCreate}, 1, "not genuine"},
		"no signature":        {list(create, topic.with("signatures", "{}")), []string{typeCreate}, 1, "not genuine"},
		"create not signed":   {list(create.with("signatures", "{}"), rules), []string{typeJoinRules}, 1, "not genuine"},
		"another room's":      {list(create, others), []string{typeCreate}, 1, "another room"},
		"twice":               {list(create, topic, second), []string{typeCreate, "m.room.topic"}, 2, "two entries"},
		"no state":            {list(create, message), []string{typeCreate}, 1, "no state event"},
		"no objects":          {list("1", "null", create, `"x"`, "[]"), []string{typeCreate}, 1, "entry 1 is no PDU"},
		"stripped":            {list(stripped(typeCreate), stripped("m.room.name")), []string{typeCreate, "m.room.name"}, 0, "entry 1 is no PDU"},
		"one stripped":        {list(create, stripped("m.room.name")), []string{typeCreate, "m.room.name"}, 1, "entry 2 is no PDU"},
		"stripped, no sender": {list(create, stripped("m.room.name").with("sender", "")), []string{typeCreate}, 1, "entry 2 is no PDU"},
	}
	for name, answer := range map[string]string{"missing": `{}`, "null": `{"knock_room_state":null}`, "an object": `{"knock_room_state":{"0":{}}}`,
		"a string": `{"knock_room_state":"x"}`, "a number": `{"knock_room_state":1}`, "empty": `{"knock_room_state":[]}`, "a list around it": `[` + list(create) + `]`,
		"no object": `null`, "of another name": `{"invite_room_state":[` + string(create) + `]}`} {
		cases[name] = memberShown{answer, nil, 0, noCreate}
	}
	return cases
}

// A knock was taken whatever the other server shows; what cannot be shown to a user is left out, and told.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1send_knockroomideventid
func TestKnock_Shown(t *testing.T) {
	for _, v := range joinVersions[6:] {
		n := newMemberNet(t, v, "knock")
		for name, c := range memberShownCases(n.room) {
			n.taken = c.answer
			result, err := n.knock(t, nil)
			require.NoError(t, err, name)
			if c.wrong == "" {
				require.NoError(t, result.StateErr, name)
			} else {
				require.ErrorContains(t, result.StateErr, c.wrong, name)
			}
			var types []string
			full := 0
			for _, s := range result.State {
				types = append(types, s.Type)
				require.True(t, value(s.Content).isObject())
				if s.Event != nil {
					full++
				}
			}
			require.Equal(t, c.types, types, "%s %s", v, name)
			require.Equal(t, c.full, full, name)
		}
	}
}

// However much is shown, no more than the first entries are looked at, and the keys of all are asked for at once.
func TestKnock_ShownIsBounded(t *testing.T) {
	n := newMemberNet(t, "10", "knock")
	entries := []value{n.room.entry(typeCreate, "").text}
	for i := range 60 {
		server := ServerName(fmt.Sprintf("s%d.example", i))
		d := n.room.draft("@u:"+UserID(server), "m.room.name", fmt.Sprint(i), `{}`)
		entries = append(entries, n.room.sign(d).text)
	}
	for range 10_000 {
		entries = append(entries, "{}")
	}
	n.taken = `{"knock_room_state":` + string(array(entries...)) + `}`
	keys := &joinKeys{}
	c, _ := n.server(t, func(cfg *Config) { cfg.Keys = keys })
	result, err := c.Knock(context.Background(), &KnockRequest{Room: n.room.id, User: joinUser, Via: []ServerName{joinVia}})
	require.NoError(t, err)
	require.Len(t, result.State, maxPreview)
	require.ErrorContains(t, result.StateErr, "more than 50")
	require.Len(t, keys.calls, 1)
	require.Len(t, keys.calls[0], maxPreview)

	n.taken = `{"knock_room_state":[` + strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000) + `]}`
	_, err = n.knock(t, nil)
	require.ErrorContains(t, err, "malformed")
	n.taken = `{"knock_room_state":["` + strings.Repeat("x", maxSmallReply) + `"]}`
	_, err = n.knock(t, nil)
	require.ErrorContains(t, err, "larger")
}

// An entry whose key cannot be had is left out without blame; one whose content was altered is shown without the content.
func TestKnock_ShownInDoubt(t *testing.T) {
	n := newMemberNet(t, "10", "knock")
	carol := n.room.sign(n.room.draft(joinCarol, "m.room.name", "", `{"name":"x"}`)).text
	altered := n.room.entry("m.room.topic", "").text.with("content", `{"topic":"forged"}`)
	n.taken = `{"knock_room_state":` + string(array(n.room.entry(typeCreate, "").text, carol, altered)) + `}`
	c, _ := n.server(t, func(cfg *Config) { cfg.Keys = &joinKeys{down: map[ServerName]bool{joinCarol.Server(): true}} })
	result, err := c.Knock(context.Background(), &KnockRequest{Room: n.room.id, User: joinUser, Via: []ServerName{joinVia}})
	require.NoError(t, err)
	require.NoError(t, result.StateErr)
	require.Len(t, result.State, 2)
	require.Equal(t, "m.room.topic", result.State[1].Type)
	require.Equal(t, "{}", string(result.State[1].Content))
}
