#!/usr/bin/env bash
# Prints the folder that holds torchvision for the Python of python-torch.sh, to be put on PYTHONPATH. Only the loader's
# benchmark needs it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

python=$("$repo/deploy/setup/python-torch.sh")
target=$deps/bench-vision
requirements=$repo/deploy/setup/python-vision-requirements.txt
stamp=$target/.complete

works() { PYTHONPATH=$target "$python" -c 'import torchvision.io, PIL; torchvision.io.decode_jpeg' 2>/dev/null; }

if ! cmp -s "$requirements" "$stamp" || ! works; then
    say "fetching $(grep -o '^torchvision==[0-9.]*' "$requirements") for the benchmark (once)"
    rm -rf "$target"
    pip() { "$python" -m pip --quiet --disable-pip-version-check install --no-deps --target "$target" --requirement "$requirements" "$@" >&2; }
    # PyTorch without CUDA needs torchvision without it, which its own index has.
    if "$python" -c 'import sys, torch; sys.exit("+cpu" not in torch.__version__)'; then
        pip --index-url https://download.pytorch.org/whl/cpu
    else
        pip
    fi || fail "pip could not install $requirements; its message is above" "check the network"
    works || fail "torchvision does not start beside this PyTorch" "remove $target and $deps/bench-venv and try again"
    cp "$requirements" "$stamp"
fi
echo "$target"
