"""Upstreams that drop every SYN, or refuse, or accept and fall silent, and a crowd that wants them.

One client at a time meets them in test_upstream_fails.py and test_gateway.py; here many come at
once, and others are served all the while.
"""

from __future__ import annotations

import select
import time

import pytest
from lib.daemon import Daemon, Record
from lib.figures import Figure
from lib.gateway import GATEWAY_PORT, at, backend, through, to_neighbour
from lib.load import Load
from lib.streams import assert_talks, receive, was_reset
from lib.topology import V4, Family, Topology
from lib.waits import wait_for

CROWD = 200
HOLE, CLOSED = 81, 82
TIMEOUT_S = 1.0


def black_hole(net: Topology) -> None:
    """What the pod sends to that port, of its own application or of another host, vanishes."""
    net.pod.nft(
        "table inet hole { chain output { type filter hook output priority 0; "
        f'oifname {{ "lo", "p1" }} tcp dport {HOLE} drop\n }}\n }}\n'
    )


class Crowd:
    """Clients that come at once, and say nothing: how long until each knows that it is over."""

    def __init__(self, net: Topology, port: int, family: Family = V4) -> None:
        self._epoll = select.epoll()
        self._began: dict[int, float] = {}
        self.seconds: list[float] = []
        self._socks = {}
        for _ in range(CROWD):
            began = time.monotonic()
            try:
                sock = net.connect(family, port)
            except ConnectionResetError:  # so soon
                self.seconds.append(time.monotonic() - began)
                continue
            self._began[sock.fileno()], self._socks[sock.fileno()] = began, sock
            self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def look(self) -> bool:
        """Whether all of them know."""
        for fd, _ in self._epoll.poll(0):
            self.seconds.append(time.monotonic() - self._began[fd])
            self._epoll.unregister(fd)
            sock = self._socks[fd]
            assert was_reset(sock), "it was told that all is well"
            sock.close()
        return len(self.seconds) == CROWD

    def __str__(self) -> str:
        return f"{min(self.seconds):.3f} to {max(self.seconds):.3f} s"


@pytest.mark.parametrize(
    ("port", "reason"), [(HOLE, "upstream_timeout"), (CLOSED, "upstream_refused")]
)
def test_application(net: Topology, port: int, reason: str, figure: Figure) -> None:
    """One that cannot be reached costs its own clients a connect_timeout_s, and others nothing."""
    black_hole(net)
    with Daemon(net.pod, f"[[listener]]\nconnect_timeout_s = {TIMEOUT_S}\n") as daemon:
        load = Load(net)
        load.for_(0.2, lambda: None)
        crowd = Crowd(net, port)
        others = load.for_(0.8, crowd.look)
        wait_for(crowd.look, "all to be told")
        records = wait_for(lambda: ended(daemon, reason), "their records")
        if port == HOLE:
            assert min(record["duration"] for record in records) >= 1000 * TIMEOUT_S
        assert daemon.metric("tproxyd_connections_active") == 1  # the load's
    figure(f"{CROWD} clients, {reason}: told after {crowd}")
    figure(f"others meanwhile: {others}")


def test_silent_application(net: Topology, figure: Figure) -> None:
    """It takes connections and says nothing: idle_timeout_s ends them, on both sides."""
    silent = net.keep(net.pod.listen("0.0.0.0", HOLE))
    with Daemon(net.pod, f"[[listener]]\nidle_timeout_s = {TIMEOUT_S}\n") as daemon:
        load = Load(net)
        crowd = Crowd(net, HOLE)
        others = load.for_(0.8, crowd.look)
        wait_for(crowd.look, "all to be told")
        records = wait_for(lambda: ended(daemon, "idle_timeout"), "their records")
        assert min(record["duration"] for record in records) >= 1000 * TIMEOUT_S
        for _ in range(CROWD):
            assert was_reset(net.keep(silent.accept()[0]))
    figure(f"{CROWD} clients, idle_timeout: told after {crowd}")
    figure(f"others meanwhile: {others}")


def test_upstreams_of_a_gateway(net: Topology, family: Family, figure: Figure) -> None:
    """One sound one among the bad: everybody is served by it, and soon nobody waits for the others.

    Neither client nor backend says anything before the other side is there, so trying the next one
    is always safe.
    """
    net.beyond.ip("link set lo up")  # it refuses where nobody listens
    black_hole(net)
    server = backend(net, family)
    bad = [at(family.beyond, HOLE), at(family.beyond, CLOSED)]
    config = to_neighbour(
        family, *bad, at(family.beyond), connect_timeout_s=TIMEOUT_S, eject_s=30, eject_after=2
    )
    with Daemon(net.pod, "workers = 1\n" + config) as daemon:
        began = time.monotonic()
        clients = [net.connect(family, GATEWAY_PORT) for _ in range(CROWD)]
        served = []
        for _ in clients:
            app = net.keep(server.accept()[0])
            served.append(time.monotonic() - began)
            app.sendall(b"hello")
        for client in clients:
            assert receive(client, 5) == b"hello"
        assert daemon.metric("tproxyd_upstream_ejections_total") == len(bad)

        began = time.monotonic()
        for _ in range(CROWD):
            assert_talks(through(net, family, server))
        each = (time.monotonic() - began) / CROWD
        retries = daemon.metric("tproxyd_upstream_retries_total")
        assert daemon.log() == [], "somebody was not served"
    figure(
        f"{CROWD} clients at once: the last was served after {served[-1]:.2f} s, {retries:g} tries "
        f"of bad upstreams; once they are left out, {1000 * each:.2f} ms for each"
    )


def ended(daemon: Daemon, reason: str) -> list[Record]:
    """The records of a crowd that ended so, once they are all there."""
    records = [record for record in daemon.log() if record["close_reason"] == reason]
    return records if len(records) >= CROWD else []
