package mxfed_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// keyNet is a small internet on loopback: servers by name behind one TLS listener, a second listener that accepts
// connections and never says a word, and a clock.
type keyNet struct {
	*testing.T
	*http.Transport // the way to them

	mu       sync.Mutex
	clock    time.Time
	handlers map[string]http.Handler
	dead     map[string]bool
	certs    map[string]*tls.Certificate
	asked    map[string]int // requests by server and path

	deadConns atomic.Int64
}

func newKeyNet(t *testing.T) *keyNet {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	n := &keyNet{T: t, clock: time.UnixMilli(1_700_000_000_000), handlers: map[string]http.Handler{}, dead: map[string]bool{},
		certs: map[string]*tls.Certificate{}, asked: map[string]int{}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	n.certs[""] = &tls.Certificate{PrivateKey: key, Leaf: ca}
	root := n.certificate("root", ca)
	roots := x509.NewCertPool()
	roots.AddCert(root.Leaf)
	n.certs[""].Leaf = root.Leaf

	server := httptest.NewUnstartedServer(n)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.certs[h.ServerName] == nil {
			n.certs[h.ServerName] = n.certificate(h.ServerName, nil)
		}
		return n.certs[h.ServerName], nil
	}}
	server.StartTLS()
	t.Cleanup(server.Close)
	silent := n.listenSilently()
	n.Transport = &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			name, _, _ := net.SplitHostPort(address)
			n.mu.Lock()
			target := server.Listener.Addr().String()
			if n.dead[name] {
				target = silent
			}
			n.mu.Unlock()
			return new(net.Dialer).DialContext(ctx, network, target)
		},
	}
	t.Cleanup(n.CloseIdleConnections)
	return n
}

// certificate is signed by the root, which template describes if it is the one to be made.
func (n *keyNet) certificate(name string, template *x509.Certificate) *tls.Certificate {
	root := n.certs[""]
	if template == nil {
		template = &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{name}}
	}
	key := root.PrivateKey.(*ecdsa.PrivateKey)
	der, err := x509.CreateCertificate(rand.Reader, template, root.Leaf, key.Public(), key)
	require.NoError(n, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(n, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// listenSilently returns the address of a listener that never answers.
func (n *keyNet) listenSilently() string {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(n, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := silent.Accept()
			if err != nil {
				return
			}
			n.deadConns.Add(1)
			defer conn.Close()
		}
	}()
	n.Cleanup(func() { silent.Close(); <-done })
	return silent.Addr().String()
}

func (n *keyNet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	n.asked[r.Host+r.URL.Path]++
	h := n.handlers[r.Host]
	n.mu.Unlock()
	if h == nil {
		http.NotFound(w, r)
		return
	}
	h.ServeHTTP(w, r)
}

func (n *keyNet) serve(name mxfed.ServerName, h http.Handler) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.handlers[string(name)] = h
}

func (n *keyNet) kill(names ...mxfed.ServerName) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, name := range names {
		n.dead[string(name)] = true
	}
}

// count is how often a server was asked for its keys.
func (n *keyNet) count(name mxfed.ServerName) int { return n.requests(name, "/_matrix/key/v2/server") }

func (n *keyNet) requests(name mxfed.ServerName, path string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked[string(name)+path]
}

func (n *keyNet) now() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.clock
}

func (n *keyNet) pass(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.clock = n.clock.Add(d)
}

// ring returns a KeyRing on this internet.
func (n *keyNet) ring(notaries ...mxfed.ServerName) *mxfed.KeyRing {
	return &mxfed.KeyRing{HTTP: n, Now: n.now, Notaries: notaries}
}

// host is a server of this internet that publishes keys.
type keyHost struct {
	*keyNet
	mu         sync.Mutex
	name       mxfed.ServerName
	current    []string         // key IDs without the algorithm; each stands for a key of its own
	old        map[string]int64 // with expired_ts
	keys       map[string]ed25519.PrivateKey
	validUntil int64 // 0: in a day
	edit       func(document map[string]any)
	text       func() []byte // instead of all this
	before     func(r *http.Request)
}

// host starts a server with one key, a.
func (n *keyNet) host(name mxfed.ServerName) *keyHost {
	h := &keyHost{keyNet: n, name: name, current: []string{"a"}, old: map[string]int64{}, keys: map[string]ed25519.PrivateKey{}}
	n.serve(name, h)
	return h
}

// set changes what the host publishes.
func (h *keyHost) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
}

// key is the private key of an ID, different for every host and ID.
func (h *keyHost) key(id string) ed25519.PrivateKey {
	if h.keys[id] == nil {
		seed := make([]byte, ed25519.SeedSize)
		copy(seed, id+"/"+string(h.name))
		h.keys[id] = ed25519.NewKeyFromSeed(seed)
	}
	return h.keys[id]
}

func (h *keyHost) public(id string) ed25519.PublicKey {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.key(id).Public().(ed25519.PublicKey)
}

func (h *keyHost) signer(id string) *mxfed.Signer {
	s, err := mxfed.NewSigner(h.name, mxfed.KeyID("ed25519:"+id), h.key(id))
	require.NoError(h, err)
	return s
}

// document is what the host publishes now.
func (h *keyHost) document() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.text != nil {
		return h.text()
	}
	verify, old := map[string]any{}, map[string]any{}
	encode := func(id string) string {
		return base64.RawStdEncoding.EncodeToString(h.key(id).Public().(ed25519.PublicKey))
	}
	for _, id := range h.current {
		verify["ed25519:"+id] = map[string]any{"key": encode(id)}
	}
	for id, ts := range h.old {
		old["ed25519:"+id] = map[string]any{"key": encode(id), "expired_ts": ts}
	}
	validUntil := h.validUntil
	if validUntil == 0 {
		validUntil = h.now().Add(24 * time.Hour).UnixMilli()
	}
	d := map[string]any{"server_name": h.name, "verify_keys": verify, "old_verify_keys": old, "valid_until_ts": validUntil}
	if h.edit != nil {
		h.edit(d)
	}
	text, err := json.Marshal(d)
	require.NoError(h, err)
	for _, id := range h.current {
		text, err = h.signer(id).SignJSON(text)
		require.NoError(h, err)
	}
	return text
}

func (h *keyHost) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.before != nil {
		h.before(r)
	}
	if r.URL.Path != "/_matrix/key/v2/server" {
		http.NotFound(w, r)
		return
	}
	w.Write(h.document())
}

// find asks k for one key.
func (n *keyNet) find(k mxfed.Keys, server mxfed.ServerName, id string, at time.Time) (mxfed.Key, error) {
	n.Helper()
	keys := []mxfed.Key{{Server: server, ID: mxfed.KeyID("ed25519:" + id), At: at}}
	err := k.Keys(n.Context(), keys)
	require.Equal(n, server, keys[0].Server)
	require.Equal(n, mxfed.KeyID("ed25519:"+id), keys[0].ID)
	require.Equal(n, at, keys[0].At)
	return keys[0], err
}

// What is wrong with a document makes it worth nothing.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server
func TestKey_SelfSignature(t *testing.T) {
	other := func(h *keyHost, text []byte, id string) []byte { // signed by a key that is not listed
		signed, err := h.signer(id).SignJSON(text)
		require.NoError(t, err)
		return signed
	}
	signatures := func(text []byte, change func(own map[string]any)) []byte {
		var d map[string]any
		require.NoError(t, json.Unmarshal(text, &d))
		change(d["signatures"].(map[string]any)["a.example"].(map[string]any))
		text, err := json.Marshal(d)
		require.NoError(t, err)
		return text
	}
	wrong := base64.RawStdEncoding.EncodeToString(make([]byte, 64))
	for name, c := range map[string]struct {
		prepare func(h *keyHost)
		tamper  func(h *keyHost, text []byte) []byte
		good    bool
	}{
		"signed":                {good: true},
		"two keys, both signed": {prepare: func(h *keyHost) { h.current = []string{"a", "b"} }, good: true},
		"two keys, one signed": {prepare: func(h *keyHost) { h.current = []string{"a", "b"} }, good: true,
			tamper: func(_ *keyHost, text []byte) []byte {
				return signatures(text, func(own map[string]any) { delete(own, "ed25519:b") })
			}},
		"two keys, one signed wrongly": {prepare: func(h *keyHost) { h.current = []string{"a", "b"} },
			tamper: func(_ *keyHost, text []byte) []byte {
				return signatures(text, func(own map[string]any) { own["ed25519:b"] = wrong })
			}},
		"old key signed wrongly": {prepare: func(h *keyHost) { h.old["b"] = 1 },
			tamper: func(_ *keyHost, text []byte) []byte {
				return signatures(text, func(own map[string]any) { own["ed25519:b"] = wrong })
			}},
		"old key signed as well": {prepare: func(h *keyHost) { h.old["b"] = 1 }, good: true,
			tamper: func(h *keyHost, text []byte) []byte { return other(h, text, "b") }},
		"only an old key signed": {prepare: func(h *keyHost) { h.old["b"] = 1 },
			tamper: func(h *keyHost, text []byte) []byte {
				return signatures(other(h, text, "b"), func(own map[string]any) { delete(own, "ed25519:a") })
			}},
		"unlisted key signed wrongly": {good: true, tamper: func(_ *keyHost, text []byte) []byte {
			return signatures(text, func(own map[string]any) { own["ed25519:x"] = wrong; own["rsa:a"] = 1 })
		}},
		"only an unlisted key signed": {tamper: func(h *keyHost, text []byte) []byte {
			return signatures(other(h, text, "x"), func(own map[string]any) { delete(own, "ed25519:a") })
		}},
		"unsigned": {tamper: func(_ *keyHost, text []byte) []byte {
			return signatures(text, func(own map[string]any) { clear(own) })
		}},
		"signature is no string": {tamper: func(_ *keyHost, text []byte) []byte {
			return signatures(text, func(own map[string]any) { own["ed25519:a"] = 1 })
		}},
		"signature of other text": {tamper: func(_ *keyHost, text []byte) []byte {
			return []byte(strings.Replace(string(text), `"old_verify_keys":{}`, `"old_verify_keys":{},"more":1`, 1))
		}},
		"another server signed wrongly": {good: true, tamper: func(_ *keyHost, text []byte) []byte {
			return []byte(strings.Replace(string(text), `"signatures":{`, `"signatures":{"z.example":{"ed25519:a":"AAAA"},`, 1))
		}},
		"too many signatures": {
			prepare: func(h *keyHost) {
				for i := range 70 {
					h.current = append(h.current, fmt.Sprintf("k%d", i))
				}
			}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newKeyNet(t)
			h := n.host("a.example")
			if c.prepare != nil {
				c.prepare(h)
			}
			text := h.document()
			if c.tamper != nil {
				text = c.tamper(h, text)
			}
			h.text = func() []byte { return text }
			key, err := n.find(n.ring(), "a.example", "a", n.now())
			if !c.good {
				require.Error(t, err)
				require.Nil(t, key.Public)
				return
			}
			require.NoError(t, err)
			require.Equal(t, h.public("a"), key.Public)
		})
	}
}

func TestKey_WrongServerName(t *testing.T) {
	n := newKeyNet(t)
	a, b := n.host("a.example"), n.host("b.example")
	b.text = a.document // signed properly, by another server
	key, err := n.find(n.ring(), "b.example", "a", time.Time{})
	require.ErrorContains(t, err, "b.example")
	require.Nil(t, key.Public)
	for name, server := range map[string]any{"case": "A.example", "port": "a.example:8448", "no string": 1, "null": nil} {
		a.edit = func(d map[string]any) { d["server_name"] = server }
		key, err = n.find(n.ring(), "a.example", "a", time.Time{})
		require.Error(t, err, name)
		require.Nil(t, key.Public, name)
	}
}

func TestKeyRing_MalformedDocuments(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	for name, edit := range map[string]func(d map[string]any){
		"valid_until_ts missing":     func(d map[string]any) { delete(d, "valid_until_ts") },
		"valid_until_ts a string":    func(d map[string]any) { d["valid_until_ts"] = "1800000000000" },
		"verify_keys missing":        func(d map[string]any) { delete(d, "verify_keys") },
		"verify_keys an array":       func(d map[string]any) { d["verify_keys"] = []any{} },
		"verify_keys of other shape": func(d map[string]any) { d["verify_keys"] = map[string]any{"ed25519:a": "key"} },
		"too large":                  func(d map[string]any) { d["padding"] = strings.Repeat("x", 512<<10) },
	} {
		h.edit = edit
		key, err := n.find(n.ring(), "a.example", "a", time.Time{})
		require.Error(t, err, name)
		require.Nil(t, key.Public, name)
	}
	h.edit = func(d map[string]any) { delete(d, "old_verify_keys"); d["more"] = strings.Repeat("x", 500<<10) }
	_, err := n.find(n.ring(), "a.example", "a", time.Time{})
	require.NoError(t, err)
	h.edit = nil
	good := h.document()
	for name, text := range map[string]string{
		"nothing":        "",
		"no JSON":        "<html>",
		"no object":      "[" + string(good) + "]",
		"trailing":       string(good) + "{}",
		"too large":      string(good) + strings.Repeat(" ", 512<<10),
		"duplicate keys": strings.Replace(string(good), `{`, `{"server_name":"a.example",`, 1),
		"fraction":       strings.Replace(string(good), `"valid_until_ts":1`, `"valid_until_ts":1.1`, 1),
	} {
		h.text = func() []byte { return []byte(text) }
		key, err := n.find(n.ring(), "a.example", "a", time.Time{})
		require.Error(t, err, name)
		require.Nil(t, key.Public, name)
	}
}

func TestKeyRing_OtherStatus(t *testing.T) {
	n := newKeyNet(t)
	b := n.host("b.example")
	for _, status := range []int{301, 302, 307, 308, 400, 404, 500, 503, 204, 201} {
		n.serve("a.example", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://b.example/_matrix/key/v2/server")
			w.WriteHeader(status)
			if status != 204 {
				w.Write(b.document())
			}
		}))
		_, err := n.find(n.ring(), "a.example", "a", time.Time{})
		var e *mxfed.Error
		require.ErrorAs(t, err, &e, "%d", status)
		require.Equal(t, mxfed.ServerName("a.example"), e.Server)
		require.Equal(t, status, e.Status)
	}
	require.Zero(t, n.count("b.example"), "redirects are not followed")
}

func TestKeyRing_UnusableKeysAreSkipped(t *testing.T) {
	for name, key := range map[string]string{
		"short":       "AAAA",
		"text":        "VGhpcyBzaG91bGQgYmUgYSByZWFsIGVkMjU1MTkgcGF5bG9hZA",
		"small order": base64.RawStdEncoding.EncodeToString(append([]byte{1}, make([]byte, 31)...)),
		"leaked":      "l/O9hxMVKB6Lg+3Hqf0FQQZhVESQcMzbPN1Cz2nM3og",
		"no base64":   "!",
		"empty":       "",
	} {
		n := newKeyNet(t)
		h := n.host("a.example")
		h.edit = func(d map[string]any) {
			d["verify_keys"].(map[string]any)["ed25519:bad"] = map[string]any{"key": key}
			d["old_verify_keys"].(map[string]any)["ed25519:worse"] = map[string]any{"key": key, "expired_ts": 1}
			d["old_verify_keys"].(map[string]any)["ed25519:endless"] = map[string]any{"key": strings.Repeat("a", 43)}
		}
		k := n.ring()
		for _, id := range []string{"bad", "worse", "endless"} {
			found, err := n.find(k, "a.example", id, time.Time{})
			require.NoError(t, err, name)
			require.Nil(t, found.Public, name)
		}
		found, err := n.find(k, "a.example", "a", time.Time{})
		require.NoError(t, err, name)
		require.NotNil(t, found.Public, name)
	}
}

// Base64 of both alphabets and key IDs of any form are read.
func TestKeyRing_Tolerates(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	h.current = []string{"a"}
	public := h.public("b-c.d e")
	h.edit = func(d map[string]any) {
		d["verify_keys"].(map[string]any)["ed25519:b-c.d e"] = map[string]any{"key": base64.URLEncoding.EncodeToString(public)}
	}
	key, err := n.find(n.ring(), "a.example", "b-c.d e", time.Time{})
	require.NoError(t, err)
	require.Equal(t, public, key.Public)
}
