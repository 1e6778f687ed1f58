package benchmarks

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"example.org/mxfed"
	"example.org/mxfed/internal/synthroom"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

const (
	joiner = "joiner.example"
	user   = "@bob:" + joiner
	via    = "s0.example"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// ourKeys and theirKeys know every synthetic server; a look-up costs both libraries a map access.
type ourKeys map[mxfed.ServerName]ed25519.PublicKey

func (k ourKeys) Keys(_ context.Context, keys []mxfed.Key) error {
	for i := range keys {
		keys[i].Public, keys[i].ValidUntil = k[keys[i].Server], time.Now().Add(time.Hour)
	}
	return nil
}

type theirKeys struct{ ourKeys }

func (k theirKeys) FetcherName() string { return "synthetic" }

func (k theirKeys) FetchKeys(_ context.Context, requests map[gomatrixserverlib.PublicKeyLookupRequest]spec.Timestamp) (map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult, error) {
	results := make(map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult, len(requests))
	until := spec.AsTimestamp(time.Now().Add(time.Hour))
	for r := range requests {
		key := spec.Base64Bytes(k.ourKeys[mxfed.ServerName(r.ServerName)])
		results[r] = gomatrixserverlib.PublicKeyLookupResult{VerifyKey: gomatrixserverlib.VerifyKey{Key: key}, ValidUntilTS: until}
	}
	return results, nil
}

func (k theirKeys) StoreKeys(context.Context, map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult) error {
	return nil
}

func keysOf(servers ...string) ourKeys {
	k := ourKeys{}
	for _, s := range append(servers, joiner, via) {
		k[mxfed.ServerName(s)] = synthroom.Key(s).Public().(ed25519.PublicKey)
	}
	return k
}

func (k ourKeys) theirs() gomatrixserverlib.JSONVerifier {
	return &gomatrixserverlib.KeyRing{KeyDatabase: theirKeys{k}}
}

func signer(name string) *mxfed.Signer {
	return must(mxfed.NewSigner(mxfed.ServerName(name), synthroom.KeyID, synthroom.Key(name)))
}

// answers gives the recorded answers of a resident server.
type answers struct{ template, answer []byte }

func (a answers) RoundTrip(q *http.Request) (*http.Response, error) {
	body := a.template
	if strings.Contains(q.URL.Path, "/send_join/") {
		body = a.answer
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)), Request: q}, nil
}

func sameUser(_ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
	return spec.NewUserID(string(sender), true)
}

// theirAnswer is a send_join answer as gomatrixserverlib takes it.
type theirAnswer struct {
	Auth  gomatrixserverlib.EventJSONs `json:"auth_chain"`
	State gomatrixserverlib.EventJSONs `json:"state"`
}

func (a *theirAnswer) GetAuthEvents() gomatrixserverlib.EventJSONs  { return a.Auth }
func (a *theirAnswer) GetStateEvents() gomatrixserverlib.EventJSONs { return a.State }

// BenchmarkJoin takes in an answer to send_join: parse, hashes, signatures, authorisation of every event and of our join.
// "gmsl-join" is gomatrixserverlib's check of a whole answer, "gmsl" the same made of its building blocks.
func BenchmarkJoin(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		for _, kind := range []string{"zipf", "spread"} {
			servers := max(n/40, 10)
			if kind == "spread" {
				servers = n
			}
			room := synthroom.New(n, servers, kind == "spread")
			keys := keysOf(room.Servers...)
			answer := bytes.Replace(room.Answer([]byte("{}")), []byte(`"event":{},`), nil, 1)
			name := fmt.Sprintf("room=%s/events=%d", kind, n)
			b.Run(name+"/lib=mxfed", func(b *testing.B) { joinMxfed(b, room, keys, answer) })
			b.Run(name+"/lib=gmsl", func(b *testing.B) { joinBlocks(b, keys, answer) })
			b.Run(name+"/lib=gmsl-join", func(b *testing.B) { joinWhole(b, room, keys, answer) })
		}
	}
}

func joinMxfed(b *testing.B, room *synthroom.Room, keys ourKeys, answer []byte) {
	s := must(mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer(joiner)}, Keys: keys, HTTP: answers{room.Template(user), answer}}))
	req := &mxfed.JoinRequest{Room: mxfed.RoomID(room.ID), User: user, Via: []mxfed.ServerName{via}, Sink: func(*mxfed.Event, bool) error { return nil }}
	b.ReportAllocs()
	for b.Loop() {
		if result := must(s.Client().Join(context.Background(), req)); len(result.Dropped) > 0 {
			b.Fatal("events were dropped")
		}
	}
}

func joinBlocks(b *testing.B, keys ourKeys, answer []byte) {
	verifier := keys.theirs()
	version := gomatrixserverlib.MustGetRoomVersion(synthroom.Version)
	b.ReportAllocs()
	for b.Loop() {
		var a theirAnswer
		if err := json.Unmarshal(answer, &a); err != nil {
			b.Fatal(err)
		}
		known := make(map[string]gomatrixserverlib.PDU)
		var events []gomatrixserverlib.PDU
		for _, raw := range append(a.Auth, a.State...) {
			e := must(version.NewEventFromUntrustedJSON(raw))
			if known[e.EventID()] == nil {
				known[e.EventID()] = e
				events = append(events, e)
			}
		}
		for _, err := range gomatrixserverlib.VerifyAllEventSignatures(context.Background(), events, verifier, sameUser) {
			if err != nil {
				b.Fatal(err)
			}
		}
		for _, e := range events {
			var auth []gomatrixserverlib.PDU
			for _, id := range e.AuthEventIDs() {
				auth = append(auth, known[id])
			}
			if err := gomatrixserverlib.Allowed(e, must(gomatrixserverlib.NewAuthEvents(auth)), sameUser); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func joinWhole(b *testing.B, room *synthroom.Room, keys ourKeys, answer []byte) {
	verifier := keys.theirs()
	join := theirJoin(room)
	b.ReportAllocs()
	for b.Loop() {
		var a theirAnswer
		if err := json.Unmarshal(answer, &a); err != nil {
			b.Fatal(err)
		}
		if _, err := gomatrixserverlib.CheckSendJoinResponse(context.Background(), synthroom.Version, &a, verifier, join, nil, sameUser); err != nil {
			b.Fatal(err)
		}
	}
}

// theirJoin is our user's join, made by gomatrixserverlib.
func theirJoin(room *synthroom.Room) gomatrixserverlib.PDU {
	version := gomatrixserverlib.MustGetRoomVersion(synthroom.Version)
	key := user
	proto := &gomatrixserverlib.ProtoEvent{SenderID: user, RoomID: room.ID, Type: "m.room.member", StateKey: &key, Depth: int64(room.Depth + 1),
		PrevEvents: []string{room.Latest}, AuthEvents: room.AuthIDs, Content: spec.RawJSON(`{"membership":"join"}`)}
	return must(version.NewEventBuilderFromProtoEvent(proto).Build(time.Now(), joiner, synthroom.KeyID, synthroom.Key(joiner)))
}

// BenchmarkSendJoin writes the answer to a join, from PDUs as they are stored.
func BenchmarkSendJoin(b *testing.B) {
	room := synthroom.New(10_000, 250, false)
	b.Run("lib=mxfed", func(b *testing.B) {
		handler, request := residentMxfed(room)
		b.ReportAllocs()
		for b.Loop() {
			handler.ServeHTTP(discard{http.Header{}}, request())
		}
	})
	b.Run("lib=gmsl", func(b *testing.B) {
		version := gomatrixserverlib.MustGetRoomVersion(synthroom.Version)
		join := theirJoin(room)
		b.ReportAllocs()
		for b.Loop() {
			answer := fclient.RespSendJoin{Origin: via, Event: spec.RawJSON(join.JSON())}
			for _, pdu := range room.State {
				answer.StateEvents = append(answer.StateEvents, must(version.NewEventFromTrustedJSON(pdu, false)).JSON())
			}
			for _, pdu := range room.Auth {
				answer.AuthEvents = append(answer.AuthEvents, must(version.NewEventFromTrustedJSON(pdu, false)).JSON())
			}
			if err := json.NewEncoder(io.Discard).Encode(answer); err != nil {
				b.Fatal(err)
			}
		}
	})
}

type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(status int) {
	if status != http.StatusOK {
		panic(status)
	}
}

// residentMxfed is a resident server and a join that is sent to it.
func residentMxfed(room *synthroom.Room) (http.Handler, func() *http.Request) {
	var state []*mxfed.Event
	for _, pdu := range room.State[:4] {
		state = append(state, must(mxfed.ParseEvent(synthroom.Version, pdu)))
	}
	rooms := mxfed.RoomSourceFunc(func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
		return &mxfed.Room{Version: synthroom.Version, Latest: state[3:], State: state, Before: state, Events: state}, nil
	})
	s := must(mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer(via)}, Keys: keysOf(), Rooms: rooms}))
	sequence := func(pdus [][]byte) func(func([]byte, error) bool) {
		return func(yield func([]byte, error) bool) {
			for _, pdu := range pdus {
				if !yield(pdu, nil) {
					return
				}
			}
		}
	}
	host := mxfed.JoinHostFunc(func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		return &mxfed.SendJoinResponse{State: sequence(room.State), Auth: sequence(room.Auth)}, nil
	})
	join := theirJoin(room)
	uri := "/_matrix/federation/v2/send_join/" + url.PathEscape(room.ID) + "/" + url.PathEscape(join.EventID())
	signed := httptest.NewRequest(http.MethodPut, uri, nil)
	if err := signer(joiner).SignRequest(signed, via, join.JSON()); err != nil {
		panic(err)
	}
	return mxfed.NewSendJoinHandler(s, host), func() *http.Request {
		r := httptest.NewRequest(http.MethodPut, uri, bytes.NewReader(join.JSON()))
		r.Header = signed.Header
		return r
	}
}

// BenchmarkInvite accepts one invite: X-Matrix, checks, signature, answer.
func BenchmarkInvite(b *testing.B) {
	room := synthroom.New(10, 2, false)
	version := gomatrixserverlib.MustGetRoomVersion(synthroom.Version)
	key := user
	proto := &gomatrixserverlib.ProtoEvent{SenderID: room.Creator, RoomID: room.ID, Type: "m.room.member", StateKey: &key, Depth: 11,
		PrevEvents: []string{room.Latest}, AuthEvents: room.AuthIDs, Content: spec.RawJSON(`{"membership":"invite"}`)}
	invite := must(version.NewEventBuilderFromProtoEvent(proto).Build(time.Now(), via, synthroom.KeyID, synthroom.Key(via)))
	body := fmt.Appendf(nil, `{"event":%s,"invite_room_state":[],"room_version":"10"}`, invite.JSON())
	uri := "/_matrix/federation/v2/invite/" + url.PathEscape(room.ID) + "/" + url.PathEscape(invite.EventID())
	signed := httptest.NewRequest(http.MethodPut, uri, nil)
	if err := signer(via).SignRequest(signed, joiner, body); err != nil {
		panic(err)
	}
	request := func() *http.Request {
		r := httptest.NewRequest(http.MethodPut, uri, bytes.NewReader(body))
		r.Header = signed.Header
		r.Header.Set("Content-Type", "application/json")
		return r
	}
	keys := keysOf()
	b.Run("lib=mxfed", func(b *testing.B) {
		s := must(mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer(joiner)}, Keys: keys}))
		handler := mxfed.NewInviteHandler(s, mxfed.InviteHostFunc(func(context.Context, *mxfed.Invite) error { return nil }))
		b.ReportAllocs()
		for b.Loop() {
			handler.ServeHTTP(discard{http.Header{}}, request())
		}
	})
	b.Run("lib=gmsl", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			acceptInvite(b, request(), keys.theirs())
		}
	})
}

// acceptInvite does by gomatrixserverlib what the handler of mxfed does.
func acceptInvite(b *testing.B, r *http.Request, verifier gomatrixserverlib.JSONVerifier) {
	own := func(name spec.ServerName) bool { return name == joiner }
	request, failure := fclient.VerifyHTTPRequest(r, time.Now(), joiner, own, verifier)
	if request == nil {
		b.Fatal(failure)
	}
	var body struct {
		Version gomatrixserverlib.RoomVersion `json:"room_version"`
		Event   json.RawMessage               `json:"event"`
	}
	if err := json.Unmarshal(request.Content(), &body); err != nil {
		b.Fatal(err)
	}
	version := must(gomatrixserverlib.GetRoomVersion(body.Version))
	event := must(version.NewEventFromUntrustedJSON(body.Event))
	results := must(verifier.VerifyJSONs(context.Background(), []gomatrixserverlib.VerifyJSONRequest{{ServerName: via, AtTS: event.OriginServerTS(),
		Message: must(version.RedactEventJSON(event.JSON())), ValidityCheckingFunc: gomatrixserverlib.StrictValiditySignatureCheck}}))
	if results[0].Error != nil {
		b.Fatal(results[0].Error)
	}
	signed := event.Sign(joiner, synthroom.KeyID, synthroom.Key(joiner))
	if err := json.NewEncoder(io.Discard).Encode(map[string]spec.RawJSON{"event": signed.JSON()}); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkCanonicalJSON puts one event into canonical form.
func BenchmarkCanonicalJSON(b *testing.B) {
	pdu := synthroom.New(20, 3, false).State[10]
	b.Run("lib=mxfed", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			must(mxfed.CanonicalJSON(pdu))
		}
	})
	b.Run("lib=gmsl", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			must(gomatrixserverlib.CanonicalJSON(pdu))
		}
	})
}

// BenchmarkBuild hashes and signs one event; mxfed also authorises it.
func BenchmarkBuild(b *testing.B) {
	room := synthroom.New(10, 2, false)
	key := user
	b.Run("lib=mxfed", func(b *testing.B) {
		var state []*mxfed.Event
		for _, pdu := range room.State[:4] {
			state = append(state, must(mxfed.ParseEvent(synthroom.Version, pdu)))
		}
		rooms := mxfed.RoomSourceFunc(func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
			return &mxfed.Room{Version: synthroom.Version, Latest: state[3:], State: state}, nil
		})
		s := must(mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer(via)}, Keys: keysOf(), Rooms: rooms}))
		draft := &mxfed.Draft{Room: mxfed.RoomID(room.ID), Type: "m.room.member", StateKey: &key, Sender: mxfed.UserID(room.Creator), Content: json.RawMessage(`{"membership":"invite"}`)}
		b.ReportAllocs()
		for b.Loop() {
			must(s.Build(context.Background(), draft))
		}
	})
	b.Run("lib=gmsl", func(b *testing.B) {
		version := gomatrixserverlib.MustGetRoomVersion(synthroom.Version)
		b.ReportAllocs()
		for b.Loop() {
			proto := &gomatrixserverlib.ProtoEvent{SenderID: room.Creator, RoomID: room.ID, Type: "m.room.member", StateKey: &key, Depth: 11,
				PrevEvents: []string{room.Latest}, AuthEvents: room.AuthIDs, Content: spec.RawJSON(`{"membership":"invite"}`)}
			must(version.NewEventBuilderFromProtoEvent(proto).Build(time.Now(), via, synthroom.KeyID, synthroom.Key(via)))
		}
	})
}
