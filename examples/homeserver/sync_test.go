package main

import (
	"context"
	"fmt"
	"net/url"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSync_Joined(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(answer{"preset": "public_chat", "name": "N"})
	first := alice.sync("").at("rooms", "join", room)
	require.Contains(t, types(answer(first.(map[string]any)).at("timeline", "events")), "m.room.name")
	require.Nil(t, alice.sync("").at("rooms", "join"), "nothing new")

	alice.say(room, "1", "one")
	joined := answer(alice.sync("").at("rooms", "join", room).(map[string]any))
	require.Equal(t, []string{"one"}, bodies(joined.at("timeline", "events")))
	require.Equal(t, "1", joined.at("timeline", "events", 0, "unsigned", "transaction_id"))
	require.Nil(t, joined.at("timeline", "events", 0, "room_id"))
	require.Empty(t, joined.at("state", "events"))
	require.Equal(t, false, joined.at("timeline", "limited"))

	require.Nil(t, bob.sync("").at("rooms", "join"))
	bob.must("POST", in3(room, "join"), nil)
	joined = answer(bob.sync("").at("rooms", "join", room).(map[string]any))
	events := joined.at("timeline", "events").([]any)
	require.Equal(t, []string{"one"}, bodies(events), "what was said before is shared")
	require.Equal(t, "@bob:a.example", events[len(events)-1].(map[string]any)["state_key"])

	alice.must("PUT", in3(room, "state/m.room.name"), answer{"name": "M"})
	named := find(t, bob.sync("").at("rooms", "join", room, "timeline", "events"), "m.room.name", "")
	require.Equal(t, map[string]any{"name": "N"}, named.at("unsigned", "prev_content"))
	require.Equal(t, "@alice:a.example", named.at("unsigned", "prev_sender"))
	require.NotNil(t, bob.sync("full_state=true").at("rooms", "join", room, "state", "events", 0))
	bob.fails(400, "M_INVALID_PARAM", "GET", "v3/sync?since=x", nil)
	bob.fails(400, "M_INVALID_PARAM", "GET", "v3/sync?filter=x", nil)
}

// TestSync_Limited leaves events out and has the state tell what they did.
func TestSync_Limited(t *testing.T) {
	alice, _ := oneServer(t)
	room := alice.create(answer{"name": "N", "room_version": "10"})
	filter := "filter=" + url.QueryEscape(`{"room":{"timeline":{"limit":2}}}`)
	first := answer(alice.sync(filter).at("rooms", "join", room).(map[string]any))
	require.Equal(t, true, first.at("timeline", "limited"))
	require.Len(t, first.at("timeline", "events"), 2)
	seen := append(types(first.at("state", "events")), types(first.at("timeline", "events"))...)
	require.ElementsMatch(t, []string{"m.room.create", "m.room.member", "m.room.power_levels", "m.room.join_rules",
		"m.room.history_visibility", "m.room.guest_access", "m.room.name"}, seen)

	alice.must("PUT", in3(room, "state/m.room.topic"), answer{"topic": "T"})
	alice.must("PUT", in3(room, "state/m.room.name"), answer{"name": "M"})
	for i := range 5 {
		alice.say(room, fmt.Sprint(i), fmt.Sprint(i))
	}
	second := answer(alice.sync(filter).at("rooms", "join", room).(map[string]any))
	require.Equal(t, []string{"3", "4"}, bodies(second.at("timeline", "events")))
	require.Equal(t, true, second.at("timeline", "limited"))
	require.ElementsMatch(t, []string{"m.room.topic", "m.room.name"}, types(second.at("state", "events")))
	require.Equal(t, "M", find(t, second.at("state", "events"), "m.room.name", "").at("content", "name"))

	before := alice.must("GET", in3(room, fmt.Sprintf("messages?dir=b&limit=4&from=%s", second.at("timeline", "prev_batch"))), nil)
	require.Equal(t, []string{"2", "1", "0"}, bodies(before["chunk"]))
	rest := alice.must("GET", in3(room, fmt.Sprintf("messages?dir=b&limit=100&from=%s", before["end"])), nil)
	require.Equal(t, "m.room.topic", types(rest["chunk"])[0])
	require.Equal(t, "m.room.create", types(rest["chunk"])[len(types(rest["chunk"]))-1])
	require.NotContains(t, rest, "end")
	alice.fails(400, "M_INVALID_PARAM", "GET", in3(room, "messages?dir=f"), nil)
	alice.fails(400, "M_INVALID_PARAM", "GET", in3(room, "messages?dir=b&from=x"), nil)
}

func TestSync_Invite(t *testing.T) {
	alice, bob := twoServers(t)
	bob.sync("")
	room := alice.create(answer{"name": "N", "invite": []string{"@bob:b.example"}})
	shown := bob.syncUntil("rooms", "invite", room, "invite_state", "events")
	require.Equal(t, "N", find(t, shown, "m.room.name", "").at("content", "name"))
	require.Equal(t, "invite", find(t, shown, "m.room.member", "@bob:b.example").at("content", "membership"))
	require.Nil(t, bob.sync("").at("rooms", "invite"), "once")

	bob.must("POST", in3(room, "leave"), nil)
	left := bob.syncUntil("rooms", "leave", room, "timeline", "events")
	require.Equal(t, "leave", find(t, left, "m.room.member", "@bob:b.example").at("content", "membership"))
	alice.sync("")
	require.Equal(t, "leave", alice.must("GET", in3(room, "state/m.room.member/@bob:b.example"), nil)["membership"])

	alice.must("POST", in3(room, "invite"), answer{"user_id": "@bob:b.example"})
	bob.syncUntil("rooms", "invite", room)
	alice.must("POST", in3(room, "kick"), answer{"user_id": "@bob:b.example"})
	left = bob.syncUntil("rooms", "leave", room, "timeline", "events")
	require.Equal(t, "@alice:a.example", find(t, left, "m.room.member", "@bob:b.example")["sender"], "the invite was taken back")
}

func TestSync_Knock(t *testing.T) {
	alice, bob := twoServers(t)
	room := alice.create(answer{"name": "N", "initial_state": []answer{{"type": "m.room.join_rules", "content": answer{"join_rule": "knock"}}}})
	require.Equal(t, room, bob.must("POST", "v3/knock/"+url.PathEscape(room)+"?via=a.example", answer{"reason": "please"})["room_id"])
	shown := bob.sync("").at("rooms", "knock", room, "knock_state", "events")
	require.Equal(t, "N", find(t, shown, "m.room.name", "").at("content", "name"))
	require.Equal(t, "knock", find(t, shown, "m.room.member", "@bob:b.example").at("content", "membership"))
	events := alice.sync("").at("rooms", "join", room, "timeline", "events")
	require.Equal(t, "please", find(t, events, "m.room.member", "@bob:b.example").at("content", "reason"))

	alice.must("POST", in3(room, "invite"), answer{"user_id": "@bob:b.example"})
	bob.syncUntil("rooms", "invite", room)
	bob.must("POST", in3(room, "join"), nil)
	bob.syncUntil("rooms", "join", room)
	bob.must("POST", in3(room, "leave"), nil)
	alice.syncUntilMember(room, "@bob:b.example", "leave")
	bob.must("POST", "v3/knock/"+url.PathEscape(room)+"?server_name=a.example", nil)
	bob.must("POST", in3(room, "leave"), nil)
	require.Equal(t, "leave", alice.must("GET", in3(room, "state/m.room.member/@bob:b.example"), nil)["membership"])
}

func TestSync_Left(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", in3(room, "join"), nil)
	bob.sync("")
	alice.say(room, "1", "before")
	bob.must("POST", in3(room, "leave"), answer{"reason": "bye"})
	alice.say(room, "2", "after")
	left := bob.sync("").at("rooms", "leave", room, "timeline", "events")
	require.Equal(t, []string{"before"}, bodies(left))
	require.Equal(t, "bye", find(t, left, "m.room.member", "@bob:a.example").at("content", "reason"))
	require.Equal(t, answer{"rooms": map[string]any{}, "next_batch": bob.since}, bob.sync(""))

	alice.say(room, "3", "later")
	alice.must("POST", in3(room, "ban"), answer{"user_id": "@bob:a.example"})
	alice.say(room, "4", "much later")
	require.NotContains(t, bodies(bob.must("GET", in3(room, "messages?dir=b&limit=100"), nil)["chunk"]), "much later")
	banned := bob.sync("").at("rooms", "leave", room, "timeline", "events")
	require.Len(t, banned, 1, "what was said in between is not for somebody who had left")

	bob.since = ""
	require.Nil(t, bob.sync("").at("rooms", "leave"))
	bob.since = ""
	all := bob.sync("filter="+url.QueryEscape(`{"room":{"include_leave":true}}`)).at("rooms", "leave", room)
	require.NotNil(t, all)
	bob.must("POST", in3(room, "forget"), nil)
	bob.since = ""
	require.Nil(t, bob.sync("filter="+url.QueryEscape(`{"room":{"include_leave":true}}`)).at("rooms", "leave"))
	alice.fails(400, "M_UNKNOWN", "POST", in3(room, "forget"), nil)
}

// TestSync_Visibility joins a room that hides what was before.
func TestSync_Visibility(t *testing.T) {
	for visibility, want := range map[string][]string{"shared": {"before", "after"}, "world_readable": {"before", "after"}, "invited": {"after"}, "joined": {"after"}} {
		t.Run(visibility, func(t *testing.T) {
			alice, bob := oneServer(t)
			room := alice.create(answer{"preset": "public_chat", "initial_state": []answer{{"type": "m.room.history_visibility",
				"content": answer{"history_visibility": visibility}}}})
			alice.say(room, "1", "before")
			bob.must("POST", in3(room, "join"), nil)
			alice.say(room, "2", "after")
			events := bob.sync("").at("rooms", "join", room, "timeline", "events")
			require.Equal(t, want, bodies(events))
			find(t, events, "m.room.member", "@bob:a.example")
			chunk := bob.must("GET", in3(room, "messages?dir=b&limit=100"), nil)["chunk"]
			require.ElementsMatch(t, want, bodies(chunk))
		})
	}
}

// TestSync_Wait waits for a message of another server, and for nothing until the server ends.
func TestSync_Wait(t *testing.T) {
	w := newWorld(t)
	alice := newPhone(t, w.api(w.start("a.example")), "alice")
	b := w.start("b.example")
	bob := newPhone(t, w.api(b), "bob")
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", "v3/join/"+url.PathEscape(room)+"?via=a.example", nil)
	bob.syncUntil("rooms", "join", room)
	var said sync.WaitGroup
	said.Go(func() {
		_, _, err := alice.request(t.Context(), "PUT", in3(room, "send/m.room.message/1"), answer{"body": "hi"})
		if err != nil {
			t.Error(err)
		}
	})
	require.Equal(t, []string{"hi"}, bodies(bob.syncUntil("rooms", "join", room, "timeline", "events")))
	said.Wait()

	stopping, stop := context.WithCancel(t.Context())
	api := &clientAPI{b, stopping}
	stop()
	in, err := b.session(t.Context(), bob.token)
	require.NoError(t, err)
	q, err := newGet(t.Context(), "/?timeout=60000&since="+bob.since)
	require.NoError(t, err)
	got, err := api.sync(&request{q, in})
	require.NoError(t, err)
	require.True(t, got.(*syncAnswer).Rooms.empty())
}

// TestSync_Everything has a user sync all the while others write, and then know each message once.
func TestSync_Everything(t *testing.T) {
	alice, bob := oneServer(t)
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", in3(room, "join"), nil)
	bob.sync("")
	const messages, writers = 25, 4
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range messages {
				text := fmt.Sprintf("%d-%d", w, i)
				if _, _, err := alice.request(t.Context(), "PUT", in3(room, "send/m.room.message/"+text), answer{"body": text}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	seen := make(map[string]int)
	for len(seen) < messages*writers {
		got := bob.sync("timeout=10000&filter=" + url.QueryEscape(`{"room":{"timeline":{"limit":1000}}}`))
		if events := got.at("rooms", "join", room, "timeline", "events"); events != nil {
			for _, text := range bodies(events) {
				seen[text]++
			}
		}
	}
	writing.Wait()
	for text, times := range seen {
		require.Equal(t, 1, times, text)
	}
}
