package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"example.org/mxfed"
)

// This file tells other servers what has happened in rooms. The queue is in the database: whoever puts an event into a room
// puts it into the queue in the same transaction, and one process at a time works on a destination, in order.

// sender sends what the outbox holds.
type sender struct{ *server }

func newSender(s *server) *sender { return &sender{s} }

// Limits of sending: destinations at a time, and events of one transaction.
// https://spec.matrix.org/v1.19/server-server-api/#transactions
const (
	maxSending = 64
	maxPDUs    = 50
)

// run sends until ctx ends.
func (q *sender) run(ctx context.Context) error {
	var all sync.WaitGroup
	defer all.Wait()
	var running sync.Map
	slots := make(chan struct{}, maxSending)
	for ctx.Err() == nil {
		heard := q.db.wake.heard()
		due, err := q.due(ctx)
		if err != nil && ctx.Err() == nil {
			q.log.Error("outbox", "err", err)
		}
		for _, name := range due {
			if _, busy := running.LoadOrStore(name, true); busy {
				continue
			}
			slots <- struct{}{}
			all.Go(func() {
				defer func() { running.Delete(name); <-slots }()
				if _, err := q.db.hold(ctx, "destinations", "name", string(name), func(ctx context.Context) error { return q.deliver(ctx, name) }); err != nil && ctx.Err() == nil {
					q.log.Info("not delivered", "to", name, "err", err)
				}
			})
		}
		wait, cancel := context.WithTimeout(ctx, time.Second)
		select {
		case <-heard:
		case <-wait.Done():
		}
		cancel()
	}
	return nil
}

// due lists the destinations that something can be sent to now.
func (q *sender) due(ctx context.Context) (names []mxfed.ServerName, err error) {
	err = q.db.view(ctx, func(t *tx) error {
		names, err = list[mxfed.ServerName](t, `SELECT name FROM destinations d WHERE retry_at <= $1 AND held_until < $1
			AND EXISTS (SELECT 1 FROM outbox WHERE destination = d.name)`, time.Now().UnixMilli())
		return err
	})
	return names, err
}

// deliver sends transactions to one server until nothing is left or one fails.
func (q *sender) deliver(ctx context.Context, to mxfed.ServerName) error {
	for {
		id, last, pdus, err := q.next(ctx, to)
		if err != nil || len(pdus) == 0 {
			return err
		}
		body := map[string]any{"origin": q.name, "origin_server_ts": time.Now().UnixMilli(), "pdus": pdus}
		call, cancel := context.WithTimeout(ctx, time.Minute)
		failed := q.fed.Client().Do(call, "", to, http.MethodPut, "/_matrix/federation/v1/send/"+id, body, nil)
		cancel()
		if ctx.Err() != nil { // ended here, not there
			return failed
		}
		if err := q.sent(ctx, to, last, failed); err != nil || failed != nil {
			return fmt.Errorf("transaction %s: %w", id, firstOf(err, failed))
		}
	}
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// next is the transaction to send. Its ID is made of the positions of its events, and what it ends with is noted down
// before it leaves, so that it is the same one when it is sent again.
func (q *sender) next(ctx context.Context, to mxfed.ServerName) (id string, last int64, pdus []json.RawMessage, err error) {
	err = q.db.update(ctx, "", func(t *tx) error {
		var first, end int64
		pdus = nil
		if _, err := t.row(`SELECT up_to FROM destinations WHERE name = $1`, []any{to}, &end); err != nil {
			return err
		}
		if end == 0 {
			end = 1<<63 - 1
		}
		err := t.each(func(scan func(...any) error) error {
			var text string
			if err := scan(&last, &text); err != nil {
				return err
			}
			if first == 0 {
				first = last
			}
			pdus = append(pdus, json.RawMessage(text))
			return nil
		}, fmt.Sprintf(`SELECT o.position, e.json FROM outbox o JOIN events e ON e.id = o.event WHERE o.destination = $1 AND o.position <= $2
			ORDER BY o.position LIMIT %d`, maxPDUs), to, end)
		if err != nil {
			return err
		}
		id = fmt.Sprintf("%d-%d", first, last)
		return t.exec(`UPDATE destinations SET up_to = $2 WHERE name = $1`, to, last)
	})
	return id, last, pdus, err
}

// maxBackoff is the longest time between two tries to reach a server.
const maxBackoff = time.Hour

// sent notes down what became of a transaction.
func (q *sender) sent(ctx context.Context, to mxfed.ServerName, last int64, failed error) error {
	return q.db.update(ctx, "", func(t *tx) error {
		if failed == nil {
			if err := t.exec(`DELETE FROM outbox WHERE destination = $1 AND position <= $2`, to, last); err != nil {
				return err
			}
			return t.exec(`UPDATE destinations SET up_to = 0, failures = 0, retry_at = 0 WHERE name = $1`, to)
		}
		var failures int
		if _, err := t.row(`SELECT failures FROM destinations WHERE name = $1`, []any{to}, &failures); err != nil {
			return err
		}
		wait := min(maxBackoff, time.Second<<min(failures, 12))
		wait = wait/2 + rand.N(wait/2) // not all at the same time
		return t.exec(`UPDATE destinations SET failures = failures + 1, retry_at = $2 WHERE name = $1`, to, time.Now().Add(wait).UnixMilli())
	})
}

// sentSomething implements mxfed.Config.Allow: who sends something can be reached again.
func (s *server) sentSomething(ctx context.Context, r *mxfed.Request) error {
	var waiting bool
	err := s.db.view(ctx, func(t *tx) (err error) {
		var one int
		waiting, err = t.row(`SELECT 1 FROM destinations WHERE name = $1 AND retry_at > $2`, []any{r.Origin, time.Now().UnixMilli()}, &one)
		return err
	})
	if err == nil && waiting {
		err = s.db.update(ctx, "", func(t *tx) error { return t.exec(`UPDATE destinations SET retry_at = 0 WHERE name = $1`, r.Origin) })
		s.db.wake.ring()
	}
	return err
}
