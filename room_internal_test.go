package mxfed

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// slowGlob is matchGlob by means of a regular expression.
func slowGlob(glob, s string) bool {
	pattern := strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(regexp.QuoteMeta(glob))
	return regexp.MustCompile("(?s)^" + pattern + "$").MatchString(s)
}

func TestMatchGlob(t *testing.T) {
	var words func(alphabet string, n int) []string
	words = func(alphabet string, n int) []string {
		if n == 0 {
			return []string{""}
		}
		all := []string{""}
		for _, w := range words(alphabet, n-1) {
			for _, c := range alphabet {
				all = append(all, w+string(c))
			}
		}
		return all
	}
	names, matched := words("ab", 5), 0
	for _, glob := range words("ab*?", 4) {
		for _, name := range names {
			got := matchGlob(glob, name)
			require.Equal(t, slowGlob(glob, name), got, "%q %q", glob, name)
			if got {
				matched++
			}
		}
	}
	require.Greater(t, matched, 1000)
}

// The number of steps is bounded by the product of the lengths: a matcher that tries all ways would not end.
func TestMatchGlob_Linear(t *testing.T) {
	for _, glob := range []string{strings.Repeat("*a", 20000) + "*b", strings.Repeat("*", 60000) + "b", strings.Repeat("?*", 100) + "b", strings.Repeat("*a?", 80) + "b"} {
		require.False(t, matchGlob(glob, strings.Repeat("a", 255)))
	}
	require.True(t, matchGlob(strings.Repeat("*a", 255)+"*", strings.Repeat("a", 255)))
}

// The rooms of a join rule are those of its well-formed entries, each once; what cannot be asked about is not answered.
func TestConditions(t *testing.T) {
	rules := RoomVersion("10").rules()
	entry := func(room string) value {
		return object(field{"type", `"m.room_membership"`}, field{"room_id", quoted(room)})
	}
	conditions := func(content value) *Room {
		d := newMemberDraft("!r:us.example", "@a:us.example", "join")
		d.typ, d.content, d.prev, d.auth = typeJoinRules, content, "[]", "[]"
		key := ""
		d.stateKey = &key
		e, err := d.build(rules)
		require.NoError(t, err)
		return &Room{Version: "10", State: []*Event{e}}
	}
	r := conditions(object(field{"allow", array(entry("!a:x"), `"!b:x"`, entry("!c:x"), entry("!a:x"), `{"type":"m.room_membership"}`, `{"room_id":"!d:x","type":"other"}`)}))
	require.Equal(t, []RoomID{"!a:x", "!c:x"}, r.conditions())
	for _, content := range []value{"{}", `{"allow":{}}`, `{"allow":"!a:x"}`, `{"allow":null}`} {
		require.Empty(t, conditions(content).conditions())
		require.ErrorIs(t, conditions(content).checkConditions(), ErrForbidden)
	}
	require.Empty(t, (&Room{Version: "10"}).conditions())

	var many []value
	for i := range 100 {
		many = append(many, entry(fmt.Sprintf("!%d:x", i)))
	}
	r = conditions(object(field{"allow", array(many...)}))
	require.Len(t, r.conditions(), 100)
	require.Equal(t, r.conditions()[:maxConditions], r.checkable())
	r.Joined = make(map[RoomID]bool)
	for _, room := range r.checkable() {
		r.Joined[room] = false
	}
	require.ErrorIs(t, r.checkConditions(), ErrUnableToAuthoriseJoin)
	r.Joined["!63:x"] = true
	require.NoError(t, r.checkConditions())
}
