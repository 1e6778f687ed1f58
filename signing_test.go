package mxfed_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// wireSeed is the seed that the specification publishes with its signing examples.
const wireSeed = "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1"

// wireKey is the key of a seed in base64.
func wireKey(t testing.TB, seed string) ed25519.PrivateKey {
	t.Helper()
	b, err := base64.RawStdEncoding.DecodeString(seed)
	require.NoError(t, err)
	return ed25519.NewKeyFromSeed(b)
}

func wireSigner(t testing.TB, name mxfed.ServerName, id mxfed.KeyID) *mxfed.Signer {
	t.Helper()
	s, err := mxfed.NewSigner(name, id, wireKey(t, wireSeed))
	require.NoError(t, err)
	return s
}

// https://spec.matrix.org/v1.19/appendices/#json-signing
func TestSignJSON_PublishedExamples(t *testing.T) {
	var file struct {
		Seed    string           `json:"seed_base64"`
		Name    mxfed.ServerName `json:"server_name"`
		ID      mxfed.KeyID      `json:"key_id"`
		Vectors []struct {
			Name            string
			Input, Expected json.RawMessage
		}
	}
	loadWireVectors(t, "json_signing.json", &file)
	require.Len(t, file.Vectors, 2)
	key := wireKey(t, file.Seed)
	signer, err := mxfed.NewSigner(file.Name, file.ID, key)
	require.NoError(t, err)
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			got, err := signer.SignJSON(v.Input)
			require.NoError(t, err)
			want, err := mxfed.CanonicalJSON(v.Expected)
			require.NoError(t, err)
			require.Equal(t, string(want), string(got))
			require.NoError(t, mxfed.VerifyJSON(v.Expected, file.Name, file.ID, key.Public().(ed25519.PublicKey)))
		})
	}
}

// The illustration in the text is not a real signature. https://spec.matrix.org/v1.19/appendices/#signing-details
func TestVerifyJSON_PublishedIllustration(t *testing.T) {
	var file struct{ Object json.RawMessage }
	loadWireVectors(t, "signed_json_example.json", &file)
	var object struct {
		Keys map[mxfed.KeyID]string `json:"signing_keys"`
	}
	require.NoError(t, json.Unmarshal(file.Object, &object))
	listed, err := base64.RawStdEncoding.DecodeString(object.Keys["ed25519:1"])
	require.NoError(t, err)
	for name, key := range map[string]ed25519.PublicKey{"listed key": listed, "published seed": wireKey(t, wireSeed).Public().(ed25519.PublicKey)} {
		require.ErrorContains(t, mxfed.VerifyJSON(file.Object, "example.org", "ed25519:1", key), "bad signature", name)
	}
}

func TestSignJSON_KeepsEverythingElse(t *testing.T) {
	const object = `{"z":1,"unsigned":{"age":[1,2]},"a":{"signatures":{"x":1},"unsigned":2},
		"signatures":{"other":{"ed25519:o":"sig","other:1":7},"domain":{"ed25519:old":"mine"}}}`
	signer := wireSigner(t, "domain", "ed25519:1")
	first, err := signer.SignJSON([]byte(object))
	require.NoError(t, err)

	var got struct {
		Signatures map[string]map[string]any
		Unsigned   json.RawMessage
	}
	require.NoError(t, json.Unmarshal(first, &got))
	require.Equal(t, `{"age":[1,2]}`, string(got.Unsigned))
	sig := got.Signatures["domain"]["ed25519:1"]
	require.Equal(t, map[string]map[string]any{
		"other":  {"ed25519:o": "sig", "other:1": 7.0},
		"domain": {"ed25519:old": "mine", "ed25519:1": sig},
	}, got.Signatures)

	again, err := signer.SignJSON(first)
	require.NoError(t, err)
	require.Equal(t, string(first), string(again), "signing twice changes nothing")

	plain, err := signer.SignJSON([]byte(`{"a":{"signatures":{"x":1},"unsigned":2},"z":1}`))
	require.NoError(t, err)
	require.Contains(t, string(plain), fmt.Sprintf(`"signatures":{"domain":{"ed25519:1":%q}}`, sig), "only members of the object itself are left out")

	_, err = signer.SignJSON([]byte(`{"signatures":[]}`))
	require.NoError(t, err, "what is no object holds no signatures to keep")
}

func TestSignJSON_WritesCanonicalNumbers(t *testing.T) {
	signer := wireSigner(t, "domain", "ed25519:1")
	signed, err := signer.SignJSON([]byte(`{"b":1e3,"a":-0}`))
	require.NoError(t, err)
	require.Contains(t, string(signed), `{"a":0,"b":1000,`)
	require.NoError(t, mxfed.VerifyJSON(signed, "domain", "ed25519:1", wireKey(t, wireSeed).Public().(ed25519.PublicKey)))
}

func TestSignJSON_Refuses(t *testing.T) {
	signer := wireSigner(t, "domain", "ed25519:1")
	for name, in := range map[string]string{
		"nothing": "", "no JSON": "{", "array": "[]", "string": `"{}"`, "null": "null", "fraction": `{"a":0.5}`,
		"large integer": `{"a":9007199254740992}`, "duplicate key": `{"a":1,"a":2}`, "lone surrogate": `{"a":"\ud800"}`,
	} {
		_, err := signer.SignJSON([]byte(in))
		require.ErrorContains(t, err, "mxfed: sign: ", name)
	}
}

func TestVerifyJSON(t *testing.T) {
	const name, id = "domain", "ed25519:1"
	key := wireKey(t, wireSeed)
	public := key.Public().(ed25519.PublicKey)
	raw := ed25519.Sign(key, []byte(`{"a":1.50,"b":"é"}`))
	sig := base64.RawStdEncoding.EncodeToString(raw)
	require.True(t, strings.ContainsAny(sig, "+/"), "else the URL-safe case below says nothing")
	object := func(sig string) string { // sig as JSON
		return `{"b":"\u00e9", "a":1.50, "unsigned":{"age":3}, "signatures":{"domain":{"ed25519:1":` + sig + `}}}`
	}
	good := object(`"` + sig + `"`)
	for label, c := range map[string]struct {
		object string
		name   mxfed.ServerName
		id     mxfed.KeyID
		key    ed25519.PublicKey
		ok     bool
	}{
		"good":                     {good, name, id, public, true},
		"padded":                   {object(`"` + sig + `=="`), name, id, public, true},
		"URL-safe":                 {object(`"` + base64.RawURLEncoding.EncodeToString(raw) + `"`), name, id, public, true},
		"other unsigned":           {strings.Replace(good, `{"age":3}`, `[]`, 1), name, id, public, true},
		"no unsigned":              {strings.Replace(good, `"unsigned":{"age":3},`, ``, 1), name, id, public, true},
		"another server's bad one": {strings.Replace(good, `{"domain"`, `{"other":{"ed25519:1":"AA"},"domain"`, 1), name, id, public, true},
		"second bad key of ours":   {strings.Replace(good, `{"ed25519:1"`, `{"ed25519:2":7,"ed25519:1"`, 1), name, id, public, true},
		"changed member":           {strings.Replace(good, `\u00e9`, `e`, 1), name, id, public, false},
		"changed spelling of it":   {strings.Replace(good, `1.50`, `1.5`, 1), name, id, public, false},
		"added member":             {strings.Replace(good, `{"b"`, `{"c":0,"b"`, 1), name, id, public, false},
		"other server":             {good, "other", id, public, false},
		"other case of the name":   {good, "Domain", id, public, false},
		"other key ID":             {good, name, "ed25519:2", public, false},
		"other case of the ID":     {good, name, "Ed25519:1", public, false},
		"other key":                {good, name, id, wireKey(t, strings.Repeat("A", 43)).Public().(ed25519.PublicKey), false},
		"no key":                   {good, name, id, nil, false},
		"short key":                {good, name, id, public[:3], false},
		"key with a byte too much": {good, name, id, append(public[:32:32], 0), false},
		"key of small order":       {good, name, id, make(ed25519.PublicKey, 32), false},
		"empty signature":          {object(`""`), name, id, public, false},
		"cut signature":            {object(`"` + sig[:84] + `"`), name, id, public, false},
		"long signature":           {object(`"` + sig + `AA"`), name, id, public, false},
		"no base64":                {object(`"` + sig[:85] + `!"`), name, id, public, false},
		"newline in base64":        {object(`"` + sig[:40] + `\n` + sig[40:] + `"`), name, id, public, false},
		"number":                   {object(`7`), name, id, public, false},
		"list":                     {object(`["` + sig + `"]`), name, id, public, false},
		"null":                     {object(`null`), name, id, public, false},
		"no signatures":            {`{"a":1.50,"b":"é"}`, name, id, public, false},
		"signatures is a string":   {`{"a":1.50,"b":"é","signatures":"` + sig + `"}`, name, id, public, false},
		"signatures in unsigned":   {`{"a":1.50,"b":"é","unsigned":` + good + `}`, name, id, public, false},
		"array":                    {`[` + good + `]`, name, id, public, false},
		"no JSON":                  {good + `}`, name, id, public, false},
		"duplicate key":            {strings.Replace(good, `{"b"`, `{"a":1.50,"b"`, 1), name, id, public, false},
	} {
		t.Run(label, func(t *testing.T) {
			err := mxfed.VerifyJSON([]byte(c.object), c.name, c.id, c.key)
			require.Equal(t, c.ok, err == nil, "%v", err)
			if err != nil {
				require.ErrorContains(t, err, "mxfed: verify: ")
			}
		})
	}
}

// An algorithm that is not ed25519 is never taken for it, whatever its signature is.
func TestVerifyJSON_OtherAlgorithm(t *testing.T) {
	key := wireKey(t, wireSeed)
	sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(key, []byte(`{}`)))
	for _, id := range []mxfed.KeyID{"rsa:1", "ed25519", "ed255190:1", ""} {
		object := fmt.Sprintf(`{"signatures":{"domain":{%q:%q}}}`, id, sig)
		require.Error(t, mxfed.VerifyJSON([]byte(object), "domain", id, key.Public().(ed25519.PublicKey)), id)
	}
}

// remoteKey is a key that is kept elsewhere and only signs.
type remoteKey struct {
	public crypto.PublicKey
	sign   func(message []byte, opts crypto.SignerOpts) ([]byte, error)
}

func (k *remoteKey) Public() crypto.PublicKey { return k.public }

func (k *remoteKey) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.sign(message, opts)
}

func TestNewSigner_TakesAnyKeyThatSigns(t *testing.T) {
	key := wireKey(t, wireSeed)
	down := errors.New("key service is down")
	remote := &remoteKey{public: key.Public(), sign: func(message []byte, opts crypto.SignerOpts) ([]byte, error) {
		return key.Sign(nil, message, opts)
	}}
	signer, err := mxfed.NewSigner("domain", "ed25519:1", remote)
	require.NoError(t, err)
	require.Equal(t, mxfed.ServerName("domain"), signer.Name())
	got, err := signer.SignJSON([]byte(`{}`))
	require.NoError(t, err)
	want, err := wireSigner(t, "domain", "ed25519:1").SignJSON([]byte(`{}`))
	require.NoError(t, err)
	require.Equal(t, string(want), string(got))

	r, err := http.NewRequest(http.MethodGet, "https://other/_matrix/x", nil)
	require.NoError(t, err)
	remote.sign = func([]byte, crypto.SignerOpts) ([]byte, error) { return nil, down }
	_, err = signer.SignJSON([]byte(`{}`))
	require.ErrorIs(t, err, down)
	require.ErrorIs(t, signer.SignRequest(r, "other", nil), down)
	require.Empty(t, r.Header, "a request that could not be signed is left alone")

	remote.sign = func([]byte, crypto.SignerOpts) ([]byte, error) { return make([]byte, 63), nil }
	_, err = signer.SignJSON([]byte(`{}`))
	require.ErrorContains(t, err, "63 bytes")
}

func TestNewSigner_Refuses(t *testing.T) {
	key := wireKey(t, wireSeed)
	public := key.Public().(ed25519.PublicKey)
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	expired := time.UnixMilli(1)
	for label, c := range map[string]struct {
		name mxfed.ServerName
		id   mxfed.KeyID
		key  crypto.Signer
		old  []mxfed.Key
	}{
		"empty name":               {"", "ed25519:1", key, nil},
		"name with a space":        {"a b", "ed25519:1", key, nil},
		"name with a quote":        {`a"b`, "ed25519:1", key, nil},
		"name is a URL":            {"https://a", "ed25519:1", key, nil},
		"empty ID":                 {"a", "", key, nil},
		"no algorithm":             {"a", "1", key, nil},
		"no version":               {"a", "ed25519:", key, nil},
		"other algorithm":          {"a", "rsa:1", key, nil},
		"ID with a dash":           {"a", "ed25519:a-b", key, nil},
		"ID with a second colon":   {"a", "ed25519:a:b", key, nil},
		"ID with a quote":          {"a", `ed25519:a"`, key, nil},
		"ID with a letter é":       {"a", "ed25519:é", key, nil},
		"no key":                   {"a", "ed25519:1", nil, nil},
		"empty private key":        {"a", "ed25519:1", ed25519.PrivateKey(nil), nil},
		"seed as private key":      {"a", "ed25519:1", ed25519.PrivateKey(key.Seed()), nil},
		"cut private key":          {"a", "ed25519:1", key[:63], nil},
		"key of another algorithm": {"a", "ed25519:1", curve, nil},
		"no public key":            {"a", "ed25519:1", &remoteKey{}, nil},
		"short public key":         {"a", "ed25519:1", &remoteKey{public: public[:31]}, nil},
		"public key of zeros":      {"a", "ed25519:1", &remoteKey{public: make(ed25519.PublicKey, 32)}, nil},
		"old key without ID":       {"a", "ed25519:1", key, []mxfed.Key{{Public: public, Expired: expired}}},
		"old key with the new ID":  {"a", "ed25519:1", key, []mxfed.Key{{ID: "ed25519:1", Public: public, Expired: expired}}},
		"old key without Public":   {"a", "ed25519:1", key, []mxfed.Key{{ID: "ed25519:0", Expired: expired}}},
		"old key with a short one": {"a", "ed25519:1", key, []mxfed.Key{{ID: "ed25519:0", Public: public[:8], Expired: expired}}},
		"old key without Expired":  {"a", "ed25519:1", key, []mxfed.Key{{ID: "ed25519:0", Public: public}}},
		"two old keys of one ID": {"a", "ed25519:1", key, []mxfed.Key{
			{ID: "ed25519:0", Public: public, Expired: expired}, {ID: "ed25519:0", Public: public, Expired: expired}}},
	} {
		t.Run(label, func(t *testing.T) {
			s, err := mxfed.NewSigner(c.name, c.id, c.key, c.old...)
			require.ErrorContains(t, err, "mxfed: signer")
			require.Nil(t, s)
		})
	}
	_, err = mxfed.NewSigner("a", "ed25519:A_z9", key, mxfed.Key{ID: "ed25519:0", Public: public, Expired: expired})
	require.NoError(t, err)
}

func TestSigner_NeverPrintsItsKey(t *testing.T) {
	key := wireKey(t, wireSeed)
	signer := wireSigner(t, "domain", "ed25519:1")
	secrets := []string{fmt.Sprintf("%v", key.Seed())[1:20], fmt.Sprintf("%x", key.Seed())[:16], fmt.Sprintf("%#v", []byte(key))[8:40], wireSeed[:16]}
	for _, printed := range []any{signer, *signer, []*mxfed.Signer{signer}, []mxfed.Signer{*signer}, map[string]any{"s": *signer},
		struct{ S mxfed.Signer }{*signer}, &struct{ S *mxfed.Signer }{signer}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			for _, secret := range secrets {
				require.NotContains(t, fmt.Sprintf(verb, printed), secret, "%s of %T", verb, printed)
			}
		}
		b, err := json.Marshal(printed)
		require.NoError(t, err)
		for _, secret := range secrets {
			require.NotContains(t, string(b), secret)
		}
	}
	require.Equal(t, "domain ed25519:1", fmt.Sprint(signer))
	require.Equal(t, "domain ed25519:1", fmt.Sprintf("%#v", *signer))
}

// https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func TestSignRequest_Vectors(t *testing.T) {
	var file struct {
		Keys map[string]struct {
			Name mxfed.ServerName `json:"server_name"`
			ID   mxfed.KeyID      `json:"key_id"`
			Seed string           `json:"seed_base64"`
		}
		Vectors []struct {
			Name, Method, URI string
			Destination       mxfed.ServerName
			KeyOf             string `json:"key_of"`
			Body              *string
			Legacy            bool   `json:"header_lacks_destination"`
			Header            string `json:"authorization_header"`
		}
	}
	loadWireVectors(t, "derived_x_matrix_signing.json", &file)
	require.Len(t, file.Vectors, 5)
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			k := file.Keys[v.KeyOf]
			signer, err := mxfed.NewSigner(k.Name, k.ID, wireKey(t, k.Seed))
			require.NoError(t, err)
			r, err := http.NewRequest(v.Method, "https://delegated.example:4711"+v.URI, nil)
			require.NoError(t, err)
			var body []byte
			if v.Body != nil {
				body = []byte(*v.Body)
			}
			require.NoError(t, signer.SignRequest(r, v.Destination, body))
			want := v.Header
			if v.Legacy { // we always name the destination, which was signed then as well
				want = strings.Replace(want, ",key=", fmt.Sprintf(`,destination="%s",key=`, v.Destination), 1)
			}
			require.Equal(t, []string{want}, r.Header.Values("Authorization"))
		})
	}
}

func TestSignRequest_Edges(t *testing.T) {
	signer := wireSigner(t, "domain", "ed25519:1")
	r, err := http.NewRequest(http.MethodGet, "https://other/_matrix/x?y", nil)
	require.NoError(t, err)
	require.NoError(t, signer.SignRequest(r, "other", nil))
	want := r.Header.Get("Authorization")

	bare := &http.Request{URL: r.URL} // net/http takes this for a GET
	require.NoError(t, signer.SignRequest(bare, "other", nil))
	require.Equal(t, want, bare.Header.Get("Authorization"))

	require.NoError(t, signer.SignRequest(r, "other", nil))
	require.Len(t, r.Header.Values("Authorization"), 1, "signing again replaces the header")
}

func TestSignRequest_Refuses(t *testing.T) {
	signer := wireSigner(t, "domain", "ed25519:1")
	for name, c := range map[string]struct {
		to   mxfed.ServerName
		body []byte
	}{
		"no destination":              {"", nil},
		"destination with a quote":    {`a",origin="b`, nil},
		"destination with a newline":  {"a\r\nX-Evil: 1", nil},
		"destination with a path":     {"a/b", nil},
		"empty body":                  {"other", []byte{}},
		"body is no JSON":             {"other", []byte("{")},
		"body with a duplicate key":   {"other", []byte(`{"a":1,"a":2}`)},
		"body with a lone surrogate":  {"other", []byte(`{"a":"\udfff"}`)},
		"body with a second document": {"other", []byte(`{}{}`)},
	} {
		r, err := http.NewRequest(http.MethodPut, "https://other/_matrix/x", nil)
		require.NoError(t, err)
		require.ErrorContains(t, signer.SignRequest(r, c.to, c.body), "mxfed: ", name)
		require.Empty(t, r.Header, name)
	}
}
