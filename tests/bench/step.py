"""Runs Lockstep and PyTorch DistributedDataParallel in turn on the same work and prints a table.

Exit code 1 when Lockstep is slower than --at-least times PyTorch.
"""

import argparse
import sys
from pathlib import Path

from side_by_side import HERE, alternate, report


WARMUP = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", type=Path, required=True)
    parser.add_argument("--job", type=Path, default=HERE / "step.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=0.0, help="least ratio that is not a failure")
    arguments = parser.parse_args()

    peer = [HERE / "step_ddp.py", "--data", arguments.data]
    lockstep, ddp = alternate(arguments.coordinator, [arguments.job], peer, 2, 1, arguments.rounds, WARMUP)
    ratio = report("2 workers x 1 thread, global batch 128", [
        ("Lockstep, synchronized batch norm", lockstep),
        ("PyTorch DDP, Gloo, local batch norm", ddp),
    ])  # fmt: skip
    if ratio < arguments.at_least:
        sys.exit(f"error: {ratio:.2f}x is less than the {arguments.at_least:.2f}x asked for")


if __name__ == "__main__":
    main()
