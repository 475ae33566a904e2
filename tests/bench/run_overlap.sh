#!/usr/bin/env bash
# What part of a step waits for other workers. `make bench-overlap` builds first, then calls this.
# Arguments are passed on to overlap.py, such as --rounds 5 or --at-most 0.05.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source tests/bench/store.sh
python3 tests/bench/overlap.py --coordinator "$coordinator" --json target/bench-overlap.json "$@"
