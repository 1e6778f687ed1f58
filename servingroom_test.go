package mxfed_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"iter"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"example.org/mxfed"
)

// This file holds a room in maps and an invite, for the tests of the serving side.

// srvRoom is a room of us.example in maps: @admin made it and has all power.
type srvRoom struct {
	site    *srvSite
	version mxfed.RoomVersion
	id      mxfed.RoomID
	depth   int
	admin   string

	mu     sync.Mutex
	events map[mxfed.EventID]*mxfed.Event
	state  map[mxfed.StateKey]*mxfed.Event
	after  map[mxfed.EventID]map[mxfed.StateKey]*mxfed.Event // of the events that the room began with
	latest *mxfed.Event
	joined map[mxfed.RoomID]bool            // what is answered about conditions
	local  *mxfed.Event                     // who may let others in
	edit   func(*mxfed.Room)                // changes what is answered, if set
	before map[mxfed.EventID][]*mxfed.Event // the state before each event that was stored
}

// newSrvRoom makes a room with these join rules; nil: public.
func newSrvRoom(t testing.TB, s *srvSite, v mxfed.RoomVersion, rules map[string]any) *srvRoom {
	r := &srvRoom{site: s, version: v, id: "!room" + mxfed.RoomID(v) + ":us.example", admin: s.own.user("admin"), events: make(map[mxfed.EventID]*mxfed.Event),
		state: make(map[mxfed.StateKey]*mxfed.Event), after: make(map[mxfed.EventID]map[mxfed.StateKey]*mxfed.Event),
		before: make(map[mxfed.EventID][]*mxfed.Event)}
	if rules == nil {
		rules = map[string]any{"join_rule": "public"}
	}
	levels := map[string]any{"users": map[string]any{r.admin: 100}, "invite": 50}
	if v == "12" {
		r.id, levels = "", map[string]any{"invite": 50}
	}
	create := r.set(t, s.own, r.admin, "m.room.create", "", map[string]any{"room_version": v, "creator": r.admin})
	r.id = create.RoomID()
	r.local = r.set(t, s.own, r.admin, "m.room.member", r.admin, map[string]any{"membership": "join"})
	r.set(t, s.own, r.admin, "m.room.power_levels", "", levels)
	r.set(t, s.own, r.admin, "m.room.join_rules", "", rules)
	s.rooms[r.id] = r
	return r
}

// set adds a state event to the room.
func (r *srvRoom) set(t testing.TB, by *srvPeer, sender, typ, key string, content map[string]any) *mxfed.Event {
	e := srvEvent(t, r.version, r.pdu(sender, typ, key, content).sign(t, r.version, by))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events[e.ID()], r.latest = e, e
	r.state[mxfed.StateKey{Type: typ, Key: key}] = e
	r.after[e.ID()] = maps.Clone(r.state)
	r.depth++
	return e
}

// pdu is a state event at the end of the room, not signed.
func (r *srvRoom) pdu(sender, typ, key string, content map[string]any) srvPDU {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := srvPDU{"type": typ, "state_key": key, "sender": sender, "content": content, "depth": r.depth + 1,
		"origin_server_ts": srvNow.UnixMilli() - 1000 + int64(r.depth), "prev_events": []any{}, "auth_events": r.authEvents(sender, typ, key, content)}
	if r.latest != nil {
		p["prev_events"] = srvRefs(r.version, r.latest.ID())
	}
	if r.id != "" {
		p["room_id"] = r.id
	}
	if srvGivenIDs(r.version) {
		_, server, _ := strings.Cut(sender, ":")
		sum := sha256.Sum256([]byte(sender + typ + key + strconv.Itoa(r.depth)))
		p["event_id"] = "$" + base64.RawURLEncoding.EncodeToString(sum[:9]) + ":" + server
	}
	return p
}

// authEvents selects from the state what an event names. https://spec.matrix.org/v1.19/server-server-api/#auth-events-selection
func (r *srvRoom) authEvents(sender, typ, key string, content map[string]any) []any {
	wanted := []mxfed.StateKey{{Type: "m.room.power_levels"}, {Type: "m.room.member", Key: sender}}
	if r.version != "12" {
		wanted = append(wanted, mxfed.StateKey{Type: "m.room.create"})
	}
	if typ == "m.room.member" {
		wanted = append(wanted, mxfed.StateKey{Type: "m.room.member", Key: key})
		if m := content["membership"]; m == "join" || m == "invite" || m == "knock" {
			wanted = append(wanted, mxfed.StateKey{Type: "m.room.join_rules"})
		}
		if user, ok := content["join_authorised_via_users_server"].(string); ok && srvRestricted(r.version) {
			wanted = append(wanted, mxfed.StateKey{Type: "m.room.member", Key: user})
		}
	}
	var ids []mxfed.EventID
	for _, k := range wanted {
		if e := r.state[k]; e != nil && typ != "m.room.create" && !slices.Contains(ids, e.ID()) {
			ids = append(ids, e.ID())
		}
	}
	return srvRefs(r.version, ids...)
}

// srvRestricted tells whether the version knows restricted joins.
func srvRestricted(v mxfed.RoomVersion) bool {
	return slices.Contains([]mxfed.RoomVersion{"8", "9", "10", "11", "12"}, v)
}

// joinOf is a user's join at the end of the room, not signed; authoriser may be "".
func (r *srvRoom) joinOf(user, authoriser string) srvPDU {
	content := map[string]any{"membership": "join"}
	if authoriser != "" {
		content["join_authorised_via_users_server"] = authoriser
	}
	return r.pdu(user, "m.room.member", user, content)
}

// answer is what a RoomSource says about the room.
func (r *srvRoom) answer(ask mxfed.RoomQuery) (*mxfed.Room, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.facts(ask), nil
}

func (r *srvRoom) facts(ask mxfed.RoomQuery) *mxfed.Room {
	room := &mxfed.Room{Version: r.version, Latest: []*mxfed.Event{r.latest}, State: srvEntries(r.state, ask.State), Joined: make(map[mxfed.RoomID]bool)}
	for _, id := range ask.Prev {
		state := r.after[id]
		if state == nil {
			room.Before = nil
			break
		}
		room.Before = srvEntries(state, ask.State)
	}
	for _, id := range append(slices.Clone(ask.Events), ask.Event) {
		if e := r.events[id]; e != nil {
			room.Events = append(room.Events, e)
		}
	}
	for _, id := range ask.Allow {
		if joined, ok := r.joined[id]; ok {
			room.Joined[id] = joined
		}
	}
	if ask.Local {
		room.Local = r.local
	}
	if r.edit != nil {
		r.edit(room)
	}
	return room
}

func srvEntries(state map[mxfed.StateKey]*mxfed.Event, keys []mxfed.StateKey) []*mxfed.Event {
	entries := []*mxfed.Event{}
	for _, k := range keys {
		if e := state[k]; e != nil {
			entries = append(entries, e)
		}
	}
	return entries
}

// join is the host's transaction.
func (r *srvRoom) join(m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.store(m)
}

// take is the host's transaction of a leave or knock.
func (r *srvRoom) take(m *mxfed.Membership) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keep(m)
}

// keep checks again and stores once.
func (r *srvRoom) keep(m *mxfed.Membership) error {
	if err := m.Check(r.facts(m.Ask)); err != nil {
		return err
	}
	id := m.Event.ID()
	if r.events[id] == nil {
		r.before[id] = slices.Collect(maps.Values(r.state))
		slices.SortFunc(r.before[id], func(a, b *mxfed.Event) int { return strings.Compare(string(a.ID()), string(b.ID())) })
		r.events[id] = m.Event
		r.state[mxfed.StateKey{Type: "m.room.member", Key: string(m.Event.Sender())}] = m.Event
	}
	return nil
}

// store keeps a join and answers it.
func (r *srvRoom) store(m *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
	if err := r.keep(m); err != nil {
		return nil, err
	}
	id := m.Event.ID()
	answer := &mxfed.SendJoinResponse{Event: r.events[id], Auth: srvSequence(r.before[id], m.OmitMembers), State: srvSequence(r.before[id], m.OmitMembers)}
	if m.OmitMembers {
		answer.Servers = []mxfed.ServerName{r.site.own.name}
	}
	return answer, nil
}

// srvSequence yields stored events, member events only if they are not to be left out.
func srvSequence(events []*mxfed.Event, omit bool) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, e := range events {
			if (!omit || e.Type() != "m.room.member") && !yield(e.JSON(), nil) {
				return
			}
		}
	}
}

// sendMember sends a member event as the server from, to the path that belongs to it.
func (r *srvRoom) sendMember(t testing.TB, from *srvPeer, endpoint string, pdu []byte) *httptest.ResponseRecorder {
	return r.site.send(t, from, http.MethodPut, r.memberURI(endpoint, pdu), pdu)
}

// memberURI is the path of a member event; one that cannot be parsed has no ID of its own.
func (r *srvRoom) memberURI(endpoint string, pdu []byte) string {
	id := mxfed.EventID("$unreadable")
	if e, err := mxfed.ParseEvent(r.version, pdu); err == nil {
		id = e.ID()
	}
	return srvURI(endpoint, string(r.id), string(id))
}

// makeJoin asks for the template of a join, offering ver.
func (r *srvRoom) makeJoin(t testing.TB, from *srvPeer, user string, ver ...string) *httptest.ResponseRecorder {
	return r.make(t, from, "join", user, ver...)
}

// make asks for the template of a membership, offering ver.
func (r *srvRoom) make(t testing.TB, from *srvPeer, membership, user string, ver ...string) *httptest.ResponseRecorder {
	uri := srvURI("v1/make_"+membership, string(r.id), user)
	if len(ver) > 0 {
		uri += "?" + url.Values{"ver": ver}.Encode()
	}
	return r.site.send(t, from, http.MethodGet, uri, nil)
}

// srvInvitation is an invite of @bob:us.example by @alice:domain, with what describes the room.
type srvInvitation struct {
	version mxfed.RoomVersion
	room    string
	create  srvPDU
	event   srvPDU
	state   []json.RawMessage // create and join rules
}

func newSrvInvitation(t testing.TB, s *srvSite, v mxfed.RoomVersion) *srvInvitation {
	i := &srvInvitation{version: v, room: "!room:domain"}
	pdu := func(typ, key string, content map[string]any) srvPDU {
		p := srvPDU{"type": typ, "state_key": key, "sender": s.domain.user("alice"), "content": content, "room_id": i.room, "depth": 3,
			"origin_server_ts": srvNow.UnixMilli() - 1000, "prev_events": srvRefs(v, "$p:domain"), "auth_events": srvRefs(v, "$a:domain", "$b:domain")}
		if srvGivenIDs(v) {
			p["event_id"] = "$" + typ + ":domain"
		}
		return p
	}
	i.create = pdu("m.room.create", "", map[string]any{"room_version": v, "creator": s.domain.user("alice")})
	i.create = i.create.with("prev_events", []any{}).with("auth_events", []any{}).with("depth", 1)
	if v == "12" {
		i.create = i.create.with("room_id", nil)
	}
	create := i.create.sign(t, v, s.domain)
	i.room = string(srvEvent(t, v, create).RoomID())
	i.state = []json.RawMessage{create, pdu("m.room.join_rules", "", map[string]any{"join_rule": "invite"}).sign(t, v, s.domain)}
	i.event = pdu("m.room.member", s.own.user("bob"), map[string]any{"membership": "invite"})
	return i
}

// body is the request of one version of the endpoint; state is any JSON value, nil leaves it out.
func (i *srvInvitation) body(t testing.TB, api string, event []byte, state any) []byte {
	if api == "v1" {
		if state == nil {
			return event
		}
		unsigned := append([]byte(`,"unsigned":`), srvJSON(t, map[string]any{"invite_room_state": state})...)
		return slices.Concat(event[:len(event)-1], unsigned, []byte("}"))
	}
	var b bytes.Buffer // event may be something that json does not know, such as text with duplicate members
	b.WriteString(`{"room_version":"` + string(i.version) + `","event":`)
	b.Write(event)
	if state != nil {
		b.WriteString(`,"invite_room_state":`)
		b.Write(srvJSON(t, state))
	}
	b.WriteString("}")
	return b.Bytes()
}

// uri is the path that belongs to event.
func (i *srvInvitation) uri(api string, event []byte) string {
	id := mxfed.EventID("$unreadable")
	if e, err := mxfed.ParseEvent(i.version, event); err == nil {
		id = e.ID()
	}
	return srvURI(api+"/invite", i.room, string(id))
}

// send sends an event, made from the invite, with the preview.
func (i *srvInvitation) send(t testing.TB, s *srvSite, from *srvPeer, api string, event []byte, state any) *httptest.ResponseRecorder {
	return s.send(t, from, http.MethodPut, i.uri(api, event), i.body(t, api, event, state))
}
