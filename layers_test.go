package mxfed_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// layers is the order in which the package is read, bottom to top: a file uses what files above it in this list declare,
// and nothing of those below. A file that is not listed fails the test.
var layers = []string{
	"canonicaljson.go", "jsonvalue.go", "signing.go", "roomversion.go", "errors.go", "identifiers.go", "powerlevels.go", "event.go", "eventsignatures.go", "auth.go", "room.go", "receive.go", "draft.go",
	"wellknown.go", "resolve.go", "keys.go", "keydocument.go", "keyring.go", "verify.go", "client.go", "server.go", "policy.go",
	"strippedstate.go", "invite.go", "membership.go", "template.go", "makejoin.go", "joinanswer.go", "joincheck.go", "sendjoin.go",
	"join.go", "leave.go", "knock.go", "stateserver.go", "fetchstate.go", "thirdparty.go", "onbind.go", "directory.go",
	"keyserver.go", "mxfed.go",
}

func TestLayers(t *testing.T) {
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	files = slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, "_test.go") })
	parsed := make(map[string]*ast.File)
	layerOf := make(map[string]int) // of every package-level name
	for _, f := range files {
		require.Contains(t, layers, f, "a new file needs a place in the order")
		file, err := parser.ParseFile(token.NewFileSet(), f, nil, 0)
		require.NoError(t, err)
		parsed[f] = file
		for _, name := range declared(file) {
			layerOf[name] = slices.Index(layers, f)
		}
	}
	for f, file := range parsed {
		own := slices.Index(layers, f)
		for _, name := range used(file) {
			if layer, ok := layerOf[name]; ok && layer > own {
				t.Errorf("%s uses %s of %s, which is above it", f, name, layers[layer])
			}
		}
	}
}

// declared lists the package-level names of a file; methods belong to their types, wherever they are.
func declared(file *ast.File) (names []string) {
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil {
				names = append(names, d.Name.Name)
			}
		case *ast.GenDecl:
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					names = append(names, s.Name.Name)
				case *ast.ValueSpec:
					for _, n := range s.Names {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

// used lists the names that a file mentions without declaring them: those of other files, and predeclared ones.
func used(file *ast.File) (names []string) {
	keys := make(map[*ast.Ident]bool) // of composite literals: fields, as far as they are names
	ast.Inspect(file, func(n ast.Node) bool {
		if kv, ok := n.(*ast.KeyValueExpr); ok {
			if id, ok := kv.Key.(*ast.Ident); ok {
				keys[id] = true
			}
		}
		return true
	})
	for _, id := range file.Unresolved {
		if !keys[id] {
			names = append(names, id.Name)
		}
	}
	return names
}

// TestSpecificationVersion keeps citations on one version of the specification.
func TestSpecificationVersion(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, ".md") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, rest := range strings.Split(string(text), "spec.matrix"+".org/")[1:] {
			require.True(t, strings.HasPrefix(rest, "v1.19/"), "%s cites %.40q", path, rest)
		}
		return err
	})
	require.NoError(t, err)
}
