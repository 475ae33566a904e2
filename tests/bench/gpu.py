"""Training images/s of four networks on one GPU in bfloat16 with channels-last memory, Lockstep beside PyTorch, eager and compiled.

Lockstep reads, enlarges and mirrors its images as in any job; PyTorch has them ready in the GPU's memory. Exit code 1 when
Lockstep is slower than --at-least times eager PyTorch.
"""

import argparse
import os
import sys
from pathlib import Path

from side_by_side import HERE, last_json, lockstep_rate, report

JOB = """name = "bench-gpu"
task = "classify"
seed = 1
steps = {steps}
global_batch = {batch}
logical_shards = 1
precision = "bf16"
memory_format = "channels-last"

[model]
name = "{network}"
classes = 10
batch_norm = "sync"

[data]
train = "fashion-mnist/train"
channels = 3
augment = [{{ name = "resize", size = {side} }}, {{ name = "flip" }}]

[optimizer]
name = "sgd"
lr = 0.01
momentum = 0.9
weight_decay = 1e-4
"""

# The papers' image sizes.
SIDES = {"googlenet": 224, "inception-v3": 299, "inception-v4": 299, "inception-resnet-v2": 299}
WARMUP = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=80, help=f"the first {WARMUP} are not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--at-least", type=float, default=0.0, help="least ratio to eager PyTorch that is not a failure")
    parser.add_argument("--eager-only", action="store_true", help="do not compile, which takes minutes")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(SIDES)}")
    arguments = parser.parse_args()

    job = Path(os.environ["LOCKSTEP_DATA_DIR"], "bench-gpu.toml")
    slow = []
    for network in arguments.cases or SIDES:
        side = SIDES[network]
        job.write_text(JOB.format(network=network, batch=arguments.batch, steps=arguments.steps, side=side))
        run = [arguments.coordinator, "run", job, "--fresh", "--json", "--devices", "cuda:0"]
        peer = [sys.executable, HERE / "gpu_peer.py", "--data", arguments.data, "--network", network, "--side", side,
                "--batch", arguments.batch, "--warmup", WARMUP, "--steps", arguments.steps - WARMUP]
        peers = {"PyTorch, eager": peer}
        if not arguments.eager_only:
            peers["PyTorch, compiled"] = [*peer, "--compile"]
        rates = {"Lockstep": [], **{name: [] for name in peers}}
        for number in range(1, arguments.rounds + 1):
            rates["Lockstep"].append(lockstep_rate(last_json(list(map(str, run)), os.environ), WARMUP))
            for name, command in peers.items():
                rates[name].append(last_json(list(map(str, command)), os.environ)["images_per_second"])
            told = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
            print(f"round {number}: {told} images/s", file=sys.stderr)
        title = f"{network} at {side}, batch {arguments.batch}, bf16"
        ratios = {name: report(title, [("Lockstep", rates["Lockstep"]), (name, rates[name])]) for name in peers}
        if ratios["PyTorch, eager"] < arguments.at_least:
            slow.append(f"{title}: {ratios['PyTorch, eager']:.2f}x")
    if slow:
        sys.exit(f"error: less than the {arguments.at_least:.2f}x asked for: {'; '.join(slow)}")


if __name__ == "__main__":
    main()
