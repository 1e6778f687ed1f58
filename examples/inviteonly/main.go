// Inviteonly is a whole server that takes invites, logs them, and does nothing else.
//
//	inviteonly example.org
//
// It wants signing.key, 32 secret random bytes, and cert.pem and key.pem for TLS in its directory.
package main

import (
	"context"
	"crypto/ed25519"
	"log"
	"net/http"
	"os"
	"time"

	"example.org/mxfed"
)

func main() {
	seed, err := os.ReadFile("signing.key")
	if err != nil || len(os.Args) != 2 || len(seed) != ed25519.SeedSize {
		log.Fatal("usage: inviteonly server-name, with 32 bytes in signing.key; ", err)
	}
	signer, err := mxfed.NewSigner(mxfed.ServerName(os.Args[1]), "ed25519:1", ed25519.NewKeyFromSeed(seed))
	if err != nil {
		log.Fatal(err)
	}
	handler, err := newHandler(mxfed.Config{Signers: []*mxfed.Signer{signer}})
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Addr: ":8448", Handler: handler, ReadTimeout: time.Minute}
	log.Fatal(server.ListenAndServeTLS("cert.pem", "key.pem"))
}

func newHandler(cfg mxfed.Config) (http.Handler, error) {
	server, err := mxfed.NewServer(cfg)
	if err != nil {
		return nil, err
	}
	return mxfed.NewHandler(server, mxfed.Hosts{Invite: mxfed.InviteHostFunc(func(_ context.Context, inv *mxfed.Invite) error {
		log.Printf("%s invites %s to %s", inv.Event.Sender(), inv.User, inv.Event.RoomID())
		return nil
	})}), nil
}
