package main

import (
	"context"
	"crypto/ed25519"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/internal/loopback"
	"example.org/mxfed/examples/memhost"
)

func TestIsInvitedAndJoins(t *testing.T) {
	network, err := loopback.New()
	require.NoError(t, err)
	defer network.Close()
	config := func(name mxfed.ServerName) mxfed.Config {
		_, key, err := ed25519.GenerateKey(nil)
		require.NoError(t, err)
		signer, err := mxfed.NewSigner(name, "ed25519:1", key)
		require.NoError(t, err)
		return mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: network.Transport}
	}
	b := &bot{user: "@bot:bot.example", invites: make(chan *mxfed.Invite, 1)}
	b.server, err = mxfed.NewServer(config("bot.example"))
	require.NoError(t, err)
	require.NoError(t, network.Serve("bot.example", mxfed.NewHandler(b.server, mxfed.Hosts{Invite: b})))
	alice, err := memhost.New(config("alice.example"))
	require.NoError(t, err)
	require.NoError(t, network.Serve("alice.example", mxfed.NewHandler(alice.Server, mxfed.Hosts{Join: alice})))

	room, err := alice.CreateRoom(t.Context(), "12", "@alice:alice.example")
	require.NoError(t, err)
	_, err = alice.Invite(t.Context(), room, "@alice:alice.example", "@stranger:bot.example")
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	_, err = alice.Invite(t.Context(), room, "@alice:alice.example", "@bot:bot.example")
	require.NoError(t, err)
	other, err := alice.CreateRoom(t.Context(), "12", "@alice:alice.example")
	require.NoError(t, err)
	_, err = alice.Invite(t.Context(), other, "@alice:alice.example", "@bot:bot.example")
	require.ErrorIs(t, err, mxfed.ErrLimitExceeded, "nobody takes the first invite yet")

	ctx, stop := context.WithCancel(t.Context())
	joined := make(chan *mxfed.JoinResult)
	var running sync.WaitGroup
	running.Go(func() { b.run(ctx, func(r *mxfed.JoinResult) { joined <- r }) })
	result := <-joined
	require.Equal(t, room, result.Event.RoomID())
	_, all := alice.Events(room)
	require.Equal(t, result.Event.ID(), all[len(all)-1].ID())
	stop()
	running.Wait()
}
