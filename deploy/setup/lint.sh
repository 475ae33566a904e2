#!/usr/bin/env bash
# Every check that needs no run of the programs. `make lint` calls it after libtorch is in place.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$repo"

say "lint: format"
cargo fmt --all --check || fail "the format differs from rustfmt's, see above" "cargo fmt --all"

say "lint: clippy"
cargo clippy --quiet --release --workspace --all-targets --locked -- -D warnings

say "lint: documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --release --workspace --no-deps --locked

say "lint: the crates that must not know libtorch"
for crate in lockstep-common lockstep-images lockstep-core lockstep-coordinator lockstep-member lockstep-sim; do
    tree=$(cargo tree --quiet --locked --edges normal,build,dev --package "$crate" --prefix none)
    if grep -qE '^(tch|torch-sys) ' <<<"$tree"; then
        fail "$crate depends on libtorch" "move the code to worker/; invariant 9 in ARCHITECTURE.md"
    fi
done

say "lint: shell scripts"
mapfile -t scripts < <(git ls-files -- '*.sh' .ci/run)
bash_status=0
for script in "${scripts[@]}"; do bash -n "$script" || bash_status=1; done
((bash_status == 0)) || fail "a shell script does not parse, see above" "bash -n <script>"
if command -v shellcheck >/dev/null; then
    shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
else
    say "lint: shellcheck is not installed, skipped (apt-get install shellcheck)"
fi

say "lint: dashboards and alerts"
queries=$(mktemp --suffix=.yml)
trap 'rm -f "$queries"' EXIT
python3 deploy/setup/check_metrics.py --queries "$queries"
if command -v promtool >/dev/null; then
    promtool check rules "$queries" >/dev/null
    promtool check config deploy/prometheus/prometheus.yml >/dev/null
    promtool test rules deploy/prometheus/alerts_test.yml >/dev/null
else
    say "lint: promtool is not installed, skipped (apt-get install prometheus)"
fi
say "lint: ok"
