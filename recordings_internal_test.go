package mxfed

import (
	"context"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// recordedExchange is one line of testdata/recordings: a request between two real homeservers, A and B, and its answer.
type recordedExchange struct {
	Authorization, Method, URI, Body, Response, Step, To string
	Status                                               int
	RoomVersion                                          RoomVersion `json:"room_version"`
}

// recording is all that two servers said to each other in rooms of one version, and their keys.
type recording struct {
	exchanges []recordedExchange
	names     map[string]ServerName // of A and B
	keys      map[ServerName]map[KeyID]ed25519.PublicKey
}

func (r *recording) key(server ServerName, id KeyID) ed25519.PublicKey { return r.keys[server][id] }

func forEachRecording(t *testing.T, test func(t *testing.T, r *recording)) {
	files, err := filepath.Glob(filepath.Join("testdata", "recordings", "*.jsonl"))
	require.NoError(t, err)
	require.Len(t, files, 8)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".jsonl"), func(t *testing.T) { test(t, readRecording(t, file)) })
	}
}

func readRecording(t *testing.T, file string) *recording {
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	r := &recording{names: make(map[string]ServerName), keys: make(map[ServerName]map[KeyID]ed25519.PublicKey)}
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		var x recordedExchange
		require.NoError(t, json.Unmarshal([]byte(line), &x))
		r.exchanges = append(r.exchanges, x)
		if x.URI == "/_matrix/key/v2/server" {
			r.learn(t, &x)
		}
	}
	require.Len(t, r.names, 2)
	return r
}

// learn takes name and keys from a key document, which is signed by the keys it lists.
func (r *recording) learn(t *testing.T, x *recordedExchange) {
	document := eventCanonical(t, []byte(x.Response))
	text, ok := document.get("server_name").str()
	require.True(t, ok)
	name := ServerName(text)
	r.names[x.To], r.keys[name] = name, make(map[KeyID]ed25519.PublicKey)
	for id, entry := range document.get("verify_keys").members() {
		encoded, _ := entry.get("key").str()
		public, err := decodeBase64(encoded)
		require.NoError(t, err)
		require.True(t, usableKey(public))
		require.NoError(t, VerifyJSON([]byte(x.Response), name, KeyID(id), public))
		r.keys[name][KeyID(id)] = public
	}
}

// client is one that knows the servers' keys, soon after an event.
func (r *recording) client(t *testing.T, after *Event) *Client {
	now := millis(after.ts).Add(time.Minute)
	keys := KeysFunc(func(_ context.Context, keys []Key) error {
		for i := range keys {
			keys[i].Public, keys[i].ValidUntil = r.key(keys[i].Server, keys[i].ID), now
		}
		return nil
	})
	s, err := NewServer(Config{Signers: []*Signer{joinSigner(t, "other.example")}, Keys: keys, Now: func() time.Time { return now }})
	require.NoError(t, err)
	return s.Client()
}

// segments are the parts of the path, unescaped one by one.
func (x *recordedExchange) segments(t *testing.T) []string {
	path, _, _ := strings.Cut(x.URI, "?")
	segments := strings.Split(strings.TrimPrefix(path, "/_matrix/federation/"), "/")
	for i := range segments {
		var err error
		segments[i], err = url.PathUnescape(segments[i])
		require.NoError(t, err)
	}
	return segments
}

// Every signature of a request covers method, URI, names and body. https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func TestRecordings_RequestSignatures(t *testing.T) {
	forEachRecording(t, func(t *testing.T, r *recording) {
		signed := 0
		for _, x := range r.exchanges {
			if x.Authorization == "" {
				require.Equal(t, "/_matrix/key/v2/server", x.URI)
				continue
			}
			c, err := parseXMatrix(x.Authorization)
			require.NoError(t, err, x.Step)
			require.Equal(t, r.names[x.To], c.destination)
			require.NotEqual(t, c.origin, c.destination)
			content := value("")
			if x.Body != "" {
				content = eventCanonical(t, []byte(x.Body))
			}
			public := r.key(c.origin, c.key)
			require.True(t, verify(public, requestBytes(x.Method, x.URI, c.origin, c.destination, content), c.sig), "%s: %s", x.Step, x.URI)
			for _, other := range [][]byte{
				requestBytes("POST", x.URI, c.origin, c.destination, content),
				requestBytes(x.Method, x.URI+"?", c.origin, c.destination, content),
				requestBytes(x.Method, x.URI, c.destination, c.origin, content),
				requestBytes(x.Method, x.URI, c.origin, "", content),
				requestBytes(x.Method, x.URI, c.origin, c.destination, `{"x":1}`),
			} {
				require.False(t, verify(public, other, c.sig))
			}
			signed++
		}
		require.Greater(t, signed, 10)
	})
}

// recordedPDU is an event somewhere in an exchange; id is the one that the path names, if it does.
type recordedPDU struct {
	where string
	text  value
	id    EventID
}

// pdus collects the events of a request and its answer.
func (x *recordedExchange) pdus(t *testing.T) (pdus []recordedPDU) {
	if x.Status != 200 {
		return nil
	}
	var body value
	if x.Body != "" {
		body = eventCanonical(t, []byte(x.Body))
	}
	response, segments := eventCanonical(t, []byte(x.Response)), x.segments(t)
	list := func(where string, events value) {
		for e := range events.elements() {
			pdus = append(pdus, recordedPDU{where: where, text: e})
		}
	}
	switch segments[1] {
	case "invite":
		id := EventID(segments[3])
		pdus = append(pdus, recordedPDU{"invite", body.get("event"), id}, recordedPDU{"invite answer", response.get("event"), id})
	case "send_join", "send_leave", "send_knock":
		id := EventID(segments[3])
		pdus = append(pdus, recordedPDU{segments[1], body, id})
		if answer := response.get("event"); answer != "" {
			pdus = append(pdus, recordedPDU{"send_join answer", answer, id})
		}
		list("state", response.get("state"))
		list("auth_chain", response.get("auth_chain"))
	case "send":
		list("send", body.get("pdus"))
	case "state":
		list("fetched state", response.get("pdus"))
		list("fetched auth_chain", response.get("auth_chain"))
	case "backfill":
		list("backfill", response.get("pdus"))
	}
	return pdus
}

// recordedEvents is a list of events without what their server alone says about them.
func recordedEvents(list value) value {
	var events []value
	for e := range list.elements() {
		events = append(events, e.with("unsigned", ""))
	}
	return array(events...)
}

// Every recorded event is read in its room's version to the ID that others know it by, with right hashes and signatures.
func TestRecordings_Events(t *testing.T) {
	knocks, fetched := 0, 0
	forEachRecording(t, func(t *testing.T, r *recording) {
		seen := make(map[string]int)
		byID := make(map[EventID]*Event)
		for _, x := range r.exchanges {
			for _, pdu := range x.pdus(t) {
				e, err := ParseEvent(x.RoomVersion, []byte(pdu.text))
				require.NoError(t, err, "%s: %s: %s", x.Step, pdu.where, pdu.text)
				require.True(t, pdu.id == "" || pdu.id == e.ID(), "%s: %s", x.Step, pdu.where)
				require.True(t, e.hashOK, "%s: %s", x.Step, pdu.where)
				_, err = new(eventParser).checkSignatures(e, r.key)
				require.NoError(t, err, "%s: %s", x.Step, pdu.where)
				if segments := x.segments(t); segments[1] != "send" {
					require.Equal(t, segments[2], string(e.RoomID()))
				}
				if known := byID[e.ID()]; known != nil {
					require.Equal(t, known.text.with("signatures", ""), e.text.with("signatures", ""))
				}
				byID[e.ID()] = e
				seen[pdu.where]++
			}
		}
		for _, where := range []string{"invite", "invite answer", "send_join", "send_join answer", "send_leave", "state", "auth_chain", "send"} {
			require.NotZero(t, seen[where], where)
		}
		knocks += seen["send_knock"]
		fetched += seen["fetched state"]
		r.requireReferences(t, byID)
	})
	require.NotZero(t, knocks)
	require.NotZero(t, fetched)
}

// requireReferences checks that the auth_events of what a join answer holds are in the answer too, under the IDs that this
// package computed.
func (r *recording) requireReferences(t *testing.T, byID map[EventID]*Event) {
	for _, x := range r.exchanges {
		for _, pdu := range x.pdus(t) {
			if !slices.Contains([]string{"state", "auth_chain", "send_join", "fetched state", "fetched auth_chain"}, pdu.where) {
				continue
			}
			e, err := ParseEvent(x.RoomVersion, []byte(pdu.text))
			require.NoError(t, err)
			for _, id := range e.Auth() {
				require.Contains(t, byID, id, "%s: %s", x.Step, pdu.where)
				require.Equal(t, e.RoomID(), byID[id].RoomID())
			}
			if e.rules.hashRoomID {
				require.Contains(t, byID, EventID("$"+e.RoomID()[1:]))
			}
		}
	}
}

// An invite may carry an entry under the invited server's name that is none of its signatures: only the sender's server
// decides. https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestRecordings_InvitesWithForeignSignature(t *testing.T) {
	with := 0
	forEachRecording(t, func(t *testing.T, r *recording) {
		foreign := 0
		for _, x := range r.exchanges {
			for _, pdu := range x.pdus(t) {
				if pdu.where != "invite" {
					continue
				}
				e, err := ParseEvent(x.RoomVersion, []byte(pdu.text))
				require.NoError(t, err)
				require.NotEqual(t, r.names[x.To], e.Sender().Server())
				for id := range e.signatures(r.names[x.To]).members() {
					require.Nil(t, r.key(r.names[x.To], KeyID(id)), "a key of the invited server")
					foreign++
				}
				_, err = new(eventParser).checkSignatures(e, r.key)
				require.NoError(t, err)
				_, err = new(eventParser).checkSignatures(eventEdited(t, e, "signatures", e.text.get("signatures").with(string(e.Sender().Server()), "")), r.key)
				require.Error(t, err)
			}
			if pdus := x.pdus(t); len(pdus) == 2 && pdus[1].where == "invite answer" {
				answer, err := ParseEvent(x.RoomVersion, []byte(pdus[1].text))
				require.NoError(t, err)
				require.NoError(t, answer.signedBy(r.names[x.To], new(eventParser).signedBytes(answer), r.key), "the invited server has signed")
			}
		}
		if foreign > 0 {
			with++
		}
	})
	require.Equal(t, 4, with)
}

// A join into a restricted room is signed by the resident server when it comes back, and not before.
func TestRecordings_RestrictedJoins(t *testing.T) {
	restricted := 0
	forEachRecording(t, func(t *testing.T, r *recording) {
		for _, x := range r.exchanges {
			for _, pdu := range x.pdus(t) {
				e, err := ParseEvent(x.RoomVersion, []byte(pdu.text))
				require.NoError(t, err)
				if e.authoriserID() == "" || pdu.where != "send_join" && pdu.where != "send_join answer" {
					continue
				}
				authorised, err := new(eventParser).checkSignatures(e, r.key)
				require.NoError(t, err)
				require.Equal(t, pdu.where == "send_join answer", authorised)
				require.Equal(t, r.names[x.To], e.authoriserID().Server())
				restricted++
			}
		}
	})
	require.Equal(t, 12, restricted)
}

// A state that was fetched after a join without members is proven whole, and a single wrong byte costs an event.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1stateroomid
func TestRecordings_FetchedStates(t *testing.T) {
	fetched := 0
	forEachRecording(t, func(t *testing.T, r *recording) {
		joins := make(map[EventID]*Event)
		for _, x := range r.exchanges {
			segments := x.segments(t)
			if segments[1] == "send_join" {
				join, err := ParseEvent(x.RoomVersion, []byte(x.Body))
				require.NoError(t, err)
				joins[join.ID()] = join
			}
			if segments[1] != "state" || x.Status != 200 {
				continue
			}
			fetched++
			u, err := url.Parse(x.URI)
			require.NoError(t, err)
			join := joins[EventID(u.Query().Get("event_id"))]
			require.NotNil(t, join)
			response := eventCanonical(t, []byte(x.Response))
			result := r.proveState(t, &x, join, x.Response)
			require.Empty(t, result.Dropped)
			require.Equal(t, recordedEvents(response.get("pdus")), texts(result.State))
			require.Equal(t, recordedEvents(response.get("auth_chain")), texts(result.Auth))
			damaged := strings.Replace(x.Response, `"history_visibility":"`, `"history_visibility":"x`, 1)
			require.NotEqual(t, x.Response, damaged)
			require.Len(t, r.proveState(t, &x, join, damaged).Dropped, 1)
		}
	})
	require.NotZero(t, fetched)
}

// proveState takes a recorded state as the server did that asked for it.
func (r *recording) proveState(t *testing.T, x *recordedExchange, join *Event, response string) *StateResult {
	f := &stateFetch{Client: r.client(t, join), req: &StateRequest{Event: join}}
	check := f.newCheck()
	_, err := check.read(t.Context(), &answerReader{in: strings.NewReader(response), max: 1 << 20, form: &stateForm}, false, func(int, int64) {})
	require.NoError(t, err, x.Step)
	require.NoError(t, check.settle(), x.Step)
	require.NoError(t, check.checkBefore(join), x.Step)
	return f.result(r.names[x.To], check)
}
