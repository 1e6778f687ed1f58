package mxfed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// This file asks hosts where their Matrix server is (delegation), and remembers the answers.
// https://spec.matrix.org/v1.19/server-server-api/#getwell-knownmatrixserver

const (
	wellKnownTimeout      = 10 * time.Second // of one question, redirects included
	maxWellKnown          = 50 << 10         // bytes of an answer
	maxWellKnownRedirects = 10

	defaultFreshness = 24 * time.Hour // of an answer without cache headers
	maxFreshness     = 48 * time.Hour
	firstRetry       = time.Minute // after a failure; doubles with each further one
	maxRetry         = time.Hour

	maxDelegations = 10_000 // hosts remembered
	maxFailureText = 200    // bytes of what is remembered of a failure
)

// delegation is what is known of a host's delegation.
type delegation struct {
	to       ServerName // "" if the host delegates to nobody, or so it seems
	failure  string     // why to is empty
	failures int        // in a row
	until    time.Time  // when to ask again
}

// delegations asks each host once for all who want to know at the same time. It is safe for concurrent use.
type delegations struct {
	client *http.Client
	now    func() time.Time

	mu     sync.Mutex
	known  *simplelru.LRU[string, delegation]
	asking map[string]*question
}

// question is a request that is under way. It ends with the last one who waits for the answer.
type question struct {
	waiting int // guarded by delegations.mu
	cancel  context.CancelFunc
	done    chan struct{} // closed when answer is set
	answer  delegation
}

func newDelegations(transport http.RoundTripper, now func() time.Time) *delegations {
	known, _ := simplelru.NewLRU[string, delegation](maxDelegations, nil) // an error would mean a size of 0
	return &delegations{
		client: &http.Client{Transport: transport, CheckRedirect: checkRedirect},
		now:    now,
		known:  known,
		asking: make(map[string]*question),
	}
}

// checkRedirect judges one redirect of a well-known answer. A host must have the form of a server name, which also keeps
// out ports that do not exist.
func checkRedirect(q *http.Request, via []*http.Request) error {
	switch {
	case len(via) > maxWellKnownRedirects:
		return errors.New("too many redirects")
	case q.URL.Scheme != "https":
		return errors.New("redirect to something that is not https")
	case !ServerName(q.URL.Host).valid():
		return errors.New("redirect to a malformed host")
	case slices.ContainsFunc(via, func(v *http.Request) bool { return v.URL.String() == q.URL.String() }):
		return errors.New("redirects form a loop")
	}
	return nil
}

// find returns the delegation of host. The only error is the context's: a host that fails to answer delegates to nobody,
// and one that takes half of the time that ctx leaves fails, so that there is time to go on without it.
func (d *delegations) find(ctx context.Context, host string) (delegation, error) {
	now := d.now()
	d.mu.Lock()
	known, _ := d.known.Get(host)
	if now.Before(known.until) {
		d.mu.Unlock()
		return known, nil
	}
	q := d.asking[host]
	if q == nil {
		q = d.startAsking(host, known.failures)
	}
	q.waiting++
	d.mu.Unlock()
	defer d.leave(host, q)
	patience := ctx
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		patience, cancel = context.WithTimeout(ctx, time.Until(deadline)/2)
		defer cancel()
	}
	select {
	case <-q.done:
		return q.answer, nil
	case <-patience.Done():
		return delegation{failure: "no answer in time"}, ctx.Err()
	}
}

// startAsking is called with mu locked. The question belongs to all who wait, so its context is none of theirs.
func (d *delegations) startAsking(host string, failures int) *question {
	ctx, cancel := context.WithTimeout(context.Background(), wellKnownTimeout)
	q := &question{cancel: cancel, done: make(chan struct{})}
	d.asking[host] = q
	go func() {
		defer close(q.done)
		answer := d.answer(ctx, host, failures)
		d.mu.Lock()
		defer d.mu.Unlock()
		q.answer = answer
		if d.asking[host] == q { // not abandoned
			delete(d.asking, host)
			d.known.Add(host, answer)
		}
	}()
	return q
}

// leave is called by each who waited; the last one sees to it that nothing of q goes on.
func (d *delegations) leave(host string, q *question) {
	d.mu.Lock()
	q.waiting--
	last := q.waiting == 0
	if last && d.asking[host] == q {
		delete(d.asking, host)
	}
	d.mu.Unlock()
	if last {
		q.cancel()
		<-q.done
	}
}

// answer turns whatever comes of the question into a delegation to remember. Failures are remembered too, longer each
// time, for up to an hour.
func (d *delegations) answer(ctx context.Context, host string, failures int) delegation {
	to, fresh, err := d.fetch(ctx, host)
	now := d.now()
	if err != nil {
		text := err.Error()
		text = strings.Clone(text[:min(len(text), maxFailureText)])
		wait := min(firstRetry<<min(failures, 10), maxRetry)
		return delegation{failure: text, failures: failures + 1, until: now.Add(wait)}
	}
	return delegation{to: to, until: now.Add(fresh)}
}

// fetch asks host. The content type does not matter.
func (d *delegations) fetch(ctx context.Context, host string) (to ServerName, fresh time.Duration, err error) {
	q := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: host, Path: "/.well-known/matrix/server"}}
	r, err := d.client.Do(q.WithContext(ctx))
	if err != nil {
		return "", 0, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return "", 0, fmt.Errorf("status %d", r.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxWellKnown+1))
	if err != nil {
		return "", 0, err
	}
	if len(body) > maxWellKnown {
		return "", 0, fmt.Errorf("more than %d bytes", maxWellKnown)
	}
	var reader jsonReader
	text, err := reader.canonical(body, numbersAsReceived)
	if err != nil {
		return "", 0, err
	}
	server, ok := value(text).get("m.server").str()
	if !ok || !ServerName(server).valid() {
		return "", 0, errors.New("m.server is no server name")
	}
	return ServerName(strings.Clone(server)), freshness(r.Header, d.now()), nil
}

// freshness is how long an answer with these headers may be used, as RFC 9111 and the specification say.
// https://spec.matrix.org/v1.19/server-server-api/#resolving-server-names
func freshness(h http.Header, now time.Time) time.Duration {
	fresh, explicit := defaultFreshness, false
	if expires := h.Get("Expires"); expires != "" {
		fresh, explicit = 0, true // whatever is no date lies in the past
		if at, err := http.ParseTime(expires); err == nil {
			sent, err := http.ParseTime(h.Get("Date"))
			if err != nil {
				sent = now
			}
			fresh = at.Sub(sent)
		}
	}
	for directive := range strings.SplitSeq(strings.Join(h.Values("Cache-Control"), ","), ",") {
		name, argument, _ := strings.Cut(strings.ToLower(strings.TrimSpace(directive)), "=")
		switch name {
		case "no-store", "no-cache":
			return 0
		case "max-age":
			fresh, explicit = headerSeconds(strings.Trim(argument, `"`)), true
		}
	}
	if explicit {
		fresh -= headerSeconds(h.Get("Age"))
	}
	return min(max(fresh, 0), maxFreshness)
}

// headerSeconds reads a number of seconds; 0 if it is none.
func headerSeconds(s string) time.Duration {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0
	}
	return time.Duration(min(n, 1<<31)) * time.Second
}
