package mxfed

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"golang.org/x/crypto/ed25519"
)

// This file reads and checks the documents in which servers publish their keys, and holds what they teach: the keys of one
// server as they are remembered.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server

const (
	maxKeyDocument   = 512 << 10 // bytes
	maxKeySignatures = 64        // of one server on one document; every one costs a check
	maxKeysOfServer  = 32        // remembered in memory and stored
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
	k.Server, k.ID, k.Public = d.server, KeyID(strings.Clone(string(k.ID))), ed25519.PublicKey(raw) // not to keep the text
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

// kept returns a copy of d that keeps nothing else in memory.
func (d *keyDocument) kept() *keyDocument {
	c := *d
	c.server, c.text, c.keys = ServerName(strings.Clone(string(d.server))), value(strings.Clone(string(d.text))), nil
	return &c
}

// serverKeys is what is remembered of one server.
type serverKeys struct {
	keys map[KeyID]knownKey
	// fetched is when the newest document came, published its own valid_until_ts; zero if there was none. complete says that
	// keys holds all that it lists.
	fetched, published time.Time
	complete           bool

	next    time.Time // not to be asked before
	misses  int       // inquiries in a row that did not find what was wanted
	failure string    // of the last inquiry
	rest    time.Time // not to be asked as a notary before
}

// knownKey is a key with all that is known of it.
type knownKey struct {
	public              ed25519.PublicKey
	validUntil, expired time.Time
	stored              bool // nothing else is in the Store
}

// fill states in q what is known, if anything is.
func (n knownKey) fill(q *Key) {
	if n.public != nil {
		q.Public, q.ValidUntil, q.Expired = n.public, n.validUntil, n.expired
	}
}

// recall merges a row of the Store, which has no Public if there is no such row, and returns what is known now.
func (s *serverKeys) recall(row Key, sure bool) knownKey {
	n, known := s.keys[row.ID]
	switch {
	case row.Public == nil:
	case known && bytes.Equal(n.public, row.Public):
		if row.ValidUntil.After(n.validUntil) || row.Expired.After(s.fetched) { // another process knows better
			n.validUntil, n.expired = later(n.validUntil, row.ValidUntil), row.Expired
		}
	default: // the Store remembers longer who was first
		n = knownKey{public: row.Public, validUntil: row.ValidUntil, expired: row.Expired}
		if s.complete {
			n.withdraw(s.fetched)
		}
	}
	n.stored = n.stored || sure
	if known || n.public != nil && len(s.keys) < maxKeysOfServer {
		s.keys[KeyID(strings.Clone(string(row.ID)))] = n // not to keep the caller's text
	}
	return n
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// withdraw marks a key that its server does not list any more, as a document shows that came at the given time. What it
// signed earlier stays valid.
func (n *knownKey) withdraw(at time.Time) {
	if n.expired.IsZero() && !n.validUntil.Before(at) {
		n.expired = at
	}
}

// learn merges a document and returns all that is known now, bounded or not. What came from a notary may be older than what
// is known already: then it adds keys but changes none. wanted are the keys because of which it was fetched; the Store was
// asked about them.
func (s *serverKeys) learn(d *keyDocument, direct bool, wanted []Key) map[KeyID]knownKey {
	stale := !direct && d.validUntil.Before(s.published)
	if !stale {
		s.fetched, s.published, s.complete = d.fetched, d.validUntil, true
	}
	all := maps.Clone(s.keys)
	listed := make(map[KeyID]bool, len(d.keys))
	for _, key := range d.keys {
		n, known := s.keys[key.ID]
		if known && (stale || !bytes.Equal(n.public, key.Public)) {
			continue
		}
		listed[key.ID] = true
		n.public, n.validUntil, n.expired = key.Public, later(n.validUntil, key.ValidUntil), key.Expired
		all[key.ID] = n
	}
	for id, n := range all {
		if listed[id] == stale { // not in the newest document
			n.withdraw(s.fetched)
			all[id] = n
		}
	}
	for _, q := range wanted {
		if n, ok := all[q.ID]; ok {
			n.stored = true
			all[q.ID] = n
		}
	}
	s.remember(all, d, wanted)
	return all
}

// remember keeps as many keys as there is room for: the wanted ones, those remembered before, the current ones, the others.
func (s *serverKeys) remember(all map[KeyID]knownKey, d *keyDocument, wanted []Key) {
	before := s.keys
	s.keys = make(map[KeyID]knownKey, min(len(all), maxKeysOfServer))
	keep := func(id KeyID) {
		if n, ok := all[id]; ok && len(s.keys) < maxKeysOfServer {
			s.keys[KeyID(strings.Clone(string(id)))] = n
		}
	}
	for _, q := range wanted {
		keep(q.ID)
	}
	for id := range before {
		keep(id)
	}
	for _, q := range d.keys {
		keep(q.ID)
	}
	s.complete = s.complete && len(s.keys) == len(all)
}
