// Package interop tests package mxfed against other homeservers. It holds nothing but tests: they start real servers as
// processes on the loopback interface, which verify each other's certificates against an authority made for the test, and
// drive them over the client API. examples/homeserver is mxfed's side.
//
//	CI=true go test ./... -v
//
// prints at its end what has passed, by peer, flow and room version. The first run on a machine builds Dendrite, which takes
// some minutes, Go's module proxy and a C compiler, and keeps it in the user's cache folder.
//
// flows_test.go says what users do, TestFlows who plays them. dendrite_test.go and homeserver_test.go know how to get and
// start each server, process_test.go how to keep one, phone_test.go how to be its client, report_test.go how to count.
package interop
