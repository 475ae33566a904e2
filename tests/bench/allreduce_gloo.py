"""The peer: all-reduce of f32 with PyTorch's Gloo, measured as `worker bench allreduce` measures ours.

Rank 0 prints one JSON object. The same loop as worker/src/bench/measure.rs: the buffer is filled, all ranks meet at a
barrier, the all-reduce is timed (a chain of small ones, shared out), the sum is checked; the slowest rank's time counts.
Gloo reduces in place.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist

WARM_UP = 3
FEWEST, MOST = 5, 20_000
PERIOD = 1021
SMALL_BYTES, CHAIN = 64 << 10, 10


def leaf(rank, elements):
    """What `rank` gives: whole numbers whose sums are exact in f32."""
    period = (torch.arange(PERIOD) + 31 * rank) % PERIOD - 510
    return period.to(torch.float32).repeat(math.ceil(elements / PERIOD))[:elements]


def measure(rank, world, size, arguments):
    elements = size // 4
    mine = leaf(rank, elements)
    expected = sum(leaf(other, elements) for other in range(world))
    buffers = [torch.empty(elements) for _ in range(CHAIN if size <= SMALL_BYTES else 1)]

    def once():
        for buffer in buffers:
            buffer.copy_(mine)
        dist.barrier()
        start = time.perf_counter()
        for buffer in buffers:
            dist.all_reduce(buffer)
        elapsed = (time.perf_counter() - start) / len(buffers)
        if not all(torch.equal(buffer, expected) for buffer in buffers):
            sys.exit(f"error: Gloo's sum of {elements} elements is wrong")
        return elapsed

    shortest = min(once() for _ in range(WARM_UP))
    slowest = torch.tensor(shortest, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    count = min(max(math.ceil(arguments.seconds / slowest.item() / len(buffers)), FEWEST), MOST)
    times = torch.tensor([once() for _ in range(count)], dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    seconds = times.tolist()
    median = statistics.median(seconds)
    return {
        "bytes": size, "iterations": count, "median_seconds": median,
        "min_seconds": min(seconds), "max_seconds": max(seconds), "gb_per_second": size / median * 1e-9,
    }  # fmt: skip


def run(rank, world, rendezvous, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    results = [measure(rank, world, size, arguments) for size in arguments.sizes]
    if rank == 0:
        print(json.dumps({"ranks": world, "torch": torch.__version__, "results": results}))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rank", type=int, help="run this rank only [default: all of them, on this host]")
    parser.add_argument("--address", help="host:port where rank 0 listens; with --rank")
    parser.add_argument("--interface", default="lo")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], required=True, help="bytes")
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()

    os.environ["GLOO_SOCKET_IFNAME"] = arguments.interface
    if arguments.rank is not None:
        return run(arguments.rank, arguments.world, f"tcp://{arguments.address}", arguments)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        torch.multiprocessing.spawn(
            run, (arguments.world, rendezvous, arguments), nprocs=arguments.world
        )


if __name__ == "__main__":
    main()
