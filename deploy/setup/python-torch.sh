#!/usr/bin/env bash
# Prints a Python that has PyTorch 2.11.0, the peer that Lockstep is measured against. Lockstep itself needs none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

requirements=$repo/deploy/setup/python-torch-requirements.txt
venv=$deps/bench-venv
stamp=$venv/.complete

if [[ ! -x $venv/bin/python ]] || ! cmp -s "$requirements" "$stamp"; then
    command -v python3 >/dev/null || fail "python3 is missing" "apt-get install python3 python3-venv"
    say "making a Python with PyTorch 2.11.0 in $venv (once)"
    rm -rf "$venv"
    python3 -m venv "$venv" >&2 || fail "python3 has no venv module" "apt-get install python3-venv"
    pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" >&2; }
    # PyTorch's own index has a build without CUDA, 0.2 GB; that of PyPI brings 2.5 GB of CUDA libraries along.
    pip install --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu torch==2.11.0 2>/dev/null ||
        pip install torch==2.11.0 ||
        fail "pip could not install PyTorch 2.11.0; its message is above" \
            "check the network, and that python3 is 3.11 or later and PyTorch has wheels for it"
    pip install --only-binary=:all: --requirement "$requirements" ||
        fail "pip could not install $requirements; its message is above" "check the network, and that python3 is 3.11 or later"
    "$venv/bin/python" -c 'import torch; assert torch.__version__.startswith("2.11.0")' >&2 ||
        fail "PyTorch does not start; Python's message is above" "remove $venv and try again"
    cp "$requirements" "$stamp"
fi
echo "$venv/bin/python"
