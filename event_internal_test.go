package mxfed

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// eventVectorFile reads a file of testdata/vectors into v.
func eventVectorFile(t testing.TB, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, v))
}

// eventCanonical reads text as a canonical value, its numbers as they are.
func eventCanonical(t testing.TB, text []byte) value {
	t.Helper()
	var r jsonReader
	canonical, err := r.canonical(text, numbersAsReceived)
	require.NoError(t, err)
	return value(canonical)
}

func eventFields(v value) (fields []field) {
	for k, m := range v.members() {
		fields = append(fields, field{k, m})
	}
	return fields
}

func eventSigner(t testing.TB, name ServerName, id KeyID, seed string) *Signer {
	t.Helper()
	raw, err := decodeBase64(seed)
	require.NoError(t, err)
	s, err := NewSigner(name, id, ed25519.NewKeyFromSeed(raw))
	require.NoError(t, err)
	return s
}

// eventSeededSigner is a Signer with key ed25519:1 that only depends on name.
func eventSeededSigner(t testing.TB, name ServerName) *Signer {
	t.Helper()
	seed := sha256.Sum256([]byte(name))
	return eventSigner(t, name, "ed25519:1", base64.RawStdEncoding.EncodeToString(seed[:]))
}

// eventKeys is the keyFunc that knows the keys of signers.
func eventKeys(signers ...*Signer) keyFunc {
	return func(server ServerName, id KeyID) ed25519.PublicKey {
		for _, s := range signers {
			if s.name == server && s.id == id {
				return s.key.Public().(ed25519.PublicKey)
			}
		}
		return nil
	}
}

// The published vectors are no PDUs of any room version; they hold for the redaction rules of versions 1 to 10.
// https://spec.matrix.org/v1.19/appendices/#event-signing
func TestEvent_PublishedSignatures(t *testing.T) {
	var published struct {
		Seed    string     `json:"seed_base64"`
		Server  ServerName `json:"server_name"`
		KeyID   KeyID      `json:"key_id"`
		Vectors []struct {
			Name            string
			Input, Expected json.RawMessage
		}
	}
	eventVectorFile(t, "event_signing.json", &published)
	signer := eventSigner(t, published.Server, published.KeyID, published.Seed)
	for _, vector := range published.Vectors {
		expected := eventCanonical(t, vector.Expected)
		typ, _ := expected.get("type").str()
		for _, rules := range stableVersions {
			var p eventParser
			p.covered(stableVersions[0], eventCanonical(t, vector.Input))
			sum := sha256.Sum256(appendHashed(nil, p.fields))
			hashed := object(append(p.fields, field{"unsigned", expected.get("unsigned")})...).
				with("hashes", object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(sum[:]))}))
			require.Equal(t, expected.get("hashes"), hashed.get("hashes"), vector.Name)

			sig, err := signer.sign(appendRedacted(nil, rules, typ, eventFields(hashed), false))
			require.NoError(t, err)
			signed := withSignature(hashed, signer.name, signer.id, sig)
			if slices.Contains(rules.redaction.topLevel, "origin") {
				require.Equal(t, expected, signed, "%s in room version %s", vector.Name, rules.version)
			} else {
				require.NotEqual(t, expected, signed, "%s in room version %s", vector.Name, rules.version)
			}
		}
	}
}

// eventSigningVector is an event with all that follows from it in its room version.
type eventSigningVector struct {
	Name          string
	RoomVersion   RoomVersion `json:"room_version"`
	Signers       []string
	Unsigned      json.RawMessage `json:"unsigned_event"`
	ContentHash   string          `json:"content_hash"`
	ReferenceHash string          `json:"reference_hash_base64"`
	EventID       EventID         `json:"event_id"`
	RoomID        RoomID          `json:"room_id"`
	Redacted      json.RawMessage `json:"redacted_with_hashes"`
	Signatures    json.RawMessage
}

// eventSigningVectors returns the vectors for all room versions: those of version 1 hold in 2, of 4 in 5, of 6 in 7 and of 9
// in 10.
func eventSigningVectors(t testing.TB) (vectors []eventSigningVector, signers map[string]*Signer) {
	t.Helper()
	var derived struct {
		Keys map[string]struct {
			Server ServerName `json:"server_name"`
			KeyID  KeyID      `json:"key_id"`
			Seed   string     `json:"seed_base64"`
			Public string     `json:"public_key_base64"`
		}
		Vectors []eventSigningVector
	}
	eventVectorFile(t, "derived_event_signing.json", &derived)
	signers = make(map[string]*Signer)
	for name, k := range derived.Keys {
		signers[name] = eventSigner(t, k.Server, k.KeyID, k.Seed)
		require.Equal(t, k.Public, base64.RawStdEncoding.EncodeToString(signers[name].key.Public().(ed25519.PublicKey)))
	}
	same := map[RoomVersion]RoomVersion{"1": "2", "4": "5", "6": "7", "9": "10"}
	for _, vector := range derived.Vectors {
		vectors = append(vectors, vector)
		if next, ok := same[vector.RoomVersion]; ok {
			vector.RoomVersion = next
			vectors = append(vectors, vector)
		}
	}
	require.Len(t, vectors, 12*9)
	return vectors, signers
}

// pdu is the vector's event as it is sent, without signatures.
func (v *eventSigningVector) pdu(t testing.TB) value {
	return eventCanonical(t, v.Unsigned).with("hashes", object(field{"sha256", quoted(v.ContentHash)})).with("signatures", "{}")
}

// https://spec.matrix.org/v1.19/server-server-api/#signing-events
func TestEvent_DerivedSignatures(t *testing.T) {
	vectors, signers := eventSigningVectors(t)
	for _, vector := range vectors {
		t.Run(fmt.Sprintf("%s in %s", vector.Name, vector.RoomVersion), func(t *testing.T) {
			e, err := ParseEvent(vector.RoomVersion, []byte(vector.pdu(t)))
			require.NoError(t, err)
			require.Equal(t, vector.EventID, e.ID())
			require.Equal(t, vector.RoomID, e.RoomID())
			require.Equal(t, vector.ReferenceHash, base64.RawStdEncoding.EncodeToString(e.hash[:]))
			require.True(t, e.hashOK)
			if e.rules.eventID == idGiven {
				require.Equal(t, value(fmt.Sprintf(`[%q,{"sha256":%q}]`, vector.EventID, vector.ReferenceHash)), e.reference())
			} else {
				require.Equal(t, quoted(vector.EventID), e.reference())
			}
			var used []*Signer
			for _, name := range vector.Signers {
				e, err = approved{e}.sign(signers[name])
				require.NoError(t, err)
				used = append(used, signers[name])
			}
			require.JSONEq(t, string(vector.Signatures), string(e.text.get("signatures")))
			var p eventParser
			authorised, err := p.checkSignatures(e, eventKeys(used...))
			require.NoError(t, err)
			require.Equal(t, e.rules.restricted && vector.Name == "join_authorised", authorised)

			cut, err := e.redact()
			require.NoError(t, err)
			require.Equal(t, eventCanonical(t, vector.Redacted), cut.text.with("signatures", ""))
			require.Equal(t, e.text.get("signatures"), cut.text.get("signatures"))
			require.Equal(t, [...]any{e.id, e.room, e.hash, e.refs, e.membership}, [...]any{cut.id, cut.room, cut.hash, cut.refs, cut.membership})
			require.True(t, cut.redacted)
			again, err := cut.redact()
			require.NoError(t, err)
			require.Equal(t, cut, again)
			_, err = p.checkSignatures(cut, eventKeys(used...))
			require.NoError(t, err)
		})
	}
}

// https://spec.matrix.org/v1.19/client-server-api/#redactions and the redaction rules of each room version
func TestEvent_DerivedRedactions(t *testing.T) {
	var derived struct {
		Vectors []struct {
			Type     string
			Input    json.RawMessage
			Expected []struct {
				Versions []RoomVersion `json:"room_versions"`
				Redacted json.RawMessage
			}
		}
	}
	eventVectorFile(t, "derived_redaction.json", &derived)
	for _, vector := range derived.Vectors {
		seen := 0
		for _, expected := range vector.Expected {
			for _, v := range expected.Versions {
				redacted := appendRedacted(nil, v.rules(), vector.Type, eventFields(eventCanonical(t, vector.Input)), true)
				require.Equal(t, eventCanonical(t, expected.Redacted), value(redacted), "%s in room version %s", vector.Type, v)
				seen++
			}
		}
		require.Equal(t, 12, seen)
	}
}

// What a member of the wrong kind becomes when third_party_invite is cut down to signed.
func TestRedactContent_ThirdPartyInvite(t *testing.T) {
	for text, kept := range map[string]string{
		`{"signed":{"mxid":"@a:b","x":[1]},"display_name":"d"}`: `,"third_party_invite":{"signed":{"mxid":"@a:b","x":[1]}}`,
		`{"display_name":"d"}`: `,"third_party_invite":{}`,
		`{"signed":null}`:      `,"third_party_invite":{"signed":null}`,
		`null`:                 ``,
		`"signed"`:             ``,
		`[{"signed":{}}]`:      ``,
	} {
		content := value(`{"membership":"invite","third_party_invite":` + text + `}`)
		require.Equal(t, value(`{"membership":"invite"`+kept+`}`), value(appendRedactedContent(nil, RoomVersion("11").rules().redaction, typeMember, content)), text)
		require.Equal(t, value(`{"membership":"invite"}`), value(appendRedactedContent(nil, RoomVersion("10").rules().redaction, typeMember, content)), text)
	}
}

// eventDraft is an invite by @alice:domain that fits every room version; its content is content.
func eventDraft(rules *roomRules, content value) *draft {
	key := "@bob:invited.example"
	d := &draft{room: "!room:domain", typ: typeMember, stateKey: &key, sender: "@alice:domain", content: content, prev: "[]", auth: "[]",
		depth: 5, ts: 1_700_000_000_000}
	if rules.hashRoomID {
		d.room = "!Nhcu5BS-UMnFX7hBVfVSoXiD7OgH6iRT-xyIuqDnpYQ"
	}
	return d
}

func eventBuilt(t testing.TB, rules *roomRules, content value) *Event {
	t.Helper()
	e, err := eventDraft(rules, content).build(rules)
	require.NoError(t, err)
	return e
}

// eventEdited parses e again with one member replaced; hashes stay.
func eventEdited(t testing.TB, e *Event, key string, m value) *Event {
	t.Helper()
	edited, err := ParseEvent(e.Version(), []byte(e.text.with(key, m)))
	require.NoError(t, err)
	return edited
}

// eventSigned adds the signature of each signer.
func eventSigned(t testing.TB, e *Event, signers ...*Signer) *Event {
	t.Helper()
	for _, s := range signers {
		var err error
		e, err = approved{e}.sign(s)
		require.NoError(t, err)
	}
	return e
}

func TestEvent_ContentHash(t *testing.T) {
	for _, rules := range stableVersions {
		e := eventBuilt(t, rules, `{"membership":"invite","reason":"r"}`)
		require.True(t, e.hashOK)
		for _, free := range []string{"unsigned", "age_ts", "outlier", "destinations"} {
			require.True(t, eventEdited(t, e, free, "1").hashOK, free)
		}
		require.True(t, eventSigned(t, e, eventSeededSigner(t, "domain")).hashOK)
		require.False(t, eventEdited(t, e, "content", `{"membership":"invite","reason":"other"}`).hashOK)
		require.False(t, eventEdited(t, e, "org.example.unknown", "1").hashOK)
		require.False(t, eventEdited(t, e, "origin_server_ts", "1").hashOK)

		text, _ := e.text.get("hashes").get("sha256").str()
		sum, err := decodeBase64(text)
		require.NoError(t, err)
		for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.RawURLEncoding, base64.URLEncoding} {
			same := object(field{"sha256", quoted(encoding.EncodeToString(sum))}, field{"md5", "5"})
			require.True(t, eventEdited(t, e, "hashes", same).hashOK)
		}
		for _, bad := range []string{"", text[1:], text + "AAAA", strings.ToLower(text), "*" + text[1:]} {
			require.False(t, eventEdited(t, e, "hashes", object(field{"sha256", quoted(bad)})).hashOK, bad)
		}
	}
}

// The redacted copy is read again: nothing of the content that was cut off has an effect.
func TestEvent_RedactReadsAgain(t *testing.T) {
	content := value(`{"join_authorised_via_users_server":"@bob:invited.example","membership":"join","third_party_invite":{"signed":{}}}`)
	for _, rules := range stableVersions {
		e := eventEdited(t, eventBuilt(t, rules, content), "content", content.with("reason", `"changed"`))
		require.False(t, e.hashOK)
		cut, err := e.redact()
		require.NoError(t, err)
		require.Equal(t, "join", cut.membership)
		keeps := slices.Contains(rules.redaction.content[typeMember], "join_authorised_via_users_server")
		require.Equal(t, keeps, cut.authoriser != "", rules.version)
		require.Equal(t, rules.redaction.signed, cut.content.get("third_party_invite") != "")
		require.Empty(t, cut.content.get("reason"))
		require.Equal(t, e.ID(), cut.ID())
	}
}

func TestDraft_Build(t *testing.T) {
	for _, rules := range stableVersions {
		d := eventDraft(rules, `{"membership":"invite"}`)
		d.origin = originFor(rules, "domain")
		e, err := d.build(rules)
		require.NoError(t, err)
		require.True(t, e.hashOK)
		require.Equal(t, value("{}"), e.text.get("signatures"))
		require.Equal(t, slices.Contains(rules.redaction.topLevel, "origin"), e.text.get("origin") == `"domain"`)
		require.True(t, e.is(typeMember, "@bob:invited.example"))
		require.False(t, e.is(typeMember, ""))
		require.False(t, (*Event)(nil).is(typeMember, ""))
		again, err := d.build(rules)
		require.NoError(t, err)
		require.Equal(t, e.ID(), again.ID())
		d.ts++
		later, err := d.build(rules)
		require.NoError(t, err)
		require.NotEqual(t, e.ID(), later.ID())

		key := ""
		create := &draft{typ: typeCreate, stateKey: &key, sender: "@alice:domain", content: "{}", prev: "[]", auth: "[]", depth: 1}
		e, err = create.build(rules)
		require.Equal(t, rules.hashRoomID, err == nil)
		require.True(t, err != nil || e.RoomID() == RoomID("!"+e.ID()[1:]))
	}
}

// A signature must not make an event too large. https://spec.matrix.org/v1.19/client-server-api/#size-limits
func TestEvent_SignedSize(t *testing.T) {
	alice := eventSeededSigner(t, "domain")
	rules := RoomVersion("12").rules()
	empty := eventSigned(t, eventBuilt(t, rules, `{"membership":"invite","x":""}`), alice)
	fill := func(n int) value {
		return object(field{"membership", `"invite"`}, field{"x", quoted(strings.Repeat("x", n))})
	}
	largest := maxEventSize - len(empty.text)
	require.Len(t, eventSigned(t, eventBuilt(t, rules, fill(largest)), alice).text, maxEventSize)
	_, err := approved{eventBuilt(t, rules, fill(largest+1))}.sign(alice)
	require.ErrorIs(t, err, ErrTooLarge)
}

// Whatever the bytes: no panic, and an event that was accepted is accepted again as it is and stays the same.
func FuzzParseEvent(f *testing.F) {
	vectors, _ := eventSigningVectors(f)
	for i, vector := range vectors {
		f.Add(uint8(i), []byte(vector.pdu(f)))
	}
	for _, text := range []string{"", "{}", "[[[[", `{"type":null}`, `{"content":{"membership":{}},"type":"m.room.member","state_key":"\u0000"}`, `{"a":1e999999999}`} {
		f.Add(uint8(5), []byte(text))
	}
	f.Fuzz(func(t *testing.T, version uint8, pdu []byte) {
		rules := stableVersions[int(version)%len(stableVersions)]
		e, err := ParseEvent(rules.version, pdu)
		_, _ = json.Marshal(e) // a nil event too
		_ = fmt.Sprint(e.ID(), e.Version(), e.RoomID(), e.Type(), e.Sender().Server(), e.Prev(), e.Auth(), string(e.Content()), e.is("", ""))
		_, _ = e.StateKey()
		if err != nil {
			require.Nil(t, e)
			return
		}
		require.LessOrEqual(t, len(e.JSON()), maxEventSize)
		require.Equal(t, e.text, eventCanonical(t, e.JSON()))
		again, err := ParseEvent(rules.version, e.JSON())
		require.NoError(t, err)
		require.Equal(t, e, again)
		cut, err := e.redact()
		require.NoError(t, err)
		require.Equal(t, e.ID(), cut.ID())
		require.Equal(t, e.refs, cut.refs)
		_ = e.reference()
		_, _ = new(eventParser).checkSignatures(e, func(ServerName, KeyID) ed25519.PublicKey { return make([]byte, ed25519.PublicKeySize) })
		_ = e.wantedKeys(nil)
	})
}
