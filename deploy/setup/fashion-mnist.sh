#!/usr/bin/env bash
# Finds or fetches Fashion-MNIST (four gzipped IDX files) and prints the folder that holds it.
#
# Order: $FASHION_MNIST, the folder of Debian's package, an earlier download of ours, the package by apt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

package=dataset-fashion-mnist
installed=/usr/share/datasets/fashion-mnist
unpacked=$deps/fashion-mnist
files=(train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)

complete() {
    local file
    for file in "${files[@]}"; do
        [[ -s $1/$file.gz || -s $1/$file ]] || return 1
    done
}

if [[ -n ${FASHION_MNIST:-} ]]; then
    complete "$FASHION_MNIST" || fail "FASHION_MNIST is $FASHION_MNIST, which lacks one of ${files[*]} (or .gz)" \
        "put the four files there, or unset FASHION_MNIST to have them fetched"
    echo "$FASHION_MNIST"
    exit
fi
for folder in "$installed" "$unpacked"; do
    if complete "$folder"; then
        echo "$folder"
        exit
    fi
done

by_hand="put the files ${files[*]} (.gz or not) in one folder and export FASHION_MNIST=<that folder>"
command -v apt-get >/dev/null || fail "Fashion-MNIST is not here and there is no apt-get to fetch it" "$by_hand"

say "fetching Fashion-MNIST (Debian package $package, 31 MB, once)"
if ((EUID == 0)); then
    apt-get update -qq >&2 || say "apt-get update failed; trying with the package lists that are here"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >&2 || true
    if complete "$installed"; then
        echo "$installed"
        exit
    fi
fi

# Without root, or where the system drops such files, the package is unpacked into our own folder.
mkdir -p "$deps"
work=$(mktemp -d "$deps/fashion-mnist.XXXXXX")
trap 'rm -rf "$work"' EXIT
if (cd "$work" && apt-get download -qq "$package" >&2) && dpkg -x "$work"/"$package"_*.deb "$work/tree" &&
    complete "$work/tree$installed"; then
    rm -rf "$unpacked"
    mv "$work/tree$installed" "$unpacked"
    echo "$unpacked"
else
    fail "apt-get could not download $package; its message is above" "run \`apt-get update\` as root once, or $by_hand"
fi
