package mxfed

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// publishedRules is one column of the published table; every row of it is named here, so that none is overlooked.
type publishedRules struct {
	Stable             bool
	Schema             string `json:"pdu_schema"`
	References         string `json:"event_refs"`
	HasEventID         bool   `json:"event_id_in_pdu"`
	EventID            string `json:"event_id"`
	RoomID             string `json:"room_id"`
	CreateHasRoomID    bool   `json:"room_id_on_create_event"`
	CreateInAuthEvents string `json:"create_in_auth_events"`
	CreatorInContent   bool   `json:"creator_in_create_content"`
	AdditionalCreators bool   `json:"additional_creators"`
	InfinitePower      bool   `json:"creators_have_infinite_power"`
	RedactsAt          string `json:"redacts_at"`
	Redaction          string `json:"redaction_rules"`
	MaxDepth           string `json:"max_depth"`
	CanonicalJSON      bool   `json:"canonical_json_enforced"`
	KeyValidity        bool   `json:"valid_until_ts_enforced"`
	TwoSignatures      bool   `json:"signature_of_event_id_domain_required"`
	StateResolution    string `json:"state_resolution"` // the host's
	Aliases            bool   `json:"aliases_auth_rule"`
	RedactionRule      bool   `json:"redaction_auth_rule"`
	Notifications      bool   `json:"notifications_checked_in_power_levels"`
	StringLevels       bool   `json:"power_level_strings_allowed"`
	FloatLevels        bool   `json:"power_level_floats_allowed"`
	Knock              bool
	Restricted         bool
	KnockRestricted    bool `json:"knock_restricted"`
}

func loadPublishedRules(t *testing.T) map[RoomVersion]publishedRules {
	t.Helper()
	var file struct {
		Source, Kind string
		Default      RoomVersion                    `json:"default_for_new_rooms"`
		All          []RoomVersion                  `json:"all_stable"`
		Versions     map[RoomVersion]publishedRules `json:"room_versions"`
	}
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", "room_versions.json"))
	require.NoError(t, err)
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	require.NoError(t, dec.Decode(&file))
	require.Len(t, file.Versions, 12)
	var all []RoomVersion
	for _, r := range stableVersions {
		all = append(all, r.version)
	}
	require.Equal(t, file.All, all, "supported versions, in their order")
	return file.Versions
}

// https://spec.matrix.org/v1.19/rooms/
func TestRoomRules_PublishedTable(t *testing.T) {
	redaction := map[string]*redactionRules{}
	for version, want := range loadPublishedRules(t) {
		t.Run(string(version), func(t *testing.T) {
			r := version.rules()
			require.NotNil(t, r)
			require.Equal(t, version, r.version)
			require.True(t, want.Stable)

			require.Equal(t, strings.HasPrefix(want.References, "[["), r.eventID == idGiven)
			require.Equal(t, want.HasEventID, r.eventID == idGiven)
			require.Equal(t, want.TwoSignatures, r.eventID == idGiven)
			require.Equal(t, want.EventID, map[idFormat]string{idGiven: "assigned by sender, $opaque:domain",
				idBase64: "reference hash, standard base64", idURL: "reference hash, URL-safe base64"}[r.eventID])
			require.Equal(t, want.MaxDepth, map[int64]string{1<<63 - 1: "2^63-1", 1<<53 - 1: "2^53-1"}[r.maxDepth])
			require.Equal(t, want.CanonicalJSON, r.canonicalJSON)
			require.Equal(t, want.KeyValidity, r.keyValidity)

			require.Equal(t, want.RoomID != "!opaque:domain", r.hashRoomID)
			require.Equal(t, want.CreateHasRoomID, !r.hashRoomID)
			require.Equal(t, want.CreateInAuthEvents == "forbidden", r.hashRoomID)
			require.Equal(t, want.AdditionalCreators, r.hashRoomID)
			require.Equal(t, want.InfinitePower, r.hashRoomID)
			require.Equal(t, want.CreatorInContent, r.creatorInContent)

			require.Equal(t, want.StringLevels, r.stringLevels)
			require.Equal(t, want.FloatLevels, r.floatLevels)
			require.Equal(t, want.Notifications, r.notifications)
			require.Equal(t, want.Aliases, r.aliases)
			require.Equal(t, want.RedactionRule, r.redactionRule)
			require.Equal(t, want.Knock, r.knock)
			require.Equal(t, want.Restricted, r.restricted)
			require.Equal(t, want.KnockRestricted, r.knockRestricted)

			keys, _ := r.redaction.keeps("m.room.redaction")
			require.Equal(t, want.RedactsAt == "content", slices.Equal(keys, []string{"redacts"}))
			if same := redaction[want.Redaction]; same != nil {
				require.Same(t, same, r.redaction)
			}
			redaction[want.Redaction] = r.redaction
		})
	}
	require.Len(t, redaction, 5)
}

func TestRoomRules_Redaction(t *testing.T) {
	var file struct {
		Versions map[RoomVersion]struct {
			TopLevel []string            `json:"keep_top_level"`
			Content  map[string][]string `json:"keep_content"`
		} `json:"room_versions"`
	}
	loadCoreVectors(t, "redaction_rules.json", &file)
	require.Len(t, file.Versions, 12)
	for version, want := range file.Versions {
		t.Run(string(version), func(t *testing.T) {
			r := version.rules().redaction
			require.ElementsMatch(t, want.TopLevel, r.topLevel)
			require.Equal(t, slices.Contains(want.Content["m.room.member"], "third_party_invite.signed"), r.signed)
			for typ, members := range want.Content {
				members = slices.DeleteFunc(members, func(m string) bool { return m == "third_party_invite.signed" })
				keys, all := r.keeps(typ)
				require.ElementsMatch(t, members, keys, typ)
				require.Equal(t, slices.Contains(members, "*"), all, typ)
			}
			others := []string{"m.room.message", "m.room.name", "m.room.encryption", "M.ROOM.MEMBER", ""}
			for _, typ := range slices.AppendSeq(others, maps.Keys(r.content)) {
				if want.Content[typ] != nil {
					continue
				}
				keys, all := r.keeps(typ)
				require.Empty(t, keys, typ)
				require.False(t, all, typ)
			}
		})
	}
}

// A version that is not known has no rules, however much its name looks like one that is.
func TestRoomVersion_Unknown(t *testing.T) {
	var file struct {
		Valid   []RoomVersion `json:"room_version_names_valid"`
		Invalid []RoomVersion `json:"room_version_names_invalid_by_grammar"`
	}
	loadCoreVectors(t, "identifiers.json", &file)
	require.Contains(t, file.Valid, RoomVersion("1"))
	require.NotEmpty(t, file.Invalid)
	for _, v := range file.Valid {
		require.Equal(t, v == "1", v.rules() != nil, "%q", v)
	}
	for _, v := range file.Invalid {
		require.Nil(t, v.rules(), "%q", v)
	}
	for _, v := range []RoomVersion{"0", "13", "01", "1 ", " 1", "1.0", "+1", "-1", "10\n", "１", "org.matrix.msc3757.10"} {
		require.Nil(t, v.rules(), "%q", v)
	}
}
