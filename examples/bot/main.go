// Bot is a server with one user, who joins every room that the user is invited to.
//
//	bot @bot:example.org
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
		log.Fatal("usage: bot user-id, with 32 bytes in signing.key; ", err)
	}
	user := mxfed.UserID(os.Args[1])
	signer, err := mxfed.NewSigner(user.Server(), "ed25519:1", ed25519.NewKeyFromSeed(seed))
	if err != nil {
		log.Fatal(err)
	}
	b := &bot{user: user, invites: make(chan *mxfed.Invite, 100)}
	if b.server, err = mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}}); err != nil {
		log.Fatal(err)
	}
	go b.run(context.Background(), func(r *mxfed.JoinResult) {
		log.Printf("joined %s, a room of %d state events", r.Event.RoomID(), len(r.State))
	})
	server := &http.Server{Addr: ":8448", Handler: mxfed.NewHandler(b.server, mxfed.Hosts{Invite: b}), ReadTimeout: time.Minute}
	log.Fatal(server.ListenAndServeTLS("cert.pem", "key.pem"))
}

type bot struct {
	server  *mxfed.Server
	user    mxfed.UserID
	invites chan *mxfed.Invite
}

// Invited implements mxfed.InviteHost. A bot that must not lose an invite stores it here.
func (b *bot) Invited(_ context.Context, inv *mxfed.Invite) error {
	if inv.User != b.user {
		return mxfed.ErrForbidden
	}
	select {
	case b.invites <- inv:
		return nil
	default:
		return mxfed.ErrLimitExceeded
	}
}

// run joins, one room after the other, until ctx ends.
func (b *bot) run(ctx context.Context, joined func(*mxfed.JoinResult)) {
	for ctx.Err() == nil {
		select {
		case inv := <-b.invites:
			if result, err := b.join(ctx, inv); err != nil {
				log.Print(err)
			} else {
				joined(result)
			}
		case <-ctx.Done():
		}
	}
}

// join tries for some minutes. The first refusal means little: the inviter's server puts an invite into the room when it
// has our answer, and we may be faster.
func (b *bot) join(ctx context.Context, inv *mxfed.Invite) (*mxfed.JoinResult, error) {
	req := &mxfed.JoinRequest{Room: inv.Event.RoomID(), User: b.user, Via: []mxfed.ServerName{inv.Origin}}
	for wait := time.Second / 4; ; wait *= 2 {
		result, err := b.server.Client().Join(ctx, req)
		if err == nil || wait > 5*time.Minute {
			return result, err
		}
		select {
		case <-time.After(max(wait, mxfed.ClientError(err).RetryAfter)):
		case <-ctx.Done():
			return nil, err
		}
	}
}
