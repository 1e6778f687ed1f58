package mxfed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Config says what a Server is and on whom it relies. Signers is required; everything else has a safe zero value.
type Config struct {
	// Signers sign for this server's names, one each; the first is the default.
	Signers []*Signer
	// Rooms states facts of the rooms that the host is in; nil: it is in none.
	Rooms RoomSource
	// Keys knows the keys of other servers; nil: a KeyRing in memory that fetches through HTTP.
	Keys Keys
	// HTTP carries requests to https://server-name/ URLs; nil: a Resolver. If it has a method Web() http.RoundTripper, as a
	// Resolver has, that one carries the few requests to hosts that are no Matrix servers; else a Resolver's does.
	HTTP http.RoundTripper
	// Versions are the room versions to take part in; nil: the stable ones, 1 to 12.
	Versions []RoomVersion
	// Allow is asked about every authenticated request before any other work, for rate limits and block lists: an error
	// refuses the request, and an ErrorCode or Error in it decides the answer. Nil admits all.
	Allow func(ctx context.Context, r *Request) error
	// NoV1 neither serves nor falls back to version 1 of send_join and send_leave, which the specification has dropped.
	NoV1 bool
	// MaxRequest bounds the body of a request, in bytes; 0: 2 MiB. MaxAnswer bounds an answer to send_join or state; 0: 512 MiB.
	MaxRequest, MaxAnswer int64
	// Logger gets what is refused and why (debug) and what failed here (error); nil discards it.
	Logger *slog.Logger
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Default limits of Config, in bytes.
const (
	defaultMaxRequest = 2 << 20
	defaultMaxAnswer  = 512 << 20
)

// Server holds what this package's handlers and client share. It is immutable and safe for concurrent use.
type Server struct {
	client     *Client
	allow      func(ctx context.Context, r *Request) error
	maxRequest int64
}

// NewServer validates cfg; its error names the field that is wrong.
func NewServer(cfg Config) (*Server, error) {
	if len(cfg.Signers) == 0 {
		return nil, errors.New("mxfed: Config.Signers is empty")
	}
	for i, s := range cfg.Signers {
		if s == nil || s.key == nil {
			return nil, errors.New("mxfed: Config.Signers holds one that NewSigner did not make")
		}
		if slices.ContainsFunc(cfg.Signers[:i], func(o *Signer) bool { return o.name == s.name }) {
			return nil, fmt.Errorf("mxfed: Config.Signers has two for %s", s.name)
		}
	}
	if cfg.MaxRequest < 0 || cfg.MaxAnswer < 0 {
		return nil, errors.New("mxfed: Config.MaxRequest or Config.MaxAnswer is negative")
	}
	c := &Client{rooms: cfg.Rooms, http: cfg.HTTP, noV1: cfg.NoV1, maxAnswer: cfg.MaxAnswer, log: cfg.Logger,
		verifier: verifier{keys: cfg.Keys, own: slices.Clone(cfg.Signers), now: cfg.Now}}
	s := &Server{client: c, allow: cfg.Allow, maxRequest: cfg.MaxRequest}
	c.versions = stableVersions
	if cfg.Versions != nil {
		c.versions = nil
	}
	for _, v := range cfg.Versions {
		if v.rules() == nil {
			return nil, fmt.Errorf("mxfed: Config.Versions: %q is not supported", v)
		}
		c.versions = append(c.versions, v.rules())
	}
	s.fillDefaults()
	return s, nil
}

func (s *Server) fillDefaults() {
	c := s.client
	if c.now == nil {
		c.now = time.Now
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.http == nil {
		c.http = &Resolver{}
	}
	if c.keys == nil {
		c.keys = &KeyRing{HTTP: c.http, Now: c.now}
	}
	if c.maxAnswer == 0 {
		c.maxAnswer = defaultMaxAnswer
	}
	if s.maxRequest == 0 {
		s.maxRequest = defaultMaxRequest
	}
}

// Client returns the client that shares the server's keys, connections, clock and limits.
func (s *Server) Client() *Client { return s.client }

// Build completes an event of a local user from the facts of Config.Rooms, authorises it by the room's rules and signs it.
// It is the only way to sign an event of one's own; storing it and sending it to the room's servers is up to the host. An
// event that the room does not allow is ErrForbidden; the join of a restricted room is checked and authorised as one by
// another server's user is, unless its content names who authorises it. The room's policy server, if it has one, is asked
// to sign too: an event that it refuses, or cannot be asked about, is not returned.
// https://spec.matrix.org/v1.19/server-server-api/#signing-events
func (s *Server) Build(ctx context.Context, d *Draft) (*Event, error) {
	event, _, err := s.client.build(ctx, d)
	return event, err
}

// Verify checks content hashes and signatures of events from anywhere, for a host's own /send or backfill: nil stands for
// an event that is genuine. A member event that says who authorises it needs the signature of that user's server too. All
// keys are fetched together and all cores check. Authorisation is not looked at otherwise.
// https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func (s *Server) Verify(ctx context.Context, events ...*Event) []error {
	errs := make([]error, len(events))
	genuine := make([]*Event, 0, len(events))
	for i, e := range events {
		if e == nil {
			errs[i] = refuse(ErrBadJSON, "event is nil")
		} else {
			genuine = append(genuine, e)
		}
	}
	verdicts := s.client.events(ctx, genuine)
	for i := range errs {
		if errs[i] == nil {
			switch v := verdicts[0]; {
			case v.err != nil:
				errs[i] = v.err
			case v.event != events[i]:
				errs[i] = refuse(ErrInvalidParam, "event %s: content hash is wrong", events[i].id)
			case events[i].rules.restricted && events[i].authoriser != "" && !v.authorised:
				errs[i] = refuse(ErrInvalidParam, "event %s: the server of the user who authorises it has not signed", events[i].id)
			}
			verdicts = verdicts[1:]
		}
	}
	return errs
}

// Request is an authenticated request of another server.
type Request struct {
	// Origin is the server that signed it, To the own name that it was addressed to.
	Origin, To ServerName
	// Endpoint is "invite", "make_join" and so on; empty for an endpoint of the host's own.
	Endpoint string
	// Room and User are whom the request speaks of, as far as its path and body name them; they are not verified yet.
	Room RoomID
	User UserID
	// Body is the JSON body in canonical form; empty for GET.
	Body []byte
}

// Authenticate checks the X-Matrix signature of a request to an endpoint of the host's own and asks Config.Allow. It reads
// the body, of Config.MaxRequest bytes at most. Errors are to be answered with WriteError.
// https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func (s *Server) Authenticate(r *http.Request) (*Request, error) {
	req, _, err := s.authenticate(r, target{uri: requestURI(r)})
	return req, err
}

// target is what a request line asks for: a known endpoint with its path parameters.
type target struct {
	uri      string // byte for byte as signed
	version  string
	endpoint string
	params   []string
	query    url.Values
}

// requestURI is the URI as it stood on the request line, which no mux rewrites and which the sender signed.
func requestURI(r *http.Request) string {
	uri := r.RequestURI
	if uri == "" {
		return r.URL.RequestURI()
	}
	if i := strings.Index(uri, "://"); i >= 0 && !strings.HasPrefix(uri, "/") { // the absolute form of proxies
		_, path, _ := strings.Cut(uri[i+3:], "/")
		uri = "/" + path
	}
	return uri
}

// parseTarget reads version, endpoint and path parameters from the request line.
func parseTarget(r *http.Request) (target, error) {
	t := target{uri: requestURI(r)}
	path, query, _ := strings.Cut(t.uri, "?")
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(segments) < 4 || segments[0] != "_matrix" || segments[1] != "federation" {
		return t, errUnrecognized(http.StatusNotFound)
	}
	t.version, t.endpoint = segments[2], segments[3]
	for _, s := range segments[4:] {
		param, err := url.PathUnescape(s)
		if err != nil {
			return t, refuse(ErrInvalidParam, "path is not escaped properly")
		}
		t.params = append(t.params, param)
	}
	var err error
	if t.query, err = url.ParseQuery(query); err != nil {
		return t, refuse(ErrInvalidParam, "query is not escaped properly")
	}
	return t, nil
}

// errUnrecognized is the answer to unknown paths (404) and methods (405).
// https://spec.matrix.org/v1.19/server-server-api/#unsupported-endpoints
func errUnrecognized(status int) error {
	return &Error{Code: ErrUnrecognized, Status: status, Message: "unknown endpoint or method"}
}

// endpoint is one endpoint of authenticated requests.
type endpoint struct {
	server   *Server
	name     string
	method   string
	versions []string
	params   int // in the path, after the name
	// serve checks and answers; an error it returns is written as the answer.
	serve func(ctx context.Context, w http.ResponseWriter, in *incoming) error
}

// incoming is an authenticated request of one endpoint.
type incoming struct {
	*Request
	target
	body   value
	signer *Signer // of To
}

// room is the first path parameter, of most endpoints; id is the second, an event or a user.
func (in *incoming) room() RoomID { return RoomID(in.params[0]) }
func (in *incoming) id() string   { return in.params[1] }

// ServeHTTP implements http.Handler.
func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	in, err := e.accept(r)
	if err == nil {
		err = e.serve(r.Context(), w, in)
	}
	if err != nil {
		e.server.refuse(w, r, err)
	}
}

// accept checks path, method and signature, in this order.
func (e *endpoint) accept(r *http.Request) (*incoming, error) {
	t, err := parseTarget(r)
	if err != nil {
		return nil, err
	}
	if t.endpoint != e.name || len(t.params) != e.params || !slices.Contains(e.versions, t.version) {
		return nil, errUnrecognized(http.StatusNotFound)
	}
	if r.Method != e.method {
		return nil, errUnrecognized(http.StatusMethodNotAllowed)
	}
	if slices.Contains(t.params, "") {
		return nil, refuse(ErrInvalidParam, "path lacks an ID")
	}
	req, body, err := e.server.authenticate(r, t)
	if err != nil {
		return nil, err
	}
	if body != "" && !body.isObject() {
		return nil, refuse(ErrBadJSON, "body is no JSON object")
	}
	return &incoming{Request: req, target: t, body: body, signer: e.server.client.signer(req.To)}, nil
}

// refuse writes err and logs it: with all details, of which the answer shows only some.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	answer := answerTo(err)
	level := slog.LevelDebug
	if answer.Status >= 500 {
		level = slog.LevelError
	}
	s.client.log.Log(r.Context(), level, "federation request refused", "method", r.Method, "uri", requestURI(r),
		"status", answer.Status, "err", err)
	var unfinished *unfinishedError
	if !errors.As(err, &unfinished) {
		WriteError(w, err)
	}
}

// unfinishedError is an error in the middle of an answer, after which nothing more can be said.
type unfinishedError struct{ err error }

func (e *unfinishedError) Error() string { return "answer broke off: " + e.err.Error() }
func (e *unfinishedError) Unwrap() error { return e.err }

// maxCredentials bounds the X-Matrix headers of one request; every one costs a signature check.
const maxCredentials = 8

// authenticate checks who sent a request and returns its body in canonical form too.
// https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func (s *Server) authenticate(r *http.Request, t target) (*Request, value, error) {
	all, err := s.credentials(r)
	if err != nil {
		return nil, "", err
	}
	req := &Request{Origin: all[0].origin, To: s.addressee(r, all[0].destination), Endpoint: t.endpoint}
	body, err := s.readBody(r)
	if err != nil {
		return nil, "", err
	}
	if err := s.checkCredentials(r, t.uri, req, all, body); err != nil {
		return nil, "", err
	}
	req.Body = []byte(body)
	req.Room, req.User = t.subject(body)
	if s.allow != nil {
		if err := s.allow(r.Context(), req); err != nil {
			return nil, "", err
		}
	}
	return req, body, nil
}

// credentials reads the X-Matrix headers of a request. Several must agree on who sends it to whom.
func (s *Server) credentials(r *http.Request) (all []credentials, err error) {
	for _, header := range r.Header.Values("Authorization") {
		c, err := parseXMatrix(header)
		if err == errNoXMatrix {
			continue
		}
		if err != nil {
			return nil, because(err, ErrUnauthorized, "X-Matrix header cannot be read")
		}
		if len(all) > 0 && (c.origin != all[0].origin || c.destination != all[0].destination) || len(all) == maxCredentials {
			return nil, refuse(ErrUnauthorized, "X-Matrix headers contradict each other")
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, refuse(ErrUnauthorized, "X-Matrix header is missing")
	}
	if !all[0].origin.valid() {
		return nil, refuse(ErrInvalidParam, "origin is no server name")
	}
	if s.client.signer(all[0].origin) != nil {
		return nil, refuse(ErrUnauthorized, "origin is this server")
	}
	if d := all[0].destination; d != "" && s.client.signer(d) == nil {
		return nil, refuse(ErrUnauthorized, "destination is not this server")
	}
	return all, nil
}

// addressee is the own name that a request was sent to. Old servers do not say; Host decides then, if it is an own name.
func (s *Server) addressee(r *http.Request, destination ServerName) ServerName {
	switch {
	case destination != "":
		return destination
	case s.client.signer(ServerName(r.Host)) != nil:
		return ServerName(r.Host)
	}
	return s.client.own[0].name
}

// readBody reads the JSON body of a request other than GET; that of a GET is never looked at.
func (s *Server) readBody(r *http.Request) (value, error) {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return "", nil
	}
	if r.Body == nil {
		return "", refuse(ErrNotJSON, "body is missing")
	}
	raw, err := io.ReadAll(io.LimitReader(r.Body, s.maxRequest+1))
	if err != nil {
		return "", because(err, ErrNotJSON, "body broke off")
	}
	if int64(len(raw)) > s.maxRequest {
		return "", refuse(ErrTooLarge, "body is larger than %d bytes", s.maxRequest)
	}
	var reader jsonReader
	text, err := reader.canonical(raw, numbersKept)
	if err != nil {
		return "", because(err, ErrNotJSON, "body cannot be read")
	}
	return value(text), nil
}

// checkCredentials demands that one signature is right and that none by a key that is known and valid now is wrong.
func (s *Server) checkCredentials(r *http.Request, uri string, req *Request, all []credentials, body value) error {
	now := s.client.now()
	keys := make([]Key, len(all))
	for i, c := range all {
		keys[i] = Key{Server: c.origin, ID: c.key, At: now}
	}
	err := s.client.lookUp(r.Context(), keys)
	if strings.Contains(string(body), "-0") { // in what the sender signed, -0 is 0
		var reader jsonReader
		if text, err := reader.canonical([]byte(body), numbersAsReceived); err == nil {
			body = value(text)
		}
	}
	message := requestBytes(r.Method, uri, req.Origin, req.To, body)
	genuine := false
	for i, c := range all {
		if !strings.HasPrefix(string(c.key), ed25519Prefix) || !keys[i].forRequest(now) {
			continue
		}
		if !verify(keys[i].Public, message, c.sig) {
			return refuse(ErrUnauthorized, "signature of %s with %s is wrong", c.origin, c.key)
		}
		genuine = true
	}
	if !genuine {
		return because(err, ErrUnauthorized, "no key of %s that is valid now was found", req.Origin)
	}
	return nil
}

// subject is whom a request speaks of, for Config.Allow.
func (t *target) subject(body value) (room RoomID, user UserID) {
	for _, p := range t.params {
		switch {
		case strings.HasPrefix(p, "!"):
			room = RoomID(p)
		case strings.HasPrefix(p, "@"):
			user = UserID(p)
		}
	}
	if user == "" {
		event := body
		if t.endpoint == "invite" && t.version != "v1" {
			event = body.get("event")
		}
		key, _ := event.get("state_key").str()
		user = UserID(key)
	}
	return room, user
}
