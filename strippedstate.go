package mxfed

import (
	"encoding/json"
	"net/http"
	"slices"
)

// Stripped is one state entry that describes a room to a user who is not in it: what clients may be shown.
// https://spec.matrix.org/v1.19/client-server-api/#stripped-state
type Stripped struct {
	Type, StateKey string
	Sender         UserID
	Content        json.RawMessage
	// Event is the full PDU; nil if the entry came without or in another form. Its signature is verified, yet nothing
	// shows that it is current.
	Event *Event
}

// maxPreview bounds the entries of a preview that are looked at.
const maxPreview = 50

// preview is a room as another server describes it.
type preview struct {
	rules   *roomRules
	room    RoomID
	entries []Stripped
	create  *Event
	err     error // the first thing that is wrong
}

// readPreview reads a list of state entries, PDUs or stripped ones. Entries that cannot be used are dropped.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func readPreview(rules *roomRules, room RoomID, list value) *preview {
	p := &preview{rules: rules, room: room}
	if !list.isArray() {
		return p
	}
	var parser eventParser
	n := 0
	for entry := range list.elements() {
		if n++; n > maxPreview {
			p.blame(nil, "more than %d entries", maxPreview)
			break
		}
		e, err := parser.parse(rules, []byte(entry))
		if err != nil {
			p.blame(err, "entry %d is no PDU", n)
			p.addStripped(entry)
			continue
		}
		switch {
		case !e.isState:
			p.blame(nil, "entry %d is no state event", n)
		case e.room != room:
			p.blame(nil, "entry %d belongs to another room", n)
		default:
			p.add(Stripped{Type: e.typ, StateKey: e.stateKey, Sender: e.sender, Content: e.Content(), Event: e})
		}
	}
	return p
}

// blame keeps the first thing that is wrong; cause may be nil.
func (p *preview) blame(cause error, format string, args ...any) {
	if p.err == nil {
		p.err = because(cause, ErrInvalidParam, "state of the room: "+format, args...)
	}
}

// addStripped adds an entry that is not a PDU, if it has the form that clients know.
func (p *preview) addStripped(entry value) {
	typ, ok1 := entry.get("type").str()
	key, ok2 := entry.get("state_key").str()
	sender, _ := entry.get("sender").str()
	content := entry.get("content")
	if ok1 && ok2 && UserID(sender).valid() && content.isObject() {
		p.add(Stripped{Type: typ, StateKey: key, Sender: UserID(sender), Content: json.RawMessage(content)})
	}
}

func (p *preview) add(s Stripped) {
	if slices.ContainsFunc(p.entries, func(o Stripped) bool { return o.Type == s.Type && o.StateKey == s.StateKey }) {
		p.blame(nil, "two entries for %s %q", s.Type, s.StateKey)
		return
	}
	p.entries = append(p.entries, s)
}

// events are the PDUs whose signatures are to be checked.
func (p *preview) events() (events []*Event) {
	for _, s := range p.entries {
		if s.Event != nil {
			events = append(events, s.Event)
		}
	}
	return events
}

// settle takes the verdicts on events, in their order, and drops what did not verify.
func (p *preview) settle(verdicts []verdict) {
	kept := p.entries[:0]
	for _, s := range p.entries {
		if s.Event != nil {
			v := verdicts[0]
			verdicts = verdicts[1:]
			if v.err != nil {
				if answerTo(v.err).Status != http.StatusBadGateway { // without its key nothing is known against it
					p.blame(v.err, "%s %q is not genuine", s.Type, s.StateKey)
				}
				continue
			}
			s.Event, s.Content = v.event, v.event.Content()
		}
		kept = append(kept, s)
	}
	p.entries = kept
	p.findCreate()
}

// findCreate looks for the create event, which a preview must hold and which must fit the room version.
func (p *preview) findCreate() {
	for _, s := range p.entries {
		if s.Event.is(typeCreate, "") {
			p.create = s.Event
		}
	}
	if p.create == nil {
		p.blame(nil, "create event is missing")
		return
	}
	if createdVersion(p.create) != p.rules.version {
		p.blame(nil, "create event is of another room version")
		p.create = nil
	}
}

// createdVersion is the room version that a create event names. https://spec.matrix.org/v1.19/client-server-api/#mroomcreate
func createdVersion(create *Event) RoomVersion {
	v := create.content.get("room_version")
	if v == "" {
		return "1"
	}
	version, _ := v.str()
	return RoomVersion(version)
}
