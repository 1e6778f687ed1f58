package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// phone is a client of a server's client API.
type phone struct {
	*testing.T
	base  string // up to and with /_matrix/client/
	token string
	user  mxfed.UserID
	since string // where the last sync ended
}

// answer is a decoded JSON body.
type answer map[string]any

// at follows a path of keys, and of indexes in lists; nil if it leads nowhere.
func (a answer) at(path ...any) any {
	var v any = map[string]any(a)
	for _, step := range path {
		switch step := step.(type) {
		case string:
			object, _ := v.(map[string]any)
			v = object[step]
		case int:
			list, _ := v.([]any)
			if step >= len(list) {
				return nil
			}
			v = list[step]
		}
	}
	return v
}

// api serves a server's client API until the test ends.
func (w *world) api(s *server) string {
	w.Helper()
	web := httptest.NewServer(newClientAPI(w.Context(), s))
	w.Cleanup(web.Close)
	return web.URL + "/_matrix/client/"
}

// newPhone registers a user.
func newPhone(t *testing.T, base, name string) *phone {
	t.Helper()
	p := &phone{T: t, base: base}
	got := p.must("POST", "v3/register", answer{"username": name, "auth": answer{"type": "m.login.dummy"}})
	p.user, p.token = mxfed.UserID(got["user_id"].(string)), got["access_token"].(string)
	return p
}

// try makes a request; body is encoded unless it is a string.
func (p *phone) try(method, path string, body any) (int, answer) {
	p.Helper()
	status, got, err := p.request(p.Context(), method, path, body)
	require.NoError(p, err)
	return status, got
}

func (p *phone) request(ctx context.Context, method, path string, body any) (int, answer, error) {
	text, ok := body.(string)
	if !ok && body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		text = string(encoded)
	}
	q, err := http.NewRequestWithContext(ctx, method, p.base+path, bytes.NewReader([]byte(text)))
	if err != nil {
		return 0, nil, err
	}
	if p.token != "" {
		q.Header.Set("Authorization", "Bearer "+p.token)
	}
	r, err := http.DefaultClient.Do(q)
	if err != nil {
		return 0, nil, err
	}
	defer r.Body.Close()
	read, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, nil, err
	}
	var list []any
	if json.Unmarshal(read, &list) == nil {
		return r.StatusCode, answer{"": list}, nil
	}
	got := answer{}
	return r.StatusCode, got, json.Unmarshal(read, &got)
}

// must makes a request that succeeds.
func (p *phone) must(method, path string, body any) answer {
	p.Helper()
	status, got := p.try(method, path, body)
	require.Equal(p, 200, status, "%s %s: %v", method, path, got)
	return got
}

// fails makes a request that is refused.
func (p *phone) fails(status int, code string, method, path string, body any) {
	p.Helper()
	s, got := p.try(method, path, body)
	require.Equal(p, status, s, "%s %s: %v", method, path, got)
	require.Equal(p, code, got["errcode"], "%s %s: %v", method, path, got)
	require.NotContains(p, got, "room_id")
}

// create makes a room.
func (p *phone) create(req answer) string {
	p.Helper()
	if req == nil {
		req = answer{}
	}
	return p.must("POST", "v3/createRoom", req)["room_id"].(string)
}

// in3 is a path of a room in version 3 of the API.
func in3(room, rest string) string { return "v3/rooms/" + url.PathEscape(room) + "/" + rest }

// say sends a message and returns its event ID.
func (p *phone) say(room, txn, text string) string {
	p.Helper()
	return p.must("PUT", in3(room, "send/m.room.message/"+txn), answer{"msgtype": "m.text", "body": text})["event_id"].(string)
}

// sync syncs from where it ended before.
func (p *phone) sync(query string) answer {
	p.Helper()
	if p.since != "" {
		query += "&since=" + p.since
	}
	got := p.must("GET", "v3/sync?"+query, nil)
	p.since = got["next_batch"].(string)
	return got
}

// syncUntil syncs until a path leads somewhere in an answer, and returns what is there.
func (p *phone) syncUntil(path ...any) any {
	p.Helper()
	for {
		if found := p.sync("timeout=10000").at(path...); found != nil {
			return found
		}
	}
}

// syncUntilMember syncs until the room's state has a user as it should.
func (p *phone) syncUntilMember(room, user, membership string) {
	p.Helper()
	for p.must("GET", in3(room, "state/m.room.member/"+user), nil)["membership"] != membership {
		p.sync("timeout=10000")
	}
}

// types lists the types of events.
func types(events any) (list []string) {
	for _, e := range events.([]any) {
		list = append(list, e.(map[string]any)["type"].(string))
	}
	return list
}

// bodies lists the texts of messages among events.
func bodies(events any) (list []string) {
	for _, e := range events.([]any) {
		if text, ok := answer(e.(map[string]any)).at("content", "body").(string); ok {
			list = append(list, text)
		}
	}
	return list
}

// find returns the state event of a type and key.
func find(t testing.TB, events any, typ, key string) answer {
	t.Helper()
	for _, e := range events.([]any) {
		if e := answer(e.(map[string]any)); e["type"] == typ && e["state_key"] == key {
			return e
		}
	}
	require.Fail(t, "no such state", "%s %q", typ, key)
	return nil
}
