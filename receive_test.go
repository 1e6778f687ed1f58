package mxfed_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// What becomes of an event from elsewhere follows from what is known where it was sent, and then from what the room is now.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestEvent_Check(t *testing.T) {
	const accepted, rejected, missing, softFailed = "accepted", "rejected", "missing", "soft-failed"
	for name, c := range map[string]struct {
		change func(c *srvCheck)
		want   string
	}{
		"nothing":                        {func(*srvCheck) {}, accepted},
		"stored already, whatever else":  {func(c *srvCheck) { *c.now = mxfed.Room{Version: c.now.Version, Events: []*mxfed.Event{c.m.Event}} }, accepted},
		"conditions are not asked again": {func(c *srvCheck) { c.now.Joined = nil }, accepted},
		"another room version":           {func(c *srvCheck) { c.now.Version = "9" }, rejected},
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
		"of another room":        {func(c *srvCheck) { c.now.State = newSrvRoom(c.t, newSrvSite(c.t), "11", nil).facts(c.m.Ask).State }, rejected},
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

// requireOutcome tells the errors of Check apart.
func requireOutcome(t *testing.T, want string, err error) {
	t.Helper()
	for outcome, reason := range map[string]error{"missing": mxfed.ErrMissing, "soft-failed": mxfed.ErrSoftFailed} {
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
