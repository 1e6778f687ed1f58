package mxfed_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// What becomes of an event from elsewhere follows from what is known where it was sent, and then from what the room is now.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestEvent_Check(t *testing.T) {
	const accepted, rejected, missing, softFailed, another = "accepted", "rejected", "missing", "soft-failed", "another"
	for name, c := range map[string]struct {
		change func(c *srvCheck)
		want   string
	}{
		"nothing":                        {func(*srvCheck) {}, accepted},
		"stored already, whatever else":  {func(c *srvCheck) { *c.now = mxfed.Room{Version: c.now.Version, Events: []*mxfed.Event{c.m.Event}} }, accepted},
		"conditions are not asked again": {func(c *srvCheck) { c.now.Joined = nil }, accepted},
		"another room version":           {func(c *srvCheck) { c.now.Version = "9" }, another},
		"no events":                      {func(c *srvCheck) { c.now.Events = nil }, missing},
		"an auth event missing":          {func(c *srvCheck) { c.now.Events = c.now.Events[1:] }, missing},
		"state before unknown":           {func(c *srvCheck) { c.now.Before = nil }, missing},
		"banned before":                  {func(c *srvCheck) { c.now.Before = append(c.now.Before, c.member("ban")) }, rejected},
		"banned before and now": {func(c *srvCheck) {
			ban := c.member("ban")
			c.now.Before, c.now.State = append(c.now.Before, ban), append(c.now.State, ban)
		}, rejected},
		"authoriser gone before": {func(c *srvCheck) { c.now.Before = srvWithout(c.now.Before, "m.room.member", c.admin) }, rejected},
		"banned now":             {func(c *srvCheck) { c.now.State = append(c.now.State, c.member("ban")) }, softFailed},
		"no join rules now":      {func(c *srvCheck) { c.now.State = srvWithout(c.now.State, "m.room.join_rules", "") }, softFailed},
		"authoriser gone now":    {func(c *srvCheck) { c.now.State = srvWithout(c.now.State, "m.room.member", c.admin) }, softFailed},
		"of another room":        {func(c *srvCheck) { c.now.State = newSrvRoom(c.t, newSrvSite(c.t), "11", nil).facts(c.m.Ask).State }, another},
		"an auth event too many": {func(c *srvCheck) { c.m.Event = c.naming(c.event("m.room.topic", "", map[string]any{})) }, rejected},
	} {
		for _, v := range []mxfed.RoomVersion{"8", "10", "12"} {
			t.Run(name+", version "+string(v), func(t *testing.T) {
				room, m, now := newSrvMembership(t, v)
				c.change(&srvCheck{room, m, now, t})
				requireOutcome(t, c.want, m.Event.Check(now))
			})
		}
	}
	require.ErrorIs(t, (*mxfed.Event)(nil).Check(&mxfed.Room{}), mxfed.ErrInvalidParam)
	_, m, _ := newSrvMembership(t, "10")
	require.ErrorIs(t, m.Event.Check(nil), mxfed.ErrNotFound)
}

// naming is the join with one more auth event, which is known.
func (c *srvCheck) naming(more *mxfed.Event) *mxfed.Event {
	c.now.Events = append(c.now.Events, more)
	join := c.joinOf("@alice:domain", c.admin)
	return srvEvent(c.t, c.version, join.with("prev_events", srvRefs(c.version, c.m.Event.Prev()...)).
		with("auth_events", srvRefs(c.version, append(c.m.Event.Auth(), more.ID())...)).sign(c.t, c.version, c.site.domain))
}

// A room has one create event, whatever comes under its name.
func TestEvent_CheckCreate(t *testing.T) {
	for _, v := range srvVersions {
		room := newSrvRoom(t, newSrvSite(t), v, nil)
		create := room.state[mxfed.StateKey{Type: "m.room.create"}]
		first := &mxfed.Room{Version: v, Before: []*mxfed.Event{}}
		requireOutcome(t, "accepted", create.Check(first))
		first.State = []*mxfed.Event{create}
		if v != "12" { // where another one is another room
			pdu := room.pdu(room.admin, "m.room.create", "", map[string]any{"room_version": v, "creator": room.admin, "x": 1})
			pdu["prev_events"], pdu["auth_events"] = []any{}, []any{}
			requireOutcome(t, "rejected", srvEvent(t, v, pdu.sign(t, v, room.site.own)).Check(first))
		}
	}
}

// requireOutcome tells the errors of Check apart.
func requireOutcome(t *testing.T, want string, err error) {
	t.Helper()
	for outcome, reason := range map[string]error{"missing": mxfed.ErrMissing, "soft-failed": mxfed.ErrSoftFailed, "rejected": mxfed.ErrRejected} {
		if outcome == want {
			require.ErrorIs(t, err, reason)
		} else {
			require.NotErrorIs(t, err, reason)
		}
	}
	if want == "accepted" {
		require.NoError(t, err)
		return
	}
	var typed *mxfed.Error
	require.ErrorAs(t, err, &typed)
	require.NotEmpty(t, typed.Message)
}

// What Query asks for is what Check needs, for an event of any type.
func TestEvent_Query(t *testing.T) {
	for _, v := range srvVersions {
		room := newSrvRoom(t, newSrvSite(t), v, nil)
		room.set(t, room.site.domain, "@alice:domain", "m.room.member", "@alice:domain", map[string]any{"membership": "join"})
		for typ, key := range map[string]string{"m.room.message": "", "m.room.member": "@alice:domain", "m.room.topic": ""} {
			pdu := room.pdu("@alice:domain", typ, key, map[string]any{"membership": "leave"})
			want := "accepted"
			switch typ {
			case "m.room.message":
				delete(pdu, "state_key")
			case "m.room.topic":
				want = "rejected" // it takes a power of 50
			}
			e := srvEvent(t, v, pdu.sign(t, v, room.site.domain))
			ask := e.Query()
			require.Empty(t, string(ask.Origin+ask.To))
			require.Equal(t, e.ID(), ask.Event)
			require.Contains(t, ask.State, mxfed.StateKey{Type: "m.room.server_acl"})
			requireOutcome(t, want, e.Check(room.facts(ask)))
			room.set(t, room.site.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "ban"})
			if want == "accepted" {
				want = "soft-failed"
			}
			requireOutcome(t, want, e.Check(room.facts(ask)))
			room.set(t, room.site.own, room.admin, "m.room.member", "@alice:domain", map[string]any{"membership": "leave"})
			room.set(t, room.site.domain, "@alice:domain", "m.room.member", "@alice:domain", map[string]any{"membership": "join"})
		}
	}
	require.NotPanics(t, func() { (*mxfed.Event)(nil).Query() })
}
