package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"

	"example.org/mxfed"
)

// clientAPI serves the part of the client-server API that memberships need, to users of this server. This file has what goes
// for all of its endpoints, and accounts. https://spec.matrix.org/v1.19/client-server-api/
type clientAPI struct {
	*server
	stopping context.Context // ends when nobody is to be kept waiting any more
}

// request is that of a user, or of anybody where the endpoint is open.
type request struct {
	*http.Request
	session
}

// endpoint answers a request with what is to be encoded as JSON, or with an error.
type endpoint func(q *request) (any, error)

// newClientAPI returns a handler for everything below /, which answers at once when ctx ends.
func newClientAPI(ctx context.Context, s *server) http.Handler {
	c, mux := &clientAPI{s, ctx}, http.NewServeMux()
	handle := func(pattern string, open bool, serve endpoint) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { c.answer(w, r, open, serve) })
	}
	handle("/", true, unrecognized(http.StatusNotFound))
	others := make(map[string]bool) // paths with an answer to all other methods
	for _, open := range []bool{true, false} {
		for pattern, serve := range c.endpoints(open) {
			method, path, _ := strings.Cut(pattern, " ")
			path = "/_matrix/client/" + path
			handle(method+" "+path, open, serve)
			if !others[path] {
				others[path] = true
				handle(path, true, unrecognized(http.StatusMethodNotAllowed))
			}
		}
	}
	return mux
}

// unrecognized refuses what there is no endpoint for. https://spec.matrix.org/v1.19/client-server-api/#common-error-codes
func unrecognized(status int) endpoint {
	return func(*request) (any, error) {
		return nil, refusal(status, mxfed.ErrUnrecognized, "there is no such endpoint")
	}
}

// endpoints are those that are open to anybody, or those that need an access token.
func (c *clientAPI) endpoints(open bool) map[string]endpoint {
	if open {
		return map[string]endpoint{
			"GET versions":                  c.versions,
			"POST v3/register":              c.postRegister,
			"GET v3/profile/{user}":         c.getProfile,
			"GET v3/profile/{user}/{field}": c.getProfile,
			"GET v3/directory/room/{alias}": c.getAlias,
		}
	}
	return map[string]endpoint{
		"GET v3/account/whoami":                     c.whoami,
		"GET v3/capabilities":                       c.capabilities,
		"PUT v3/profile/{user}/{field}":             c.putProfile,
		"PUT v3/directory/room/{alias}":             c.putAlias,
		"POST v3/createRoom":                        c.postRoom,
		"POST v3/join/{room}":                       c.postOwn("join"),
		"POST v3/rooms/{room}/join":                 c.postOwn("join"),
		"POST v3/knock/{room}":                      c.postOwn("knock"),
		"POST v3/rooms/{room}/leave":                c.postOwn("leave"),
		"POST v3/rooms/{room}/invite":               c.postOther("invite"),
		"POST v3/rooms/{room}/kick":                 c.postOther("leave", "join", "invite", "knock"),
		"POST v3/rooms/{room}/ban":                  c.postOther("ban"),
		"POST v3/rooms/{room}/unban":                c.postOther("leave", "ban"),
		"PUT v3/rooms/{room}/send/{type}/{txn}":     c.putEvent,
		"GET v3/rooms/{room}/state":                 c.getState,
		"GET v3/rooms/{room}/state/{type}":          c.getStateEntry,
		"PUT v3/rooms/{room}/state/{type}":          c.putState,
		"GET v3/rooms/{room}/state/{type}/{key...}": c.getStateEntry,
		"PUT v3/rooms/{room}/state/{type}/{key...}": c.putState,
		"GET v3/sync":                               c.sync,
	}
}

// answer finds out whose request it is, if that matters, and answers it.
// https://spec.matrix.org/v1.19/client-server-api/#using-access-tokens
func (c *clientAPI) answer(w http.ResponseWriter, r *http.Request, open bool, serve endpoint) {
	q, result, err := &request{Request: r}, any(nil), error(nil)
	if !open {
		q.session, err = c.session(r.Context(), tokenOf(r))
	}
	if err == nil {
		result, err = serve(q)
	}
	if err != nil {
		c.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, ok := result.(unauthorized); ok {
		w.WriteHeader(http.StatusUnauthorized)
	}
	w.Write(asJSON(result)) // an error here means that the caller has gone
}

func tokenOf(r *http.Request) string {
	if scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return r.URL.Query().Get("access_token")
}

// fail answers with a standard error and logs what is the fault of a server.
// https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
func (c *clientAPI) fail(w http.ResponseWriter, r *http.Request, err error) {
	told, level := mxfed.ClientError(err), c.log.Debug
	if told.Status >= 500 && r.Context().Err() == nil {
		level = c.log.Error
	}
	level("client request", "method", r.Method, "path", r.URL.Path, "status", told.Status, "error", err)
	mxfed.WriteError(w, told)
}

// maxBody bounds the body of a client's request, in bytes. An event is far smaller.
const maxBody = 1 << 20

// decode reads the JSON object in the body; no body counts as an empty one.
func (q *request) decode(into any) error {
	body, err := io.ReadAll(io.LimitReader(q.Body, maxBody+1))
	body = bytes.TrimSpace(body)
	if len(body) == 0 {
		body = []byte("{}")
	}
	switch {
	case err != nil:
		return err
	case len(body) > maxBody:
		return mxfed.ErrTooLarge
	case !json.Valid(body):
		return refusal(http.StatusBadRequest, mxfed.ErrNotJSON, "the body is not JSON")
	case body[0] != '{' || json.Unmarshal(body, into) != nil:
		return refusal(http.StatusBadRequest, mxfed.ErrBadJSON, "the body has not the form that is expected here")
	}
	return nil
}

// empty is what most changes are answered with.
type empty struct{}

// versions are those whose rules this server follows, in the part that it implements.
func (c *clientAPI) versions(*request) (any, error) {
	all := strings.Fields("v1.1 v1.2 v1.3 v1.4 v1.5 v1.6 v1.7 v1.8 v1.9 v1.10 v1.11 v1.12 v1.13 v1.14 v1.15 v1.16 v1.17 v1.18 v1.19")
	return map[string]any{"versions": all}, nil
}

// capabilities tells which versions rooms may have: all that package mxfed knows.
// https://spec.matrix.org/v1.19/client-server-api/#mroom_versions-capability
func (c *clientAPI) capabilities(*request) (any, error) {
	stable := make(map[string]string)
	for _, v := range roomVersions() {
		stable[v] = "stable"
	}
	rooms := map[string]any{"default": defaultVersion, "available": stable}
	return map[string]any{"capabilities": map[string]any{"m.room_versions": rooms}}, nil
}

func roomVersions() []string { return strings.Fields("1 2 3 4 5 6 7 8 9 10 11 12") }

// postRegister lets anybody in who completes a stage that asks for nothing.
// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3register
func (c *clientAPI) postRegister(q *request) (any, error) {
	var body struct {
		Auth     struct{ Type string } `json:"auth"`
		Username string                `json:"username"`
		Device   string                `json:"device_id"`
	}
	if err := q.decode(&body); err != nil {
		return nil, err
	}
	if body.Auth.Type != "m.login.dummy" {
		return unauthorized{"flows": []any{map[string]any{"stages": []string{"m.login.dummy"}}}, "params": empty{}, "session": "any"}, nil
	}
	in, token, err := c.register(q.Context(), body.Username, body.Device)
	return map[string]any{"user_id": in.User, "access_token": token, "device_id": in.Device}, err
}

// unauthorized is an answer, not an error: it says how to go on.
// https://spec.matrix.org/v1.19/client-server-api/#user-interactive-authentication-api
type unauthorized map[string]any

func (c *clientAPI) whoami(q *request) (any, error) {
	return map[string]any{"user_id": q.User, "device_id": q.Device, "is_guest": false}, nil
}
