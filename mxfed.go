package mxfed

import "net/http"

// Hosts is what a server offers; nil fields are answered with 404 M_UNRECOGNIZED.
type Hosts struct {
	Invite InviteHost
	Join   JoinHost
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
	keys := NewKeyHandler(s)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t, err := parseTarget(r)
		if err == nil {
			if e := endpoints[t.endpoint]; e != nil {
				e.ServeHTTP(w, r)
				return
			}
			err = errUnrecognized(http.StatusNotFound)
		} else if isKeyPath(t.uri) {
			keys.ServeHTTP(w, r)
			return
		}
		s.refuse(w, r, err)
	})
}
