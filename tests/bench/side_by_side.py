"""Lockstep and PyTorch in turn on the same work.

In turn (A, B, A, B, ...), because the speed of a machine drifts; medians, because one run may be disturbed.
"""

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


def lockstep_rate(report, warmup):
    """Images per second of a finished run after its first `warmup` steps."""
    metrics = Path(os.environ["LOCKSTEP_DATA_DIR"], "jobs", report["job"], "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line and line["step"] > warmup]
    return sum(step["samples"] for step in steps) / sum(step["seconds"] for step in steps)


def alternate(coordinator, jobs, peer, workers, threads, rounds, warmup):
    """Images per second of Lockstep on `workers` with `threads` each, job by job, and of the Python program `peer`: a list
    of rounds for each.

    Neither counts its first `warmup` steps; `peer` is told of them here.
    """
    peer = [*peer, "--warmup", str(warmup)]
    # Both sides are told how many intra-op threads a process has.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    options = ["--fresh", "--workers", str(workers), "--threads", str(threads)]
    rates = [[] for _ in range(len(jobs) + 1)]
    for round_number in range(1, rounds + 1):
        for job, own in zip(jobs, rates):
            own.append(lockstep_rate(last_json([coordinator, "run", job, *options], environment), warmup))
        rates[-1].append(last_json([sys.executable, *peer], environment)["images_per_second"])
        newest = ", ".join(f"{own[-1]:.0f}" for own in rates)
        print(f"round {round_number}: {newest} images/s, the last of PyTorch", file=sys.stderr)
    return rates


def report(title, sides):
    """Prints a table of (name, rates), of Lockstep and at last of PyTorch. Returns the ratio of the first's median to the
    last's.
    """
    print(f"{title:<44} {'median':>8} {'lowest':>8} {'highest':>8}  images/s")
    for name, rates in sides:
        print(f"{name:<44} {statistics.median(rates):>8.0f} {min(rates):>8.0f} {max(rates):>8.0f}")
    peer = statistics.median(sides[-1][1])
    ratios = [statistics.median(rates) / peer for _, rates in sides[:-1]]
    for (name, _), ratio in zip(sides, ratios):
        print(f"{'ratio' if len(ratios) == 1 else 'ratio of ' + name:<44} {ratio:>7.2f}x", flush=True)
    return ratios[0]
