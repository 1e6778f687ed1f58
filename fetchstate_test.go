package mxfed_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
)

// stateSite is a joinSite that lets others read its one room.
type stateSite struct {
	*joinSite
	room  mxfed.RoomID
	fault atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool] // sees each request first
}

func newStateSite(t testing.TB) *stateSite {
	s := &stateSite{}
	s.joinSite = newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
		if fault := s.fault.Load(); fault != nil && (*fault)(w, r) {
			return true
		}
		mxfed.NewHandler(s.Server, mxfed.Hosts{Join: s, Events: s}).ServeHTTP(w, r)
		return true
	}, nil)
	return s
}

// fill makes a public room with users of three servers in it, some of whom have left or changed their names.
func (s *stateSite) fill(t testing.TB, v mxfed.RoomVersion, third *joinSite) {
	s.room = s.publicRoom(t, v)
	for i := range 30 {
		user := mxfed.UserID(fmt.Sprintf("@u%d:%s", i, s.name))
		for _, content := range []string{`{"membership":"join"}`, `{"membership":"join","displayname":"U"}`, `{"membership":"leave"}`}[:1+i%3] {
			d := memhost.State("m.room.member", string(user), content)
			d.Room, d.Sender = s.room, user
			_, err := s.Send(t.Context(), d)
			require.NoError(t, err)
		}
	}
	_, err := third.join(t.Context(), s.room, s.name)
	require.NoError(t, err)
}

// partialJoin joins without being told of the members.
func (s *joinSite) partialJoin(t testing.TB, room mxfed.RoomID, via mxfed.ServerName) *mxfed.JoinResult {
	result, err := s.Server.Client().Join(t.Context(), &mxfed.JoinRequest{Room: room, User: s.user(), Via: []mxfed.ServerName{via}, OmitMembers: true})
	require.NoError(t, err)
	require.NotEmpty(t, result.Servers)
	return result
}

func stateIDsOf(events []*mxfed.Event) (ids []mxfed.EventID) {
	for _, e := range events {
		ids = append(ids, e.ID())
	}
	slices.Sort(ids)
	return ids
}

// A join without members and then the state of the room are what a join with members is.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1stateroomid
func TestFetchState_EqualsFullJoin(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "6", "10", "12"} {
		resident, third, joiner := newStateSite(t), newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
		resident.fill(t, v, third)
		joined := joiner.partialJoin(t, resident.room, resident.name)
		full, err := joiner.Server.Client().SendJoin(t.Context(), resident.name, &mxfed.SendJoinRequest{Event: joined.Event})
		require.NoError(t, err)
		var want []*mxfed.Event
		for pdu, err := range full.State {
			require.NoError(t, err)
			want = append(want, srvEvent(t, v, pdu))
		}
		require.Len(t, want, 3+30+1)
		require.Less(t, len(joined.State), 4)

		again, err := mxfed.ParseEvent(v, joined.Event.JSON()) // the host was stopped; this is what it has kept
		require.NoError(t, err)
		via := append([]mxfed.ServerName{joined.Via}, joined.Servers...)
		arrived := 0
		result, err := joiner.Server.Client().FetchState(t.Context(), &mxfed.StateRequest{Event: again, Via: via,
			Progress: func(via mxfed.ServerName, events int, bytes int64) {
				require.Equal(t, resident.name, via)
				arrived = events
			}})
		require.NoError(t, err, v)
		require.Equal(t, stateIDsOf(want), stateIDsOf(result.State))
		require.ElementsMatch(t, stateIDsOf(want), result.StateIDs)
		require.Empty(t, result.Dropped)
		require.Equal(t, resident.name, result.Via)
		require.Equal(t, joined.Create.ID(), result.Create.ID())
		require.GreaterOrEqual(t, arrived, len(want))
		sunk := make(map[mxfed.EventID]bool)
		streamed, err := joiner.Server.Client().FetchState(t.Context(), &mxfed.StateRequest{Event: again, Via: via, Sink: func(e *mxfed.Event) error {
			if sunk[e.ID()] {
				return fmt.Errorf("%s comes twice", e.ID())
			}
			sunk[e.ID()] = true
			return nil
		}})
		require.NoError(t, err)
		require.ElementsMatch(t, result.StateIDs, streamed.StateIDs)
		require.Equal(t, slices.Compact(stateIDsOf(slices.Concat(result.State, result.Auth))), slices.Sorted(maps.Keys(sunk)))
		state, auth, err := joiner.Server.Client().StateIDs(t.Context(), joiner.name, resident.name, resident.room, again.ID())
		require.NoError(t, err)
		require.ElementsMatch(t, result.StateIDs, state)
		require.ElementsMatch(t, stateIDsOf(result.Auth), auth)
	}
}

// A server that is not in the room gets nothing of it, neither before it has joined nor after it has left.
func TestFetchState_Access(t *testing.T) {
	resident, third, stranger := newStateSite(t), newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
	resident.fill(t, "10", third)
	_, all := resident.Events(resident.room)
	_, err := stranger.Server.Client().FetchState(t.Context(), &mxfed.StateRequest{Event: all[len(all)-1], Via: []mxfed.ServerName{resident.name}})
	require.ErrorIs(t, err, mxfed.ErrForbidden)
	joined := stranger.partialJoin(t, resident.room, resident.name)
	kick := memhost.State("m.room.member", string(stranger.user()), `{"membership":"leave"}`)
	kick.Room, kick.Sender = resident.room, resident.user()
	_, err = resident.Send(t.Context(), kick)
	require.NoError(t, err)
	_, err = stranger.Server.Client().FetchState(t.Context(), &mxfed.StateRequest{Event: joined.Event, Via: []mxfed.ServerName{resident.name}})
	require.ErrorIs(t, err, mxfed.ErrForbidden)
}

// stateFaults are ways in which a server fails to tell the state; the honest server is asked next.
func stateFaults(other mxfed.ServerName) map[string]func(w http.ResponseWriter, r *http.Request) {
	faults := joinBodies(other)
	for _, status := range []int{400, 403, 404, 405, 410, 429, 500, 503} {
		for _, body := range []string{``, `<html>`, `{"errcode":"M_UNRECOGNIZED","error":"?"}`, `{"errcode":"M_FORBIDDEN","error":"?"}`, `{"errcode":"M_INVALID_PARAM","error":"?"}`} {
			faults[fmt.Sprint(status, body)] = func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(status)
				io.WriteString(w, body)
			}
		}
	}
	return faults
}

// Whatever a server answers, the next one is asked, and the error keeps what each said.
func TestFetchState_Failover(t *testing.T) {
	faulty, resident, third := newStateSite(t), newStateSite(t), newJoinSite(t, nil, nil)
	joiner := newJoinSite(t, nil, func(c *mxfed.Config) { c.MaxAnswer = 4 << 20 })
	resident.fill(t, "10", third)
	joined := joiner.partialJoin(t, resident.room, resident.name)
	gone := newJoinSite(t, nil, nil)
	gone.listener.Close()
	for name, fault := range stateFaults(gone.name) {
		answer := func(w http.ResponseWriter, r *http.Request) bool { fault(w, r); return true }
		faulty.fault.Store(&answer)
		req := &mxfed.StateRequest{Event: joined.Event, Via: []mxfed.ServerName{gone.name, faulty.name, joiner.name, resident.name}}
		result, err := joiner.Server.Client().FetchState(t.Context(), req)
		require.NoError(t, err, name)
		require.Equal(t, resident.name, result.Via)
		req.Via = req.Via[:3]
		_, err = joiner.Server.Client().FetchState(t.Context(), req)
		for _, via := range req.Via[:2] {
			require.ErrorContains(t, err, string(via)+": state: ", name)
		}
		var first *mxfed.Error
		require.ErrorAs(t, err, &first)
		require.True(t, first.Temporary())
	}
}

// An answer that breaks off in the middle is completed from the next server: the host gets no event twice.
func TestFetchState_BrokenOff(t *testing.T) {
	resident, third := newStateSite(t), newJoinSite(t, nil, nil)
	resident.fill(t, "10", third)
	for i := range 12 { // more than is gathered before it is handed on
		d := memhost.State("org.example", fmt.Sprint(i), `{"x":"`+strings.Repeat("x", 60_000)+`"}`)
		d.Room, d.Sender = resident.room, resident.user()
		_, err := resident.Send(t.Context(), d)
		require.NoError(t, err)
	}
	joiner := newJoinSite(t, nil, nil)
	joined := joiner.partialJoin(t, resident.room, resident.name)
	whole, err := joiner.Server.Client().FetchState(t.Context(), &mxfed.StateRequest{Event: joined.Event, Via: []mxfed.ServerName{resident.name}})
	require.NoError(t, err)
	broken := newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
		io.WriteString(w, `{"auth_chain":[],"pdus":[`)
		for _, e := range whole.State {
			w.Write(e.JSON())
			io.WriteString(w, ",")
		}
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}, nil)
	handed := make(map[mxfed.EventID]int)
	req := &mxfed.StateRequest{Event: joined.Event, Via: []mxfed.ServerName{broken.name}, Sink: func(e *mxfed.Event) error { handed[e.ID()]++; return nil }}
	_, err = joiner.Server.Client().FetchState(t.Context(), req)
	require.ErrorContains(t, err, "broke off")
	require.NotEmpty(t, handed)
	require.Less(t, len(handed), len(whole.State), "what was being gathered is not looked at")
	clear(handed)
	req.Via = append(req.Via, resident.name)
	result, err := joiner.Server.Client().FetchState(t.Context(), req)
	require.NoError(t, err)
	require.ElementsMatch(t, whole.StateIDs, result.StateIDs)
	require.Empty(t, result.Dropped)
	require.Equal(t, slices.Compact(stateIDsOf(slices.Concat(whole.State, whole.Auth))), slices.Sorted(maps.Keys(handed)))
	for id, n := range handed {
		require.Equal(t, 1, n, id)
	}
}

// The end of the context ends the call, sends nothing more and leaves nothing running.
func TestFetchState_Cancel(t *testing.T) {
	resident, third, joiner := newStateSite(t), newJoinSite(t, nil, nil), newJoinSite(t, nil, nil)
	resident.fill(t, "10", third)
	joined := joiner.partialJoin(t, resident.room, resident.name)
	before := goleak.IgnoreCurrent()
	for name, endless := range map[string]bool{"no answer": false, "half an answer": true} {
		ctx, cancel := context.WithCancel(t.Context())
		answer := func(w http.ResponseWriter, r *http.Request) bool {
			if endless {
				io.WriteString(w, `{"auth_chain":[],"pdus":[`)
				w.(http.Flusher).Flush()
			}
			cancel()
			<-r.Context().Done()
			return true
		}
		resident.fault.Store(&answer)
		_, err := joiner.Server.Client().FetchState(ctx, &mxfed.StateRequest{Event: joined.Event, Via: []mxfed.ServerName{resident.name, third.name}})
		require.ErrorIs(t, err, context.Canceled, name)
		require.NotContains(t, err.Error(), string(third.name), name)
	}
	joiner.resolver.CloseIdleConnections()
	resident.listener.CloseClientConnections()
	third.listener.CloseClientConnections()
	goleak.VerifyNone(t, before)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := joiner.Server.Client().FetchState(ctx, &mxfed.StateRequest{Event: joined.Event, Via: []mxfed.ServerName{resident.name, third.name}})
	require.True(t, errors.Is(err, context.Canceled))
}

// The client reads the IDs of a state as a server gives them, if they are IDs.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1state_idsroomid
func TestStateIDs(t *testing.T) {
	var uri, body string
	answer := roundTripFunc(func(q *http.Request) (*http.Response, error) {
		uri = q.URL.RequestURI()
		return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}, nil
	})
	s, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{benchSigner(t, benchUser.Server())}, HTTP: answer})
	require.NoError(t, err)
	ask := func(from mxfed.ServerName) (state, auth []mxfed.EventID, err error) {
		return s.Client().StateIDs(t.Context(), from, benchVia, "!room:r.example", "$x/+")
	}
	for text, want := range map[string][2][]mxfed.EventID{
		`{"pdu_ids":["$a","$b"],"auth_chain_ids":["$c"]}`:       {{"$a", "$b"}, {"$c"}},
		`{"auth_chain_ids":[], "x":1, "pdu_ids":["\u0024a/+"]}`: {{"$a/+"}, nil},
	} {
		body = text
		state, auth, err := ask("")
		require.NoError(t, err)
		require.Equal(t, want, [2][]mxfed.EventID{state, auth})
		require.Equal(t, "/_matrix/federation/v1/state_ids/%21room:r.example?event_id=%24x%2F%2B", uri)
	}
	for _, body = range []string{``, `{}`, `{"pdu_ids":[]}`, `{"auth_chain_ids":[]}`, `{"pdu_ids":[1],"auth_chain_ids":[]}`, `{"pdu_ids":["a"],"auth_chain_ids":[]}`,
		`{"pdu_ids":["$a"],"auth_chain_ids":[null]}`, `{"pdu_ids":["$\ud800"],"auth_chain_ids":[]}`, `{"pdu_ids":[],"pdu_ids":[],"auth_chain_ids":[]}`} {
		state, auth, err := ask(benchUser.Server())
		require.Error(t, err, body)
		require.Nil(t, state)
		require.Nil(t, auth)
	}
	body = `{"auth_chain_ids":["$a"],"pdu_ids":["$a"` + strings.Repeat(`,"$a"`, 1<<20-2) + `]}`
	state, _, err := ask("")
	require.NoError(t, err)
	require.Len(t, state, 1<<20-1)
	body = strings.TrimSuffix(body, "]}") + `,"$a"]}`
	_, _, err = ask("")
	require.ErrorContains(t, err, "too many event IDs")
	_, _, err = ask("third.example")
	require.ErrorContains(t, err, "no own name")
}
