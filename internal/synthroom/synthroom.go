// Package synthroom makes large rooms of room version 10 for benchmarks: valid events with deterministic keys, most of them
// members on servers of very different sizes. It writes events by itself, without the library that is measured.
package synthroom

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// Version is the room version of every room.
const Version = "10"

// KeyID is the ID of the one key that each server has.
const KeyID = "ed25519:a_1"

// Room is a room as a resident server would send it.
type Room struct {
	ID      string
	Creator string   // a user of Servers[0]
	Servers []string // that members are of
	State   [][]byte // PDUs of the state
	Auth    [][]byte // PDUs of the auth chain
	// Latest is the ID of the last event; AuthIDs are those of the create, power levels and join rules events.
	Latest  string
	AuthIDs []string
	Depth   int
}

// New makes a room whose state has n entries. Members are spread over servers: by Zipf's law, or one server each if spread.
func New(n, servers int, spread bool) *Room {
	r := &Room{ID: "!synthetic:s0.example", Creator: "@alice:s0.example"}
	for i := range servers {
		r.Servers = append(r.Servers, "s"+strconv.Itoa(i)+".example")
	}
	create := r.add(event{typ: "m.room.create", sender: r.Creator, content: `{"creator":"@alice:s0.example","room_version":"10"}`})
	alice := r.add(event{typ: "m.room.member", key: r.Creator, sender: r.Creator, content: `{"membership":"join"}`, auth: []string{create}})
	levels := r.add(event{typ: "m.room.power_levels", sender: r.Creator, auth: []string{create, alice},
		content: `{"ban":50,"events":{"m.room.name":50},"events_default":0,"invite":0,"kick":50,"redact":50,"state_default":50,"users":{"@alice:s0.example":100},"users_default":0}`})
	rules := r.add(event{typ: "m.room.join_rules", sender: r.Creator, auth: []string{create, levels, alice}, content: `{"join_rule":"public"}`})
	r.Auth = append(r.Auth, r.State...)
	r.AuthIDs = []string{create, levels, rules}
	r.fill(n, spread, alice)
	return r
}

// fill adds members and, one in twenty, other state. Building is parallel: prev_events name the join rules throughout.
func (r *Room) fill(n int, spread bool, alice string) {
	random := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(random, 1.4, 1, uint64(len(r.Servers)-1))
	todo := make([]event, 0, n)
	for i := len(r.State); i < n; i++ {
		if i%20 == 0 {
			todo = append(todo, event{typ: "org.example.setting", key: strconv.Itoa(i), sender: r.Creator,
				content: `{"body":"` + strings.Repeat("lorem ipsum ", 10) + `"}`, auth: []string{r.AuthIDs[0], r.AuthIDs[1], alice}})
			continue
		}
		server := r.Servers[int(zipf.Uint64())]
		if spread {
			server = r.Servers[i%len(r.Servers)]
		}
		user := "@user_with_a_name_" + strconv.Itoa(i) + ":" + server
		content := fmt.Sprintf(`{"avatar_url":"mxc://%s/AbCdEfGhIjKlMnOpQrStUvWx","displayname":"User number %d of many","membership":"join"}`, server, i)
		todo = append(todo, event{typ: "m.room.member", key: user, sender: user, content: content, auth: r.AuthIDs})
	}
	base := len(r.State)
	r.State = append(r.State, make([][]byte, len(todo))...)
	var group sync.WaitGroup
	for w := range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for i := w; i < len(todo); i += runtime.GOMAXPROCS(0) {
				todo[i].room, todo[i].depth, todo[i].prev = r.ID, base+1+i, r.AuthIDs[2]
				r.State[base+i], _ = todo[i].build()
			}
		})
	}
	group.Wait()
	r.Depth, r.Latest = base+len(todo), r.AuthIDs[2]
}

func (r *Room) add(e event) (id string) {
	e.room, e.depth, e.prev = r.ID, len(r.State)+1, r.Latest
	pdu, id := e.build()
	r.State = append(r.State, pdu)
	r.Latest = id
	return id
}

// event is a state event to be made.
type event struct {
	room, typ, key, sender, content, prev string
	auth                                  []string
	depth                                 int
}

// build returns the PDU in canonical form and its ID.
func (e *event) build() (pdu []byte, id string) {
	sum := sha256.Sum256(e.text(e.content, "", ""))
	hashes := `"hashes":{"sha256":"` + base64.RawStdEncoding.EncodeToString(sum[:]) + `"},`
	kept := e.content
	if e.typ == "m.room.member" {
		kept = `{"membership":"join"}`
	} else if e.typ == "m.room.create" {
		kept = `{"creator":"` + e.sender + `"}`
	} else if e.typ == "m.room.power_levels" { // version 10 does not keep invite
		kept = strings.Replace(kept, `"invite":0,`, "", 1)
	} else if e.typ != "m.room.join_rules" {
		kept = "{}"
	}
	redacted := e.text(kept, hashes, "")
	reference := sha256.Sum256(redacted)
	_, server, _ := strings.Cut(e.sender, ":")
	sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(Key(server), redacted))
	signatures := `"signatures":{"` + server + `":{"` + KeyID + `":"` + sig + `"}},`
	return e.text(e.content, hashes, signatures), "$" + base64.RawURLEncoding.EncodeToString(reference[:])
}

// text writes the event with its members in canonical order.
func (e *event) text(content, hashes, signatures string) []byte {
	prev := "[]"
	if e.prev != "" {
		prev = list([]string{e.prev})
	}
	return fmt.Appendf(nil, `{"auth_events":%s,"content":%s,"depth":%d,%s"origin_server_ts":%d,"prev_events":%s,"room_id":"%s","sender":"%s",%s"state_key":"%s","type":"%s"}`,
		list(e.auth), content, e.depth, hashes, 1700000000000+e.depth, prev, e.room, e.sender, signatures, e.key, e.typ)
}

func list(ids []string) string {
	if len(ids) == 0 {
		return "[]"
	}
	return `["` + strings.Join(ids, `","`) + `"]`
}

// Key is the signing key of a server.
func Key(server string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("synthetic key of " + server))
	return ed25519.NewKeyFromSeed(seed[:])
}

// Answer is a send_join answer to the join that is event.
func (r *Room) Answer(event []byte) []byte {
	var b bytes.Buffer
	b.WriteString(`{"auth_chain":[`)
	b.Write(bytes.Join(r.Auth, []byte(",")))
	b.WriteString(`],"event":`)
	b.Write(event)
	b.WriteString(`,"origin":"s0.example","state":[`)
	b.Write(bytes.Join(r.State, []byte(",")))
	b.WriteString("]}")
	return b.Bytes()
}

// Template is a make_join answer for user.
func (r *Room) Template(user string) []byte {
	return fmt.Appendf(nil, `{"room_version":"10","event":{"type":"m.room.member","room_id":"%s","sender":"%s","state_key":"%s","content":{"membership":"join"},"depth":%d,"origin_server_ts":1700000000000,"prev_events":%s,"auth_events":%s}}`,
		r.ID, user, user, r.Depth+1, list([]string{r.Latest}), list(r.AuthIDs))
}
