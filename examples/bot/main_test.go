package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"io"
	"log"
	"os"
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
	b, err := newBot("@bot:bot.example", config("bot.example"))
	require.NoError(t, err)
	require.NoError(t, network.Serve("bot.example", b.handler()))
	alice, err := memhost.New(config("alice.example"))
	require.NoError(t, err)
	require.NoError(t, network.Serve("alice.example", mxfed.NewHandler(alice.Server, mxfed.Hosts{Join: alice})))

	output, logged := io.Pipe()
	log.SetOutput(logged)
	defer log.SetOutput(os.Stderr)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		b.run(ctx)
		close(done)
	}()
	defer func() {
		stop()
		<-done
	}()

	room, err := alice.CreateRoom(ctx, "12", "@alice:alice.example")
	require.NoError(t, err)
	_, err = alice.Invite(ctx, room, "@alice:alice.example", "@stranger:bot.example")
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	_, err = alice.Invite(ctx, room, "@alice:alice.example", "@bot:bot.example")
	require.NoError(t, err)
	for lines := bufio.NewScanner(output); lines.Scan(); {
		if text := lines.Text(); text == "" {
			break
		}
	}
}
