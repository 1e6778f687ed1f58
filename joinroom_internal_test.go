package mxfed

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// This file holds a room of any version that one server made, and that server as it answers joins, honestly or not, for the
// tests of the joining side. Every event of the room is validly signed, also one that the room does not allow.

const (
	joinUser  = UserID("@bob:us.example")
	joinVia   = ServerName("r.example")
	joinAlice = UserID("@alice:r.example") // made the room
	joinCarol = UserID("@carol:third.example")
)

var joinTime = time.UnixMilli(1_700_000_100_000)

// joinSignatures is a signing key that remembers what it signed.
type joinSignatures struct {
	ed25519.PrivateKey
	mu       sync.Mutex
	messages []value
}

func (s *joinSignatures) Sign(r io.Reader, message []byte, o crypto.SignerOpts) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = append(s.messages, value(message))
	return s.PrivateKey.Sign(r, message, o)
}

// events are the messages that were no requests.
func (s *joinSignatures) events() (events []value) {
	for _, m := range s.messages {
		if m.get("uri") == "" {
			events = append(events, m)
		}
	}
	return events
}

func joinKey(name ServerName) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("key of " + name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func joinSigner(t testing.TB, name ServerName) *Signer {
	s, err := NewSigner(name, "ed25519:1", joinKey(name))
	require.NoError(t, err)
	return s
}

// joinKeys knows the key ed25519:1 of every server.
type joinKeys struct {
	unknown, down map[ServerName]bool // servers without keys, and those that cannot be asked

	mu    sync.Mutex
	calls [][]Key
}

func (k *joinKeys) Keys(ctx context.Context, keys []Key) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = append(k.calls, slices.Clone(keys))
	var err error
	for i := range keys {
		q := &keys[i]
		switch {
		case k.down[q.Server]:
			err = errors.New(string(q.Server) + " is down")
		case !k.unknown[q.Server] && q.ID == "ed25519:1":
			q.Public, q.ValidUntil = joinKey(q.Server).Public().(ed25519.PublicKey), joinTime.Add(time.Hour)
		}
	}
	return errors.Join(err, ctx.Err())
}

// joinRoom is the room, as its last event leaves it.
type joinRoom struct {
	t     testing.TB
	rules *roomRules
	id    RoomID
	all   []*Event
	state []*Event // in order, one for each key
}

// newJoinRoom makes a room with Alice and Carol in it. Under the rule invite, Bob is invited.
func newJoinRoom(t testing.TB, version RoomVersion, rule string) *joinRoom {
	r := &joinRoom{t: t, rules: version.rules(), id: "!room:r.example"}
	if r.rules.hashRoomID {
		r.id = ""
	}
	create := `{"creator":"@alice:r.example","room_version":"` + string(version) + `"}`
	if version == "1" {
		create = `{"creator":"@alice:r.example"}`
	}
	r.id = r.add(joinAlice, typeCreate, "", create).room
	r.add(joinAlice, typeMember, string(joinAlice), `{"membership":"join"}`)
	levels := `{"users":{"@alice:r.example":100}}`
	if r.rules.hashRoomID {
		levels = `{"users":{}}`
	}
	r.add(joinAlice, typePowerLevels, "", levels)
	r.add(joinAlice, typeJoinRules, "", `{"join_rule":"public"}`)
	r.add(joinCarol, typeMember, string(joinCarol), `{"membership":"join"}`)
	r.add(joinAlice, "m.room.topic", "", `{"topic":"tea"}`)
	if rule != "public" {
		r.add(joinAlice, typeJoinRules, "", `{"join_rule":"`+rule+`"}`)
	}
	if rule == "invite" {
		r.add(joinAlice, typeMember, string(joinUser), `{"membership":"invite"}`)
	}
	return r
}

// draft is an event at the end of the room.
func (r *joinRoom) draft(sender UserID, typ, key, content string) *draft {
	content = string(eventCanonical(r.t, []byte(content)))
	d := &draft{room: r.id, typ: typ, stateKey: &key, sender: sender, content: value(content), depth: 1, prev: "[]", auth: "[]",
		ts: joinTime.UnixMilli() - 1000, origin: originFor(r.rules, sender.Server())}
	if len(r.all) > 0 {
		last := r.all[len(r.all)-1]
		d.ts += last.depth
		require.NoError(r.t, d.place(r.rules, &Room{Latest: []*Event{last}, State: r.state}))
	}
	return d
}

// sign finishes d as its sender's server does.
func (r *joinRoom) sign(d *draft) *Event {
	e, err := d.build(r.rules)
	require.NoError(r.t, err)
	e, err = approved{e}.sign(joinSigner(r.t, d.sender.Server()))
	require.NoError(r.t, err)
	return e
}

// add puts a state entry into the room.
func (r *joinRoom) add(sender UserID, typ, key, content string) *Event {
	e := r.sign(r.draft(sender, typ, key, content))
	r.state = append(slices.DeleteFunc(slices.Clone(r.state), func(old *Event) bool { return old.is(typ, key) }), e)
	r.all = append(r.all, e)
	return e
}

// entry finds a state entry.
func (r *joinRoom) entry(typ, key string) *Event {
	e := stateOf(r.state, nil)(typ, key)
	require.NotNil(r.t, e)
	return e
}

// template is the material for a join of Bob.
func (r *joinRoom) template() value {
	content := `{"membership":"join"}`
	if rule := r.entry(typeJoinRules, "").content.get("join_rule"); rule == `"restricted"` {
		content = `{"join_authorised_via_users_server":"@alice:r.example","membership":"join"}`
	}
	return object(r.draft(joinUser, typeMember, string(joinUser), content).fields()...)
}

// joinAnswer is an answer to send_join.
type joinAnswer struct {
	state, auth []value
	rest        map[string]value // "" leaves a member out
	v1          bool
}

// answer is the honest answer to join, with which the room is as it was.
func (r *joinRoom) answer(join value) *joinAnswer {
	var p eventParser
	e, err := p.parse(r.rules, []byte(join))
	require.NoError(r.t, err)
	e, err = approved{e}.sign(joinSigner(r.t, joinVia))
	require.NoError(r.t, err)
	a := &joinAnswer{rest: map[string]value{"event": e.text, "origin": quoted(joinVia)}}
	for _, s := range r.state {
		a.state = append(a.state, s.text)
	}
	for _, s := range r.all {
		if r.isNamed(s) {
			a.auth = append(a.auth, s.text)
		}
	}
	return a
}

// isNamed tells whether an event authorises another one.
func (r *joinRoom) isNamed(s *Event) bool {
	return s.is(typeCreate, "") || slices.ContainsFunc(r.all, func(e *Event) bool { return slices.Contains(e.Auth(), s.id) })
}

func (a *joinAnswer) text() []byte {
	rest := maps.Clone(a.rest)
	rest[listState], rest[listAuth] = array(a.state...), array(a.auth...)
	var fields []field
	for k, v := range rest {
		fields = append(fields, field{k, v})
	}
	text := object(fields...)
	if a.v1 {
		text = array("200", text)
	}
	return []byte(text)
}

// joinNet is the network in which the resident answers.
type joinNet struct {
	room     *joinRoom
	template func(answer value) value                              // changes the answer to make_join
	answer   func(a *joinAnswer)                                   // changes the answer to send_join
	serve    func(q *http.Request, endpoint string) *http.Response // answers before all that; nil: goes on

	mu     sync.Mutex
	asked  []string // method, version and endpoint, server
	bodies []value
}

func (n *joinNet) RoundTrip(q *http.Request) (*http.Response, error) {
	var body value
	if q.Body != nil {
		b, err := io.ReadAll(q.Body)
		require.NoError(n.room.t, err)
		body = eventCanonical(n.room.t, b)
	}
	segments := strings.Split(strings.TrimPrefix(q.URL.EscapedPath(), "/_matrix/federation/"), "/")
	n.mu.Lock()
	n.asked = append(n.asked, strings.Join([]string{segments[0], segments[1], q.Host}, " "))
	n.bodies = append(n.bodies, body)
	n.mu.Unlock()
	if n.serve != nil {
		if r := n.serve(q, segments[1]); r != nil {
			return r, nil
		}
	}
	switch segments[1] {
	case "make_join":
		answer := object(field{"event", n.room.template()}, field{"room_version", quoted(n.room.rules.version)})
		if n.template != nil {
			answer = n.template(answer)
		}
		return joinReply(200, string(answer)), nil
	case "send_join":
		a := n.room.answer(body)
		a.v1 = segments[0] == "v1"
		if n.answer != nil {
			n.answer(a)
		}
		return joinReply(200, string(a.text())), nil
	case "event":
		id, err := url.PathUnescape(segments[2])
		require.NoError(n.room.t, err)
		for _, e := range n.room.all {
			if e.id == EventID(id) {
				return joinReply(200, `{"origin":"r.example","origin_server_ts":1,"pdus":[`+string(e.text)+`]}`), nil
			}
		}
		return joinReply(404, `{"errcode":"M_NOT_FOUND","error":"no such event"}`), nil
	}
	return joinReply(404, `{"errcode":"M_UNRECOGNIZED","error":"?"}`), nil
}

func joinReply(status int, body string) *http.Response {
	return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}
}

// server is Bob's; change alters its Config.
func (n *joinNet) server(t testing.TB, change func(*Config)) (*Client, *joinSignatures) {
	key := &joinSignatures{PrivateKey: joinKey(joinUser.Server())}
	signer, err := NewSigner(joinUser.Server(), "ed25519:1", key)
	require.NoError(t, err)
	cfg := Config{Signers: []*Signer{signer}, HTTP: n, Keys: &joinKeys{}, Now: func() time.Time { return joinTime }}
	if change != nil {
		change(&cfg)
	}
	s, err := NewServer(cfg)
	require.NoError(t, err)
	return s.Client(), key
}

// join is Bob's attempt to join; change alters his request.
func (n *joinNet) join(t testing.TB, change func(*JoinRequest)) (*JoinResult, error) {
	c, _ := n.server(t, nil)
	return n.joinWith(c, change)
}

func (n *joinNet) joinWith(c *Client, change func(*JoinRequest)) (*JoinResult, error) {
	req := &JoinRequest{Room: n.room.id, User: joinUser, Via: []ServerName{joinVia}}
	if change != nil {
		change(req)
	}
	return c.Join(context.Background(), req)
}

var joinVersions = func() (versions []RoomVersion) {
	for _, r := range stableVersions {
		versions = append(versions, r.version)
	}
	return versions
}()

// joinReplace puts another text in the place of an event, in both lists.
func joinReplace(a *joinAnswer, old value, by ...value) {
	for _, list := range []*[]value{&a.state, &a.auth} {
		if i := slices.Index(*list, old); i >= 0 {
			*list = slices.Replace(slices.Clone(*list), i, i+1, by...)
		}
	}
}

func joinIDs(events []*Event) (ids []EventID) {
	for _, e := range events {
		ids = append(ids, e.ID())
	}
	return ids
}

// recordedAnswers are the recorded exchanges of one endpoint that went well.
func recordedAnswers(t testing.TB, endpoint string) (answers []recordedExchange) {
	for _, v := range []string{"v1", "v6", "v10", "v12"} {
		b, err := os.ReadFile(filepath.Join("testdata", "recordings", v+".jsonl"))
		require.NoError(t, err)
		for line := range strings.Lines(string(b)) {
			var x recordedExchange
			require.NoError(t, json.Unmarshal([]byte(line), &x))
			if x.Status == 200 && strings.Contains(x.URI, "/"+endpoint+"/") {
				answers = append(answers, x)
			}
		}
	}
	require.NotEmpty(t, answers)
	return answers
}

// pathParameters are the two IDs in the path of an exchange.
func (x *recordedExchange) pathParameters(t testing.TB) (room, id string) {
	path, _, _ := strings.Cut(x.URI, "?")
	segments := strings.Split(path, "/")
	room, err := url.PathUnescape(segments[5])
	require.NoError(t, err)
	id, err = url.PathUnescape(segments[6])
	require.NoError(t, err)
	return room, id
}
