"""Links between two hosts on one machine: network namespaces, joined as a measurement needs them. Needs root.

    with Veth(mtu=1500, rate_mbit=1000) as link:
        subprocess.run(link.inside(0, ["ping", "-c1", link.addresses[1]]))

What a link made is gone when its block ends, however it ends. Run by hand, this file keeps one link up until Ctrl-C:
`links.py veth [--mtu 9000] [--rate 1000]` or `links.py wan [--rate 200] [--rtt 40] [--loss 1]`.
"""

import argparse
import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

PREFIX = "lksb"
NAMESPACES = Path("/run/netns")


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def remove_leftovers():
    """Takes down namespaces of runs that were killed: their names hold the process."""
    for path in NAMESPACES.glob(f"{PREFIX}*-?"):
        owner = path.name.removeprefix(PREFIX).split("-")[0]
        if not Path(f"/proc/{owner}").exists():
            ip("netns", "del", path.name)


class Hosts:
    """Two namespaces without a link yet."""

    interface = "link0"

    def __enter__(self):
        remove_leftovers()
        self.names = [f"{PREFIX}{os.getpid()}-{side}" for side in "ab"]
        self.made = []
        try:
            for name in self.names:
                ip("netns", "add", name)
                self.made.append(name)
                ip("-n", name, "link", "set", "lo", "up")
            self.join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def inside(self, host, command):
        """`command` as host 0 or 1 runs it."""
        return ["ip", "netns", "exec", self.names[host], *map(str, command)]


class Veth(Hosts):
    """A cable, with a token bucket at both ends if `rate_mbit` is given."""

    addresses = ("10.97.0.1", "10.97.0.2")

    def __init__(self, mtu=1500, rate_mbit=None):
        self.mtu, self.rate_mbit = mtu, rate_mbit

    def join(self):
        a, b = self.names
        ip("-n", a, "link", "add", self.interface, "mtu", str(self.mtu), "type", "veth",
           "peer", "name", self.interface, "mtu", str(self.mtu), "netns", b)  # fmt: skip
        for name, address in zip(self.names, self.addresses):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", self.interface)
            ip("-n", name, "link", "set", self.interface, "up")
            if self.rate_mbit:
                # A bucket of 1 ms at 1 Gbit/s, and 50 ms of queue, as a switch has.
                subprocess.run(
                    ["tc", "-n", name, "qdisc", "add", "dev", self.interface, "root", "tbf",
                     "rate", f"{self.rate_mbit}mbit", "burst", "125kb", "latency", "50ms"],
                    check=True,
                )  # fmt: skip


class Wan(Hosts):
    """A long line: rate, round trip, random loss, 50 ms of queue, carried by a process of its own."""

    addresses = ("10.98.0.1", "10.98.0.2")
    mtu = 1500

    def __init__(self, rate_mbit=200.0, rtt_ms=40.0, loss_percent=0.0):
        self.rate_mbit, self.rtt_ms, self.loss_percent = rate_mbit, rtt_ms, loss_percent
        self.carrier = None

    def join(self):
        figures = map(str, (self.rate_mbit, self.rtt_ms, self.loss_percent))
        # It ends when its standard input does: also when this process is killed.
        self.carrier = subprocess.Popen(
            [sys.executable, __file__, "carry", *self.names, *figures],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        if self.carrier.stdout.readline().strip() != b"up":
            raise RuntimeError("the process that carries the link did not start")

    def __exit__(self, *_):
        if self.carrier:
            self.carrier.kill()
            self.carrier.wait()
            self.carrier.stdin.close()
            self.carrier.stdout.close()
        super().__exit__()


class Direction:
    """Packets on their way: a queue in front of the line, then the line's delay."""

    QUEUE_SECONDS = 0.05

    def __init__(self, source, sink, bytes_per_second, delay, loss, seed):
        self.source, self.sink = source, sink
        self.bytes_per_second, self.delay, self.loss = bytes_per_second, delay, loss
        self.random = random.Random(seed).random
        self.line_free = 0.0
        self.flying = deque()

    def take(self, now):
        """Takes in what the sender has handed over; loses some, and what finds the queue full."""
        for _ in range(128):
            try:
                packet = os.read(self.source, 65536)
            except BlockingIOError:
                return
            begins = max(now, self.line_free)
            if self.random() < self.loss or begins - now > self.QUEUE_SECONDS:
                continue
            self.line_free = begins + len(packet) / self.bytes_per_second
            self.flying.append((self.line_free + self.delay, packet))

    def deliver(self, now):
        """Hands over what has arrived; returns when the next packet does."""
        while self.flying:
            due, packet = self.flying[0]
            if due > now:
                return due
            self.flying.popleft()
            try:
                os.write(self.sink, packet)
            except BlockingIOError:
                pass  # The receiver's queue is full: lost, as on any line.
        return now + 3600


def open_tun(namespace, interface, address, peer):
    """A TUN device in `namespace`; what is written to the descriptor arrives there."""
    TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    wanted = f"{PREFIX}{os.getpid()}"[-14:]
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", wanted.encode(), IFF_TUN | IFF_NO_PI))
    # The descriptor stays connected when the device moves.
    ip("link", "set", wanted, "netns", namespace, "name", interface)
    ip("-n", namespace, "addr", "add", address, "peer", peer, "dev", interface)
    ip("-n", namespace, "link", "set", interface, "mtu", str(Wan.mtu), "txqueuelen", "1000", "up")
    return descriptor


def carry(namespaces, rate_mbit, rtt_ms, loss_percent):
    """Carries packets until standard input ends."""
    here, there = Wan.addresses
    a = open_tun(namespaces[0], Wan.interface, here, there)
    b = open_tun(namespaces[1], Wan.interface, there, here)
    figures = (rate_mbit * 1e6 / 8, rtt_ms / 2e3, loss_percent / 100)
    directions = {a: Direction(a, b, *figures, seed=1), b: Direction(b, a, *figures, seed=2)}
    print("up", flush=True)
    wait = 0.0
    while True:
        # `select`, whose time-out counts microseconds: `epoll` would round up to a millisecond.
        ready, _, _ = select.select([a, b, 0], [], [], wait)
        if 0 in ready:
            return
        now = time.monotonic()
        for descriptor in ready:
            directions[descriptor].take(now)
        due = min(direction.deliver(now) for direction in directions.values())
        wait = max(0.0, due - time.monotonic())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    veth = kinds.add_parser("veth", help="a cable")
    veth.add_argument("--mtu", type=int, default=1500)
    veth.add_argument("--rate", type=float, help="Mbit/s of a token bucket at both ends")
    wan = kinds.add_parser("wan", help="a long line")
    wan.add_argument("--rate", type=float, default=200.0, help="Mbit/s")
    wan.add_argument("--rtt", type=float, default=40.0, help="ms")
    wan.add_argument("--loss", type=float, default=0.0, help="percent")
    carrier = kinds.add_parser("carry")
    carrier.add_argument("names", nargs=2)
    carrier.add_argument("figures", nargs=3, type=float)
    arguments = parser.parse_args()
    if arguments.kind == "carry":
        return carry(arguments.names, *arguments.figures)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if arguments.kind == "veth":
        link = Veth(arguments.mtu, arguments.rate)
    else:
        link = Wan(arguments.rate, arguments.rtt, arguments.loss)
    with link:
        for name, address in zip(link.names, link.addresses):
            print(f"ip netns exec {name} ...   {address} on {link.interface}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
