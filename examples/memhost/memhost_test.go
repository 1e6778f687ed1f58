package memhost_test

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net/http"
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

// servers starts one host for each of the users' servers.
func servers(t *testing.T) (a, b, c *memhost.Host) {
	t.Helper()
	network, err := loopback.New()
	require.NoError(t, err)
	t.Cleanup(network.Close)
	network.Transport.MaxConnsPerHost = 8
	var hosts []*memhost.Host
	for _, user := range []mxfed.UserID{alice, bob, carol} {
		_, key, err := ed25519.GenerateKey(nil)
		require.NoError(t, err)
		signer, err := mxfed.NewSigner(user.Server(), "ed25519:1", key)
		require.NoError(t, err)
		host, err := memhost.New(mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: network.Transport})
		require.NoError(t, err)
		require.NoError(t, network.Serve(user.Server(), mxfed.NewHandler(host.Server, mxfed.Hosts{Invite: host, Join: host})))
		hosts = append(hosts, host)
	}
	return hosts[0], hosts[1], hosts[2]
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
	a, b, _ := servers(t)
	room, err := a.CreateRoom(t.Context(), "12", alice)
	require.NoError(t, err)
	_, err = b.Join(t.Context(), through(room, bob, alice))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	invite, err := a.Invite(t.Context(), room, alice, bob)
	require.NoError(t, err)
	require.Equal(t, invite.JSON(), b.Invites()[invite.ID()].Event.JSON())
	require.Equal(t, "invite", membership(t, a, room, bob))
	_, err = b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	for _, h := range []*memhost.Host{a, b} {
		require.Equal(t, "join", membership(t, h, room, bob))
		require.Equal(t, "join", membership(t, h, room, alice))
	}
}

func TestJoinedServerLetsOthersIn(t *testing.T) {
	a, b, c := servers(t)
	room, err := a.CreateRoom(t.Context(), "11", alice, public())
	require.NoError(t, err)
	_, err = c.Join(t.Context(), through(room, carol, bob))
	require.ErrorIs(t, err, mxfed.ErrNotFound)
	_, err = b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	_, err = c.Join(t.Context(), through(room, carol, bob))
	require.NoError(t, err)
	require.Equal(t, "join", membership(t, b, room, carol))
	require.Equal(t, "join", membership(t, c, room, alice))
}

func TestRestrictedRoom(t *testing.T) {
	a, b, c := servers(t)
	lobby, err := a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	rule := fmt.Sprintf(`{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":%q}]}`, lobby)
	room, err := a.CreateRoom(t.Context(), "10", alice, memhost.State("m.room.join_rules", "", rule))
	require.NoError(t, err)
	_, err = b.Join(t.Context(), through(room, bob, alice))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	_, err = b.Join(t.Context(), through(lobby, bob, alice))
	require.NoError(t, err)
	_, err = b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)

	// Bob's server has not heard of Carol in the lobby, and a server outside of it could not tell.
	_, err = c.Join(t.Context(), through(lobby, carol, alice))
	require.NoError(t, err)
	_, err = c.Join(t.Context(), through(room, carol, bob))
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	_, err = c.Join(t.Context(), through(room, carol, alice))
	require.NoError(t, err)
}

// TestAcceptJoin_Again sends one join twice with a ban in between: the room has it once, and the answer is that of before.
func TestAcceptJoin_Again(t *testing.T) {
	a, b, _ := servers(t)
	room, err := a.CreateRoom(t.Context(), "10", alice, public())
	require.NoError(t, err)
	result, err := b.Join(t.Context(), through(room, bob, alice))
	require.NoError(t, err)
	_, err = a.Send(t.Context(), in(room, alice, memhost.State("m.room.member", string(bob), `{"membership":"ban"}`)))
	require.NoError(t, err)
	_, before := a.Events(room)

	again, err := b.Server.Client().SendJoin(t.Context(), alice.Server(), &mxfed.SendJoinRequest{Event: result.Event})
	require.ErrorIs(t, err, mxfed.ErrNotFound) // nobody of that server is left, except Alice
	_ = again
	_, after := a.Events(room)
	require.Equal(t, before, after)
}
