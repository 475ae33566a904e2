"""Runs Lockstep and PyTorch DistributedDataParallel in turn on the same work and prints a table.

In turn (A, B, A, B, ...), because the speed of a machine drifts; medians, because one run may be disturbed.
Exit code 1 when Lockstep is slower than --at-least times PyTorch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def last_json(command, environment):
    """The JSON object that ends the standard output of `command`."""
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if result.returncode != 0:
        sys.exit(f"error: `{' '.join(map(str, command))}` ended with exit code {result.returncode}")
    text = result.stdout.strip()
    for begin in (0, text.rfind("\n{") + 1):
        try:
            return json.loads(text[begin:])
        except json.JSONDecodeError:
            continue
    sys.exit(f"error: `{' '.join(map(str, command))}` printed no JSON object at its end")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", type=Path, required=True)
    parser.add_argument("--job", type=Path, default=HERE / "step.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=0.0, help="least ratio that is not a failure")
    arguments = parser.parse_args()

    # One intra-op thread per process on both sides.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lockstep_command = [arguments.coordinator, "run", arguments.job, "--workers", "2", "--threads", "1"]
    peer_command = [sys.executable, HERE / "step_ddp.py", "--data", arguments.data]

    lockstep, peer = [], []
    for round_number in range(1, arguments.rounds + 1):
        lockstep.append(last_json(lockstep_command, environment)["metrics"]["images_per_second"])
        peer.append(last_json(peer_command, environment)["images_per_second"])
        print(f"round {round_number}: Lockstep {lockstep[-1]:.0f}, PyTorch DDP {peer[-1]:.0f} images/s", file=sys.stderr)

    ratio = statistics.median(lockstep) / statistics.median(peer)
    print(f"{'2 workers x 1 thread, global batch 128':<44} {'median':>8} {'lowest':>8} {'highest':>8}  images/s")
    for name, rates in (
        ("Lockstep, synchronized batch norm", lockstep),
        ("PyTorch DDP, Gloo, local batch norm", peer),
    ):
        print(f"{name:<44} {statistics.median(rates):>8.0f} {min(rates):>8.0f} {max(rates):>8.0f}")
    print(f"{'ratio':<44} {ratio:>7.2f}x")
    if ratio < arguments.at_least:
        sys.exit(f"error: {ratio:.2f}x is less than the {arguments.at_least:.2f}x asked for")


if __name__ == "__main__":
    main()
