package mxfed

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// levelsValue reads JSON text as events of the room version are read, without refusing numbers that are not canonical.
func levelsValue(t *testing.T, text string) value {
	t.Helper()
	var r jsonReader
	canonical, err := r.canonical([]byte(text), numbersAsReceived)
	require.NoError(t, err)
	return value(canonical)
}

// requireLevel demands that a level is read as want, or not at all, wherever it stands.
func requireLevel(t *testing.T, rules *roomRules, text string, want int64, ok bool) {
	t.Helper()
	places := map[string]func(p *powerLevels) int64{
		`{"kick":` + text + `}`:                     func(p *powerLevels) int64 { return p.level("kick") },
		`{"users_default":` + text + `}`:            func(p *powerLevels) int64 { return p.user(authBob) },
		`{"users":{"@bob:b.example":` + text + `}}`: func(p *powerLevels) int64 { return p.user(authBob) },
		`{"events":{"org.example":` + text + `}}`:   func(p *powerLevels) int64 { return p.required("org.example", true) },
		`{"state_default":` + text + `}`:            func(p *powerLevels) int64 { return p.required("org.example", true) },
		`{"events_default":` + text + `}`:           func(p *powerLevels) int64 { return p.required("org.example", false) },
	}
	if rules.notifications {
		places[`{"notifications":{"room":`+text+`}}`] = func(p *powerLevels) int64 {
			require.Len(t, p.notifications, 1)
			return p.notifications[0].n
		}
	}
	for content, get := range places {
		p, err := parsePowerLevels(rules, levelsValue(t, content))
		if !ok {
			require.Error(t, err, "%s in version %s", content, rules.version)
			continue
		}
		require.NoError(t, err, "%s in version %s", content, rules.version)
		require.Equal(t, want, get(p), "%s in version %s", content, rules.version)
	}
}

func TestPowerLevels_Values(t *testing.T) {
	var file struct {
		Vectors []struct {
			JSON     string
			Value    *int64
			Versions string
		}
	}
	text, err := os.ReadFile(filepath.Join("testdata", "vectors", "power_level_values.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &file))
	require.NotEmpty(t, file.Vectors)
	for _, v := range file.Vectors {
		t.Run(v.JSON, func(t *testing.T) {
			for _, rules := range stableVersions {
				if v.Value == nil {
					requireLevel(t, rules, v.JSON, 0, false)
				} else {
					requireLevel(t, rules, v.JSON, *v.Value, authVersions(t, v.Versions, rules))
				}
			}
		})
	}
}

func TestPowerLevels_FurtherValues(t *testing.T) {
	for text, c := range map[string]struct {
		want     int64
		versions string
	}{
		`0`:                          {0, "1-12"},
		`-0`:                         {0, "1-12"},
		`9007199254740991`:           {maxJSONInteger, "1-12"},
		`-1`:                         {-1, "1-12"},
		`"-0"`:                       {0, "1-9"},
		`"\t\u00a0\u2003 7\r\n"`:     {7, "1-9"},
		`"9223372036854775807"`:      {math.MaxInt64, "1-9"},
		`"9223372036854775808"`:      {math.MaxInt64, "1-9"},
		`"-9223372036854775809"`:     {math.MinInt64, "1-9"},
		`"99999999999999999999999"`:  {math.MaxInt64, "1-9"},
		`"00000000000000000000005"`:  {5, "1-9"},
		`"99999999999999999999999x"`: {0, "none"},
		`"1_000"`:                    {0, "none"},
		`"1e3"`:                      {0, "none"},
		`"- 1"`:                      {0, "none"},
		`"+"`:                        {0, "none"},
		`"١"`:                        {0, "none"}, // a digit, but not of ASCII
		`" "`:                        {0, "none"},
		`"true"`:                     {0, "none"},
		`false`:                      {0, "none"},
		`[]`:                         {0, "none"},
		`[1]`:                        {0, "none"},
		`{}`:                         {0, "none"},
		`0.999`:                      {0, "1-5"},
		`-0.0`:                       {0, "1-5"},
		`1e2`:                        {100, "1-5"},
		`1E-400`:                     {0, "1-5"},
		`1e18`:                       {1e18, "1-5"},
		`9223372036854775808.0`:      {math.MaxInt64, "1-5"},
		`1e300`:                      {math.MaxInt64, "1-5"},
		`-1e300`:                     {math.MinInt64, "1-5"},
		`1e400`:                      {0, "none"},
		`-1e400`:                     {0, "none"},
	} {
		t.Run(text, func(t *testing.T) {
			for _, rules := range stableVersions {
				requireLevel(t, rules, text, c.want, authVersions(t, c.versions, rules))
			}
		})
	}
	for _, rules := range stableVersions[:5] { // later ones have no such integers
		requireLevel(t, rules, `9223372036854775808`, math.MaxInt64, true)
		requireLevel(t, rules, `-99999999999999999999999`, math.MinInt64, true)
	}
}

func TestPowerLevels_Defaults(t *testing.T) {
	empty, err := parsePowerLevels(RoomVersion("12").rules(), `{}`)
	require.NoError(t, err)
	for _, p := range []*powerLevels{nil, empty} {
		for name, want := range map[string]int64{"ban": 50, "kick": 50, "redact": 50, "state_default": 50, "invite": 0, "events_default": 0, "users_default": 0} {
			require.Equal(t, want, p.level(name), name)
		}
		require.EqualValues(t, 50, p.required("org.example", true))
		require.EqualValues(t, 0, p.required("org.example", false))
		require.EqualValues(t, 0, p.user(authBob))
	}
}

// The first power levels of a room only need the right form.
func TestAuth_PowerLevelForm(t *testing.T) {
	cases := map[string]authCase{}
	for content, versions := range map[value]string{
		`{}`: "1-12",
		`{"ban":1,"events_default":2,"invite":3,"kick":4,"redact":5,"state_default":6,"users_default":7}`: "1-12",
		`{"Ban":"x","unknown":null}`:                          "1-12",
		`{"ban":"50"}`:                                        "1-9",
		`{"ban":null}`:                                        "none",
		`{"events_default":"x"}`:                              "none",
		`{"invite":true}`:                                     "none",
		`{"kick":[]}`:                                         "none",
		`{"redact":{}}`:                                       "none",
		`{"state_default":""}`:                                "none",
		`{"users_default":null}`:                              "none",
		`{"events":{}}`:                                       "1-12",
		`{"events":{"a":1,"b":-1}}`:                           "1-12",
		`{"events":{"a":"1"}}`:                                "1-9",
		`{"events":{"a":1,"b":null}}`:                         "none",
		`{"events":null}`:                                     "none",
		`{"events":[]}`:                                       "none",
		`{"events":"x"}`:                                      "none",
		`{"notifications":{"room":1}}`:                        "1-12",
		`{"notifications":{"room":"1"}}`:                      "1-9",
		`{"notifications":{"room":null}}`:                     "1-5",
		`{"notifications":null}`:                              "1-5",
		`{"notifications":[]}`:                                "1-5",
		`{"users":{}}`:                                        "1-12",
		`{"users":{"@bob:b.example":1}}`:                      "1-12",
		`{"users":{"@Bób\u0001 x:b.example:8448":1}}`:         "1-12",
		`{"users":{"@bob:b.example":"1"}}`:                    "1-9",
		`{"users":{"@bob:b.example":null}}`:                   "none",
		`{"users":{"bob":1}}`:                                 "none",
		`{"users":{"@bob":1}}`:                                "none",
		`{"users":{"@bob:b example":1}}`:                      "none",
		`{"users":{"@bob:b.example":1,"":1}}`:                 "none",
		`{"users":null}`:                                      "none",
		`{"users":[]}`:                                        "none",
		`{"users":1}`:                                         "none",
		`{"users":{"@alice:a.example":100}}`:                  "1-11",
		`{"users":{"@bob:b.example":0,"@carol:c.example":0}}`: "1-11",
	} {
		cases[string(content)] = authCase{
			create: `{"additional_creators":["@dave:d.example","@carol:c.example"]}`, state: []authEntry{authMember(authAlice, "join")},
			event: authEvent(authAlice, typePowerLevels, "", content), allowed: versions,
		}
	}
	for _, content := range []value{`{"ban":50.57}`, `{"users":{"@bob:b.example":5.114698E4}}`, `{"events":{"a":-0.5}}`, `{"notifications":{"a":1e400}}`} {
		c := cases[`{}`]
		c.event.content, c.only = content, "1-5"
		cases[string(content)] = c
	}
	c := cases[`{}`]
	c.event.content, c.only, c.allowed = `{"ban":1e400}`, "1-5", "none"
	cases["infinite"] = c
	runAuthCases(t, cases)
}

func TestAuth_PowerLevelChange(t *testing.T) {
	const erin, frank = "@erin:e.example", "@frank:f.example"
	const before value = `{"ban":60,"events":{"m.room.power_levels":40,"x":60,"y":40},"kick":40,"notifications":{"high":60,"low":40},` +
		`"users":{"@bob:b.example":50,"@carol:c.example":50,"@dave:d.example":49,"@erin:e.example":60}}`
	state := []authEntry{authMember(authAlice, "join"), authMember(authBob, "join"), authLevels(before)}
	cases := map[string]authCase{}
	add := func(name, allowed string, content value) {
		cases[name] = authCase{state: state, event: authEvent(authBob, typePowerLevels, "", content), allowed: allowed}
	}
	set := func(list, key string, v value) value {
		if list == "" {
			return before.with(key, v)
		}
		return before.with(list, before.get(list).with(key, v))
	}

	add("nothing", "1-12", before)
	add("strings for the same numbers", "1-9", set("", "ban", `"60"`))
	add("strings for the same user levels", "1-9", set("users", erin, `"+60"`))
	add("everything", "none", `{}`)

	add("named, raised", "1-12", set("", "kick", "50"))
	add("named, too high", "none", set("", "kick", "51"))
	add("named, was too high", "none", set("", "ban", "50"))
	add("named, removed", "1-12", set("", "kick", ""))
	add("named, removed but too high", "none", set("", "ban", ""))
	for _, name := range []string{"events_default", "invite", "redact", "state_default", "users_default"} {
		add(name+", added", "1-12", set("", name, "50"))
		add(name+", added too high", "none", set("", name, "51"))
	}

	add("event, raised", "1-12", set("events", "y", "50"))
	add("event, too high", "none", set("events", "y", "51"))
	add("event, was too high", "none", set("events", "x", "50"))
	add("event, removed", "1-12", set("events", "y", ""))
	add("event, removed but too high", "none", set("events", "x", ""))
	add("event, added", "1-12", set("events", "z", "50"))
	add("event, added too high", "none", set("events", "a", "51"))
	add("events removed", "none", before.with("events", ""))

	add("notification, raised", "1-12", set("notifications", "low", "50"))
	add("notification, too high", "1-5", set("notifications", "low", "51"))
	add("notification, was too high", "1-5", set("notifications", "high", "50"))
	add("notification, removed", "1-12", set("notifications", "low", ""))
	add("notification, removed but too high", "1-5", set("notifications", "high", ""))
	add("notification, added", "1-12", set("notifications", "new", "50"))
	add("notification, added too high", "1-5", set("notifications", "new", "51"))

	add("user, lowered", "1-12", set("users", authDave, "0"))
	add("user, raised", "1-12", set("users", authDave, "50"))
	add("user, too high", "none", set("users", authDave, "51"))
	add("user, removed", "1-12", set("users", authDave, ""))
	add("user, equal, lowered", "none", set("users", authCarol, "49"))
	add("user, equal, raised", "none", set("users", authCarol, "51"))
	add("user, equal, removed", "none", set("users", authCarol, ""))
	add("user, higher, lowered", "none", set("users", erin, "50"))
	add("user, added", "1-12", set("users", frank, "50"))
	add("user, added too high", "none", set("users", frank, "51"))
	add("oneself, lowered", "1-12", set("users", authBob, "0"))
	add("oneself, raised", "none", set("users", authBob, "51"))
	add("oneself, removed", "1-12", set("users", authBob, ""))
	add("users removed", "none", before.with("users", ""))

	// no default stands in for what is absent
	low := []authEntry{state[0], state[1], authLevels(`{"events":{"m.room.power_levels":40},"kick":40,"users":{"@bob:b.example":40}}`)}
	lowContent := low[2].content
	cases["added below a default"] = authCase{state: low, event: authEvent(authBob, typePowerLevels, "", lowContent.with("ban", "40")), allowed: "1-12"}
	cases["removed below a default"] = authCase{state: low, event: authEvent(authBob, typePowerLevels, "", lowContent.with("kick", "")), allowed: "1-12"}
	cases["lists added"] = authCase{state: low, event: authEvent(authBob, typePowerLevels, "", lowContent.with("notifications", `{"a":41}`)), allowed: "1-5"}

	creator := authEvent(authAlice, typePowerLevels, "", `{"ban":9007199254740991,"users":{"@bob:b.example":9007199254740991}}`)
	cases["creator"] = authCase{state: state, event: creator, allowed: "12"}
	cases["creator against the highest"] = authCase{
		state: []authEntry{state[0], authLevels(creator.content)}, event: authEvent(authAlice, typePowerLevels, "", `{}`), allowed: "12",
	}
	cases["additional creator"] = authCase{create: `{"additional_creators":["@bob:b.example"]}`,
		state: []authEntry{state[0], state[1], authLevels(`{"ban":60,"events":{"m.room.power_levels":60}}`)},
		event: authEvent(authBob, typePowerLevels, "", `{}`), allowed: "12"}

	first := []authEntry{authMember(authAlice, "join"), authMember(authBob, "join")}
	cases["first of the creator"] = authCase{state: first, event: authEvent(authAlice, typePowerLevels, "", `{"ban":1000}`), allowed: "1-12"}
	cases["first of somebody else"] = authCase{state: first, event: authEvent(authBob, typePowerLevels, "", `{}`), allowed: "none"}
	cases["too little power"] = authCase{state: []authEntry{authMember(authDave, "join"), authLevels(`{"users":{"@dave:d.example":49}}`)}, event: authEvent(authDave, typePowerLevels, "", `{}`), allowed: "none"}
	cases["not in the room"] = authCase{state: []authEntry{authLevels(before)}, event: authEvent(authBob, typePowerLevels, "", before), allowed: "none"}
	runAuthCases(t, cases)
}
