package mxfed

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ed25519"
)

// This file compares this package with another implementation of the same specification, on random rooms of all versions:
// what both accept has the same ID, hashes and signatures, and what both judge has the same verdict, apart from the cases
// of a written list, oracleDifferences, each with the rule that this package follows. MXFED_ORACLE_CASES is the number of
// cases to try.

// oracleCasesPerRoom is how many events are tried in one random room.
const oracleCasesPerRoom = 20

// oracleCase is one event in one state, as both see it.
type oracleCase struct {
	number int
	room   *oracleRoom
	e      *Event // as the room goes on with it: redacted if its hash is wrong
	theirs gomatrixserverlib.PDU

	bytes      bool // both read the same bytes
	authorised bool
	ours, peer error // the verdicts
}

func TestOracle(t *testing.T) {
	cases := 5000
	if s := os.Getenv("MXFED_ORACLE_CASES"); s != "" {
		var err error
		cases, err = strconv.Atoi(s)
		require.NoError(t, err)
	}
	signers := make(map[ServerName]*Signer)
	for _, name := range []ServerName{"a.example", "b.example", "c.example:8448", "id.example"} {
		signers[name] = eventSeededSigner(t, name)
	}
	used := make([]int, len(oracleDifferences))
	var judged, allowed, compared int
	for number := 0; number < cases; number += oracleCasesPerRoom {
		room := newOracleRoom(t, uint64(number/oracleCasesPerRoom), signers)
		for i := range min(oracleCasesPerRoom, cases-number) {
			c := room.tryNext(number + i)
			if c == nil {
				continue
			}
			judged++
			if c.bytes {
				compared++
			}
			if c.ours == nil {
				allowed++
			}
			if (c.ours == nil) != (c.peer == nil) {
				c.explain(t, used)
			} else if c.e.isState && c.ours == nil && c.bytes && c.e.typ != typeCreate {
				room.set(c.e)
			}
		}
	}
	t.Logf("%d cases: %d judged by both, %d allowed, %d compared byte for byte", cases, judged, allowed, compared)
	require.Greater(t, judged, cases*9/10)
	require.Greater(t, compared, cases*9/10)
	require.Greater(t, allowed, cases/5)
	for i, d := range oracleDifferences {
		t.Logf("%6d %s", used[i], d.rule)
		require.True(t, used[i] > 0 || cases < 100_000, "nothing needs the entry: %s", d.rule)
	}
}

// tryNext makes the next event of the room and has both read and judge it; nil if one of them does not accept its form.
func (r *oracleRoom) tryNext(number int) *oracleCase {
	text := r.scrambled(nil, r.pdu(r.next()))
	e, err := ParseEvent(r.rules.version, text)
	if err != nil {
		return nil
	}
	c := &oracleCase{number: number, room: r, e: e}
	if c.theirs, err = oracleParse(r.rules.version, text); err != nil {
		return nil
	}
	c.compare()
	c.e = eventSigned(r.t, c.e, r.signers[c.e.sender.Server()])
	if s := r.signers[c.e.authoriserID().Server()]; s != nil && r.chance(85) {
		c.e = eventSigned(r.t, c.e, s)
	}
	if c.e.rules.eventID == idGiven {
		c.e = eventSigned(r.t, c.e, r.signers[c.e.id.server()])
	}
	c.authorised, err = new(eventParser).checkSignatures(c.e, func(server ServerName, _ KeyID) ed25519.PublicKey {
		return oraclePublic(r.signers[server])
	})
	require.NoError(r.t, err)
	c.ours = authorise(c.e, r.lookUp, c.authorised)
	c.peer = c.oracleVerdict()
	return c
}

func oracleParse(v RoomVersion, text []byte) (pdu gomatrixserverlib.PDU, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("no verdict: %v", p)
		}
	}()
	return gomatrixserverlib.MustGetRoomVersion(gomatrixserverlib.RoomVersion(v)).NewEventFromUntrustedJSON(text)
}

// oracleVerdict asks the other implementation whether the event is allowed.
func (c *oracleCase) oracleVerdict() (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("no verdict: %v", p)
		}
	}()
	var state []gomatrixserverlib.PDU
	for _, e := range c.room.state {
		if c.room.peers[e] == nil {
			c.room.peers[e], err = oracleParse(c.room.rules.version, []byte(e.text))
			require.NoError(c.room.t, err, "%s", e.text)
		}
		state = append(state, c.room.peers[e])
	}
	provider, err := gomatrixserverlib.NewAuthEvents(state)
	require.NoError(c.room.t, err)
	return gomatrixserverlib.Allowed(c.theirs, provider, func(_ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
		return spec.NewUserID(string(sender), true)
	})
}

// compare checks that ID, room, hashes and signatures are the same, and goes on with the redacted event if the content hash
// is wrong. It leaves out cases in which the bytes themselves are read differently.
func (c *oracleCase) compare() {
	t, signer := c.room.t, c.room.signers["a.example"]
	c.bytes = !slices.ContainsFunc(oracleByteDifferences, func(d oracleByteDifference) bool { return d.when(c) })
	if c.bytes {
		require.Equal(t, c.e.hashOK, !c.theirs.Redacted(), "content hash of %s", c.e.text)
	}
	if !c.e.hashOK {
		cut, err := c.e.redact()
		require.NoError(t, err)
		c.e = cut
	}
	if !c.bytes {
		return
	}
	require.Equal(t, string(c.e.id), c.theirs.EventID(), "%s", c.e.text)
	require.Equal(t, string(c.e.room), c.theirs.RoomID().String())
	require.Equal(t, string(c.e.text), string(c.theirs.JSON()))
	theirs, err := oracleParse(c.e.rules.version, []byte(c.e.text))
	require.NoError(t, err)
	theirs = theirs.Sign(string(signer.name), gomatrixserverlib.KeyID(signer.id), signer.key.(ed25519.PrivateKey))
	require.Equal(t, string(eventSigned(t, c.e, signer).text), string(theirs.JSON()))
}

// explain finds the entry of the list that the case belongs to, or fails.
func (c *oracleCase) explain(t *testing.T, used []int) {
	t.Helper()
	for i, d := range oracleDifferences {
		if d.allowed == (c.ours == nil) && d.when(c) {
			used[i]++
			return
		}
	}
	var state []json.RawMessage
	for _, e := range c.room.state {
		state = append(state, e.JSON())
	}
	text, err := json.Marshal(map[string]any{"case": c.number, "room_version": c.room.rules.version, "state": state, "event": c.e,
		"ours": fmt.Sprint(c.ours), "theirs": fmt.Sprint(c.peer)})
	require.NoError(t, err)
	t.Errorf("verdicts differ outside the list:\n%s", text)
}
