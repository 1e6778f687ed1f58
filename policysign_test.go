package mxfed_test

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// This file tests what is done about a policy server's signature on events that are not this server's own.

// A server outside the room cannot ask: the one that lets its user in does, before it signs itself, and keeps what it got.
func TestPolicy_Resident(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "10", "12"} {
		r := newPolRoom(t, v)
		policy := r.policyEvent(t)
		result, err := r.guest.join(t.Context(), r.id, r.us.name)
		require.NoError(t, err, v)
		asked := r.policy.taken()
		require.Len(t, asked, 1)
		require.Equal(t, r.us.name, asked[0].origin)
		require.NotContains(t, srvObject(t, asked[0].body)["signatures"], string(r.us.name), "we sign what was let through")
		stored := r.stored(result.Event.ID())
		require.True(t, mxfed.SignedByPolicyServer(policy, stored))
		require.Len(t, polSigned(t, stored), 3)
		require.True(t, mxfed.SignedByPolicyServer(policy, result.Event), "the joining server gets it back")

		// What was let in once is not asked about again; the answer is that of the first time.
		bare := polBare(t, result.Event, string(r.guest.name))
		answer, err := r.guest.Server.Client().SendJoin(t.Context(), r.us.name, &mxfed.SendJoinRequest{Event: bare})
		require.NoError(t, err)
		require.Empty(t, r.policy.taken())
		require.True(t, mxfed.SignedByPolicyServer(policy, answer.Event))

		req := &mxfed.JoinRequest{Room: r.id, User: mxfed.UserID("@sink:" + string(r.guest.name)), Via: []mxfed.ServerName{r.us.name},
			Sink: func(*mxfed.Event, bool) error { return nil }}
		result, err = r.guest.Server.Client().Join(t.Context(), req)
		require.NoError(t, err)
		require.Len(t, r.policy.taken(), 1)
		require.True(t, mxfed.SignedByPolicyServer(policy, result.Event), "also if events are handed on")

		r.edit = func(facts *mxfed.Room) { // the policy server has left, says who is asked about it
			for name := range facts.Present {
				facts.Present[name] = false
			}
		}
		_, err = r.guest.join(t.Context(), r.id, r.us.name)
		require.NoError(t, err)
		require.Empty(t, r.policy.taken())
	}
}

// Knocks and leaves are events like any other.
func TestPolicy_ResidentLeave(t *testing.T) {
	r := newPolRoom(t, "10")
	_, err := r.us.Send(t.Context(), r.draft("m.room.join_rules", new(string), `{"join_rule":"knock"}`))
	require.NoError(t, err)
	r.policy.taken()
	client, via := r.guest.Server.Client(), []mxfed.ServerName{r.us.name}
	knock, err := client.Knock(t.Context(), &mxfed.KnockRequest{Room: r.id, User: r.guest.user(), Via: via})
	require.NoError(t, err)
	leave, err := client.Leave(t.Context(), &mxfed.LeaveRequest{Room: r.id, User: r.guest.user(), Via: via})
	require.NoError(t, err)
	require.Len(t, r.policy.taken(), 2)
	for _, e := range []*mxfed.Event{knock.Event, leave} {
		require.True(t, mxfed.SignedByPolicyServer(r.policyEvent(t), r.stored(e.ID())))
	}
}

// stored is an event that our host has.
func (r *polRoom) stored(id mxfed.EventID) *mxfed.Event {
	_, all := r.us.Events(r.id)
	if i := slices.IndexFunc(all, func(e *mxfed.Event) bool { return e.ID() == id }); i >= 0 {
		return all[i]
	}
	return nil
}

// Whom the policy server does not want is not let in: our answer is a refusal of our own, or says that it could not be asked.
func TestPolicy_ResidentRefused(t *testing.T) {
	r := newPolRoom(t, "10")
	var refusal polRefusal
	r.policy.answer = func(w http.ResponseWriter, _ []byte) {
		w.WriteHeader(refusal.status)
		io.WriteString(w, refusal.body)
	}
	state, _ := r.us.Events(r.id)
	all := polRefusals(t)
	all["no signature"] = polRefusal{status: 200, body: `{}`, code: mxfed.ErrUnknown}
	for name, c := range all {
		refusal = c
		_, err := r.guest.join(t.Context(), r.id, r.us.name)
		want, status := mxfed.ErrUnknown, 502
		if c.code == mxfed.ErrForbidden {
			want, status = c.code, 403
		}
		require.ErrorIs(t, err, want, name)
		var ours *mxfed.Error
		require.ErrorAs(t, err, &ours, name)
		require.Equal(t, []any{r.us.name, "send_join", status}, []any{ours.Server, ours.Endpoint, ours.Status}, name)
		require.Len(t, r.policy.taken(), 1, name)
	}
	after, _ := r.us.Events(r.id)
	require.Equal(t, state, after)
}

// PolicySign is for events that arrived without a signature: it asks if one is needed, and adds what it gets to what is there.
func TestPolicySign(t *testing.T) {
	r := newPolRoom(t, "10")
	policy, name := r.policyEvent(t), string(r.policy.name)
	sender := newSrvPeer(t, "domain")
	pdu := srvPDU{"type": "m.room.message", "sender": "@a:domain", "room_id": r.id, "content": map[string]any{"body": "tea"}, "depth": 9,
		"origin_server_ts": 1, "prev_events": []any{}, "auth_events": []any{}}
	event := func(change func(srvPDU) srvPDU) *mxfed.Event {
		return srvEvent(t, "10", change(pdu).sign(t, "10", sender))
	}
	same := func(p srvPDU) srvPDU { return p }
	signed := func(signatures map[string]any) func(srvPDU) srvPDU { return srvSet("signatures", signatures) }
	good := r.policy.sign(t, "10", event(same).JSON())
	for what, c := range map[string]struct {
		policy *mxfed.Event
		event  *mxfed.Event
		asked  bool
	}{
		"not signed":               {policy, event(same), true},
		"no policy server":         {nil, event(same), false},
		"signed":                   {policy, event(signed(r.policy.signatures(good))), false},
		"badly signed":             {policy, event(signed(r.policy.signatures(polFlip(t, good)))), true},
		"signed with another key":  {policy, event(signed(map[string]any{name: map[string]any{"ed25519:1": good}})), true},
		"signed by another server": {policy, event(signed(map[string]any{"other.example": map[string]any{"ed25519:policy_server": good}})), true},
		"signatures of no kind":    {policy, event(signed(map[string]any{name: "x"})), true},
		"a policy":                 {policy, event(func(p srvPDU) srvPDU { return p.with("type", "m.room.policy").with("state_key", "") }), false},
		"a policy beside it":       {policy, event(func(p srvPDU) srvPDU { return p.with("type", "m.room.policy").with("state_key", "x") }), true},
	} {
		before := polSignatures(t, c.event)
		e, err := r.client.PolicySign(t.Context(), "", c.policy, c.event)
		require.NoError(t, err, what)
		require.Equal(t, c.asked, len(r.policy.taken()) == 1, what)
		require.Equal(t, c.asked, !mxfed.SignedByPolicyServer(c.policy, c.event), what)
		require.True(t, mxfed.SignedByPolicyServer(c.policy, e), what)
		require.Equal(t, before, polSignatures(t, c.event), "%s: events do not change", what)
		if c.asked { // the one signature is set, and all others are as they were
			own, _ := before[name].(map[string]any)
			own = maps.Clone(own)
			if own == nil {
				own = map[string]any{}
			}
			own["ed25519:policy_server"] = r.policy.sign(t, "10", e.JSON())
			before[name] = own
		}
		require.Equal(t, before, polSignatures(t, e), what)
		require.Equal(t, c.event.ID(), e.ID(), what)
	}
}

// polSignatures is what an event holds in place of signatures.
func polSignatures(t testing.TB, e *mxfed.Event) map[string]any {
	return srvObject(t, e.JSON())["signatures"].(map[string]any)
}

// What makes no sense is not asked.
func TestPolicySign_Refused(t *testing.T) {
	r := newPolRoom(t, "10")
	policy := r.policyEvent(t)
	e, err := r.server.Build(t.Context(), r.draft("m.room.policy", nil, `{}`))
	require.NoError(t, err)
	draft := r.message()
	draft.Room, err = r.us.CreateRoom(t.Context(), "10", r.us.user())
	require.NoError(t, err)
	elsewhere, err := r.us.Send(t.Context(), draft)
	require.NoError(t, err)
	r.policy.taken()
	for what, ask := range map[string]func() (*mxfed.Event, error){
		"nothing":         func() (*mxfed.Event, error) { return r.client.PolicySign(t.Context(), "", policy, nil) },
		"nothing at all":  func() (*mxfed.Event, error) { return r.client.PolicySign(t.Context(), "", nil, nil) },
		"another room":    func() (*mxfed.Event, error) { return r.client.PolicySign(t.Context(), "", policy, elsewhere) },
		"not our name":    func() (*mxfed.Event, error) { return r.client.PolicySign(t.Context(), "other.example", policy, e) },
		"context is over": func() (*mxfed.Event, error) { return r.client.PolicySign(polOver(t), "", policy, polBare(t, e)) },
	} {
		got, err := ask()
		require.Error(t, err, what)
		require.Nil(t, got, what)
	}
	require.Empty(t, r.policy.taken())
}

// What a host is told about an event that has arrived. https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func TestSignedByPolicyServer(t *testing.T) {
	server := &polServer{key: ed25519.NewKeyFromSeed([]byte(strings.Repeat("policy:)", 4))), joinSite: &joinSite{name: "policy.example"}}
	other := &polServer{key: ed25519.NewKeyFromSeed([]byte(strings.Repeat("another ", 4))), joinSite: server.joinSite}
	for _, v := range srvVersions {
		room := "!r:domain"
		if v == "12" {
			room = "!" + strings.Repeat("r", 43)
		}
		pdu := srvPDU{"type": "m.room.policy", "state_key": "", "sender": "@a:domain", "room_id": room, "content": json.RawMessage(server.content()), "depth": 9,
			"origin_server_ts": 1, "prev_events": []any{}, "auth_events": []any{}}
		if srvGivenIDs(v) {
			pdu["event_id"] = "$e:domain"
		}
		event := func(p srvPDU) *mxfed.Event { return srvEvent(t, v, p.sign(t, v)) }
		message := pdu.with("type", "m.room.message").with("state_key", nil).with("content", map[string]any{"body": "tea"})
		by := func(p *polServer, m srvPDU) *mxfed.Event {
			return event(m.with("signatures", p.signatures(p.sign(t, v, event(m).JSON()))))
		}
		policy, elsewhere := event(pdu), strings.ToUpper(room)
		cut := by(server, message).JSON() // as one who redacts it, or changes it, sends it on
		cut = []byte(strings.Replace(string(cut), `{"body":"tea"}`, `{"body":"coffee"}`, 1))
		for name, c := range map[string]struct {
			policy, event *mxfed.Event
			passes        bool
		}{
			"signed":                     {policy, by(server, message), true},
			"signed, content changed":    {policy, srvEvent(t, v, cut), true}, // for the content hash to find out
			"not signed":                 {policy, event(message), false},
			"signed with another key":    {policy, by(other, message), false},
			"no policy server":           {nil, event(message), true},
			"policy event that is empty": {event(pdu.with("content", map[string]any{})), event(message), true},
			"policy under another key":   {event(pdu.with("state_key", "x")), event(message), true},
			"policy that is no state":    {event(pdu.with("state_key", nil)), event(message), true},
			"event of another type":      {event(pdu.with("type", "m.room.topic")), event(message), true},
			"a policy event":             {policy, event(pdu.with("content", map[string]any{"x": 1})), true},
			"another policy event":       {policy, event(pdu.with("state_key", "x")), false},
			"a policy message":           {policy, event(pdu.with("state_key", nil)), false},
			"signed, of another room":    {policy, by(server, message.with("room_id", elsewhere)), false},
			"policy of another room":     {policy, event(pdu.with("room_id", elsewhere)), false},
			"no event":                   {policy, nil, false},
			"nothing":                    {nil, nil, false},
		} {
			require.Equal(t, c.passes, mxfed.SignedByPolicyServer(c.policy, c.event), "%s %s", v, name)
		}
	}
}

// No server's own key can pass for that of a policy server: whatever it signed would count as let through.
func TestPolicy_ReservedKeyID(t *testing.T) {
	own := newSrvPeer(t, "us.example")
	_, err := mxfed.NewSigner(own.name, "ed25519:policy_server", own.key)
	require.Error(t, err)
	_, err = mxfed.NewSigner(own.name, own.id, own.key, mxfed.Key{ID: "ed25519:policy_server", Public: own.key.Public().(ed25519.PublicKey), Expired: srvNow})
	require.Error(t, err)
}

// polOver is a context that has ended.
func polOver(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// polBare is an event without signatures but those of the servers named.
func polBare(t testing.TB, e *mxfed.Event, kept ...string) *mxfed.Event {
	signatures := polSignatures(t, e)
	maps.DeleteFunc(signatures, func(name string, _ any) bool { return !slices.Contains(kept, name) })
	return srvEvent(t, e.Version(), srvJSON(t, srvPDU(srvObject(t, e.JSON())).with("signatures", signatures)))
}

// A policy server of an own name is asked through Config.HTTP like any other.
func TestPolicySign_OwnName(t *testing.T) {
	own, second := newSrvPeer(t, "us.example"), newSrvPeer(t, "second.example")
	policy := &polServer{key: ed25519.NewKeyFromSeed([]byte(strings.Repeat("policy:)", 4))), joinSite: &joinSite{name: own.name}}
	var asked []string
	server, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{own.signer, second.signer}, HTTP: polTransport(func(r *http.Request) (*http.Response, error) {
		parties, _, _ := strings.Cut(r.Header.Get("Authorization"), ",key=")
		asked = append(asked, r.Method+" "+r.URL.String()+" "+parties)
		body, err := io.ReadAll(r.Body)
		require.NoError(t, err)
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(string(srvJSON(t, policy.signatures(policy.sign(t, "10", body))))))}, nil
	})})
	require.NoError(t, err)
	pdu := srvPDU{"type": "m.room.policy", "state_key": "", "sender": "@a:domain", "room_id": "!r:domain", "content": json.RawMessage(policy.content()), "depth": 9,
		"origin_server_ts": 1, "prev_events": []any{}, "auth_events": []any{}}
	e := srvEvent(t, "10", pdu.with("type", "m.room.topic").sign(t, "10"))
	for _, from := range []mxfed.ServerName{"", second.name} {
		signed, err := server.Client().PolicySign(t.Context(), from, srvEvent(t, "10", pdu.sign(t, "10")), e)
		require.NoError(t, err)
		require.True(t, mxfed.SignedByPolicyServer(srvEvent(t, "10", pdu.sign(t, "10")), signed))
	}
	const call = `POST https://us.example/_matrix/policy/v1/sign X-Matrix origin="`
	require.Equal(t, []string{call + `us.example",destination="us.example"`, call + `second.example",destination="us.example"`}, asked)
}

// polTransport is an http.RoundTripper that is one function.
type polTransport func(*http.Request) (*http.Response, error)

func (f polTransport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
