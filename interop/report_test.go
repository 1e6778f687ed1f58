//go:build unix

package interop

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"example.org/mxfed"
)

// TestMain prints the results after all tests. It is the keeper of another program when a test starts it as one.
func TestMain(m *testing.M) {
	if os.Getenv(superviseEnv) != "" {
		os.Exit(supervise(os.Args[1:]))
	}
	code := m.Run()
	results.print()
	os.Exit(code)
}

// results are those of all tests.
var results report

// report counts what has passed.
type report struct {
	mu   sync.Mutex
	rows []*row
}

// row is one line of the table.
type row struct {
	peer, flow, direction string
	passed, failed        []mxfed.RoomVersion
}

// add notes how a test has ended, when it has.
func (r *report) add(t *testing.T, peer, flow, direction string, v mxfed.RoomVersion) {
	t.Cleanup(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		at := slices.IndexFunc(r.rows, func(o *row) bool { return o.peer == peer && o.flow == flow && o.direction == direction })
		if at < 0 {
			at = len(r.rows)
			r.rows = append(r.rows, &row{peer: peer, flow: flow, direction: direction})
		}
		if t.Failed() {
			r.rows[at].failed = append(r.rows[at].failed, v)
		} else {
			r.rows[at].passed = append(r.rows[at].passed, v)
		}
	})
}

// print shows the table, and nothing if nothing was tested.
func (r *report) print() {
	if len(r.rows) == 0 {
		return
	}
	var passed, failed int
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\npeer\tflow\tdirection\tpassed\troom versions\tfailed")
	for _, row := range r.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", row.peer, row.flow, row.direction, len(row.passed), versions(row.passed), versions(row.failed))
		passed, failed = passed+len(row.passed), failed+len(row.failed)
	}
	fmt.Fprintf(w, "all\t\t\t%d\t\t%d\n", passed, failed)
	w.Flush()
}

func versions(all []mxfed.RoomVersion) string {
	var names []string
	for _, v := range all {
		names = append(names, string(v))
	}
	return strings.Join(names, " ")
}
