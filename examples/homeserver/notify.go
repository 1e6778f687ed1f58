package main

import (
	"context"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// This file wakes those who wait for something new. It tells them no more than that: what is new they read themselves.

// channel is what processes that share a PostgreSQL notify each other on.
const channel = "mxfed_homeserver"

// bell wakes all who wait for it. The zero value works.
type bell struct {
	mu   sync.Mutex
	next chan struct{}
}

// heard is closed when the bell is rung next. Get it before looking at what may be new.
func (b *bell) heard() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		b.next = make(chan struct{})
	}
	return b.next
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next != nil {
		close(b.next)
		b.next = nil
	}
}

// listen rings the bell whenever any process has committed something new, until ctx ends. SQLite has one process only, which
// rings for itself.
func (db *database) listen(ctx context.Context) error {
	for db.postgres() && ctx.Err() == nil {
		if err := db.listenOnce(ctx); ctx.Err() == nil {
			db.log.Warn("notifications are interrupted", "err", err)
			sleep(ctx, time.Second)
		}
	}
	<-ctx.Done()
	return nil
}

func (db *database) listenOnce(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, db.url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `LISTEN `+channel); err != nil {
		return err
	}
	for {
		db.wake.ring() // the first time for what was missed
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return err
		}
	}
}

// wait waits until heard is closed, but no longer than d and until ctx ends.
func wait(ctx context.Context, heard <-chan struct{}, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	select {
	case <-heard:
	case <-ctx.Done():
	}
}

// sleep waits, unless ctx ends before.
func sleep(ctx context.Context, d time.Duration) { wait(ctx, nil, d) }

// changed waits until something has been accepted after position since, or ctx ends, which is no error. It may wake up for
// what does not concern the caller.
func (s *server) changed(ctx context.Context, since int64) error {
	for {
		heard := s.db.wake.heard()
		now, err := query(ctx, s.db, (*tx).position)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil || now > since {
			return err
		}
		select {
		case <-heard:
		case <-ctx.Done():
			return nil
		}
	}
}
