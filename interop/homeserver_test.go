//go:build unix

package interop

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// buildHomeserver builds mxfed's side, once for all tests, and returns the path of the program.
var buildHomeserver = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(scratch, "homeserver")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Dir = filepath.Join("..", "examples", "homeserver")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build examples/homeserver: %w: %s", err, out)
	}
	return path, nil
})

// startHomeserver runs mxfed's side until the test ends.
func startHomeserver(t *testing.T, at *site) *server {
	t.Helper()
	path, err := buildHomeserver()
	require.NoError(t, err)
	s, client, federation := at.server(t)
	p := &program{path: path, dir: at.folder(t, "homeserver"), args: []string{"-debug", "-name", string(s.name), "-ip", "127.0.0.1",
		"-client-port", client, "-fed-port", federation, "-ca-cert", at.ca.certFile, "-ca-key", at.ca.keyFile, "-networks", "127.0.0.0/8"}}
	p.start(t, s, at.ca, s.client+"/_matrix/client/versions")
	return s
}
