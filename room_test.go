package mxfed_test

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// srvACL is an m.room.server_acl event, whose content may be any object.
func srvACL(t testing.TB, content any) *mxfed.Event {
	p := srvPDU{"type": "m.room.server_acl", "state_key": "", "sender": "@a:us.example", "room_id": "!r:us.example", "content": content, "depth": 1,
		"origin_server_ts": 1, "prev_events": []any{}, "auth_events": []any{}}
	return srvEvent(t, "10", p.sign(t, "10"))
}

// https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func TestAllowedByACL_Vectors(t *testing.T) {
	var file struct {
		Vectors []struct {
			Content json.RawMessage  `json:"acl_content"`
			Name    mxfed.ServerName `json:"server_name"`
			Allowed bool
		}
	}
	require.NoError(t, srvReadVector("derived_server_acl.json", &file))
	require.Len(t, file.Vectors, 26)
	for _, v := range file.Vectors {
		var acl *mxfed.Event
		if string(v.Content) != "null" {
			acl = srvACL(t, v.Content)
		}
		require.Equal(t, v.Allowed, mxfed.AllowedByACL(acl, v.Name), "%s: %s", v.Name, v.Content)
	}
}

func TestAllowedByACL(t *testing.T) {
	list := func(globs ...any) []any { return globs }
	for name, c := range map[string]struct {
		allow, deny, literals any
		server                mxfed.ServerName
		allowed               bool
	}{
		"all":                        {list("*"), nil, nil, "a.example", true},
		"no allow":                   {nil, list(), nil, "a.example", false},
		"deny wins":                  {list("a.example"), list("a.*"), nil, "a.example", false},
		"deny an object":             {list("*"), map[string]any{"0": "*"}, nil, "a.example", true},
		"deny null":                  {list("*"), json.RawMessage("null"), nil, "a.example", true},
		"deny a string":              {list("*"), "a.example", nil, "a.example", true},
		"deny with nonsense":         {list("*"), list(1, nil, list("*"), map[string]any{}, "a.example"), nil, "a.example", false},
		"upper case pattern":         {list("A.EXAMPLE"), nil, nil, "a.example", true},
		"upper case name":            {list("*"), list("a.example"), nil, "A.EXAMPLE", false},
		"port of the name":           {list("a.example"), nil, nil, "a.example:443", true},
		"port in the pattern":        {list("a.example:443"), nil, nil, "a.example:443", false},
		"part of the name":           {list("example"), nil, nil, "a.example", false},
		"?":                          {list("?.example"), nil, nil, "a.example", true},
		"? is not nothing":           {list("?a.example"), nil, nil, "a.example", false},
		"? is one":                   {list("?.example"), nil, nil, "ab.example", false},
		"* is nothing":               {list("a.example*"), nil, nil, "a.example", true},
		"* in the middle":            {list("a.*.example"), nil, nil, "a.b.c.example", true},
		"** ":                        {list("**.example"), nil, nil, "a.example", true},
		"star, then more":            {list("*.b.example"), nil, nil, "a.b.b.example", true},
		"star, then less":            {list("*.b.example*c"), nil, nil, "a.b.example", false},
		"empty pattern":              {list(""), nil, nil, "a.example", false},
		"backslash":                  {list(`a\.example`), nil, nil, "a.example", false},
		"braces":                     {list("{a,b}.example"), nil, nil, "a.example", false},
		"IPv4":                       {list("*"), nil, false, "10.1.2.3", false},
		"IPv4 with a port":           {list("*"), nil, false, "10.1.2.3:8448", false},
		"IPv4 with leading zeros":    {list("*"), nil, false, "010.1.2.3", false},
		"like an IPv4":               {list("*"), nil, false, "999.1.2.3", true},
		"IPv6":                       {list("*"), nil, false, "[2001:db8::1]", false},
		"IPv6 with a port":           {list("*"), nil, false, "[2001:db8::1]:8448", false},
		"IPv6 allowed":               {list("*"), nil, true, "[2001:db8::1]", true},
		"IPv6 by pattern":            {list("[2001:db8::*]"), nil, nil, "[2001:DB8::1]:8448", true},
		"IPv6 denied":                {list("*"), list("[2001:db8::1]"), nil, "[2001:db8::1]:8448", false},
		"literals null":              {list("*"), nil, json.RawMessage("null"), "10.1.2.3", true},
		"literals 0":                 {list("*"), nil, 0, "10.1.2.3", true},
		"a literal without brackets": {list("*"), nil, nil, "2001:db8::1", false}, // is no server name
		"no server name":             {list("*"), nil, nil, "a b", false},
		"empty name":                 {list("*"), nil, nil, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			content := map[string]any{}
			for key, v := range map[string]any{"allow": c.allow, "deny": c.deny, "allow_ip_literals": c.literals} {
				if v != nil {
					content[key] = v
				}
			}
			require.Equal(t, c.allowed, mxfed.AllowedByACL(srvACL(t, content), c.server))
		})
	}
	require.True(t, mxfed.AllowedByACL(nil, "a.example"))
}

// srvMembership is a join of a room that allows it, and the answer to its question.
func newSrvMembership(t *testing.T, v mxfed.RoomVersion) (*srvRoom, *mxfed.Membership, *mxfed.Room) {
	s := newSrvSite(t)
	room := newSrvRestrictedRoom(t, s, v, "restricted", map[mxfed.RoomID]bool{"!in:us.example": true})
	m := &mxfed.Membership{Event: srvEvent(t, v, room.joinOf("@alice:domain", room.admin).sign(t, v, s.domain))}
	m.Ask = mxfed.RoomQuery{Origin: "domain", To: "us.example", Prev: m.Event.Prev(), Events: m.Event.Auth(), Event: m.Event.ID(), User: "@alice:domain",
		Allow: []mxfed.RoomID{"!in:us.example"}, State: []mxfed.StateKey{{Type: "m.room.create"}, {Type: "m.room.power_levels"}, {Type: "m.room.join_rules"},
			{Type: "m.room.server_acl"}, {Type: "m.room.member", Key: "@alice:domain"}, {Type: "m.room.member", Key: room.admin}}}
	now, err := room.answer(m.Ask)
	require.NoError(t, err)
	return room, m, now
}

// srvCheck is a join that Check lets pass, with the facts that it is given.
type srvCheck struct {
	*srvRoom
	m   *mxfed.Membership
	now *mxfed.Room
	t   *testing.T
}

// event is one more state event of the room.
func (c *srvCheck) event(typ, key string, content map[string]any) *mxfed.Event {
	return c.set(c.t, c.site.own, c.admin, typ, key, content)
}

func (c *srvCheck) member(membership string) *mxfed.Event {
	return c.event("m.room.member", "@alice:domain", map[string]any{"membership": membership})
}

// srvWithout leaves one state entry out of a list.
func srvWithout(events []*mxfed.Event, typ, key string) []*mxfed.Event {
	return slices.DeleteFunc(slices.Clone(events), func(e *mxfed.Event) bool {
		k, _ := e.StateKey()
		return e.Type() == typ && k == key
	})
}

// srvChecks are changes of a good join or its facts, and the code of what Check returns; "any" stands for all of them.
func srvChecks() map[string]struct {
	change func(c *srvCheck)
	code   mxfed.ErrorCode
} {
	nobody := map[string]any{}
	return map[string]struct {
		change func(c *srvCheck)
		code   mxfed.ErrorCode
	}{
		"nothing":              {func(c *srvCheck) {}, ""},
		"no event":             {func(c *srvCheck) { c.m.Event = nil }, mxfed.ErrInvalidParam},
		"another room version": {func(c *srvCheck) { c.now.Version = "9" }, mxfed.ErrInvalidParam},
		"no room version":      {func(c *srvCheck) { c.now.Version = "" }, mxfed.ErrInvalidParam},
		"shut out":             {func(c *srvCheck) { c.now.State = append(c.now.State, c.event("m.room.server_acl", "", nobody)) }, mxfed.ErrForbidden},
		"an own user, whom no ACL binds": {func(c *srvCheck) {
			c.m.Ask.Origin = ""
			c.now.State = append(c.now.State, c.event("m.room.server_acl", "", nobody))
		}, ""},
		"stored already, whatever else": {func(c *srvCheck) { *c.now = mxfed.Room{Version: c.now.Version, Events: []*mxfed.Event{c.m.Event}} }, ""},
		"stored already, but shut out now": {func(c *srvCheck) {
			*c.now = mxfed.Room{Version: c.now.Version, Events: []*mxfed.Event{c.m.Event}, State: []*mxfed.Event{c.event("m.room.server_acl", "", nobody)}}
		}, mxfed.ErrForbidden},
		"no events":              {func(c *srvCheck) { c.now.Events = nil }, mxfed.ErrForbidden},
		"an auth event missing":  {func(c *srvCheck) { c.now.Events = c.now.Events[1:] }, mxfed.ErrForbidden},
		"nil among the events":   {func(c *srvCheck) { c.now.Events = append([]*mxfed.Event{nil}, c.now.Events...) }, ""},
		"state before unknown":   {func(c *srvCheck) { c.now.Before = nil }, mxfed.ErrForbidden},
		"state before is empty":  {func(c *srvCheck) { c.now.Before = []*mxfed.Event{} }, mxfed.ErrForbidden},
		"no join rules before":   {func(c *srvCheck) { c.now.Before = srvWithout(c.now.Before, "m.room.join_rules", "") }, mxfed.ErrForbidden},
		"no join rules now":      {func(c *srvCheck) { c.now.State = srvWithout(c.now.State, "m.room.join_rules", "") }, mxfed.ErrForbidden},
		"no create event now":    {func(c *srvCheck) { c.now.State = srvWithout(c.now.State, "m.room.create", "") }, "any"},
		"no state now":           {func(c *srvCheck) { c.now.State = nil }, "any"},
		"authoriser gone before": {func(c *srvCheck) { c.now.Before = srvWithout(c.now.Before, "m.room.member", c.admin) }, mxfed.ErrForbidden},
		"authoriser gone now":    {func(c *srvCheck) { c.now.State = srvWithout(c.now.State, "m.room.member", c.admin) }, mxfed.ErrUnableToGrantJoin},
		"condition failed":       {func(c *srvCheck) { c.now.Joined["!in:us.example"] = false }, mxfed.ErrForbidden},
		"condition not answered": {func(c *srvCheck) { c.now.Joined = nil }, mxfed.ErrUnableToAuthoriseJoin},
		"another room joined":    {func(c *srvCheck) { c.now.Joined = map[mxfed.RoomID]bool{"!x:us.example": true} }, mxfed.ErrUnableToAuthoriseJoin},
		"banned before":          {func(c *srvCheck) { c.now.Before = append(c.now.Before, c.member("ban")) }, mxfed.ErrForbidden},
		"banned now":             {func(c *srvCheck) { c.now.State = append(c.now.State, c.member("ban")) }, mxfed.ErrForbidden},
		"invited now": {func(c *srvCheck) {
			c.now.Joined = nil
			c.now.State = append(c.now.State, c.member("invite"))
		}, ""},
	}
}

// Check decides by the facts it is given, and a fact that is missing decides against the join.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestMembershipCheck(t *testing.T) {
	for name, c := range srvChecks() {
		for _, v := range []mxfed.RoomVersion{"8", "10", "12"} {
			t.Run(name+", version "+string(v), func(t *testing.T) {
				room, m, now := newSrvMembership(t, v)
				c.change(&srvCheck{room, m, now, t})
				err := m.Check(now)
				if c.code == "" {
					require.NoError(t, err)
					return
				}
				if c.code != "any" {
					require.ErrorIs(t, err, c.code)
				}
				var typed *mxfed.Error
				require.ErrorAs(t, err, &typed)
			})
		}
	}
	_, m, _ := newSrvMembership(t, "10")
	require.ErrorIs(t, m.Check(nil), mxfed.ErrNotFound)
	require.ErrorIs(t, (&mxfed.Membership{}).Check(&mxfed.Room{}), mxfed.ErrInvalidParam)
}

// The founder's first join needs no invite, but like any other it needs that what came before it is known.
func TestMembershipCheck_Founder(t *testing.T) {
	for _, v := range srvVersions {
		room := newSrvRoom(t, newSrvSite(t), v, map[string]any{"join_rule": "invite"})
		create, rules := room.state[mxfed.StateKey{Type: "m.room.create"}], room.state[mxfed.StateKey{Type: "m.room.join_rules"}]
		refs := srvRefs(v, create.ID())
		first := room.joinOf(room.admin, "").with("prev_events", refs).with("auth_events", refs)
		if v == "12" {
			first["auth_events"] = []any{}
		}
		m := &mxfed.Membership{Event: srvEvent(t, v, first.sign(t, v, room.site.own)), Ask: mxfed.RoomQuery{To: "us.example"}}
		now := &mxfed.Room{Version: v, Events: []*mxfed.Event{create}, State: []*mxfed.Event{create, rules}}
		require.ErrorIs(t, m.Check(now), mxfed.ErrForbidden, v)
		now.Before = []*mxfed.Event{create}
		require.NoError(t, m.Check(now), v)
	}
}

// An event ID that is given and not computed may be another event's: that one being stored says nothing about this one.
func TestMembershipCheck_SameID(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRoom(t, s, "1", nil)
	join := room.joinOf("@alice:domain", "")
	require.Equal(t, 200, room.sendMember(t, s.domain, "v2/send_join", join.sign(t, "1", s.domain)).Code)
	s.reset()
	other := join.with("content", map[string]any{"membership": "join", "displayname": "x"}).with("depth", 99)
	s.requireRefused(t, room.sendMember(t, s.domain, "v2/send_join", other.sign(t, "1", s.domain)), 400, mxfed.ErrInvalidParam)
}

// What auth_events may not name is refused, however good the join is otherwise.
func TestMembershipCheck_AuthEvents(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"8", "12"} {
		room, m, now := newSrvMembership(t, v)
		create := room.state[mxfed.StateKey{Type: "m.room.create"}]
		topic := room.set(t, room.site.own, room.admin, "m.room.topic", "", map[string]any{})
		good := m.Event.Auth()
		foreign := srvEvent(t, v, room.pdu(room.admin, "m.room.power_levels", "", map[string]any{"other": 1}).
			with("room_id", map[mxfed.RoomVersion]string{"8": "!other:us.example", "12": "!" + strings.Repeat("A", 43)}[v]).sign(t, v, room.site.own))
		now.Events = append(now.Events, create, topic, foreign)
		for name, auth := range map[string][]mxfed.EventID{
			"one too many":      append(slices.Clone(good), topic.ID()),
			"twice":             append(slices.Clone(good), good[0]),
			"of another room":   append([]mxfed.EventID{foreign.ID()}, good[1:]...),
			"create event":      map[bool][]mxfed.EventID{true: append(slices.Clone(good), create.ID()), false: slices.DeleteFunc(slices.Clone(good), func(id mxfed.EventID) bool { return id == create.ID() })}[v == "12"],
			"without join rule": slices.DeleteFunc(slices.Clone(good), func(id mxfed.EventID) bool { return id == room.state[mxfed.StateKey{Type: "m.room.join_rules"}].ID() }),
		} {
			event := room.joinOf("@alice:domain", room.admin).with("auth_events", srvRefs(v, auth...))
			changed := *m
			changed.Event = srvEvent(t, v, event.sign(t, v, room.site.domain))
			require.ErrorIs(t, changed.Check(now), mxfed.ErrForbidden, "%s, version %s", name, v)
		}
		require.NoError(t, m.Check(now))
	}
}

// A RoomSource is asked for what the checks need, and for no more than it promises to answer.
func TestRoomQuery(t *testing.T) {
	s := newSrvSite(t)
	room := newSrvRestrictedRoom(t, s, "10", "restricted", map[mxfed.RoomID]bool{"!in:us.example": true})
	var asked []mxfed.RoomQuery
	s2 := newSrvSite(t, func(cfg *mxfed.Config) {
		cfg.Rooms = mxfed.RoomSourceFunc(func(_ context.Context, _ mxfed.RoomID, ask mxfed.RoomQuery) (*mxfed.Room, error) {
			asked = append(asked, ask)
			return room.answer(ask)
		})
	})
	s2.rooms = s.rooms
	pdu := room.joinOf("@alice:domain", room.admin).sign(t, "10", s.domain)
	for _, c := range []struct{ method, uri string }{{"GET", srvURI("v1/make_join", string(room.id), "@alice:domain") + "?ver=10"}, {"PUT", room.memberURI("v2/send_join", pdu)}} {
		asked = nil
		require.Equal(t, 200, s2.send(t, s.domain, c.method, c.uri, pdu).Code)
		require.Len(t, asked, 2)
		for _, ask := range asked {
			require.Equal(t, mxfed.ServerName("domain"), ask.Origin)
			require.Equal(t, mxfed.ServerName("us.example"), ask.To)
			require.Contains(t, ask.State, mxfed.StateKey{Type: "m.room.server_acl"})
			require.LessOrEqual(t, len(ask.State), 64)
			seen := make(map[mxfed.StateKey]bool)
			for _, k := range ask.State {
				require.False(t, seen[k], k)
				seen[k] = true
			}
		}
		require.Empty(t, asked[0].Allow)
		require.Equal(t, []mxfed.RoomID{"!in:us.example"}, asked[1].Allow)
		require.Equal(t, mxfed.UserID("@alice:domain"), asked[1].User)
		require.Equal(t, strings.HasPrefix(c.uri, "/_matrix/federation/v1/make_join"), asked[1].Local)
	}
}
