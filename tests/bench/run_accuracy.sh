#!/usr/bin/env bash
# Trains the small recipes of jobs/fashion, one after the other. `make bench-accuracy` builds first, then calls this.
# Arguments are passed on to accuracy.py, such as nin googlenet, or --workers 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source tests/bench/store.sh
python3 tests/bench/accuracy.py --coordinator "$coordinator" --json target/bench-accuracy.json "$@"
