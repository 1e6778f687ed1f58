package mxfed

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// Every answer that real servers gave to joins is proven whole: each event has its place, and a single wrong byte costs one.
func TestRecordings_JoinAnswers(t *testing.T) {
	forEachRecording(t, func(t *testing.T, rec *recording) {
		answers := 0
		for _, x := range rec.exchanges {
			if x.Status != 200 || !strings.Contains(x.URI, "/send_join/") {
				continue
			}
			answers++
			for _, known := range []bool{true, false} {
				if !known && x.RoomVersion != "1" {
					continue
				}
				result, err := proveRecorded(t, rec, &x, known, x.Response)
				require.NoError(t, err, x.Step)
				response := eventCanonical(t, []byte(x.Response))
				require.Empty(t, result.Dropped)
				require.Equal(t, recordedEvents(response.get("state")), texts(result.State))
				require.Equal(t, recordedEvents(response.get("auth_chain")), texts(result.Auth))
				require.Equal(t, response.get("members_omitted") == "true", len(result.Servers) > 0)
				if signed := response.get("event"); signed != "" {
					require.Equal(t, signed.get("signatures"), result.Event.text.get("signatures"))
				}
			}
			topic := strings.Replace(x.Response, `"history_visibility":"`, `"history_visibility":"x`, 1)
			require.NotEqual(t, x.Response, topic)
			result, err := proveRecorded(t, rec, &x, true, topic)
			require.NoError(t, err, x.Step)
			require.Len(t, result.Dropped, 1, "history visibility is covered by the signature")
		}
		require.NotZero(t, answers)
	})
}

// proveRecorded takes an answer to a recorded join as the server did that got it.
func proveRecorded(t *testing.T, rec *recording, x *recordedExchange, known bool, response string) (*JoinResult, error) {
	join, err := ParseEvent(x.RoomVersion, []byte(x.Body))
	require.NoError(t, err)
	req := &JoinRequest{Room: join.room, User: join.sender}
	try := &joinTry{Client: rec.client(t, join), req: req, via: rec.names[x.To]}
	check := newJoinCheck(&try.verifier, join.rules, known, req)
	rest, err := check.read(t.Context(), &answerReader{in: strings.NewReader(response), max: 1 << 20}, false, try.progress)
	require.NoError(t, err)
	if err := check.settle(); err != nil {
		return nil, err
	}
	return check.result, try.accept(t.Context(), check, join, rest, strings.Contains(x.URI, "omit_members=true"))
}

func TestInParallel(t *testing.T) {
	for n := range 200 {
		calls := make([]atomic.Int32, n)
		inParallel(n, func(p *eventParser, i int) {
			require.NotNil(t, p)
			calls[i].Add(1)
		})
		for i := range calls {
			require.EqualValues(t, 1, calls[i].Load(), "%d of %d", i, n)
		}
	}
}

// verifySet is the keySet of a server us.example with an old key, and whom it asks.
func verifySet(t *testing.T) (*keySet, *joinKeys) {
	old := Key{ID: "ed25519:0", Public: joinKey("old").Public().(ed25519.PublicKey), Expired: joinTime.Add(-time.Hour)}
	own, err := NewSigner("us.example", "ed25519:1", crypto.Signer(joinKey("us.example")), old)
	require.NoError(t, err)
	keys := &joinKeys{}
	return &keySet{verifier: &verifier{keys: keys, own: []*Signer{own}, now: func() time.Time { return joinTime }}}, keys
}

// Each key is asked for once, for the latest moment that matters, and again only if what is known does not reach that far.
func TestKeySet_Asks(t *testing.T) {
	s, keys := verifySet(t)
	at := func(server ServerName, id KeyID, hours int) Key {
		return Key{Server: server, ID: id, At: joinTime.Add(time.Duration(hours) * time.Hour)}
	}
	s.fetchKeys(t.Context(), []Key{at("a.example", "ed25519:1", -2), at("a.example", "ed25519:1", -1), at("a.example", "ed25519:2", -1), at("b.example", "ed25519:1", -3),
		at("a.example", "rsa:1", -1), at("us.example", "ed25519:1", -1), at("us.example", "ed25519:0", -1), at("a.example", "ed25519:1", -3)})
	require.Equal(t, [][]Key{{at("a.example", "ed25519:1", -1), at("a.example", "ed25519:2", -1), at("b.example", "ed25519:1", -3)}}, keys.calls)
	s.fetchKeys(t.Context(), []Key{at("a.example", "ed25519:1", -1), at("a.example", "ed25519:2", 5), at("b.example", "ed25519:1", 1)})
	require.Len(t, keys.calls, 1, "known, known not to exist, and good until then")
	s.fetchKeys(t.Context(), []Key{at("b.example", "ed25519:1", 2), at("c.example", "ed25519:1", 0)})
	require.Equal(t, []Key{at("b.example", "ed25519:1", 2), at("c.example", "ed25519:1", 0)}, keys.calls[1])
	own := s.known[keyName{"us.example", "ed25519:1"}]
	require.True(t, own.Expired.IsZero() && own.ValidUntil.After(joinTime))
	require.Equal(t, joinKey("us.example").Public(), crypto.PublicKey(own.Public))
	replaced := s.known[keyName{"us.example", "ed25519:0"}]
	require.Equal(t, joinTime.Add(-time.Hour), replaced.Expired)
	require.Equal(t, joinKey("old").Public(), crypto.PublicKey(replaced.Public))
}

// Key IDs that an answer makes up are not remembered for ever; keys that exist are.
func TestKeySet_ForgetsWhatDoesNotExist(t *testing.T) {
	s, keys := verifySet(t)
	s.fetchKeys(t.Context(), []Key{{Server: "a.example", ID: "ed25519:1"}})
	for round := range 3 {
		var wanted []Key
		for i := range maxKnownKeys {
			wanted = append(wanted, Key{Server: "a.example", ID: KeyID(fmt.Sprint("ed25519:", round, "x", i))})
		}
		s.fetchKeys(t.Context(), wanted)
		require.LessOrEqual(t, len(s.known), maxKnownKeys+1)
	}
	s.fetchKeys(t.Context(), []Key{{Server: "a.example", ID: "ed25519:1"}})
	require.Len(t, keys.calls, 4, "the last one needed no call")
}

// A look-up that failed says nothing against an event; a key that contradicts its signature does, and so does the lack of
// any signature. https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestVerifier_FailedLookUps(t *testing.T) {
	r := newJoinRoom(t, "10", "public")
	carol, topic := r.entry(typeMember, string(joinCarol)), r.entry("m.room.topic", "")
	edited := func(e *Event, signatures value) *Event {
		edited, err := ParseEvent("10", []byte(e.text.with("signatures", signatures)))
		require.NoError(t, err)
		return edited
	}
	s, keys := verifySet(t)
	keys.down = map[ServerName]bool{"third.example": true}
	verdicts := s.events(t.Context(), []*Event{carol, topic, edited(carol, `{}`), edited(carol, `{"third.example":[]}`),
		edited(topic, `{"r.example":{"ed25519:1":"AAAA"}}`), edited(topic, `{"third.example":{"ed25519:1":"AAAA"}}`)})
	require.Len(t, keys.calls, 1)
	for i, passing := range []bool{true, false, false, false, false, false} {
		err := verdicts[i].err
		require.Equal(t, i != 1, err != nil, i)
		require.Equal(t, passing, err != nil && answerTo(err).Status == http.StatusBadGateway, "%d: %v", i, err)
		require.Equal(t, passing, err != nil && strings.Contains(err.Error(), "third.example is down"), i)
	}
	require.Equal(t, topic, verdicts[1].event)

	s.keys = KeysFunc(func(context.Context, []Key) error { return errors.New("no network") })
	require.True(t, slices.ContainsFunc(s.events(t.Context(), []*Event{topic}), func(v verdict) bool {
		return answerTo(v.err).Status == http.StatusBadGateway
	}))
}
