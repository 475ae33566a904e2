#!/usr/bin/env bash
# Images/s of the demo network, Lockstep beside PyTorch. `make bench-step` builds first, then calls this.
# Arguments are passed on to step.py, such as --rounds 5 or --at-least 1.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$(deploy/setup/python-torch.sh)
data=$(deploy/setup/fashion-mnist.sh)
coordinator=$PWD/target/release/coordinator

# An own data directory, so that the benchmark neither sees nor leaves anything among the user's jobs.
LOCKSTEP_DATA_DIR=$(mktemp -d)
export LOCKSTEP_DATA_DIR
trap 'rm -rf "$LOCKSTEP_DATA_DIR"' EXIT

"$coordinator" dataset add fashion-mnist --format idx "$data" >&2
"$python" tests/bench/step.py --coordinator "$coordinator" --data "$data" "$@"
