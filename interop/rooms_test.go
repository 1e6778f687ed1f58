//go:build unix

package interop

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestThreeServers has rooms of an mxfed server and all peers. Each makes one in turn, the next one joins through it, and the
// one after that through the one that has just joined.
func TestThreeServers(t *testing.T) {
	t.Parallel()
	at := newSite(t)
	names, starts := []string{"mxfed"}, []func(*testing.T, *site) *server{startHomeserver}
	for _, p := range peers {
		names, starts = append(names, p.String()), append(starts, p.start)
	}
	all := make([]member, len(names))
	for i, start := range starts {
		all[i].on, all[i].seen = taped(t, at, start)
	}
	for v := range roomVersions(1, 12) {
		for first, name := range names {
			t.Run("v"+string(v)+"/room of "+name, func(t *testing.T) {
				results.add(t, strings.Join(names[1:], ", "), "three servers", "room of "+name, v)
				order := slices.Concat(all[first:], all[:first])
				name := func(user string) string { return fmt.Sprintf("%s.v%s.%d", user, v, first) }
				for i := range order {
					order[i].phone = newPhone(t, order[i].on, name("user"))
				}
				gather(t, v, order, newPhone(t, order[1].on, name("guest")))
			})
		}
	}
}

// member is a user of a room, and what the user's server is asked.
type member struct {
	*phone
	on   *server
	seen *tape
}

// gather has the first one make a room and the others join, each through the server of the one before. They talk, and then the
// first one invites a guest of the second one's server, which all get to know with both servers' signatures.
func gather(t *testing.T, v mxfed.RoomVersion, all []member, guest *phone) {
	t.Helper()
	room := all[0].create(v, object{"preset": "public_chat"})
	for i, p := range all[1:] {
		p.must("POST", joiningThrough(room, all[i].on), nil)
		for j, other := range all[:i+1] {
			require.Len(t, other.seen.answers("v2/send_join", room), 1, "joins through server %d, after %d", j, i+1)
			other.see(room, p.phone, "join")
			p.see(room, other.phone, "join")
		}
	}
	for _, p := range all {
		text := "I am " + string(p.user)
		id := p.say(room, text)
		for _, other := range all {
			other.hear(id, text)
		}
	}
	all[0].must("POST", in(room, "invite"), about(guest))
	for _, p := range all {
		require.Equal(t, all[0].user, p.see(room, guest, "invite").Sender)
	}
	guest.must("POST", in(room, "leave"), object{})
	for _, p := range all {
		if p.on != guest.on { // which may have asked the first one, and be told nothing that it knows
			require.Equal(t, guest.user, p.see(room, guest, "leave").Sender)
		}
	}
}

// TestOriginGone has users join rooms whose first server is gone for good, through the one that is left. Their server has met
// the gone one before and so has its keys, without which nothing of a room's beginnings can be believed.
func TestOriginGone(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		play := func(direction string, stays, joins func(*testing.T, *site) *server) {
			t.Run(p.name+"/"+direction, func(t *testing.T) {
				t.Parallel()
				at := newSite(t)
				o := newOrphans(t, stays(t, at), stays(t, at), joins(t, at))
				if direction == ourUser {
					_, err := stranger(t, at, o.alice.on, o.alice.on.name)(o.rooms["1"]) // some notaries know only what they were asked for before
					require.NoError(t, err)
				}
				o.carol.on.stop()
				for v := range roomVersions(1, 12) {
					t.Run("v"+string(v), func(t *testing.T) {
						results.add(t, p.String(), "origin server gone", direction, v)
						o.join(t, v)
					})
				}
				if direction == ourUser {
					o.strangers(t, at, p)
				}
			})
		}
		play(ourUser, p.start, startHomeserver)
		play(theirUser, startHomeserver, p.start)
	}
}

// orphans are rooms that carol has made on a server that goes away, and that alice, on another one, is in as well.
type orphans struct {
	carol, alice, bob *phone
	rooms             map[mxfed.RoomVersion]mxfed.RoomID
	met               mxfed.RoomID // bob is in this one, before
}

func newOrphans(t *testing.T, gone, left, joiner *server) *orphans {
	t.Helper()
	public := object{"preset": "public_chat"}
	o := &orphans{newPhone(t, gone, "carol"), newPhone(t, left, "alice"), newPhone(t, joiner, "bob"), make(map[mxfed.RoomVersion]mxfed.RoomID), ""}
	for v := range roomVersions(1, 12) {
		o.rooms[v] = o.carol.create(v, public)
		o.alice.must("POST", joining(string(o.rooms[v]), gone), nil)
		o.alice.see(o.rooms[v], o.carol, "join")
	}
	o.met = o.carol.create("10", public)
	o.bob.must("POST", joining(string(o.met), gone), nil)
	o.bob.see(o.met, o.carol, "join")
	return o
}

// join has bob join one of the rooms.
func (o *orphans) join(t *testing.T, v mxfed.RoomVersion) {
	t.Helper()
	lend(t, o.alice, o.bob)
	room := o.rooms[v]
	o.bob.must("POST", joining(string(room), o.alice.on), nil)
	o.bob.see(room, o.carol, "join")
	o.bob.see(room, o.alice, "join")
	o.alice.see(room, o.bob, "join")
	o.bob.hear(o.alice.say(room, "here"), "here")
	o.alice.hear(o.bob.say(room, "there"), "there")
}

// lend has phones be of a part of a test, until that ends.
func lend(t *testing.T, phones ...*phone) {
	for _, p := range phones {
		owner := p.T
		p.T = t
		t.Cleanup(func() { p.T = owner })
	}
}

// strangers have two servers of the library join the rooms, which have never met the gone one. The one that asks the server that
// is left for keys gets in: that one may withhold keys, but cannot forge them. The other does not, as not even the create
// event can be verified. https://spec.matrix.org/v1.19/server-server-api/#querying-keys-through-another-server
func (o *orphans) strangers(t *testing.T, at *site, p *peer) {
	t.Helper()
	asks, doesNot := stranger(t, at, o.alice.on, o.alice.on.name), stranger(t, at, o.alice.on)
	for v := range roomVersions(1, 12) {
		t.Run("stranger/v"+string(v), func(t *testing.T) {
			results.add(t, p.String(), "origin server gone, keys from the other", ourUser, v)
			result, err := asks(o.rooms[v])
			require.NoError(t, err)
			require.Empty(t, result.Dropped)
			require.True(t, slices.ContainsFunc(result.State, func(e *mxfed.Event) bool { return e.Sender() == o.carol.user && e.Membership() == "join" }))
			_, err = doesNot(o.rooms[v])
			require.ErrorContains(t, err, "could not be verified: the room's m.room.create")
		})
	}
}

// stranger is a server of the library that asks notaries about all others, and joins rooms through one.
func stranger(t *testing.T, at *site, via *server, notaries ...mxfed.ServerName) (join func(mxfed.RoomID) (*mxfed.JoinResult, error)) {
	t.Helper()
	h, name := serveMemhost(t, at, notaries...)
	return func(room mxfed.RoomID) (*mxfed.JoinResult, error) {
		return h.Join(t.Context(), &mxfed.JoinRequest{Room: room, User: "@dave:" + mxfed.UserID(name), Via: []mxfed.ServerName{via.name}})
	}
}
