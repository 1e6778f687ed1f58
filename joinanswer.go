package mxfed

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
)

// This file reads an answer that describes a room, such as that to send_join, as a stream: it finds where each event begins
// and ends and hands on its text, which eventParser then reads strictly. Nothing but the event at hand and the few other
// members is kept.

// What the lists of an answer hold, and the limits of its parts in bytes. A legal event has 64 KiB in canonical form;
// escapes and white space may make its text several times as long.
const (
	listState = "state"
	listAuth  = "auth_chain"

	maxEventText  = 512 << 10
	maxMemberText = 8 << 20
)

// answerForm tells what the answers of an endpoint are made of.
type answerForm struct {
	lists   map[string]string // what the lists hold, by the name of the member; none may be missing
	members []string          // others that mean anything; the rest is passed over
}

var sendJoinForm = answerForm{lists: map[string]string{"state": listState, "auth_chain": listAuth},
	members: []string{"event", "members_omitted", "servers_in_room"}}

// answerReader reads the top-level members of an answer.
type answerReader struct {
	in     io.Reader
	form   *answerForm // nil: that of send_join
	buf    []byte      // what was read and not consumed yet is buf[pos:]
	pos    int
	total  int64 // bytes read
	max    int64
	broken error // why no more came
	seen   map[string]bool
	rest   map[string]value // members other than the lists
}

// read calls each for every element of the lists, in order of arrival, and returns the other members. The text that each
// gets is valid during the call.
func (r *answerReader) read(v1 bool, each func(list string, text []byte) error) (map[string]value, error) {
	r.seen, r.rest = make(map[string]bool), make(map[string]value)
	if r.form == nil {
		r.form = &sendJoinForm
	}
	if v1 { // [200, {…}]
		if err := r.expect('['); err != nil {
			return nil, err
		}
		if _, err := r.text(maxEventText); err != nil {
			return nil, err
		}
		if err := r.expect(','); err != nil {
			return nil, err
		}
	}
	if err := r.object(each); err != nil {
		return nil, err
	}
	if v1 {
		if err := r.expect(']'); err != nil {
			return nil, err
		}
	}
	if c, err := r.next(); err != io.EOF {
		return nil, fmt.Errorf("trailing data %q: %w", c, errMalformed)
	}
	for name := range r.form.lists {
		if !r.seen[name] {
			return nil, fmt.Errorf("%s is missing: %w", name, errMalformed)
		}
	}
	return r.rest, nil
}

var errMalformed = errors.New("answer is malformed")

func (r *answerReader) object(each func(list string, text []byte) error) error {
	if err := r.expect('{'); err != nil {
		return err
	}
	if c, err := r.next(); err != nil || c == '}' {
		r.pos++
		return err
	}
	for {
		if err := r.member(each); err != nil {
			return err
		}
		c, err := r.next()
		if err != nil {
			return err
		}
		r.pos++
		if c == '}' {
			return nil
		}
		if c != ',' {
			return errMalformed
		}
	}
}

func (r *answerReader) member(each func(list string, text []byte) error) error {
	text, err := r.text(maxEventText)
	if err != nil {
		return err
	}
	var reader jsonReader
	canonical, err := reader.canonical(text, numbersAsReceived)
	if err != nil {
		return err
	}
	key, ok := value(canonical).str()
	if !ok || r.seen[key] {
		return fmt.Errorf("member %.64q has no name or comes twice: %w", key, errMalformed)
	}
	if err := r.expect(':'); err != nil {
		return err
	}
	list := r.form.lists[key]
	if list == "" && !slices.Contains(r.form.members, key) {
		return r.pass()
	}
	r.seen[key] = true
	if list != "" {
		return r.elements(list, each)
	}
	if text, err = r.text(maxMemberText); err != nil {
		return err
	}
	if canonical, err = reader.canonical(text, numbersAsReceived); err != nil {
		return err
	}
	r.rest[key] = value(canonical)
	return nil
}

// pass skips a member that means nothing here.
func (r *answerReader) pass() error {
	_, err := r.text(maxMemberText)
	return err
}

func (r *answerReader) elements(list string, each func(list string, text []byte) error) error {
	if err := r.expect('['); err != nil {
		return err
	}
	if c, err := r.next(); err != nil || c == ']' {
		r.pos++
		return err
	}
	for {
		text, err := r.text(maxEventText)
		if err != nil {
			return err
		}
		if err := each(list, text); err != nil {
			return err
		}
		c, err := r.next()
		if err != nil {
			return err
		}
		r.pos++
		if c == ']' {
			return nil
		}
		if c != ',' {
			return errMalformed
		}
	}
}

// fill reads more, keeping what is not consumed.
func (r *answerReader) fill() error {
	if r.pos > 0 {
		r.buf = r.buf[:copy(r.buf, r.buf[r.pos:])]
		r.pos = 0
	}
	if len(r.buf) == cap(r.buf) {
		r.buf = append(make([]byte, 0, max(64<<10, 2*cap(r.buf))), r.buf...)
	}
	n, err := r.in.Read(r.buf[len(r.buf):cap(r.buf)])
	r.buf = r.buf[:len(r.buf)+n]
	r.total += int64(n)
	if r.total > r.max {
		return fmt.Errorf("answer is larger than %d bytes", r.max)
	}
	if n > 0 {
		return nil
	}
	if err != io.EOF {
		r.broken = err
	}
	return err
}

// next skips white space and returns the byte that follows, without consuming it.
func (r *answerReader) next() (byte, error) {
	for {
		for ; r.pos < len(r.buf); r.pos++ {
			switch c := r.buf[r.pos]; c {
			case ' ', '\t', '\n', '\r':
			default:
				return c, nil
			}
		}
		if err := r.fill(); err != nil {
			return 0, err
		}
	}
}

func (r *answerReader) expect(want byte) error {
	c, err := r.next()
	if err == nil && c != want {
		return fmt.Errorf("expected %q: %w", want, errMalformed)
	}
	r.pos++
	return unexpectedEOF(err)
}

func unexpectedEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// text consumes one value and returns its text, which may still be malformed inside; it is valid until the next call.
func (r *answerReader) text(limit int) ([]byte, error) {
	if _, err := r.next(); err != nil {
		return nil, unexpectedEOF(err)
	}
	var s valueScanner
	for n := 0; ; {
		done := s.scan(r.buf[r.pos+n:])
		if n = s.length; n > limit {
			return nil, fmt.Errorf("a value is longer than %d bytes: %w", limit, errMalformed)
		}
		if done {
			if n == 0 {
				return nil, errMalformed
			}
			text := r.buf[r.pos : r.pos+n]
			r.pos += n
			return text, nil
		}
		if err := r.fill(); err != nil {
			return nil, unexpectedEOF(err)
		}
	}
}

// valueScanner finds the end of one JSON value in text that comes in pieces.
type valueScanner struct {
	length   int // bytes that belong to the value so far
	depth    int
	inString bool
	escaped  bool
	bare     bool // a number or literal, which ends before the next delimiter
}

// scan takes the next piece and tells whether the value ends in it.
func (s *valueScanner) scan(piece []byte) (done bool) {
	for i := 0; i < len(piece); i++ {
		c := piece[i]
		switch {
		case s.escaped:
			s.escaped = false
		case s.inString:
			if c != '"' && c != '\\' {
				if n := bytes.IndexAny(piece[i:], `"\`); n > 0 {
					i += n - 1
				} else {
					i = len(piece) - 1
				}
				continue
			}
			s.escaped = c == '\\'
			s.inString = c != '"'
			if !s.inString && s.depth == 0 {
				s.length += i + 1
				return true
			}
		case c == '"':
			if s.bare {
				s.length += i
				return true
			}
			s.inString = true
		case c == '{' || c == '[':
			s.depth++
		case c == '}' || c == ']':
			if s.depth == 0 {
				s.length += i
				return true
			}
			if s.depth--; s.depth == 0 {
				s.length += i + 1
				return true
			}
		case s.depth > 0:
		case c == ',' || c == ':' || c == ' ' || c == '\t' || c == '\n' || c == '\r':
			s.length += i
			return true
		default:
			s.bare = true
		}
	}
	s.length += len(piece)
	return false
}
