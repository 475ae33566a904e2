# Sourced by the scripts beside it: where the repository is, and how they speak.
# shellcheck shell=bash

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034  # read by the scripts that source this file
deps=${LOCKSTEP_DEPS:-$repo/.deps}

say() { printf '%s\n' "$*" >&2; }

# fail WHAT HINT: one line that says what is wrong, one that says what to do.
fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}
