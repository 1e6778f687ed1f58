package main

import (
	"cmp"
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
		var answer any
		if err == nil {
			answer, err = serve(r, in)
		}
		if err != nil {
			s.log.Debug("refused", "path", r.URL.Path, "err", err)
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
	answer, err := query(ctx, s.db, func(t *tx) string {
		answer, _ := one[string](t, `SELECT answer FROM transactions WHERE origin = ? AND id = ?`, in.Origin, id)
		return answer
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
	return json.RawMessage(answer), s.db.exec(ctx, `INSERT INTO transactions VALUES (?, ?, ?)
		ON CONFLICT (origin) DO UPDATE SET id = excluded.id, answer = excluded.answer`, in.Origin, id, answer)
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
		User mxfed.UserID `json:"state_key"`
	}
	if json.Unmarshal(pdu, &named) != nil || strings.ContainsRune(string(named.Room)+string(named.User), 0) {
		return nil, nil
	}
	var version mxfed.RoomVersion
	for waiting := true; waiting; {
		err := s.db.view(ctx, func(t *tx) error {
			_, waiting = one[int](t, `SELECT 1 FROM joining WHERE room = ? AND until > ?`, named.Room, now())
			if r := t.room(named.Room); r != nil {
				version = r.Version
			} else { // what the inviter's server says, which nobody has proven
				version, _ = one[mxfed.RoomVersion](t, `SELECT version FROM outside WHERE room = ? AND user_id = ?`, named.Room, named.User)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		if waiting {
			sleep(ctx, 100*time.Millisecond)
		}
	}
	e, err := mxfed.ParseEvent(version, pdu)
	if err != nil || storable(e) != nil {
		s.log.Debug("no event", "room", named.Room, "err", err)
		return nil, nil
	}
	return e, nil
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
	if err := s.db.view(ctx, func(t *tx) error { return t.admits(origin, e.RoomID()) }); err != nil {
		return err
	}
	missing, err := s.tryEvent(ctx, origin, e)
	if err != nil || !missing {
		return err
	}
	if err := s.fillGap(ctx, origin, e); err != nil {
		s.log.Info("a gap is left", "event", e.ID(), "err", err)
	}
	if missing, err = s.tryEvent(ctx, origin, e); err != nil || !missing {
		return err
	}
	return s.acceptWithState(ctx, origin, e)
}

// admits asks a room's access control list.
// https://spec.matrix.org/v1.19/server-server-api/#server-access-control-lists-acls
func (t *tx) admits(origin mxfed.ServerName, id mxfed.RoomID) error {
	acl := t.stateEvents(&room{ID: id}, snapshot{base: forever - 1}, mxfed.StateKey{Type: "m.room.server_acl"})
	if len(acl) > 0 && !mxfed.AllowedByACL(acl[0], origin) {
		return orForbidden(nil, "server is shut out of the room by its access control list")
	}
	return nil
}

// tryEvent judges and stores an event, once, unless what it follows is missing, or what authorises it and is not to be had.
func (s *server) tryEvent(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) (missing bool, err error) {
	e, signed := s.policySigned(ctx, e)
	auth, prev, err := s.judgeEvent(ctx, e, signed)
	if err == nil && auth {
		if err := s.fetchAuth(ctx, origin, e); err != nil {
			s.log.Info("auth events are missing", "event", e.ID(), "err", err)
		}
		auth, prev, err = s.judgeEvent(ctx, e, signed)
	}
	return auth || prev, err
}

// policySigned tells whether the room's policy server, if it has one, has signed an event or does so now, and returns the
// event with what was signed. https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func (s *server) policySigned(ctx context.Context, e *mxfed.Event) (signed *mxfed.Event, ok bool) {
	policy, err := query(ctx, s.db, func(t *tx) *mxfed.Event {
		for _, policy := range t.stateEvents(&room{ID: e.RoomID()}, snapshot{base: forever - 1}, mxfed.StateKey{Type: "m.room.policy"}) {
			var content struct{ Via mxfed.ServerName }
			json.Unmarshal(policy.Content(), &content) // a policy that names no server is none
			if t.hasServer(e.RoomID(), content.Via) {
				return policy
			}
		}
		return nil
	})
	if err != nil || mxfed.SignedByPolicyServer(policy, e) {
		return e, err == nil
	}
	if signed, err = s.fed.Client().PolicySign(ctx, "", policy, e); err != nil {
		s.log.Info("not let through", "event", e.ID(), "err", err)
		return e, false
	}
	return signed, true
}

// judgeEvent tells which events are missing.
func (s *server) judgeEvent(ctx context.Context, e *mxfed.Event, signed bool) (auth, prev bool, err error) {
	var verdict error
	err = s.db.update(ctx, e.RoomID(), func(t *tx) error {
		r := t.room(e.RoomID())
		if auth, prev = false, false; r == nil || t.placed(r.ID, e.ID()) != nil {
			return nil
		}
		before, known := t.stateAfter(r, e.Prev())
		auth, prev = len(t.events(e.Auth()...)) < len(e.Auth()), !known // rejected auth events are not missing
		if !auth && !prev {
			verdict = t.take(r, e, before, signed)
		}
		return nil
	})
	return auth, prev, cmp.Or(err, verdict)
}

// take judges an event and stores it as what it is: if the room's policy server has not signed it, as one that users do not
// see.
func (t *tx) take(r *room, e *mxfed.Event, before snapshot, signed bool) (verdict error) {
	status, why := t.judge(r, e, before)
	if status == statusAnother {
		return why
	}
	if status == statusAccepted && !signed {
		status = statusSoftFailed
	}
	if err := t.add(r, &addition{event: e, before: before, status: status}); err != nil {
		return err
	}
	if status == statusRejected {
		return why
	}
	return nil
}

// receiveOutside takes what concerns a local user of a room that this server is not in: an invite or knock that is over.
func (s *server) receiveOutside(ctx context.Context, e *mxfed.Event) error {
	user := mxfed.UserID(keyOf(e).Key)
	if e.Type() != "m.room.member" || e.Membership() != "leave" && e.Membership() != "ban" {
		return mxfed.ErrNotFound
	}
	return s.db.update(ctx, "", func(t *tx) error {
		m := t.membership(user, e.RoomID())
		if m == nil || m.Event == nil {
			return mxfed.ErrNotFound
		}
		inv := &mxfed.Invite{Event: m.Event, User: user}
		refused := m.Membership == "knock" && slices.Contains(e.Auth(), m.Event.ID())
		if !refused && (m.Membership != "invite" || !inv.Rescinded(e)) {
			return orForbidden(nil, "the event does not end what is known of the user here")
		}
		return t.outside(user, e, nil, m.via)
	})
}

// maxGap is how many events are fetched to fill a gap; one that is wider is bridged by a state.
const maxGap = 20

// fillGap fetches what lies between the ends of the room and an event.
// https://spec.matrix.org/v1.19/server-server-api/#post_matrixfederationv1get_missing_eventsroomid
func (s *server) fillGap(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) error {
	ends, err := query(ctx, s.db, func(t *tx) []mxfed.EventID { return t.ends(&room{ID: e.RoomID()}) })
	if err != nil {
		return err
	}
	var answer struct{ Events []json.RawMessage }
	body := map[string]any{"earliest_events": ends[:min(len(ends), maxPrev)], "latest_events": []mxfed.EventID{e.ID()}, "limit": maxGap, "min_depth": 0}
	uri := "/_matrix/federation/v1/get_missing_events/" + url.PathEscape(string(e.RoomID()))
	if err := s.fed.Client().Do(ctx, "", origin, http.MethodPost, uri, body, &answer); err != nil {
		return err
	}
	for i, between := range s.genuine(ctx, e, answer.Events) {
		missing, err := s.tryEvent(ctx, origin, between)
		if err == nil && missing && i == 0 { // the gap is wider
			err = s.acceptWithState(ctx, origin, between)
		}
		if err != nil && !isVerdict(err) {
			return err
		}
	}
	return nil
}

// genuine reads events of the room of e and keeps those that are genuine, the oldest first.
func (s *server) genuine(ctx context.Context, of *mxfed.Event, pdus []json.RawMessage) (kept []*mxfed.Event) {
	var events []*mxfed.Event
	for _, pdu := range pdus[:min(len(pdus), 1000)] {
		e, err := mxfed.ParseEvent(of.Version(), pdu)
		if err == nil && e.RoomID() == of.RoomID() && storable(e) == nil {
			events = append(events, e)
		}
	}
	for i, err := range s.fed.Verify(ctx, events...) {
		if err == nil {
			kept = append(kept, events[i])
		}
	}
	slices.SortStableFunc(kept, func(a, b *mxfed.Event) int { return cmp.Compare(depthOf(a), depthOf(b)) })
	return kept
}

// depthOf is the depth that an event claims. Some room versions allow larger ones than fit, which order nothing.
func depthOf(e *mxfed.Event) (depth float64) {
	var claim struct{ Depth float64 }
	json.Unmarshal(e.JSON(), &claim)
	return claim.Depth
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
	chain := s.genuine(ctx, e, answer.Chain)
	return s.db.update(ctx, e.RoomID(), func(t *tx) error {
		create := t.stateEvents(&room{ID: e.RoomID()}, snapshot{base: forever - 1}, mxfed.StateKey{Type: "m.room.create"})
		for _, e := range chain {
			auth := t.accepted(e.RoomID(), e.Auth(), "")
			state := append(auth, create...)
			if e.Check(&mxfed.Room{Version: e.Version(), Events: auth, Before: state, State: state}) == nil {
				t.exec(`INSERT INTO events (id, room, sender, auth, json, status) VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT DO NOTHING`,
					e.ID(), e.RoomID(), e.Sender(), authJSON(e), string(e.JSON()))
			}
		}
		return nil
	})
}

// acceptWithState judges an event by a state that is fetched, because what it is built on is not to be had.
func (s *server) acceptWithState(ctx context.Context, origin mxfed.ServerName, e *mxfed.Event) (verdict error) {
	ask := func(k *intake) (map[mxfed.EventID]error, error) {
		return k.fetchState(ctx, &mxfed.StateRequest{Event: e, From: s.name, Via: []mxfed.ServerName{origin}})
	}
	e, signed := s.policySigned(ctx, e)
	err := s.takeIn(ctx, e.RoomID(), ask, func(t *tx, k *intake) error {
		if r := t.room(e.RoomID()); r != nil && t.placed(r.ID, e.ID()) == nil {
			verdict = t.take(r, e, t.fetchedState(r, k), signed)
		}
		return nil
	})
	return cmp.Or(err, verdict)
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
	events, err := s.readable(r, in, func(t *tx, id mxfed.RoomID) []*mxfed.Event {
		var from []mxfed.EventID
		for _, e := range t.accepted(id, body.Latest, "") {
			from = append(from, e.Prev()...)
		}
		return t.history(id, in.Origin, from, append(body.Earliest, body.Latest...), min(body.Limit, maxGap))
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
	events, err := s.readable(r, in, func(t *tx, id mxfed.RoomID) []*mxfed.Event {
		return t.history(id, in.Origin, from, nil, min(limit, maxBackfill))
	})
	return map[string]any{"origin": s.name, "origin_server_ts": now(), "pdus": append([]*mxfed.Event{}, events...)}, err
}

// maxBackfill is how many events are read at once.
const maxBackfill = 100

// readable reads a room for a server that is in it, by what this one knows, which may have left, and that is not shut out.
// To others it is unknown.
func (s *server) readable(r *http.Request, in *mxfed.Request, read func(*tx, mxfed.RoomID) []*mxfed.Event) (events []*mxfed.Event, err error) {
	id := mxfed.RoomID(r.PathValue("room"))
	err = s.db.view(r.Context(), func(t *tx) error {
		if !t.hasServer(id, in.Origin) {
			return orForbidden(nil, "server is not in the room")
		}
		if err := t.admits(in.Origin, id); err != nil {
			return err
		}
		events = read(t, id)
		return nil
	})
	return events, err
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
