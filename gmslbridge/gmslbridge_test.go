package gmslbridge_test

import (
	"context"
	"crypto/ed25519"
	"errors"
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

func TestResolveState(t *testing.T) {
	room := synthroom.New(30, 3, false)
	state := parse(t, room.State)
	resolved, err := gmslbridge.ResolveState(synthroom.Version, [][]*mxfed.Event{state[:20], append(state[:10:10], state[20:]...)}, state[:4], nil)
	require.NoError(t, err)
	ids := func(events []*mxfed.Event) (ids []mxfed.EventID) {
		for _, e := range events {
			ids = append(ids, e.ID())
		}
		return ids
	}
	require.Subset(t, ids(resolved), ids(state[:10]), "what both states agree on stays")
	require.Subset(t, ids(state), ids(resolved))
	_, err = gmslbridge.ResolveState("unknown", [][]*mxfed.Event{state}, nil, nil)
	require.Error(t, err)
}
