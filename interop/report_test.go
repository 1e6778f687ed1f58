//go:build unix

package interop

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// TestMain prints the results after all tests, and compares them with README.md if all have run. It is the keeper of another
// program when a test starts it as one.
func TestMain(m *testing.M) {
	if os.Getenv(superviseEnv) != "" {
		os.Exit(supervise(os.Args[1:]))
	}
	os.Exit(run(m))
}

var update = flag.Bool("update", false, "write what has passed into ../README.md")

func run(m *testing.M) (code int) {
	var err error
	if scratch, err = os.MkdirTemp("", "mxfed-interop-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(scratch)
	code = m.Run()
	if len(results.rows) == 0 {
		return code
	}
	results.print()
	isSet := func(name string) bool { return flag.Lookup("test."+name).Value.String() != "" }
	if code != 0 || results.incomplete || isSet("run") || isSet("skip") {
		fmt.Println("README.md is compared only when all tests have run and passed")
		return code
	}
	if err := results.compare(readme, *update); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// scratch is a folder for what all tests share.
var scratch string

// results are those of all tests.
var results report

// report counts what has passed.
type report struct {
	mu         sync.Mutex
	rows       []*row
	incomplete bool // something could not be tested
}

// row is one line of what is printed.
type row struct {
	peer, flow, direction string
	passed, failed        []int // room versions
}

// add notes how a test has ended, when it has.
func (r *report) add(t *testing.T, peer, flow, direction string, v mxfed.RoomVersion) {
	number, _ := strconv.Atoi(string(v)) // all are numbers
	t.Cleanup(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		at := slices.IndexFunc(r.rows, func(o *row) bool { return o.peer == peer && o.flow == flow && o.direction == direction })
		if at < 0 {
			at = len(r.rows)
			r.rows = append(r.rows, &row{peer: peer, flow: flow, direction: direction})
		}
		if t.Failed() {
			r.rows[at].failed = append(r.rows[at].failed, number)
		} else {
			r.rows[at].passed = append(r.rows[at].passed, number)
		}
	})
}

// lacks skips a test for want of a program, but not where all tests must run.
func lacks(t *testing.T, want string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		require.Fail(t, want)
	}
	results.mu.Lock()
	results.incomplete = true
	results.mu.Unlock()
	t.Skip(want)
}

// sort makes the order of rows that of peers and flows. Several peers together come last, and so do flows of no table.
func (r *report) sort() {
	peer := func(o *row) uint {
		return uint(slices.IndexFunc(peers, func(p *peer) bool { return p.String() == o.peer }))
	} // -1 is the last
	slices.SortFunc(r.rows, func(a, b *row) int {
		return cmp.Or(cmp.Compare(peer(a), peer(b)), compareFlows(a.flow, b.flow), strings.Compare(b.direction, a.direction))
	})
}

func compareFlows(a, b string) int {
	rank := func(name string) uint {
		return uint(slices.IndexFunc(flows, func(f flow) bool { return f.name == name }))
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), strings.Compare(a, b))
}

// print shows all rows, and how many tests there were of each room version.
func (r *report) print() {
	r.sort()
	var all row
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\npeer\tflow\tdirection\tpassed\troom versions\tfailed")
	for _, row := range r.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", row.peer, row.flow, row.direction, len(row.passed), ranges(row.passed), ranges(row.failed))
		all.passed, all.failed = append(all.passed, row.passed...), append(all.failed, row.failed...)
	}
	for v := 1; v <= 12; v++ {
		fmt.Fprintf(w, "all\tall\tall\t%d\t%d\t%d\n", count(all.passed, v), v, count(all.failed, v))
	}
	fmt.Fprintf(w, "all\tall\tall\t%d\tall\t%d\n", len(all.passed), len(all.failed))
	w.Flush()
}

func count(all []int, v int) (n int) {
	for _, other := range all {
		if other == v {
			n++
		}
	}
	return n
}

// ranges writes numbers as in 1, 6, 10–12.
func ranges(numbers []int) string {
	numbers = slices.Compact(slices.Sorted(slices.Values(numbers)))
	var parts []string
	for len(numbers) > 0 {
		n := 1
		for n < len(numbers) && numbers[n] == numbers[0]+n {
			n++
		}
		part := strconv.Itoa(numbers[0])
		if n > 1 {
			part += "–" + strconv.Itoa(numbers[n-1])
		}
		parts, numbers = append(parts, part), numbers[n:]
	}
	return strings.Join(parts, ", ")
}
