//go:build unix

package interop

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// front stands before a server, sees all that others ask of it, and may answer in its place.
type front struct {
	name   mxfed.ServerName
	behind chan *url.URL // holds one as soon as there is a server
}

// newFront makes a front for a server that is yet to start, with the front's name in its site; stand says which one. wrap
// gets what passes requests on, and returns what answers them.
func newFront(t *testing.T, ca *authority, wrap func(pass http.Handler) http.Handler) *front {
	t.Helper()
	f := &front{behind: make(chan *url.URL, 1)}
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { // requests are signed: nothing of them may change
			to := f.server(r.In.Context())
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.URL.RawQuery = to.Scheme, to.Host, r.In.URL.RawQuery
			r.Out.Header.Del("Accept-Encoding")
		},
		Transport: &http.Transport{TLSClientConfig: ca.client(), DisableCompression: true},
		ErrorLog:  log.New(io.Discard, "", 0), // a server may be stopped
	}
	web := httptest.NewUnstartedServer(wrap(pass))
	certFile, keyFile := ca.issue(t, t.TempDir())
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	require.NoError(t, err)
	web.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	web.StartTLS()
	t.Cleanup(web.Close)
	f.name = mxfed.ServerName(web.Listener.Addr().String())
	return f
}

// stand puts the front before a server.
func (f *front) stand(t *testing.T, before *server) {
	t.Helper()
	to, err := url.Parse(before.federation)
	require.NoError(t, err)
	f.behind <- to
}

// server is the one behind it; when the request is over before there is one, it does not matter which.
func (f *front) server(ctx context.Context) *url.URL {
	select {
	case to := <-f.behind:
		f.behind <- to
		return to
	case <-ctx.Done():
		return &url.URL{}
	}
}
