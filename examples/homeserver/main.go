// Homeserver is a small Matrix homeserver over package mxfed, with a database and a client API: an example to read, and a
// peer for tests of interoperability. README.md shows how to run it and says what it leaves out.
//
// Requests flow one way: the client API (clientapi*.go, sync.go) and the endpoints for other servers (federation.go) call
// the room code (rooms.go, host.go), which calls the database (store.go, db.go). host.go is what a program has to write to
// use mxfed. This file puts the parts together.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"example.org/mxfed"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	opts, err := readOptions(os.Args[1:], os.Getenv, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(ctx, opts, os.Stderr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "homeserver:", err)
		os.Exit(1)
	}
}

// options are the command line and, for what it leaves out, the environment.
type options struct {
	name                mxfed.ServerName
	ip                  string
	clientPort, fedPort string
	dir, database       string
	caCert, caKey       string
	acmeURL, acmePort   string
	networks            []netip.Prefix
	debug               bool
}

func readOptions(args []string, getenv func(string) string, help io.Writer) (*options, error) {
	o := new(options)
	flags := flag.NewFlagSet("homeserver", flag.ContinueOnError)
	flags.SetOutput(help)
	text := func(to *string, name, preset, usage string) {
		env := "HS_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		flags.StringVar(to, name, cmp.Or(getenv(env), preset), usage+" ("+env+")")
	}
	var name, networks string
	text(&name, "name", "", "server `name`, as in user IDs; never to be changed")
	text(&o.ip, "ip", "", "bind `address`; empty: all")
	text(&o.clientPort, "client-port", "8008", "`port` of the client API, plain HTTP: for a reverse proxy or this machine")
	text(&o.fedPort, "fed-port", "8448", "`port` for other servers, HTTPS")
	text(&o.dir, "dir", "data", "`folder` of what is stored")
	text(&o.database, "db", "", "postgres:// `URL`; empty: SQLite, homeserver.db in -dir")
	text(&o.caCert, "ca-cert", "", "PEM `file` of an authority to trust beside those of the system")
	text(&o.caKey, "ca-key", "", "its key: the `file` with which this server's certificate is issued at start")
	text(&o.acmeURL, "acme", "", "directory `URL` of an ACME authority that issues the certificate; its terms are accepted")
	text(&o.acmePort, "acme-port", "80", "`port` for that authority's http-01 challenges")
	text(&networks, "networks", "", "`list` of networks that other servers are in, such as 127.0.0.0/8,10.0.0.0/8; empty: public addresses")
	flags.BoolVar(&o.debug, "debug", getenv("HS_DEBUG") != "", "log every refused request (HS_DEBUG)")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	o.name = mxfed.ServerName(name)
	for network := range strings.FieldsFuncSeq(networks, func(r rune) bool { return r == ',' }) {
		prefix, err := netip.ParsePrefix(network)
		if err != nil {
			return nil, fmt.Errorf("-networks: %w", err)
		}
		o.networks = append(o.networks, prefix.Masked())
	}
	return o, o.check(flags.Args())
}

// check refuses what would fail much later, or surprise.
func (o *options) check(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unknown argument %q", rest[0])
	case o.name == "":
		return errors.New("-name is missing")
	case (o.caKey == "") == (o.acmeURL == ""):
		return errors.New("a certificate comes from either -ca-cert and -ca-key or -acme")
	case o.acmeURL != "" && net.ParseIP(hostOf(string(o.name))) != nil:
		return errors.New("-acme gives certificates to host names only")
	}
	return nil
}

// run serves until ctx ends. It returns when every request has been answered and everything is stored.
func run(ctx context.Context, o *options, stderr *os.File) error {
	level := slog.LevelInfo
	if o.debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	roots, err := trustedRoots(o.caCert)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	s, err := openServer(ctx, settings{
		Name:     o.name,
		Database: cmp.Or(o.database, filepath.Join(o.dir, "homeserver.db")),
		HTTP:     newResolver(roots, o.networks),
		Log:      log,
		Progress: newReporter(log, stderr).join,
	})
	if err != nil {
		return err
	}
	return errors.Join(o.serve(ctx, s, roots), s.close())
}

const (
	headerTimeout = 30 * time.Second // for the head of a request to arrive
	idleTimeout   = 2 * time.Minute  // for the next request on a connection
	gracePeriod   = 10 * time.Second // for requests to be answered after SIGTERM
)

// serve opens all ports, that of the clients last: who can talk to it finds everything open.
func (o *options) serve(ctx context.Context, s *server, roots *x509.CertPool) error {
	group, ctx := errgroup.WithContext(ctx) // with the first part that fails all others end
	site := func(port string, handler http.Handler, secure *tls.Config) *http.Server {
		return &http.Server{Addr: net.JoinHostPort(o.ip, port), Handler: handler, TLSConfig: secure, ReadHeaderTimeout: headerTimeout,
			IdleTimeout: idleTimeout, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn)}
	}
	var sites []*http.Server
	var secure *tls.Config
	var err error
	if o.acmeURL == "" {
		secure, err = issuedTLS(o.name, o.caCert, o.caKey)
	} else {
		manager := newACME(o.name, o.acmeURL, roots, certificates{s.db})
		secure, sites = manager.TLSConfig(), append(sites, site(o.acmePort, manager.HTTPHandler(http.NotFoundHandler()), nil))
	}
	if err != nil {
		return err
	}
	sites = append(sites, site(o.fedPort, s.federation(), secure), site(o.clientPort, newClientAPI(ctx, s), nil))
	group.Go(func() error { return s.run(ctx) })
	for _, web := range sites {
		listener, err := net.Listen("tcp", web.Addr)
		if err != nil {
			group.Go(func() error { return err })
			break
		}
		s.log.Info("listening", "at", listener.Addr().String())
		group.Go(func() error { return serveSite(web, listener) })
		group.Go(func() error { return shutDown(ctx, web) })
	}
	return group.Wait()
}

func serveSite(web *http.Server, listener net.Listener) (err error) {
	if web.TLSConfig != nil {
		err = web.ServeTLS(listener, "", "")
	} else {
		err = web.Serve(listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// shutDown waits until ctx ends, and then for the requests that have arrived. Their own contexts go on meanwhile.
func shutDown(ctx context.Context, web *http.Server) error {
	<-ctx.Done()
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), gracePeriod)
	defer cancel()
	if web.Shutdown(grace) != nil {
		return web.Close()
	}
	return nil
}
