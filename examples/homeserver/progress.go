package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"example.org/mxfed"
)

// reporter tells people how joins of big rooms get on: a terminal by a progress bar, a log by a line now and then.
type reporter struct {
	log      *slog.Logger
	every    time.Duration // how often the log hears of a join that takes long
	terminal io.Writer     // nil: there is none
}

func newReporter(log *slog.Logger, stderr *os.File) *reporter {
	r := &reporter{log: log, every: 5 * time.Second}
	if term.IsTerminal(int(stderr.Fd())) {
		r.terminal = stderr
	}
	return r
}

// join returns what is to be told every step of one join.
func (r *reporter) join(room mxfed.RoomID) func(progress) {
	began, logged, bar := time.Now(), time.Now(), r.bar()
	return func(p progress) {
		about := []any{"room", room, "via", p.Via, "verified", p.Events, "dropped", p.Dropped, "bytes", p.Bytes, "took", time.Since(began)}
		bar.Describe(fmt.Sprintf("joining %s via %s: %d events", room, p.Via, p.Events))
		bar.Set64(p.Bytes) // a terminal that fails is not worth an error
		if p.Done {
			bar.Finish() // so that the log goes on in its line
		}
		switch {
		case p.Err != nil:
			r.log.Warn("not joined", append(about, "error", p.Err)...)
		case p.Done:
			r.log.Info("joined", about...)
		case r.terminal == nil && time.Since(logged) >= r.every:
			logged = time.Now()
			r.log.Info("joining", about...)
		}
	}
}

// bar counts and spins: how big the answer is nobody knows before its end.
func (r *reporter) bar() *progressbar.ProgressBar {
	if r.terminal == nil {
		return progressbar.DefaultSilent(-1)
	}
	return progressbar.NewOptions64(-1, progressbar.OptionSetWriter(r.terminal), progressbar.OptionShowBytes(true),
		progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish(), progressbar.OptionSpinnerType(14))
}
