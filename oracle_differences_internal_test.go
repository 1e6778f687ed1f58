package mxfed

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// oracleDifference is a class of cases about which implementations disagree, with the rule that this package follows.
type oracleDifference struct {
	rule, spec string
	allowed    bool // the verdict of this package
	when       func(c *oracleCase) bool
}

// Where the rules are written.
const (
	oracleRules    = "https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules"
	oracleRulesV1  = "https://spec.matrix.org/v1.19/rooms/v1/#authorization-rules"
	oracleRulesV6  = "https://spec.matrix.org/v1.19/rooms/v6/#authorization-rules"
	oracleRulesV8  = "https://spec.matrix.org/v1.19/rooms/v8/#authorization-rules"
	oracleRulesV10 = "https://spec.matrix.org/v1.19/rooms/v10/#authorization-rules"
)

var oracleDifferences = []oracleDifference{
	{"a user leaves from join or invite only, from room version 7 on also from knock", oracleRules, false, func(c *oracleCase) bool {
		return c.is("leave") && c.self() && (slices.Contains([]string{"none", "leave"}, c.membership()) || c.membership() == "knock" && !c.e.rules.knock)
	}},
	{"taking back a ban needs the ban level, the kick level and more power than the target", oracleRules, false, func(c *oracleCase) bool {
		return c.is("leave") && !c.self() && c.membership() == "ban"
	}},
	{"a join rule that the room version does not know lets nobody in, not even the invited", oracleRules, false, func(c *oracleCase) bool {
		return c.is("join") && !c.joinRuleKnown()
	}},
	{"a public room is open to those who have knocked", oracleRules, true, func(c *oracleCase) bool {
		return c.is("join") && c.self() && c.membership() == "knock" && c.joinRule() == `"public"`
	}},
	{"knock_restricted takes knocks from room version 10 on", oracleRulesV10, false, func(c *oracleCase) bool {
		return c.is("knock") && c.joinRule() == `"knock_restricted"` && !c.e.rules.knockRestricted
	}},
	{"of join rules, only join_rule decides about a member event", oracleRules, true, func(c *oracleCase) bool {
		allow := c.stateContent(typeJoinRules).get("allow")
		return c.e.typ == typeMember && allow != "" && !slices.Contains([]value{"[]", "null"}, allow)
	}},
	{"the first join of the creator may be sent by anybody", oracleRules, true, func(c *oracleCase) bool {
		return c.is("join") && c.firstJoin() && !c.self()
	}},
	{"the creator is content.creator up to room version 10, whoever sent the create event", oracleRulesV1, true, (*oracleCase).creatorApart},
	{"the creator is content.creator up to room version 10, whoever sent the create event", oracleRulesV1, false, (*oracleCase).creatorApart},
	{"the member join_authorised_via_users_server means nothing before room version 8", oracleRulesV8, true, func(c *oracleCase) bool {
		_, isString := c.content("join_authorised_via_users_server").str()
		return c.e.typ == typeMember && c.e.authoriser != "" && !isString && !c.e.rules.restricted
	}},
	{"every member event that has join_authorised_via_users_server is signed by the server of that user", oracleRulesV8, false, func(c *oracleCase) bool {
		return c.e.typ == typeMember && c.e.authoriser != "" && c.e.rules.restricted && !c.authorised
	}},

	{"an invite that has third_party_invite, whatever it is, follows the rules of third-party invites", oracleRules, false, func(c *oracleCase) bool {
		return c.is("invite") && c.content("third_party_invite") == "null"
	}},
	{"third_party_invite means nothing in other memberships", oracleRules, true, func(c *oracleCase) bool {
		return c.e.typ == typeMember && !c.is("invite") && c.content("third_party_invite") != ""
	}},
	{"a redacted invite keeps third_party_invite.signed from room version 11 on", "https://spec.matrix.org/v1.19/rooms/v11/#redactions", true, (*oracleCase).redactedInvite},
	{"a redacted invite keeps third_party_invite.signed from room version 11 on", "https://spec.matrix.org/v1.19/rooms/v11/#redactions", false, (*oracleCase).redactedInvite},
	{"a banned user cannot be invited by a third party", oracleRules, false, func(c *oracleCase) bool {
		return c.is("invite") && c.content("third_party_invite") != "" && c.membership() == "ban"
	}},
	{"the sender of a third-party invite is who sent the m.room.third_party_invite event", oracleRules, false, func(c *oracleCase) bool {
		promise, ok := c.promise()
		return ok && promise.sender != c.e.sender
	}},
	{"the keys of a third-party invite are public_key and those of public_keys; what is no key is passed over", oracleRules, true, func(c *oracleCase) bool {
		promise, ok := c.promise()
		return ok && !keyListed(promise)
	}},
	{"the signature of a third-party invite covers all of signed", "https://spec.matrix.org/v1.19/appendices/#signing-json", true, func(c *oracleCase) bool {
		return c.is("invite") && c.content("third_party_invite").get("signed").get("extra") != ""
	}},
	{"signatures of a third-party invite that are none are passed over", oracleRules, true, func(c *oracleCase) bool {
		return c.is("invite") && c.content("third_party_invite").get("signed").get("signatures").get("x") != ""
	}},
	{"of third-party invites, only signed and the public keys are looked at", oracleRules, true, func(c *oracleCase) bool {
		promise, ok := c.promise()
		return ok && slices.ContainsFunc([]value{c.content("third_party_invite"), promise.content}, func(v value) bool {
			for _, key := range []string{"display_name", "key_validity_url"} {
				if _, isString := v.get(key).str(); v.get(key) != "" && !isString {
					return true
				}
			}
			return false
		})
	}},
	{"an m.room.third_party_invite event needs the invite level and nothing else, whatever its state key", oracleRules, true, func(c *oracleCase) bool {
		return c.e.typ == typeThirdPartyInvite && strings.HasPrefix(c.e.stateKey, "@") && c.e.stateKey != string(c.e.sender)
	}},

	{"m.room.aliases follows the rules of all events from room version 6 on", oracleRulesV6, true, func(c *oracleCase) bool {
		return c.e.typ == typeAliases && !c.e.rules.aliases
	}},
	{"m.room.aliases follows the rules of all events from room version 6 on", oracleRulesV6, false, func(c *oracleCase) bool {
		return c.e.typ == typeAliases && !c.e.rules.aliases
	}},
	{"a redaction in room versions 1 and 2 needs the redact level or an event ID of the domain of its own", oracleRulesV1, true, func(c *oracleCase) bool {
		redacts := string(c.e.text.get("redacts"))
		return c.e.typ == typeRedaction && c.e.rules.redactionRule && (!strings.Contains(redacts, ":") || c.e.id.server() != c.e.sender.Server())
	}},
	{"a redaction in room versions 1 and 2 needs the redact level or an event ID of the domain of its own", oracleRulesV1, false, func(c *oracleCase) bool {
		return c.e.typ == typeRedaction && c.e.rules.redactionRule && c.e.id.server() != c.e.sender.Server()
	}},
	{"room_version of a create event names a version of the specification", oracleRules, false, func(c *oracleCase) bool {
		return c.e.typ == typeCreate && c.content("room_version") != "" && c.content("room_version") != quoted(c.e.rules.version)
	}},
	{"additional_creators of a create event is a list, if it is there", oracleRules, false, func(c *oracleCase) bool {
		return c.e.typ == typeCreate && c.content("additional_creators") == "null"
	}},
	{"of the create event, m.federate false counts and what the room version has a rule for, nothing else", oracleRules, true, (*oracleCase).createOdd},
	{"names of members are compared exactly", "https://spec.matrix.org/v1.19/appendices/#canonical-json", true, (*oracleCase).otherCase},
	{"names of members are compared exactly", "https://spec.matrix.org/v1.19/appendices/#canonical-json", false, (*oracleCase).otherCase},

	{"a power level is never null, nor is a list of them", oracleRules, false, func(c *oracleCase) bool {
		return c.e.typ == typePowerLevels && c.anyLevel(func(_, _ string, v value) bool { return v == "null" })
	}},
	{"power levels have no rule about notifications before room version 6", oracleRulesV6, true, (*oracleCase).notificationsOdd},
	{"power levels have no rule about notifications before room version 6", oracleRulesV6, false, (*oracleCase).notificationsOdd},
	{"power levels of room versions 1 to 5 may exceed 2^53 and never wrap", "https://spec.matrix.org/v1.19/rooms/v1/#canonical-json", true, (*oracleCase).hugeLevels},
	{"power levels of room versions 1 to 5 may exceed 2^53 and never wrap", "https://spec.matrix.org/v1.19/rooms/v1/#canonical-json", false, (*oracleCase).hugeLevels},
	{"users_default is one of the levels that may only change within the sender's power", oracleRules, false, func(c *oracleCase) bool {
		return c.levelChange(func(list, key string, old, next *int64, power int64) bool {
			return key == "users_default" && (old != nil && *old > power || next != nil && *next > power)
		})
	}},
	{"the level of m.room.third_party_invite in events may only change within the sender's power", oracleRules, false, func(c *oracleCase) bool {
		return c.levelChange(func(list, key string, old, next *int64, power int64) bool {
			return list == "events" && key == typeThirdPartyInvite && (old != nil && *old > power || next != nil && *next > power)
		})
	}},
	{"a level of notifications may be changed by who has that level", oracleRules, true, func(c *oracleCase) bool {
		return c.levelChange(func(list, _ string, old, _ *int64, power int64) bool {
			return list == "notifications" && old != nil && *old == power
		})
	}},
	{"creators may change notifications whatever their levels", oracleRules, true, func(c *oracleCase) bool {
		return c.e.typ == typePowerLevels && c.e.rules.hashRoomID && powerOf(c.room.lookUp, c.e.sender) == creatorPower &&
			(c.content("notifications") != "" || c.stateContent(typePowerLevels).get("notifications") != "")
	}},
	{"a level that is added or removed is judged by itself; no default stands for the one that is absent", oracleRules, false, func(c *oracleCase) bool {
		return c.levelChange(func(list, _ string, old, next *int64, power int64) bool {
			return next == nil && (*old > power || list == "users" && *old == power) || old == nil && *next > power
		})
	}},
	{"a level that is added or removed is judged by itself; no default stands for the one that is absent", oracleRules, true, func(c *oracleCase) bool {
		return c.levelChange(func(list, key string, old, next *int64, power int64) bool {
			n := c.levelDefault(list, key, old == nil)
			return (old == nil || next == nil) && (n > power || list != "events" && n == power)
		})
	}},
}

func (c *oracleCase) content(key string) value { return c.e.content.get(key) }

func (c *oracleCase) is(membership string) bool {
	return c.e.typ == typeMember && c.content("membership") == quoted(membership)
}

func (c *oracleCase) self() bool { return c.e.stateKey == string(c.e.sender) }

// membership is that of the user whom a member event is about.
func (c *oracleCase) membership() string { return membershipOf(c.room.lookUp, UserID(c.e.stateKey)) }

func (c *oracleCase) stateContent(typ string) value {
	if e := c.room.lookUp(typ, ""); e != nil {
		return e.content
	}
	return ""
}

func (c *oracleCase) joinRule() value { return c.stateContent(typeJoinRules).get("join_rule") }

// joinRuleKnown tells whether the room version has a meaning for the join rule; a room without one is for invited users.
func (c *oracleCase) joinRuleKnown() bool {
	since, known := map[value]int{"": 1, `"public"`: 1, `"invite"`: 1, `"knock"`: 7, `"restricted"`: 8, `"knock_restricted"`: 10}[c.joinRule()]
	version, err := strconv.Atoi(string(c.e.rules.version))
	return known && err == nil && since <= version
}

func (c *oracleCase) firstJoin() bool { return c.e.prevs == 1 && c.e.refs[0] == c.room.create.id }

// creatorApart tells whether the case depends on who created the room.
func (c *oracleCase) creatorApart() bool {
	create := c.room.create
	if !c.e.rules.creatorInContent || create.content.get("creator") == quoted(create.sender) {
		return false
	}
	return c.is("join") && c.firstJoin() || c.room.lookUp(typePowerLevels, "") == nil
}

// createOdd tells whether the room's create event has members of a kind that no rule looks at.
func (c *oracleCase) createOdd() bool {
	content := c.room.create.content
	federate, creator, more := content.get("m.federate"), content.get("creator"), content.get("additional_creators")
	_, isString := creator.str()
	return !slices.Contains([]value{"", "true", "false", "null"}, federate) || creator != "" && creator != "null" && !isString ||
		!c.e.rules.hashRoomID && more != "" && more != "null"
}

// otherCase tells whether the event or the state has a member whose name only differs in case from one that counts. The
// generator makes no other names that begin with a capital.
func (c *oracleCase) otherCase() bool {
	for _, e := range append([]*Event{c.e}, c.room.state...) {
		for key := range e.content.members() {
			if 'A' <= key[0] && key[0] <= 'Z' {
				return true
			}
		}
	}
	return false
}

// hugeLevels tells whether the event or the state has levels beyond 2^53.
func (c *oracleCase) hugeLevels() bool {
	return oracleHuge.MatchString(string(c.stateContent(typePowerLevels))) || c.e.typ == typePowerLevels && oracleHuge.MatchString(string(c.e.content))
}

var oracleHuge = regexp.MustCompile(`[0-9]{16}`)

// anyLevel tells whether any member of new power levels, or of the lists in it, is such as match says.
func (c *oracleCase) anyLevel(match func(list, key string, v value) bool) bool {
	for key, v := range c.e.content.members() {
		if match("", key, v) {
			return true
		}
		for k, v := range v.members() {
			if match(key, k, v) {
				return true
			}
		}
	}
	return false
}

// levelChange tells whether new power levels change any level of the present ones in such a way; nil is absent.
func (c *oracleCase) levelChange(match func(list, key string, old, next *int64, power int64) bool) bool {
	old := c.room.lookUp(typePowerLevels, "")
	if c.e.typ != typePowerLevels || c.e.levels == nil || old == nil {
		return false
	}
	power := powerOf(c.room.lookUp, c.e.sender)
	find := func(levels []level, key string) *int64 {
		if n, ok := levelIn(levels, key); ok {
			return &n
		}
		return nil
	}
	a, b := old.levels, c.e.levels
	for name, lists := range map[string][2][]level{"": {a.named, b.named}, "events": {a.events, b.events}, "users": {a.users, b.users},
		"notifications": {a.notifications, b.notifications}} {
		for _, l := range slices.Concat(lists[0], lists[1]) {
			before, after := find(lists[0], l.key), find(lists[1], l.key)
			if (before == nil || after == nil || *before != *after) && match(name, l.key, before, after, power) {
				return true
			}
		}
	}
	return false
}

func (c *oracleCase) redactedInvite() bool {
	return c.is("invite") && c.e.redacted && c.e.rules.redaction.signed && c.content("third_party_invite").isObject()
}

// levelDefault is what counts in a room for a level that is absent, before or after the event.
func (c *oracleCase) levelDefault(list, key string, before bool) int64 {
	levels := c.e.levels
	if old := c.room.lookUp(typePowerLevels, ""); before && old != nil {
		levels = old.levels
	}
	switch list {
	case "events":
		return max(levels.level("events_default"), levels.level("invite"))
	case "users":
		return levels.level("users_default")
	case "notifications":
		return 50
	}
	return (*powerLevels)(nil).level(key)
}

// promise is what a third-party invite redeems.
func (c *oracleCase) promise() (promise *Event, ok bool) {
	token, ok := c.content("third_party_invite").get("signed").get("token").str()
	promise = c.room.lookUp(typeThirdPartyInvite, token)
	return promise, ok && c.is("invite") && promise != nil
}

// keyListed tells whether a promise lists its key in all the places where one might look.
func keyListed(promise *Event) bool {
	list := slices.Collect(promise.content.get("public_keys").elements())
	return len(list) == 1 && list[0].get("public_key") == promise.content.get("public_key")
}

// notificationsOdd tells whether power levels have notifications that later room versions do not allow.
func (c *oracleCase) notificationsOdd() bool {
	for _, content := range []value{c.e.content, c.stateContent(typePowerLevels)} {
		if _, err := parseLevels(c.e.rules, content.get("notifications")); err != nil && content.get("notifications") != "" && !c.e.rules.notifications {
			return true
		}
	}
	return false
}

// oracleByteDifference is a class of events of which implementations read other bytes.
type oracleByteDifference struct {
	rule, spec string
	when       func(c *oracleCase) bool
}

var oracleByteDifferences = []oracleByteDifference{
	{"numbers of room versions 1 to 5 stay as received", "https://spec.matrix.org/v1.19/rooms/v1/#canonical-json", func(c *oracleCase) bool {
		kept := appendRedacted(nil, c.e.rules, c.e.typ, eventFields(c.e.text), true)
		return !c.e.rules.canonicalJSON && (oracleNumber.Match(kept) || strings.Contains(string(c.e.text), ":-0."))
	}},
	{"a redacted member event keeps third_party_invite.signed from room version 11 on", "https://spec.matrix.org/v1.19/rooms/v11/#redactions", func(c *oracleCase) bool {
		return c.e.rules.redaction.signed && c.e.typ == typeMember && c.content("third_party_invite").isObject()
	}},
}

// oracleNumber finds numbers with a fraction, an exponent or many digits. The strings of the generator hold none.
var oracleNumber = regexp.MustCompile(`[\[:,]-?[0-9]+(\.|[eE]|[0-9]{15})`)
