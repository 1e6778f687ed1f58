package mxfed

import (
	"bytes"
	"cmp"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ed25519"
)

// ServerName is a server's name: a host name or IP literal with an optional port, as in user IDs. It is never the name
// or address that the server delegated to. https://spec.matrix.org/v1.19/appendices/#server-name
type ServerName string

// serverAddress is a server name taken apart.
type serverAddress struct {
	host string     // without the brackets of an IPv6 literal
	port string     // "" if the name has none
	ip   netip.Addr // valid if host is an IP literal that can be connected to
	lit  bool       // host has the form of an IP literal
}

// parse takes a server name apart; ok is false for whatever the grammar does not allow.
func (n ServerName) parse() (a serverAddress, ok bool) {
	host := string(n)
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host, a.port = host[:i], host[i+1:]
		if _, err := strconv.ParseUint(a.port, 10, 16); err != nil || len(a.port) > 5 {
			return a, false
		}
	}
	if rest, found := strings.CutPrefix(host, "["); found {
		a.host, found = strings.CutSuffix(rest, "]")
		ip, err := netip.ParseAddr(a.host)
		a.ip, a.lit = ip, true
		return a, found && err == nil && ip.Is6() && ip.Zone() == ""
	}
	a.host = host
	if isIPv4(host) {
		a.lit = true
		a.ip, _ = netip.ParseAddr(host) // leading zeros leave it invalid: a literal that no one may connect to
	}
	return a, isDNSName(host)
}

// isIPv4 tells whether host is four decimal groups of one to three digits up to 255, leading zeros included.
func isIPv4(host string) bool {
	groups := 0
	for more := true; more; groups++ {
		var group string
		group, host, more = strings.Cut(host, ".")
		if group == "" || len(group) > 3 || strings.Trim(group, "0123456789") != "" || len(group) == 3 && group > "255" {
			return false
		}
	}
	return groups == 4
}

func isDNSName(host string) bool {
	return host != "" && len(host) <= 255 && strings.IndexFunc(host, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.')
	}) < 0
}

// valid tells whether n obeys the grammar of server names.
func (n ServerName) valid() bool {
	_, ok := n.parse()
	return ok
}

// KeyID names a signing key of a server: "ed25519:" and a version of letters, digits and underscores. Identifiers of
// other servers are opaque after the colon. https://spec.matrix.org/v1.19/server-server-api/#publishing-keys
type KeyID string

const ed25519Prefix = "ed25519:"

// Key is a signing key that is asked for (Server, ID, At) and what is known of it (the rest).
type Key struct {
	// Server and ID name the key.
	Server ServerName
	ID     KeyID
	// At is the moment for which the key is needed; zero if any known state of the key will do.
	At time.Time
	// ValidUntil is how long the server vouches for the key.
	ValidUntil time.Time
	// Expired is when the server stopped using it; zero for a current key.
	Expired time.Time
	// Public is nil for a key that is not known.
	Public ed25519.PublicKey
}

// Signer signs in the name of one server. It is immutable, safe for concurrent use if its key is, and never prints its
// key.
type Signer struct {
	name ServerName
	id   KeyID
	key  crypto.Signer
	old  []Key
}

// NewSigner returns a Signer for the server called name, whose key id is key: any ed25519 crypto.Signer, such as an
// ed25519.PrivateKey or one that lives in a key management service. Keys that the server used before (ID, Public and
// Expired are needed) stay published, so that old events can be verified; their identifiers must not be used again.
// https://spec.matrix.org/v1.19/server-server-api/#publishing-keys
func NewSigner(name ServerName, id KeyID, key crypto.Signer, old ...Key) (*Signer, error) {
	if !name.valid() {
		return nil, fmt.Errorf("mxfed: signer: %q is no server name", name)
	}
	if !publishable(id) {
		return nil, fmt.Errorf("mxfed: signer of %s: %q is no key ID", name, id)
	}
	if private, ok := key.(ed25519.PrivateKey); key == nil || ok && len(private) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("mxfed: signer of %s: key is missing or of the wrong length", name)
	}
	if public, ok := key.Public().(ed25519.PublicKey); !ok || !usableKey(public) {
		return nil, fmt.Errorf("mxfed: signer of %s: key %s is not ed25519", name, id)
	}
	seen := []KeyID{id}
	for _, k := range old {
		if !publishable(k.ID) || slices.Contains(seen, k.ID) || len(k.Public) != ed25519.PublicKeySize || k.Expired.IsZero() {
			return nil, fmt.Errorf("mxfed: signer of %s: old key %q needs an ID of its own, Public and Expired", name, k.ID)
		}
		seen = append(seen, k.ID)
	}
	return &Signer{name: name, id: id, key: key, old: slices.Clone(old)}, nil
}

// publishable tells whether id has the form that servers publish; identifiers of other servers are opaque. The name of
// policy servers' keys is not for a server's own: what that signs would count as approved by a policy server.
// https://spec.matrix.org/v1.19/server-server-api/#policy-servers
func publishable(id KeyID) bool {
	version, ok := strings.CutPrefix(string(id), ed25519Prefix)
	return ok && version != "" && version != "policy_server" && strings.IndexFunc(version, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_')
	}) < 0
}

// Name is the server that s signs for.
func (s *Signer) Name() ServerName { return s.name }

// String names the server and the key ID, never the key.
func (s Signer) String() string { return string(s.name) + " " + string(s.id) }

// Format is String for every verb, so that none of them prints the key, not even of a copy.
func (s Signer) Format(f fmt.State, _ rune) { io.WriteString(f, s.String()) }

// sign returns the signature of message in unpadded base64.
func (s *Signer) sign(message []byte) (string, error) {
	sig, err := s.key.Sign(nil, message, crypto.Hash(0))
	if err == nil && len(sig) != ed25519.SignatureSize {
		err = fmt.Errorf("signature of %d bytes", len(sig))
	}
	if err != nil {
		return "", fmt.Errorf("sign as %s with %s: %w", s.name, s.id, err)
	}
	return base64.RawStdEncoding.EncodeToString(sig), nil
}

// SignJSON returns object in canonical form with the signature of s added under signatures; other signatures and
// unsigned are kept and not covered. https://spec.matrix.org/v1.19/appendices/#signing-json
func (s *Signer) SignJSON(object []byte) ([]byte, error) {
	var r jsonReader
	text, err := r.canonical(object, numbersEncoded)
	if err != nil {
		return nil, fmt.Errorf("mxfed: sign: %w", err)
	}
	v := value(text)
	if !v.isObject() {
		return nil, errors.New("mxfed: sign: not a JSON object")
	}
	signed, err := s.signObject(v)
	if err != nil {
		return nil, fmt.Errorf("mxfed: %w", err)
	}
	return []byte(signed), nil
}

func (s *Signer) signObject(v value) (value, error) {
	sig, err := s.sign(signedBytes(v))
	if err != nil {
		return "", err
	}
	return withSignature(v, s.name, s.id, sig), nil
}

// signedBytes is what a signature over the object v covers.
func signedBytes(v value) []byte {
	b := make([]byte, 0, len(v))
	for k, m := range v.members() {
		if k != "signatures" && k != "unsigned" {
			b = appendMember(b, k, m)
		}
	}
	return closeObject(b)
}

// withSignature puts one signature under signatures and leaves all others alone.
func withSignature(v value, name ServerName, id KeyID, sig string) value {
	all := v.get("signatures")
	own := all.get(string(name))
	return v.with("signatures", all.with(string(name), own.with(string(id), quoted(sig))))
}

// VerifyJSON checks the signature that the key id of the server called name made over object. It judges this one
// signature; whether the key was valid is a question for Keys. https://spec.matrix.org/v1.19/appendices/#checking-for-a-signature
func VerifyJSON(object []byte, name ServerName, id KeyID, key ed25519.PublicKey) error {
	var r jsonReader
	text, err := r.canonical(object, numbersAsReceived)
	if err != nil {
		return fmt.Errorf("mxfed: verify: %w", err)
	}
	v := value(text)
	sig, ok := v.get("signatures").get(string(name)).get(string(id)).str()
	if !ok {
		return fmt.Errorf("mxfed: verify: no signature of %s with %s", name, id)
	}
	if !strings.HasPrefix(string(id), ed25519Prefix) || !usableKey(key) || !verify(key, signedBytes(v), sig) {
		return fmt.Errorf("mxfed: verify: bad signature of %s with %s", name, id)
	}
	return nil
}

// verify tells whether sig, in base64, is the signature of message by key, which usableKey has judged. Every server must
// take the same decision on the same signature: crypto/ed25519 without batching, and R not of small order.
func verify(key ed25519.PublicKey, message []byte, sig string) bool {
	raw, err := decodeBase64(sig)
	return err == nil && len(raw) == ed25519.SignatureSize && !smallOrder(raw[:32]) && ed25519.Verify(key, message, raw)
}

// usableKey tells whether key is 32 bytes that stand for a point in canonical form and not of small order.
func usableKey(key ed25519.PublicKey) bool {
	return len(key) == ed25519.PublicKeySize && canonicalPoint(key) && !smallOrder(key)
}

// canonicalPoint tells whether the y coordinate of an encoded point is below p = 2^255 - 19.
func canonicalPoint(point []byte) bool {
	if point[31]&0x7f != 0x7f || point[0] < 0xed {
		return true
	}
	return slices.ContainsFunc(point[1:31], func(b byte) bool { return b != 0xff })
}

// smallOrderY are the y coordinates of the eight points of small order; a point and its negative share one.
var smallOrderY = [...]string{
	"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	"\xec\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
	"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05",
	"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a",
}

func smallOrder(point []byte) bool {
	y := [32]byte(point)
	y[31] &= 0x7f
	for _, small := range smallOrderY {
		if string(y[:]) == small {
			return true
		}
	}
	return false
}

// decodeBase64 reads base64 of either alphabet, padded or not. https://spec.matrix.org/v1.19/appendices/#unpadded-base64
func decodeBase64(s string) ([]byte, error) {
	s = strings.TrimRight(s, "=")
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("white space in base64")
	}
	if strings.ContainsAny(s, "-_") {
		return base64.RawURLEncoding.DecodeString(s)
	}
	return base64.RawStdEncoding.DecodeString(s)
}

// SignRequest adds the X-Matrix Authorization header to r, a request of this signer's server to the server called to,
// for hosts that use an HTTP client of their own. body is the request's JSON body, nil for none.
// https://spec.matrix.org/v1.19/server-server-api/#request-authentication
func (s *Signer) SignRequest(r *http.Request, to ServerName, body []byte) error {
	if !to.valid() {
		return fmt.Errorf("mxfed: sign request: %q is no server name", to)
	}
	content := value("")
	if body != nil {
		var reader jsonReader
		text, err := reader.canonical(body, numbersAsReceived)
		if err != nil {
			return fmt.Errorf("mxfed: sign request: %w", err)
		}
		content = value(text)
	}
	sig, err := s.sign(requestBytes(cmp.Or(r.Method, http.MethodGet), r.URL.RequestURI(), s.name, to, content))
	if err != nil {
		return fmt.Errorf("mxfed: %w", err)
	}
	s.authorize(r, to, sig)
	return nil
}

// authorize sets the header, in the form that the oldest servers can read as well.
func (s *Signer) authorize(r *http.Request, to ServerName, sig string) {
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	r.Header.Set("Authorization", fmt.Sprintf(`X-Matrix origin="%s",destination="%s",key="%s",sig="%s"`, s.name, to, s.id, sig))
}

// requestBytes is what an X-Matrix signature covers; uri is the one on the request line, byte for byte.
func requestBytes(method, uri string, origin, destination ServerName, content value) []byte {
	return []byte(object(field{"method", quoted(method)}, field{"uri", quoted(uri)}, field{"origin", quoted(origin)},
		field{"destination", quoted(destination)}, field{"content", content}))
}

// credentials are the parameters of an X-Matrix header; destination is "" if it had none.
type credentials struct {
	origin, destination ServerName
	key                 KeyID
	sig                 string
}

var errNoXMatrix = errors.New("no X-Matrix authorization")

// parseXMatrix reads the value of one Authorization header of the scheme X-Matrix.
func parseXMatrix(header string) (c credentials, err error) {
	scheme, rest, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "X-Matrix") {
		return c, errNoXMatrix
	}
	params := make(map[string]string, 4)
	for rest = strings.TrimLeft(rest, " "); ; {
		name, val, tail, err := cutParameter(rest)
		if err != nil {
			return c, err
		}
		if _, twice := params[name]; twice {
			return c, fmt.Errorf("parameter %s is given twice", name)
		}
		params[name] = val
		if tail = strings.TrimLeft(tail, " \t"); tail == "" {
			break
		}
		if tail[0] != ',' {
			return c, errors.New("expected a comma")
		}
		rest = strings.TrimLeft(tail[1:], " \t")
	}
	c = credentials{ServerName(params["origin"]), ServerName(params["destination"]), KeyID(params["key"]), params["sig"]}
	if _, ok := params["destination"]; ok && c.destination == "" || c.origin == "" || c.key == "" || c.sig == "" {
		return c, errors.New("origin, key or sig is missing")
	}
	return c, nil
}

// cutParameter reads `name=value` at the start of s.
func cutParameter(s string) (name, val, tail string, err error) {
	name, s, ok := strings.Cut(s, "=")
	if !ok || name == "" || strings.IndexFunc(name, notToken) >= 0 {
		return "", "", "", errors.New("expected a parameter")
	}
	name = strings.ToLower(name)
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexFunc(s, func(c rune) bool { return c != ':' && notToken(c) })
		if end < 0 {
			end = len(s)
		}
		if end == 0 {
			return "", "", "", fmt.Errorf("parameter %s has no value", name)
		}
		return name, s[:end], s[end:], nil
	}
	var b bytes.Buffer
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return name, b.String(), s[i+1:], nil
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		default:
			b.WriteByte(s[i])
		}
	}
	return "", "", "", errors.New("unterminated quoted string")
}

// notToken tells whether c may not occur in a token of RFC 9110.
func notToken(c rune) bool {
	return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c < 0x80 && strings.ContainsRune("!#$%&'*+-.^_`|~", c))
}

// millis is the time of a timestamp of the protocol, in milliseconds since 1970.
func millis(ts int64) time.Time { return time.UnixMilli(ts) }
