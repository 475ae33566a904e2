#!/usr/bin/env bash
# Our all-reduce beside PyTorch's Gloo, on one host and over links made for it. `make bench-allreduce` builds first,
# then calls this. CASES="shm2 veth" picks cases; arguments are passed on to allreduce.py, such as --rounds 5 or --strict.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$(deploy/setup/python-torch.sh)
exec "$python" tests/bench/allreduce.py --worker "$PWD/target/release/worker" --json target/bench-allreduce.json \
    ${CASES:+--cases "$CASES"} "$@"
