#!/usr/bin/env bash
# Makes `cargo nextest` available and prints the program: the one on the path, or a pinned one built into .deps/tools.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

version=0.9.143
tools=$deps/tools

found=$(command -v cargo-nextest || true)
[[ -n $found ]] || found=$tools/bin/cargo-nextest
if [[ ! -x $found ]]; then
    say "building cargo-nextest $version (some minutes, once)"
    cargo install --quiet --locked --root "$tools" "cargo-nextest@$version" >&2 ||
        fail "cargo-nextest $version could not be built; cargo's message is above" \
            "check the network, or install any cargo-nextest 0.9 and put it on the path"
fi
echo "$found"
