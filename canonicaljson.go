package mxfed

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file holds the only reader of JSON from other servers. It turns text into canonical form in one pass; everything
// else (hashes, signatures, fields) is read from that form alone, so what was verified is what is used.
// https://spec.matrix.org/v1.19/appendices/#canonical-json

// maxJSONDepth bounds nesting; it is far beyond any real event and far below any stack limit.
const maxJSONDepth = 256

// maxJSONInteger is the largest magnitude of an integer in canonical JSON.
const maxJSONInteger = 1<<53 - 1

// numberRule says what becomes of number tokens.
type numberRule int

const (
	// numbersAsReceived keeps tokens, but writes -0 as 0: room versions 1 to 5, and whatever has no room version.
	numbersAsReceived numberRule = iota
	// numbersKept keeps even -0, for events in a request that are judged by the rules of their own room version later.
	numbersKept
	// numbersStrict refuses everything but canonical integers: room versions 6 and later.
	numbersStrict
	// numbersEncoded writes integral numbers as canonical integers and refuses others: for what we produce ourselves.
	numbersEncoded
)

// CanonicalJSON reads JSON text strictly and returns its canonical form: members sorted by code point, shortest escapes,
// no white space, integers only. Integral numbers such as 1e3 are rewritten; other fractions, integers beyond ±(2^53-1),
// duplicate keys, unpaired surrogates, invalid UTF-8 and nesting deeper than 256 are errors.
// https://spec.matrix.org/v1.19/appendices/#canonical-json
func CanonicalJSON(b []byte) ([]byte, error) {
	var r jsonReader
	text, err := r.canonical(b, numbersEncoded)
	if err != nil {
		return nil, fmt.Errorf("mxfed: %w", err)
	}
	return text, nil
}

// jsonReader writes the canonical form of src to out. It may be used again and then reuses its buffers.
type jsonReader struct {
	src     []byte
	pos     int
	numbers numberRule
	depth   int
	out     []byte
	members []memberSpan // of the objects being read, innermost last
	scratch []byte
}

// memberSpan locates one member in out: `"key":value`.
type memberSpan struct{ start, keyEnd, end int }

// canonical returns the canonical form of src; it is valid until the next call.
func (r *jsonReader) canonical(src []byte, numbers numberRule) ([]byte, error) {
	r.src, r.pos, r.numbers, r.depth = src, 0, numbers, 0
	r.out, r.members = r.out[:0], r.members[:0]
	if cap(r.out) < len(src) {
		r.out = make([]byte, 0, len(src))
	}
	if err := r.value(); err != nil {
		return nil, err
	}
	if r.next() != 0 || r.pos < len(src) {
		return nil, r.fail("trailing data")
	}
	return r.out, nil
}

func (r *jsonReader) fail(what string) error {
	return fmt.Errorf("json: %s at byte %d", what, r.pos)
}

// next skips white space and returns the byte it stops at, 0 at the end.
func (r *jsonReader) next() byte {
	for r.pos < len(r.src) {
		switch c := r.src[r.pos]; c {
		case ' ', '\t', '\n', '\r':
			r.pos++
		default:
			return c
		}
	}
	return 0
}

func (r *jsonReader) value() error {
	switch c := r.next(); c {
	case '{':
		return r.nested(r.object)
	case '[':
		return r.nested(r.array)
	case '"':
		return r.string()
	case 't':
		return r.literal("true")
	case 'f':
		return r.literal("false")
	case 'n':
		return r.literal("null")
	default:
		if c == '-' || '0' <= c && c <= '9' {
			return r.number()
		}
		return r.fail("expected a value")
	}
}

func (r *jsonReader) nested(read func() error) error {
	if r.depth++; r.depth > maxJSONDepth {
		return r.fail("nesting too deep")
	}
	err := read()
	r.depth--
	return err
}

func (r *jsonReader) literal(text string) error {
	if !bytes.HasPrefix(r.src[r.pos:], []byte(text)) {
		return r.fail("expected a value")
	}
	r.pos += len(text)
	r.out = append(r.out, text...)
	return nil
}

func (r *jsonReader) object() error {
	r.pos++
	r.out = append(r.out, '{')
	first, sorted := len(r.members), true
	for c := r.next(); c != '}'; {
		if r.next() != '"' {
			return r.fail("expected a member name")
		}
		m, err := r.member()
		if err != nil {
			return err
		}
		if n := len(r.members); n > first && compareKeys(r.key(r.members[n-1]), r.key(m)) >= 0 {
			sorted = false
		}
		r.members = append(r.members, m)
		if c = r.next(); c == '}' {
			break
		} else if c != ',' {
			return r.fail("expected , or }")
		}
		r.pos++
		r.out = append(r.out, ',')
	}
	r.pos++
	if !sorted {
		if err := r.sort(r.members[first:]); err != nil {
			return err
		}
	}
	r.members = r.members[:first]
	r.out = append(r.out, '}')
	return nil
}

func (r *jsonReader) member() (memberSpan, error) {
	m := memberSpan{start: len(r.out)}
	if err := r.string(); err != nil {
		return m, err
	}
	m.keyEnd = len(r.out)
	if r.next() != ':' {
		return m, r.fail("expected :")
	}
	r.pos++
	r.out = append(r.out, ':')
	err := r.value()
	m.end = len(r.out)
	return m, err
}

// key is the text of a member's name, without quotes.
func (r *jsonReader) key(m memberSpan) []byte { return r.out[m.start+1 : m.keyEnd-1] }

// sort puts members, which stand one after the other in out, into canonical order.
func (r *jsonReader) sort(members []memberSpan) error {
	start := members[0].start
	slices.SortFunc(members, func(a, b memberSpan) int { return compareKeys(r.key(a), r.key(b)) })
	for i := 1; i < len(members); i++ {
		if bytes.Equal(r.key(members[i-1]), r.key(members[i])) {
			return r.fail(fmt.Sprintf("duplicate member %.40q", r.key(members[i])))
		}
	}
	r.scratch = append(r.scratch[:0], r.out[start:]...)
	r.out = r.out[:start]
	for i, m := range members {
		if i > 0 {
			r.out = append(r.out, ',')
		}
		r.out = append(r.out, r.scratch[m.start-start:m.end-start]...)
	}
	return nil
}

// compareKeys orders canonical string texts by the code points they stand for, which is the byte order of UTF-8.
func compareKeys(a, b []byte) int {
	if bytes.IndexByte(a, '\\') < 0 && bytes.IndexByte(b, '\\') < 0 {
		return bytes.Compare(a, b)
	}
	return strings.Compare(unescape(string(a)), unescape(string(b)))
}

func (r *jsonReader) array() error {
	r.pos++
	r.out = append(r.out, '[')
	if r.next() == ']' {
		r.pos++
		r.out = append(r.out, ']')
		return nil
	}
	for {
		if err := r.value(); err != nil {
			return err
		}
		c := r.next()
		if c != ',' && c != ']' {
			return r.fail("expected , or ]")
		}
		r.pos++
		r.out = append(r.out, c)
		if c == ']' {
			return nil
		}
	}
}

// string reads a string whose opening quote is next.
func (r *jsonReader) string() error {
	src, i := r.src, r.pos+1
	r.out = append(r.out, '"')
	for start := i; ; start = i {
		for i < len(src) && plainByte[src[i]] {
			i++
		}
		r.out = append(r.out, src[start:i]...)
		r.pos = i
		if i == len(src) {
			return r.fail("unterminated string")
		}
		switch c := src[i]; {
		case c == '"':
			r.out = append(r.out, '"')
			r.pos++
			return nil
		case c == '\\':
			if err := r.escape(); err != nil {
				return err
			}
			i = r.pos
		case c < ' ':
			return r.fail("control character in a string")
		default:
			_, n := utf8.DecodeRune(src[i:])
			if n == 1 {
				return r.fail("invalid UTF-8")
			}
			r.out = append(r.out, src[i:i+n]...)
			i += n
		}
	}
}

// plainByte marks the bytes that stand for themselves in a string and are whole characters.
var plainByte = func() (t [256]bool) {
	for c := ' '; c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// escape reads one escape sequence, a surrogate pair included.
func (r *jsonReader) escape() error {
	if r.pos+1 >= len(r.src) {
		return r.fail("unterminated string")
	}
	c := r.src[r.pos+1]
	if c == 'u' {
		return r.unicodeEscape()
	}
	i := strings.IndexByte(`"\/bfnrt`, c)
	if i < 0 {
		return r.fail("unknown escape")
	}
	r.pos += 2
	r.out = appendEscaped(r.out, rune("\"\\/\b\f\n\r\t"[i]))
	return nil
}

func (r *jsonReader) unicodeEscape() error {
	c, ok := r.hex(r.pos)
	if !ok {
		return r.fail("bad \\u escape")
	}
	width := 6
	if 0xD800 <= c && c < 0xE000 {
		low, ok := r.hex(r.pos + 6)
		if c >= 0xDC00 || !ok || low < 0xDC00 || low >= 0xE000 {
			return r.fail("unpaired surrogate")
		}
		c, width = (c-0xD800)<<10+(low-0xDC00)+0x10000, 12
	}
	r.pos += width
	r.out = appendEscaped(r.out, c)
	return nil
}

// hex reads `\uXXXX` at byte i.
func (r *jsonReader) hex(i int) (rune, bool) {
	if i+6 > len(r.src) || r.src[i] != '\\' || r.src[i+1] != 'u' {
		return 0, false
	}
	var c rune
	for _, d := range r.src[i+2 : i+6] {
		n := strings.IndexByte("0123456789abcdef", d|0x20)
		if d < '0' || n < 0 || (n > 9 && d < 'A') {
			return 0, false
		}
		c = c<<4 | rune(n)
	}
	return c, true
}

// number reads one number token and writes it as r.numbers says.
func (r *jsonReader) number() error {
	start := r.pos
	integral, ok := r.numberToken()
	token := r.src[start:r.pos]
	if !ok {
		return r.fail("malformed number")
	}
	switch {
	case r.numbers == numbersStrict:
		if !integral || string(token) == "-0" || !safeInteger(token) {
			return r.fail("number is no canonical integer")
		}
	case r.numbers == numbersEncoded:
		n, err := encodeNumber(string(token))
		if err != nil {
			return r.fail(err.Error())
		}
		r.out = strconv.AppendInt(r.out, n, 10)
		return nil
	case r.numbers == numbersAsReceived && string(token) == "-0":
		token = token[1:]
	}
	r.out = append(r.out, token...)
	return nil
}

// numberToken passes one token of the JSON grammar; integral: it has neither fraction nor exponent.
func (r *jsonReader) numberToken() (integral, ok bool) {
	if r.src[r.pos] == '-' {
		r.pos++
	}
	start := r.pos
	if n := r.digits(); n == 0 || n > 1 && r.src[start] == '0' {
		return false, false
	}
	integral = true
	if r.pos < len(r.src) && r.src[r.pos] == '.' {
		r.pos++
		if integral = false; r.digits() == 0 {
			return false, false
		}
	}
	if r.pos < len(r.src) && r.src[r.pos]|0x20 == 'e' {
		r.pos++
		if r.pos < len(r.src) && (r.src[r.pos] == '+' || r.src[r.pos] == '-') {
			r.pos++
		}
		if integral = false; r.digits() == 0 {
			return false, false
		}
	}
	return integral, true
}

func (r *jsonReader) digits() (n int) {
	for ; r.pos < len(r.src) && '0' <= r.src[r.pos] && r.src[r.pos] <= '9'; n++ {
		r.pos++
	}
	return n
}

// safeInteger tells whether an integer token lies within ±(2^53-1).
func safeInteger(token []byte) bool {
	if len(token) < 16 {
		return true
	}
	n, err := strconv.ParseInt(string(token), 10, 64)
	return err == nil && -maxJSONInteger <= n && n <= maxJSONInteger
}

// encodeNumber returns the integer that a number token stands for, without ever expanding a large exponent.
func encodeNumber(token string) (int64, error) {
	mantissa, exponent, _ := strings.Cut(strings.ToLower(token), "e")
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimLeft(strings.TrimPrefix(whole, "-")+fraction, "0")
	significant := strings.TrimRight(digits, "0")
	if significant == "" {
		return 0, nil
	}
	scale := len(digits) - len(significant) - len(fraction)
	if exponent != "" {
		e, err := strconv.Atoi(exponent)
		if err != nil || e > 1000 || e < -100000 {
			return 0, errors.New("number out of range")
		}
		scale += e
	}
	if scale < 0 {
		return 0, errors.New("number is no integer")
	}
	if len(significant)+scale > 16 {
		return 0, errors.New("number out of range")
	}
	n, err := strconv.ParseInt(significant+strings.Repeat("0", scale), 10, 64)
	if err != nil || n > maxJSONInteger {
		return 0, errors.New("number out of range")
	}
	if token[0] == '-' {
		n = -n
	}
	return n, nil
}

// appendEscaped appends one character of a string in canonical form.
func appendEscaped(dst []byte, c rune) []byte {
	switch c {
	case '"', '\\':
		return append(dst, '\\', byte(c))
	case '\b':
		return append(dst, `\b`...)
	case '\t':
		return append(dst, `\t`...)
	case '\n':
		return append(dst, `\n`...)
	case '\f':
		return append(dst, `\f`...)
	case '\r':
		return append(dst, `\r`...)
	}
	if c < ' ' {
		return append(dst, '\\', 'u', '0', '0', '0'+byte(c>>4), "0123456789abcdef"[c&15])
	}
	return utf8.AppendRune(dst, c)
}

// unescape decodes the text between the quotes of a canonical string.
func unescape(text string) string {
	if strings.IndexByte(text, '\\') < 0 {
		return text
	}
	s, _ := strconv.Unquote(`"` + text + `"`) // canonical escapes are a subset of Go's, so this cannot fail
	return s
}
