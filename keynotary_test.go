package mxfed_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// keyNotary is a server of this package that is a notary, and what it was asked.
type keyNotary struct {
	*keyHost
	ring   *mxfed.KeyRing
	answer func(documents []json.RawMessage) []json.RawMessage // changes what it says

	mu      sync.Mutex
	queries []map[string]map[string]map[string]int64 // by server, key ID and criterion
}

const notaryPath = "/_matrix/key/v2/query"

func (n *keyNet) notary(name mxfed.ServerName) *keyNotary {
	h := &keyNotary{keyHost: n.host(name), ring: n.ring()}
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{h.signer("a")}, Keys: h.ring, HTTP: n, Now: n.now})
	require.NoError(n, err)
	handler := mxfed.NewKeyHandler(s)
	n.serve(name, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != notaryPath {
			h.keyHost.ServeHTTP(w, r)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		var query struct {
			Servers map[string]map[string]map[string]int64 `json:"server_keys"`
		}
		json.Unmarshal(body, &query)
		h.mu.Lock()
		h.queries = append(h.queries, query.Servers)
		h.mu.Unlock()
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		if h.answer == nil {
			handler.ServeHTTP(w, r)
			return
		}
		var reply keyReply
		keyServe(handler, r, &reply)
		reply.Keys = h.answer(reply.Keys)
		json.NewEncoder(w).Encode(reply)
	}))
	return h
}

func TestKeyRing_AsksNotariesInBulk(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	var keys []mxfed.Key
	for i := range 250 {
		h := n.host(mxfed.ServerName(fmt.Sprintf("s%d.example", i)))
		keys = append(keys, mxfed.Key{Server: h.name, ID: "ed25519:a", At: n.now().Add(time.Duration(i))})
	}
	k := n.ring("n.example")
	require.NoError(t, k.Keys(t.Context(), keys))
	require.Len(t, notary.queries, 3)
	for _, q := range keys {
		require.NotNil(t, q.Public)
		require.True(t, q.ValidUntil.Equal(n.now().Add(24*time.Hour)))
		require.Equal(t, 1, n.count(q.Server), "asked by the notary alone")
	}
	require.Equal(t, 1, n.count("n.example"), "the notary's own keys come from itself")
	require.NoError(t, k.Keys(t.Context(), keys))
	require.Len(t, notary.queries, 3)
}

// https://spec.matrix.org/v1.19/rooms/v5/#signing-key-validity-period
func TestKeyRing_TellsNotaryTheMoment(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	n.host("a.example")
	n.host("b.example")
	n.host("c.example")
	at := n.now().AddDate(-1, 0, 0)
	keys := []mxfed.Key{{Server: "a.example", ID: "ed25519:a", At: at},
		{Server: "a.example", ID: "ed25519:a", At: at.Add(5 * time.Millisecond)}, {Server: "a.example", ID: "ed25519:a", At: at.Add(5)}, {Server: "b.example", ID: "ed25519:a"},
		{Server: "b.example", ID: "ed25519:x", At: time.UnixMilli(-5)}}
	for i := range 33 {
		keys = append(keys, mxfed.Key{Server: "c.example", ID: mxfed.KeyID(fmt.Sprintf("ed25519:%d", i))})
	}
	require.NoError(t, n.ring("n.example").Keys(t.Context(), keys))
	type criteria = map[string]int64
	require.Equal(t, []map[string]map[string]map[string]int64{{
		"a.example": {"ed25519:a": criteria{"minimum_valid_until_ts": at.UnixMilli() + 5}},
		"b.example": {"ed25519:a": criteria{"minimum_valid_until_ts": 0}, "ed25519:x": criteria{"minimum_valid_until_ts": 0}},
		"c.example": {}, // all of them
	}}, notary.queries)
}

// A notary helps with servers that are down, and what it does not know is asked of the servers.
func TestKeyRing_NotaryAndServers(t *testing.T) {
	n := newKeyNet(t)
	notary, second := n.notary("n.example"), n.notary("m.example")
	a, b, c := n.host("a.example"), n.host("b.example"), n.host("c.example")
	for _, name := range []mxfed.ServerName{"a.example", "b.example"} {
		_, err := n.find(notary.ring, name, "a", n.now())
		require.NoError(t, err)
	}
	n.serve("a.example", http.NotFoundHandler())
	notary.answer = func(documents []json.RawMessage) []json.RawMessage {
		return slices.DeleteFunc(documents, func(d json.RawMessage) bool { return !strings.Contains(string(d), `"a.example"`) })
	}
	second.answer = func(documents []json.RawMessage) []json.RawMessage {
		return slices.DeleteFunc(documents, func(d json.RawMessage) bool { return !strings.Contains(string(d), `"b.example"`) })
	}
	keys := []mxfed.Key{{Server: "a.example", ID: "ed25519:a", At: n.now()}, {Server: "b.example", ID: "ed25519:a", At: n.now()},
		{Server: "c.example", ID: "ed25519:a", At: n.now()}, {Server: "n.example", ID: "ed25519:a", At: n.now()}}
	require.NoError(t, n.ring("n.example", "m.example").Keys(t.Context(), keys))
	require.Equal(t, a.public("a"), keys[0].Public)
	require.Equal(t, b.public("a"), keys[1].Public)
	require.Equal(t, c.public("a"), keys[2].Public)
	require.Equal(t, notary.public("a"), keys[3].Public)
	require.Len(t, notary.queries, 1)
	require.NotContains(t, notary.queries[0], "n.example", "not about itself")
	require.Len(t, second.queries, 1)
	require.NotContains(t, second.queries[0], "a.example", "was found already")
	require.Equal(t, 2, n.count("b.example"), "asked by both notaries")
	require.Equal(t, 3, n.count("c.example"), "asked by both notaries and here")
}

func TestKey_NotaryUnasked(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	n.host("a.example")
	b := n.host("b.example")
	signed, err := notary.signer("a").SignJSON(b.document())
	require.NoError(t, err)
	notary.answer = func(documents []json.RawMessage) []json.RawMessage { return append(documents, signed) }
	k := n.ring("n.example")
	_, err = n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	notary.answer = func([]json.RawMessage) []json.RawMessage { return nil }
	key, err := n.find(k, "b.example", "a", n.now())
	require.NoError(t, err)
	require.NotNil(t, key.Public)
	require.Len(t, notary.queries, 2)
	require.Equal(t, 2, n.count("b.example"), "by the notary, and here since what was not asked for counts nothing")
}

func TestKey_NotaryUnsigned(t *testing.T) {
	drop := func(name string, keyID string) func(n *keyNotary, d map[string]any) {
		return func(_ *keyNotary, d map[string]any) {
			delete(d["signatures"].(map[string]any)[name].(map[string]any), keyID)
		}
	}
	forge := func(n *keyNotary, d map[string]any) { // the notary makes up a key and signs it
		d["verify_keys"].(map[string]any)["ed25519:forged"] = map[string]any{
			"key": base64.RawStdEncoding.EncodeToString(n.public("forged"))}
	}
	for name, c := range map[string]struct {
		change func(n *keyNotary, d map[string]any)
		signer string // of the notary; "" for none
		good   bool
	}{
		"as it should be":                {func(*keyNotary, map[string]any) {}, "a", true},
		"not signed by the notary":       {drop("n.example", "ed25519:a"), "", false},
		"signed by an unknown key of it": {drop("n.example", "ed25519:a"), "unknown", false},
		"signed by an old key of it":     {drop("n.example", "ed25519:a"), "old", false},
		"signed by an unknown key too":   {func(*keyNotary, map[string]any) {}, "unknown", true},
		"not signed by the server":       {drop("a.example", "ed25519:a"), "a", false},
		"forged, signed by the notary":   {forge, "a", false},
		"forged, with the server's signature gone": {func(n *keyNotary, d map[string]any) {
			forge(n, d)
			delete(d["signatures"].(map[string]any), "a.example")
		}, "a", false},
		"notary's signature is wrong": {func(_ *keyNotary, d map[string]any) {
			d["signatures"].(map[string]any)["n.example"].(map[string]any)["ed25519:a"] = base64.StdEncoding.EncodeToString(make([]byte, 64))
		}, "", false},
		"unsigned part is not covered": {func(_ *keyNotary, d map[string]any) { d["unsigned"] = 1 }, "", true},
		"of another name":              {func(_ *keyNotary, d map[string]any) { d["server_name"] = "b.example" }, "a", false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newKeyNet(t)
			notary := n.notary("n.example")
			notary.old["old"] = n.now().AddDate(1, 0, 0).UnixMilli()
			n.host("a.example")
			notary.answer = func(documents []json.RawMessage) []json.RawMessage {
				var d map[string]any
				require.NoError(t, json.Unmarshal(documents[0], &d))
				c.change(notary, d)
				text, err := json.Marshal(d)
				require.NoError(t, err)
				if c.signer != "" {
					text, err = notary.signer(c.signer).SignJSON(text)
					require.NoError(t, err)
				}
				return []json.RawMessage{text}
			}
			k := n.ring("n.example")
			key, err := n.find(k, "a.example", "a", n.now())
			require.NoError(t, err)
			require.NotNil(t, key.Public)
			asked := 1 // by the notary
			if !c.good {
				asked = 2
			}
			require.Equal(t, asked, n.count("a.example"))
			key, err = n.find(k, "a.example", "forged", time.Time{})
			require.NoError(t, err)
			require.Nil(t, key.Public)
		})
	}
}

// A notary's key must be valid now.
func TestKeyRing_NotaryIsOutdated(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	notary.validUntil = n.now().UnixMilli()
	n.host("a.example")
	n.host("b.example")
	k := n.ring("n.example")
	_, err := n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	require.Equal(t, 1, n.count("a.example"))
	n.pass(time.Millisecond)
	_, err = n.find(k, "b.example", "a", n.now())
	require.NoError(t, err)
	require.Len(t, notary.queries, 2)
	require.Equal(t, 2, n.count("b.example"))
}

// A notary that fails is not asked for a minute, and nothing depends on it.
func TestKeyRing_NotaryFails(t *testing.T) {
	big := strings.Repeat(" ", 4<<20)
	for name, handler := range map[string]http.HandlerFunc{
		"500": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://a.example/", http.StatusTemporaryRedirect)
		},
		"no JSON":   func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") },
		"too large": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, big+`{"server_keys":[]}`) },
	} {
		n := newKeyNet(t)
		n.serve("n.example", handler)
		k := n.ring("n.example", "not a name")
		for i := range 3 {
			h := n.host(mxfed.ServerName(fmt.Sprintf("s%d.example", i)))
			key, err := n.find(k, h.name, "a", n.now())
			require.NoError(t, err, name)
			require.NotNil(t, key.Public, name)
		}
		require.Equal(t, 1, n.requests("n.example", notaryPath), name)
		n.pass(time.Minute)
		n.host("later.example")
		_, err := n.find(k, "later.example", "a", n.now())
		require.NoError(t, err, name)
		require.Equal(t, 2, n.requests("n.example", notaryPath), name)
	}
}

// A notary that hangs takes half of the time at most.
func TestKeyRing_NotaryHangs(t *testing.T) {
	n := newKeyNet(t)
	n.kill("n.example")
	n.host("a.example")
	transport := &deadlines{keyNet: n}
	k := n.ring("n.example", "m.example")
	k.HTTP = transport
	n.serve("m.example", http.NotFoundHandler())
	key, err := n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	require.NotNil(t, key.Public)
	require.Len(t, transport.seen, 3, "two notaries, the server itself")
	require.True(t, transport.seen[0].Before(transport.seen[2].Add(-5*time.Second)))
}

// A document that the notary has kept does not replace a newer one.
func TestKeyRing_NotaryIsBehind(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	h := n.host("a.example")
	stale, err := notary.signer("a").SignJSON(h.document())
	require.NoError(t, err)
	notary.answer = func([]json.RawMessage) []json.RawMessage { return []json.RawMessage{stale} }
	n.pass(time.Hour)
	h.set(func() { h.current = []string{"b"}; h.old["a"] = n.now().UnixMilli() })
	k := n.ring("n.example")
	require.NoError(t, keyRequest(h, k, "b"), "asked itself, since the notary does not know b")
	require.ErrorIs(t, keyRequest(h, k, "a"), mxfed.ErrUnauthorized)
	n.pass(time.Minute)
	n.serve("a.example", http.NotFoundHandler())
	_, err = n.find(k, "a.example", "unknown", time.Time{})
	require.Error(t, err)
	require.Len(t, notary.queries, 2)
	require.ErrorIs(t, keyRequest(h, k, "a"), mxfed.ErrUnauthorized)
	require.NoError(t, keyRequest(h, k, "b"))
}

// Keys of the notary itself grow old as well.
func TestKeyRing_NotaryKeyIsOld(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	a, b := n.host("a.example"), n.host("b.example")
	k := n.ring("n.example")
	_, err := n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	n.pass(25 * time.Hour) // the notary's own keys have to be fetched again
	_, err = n.find(k, "b.example", "a", n.now())
	require.NoError(t, err)
	require.Equal(t, 2, n.count("n.example"))
	require.Equal(t, 1, n.count("a.example"))
	require.Equal(t, 1, n.count("b.example"))
	require.NoError(t, keyRequest(a, k, "a"))
	require.NoError(t, keyRequest(b, k, "a"))
	require.NoError(t, keyRequest(notary.keyHost, k, "a"))
}
