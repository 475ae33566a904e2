#!/usr/bin/env bash
# Training images/s on a GPU, Lockstep beside PyTorch. `make bench-gpu` builds first, then calls this. It needs a GPU, a LIBTORCH
# with CUDA, and a Python (PYTHON=..., else python3) that has torch with CUDA, torchvision and timm.
# Arguments are passed on to gpu.py, such as googlenet --rounds 3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source tests/bench/store.sh
"${PYTHON:-python3}" tests/bench/gpu.py --coordinator "$coordinator" --data "$data" "$@"
