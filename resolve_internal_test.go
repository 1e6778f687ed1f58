package mxfed

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// DiscoveryNet is a small internet on loopback: a DNS server, a certificate authority, and HTTPS servers. What goes to
// ports 443 and 8448 is led to the servers that Detour names, or to a closed port.
type DiscoveryNet struct {
	// Resolver trusts the authority, asks the DNS server and may connect to any address.
	Resolver *Resolver

	t       *testing.T
	roots   *x509.CertPool
	ca      *x509.Certificate
	caKey   *ecdsa.PrivateKey
	mu      sync.Mutex
	zone    map[string][]dns.RR
	once    map[string][]dns.RR // for the first question only
	rcodes  map[string]int      // by question
	asked   map[string]int      // by question
	detours map[string]string
}

// NewDiscoveryNet returns an empty one; when the test ends, no goroutine may be left.
func NewDiscoveryNet(t *testing.T) *DiscoveryNet {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	n := &DiscoveryNet{t: t, zone: map[string][]dns.RR{}, once: map[string][]dns.RR{}, rcodes: map[string]int{},
		asked: map[string]int{}, detours: map[string]string{}}
	n.caKey = discoveryKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, n.caKey.Public(), n.caKey)
	require.NoError(t, err)
	n.ca, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	n.roots = x509.NewCertPool()
	n.roots.AddCert(n.ca)
	address := n.startDNS()
	n.Resolver = n.newResolver(address)
	return n
}

func discoveryKey(t *testing.T) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func (n *DiscoveryNet) newResolver(dnsAddress string) *Resolver {
	r := &Resolver{
		Base:    &http.Transport{TLSClientConfig: &tls.Config{RootCAs: n.roots}},
		AllowIP: func(netip.Addr) bool { return true },
		DNS: &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, dnsAddress)
		}},
		detour: n.detour,
	}
	n.t.Cleanup(r.CloseIdleConnections)
	return r
}

// startDNS listens on one port with both transports.
func (n *DiscoveryNet) startDNS() string {
	for {
		udp, err := net.ListenPacket("udp", "127.0.0.1:0")
		require.NoError(n.t, err)
		tcp, err := net.Listen("tcp", udp.LocalAddr().String())
		if err != nil { // the port is free for UDP only
			udp.Close()
			continue
		}
		for _, server := range []*dns.Server{{PacketConn: udp, Handler: n}, {Listener: tcp, Handler: n}} {
			started, ended := make(chan struct{}), make(chan error, 1)
			server.NotifyStartedFunc = func() { close(started) }
			go func() { ended <- server.ActivateAndServe() }()
			<-started
			n.t.Cleanup(func() {
				require.NoError(n.t, server.Shutdown())
				require.NoError(n.t, <-ended)
			})
		}
		return udp.LocalAddr().String()
	}
}

// ServeDNS implements dns.Handler.
func (n *DiscoveryNet) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	n.mu.Lock()
	defer n.mu.Unlock()
	question := q.Question[0]
	key := discoveryQuestion(question.Name, question.Qtype)
	answer := new(dns.Msg).SetRcode(q, n.rcodes[key])
	answer.Authoritative, answer.RecursionAvailable = true, true
	records, exists := n.zone[question.Name]
	if first := n.once[key]; first != nil && n.asked[key] == 0 {
		records, exists = first, true
	}
	n.asked[key]++
	for _, rr := range records {
		if alias, ok := rr.(*dns.CNAME); ok {
			records = append([]dns.RR{rr}, n.zone[alias.Target]...)
		}
	}
	for _, rr := range records {
		if t := rr.Header().Rrtype; answer.Rcode == 0 && (t == question.Qtype || t == dns.TypeCNAME) {
			answer.Answer = append(answer.Answer, rr)
		}
	}
	if !exists && answer.Rcode == 0 {
		answer.Rcode = dns.RcodeNameError
	}
	w.WriteMsg(answer)
}

func discoveryQuestion(name string, qtype uint16) string { return name + " " + dns.TypeToString[qtype] }

// Zone adds records such as "example.org. A 127.0.0.1".
func (n *DiscoveryNet) Zone(records ...string) {
	for _, text := range records {
		rr := discoveryRecord(n.t, text)
		n.mu.Lock()
		n.zone[rr.Header().Name] = append(n.zone[rr.Header().Name], rr)
		n.mu.Unlock()
	}
}

func discoveryRecord(t *testing.T, text string) dns.RR {
	rr, err := dns.NewRR(text)
	require.NoError(t, err)
	return rr
}

// First has the first question that this record answers answered with it alone.
func (n *DiscoveryNet) First(record string) {
	rr := discoveryRecord(n.t, record)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.once[discoveryQuestion(rr.Header().Name, rr.Header().Rrtype)] = []dns.RR{rr}
}

// Fail answers a question with an error code.
func (n *DiscoveryNet) Fail(name string, qtype uint16, rcode int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rcodes[discoveryQuestion(name, qtype)] = rcode
}

// Asked counts a question.
func (n *DiscoveryNet) Asked(name string, qtype uint16) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked[discoveryQuestion(name, qtype)]
}

// Detour leads connections to a host and port to s.
func (n *DiscoveryNet) Detour(host, port string, s *DiscoveryServer) {
	if _, err := netip.ParseAddr(host); err != nil {
		host += "."
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.detours[net.JoinHostPort(host, port)] = s.Address
}

func (n *DiscoveryNet) detour(address string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	host, port, _ := net.SplitHostPort(address)
	if to, ok := n.detours[address]; ok {
		toHost, toPort, _ := net.SplitHostPort(to)
		if _, err := netip.ParseAddr(host); err != nil {
			toHost = host // a name is still looked up
		}
		return net.JoinHostPort(toHost, toPort)
	}
	if port == "443" || port == "8448" {
		return net.JoinHostPort(host, "1")
	}
	return address
}

// Get asks for a URL of the form https://server-name/path and reads the answer.
func (n *DiscoveryNet) Get(url string) (string, error) {
	q, err := http.NewRequest(http.MethodGet, url, nil)
	require.NoError(n.t, err)
	answer, err := n.Resolver.RoundTrip(q)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return string(body), err
}

// DiscoveryServer is an HTTPS server that notes what it sees.
type DiscoveryServer struct {
	Address, Port string

	mu    sync.Mutex
	seen  []DiscoveryHit
	conns int
}

// DiscoveryHit is one request.
type DiscoveryHit struct{ Host, SNI, URI, Proto, Body string }

// Serve starts a server on 127.0.0.1 that has a certificate for names.
func (n *DiscoveryNet) Serve(handler http.HandlerFunc, names ...string) *DiscoveryServer {
	return n.ServeAt("127.0.0.1", handler, names...)
}

// ServeAt is Serve on another address of this machine; the test is skipped if there is no such address.
func (n *DiscoveryNet) ServeAt(ip string, handler http.HandlerFunc, names ...string) *DiscoveryServer {
	listener, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		n.t.Skip(err)
	}
	s := &DiscoveryServer{Address: listener.Addr().String()}
	_, s.Port, _ = net.SplitHostPort(s.Address)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.mu.Lock()
		s.seen = append(s.seen, DiscoveryHit{r.Host, r.TLS.ServerName, r.RequestURI, r.Proto, string(body)})
		s.mu.Unlock()
		if handler != nil {
			handler(w, r)
		}
	}))
	server.Listener.Close()
	server.Listener, server.EnableHTTP2 = listener, true
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if state == http.StateNew {
			s.conns++
		}
	}
	server.TLS = &tls.Config{Certificates: []tls.Certificate{n.certificate(names)}}
	server.StartTLS()
	n.t.Cleanup(server.Close)
	return s
}

func (n *DiscoveryNet) certificate(names []string) tls.Certificate {
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour)}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	key := discoveryKey(n.t)
	der, err := x509.CreateCertificate(rand.Reader, template, n.ca, key.Public(), n.caKey)
	require.NoError(n.t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Seen returns the requests so far.
func (s *DiscoveryServer) Seen() []DiscoveryHit {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen
}

// Conns counts the connections so far.
func (s *DiscoveryServer) Conns() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns
}

// TestResolver_Vectors looks at both ends of each line: only the expected host and port is served at all, and the server
// there sees Host and SNI.
func TestResolver_Vectors(t *testing.T) {
	for i, v := range discoveryVectors(t) {
		want := v.Result[0]
		t.Run(fmt.Sprintf("%d %s step %s", i, v.ServerName, want.Step), func(t *testing.T) {
			n, web := v.net(t)
			s := n.Serve(nil, want.CertificateFor)
			if want.ConnectPort != 443 && want.Step[0] < '3' {
				n.Detour(want.ConnectHost, "443", web)
			}
			n.Detour(want.ConnectHost, strconv.Itoa(want.ConnectPort), s)
			_, err := n.Get("https://" + v.ServerName + "/path")
			require.NoError(t, err)
			require.Empty(t, n.Resolver.federation.TLSClientConfig.ServerName, "it is shared by all")
			require.Equal(t, []DiscoveryHit{{want.HostHeader, want.SNI, "/path", "HTTP/2.0", ""}}, s.Seen())
			if want.Step[0] < '3' {
				require.Zero(t, web.Conns())
				require.Zero(t, n.Asked("_matrix-fed._tcp.example.org.", dns.TypeSRV))
			} else {
				require.Equal(t, []DiscoveryHit{{"example.org", "example.org", "/.well-known/matrix/server", "HTTP/2.0", ""}}, web.Seen())
			}
		})
		t.Run(fmt.Sprintf("%d %s wrong certificate", i, v.ServerName), func(t *testing.T) {
			n, _ := v.net(t)
			wrong := "wrong.example"
			if want.ConnectHost != want.CertificateFor {
				wrong = want.ConnectHost // the name of an SRV target is not enough
			}
			s := n.Serve(nil, wrong)
			n.Detour(want.ConnectHost, strconv.Itoa(want.ConnectPort), s)
			_, err := n.Get("https://" + v.ServerName + "/path")
			var mismatch x509.HostnameError
			require.ErrorAs(t, err, &mismatch)
			require.Equal(t, want.CertificateFor, mismatch.Host)
			require.ErrorContains(t, err, v.ServerName)
			require.NotZero(t, s.Conns())
			require.Empty(t, s.Seen())
		})
	}
}

type discoveryVector struct {
	ServerName string `json:"server_name"`
	WellKnown  string `json:"well_known_m_server"`
	SRV        map[string]struct {
		Target string
		Port   int
	}
	Result []struct {
		Step           string
		ConnectHost    string `json:"connect_host"`
		ConnectPort    int    `json:"connect_port"`
		HostHeader     string `json:"host_header"`
		CertificateFor string `json:"certificate_for"`
		SNI            string
	}
}

func discoveryVectors(t *testing.T) []discoveryVector {
	text, err := os.ReadFile("testdata/vectors/derived_discovery.json")
	require.NoError(t, err)
	var file struct{ Vectors []discoveryVector }
	require.NoError(t, json.Unmarshal(text, &file))
	require.NotEmpty(t, file.Vectors)
	return file.Vectors
}

// net builds the surroundings of a vector, and the server that answers for example.org on port 443.
func (v *discoveryVector) net(t *testing.T) (*DiscoveryNet, *DiscoveryServer) {
	n := NewDiscoveryNet(t)
	web := n.Serve(func(w http.ResponseWriter, r *http.Request) {
		if v.WellKnown == "" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintf(w, `{"m.server": %q}`, v.WellKnown)
	}, "example.org")
	n.Detour("example.org", "443", web)
	n.Zone("example.org. A 127.0.0.1")
	for name, srv := range v.SRV {
		n.Zone(fmt.Sprintf("%s. SRV 10 10 %d %s.", name, srv.Port, srv.Target))
	}
	if host := v.Result[0].ConnectHost; host != "example.org" && net.ParseIP(host) == nil {
		n.Zone(host + ". A 127.0.0.1")
	}
	return n, web
}

func TestIsPublic(t *testing.T) {
	for ip, want := range map[string]bool{
		"8.8.8.8": true, "1.1.1.1": true, "100.63.255.255": true, "100.128.0.0": true, "172.32.0.1": true, "223.255.255.255": true,
		"2606:4700::1111": true, "2a00::1": true, "2001:200::1": true,
		"0.0.0.0": false, "0.1.2.3": false, "10.0.0.1": false, "100.64.0.1": false, "100.127.255.255": false, "127.0.0.1": false,
		"127.255.255.254": false, "169.254.169.254": false, "172.16.0.1": false, "172.31.255.255": false, "192.0.0.8": false,
		"192.0.2.1": false, "192.88.99.1": false, "192.168.0.1": false, "198.18.0.1": false, "198.19.255.255": false,
		"198.51.100.1": false, "203.0.113.1": false, "224.0.0.1": false, "239.0.0.1": false, "240.0.0.1": false, "255.255.255.255": false,
		"::": false, "::1": false, "::8.8.8.8": false, "::ffff:8.8.8.8": false, "::ffff:10.0.0.1": false, "64:ff9b::808:808": false,
		"64:ff9b:1::1": false, "100::1": false, "2001::1": false, "2001:2::1": false, "2001:10::1": false, "2001:db8::1": false,
		"2002:808:808::1": false, "3fff::1": false, "5f00::1": false, "fc00::1": false, "fd12::1": false, "fe80::1": false,
		"fe80::1%lo": false, "2606:4700::1%lo": false, "fec0::1": false, "ff02::1": false,
	} {
		require.Equal(t, want, isPublic(netip.MustParseAddr(ip)), ip)
	}
	require.False(t, isPublic(netip.Addr{}))
}
