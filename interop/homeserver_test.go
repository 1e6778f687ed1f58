//go:build unix

package interop

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// buildHomeserver builds mxfed's side, and returns the path of the program.
func buildHomeserver(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "homeserver")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Dir = filepath.Join("..", "examples", "homeserver")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "build examples/homeserver: %s", out)
	return path
}

// startHomeserver runs mxfed's side until the test ends.
func startHomeserver(t *testing.T, path, dir string, ca *authority) *server {
	t.Helper()
	client, federation := freePorts(t)
	s := &server{name: mxfed.ServerName("127.0.0.1:" + federation), client: "http://127.0.0.1:" + client}
	p := &program{path: path, dir: within(t, dir, "homeserver"), args: []string{"-debug", "-name", string(s.name), "-ip", "127.0.0.1",
		"-client-port", client, "-fed-port", federation, "-ca-cert", ca.certFile, "-ca-key", ca.keyFile, "-networks", "127.0.0.0/8"}}
	p.start(t, ca, s.client+"/_matrix/client/versions")
	return s
}
