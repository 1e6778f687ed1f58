package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"slices"

	"example.org/mxfed"
)

// This file keeps signing keys: this server's own, and those of others, which all processes share.

// signer loads the signing key, made at the first start.
func (s *server) signer(ctx context.Context) (signer *mxfed.Signer, err error) {
	err = s.db.update(ctx, "", func(t *tx) error {
		_, fresh, err := ed25519.GenerateKey(nil)
		if err != nil {
			return err
		}
		if err := t.exec(`INSERT INTO settings VALUES ('signing_key', $1) ON CONFLICT DO NOTHING`, hex.EncodeToString(fresh.Seed())); err != nil {
			return err
		}
		var text string
		if _, err := t.row(`SELECT value FROM settings WHERE name = 'signing_key'`, nil, &text); err != nil {
			return err
		}
		seed, err := hex.DecodeString(text)
		if err != nil {
			return err
		}
		key := ed25519.NewKeyFromSeed(seed)
		id := mxfed.KeyID("ed25519:" + hex.EncodeToString(key.Public().(ed25519.PublicKey)[:4])) // another key gets another name
		signer, err = mxfed.NewSigner(s.name, id, key)
		return err
	})
	return signer, err
}

// keyStore implements mxfed.KeyStore.
type keyStore struct{ db *database }

// Keys implements mxfed.Keys.
func (s *keyStore) Keys(ctx context.Context, keys []mxfed.Key) error {
	return s.db.view(ctx, func(t *tx) error {
		for i := range keys {
			k := &keys[i]
			var public string
			var until, expired int64
			found, err := t.row(`SELECT public, valid_until, expired FROM remote_keys WHERE server = $1 AND id = $2`, []any{k.Server, k.ID}, &public, &until, &expired)
			if err != nil {
				return err
			}
			if found {
				if k.Public, err = hex.DecodeString(public); err != nil {
					return err
				}
				k.ValidUntil, k.Expired = timeOf(until), timeOf(expired)
			}
		}
		return nil
	})
}

// SaveKeys implements mxfed.KeyStore. Whoever writes first, public keys stay and times only grow.
func (s *keyStore) SaveKeys(ctx context.Context, keys []mxfed.Key) error {
	keys = slices.SortedFunc(slices.Values(keys), compareNames) // for all processes in the same order
	return s.db.update(ctx, "", func(t *tx) error {
		for _, k := range keys {
			err := t.exec(`INSERT INTO remote_keys VALUES ($1, $2, $3, $4, $5) ON CONFLICT (server, id) DO UPDATE SET
				valid_until = CASE WHEN excluded.valid_until > remote_keys.valid_until THEN excluded.valid_until ELSE remote_keys.valid_until END,
				expired = CASE WHEN excluded.expired > remote_keys.expired THEN excluded.expired ELSE remote_keys.expired END
				WHERE remote_keys.public = excluded.public`, k.Server, k.ID, hex.EncodeToString(k.Public), millis(k.ValidUntil), millis(k.Expired))
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func compareNames(a, b mxfed.Key) int {
	return cmp.Or(cmp.Compare(a.Server, b.Server), cmp.Compare(a.ID, b.ID))
}
