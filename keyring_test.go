package mxfed_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

func TestKeyRing_Fetches(t *testing.T) {
	n := newKeyNet(t)
	a, b := n.host("a.example"), n.host("b.example")
	b.old["z"] = 1_600_000_000_000
	k := n.ring()
	keys := []mxfed.Key{{Server: "a.example", ID: "ed25519:a"}, {Server: "b.example", ID: "ed25519:z"},
		{Server: "b.example", ID: "ed25519:x"}, {Server: "b.example", ID: "ed25519:a", At: n.now()}, {Server: "A_B", ID: "ed25519:a"}, {Server: "a.example", ID: "rsa:a"}}
	require.NoError(t, k.Keys(t.Context(), keys))
	require.Equal(t, a.public("a"), keys[0].Public)
	require.True(t, keys[0].ValidUntil.Equal(n.now().Add(24*time.Hour)))
	require.Zero(t, keys[0].Expired)
	require.Equal(t, b.public("z"), keys[1].Public)
	require.True(t, keys[1].Expired.Equal(time.UnixMilli(1_600_000_000_000)))
	require.Nil(t, keys[2].Public)
	require.Equal(t, b.public("a"), keys[3].Public)
	require.Nil(t, keys[4].Public)
	require.Nil(t, keys[5].Public)
	require.NoError(t, k.Keys(t.Context(), keys[:2]))
	require.Equal(t, 1, n.count("a.example"), "memory knows")
	require.Equal(t, 1, n.count("b.example"), "one request for all keys of a server")
	require.NoError(t, k.Keys(t.Context(), nil))
}

func TestKeyRing_CapSevenDays(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	k := n.ring()
	const week = 7 * 24 * time.Hour
	for name, c := range map[string]struct{ validFor, want time.Duration }{
		"shorter": {week - time.Millisecond, week - time.Millisecond},
		"longer":  {week + time.Millisecond, week},
		"years":   {100 * 365 * 24 * time.Hour, week},
	} {
		h.validUntil = n.now().Add(c.validFor).UnixMilli()
		key, err := n.find(n.ring(), "a.example", "a", n.now())
		require.NoError(t, err, name)
		require.True(t, key.ValidUntil.Equal(n.now().Add(c.want)), name)
	}
	h.validUntil = n.now().AddDate(10, 0, 0).UnixMilli()
	_, err := n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	asked := n.count("a.example")
	n.pass(week)
	_, err = n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	require.Equal(t, asked, n.count("a.example"))
	n.pass(time.Millisecond)
	key, err := n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	require.Equal(t, asked+1, n.count("a.example"), "fetched anew before use")
	require.True(t, key.ValidUntil.Equal(n.now().Add(week)))
}

// keyRequest authenticates a request that h signs with the key id.
func keyRequest(h *keyHost, keys mxfed.Keys, id string) error {
	h.Helper()
	own := wireSigner(h, "own.example", "ed25519:1")
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{own}, Keys: keys, HTTP: h.keyNet, Now: h.now})
	require.NoError(h, err)
	r := httptest.NewRequest(http.MethodGet, "https://own.example/_matrix/federation/v1/event/x", nil)
	h.mu.Lock()
	signer := h.signer(id)
	h.mu.Unlock()
	require.NoError(h, signer.SignRequest(r, "own.example", nil))
	_, err = s.Authenticate(r)
	return err
}

func TestKey_RequestNeedsCurrentKey(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	k := n.ring()
	h.old["old"] = n.now().AddDate(1, 0, 0).UnixMilli()
	require.NoError(t, keyRequest(h, k, "a"))
	require.ErrorIs(t, keyRequest(h, k, "old"), mxfed.ErrUnauthorized)
	require.ErrorIs(t, keyRequest(h, k, "unknown"), mxfed.ErrUnauthorized)

	n.pass(24 * time.Hour) // valid to the millisecond
	require.NoError(t, keyRequest(h, k, "a"))
	n.pass(time.Millisecond)
	before := n.count("a.example")
	require.NoError(t, keyRequest(h, k, "a"), "still listed by a document that is fetched now")
	require.Equal(t, before+1, n.count("a.example"))

	n.pass(25 * time.Hour)
	h.set(func() { h.current = []string{"b"} })
	require.ErrorIs(t, keyRequest(h, k, "a"), mxfed.ErrUnauthorized, "no longer listed")
	require.NoError(t, keyRequest(h, k, "b"))

	n.pass(time.Hour)
	h.set(func() { h.current = []string{"c"} }) // b is withdrawn before its time
	require.NoError(t, keyRequest(h, k, "c"))
	require.ErrorIs(t, keyRequest(h, k, "b"), mxfed.ErrUnauthorized)

	n.pass(8 * 24 * time.Hour)
	h.set(func() { h.validUntil = n.now().UnixMilli() - 1 })
	require.ErrorIs(t, keyRequest(h, k, "c"), mxfed.ErrUnauthorized, "not even the newest document vouches for it")
}

// keyEvent returns an event of a user of h that the key id signed at the given time.
func keyEvent(h *keyHost, id string, version mxfed.RoomVersion, at time.Time) *mxfed.Event {
	h.Helper()
	h.mu.Lock()
	signer := h.signer(id)
	h.mu.Unlock()
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}, Now: func() time.Time { return at }})
	require.NoError(h, err)
	user := mxfed.UserID("@u:" + string(h.name))
	draft := &mxfed.Draft{Version: version, Type: "m.room.create", StateKey: new(string), Sender: user}
	content := map[string]any{"room_version": version}
	if version != "12" {
		draft.Room = mxfed.RoomID("!r:" + string(h.name))
		content["creator"] = user
	}
	draft.Content, err = json.Marshal(content)
	require.NoError(h, err)
	e, err := s.Build(h.Context(), draft)
	require.NoError(h, err)
	return e
}

func (h *keyHost) verify(k mxfed.Keys, e *mxfed.Event) error {
	own := wireSigner(h, "own.example", "ed25519:1")
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{own}, Keys: k, HTTP: h.keyNet, Now: h.now})
	require.NoError(h, err)
	return s.Verify(h.Context(), e)[0]
}

func TestKey_OldKeyOnlyBeforeExpired(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	expired := n.now().AddDate(-1, 0, 0)
	h.old["old"] = expired.UnixMilli()
	for _, version := range []mxfed.RoomVersion{"1", "4", "5", "10", "12"} {
		k := n.ring()
		require.NoError(t, h.verify(k, keyEvent(h, "old", version, expired)), version)
		require.Error(t, h.verify(k, keyEvent(h, "old", version, expired.Add(time.Millisecond))), version)
		require.NoError(t, h.verify(k, keyEvent(h, "a", version, expired.Add(time.Millisecond))), version)
	}
}

// Events of the future are fetched for, and believed for seven days.
func TestKey_CapSevenDays(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	h.validUntil = n.now().AddDate(1, 0, 0).UnixMilli()
	k := n.ring()
	require.NoError(t, h.verify(k, keyEvent(h, "a", "10", n.now().AddDate(0, 0, 7))))
	require.Error(t, h.verify(k, keyEvent(h, "a", "10", n.now().AddDate(0, 0, 7).Add(time.Millisecond))))
	require.NoError(t, h.verify(k, keyEvent(h, "a", "4", n.now().AddDate(0, 0, 8))), "of no importance in version 4")
}

// Whoever delivers it: a key that everybody has is no key.
func TestKeyRing_DenyList(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	leaked, err := base64.RawStdEncoding.DecodeString("l/O9hxMVKB6Lg+3Hqf0FQQZhVESQcMzbPN1Cz2nM3og")
	require.NoError(t, err)
	delivered := mxfed.KeysFunc(func(_ context.Context, keys []mxfed.Key) error {
		for i := range keys {
			keys[i].Public, keys[i].ValidUntil = leaked, n.now().Add(time.Hour)
		}
		return nil
	})
	err = keyRequest(h, delivered, "a")
	require.ErrorIs(t, err, mxfed.ErrUnauthorized)
	require.ErrorContains(t, err, "no key")
}

func TestKey_SameIDNewKey(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	store := &keyStore{rows: map[string]mxfed.Key{}}
	k := n.ring()
	k.Store = store
	first := h.public("a")
	require.NoError(t, keyRequest(h, k, "a"))
	h.set(func() { h.keys["a"] = h.key("another") })
	n.pass(25 * time.Hour)
	require.ErrorIs(t, keyRequest(h, k, "a"), mxfed.ErrUnauthorized)
	key, err := n.find(k, "a.example", "a", time.Time{})
	require.NoError(t, err)
	require.Equal(t, first, key.Public)

	restarted := n.ring() // finds out about a before it is asked for it
	restarted.Store = store
	h.set(func() { h.current = []string{"a", "b"} })
	require.NoError(t, keyRequest(h, restarted, "b"))
	key, err = n.find(restarted, "a.example", "a", time.Time{})
	require.NoError(t, err)
	require.Equal(t, first, key.Public, "the Store remembers who was first")
	require.ErrorIs(t, keyRequest(h, restarted, "a"), mxfed.ErrUnauthorized)
}

// keyStore is a KeyStore of a map.
type keyStore struct {
	mu           sync.Mutex
	rows         map[string]mxfed.Key
	asked        int   // calls
	saved        []int // keys by call
	err, saveErr error
}

func (s *keyStore) Keys(_ context.Context, keys []mxfed.Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	for i := range keys {
		if row, ok := s.rows[string(keys[i].Server)+" "+string(keys[i].ID)]; ok && s.err == nil {
			keys[i].Public, keys[i].ValidUntil, keys[i].Expired = row.Public, row.ValidUntil, row.Expired
		}
	}
	return s.err
}

func (s *keyStore) SaveKeys(_ context.Context, keys []mxfed.Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.saved = append(s.saved, len(keys))
	seen := map[string]bool{}
	for _, k := range keys {
		name := string(k.Server) + " " + string(k.ID)
		if seen[name] || k.Public == nil {
			return errors.New("row is given twice, or has no key")
		}
		seen[name] = true
		row, ok := s.rows[name]
		if ok && !row.Public.Equal(k.Public) {
			continue
		}
		if k.ValidUntil.After(row.ValidUntil) {
			row.ValidUntil = k.ValidUntil
		}
		if k.Expired.After(row.Expired) {
			row.Expired = k.Expired
		}
		row.Public = k.Public
		s.rows[name] = row
	}
	return s.saveErr
}

func TestKeyStore_Restart(t *testing.T) {
	n := newKeyNet(t)
	store := &keyStore{rows: map[string]mxfed.Key{}}
	var keys []mxfed.Key
	for i := range 20 {
		h := n.host(mxfed.ServerName(fmt.Sprintf("s%d.example", i)))
		h.old["old"] = 5
		keys = append(keys, mxfed.Key{Server: h.name, ID: "ed25519:a", At: n.now()}, mxfed.Key{Server: h.name, ID: "ed25519:old"})
	}
	ask := func(k *mxfed.KeyRing) []mxfed.Key {
		got := append([]mxfed.Key(nil), keys...)
		require.NoError(t, k.Keys(t.Context(), got))
		return got
	}
	k := n.ring()
	k.Store = store
	want := ask(k)
	require.NotNil(t, want[39].Public)
	require.Equal(t, want, ask(k))
	require.Equal(t, 1, store.asked, "one call for all, none for what is in memory")
	require.Equal(t, []int{40}, store.saved, "one call for all")

	restarted := n.ring()
	restarted.Store = store
	require.Equal(t, want, ask(restarted))
	require.Equal(t, want, ask(restarted))
	require.Equal(t, 2, store.asked)
	require.Equal(t, 1, n.count("s0.example"))
	require.Len(t, store.saved, 1)

	n.pass(25 * time.Hour)
	keys[0].At = n.now()
	got := ask(restarted)
	require.Equal(t, 2, n.count("s0.example"), "refetched when it is too old")
	require.True(t, got[0].ValidUntil.Equal(n.now().Add(24*time.Hour)))
	require.Equal(t, 1, n.count("s1.example"))
}

// A key that its server withdrew stays withdrawn over a restart.
func TestKeyStore_WithdrawnKey(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	h.current = []string{"a", "b"}
	k := n.ring()
	k.Store = &keyStore{rows: map[string]mxfed.Key{}}
	require.NoError(t, keyRequest(h, k, "a"))
	n.pass(time.Hour)
	h.set(func() { h.current = []string{"a", "c"} })
	require.NoError(t, keyRequest(h, k, "c"))
	n.pass(time.Hour)
	restarted := n.ring()
	restarted.Store = k.Store
	require.ErrorIs(t, keyRequest(h, restarted, "b"), mxfed.ErrUnauthorized)
	n.pass(time.Hour)
	h.set(func() { h.current = []string{"a", "b", "c"} })
	require.NoError(t, keyRequest(h, restarted, "b"), "until it is listed again")
}

// The Store's failures are told, and keys found nevertheless.
func TestKeyStore_Fails(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	broken := errors.New("disk on fire")
	for name, store := range map[string]*keyStore{
		"reading": {rows: map[string]mxfed.Key{}, err: broken},
		"writing": {rows: map[string]mxfed.Key{}, saveErr: broken},
	} {
		k := n.ring()
		k.Store = store
		key, err := n.find(k, "a.example", "a", n.now())
		require.ErrorIs(t, err, broken, name)
		require.Equal(t, h.public("a"), key.Public, name)
		require.NoError(t, keyRequest(h, k, "a"), name)
	}
}

func TestKey_FiveThousandKeyIDs(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	store := &keyStore{rows: map[string]mxfed.Key{}}
	k := n.ring()
	k.Store = store
	all := make([]mxfed.Key, 5000)
	for i := range all {
		all[i] = mxfed.Key{Server: "a.example", ID: mxfed.KeyID(fmt.Sprintf("ed25519:%d", i)), At: n.now()}
	}
	require.NoError(t, k.Keys(t.Context(), all), "in one call")
	for i := range all {
		require.NoError(t, k.Keys(t.Context(), all[i:i+1]), "one after the other")
		require.Nil(t, all[i].Public)
	}
	require.Equal(t, 1, n.count("a.example"))

	h.edit = func(d map[string]any) { // a server that has them all
		for i := range 5000 {
			id := fmt.Sprintf("%d", i)
			d["old_verify_keys"].(map[string]any)["ed25519:"+id] = map[string]any{"expired_ts": 1700000000000 + i,
				"key": base64.RawStdEncoding.EncodeToString(h.key("a").Public().(ed25519.PublicKey))}
		}
	}
	n.pass(time.Hour)
	key, err := n.find(k, "a.example", "4999", time.Time{})
	require.NoError(t, err)
	require.NotNil(t, key.Public)
	require.Equal(t, 2, n.count("a.example"))
	for _, rows := range store.saved {
		require.LessOrEqual(t, rows, 32)
	}
	_, err = n.find(k, "a.example", "4999", time.Time{})
	require.NoError(t, err)
	require.Equal(t, 2, n.count("a.example"))
}

// Whoever asks for keys that do not exist, or of servers that are down, cannot make us ask others all the time.
func TestKeyRing_LeavesServersInPeace(t *testing.T) {
	n := newKeyNet(t)
	n.host("a.example")
	n.serve("b.example", http.NotFoundHandler())
	k := n.ring()
	for _, name := range []mxfed.ServerName{"a.example", "b.example"} {
		var pauses []time.Duration
		last := n.now()
		for count := n.count(name); len(pauses) < 9; n.pass(5 * time.Second) {
			key, err := n.find(k, name, "unknown", time.Time{})
			require.Nil(t, key.Public)
			require.Equal(t, name == "b.example", err != nil, "a failure is told, also when it is remembered: %v", err)
			if n.count(name) > count {
				count = n.count(name)
				pauses, last = append(pauses, n.now().Sub(last)), n.now()
			}
		}
		const m = time.Minute
		require.Equal(t, []time.Duration{0, m / 2, m, 2 * m, 4 * m, 8 * m, 10 * m, 10 * m, 10 * m}, pauses, name)
	}
	key, err := n.find(k, "a.example", "a", n.now().AddDate(0, 0, -1))
	require.NoError(t, err)
	require.NotNil(t, key.Public, "what is known is known")
	for range 2 {
		key, err = n.find(k, "a.example", "a", n.now().AddDate(1, 0, 0))
		require.NoError(t, err)
		require.NotNil(t, key.Public, "whatever the moment asked for")
	}
	require.Equal(t, 10, n.count("a.example"))
}

// A server that answers is asked again soon after it was of use.
func TestKeyRing_FindsNewKeys(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	k := n.ring()
	require.NoError(t, keyRequest(h, k, "a"))
	for i := range 5 {
		id := fmt.Sprintf("k%d", i)
		h.set(func() { h.current = []string{id} })
		n.pass(30 * time.Second)
		require.NoError(t, keyRequest(h, k, id))
	}
}

func TestKey_OneFetchForManyWaiters(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	arrived, release := make(chan struct{}), make(chan struct{})
	h.before = func(*http.Request) { close(arrived); <-release }
	k := n.ring()
	type answer struct {
		key mxfed.Key
		err error
	}
	ask := func(ctx context.Context, out chan<- answer) {
		keys := []mxfed.Key{{Server: "a.example", ID: "ed25519:a"}}
		err := k.Keys(ctx, keys)
		out <- answer{keys[0], err}
	}
	first, many := make(chan answer, 1), make(chan answer, 50)
	ctx, cancel := context.WithCancel(t.Context())
	go ask(ctx, first)
	<-arrived
	for range cap(many) {
		go ask(t.Context(), many)
	}
	gone, leave := context.WithCancel(t.Context())
	left := make(chan answer, 1)
	go ask(gone, left)
	time.Sleep(50 * time.Millisecond) // for most of them to join; the others find it in memory
	leave()
	require.ErrorIs(t, (<-left).err, context.Canceled, "its own wait only")
	cancel()
	require.ErrorIs(t, (<-first).err, context.Canceled, "who started it may leave too")
	close(release)
	for range cap(many) {
		got := <-many
		require.NoError(t, got.err)
		require.Equal(t, h.public("a"), got.key.Public)
	}
	require.Equal(t, 1, n.count("a.example"))
}

// When nobody waits any more, nothing goes on; that somebody left does not keep others from asking.
func TestKeyRing_LastWaiterEndsTheFetch(t *testing.T) {
	n := newKeyNet(t)
	h := n.host("a.example")
	arrived, ended := make(chan struct{}), make(chan struct{})
	h.before = func(r *http.Request) {
		if n.count("a.example") == 1 {
			close(arrived)
			<-r.Context().Done()
			close(ended)
		}
	}
	k := n.ring()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	err := k.Keys(ctx, []mxfed.Key{{Server: "a.example", ID: "ed25519:a"}})
	require.ErrorIs(t, err, context.Canceled)
	<-ended
	key, err := n.find(k, "a.example", "a", n.now())
	require.NoError(t, err)
	require.NotNil(t, key.Public)

	err = k.Keys(ctx, []mxfed.Key{{Server: "b.example", ID: "ed25519:a"}})
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, n.count("b.example"))
}

// deadlines notes the deadline of every request.
type deadlines struct {
	*keyNet
	mu   sync.Mutex
	seen []time.Time
}

func (d *deadlines) RoundTrip(q *http.Request) (*http.Response, error) {
	at, _ := q.Context().Deadline()
	d.mu.Lock()
	d.seen = append(d.seen, at)
	d.mu.Unlock()
	return d.keyNet.RoundTrip(q)
}

func TestKey_DeadServersShareOneDeadline(t *testing.T) {
	n := newKeyNet(t)
	var keys []mxfed.Key
	for i := range 100 {
		name := mxfed.ServerName(fmt.Sprintf("dead%d.example", i))
		n.kill(name)
		keys = append(keys, mxfed.Key{Server: name, ID: "ed25519:a"})
	}
	n.host("a.example")
	keys = append(keys, mxfed.Key{Server: "a.example", ID: "ed25519:a"})
	transport := &deadlines{keyNet: n}
	k := n.ring()
	k.HTTP = transport
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for n.deadConns.Load() < 100 || n.count("a.example") == 0 { // all at the same time
			time.Sleep(time.Millisecond)
		}
		key := []mxfed.Key{{Server: "a.example", ID: "ed25519:a"}}
		if k.Keys(t.Context(), key) != nil || key[0].Public == nil {
			t.Error("who needs a living server waits for the dead ones")
		}
		cancel()
	}()
	start := time.Now()
	err := k.Keys(ctx, keys)
	require.ErrorIs(t, err, context.Canceled)
	require.NotNil(t, keys[100].Public, "what was found is filled in")
	require.Len(t, transport.seen, 101)
	for _, at := range transport.seen {
		require.Equal(t, transport.seen[0], at, "one deadline for all")
	}
	require.False(t, transport.seen[0].Before(start.Add(10*time.Second)))
	require.False(t, transport.seen[0].After(time.Now().Add(10*time.Second)))
}

// Keys of many failing servers: the error stays readable.
func TestKeyRing_ManyErrors(t *testing.T) {
	n := newKeyNet(t)
	var keys []mxfed.Key
	for i := range 40 {
		keys = append(keys, mxfed.Key{Server: mxfed.ServerName(fmt.Sprintf("s%d.example", i)), ID: "ed25519:a"})
	}
	err := n.ring().Keys(t.Context(), keys)
	require.ErrorContains(t, err, "and 32 more")
	var e *mxfed.Error
	require.ErrorAs(t, err, &e)
}
