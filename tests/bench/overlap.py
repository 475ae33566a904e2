"""What part of a step waits for other workers, hidden by no computing: the demo network and the GAN on 2 workers.

`gradients` is the wait between the end of backward and its reduced gradients; `batch norm, rest` is what else no
computing hides: meeting for synchronized batch norm's sums, and one worker waiting for a slower one.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

from step import last_json

HERE = Path(__file__).resolve().parent
LINE = "{:<34} {:>9} {:>20} {:>22}"


def shortened(job, steps, folder):
    """The same job for `steps` steps, on 2 workers."""
    text, found = re.subn(r"(?m)^(epochs|steps) = \d+", f"steps = {steps}", job.read_text(), count=1)
    if not found:
        sys.exit(f"error: {job} has neither `epochs` nor `steps`")
    path = Path(folder) / job.name
    path.write_text(text)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--at-most", type=float, default=1.0, help="largest share of NIN's gradients, or exit code 1")
    arguments = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    jobs = {
        "NIN (tests/bench/step.toml)": HERE / "step.toml",
        "GAN (jobs/fashion-gan.toml)": HERE.parents[1] / "jobs" / "fashion-gan.toml",
    }
    found = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for name, job in jobs.items():
                path = shortened(job, arguments.steps, folder)
                command = [arguments.coordinator, "run", path, "--fresh", "--workers", "2", "--threads", "1"]
                found[name].append(last_json(command, environment)["metrics"])

    print(LINE.format("2 workers x 1 thread", "ms/step", "gradients", "batch norm, rest"))
    shares = {}
    for name, rounds in found.items():
        median = lambda value: statistics.median(map(value, rounds))  # noqa: E731
        step = median(lambda m: m["step_seconds"])
        gradients = median(lambda m: m["grad_wait_seconds"])
        rest = median(lambda m: m["comm_seconds"] - m["grad_wait_seconds"])
        shares[name] = gradients / step
        cell = lambda seconds: f"{seconds * 1e3:.2f} ms ({seconds / step:.1%})"  # noqa: E731
        print(LINE.format(name, f"{step * 1e3:.1f}", cell(gradients), cell(rest)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    first = next(iter(shares.values()))
    if first > arguments.at_most:
        sys.exit(f"error: NIN waits {first:.1%} of its step for gradients, more than {arguments.at_most:.1%}")


if __name__ == "__main__":
    main()
