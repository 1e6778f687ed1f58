package mxfed

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A template is material: whatever another server writes into it, what gets signed is a join, leave or knock of our user,
// whichever it was to be, in the room that was asked for, with nothing of the template's but its place in the graph and, of
// a join, who authorises it. https://spec.matrix.org/v1.19/server-server-api/#joining-rooms

var templateMemberships = []string{"join", "leave", "knock"}

const templateContent = `{"displayname":"Bob","join_authorised_via_users_server":"@bob:us.example","membership":"ban","reason":"tea"}`

// templateWanted is the one event that may be signed for a template.
func templateWanted(rules *roomRules, membership string, room RoomID, template value) value {
	content := value(`{"displayname":"Bob","reason":"tea"}`).with("membership", quoted(membership))
	if rules.restricted && membership == "join" {
		content = content.with("join_authorised_via_users_server", template.get("content").get("join_authorised_via_users_server"))
	}
	wanted := object(field{"auth_events", template.get("auth_events")}, field{"content", content}, field{"depth", template.get("depth")},
		field{"origin_server_ts", integer(joinTime.UnixMilli())}, field{"prev_events", template.get("prev_events")},
		field{"room_id", quoted(room)}, field{"sender", quoted(joinUser)}, field{"state_key", quoted(joinUser)}, field{"type", `"m.room.member"`})
	if rules.eventID == idGiven {
		for _, key := range []string{"auth_events", "prev_events"} {
			var pairs []value
			for pair := range wanted.get(key).elements() {
				pairs = append(pairs, templatePair(pair))
			}
			wanted = wanted.with(key, array(pairs...))
		}
	}
	if rules.version != "11" && rules.version != "12" || template.get("origin") != "" {
		wanted = wanted.with("origin", `"us.example"`)
	}
	return wanted
}

// templatePair is a reference of room versions 1 and 2 with nothing in it but ID and hash.
func templatePair(pair value) value {
	var parts []value
	for part := range pair.elements() {
		parts = append(parts, part)
	}
	hash := parts[1].get("sha256")
	if hash == "" {
		hash = `""`
	}
	return array(parts[0], object(field{"sha256", hash}))
}

// requireTemplate checks what became of an answer with a template: made is nil if it was refused.
func requireTemplate(t testing.TB, key *joinSignatures, membership string, room RoomID, answer value, made *Event) {
	signed := key.events()
	if made == nil {
		require.Empty(t, signed, "%s", answer)
		return
	}
	require.Len(t, signed, 1)
	version, ok := answer.get("room_version").str()
	if !ok || version == "" {
		version = "1"
	}
	require.Equal(t, RoomVersion(version), made.Version())
	bare := made.text.with("signatures", "").with("hashes", "")
	if made.rules.eventID == idGiven {
		require.Equal(t, joinUser.Server(), made.id.server())
		bare = bare.with("event_id", "")
	}
	require.Equal(t, templateWanted(made.rules, membership, room, answer.get("event")), bare, "%s", answer)
	require.True(t, made.hashOK)
	require.Equal(t, string(new(eventParser).signedBytes(made)), string(signed[0]))
	sig, err := joinSigner(t, joinUser.Server()).sign([]byte(signed[0]))
	require.NoError(t, err)
	require.Equal(t, object(field{"us.example", object(field{"ed25519:1", quoted(sig)})}), made.text.get("signatures"))
}

// makeFromTemplate has Bob's server make an event of an answer with a template; nil if it refuses.
func makeFromTemplate(t testing.TB, membership string, room RoomID, answer string) (*joinSignatures, *Event, error) {
	n := &joinNet{serve: func(*http.Request, string) *http.Response { return joinReply(200, answer) }, room: &joinRoom{t: t}}
	c, key := n.server(t, nil)
	content, err := memberContent([]byte(templateContent), membership)
	require.NoError(t, err)
	made, _, err := c.memberEvent(context.Background(), joinVia, newMemberDraft(room, joinUser, membership), content)
	require.Equal(t, err == nil, made != nil)
	return key, made, err
}

// templateOf is the answer of an honest server of the room.
func (r *joinRoom) templateOf(membership string) value {
	event := r.template()
	if membership != "join" {
		event = event.with("content", object(field{"membership", quoted(membership)}))
	}
	return object(field{"event", event}, field{"room_version", quoted(r.rules.version)})
}

// templateCase is a change to a good template; ok says in which room versions it is taken all the same.
type templateCase struct {
	key string // "content.…" for a member of content
	to  value
	ok  func(*roomRules) bool
}

func templateCases(membership string) map[string]templateCase {
	always, never := func(*roomRules) bool { return true }, func(*roomRules) bool { return false }
	restricted := func(r *roomRules) bool { return r.restricted && membership == "join" } // elsewhere the user means nothing
	not := func(of func(*roomRules) bool) func(*roomRules) bool {
		return func(r *roomRules) bool { return !of(r) }
	}
	list := func(n int, format string) value {
		refs := make([]value, n)
		for i := range refs {
			refs[i] = value(fmt.Sprintf(format, i))
		}
		return array(refs...)
	}
	given := func(r *roomRules) bool { return r.eventID == idGiven }
	cases := map[string]templateCase{
		"another room":                     {"room_id", `"!other:r.example"`, never},
		"an unknown member":                {"org.example.x", `{"a":[1]}`, always},
		"signatures":                       {"signatures", `{"r.example":{"ed25519:1":"AAAA"},"us.example":{"ed25519:1":"AAAA"}}`, always},
		"hashes":                           {"hashes", `{"sha256":"AAAA"}`, always},
		"unsigned":                         {"unsigned", `{"age":1}`, always},
		"an event ID":                      {"event_id", `"$x:us.example"`, always},
		"redacts":                          {"redacts", `"$x"`, always},
		"age_ts":                           {"age_ts", `1`, always},
		"membership at the top":            {"membership", `"ban"`, always},
		"prev_state":                       {"prev_state", `[]`, always},
		"their origin":                     {"origin", `"r.example"`, always},
		"an origin of null":                {"origin", `null`, always},
		"no origin":                        {"origin", ``, always},
		"another time":                     {"origin_server_ts", `1`, always},
		"no time":                          {"origin_server_ts", ``, always},
		"no prev_events":                   {"prev_events", `[]`, always},
		"depth 0":                          {"depth", `0`, always},
		"depth 2^53-1":                     {"depth", `9007199254740991`, always},
		"depth 2^53":                       {"depth", `9007199254740992`, func(r *roomRules) bool { return r.maxDepth > maxJSONInteger }},
		"depth 2^63-1":                     {"depth", `9223372036854775807`, func(r *roomRules) bool { return r.maxDepth > maxJSONInteger }},
		"depth 2^63":                       {"depth", `9223372036854775808`, never},
		"negative depth":                   {"depth", `-1`, never},
		"a third-party invite":             {"content.third_party_invite", `{"signed":{}}`, always},
		"a name":                           {"content.displayname", `"Mallory"`, always},
		"authorised by a user of theirs":   {"content.join_authorised_via_users_server", `"@alice:r.example"`, always},
		"authorised by another's user":     {"content.join_authorised_via_users_server", `"@carol:third.example"`, not(restricted)},
		"authorised by ourselves":          {"content.join_authorised_via_users_server", `"@bob:us.example"`, not(restricted)},
		"authorised by no user":            {"content.join_authorised_via_users_server", `"alice:r.example"`, not(restricted)},
		"authorised by null":               {"content.join_authorised_via_users_server", `null`, not(restricted)},
		"20 prev_events":                   {"prev_events", list(20, `"$%d"`), not(given)},
		"21 prev_events":                   {"prev_events", list(21, `"$%d"`), never},
		"1,000 prev_events":                {"prev_events", list(1000, `"$%d"`), never},
		"10 auth_events":                   {"auth_events", list(10, `"$%d"`), not(given)},
		"11 auth_events":                   {"auth_events", list(11, `"$%d"`), never},
		"20 pairs":                         {"prev_events", list(20, `["$%d:x",{"sha256":"AAAA"}]`), given},
		"21 pairs":                         {"prev_events", list(21, `["$%d:x",{"sha256":"AAAA"}]`), never},
		"11 pairs in auth_events":          {"auth_events", list(11, `["$%d:x",{"sha256":"AAAA"}]`), never},
		"pairs without hash":               {"auth_events", list(2, `["$%d:x",{}]`), given},
		"pairs with a hash that is none":   {"prev_events", list(2, `["$%d:x",{"sha256":"no hash"}]`), given},
		"pairs with more":                  {"prev_events", list(2, `["$%d:x",{"sha256":"AAAA","md5":[1],"x":{}}]`), given},
		"pairs with a number for the hash": {"prev_events", list(2, `["$%d:x",{"sha256":5}]`), never},
		"pairs with null for the hash":     {"auth_events", list(2, `["$%d:x",{"sha256":null}]`), never},
		"pairs with a huge hash":           {"prev_events", list(1, `["$%d:x",{"sha256":"`+strings.Repeat("A", 300)+`"}]`), never},
		"pairs of three":                   {"prev_events", list(1, `["$%d:x",{"sha256":"AAAA"},1]`), never},
		"pairs of one":                     {"prev_events", list(1, `["$%d:x"]`), never},
		"an event ID of 256 bytes":         {"prev_events", value(`["$` + strings.Repeat("A", 255) + `"]`), never},
		"an event ID without sigil":        {"prev_events", `["A"]`, never},
		"an empty event ID":                {"auth_events", `[""]`, never},
	}
	for _, key := range []string{"sender", "state_key"} {
		for _, user := range []value{`"@alice:r.example"`, `"@bob:r.example"`, `"@Bob:us.example"`, `"@bob:us.example "`, `""`} {
			cases[key+" "+string(user)] = templateCase{key, user, never}
		}
	}
	for _, typ := range []value{`"m.room.power_levels"`, `"m.room.Member"`, `"m.room.message"`, `""`} {
		cases["type "+string(typ)] = templateCase{"type", typ, never}
	}
	for _, m := range []value{`"join"`, `"leave"`, `"ban"`, `"invite"`, `"knock"`, quoted(strings.ToUpper(membership)), `""`, array(quoted(membership)), `{"join":1}`} {
		if m != quoted(membership) {
			cases["membership "+string(m)] = templateCase{"content.membership", m, never}
		}
	}
	for _, key := range []string{"room_id", "sender", "state_key", "type", "content", "content.membership", "prev_events", "auth_events", "depth"} {
		for _, of := range []value{"", "null", "true", "1.5", `"x"`, `{}`, `[null]`, `[1]`, `[[]]`, `[{}]`, `[["$x"]]`, `[["$x",null]]`, `[[{},"$x"]]`} {
			cases[key+" of "+string(of)] = templateCase{key, of, never}
		}
	}
	return cases
}

func TestTemplate_Hostile(t *testing.T) {
	for _, v := range joinVersions {
		room := newJoinRoom(t, v, "public")
		for _, membership := range templateMemberships {
			good := room.templateOf(membership)
			key, made, err := makeFromTemplate(t, membership, room.id, string(good))
			if membership == "knock" && !v.rules().knock {
				require.Error(t, err)
				requireTemplate(t, key, membership, room.id, good, made)
				continue
			}
			require.NoError(t, err)
			requireTemplate(t, key, membership, room.id, good, made)
			for name, c := range templateCases(membership) {
				event := good.get("event")
				if member, ok := strings.CutPrefix(c.key, "content."); ok {
					event = event.with("content", event.get("content").with(member, c.to))
				} else {
					event = event.with(c.key, c.to)
				}
				answer := good.with("event", event)
				key, made, err := makeFromTemplate(t, membership, room.id, string(answer))
				require.Equal(t, c.ok(v.rules()), err == nil, "%s: %s: %s: %v", v, membership, name, err)
				requireTemplate(t, key, membership, room.id, answer, made)
			}
		}
	}
}

// Around the template, too, nothing is guessed. https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_joinroomiduserid
func TestTemplate_HostileAnswer(t *testing.T) {
	for _, v := range joinVersions {
		for _, membership := range templateMemberships {
			testHostileAnswers(t, newJoinRoom(t, v, "public"), membership)
		}
	}
	_, _, err := makeFromTemplate(t, "join", "!x:r.example", `{"event":{},"room_version":"13"}`)
	require.ErrorIs(t, err, ErrIncompatibleRoomVersion)
}

func testHostileAnswers(t *testing.T, room *joinRoom, membership string) {
	v, event := room.rules.version, string(room.templateOf(membership).get("event"))
	for name, answer := range map[string]string{
		"empty":                   ``,
		"no JSON":                 `<html>`,
		"empty object":            `{}`,
		"a list":                  `[200,{"event":` + event + `,"room_version":"` + string(v) + `"}]`,
		"the event alone":         event,
		"no event":                `{"room_version":"` + string(v) + `"}`,
		"event null":              `{"event":null,"room_version":"` + string(v) + `"}`,
		"event a list":            `{"event":[` + event + `],"room_version":"` + string(v) + `"}`,
		"event a string":          `{"event":"x","room_version":"` + string(v) + `"}`,
		"two events":              `{"event":` + event + `,"event":` + event + `,"room_version":"` + string(v) + `"}`,
		"version a number":        `{"event":` + event + `,"room_version":` + string(v) + `}`,
		"version null":            `{"event":` + event + `,"room_version":null}`,
		"version unknown":         `{"event":` + event + `,"room_version":"org.example"}`,
		"version with a space":    `{"event":` + event + `,"room_version":"` + string(v) + ` "}`,
		"version of other format": `{"event":` + event + `,"room_version":"` + map[bool]string{true: "3", false: "1"}[v.rules().eventID == idGiven] + `"}`,
		"more after it":           `{"event":` + event + `,"room_version":"` + string(v) + `"}{}`,
		"too large":               `{"event":` + event + `,"room_version":"` + string(v) + `","x":"` + strings.Repeat("x", maxSmallReply) + `"}`,
	} {
		key, _, err := makeFromTemplate(t, membership, room.id, answer)
		require.Error(t, err, "%s: %s", v, name)
		require.Empty(t, key.events())
		require.True(t, nextMayHelp(err), "%s: %s: another server may be honest", v, name)
	}
	other := map[bool]RoomVersion{true: "10", false: "12"}[v == "12"] // whose room IDs have another form
	_, _, err := makeFromTemplate(t, membership, room.id, string(object(field{"event", value(event)}, field{"room_version", quoted(other)})))
	require.True(t, err != nil && nextMayHelp(err))
}

// MakeJoin, MakeLeave and MakeKnock refuse what Join, Leave and Knock refuse and hand on the rest as it is.
func TestMake_Client(t *testing.T) {
	room := newJoinRoom(t, "10", "public")
	var answer value
	var query string
	n := &joinNet{room: room, serve: func(q *http.Request, _ string) *http.Response {
		query = q.URL.RawQuery
		return joinReply(200, string(answer))
	}}
	c, key := n.server(t, func(cfg *Config) { cfg.Versions = []RoomVersion{"10", "11"} })
	ctx := context.Background()
	for membership, ask := range map[string]func(user UserID) (any, error){
		"join":  func(user UserID) (any, error) { return c.MakeJoin(ctx, joinVia, &MakeJoinRequest{room.id, user}) },
		"leave": func(user UserID) (any, error) { return c.MakeLeave(ctx, joinVia, &MakeLeaveRequest{room.id, user}) },
		"knock": func(user UserID) (any, error) { return c.MakeKnock(ctx, joinVia, &MakeKnockRequest{room.id, user}) },
	} {
		n.asked = nil
		answer = room.templateOf(membership)
		got, err := ask(joinUser)
		require.NoError(t, err)
		wire, err := json.Marshal(got)
		require.NoError(t, err)
		require.Equal(t, string(answer), string(wire), membership)
		require.Equal(t, map[string]string{"join": "ver=10&ver=11", "leave": "", "knock": "ver=10&ver=11"}[membership], query)
		answer = answer.with("event", answer.get("event").with("room_id", `"!x:r.example"`))
		_, err = ask(joinUser)
		require.ErrorContains(t, err, "room_id")
		_, err = ask(joinCarol)
		require.ErrorIs(t, err, ErrInvalidParam)
		require.Equal(t, slices.Repeat([]string{"v1 make_" + membership + " r.example"}, 2), n.asked)
	}
	require.Empty(t, key.events())
}

// FuzzMakeJoinAnswer gives each answer to make_leave and make_knock as well.
func FuzzMakeJoinAnswer(f *testing.F) {
	const room, hashRoom = "!room:r.example", "!ckKSZ9vP7FTFzKQE9KZFH6ayI9HDvziQvo4Thq_HYn8"
	for _, x := range recordedAnswers(f, "make_join") {
		recorded, user := x.pathParameters(f)
		id := room
		if x.RoomVersion == "12" {
			id = hashRoom
		}
		f.Add(x.RoomVersion == "12", []byte(strings.NewReplacer(recorded, id, user, string(joinUser), `"@alice:127.0.0.1:`, `"@alice:r.example:`).Replace(x.Response)))
	}
	for _, answer := range []string{`{}`, `[]`, `[200,{}]`, `{"event":{}}`, `{"event":{},"room_version":"12"}`, ``} {
		f.Add(false, []byte(answer))
	}
	for _, v := range joinVersions[:11] {
		r := newJoinRoom(f, v, "restricted")
		for _, membership := range templateMemberships {
			f.Add(false, []byte(r.templateOf(membership)))
		}
	}
	f.Fuzz(func(t *testing.T, hash bool, answer []byte) {
		id := RoomID(room)
		if hash {
			id = hashRoom
		}
		for _, membership := range templateMemberships {
			key, made, _ := makeFromTemplate(t, membership, id, string(answer))
			var text value
			if made != nil {
				text = eventCanonical(t, answer)
			}
			requireTemplate(t, key, membership, id, text, made)
		}
	})
}
