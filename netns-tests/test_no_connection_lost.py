"""Reloads, upgrades and dying workers under a steady load of new connections: none is lost.

Not one is refused, waits in vain or is reset, but those that a killed worker had itself: these are
just the ones that the access log misses.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from lib.daemon import Daemon
from lib.figures import Figure
from lib.load import Times
from lib.topology import V4, Topology
from lib.waits import wait_for

RELOADS, KILLS, UPGRADES = 100, 20, 5
# Of clients, each with a connection at a time: enough that some are always in every stage, and few
# enough for two CPUs that also reload.
CLIENTS = 4
BETWEEN_S = 0.002  # two connections of a client


class Crowd:
    """Clients that come, say something, hear it again and leave; and the application."""

    def __init__(self, net: Topology) -> None:
        self._net = net
        self.ended: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(net.app(),), daemon=True),
            *(threading.Thread(target=self._come_and_go, daemon=True) for _ in range(CLIENTS)),
        ]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, app: socket.socket) -> None:
        app.settimeout(0.1)
        while not self._stop.is_set() or any(t.is_alive() for t in self._threads[1:]):
            try:
                sock, _ = app.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(10)
            try:
                while data := sock.recv(100):
                    sock.sendall(data)
            except OSError:
                pass  # the client will tell

    def _come_and_go(self) -> None:
        while not self._stop.wait(BETWEEN_S):
            began = time.monotonic()
            self.ended[self._one()] += 1
            self.seconds.append(time.monotonic() - began)

    def _one(self) -> str:
        try:
            with self._net.client.connect(V4.pod, 80) as sock:
                sock.settimeout(10)
                for word in (b"hello", b"again"):
                    sock.sendall(word)
                    if (got := sock.recv(100)) != word:
                        return f"heard {got!r}"
                sock.shutdown(socket.SHUT_WR)
                return "fine" if sock.recv(1) == b"" else "heard more"
        except OSError as error:
            return type(error).__name__

    def number(self) -> int:
        return sum(self.ended.values())

    def wait_for_more(self) -> None:
        """Until each client has come once more."""
        enough = self.number() + CLIENTS
        wait_for(lambda: self.number() >= enough, "connections of the crowd")


@pytest.fixture
def crowd(net: Topology) -> Crowd:
    return Crowd(net)


def test_reloads(net: Topology, crowd: Crowd, figure: Figure) -> None:
    with Daemon(net.pod, "workers = 2\n") as daemon:
        with crowd:
            for done in range(1, RELOADS + 1):
                daemon.signal(signal.SIGHUP)
                wait_for(lambda: daemon.status()["reload"]["done"] == done, "the reload")  # noqa: B023
                crowd.wait_for_more()
        assert_none_lost(crowd, daemon)
        figure(f"{RELOADS} reloads: {told(crowd)}")


def test_upgrades(net: Topology, crowd: Crowd, figure: Figure) -> None:
    with Daemon(net.pod, "workers = 2\n") as daemon:
        pids = [daemon.pid]
        with crowd:
            for _ in range(UPGRADES):
                os.kill(pids[-1], signal.SIGUSR2)
                pids.append(wait_for(another(daemon, pids[-1]), "the new process"))
                daemon.successors.append(pids[-1])
                crowd.wait_for_more()
        assert daemon.process.wait(10) == 0
        assert_none_lost(crowd, daemon)
        assert daemon.get("/readyz")[0] == 200
        figure(f"{UPGRADES} upgrades: {told(crowd)}")


def another(daemon: Daemon, pid: int) -> Callable[[], int]:
    """The daemon's pid once it is another one: for a moment nobody may answer."""

    def look() -> int:
        try:
            now = int(daemon.status()["pid"])
        except OSError:
            return 0
        return now if now != pid else 0

    return look


def test_killed_workers(net: Topology, crowd: Crowd, figure: Figure) -> None:
    with Daemon(net.pod, "workers = 2\n") as daemon:
        with crowd:
            for _ in range(KILLS):
                pids = wait_for(lambda: ready(daemon), "two workers")
                os.kill(pids[0], signal.SIGKILL)
                wait_for(lambda: pids[0] not in daemon.workers(), "its end")  # noqa: B023
                crowd.wait_for_more()
        missing = crowd.number() - lines(daemon, crowd.number(), at_least=True)
        reset = crowd.number() - crowd.ended["fine"]
        assert set(crowd.ended) <= {"fine", "ConnectionResetError", "heard b''"}, crowd.ended
        assert reset <= missing, "each that was reset was on a worker that was killed"
        assert missing <= KILLS * CLIENTS * 30  # its lines of the last 50 ms go with a worker
        figure(f"{KILLS} killed workers: {told(crowd)}, {missing} without a line in the log")


def ready(daemon: Daemon) -> list[int]:
    workers = [each for each in daemon.status()["workers"] if each["state"] == "ready"]
    return [each["pid"] for each in workers] if len(workers) == 2 else []


def assert_none_lost(crowd: Crowd, daemon: Daemon) -> None:
    assert set(crowd.ended) == {"fine"}, crowd.ended
    assert lines(daemon, crowd.number()) == crowd.number()


def lines(daemon: Daemon, number: int, at_least: bool = False) -> int:
    """How many connections the access log has, when it has what there is to come."""
    if not at_least:
        wait_for(lambda: len(daemon.log()) >= number, f"{number} lines")
    else:  # the last connection's line is the last: what follows it has been lost
        wait_for(lambda: daemon.metric("tproxyd_connections_active") == 0, "the end of all")
        daemon.stop()
    records = daemon.log()
    return len([each for each in records if each["bytes_received"]]) if at_least else len(records)


def told(crowd: Crowd) -> str:
    failed = crowd.number() - crowd.ended["fine"]
    return f"{crowd.number()} connections, {failed} failed; {Times(crowd.seconds)}"
