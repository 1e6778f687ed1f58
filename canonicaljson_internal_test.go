package mxfed

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// loadCoreVectors decodes one file of testdata/vectors.
func loadCoreVectors(t *testing.T, file string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", file))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, into))
}

// canonicalText reads src with a reader of its own.
func canonicalText(src string, rule numberRule) (string, error) {
	var r jsonReader
	b, err := r.canonical([]byte(src), rule)
	return string(b), err
}

// https://spec.matrix.org/v1.19/rooms/v6/#canonical-json
func TestCanonical_StrictVectors(t *testing.T) {
	var file struct {
		Vectors []struct {
			Input, Note string
			Valid       bool    `json:"valid_room_version_6_plus"`
			Canonical   *string `json:"tolerant_canonical"`
		}
	}
	loadCoreVectors(t, "derived_canonical_strict.json", &file)
	require.Len(t, file.Vectors, 29)
	for _, v := range file.Vectors {
		t.Run(v.Input, func(t *testing.T) {
			got, err := canonicalText(v.Input, numbersStrict)
			if !v.Valid {
				require.Error(t, err, v.Note)
				return
			}
			require.NoError(t, err, v.Note)
			require.Equal(t, *v.Canonical, got, v.Note)
		})
	}
}

func TestCanonical_NumberRules(t *testing.T) {
	const refused = ""
	for token, want := range map[string]struct{ received, strict, encoded string }{
		"0":                    {"0", "0", "0"},
		"-0":                   {"0", refused, "0"},
		"-1":                   {"-1", "-1", "-1"},
		"0.0":                  {"0.0", refused, "0"},
		"-0.0":                 {"-0.0", refused, "0"},
		"-0e1":                 {"-0e1", refused, "0"},
		"1.0":                  {"1.0", refused, "1"},
		"1E2":                  {"1E2", refused, "100"},
		"1e+2":                 {"1e+2", refused, "100"},
		"0e5":                  {"0e5", refused, "0"},
		"1e10":                 {"1e10", refused, "10000000000"},
		"5.114698E4":           {"5.114698E4", refused, refused},
		"50.57":                {"50.57", refused, refused},
		"-0.5":                 {"-0.5", refused, refused},
		"1e999999999":          {"1e999999999", refused, refused},
		"1e-999999999":         {"1e-999999999", refused, refused},
		"9007199254740991":     {"9007199254740991", "9007199254740991", "9007199254740991"},
		"-9007199254740991":    {"-9007199254740991", "-9007199254740991", "-9007199254740991"},
		"9007199254740992":     {"9007199254740992", refused, refused},
		"-9007199254740992":    {"-9007199254740992", refused, refused},
		"9223372036854775808":  {"9223372036854775808", refused, refused},
		"99999999999999999999": {"99999999999999999999", refused, refused},
		"01":                   {refused, refused, refused},
		"-":                    {refused, refused, refused},
		"1.":                   {refused, refused, refused},
		"1e":                   {refused, refused, refused},
	} {
		for rule, want := range map[numberRule]string{numbersAsReceived: want.received, numbersStrict: want.strict, numbersEncoded: want.encoded} {
			for _, frame := range [][2]string{{"", ""}, {"[[", "]]"}, {`{"a":[{"b":`, `}]}`}} {
				got, err := canonicalText(frame[0]+token+frame[1], rule)
				if want == refused {
					require.Error(t, err, "%s by rule %d", token, rule)
					continue
				}
				require.NoError(t, err, "%s by rule %d", token, rule)
				require.Equal(t, frame[0]+want+frame[1], got, "rule %d", rule)
			}
		}
	}
}

// What a reader left behind, a failed reading above all, has no influence on the next one.
func TestCanonical_ReaderIsReusable(t *testing.T) {
	var r jsonReader
	for range maxJSONDepth + 1 {
		for src, want := range map[string]string{
			`{"z":{"b":1,"a":[`: "", `{"b":2,"a":{"d":1,"c":0}}`: `{"a":{"c":0,"d":1},"b":2}`,
			strings.Repeat("[", 300): "", `{"a":1,"a":2}`: "", `[]`: `[]`, `{"k":1`: "", `{}`: `{}`,
		} {
			got, err := r.canonical([]byte(src), numbersStrict)
			require.Equal(t, want == "", err != nil, src)
			require.Equal(t, want, string(got))
		}
	}
}

func TestValue_OfOtherKinds(t *testing.T) {
	for _, v := range []value{"", "null", "true", `"{}"`, "7", "[]", `[{"a":1}]`} {
		require.False(t, v.isObject(), v)
		require.Empty(t, v.get("a"), v)
		for range v.members() {
			require.Fail(t, "members of no object", v)
		}
	}
	for _, v := range []value{"", "null", "true", `"[]"`, "7", "{}", `{"a":[1]}`} {
		require.False(t, v.isArray(), v)
		for range v.elements() {
			require.Fail(t, "elements of no array", v)
		}
	}
	for _, v := range []value{"", "null", "7", "{}", `["a"]`} {
		_, ok := v.str()
		require.False(t, ok, v)
	}
	for _, v := range []value{"", "null", `"7"`, "[7]", "7.0", "7e0", "9223372036854775808", "-9223372036854775809"} {
		_, ok := v.int()
		require.False(t, ok, v)
	}
	n, ok := value("-9223372036854775808").int()
	require.True(t, ok)
	require.Equal(t, int64(-1<<63), n)
}

func TestValue_Writers(t *testing.T) {
	require.Equal(t, value("{}"), object())
	require.Equal(t, value("{}"), object(field{"a", ""}))
	require.Equal(t, value(`{"":1,"\n":2,"a":3,"é":4,"`+"\uffff"+`":5,"😀":6}`),
		object(field{"😀", "6"}, field{"\uffff", "5"}, field{"a", "3"}, field{"gone", ""}, field{"\n", "2"}, field{"", "1"}, field{"é", "4"}))
	require.Equal(t, value("[]"), array())
	require.Equal(t, value(`[1,"a",{}]`), array(integer(1), quoted("a"), object()))
	require.Equal(t, value("-9223372036854775808"), integer(-1<<63))
	require.Equal(t, value(`{"a":1}`), value("").with("a", "1"), "an absent object counts as empty")
	require.Equal(t, value(`{"a":2,"b":1}`), value(`{"b":1}`).with("a", "2"))
	require.Equal(t, value(`{"b":1}`), value(`{"a":2,"b":1}`).with("a", ""))
}

// An early break must end the iteration: a second call of yield would panic.
func TestValue_IteratorsStop(t *testing.T) {
	for range value(`[1,2,3]`).elements() {
		break
	}
	for range value(`{"a":1,"b":2}`).members() {
		break
	}
}

var canonicalSeeds = []string{
	`{}`, `[]`, `""`, `0`, `-0`, `0.0`, `1E2`, `0e5`, `1e999999999`, `-1.50e1`, `true`, `nul`, ` [1 , {"b" : "x", "a":null}] `,
	`{"a":1,"\u0061":2}`, `{"a":1,"A":2}`, `{"\ud83d\ude00":3,"\uffff":4,"é":1}`, `"\ud800"`, `"\udc00\ud800"`, "\"\xff\"", "\"\u2028\\u2028\\\\u2028\"",
	`{"b\"\\\n":1,"b":{"d":[],"c":{}}}`, `{"a":[[{"b":9007199254740992}]]}`, `9007199254740991`, `"\u0000\u0007\b\t\n\u000b\f\r\u001f\u007f\/<>&'"`,
	`{"a":1,}`, `[1,]`, `{"signatures":{"a":{"ed25519:1":"x"}},"unsigned":{"age":1}}`, "\ufeff{}", "{}\x00", strings.Repeat("[", 300), `{"":{"":{"":0}}}`,
}

// FuzzCanonical compares the reader with a slow one that is built on encoding/json, under every rule for numbers.
func FuzzCanonical(f *testing.F) {
	for _, s := range canonicalSeeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		for _, rule := range []numberRule{numbersAsReceived, numbersStrict, numbersEncoded} {
			want, ok := slowCanonical(src, rule)
			got, err := canonicalText(string(src), rule)
			require.Equal(t, ok, err == nil, "rule %d: accepted: %v", rule, err)
			if !ok {
				continue
			}
			require.Equal(t, want, got, "rule %d", rule)
			again, err := canonicalText(got, rule)
			require.NoError(t, err)
			require.Equal(t, got, again, "idempotent")
			if rule == numbersAsReceived {
				require.Equal(t, decodedTree(t, src), decodedTree(t, []byte(got)), "same value for encoding/json")
			}
		}
	})
}

// decodedTree is what encoding/json makes of src, with -0 as 0.
func decodedTree(t *testing.T, src []byte) any {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(src))
	dec.UseNumber()
	var v any
	require.NoError(t, dec.Decode(&v))
	return withoutNegativeZero(v)
}

func withoutNegativeZero(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, m := range v {
			v[k] = withoutNegativeZero(m)
		}
	case []any:
		for i, e := range v {
			v[i] = withoutNegativeZero(e)
		}
	case json.Number:
		if v == "-0" {
			return json.Number("0")
		}
	}
	return v
}

// slowCanonical is the reference: encoding/json for the grammar, runes for the order, big.Rat for numbers.
func slowCanonical(src []byte, rule numberRule) (string, bool) {
	if !utf8.Valid(src) || !json.Valid(src) || unpairedSurrogate(string(src)) {
		return "", false
	}
	dec := json.NewDecoder(bytes.NewReader(src))
	dec.UseNumber()
	var out strings.Builder
	ok := slowValue(dec, &out, rule, 0)
	return out.String(), ok
}

// unpairedSurrogate looks for \u escapes of valid JSON text that encoding/json would replace silently.
func unpairedSurrogate(src string) bool {
	escape := regexp.MustCompile(`\\(?:u([0-9A-Fa-f]{4})|.)`)
	end, high := -1, false // where a high surrogate ended
	for _, m := range escape.FindAllStringSubmatchIndex(src, -1) {
		c := uint64(0)
		if m[2] >= 0 {
			c, _ = strconv.ParseUint(src[m[2]:m[3]], 16, 32)
		}
		low := 0xDC00 <= c && c <= 0xDFFF
		if paired := high && end == m[0]; high && !(paired && low) || low && !paired {
			return true
		}
		high, end = 0xD800 <= c && c <= 0xDBFF, m[1]
	}
	return high
}

func slowValue(dec *json.Decoder, out *strings.Builder, rule numberRule, depth int) bool {
	token, err := dec.Token()
	if err != nil {
		return false
	}
	switch token := token.(type) {
	case json.Delim:
		if depth == maxJSONDepth {
			return false
		}
		if token == '{' {
			return slowObject(dec, out, rule, depth+1)
		}
		return slowArray(dec, out, rule, depth+1)
	case string:
		out.WriteString(slowQuote(token))
	case json.Number:
		text, ok := slowNumber(string(token), rule)
		out.WriteString(text)
		return ok
	case bool:
		out.WriteString(strconv.FormatBool(token))
	default:
		out.WriteString("null")
	}
	return true
}

func slowObject(dec *json.Decoder, out *strings.Builder, rule numberRule, depth int) bool {
	members := map[string]string{}
	for dec.More() {
		key, _ := dec.Token()
		var m strings.Builder
		if !slowValue(dec, &m, rule, depth) {
			return false
		}
		if _, twice := members[key.(string)]; twice {
			return false
		}
		members[key.(string)] = m.String()
	}
	_, err := dec.Token()
	var texts []string
	for _, k := range keysByRune(members) {
		texts = append(texts, slowQuote(k)+":"+members[k])
	}
	out.WriteString("{" + strings.Join(texts, ",") + "}")
	return err == nil
}

func keysByRune[V any](members map[string]V) []string {
	return slices.SortedFunc(maps.Keys(members), func(a, b string) int { return slices.Compare([]rune(a), []rune(b)) })
}

func slowArray(dec *json.Decoder, out *strings.Builder, rule numberRule, depth int) bool {
	out.WriteString("[")
	for first := true; dec.More(); first = false {
		if !first {
			out.WriteString(",")
		}
		if !slowValue(dec, out, rule, depth) {
			return false
		}
	}
	out.WriteString("]")
	_, err := dec.Token()
	return err == nil
}

// slowQuote is encoding/json's spelling without its two escapes for the sake of JavaScript.
func slowQuote(s string) string {
	i := strings.IndexAny(s, "\u2028\u2029")
	if i < 0 {
		var b strings.Builder
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		if enc.Encode(s) != nil {
			return ""
		}
		return strings.TrimSuffix(b.String(), "\n")
	}
	before, after := slowQuote(s[:i]), slowQuote(s[i+3:])
	return before[:len(before)-1] + s[i:i+3] + after[1:]
}

var (
	slowInteger = regexp.MustCompile(`^(0|-?[1-9][0-9]*)$`)
	slowZero    = regexp.MustCompile(`^-?0(\.0+)?([eE][+-]?[0-9]+)?$`)
	slowLimit   = big.NewInt(1 << 53)
)

func slowNumber(token string, rule numberRule) (string, bool) {
	switch rule {
	case numbersAsReceived:
		if token == "-0" {
			return "0", true
		}
		return token, true
	case numbersStrict:
		n, _ := new(big.Int).SetString(token, 10)
		return token, slowInteger.MatchString(token) && n.CmpAbs(slowLimit) < 0
	}
	if slowZero.MatchString(token) {
		return "0", true
	}
	if _, exponent, found := strings.Cut(strings.ToLower(token), "e"); found {
		if e, err := strconv.Atoi(exponent); err != nil || e > 1000 || e < -100000 {
			return "", false // the reader refuses these without a calculation
		}
	}
	n, ok := new(big.Rat).SetString(token)
	if !ok || !n.IsInt() || n.Num().CmpAbs(slowLimit) >= 0 {
		return "", false
	}
	return n.Num().String(), true
}

// FuzzValue compares the methods that read and change canonical text with what encoding/json finds in it.
func FuzzValue(f *testing.F) {
	for _, s := range canonicalSeeds {
		f.Add([]byte(s), "a")
		f.Add([]byte(s), "\"\\\n\u2028😀")
	}
	f.Fuzz(func(t *testing.T, src []byte, key string) {
		text, err := canonicalText(string(src), numbersAsReceived)
		if err != nil || !utf8.ValidString(key) {
			return
		}
		require.Equal(t, value(slowQuote(key)), quoted(key))
		back, ok := quoted(key).str()
		require.True(t, ok)
		require.Equal(t, key, back)
		checkValue(t, value(text), key)
	})
}

func checkValue(t *testing.T, v value, key string) {
	var s *string
	err := json.Unmarshal([]byte(v), &s)
	str, ok := v.str()
	require.Equal(t, err == nil && s != nil, ok, "%s is a string", v)
	if ok {
		require.Equal(t, *s, str)
	}
	var n *int64
	err = json.Unmarshal([]byte(v), &n)
	i, ok := v.int()
	require.Equal(t, err == nil && n != nil, ok, "%s is an integer", v)
	if ok {
		require.Equal(t, *n, i)
	}
	var elements []json.RawMessage
	err = json.Unmarshal([]byte(v), &elements)
	require.Equal(t, err == nil && v != "null", v.isArray(), "%s is an array", v)
	for e := range v.elements() {
		require.NotEmpty(t, elements, "too many elements")
		require.Equal(t, string(elements[0]), string(e))
		elements = elements[1:]
		checkValue(t, e, key)
	}
	require.Empty(t, elements, "too few elements")
	checkMembers(t, v, key)
}

func checkMembers(t *testing.T, v value, key string) {
	var members map[string]json.RawMessage
	err := json.Unmarshal([]byte(v), &members)
	require.Equal(t, err == nil && v != "null", v.isObject(), "%s is an object", v)
	if !v.isObject() {
		return
	}
	var keys []string
	for k, m := range v.members() {
		keys = append(keys, k)
		require.Equal(t, string(members[k]), string(m))
		require.Equal(t, m, v.get(k))
		require.Equal(t, v, v.with(k, m), "same member again")
		checkChange(t, v, members, k)
		checkValue(t, m, key)
	}
	require.Equal(t, keysByRune(members), keys)
	require.Equal(t, value(members[key]), v.get(key))
	checkChange(t, v, members, key)
}

// checkChange sets and removes one member and looks at all of them.
func checkChange(t *testing.T, v value, members map[string]json.RawMessage, key string) {
	for _, m := range []value{"", `{"new":[7]}`} {
		want := maps.Clone(members)
		if want == nil {
			want = map[string]json.RawMessage{}
		}
		if delete(want, key); m != "" {
			want[key] = json.RawMessage(m)
		}
		changed := v.with(key, m)
		text, err := canonicalText(string(changed), numbersAsReceived)
		require.NoError(t, err)
		require.Equal(t, string(changed), text, "still canonical")
		var got map[string]json.RawMessage
		dec := json.NewDecoder(strings.NewReader(text))
		require.NoError(t, dec.Decode(&got))
		require.Equal(t, want, got)
		_, err = dec.Token()
		require.ErrorIs(t, err, io.EOF)
	}
}
