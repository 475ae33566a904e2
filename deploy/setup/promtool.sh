#!/usr/bin/env bash
# Makes promtool available if that is easy: the one on the path, or Debian's unpacked into .deps/tools.
#
# The package is never installed: that would start a Prometheus server. Without promtool one test says that it skips.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

tools=$deps/tools/bin
if command -v promtool >/dev/null || [[ -x $tools/promtool ]]; then
    exit
fi
if ! command -v apt-get >/dev/null; then
    say "promtool is not here and there is no apt-get to fetch it; its test will be skipped"
    exit
fi
say "fetching promtool (Debian package prometheus, once)"
mkdir -p "$tools"
work=$(mktemp -d "$deps/promtool.XXXXXX")
trap 'rm -rf "$work"' EXIT
if (cd "$work" && apt-get download -qq prometheus >&2) && dpkg -x "$work"/prometheus_*.deb "$work/tree" &&
    [[ -x $work/tree/usr/bin/promtool ]]; then
    mv "$work/tree/usr/bin/promtool" "$tools/promtool"
else
    say "promtool could not be fetched; its test will be skipped"
fi
