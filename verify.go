package mxfed

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ed25519"
)

// verifier checks signatures with the keys of other servers and with this server's own.
type verifier struct {
	keys Keys
	own  []*Signer
	now  func() time.Time
}

// signer returns the Signer of an own name, nil for any other.
func (v *verifier) signer(name ServerName) *Signer {
	for _, s := range v.own {
		if s.name == name {
			return s
		}
	}
	return nil
}

// verdict is what became of one event: the event as the room goes on with it, or an error. authorised tells whether the
// server of the user who authorises a restricted join has signed.
type verdict struct {
	event      *Event
	authorised bool
	err        error
}

// events judges hashes and signatures of events: all keys are fetched together, all cores check.
func (v *verifier) events(ctx context.Context, events []*Event) []verdict {
	keys := keySet{verifier: v}
	keys.fetch(ctx, events)
	verdicts := make([]verdict, len(events))
	inParallel(len(events), func(p *eventParser, i int) { verdicts[i] = keys.judge(p, events[i]) })
	return verdicts
}

type keyName struct {
	server ServerName
	id     KeyID
}

// keySet holds the keys of a group of events. It grows by fetch and is read by many goroutines in between.
type keySet struct {
	*verifier
	known  map[keyName]Key
	failed error // of the last look-up that failed
}

// fetch asks for the keys that events need and that were not asked for yet, all at once.
func (s *keySet) fetch(ctx context.Context, events []*Event) {
	wanted := make([]Key, 0, len(events))
	for _, e := range events {
		wanted = e.wantedKeys(wanted)
	}
	s.fetchKeys(ctx, wanted)
}

// maxKnownKeys bounds how many keys are remembered while there are some among them that do not exist: one event can name
// thousands.
const maxKnownKeys = 100_000

func (s *keySet) fetchKeys(ctx context.Context, wanted []Key) {
	if s.known == nil {
		s.known = make(map[keyName]Key)
	}
	if len(s.known) > maxKnownKeys {
		maps.DeleteFunc(s.known, func(_ keyName, k Key) bool { return k.Public == nil })
	}
	missing := wanted[:0]
	index := make(map[keyName]int)
	for _, k := range wanted {
		name := keyName{k.Server, k.ID}
		if !strings.HasPrefix(string(k.ID), ed25519Prefix) {
			continue
		}
		if known, ok := s.known[name]; ok && (known.Public == nil || !k.At.After(known.At) || !k.At.After(known.ValidUntil)) {
			continue
		}
		if i, ok := index[name]; !ok {
			index[name] = len(missing)
			missing = append(missing, k)
		} else if k.At.After(missing[i].At) {
			missing[i].At = k.At
		}
	}
	if err := s.lookUp(ctx, missing); err != nil {
		s.failed = err
	}
	for _, k := range missing {
		s.known[keyName{k.Server, k.ID}] = k
	}
}

// lookUp fills in keys: those of own names from their Signers, all others from Keys.
func (v *verifier) lookUp(ctx context.Context, keys []Key) error {
	others := make([]Key, 0, len(keys))
	where := make([]int, 0, len(keys))
	for i := range keys {
		if s := v.signer(keys[i].Server); s != nil {
			s.fill(&keys[i], v.now())
		} else {
			others, where = append(others, keys[i]), append(where, i)
		}
	}
	if len(others) == 0 {
		return nil
	}
	err := v.keys.Keys(ctx, others)
	for i, k := range others {
		asked := &keys[where[i]]
		asked.Public, asked.ValidUntil, asked.Expired = k.Public, k.ValidUntil, k.Expired
	}
	return err
}

// fill states what the Signer itself knows of a key of its server.
func (s *Signer) fill(k *Key, now time.Time) {
	if k.ID == s.id {
		k.Public, _ = s.key.Public().(ed25519.PublicKey)
		k.ValidUntil = now.Add(maxKeyValidity)
	}
	for _, old := range s.old {
		if k.ID == old.ID {
			k.Public, k.Expired = old.Public, old.Expired
		}
	}
}

// judge checks the content hash and signatures of e. A wrong content hash is no error: the room goes on with the redacted
// copy. https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func (s *keySet) judge(p *eventParser, e *Event) verdict {
	if !e.hashOK && !e.redacted {
		cut, err := e.redact()
		if err != nil {
			return verdict{err: err}
		}
		e = cut
	}
	authorised, err := p.checkSignatures(e, s.usable(e))
	if err != nil {
		return verdict{err: s.explain(e, err)}
	}
	return verdict{event: e, authorised: authorised}
}

// usable returns the keys that may have signed e.
func (s *keySet) usable(e *Event) keyFunc {
	now := s.now()
	return func(server ServerName, id KeyID) ed25519.PublicKey {
		if k, ok := s.known[keyName{server, id}]; ok && k.forEvent(e.rules, e.ts, now) {
			return k.Public
		}
		return nil
	}
}

// explain tells a signature that is wrong or missing from one whose key could not be fetched, which may pass later.
func (s *keySet) explain(e *Event, err error) error {
	var missing *signatureError
	if s.failed != nil && errors.As(err, &missing) && !missing.refuted && e.signatures(missing.server).isObject() {
		return &Error{Code: ErrUnknown, Status: http.StatusBadGateway, Err: errors.Join(err, s.failed),
			Message: "keys of " + string(missing.server) + " for event " + string(e.id) + " could not be fetched"}
	}
	return because(err, ErrInvalidParam, "event %s", e.id)
}

// inParallel calls do for every index below n on all cores and returns when all calls have.
func inParallel(n int, do func(p *eventParser, i int)) {
	const run = 16 // indexes taken at a time
	workers := min(runtime.GOMAXPROCS(0), (n+run-1)/run)
	if workers <= 1 {
		var p eventParser
		for i := range n {
			do(&p, i)
		}
		return
	}
	var next atomic.Int64
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			var p eventParser
			for {
				end := int(next.Add(run))
				for i := end - run; i < min(end, n); i++ {
					do(&p, i)
				}
				if end >= n {
					return
				}
			}
		})
	}
	group.Wait()
}
