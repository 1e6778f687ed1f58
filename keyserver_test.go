package mxfed_test

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// keyReply is the answer of a notary.
type keyReply struct {
	Keys []json.RawMessage `json:"server_keys"`
}

// publishedKeys is a key document.
type publishedKeys struct {
	Name   mxfed.ServerName `json:"server_name"`
	Verify map[mxfed.KeyID]struct {
		Key string
	} `json:"verify_keys"`
	Old map[mxfed.KeyID]struct {
		Key     string
		Expired int64 `json:"expired_ts"`
	} `json:"old_verify_keys"`
	ValidUntil int64 `json:"valid_until_ts"`
	Signatures map[mxfed.ServerName]map[mxfed.KeyID]string
}

// keyServe decodes the answer of h and returns its status and errcode.
func keyServe(h http.Handler, r *http.Request, out any) (int, mxfed.ErrorCode) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var e struct{ Errcode mxfed.ErrorCode }
	if json.Unmarshal(w.Body.Bytes(), &e) != nil || w.Header().Get("Content-Type") != "application/json" {
		return 0, ""
	}
	if raw, ok := out.(*json.RawMessage); ok {
		*raw = w.Body.Bytes()
	} else if out != nil && json.Unmarshal(w.Body.Bytes(), out) != nil {
		return 0, ""
	}
	return w.Code, e.Errcode
}

func keyGet(h http.Handler, url string, out any) (int, mxfed.ErrorCode) {
	return keyServe(h, httptest.NewRequest(http.MethodGet, url, nil), out)
}

func keyPost(h http.Handler, url, body string, out any) (int, mxfed.ErrorCode) {
	return keyServe(h, httptest.NewRequest(http.MethodPost, url, strings.NewReader(body)), out)
}

// countingKey counts what it signs.
type countingKey struct {
	ed25519.PrivateKey
	signed atomic.Int64
}

func (k *countingKey) Sign(rand io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.signed.Add(1)
	return k.PrivateKey.Sign(rand, message, opts)
}

// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server
func TestKeyHandler_Publishes(t *testing.T) {
	n := newKeyNet(t)
	one, two := n.host("one.example"), n.host("two.example:8448")
	retired := time.UnixMilli(1_600_000_000_123)
	key := &countingKey{PrivateKey: one.key("a")}
	first, err := mxfed.NewSigner("one.example", "ed25519:a", key,
		mxfed.Key{ID: "ed25519:old", Public: one.public("old"), Expired: retired},
		mxfed.Key{ID: "ed25519:older", Public: one.public("older"), Expired: time.Unix(1<<60, 0)})
	require.NoError(t, err)
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{first, two.signer("b")}, HTTP: n, Now: n.now})
	require.NoError(t, err)
	h := mxfed.NewKeyHandler(s)

	var raw json.RawMessage
	status, _ := keyGet(h, "https://one.example/_matrix/key/v2/server", &raw)
	require.Equal(t, 200, status)
	var d publishedKeys
	require.NoError(t, json.Unmarshal(raw, &d))
	require.Equal(t, mxfed.ServerName("one.example"), d.Name)
	require.Len(t, d.Verify, 1)
	require.Equal(t, base64.RawStdEncoding.EncodeToString(one.public("a")), d.Verify["ed25519:a"].Key)
	require.Len(t, d.Old, 2)
	require.Equal(t, base64.RawStdEncoding.EncodeToString(one.public("old")), d.Old["ed25519:old"].Key)
	require.Equal(t, retired.UnixMilli(), d.Old["ed25519:old"].Expired)
	require.Equal(t, int64(1<<53-1), d.Old["ed25519:older"].Expired, "a number that everyone can parse")
	require.Equal(t, n.now().Add(24*time.Hour).UnixMilli(), d.ValidUntil)
	require.Len(t, d.Signatures, 1)
	require.Len(t, d.Signatures["one.example"], 1)
	require.NoError(t, mxfed.VerifyJSON(raw, "one.example", "ed25519:a", one.public("a")))

	for url, name := range map[string]mxfed.ServerName{
		"https://one.example/_matrix/key/v2/server/":            "one.example",
		"https://one.example/_matrix/key/v2/server/ed25519:a":   "one.example",
		"https://one.example/_matrix/key/v2/server/ed25519%3Ax": "one.example",
		"https://one.example/_matrix/key/v2/server?x=y":         "one.example",
		"https://two.example:8448/_matrix/key/v2/server":        "two.example:8448",
		"https://two.example/_matrix/key/v2/server":             "one.example",
		"https://127.0.0.1:1/_matrix/key/v2/server":             "one.example",
	} {
		status, _ := keyGet(h, url, &d)
		require.Equal(t, 200, status, url)
		require.Equal(t, name, d.Name, url)
	}
	status, _ = keyGet(h, "https://two.example:8448/_matrix/key/v2/server", &raw)
	require.Equal(t, 200, status)
	require.NoError(t, mxfed.VerifyJSON(raw, "two.example:8448", "ed25519:b", two.public("b")))
	require.Contains(t, string(raw), `"old_verify_keys":{}`)
}

// A signing key may live far away, and anyone may ask; the answer is good for an hour at the least all the same.
func TestKeyHandler_SignsRarely(t *testing.T) {
	n := newKeyNet(t)
	key := &countingKey{PrivateKey: n.host("a.example").key("a")}
	signer, err := mxfed.NewSigner("a.example", "ed25519:a", key)
	require.NoError(t, err)
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: n, Now: n.now})
	require.NoError(t, err)
	h := mxfed.NewKeyHandler(s)
	for range 300 { // 25 hours
		var d publishedKeys
		status, _ := keyGet(h, "https://a.example/_matrix/key/v2/server", &d)
		require.Equal(t, 200, status)
		require.GreaterOrEqual(t, d.ValidUntil, n.now().Add(12*time.Hour).UnixMilli())
		n.pass(5 * time.Minute)
	}
	require.EqualValues(t, 3, key.signed.Load())
	n.pass(-30 * 24 * time.Hour) // the clock was wrong
	var d publishedKeys
	keyGet(h, "https://a.example/_matrix/key/v2/server", &d)
	require.Equal(t, n.now().Add(24*time.Hour).UnixMilli(), d.ValidUntil)
}

func TestKeyHandler_OtherPaths(t *testing.T) {
	n := newKeyNet(t)
	notary := n.notary("n.example")
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"POST", "/_matrix/key/v2/server", 405},
		{"PUT", "/_matrix/key/v2/server/ed25519:a", 405},
		{"HEAD", "/_matrix/key/v2/server", 405},
		{"GET", "/_matrix/key/v2/query", 405},
		{"GET", "/_matrix/key/v2/query/", 405},
		{"POST", "/_matrix/key/v2/query/a.example", 405},
		{"DELETE", "/_matrix/key/v2/query", 405},
		{"GET", "/_matrix/key/v2/server/a/b", 404},
		{"GET", "/_matrix/key/v2/servers", 404},
		{"GET", "/_matrix/key/v2/query/a.example/ed25519:a", 404},
		{"GET", "/_matrix/key/v2", 404},
		{"GET", "/_matrix/key/v1/server", 404},
		{"GET", "/", 404},
	} {
		s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{notary.signer("a")}, HTTP: n, Now: n.now})
		require.NoError(t, err)
		status, code := keyServe(mxfed.NewKeyHandler(s), httptest.NewRequest(c.method, "https://n.example"+c.path, nil), nil)
		require.Equal(t, c.status, status, "%s %s", c.method, c.path)
		require.Equal(t, mxfed.ErrUnrecognized, code, "%s %s", c.method, c.path)
	}
}

// Without a KeyRing there is nothing to pass on.
func TestKeyHandler_NoNotary(t *testing.T) {
	n := newKeyNet(t)
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{n.host("a.example").signer("a")}, Keys: mxfed.KeysFunc(nil)})
	require.NoError(t, err)
	h := mxfed.NewKeyHandler(s)
	status, code := keyPost(h, "https://a.example"+notaryPath, `{"server_keys":{}}`, nil)
	require.Equal(t, 404, status)
	require.Equal(t, mxfed.ErrUnrecognized, code)
	status, _ = keyGet(h, "https://a.example"+notaryPath+"/b.example", nil)
	require.Equal(t, 404, status)
	status, _ = keyGet(h, "https://a.example/_matrix/key/v2/server", nil)
	require.Equal(t, 200, status)
}

// keyServer is a notary's handler with two names.
func keyServer(n *keyNet) (http.Handler, *keyHost, *countingKey) {
	own := n.host("own.example")
	key := &countingKey{PrivateKey: own.key("a")}
	signer, err := mxfed.NewSigner("own.example", "ed25519:a", key)
	require.NoError(n, err)
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer, n.host("too.example").signer("a")}, HTTP: n, Now: n.now})
	require.NoError(n, err)
	return mxfed.NewKeyHandler(s), own, key
}

const queryURL = "https://own.example" + notaryPath

// https://spec.matrix.org/v1.19/server-server-api/#querying-keys-through-another-server
func TestNotary_Countersigns(t *testing.T) {
	n := newKeyNet(t)
	h, own, key := keyServer(n)
	a := n.host("a.example")
	for url, signer := range map[string]mxfed.ServerName{queryURL + "/a.example": "own.example",
		queryURL + "/a.example?minimum_valid_until_ts=0": "own.example", "https://too.example" + notaryPath + "/a%2Eexample": "too.example"} {
		var reply keyReply
		status, _ := keyGet(h, url, &reply)
		require.Equal(t, 200, status)
		require.Len(t, reply.Keys, 1)
		require.NoError(t, mxfed.VerifyJSON(reply.Keys[0], "a.example", "ed25519:a", a.public("a")), "the server's signature is kept")
		host := own
		if signer == "too.example" {
			host = n.handlers["too.example"].(*keyHost)
		}
		require.NoError(t, mxfed.VerifyJSON(reply.Keys[0], signer, "ed25519:a", host.public("a")))
	}
	require.Equal(t, 1, n.count("a.example"))
	require.EqualValues(t, 1, key.signed.Load(), "signed once for all who ask")

	n.host("b.example")
	var reply keyReply
	status, _ := keyPost(h, queryURL, `{"server_keys":{"a.example":{},"b.example":{"ed25519:a":{"minimum_valid_until_ts":5},"ed25519:x":{}},
		"gone.example":{},"own.example":{},"too.example":{"ed25519:a":{}}}}`, &reply)
	require.Equal(t, 200, status)
	names := map[mxfed.ServerName]bool{}
	for _, raw := range reply.Keys {
		var d publishedKeys
		require.NoError(t, json.Unmarshal(raw, &d))
		require.NotContains(t, names, d.Name)
		names[d.Name] = true
		require.NoError(t, mxfed.VerifyJSON(raw, "own.example", "ed25519:a", own.public("a")), d.Name)
		require.Contains(t, d.Signatures, d.Name)
	}
	require.Equal(t, map[mxfed.ServerName]bool{"a.example": true, "b.example": true, "own.example": true, "too.example": true}, names)
	require.Equal(t, 1, n.count("b.example"))
	require.EqualValues(t, 4, key.signed.Load(), "once for the own document")
	require.Zero(t, n.count("own.example")+n.count("too.example"), "own names are not asked")
}

func TestNotary_NothingToSay(t *testing.T) {
	n := newKeyNet(t)
	h, _, _ := keyServer(n)
	var raw json.RawMessage
	for _, ask := range []func() (int, mxfed.ErrorCode){
		func() (int, mxfed.ErrorCode) { return keyGet(h, queryURL+"/gone.example", &raw) },
		func() (int, mxfed.ErrorCode) { return keyPost(h, queryURL, `{"server_keys":{}}`, &raw) },
		func() (int, mxfed.ErrorCode) {
			return keyPost(h, queryURL, `{"server_keys":{"gone.example":{}}}`, &raw)
		},
	} {
		status, _ := ask()
		require.Equal(t, 200, status)
		require.JSONEq(t, `{"server_keys":[]}`, string(raw))
	}
}

func TestNotary_Refuses(t *testing.T) {
	n := newKeyNet(t)
	h, _, _ := keyServer(n)
	many := func(count int) string {
		var names []string
		for i := range count {
			names = append(names, fmt.Sprintf(`"s%d.example":{}`, i))
		}
		return `{"server_keys":{` + strings.Join(names, ",") + `}}`
	}
	for name, c := range map[string]struct {
		body   string
		status int
		code   mxfed.ErrorCode
	}{
		"nothing":          {``, 400, mxfed.ErrNotJSON},
		"no JSON":          {`{`, 400, mxfed.ErrNotJSON},
		"no object":        {`[]`, 400, mxfed.ErrBadJSON},
		"no server_keys":   {`{}`, 400, mxfed.ErrBadJSON},
		"an array":         {`{"server_keys":[]}`, 400, mxfed.ErrBadJSON},
		"server is null":   {`{"server_keys":{"a.example":null}}`, 400, mxfed.ErrBadJSON},
		"bad name":         {`{"server_keys":{"a.example/x":{}}}`, 400, mxfed.ErrInvalidParam},
		"empty name":       {`{"server_keys":{"":{}}}`, 400, mxfed.ErrInvalidParam},
		"too many servers": {many(1001), 413, mxfed.ErrTooLarge},
		"too large":        {`{"server_keys":{` + strings.Repeat(" ", 2<<20) + `}}`, 413, mxfed.ErrTooLarge},
	} {
		status, code := keyPost(h, queryURL, c.body, nil)
		require.Equal(t, c.status, status, name)
		require.Equal(t, c.code, code, name)
	}
	for _, path := range []string{"/a_b", "/a.example%2Fx", "/%00", "/a.example?minimum_valid_until_ts=soon", "/a.example?minimum_valid_until_ts=1;2",
		"/a.example?minimum_valid_until_ts=99999999999999999999"} {
		status, code := keyGet(h, queryURL+path, nil)
		require.Equal(t, 400, status, path)
		require.Equal(t, mxfed.ErrInvalidParam, code, path)
	}
	require.Empty(t, n.asked, "nobody was asked")

	status, _ := keyPost(h, queryURL, many(1000), nil)
	require.Equal(t, 200, status)
	require.Len(t, n.asked, 100, "one query makes us ask no more than so many")
}

// https://spec.matrix.org/v1.19/server-server-api/#querying-keys-through-another-server
func TestNotary_Remembers(t *testing.T) {
	n := newKeyNet(t)
	h, _, _ := keyServer(n)
	n.host("a.example")
	validUntil := func(query string) int64 {
		t.Helper()
		var reply keyReply
		status, _ := keyGet(h, queryURL+"/a.example"+query, &reply)
		require.Equal(t, 200, status)
		require.Len(t, reply.Keys, 1)
		var d publishedKeys
		require.NoError(t, json.Unmarshal(reply.Keys[0], &d))
		return d.ValidUntil
	}
	first := n.now().Add(24 * time.Hour).UnixMilli()
	require.Equal(t, first, validUntil(""))
	n.pass(12*time.Hour - time.Millisecond)
	require.Equal(t, first, validUntil(""))
	require.Equal(t, first, validUntil(fmt.Sprintf("?minimum_valid_until_ts=%d", first)))
	require.Equal(t, 1, n.count("a.example"))
	second := n.now().Add(24 * time.Hour).UnixMilli()
	require.Equal(t, second, validUntil(fmt.Sprintf("?minimum_valid_until_ts=%d", first+1)), "not valid for long enough")
	require.Equal(t, 2, n.count("a.example"))
	n.pass(12 * time.Hour)
	third := n.now().Add(24 * time.Hour).UnixMilli()
	require.Equal(t, third, validUntil("?minimum_valid_until_ts=0"), "half of its lifetime is over")
	require.Equal(t, 3, n.count("a.example"))

	n.serve("a.example", http.NotFoundHandler())
	n.pass(48 * time.Hour)
	for range 20 {
		require.Equal(t, third, validUntil(""), "the last known document, when the server is down")
	}
	require.Equal(t, 4, n.count("a.example"), "nobody can make us ask all the time")
}

// A key that the document lacks is worth asking for; a year's validity is not believed for half a year.
func TestNotary_AsksAgain(t *testing.T) {
	n := newKeyNet(t)
	h, _, _ := keyServer(n)
	a := n.host("a.example")
	a.validUntil = n.now().AddDate(1, 0, 0).UnixMilli()
	query := func(id string) (d publishedKeys) {
		t.Helper()
		var reply keyReply
		status, _ := keyPost(h, queryURL, `{"server_keys":{"a.example":{"`+id+`":{}}}}`, &reply)
		require.Equal(t, 200, status)
		require.Len(t, reply.Keys, 1)
		require.NoError(t, json.Unmarshal(reply.Keys[0], &d))
		return d
	}
	query("ed25519:a")
	n.pass(time.Minute)
	a.set(func() { a.current = []string{"b"}; a.old["a"] = n.now().UnixMilli() })
	query("ed25519:a")
	require.Equal(t, 1, n.count("a.example"))
	require.Contains(t, query("ed25519:b").Verify, mxfed.KeyID("ed25519:b"))
	require.Equal(t, 2, n.count("a.example"))
	query("ed25519:a")
	require.Equal(t, 2, n.count("a.example"), "an old key is listed too")
	n.pass(84 * time.Hour)
	query("ed25519:b")
	require.Equal(t, 3, n.count("a.example"))
	a.set(func() {
		a.edit = func(d map[string]any) { d["more"] = strings.Repeat("x", 17<<10) }
		a.validUntil++
	})
	n.pass(84 * time.Hour)
	require.Equal(t, a.validUntil-1, query("ed25519:b").ValidUntil)
	require.Equal(t, 4, n.count("a.example"), "what is too large to be kept is not passed on")
}
