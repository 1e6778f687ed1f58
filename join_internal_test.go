package mxfed

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The honest answer is taken as it is, in every room version and under every join rule that fits.
func TestJoin_Honest(t *testing.T) {
	for _, v := range joinVersions {
		for _, rule := range []string{"public", "invite", "restricted"} {
			if rule == "restricted" && !v.rules().restricted {
				continue
			}
			n := &joinNet{room: newJoinRoom(t, v, rule)}
			result, err := n.join(t, nil)
			require.NoError(t, err, "%s %s", v, rule)
			require.Equal(t, []string{"v1 make_join r.example", "v2 send_join r.example"}, n.asked)
			honest := n.room.answer(n.bodies[1])
			require.Equal(t, array(honest.state...), texts(result.State))
			require.Equal(t, array(honest.auth...), texts(result.Auth), "in order of arrival")
			require.Equal(t, honest.rest["event"], result.Event.text, "with both signatures")
			require.Equal(t, n.room.entry(typeCreate, "").text, result.Create.text)
			require.Equal(t, joinVia, result.Via)
			require.Equal(t, v, result.Event.Version())
			require.Empty(t, result.Dropped)
			require.Nil(t, result.Servers)
		}
	}
}

// joinEcho are things that an answer may hold where the accepted event is expected. plain: the join is taken nevertheless,
// if nobody had to authorise it; signed: also the resident's signature.
var joinEchoes = map[string]struct {
	change        func(r *joinRoom, e value) value
	plain, signed bool
}{
	"honest":                {func(_ *joinRoom, e value) value { return e }, true, true},
	"unsigned added":        {func(_ *joinRoom, e value) value { return e.with("unsigned", `{"age":1}`) }, true, true},
	"age_ts added":          {func(_ *joinRoom, e value) value { return e.with("age_ts", "1") }, true, true},
	"junk under their name": {joinEchoSigned(joinVia, "ed25519:x", `"AAAA"`), true, true},
	"junk of a third":       {joinEchoSigned("third.example", "ed25519:1", `"AAAA"`), true, true},
	"another key of ours":   {joinEchoSigned("us.example", "ed25519:0", `"AAAA"`), true, true},
	"their signature gone": {func(_ *joinRoom, e value) value {
		return e.with("signatures", e.get("signatures").with(string(joinVia), ""))
	}, true, false},
	"their signature wrong":    {joinEchoSigned(joinVia, "ed25519:1", `"AAAA"`), true, false},
	"their signature a number": {joinEchoSigned(joinVia, "ed25519:1", `5`), true, false},
	"their signature padded": {func(_ *joinRoom, e value) value {
		sig, _ := e.get("signatures").get(string(joinVia)).get("ed25519:1").str()
		sig = strings.NewReplacer("+", "-", "/", "_").Replace(sig) + strings.Repeat("=", 1000)
		return joinEchoSigned(joinVia, "ed25519:1", quoted(sig))(nil, e)
	}, true, true},
	"their signature renamed":   {joinEchoRenamed, true, false},
	"our signature gone":        {joinEchoSigned("us.example", "ed25519:1", ""), false, false},
	"our signature wrong":       {joinEchoSigned("us.example", "ed25519:1", `"AAAA"`), false, false},
	"signatures a list":         {func(_ *joinRoom, e value) value { return e.with("signatures", "[]") }, false, false},
	"a number":                  {func(*joinRoom, value) value { return "7" }, false, false},
	"a string":                  {func(*joinRoom, value) value { return `"x"` }, false, false},
	"an empty object":           {func(*joinRoom, value) value { return "{}" }, false, false},
	"another event of the room": {func(r *joinRoom, _ value) value { return r.entry("m.room.topic", "").text }, false, false},
	"a join of another user":    {func(r *joinRoom, _ value) value { return r.entry(typeMember, string(joinCarol)).text }, false, false},
	"name added, same ID": {func(_ *joinRoom, e value) value {
		return e.with("content", e.get("content").with("displayname", `"Mallory"`))
	}, false, false},
	"a member added, same ID": {func(_ *joinRoom, e value) value { return e.with("org.example.x", "1") }, false, false},
	"hash of the content":     {func(_ *joinRoom, e value) value { return e.with("hashes", `{"sha256":"AAAA"}`) }, false, false},
	"later":                   {func(_ *joinRoom, e value) value { return e.with("origin_server_ts", "1") }, false, false},
	"deeper":                  {func(_ *joinRoom, e value) value { return e.with("depth", "99") }, false, false},
}

func joinEchoSigned(server ServerName, id string, sig value) func(*joinRoom, value) value {
	return func(_ *joinRoom, e value) value {
		all := e.get("signatures")
		return e.with("signatures", all.with(string(server), all.get(string(server)).with(id, sig)))
	}
}

func joinEchoRenamed(_ *joinRoom, e value) value {
	sig := e.get("signatures").get(string(joinVia)).get("ed25519:1")
	return e.with("signatures", e.get("signatures").with(string(joinVia), object(field{"ed25519:2", sig})))
}

// What the other server sends back adds its signature to our event and nothing else. A restricted join is void without it.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
func TestJoinReply_Substituted(t *testing.T) {
	for _, v := range []RoomVersion{"1", "3", "8", "10", "12"} {
		for _, rule := range []string{"public", "restricted"} {
			if rule == "restricted" && !v.rules().restricted {
				continue
			}
			for name, echo := range joinEchoes {
				n := &joinNet{room: newJoinRoom(t, v, rule)}
				n.answer = func(a *joinAnswer) { a.rest["event"] = echo.change(n.room, a.rest["event"]) }
				result, err := n.join(t, nil)
				if want := echo.plain && (rule == "public" || echo.signed); !want {
					require.Error(t, err, "%s %s: %s", v, rule, name)
					continue
				}
				require.NoError(t, err, "%s %s: %s", v, rule, name)
				want := n.bodies[1]
				if echo.signed {
					want = n.room.answer(want).rest["event"]
				}
				require.Equal(t, want, result.Event.text, "%s %s: %s", v, rule, name)
			}
		}
	}
}

func TestJoinReply_Missing(t *testing.T) {
	for _, rule := range []string{"public", "restricted"} {
		n := &joinNet{room: newJoinRoom(t, "10", rule), answer: func(a *joinAnswer) { a.rest["event"] = "" }}
		result, err := n.join(t, nil)
		if rule == "restricted" {
			require.ErrorContains(t, err, "event is missing")
			continue
		}
		require.NoError(t, err)
		require.Equal(t, n.bodies[1], result.Event.text)
	}
}

// A server that names no room version means "1" or "2"; the create event tells which.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1make_joinroomiduserid
func TestJoin_VersionNotNamed(t *testing.T) {
	unnamed := func(answer value) value { return answer.with("room_version", "") }
	for _, v := range joinVersions {
		n := &joinNet{room: newJoinRoom(t, v, "public"), template: unnamed}
		var versions []RoomVersion
		result, err := n.join(t, func(r *JoinRequest) {
			r.Sink = func(e *Event, _ bool) error { versions = append(versions, e.Version()); return nil }
		})
		if v.rules().eventID != idGiven {
			require.Error(t, err, v)
			require.Len(t, n.asked, 1, "nothing is signed")
			continue
		}
		require.NoError(t, err, v)
		require.Equal(t, v, result.Event.Version())
		require.Equal(t, v, result.Create.Version())
		require.NotEmpty(t, versions)
		for _, got := range versions {
			require.Equal(t, v, got)
		}
	}
	for name, version := range map[string]string{"unknown": `"x"`, "of another format": `"3"`, "no string": `2`, "empty": `""`} {
		n := &joinNet{room: newJoinRoom(t, "1", "public"), template: unnamed}
		create := n.room.entry(typeCreate, "")
		d := n.room.draft(joinAlice, typeCreate, "", `{"creator":"@alice:r.example","room_version":`+version+`}`)
		d.prev, d.auth, d.depth = "[]", "[]", 1
		n.answer = func(a *joinAnswer) { joinReplace(a, create.text, n.room.sign(d).text) }
		_, err := n.join(t, nil)
		require.Error(t, err, name)
	}
	n := &joinNet{room: newJoinRoom(t, "2", "public"), template: unnamed}
	c, _ := n.server(t, func(cfg *Config) { cfg.Versions = []RoomVersion{"1", "10"} })
	_, err := n.joinWith(c, nil)
	require.ErrorIs(t, err, ErrIncompatibleRoomVersion, "a version that was not offered")
}

// joinLacking makes the resident leave out the event that let Bob in: with members omitted, some servers leave out what the
// join itself names.
func joinLacking(r *joinRoom) func(a *joinAnswer) {
	return func(a *joinAnswer) {
		a.state = slices.DeleteFunc(a.state, func(e value) bool { return e.get("type") == quoted(typeMember) })
		a.rest["members_omitted"], a.rest["servers_in_room"] = "true", `["r.example","third.example"]`
	}
}

// What an answer lacks of the join's own auth events is fetched, checked like the rest and handed on like the rest.
// https://spec.matrix.org/v1.19/server-server-api/#get_matrixfederationv1eventeventid
func TestJoin_Completion(t *testing.T) {
	for _, v := range []RoomVersion{"1", "3", "10", "12"} {
		n := &joinNet{room: newJoinRoom(t, v, "invite")}
		alice, invite := n.room.entry(typeMember, string(joinAlice)), n.room.entry(typeMember, string(joinUser))
		n.answer = joinLacking(n.room)
		omit := func(r *JoinRequest) { r.OmitMembers = true }
		result, err := n.join(t, omit)
		require.NoError(t, err, v)
		require.Equal(t, []string{"v1 make_join r.example", "v2 send_join r.example", "v1 event r.example"}, n.asked)
		require.Contains(t, joinIDs(result.Auth), invite.id)
		require.Contains(t, joinIDs(result.Auth), alice.id)
		require.NotContains(t, joinIDs(result.State), invite.id)
		require.Equal(t, []ServerName{"r.example", "third.example"}, result.Servers)
		var sunk []EventID
		_, err = n.join(t, func(r *JoinRequest) {
			r.OmitMembers = true
			r.Sink = func(e *Event, state bool) error {
				if !state {
					sunk = append(sunk, e.ID())
				}
				return nil
			}
		})
		require.NoError(t, err)
		require.Equal(t, joinIDs(result.Auth), sunk)
		_, err = n.join(t, func(r *JoinRequest) {
			r.OmitMembers = true
			r.Sink = func(e *Event, _ bool) error {
				if e.ID() == invite.id {
					return errJoinSink
				}
				return nil
			}
		})
		require.ErrorIs(t, err, errJoinSink)
	}
}

var errJoinSink = errors.New("disk is full")

// Where fetching fails, the whole answer is asked for, once, unless events of this answer are with the host already.
func TestJoin_CompletionFails(t *testing.T) {
	room := newJoinRoom(t, "10", "invite")
	invite := room.entry(typeMember, string(joinUser))
	forged := room.draft(joinAlice, typeMember, string(joinUser), `{"membership":"invite","displayname":"Bob"}`)
	answers := map[string]string{
		"not found":     "",
		"no list":       `{}`,
		"empty":         `{"pdus":[]}`,
		"no event":      `{"pdus":[1]}`,
		"another event": `{"pdus":[` + string(room.sign(forged).text) + `]}`,
		"another room":  `{"pdus":[` + string(newJoinRoom(t, "10", "public").entry(typeCreate, "").text.with("room_id", `"!x:r.example"`)) + `]}`,
		"no signature":  `{"pdus":[` + string(invite.text.with("signatures", `{}`)) + `]}`,
		"a wrong one":   `{"pdus":[` + string(joinEchoSigned(joinVia, "ed25519:1", `"AAAA"`)(nil, invite.text)) + `]}`,
		"no JSON":       `x`,
	}
	for name, body := range answers {
		for _, sink := range []bool{false, true} {
			n := &joinNet{room: room}
			full := false
			n.answer = func(a *joinAnswer) {
				if full = !strings.HasSuffix(n.asked[len(n.asked)-1], "omit"); !full {
					joinLacking(room)(a)
				}
			}
			n.serve = func(q *http.Request, endpoint string) *http.Response {
				switch {
				case endpoint == "send_join" && q.URL.Query().Get("omit_members") == "true":
					n.asked[len(n.asked)-1] += " omit"
				case endpoint == "event" && body != "":
					return joinReply(200, body)
				case endpoint == "event":
					return joinReply(404, `{}`)
				}
				return nil
			}
			result, err := n.join(t, func(r *JoinRequest) {
				r.OmitMembers = true
				if sink {
					r.Sink = func(*Event, bool) error { return nil }
				}
			})
			if sink {
				require.ErrorContains(t, err, "auth events of the join are missing", name)
				require.False(t, full, name)
				continue
			}
			require.NoError(t, err, name)
			require.True(t, full, name)
			require.Nil(t, result.Servers)
			require.Len(t, result.State, len(room.state))
		}
	}
}

// A chain of events that name one another is not followed for ever.
func TestJoin_CompletionIsBounded(t *testing.T) {
	n := &joinNet{room: newJoinRoom(t, "10", "public")}
	chain := []*Event{n.room.entry(typeMember, string(joinAlice))}
	for i := range maxCompletions + 1 {
		d := n.room.draft(joinAlice, typeMember, string(joinUser), `{"membership":"invite"}`)
		d.auth, d.ts = references(chain[i:]), int64(i)
		chain = append(chain, n.room.sign(d))
	}
	n.template = func(answer value) value {
		return answer.with("event", answer.get("event").with("auth_events", references(chain[maxCompletions+1:])))
	}
	n.serve = func(q *http.Request, endpoint string) *http.Response {
		for _, e := range chain {
			if endpoint == "event" && strings.HasSuffix(q.URL.Path, string(e.id)) {
				return joinReply(200, `{"pdus":[`+string(e.text)+`]}`)
			}
		}
		return nil
	}
	_, err := n.join(t, nil)
	require.ErrorContains(t, err, "too many")
	require.Len(t, n.asked, 2+maxCompletions)
}

// forEachOlder tests answers of version 2 of an endpoint; retried tells whether version 1 is to be asked then.
func forEachOlder(test func(status int, body string, noV1, retried bool)) {
	bodies := map[string]bool{ // whether a body says nothing of a room
		``: true, `404 page not found`: true, `{}`: true, `[]`: true, `{"errcode":""}`: true, `{"errcode":5}`: true,
		`{"errcode":"M_UNRECOGNIZED","error":"x"}`: true, `{"errcode":"M_NOT_FOUND","error":"x"}`: false,
		`{"errcode":"M_UNKNOWN"}`: false, `{"errcode":"M_FORBIDDEN"}`: false, `{"errcode":"M_INVALID_PARAM"}`: false,
		`{"errcode":"M_BAD_JSON"}`: false, `{"errcode":"ORG_EXAMPLE"}`: false,
	}
	for _, status := range []int{201, 204, 302, 400, 401, 403, 404, 405, 410, 413, 429, 500, 501, 502} {
		for body, says := range bodies {
			want := says && (status == 400 || status == 404 || status == 405)
			test(status, body, false, want)
			test(status, body, true, false)
		}
	}
}

// The older version of the endpoint is asked when the newer one is missing, and only then; never with NoV1.
func TestJoin_OlderVersion(t *testing.T) {
	forEachOlder(func(status int, body string, noV1, retried bool) {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		n.serve = func(q *http.Request, endpoint string) *http.Response {
			if strings.HasPrefix(q.URL.Path, "/_matrix/federation/v2/send_join/") {
				return joinReply(status, body)
			}
			return nil
		}
		c, _ := n.server(t, func(cfg *Config) { cfg.NoV1 = noV1 })
		result, err := n.joinWith(c, nil)
		if !retried {
			require.Error(t, err, "%d %s", status, body)
			require.Len(t, n.asked, 2, "%d %s", status, body)
			return
		}
		require.NoError(t, err, "%d %s", status, body)
		require.Equal(t, []string{"v1 make_join r.example", "v2 send_join r.example", "v1 send_join r.example"}, n.asked)
		require.Equal(t, n.bodies[1], n.bodies[2])
		require.Len(t, result.State, len(n.room.state))
	})
}

// What has no place in the list of servers is passed over, and a server is asked once.
func TestJoin_Via(t *testing.T) {
	n := &joinNet{room: newJoinRoom(t, "10", "public")}
	_, err := n.join(t, func(r *JoinRequest) {
		r.Via = []ServerName{"", "no name", "us.example", "x.example/", joinVia, joinVia, "later.example"}
	})
	require.NoError(t, err)
	require.Equal(t, []string{"v1 make_join r.example", "v2 send_join r.example"}, n.asked)
	for name, via := range map[string][]ServerName{"none": nil, "us": {"us.example"}} {
		_, err := n.join(t, func(r *JoinRequest) { r.Via = via })
		require.ErrorIs(t, err, ErrNotFound, name)
		require.Equal(t, 404, ClientError(err).Status)
	}
	_, err = n.join(t, func(r *JoinRequest) { r.Via = []ServerName{"no name"} })
	require.ErrorIs(t, err, ErrInvalidParam)
	require.Len(t, n.asked, 2)
}

// What a host asks for in vain reaches no other server.
func TestJoin_RefusedHere(t *testing.T) {
	for name, change := range map[string]func(*JoinRequest){
		"user of another server": func(r *JoinRequest) { r.User = joinCarol },
		"no user":                func(r *JoinRequest) { r.User = "bob:us.example" },
		"content no object":      func(r *JoinRequest) { r.Content = []byte(`[]`) },
		"content no JSON":        func(r *JoinRequest) { r.Content = []byte(`{`) },
		"content with floats":    func(r *JoinRequest) { r.Content = []byte(`{"x":0.5}`) },
	} {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		_, err := n.join(t, change)
		require.Error(t, err, name)
		require.Empty(t, n.asked, name)
	}
}

// Whether a server left members out, and who else can be asked for them, must be clear.
// https://spec.matrix.org/v1.19/server-server-api/#put_matrixfederationv2send_joinroomideventid
func TestJoin_MembersOmitted(t *testing.T) {
	two := []ServerName{"r.example", "third.example:8448"}
	for name, c := range map[string]struct {
		omitted, servers value
		asked            bool
		want             []ServerName
		err              string
	}{
		"not asked, none left out":        {"", "", false, nil, ""},
		"not asked, servers all the same": {"false", `["r.example"]`, false, nil, ""},
		"not asked, left out":             {"true", `["r.example"]`, false, nil, "without being asked"},
		"asked, none left out":            {"", "", true, nil, ""},
		"asked, said so":                  {"false", "", true, nil, ""},
		"asked, null":                     {"null", "null", true, nil, ""},
		"asked, servers all the same":     {"", `["r.example"]`, true, nil, ""},
		"asked, left out":                 {"true", `["r.example","third.example:8448"]`, true, two, ""},
		"some names are none":             {"true", `["r.example","no_name","","third.example:8448","x:y"]`, true, two, ""},
		"no servers":                      {"true", "", true, nil, "servers_in_room"},
		"empty":                           {"true", "[]", true, nil, "servers_in_room"},
		"null":                            {"true", "null", true, nil, "servers_in_room"},
		"an object":                       {"true", `{"r.example":true}`, true, nil, "servers_in_room"},
		"a string":                        {"true", `"r.example"`, true, nil, "servers_in_room"},
		"numbers":                         {"true", `["r.example",1]`, true, nil, "servers_in_room"},
		"no names":                        {"true", `["no_name"]`, true, nil, "servers_in_room"},
		"left out: a string":              {`"true"`, `["r.example"]`, true, nil, "members_omitted"},
		"left out: a number":              {"1", `["r.example"]`, true, nil, "members_omitted"},
	} {
		n := &joinNet{room: newJoinRoom(t, "10", "public")}
		n.answer = func(a *joinAnswer) { a.rest["members_omitted"], a.rest["servers_in_room"] = c.omitted, c.servers }
		result, err := n.join(t, func(r *JoinRequest) { r.OmitMembers = c.asked })
		if c.err != "" {
			require.ErrorContains(t, err, c.err, name)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, c.want, result.Servers, name)
	}
}

// The join must be allowed by the room as the answer describes it, which need not be the one that the template spoke of.
// https://spec.matrix.org/v1.19/server-server-api/#checks-performed-on-receipt-of-a-pdu
func TestJoin_NotAllowed(t *testing.T) {
	for _, v := range joinVersions {
		for name, c := range map[string]struct {
			rule   string
			change func(r *joinRoom)
			err    string
		}{
			"the rule has changed": {"public", func(r *joinRoom) { r.add(joinAlice, typeJoinRules, "", `{"join_rule":"invite"}`) }, "not invited"},
			"an unknown rule":      {"public", func(r *joinRoom) { r.add(joinAlice, typeJoinRules, "", `{"join_rule":"private"}`) }, "lets nobody in"},
			"banned meanwhile":     {"public", func(r *joinRoom) { r.add(joinAlice, typeMember, string(joinUser), `{"membership":"ban"}`) }, "banned"},
			"no longer invited":    {"invite", func(r *joinRoom) { r.add(joinAlice, typeMember, string(joinUser), `{"membership":"leave"}`) }, "not invited"},
		} {
			for _, omit := range []bool{false, true} {
				if omit && (name == "banned meanwhile" || name == "no longer invited") {
					continue // nobody can tell
				}
				n := &joinNet{room: newJoinRoom(t, v, c.rule)}
				template := n.room.template()
				n.template = func(answer value) value { return answer.with("event", template) }
				c.change(n.room)
				n.answer = func(a *joinAnswer) {
					if omit {
						joinLacking(n.room)(a)
					}
				}
				_, err := n.join(t, func(r *JoinRequest) { r.OmitMembers = omit })
				require.ErrorContains(t, err, c.err, "%s %s", v, name)
				require.ErrorContains(t, err, "by the state", "%s %s", v, name)
			}
		}
		n := &joinNet{room: newJoinRoom(t, v, "public")}
		n.template = func(answer value) value { // nothing says that Bob may come
			event := answer.get("event")
			return answer.with("event", event.with("auth_events", references([]*Event{n.room.entry(typePowerLevels, "")})))
		}
		_, err := n.join(t, nil)
		require.ErrorContains(t, err, "by its auth events", v)
	}
}

// A room that is closed to other servers cannot be joined from one. https://spec.matrix.org/v1.19/client-server-api/#mroomcreate
func TestJoin_NotFederated(t *testing.T) {
	r := &joinRoom{t: t, rules: RoomVersion("10").rules(), id: "!room:r.example"}
	r.add(joinAlice, typeCreate, "", `{"creator":"@alice:r.example","m.federate":false,"room_version":"10"}`)
	r.add(joinAlice, typeMember, string(joinAlice), `{"membership":"join"}`)
	r.add(joinAlice, typeJoinRules, "", `{"join_rule":"public"}`)
	_, err := (&joinNet{room: r}).join(t, nil)
	require.ErrorContains(t, err, "closed to other servers")
}
