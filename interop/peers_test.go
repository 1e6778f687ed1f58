//go:build unix

package interop

import (
	"flag"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// peer is a homeserver that mxfed is tested with.
type peer struct {
	name, version string
	start         func(t *testing.T, at *site) *server // until the test ends
	slow          bool                                 // to start: one has to do for all room versions
	lacks         []feature                            // TestNotOffered shows that it does
}

var (
	dendrite = &peer{name: "Dendrite", version: dendriteVersion, start: startDendrite,
		lacks: []feature{servesKnocks, knocks, retracts, omits, joinsPartly, blocking, oldPreview}}
	synapse = &peer{name: "Synapse", version: synapseVersion, start: startSynapse, slow: true, lacks: []feature{retracts}}
	peers   = []*peer{dendrite, synapse} // in the order of the report
)

func (p *peer) String() string { return p.name + " " + p.version }

// installing is held by tests that see to it that a peer is there.
var installing sync.Mutex

// feature is something that not every peer has.
type feature string

const (
	servesKnocks feature = "endpoints for knocking servers"
	knocks       feature = "knocks of its users"
	retracts     feature = "telling a room of a user who knocks no longer"
	omits        feature = "answers to joins without members"
	joinsPartly  feature = "joins without members"
)

// meet returns what gives each part of a test a peer and an mxfed server. They are the part's own, unless the peer is slow to
// start: after some errors a server does not call another one for a while.
func (p *peer) meet(t *testing.T) func(part *testing.T) (theirs, ours *server) {
	t.Helper()
	pair := func(t *testing.T) (theirs, ours *server) {
		t.Helper()
		at := newSite(t)
		return p.start(t, at), startHomeserver(t, at)
	}
	switch {
	case *record != "":
		return p.meetRecorded
	case !p.slow:
		return pair
	}
	theirs, ours := pair(t)
	return func(*testing.T) (*server, *server) { return theirs, ours }
}

var record = flag.String("record", "", "folder to record what servers say to each other in TestFlows in")

// meetRecorded makes a file of all that a peer and an mxfed server say to each other.
func (p *peer) meetRecorded(t *testing.T) (theirs, ours *server) {
	t.Helper()
	at := newSite(t)
	theirs, ofTheirs := taped(t, at, p.start)
	ours, ofOurs := taped(t, at, startHomeserver)
	name := strings.ToLower(p.name + "-" + filepath.Base(t.Name()) + ".jsonl")
	t.Cleanup(func() { write(t, filepath.Join(*record, name), ofTheirs, ofOurs) })
	return theirs, ours
}
