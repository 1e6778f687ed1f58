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
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// server is a homeserver in a process of its own.
type server struct {
	name   mxfed.ServerName
	client string // where its client API is: http://127.0.0.1:PORT
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

// start runs a server until the test ends, and returns when it answers requests for all of ready. What it logs is shown if
// the test fails.
func (p *program) start(t *testing.T, ca *authority, ready ...string) {
	t.Helper()
	log, err := os.Create(p.dir + ".log")
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
	t.Cleanup(func() {
		leash.Close()
		<-exited
		if t.Failed() {
			t.Logf("the end of %s:\n%s", log.Name(), tail(log.Name(), 60))
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

// within makes a folder in a folder.
func within(t *testing.T, dir, name string) string {
	t.Helper()
	made := filepath.Join(dir, name)
	require.NoError(t, os.Mkdir(made, 0o700))
	return made
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
