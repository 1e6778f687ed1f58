package mxfed_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"example.org/mxfed"
)

// The template of a leave names the leaver's member event and no join rules. Versions are not negotiated: whoever leaves
// has to. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_leaveroomiduserid
func TestMakeLeave(t *testing.T) {
	for _, v := range srvVersions {
		for name, ver := range map[string][]string{"none": nil, "it": {string(v)}, "another": {"org.example"}, "empty": {""}} {
			t.Run(name+", version "+string(v), func(t *testing.T) {
				s := newSrvSite(t)
				room := newSrvMemberRoom(t, s, v, "leave")
				s.reset()
				w := room.make(t, s.domain, "leave", "@alice:domain", ver...)
				room.requireTemplate(t, w, "leave", mxfed.StateKey{Type: "m.room.power_levels"}, mxfed.StateKey{Type: "m.room.member", Key: "@alice:domain"})
				require.EqualValues(t, 1, s.asks.Load())
			})
		}
	}
}

// The first of several defects decides, in this order: the path, the caller, the room, its ACL, the authorisation rules.
func TestMakeLeave_Order(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "10", nil)
	room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"elsewhere"}})
	refused := func(user string, asks int, status int, code mxfed.ErrorCode) {
		t.Helper()
		s.reset()
		s.requireRefused(t, room.make(t, s.domain, "leave", user), status, code)
		require.EqualValues(t, asks, s.asks.Load())
	}
	delete(s.rooms, room.id)
	refused("alice", 0, 400, mxfed.ErrInvalidParam)
	refused("@alice:third.example", 0, 403, mxfed.ErrForbidden)
	refused("@admin:us.example", 0, 403, mxfed.ErrForbidden)
	refused("@alice:domain", 1, 404, mxfed.ErrNotFound)
	s.rooms[room.id] = room
	room.history(t, srvHistories["joined"]...)
	refused("@alice:domain", 1, 403, mxfed.ErrForbidden)
	room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"*"}})
	room.history(t, srvMember{"@alice:domain", "leave"})
	refused("@alice:domain", 1, 403, mxfed.ErrForbidden)
	room.history(t, srvMember{"", "invite"})
	require.Equal(t, 200, room.make(t, s.domain, "leave", "@alice:domain").Code)
}

// Users leave from an invite, from the room and, since there are knocks, from a knock; from nowhere else, and bans stay.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func TestLeave_From(t *testing.T) {
	testSrvHistories(t, "leave", nil, func(v mxfed.RoomVersion, history string) bool {
		switch history {
		case "invited", "joined", "invited once more", "knock answered":
			return true
		case "knocking":
			return srvKnocks(v)
		}
		return false
	})
}

// Whoever was banned, kicked or is out for another reason since the template was made is so still, whatever the leave names.
func TestSendLeave_ChangedSince(t *testing.T) {
	testSrvChanges(t, "leave", srvHistories["joined"], map[string]func(*testing.T, *srvRoom){
		"banned": func(t *testing.T, r *srvRoom) { r.history(t, srvMember{"", "ban"}) },
		"kicked": func(t *testing.T, r *srvRoom) { r.history(t, srvMember{"", "leave"}) },
		"left by another leave": func(t *testing.T, r *srvRoom) {
			r.set(t, r.site.domain, "@alice:domain", "m.room.member", "@alice:domain", map[string]any{"membership": "leave", "reason": "tea"})
		},
	})
	testSrvChanges(t, "leave", srvHistories["invited"], map[string]func(*testing.T, *srvRoom){
		"invite taken back": func(t *testing.T, r *srvRoom) { r.history(t, srvMember{"", "leave"}) },
		"banned":            func(t *testing.T, r *srvRoom) { r.history(t, srvMember{"", "ban"}) },
	})
}

// srvSentences are what a moderator may do to others in her room, and what else is no leave of her own: the rules of the room
// allow all of it, and none of it may be sent here.
func srvSentences() map[string]func(p srvPDU) srvPDU {
	of := func(key, membership string) func(p srvPDU) srvPDU {
		return func(p srvPDU) srvPDU {
			return p.with("state_key", key).with("content", map[string]any{"membership": membership})
		}
	}
	all := map[string]func(p srvPDU) srvPDU{
		"herself banned":  of("@alice:domain", "ban"),
		"herself joined":  of("@alice:domain", "join"),
		"herself knocked": of("@alice:domain", "knock"),
		"herself invited": of("@alice:domain", "invite"),
		"topic":           func(p srvPDU) srvPDU { return p.with("type", "m.room.topic").with("state_key", "") },
		"member in name":  srvSet("type", "m.room.Member"),
		"power levels of": srvSet("type", "m.room.power_levels"),
		"message":         func(p srvPDU) srvPDU { return p.with("type", "m.room.message").with("state_key", nil) },
		"no state":        srvSet("state_key", nil),
		"empty key":       srvSet("state_key", ""),
		"padded key":      srvSet("state_key", "@alice:domain "),
		"third party":     srvSet("sender", "@carol:third.example"),
	}
	for _, user := range []string{"@eve:domain", "@bob:us.example", "@admin:us.example", "@carol:third.example", "@Alice:domain", "@alice:DOMAIN", "@nobody:domain"} {
		for _, membership := range []string{"leave", "ban", "invite", "join", "knock"} {
			all[user+" "+membership] = of(user, membership)
		}
	}
	return all
}

// A leave that is sent here is the sender's own. What a moderator does to others goes to the room by transactions, where
// nobody signs for it: with this server's signature under it, it would look like more than its sender's will.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_leaveroomideventid
func TestSendLeave_IsNotAKick(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, v, "leave")
		levels := map[string]any{"@alice:domain": 100}
		if v != "12" {
			levels[room.admin] = 50 // of version 12 the creator needs none
		}
		for user, by := range map[string]*srvPeer{"@eve:domain": s.domain, "@bob:us.example": s.own, "@carol:third.example": s.third} {
			room.set(t, by, user, "m.room.member", user, map[string]any{"membership": "join"})
		}
		room.set(t, s.own, room.admin, "m.room.power_levels", "", map[string]any{"users": levels})
		for name, change := range srvSentences() {
			for _, endpoint := range srvSends["leave"] {
				t.Run(name+", "+endpoint+", version "+string(v), func(t *testing.T) {
					p := change(room.memberOf("@alice:domain", "leave"))
					if key, ok := p["state_key"].(string); ok && p["type"] == "m.room.member" {
						p["auth_events"] = room.authEvents("@alice:domain", "m.room.member", key, p["content"].(map[string]any))
					}
					s.reset()
					s.requireRefused(t, room.sendMember(t, s.domain, endpoint, p.sign(t, v, s.domain, s.third)), 400, mxfed.ErrInvalidParam)
				})
			}
		}
		require.Equal(t, 200, room.sendMember(t, s.domain, "v2/send_leave", room.memberOf("@alice:domain", "leave").sign(t, v, s.domain)).Code)
	}
}

// An invite that is turned down, one that is turned down late, and a member who leaves, through every check of both sides.
// https://spec.matrix.org/v1.19/server-server-api/#leaving-rooms-rejecting-invites
func TestLeave_BetweenServers(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "2", "6", "10", "12"} {
		for _, noV1 := range []bool{false, true} {
			a, b := newJoinSite(t, nil, nil), newJoinSite(t, nil, func(c *mxfed.Config) { c.NoV1 = noV1 })
			room, err := a.CreateRoom(t.Context(), v, a.user())
			require.NoError(t, err)
			_, err = a.Invite(t.Context(), room, a.user(), b.user())
			require.NoError(t, err)
			inv := b.invited(t)
			leave, err := b.Server.Client().Leave(t.Context(), inv.Rejection())
			require.NoError(t, err, v)
			require.Equal(t, "leave", a.membership(room, b.user()))
			require.Equal(t, v, leave.Version())
			require.Equal(t, b.user(), leave.Sender())
			_, err = b.join(t.Context(), room, a.name)
			require.ErrorIs(t, err, mxfed.ErrForbidden)

			_, err = b.Server.Client().Leave(t.Context(), inv.Rejection())
			require.ErrorAs(t, err, new(*mxfed.LeaveError), "nothing is left to reject")
			require.ErrorIs(t, err, mxfed.ErrForbidden)
			_, err = a.Invite(t.Context(), room, a.user(), b.user())
			require.NoError(t, err)
			_, err = b.join(t.Context(), room, a.name)
			require.NoError(t, err)
			_, err = b.leave(t.Context(), room, a.name)
			require.NoError(t, err)
			require.Equal(t, "leave", a.membership(room, b.user()))
			require.Zero(t, a.count("/v1/send_leave/"))
		}
	}
}

// Whatever goes wrong with one server, at either step, the next one is asked; when that was the last one, what it said is in
// the LeaveError.
func TestLeave_Failover(t *testing.T) {
	var endpoint string
	var failure joinFailure
	failing := func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, endpoint) {
			w.Write(templateFor(r))
			return true
		}
		w.WriteHeader(failure.status)
		io.WriteString(w, failure.body)
		return true
	}
	taking := func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/make_leave/") {
			w.Write(templateFor(r))
			return true
		}
		io.WriteString(w, "{}")
		return true
	}
	first, second, leaver := newJoinSite(t, failing, nil), newJoinSite(t, taking, nil), newJoinSite(t, nil, func(c *mxfed.Config) { c.NoV1 = true })
	for _, endpoint = range []string{"/make_leave/", "/send_leave/"} {
		for _, failure = range joinFailures() {
			before := second.count("/send_leave/")
			_, err := leaver.leave(t.Context(), "!x:y.example", first.name, second.name)
			require.NoError(t, err, "%s %+v", endpoint, failure)
			require.Equal(t, before+1, second.count("/send_leave/"))
			_, err = leaver.leave(t.Context(), "!x:y.example", first.name)
			require.ErrorAs(t, err, new(*mxfed.LeaveError), "%s %+v", endpoint, failure)
			var answer *mxfed.Error
			require.ErrorAs(t, err, &answer)
			require.Equal(t, []any{failure.status, first.name, strings.Trim(endpoint, "/")}, []any{answer.Status, answer.Server, answer.Endpoint})
		}
	}
	first.listener.Close()
	_, err := leaver.leave(t.Context(), "!x:y.example", first.name, second.name)
	require.NoError(t, err, "one that is down")
}

// Whoever gives up a leave or knock is rid of it: nothing more is sent, also to no other server, and nothing goes on.
func TestMember_Cancelled(t *testing.T) {
	for _, membership := range []string{"leave", "knock"} {
		for _, at := range []string{"/make_", "/send_"} {
			for _, start := range []string{"", `{"room_version":`} {
				ignore := goleak.IgnoreCurrent()
				ctx, cancel := context.WithCancel(t.Context())
				first, next, caller := newJoinSite(t, memberStage(at, start, cancel), nil), newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
				var err error
				if membership == "leave" {
					_, err = caller.leave(ctx, "!x:y.example", first.name, next.name)
				} else {
					_, err = caller.knock(ctx, "!x:y.example", first.name, next.name)
				}
				require.ErrorIs(t, err, context.Canceled)
				require.NotErrorAs(t, err, new(*mxfed.LeaveError), "nobody said no")
				require.Error(t, ctx.Err(), "the stage was reached")
				require.Empty(t, next.asked)
				require.Len(t, first.asked, map[string]int{"/make_": 1, "/send_": 2}[at])
				for _, s := range []*joinSite{first, next, caller} {
					s.close()
				}
				goleak.VerifyNone(t, ignore)
			}
		}
	}
}

// memberStage hands out templates and, at one endpoint, begins an answer that never ends and calls leave.
func memberStage(at, start string, leave func()) func(w http.ResponseWriter, r *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, at) {
			w.Write(templateFor(r))
			return true
		}
		io.Copy(io.Discard, r.Body) // else the server does not see its caller go
		if start != "" {
			io.WriteString(w, start)
			http.NewResponseController(w).Flush()
		}
		leave()
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// Bodies without end are left when their limit is reached; redirects are not followed.
func TestLeave_HostileBodies(t *testing.T) {
	witness := newJoinSite(t, nil, nil)
	for name, answer := range joinBodies(witness.name) {
		for _, endpoint := range []string{"/make_leave/", "/send_leave/"} {
			hostile := newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, endpoint) {
					answer(w, r)
				} else {
					w.Write(templateFor(r))
				}
				return true
			}, nil)
			_, err := newJoinSite(t, nil, nil).leave(t.Context(), "!x:y.example", hostile.name)
			require.ErrorAs(t, err, new(*mxfed.LeaveError), "%s %s", endpoint, name)
			hostile.close()
		}
	}
	require.Empty(t, witness.asked)
}

// An invite is rejected through the inviter's server or, if that does not help, through those of others whose users have
// made the room what the invite shows, each once and ten at most.
func TestInvite_Rejection(t *testing.T) {
	s := newSrvSite(t)
	i := newSrvInvitation(t, s, "10")
	entry := func(sender string) mxfed.Stripped {
		return mxfed.Stripped{Type: "m.room.name", Sender: mxfed.UserID(sender)}
	}
	many := []mxfed.Stripped{}
	want := []mxfed.ServerName{"domain"}
	for n := range 30 {
		many = append(many, entry(fmt.Sprintf("@u:s%d.example", n)), entry(fmt.Sprintf("@v:s%d.example", n)))
		if n < 9 {
			want = append(want, mxfed.ServerName(fmt.Sprintf("s%d.example", n)))
		}
	}
	for name, c := range map[string]struct {
		state []mxfed.Stripped
		via   []mxfed.ServerName
	}{
		"nothing shown":  {nil, []mxfed.ServerName{"domain"}},
		"the inviter's":  {[]mxfed.Stripped{entry("@alice:domain"), entry("@eve:domain")}, []mxfed.ServerName{"domain"}},
		"others":         {[]mxfed.Stripped{entry("@b:b.example:8448"), entry("@alice:domain"), entry("@c:c.example"), entry("@d:b.example:8448")}, []mxfed.ServerName{"domain", "b.example:8448", "c.example"}},
		"more than that": {many, want},
	} {
		inv := &mxfed.Invite{Event: srvEvent(t, "10", i.event.sign(t, "10", s.domain)), User: "@bob:us.example", Origin: "domain", To: "us.example", State: c.state}
		require.Equal(t, &mxfed.LeaveRequest{Room: mxfed.RoomID(i.room), User: "@bob:us.example", Via: c.via, Version: "10"}, inv.Rejection(), name)
	}
	for api, v := range map[string]mxfed.RoomVersion{"v1": "2", "v2": "12"} {
		s.reset()
		i := newSrvInvitation(t, s, v)
		require.Equal(t, 200, i.send(t, s, s.domain, api, i.event.sign(t, v, s.domain), i.state).Code)
		require.Equal(t, &mxfed.LeaveRequest{Room: mxfed.RoomID(i.room), User: "@bob:us.example", Via: []mxfed.ServerName{"domain"}, Version: v}, s.invites[0].Rejection())
	}
}

// An invite is taken back by a leave or ban of the invited user that was built on it, by the inviter's server.
func TestInvite_Rescinded(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		i := newSrvInvitation(t, s, v)
		invite := srvEvent(t, v, i.event.sign(t, v, s.domain))
		inv := &mxfed.Invite{Event: invite, User: "@bob:us.example", Origin: "domain"}
		other := "!other:domain"
		if v == "12" {
			other = "!ckKSZ9vP7FTFzKQE9KZFH6ayI9HDvziQvo4Thq_HYn8"
		}
		for name, c := range map[string]struct {
			change func(p srvPDU) srvPDU
			want   bool
		}{
			"taken back":                {func(p srvPDU) srvPDU { return p }, true},
			"banned":                    {srvMembership("ban"), true},
			"by somebody else of them":  {srvSet("sender", "@eve:domain"), true},
			"with more auth events":     {srvSet("auth_events", srvRefs(v, "$x:domain", invite.ID(), "$y:domain")), true},
			"not built on it":           {srvSet("auth_events", srvRefs(v, "$x:domain")), false},
			"built on nothing":          {srvSet("auth_events", []any{}), false},
			"after it, not built on it": {func(p srvPDU) srvPDU { return p.with("prev_events", p["auth_events"]).with("auth_events", []any{}) }, false},
			"by a third server":         {srvSet("sender", "@carol:third.example"), false},
			"by the invited user":       {srvSet("sender", "@bob:us.example"), false},
			"of another user":           {srvSet("state_key", "@bill:us.example"), false},
			"in another room":           {srvSet("room_id", other), false},
			"a join":                    {srvMembership("join"), false},
			"an invite once more":       {srvMembership("invite"), false},
			"a knock":                   {srvMembership("knock"), false},
			"no member event":           {srvSet("type", "m.room.topic"), false},
			"no state event":            {srvSet("state_key", nil), false},
		} {
			p := i.event.with("content", map[string]any{"membership": "leave"}).with("auth_events", srvRefs(v, invite.ID()))
			if srvGivenIDs(v) {
				p = p.with("event_id", "$back:domain")
			}
			require.Equal(t, c.want, inv.Rescinded(srvEvent(t, v, c.change(p).sign(t, v, s.domain))), "%s %s", v, name)
		}
		require.False(t, inv.Rescinded(nil))
		require.False(t, inv.Rescinded(invite))
	}
}
