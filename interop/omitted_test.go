//go:build unix

package interop

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestOmittedMembers joins rooms of which the answer tells most members only later: the joining server asks for the whole
// state then. https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
func TestOmittedMembers(t *testing.T) {
	t.Parallel()
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			at := newSite(t)
			theirs, ofTheirs := taped(t, at, p.start)
			ours, ofOurs := taped(t, at, startHomeserver)
			for v := range roomVersions(1, 12) {
				play := func(direction string, needs feature, here, there *server, ofHere *tape) {
					t.Run("v"+string(v)+"/"+direction, func(t *testing.T) {
						asked, omitted := true, !slices.Contains(p.lacks, needs)
						if omitted {
							results.add(t, p.String(), "join without members", direction, v)
						} else { // it does not ask for that, or answers with all members: both are as good
							asked = here == theirs
						}
						w := &world{T: t, peer: p, version: v, here: here, there: there, users: ".v" + string(v)}
						w.alice, w.bob = w.newUser(here, "alice"), w.newUser(there, "bob")
						w.joinCrowd(ofHere, asked, omitted)
					})
				}
				play(ourUser, omits, theirs, ours, ofTheirs)
				play(theirUser, joinsPartly, ours, theirs, ofOurs)
			}
		})
	}
}

// joinCrowd lets bob join a room of three other members, of which his server may be told when he is in. asked and omitted
// are about that.
func (w *world) joinCrowd(ofHere *tape, asked, omitted bool) {
	w.Helper()
	room := w.alice.create(w.version, object{"preset": "public_chat", "name": "Crowd"}) // members give their names to one that has none
	carol, dave := w.newUser(w.here, "carol"), w.newUser(w.here, "dave")
	carol.must("POST", joining(string(room), w.here), nil)
	dave.must("POST", joining(string(room), w.here), nil)
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
	w.bob.see(room, carol, "join")
	w.bob.see(room, dave, "join")

	joins := ofHere.about("v2/send_join", room)
	require.Len(w, joins, 1)
	require.Equal(w, asked, joins[0].query(w.T).Get("omit_members") == "true", joins[0].URI)
	members, told := joins[0].members(w.T)
	require.Equal(w, omitted, told)
	require.Equal(w, !omitted, slices.Contains(members, carol.user))
	require.Equal(w, !omitted, slices.Contains(members, dave.user))
	require.Equal(w, omitted, len(ofHere.about("v1/state", room))+len(ofHere.about("v1/state_ids", room)) > 0)

	erin := w.newUser(w.there, "erin") // who joins on bob's server, which knows the room by now
	erin.must("POST", joining(string(room), w.here), nil)
	for _, p := range []*phone{w.alice, w.bob, carol, dave} {
		erin.see(room, p, "join")
	}
	dave.see(room, erin, "join")
	require.Len(w, ofHere.about("v2/send_join", room), 1)
}

func (x *exchange) query(t *testing.T) url.Values {
	t.Helper()
	u, err := url.Parse(x.URI)
	require.NoError(t, err)
	return u.Query()
}

// members are the joined members that an answer to a join holds, and whether it says that it leaves some out.
func (x *exchange) members(t *testing.T) (users []mxfed.UserID, omitted bool) {
	t.Helper()
	require.Equal(t, http.StatusOK, x.Status)
	var answer struct {
		State   []event `json:"state"`
		Omitted bool    `json:"members_omitted"`
	}
	require.NoError(t, json.Unmarshal([]byte(x.Response), &answer))
	for _, e := range answer.State {
		if e.Type == "m.room.member" && e.Content.Membership == "join" {
			users = append(users, mxfed.UserID(*e.StateKey))
		}
	}
	return users, answer.Omitted
}
