package mxfed

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// keyringNow is when the tests of keys take place.
var keyringNow = millis(1_700_000_000_000)

// keyringKey returns a key pair that depends on its name only.
func keyringKey(name string) (ed25519.PublicKey, ed25519.PrivateKey) {
	seed := make([]byte, ed25519.SeedSize)
	copy(seed, name)
	key := ed25519.NewKeyFromSeed(seed)
	return key.Public().(ed25519.PublicKey), key
}

// https://spec.matrix.org/v1.19/rooms/v5/#signing-key-validity-period
func TestKey_Validity(t *testing.T) {
	var file struct {
		Vectors []struct {
			Name, Use  string
			Version    int    `json:"room_version"`
			ValidUntil *int64 `json:"valid_until_ts"`
			Expired    *int64 `json:"expired_ts"`
			Now, At    int64
			Usable     bool
		}
	}
	loadCoreVectors(t, "derived_key_validity.json", &file)
	require.Len(t, file.Vectors, 13)
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			var key Key
			key.Public, _ = keyringKey("a")
			if v.ValidUntil != nil {
				key.ValidUntil = millis(*v.ValidUntil)
			}
			if v.Expired != nil {
				key.Expired = millis(*v.Expired)
			}
			if v.Use == "request" {
				require.Equal(t, v.Usable, key.forRequest(millis(v.Now)))
				return
			}
			rules := RoomVersion(strconv.Itoa(v.Version)).rules()
			require.NotNil(t, rules)
			require.Equal(t, v.Usable, key.forEvent(rules, v.At, millis(v.Now)))
		})
	}
}

func TestKey_ValidityOfEveryRoomVersion(t *testing.T) {
	public, _ := keyringKey("a")
	ts := keyringNow.UnixMilli()
	for _, rules := range stableVersions {
		bound := rules.version != "1" && rules.version != "2" && rules.version != "3" && rules.version != "4"
		valid := Key{Public: public, ValidUntil: keyringNow}
		require.True(t, valid.forEvent(rules, ts, keyringNow), rules.version)
		require.Equal(t, !bound, valid.forEvent(rules, ts+1, keyringNow), rules.version)
		week := maxKeyValidity.Milliseconds()
		long := Key{Public: public, ValidUntil: keyringNow.AddDate(1, 0, 0)}
		require.True(t, long.forEvent(rules, ts+week, keyringNow), rules.version)
		require.Equal(t, !bound, long.forEvent(rules, ts+week+1, keyringNow), rules.version)
		old := Key{Public: public, ValidUntil: keyringNow.AddDate(1, 0, 0), Expired: keyringNow}
		require.True(t, old.forEvent(rules, ts, keyringNow), rules.version)
		require.False(t, old.forEvent(rules, ts+1, keyringNow), rules.version)
		require.False(t, (&Key{ValidUntil: keyringNow}).forEvent(rules, ts, keyringNow), rules.version)
	}
}

// A fraction of a millisecond on this server's clock does not make a key invalid.
func TestKey_RequestToTheMillisecond(t *testing.T) {
	key := Key{ValidUntil: keyringNow}
	key.Public, _ = keyringKey("a")
	require.True(t, key.forRequest(keyringNow.Add(time.Millisecond-1)))
	require.False(t, key.forRequest(keyringNow.Add(time.Millisecond)))
	key.Expired = keyringNow.AddDate(1, 0, 0)
	require.False(t, key.forRequest(keyringNow))
}

func keyringNeverUsable(t *testing.T, public []byte) {
	t.Helper()
	year := keyringNow.AddDate(1, 0, 0)
	for _, key := range []Key{{Public: public, ValidUntil: year}, {Public: public, Expired: year}} {
		require.False(t, key.forRequest(keyringNow))
		for _, rules := range stableVersions {
			require.False(t, key.forEvent(rules, keyringNow.UnixMilli(), keyringNow), rules.version)
		}
	}
}

func TestKey_DenyList(t *testing.T) {
	leaked, err := decodeBase64("l/O9hxMVKB6Lg+3Hqf0FQQZhVESQcMzbPN1Cz2nM3og")
	require.NoError(t, err)
	require.True(t, usableKey(leaked), "nothing but the list refuses it")
	keyringNeverUsable(t, leaked)
}

func TestKey_SmallOrder(t *testing.T) {
	for _, y := range smallOrderY {
		point := []byte(y)
		keyringNeverUsable(t, point)
		point[31] |= 0x80
		keyringNeverUsable(t, point)
	}
	for low := 0xed; low <= 0xff; low++ { // y of p and more: another spelling of a small y
		keyringNeverUsable(t, append(append([]byte{byte(low)}, strings.Repeat("\xff", 30)...), 0x7f))
	}
}

func TestKey_ShortKey(t *testing.T) {
	for _, n := range []int{0, 3, 31, 33, 64} {
		keyringNeverUsable(t, []byte(strings.Repeat("k", n)))
	}
}

// The published edge cases of ed25519, as Keys of any make may deliver them.
func TestKey_EdgeCases(t *testing.T) {
	var cases []struct {
		Message, Signature string
		Key                string `json:"pub_key"`
	}
	loadCoreVectors(t, "ed25519_speccheck.json", &cases)
	require.Len(t, cases, 12)
	var accepted []int
	for i, c := range cases {
		public, err := hex.DecodeString(c.Key)
		require.NoError(t, err)
		message, err := hex.DecodeString(c.Message)
		require.NoError(t, err)
		sig, err := hex.DecodeString(c.Signature)
		require.NoError(t, err)
		key := Key{Public: public, ValidUntil: keyringNow}
		if key.forRequest(keyringNow) && verify(public, message, base64.StdEncoding.EncodeToString(sig)) {
			accepted = append(accepted, i)
		}
	}
	require.Equal(t, []int{3}, accepted)
}

// Published examples of keys are readable text, not 32 bytes.
func TestKey_PublishedExamples(t *testing.T) {
	var file struct {
		Keys []struct {
			Where, Base64 string
			Decoded       int `json:"decoded_bytes"`
			Usable        bool
		} `json:"ed25519_public_keys"`
		Signatures []struct {
			Where, Base64 string
			Decoded       int `json:"decoded_bytes"`
		} `json:"ed25519_signatures"`
	}
	loadCoreVectors(t, "key_examples.json", &file)
	require.Len(t, file.Keys, 4)
	for _, v := range file.Keys {
		d := keyDocument{server: "a.example"}
		d.add(Key{ID: "ed25519:1"}, object(field{"key", quoted(v.Base64)}))
		require.Equal(t, v.Usable, len(d.keys) == 1, v.Where)
	}
	require.Len(t, file.Signatures, 3)
	for _, v := range file.Signatures {
		raw, err := decodeBase64(v.Base64)
		require.NoError(t, err, v.Where)
		require.Len(t, raw, v.Decoded, v.Where)
		public, _ := keyringKey("a")
		require.False(t, verify(public, nil, v.Base64), v.Where)
	}
}

func TestKey_Covers(t *testing.T) {
	public, _ := keyringKey("a")
	earlier, later := keyringNow.Add(-time.Millisecond), keyringNow.Add(time.Millisecond)
	for name, c := range map[string]struct {
		key    Key
		at     time.Time
		covers bool
	}{
		"unknown key":                 {Key{}, time.Time{}, false},
		"any state, none known":       {Key{Public: public}, time.Time{}, true},
		"valid to the millisecond":    {Key{Public: public, ValidUntil: keyringNow}, keyringNow, true},
		"valid, fraction later":       {Key{Public: public, ValidUntil: keyringNow}, keyringNow.Add(999 * time.Microsecond), true},
		"no longer valid":             {Key{Public: public, ValidUntil: keyringNow}, later, false},
		"expired later":               {Key{Public: public, Expired: keyringNow}, earlier, true},
		"expired then":                {Key{Public: public, Expired: keyringNow}, keyringNow, true},
		"expired before":              {Key{Public: public, Expired: keyringNow, ValidUntil: later}, later, false},
		"expired after being vouched": {Key{Public: public, Expired: later, ValidUntil: earlier}, keyringNow, true},
	} {
		require.Equal(t, c.covers, c.key.covers(c.at), name)
	}
}

// keyringPublished writes a document that old and current keys are listed in and that every current key has signed.
func keyringPublished(t *testing.T, name ServerName, validUntil int64, current []string, old map[string]int64) value {
	t.Helper()
	keys := func(id string) value { public, _ := keyringKey(id); return publicKey(public) }
	var verify, expired []field
	for _, id := range current {
		verify = append(verify, field{"ed25519:" + id, object(field{"key", keys(id)})})
	}
	for id, ts := range old {
		expired = append(expired, field{"ed25519:" + id, object(field{"key", keys(id)}, field{"expired_ts", integer(ts)})})
	}
	v := object(field{"server_name", quoted(name)}, field{"verify_keys", object(verify...)},
		field{"old_verify_keys", object(expired...)}, field{"valid_until_ts", integer(validUntil)})
	for _, id := range current {
		_, key := keyringKey(id)
		s, err := NewSigner(name, KeyID("ed25519:"+id), key)
		require.NoError(t, err)
		v, err = s.signObject(v)
		require.NoError(t, err)
	}
	return v
}

// Times of a document never overflow, nor do they look like times that are not set.
func TestKeyDocument_Times(t *testing.T) {
	const most = 1<<63 - 1
	for name, c := range map[string]struct{ ts, want int64 }{
		"most":             {most, maxJSONInteger},
		"beyond JSON":      {maxJSONInteger + 1, maxJSONInteger},
		"least":            {-most - 1, 0},
		"the zero time":    {time.Time{}.UnixMilli(), 0},
		"one":              {1, 1},
		"an ordinary time": {1_700_000_000_000, 1_700_000_000_000},
	} {
		require.Equal(t, c.want, keyTime(c.ts).UnixMilli(), name)
		require.False(t, keyTime(c.ts).IsZero(), name)
		require.Equal(t, integer(c.want), keyTimestamp(keyTime(c.ts)), name)
	}
	require.Equal(t, value("0"), keyTimestamp(time.Time{}))
	require.Equal(t, integer(maxJSONInteger), keyTimestamp(time.Unix(1<<53, 0)))

	d, err := readKeyDocument(keyringPublished(t, "a.example", most, []string{"a"}, map[string]int64{"b": time.Time{}.UnixMilli()}), "a.example", keyringNow)
	require.NoError(t, err)
	require.Len(t, d.keys, 2)
	require.Equal(t, keyringNow.Add(maxKeyValidity), d.keys[0].ValidUntil)
	require.False(t, d.keys[1].Expired.IsZero(), "an old key must not look like a current one")
}

// keyringLearn feeds documents to a server's memory, one a day.
type keyringLearn struct {
	*testing.T
	serverKeys
	day int
}

func newKeyringLearn(t *testing.T) *keyringLearn {
	return &keyringLearn{T: t, serverKeys: serverKeys{keys: map[KeyID]knownKey{}}}
}

func (l *keyringLearn) now() time.Time { return keyringNow.AddDate(0, 0, l.day) }

func (l *keyringLearn) document(direct bool, validDays int, current []string, old map[string]int64, wanted ...Key) map[KeyID]knownKey {
	l.Helper()
	l.day++
	v := keyringPublished(l.T, "a.example", keyringNow.AddDate(0, 0, validDays).UnixMilli(), current, old)
	d, err := readKeyDocument(v, "a.example", l.now())
	require.NoError(l, err)
	return l.learn(d, direct, wanted)
}

func (l *keyringLearn) key(id string) Key {
	k := Key{Server: "a.example", ID: KeyID("ed25519:" + id)}
	l.keys[k.ID].fill(&k)
	return k
}

// A key that the newest document does not list is good for what was signed before, and not for requests.
func TestServerKeys_Withdrawn(t *testing.T) {
	l := newKeyringLearn(t)
	l.document(true, 4, []string{"a", "b"}, nil)
	b := l.key("b")
	require.True(t, b.forRequest(l.now()))
	l.document(true, 5, []string{"a"}, nil)
	b = l.key("b")
	require.False(t, b.forRequest(l.now()))
	require.True(t, b.forEvent(RoomVersion("10").rules(), l.now().UnixMilli(), l.now()))
	require.False(t, b.forEvent(RoomVersion("10").rules(), l.now().UnixMilli()+1, l.now()))
	withdrawn := b.Expired
	l.document(true, 6, []string{"a"}, nil)
	require.Equal(t, withdrawn, l.key("b").Expired, "once is enough")
	l.document(true, 7, []string{"a", "b"}, nil)
	b = l.key("b")
	require.True(t, b.forRequest(l.now()), "listed again")
}

func TestServerKeys_RetiredKey(t *testing.T) {
	l := newKeyringLearn(t)
	l.document(true, 4, []string{"a", "b"}, nil)
	retired := l.now().Add(time.Hour)
	l.document(true, 5, []string{"a"}, map[string]int64{"b": retired.UnixMilli()})
	b := l.key("b")
	require.True(t, b.Expired.Equal(retired))
	require.False(t, b.forRequest(retired))
	require.Equal(t, keyringNow.AddDate(0, 0, 4), b.ValidUntil)
	l.document(true, 6, []string{"a"}, map[string]int64{"a": 1})
	a := l.key("a")
	require.True(t, a.forRequest(l.now()), "what is in both lists is current")
}

// What a notary returns may be older than what is known.
func TestServerKeys_OlderDocument(t *testing.T) {
	l := newKeyringLearn(t)
	l.document(true, 9, []string{"a"}, map[string]int64{"b": keyringNow.UnixMilli()})
	before := []Key{l.key("a"), l.key("b")}
	l.document(false, 8, []string{"b", "c", "d"}, map[string]int64{"a": 1, "e": 2})
	require.Equal(t, before, []Key{l.key("a"), l.key("b")})
	c := l.key("c")
	require.NotNil(t, c.Public, "it adds keys")
	require.False(t, c.forRequest(l.now()), "but none that the newer document does not list")
	require.True(t, c.forEvent(RoomVersion("10").rules(), keyringNow.UnixMilli(), l.now()))
	require.Equal(t, millis(2), l.key("e").Expired)
	l.document(false, 9, []string{"c"}, nil)
	c = l.key("c")
	require.True(t, c.forRequest(l.now()), "as new is new enough")

	l = newKeyringLearn(t)
	l.document(true, 400, []string{"a"}, nil)
	l.document(true, 9, []string{"b"}, nil)
	b := l.key("b")
	require.True(t, b.forRequest(l.now()), "what the server itself says is new, even if valid for a shorter time")
}

func TestServerKeys_Bounded(t *testing.T) {
	l := newKeyringLearn(t)
	var many []string
	for i := range 40 {
		many = append(many, fmt.Sprintf("k%02d", i))
	}
	l.document(true, 4, []string{"z"}, nil)
	all := l.document(true, 5, many, map[string]int64{"old": 1}, Key{ID: "ed25519:old"}, Key{ID: "ed25519:k39"})
	require.Len(t, all, 42)
	require.Len(t, l.keys, maxKeysOfServer)
	for _, id := range []string{"old", "k39", "z"} {
		require.NotNil(t, l.key(id).Public, id)
	}
	require.False(t, l.complete)
	for i := range 100 { // of the Store
		public, _ := keyringKey("s")
		row := Key{ID: KeyID(fmt.Sprintf("ed25519:s%d", i)), Public: public, ValidUntil: keyringNow}
		require.NotNil(t, l.recall(row, true).public)
	}
	require.Len(t, l.keys, maxKeysOfServer)
}

func TestServerKeys_Recall(t *testing.T) {
	a, _ := keyringKey("a")
	b, _ := keyringKey("b")
	day := func(n int) time.Time { return keyringNow.AddDate(0, 0, n) }
	row := func(p ed25519.PublicKey, validUntil, expired time.Time) Key {
		return Key{ID: "ed25519:a", Public: p, ValidUntil: validUntil, Expired: expired}
	}
	for name, c := range map[string]struct{ row, want Key }{
		"no row":                {row(nil, time.Time{}, time.Time{}), row(a, day(4), time.Time{})},
		"older row":             {row(a, day(3), time.Time{}), row(a, day(4), time.Time{})},
		"newer row":             {row(a, day(5), time.Time{}), row(a, day(5), time.Time{})},
		"retired since":         {row(a, day(4), day(3)), row(a, day(4), day(3))},
		"not retired after all": {row(a, day(3), day(0)), row(a, day(4), time.Time{})},
		"was another key":       {row(b, day(0), time.Time{}), row(b, day(0), time.Time{})},
		"another, withdrawn":    {row(b, day(5), time.Time{}), row(b, day(5), day(1))},
	} {
		t.Run(name, func(t *testing.T) {
			l := newKeyringLearn(t)
			l.document(true, 4, []string{"a"}, nil)
			got := Key{ID: "ed25519:a"}
			l.recall(c.row, true).fill(&got)
			require.Equal(t, c.want, got)
			c.want.Server = "a.example"
			require.Equal(t, c.want, l.key("a"))
		})
	}
}

// A signer knows its own server's keys and judges its old ones like those of others.
func TestKey_OwnOldKey(t *testing.T) {
	current, key := keyringKey("current")
	old, _ := keyringKey("old")
	signer, err := NewSigner("a.example", "ed25519:new", key, Key{ID: "ed25519:old", Public: old, Expired: keyringNow})
	require.NoError(t, err)
	s, err := NewServer(Config{Signers: []*Signer{signer}, Now: func() time.Time { return keyringNow.Add(time.Hour) },
		Keys: KeysFunc(nil)}) // not to be called
	require.NoError(t, err)
	keys := []Key{{Server: "a.example", ID: "ed25519:new"}, {Server: "a.example", ID: "ed25519:old"}, {Server: "a.example", ID: "ed25519:x"}}
	require.NoError(t, s.client.lookUp(t.Context(), keys))
	require.Equal(t, current, keys[0].Public)
	require.Nil(t, keys[2].Public)
	ts, now := keyringNow.UnixMilli(), keyringNow.Add(time.Hour)
	for _, rules := range stableVersions {
		require.True(t, keys[0].forEvent(rules, ts, now))
		require.True(t, keys[1].forEvent(rules, ts, now))
		require.False(t, keys[1].forEvent(rules, ts+1, now))
	}
	require.True(t, keys[0].forRequest(now))
	require.False(t, keys[1].forRequest(now))
}
