"""Peers that owe a PROXY header and take their time: they harm themselves, and nobody else."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
from lib.daemon import Daemon, Record
from lib.figures import Figure
from lib.headers import v1
from lib.load import Load
from lib.processes import open_files, private_kib
from lib.topology import V4, Topology
from lib.waits import wait_for

COUNT = 2000
# What the daemon holds at most for one that it waits for: the walk, the socket, the timer; not the
# 4 KiB that a header may have.
KIB_EACH = 3
TIMEOUT_S = 6.0  # longer than it takes to open all of them and to measure
CONFIG = f"""
[[listener]]
header_timeout_s = {TIMEOUT_S}
[[listener.proxy_protocol]]
from = ["10.9.1.2"]
policy = "require"
"""


@pytest.mark.usefixtures("many_files")
def test_slow_headers(net: Topology, figure: Figure) -> None:
    header = v1(V4.stranger, V4.pod)
    with Daemon(net.pod, CONFIG) as daemon:
        load = Load(net, v1(V4.stranger, V4.pod, 50_000))
        load.for_(0.3, lambda: None)  # warm
        before = load.for_(1.5, lambda: None)
        workers = daemon.workers()
        memory, files = private_kib(workers), open_files(workers)
        served = daemon.metric("tproxyd_connections_total")

        began = time.monotonic()
        slow = [net.connect() for _ in range(COUNT)]
        dribble = Dribble(slow[::2], header)
        wait_for(lambda: open_files(workers) >= files + COUNT, "all of them to be accepted")
        during = load.for_(1.5, dribble.some)
        held = private_kib(workers) - memory
        assert open_files(workers) == files + COUNT, "some were gone too soon"
        assert dribble.sent > COUNT // 2, "nobody dribbled"
        assert held < COUNT * KIB_EACH

        def all_gone() -> bool:
            dribble.some()
            return (
                daemon.metric("tproxyd_connections_total", close_reason="header_timeout") == COUNT
            )

        wait_for(all_gone, "the deadline of all of them")
        took = time.monotonic() - began
        assert all(is_over(sock) for sock in slow)
        wait_for(lambda: open_files(workers) == files, "their files")
        records = wait_for(lambda: timed_out(daemon), "their lines in the log")
        late = max(record["duration"] for record in records) - 1000 * TIMEOUT_S
        assert min(record["duration"] for record in records) >= 1000 * TIMEOUT_S
        others = daemon.metric("tproxyd_connections_total", close_reason="upstream_fin")
        assert others + COUNT == daemon.metric("tproxyd_connections_total") > served
        left = private_kib(workers) - memory
        assert left < COUNT * KIB_EACH

    ratio = during.percentile(99) / before.percentile(99)
    figure(f"before: {before}")
    figure(f"beside {COUNT} slow headers: {during}; p99 × {ratio:.2f}")
    figure(f"memory: {held} KiB for {COUNT}, {held / COUNT:.1f} each; {left} KiB afterwards")
    figure(
        f"the last was gone {late:.0f} ms behind its deadline, {took:.1f} s after the first came"
    )


class Dribble:
    """A byte a second from each, spread over the second: some by some, each time it is called."""

    def __init__(self, socks: list[socket.socket], data: bytes) -> None:
        self._socks, self._data = socks, data
        self._began = time.monotonic()
        self.sent = 0

    def some(self) -> None:
        due = int((time.monotonic() - self._began) * len(self._socks))
        while self.sent < due:
            number, which = divmod(self.sent, len(self._socks))
            with contextlib.suppress(OSError):  # those that have been ended
                self._socks[which].send(self._data[number : number + 1])
            self.sent += 1


def timed_out(daemon: Daemon) -> list[Record]:
    """The records of those that ran into the deadline, once they are all there."""
    records = [each for each in daemon.log() if each["close_reason"] == "header_timeout"]
    assert len(records) <= COUNT
    return records if len(records) == COUNT else []


def is_over(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
