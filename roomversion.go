package mxfed

import "slices"

// RoomVersion names the rules of a room. Versions "1" to "12" are supported; any other is refused, never guessed.
// https://spec.matrix.org/v1.19/rooms/
type RoomVersion string

// idFormat is how a room version finds the ID of an event.
type idFormat int

const (
	idGiven  idFormat = iota // in the member event_id
	idBase64                 // the reference hash in standard base64
	idURL                    // the reference hash in URL-safe base64
)

// roomRules are the rules of one room version. Algorithms switch on these fields, never on the version's name.
type roomRules struct {
	version RoomVersion

	eventID          idFormat
	canonicalJSON    bool  // numbers must be canonical
	maxDepth         int64 // of an event
	keyValidity      bool  // valid_until_ts binds the keys of events
	redaction        *redactionRules
	stringLevels     bool // power levels may be strings
	floatLevels      bool // power levels may be floats
	notifications    bool // of power levels are checked
	aliases          bool // m.room.aliases has an authorisation rule
	redactionRule    bool // m.room.redaction has one
	knock            bool
	restricted       bool
	knockRestricted  bool
	redactsInContent bool // the event that a redaction names is content.redacts
	creatorInContent bool // the creator is content.creator, not the sender of the create event
	hashRoomID       bool // the room's ID is the create event's, which has no room_id and is in no auth_events; creators are above all levels
}

// redactionRules list what a redacted event keeps.
type redactionRules struct {
	topLevel []string
	content  map[string][]string // by type; "*" keeps all of it
	signed   bool                // of a member event's third_party_invite, its member signed
}

// keeps returns the members of the content of an event of this type that survive; all: every one does.
func (r *redactionRules) keeps(typ string) (keys []string, all bool) {
	keys = r.content[typ]
	return keys, len(keys) == 1 && keys[0] == "*"
}

// stableVersions are the supported room versions in the order of their publication.
var stableVersions = func() (versions []*roomRules) {
	add := func(r roomRules) { versions = append(versions, &r) }
	redactionA, redactionB, redactionC, redactionD, redactionE := redactions()

	r := roomRules{version: "1", maxDepth: 1<<63 - 1, redaction: redactionA, stringLevels: true, floatLevels: true,
		aliases: true, redactionRule: true, creatorInContent: true}
	add(r) // https://spec.matrix.org/v1.19/rooms/v1/

	r.version = "2" // https://spec.matrix.org/v1.19/rooms/v2/ changes state resolution only
	add(r)

	r.version = "3" // https://spec.matrix.org/v1.19/rooms/v3/
	r.eventID = idBase64
	r.redactionRule = false
	add(r)

	r.version = "4" // https://spec.matrix.org/v1.19/rooms/v4/
	r.eventID = idURL
	add(r)

	r.version = "5" // https://spec.matrix.org/v1.19/rooms/v5/
	r.keyValidity = true
	add(r)

	r.version = "6" // https://spec.matrix.org/v1.19/rooms/v6/
	r.canonicalJSON, r.maxDepth, r.floatLevels = true, maxJSONInteger, false
	r.redaction = redactionB
	r.aliases, r.notifications = false, true
	add(r)

	r.version = "7" // https://spec.matrix.org/v1.19/rooms/v7/
	r.knock = true
	add(r)

	r.version = "8" // https://spec.matrix.org/v1.19/rooms/v8/
	r.restricted = true
	r.redaction = redactionC
	add(r)

	r.version = "9" // https://spec.matrix.org/v1.19/rooms/v9/
	r.redaction = redactionD
	add(r)

	r.version = "10" // https://spec.matrix.org/v1.19/rooms/v10/
	r.knockRestricted, r.stringLevels = true, false
	add(r)

	r.version = "11" // https://spec.matrix.org/v1.19/rooms/v11/
	r.redaction = redactionE
	r.creatorInContent, r.redactsInContent = false, true
	add(r)

	r.version = "12" // https://spec.matrix.org/v1.19/rooms/v12/
	r.hashRoomID = true
	add(r)
	return versions
}()

// redactions returns the five sets of redaction rules: of versions 1-5, 6-7, 8, 9-10 and 11-12.
func redactions() (a, b, c, d, e *redactionRules) {
	a = &redactionRules{
		topLevel: []string{"event_id", "type", "room_id", "sender", "state_key", "content", "hashes", "signatures", "depth",
			"prev_events", "auth_events", "origin_server_ts", "origin", "membership", "prev_state"},
		content: map[string][]string{
			"m.room.member":             {"membership"},
			"m.room.create":             {"creator"},
			"m.room.join_rules":         {"join_rule"},
			"m.room.aliases":            {"aliases"},
			"m.room.history_visibility": {"history_visibility"},
			"m.room.power_levels":       {"ban", "events", "events_default", "kick", "redact", "state_default", "users", "users_default"},
		},
	}
	b = a.change("m.room.aliases")
	c = b.change("m.room.join_rules", "join_rule", "allow")
	d = c.change("m.room.member", "membership", "join_authorised_via_users_server")
	e = d.change("m.room.create", "*").change("m.room.redaction", "redacts")
	e = e.change("m.room.power_levels", append([]string{"invite"}, a.content["m.room.power_levels"]...)...)
	e.topLevel, e.signed = a.topLevel[:12], true
	return a, b, c, d, e
}

// change returns a copy that keeps these members of the content of events of one type.
func (r *redactionRules) change(typ string, keep ...string) *redactionRules {
	next := &redactionRules{topLevel: r.topLevel, content: map[string][]string{typ: keep}}
	for t, keys := range r.content {
		if t != typ {
			next.content[t] = keys
		}
	}
	return next
}

// rules returns the rules of v, nil if v is not supported.
func (v RoomVersion) rules() *roomRules {
	i := slices.IndexFunc(stableVersions, func(r *roomRules) bool { return r.version == v })
	if i < 0 {
		return nil
	}
	return stableVersions[i]
}
