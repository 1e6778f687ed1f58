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
	case o.caKey != "" && o.caCert == "":
		return errors.New("-ca-key needs -ca-cert")
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
		Progress: newReporter(log, stderr).report,
	})
	if err != nil {
		return err
	}
	group, running := errgroup.WithContext(ctx) // with the first part that fails all others end
	sites, err := o.sites(running, s, roots)
	if err != nil {
		return errors.Join(err, s.close())
	}
	group.Go(func() error { return s.run(running) })
	for _, site := range sites {
		log.Info("listening", "for", site.what, "at", site.listener.Addr().String())
		group.Go(func() error { return site.serve(running, log) })
	}
	return errors.Join(group.Wait(), s.close())
}

// site is a port and what is served there.
type site struct {
	what     string
	listener net.Listener
	handler  http.Handler
	tls      *tls.Config // nil: plain HTTP
}

// sites opens all ports, that of the clients last: who can talk to it finds everything open.
func (o *options) sites(ctx context.Context, s *server, roots *x509.CertPool) (all []site, err error) {
	open := func(what, port string, handler http.Handler, secure *tls.Config) {
		if err != nil {
			return
		}
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort(o.ip, port)); err == nil {
			all = append(all, site{what, l, handler, secure})
		}
	}
	var secure *tls.Config
	if o.acmeURL == "" {
		secure, err = issuedTLS(o.name, o.caCert, o.caKey)
	} else if manager, failed := newACME(o.name, o.acmeURL, roots, s.certificates()); failed != nil {
		err = failed
	} else {
		secure = manager.TLSConfig()
		open("challenges", o.acmePort, manager.HTTPHandler(http.NotFoundHandler()), nil)
	}
	open("servers", o.fedPort, s.federation(), secure)
	open("clients", o.clientPort, newClientAPI(ctx, s), nil)
	if err != nil {
		for _, site := range all {
			site.listener.Close()
		}
	}
	return all, err
}

const (
	headerTimeout = 30 * time.Second // for the head of a request to arrive
	idleTimeout   = 2 * time.Minute  // for the next request on a connection
	gracePeriod   = 10 * time.Second // for requests to be answered after SIGTERM
)

// serve answers requests until ctx ends, and then those that have arrived. Their own contexts go on meanwhile.
func (t site) serve(ctx context.Context, log *slog.Logger) error {
	web := &http.Server{Handler: t.handler, TLSConfig: t.tls, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn)}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if t.tls != nil {
			return web.ServeTLS(t.listener, "", "")
		}
		return web.Serve(t.listener)
	})
	group.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), gracePeriod)
		defer cancel()
		if web.Shutdown(grace) != nil {
			return web.Close()
		}
		return nil
	})
	if err := group.Wait(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
