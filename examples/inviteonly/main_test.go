package main

import (
	"bytes"
	"crypto/ed25519"
	"log"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/internal/loopback"
	"example.org/mxfed/examples/memhost"
)

func TestTakesInvites(t *testing.T) {
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
	handler, err := newHandler(config("small.example"))
	require.NoError(t, err)
	require.NoError(t, network.Serve("small.example", handler))
	alice, err := memhost.New(config("alice.example"))
	require.NoError(t, err)
	require.NoError(t, network.Serve("alice.example", mxfed.NewHandler(alice.Server, mxfed.Hosts{Join: alice})))
	var logged bytes.Buffer
	log.SetOutput(&logged)
	defer log.SetOutput(os.Stderr)

	room, err := alice.CreateRoom(t.Context(), "12", "@alice:alice.example")
	require.NoError(t, err)
	_, err = alice.Invite(t.Context(), room, "@alice:alice.example", "@anybody:small.example")
	require.NoError(t, err)
	require.Contains(t, logged.String(), "@alice:alice.example invites @anybody:small.example to "+string(room))

	err = alice.Server.Client().Do(t.Context(), "", "small.example", "GET",
		"/_matrix/federation/v1/make_join/"+string(room)+"/@alice:alice.example?ver=12", nil, nil)
	require.ErrorIs(t, err, mxfed.ErrUnrecognized)
}
