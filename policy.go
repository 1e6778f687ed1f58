package mxfed

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"

	"golang.org/x/crypto/ed25519"
)

// This file is about policy servers: a room may name a server that has to sign every event before it is sent. What such a
// server thinks of an event is its own affair; here it is asked, and its signature checked.
// https://spec.matrix.org/v1.19/server-server-api/#policy-servers

// policyKeyID names the key of every policy server. The room's state says which key that is; it is not published.
const policyKeyID KeyID = "ed25519:policy_server"

// policyServer is what a room's m.room.policy event names. Nil: no policy server is in use.
type policyServer struct {
	name ServerName
	key  ed25519.PublicKey // nil for text that is no key: the server is in use, and no signature can be valid
}

// policyServerOf reads an m.room.policy event; nil is that of a room without one. Whether the server is in the room is not
// for the event to say. https://spec.matrix.org/v1.19/client-server-api/#mroompolicy
func policyServerOf(policy *Event) *policyServer {
	if !policy.is(typePolicy, "") {
		return nil
	}
	via, named := policy.content.get("via").str()
	text, hasKey := policy.content.get("public_keys").get("ed25519").str()
	if !named || !hasKey || !ServerName(via).valid() { // what is no server name has no users who could be in the room
		return nil
	}
	p := &policyServer{name: ServerName(via)}
	if key, err := decodeBase64(text); err == nil && usableKey(key) {
		p.key = key
	}
	return p
}

// SignedByPolicyServer tells whether e may be shown and sent on in a room whose current m.room.policy event is policy,
// nil if it has none: e carries a valid signature of the policy server, or needs none. It is for hosts that judge events
// from transactions after Server.Verify and the authorisation rules. The host must know whether content.via of policy has
// a joined user in the room: if not, no policy server is in use, and this function is not to be asked. An event that fails
// is not rejected: a new signature is asked for once, with Client.PolicySign, and without it the event is soft-failed.
// Policy events themselves pass; a nil e and one of another room than policy do not.
// https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func SignedByPolicyServer(policy, e *Event) bool {
	if e == nil || policy != nil && policy.room != e.room {
		return false
	}
	return policyServerOf(policy).passes(e)
}

// passes tells whether e has no need to be sent to p: it carries its signature, or needs none. The event that names the
// policy server must not be sent to it, lest a room could not get rid of it.
func (p *policyServer) passes(e *Event) bool {
	return p == nil || e.is(typePolicy, "") || p.signature(e, e.text.get("signatures")) != ""
}

// signature returns the valid signature of e by p in an object of signatures by server, "" if there is none.
func (p *policyServer) signature(e *Event, signatures value) string {
	text, _ := signatures.get(string(p.name)).get(string(policyKeyID)).str()
	var parser eventParser
	if p.key == nil || !verify(p.key, parser.signedBytes(e), text) {
		return ""
	}
	raw, _ := decodeBase64(text) // as verify has; others may be less liberal about its form
	return base64.RawStdEncoding.EncodeToString(raw)
}

// PolicySign asks the policy server that policy names, the m.room.policy event in the current state of e's room, to sign e
// and returns e with that signature beside those it has. An event that SignedByPolicyServer passes is returned as it is,
// without a call. from is the own name that asks; empty is the first signer's. Server.Build, InviteUser and the handlers
// ask of themselves: PolicySign is for events that arrived in a transaction without a valid signature.
//
// A refusal is the policy server's *Error, mostly of ErrForbidden with status 400 or 403, for ClientError to hand on. The
// event is not signed either if the server cannot be reached or answers anything but a valid signature: send nothing then.
//
// A policy server of an own name is called like any other, through Config.HTTP. As Server.Authenticate lets no own name
// in, a host that is its own policy server answers such requests in its http.RoundTripper.
// https://spec.matrix.org/v1.19/server-server-api/#post_matrixpolicyv1sign
func (c *Client) PolicySign(ctx context.Context, from ServerName, policy, e *Event) (*Event, error) {
	if e == nil || policy != nil && policy.room != e.room {
		return nil, refuse(ErrInvalidParam, "event is nil or of another room than %s", policy.RoomID())
	}
	signer, err := c.asking(from)
	if err != nil {
		return nil, err
	}
	return c.policySign(ctx, signer, policyServerOf(policy), e)
}

// policySign has p sign e, unless e passes as it is.
func (c *Client) policySign(ctx context.Context, signer *Signer, p *policyServer, e *Event) (*Event, error) {
	if p.passes(e) {
		return e, nil
	}
	if p.key == nil {
		return nil, refuse(ErrForbidden, "the room's policy server %s has no key, so that nothing can be sent", p.name)
	}
	q := &call{from: signer, to: p.name, endpoint: "policy/v1/sign", method: http.MethodPost, uri: "/_matrix/policy/v1/sign", body: e.text}
	answer, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	sig := p.signature(e, answer)
	if sig == "" {
		return nil, c.malformed(p.name, q.endpoint, &signatureError{server: p.name})
	}
	return e.withSignature(p.name, policyKeyID, sig)
}

// ownPolicySigned returns an event of a local user with the signature of the room's policy server, if one is in use. The
// host is asked about that server's presence only if the room names one. What the policy server says goes to the user, so
// its errors stay as they are.
func (c *Client) ownPolicySigned(ctx context.Context, signer *Signer, room *Room, e *Event) (*Event, error) {
	servers := room.policyServers()
	if len(servers) == 0 || e.is(typePolicy, "") {
		return e, nil
	}
	ask := RoomQuery{To: signer.name, State: []StateKey{{typePolicy, ""}}, Servers: servers}
	now, _, err := readRoom(ctx, c.rooms, e.room, ask)
	if err != nil {
		return nil, err
	}
	return c.policySign(ctx, signer, now.policyServer(), e)
}

// policyServers lists the server to ask the host about before policyServer can tell whether it is in use.
func (r *Room) policyServers() []ServerName {
	if p := policyServerOf(r.state(typePolicy, "")); p != nil {
		return []ServerName{p.name}
	}
	return nil
}

// policyServer is the room's policy server, nil if none is in use. One of which the host did not say that it has left is
// in use. https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func (r *Room) policyServer() *policyServer {
	p := policyServerOf(r.state(typePolicy, ""))
	if p == nil {
		return nil
	}
	if present, known := r.Present[p.name]; known && !present {
		return nil
	}
	return p
}

// policySigned returns an event of another server, which this one is about to let into the room, with the signature of the
// room's policy server, if one is in use: servers that are not in the room cannot ask it. An event that the room has
// accepted before is not judged again. A refusal is one of ours towards the server that sent the event.
func (c *Client) policySigned(ctx context.Context, signer *Signer, room *Room, e *Event) (*Event, error) {
	p := room.policyServer()
	if p.passes(e) {
		return e, nil
	}
	for _, known := range room.Events {
		if known.ID() == e.id && known.hash == e.hash {
			if sig := p.signature(e, known.text.get("signatures")); sig != "" {
				return e.withSignature(p.name, policyKeyID, sig)
			}
			return e, nil
		}
	}
	signed, err := c.policySign(ctx, signer, p, e)
	if errors.Is(err, ErrForbidden) {
		err = because(err, ErrForbidden, "the room's policy server refuses the event")
	}
	return signed, err
}

// withPolicySignature returns e, sent to another server, with the signature of the policy server that this server got for
// it, if sent back is a valid one by the room's policy event; e as it is otherwise. Nothing else of the answer is used.
func (e *Event) withPolicySignature(policy *Event, answer value) *Event {
	p := policyServerOf(policy)
	if p.passes(e) {
		return e
	}
	if sig := p.signature(e, answer.get("signatures")); sig != "" {
		if signed, err := e.withSignature(p.name, policyKeyID, sig); err == nil {
			return signed
		}
	}
	return e
}
