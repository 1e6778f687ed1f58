package mxfed

import (
	"context"
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/crypto/ed25519"
)

// This file publishes this server's keys and passes on those of others.
// https://spec.matrix.org/v1.19/server-server-api/#retrieving-server-keys

const (
	keyLifetime = 24 * time.Hour // of a document of our own, from its signing on
	keyRenewal  = 12 * time.Hour // a document is signed anew after that

	maxQueriedServers = 1000 // in one query
	maxQueryFetches   = 100  // servers that one query makes us ask
	maxNotaryFetches  = 256  // servers that all queries at a time make us ask
	maxCountersigned  = 1024 // documents whose signature is remembered
)

// NewKeyHandler publishes the keys of all of s's names: those of the name in the request's Host header, or of the first. If
// Config.Keys is a *KeyRing, it also is a notary: it fetches, countersigns and passes on the keys of other servers, up to
// 1000 in one query, of which it asks 100 anew; that many others have to be known. Requests need no authentication; limiting
// their rate is up to whoever mounts the handler.
// https://spec.matrix.org/v1.19/server-server-api/#retrieving-server-keys
func NewKeyHandler(s *Server) http.Handler {
	h := &keyHandler{server: s, published: make([]atomic.Pointer[keyDocument], len(s.client.own))}
	h.ring, _ = s.client.keys.(*KeyRing)
	// an error would mean a size of 0
	h.countersigned, _ = simplelru.NewLRU[countersignature, signedDocument](maxCountersigned, nil)
	return h
}

type keyHandler struct {
	server    *Server
	ring      *KeyRing                      // nil: no notary
	published []atomic.Pointer[keyDocument] // by index of the signer; fetched is when it was signed
	fetching  atomic.Int64                  // servers that queries may be asking just now

	mu            sync.Mutex
	countersigned *simplelru.LRU[countersignature, signedDocument]
}

// ServeHTTP implements http.Handler.
func (h *keyHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, err := h.serve(r)
	if err != nil {
		h.server.refuse(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, answer)
}

// serve finds the endpoint by the request line and returns its answer.
func (h *keyHandler) serve(r *http.Request) (value, error) {
	path, query, _ := strings.Cut(requestURI(r), "?")
	rest, ok := strings.CutPrefix(path, "/_matrix/key/v2/")
	endpoint, param, hasParam := strings.Cut(rest, "/")
	switch {
	case !ok || strings.Contains(param, "/"):
	case endpoint == "server": // a key ID in the path is of older versions; the answer is the same
		if r.Method != http.MethodGet {
			return "", errUnrecognized(http.StatusMethodNotAllowed)
		}
		d, err := h.publish(h.signer(r))
		if err != nil {
			return "", err
		}
		return d.text, nil
	case endpoint == "query" && h.ring != nil:
		return h.query(r, param, hasParam, query)
	}
	return "", errUnrecognized(http.StatusNotFound)
}

// signer is the index of the signer that a request is meant for.
func (h *keyHandler) signer(r *http.Request) int {
	named := func(s *Signer) bool { return string(s.name) == r.Host }
	return max(slices.IndexFunc(h.server.client.own, named), 0)
}

// publish returns the document of one of our names. It is signed once for many requests, since anyone may ask and a signing
// key may live far away.
func (h *keyHandler) publish(i int) (*keyDocument, error) {
	now, s := h.server.client.now(), h.server.client.own[i]
	if d := h.published[i].Load(); d != nil && !now.Before(d.fetched) && now.Sub(d.fetched) < keyRenewal {
		return d, nil
	}
	text, err := s.document(now)
	if err != nil {
		return nil, err
	}
	d := &keyDocument{server: s.name, text: text, fetched: now}
	h.published[i].Store(d)
	return d, nil
}

// document lists the signer's keys, current and old.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server
func (s *Signer) document(now time.Time) (value, error) {
	public, _ := s.key.Public().(ed25519.PublicKey)
	current := object(field{string(s.id), object(field{"key", publicKey(public)})})
	old := make([]field, len(s.old))
	for i, k := range s.old {
		old[i] = field{string(k.ID), object(field{"key", publicKey(k.Public)}, field{"expired_ts", keyTimestamp(k.Expired)})}
	}
	return s.signObject(object(field{"server_name", quoted(s.name)}, field{"verify_keys", current},
		field{"old_verify_keys", object(old...)}, field{"valid_until_ts", keyTimestamp(now.Add(keyLifetime))}))
}

func publicKey(key ed25519.PublicKey) value {
	return quoted(base64.RawStdEncoding.EncodeToString(key))
}

// query answers a question to the notary.
func (h *keyHandler) query(r *http.Request, param string, hasParam bool, rawQuery string) (value, error) {
	var asked []Key
	var err error
	switch {
	case hasParam && param != "" && r.Method == http.MethodGet:
		asked, err = h.readPath(param, rawQuery)
	case param == "" && r.Method == http.MethodPost:
		asked, err = h.readQuery(r)
	default:
		return "", errUnrecognized(http.StatusMethodNotAllowed)
	}
	if err != nil {
		return "", err
	}
	documents, err := h.answer(r.Context(), h.signer(r), asked)
	return object(field{"server_keys", array(documents...)}), err
}

// readPath reads what GET asks for: all keys of one server.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2queryservername
func (h *keyHandler) readPath(param, rawQuery string) ([]Key, error) {
	name, err := url.PathUnescape(param)
	if err != nil || !ServerName(name).valid() {
		return nil, refuse(ErrInvalidParam, "%.255q is no server name", name)
	}
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return nil, because(err, ErrInvalidParam, "query is not escaped properly")
	}
	minimum := h.server.client.now()
	if s := query.Get("minimum_valid_until_ts"); s != "" {
		ts, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, because(err, ErrInvalidParam, "minimum_valid_until_ts is no timestamp")
		}
		minimum = keyTime(ts)
	}
	return []Key{{Server: ServerName(name), At: minimum}}, nil
}

// readQuery reads what POST asks for: some or all keys of many servers.
// https://spec.matrix.org/v1.19/server-server-api/#post_matrixkeyv2query
func (h *keyHandler) readQuery(r *http.Request) (asked []Key, err error) {
	body, err := h.server.readBody(r)
	if err != nil {
		return nil, err
	}
	servers := body.get("server_keys")
	if !servers.isObject() {
		return nil, refuse(ErrBadJSON, "server_keys is missing or no object")
	}
	now := h.server.client.now()
	n := 0
	for name, ids := range servers.members() {
		switch n++; {
		case n > maxQueriedServers:
			return nil, refuse(ErrTooLarge, "server_keys names more than %d servers", maxQueriedServers)
		case !ServerName(name).valid():
			return nil, refuse(ErrInvalidParam, "%.255q is no server name", name)
		case !ids.isObject():
			return nil, refuse(ErrBadJSON, "keys of %s are no object", name)
		}
		asked = append(asked, readCriteria(ServerName(name), ids, now)...)
	}
	return asked, nil
}

// readCriteria reads which keys of one server are wanted; none listed stands for all.
func readCriteria(name ServerName, ids value, now time.Time) (asked []Key) {
	for id, criteria := range ids.members() {
		at := now
		if ts, ok := criteria.get("minimum_valid_until_ts").int(); ok {
			at = keyTime(ts)
		}
		if asked = append(asked, Key{Server: name, ID: KeyID(id), At: at}); len(asked) == maxKeysOfServer {
			break
		}
	}
	if len(asked) == 0 {
		return []Key{{Server: name, At: now}}
	}
	return asked
}

// answer collects documents: our own and, countersigned, those of others. Servers without any are left out.
func (h *keyHandler) answer(ctx context.Context, signer int, asked []Key) ([]value, error) {
	var found []*keyDocument
	for i, s := range h.server.client.own {
		if slices.ContainsFunc(asked, func(q Key) bool { return q.Server == s.name }) {
			d, err := h.publish(i)
			if err != nil {
				return nil, err
			}
			found = append(found, d)
		}
	}
	others := slices.DeleteFunc(asked, func(q Key) bool { return h.server.client.signer(q.Server) != nil })
	found = append(found, h.fetch(ctx, others)...)
	documents := make([]value, 0, len(found))
	for _, d := range found {
		text, err := h.countersign(signer, d)
		if err != nil {
			return nil, err
		}
		documents = append(documents, text)
	}
	return documents, nil
}

// fetch returns the documents of other servers. Nobody can make this server ask more than so many others: beyond that, what
// is known is the answer.
func (h *keyHandler) fetch(ctx context.Context, asked []Key) []*keyDocument {
	servers := make(map[ServerName]bool)
	for _, q := range asked {
		servers[q.Server] = true
	}
	want := int64(min(len(servers), maxQueryFetches))
	free := maxNotaryFetches - (h.fetching.Add(want) - want)
	defer h.fetching.Add(-want)
	return h.ring.lastDocuments(ctx, asked, int(min(max(free, 0), want)))
}

// lastDocuments returns the newest known document of each server in asked, for a notary to pass on. Those that are no longer
// good for At, do not list ID (if it is set), or are older than half of their lifetime are fetched anew, up to so many;
// the last known one is returned if that fails, and nothing if there is none.
func (k *KeyRing) lastDocuments(ctx context.Context, asked []Key, fetches int) []*keyDocument {
	k.once.Do(k.setUp)
	now := k.now()
	wanted := make(map[ServerName][]Key)
	k.mu.Lock()
	for _, q := range asked {
		d, _ := k.documents.Get(q.Server)
		if _, twice := wanted[q.Server]; !twice && len(wanted) < fetches && !d.answers(&q, now) {
			wanted[q.Server] = nil
		}
	}
	k.mu.Unlock()
	if len(wanted) > 0 {
		k.inquire(ctx, wanted, true) // who failed is left out
	}
	var found []*keyDocument
	seen := make(map[ServerName]bool)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, q := range asked {
		if d, ok := k.documents.Get(q.Server); ok && !seen[q.Server] {
			found = append(found, d)
		}
		seen[q.Server] = true
	}
	return found
}

// answers tells whether d, which may be nil, is good enough for what a notary was asked.
// https://spec.matrix.org/v1.19/server-server-api/#querying-keys-through-another-server
func (d *keyDocument) answers(q *Key, now time.Time) bool {
	if d == nil || q.At.After(d.validUntil) {
		return false
	}
	lifetime := min(d.validUntil.Sub(d.fetched), maxKeyValidity)
	lists := d.text.get("verify_keys").get(string(q.ID)) != "" || d.text.get("old_verify_keys").get(string(q.ID)) != ""
	return now.Sub(d.fetched) < lifetime/2 && (q.ID == "" || lists)
}

// countersignature names the signature of one of our names on a server's document, signedDocument holds it.
type (
	countersignature struct {
		signer int
		server ServerName
	}
	signedDocument struct {
		document *keyDocument
		signed   value
	}
)

// countersign returns d with a signature of our own, once for many requests.
func (h *keyHandler) countersign(signer int, d *keyDocument) (value, error) {
	if d.server == h.server.client.own[signer].name {
		return d.text, nil // its own signature is there
	}
	name := countersignature{signer, d.server}
	h.mu.Lock()
	known, ok := h.countersigned.Get(name)
	h.mu.Unlock()
	if ok && known.document == d {
		return known.signed, nil
	}
	signed, err := h.server.client.own[signer].signObject(d.text)
	if err != nil {
		return "", err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.countersigned.Add(name, signedDocument{d, signed})
	return signed, nil
}
