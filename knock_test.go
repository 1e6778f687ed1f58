package mxfed_test

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
)

// The template of a knock, which room versions 7 and later know.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_knockroomiduserid
func TestMakeKnock(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, v, "knock")
		s.reset()
		w := room.make(t, s.domain, "knock", "@alice:domain", "nonsense", string(v))
		if !srvKnocks(v) {
			s.requireRefused(t, w, 403, mxfed.ErrForbidden)
			continue
		}
		named := []mxfed.StateKey{{Type: "m.room.power_levels"}, {Type: "m.room.join_rules"}}
		room.requireTemplate(t, w, "knock", named...)
		require.EqualValues(t, 1, s.asks.Load())
		room.history(t, srvHistories["left"]...)
		w = room.make(t, s.domain, "knock", "@alice:domain", string(v))
		room.requireTemplate(t, w, "knock", append(named, mxfed.StateKey{Type: "m.room.member", Key: "@alice:domain"})...)
	}
}

// The caller must say which room versions it supports, and the room's must be one of them: nothing stands for silence.
func TestMakeKnock_Versions(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, v, "knock")
		for name, c := range map[string]struct {
			query string
			code  mxfed.ErrorCode
		}{
			"none":          {"", mxfed.ErrMissingParam},
			"another query": {"?version=" + string(v), mxfed.ErrMissingParam},
			"another case":  {"?Ver=" + string(v), mxfed.ErrMissingParam},
			"empty":         {"?ver=", mxfed.ErrIncompatibleRoomVersion},
			"others":        {"?ver=org.example&ver=99", mxfed.ErrIncompatibleRoomVersion},
			"a list in one": {"?ver=" + string(v) + "," + string(v), mxfed.ErrIncompatibleRoomVersion},
			"like it":       {"?ver=0" + string(v), mxfed.ErrIncompatibleRoomVersion},
			"broken":        {"?ver=%zz", mxfed.ErrInvalidParam},
			"it":            {"?ver=" + string(v), ""},
			"it, among all": {"?ver=99&ver=" + string(v) + "&ver=org.example", ""},
		} {
			s.reset()
			w := s.send(t, s.domain, http.MethodGet, srvURI("v1/make_knock", string(room.id), "@alice:domain")+c.query, nil)
			switch {
			case c.code == mxfed.ErrIncompatibleRoomVersion:
				require.EqualValues(t, v, s.requireRefused(t, w, 400, c.code)["room_version"], name)
			case c.code != "":
				s.requireRefused(t, w, 400, c.code)
			case srvKnocks(v):
				require.Equal(t, 200, w.Code, "%s: %s", name, w.Body)
			default:
				s.requireRefused(t, w, 403, mxfed.ErrForbidden)
			}
		}
	}
}

// The first of several defects decides, in this order: the path, the caller, the room, its ACL, the versions offered, the
// authorisation rules.
func TestMakeKnock_Order(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvMemberRoom(t, s, "10", "knock")
	room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"elsewhere"}})
	room.history(t, srvMember{"", "ban"})
	refused := func(user string, asks int, status int, code mxfed.ErrorCode, ver ...string) {
		t.Helper()
		s.reset()
		s.requireRefused(t, room.make(t, s.domain, "knock", user, ver...), status, code)
		require.EqualValues(t, asks, s.asks.Load())
	}
	delete(s.rooms, room.id)
	refused("alice", 0, 400, mxfed.ErrInvalidParam)
	refused("@alice:third.example", 0, 403, mxfed.ErrForbidden)
	refused("@alice:domain", 1, 404, mxfed.ErrNotFound)
	s.rooms[room.id] = room
	refused("@alice:domain", 1, 403, mxfed.ErrForbidden)
	room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"*"}})
	refused("@alice:domain", 1, 400, mxfed.ErrMissingParam)
	refused("@alice:domain", 1, 400, mxfed.ErrIncompatibleRoomVersion, "9")
	refused("@alice:domain", 1, 403, mxfed.ErrForbidden, "10")
	room.history(t, srvMember{"", "leave"})
	require.Equal(t, 200, room.make(t, s.domain, "knock", "@alice:domain", "10").Code)
}

// Whoever is banned, invited or in the room does not knock. https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func TestKnock_From(t *testing.T) {
	testSrvHistories(t, "knock", map[string]any{"join_rule": "knock"}, func(v mxfed.RoomVersion, history string) bool {
		return srvKnocks(v) && !slices.Contains([]string{"invited", "joined", "banned", "invited once more", "knock answered"}, history)
	})
}

// Only under the rules knock and, from room version 10 on, knock_restricted there is somebody who answers.
func TestKnock_JoinRules(t *testing.T) {
	allow := []any{map[string]any{"type": "m.room_membership", "room_id": "!in:us.example"}}
	for name, c := range map[string]struct {
		content map[string]any
		since   int // the first room version in which users may knock; 0 for none
	}{
		"knock":                {map[string]any{"join_rule": "knock"}, 7},
		"knock_restricted":     {map[string]any{"join_rule": "knock_restricted", "allow": allow}, 10},
		"without conditions":   {map[string]any{"join_rule": "knock_restricted"}, 10},
		"restricted":           {map[string]any{"join_rule": "restricted", "allow": allow}, 0},
		"public":               {map[string]any{"join_rule": "public"}, 0},
		"invite":               {map[string]any{"join_rule": "invite"}, 0},
		"private":              {map[string]any{"join_rule": "private"}, 0},
		"unknown":              {map[string]any{"join_rule": "org.example"}, 0},
		"in another case":      {map[string]any{"join_rule": "Knock"}, 0},
		"missing":              {map[string]any{}, 0},
		"no string":            {map[string]any{"join_rule": []string{"knock"}}, 0},
		"name in another case": {map[string]any{"Join_rule": "knock"}, 0},
	} {
		for i, v := range srvVersions {
			t.Run(name+", version "+string(v), func(t *testing.T) {
				s := newSrvSite(t)
				room := newSrvRoom(t, s, v, c.content)
				room.joined = map[mxfed.RoomID]bool{"!in:us.example": true}
				s.reset()
				pdu := room.memberOf("@alice:domain", "knock").sign(t, v, s.domain)
				template := room.make(t, s.domain, "knock", "@alice:domain", string(v))
				if c.since > 0 && i+1 >= c.since {
					require.Equal(t, 200, template.Code, "%s", template.Body)
					w := room.sendMember(t, s.domain, "v1/send_knock", pdu)
					require.Equal(t, 200, w.Code, "%s", w.Body)
					return
				}
				s.requireRefused(t, template, 403, mxfed.ErrForbidden)
				s.requireRefused(t, room.sendMember(t, s.domain, "v1/send_knock", pdu), 403, mxfed.ErrForbidden)
			})
		}
	}
}

// Whoever was banned, invited or let in since the template was made, or finds the room closed, does not knock any more.
func TestSendKnock_ChangedSince(t *testing.T) {
	testSrvChanges(t, "knock", nil, map[string]func(*testing.T, *srvRoom){
		"banned":  func(t *testing.T, r *srvRoom) { r.history(t, srvMember{"", "ban"}) },
		"invited": func(t *testing.T, r *srvRoom) { r.history(t, srvMember{"", "invite"}) },
		"joined": func(t *testing.T, r *srvRoom) {
			r.history(t, srvMember{"", "invite"}, srvMember{"@alice:domain", "join"})
		},
		"closed": func(t *testing.T, r *srvRoom) {
			r.set(t, r.site.own, r.admin, "m.room.join_rules", "", map[string]any{"join_rule": "invite"})
		},
	})
}

// There is no version 2 of send_knock, and none of make_knock and make_leave.
func TestKnock_OneVersion(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvMemberRoom(t, s, "10", "knock")
	pdu := room.memberOf("@alice:domain", "knock").sign(t, "10", s.domain)
	s.requireRefused(t, room.sendMember(t, s.domain, "v2/send_knock", pdu), 404, mxfed.ErrUnrecognized)
	for _, endpoint := range []string{"v2/make_knock", "v2/make_leave"} {
		s.requireRefused(t, s.send(t, s.domain, "GET", srvURI(endpoint, string(room.id), "@alice:domain")+"?ver=10", nil), 404, mxfed.ErrUnrecognized)
	}
}

// srvShown decodes what a knock is shown.
func srvShown(t *testing.T, body []byte) (pdus []string) {
	var answer map[string][]json.RawMessage
	require.NoError(t, json.Unmarshal(body, &answer))
	require.Len(t, answer, 1)
	require.Contains(t, answer, "knock_room_state")
	for _, pdu := range answer["knock_room_state"] {
		pdus = append(pdus, string(pdu))
	}
	return pdus
}

// Who knocks is shown what the room says of itself, in full PDUs as they are stored, and nothing else: nobody in it, and
// nothing of how it is run. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1send_knockroomideventid
func TestSendKnock_RoomState(t *testing.T) {
	for _, v := range srvVersions[6:] {
		for _, generous := range []bool{false, true} {
			s := newSrvSite(t)
			room := newSrvMemberRoom(t, s, v, "knock")
			if generous { // a host may tell more than was asked
				room.edit = func(r *mxfed.Room) {
					var all []*mxfed.Event
					for _, e := range room.state {
						all = append(all, e)
					}
					r.State = all
				}
			}
			shown := []string{"m.room.create", "m.room.join_rules"}
			requireSrvShown(t, room, shown)
			for typ, content := range map[string]map[string]any{"m.room.name": {"name": "<&>\u2028"}, "m.room.avatar": {"url": "mxc://us.example/a"}, "m.room.topic": {"topic": "t"},
				"m.room.canonical_alias": {"alias": "#a:us.example"}, "m.room.encryption": {"algorithm": "m.megolm.v1.aes-sha2"}} {
				room.set(t, s.own, room.admin, typ, "", content)
				shown = append(shown, typ)
				requireSrvShown(t, room, shown)
			}
			for _, typ := range []string{"m.room.history_visibility", "m.room.guest_access", "m.room.server_acl", "m.room.pinned_events", "m.room.tombstone", "m.space.parent", "org.example.secret"} {
				room.set(t, s.own, room.admin, typ, "", map[string]any{"allow": []string{"*"}})
			}
			for _, typ := range shown[1:] {
				room.set(t, s.own, room.admin, typ, "another key", map[string]any{"name": "hidden"})
			}
			room.set(t, s.own, "@bob:us.example", "m.room.member", "@bob:us.example", map[string]any{"membership": "join"})
			requireSrvShown(t, room, shown)
		}
	}
}

// requireSrvShown sends one more knock and demands that it is shown the room's entries of these types.
func requireSrvShown(t *testing.T, room *srvRoom, types []string) {
	s := room.site
	s.take, _ = srvNotKept()
	w := room.sendMember(t, s.domain, "v1/send_knock", room.memberOf("@alice:domain", "knock").sign(t, room.version, s.domain))
	require.Equal(t, 200, w.Code, "%s", w.Body)
	var want []string
	for _, typ := range types {
		want = append(want, string(room.state[mxfed.StateKey{Type: typ}].JSON()))
	}
	require.ElementsMatch(t, want, srvShown(t, w.Body.Bytes()))
}

// A knock that comes again is shown the room again, also after it was answered.
func TestSendKnock_Again(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvMemberRoom(t, s, "10", "knock")
	pdu := room.memberOf("@alice:domain", "knock").sign(t, "10", s.domain)
	first := room.sendMember(t, s.domain, "v1/send_knock", pdu)
	require.Equal(t, 200, first.Code)
	room.history(t, srvMember{"", "invite"})
	again := room.sendMember(t, s.domain, "v1/send_knock", pdu)
	require.Equal(t, first.Body.String(), again.Body.String())
	require.Equal(t, "invite", room.state[mxfed.StateKey{Type: "m.room.member", Key: "@alice:domain"}].Membership())
}

// knockRoom makes a room that anybody may knock on.
func (s *joinSite) knockRoom(t testing.TB, v mxfed.RoomVersion) mxfed.RoomID {
	id, err := s.CreateRoom(t.Context(), v, s.user(), memhost.State("m.room.join_rules", "", `{"join_rule":"knock"}`), memhost.State("m.room.name", "", `{"name":"tea"}`))
	require.NoError(t, err)
	return id
}

func (s *joinSite) knock(ctx context.Context, room mxfed.RoomID, via ...mxfed.ServerName) (*mxfed.KnockResult, error) {
	return s.Server.Client().Knock(ctx, &mxfed.KnockRequest{Room: room, User: s.user(), Via: via})
}

func (s *joinSite) leave(ctx context.Context, room mxfed.RoomID, via ...mxfed.ServerName) (*mxfed.Event, error) {
	return s.Server.Client().Leave(ctx, &mxfed.LeaveRequest{Room: room, User: s.user(), Via: via})
}

// membership is what the room's state at s says of a user.
func (s *joinSite) membership(room mxfed.RoomID, user mxfed.UserID) string {
	state, _ := s.Events(room)
	for _, e := range state {
		if key, _ := e.StateKey(); e.Type() == "m.room.member" && key == string(user) {
			return e.Membership()
		}
	}
	return ""
}

// invited is the one invite that s has got.
func (s *joinSite) invited(t *testing.T) *mxfed.Invite {
	require.Len(t, s.Invites(), 1)
	for _, inv := range s.Invites() {
		return inv
	}
	return nil
}

// A knock, the invite that answers it, and a join, through every check of both sides; before that, a knock that is taken
// back, and one that is refused. https://spec.matrix.org/v1.19/server-server-api/#knocking-upon-a-room
func TestKnock_BetweenServers(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"7", "10", "12"} {
		a, b := newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
		room := a.knockRoom(t, v)
		_, err := b.join(t.Context(), room, a.name)
		require.ErrorIs(t, err, mxfed.ErrForbidden)
		first, err := b.knock(t.Context(), room, b.name, a.name)
		require.NoError(t, err, v)
		require.Equal(t, "knock", a.membership(room, b.user()))
		_, err = b.leave(t.Context(), room, first.Via)
		require.NoError(t, err, v)
		require.Equal(t, "leave", a.membership(room, b.user()))
		_, err = b.knock(t.Context(), room, a.name)
		require.NoError(t, err, v)
		no := memhost.State("m.room.member", string(b.user()), `{"membership":"leave"}`)
		no.Room, no.Sender = room, a.user()
		_, err = a.Send(t.Context(), no)
		require.NoError(t, err)

		knock, err := b.knock(t.Context(), room, a.name)
		require.NoError(t, err, v)
		require.NoError(t, knock.StateErr)
		require.Equal(t, a.name, knock.Via)
		var shown []string
		for _, s := range knock.State {
			require.NotNil(t, s.Event)
			shown = append(shown, s.Type)
		}
		require.ElementsMatch(t, []string{"m.room.create", "m.room.join_rules", "m.room.name"}, shown)
		_, err = b.join(t.Context(), room, a.name)
		require.ErrorIs(t, err, mxfed.ErrForbidden, "nobody has answered yet")
		_, err = a.Invite(t.Context(), room, a.user(), b.user())
		require.NoError(t, err)
		require.True(t, b.invited(t).Answers(knock.Event))
		_, err = b.knock(t.Context(), room, a.name)
		require.ErrorIs(t, err, mxfed.ErrForbidden, "it was answered")
		result, err := b.join(t.Context(), room, a.name)
		require.NoError(t, err, v)
		require.Empty(t, result.Dropped)
		require.Equal(t, "join", a.membership(room, b.user()))
	}
}

// In rooms of older versions nobody knocks, whatever their rules say.
func TestKnock_TooOld(t *testing.T) {
	a, b := newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
	_, err := b.knock(t.Context(), a.knockRoom(t, "6"), a.name)
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	require.Zero(t, a.count("/send_knock/"))
	told := mxfed.ClientError(err)
	require.Equal(t, []any{403, mxfed.ErrForbidden}, []any{told.Status, told.Code})

	old := newJoinSite(t, nil, func(c *mxfed.Config) { c.Versions = []mxfed.RoomVersion{"6", "7"} })
	_, err = old.knock(t.Context(), a.knockRoom(t, "10"), a.name)
	told = mxfed.ClientError(err)
	require.Equal(t, []any{400, mxfed.ErrIncompatibleRoomVersion, mxfed.RoomVersion("10")}, []any{told.Status, told.Code, told.RoomVersion})
}

// An invite shows the room and its user; a knock of another user, on another room, or what is no knock at all, it does not
// answer. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func TestInvite_Answers(t *testing.T) {
	for _, v := range srvVersions[6:] {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		event := func(change func(p srvPDU) srvPDU) *mxfed.Event {
			knock := i.event.with("sender", "@bob:us.example").with("content", map[string]any{"membership": "knock"})
			return srvEvent(t, v, change(knock).sign(t, v, s.own))
		}
		otherRoom := "!other:domain"
		if v == "12" {
			otherRoom = "!ckKSZ9vP7FTFzKQE9KZFH6ayI9HDvziQvo4Thq_HYn8"
		}
		inv := &mxfed.Invite{Event: srvEvent(t, v, i.event.sign(t, v, s.domain)), User: "@bob:us.example"}
		require.True(t, inv.Answers(event(func(p srvPDU) srvPDU { return p })))
		require.True(t, inv.Answers(event(func(p srvPDU) srvPDU {
			return p.with("content", map[string]any{"membership": "knock", "reason": "tea"})
		})))
		for name, change := range map[string]func(p srvPDU) srvPDU{
			"another room": srvSet("room_id", otherRoom),
			"another user": srvSet("state_key", "@bill:us.example"),
			"a leave":      srvMembership("leave"),
			"a join":       srvMembership("join"),
			"no member":    srvSet("type", "m.room.message"),
			"no state":     srvSet("state_key", nil),
		} {
			require.False(t, inv.Answers(event(change)), name)
		}
		require.False(t, inv.Answers(nil))
		require.False(t, inv.Answers(inv.Event))
	}
}
