package mxfed_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// This file tests what joins, leaves and knocks have in common on the side of the server that takes them.

// srvSends are the endpoints that finished events are sent to, the oldest version first.
var srvSends = map[string][]string{"join": {"v1/send_join", "v2/send_join"}, "leave": {"v1/send_leave", "v2/send_leave"}, "knock": {"v1/send_knock"}}

// srvNewest is the newest version of such an endpoint.
func srvNewest(membership string) string {
	endpoints := srvSends[membership]
	return endpoints[len(endpoints)-1]
}

// srvMemberships are what users may do to themselves in rooms of a version, in an order that is a history.
func srvMemberships(v mxfed.RoomVersion) []string {
	if srvKnocks(v) {
		return []string{"knock", "join", "leave"}
	}
	return []string{"join", "leave"}
}

// srvKnocks tells whether the version knows knocks.
func srvKnocks(v mxfed.RoomVersion) bool { return len(v) > 1 || v >= "7" }

// forEachSrvSend tests every endpoint of finished events with every room version that knows them.
func forEachSrvSend(t *testing.T, test func(t *testing.T, endpoint, membership string, v mxfed.RoomVersion)) {
	for _, v := range srvVersions {
		for _, membership := range srvMemberships(v) {
			for _, endpoint := range srvSends[membership] {
				t.Run(endpoint+", version "+string(v), func(t *testing.T) { test(t, endpoint, membership, v) })
			}
		}
	}
}

// newSrvMemberRoom makes a room in which @alice:domain may do what membership says, at any time.
func newSrvMemberRoom(t testing.TB, s *srvSite, v mxfed.RoomVersion, membership string) *srvRoom {
	rule := "public"
	if membership == "knock" {
		rule = "knock"
	}
	room := newSrvRoom(t, s, v, map[string]any{"join_rule": rule})
	if membership == "leave" {
		room.set(t, s.domain, "@alice:domain", "m.room.member", "@alice:domain", map[string]any{"membership": "join"})
	}
	return room
}

// memberOf is an event at the end of the room by which a user changes their own membership, not signed.
func (r *srvRoom) memberOf(user, membership string) srvPDU {
	return r.pdu(user, "m.room.member", user, map[string]any{"membership": membership})
}

// A leave or knock that is taken carries this server's signature; the host gets it verified, with the question that it was
// judged by. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_leaveroomideventid
func TestSendMember(t *testing.T) {
	forEachSrvSend(t, func(t *testing.T, endpoint, membership string, v mxfed.RoomVersion) {
		if membership == "join" {
			return // its answer is another matter
		}
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, v, membership)
		s.reset()
		good := room.memberOf("@alice:domain", membership).with("member_of_the_future", true)
		good["content"] = map[string]any{"membership": membership, "reason": "tea"}
		pdu := good.sign(t, v, s.domain)
		unsigned := append(slices.Clone(pdu[:len(pdu)-1]), `,"unsigned":{"age":7}}`...)
		w := s.send(t, s.domain, "PUT", room.memberURI(endpoint, pdu), unsigned)
		require.Equal(t, 200, w.Code, "%s", w.Body)
		require.Equal(t, "application/json", w.Header().Get("Content-Type"))
		require.EqualValues(t, 1, s.signing.made.Load())
		require.LessOrEqual(t, s.asks.Load(), int64(2))
		switch endpoint {
		case "v1/send_leave":
			require.Equal(t, "[200,{}]", w.Body.String())
		case "v2/send_leave":
			require.Equal(t, "{}", w.Body.String())
		}

		require.Len(t, s.members, 1)
		m := s.members[0]
		want := srvObject(t, pdu)
		want["signatures"] = srvObject(t, good.sign(t, v, s.domain, s.own))["signatures"]
		require.Equal(t, want, srvObject(t, m.Event.JSON()))
		require.NoError(t, s.server.Verify(t.Context(), m.Event)[0])
		require.Equal(t, []mxfed.ServerName{s.domain.name, s.own.name}, []mxfed.ServerName{m.Ask.Origin, m.Ask.To})
		require.Equal(t, m.Event.Prev(), m.Ask.Prev)
		require.Equal(t, m.Event.Auth(), m.Ask.Events)
		require.Equal(t, m.Event.ID(), m.Ask.Event)
		require.LessOrEqual(t, len(m.Ask.State), 64)
		require.Empty(t, m.Ask.Allow)
		require.False(t, m.Ask.Local || m.OmitMembers)
		require.Equal(t, m.Event, room.state[mxfed.StateKey{Type: "m.room.member", Key: "@alice:domain"}])
	})
}

// What the host of leaves and knocks says is the answer, and what it keeps to itself does not leave.
func TestMemberHost(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		status int
		code   mxfed.ErrorCode
	}{
		"refused":    {mxfed.ErrForbidden, 403, mxfed.ErrForbidden},
		"full":       {fmt.Errorf("full: %w", &mxfed.Error{Code: mxfed.ErrLimitExceeded, Message: "later"}), 429, mxfed.ErrLimitExceeded},
		"gone":       {mxfed.ErrNotFound, 404, mxfed.ErrNotFound},
		"failed":     {errors.New("secret of the database"), 500, mxfed.ErrUnknown},
		"in a hurry": {context.DeadlineExceeded, 503, mxfed.ErrUnknown},
	} {
		for _, membership := range []string{"leave", "knock"} {
			for _, endpoint := range srvSends[membership] {
				s := newSrvSite(t)
				s.take = func(_ context.Context, m *mxfed.Membership) error {
					require.EqualValues(t, 1, s.signing.made.Load(), "the event is signed when the host is asked")
					require.NoError(t, s.server.Verify(t.Context(), m.Event)[0])
					return c.err
				}
				room := newSrvMemberRoom(t, s, "10", membership)
				s.reset()
				w := room.sendMember(t, s.domain, endpoint, room.memberOf("@alice:domain", membership).sign(t, "10", s.domain))
				requireSrvError(t, w, c.status, c.code)
				require.Len(t, s.members, 1, name)
				for _, kept := range []string{"secret", "signatures", "knock_room_state"} {
					require.NotContains(t, w.Body.String(), kept, name)
				}
			}
		}
	}
}

// What becomes of the room while the host is asked decides: the host sees the room as it is in its own transaction.
func TestSendMember_Late(t *testing.T) {
	for _, membership := range []string{"leave", "knock"} {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, "10", membership)
		pdu := room.memberOf("@alice:domain", membership).sign(t, "10", s.domain)
		s.take = func(_ context.Context, m *mxfed.Membership) error {
			room.history(t, srvMember{"", "ban"})
			return room.take(m)
		}
		requireSrvError(t, room.sendMember(t, s.domain, srvNewest(membership), pdu), 403, mxfed.ErrForbidden)
		require.Empty(t, room.before)
		require.Equal(t, "ban", room.state[mxfed.StateKey{Type: "m.room.member", Key: "@alice:domain"}].Membership())
	}
}

// A signature of ours that does not verify is our failure, and the host never hears of it.
func TestMember_VerifiedAfterSigning(t *testing.T) {
	for _, membership := range []string{"leave", "knock"} {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, "10", membership)
		pdu := room.memberOf("@alice:domain", membership).sign(t, "10", s.domain)
		signer, err := mxfed.NewSigner(s.own.name, s.own.id, &srvWrongKey{s.own.key, s.third.key})
		require.NoError(t, err)
		broken := newSrvSite(t, func(cfg *mxfed.Config) { cfg.Signers = []*mxfed.Signer{signer} })
		broken.rooms = s.rooms
		broken.requireRefused(t, broken.send(t, s.domain, "PUT", room.memberURI(srvNewest(membership), pdu), pdu), 500, mxfed.ErrUnknown)
	}
}

// The first of several defects decides, in this order: the room, its ACL, what the event says, its signature, the
// authorisation rules.
func TestSend_Order(t *testing.T) {
	forEachSrvSend(t, func(t *testing.T, endpoint, membership string, v mxfed.RoomVersion) {
		s := newSrvSite(t)
		room := newSrvMemberRoom(t, s, v, membership)
		room.set(t, s.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "ban"})
		room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"elsewhere"}})
		good := room.memberOf("@alice:domain", membership)
		refused := func(p srvPDU, by *srvPeer, status int, code mxfed.ErrorCode) {
			t.Helper()
			s.reset()
			s.requireRefused(t, room.sendMember(t, s.domain, endpoint, p.sign(t, v, by)), status, code)
		}
		delete(s.rooms, room.id)
		refused(good.with("depth", -1), s.third, 404, mxfed.ErrNotFound)
		s.rooms[room.id] = room
		refused(good.with("depth", -1), s.third, 403, mxfed.ErrForbidden)
		room.set(t, s.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []string{"*"}})
		refused(good.with("depth", -1), s.third, 400, mxfed.ErrBadJSON)
		refused(good, s.third, 400, mxfed.ErrInvalidParam)
		require.EqualValues(t, 1, s.asks.Load())
		refused(good, s.domain, 403, mxfed.ErrForbidden)
		require.EqualValues(t, 2, s.asks.Load())
	})
}

// A fact that the host leaves out lets nobody in or out.
func TestSend_FactsMissing(t *testing.T) {
	for name, edit := range map[string]func(r *mxfed.Room){
		"no create event": func(r *mxfed.Room) {
			r.State = slices.DeleteFunc(r.State, func(e *mxfed.Event) bool { return e.Type() == "m.room.create" })
		},
		"no state":                func(r *mxfed.Room) { r.State = nil },
		"no state before":         func(r *mxfed.Room) { r.Before = nil },
		"an empty one before":     func(r *mxfed.Room) { r.Before = []*mxfed.Event{} },
		"no events":               func(r *mxfed.Room) { r.Events = nil },
		"one event less":          func(r *mxfed.Room) { r.Events = r.Events[:max(len(r.Events)-1, 0)] },
		"nothing but the version": func(r *mxfed.Room) { *r = mxfed.Room{Version: r.Version} },
	} {
		for _, v := range []mxfed.RoomVersion{"1", "10", "12"} {
			for _, membership := range srvMemberships(v) {
				s := newSrvSite(t)
				room := newSrvMemberRoom(t, s, v, membership)
				pdu := room.memberOf("@alice:domain", membership).sign(t, v, s.domain)
				room.edit = edit
				s.reset()
				t.Log(name, membership, v)
				s.requireRefused(t, room.sendMember(t, s.domain, srvNewest(membership), pdu), 403, mxfed.ErrForbidden)
			}
		}
	}
}

// srvMember is a membership of @alice:domain that was set by her or the admin.
type srvMember struct {
	by, membership string // by "" for the admin
}

// history puts entries into the room, one after the other. Nobody asks whether its rules allow them.
func (r *srvRoom) history(t testing.TB, entries ...srvMember) {
	for _, m := range entries {
		by, sender := r.site.own, r.admin
		if m.by != "" {
			by, sender = r.site.domain, m.by
		}
		r.set(t, by, sender, "m.room.member", "@alice:domain", map[string]any{"membership": m.membership})
	}
}

// srvHistories are what a user may have been before.
var srvHistories = map[string][]srvMember{
	"never there":         nil,
	"invited":             {{"", "invite"}},
	"joined":              {{"", "invite"}, {"@alice:domain", "join"}},
	"left":                {{"", "invite"}, {"@alice:domain", "join"}, {"@alice:domain", "leave"}},
	"invite rejected":     {{"", "invite"}, {"@alice:domain", "leave"}},
	"invite taken back":   {{"", "invite"}, {"", "leave"}},
	"kicked":              {{"", "invite"}, {"@alice:domain", "join"}, {"", "leave"}},
	"banned":              {{"", "ban"}},
	"banned and forgiven": {{"", "ban"}, {"", "leave"}},
	"invited once more":   {{"", "invite"}, {"@alice:domain", "leave"}, {"", "invite"}},
	"knocking":            {{"@alice:domain", "knock"}},
	"knock taken back":    {{"@alice:domain", "knock"}, {"@alice:domain", "leave"}},
	"knock answered":      {{"@alice:domain", "knock"}, {"", "invite"}},
	"knock refused":       {{"@alice:domain", "knock"}, {"", "leave"}},
}

// testSrvHistories tries make_* and send_* after every history, in every room version; allowed are the histories after
// which the membership may follow.
func testSrvHistories(t *testing.T, membership string, rules map[string]any, allowed func(v mxfed.RoomVersion, history string) bool) {
	for _, v := range srvVersions {
		for name, history := range srvHistories {
			t.Run(name+", version "+string(v), func(t *testing.T) {
				s := newSrvSite(t)
				room := newSrvRoom(t, s, v, rules)
				room.history(t, history...)
				answers := map[string]int{}
				s.reset()
				answers["make"] = room.make(t, s.domain, membership, "@alice:domain", string(v)).Code
				require.Zero(t, s.signing.made.Load())
				s.take, _ = srvNotKept() // each endpoint finds the room as it was
				pdu := room.memberOf("@alice:domain", membership).sign(t, v, s.domain)
				for _, endpoint := range srvSends[membership] {
					s.reset()
					w := room.sendMember(t, s.domain, endpoint, pdu)
					if answers[endpoint] = w.Code; w.Code != 200 {
						s.requireRefused(t, w, 403, mxfed.ErrForbidden)
					}
				}
				for endpoint, status := range answers {
					require.Equal(t, map[bool]int{true: 200, false: 403}[allowed(v, name)], status, endpoint)
				}
			})
		}
	}
}

// testSrvChanges sends an event that was allowed when it was made, after the room has changed. It is refused by what the
// room is now, and also if it names and follows only what was before.
func testSrvChanges(t *testing.T, membership string, begin []srvMember, changes map[string]func(t *testing.T, r *srvRoom)) {
	for name, change := range changes {
		for _, v := range []mxfed.RoomVersion{"7", "10", "12"} {
			for _, endpoint := range srvSends[membership] {
				t.Run(name+", "+endpoint+", version "+string(v), func(t *testing.T) {
					s := newSrvSite(t)
					room := newSrvRoom(t, s, v, map[string]any{"join_rule": "knock"})
					room.history(t, begin...)
					early := room.memberOf("@alice:domain", membership)
					change(t, room)
					late := room.memberOf("@alice:domain", membership)
					hidden := late.with("auth_events", early["auth_events"])
					for _, p := range []srvPDU{early, late, hidden, late.with("prev_events", early["prev_events"])} {
						s.reset()
						s.requireRefused(t, room.sendMember(t, s.domain, endpoint, p.sign(t, v, s.domain)), 403, mxfed.ErrForbidden)
					}
				})
			}
		}
	}
}

// The rule that lets a room's creator in at its beginning does not bring back one who has left or was banned since.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func TestMembershipCheck_FounderReturns(t *testing.T) {
	for _, v := range srvVersions {
		room := newSrvRoom(t, newSrvSite(t), v, map[string]any{"join_rule": "invite"})
		create, rules := room.state[mxfed.StateKey{Type: "m.room.create"}], room.state[mxfed.StateKey{Type: "m.room.join_rules"}]
		refs := srvRefs(v, create.ID())
		first := room.joinOf(room.admin, "").with("prev_events", refs).with("auth_events", refs)
		if v == "12" {
			first["auth_events"] = []any{}
		}
		m := &mxfed.Membership{Event: srvEvent(t, v, first.sign(t, v, room.site.own))}
		for membership, allowed := range map[string]bool{"ban": false, "leave": false, "invite": true, "join": true} {
			member := room.pdu(room.admin, "m.room.member", room.admin, map[string]any{"membership": membership})
			now := &mxfed.Room{Version: v, Events: []*mxfed.Event{create}, Before: []*mxfed.Event{create},
				State: []*mxfed.Event{create, rules, srvEvent(t, v, member.sign(t, v, room.site.own))}}
			if err := m.Check(now); allowed {
				require.NoError(t, err, "%s %s", v, membership)
			} else {
				require.ErrorIs(t, err, mxfed.ErrForbidden, "%s %s", v, membership)
			}
		}
	}
}

// A host that takes prev_events of another room for those of this one is not believed.
func TestMembershipCheck_ForeignState(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"8", "10", "12"} {
		_, m, now := newSrvMembership(t, v)
		other := newSrvRoom(t, newSrvSite(t), v, nil)
		entry := other.pdu(other.admin, "m.room.topic", "", map[string]any{}).with("room_id", map[bool]string{false: "!other:us.example", true: "!" + strings.Repeat("B", 43)}[v == "12"])
		foreign := srvEvent(t, v, entry.sign(t, v, other.site.own))
		require.NoError(t, m.Check(now))
		before := now.Before
		now.Before = append(slices.Clone(before), foreign)
		require.ErrorIs(t, m.Check(now), mxfed.ErrForbidden, v)
		now.Before, now.State = before, append(slices.Clone(now.State), foreign)
		require.ErrorIs(t, m.Check(now), mxfed.ErrForbidden, v)
	}
}

// Whoever is said to authorise a member event must have signed it, wherever it comes from.
// https://spec.matrix.org/v1.19/rooms/v8/#authorization-rules
func TestVerify_Authoriser(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		room := newSrvRoom(t, s, v, nil)
		for authoriser, signers := range map[string][]*srvPeer{room.admin: {s.domain, s.own}, s.third.user("x"): {s.domain, s.third}, "nobody": nil} {
			join := room.joinOf("@alice:domain", "").with("content", map[string]any{"membership": "join", "join_authorised_via_users_server": authoriser})
			errs := s.server.Verify(t.Context(), srvEvent(t, v, join.sign(t, v, s.domain)))
			if srvRestricted(v) {
				require.ErrorIs(t, errs[0], mxfed.ErrInvalidParam, "%s %s", v, authoriser)
			} else {
				require.NoError(t, errs[0], "%s %s", v, authoriser)
			}
			if signers != nil {
				require.NoError(t, s.server.Verify(t.Context(), srvEvent(t, v, join.sign(t, v, signers...)))[0], "%s %s", v, authoriser)
			}
		}
	}
}

// What came under the ID of an old key of ours would make our signature void for others if it is wrong.
func TestSend_OldKeyOfOurs(t *testing.T) {
	old := newSrvPeer(t, "old.example")
	s := newSrvSite(t, func(cfg *mxfed.Config) {
		signer, err := mxfed.NewSigner("us.example", "ed25519:k", newSrvPeer(t, "us.example").key,
			mxfed.Key{ID: "ed25519:old", Public: old.key.Public().(ed25519.PublicKey), Expired: srvNow})
		require.NoError(t, err)
		cfg.Signers = []*mxfed.Signer{signer}
	})
	for _, v := range srvVersions {
		room := newSrvRoom(t, s, v, nil)
		forged := map[string]any{"us.example": map[string]any{"ed25519:old": strings.Repeat("A", 86), "ed25519:other": strings.Repeat("A", 86)}}
		pdu := room.joinOf("@alice:domain", "").with("signatures", forged).sign(t, v, s.domain)
		w := room.sendMember(t, s.domain, "v2/send_join", pdu)
		require.Equal(t, 200, w.Code, "%s", w.Body)
		signed := srvObject(t, w.Body.Bytes())["event"].(map[string]any)["signatures"].(map[string]any)["us.example"]
		require.ElementsMatch(t, []string{"ed25519:k", "ed25519:other"}, slices.Collect(maps.Keys(signed.(map[string]any))), v)
	}
}

// The create event is part of every auth chain, also where no event names it and the host leaves it out; it comes once.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func TestSendJoin_CreateInAuthChain(t *testing.T) {
	for _, v := range srvVersions {
		for _, given := range []int{0, 1, 2} {
			s := newSrvSite(t)
			room := newSrvRoom(t, s, v, nil)
			create := room.state[mxfed.StateKey{Type: "m.room.create"}]
			s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
				answer := &mxfed.SendJoinResponse{}
				if given > 0 {
					answer.Auth = srvSequence(slices.Repeat([]*mxfed.Event{create}, given-1), false)
				}
				return answer, nil
			}
			w := room.sendMember(t, s.domain, "v2/send_join", room.joinOf("@alice:domain", "").sign(t, v, s.domain))
			require.Equal(t, 200, w.Code)
			want := max(given-1, 0)
			if v == "12" {
				want = 1
			}
			require.Len(t, srvObject(t, w.Body.Bytes())["auth_chain"], want, "%s %d", v, given)
		}
	}
}

// What holds no event cannot be encoded, and says so.
func TestInvite_MarshalNothing(t *testing.T) {
	for _, m := range []json.Marshaler{&mxfed.InviteRequest{}, &mxfed.InviteResponse{}} {
		_, err := m.MarshalJSON()
		require.ErrorContains(t, err, "Event is nil")
	}
	room := newSrvRoom(t, newSrvSite(t), "10", nil)
	e := room.state[mxfed.StateKey{Type: "m.room.create"}]
	b, err := (&mxfed.InviteRequest{Event: e, State: []*mxfed.Event{nil, e}}).MarshalJSON()
	require.NoError(t, err)
	require.Len(t, srvObject(t, b)["invite_room_state"], 1)
}
