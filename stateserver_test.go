package mxfed_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// stateHost is a mxfed.EventHost over the rooms of a srvSite. domain and us have users in all of them.
type stateHost struct {
	site    *srvSite
	present map[mxfed.ServerName]bool
	hidden  map[mxfed.EventID]bool // by history visibility
	// What the methods do instead, if set.
	events func(ctx context.Context, ids []mxfed.EventID) ([]*mxfed.Event, error)
	ids    func(event mxfed.EventID) (state, auth []mxfed.EventID, err error)

	mu      sync.Mutex
	batches []int // the sizes of the calls of EventsByID
	asked   int   // calls of StateIDs
}

// newStateHost puts the handlers in front of the site.
func newStateHost(t testing.TB, s *srvSite) *stateHost {
	h := &stateHost{site: s, present: map[mxfed.ServerName]bool{s.domain.name: true, s.own.name: true}, hidden: make(map[mxfed.EventID]bool)}
	handlers := map[string]http.Handler{"state": mxfed.NewStateHandler(s.server, h), "state_ids": mxfed.NewStateIDsHandler(s.server, h),
		"event": mxfed.NewEventHandler(s.server, h), "event_auth": mxfed.NewEventAuthHandler(s.server, h)}
	s.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers[strings.Split(r.URL.Path, "/")[4]].ServeHTTP(w, r)
	})
	return h
}

// add makes a public room in which Alice of domain has joined after a topic was set.
func (h *stateHost) add(t testing.TB, v mxfed.RoomVersion) (room *srvRoom, join *mxfed.Event) {
	room = newSrvRoom(t, h.site, v, nil)
	room.edit = func(r *mxfed.Room) { r.Present = h.present }
	room.set(t, h.site.own, room.admin, "m.room.topic", "", map[string]any{"topic": "tea"})
	alice := h.site.domain.user("alice")
	return room, room.set(t, h.site.domain, alice, "m.room.member", alice, map[string]any{"membership": "join"})
}

func (h *stateHost) find(id mxfed.EventID) *mxfed.Event {
	for _, r := range h.site.rooms {
		if e := r.events[id]; e != nil {
			return e
		}
	}
	return nil
}

func (h *stateHost) EventsByID(ctx context.Context, origin mxfed.ServerName, ids []mxfed.EventID) (found []*mxfed.Event, err error) {
	h.mu.Lock()
	h.batches = append(h.batches, len(ids))
	h.mu.Unlock()
	if h.events != nil {
		return h.events(ctx, ids)
	}
	for _, id := range slices.Backward(ids) {
		if e := h.find(id); e != nil && (origin == "" || !h.hidden[id]) {
			found = append(found, e)
		}
	}
	return found, nil
}

func (h *stateHost) StateIDs(_ context.Context, id mxfed.RoomID, event mxfed.EventID) (state, auth []mxfed.EventID, err error) {
	h.asked++
	if h.ids != nil {
		return h.ids(event)
	}
	for _, e := range h.site.rooms[id].after[h.find(event).Prev()[0]] {
		state = append(state, e.ID())
	}
	slices.Sort(state)
	return state, h.chain(state), nil
}

// chain is the auth chain of some events.
func (h *stateHost) chain(of []mxfed.EventID) (chain []mxfed.EventID) {
	todo := slices.Clone(of)
	for i := 0; i < len(todo); i++ {
		for _, id := range h.find(todo[i]).Auth() {
			if !slices.Contains(chain, id) {
				chain, todo = append(chain, id), append(todo, id)
			}
		}
	}
	return chain
}

// stateURIs are the paths of the four endpoints for an event.
func stateURIs(room mxfed.RoomID, event mxfed.EventID) map[string]string {
	query := "?event_id=" + url.QueryEscape(string(event))
	return map[string]string{
		"state":      "/_matrix/federation/v1/state/" + url.PathEscape(string(room)) + query,
		"state_ids":  "/_matrix/federation/v1/state_ids/" + url.PathEscape(string(room)) + query,
		"event":      "/_matrix/federation/v1/event/" + url.PathEscape(string(event)),
		"event_auth": srvURI("v1/event_auth", string(room), string(event)),
	}
}

// statePDUs are the IDs of a list of PDUs in an answer.
func statePDUs(t testing.TB, v mxfed.RoomVersion, list any) (ids []mxfed.EventID) {
	for _, pdu := range list.([]any) {
		ids = append(ids, srvEvent(t, v, srvJSON(t, pdu)).ID())
	}
	return ids
}

func stateStrings(list any) (ids []mxfed.EventID) {
	for _, id := range list.([]any) {
		ids = append(ids, mxfed.EventID(id.(string)))
	}
	return ids
}

// A server in the room is told the state before an event, the event itself and what authorises it.
// https://spec.matrix.org/v1.19/server-server-api/#retrieving-events
func TestState_Served(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		h := newStateHost(t, s)
		room, join := h.add(t, v)
		answers := make(map[string]map[string]any)
		for name, uri := range stateURIs(room.id, join.ID()) {
			w := s.send(t, s.domain, http.MethodGet, uri, nil)
			require.Equal(t, 200, w.Code, "%s %s: %s", v, name, w.Body)
			require.Equal(t, "application/json", w.Header().Get("Content-Type"))
			answers[name] = srvObject(t, w.Body.Bytes())
		}
		state, auth, err := h.StateIDs(t.Context(), room.id, join.ID())
		require.NoError(t, err)
		require.Len(t, state, 5)
		require.NotContains(t, state, join.ID(), "the state before the event")
		if v == "12" { // there the create event is not named by others
			auth = append([]mxfed.EventID{room.state[mxfed.StateKey{Type: "m.room.create"}].ID()}, auth...)
		}
		require.Equal(t, []any{state, auth}, []any{statePDUs(t, v, answers["state"]["pdus"]), statePDUs(t, v, answers["state"]["auth_chain"])})
		require.Len(t, answers["state"], 2)
		require.Equal(t, []any{state, auth}, []any{stateStrings(answers["state_ids"]["pdu_ids"]), stateStrings(answers["state_ids"]["auth_chain_ids"])})
		require.Len(t, answers["state_ids"], 2)
		require.Equal(t, []any{"us.example", float64(srvNow.UnixMilli())}, []any{answers["event"]["origin"], answers["event"]["origin_server_ts"]})
		require.Equal(t, []mxfed.EventID{join.ID()}, statePDUs(t, v, answers["event"]["pdus"]))
		chain := h.chain([]mxfed.EventID{join.ID()})
		if v == "12" { // events depend on the create event without naming it
			chain = append(chain, mxfed.EventID("$"+room.id[1:]))
		}
		require.ElementsMatch(t, chain, statePDUs(t, v, answers["event_auth"]["auth_chain"]))
	}
}

// The state before the first event, and what authorises it, is nothing.
func TestState_OfCreateEvent(t *testing.T) {
	for _, v := range srvVersions {
		s := newSrvSite(t)
		h := newStateHost(t, s)
		h.ids = func(mxfed.EventID) (state, auth []mxfed.EventID, err error) { return nil, nil, nil }
		room, _ := h.add(t, v)
		create := room.state[mxfed.StateKey{Type: "m.room.create"}].ID()
		for name, want := range map[string]string{"state": `{"auth_chain":[],"pdus":[]}`, "state_ids": `{"auth_chain_ids":[],"pdu_ids":[]}`, "event_auth": `{"auth_chain":[]}`} {
			w := s.send(t, s.domain, http.MethodGet, stateURIs(room.id, create)[name], nil)
			require.Equal(t, want, w.Body.String(), "%s %s", v, name)
		}
	}
}

// Only servers that are in the room at this moment, and not shut out of it, are told anything; of what a single event
// belongs to, nobody else learns even that.
// https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func TestState_Access(t *testing.T) {
	type site struct {
		*stateHost
		room *srvRoom
		join *mxfed.Event
	}
	for name, c := range map[string]struct {
		change      func(s *site)
		room, event func(s *site) string // asked about; nil: the room's own
		status      int
		code        mxfed.ErrorCode
	}{
		"not in the room": {change: func(s *site) { s.present = map[mxfed.ServerName]bool{"domain": false} }, status: 403, code: mxfed.ErrForbidden},
		"cannot tell":     {change: func(s *site) { s.present = nil }, status: 403, code: mxfed.ErrForbidden},
		"shut out":        {change: func(s *site) { s.setACL(t, s.room, `domain`) }, status: 403, code: mxfed.ErrForbidden},
		"unknown room":    {room: func(*site) string { return "!x:us.example" }, status: 404, code: mxfed.ErrNotFound},
		"left room":       {change: func(s *site) { delete(s.site.rooms, s.room.id) }, status: 404, code: mxfed.ErrNotFound},
		"unknown event":   {event: func(*site) string { return "$x" }, status: 404, code: mxfed.ErrNotFound},
		"no event ID":     {event: func(*site) string { return "x y" }, status: 404, code: mxfed.ErrNotFound},
		"host mixes up rooms": {change: func(s *site) {
			_, e := s.add(t, "9")
			s.room.edit = func(r *mxfed.Room) { r.Present, r.Events = s.present, []*mxfed.Event{e} }
			s.join = e
		}, event: func(s *site) string { return string(s.join.ID()) }, status: 404, code: mxfed.ErrNotFound},
		"event of elsewhere": {event: func(s *site) string { _, e := s.add(t, "9"); return string(e.ID()) }, status: 404, code: mxfed.ErrNotFound},
	} {
		bodies := make(map[string]bool) // of event
		for endpoint := range stateURIs("!r", "$e") {
			s := &site{stateHost: newStateHost(t, newSrvSite(t))}
			s.room, s.join = s.add(t, "10")
			id, event := string(s.room.id), string(s.join.ID())
			if c.change != nil {
				c.change(s)
			}
			if c.room != nil {
				id = c.room(s)
			}
			if c.event != nil {
				event = c.event(s)
			}
			w := s.site.send(t, s.site.domain, http.MethodGet, stateURIs(mxfed.RoomID(id), mxfed.EventID(event))[endpoint], nil)
			if endpoint == "event" {
				if name == "unknown room" || strings.HasPrefix(name, "event of") || strings.HasPrefix(name, "host mixes") { // it names no room
					require.Equal(t, 200, w.Code)
					continue
				}
				requireSrvError(t, w, 404, mxfed.ErrNotFound)
				bodies[w.Body.String()] = true
				continue
			}
			requireSrvError(t, w, c.status, c.code)
			require.Zero(t, s.asked, "%s %s: the host was asked", name, endpoint)
			require.Empty(t, s.batches, "%s %s: the host was asked", name, endpoint)
		}
		require.LessOrEqual(t, len(bodies), 1, "an oracle")
	}
}

// setACL shuts a server out of a room.
func (h *stateHost) setACL(t testing.TB, room *srvRoom, server string) {
	room.set(t, h.site.own, room.admin, "m.room.server_acl", "", map[string]any{"allow": []any{"*"}, "deny": []any{server}})
}

// What a caller may not know is answered like what does not exist, word for word.
func TestState_NoOracle(t *testing.T) {
	s := newSrvSite(t)
	h := newStateHost(t, s)
	room, join := h.add(t, "10")
	h.hidden[join.ID()] = true
	third := room.set(t, s.own, room.admin, "m.room.topic", "", map[string]any{"topic": "x"})
	get := func(from *srvPeer, uri string) string {
		w := s.send(t, from, http.MethodGet, uri, nil)
		requireSrvError(t, w, 404, mxfed.ErrNotFound)
		return w.Body.String()
	}
	unknown := get(s.domain, stateURIs(room.id, "$x")["event"])
	require.Equal(t, unknown, get(s.domain, stateURIs(room.id, join.ID())["event"]), "hidden")
	require.Equal(t, unknown, get(s.third, stateURIs(room.id, third.ID())["event"]), "in no room of ours")
	h.events = func(context.Context, []mxfed.EventID) ([]*mxfed.Event, error) { return nil, mxfed.ErrForbidden }
	require.Equal(t, unknown, get(s.domain, stateURIs(room.id, join.ID())["event"]), "refused by the host")
	h.events = nil
	h.setACL(t, room, "domain")
	require.Equal(t, unknown, get(s.domain, stateURIs(room.id, third.ID())["event"]), "shut out")
	room, join = h.add(t, "9")
	h.ids = func(mxfed.EventID) (state, auth []mxfed.EventID, err error) { return nil, nil, mxfed.ErrNotFound }
	for _, endpoint := range []string{"state", "state_ids"} {
		require.Equal(t, unknown, get(s.domain, stateURIs(room.id, join.ID())[endpoint]), "its state is not known")
		require.Equal(t, unknown, get(s.domain, stateURIs(room.id, "$x")[endpoint]))
	}
	uris, other := stateURIs(room.id, join.ID()), stateURIs("!x:us.example", join.ID())
	delete(s.rooms, room.id)
	for _, endpoint := range []string{"state", "state_ids", "event_auth"} {
		require.Equal(t, get(s.domain, other[endpoint]), get(s.domain, uris[endpoint]), "left and unknown rooms")
	}
	// State is open to the servers in the room, whatever they may see of its history.
	h.ids = nil
	room, join = h.add(t, "11")
	for id := range room.events {
		h.hidden[id] = true
	}
	for _, endpoint := range []string{"state", "state_ids", "event_auth"} {
		require.Equal(t, 200, s.send(t, s.domain, http.MethodGet, stateURIs(room.id, join.ID())[endpoint], nil).Code)
	}
}

// The form of a request is judged before the room is looked at, its signature before all else.
func TestState_Requests(t *testing.T) {
	s := newSrvSite(t)
	h := newStateHost(t, s)
	room, join := h.add(t, "10")
	for endpoint, uri := range stateURIs(room.id, join.ID()) {
		path, query, _ := strings.Cut(uri, "?")
		requireSrvError(t, s.serve(httptest.NewRequest(http.MethodGet, uri, nil)), 401, mxfed.ErrUnauthorized)
		requireSrvError(t, s.send(t, s.domain, http.MethodPut, uri, []byte("{}")), 405, mxfed.ErrUnrecognized)
		requireSrvError(t, s.send(t, s.domain, http.MethodGet, strings.Replace(uri, "v1", "v2", 1), nil), 404, mxfed.ErrUnrecognized)
		requireSrvError(t, s.send(t, s.domain, http.MethodGet, path+"/x?"+query, nil), 404, mxfed.ErrUnrecognized)
		if query == "" {
			continue
		}
		for _, q := range []string{"", "?", "?event_id", "?event_id=", "?event=" + query, "?Event_id=x"} {
			requireSrvError(t, s.send(t, s.domain, http.MethodGet, path+q, nil), 400, mxfed.ErrMissingParam)
			requireSrvError(t, s.send(t, s.domain, http.MethodGet, stateURIs("!x:us.example", "")[endpoint], nil), 400, mxfed.ErrMissingParam)
		}
		requireSrvError(t, s.send(t, s.domain, http.MethodGet, path+"?event_id=%zz", nil), 400, mxfed.ErrInvalidParam)
	}
	require.Zero(t, h.asked)
	require.Zero(t, s.asks.Load(), "the room was looked at")
}

// What the host cannot tell is this server's failure: it does not leave as an answer that seems whole.
func TestState_HostAnswers(t *testing.T) {
	secret := errors.New("secret of the database")
	for name, c := range map[string]struct {
		change func(h *stateHost)
		status map[string]int
	}{
		"events fail": {func(h *stateHost) {
			h.events = func(context.Context, []mxfed.EventID) ([]*mxfed.Event, error) { return nil, secret }
		}, map[string]int{"state": 500, "state_ids": 200, "event": 500, "event_auth": 500}},
		"no events": {func(h *stateHost) {
			h.events = func(context.Context, []mxfed.EventID) ([]*mxfed.Event, error) { return nil, nil }
		}, map[string]int{"state": 500, "state_ids": 200, "event": 404, "event_auth": 500}},
		"nil events": {func(h *stateHost) {
			h.events = func(context.Context, []mxfed.EventID) ([]*mxfed.Event, error) { return []*mxfed.Event{nil}, nil }
		}, map[string]int{"state": 500, "state_ids": 200, "event": 404, "event_auth": 500}},
		"other events": {func(h *stateHost) {
			_, e := h.add(t, "9")
			h.events = func(context.Context, []mxfed.EventID) ([]*mxfed.Event, error) { return []*mxfed.Event{e}, nil }
		}, map[string]int{"state": 500, "state_ids": 200, "event": 404, "event_auth": 500}},
		"events of another room": {func(h *stateHost) {
			_, e := h.add(t, "9")
			h.ids = func(mxfed.EventID) (state, auth []mxfed.EventID, err error) {
				return []mxfed.EventID{e.ID()}, []mxfed.EventID{e.ID()}, nil
			}
		}, map[string]int{"state": 500, "state_ids": 200, "event": 200, "event_auth": 200}},
		"state fails": {func(h *stateHost) {
			h.ids = func(mxfed.EventID) (state, auth []mxfed.EventID, err error) { return nil, nil, secret }
		}, map[string]int{"state": 500, "state_ids": 500, "event": 200, "event_auth": 200}},
		"state unknown": {func(h *stateHost) {
			h.ids = func(mxfed.EventID) (state, auth []mxfed.EventID, err error) { return nil, nil, mxfed.ErrNotFound }
		}, map[string]int{"state": 404, "state_ids": 404, "event": 200, "event_auth": 200}},
	} {
		for endpoint, status := range c.status {
			s := newSrvSite(t)
			h := newStateHost(t, s)
			room, join := h.add(t, "10")
			c.change(h)
			w := s.send(t, s.domain, http.MethodGet, stateURIs(room.id, join.ID())[endpoint], nil)
			require.Equal(t, status, w.Code, "%s %s: %s", name, endpoint, w.Body)
			require.NotContains(t, w.Body.String(), "secret")
		}
	}
}

// manyStates is a room with n events more, none of which is valid as a whole: only the host's word counts here.
func (h *stateHost) manyStates(t testing.TB, n int) (room *srvRoom, join *mxfed.Event, ids []mxfed.EventID) {
	room, join = h.add(t, "10")
	for i := range n {
		e := srvEvent(t, "10", room.pdu(room.admin, "org.example", fmt.Sprint(i), map[string]any{}).with("hashes", map[string]any{"sha256": ""}).sign(t, "10"))
		room.events[e.ID()] = e
		ids = append(ids, e.ID())
	}
	h.ids = func(mxfed.EventID) (state, auth []mxfed.EventID, err error) { return ids, ids[:1], nil }
	return room, join, ids
}

// A room is read in batches while it is sent, and not a batch further than the caller reads.
func TestState_Batches(t *testing.T) {
	s := newSrvSite(t)
	h := newStateHost(t, s)
	room, join, ids := h.manyStates(t, 1700)
	w := s.send(t, s.domain, http.MethodGet, stateURIs(room.id, join.ID())["state"], nil)
	require.Equal(t, ids, statePDUs(t, "10", srvObject(t, w.Body.Bytes())["pdus"]), "in the order of the host")
	require.Equal(t, []int{1, 500, 500, 500, 200}, h.batches)
	h.batches = nil
	ctx, cancel := context.WithCancel(t.Context())
	s.handler.ServeHTTP(stateWriter{httptest.NewRecorder(), cancel}, s.request(t, s.domain, http.MethodGet, stateURIs(room.id, join.ID())["state"], nil).WithContext(ctx))
	require.LessOrEqual(t, len(h.batches), 3, "the caller has gone")
}

// stateWriter is a caller who goes away when the first bytes arrive.
type stateWriter struct {
	http.ResponseWriter
	gone func()
}

func (w stateWriter) Write(b []byte) (int, error) {
	w.gone()
	return w.ResponseWriter.Write(b)
}

// A failure in the middle leaves the answer unfinished.
func TestState_Unfinished(t *testing.T) {
	s := newSrvSite(t)
	h := newStateHost(t, s)
	room, join, ids := h.manyStates(t, 1700)
	h.events = func(_ context.Context, asked []mxfed.EventID) (found []*mxfed.Event, err error) {
		if slices.Contains(asked, ids[1699]) {
			return nil, errors.New("secret")
		}
		for _, id := range asked {
			found = append(found, room.events[id])
		}
		return found, nil
	}
	w := s.send(t, s.domain, http.MethodGet, stateURIs(room.id, join.ID())["state"], nil)
	require.Equal(t, 200, w.Code)
	require.False(t, strings.HasSuffix(w.Body.String(), "]}"))
	require.NotContains(t, w.Body.String(), "errcode")
	require.NotContains(t, w.Body.String(), "secret")
}

// An auth chain is followed in batches and not for ever.
func TestEventAuth_Bounded(t *testing.T) {
	s := newSrvSite(t)
	h := newStateHost(t, s)
	room, join := h.add(t, "1")
	made := 0
	h.events = func(_ context.Context, ids []mxfed.EventID) (found []*mxfed.Event, err error) {
		for _, id := range ids { // an event names ten that nobody has seen before
			refs := make([]string, 10)
			for i := range refs {
				made++
				refs[i] = fmt.Sprintf(`["$%d:us.example",{}]`, made)
			}
			e, err := mxfed.ParseEvent("1", fmt.Appendf(nil, `{"auth_events":[%s],"content":{},"depth":1,"event_id":%q,"hashes":{"sha256":""},"origin_server_ts":1,
				"prev_events":[],"room_id":%q,"sender":"@a:us.example","signatures":{},"type":"x"}`, strings.Join(refs, ","), id, room.id))
			if err != nil {
				return nil, err
			}
			found = append(found, e)
		}
		return found, nil
	}
	w := s.send(t, s.domain, http.MethodGet, stateURIs(room.id, join.ID())["event_auth"], nil)
	require.Equal(t, 200, w.Code)
	require.False(t, strings.HasSuffix(w.Body.String(), "]}"))
	require.Less(t, made, 110_000)
	require.LessOrEqual(t, slices.Max(h.batches), 500)
}
