#!/usr/bin/env bash
# JPEG decoding and cropping, side by side with torchvision. An argument or PHOTOS names a folder of JPEGs to use instead of
# made ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$(deploy/setup/python-torch.sh)
PYTHONPATH=$(deploy/setup/python-vision.sh)
export PYTHONPATH
photos=${1:-${PHOTOS:-}}
if [[ -z $photos ]]; then
    photos=target/bench-photos
    if [[ ! -e $photos/0399.jpg ]]; then "$python" tests/bench/photos.py "$photos" 400; fi
fi
# What cargo says of the build names the folder in which libjpeg-turbo was configured.
built=$(mktemp)
trap 'rm -f "$built"' EXIT
cargo build --quiet --release --locked --package lockstep-images --example throughput --message-format=json-render-diagnostics >"$built"
"$python" tests/bench/loader.py target/release/examples/throughput "$photos" "$built"
