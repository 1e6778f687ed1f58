package mxfed

import (
	"iter"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file reads and writes values in canonical form.

// value is one JSON value in canonical form, as jsonReader and the functions below write it; "" is an absent value.
// Its methods trust that form and allocate nothing but strings that hold escapes.
type value string

func (v value) isObject() bool { return v != "" && v[0] == '{' }
func (v value) isArray() bool  { return v != "" && v[0] == '[' }

// str returns the string that v is.
func (v value) str() (string, bool) {
	if v == "" || v[0] != '"' {
		return "", false
	}
	return unescape(string(v[1 : len(v)-1])), true
}

// int returns the integer that v is; tokens with fraction or exponent are none, nor are those beyond 64 bits.
func (v value) int() (int64, bool) {
	if v == "" || v[0] != '-' && (v[0] < '0' || v[0] > '9') {
		return 0, false
	}
	n, err := strconv.ParseInt(string(v), 10, 64)
	return n, err == nil
}

// members yields the members of an object in order; nothing for any other value.
func (v value) members() iter.Seq2[string, value] {
	return func(yield func(string, value) bool) {
		if !v.isObject() {
			return
		}
		for i := 1; v[i] != '}'; {
			keyEnd := v.skip(i)
			end := v.skip(keyEnd + 1)
			if !yield(unescape(string(v[i+1:keyEnd-1])), v[keyEnd+1:end]) {
				return
			}
			if i = end; v[i] == ',' {
				i++
			}
		}
	}
}

// elements yields the elements of an array; nothing for any other value.
func (v value) elements() iter.Seq[value] {
	return func(yield func(value) bool) {
		if !v.isArray() {
			return
		}
		for i := 1; v[i] != ']'; {
			end := v.skip(i)
			if !yield(v[i:end]) {
				return
			}
			if i = end; v[i] == ',' {
				i++
			}
		}
	}
}

// get returns the member named key of an object, "" if there is none.
func (v value) get(key string) value {
	for k, m := range v.members() {
		if k == key {
			return m
		}
	}
	return ""
}

// skip returns where the value that starts at byte i ends.
func (v value) skip(i int) int {
	switch v[i] {
	case '"':
		return v.skipString(i)
	case '{', '[':
		for depth := 0; ; i++ {
			switch v[i] {
			case '"':
				i = v.skipString(i) - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
	}
	for i < len(v) && v[i] != ',' && v[i] != '}' && v[i] != ']' {
		i++
	}
	return i
}

func (v value) skipString(i int) int {
	for i++; ; i++ {
		switch v[i] {
		case '"':
			return i + 1
		case '\\':
			i++
		}
	}
}

// with returns the object v with one member set; "" removes it.
func (v value) with(key string, m value) value {
	fields := make([]field, 0, 16)
	for k, old := range v.members() {
		if k != key {
			fields = append(fields, field{k, old})
		}
	}
	return object(append(fields, field{key, m})...)
}

// field is one member of an object to be written.
type field struct {
	key   string
	value value
}

// object writes an object of fields in any order; fields without a value are left out, keys must differ.
func object(fields ...field) value {
	slices.SortFunc(fields, func(a, b field) int { return strings.Compare(a.key, b.key) })
	var b []byte
	for _, f := range fields {
		if f.value != "" {
			b = appendMember(b, f.key, f.value)
		}
	}
	return value(closeObject(b))
}

// appendMember appends a member to an object that is being written from an empty b and ended by closeObject.
func appendMember(b []byte, key string, v value) []byte {
	if len(b) == 0 {
		b = append(b, '{')
	} else {
		b = append(b, ',')
	}
	b = appendQuoted(b, key)
	b = append(b, ':')
	return append(b, v...)
}

func closeObject(b []byte) []byte {
	if len(b) == 0 {
		b = append(b, '{')
	}
	return append(b, '}')
}

// array writes an array of values.
func array(elements ...value) value {
	b := []byte{'['}
	for i, e := range elements {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, e...)
	}
	return value(append(b, ']'))
}

// quoted writes a string, which must be valid UTF-8.
func quoted[S ~string](s S) value { return value(appendQuoted(nil, string(s))) }

func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); i++ {
		if plainByte[s[i]] || s[i] >= utf8.RuneSelf {
			b = append(b, s[i])
		} else {
			b = appendEscaped(b, rune(s[i]))
		}
	}
	return append(b, '"')
}

// integer writes an integer.
func integer(n int64) value { return value(strconv.FormatInt(n, 10)) }
