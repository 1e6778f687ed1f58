package mxfed_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"

	"example.org/mxfed"
)

// srvVector is a whole request of testdata/vectors/derived_requests.json: a good one, or one with a single defect.
type srvVector struct {
	Name        string
	API         string            `json:"api"`
	Version     mxfed.RoomVersion `json:"room_version"`
	Receiver    mxfed.ServerName  `json:"receiving_server"`
	Origin      mxfed.ServerName
	Room        mxfed.RoomID  `json:"path_room_id"`
	Event       mxfed.EventID `json:"path_event_id"`
	Body        json.RawMessage
	Status      int             `json:"expect_status"`
	Code        mxfed.ErrorCode `json:"expect_errcode"`
	Signature   string          `json:"expect_added_signature"`
	UnderPolicy string          `json:"only_under_policy"`
}

// Every whole request gets the status and errcode that the specification recommends; what is accepted comes back with
// exactly the signature that the rules give, what is not is never signed.
func TestRequestVectors(t *testing.T) {
	var file struct {
		Keys map[mxfed.ServerName]struct {
			ID   mxfed.KeyID `json:"key_id"`
			Seed string      `json:"seed_base64"`
		}
		Vectors []srvVector
	}
	require.NoError(t, srvReadVector("derived_requests.json", &file))
	require.Len(t, file.Vectors, 162)
	peers := make(map[mxfed.ServerName]*srvPeer)
	for name, k := range file.Keys {
		seed, err := base64.RawStdEncoding.DecodeString(k.Seed)
		require.NoError(t, err)
		p := &srvPeer{name: name, id: k.ID, key: ed25519.NewKeyFromSeed(seed)}
		p.signer, err = mxfed.NewSigner(name, k.ID, p.key)
		require.NoError(t, err)
		peers[name] = p
	}
	for _, v := range file.Vectors {
		t.Run(v.API+", version "+string(v.Version)+", "+v.Name, func(t *testing.T) { v.run(t, peers) })
	}
}

// run makes the request. The invited user's host is as strict as the specification recommends; the room of a join holds
// that very join already, so that nothing is left to decide but whether the request is well formed and genuine.
func (v *srvVector) run(t *testing.T, peers map[mxfed.ServerName]*srvPeer) {
	origin := peers[v.Origin]
	if origin == nil { // a server that only the origin's name is needed of
		origin = newSrvPeer(t, v.Origin)
	}
	counter := &srvCounter{Signer: peers[v.Receiver].key}
	s := newSrvSite(t, func(cfg *mxfed.Config) { v.configure(t, cfg, peers[v.Receiver], counter) })
	s.own, s.signing = peers[v.Receiver], counter
	for _, p := range peers {
		s.keys.add(p)
	}
	s.keys.add(origin)
	s.invited = func(_ context.Context, inv *mxfed.Invite) error { return inv.StateErr }
	s.accept = func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
		return &mxfed.SendJoinResponse{}, nil
	}
	endpoint, version, _ := strings.Cut(v.API, " ")
	w := s.send(t, origin, http.MethodPut, srvURI(version+"/"+endpoint, string(v.Room), string(v.Event)), v.Body)
	switch {
	case v.Status == http.StatusOK:
		require.Equal(t, v.Status, w.Code, "%s", w.Body)
		v.requireSignature(t, s.own, version, w.Body.Bytes())
		require.Equal(t, 1, len(s.invites)+len(s.joins))
		require.EqualValues(t, 1, counter.made.Load())
	case v.UnderPolicy != "": // the host's own refusal comes after signing
		requireSrvError(t, w, v.Status, v.Code)
		require.Len(t, s.invites, 1)
		require.Error(t, s.invites[0].StateErr)
	default:
		body := s.requireRefused(t, w, v.Status, v.Code)
		if v.Code == mxfed.ErrIncompatibleRoomVersion {
			require.NotEmpty(t, body["room_version"])
		}
	}
	if endpoint == "send_join" {
		v.requireNeither(t, s, origin)
	}
}

// requireNeither demands that the body of a join, good or bad, is taken neither for a leave nor for a knock.
func (v *srvVector) requireNeither(t *testing.T, s *srvSite, origin *srvPeer) {
	for _, membership := range []string{"leave", "knock"} {
		for _, endpoint := range srvSends[membership] {
			s.reset()
			w := s.send(t, origin, http.MethodPut, srvURI(endpoint, string(v.Room), string(v.Event)), v.Body)
			require.Contains(t, []int{400, 401, 403, 404, 413}, w.Code, "%s", w.Body)
			require.Zero(t, s.signing.made.Load(), "signed something")
			require.Empty(t, s.members, "the host was asked")
		}
	}
}

// configure makes the server under test the receiver, whose rooms are as run says.
func (v *srvVector) configure(t *testing.T, cfg *mxfed.Config, own *srvPeer, counter *srvCounter) {
	cfg.Rooms = mxfed.RoomSourceFunc(func(_ context.Context, id mxfed.RoomID, _ mxfed.RoomQuery) (*mxfed.Room, error) {
		if strings.HasPrefix(v.API, "invite") {
			return nil, mxfed.ErrNotFound
		}
		room := &mxfed.Room{Version: v.Version}
		if e, err := mxfed.ParseEvent(v.Version, v.Body); err == nil {
			room.Events = append(room.Events, e)
		}
		return room, nil
	})
	signer, err := mxfed.NewSigner(own.name, own.id, counter)
	require.NoError(t, err)
	cfg.Signers = []*mxfed.Signer{signer}
}

// requireSignature demands the receiver's signature and that everything else came back as it was sent.
func (v *srvVector) requireSignature(t *testing.T, own *srvPeer, version string, answer []byte) {
	if version == "v1" {
		var pair []json.RawMessage
		require.NoError(t, json.Unmarshal(answer, &pair))
		require.Len(t, pair, 2)
		require.Equal(t, "200", string(pair[0]))
		answer = pair[1]
	}
	event := srvObject(t, answer)["event"].(map[string]any)
	signatures := event["signatures"].(map[string]any)
	require.Equal(t, map[string]any{string(own.id): v.Signature}, signatures[string(own.name)])
	sent := srvObject(t, v.Body)
	if inner, ok := sent["event"].(map[string]any); ok {
		sent = inner
	}
	delete(signatures, string(own.name))
	if !strings.HasPrefix(v.API, "invite") {
		delete(sent, "unsigned")
	}
	require.Equal(t, sent, event)
}
