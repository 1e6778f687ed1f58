package mxfed

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestEvent_SignatureMatrix(t *testing.T) {
	alice, other := eventSeededSigner(t, "domain"), eventSeededSigner(t, "other.example")
	second := eventSigner(t, "domain", "ed25519:second", base64.RawStdEncoding.EncodeToString(make([]byte, 32)))
	known := func(server ServerName, id KeyID) ed25519.PublicKey {
		if !strings.HasPrefix(string(id), ed25519Prefix) {
			id = alice.id // a host that answers for anything
		}
		return eventKeys(alice, second, other)(server, id)
	}
	const fine, missing, refuted = "", "no valid signature of domain", "bad signature of domain"
	for _, rules := range stableVersions {
		e := eventBuilt(t, rules, `{"membership":"invite","reason":"r"}`)
		var p eventParser
		message := slices.Clone(p.signedBytes(e))
		sign := func(s *Signer, message []byte) string {
			sig, err := s.sign(message)
			require.NoError(t, err)
			return sig
		}
		good := sign(alice, message)
		raw, _ := decodeBase64(good)
		own := func(entries ...string) string { return `{"domain":{` + strings.Join(entries, ",") + `}}` }
		one := func(id, sig string) string { return fmt.Sprintf("%q:%q", id, sig) }
		for name, c := range map[string]struct{ signatures, want string }{
			"right":                         {own(one("ed25519:1", good)), fine},
			"no signature":                  {`{}`, missing},
			"entry is a number":             {`{"domain":5}`, missing},
			"entry is a list":               {`{"domain":[` + `"` + good + `"]}`, missing},
			"entry is empty":                {own(), missing},
			"wrong server":                  {`{"other.example":{` + one("ed25519:1", sign(other, message)) + `}}`, missing},
			"other case of the server":      {`{"DOMAIN":{` + one("ed25519:1", good) + `}}`, missing},
			"right server, wrong key":       {own(one("ed25519:1", sign(other, message))), refuted},
			"right key over other bytes":    {own(one("ed25519:1", sign(alice, []byte("{}")))), refuted},
			"right key over the full event": {own(one("ed25519:1", sign(alice, signedBytes(e.text)))), refuted},
			"right key over redacted event with signatures": {own(one("ed25519:1",
				sign(alice, appendRedacted(nil, rules, e.typ, eventFields(e.text), true)))), refuted},
			"two keys":                             {own(one("ed25519:1", good), one("ed25519:second", sign(second, message))), fine},
			"extra bad signature of a known key":   {own(one("ed25519:1", good), one("ed25519:second", good)), refuted},
			"extra signature of an unknown key":    {own(one("ed25519:1", good), one("ed25519:unknown", "x")), fine},
			"extra odd entry of an unknown key":    {own(one("ed25519:1", good), `"ed25519:unknown":{"x":[]}`), fine},
			"only an unknown key":                  {own(one("ed25519:unknown", good)), missing},
			"unknown algorithm":                    {own(one("rsa:1", good)), missing},
			"no algorithm":                         {own(one("1", good), one("ed25519", good), one("", good)), missing},
			"other case of the algorithm":          {own(one("ED25519:1", good)), missing},
			"unknown algorithm beside a right one": {own(one("ed25519:1", good), `"rsa:1":null`), fine},
			"policy server beside a right one":     {own(one("ed25519:1", good), one("ed25519:policy_server", "AAAA")), fine},
			"only the policy server":               {own(one("ed25519:policy_server", good)), missing},
			"no string":                            {own(`"ed25519:1":5`), refuted},
			"null":                                 {own(`"ed25519:1":null`), refuted},
			"bad base64":                           {own(one("ed25519:1", "*"+good[1:])), refuted},
			"a byte less":                          {own(one("ed25519:1", base64.RawStdEncoding.EncodeToString(raw[:63]))), refuted},
			"a byte more":                          {own(one("ed25519:1", base64.RawStdEncoding.EncodeToString(append(raw, 0)))), refuted},
			"padded":                               {own(one("ed25519:1", good+"==")), fine},
			"other alphabet":                       {own(one("ed25519:1", base64.RawURLEncoding.EncodeToString(raw))), fine},
			"bad signature of the invited server": {`{"domain":{` + one("ed25519:1", good) + `},"invited.example":{"ed25519:1":"x"},
				"other.example":{` + one("ed25519:1", good) + `}}`, fine},
			"odd key IDs": {own(one("ed25519:1", good), `"":1`, `"\u0000":[]`, `"ed25519:":"x"`, `"ed25519:\u00e9":"x"`), fine},
		} {
			signed := eventEdited(t, e, "signatures", eventCanonical(t, []byte(c.signatures)))
			require.Equal(t, e.ID(), signed.ID())
			authorised, err := p.checkSignatures(signed, known)
			require.False(t, authorised)
			if c.want == fine {
				require.NoError(t, err, "%s in room version %s", name, rules.version)
				continue
			}
			require.EqualError(t, err, c.want, "%s in room version %s", name, rules.version)
			var typed *signatureError
			require.ErrorAs(t, err, &typed)
			require.Equal(t, c.want == refuted, typed.refuted)
		}
	}
}

// Entries by the thousand cost one look-up each and no verification.
func TestEvent_ManySignatures(t *testing.T) {
	for _, rules := range stableVersions {
		alice := eventSeededSigner(t, "domain")
		e := eventSigned(t, eventBuilt(t, rules, `{"membership":"invite"}`), alice)
		all := e.text.get("signatures")
		mine, strangers := eventFields(all.get("domain")), eventFields(all)
		for i := range 1500 {
			mine = append(mine, field{fmt.Sprintf("ed25519:k%d", i), `"x"`})
			strangers = append(strangers, field{fmt.Sprintf("s%d.example", i), `{"ed25519:1":"x"}`})
		}
		strangers = slices.DeleteFunc(strangers, func(f field) bool { return f.key == "domain" })
		many := eventEdited(t, e, "signatures", object(append(strangers[:1000], field{"domain", object(mine...)})...))
		lookups := 0
		_, err := new(eventParser).checkSignatures(many, func(server ServerName, id KeyID) ed25519.PublicKey {
			lookups++
			return eventKeys(alice)(server, id)
		})
		require.NoError(t, err)
		require.Equal(t, 1501, lookups)
		require.Len(t, many.wantedKeys(nil), 1501)
	}
}

// https://spec.matrix.org/v1.19/rooms/v1/ and v2: the server that made the event ID signs as well.
func TestEvent_SignatureOfEventID(t *testing.T) {
	alice, maker := eventSeededSigner(t, "domain"), eventSeededSigner(t, "other.example")
	for _, rules := range stableVersions {
		foreign := eventBuilt(t, rules, `{"membership":"invite"}`)
		if foreign = eventEdited(t, foreign, "event_id", `"$x:other.example"`); rules.eventID == idGiven {
			require.Equal(t, EventID("$x:other.example"), foreign.ID())
		}
		for want, signers := range map[string][]*Signer{
			"":                                    {alice, maker},
			"no valid signature of domain":        {maker},
			"no valid signature of other.example": {alice},
		} {
			if rules.eventID != idGiven && len(signers) == 1 && signers[0] == alice {
				want = ""
			}
			_, err := new(eventParser).checkSignatures(eventSigned(t, foreign, signers...), eventKeys(alice, maker))
			if want == "" {
				require.NoError(t, err, rules.version)
			} else {
				require.EqualError(t, err, want, rules.version)
			}
		}
	}
}

// A restricted join names the user whose server vouches for it. https://spec.matrix.org/v1.19/rooms/v8/#authorization-rules
func TestEvent_Authorised(t *testing.T) {
	alice, bob := eventSeededSigner(t, "domain"), eventSeededSigner(t, "invited.example")
	both := eventKeys(alice, bob)
	for _, rules := range stableVersions {
		check := func(content value, signers ...*Signer) bool {
			authorised, err := new(eventParser).checkSignatures(eventSigned(t, eventBuilt(t, rules, content), signers...), both)
			require.NoError(t, err)
			return authorised
		}
		via := func(text value) value {
			return object(field{"membership", `"join"`}, field{"join_authorised_via_users_server", text})
		}
		require.Equal(t, rules.restricted, check(via(`"@bob:invited.example"`), alice, bob), rules.version)
		require.Equal(t, rules.restricted, check(via(`"@carol:domain"`), alice), "the sender's own server")
		require.False(t, check(via(`"@bob:invited.example"`), alice))
		for _, text := range []value{"", "null", "5", `""`, `"bob"`, `"@bob"`, `"@bob:"`, `["@bob:invited.example"]`, `{}`} {
			require.False(t, check(via(text), alice, bob), text)
		}
		bad := eventSigned(t, eventBuilt(t, rules, via(`"@bob:invited.example"`)), alice)
		bad, err := bad.withSignature(bob.name, bob.id, base64.RawStdEncoding.EncodeToString(make([]byte, 64)))
		require.NoError(t, err)
		authorised, err := new(eventParser).checkSignatures(bad, both)
		require.NoError(t, err, "a missing authorisation is for the authorisation rules to judge")
		require.False(t, authorised)

		// room version 8 does not protect the member from redaction, so no signature covers it
		moved := eventEdited(t, eventSigned(t, eventBuilt(t, rules, via(`"@bob:invited.example"`)), alice, bob), "content", via(`"@eve:invited.example"`))
		_, err = new(eventParser).checkSignatures(moved, both)
		covered := slices.Contains(rules.redaction.content[typeMember], "join_authorised_via_users_server")
		require.Equal(t, covered, err != nil, rules.version)
	}
}

func TestEvent_WantedKeys(t *testing.T) {
	signatures := value(`{"domain":{"ed25519:1":"x","rsa:1":"x"},"invited.example":{"ed25519:a":"x","ed25519:b":5},"third.example":{"ed25519:1":"x"}}`)
	for _, rules := range stableVersions {
		e := eventBuilt(t, rules, `{"join_authorised_via_users_server":"@bob:invited.example","membership":"join"}`)
		wanted := []Key{{Server: "domain", ID: "ed25519:1"}}
		if rules.restricted {
			wanted = append(wanted, Key{Server: "invited.example", ID: "ed25519:a"}, Key{Server: "invited.example", ID: "ed25519:b"})
		}
		if rules.keyValidity {
			for i := range wanted {
				wanted[i].At = millis(1_700_000_000_000)
			}
		}
		require.Equal(t, wanted, eventEdited(t, e, "signatures", signatures).wantedKeys(nil), rules.version)
	}
}

// A third-party invite may be sent without the sender's server, but nothing else that looks like one.
// https://spec.matrix.org/v1.19/server-server-api/#validating-hashes-and-signatures-on-received-events
func TestThirdParty_ExemptionIsNarrow(t *testing.T) {
	alice, bob := eventSeededSigner(t, "domain"), eventSeededSigner(t, "invited.example")
	keys := eventKeys(alice, bob)
	invite := func(thirdParty value) value {
		return object(field{"membership", `"invite"`}, field{"third_party_invite", thirdParty})
	}
	signed := value(`{"display_name":"b","signed":{"mxid":"@bob:invited.example","signatures":{},"token":"t"}}`)
	for _, rules := range stableVersions {
		check := func(e *Event) error {
			_, err := new(eventParser).checkSignatures(e, keys)
			return err
		}
		exempt := eventBuilt(t, rules, invite(signed))
		require.NoError(t, check(exempt))
		require.NoError(t, check(eventSigned(t, exempt, bob)))
		require.NoError(t, check(eventSigned(t, exempt, alice)))
		forged, err := exempt.withSignature(alice.name, alice.id, "AAAA")
		require.NoError(t, err)
		require.ErrorContains(t, check(forged), "bad signature", "a signature that is there must be right")
		authorising := eventBuilt(t, rules, invite(signed).with("join_authorised_via_users_server", `"@carol:domain"`))
		authorised, err := new(eventParser).checkSignatures(authorising, keys)
		require.NoError(t, err)
		require.False(t, authorised, "the exemption authorises nothing")

		for name, content := range map[string]value{
			"no third_party_invite": `{"membership":"invite"}`, "null": invite("null"), "list": invite("[{}]"), "string": invite(`"x"`), "true": invite("true"),
			"other case": `{"Third_Party_Invite":{},"membership":"invite"}`, "membership join": invite(signed).with("membership", `"join"`),
			"membership leave": invite(signed).with("membership", `"leave"`), "membership ban": invite(signed).with("membership", `"ban"`),
			"membership knock": invite(signed).with("membership", `"knock"`), "membership list": invite(signed).with("membership", `["invite"]`),
			"no membership": object(field{"third_party_invite", signed}),
		} {
			require.Error(t, check(eventBuilt(t, rules, content)), "%s in room version %s", name, rules.version)
		}
		other := eventDraft(rules, invite(signed))
		other.typ = "m.room.members"
		e, err := other.build(rules)
		require.NoError(t, err)
		require.Error(t, check(e), "another type")

		// a wrong hash ends the exemption; what redaction leaves is judged anew
		changed := eventEdited(t, exempt, "content", invite(signed).with("reason", `"changed"`))
		require.False(t, changed.hashOK)
		require.Error(t, check(changed), rules.version)
		cut, err := changed.redact()
		require.NoError(t, err)
		require.Equal(t, rules.redaction.signed, check(cut) == nil, rules.version)

		if rules.eventID == idGiven {
			text := exempt.text.with("event_id", `"$x:other.example"`)
			sum := sha256.Sum256([]byte(text.with("hashes", "").with("signatures", "")))
			e, err = ParseEvent(rules.version, []byte(text.with("hashes", object(field{"sha256", quoted(base64.RawStdEncoding.EncodeToString(sum[:]))}))))
			require.NoError(t, err)
			require.True(t, e.hashOK)
			require.EqualError(t, check(e), "no valid signature of other.example", "the server that made the ID has no exemption")
		}
	}
}
