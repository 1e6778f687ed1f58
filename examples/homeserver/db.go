package main

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"example.org/mxfed"
	"github.com/jackc/pgx/v5/pgconn"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	"modernc.org/sqlite"
)

// This file is about transactions: one room is changed by one transaction at a time, whatever the database and however many
// processes share it.

//go:embed schema.sql
var schema string

// database is SQLite or PostgreSQL. SQLite has one writer and any number of readers, so that it gets two pools.
type database struct {
	read, write *sql.DB
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
		if db.write, err = sql.Open("pgx", source); err == nil {
			db.read = db.write
			db.write.SetMaxOpenConns(16)
			db.write.SetMaxIdleConns(16)
		}
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

// openFile opens SQLite. What was acknowledged is on the disk (synchronous), readers do not wait for the writer (WAL).
func (db *database) openFile(path string) (err error) {
	dsn := "file:" + path + "?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_pragma=cache_size(-16000)"
	if db.write, err = sql.Open("sqlite", dsn+"&_txlock=immediate"); err != nil {
		return err
	}
	db.write.SetMaxOpenConns(1)
	if db.read, err = sql.Open("sqlite", dsn+"&_pragma=query_only(1)"); err != nil {
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
			if err := t.exec(`SELECT pg_advisory_xact_lock(7310579)`); err != nil {
				return err
			}
		}
		if err := t.exec(`CREATE TABLE IF NOT EXISTS schema_versions (version INTEGER PRIMARY KEY)`); err != nil {
			return err
		}
		applied, err := list[int](t, `SELECT version FROM schema_versions`)
		if err != nil {
			return err
		}
		for i, part := range strings.Split(schema, "-- next version\n") {
			if i < len(applied) {
				continue
			}
			if err := t.script(part); err != nil {
				return err
			}
			if err := t.exec(`INSERT INTO schema_versions VALUES ($1)`, i+1); err != nil {
				return err
			}
		}
		return nil
	})
}

// script runs statements one by one. The type of generated keys is the one thing that the databases name differently.
func (t *tx) script(part string) error {
	if !t.db.postgres() {
		part = strings.ReplaceAll(part, "BIGSERIAL", "INTEGER")
	}
	for statement := range strings.SplitSeq(part, ";\n") {
		if strings.TrimSpace(statement) == "" {
			continue
		}
		if err := t.exec(statement); err != nil {
			return fmt.Errorf("%w in %s", err, statement)
		}
	}
	return nil
}

func (db *database) close() (err error) {
	for _, pool := range []*sql.DB{db.read, db.write} {
		if pool != nil {
			err = errors.Join(err, pool.Close())
		}
	}
	return err
}

// tx is a transaction, with the context of the call that it serves.
type tx struct {
	*sql.Tx
	ctx   context.Context
	db    *database
	moved bool // the stream of positions did

	resolved map[string]state // by the groups that they were resolved from
}

// maxTries bounds how often a transaction is repeated that failed for the sake of others.
const maxTries = 20

// update runs f in a transaction, alone in the room if one is named, and commits. f may run several times.
func (db *database) update(ctx context.Context, room string, f func(*tx) error) error {
	for try := 1; ; try++ {
		err := db.once(ctx, room, f)
		if err == nil || try == maxTries || !collided(err) {
			return err
		}
		select {
		case <-time.After(time.Duration(rand.IntN(20*try)) * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func (db *database) once(ctx context.Context, room string, f func(*tx) error) error {
	sqlTx, err := db.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer sqlTx.Rollback()
	t := &tx{Tx: sqlTx, ctx: ctx, db: db}
	if room != "" && db.postgres() { // SQLite has one writer anyway
		if err := t.exec(`SELECT 1 FROM rooms WHERE id = $1 FOR UPDATE`, room); err != nil {
			return err
		}
	}
	if err := f(t); err != nil {
		return err
	}
	if t.moved && db.postgres() { // tells all processes, this one included, once it is committed
		if err := t.exec(`SELECT pg_notify('` + channel + `', '')`); err != nil {
			return err
		}
	}
	if err := t.Commit(); err != nil {
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
	sqlTx, err := db.read.BeginTx(ctx, options)
	if err != nil {
		return err
	}
	defer sqlTx.Rollback()
	return f(&tx{Tx: sqlTx, ctx: ctx, db: db})
}

func (t *tx) exec(query string, args ...any) error {
	_, err := t.ExecContext(t.ctx, query, args...)
	return err
}

// changes is exec that tells whether it changed anything.
func (t *tx) changes(query string, args ...any) (bool, error) {
	result, err := t.ExecContext(t.ctx, query, args...)
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n > 0, err
}

// row reads one row and tells whether there is one.
func (t *tx) row(query string, args []any, into ...any) (bool, error) {
	err := t.QueryRowContext(t.ctx, query, args...).Scan(into...)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, err
}

// each calls f for every row, with the row's Scan.
func (t *tx) each(f func(scan func(...any) error) error, query string, args ...any) error {
	rows, err := t.QueryContext(t.ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := f(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// list reads one column.
func list[T any](t *tx, query string, args ...any) (values []T, err error) {
	err = t.each(func(scan func(...any) error) error {
		var v T
		err := scan(&v)
		values = append(values, v)
		return err
	}, query, args...)
	return values, err
}

// batch is how many rows a statement reads at a time, rowBatch how many it writes. Binding arguments takes time that grows
// with the square of their number.
const (
	batch    = 250
	rowBatch = 20
)

// in adds values to args and returns their placeholders, for IN ( ). They must not be more than batch.
func in[T any](args *[]any, values []T) string {
	if len(values) == 0 {
		return "NULL" // which is in no list
	}
	marks := make([]string, len(values))
	for i, v := range values {
		*args = append(*args, v)
		marks[i] = fmt.Sprintf("$%d", len(*args))
	}
	return strings.Join(marks, ", ")
}

// tuples adds rows of values to args and returns their placeholders, for VALUES.
func tuples(args *[]any, rows ...[]any) string {
	marks := make([]string, len(rows))
	for i, row := range rows {
		marks[i] = "(" + in(args, row) + ")"
	}
	return strings.Join(marks, ", ")
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func timeOf(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
