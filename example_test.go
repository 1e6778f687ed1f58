package mxfed_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"example.org/mxfed"
	"github.com/stretchr/testify/require"
)

// exampleStore stands for a host's storage.
type exampleStore struct{}

func (exampleStore) AddInvite(mxfed.UserID, *mxfed.Event) error { return nil }

func exampleServer(key ed25519.PrivateKey, rooms mxfed.RoomSource, joins mxfed.JoinHost, store exampleStore) (*mxfed.Server, error) {
	signer, err := mxfed.NewSigner("example.org", "ed25519:1", key) // any ed25519 crypto.Signer
	if err != nil {
		return nil, err
	}
	server, err := mxfed.NewServer(mxfed.Config{
		Signers: []*mxfed.Signer{signer},
		Rooms:   rooms, // states facts of the rooms you are in
	})
	if err != nil {
		return nil, err
	}
	handler := mxfed.NewHandler(server, mxfed.Hosts{
		Invite: mxfed.InviteHostFunc(func(ctx context.Context, inv *mxfed.Invite) error {
			return store.AddInvite(inv.User, inv.Event) // or mxfed.ErrForbidden, mxfed.ErrInviteBlocked
		}),
		Join: joins, // AcceptJoin stores a join and returns the room before it
	})
	http.Handle("/_matrix/federation/", handler)
	http.Handle("/_matrix/key/", handler)
	return server, nil
}

func exampleClient(ctx context.Context, server *mxfed.Server, room mxfed.RoomID) error {
	client := server.Client()
	invite, err := client.InviteUser(ctx, room, "@alice:example.org", "@bob:example.com", nil)
	if err != nil {
		return err
	}
	joined, err := client.Join(ctx, &mxfed.JoinRequest{
		Room: room,
		User: "@alice:example.org",
		Via:  []mxfed.ServerName{"example.com", "example.net"},
	})
	fmt.Println(invite.ID(), joined)
	return err
}

func Example() {
	server, err := exampleServer(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), nil, nil, exampleStore{})
	fmt.Println(err)
	err = exampleClient(context.Background(), server, "!room:example.org") // in no room: there is no RoomSource
	fmt.Println(err)
	// Output:
	// <nil>
	// mxfed: M_NOT_FOUND: room is not known here
}

// exampleRoom stands for a room in a host's storage.
type exampleRoom interface {
	Version() mxfed.RoomVersion
	Facts(ask mxfed.RoomQuery) (*mxfed.Room, error)
	Store(e *mxfed.Event, status string) error
	Fetch(e *mxfed.Event, from mxfed.ServerName) error // what e is built on, by get_missing_events or Client.FetchState
}

// An event that another server has sent by PUT /_matrix/federation/v1/send/{txnId}, an endpoint of the host's own, which asks
// Server.Authenticate who that is.
func ExampleEvent_Check() {
	take := func(ctx context.Context, server *mxfed.Server, from mxfed.ServerName, room exampleRoom, pdu []byte) error {
		e, err := mxfed.ParseEvent(room.Version(), pdu)
		if err != nil {
			return err
		}
		if err := server.Verify(ctx, e)[0]; err != nil {
			return err // not genuine: dropped
		}
		now, err := room.Facts(e.Query()) // in the transaction that stores e
		if err != nil {
			return err
		}
		acl := slices.IndexFunc(now.State, func(e *mxfed.Event) bool { return e.Type() == "m.room.server_acl" })
		if acl >= 0 && !mxfed.AllowedByACL(now.State[acl], from) {
			return mxfed.ErrForbidden
		}
		switch err := e.Check(now); {
		case err == nil:
			return room.Store(e, "accepted")
		case errors.Is(err, mxfed.ErrMissing):
			return room.Fetch(e, from) // and check again
		case errors.Is(err, mxfed.ErrSoftFailed):
			return room.Store(e, "soft-failed") // others may build on it, users do not see it
		case errors.Is(err, mxfed.ErrRejected):
			return room.Store(e, "rejected") // so that it is not fetched again
		default:
			return err // it is not what its ID says
		}
	}
	_ = take
}

func ExampleCanonicalJSON() {
	text, err := mxfed.CanonicalJSON([]byte(`{ "b": 1e2, "a": "\u00e9" }`))
	fmt.Println(string(text), err)
	_, err = mxfed.CanonicalJSON([]byte(`{"a":1,"a":2}`))
	fmt.Println(err)
	// Output:
	// {"a":"é","b":100} <nil>
	// mxfed: json: duplicate member "a" at byte 13
}

func ExampleClientError() {
	err := &mxfed.Error{Code: mxfed.ErrForbidden, Status: 403, Server: "example.com", Endpoint: "make_join", Message: "not invited"}
	told := mxfed.ClientError(fmt.Errorf("join: %w", err))
	fmt.Println(told.Status, told.Code, told.Message)
	// Output: 403 M_FORBIDDEN not invited
}

// TestReadme keeps the README's snippets equal to code above, apart from the handling of errors.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	code, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	require.Len(t, blocks, 2)
	lines := make(map[string]bool)
	for line := range strings.Lines(string(code)) {
		lines[strings.TrimSpace(line)] = true
	}
	for _, block := range blocks {
		for line := range strings.Lines(block[1]) {
			require.True(t, lines[strings.TrimSpace(line)], "README.md has %q, the example has not", line)
		}
	}
	require.LessOrEqual(t, strings.Count(string(readme), "\n"), 150)
}
