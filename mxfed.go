// Package mxfed speaks Matrix federation's invites, joins, leaves and knocks: handlers for a host's own mux, and a client
// that mirrors them. It holds the protocol: strict JSON, signatures, keys, server discovery, the authorisation rules of
// room versions 1 to 12, and every check that the specification demands of both sides. Storage and policy stay with the
// host.
//
// # Usage
//
// A [Server] is made of a [Config] by [NewServer]; a [Signer] for the server's name is all it must have. [NewHandler] serves
// what the host offers in [Hosts]: an [InviteHost] takes invites to its users, a [JoinHost] takes joins to its rooms, and
// so on, each for itself. Rooms are known to the library only through [RoomSource], which states facts.
//
// [Client.InviteUser], [Client.Join], [Client.Leave] and [Client.Knock] do all that their names say; [Client.FetchState]
// gets the rest of a room that was joined without its members. [Client.Invite], [Client.MakeJoin], [Client.SendJoin] and
// their like are the single steps, [Client.Do] makes any signed call. [Server.Build], [Server.Verify],
// [Event.Check], [Server.Authenticate] and [AllowedByACL] are there so that a host needs no second library for its own endpoints.
//
// # What the library decides and what the host decides
//
// The library decides whether a request is genuine, whether an event is well formed, signed and allowed, what is signed,
// and what is answered. The host decides whether its users want an invite, stores events, states facts of its rooms,
// passes events on to other servers, and resolves state. What a host leaves out of its answers never lets anyone in, but for
// state: see [Room]. Races between requests are settled in the host's own transaction by [Membership.Check], and
// [Event.Check] judges events that come in any other way.
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

// Hosts is what a server offers; what a zero field is about is answered with 404 M_UNRECOGNIZED.
type Hosts struct {
	Invite     InviteHost     // invite
	Join       JoinHost       // make_join, send_join
	Leave      MemberHost     // make_leave, send_leave
	Knock      MemberHost     // make_knock, send_knock
	Events     EventHost      // state, state_ids, event, event_auth
	ThirdParty ThirdPartyHost // exchange_third_party_invite
	Bind       BindHost       // 3pid/onbind
	Directory  DirectoryHost  // query/directory
	Version    ServerVersion  // version
}

// NewHandler serves everything that h offers on one handler, keys included, and answers all other paths under
// /_matrix/federation/ and /_matrix/key/ with the protocol's 404 and 405. It may be mounted any number of times, behind
// any mux: what it reads is the request line. https://spec.matrix.org/v1.19/server-server-api/#unsupported-endpoints
func NewHandler(s *Server, h Hosts) http.Handler {
	endpoints, keys := h.endpoints(s), NewKeyHandler(s)
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

// endpoints are the handlers of what h offers.
func (h *Hosts) endpoints(s *Server) map[string]http.Handler {
	offered := make(map[string]http.Handler)
	if h.Invite != nil {
		offered["invite"] = NewInviteHandler(s, h.Invite)
	}
	if h.Join != nil {
		offered["make_join"], offered["send_join"] = NewMakeJoinHandler(s), NewSendJoinHandler(s, h.Join)
	}
	if h.Leave != nil {
		offered["make_leave"], offered["send_leave"] = NewMakeLeaveHandler(s), NewSendLeaveHandler(s, h.Leave)
	}
	if h.Knock != nil {
		offered["make_knock"], offered["send_knock"] = NewMakeKnockHandler(s), NewSendKnockHandler(s, h.Knock)
	}
	if h.Events != nil {
		offered["state"], offered["state_ids"] = NewStateHandler(s, h.Events), NewStateIDsHandler(s, h.Events)
		offered["event"], offered["event_auth"] = NewEventHandler(s, h.Events), NewEventAuthHandler(s, h.Events)
	}
	if h.ThirdParty != nil {
		offered["exchange_third_party_invite"] = NewExchangeThirdPartyInviteHandler(s, h.ThirdParty)
	}
	if h.Bind != nil {
		offered["3pid"] = NewOnBindHandler(s, h.Bind)
	}
	if h.Directory != nil {
		offered["query"] = NewDirectoryHandler(s, h.Directory)
	}
	if h.Version != (ServerVersion{}) {
		offered["version"] = NewVersionHandler(s, h.Version)
	}
	return offered
}
