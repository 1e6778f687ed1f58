package mxfed

import (
	"iter"
	"math"
	"slices"
	"strings"

	"golang.org/x/crypto/ed25519"
)

// This file holds the authorisation rules of all room versions as pure functions of an event and a state: who may do what
// in a room. The newest page is the one cited; the older ones differ in what roomRules name.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules

// stateFunc looks up an entry of a room's state, nil if it is not set.
type stateFunc func(typ, key string) *Event

// stateOf looks entries up in a short list. create is found even if it is not in the list: in room version 12 it is part
// of every state but in no list of auth_events. It may be nil.
func stateOf(events []*Event, create *Event) stateFunc {
	return func(typ, key string) *Event {
		if create.is(typ, key) {
			return create
		}
		for _, e := range events {
			if e.is(typ, key) {
				return e
			}
		}
		return nil
	}
}

// membershipOf is the membership that state gives a user, "none" if it gives none.
func membershipOf(state stateFunc, user UserID) string {
	if e := state(typeMember, string(user)); e != nil {
		return e.membership
	}
	return "none"
}

// joinRuleOf is the join rule that state sets: public, invite, knock, restricted or knock_restricted; "other" is whatever
// the room version does not know, by which nobody gets in. A room that sets none is one for invited users.
func joinRuleOf(rules *roomRules, state stateFunc) string {
	e := state(typeJoinRules, "")
	if e == nil {
		return "invite"
	}
	v := e.content.get("join_rule")
	if v == "" {
		return "invite"
	}
	rule, _ := v.str()
	if rule == "public" || rule == "invite" || rule == "knock" && rules.knock ||
		rule == "restricted" && rules.restricted || rule == "knock_restricted" && rules.knockRestricted {
		return rule
	}
	return "other"
}

// powerOf is the power that state gives a user. It is the least there is if state does not tell.
func powerOf(state stateFunc, user UserID) int64 {
	s, err := readState(state)
	if err != nil {
		return math.MinInt64
	}
	return s.power(user)
}

// mayInvite tells whether user is in the room and may invite others.
// https://spec.matrix.org/v1.19/server-server-api/#restricted-rooms
func mayInvite(state stateFunc, user UserID) bool {
	s, err := readState(state)
	return err == nil && s.mayInvite(user)
}

// authState is a state with the entries that most rules ask for.
type authState struct {
	entry  stateFunc
	create *Event
	levels *powerLevels // nil if the state has none
}

// readState fails if the state does not tell who has which power: then nobody may do anything.
func readState(state stateFunc) (s authState, err error) {
	s = authState{entry: state, create: state(typeCreate, "")}
	if s.create == nil {
		return s, refuse(ErrForbidden, "the create event of the room is missing")
	}
	if e := state(typePowerLevels, ""); e != nil {
		if s.levels = e.levels; s.levels == nil {
			return s, refuse(ErrForbidden, "the power levels of the room are malformed")
		}
	}
	return s, nil
}

func (s *authState) mayInvite(user UserID) bool {
	return membershipOf(s.entry, user) == "join" && s.power(user) >= s.levels.level("invite")
}

// creatorPower is the power of the creators of a room of version 12: above all levels, which cannot exceed 2^53 there.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
const creatorPower = math.MaxInt64

func (s *authState) power(user UserID) int64 {
	switch {
	case s.create.rules.hashRoomID && s.isCreator(user):
		return creatorPower
	case s.levels == nil && s.isCreator(user):
		return 100
	}
	return s.levels.user(user)
}

func (s *authState) isCreator(user UserID) bool {
	for creator := range creators(s.create) {
		if creator == user {
			return true
		}
	}
	return false
}

// creators yields the founder of a room and, from version 12 on, those who count as creators beside that user.
func creators(create *Event) iter.Seq[UserID] {
	return func(yield func(UserID) bool) {
		if !yield(founder(create)) || !create.rules.hashRoomID {
			return
		}
		for v := range create.content.get("additional_creators").elements() {
			if user, ok := v.str(); ok && !yield(UserID(user)) {
				return
			}
		}
	}
}

// founder is the user who created a room.
func founder(create *Event) UserID {
	if !create.rules.creatorInContent {
		return create.sender
	}
	user, _ := create.content.get("creator").str()
	return UserID(user)
}

// authKeys names the state entries that the auth_events of e may be selected from.
func authKeys(e *Event) []StateKey {
	return authKeysFor(e.rules, e.typ, e.stateKey, e.isState, e.sender, e.content)
}

// authKeysFor is authKeys for an event that is still to be made.
func authKeysFor(rules *roomRules, typ, stateKey string, isState bool, sender UserID, content value) []StateKey {
	return appendAuthKeys(nil, rules, typ, stateKey, isState, sender, content)
}

// maxAuthKeys is how many entries appendAuthKeys appends at most.
const maxAuthKeys = 7

// appendAuthKeys appends each entry once. https://spec.matrix.org/v1.19/server-server-api/#auth-events-selection
func appendAuthKeys(keys []StateKey, rules *roomRules, typ, stateKey string, isState bool, sender UserID, content value) []StateKey {
	if typ == typeCreate {
		return keys
	}
	if !rules.hashRoomID {
		keys = append(keys, StateKey{typeCreate, ""})
	}
	keys = append(keys, StateKey{typePowerLevels, ""}, StateKey{typeMember, string(sender)})
	if typ != typeMember {
		return keys
	}
	if isState && stateKey != string(sender) {
		keys = append(keys, StateKey{typeMember, stateKey})
	}
	membership, _ := content.get("membership").str()
	switch membership {
	case "join", "invite", "knock":
		keys = append(keys, StateKey{typeJoinRules, ""})
	}
	if membership == "invite" {
		if token, ok := content.get("third_party_invite").get("signed").get("token").str(); ok {
			keys = append(keys, StateKey{typeThirdPartyInvite, token})
		}
	}
	if membership == "join" && rules.restricted {
		user, ok := content.get("join_authorised_via_users_server").str()
		if key := (StateKey{typeMember, user}); ok && !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	return keys
}

// checkAuthEvents checks that auth, the events that auth_events of e name, are entries of the state of e's room that e may
// name, each once. Which of them were rejected is for the caller to know.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func checkAuthEvents(e *Event, auth []*Event) error {
	if e.typ == typeCreate {
		return nil // its rules do not look at them
	}
	var buf [maxAuthKeys]StateKey
	allowed := appendAuthKeys(buf[:0], e.rules, e.typ, e.stateKey, e.isState, e.sender, e.content)
	var seen [maxAuthKeys]bool
	for _, a := range auth {
		if a.room != e.room {
			return refuse(ErrForbidden, "auth event %s is of another room", a.id)
		}
		i := slices.IndexFunc(allowed, func(k StateKey) bool { return a.is(k.Type, k.Key) })
		if i < 0 {
			return refuse(ErrForbidden, "auth event %s is none that the event may name", a.id)
		}
		if seen[i] {
			return refuse(ErrForbidden, "auth event %s is the second of its kind", a.id)
		}
		seen[i] = true
	}
	if !e.rules.hashRoomID && !seen[0] { // the create event is the first that may be named
		return refuse(ErrForbidden, "auth_events do not name the create event")
	}
	return nil
}

// authorise decides whether e is allowed in a state: that of its auth_events or that of the room before it. In room
// version 12 either must hold the create event. What it does not look at are auth_events themselves. authorised tells
// whether the server of the user in content.join_authorised_via_users_server has validly signed e.
// https://spec.matrix.org/v1.19/rooms/v12/#authorization-rules
func authorise(e *Event, state stateFunc, authorised bool) error {
	if e.typ == typeCreate {
		return checkCreate(e)
	}
	s, err := readState(state)
	if err != nil {
		return err
	}
	if s.create.room != e.room { // also how an event of room version 12 names its create event
		return refuse(ErrForbidden, "event is not of the room that the create event made")
	}
	if s.create.content.get("m.federate") == "false" && e.sender.Server() != s.create.sender.Server() {
		return refuse(ErrForbidden, "the room is closed to other servers")
	}
	switch {
	case e.typ == typeAliases && e.rules.aliases:
		if !e.isState || e.stateKey != string(e.sender.Server()) {
			return refuse(ErrForbidden, "the state key of aliases is not the sender's server")
		}
		return nil
	case e.typ == typeMember:
		return s.checkMember(e, authorised)
	}
	if err := s.checkJoined(e.sender); err != nil {
		return err
	}
	if e.typ == typeThirdPartyInvite {
		return s.checkPower(e.sender, "invite")
	}
	return s.checkOther(e)
}

// checkCreate judges a create event. That one of room version 12 has no room_id was checked when it was parsed.
func checkCreate(e *Event) error {
	if !e.is(typeCreate, "") {
		return refuse(ErrForbidden, "the state key of a create event is not empty")
	}
	if e.prevs > 0 {
		return refuse(ErrForbidden, "a create event has prev_events")
	}
	if _, server, _ := strings.Cut(string(e.room), ":"); !e.rules.hashRoomID && server != string(e.sender.Server()) {
		return refuse(ErrForbidden, "the room ID is not of the creator's server")
	}
	if v := e.content.get("room_version"); v != "" {
		if version, ok := v.str(); !ok || RoomVersion(version).rules() == nil {
			return refuse(ErrForbidden, "the room version is not known")
		}
	}
	if _, ok := e.content.get("creator").str(); !ok && e.rules.creatorInContent {
		return refuse(ErrForbidden, "a create event does not name the creator")
	}
	if v := e.content.get("additional_creators"); v != "" && e.rules.hashRoomID && !areUsers(v) {
		return refuse(ErrForbidden, "additional_creators is no list of user IDs")
	}
	return nil
}

func areUsers(v value) bool {
	for entry := range v.elements() {
		if user, ok := entry.str(); !ok || !UserID(user).valid() {
			return false
		}
	}
	return v.isArray()
}

func (s *authState) checkMember(e *Event, authorised bool) error {
	if !e.isState || e.membership == "" {
		return refuse(ErrForbidden, "a member event has no state key or no membership")
	}
	if e.rules.restricted && e.authoriser != "" && (!authorised || !e.authoriserID().valid()) {
		return refuse(ErrForbidden, "the server of the user who authorises a join has not signed")
	}
	switch e.membership {
	case "join":
		return s.checkJoin(e)
	case "invite":
		if v := e.content.get("third_party_invite"); v != "" {
			return s.checkThirdPartyInvite(e, v.get("signed"))
		}
		return s.checkInvite(e)
	case "leave":
		return s.checkLeave(e)
	case "ban":
		return s.checkBan(e)
	case "knock":
		return s.checkKnock(e)
	}
	return refuse(ErrForbidden, "the membership is not known")
}

func (s *authState) checkJoin(e *Event) error {
	if e.prevs == 1 && e.refs[0] == s.create.id && e.stateKey == string(founder(s.create)) {
		return nil // the first join of all
	}
	if e.stateKey != string(e.sender) {
		return refuse(ErrForbidden, "%s cannot join for another user", e.sender)
	}
	membership := membershipOf(s.entry, e.sender)
	if membership == "ban" {
		return refuse(ErrForbidden, "%s is banned", e.sender)
	}
	invited := membership == "invite" || membership == "join"
	switch joinRuleOf(e.rules, s.entry) {
	case "public":
		return nil
	case "invite", "knock":
		if !invited {
			return refuse(ErrForbidden, "%s is not invited", e.sender)
		}
		return nil
	case "restricted", "knock_restricted": // its conditions are for the server of the authorising user to check
		if user := e.authoriserID(); !invited && (user == "" || !s.mayInvite(user)) {
			return refuse(ErrForbidden, "%s is not invited and nobody who may invite has authorised the join", e.sender)
		}
		return nil
	}
	return refuse(ErrForbidden, "the join rule of the room lets nobody in")
}

func (s *authState) checkInvite(e *Event) error {
	if err := s.checkJoined(e.sender); err != nil {
		return err
	}
	switch membershipOf(s.entry, UserID(e.stateKey)) {
	case "join":
		return refuse(ErrForbidden, "%s is in the room already", e.stateKey)
	case "ban":
		return refuse(ErrForbidden, "%s is banned", e.stateKey)
	}
	return s.checkPower(e.sender, "invite")
}

func (s *authState) checkJoined(user UserID) error {
	if membershipOf(s.entry, user) != "join" {
		return refuse(ErrForbidden, "%s is not in the room", user)
	}
	return nil
}

func (s *authState) checkPower(user UserID, name string) error {
	if have, need := s.power(user), s.levels.level(name); have < need {
		return refuse(ErrForbidden, "%s takes a power of %d, %s has %d", name, need, user, have)
	}
	return nil
}

// checkThirdPartyInvite judges an invite that redeems the promise of an m.room.third_party_invite event. Whether its
// sender is still in the room, and with which power, does not matter.
// https://spec.matrix.org/v1.19/client-server-api/#third-party-invites
func (s *authState) checkThirdPartyInvite(e *Event, signed value) error {
	if membershipOf(s.entry, UserID(e.stateKey)) == "ban" {
		return refuse(ErrForbidden, "%s is banned", e.stateKey)
	}
	user, hasUser := signed.get("mxid").str()
	token, hasToken := signed.get("token").str()
	if !hasUser || !hasToken || user != e.stateKey {
		return refuse(ErrForbidden, "the third-party invite is not for %s", e.stateKey)
	}
	promise := s.entry(typeThirdPartyInvite, token)
	if promise == nil || promise.sender != e.sender {
		return refuse(ErrForbidden, "%s has made no such third-party invite", e.sender)
	}
	if !signedByAny(signed, inviteKeys(promise.content)) {
		return refuse(ErrForbidden, "the third-party invite has no valid signature")
	}
	return nil
}

// inviteKeys are the public keys of an m.room.third_party_invite event; unusable ones are passed over.
// https://spec.matrix.org/v1.19/client-server-api/#mroomthird_party_invite
func inviteKeys(content value) (keys []ed25519.PublicKey) {
	add := func(v value) {
		text, _ := v.str()
		if key, err := decodeBase64(text); err == nil && usableKey(key) {
			keys = append(keys, key)
		}
	}
	add(content.get("public_key"))
	for entry := range content.get("public_keys").elements() {
		add(entry.get("public_key"))
	}
	return keys
}

// maxInviteChecks bounds the work that one third-party invite can cause. Real ones have one signature and two keys.
const maxInviteChecks = 256

// signedByAny tells whether any signature in signed is one of the keys', whatever its name and key ID.
func signedByAny(signed value, keys []ed25519.PublicKey) bool {
	message, checks := signedBytes(signed), 0
	for _, signatures := range signed.get("signatures").members() {
		for id, v := range signatures.members() {
			sig, ok := v.str()
			if !ok || !strings.HasPrefix(id, ed25519Prefix) {
				continue
			}
			for _, key := range keys {
				if checks++; checks > maxInviteChecks {
					return false
				}
				if verify(key, message, sig) {
					return true
				}
			}
		}
	}
	return false
}

func (s *authState) checkLeave(e *Event) error {
	membership := membershipOf(s.entry, UserID(e.stateKey))
	if e.stateKey == string(e.sender) {
		if membership == "invite" || membership == "join" || membership == "knock" && e.rules.knock {
			return nil
		}
		return refuse(ErrForbidden, "%s has nothing to leave", e.sender)
	}
	if err := s.checkJoined(e.sender); err != nil {
		return err
	}
	if membership == "ban" {
		if err := s.checkPower(e.sender, "ban"); err != nil {
			return err
		}
	}
	return s.checkAbove(e, "kick")
}

func (s *authState) checkBan(e *Event) error {
	if err := s.checkJoined(e.sender); err != nil {
		return err
	}
	return s.checkAbove(e, "ban")
}

// checkAbove demands that the sender has the level and more power than the target.
func (s *authState) checkAbove(e *Event, name string) error {
	if err := s.checkPower(e.sender, name); err != nil {
		return err
	}
	if s.power(UserID(e.stateKey)) >= s.power(e.sender) {
		return refuse(ErrForbidden, "%s has no less power than %s", e.stateKey, e.sender)
	}
	return nil
}

// checkKnock needs not ask whether the room version knows knocking: no other has a join rule for it.
func (s *authState) checkKnock(e *Event) error {
	if rule := joinRuleOf(e.rules, s.entry); rule != "knock" && rule != "knock_restricted" {
		return refuse(ErrForbidden, "the room does not take knocks")
	}
	if e.stateKey != string(e.sender) {
		return refuse(ErrForbidden, "%s cannot knock for another user", e.sender)
	}
	switch membership := membershipOf(s.entry, e.sender); membership {
	case "ban", "invite", "join":
		return refuse(ErrForbidden, "the membership of %s is %s: no reason to knock", e.sender, membership)
	}
	return nil
}

// checkOther judges events of joined users that no earlier rule has decided about.
func (s *authState) checkOther(e *Event) error {
	if have, need := s.power(e.sender), s.levels.required(e.typ, e.isState); have < need {
		return refuse(ErrForbidden, "events of this type take a power of %d, %s has %d", need, e.sender, have)
	}
	if e.isState && strings.HasPrefix(e.stateKey, "@") && e.stateKey != string(e.sender) {
		return refuse(ErrForbidden, "the state key is another user's")
	}
	switch {
	case e.typ == typePowerLevels:
		return s.checkPowerLevels(e)
	case e.typ == typeRedaction && e.rules.redactionRule:
		return s.checkRedaction(e)
	}
	return nil
}

func (s *authState) checkPowerLevels(e *Event) error {
	if e.levels == nil {
		_, err := parsePowerLevels(e.rules, e.content)
		return refuse(ErrForbidden, "power levels are malformed: %v", err)
	}
	if e.rules.hashRoomID {
		for creator := range creators(s.create) {
			if _, ok := levelIn(e.levels.users, string(creator)); ok {
				return refuse(ErrForbidden, "power levels cannot name %s, a creator of the room", creator)
			}
		}
	}
	if s.levels == nil {
		return nil
	}
	if err := s.levels.checkChange(e.levels, e.sender, s.power(e.sender)); err != nil {
		return refuse(ErrForbidden, "power levels: %v", err)
	}
	return nil
}

// checkRedaction is the rule of room versions 1 and 2; later ones decide when the redaction is applied.
// https://spec.matrix.org/v1.19/rooms/v1/#authorization-rules
func (s *authState) checkRedaction(e *Event) error {
	redacts, _ := e.text.get("redacts").str()
	if id := EventID(redacts); id.valid() && id.server() == e.id.server() {
		return nil
	}
	return s.checkPower(e.sender, "redact")
}
