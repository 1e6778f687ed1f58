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
	"golang.org/x/crypto/bcrypt"
)

// This file keeps users, their devices' tokens, their profiles, and the aliases that they give to rooms.

// localparts of new users. https://spec.matrix.org/v1.19/appendices/#user-identifiers
var localpart = regexp.MustCompile(`^[a-z0-9._=/+-]+$`)

// register makes a user of a localpart; an empty one is drawn at random. An empty password lets nobody log in later.
func (s *server) register(ctx context.Context, local, password string) (mxfed.UserID, error) {
	if local == "" {
		local = strings.ToLower(rand.Text())
	}
	user := mxfed.UserID("@" + local + ":" + string(s.name))
	if !localpart.MatchString(local) || len(user) > 255 {
		return "", &mxfed.Error{Code: errInvalidUser, Status: http.StatusBadRequest, Message: "a user name has a-z, 0-9 and ._=/+- only"}
	}
	hash, err := hashed(password)
	if err != nil {
		return "", err
	}
	return user, s.db.update(ctx, "", func(t *tx) error {
		added, err := t.changes(`INSERT INTO users (id, password) VALUES ($1, $2) ON CONFLICT DO NOTHING`, user, hash)
		if err == nil && !added {
			err = &mxfed.Error{Code: errUserInUse, Status: http.StatusBadRequest, Message: "there is such a user"}
		}
		return err
	})
}

// hashed is what is stored of a password. bcrypt reads 72 bytes at most, so it gets a digest.
func hashed(password string) (string, error) {
	if password == "" {
		return "", nil
	}
	hash, err := bcrypt.GenerateFromPassword(digest(password), bcrypt.DefaultCost)
	return string(hash), err
}

func digest(text string) []byte {
	sum := sha256.Sum256([]byte(text))
	return []byte(hex.EncodeToString(sum[:]))
}

// logIn checks a password.
func (s *server) logIn(ctx context.Context, user mxfed.UserID, password string) error {
	var hash string
	err := s.db.view(ctx, func(t *tx) error {
		_, err := t.row(`SELECT password FROM users WHERE id = $1`, []any{user}, &hash)
		return err
	})
	if err == nil && bcrypt.CompareHashAndPassword([]byte(hash), digest(password)) != nil {
		err = &mxfed.Error{Code: mxfed.ErrForbidden, Message: "user name or password is wrong"}
	}
	return err
}

// newToken gives a user's device an access token in place of the one it had; an empty device gets a new name. Only a digest
// of the token is stored.
func (s *server) newToken(ctx context.Context, user mxfed.UserID, device string) (token string, in session, err error) {
	token, in = rand.Text(), session{User: user, Device: cmp.Or(device, rand.Text()[:10])}
	return token, in, s.db.update(ctx, "", func(t *tx) error {
		if err := t.exec(`DELETE FROM tokens WHERE user_id = $1 AND device = $2`, user, in.Device); err != nil {
			return err
		}
		return t.exec(`INSERT INTO tokens VALUES ($1, $2, $3)`, string(digest(token)), user, in.Device)
	})
}

// session looks up a token: errUnknownToken if it is none.
func (s *server) session(ctx context.Context, token string) (in session, err error) {
	err = s.db.view(ctx, func(t *tx) error {
		found, err := t.row(`SELECT user_id, device FROM tokens WHERE hash = $1`, []any{string(digest(token))}, &in.User, &in.Device)
		if err == nil && !found {
			err = &mxfed.Error{Code: errUnknownToken, Status: http.StatusUnauthorized, Message: "access token is not known"}
		}
		return err
	})
	return in, err
}

// logOut ends a token.
func (s *server) logOut(ctx context.Context, token string) error {
	return s.db.update(ctx, "", func(t *tx) error { return t.exec(`DELETE FROM tokens WHERE hash = $1`, string(digest(token))) })
}

// profileOf asks the user's server if that is another one. ErrNotFound: there is no such user.
func (s *server) profileOf(ctx context.Context, user mxfed.UserID) (p *profile, err error) {
	p = &profile{}
	if name := user.Server(); name != s.name {
		return p, s.fed.Client().Do(ctx, "", name, http.MethodGet, "/_matrix/federation/v1/query/profile?user_id="+url.QueryEscape(string(user)), nil, p)
	}
	return p, s.db.view(ctx, func(t *tx) error {
		found, err := t.row(`SELECT displayname, avatar_url FROM users WHERE id = $1`, []any{user}, &p.DisplayName, &p.AvatarURL)
		if err == nil && !found {
			err = mxfed.ErrNotFound
		}
		return err
	})
}

// setProfile changes a local user's profile, and then the member events in all the user's rooms.
func (s *server) setProfile(ctx context.Context, user mxfed.UserID, p *profile) error {
	var rooms []mxfed.RoomID
	err := s.db.update(ctx, "", func(t *tx) (err error) {
		if err = t.exec(`UPDATE users SET displayname = $2, avatar_url = $3 WHERE id = $1`, user, p.DisplayName, p.AvatarURL); err == nil {
			rooms, err = list[mxfed.RoomID](t, `SELECT room FROM memberships WHERE user_id = $1 AND membership = 'join'`, user)
		}
		return err
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
	if alias.Server() == s.name {
		return s.host.ResolveAlias(ctx, alias)
	}
	return s.fed.Client().ResolveAlias(ctx, alias)
}

// setAlias gives a room an alias of this server: errRoomInUse if it is taken. The user must be in the room.
func (s *server) setAlias(ctx context.Context, user mxfed.UserID, alias mxfed.RoomAlias, id mxfed.RoomID) error {
	if !strings.HasPrefix(string(alias), "#") || alias.Server() != s.name || len(alias) > 255 {
		return &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "this is no alias of this server"}
	}
	return s.db.update(ctx, "", func(t *tx) error {
		if m, err := t.membership(user, id); err != nil || m == nil || m.Membership != "join" {
			return orForbidden(err, "you are not in the room")
		}
		added, err := t.changes(`INSERT INTO aliases VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`, alias, id, user)
		if err == nil && !added {
			err = &mxfed.Error{Code: errRoomInUse, Status: http.StatusConflict, Message: "there is such an alias"}
		}
		return err
	})
}

func orForbidden(err error, text string) error {
	if err == nil {
		err = &mxfed.Error{Code: mxfed.ErrForbidden, Message: text}
	}
	return err
}

// removeAlias takes back an alias that the user has made.
func (s *server) removeAlias(ctx context.Context, user mxfed.UserID, alias mxfed.RoomAlias) error {
	return s.db.update(ctx, "", func(t *tx) error {
		var creator mxfed.UserID
		found, err := t.row(`SELECT creator FROM aliases WHERE alias = $1`, []any{alias}, &creator)
		switch {
		case err != nil || !found:
			return orNotFound(err)
		case creator != user:
			return orForbidden(nil, "another user has made the alias")
		}
		return t.exec(`DELETE FROM aliases WHERE alias = $1`, alias)
	})
}
