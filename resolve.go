package mxfed

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	federationPort = 8448 // where nothing names another

	dialTimeout    = 30 * time.Second // to look up and try all addresses of one server
	connectTimeout = 10 * time.Second // for one target of them, TLS included
	maxTargets     = 8                // SRV targets tried

	defaultIdleTimeout = 90 * time.Second
	maxAnswerHeader    = 256 << 10 // bytes
)

// Resolver is the http.RoundTripper for URLs of the form https://server-name/path. It finds out where the server is
// (well-known delegation, SRV records, port 8448), connects, checks the certificate, and sends the request with the right
// Host header. Redirects are not followed. All waiting is bounded by the request's context, connecting also by 30 seconds.
// The zero value works. A Resolver is safe for concurrent use; its fields must not change, nor may it be copied, once it
// is used. https://spec.matrix.org/v1.19/server-server-api/#resolving-server-names
type Resolver struct {
	// Base is what connections are modelled on: TLS settings such as TLSClientConfig.RootCAs (nil: the system's roots),
	// limits, timeouts. Its dial functions are not used, and a request that its Proxy wants to send through a proxy
	// fails: where connections go is what a Resolver decides. Zero limits: idle connections are closed after 90 seconds,
	// headers of an answer are at most 256 KiB. Nil: the zero Transport.
	Base *http.Transport
	// AllowIP judges every address before a connection to it is made, those of well-known requests and redirects
	// included. Nil refuses what is not a public unicast address: private, loopback, link-local and reserved ones, and
	// those of IPv6 that stand for others (IPv4-mapped, NAT64, 6to4, Teredo). It may be called concurrently.
	AllowIP func(netip.Addr) bool
	// DNS looks up names; nil: net.DefaultResolver.
	DNS *net.Resolver
	// Now is the clock for cached delegations; nil: time.Now.
	Now func() time.Time

	once       sync.Once
	federation attachedTransport
	web        webTransport
	wellKnown  *delegations
	detour     func(address string) string // tests: where to connect instead
}

// RoundTrip sends q to the server that q.URL.Host names. Path and query leave as they are in q.URL; q itself is not
// changed, its Host field not used. Errors name the server and what failed; a server that was found but could not be
// reached is one of them, an answer of whatever status is none. It implements http.RoundTripper.
func (r *Resolver) RoundTrip(q *http.Request) (*http.Response, error) {
	r.once.Do(r.setUp)
	to, err := r.discover(q)
	if err != nil {
		if q.Body != nil {
			q.Body.Close() // as every RoundTripper does
		}
		return nil, fmt.Errorf("mxfed: resolve %w", err)
	}
	out, url := q.WithContext(q.Context()), *q.URL
	url.Host = to.pool()
	out.URL, out.Host = &url, string(to.name)
	answer, err := r.federation.RoundTrip(out)
	if err != nil {
		return nil, fmt.Errorf("mxfed: reach %s%s: %w", q.URL.Host, to.note, err)
	}
	answer.Request = q
	return answer, nil
}

// CloseIdleConnections closes the connections that no request uses at the moment.
func (r *Resolver) CloseIdleConnections() {
	r.once.Do(r.setUp)
	r.federation.CloseIdleConnections()
}

func (r *Resolver) setUp() {
	r.federation = r.newTransport()
	r.web = webTransport{r.newTransport(), r}
	r.web.DisableKeepAlives = true // hosts are asked once a day
	now := r.Now
	if now == nil {
		now = time.Now
	}
	r.wellKnown = newDelegations(r.web, now)
}

// Web returns the RoundTripper for https URLs of hosts that are no Matrix servers, such as those of identity servers: host
// and port are those of the URL, nothing is discovered, and addresses are judged as those of servers are. Redirects are
// not followed, and connections are not kept. It is safe for concurrent use.
func (r *Resolver) Web() http.RoundTripper {
	r.once.Do(r.setUp)
	return r.web
}

// webTransport carries requests to the very host and port of their URL. A host must have the form of a server name, which
// keeps out ports that do not exist.
type webTransport struct {
	attachedTransport
	resolver *Resolver
}

func (t webTransport) RoundTrip(q *http.Request) (*http.Response, error) {
	if _, err := t.resolver.start(q); err != nil {
		if q.Body != nil {
			q.Body.Close() // as every RoundTripper does
		}
		return nil, fmt.Errorf("mxfed: reach %w", err)
	}
	return t.attachedTransport.RoundTrip(q)
}

// newTransport returns a Transport that dials as r does. It keeps connections by URL.Host, which RoundTrip sets to the
// name that the certificate is for, so that servers behind one address do not share them.
func (r *Resolver) newTransport() attachedTransport {
	base := r.Base
	if base == nil {
		base = &http.Transport{}
	}
	t := base.Clone()
	t.Proxy = nil
	t.ForceAttemptHTTP2 = true
	t.IdleConnTimeout = cmp.Or(t.IdleConnTimeout, defaultIdleTimeout)
	t.MaxResponseHeaderBytes = cmp.Or(t.MaxResponseHeaderBytes, maxAnswerHeader)
	t.DialContext = func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("only https is allowed")
	}
	t.DialTLSContext = func(ctx context.Context, _, address string) (net.Conn, error) {
		return r.dial(ctx, t.TLSClientConfig, address)
	}
	return attachedTransport{t}
}

// attachedTransport is a Transport whose dials end with the request that they are for. By itself, a Transport finishes
// them for requests to come.
type attachedTransport struct{ *http.Transport }

// requestContext is the key under which a dial finds the context of its request.
type requestContext struct{}

func (t attachedTransport) RoundTrip(q *http.Request) (*http.Response, error) {
	ctx := q.Context()
	return t.Transport.RoundTrip(q.WithContext(context.WithValue(ctx, requestContext{}, ctx)))
}

// route is where a request goes.
type route struct {
	name ServerName // for the Host header
	serverAddress
	note string // for errors: what became of the well-known request, if there was one
}

// portBySRV stands for a port that has to be looked up; no server name and no URL that is followed can have it.
const portBySRV = "65536"

// pool is the host and port under which connections are kept and dialled.
func (to *route) pool() string {
	port := to.port
	switch {
	case port != "":
	case to.lit:
		port = strconv.Itoa(federationPort)
	default:
		port = portBySRV
	}
	return net.JoinHostPort(to.host, port)
}

// discover does the steps that come before SRV records; dial does the rest.
// https://spec.matrix.org/v1.19/server-server-api/#resolving-server-names
func (r *Resolver) discover(q *http.Request) (*route, error) {
	to, err := r.start(q)
	if err != nil || to.lit || to.port != "" {
		return to, err
	}
	found, err := r.wellKnown.find(q.Context(), to.host)
	if err != nil {
		return nil, fmt.Errorf("%s: well-known: %w", to.name, err)
	}
	if found.to == "" {
		to.note = " (well-known: " + found.failure + ")"
		return to, nil
	}
	delegated, err := newRoute(found.to)
	if err != nil {
		return nil, fmt.Errorf("%s: well-known: %w", to.name, err)
	}
	delegated.note = " (well-known: " + string(found.to) + ")"
	return delegated, nil
}

// start is the route to the host and port that stand in the URL of a request that may be made at all.
func (r *Resolver) start(q *http.Request) (*route, error) {
	if q.URL == nil || q.URL.Scheme != "https" {
		return nil, errors.New("a URL that is not https")
	}
	if r.Base != nil && r.Base.Proxy != nil {
		proxy, err := r.Base.Proxy(q)
		if err != nil {
			return nil, fmt.Errorf("%s: proxy: %w", q.URL.Host, err)
		}
		if proxy != nil {
			return nil, fmt.Errorf("%s: Base.Proxy wants a proxy, which a Resolver cannot use", q.URL.Host)
		}
	}
	return newRoute(ServerName(q.URL.Host))
}

func newRoute(name ServerName) (*route, error) {
	address, ok := name.parse()
	if !ok {
		return nil, fmt.Errorf("%.255q: not a server name", name)
	}
	if address.lit && !address.ip.IsValid() {
		return nil, fmt.Errorf("%s: an IPv4 address with leading zeros is ambiguous", name)
	}
	return &route{name: name, serverAddress: address}, nil
}

// dial connects to what pool returned, with the last steps of discovery: SRV records, then port 8448. It is here that a
// dead target is passed over, before anything of a request is sent.
func (r *Resolver) dial(ctx context.Context, config *tls.Config, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if request, ok := ctx.Value(requestContext{}).(context.Context); ok {
		defer context.AfterFunc(request, cancel)()
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if port != portBySRV {
		return r.connect(ctx, config, host, host, port)
	}
	targets, err := r.targets(ctx, host)
	if err != nil {
		return nil, err
	}
	var failed error
	for _, t := range targets {
		conn, err := r.connect(ctx, config, host, t.Target, strconv.Itoa(int(t.Port)))
		if err == nil {
			return conn, nil
		}
		if failed == nil {
			failed = err
		} else {
			failed = fmt.Errorf("%w; %w", failed, err)
		}
	}
	return nil, failed
}

// targets returns what the SRV records of host name, in the order to try, or host itself if there are none. "No such
// record" is the only failure that means none.
func (r *Resolver) targets(ctx context.Context, host string) ([]*net.SRV, error) {
	for _, service := range []string{"matrix-fed", "matrix"} { // the second is deprecated
		_, records, err := r.DNS.LookupSRV(ctx, service, "tcp", rooted(host))
		var dnsError *net.DNSError
		if errors.As(err, &dnsError) && dnsError.IsNotFound {
			continue
		}
		var targets []*net.SRV
		for _, t := range records {
			if t.Target != "." && len(targets) < maxTargets { // RFC 2782: the root is no target
				targets = append(targets, t)
			}
		}
		switch {
		case len(targets) > 0: // malformed ones beside them do no harm
			return targets, nil
		case err != nil:
			return nil, fmt.Errorf("SRV _%s._tcp.%s: %w", service, host, err)
		}
		return nil, fmt.Errorf("SRV _%s._tcp.%s: no service there", service, host)
	}
	return []*net.SRV{{Target: host, Port: federationPort}}, nil
}

// rooted keeps search domains from being tried for a name.
func rooted(host string) string {
	if strings.HasSuffix(host, ".") {
		return host
	}
	return host + "."
}

// connect connects to one host, an address or a name, and demands a certificate for name. The certificate is for the
// server's name even if an SRV record named the host. https://spec.matrix.org/v1.19/server-server-api/#tls
func (r *Resolver) connect(ctx context.Context, config *tls.Config, name, host, port string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if ip, err := netip.ParseAddr(host); err != nil {
		if strings.Contains(host, ".") { // names of one label, such as localhost, are those of the machine's own list
			host = rooted(host)
		}
	} else if err := r.judge(ip); err != nil { // as it was written: a dialer turns IPv4-mapped addresses into IPv4
		return nil, err
	}
	address := net.JoinHostPort(host, port)
	if r.detour != nil {
		address = r.detour(address)
	}
	dialer := net.Dialer{Resolver: r.DNS, ControlContext: r.guard}
	plain, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if config == nil {
		config = &tls.Config{}
	}
	config = config.Clone()
	config.ServerName = name // for an address, nothing is sent, and the certificate must be for that address
	conn := tls.Client(plain, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		plain.Close()
		return nil, fmt.Errorf("TLS with %s: %w", net.JoinHostPort(host, port), err)
	}
	return conn, nil
}

// guard is called for each address just before the connection is made, when no look-up can change it any more.
func (r *Resolver) guard(_ context.Context, _, address string, _ syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	return r.judge(to.Addr())
}

func (r *Resolver) judge(ip netip.Addr) error {
	allow := r.AllowIP
	if allow == nil {
		allow = isPublic
	}
	if !allow(ip) {
		return fmt.Errorf("address %s is not allowed", ip)
	}
	return nil
}

// isPublic tells whether ip is a unicast address of the public internet that stands for itself.
func isPublic(ip netip.Addr) bool {
	if ip.Is6() && !publicIPv6.Contains(ip) || ip.IsPrivate() || !ip.IsGlobalUnicast() {
		return false
	}
	for _, p := range notPublic {
		if p.Contains(ip) {
			return false
		}
	}
	return true
}

// publicIPv6 holds all public unicast addresses of IPv6; IPv4-mapped ones, NAT64 and unique local ones lie outside.
var publicIPv6 = netip.MustParsePrefix("2000::/3")

// notPublic are the special ranges that netip does not know, from the registries of RFC 6890.
var notPublic = [...]netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),       // this network
	netip.MustParsePrefix("100.64.0.0/10"),   // carrier-grade NAT
	netip.MustParsePrefix("192.0.0.0/24"),    // protocol assignments
	netip.MustParsePrefix("192.0.2.0/24"),    // documentation
	netip.MustParsePrefix("192.88.99.0/24"),  // 6to4 relays
	netip.MustParsePrefix("198.18.0.0/15"),   // benchmarks
	netip.MustParsePrefix("198.51.100.0/24"), // documentation
	netip.MustParsePrefix("203.0.113.0/24"),  // documentation
	netip.MustParsePrefix("240.0.0.0/4"),     // reserved, broadcast
	netip.MustParsePrefix("2001::/23"),       // protocol assignments, Teredo among them
	netip.MustParsePrefix("2001:db8::/32"),   // documentation
	netip.MustParsePrefix("2002::/16"),       // 6to4
	netip.MustParsePrefix("3fff::/20"),       // documentation
}
