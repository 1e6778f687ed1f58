package mxfed

import (
	"context"
	"encoding/base64"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// This file tests what a server does with the signatures of a policy server on events that are not its own.

// policyVia is the policy server of the room, whose name may be that of another server in it.
const policyVia = ServerName("policy.example")

func policyContent(via ServerName) string {
	key := base64.RawStdEncoding.EncodeToString(joinKey("the policy of " + via).Public().(ed25519.PublicKey))
	return string(object(field{"via", quoted(via)}, field{"public_keys", object(field{"ed25519", quoted(key)})}))
}

// policySigning is the signature of e that the policy server called via makes.
func policySigning(via ServerName, e *Event) string {
	return base64.RawStdEncoding.EncodeToString(ed25519.Sign(joinKey("the policy of "+via), new(eventParser).signedBytes(e)))
}

func policyAdd(t testing.TB, e *Event, server ServerName, sig string) *Event {
	signed, err := e.withSignature(server, policyKeyID, sig)
	require.NoError(t, err)
	return signed
}

// newPolicyNet is the network of a room that has a policy server; that one signs what it is sent.
func newPolicyNet(t testing.TB, v RoomVersion) *joinNet {
	n := &joinNet{room: newJoinRoom(t, v, "public")}
	n.room.add(joinAlice, typePolicy, "", policyContent(policyVia))
	n.serve = func(q *http.Request, _ string) *http.Response {
		if q.Method != http.MethodPost || q.URL.String() != "https://policy.example/_matrix/policy/v1/sign" {
			return nil
		}
		e, err := ParseEvent(v, []byte(n.bodies[len(n.bodies)-1]))
		require.NoError(t, err)
		return joinReply(200, string(object(field{string(policyVia), object(field{string(policyKeyID), quoted(policySigning(policyVia, e))})})))
	}
	return n
}

// An event of another server is sent to the policy server once, when it is let in, and not if it has its signature already.
// https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func TestPolicySigned(t *testing.T) {
	for _, v := range []RoomVersion{"1", "10", "12"} {
		n := newPolicyNet(t, v)
		c, key := n.server(t, nil)
		join := n.room.sign(n.room.draft("@dan:third.example", typeMember, "@dan:third.example", `{"membership":"join"}`))
		good := policySigning(policyVia, join)
		for name, x := range map[string]struct {
			event  *Event
			facts  func(room *Room)
			asked  bool
			signed bool
		}{
			"as it comes":             {join, nil, true, true},
			"signed already":          {policyAdd(t, join, policyVia, good), nil, false, true},
			"badly signed":            {policyAdd(t, join, policyVia, strings.Repeat("A", 86)), nil, true, true},
			"signed by another":       {policyAdd(t, join, "third.example", good), nil, true, true},
			"stored before":           {join, func(room *Room) { room.Events = []*Event{policyAdd(t, join, policyVia, good)} }, false, true},
			"stored without":          {join, func(room *Room) { room.Events = []*Event{nil, join} }, false, false},
			"another one stored":      {join, func(room *Room) { room.Events = []*Event{n.room.entry(typeCreate, "")} }, true, true},
			"no policy server":        {join, func(room *Room) { room.State = nil }, false, false},
			"it has left":             {join, func(room *Room) { room.Present = map[ServerName]bool{policyVia: false} }, false, false},
			"it is there":             {join, func(room *Room) { room.Present = map[ServerName]bool{policyVia: true} }, true, true},
			"the event that names it": {n.room.entry(typePolicy, ""), func(room *Room) {}, false, false},
		} {
			room := &Room{Version: v, State: n.room.state}
			if x.facts != nil {
				x.facts(room)
			}
			n.asked, n.bodies = nil, nil
			e, err := c.policySigned(context.Background(), c.own[0], room, x.event)
			require.NoError(t, err, "%s %s", v, name)
			require.Equal(t, x.asked, len(n.asked) == 1, "%s %s: %v", v, name, n.asked)
			want := x.event
			if x.signed {
				want = policyAdd(t, x.event, policyVia, good)
			}
			require.Equal(t, want.text, e.text, "%s %s", v, name)
			if x.asked {
				require.Equal(t, x.event.text, n.bodies[0])
			}
		}
		require.Empty(t, key.events(), "this server signs later")
	}
}

// In room versions 1 and 2 another event may have the same ID: what was found out about that one says nothing.
func TestPolicySigned_SameID(t *testing.T) {
	n := newPolicyNet(t, "1")
	c, _ := n.server(t, nil)
	join := n.room.sign(n.room.draft("@dan:third.example", typeMember, "@dan:third.example", `{"membership":"join"}`))
	other, err := ParseEvent("1", []byte(join.text.with("depth", "99")))
	require.NoError(t, err)
	require.Equal(t, join.id, other.id)
	_, err = c.policySigned(context.Background(), c.own[0], &Room{Version: "1", State: n.room.state, Events: []*Event{other}}, join)
	require.NoError(t, err)
	require.Len(t, n.asked, 1)
}

// The signature is one more, and an event that is full has no place for it.
func TestPolicySigned_Size(t *testing.T) {
	n := newPolicyNet(t, "10")
	c, _ := n.server(t, nil)
	draft := n.room.draft(joinAlice, "m.room.message", "", `{}`)
	draft.content = object(field{"body", quoted(strings.Repeat("x", maxEventSize-len(n.room.sign(draft).text)-20))})
	e, err := c.policySigned(context.Background(), c.own[0], &Room{Version: "10", State: n.room.state}, n.room.sign(draft))
	require.ErrorIs(t, err, ErrTooLarge)
	require.Nil(t, e)
}

// The key of an invited server may have the name that policy servers' keys have. The policy server's signature is judged by
// the key that the room names, so that it stays as it is. https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func TestPolicy_KeptByInvite(t *testing.T) {
	for name, published := range map[string]ServerName{"another key": "published", "the same key": "the policy of " + joinVia} {
		n, _, _ := newInviteNet(t, "10")
		c, _ := n.server(t, func(cfg *Config) { cfg.Keys = policyKeys{published} })
		policy := n.room.add(joinUser, typePolicy, "", policyContent(joinVia))
		invite := n.inviteOf(t)
		invite.Event = policyAdd(t, invite.Event, joinVia, policySigning(joinVia, invite.Event))
		n.serve = func(*http.Request, string) *http.Response {
			message := new(eventParser).signedBytes(invite.Event)
			sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(joinKey(published), message))
			return joinReply(200, inviteAnswer(false, policyAdd(t, invite.Event, joinVia, sig).text))
		}
		answer, err := c.Invite(context.Background(), joinVia, invite)
		require.NoError(t, err, name)
		require.Equal(t, invite.Event.text, answer.Event.text, name)
		require.True(t, SignedByPolicyServer(policy, answer.Event), name)

		n.serve = func(*http.Request, string) *http.Response {
			return joinReply(200, inviteAnswer(false, policyAdd(t, invite.Event, joinVia, strings.Repeat("A", 86)).text))
		}
		_, err = c.Invite(context.Background(), joinVia, invite)
		require.ErrorContains(t, err, "no valid signature of r.example", name)
	}
}

// policyKeys publish one more key of every server, under the name of a policy server's.
type policyKeys struct{ published ServerName }

func (k policyKeys) Keys(ctx context.Context, keys []Key) error {
	err := new(joinKeys).Keys(ctx, keys)
	for i := range keys {
		if keys[i].ID == policyKeyID {
			keys[i].Public, keys[i].ValidUntil = joinKey(k.published).Public().(ed25519.PublicKey), joinTime.AddDate(0, 0, 1)
		}
	}
	return err
}

// Of the join that comes back only the policy server's signature is taken, if it is right by the room's state.
func TestWithPolicySignature(t *testing.T) {
	r := newJoinRoom(t, "10", "public")
	policy := r.add(joinAlice, typePolicy, "", policyContent(policyVia))
	join := r.sign(r.draft(joinUser, typeMember, string(joinUser), `{"membership":"join"}`))
	good := policyAdd(t, join, policyVia, policySigning(policyVia, join))
	for name, c := range map[string]struct {
		policy *Event
		event  *Event
		answer value
		want   *Event
	}{
		"signed":               {policy, join, good.text, good},
		"with more":            {policy, join, policyAdd(t, good, joinVia, "AAAA").text.with("depth", "7"), good},
		"not signed":           {policy, join, join.text, join},
		"nothing":              {policy, join, "", join},
		"a list":               {policy, join, "[]", join},
		"badly signed":         {policy, join, policyAdd(t, join, policyVia, strings.Repeat("A", 86)).text, join},
		"by another":           {policy, join, policyAdd(t, join, joinVia, policySigning(policyVia, join)).text, join},
		"no policy server":     {nil, join, good.text, join},
		"had it":               {policy, good, join.text, good},
		"another policy event": {r.entry(typeCreate, ""), join, good.text, join},
	} {
		require.Equal(t, c.want.text, c.event.withPolicySignature(c.policy, c.answer).text, name)
	}
}
