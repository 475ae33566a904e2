# shellcheck shell=bash
# Sourced by benchmarks that train on Fashion-MNIST: sets `coordinator` and `data`, and imports that into a data directory of
# their own, so that they neither see nor leave anything among the user's jobs.
data=$(deploy/setup/fashion-mnist.sh)
coordinator=$PWD/target/release/coordinator
LOCKSTEP_DATA_DIR=$(mktemp -d)
export LOCKSTEP_DATA_DIR
trap 'rm -rf "$LOCKSTEP_DATA_DIR"' EXIT
"$coordinator" dataset add fashion-mnist --format idx "$data" >&2
