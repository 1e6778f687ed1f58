//go:build unix

package interop

import (
	"iter"
	"net/url"
	"strconv"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// reinvite lets bob go and come back each way that there is: he leaves, is thrown out, and turns an invite down.
func reinvite(w *world) {
	room := w.alice.create(w.version, nil)
	w.invite(room)
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)

	w.bob.must("POST", in(room, "leave"), object{})
	require.Equal(w, w.bob.user, w.alice.see(room, w.bob, "leave").Sender)
	w.comeBack(room)

	w.alice.must("POST", in(room, "kick"), about(w.bob))
	require.Equal(w, w.alice.user, w.bob.see(room, w.bob, "leave").Sender)
	w.bob.forbidden("POST", joining(string(room), w.here), nil)
	w.comeBack(room)

	w.bob.must("POST", in(room, "leave"), object{})
	w.alice.see(room, w.bob, "leave")
	w.inviteAgain(room)
	w.bob.must("POST", in(room, "leave"), object{})
	require.Equal(w, w.bob.user, w.alice.see(room, w.bob, "leave").Sender)
	w.comeBack(room)
}

// inviteAgain invites bob, who has been invited to the room before.
func (w *world) inviteAgain(room mxfed.RoomID) {
	w.Helper()
	delete(w.bob.invites, room)
	w.invite(room)
	w.alice.see(room, w.bob, "invite")
}

// comeBack lets bob in again.
func (w *world) comeBack(room mxfed.RoomID) {
	w.Helper()
	w.inviteAgain(room)
	w.bob.must("POST", joining(string(room), w.here), nil)
	w.talk(room)
}

// joiningThrough is the path of a join through one server after the other.
func joiningThrough(room mxfed.RoomID, via ...*server) string {
	query := make(url.Values)
	for _, s := range via {
		query.Add("server_name", string(s.name)) // older than via
		query.Add("via", string(s.name))
	}
	return "join/" + url.PathEscape(string(room)) + "?" + query.Encode()
}

// roomVersions are those from first to last.
func roomVersions(first, last int) iter.Seq[mxfed.RoomVersion] {
	return func(yield func(mxfed.RoomVersion) bool) {
		for v := first; v <= last && yield(mxfed.RoomVersion(strconv.Itoa(v))); {
			v++
		}
	}
}
