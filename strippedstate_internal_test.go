package mxfed

import (
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// previewEvent is a state event of !r:x, not signed.
func previewEvent(t *testing.T, v RoomVersion, typ, key string, content value) *Event {
	d := newMemberDraft("!r:x", "@a:x", "join")
	d.typ, d.stateKey, d.content, d.prev, d.auth, d.ts = typ, &key, content, "[]", "[]", 1
	e, err := d.build(v.rules())
	require.NoError(t, err)
	return e
}

// A preview keeps what it can use and remembers the first thing that was wrong.
func TestReadPreview(t *testing.T) {
	rules := RoomVersion("10").rules()
	create := previewEvent(t, "10", typeCreate, "", `{"creator":"@a:x","room_version":"10"}`)
	name := previewEvent(t, "10", "m.room.name", "", `{"name":"n"}`)
	p := readPreview(rules, "!r:x", array(create.text, name.text))
	require.NoError(t, p.err)
	require.Len(t, p.entries, 2)
	require.Equal(t, []string{string(create.id), string(name.id)}, []string{string(p.events()[0].id), string(p.events()[1].id)})

	p.settle([]verdict{{event: create}, {err: refuse(ErrInvalidParam, "bad signature")}})
	require.ErrorContains(t, p.err, "m.room.name")
	require.Equal(t, create, p.create)
	require.Len(t, p.entries, 1)

	p = readPreview(rules, "!r:x", array(create.text, name.text))
	unreachable := &Error{Code: ErrUnknown, Status: http.StatusBadGateway, Err: errors.New("no answer")}
	p.settle([]verdict{{event: create}, {err: unreachable}})
	require.NoError(t, p.err, "nothing is known against the entry")
	require.Len(t, p.entries, 1)
	p = readPreview(rules, "!r:x", array(create.text, name.text))
	p.settle([]verdict{{err: unreachable}, {event: name}})
	require.ErrorContains(t, p.err, "create event is missing")
	require.Nil(t, p.create)

	cut, err := name.redact()
	require.NoError(t, err)
	p = readPreview(rules, "!r:x", array(create.text, name.text))
	p.settle([]verdict{{event: create}, {event: cut}})
	require.Equal(t, "{}", string(p.entries[1].Content), "what the room goes on with is what is shown")

	p = readPreview(rules, "!other:x", array(create.text, `{"type":"m.room.name"}`))
	require.ErrorContains(t, p.err, "entry 1 belongs to another room")
	require.ErrorIs(t, p.err, ErrInvalidParam)
	require.Empty(t, p.entries)
}

// No more entries are looked at than a client could want.
func TestReadPreview_Limit(t *testing.T) {
	list := make([]value, 10000)
	for i := range list {
		list[i] = value(fmt.Sprintf(`{"type":"t%d","state_key":"","sender":"@a:x","content":{}}`, i))
	}
	p := readPreview(RoomVersion("10").rules(), "!r:x", array(list...))
	require.Len(t, p.entries, maxPreview)
	p = readPreview(RoomVersion("10").rules(), "!r:x", array(list[:maxPreview]...))
	require.Len(t, p.entries, maxPreview)
	require.NotContains(t, p.err.Error(), "more than")
}

// A create event that names no version is of version 1.
func TestCreatedVersion(t *testing.T) {
	for content, want := range map[value]RoomVersion{
		`{"creator":"@a:x"}`:                        "1",
		`{"creator":"@a:x","room_version":"9"}`:     "9",
		`{"creator":"@a:x","room_version":9}`:       "",
		`{"creator":"@a:x","room_version":null}`:    "",
		`{"creator":"@a:x","Room_version":"9"}`:     "1",
		`{"creator":"@a:x","room_version":"org.x"}`: "org.x",
		`{"creator":"@a:x","room_version":["9"]}`:   "",
	} {
		require.Equal(t, want, createdVersion(previewEvent(t, "10", typeCreate, "", content)), "%s", content)
	}
}

// Version 1 of the invite endpoint takes the room version from the preview, if it is one of the two that it can be.
func TestVersionOfPreview(t *testing.T) {
	for state, want := range map[value]RoomVersion{
		"": "1", "null": "1", "{}": "1", "[]": "1", `[null,1,"2"]`: "1",
		`[{"content":{"room_version":"2"},"type":"m.room.create"}]`:              "2",
		`[{"type":"x"},{"content":{"room_version":"2"},"type":"m.room.create"}]`: "2",
		`[{"content":{"room_version":"2"},"type":"m.room.name"}]`:                "1",
		`[{"content":{"room_version":"1"},"type":"m.room.create"}]`:              "1",
		`[{"content":{"room_version":"10"},"type":"m.room.create"}]`:             "1",
		`[{"content":{"room_version":2},"type":"m.room.create"}]`:                "1",
	} {
		require.Equal(t, want, versionOfPreview(state), "%s", state)
	}
}
