package anymux_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"crypto/ed25519"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"
	"github.com/stretchr/testify/require"

	"example.org/mxfed"
	"example.org/mxfed/examples/anymux"
)

// routers mount a handler on each kind of router.
var routers = map[string]func(h http.Handler) http.Handler{
	"ServeMux": func(h http.Handler) http.Handler {
		m := http.NewServeMux()
		anymux.ServeMux(m, h)
		return m
	},
	"StripPrefix": func(h http.Handler) http.Handler {
		m := http.NewServeMux()
		anymux.StripPrefix(m, h)
		return m
	},
	"chi": func(h http.Handler) http.Handler {
		r := chi.NewRouter()
		anymux.Chi(r, h)
		return r
	},
	"gorilla": func(h http.Handler) http.Handler {
		r := mux.NewRouter()
		anymux.Gorilla(r, h)
		return r
	},
	"echo": func(h http.Handler) http.Handler {
		e := echo.New()
		anymux.Echo(e, h)
		return e
	},
	"gin": func(h http.Handler) http.Handler {
		gin.SetMode(gin.ReleaseMode)
		r := gin.New()
		anymux.Gin(r, h)
		return r
	},
}

// site is us.example behind one router.
type site struct {
	web     *httptest.Server
	asked   []mxfed.Request
	invites []*mxfed.Invite
}

func newSite(t *testing.T, mount func(http.Handler) http.Handler, theirs *mxfed.Signer, public ed25519.PublicKey) *site {
	s := &site{}
	server, err := mxfed.NewServer(mxfed.Config{
		Signers: []*mxfed.Signer{signer(t, "us.example")},
		Keys: mxfed.KeysFunc(func(_ context.Context, keys []mxfed.Key) error {
			for i := range keys {
				if keys[i].Server == theirs.Name() {
					keys[i].Public, keys[i].ValidUntil = public, time.Now().Add(time.Hour)
				}
			}
			return nil
		}),
		Allow: func(_ context.Context, r *mxfed.Request) error {
			s.asked = append(s.asked, *r)
			return nil
		},
	})
	require.NoError(t, err)
	s.web = httptest.NewTLSServer(mount(mxfed.NewHandler(server, mxfed.Hosts{
		Invite: mxfed.InviteHostFunc(func(_ context.Context, inv *mxfed.Invite) error {
			s.invites = append(s.invites, inv)
			return nil
		}),
		Join: mxfed.JoinHostFunc(func(context.Context, *mxfed.Membership) (*mxfed.SendJoinResponse, error) {
			return nil, mxfed.ErrForbidden
		}),
	})))
	t.Cleanup(s.web.Close)
	return s
}

func private(name mxfed.ServerName) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte(name[:1]), ed25519.SeedSize))
}

func signer(t *testing.T, name mxfed.ServerName) *mxfed.Signer {
	s, err := mxfed.NewSigner(name, "ed25519:k", private(name))
	require.NoError(t, err)
	return s
}

// call sends a signed request, whose URI is used as it is.
func (s *site) call(t *testing.T, from *mxfed.Signer, method, uri string, body []byte) (*http.Response, []byte) {
	r, err := http.NewRequest(method, s.web.URL+uri, bytes.NewReader(body))
	require.NoError(t, err)
	require.Equal(t, uri, r.URL.RequestURI())
	require.NoError(t, from.SignRequest(r, "us.example", body))
	client := s.web.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	answer, err := client.Do(r)
	require.NoError(t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	return answer, text
}

// room is one whose ID holds what routers stumble over, with an invite whose ID does too.
type room struct {
	id             mxfed.RoomID
	create, invite *mxfed.Event
}

const alice, bob = "@alice:domain", "@bob:us.example"

// newRoom makes the room on the server domain. In room version 3 event IDs are in standard base64.
func newRoom(t *testing.T, theirs *mxfed.Signer) *room {
	r := &room{id: "!a/b//c+d%2Fe%25f/../g h:domain"}
	var state []*mxfed.Event
	server, err := mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{theirs}, Rooms: mxfed.RoomSourceFunc(
		func(context.Context, mxfed.RoomID, mxfed.RoomQuery) (*mxfed.Room, error) {
			return &mxfed.Room{Version: "3", Latest: state[len(state)-1:], State: state}, nil
		})})
	require.NoError(t, err)
	build := func(typ, key, content string) *mxfed.Event {
		e, err := server.Build(t.Context(), &mxfed.Draft{Room: r.id, Version: "3", Type: typ, StateKey: &key, Sender: alice, Content: json.RawMessage(content)})
		require.NoError(t, err)
		return e
	}
	r.create = build("m.room.create", "", `{"creator":"@alice:domain","room_version":"3"}`)
	state = append(state, r.create)
	state = append(state, build("m.room.member", alice, `{"membership":"join"}`))
	for i := 0; r.invite == nil; i++ {
		e := build("m.room.member", bob, fmt.Sprintf(`{"membership":"invite","reason":"%d"}`, i))
		if strings.Contains(string(e.ID()), "/") && strings.Contains(string(e.ID()), "+") {
			r.invite = e
		}
	}
	return r
}

// escapings are ways to write a path segment that mean the same.
var escapings = map[string]func(string) string{
	"usual": url.PathEscape,
	"least": func(s string) string {
		return strings.NewReplacer("%", "%25", "/", "%2F", " ", "%20").Replace(s)
	},
	"all": func(s string) string {
		return "%" + strings.ReplaceAll(fmt.Sprintf("% X", s), " ", "%")
	},
	"lower case": func(s string) string {
		return "%" + strings.ReplaceAll(fmt.Sprintf("% x", s), " ", "%")
	},
}

// Behind every router, IDs arrive as they were sent, however they were escaped, and the signature over the request line
// still holds.
func TestAnyMux(t *testing.T) {
	theirs := signer(t, "domain")
	room := newRoom(t, theirs)
	body := fmt.Appendf(nil, `{"room_version":"3","event":%s,"invite_room_state":[%s]}`, room.invite.JSON(), room.create.JSON())
	const user = "@a/b+c%2Fd//e:domain"
	for name, mount := range routers {
		for how, escape := range escapings {
			t.Run(name+", escaping "+how, func(t *testing.T) {
				s := newSite(t, mount, theirs, private("domain").Public().(ed25519.PublicKey))
				path := "/" + escape(string(room.id)) + "/"
				answer, text := s.call(t, theirs, "PUT", "/_matrix/federation/v2/invite"+path+escape(string(room.invite.ID())), body)
				require.Equal(t, 200, answer.StatusCode, "%s", text)
				require.Contains(t, string(text), `"us.example":{"ed25519:k":`)
				require.Len(t, s.invites, 1)
				require.Equal(t, room.invite.ID(), s.invites[0].Event.ID())
				require.NoError(t, s.invites[0].StateErr)

				answer, text = s.call(t, theirs, "GET", "/_matrix/federation/v1/make_join"+path+escape(user)+"?ver=3&x=a+b%2F", nil)
				requireError(t, answer, text, 404, "M_NOT_FOUND") // the room, not the path
				require.Equal(t, room.id, s.asked[1].Room)
				require.Equal(t, mxfed.UserID(user), s.asked[1].User)
			})
		}
	}
}

// What is not served is answered as the protocol demands, and keys are published, behind every router.
func TestAnyMux_Unknown(t *testing.T) {
	theirs := signer(t, "domain")
	for name, mount := range routers {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, mount, theirs, private("domain").Public().(ed25519.PublicKey))
			answer, text := s.call(t, theirs, "GET", "/_matrix/federation/v2/invite/!r:d/$e", nil)
			requireError(t, answer, text, 405, "M_UNRECOGNIZED")
			answer, text = s.call(t, theirs, "DELETE", "/_matrix/federation/v2/send_join/!r:d/$e", []byte("{}"))
			requireError(t, answer, text, 405, "M_UNRECOGNIZED")
			answer, text = s.call(t, theirs, "GET", "/_matrix/federation/v1/nothing", nil)
			requireError(t, answer, text, 404, "M_UNRECOGNIZED")
			answer, text = s.call(t, theirs, "PUT", "/_matrix/federation/v2/invite/!r:d/$e/", []byte("{}"))
			requireError(t, answer, text, 404, "M_UNRECOGNIZED")
			answer, text = s.call(t, theirs, "GET", "/_matrix/key/v2/server", nil)
			require.Equal(t, 200, answer.StatusCode)
			require.Contains(t, string(text), `"server_name":"us.example"`)
			require.Empty(t, s.asked)
		})
	}
}

func requireError(t *testing.T, answer *http.Response, text []byte, status int, code string) {
	t.Helper()
	require.Equal(t, status, answer.StatusCode, "%s", text)
	require.Equal(t, "application/json", answer.Header.Get("Content-Type"))
	var body struct{ Errcode, Error string }
	require.NoError(t, json.Unmarshal(text, &body))
	require.Equal(t, code, body.Errcode)
}
