#!/usr/bin/env bash
# Trains the small recipes of jobs/fashion, one after the other. `make bench-accuracy` builds first, then calls this.
# Arguments are passed on to accuracy.py, such as nin googlenet, or --workers 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

data=$(deploy/setup/fashion-mnist.sh)
coordinator=$PWD/target/release/coordinator

# An own data directory, so that the benchmark neither sees nor leaves anything among the user's jobs.
LOCKSTEP_DATA_DIR=$(mktemp -d)
export LOCKSTEP_DATA_DIR
trap 'rm -rf "$LOCKSTEP_DATA_DIR"' EXIT

"$coordinator" dataset add fashion-mnist --format idx "$data" >&2
python3 tests/bench/accuracy.py --coordinator "$coordinator" --json target/bench-accuracy.json "$@"
