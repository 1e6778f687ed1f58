package mxfed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/sync/errgroup"
)

// This file finds the keys of other servers: in memory, in a KeyStore, and by asking, once for all who need the same.

const (
	maxKeyServers   = 10_000   // remembered
	maxKeyDocuments = 1024     // remembered for the notary
	maxKeptDocument = 16 << 10 // bytes; larger ones are used but not passed on
)

// KeyRing is the Keys that most hosts want: it fetches keys from their servers, or from notaries first, checks what it gets,
// and remembers it. The zero value works and remembers up to 10,000 servers in memory. A KeyRing is safe for concurrent
// use; it must not be copied, nor its fields changed, once it is used.
//
// One call takes 10 seconds at most on the network, under the caller's context, however many servers have to be asked; 256
// are asked at a time. Calls that need keys of the same server share one request. A server that had nothing new, or did not
// answer, is left in peace for 30 seconds, and for longer each time, up to 10 minutes; what is known of its keys is used
// meanwhile. Who was the first to use a key ID keeps it: another key under the same ID is ignored.
// https://spec.matrix.org/v1.19/server-server-api/#retrieving-server-keys
type KeyRing struct {
	// Store keeps keys over restarts; nil: memory only. It is asked for what memory does not know, and given what was
	// fetched, in one call each; at most 32 keys of a server are stored.
	Store KeyStore
	// Notaries are servers to ask about all others first, one after the other, in batches. Their signatures are checked
	// as well as those of the servers themselves, so that a notary can withhold keys but not forge them. Nil: each server
	// is asked itself.
	Notaries []ServerName
	// HTTP carries requests to https://server-name/ URLs and must not follow redirects; nil: a Resolver.
	HTTP http.RoundTripper
	// Now is the clock; nil: time.Now.
	Now func() time.Time

	once      sync.Once
	transport http.RoundTripper
	now       func() time.Time

	mu        sync.Mutex
	servers   *simplelru.LRU[ServerName, *serverKeys]
	documents *simplelru.LRU[ServerName, *keyDocument]
	inquiries map[ServerName]*inquiry // under way
}

func (k *KeyRing) setUp() {
	if k.transport = k.HTTP; k.transport == nil {
		k.transport = &Resolver{Now: k.Now}
	}
	if k.now = k.Now; k.now == nil {
		k.now = time.Now
	}
	k.servers, _ = simplelru.NewLRU[ServerName, *serverKeys](maxKeyServers, nil) // errors would mean a size of 0
	k.documents, _ = simplelru.NewLRU[ServerName, *keyDocument](maxKeyDocuments, nil)
	k.inquiries = make(map[ServerName]*inquiry)
}

// Keys fills in the keys that it knows or can fetch: those whose state at the moment At is known are not fetched again. An
// error says which servers, or that the Store, failed; what was found is filled in nevertheless. It implements Keys.
func (k *KeyRing) Keys(ctx context.Context, keys []Key) error {
	k.once.Do(k.setUp)
	storeErr := k.recall(ctx, keys)
	wanted := make(map[ServerName][]Key)
	for i := range keys {
		if q := &keys[i]; !q.covers(q.At) && q.fetchable() {
			wanted[q.Server] = append(wanted[q.Server], *q)
		}
	}
	if len(wanted) == 0 {
		return storeErr
	}
	answers, err := k.inquire(ctx, wanted, false)
	for i := range keys {
		if q := answers[keys[i].Server]; q != nil {
			q.keys[keys[i].ID].fill(&keys[i])
		}
	}
	return errors.Join(storeErr, err)
}

// fetchable tells whether a server can be asked for k.
func (k *Key) fetchable() bool {
	return strings.HasPrefix(string(k.ID), ed25519Prefix) && k.Server.valid()
}

// recall fills in keys from memory and, where that does not know enough, from the Store.
func (k *KeyRing) recall(ctx context.Context, keys []Key) error {
	var missing []Key
	var where []int
	k.mu.Lock()
	for i := range keys {
		q := &keys[i]
		var known knownKey
		if s, ok := k.servers.Get(q.Server); ok {
			known = s.keys[q.ID]
		}
		known.fill(q)
		if k.Store != nil && !(known.stored && q.covers(q.At)) && q.fetchable() {
			missing, where = append(missing, Key{Server: q.Server, ID: q.ID, At: q.At}), append(where, i)
		}
	}
	k.mu.Unlock()
	if len(missing) == 0 {
		return nil
	}
	err := k.Store.Keys(ctx, missing)
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, row := range missing {
		asked := &keys[where[i]]
		row.Server, row.ID = asked.Server, asked.ID
		k.server(asked.Server).recall(row, err == nil).fill(asked)
	}
	if err != nil {
		return fmt.Errorf("mxfed: key store: %w", err)
	}
	return nil
}

// server returns what is known of a server; mu is locked.
func (k *KeyRing) server(name ServerName) *serverKeys {
	s, ok := k.servers.Get(name)
	if !ok {
		s = &serverKeys{keys: make(map[KeyID]knownKey)}
		k.servers.Add(ServerName(strings.Clone(string(name))), s) // not to keep the caller's text
	}
	return s
}

// How long asking takes at most, and how long a server is left in peace afterwards.
const (
	keyTimeout      = 10 * time.Second // for all servers of one call together
	leastKeyTimeout = 2 * time.Second  // for each, if there are so many that they have to queue
	notaryTimeout   = 5 * time.Second  // of it, for all notaries together
	notaryRest      = time.Minute      // after a failure
	firstKeyWait    = 30 * time.Second // doubles with every time that did not find what was wanted
	maxKeyWait      = 10 * time.Minute
	shortKeyWait    = time.Second // waited out by who comes too early, rather than taken as an answer
)

const (
	keyFetches      = 256 // servers asked at a time
	notaryBatch     = 100 // servers in a question to a notary
	notaryFetches   = 8   // questions at a time
	maxNotaryAnswer = 4 << 20
	maxKeyErrors    = 8 // reported by one call
	keyEndpoint     = "key/v2/server"
	notaryEndpoint  = "key/v2/query"
)

// inquiry is a search for the keys of one server, for all who need them at the same time.
type inquiry struct {
	server ServerName
	wanted []Key // by the call that started it
	wait   time.Duration
	round  *round
	done   chan struct{} // closed when keys and err are set
	keys   map[KeyID]knownKey
	err    error
}

// round is a group of inquiries that one call has started. It ends with the last call that waits for one of them.
type round struct {
	inquiries []*inquiry
	direct    bool // ask no notaries
	cancel    context.CancelFunc
	waiting   int                  // calls; guarded by KeyRing.mu
	learnt    map[ServerName][]Key // guarded by KeyRing.mu
	over      chan struct{}        // closed when err is set
	err       error                // of the Store
}

// inquire asks the network about servers, except those that are to be left in peace, and returns what became of it.
func (k *KeyRing) inquire(ctx context.Context, wanted map[ServerName][]Key, direct bool) (map[ServerName]*inquiry, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("mxfed: keys: %w", err)
	}
	pending, started, failed := k.join(ctx, wanted, direct)
	defer k.leave(pending)
	answers := make(map[ServerName]*inquiry, len(pending))
	patient := true
	for _, q := range pending {
		if waitFor(ctx, q.done) {
			answers[q.server] = q
			failed = append(failed, q.err)
		} else {
			patient = false
		}
	}
	for _, r := range started {
		if waitFor(ctx, r.over) {
			failed = append(failed, r.err)
		} else {
			patient = false
		}
	}
	if !patient {
		failed = append(failed, fmt.Errorf("mxfed: keys: %w", ctx.Err()))
	}
	failed = slices.DeleteFunc(failed, func(err error) bool { return err == nil })
	if more := len(failed) - maxKeyErrors; more > 0 {
		failed = append(failed[:maxKeyErrors], fmt.Errorf("and %d more", more))
	}
	return answers, errors.Join(failed...)
}

// waitFor returns when done is closed; false: the context has ended before.
func waitFor(ctx context.Context, done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
	}
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// join takes part in the inquiries about servers that are under way, and starts those that are not. Notaries are asked
// themselves, in a round of their own: one that asks notaries may have to wait for it.
func (k *KeyRing) join(ctx context.Context, wanted map[ServerName][]Key, direct bool) (
	pending []*inquiry, started []*round, failed []error) {
	now := k.now()
	own := make(map[bool]*round, 2) // by whether it asks notaries
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, keys := range wanted {
		q := k.inquiries[name]
		if q == nil {
			s := k.server(name)
			wait := s.next.Sub(now)
			if wait > shortKeyWait {
				if s.failure != "" {
					failed = append(failed, keyError(name, "failed a moment ago", errors.New(s.failure)))
				}
				continue
			}
			direct := direct || len(k.Notaries) == 0 || slices.Contains(k.Notaries, name)
			if own[direct] == nil {
				own[direct] = &round{direct: direct, learnt: make(map[ServerName][]Key), over: make(chan struct{})}
			}
			q = &inquiry{server: name, wanted: keys, wait: wait, round: own[direct], done: make(chan struct{})}
			q.round.inquiries = append(q.round.inquiries, q)
			k.inquiries[name] = q
		}
		pending = append(pending, q)
		q.round.waiting++
	}
	for _, r := range own {
		var roundCtx context.Context
		roundCtx, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
		started = append(started, r)
		go k.run(roundCtx, r)
	}
	return pending, started, failed
}

func keyError(server ServerName, message string, err error) error {
	return &Error{Code: ErrUnknown, Server: server, Endpoint: keyEndpoint, Message: message, Err: err}
}

// leave is called by each who joined. The last one sees to it that nothing of a round goes on; a server that was not asked
// to the end may be asked again soon, but not at once.
func (k *KeyRing) leave(pending []*inquiry) {
	now := k.now()
	var left []*round
	k.mu.Lock()
	for _, q := range pending {
		if q.round.waiting--; q.round.waiting == 0 {
			left = append(left, q.round)
		}
	}
	for _, r := range left {
		for _, q := range r.inquiries {
			if k.inquiries[q.server] == q {
				delete(k.inquiries, q.server)
				k.server(q.server).next = now.Add(shortKeyWait)
			}
		}
	}
	k.mu.Unlock()
	for _, r := range left {
		r.cancel()
		<-r.over
	}
}

// run makes all inquiries of r and stores what was learnt.
func (k *KeyRing) run(ctx context.Context, r *round) {
	defer close(r.over)
	limited, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	missing := r.inquiries
	if !r.direct {
		missing = k.askNotaries(limited, missing)
	}
	queue := (len(missing) + keyFetches - 1) / keyFetches
	each := max(keyTimeout/time.Duration(max(queue, 1)), leastKeyTimeout)
	var group errgroup.Group
	group.SetLimit(keyFetches)
	for _, q := range missing {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(limited, each)
			defer cancel()
			k.finish(q, k.askServer(ctx, q))
			return nil
		})
	}
	group.Wait()
	r.err = k.save(ctx, r)
}

// finish ends an inquiry; a failure of it is err.
func (k *KeyRing) finish(q *inquiry, err error) {
	now := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	defer close(q.done)
	q.err = err
	if k.inquiries[q.server] != q { // nobody waits
		return
	}
	delete(k.inquiries, q.server)
	s := k.server(q.server)
	s.failure = ""
	if err != nil {
		text := err.Error()
		s.failure = strings.Clone(text[:min(len(text), maxFailureText)])
	}
	if s.misses++; q.satisfied() {
		s.misses = 0
	}
	s.next = now.Add(min(firstKeyWait<<min(max(s.misses-1, 0), 10), maxKeyWait))
}

// satisfied tells whether q found what was wanted: all keys, or any document if none is named.
func (q *inquiry) satisfied() bool {
	return q.keys != nil && !slices.ContainsFunc(q.wanted, func(want Key) bool {
		q.keys[want.ID].fill(&want)
		return !want.covers(want.At)
	})
}

func (k *KeyRing) save(ctx context.Context, r *round) error {
	var keys []Key
	k.mu.Lock()
	for _, learnt := range r.learnt {
		keys = append(keys, learnt...)
	}
	k.mu.Unlock()
	if k.Store == nil || len(keys) == 0 {
		return nil
	}
	if err := k.Store.SaveKeys(ctx, keys); err != nil {
		return fmt.Errorf("mxfed: key store: %w", err)
	}
	return nil
}

// askServer asks a server for its own keys.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server
func (k *KeyRing) askServer(ctx context.Context, q *inquiry) error {
	if q.wait > 0 {
		select {
		case <-time.After(q.wait):
		case <-ctx.Done():
		}
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+string(q.server)+"/_matrix/key/v2/server", nil)
	if err != nil {
		return keyError(q.server, "", err)
	}
	v, err := k.call(q.server, keyEndpoint, r, maxKeyDocument)
	if err != nil {
		return err
	}
	d, err := readKeyDocument(v, q.server, k.now())
	if err != nil {
		return keyError(q.server, "malformed answer", err)
	}
	k.learn(q, d, true)
	return nil
}

// call makes a request and returns the answer of status 200 in canonical form.
func (k *KeyRing) call(server ServerName, endpoint string, r *http.Request, limit int64) (value, error) {
	answer, err := k.transport.RoundTrip(r)
	if err != nil {
		return "", keyError(server, "no answer", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return "", readError(server, endpoint, answer, k.now())
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, limit+1))
	if err != nil {
		return "", keyError(server, "answer broke off", err)
	}
	if int64(len(body)) > limit {
		return "", keyError(server, "malformed answer", fmt.Errorf("larger than %d bytes", limit))
	}
	var reader jsonReader
	text, err := reader.canonical(body, numbersAsReceived)
	if err != nil {
		return "", keyError(server, "malformed answer", err)
	}
	return value(text), nil
}

// learn remembers what a document says; direct: it came from its server just now.
func (k *KeyRing) learn(q *inquiry, d *keyDocument, direct bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.server(d.server)
	q.keys = s.learn(d, direct, q.wanted)
	if !d.validUntil.Before(s.published) && len(d.text) <= maxKeptDocument {
		kept := d.kept()
		k.documents.Add(kept.server, kept)
	}
	saved := make([]Key, 0, len(s.keys))
	for id, n := range s.keys {
		key := Key{Server: q.server, ID: id}
		n.fill(&key)
		saved = append(saved, key)
	}
	q.round.learnt[q.server] = saved
}

// askNotaries asks one notary after the other for what is still missing, ends the inquiries that were successful and
// returns the others. https://spec.matrix.org/v1.19/server-server-api/#querying-keys-through-another-server
func (k *KeyRing) askNotaries(ctx context.Context, inquiries []*inquiry) []*inquiry {
	missing := slices.Clone(inquiries)
	for _, notary := range k.Notaries {
		if len(missing) == 0 || !notary.valid() || k.resting(notary) {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, notaryTimeout/time.Duration(len(k.Notaries)))
		var group errgroup.Group
		group.SetLimit(notaryFetches)
		for batch := range slices.Chunk(missing, notaryBatch) {
			group.Go(func() error { return k.askNotary(limited, notary, batch) })
		}
		err := group.Wait()
		cancel()
		if err != nil && ctx.Err() == nil {
			k.setRest(notary)
		}
		missing = slices.DeleteFunc(missing, func(q *inquiry) bool {
			found := q.satisfied()
			if found {
				k.finish(q, nil)
			}
			return found
		})
	}
	return missing
}

// resting tells whether a notary has failed lately.
func (k *KeyRing) resting(notary ServerName) bool {
	now := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	return now.Before(k.server(notary).rest)
}

func (k *KeyRing) setRest(notary ServerName) {
	now := k.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.server(notary).rest = now.Add(notaryRest)
}

// askNotary asks a notary about a batch of servers. Of its answer counts what was asked for, and what both the server
// itself and the notary have signed. https://spec.matrix.org/v1.19/server-server-api/#post_matrixkeyv2query
func (k *KeyRing) askNotary(ctx context.Context, notary ServerName, batch []*inquiry) error {
	asked := make(map[ServerName]*inquiry, len(batch))
	servers := make([]field, 0, len(batch))
	for _, q := range batch {
		asked[q.server] = q
		servers = append(servers, field{string(q.server), q.criteria()})
	}
	body := object(field{"server_keys", object(servers...)})
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+string(notary)+"/_matrix/key/v2/query",
		strings.NewReader(string(body)))
	if err != nil {
		return keyError(notary, "", err)
	}
	r.Header.Set("Content-Type", "application/json")
	v, err := k.call(notary, notaryEndpoint, r, maxNotaryAnswer)
	if err != nil {
		return err
	}
	var documents []*keyDocument
	for text := range v.get("server_keys").elements() {
		name, _ := text.get("server_name").str()
		q := asked[ServerName(name)]
		if q == nil || len(text) > maxKeyDocument {
			continue
		}
		if d, err := readKeyDocument(text, q.server, k.now()); err == nil {
			documents = append(documents, d)
		}
	}
	keys, err := k.notaryKeys(ctx, notary, documents)
	for _, d := range documents {
		if d.checkSignatures(notary, keys) == nil {
			k.learn(asked[d.server], d, false)
		}
	}
	return err
}

// criteria is what a notary is told about the keys wanted of one server: until when they must be valid, which is 0 if any
// will do; left out, it would stand for now. Too many keys are not listed, which stands for all.
// https://spec.matrix.org/v1.19/server-server-api/#post_matrixkeyv2query
func (q *inquiry) criteria() value {
	until := make(map[KeyID]time.Time, len(q.wanted))
	for _, key := range q.wanted {
		until[key.ID] = later(until[key.ID], key.At)
	}
	if len(until) > maxKeysOfServer {
		return "{}"
	}
	fields := make([]field, 0, len(until))
	for id, at := range until {
		fields = append(fields, field{string(id), object(field{"minimum_valid_until_ts", keyTimestamp(at)})})
	}
	return object(fields...)
}

// notaryKeys returns the notary's own keys among those that signed documents, as far as they are valid now. They are never
// taken from a notary.
func (k *KeyRing) notaryKeys(ctx context.Context, notary ServerName, documents []*keyDocument) ([]Key, error) {
	now := k.now()
	var keys []Key
	for _, d := range documents {
		for _, id := range d.signatureIDs(notary) {
			known := slices.ContainsFunc(keys, func(q Key) bool { return q.ID == id })
			if !known && len(keys) < maxKeySignatures {
				keys = append(keys, Key{Server: notary, ID: id, At: now})
			}
		}
	}
	err := k.Keys(ctx, keys)
	return slices.DeleteFunc(keys, func(q Key) bool { return !q.forRequest(now) }), err
}
