#!/usr/bin/env bash
# Training images/s of several networks, Lockstep beside PyTorch. `make bench-train` builds first, then calls this.
# Arguments are passed on to train.py, such as nin googlenet, or --rounds 5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$(deploy/setup/python-torch.sh)
PYTHONPATH=$(deploy/setup/python-vision.sh)
export PYTHONPATH
source tests/bench/store.sh
"$python" tests/bench/train.py --coordinator "$coordinator" --data "$data" "$@"
