package mxfed

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// How long one request may take, under the caller's context, and how much of an ordinary answer is read. Answers to
// send_join and state have limits of their own.
const (
	callTimeout   = 30 * time.Second
	joinTimeout   = 10 * time.Minute
	maxSmallReply = 2 << 20 // bytes
)

// Client calls other servers, each time as the server of the local user concerned. It is safe for concurrent use; every
// method obeys its context. Errors that came from another server are, or hold, an *Error that names it.
type Client struct {
	verifier
	rooms     RoomSource
	http      http.RoundTripper
	versions  []*roomRules
	noV1      bool
	maxAnswer int64
	log       *slog.Logger
}

// offers returns the rules of a room version that this server takes part in, nil for others.
func (c *Client) offers(v RoomVersion) *roomRules {
	if i := slices.IndexFunc(c.versions, func(r *roomRules) bool { return r.version == v }); i >= 0 {
		return c.versions[i]
	}
	return nil
}

// Do makes a signed call of any endpoint, such as a transaction: uri is the path from /_matrix/ on, escaped, with its
// query. in is encoded as JSON (nil: no body, as for GET), the answer is decoded into out unless out is nil. from is the
// own name that asks; empty is the first signer's. An answer other than 200 is an *Error; answers over 2 MiB are refused.
// https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func (c *Client) Do(ctx context.Context, from, to ServerName, method, uri string, in, out any) error {
	signer, err := c.asking(from)
	if err != nil {
		return err
	}
	var body value
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("mxfed: request body: %w", err)
		}
		var r jsonReader
		text, err := r.canonical(raw, numbersAsReceived)
		if err != nil {
			return fmt.Errorf("mxfed: request body: %w", err)
		}
		body = value(text)
	}
	path, _, _ := strings.Cut(uri, "?")
	answer, err := c.ask(ctx, &call{from: signer, to: to, endpoint: path, method: method, uri: uri, body: body})
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal([]byte(answer), out); err != nil {
		return c.malformed(to, path, err)
	}
	return nil
}

// asking is the signer of the own name that makes a call; empty is the first one's.
func (c *Client) asking(from ServerName) (*Signer, error) {
	if from == "" {
		return c.own[0], nil
	}
	if signer := c.signer(from); signer != nil {
		return signer, nil
	}
	return nil, fmt.Errorf("mxfed: %s is no own name", from)
}

// call is one request to another server.
type call struct {
	from        *Signer
	to          ServerName
	endpoint    string // for errors
	method, uri string
	body        value // "" for none
}

// federationURI is the escaped path of an endpoint: version, name and its path parameters.
func federationURI(version, endpoint string, params ...string) string {
	uri := "/_matrix/federation/" + version + "/" + endpoint
	for _, p := range params {
		uri += "/" + url.PathEscape(p)
	}
	return uri
}

// ask makes a call and returns the answer of status 200 in canonical form.
func (c *Client) ask(ctx context.Context, q *call) (value, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := c.send(ctx, q)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(io.LimitReader(r.Body, maxSmallReply+1))
	if err != nil {
		return "", brokenOff(q.to, q.endpoint, err)
	}
	if len(body) > maxSmallReply {
		return "", c.malformed(q.to, q.endpoint, fmt.Errorf("answer is larger than %d bytes", maxSmallReply))
	}
	var reader jsonReader
	text, err := reader.canonical(body, numbersAsReceived)
	if err != nil {
		return "", c.malformed(q.to, q.endpoint, err)
	}
	return value(text), nil
}

// send makes a call and returns the answer of status 200, whose body the caller closes.
func (c *Client) send(ctx context.Context, q *call) (*http.Response, error) {
	r, err := q.request(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := c.http.RoundTrip(r)
	if err != nil {
		return nil, &Error{Code: ErrUnknown, Server: q.to, Endpoint: q.endpoint, Message: "no answer", Err: err}
	}
	if answer.StatusCode != http.StatusOK {
		defer answer.Body.Close()
		return nil, readError(q.to, q.endpoint, answer, c.now())
	}
	return answer, nil
}

func (q *call) request(ctx context.Context) (*http.Request, error) {
	if !q.to.valid() {
		return nil, refuse(ErrInvalidParam, "%q is no server name", q.to)
	}
	var body io.Reader
	if q.body != "" {
		body = strings.NewReader(string(q.body))
	}
	r, err := http.NewRequestWithContext(ctx, q.method, "https://"+string(q.to)+q.uri, body)
	if err != nil {
		return nil, fmt.Errorf("mxfed: %w", err)
	}
	if r.URL.RequestURI() != q.uri {
		return nil, fmt.Errorf("mxfed: %q is no escaped path", q.uri)
	}
	if q.body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	sig, err := q.from.sign(requestBytes(q.method, q.uri, q.from.name, q.to, q.body))
	if err != nil {
		return nil, fmt.Errorf("mxfed: %w", err)
	}
	q.from.authorize(r, q.to, sig)
	return r, nil
}

// brokenOff is the error for an answer that did not arrive whole, which says nothing against it.
func brokenOff(server ServerName, endpoint string, err error) error {
	return &Error{Code: ErrUnknown, Server: server, Endpoint: endpoint, Message: "answer broke off", Err: err}
}

// malformed is the error for an answer of status 200 that the protocol does not allow.
func (c *Client) malformed(server ServerName, endpoint string, err error) error {
	return &Error{Code: ErrUnknown, Status: http.StatusOK, Server: server, Endpoint: endpoint, Message: "malformed answer", Err: err}
}

// Draft is an event that a local user wants to send. A room begins with the drafts of its create event, into which
// room_version and, where the room version has it, creator are filled; its creator's join; power levels; and join rules.
// Each is stored before the next one is built.
type Draft struct {
	// Room is the room. That of a create event is chosen by the host: "!", something random, ":" and its own name. From room
	// version 12 on it is empty there: the event's hash names the room, so two of them must differ in something. The same
	// content by the same sender in the same millisecond is the same room.
	Room RoomID
	// Version is the room version of a create event. Other events have that of their room; it may be left empty for them.
	Version RoomVersion
	Type    string
	// StateKey is nil for an event that is not state.
	StateKey *string
	Sender   UserID
	Content  json.RawMessage
	// Redacts is the event that an m.room.redaction is about; it goes where the room version wants it.
	Redacts EventID
}

// previewState are the entries that describe a room to a user who is not in it.
// https://spec.matrix.org/v1.19/client-server-api/#stripped-state
var previewState = []StateKey{{typeCreate, ""}, {typeJoinRules, ""}, {"m.room.name", ""}, {"m.room.canonical_alias", ""},
	{"m.room.avatar", ""}, {"m.room.topic", ""}, {"m.room.encryption", ""}}

// build completes, authorises and signs a local user's event, has the room's policy server sign it too, and returns the
// room's facts that it was built on: those that the event needs and the entries in more.
func (c *Client) build(ctx context.Context, d *Draft, more ...StateKey) (*Event, *Room, error) {
	signer := c.signer(d.Sender.Server())
	if signer == nil || !d.Sender.valid() {
		return nil, nil, refuse(ErrInvalidParam, "sender %q is no user of this server", d.Sender)
	}
	return c.buildAs(ctx, signer, d, more...)
}

// buildAs is build in the name of signer, which third-party invites need not share with their sender.
func (c *Client) buildAs(ctx context.Context, signer *Signer, d *Draft, more ...StateKey) (*Event, *Room, error) {
	var r jsonReader
	content, err := r.canonical(d.Content, numbersEncoded)
	switch {
	case err != nil:
		return nil, nil, because(err, ErrBadJSON, "content is not what an event can have")
	case !value(content).isObject():
		return nil, nil, refuse(ErrBadJSON, "content is no JSON object")
	case d.Type == "" || d.Type == typeCreate && d.StateKey == nil:
		return nil, nil, refuse(ErrInvalidParam, "draft has no type, or is of type %s without a state key", typeCreate)
	}
	material := &draft{room: d.Room, typ: d.Type, stateKey: d.StateKey, sender: d.Sender, content: value(content), ts: c.now().UnixMilli()}
	if d.Type == typeCreate {
		event, err := c.buildCreate(d.Version, material, signer)
		return event, &Room{Version: d.Version}, err
	}
	ask := RoomQuery{To: signer.name, State: withKeys([]StateKey{{typeCreate, ""}, {typePolicy, ""}}, append(material.authKeys(), more...)...)}
	room, rules, err := readRoom(ctx, c.rooms, d.Room, ask)
	if err != nil {
		return nil, nil, err
	}
	if material.isJoin() && room.needsCondition(d.Sender) {
		if room, rules, err = c.conditionalJoin(ctx, material, ask, room); err != nil {
			return nil, nil, err
		}
	}
	if d.Version != "" && d.Version != rules.version {
		return nil, nil, refuse(ErrInvalidParam, "the room is of version %s, not %s", rules.version, d.Version)
	}
	material.origin = originFor(rules, signer.name)
	if material.redacts = d.Redacts; d.Redacts != "" && rules.redactsInContent {
		material.content, material.redacts = material.content.with("redacts", quoted(d.Redacts)), ""
	}
	if err := material.place(rules, room); err != nil {
		return nil, nil, err
	}
	event, err := material.build(rules)
	if err != nil {
		return nil, nil, err
	}
	if event, err = c.signOwn(event, stateOf(room.State, nil), signer); err != nil {
		return nil, nil, err
	}
	event, err = c.ownPolicySigned(ctx, signer, room, event)
	return event, room, err
}

// signOwn authorises and signs an event of a local user. A restricted join needs the signature of its authoriser's server
// as well, which can only be had here if that is an own name too.
func (c *Client) signOwn(e *Event, state stateFunc, signer *Signer) (*Event, error) {
	second := c.signer(e.authoriserID().Server())
	if err := authorise(e, state, second != nil); err != nil {
		return nil, err
	}
	e, err := approved{e}.sign(signer)
	if err == nil && second != nil && second != signer {
		e, err = approved{e}.sign(second)
	}
	return e, err
}

func (c *Client) buildCreate(v RoomVersion, d *draft, signer *Signer) (*Event, error) {
	rules := c.offers(v)
	if rules == nil {
		return nil, incompatible(v)
	}
	if named := d.content.get("room_version"); named != "" && named != quoted(v) {
		return nil, refuse(ErrInvalidParam, "content names room version %s, not %s", named, v)
	}
	d.content = d.content.with("room_version", quoted(v)) // without it the room would be of version 1
	if rules.creatorInContent && d.content.get("creator") == "" {
		d.content = d.content.with("creator", quoted(d.sender))
	}
	d.prev, d.auth, d.depth, d.origin = "[]", "[]", 1, originFor(rules, signer.name)
	event, err := d.build(rules)
	if err != nil {
		return nil, err
	}
	return c.signOwn(event, stateOf(nil, nil), signer)
}
