"""Training images/s of three networks, Lockstep beside PyTorch: one process of two threads, and two of one.

PyTorch's two processes each normalize by their own half of the batch, so Lockstep does that too there, beside what it does
unless it is told otherwise: both workers by the whole batch. Exit code 1 when Lockstep, with the batch norm that PyTorch
has, is slower than --at-least times PyTorch in any of the six.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from side_by_side import HERE, alternate, report

JOB = """name = "bench-train"
task = "classify"
seed = 1
steps = {steps}
global_batch = {batch}
logical_shards = {shards}
memory_format = "{memory_format}"

[model]
name = "{network}"
classes = 10
batch_norm = "{batch_norm}"
{options}

[data]
train = "fashion-mnist/train"
{data}

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.9
weight_decay = 5e-4
"""

LARGER = """channels = 3
augment = [{{ name = "resize", size = {side} }}, {{ name = "flip" }}]"""


@dataclass
class Case:
    side: int
    batch: int
    steps: int
    options: str


# Of about ten seconds on two cores. At 75 x 75 Inception v3 has no auxiliary head.
CASES = {
    "nin": Case(28, 128, 60, 'widths = "mnist"\ndropout = 0.2\nfinal_relu = false'),
    "googlenet": Case(32, 64, 60, "dropout = 0.2"),
    "inception-v3": Case(75, 32, 30, "aux = false\ndropout = 0.2"),
}
WARMUP = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=2, help="logical shards of Lockstep's jobs: as many as cores")
    parser.add_argument("--memory-format", choices=["contiguous", "channels-last"], default="contiguous",
                        help="of Lockstep's jobs")
    parser.add_argument("--at-least", type=float, default=0.0, help="least ratio that is not a failure")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}")
    arguments = parser.parse_args()

    slow = []
    for network in arguments.cases or CASES:
        case = CASES[network]
        data = 'augment = [{ name = "flip" }]' if case.side == 28 else LARGER.format(side=case.side)
        jobs = {}
        for batch_norm in "local", "sync":
            jobs[batch_norm] = Path(os.environ["LOCKSTEP_DATA_DIR"], f"bench-train-{batch_norm}.toml")
            jobs[batch_norm].write_text(JOB.format(
                network=network, options=case.options, batch=case.batch, steps=case.steps,
                shards=arguments.shards if batch_norm == "sync" else 2,  # a half each
                memory_format=arguments.memory_format, batch_norm=batch_norm, data=data))  # fmt: skip
        whole = ("Lockstep, synchronized batch norm", jobs["sync"])
        halves = ("Lockstep, local batch norm", jobs["local"])
        for workers, threads in (1, 2), (2, 1):
            peer = [HERE / "step_ddp.py", "--data", arguments.data, "--network", network, "--side", case.side,
                    "--workers", workers, "--threads", threads, "--global-batch", case.batch,
                    "--steps", case.steps - WARMUP]
            peer = [str(argument) for argument in peer]
            names, own = zip(*([whole] if workers == 1 else [halves, whole]))
            rates = alternate(arguments.coordinator, own, peer, workers, threads, arguments.rounds, WARMUP)
            title = f"{network} at {case.side}, batch {case.batch}, {workers} x {threads} threads"
            name = "PyTorch DDP, Gloo, local batch norm" if workers > 1 else "PyTorch"
            ratio = report(title, list(zip([*names, name], rates)))
            if ratio < arguments.at_least:
                slow.append(f"{title}: {ratio:.2f}x")
    if slow:
        sys.exit(f"error: less than the {arguments.at_least:.2f}x asked for: {'; '.join(slow)}")


if __name__ == "__main__":
    main()
