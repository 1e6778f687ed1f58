package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"

	"example.org/mxfed"
)

// router serves the client API: JSON in, JSON out, and the standard errors for everything else.
// https://spec.matrix.org/v1.19/client-server-api/#api-standards
type router struct {
	mux   *http.ServeMux
	paths map[string]map[string]http.HandlerFunc // by pattern and method
	fail  func(w http.ResponseWriter, q *http.Request, err error)
}

// endpoint answers a request with what is to be encoded as JSON, or with an error.
type endpoint func(q *http.Request) (any, error)

// handle serves a path below /_matrix/client/, in version 3 of the API and under the name that was used before.
func (r *router) handle(method, path string, serve endpoint) {
	if rest, ok := strings.CutPrefix(path, "v3/"); ok {
		r.handle(method, "r0/"+rest, serve)
	}
	pattern := "/_matrix/client/" + path
	if r.paths[pattern] == nil {
		methods := make(map[string]http.HandlerFunc)
		r.paths[pattern] = methods
		r.mux.HandleFunc(pattern, func(w http.ResponseWriter, q *http.Request) { r.dispatch(w, q, methods) })
	}
	r.paths[pattern][method] = func(w http.ResponseWriter, q *http.Request) { r.answer(w, q, serve) }
}

// dispatch chooses by method. https://spec.matrix.org/v1.19/client-server-api/#common-error-codes
func (r *router) dispatch(w http.ResponseWriter, q *http.Request, methods map[string]http.HandlerFunc) {
	method := q.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	if serve := methods[method]; serve != nil {
		serve(w, q)
		return
	}
	r.fail(w, q, &mxfed.Error{Code: mxfed.ErrUnrecognized, Message: "no such method here", Status: http.StatusMethodNotAllowed})
}

func (r *router) answer(w http.ResponseWriter, q *http.Request, serve endpoint) {
	result, err := serve(q)
	var text []byte
	if err == nil {
		text, err = json.Marshal(result)
	}
	if err != nil {
		r.fail(w, q, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, ok := result.(unauthorized); ok {
		w.WriteHeader(http.StatusUnauthorized)
	}
	w.Write(text) // an error here means that the caller has gone
}

// ServeHTTP lets web pages of any origin in: a client proves itself by its token alone.
// https://spec.matrix.org/v1.19/client-server-api/#web-browser-clients
func (r *router) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Access-Control-Allow-Methods", "GET, POST, PUT, DELETE, OPTIONS")
	w.Header().Set("Access-Control-Allow-Headers", "X-Requested-With, Content-Type, Authorization")
	if q.Method == http.MethodOptions {
		return
	}
	r.mux.ServeHTTP(w, q)
}

// maxBody bounds the body of a client's request, in bytes. An event is far smaller.
const maxBody = 1 << 20

// decode reads the JSON object in the body of q; no body counts as an empty one.
func decode(q *http.Request, into any) error {
	body, err := io.ReadAll(http.MaxBytesReader(nil, q.Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return mxfed.ErrTooLarge
	case err != nil:
		return err
	case len(body) == 0:
		body = []byte("{}")
	case !json.Valid(body):
		return &mxfed.Error{Code: mxfed.ErrNotJSON, Message: "the body is not JSON"}
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(body, &object); err != nil || object == nil {
		return &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "the body is no JSON object"}
	}
	if err := json.Unmarshal(body, into); err != nil {
		return &mxfed.Error{Code: mxfed.ErrBadJSON, Message: "the body has not the form that is expected here", Err: err}
	}
	return nil
}
