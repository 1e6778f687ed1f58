//go:build unix

package interop

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// server is a homeserver in a process of its own.
type server struct {
	name       mxfed.ServerName
	client     string // where its client API is: http://127.0.0.1:PORT
	federation string // where its own federation API is: https://127.0.0.1:PORT
	log        string // file
	tape       *tape  // of what stands before it, if that records
	stop       func() // ends it before the test does, and returns when it has ended
}

// site is where a server is to be.
type site struct {
	dir   string           // of all servers of a test
	ca    *authority       // whose certificates they trust
	front mxfed.ServerName // what stands before it, and gives it its name, or ""
}

// newSite is a site for the servers of a test, which may share it.
func newSite(t *testing.T) *site {
	t.Helper()
	dir := newFolder(t)
	return &site{dir: dir, ca: newAuthority(t, dir)}
}

// server chooses ports for clients and for other servers, and with them a name.
func (at *site) server(t *testing.T) (s *server, client, federation string) {
	t.Helper()
	client, federation = freePorts(t)
	s = &server{name: at.front, client: "http://127.0.0.1:" + client, federation: "https://127.0.0.1:" + federation}
	if s.name == "" {
		s.name = mxfed.ServerName("127.0.0.1:" + federation)
	}
	return s, client, federation
}

// folder makes a folder for a server of this kind.
func (at *site) folder(t *testing.T, kind string) string {
	t.Helper()
	dir, err := os.MkdirTemp(at.dir, kind+"-")
	require.NoError(t, err)
	return dir
}

// program says how to run a server.
type program struct {
	path string
	args []string
	env  []string // beside that of the test
	dir  string   // to run in; the log is beside it
}

// superviseEnv, when set, makes the test binary the keeper of the program in its arguments: see TestMain.
const superviseEnv = "INTEROP_SUPERVISE"

// start runs s until the test ends, and returns when it answers requests for all of ready. What it logs is shown if the test
// fails.
func (p *program) start(t *testing.T, s *server, ca *authority, ready ...string) {
	t.Helper()
	s.log = p.dir + ".log"
	log, err := os.Create(s.log)
	require.NoError(t, err)
	defer log.Close() // the process has its own
	cmd := exec.Command(os.Args[0], append([]string{p.path}, p.args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, log, log
	cmd.Env = append(append(os.Environ(), "NO_PROXY=*", superviseEnv+"=1"), p.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	leash, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended, the log says
		close(exited)
	}()
	s.stop = func() {
		leash.Close()
		<-exited
	}
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("the end of %s:\n%s", s.log, tail(s.log, 60))
		}
	})
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: ca.client(), DisableKeepAlives: true}}
	for _, url := range ready {
		waitReady(t, web, url, exited)
	}
}

// supervise runs a program until it ends or nobody holds the other end of standard input any more: a test that is killed
// leaves nothing running. Keeper and program are a process group of their own, which Ctrl-C in a terminal does not reach.
func supervise(args []string) int {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		return 1
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		signal.Ignore(syscall.SIGTERM)
		_ = syscall.Kill(0, syscall.SIGTERM) // the group
		time.Sleep(10 * time.Second)
		_ = syscall.Kill(0, syscall.SIGKILL)
	}()
	if cmd.Wait() != nil {
		return 1
	}
	return 0
}

// waitReady waits until a server answers.
func waitReady(t *testing.T, web *http.Client, url string, exited <-chan struct{}) {
	t.Helper()
	for {
		if r, err := web.Get(url); err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-exited:
			require.Fail(t, "the server has ended", "before it answered %s", url)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tail is the end of a file.
func tail(file string, lines int) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// newFolder makes a folder for the servers of a test. It stays, with their logs, if the test fails.
func newFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mxfed-interop-")
	require.NoError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("databases and logs are kept in %s", dir)
			return
		}
		require.NoError(t, os.RemoveAll(dir))
	})
	return dir
}

// freePorts are two ports of the loopback interface that nobody listened on a moment ago: for clients, for servers.
func freePorts(t *testing.T) (client, federation string) {
	t.Helper()
	var ports [2]string
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		_, ports[i], err = net.SplitHostPort(l.Addr().String())
		require.NoError(t, err)
	}
	return ports[0], ports[1]
}
