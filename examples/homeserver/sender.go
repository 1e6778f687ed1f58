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

// Limits of sending: servers at a time, events of one transaction, and how long a server may take to answer one; a
// process that dies holds its destinations a little longer than that.
// https://spec.matrix.org/v1.19/server-server-api/#transactions
const (
	maxSending = 64
	maxPDUs    = 50
	sendTime   = 20 * time.Second
	leaseTime  = sendTime + 5*time.Second
)

// sendAll sends what the outbox holds, until ctx ends.
func (s *server) sendAll(ctx context.Context) error {
	due := func(t *tx) []mxfed.ServerName {
		return list[mxfed.ServerName](t, `SELECT name FROM destinations d WHERE retry_at <= ? AND held_until < ?
			AND EXISTS (SELECT 1 FROM outbox WHERE destination = d.name)`, now(), now())
	}
	return work(ctx, s, due, func(name mxfed.ServerName) {
		for more, err := true, error(nil); more && ctx.Err() == nil; {
			if more, err = s.deliver(ctx, name); err != nil && ctx.Err() == nil {
				s.log.Info("not delivered", "to", name, "err", err)
			}
		}
	})
}

// work does what is due, some of it at a time and nothing twice at the same time in this process, until ctx ends.
func work[T comparable](ctx context.Context, s *server, due func(*tx) []T, do func(T)) error {
	var all sync.WaitGroup
	defer all.Wait()
	var running sync.Map
	slots := make(chan struct{}, maxSending)
	for ctx.Err() == nil {
		heard := s.db.wake.heard()
		todo, err := query(ctx, s.db, due)
		if err != nil && ctx.Err() == nil {
			s.log.Error("nothing can be done", "err", err)
		}
		for _, item := range todo {
			if _, busy := running.LoadOrStore(item, true); busy {
				continue
			}
			slots <- struct{}{}
			all.Go(func() {
				defer func() { running.Delete(item); <-slots }()
				do(item)
			})
		}
		wait(ctx, heard, time.Second)
	}
	return nil
}

// transaction is a list of events on the way to a server. Its ID is made of their positions.
type transaction struct {
	id   string
	last int64
	pdus []json.RawMessage
}

// deliver sends one transaction, unless another process does, and tells whether there may be more.
func (s *server) deliver(ctx context.Context, to mxfed.ServerName) (more bool, err error) {
	next, err := s.next(ctx, to)
	if err != nil || next == nil {
		return false, err
	}
	body := map[string]any{"origin": s.name, "origin_server_ts": now(), "pdus": next.pdus}
	call, cancel := context.WithTimeout(ctx, sendTime)
	defer cancel()
	failed := s.fed.Client().Do(call, "", to, http.MethodPut, "/_matrix/federation/v1/send/"+next.id, body, nil)
	if failed != nil {
		failed = fmt.Errorf("transaction %s: %w", next.id, failed)
	}
	if err := s.delivered(context.WithoutCancel(ctx), to, next, failed, ctx.Err() != nil); err != nil {
		return false, err
	}
	return failed == nil, failed
}

// next holds a destination, and reads what to send to it. Where that ends is noted down before it leaves, so that it is
// the same transaction when it is sent again.
func (s *server) next(ctx context.Context, to mxfed.ServerName) (next *transaction, err error) {
	err = s.db.update(ctx, "", func(t *tx) error {
		next = nil
		if !t.exec(`UPDATE destinations SET held_until = ? WHERE name = ? AND held_until < ? AND retry_at <= ?`, now()+leaseTime.Milliseconds(), to, now(), now()) {
			return nil
		}
		rows := list[struct {
			Position int64
			JSON     string
		}](t, `SELECT o.position, e.json FROM outbox o JOIN events e ON e.id = o.event JOIN destinations d ON d.name = o.destination
			WHERE o.destination = ? AND (d.up_to = 0 OR o.position <= d.up_to) ORDER BY o.position LIMIT ?`, to, maxPDUs)
		if len(rows) == 0 {
			t.exec(`UPDATE destinations SET held_until = 0 WHERE name = ?`, to)
			return nil
		}
		next = &transaction{last: rows[len(rows)-1].Position}
		next.id = fmt.Sprintf("%d-%d", rows[0].Position, next.last)
		for _, row := range rows {
			next.pdus = append(next.pdus, json.RawMessage(row.JSON))
		}
		t.exec(`UPDATE destinations SET up_to = ? WHERE name = ?`, next.last, to)
		return nil
	})
	return next, err
}

// maxBackoff is the longest time between two tries to reach a server.
const maxBackoff = time.Hour

// delivered notes down what became of a transaction, and lets the destination go. One that failed because this process
// ends is sent again soon.
func (s *server) delivered(ctx context.Context, to mxfed.ServerName, sent *transaction, failed error, ended bool) error {
	return s.db.update(ctx, "", func(t *tx) error {
		switch {
		case failed == nil:
			t.exec(`DELETE FROM outbox WHERE destination = ? AND position <= ?`, to, sent.last)
			t.exec(`UPDATE destinations SET held_until = 0, up_to = 0, failures = 0 WHERE name = ?`, to)
		case ended:
			t.exec(`UPDATE destinations SET held_until = 0 WHERE name = ?`, to)
		default:
			failures, _ := one[int](t, `SELECT failures FROM destinations WHERE name = ?`, to)
			wait := min(maxBackoff, time.Second<<min(failures, 12))
			wait = wait/2 + rand.N(wait/2) // not all at the same time
			t.exec(`UPDATE destinations SET held_until = 0, failures = failures + 1, retry_at = ? WHERE name = ?`, now()+wait.Milliseconds(), to)
		}
		return nil
	})
}
