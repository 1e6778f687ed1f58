package mxfed_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/internal/synthroom"
)

// partialResident answers for a synthetic room, from memory; it leaves members out if it may. It counts what it sends.
type partialResident struct {
	full, partial, state []byte // answers to send_join and state
	template             []byte
	sent                 map[string]int // bytes, by endpoint
}

func newPartialResident(room *synthroom.Room) *partialResident {
	settings := *room
	settings.State = nil
	for _, pdu := range room.State {
		if !bytes.Contains(pdu, []byte(`"type":"m.room.member"`)) {
			settings.State = append(settings.State, pdu)
		}
	}
	var servers strings.Builder
	for i, s := range room.Servers {
		fmt.Fprintf(&servers, "%.*s%q", min(i, 1), ",", s)
	}
	withoutEvent := func(answer []byte) []byte { return bytes.Replace(answer, []byte(`"event":{},`), nil, 1) }
	omitted := `{"members_omitted":true,"servers_in_room":[` + servers.String() + `],`
	return &partialResident{full: withoutEvent(room.Answer([]byte("{}"))), template: room.Template(string(benchUser)), sent: make(map[string]int),
		partial: bytes.Replace(withoutEvent(settings.Answer([]byte("{}"))), []byte("{"), []byte(omitted), 1),
		state:   fmt.Appendf(nil, `{"auth_chain":[%s],"pdus":[%s]}`, bytes.Join(room.Auth, []byte(",")), bytes.Join(room.State, []byte(",")))}
}

func (r *partialResident) RoundTrip(q *http.Request) (*http.Response, error) {
	endpoint := strings.Split(q.URL.Path, "/")[4]
	body := map[string][]byte{"make_join": r.template, "send_join": r.full, "state": r.state}[endpoint]
	if q.URL.Query().Get("omit_members") == "true" {
		body = r.partial
	}
	r.sent[endpoint] += len(body)
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)), Request: q}, nil
}

// benchPartialJoin joins without members and fetches the state afterwards; sink gets the events of the latter.
func benchPartialJoin(tb testing.TB, c *mxfed.Client, room *synthroom.Room, sink func(*mxfed.Event) error) (*mxfed.JoinResult, *mxfed.StateResult) {
	joined, err := c.Join(tb.Context(), &mxfed.JoinRequest{Room: mxfed.RoomID(room.ID), User: benchUser, Via: []mxfed.ServerName{benchVia}, OmitMembers: true})
	require.NoError(tb, err)
	state, err := c.FetchState(tb.Context(), &mxfed.StateRequest{Event: joined.Event, Via: append([]mxfed.ServerName{joined.Via}, joined.Servers...), Sink: sink})
	require.NoError(tb, err)
	return joined, state
}

// A large room is the same in the end, whether its members come at once or later.
func TestFetchState_Synthetic(t *testing.T) {
	room := synthroom.New(10_000, 250, false)
	c := benchClient(t, room, newPartialResident(room))
	full := benchJoin(t, c, room, nil)
	handed := 0
	joined, state := benchPartialJoin(t, c, room, func(*mxfed.Event) error { handed++; return nil })
	require.Len(t, joined.Servers, 250)
	require.Less(t, len(joined.State), 600)
	require.Len(t, full.State, 10_000)
	require.Equal(t, 10_000, handed, "the auth chain is part of the state")
	require.ElementsMatch(t, stateIDsOf(full.State), state.StateIDs)
	require.Empty(t, state.Dropped)
}

// BenchmarkPartialJoin measures how much later members cost, and how little there is to wait for first.
func BenchmarkPartialJoin(b *testing.B) {
	room := synthroom.New(10_000, 250, false)
	resident := newPartialResident(room)
	c := benchClient(b, room, resident)
	full := benchJoin(b, c, room, nil)
	sizes := map[string]int{"full-bytes": len(resident.full), "first-bytes": len(resident.partial), "state-bytes": len(resident.state)}
	b.ReportAllocs()
	for b.Loop() {
		_, state := benchPartialJoin(b, c, room, func(*mxfed.Event) error { return nil })
		if len(state.StateIDs) != len(full.State) {
			b.Fatal("the states differ")
		}
	}
	for name, size := range sizes {
		b.ReportMetric(float64(size), name)
	}
}
