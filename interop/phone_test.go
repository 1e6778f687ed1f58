//go:build unix

package interop

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// phone is a user and the client that the user looks at. It remembers all that it was ever shown.
type phone struct {
	*testing.T
	on      *server
	user    mxfed.UserID
	token   string
	since   string
	txn     int
	events  map[mxfed.EventID]event
	members map[place]event          // the last one seen, in the order of sync
	invites map[mxfed.RoomID][]event // what is shown of a room together with an invite
	knocks  map[mxfed.RoomID][]event // or with a knock
}

// place is where a member event belongs.
type place struct {
	room mxfed.RoomID
	user mxfed.UserID
}

// event has the members that the tests look at.
type event struct {
	ID       mxfed.EventID `json:"event_id"`
	Type     string        `json:"type"`
	Sender   mxfed.UserID  `json:"sender"`
	StateKey *string       `json:"state_key"`
	Content  struct {
		Membership string       `json:"membership"`
		Reason     string       `json:"reason"`
		Body       string       `json:"body"`
		Authoriser mxfed.UserID `json:"join_authorised_via_users_server"`
	} `json:"content"`
}

// object is a JSON object to be sent.
type object = map[string]any

// answer has what the tests look at of any answer but that to a sync.
type answer struct {
	Code  string        `json:"errcode"`
	User  mxfed.UserID  `json:"user_id"`
	Token string        `json:"access_token"`
	Room  mxfed.RoomID  `json:"room_id"`
	Event mxfed.EventID `json:"event_id"`
}

// newPhone registers a user.
func newPhone(t *testing.T, on *server, name string) *phone {
	t.Helper()
	p := &phone{T: t, on: on, events: make(map[mxfed.EventID]event), members: make(map[place]event), invites: make(map[mxfed.RoomID][]event),
		knocks: make(map[mxfed.RoomID][]event)}
	got := p.must("POST", "register", object{"username": name, "password": "a long pass phrase", "auth": object{"type": "m.login.dummy"}})
	p.user, p.token = got.User, got.Token
	return p
}

// request makes a request, and decodes what is answered.
func (p *phone) request(method, path string, body, into any) (status int, text []byte) {
	p.Helper()
	var send io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		require.NoError(p, err)
		send = bytes.NewReader(encoded)
	}
	q, err := http.NewRequestWithContext(p.Context(), method, p.on.client+"/_matrix/client/v3/"+path, send)
	require.NoError(p, err)
	if p.token != "" {
		q.Header.Set("Authorization", "Bearer "+p.token)
	}
	r, err := http.DefaultClient.Do(q)
	require.NoError(p, err)
	defer r.Body.Close()
	text, err = io.ReadAll(r.Body)
	require.NoError(p, err)
	require.NoError(p, json.Unmarshal(text, into), "%s %s: %d %s", method, path, r.StatusCode, text)
	return r.StatusCode, text
}

// must makes a request that succeeds.
func (p *phone) must(method, path string, body any) *answer {
	p.Helper()
	got := new(answer)
	status, text := p.request(method, path, body, got)
	require.Equal(p, http.StatusOK, status, "%s, %s %s: %s", p.user, method, path, text)
	return got
}

// forbidden makes a request that is refused.
func (p *phone) forbidden(method, path string, body any) {
	p.Helper()
	p.fails(http.StatusForbidden, "M_FORBIDDEN", method, path, body)
}

// fails makes a request that fails.
func (p *phone) fails(status int, code, method, path string, body any) {
	p.Helper()
	got := new(answer)
	s, text := p.request(method, path, body, got)
	require.Equal(p, status, s, "%s, %s %s: %s", p.user, method, path, text)
	require.Equal(p, code, got.Code, "%s, %s %s: %s", p.user, method, path, text)
}

// create makes a room.
func (p *phone) create(version mxfed.RoomVersion, more object) mxfed.RoomID {
	p.Helper()
	body := object{"room_version": version, "preset": "private_chat"}
	for key, value := range more {
		body[key] = value
	}
	return p.must("POST", "createRoom", body).Room
}

// in is the path of something in a room.
func in(room mxfed.RoomID, rest string) string {
	return "rooms/" + url.PathEscape(string(room)) + "/" + rest
}

// joining is the path of a join of a room or alias through a server.
func joining(roomOrAlias string, via *server) string { return through("join/", roomOrAlias, via) }

// knocking is the path of a knock through a server.
func knocking(room mxfed.RoomID, via *server) string { return through("knock/", string(room), via) }

func through(path, roomOrAlias string, via *server) string {
	query := url.Values{"server_name": {string(via.name)}, "via": {string(via.name)}}
	return path + url.PathEscape(roomOrAlias) + "?" + query.Encode()
}

// about is the body of a request about another user.
func about(q *phone) object { return object{"user_id": q.user} }

// say sends a message.
func (p *phone) say(room mxfed.RoomID, text string) mxfed.EventID {
	p.Helper()
	p.txn++
	return p.must("PUT", in(room, "send/m.room.message/"+strconv.Itoa(p.txn)), object{"msgtype": "m.text", "body": text}).Event
}

// hear waits until a message is shown.
func (p *phone) hear(id mxfed.EventID, text string) {
	p.Helper()
	p.await(func() bool { return p.events[id].ID != "" })
	require.Equal(p, text, p.events[id].Content.Body)
}

// see waits until somebody's membership of a room is shown to be this, and returns the member event.
func (p *phone) see(room mxfed.RoomID, who *phone, membership string) (member event) {
	p.Helper()
	at := place{room, who.user}
	p.await(func() bool { return p.members[at].Content.Membership == membership })
	return p.members[at]
}

// patience is how long nothing of what is awaited may be heard of. It is far longer than anything takes, and there so that
// one flow that hangs does not end all others.
const patience = 3 * time.Minute

// await syncs until something is so.
func (p *phone) await(so func() bool) {
	p.Helper()
	for end := time.Now().Add(patience); !so(); p.sync() {
		require.True(p, time.Now().Before(end), "%s was never shown it", p.user)
	}
}

// syncRoom is one room in the answer to a sync.
type syncRoom struct {
	State    struct{ Events []event } `json:"state"`
	Timeline struct{ Events []event } `json:"timeline"`
	Invite   struct{ Events []event } `json:"invite_state"`
	Knock    struct{ Events []event } `json:"knock_state"`
}

// sync waits for something new. https://spec.matrix.org/v1.19/client-server-api/#syncing
func (p *phone) sync() {
	p.Helper()
	var got struct {
		Next  string                               `json:"next_batch"`
		Rooms map[string]map[mxfed.RoomID]syncRoom `json:"rooms"`
	}
	query := url.Values{"timeout": {"5000"}}
	if p.since != "" {
		query.Set("since", p.since)
	}
	status, text := p.request("GET", "sync?"+query.Encode(), nil, &got)
	require.Equal(p, http.StatusOK, status, "%s", text)
	p.since = got.Next
	for _, rooms := range got.Rooms {
		for id, room := range rooms {
			if room.Invite.Events != nil {
				p.invites[id] = room.Invite.Events
			}
			if room.Knock.Events != nil {
				p.knocks[id] = room.Knock.Events
			}
			for _, e := range append(room.State.Events, room.Timeline.Events...) {
				p.events[e.ID] = e
				if e.Type == "m.room.member" && e.StateKey != nil {
					p.members[place{id, mxfed.UserID(*e.StateKey)}] = e
				}
			}
		}
	}
}
