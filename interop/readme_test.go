//go:build unix

package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The part of README.md that is generated lies between these lines.
const (
	readme = "../README.md"
	begin  = "<!-- written by interop: go test . -update -->\n"
	end    = "<!-- end -->\n"
)

// compare compares a file such as README.md with what has passed, or writes it there.
func (r *report) compare(file string, write bool) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, found := strings.Cut(string(text), begin)
	old, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		return fmt.Errorf("%s lacks the lines %q and %q", file, begin, end)
	}
	table := r.table()
	switch {
	case write:
		table += time.Now().UTC().Format("2006-01-02, `cd interop && CI=true go test -v .`; `go test . -update` writes this table.\n")
		return os.WriteFile(file, []byte(before+begin+table+end+after), 0o644)
	case !strings.HasPrefix(old, table):
		return fmt.Errorf("%s says something else: if this is right, write it with go test . -update\n%s", file, table)
	}
	return nil
}

// table has a column for each peer. Flows of which the same has passed share a line.
func (r *report) table() string {
	var flows []string
	for _, row := range r.rows {
		if !slices.Contains(flows, row.flow) {
			flows = append(flows, row.flow)
		}
	}
	slices.SortFunc(flows, compareFlows)
	var lines []string // without the flows
	together := make(map[string][]string)
	for _, flow := range flows {
		line := ""
		for _, p := range peers {
			line += " | " + r.cell(p, flow)
		}
		if together[line] == nil {
			lines = append(lines, line)
		}
		together[line] = append(together[line], flow)
	}
	head, rule := "| what users do", "|---"
	for _, p := range peers {
		head, rule = head+" | "+p.String(), rule+"|---"
	}
	text := head + " |\n" + rule + "|\n"
	for _, line := range lines {
		text += "| " + strings.Join(together[line], "; ") + line + " |\n"
	}
	return text + "\n→ our user in their room, ← their user in our room, ⇄ both, – not offered by the peer.\n"
}

// cell is in which room versions a flow has passed with a peer.
func (r *report) cell(p *peer, flow string) string {
	versions := map[string][]int{}
	for _, row := range r.rows {
		if row.flow != flow || !strings.Contains(row.peer, p.String()) {
			continue
		}
		switch row.direction {
		case ourUser:
			versions["→"] = append(versions["→"], row.passed...)
		case theirUser:
			versions["←"] = append(versions["←"], row.passed...)
		default:
			versions["→"] = append(versions["→"], row.passed...)
			versions["←"] = append(versions["←"], row.passed...)
		}
	}
	to, from := ranges(versions["→"]), ranges(versions["←"])
	switch {
	case to == from && to == "":
		return "–"
	case to == from:
		return to + " ⇄"
	case from == "":
		return to + " →"
	case to == "":
		return from + " ←"
	}
	return to + " →, " + from + " ←"
}

func TestTable(t *testing.T) {
	a, b := peers[0].String(), peers[1].String()
	r := report{rows: []*row{
		{peer: b, flow: "ban", direction: theirUser, passed: []int{3, 1, 2}},
		{peer: a, flow: "ban", direction: ourUser, passed: []int{1, 1, 10}, failed: []int{2}},
		{peer: a, flow: "ban", direction: theirUser, passed: []int{4, 5}},
		{peer: b, flow: "other", direction: ourUser, passed: []int{12}},
		{peer: b, flow: "leave", direction: theirUser, passed: []int{1, 2, 3}},
		{peer: a, flow: "leave", direction: theirUser, passed: []int{5, 4}},
		{peer: a, flow: "leave", direction: ourUser, passed: []int{10, 1}},
		{peer: a + ", " + b, flow: "all", direction: "room of " + a, passed: []int{1, 2}},
	}}
	require.Equal(t, "| what users do | "+a+" | "+b+` |
|---|---|---|
| leave; ban | 1, 10 →, 4–5 ← | 1–3 ← |
| all | 1–2 ⇄ | 1–2 ⇄ |
| other | – | 12 → |

→ our user in their room, ← their user in our room, ⇄ both, – not offered by the peer.
`, r.table())
}

func TestCompare(t *testing.T) {
	file := filepath.Join(t.TempDir(), "README.md")
	r := report{rows: []*row{{peer: peers[0].String(), flow: "ban", direction: ourUser, passed: []int{1}}}}
	require.NoError(t, os.WriteFile(file, []byte("before\n"+end), 0o600))
	require.ErrorContains(t, r.compare(file, true), "lacks the lines")
	require.NoError(t, os.WriteFile(file, []byte("before\n"+begin+"old\n"+end+"after\n"), 0o600))
	require.ErrorContains(t, r.compare(file, false), "says something else")
	require.NoError(t, r.compare(file, true))
	require.NoError(t, r.compare(file, false))
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Regexp(t, "^before\n"+begin+`\| what users do(.*\n)+20\d\d-\d\d-\d\d, .*\n`+end+"after\n$", string(text))
	r.rows[0].passed = []int{1, 2}
	require.ErrorContains(t, r.compare(file, false), "says something else")
}
