"""Runs our all-reduce and PyTorch's Gloo in turn on the same links and prints one table.

In turn (A, B, A, B, ...), because the speed of a machine drifts; medians, because one run may be disturbed.
Exit code 1 when something failed, and with --strict also when a bound is missed or a case was skipped.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from links import Veth, Wan

HERE = Path(__file__).resolve().parent
BUCKET = 25 << 20
SMALL = 4 << 10
GLOO_PORT = 29500

# What a QUIC packet of full size carries of ours, of what the link counts: IPv4 and UDP headers (28 bytes), QUIC's
# short header, tag and stream frame (36); a token bucket on Ethernet also counts its header (14).
QUIC_PAYLOAD = 1500 - 28 - 36
ETHERNET_FRAME = 1514


@dataclass
class Bound:
    """What is compared with what, and the limit."""

    text: str
    value: object  # (our seconds, theirs) -> the figure
    holds: object  # the figure -> whether it is met


def at_most(limit, of="Gloo's time"):
    return Bound(f"<= {limit:.3g} of {of}", lambda ours, theirs: ours / theirs, lambda ratio: ratio <= limit)


def at_least(share, of, seconds):
    """A share of a link on which the all-reduce would take `seconds`."""
    return Bound(f">= {share:.0%} of {of}", lambda ours, _: seconds / ours, lambda found: found >= share)


@dataclass
class Case:
    name: str
    what: str
    bounds: list
    size: int = BUCKET
    # In all, half of them on each end of a link.
    ranks: int = 2
    link: object = None
    ours: list = field(default_factory=lambda: ["--backend", "quic"])
    # What we are compared with: Gloo, or a second column of our own.
    against: str = "gloo"


def cases():
    shm = ["--backend", "shm"]
    # Shared memory on each host, one flow between them.
    auto = ["--backend", "auto"]
    bf16 = ["--backend", "quic", "--wire", "bf16"]
    # On two ranks every byte crosses the link once in each direction.
    gigabit = BUCKET * 8 / 1e9 * ETHERNET_FRAME / QUIC_PAYLOAD
    long_line = BUCKET * 8 / 200e6
    fast = {"ours": ["--backend", "auto", "--shards", "8", "--reduction", "exact,fast"], "against": "fast"}
    share = at_most(1.15, "fast's time")
    throughput = Bound(">= 0.95 of Gloo's rate", lambda ours, theirs: theirs / ours, lambda rate: rate >= 0.95)
    return [
        Case("shm2", "one host, 2 ranks, 25 MiB", [at_most(1 / 6)], ours=shm),
        Case("shm4", "one host, 4 ranks, 25 MiB", [at_most(1 / 4)], ranks=4, ours=shm),
        Case("small", "one host, 2 ranks, 4 KiB", [at_most(1 / 10)], size=SMALL, ours=shm),
        Case("veth", "veth, MTU 1500, 25 MiB", [at_most(1.5)], link=lambda: Veth(1500)),
        Case("veth-jumbo", "veth, MTU 9000, 25 MiB", [at_most(1.3)], link=lambda: Veth(9000)),
        Case("veth-2x2", "veth, MTU 1500, 2 + 2 ranks, 25 MiB", [at_most(1.5)], ranks=4, link=lambda: Veth(1500), ours=auto),
        Case("veth-bf16", "veth, MTU 1500, 25 MiB as bf16", [at_most(0.9)], link=lambda: Veth(1500), ours=bf16),
        Case("jumbo-bf16", "veth, MTU 9000, 25 MiB as bf16", [at_most(0.9)], link=lambda: Veth(9000), ours=bf16),
        Case(
            "tbf", "veth, 1 Gbit/s, 25 MiB", [throughput, at_least(0.95, "the link", gigabit)],
            link=lambda: Veth(1500, 1000),
        ),
        Case("wan", "200 Mbit/s, 40 ms, 25 MiB", [at_least(0.8, "the link", long_line)], link=Wan),
        Case(
            "wan-loss", "the same, 1% loss", [at_least(0.8, "the link", long_line), at_most(0.5)],
            link=lambda: Wan(loss_percent=1.0),
        ),
        Case("wan-small", "200 Mbit/s, 40 ms, 4 KiB", [at_most(0.4)], size=SMALL, link=Wan),
        Case("exact-fast2", "exact, 2 ranks, V = 8, 25 MiB", [share], **fast),
        Case("exact-fast4", "exact, 4 ranks, V = 8, 25 MiB", [share], ranks=4, **fast),
    ]  # fmt: skip


class Failed(Exception):
    pass


@contextlib.contextmanager
def started(command, **options):
    """A process that does not outlive the block."""
    process = subprocess.Popen([str(word) for word in command], text=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def result_of(process, limit):
    """The JSON on its standard output."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise Failed(f"no result within {limit} s") from None
    if process.returncode != 0:
        lines = [line for line in (err or "").splitlines() if line.startswith("error: ")]
        raise Failed(lines[0].removeprefix("error: ") if lines else f"exit code {process.returncode}")
    return json.loads(out)


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def ours(arguments, case, link):
    command = [arguments.worker, "bench", "allreduce", "--json", "--sizes", case.size, *case.ours]
    command += ["--seconds", arguments.seconds]
    if link is None:
        with started([*command, "--ranks", case.ranks], **PIPES) as process:
            return result_of(process, arguments.limit)["results"]
    half = ["--ranks", case.ranks // 2]
    with started(link.inside(0, [*command, *half, "--listen", f"{link.addresses[0]}:0"]), **PIPES) as leader:
        words = leader.stderr.readline()
        call = re.search(r"--peer (\S+) --secret (\S+)", words)
        if not call:
            raise Failed(words.strip() or "it did not listen")
        peer = [arguments.worker, "bench", "allreduce", *half, "--peer", call[1]]
        environment = {**os.environ, "LOCKSTEP_BENCH_SECRET": call[2]}
        with started(link.inside(1, peer), env=environment, stdout=subprocess.DEVNULL):
            return result_of(leader, arguments.limit)["results"]


def gloo(arguments, case, link):
    command = [sys.executable, HERE / "allreduce_gloo.py", "--world", case.ranks, "--sizes", case.size]
    command += ["--seconds", arguments.seconds]
    if link is None:
        with started(command, **PIPES) as process:
            return result_of(process, arguments.limit)["results"]
    address = ["--interface", link.interface, "--address", f"{link.addresses[0]}:{GLOO_PORT}"]
    with contextlib.ExitStack() as others:
        first = others.enter_context(started(link.inside(0, [*command, *address, "--rank", 0]), **PIPES))
        for rank in range(1, case.ranks):
            end = rank * 2 // case.ranks
            process = started(link.inside(end, [*command, *address, "--rank", rank]), stdout=subprocess.DEVNULL)
            others.enter_context(process)
        return result_of(first, arguments.limit)["results"]


def measure(arguments, case):
    """Seconds of ours and of theirs, a median per round."""
    mine, theirs = [], []
    with case.link() if case.link else contextlib.nullcontext() as link:
        for round_number in range(1, arguments.rounds + 1):
            rows = ours(arguments, case, link)
            mine.append(rows[0])
            theirs.append(gloo(arguments, case, link)[0] if case.against == "gloo" else rows[1])
            pair = [f"{row[-1]['median_seconds'] * 1e3:.3g} ms" for row in (mine, theirs)]
            print(f"{case.name}, round {round_number}: {pair[0]}, {case.against} {pair[1]}", file=sys.stderr)
    return mine, theirs


def spread(rows):
    """Median of the rounds' medians, shortest and longest of them, in ms."""
    medians = [row["median_seconds"] * 1e3 for row in rows]
    return f"{statistics.median(medians):.4g} ({min(medians):.4g}-{max(medians):.4g})"


def why_not(case):
    if case.link and os.geteuid() != 0:
        return "skipped: needs root for network namespaces"
    if case.link is not None and "wan" in case.name and not Path("/dev/net/tun").exists():
        return "skipped: needs /dev/net/tun"
    return None


LINE = "{:<12} {:<30} {:>22} {:>22} {:>7}  {:<26} {}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = cases()
    parser.add_argument("--worker", type=Path, required=True)
    parser.add_argument("--cases", default=" ".join(c.name for c in known), help="names, separated by spaces")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="measured per round and side")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run has failed")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bound is missed or a case skipped")
    arguments = parser.parse_args()
    by_name = {case.name: case for case in known}
    wanted = arguments.cases.split()
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        parser.error(f"no case `{unknown[0]}`; there are {', '.join(by_name)}")
    # So that links are taken down.
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, lambda number, _: sys.exit(128 + number))

    record, table, failed, missed, skipped = [], [], False, False, False
    for case in (by_name[name] for name in wanted):
        entry = {"case": case.name, "what": case.what}
        record.append(entry)
        reason = why_not(case)
        skipped |= reason is not None
        if not reason:
            try:
                mine, theirs = measure(arguments, case)
            except (Failed, OSError, subprocess.SubprocessError) as error:
                reason, failed = f"failed: {error}", True
        if reason:
            entry["reason"] = reason
            table.append(f"{case.name:<12} {case.what:<30} {reason}")
            continue
        medians = [statistics.median(row["median_seconds"] for row in rows) for rows in (mine, theirs)]
        entry.update(ours=mine, against=case.against, theirs=theirs, ratio=medians[0] / medians[1], bounds=[])
        for number, bound in enumerate(case.bounds):
            value = bound.value(*medians)
            met = bound.holds(value)
            missed |= not met
            entry["bounds"].append({"bound": bound.text, "value": value, "met": met})
            verdict = f"{'met' if met else 'MISSED'} ({value:.3f})"
            head = (case.name, case.what, spread(mine), spread(theirs), f"{entry['ratio']:.3f}")
            table.append(LINE.format(*(head if number == 0 else ("",) * 5), bound.text, verdict).rstrip())

    print(LINE.format("CASE", "WHAT", "OURS, ms", "GLOO (OR FAST), ms", "RATIO", "BOUND", "").rstrip())
    print("\n".join(table))
    if arguments.json:
        host = {"machine": platform.machine(), "kernel": platform.release(), "cores": os.cpu_count()}
        host["tcp_congestion_control"] = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        arguments.json.write_text(json.dumps({"host": host, "cases": record}, indent=1) + "\n")
    if failed or ((missed or skipped) and arguments.strict):
        sys.exit(1)


if __name__ == "__main__":
    main()
