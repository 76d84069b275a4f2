"""The kernel has no file descriptor for a worker: whoever waits is served when others have ended.

A worker counts its connections and pauses before that (test_open_files.py). Here its limit is
lowered behind its back, so that accept(2) itself fails, or socket(2) for the upstream of a client
that accept took the last one for.
"""

from __future__ import annotations

import os

import pytest
from lib.daemon import Daemon
from lib.figures import Figure
from lib.processes import cpu_s, set_soft_limit, soft_limit
from lib.streams import assert_talks
from lib.topology import Pair, Topology, seen_port
from lib.waits import stays, wait_for

CLIENTS = 40


@pytest.mark.parametrize("room", [8, 7], ids=["for accept", "for the upstream"])
def test_no_descriptor_left(net: Topology, room: int, figure: Figure) -> None:
    listener = net.app()
    with Daemon(net.pod, "workers = 1\n") as daemon:
        [worker] = daemon.workers()
        usual = soft_limit(worker, "Max open files")
        set_soft_limit(worker, "nofile", limit_for(worker, room))
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

        wait_for(lambda: accept_more() == room // 2, "those there is room for")
        wait_for(lambda: daemon.metric("tproxyd_accept_pauses_total") >= 1, "the pause, counted")
        used = cpu_s(worker)
        stays(lambda: accept_more() == room // 2, "the limit", 1.0)
        used = cpu_s(worker) - used
        assert used < 0.3, "busy loop"
        for pair in served:
            assert_talks(pair)
        assert daemon.log() == [], "some did not wait"

        rounds = 0
        while clients:  # each that leaves makes room
            rounds += 1
            done = served.copy()
            served.clear()
            for pair in done:
                assert_talks(pair)
                pair.client.close()
                pair.app.close()
            wait_for(accept_more, "room to be used")
            if rounds == 2:
                set_soft_limit(worker, "nofile", usual)
                wait_for(lambda: accept_more() and not clients, "the limit to be gone")
        for pair in served:
            assert_talks(pair)
        records = daemon.wait_log(CLIENTS - len(served))
        assert {record["close_reason"] for record in records} == {"downstream_fin"}
        pauses = daemon.metric("tproxyd_accept_pauses_total")
        assert not daemon.bugs()
    figure(
        f"room for {room} files: {CLIENTS} clients, none lost; {pauses:g} pauses; "
        f"a second of waiting cost {1000 * used:.0f} ms of CPU time"
    )


def limit_for(pid: int, room: int) -> int:
    """The limit that leaves this process so many descriptors: a limit is a number, not a count."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = [number for number in range(len(taken) + room) if number not in taken]
    return free[room - 1] + 1
