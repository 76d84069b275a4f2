"""Limits of each client: exact over all workers, and nobody's but the client's own.

The client is the one that counts after a PROXY header, so a balancer that speaks for many is none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway, trusting
from lib.headers import V2_LOCAL, v1, v2
from lib.programs import quoted
from lib.topology import PORT, V4, Family, Topology
from lib.waits import wait_for

SECOND = {"v4": "10.9.1.3", "v6": "fd00:9:1::3"}  # another address of the client's, another client
OVER = ("client_overload", "UO")


class Backend:
    """In the neighbour: takes every connection, says "ready" and keeps it until it is let go."""

    def __init__(self, net: Topology, family: Family, port: int = PORT) -> None:
        self._listener = net.keep(net.beyond.listen(family.beyond, port))
        self._listener.settimeout(None)
        self.live = 0
        self.most = 0  # that were open at the same time
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it was stopped
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._hold, args=(sock,), daemon=True).start()

    def _hold(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionError):
            with self._lock:
                self.live += 1
                self.most = max(self.most, self.live)
            try:
                sock.sendall(b"ready")
                sock.recv(1)
            finally:
                with self._lock:
                    self.live -= 1


@pytest.fixture
def backend(net: Topology, family: Family) -> Iterator[Backend]:
    net.client.ip("addr add 10.9.1.3/24 dev c0", "addr add fd00:9:1::3/64 dev c0")
    backend = Backend(net, family)
    yield backend
    backend.stop()


def config(family: Family, **options: object) -> str:
    return "workers = 2\n" + gateway(quoted(family.beyond, PORT), **options)


def limited(family: Family, connections: int, **options: object) -> str:
    return config(family, per_client={"max_connections": connections}, **options)


def attempt(
    net: Topology, family: Family, source: str = "", says: bytes = b""
) -> socket.socket | None:
    """A client's connection, once it is served; None when it is turned away."""
    with contextlib.suppress(ConnectionError):
        sock = net.connect(family, GATEWAY_PORT, source or family.client)
        sock.sendall(says)
        if sock.recv(5) == b"ready":
            return sock
    return None


def served(
    net: Topology, family: Family, count: int, source: str = "", says: bytes = b""
) -> list[socket.socket]:
    """Of so many attempts, one after the other, those that were."""
    socks = [attempt(net, family, source, says) for _ in range(count)]
    return [sock for sock in socks if sock is not None]


def overloads(daemon: Daemon) -> float:
    return daemon.metric("tproxyd_connections_total", close_reason="client_overload")


def active(daemon: Daemon) -> float:
    return daemon.metric("tproxyd_connections_active")


def test_connections_of_one_client(net: Topology, family: Family, backend: Backend) -> None:
    """Exactly as many as are allowed, over two workers; others never notice."""
    with Daemon(net.pod, limited(family, 7)) as daemon:
        mine = served(net, family, 12)
        assert len(mine) == 7
        for record in daemon.wait_log(5):
            assert (record["close_reason"], record["response_flags"]) == OVER
            why = f"per_client.max_connections = 7 for {family.client}"
            assert record["connection_termination_details"] == why
            assert record["upstream_host"] is None
        assert overloads(daemon) == 5
        assert len(served(net, family, 9, SECOND[family.name])) == 7
        assert backend.live == 14

        for sock in mine[:3]:
            sock.close()
        wait_for(lambda: active(daemon) == 11, "three to be over")
        assert len(served(net, family, 5)) == 3
        assert backend.most == 14


def test_a_crowd_at_once(net: Topology, family: Family, backend: Backend) -> None:
    """Never one too many, whatever comes at the same time; and no place is lost by it."""
    limit, crowd = 10, 80
    kind = socket.AF_INET6 if ":" in family.pod else socket.AF_INET
    with Daemon(net.pod, limited(family, limit)) as daemon:
        for _ in range(3):
            refused = overloads(daemon)
            socks = [net.keep(net.client.open_socket(kind)) for _ in range(crowd)]
            for sock in socks:
                sock.setblocking(False)
                sock.bind((family.client, 0))
                sock.connect_ex((family.pod, GATEWAY_PORT))

            def settled(refused: float = refused) -> bool:
                return active(daemon) + overloads(daemon) - refused == crowd

            wait_for(settled, "each to be served or refused")
            assert 1 <= active(daemon) <= limit
            wait_for(lambda: backend.live == active(daemon), "those to be there")
            rest = limit - int(active(daemon))
            more = served(net, family, rest + 3)
            assert len(more) == rest
            for sock in (*socks, *more):
                sock.close()
            wait_for(lambda: active(daemon) == 0, "all to be over")
        assert backend.most == limit


def test_new_connections_in_a_second(net: Topology, family: Family, backend: Backend) -> None:
    """All at once, where it has been quiet; who goes on hammering is not locked out."""
    with Daemon(net.pod, config(family, per_client={"max_new_per_s": 6})) as daemon:
        begun = wait_for(start_of_a_second, "the next second")
        assert len(served(net, family, 12)) == 6
        assert len(served(net, family, 8, SECOND[family.name])) == 6
        assert int(time.monotonic()) == begun, "this machine is too slow to tell"
        records = daemon.wait_log(8)
        assert {(record["close_reason"], record["response_flags"]) for record in records} == {OVER}
        why = f"per_client.max_new_per_s = 6 for {family.client}"
        assert records[0]["connection_termination_details"] == why
        assert overloads(daemon) == 8
        wait_for(lambda: attempt(net, family), "a place", timeout=3)


def start_of_a_second() -> int:
    now = time.monotonic()
    return int(now) if now % 1 < 0.1 else 0


def test_clients_of_one_balancer(net: Topology, family: Family, backend: Backend) -> None:
    """Each has its own places, and the balancer, who may speak for all of them, has its own too."""
    trusted = trusting(family.client)
    with Daemon(net.pod, limited(family, 3, proxy_protocol=trusted)) as daemon:
        whole = "2001:db8:6a::" if ":" in family.pod else "106.52.131."
        clients = [f"{whole}{i}" for i in range(1, 4)]
        for host in clients:
            assert len(served(net, family, 5, says=v2(host, family.pod))) == 3
        assert len(served(net, family, 5, says=V2_LOCAL)) == 3
        assert backend.live == 12
        refused = daemon.wait_log(8)
        assert {record["close_reason"] for record in refused} == {OVER[0]}
        told = Counter(r["connection_termination_details"].split()[-1] for r in refused)
        assert told == dict.fromkeys((*clients, family.client), 2)
        for record in refused:
            direct = record["downstream_direct_remote_address"]
            assert direct.startswith(quoted(family.client, 0)[:-1])


def test_one_client_of_two_balancers(net: Topology, family: Family, backend: Backend) -> None:
    """Whoever names it, in whichever version and spelling, it is the same client."""
    other = SECOND[family.name]
    trusted = trusting(family.client, other)
    with Daemon(net.pod, limited(family, 4, proxy_protocol=trusted)) as daemon:
        mapped, host = f"::ffff:{V4.stranger}", "2001:0DB8:006a:0000::34"
        there = family.pod
        if family is V4:
            host, there = mapped, f"::ffff:{family.pod}"
        assert len(served(net, family, 2, says=v1(family.stranger, family.pod))) == 2
        assert len(served(net, family, 4, other, v2(host, there, 50_000))) == 2
        assert served(net, family, 2, says=v1(host, there)) == []
        assert overloads(daemon) == 4
        assert backend.live == 4


def test_connections_that_come_to_nothing(net: Topology, family: Family, backend: Backend) -> None:
    """They take no place: not those that are refused, nor those whose upstream is not there."""
    limits = {"max_connections": 2}
    config = gateway(quoted(family.beyond, 81), per_client=limits, eject_after=0)
    with Daemon(net.pod, f"workers = 2\n{config}") as daemon:
        assert served(net, family, 6) == []
        assert {record["close_reason"] for record in daemon.wait_log(6)} == {"upstream_refused"}
        late = Backend(net, family, 81)
        assert len(served(net, family, 6)) == 2
        assert late.live == 2
        late.stop()
    assert backend.live == 0


def test_a_worker_that_is_killed(net: Topology, family: Family, backend: Backend) -> None:
    """What it had counted goes with it, and what the other one has stays."""
    with Daemon(net.pod, limited(family, 12)) as daemon:
        assert len(served(net, family, 14)) == 12
        victim = max(daemon.status()["workers"], key=lambda worker: worker["active"])
        assert victim["active"] >= 6
        os.kill(victim["pid"], signal.SIGKILL)
        wait_for(lambda: backend.live == 12 - victim["active"], "its connections to break")

        def replaced() -> bool:
            workers = daemon.status()["workers"]
            return all(w["state"] == "ready" and w["pid"] != victim["pid"] for w in workers)

        wait_for(replaced, "the replacement")
        assert len(served(net, family, 14)) == victim["active"]
        assert backend.live == 12
