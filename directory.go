package mxfed

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// This file answers and asks two small questions: which room an alias stands for, and what software a server runs.

// RoomAlias is "#localpart:server", a name of a room that its server can change.
// https://spec.matrix.org/v1.19/appendices/#room-aliases
type RoomAlias string

// Server is what follows the first colon: the server that knows which room it is.
func (a RoomAlias) Server() ServerName {
	_, server, _ := strings.Cut(string(a), ":")
	return ServerName(server)
}

func (a RoomAlias) valid() bool {
	local, server, ok := strings.Cut(string(a), ":")
	return ok && strings.HasPrefix(local, "#") && len(a) <= maxIDLength && utf8.ValidString(local) &&
		strings.IndexByte(local, 0) < 0 && ServerName(server).valid()
}

// AliasResponse is the answer about an alias. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1querydirectory
type AliasResponse struct {
	Room RoomID
	// Servers are in the room, so that a join can go through them.
	Servers []ServerName
}

// MarshalJSON returns the answer as it goes over the wire.
func (r *AliasResponse) MarshalJSON() ([]byte, error) { return []byte(r.body()), nil }

func (r *AliasResponse) body() value {
	servers := make([]value, 0, len(r.Servers))
	for _, s := range r.Servers {
		servers = append(servers, quoted(s))
	}
	return object(field{"room_id", quoted(r.Room)}, field{"servers", array(servers...)})
}

// DirectoryHost knows the aliases of its own names. A Client is the DirectoryHost of all others.
type DirectoryHost interface {
	// ResolveAlias returns the room that an alias of an own name stands for, and some servers that are in it, those that
	// are worth trying first in front. ErrNotFound: there is no such alias. Another Error or ErrorCode decides the answer
	// as well, other errors are 500.
	ResolveAlias(ctx context.Context, alias RoomAlias) (*AliasResponse, error)
}

// DirectoryHostFunc is a DirectoryHost that is one function.
type DirectoryHostFunc func(ctx context.Context, alias RoomAlias) (*AliasResponse, error)

// ResolveAlias calls f.
func (f DirectoryHostFunc) ResolveAlias(ctx context.Context, alias RoomAlias) (*AliasResponse, error) {
	return f(ctx, alias)
}

// NewDirectoryHandler serves GET query/directory. Other queries are answered with 404 M_UNRECOGNIZED.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1querydirectory
func NewDirectoryHandler(s *Server, host DirectoryHost) http.Handler {
	serve := func(ctx context.Context, w http.ResponseWriter, in *incoming) error {
		if !in.query.Has("room_alias") {
			return refuse(ErrMissingParam, "room_alias is missing")
		}
		alias := RoomAlias(in.query.Get("room_alias"))
		if !alias.valid() || s.client.signer(alias.Server()) == nil {
			return refuse(ErrInvalidParam, "room_alias is no alias of this server")
		}
		answer, err := host.ResolveAlias(ctx, alias)
		if err != nil {
			return err
		}
		if answer == nil {
			return refuse(ErrNotFound, "there is no such alias")
		}
		writeJSON(w, http.StatusOK, answer.body())
		return nil
	}
	directory := &endpoint{server: s, name: "query", method: http.MethodGet, versions: []string{"v1"}, params: 1, serve: serve}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if t, err := parseTarget(r); err == nil && !slices.Equal(t.params, []string{"directory"}) {
			s.refuse(w, r, errUnrecognized(http.StatusNotFound))
			return
		}
		directory.ServeHTTP(w, r)
	})
}

// maxAliasServers bounds the servers that an answer is read for.
const maxAliasServers = 100

// ResolveAlias asks the server of alias which room it stands for and through which servers it can be joined: 100 at most,
// each once, without names that are none. An alias that does not exist is ErrNotFound, one of an own name
// ErrInvalidParam: it is the host that knows those. Nothing proves the answer but that its server gave it.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1querydirectory
func (c *Client) ResolveAlias(ctx context.Context, alias RoomAlias) (*AliasResponse, error) {
	to := alias.Server()
	if !alias.valid() {
		return nil, refuse(ErrInvalidParam, "%q is no room alias", alias)
	}
	if c.signer(to) != nil {
		return nil, refuse(ErrInvalidParam, "%s is an alias of this server", alias)
	}
	q := &call{from: c.own[0], to: to, endpoint: "query", method: http.MethodGet,
		uri: federationURI("v1", "query", "directory") + "?room_alias=" + url.QueryEscape(string(alias))}
	answer, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	room, _ := answer.get("room_id").str()
	if id := RoomID(room); !id.fits(RoomVersion("11").rules()) && !id.fits(RoomVersion("12").rules()) {
		return nil, c.malformed(to, q.endpoint, errors.New("room_id is no room ID"))
	}
	found := &AliasResponse{Room: RoomID(room)}
	for entry := range answer.get("servers").elements() {
		name, _ := entry.str()
		server := ServerName(name)
		if len(found.Servers) < maxAliasServers && server.valid() && !slices.Contains(found.Servers, server) {
			found.Servers = append(found.Servers, server)
		}
	}
	return found, nil
}

// ServerVersion is the name and version of a server's software.
type ServerVersion struct {
	Name, Version string
}

// MarshalJSON returns the answer as it goes over the wire.
func (v *ServerVersion) MarshalJSON() ([]byte, error) { return []byte(v.body()), nil }

func (v *ServerVersion) body() value {
	clean := func(s string) value { return quoted(strings.ToValidUTF8(s, "\uFFFD")) }
	return object(field{"server", object(field{"name", clean(v.Name)}, field{"version", clean(v.Version)})})
}

// NewVersionHandler serves GET version, which anybody may ask.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1version
func NewVersionHandler(s *Server, v ServerVersion) http.Handler {
	body := v.body()
	serve := func(w http.ResponseWriter, _ *http.Request) error {
		writeJSON(w, http.StatusOK, body)
		return nil
	}
	return &openEndpoint{server: s, name: "version", methods: []string{http.MethodGet}, serve: serve}
}

// Version asks a server what software it runs. It answers what it likes, in 255 bytes each, or nothing.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1version
func (c *Client) Version(ctx context.Context, to ServerName) (*ServerVersion, error) {
	q := &call{from: c.own[0], to: to, endpoint: "version", method: http.MethodGet, uri: federationURI("v1", "version")}
	answer, err := c.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	name, _ := answer.get("server").get("name").str()
	version, _ := answer.get("server").get("version").str()
	if len(name) > maxIDLength || len(version) > maxIDLength {
		return nil, c.malformed(to, q.endpoint, fmt.Errorf("name or version is longer than %d bytes", maxIDLength))
	}
	return &ServerVersion{Name: name, Version: version}, nil
}
