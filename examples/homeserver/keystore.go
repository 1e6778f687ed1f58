package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"slices"
	"time"

	"example.org/mxfed"
)

// This file keeps signing keys: this server's own, and those of others, which all processes share.

// signer loads the signing key, made at the first start.
func (s *server) signer(ctx context.Context) (signer *mxfed.Signer, err error) {
	_, fresh, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	var text string
	err = s.db.update(ctx, "", func(t *tx) error {
		t.exec(`INSERT INTO settings VALUES ('signing_key', ?) ON CONFLICT DO NOTHING`, hex.EncodeToString(fresh.Seed()))
		text, _ = one[string](t, `SELECT value FROM settings WHERE name = 'signing_key'`)
		return nil
	})
	if err != nil {
		return nil, err
	}
	seed, err := hex.DecodeString(text)
	if err != nil {
		return nil, err
	}
	key := ed25519.NewKeyFromSeed(seed)
	id := mxfed.KeyID("ed25519:" + hex.EncodeToString(key.Public().(ed25519.PublicKey)[:4])) // another key gets another name
	return mxfed.NewSigner(s.name, id, key)
}

// keyStore implements mxfed.KeyStore.
type keyStore struct{ db *database }

// keyRow is a row of remote_keys.
type keyRow struct {
	Public  string
	Until   int64 `db:"valid_until"`
	Expired int64
}

// Keys implements mxfed.Keys.
func (s *keyStore) Keys(ctx context.Context, keys []mxfed.Key) error {
	return s.db.view(ctx, func(t *tx) error {
		for i := range keys {
			k := &keys[i]
			row, found := one[keyRow](t, `SELECT public, valid_until, expired FROM remote_keys WHERE server = ? AND id = ?`, k.Server, k.ID)
			if !found {
				continue
			}
			var err error
			if k.Public, err = hex.DecodeString(row.Public); err != nil {
				return err
			}
			k.ValidUntil, k.Expired = timeOf(row.Until), timeOf(row.Expired)
		}
		return nil
	})
}

// SaveKeys implements mxfed.KeyStore. Whoever writes first, public keys stay and times only grow.
func (s *keyStore) SaveKeys(ctx context.Context, keys []mxfed.Key) error {
	keys = slices.SortedFunc(slices.Values(keys), func(a, b mxfed.Key) int { // for all processes in the same order
		return cmp.Or(cmp.Compare(a.Server, b.Server), cmp.Compare(a.ID, b.ID))
	})
	return s.db.update(ctx, "", func(t *tx) error {
		for _, k := range keys {
			t.exec(`INSERT INTO remote_keys VALUES (?, ?, ?, ?, ?) ON CONFLICT (server, id) DO UPDATE SET
				valid_until = CASE WHEN excluded.valid_until > remote_keys.valid_until THEN excluded.valid_until ELSE remote_keys.valid_until END,
				expired = CASE WHEN excluded.expired > remote_keys.expired THEN excluded.expired ELSE remote_keys.expired END
				WHERE remote_keys.public = excluded.public`, k.Server, k.ID, hex.EncodeToString(k.Public), millis(k.ValidUntil), millis(k.Expired))
		}
		return nil
	})
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func timeOf(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
