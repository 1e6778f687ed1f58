package main

import (
	"net/http"

	"example.org/mxfed"
)

// This file is what users are called and what rooms are called: profiles and aliases.

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3profileuserid
func (c *clientAPI) getProfile(q *http.Request) (any, error) {
	return c.profileOf(q.Context(), mxfed.UserID(q.PathValue("user")))
}

func (c *clientAPI) getProfileField(q *http.Request) (any, error) {
	p, err := c.profileOf(q.Context(), mxfed.UserID(q.PathValue("user")))
	if err != nil {
		return nil, err
	}
	name := q.PathValue("field")
	field, err := p.field(name)
	if err != nil || *field == "" {
		return nil, &mxfed.Error{Code: mxfed.ErrNotFound, Message: "that is not set"}
	}
	return map[string]string{name: *field}, nil
}

// field is one of those that this server keeps.
func (p *profile) field(name string) (*string, error) {
	switch name {
	case "displayname":
		return &p.DisplayName, nil
	case "avatar_url":
		return &p.AvatarURL, nil
	}
	return nil, &mxfed.Error{Code: mxfed.ErrForbidden, Message: "only displayname and avatar_url are kept here"}
}

// https://spec.matrix.org/v1.19/client-server-api/#put_matrixclientv3profileuseridkeyname
func (c *clientAPI) putProfileField(q *request) (any, error) {
	if q.PathValue("user") != string(q.User) {
		return nil, &mxfed.Error{Code: mxfed.ErrForbidden, Message: "that is somebody else's profile"}
	}
	body := make(map[string]*string)
	if err := decode(q.Request, &body); err != nil {
		return nil, err
	}
	p, err := c.profileOf(q.Context(), q.User)
	if err != nil {
		return nil, err
	}
	field, err := p.field(q.PathValue("field"))
	if err != nil {
		return nil, err
	}
	*field = ""
	if value := body[q.PathValue("field")]; value != nil {
		*field = *value
	}
	return empty{}, c.setProfile(q.Context(), q.User, p)
}

func aliasOf(q *http.Request) mxfed.RoomAlias { return mxfed.RoomAlias(q.PathValue("alias")) }

// https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv3directoryroomroomalias
func (c *clientAPI) getAlias(q *http.Request) (any, error) {
	if aliasOf(q).Server() == "" {
		return nil, &mxfed.Error{Code: mxfed.ErrInvalidParam, Message: "that is no alias"}
	}
	found, err := c.resolveAlias(q.Context(), aliasOf(q))
	if err != nil {
		return nil, err
	}
	return map[string]any{"room_id": found.Room, "servers": found.Servers}, nil
}

func (c *clientAPI) putAlias(q *request) (any, error) {
	var body struct {
		Room mxfed.RoomID `json:"room_id"`
	}
	if err := decode(q.Request, &body); err != nil {
		return nil, err
	}
	return empty{}, c.setAlias(q.Context(), q.User, aliasOf(q.Request), body.Room)
}

func (c *clientAPI) deleteAlias(q *request) (any, error) {
	return empty{}, c.removeAlias(q.Context(), q.User, aliasOf(q.Request))
}
