#!/usr/bin/env bash
# Prints a Python that has PyTorch 2.11.0 and the libraries whose networks the parity tests hold ours against.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

setup=$repo/deploy/setup
libraries=$setup/python-parity-requirements.txt
dependencies=$setup/python-parity-dependencies.txt
torch=$("$setup/python-torch.sh")
venv=$deps/parity-venv
stamp=$venv/.complete

if [[ ! -x $venv/bin/python ]] || ! cat "$libraries" "$dependencies" | cmp -s - "$stamp"; then
    say "making a Python with torchvision, timm and others in $venv (once)"
    rm -rf "$venv"
    "$torch" -m venv "$venv" >&2 || fail "$torch cannot make a venv" "apt-get install python3-venv"
    # PyTorch itself is that of the other Python.
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$torch" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/torch.pth"
    pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check install "$@" >&2; }
    pip --only-binary=:all: --requirement "$dependencies" && pip --no-deps --requirement "$libraries" ||
        fail "pip could not install the libraries; its message is above" "check the network, and that python3 is 3.11 or later"
    "$venv/bin/python" -c 'import timm, torch, torchvision; assert torch.__version__.startswith("2.11.0")' >&2 ||
        fail "the libraries do not start; Python's message is above" "remove $venv and try again"
    cat "$libraries" "$dependencies" >"$stamp"
fi
echo "$venv/bin/python"
