"""Training images/s of four networks on one GPU in bfloat16 with channels-last memory, Lockstep beside PyTorch, eager and compiled.

Both train on enlarged images of Fashion-MNIST. Lockstep reads, mirrors and moves them as in any job; PyTorch has them ready in
the GPU's memory. Exit code 1 when Lockstep is slower than --at-least times eager PyTorch.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from step_ddp import enlarge, read_idx

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
train = "enlarged-{side}/train"
channels = 3
augment = [{{ name = "flip" }}]

[optimizer]
name = "sgd"
lr = 0.01
momentum = 0.9
weight_decay = 1e-4
"""

# The papers' image sizes.
SIDES = {"googlenet": 224, "inception-v3": 299, "inception-v4": 299, "inception-resnet-v2": 299}
WARMUP = 20
LOADED = 1024


def add_enlarged(coordinator, data, side):
    """Imports some of the images, enlarged, as the dataset enlarged-SIDE."""
    folder = Path(os.environ["LOCKSTEP_DATA_DIR"], f"enlarged-{side}")
    folder.mkdir()
    for part, count in ("train", LOADED), ("t10k", 128):
        images = torch.from_numpy(read_idx(data, f"{part}-images-idx3-ubyte")[:count].copy()).unsqueeze(1)
        labels = read_idx(data, f"{part}-labels-idx1-ubyte")[:count]
        for name, array in ("images-idx3", enlarge(images, side)[:, 0].numpy()), ("labels-idx1", labels):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    subprocess.run([coordinator, "dataset", "add", folder.name, "--format", "idx", folder], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


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
    networks = arguments.cases or list(SIDES)
    for side in {SIDES[network] for network in networks}:
        add_enlarged(arguments.coordinator, arguments.data, side)
    for network in networks:
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
