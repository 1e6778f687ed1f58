// Package interop tests package mxfed against other homeservers. It holds nothing but tests: they start real servers as
// processes on the loopback interface, which verify each other's certificates against an authority made for the test, and
// drive them over the client API. examples/homeserver is mxfed's side.
//
//	CI=true go test ./... -v
//
// prints at its end what has passed, by peer, flow and room version, and fails if README.md says something else; with
// -update it writes that instead. The first run on a machine builds Dendrite, which takes some minutes, Go's module proxy and
// a C compiler, installs Synapse, which takes Python and its package index, and keeps both in the user's cache folder. With
// -record FOLDER, TestFlows writes down all that servers say to each other: testdata/recordings is made of that. The servers
// write a lot, and wait for the disk: with TMPDIR=/dev/shm and 200 MB in it, all of it takes half as long.
//
// flows_test.go says what users do, TestFlows who plays them; further_test.go and omitted_test.go have more of that.
// faults_test.go has servers that refuse, rooms_test.go and crowd_test.go rooms of several servers and of many members,
// library_test.go servers of the library in the test itself. peers_test.go lists the peers; dendrite_test.go, synapse_test.go
// and homeserver_test.go know how to get and start each server, process_test.go how to keep one, front_test.go and
// tape_test.go how to watch it, phone_test.go how to be its client, report_test.go and readme_test.go how to count.
package interop
