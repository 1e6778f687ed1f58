// Package benchmarks measures mxfed and gomatrixserverlib at the same jobs on the same data, in one run:
//
//	go test -bench . -count 6 | tee out.txt && benchstat -col /lib out.txt
//
// Only ratios of one run mean anything. mxfed goes through its public API with every check on; gomatrixserverlib through
// the functions that a homeserver would call for the job.
package benchmarks
