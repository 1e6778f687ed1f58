package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// postgres is a PostgreSQL of a test's own, in a folder that goes away.
type postgres struct {
	dir       string
	databases int
}

// newPostgres starts one where CI=true says that there has to be one.
func newPostgres(t testing.TB) *postgres {
	t.Helper()
	if os.Getenv("CI") != "true" {
		t.Skip("PostgreSQL is tested where CI=true")
	}
	dir, err := os.MkdirTemp("", "homeserver") // short, as paths of sockets have to be
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	attributes := &syscall.SysProcAttr{Setpgid: true}
	if os.Getuid() == 0 { // which PostgreSQL does not start as
		attributes.Credential = giveAway(t, dir)
	}
	command := func(name string, args ...string) *exec.Cmd {
		c := exec.Command(name, args...)
		c.SysProcAttr, c.Dir, c.Env = attributes, dir, append(os.Environ(), "LC_ALL=C.UTF-8")
		return c
	}
	data := filepath.Join(dir, "data")
	out, err := command(postgresTool("initdb"), "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8").CombinedOutput()
	require.NoError(t, err, string(out))
	// The shell ends the server when its input ends: at the latest with this process, however that ends.
	server := command("sh", "-c", `"$0" "$@" & read _; kill -INT $!; wait`, postgresTool("postgres"), "-D", data, "-k", dir, "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "max_connections=200")
	input, err := server.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, server.Start())
	t.Cleanup(func() {
		input.Close()
		server.Wait()
	})
	p := &postgres{dir: dir}
	for {
		conn, err := pgx.Connect(t.Context(), p.url("postgres"))
		if err == nil {
			require.NoError(t, conn.Close(t.Context()))
			return p
		}
		require.NoError(t, t.Context().Err())
	}
}

func (p *postgres) url(database string) string {
	return "postgres:///" + database + "?user=test&host=" + p.dir
}

// create makes a database and returns its URL.
func (p *postgres) create(t testing.TB) string {
	t.Helper()
	p.databases++
	name := fmt.Sprintf("test%d", p.databases)
	conn, err := pgx.Connect(t.Context(), p.url("postgres"))
	require.NoError(t, err)
	defer conn.Close(context.WithoutCancel(t.Context()))
	_, err = conn.Exec(t.Context(), "CREATE DATABASE "+name)
	require.NoError(t, err)
	return p.url(name)
}

// giveAway lets the user postgres have the folder, and be who runs commands.
func giveAway(t testing.TB, dir string) *syscall.Credential {
	t.Helper()
	postgres, err := user.Lookup("postgres")
	require.NoError(t, err)
	uid, err := strconv.Atoi(postgres.Uid)
	require.NoError(t, err)
	gid, err := strconv.Atoi(postgres.Gid)
	require.NoError(t, err)
	require.NoError(t, os.Chown(dir, uid, gid))
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// postgresTool finds a program of PostgreSQL, which some systems keep out of the path.
func postgresTool(name string) string {
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name); len(found) > 0 {
		return found[len(found)-1]
	}
	return name
}

// onEach runs a test on every kind of database.
func onEach(t *testing.T, test func(w *world)) {
	t.Run("sqlite", func(t *testing.T) { test(newWorld(t)) })
	t.Run("postgres", func(t *testing.T) {
		p, w := newPostgres(t), newWorld(t)
		urls := make(map[mxfed.ServerName]string)
		w.database = func(name mxfed.ServerName) string {
			if urls[name] == "" {
				urls[name] = p.create(t)
			}
			return urls[name]
		}
		test(w)
	})
}
