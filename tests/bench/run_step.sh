#!/usr/bin/env bash
# Images/s of the demo network, Lockstep beside PyTorch. `make bench-step` builds first, then calls this.
# Arguments are passed on to step.py, such as --rounds 5 or --at-least 1.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$(deploy/setup/python-torch.sh)
source tests/bench/store.sh
"$python" tests/bench/step.py --coordinator "$coordinator" --data "$data" "$@"
