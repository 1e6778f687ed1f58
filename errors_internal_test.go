package mxfed

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// answerOf is an answer as net/http hands it over.
func answerOf(status int, body string, header ...string) *http.Response {
	r := &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return r
}

var readErrorNow = time.Date(2026, 1, 2, 3, 4, 5, 500e6, time.UTC)

// Every error that the specification shows is understood, and written with the same status and members.
func TestErrorExamples(t *testing.T) {
	var file struct {
		Vectors []struct {
			Endpoint, When string
			Status         int
			Body           json.RawMessage
		}
	}
	loadCoreVectors(t, "error_examples.json", &file)
	require.Len(t, file.Vectors, 32)
	for _, v := range file.Vectors {
		t.Run(v.Endpoint+" "+v.When, func(t *testing.T) {
			var body struct {
				Code    ErrorCode   `json:"errcode"`
				Message string      `json:"error"`
				Version RoomVersion `json:"room_version"`
				Retry   int64       `json:"retry_after_ms"`
			}
			require.NoError(t, json.Unmarshal(v.Body, &body))
			e := readError("other.example", "x", answerOf(v.Status, string(v.Body)), readErrorNow)
			require.Equal(t, &Error{Code: body.Code, Message: body.Message, Status: v.Status, Server: "other.example", Endpoint: "x",
				RoomVersion: body.Version, RetryAfter: time.Duration(body.Retry) * time.Millisecond}, e)
			require.ErrorIs(t, e, body.Code)

			own := &Error{Code: body.Code, Message: body.Message, RoomVersion: body.Version, RetryAfter: e.RetryAfter}
			switch {
			case v.Status == http.StatusMethodNotAllowed:
				own.Status = v.Status
			case strings.HasPrefix(v.When, "policy server refuses"): // an endpoint that is not served here
				own.Status = v.Status
			}
			w := httptest.NewRecorder()
			WriteError(w, own)
			require.Equal(t, v.Status, w.Code)
			var want, got map[string]any
			require.NoError(t, json.Unmarshal(v.Body, &want))
			require.NoError(t, json.Unmarshal(w.Body.Bytes(), &got))
			require.NotEmpty(t, got["error"]) // the schema wants it even where the example has none
			want["error"] = cmp.Or(body.Message, body.Code.words())
			require.Equal(t, want, got)
		})
	}
}

// https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
func TestReadError_Bodies(t *testing.T) {
	long := strings.Repeat("x", maxErrorBody)
	for name, c := range map[string]struct {
		body string
		want Error
	}{
		"contact":                 {`{"errcode":"M_RESOURCE_LIMIT_EXCEEDED","admin_contact":"mailto:a@x"}`, Error{Code: ErrResourceLimitExceeded, AdminContact: "mailto:a@x"}},
		"all members":             {`{"errcode":"M_FORBIDDEN","error":"no","room_version":"9","extra":{"a":[1.5]}}`, Error{Code: ErrForbidden, Message: "no", RoomVersion: "9"}},
		"unknown code":            {`{"errcode":"ORG.EXAMPLE_CODE","error":"no"}`, Error{Code: "ORG.EXAMPLE_CODE", Message: "no"}},
		"M_UNKNOWN is an errcode": {`{"errcode":"M_UNKNOWN"}`, Error{Code: ErrUnknown}},
		"no errcode":              {`{"error":"no"}`, Error{Code: ErrUnknown, Message: "no", bare: true}},
		"empty errcode":           {`{"errcode":""}`, Error{Code: ErrUnknown, bare: true}},
		"errcode is a number":     {`{"errcode":403,"error":["no"],"room_version":10}`, Error{Code: ErrUnknown, bare: true}},
		"errcode in other case":   {`{"Errcode":"M_FORBIDDEN"}`, Error{Code: ErrUnknown, bare: true}},
		"errcode is nested":       {`[{"errcode":"M_FORBIDDEN"}]`, Error{Code: ErrUnknown, bare: true}},
		"empty body":              {``, Error{Code: ErrUnknown, bare: true}},
		"text":                    {"404 page not found\n", Error{Code: ErrUnknown, bare: true}},
		"HTML":                    {`<html>"errcode"</html>`, Error{Code: ErrUnknown, bare: true}},
		"null":                    {`null`, Error{Code: ErrUnknown, bare: true}},
		"two errcodes":            {`{"errcode":"M_FORBIDDEN","errcode":"M_NOT_FOUND"}`, Error{Code: ErrUnknown, bare: true}},
		"lone surrogate":          {`{"errcode":"M_FORBIDDEN","error":"\ud800"}`, Error{Code: ErrUnknown, bare: true}},
		"too long":                {`{"errcode":"M_FORBIDDEN","error":"` + long + `"}`, Error{Code: ErrUnknown, bare: true}},
		"10,000 levels":           {strings.Repeat("[", 10_000), Error{Code: ErrUnknown, bare: true}},
	} {
		t.Run(name, func(t *testing.T) {
			want := c.want
			want.Status, want.Server, want.Endpoint = 400, "other.example", "invite"
			require.Equal(t, &want, readError("other.example", "invite", answerOf(400, c.body), readErrorNow))
		})
	}
}

// endless is a body without end that counts what is read of it.
type endless struct{ n int }

func (b *endless) Read(p []byte) (int, error) { b.n += len(p); return len(p), nil }
func (b *endless) Close() error               { return nil }

func TestReadError_BoundedAndBroken(t *testing.T) {
	body := &endless{}
	e := readError("o", "x", &http.Response{StatusCode: 500, Body: body}, readErrorNow)
	require.Equal(t, ErrUnknown, e.Code)
	require.LessOrEqual(t, body.n, maxErrorBody)

	cut := io.MultiReader(strings.NewReader(`{"errcode":`), brokenReader{})
	e = readError("o", "x", &http.Response{StatusCode: 502, Body: io.NopCloser(cut)}, readErrorNow)
	require.ErrorIs(t, e, io.ErrUnexpectedEOF)
	require.Equal(t, 502, e.Status)
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// https://spec.matrix.org/v1.19/client-server-api/#rate-limiting
func TestReadError_RetryAfter(t *testing.T) {
	const day = 24 * time.Hour
	for name, c := range map[string]struct {
		header, ms string
		want       time.Duration
	}{
		"neither":                     {"", "", 0},
		"seconds":                     {"120", "", 2 * time.Minute},
		"milliseconds":                {"", "1500", 1500 * time.Millisecond},
		"the header comes first":      {"7", "2000", 7 * time.Second},
		"zero seconds":                {"0", "2000", 0},
		"negative seconds":            {"-5", "", 0},
		"negative milliseconds":       {"", "-5", 0},
		"a year":                      {"31536000", "", day},
		"a year in milliseconds":      {"", "31536000000", day},
		"seconds beyond the clock":    {"9223372036854775807", "", day},
		"milliseconds beyond it":      {"", "9223372036854775807", day},
		"seconds beyond 64 bits":      {"99999999999999999999", "3000", 3 * time.Second},
		"milliseconds beyond 64 bits": {"", "99999999999999999999", 0},
		"fraction":                    {"1.5", "3000", 3 * time.Second},
		"milliseconds as a string":    {"", `"3000"`, 0},
		"milliseconds as a fraction":  {"", `3000.5`, 0},
		"milliseconds null":           {"", `null`, 0},
		"text":                        {"soon", "3000", 3 * time.Second},
		"date":                        {"Fri, 02 Jan 2026 03:04:35 GMT", "3000", 29500 * time.Millisecond},
		"date of RFC 850":             {"Friday, 02-Jan-26 03:04:35 GMT", "", 29500 * time.Millisecond},
		"date in the past":            {"Fri, 02 Jan 2026 03:04:05 GMT", "3000", 0},
		"date far ahead":              {"Fri, 31 Dec 9999 23:59:59 GMT", "", day},
		"date that is none":           {"Fri, 32 Jan 2026 03:04:35 GMT", "3000", 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			body := `{"errcode":"M_LIMIT_EXCEEDED"}`
			if c.ms != "" {
				body = `{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":` + c.ms + `}`
			}
			require.Equal(t, c.want, readError("o", "x", answerOf(429, body, "Retry-After", c.header), readErrorNow).RetryAfter)
		})
	}
}

// Which answers say that an endpoint is missing, and not what it decided.
func TestError_Unimplemented(t *testing.T) {
	const unrecognized, notFound, invalid = `{"errcode":"M_UNRECOGNIZED"}`, `{"errcode":"M_NOT_FOUND"}`, `{"errcode":"M_INVALID_PARAM"}`
	for _, c := range []struct {
		status int
		body   string
		want   bool
	}{
		{404, "", true}, {404, "404 page not found\n", true}, {404, unrecognized, true}, {404, notFound, false},
		{405, "", true}, {405, "Method Not Allowed", true}, {405, unrecognized, true}, {405, `{"errcode":"M_FORBIDDEN"}`, false},
		{400, "", true}, {400, `{"error":"x"}`, true}, {400, unrecognized, true}, {400, invalid, false}, {400, `{"errcode":"M_UNKNOWN"}`, false},
		{400, `{"errcode":"ORG.EXAMPLE"}`, false},
		{401, "", false}, {403, unrecognized, false}, {429, "", false}, {500, "", false}, {500, unrecognized, false}, {501, unrecognized, false}, {502, "bad gateway", false},
	} {
		require.Equal(t, c.want, readError("o", "x", answerOf(c.status, c.body), readErrorNow).unimplemented(), "%d %s", c.status, c.body)
	}
}

func TestRefuse(t *testing.T) {
	cause := errors.New("cause")
	require.Equal(t, &Error{Code: ErrForbidden, Message: "no 7"}, refuse(ErrForbidden, "no %d", 7))
	err := because(cause, ErrBadJSON, "no %s", "x")
	require.ErrorIs(t, err, cause)
	require.ErrorIs(t, err, ErrBadJSON)
	require.Equal(t, "mxfed: M_BAD_JSON: no x: cause", err.Error())
}

// What answers without an errcode tell a client: their status decides, and a missing endpoint is not the client's.
func TestClientError_ReadAnswers(t *testing.T) {
	for _, c := range []struct {
		status   int
		body     string
		code     ErrorCode
		answered int
	}{
		{403, "<html>", ErrUnknown, 403},
		{400, "", ErrUnknown, 400},
		{404, "404 page not found\n", ErrUnknown, 502},
		{404, `{"errcode":"M_UNRECOGNIZED"}`, ErrUnknown, 502},
		{404, `{"errcode":"M_NOT_FOUND"}`, ErrNotFound, 404},
		{405, `{"errcode":"M_UNRECOGNIZED"}`, ErrUnknown, 502},
		{401, `{"errcode":"M_UNAUTHORIZED"}`, ErrUnknown, 502},
		{413, `{"errcode":"M_TOO_LARGE"}`, ErrUnknown, 502},
		{429, "", ErrUnknown, 429},
		{200, "not what was asked for", ErrUnknown, 502},
		{302, "", ErrUnknown, 502},
		{503, "", ErrUnknown, 502},
	} {
		e := ClientError(fmt.Errorf("join: %w", readError("o", "make_join", answerOf(c.status, c.body), readErrorNow)))
		require.Equal(t, c.code, e.Code, "%d %s", c.status, c.body)
		require.Equal(t, c.answered, e.Status, "%d %s", c.status, c.body)
	}
}
