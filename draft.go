package mxfed

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"slices"
)

// This file makes the events of this server.

// draft is the material of an event that this server makes. prev and auth are in the form of the room version.
type draft struct {
	room       RoomID // "" for a create event whose hash names the room
	typ        string
	stateKey   *string
	sender     UserID
	content    value
	redacts    EventID // of a redaction
	prev, auth value
	depth, ts  int64
	origin     ServerName // "" leaves the member out
}

// isJoin tells whether d is the join of its sender, which says nothing of who authorises it.
func (d *draft) isJoin() bool {
	membership, _ := d.content.get("membership").str()
	return membership == "join" && d.typ == typeMember && d.stateKey != nil && *d.stateKey == string(d.sender) &&
		d.content.get("join_authorised_via_users_server") == ""
}

// originFor is the member origin of an event of an own server: room versions up to 10 protect it from redaction, and some
// servers still expect it there.
func originFor(rules *roomRules, own ServerName) ServerName {
	if slices.Contains(rules.redaction.topLevel, "origin") {
		return own
	}
	return ""
}

// fields are the members of the event that d describes.
func (d *draft) fields() []field {
	fields := []field{
		{"type", quoted(d.typ)}, {"sender", quoted(d.sender)}, {"content", d.content}, {"prev_events", d.prev},
		{"auth_events", d.auth}, {"depth", integer(d.depth)}, {"origin_server_ts", integer(d.ts)},
	}
	if d.room != "" {
		fields = append(fields, field{"room_id", quoted(d.room)})
	}
	if d.stateKey != nil {
		fields = append(fields, field{"state_key", quoted(*d.stateKey)})
	}
	if d.redacts != "" {
		fields = append(fields, field{"redacts", quoted(d.redacts)})
	}
	if d.origin != "" {
		fields = append(fields, field{"origin", quoted(d.origin)})
	}
	return fields
}

// build makes an event of d, with hashes and without signatures.
func (d *draft) build(rules *roomRules) (*Event, error) {
	fields := d.fields()
	if rules.eventID == idGiven { // any unique name will do; this one makes the same event twice from the same material
		sum := sha256.Sum256([]byte(object(slices.Clone(fields)...)))
		name := base64.RawURLEncoding.EncodeToString(sum[:18])
		fields = append(fields, field{"event_id", quoted("$" + name + ":" + string(cmp.Or(d.origin, d.sender.Server())))})
	}
	sum := sha256.Sum256([]byte(object(fields...)))
	hashes := object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(sum[:]))})
	text := object(append(fields, field{"hashes", hashes}, field{"signatures", "{}"})...)
	var p eventParser
	return p.parse(rules, []byte(text))
}

var errNoLatest = errors.New("mxfed: RoomSource gave no latest events")

// authKeys lists the state entries that d's auth events are selected from, in any room version.
func (d *draft) authKeys() []StateKey {
	key := ""
	if d.stateKey != nil {
		key = *d.stateKey
	}
	return authKeysFor(anyAuthRules, d.typ, key, d.stateKey != nil, d.sender, d.content)
}

// anyAuthRules select every entry that some room version selects.
var anyAuthRules = RoomVersion("11").rules()

// place puts d at the end of the room's graph.
func (d *draft) place(rules *roomRules, room *Room) error {
	if len(room.Latest) == 0 {
		return errNoLatest
	}
	latest := slices.Clone(room.Latest)
	slices.SortStableFunc(latest, func(a, b *Event) int { return int(min(max(b.depth-a.depth, -1), 1)) })
	latest = latest[:min(len(latest), maxPrevEvents)]
	d.depth = min(latest[0].depth, rules.maxDepth-1) + 1
	d.prev = references(latest)
	key := ""
	if d.stateKey != nil {
		key = *d.stateKey
	}
	var auth []*Event
	for _, k := range authKeysFor(rules, d.typ, key, d.stateKey != nil, d.sender, d.content) {
		if e := room.state(k.Type, k.Key); e != nil {
			auth = append(auth, e)
		}
	}
	d.auth = references(auth)
	return nil
}

func references(events []*Event) value {
	refs := make([]value, len(events))
	for i, e := range events {
		refs[i] = e.reference()
	}
	return array(refs...)
}
