package mxfed

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// This file makes rooms and events for the differential test: mostly such as servers send them, with random changes. All
// of it follows from the number of the room, so that a case can be made again.

// oracleRoom is a room of some version and its present state.
type oracleRoom struct {
	*rand.Rand
	t       testing.TB
	rules   *roomRules
	signers map[ServerName]*Signer
	create  *Event
	state   []*Event // one for each entry
	peers   map[*Event]gomatrixserverlib.PDU
	serial  int64
}

var (
	oracleUsers       = []UserID{"@alice:a.example", "@bob:b.example", "@carol:a.example", "@dave:c.example:8448", "@eve:b.example"}
	oracleMemberships = []string{"join", "invite", "leave", "ban", "knock"}
	oracleJoinRules   = []string{"public", "invite", "knock", "restricted", "knock_restricted", "private", "other"}
	oracleLevelNames  = []string{"ban", "events_default", "invite", "kick", "redact", "state_default", "users_default"}
	oracleTypes       = []string{"m.room.message", "m.room.name", "org.example.x", typePowerLevels, typeThirdPartyInvite, typeJoinRules}
)

func newOracleRoom(t testing.TB, number uint64, signers map[ServerName]*Signer) *oracleRoom {
	r := &oracleRoom{Rand: rand.New(rand.NewPCG(2026, number)), t: t, rules: stableVersions[number%uint64(len(stableVersions))], signers: signers,
		peers: make(map[*Event]gomatrixserverlib.PDU)}
	for r.create == nil {
		e := r.event(r.createDraft())
		if e != nil && authorise(e, r.lookUp, false) == nil && e.content.get("room_version") == quoted(r.rules.version) {
			r.create = e
		}
	}
	r.state = []*Event{r.create}
	for _, d := range r.initialState() {
		if e := r.event(d); e != nil && (e.typ != typePowerLevels || e.levels != nil) {
			r.set(e)
		}
	}
	return r
}

// initialState is what a room may have come to; how it did is left open.
func (r *oracleRoom) initialState() (drafts []*oracleDraft) {
	for _, user := range oracleUsers {
		if membership := pickOracle(r, append([]string{"", "join", "join", "join"}, oracleMemberships...)); membership != "" {
			drafts = append(drafts, r.stateDraft(typeMember, string(user), user, object(field{"membership", quoted(membership)})))
		}
	}
	if !r.chance(20) {
		drafts = append(drafts, r.stateDraft(typePowerLevels, "", oracleUsers[0], r.powerLevels()))
	}
	if !r.chance(10) {
		drafts = append(drafts, r.joinRules(oracleUsers[0]))
	}
	return append(drafts, r.promise(pickOracle(r, oracleUsers)))
}

func (r *oracleRoom) lookUp(typ, key string) *Event { return stateOf(r.state, nil)(typ, key) }

// set replaces an entry of the state.
func (r *oracleRoom) set(e *Event) {
	for i, old := range r.state {
		if old.is(e.typ, e.stateKey) {
			r.state[i] = e
			return
		}
	}
	r.state = append(r.state, e)
}

func (r *oracleRoom) chance(percent int) bool { return r.IntN(100) < percent }

func pickOracle[T any](r *oracleRoom, from []T) T { return from[r.IntN(len(from))] }

// oracleDraft is an event that is still to be finished; more are members that not every event has.
type oracleDraft struct {
	typ     string
	key     *string
	sender  UserID
	content value
	first   bool   // its only prev_event is the create event
	room    RoomID // "" for the room itself
	more    []field
}

func (r *oracleRoom) stateDraft(typ, key string, sender UserID, content value) *oracleDraft {
	return &oracleDraft{typ: typ, key: &key, sender: sender, content: content}
}

// next is a random event of a random user.
func (r *oracleRoom) next() *oracleDraft {
	sender := r.sender()
	d := r.stateDraft("", "", sender, "")
	switch n := r.IntN(100); {
	case n < 50:
		d = r.member(sender)
	case n < 69:
		d.typ, d.content = typePowerLevels, r.powerLevels()
		if old := r.lookUp(typePowerLevels, ""); old != nil && r.chance(80) {
			d.content = r.editedLevels(old.content)
		}
	case n < 73:
		d = r.joinRules(sender)
	case n < 78:
		d = &oracleDraft{typ: "m.room.message", sender: sender, content: r.text()}
	case n < 84:
		d.typ, d.content = pickOracle(r, oracleTypes), r.text()
		*d.key = pickOracle(r, []string{"", "x", string(sender), string(pickOracle(r, oracleUsers)), "@"})
	case n < 88:
		d = r.promise(sender)
	case n < 91:
		d.typ, d.content = typeAliases, `{"aliases":["#x:a.example"]}`
		if *d.key = string(pickOracle(r, []ServerName{sender.Server(), sender.Server(), "b.example", ""})); r.chance(10) {
			d.key = nil
		}
	case n < 95:
		d = r.redaction(sender)
	default:
		d = r.createDraft()
	}
	if r.chance(10) {
		d.content = r.mutated(d.content)
	}
	if r.chance(1) {
		d.room = map[bool]RoomID{false: "!other:a.example", true: "!Nhcu5BS-UMnFX7hBVfVSoXiD7OgH6iRT-xyIuqDnpYQ"}[r.rules.hashRoomID]
	}
	return d
}

// sender is a random user, more often one who is in the room and has some power.
func (r *oracleRoom) sender() UserID {
	best := pickOracle(r, oracleUsers)
	for range r.IntN(4) {
		other := pickOracle(r, oracleUsers)
		if membershipOf(r.lookUp, other) == "join" && (membershipOf(r.lookUp, best) != "join" || powerOf(r.lookUp, other) > powerOf(r.lookUp, best)) {
			best = other
		}
	}
	return best
}

func (r *oracleRoom) createDraft() *oracleDraft {
	sender := oracleUsers[0]
	content := object(field{"room_version", quoted(r.rules.version)})
	if r.rules.creatorInContent || r.chance(5) {
		content = content.with("creator", quoted(pickOracle(r, append([]UserID{sender, sender, sender, sender}, oracleUsers...))))
	}
	switch r.IntN(20) {
	case 0, 1:
		content = content.with("m.federate", pickOracle(r, []value{"false", "false", "true", "null", `"false"`, "0"}))
	case 2:
		content = content.with("room_version", pickOracle(r, []value{"", "null", "5", `"99"`, `"org.matrix.msc4014"`}))
	case 3, 4, 5:
		content = content.with("additional_creators", pickOracle(r, []value{"null", "[]", `["x"]`, "[1]", `"@bob:b.example"`, `["@bob:b.example"]`}))
	case 6:
		content = r.mutated(content)
	}
	if r.rules.hashRoomID && content.get("additional_creators") == "" && r.chance(40) {
		content = content.with("additional_creators", `["@bob:b.example","@carol:a.example"]`)
	}
	d := r.stateDraft(typeCreate, pickOracle(r, []string{"", "", "", "", "", "", "", "x"}), sender, content)
	if r.chance(10) {
		d.sender = pickOracle(r, oracleUsers)
	}
	return d
}

// member is a change of membership.
func (r *oracleRoom) member(sender UserID) *oracleDraft {
	membership := quoted(pickOracle(r, append([]string{"join", "join"}, oracleMemberships...)))
	target := pickOracle(r, oracleUsers)
	if own := map[value]int{`"join"`: 90, `"knock"`: 90, `"leave"`: 50}[membership]; r.chance(own) {
		sender = target
	}
	if r.chance(3) {
		membership = pickOracle(r, []value{"", "null", `"other"`, `""`, "5", `"Join"`})
	}
	content := object(field{"membership", membership}, field{"displayname", `"n"`})
	if isInvite := membership == `"invite"`; isInvite && r.chance(40) || r.chance(3) {
		content = content.with("third_party_invite", r.thirdPartyInvite(target))
		if promise := r.lookUp(typeThirdPartyInvite, "token"); promise != nil && r.chance(70) {
			sender = promise.sender
		}
	}
	if membership == `"join"` && r.chance(40) || r.chance(3) {
		via := quoted(r.sender())
		if r.chance(10) {
			via = r.odd()
		}
		content = content.with("join_authorised_via_users_server", via)
	}
	d := r.stateDraft(typeMember, string(target), sender, content)
	if founder := UserID(pickOracle(r, oracleUsers)); r.chance(8) {
		d.first, *d.key, d.sender = true, string(founder), founder
		if text, ok := r.create.content.get("creator").str(); ok && r.chance(50) {
			*d.key = text
		}
	}
	return d
}

// promise is an m.room.third_party_invite event.
func (r *oracleRoom) promise(sender UserID) *oracleDraft {
	key := quoted(base64.RawStdEncoding.EncodeToString(oraclePublic(r.signers["id.example"])))
	other := quoted(base64.RawStdEncoding.EncodeToString(oraclePublic(r.signers["a.example"])))
	list := func(k value) value {
		return array(object(field{"public_key", k}, field{"key_validity_url", `"https://id.example"`}))
	}
	content := object(field{"display_name", `"b"`}, field{"key_validity_url", `"https://id.example"`})
	switch r.IntN(8) {
	case 0:
		content = content.with("public_key", key)
	case 1:
		content = content.with("public_key", key).with("public_keys", list(other))
	case 2:
		content = content.with("public_key", other).with("public_keys", list(other))
	case 3:
		content = content.with("public_key", key).with("public_keys", array(object(field{"public_key", `"AAAA"`}), object(field{"public_key", key})))
	default:
		content = content.with("public_key", key).with("public_keys", list(key))
	}
	return r.stateDraft(typeThirdPartyInvite, pickOracle(r, []string{"token", "token", "token", "token", "token", "@token", string(sender)}), sender, content)
}

func oraclePublic(s *Signer) []byte { return s.key.Public().(ed25519.PublicKey) }

// thirdPartyInvite redeems a promise, in one way or another.
func (r *oracleRoom) thirdPartyInvite(target UserID) value {
	if r.chance(15) {
		return pickOracle(r, []value{"null", r.odd()})
	}
	mxid, token := target, "token"
	if r.chance(8) {
		mxid = pickOracle(r, oracleUsers)
	}
	if r.chance(5) {
		token = "unknown"
	}
	signed := object(field{"mxid", quoted(mxid)}, field{"token", quoted(token)})
	if r.chance(8) {
		signed = signed.with("extra", "1")
	}
	if r.chance(4) {
		signed = signed.with(pickOracle(r, []string{"mxid", "token"}), r.odd())
	}
	signed, err := r.signers["id.example"].signObject(signed)
	require.NoError(r.t, err)
	if r.chance(5) {
		signed = signed.with("signatures", pickOracle(r, []value{"", "{}", `{"x":{"ed25519:0":"AAAA"}}`, "null"}))
	}
	if r.chance(5) {
		signed = signed.with("signatures", signed.get("signatures").with("x", pickOracle(r, []value{`{"ed25519:1":5}`, `5`, `{"rsa":"x"}`})))
	}
	if r.chance(3) {
		return object(field{"display_name", "5"}, field{"signed", signed})
	}
	return object(field{"display_name", `"b"`}, field{"signed", signed})
}

func (r *oracleRoom) joinRules(sender UserID) *oracleDraft {
	rule := quoted(pickOracle(r, oracleJoinRules))
	if r.chance(5) {
		rule = pickOracle(r, []value{"", "null", "5", `""`})
	}
	content := object(field{"join_rule", rule})
	if strings.Contains(string(rule), "restricted") || r.chance(5) {
		content = content.with("allow", pickOracle(r, []value{`[{"room_id":"!x:a.example","type":"m.room_membership"}]`, "[]", "null", `"x"`, "[5]"}))
	}
	return r.stateDraft(typeJoinRules, "", sender, content)
}

func (r *oracleRoom) redaction(sender UserID) *oracleDraft {
	redacts := pickOracle(r, []value{`"$x:a.example"`, `"$x:b.example"`, `"$x:c.example:8448"`, `"$x"`, "", `""`})
	d := &oracleDraft{typ: typeRedaction, sender: sender, content: object(field{"redacts", redacts}, field{"reason", `"r"`})}
	d.more = append(d.more, field{"redacts", redacts})
	return d
}

// level is a power level in one of the forms that the room version knows.
func (r *oracleRoom) level() value {
	n := pickOracle(r, []int64{0, 0, 1, 25, 49, 50, 50, 51, 99, 100, 100, 101, -1})
	switch {
	case r.rules.stringLevels && r.chance(6) || r.chance(1):
		return quoted(fmt.Sprintf(pickOracle(r, []string{"%d", " %d", "%d ", "0%d", "+%d", "\t%d", "%d.5", "x%d"}), n))
	case r.rules.floatLevels && r.chance(6):
		return value(fmt.Sprintf(pickOracle(r, []string{"%d.0", "%d.5", "%de0", "%d.5e1"}), n))
	case r.rules.floatLevels && r.chance(1):
		return pickOracle(r, []value{"9223372036854775808", "-9223372036854775809", `"9223372036854775808"`})
	case r.chance(1):
		return r.odd()
	}
	return integer(n)
}

func (r *oracleRoom) levelsOf(keys []string, percent int) value {
	var fields []field
	for _, key := range keys {
		if r.chance(percent) {
			fields = append(fields, field{key, r.level()})
		}
	}
	return object(fields...)
}

func (r *oracleRoom) powerLevels() value {
	content := r.levelsOf(oracleLevelNames, 50)
	users := make([]string, len(oracleUsers))
	for i, user := range oracleUsers {
		users[i] = string(user)
	}
	lists := object(field{"users", r.levelsOf(users, 60)}, field{"events", r.levelsOf(oracleTypes, 30)}, field{"notifications", r.levelsOf([]string{"room", "x"}, 30)})
	for key, m := range lists.members() {
		if r.chance(80) {
			content = content.with(key, m)
		}
	}
	if r.chance(3) {
		content = content.with("users", content.get("users").with("bob", r.level()))
	}
	if r.rules.hashRoomID && r.chance(80) && content.get("users") != "" { // creators must not be listed
		for creator := range creators(r.create) {
			content = content.with("users", content.get("users").with(string(creator), ""))
		}
	}
	return content
}

// editedLevels changes one or two levels of old.
func (r *oracleRoom) editedLevels(old value) value {
	for range 1 + r.IntN(2) {
		change := r.level()
		if r.chance(25) {
			change = ""
		}
		switch list := pickOracle(r, []string{"", "users", "users", "events", "notifications"}); list {
		case "":
			old = old.with(pickOracle(r, oracleLevelNames), change)
		case "users":
			old = old.with(list, old.get(list).with(string(pickOracle(r, oracleUsers)), change))
		case "events":
			old = old.with(list, old.get(list).with(pickOracle(r, oracleTypes), change))
		default:
			old = old.with(list, old.get(list).with(pickOracle(r, []string{"room", "x"}), change))
		}
	}
	return old
}

// text is a content without meaning, with whatever text and numbers the room version allows.
func (r *oracleRoom) text() value {
	texts := []string{"hi", "<&>\u2028\u2029", "\u0000\u001f\"\\/", "日本\U0001F600", "\x7f\u0080", ""}
	content := object(field{"body", quoted(pickOracle(r, texts))}, field{"\uffff", "1"}, field{"\U0001F600", r.odd()}, field{"a", array(r.odd(), r.odd())})
	if !r.rules.canonicalJSON && r.chance(10) {
		content = content.with("b", "-0.5")
	}
	return content
}

// odd is a value that rarely is what a reader expects.
func (r *oracleRoom) odd() value {
	values := []value{"null", "true", "0", "-1", "9007199254740991", `""`, `"x"`, "[]", "{}", "[null]", `{"a":{"b":[]}}`}
	if !r.rules.canonicalJSON {
		values = append(values, "1.50", "1e2", "9007199254740993", "123456789012345678901234567890")
	}
	return pickOracle(r, values)
}

// mutated changes the value or the case of one member's name, or adds a member.
func (r *oracleRoom) mutated(content value) value {
	fields := eventFields(content)
	if len(fields) == 0 || r.chance(20) {
		return content.with(pickOracle(r, append([]string{"membership", "creator", "join_rule", "users", "m.federate"}, oracleLevelNames...)), r.odd())
	}
	f := pickOracle(r, fields)
	if r.chance(30) {
		upper := strings.ToUpper(f.key[:1]) + f.key[1:]
		if r.chance(50) {
			content = content.with(f.key, "")
		}
		return content.with(upper, f.value)
	}
	return content.with(f.key, r.odd())
}

// event finishes d: references, depth, time, hashes and signatures. It returns nil if the result is no event at all.
func (r *oracleRoom) event(d *oracleDraft) *Event {
	e, err := ParseEvent(r.rules.version, []byte(r.pdu(d)))
	if err != nil {
		return nil
	}
	if !e.hashOK {
		e, err = e.redact()
		require.NoError(r.t, err)
	}
	e = eventSigned(r.t, e, r.signers[e.sender.Server()])
	if user := e.authoriserID(); user.valid() && r.signers[user.Server()] != nil && r.chance(85) {
		e = eventSigned(r.t, e, r.signers[user.Server()])
	}
	return e
}

// pdu is the event of d with a content hash, which is wrong now and then.
func (r *oracleRoom) pdu(d *oracleDraft) value {
	r.serial++
	fields := append([]field{{"type", quoted(d.typ)}, {"sender", quoted(d.sender)}, {"content", d.content}, {"depth", integer(r.serial)},
		{"origin_server_ts", integer(1_700_000_000_000 + r.serial)}, {"prev_events", r.prev(d)}, {"auth_events", r.auth(d)}}, d.more...)
	if d.key != nil {
		fields = append(fields, field{"state_key", quoted(*d.key)})
	}
	room := RoomID("!room:a.example")
	if r.create != nil {
		room = r.create.room
	}
	if d.room != "" {
		room = d.room
	}
	if d.typ != typeCreate || !r.rules.hashRoomID {
		fields = append(fields, field{"room_id", quoted(room)})
	}
	if r.rules.eventID == idGiven {
		server := d.sender.Server()
		if r.chance(5) || d.typ == typeRedaction && r.chance(30) {
			server = "b.example"
		}
		fields = append(fields, field{"event_id", quoted(fmt.Sprintf("$%d-%d:%s", r.Uint32(), r.serial, server))})
	}
	for _, key := range []string{"origin", "membership", "prev_state", "org.example.unknown"} {
		if r.chance(5) {
			fields = append(fields, field{key, pickOracle(r, []value{`"a.example"`, "null", "[]", "{}", "5"})})
		}
	}
	sum := sha256.Sum256([]byte(object(fields...)))
	if r.chance(3) || d.content.get("third_party_invite") != "" && r.chance(15) {
		sum[0]++
	}
	hashes := object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(sum[:]))})
	return object(append(fields, field{"hashes", hashes}, field{"signatures", "{}"})...)
}

func (r *oracleRoom) prev(d *oracleDraft) value {
	switch {
	case d.typ == typeCreate && !r.chance(10):
		return "[]"
	case r.create == nil:
		return array((&Event{rules: r.rules, id: "$x:a.example"}).reference())
	case d.first && r.chance(80):
		return array(r.create.reference())
	case d.first:
		return array(pickOracle(r, r.state).reference())
	}
	return array(pickOracle(r, r.state).reference(), r.create.reference())
}

func (r *oracleRoom) auth(d *oracleDraft) value {
	if d.typ == typeCreate {
		return "[]"
	}
	key := ""
	if d.key != nil {
		key = *d.key
	}
	var list []value
	for _, k := range authKeysFor(r.rules, d.typ, key, d.key != nil, d.sender, d.content) {
		if e := r.lookUp(k.Type, k.Key); e != nil {
			list = append(list, e.reference())
		}
	}
	return array(list...)
}

// scrambled writes v in another order, with white space and needless escapes: the same value.
func (r *oracleRoom) scrambled(b []byte, v value) []byte {
	space := func() { b = append(b, pickOracle(r, []string{"", "", "", " ", "\n", "\t", "\r\n"})...) }
	switch {
	case v.isObject():
		fields := eventFields(v)
		r.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		b = append(b, '{')
		for i, f := range fields {
			if i > 0 {
				b = append(b, ',')
			}
			space()
			b = r.scrambled(b, quoted(f.key))
			space()
			b = append(b, ':')
			space()
			b = r.scrambled(b, f.value)
			space()
		}
		return append(b, '}')
	case v.isArray():
		b = append(b, '[')
		for e := range v.elements() {
			if b[len(b)-1] != '[' {
				b = append(b, ',')
			}
			space()
			b = r.scrambled(b, e)
			space()
		}
		return append(b, ']')
	case v[0] == '"' && r.chance(20):
		s, _ := v.str()
		b = append(b, '"')
		for _, c := range s {
			if c < 0x10000 && (c < ' ' || c == '"' || c == '\\' || r.chance(30)) {
				b = fmt.Appendf(b, `\u%04x`, c)
			} else {
				b = append(b, string(c)...)
			}
		}
		return append(b, '"')
	}
	return append(b, v...)
}
