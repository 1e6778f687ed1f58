package mxfed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// ErrorCode is an errcode of the protocol and an error in its own right: a host returns one as it is, and errors.Is
// finds it in whatever this package returns. https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
type ErrorCode string

// The codes of this protocol; the status in each comment is the one that WriteError gives them.
const (
	ErrBadJSON                 ErrorCode = "M_BAD_JSON"                  // 400: JSON, but not of the demanded form
	ErrNotJSON                 ErrorCode = "M_NOT_JSON"                  // 400
	ErrForbidden               ErrorCode = "M_FORBIDDEN"                 // 403
	ErrNotFound                ErrorCode = "M_NOT_FOUND"                 // 404
	ErrLimitExceeded           ErrorCode = "M_LIMIT_EXCEEDED"            // 429
	ErrMissingParam            ErrorCode = "M_MISSING_PARAM"             // 400
	ErrInvalidParam            ErrorCode = "M_INVALID_PARAM"             // 400
	ErrUnauthorized            ErrorCode = "M_UNAUTHORIZED"              // 401
	ErrUnrecognized            ErrorCode = "M_UNRECOGNIZED"              // 404
	ErrTooLarge                ErrorCode = "M_TOO_LARGE"                 // 413
	ErrUnknown                 ErrorCode = "M_UNKNOWN"                   // 500
	ErrResourceLimitExceeded   ErrorCode = "M_RESOURCE_LIMIT_EXCEEDED"   // 403
	ErrIncompatibleRoomVersion ErrorCode = "M_INCOMPATIBLE_ROOM_VERSION" // 400, with the room's version
	ErrUnsupportedRoomVersion  ErrorCode = "M_UNSUPPORTED_ROOM_VERSION"  // 400; of the client-server API
	ErrUnableToAuthoriseJoin   ErrorCode = "M_UNABLE_TO_AUTHORISE_JOIN"  // 400
	ErrUnableToGrantJoin       ErrorCode = "M_UNABLE_TO_GRANT_JOIN"      // 400
	ErrInviteBlocked           ErrorCode = "M_INVITE_BLOCKED"            // 403
)

// Error implements error.
func (c ErrorCode) Error() string { return string(c) }

// status is the HTTP status that goes with c.
func (c ErrorCode) status() int {
	switch c {
	case ErrUnauthorized:
		return http.StatusUnauthorized
	case ErrForbidden, ErrInviteBlocked, ErrResourceLimitExceeded:
		return http.StatusForbidden
	case ErrNotFound, ErrUnrecognized:
		return http.StatusNotFound
	case ErrTooLarge:
		return http.StatusRequestEntityTooLarge
	case ErrLimitExceeded:
		return http.StatusTooManyRequests
	case ErrUnknown:
		return http.StatusInternalServerError
	}
	return http.StatusBadRequest
}

// Error is the protocol's standard error: received from another server (Server is set), or to be sent. A host may return
// one from any of its methods to choose code and text. Err is for logs and errors.As; it is never sent.
// https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
type Error struct {
	// Code is never empty in an error of this package; a received body without errcode counts as ErrUnknown.
	Code ErrorCode
	// Message is for people.
	Message string
	// Status is the HTTP status; 0 stands for the one that goes with Code, or for an error that never was an answer.
	Status int
	// Server is who answered, or failed to; empty for an error of this server.
	Server ServerName
	// Endpoint is what that server was asked, such as "make_join".
	Endpoint string
	// RoomVersion is the room's version, with ErrIncompatibleRoomVersion.
	RoomVersion RoomVersion
	// AdminContact is a URI of whoever can lift the limit, which ErrResourceLimitExceeded must come with.
	AdminContact string
	// RetryAfter is how long to wait before another try; 0 if unknown.
	RetryAfter time.Duration
	// Err is the cause.
	Err error

	bare bool // the received body had no errcode
}

// Error names server, endpoint, code and message.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("mxfed: ")
	if e.Server != "" {
		fmt.Fprintf(&b, "%s: ", e.Server)
	}
	if e.Endpoint != "" {
		fmt.Fprintf(&b, "%s: ", e.Endpoint)
	}
	if e.Server != "" && e.Status != 0 {
		fmt.Fprintf(&b, "%d ", e.Status)
	}
	b.WriteString(string(e.Code))
	if e.Message != "" {
		fmt.Fprintf(&b, ": %s", e.Message)
	}
	if e.Err != nil {
		fmt.Fprintf(&b, ": %s", strings.TrimPrefix(e.Err.Error(), "mxfed: "))
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is lets errors.Is find the code.
func (e *Error) Is(target error) bool { return target == error(e.Code) }

// Temporary tells whether another try may succeed: the server was not reached, is overloaded or failed (5xx or 429).
func (e *Error) Temporary() bool {
	return e.Code == ErrLimitExceeded || e.Status == http.StatusTooManyRequests || e.Status >= 500 || e.Server != "" && e.Status == 0
}

// refuse returns the error with which a request or an event is refused.
func refuse(code ErrorCode, format string, args ...any) error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// because is refuse with a cause that stays on this server.
func because(err error, code ErrorCode, format string, args ...any) error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Err: err}
}

// answerTo turns any error into the one to send. Errors of other servers and of the host's own making say nothing
// outside but that something failed.
func answerTo(err error) *Error {
	var first interface{ answer() Error } // an Error or an ErrorCode, whichever is further out
	switch {
	case errors.As(err, &first):
		answer := first.answer()
		if answer.Server != "" {
			return &Error{Code: ErrUnknown, Message: "another server failed", Status: http.StatusBadGateway, Err: err}
		}
		if answer.Code == "" {
			answer.Code = ErrUnknown
		}
		if answer.Status < 400 || answer.Status > 599 { // anything else would promise success, or make net/http panic
			answer.Status = answer.Code.status()
		}
		return &answer
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return &Error{Code: ErrUnknown, Message: "timed out", Status: http.StatusServiceUnavailable, Err: err}
	}
	return &Error{Code: ErrUnknown, Message: "internal error", Status: http.StatusInternalServerError, Err: err}
}

func (c ErrorCode) answer() Error { return Error{Code: c} }
func (e *Error) answer() Error    { return *e }

// WriteError writes err as every handler of this package does: the outermost Error or ErrorCode in it decides status and
// body, another server's error is 502 M_UNKNOWN, anything else is 500 M_UNKNOWN without details.
// https://spec.matrix.org/v1.19/client-server-api/#standard-error-response
func WriteError(w http.ResponseWriter, err error) {
	e := answerTo(err)
	message := cmp.Or(e.Message, e.Code.words())
	fields := []field{{"errcode", quoted(e.Code)}, {"error", quoted(strings.ToValidUTF8(message, "\uFFFD"))}}
	if e.RoomVersion != "" {
		fields = append(fields, field{"room_version", quoted(e.RoomVersion)})
	}
	if e.AdminContact != "" {
		fields = append(fields, field{"admin_contact", quoted(strings.ToValidUTF8(e.AdminContact, "\uFFFD"))})
	}
	if e.Status == http.StatusTooManyRequests {
		wait := max(e.RetryAfter, time.Second)
		w.Header().Set("Retry-After", strconv.FormatInt(int64(math.Ceil(wait.Seconds())), 10))
		fields = append(fields, field{"retry_after_ms", integer(wait.Milliseconds())})
	}
	writeJSON(w, e.Status, object(fields...))
}

// words are those that the code is made of, for people who are to read an error that says nothing else.
func (c ErrorCode) words() string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(string(c), "M_"), "_", " "))
}

func writeJSON(w http.ResponseWriter, status int, v value) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(v)))
	w.WriteHeader(status)
	io.WriteString(w, string(v)) // an error here means that the caller has gone
}

// maxErrorBody bounds what is read of an error's body, in bytes.
const maxErrorBody = 64 << 10

// readError turns an answer that is not 200 into an error, whatever its body is.
func readError(server ServerName, endpoint string, r *http.Response, now time.Time) *Error {
	e := &Error{Code: ErrUnknown, Status: r.StatusCode, Server: server, Endpoint: endpoint, bare: true}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxErrorBody))
	if err != nil {
		e.Err = err
	}
	var reader jsonReader
	text, err := reader.canonical(body, numbersAsReceived)
	if err == nil {
		v := value(text)
		if code, ok := v.get("errcode").str(); ok && code != "" {
			e.Code, e.bare = ErrorCode(code), false
		}
		e.Message, _ = v.get("error").str()
		version, _ := v.get("room_version").str()
		e.RoomVersion = RoomVersion(version)
		e.AdminContact, _ = v.get("admin_contact").str()
		if ms, ok := v.get("retry_after_ms").int(); ok {
			e.RetryAfter = cappedWait(ms, time.Millisecond)
		}
	}
	if wait, ok := retryAfter(r.Header.Get("Retry-After"), now); ok {
		e.RetryAfter = wait
	}
	return e
}

// maxRetryAfter bounds the wait that another server may ask for.
const maxRetryAfter = 24 * time.Hour

func cappedWait(n int64, unit time.Duration) time.Duration {
	return time.Duration(min(max(n, 0), int64(maxRetryAfter/unit))) * unit
}

// retryAfter reads the Retry-After header: seconds or a date.
func retryAfter(header string, now time.Time) (time.Duration, bool) {
	if seconds, err := strconv.ParseInt(header, 10, 64); err == nil {
		return cappedWait(seconds, time.Second), true
	}
	at, err := http.ParseTime(header)
	return cappedWait(int64(at.Sub(now)), time.Nanosecond), err == nil
}

// unimplemented tells whether e says that the server does not have the endpoint at all, so that an older one is worth a
// try.
func (e *Error) unimplemented() bool {
	switch e.Status {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusBadRequest:
		return e.bare || e.Code == ErrUnrecognized
	}
	return false
}

// ClientError picks from err what to tell the host's own client, with status and code of the client-server API: what the
// other server said where the specification hands it on, 502 M_UNKNOWN where it does not, 504 where nobody answered. The
// result wraps what another server said, names no server itself and may be given to WriteError.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2inviteroomideventid
func ClientError(err error) *Error {
	best, rank := (*Error)(nil), 0
	walkErrors(err, func(e *Error) {
		if r := e.telling(); r > rank {
			best, rank = e, r
		}
	})
	if best == nil {
		return answerTo(err)
	}
	told := *best
	told.Server, told.Endpoint, told.Err = "", "", err
	switch {
	case told.Code == ErrIncompatibleRoomVersion && best.Endpoint == "invite", told.Code == ErrUnsupportedRoomVersion:
		told.Code, told.Status = ErrUnsupportedRoomVersion, http.StatusBadRequest
	case best.handedOn():
	case told.Status == 0:
		told.Code, told.Message, told.Status = ErrUnknown, "the other server could not be reached", http.StatusGatewayTimeout
	default:
		told.Code, told.Message, told.Status = ErrUnknown, strings.TrimSpace("the other server failed: "+told.Message), http.StatusBadGateway
	}
	return &told
}

// handedOn tells whether a client is shown a received error as it is.
func (e *Error) handedOn() bool {
	if e.Status == http.StatusBadRequest && (e.Endpoint == "invite" || e.Endpoint == "send_join") {
		return e.Code != ErrMissingParam && e.Code != ErrInvalidParam
	}
	switch e.Status {
	case http.StatusBadRequest, http.StatusForbidden, http.StatusTooManyRequests:
		return true
	case http.StatusNotFound: // but a client would take a missing endpoint for one of ours
		return !e.unimplemented()
	}
	return false
}

// telling ranks errors by what they tell a user when several servers failed; 0 for those that are no server's.
func (e *Error) telling() int {
	switch {
	case e.Server == "":
		return 0
	case e.Status == 0:
		return 1
	case e.Code == ErrNotFound, !e.handedOn():
		return 2
	case e.Code == ErrLimitExceeded, e.Code == ErrUnableToAuthoriseJoin, e.Code == ErrUnableToGrantJoin:
		return 3
	case e.Code == ErrIncompatibleRoomVersion:
		return 5
	}
	return 4
}

// walkErrors calls visit for every Error in the tree of err but those that are the cause of another one.
func walkErrors(err error, visit func(*Error)) {
	if e, ok := err.(*Error); ok {
		visit(e)
		return
	}
	switch wrapped := err.(type) {
	case interface{ Unwrap() error }:
		if next := wrapped.Unwrap(); next != nil {
			walkErrors(next, visit)
		}
	case interface{ Unwrap() []error }:
		for _, next := range wrapped.Unwrap() {
			walkErrors(next, visit)
		}
	}
}
