//go:build unix

package interop

import (
	"crypto/ed25519"
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/memhost"
)

// serve runs a server of the library in the test itself. Its handler is made from a name, a key and a way to reach others.
func serve(t *testing.T, at *site, handler func(mxfed.Config) http.Handler) mxfed.ServerName {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	certFile, keyFile := at.ca.issue(t, t.TempDir())
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	require.NoError(t, err)
	web := httptest.NewUnstartedServer(nil)
	name := mxfed.ServerName(web.Listener.Addr().String())
	signer, err := mxfed.NewSigner(name, "ed25519:1", key)
	require.NoError(t, err)
	reach := &mxfed.Resolver{Base: &http.Transport{TLSClientConfig: at.ca.client()}, AllowIP: netip.Addr.IsLoopback}
	web.Config.Handler = handler(mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: reach})
	web.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	web.StartTLS()
	t.Cleanup(func() {
		web.Close()
		reach.CloseIdleConnections()
	})
	return name
}

// serveMemhost runs examples/memhost in the test itself.
func serveMemhost(t *testing.T, at *site, notaries ...mxfed.ServerName) (h *memhost.Host, name mxfed.ServerName) {
	t.Helper()
	name = serve(t, at, func(cfg mxfed.Config) http.Handler {
		var err error
		cfg.Keys = &mxfed.KeyRing{HTTP: cfg.HTTP, Notaries: notaries}
		h, err = memhost.New(cfg)
		require.NoError(t, err)
		return mxfed.NewHandler(h.Server, h.Hosts())
	})
	return h, name
}
