package mxfed_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// eventVersions are the room versions that every test of events runs over unless it names others.
var eventVersions = []mxfed.RoomVersion{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"}

func eventVersionsFrom(first int) []mxfed.RoomVersion { return eventVersions[first-1:] }

// eventVector reads a file of testdata/vectors into v.
func eventVector(t testing.TB, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, v))
}

// eventPDU is a PDU whose members can be replaced by any JSON text.
type eventPDU map[string]string

const (
	eventHash     = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU"
	eventIDHash   = "Rqnc-F-dvnEYJTyHq_iKxU2bZ1CI92-kuZq3a5lr5Zg"
	eventHashRoom = `"!Nhcu5BS-UMnFX7hBVfVSoXiD7OgH6iRT-xyIuqDnpYQ"`
)

// newEventPDU is a well-formed message of room version v.
func newEventPDU(v mxfed.RoomVersion) eventPDU {
	e := eventPDU{
		"type": `"m.room.message"`, "sender": `"@alice:domain"`, "room_id": `"!room:domain"`, "content": `{"body":"hi"}`,
		"depth": "7", "origin_server_ts": "1700000000000", "hashes": `{"sha256":"` + eventHash + `"}`, "signatures": `{}`,
		"prev_events": eventRefs(v, 1), "auth_events": eventRefs(v, 2),
	}
	switch v {
	case "1", "2":
		e["event_id"] = `"$event:domain"`
	case "12":
		e["room_id"] = eventHashRoom
	}
	return e
}

// eventRefs is a list of n references to other events.
func eventRefs(v mxfed.RoomVersion, n int) string {
	list := make([]string, n)
	for i := range list {
		list[i] = `"$` + eventIDHash + `"`
		if v == "1" || v == "2" {
			list[i] = fmt.Sprintf(`["$%d:domain",{"sha256":"%s"}]`, i, eventHash)
		}
	}
	return "[" + strings.Join(list, ",") + "]"
}

// with returns a copy in which a member is replaced, or removed if text is "".
func (e eventPDU) with(key, text string) eventPDU {
	next := maps.Clone(e)
	if next[key] = text; text == "" {
		delete(next, key)
	}
	return next
}

func (e eventPDU) bytes() []byte {
	var members []string
	for key, text := range e {
		name, _ := json.Marshal(key)
		members = append(members, string(name)+" : "+text)
	}
	return []byte("{ " + strings.Join(members, " ,\n") + " }")
}

// eventPadded is e with a content of as many bytes as it needs for a canonical form of size bytes.
func eventPadded(t *testing.T, v mxfed.RoomVersion, size int) eventPDU {
	t.Helper()
	e := newEventPDU(v).with("content", `{"body":""}`)
	parsed, err := mxfed.ParseEvent(v, e.bytes())
	require.NoError(t, err)
	return e.with("content", `{"body":"`+strings.Repeat("x", size-len(parsed.JSON()))+`"}`)
}

func TestParseEvent_Accessors(t *testing.T) {
	for _, v := range eventVersions {
		raw := newEventPDU(v).with("prev_events", eventRefs(v, 3)).with("content", `{"b":[1, 2],"a":"\u0041"}`)
		e, err := mxfed.ParseEvent(v, raw.bytes())
		require.NoError(t, err, v)
		require.Equal(t, v, e.Version())
		require.Equal(t, "m.room.message", e.Type())
		require.Equal(t, mxfed.UserID("@alice:domain"), e.Sender())
		require.Equal(t, mxfed.ServerName("domain"), e.Sender().Server())
		require.Equal(t, `"`+string(e.RoomID())+`"`, raw["room_id"])
		require.Len(t, e.Prev(), 3)
		require.Len(t, e.Auth(), 2)
		require.Equal(t, json.RawMessage(`{"a":"A","b":[1,2]}`), e.Content())
		_, isState := e.StateKey()
		require.False(t, isState)
		encoded, err := json.Marshal(e)
		require.NoError(t, err)
		require.Equal(t, e.JSON(), encoded)

		state, err := mxfed.ParseEvent(v, raw.with("state_key", `""`).bytes())
		require.NoError(t, err)
		key, isState := state.StateKey()
		require.True(t, isState)
		require.Empty(t, key)
	}
}

func TestParseEvent_AccessorsShareNothing(t *testing.T) {
	e, err := mxfed.ParseEvent("12", newEventPDU("12").bytes())
	require.NoError(t, err)
	before := string(e.JSON())
	e.JSON()[0], e.Content()[0] = 'x', 'x'
	e.Prev()[0], e.Auth()[0] = "x", "x"
	_ = append(e.Prev(), "y")
	require.Equal(t, before, string(e.JSON()))
	require.Equal(t, json.RawMessage(`{"body":"hi"}`), e.Content())
	require.Equal(t, []mxfed.EventID{"$" + eventIDHash}, e.Prev())
	require.Equal(t, []mxfed.EventID{"$" + eventIDHash, "$" + eventIDHash}, e.Auth())
}

func TestParseEvent_UnknownVersion(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"", "0", "13", "01", "1 ", "org.matrix.msc4014", "٣"} {
		_, err := mxfed.ParseEvent(v, newEventPDU("10").bytes())
		require.ErrorIs(t, err, mxfed.ErrIncompatibleRoomVersion, v)
		var e *mxfed.Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, v, e.RoomVersion)
	}
}

// eventDefects are single changes to a good event that no room version of the list accepts.
var eventDefects = map[string]struct {
	versions []mxfed.RoomVersion
	key      string
	texts    []string // "" removes the member
	code     mxfed.ErrorCode
}{
	"content":    {eventVersions, "content", []string{"", "null", "[]", `"x"`, "1", "true"}, mxfed.ErrBadJSON},
	"signatures": {eventVersions, "signatures", []string{"", "null", "[]", `"x"`, "1"}, mxfed.ErrBadJSON},
	"hashes": {eventVersions, "hashes", []string{"", "null", "[]", `"x"`, "{}", `{"sha256":1}`, `{"sha256":null}`, `{"md5":"x"}`,
		`{"SHA256":"x"}`}, mxfed.ErrBadJSON},
	"type":      {eventVersions, "type", []string{"", "null", "1", "[]", "{}"}, mxfed.ErrInvalidParam},
	"state_key": {eventVersions, "state_key", []string{"null", "1", "true", "[]", "{}"}, mxfed.ErrInvalidParam},
	"sender": {eventVersions, "sender", []string{"", "null", "1", `""`, `"@"`, `"@alice"`, `"alice:domain"`, `"@alice:"`, `":domain"`,
		`"@alice:dom_ain"`, `"@alice:domain:"`, `"@alice:domain:99999"`, `"@a\u0000b:domain"`, `"@alice:do\u0000main"`, `"!alice:domain"`,
		`"@alice:[::1"`, `"@alice:domain/x"`, `" @alice:domain"`, `"@alice:domain "`}, mxfed.ErrInvalidParam},
	"room_id": {eventVersions[:11], "room_id", []string{"", "null", "1", `""`, `"!"`, `"!room"`, `"room:domain"`, `"!room:"`, `"!room:dom_ain"`,
		`"!ro\u0000om:domain"`, `"#room:domain"`, eventHashRoom}, mxfed.ErrInvalidParam},
	"room_id of a hash": {eventVersionsFrom(12), "room_id", []string{"", "null", "1", `""`, `"!"`, `"!room:domain"`, `"` + eventIDHash + `"`,
		`"$` + eventIDHash + `"`, `"!` + eventIDHash[:42] + `"`, `"!` + eventIDHash + `A"`, `"!` + eventIDHash + `="`, `"!+` + eventIDHash[1:] + `"`,
		`"!` + eventIDHash[:42] + `\n"`}, mxfed.ErrInvalidParam},
	"event_id": {eventVersions[:2], "event_id", []string{"", "null", "1", `""`, `"$"`, `"$event"`, `"event:domain"`, `"$event:"`,
		`"$event:dom_ain"`, `"!event:domain"`}, mxfed.ErrInvalidParam},
	"pairs": {eventVersions[:2], "prev_events", []string{"", "null", "{}", `"x"`, `["$a:domain"]`, `[[]]`, `[["$a:domain"]]`, `[["$a:domain",{},1]]`,
		`[["$a:domain","x"]]`, `[[1,{}]]`, `[["a:domain",{}]]`, `[{"0":"$a:domain"}]`, `[null]`}, mxfed.ErrInvalidParam},
	"list of IDs": {eventVersionsFrom(3), "auth_events", []string{"", "null", "{}", `"x"`, `[1]`, `[null]`, `[""]`, `["$"]`, `["x"]`,
		`[["$a:domain",{"sha256":"x"}]]`, `["$` + strings.Repeat("x", 255) + `"]`}, mxfed.ErrBadJSON},
	"depth": {eventVersions, "depth", []string{"", "null", `"1"`, "[]", "-1", "1.5", "1.0", "1e3", "9223372036854775808", "99999999999999999999",
		"-9223372036854775809"}, mxfed.ErrBadJSON},
	"depth beyond 2^53-1": {eventVersionsFrom(6), "depth", []string{"9007199254740992", "9223372036854775807"}, mxfed.ErrBadJSON},
	"origin_server_ts":    {eventVersions, "origin_server_ts", []string{"", "null", `"1"`, "1.5", "1e3", "99999999999999999999"}, mxfed.ErrBadJSON},
	"number in content": {eventVersionsFrom(6), "content", []string{`{"a":1.0}`, `{"a":[0.5]}`, `{"a":{"b":1e2}}`, `{"a":-0}`, `{"a":1E2}`,
		`{"a":9007199254740992}`, `{"a":-9007199254740992}`}, mxfed.ErrBadJSON},
	"duplicate": {eventVersions, "content", []string{`{"a":1,"a":1}`, `{"a":1,"\u0061":2}`, `{"a":[{"b":1,"b":2}]}`, `{}, "content":{}`,
		`{}, "Depth":1, "Depth":2`}, mxfed.ErrBadJSON},
	"text": {eventVersions, "content", []string{`{"a":"\ud800"}`, `{"a":"\udc00\ud800"}`, "{\"a\":\"\xff\"}", `{"a":"` + "\n" + `"}`, `{"a":1,}`, `{a:1}`,
		`{"a":01}`, `{"a":+1}`, `{"a":nul}`, `{"a":1}}`, strings.Repeat("[", 10_000), strings.Repeat(`{"a":`, 10_000)}, mxfed.ErrBadJSON},
}

// https://spec.matrix.org/v1.19/rooms/ defines the format per version; every defect is refused with the code of its kind.
func TestParseEvent_Defects(t *testing.T) {
	for name, defect := range eventDefects {
		t.Run(name, func(t *testing.T) {
			for _, v := range defect.versions {
				for _, text := range defect.texts {
					e, err := mxfed.ParseEvent(v, newEventPDU(v).with(defect.key, text).bytes())
					require.ErrorIs(t, err, defect.code, "room version %s, %s = %.80s", v, defect.key, text)
					require.Nil(t, e)
					var typed *mxfed.Error
					require.ErrorAs(t, err, &typed)
				}
			}
		})
	}
}

func TestParseEvent_NoObject(t *testing.T) {
	for _, v := range eventVersions {
		for _, text := range []string{"", " ", "null", "[]", "1", `"x"`, "true", "{}", "{", "nonsense", `{"unsigned":{}}`, string(newEventPDU(v).bytes()) + "x",
			"[" + string(newEventPDU(v).bytes()) + "]", "\ufeff" + string(newEventPDU(v).bytes())} {
			_, err := mxfed.ParseEvent(v, []byte(text))
			require.Error(t, err, "%.40q", text)
		}
	}
}

// A version 12 create event has no room_id; nothing else may lack it. https://spec.matrix.org/v1.19/rooms/v12/
func TestParseEvent_CreateOfVersion12(t *testing.T) {
	create := newEventPDU("12").with("type", `"m.room.create"`).with("state_key", `""`).with("content", `{"room_version":"12"}`)
	_, err := mxfed.ParseEvent("12", create.bytes())
	require.ErrorIs(t, err, mxfed.ErrInvalidParam)
	e, err := mxfed.ParseEvent("12", create.with("room_id", "").bytes())
	require.NoError(t, err)
	require.Equal(t, "!"+string(e.ID()[1:]), string(e.RoomID()))
	_, err = mxfed.ParseEvent("12", create.with("room_id", "").with("type", `"m.room.member"`).bytes())
	require.ErrorIs(t, err, mxfed.ErrInvalidParam)
	_, err = mxfed.ParseEvent("11", create.with("room_id", "").bytes())
	require.ErrorIs(t, err, mxfed.ErrInvalidParam)
}

// https://spec.matrix.org/v1.19/server-server-api/#pdus
func TestParseEvent_ListLimits(t *testing.T) {
	for _, v := range eventVersions {
		for _, list := range []struct {
			key   string
			limit int
		}{{"prev_events", 20}, {"auth_events", 10}} {
			for n, code := range map[int]error{0: nil, list.limit: nil, list.limit + 1: mxfed.ErrBadJSON, 500: mxfed.ErrBadJSON} {
				e, err := mxfed.ParseEvent(v, newEventPDU(v).with(list.key, eventRefs(v, n)).bytes())
				require.ErrorIs(t, err, code, "%s %s %d", v, list.key, n)
				if code == nil {
					require.Len(t, map[string][]mxfed.EventID{"prev_events": e.Prev(), "auth_events": e.Auth()}[list.key], n)
				}
			}
		}
	}
}

// https://spec.matrix.org/v1.19/client-server-api/#size-limits
func TestParseEvent_SizeOfFields(t *testing.T) {
	fill := func(prefix, suffix string, size int) string {
		return `"` + prefix + strings.Repeat("x", size-len(prefix)-len(suffix)) + suffix + `"`
	}
	for _, v := range eventVersions {
		fields := map[string][2]string{"type": {"m.", ""}, "state_key": {"", ""}, "sender": {"@", ":domain"}}
		if v != "12" {
			fields["room_id"] = [2]string{"!", ":domain"}
		}
		if v == "1" || v == "2" {
			fields["event_id"] = [2]string{"$", ":domain"}
		}
		for key, form := range fields {
			_, err := mxfed.ParseEvent(v, newEventPDU(v).with(key, fill(form[0], form[1], 255)).bytes())
			require.NoError(t, err, "%s %s", v, key)
			_, err = mxfed.ParseEvent(v, newEventPDU(v).with(key, fill(form[0], form[1], 256)).bytes())
			require.ErrorIs(t, err, mxfed.ErrTooLarge, "%s %s", v, key)
		}
		// bytes count, not characters, and not the length of their escapes
		_, err := mxfed.ParseEvent(v, newEventPDU(v).with("type", `"`+strings.Repeat("é", 128)+`"`).bytes())
		require.ErrorIs(t, err, mxfed.ErrTooLarge)
		_, err = mxfed.ParseEvent(v, newEventPDU(v).with("state_key", `"`+strings.Repeat(`\u0041`, 255)+`"`).bytes())
		require.NoError(t, err)
	}
}

// The limit holds for the canonical form without unsigned. https://spec.matrix.org/v1.19/client-server-api/#size-limits
func TestParseEvent_SizeOfEvent(t *testing.T) {
	for _, v := range eventVersions {
		largest := eventPadded(t, v, 65536)
		e, err := mxfed.ParseEvent(v, largest.bytes())
		require.NoError(t, err)
		require.Len(t, e.JSON(), 65536)
		_, err = mxfed.ParseEvent(v, largest.with("unsigned", `{"invite_room_state":["`+strings.Repeat("x", 200_000)+`"]}`).bytes())
		require.NoError(t, err)
		_, err = mxfed.ParseEvent(v, append([]byte(strings.Repeat(" ", 1000)), largest.bytes()...))
		require.NoError(t, err)
		_, err = mxfed.ParseEvent(v, eventPadded(t, v, 65537).bytes())
		require.ErrorIs(t, err, mxfed.ErrTooLarge)
	}
}

func TestParseEvent_Accepts(t *testing.T) {
	for name, good := range map[string]struct {
		versions []mxfed.RoomVersion
		key      string
		texts    []string
	}{
		"historical user IDs": {eventVersions, "sender", []string{`"@:domain"`, `"@UPPER:domain"`, `"@a b:domain"`, `"@a\u0007b:domain"`, `"@日本:domain"`,
			`"@a@b:domain"`, `"@a/+=.:domain"`, `"@a:1.2.3.4:8448"`, `"@a:[2001:db8::1]:8448"`, `"@a:UPPER.example"`}},
		"room IDs":       {eventVersions[:11], "room_id", []string{`"!日本:domain"`, `"!a!b@c$:domain:8448"`, `"!a\u0001:[::1]"`}},
		"depth":          {eventVersions, "depth", []string{"0", "9007199254740991"}},
		"large depth":    {eventVersions[:5], "depth", []string{"9007199254740992", "9223372036854775807"}},
		"time":           {eventVersions, "origin_server_ts", []string{"0", "-1", "9007199254740991"}},
		"state keys":     {eventVersions, "state_key", []string{`""`, `"@bob:domain"`, `"\u0000"`, `"\""`}},
		"hashes":         {eventVersions, "hashes", []string{`{"sha256":"wrong"}`, `{"sha256":"","sha512":1}`}},
		"signatures":     {eventVersions, "signatures", []string{`{"domain":5}`, `{"domain":{"x":null}}`, `{"\u0000":[]}`}},
		"unsigned":       {eventVersions, "unsigned", []string{"{}", "null", "5", `"x"`, "[]", `{"age":-1}`}},
		"opaque IDs":     {eventVersionsFrom(3), "prev_events", []string{`["$x"]`, `["$a:domain"]`, `["$é"]`}},
		"no domain":      {eventVersions[:2], "prev_events", []string{`[["$x",{}]]`, `[["$x",{"md5":1}]]`}},
		"other IDs":      {eventVersionsFrom(3), "event_id", []string{"5", "null", `"$x:domain"`, `"` + strings.Repeat("x", 300) + `"`}},
		"large numbers":  {eventVersions[:5], "content", []string{`{"a":1.50}`, `{"a":1e999999999}`, `{"a":[9007199254740993]}`, `{"a":0.0}`}},
		"domain of type": {eventVersions, "type", []string{`""`, `"\u0000"`, `"org.example.type"`}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, v := range good.versions {
				for _, text := range good.texts {
					_, err := mxfed.ParseEvent(v, newEventPDU(v).with(good.key, text).bytes())
					require.NoError(t, err, "room version %s, %s = %.80s", v, good.key, text)
				}
			}
		})
	}
}

// Numbers of room versions 1 to 5 are hashed as they came. https://spec.matrix.org/v1.19/rooms/v1/#canonical-json
func TestParseEvent_NumbersAsReceived(t *testing.T) {
	raw := newEventPDU("5").with("content", `{"d":-0,"c":1E2,"b":9007199254740993,"a":1.50}`)
	e, err := mxfed.ParseEvent("5", raw.bytes())
	require.NoError(t, err)
	require.Equal(t, `{"a":1.50,"b":9007199254740993,"c":1E2,"d":0}`, string(e.Content()))
}

// What no signature covers is dropped before anything is computed; event_id too where the ID is a hash.
// https://spec.matrix.org/v1.19/server-server-api/#calculating-the-content-hash-for-an-event
func TestParseEvent_Dropped(t *testing.T) {
	for _, v := range eventVersions {
		plain, err := mxfed.ParseEvent(v, newEventPDU(v).bytes())
		require.NoError(t, err)
		keys := []string{"unsigned", "age_ts", "outlier", "destinations"}
		if v != "1" && v != "2" {
			keys = append(keys, "event_id")
		}
		for _, key := range keys {
			e, err := mxfed.ParseEvent(v, newEventPDU(v).with(key, `"$other:domain"`).bytes())
			require.NoError(t, err)
			require.Equal(t, plain.ID(), e.ID(), "%s %s", v, key)
			require.Equal(t, string(plain.JSON()), string(e.JSON()), "%s %s", v, key)
		}
	}
}

// The names of members are compared exactly: look-alikes are other members.
func TestParseEvent_CaseOfNames(t *testing.T) {
	alike := []string{"Type", "SENDER", "Room_ID", "State_Key", "Content", "Unsigned", "Hashes", "DEPTH", "Prev_Events", "typ\u00e9"}
	for _, v := range eventVersions {
		plain, err := mxfed.ParseEvent(v, newEventPDU(v).bytes())
		require.NoError(t, err)
		for _, key := range alike {
			e, err := mxfed.ParseEvent(v, newEventPDU(v).with(key, `"m.room.member"`).bytes())
			require.NoError(t, err, key)
			require.Contains(t, string(e.JSON()), `"`+key+`":"m.room.member"`)
			require.Equal(t, plain.Type(), e.Type())
			require.Equal(t, plain.Sender(), e.Sender())
			require.Equal(t, plain.RoomID(), e.RoomID())
			_, isState := e.StateKey()
			require.False(t, isState)
			require.Equal(t, plain.ID(), e.ID(), "redaction drops unknown members")
			if name := strings.ToLower(key); name != "unsigned" && name != "state_key" && newEventPDU(v)[name] != "" {
				_, err = mxfed.ParseEvent(v, newEventPDU(v).with(key, newEventPDU(v)[name]).with(name, "").bytes())
				require.Error(t, err, key)
			}
		}
	}
}

func TestEvent_Nil(t *testing.T) {
	var e *mxfed.Event
	require.Empty(t, e.ID())
	require.Empty(t, e.Version())
	require.Empty(t, e.RoomID())
	require.Empty(t, e.Type())
	key, ok := e.StateKey()
	require.Empty(t, key)
	require.False(t, ok)
	require.Empty(t, e.Sender())
	require.Empty(t, e.Membership())
	require.Nil(t, e.Prev())
	require.Nil(t, e.Auth())
	require.Nil(t, e.Content())
	require.Nil(t, e.JSON())
	encoded, err := json.Marshal(struct{ Event *mxfed.Event }{e})
	require.NoError(t, err)
	require.JSONEq(t, `{"Event":null}`, string(encoded))
}

// The published examples of identifiers are accepted where their room versions use them, and nowhere else.
func TestParseEvent_PublishedIdentifiers(t *testing.T) {
	var published struct {
		ServerNames []string `json:"server_names_valid"`
		EventIDs    []struct {
			Versions []mxfed.RoomVersion `json:"room_versions"`
			Example  string
		} `json:"event_ids"`
		RoomIDs []struct {
			Versions []mxfed.RoomVersion `json:"room_versions"`
			Example  string
		} `json:"room_ids"`
		Unknown []mxfed.RoomVersion `json:"room_version_names_invalid_by_grammar"`
		Other   []mxfed.RoomVersion `json:"room_version_names_valid"`
	}
	eventVector(t, "identifiers.json", &published)
	for _, name := range published.ServerNames {
		e, err := mxfed.ParseEvent("11", newEventPDU("11").with("sender", `"@a:`+name+`"`).with("room_id", `"!r:`+name+`"`).bytes())
		require.NoError(t, err, name)
		require.Equal(t, mxfed.ServerName(name), e.Sender().Server())
	}
	for _, id := range published.EventIDs {
		for _, v := range id.Versions {
			raw := newEventPDU(v).with("event_id", `"`+id.Example+`"`)
			if v != "1" && v != "2" {
				raw = raw.with("prev_events", `["`+id.Example+`"]`)
			}
			e, err := mxfed.ParseEvent(v, raw.bytes())
			require.NoError(t, err)
			require.Contains(t, append(e.Prev(), e.ID()), mxfed.EventID(id.Example))
		}
	}
	for _, id := range published.RoomIDs {
		fits := map[mxfed.RoomVersion]bool{}
		for _, v := range id.Versions {
			fits[v] = true
		}
		for _, v := range eventVersions {
			e, err := mxfed.ParseEvent(v, newEventPDU(v).with("room_id", `"`+id.Example+`"`).bytes())
			require.Equal(t, fits[v], err == nil, "%s in room version %s", id.Example, v)
			require.True(t, err != nil || string(e.RoomID()) == id.Example)
		}
	}
	for _, v := range append(published.Unknown, published.Other[1:]...) {
		_, err := mxfed.ParseEvent(v, newEventPDU("1").bytes())
		require.True(t, errors.Is(err, mxfed.ErrIncompatibleRoomVersion), v)
	}
}

func TestEvent_Membership(t *testing.T) {
	for content, want := range map[string]string{`{"membership":"join"}`: "join", `{"membership":1}`: "", `{}`: "", `{"Membership":"join"}`: ""} {
		pdu := newEventPDU("10")
		pdu["type"], pdu["state_key"], pdu["content"] = `"m.room.member"`, `"@alice:domain"`, content
		e, err := mxfed.ParseEvent("10", pdu.bytes())
		require.NoError(t, err)
		require.Equal(t, want, e.Membership(), content)
		pdu["type"] = `"m.room.message"`
		e, err = mxfed.ParseEvent("10", pdu.bytes())
		require.NoError(t, err)
		require.Empty(t, e.Membership(), content)
	}
}
