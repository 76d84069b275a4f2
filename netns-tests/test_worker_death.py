"""A worker that dies is replaced on the same socket: what waited in its queue is served."""

from __future__ import annotations

import os
import signal
import time

from lib.daemon import Daemon
from lib.processes import is_gone, stopped
from lib.streams import assert_talks
from lib.topology import Pair, Topology, seen_port
from lib.waits import wait_for

WAITING = 20


def test_queued_connections_are_served_by_the_replacement(net: Topology) -> None:
    net.app()
    with Daemon(net.pod, "workers = 2\n") as daemon:
        old = daemon.workers()
        assert len(old) == 2
        with stopped(old):
            # The kernel completes the handshakes; nobody accepts.
            clients = [net.connect() for _ in range(WAITING)]
            assert net.app_saw_nothing()
            killed = time.monotonic()
            for pid in old:
                os.kill(pid, signal.SIGKILL)
            apps = {app.getpeername()[1]: app for app in (net.accept() for _ in range(WAITING))}
            took = time.monotonic() - killed
        for client in clients:
            assert_talks(Pair(client, apps[seen_port(client.getsockname()[1])]))
        assert took < 1.5, f"{took:.2f} s; a second is promised, and this machine is small"
        new = daemon.workers()
        assert len(new) == 2
        assert not set(new) & set(old)
        assert all(map(is_gone, old))
        assert daemon.get("/readyz")[0] == 200


def test_counters_never_go_backwards(net: Topology) -> None:
    with Daemon(net.pod, "workers = 1\n") as daemon:
        for _ in range(5):
            pair = net.pair()
            assert_talks(pair)
            pair.client.close()
            pair.app.close()
        daemon.wait_log(5)
        held = net.pair()
        assert_talks(held)

        def count() -> tuple[float, float]:
            return daemon.metric("tproxyd_connections_total"), daemon.metric("tproxyd_bytes_total")

        before = count()
        assert before[0] == 5
        [pid] = daemon.workers()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid not in daemon.workers() and daemon.workers(), "the replacement")
        assert all(new >= old for new, old in zip(count(), before, strict=True))
        assert_talks(net.pair())
        assert daemon.metric("tproxyd_connections_active") == 1  # the dead worker's are gone
        after = count()
        assert all(new >= old for new, old in zip(after, before, strict=True))
