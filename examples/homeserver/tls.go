package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"example.org/mxfed"
)

// This file is about who this server is to others, by its certificate, and which servers it believes and calls.

// trustedRoots are those of the system and, if a file is named, the authorities in it.
func trustedRoots(file string) (*x509.CertPool, error) {
	roots, err := x509.SystemCertPool()
	if err != nil { // a system without any
		roots = x509.NewCertPool()
	}
	if file == "" {
		return roots, nil
	}
	text, err := os.ReadFile(file)
	if err == nil && !roots.AppendCertsFromPEM(text) {
		err = fmt.Errorf("no certificate in %s", file)
	}
	return roots, err
}

// newResolver finds and calls other servers: those with public addresses, or, if networks are given, those in them.
func newResolver(roots *x509.CertPool, networks []netip.Prefix) *mxfed.Resolver {
	r := &mxfed.Resolver{Base: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	if len(networks) > 0 {
		r.AllowIP = func(ip netip.Addr) bool {
			return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(ip.Unmap()) })
		}
	}
	return r
}

// issuedTLS makes a certificate for the server's name, with a key that never leaves this process. It lasts as long as the
// authority that signs it.
func issuedTLS(name mxfed.ServerName, certFile, keyFile string) (*tls.Config, error) {
	authority, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		NotBefore:   authority.Leaf.NotBefore,
		NotAfter:    authority.Leaf.NotAfter,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if host := hostOf(string(name)); net.ParseIP(host) != nil {
		template.IPAddresses = []net.IP{net.ParseIP(host)}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority.Leaf, key.Public(), authority.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	own := tls.Certificate{Certificate: append([][]byte{der}, authority.Certificate...), PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{own}}, nil
}

// hostOf is a server name without its port, and an IPv6 address without brackets: what a certificate is for.
func hostOf(name string) string { return (&url.URL{Host: name}).Hostname() }

// newACME gets certificates from an ACME authority, whose terms are accepted, and renews them in time. With a shared cache
// any replica can answer a challenge that another one has asked for.
func newACME(name mxfed.ServerName, directory string, roots *x509.CertPool, cache autocert.Cache) *autocert.Manager {
	host := hostOf(string(name))
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	return &autocert.Manager{
		Prompt: autocert.AcceptTOS,
		HostPolicy: func(_ context.Context, asked string) error { // a Host header may have a port
			if !strings.EqualFold(hostOf(asked), host) {
				return fmt.Errorf("%q is not this server", asked)
			}
			return nil
		},
		Cache:  cache,
		Client: &acme.Client{DirectoryURL: directory, HTTPClient: client},
	}
}

// certificates implements autocert.Cache where all replicas find it, among settings.
type certificates struct{ db *database }

const acmePrefix = "acme " // of their names

// Get implements autocert.Cache.
func (c certificates) Get(ctx context.Context, name string) (data []byte, err error) {
	err = c.db.view(ctx, func(t *tx) error {
		text, found := one[string](t, `SELECT value FROM settings WHERE name = ?`, acmePrefix+name)
		if data = []byte(text); !found {
			return autocert.ErrCacheMiss
		}
		return nil
	})
	return data, err
}

// Put implements autocert.Cache. What is put are PEM files and tokens: text.
func (c certificates) Put(ctx context.Context, name string, data []byte) error {
	return c.db.exec(ctx, `INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, acmePrefix+name, string(data))
}

// Delete implements autocert.Cache.
func (c certificates) Delete(ctx context.Context, name string) error {
	return c.db.exec(ctx, `DELETE FROM settings WHERE name = ?`, acmePrefix+name)
}
