package mxfed

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// delegatingNet has example.org at one server, deleg.example at another, and web for what is asked on port 443.
func delegatingNet(t *testing.T, answer http.HandlerFunc) (n *DiscoveryNet, direct, delegated, web *DiscoveryServer) {
	n = NewDiscoveryNet(t)
	n.Zone("example.org. A 127.0.0.1", "deleg.example. A 127.0.0.1", "other.example. A 127.0.0.1")
	direct, delegated = n.Serve(nil, "example.org"), n.Serve(nil, "deleg.example")
	web = n.Serve(answer, "example.org", "other.example")
	n.Detour("example.org", "8448", direct)
	n.Detour("deleg.example", "8448", delegated)
	n.Detour("example.org", "443", web)
	n.Detour("other.example", "443", web)
	return n, direct, delegated, web
}

const wellKnownAnswer = `{"m.server":"deleg.example"}`

func TestResolver_WellKnownAnswers(t *testing.T) {
	padded := func(size int) string { return wellKnownAnswer + strings.Repeat(" ", size-len(wellKnownAnswer)) }
	for name, test := range map[string]struct {
		status    int
		body      string
		delegates bool
	}{
		"plain":                  {200, wellKnownAnswer, true},
		"other members":          {200, `{"a":1.5e3,"m.server":"deleg.example","z":null}`, true},
		"escaped":                {200, `{"m\u002eserver":"deleg\u002eexample"}`, true},
		"50 KiB":                 {200, padded(50 << 10), true},
		"50 KiB and a byte":      {200, padded(50<<10 + 1), false},
		"not found":              {404, wellKnownAnswer, false},
		"created":                {201, wellKnownAnswer, false},
		"server error":           {500, wellKnownAnswer, false},
		"empty":                  {200, "", false},
		"no JSON":                {200, "<html>", false},
		"trailing junk":          {200, wellKnownAnswer + "x", false},
		"duplicate member":       {200, `{"m.server":"deleg.example","m.server":"deleg.example"}`, false},
		"array":                  {200, `["deleg.example"]`, false},
		"string":                 {200, `"deleg.example"`, false},
		"null":                   {200, `null`, false},
		"number":                 {200, `{"m.server":1}`, false},
		"list":                   {200, `{"m.server":["deleg.example"]}`, false},
		"no member":              {200, `{"M.SERVER":"deleg.example"}`, false},
		"empty name":             {200, `{"m.server":""}`, false},
		"URL":                    {200, `{"m.server":"https://deleg.example"}`, false},
		"path":                   {200, `{"m.server":"deleg.example/"}`, false},
		"user":                   {200, `{"m.server":"a@deleg.example"}`, false},
		"port out of range":      {200, `{"m.server":"deleg.example:65536"}`, false},
		"empty port":             {200, `{"m.server":"deleg.example:"}`, false},
		"IPv6 with zone":         {200, `{"m.server":"[fe80::1%25lo]"}`, false},
		"IPv6 without brackets":  {200, `{"m.server":"::1"}`, false},
		"white space":            {200, `{"m.server":" deleg.example"}`, false},
		"line break in the name": {200, `{"m.server":"deleg.example\n"}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			n, direct, delegated, web := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/plain")
				w.WriteHeader(test.status)
				io.WriteString(w, test.body)
			})
			_, err := n.Get("https://example.org/")
			require.NoError(t, err)
			require.Len(t, web.Seen(), 1)
			if test.delegates {
				require.Empty(t, direct.Seen())
				require.Len(t, delegated.Seen(), 1)
			} else {
				require.Len(t, direct.Seen(), 1)
				require.Empty(t, delegated.Seen())
			}
		})
	}
}

func TestResolver_WellKnownWithoutEnd(t *testing.T) {
	var written atomic.Int64
	n, direct, _, _ := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
		for chunk := bytes.Repeat([]byte(" "), 32<<10); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
			written.Add(int64(len(chunk)))
		}
	})
	_, err := n.Get("https://example.org/")
	require.NoError(t, err)
	require.Len(t, direct.Seen(), 1)
	require.Less(t, written.Load(), int64(32<<20), "more than what is under way between two buffers")
}

// TestResolver_DelegationIsFollowedOnce: the delegated host's own delegation is not asked for.
func TestResolver_DelegationIsFollowedOnce(t *testing.T) {
	n, _, delegated, web := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, wellKnownAnswer) })
	n.Detour("deleg.example", "443", web)
	_, err := n.Get("https://example.org/")
	require.NoError(t, err)
	require.Len(t, web.Seen(), 1)
	require.Len(t, delegated.Seen(), 1)
}

func TestResolver_WellKnownRedirects(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, wellKnownAnswer) }))
	defer plain.Close()
	for name, test := range map[string]struct {
		to      func(r *http.Request) string // "": answers
		asked   int
		failure string // "" delegates
	}{
		"one":           {redirectOnce("https://other.example/x"), 2, ""},
		"relative":      {redirectOnce("/x"), 2, ""},
		"ten":           {redirectUntil(10), 11, ""},
		"eleven":        {redirectUntil(11), 11, "too many redirects"},
		"loop":          {func(r *http.Request) string { return "https://example.org/.well-known/matrix/server" }, 1, "loop"},
		"loop of two":   {redirectBetween("/a", "/b"), 3, "loop"},
		"http":          {redirectOnce(plain.URL), 1, "not https"},
		"other scheme":  {redirectOnce("ftp://example.org/x"), 1, "not https"},
		"bad port":      {redirectOnce("https://other.example:65536/x"), 1, "malformed host"},
		"no host":       {redirectOnce("https:///x"), 1, "malformed host"},
		"name mismatch": {redirectOnce("https://deleg.example:443/x"), 1, "certificate is valid for example.org, other.example"},
	} {
		t.Run(name, func(t *testing.T) {
			n, direct, delegated, web := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
				if to := test.to(r); to != "" {
					http.Redirect(w, r, to, http.StatusFound)
					return
				}
				io.WriteString(w, wellKnownAnswer)
			})
			n.Detour("deleg.example", "443", web) // whose certificate is for others
			_, err := n.Get("https://example.org/")
			require.NoError(t, err)
			require.Len(t, web.Seen(), test.asked)
			known, _ := n.Resolver.wellKnown.known.Get("example.org")
			if test.failure == "" {
				require.Len(t, delegated.Seen(), 1)
				require.Empty(t, direct.Seen())
				require.Empty(t, known.failure)
			} else {
				require.Empty(t, delegated.Seen())
				require.Len(t, direct.Seen(), 1)
				require.Contains(t, known.failure, test.failure)
			}
			require.Zero(t, n.Asked("_matrix-fed._tcp.other.example.", dns.TypeSRV))
		})
	}
}

func redirectOnce(to string) func(r *http.Request) string {
	return func(r *http.Request) string {
		if r.URL.Path == "/x" {
			return ""
		}
		return to
	}
}

func redirectBetween(a, b string) func(r *http.Request) string {
	return func(r *http.Request) string {
		if r.URL.Path == a {
			return b
		}
		return a
	}
}

func redirectUntil(n int) func(r *http.Request) string {
	return func(r *http.Request) string {
		at, _ := strconv.Atoi(r.URL.Query().Get("n"))
		if at == n {
			return ""
		}
		return fmt.Sprintf("/?n=%d", at+1)
	}
}

// discoveryClock is a clock that a test moves.
type discoveryClock struct {
	mu sync.Mutex
	at time.Time
}

func (c *discoveryClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *discoveryClock) Move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func TestResolver_WellKnownLifetime(t *testing.T) {
	clock := &discoveryClock{at: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	date := func(d time.Duration) string { return clock.Now().Add(d).Format(http.TimeFormat) }
	for name, test := range map[string]struct {
		header map[string]string
		want   time.Duration
	}{
		"none":                    {nil, 24 * time.Hour},
		"unknown directives":      {map[string]string{"Cache-Control": "public, s-maxage=1"}, 24 * time.Hour},
		"max-age":                 {map[string]string{"Cache-Control": "public, Max-Age=60"}, time.Minute},
		"quoted":                  {map[string]string{"Cache-Control": `max-age="60"`}, time.Minute},
		"two days":                {map[string]string{"Cache-Control": "max-age=172800"}, 48 * time.Hour},
		"capped":                  {map[string]string{"Cache-Control": "max-age=172801"}, 48 * time.Hour},
		"beyond 64 bits":          {map[string]string{"Cache-Control": "max-age=99999999999999999999"}, 48 * time.Hour},
		"malformed max-age":       {map[string]string{"Cache-Control": "max-age=-5"}, 0},
		"zero":                    {map[string]string{"Cache-Control": "max-age=0"}, 0},
		"no-store":                {map[string]string{"Cache-Control": "max-age=60, no-store"}, 0},
		"no-cache":                {map[string]string{"Cache-Control": "no-cache"}, 0},
		"Expires":                 {map[string]string{"Expires": date(time.Hour), "Date": date(0)}, time.Hour},
		"Expires by their clock":  {map[string]string{"Expires": date(-time.Hour), "Date": date(-3 * time.Hour)}, 2 * time.Hour},
		"Expires in the past":     {map[string]string{"Expires": date(-time.Hour), "Date": date(0)}, 0},
		"Expires capped":          {map[string]string{"Expires": date(1000 * time.Hour), "Date": date(0)}, 48 * time.Hour},
		"Expires malformed":       {map[string]string{"Expires": "0"}, 0},
		"max-age beats Expires":   {map[string]string{"Expires": date(time.Hour), "Cache-Control": "max-age=60"}, time.Minute},
		"age":                     {map[string]string{"Cache-Control": "max-age=60", "Age": "20"}, 40 * time.Second},
		"age beyond max-age":      {map[string]string{"Cache-Control": "max-age=60", "Age": "99999999999999999999"}, 0},
		"age without a lifetime":  {map[string]string{"Age": "100000"}, 24 * time.Hour},
		"age of a long max-age":   {map[string]string{"Cache-Control": "max-age=31536000", "Age": "259200"}, 48 * time.Hour},
		"malformed age":           {map[string]string{"Cache-Control": "max-age=60", "Age": "x"}, time.Minute},
		"Cache-Control is a list": {map[string]string{"Cache-Control": "private,max-age=60 ,must-revalidate"}, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			n, _, delegated, web := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Date"] = nil // the server would send today's
				for k, v := range test.header {
					w.Header().Set(k, v)
				}
				io.WriteString(w, wellKnownAnswer)
			})
			clock := &discoveryClock{at: clock.Now()}
			n.Resolver.Now = clock.Now
			requests := 0
			ask := func(want int) {
				requests++
				_, err := n.Get("https://example.org/")
				require.NoError(t, err)
				require.Len(t, web.Seen(), want)
				require.Equal(t, want, web.Conns(), "none is kept for another day")
				require.Len(t, delegated.Seen(), requests)
			}
			ask(1)
			if test.want > 0 {
				clock.Move(test.want - time.Second)
				ask(1)
				clock.Move(time.Second)
			}
			ask(2)
		})
	}
}

func TestResolver_FailureIsRememberedLongerEachTime(t *testing.T) {
	var healthy atomic.Bool
	n, direct, delegated, web := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=0") // of a success only
		if !healthy.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
		io.WriteString(w, wellKnownAnswer)
	})
	clock := &discoveryClock{at: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	n.Resolver.Now = clock.Now
	ask := func(want int) {
		_, err := n.Get("https://example.org/")
		require.NoError(t, err)
		require.Len(t, web.Seen(), want)
	}
	ask(1)
	for i, minutes := range []int{1, 2, 4, 8, 16, 32, 60, 60, 60} {
		clock.Move(time.Duration(minutes)*time.Minute - time.Second)
		ask(i + 1)
		clock.Move(time.Second)
		ask(i + 2)
	}
	require.Empty(t, delegated.Seen())
	healthy.Store(true)
	clock.Move(time.Hour)
	ask(11)
	require.Len(t, delegated.Seen(), 1)
	healthy.Store(false)
	ask(12)
	clock.Move(time.Minute) // it starts anew
	ask(13)
	require.NotEmpty(t, direct.Seen())
}

func TestResolver_RemembersBoundedly(t *testing.T) {
	d := newDelegations(nil, time.Now)
	for i := range maxDelegations + 10 {
		d.known.Add(strconv.Itoa(i), delegation{})
	}
	require.Equal(t, maxDelegations, d.known.Len())

	n, _, _, _ := delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://other.example/"+strings.Repeat("x", 10_000), http.StatusFound)
	})
	_, err := n.Get("https://example.org/")
	require.NoError(t, err)
	known, ok := n.Resolver.wellKnown.known.Get("example.org")
	require.True(t, ok)
	require.Len(t, known.failure, maxFailureText)
}

// heldNet is a delegatingNet whose well-known answer waits for release; left is closed when the asker goes away.
func heldNet(t *testing.T) (n *DiscoveryNet, web *DiscoveryServer, release, left chan struct{}) {
	release, left = make(chan struct{}), make(chan struct{})
	var once sync.Once
	n, _, _, web = delegatingNet(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
			io.WriteString(w, wellKnownAnswer)
		case <-r.Context().Done():
			once.Do(func() { close(left) })
		}
	})
	return n, web, release, left
}

// askMany starts requests and returns when all of them wait for the same answer.
func (n *DiscoveryNet) askMany(ctx context.Context, already, count int) chan error {
	results := make(chan error, count)
	for range count {
		go func() {
			q, _ := http.NewRequestWithContext(ctx, http.MethodPut, "https://example.org/", bytes.NewReader([]byte("body")))
			answer, err := n.Resolver.RoundTrip(q)
			if err == nil {
				answer.Body.Close()
			}
			results <- err
		}()
	}
	n.Resolver.once.Do(n.Resolver.setUp)
	for d := n.Resolver.wellKnown; ; runtime.Gosched() {
		d.mu.Lock()
		q := d.asking["example.org"]
		all := q != nil && q.waiting == already+count
		d.mu.Unlock()
		if all {
			return results
		}
	}
}

func TestResolver_OneQuestionForAll(t *testing.T) {
	n, web, release, _ := heldNet(t)
	patient := n.askMany(context.Background(), 0, 5)
	ctx, cancel := context.WithCancel(context.Background())
	impatient := n.askMany(ctx, 5, 3)
	cancel()
	for range 3 {
		require.ErrorIs(t, <-impatient, context.Canceled)
	}
	close(release)
	for range 5 {
		require.NoError(t, <-patient)
	}
	require.Len(t, web.Seen(), 1)
}

// hurriedContext says that its time is almost over, and never ends.
type hurriedContext struct{ context.Context }

func (hurriedContext) Deadline() (time.Time, bool) {
	return time.Now().Add(100 * time.Millisecond), true
}

// TestResolver_GoesOnInTime: a host that does not answer on port 443 can still be reached by who has little time.
func TestResolver_GoesOnInTime(t *testing.T) {
	n, web, _, _ := heldNet(t)
	q, err := http.NewRequestWithContext(hurriedContext{context.Background()}, http.MethodGet, "https://example.org/", nil)
	require.NoError(t, err)
	for range 2 {
		answer, err := n.Resolver.RoundTrip(q)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, "example.org", answer.Request.URL.Host)
	}
	require.LessOrEqual(t, len(web.Seen()), 2)
	require.Zero(t, n.Resolver.wellKnown.known.Len(), "the next one may have more time")
}

func TestResolver_QuestionEndsWithTheLastWhoWaits(t *testing.T) {
	n, web, release, left := heldNet(t)
	ctx, cancel := context.WithCancel(context.Background())
	first := n.askMany(ctx, 0, 1)
	for len(web.Seen()) == 0 {
		runtime.Gosched()
	}
	q := n.Resolver.wellKnown.asking["example.org"]
	cancel()
	require.ErrorIs(t, <-first, context.Canceled)
	select {
	case <-q.done:
	default:
		t.Error("the question goes on")
	}
	require.Contains(t, q.answer.failure, "context canceled")
	<-left
	require.Empty(t, n.Resolver.wellKnown.asking)
	require.Zero(t, n.Resolver.wellKnown.known.Len(), "giving up says nothing about the host")
	close(release)
	_, err := n.Get("https://example.org/")
	require.NoError(t, err)
}
