package main

import (
	"context"
	"net/http"
	"strings"

	"example.org/mxfed"
)

// clientAPI serves the part of the client-server API that memberships need, to users of this server.
// https://spec.matrix.org/v1.19/client-server-api/
type clientAPI struct {
	*server
	stopping context.Context // ends when nobody is to be kept waiting any more
}

// newClientAPI returns a handler for everything below /, which answers at once when ctx ends.
func newClientAPI(ctx context.Context, s *server) http.Handler {
	c := &clientAPI{s, ctx}
	r := &router{mux: http.NewServeMux(), paths: make(map[string]map[string]http.HandlerFunc), fail: c.fail}
	r.mux.HandleFunc("/", func(w http.ResponseWriter, q *http.Request) { c.fail(w, q, mxfed.ErrUnrecognized) })
	r.handle("GET", "versions", c.versions)
	r.handle("GET", "v3/register/available", c.available)
	r.handle("POST", "v3/register", c.postRegister)
	r.handle("GET", "v3/login", c.loginFlows)
	r.handle("POST", "v3/login", c.postLogin)
	r.handle("GET", "v3/profile/{user}", c.getProfile)
	r.handle("GET", "v3/profile/{user}/{field}", c.getProfileField)
	r.handle("GET", "v3/directory/room/{alias}", c.getAlias)
	for path, serve := range c.ofUsers() {
		method, path, _ := strings.Cut(path, " ")
		r.handle(method, path, c.authenticated(serve))
	}
	return r
}

// request is that of a user.
type request struct {
	*http.Request
	session
}

func (q *request) room() mxfed.RoomID { return mxfed.RoomID(q.PathValue("room")) }

// ofUsers are the endpoints that need an access token.
func (c *clientAPI) ofUsers() map[string]func(*request) (any, error) {
	return map[string]func(*request) (any, error){
		"POST v3/logout":                            c.postLogout,
		"GET v3/account/whoami":                     c.whoami,
		"GET v3/capabilities":                       c.capabilities,
		"PUT v3/profile/{user}/{field}":             c.putProfileField,
		"PUT v3/directory/room/{alias}":             c.putAlias,
		"DELETE v3/directory/room/{alias}":          c.deleteAlias,
		"POST v3/createRoom":                        c.postRoom,
		"GET v3/joined_rooms":                       c.joinedRooms,
		"POST v3/join/{room}":                       c.join,
		"POST v3/rooms/{room}/join":                 c.join,
		"POST v3/knock/{room}":                      c.knock,
		"POST v3/rooms/{room}/leave":                c.leave,
		"POST v3/rooms/{room}/forget":               c.postForget,
		"POST v3/rooms/{room}/invite":               c.invite,
		"POST v3/rooms/{room}/kick":                 c.moderate("leave", "join", "invite", "knock"),
		"POST v3/rooms/{room}/ban":                  c.moderate("ban"),
		"POST v3/rooms/{room}/unban":                c.moderate("leave", "ban"),
		"PUT v3/rooms/{room}/send/{type}/{txn}":     c.putEvent,
		"PUT v3/rooms/{room}/redact/{event}/{txn}":  c.redact,
		"GET v3/rooms/{room}/state":                 c.getState,
		"GET v3/rooms/{room}/state/{type}":          c.getStateEntry,
		"PUT v3/rooms/{room}/state/{type}":          c.putState,
		"GET v3/rooms/{room}/state/{type}/{key...}": c.getStateEntry,
		"PUT v3/rooms/{room}/state/{type}/{key...}": c.putState,
		"GET v3/rooms/{room}/members":               c.members,
		"GET v3/rooms/{room}/joined_members":        c.joinedMembers,
		"GET v3/rooms/{room}/event/{event}":         c.getEvent,
		"GET v3/rooms/{room}/messages":              c.messages,
		"GET v3/sync":                               c.sync,
	}
}

// authenticated finds out whose request it is. https://spec.matrix.org/v1.19/client-server-api/#using-access-tokens
func (c *clientAPI) authenticated(serve func(*request) (any, error)) endpoint {
	return func(q *http.Request) (any, error) {
		token := tokenOf(q)
		if token == "" {
			return nil, &mxfed.Error{Code: errMissingToken, Message: "an access token is needed", Status: http.StatusUnauthorized}
		}
		in, err := c.session(q.Context(), token)
		if err != nil {
			return nil, err
		}
		return serve(&request{q, in})
	}
}

func tokenOf(q *http.Request) string {
	if scheme, token, ok := strings.Cut(q.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return q.URL.Query().Get("access_token")
}

// fail answers with a standard error and logs what is the fault of a server.
// https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
func (c *clientAPI) fail(w http.ResponseWriter, q *http.Request, err error) {
	told := mxfed.ClientError(err)
	level := c.log.Debug
	if told.Status >= 500 && q.Context().Err() == nil {
		level = c.log.Error
	}
	level("client request", "method", q.Method, "path", q.URL.Path, "status", told.Status, "error", err)
	mxfed.WriteError(w, told)
}

// empty is what most changes are answered with.
type empty struct{}

// versions are those whose rules this server follows, in the part that it implements.
func (c *clientAPI) versions(*http.Request) (any, error) {
	all := strings.Fields("r0.6.1 v1.1 v1.2 v1.3 v1.4 v1.5 v1.6 v1.7 v1.8 v1.9 v1.10 v1.11 v1.12 v1.13 v1.14 v1.15 v1.16 v1.17 v1.18 v1.19")
	return map[string]any{"versions": all, "unstable_features": empty{}}, nil
}

// roomVersions are those of package mxfed.
func roomVersions() []string { return strings.Fields("1 2 3 4 5 6 7 8 9 10 11 12") }

func (c *clientAPI) capabilities(*request) (any, error) {
	rooms := make(map[string]string)
	for _, v := range roomVersions() {
		rooms[v] = "stable"
	}
	off, on := map[string]bool{"enabled": false}, map[string]bool{"enabled": true}
	return map[string]any{"capabilities": map[string]any{
		"m.room_versions":   map[string]any{"default": defaultVersion, "available": rooms},
		"m.profile_fields":  map[string]any{"enabled": true, "allowed": []string{"displayname", "avatar_url"}},
		"m.set_displayname": on, "m.set_avatar_url": on,
		"m.change_password": off, "m.3pid_changes": off, "m.get_login_token": off,
	}}, nil
}

// credentials are what register and login are given.
type credentials struct {
	Auth *struct {
		Type string `json:"type"`
	} `json:"auth"`
	Username     string `json:"username"`
	Password     string `json:"password"`
	Device       string `json:"device_id"`
	InhibitLogin bool   `json:"inhibit_login"`
	// Login only.
	Type       string `json:"type"`
	Identifier struct {
		Type string `json:"type"`
		User string `json:"user"`
	} `json:"identifier"`
	User string `json:"user"` // the old form of Identifier
}

// postRegister lets anybody in who completes a stage that asks for nothing.
// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3register
func (c *clientAPI) postRegister(q *http.Request) (any, error) {
	if kind := q.URL.Query().Get("kind"); kind != "" && kind != "user" {
		return nil, &mxfed.Error{Code: "M_GUEST_ACCESS_FORBIDDEN", Message: "there are no guests here", Status: http.StatusForbidden}
	}
	var in credentials
	if err := decode(q, &in); err != nil {
		return nil, err
	}
	if in.Auth == nil || in.Auth.Type != "m.login.dummy" {
		return unauthorized{"flows": flows("stages", []string{"m.login.dummy"}), "params": empty{}, "session": "any"}, nil
	}
	user, err := c.register(q.Context(), in.Username, in.Password)
	if err != nil || in.InhibitLogin {
		return map[string]any{"user_id": user}, err
	}
	return c.loggedIn(q.Context(), user, in.Device)
}

// unauthorized is an answer, not an error: it says how to go on.
// https://spec.matrix.org/v1.19/client-server-api/#user-interactive-authentication-api
type unauthorized map[string]any

// flows are the one way that there is.
func flows(key string, value any) []any { return []any{map[string]any{key: value}} }

func (c *clientAPI) loggedIn(ctx context.Context, user mxfed.UserID, device string) (any, error) {
	token, in, err := c.newToken(ctx, user, device)
	return map[string]any{"user_id": user, "access_token": token, "device_id": in.Device, "home_server": c.name}, err
}

func (c *clientAPI) available(q *http.Request) (any, error) {
	name := q.URL.Query().Get("username")
	if !localpart.MatchString(name) {
		return nil, &mxfed.Error{Code: errInvalidUser, Message: "that is no user name", Status: http.StatusBadRequest}
	}
	user := mxfed.UserID("@" + name + ":" + string(c.name))
	if _, err := c.profileOf(q.Context(), user); err == nil {
		return nil, &mxfed.Error{Code: errUserInUse, Message: "that name is taken", Status: http.StatusBadRequest}
	}
	return map[string]bool{"available": true}, nil
}

func (c *clientAPI) loginFlows(*http.Request) (any, error) {
	return map[string]any{"flows": flows("type", "m.login.password")}, nil
}

// https://spec.matrix.org/v1.19/client-server-api/#post_matrixclientv3login
func (c *clientAPI) postLogin(q *http.Request) (any, error) {
	var in credentials
	if err := decode(q, &in); err != nil {
		return nil, err
	}
	if in.Type != "m.login.password" {
		return nil, &mxfed.Error{Code: mxfed.ErrUnknown, Message: "only m.login.password is known", Status: http.StatusBadRequest}
	}
	user := mxfed.UserID(in.Identifier.User)
	if user == "" {
		user = mxfed.UserID(in.User)
	}
	if !strings.HasPrefix(string(user), "@") {
		user = mxfed.UserID("@" + string(user) + ":" + string(c.name))
	}
	if err := c.logIn(q.Context(), user, in.Password); err != nil {
		return nil, err
	}
	return c.loggedIn(q.Context(), user, in.Device)
}

func (c *clientAPI) postLogout(q *request) (any, error) {
	return empty{}, c.logOut(q.Context(), tokenOf(q.Request))
}

func (c *clientAPI) whoami(q *request) (any, error) {
	return map[string]any{"user_id": q.User, "device_id": q.Device, "is_guest": false}, nil
}
