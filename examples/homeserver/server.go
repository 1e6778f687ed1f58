package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"example.org/mxfed"
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
	// Progress, if set, is told how a join of a big room gets on, from the goroutine that does the work.
	Progress func(progress)
}

// progress is how far the join of a room, or the completion of one, has got.
type progress struct {
	Room   mxfed.RoomID
	Via    mxfed.ServerName
	Events int   // verified and stored so far
	Bytes  int64 // received so far
	// Dropped events failed a check; known only when Done.
	Dropped int
	// Done comes once, at the end, with Err if it failed.
	Done bool
	Err  error
}

// server is one process of a homeserver. It is safe for concurrent use. All it knows is in the database.
type server struct {
	name     mxfed.ServerName
	db       *database
	fed      *mxfed.Server
	host     *host
	log      *slog.Logger
	progress func(progress)
	sending  *sender
}

// openServer opens the database, brings its schema up to date and loads the signing key, which it makes at the first start.
func openServer(ctx context.Context, set settings) (*server, error) {
	if set.Log == nil {
		set.Log = slog.New(slog.DiscardHandler)
	}
	if set.Progress == nil {
		set.Progress = func(progress) {}
	}
	db, err := openDatabase(ctx, set.Database, set.Name, set.Log)
	if err != nil {
		return nil, err
	}
	s := &server{name: set.Name, db: db, log: set.Log, progress: set.Progress}
	if err := s.start(ctx, set); err != nil {
		return nil, errors.Join(err, db.close())
	}
	return s, nil
}

// start makes the library's server over the database.
func (s *server) start(ctx context.Context, set settings) error {
	signer, err := s.signer(ctx)
	if err != nil {
		return err
	}
	s.host = &host{server: s}
	keys := &mxfed.KeyRing{Store: &keyStore{s.db}, HTTP: set.HTTP}
	s.fed, err = mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}, Rooms: s.host, Keys: keys, HTTP: set.HTTP,
		Allow: s.sentSomething, Logger: set.Log})
	s.sending = newSender(s)
	return err
}

// run does what goes on beside requests, sending above all, until ctx ends. It returns when all of it has stopped.
func (s *server) run(ctx context.Context) error {
	return runAll(ctx, s.db.listen, s.sending.run, s.completeRooms)
}

// close closes the database. Requests and run must have ended.
func (s *server) close() error { return s.db.close() }

// Errors of the client API that mxfed has no name for.
const (
	errUserInUse    mxfed.ErrorCode = "M_USER_IN_USE"      // 400
	errRoomInUse    mxfed.ErrorCode = "M_ROOM_IN_USE"      // 400: the alias is taken
	errUnknownToken mxfed.ErrorCode = "M_UNKNOWN_TOKEN"    // 401
	errMissingToken mxfed.ErrorCode = "M_MISSING_TOKEN"    // 401
	errInvalidUser  mxfed.ErrorCode = "M_INVALID_USERNAME" // 400
)

// session is what an access token stands for.
type session struct {
	User   mxfed.UserID
	Device string
}

// profile is what a user shows of themselves; empty fields are not set.
type profile struct {
	DisplayName string `json:"displayname,omitempty"`
	AvatarURL   string `json:"avatar_url,omitempty"`
}

// roomRequest is what createRoom makes a room of.
type roomRequest struct {
	Version mxfed.RoomVersion // empty: "12"
	// Preset is private_chat, trusted_private_chat or public_chat; empty: private_chat.
	Preset          string
	Name, Topic     string
	Alias           string // localpart
	Direct          bool   // invites carry is_direct
	Invite          []mxfed.UserID
	State           []stateEntry    // initial_state
	CreationContent json.RawMessage // more of the create event's content
	PowerLevels     json.RawMessage // power_level_content_override
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
	Redacts  mxfed.EventID // of an m.room.redaction
	// Device and Txn make sending idempotent: what the same device has sent under the same Txn is not sent again.
	Device, Txn string
}

// roomEvent is an event as a client is to see it.
type roomEvent struct {
	*mxfed.Event
	// Position is where the event stands in the stream of all that this server has accepted; 0 for state from before this
	// server was in the room.
	Position int64
	Received time.Time
	// Replaced is the entry that a state event took the place of, nil if there was none.
	Replaced *mxfed.Event
	// Device and Txn are those of message, for the sender's own device.
	Device, Txn string
}

// membership is how a local user stands to a room.
type membership struct {
	Room       mxfed.RoomID
	Membership string // join, invite, knock, leave, ban
	// Position is that of the change; a user who has left sees events up to it. Joined is where the last join stands, 0
	// for one who never was in the room.
	Position, Joined int64
	// Event is the member event; nil if none is known, as after an invite that could not be rejected properly.
	Event *mxfed.Event
	// Shown is what a room shows to the invited or knocking: stripped state, objects of type, state_key, sender and content,
	// the user's own member event among them.
	Shown []json.RawMessage
	// Forgotten rooms are not to be listed.
	Forgotten bool

	version mxfed.RoomVersion
	via     []mxfed.ServerName // servers that may know the room
}
