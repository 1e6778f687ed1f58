package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.org/mxfed"
)

// This file serves what other servers ask of this one beyond what the library does: it takes their transactions, fills gaps
// in the graph of a room, and lets them do the same.

// federation serves everything that other servers ask for. What is not known is answered as such.
func (s *server) federation() http.Handler {
	const v1 = "/_matrix/federation/v1/"
	mux := http.NewServeMux()
	mux.Handle("/", mxfed.NewHandler(s.fed, s.host.hosts()))
	mux.Handle(v1+"send/{txn}", s.endpoint(http.MethodPut, s.serveSend))
	mux.Handle(v1+"backfill/{room}", s.endpoint(http.MethodGet, s.serveBackfill))
	mux.Handle(v1+"get_missing_events/{room}", s.endpoint(http.MethodPost, s.serveMissingEvents))
	mux.Handle(v1+"query/profile", s.endpoint(http.MethodGet, s.serveProfile))
	return mux
}

// endpoint serves authenticated requests of one method.
func (s *server) endpoint(method string, serve func(*http.Request, *mxfed.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != method {
			mxfed.WriteError(w, &mxfed.Error{Code: mxfed.ErrUnrecognized, Status: http.StatusMethodNotAllowed, Message: "unrecognized request"})
			return
		}
		in, err := s.fed.Authenticate(r)
		if err != nil {
			mxfed.WriteError(w, err)
			return
		}
		answer, err := serve(r, in)
		if err != nil {
			s.log.Debug("refused", "origin", in.Origin, "path", r.URL.Path, "err", err)
			mxfed.WriteError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(asJSON(answer))
	})
}

// serveSend takes a transaction. One that is sent again gets the same answer.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv1sendtxnid
func (s *server) serveSend(r *http.Request, in *mxfed.Request) (any, error) {
	ctx, id := r.Context(), r.PathValue("txn")
	var answer string
	err := s.db.view(ctx, func(t *tx) error {
		_, err := t.row(`SELECT answer FROM transactions WHERE origin = $1 AND id = $2`, []any{in.Origin, id}, &answer)
		return err
	})
	if err != nil || answer != "" {
		return json.RawMessage(answer), err
	}
	var body struct{ PDUs []json.RawMessage }
	if err := json.Unmarshal(in.Body, &body); err != nil || len(body.PDUs) > maxPDUs {
		return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: fmt.Sprintf("a transaction has a list of %d pdus at most", maxPDUs), Err: err}
	}
	results, err := s.receive(ctx, in.Origin, body.PDUs)
	if err != nil {
		return nil, err
	}
	answer = string(asJSON(map[string]any{"pdus": results}))
	return json.RawMessage(answer), s.db.update(ctx, "", func(t *tx) error {
		return t.exec(`INSERT INTO transactions VALUES ($1, $2, $3) ON CONFLICT (origin) DO UPDATE SET id = excluded.id, answer = excluded.answer`, in.Origin, id, answer)
	})
}

// receive takes events of a transaction, in order. What is wrong with one of them does not concern the others; an error
// means that this server failed, so that the transaction has to be sent again.
func (s *server) receive(ctx context.Context, origin mxfed.ServerName, pdus []json.RawMessage) (map[mxfed.EventID]any, error) {
	results := make(map[mxfed.EventID]any)
	var events []*mxfed.Event
	for _, pdu := range pdus {
		e, err := s.parse(ctx, pdu)
		if err != nil {
			return nil, err
		}
		if e != nil { // the ID of what is no event cannot be told
			events = append(events, e)
		}
	}
	for i, err := range s.fed.Verify(ctx, events...) {
		if err == nil {
			err = s.receiveEvent(ctx, origin, events[i])
		}
		results[events[i].ID()] = struct{}{}
		if err == nil {
			continue
		}
		if ctx.Err() != nil || !isVerdict(err) {
			return nil, err
		}
		s.log.Debug("event refused", "origin", origin, "event", events[i].ID(), "err", err)
		results[events[i].ID()] = map[string]string{"error": err.Error()}
	}
	return results, nil
}

// isVerdict tells what is wrong with an event from what is wrong here.
func isVerdict(err error) bool {
	var standard *mxfed.Error
	var code mxfed.ErrorCode
	return errors.As(err, &standard) || errors.As(err, &code)
}

// parse reads a PDU by the rules of its room, nil if the room is not known or it is no event. A room that is just being
// joined is waited for: the first events may arrive before the answer to the join is stored.
func (s *server) parse(ctx context.Context, pdu json.RawMessage) (*mxfed.Event, error) {
	var named struct {
		Room mxfed.RoomID `json:"room_id"`
		User string       `json:"state_key"`
	}
	if json.Unmarshal(pdu, &named) != nil || strings.ContainsRune(string(named.Room)+named.User, 0) {
		return nil, nil
	}
	version, err := s.versionFor(ctx, named.Room, mxfed.UserID(named.User))
	if err != nil {
		return nil, err
	}
	e, err := mxfed.ParseEvent(version, pdu)
	if err != nil || storable(e) != nil {
		s.log.Debug("no event", "room", named.Room, "err", err)
		return nil, nil
	}
	return e, nil
}

// versionFor is the version of a room that this server is in or a user of it is invited to, empty if there is none.
func (s *server) versionFor(ctx context.Context, id mxfed.RoomID, user mxfed.UserID) (version mxfed.RoomVersion, err error) {
	for {
		joining := false
		err := s.db.view(ctx, func(t *tx) error {
			r, err := t.room(id)
			if err == nil {
				version = r.version
				return nil
			}
			if err != mxfed.ErrNotFound {
				return err
			}
			var one int
			if joining, err = t.row(`SELECT 1 FROM rooms WHERE id = $1 AND held_until > $2`, []any{id, time.Now().UnixMilli()}, &one); err != nil || joining {
				return err
			}
			m, err := t.membership(user, id)
			if m != nil {
				version = m.version
			}
			return err
		})
		if err != nil || !joining {
			return version, err
		}
		if sleep(ctx, 100*time.Millisecond); ctx.Err() != nil {
			return "", ctx.Err()
		}
	}
}

// receiveEvent takes one genuine event. What it is built on is fetched if it is missing.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (s *server) receiveEvent(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) error {
	here, err := s.here(ctx, e.RoomID())
	if err != nil {
		return err
	}
	if !here {
		return s.receiveOutside(ctx, e)
	}
	if err := s.admits(ctx, origin, e.RoomID()); err != nil {
		return err
	}
	missing, err := s.tryEvent(ctx, e)
	if err != nil || missing == nil {
		return err
	}
	if missing.auth {
		if err := s.fetchAuth(ctx, origin, e); err != nil {
			s.log.Info("auth events are missing", "event", e.ID(), "err", err)
		}
	}
	if missing.prev {
		if err := s.fillGap(ctx, origin, e); err != nil {
			s.log.Info("a gap is left", "event", e.ID(), "err", err)
		}
	}
	if missing, err = s.tryEvent(ctx, e); err != nil || missing == nil {
		return err
	}
	return s.acceptWithState(ctx, origin, e)
}

// admits asks a room's access control list.
// https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func (s *server) admits(ctx context.Context, origin mxfed.ServerName, id mxfed.RoomID) error {
	return s.db.view(ctx, func(t *tx) error {
		r, err := t.room(id)
		if err != nil {
			return err
		}
		acl, err := t.current(r, mxfed.StateKey{Type: "m.room.server_acl"})
		if err == nil && !mxfed.AllowedByACL(first(acl), origin) {
			err = orForbidden(nil, "server is shut out of the room by its access control list")
		}
		return err
	})
}

// gap tells what has to be fetched before an event can be judged.
type gap struct{ auth, prev bool }

// tryEvent judges and stores an event, once, unless something is missing.
func (s *server) tryEvent(ctx context.Context, e *mxfed.Event) (missing *gap, err error) {
	signed := s.policySigned(ctx, e)
	var verdict error
	err = s.db.update(ctx, string(e.RoomID()), func(t *tx) error {
		missing, verdict = nil, nil
		r, err := t.room(e.RoomID())
		if err != nil {
			return err
		}
		if known, _, err := t.known(r, e.ID()); err != nil || known != nil {
			return err
		}
		before, ok, err := t.stateAfter(r, e.Prev())
		if err != nil {
			return err
		}
		auth, err := t.events(r.version, e.Auth()...) // rejected ones are not missing
		if err != nil {
			return err
		}
		if !ok || len(auth) < len(e.Auth()) {
			missing = &gap{auth: len(auth) < len(e.Auth()), prev: !ok}
			return nil
		}
		verdict, err = t.take(r, e, before, signed)
		return err
	})
	return missing, firstOf(err, verdict)
}

// take judges an event and stores it as what it is.
func (t *tx) take(r *room, e *mxfed.Event, before state, signed bool) (verdict, err error) {
	status, why := t.judge(r, e, before)
	if why != nil && status == statusAccepted {
		return nil, why
	}
	if status == statusAccepted && !signed {
		status = statusSoftFailed
	}
	if status == statusRejected {
		verdict = why
	}
	return verdict, t.add(r, &addition{event: e, before: before, status: status})
}

// policySigned tells whether the room's policy server, if it has one, has signed the event or does so now.
// https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func (s *server) policySigned(ctx context.Context, e *mxfed.Event) bool {
	var policy *mxfed.Event
	err := s.db.view(ctx, func(t *tx) error {
		r, err := t.room(e.RoomID())
		if err != nil {
			return err
		}
		found, err := t.current(r, mxfed.StateKey{Type: "m.room.policy"})
		if err != nil || len(found) == 0 {
			return err
		}
		var content struct{ Via mxfed.ServerName }
		json.Unmarshal(found[0].Content(), &content) // a policy that names no server is none
		if present, err := t.hasServer(r.id, content.Via); err != nil || !present {
			return err
		}
		policy = found[0]
		return nil
	})
	if err != nil || mxfed.SignedByPolicyServer(policy, e) {
		return err == nil
	}
	_, err = s.fed.Client().PolicySign(ctx, "", policy, e)
	return err == nil
}

// receiveOutside takes what concerns a local user of a room that this server is not in: an invite or knock that is over.
func (s *server) receiveOutside(ctx context.Context, e *mxfed.Event) error {
	user, _ := e.StateKey()
	if e.Type() != "m.room.member" || e.Membership() != "leave" && e.Membership() != "ban" {
		return mxfed.ErrNotFound
	}
	return s.db.update(ctx, "", func(t *tx) error {
		m, err := t.membership(mxfed.UserID(user), e.RoomID())
		if err != nil || m == nil || m.Event == nil {
			return orNotFound(err)
		}
		inv := &mxfed.Invite{Event: m.Event, User: mxfed.UserID(user)}
		refused := m.Membership == "knock" && slices.Contains(e.Auth(), m.Event.ID())
		if !refused && (m.Membership != "invite" || !inv.Rescinded(e)) {
			return orForbidden(nil, "the event does not end what is known of the user here")
		}
		return t.outside(&memberRow{user: mxfed.UserID(user), room: e.RoomID(), membership: e.Membership(), version: e.Version(), via: m.via}, e, nil)
	})
}

// maxGap is how many events are fetched to fill a gap; one that is wider is bridged by a state.
const maxGap = 20

// fillGap fetches what lies between the ends of the room and an event.
// https://spec.matrix.org/v1.19/server-server-api/#post_matrixfederationv1get_missing_eventsroomid
func (s *server) fillGap(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) error {
	var ends []mxfed.EventID
	err := s.db.view(ctx, func(t *tx) (err error) {
		ends, err = list[mxfed.EventID](t, `SELECT event FROM extremities WHERE room = $1 LIMIT 20`, e.RoomID())
		return err
	})
	if err != nil {
		return err
	}
	var answer struct{ Events []json.RawMessage }
	body := map[string]any{"earliest_events": append([]mxfed.EventID{}, ends...), "latest_events": []mxfed.EventID{e.ID()}, "limit": maxGap, "min_depth": 0}
	uri := "/_matrix/federation/v1/get_missing_events/" + url.PathEscape(string(e.RoomID()))
	if err := s.fed.Client().Do(ctx, "", origin, http.MethodPost, uri, body, &answer); err != nil {
		return err
	}
	events, err := s.genuine(ctx, e, answer.Events)
	if err != nil {
		return err
	}
	for i, between := range events {
		missing, err := s.tryEvent(ctx, between)
		if err == nil && missing != nil && missing.auth {
			if err = s.fetchAuth(ctx, origin, between); err == nil {
				missing, err = s.tryEvent(ctx, between)
			}
		}
		if err == nil && missing != nil && i == 0 { // the gap is wider
			err = s.acceptWithState(ctx, origin, between)
		}
		if err != nil && !isVerdict(err) {
			return err
		}
	}
	return nil
}

// genuine reads events of the room of e and keeps those that are genuine, the oldest first.
func (s *server) genuine(ctx context.Context, of *mxfed.Event, pdus []json.RawMessage) ([]*mxfed.Event, error) {
	type placed struct {
		*mxfed.Event
		depth int64
	}
	var events []*mxfed.Event
	for _, pdu := range pdus[:min(len(pdus), 1000)] {
		e, err := mxfed.ParseEvent(of.Version(), pdu)
		if err == nil && e.RoomID() == of.RoomID() && storable(e) == nil {
			events = append(events, e)
		}
	}
	var kept []placed
	for i, err := range s.fed.Verify(ctx, events...) {
		if err == nil {
			kept = append(kept, placed{events[i], depthOf(events[i])})
		}
	}
	slices.SortStableFunc(kept, func(a, b placed) int { return int(min(1, max(-1, a.depth-b.depth))) })
	sorted := make([]*mxfed.Event, len(kept))
	for i, k := range kept {
		sorted[i] = k.Event
	}
	return sorted, ctx.Err()
}

// fetchAuth fetches what authorises an event and stores what is allowed by its own auth events.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1event_authroomideventid
func (s *server) fetchAuth(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) error {
	var answer struct {
		Chain []json.RawMessage `json:"auth_chain"`
	}
	uri := "/_matrix/federation/v1/event_auth/" + url.PathEscape(string(e.RoomID())) + "/" + url.PathEscape(string(e.ID()))
	if err := s.fed.Client().Do(ctx, "", origin, http.MethodGet, uri, nil, &answer); err != nil {
		return err
	}
	chain, err := s.genuine(ctx, e, answer.Chain)
	if err != nil {
		return err
	}
	return s.db.update(ctx, string(e.RoomID()), func(t *tx) error {
		r, err := t.room(e.RoomID())
		if err != nil {
			return err
		}
		create, err := t.current(r, mxfed.StateKey{Type: "m.room.create"})
		if err != nil {
			return err
		}
		for _, e := range chain {
			auth, err := t.accepted(r, e.Auth(), "")
			if err != nil {
				return err
			}
			state := append(auth, create...)
			if (&mxfed.Membership{Event: e}).Check(&mxfed.Room{Version: r.version, Events: auth, Before: state, State: state}) != nil {
				continue
			}
			args := description(e, statusAccepted, 0)
			if err := t.exec(`INSERT INTO events (`+columns+`) VALUES `+tuples(&[]any{}, args)+` ON CONFLICT DO NOTHING`, args...); err != nil {
				return err
			}
		}
		return nil
	})
}

// acceptWithState judges an event by a state that is fetched, because what it is built on is not to be had.
func (s *server) acceptWithState(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) (verdict error) {
	signed := s.policySigned(ctx, e)
	use := func(t *tx) error {
		r, err := t.room(e.RoomID())
		if err != nil {
			return err
		}
		before, err := t.stagedState(r)
		if err != nil {
			return err
		}
		if err := t.acceptStaged(r.id); err != nil {
			return err
		}
		verdict, err = t.take(r, e, before, signed)
		return err
	}
	for {
		held, err := s.db.hold(ctx, "rooms", "id", string(e.RoomID()), func(ctx context.Context) error {
			taken := &intake{server: s, room: e.RoomID()}
			return taken.fetch(ctx, &mxfed.StateRequest{Event: e, From: s.name, Via: []mxfed.ServerName{origin}}, use)
		})
		if held || err != nil {
			return firstOf(err, verdict)
		}
		if sleep(ctx, 200*time.Millisecond); ctx.Err() != nil { // another state is just being fetched
			return ctx.Err()
		}
	}
}

// stagedState is the state that has been taken in, told by how it differs from the current one.
func (t *tx) stagedState(r *room) (state, error) {
	s := state{group: r.state, changes: make(map[mxfed.StateKey]mxfed.EventID)}
	read := func(scan func(...any) error) error {
		var k mxfed.StateKey
		var id mxfed.EventID
		err := scan(&k.Type, &k.Key, &id)
		s.changes[k] = id
		return err
	}
	err := t.each(read, `SELECT c.type, c.state_key, '' FROM current_state c JOIN events e ON e.id = c.event WHERE c.room = $1 AND e.staged <> 2`, r.id)
	if err != nil {
		return state{}, err
	}
	return s, t.each(read, `SELECT e.type, e.state_key, e.id FROM events e LEFT JOIN current_state c ON c.room = e.room AND c.type = e.type AND c.state_key = e.state_key
		WHERE e.room = $1 AND e.staged = 2 AND (c.event IS NULL OR c.event <> e.id)`, r.id)
}

// serveMissingEvents lets a server fill a gap: what latest_events are built on, back to earliest_events.
func (s *server) serveMissingEvents(r *http.Request, in *mxfed.Request) (any, error) {
	body := struct {
		Earliest []mxfed.EventID `json:"earliest_events"`
		Latest   []mxfed.EventID `json:"latest_events"`
		Limit    int
	}{Limit: 10}
	if err := json.Unmarshal(in.Body, &body); err != nil || len(body.Latest)+len(body.Earliest) > batch {
		return nil, &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "short lists of event IDs are wanted", Err: err}
	}
	var events []*mxfed.Event
	err := s.readable(r, in, func(t *tx, room *room) error {
		latest, err := t.accepted(room, body.Latest, "")
		if err != nil {
			return err
		}
		var from []mxfed.EventID
		for _, e := range latest {
			from = append(from, e.Prev()...)
		}
		events, err = t.history(room, in.Origin, from, append(body.Earliest, body.Latest...), min(body.Limit, maxGap))
		return err
	})
	slices.Reverse(events)
	return map[string]any{"events": append([]*mxfed.Event{}, events...)}, err
}

// serveBackfill lets a server read events, and what happened before them.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1backfillroomid
func (s *server) serveBackfill(r *http.Request, in *mxfed.Request) (any, error) {
	var from []mxfed.EventID
	for _, v := range r.URL.Query()["v"] {
		from = append(from, mxfed.EventID(v))
	}
	limit, err := strconv.Atoi(r.URL.Query().Get("limit"))
	if err != nil || len(from) == 0 || len(from) > batch {
		return nil, &mxfed.Error{Code: mxfed.ErrMissingParam, Message: "v and limit are wanted", Err: err}
	}
	var events []*mxfed.Event
	err = s.readable(r, in, func(t *tx, room *room) (err error) {
		events, err = t.history(room, in.Origin, from, nil, min(limit, maxBackfill))
		return err
	})
	return map[string]any{"origin": s.name, "origin_server_ts": time.Now().UnixMilli(), "pdus": append([]*mxfed.Event{}, events...)}, err
}

// maxBackfill is how many events are read at once.
const maxBackfill = 100

// readable reads a room for a server that is in it and not shut out. To others it is unknown.
func (s *server) readable(r *http.Request, in *mxfed.Request, read func(*tx, *room) error) error {
	id := mxfed.RoomID(r.PathValue("room"))
	if err := s.admits(r.Context(), in.Origin, id); err != nil {
		return err
	}
	return s.db.view(r.Context(), func(t *tx) error {
		room, err := t.room(id)
		if err != nil {
			return err
		}
		if present, err := t.hasServer(id, in.Origin); err != nil || !present { // by what this server knows, which may have left
			return orForbidden(err, "server is not in the room")
		}
		return read(t, room)
	})
}

// serveProfile tells about a user of this server.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1queryprofile
func (s *server) serveProfile(r *http.Request, in *mxfed.Request) (any, error) {
	user := mxfed.UserID(r.URL.Query().Get("user_id"))
	if user.Server() != in.To {
		return nil, mxfed.ErrNotFound
	}
	p, err := s.profileOf(r.Context(), user)
	if err != nil {
		return nil, err
	}
	switch r.URL.Query().Get("field") {
	case "displayname":
		p.AvatarURL = ""
	case "avatar_url":
		p.DisplayName = ""
	}
	return p, nil
}
