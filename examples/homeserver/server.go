package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"

	"example.org/mxfed"
	"golang.org/x/sync/errgroup"
)

// This file is the server as the rest of the program sees it: what it is made of, and the words in which the client API
// and the room code talk to each other.

// settings say what a server is.
type settings struct {
	// Name is the server's name, part of every ID that it gives out.
	Name mxfed.ServerName
	// Database is a file for SQLite or a postgres:// URL. Several processes may share the latter.
	Database string
	// HTTP carries requests to other servers; nil: a mxfed.Resolver, which reaches public addresses only.
	HTTP http.RoundTripper
	// Log gets what the server does; nil discards it.
	Log *slog.Logger
	// Progress, if set, returns what is to be told how a join gets on, from the goroutine that does the work.
	Progress func(mxfed.RoomID) func(progress)
}

// progress is how far the join of a room has got.
type progress struct {
	Via    mxfed.ServerName
	Events int   // verified and stored so far
	Bytes  int64 // received so far
	// Done comes once, at the end, with the number of events that failed a check, or with Err.
	Done    bool
	Dropped int
	Err     error
}

// server is one process of a homeserver. It is safe for concurrent use. All it knows is in the database.
type server struct {
	name     mxfed.ServerName
	db       *database
	fed      *mxfed.Server
	host     *host
	log      *slog.Logger
	progress func(mxfed.RoomID) func(progress)
}

// openServer opens the database, brings its schema up to date and loads the signing key, which it makes at the first start.
func openServer(ctx context.Context, set settings) (*server, error) {
	if set.Log == nil {
		set.Log = slog.New(slog.DiscardHandler)
	}
	if set.Progress == nil {
		set.Progress = func(mxfed.RoomID) func(progress) { return func(progress) {} }
	}
	db, err := openDatabase(ctx, set.Database, set.Name, set.Log)
	if err != nil {
		return nil, err
	}
	s := &server{name: set.Name, db: db, log: set.Log, progress: set.Progress}
	s.host = &host{server: s}
	signer, err := s.signer(ctx)
	if err == nil {
		keys := &mxfed.KeyRing{Store: &keyStore{db}, HTTP: set.HTTP}
		s.fed, err = mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}, Rooms: s.host, Keys: keys, HTTP: set.HTTP,
			Logger: set.Log})
	}
	if err != nil {
		return nil, errors.Join(err, db.close())
	}
	return s, nil
}

// run does what goes on beside requests, sending above all, until ctx ends. It returns when all of it has stopped.
func (s *server) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, f := range []func(context.Context) error{s.db.listen, s.sendAll, s.completeRooms} {
		group.Go(func() error { return f(ctx) })
	}
	return group.Wait()
}

// close closes the database. Requests and run must have ended.
func (s *server) close() error { return s.db.close() }

// errRoomInUse: the alias is taken.
const errRoomInUse mxfed.ErrorCode = "M_ROOM_IN_USE"

// session is what an access token stands for.
type session struct {
	User   mxfed.UserID `db:"user_id"`
	Device string
}

// profile is what a user shows of themselves; empty fields are not set.
type profile struct {
	DisplayName string `json:"displayname,omitempty"`
	AvatarURL   string `json:"avatar_url,omitempty" db:"avatar_url"`
}

// roomRequest is what createRoom makes a room of.
type roomRequest struct {
	Version mxfed.RoomVersion `json:"room_version"` // empty: "12"
	Preset  string            `json:"preset"`       // private_chat, trusted_private_chat or public_chat; empty: private_chat
	Name    string            `json:"name"`
	Alias   string            `json:"room_alias_name"` // localpart
	Direct  bool              `json:"is_direct"`       // invites carry it
	Invite  []mxfed.UserID    `json:"invite"`
	State   []stateEntry      `json:"initial_state"` // in place of what the preset says
	// PowerLevels take the place of entries of the preset's.
	PowerLevels map[string]any `json:"power_level_content_override"`
}

// stateEntry is a state event that a client wants to set.
type stateEntry struct {
	Type     string          `json:"type"`
	StateKey string          `json:"state_key"`
	Content  json.RawMessage `json:"content"`
}

// message is an event that a local user wants to send.
type message struct {
	Sender   mxfed.UserID
	Room     mxfed.RoomID
	Type     string
	StateKey *string // nil: no state
	Content  json.RawMessage
	// Device and Txn make sending idempotent: what the same device has sent under the same Txn is not sent again.
	Device, Txn string
}
