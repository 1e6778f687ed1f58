package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"example.org/mxfed"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestRun compares all that is printed, IDs included: it shows too that nothing depends on chance.
func TestRun(t *testing.T) {
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			var got bytes.Buffer
			require.NoError(t, run(t.Context(), &got, mxfed.RoomVersion(version)))
			golden := filepath.Join("testdata", "version"+version+".golden")
			if *update {
				require.NoError(t, os.WriteFile(golden, got.Bytes(), 0o644))
			}
			want, err := os.ReadFile(golden)
			require.NoError(t, err)
			require.Equal(t, string(want), got.String())
		})
	}
}

func TestRun_UnknownVersion(t *testing.T) {
	for _, version := range []mxfed.RoomVersion{"", "0", "13", "012", "org.example.12"} {
		var got bytes.Buffer
		require.ErrorContains(t, run(t.Context(), &got, version), "is not supported", "%q", version)
		require.Empty(t, got.String())
	}
}
