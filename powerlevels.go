package mxfed

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"
)

// This file reads the content of m.room.power_levels events and compares two of them. Who has which power in a room is for
// the authorisation rules to say. https://spec.matrix.org/v1.19/client-server-api/#mroompower_levels

// powerLevels is the content of an m.room.power_levels event, read once. Its lists are in the order of canonical JSON,
// which is that of their keys. Nil stands for a room without the event: every level then has its default.
type powerLevels struct {
	named         []level // those with a name of their own, such as "ban"
	events        []level // by event type
	notifications []level // empty where the room version does not look at them
	users         []level
}

type level struct {
	key string
	n   int64
}

// parsePowerLevels reads the content of a power levels event as the room version allows it; absent members are empty.
// Levels beyond 64 bits count as the nearest that fits. https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func parsePowerLevels(rules *roomRules, content value) (*powerLevels, error) {
	p := &powerLevels{}
	for key, v := range content.members() {
		var err error
		switch key {
		case "ban", "events_default", "invite", "kick", "redact", "state_default", "users_default":
			n, ok := parseLevel(rules, v)
			if !ok {
				return nil, fmt.Errorf("%s is no level", key)
			}
			p.named = append(p.named, level{key, n})
		case "events":
			p.events, err = parseLevels(rules, v)
		case "notifications":
			if rules.notifications {
				p.notifications, err = parseLevels(rules, v)
			}
		case "users":
			p.users, err = parseUserLevels(rules, v)
		}
		if err != nil {
			return nil, fmt.Errorf("%s %w", key, err)
		}
	}
	return p, nil
}

func parseUserLevels(rules *roomRules, v value) ([]level, error) {
	users, err := parseLevels(rules, v)
	if err == nil && slices.ContainsFunc(users, func(l level) bool { return !UserID(l.key).valid() }) {
		err = errors.New("has a key that is no user ID")
	}
	return users, err
}

func parseLevels(rules *roomRules, v value) (levels []level, err error) {
	if !v.isObject() {
		return nil, errors.New("is no object")
	}
	for key, v := range v.members() {
		n, ok := parseLevel(rules, v)
		if !ok {
			return nil, errors.New("has a value that is no level")
		}
		levels = append(levels, level{key, n})
	}
	return levels, nil
}

// parseLevel reads one level: an integer, in old room versions also a string or a number that is cut toward zero.
// https://spec.matrix.org/v1.19/rooms/v9/#mroompower_levels-events-accept-values-as-strings and
// https://spec.matrix.org/v1.19/rooms/v5/#mroompower_levels-events-accept-values-as-floats
func parseLevel(rules *roomRules, v value) (int64, bool) {
	if s, ok := v.str(); ok {
		if !rules.stringLevels {
			return 0, false
		}
		return parseInteger(strings.TrimSpace(s))
	}
	if v == "" || v[0] != '-' && (v[0] < '0' || v[0] > '9') {
		return 0, false
	}
	if strings.ContainsAny(string(v), ".eE") {
		return cutFloat(rules, v)
	}
	return parseInteger(string(v))
}

// parseInteger reads an optional sign and decimal digits.
func parseInteger(s string) (int64, bool) {
	digits := s
	if s != "" && (s[0] == '+' || s[0] == '-') {
		digits = s[1:]
	}
	if digits == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, false
	}
	n, _ := strconv.ParseInt(s, 10, 64) // its only error here is that of the range, with the nearest integer
	return n, true
}

func cutFloat(rules *roomRules, v value) (int64, bool) {
	f, err := strconv.ParseFloat(string(v), 64)
	switch {
	case !rules.floatLevels || err != nil: // beyond what a double can hold
		return 0, false
	case f >= 1<<63:
		return math.MaxInt64, true
	case f <= -1<<63:
		return math.MinInt64, true
	}
	return int64(f), true
}

// level returns one of the levels that have a name.
func (p *powerLevels) level(name string) int64 {
	if p != nil {
		if n, ok := levelIn(p.named, name); ok {
			return n
		}
	}
	switch name {
	case "ban", "kick", "redact", "state_default":
		return 50
	}
	return 0
}

func levelIn(levels []level, key string) (int64, bool) {
	i, ok := slices.BinarySearchFunc(levels, key, func(l level, key string) int { return strings.Compare(l.key, key) })
	if !ok {
		return 0, false
	}
	return levels[i].n, true
}

// required is the level that sending an event of this type takes.
func (p *powerLevels) required(typ string, isState bool) int64 {
	if p != nil {
		if n, ok := levelIn(p.events, typ); ok {
			return n
		}
	}
	if isState {
		return p.level("state_default")
	}
	return p.level("events_default")
}

// user is the level of a user, creators of the room apart.
func (p *powerLevels) user(id UserID) int64 {
	if p != nil {
		if n, ok := levelIn(p.users, string(id)); ok {
			return n
		}
	}
	return p.level("users_default")
}

// checkChange decides whether sender, who has this power by p, may put next in place of p. Only what is there is compared:
// no default stands in for a level that was or is absent. https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func (p *powerLevels) checkChange(next *powerLevels, sender UserID, power int64) error {
	for _, lists := range [...]struct{ old, next []level }{
		{p.named, next.named}, {p.events, next.events}, {p.notifications, next.notifications},
	} {
		for c := range levelChanges(lists.old, lists.next) {
			if c.old != nil && c.old.n > power || c.next != nil && c.next.n > power {
				return fmt.Errorf("a level that changes is beyond the power of %s", sender)
			}
		}
	}
	for c := range levelChanges(p.users, next.users) {
		if c.old != nil && c.key != string(sender) && c.old.n >= power {
			return fmt.Errorf("%s has no less power than %s", c.key, sender)
		}
		if c.next != nil && c.next.n > power {
			return fmt.Errorf("the new power of %s is beyond that of %s", c.key, sender)
		}
	}
	return nil
}

// levelChange is a level that was added (old is nil), removed (next is nil) or changed.
type levelChange struct {
	key       string
	old, next *level
}

func levelChanges(old, next []level) iter.Seq[levelChange] {
	return func(yield func(levelChange) bool) {
		for old, next := old, next; len(old) > 0 || len(next) > 0; {
			var c levelChange
			switch {
			case len(next) == 0 || len(old) > 0 && old[0].key < next[0].key:
				c.key, c.old, old = old[0].key, &old[0], old[1:]
			case len(old) == 0 || next[0].key < old[0].key:
				c.key, c.next, next = next[0].key, &next[0], next[1:]
			default:
				c = levelChange{key: old[0].key, old: &old[0], next: &next[0]}
				old, next = old[1:], next[1:]
			}
			if (c.old == nil || c.next == nil || c.old.n != c.next.n) && !yield(c) {
				return
			}
		}
	}
}
