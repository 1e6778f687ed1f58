package mxfed_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// loadWireVectors decodes one file of testdata/vectors.
func loadWireVectors(t *testing.T, file string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", file))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, into))
}

// https://spec.matrix.org/v1.19/appendices/#canonical-json
func TestCanonicalJSON_PublishedExamples(t *testing.T) {
	var file struct {
		Vectors []struct{ Name, Input, Canonical string }
	}
	loadWireVectors(t, "canonical_json.json", &file)
	require.Len(t, file.Vectors, 10)
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			got, err := mxfed.CanonicalJSON([]byte(v.Input))
			require.NoError(t, err)
			require.Equal(t, v.Canonical, string(got))
		})
	}
}

func TestCanonicalJSON(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"top level string":                {`"a"`, `"a"`},
		"top level number":                {` -7 `, `-7`},
		"literals":                        {`[true , false,null]`, `[true,false,null]`},
		"white space of all four kinds":   {"\t{\r\n \"a\" :\t[ 1 ,\n2 ] } ", `{"a":[1,2]}`},
		"empty containers":                {`{"b":{ },"a":[ ]}`, `{"a":[],"b":{}}`},
		"nested objects are sorted":       {`{"b":{"d":1,"c":[{"z":1,"y":2}]},"a":0}`, `{"a":0,"b":{"c":[{"y":2,"z":1}],"d":1}}`},
		"array order stays":               {`[3,1,2]`, `[3,1,2]`},
		"a prefix sorts first":            {`{"aa":1,"a":2,"":3}`, `{"":3,"a":2,"aa":1}`},
		"case variants are two keys":      {`{"type":1,"Type":2,"TYPE":3}`, `{"TYPE":3,"Type":2,"type":1}`},
		"composed and decomposed differ":  {`{"é":1,"e\u0301":2}`, "{\"e\u0301\":2,\"é\":1}"},
		"key with quote and backslash":    {`{"b\"":1,"b\\":2,"b":3}`, `{"b":3,"b\"":1,"b\\":2}`},
		"key with controls":               {`{"\u001f":1,"\n":2,"\u0000":3," ":4}`, `{"\u0000":3,"\n":2,"\u001f":1," ":4}`},
		"escaped backslash before letter": {`{"\\n":1,"\n":2}`, `{"\n":2,"\\n":1}`},
		"code point order, not UTF-16":    {`{"😀":1,"\uffff":2,"é":3,"z":4}`, "{\"z\":4,\"é\":3,\"\uffff\":2,\"😀\":1}"},
		"code point order, escaped":       {`{"\ud83d\ude00":1,"\uFFFF":2}`, "{\"\uffff\":2,\"😀\":1}"},
		"escaped key among plain ones":    {`{"b":1,"\u0061":2,"c":3}`, `{"a":2,"b":1,"c":3}`},
		"short escapes":                   {`"\u0008\u0009\u000a\u000c\u000d\u0022\u005c"`, `"\b\t\n\f\r\"\\"`},
		"long escapes in lower case":      {`"\u0000\u000B\u001F"`, `"\u0000\u000b\u001f"`},
		"no more escapes than needed":     {`"\/\u002f\u007f\u003c>&'\u2028\u2029"`, "\"//\u007f<>&'\u2028\u2029\""},
		"last code point":                 {`"\udbff\udfff"`, "\"\U0010ffff\""},
		"around the surrogates":           {`"\ud7ff\ue000"`, "\"\ud7ff\ue000\""},
		"replacement character itself":    {"\"\ufffd\"", "\"\ufffd\""},
		"byte order mark inside a string": {"\"\ufeff\"", "\"\ufeff\""},
		"largest integers":                {`[9007199254740991,-9007199254740991]`, `[9007199254740991,-9007199254740991]`},
		"zero in all spellings":           {`[-0,0.0,-0.0,0e5,0E-5,0e999999999999999999999,-0.000e1]`, `[0,0,0,0,0,0,0]`},
		"integers in other spellings":     {`[1.0,1E2,1e+2,100e-2,1.50e1,-2.5e1,0.001e3]`, `[1,100,100,1,15,-25,1]`},
		"largest integer as a fraction":   {`[9007199254740991.0,9.007199254740991e15,90071992547409910e-1]`, `[9007199254740991,9007199254740991,9007199254740991]`},
	} {
		t.Run(name, func(t *testing.T) {
			in := []byte(c.in)
			got, err := mxfed.CanonicalJSON(in)
			require.NoError(t, err)
			require.Equal(t, c.want, string(got))
			require.Equal(t, c.in, string(in), "input is left alone")
			require.True(t, json.Valid(got))
			again, err := mxfed.CanonicalJSON(got)
			require.NoError(t, err)
			require.Equal(t, c.want, string(again))
		})
	}
}

func TestCanonicalJSON_Refuses(t *testing.T) {
	for name, in := range map[string]string{
		"nothing":                         "",
		"white space only":                " \n",
		"byte order mark":                 "\ufeff{}",
		"NUL after the value":             "{}\x00",
		"NUL before the value":            "\x00{}",
		"two values":                      "{}{}",
		"trailing comma in object":        `{"a":1,}`,
		"trailing comma in array":         `[1,]`,
		"leading comma in object":         `{,"a":1}`,
		"leading comma in array":          `[,1]`,
		"missing comma":                   `{"a":1 "b":2}`,
		"missing colon":                   `{"a" 1}`,
		"missing value":                   `{"a":}`,
		"key without quotes":              `{a:1}`,
		"number as key":                   `{1:1}`,
		"wrong closing bracket":           `[1}`,
		"wrong closing brace":             `{"a":1]`,
		"open object":                     `{"a":1`,
		"open array":                      `[1`,
		"open string":                     `"a`,
		"open escape":                     `"\`,
		"open unicode escape":             `"\u00`,
		"half a pair at the end":          `"\ud83d\u`,
		"comment":                         `{}//`,
		"single quotes":                   `{'a':1}`,
		"literal in other case":           `True`,
		"literal with a tail":             `nulll`,
		"form feed as white space":        "\f{}",
		"no-break space":                  "\u00a0{}",
		"raw newline in a string":         "\"a\nb\"",
		"raw NUL in a string":             "\"\x00\"",
		"unknown escape":                  `"\x41"`,
		"escaped single quote":            `"\'"`,
		"upper-case U escape":             `"\U0041"`,
		"bad hex digit":                   `"\u00g0"`,
		"controls as hex digits":          "\"\\u00\x10\x11\"",
		"sign in a hex escape":            `"\u+041"`,
		"lone high surrogate":             `"\ud800"`,
		"lone low surrogate":              `"\udc00"`,
		"pair in the wrong order":         `"\ude00\ud83d"`,
		"two low surrogates":              `"\udc00\udc00"`,
		"high surrogate, then U+E000":     `"\ud800\ue000"`,
		"two high surrogates":             `"\ud83d\ud83d"`,
		"high surrogate, then a letter":   `"\ud83da"`,
		"high surrogate, then newline":    `"\ud83d\n"`,
		"lone surrogate in a key":         `{"\ud800":1}`,
		"surrogate as raw UTF-8":          "\"\xed\xa0\x80\"",
		"overlong slash":                  "\"\xc0\xaf\"",
		"beyond the last code point":      "\"\xf4\x90\x80\x80\"",
		"cut UTF-8 sequence":              "\"\xe2\x82\"",
		"lone continuation byte":          "\"\x80\"",
		"invalid UTF-8 in a key":          "{\"\xff\":1}",
		"duplicate key":                   `{"a":1,"a":1}`,
		"duplicate key, apart":            `{"a":1,"b":2,"c":3,"a":4}`,
		"duplicate key, nested":           `[{"x":{"a":1,"a":2}}]`,
		"duplicate key, one escaped":      `{"a":1,"\u0061":2}`,
		"duplicate key, other spelling":   `{"\n":1,"\u000a":2}`,
		"duplicate key, escaped slash":    `{"/":1,"\/":2}`,
		"duplicate key, surrogate pair":   `{"😀":1,"\uD83D\uDE00":2}`,
		"duplicate empty key":             `{"":1,"":2}`,
		"plus sign":                       `+1`,
		"minus alone":                     `-`,
		"leading zero":                    `01`,
		"leading zero after minus":        `-01`,
		"no digit before the point":       `.5`,
		"no digit after the point":        `1.`,
		"no digit in the exponent":        `1e`,
		"no digit after exponent sign":    `1e+`,
		"hexadecimal":                     `0x1F`,
		"NaN":                             `NaN`,
		"Infinity":                        `-Infinity`,
		"underscore":                      `1_000`,
		"fraction":                        `0.5`,
		"fraction by exponent":            `15e-1`,
		"2^53":                            `9007199254740992`,
		"-2^53":                           `-9007199254740992`,
		"2^53 as an exponent":             `9007199254740992e0`,
		"10^16":                           `1e16`,
		"2^64":                            `18446744073709551616`,
		"exponent that must not grow":     `1e999999999`,
		"exponent beyond 64 bits":         `1e99999999999999999999`,
		"tiny, exponent beyond 64 bits":   `1e-99999999999999999999`,
		"many digits":                     strings.Repeat("9", 100_000),
		"fraction nested in an array":     `{"a":[[{"b":0.5}]]}`,
		"nesting 10,000 deep":             strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000),
		"objects 10,000 deep":             strings.Repeat(`{"a":`, 10_000) + "1" + strings.Repeat("}", 10_000),
		"64 KiB of open brackets":         strings.Repeat("[", 64<<10),
		"nesting one deeper than allowed": strings.Repeat("[", 257) + strings.Repeat("]", 257),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := mxfed.CanonicalJSON([]byte(in))
			require.Error(t, err)
			require.Nil(t, got)
			require.Less(t, len(err.Error()), 200, "an error does not repeat its input")
		})
	}
}

func TestCanonicalJSON_Depth(t *testing.T) {
	deep := []byte(strings.Repeat(`[{"a":`, 128) + "1" + strings.Repeat("}]", 128))
	got, err := mxfed.CanonicalJSON(deep)
	require.NoError(t, err, "256 levels are allowed")
	require.Equal(t, string(deep), string(got))

	wide := []byte("[" + strings.Repeat("[[]],", 1000) + "[]]")
	got, err = mxfed.CanonicalJSON(wide)
	require.NoError(t, err, "depth is no count of containers")
	require.Equal(t, string(wide), string(got))
}

// A text is named by its position; a key of another server's choosing is not copied into logs in full.
func TestCanonicalJSON_LongDuplicateKey(t *testing.T) {
	key := `"` + strings.Repeat("k", 1<<20) + `":1`
	_, err := mxfed.CanonicalJSON([]byte("{" + key + "," + key + "}"))
	require.ErrorContains(t, err, "duplicate")
	require.Less(t, len(err.Error()), 200)
}

func TestCanonicalJSON_OwnsItsResult(t *testing.T) {
	in := []byte(`{"b":1,"a":"x"}`)
	first, err := mxfed.CanonicalJSON(in)
	require.NoError(t, err)
	copy(in, bytes.Repeat([]byte("!"), len(in)))
	_, err = mxfed.CanonicalJSON([]byte(`{"zzzzzzz":9}`))
	require.NoError(t, err)
	require.Equal(t, `{"a":"x","b":1}`, string(first))
}
