// Invitejoin shows the whole job in one process. Two servers, alice.example and bob.example, speak over TLS on the
// loopback interface: Alice invites Bob, who joins; Carol, whom nobody has invited, is refused, and rejects an invite when
// she gets one; a restricted room lets Bob in because he is in the first one; and Carol knocks on a room until she is
// invited. What goes over the network is printed. Keys and clock are fixed, so that every run prints the same.
//
//	go run ./examples/invitejoin -version 10
package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"example.org/mxfed"
	"example.org/mxfed/examples/internal/loopback"
	"example.org/mxfed/examples/memhost"
)

func main() {
	version := flag.String("version", "12", "room version, 1 to 12")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, mxfed.RoomVersion(*version)); err != nil {
		fmt.Fprintln(os.Stderr, "invitejoin:", err)
		os.Exit(1)
	}
}

const (
	alice mxfed.UserID = "@alice:alice.example"
	bob   mxfed.UserID = "@bob:bob.example"
	carol mxfed.UserID = "@carol:bob.example"
)

// versions are the room versions in order. Rooms of version 7 and later know knocks, those of 8 and later restricted joins.
var versions = strings.Fields("1 2 3 4 5 6 7 8 9 10 11 12")

// run tells the story in rooms of one version.
func run(ctx context.Context, w io.Writer, version mxfed.RoomVersion) error {
	number := slices.Index(versions, string(version)) + 1
	if number == 0 {
		return fmt.Errorf("room version %q is not supported, only 1 to 12 are", version)
	}
	s := &story{w: w, version: version}
	if err := s.open(); err != nil {
		return err
	}
	defer s.internet.Close()
	scenes := []scene{
		{"Alice creates a room for invited users.", s.createRoom("invite")},
		{"Alice invites Bob. His server checks the invite, keeps it and signs it.", s.aliceInvites(bob)},
		{"Bob accepts: he joins the room.", s.joins(bob)},
		{"Carol was not invited. She is refused.", s.carolIsRefused},
		{"Alice invites Carol after all.", s.aliceInvites(carol)},
		{"Carol rejects the invite, without joining the room.", s.carolRejects},
	}
	if number >= 8 {
		scenes = append(scenes, []scene{
			{"Alice creates a restricted room: members of the first room may join.", s.createRoom("restricted")},
			{"Bob joins the restricted room. Alice's server vouches for that.", s.joins(bob)},
			{"Carol is in neither room. She is refused.", s.carolIsRefused},
		}...)
	}
	if number >= 7 {
		scenes = append(scenes, []scene{
			{"Alice creates a room for users who knock.", s.createRoom("knock")},
			{"Carol knocks, and is shown what the room is.", s.carolKnocks},
			{"Alice invites her. Carol's server sees that the invite answers the knock.", s.aliceInvites(carol)},
			{"Carol joins.", s.joins(carol)},
		}...)
	}
	fmt.Fprintf(w, "Room version %s\n", version)
	for i, scene := range scenes {
		fmt.Fprintf(w, "\n%d. %s\n", i+1, scene.title)
		if err := scene.play(ctx); err != nil {
			return fmt.Errorf("scene %d: %w", i+1, err)
		}
		s.seconds.Add(1)
	}
	if number < 7 {
		fmt.Fprintf(w, "\nRoom version %s has neither knocks nor restricted rooms.\n", version)
	} else if number < 8 {
		fmt.Fprintf(w, "\nRoom version %s has no restricted rooms.\n", version)
	}
	return nil
}

type scene struct {
	title string
	play  func(ctx context.Context) error
}

type story struct {
	w          io.Writer
	version    mxfed.RoomVersion
	internet   *loopback.Network
	seconds    atomic.Int64  // since the story began
	alice, bob *memhost.Host // their servers
	room       mxfed.RoomID  // where the scene is set
	invite     *mxfed.Invite // the last that Bob's server took
	knock      *mxfed.Event
}

// open starts both servers.
func (s *story) open() (err error) {
	if s.internet, err = loopback.New(); err != nil {
		return err
	}
	if s.alice, err = s.start(alice.Server(), 1); err == nil {
		s.bob, err = s.start(bob.Server(), 2)
	}
	if err != nil {
		s.internet.Close()
	}
	return err
}

// start starts a server. A real one has a secret key of its own, takes the time from the system's clock and leaves
// Config.HTTP to the library.
func (s *story) start(name mxfed.ServerName, seed byte) (*memhost.Host, error) {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
	signer, err := mxfed.NewSigner(name, "ed25519:1", key)
	if err != nil {
		return nil, err
	}
	host, err := memhost.New(mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: printer{s, name}, Now: s.now})
	if err != nil {
		return nil, err
	}
	return host, s.internet.Serve(name, mxfed.NewHandler(host.Server, host.Hosts()))
}

func (s *story) now() time.Time {
	return time.Date(2026, time.January, 1, 12, 0, int(s.seconds.Load()), 0, time.UTC)
}

// printer prints what one server asks of others.
type printer struct {
	*story
	from mxfed.ServerName
}

func (p printer) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := p.internet.Transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(p.w, "   %s -> %s: %s %s: %d\n", p.from, r.URL.Host, r.Method, r.URL.EscapedPath(), answer.StatusCode)
	return answer, nil
}

// createRoom creates a room with a join rule; a restricted one is for members of the room before it.
func (s *story) createRoom(rule string) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		content := fmt.Sprintf(`{"join_rule":%q}`, rule)
		if rule == "restricted" {
			content = fmt.Sprintf(`{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":%q}]}`, s.room)
		}
		s.room, err = s.alice.CreateRoom(ctx, s.version, alice, memhost.State("m.room.join_rules", "", content))
		fmt.Fprintf(s.w, "   room %s\n", s.room)
		return err
	}
}

func (s *story) aliceInvites(user mxfed.UserID) func(context.Context) error {
	return func(ctx context.Context) error {
		invite, err := s.alice.Invite(ctx, s.room, alice, user)
		if err != nil {
			return err
		}
		if s.invite = s.bob.Invites()[invite.ID()]; s.invite == nil {
			return errors.New("bob.example does not have the invite")
		}
		if s.invite.Answers(s.knock) {
			fmt.Fprintf(s.w, "   answers %s\n", s.knock.ID())
		}
		return s.printEvent(invite)
	}
}

func (s *story) joins(user mxfed.UserID) func(context.Context) error {
	return func(ctx context.Context) error {
		result, err := s.bob.Join(ctx, s.through(user))
		if err != nil {
			return err
		}
		fmt.Fprintf(s.w, "   the room before: %d state events, proven with %d auth events\n", len(result.State), len(result.Auth))
		return s.printEvent(result.Event)
	}
}

// through asks to join by way of Alice's server.
func (s *story) through(user mxfed.UserID) *mxfed.JoinRequest {
	return &mxfed.JoinRequest{Room: s.room, User: user, Via: []mxfed.ServerName{alice.Server()}}
}

func (s *story) carolIsRefused(ctx context.Context) error {
	_, err := s.bob.Join(ctx, s.through(carol))
	if !errors.Is(err, mxfed.ErrForbidden) {
		return fmt.Errorf("carol was not refused as she should have been: %v", err)
	}
	told := mxfed.ClientError(err)
	fmt.Fprintf(s.w, "   %s: %s\n", told.Code, told.Message)
	return nil
}

func (s *story) carolRejects(ctx context.Context) error {
	if err := s.bob.Reject(ctx, s.invite); err != nil {
		return err
	}
	state, _ := s.alice.Events(s.room)
	for _, e := range state {
		if user, _ := e.StateKey(); user == string(carol) {
			return s.printEvent(e)
		}
	}
	return errors.New("alice.example does not know that Carol has left")
}

func (s *story) carolKnocks(ctx context.Context) error {
	req := &mxfed.KnockRequest{Room: s.room, User: carol, Via: []mxfed.ServerName{alice.Server()}}
	result, err := s.bob.Server.Client().Knock(ctx, req)
	if err != nil {
		return err
	}
	s.knock = result.Event
	for _, shown := range result.State {
		fmt.Fprintf(s.w, "   shows %s\n", shown.Type)
	}
	return s.printEvent(result.Event)
}

// printEvent prints what an event says and who has signed it.
func (s *story) printEvent(e *mxfed.Event) error {
	var signed struct{ Signatures map[mxfed.ServerName]any }
	if err := json.Unmarshal(e.JSON(), &signed); err != nil {
		return err
	}
	fmt.Fprintf(s.w, "   event %s\n   says %s\n   signed by %s\n", e.ID(), e.Content(), slices.Sorted(maps.Keys(signed.Signatures)))
	return nil
}
