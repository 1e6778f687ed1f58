package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// pebble is an ACME authority for tests.
const pebble = "github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1"

// TestACME gets a certificate from an authority by a http-01 challenge, and has it again after a restart.
func TestACME(t *testing.T) {
	if os.Getenv("CI") != "true" {
		t.Skip("an ACME authority is built where CI=true")
	}
	ca, dir, ports := testCA(t), t.TempDir(), freePorts(t, 5)
	directory, challenges := "127.0.0.1:"+ports[2], ports[4]
	roots := startAuthority(t, ca, directory, freePorts(t, 2), challenges, ports[3])
	var serials []string
	for range 2 {
		p := startProcess(t, ca, dir, ports[:2], "-name", "matrix.a.example", "-ca-key", "", "-acme", "https://"+directory+"/dir", "-acme-port", challenges)
		conn, err := tls.Dial("tcp", "127.0.0.1:"+ports[0], &tls.Config{ServerName: "matrix.a.example", RootCAs: roots})
		require.NoError(t, err)
		serials = append(serials, conn.ConnectionState().PeerCertificates[0].SerialNumber.String())
		require.NoError(t, conn.Close())
		_, err = tls.Dial("tcp", "127.0.0.1:"+ports[0], &tls.Config{ServerName: "matrix.b.example", RootCAs: roots})
		require.Error(t, err, "a certificate is for the server's own name only")
		require.NoError(t, p.Signal(os.Interrupt))
		require.NoError(t, p.wait())
	}
	require.Equal(t, serials[0], serials[1])
}

// startAuthority starts an authority that finds every name on this machine, and returns its roots. It has itself a
// certificate of ca.
func startAuthority(t *testing.T, ca, directory string, inner []string, httpPort, tlsPort string) *x509.CertPool {
	t.Helper()
	dir := t.TempDir()
	own, err := issuedTLS("127.0.0.1", filepath.Join(ca, "ca.pem"), filepath.Join(ca, "ca.key"))
	require.NoError(t, err)
	key, err := x509.MarshalPKCS8PrivateKey(own.Certificates[0].PrivateKey)
	require.NoError(t, err)
	config := fmt.Sprintf(`{"pebble":{"listenAddress":"127.0.0.1:%s","managementListenAddress":"127.0.0.1:%s","certificate":"cert.pem",
		"privateKey":"key.pem","httpPort":%s,"tlsPort":%s}}`, inner[0], inner[1], httpPort, tlsPort)
	for file, text := range map[string][]byte{"config.json": []byte(config), "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Certificates[0].Certificate[0]})} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), text, 0o600))
	}
	install := exec.Command("go", "install", pebble)
	install.Env, install.Dir = append(os.Environ(), "GOBIN="+dir), dir
	out, err := install.CombinedOutput()
	require.NoError(t, err, "%s", out)
	authority := exec.Command(filepath.Join(dir, "pebble"), "-config", "config.json", "-dnsserver", everythingHere(t))
	authority.Env, authority.Dir = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1"), dir
	require.NoError(t, authority.Start())
	t.Cleanup(func() {
		authority.Process.Kill()
		authority.Wait()
	})
	trusted, err := trustedRoots(filepath.Join(ca, "ca.pem"))
	require.NoError(t, err)
	web := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted}}
	namingOrders(t, web, own, directory, "127.0.0.1:"+inner[0])
	waitReady(t, &http.Client{Transport: web}, "https://"+directory+"/dir", nil)
	r, err := (&http.Client{Transport: web}).Get("https://127.0.0.1:" + inner[1] + "/roots/0")
	require.NoError(t, err)
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(text), "%s", text)
	return roots
}

// namingOrders stands before the authority and adds where an order is to the answer that finalises it, as public authorities
// do: autocert looks for it there. https://www.rfc-editor.org/rfc/rfc8555#section-7.4
func namingOrders(t *testing.T, web *http.Transport, own *tls.Config, outer, inner string) {
	t.Helper()
	proxy := &httputil.ReverseProxy{Transport: web, ErrorLog: log.New(io.Discard, "", 0),
		Rewrite: func(q *httputil.ProxyRequest) {
			q.SetURL(&url.URL{Scheme: "https", Host: inner})
			q.Out.Host = q.In.Host
		},
		ModifyResponse: func(r *http.Response) error {
			if order, ok := strings.CutPrefix(r.Request.URL.Path, "/finalize-order/"); ok {
				r.Header.Set("Location", "https://"+outer+"/my-order/"+order)
			}
			return nil
		}}
	listener, err := tls.Listen("tcp", outer, own)
	require.NoError(t, err)
	server := &http.Server{Handler: proxy}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
}

// everythingHere starts a DNS server, over TCP, by which every name is 127.0.0.1, and returns its address.
func everythingHere(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := &dns.Server{Listener: listener, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		answer := new(dns.Msg).SetReply(q)
		if name := q.Question[0]; name.Qtype == dns.TypeA {
			answer.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: name.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(127, 0, 0, 1)}}
		}
		w.WriteMsg(answer)
	})}
	go server.ActivateAndServe()
	t.Cleanup(func() { server.Shutdown() })
	return listener.Addr().String()
}
