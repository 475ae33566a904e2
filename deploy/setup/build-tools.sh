#!/usr/bin/env bash
# Makes cmake and nasm available, with which libjpeg-turbo is built, and prints the folder of those that are not on the path.
#
# cmake comes from a wheel that has all it needs, checked by its hash, nasm from Debian's package, whose list is signed. Both
# are unpacked into .deps/tools: no root needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

requirements=$repo/deploy/setup/cmake-requirements.txt
tools=$deps/tools
bin=$tools/bin
mkdir -p "$bin"

# A cmake that this script did not fetch is left alone; the one that it fetched is replaced when the pin changes.
stamp=$tools/cmake/.complete
system_cmake=$(command -v cmake || true)
if [[ -z $system_cmake || $system_cmake -ef $bin/cmake ]] && ! cmp -s "$requirements" "$stamp"; then
    say "fetching $(grep -o '^cmake==[0-9.]*' "$requirements") (once)"
    python3 -m pip --version >/dev/null 2>&1 || fail "neither cmake nor pip is here" "apt-get install cmake"
    rm -rf "$tools/cmake"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-input --only-binary=:all: \
        --no-deps --require-hashes --target "$tools/cmake" --requirement "$requirements" >&2 ||
        fail "pip could not fetch cmake; its message is above" "apt-get install cmake"
    ln -sf ../cmake/cmake/data/bin/cmake "$bin/cmake"
    "$bin/cmake" --version >/dev/null || fail "the cmake that pip fetched does not start" "apt-get install cmake"
    cp "$requirements" "$stamp"
fi

if [[ $(uname -m) == x86_64 ]] && ! command -v nasm >/dev/null && [[ ! -x $bin/nasm ]]; then
    say "fetching nasm (Debian package, once)"
    command -v apt-get >/dev/null || fail "nasm is not here and there is no apt-get to fetch it" "install nasm"
    work=$(mktemp -d "$tools/nasm.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    download() { (cd "$work" && apt-get download -qq nasm >&2) && dpkg -x "$work"/nasm_*.deb "$work/tree"; }
    # A new machine has no package lists, and only root can fetch them.
    download 2>/dev/null || { ((EUID == 0)) && apt-get update -qq >&2 && download; } ||
        fail "apt-get could not download nasm" "apt-get update && apt-get install nasm, as root"
    mv "$work/tree/usr/bin/nasm" "$bin/nasm"
fi
echo "$bin"
