package mxfed_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// This file holds what the tests of the serving side share: servers with keys, events that are made by hand so that they
// can be wrong in any way, and a server under test that counts its signatures and the calls of its hosts.

// srvNow is the time on every clock.
var srvNow = time.UnixMilli(1_700_000_100_000)

// srvVersions are all room versions.
var srvVersions = []mxfed.RoomVersion{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"}

// srvPeer is a server with its key.
type srvPeer struct {
	name   mxfed.ServerName
	id     mxfed.KeyID
	key    ed25519.PrivateKey
	signer *mxfed.Signer
}

func newSrvPeer(t testing.TB, name mxfed.ServerName) *srvPeer {
	seed := sha256.Sum256([]byte(name))
	p := &srvPeer{name: name, id: "ed25519:k", key: ed25519.NewKeyFromSeed(seed[:])}
	var err error
	p.signer, err = mxfed.NewSigner(name, p.id, p.key)
	require.NoError(t, err)
	return p
}

func (p *srvPeer) user(local string) string { return "@" + local + ":" + string(p.name) }

// srvKeys is a map of keys that are valid for a day.
type srvKeys struct {
	byName map[mxfed.ServerName]map[mxfed.KeyID]mxfed.Key
	asked  atomic.Int64
	fail   error
}

func (k *srvKeys) Keys(_ context.Context, keys []mxfed.Key) error {
	k.asked.Add(1)
	for i := range keys {
		known := k.byName[keys[i].Server][keys[i].ID]
		keys[i].Public, keys[i].ValidUntil, keys[i].Expired = known.Public, known.ValidUntil, known.Expired
	}
	return k.fail
}

func (k *srvKeys) add(p *srvPeer) {
	if k.byName == nil {
		k.byName = make(map[mxfed.ServerName]map[mxfed.KeyID]mxfed.Key)
	}
	public := p.key.Public().(ed25519.PublicKey)
	k.byName[p.name] = map[mxfed.KeyID]mxfed.Key{p.id: {Public: public, ValidUntil: srvNow.Add(24 * time.Hour)}}
}

// srvCounter is a key that counts the signatures it makes.
type srvCounter struct {
	crypto.Signer
	made atomic.Int64
}

func (c *srvCounter) Sign(r io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	c.made.Add(1)
	return c.Signer.Sign(r, message, opts)
}

// srvSite is the server under test: us.example, whose peers are domain, third.example and any that are added. Its hosts
// take everything and keep what they are given.
type srvSite struct {
	server  *mxfed.Server
	handler http.Handler
	own     *srvPeer
	domain  *srvPeer
	third   *srvPeer
	keys    srvKeys
	signing *srvCounter
	rooms   map[mxfed.RoomID]*srvRoom
	asks    atomic.Int64 // of the RoomSource

	mu      sync.Mutex
	invites []*mxfed.Invite
	joins   []*mxfed.Membership
	members []*mxfed.Membership // leaves and knocks
	allowed []mxfed.Request
	// What the hosts do instead, if set.
	invited func(ctx context.Context, inv *mxfed.Invite) error
	accept  func(ctx context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error)
	take    func(ctx context.Context, m *mxfed.Membership) error
	allow   func(ctx context.Context, r *mxfed.Request) error
}

func newSrvSite(t testing.TB, change ...func(*mxfed.Config)) *srvSite {
	s := &srvSite{own: newSrvPeer(t, "us.example"), domain: newSrvPeer(t, "domain"), third: newSrvPeer(t, "third.example"),
		rooms: make(map[mxfed.RoomID]*srvRoom)}
	s.keys.add(s.domain)
	s.keys.add(s.third)
	s.signing = &srvCounter{Signer: s.own.key}
	signer, err := mxfed.NewSigner(s.own.name, s.own.id, s.signing)
	require.NoError(t, err)
	cfg := mxfed.Config{Signers: []*mxfed.Signer{signer}, Keys: &s.keys, Now: func() time.Time { return srvNow },
		Rooms: mxfed.RoomSourceFunc(s.room), Allow: s.allows}
	for _, f := range change {
		f(&cfg)
	}
	s.server, err = mxfed.NewServer(cfg)
	require.NoError(t, err)
	member := mxfed.MemberHostFunc(s.takeMember)
	s.handler = mxfed.NewHandler(s.server, mxfed.Hosts{Invite: mxfed.InviteHostFunc(s.takeInvite), Join: mxfed.JoinHostFunc(s.takeJoin),
		Leave: member, Knock: member})
	return s
}

func (s *srvSite) room(ctx context.Context, id mxfed.RoomID, ask mxfed.RoomQuery) (*mxfed.Room, error) {
	s.asks.Add(1)
	room := s.rooms[id]
	if room == nil {
		return nil, mxfed.ErrNotFound
	}
	return room.answer(ask)
}

func (s *srvSite) allows(ctx context.Context, r *mxfed.Request) error {
	s.mu.Lock()
	s.allowed = append(s.allowed, *r)
	s.mu.Unlock()
	if s.allow != nil {
		return s.allow(ctx, r)
	}
	return nil
}

func (s *srvSite) takeInvite(ctx context.Context, inv *mxfed.Invite) error {
	s.mu.Lock()
	s.invites = append(s.invites, inv)
	s.mu.Unlock()
	if s.invited != nil {
		return s.invited(ctx, inv)
	}
	return nil
}

func (s *srvSite) takeJoin(ctx context.Context, m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	s.mu.Lock()
	s.joins = append(s.joins, m)
	s.mu.Unlock()
	if s.accept != nil {
		return s.accept(ctx, m)
	}
	return s.rooms[m.Event.RoomID()].join(m)
}

func (s *srvSite) takeMember(ctx context.Context, m *mxfed.Membership) error {
	s.mu.Lock()
	s.members = append(s.members, m)
	s.mu.Unlock()
	if s.take != nil {
		return s.take(ctx, m)
	}
	return s.rooms[m.Event.RoomID()].take(m)
}

// reset forgets what was counted.
func (s *srvSite) reset() {
	s.signing.made.Store(0)
	s.asks.Store(0)
	s.keys.asked.Store(0)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.invites, s.joins, s.members, s.allowed = nil, nil, nil, nil
}

// request is a request of from, signed; if the body is no JSON, only the rest of it is.
func (s *srvSite) request(t testing.TB, from *srvPeer, method, uri string, body []byte) *http.Request {
	r := httptest.NewRequest(method, uri, bytes.NewReader(body))
	if method == http.MethodGet {
		body = nil
	}
	if from.signer.SignRequest(r, s.own.name, body) != nil {
		require.NoError(t, from.signer.SignRequest(r, s.own.name, nil))
	}
	return r
}

// send makes a signed request and returns the answer.
func (s *srvSite) send(t testing.TB, from *srvPeer, method, uri string, body []byte) *httptest.ResponseRecorder {
	return s.serve(s.request(t, from, method, uri, body))
}

func (s *srvSite) serve(r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	return w
}

// srvURI is the escaped path of an endpoint, such as "v2/invite".
func srvURI(endpoint, room, id string) string {
	return "/_matrix/federation/" + endpoint + "/" + url.PathEscape(room) + "/" + url.PathEscape(id)
}

// requireRefused demands an error answer of the protocol and that neither the signer nor a host had a part in it.
func (s *srvSite) requireRefused(t testing.TB, w *httptest.ResponseRecorder, status int, code mxfed.ErrorCode) map[string]any {
	t.Helper()
	body := requireSrvError(t, w, status, code)
	require.Zero(t, s.signing.made.Load(), "signed something")
	require.Empty(t, s.invites, "the host was asked")
	require.Empty(t, s.joins, "the host was asked")
	require.Empty(t, s.members, "the host was asked")
	return body
}

// requireSrvError demands the standard error. https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
func requireSrvError(t testing.TB, w *httptest.ResponseRecorder, status int, code mxfed.ErrorCode) map[string]any {
	t.Helper()
	require.Equal(t, status, w.Code, "%s", w.Body)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	var body map[string]any
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &body))
	require.Equal(t, string(code), body["errcode"], "%s", w.Body)
	require.IsType(t, "", body["error"])
	return body
}

// srvPDU is an event that is being made.
type srvPDU map[string]any

// with returns a copy with one member set, or removed if v is nil.
func (p srvPDU) with(key string, v any) srvPDU {
	next := maps.Clone(p)
	if next[key] = v; v == nil {
		delete(next, key)
	}
	return next
}

// srvRefs are references to events in the form of the room version.
func srvRefs(v mxfed.RoomVersion, ids ...mxfed.EventID) []any {
	refs := []any{}
	for _, id := range ids {
		if srvGivenIDs(v) {
			refs = append(refs, []any{id, map[string]any{"sha256": strings.Repeat("A", 43)}})
		} else {
			refs = append(refs, id)
		}
	}
	return refs
}

// srvGivenIDs tells whether events of the version carry their ID.
func srvGivenIDs(v mxfed.RoomVersion) bool { return v == "1" || v == "2" }

// sign returns the event with its content hash, unless it has hashes, and with signatures by the rules of v.
func (p srvPDU) sign(t testing.TB, v mxfed.RoomVersion, by ...*srvPeer) json.RawMessage {
	if p["hashes"] == nil {
		covered := p.with("unsigned", nil).with("signatures", nil)
		if !srvGivenIDs(v) {
			covered = covered.with("event_id", nil)
		}
		sum := sha256.Sum256(srvJSON(t, covered))
		p = p.with("hashes", map[string]any{"sha256": base64.RawStdEncoding.EncodeToString(sum[:])})
	}
	signatures := map[string]any{}
	if given, ok := p["signatures"].(map[string]any); ok {
		maps.Copy(signatures, given)
	}
	message := srvJSON(t, p.redacted(t, v))
	for _, peer := range by {
		sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(peer.key, message))
		own, _ := signatures[string(peer.name)].(map[string]any)
		next := map[string]any{string(peer.id): sig}
		maps.Copy(next, own)
		signatures[string(peer.name)] = next
	}
	if p["signatures"] == nil || len(by) > 0 {
		p = p.with("signatures", signatures)
	}
	return srvJSON(t, p)
}

// srvRedaction is the published table of what a redacted event keeps.
var srvRedaction = sync.OnceValues(func() (rules map[mxfed.RoomVersion]srvKept, err error) {
	var file struct {
		RoomVersions map[mxfed.RoomVersion]srvKept `json:"room_versions"`
	}
	err = srvReadVector("redaction_rules.json", &file)
	return file.RoomVersions, err
})

// srvReadVector reads a file of testdata/vectors.
func srvReadVector(name string, v any) error {
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

type srvKept struct {
	TopLevel []string            `json:"keep_top_level"`
	Content  map[string][]string `json:"keep_content"`
}

// redacted is what signatures cover.
func (p srvPDU) redacted(t testing.TB, v mxfed.RoomVersion) srvPDU {
	all, err := srvRedaction()
	require.NoError(t, err)
	rules := all[v]
	kept := srvPDU{}
	for key, m := range p {
		if key != "signatures" && slices.Contains(rules.TopLevel, key) && (key != "event_id" || srvGivenIDs(v)) {
			kept[key] = m
		}
	}
	content, ok := p["content"].(map[string]any)
	typ, _ := p["type"].(string)
	if keys := rules.Content[typ]; ok && !slices.Contains(keys, "*") {
		cut := map[string]any{}
		for key, m := range content {
			if slices.Contains(keys, key) {
				cut[key] = m
			}
		}
		if signed, ok := content["third_party_invite"].(map[string]any); ok && slices.Contains(keys, "third_party_invite.signed") {
			cut["third_party_invite"] = map[string]any{"signed": signed["signed"]}
		}
		kept["content"] = cut
	}
	return kept
}

// srvJSON is v in canonical form, if v holds what canonical JSON can say; it sorts and does nothing else.
func srvJSON(t testing.TB, v any) []byte {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	require.NoError(t, encoder.Encode(v))
	return bytes.TrimSpace(b.Bytes())
}

// srvEvent parses a PDU that a test has made.
func srvEvent(t testing.TB, v mxfed.RoomVersion, pdu []byte) *mxfed.Event {
	e, err := mxfed.ParseEvent(v, pdu)
	require.NoError(t, err, "%s", pdu)
	return e
}

// srvObject decodes a JSON object.
func srvObject(t testing.TB, b []byte) map[string]any {
	var object map[string]any
	require.NoError(t, json.Unmarshal(b, &object), "%s", b)
	return object
}

// srvDefect is what is wrong with an otherwise good event: before it is signed, or in its text afterwards.
type srvDefect struct {
	event  func(p srvPDU) srvPDU
	text   func(pdu string) string
	by     string // who signs: "domain" if empty, "nobody", "third", "us", "both" for domain and third
	from   string // who sends: "domain" if empty, "third"
	status int    // 400 if 0
	code   mxfed.ErrorCode
}

// pdu is the event, made of a good one.
func (d *srvDefect) pdu(t testing.TB, s *srvSite, v mxfed.RoomVersion, good srvPDU) json.RawMessage {
	if d.event != nil {
		good = d.event(good)
	}
	signers := map[string][]*srvPeer{"": {s.domain}, "third": {s.third}, "us": {s.own}, "both": {s.domain, s.third}}
	pdu := good.sign(t, v, signers[d.by]...)
	if d.text == nil {
		return pdu
	}
	changed := d.text(string(pdu))
	require.NotEqual(t, string(pdu), changed)
	return json.RawMessage(changed)
}

// sender is who sends it.
func (d *srvDefect) sender(s *srvSite) *srvPeer {
	if d.from == "third" {
		return s.third
	}
	return s.domain
}
