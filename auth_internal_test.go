package mxfed

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Alice creates every room of these tests; her server and the room's are the same.
const (
	authAlice = "@alice:a.example"
	authBob   = "@bob:b.example"
	authCarol = "@carol:c.example"
	authDave  = "@dave:d.example"
)

// authEntry is an event of a test, without what the rules do not look at.
type authEntry struct {
	sender, typ string
	key         *string // nil: no state event
	content     value
	prev        []string // IDs; "create" stands for the create event's
	redacts     string
	foreign     bool // of another room
}

func authEvent(sender, typ, key string, content value) authEntry {
	return authEntry{sender: sender, typ: typ, key: &key, content: content}
}

func authMember(user, membership string) authEntry {
	return authChange(user, user, membership)
}

// authChange is a member event that the sender makes for somebody.
func authChange(sender, user, membership string) authEntry {
	return authEvent(sender, typeMember, user, object(field{"membership", quoted(membership)}))
}

// authJoin is a join with the name of a user who authorises it.
func authJoin(user, authoriser string) authEntry {
	e := authMember(user, "join")
	e.content = e.content.with("join_authorised_via_users_server", quoted(authoriser))
	return e
}

func authRule(rule string) authEntry {
	return authEvent(authAlice, typeJoinRules, "", object(field{"join_rule", quoted(rule)}))
}

func authLevels(content value) authEntry { return authEvent(authAlice, typePowerLevels, "", content) }

func authMessage(sender string) authEntry {
	return authEntry{sender: sender, typ: "m.room.message", content: `{}`}
}

// authRoom makes events of one room of one version.
type authRoom struct {
	rules  *roomRules
	create *Event
	made   int
}

// newAuthRoom makes a room whose create event has this content beside what its version demands.
func newAuthRoom(t *testing.T, rules *roomRules, content value) *authRoom {
	r := &authRoom{rules: rules}
	if content == "" {
		content = `{}`
	}
	if rules.creatorInContent && content.get("creator") == "" {
		content = content.with("creator", quoted(authAlice))
	}
	r.create = r.event(t, authEvent(authAlice, typeCreate, "", content.with("room_version", quoted(rules.version))))
	return r
}

func (r *authRoom) event(t *testing.T, a authEntry) *Event {
	t.Helper()
	e, err := r.parse(a)
	require.NoError(t, err, "room version %s: %s", r.rules.version, a.content)
	return e
}

func (r *authRoom) parse(a authEntry) (*Event, error) {
	r.made++
	fields := []field{
		{"type", quoted(a.typ)}, {"sender", quoted(a.sender)}, {"content", a.content}, {"depth", "1"},
		{"origin_server_ts", integer(int64(r.made))}, {"hashes", `{"sha256":""}`}, {"signatures", "{}"}, {"auth_events", "[]"},
	}
	if a.key != nil {
		fields = append(fields, field{"state_key", quoted(*a.key)})
	}
	if !r.rules.hashRoomID || a.typ != typeCreate || a.key == nil {
		fields = append(fields, field{"room_id", quoted(r.roomID(a.foreign))})
	}
	if r.rules.eventID == idGiven {
		id := fmt.Sprintf("$%d:%s", r.made, UserID(a.sender).Server())
		fields = append(fields, field{"event_id", quoted(id)})
	}
	if a.redacts != "" {
		fields = append(fields, field{"redacts", quoted(a.redacts)})
	}
	fields = append(fields, field{"prev_events", r.references(a.prev)})
	return ParseEvent(r.rules.version, []byte(object(fields...)))
}

func (r *authRoom) roomID(foreign bool) RoomID {
	switch {
	case foreign && r.rules.hashRoomID:
		return RoomID("!" + strings.Repeat("A", 43))
	case foreign:
		return "!room:b.example"
	case r.create != nil:
		return r.create.room
	case r.rules.hashRoomID:
		return RoomID("!" + strings.Repeat("B", 43))
	}
	return "!room:a.example"
}

func (r *authRoom) references(ids []string) value {
	var list []value
	for _, id := range ids {
		switch {
		case id == "create":
			list = append(list, r.create.reference())
		case r.rules.eventID == idGiven:
			list = append(list, array(quoted(id), `{}`))
		default:
			list = append(list, quoted(id))
		}
	}
	return array(list...)
}

// authCase is one event in one state.
type authCase struct {
	create  value // content of the create event
	state   []authEntry
	event   authEntry
	signed  bool   // by the server of the user who authorises a join
	allowed string // the room versions in which it is allowed, such as "1-5,8"
	only    string // the room versions in which such events exist
}

// runAuthCases runs every case in every room version.
func runAuthCases(t *testing.T, cases map[string]authCase) {
	for name, c := range cases {
		for _, rules := range stableVersions {
			if c.only != "" && !authVersions(t, c.only, rules) {
				continue
			}
			t.Run(name+"/"+string(rules.version), func(t *testing.T) {
				r := newAuthRoom(t, rules, c.create)
				var state []*Event
				if !rules.hashRoomID {
					state = append(state, r.create)
				}
				for _, a := range c.state {
					state = append(state, r.event(t, a))
				}
				err := authorise(r.event(t, c.event), stateOf(state, r.create), c.signed)
				requireAuth(t, authVersions(t, c.allowed, rules), err)
			})
		}
	}
}

func requireAuth(t *testing.T, allowed bool, err error) {
	t.Helper()
	if allowed {
		require.NoError(t, err)
		return
	}
	require.ErrorIs(t, err, ErrForbidden)
	require.NotEmpty(t, answerTo(err).Message)
}

// authVersions tells whether a list such as "1-5,8" names the version of rules.
func authVersions(t *testing.T, list string, rules *roomRules) bool {
	if list == "none" {
		return false
	}
	n, err := strconv.Atoi(string(rules.version))
	require.NoError(t, err)
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		require.NoError(t, err)
		to, err := strconv.Atoi(last)
		require.NoError(t, err)
		if from <= n && n <= to {
			return true
		}
	}
	return false
}

func TestAuth_Create(t *testing.T) {
	for name, c := range map[string]struct {
		event   authEntry
		allowed string
	}{
		"plain":                           {authEntry{content: `{}`}, "1-12"},
		"prev_events":                     {authEntry{content: `{}`, prev: []string{"$x"}}, "none"},
		"state key":                       {authEntry{content: `{}`, key: new(string)}, "none"},
		"room of another server":          {authEntry{content: `{}`, foreign: true}, "12"}, // where no room ID is written
		"sender on another server":        {authEntry{content: `{}`, sender: authBob}, "12"},
		"known room version":              {authEntry{content: `{"room_version":"1"}`}, "1-12"},
		"unknown room version":            {authEntry{content: `{"room_version":"12.1"}`}, "none"},
		"number as room version":          {authEntry{content: `{"room_version":1}`}, "none"},
		"null as room version":            {authEntry{content: `{"room_version":null}`}, "none"},
		"no creator":                      {authEntry{content: `{"creator":""}`}, "11-12"},
		"number as creator":               {authEntry{content: `{"creator":1}`}, "11-12"},
		"additional creators":             {authEntry{content: `{"additional_creators":["@bob:b.example","@É :c.example"]}`}, "1-12"},
		"no additional creators":          {authEntry{content: `{"additional_creators":[]}`}, "1-12"},
		"string as additional creators":   {authEntry{content: `{"additional_creators":"@bob:b.example"}`}, "1-11"},
		"object as additional creators":   {authEntry{content: `{"additional_creators":{}}`}, "1-11"},
		"null as additional creators":     {authEntry{content: `{"additional_creators":null}`}, "1-11"},
		"number among the creators":       {authEntry{content: `{"additional_creators":["@bob:b.example",1]}`}, "1-11"},
		"no user ID among the creators":   {authEntry{content: `{"additional_creators":["@bob"]}`}, "1-11"},
		"long user ID among the creators": {authEntry{content: value(`{"additional_creators":["@` + strings.Repeat("b", 250) + `:b.example"]}`)}, "1-11"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, rules := range stableVersions {
				r, e := &authRoom{rules: rules}, c.event
				e.typ = typeCreate
				if e.sender == "" {
					e.sender = authAlice
				}
				if e.key != nil {
					*e.key = "x"
				} else {
					e.key = new(string)
				}
				switch e.content.get("creator") {
				case "":
					e.content = e.content.with("creator", quoted(authAlice))
				case `""`:
					e.content = e.content.with("creator", "")
				}
				err := authorise(r.event(t, e), stateOf(nil, nil), false)
				requireAuth(t, authVersions(t, c.allowed, rules), err)
			}
		})
	}
	for _, rules := range stableVersions {
		r := &authRoom{rules: rules}
		message := authEntry{sender: authAlice, typ: typeCreate, content: `{"creator":"@alice:a.example"}`}
		requireAuth(t, false, authorise(r.event(t, message), stateOf(nil, nil), false))
	}
}

// The room of version 12 is named by the hash of its create event.
func TestAuth_CreateWithRoomID(t *testing.T) {
	const event = `{"type":"m.room.create","state_key":"","sender":"@alice:a.example","content":{"creator":"@alice:a.example"},
		"room_id":"!room:a.example","depth":1,"origin_server_ts":1,"prev_events":[],"auth_events":[],"hashes":{"sha256":""},"signatures":{}}`
	_, err := ParseEvent("12", []byte(event))
	require.Error(t, err)
	e, err := ParseEvent("11", []byte(event))
	require.NoError(t, err)
	require.NoError(t, authorise(e, stateOf(nil, nil), false))
}

func TestAuth_CreateOfRoom(t *testing.T) {
	for _, rules := range stableVersions {
		r, other := newAuthRoom(t, rules, ""), newAuthRoom(t, rules, `{"other":true}`)
		if !rules.hashRoomID {
			foreign := authEvent(authBob, typeCreate, "", object(field{"creator", quoted(authBob)}))
			foreign.foreign = true
			other.create = other.event(t, foreign)
		}
		member, message := r.event(t, authMember(authAlice, "join")), r.event(t, authMessage(authAlice))
		require.NoError(t, authorise(message, stateOf([]*Event{member}, r.create), false))
		requireAuth(t, false, authorise(message, stateOf([]*Event{member}, nil), false))
		requireAuth(t, false, authorise(message, stateOf([]*Event{member}, other.create), false))
	}
}

func TestAuth_ClosedRoom(t *testing.T) {
	public := []authEntry{authMember(authAlice, "join"), authMember("@al:a.example", "join"), authMember(authBob, "join"), authRule("public")}
	alias := authEvent(authBob, typeAliases, "b.example", `{}`)
	runAuthCases(t, map[string]authCase{
		"own server":             {create: `{"m.federate":false}`, state: public, event: authMessage(authAlice), allowed: "1-12"},
		"other user":             {create: `{"m.federate":false}`, state: public, event: authMessage("@al:a.example"), allowed: "1-12"},
		"other server":           {create: `{"m.federate":false}`, state: public, event: authMessage(authBob), allowed: "none"},
		"join of another server": {create: `{"m.federate":false}`, state: public, event: authMember(authCarol, "join"), allowed: "none"},
		"aliases":                {create: `{"m.federate":false}`, state: public, event: alias, allowed: "none"},
		"open":                   {create: `{"m.federate":true}`, state: public, event: authMessage(authBob), allowed: "1-12"},
		"string":                 {create: `{"m.federate":"false"}`, state: public, event: authMessage(authBob), allowed: "1-12"},
		"null":                   {create: `{"m.federate":null}`, state: public, event: authMessage(authBob), allowed: "1-12"},
		"not said":               {state: public, event: authMessage(authBob), allowed: "1-12"},
	})
}

func TestAuth_Aliases(t *testing.T) {
	aliases := func(sender, key string) authEntry { return authEvent(sender, typeAliases, key, `{}`) }
	joined := []authEntry{authMember(authAlice, "join"), authMember(authBob, "join")}
	runAuthCases(t, map[string]authCase{
		"of a user without power":   {state: joined, event: aliases(authBob, "b.example"), allowed: "1-5"},
		"of a user not in the room": {event: aliases(authBob, "b.example"), allowed: "1-5"},
		"of another server":         {state: joined, event: aliases(authAlice, "b.example"), allowed: "6-12"},
		"without state key":         {state: joined, event: authEntry{sender: authBob, typ: typeAliases, content: `{}`}, allowed: "6-12"},
		"empty state key":           {state: joined, event: aliases(authBob, ""), allowed: "none"},
	})
}

func TestAuth_SenderIsInRoom(t *testing.T) {
	cases := map[string]authCase{
		"nothing":   {event: authMessage(authBob), allowed: "none"},
		"of others": {state: []authEntry{authMember(authAlice, "join")}, event: authMessage(authBob), allowed: "none"},
		"creator":   {event: authMessage(authAlice), allowed: "none"},
		"malformed": {state: []authEntry{authEvent(authBob, typeMember, authBob, `{"membership":["join"]}`)}, event: authMessage(authBob), allowed: "none"},
	}
	for membership, allowed := range map[string]string{"join": "1-12", "invite": "none", "leave": "none", "ban": "none", "knock": "none", "none": "none", "": "none"} {
		cases["member "+membership] = authCase{state: []authEntry{authMember(authBob, membership)}, event: authMessage(authBob), allowed: allowed}
	}
	runAuthCases(t, cases)
}

func TestAuth_ThirdPartyInviteEvent(t *testing.T) {
	promise := func(key string) authEntry { return authEvent(authBob, typeThirdPartyInvite, key, `{}`) }
	state := func(bob string, levels value) []authEntry {
		return []authEntry{authMember(authBob, bob), authLevels(levels)}
	}
	runAuthCases(t, map[string]authCase{
		"invite level":         {state: state("join", `{"invite":20,"users":{"@bob:b.example":20}}`), event: promise("token"), allowed: "1-12"},
		"less":                 {state: state("join", `{"invite":20,"users":{"@bob:b.example":19}}`), event: promise("token"), allowed: "none"},
		"default level":        {state: state("join", `{"state_default":50}`), event: promise("token"), allowed: "1-12"},
		"level of the type":    {state: state("join", `{"events":{"m.room.third_party_invite":50}}`), event: promise("token"), allowed: "1-12"},
		"state key of another": {state: state("join", `{}`), event: promise(authCarol), allowed: "1-12"},
		"not in the room":      {state: state("leave", `{}`), event: promise("token"), allowed: "none"},
	})
}

func TestAuth_RequiredLevel(t *testing.T) {
	joined := []authEntry{authMember(authAlice, "join"), authMember(authBob, "join")}
	with := func(levels value) []authEntry { return append(slices.Clone(joined), authLevels(levels)) }
	message := authMessage(authBob)
	name := authEvent(authBob, "m.room.name", "", `{}`)
	byAlice := authEvent(authAlice, "m.room.name", "", `{}`)
	runAuthCases(t, map[string]authCase{
		"message by default":             {state: joined, event: message, allowed: "1-12"},
		"state by default":               {state: joined, event: name, allowed: "none"},
		"state of the creator":           {state: joined, event: byAlice, allowed: "1-12"},
		"state of an old creator":        {create: `{"creator":"@bob:b.example"}`, state: joined, event: name, allowed: "1-10"},
		"state of another creator":       {create: `{"additional_creators":["@carol:c.example","@bob:b.example"]}`, state: joined, event: name, allowed: "12"},
		"strange additional creators":    {create: `{"additional_creators":[1,{"@bob:b.example":1},null]}`, state: joined, event: name, allowed: "none"},
		"creator without a level":        {state: with(`{}`), event: byAlice, allowed: "12"},
		"creator below all levels":       {state: with(`{"state_default":9007199254740991,"users_default":-1}`), event: byAlice, allowed: "12"},
		"message, default of levels":     {state: with(`{}`), event: message, allowed: "1-12"},
		"message, events_default":        {state: with(`{"events_default":1}`), event: message, allowed: "none"},
		"message, equal":                 {state: with(`{"events_default":1,"users_default":1}`), event: message, allowed: "1-12"},
		"message, not state_default":     {state: with(`{"state_default":1}`), event: message, allowed: "1-12"},
		"message, level of the type":     {state: with(`{"events_default":1,"events":{"m.room.message":0}}`), event: message, allowed: "1-12"},
		"message, level of another type": {state: with(`{"events":{"m.room.messag":1,"m.room.message.x":1,"a":1}}`), event: message, allowed: "1-12"},
		"message, high level":            {state: with(`{"events":{"a":0,"m.room.message":1,"z":0}}`), event: message, allowed: "none"},
		"negative user":                  {state: with(`{"users":{"@bob:b.example":-1}}`), event: message, allowed: "none"},
		"state, default of levels":       {state: with(`{"users":{"@bob:b.example":49}}`), event: name, allowed: "none"},
		"state, equal":                   {state: with(`{"users":{"@a:a":0,"@bob:b.example":50,"@c:c":0}}`), event: name, allowed: "1-12"},
		"state, state_default":           {state: with(`{"state_default":0}`), event: name, allowed: "1-12"},
		"state, not events_default":      {state: with(`{"events_default":0}`), event: name, allowed: "none"},
		"state, level of the type":       {state: with(`{"events":{"m.room.name":0}}`), event: name, allowed: "1-12"},
	})
}

func TestAuth_StateKeyOfUser(t *testing.T) {
	state := []authEntry{authMember(authAlice, "join"), authMember(authBob, "join"), authLevels(`{"state_default":0}`)}
	event := func(key string) authCase {
		return authCase{state: state, event: authEvent(authBob, "org.example", key, `{}`), allowed: "none"}
	}
	own, plain := event(authBob), event("bob:b.example")
	own.allowed, plain.allowed = "1-12", "1-12"
	runAuthCases(t, map[string]authCase{"own": own, "plain": plain, "another's": event(authAlice), "own and more": event(authBob + "_"), "no user ID": event("@")})
}

func TestAuth_Redaction(t *testing.T) {
	state := func(levels value) []authEntry { return []authEntry{authMember(authBob, "join"), authLevels(levels)} }
	redaction := func(id string) authEntry {
		return authEntry{sender: authBob, typ: typeRedaction, content: `{}`, redacts: id}
	}
	runAuthCases(t, map[string]authCase{
		"own server":        {state: state(`{}`), event: redaction("$x:b.example"), allowed: "1-12"},
		"other server":      {state: state(`{}`), event: redaction("$x:c.example"), allowed: "3-12"},
		"with a port":       {state: state(`{}`), event: redaction("$x:b.example:8448"), allowed: "3-12"},
		"redact level":      {state: state(`{"redact":10,"users":{"@bob:b.example":10}}`), event: redaction("$x:c.example"), allowed: "1-12"},
		"less":              {state: state(`{"redact":10,"users":{"@bob:b.example":9}}`), event: redaction("$x:c.example"), allowed: "3-12"},
		"default level":     {state: state(`{"users":{"@bob:b.example":50}}`), event: redaction("$x:c.example"), allowed: "1-12"},
		"less than default": {state: state(`{"users":{"@bob:b.example":49}}`), event: redaction("$x:c.example"), allowed: "3-12"},
		"of nothing":        {state: state(`{}`), event: redaction(""), allowed: "3-12"},
		"of no event ID":    {state: state(`{}`), event: redaction("x:b.example"), allowed: "3-12"},
		"without domain":    {state: state(`{}`), event: redaction("$x"), allowed: "3-12"},
		"level of the type": {state: state(`{"events":{"m.room.redaction":1}}`), event: redaction("$x:b.example"), allowed: "none"},
	})
}

// A state that does not tell who has which power lets nobody do anything.
func TestAuth_BrokenState(t *testing.T) {
	for _, rules := range stableVersions {
		r := newAuthRoom(t, rules, "")
		member := r.event(t, authMember(authAlice, "join"))
		state := []*Event{member, r.event(t, authRule("public"))}
		broken := append(slices.Clone(state), r.event(t, authLevels(`{"ban":null}`)))
		for _, a := range []authEntry{authMessage(authAlice), authMember(authAlice, "leave"), authMember(authBob, "join"), authChange(authAlice, authBob, "ban")} {
			e := r.event(t, a)
			require.NoError(t, authorise(e, stateOf(state, r.create), false))
			requireAuth(t, false, authorise(e, stateOf(broken, r.create), false))
		}
		for name, events := range map[string]stateFunc{"levels": stateOf(broken, r.create), "create": stateOf(state, nil)} {
			require.EqualValues(t, math.MinInt64, powerOf(events, authAlice), name)
			require.False(t, mayInvite(events, authAlice), name)
		}
	}
}

func TestAuth_StateOf(t *testing.T) {
	r := newAuthRoom(t, RoomVersion("12").rules(), "")
	bob, message := r.event(t, authMember(authBob, "join")), r.event(t, authMessage(authBob))
	state := stateOf([]*Event{nil, message, bob, r.event(t, authMember(authBob, "leave"))}, r.create)
	require.Equal(t, bob, state(typeMember, authBob))
	require.Equal(t, r.create, state(typeCreate, ""))
	require.Nil(t, state(typeMember, authAlice))
	require.Nil(t, state("m.room.message", ""))
	require.Nil(t, stateOf([]*Event{bob}, nil)(typeCreate, ""))
}

func TestAuth_MembershipOf(t *testing.T) {
	r := newAuthRoom(t, RoomVersion("10").rules(), "")
	events := []*Event{
		r.event(t, authMember(authBob, "knock")), r.event(t, authEvent(authCarol, typeMember, authCarol, `{"membership":1}`)),
	}
	for user, want := range map[UserID]string{authBob: "knock", authCarol: "", authDave: "none", "": "none"} {
		require.Equal(t, want, membershipOf(stateOf(events, r.create), user), user)
	}
}

func TestAuth_JoinRuleOf(t *testing.T) {
	for content, known := range map[value]string{
		`{"join_rule":"public"}`: "1-12", `{"join_rule":"invite"}`: "1-12", `{"join_rule":"knock"}`: "7-12",
		`{"join_rule":"restricted"}`: "8-12", `{"join_rule":"knock_restricted"}`: "10-12", `{"join_rule":"private"}`: "none",
		`{"join_rule":"Public"}`: "none", `{"join_rule":["public"]}`: "none", `{"join_rule":null}`: "none", `{"join_rule":""}`: "none",
	} {
		for _, rules := range stableVersions {
			r := newAuthRoom(t, rules, "")
			e := r.event(t, authEvent(authAlice, typeJoinRules, "", content))
			want, _ := content.get("join_rule").str()
			if !authVersions(t, known, rules) {
				want = "other"
			}
			require.Equal(t, want, joinRuleOf(rules, stateOf([]*Event{e}, nil)), "%s in %s", content, rules.version)
			require.Equal(t, "invite", joinRuleOf(rules, stateOf(nil, nil)))
			empty := r.event(t, authEvent(authAlice, typeJoinRules, "", `{}`))
			require.Equal(t, "invite", joinRuleOf(rules, stateOf([]*Event{empty}, nil)))
		}
	}
}

func TestAuth_PowerOf(t *testing.T) {
	for _, rules := range stableVersions {
		r := newAuthRoom(t, rules, `{"additional_creators":["@carol:c.example"]}`)
		founder, second, levelled := int64(100), int64(0), int64(7)
		if rules.hashRoomID {
			founder, second, levelled = math.MaxInt64, math.MaxInt64, math.MaxInt64
		}
		bare := stateOf(nil, r.create)
		require.Equal(t, founder, powerOf(bare, authAlice))
		require.Equal(t, second, powerOf(bare, authCarol))
		require.Zero(t, powerOf(bare, authBob))
		state := stateOf([]*Event{r.event(t, authLevels(`{"users":{"@bob:b.example":1},"users_default":7}`))}, r.create)
		require.Equal(t, levelled, powerOf(state, authAlice))
		require.Equal(t, levelled, powerOf(state, authCarol))
		require.EqualValues(t, 1, powerOf(state, authBob))
		require.EqualValues(t, 7, powerOf(state, authDave))
	}
}

func TestAuth_MayInvite(t *testing.T) {
	for _, rules := range stableVersions {
		r := newAuthRoom(t, rules, "")
		levels := r.event(t, authLevels(`{"invite":5,"users":{"@bob:b.example":5,"@carol:c.example":4,"@dave:d.example":5}}`))
		state := stateOf([]*Event{
			r.event(t, authMember(authAlice, "join")), r.event(t, authMember(authBob, "join")),
			r.event(t, authMember(authCarol, "join")), r.event(t, authMember(authDave, "invite")), levels,
		}, r.create)
		require.Equal(t, rules.hashRoomID, mayInvite(state, authAlice))
		require.True(t, mayInvite(state, authBob))
		require.False(t, mayInvite(state, authCarol))
		require.False(t, mayInvite(state, authDave))
	}
}

// Whatever the content of an event or of the state, the rules answer, and strangers to the room get no further.
func TestAuth_StrangeContent(t *testing.T) {
	contents := []value{`{}`, `{"membership":1}`, `{"membership":"join","third_party_invite":1}`,
		`{"membership":"invite","third_party_invite":{"signed":[]}}`, `{"additional_creators":1,"creator":{},"m.federate":1}`,
		`{"ban":[],"events":1,"users":[]}`, `{"users":{"":null}}`, `{"join_rule":{}}`, `{"membership":"leave","join_authorised_via_users_server":{}}`,
		`{"membership":"invite","third_party_invite":{"signed":{"mxid":"","token":"","signatures":{"":{"ed25519:":""}}}},"public_keys":[[],1,{"public_key":{}}]}`}
	types := []string{typeMember, typePowerLevels, typeJoinRules, typeThirdPartyInvite, typeAliases, typeRedaction, "m.room.message"}
	for _, rules := range stableVersions {
		for _, inState := range contents {
			r := newAuthRoom(t, rules, inState)
			state := []*Event{nil}
			for _, typ := range types {
				state = append(state, r.event(t, authEvent(authBob, typ, "", inState)))
			}
			for _, content := range contents {
				for _, typ := range types {
					e := r.event(t, authEvent(authBob, typ, "", content))
					requireAuth(t, false, authorise(e, stateOf(state, r.create), true))
				}
			}
		}
	}
}

// A join answer holds hundreds of thousands of events: to judge an ordinary one takes no memory.
func TestAuth_AllocatesNothing(t *testing.T) {
	for _, rules := range stableVersions {
		r := newAuthRoom(t, rules, "")
		auth := []*Event{r.event(t, authLevels(`{"users":{"@bob:b.example":1}}`)), r.event(t, authRule("public")), r.event(t, authMember(authBob, "join"))}
		if !rules.hashRoomID {
			auth = append(auth, r.create)
		}
		join := r.event(t, authMember(authBob, "join"))
		require.Zero(t, testing.AllocsPerRun(10, func() {
			if checkAuthEvents(join, auth) != nil || authorise(join, stateOf(auth, r.create), false) != nil {
				t.Fatal("refused")
			}
		}))
	}
}
