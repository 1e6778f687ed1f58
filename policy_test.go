package mxfed_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// This file tests rooms with a policy server, between whole servers over TLS: one makes events, one is invited, and one
// has to sign all that the first one does. https://spec.matrix.org/v1.19/server-server-api/#policy-servers

// polServer is a policy server. It authenticates its callers and signs what it is sent, unless answer is set.
type polServer struct {
	*joinSite
	key    ed25519.PrivateKey
	answer func(w http.ResponseWriter, body []byte)

	mu       sync.Mutex
	requests []polRequest
}

type polRequest struct {
	origin mxfed.ServerName
	body   []byte
}

func newPolServer(t testing.TB) *polServer {
	p := &polServer{key: ed25519.NewKeyFromSeed([]byte(strings.Repeat("policy:)", 4)))}
	p.joinSite = newJoinSite(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.RequestURI != "/_matrix/policy/v1/sign" || r.Method != http.MethodPost {
			return false
		}
		req, err := p.Server.Authenticate(r)
		if err != nil {
			mxfed.WriteError(w, err)
			return true
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.requests = append(p.requests, polRequest{req.Origin, req.Body})
		if p.answer != nil {
			p.answer(w, req.Body)
			return true
		}
		w.Write(srvJSON(t, p.signatures(p.sign(t, "10", req.Body))))
		return true
	}, nil)
	return p
}

// content is that of the event that makes p a room's policy server.
func (p *polServer) content() string {
	key := base64.RawURLEncoding.EncodeToString(p.key.Public().(ed25519.PublicKey)) // either alphabet will do
	return fmt.Sprintf(`{"via":%q,"public_keys":{"ed25519":%q}}`, p.name, key)
}

// sign is p's signature of an event. All room versions with the events of these tests redact them alike, but for v.
func (p *polServer) sign(t testing.TB, v mxfed.RoomVersion, pdu []byte) string {
	event := srvPDU(srvObject(t, pdu))
	if _, given := event["event_id"]; given {
		v = "1"
	}
	return base64.RawStdEncoding.EncodeToString(ed25519.Sign(p.key, srvJSON(t, event.redacted(t, v))))
}

// signatures is what p answers.
func (p *polServer) signatures(sig string) map[string]any {
	return map[string]any{string(p.name): map[string]any{"ed25519:policy_server": sig}}
}

// taken returns the requests since it was last called.
func (p *polServer) taken() []polRequest {
	p.mu.Lock()
	defer p.mu.Unlock()
	taken := p.requests
	p.requests = nil
	return taken
}

// polRoom is a room with a policy server. us is in it, guest is not; client is that of us.
type polRoom struct {
	us, guest *joinSite
	policy    *polServer
	server    *mxfed.Server
	client    *mxfed.Client
	id        mxfed.RoomID

	mu   sync.Mutex
	asks []mxfed.RoomQuery
	edit func(facts *mxfed.Room) // changes what is answered, if set
	fail error                   // the answer to who is in the room, if set
}

func newPolRoom(t testing.TB, v mxfed.RoomVersion) *polRoom {
	var cfg mxfed.Config
	r := &polRoom{policy: newPolServer(t), guest: newJoinSite(t, nil, nil)}
	r.us = newJoinSite(t, func(w http.ResponseWriter, q *http.Request) bool {
		mxfed.NewHandler(r.server, r.us.Hosts()).ServeHTTP(w, q)
		return true
	}, func(c *mxfed.Config) { cfg = *c })
	cfg.Rooms = mxfed.RoomSourceFunc(r.facts)
	var err error
	r.server, err = mxfed.NewServer(cfg)
	require.NoError(t, err)
	r.client, r.us.Server = r.server.Client(), r.server
	r.id = r.us.publicRoom(t, v)
	_, err = r.policy.join(t.Context(), r.id, r.us.name)
	require.NoError(t, err)
	_, err = r.us.Send(t.Context(), r.draft("m.room.policy", new(string), r.policy.content()))
	require.NoError(t, err)
	require.Empty(t, r.policy.taken(), "neither the event that names the policy server nor what was before is sent to it")
	return r
}

// facts are those of the host, as edited.
func (r *polRoom) facts(ctx context.Context, id mxfed.RoomID, ask mxfed.RoomQuery) (*mxfed.Room, error) {
	r.mu.Lock()
	r.asks = append(r.asks, ask)
	r.mu.Unlock()
	if r.fail != nil && len(ask.Servers) > 0 {
		return nil, r.fail
	}
	facts, err := r.us.Room(ctx, id, ask)
	if err == nil {
		facts.State = slices.DeleteFunc(facts.State, func(e *mxfed.Event) bool {
			key, _ := e.StateKey()
			return !slices.Contains(ask.State, mxfed.StateKey{Type: e.Type(), Key: key})
		})
		facts.Present = maps.Clone(facts.Present)
		maps.DeleteFunc(facts.Present, func(name mxfed.ServerName, _ bool) bool { return !slices.Contains(ask.Servers, name) })
		if r.edit != nil {
			r.edit(facts)
		}
	}
	return facts, err
}

// asked returns the questions about the room since it was last called.
func (r *polRoom) asked() []mxfed.RoomQuery {
	r.mu.Lock()
	defer r.mu.Unlock()
	asks := r.asks
	r.asks = nil
	return asks
}

// draft is an event of our user.
func (r *polRoom) draft(typ string, key *string, content string) *mxfed.Draft {
	return &mxfed.Draft{Room: r.id, Type: typ, StateKey: key, Sender: r.us.user(), Content: json.RawMessage(content)}
}

// message is a message of our user.
func (r *polRoom) message() *mxfed.Draft { return r.draft("m.room.message", nil, `{"body":"tea?"}`) }

// with changes the room's m.room.policy event in what the host answers.
func (r *polRoom) with(t testing.TB, content string) *mxfed.Event {
	pdu := srvPDU{"type": "m.room.policy", "state_key": "", "sender": r.us.user(), "room_id": r.id, "content": json.RawMessage(content), "depth": 9,
		"origin_server_ts": 1, "prev_events": []any{}, "auth_events": []any{}}
	policy := srvEvent(t, "10", pdu.sign(t, "10"))
	r.edit = func(facts *mxfed.Room) {
		for i, e := range facts.State {
			if e.Type() == "m.room.policy" {
				facts.State[i] = policy
			}
		}
	}
	return policy
}

// policyEvent is the room's m.room.policy event.
func (r *polRoom) policyEvent(t testing.TB) *mxfed.Event {
	state, _ := r.us.Events(r.id)
	i := slices.IndexFunc(state, func(e *mxfed.Event) bool { return e.Type() == "m.room.policy" })
	require.GreaterOrEqual(t, i, 0)
	return state[i]
}

// polSigned is an event's signatures.
func polSigned(t testing.TB, e *mxfed.Event) map[string]map[string]string {
	var event struct {
		Signatures map[string]map[string]string
	}
	require.NoError(t, json.Unmarshal(e.JSON(), &event))
	return event.Signatures
}

// Every event of our own is signed by the policy server before anybody sees it: as it is asked about it with our signature,
// so it comes back with one more.
func TestPolicy_Build(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "6", "10", "12"} {
		r := newPolRoom(t, v)
		other, user := "other", string(r.us.user())
		for name, draft := range map[string]*mxfed.Draft{
			"message":                        r.message(),
			"state":                          r.draft("m.room.topic", new(string), `{"topic":"tea"}`),
			"policy under another key":       r.draft("m.room.policy", &other, r.policy.content()),
			"policy that is not even state":  r.draft("m.room.policy", nil, `{}`),
			"a member event, leave included": r.draft("m.room.member", &user, `{"membership":"leave"}`),
		} {
			r.asked()
			e, err := r.server.Build(t.Context(), draft)
			require.NoError(t, err, "%s %s", v, name)
			asked := r.policy.taken()
			require.Len(t, asked, 1, name)
			require.Equal(t, r.us.name, asked[0].origin)
			all := polSigned(t, e)
			require.Len(t, all, 2, name)
			require.Equal(t, r.policy.sign(t, v, e.JSON()), all[string(r.policy.name)]["ed25519:policy_server"])
			require.Len(t, all[string(r.policy.name)], 1)
			require.True(t, mxfed.SignedByPolicyServer(r.policyEvent(t), e))
			delete(all, string(r.policy.name))
			without := srvPDU(srvObject(t, e.JSON())).with("signatures", all)
			require.JSONEq(t, string(srvJSON(t, without)), string(asked[0].body), "%s: what was sent", name)
			require.NoError(t, r.guest.Server.Verify(t.Context(), e)[0], "others pass over a signature whose key is not published")
			asks := r.asked()
			require.Len(t, asks, 2, "two questions at most")
			require.Equal(t, []mxfed.ServerName{r.policy.name}, asks[1].Servers)
		}
		e, err := r.server.Build(t.Context(), r.draft("m.room.policy", new(string), `{}`))
		require.NoError(t, err)
		require.Len(t, polSigned(t, e), 1, "the event that gets rid of it needs no consent")
		require.Len(t, r.asked(), 1)
		_, err = r.us.CreateRoom(t.Context(), v, r.us.user())
		require.NoError(t, err, "a new room")
		require.Empty(t, r.policy.taken())
	}
}

// An invite has the signature before it goes to the invited user's server, or before a local one is returned, and keeps it
// beside those that are added.
func TestPolicy_Invite(t *testing.T) {
	for _, v := range []mxfed.RoomVersion{"1", "10", "12"} {
		r := newPolRoom(t, v)
		policy := r.policyEvent(t)
		e, err := r.client.InviteUser(t.Context(), r.id, r.us.user(), r.guest.user(), nil)
		require.NoError(t, err)
		require.Len(t, r.policy.taken(), 1)
		require.Len(t, r.guest.Invites(), 1)
		for _, invite := range r.guest.Invites() {
			require.True(t, mxfed.SignedByPolicyServer(policy, invite.Event), "when it arrived")
			require.Len(t, invite.State, 3, "create, join rules and the inviter")
		}
		require.True(t, mxfed.SignedByPolicyServer(policy, e))
		require.ElementsMatch(t, []string{string(r.us.name), string(r.guest.name), string(r.policy.name)}, slices.Collect(maps.Keys(polSigned(t, e))))

		local, err := r.client.InviteUser(t.Context(), r.id, r.us.user(), "@other:"+mxfed.UserID(r.us.name), nil)
		require.NoError(t, err)
		require.True(t, mxfed.SignedByPolicyServer(policy, local))

		// The invited user's server and the policy server may be one and the same, with a key each.
		r.policy.taken()
		e, err = r.client.InviteUser(t.Context(), r.id, r.us.user(), "@third:"+mxfed.UserID(r.policy.name), nil)
		require.NoError(t, err)
		require.Len(t, r.policy.taken(), 1)
		require.True(t, mxfed.SignedByPolicyServer(policy, e))
		require.ElementsMatch(t, []string{"ed25519:1", "ed25519:policy_server"}, slices.Collect(maps.Keys(polSigned(t, e)[string(r.policy.name)])))
		require.NoError(t, r.guest.Server.Verify(t.Context(), e)[0])
	}
}

// polRefusal is an answer that is no signature, and what is made of it: here and for the host's own client.
type polRefusal struct {
	status int
	body   string
	code   mxfed.ErrorCode
	client int
}

// polRefusals are the published errors and what else servers say.
func polRefusals(t testing.TB) map[string]polRefusal {
	all := map[string]polRefusal{
		"event is malformed":     {400, `{"errcode":"M_BAD_JSON","error":"no"}`, mxfed.ErrBadJSON, 400},
		"no JSON":                {400, `{"errcode":"M_NOT_JSON","error":"no"}`, mxfed.ErrNotJSON, 400},
		"refused with 403":       {403, `{"errcode":"M_FORBIDDEN","error":"spam"}`, mxfed.ErrForbidden, 403},
		"no policy server there": {404, `{"errcode":"M_UNRECOGNIZED","error":"what?"}`, mxfed.ErrUnrecognized, 502},
		"no such page":           {404, `<html>`, mxfed.ErrUnknown, 502},
		"no such method":         {405, `{"errcode":"M_UNRECOGNIZED"}`, mxfed.ErrUnrecognized, 502},
		"unauthorised":           {401, `{"errcode":"M_UNAUTHORIZED"}`, mxfed.ErrUnauthorized, 502},
		"failure":                {500, `{"errcode":"M_UNKNOWN"}`, mxfed.ErrUnknown, 502},
		"gateway":                {502, ``, mxfed.ErrUnknown, 502},
		"moved":                  {307, ``, mxfed.ErrUnknown, 502},
		"no content":             {204, ``, mxfed.ErrUnknown, 502},
	}
	var file struct {
		Vectors []struct {
			Endpoint string
			Status   int
			Body     json.RawMessage
			When     string
		}
	}
	require.NoError(t, srvReadVector("error_examples.json", &file))
	published := 0
	for _, vector := range file.Vectors {
		if vector.Endpoint == "POST /_matrix/policy/v1/sign" {
			code := srvObject(t, vector.Body)["errcode"].(string)
			all[fmt.Sprintf("published %d %s", vector.Status, code)] = polRefusal{vector.Status, string(vector.Body), mxfed.ErrorCode(code), vector.Status}
			published++
		}
	}
	require.Equal(t, 4, published)
	return all
}

// What the policy server does not sign goes nowhere, and its error stays as it is.
func TestPolicy_Refused(t *testing.T) {
	r := newPolRoom(t, "10")
	var refusal polRefusal
	r.policy.answer = func(w http.ResponseWriter, _ []byte) {
		w.WriteHeader(refusal.status)
		io.WriteString(w, refusal.body)
	}
	for name, c := range polRefusals(t) {
		refusal = c
		for what, make := range map[string]func() (*mxfed.Event, error){
			"build": func() (*mxfed.Event, error) { return r.server.Build(t.Context(), r.message()) },
			"invite": func() (*mxfed.Event, error) {
				return r.client.InviteUser(t.Context(), r.id, r.us.user(), r.guest.user(), nil)
			},
			"local": func() (*mxfed.Event, error) {
				return r.client.InviteUser(t.Context(), r.id, r.us.user(), "@o:"+mxfed.UserID(r.us.name), nil)
			},
		} {
			e, err := make()
			require.Nil(t, e, "%s %s", what, name)
			require.ErrorIs(t, err, c.code, "%s %s", what, name)
			var theirs *mxfed.Error
			require.ErrorAs(t, err, &theirs)
			require.Equal(t, []any{r.policy.name, c.status}, []any{theirs.Server, theirs.Status}, "%s %s", what, name)
			told := mxfed.ClientError(err)
			require.Equal(t, c.client, told.Status, "%s %s", what, name)
			if told.Status == theirs.Status && c.status < 500 {
				require.Equal(t, []any{theirs.Code, theirs.Message, theirs.RetryAfter}, []any{told.Code, told.Message, told.RetryAfter}, name)
			}
			require.Len(t, r.policy.taken(), 1, "%s %s: asked once", what, name)
		}
	}
	require.Empty(t, r.guest.Invites())
	require.Zero(t, r.guest.count("/invite/"), "it never heard of any of them")
}

// An answer of status 200 without a valid signature is none.
func TestPolicy_Malformed(t *testing.T) {
	r := newPolRoom(t, "10")
	var answer func(body []byte) any
	r.policy.answer = func(w http.ResponseWriter, body []byte) {
		if text, ok := answer(body).(string); ok {
			io.WriteString(w, text)
			return
		}
		w.Write(srvJSON(t, answer(body)))
	}
	good := func(body []byte) string { return r.policy.sign(t, "10", body) }
	under := func(name, id string, sig any) map[string]any { return map[string]any{name: map[string]any{id: sig}} }
	name, id := string(r.policy.name), "ed25519:policy_server"
	for what, c := range map[string]func(body []byte) any{
		"nothing":           func([]byte) any { return "" },
		"no JSON":           func([]byte) any { return "<html>" },
		"null":              func([]byte) any { return "null" },
		"a list":            func([]byte) any { return "[]" },
		"an empty object":   func([]byte) any { return "{}" },
		"no signatures":     func([]byte) any { return map[string]any{name: map[string]any{}} },
		"a text":            func([]byte) any { return map[string]any{name: "x"} },
		"the event":         func(body []byte) any { return json.RawMessage(body) },
		"the event, signed": func(body []byte) any { return map[string]any{"signatures": under(name, id, good(body))} },
		"too large": func(body []byte) any {
			return map[string]any{name: map[string]any{id: good(body)}, "x": strings.Repeat("x", 2<<20)}
		},
		"twice":            func(body []byte) any { return fmt.Sprintf(`{%q:{%q:%q,%[2]q:%[3]q}}`, name, id, good(body)) },
		"by another name":  func(body []byte) any { return under("other.example", id, good(body)) },
		"by another key":   func(body []byte) any { return under(name, "ed25519:1", good(body)) },
		"by its algorithm": func(body []byte) any { return under(name, "ed25519", good(body)) },
		"a number":         func([]byte) any { return under(name, id, 5) },
		"short":            func(body []byte) any { return under(name, id, good(body)[:80]) },
		"not base64":       func(body []byte) any { return under(name, id, "!"+good(body)[1:]) },
		"one bit wrong":    func(body []byte) any { return under(name, id, polFlip(t, good(body))) },
		"of other bytes": func(body []byte) any {
			return under(name, id, good(srvJSON(t, srvPDU(srvObject(t, body)).with("depth", 99))))
		},
		"of what is not redacted": func(body []byte) any {
			event := srvPDU(srvObject(t, body)).with("signatures", nil)
			return under(name, id, base64.RawStdEncoding.EncodeToString(ed25519.Sign(r.policy.key, srvJSON(t, event))))
		},
		"by its server's key": func(body []byte) any {
			key := ed25519.NewKeyFromSeed([]byte(strings.Repeat("another ", 4)))
			return under(name, id, base64.RawStdEncoding.EncodeToString(ed25519.Sign(key, srvJSON(t, srvPDU(srvObject(t, body)).redacted(t, "10")))))
		},
	} {
		answer = c
		for i, make := range []func() (*mxfed.Event, error){
			func() (*mxfed.Event, error) { return r.server.Build(t.Context(), r.message()) },
			func() (*mxfed.Event, error) {
				return r.client.InviteUser(t.Context(), r.id, r.us.user(), r.guest.user(), []byte(`{"reason":"tea"}`))
			},
		} {
			e, err := make()
			require.Nil(t, e, "%s %d", what, i)
			require.ErrorContains(t, err, "policy/v1/sign: 200 M_UNKNOWN: malformed answer", what)
			require.Equal(t, 502, mxfed.ClientError(err).Status, what)
		}
	}
	require.Zero(t, r.guest.count("/invite/"))
}

// polFlip changes a signature by one bit.
func polFlip(t testing.TB, sig string) string {
	raw, err := base64.RawStdEncoding.DecodeString(sig)
	require.NoError(t, err)
	raw[40] ^= 1
	return base64.RawStdEncoding.EncodeToString(raw)
}

// Only the one signature is taken from an answer, in the form that all servers read.
func TestPolicy_TakesOneSignature(t *testing.T) {
	r := newPolRoom(t, "10")
	name := string(r.policy.name)
	r.policy.answer = func(w http.ResponseWriter, body []byte) {
		sig := strings.NewReplacer("+", "-", "/", "_").Replace(r.policy.sign(t, "10", body)) + "=="
		w.Write(srvJSON(t, map[string]any{"x": 1, "other.example": map[string]any{"ed25519:policy_server": sig}, string(r.us.name): map[string]any{"ed25519:1": "AAAA"},
			name: map[string]any{"ed25519:policy_server": sig, "ed25519:1": sig, "ed25519:x": 7}}))
	}
	e, err := r.server.Build(t.Context(), r.message())
	require.NoError(t, err)
	all := polSigned(t, e)
	require.Len(t, all, 2)
	require.Equal(t, map[string]string{"ed25519:policy_server": r.policy.sign(t, "10", e.JSON())}, all[name])
	require.NoError(t, r.guest.Server.Verify(t.Context(), e)[0], "our own signature is still the one we made")
}

// No answer at all is no consent either.
func TestPolicy_Unreachable(t *testing.T) {
	r := newPolRoom(t, "10")
	ctx, cancel := context.WithCancel(t.Context())
	r.policy.answer = func(http.ResponseWriter, []byte) { cancel(); panic(http.ErrAbortHandler) }
	e, err := r.server.Build(ctx, r.message())
	require.Nil(t, e)
	require.Error(t, err)
	r.policy.listener.CloseClientConnections()
	r.policy.listener.Close()
	for _, user := range []mxfed.UserID{r.guest.user(), "@other:" + mxfed.UserID(r.us.name)} {
		e, err := r.client.InviteUser(t.Context(), r.id, r.us.user(), user, nil)
		require.Nil(t, e)
		require.Equal(t, 504, mxfed.ClientError(err).Status)
	}
	require.Zero(t, r.guest.count("/invite/"))
	_, err = r.us.Send(t.Context(), r.draft("m.room.policy", new(string), `{}`))
	require.NoError(t, err, "the room can get rid of it")
	_, err = r.client.InviteUser(t.Context(), r.id, r.us.user(), r.guest.user(), nil)
	require.NoError(t, err)
}

// Which rooms have a policy server is for their state to say, and for its members.
func TestPolicy_InUse(t *testing.T) {
	r := newPolRoom(t, "10")
	key := base64.RawStdEncoding.EncodeToString(r.policy.key.Public().(ed25519.PublicKey))
	content := func(via, keys string) string { return `{"via":` + via + `,"public_keys":` + keys + `}` }
	via, keys := fmt.Sprintf("%q", r.policy.name), fmt.Sprintf(`{"ed25519":%q}`, key)
	for name, c := range map[string]struct {
		content string
		used    bool
	}{
		"as it should be":      {content(via, keys), true},
		"with more keys":       {content(via, fmt.Sprintf(`{"ed25519":"%s=","x":5}`, key)), true},
		"empty":                {`{}`, false},
		"via missing":          {`{"public_keys":` + keys + `}`, false},
		"via null":             {content("null", keys), false},
		"via a number":         {content("5", keys), false},
		"via a list":           {content("["+via+"]", keys), false},
		"via empty":            {content(`""`, keys), false},
		"via no server name":   {content(`"no name"`, keys), false},
		"via a user":           {content(`"@u:`+string(r.policy.name)+`"`, keys), false},
		"keys missing":         {`{"via":` + via + `}`, false},
		"keys a string":        {content(via, `"`+key+`"`), false},
		"keys empty":           {content(via, `{}`), false},
		"key null":             {content(via, `{"ed25519":null}`), false},
		"key an object":        {content(via, `{"ed25519":{"key":"`+key+`"}}`), false},
		"keys of other kinds":  {content(via, `{"ed448":"`+key+`"}`), false},
		"the former key field": {`{"via":` + via + `,"public_key":"` + key + `"}`, false},
		"names in other cases": {`{"Via":` + via + `,"public_keys":` + keys + `}`, false},
	} {
		r.with(t, c.content)
		e, err := r.server.Build(t.Context(), r.message())
		require.NoError(t, err, name)
		require.Equal(t, c.used, len(r.policy.taken()) > 0, name)
		require.Equal(t, c.used, len(polSigned(t, e)) == 2, name)
	}
}

// A policy server that nobody of is in the room is none. One of which the host cannot say that has to be asked.
func TestPolicy_Presence(t *testing.T) {
	r := newPolRoom(t, "10")
	for name, c := range map[string]struct {
		edit func(facts *mxfed.Room)
		used bool
	}{
		"there":       {nil, true},
		"not there":   {func(facts *mxfed.Room) { facts.Present = map[mxfed.ServerName]bool{r.policy.name: false} }, false},
		"not told":    {func(facts *mxfed.Room) { facts.Present = map[mxfed.ServerName]bool{r.us.name: true} }, true},
		"told of nil": {func(facts *mxfed.Room) { facts.Present = nil }, true},
		"no longer the policy server": {func(facts *mxfed.Room) {
			if facts.Present[r.policy.name] {
				facts.State = nil
			}
		}, false},
	} {
		r.edit = c.edit
		e, err := r.server.Build(t.Context(), r.message())
		require.NoError(t, err, name)
		require.Equal(t, c.used, len(r.policy.taken()) > 0, name)
		require.Equal(t, c.used, mxfed.SignedByPolicyServer(r.policyEvent(t), e), name)
	}
	room, err := r.us.CreateRoom(t.Context(), "10", r.us.user())
	require.NoError(t, err)
	r.edit, r.asks = nil, nil
	draft := r.message()
	draft.Room = room
	_, err = r.server.Build(t.Context(), draft)
	require.NoError(t, err)
	require.Len(t, r.asked(), 1, "without a policy server one question will do")

	r.fail = errors.New("the database is away")
	e, err := r.server.Build(t.Context(), r.message())
	require.Nil(t, e)
	require.ErrorIs(t, err, r.fail)
	require.Empty(t, r.policy.taken())
}

// A key that is none keeps the policy server in use, but no signature can be valid: nothing is sent, nobody asked.
func TestPolicy_NoKey(t *testing.T) {
	r := newPolRoom(t, "10")
	for name, key := range map[string]string{
		"empty": "", "31 bytes": base64.RawStdEncoding.EncodeToString(make([]byte, 31)), "not base64": "!!!!",
		"small order": base64.RawStdEncoding.EncodeToString(make([]byte, 32)), "a published example": "VGhpcyBzaG91bGQgYmUgYSByZWFsIGVkMjU1MTkgcGF5bG9hZA",
	} {
		policy := r.with(t, fmt.Sprintf(`{"via":%q,"public_keys":{"ed25519":%q}}`, r.policy.name, key))
		e, err := r.client.InviteUser(t.Context(), r.id, r.us.user(), r.guest.user(), nil)
		require.Nil(t, e, name)
		require.ErrorIs(t, err, mxfed.ErrForbidden, name)
		require.Equal(t, 403, mxfed.ClientError(err).Status, name)
		r.edit = nil
		e, err = r.server.Build(t.Context(), r.message())
		require.NoError(t, err)
		require.False(t, mxfed.SignedByPolicyServer(policy, e), name)
		require.Len(t, r.policy.taken(), 1, "for the last event, not before")
	}
	require.Zero(t, r.guest.count("/invite/"))
}
