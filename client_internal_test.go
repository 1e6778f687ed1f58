package mxfed

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// This file tests how invites go out: Bob's server is in a room of its own and invites Alice, whose server answers.

// inviteNet is a network in which Alice's server countersigns invites.
type inviteNet struct {
	*joinNet
	answer func(v1 bool, event value) string // nil: as it should be
}

// newInviteNet returns Bob's client in a room of his that Alice is not in, and its network.
func newInviteNet(t testing.TB, v RoomVersion) (*inviteNet, *Client, *joinSignatures) {
	r := &joinRoom{t: t, rules: v.rules(), id: "!bobs:us.example"}
	if r.rules.hashRoomID {
		r.id = ""
	}
	create := `{"creator":"@bob:us.example","room_version":"` + string(v) + `"}`
	r.id = r.add(joinUser, typeCreate, "", create).room
	r.add(joinUser, typeMember, string(joinUser), `{"membership":"join"}`)
	r.add(joinUser, typeJoinRules, "", `{"join_rule":"invite"}`)
	r.add(joinUser, "m.room.topic", "", `{"topic":"tea"}`)
	n := &inviteNet{joinNet: &joinNet{room: r}}
	n.serve = func(q *http.Request, endpoint string) *http.Response {
		body, v1 := n.bodies[len(n.bodies)-1], strings.Contains(q.URL.Path, "/v1/")
		event := body.get("event")
		if v1 {
			event = body
		}
		signed := n.countersign(t, event)
		if n.answer != nil {
			return joinReply(200, n.answer(v1, signed))
		}
		return joinReply(200, inviteAnswer(v1, signed))
	}
	c, key := n.server(t, func(cfg *Config) {
		cfg.Signers = append(cfg.Signers, joinSigner(t, "second.example"))
		cfg.Rooms = RoomSourceFunc(func(context.Context, RoomID, RoomQuery) (*Room, error) {
			return &Room{Version: v, Latest: r.all[len(r.all)-1:], State: r.state}, nil
		})
	})
	return n, c, key
}

func inviteAnswer(v1 bool, event value) string {
	answer := object(field{"event", event})
	if v1 {
		answer = array("200", answer)
	}
	return string(answer)
}

func (n *inviteNet) countersign(t testing.TB, event value) value {
	var p eventParser
	e, err := p.parse(n.room.rules, []byte(event))
	require.NoError(t, err)
	e, err = approved{e}.sign(joinSigner(t, joinVia))
	require.NoError(t, err)
	return event.with("signatures", e.text.get("signatures"))
}

// What goes out is the event with the room's description, and what comes back adds one signature to it.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func TestInviteUser_Remote(t *testing.T) {
	for _, v := range joinVersions {
		n, c, key := newInviteNet(t, v)
		event, err := c.InviteUser(context.Background(), n.room.id, joinUser, joinAlice, []byte(`{"reason":"tea","membership":"join","join_authorised_via_users_server":"@bob:us.example"}`))
		require.NoError(t, err, v)
		require.Equal(t, []string{"v2 invite r.example"}, n.asked)
		body := n.bodies[0]
		require.Equal(t, quoted(v), body.get("room_version"))
		require.JSONEq(t, `{"reason":"tea","membership":"invite"}`, string(event.Content()))
		require.Equal(t, n.countersign(t, body.get("event")), event.text)
		require.Equal(t, []EventID{n.room.all[len(n.room.all)-1].id}, event.Prev())
		require.Equal(t, n.room.all[len(n.room.all)-1].depth+1, event.depth)
		var state []StateKey
		for entry := range body.get("invite_room_state").elements() {
			e, err := ParseEvent(v, []byte(entry))
			require.NoError(t, err, "full PDUs")
			require.Equal(t, n.room.entry(e.typ, e.stateKey).text, entry)
			state = append(state, StateKey{e.typ, e.stateKey})
		}
		require.Equal(t, []StateKey{{typeCreate, ""}, {typeJoinRules, ""}, {"m.room.topic", ""}, {typeMember, string(joinUser)}}, state)
		require.Len(t, key.events(), 1)
		_, err = new(eventParser).checkSignatures(event, eventKeys(joinSigner(t, "us.example")))
		require.NoError(t, err)
	}
}

// Users of own names need no call: their server signs here.
func TestInviteUser_Local(t *testing.T) {
	for _, v := range joinVersions {
		n, c, _ := newInviteNet(t, v)
		for user, signers := range map[UserID][]*Signer{"@dora:us.example": {joinSigner(t, "us.example")},
			"@emil:second.example": {joinSigner(t, "us.example"), joinSigner(t, "second.example")}} {
			event, err := c.InviteUser(context.Background(), n.room.id, joinUser, user, nil)
			require.NoError(t, err)
			message, servers := new(eventParser).signedBytes(event), 0
			for range event.text.get("signatures").members() {
				servers++
			}
			require.Equal(t, len(signers), servers)
			for _, s := range signers {
				require.NoError(t, event.signedBy(s.name, message, eventKeys(s)))
			}
		}
		require.Empty(t, n.asked)
	}
}

// What the room forbids is neither signed nor sent.
func TestInviteUser_Refused(t *testing.T) {
	for name, c := range map[string]struct {
		change       func(r *joinRoom)
		sender, user UserID
		content      string
		code         ErrorCode
	}{
		"sender not in the room": {nil, "@other:us.example", joinAlice, "", ErrForbidden},
		"sender has left":        {func(r *joinRoom) { r.add(joinUser, typeMember, string(joinUser), `{"membership":"leave"}`) }, joinUser, joinAlice, "", ErrForbidden},
		"banned":                 {func(r *joinRoom) { r.add(joinUser, typeMember, string(joinAlice), `{"membership":"ban"}`) }, joinUser, joinAlice, "", ErrForbidden},
		"in the room":            {func(r *joinRoom) { r.add(joinUser, typeMember, string(joinAlice), `{"membership":"join"}`) }, joinUser, joinAlice, "", ErrForbidden},
		"too little power": {func(r *joinRoom) {
			r.add(joinUser, typePowerLevels, "", `{"invite":50,"users":{"@bob:us.example":0}}`)
		}, joinUser, joinAlice, "", ErrForbidden},
		"himself":                {nil, joinUser, joinUser, "", ErrForbidden},
		"no user":                {nil, joinUser, "alice", "", ErrInvalidParam},
		"no server":              {nil, joinUser, "@alice:", "", ErrInvalidParam},
		"sender of another":      {nil, joinAlice, joinCarol, "", ErrInvalidParam},
		"content no object":      {nil, joinUser, joinAlice, `[]`, ErrBadJSON},
		"content no JSON":        {nil, joinUser, joinAlice, `{`, ErrBadJSON},
		"content of 64 KiB":      {nil, joinUser, joinAlice, `{"x":"` + strings.Repeat("x", maxEventSize) + `"}`, ErrTooLarge},
		"half an invite by mail": {nil, joinUser, joinAlice, `{"third_party_invite":{}}`, ErrForbidden},
	} {
		n, client, key := newInviteNet(t, "10")
		if c.change != nil {
			c.change(n.room)
		}
		_, err := client.InviteUser(context.Background(), n.room.id, c.sender, c.user, []byte(c.content))
		require.ErrorIs(t, err, c.code, name)
		require.Empty(t, n.asked, name)
		require.Empty(t, key.messages, name)
	}
	n, _, _ := newInviteNet(t, "10")
	c, key := n.server(t, nil)
	_, err := c.InviteUser(context.Background(), n.room.id, joinUser, joinAlice, nil)
	require.ErrorIs(t, err, ErrNotFound, "no room is known")
	require.Empty(t, key.messages)
}

// inviteOf is a finished invite of Alice.
func (n *inviteNet) inviteOf(t testing.TB) *InviteRequest {
	req := &InviteRequest{Event: n.room.sign(n.room.draft(joinUser, typeMember, string(joinAlice), `{"membership":"invite"}`))}
	req.State = slices.Clone(n.room.state)
	return req
}

// Only the signature of the invited user's server is taken from its answer, and nothing else may differ.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func TestInviteReply_Substituted(t *testing.T) {
	for _, v := range []RoomVersion{"1", "3", "10", "12"} {
		for name, echo := range joinEchoes {
			n, c, _ := newInviteNet(t, v)
			req := n.inviteOf(t)
			n.answer = func(v1 bool, event value) string {
				return inviteAnswer(v1, echo.change(&joinRoom{t: t, state: []*Event{
					n.room.entry("m.room.topic", ""), n.room.sign(n.room.draft(joinCarol, typeMember, string(joinCarol), `{"membership":"join"}`))}}, event))
			}
			answer, err := c.Invite(context.Background(), joinVia, req)
			if !echo.signed {
				require.ErrorContains(t, err, "r.example: invite: 200 M_UNKNOWN: malformed answer", "%s: %s", v, name)
				require.Equal(t, 502, ClientError(err).Status)
				continue
			}
			require.NoError(t, err, "%s: %s", v, name)
			require.Equal(t, n.countersign(t, req.Event.text), answer.Event.text, "%s: %s", v, name)
		}
		for name, answer := range map[string]string{"empty": ``, "empty object": `{}`, "a list": `[]`, "a pair": `[200,{}]`, "null": `null`,
			"event null": `{"event":null}`, "twice": `{"event":{},"event":{}}`, "text": `<html>`, "large": `{"x":"` + strings.Repeat("x", maxSmallReply) + `"}`} {
			n, c, _ := newInviteNet(t, v)
			n.answer = func(bool, value) string { return answer }
			_, err := c.Invite(context.Background(), joinVia, n.inviteOf(t))
			require.ErrorContains(t, err, "malformed answer", "%s: %s", v, name)
		}
	}
}

// Keys of the invited server that cannot be had leave the invite unverified, which may pass.
func TestInviteReply_Unverified(t *testing.T) {
	n, _, _ := newInviteNet(t, "10")
	for name, keys := range map[string]*joinKeys{"unknown": {unknown: map[ServerName]bool{joinVia: true}}, "down": {down: map[ServerName]bool{joinVia: true}}} {
		c, _ := n.server(t, func(cfg *Config) { cfg.Keys = keys })
		_, err := c.Invite(context.Background(), joinVia, n.inviteOf(t))
		require.Error(t, err)
		require.Equal(t, name == "down", strings.Contains(err.Error(), "could not be fetched"), err)
	}
}

// Nobody else can be asked to sign an invite, and nothing but an invite can be sent as one.
func TestInvite_RefusedHere(t *testing.T) {
	n, c, key := newInviteNet(t, "10")
	good := n.inviteOf(t)
	for name, req := range map[string]*InviteRequest{
		"no event":               {},
		"a topic":                {Event: n.room.entry("m.room.topic", "")},
		"a join":                 {Event: n.room.entry(typeMember, string(joinUser))},
		"sender of another name": {Event: n.room.sign(n.room.draft(joinCarol, typeMember, string(joinAlice), `{"membership":"invite"}`))},
		"user of another name":   {Event: n.room.sign(n.room.draft(joinUser, typeMember, string(joinCarol), `{"membership":"invite"}`))},
	} {
		_, err := c.Invite(context.Background(), joinVia, req)
		require.ErrorIs(t, err, ErrInvalidParam, name)
	}
	_, err := c.Invite(context.Background(), "third.example", good)
	require.ErrorIs(t, err, ErrInvalidParam)
	require.Empty(t, n.asked)
	require.Empty(t, key.messages)
}

// Every line of the vectors: whether version 1 is tried.
func TestInvite_OlderVersion(t *testing.T) {
	var published struct {
		Vectors []struct {
			RoomVersion RoomVersion `json:"room_version"`
			Status      int         `json:"v2_status"`
			Body        string      `json:"v2_body"`
			Retry       bool        `json:"retry_v1_recommended"`
		}
	}
	eventVectorFile(t, "derived_invite_fallback.json", &published)
	require.Len(t, published.Vectors, 80)
	for _, c := range published.Vectors {
		n, client, _ := newInviteNet(t, c.RoomVersion)
		honest := n.serve
		n.serve = func(q *http.Request, endpoint string) *http.Response {
			if strings.Contains(q.URL.Path, "/v2/") {
				return joinReply(c.Status, c.Body)
			}
			return honest(q, endpoint)
		}
		req := n.inviteOf(t)
		answer, err := client.Invite(context.Background(), joinVia, req)
		if !c.Retry {
			require.Error(t, err, "%+v", c)
			require.Len(t, n.asked, 1, "%+v", c)
			continue
		}
		require.NoError(t, err, "%+v", c)
		require.Equal(t, []string{"v2 invite r.example", "v1 invite r.example"}, n.asked)
		require.Equal(t, req.Event.text.with("unsigned", object(field{"invite_room_state", texts(req.State)})), n.bodies[1])
		require.Equal(t, n.countersign(t, req.Event.text), answer.Event.text, "without unsigned")
		for name, body := range map[string]string{"an object": `{"event":` + string(answer.Event.text) + `}`, "one": `[200]`, "no object": `[200,"x"]`,
			"three": `[200,{"event":` + string(answer.Event.text) + `},{}]`, "empty": `[]`, "swapped": `[{"event":` + string(answer.Event.text) + `},200]`} {
			n.answer = func(bool, value) string { return body }
			_, err := client.Invite(context.Background(), joinVia, req)
			require.Error(t, err, name)
		}
	}
}

// The body of version 1 is an event like any other: its description gives way to the limit, the create event last.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1inviteroomideventid
func TestInvite_OlderVersionIsOneEvent(t *testing.T) {
	n, _, _ := newInviteNet(t, "1")
	create := n.room.entry(typeCreate, "")
	entries := func(sizes ...int) (state []*Event) {
		for i, size := range sizes {
			state = append(state, n.room.sign(n.room.draft(joinUser, "org.example", fmt.Sprint(i), `{"x":"`+strings.Repeat("x", size)+`"}`)))
		}
		return state
	}
	invite := func(size int) *Event {
		return n.room.sign(n.room.draft(joinUser, typeMember, string(joinAlice), `{"membership":"invite","x":"`+strings.Repeat("x", size)+`"}`))
	}
	for name, c := range map[string]struct {
		content int // of the invite, in bytes; negative: that much below the limit
		state   []*Event
		kept    int // after the create event; -1: nothing at all
	}{
		"all fit":                {10, append(entries(10, 20), create), 2},
		"none given":             {10, nil, -1},
		"the last give way":      {10, append(entries(20_000, 20_000, 20_000, 20_000), create), 3},
		"one too large":          {10, append(entries(64_000), create), 0},
		"all give way":           {64_000, append(entries(2_000, 2_000), create), 0},
		"the create event, last": {-100, append(entries(10), create), -1},
		"nothing to give way":    {-1, nil, -1},
	} {
		if c.content < 0 {
			c.content += maxEventSize - len(invite(0).text)
		}
		req := &InviteRequest{Event: invite(c.content), State: c.state}
		body := req.v1()
		require.LessOrEqual(t, len(body), maxEventSize, name)
		require.Equal(t, req.Event.text, body.with("unsigned", ""), name)
		state := slices.Collect(body.get("unsigned").get("invite_room_state").elements())
		require.Len(t, state, c.kept+1, name)
		if c.kept >= 0 {
			require.Equal(t, create.text, state[0], name)
		}
		for i, entry := range state[min(1, len(state)):] {
			require.Equal(t, c.state[i].text, entry, name)
		}
	}
	body := func(size int) value { return (&InviteRequest{Event: invite(size), State: []*Event{create}}).v1() }
	most := maxEventSize - len(body(0))
	require.Len(t, body(most), maxEventSize)
	require.NotEmpty(t, body(most).get("unsigned"))
	require.Equal(t, invite(most+1).text, body(most+1), "one byte more")
}

// FuzzInviteAnswer: whatever the invited user's server answers, what comes of it is our event and its valid signature.
func FuzzInviteAnswer(f *testing.F) {
	var nets []*inviteNet
	var requests []*InviteRequest
	versions := []RoomVersion{"1", "10", "12"}
	for i, v := range versions {
		n, _, _ := newInviteNet(f, v)
		req := n.inviteOf(f)
		nets, requests = append(nets, n), append(requests, req)
		for _, v1 := range []bool{false, true} {
			f.Add(i, v1, []byte(inviteAnswer(v1, n.countersign(f, req.Event.text))))
		}
		for _, echo := range joinEchoes {
			if name := echo.change; echo.plain {
				f.Add(i, false, []byte(inviteAnswer(false, name(nil, n.countersign(f, req.Event.text)))))
			}
		}
	}
	for _, x := range recordedAnswers(f, "invite") {
		f.Add(max(slices.Index(versions, x.RoomVersion), 0), false, []byte(x.Response))
	}
	f.Fuzz(func(t *testing.T, version int, v1 bool, answer []byte) {
		if version < 0 || version >= len(versions) {
			return
		}
		n, req := nets[version], requests[version]
		net := &joinNet{room: &joinRoom{t: t}, serve: func(q *http.Request, _ string) *http.Response {
			if v1 && strings.Contains(q.URL.Path, "/v2/") {
				return joinReply(404, "")
			}
			return joinReply(200, string(answer))
		}}
		c, key := net.server(t, nil)
		got, err := c.Invite(context.Background(), joinVia, req)
		require.Empty(t, key.events())
		if err == nil {
			require.Equal(t, n.countersign(t, req.Event.text), got.Event.text)
		}
	})
}
