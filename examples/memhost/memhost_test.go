package memhost_test

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"iter"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/internal/loopback"
	"example.org/mxfed/examples/memhost"
)

const (
	alice mxfed.UserID = "@alice:a.example"
	bob   mxfed.UserID = "@bob:b.example"
	carol mxfed.UserID = "@carol:c.example"
)

// world is one host for each of the users' servers.
type world struct {
	*loopback.Network
	a, b, c *memhost.Host
}

func newWorld(t *testing.T, allow func(context.Context, *mxfed.Request) error) world {
	t.Helper()
	network, err := loopback.New()
	require.NoError(t, err)
	t.Cleanup(network.Close)
	network.Transport.MaxConnsPerHost = 8
	var hosts []*memhost.Host
	for _, user := range []mxfed.UserID{alice, bob, carol} {
		host, err := memhost.New(mxfed.Config{Signers: []*mxfed.Signer{signer(t, user.Server())}, HTTP: network.Transport, Allow: allow})
		require.NoError(t, err)
		require.NoError(t, network.Serve(user.Server(), mxfed.NewHandler(host.Server, host.Hosts())))
		hosts = append(hosts, host)
	}
	return world{network, hosts[0], hosts[1], hosts[2]}
}

// signer has a key that is made of the name.
func signer(t *testing.T, name mxfed.ServerName) *mxfed.Signer {
	t.Helper()
	seed := sha256.Sum256([]byte(name))
	s, err := mxfed.NewSigner(name, "ed25519:1", ed25519.NewKeyFromSeed(seed[:]))
	require.NoError(t, err)
	return s
}

func public() *mxfed.Draft { return memhost.State("m.room.join_rules", "", `{"join_rule":"public"}`) }

// in puts a draft into a room.
func in(room mxfed.RoomID, sender mxfed.UserID, d *mxfed.Draft) *mxfed.Draft {
	d.Room, d.Sender = room, sender
	return d
}

func through(room mxfed.RoomID, user mxfed.UserID, via mxfed.UserID) *mxfed.JoinRequest {
	return &mxfed.JoinRequest{Room: room, User: user, Via: []mxfed.ServerName{via.Server()}}
}

// membership is what the room's state at a host says of a user.
func membership(t *testing.T, h *memhost.Host, room mxfed.RoomID, user mxfed.UserID) string {
	t.Helper()
	state, _ := h.Events(room)
	for _, e := range state {
		if key, _ := e.StateKey(); e.Type() == "m.room.member" && key == string(user) {
			var content struct{ Membership string }
			require.NoError(t, json.Unmarshal(e.Content(), &content))
			return content.Membership
		}
	}
	return ""
}

func TestInviteThenJoin(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "12", alice)
	require.NoError(t, err)
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	invite, err := w.a.Invite(t.Context(), room, alice, bob)
	require.NoError(t, err)
	require.Equal(t, invite.JSON(), w.b.Invites()[invite.ID()].Event.JSON())
	require.Equal(t, "invite", membership(t, w.a, room, bob))
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	for _, h := range []*memhost.Host{w.a, w.b} {
		require.Equal(t, "join", membership(t, h, room, bob))
		require.Equal(t, "join", membership(t, h, room, alice))
	}
}

func TestJoinedServerLetsOthersIn(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "11", alice, public())
	require.NoError(t, err)
	_, err = w.c.Join(t.Context(), through(room, carol, bob))
	require.ErrorIs(t, err, mxfed.ErrNotFound)
	joined, err := w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	_, err = w.c.Join(t.Context(), through(room, carol, bob))
	require.NoError(t, err)
	require.Equal(t, "join", membership(t, w.b, room, carol))
	require.Equal(t, "join", membership(t, w.c, room, alice))

	// What came before its own join, a server knows by name only.
	facts, err := w.c.Room(t.Context(), room, mxfed.RoomQuery{Prev: []mxfed.EventID{joined.Event.ID()}, Events: joined.Event.Prev()})
	require.NoError(t, err)
	require.Nil(t, facts.Before)
	require.Len(t, facts.Events, 1)
	_, err = w.b.Server.Client().SendJoin(t.Context(), carol.Server(), &mxfed.SendJoinRequest{Event: joined.Event})
	require.ErrorIs(t, err, mxfed.ErrNotFound)
}

func TestRestrictedRoom(t *testing.T) {
	w := newWorld(t, nil)
	lobby, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	rule := fmt.Sprintf(`{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":%q}]}`, lobby)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, memhost.State("m.room.join_rules", "", rule))
	require.NoError(t, err)
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	_, err = w.b.Join(t.Context(), through(lobby, bob, alice))
	require.NoError(t, err)
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)

	// Carol's join of the lobby is known where it was made, and nobody has told Bob's server of it.
	_, err = w.c.Join(t.Context(), through(lobby, carol, alice))
	require.NoError(t, err)
	_, err = w.c.Join(t.Context(), through(room, carol, bob))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	_, err = w.c.Join(t.Context(), through(room, carol, alice))
	require.NoError(t, err)
}

// TestRestrictedRoom_Unknown asks a server that is not sure who is in the other room.
func TestRestrictedRoom_Unknown(t *testing.T) {
	w := newWorld(t, nil)
	lobby, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	rule := fmt.Sprintf(`{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":%q}]}`, lobby)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, memhost.State("m.room.join_rules", "", rule))
	require.NoError(t, err)
	without := through(lobby, bob, alice)
	without.OmitMembers = true
	_, err = w.b.Join(t.Context(), without)
	require.NoError(t, err)
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	_, err = w.c.Join(t.Context(), through(room, carol, bob))
	require.ErrorIs(t, err, mxfed.ErrUnableToAuthoriseJoin)
}

// TestAcceptJoin_Again sends a join again after the user was banned: the room has it once, and the answer is what it was.
func TestAcceptJoin_Again(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	result, err := w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	_, err = w.a.Send(t.Context(), in(room, alice, memhost.State("m.room.member", string(bob), `{"membership":"ban"}`)))
	require.NoError(t, err)
	_, before := w.a.Events(room)

	again, err := w.b.Server.Client().SendJoin(t.Context(), alice.Server(), &mxfed.SendJoinRequest{Event: result.Event})
	require.NoError(t, err)
	require.Equal(t, result.Event.JSON(), again.Event.JSON())
	require.ElementsMatch(t, texts(result.State), pdus(t, again.State))
	require.ElementsMatch(t, texts(result.Auth), pdus(t, again.Auth))
	_, after := w.a.Events(room)
	require.Equal(t, texts(before), texts(after))
	require.Equal(t, "ban", membership(t, w.a, room, bob))
}

// TestAcceptJoin_Late bans a user after the library's look at the room and before the host's own.
func TestAcceptJoin_Late(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	late := mxfed.JoinHostFunc(func(ctx context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		_, err := w.a.Send(ctx, in(room, alice, memhost.State("m.room.member", string(bob), `{"membership":"ban"}`)))
		if err != nil {
			return nil, err
		}
		return w.a.AcceptJoin(ctx, m)
	})
	require.NoError(t, w.Serve(alice.Server(), mxfed.NewHandler(w.a.Server, mxfed.Hosts{Join: late})))
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	require.Equal(t, "ban", membership(t, w.a, room, bob))
	state, all := w.a.Events(room)
	require.Len(t, all, len(state), "nothing but the ban was added")
	state, _ = w.b.Events(room)
	require.Empty(t, state)
}

func texts(events []*mxfed.Event) (list []string) {
	for _, e := range events {
		list = append(list, string(e.JSON()))
	}
	return list
}

func pdus(t *testing.T, sequence iter.Seq2[[]byte, error]) (list []string) {
	t.Helper()
	for pdu, err := range sequence {
		require.NoError(t, err)
		list = append(list, string(pdu))
	}
	return list
}

func TestOmitMembers(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	req := through(room, carol, alice)
	req.OmitMembers = true
	result, err := w.c.Join(t.Context(), req)
	require.NoError(t, err)
	require.Equal(t, []mxfed.ServerName{"a.example", "b.example"}, result.Servers)
	for _, e := range result.State {
		require.NotEqual(t, "m.room.member", e.Type())
	}
	require.Empty(t, membership(t, w.c, room, bob))
	_, err = w.b.Join(t.Context(), through(room, "@bill:b.example", carol))
	require.ErrorIs(t, err, mxfed.ErrNotFound, "c.example does not know who is in the room")
	named, err := w.c.Send(t.Context(), in(room, carol, memhost.State("m.room.topic", "", `{"topic":"x"}`)))
	require.ErrorIs(t, err, mxfed.ErrForbidden, "%v", named)

	_, err = w.c.Complete(t.Context(), result)
	require.NoError(t, err)
	require.Equal(t, "join", membership(t, w.c, room, bob))
	require.Equal(t, "join", membership(t, w.c, room, carol))
	_, err = w.b.Join(t.Context(), through(room, "@bill:b.example", carol))
	require.NoError(t, err)
}

// TestBranches lets two joins meet that know nothing of each other.
func TestBranches(t *testing.T) {
	var ready sync.WaitGroup
	ready.Add(2)
	both := func(_ context.Context, r *mxfed.Request) error {
		if r.Endpoint == "send_join" { // both have their templates
			ready.Done()
			ready.Wait()
		}
		return nil
	}
	w := newWorld(t, both)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	var results [2]*mxfed.JoinResult
	var errs [2]error
	var joins sync.WaitGroup
	joins.Go(func() { results[0], errs[0] = w.b.Join(t.Context(), through(room, bob, alice)) })
	joins.Go(func() { results[1], errs[1] = w.c.Join(t.Context(), through(room, carol, alice)) })
	joins.Wait()
	require.NoError(t, errs[0])
	require.NoError(t, errs[1])
	require.Empty(t, membership(t, w.b, room, carol))
	require.Empty(t, membership(t, w.c, room, bob))
	require.Equal(t, "join", membership(t, w.a, room, bob))
	require.Equal(t, "join", membership(t, w.a, room, carol))

	e, err := w.a.Send(t.Context(), in(room, alice, memhost.State("m.room.name", "", `{"name":"together"}`)))
	require.NoError(t, err)
	require.ElementsMatch(t, []mxfed.EventID{results[0].Event.ID(), results[1].Event.ID()}, e.Prev())
	facts, err := w.a.Room(t.Context(), room, mxfed.RoomQuery{Prev: []mxfed.EventID{results[0].Event.ID()}})
	require.NoError(t, err)
	require.Len(t, facts.Before, len(results[0].State)+1)
	facts, err = w.a.Room(t.Context(), room, mxfed.RoomQuery{Prev: e.Prev()})
	require.NoError(t, err)
	require.Len(t, facts.Before, len(results[0].State)+2)
	facts, err = w.a.Room(t.Context(), room, mxfed.RoomQuery{Prev: []mxfed.EventID{e.ID(), "$unknown"}})
	require.NoError(t, err)
	require.Nil(t, facts.Before)
}

func TestThousandJoins(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	_, err = w.b.Join(t.Context(), through(room, bob, alice)) // now both have the other's keys
	require.NoError(t, err)
	_, before := w.a.Events(room)
	const users = 1000
	errs := make([]error, users)
	var joins sync.WaitGroup
	for i := range users {
		joins.Go(func() {
			user := mxfed.UserID(fmt.Sprintf("@user%d:b.example", i))
			_, errs[i] = w.b.Server.Client().Join(t.Context(), through(room, user, alice))
		})
	}
	joins.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	state, all := w.a.Events(room)
	require.Len(t, all, len(before)+users)
	require.Len(t, state, len(before)+users)
	known := make(map[mxfed.EventID]bool)
	for _, e := range all {
		for _, id := range e.Prev() {
			require.True(t, known[id], "an event stands behind those that it was built on")
		}
		known[e.ID()] = true
	}
	require.Len(t, known, len(all))
}

func TestReject(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice)
	require.NoError(t, err)
	invite, err := w.a.Invite(t.Context(), room, alice, bob)
	require.NoError(t, err)
	require.NoError(t, w.b.Reject(t.Context(), w.b.Invites()[invite.ID()]))
	require.Equal(t, "leave", membership(t, w.a, room, bob))
	require.Empty(t, w.b.Invites())
}

// TestReject_Untold rejects an invite to a room whose server has forgotten it.
func TestReject_Untold(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice)
	require.NoError(t, err)
	invite, err := w.a.Invite(t.Context(), room, alice, bob)
	require.NoError(t, err)
	empty, err := memhost.New(mxfed.Config{Signers: []*mxfed.Signer{signer(t, alice.Server())}, HTTP: w.Transport})
	require.NoError(t, err)
	require.NoError(t, w.Serve(alice.Server(), mxfed.NewHandler(empty.Server, mxfed.Hosts{Leave: empty})))
	taken := w.b.Invites()[invite.ID()]
	given, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, w.b.Reject(given, taken), context.Canceled)
	require.Len(t, w.b.Invites(), 1, "it was not rejected")
	require.NoError(t, w.b.Reject(t.Context(), taken))
	require.Empty(t, w.b.Invites())
}

func TestKnock(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.a.CreateRoom(t.Context(), "10", alice, memhost.State("m.room.join_rules", "", `{"join_rule":"knock"}`))
	require.NoError(t, err)
	req := &mxfed.KnockRequest{Room: room, User: bob, Via: []mxfed.ServerName{alice.Server()}}
	knock, err := w.b.Server.Client().Knock(t.Context(), req)
	require.NoError(t, err)
	require.Equal(t, "knock", membership(t, w.a, room, bob))
	invite, err := w.a.Invite(t.Context(), room, alice, bob)
	require.NoError(t, err)
	require.True(t, w.b.Invites()[invite.ID()].Answers(knock.Event))
	_, err = w.b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	require.Equal(t, "join", membership(t, w.a, room, bob))
}
