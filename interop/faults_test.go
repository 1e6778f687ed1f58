//go:build unix

package interop

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// The two things that not every peer has, and that are asked for here.
const (
	blocking   feature = "blocking of invites" // https://spec.matrix.org/v1.19/client-server-api/#invite-permission
	oldPreview feature = "previews in version 1 of invites"
)

// TestBlockedInvite invites users who do not want to be invited: they are not in the room then, and whoever has invited them
// is told that it was of no use. https://spec.matrix.org/v1.19/server-server-api/#inviting-to-a-room
func TestBlockedInvite(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			at := newSite(t)
			theirs, ours := p.start(t, at), startHomeserver(t, at)
			oursBlocks(t, p, at, theirs)
			theirsBlocks(t, p, theirs, ours)
		})
	}
}

// oursBlocks has servers of the library refuse invites with either code that there is for that.
func oursBlocks(t *testing.T, p *peer, at *site, theirs *server) {
	var asked atomic.Int32
	servers := make(map[mxfed.ErrorCode]mxfed.ServerName)
	for _, code := range []mxfed.ErrorCode{mxfed.ErrForbidden, mxfed.ErrInviteBlocked} {
		servers[code] = serve(t, at, func(cfg mxfed.Config) http.Handler {
			server, err := mxfed.NewServer(cfg)
			require.NoError(t, err)
			return mxfed.NewHandler(server, mxfed.Hosts{Invite: mxfed.InviteHostFunc(func(context.Context, *mxfed.Invite) error {
				asked.Add(1)
				return code
			})})
		})
	}
	for v := range roomVersions(1, 12) {
		t.Run("v"+string(v)+"/"+ourUser, func(t *testing.T) {
			results.add(t, p.String(), blockedInvite, ourUser, v)
			alice := newPhone(t, theirs, "alice.v"+string(v))
			room := alice.create(v, nil)
			for code, name := range servers {
				before := asked.Load()
				alice.invitesInVain(room, "@bob:"+mxfed.UserID(name), code)
				require.Greater(t, asked.Load(), before)
			}
		})
	}
}

const blockedInvite = "invite of a blocking user"

// theirsBlocks has a user of the peer block all invites.
func theirsBlocks(t *testing.T, p *peer, theirs, ours *server) {
	bob := newPhone(t, theirs, "bob")
	bob.must("PUT", "user/"+url.PathEscape(string(bob.user))+"/account_data/m.invite_permission_config", object{"default_action": "block"})
	for v := range roomVersions(1, 12) {
		t.Run("v"+string(v)+"/"+theirUser, func(t *testing.T) {
			alice := newPhone(t, ours, "alice.v"+string(v))
			room := alice.create(v, nil)
			if slices.Contains(p.lacks, blocking) { // to it, that is data like any other
				alice.must("POST", in(room, "invite"), about(bob))
				return
			}
			results.add(t, p.String(), blockedInvite, theirUser, v)
			alice.invitesInVain(room, bob.user, mxfed.ErrInviteBlocked)
		})
	}
}

// invitesInVain invites somebody whose server has an error for that. Clients are told it or that it is forbidden.
func (p *phone) invitesInVain(room mxfed.RoomID, whom mxfed.UserID, code mxfed.ErrorCode) {
	p.Helper()
	got := new(answer)
	status, text := p.request("POST", in(room, "invite"), object{"user_id": whom}, got)
	require.Equal(p, http.StatusForbidden, status, "%s", text)
	require.Contains(p, []mxfed.ErrorCode{code, mxfed.ErrForbidden}, mxfed.ErrorCode(got.Code))
	p.fails(http.StatusNotFound, "M_NOT_FOUND", "GET", in(room, "state/m.room.member/"+url.PathEscape(string(whom))), nil)
}

// TestWithoutV2 has servers that know no version 2 of joins, leaves and, in the rooms in which there is another one, invites.
// Then version 1 has to do. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1inviteroomideventid
func TestWithoutV2(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			withoutV2(t, p, roomVersions(1, 2), "v2/invite", "v2/send_join", "v2/send_leave")
			withoutV2(t, p, roomVersions(3, 12), "v2/send_join", "v2/send_leave")
		})
	}
}

// withoutV2 plays between servers that both lack some endpoints.
func withoutV2(t *testing.T, p *peer, rooms iter.Seq[mxfed.RoomVersion], missing ...string) {
	at := newSite(t)
	theirs, ofTheirs := taped(t, at, p.start, missing...)
	ours, ofOurs := taped(t, at, startHomeserver, missing...)
	for v := range rooms {
		play := func(direction string, here, there *server, ofHere, ofThere *tape) {
			t.Run("v"+string(v)+"/"+direction, func(t *testing.T) {
				results.add(t, p.String(), "version 1 of endpoints", direction, v)
				w := &world{T: t, peer: p, version: v, here: here, there: there, users: ".v" + string(v)}
				w.alice, w.bob = w.newUser(here, "alice"), w.newUser(there, "bob")
				invite := w.invite
				if there == theirs && slices.Contains(missing, "v2/invite") && slices.Contains(p.lacks, oldPreview) {
					invite = w.inviteBlindly
				}
				w.playWithoutV2(ofHere, ofThere, invite)
			})
		}
		play(ourUser, theirs, ours, ofTheirs, ofOurs)
		play(theirUser, ours, theirs, ofOurs, ofTheirs)
	}
}

// playWithoutV2 lets bob turn down one invite and accept another one.
func (w *world) playWithoutV2(ofHere, ofThere *tape, invite func(mxfed.RoomID)) {
	rejected, accepted := w.alice.create(w.version, nil), w.alice.create(w.version, nil)
	invite(rejected)
	w.bob.must("POST", in(rejected, "leave"), object{})
	require.Equal(w, w.bob.user, w.alice.see(rejected, w.bob, "leave").Sender)
	invite(accepted)
	w.bob.must("POST", joining(string(accepted), w.here), nil)
	w.talk(accepted)

	const missing, ok = "404 M_UNRECOGNIZED", "200"
	if w.version == "1" || w.version == "2" {
		require.Equal(w, []string{missing}, ofThere.answers("v2/invite", accepted))
		require.Equal(w, []string{ok}, ofThere.answers("v1/invite", accepted))
	}
	require.Equal(w, []string{missing}, ofHere.answers("v2/send_join", accepted))
	require.Equal(w, []string{ok}, ofHere.answers("v1/send_join", accepted))
	require.Equal(w, []string{missing}, ofHere.answers("v2/send_leave", rejected))
	require.Equal(w, []string{ok}, ofHere.answers("v1/send_leave", rejected))
}

// inviteBlindly invites bob, whose server does not tell him what the room is.
func (w *world) inviteBlindly(room mxfed.RoomID) {
	w.Helper()
	w.alice.must("POST", in(room, "invite"), about(w.bob))
	w.bob.await(func() bool { return w.bob.invites[room] != nil })
	require.Len(w, w.bob.invites[room], 1)
}

// TestSecondAuthoriser has bob join a restricted room through a server that cannot let him in, and then through another one
// that can. https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func TestSecondAuthoriser(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			at := newSite(t)
			theirs, ofTheirs := taped(t, at, p.start)
			ours, ofOurs := taped(t, at, startHomeserver)
			third := startHomeserver(t, at)
			for v := range roomVersions(8, 12) {
				play := func(direction string, there, first *server, ofFirst *tape, refusals ...[]string) {
					t.Run("v"+string(v)+"/"+direction, func(t *testing.T) {
						results.add(t, p.String(), "second authorising server", direction, v)
						w := &world{T: t, peer: p, version: v, here: third, there: there, users: ".v" + string(v) + direction[:3]}
						w.alice, w.bob = w.newUser(third, "alice"), w.newUser(there, "bob")
						carol := w.newUser(first, "carol")
						w.authoriseElsewhere("restricted", carol, ofFirst, refusals)
						if v == "10" || v == "11" || v == "12" { // https://spec.matrix.org/v1.19/rooms/v10/
							w.authoriseElsewhere("knock_restricted", carol, ofFirst, refusals)
						}
					})
				}
				play(ourUser, ours, theirs, ofTheirs, cannot, cannot)
				play(theirUser, theirs, ours, ofOurs, cannot[:1], cannot[1:2])
			}
		})
	}
}

// cannot is what servers answer that cannot tell whether a user may join a restricted room, that have nobody who could let the
// user in, and that do not tell these apart. Some look for somebody first and at the conditions then, some do it the other way
// round, and either may come out as the last one.
var cannot = []string{"400 M_UNABLE_TO_AUTHORISE_JOIN", "400 M_UNABLE_TO_GRANT_JOIN", "403 M_FORBIDDEN"}

// authoriseElsewhere has carol's server refuse bob twice: it knows nothing of the club that bob is in, and when it does, then it
// has nobody who may invite. Both times he gets in through alice's. refusals are the answers that will do, for each time.
func (w *world) authoriseElsewhere(rule string, carol *phone, ofFirst *tape, refusals [][]string) {
	club := w.alice.create(w.version, object{"preset": "public_chat"})
	room := w.alice.create(w.version, object{"initial_state": []object{{"type": "m.room.join_rules", "state_key": "", "content": object{
		"join_rule": rule, "allow": []object{{"type": "m.room_membership", "room_id": club}}}}},
		"power_level_content_override": object{"invite": 50}})
	w.alice.must("POST", in(room, "invite"), about(carol))
	carol.await(func() bool { return carol.invites[room] != nil })
	carol.must("POST", joining(string(room), w.here), nil)
	carol.see(room, w.alice, "join") // now her server knows all of the room
	w.bob.must("POST", joining(string(club), w.here), nil)
	join := func() {
		w.bob.must("POST", joiningThrough(room, carol.on, w.here), nil)
		require.Equal(w, w.alice.user, w.alice.see(room, w.bob, "join").Content.Authoriser)
		w.talk(room)
	}
	join()

	w.bob.must("POST", in(room, "leave"), object{})
	carol.must("POST", joining(string(club), w.here), nil)
	carol.see(club, w.bob, "join")
	carol.see(room, w.bob, "leave")
	w.alice.see(room, w.bob, "leave")
	join()
	answers := ofFirst.answers("v1/make_join", room)
	require.Len(w, answers, len(refusals))
	for i, answer := range answers {
		require.Contains(w, refusals[i], answer)
	}
	require.Empty(w, ofFirst.answers("v2/send_join", room))
}
