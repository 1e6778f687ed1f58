package mxfed

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAuth_Keys(t *testing.T) {
	create, levels, rule := StateKey{typeCreate, ""}, StateKey{typePowerLevels, ""}, StateKey{typeJoinRules, ""}
	member := func(user string) StateKey { return StateKey{typeMember, user} }
	with := func(e authEntry, key string, v value) authEntry {
		e.content = e.content.with(key, v)
		return e
	}
	const promised value = `{"signed":{"token":"secret"}}`
	bob := []StateKey{create, levels, member(authBob)}
	for name, c := range map[string]struct {
		event authEntry
		keys  []StateKey
		later []StateKey // from room version 8 on
	}{
		"create":               {event: authEvent(authBob, typeCreate, "", `{}`)},
		"message":              {event: authMessage(authBob), keys: bob},
		"state":                {event: authEvent(authBob, "m.room.name", authCarol, `{"membership":"join"}`), keys: bob},
		"join":                 {event: authMember(authBob, "join"), keys: append(bob[:3:3], rule)},
		"knock":                {event: authMember(authBob, "knock"), keys: append(bob[:3:3], rule)},
		"leave":                {event: authMember(authBob, "leave"), keys: bob},
		"kick":                 {event: authChange(authBob, authCarol, "leave"), keys: append(bob[:3:3], member(authCarol))},
		"ban":                  {event: authChange(authBob, authCarol, "ban"), keys: append(bob[:3:3], member(authCarol))},
		"invite":               {event: authChange(authBob, authCarol, "invite"), keys: append(bob[:3:3], member(authCarol), rule)},
		"third-party invite":   {event: with(authChange(authBob, authCarol, "invite"), "third_party_invite", promised), keys: append(bob[:3:3], member(authCarol), rule, StateKey{typeThirdPartyInvite, "secret"})},
		"strange invite":       {event: with(authChange(authBob, authCarol, "invite"), "third_party_invite", `{"signed":{"token":1}}`), keys: append(bob[:3:3], member(authCarol), rule)},
		"third-party join":     {event: with(authMember(authBob, "join"), "third_party_invite", promised), keys: append(bob[:3:3], rule)},
		"restricted join":      {event: authJoin(authBob, authAlice), keys: append(bob[:3:3], rule), later: []StateKey{member(authAlice)}},
		"own authoriser":       {event: authJoin(authBob, authBob), keys: append(bob[:3:3], rule)},
		"strange authoriser":   {event: with(authMember(authBob, "join"), "join_authorised_via_users_server", `[]`), keys: append(bob[:3:3], rule)},
		"restricted leave":     {event: with(authMember(authBob, "leave"), "join_authorised_via_users_server", quoted(authAlice)), keys: bob},
		"member without state": {event: authEntry{sender: authBob, typ: typeMember, content: `{"membership":"join"}`}, keys: append(bob[:3:3], rule)},
		"strange member":       {event: authEvent(authBob, typeMember, authBob, `{"membership":["join"]}`), keys: bob},
	} {
		t.Run(name, func(t *testing.T) {
			for _, rules := range stableVersions {
				want := c.keys
				if rules.restricted {
					want = append(want[:len(want):len(want)], c.later...)
				}
				if rules.hashRoomID && len(want) > 0 {
					want = want[1:]
				}
				r := newAuthRoom(t, rules, "")
				keys := authKeys(r.event(t, c.event))
				require.ElementsMatch(t, want, keys, rules.version)
				require.LessOrEqual(t, len(keys), maxAuthKeys)
			}
		})
	}
}

func TestAuth_KeysAreFew(t *testing.T) {
	content := value(`{"membership":"invite","third_party_invite":{"signed":{"token":"t"}},"join_authorised_via_users_server":"@carol:c.example"}`)
	for _, membership := range []value{`"invite"`, `"join"`} {
		keys := authKeysFor(RoomVersion("11").rules(), typeMember, authAlice, true, authBob, content.with("membership", membership))
		require.Len(t, keys, 6)
	}
}

func TestAuth_AuthEvents(t *testing.T) {
	create := authEntry{typ: typeCreate}
	levels, rule := authLevels(`{}`), authRule("public")
	promise := authEvent(authBob, typeThirdPartyInvite, "secret", `{}`)
	foreign := authLevels(`{}`)
	foreign.foreign = true
	stateless := authEntry{sender: authAlice, typ: typePowerLevels, content: `{}`}
	redeemed := authChange(authBob, authCarol, "invite")
	redeemed.content = redeemed.content.with("third_party_invite", `{"signed":{"token":"secret"}}`)
	profile := authMember(authBob, "leave")
	profile.content = profile.content.with("join_authorised_via_users_server", quoted(authAlice))
	for name, c := range map[string]struct {
		event   authEntry
		auth    []authEntry // beside the create event, where it belongs
		allowed string
	}{
		"alone":                   {authMessage(authBob), nil, "1-12"},
		"all of a message":        {authMessage(authBob), []authEntry{levels, authMember(authBob, "join")}, "1-12"},
		"all of a join":           {authMember(authBob, "join"), []authEntry{levels, authMember(authBob, "join"), rule}, "1-12"},
		"all of an invite":        {redeemed, []authEntry{levels, authMember(authBob, "join"), authMember(authCarol, "leave"), rule, promise}, "1-12"},
		"all of a ban":            {authChange(authBob, authCarol, "ban"), []authEntry{authMember(authBob, "join"), authMember(authCarol, "join")}, "1-12"},
		"create event twice":      {authMessage(authBob), []authEntry{create}, "none"},
		"levels twice":            {authMessage(authBob), []authEntry{levels, levels}, "none"},
		"two states of a member":  {authMessage(authBob), []authEntry{authMember(authBob, "join"), authMember(authBob, "leave")}, "none"},
		"another room":            {authMessage(authBob), []authEntry{foreign}, "none"},
		"not a state event":       {authMessage(authBob), []authEntry{stateless}, "none"},
		"levels with a key":       {authMessage(authBob), []authEntry{authEvent(authAlice, typePowerLevels, "x", `{}`)}, "none"},
		"another type":            {authMessage(authBob), []authEntry{authEvent(authAlice, "m.room.name", "", `{}`)}, "none"},
		"another member":          {authMessage(authBob), []authEntry{authMember(authCarol, "join")}, "none"},
		"join rule of a message":  {authMessage(authBob), []authEntry{rule}, "none"},
		"join rule of a leave":    {authMember(authBob, "leave"), []authEntry{rule}, "none"},
		"promise of a plain one":  {authChange(authBob, authCarol, "invite"), []authEntry{promise}, "none"},
		"another promise":         {redeemed, []authEntry{authEvent(authBob, typeThirdPartyInvite, "other", `{}`)}, "none"},
		"authoriser of a join":    {authJoin(authBob, authAlice), []authEntry{authMember(authAlice, "join")}, "8-12"},
		"authoriser of a leave":   {profile, []authEntry{authMember(authAlice, "join")}, "none"},
		"someone else than named": {authJoin(authBob, authAlice), []authEntry{authMember(authCarol, "join")}, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, rules := range stableVersions {
				r := newAuthRoom(t, rules, "")
				var auth []*Event
				if !rules.hashRoomID {
					auth = append(auth, r.create)
				}
				for _, a := range c.auth {
					if a.typ == typeCreate {
						auth = append(auth, r.create)
					} else {
						auth = append(auth, r.event(t, a))
					}
				}
				requireAuth(t, authVersions(t, c.allowed, rules), checkAuthEvents(r.event(t, c.event), auth))
			}
		})
	}
}

func TestAuth_CreateAmongAuthEvents(t *testing.T) {
	for _, rules := range stableVersions {
		r := newAuthRoom(t, rules, "")
		message, levels := r.event(t, authMessage(authBob)), r.event(t, authLevels(`{}`))
		requireAuth(t, rules.hashRoomID, checkAuthEvents(message, []*Event{levels}))
		requireAuth(t, !rules.hashRoomID, checkAuthEvents(message, []*Event{r.create, levels}))
		require.NoError(t, checkAuthEvents(r.create, []*Event{levels}), "the rules of create events do not look at auth_events")
	}
}
