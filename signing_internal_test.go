package mxfed

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// https://spec.matrix.org/v1.19/appendices/#server-name
func TestServerName_Vectors(t *testing.T) {
	var file struct {
		Vectors []struct {
			Input, Note string
			Valid       bool
			Parts       struct{ Host, Port, Kind string }
		}
	}
	loadCoreVectors(t, "derived_server_names.json", &file)
	require.Len(t, file.Vectors, 31)
	for _, v := range file.Vectors {
		t.Run(v.Input, func(t *testing.T) {
			a, ok := ServerName(v.Input).parse()
			require.Equal(t, v.Valid, ok, v.Note)
			require.Equal(t, v.Valid, ServerName(v.Input).valid())
			if !ok {
				return
			}
			require.Equal(t, strings.Trim(v.Parts.Host, "[]"), a.host)
			require.Equal(t, v.Parts.Port, a.port)
			require.Equal(t, v.Parts.Kind != "dns", a.lit)
			require.Equal(t, v.Parts.Kind != "dns", a.ip.IsValid())
			if a.lit {
				require.Equal(t, v.Parts.Kind == "ipv4", a.ip.Is4())
			}
		})
	}

	var published struct {
		Names []ServerName `json:"server_names_valid"`
	}
	loadCoreVectors(t, "identifiers.json", &published)
	require.Len(t, published.Names, 6)
	for _, n := range published.Names {
		require.True(t, n.valid(), n)
	}
}

func TestServerName_Parse(t *testing.T) {
	loopback := netip.MustParseAddr("127.0.0.1")
	long := strings.Repeat("a", 255)
	for name, want := range map[ServerName]serverAddress{
		"127.0.0.1":                  {host: "127.0.0.1", ip: loopback, lit: true},
		"127.0.0.1:00443":            {host: "127.0.0.1", port: "00443", ip: loopback, lit: true},
		"010.0.0.1":                  {host: "010.0.0.1", lit: true}, // nobody may connect to it, as readings of it differ
		"256.0.0.1":                  {host: "256.0.0.1"},
		"1.2.3":                      {host: "1.2.3"},
		"1.2.3.4.":                   {host: "1.2.3.4."},
		"1.2.3.0004":                 {host: "1.2.3.0004"},
		"a:0":                        {host: "a", port: "0"},
		"a:65535":                    {host: "a", port: "65535"},
		"-":                          {host: "-"},
		"[::]:1":                     {host: "::", port: "1", ip: netip.IPv6Unspecified(), lit: true},
		ServerName(long):             {host: long},
		ServerName(long) + ":443":    {host: long, port: "443"},
		"[0:0:0:0:0:ffff:127.0.0.1]": {host: "0:0:0:0:0:ffff:127.0.0.1", ip: netip.MustParseAddr("::ffff:127.0.0.1"), lit: true},
	} {
		got, ok := name.parse()
		require.True(t, ok, name)
		require.Equal(t, want, got, name)
	}
	for _, name := range []ServerName{"a:+1", "a:000443", "a:1_0", "a: 1", "a:０", "a\x00", "a\n", "a%2e", "[::1", "::1]", "[[::1]]", "[::1]:", "[::1]443", "x[::1]",
		"[::1]:443:443", "[1.2.3.4]:1", "[::1%25]", "[::g]", "[v1.a]", ":", "[]:1", "a:1:", ServerName(long) + "a:443", "a,b", `a"b`, "https://a"} {
		require.False(t, name.valid(), "%q", name)
	}
}

// FuzzServerName: a name that is accepted can stand in a URL and in a header as it is.
func FuzzServerName(f *testing.F) {
	for _, s := range []string{"matrix.org", "a:8448", "1.2.3.4:1", "[::1]:5678", "[::ffff:1.2.3.4]", "010.0.0.1", "a:", "[fe80::1%eth0]", "a@b", "a/b", "A-b.C", "[::1]x:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, ok := ServerName(s).parse()
		if !ok {
			return
		}
		u, err := url.Parse("https://" + s + "/x")
		require.NoError(t, err)
		require.Equal(t, s, u.Host)
		require.Equal(t, a.host, u.Hostname())
		require.Equal(t, a.port, u.Port())
		require.Nil(t, u.User)
		require.Equal(t, "/x", u.Path)
		require.Equal(t, value(`"`+s+`"`), quoted(s))
	})
}

func TestDecodeBase64(t *testing.T) {
	var file struct {
		Vectors []struct {
			Text    string `json:"input_utf8"`
			Encoded string `json:"unpadded_base64"`
		}
	}
	loadCoreVectors(t, "unpadded_base64.json", &file)
	require.Len(t, file.Vectors, 7)
	for _, v := range file.Vectors {
		padded := base64.StdEncoding.EncodeToString([]byte(v.Text))
		for _, s := range []string{v.Encoded, padded} {
			got, err := decodeBase64(s)
			require.NoError(t, err)
			require.Equal(t, v.Text, string(got))
		}
		require.Equal(t, v.Encoded, base64.RawStdEncoding.EncodeToString([]byte(v.Text)), "what Signer writes")
	}

	for _, s := range []string{"+/+/", "-_-_"} {
		got, err := decodeBase64(s)
		require.NoError(t, err)
		require.Equal(t, "fbffbf", hex.EncodeToString(got))
	}
	for _, s := range []string{"+_+_", "A", "Zg\n", "Z\rg", " Zg", "Zg ", "Z=g", "=Zg", "Zg*", "é"} {
		_, err := decodeBase64(s)
		require.Error(t, err, "%q", s)
	}
}

// The published edge cases: all servers must take the same decision, so points of small order, points in another
// spelling and a scalar that is too large are refused, and the equation is checked without the cofactor.
func TestVerify_EdgeCases(t *testing.T) {
	var cases []struct {
		Message, Signature string
		Key                string `json:"pub_key"`
	}
	loadCoreVectors(t, "ed25519_speccheck.json", &cases)
	require.Len(t, cases, 12)
	var accepted []int
	for i, c := range cases {
		key, err := hex.DecodeString(c.Key)
		require.NoError(t, err)
		message, err := hex.DecodeString(c.Message)
		require.NoError(t, err)
		sig, err := hex.DecodeString(c.Signature)
		require.NoError(t, err)
		if usableKey(key) && verify(key, message, base64.RawStdEncoding.EncodeToString(sig)) {
			accepted = append(accepted, i)
		}
	}
	require.Equal(t, []int{3}, accepted)
}

func TestUsableKey(t *testing.T) {
	p := append([]byte{0xed}, append([]byte(strings.Repeat("\xff", 30)), 0x7f)...) // the field's prime
	last := func(c byte) []byte { b := append([]byte(nil), p...); b[0] = c; return b }
	for _, c := range []struct {
		key    []byte
		usable bool
	}{
		{nil, false},
		{make([]byte, 31), false},
		{make([]byte, 33), false},
		{p, false},
		{last(0xee), false},
		{last(0xff), false},
		{last(0xec), false}, // p - 1: of order two
		{last(0xeb), true},
		{append(last(0xeb)[:31:31], 0xff), true},
		{append(p[:31:31], 0xff), false},
	} {
		require.Equal(t, c.usable, usableKey(c.key), "%x", c.key)
	}
	for i, small := range smallOrderY {
		for _, sign := range []byte{0, 0x80} {
			key := []byte(small)
			key[31] |= sign
			require.False(t, usableKey(key), "point %d", i)
		}
	}
}

// What is signed for a request, and that the published form of the header leads back to it.
func TestRequestBytes_Vectors(t *testing.T) {
	var file struct {
		Keys map[string]struct {
			Public string `json:"public_key_base64"`
		}
		Vectors []struct {
			Name, Method, URI, Sig string
			Origin, Destination    ServerName
			KeyOf                  string `json:"key_of"`
			Body                   *string
			Signed                 string `json:"canonical_json_signed"`
			Header                 string `json:"authorization_header"`
			Legacy                 bool   `json:"header_lacks_destination"`
		}
	}
	loadCoreVectors(t, "derived_x_matrix_signing.json", &file)
	require.Len(t, file.Vectors, 5)
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			var content value
			if v.Body != nil {
				text, err := canonicalText(*v.Body, numbersAsReceived)
				require.NoError(t, err)
				content = value(text)
			}
			signed := requestBytes(v.Method, v.URI, v.Origin, v.Destination, content)
			require.Equal(t, v.Signed, string(signed))

			c, err := parseXMatrix(v.Header)
			require.NoError(t, err)
			require.Equal(t, v.Origin, c.origin)
			require.Equal(t, v.Sig, c.sig)
			require.Equal(t, v.Legacy, c.destination == "")
			if !v.Legacy {
				require.Equal(t, v.Destination, c.destination)
			}
			key, err := decodeBase64(file.Keys[v.KeyOf].Public)
			require.NoError(t, err)
			require.True(t, verify(key, signed, c.sig))
			require.False(t, verify(key, requestBytes(v.Method, v.URI+"/", v.Origin, v.Destination, content), c.sig))
		})
	}
}

func TestParseXMatrix_Vectors(t *testing.T) {
	var file struct {
		Vectors []struct {
			Name, Header string
			Params       map[string]string
			Error        bool
		}
	}
	loadCoreVectors(t, "derived_x_matrix_headers.json", &file)
	require.Len(t, file.Vectors, 13)
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			c, err := parseXMatrix(v.Header)
			require.Equal(t, v.Error, err != nil, "%v", err)
			if err == nil {
				require.Equal(t, credentials{ServerName(v.Params["origin"]), ServerName(v.Params["destination"]), KeyID(v.Params["key"]), v.Params["sig"]}, c)
			}
		})
	}
}

func TestParseXMatrix(t *testing.T) {
	want := credentials{"o.example", "d.example", "ed25519:k", "AA+/"}
	for name, header := range map[string]string{
		"quoted":                    `X-Matrix origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/"`,
		"scheme in other case":      `x-mAtRiX origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/"`,
		"many spaces":               `X-Matrix     origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/"   `,
		"tabs around commas":        "X-Matrix origin=\"o.example\"\t,\t destination=\"d.example\" ,key=\"ed25519:k\"\t,sig=\"AA+/\"\t",
		"names in other case":       `X-Matrix ORIGIN="o.example",Destination="d.example",kEY="ed25519:k",Sig="AA+/"`,
		"other order":               `X-Matrix sig="AA+/",key="ed25519:k",destination="d.example",origin="o.example"`,
		"tokens, colon included":    `X-Matrix origin=o.example,destination=d.example,key=ed25519:k,sig="AA+/"`,
		"every character escaped":   `X-Matrix origin="\o\.\e\x\a\m\p\l\e",destination="d.example",key="ed25519:k",sig="AA\+\/"`,
		"unknown parameters":        `X-Matrix a="",b=c,origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/",z="origin=x"`,
		"comma and quote in quotes": `X-Matrix a="x,origin=\"evil\",",origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/"`,
		"backslash at the end":      `X-Matrix a="x\\",origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/"`,
		"signature is no parameter": `X-Matrix signature="BB",origin="o.example",destination="d.example",key="ed25519:k",sig="AA+/"`,
	} {
		c, err := parseXMatrix(header)
		require.NoError(t, err, name)
		require.Equal(t, want, c, name)
	}

	c, err := parseXMatrix(`X-Matrix origin="o.example:1",destination="[::1]:8448",key="ed25519:k",sig="AA=="`)
	require.NoError(t, err)
	require.Equal(t, credentials{"o.example:1", "[::1]:8448", "ed25519:k", "AA=="}, c, "padding is for the decoder")
	c, err = parseXMatrix(`X-Matrix origin="o.example",key="ed25519:k",sig="AA"`)
	require.NoError(t, err)
	require.Empty(t, c.destination)
}

func TestParseXMatrix_Refuses(t *testing.T) {
	for _, header := range []string{"", "X-Matrix", "X-Matrixorigin=a", "Bearer x", "Basic origin=a,key=k,sig=s", "X-Matrix-2 origin=a,key=k,sig=s", " X-Matrix origin=a,key=k,sig=s"} {
		_, err := parseXMatrix(header)
		require.ErrorIs(t, err, errNoXMatrix, "%q", header)
	}
	const good = `X-Matrix origin="o",destination="d",key="k",sig="s"`
	_, err := parseXMatrix(good)
	require.NoError(t, err)
	for name, header := range map[string]string{
		"no parameters":                 `X-Matrix `,
		"no origin":                     `X-Matrix destination="d",key="k",sig="s"`,
		"no key":                        `X-Matrix origin="o",destination="d",sig="s"`,
		"no sig":                        `X-Matrix origin="o",destination="d",key="k"`,
		"signature instead of sig":      `X-Matrix origin="o",destination="d",key="k",signature="s"`,
		"empty origin":                  `X-Matrix origin="",destination="d",key="k",sig="s"`,
		"empty destination":             `X-Matrix origin="o",destination="",key="k",sig="s"`,
		"empty key":                     `X-Matrix origin="o",destination="d",key="",sig="s"`,
		"empty sig":                     `X-Matrix origin="o",destination="d",key="k",sig=""`,
		"token without value":           `X-Matrix origin=,destination="d",key="k",sig="s"`,
		"unknown token without value":   good + `,a=`,
		"last token without value":      `X-Matrix origin="o",destination="d",key="k",sig=`,
		"origin twice":                  good + `,origin="o"`,
		"origin twice, other case":      good + `,ORIGIN="x"`,
		"unknown parameter twice":       good + `,a=b,a=c`,
		"unterminated":                  `X-Matrix origin="o",destination="d",key="k",sig="s`,
		"unterminated by an escape":     `X-Matrix origin="o",destination="d",key="k",sig="s\"`,
		"backslash is the last byte":    `X-Matrix origin="o",destination="d",key="k",sig="s\`,
		"trailing comma":                good + `,`,
		"two commas":                    `X-Matrix origin="o",,destination="d",key="k",sig="s"`,
		"leading comma":                 `X-Matrix ,origin="o",destination="d",key="k",sig="s"`,
		"no comma":                      `X-Matrix origin="o" destination="d",key="k",sig="s"`,
		"trailing word":                 good + ` x`,
		"trailing text after the quote": good + `x`,
		"semicolons":                    `X-Matrix origin="o";destination="d";key="k";sig="s"`,
		"space around the equals sign":  `X-Matrix origin = "o",destination="d",key="k",sig="s"`,
		"name in quotes":                `X-Matrix "origin"="o",destination="d",key="k",sig="s"`,
		"name with a colon":             good + `,a:b=c`,
		"single quotes":                 `X-Matrix origin='o,x',destination="d",key="k",sig="s"`,
		"base64 with slash as a token":  `X-Matrix origin="o",destination="d",key="k",sig=a/b`,
		"padding as a token":            `X-Matrix origin="o",destination="d",key="k",sig=AA==`,
		"letter é as a token":           `X-Matrix origin=é,destination="d",key="k",sig="s"`,
		"two headers in one":            good + `, ` + good,
	} {
		_, err := parseXMatrix(header)
		require.Error(t, err, name)
		require.NotErrorIs(t, err, errNoXMatrix, name)
	}
}

// FuzzXMatrix: no header makes the reader panic, what it returns can be written down and read again, and every header
// that SignRequest writes comes back as it was meant.
func FuzzXMatrix(f *testing.F) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	f.Add(`X-Matrix origin="o",destination="d",key="ed25519:k",sig="s"`, "matrix.org", "a:8448", "ed25519:1", "/_matrix/x?a=%2F", `{}`)
	f.Add(`x-matrix origin=o , key=ed25519:k,	sig="a\"b\\c,d",z="é"`, "[::1]:1", "1.2.3.4", "ed25519:a_B", "/%21a:b/$c", ``)
	f.Add(`X-Matrix origin="o",,sig=`, `a"b`, `a",origin="x`, `ed25519:"`, "/\"", `{"a":1,"a":2}`)
	f.Add(`X-Matrix origin="o\`, "", "a\r\nb", "ed25519:", "", `[-0, 1e5]`)
	f.Fuzz(func(t *testing.T, header, origin, destination, id, uri, body string) {
		if c, err := parseXMatrix(header); err == nil {
			require.NotEmpty(t, c.origin)
			require.NotEmpty(t, c.key)
			require.NotEmpty(t, c.sig)
			again, err := parseXMatrix(writtenXMatrix(c))
			require.NoError(t, err)
			require.Equal(t, c, again)
		}

		u, err := url.ParseRequestURI(uri)
		signer, refused := NewSigner(ServerName(origin), KeyID(id), key)
		if err != nil || refused != nil {
			return
		}
		r := &http.Request{Method: http.MethodPut, URL: u}
		content, badBody := canonicalText(body, numbersAsReceived)
		err = signer.SignRequest(r, ServerName(destination), []byte(body))
		require.Equal(t, ServerName(destination).valid() && badBody == nil, err == nil, "%v", err)
		if err != nil {
			return
		}
		c, err := parseXMatrix(r.Header.Get("Authorization"))
		require.NoError(t, err)
		require.Equal(t, credentials{ServerName(origin), ServerName(destination), KeyID(id), c.sig}, c)
		require.True(t, verify(key.Public().(ed25519.PublicKey), requestBytes(r.Method, u.RequestURI(), c.origin, c.destination, value(content)), c.sig))
		require.False(t, verify(key.Public().(ed25519.PublicKey), requestBytes(r.Method, u.RequestURI(), c.origin, c.destination, ""), c.sig))
	})
}

// writtenXMatrix quotes and escapes every value.
func writtenXMatrix(c credentials) string {
	quote := strings.NewReplacer(`"`, `\"`, `\`, `\\`)
	header := `X-Matrix origin="` + quote.Replace(string(c.origin)) + `",key="` + quote.Replace(string(c.key)) + `",sig="` + quote.Replace(c.sig) + `"`
	if c.destination != "" {
		header += `,destination="` + quote.Replace(string(c.destination)) + `"`
	}
	return header
}

// The bytes that are signed are JSON whatever stands on the request line.
func TestRequestBytes_HostileRequestLine(t *testing.T) {
	b := requestBytes("PUT", "/a\",\"origin\":\"evil\\", "o", "d", `{"x":1}`)
	var got map[string]any
	require.NoError(t, json.Unmarshal(b, &got))
	require.Equal(t, map[string]any{"method": "PUT", "uri": "/a\",\"origin\":\"evil\\", "origin": "o", "destination": "d", "content": map[string]any{"x": 1.0}}, got)
}
