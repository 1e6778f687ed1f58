package mxfed

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ed25519"
)

// This file reads and checks the documents in which servers publish their keys.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server

const (
	maxKeyDocument   = 512 << 10 // bytes
	maxKeySignatures = 64        // of one server on one document; every one costs a check
)

// keyDocument is what a server published about its keys, signed by itself.
type keyDocument struct {
	server     ServerName
	text       value // with every signature
	validUntil time.Time
	fetched    time.Time
	keys       []Key // usable ones, each ID once; ValidUntil is capped
}

// readKeyDocument checks a document of the server called name that arrived now.
func readKeyDocument(v value, name ServerName, now time.Time) (*keyDocument, error) {
	if got, ok := v.get("server_name").str(); !ok || ServerName(got) != name {
		return nil, fmt.Errorf("key document is of %.100q", got)
	}
	ts, ok := v.get("valid_until_ts").int()
	if !ok {
		return nil, errors.New("key document has no valid_until_ts")
	}
	if !v.get("verify_keys").isObject() {
		return nil, errors.New("key document has no verify_keys")
	}
	d := &keyDocument{server: name, text: v, validUntil: keyTime(ts), fetched: now}
	d.readKeys()
	if err := d.checkSignatures(name, d.keys); err != nil {
		return nil, err
	}
	return d, nil
}

// keyTime is the time of a timestamp in a key document. What lies outside the range of the protocol's integers counts as the
// end of that range, so that it neither overflows nor looks like a time that is not set.
func keyTime(ts int64) time.Time { return millis(min(max(ts, 0), maxJSONInteger)) }

// keyTimestamp is the reverse of keyTime.
func keyTimestamp(t time.Time) value {
	if t.After(millis(maxJSONInteger)) {
		return integer(maxJSONInteger)
	}
	return integer(max(t.UnixMilli(), 0))
}

// readKeys lists the keys that can be used. A key that is both current and old is current.
func (d *keyDocument) readKeys() {
	validUntil := d.validUntil
	if limit := d.fetched.Add(maxKeyValidity); validUntil.After(limit) {
		validUntil = limit
	}
	current := d.text.get("verify_keys")
	for id, m := range current.members() {
		d.add(Key{ID: KeyID(id), ValidUntil: validUntil}, m)
	}
	for id, m := range d.text.get("old_verify_keys").members() {
		if ts, ok := m.get("expired_ts").int(); ok && current.get(id) == "" {
			d.add(Key{ID: KeyID(id), Expired: keyTime(ts)}, m)
		}
	}
}

// add adds a key unless it is none of 32 usable bytes. Its identifier is opaque after the algorithm.
func (d *keyDocument) add(k Key, m value) {
	text, _ := m.get("key").str()
	raw, err := decodeBase64(text)
	k.Server, k.Public = d.server, ed25519.PublicKey(raw)
	if err == nil && k.usable() && strings.HasPrefix(string(k.ID), ed25519Prefix) {
		d.keys = append(d.keys, k)
	}
}

// checkSignatures demands a signature by one of the current keys of the server called name, and that none by any of keys is
// wrong. Signatures by other keys and of other servers are ignored.
// https://spec.matrix.org/v1.19/appendices/#checking-for-a-signature
func (d *keyDocument) checkSignatures(name ServerName, keys []Key) error {
	known := make(map[KeyID]*Key, len(keys))
	for i := range keys {
		known[keys[i].ID] = &keys[i]
	}
	message, checked, genuine := signedBytes(d.text), 0, false
	for id, sig := range d.text.get("signatures").get(string(name)).members() {
		k := known[KeyID(id)]
		if k == nil {
			continue
		}
		if checked++; checked > maxKeySignatures {
			return fmt.Errorf("key document of %s has more than %d signatures of %s", d.server, maxKeySignatures, name)
		}
		text, ok := sig.str()
		if !ok || !verify(k.Public, message, text) {
			return fmt.Errorf("key document of %s: signature of %s with %.100s is wrong", d.server, name, id)
		}
		genuine = genuine || k.Expired.IsZero()
	}
	if !genuine {
		return fmt.Errorf("key document of %s is not signed by %s", d.server, name)
	}
	return nil
}

// signatureIDs lists the keys with which the server called name has signed, as far as they are worth a look.
func (d *keyDocument) signatureIDs(name ServerName) (ids []KeyID) {
	for id := range d.text.get("signatures").get(string(name)).members() {
		if strings.HasPrefix(id, ed25519Prefix) && len(ids) < maxKeySignatures {
			ids = append(ids, KeyID(id))
		}
	}
	return ids
}
