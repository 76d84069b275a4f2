"""What is done to the admin port harms neither the traffic nor a probe: slow, huge and broken
requests, thousands of connections. And who is not on this host does not reach it at all."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time

import pytest
from lib.daemon import ADMIN_PORT, Daemon
from lib.figures import Figure
from lib.processes import open_files, resident_kib
from lib.streams import assert_talks, receive_to_end, reset
from lib.topology import V4, V6, Family, Pair, Topology
from lib.waits import stays, wait_for

SLOW = 200  # three times the places there are
FLOOD = 3000
REQUEST = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
# Of the supervisor, whoever comes: 64 heads of 8 KiB, as much again in its streams, and what an
# allocator keeps.
GROWS_AT_MOST_KIB = 8 * 1024


class Probe:
    """/livez as kubelet asks: a new connection, and patience of a second."""

    def __init__(self, daemon: Daemon, pair: Pair) -> None:
        self._daemon, self._pair = daemon, pair
        self.took: list[float] = []

    def __call__(self) -> bool:
        began = time.monotonic()
        assert self._daemon.get("/livez") == (200, "ok\n")
        self.took.append(time.monotonic() - began)
        assert_talks(self._pair)
        return True

    def __str__(self) -> str:
        return f"{len(self.took)} probes, the slowest {1000 * max(self.took):.0f} ms"


def slow_clients(net: Topology, count: int) -> list[socket.socket]:
    clients = [net.keep(net.pod.connect("127.0.0.1", ADMIN_PORT)) for _ in range(count)]
    for client in clients[::2]:
        with contextlib.suppress(OSError):  # it had to make room
            client.sendall(REQUEST)
    return clients


def test_slow_clients(net: Topology, figure: Figure) -> None:
    """A byte now and then, or none: more than there are places, again and again."""
    with Daemon(net.pod) as daemon:
        probe = Probe(daemon, net.pair())
        slow = slow_clients(net, SLOW)
        came = len(slow)

        def dribble() -> bool:
            nonlocal came
            for i, client in enumerate(slow):
                try:
                    client.send(b"x")
                except OSError:  # it was in the way: the next one comes
                    client.close()
                    slow[i] = net.pod.connect("127.0.0.1", ADMIN_PORT)
                    came += 1
            return probe()

        try:
            stays(dribble, "an answer to each probe", 2.0)
            assert open_files([daemon.pid]) < 64 + 60
        finally:
            for client in slow:
                client.close()
        assert daemon.get("/readyz")[0] == 200
        assert not daemon.bugs()
    figure(f"{came} slow clients: {probe}")


def test_a_flood(net: Topology, figure: Figure) -> None:
    """Thousands that come at once and stay, with all that is wrong with a request."""
    rng = random.Random(9133)
    with Daemon(net.pod) as daemon:
        probe = Probe(daemon, net.pair())
        probe()
        files, memory = open_files([daemon.pid]), resident_kib(daemon.pid)
        most = 0
        for i in range(FLOOD):
            client = net.pod.connect("127.0.0.1", ADMIN_PORT)
            with contextlib.suppress(OSError):
                client.sendall(broken(rng))
            if i % 3 == 0:
                reset(client)
            elif i % 3 == 1:
                client.close()
            else:
                net.keep(client)  # till the end of the test
            if i % 100 == 0:
                probe()
                most = max(most, resident_kib(daemon.pid))
        wait_for(lambda: probe() and open_files([daemon.pid]) <= files + 2, "their files")
        most = max(most, resident_kib(daemon.pid))
        assert most - memory < GROWS_AT_MOST_KIB
        assert daemon.metric("tproxyd_connections_active") == 1
        assert not daemon.bugs()
    figure(f"{FLOOD} broken ones: {probe}; memory {memory} KiB, at most {most - memory} KiB more")


def broken(rng: random.Random) -> bytes:
    """One request with something wrong with it."""
    match rng.randrange(7):
        case 0:
            return b""
        case 1:
            return os.urandom(rng.randrange(1, 2000))
        case 2:
            return REQUEST + b"X: " + b"x" * rng.randrange(20_000, 100_000)  # without an end
        case 3:
            return (REQUEST + b"\r\n") * 200  # pipelined
        case 4:
            return b"GET /" + rng.randbytes(8).hex().encode() + b" HTTP/1.1\r\n\r\n"
        case 5:
            return b"POST /status HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * 10_000
        case _:
            return REQUEST[: rng.randrange(len(REQUEST))]


def test_pipelined_requests_get_one_answer(net: Topology) -> None:
    with Daemon(net.pod), net.pod.connect("127.0.0.1", ADMIN_PORT) as client:
        client.sendall((REQUEST + b"\r\n") * 3)
        client.shutdown(socket.SHUT_WR)
        answer = receive_to_end(client)
        assert answer.count(b"HTTP/1.1 200 OK") == 1
        assert answer.endswith(b"\r\n\r\nok\n")


@pytest.mark.parametrize(("admin", "answers"), [("127.0.0.1:9133", False), ("0.0.0.0:9133", True)])
def test_who_reaches_it(net: Topology, admin: str, answers: bool) -> None:
    """From another host nobody does, unless it was told so; and then by way of the proxy too."""
    with Daemon(net.pod, f'admin = "{admin}"\n'):
        assert net.pod.run("ss", "-Hltn", f"sport = :{ADMIN_PORT}").split()[3] == admin
        assert asks(net, V4) is answers
        assert not asks(net, V6)


def asks(net: Topology, family: Family) -> bool:
    """Whether a client on another host gets an answer out of the admin port."""
    try:
        client = net.connect(family, ADMIN_PORT)
        client.sendall(REQUEST + b"\r\n")
        return receive_to_end(client).startswith(b"HTTP/1.1 200 ")
    except (ConnectionRefusedError, ConnectionResetError):
        return False
