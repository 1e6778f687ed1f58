package main

import (
	"cmp"
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"strings"
	"time"

	"example.org/mxfed"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/jmoiron/sqlx"
	"modernc.org/sqlite"
)

// This file is about transactions: one room is changed by one transaction at a time, whatever the database and however many
// processes share it.

//go:embed schema.sql
var schema string

// database is SQLite or PostgreSQL. SQLite has one writer and any number of readers, so that it gets two pools.
type database struct {
	read, write *sqlx.DB
	url         string           // of PostgreSQL; empty for SQLite
	own         mxfed.ServerName // whose database it is
	log         *slog.Logger
	wake        bell
}

// openDatabase opens source, a file or a postgres:// URL, and brings the schema up to date.
func openDatabase(ctx context.Context, source string, own mxfed.ServerName, log *slog.Logger) (*database, error) {
	db := &database{own: own, log: log}
	var err error
	if strings.HasPrefix(source, "postgres://") || strings.HasPrefix(source, "postgresql://") {
		db.url = source
		err = db.openServer(source)
	} else {
		err = db.openFile(source)
	}
	if err == nil {
		err = db.migrate(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("database: %w", err), db.close())
	}
	return db, nil
}

// openServer opens PostgreSQL, which takes recursive queries for long ones, and would compile them.
func (db *database) openServer(url string) error {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return err
	}
	config.RuntimeParams["jit"] = "off"
	db.write = sqlx.NewDb(stdlib.OpenDB(*config), "pgx")
	db.read = db.write
	db.write.SetMaxOpenConns(16)
	db.write.SetMaxIdleConns(16)
	return nil
}

// openFile opens SQLite. What was acknowledged is on the disk (synchronous), readers do not wait for the writer (WAL).
func (db *database) openFile(path string) (err error) {
	dsn := "file:" + path + "?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_pragma=cache_size(-16000)"
	if db.write, err = sqlx.Open("sqlite", dsn+"&_txlock=immediate"); err != nil {
		return err
	}
	db.write.SetMaxOpenConns(1)
	if db.read, err = sqlx.Open("sqlite", dsn+"&_pragma=query_only(1)"); err != nil {
		return err
	}
	db.read.SetMaxOpenConns(8)
	db.read.SetMaxIdleConns(8)
	return nil
}

func (db *database) postgres() bool { return db.url != "" }

// migrate applies the parts of the schema that the database does not have yet. Processes that start together wait for
// each other.
func (db *database) migrate(ctx context.Context) error {
	return db.update(ctx, "", func(t *tx) error {
		if db.postgres() {
			t.exec(`SELECT pg_advisory_xact_lock(7310579)`)
		}
		t.exec(`CREATE TABLE IF NOT EXISTS schema_versions (version INTEGER PRIMARY KEY)`)
		applied, _ := one[int](t, `SELECT count(*) FROM schema_versions`)
		parts := strings.Split(schema, "-- next version\n")
		for i := applied; i < len(parts); i++ {
			for statement := range strings.SplitSeq(strings.TrimSpace(parts[i]), ";\n") {
				t.exec(statement)
			}
			t.exec(`INSERT INTO schema_versions VALUES (?)`, i+1)
		}
		return nil
	})
}

func (db *database) close() (err error) {
	for _, pool := range []*sqlx.DB{db.read, db.write} {
		if pool != nil {
			err = errors.Join(err, pool.Close())
		}
	}
	return err
}

// tx is a transaction, with the context of the call that it serves. Once the database has failed, nothing that is asked of
// it does anything, and all rows are empty: whoever has opened the transaction gets the error. So errors that its methods
// return always say what is wrong with a request.
type tx struct {
	*sqlx.Tx
	ctx   context.Context
	db    *database
	err   error
	moved bool // the stream of positions did

	resolved map[string]snapshot // by the events after which they are the state
}

// maxTries bounds how often a transaction is repeated that failed for the sake of others.
const maxTries = 20

// update runs f in a transaction, alone in the room if one is named, and commits. f may run several times.
func (db *database) update(ctx context.Context, room mxfed.RoomID, f func(*tx) error) error {
	for try := 1; ; try++ {
		err := db.once(ctx, room, f)
		if err == nil || try == maxTries || !collided(err) {
			return err
		}
		if sleep(ctx, time.Duration(rand.IntN(20*try))*time.Millisecond); ctx.Err() != nil {
			return err
		}
	}
}

func (db *database) once(ctx context.Context, room mxfed.RoomID, f func(*tx) error) error {
	sqlTx, err := db.write.BeginTxx(ctx, nil)
	if err != nil {
		return err
	}
	defer sqlTx.Rollback()
	t := &tx{Tx: sqlTx, ctx: ctx, db: db}
	if room != "" && db.postgres() { // SQLite has one writer anyway
		t.exec(`SELECT 1 FROM rooms WHERE id = ? FOR UPDATE`, room)
	}
	err = f(t)
	if t.moved && db.postgres() { // tells all processes, this one included, once it is committed
		t.exec(`SELECT pg_notify('` + channel + `', '')`)
	}
	if err = cmp.Or(t.err, err); err == nil {
		err = t.Commit()
	}
	if err != nil {
		return err
	}
	if t.moved && !db.postgres() {
		db.wake.ring()
	}
	return nil
}

// collided tells whether a transaction failed because of another one.
func collided(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code == "40001" || pg.Code == "40P01" // serialization_failure, deadlock_detected
	}
	var lite *sqlite.Error
	return errors.As(err, &lite) && (lite.Code()&0xff == 5 || lite.Code()&0xff == 6) // SQLITE_BUSY, SQLITE_LOCKED
}

// view runs f on a snapshot.
func (db *database) view(ctx context.Context, f func(*tx) error) error {
	options := &sql.TxOptions{ReadOnly: true}
	if db.postgres() {
		options.Isolation = sql.LevelRepeatableRead
	}
	sqlTx, err := db.read.BeginTxx(ctx, options)
	if err != nil {
		return err
	}
	defer sqlTx.Rollback()
	t := &tx{Tx: sqlTx, ctx: ctx, db: db}
	err = f(t)
	return cmp.Or(t.err, err)
}

// exec is update for one statement.
func (db *database) exec(ctx context.Context, query string, args ...any) error {
	return db.update(ctx, "", func(t *tx) error {
		t.exec(query, args...)
		return nil
	})
}

// query is view for one result.
func query[T any](ctx context.Context, db *database, f func(*tx) T) (result T, err error) {
	err = db.view(ctx, func(t *tx) error {
		result = f(t)
		return nil
	})
	return result, err
}

// fail notes down that the database has failed, or holds what it should not.
func (t *tx) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

// list reads rows, of one column or of those that T has fields for. A slice stands for the values of an IN ( ); it must
// not be empty, nor much longer than batch.
func list[T any](t *tx, query string, args ...any) (rows []T) {
	query, args = t.expand(query, args)
	if t.err == nil {
		if err := t.SelectContext(t.ctx, &rows, query, args...); err != nil {
			t.fail(fmt.Errorf("%w in %s", err, query))
		}
	}
	return rows
}

// one reads one row and tells whether there is one.
func one[T any](t *tx, query string, args ...any) (row T, found bool) {
	rows := list[T](t, query, args...)
	if len(rows) > 0 {
		row = rows[0]
	}
	return row, len(rows) > 0
}

// exec tells whether it changed anything.
func (t *tx) exec(query string, args ...any) (changed bool) {
	query, args = t.expand(query, args)
	if t.err != nil {
		return false
	}
	result, err := t.ExecContext(t.ctx, query, args...)
	if err != nil {
		t.fail(fmt.Errorf("%w in %s", err, query))
		return false
	}
	n, err := result.RowsAffected()
	return err == nil && n > 0
}

func (t *tx) expand(query string, args []any) (string, []any) {
	query, args, err := sqlx.In(query, args...)
	if err != nil {
		t.fail(fmt.Errorf("%w in %s", err, query))
	}
	return t.Rebind(query), args
}

// batch is how many rows a statement reads at a time, rowBatch how many it writes. Binding arguments takes time that grows
// with the square of their number.
const (
	batch    = 250
	rowBatch = 20
)

// forever is the until of what holds now.
const forever = math.MaxInt64

func now() int64 { return time.Now().UnixMilli() }
