//go:build unix

package interop

import (
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
)

// crowdSize is how many members a big room has before anybody joins it from elsewhere.
const crowdSize = 2000

// TestBigRoom has a server that has joined a room of 2,000 members let in another one, which is shown all of them.
func TestBigRoom(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			at := newSite(t)
			theirs, ofTheirs := taped(t, at, p.start)
			ours, ofOurs := taped(t, at, startHomeserver)
			play := func(direction string, here, there *server, ofHere *tape) {
				t.Run(direction, func(t *testing.T) {
					const v = "12"
					results.add(t, p.String(), "room of 2,000 members", direction, v)
					users := "." + direction[:3]
					newCrowd(t, at, v, crowdSize).let(t, newPhone(t, here, "alice"+users), newPhone(t, there, "bob"+users), ofHere)
				})
			}
			play(ourUser, theirs, ours, ofTheirs)
			play(theirUser, ours, theirs, ofOurs)
		})
	}
}

// crowd is a room with many members, all of one server.
type crowd struct {
	server
	room  mxfed.RoomID
	users []mxfed.UserID
}

// newCrowd makes a public room.
func newCrowd(t *testing.T, at *site, v mxfed.RoomVersion, size int) *crowd {
	t.Helper()
	h, name := serveMemhost(t, at)
	c := &crowd{server: server{name: name}}
	for i := range size {
		c.users = append(c.users, mxfed.UserID(fmt.Sprintf("@user%d:%s", i, c.name)))
	}
	var err error
	c.room, err = h.CreateRoom(t.Context(), v, c.users[0], memhost.State("m.room.join_rules", "", `{"join_rule":"public"}`))
	require.NoError(t, err)
	for _, user := range c.users[1:] {
		key := string(user)
		_, err := h.Send(t.Context(), &mxfed.Draft{Room: c.room, Type: "m.room.member", StateKey: &key, Sender: user, Content: json.RawMessage(`{"membership":"join"}`)})
		require.NoError(t, err)
	}
	return c
}

// let lets alice join the room, and bob through her server.
func (c *crowd) let(t *testing.T, alice, bob *phone, ofHere *tape) {
	t.Helper()
	alice.joins(c.room, &c.server)
	alice.await(func() bool { return alice.sees(c) })
	began := time.Now()
	bob.joins(c.room, alice.on)
	joined := time.Since(began)
	bob.await(func() bool { return bob.sees(c) })
	all := time.Since(began)
	bytes := 0
	for _, endpoint := range []string{"v2/send_join", "v1/state", "v1/state_ids"} {
		for _, x := range ofHere.about(endpoint, c.room) {
			bytes += len(x.Response)
		}
	}
	t.Logf("%d members: bob is in the room after %v and sees all after %v; his server was sent %d bytes", len(c.users)+2, joined, all, bytes)
	require.Equal(t, []string{"200"}, ofHere.answers("v2/send_join", c.room))
	bob.see(c.room, alice, "join")
	alice.see(c.room, bob, "join")
	bob.hear(alice.say(c.room, "here"), "here")
	alice.hear(bob.say(c.room, "there"), "there")
}

// joins asks for a join that may take long: some servers do not let their clients wait for the end then.
func (p *phone) joins(room mxfed.RoomID, via *server) {
	p.Helper()
	status, text := p.request("POST", joining(string(room), via), nil, new(answer))
	require.Contains(p, []int{http.StatusOK, http.StatusAccepted}, status, "%s", text)
}

// sees tells whether a user has been shown everybody.
func (p *phone) sees(c *crowd) bool {
	for _, user := range c.users {
		if p.members[place{c.room, user}].Content.Membership != "join" {
			return false
		}
	}
	return true
}
