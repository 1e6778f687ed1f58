// Package loopback is the internet of the examples: HTTPS servers of one process on the loopback interface, reached by
// name. A name leads to a listener, where else server discovery and DNS lead to an address; that is all that is left out.
// Every server has a certificate for its name, issued by an authority that exists in memory only, and certificates are
// verified as ever.
package loopback

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"

	"example.org/mxfed"
)

// Network is a set of servers and the one authority that they and their clients trust. It is safe for concurrent use.
type Network struct {
	// Transport reaches the servers by their names.
	Transport *http.Transport

	authority *x509.Certificate
	key       *ecdsa.PrivateKey

	mu        sync.Mutex
	addresses map[string]string // of listeners, by host name
	servers   []*http.Server
	serving   sync.WaitGroup
}

// New returns a network without servers.
func New() (*Network, error) {
	n := &Network{addresses: make(map[string]string)}
	var err error
	if n.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "loopback authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}
	if n.authority, err = n.issue(template, template, &n.key.PublicKey); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(n.authority)
	n.Transport = &http.Transport{DialContext: n.dial, TLSClientConfig: &tls.Config{RootCAs: roots}}
	return n, nil
}

// issue signs a certificate that is valid for a day.
func (n *Network) issue(template, parent *x509.Certificate, public *ecdsa.PublicKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, n.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// dial connects to the listener of a name.
func (n *Network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	listener := n.addresses[host]
	n.mu.Unlock()
	if listener == "" {
		return nil, fmt.Errorf("no server is called %s", host)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", listener)
}

// Serve starts a server. Its name has no port.
func (n *Network) Serve(name mxfed.ServerName, handler http.Handler) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{DNSNames: []string{string(name)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	certificate, err := n.issue(template, n.authority, &key.PublicKey)
	if err != nil {
		return err
	}
	own := tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{own}})
	if err != nil {
		return err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses[string(name)] = listener.Addr().String()
	n.servers = append(n.servers, server)
	n.serving.Go(func() { server.Serve(listener) })
	return nil
}

// Close stops all servers and returns when they have.
func (n *Network) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.Transport.CloseIdleConnections()
	for _, s := range n.servers {
		s.Close()
	}
	n.serving.Wait()
}
