package gmslbridge_test

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"example.org/mxfed"
	"example.org/mxfed/gmslbridge"
	"example.org/mxfed/internal/synthroom"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

func parse(t *testing.T, pdus [][]byte) (events []*mxfed.Event) {
	for _, pdu := range pdus {
		e, err := mxfed.ParseEvent(synthroom.Version, pdu)
		require.NoError(t, err)
		events = append(events, e)
	}
	return events
}

func public(server string) ed25519.PublicKey {
	return synthroom.Key(server).Public().(ed25519.PublicKey)
}

func TestEvents_BothWays(t *testing.T) {
	for _, e := range parse(t, synthroom.New(30, 3, false).State) {
		pdu, err := gmslbridge.PDU(e)
		require.NoError(t, err)
		require.Equal(t, string(e.ID()), pdu.EventID())
		require.Equal(t, string(e.Sender()), string(pdu.SenderID()))
		back, err := gmslbridge.Event(pdu)
		require.NoError(t, err)
		require.Equal(t, e.ID(), back.ID())
		require.Equal(t, string(e.JSON()), string(back.JSON()))
	}
}

func TestPDU_Refuses(t *testing.T) {
	_, err := gmslbridge.PDU(nil)
	require.Error(t, err)
}

// source is a key database and fetcher of theirs.
type source struct {
	known map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult
	asked int
	err   error
}

func (s *source) FetcherName() string { return "source" }

func (s *source) FetchKeys(_ context.Context, requests map[gomatrixserverlib.PublicKeyLookupRequest]spec.Timestamp) (map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult, error) {
	found := make(map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult)
	for r := range requests {
		s.asked++
		if result, ok := s.known[r]; ok {
			found[r] = result
		}
	}
	return found, s.err
}

func (s *source) StoreKeys(_ context.Context, results map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult) error {
	for r, result := range results {
		s.known[r] = result
	}
	return nil
}

func newSource(until time.Time, servers ...string) *source {
	s := &source{known: make(map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult)}
	for _, name := range servers {
		s.known[gomatrixserverlib.PublicKeyLookupRequest{ServerName: spec.ServerName(name), KeyID: synthroom.KeyID}] = gomatrixserverlib.PublicKeyLookupResult{
			VerifyKey: gomatrixserverlib.VerifyKey{Key: spec.Base64Bytes(public(name))}, ValidUntilTS: spec.AsTimestamp(until)}
	}
	return s
}

func TestKeys_DatabaseThenFetchers(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	database := newSource(now.Add(time.Hour), "a.example", "stale.example")
	fetcher := newSource(now.Add(48*time.Hour), "b.example", "stale.example")
	keys := []mxfed.Key{
		{Server: "a.example", ID: synthroom.KeyID, At: now},
		{Server: "b.example", ID: synthroom.KeyID, At: now},
		{Server: "stale.example", ID: synthroom.KeyID, At: now.Add(24 * time.Hour)},
		{Server: "unknown.example", ID: synthroom.KeyID},
	}
	require.NoError(t, gmslbridge.Keys(database, fetcher).Keys(context.Background(), keys))
	require.Equal(t, public("a.example"), keys[0].Public)
	require.Equal(t, public("b.example"), keys[1].Public)
	require.True(t, keys[2].ValidUntil.Equal(now.Add(48*time.Hour)), "the fetcher knows the key for longer")
	require.Nil(t, keys[3].Public)
	require.Equal(t, 3, fetcher.asked, "what the database knows is not fetched")

	again := []mxfed.Key{{Server: "b.example", ID: synthroom.KeyID, At: now}}
	require.NoError(t, gmslbridge.Keys(database).Keys(context.Background(), again))
	require.Equal(t, public("b.example"), again[0].Public, "what was fetched is stored")
}

func TestKeys_FirstSeenWins(t *testing.T) {
	database, fetcher := newSource(time.UnixMilli(1), "a.example"), newSource(time.UnixMilli(9), "a.example")
	for r, result := range fetcher.known {
		result.Key = spec.Base64Bytes(public("other.example"))
		fetcher.known[r] = result
	}
	keys := []mxfed.Key{{Server: "a.example", ID: synthroom.KeyID, At: time.UnixMilli(5)}}
	require.NoError(t, gmslbridge.Keys(database, fetcher).Keys(context.Background(), keys))
	require.Equal(t, public("a.example"), keys[0].Public)
	require.True(t, keys[0].ValidUntil.Equal(time.UnixMilli(1)))
}

func TestKeys_ReportsFailure(t *testing.T) {
	fetcher := newSource(time.Now())
	fetcher.err = errors.New("unreachable")
	err := gmslbridge.Keys(nil, fetcher).Keys(context.Background(), []mxfed.Key{{Server: "a.example", ID: synthroom.KeyID}})
	require.ErrorIs(t, err, fetcher.err)
}

func TestVerifier(t *testing.T) {
	at := time.UnixMilli(1_700_000_000_000)
	signer, err := mxfed.NewSigner("a.example", synthroom.KeyID, synthroom.Key("a.example"))
	require.NoError(t, err)
	signed, err := signer.SignJSON([]byte(`{"a":1}`))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		key     mxfed.Key
		message string
		check   gomatrixserverlib.SignatureValidityCheckFunc
		ok      bool
	}{
		"good":               {key: mxfed.Key{Public: public("a.example"), ValidUntil: at}, ok: true},
		"another message":    {key: mxfed.Key{Public: public("a.example"), ValidUntil: at}, message: string(signed[:len(signed)-1]) + `,"z":1}`},
		"another key":        {key: mxfed.Key{Public: public("b.example"), ValidUntil: at}},
		"unknown key":        {},
		"not signed":         {key: mxfed.Key{Public: public("a.example"), ValidUntil: at}, message: `{"a":1}`},
		"expired before":     {key: mxfed.Key{Public: public("a.example"), Expired: at.Add(-time.Millisecond)}},
		"expired then":       {key: mxfed.Key{Public: public("a.example"), Expired: at}, ok: true},
		"no longer valid":    {key: mxfed.Key{Public: public("a.example"), ValidUntil: at.Add(-time.Millisecond)}, check: gomatrixserverlib.StrictValiditySignatureCheck},
		"validity not asked": {key: mxfed.Key{Public: public("a.example"), ValidUntil: at.Add(-time.Millisecond)}, check: gomatrixserverlib.NoStrictValidityCheck, ok: true},
	} {
		t.Run(name, func(t *testing.T) {
			keys := mxfed.KeysFunc(func(_ context.Context, keys []mxfed.Key) error {
				for i := range keys {
					keys[i].Public, keys[i].ValidUntil, keys[i].Expired = c.key.Public, c.key.ValidUntil, c.key.Expired
				}
				return nil
			})
			message := signed
			if c.message != "" {
				message = []byte(c.message)
			}
			results, err := gmslbridge.Verifier(keys).VerifyJSONs(context.Background(), []gomatrixserverlib.VerifyJSONRequest{
				{ServerName: "a.example", AtTS: spec.AsTimestamp(at), Message: message, ValidityCheckingFunc: c.check}})
			require.NoError(t, err)
			require.Len(t, results, 1)
			require.Equal(t, c.ok, results[0].Error == nil, results[0].Error)
		})
	}
}

// TestVerifier_ServesTheirLibrary has gomatrixserverlib verify the events of a room with mxfed's Keys over its own database.
func TestVerifier_ServesTheirLibrary(t *testing.T) {
	room := synthroom.New(30, 3, false)
	verifier := gmslbridge.Verifier(gmslbridge.Keys(newSource(time.Now().Add(time.Hour), room.Servers...)))
	var pdus []gomatrixserverlib.PDU
	for _, e := range parse(t, room.State) {
		pdu, err := gmslbridge.PDU(e)
		require.NoError(t, err)
		pdus = append(pdus, pdu)
	}
	user := func(_ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
		return spec.NewUserID(string(sender), true)
	}
	for _, err := range gomatrixserverlib.VerifyAllEventSignatures(context.Background(), pdus, verifier, user) {
		require.NoError(t, err)
	}
}

// branch is a host that knows one room, and nothing but its latest event and state.
type branch []*mxfed.Event

// Room implements mxfed.RoomSource.
func (b branch) Room(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
	now := make(map[mxfed.StateKey]*mxfed.Event)
	for _, e := range b {
		key, _ := e.StateKey()
		now[mxfed.StateKey{Type: e.Type(), Key: key}] = e
	}
	return &mxfed.Room{Version: synthroom.Version, Latest: b[len(b)-1:], State: slices.Collect(maps.Values(now))}, nil
}

// and is b with one more event, which a user of the room has sent.
func (b branch) and(t *testing.T, sender mxfed.UserID, typ, key, content string) branch {
	t.Helper()
	signer, err := mxfed.NewSigner(sender.Server(), "ed25519:1", synthroom.Key(string(sender.Server())))
	require.NoError(t, err)
	server, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}, Rooms: b})
	require.NoError(t, err)
	e, err := server.Build(t.Context(), &mxfed.Draft{Room: "!r:s0.example", Version: synthroom.Version, Type: typ, StateKey: &key,
		Sender: sender, Content: json.RawMessage(content)})
	require.NoError(t, err)
	return append(b[:len(b):len(b)], e)
}

// TestResolveState lets a room fall apart: on one side bob, who may do so, sets the topic, on the other he is banned.
func TestResolveState(t *testing.T) {
	const alice, bob = "@alice:s0.example", "@bob:s1.example"
	room := branch(nil).and(t, alice, "m.room.create", "", `{"creator":"@alice:s0.example","room_version":"10"}`).
		and(t, alice, "m.room.member", alice, `{"membership":"join"}`).
		and(t, alice, "m.room.power_levels", "", `{"users":{"@alice:s0.example":100,"@bob:s1.example":50}}`).
		and(t, alice, "m.room.join_rules", "", `{"join_rule":"public"}`).
		and(t, alice, "m.room.topic", "", `{"topic":"first"}`)
	with := room.and(t, bob, "m.room.member", bob, `{"membership":"join"}`)
	topic := with.and(t, bob, "m.room.topic", "", `{"topic":"second"}`)
	ban := with.and(t, alice, "m.room.member", bob, `{"membership":"ban"}`)
	last := func(b branch) *mxfed.Event { return b[len(b)-1] }
	before := append(room[:4:4], last(with)) // but for the topic, which is in dispute
	states := [][]*mxfed.Event{append(before, last(topic)), append(room[:5:5], last(ban))}
	chain := append(before, last(room))

	resolved, err := gmslbridge.ResolveState(synthroom.Version, states, chain, nil)
	require.NoError(t, err)
	require.ElementsMatch(t, append(room[:4:4], last(ban), last(room)), resolved, "the ban counts before the topic is judged")

	var asked []mxfed.EventID
	_, err = gmslbridge.ResolveState(synthroom.Version, states, chain, func(id mxfed.EventID) bool {
		asked = append(asked, id)
		return false
	})
	require.NoError(t, err)
	require.Contains(t, asked, room[2].ID(), "the power levels decide about what came after them")

	one, err := gmslbridge.ResolveState(synthroom.Version, states[:1], nil, nil)
	require.NoError(t, err)
	require.Equal(t, states[0], one)
	_, err = gmslbridge.ResolveState("unknown", states, chain, nil)
	require.ErrorContains(t, err, "unknown")
	_, err = gmslbridge.ResolveState(synthroom.Version, nil, nil, nil)
	require.ErrorContains(t, err, "gmslbridge: resolve state: ", "nothing ends the process")
}
