"""A worker without memory: it costs the connections that need some, or that worker; never the rest.

Refused by the kernel (RLIMIT_AS) memory is an exception like any other, and ends the connection
that met it. Over the limit of its control group a process is killed: then the next one is started.
"""

from __future__ import annotations

import contextlib
import socket

import pytest
from lib.cgroups import limited_memory
from lib.daemon import Daemon
from lib.figures import Figure
from lib.headers import v2
from lib.processes import address_space, open_files, set_soft_limit
from lib.streams import assert_talks, receive_to_end
from lib.topology import V4, Pair, Topology
from lib.waits import wait_for

TALKING = 20
SPARE = 1 << 20  # what the worker may take beyond what it has
CONFIG = """
workers = 2
[[listener]]
max_header_bytes = 65_536
header_timeout_s = 2
[[listener.proxy_protocol]]
from = ["10.9.1.2"]
policy = "require"
"""


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(("clients", "each"), [(2000, 1000), (200, 60_000)])
def test_memory_is_refused(net: Topology, clients: int, each: int, figure: Figure) -> None:
    """Headers that wait to be whole ask for more than there is: nobody hangs, whoever is ended."""
    net.app()
    with Daemon(net.pod, CONFIG) as daemon:
        talking = [from_beyond(net) for _ in range(TALKING)]
        workers = daemon.workers()
        files = open_files(workers)
        [_, spared] = [worker["active"] for worker in daemon.status()["workers"]]
        set_soft_limit(workers[0], "as", address_space(workers[0]) + SPARE)

        crowd = flood(net, clients, each)
        alive = [pair for pair in talking if talks(pair)]
        for client in crowd:
            assert told(client) == b""  # by the deadline, or before
        assert len(alive) >= spared, "the other worker lost some"

        wait_for(lambda: daemon.get("/readyz")[0] == 200, "two sound workers")
        wait_for(lambda: active(daemon) == len(alive), "the books to be right")
        assert daemon.workers()[1] == workers[1]
        gave_up = "no memory left" in daemon.stderr
        assert gave_up == (daemon.workers()[0] != workers[0]) == (len(alive) < TALKING)
        refused = int(daemon.metric("tproxyd_connections_total", close_reason="internal"))
        assert gave_up or refused, "the limit was not met"
        assert not daemon.bugs()
        if not gave_up:  # then nothing at all is lost
            wait_for(lambda: open_files(workers) == files, "their files")
            assert daemon.metric("tproxyd_connections_total") == clients
            dropped = daemon.metric("tproxyd_access_log_lines_dropped_total")
            wait_for(lambda: len(daemon.log()) + dropped == clients, "a line for each")
            why = [r for r in daemon.log() if r["close_reason"] == "internal"]
            assert {each["connection_termination_details"] for each in why} <= {"out of memory"}
        for pair in (*alive, *(from_beyond(net) for _ in range(TALKING))):
            assert_talks(pair)
    outcome = f"it gave up, {TALKING - len(alive)} others with it" if gave_up else "it went on"
    figure(f"{clients} × {each} bytes: {refused} connections ended for want of them; {outcome}")


@pytest.mark.usefixtures("many_files")
def test_killed_for_its_memory(net: Topology, figure: Figure) -> None:
    """The kernel kills the worker that is over its group's limit, and it is replaced."""
    net.app()
    with limited_memory(4 << 20) as group, Daemon(net.pod, CONFIG) as daemon:
        talking = [from_beyond(net) for _ in range(TALKING)]
        workers = daemon.workers()
        [_, spared] = [worker["active"] for worker in daemon.status()["workers"]]
        group.write_text(f"{workers[0]}\n")  # what it has already is counted elsewhere
        crowd = flood(net, 400, 60_000)
        wait_for(lambda: daemon.workers()[0] not in (0, workers[0]), "the next worker")
        alive = [pair for pair in talking if talks(pair)]
        for client in crowd:
            assert told(client) == b""
        assert len(alive) >= spared, "the other worker lost some"
        wait_for(lambda: daemon.get("/readyz")[0] == 200, "two sound workers")
        wait_for(lambda: active(daemon) == len(alive), "the books to be right")
        assert daemon.workers()[1] == workers[1]
        assert "worker 0 was killed by SIGKILL; the next one starts" in daemon.stderr
        for pair in (*alive, *(from_beyond(net) for _ in range(TALKING))):
            assert_talks(pair)
        assert daemon.metric("tproxyd_worker_restarts_total") == 1
    figure(f"killed over 4 MiB, and replaced: {len(alive)} of {TALKING} others were elsewhere")


def flood(net: Topology, clients: int, each: int) -> list[socket.socket]:
    """Clients whose headers, of so many bytes, lack their last one."""
    header = v2(V4.stranger, V4.pod, tlvs=b"\xea" + each.to_bytes(2, "big") + bytes(each))
    crowd = [net.connect() for _ in range(clients)]
    for client in crowd:
        with contextlib.suppress(ConnectionError):
            client.sendall(header[:-1])
    return crowd


def from_beyond(net: Topology) -> Pair:
    """A connection whose peer owes no header."""
    client = net.connect_beyond()
    return Pair(client, net.accept())


def talks(pair: Pair) -> bool:
    """Or it is over; it must not hang."""
    try:
        assert_talks(pair)
    except (ConnectionError, AssertionError):
        return False
    return True


def told(sock: socket.socket) -> bytes:
    try:
        return receive_to_end(sock)
    except ConnectionError:
        return b""


def active(daemon: Daemon) -> float:
    return daemon.metric("tproxyd_connections_active")
