package mxfed

import (
	"slices"
	"strings"

	"golang.org/x/crypto/ed25519"
)

// This file says whose signatures an event needs, judges them, and adds our own.
// https://spec.matrix.org/v1.19/server-server-api/#signing-events

// signedBytes appends what signatures of the event cover: its redacted form.
// https://spec.matrix.org/v1.19/server-server-api/#signing-events
func (p *eventParser) signedBytes(e *Event) []byte {
	p.fields = p.fields[:0]
	for k, m := range e.text.members() {
		p.fields = append(p.fields, field{k, m})
	}
	p.buf = appendRedacted(p.buf[:0], e.rules, e.typ, p.fields, false)
	return p.buf
}

// signatures returns the object of signatures by key ID of one server.
func (e *Event) signatures(server ServerName) value {
	return e.text.get("signatures").get(string(server))
}

// signers lists the servers whose signatures the event needs; exempt: that of the sender's server may be missing, because
// a third-party invite may be sent on the inviter's behalf. The exemption is judged on the full event: with a wrong hash
// anybody could have written that content. https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func (e *Event) signers() (servers []ServerName, exempt bool) {
	servers = []ServerName{e.sender.Server()}
	if e.rules.eventID == idGiven && e.id.server() != servers[0] {
		servers = append(servers, e.id.server())
	}
	exempt = e.typ == typeMember && e.membership == "invite" && e.content.get("third_party_invite").isObject() &&
		(e.hashOK || e.redacted)
	return servers, exempt
}

// authoriserID is the user whose server vouches for a restricted join, "" if e names none or its version knows none.
func (e *Event) authoriserID() UserID {
	if !e.rules.restricted {
		return ""
	}
	user, _ := e.authoriser.str()
	return UserID(user)
}

// wantedKeys appends the keys that decide about the signatures of e.
func (e *Event) wantedKeys(keys []Key) []Key {
	servers, _ := e.signers()
	if user := e.authoriserID(); user.valid() && !slices.Contains(servers, user.Server()) {
		servers = append(servers, user.Server())
	}
	for _, server := range servers {
		for id := range e.signatures(server).members() {
			if strings.HasPrefix(id, ed25519Prefix) {
				key := Key{Server: server, ID: KeyID(id)}
				if e.rules.keyValidity {
					key.At = millis(e.ts)
				}
				keys = append(keys, key)
			}
		}
	}
	return keys
}

// keyFunc returns the public key of a server, nil if it is not known or not usable for the event at hand.
type keyFunc func(ServerName, KeyID) ed25519.PublicKey

// signatureError says whose signature is missing or wrong. Refuted: a known key contradicts it; otherwise keys may have
// been missing.
type signatureError struct {
	server  ServerName
	refuted bool
}

func (e *signatureError) Error() string {
	if e.refuted {
		return "bad signature of " + string(e.server)
	}
	return "no valid signature of " + string(e.server)
}

// checkSignatures checks the signatures that the event needs, and whether the server of the user who authorised a
// restricted join has signed.
// https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func (p *eventParser) checkSignatures(e *Event, key keyFunc) (authorised bool, err error) {
	message := p.signedBytes(e)
	servers, exempt := e.signers()
	for i, server := range servers {
		if i == 0 && exempt && e.signatures(server) == "" {
			continue
		}
		if err := e.signedBy(server, message, key); err != nil {
			return false, err
		}
	}
	if user := e.authoriserID(); user.valid() {
		authorised = slices.Contains(servers, user.Server()) && !exempt || e.signedBy(user.Server(), message, key) == nil
	}
	return authorised, nil
}

// signedBy demands that every signature of server whose key is known and usable is right, and that there is one.
// Signatures by other keys are passed over, such as those of policy servers, whose key is not published.
func (e *Event) signedBy(server ServerName, message []byte, key keyFunc) error {
	counted := false
	for id, sig := range e.signatures(server).members() {
		if !strings.HasPrefix(id, ed25519Prefix) {
			continue
		}
		pub := key(server, KeyID(id))
		if pub == nil {
			continue
		}
		text, ok := sig.str()
		if !ok || !verify(pub, message, text) {
			return &signatureError{server: server, refuted: true}
		}
		counted = true
	}
	if !counted {
		return &signatureError{server: server}
	}
	return nil
}

// approved is an event that a check has found fit for this server's signature. Signing takes nothing else, so that no
// path leads from bytes of another server to a signature without a check.
type approved struct{ event *Event }

// sign returns the event with the signature of s added beside those it has.
func (a approved) sign(s *Signer) (*Event, error) {
	var p eventParser
	sig, err := s.sign(p.signedBytes(a.event))
	if err != nil {
		return nil, err
	}
	return a.event.withSignature(s.name, s.id, sig)
}

// withSignature returns a copy of e that has one more signature.
func (e *Event) withSignature(server ServerName, id KeyID, sig string) (*Event, error) {
	signed := *e
	if signed.text = withSignature(e.text, server, id, sig); len(signed.text) > maxEventSize {
		return nil, refuse(ErrTooLarge, "event is larger than %d bytes when signed", maxEventSize)
	}
	return &signed, nil
}
