package main

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"example.org/mxfed"
)

// reportEvery is how often the log hears of a join that takes long.
const reportEvery = 5 * time.Second

// reporter tells people how joins of big rooms get on: a log by a line now and then, a terminal by a progress bar.
type reporter struct {
	log      *slog.Logger
	terminal *os.File // nil: there is none

	mu    sync.Mutex // guards the rest
	joins map[mxfed.RoomID]*joinReport
}

type joinReport struct {
	started, logged time.Time
	bar             *progressbar.ProgressBar
}

func newReporter(log *slog.Logger, stderr *os.File) *reporter {
	r := &reporter{log: log, joins: make(map[mxfed.RoomID]*joinReport)}
	if term.IsTerminal(int(stderr.Fd())) {
		r.terminal = stderr
	}
	return r
}

// report shows one step of one join. It may be called concurrently.
func (r *reporter) report(p progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, join := time.Now(), r.joins[p.Room]
	if join == nil {
		join = &joinReport{started: now, logged: now}
		r.joins[p.Room] = join
	}
	if p.Done {
		join.clear()
		delete(r.joins, p.Room)
		r.logDone(p, now.Sub(join.started))
		return
	}
	if r.terminal != nil {
		join.show(p, r.terminal)
	} else if now.Sub(join.logged) >= reportEvery {
		join.logged = now
		r.log.Info("joining", "room", p.Room, "via", p.Via, "verified", p.Events, "bytes", p.Bytes)
	}
}

func (r *reporter) logDone(p progress, took time.Duration) {
	attributes := []any{"room", p.Room, "via", p.Via, "verified", p.Events, "dropped", p.Dropped, "bytes", p.Bytes,
		"took", took.Round(time.Millisecond)}
	if p.Err != nil {
		r.log.Warn("not joined", append(attributes, "error", p.Err)...)
		return
	}
	r.log.Info("joined", attributes...)
}

// show draws the bar: how big the answer is nobody knows before its end, so that it counts and spins.
func (j *joinReport) show(p progress, terminal *os.File) {
	if j.bar == nil {
		j.bar = progressbar.NewOptions64(-1, progressbar.OptionSetWriter(terminal), progressbar.OptionShowBytes(true),
			progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish(), progressbar.OptionSpinnerType(14))
	}
	j.bar.Describe(fmt.Sprintf("joining %s via %s: %d events", p.Room, p.Via, p.Events))
	j.bar.Set64(p.Bytes) // a terminal that fails is not worth an error
}

// clear takes the bar away, so that the log goes on in its line.
func (j *joinReport) clear() {
	if j.bar != nil {
		j.bar.Finish()
	}
}
