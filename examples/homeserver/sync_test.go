package main

import (
	"context"
	"fmt"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func testSync(alice, bob, _ *phone) {
	room := alice.create(answer{"preset": "public_chat", "name": "N"})
	require.Contains(alice, types(alice.sync("").at("rooms", "join", room, "timeline", "events")), "m.room.name")
	require.Equal(alice, answer{"rooms": map[string]any{}, "next_batch": alice.since}, alice.sync(""), "nothing new")

	alice.say(room, "1", "one")
	joined := answer(alice.sync("").at("rooms", "join", room).(map[string]any))
	require.Equal(alice, []string{"one"}, bodies(joined.at("timeline", "events")))
	require.Nil(alice, joined.at("timeline", "events", 0, "room_id"))
	require.Empty(alice, joined.at("state", "events"))
	require.Equal(alice, false, joined.at("timeline", "limited"))

	require.Nil(bob, bob.sync("").at("rooms", "join"))
	bob.must("POST", in3(room, "join"), nil)
	joined = answer(bob.sync("").at("rooms", "join", room).(map[string]any))
	events := joined.at("timeline", "events").([]any)
	require.Equal(bob, []string{"one"}, bodies(events), "what was said before is shared")
	require.EqualValues(bob, bob.user, events[len(events)-1].(map[string]any)["state_key"])

	alice.must("PUT", in3(room, "state/m.room.name"), answer{"name": "M"})
	named := find(bob, bob.sync("").at("rooms", "join", room, "timeline", "events"), "m.room.name", "")
	require.Equal(bob, map[string]any{"name": "N"}, named.at("unsigned", "prev_content"))
	require.EqualValues(bob, alice.user, named.at("unsigned", "prev_sender"))
	bob.fails(400, "M_INVALID_PARAM", "GET", "v3/sync?since=x", nil)
	bob.fails(400, "M_INVALID_PARAM", "GET", "v3/sync?filter=x", nil)
}

// testSyncLimited leaves events out and has the state tell what they did.
func testSyncLimited(alice, _, _ *phone) {
	room := alice.create(answer{"name": "N", "room_version": "10"})
	filter := "filter=" + url.QueryEscape(`{"room":{"timeline":{"limit":2}}}`)
	first := answer(alice.sync(filter).at("rooms", "join", room).(map[string]any))
	require.Equal(alice, true, first.at("timeline", "limited"))
	require.Len(alice, first.at("timeline", "events"), 2)
	seen := append(types(first.at("state", "events")), types(first.at("timeline", "events"))...)
	require.ElementsMatch(alice, []string{"m.room.create", "m.room.member", "m.room.power_levels", "m.room.join_rules",
		"m.room.history_visibility", "m.room.guest_access", "m.room.name"}, seen)

	alice.must("PUT", in3(room, "state/m.room.topic"), answer{"topic": "T"})
	alice.must("PUT", in3(room, "state/m.room.name"), answer{"name": "M"})
	for i := range 5 {
		alice.say(room, fmt.Sprint(i), fmt.Sprint(i))
	}
	second := answer(alice.sync(filter).at("rooms", "join", room).(map[string]any))
	require.Equal(alice, []string{"3", "4"}, bodies(second.at("timeline", "events")))
	require.Equal(alice, true, second.at("timeline", "limited"))
	require.ElementsMatch(alice, []string{"m.room.topic", "m.room.name"}, types(second.at("state", "events")))
	require.Equal(alice, "M", find(alice, second.at("state", "events"), "m.room.name", "").at("content", "name"))
}

func testSyncInvite(alice, _, carol *phone) {
	carol.sync("")
	room := alice.create(answer{"name": "N", "invite": []any{carol.user}})
	shown := carol.syncUntil("rooms", "invite", room, "invite_state", "events")
	require.Equal(carol, "N", find(carol, shown, "m.room.name", "").at("content", "name"))
	require.Equal(carol, "invite", find(carol, shown, "m.room.member", string(carol.user)).at("content", "membership"))
	require.Nil(carol, carol.sync("").at("rooms", "invite"), "once")

	carol.must("POST", in3(room, "leave"), nil)
	left := carol.syncUntil("rooms", "leave", room, "timeline", "events")
	require.Equal(carol, "leave", find(carol, left, "m.room.member", string(carol.user)).at("content", "membership"))
	require.Equal(carol, "leave", alice.must("GET", in3(room, "state/m.room.member/"+string(carol.user)), nil)["membership"])

	alice.must("POST", in3(room, "invite"), answer{"user_id": carol.user})
	carol.syncUntil("rooms", "invite", room)
	alice.must("POST", in3(room, "kick"), answer{"user_id": carol.user})
	left = carol.syncUntil("rooms", "leave", room, "timeline", "events")
	require.EqualValues(carol, alice.user, find(carol, left, "m.room.member", string(carol.user))["sender"], "the invite was taken back")
}

func testSyncKnock(alice, _, carol *phone) {
	room := alice.create(answer{"name": "N", "initial_state": []answer{{"type": "m.room.join_rules", "content": answer{"join_rule": "knock"}}}})
	require.Equal(carol, room, carol.must("POST", "v3/knock/"+url.PathEscape(room)+"?via=a.example", answer{"reason": "please"})["room_id"])
	shown := carol.sync("").at("rooms", "knock", room, "knock_state", "events")
	require.Equal(carol, "N", find(carol, shown, "m.room.name", "").at("content", "name"))
	require.Equal(carol, "knock", find(carol, shown, "m.room.member", string(carol.user)).at("content", "membership"))
	events := alice.sync("").at("rooms", "join", room, "timeline", "events")
	require.Equal(alice, "please", find(alice, events, "m.room.member", string(carol.user)).at("content", "reason"))

	alice.must("POST", in3(room, "invite"), answer{"user_id": carol.user})
	carol.syncUntil("rooms", "invite", room)
	carol.must("POST", in3(room, "join"), nil)
	carol.syncUntil("rooms", "join", room)
	carol.must("POST", in3(room, "leave"), nil)
	alice.syncUntilMember(room, string(carol.user), "leave")
	carol.must("POST", "v3/knock/"+url.PathEscape(room)+"?server_name=a.example", nil)
	carol.must("POST", in3(room, "leave"), nil)
	require.Equal(carol, "leave", alice.must("GET", in3(room, "state/m.room.member/"+string(carol.user)), nil)["membership"])
}

func testSyncLeft(alice, bob, _ *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", in3(room, "join"), nil)
	bob.sync("")
	alice.say(room, "1", "before")
	bob.must("POST", in3(room, "leave"), answer{"reason": "bye"})
	alice.say(room, "2", "after")
	left := bob.sync("").at("rooms", "leave", room, "timeline", "events")
	require.Equal(bob, []string{"before"}, bodies(left))
	require.Equal(bob, "bye", find(bob, left, "m.room.member", string(bob.user)).at("content", "reason"))
	require.Nil(bob, bob.sync("").at("rooms", "leave"))

	alice.say(room, "3", "later")
	alice.must("POST", in3(room, "ban"), answer{"user_id": bob.user})
	alice.say(room, "4", "much later")
	banned := bob.sync("").at("rooms", "leave", room, "timeline", "events")
	require.Equal(bob, []string{"m.room.member"}, types(banned), "what was said in between is not for somebody who had left")

	bob.since = ""
	require.Nil(bob, bob.sync("").at("rooms", "leave"))
	bob.since = ""
	require.NotNil(bob, bob.sync("filter="+url.QueryEscape(`{"room":{"include_leave":true}}`)).at("rooms", "leave", room))
}

// testSyncRejoined has the only user of a server leave a room, and come back to what has happened meanwhile.
func testSyncRejoined(alice, _, carol *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	join := "v3/join/" + url.PathEscape(room) + "?via=a.example"
	carol.must("POST", join, nil)
	carol.say(room, "1", "before")
	require.Equal(carol, true, carol.sync("").at("rooms", "join", room, "timeline", "limited"), "what was before is not here")
	for range 2 {
		carol.must("POST", in3(room, "leave"), nil)
		alice.syncUntilMember(room, string(carol.user), "leave")
		alice.say(room, carol.since, "missed")
		alice.must("PUT", in3(room, "state/m.room.topic"), answer{"topic": carol.since})
		topic := carol.since
		carol.must("POST", join, nil)
		carol.say(room, carol.since, "back")

		again := answer(carol.sync("").at("rooms", "join", room).(map[string]any))
		require.Equal(carol, true, again.at("timeline", "limited"))
		require.Equal(carol, []string{"back"}, bodies(again.at("timeline", "events")))
		require.Equal(carol, topic, find(carol, again.at("state", "events"), "m.room.topic", "").at("content", "topic"))
		find(carol, again.at("state", "events"), "m.room.create", "")
		find(carol, again.at("timeline", "events"), "m.room.member", string(carol.user))
	}
	carol.say(room, "2", "on")
	require.Equal(carol, false, carol.sync("").at("rooms", "join", room, "timeline", "limited"))
}

// testSyncVisibility joins rooms that hide what was before, or do not.
func testSyncVisibility(alice, bob, _ *phone) {
	for visibility, want := range map[string][]string{"shared": {"before", "after"}, "world_readable": {"before", "after"}, "invited": {"after"}, "joined": {"after"}} {
		room := alice.create(answer{"preset": "public_chat", "initial_state": []answer{{"type": "m.room.history_visibility",
			"content": answer{"history_visibility": visibility}}}})
		alice.say(room, "1", "before")
		bob.must("POST", in3(room, "join"), nil)
		alice.say(room, "2", "after")
		events := bob.sync("").at("rooms", "join", room, "timeline", "events")
		require.Equal(bob, want, bodies(events), visibility)
		find(bob, events, "m.room.member", string(bob.user))
	}
}

// testSyncEverything has a user sync all the while others write, and then know each message once.
func testSyncEverything(alice, bob, _ *phone) {
	room := alice.create(answer{"preset": "public_chat"})
	bob.must("POST", in3(room, "join"), nil)
	bob.sync("")
	const messages, writers = 25, 4
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range messages {
				text := fmt.Sprintf("%d-%d", w, i)
				if _, _, err := alice.request(alice.Context(), "PUT", in3(room, "send/m.room.message/"+text), answer{"body": text}); err != nil {
					alice.Error(err)
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
		require.Equal(bob, 1, times, text)
	}
}

// TestSync_Wait waits for a message of another server, and for nothing until the server ends.
func TestSync_Wait(t *testing.T) {
	onEach(t, func(w *world) {
		alice, b := newPhone(w.T, w.api(w.start("a.example")), "alice"), w.start("b.example")
		bob := newPhone(w.T, w.api(b), "bob")
		room := alice.create(answer{"preset": "public_chat"})
		bob.must("POST", "v3/join/"+url.PathEscape(room)+"?via=a.example", nil)
		bob.syncUntil("rooms", "join", room)
		var said sync.WaitGroup
		said.Go(func() {
			_, _, err := alice.request(w.Context(), "PUT", in3(room, "send/m.room.message/1"), answer{"body": "hi"})
			if err != nil {
				w.Error(err)
			}
		})
		var heard []string
		for len(heard) == 0 { // members of the room may be shown before
			heard = bodies(bob.syncUntil("rooms", "join", room, "timeline", "events"))
		}
		require.Equal(w, []string{"hi"}, heard)
		said.Wait()

		stopping, stop := context.WithCancel(w.Context())
		stop()
		ended := httptest.NewServer(newClientAPI(stopping, b))
		defer ended.Close()
		dora := newPhone(w.T, ended.URL+"/_matrix/client/", "dora")
		dora.sync("")
		require.Equal(w, answer{"rooms": map[string]any{}, "next_batch": dora.since}, dora.sync("timeout=60000"))
	})
}

// TestSync_Members shows members of whom the server has learnt after the user joined.
func TestSync_Members(t *testing.T) {
	onEach(t, func(w *world) {
		base := w.api(w.start("a.example"))
		alice, anna := newPhone(w.T, base, "alice"), newPhone(w.T, base, "anna")
		room := alice.create(answer{"preset": "public_chat", "name": "N"})
		anna.must("POST", in3(room, "join"), nil)
		b, err := openServer(w.Context(), settings{Name: "b.example", Database: w.database("b.example"), HTTP: w.Transport, Log: testLog()})
		require.NoError(w, err)
		w.Cleanup(func() { b.close() })
		require.NoError(w, w.Serve("b.example", b.federation()))
		bob := newPhone(w.T, w.api(b), "bob")
		bob.must("POST", "v3/join/"+url.PathEscape(room)+"?via=a.example", nil)
		require.NotContains(w, keys(bob.sync("").at("rooms", "join", room, "state", "events")), string(anna.user))
		require.Nil(w, bob.sync("").at("rooms", "join"))

		ctx, stop := context.WithCancel(w.Context())
		var running sync.WaitGroup
		running.Go(func() { b.run(ctx) })
		w.Cleanup(running.Wait)
		w.Cleanup(stop)
		news := answer(bob.syncUntil("rooms", "join", room).(map[string]any))
		require.Contains(w, keys(news.at("state", "events")), string(anna.user))
		require.Equal(w, false, news.at("timeline", "limited"))
	})
}

// keys lists the state keys of events.
func keys(events any) (list []string) {
	for _, e := range events.([]any) {
		list = append(list, fmt.Sprint(e.(map[string]any)["state_key"]))
	}
	return list
}
