"""Out of open files: accepting pauses, without burning CPU, and resumes when there are some."""

from __future__ import annotations

from functools import partial

from lib.daemon import Daemon
from lib.processes import cpu_s
from lib.streams import assert_talks
from lib.topology import Pair, Topology, seen_port
from lib.waits import stays, wait_for

LIMIT = 128
CLIENTS = 100  # more than 128 files can serve at two each


def test_accepting_pauses_and_resumes(net: Topology) -> None:
    config = "workers = 1\n[[listener]]\nmax_connections = 1000\n"
    listener = net.app()
    with Daemon(net.pod, config, nofile=LIMIT) as daemon:
        clients = {}
        for _ in range(CLIENTS):
            client = net.connect()
            clients[seen_port(client.getsockname()[1])] = client
        served: list[Pair] = []

        def accept_more() -> int:
            listener.setblocking(False)
            try:
                while True:
                    app = net.keep(listener.accept()[0])
                    app.settimeout(10)
                    served.append(Pair(clients.pop(app.getpeername()[1]), app))
            except BlockingIOError:
                return len(served)

        def progressed(left: int) -> bool:
            accept_more()
            return len(clients) < left

        wait_for(lambda: accept_more() >= 10, "some to be served")
        wait_for(lambda: daemon.metric("tproxyd_accept_pauses_total") >= 1, "the pause, counted")
        [pid] = daemon.workers()
        used = cpu_s(pid)
        stays(lambda: accept_more() < CLIENTS, "the limit", 1.0)
        assert cpu_s(pid) - used < 0.3, "busy loop"
        assert clients, "the limit was never met"
        for pair in served:
            assert_talks(pair)

        while clients:  # each that leaves makes room
            done = served.copy()
            served.clear()
            for pair in done:
                pair.client.close()
                pair.app.close()
            left = len(clients)
            wait_for(partial(progressed, left), "room to be used")
        for pair in served:
            assert_talks(pair)
