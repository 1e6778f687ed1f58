//go:build unix

package interop

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

const synapseVersion = "1.163.2"

// installSynapse returns the path of a Python that has it, in a virtual environment that is made once and kept in the user's
// cache folder. Its paths are absolute, so it is made where it stays; a link to it appears when it is complete.
func installSynapse(t *testing.T) string {
	t.Helper()
	installing.Lock()
	defer installing.Unlock()
	cache, err := os.UserCacheDir()
	require.NoError(t, err)
	link := filepath.Join(cache, "mxfed-interop", "synapse-"+synapseVersion)
	python := filepath.Join(link, "bin", "python")
	if _, err := os.Stat(python); err == nil {
		return python
	}
	if exec.Command("python3", "-c", "import sys, ensurepip; sys.exit(sys.version_info < (3, 10))").Run() != nil {
		lacks(t, "Synapse runs in Python 3.10 or later: install it (apt-get install python3 python3-venv)")
	}
	require.NoError(t, os.MkdirAll(filepath.Dir(link), 0o700))
	dir, err := os.MkdirTemp(filepath.Dir(link), filepath.Base(link)+"-") // others may be at it as well
	require.NoError(t, err)
	t.Logf("installing Synapse %s into %s, once", synapseVersion, dir)
	for _, args := range [][]string{{"python3", "-m", "venv", dir}, {filepath.Join(dir, "bin", "pip"), "install", "--quiet", "--prefer-binary", "matrix-synapse==" + synapseVersion}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			os.RemoveAll(dir)
		}
		require.NoError(t, err, "%s: %s", args, out)
	}
	if err = os.Symlink(dir, link); errors.Is(err, fs.ErrExist) { // others were faster
		err = os.RemoveAll(dir)
	}
	require.NoError(t, err)
	return python
}

// startSynapse runs Synapse until the test ends. It verifies certificates, and trusts those of the test's authority only.
func startSynapse(t *testing.T, at *site) *server {
	t.Helper()
	python := installSynapse(t)
	s, client, federation := at.server(t)
	dir := at.folder(t, "synapse")
	certFile, keyFile := at.ca.issue(t, dir)
	seed := make([]byte, 32)
	_, _ = rand.Read(seed) // never fails
	require.NoError(t, os.WriteFile(filepath.Join(dir, "signing.key"), []byte("ed25519 test "+base64.RawStdEncoding.EncodeToString(seed)+"\n"), 0o600))
	settings := synapseConfig(s.name, client, federation)
	settings["tls_certificate_path"], settings["tls_private_key_path"] = certFile, keyFile
	settings["federation_custom_ca_list"] = []string{at.ca.certFile}
	config, err := json.Marshal(settings) // JSON is YAML
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "synapse.yaml"), config, 0o600))
	p := &program{path: python, dir: dir, args: []string{"-m", "synapse.app.homeserver", "-c", "synapse.yaml"}}
	p.start(t, s, at.ca, s.client+"/_matrix/client/versions", s.federation+"/_matrix/key/v2/server")
	return s
}

// synapseConfig keeps everything in the folder that the server is started in. It says nothing of certificates.
func synapseConfig(name mxfed.ServerName, client, federation string) object {
	listener := func(port, resource string, tls bool) object {
		number, _ := strconv.Atoi(port)
		return object{"port": number, "tls": tls, "type": "http", "bind_addresses": []string{"127.0.0.1"}, "resources": []object{{"names": []string{resource}}}}
	}
	none := []string{}
	config := object{
		"server_name":                   name,
		"report_stats":                  false,
		"signing_key_path":              "signing.key",
		"listeners":                     []object{listener(client, "client", false), listener(federation, "federation", true)},
		"database":                      object{"name": "sqlite3", "args": object{"database": "synapse.db"}},
		"trusted_key_servers":           none, // the default is a public server
		"ip_range_blacklist":            none, // the defaults deny the loopback interface
		"federation_ip_range_blacklist": none,
		"enable_registration":           true,
		"enable_registration_without_verification": true,
		"bcrypt_rounds":     4,
		"enable_media_repo": false,
		"presence":          object{"enabled": false},
		"stats":             object{"enabled": false},
		"user_directory":    object{"enabled": false},
		"federation": object{ // milliseconds
			"client_timeout":                 20_000,
			"max_short_retry_delay":          100,
			"max_long_retry_delay":           1_000,
			"destination_min_retry_interval": 1, // a server that has failed once is to be asked again
			"destination_max_retry_interval": 1,
		},
	}
	// The limits are made for people, and for servers that have more time.
	often := object{"per_second": 1000, "burst_count": 10000}
	for _, limit := range []string{"rc_message", "rc_registration", "rc_joins_per_room", "rc_room_creation"} {
		config[limit] = often
	}
	config["rc_joins"] = object{"local": often, "remote": often}
	config["rc_invites"] = object{"per_room": often, "per_user": often, "per_issuer": often}
	config["rc_federation"] = object{"sleep_limit": 10000, "reject_limit": 10000, "concurrent": 100}
	return config
}
