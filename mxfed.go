// Package mxfed speaks Matrix federation's invites and joins: handlers for a host's own mux, and a client that mirrors
// them. It holds the protocol: strict JSON, signatures, keys, server discovery, the authorisation rules of room versions 1
// to 12, and every check that the specification demands of both sides. Storage and policy stay with the host.
//
// # Usage
//
// A [Server] is made of a [Config] by [NewServer]; a [Signer] for the server's name is all it must have. [NewHandler] serves
// what the host offers in [Hosts]: an [InviteHost] takes invites to its users, a [JoinHost] takes joins to its rooms. Rooms
// are known to the library only through [RoomSource], which states facts. [Client] invites and joins: [Client.InviteUser]
// and [Client.Join] do all of it, [Client.Invite], [Client.MakeJoin] and [Client.SendJoin] are the single steps, [Client.Do]
// makes any signed call. [Server.Build], [Server.Verify], [Server.Authenticate] and [AllowedByACL] are there so that a host
// needs no second library for its own endpoints.
//
// # What the library decides and what the host decides
//
// The library decides whether a request is genuine, whether an event is well formed, signed and allowed, what is signed,
// and what is answered. The host decides whether its users want an invite, stores events, states facts of its rooms,
// passes events on to other servers, and resolves state. A fact that a host leaves out never lets anyone in. Races between
// requests are settled in the host's own transaction by [Membership.Check].
//
// # Security considerations
//
// Whatever comes from another server is hostile until a check has passed. JSON is read once, strictly, into the canonical
// form that hashes and signatures cover, and everything is read from that form: there is no second reading to disagree
// with. Events are signed only through a type that the checks alone produce; a template of another server is material and
// never signed as it is. A host's method is called only after every check that needs no host. Bodies, answers, lists,
// nesting and waiting are bounded. Requests go to public addresses only, unless a [Resolver] is told otherwise, and never
// follow redirects. Signatures are judged as crypto/ed25519 does, without batching, and keys or signatures with points of
// small order are refused, so that all servers of a room decide alike. Verification cannot be switched off.
//
// Errors returned to other servers say what was wrong with their request; errors of the host's own making are logged and
// answered as 500 without details.
package mxfed

import (
	"net/http"
	"strings"
)

// Hosts is what a server offers; nil fields are answered with 404 M_UNRECOGNIZED.
type Hosts struct {
	Invite InviteHost
	Join   JoinHost
	Leave  MemberHost
	Knock  MemberHost
}

// NewHandler serves everything that h offers on one handler, keys included, and answers all other paths under
// /_matrix/federation/ and /_matrix/key/ with the protocol's 404 and 405. It may be mounted any number of times, behind
// any mux: what it reads is the request line. https://spec.matrix.org/v1.19/server-server-api/#unsupported-endpoints
func NewHandler(s *Server, h Hosts) http.Handler {
	endpoints := map[string]http.Handler{}
	if h.Invite != nil {
		endpoints["invite"] = NewInviteHandler(s, h.Invite)
	}
	if h.Join != nil {
		endpoints["make_join"] = NewMakeJoinHandler(s)
		endpoints["send_join"] = NewSendJoinHandler(s, h.Join)
	}
	if h.Leave != nil {
		endpoints["make_leave"] = NewMakeLeaveHandler(s)
		endpoints["send_leave"] = NewSendLeaveHandler(s, h.Leave)
	}
	if h.Knock != nil {
		endpoints["make_knock"] = NewMakeKnockHandler(s)
		endpoints["send_knock"] = NewSendKnockHandler(s, h.Knock)
	}
	keys := NewKeyHandler(s)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t, err := parseTarget(r)
		if err == nil {
			if e := endpoints[t.endpoint]; e != nil {
				e.ServeHTTP(w, r)
				return
			}
			err = errUnrecognized(http.StatusNotFound)
		} else if strings.HasPrefix(t.uri, "/_matrix/key/") {
			keys.ServeHTTP(w, r)
			return
		}
		s.refuse(w, r, err)
	})
}
