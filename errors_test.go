package mxfed_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// writtenError is what WriteError sends for err.
func writtenError(t *testing.T, err error) (status int, body map[string]any, header http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	mxfed.WriteError(w, err)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	require.Equal(t, strconv.Itoa(w.Body.Len()), w.Header().Get("Content-Length"))
	require.True(t, utf8.Valid(w.Body.Bytes()))
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &body))
	require.NotEmpty(t, body["errcode"])
	require.IsType(t, "", body["error"])
	return w.Code, body, w.Header()
}

// https://spec.matrix.org/v1.19/client-server-api/#common-error-codes
func TestWriteError_StatusOfEachCode(t *testing.T) {
	for code, status := range map[mxfed.ErrorCode]int{
		mxfed.ErrBadJSON: 400, mxfed.ErrNotJSON: 400, mxfed.ErrForbidden: 403, mxfed.ErrNotFound: 404, mxfed.ErrLimitExceeded: 429,
		mxfed.ErrMissingParam: 400, mxfed.ErrInvalidParam: 400, mxfed.ErrUnauthorized: 401, mxfed.ErrUnrecognized: 404,
		mxfed.ErrTooLarge: 413, mxfed.ErrUnknown: 500, mxfed.ErrResourceLimitExceeded: 403, mxfed.ErrIncompatibleRoomVersion: 400,
		mxfed.ErrUnsupportedRoomVersion: 400, mxfed.ErrUnableToAuthoriseJoin: 400, mxfed.ErrUnableToGrantJoin: 400,
		mxfed.ErrInviteBlocked: 403, "ORG.EXAMPLE_CODE": 400,
	} {
		for _, err := range []error{code, fmt.Errorf("store: %w", code), &mxfed.Error{Code: code}, fmt.Errorf("host: %w", &mxfed.Error{Code: code, Err: errors.New("secret")})} {
			got, body, header := writtenError(t, err)
			require.Equal(t, status, got, "%s: %v", code, err)
			require.Equal(t, string(code), body["errcode"])
			require.Equal(t, strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(string(code), "M_"), "_", " ")), body["error"])
			require.Equal(t, status == 429, header.Get("Retry-After") != "")
		}
	}
}

func TestWriteError_HostErrors(t *testing.T) {
	received := &mxfed.Error{Code: mxfed.ErrForbidden, Message: "their secret", Status: 403, Server: "other.example", RoomVersion: "9"}
	const internal = `{"errcode":"M_UNKNOWN","error":"internal error"}`
	const remote = `{"errcode":"M_UNKNOWN","error":"another server failed"}`
	for name, c := range map[string]struct {
		err    error
		status int
		body   string
	}{
		"plain":                           {errors.New("pq: secret"), 500, internal},
		"nil":                             {nil, 500, internal},
		"deadline":                        {fmt.Errorf("secret: %w", context.DeadlineExceeded), 503, `{"errcode":"M_UNKNOWN","error":"timed out"}`},
		"cancelled":                       {context.Canceled, 503, `{"errcode":"M_UNKNOWN","error":"timed out"}`},
		"message":                         {&mxfed.Error{Code: mxfed.ErrForbidden, Message: "not <you> & \"me\"\n"}, 403, `{"errcode":"M_FORBIDDEN","error":"not <you> & \"me\"\n"}`},
		"status of its own":               {&mxfed.Error{Code: mxfed.ErrUnrecognized, Status: 405}, 405, `{"errcode":"M_UNRECOGNIZED","error":"unrecognized"}`},
		"no code":                         {&mxfed.Error{Message: "x"}, 500, `{"errcode":"M_UNKNOWN","error":"x"}`},
		"status that is none":             {&mxfed.Error{Code: mxfed.ErrForbidden, Status: 42}, 403, `{"errcode":"M_FORBIDDEN","error":"forbidden"}`},
		"negative status":                 {&mxfed.Error{Code: mxfed.ErrForbidden, Status: -1}, 403, `{"errcode":"M_FORBIDDEN","error":"forbidden"}`},
		"status of success":               {&mxfed.Error{Code: mxfed.ErrForbidden, Status: 200}, 403, `{"errcode":"M_FORBIDDEN","error":"forbidden"}`},
		"room version":                    {&mxfed.Error{Code: mxfed.ErrIncompatibleRoomVersion, RoomVersion: "11"}, 400, `{"errcode":"M_INCOMPATIBLE_ROOM_VERSION","error":"incompatible room version","room_version":"11"}`},
		"contact":                         {&mxfed.Error{Code: mxfed.ErrResourceLimitExceeded, AdminContact: "mailto:a@x\xff"}, 403, "{\"errcode\":\"M_RESOURCE_LIMIT_EXCEEDED\",\"error\":\"resource limit exceeded\",\"admin_contact\":\"mailto:a@x\ufffd\"}"},
		"message is no UTF-8":             {&mxfed.Error{Code: mxfed.ErrForbidden, Message: "a\xffb"}, 403, "{\"errcode\":\"M_FORBIDDEN\",\"error\":\"a\ufffdb\"}"},
		"cause is not sent":               {&mxfed.Error{Code: mxfed.ErrForbidden, Message: "no", Err: errors.New("secret")}, 403, `{"errcode":"M_FORBIDDEN","error":"no"}`},
		"received":                        {received, 502, remote},
		"received, wrapped":               {fmt.Errorf("invite: %w", received), 502, remote},
		"own with a received cause":       {&mxfed.Error{Code: mxfed.ErrNotFound, Err: received}, 404, `{"errcode":"M_NOT_FOUND","error":"not found"}`},
		"own code before a received one":  {fmt.Errorf("%w: %w", mxfed.ErrNotFound, received), 404, `{"errcode":"M_NOT_FOUND","error":"not found"}`},
		"received before a code":          {errors.Join(received, mxfed.ErrNotFound), 502, remote},
		"received with a code as cause":   {&mxfed.Error{Code: mxfed.ErrForbidden, Server: "o", Err: mxfed.ErrNotFound}, 502, remote},
		"own error before a code":         {errors.Join(&mxfed.Error{Code: mxfed.ErrForbidden, Message: "no"}, mxfed.ErrNotFound), 403, `{"errcode":"M_FORBIDDEN","error":"no"}`},
		"code before an own error":        {errors.Join(mxfed.ErrNotFound, &mxfed.Error{Code: mxfed.ErrForbidden, Message: "no"}), 404, `{"errcode":"M_NOT_FOUND","error":"not found"}`},
		"what a client is told of a join": {mxfed.ClientError(&mxfed.Error{Code: mxfed.ErrForbidden, Message: "banned", Status: 403, Server: "o", Endpoint: "make_join"}), 403, `{"errcode":"M_FORBIDDEN","error":"banned"}`},
		"what it is told of no answer":    {mxfed.ClientError(&mxfed.Error{Code: mxfed.ErrUnknown, Server: "o"}), 504, `{"errcode":"M_UNKNOWN","error":"the other server could not be reached"}`},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, _ := writtenError(t, c.err)
			require.Equal(t, c.status, status)
			b, err := json.Marshal(body)
			require.NoError(t, err)
			require.JSONEq(t, c.body, string(b))
		})
	}
}

// https://spec.matrix.org/v1.19/client-server-api/#rate-limiting
func TestWriteError_RetryAfter(t *testing.T) {
	for wait, want := range map[time.Duration]struct {
		seconds string
		ms      float64
	}{
		0: {"1", 1000}, -time.Hour: {"1", 1000}, time.Millisecond: {"1", 1000}, time.Second: {"1", 1000},
		time.Second + 1: {"2", 1000}, 1500 * time.Millisecond: {"2", 1500}, time.Hour: {"3600", 3_600_000},
	} {
		for _, err := range []error{
			&mxfed.Error{Code: mxfed.ErrLimitExceeded, RetryAfter: wait},
			&mxfed.Error{Code: mxfed.ErrResourceLimitExceeded, Status: 429, RetryAfter: wait},
		} {
			status, body, header := writtenError(t, err)
			require.Equal(t, 429, status)
			require.Equal(t, want.seconds, header.Get("Retry-After"), wait)
			require.Equal(t, want.ms, body["retry_after_ms"], wait)
		}
	}
	_, body, header := writtenError(t, &mxfed.Error{Code: mxfed.ErrLimitExceeded, RetryAfter: math.MaxInt64})
	seconds, err := strconv.Atoi(header.Get("Retry-After"))
	require.NoError(t, err)
	require.Positive(t, seconds)
	require.Positive(t, body["retry_after_ms"])
	_, body, header = writtenError(t, &mxfed.Error{Code: mxfed.ErrForbidden, RetryAfter: time.Hour})
	require.NotContains(t, body, "retry_after_ms")
	require.Empty(t, header.Get("Retry-After"))
}

func TestError_IsAndAs(t *testing.T) {
	cause := &net.DNSError{Err: "no such host", Name: "other.example"}
	e := &mxfed.Error{Code: mxfed.ErrForbidden, Status: 403, Server: "other.example", Err: fmt.Errorf("look up: %w", cause)}
	joined := errors.Join(errors.New("first"), fmt.Errorf("join: %w", e))
	for _, err := range []error{e, joined} {
		require.ErrorIs(t, err, mxfed.ErrForbidden)
		require.NotErrorIs(t, err, mxfed.ErrNotFound)
		require.NotErrorIs(t, err, mxfed.ErrorCode(""))
		require.ErrorIs(t, err, e)
		var as *mxfed.Error
		require.ErrorAs(t, err, &as)
		require.Same(t, e, as)
		var dns *net.DNSError
		require.ErrorAs(t, err, &dns)
		require.Same(t, cause, dns)
	}
	require.NoError(t, (&mxfed.Error{}).Unwrap())
	require.Equal(t, "M_FORBIDDEN", mxfed.ErrForbidden.Error())
	require.NotErrorIs(t, &mxfed.Error{Code: mxfed.ErrForbidden}, e, "an error is no other one of the same code")
	both := &mxfed.Error{Code: mxfed.ErrForbidden, Err: mxfed.ErrNotFound}
	require.ErrorIs(t, both, mxfed.ErrForbidden)
	require.ErrorIs(t, both, mxfed.ErrNotFound)
}

func TestError_Text(t *testing.T) {
	for want, e := range map[string]*mxfed.Error{
		"mxfed: M_FORBIDDEN":                                   {Code: mxfed.ErrForbidden, Status: 403},
		"mxfed: M_FORBIDDEN: no":                               {Code: mxfed.ErrForbidden, Message: "no"},
		"mxfed: other.example: make_join: 403 M_FORBIDDEN: no": {Code: mxfed.ErrForbidden, Message: "no", Status: 403, Server: "other.example", Endpoint: "make_join"},
		"mxfed: other.example: invite: M_UNKNOWN: refused":     {Code: mxfed.ErrUnknown, Server: "other.example", Endpoint: "invite", Err: errors.New("refused")},
		"mxfed: M_BAD_JSON: event: depth: M_NOT_FOUND":         {Code: mxfed.ErrBadJSON, Message: "event", Err: fmt.Errorf("mxfed: depth: %w", mxfed.ErrNotFound)},
	} {
		require.Equal(t, want, e.Error())
	}
}

func TestError_Temporary(t *testing.T) {
	for _, c := range []struct {
		e    mxfed.Error
		want bool
	}{
		{mxfed.Error{Code: mxfed.ErrUnknown, Server: "o"}, true}, // never answered
		{mxfed.Error{Code: mxfed.ErrUnknown, Server: "o", Status: 500}, true},
		{mxfed.Error{Code: mxfed.ErrForbidden, Server: "o", Status: 503}, true},
		{mxfed.Error{Code: mxfed.ErrUnknown, Server: "o", Status: 429}, true},
		{mxfed.Error{Code: mxfed.ErrLimitExceeded, Server: "o", Status: 400}, true},
		{mxfed.Error{Code: mxfed.ErrLimitExceeded}, true},
		{mxfed.Error{Code: mxfed.ErrUnknown, Server: "o", Status: 200}, false},
		{mxfed.Error{Code: mxfed.ErrUnknown, Server: "o", Status: 404}, false},
		{mxfed.Error{Code: mxfed.ErrForbidden, Server: "o", Status: 403}, false},
		{mxfed.Error{Code: mxfed.ErrUnknown}, false},
		{mxfed.Error{Code: mxfed.ErrForbidden}, false},
	} {
		require.Equal(t, c.want, c.e.Temporary(), "%v", &c.e)
	}
}

// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func TestClientError(t *testing.T) {
	received := func(endpoint string, status int, code mxfed.ErrorCode) *mxfed.Error {
		return &mxfed.Error{Code: code, Message: "why", Status: status, Server: "other.example", Endpoint: endpoint, RoomVersion: "9", RetryAfter: time.Minute}
	}
	const failed, unreached = "the other server failed: why", "the other server could not be reached"
	for name, c := range map[string]struct {
		err     error
		code    mxfed.ErrorCode
		status  int
		message string
	}{
		"400 of invite":                    {received("invite", 400, mxfed.ErrBadJSON), mxfed.ErrBadJSON, 400, "why"},
		"400 of send_join":                 {received("send_join", 400, mxfed.ErrUnableToGrantJoin), mxfed.ErrUnableToGrantJoin, 400, "why"},
		"400 of make_join":                 {received("make_join", 400, mxfed.ErrUnableToAuthoriseJoin), mxfed.ErrUnableToAuthoriseJoin, 400, "why"},
		"missing parameter of invite":      {received("invite", 400, mxfed.ErrMissingParam), mxfed.ErrUnknown, 502, failed},
		"invalid parameter of invite":      {received("invite", 400, mxfed.ErrInvalidParam), mxfed.ErrUnknown, 502, failed},
		"missing parameter of send_join":   {received("send_join", 400, mxfed.ErrMissingParam), mxfed.ErrUnknown, 502, failed},
		"invalid parameter of send_join":   {received("send_join", 400, mxfed.ErrInvalidParam), mxfed.ErrUnknown, 502, failed},
		"invalid parameter of make_join":   {received("make_join", 400, mxfed.ErrInvalidParam), mxfed.ErrInvalidParam, 400, "why"},
		"missing parameter of make_knock":  {received("make_knock", 400, mxfed.ErrMissingParam), mxfed.ErrMissingParam, 400, "why"},
		"room version, invite":             {received("invite", 400, mxfed.ErrIncompatibleRoomVersion), mxfed.ErrUnsupportedRoomVersion, 400, "why"},
		"room version, invite, other code": {received("invite", 400, mxfed.ErrUnsupportedRoomVersion), mxfed.ErrUnsupportedRoomVersion, 400, "why"},
		"room version, join":               {received("make_join", 400, mxfed.ErrIncompatibleRoomVersion), mxfed.ErrIncompatibleRoomVersion, 400, "why"},
		"403":                              {received("invite", 403, mxfed.ErrForbidden), mxfed.ErrForbidden, 403, "why"},
		"blocked":                          {received("invite", 403, mxfed.ErrInviteBlocked), mxfed.ErrInviteBlocked, 403, "why"},
		"404":                              {received("make_join", 404, mxfed.ErrNotFound), mxfed.ErrNotFound, 404, "why"},
		"404, unknown endpoint":            {received("make_join", 404, mxfed.ErrUnrecognized), mxfed.ErrUnknown, 502, failed},
		"429":                              {received("make_join", 429, mxfed.ErrLimitExceeded), mxfed.ErrLimitExceeded, 429, "why"},
		"401":                              {received("make_join", 401, mxfed.ErrUnauthorized), mxfed.ErrUnknown, 502, failed},
		"500":                              {received("make_join", 500, mxfed.ErrUnknown), mxfed.ErrUnknown, 502, failed},
		"503 with a code":                  {received("make_join", 503, mxfed.ErrForbidden), mxfed.ErrUnknown, 502, failed},
		"malformed answer":                 {received("send_join", 200, mxfed.ErrUnknown), mxfed.ErrUnknown, 502, failed},
		"no answer":                        {received("make_join", 0, mxfed.ErrUnknown), mxfed.ErrUnknown, 504, unreached},
		"no answer, wrapped":               {fmt.Errorf("join: %w", received("make_join", 0, mxfed.ErrUnknown)), mxfed.ErrUnknown, 504, unreached},
		"own refusal":                      {&mxfed.Error{Code: mxfed.ErrForbidden, Message: "here"}, mxfed.ErrForbidden, 403, "here"},
		"own code":                         {fmt.Errorf("host: %w", mxfed.ErrNotFound), mxfed.ErrNotFound, 404, ""},
		"something else":                   {errors.New("secret"), mxfed.ErrUnknown, 500, "internal error"},
		"cause of an own refusal":          {&mxfed.Error{Code: mxfed.ErrNotFound, Message: "here", Err: received("make_join", 403, mxfed.ErrForbidden)}, mxfed.ErrNotFound, 404, "here"},
		"cause of a malformed answer":      {&mxfed.Error{Code: mxfed.ErrUnknown, Message: "why", Status: 200, Server: "other.example", Endpoint: "send_join", RoomVersion: "9", RetryAfter: time.Minute, Err: received("server", 403, mxfed.ErrForbidden)}, mxfed.ErrUnknown, 502, failed},
		"deadline":                         {context.DeadlineExceeded, mxfed.ErrUnknown, 503, "timed out"},
	} {
		t.Run(name, func(t *testing.T) {
			e := mxfed.ClientError(c.err)
			require.Equal(t, c.code, e.Code)
			require.Equal(t, c.status, e.Status)
			require.Equal(t, c.message, e.Message)
			require.ErrorIs(t, e, c.code)
			var from *mxfed.Error
			if errors.As(c.err, &from) && from.Server != "" {
				require.Equal(t, mxfed.RoomVersion("9"), e.RoomVersion)
				require.Equal(t, time.Minute, e.RetryAfter)
				require.ErrorIs(t, e, from, "the error of the other server can still be found")
				require.Equal(t, mxfed.ServerName("other.example"), from.Server, "and is not changed")
			}
			status, body, _ := writtenError(t, e)
			require.Equal(t, c.status, status, "it can be written as it is")
			require.Equal(t, string(c.code), body["errcode"])
		})
	}
}

func TestClientError_PicksTheTellingOne(t *testing.T) {
	from := func(server mxfed.ServerName, status int, code mxfed.ErrorCode) error {
		return fmt.Errorf("try %s: %w", server, &mxfed.Error{Code: code, Status: status, Server: server, Endpoint: "make_join"})
	}
	own := &mxfed.Error{Code: mxfed.ErrBadJSON}
	dead, broken := from("dead", 0, mxfed.ErrUnknown), from("broken", 500, mxfed.ErrUnknown)
	missing, busy := from("missing", 404, mxfed.ErrNotFound), from("busy", 429, mxfed.ErrLimitExceeded)
	unable, banned := from("unable", 400, mxfed.ErrUnableToAuthoriseJoin), from("banned", 403, mxfed.ErrForbidden)
	version := from("version", 400, mxfed.ErrIncompatibleRoomVersion)
	for name, c := range map[string]struct {
		errs []error
		code mxfed.ErrorCode
		want int
	}{
		"nobody answered":             {[]error{dead, dead}, mxfed.ErrUnknown, 504},
		"an answer before none":       {[]error{dead, missing}, mxfed.ErrNotFound, 404},
		"another server before us":    {[]error{own, dead}, mxfed.ErrUnknown, 504},
		"not failed, but refused":     {[]error{broken, banned, missing}, mxfed.ErrForbidden, 403},
		"a ban before inability":      {[]error{unable, banned}, mxfed.ErrForbidden, 403},
		"inability before not found":  {[]error{missing, unable, dead}, mxfed.ErrUnableToAuthoriseJoin, 400},
		"rate limit before not found": {[]error{missing, busy}, mxfed.ErrLimitExceeded, 429},
		"the room version is final":   {[]error{banned, version, busy}, mxfed.ErrIncompatibleRoomVersion, 400},
		"the first of equals":         {[]error{missing, broken}, mxfed.ErrNotFound, 404},
		"only one":                    {[]error{errors.New("x"), banned}, mxfed.ErrForbidden, 403},
	} {
		e := mxfed.ClientError(fmt.Errorf("mxfed: join: %w", errors.Join(c.errs...)))
		require.Equal(t, c.code, e.Code, name)
		require.Equal(t, c.want, e.Status, name)
		for _, one := range c.errs {
			require.ErrorIs(t, e, one, name)
		}
	}
	require.NotContains(t, strings.ToLower(mxfed.ClientError(errors.Join(dead, banned)).Message), "dead")
}
