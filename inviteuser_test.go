package mxfed_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
)

// This file tests what an invite tells the invited user's server about the room, byte for byte as it arrives over TLS.

// outInvited is a server whose users are invited. It notes the bodies of version 2 and 1 of the endpoint.
type outInvited struct {
	*joinSite
	old bool // it only knows version 1

	mu     sync.Mutex
	v2, v1 []byte
}

func newOutInvited(t *testing.T) *outInvited {
	s := new(outInvited)
	s.joinSite = newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/invite/") {
			return false
		}
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		s.mu.Lock()
		defer s.mu.Unlock()
		if strings.Contains(r.URL.Path, "/v1/") {
			s.v1 = body
			return false
		}
		if s.v2 = body; s.old {
			mxfed.WriteError(w, mxfed.ErrUnrecognized)
		}
		return s.old
	}, nil)
	return s
}

// outMember is the membership that sender gives to user.
func outMember(sender, user mxfed.UserID, membership string) *mxfed.Draft {
	d := memhost.State("m.room.member", string(user), `{"membership":"`+membership+`"}`)
	d.Sender = sender
	return d
}

// outRoom is a room from which somebody is invited.
type outRoom struct {
	state   []*mxfed.Draft // as its creator, unless they say who
	inviter mxfed.UserID   // "": its creator
	want    []string       // entries, besides the create event and the inviter
}

// outRooms are rooms of a server; other and guest are users of it, invited is the user to invite.
func outRooms(other, guest, invited mxfed.UserID) map[string]outRoom {
	const stranger = "@stranger:third.example"
	public := memhost.State("m.room.join_rules", "", `{"join_rule":"public"}`)
	rooms := map[string]outRoom{
		"nothing else": {},
		"everything that describes it": {want: []string{"m.room.avatar", "m.room.canonical_alias", "m.room.encryption", "m.room.join_rules", "m.room.name", "m.room.topic"},
			state: []*mxfed.Draft{memhost.State("m.room.topic", "", `{"topic":"tea","m.topic":{"m.text":[{"body":"tea"}]}}`), memhost.State("m.room.name", "", `{"name":"Küche <&>"}`),
				memhost.State("m.room.encryption", "", `{"algorithm":"m.megolm.v1.aes-sha2"}`), memhost.State("m.room.avatar", "", `{"url":"mxc://a.example/x"}`),
				memhost.State("m.room.canonical_alias", "", `{"alias":"#x:a.example"}`), public}},
		"what does not describe it": {state: []*mxfed.Draft{memhost.State("m.room.history_visibility", "", `{"history_visibility":"shared"}`),
			memhost.State("m.room.guest_access", "", `{"guest_access":"can_join"}`), memhost.State("m.room.server_acl", "", `{"allow":["*"]}`),
			memhost.State("m.room.power_levels", "", `{"state_default":0}`), memhost.State("m.room.pinned_events", "", `{"pinned":[]}`),
			memhost.State("m.space.child", "!x:a.example", `{"via":["a.example"]}`), memhost.State("org.example", "", `{}`)}},
		"third-party invites": {state: []*mxfed.Draft{memhost.State("m.room.third_party_invite", "token", `{"display_name":"e...@...","key_validity_url":"https://id.example/","public_key":"AAAA"}`)}},
		"other members": {want: []string{"m.room.join_rules"}, state: []*mxfed.Draft{public, outMember(other, other, "join"), outMember(guest, guest, "join"),
			outMember(guest, guest, "leave"), outMember("", stranger, "ban"), outMember("", "@x:third.example", "invite"), outMember("", invited, "ban"), outMember("", invited, "leave")}},
		"inviter is not the creator": {want: []string{"m.room.join_rules"}, inviter: other, state: []*mxfed.Draft{public, outMember(other, other, "join"), outMember(guest, guest, "join")}},
		"inviter has come back": {want: []string{"m.room.join_rules"}, inviter: other, state: []*mxfed.Draft{public, outMember(other, other, "join"),
			outMember(other, other, "leave"), outMember(other, other, "join")}},
		"changed": {want: []string{"m.room.name"}, state: []*mxfed.Draft{memhost.State("m.room.name", "", `{"name":"a"}`),
			memhost.State("m.room.name", "", `{"name":"b"}`), memhost.State("m.room.name", "", `{"name":"c"}`)}},
		"emptied": {want: []string{"m.room.name", "m.room.topic"}, state: []*mxfed.Draft{memhost.State("m.room.name", "", `{}`), memhost.State("m.room.topic", "", `{"topic":null}`)}},
	}
	var elsewhere []*mxfed.Draft
	for _, typ := range []string{"m.room.avatar", "m.room.canonical_alias", "m.room.encryption", "m.room.join_rules", "m.room.name", "m.room.topic"} {
		rooms["only "+typ] = outRoom{want: []string{typ}, state: []*mxfed.Draft{memhost.State(typ, "", `{"join_rule":"knock"}`)}}
		elsewhere = append(elsewhere, memhost.State(typ, "x", `{"join_rule":"public"}`))
	}
	rooms["under other keys"] = outRoom{state: elsewhere}
	return rooms
}

// make makes the room and returns it with its inviter and the entries that an invite is to describe it with.
func (r outRoom) make(t *testing.T, s *joinSite, v mxfed.RoomVersion) (mxfed.RoomID, mxfed.UserID, []string) {
	creator := mxfed.UserID(fmt.Sprintf("@user%x:%s", rand.Uint64(), s.name)) // the same create event twice is the same room
	room, err := s.CreateRoom(t.Context(), v, creator)
	require.NoError(t, err)
	for _, d := range r.state {
		draft := *d
		draft.Room = room
		draft.Sender = cmp.Or(d.Sender, creator)
		_, err := s.Send(t.Context(), &draft)
		require.NoError(t, err, "%s %s", d.Type, *d.StateKey)
	}
	inviter := cmp.Or(r.inviter, creator)
	keys := map[mxfed.StateKey]bool{{Type: "m.room.create"}: true, {Type: "m.room.member", Key: string(inviter)}: true}
	for _, typ := range r.want {
		keys[mxfed.StateKey{Type: typ}] = true
	}
	var want []string
	state, _ := s.Events(room)
	for _, e := range state {
		if key, _ := e.StateKey(); keys[mxfed.StateKey{Type: e.Type(), Key: key}] {
			want = append(want, string(e.JSON()))
		}
	}
	require.Len(t, want, len(keys))
	return room, inviter, want
}

// outBody takes the body of version 2 apart, and makes sure that there is nothing else in it.
func outBody(t *testing.T, body []byte, v mxfed.RoomVersion) (event json.RawMessage, state []string) {
	members := outMembers(t, body)
	require.Len(t, members, 3)
	require.Equal(t, fmt.Sprintf("%q", v), string(members["room_version"]))
	return members["event"], outEntries(t, members["invite_room_state"])
}

func outMembers(t *testing.T, object []byte) (members map[string]json.RawMessage) {
	require.NoError(t, json.Unmarshal(object, &members), "%s", object)
	return members
}

func outEntries(t *testing.T, list []byte) (entries []string) {
	var raw []json.RawMessage
	require.NoError(t, json.Unmarshal(list, &raw), "%s", list)
	for _, entry := range raw {
		entries = append(entries, string(entry))
	}
	return entries
}

// requireGenuine demands that another server can verify every entry as a PDU of the room.
func (s *outInvited) requireGenuine(t *testing.T, v mxfed.RoomVersion, entries []string) {
	for _, entry := range entries {
		e, err := mxfed.ParseEvent(v, []byte(entry))
		require.NoError(t, err)
		require.Equal(t, entry, string(e.JSON()), "nothing in it that is not part of the PDU")
		require.NoError(t, s.Server.Verify(t.Context(), e)[0])
	}
}

// An invite describes the room by full PDUs: the create event, what clients show of a room where it is set, and who invites,
// each once and nothing else. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func TestInviteUser_RoomState(t *testing.T) {
	from, to := newJoinSite(t, nil, nil), newOutInvited(t)
	other, guest := "@other:"+mxfed.UserID(from.name), "@guest:"+mxfed.UserID(from.name)
	for _, v := range []mxfed.RoomVersion{"1", "2", "3", "4", "6", "9", "10", "11", "12"} {
		for name, room := range outRooms(other, guest, to.user()) {
			t.Run("room version "+string(v)+", "+name, func(t *testing.T) {
				id, inviter, want := room.make(t, from, v)
				event, err := from.Invite(t.Context(), id, inviter, to.user())
				require.NoError(t, err)
				sent, state := outBody(t, to.v2, v)
				require.ElementsMatch(t, want, state)
				to.requireGenuine(t, v, state)
				to.requireGenuine(t, v, []string{string(sent)})
				e, err := mxfed.ParseEvent(v, sent)
				require.NoError(t, err)
				require.Equal(t, event.ID(), e.ID())
				require.Contains(t, outMembers(t, outMembers(t, sent)["signatures"]), string(from.name))
				require.Len(t, outMembers(t, outMembers(t, sent)["signatures"]), 1)
				invite := to.Invites()[event.ID()]
				require.NoError(t, invite.StateErr)
				require.Len(t, invite.State, len(want))
			})
		}
	}
}

// Version 1 has the same description in unsigned, as far as the event with it stays within 64 KiB; the create event is the
// last to go. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1inviteroomideventid
func TestInviteUser_RoomStateV1(t *testing.T) {
	from, to := newJoinSite(t, nil, nil), newOutInvited(t)
	to.old = true
	long := func(typ string, size int) *mxfed.Draft {
		return memhost.State(typ, "", `{"x":"`+strings.Repeat("x", size)+`"}`)
	}
	large := outRoom{state: []*mxfed.Draft{long("m.room.name", 40_000), long("m.room.topic", 40_000)}, want: []string{"m.room.name", "m.room.topic"}}
	for name, c := range map[string]struct {
		room   outRoom
		reason int // bytes
		least  int // entries that arrive, the create event among them; 0: no unsigned
	}{
		"small":                         {outRooms("", "", "")["everything that describes it"], 10, 8},
		"too large":                     {large, 10, 2},
		"too large with a large invite": {large, 30_000, 1},
		"only the create event":         {large, 63_000, 1},
		"nothing":                       {large, 64_500, 0},
	} {
		for _, v := range []mxfed.RoomVersion{"1", "2"} {
			room, inviter, want := c.room.make(t, from, v)
			content := json.RawMessage(`{"reason":"` + strings.Repeat("x", c.reason) + `"}`)
			event, err := from.Server.Client().InviteUser(t.Context(), room, inviter, to.user(), content)
			require.NoError(t, err, name)
			v2, all := outBody(t, to.v2, v)
			require.ElementsMatch(t, want, all, name)
			require.LessOrEqual(t, len(to.v1), 65_536, name)
			body := outMembers(t, to.v1)
			unsigned, ok := body["unsigned"]
			delete(body, "unsigned")
			require.Equal(t, outMembers(t, v2), body, name)
			require.Equal(t, c.least > 0, ok, name)
			if !ok {
				continue
			}
			require.Len(t, outMembers(t, unsigned), 1, name)
			state := outEntries(t, outMembers(t, unsigned)["invite_room_state"])
			require.GreaterOrEqual(t, len(state), c.least, name)
			require.Subset(t, want, state, name)
			to.requireGenuine(t, v, state)
			invite := to.Invites()[event.ID()]
			require.NoError(t, invite.StateErr, name)
			require.Equal(t, v, invite.Create.Version(), name)
			require.Len(t, invite.State, len(state), name)
		}
	}
}

// What hosts store next to an event stays here.
func TestInvite_NoUnsigned(t *testing.T) {
	from, to := newJoinSite(t, nil, nil), newOutInvited(t)
	for _, v := range []mxfed.RoomVersion{"1", "10", "12"} {
		room, err := from.CreateRoom(t.Context(), v, from.user())
		require.NoError(t, err)
		event, err := from.Invite(t.Context(), room, from.user(), to.user())
		require.NoError(t, err)
		first := to.v2
		stored := func(e *mxfed.Event) *mxfed.Event {
			text := append([]byte(`{"unsigned":{"age":1,"invite_room_state":[],"prev_content":{}},"age_ts":1,"destinations":["x"],"outlier":true,`), e.JSON()[1:]...)
			e, err := mxfed.ParseEvent(v, text)
			require.NoError(t, err)
			return e
		}
		sent, _ := outBody(t, first, v)
		e, err := mxfed.ParseEvent(v, sent)
		require.NoError(t, err)
		req := &mxfed.InviteRequest{Event: stored(e)}
		state, _ := from.Events(room)
		for _, e := range state[:2] { // before the invite
			req.State = append(req.State, stored(e))
		}
		answer, err := from.Server.Client().Invite(t.Context(), to.name, req)
		require.NoError(t, err)
		require.Equal(t, string(first), string(to.v2))
		require.Equal(t, event.JSON(), answer.Event.JSON())
	}
}
