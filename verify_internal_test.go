package mxfed

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
				require.Equal(t, response.get("state"), texts(result.State))
				require.Equal(t, response.get("auth_chain"), texts(result.Auth))
				require.Contains(t, result.Event.text.get("signatures"), rec.names[x.To])
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
	now := millis(join.ts).Add(time.Minute)
	keys := KeysFunc(func(_ context.Context, keys []Key) error {
		for i := range keys {
			keys[i].Public, keys[i].ValidUntil = rec.key(keys[i].Server, keys[i].ID), now
		}
		return nil
	})
	s, err := NewServer(Config{Signers: []*Signer{joinSigner(t, "other.example")}, Keys: keys, Now: func() time.Time { return now }})
	require.NoError(t, err)
	req := &JoinRequest{Room: join.room, User: join.sender}
	try := &joinTry{Client: s.Client(), req: req, via: rec.names[x.To]}
	check := newJoinCheck(&try.verifier, join.rules, known, req)
	rest, err := check.read(t.Context(), &answerReader{in: strings.NewReader(response), max: 1 << 20}, false, try.progress)
	require.NoError(t, err)
	if err := check.settle(); err != nil {
		return nil, err
	}
	return check.result, try.accept(t.Context(), check, join, rest, false)
}
