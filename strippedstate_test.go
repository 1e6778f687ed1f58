package mxfed_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// srvPreview is one invite_room_state and what is made of it.
type srvPreview struct {
	state   any
	types   []string // of Invite.State, in order
	full    int      // how many of them are PDUs
	created bool     // Invite.Create is set
	wrong   string   // part of StateErr; empty: nil
	fail    error    // of Keys
}

// srvPreviews are previews from good to hostile of an invite in room version 10 or 1.
func srvPreviews(t *testing.T, s *srvSite, i *srvInvitation) map[string]srvPreview {
	v, create, rules := i.version, i.state[0], i.state[1]
	signed := func(p srvPDU) json.RawMessage { return p.sign(t, v, s.domain) }
	list := func(entries ...any) []any { return entries }
	entry := func(typ string) srvPDU {
		p := i.create.with("type", typ).with("content", map[string]any{"a": 1}).with("room_id", i.room)
		if srvGivenIDs(v) {
			p = p.with("event_id", "$"+typ+":domain")
		}
		return p
	}
	stripped := func(typ string) map[string]any {
		return map[string]any{"type": typ, "state_key": "", "sender": "@alice:domain", "content": map[string]any{"a": 1}}
	}
	brokenSignature := json.RawMessage(strings.Replace(string(signed(entry("m.room.name"))), `"depth":1`, `"depth":2`, 1))
	otherHash := json.RawMessage(strings.Replace(string(signed(entry("m.room.name"))), `"a":1`, `"a":2`, 1))
	gone := entry("m.room.name").with("sender", "@eve:gone.example").sign(t, v, newSrvPeer(t, "gone.example"))
	if srvGivenIDs(v) {
		gone = entry("m.room.name").with("sender", "@eve:gone.example").with("event_id", "$n:gone.example").sign(t, v, newSrvPeer(t, "gone.example"))
	}
	var many []any
	for n := range 51 {
		many = append(many, signed(entry("m.room.member").with("state_key", fmt.Sprintf("@u%d:domain", n))))
	}
	manyTypes := slices.Repeat([]string{"m.room.member"}, 49)
	var bad []any
	for member, v := range map[string]any{"type": 1, "state_key": nil, "sender": "alice", "content": "text"} {
		p := stripped("m.room.name")
		if p[member] = v; v == nil {
			delete(p, member)
		}
		bad = append(bad, p)
	}
	noCreate := "create event is missing"
	return map[string]srvPreview{
		"good":               {list(create, rules), []string{"m.room.create", "m.room.join_rules"}, 2, true, "", nil},
		"absent":             {nil, nil, 0, false, noCreate, nil},
		"null":               {json.RawMessage("null"), nil, 0, false, noCreate, nil},
		"object":             {map[string]any{}, nil, 0, false, noCreate, nil},
		"object with 0":      {map[string]any{"0": create}, nil, 0, false, noCreate, nil},
		"string":             {"x", nil, 0, false, noCreate, nil},
		"number":             {1, nil, 0, false, noCreate, nil},
		"empty":              {list(), nil, 0, false, noCreate, nil},
		"list of null":       {list(nil, create), []string{"m.room.create"}, 1, true, "entry 1 is no PDU", nil},
		"list of 1":          {list(create, 1), []string{"m.room.create"}, 1, true, "entry 2 is no PDU", nil},
		"list of {}":         {list(map[string]any{}), nil, 0, false, "entry 1 is no PDU", nil},
		"list of lists":      {list(list(create)), nil, 0, false, "entry 1 is no PDU", nil},
		"no create event":    {list(rules), []string{"m.room.join_rules"}, 1, false, noCreate, nil},
		"stripped":           {list(stripped("m.room.create"), stripped("m.room.name")), []string{"m.room.create", "m.room.name"}, 0, false, "entry 1 is no PDU", nil},
		"one stripped":       {list(create, stripped("m.room.name")), []string{"m.room.create", "m.room.name"}, 1, true, "entry 2 is no PDU", nil},
		"stripped, badly":    {append(list(create), bad...), []string{"m.room.create"}, 1, true, "entry 2 is no PDU", nil},
		"another room's":     {list(create, signed(entry("m.room.name").with("room_id", "!other:domain"))), []string{"m.room.create"}, 1, true, "another room", nil},
		"no state event":     {list(create, signed(entry("m.room.name").with("state_key", nil))), []string{"m.room.create"}, 1, true, "no state event", nil},
		"two creates":        {list(create, signed(i.create.with("origin_server_ts", 5))), []string{"m.room.create"}, 1, true, "two entries", nil},
		"two of a kind":      {list(create, rules, stripped("m.room.join_rules")), []string{"m.room.create", "m.room.join_rules"}, 2, true, "is no PDU", nil},
		"other version":      {list(signed(i.create.with("content", map[string]any{"creator": "@alice:domain", "room_version": "9"}))), []string{"m.room.create"}, 1, false, "another room version", nil},
		"version a number":   {list(signed(i.create.with("content", map[string]any{"creator": "@alice:domain", "room_version": 10}))), []string{"m.room.create"}, 1, false, "another room version", nil},
		"create not signed":  {list(i.create.sign(t, v), rules), []string{"m.room.join_rules"}, 1, false, "no valid signature", nil},
		"signature is wrong": {list(create, brokenSignature), []string{"m.room.create"}, 1, true, "bad signature", nil},
		"hash is wrong":      {list(create, otherHash), []string{"m.room.create", "m.room.name"}, 2, true, "", nil},
		"key not to be had":  {list(create, gone), []string{"m.room.create"}, 1, true, "", errors.New("a server does not answer")},
		"too many":           {append(list(create), many...), append([]string{"m.room.create"}, manyTypes...), 50, true, "more than 50", nil},
	}
}

// An invite with a poor preview is still one: what can be shown is passed on, and what is wrong is left to the host to
// judge. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func TestInvite_RoomState(t *testing.T) {
	for api, v := range map[string]mxfed.RoomVersion{"v1": "1", "v2": "10"} {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		pdu := i.event.sign(t, v, s.domain)
		for name, c := range srvPreviews(t, s, i) {
			t.Run(name+", "+api, func(t *testing.T) {
				s.reset()
				s.invited, s.keys.fail = nil, c.fail
				w := i.send(t, s, s.domain, api, pdu, c.state)
				require.Equal(t, 200, w.Code, "%s", w.Body)
				inv := s.invites[0]
				if c.wrong == "" {
					require.NoError(t, inv.StateErr)
				} else {
					require.ErrorContains(t, inv.StateErr, c.wrong)
					require.ErrorIs(t, inv.StateErr, mxfed.ErrInvalidParam)
				}
				c.requireState(t, inv)

				s.invited = func(_ context.Context, inv *mxfed.Invite) error { return inv.StateErr }
				if w = i.send(t, s, s.domain, api, pdu, c.state); c.wrong != "" {
					requireSrvError(t, w, 400, mxfed.ErrInvalidParam)
				} else {
					require.Equal(t, 200, w.Code)
				}
			})
		}
	}
}

func (c *srvPreview) requireState(t *testing.T, inv *mxfed.Invite) {
	var types []string
	full := 0
	for _, entry := range inv.State {
		types = append(types, entry.Type)
		require.True(t, json.Valid(entry.Content))
		if entry.Event != nil {
			require.Equal(t, inv.Event.RoomID(), entry.Event.RoomID())
			require.Equal(t, entry.Event.Content(), entry.Content)
			full++
		}
	}
	require.Equal(t, c.types, types)
	require.Equal(t, c.full, full)
	require.Equal(t, c.created, inv.Create != nil)
}

// The create event of room version 12 names the room by its hash.
func TestInvite_RoomState_HashedRoomID(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "12")
	s.invited = func(_ context.Context, inv *mxfed.Invite) error { return inv.StateErr }
	pdu := i.event.sign(t, "12", s.domain)
	require.Equal(t, 200, i.send(t, s, s.domain, "v2", pdu, i.state).Code)
	other := i.create.with("origin_server_ts", 5).sign(t, "12", s.domain)
	requireSrvError(t, i.send(t, s, s.domain, "v2", pdu, []json.RawMessage{other}), 400, mxfed.ErrInvalidParam)
	require.ErrorContains(t, s.invites[1].StateErr, "another room")
	named := i.create.with("room_id", i.room).sign(t, "12", s.domain)
	requireSrvError(t, i.send(t, s, s.domain, "v2", pdu, []json.RawMessage{named}), 400, mxfed.ErrInvalidParam)
	require.Nil(t, s.invites[2].Create)
}

// Previews beyond all measure are refused with the body, or cost no more than the first entries.
func TestInvite_RoomState_Limits(t *testing.T) {
	for api, v := range map[string]mxfed.RoomVersion{"v1": "1", "v2": "10"} {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		pdu := i.event.sign(t, v, s.domain)
		deep := json.RawMessage(strings.Repeat("[", 10000) + strings.Repeat("]", 10000))
		s.requireRefused(t, i.send(t, s, s.domain, api, pdu, []any{i.state[0], deep}), 400, mxfed.ErrNotJSON)
		s.requireRefused(t, i.send(t, s, s.domain, api, pdu, strings.Repeat("x", 10<<20)), 413, mxfed.ErrTooLarge)
		require.Zero(t, s.keys.asked.Load(), "not even keys were fetched")

		many := make([]any, 10000)
		for n := range many {
			many[n] = i.create.with("state_key", "").with("sender", fmt.Sprintf("@u:s%d.example", n)).with("type", fmt.Sprint(n))
		}
		s.reset()
		w := i.send(t, s, s.domain, api, pdu, many[:1000])
		require.Equal(t, 200, w.Code, "%s", w.Body)
		require.EqualValues(t, 2, s.keys.asked.Load(), "the request's keys and those of all events at once")
		require.LessOrEqual(t, len(s.invites[0].State), 50)
		s.reset()
		w = i.send(t, s, s.domain, api, pdu, slices.Repeat([]any{map[string]any{}}, 10000))
		require.Equal(t, 200, w.Code)
		require.Empty(t, s.invites[0].State)
	}
}

// In version 2 a preview inside the event is none. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func TestInvite_RoomState_OfTheOtherVersion(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "1")
	inside := i.event.with("unsigned", map[string]any{"invite_room_state": i.state, "age": 7})
	require.Equal(t, 200, i.send(t, s, s.domain, "v2", inside.sign(t, "1", s.domain), nil).Code)
	require.Empty(t, s.invites[0].State)
	require.Error(t, s.invites[0].StateErr)
}
