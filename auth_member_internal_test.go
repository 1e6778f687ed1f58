package mxfed

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// authWith is e with one more member in its content.
func authWith(e authEntry, key string, v value) authEntry {
	e.content = e.content.with(key, v)
	return e
}

func TestAuth_MemberForm(t *testing.T) {
	public := []authEntry{authRule("public"), authMember(authAlice, "join")}
	member := func(content value) authEntry { return authEvent(authBob, typeMember, authBob, content) }
	cases := map[string]authCase{
		"join":         {state: public, event: member(`{"membership":"join"}`), allowed: "1-12"},
		"no state key": {state: public, event: authEntry{sender: authBob, typ: typeMember, content: `{"membership":"join"}`}, allowed: "none"},
		// a creator's event could not be told from a first join by its missing state key
		"no state key, first": {create: `{"creator":""}`, event: authEntry{sender: authAlice, typ: typeMember, content: `{"membership":"join"}`, prev: []string{"create"}}, allowed: "none"},
	}
	for _, content := range []value{`{}`, `{"membership":1}`, `{"membership":null}`, `{"membership":""}`, `{"membership":["join"]}`, `{"membership":"Join"}`, `{"membership":"dance"}`, `{"Membership":"join"}`} {
		cases[string(content)] = authCase{state: public, event: member(content), allowed: "none"}
	}
	runAuthCases(t, cases)
}

// Every member event that names a user who authorises a join needs the signature of that user's server.
func TestAuth_AuthoriserSigned(t *testing.T) {
	state := []authEntry{authRule("public"), authMember(authAlice, "join"), authMember(authBob, "join"), authLevels(`{"ban":0,"kick":0,"users_default":1,"users":{"@carol:c.example":0}}`)}
	cases := map[string]authCase{}
	for name, event := range map[string]authEntry{
		"join": authMember(authBob, "join"), "leave": authMember(authBob, "leave"), "kick": authChange(authBob, authCarol, "leave"),
		"invite": authChange(authBob, authCarol, "invite"), "ban": authChange(authBob, authCarol, "ban"),
	} {
		named := authWith(event, "join_authorised_via_users_server", quoted(authAlice))
		cases[name] = authCase{state: state, event: event, allowed: "1-12"}
		cases[name+" signed"] = authCase{state: state, event: named, signed: true, allowed: "1-12"}
		cases[name+" unsigned"] = authCase{state: state, event: named, allowed: "1-7"}
	}
	for _, user := range []value{`null`, `1`, `""`, `"alice"`, `"@alice"`, `["@alice:a.example"]`} {
		event := authWith(authMember(authBob, "join"), "join_authorised_via_users_server", user)
		cases["user "+string(user)] = authCase{state: state, event: event, signed: true, allowed: "1-7"}
	}
	runAuthCases(t, cases)
}

func TestAuth_FirstJoin(t *testing.T) {
	first := func(sender, user, membership string, prev ...string) authEntry {
		e := authChange(sender, user, membership)
		e.prev = prev
		return e
	}
	join := first(authAlice, authAlice, "join", "create")
	runAuthCases(t, map[string]authCase{
		"creator":                 {event: join, allowed: "1-12"},
		"whatever the join rule":  {state: []authEntry{authRule("private")}, event: join, allowed: "1-12"},
		"sent by somebody else":   {event: first(authBob, authAlice, "join", "create"), allowed: "1-12"},
		"somebody else":           {event: first(authBob, authBob, "join", "create"), allowed: "none"},
		"additional creator":      {create: `{"additional_creators":["@bob:b.example"]}`, event: first(authBob, authBob, "join", "create"), allowed: "none"},
		"old creator":             {create: `{"creator":"@bob:b.example"}`, event: first(authBob, authBob, "join", "create"), allowed: "1-10"},
		"sender of create":        {create: `{"creator":"@bob:b.example"}`, event: join, allowed: "11-12"},
		"nothing before":          {event: first(authAlice, authAlice, "join"), allowed: "none"},
		"something else before":   {event: first(authAlice, authAlice, "join", "$x:a.example"), allowed: "none"},
		"more before":             {event: first(authAlice, authAlice, "join", "create", "$x:a.example"), allowed: "none"},
		"create event not first":  {event: first(authAlice, authAlice, "join", "$x:a.example", "create"), allowed: "none"},
		"create event twice":      {event: first(authAlice, authAlice, "join", "create", "create"), allowed: "none"},
		"knock":                   {event: first(authAlice, authAlice, "knock", "create"), allowed: "none"},
		"invite of the creator":   {event: first(authAlice, authAlice, "invite", "create"), allowed: "none"},
		"named server, no signer": {event: authWith(join, "join_authorised_via_users_server", quoted(authAlice)), allowed: "1-7"},
	})
}

func TestAuth_Join(t *testing.T) {
	for name, c := range map[string]struct {
		rule    value             // content of the join rules event, "" for none
		allowed map[string]string // by the membership so far, "" for none; "none" unless listed
	}{
		"no event":         {"", map[string]string{"invite": "1-12", "join": "1-12"}},
		"no rule":          {`{}`, map[string]string{"invite": "1-12", "join": "1-12"}},
		"invite":           {`{"join_rule":"invite"}`, map[string]string{"invite": "1-12", "join": "1-12"}},
		"public":           {`{"join_rule":"public"}`, map[string]string{"": "1-12", "invite": "1-12", "join": "1-12", "leave": "1-12", "knock": "1-12"}},
		"knock":            {`{"join_rule":"knock"}`, map[string]string{"invite": "7-12", "join": "7-12"}},
		"restricted":       {`{"join_rule":"restricted"}`, map[string]string{"invite": "8-12", "join": "8-12"}},
		"knock_restricted": {`{"join_rule":"knock_restricted"}`, map[string]string{"invite": "10-12", "join": "10-12"}},
		"private":          {`{"join_rule":"private"}`, nil},
		"unknown":          {`{"join_rule":"org.example.any"}`, nil},
		"number":           {`{"join_rule":1}`, nil},
		"null":             {`{"join_rule":null}`, nil},
	} {
		cases := map[string]authCase{}
		for _, membership := range []string{"", "invite", "join", "leave", "ban", "knock"} {
			state := []authEntry{authMember(authAlice, "join")}
			if c.rule != "" {
				state = append(state, authEvent(authAlice, typeJoinRules, "", c.rule))
			}
			if membership != "" {
				state = append(state, authMember(authBob, membership))
			}
			allowed := c.allowed[membership]
			if allowed == "" {
				allowed = "none"
			}
			cases["from "+membership] = authCase{state: state, event: authMember(authBob, "join"), allowed: allowed}
			cases["for another from "+membership] = authCase{state: state, event: authChange(authAlice, authBob, "join"), allowed: "none"}
		}
		t.Run(name, func(t *testing.T) { runAuthCases(t, cases) })
	}
}

func TestAuth_RestrictedJoin(t *testing.T) {
	const levels value = `{"invite":5,"users":{"@carol:c.example":5,"@dave:d.example":4}}`
	for rule, versions := range map[string]string{"restricted": "8-12", "knock_restricted": "10-12", "invite": "none", "knock": "none"} {
		state := func(levels value, members ...authEntry) []authEntry {
			return append([]authEntry{authRule(rule), authLevels(levels), authMember(authAlice, "join")}, members...)
		}
		without := authMember(authBob, "join")
		carol, dave := authMember(authCarol, "join"), authMember(authDave, "join")
		invited := map[string]string{"restricted": "8-12", "knock_restricted": "10-12", "invite": "1-12", "knock": "7-12"}[rule]
		t.Run(rule, func(t *testing.T) {
			runAuthCases(t, map[string]authCase{
				"authorised":             {state: state(levels, carol), event: authJoin(authBob, authCarol), signed: true, allowed: versions},
				"without signature":      {state: state(levels, carol), event: authJoin(authBob, authCarol), allowed: "none"},
				"after a leave":          {state: state(levels, carol, authMember(authBob, "leave")), event: authJoin(authBob, authCarol), signed: true, allowed: versions},
				"after a knock":          {state: state(levels, carol, authMember(authBob, "knock")), event: authJoin(authBob, authCarol), signed: true, allowed: versions},
				"by default level":       {state: state(`{}`, carol), event: authJoin(authBob, authCarol), signed: true, allowed: versions},
				"without power":          {state: state(levels, dave), event: authJoin(authBob, authDave), signed: true, allowed: "none"},
				"by a creator":           {state: state(levels), event: authJoin(authBob, authAlice), signed: true, allowed: map[bool]string{true: "12", false: "none"}[versions != "none"]},
				"by somebody not in it":  {state: state(`{}`), event: authJoin(authBob, authCarol), signed: true, allowed: "none"},
				"by an invited user":     {state: state(`{}`, authMember(authCarol, "invite")), event: authJoin(authBob, authCarol), signed: true, allowed: "none"},
				"by a user who left":     {state: state(`{}`, authMember(authCarol, "leave")), event: authJoin(authBob, authCarol), signed: true, allowed: "none"},
				"by oneself":             {state: state(`{}`), event: authJoin(authBob, authBob), signed: true, allowed: "none"},
				"by nobody":              {state: state(`{}`, carol), event: without, signed: true, allowed: "none"},
				"by an empty name":       {state: state(`{}`, authMember(authCarol, "join"), authChange(authCarol, "", "join")), event: without, signed: true, allowed: "none"},
				"banned":                 {state: state(levels, carol, authMember(authBob, "ban")), event: authJoin(authBob, authCarol), signed: true, allowed: "none"},
				"for another":            {state: state(levels, carol), event: authWith(authChange(authCarol, authBob, "join"), "join_authorised_via_users_server", quoted(authCarol)), signed: true, allowed: "none"},
				"invited, by nobody":     {state: state(levels, authMember(authBob, "invite")), event: without, allowed: invited},
				"joined, by nobody":      {state: state(levels, authMember(authBob, "join")), event: without, allowed: invited},
				"invited, without power": {state: state(levels, dave, authMember(authBob, "invite")), event: authJoin(authBob, authDave), signed: true, allowed: invited},
			})
		})
	}
}

func TestAuth_Invite(t *testing.T) {
	invite := authChange(authBob, authCarol, "invite")
	bob := authMember(authBob, "join")
	levels := authLevels(`{"invite":5,"users":{"@bob:b.example":5}}`)
	cases := map[string]authCase{
		"at the level":       {state: []authEntry{bob, levels}, event: invite, allowed: "1-12"},
		"below":              {state: []authEntry{bob, authLevels(`{"invite":5,"users":{"@bob:b.example":4}}`)}, event: invite, allowed: "none"},
		"default level":      {state: []authEntry{bob, authLevels(`{}`)}, event: invite, allowed: "1-12"},
		"below default":      {state: []authEntry{bob, authLevels(`{"users_default":-1}`)}, event: invite, allowed: "none"},
		"no levels":          {state: []authEntry{bob}, event: invite, allowed: "1-12"},
		"room not joined":    {state: []authEntry{levels}, event: invite, allowed: "none"},
		"creator not joined": {state: []authEntry{levels}, event: authChange(authAlice, authCarol, "invite"), allowed: "none"},
		"creator, high":      {state: []authEntry{authMember(authAlice, "join"), levels}, event: authChange(authAlice, authCarol, "invite"), allowed: "12"},
		"by an invited user": {state: []authEntry{authMember(authBob, "invite"), levels}, event: invite, allowed: "none"},
		"no one in a closed": {state: []authEntry{bob, authRule("private")}, event: invite, allowed: "1-12"},
	}
	for membership, allowed := range map[string]string{"join": "none", "ban": "none", "invite": "1-12", "knock": "1-12", "leave": "1-12"} {
		cases["target "+membership] = authCase{state: []authEntry{bob, levels, authMember(authCarol, membership)}, event: invite, allowed: allowed}
	}
	runAuthCases(t, cases)
}

func TestAuth_ThirdPartyInvite(t *testing.T) {
	newSigner := func(seed string) *Signer {
		s, err := NewSigner("identity.example", "ed25519:0", ed25519.NewKeyFromSeed([]byte(strings.Repeat(seed, 32))))
		require.NoError(t, err)
		return s
	}
	signer, other := newSigner("a"), newSigner("b")
	key := func(s *Signer) []byte { return s.key.Public().(ed25519.PublicKey) }
	sign := func(s *Signer, v value) value {
		signed, err := s.signObject(v)
		require.NoError(t, err)
		return signed
	}
	public, second := quoted(base64.RawStdEncoding.EncodeToString(key(signer))), quoted(base64.RawStdEncoding.EncodeToString(key(other)))
	const content value = `{"extra":1,"mxid":"@carol:c.example","token":"secret"}`
	signed := sign(signer, content)
	sig, _ := signed.get("signatures").get("identity.example").get("ed25519:0").str()
	signatures := func(v value) value { return content.with("signatures", v) }

	promise := func(content value) authEntry { return authEvent(authBob, typeThirdPartyInvite, "secret", content) }
	plain := promise(object(field{"public_key", public}))
	list := func(entries ...value) authEntry { return promise(object(field{"public_keys", array(entries...)})) }
	entry := func(key value) value { return object(field{"public_key", key}) }
	invite := func(signed value) authEntry {
		return authWith(authChange(authBob, authCarol, "invite"), "third_party_invite", object(field{"signed", signed}))
	}
	bob := authMember(authBob, "join")
	many := strings.TrimSuffix(strings.Repeat(`{"public_key":`+string(second)+`},`, maxInviteChecks), ",")

	cases := map[string]authCase{
		"public key":                 {state: []authEntry{bob, plain}, event: invite(signed), allowed: "1-12"},
		"in the list":                {state: []authEntry{bob, list(`{}`, `1`, entry(second), entry(public))}, event: invite(signed), allowed: "1-12"},
		"in the list beside another": {state: []authEntry{bob, authWith(list(entry(public)), "public_key", second)}, event: invite(signed), allowed: "1-12"},
		"URL-safe key":               {state: []authEntry{bob, list(entry(quoted(base64.URLEncoding.EncodeToString(key(signer)))))}, event: invite(signed), allowed: "1-12"},
		"sender not in the room":     {state: []authEntry{plain, authLevels(`{"invite":100}`), authRule("private")}, event: invite(signed), allowed: "1-12"},
		"target in the room":         {state: []authEntry{plain, authMember(authCarol, "join")}, event: invite(signed), allowed: "1-12"},
		"target banned":              {state: []authEntry{bob, plain, authMember(authCarol, "ban")}, event: invite(signed), allowed: "none"},
		"two signatures":             {state: []authEntry{bob, list(entry(public))}, event: invite(sign(signer, sign(other, content))), allowed: "1-12"},
		"any name and key ID":        {state: []authEntry{bob, plain}, event: invite(signatures(object(field{"x", object(field{"ed25519:", quoted(sig)})}))), allowed: "1-12"},
		"after strange signatures":   {state: []authEntry{bob, plain}, event: invite(signatures(value(`{"a":1,"b":{"ed25519:0":1,"ed25519:1":"` + sig[1:] + `","ed25519:2":"` + sig + `"}}`))), allowed: "1-12"},
		"unsigned is not covered":    {state: []authEntry{bob, plain}, event: invite(signed.with("unsigned", "1")), allowed: "1-12"},
		"the rest is":                {state: []authEntry{bob, plain}, event: invite(signed.with("extra", "2")), allowed: "none"},
		"no signed":                  {state: []authEntry{bob, plain}, event: authWith(invite(signed), "third_party_invite", `{}`), allowed: "none"},
		"signed is no object":        {state: []authEntry{bob, plain}, event: invite(`[]`), allowed: "none"},
		"null":                       {state: []authEntry{bob, plain}, event: authWith(invite(signed), "third_party_invite", `null`), allowed: "none"},
		"string":                     {state: []authEntry{bob, plain}, event: authWith(invite(signed), "third_party_invite", `"x"`), allowed: "none"},
		"no user":                    {state: []authEntry{bob, plain}, event: invite(sign(signer, `{"token":"secret"}`)), allowed: "none"},
		"another user":               {state: []authEntry{bob, plain}, event: invite(sign(signer, content.with("mxid", quoted(authDave)))), allowed: "none"},
		"strange user":               {state: []authEntry{bob, plain}, event: invite(sign(signer, content.with("mxid", "1"))), allowed: "none"},
		"no token":                   {state: []authEntry{bob, authEvent(authBob, typeThirdPartyInvite, "", plain.content)}, event: invite(sign(signer, `{"mxid":"@carol:c.example"}`)), allowed: "none"},
		"another token":              {state: []authEntry{bob, plain}, event: invite(sign(signer, content.with("token", `"guess"`))), allowed: "none"},
		"no promise":                 {state: []authEntry{bob}, event: invite(signed), allowed: "none"},
		"promise of another":         {state: []authEntry{bob, authEvent(authDave, typeThirdPartyInvite, "secret", plain.content)}, event: invite(signed), allowed: "none"},
		"no signature":               {state: []authEntry{bob, plain}, event: invite(content), allowed: "none"},
		"other algorithm":            {state: []authEntry{bob, plain}, event: invite(signatures(value(`{"x":{"curve25519:0":"` + sig + `"}}`))), allowed: "none"},
		"another key":                {state: []authEntry{bob, list(entry(second))}, event: invite(signed), allowed: "none"},
		"no key":                     {state: []authEntry{bob, promise(`{}`)}, event: invite(signed), allowed: "none"},
		"short key":                  {state: []authEntry{bob, promise(`{"public_key":"AAAA"}`)}, event: invite(signed), allowed: "none"},
		"no more than a few checks":  {state: []authEntry{bob, promise(value(`{"public_keys":[` + many + `,` + string(entry(public)) + `]}`))}, event: invite(signed), allowed: "none"},
		"as many":                    {state: []authEntry{bob, promise(value(`{"public_keys":[` + many[:strings.LastIndexByte(many, ',')] + `,` + string(entry(public)) + `]}`))}, event: invite(signed), allowed: "1-12"},
	}
	runAuthCases(t, cases)
}

func TestAuth_OwnLeave(t *testing.T) {
	cases := map[string]authCase{"from nothing": {event: authMember(authBob, "leave"), allowed: "none"}}
	for membership, allowed := range map[string]string{"join": "1-12", "invite": "1-12", "knock": "7-12", "leave": "none", "ban": "none"} {
		state := []authEntry{authMember(authBob, membership), authLevels(`{"users":{"@bob:b.example":100}}`)}
		cases["from "+membership] = authCase{state: state, event: authMember(authBob, "leave"), allowed: allowed}
	}
	runAuthCases(t, cases)
}

// authOver are the members and levels of somebody's act against Carol.
func authOver(levels value, bob, carol string) []authEntry {
	return []authEntry{authMember(authBob, bob), authMember(authCarol, carol), authLevels(levels)}
}

func TestAuth_Kick(t *testing.T) {
	kick := authChange(authBob, authCarol, "leave")
	const high value = `{"ban":60,"kick":50,"users":{"@bob:b.example":50,"@carol:c.example":49}}`
	const higher value = `{"ban":60,"kick":50,"users":{"@bob:b.example":60,"@carol:c.example":59}}`
	const cheap value = `{"ban":50,"kick":60,"users":{"@bob:b.example":55}}`
	cases := map[string]authCase{
		"sender left":       {state: authOver(high, "leave", "join"), event: kick, allowed: "none"},
		"sender invited":    {state: authOver(high, "invite", "join"), event: kick, allowed: "none"},
		"below the level":   {state: authOver(cheap, "join", "join"), event: kick, allowed: "none"},
		"equal power":       {state: authOver(`{"users":{"@bob:b.example":50,"@carol:c.example":50}}`, "join", "join"), event: kick, allowed: "none"},
		"default":           {state: authOver(`{"users":{"@bob:b.example":50}}`, "join", "join"), event: kick, allowed: "1-12"},
		"below the default": {state: authOver(`{"users":{"@bob:b.example":49}}`, "join", "join"), event: kick, allowed: "none"},
		"nobody":            {state: []authEntry{authMember(authBob, "join"), authLevels(high)}, event: kick, allowed: "1-12"},
		"unban":             {state: authOver(higher, "join", "ban"), event: kick, allowed: "1-12"},
		"unban, ban level":  {state: authOver(high, "join", "ban"), event: kick, allowed: "none"},
		"unban, kick level": {state: authOver(cheap, "join", "ban"), event: kick, allowed: "none"},
		"unban, equal":      {state: authOver(`{"users":{"@bob:b.example":50,"@carol:c.example":50}}`, "join", "ban"), event: kick, allowed: "none"},
	}
	for _, membership := range []string{"join", "invite", "knock", "leave"} {
		cases["from "+membership] = authCase{state: authOver(high, "join", membership), event: kick, allowed: "1-12"}
	}
	for name, c := range authCreators("leave") {
		cases[name] = c
	}
	runAuthCases(t, cases)
}

// authCreators are acts of creators, who are above all levels in room version 12 but not above each other.
func authCreators(membership string) map[string]authCase {
	const two value = `{"additional_creators":["@carol:c.example"]}`
	joined := []authEntry{authMember(authAlice, "join"), authMember(authBob, "join"), authMember(authCarol, "join")}
	lofty := append(slices.Clone(joined), authLevels(`{"ban":9007199254740991,"kick":9007199254740991,"users":{"@bob:b.example":9007199254740991}}`))
	return map[string]authCase{
		"creator against creator":   {create: two, state: joined, event: authChange(authAlice, authCarol, membership), allowed: "1-11"},
		"second against first":      {create: two, state: joined, event: authChange(authCarol, authAlice, membership), allowed: "none"},
		"creator against all power": {create: two, state: lofty, event: authChange(authAlice, authBob, membership), allowed: "12"},
		"second against all power":  {create: two, state: lofty, event: authChange(authCarol, authBob, membership), allowed: "12"},
		"all power against creator": {create: two, state: lofty, event: authChange(authBob, authAlice, membership), allowed: "1-11"},
		"creator without levels":    {state: joined, event: authChange(authAlice, authBob, membership), allowed: "1-12"},
		"user without levels":       {state: joined, event: authChange(authBob, authCarol, membership), allowed: "none"},
	}
}

func TestAuth_Ban(t *testing.T) {
	ban := authChange(authBob, authCarol, "ban")
	const high value = `{"ban":50,"kick":90,"users":{"@bob:b.example":50,"@carol:c.example":49}}`
	cases := map[string]authCase{
		"sender left":       {state: authOver(high, "leave", "join"), event: ban, allowed: "none"},
		"below the level":   {state: authOver(`{"ban":60,"kick":0,"users":{"@bob:b.example":59}}`, "join", "join"), event: ban, allowed: "none"},
		"equal power":       {state: authOver(`{"users":{"@bob:b.example":50,"@carol:c.example":50}}`, "join", "join"), event: ban, allowed: "none"},
		"oneself":           {state: authOver(high, "join", "join"), event: authChange(authBob, authBob, "ban"), allowed: "none"},
		"default":           {state: authOver(`{"users":{"@bob:b.example":50}}`, "join", "join"), event: ban, allowed: "1-12"},
		"below the default": {state: authOver(`{"users":{"@bob:b.example":49}}`, "join", "join"), event: ban, allowed: "none"},
		"nobody":            {state: []authEntry{authMember(authBob, "join"), authLevels(high)}, event: ban, allowed: "1-12"},
	}
	for _, membership := range []string{"join", "invite", "knock", "leave", "ban"} {
		cases["from "+membership] = authCase{state: authOver(high, "join", membership), event: ban, allowed: "1-12"}
	}
	for name, c := range authCreators("ban") {
		cases[name] = c
	}
	runAuthCases(t, cases)
}

func TestAuth_Knock(t *testing.T) {
	for rule, versions := range map[string]string{"knock": "7-12", "knock_restricted": "10-12", "restricted": "none", "invite": "none", "public": "none", "private": "none", "": "none"} {
		var state []authEntry
		if rule != "" {
			state = append(state, authRule(rule))
		}
		state = append(state, authMember(authAlice, "join"))
		cases := map[string]authCase{
			"from nothing":              {state: state, event: authMember(authBob, "knock"), allowed: versions},
			"for another":               {state: state, event: authChange(authAlice, authBob, "knock"), allowed: "none"},
			"for another, from outside": {state: state, event: authChange(authCarol, authBob, "knock"), allowed: "none"},
		}
		for membership, may := range map[string]bool{"leave": true, "knock": true, "join": false, "invite": false, "ban": false} {
			allowed := versions
			if !may {
				allowed = "none"
			}
			cases["from "+membership] = authCase{state: append(state[:len(state):len(state)], authMember(authBob, membership)), event: authMember(authBob, "knock"), allowed: allowed}
		}
		t.Run(fmt.Sprintf("rule %s", rule), func(t *testing.T) { runAuthCases(t, cases) })
	}
}
