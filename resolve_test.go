package mxfed_test

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"

	"example.org/mxfed"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// onlyIPs is an AllowIP for the addresses listed.
func onlyIPs(ips ...string) func(netip.Addr) bool {
	return func(ip netip.Addr) bool {
		for _, allowed := range ips {
			if ip == netip.MustParseAddr(allowed) {
				return true
			}
		}
		return false
	}
}

func TestResolver_LeavesTheRequestAlone(t *testing.T) {
	for name, u := range map[string]*url.URL{
		"plain":    {Path: "/_matrix/federation/v1/version", RawQuery: "a=%2F+1;b&&c"},
		"raw path": {Path: "/a/b c+/é/!d:@", RawPath: "/a%2Fb%20c%2b/%C3%A9/%21d:@"},
		"no path":  {RawQuery: "q"},
		"empty":    {Path: "/", ForceQuery: true},
		"opaque":   {Opaque: "/a%2fb/%2e%2e/c", RawQuery: "x=%41"},
		"dots":     {Path: "/a/../b//c/./"},
		"userinfo": {Path: "/", User: url.UserPassword("a", "b")},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			n.Zone("example.org. A 127.0.0.1")
			s := n.Serve(nil, "example.org")
			u := *u
			u.Scheme, u.Host = "https", "example.org:"+s.Port
			q := &http.Request{Method: http.MethodPut, URL: &u, Host: "elsewhere.example", Header: http.Header{"A": {"b"}},
				Body: io.NopCloser(strings.NewReader("body")), ContentLength: 4}
			before, header := u, q.Header.Clone()
			answer, err := n.Resolver.RoundTrip(q)
			require.NoError(t, err)
			require.NoError(t, answer.Body.Close())
			require.Same(t, q, answer.Request)
			require.Equal(t, before, *q.URL)
			require.Equal(t, header, q.Header)
			require.Equal(t, "elsewhere.example", q.Host)
			require.Equal(t, []mxfed.DiscoveryHit{{Host: u.Host, SNI: "example.org", URI: before.RequestURI(), Proto: "HTTP/2.0", Body: "body"}}, s.Seen())
		})
	}
}

func TestResolver_DoesNotFollowRedirects(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1")
	s := n.Serve(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/there", http.StatusTemporaryRedirect)
	}, "example.org")
	q, err := http.NewRequest(http.MethodGet, "https://example.org:"+s.Port+"/here", nil)
	require.NoError(t, err)
	answer, err := n.Resolver.RoundTrip(q)
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	require.Equal(t, http.StatusTemporaryRedirect, answer.StatusCode)
	require.Len(t, s.Seen(), 1)
}

func TestResolver_ReadsGzip(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1")
	s := n.Serve(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", r.Header.Get("Accept-Encoding"))
		z := gzip.NewWriter(w)
		io.WriteString(z, "text")
		z.Close()
	}, "example.org")
	text, err := n.Get("https://example.org:" + s.Port + "/")
	require.NoError(t, err)
	require.Equal(t, "text", text)
}

func TestResolver_HTTP1(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Resolver.Base.Protocols = new(http.Protocols)
	n.Resolver.Base.Protocols.SetHTTP1(true)
	n.Zone("example.org. A 127.0.0.1")
	s := n.Serve(nil, "example.org")
	for range 2 {
		_, err := n.Get("https://example.org:" + s.Port + "/")
		require.NoError(t, err)
	}
	require.Equal(t, "HTTP/1.1", s.Seen()[0].Proto)
	require.Equal(t, 1, s.Conns(), "connections are kept")
}

// closeNoter is a body that knows whether it was closed.
type closeNoter struct {
	io.Reader
	closed bool
}

func (c *closeNoter) Close() error { c.closed = true; return nil }

func TestResolver_RefusesMalformedURLs(t *testing.T) {
	for name, test := range map[string]struct{ scheme, host, want string }{
		"http":               {"http", "example.org", "not https"},
		"no scheme":          {"", "example.org", "not https"},
		"no host":            {"https", "", "not a server name"},
		"user":               {"https", "a@example.org", "not a server name"},
		"underscore":         {"https", "_x.example.org", "not a server name"},
		"path":               {"https", "example.org/x", "not a server name"},
		"port out of range":  {"https", "example.org:65536", "not a server name"},
		"empty port":         {"https", "example.org:", "not a server name"},
		"zone":               {"https", "[fe80::1%25lo]", "not a server name"},
		"long":               {"https", strings.Repeat("a", 10_000), "not a server name"},
		"leading zeros":      {"https", "127.0.0.01", "127.0.0.01: an IPv4 address with leading zeros"},
		"leading zeros port": {"https", "010.0.0.1:8448", "leading zeros"},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			body := &closeNoter{Reader: strings.NewReader("body")}
			q := &http.Request{Method: http.MethodPut, URL: &url.URL{Scheme: test.scheme, Host: test.host, Path: "/"}, Body: body}
			_, err := n.Resolver.RoundTrip(q)
			require.ErrorContains(t, err, test.want)
			require.Less(t, len(err.Error()), 400)
			require.True(t, body.closed)
		})
	}
	_, err := new(mxfed.Resolver).RoundTrip(&http.Request{})
	require.ErrorContains(t, err, "not https")
}

// TestResolver_LeadingZerosByDelegation: a delegated name of that form is a name, so that there is no way round it.
func TestResolver_LeadingZerosByDelegation(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1")
	n.Detour("example.org", "443", n.Serve(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"m.server":"127.0.0.001"}`)
	}, "example.org"))
	direct := n.Serve(nil, "example.org")
	n.Detour("example.org", "8448", direct)
	_, err := n.Get("https://example.org/")
	require.ErrorContains(t, err, "example.org: well-known: 127.0.0.001: an IPv4 address with leading zeros")
	require.Zero(t, direct.Conns())
}

func TestResolver_ProxyIsRefused(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1")
	s := n.Serve(nil, "example.org")
	proxies := map[string]*url.URL{}
	n.Resolver.Base.Proxy = func(q *http.Request) (*url.URL, error) { return proxies[q.URL.Path], nil }
	proxies["/proxied"] = &url.URL{Scheme: "https", Host: s.Address}
	_, err := n.Get("https://example.org:" + s.Port + "/proxied")
	require.ErrorContains(t, err, "proxy")
	require.Zero(t, s.Conns())
	q, err := http.NewRequest(http.MethodGet, "https://example.org:"+s.Port+"/proxied", nil)
	require.NoError(t, err)
	_, err = n.Resolver.Web().RoundTrip(q)
	require.ErrorContains(t, err, "proxy")
	require.Zero(t, s.Conns())
	_, err = n.Get("https://example.org:" + s.Port + "/direct")
	require.NoError(t, err)
}

// TestResolver_NamesDoNotShareConnections: two names at one address; the certificate covers one of them.
func TestResolver_NamesDoNotShareConnections(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(proto, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			if proto == "HTTP/1.1" {
				n.Resolver.Base.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
			}
			s := n.Serve(nil, "a.example", "b.example")
			for _, name := range []string{"a", "b", "c"} {
				n.Zone(name+".example. A 127.0.0.1", fmt.Sprintf("_matrix-fed._tcp.%s.example. SRV 0 0 %s at.example.", name, s.Port))
			}
			n.Zone("at.example. A 127.0.0.1")
			for _, name := range []string{"a.example", "b.example", "a.example:" + s.Port, "b.example:" + s.Port} {
				for range 2 {
					_, err := n.Get("https://" + name + "/")
					require.NoError(t, err)
					hits := s.Seen()
					require.Equal(t, mxfed.DiscoveryHit{Host: name, SNI: name[:len("a.example")], URI: "/", Proto: proto}, hits[len(hits)-1])
				}
			}
			require.Equal(t, 4, s.Conns(), "of one name they are kept")
			for _, name := range []string{"c.example", "c.example:" + s.Port} {
				_, err := n.Get("https://" + name + "/")
				var mismatch x509.HostnameError
				require.ErrorAs(t, err, &mismatch)
			}
			require.Len(t, s.Seen(), 8)
		})
	}
}

func TestResolver_UnknownAuthority(t *testing.T) {
	for name, base := range map[string]*http.Transport{
		"nil":       nil,
		"zero":      {},
		"no HTTP/2": {TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			n.Zone("example.org. A 127.0.0.1")
			s := n.Serve(nil, "example.org")
			n.Resolver.Base = base
			_, err := n.Get("https://example.org:" + s.Port + "/")
			var unknown x509.UnknownAuthorityError
			require.ErrorAs(t, err, &unknown)
			require.Empty(t, s.Seen())
		})
	}
}

// TestResolver_BaseCannotChooseTheName: one certificate name for all servers would be none.
func TestResolver_BaseCannotChooseTheName(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1")
	s := n.Serve(nil, "other.example")
	n.Resolver.Base.TLSClientConfig.ServerName = "other.example"
	_, err := n.Get("https://example.org:" + s.Port + "/")
	var mismatch x509.HostnameError
	require.ErrorAs(t, err, &mismatch)
}

func TestResolver_AddressRecords(t *testing.T) {
	for name, test := range map[string]struct {
		ip      string
		records []string
	}{
		"IPv4":              {"127.0.0.1", []string{"example.org. A 127.0.0.1"}},
		"IPv6 only":         {"::1", []string{"example.org. AAAA ::1"}},
		"alias":             {"127.0.0.1", []string{"example.org. CNAME at.example.", "at.example. A 127.0.0.1"}},
		"IPv6 is dead":      {"127.0.0.1", []string{"example.org. AAAA ::1", "example.org. A 127.0.0.1"}},
		"IPv4 is dead":      {"::1", []string{"example.org. AAAA ::1", "example.org. A 127.0.0.1"}},
		"one of many lives": {"127.0.0.1", []string{"example.org. A 127.0.0.3", "example.org. A 127.0.0.2", "example.org. A 127.0.0.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			s := n.ServeAt(test.ip, nil, "example.org")
			n.Zone(test.records...)
			n.Zone("_matrix._tcp.srv.example. SRV 0 0 " + s.Port + " example.org.")
			_, err := n.Get("https://example.org:" + s.Port + "/")
			require.NoError(t, err)
			_, err = n.Get("https://srv.example/")
			require.ErrorContains(t, err, "not srv.example", "it is found, but has no certificate")
		})
	}
}

// TestResolver_SRVOrder: the name itself has no address, so that nothing but SRV records leads anywhere.
func TestResolver_SRVOrder(t *testing.T) {
	for name, test := range map[string]struct {
		records []string // of "fed" or "old" with priority and weight; of "live", "dead" (no one listens), "wrong" (certificate), …
		want    string   // "" fails
	}{
		"priority":                  {[]string{"fed 20 0 other", "fed 10 0 live"}, "live"},
		"priority before weight":    {[]string{"fed 20 65535 other", "fed 10 1 live"}, "live"},
		"weight":                    {[]string{"fed 10 0 other", "fed 10 65535 live"}, "live"},
		"next if dead":              {[]string{"fed 10 0 dead", "fed 20 0 live"}, "live"},
		"next if unknown":           {[]string{"fed 10 0 unknown", "fed 20 0 live"}, "live"},
		"next if not allowed":       {[]string{"fed 10 0 private", "fed 20 0 live"}, "live"},
		"next if wrong certificate": {[]string{"fed 10 0 wrong", "fed 20 0 live"}, "live"},
		"next if no TLS":            {[]string{"fed 10 0 plain", "fed 20 0 live"}, "live"},
		"next but two":              {[]string{"fed 10 0 dead", "fed 20 0 wrong", "fed 30 0 live", "fed 40 0 other"}, "live"},
		"beside a malformed one":    {[]string{"fed 0 0 1.2.", "fed 10 0 live"}, "live"},
		"malformed":                 {[]string{"fed 0 0 1.2.", "old 10 0 other"}, ""},
		"all fail":                  {[]string{"fed 10 0 dead", "fed 20 0 wrong"}, ""},
		"eight":                     {strings.Split("fed 10 0 dead,"+strings.Repeat("fed 20 0 dead%,", 6)+"fed 30 0 live", ","), "live"},
		"nine":                      {strings.Split("fed 10 0 dead,"+strings.Repeat("fed 20 0 dead%,", 7)+"fed 30 0 live", ","), ""},
		"old one":                   {[]string{"old 10 0 live"}, "live"},
		"new one wins":              {[]string{"old 10 0 other", "fed 20 0 live"}, "live"},
		"old one is no spare":       {[]string{"old 10 0 other", "fed 20 0 dead"}, ""},
		"no service":                {[]string{"fed 0 0 .", "old 10 0 other"}, ""},
		"old no service":            {[]string{"old 0 0 ."}, ""},
		"root beside a target":      {[]string{"fed 0 0 .", "fed 10 0 live"}, "live"},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			n.Resolver.AllowIP = onlyIPs("127.0.0.1")
			live, other, wrong := n.Serve(nil, "srv.example"), n.Serve(nil, "srv.example"), n.Serve(nil, "wrong.example")
			ports := map[string]string{"live": live.Port, "other": other.Port, "wrong": wrong.Port, "plain": plainPort(t), "dead": "1", "private": live.Port, "unknown": live.Port, ".": other.Port, "1.2.": other.Port}
			n.Zone("live.example. A 127.0.0.1", "other.example. A 127.0.0.1", "wrong.example. A 127.0.0.1", "plain.example. A 127.0.0.1",
				"dead.example. A 127.0.0.1", "private.example. A 127.0.0.2", ". A 127.0.0.1")
			for i, text := range test.records {
				n.Zone(srvRecord(text, i, ports))
			}
			q, err := http.NewRequest(http.MethodPut, "https://srv.example/", io.NopCloser(strings.NewReader("body")))
			require.NoError(t, err)
			require.Nil(t, q.GetBody, "the body can be sent once only")
			answer, err := n.Resolver.RoundTrip(q)
			require.Empty(t, other.Seen())
			require.Empty(t, wrong.Seen())
			if test.want == "" {
				require.ErrorContains(t, err, "srv.example")
				require.Empty(t, live.Seen())
				return
			}
			require.NoError(t, err)
			require.NoError(t, answer.Body.Close())
			require.Equal(t, []mxfed.DiscoveryHit{{Host: "srv.example", SNI: "srv.example", URI: "/", Proto: "HTTP/2.0", Body: "body"}}, live.Seen())
		})
	}
}

func srvRecord(text string, i int, ports map[string]string) string {
	var service, target string
	var priority, weight int
	fmt.Sscan(strings.TrimSuffix(text, "%"), &service, &priority, &weight, &target)
	service = map[string]string{"fed": "_matrix-fed", "old": "_matrix"}[service]
	port := ports[target]
	if strings.HasSuffix(text, "%") {
		port = fmt.Sprint(i) // another one on which no one listens
	}
	if !strings.HasSuffix(target, ".") {
		target += ".example."
	}
	return fmt.Sprintf("%s._tcp.srv.example. SRV %d %d %s %s", service, priority, weight, port, target)
}

// plainPort is where someone answers who does not speak TLS.
func plainPort(t *testing.T) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "220 mail.example ESMTP\r\n")
			io.Copy(io.Discard, conn) // until the other end hangs up
			conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-done })
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}

// TestResolver_DNSFailureIsNotAbsence: port 8448 is the answer to "there is no such record" only.
func TestResolver_DNSFailureIsNotAbsence(t *testing.T) {
	const fed, old = "_matrix-fed._tcp.example.org.", "_matrix._tcp.example.org."
	for name, test := range map[string]struct {
		question string
		rcode    int
		fails    bool
	}{
		"SERVFAIL":                  {fed, dns.RcodeServerFailure, true},
		"REFUSED":                   {fed, dns.RcodeRefused, true},
		"NOTIMP":                    {fed, dns.RcodeNotImplemented, true},
		"SERVFAIL of the old one":   {old, dns.RcodeServerFailure, true},
		"NXDOMAIN":                  {fed, dns.RcodeNameError, false},
		"NXDOMAIN of the old one":   {old, dns.RcodeNameError, false},
		"no record of the type":     {"", 0, false},
		"no record, but of another": {"_x.example.org.", dns.RcodeServerFailure, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			n.Zone("example.org. A 127.0.0.1", "_matrix-fed._tcp.example.org. TXT x", "_matrix._tcp.example.org. TXT x")
			n.Fail(test.question, dns.TypeSRV, test.rcode)
			direct := n.Serve(nil, "example.org")
			n.Detour("example.org", "8448", direct)
			_, err := n.Get("https://example.org/")
			if !test.fails {
				require.NoError(t, err)
				require.Len(t, direct.Seen(), 1)
				return
			}
			var dnsError *net.DNSError
			require.ErrorAs(t, err, &dnsError)
			require.False(t, dnsError.IsNotFound)
			require.ErrorContains(t, err, "reach example.org")
			require.ErrorContains(t, err, "SRV "+strings.TrimSuffix(test.question, "."))
			require.Zero(t, direct.Conns())
		})
	}
}

// TestResolver_WellKnownFailureIsNotFatal: the SRV record is used even if the name has no address, or no known one.
func TestResolver_WellKnownFailureIsNotFatal(t *testing.T) {
	for name, rcode := range map[string]int{"no address": dns.RcodeSuccess, "SERVFAIL": dns.RcodeServerFailure} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			s := n.Serve(nil, "example.org")
			n.Fail("example.org.", dns.TypeA, rcode)
			n.Zone("example.org. TXT x", "at.example. A 127.0.0.1", "_matrix-fed._tcp.example.org. SRV 0 0 "+s.Port+" at.example.")
			_, err := n.Get("https://example.org/")
			require.NoError(t, err)
			require.Len(t, s.Seen(), 1)
		})
	}
}

// TestResolver_DefaultGuard is about servers that do listen, with certificates that are right, on this machine.
func TestResolver_DefaultGuard(t *testing.T) {
	for name, host := range map[string]string{
		"IPv4":                "127.0.0.1",
		"IPv4 elsewhere":      "127.9.9.9",
		"IPv6":                "[::1]",
		"IPv4-mapped":         "[::ffff:127.0.0.1]",
		"IPv4-mapped, hex":    "[::ffff:7f00:1]",
		"IPv4-compatible":     "[::127.0.0.1]",
		"NAT64":               "[64:ff9b::127.0.0.1]",
		"6to4":                "[2002:7f00:1::]",
		"Teredo":              "[2001::7f00:1]",
		"unspecified IPv4":    "0.0.0.0",
		"unspecified IPv6":    "[::]",
		"link-local IPv4":     "169.254.169.254",
		"link-local IPv6":     "[fe80::1]",
		"private 10":          "10.0.0.1",
		"private 172":         "172.16.0.1",
		"private 192":         "192.168.0.1",
		"carrier-grade NAT":   "100.64.0.1",
		"unique local":        "[fd00::1]",
		"multicast IPv4":      "224.0.0.1",
		"multicast IPv6":      "[ff02::1]",
		"documentation IPv6":  "[2001:db8::1]",
		"A":                   "a.example",
		"AAAA":                "aaaa.example",
		"AAAA mapped":         "mapped.example",
		"AAAA NAT64":          "nat64.example",
		"A link-local":        "metadata.example",
		"A unspecified":       "zero.example",
		"alias":               "alias.example",
		"hexadecimal":         "0x7f.1",
		"name of this server": "localhost",
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			n.Zone("a.example. A 127.0.0.1", "aaaa.example. AAAA ::1", "mapped.example. AAAA ::ffff:127.0.0.1", "nat64.example. AAAA 64:ff9b::7f00:1",
				"metadata.example. A 169.254.169.254", "zero.example. A 0.0.0.0", "alias.example. CNAME a.example.",
				"0x7f.1. A 127.0.0.1", "localhost. A 127.0.0.1")
			s := n.Serve(nil, strings.Trim(host, "[]"))
			n.Resolver.AllowIP = nil
			_, err := n.Get("https://" + host + ":" + s.Port + "/")
			require.ErrorContains(t, err, "reach "+host)
			require.ErrorContains(t, err, "is not allowed")
			require.Zero(t, s.Conns())
		})
	}
}

// TestResolver_GuardsEveryStep: whatever a server's name leads to is judged, with one address allowed for what comes
// before.
func TestResolver_GuardsEveryStep(t *testing.T) {
	const refused, unknown = "address 127.0.0.2 is not allowed", "no such host"
	const zone = "example.org. A 127.0.0.1"
	for name, test := range map[string]struct {
		zone      []string
		wellKnown string // answer or redirect
		want      string
	}{
		"name":                {[]string{"example.org. A 127.0.0.2"}, "", refused},
		"SRV target":          {[]string{zone, "_matrix-fed._tcp.example.org. SRV 0 0 PORT at.example."}, "", refused},
		"old SRV target":      {[]string{zone, "_matrix._tcp.example.org. SRV 0 0 PORT at.example."}, "", refused},
		"SRV of an address":   {[]string{zone, "_matrix-fed._tcp.example.org. SRV 0 0 PORT 127.0.0.2."}, "", "invalid names"},
		"delegated address":   {[]string{zone}, `{"m.server":"127.0.0.2:PORT"}`, refused},
		"delegated name":      {[]string{zone}, `{"m.server":"at.example:PORT"}`, refused},
		"delegated SRV":       {[]string{zone, "_matrix._tcp.srv.example. SRV 0 0 PORT at.example."}, `{"m.server":"srv.example"}`, refused},
		"well-known redirect": {[]string{zone}, `https://at.example:PORT/`, refused},
		"redirect to address": {[]string{zone}, `https://127.0.0.2:PORT/`, refused},
		"redirect to mapped":  {[]string{zone}, `https://[::ffff:127.0.0.2]:PORT/`, "is not allowed"},
		"redirect to number":  {[]string{zone}, `https://2130706434:PORT/`, unknown},
	} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			n.Resolver.AllowIP = onlyIPs("127.0.0.1")
			s := n.ServeAt("127.0.0.2", nil, "example.org", "at.example", "srv.example", "127.0.0.2", "2130706434")
			n.Zone("at.example. A 127.0.0.2")
			web := n.Serve(func(w http.ResponseWriter, r *http.Request) {
				text := strings.ReplaceAll(test.wellKnown, "PORT", s.Port)
				if strings.HasPrefix(text, "https:") {
					http.Redirect(w, r, text, http.StatusFound)
				}
				io.WriteString(w, text)
			}, "example.org")
			n.Detour("example.org", "443", web)
			for _, record := range test.zone {
				n.Zone(strings.ReplaceAll(record, "PORT", s.Port))
			}
			_, err := n.Get("https://example.org/")
			require.ErrorContains(t, err, "reach example.org")
			require.ErrorContains(t, err, test.want)
			require.Zero(t, s.Conns())
		})
	}
}

// TestResolver_Rebinding: the name points elsewhere by the time of the second connection, or of the first after the
// well-known request.
func TestResolver_Rebinding(t *testing.T) {
	t.Run("between connections", func(t *testing.T) {
		n := mxfed.NewDiscoveryNet(t)
		n.Resolver.AllowIP = onlyIPs("127.0.0.1")
		s := n.Serve(nil, "example.org")
		n.First("example.org. A 127.0.0.1")
		n.Zone("example.org. A 127.0.0.2")
		_, err := n.Get("https://example.org:" + s.Port + "/")
		require.NoError(t, err)
		n.Resolver.CloseIdleConnections()
		_, err = n.Get("https://example.org:" + s.Port + "/")
		require.ErrorContains(t, err, "address 127.0.0.2 is not allowed")
	})
	t.Run("after well-known", func(t *testing.T) {
		n := mxfed.NewDiscoveryNet(t)
		n.Resolver.AllowIP = onlyIPs("127.0.0.1")
		s := n.ServeAt("127.0.0.2", nil, "example.org")
		web := n.Serve(http.NotFound, "example.org")
		n.Detour("example.org", "443", web)
		n.Detour("example.org", "8448", s)
		n.First("example.org. A 127.0.0.1")
		n.Zone("example.org. A 127.0.0.2")
		_, err := n.Get("https://example.org/")
		require.ErrorContains(t, err, "address 127.0.0.2 is not allowed")
		require.Len(t, web.Seen(), 1)
		require.Zero(t, s.Conns())
	})
}

// TestResolver_CancelledWhileConnecting: someone accepts and says nothing. Nothing may be left behind.
func TestResolver_CancelledWhileConnecting(t *testing.T) {
	for name, host := range map[string]string{"by port": "example.org:PORT", "by SRV": "srv.example"} {
		t.Run(name, func(t *testing.T) {
			n := mxfed.NewDiscoveryNet(t)
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer listener.Close()
			_, port, _ := net.SplitHostPort(listener.Addr().String())
			n.Zone("example.org. A 127.0.0.1", "_matrix-fed._tcp.srv.example. SRV 0 0 "+port+" example.org.")
			ignore := goleak.IgnoreCurrent()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			q, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+strings.ReplaceAll(host, "PORT", port)+"/", nil)
			require.NoError(t, err)
			failed := make(chan error)
			go func() {
				_, err := n.Resolver.RoundTrip(q)
				failed <- err
			}()
			conn, err := listener.Accept()
			require.NoError(t, err)
			defer conn.Close()
			cancel()
			require.ErrorIs(t, <-failed, context.Canceled)
			goleak.VerifyNone(t, ignore)
		})
	}
}

func TestResolver_ZeroValue(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	s := n.Serve(nil, "127.0.0.1")
	var r mxfed.Resolver
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			q, _ := http.NewRequest(http.MethodGet, "https://127.0.0.1:"+s.Port+"/", nil)
			_, err := r.RoundTrip(q)
			if err == nil || !strings.Contains(err.Error(), "mxfed: reach 127.0.0.1:"+s.Port+": address 127.0.0.1 is not allowed") {
				t.Error(err)
			}
			r.CloseIdleConnections()
		})
	}
	wait.Wait()
	require.Zero(t, s.Conns())
}

// TestResolver_ErrorsTellWhatWasTried: what stands between the name and the failure is in the text.
func TestResolver_ErrorsTellWhatWasTried(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1", "_matrix._tcp.deleg.example. SRV 0 0 1 at.example.", "at.example. A 127.0.0.1")
	answers := map[string]string{"": `{"m.server":"deleg.example"}`}
	n.Detour("example.org", "443", n.Serve(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answers[""]) }, "example.org"))
	_, err := n.Get("https://example.org/")
	require.ErrorContains(t, err, "mxfed: reach example.org (well-known: deleg.example): dial tcp 127.0.0.1:1: ")
	var op *net.OpError
	require.ErrorAs(t, err, &op)

	n.Zone("nowhere.example. TXT x")
	_, err = n.Get("https://nowhere.example/")
	require.ErrorContains(t, err, "mxfed: reach nowhere.example (well-known: ")
	require.ErrorContains(t, err, "no such host")
}

// TestResolver_HostsFile: every machine has localhost in its own list of names; nobody is asked for it.
func TestResolver_HostsFile(t *testing.T) {
	n := mxfed.NewDiscoveryNet(t)
	s := n.Serve(nil, "localhost")
	_, err := n.Get("https://localhost:" + s.Port + "/")
	require.NoError(t, err)
	require.Len(t, s.Seen(), 1)
}
