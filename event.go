package mxfed

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"slices"
)

// maxEventSize is the limit of a whole event in canonical form, in bytes.
// https://spec.matrix.org/v1.19/client-server-api/#size-limits
const maxEventSize = 65536

// An event's lists are limited too. https://spec.matrix.org/v1.19/server-server-api/#pdus
const (
	maxPrevEvents = 20
	maxAuthEvents = 10
)

// Event is a PDU, parsed once and strictly, and immutable. All that its methods return was read from the canonical form
// that its hashes and signatures cover; unsigned is not part of it. Methods may be called at any time from any goroutine
// and never panic; those of a nil Event return zero values. https://spec.matrix.org/v1.19/server-server-api/#pdus
type Event struct {
	rules    *roomRules
	text     value // the whole event
	id       EventID
	room     RoomID
	typ      string
	stateKey string
	isState  bool
	sender   UserID
	refs     []EventID // prev_events, then auth_events
	prevs    int
	depth    int64
	ts       int64 // origin_server_ts, in milliseconds
	content  value
	hash     [sha256.Size]byte // the reference hash
	hashOK   bool              // the content hash is right
	redacted bool              // content was cut down because its hash was wrong

	membership string       // of a member event, "" if it has none
	authoriser value        // of a member event, content.join_authorised_via_users_server
	levels     *powerLevels // of a power levels event; nil if they are malformed
}

// Types of events that the protocol itself reads.
const (
	typeCreate           = "m.room.create"
	typeMember           = "m.room.member"
	typePowerLevels      = "m.room.power_levels"
	typeJoinRules        = "m.room.join_rules"
	typeThirdPartyInvite = "m.room.third_party_invite"
	typeServerACL        = "m.room.server_acl"
	typePolicy           = "m.room.policy"
	typeAliases          = "m.room.aliases"
	typeRedaction        = "m.room.redaction"
)

// ID is the event's ID, computed from room version 3 on.
func (e *Event) ID() EventID {
	if e == nil {
		return ""
	}
	return e.id
}

// Version is the room version that the event was parsed as.
func (e *Event) Version() RoomVersion {
	if e == nil {
		return ""
	}
	return e.rules.version
}

// RoomID is the event's room; that of a create event of room version 12 is computed.
func (e *Event) RoomID() RoomID {
	if e == nil {
		return ""
	}
	return e.room
}

// Type is the event's type.
func (e *Event) Type() string {
	if e == nil {
		return ""
	}
	return e.typ
}

// StateKey is the event's state key; ok is false for an event that is not state.
func (e *Event) StateKey() (key string, ok bool) {
	if e == nil {
		return "", false
	}
	return e.stateKey, e.isState
}

// Sender is a valid user ID.
func (e *Event) Sender() UserID {
	if e == nil {
		return ""
	}
	return e.sender
}

// Prev lists prev_events, 20 at most.
func (e *Event) Prev() []EventID {
	if e == nil {
		return nil
	}
	return slices.Clone(e.refs[:e.prevs])
}

// Auth lists auth_events, 10 at most.
func (e *Event) Auth() []EventID {
	if e == nil {
		return nil
	}
	return slices.Clone(e.refs[e.prevs:])
}

// Content is the event's content, a JSON object in canonical form.
func (e *Event) Content() json.RawMessage {
	if e == nil {
		return nil
	}
	return json.RawMessage(e.content)
}

// Membership is the membership that a member event sets, such as "join"; empty for any other event and for a value that is
// no string. https://spec.matrix.org/v1.19/client-server-api/#mroommember
func (e *Event) Membership() string {
	if e == nil {
		return ""
	}
	return e.membership
}

// JSON is the event as servers send it to each other, in canonical form: what a host stores.
func (e *Event) JSON() []byte {
	if e == nil {
		return nil
	}
	return []byte(e.text)
}

// MarshalJSON returns JSON, null for a nil Event.
func (e *Event) MarshalJSON() ([]byte, error) {
	if e == nil {
		return []byte("null"), nil
	}
	return e.JSON(), nil
}

// is tells whether e is the state entry (typ, key).
func (e *Event) is(typ, key string) bool {
	return e != nil && e.isState && e.typ == typ && e.stateKey == key
}

// ParseEvent reads a PDU of any origin as an event of room version v: it checks the form and the limits that the version
// demands and computes hashes and IDs. It says nothing about signatures or authorisation. unsigned and other members that
// no signature covers are dropped. Errors are of type *Error. https://spec.matrix.org/v1.19/rooms/
func ParseEvent(v RoomVersion, pdu []byte) (*Event, error) {
	rules := v.rules()
	if rules == nil {
		return nil, incompatible(v)
	}
	var p eventParser
	return p.parse(rules, pdu)
}

// incompatible is the error for a room version that one side does not support.
func incompatible(v RoomVersion) error {
	return &Error{Code: ErrIncompatibleRoomVersion, RoomVersion: v, Message: "room version " + string(quoted(v)) + " is not supported"}
}

// eventParser parses events one after the other and keeps its buffers.
type eventParser struct {
	reader jsonReader
	fields []field // top-level members of the event at hand
	buf    []byte
}

func (p *eventParser) parse(rules *roomRules, pdu []byte) (*Event, error) {
	numbers := numbersAsReceived
	if rules.canonicalJSON {
		numbers = numbersStrict
	}
	text, err := p.reader.canonical(pdu, numbers)
	if err != nil {
		return nil, because(err, ErrBadJSON, "event")
	}
	e := &Event{rules: rules, text: p.covered(rules, value(text))}
	if !e.text.isObject() {
		return nil, refuse(ErrBadJSON, "event is not an object")
	}
	if len(e.text) > maxEventSize {
		return nil, refuse(ErrTooLarge, "event is larger than %d bytes", maxEventSize)
	}
	if err := p.identify(e); err != nil {
		return nil, err
	}
	if err := p.references(e); err != nil {
		return nil, err
	}
	if err := p.hashes(e); err != nil {
		return nil, err
	}
	switch e.typ {
	case typeMember:
		e.membership, _ = e.content.get("membership").str()
		e.authoriser = e.content.get("join_authorised_via_users_server")
	case typePowerLevels:
		e.levels, _ = parsePowerLevels(rules, e.content)
	}
	return e, nil
}

// covered returns v without the members that neither hashes nor signatures cover, and leaves the rest in p.fields.
// event_id counts among them where the ID is computed. https://spec.matrix.org/v1.19/server-server-api/#calculating-the-content-hash-for-an-event
func (p *eventParser) covered(rules *roomRules, v value) value {
	kept := true
	p.fields = p.fields[:0]
	for k, m := range v.members() {
		switch {
		case k == "unsigned", k == "age_ts", k == "outlier", k == "destinations", k == "event_id" && rules.eventID != idGiven:
			kept = false
		default:
			p.fields = append(p.fields, field{k, m})
		}
	}
	if kept {
		return v
	}
	p.buf = p.buf[:0]
	for _, f := range p.fields {
		p.buf = appendMember(p.buf, f.key, f.value)
	}
	p.buf = closeObject(p.buf)
	return p.covered(rules, value(p.buf))
}

func (p *eventParser) get(key string) value {
	for _, f := range p.fields {
		if f.key == key {
			return f.value
		}
	}
	return ""
}

// name reads a member that is a string of limited length.
func (p *eventParser) name(key string) (string, error) {
	s, ok := p.get(key).str()
	if !ok {
		return "", refuse(ErrInvalidParam, "event: %s is missing or no string", key)
	}
	if len(s) > maxIDLength {
		return "", refuse(ErrTooLarge, "event: %s is longer than %d bytes", key, maxIDLength)
	}
	return s, nil
}

// identify reads type, sender, state key, room and content.
func (p *eventParser) identify(e *Event) (err error) {
	if e.typ, err = p.name("type"); err != nil {
		return err
	}
	if p.get("state_key") != "" {
		if e.stateKey, err = p.name("state_key"); err != nil {
			return err
		}
		e.isState = true
	}
	sender, err := p.name("sender")
	if err != nil {
		return err
	}
	if e.sender = UserID(sender); !e.sender.valid() {
		return refuse(ErrInvalidParam, "event: sender is no user ID")
	}
	if e.content = p.get("content"); !e.content.isObject() {
		return refuse(ErrBadJSON, "event: content is missing or no object")
	}
	if e.rules.hashRoomID && e.typ == typeCreate && e.isState {
		if p.get("room_id") != "" {
			return refuse(ErrInvalidParam, "event: a create event of room version %s has no room_id", e.rules.version)
		}
		return nil
	}
	room, err := p.name("room_id")
	if err != nil {
		return err
	}
	if e.room = RoomID(room); !e.room.fits(e.rules) {
		return refuse(ErrInvalidParam, "event: room_id does not fit room version %s", e.rules.version)
	}
	return nil
}

// references reads the lists of events, depth and time.
func (p *eventParser) references(e *Event) (err error) {
	e.refs = make([]EventID, 0, 8)
	for _, list := range [...]struct {
		key string
		max int
	}{{"prev_events", maxPrevEvents}, {"auth_events", maxAuthEvents}} {
		before := len(e.refs)
		if e.refs, err = appendReferences(e.refs, e.rules, list.key, p.get(list.key)); err != nil {
			return err
		}
		if len(e.refs)-before > list.max {
			return refuse(ErrBadJSON, "event: %s has more than %d entries", list.key, list.max)
		}
		if list.key == "prev_events" {
			e.prevs = len(e.refs)
		}
	}
	var ok bool
	if e.depth, ok = p.get("depth").int(); !ok || e.depth < 0 || e.depth > e.rules.maxDepth {
		return refuse(ErrBadJSON, "event: depth is missing or out of range")
	}
	if e.ts, ok = p.get("origin_server_ts").int(); !ok {
		return refuse(ErrBadJSON, "event: origin_server_ts is missing or no integer")
	}
	return nil
}

// appendReferences reads a list of event IDs, or of pairs of ID and hash in room versions 1 and 2.
func appendReferences(refs []EventID, rules *roomRules, key string, list value) ([]EventID, error) {
	malformed := ErrBadJSON
	if rules.eventID == idGiven {
		malformed = ErrInvalidParam // the sender took the room for one of another version
	}
	if !list.isArray() {
		return nil, refuse(malformed, "event: %s is missing or no array", key)
	}
	for entry := range list.elements() {
		if rules.eventID == idGiven {
			pair := slices.AppendSeq(make([]value, 0, 2), entry.elements())
			if len(pair) != 2 || !pair[1].isObject() {
				return nil, refuse(malformed, "event: %s holds something else than pairs of ID and hash", key)
			}
			entry = pair[0]
		}
		id, ok := entry.str()
		if !ok || !EventID(id).valid() {
			return nil, refuse(malformed, "event: %s holds something else than event IDs", key)
		}
		refs = append(refs, EventID(id))
	}
	return refs, nil
}

// hashes checks the content hash, computes the reference hash and sets the ID.
func (p *eventParser) hashes(e *Event) error {
	hash, ok := p.get("hashes").get("sha256").str()
	if !ok {
		return refuse(ErrBadJSON, "event: hashes.sha256 is missing or no string")
	}
	if !p.get("signatures").isObject() {
		return refuse(ErrBadJSON, "event: signatures is missing or no object")
	}
	p.buf = appendHashed(p.buf[:0], p.fields)
	sum := sha256.Sum256(p.buf)
	p.buf = base64.RawStdEncoding.AppendEncode(p.buf[:0], sum[:])
	if e.hashOK = string(p.buf) == hash; !e.hashOK { // it may be written in another way
		claimed, err := decodeBase64(hash)
		e.hashOK = err == nil && bytes.Equal(claimed, sum[:])
	}
	p.buf = appendRedacted(p.buf[:0], e.rules, e.typ, p.fields, false)
	e.hash = sha256.Sum256(p.buf)
	switch e.rules.eventID {
	case idGiven:
		id, err := p.name("event_id")
		if err != nil {
			return err
		}
		if e.id = EventID(id); !e.id.valid() || !e.id.server().valid() {
			return refuse(ErrInvalidParam, "event: event_id is no event ID of room version %s", e.rules.version)
		}
	case idBase64:
		e.id = EventID(base64.RawStdEncoding.AppendEncode(append(p.buf[:0], '$'), e.hash[:]))
	case idURL:
		e.id = EventID(base64.RawURLEncoding.AppendEncode(append(p.buf[:0], '$'), e.hash[:]))
	}
	if e.room == "" {
		e.room = RoomID("!" + e.id[1:])
	}
	return nil
}

// appendHashed appends what the content hash covers.
// https://spec.matrix.org/v1.19/server-server-api/#calculating-the-content-hash-for-an-event
func appendHashed(b []byte, fields []field) []byte {
	for _, f := range fields {
		if f.key != "hashes" && f.key != "signatures" {
			b = appendMember(b, f.key, f.value)
		}
	}
	return closeObject(b)
}

// appendRedacted appends the redacted form of an event, without signatures if that is what will be hashed or signed.
// https://spec.matrix.org/v1.19/client-server-api/#redactions and the page of each room version
func appendRedacted(b []byte, rules *roomRules, typ string, fields []field, signatures bool) []byte {
	for _, f := range fields {
		if !slices.Contains(rules.redaction.topLevel, f.key) || f.key == "signatures" && !signatures {
			continue
		}
		if f.key != "content" {
			b = appendMember(b, f.key, f.value)
			continue
		}
		b = appendMember(b, f.key, "")
		b = appendRedactedContent(b, rules.redaction, typ, f.value)
	}
	return closeObject(b)
}

func appendRedactedContent(b []byte, r *redactionRules, typ string, content value) []byte {
	keys, all := r.keeps(typ)
	if all || !content.isObject() {
		return append(b, content...)
	}
	start := len(b)
	kept := b[start:]
	for k, m := range content.members() {
		switch {
		case slices.Contains(keys, k):
			kept = appendMember(kept, k, m)
		case k == "third_party_invite" && typ == typeMember && r.signed && m.isObject():
			kept = appendMember(kept, k, object(field{"signed", m.get("signed")}))
		}
	}
	return append(b[:start], closeObject(kept)...)
}

// redact returns the redacted copy of e with which the room goes on when the content hash is wrong.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (e *Event) redact() (*Event, error) {
	var p eventParser
	for k, m := range e.text.members() {
		p.fields = append(p.fields, field{k, m})
	}
	copied, err := p.parse(e.rules, appendRedacted(nil, e.rules, e.typ, p.fields, true))
	if err == nil {
		copied.redacted = true
	}
	return copied, err
}

// reference is how another event of the room refers to e: its ID, or ID and hash in room versions 1 and 2.
func (e *Event) reference() value {
	if e.rules.eventID != idGiven {
		return quoted(e.id)
	}
	return array(quoted(e.id), object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(e.hash[:]))}))
}
