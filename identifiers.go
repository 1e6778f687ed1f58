package mxfed

import (
	"encoding/base64"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxIDLength is the limit of user, room and event IDs, event types and state keys, in bytes.
// https://spec.matrix.org/v1.19/client-server-api/#size-limits
const maxIDLength = 255

// UserID is "@localpart:server". Localparts that are only historically valid are accepted from other servers.
// https://spec.matrix.org/v1.19/appendices/#user-identifiers
type UserID string

// Server is what follows the first colon.
func (u UserID) Server() ServerName {
	_, server, _ := strings.Cut(string(u), ":")
	return ServerName(server)
}

// valid tells whether u is a user ID, historical localparts included.
func (u UserID) valid() bool {
	local, server, ok := strings.Cut(string(u), ":")
	return ok && strings.HasPrefix(local, "@") && len(u) <= maxIDLength && utf8.ValidString(local) &&
		strings.IndexByte(local, 0) < 0 && ServerName(server).valid()
}

// RoomID is an opaque identifier of a room; its form depends on the room version.
// https://spec.matrix.org/v1.19/appendices/#room-ids
type RoomID string

// fits tells whether id has the form of a room ID in the room version.
func (id RoomID) fits(rules *roomRules) bool {
	if rules.hashRoomID {
		return len(id) == 44 && id[0] == '!' && isURLBase64(string(id[1:]))
	}
	opaque, server, ok := strings.Cut(string(id), ":")
	return ok && strings.HasPrefix(opaque, "!") && len(id) <= maxIDLength && utf8.ValidString(opaque) &&
		strings.IndexByte(opaque, 0) < 0 && ServerName(server).valid()
}

func isURLBase64(s string) bool {
	_, err := base64.RawURLEncoding.DecodeString(s)
	return err == nil && !strings.ContainsAny(s, "\r\n")
}

// EventID is an opaque identifier of an event. https://spec.matrix.org/v1.19/appendices/#event-ids
type EventID string

// valid tells whether id has the form that all room versions share.
func (id EventID) valid() bool {
	return strings.HasPrefix(string(id), "$") && len(id) > 1 && len(id) <= maxIDLength && utf8.ValidString(string(id))
}

// server is the domain of an event ID of room versions 1 and 2.
func (id EventID) server() ServerName {
	_, server, _ := strings.Cut(string(id), ":")
	return ServerName(server)
}

// StateKey names one entry of a room's state.
type StateKey struct{ Type, Key string }

// withKeys appends those of keys that list does not have yet.
func withKeys(list []StateKey, keys ...StateKey) []StateKey {
	for _, k := range keys {
		if !slices.Contains(list, k) {
			list = append(list, k)
		}
	}
	return list
}
