// Package anymux shows how to mount a handler of package mxfed on routers other than its own, one function for each. What a
// handler reads is the request line, byte for byte as the other server signed it, so a router may rewrite the URL, strip a
// prefix or unescape parameters as it likes. It must only hand requests on as they are: not redirect paths that hold %2F
// or two slashes, and not answer unknown methods itself, because the protocol has its own 404 and 405.
//
// The functions mount /_matrix/federation/ and /_matrix/key/, which is all that mxfed.NewHandler serves. Endpoints of the
// host's own below these paths go into the same router; the more specific route wins in each of them.
package anymux

import (
	"net/http"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"
)

// ServeMux needs patterns without a method: with one, it would answer other methods itself.
func ServeMux(m *http.ServeMux, h http.Handler) {
	m.Handle("/_matrix/federation/", h)
	m.Handle("/_matrix/key/", h)
}

// StripPrefix changes nothing for h, which never looks at what is stripped.
func StripPrefix(m *http.ServeMux, h http.Handler) {
	m.Handle("/_matrix/federation/", http.StripPrefix("/_matrix/federation", h))
	m.Handle("/_matrix/key/", http.StripPrefix("/_matrix/key", h))
}

// Chi needs Handle: Mount would do as well, Get and Put would answer other methods.
func Chi(r chi.Router, h http.Handler) {
	r.Handle("/_matrix/federation/*", h)
	r.Handle("/_matrix/key/*", h)
}

// Gorilla needs UseEncodedPath: without it, a router redirects paths whose IDs hold %2F%2F or %2E%2E.
func Gorilla(r *mux.Router, h http.Handler) {
	r.UseEncodedPath()
	r.PathPrefix("/_matrix/federation/").Handler(h)
	r.PathPrefix("/_matrix/key/").Handler(h)
}

// Echo needs Any, which covers all methods that servers use.
func Echo(e *echo.Echo, h http.Handler) {
	e.Any("/_matrix/federation/*", echo.WrapHandler(h))
	e.Any("/_matrix/key/*", echo.WrapHandler(h))
}

// Gin needs Any as well. RedirectTrailingSlash does no harm: a catch-all route takes paths with the slash, too.
func Gin(r *gin.Engine, h http.Handler) {
	r.Any("/_matrix/federation/*path", gin.WrapH(h))
	r.Any("/_matrix/key/*path", gin.WrapH(h))
}
