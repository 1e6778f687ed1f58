package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/acme/autocert"

	"example.org/mxfed"
)

// actAsProgram, when set, makes the test binary the program itself: see TestMain.
const actAsProgram = "HS_TEST_MAIN"

// testCA makes a folder with the ca.pem and ca.key of an authority.
func testCA(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	for file, block := range map[string]*pem.Block{"ca.pem": {Type: "CERTIFICATE", Bytes: der}, "ca.key": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600))
	}
	return dir
}

// freePorts are ports that nobody listened on a moment ago.
func freePorts(t testing.TB, n int) (ports []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		_, port, err := net.SplitHostPort(l.Addr().String())
		require.NoError(t, err)
		ports = append(ports, port)
	}
	return ports
}

// process is a server in a process of its own.
type process struct {
	*os.Process
	name   mxfed.ServerName
	base   string // of its client API, for phones
	exited chan struct{}
	err    error        // how it ended
	log    bytes.Buffer // to be read when it has ended
}

// startProcess starts a server with a folder, two ports and more flags, and waits until it is ready. It is killed when the
// test ends.
func startProcess(t testing.TB, ca, dir string, ports []string, flags ...string) *process {
	t.Helper()
	p := &process{name: mxfed.ServerName("127.0.0.1:" + ports[0]), base: "http://127.0.0.1:" + ports[1] + "/_matrix/client/", exited: make(chan struct{})}
	cmd := exec.Command(os.Args[0], append([]string{"-name", string(p.name), "-ip", "127.0.0.1", "-fed-port", ports[0], "-client-port", ports[1],
		"-dir", dir, "-ca-cert", filepath.Join(ca, "ca.pem"), "-ca-key", filepath.Join(ca, "ca.key"), "-networks", "127.0.0.0/8"}, flags...)...)
	cmd.Env = append(os.Environ(), actAsProgram+"=1")
	cmd.Stderr = &p.log
	require.NoError(t, cmd.Start())
	p.Process = cmd.Process
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.Kill()
		p.wait()
		if t.Failed() {
			t.Logf("%s:\n%s", p.name, p.log.String())
		}
	})
	waitReady(t, http.DefaultClient, p.base+"versions", p.exited)
	return p
}

// wait waits until the process has ended.
func (p *process) wait() error {
	<-p.exited
	return p.err
}

// waitReady waits until a server answers.
func waitReady(t testing.TB, web *http.Client, url string, exited <-chan struct{}) {
	t.Helper()
	for {
		if r, err := web.Get(url); err == nil {
			r.Body.Close()
			if r.StatusCode == 200 {
				return
			}
		}
		select {
		case <-exited:
			require.Fail(t, "the server has ended")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestReadme runs the commands of README.md as they are, but for the folder and the port numbers, which others may be using.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	ports := freePorts(t, 4)
	dir := filepath.Join(t.TempDir(), "hs")
	replace := strings.NewReplacer("/tmp/hs", dir, "8448", ports[0], "8449", ports[1], "8008", ports[2], "8009", ports[3])
	var blocks []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, replace.Replace(block[1]))
	}
	require.Len(t, blocks, 5)
	out, err := exec.Command("bash", "-euc", blocks[0]).CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, line := range strings.Split(strings.TrimSpace(blocks[1]), "\n") {
		server := exec.Command("bash", "-c", "exec "+line)
		server.Dir = dir
		require.NoError(t, server.Start())
		t.Cleanup(func() {
			server.Process.Signal(syscall.SIGTERM)
			server.Wait()
		})
	}
	waitReady(t, http.DefaultClient, "http://127.0.0.1:"+ports[2]+"/_matrix/client/versions", nil)
	waitReady(t, http.DefaultClient, "http://127.0.0.1:"+ports[3]+"/_matrix/client/versions", nil)
	out, err = exec.Command("bash", "-euo", "pipefail", "-c", strings.Join(blocks[2:], "")).CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
	_, shown, found := strings.Cut(string(out), `"invite_state"`)
	require.True(t, found, "Bob sees the invite")
	require.Contains(t, shown, `"Both sides"`)
	require.Contains(t, shown, `"body":"Hello"`, "Alice reads what Bob said")
	require.NotContains(t, string(out), "errcode")
}

// TestReadme_Files has the README name every file and every flag.
func TestReadme_Files(t *testing.T) {
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			require.True(t, strings.Contains(string(text), "`"+file+"`"), file)
		}
	}
	var help bytes.Buffer
	_, err = readOptions([]string{"-help"}, func(string) string { return "" }, &help)
	require.ErrorIs(t, err, flag.ErrHelp)
	for _, name := range regexp.MustCompile(`(?m)^  (-[a-z-]+)`).FindAllStringSubmatch(help.String(), -1) {
		require.True(t, strings.Contains(string(text), "`"+name[1]+"`"), name[1])
	}
	for _, name := range regexp.MustCompile(`HS_[A-Z_]+`).FindAllString(help.String(), -1) {
		require.True(t, strings.Contains(string(text), "`"+name+"`"), name)
	}
}

// TestRestart ends a server by SIGTERM, while a client waits for news, and starts it again.
func TestRestart(t *testing.T) {
	ca, dir, ports := testCA(t), filepath.Join(t.TempDir(), "new"), freePorts(t, 2)
	p := startProcess(t, ca, dir, ports)
	alice := newPhone(t, p.base, "alice")
	room := alice.create(answer{"name": "N"})
	alice.sync("")
	waiting := make(chan int)
	go func() {
		status, _, err := alice.request(context.Background(), "GET", "v3/sync?timeout=100000&since="+alice.since, nil)
		waiting <- status
		if err != nil {
			t.Error(err)
		}
	}()
	time.Sleep(100 * time.Millisecond) // for the request to arrive; if it is late, the test shows less
	require.NoError(t, p.Signal(syscall.SIGTERM))
	require.Equal(t, 200, <-waiting)
	require.NoError(t, p.wait())

	startProcess(t, ca, dir, ports)
	require.Equal(t, "N", alice.must("GET", in3(room, "state/m.room.name"), nil)["name"])
	alice.say(room, "1", "again")
	require.Equal(t, []string{"again"}, bodies(alice.sync("").at("rooms", "join", room, "timeline", "events")))
}

// TestProcesses has two servers with certificates of their own talk.
func TestProcesses(t *testing.T) {
	ca, ports := testCA(t), freePorts(t, 4)
	a := startProcess(t, ca, t.TempDir(), ports[:2])
	b := startProcess(t, ca, t.TempDir(), ports[2:])
	alice, bob := newPhone(t, a.base, "alice"), newPhone(t, b.base, "bob")
	room := alice.create(answer{"invite": []string{string(bob.user)}})
	bob.syncUntil("rooms", "invite", room)
	bob.must("POST", in3(room, "join"), nil)
	bob.say(room, "1", "hi")
	alice.syncUntilMember(room, string(bob.user), "join")

	roots, err := trustedRoots(filepath.Join(ca, "ca.pem"))
	require.NoError(t, err)
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}}
	r, err := web.Get("https://" + string(b.name) + "/_matrix/key/v2/server")
	require.NoError(t, err)
	defer r.Body.Close()
	require.Equal(t, 200, r.StatusCode)
	require.Equal(t, 2, r.ProtoMajor)
}

// TestIssuedTLS verifies certificates as other servers do.
func TestIssuedTLS(t *testing.T) {
	ca := testCA(t)
	roots, err := trustedRoots(filepath.Join(ca, "ca.pem"))
	require.NoError(t, err)
	for _, name := range []mxfed.ServerName{"a.example", "a.example:1", "127.0.0.1:1", "[::1]:1"} {
		config, err := issuedTLS(name, filepath.Join(ca, "ca.pem"), filepath.Join(ca, "ca.key"))
		require.NoError(t, err)
		leaf, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
		require.NoError(t, err)
		host := hostOf(string(name))
		_, err = leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: roots})
		require.NoError(t, err, name)
		_, err = leaf.Verify(x509.VerifyOptions{DNSName: "b.example", Roots: roots})
		require.Error(t, err, name)
	}
}

func TestReadOptions(t *testing.T) {
	env := map[string]string{"HS_NAME": "a.example", "HS_IP": "127.0.0.1", "HS_CLIENT_PORT": "1", "HS_FED_PORT": "2", "HS_DIR": "d",
		"HS_CA_CERT": "c", "HS_CA_KEY": "k", "HS_NETWORKS": "10.1.2.3/8,::1/128", "HS_DB": "postgres://x"}
	fromEnv, err := readOptions(nil, func(name string) string { return env[name] }, io.Discard)
	require.NoError(t, err)
	want := &options{name: "a.example", ip: "127.0.0.1", clientPort: "1", fedPort: "2", dir: "d", caCert: "c", caKey: "k", acmePort: "80",
		database: "postgres://x", networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}}
	require.Equal(t, want, fromEnv)
	flags := []string{"-name", "b.example", "-fed-port", "3", "-networks", ""}
	fromFlags, err := readOptions(flags, func(name string) string { return env[name] }, io.Discard)
	require.NoError(t, err)
	want.name, want.fedPort, want.networks = "b.example", "3", nil
	require.Equal(t, want, fromFlags)

	for name, args := range map[string]string{
		"-name is missing":      "-ca-cert c -ca-key k",
		"either":                "-name a.example",
		"or -acme":              "-name a.example -ca-cert c -ca-key k -acme https://x",
		"host names only":       "-name 127.0.0.1:1 -acme https://x",
		"unknown argument":      "-name a.example -ca-cert c -ca-key k more",
		"-networks":             "-name a.example -ca-cert c -ca-key k -networks 127.0.0.1",
		"flag provided but not": "-nonsense",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := readOptions(strings.Fields(args), func(string) string { return "" }, io.Discard)
			require.ErrorContains(t, err, name)
		})
	}
}

func TestRun_Fails(t *testing.T) {
	ca, ports := testCA(t), freePorts(t, 1)
	taken, err := net.Listen("tcp", "127.0.0.1:"+ports[0])
	require.NoError(t, err)
	defer taken.Close()
	for name, change := range map[string]func(*options){
		"in use":                func(o *options) { o.clientPort = ports[0] },
		"no certificate in":     func(o *options) { o.caCert = o.caKey },
		"certificate authority": func(o *options) { o.caKey = o.caCert },
		"name":                  func(o *options) { o.name = "not a name" },
	} {
		t.Run(name, func(t *testing.T) {
			o := &options{name: "127.0.0.1:1", ip: "127.0.0.1", clientPort: "0", fedPort: "0", dir: t.TempDir(),
				caCert: filepath.Join(ca, "ca.pem"), caKey: filepath.Join(ca, "ca.key")}
			change(o)
			discard, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			require.NoError(t, err)
			defer discard.Close()
			require.ErrorContains(t, run(t.Context(), o, discard), name)
		})
	}
}

func TestHostOf(t *testing.T) {
	for name, host := range map[string]string{"a.example": "a.example", "a.example:1": "a.example", "127.0.0.1": "127.0.0.1",
		"127.0.0.1:1": "127.0.0.1", "[::1]": "::1", "[::1]:1": "::1"} {
		require.Equal(t, host, hostOf(name), name)
	}
}

func TestNetworks(t *testing.T) {
	require.Nil(t, newResolver(nil, nil).AllowIP, "the library's own guard")
	r := newResolver(nil, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")})
	for ip, want := range map[string]bool{"127.1.2.3": true, "::ffff:127.0.0.1": true, "::1": true, "10.0.0.1": false, "8.8.8.8": false} {
		require.Equal(t, want, r.AllowIP(netip.MustParseAddr(ip)), ip)
	}
}

// TestCertificates keeps what two replicas share.
func TestCertificates(t *testing.T) {
	s := newWorld(t).start("a.example")
	cache := certificates{s.db}
	_, err := cache.Get(t.Context(), "x")
	require.ErrorIs(t, err, autocert.ErrCacheMiss)
	for _, data := range []string{"one", "two"} {
		require.NoError(t, cache.Put(t.Context(), "x", []byte(data)))
		got, err := cache.Get(t.Context(), "x")
		require.NoError(t, err)
		require.Equal(t, data, string(got))
	}
	require.NoError(t, cache.Delete(t.Context(), "x"))
	_, err = cache.Get(t.Context(), "x")
	require.ErrorIs(t, err, autocert.ErrCacheMiss)
}

func TestReporter(t *testing.T) {
	var log, terminal bytes.Buffer
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	require.NoError(t, err)
	defer file.Close()
	r := newReporter(slog.New(slog.NewTextHandler(&log, nil)), file)
	require.Nil(t, r.terminal, "a file is none")
	step := progress{Via: "a.example", Events: 7, Bytes: 7000}
	r.join("!r:a.example")(step)
	require.Empty(t, log.String(), "not yet")
	r.every = 0
	r.join("!r:a.example")(step)
	require.Contains(t, log.String(), "msg=joining room=!r:a.example via=a.example verified=7 dropped=0 bytes=7000")

	log.Reset()
	r.terminal = &terminal
	report := r.join("!r:a.example")
	report(step)
	require.Contains(t, terminal.String(), "joining !r:a.example via a.example: 7 events")
	require.Empty(t, log.String())
	step.Done, step.Dropped = true, 2
	report(step)
	require.Contains(t, log.String(), "msg=joined room=!r:a.example via=a.example verified=7 dropped=2")
	step.Err = errors.New("lost")
	r.join("!r:a.example")(step)
	require.Contains(t, log.String(), "error=lost")
}
