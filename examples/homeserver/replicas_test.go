package main

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

// peer is another server, of which all users are at once on the network: it holds no rooms, so that each of its joins goes
// through another server.
type peer struct {
	fed *mxfed.Server
	own mxfed.ServerName

	mu       sync.Mutex
	received map[mxfed.EventID]int // in transactions
}

func newPeer(t testing.TB, ca string) *peer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &peer{own: mxfed.ServerName(listener.Addr().String()), received: make(map[mxfed.EventID]int)}
	_, key, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	signer, err := mxfed.NewSigner(p.own, "ed25519:1", key)
	require.NoError(t, err)
	roots, err := trustedRoots(filepath.Join(ca, "ca.pem"))
	require.NoError(t, err)
	resolver := newResolver(roots, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")})
	resolver.Base.DisableKeepAlives = true // each request may go to another process
	p.fed, err = mxfed.NewServer(mxfed.Config{Signers: []*mxfed.Signer{signer}, HTTP: resolver})
	require.NoError(t, err)
	secure, err := issuedTLS(p.own, filepath.Join(ca, "ca.pem"), filepath.Join(ca, "ca.key"))
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.HandleFunc("/_matrix/federation/v1/send/{txn}", p.receive)
	mux.Handle("/", mxfed.NewHandler(p.fed, mxfed.Hosts{Invite: mxfed.InviteHostFunc(func(context.Context, *mxfed.Invite) error { return nil })}))
	web := &http.Server{Handler: mux, ErrorLog: nil}
	go web.Serve(tls.NewListener(listener, secure))
	t.Cleanup(func() {
		web.Close()
		resolver.CloseIdleConnections()
	})
	return p
}

// receive counts the events of a transaction.
func (p *peer) receive(w http.ResponseWriter, r *http.Request) {
	in, err := p.fed.Authenticate(r)
	if err != nil {
		mxfed.WriteError(w, err)
		return
	}
	var body struct{ PDUs []json.RawMessage }
	if err := json.Unmarshal(in.Body, &body); err != nil {
		mxfed.WriteError(w, mxfed.ErrBadJSON)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pdu := range body.PDUs {
		if e, err := mxfed.ParseEvent(replicaVersion, pdu); err == nil {
			p.received[e.ID()]++
		}
	}
	io.WriteString(w, `{"pdus":{}}`)
}

const replicaVersion mxfed.RoomVersion = "10"

// balance spreads connections over backends, whichever answer. It returns the address to connect to and counts how many
// connections each backend got.
func balance(t testing.TB, backends ...string) (address string, counts []atomic.Int64) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { listener.Close() })
	var next atomic.Int64
	counts = make([]atomic.Int64, len(backends))
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for range backends {
					i := int(next.Add(1)) % len(backends)
					back, err := net.Dial("tcp", backends[i])
					if err != nil {
						continue
					}
					counts[i].Add(1)
					go func() {
						defer back.Close()
						io.Copy(back, conn)
					}()
					io.Copy(conn, back)
					return
				}
			}()
		}
	}()
	return listener.Addr().String(), counts
}

// acts is a load of joins, leaves and invites, and what was acknowledged of it.
type acts struct {
	room     mxfed.RoomID
	via      mxfed.ServerName
	phones   []*phone // of the room's creator, one for each replica
	done     atomic.Int64
	retries  atomic.Int64
	mu       sync.Mutex
	events   map[mxfed.EventID]bool
	expected map[mxfed.UserID]string
	counts   map[string]int
}

func (a *acts) acknowledge(kind string, e *mxfed.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	user, _ := e.StateKey()
	a.events[e.ID()], a.expected[mxfed.UserID(user)] = true, e.Membership()
	a.counts[kind]++
	a.done.Add(1)
}

// act does what one user does: join; join and leave; or be invited and join. What fails because a server is not there is
// done again.
func (a *acts) act(ctx context.Context, p *peer, n int) error {
	user := mxfed.UserID(fmt.Sprintf("@user%d:%s", n, p.own))
	if n%3 == 2 {
		if err := a.again(ctx, func() error { return a.invite(ctx, user) }); err != nil {
			return err
		}
	}
	err := a.again(ctx, func() error {
		result, err := p.fed.Client().Join(ctx, &mxfed.JoinRequest{Room: a.room, User: user, Via: []mxfed.ServerName{a.via}})
		if err == nil {
			a.acknowledge("joins", result.Event)
		}
		return err
	})
	if err != nil || n%3 != 1 {
		return err
	}
	tried := false
	return a.again(ctx, func() error {
		left, err := p.fed.Client().Leave(ctx, &mxfed.LeaveRequest{Room: a.room, User: user, Via: []mxfed.ServerName{a.via}})
		if err == nil {
			a.acknowledge("leaves", left)
		} else if tried && strings.Contains(err.Error(), "nothing to leave") { // the answer to an earlier try got lost
			return nil
		}
		tried = true
		return err
	})
}

func (a *acts) again(ctx context.Context, do func() error) error {
	for {
		err := do()
		var standard *mxfed.Error
		if err == nil || ctx.Err() != nil || errors.As(err, &standard) && !standard.Temporary() && standard.Status != http.StatusBadGateway {
			return err
		}
		a.retries.Add(1)
		time.Sleep(50 * time.Millisecond)
	}
}

// invite has the creator of the room invite a user, through any replica.
func (a *acts) invite(ctx context.Context, user mxfed.UserID) error {
	phone := a.phones[rand.IntN(len(a.phones))]
	status, got, err := phone.request(ctx, "POST", in3(string(a.room), "invite"), answer{"user_id": user})
	if err == nil && status != 200 {
		err = fmt.Errorf("%d: %v", status, got)
		if got["errcode"] == "M_FORBIDDEN" && strings.Contains(fmt.Sprint(got["error"]), "join") { // an earlier try got through
			err = nil
		}
	}
	if err == nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.counts["invites"]++
		a.done.Add(1)
	}
	return err
}

// TestReplicas has three processes share one PostgreSQL behind a load balancer. 300 users of two other servers join, leave
// and are invited at once; one of the processes is killed meanwhile and started again.
func TestReplicas(t *testing.T) {
	pg, ca, ports := newPostgres(t), testCA(t), freePorts(t, 6)
	url, dir := pg.create(t), t.TempDir()
	name, connections := balance(t, "127.0.0.1:"+ports[0], "127.0.0.1:"+ports[2], "127.0.0.1:"+ports[4])
	start := func(i int) *process {
		return startProcess(t, ca, filepath.Join(dir, fmt.Sprint(i)), ports[2*i:2*i+2], "-name", name, "-db", url)
	}
	replicas := []*process{start(0), start(1), start(2)}
	alice := newPhone(t, replicas[0].base, "alice")
	a := &acts{room: mxfed.RoomID(alice.create(answer{"preset": "public_chat", "room_version": replicaVersion})), via: mxfed.ServerName(name),
		events: make(map[mxfed.EventID]bool), expected: make(map[mxfed.UserID]string), counts: make(map[string]int)}
	for _, r := range replicas {
		phone := *alice
		phone.base = r.base
		a.phones = append(a.phones, &phone)
	}
	peers := []*peer{newPeer(t, ca), newPeer(t, ca)}

	const users = 300
	var all sync.WaitGroup
	errs := make(chan error, users)
	began := time.Now()
	for n := range users {
		all.Go(func() { errs <- a.act(t.Context(), peers[n%2], n) })
	}
	for a.done.Load() < 100 {
		time.Sleep(time.Millisecond)
	}
	require.NoError(t, replicas[1].Kill())
	replicas[1].wait()
	time.Sleep(300 * time.Millisecond)
	start(1)
	all.Wait()
	for range users {
		require.NoError(t, <-errs)
	}
	took := time.Since(began)
	a.check(t, pg, url, peers, alice)
	t.Logf("%d joins, %d leaves, %d invites acknowledged in %v, %d requests repeated; %d, %d and %d connections", a.counts["joins"], a.counts["leaves"],
		a.counts["invites"], took.Round(time.Millisecond), a.retries.Load(), connections[0].Load(), connections[1].Load(), connections[2].Load())
}

// check looks for every acknowledged event, in the database and in what each replica says.
func (a *acts) check(t *testing.T, pg *postgres, url string, peers []*peer, alice *phone) {
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	for id := range a.events {
		var count, status int
		require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*), max(status) FROM events WHERE id = $1 AND position > 0`, id).Scan(&count, &status))
		require.Equal(t, 1, count, id)
		require.Equal(t, statusAccepted, status, id)
	}
	var states []map[string]string
	for _, phone := range a.phones {
		state := make(map[string]string)
		for _, entry := range phone.must("GET", in3(string(a.room), "state"), nil)[""].([]any) {
			e := answer(entry.(map[string]any))
			state[fmt.Sprint(e["type"], " ", e["state_key"])] = fmt.Sprint(e["event_id"])
			if member, ok := a.expected[mxfed.UserID(fmt.Sprint(e["state_key"]))]; ok && e["type"] == "m.room.member" {
				require.Equal(t, member, e.at("content", "membership"), e["state_key"])
			}
		}
		states = append(states, state)
	}
	require.Len(t, states[0], len(a.expected)+6, "the room has nothing but members and what it was made of: %v", slices.Sorted(maps.Keys(states[0])))
	require.Equal(t, states[0], states[1])
	require.Equal(t, states[0], states[2])

	var left int
	for left = 1; left > 0; {
		require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*) FROM outbox`).Scan(&left))
	}
	var events int
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*) FROM events WHERE position > 0`).Scan(&events))
	sent := 0
	for _, p := range peers {
		p.mu.Lock()
		sent += len(p.received)
		p.mu.Unlock()
	}
	t.Logf("%d events in the room, each once; %d replicas agree about a state of %d entries; %d events sent on, none left in the queue", events, len(states), len(states[0]), sent)
}
