#!/usr/bin/env bash
# What part of a step waits for other workers. `make bench-overlap` builds first, then calls this.
# Arguments are passed on to overlap.py, such as --rounds 5 or --at-most 0.05.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

data=$(deploy/setup/fashion-mnist.sh)
coordinator=$PWD/target/release/coordinator

# An own data directory, so that the benchmark neither sees nor leaves anything among the user's jobs.
LOCKSTEP_DATA_DIR=$(mktemp -d)
export LOCKSTEP_DATA_DIR
trap 'rm -rf "$LOCKSTEP_DATA_DIR"' EXIT

"$coordinator" dataset add fashion-mnist --format idx "$data" >&2
python3 tests/bench/overlap.py --coordinator "$coordinator" --json target/bench-overlap.json "$@"
