// Package gmslbridge connects mxfed to hosts that already use gomatrixserverlib: events both ways, either library's keys as
// the other's, and gomatrixserverlib's state resolution over mxfed's events. Everything that comes from another server is
// still judged by mxfed alone; what crosses the bridge has been judged before.
package gmslbridge

import (
	"context"
	"errors"
	"fmt"
	"time"

	"example.org/mxfed"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// PDU returns e as gomatrixserverlib's type. Its hashes are not checked again. An error means that gomatrixserverlib does
// not read the event or gives it another ID.
func PDU(e *mxfed.Event) (gomatrixserverlib.PDU, error) {
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersion(e.Version()))
	if err != nil {
		return nil, fmt.Errorf("gmslbridge: %w", err)
	}
	pdu, err := version.NewEventFromTrustedJSON(e.JSON(), false)
	if err != nil {
		return nil, fmt.Errorf("gmslbridge: event %s: %w", e.ID(), err)
	}
	if pdu.EventID() != string(e.ID()) {
		return nil, fmt.Errorf("gmslbridge: event %s has the ID %s for gomatrixserverlib", e.ID(), pdu.EventID())
	}
	return pdu, nil
}

// Event returns a PDU of gomatrixserverlib as mxfed's type, read strictly. unsigned is dropped.
func Event(pdu gomatrixserverlib.PDU) (*mxfed.Event, error) {
	e, err := mxfed.ParseEvent(mxfed.RoomVersion(pdu.Version()), pdu.JSON())
	if err != nil {
		return nil, fmt.Errorf("gmslbridge: event %s: %w", pdu.EventID(), err)
	}
	return e, nil
}

// Keys makes a host's key database and fetchers mxfed's Keys: the database is asked first, then every fetcher in turn for
// what is still missing or was needed for a later moment; what fetchers find is stored. database may be nil.
func Keys(database gomatrixserverlib.KeyDatabase, fetchers ...gomatrixserverlib.KeyFetcher) mxfed.Keys {
	return &keys{database, fetchers}
}

type keys struct {
	database gomatrixserverlib.KeyDatabase
	fetchers []gomatrixserverlib.KeyFetcher
}

// Keys implements mxfed.Keys.
func (k *keys) Keys(ctx context.Context, wanted []mxfed.Key) error {
	var errs []error
	if k.database != nil {
		_, err := fetch(ctx, k.database, wanted)
		errs = append(errs, err)
	}
	for _, f := range k.fetchers {
		found, err := fetch(ctx, f, wanted)
		errs = append(errs, err)
		if len(found) > 0 && k.database != nil {
			errs = append(errs, k.database.StoreKeys(ctx, found))
		}
	}
	return errors.Join(errs...)
}

// fetch asks one source for the keys that are not known well enough and fills them in.
func fetch(ctx context.Context, source gomatrixserverlib.KeyFetcher, wanted []mxfed.Key) (map[gomatrixserverlib.PublicKeyLookupRequest]gomatrixserverlib.PublicKeyLookupResult, error) {
	requests := make(map[gomatrixserverlib.PublicKeyLookupRequest]spec.Timestamp)
	for _, k := range wanted {
		if k.Public == nil || k.Expired.IsZero() && k.ValidUntil.Before(k.At) {
			r := request(k)
			requests[r] = max(requests[r], timestamp(k.At))
		}
	}
	if len(requests) == 0 {
		return nil, nil
	}
	found, err := source.FetchKeys(ctx, requests)
	for i := range wanted {
		if result, ok := found[request(wanted[i])]; ok {
			fill(&wanted[i], result)
		}
	}
	if err != nil {
		err = fmt.Errorf("gmslbridge: %s: %w", source.FetcherName(), err)
	}
	return found, err
}

func request(k mxfed.Key) gomatrixserverlib.PublicKeyLookupRequest {
	return gomatrixserverlib.PublicKeyLookupRequest{ServerName: spec.ServerName(k.Server), KeyID: gomatrixserverlib.KeyID(k.ID)}
}

// fill takes over a result, unless another key is known under the same ID already.
func fill(k *mxfed.Key, result gomatrixserverlib.PublicKeyLookupResult) {
	if k.Public != nil && string(k.Public) != string(result.Key) {
		return
	}
	k.Public = []byte(result.Key)
	if result.ValidUntilTS != gomatrixserverlib.PublicKeyNotValid {
		k.ValidUntil = result.ValidUntilTS.Time()
	}
	if result.ExpiredTS != gomatrixserverlib.PublicKeyNotExpired {
		k.Expired = result.ExpiredTS.Time()
	}
}

func timestamp(t time.Time) spec.Timestamp {
	if t.IsZero() {
		return 0
	}
	return spec.AsTimestamp(t)
}

// Verifier makes mxfed's Keys, such as a KeyRing, a JSONVerifier of gomatrixserverlib. Every signature of the server by a
// key that is known and valid must be right, and there must be one. Names of the host itself are looked up like others.
func Verifier(keys mxfed.Keys) gomatrixserverlib.JSONVerifier { return &verifier{keys} }

type verifier struct{ keys mxfed.Keys }

// VerifyJSONs implements gomatrixserverlib.JSONVerifier.
func (v *verifier) VerifyJSONs(ctx context.Context, requests []gomatrixserverlib.VerifyJSONRequest) ([]gomatrixserverlib.VerifyJSONResult, error) {
	var wanted []mxfed.Key
	from := make([]int, len(requests)+1) // of each request, in wanted
	for i, r := range requests {
		ids, err := gomatrixserverlib.ListKeyIDs(string(r.ServerName), r.Message)
		if err == nil {
			for _, id := range ids {
				wanted = append(wanted, mxfed.Key{Server: mxfed.ServerName(r.ServerName), ID: mxfed.KeyID(id), At: r.AtTS.Time()})
			}
		}
		from[i+1] = len(wanted)
	}
	lookUp := v.keys.Keys(ctx, wanted)
	results := make([]gomatrixserverlib.VerifyJSONResult, len(requests))
	for i, r := range requests {
		results[i].Error = judge(r, wanted[from[i]:from[i+1]], lookUp)
	}
	return results, nil
}

// judge checks the signatures of one message by the keys that were found.
func judge(r gomatrixserverlib.VerifyJSONRequest, keys []mxfed.Key, lookUp error) error {
	counted := false
	for _, k := range keys {
		if !usable(k, r) {
			continue
		}
		if err := mxfed.VerifyJSON(r.Message, k.Server, k.ID, k.Public); err != nil {
			return err
		}
		counted = true
	}
	if !counted {
		return errors.Join(fmt.Errorf("gmslbridge: no signature of %s by a key that is known and valid", r.ServerName), lookUp)
	}
	return nil
}

func usable(k mxfed.Key, r gomatrixserverlib.VerifyJSONRequest) bool {
	switch {
	case k.Public == nil:
		return false
	case !k.Expired.IsZero():
		return !r.AtTS.Time().After(k.Expired)
	case r.ValidityCheckingFunc == nil:
		return true
	}
	return r.ValidityCheckingFunc(r.AtTS, timestamp(k.ValidUntil))
}

// ResolveState resolves the states of a room before several events into one, by the algorithm of the room version. auth are
// the auth events of all entries, recursively, and from version 12 on the create event; rejected tells which events the host
// has rejected, nil for none. An event that is part of several states is converted once. An error means that an event or the
// room version is not gomatrixserverlib's, or that it gave up on what it was told.
func ResolveState(v mxfed.RoomVersion, states [][]*mxfed.Event, auth []*mxfed.Event, rejected func(mxfed.EventID) bool) (resolved []*mxfed.Event, err error) {
	if len(states) == 1 {
		return states[0], nil
	}
	defer func() {
		if p := recover(); p != nil { // servers of the room have a say in what is resolved: it must not end this one
			resolved, err = nil, fmt.Errorf("gmslbridge: resolve state: %v", p)
		}
	}()
	known := make(converted)
	sets := make([][]gomatrixserverlib.PDU, len(states))
	for i, state := range states {
		if sets[i], err = known.pdus(state); err != nil {
			return nil, err
		}
	}
	chain, err := known.pdus(auth)
	if err != nil {
		return nil, err
	}
	pdus, err := gomatrixserverlib.ResolveConflictsNew(gomatrixserverlib.RoomVersion(v), sets, chain, userID,
		func(id string) bool { return rejected != nil && rejected(mxfed.EventID(id)) })
	if err != nil {
		return nil, fmt.Errorf("gmslbridge: resolve state: %w", err)
	}
	for _, pdu := range pdus {
		resolved = append(resolved, known[mxfed.EventID(pdu.EventID())].event)
	}
	return resolved, nil
}

// converted are events as both libraries know them.
type converted map[mxfed.EventID]struct {
	event *mxfed.Event
	pdu   gomatrixserverlib.PDU
}

func (c converted) pdus(events []*mxfed.Event) ([]gomatrixserverlib.PDU, error) {
	list := make([]gomatrixserverlib.PDU, len(events))
	for i, e := range events {
		both := c[e.ID()]
		if both.pdu == nil {
			pdu, err := PDU(e)
			if err != nil {
				return nil, err
			}
			both.event, both.pdu = e, pdu
			c[e.ID()] = both
		}
		list[i] = both.pdu
	}
	return list, nil
}

// userID is gomatrixserverlib's question for the user behind a sender, who is that user in all stable room versions.
func userID(_ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
	return spec.NewUserID(string(sender), true)
}
