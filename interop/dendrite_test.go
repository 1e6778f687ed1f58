//go:build unix

package interop

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

const (
	dendriteModule  = "github.com/element-hq/dendrite"
	dendriteVersion = "0.15.2"
)

// buildDendrite returns the path of the program, which is built once and kept in the user's cache folder. Its database is
// written in C. Everything but a missing compiler fails the test: a machine without a network is not to pass unseen.
func buildDendrite(t *testing.T) string {
	t.Helper()
	installing.Lock()
	defer installing.Unlock()
	cache, err := os.UserCacheDir()
	require.NoError(t, err)
	path := filepath.Join(cache, "mxfed-interop", "dendrite-"+dendriteVersion)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if _, err := exec.LookPath("gcc"); err != nil {
		lacks(t, "Dendrite is built with gcc: install it (apt-get install gcc libc6-dev)")
	}
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
	dir, err := os.MkdirTemp(filepath.Dir(path), "build-") // others may be building as well
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	t.Logf("building Dendrite %s into %s, once", dendriteVersion, path)
	built := filepath.Join(dir, "dendrite")
	build := exec.Command("go", "build", "-o", built, "./cmd/dendrite")
	build.Dir = download(t, dendriteModule+"@v"+dendriteVersion)
	build.Env = append(os.Environ(), "CGO_ENABLED=1", "GOWORK=off", "GOFLAGS=")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "build Dendrite: %s", out)
	require.NoError(t, os.Rename(built, path))
	return path
}

// download gets a module, checked by Go's checksum database, and returns its folder. What is built in there uses the very
// dependencies that its own go.sum names.
func download(t *testing.T, module string) string {
	t.Helper()
	get := exec.Command("go", "mod", "download", "-json", module)
	get.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	out, err := get.Output() // with -json errors are there too
	var got struct{ Dir, Error string }
	require.NoError(t, errors.Join(err, json.Unmarshal(out, &got)), "download %s: %s", module, out)
	require.Empty(t, got.Error)
	return got.Dir
}

// startDendrite runs Dendrite until the test ends. It verifies certificates, and trusts those of the test's authority.
func startDendrite(t *testing.T, at *site) *server {
	t.Helper()
	path := buildDendrite(t)
	s, client, federation := at.server(t)
	dir := at.folder(t, "dendrite")
	certFile, keyFile := at.ca.issue(t, dir)
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails
	writePEM(t, filepath.Join(dir, "signing.pem"), &pem.Block{Type: "MATRIX PRIVATE KEY", Headers: map[string]string{"Key-ID": "ed25519:test"}, Bytes: seed})
	config, err := json.Marshal(dendriteConfig(s.name)) // JSON is YAML
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "dendrite.yaml"), config, 0o600))
	p := &program{path: path, dir: dir, env: []string{"SSL_CERT_FILE=" + at.ca.certFile},
		args: []string{"-config", "dendrite.yaml", "-really-enable-open-registration", "-http-bind-address", "127.0.0.1:" + client,
			"-https-bind-address", "127.0.0.1:" + federation, "-tls-cert", certFile, "-tls-key", keyFile}}
	p.start(t, s, at.ca, s.client+"/_matrix/client/versions", s.federation+"/_matrix/key/v2/server")
	return s
}

// dendriteConfig keeps everything in the folder that the server is started in.
func dendriteConfig(name mxfed.ServerName) any {
	type object = map[string]any
	none := []string{}
	database := func(part string) object { return object{"connection_string": "file:" + part + ".db"} }
	return object{
		"version": 2,
		"global": object{
			"server_name":                    name,
			"private_key":                    "signing.pem",
			"trusted_third_party_id_servers": none,
			"jetstream":                      object{"in_memory": true, "storage_path": "./"},
		},
		"client_api": object{
			"registration_disabled": false,
			"rate_limiting":         object{"enabled": false},
		},
		"federation_api": object{
			"database":                database("federation"),
			"deny_networks":           none, // the default denies the loopback interface
			"allow_networks":          none,
			"key_perspectives":        none,
			"prefer_direct_fetch":     true,
			"disable_http_keepalives": true,
			"send_max_retries":        4,
		},
		"key_server":  object{"database": database("keys")},
		"media_api":   object{"database": database("media"), "base_path": "media"},
		"mscs":        object{"database": database("mscs"), "mscs": none},
		"relay_api":   object{"database": database("relay")},
		"room_server": object{"database": database("rooms")},
		"sync_api":    object{"database": database("sync"), "search": object{"enabled": false}},
		"user_api":    object{"account_database": database("accounts"), "bcrypt_cost": 4},
		"logging":     []object{{"type": "std", "level": "info"}},
	}
}
