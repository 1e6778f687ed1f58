package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"example.org/mxfed"
)

// This file keeps users, their devices' tokens, their profiles, and the aliases that they give to rooms.

// localparts of new users. https://spec.matrix.org/v1.19/appendices/#user-identifiers
var localpart = regexp.MustCompile(`^[a-z0-9._=/+-]+$`)

// register makes a user of a localpart, drawn at random if empty, and an access token for a device, which gets a name if it
// has none. Only a digest of the token is stored.
func (s *server) register(ctx context.Context, local, device string) (in session, token string, err error) {
	local = cmp.Or(local, strings.ToLower(rand.Text()))
	in, token = session{mxfed.UserID("@" + local + ":" + string(s.name)), cmp.Or(device, rand.Text()[:10])}, rand.Text()
	if !localpart.MatchString(local) || len(in.User) > 255 {
		return in, "", refusal(http.StatusBadRequest, "M_INVALID_USERNAME", "a user name has a-z, 0-9 and ._=/+- only")
	}
	return in, token, s.db.update(ctx, "", func(t *tx) error {
		if !t.exec(`INSERT INTO users (id) VALUES (?) ON CONFLICT DO NOTHING`, in.User) {
			return refusal(http.StatusBadRequest, "M_USER_IN_USE", "there is such a user")
		}
		t.exec(`INSERT INTO tokens VALUES (?, ?, ?)`, digest(token), in.User, in.Device)
		return nil
	})
}

func digest(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// session looks up a token.
func (s *server) session(ctx context.Context, token string) (in session, err error) {
	if token == "" {
		return in, refusal(http.StatusUnauthorized, "M_MISSING_TOKEN", "an access token is needed")
	}
	err = s.db.view(ctx, func(t *tx) error {
		var found bool
		if in, found = one[session](t, `SELECT user_id, device FROM tokens WHERE hash = ?`, digest(token)); !found {
			return refusal(http.StatusUnauthorized, "M_UNKNOWN_TOKEN", "access token is not known")
		}
		return nil
	})
	return in, err
}

// profileOf asks the user's server if that is another one. ErrNotFound: there is no such user.
func (s *server) profileOf(ctx context.Context, user mxfed.UserID) (*profile, error) {
	p := &profile{}
	if name := user.Server(); name != s.name {
		return p, s.fed.Client().Do(ctx, "", name, http.MethodGet, "/_matrix/federation/v1/query/profile?user_id="+url.QueryEscape(string(user)), nil, p)
	}
	return p, s.db.view(ctx, func(t *tx) error {
		var found bool
		if *p, found = one[profile](t, `SELECT displayname, avatar_url FROM users WHERE id = ?`, user); !found {
			return mxfed.ErrNotFound
		}
		return nil
	})
}

// setProfile changes a local user's profile, and then the member events in all the user's rooms.
func (s *server) setProfile(ctx context.Context, user mxfed.UserID, p *profile) error {
	var rooms []mxfed.RoomID
	err := s.db.update(ctx, "", func(t *tx) error {
		t.exec(`UPDATE users SET displayname = ?, avatar_url = ? WHERE id = ?`, p.DisplayName, p.AvatarURL, user)
		rooms = list[mxfed.RoomID](t, `SELECT room FROM state WHERE type = 'm.room.member' AND state_key = ? AND membership = 'join'
			AND until = ?`, user, int64(forever))
		return nil
	})
	for _, id := range rooms {
		if err == nil {
			_, err = s.sendMember(ctx, user, id, user, "join", nil)
		}
	}
	return err
}

// resolveAlias asks the alias's server if that is another one.
func (s *server) resolveAlias(ctx context.Context, alias mxfed.RoomAlias) (*mxfed.AliasResponse, error) {
	switch alias.Server() {
	case "":
		return nil, refusal(http.StatusBadRequest, mxfed.ErrInvalidParam, "that is no alias")
	case s.name:
		return s.host.ResolveAlias(ctx, alias)
	}
	return s.fed.Client().ResolveAlias(ctx, alias)
}

// setAlias gives a room an alias of this server. The user must be in the room.
func (s *server) setAlias(ctx context.Context, user mxfed.UserID, alias mxfed.RoomAlias, id mxfed.RoomID) error {
	if !strings.HasPrefix(string(alias), "#") || alias.Server() != s.name || len(alias) > 255 {
		return refusal(http.StatusBadRequest, mxfed.ErrInvalidParam, "this is no alias of this server")
	}
	return s.db.update(ctx, "", func(t *tx) error {
		if m := t.membership(user, id); m == nil || m.Membership != "join" {
			return orForbidden(nil, "you are not in the room")
		}
		if !t.exec(`INSERT INTO aliases VALUES (?, ?) ON CONFLICT DO NOTHING`, alias, id) {
			return refusal(http.StatusConflict, errRoomInUse, "there is such an alias")
		}
		return nil
	})
}

func orForbidden(err error, text string) error {
	if err == nil {
		err = refusal(http.StatusForbidden, mxfed.ErrForbidden, text)
	}
	return err
}

// refusal is what a client is told that asked for the wrong thing.
func refusal(status int, code mxfed.ErrorCode, text string) error {
	return &mxfed.Error{Status: status, Code: code, Message: text}
}
