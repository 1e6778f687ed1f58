//go:build unix

package interop

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// tape has what others have asked of a server, and what it has answered.
type tape struct {
	mu      sync.Mutex
	all     []*exchange // in the order of the requests
	over    *sync.Cond  // some exchange is
	version mxfed.RoomVersion
	step    string
}

// exchange is a request and its answer, in the form in which testdata/recordings has them.
type exchange struct {
	Authorization string            `json:"authorization"`
	Body          string            `json:"body"`
	ContentType   string            `json:"content_type"`
	Method        string            `json:"method"`
	Response      string            `json:"response"`
	RoomVersion   mxfed.RoomVersion `json:"room_version"`
	Status        int               `json:"status"` // 0: there is no answer yet
	Step          string            `json:"step"`   // what users were doing
	To            string            `json:"to"`
	URI           string            `json:"uri"`
	began         time.Time
}

// taped starts a server behind a front that records. The endpoints in missing, such as v2/invite, are answered as by a server
// that does not have them. https://spec.matrix.org/v1.19/server-server-api/#unsupported-endpoints
func taped(t *testing.T, at *site, start func(*testing.T, *site) *server, missing ...string) (*server, *tape) {
	t.Helper()
	rec := &tape{}
	rec.over = sync.NewCond(&rec.mu)
	f := newFront(t, at.ca, func(pass http.Handler) http.Handler {
		unknown := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { mxfed.WriteError(w, mxfed.ErrUnrecognized) })
		return rec.record(t, func(r *http.Request) http.Handler {
			if slices.ContainsFunc(missing, func(endpoint string) bool { return strings.HasPrefix(r.URL.Path, federationPrefix+endpoint+"/") }) {
				return unknown
			}
			return pass
		})
	})
	s := start(t, &site{dir: at.dir, ca: at.ca, front: f.name})
	f.stand(t, s)
	s.tape = rec
	return s, rec
}

// record returns a handler that keeps what handlers chosen by choose are asked and answer.
func (rec *tape) record(t *testing.T, choose func(*http.Request) http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("%s: %s", r.RequestURI, err)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		x := &exchange{Authorization: r.Header.Get("Authorization"), Body: string(body), ContentType: r.Header.Get("Content-Type"),
			Method: r.Method, URI: r.RequestURI, began: time.Now()}
		rec.mu.Lock()
		x.RoomVersion, x.Step = rec.version, rec.step
		rec.all = append(rec.all, x)
		rec.mu.Unlock()
		answer := httptest.NewRecorder()
		defer func() {
			rec.mu.Lock()
			defer rec.mu.Unlock()
			x.Status, x.Response = answer.Code, answer.Body.String()
			rec.over.Broadcast()
		}()
		choose(r).ServeHTTP(answer, r)
		for name, values := range answer.Header() {
			w.Header()[name] = values
		}
		w.WriteHeader(answer.Code)
		_, _ = w.Write(answer.Body.Bytes()) // whoever asked may be gone
	})
}

// mark says what users are doing from now on, if there is a tape.
func (rec *tape) mark(v mxfed.RoomVersion, step string) {
	if rec != nil {
		rec.mu.Lock()
		defer rec.mu.Unlock()
		rec.version, rec.step = v, step
	}
}

// about are the exchanges of an endpoint, such as v2/send_join, about a room, in the order of the requests. It waits for the
// answers to those that have begun.
func (rec *tape) about(endpoint string, room mxfed.RoomID) (found []*exchange) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	for _, x := range slices.Clone(rec.all) {
		if e, r := x.subject(); e == endpoint && r == room {
			for x.Status == 0 {
				rec.over.Wait()
			}
			found = append(found, x)
		}
	}
	return found
}

// answers are what was answered to them: the status and, of an error, the code.
func (rec *tape) answers(endpoint string, room mxfed.RoomID) (answers []string) {
	for _, x := range rec.about(endpoint, room) {
		var body struct {
			Code string `json:"errcode"`
		}
		_ = json.Unmarshal([]byte(x.Response), &body) // what is no error need not even be an object
		answers = append(answers, strings.TrimSpace(strconv.Itoa(x.Status)+" "+body.Code))
	}
	return answers
}

const federationPrefix = "/_matrix/federation/"

// subject is the endpoint that was asked, and the room if it has one in its path.
func (x *exchange) subject() (endpoint string, room mxfed.RoomID) {
	path, _, _ := strings.Cut(strings.TrimPrefix(x.URI, federationPrefix), "?")
	parts := strings.SplitN(path, "/", 4)
	if len(parts) < 3 {
		return path, ""
	}
	name, _ := url.PathUnescape(parts[2]) // it has been parsed before
	return parts[0] + "/" + parts[1], mxfed.RoomID(name)
}

// write puts all exchanges that are over into a file. A and B are the servers.
func write(t *testing.T, file string, a, b *tape) {
	t.Helper()
	var all []*exchange
	for to, rec := range map[string]*tape{"A": a, "B": b} {
		rec.mu.Lock()
		for _, x := range rec.all {
			if x.Status != 0 {
				x.To = to
				all = append(all, x)
			}
		}
		rec.mu.Unlock()
	}
	slices.SortFunc(all, func(x, y *exchange) int { return x.began.Compare(y.began) })
	var text bytes.Buffer
	lines := json.NewEncoder(&text)
	lines.SetEscapeHTML(false)
	for _, x := range all {
		require.NoError(t, lines.Encode(x))
	}
	require.NoError(t, os.WriteFile(file, text.Bytes(), 0o644))
}
