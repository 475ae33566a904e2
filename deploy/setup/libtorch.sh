#!/usr/bin/env bash
# Makes libtorch 2.11.0 available to the build and prints its folder.
#
# An exported LIBTORCH that holds a libtorch is used as it is. Otherwise three pinned, hash-checked wheels are
# unpacked into .deps/libtorch (or $LOCKSTEP_DEPS/libtorch), where .cargo/config.toml looks for them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [[ -n ${LIBTORCH:-} ]]; then
    [[ -e $LIBTORCH/lib/libtorch_cpu.so ]] || fail "LIBTORCH is $LIBTORCH, which has no lib/libtorch_cpu.so" \
        "point LIBTORCH at an unpacked libtorch 2.11.0, or unset it to have one fetched"
    echo "$LIBTORCH"
    exit
fi

requirements=$repo/deploy/setup/libtorch-requirements.txt
target=$deps/libtorch
stamp=$target/.complete

# The stamp holds the requirements it was made from, so that a new pin unpacks again.
if [[ -e $target/torch/lib/libtorch_cpu.so ]] && cmp -s "$requirements" "$stamp"; then
    echo "$target/torch"
    exit
fi

[[ $(uname -s)-$(uname -m) == Linux-x86_64 ]] || fail "there are pinned libtorch wheels for Linux x86_64 only" \
    "get libtorch 2.11.0 for $(uname -s) $(uname -m) and export LIBTORCH=<its folder>"
command -v python3 >/dev/null || fail "python3 is missing; it unpacks libtorch" "apt-get install python3 python3-pip"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip; it fetches libtorch" "apt-get install python3-pip"

mkdir -p "$deps"
# Measured: 1.2 GB unpacked, and as much again for the wheels and pip's temporary copies.
needed_kib=$((3 * 1024 * 1024))
free_kib=$(df -Pk "$deps" | awk 'NR == 2 { print $4 }')
((free_kib > needed_kib)) || fail "$deps has $((free_kib / 1024)) MiB free; libtorch needs 3072 MiB to unpack" \
    "make room, or export LOCKSTEP_DEPS=<folder on a larger disk> and LIBTORCH=\$LOCKSTEP_DEPS/libtorch/torch"

work=$(mktemp -d "$deps/libtorch.XXXXXX")
trap 'rm -rf "$work"' EXIT
say "fetching libtorch 2.11.0 (0.5 GB, once)"
# The tags are those of the pinned wheels; without them pip would choose by the host's Python and C library.
# Its temporary files go beside the target: /tmp may be small, and a move within one disk is free.
TMPDIR=$work PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-input --no-cache-dir --no-compile \
    --target "$work/tree" --require-hashes --requirement "$requirements" --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --abi cp311 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 >&2 ||
    fail "pip could not fetch libtorch; its message is above" \
        "check the network or PIP_INDEX_URL and run \`make libtorch\` again"

cp "$requirements" "$work/tree/.complete"
rm -rf "$target"
mv "$work/tree" "$target"
echo "$target/torch"
