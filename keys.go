package mxfed

import (
	"context"
	"time"
)

// This file judges whether a key of another server may be used. Where keys come from is a matter of Keys, of which KeyRing
// is the usual one; whoever delivered a key, the decision is taken here and nowhere else.
// https://spec.matrix.org/v1.19/server-server-api/#publishing-keys

// Keys knows the signing keys of other servers. It is asked in bulk and by many goroutines at once, and never for keys of
// own names.
type Keys interface {
	// Keys fills in ValidUntil, Expired and Public of every key that it knows, as the key's server published them, and leaves
	// Public nil for the others; Server, ID and At stay as they are. It does not judge: this package alone decides what a
	// key may be used for. An error says that some look-ups failed, so that a missing key may be found later; what was found
	// is filled in nevertheless. A key that its server does not have is no error.
	Keys(ctx context.Context, keys []Key) error
}

// KeysFunc is a function that is Keys.
type KeysFunc func(ctx context.Context, keys []Key) error

// Keys calls f.
func (f KeysFunc) Keys(ctx context.Context, keys []Key) error { return f(ctx, keys) }

// KeyStore keeps the keys of other servers over restarts and for several processes: one row for each Server and ID, of
// which Public, ValidUntil and Expired are stored.
type KeyStore interface {
	Keys
	// SaveKeys stores keys. A row that exists keeps its Public, and of two times the later one stays, so that it does not
	// matter which process writes first; zero counts as the earliest. Keys with another Public than their row are dropped.
	SaveKeys(ctx context.Context, keys []Key) error
}

// maxKeyValidity is how long a published key is believed at most.
// https://spec.matrix.org/v1.19/server-server-api/#publishing-keys
const maxKeyValidity = 7 * 24 * time.Hour

// forRequest tells whether k may sign a request that arrives now: a current key that its server vouches for. Who fetched it
// has capped ValidUntil. https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func (k *Key) forRequest(now time.Time) bool {
	return k.usable() && k.Expired.IsZero() && !now.Truncate(time.Millisecond).After(k.ValidUntil)
}

// forEvent tells whether k may have signed an event whose origin_server_ts is ts, in milliseconds. A key that has been
// replaced counts until then, in every room version; until when a current key is vouched for matters in some only.
// https://spec.matrix.org/v1.19/rooms/v5/#signing-key-validity-period
func (k *Key) forEvent(rules *roomRules, ts int64, now time.Time) bool {
	sent := millis(ts)
	switch {
	case !k.usable():
		return false
	case !k.Expired.IsZero():
		return !sent.After(k.Expired)
	case rules.keyValidity:
		return !sent.After(k.ValidUntil) && !sent.After(now.Add(maxKeyValidity))
	}
	return true
}

// covers tells whether what is known of k settles every question about the moment at; zero stands for any moment. If not,
// a newer document of its server may.
func (k *Key) covers(at time.Time) bool {
	switch {
	case k.Public == nil:
		return false
	case at.IsZero():
		return true
	case !k.Expired.IsZero():
		return !at.After(k.Expired)
	}
	return !at.Truncate(time.Millisecond).After(k.ValidUntil)
}

// leakedKey is a signing key that is public knowledge, its private half included.
const leakedKey = "\x97\xf3\xbd\x87\x13\x15\x28\x1e\x8b\x83\xed\xc7\xa9\xfd\x05\x41" +
	"\x06\x61\x54\x44\x90\x70\xcc\xdb\x3c\xdd\x42\xcf\x69\xcc\xde\x88"

// usable tells whether the key itself is fit for signatures, at any time.
func (k *Key) usable() bool { return usableKey(k.Public) && string(k.Public) != leakedKey }
