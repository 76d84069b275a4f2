"""Thousands of connections that end at any point of their life, in order or not.

Each is a script of a few steps for both of its ends, and a script says which close reasons fit it.
They live side by side, a batch at a time, their steps taken in turn, so that the end of one falls
into the life of others. Which client a record is about, its own port tells.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator

import pytest
from lib.daemon import Daemon, Record
from lib.figures import Figure
from lib.headers import v1
from lib.processes import open_files
from lib.streams import assert_talks, receive, receive_to_end, reset, was_reset
from lib.topology import PORT, V4, Pair, Topology, seen_port
from lib.waits import wait_for

BATCH = 100
BATCHES = 40
FIRST_PORT = 10_000
CONFIG = """
[[listener]]
header_timeout_s = 30
[[listener.proxy_protocol]]
from = ["10.9.1.2"]
policy = "require"
"""
BYTES = bytes(100_000)


Steps = Generator[bool, None, None]  # yields whether it waits for the application's end
Life = Callable[["Ends"], Steps]


class Ends:
    """Of one connection. The application's comes when the daemon has connected to it."""

    app: socket.socket

    def __init__(self, net: Topology, port: int) -> None:
        self.client = net.client.connect(V4.pod, PORT, source_port=port)
        self.header = v1(V4.stranger, V4.pod, port)
        self.arrived = False


def nothing_said(ends: Ends) -> Steps:
    """FIN before the header."""
    yield False
    ends.client.close()


def reset_before_the_header(ends: Ends) -> Steps:
    yield False
    reset(ends.client)


def header_cut_off(ends: Ends) -> Steps:
    ends.client.sendall(ends.header[:20])
    yield False
    ends.client.close()


def reset_in_the_header(ends: Ends) -> Steps:
    ends.client.sendall(ends.header[:20])
    yield False
    reset(ends.client)


def reset_behind_the_header(ends: Ends) -> Steps:
    """At once: before, while or after we connect."""
    yield False
    ends.client.sendall(ends.header)
    reset(ends.client)


def end_behind_the_header(ends: Ends) -> Steps:
    ends.client.sendall(ends.header + b"x")
    ends.client.close()
    yield True
    receive(ends.app, 1)
    ends.app.close()


def client_ends(ends: Ends) -> Steps:
    ends.client.sendall(ends.header)
    yield True
    assert_talks(Pair(ends.client, ends.app))
    yield True
    ends.client.close()
    yield True
    assert receive_to_end(ends.app) == b""
    ends.app.close()


def application_ends(ends: Ends) -> Steps:
    ends.client.sendall(ends.header)
    yield True
    ends.app.sendall(BYTES)
    ends.app.close()
    yield True
    assert receive_to_end(ends.client) == BYTES
    ends.client.close()


def client_resets(ends: Ends) -> Steps:
    ends.client.sendall(ends.header + b"GET")
    yield True
    receive(ends.app, 3)
    reset(ends.client)
    yield True
    assert was_reset(ends.app)


def application_resets(ends: Ends) -> Steps:
    ends.client.sendall(ends.header)
    yield True
    reset(ends.app)
    yield True
    assert was_reset(ends.client)


def client_resets_half_closed(ends: Ends) -> Steps:
    """The application has finished before."""
    ends.client.sendall(ends.header)
    yield True
    ends.app.shutdown(socket.SHUT_WR)
    yield True
    assert receive_to_end(ends.client) == b""
    reset(ends.client)
    yield True
    assert was_reset(ends.app)


def application_resets_half_closed(ends: Ends) -> Steps:
    ends.client.sendall(ends.header)
    yield True
    ends.client.shutdown(socket.SHUT_WR)
    yield True
    assert receive_to_end(ends.app) == b""
    reset(ends.app)
    yield True
    assert was_reset(ends.client)


def client_resets_in_flight(ends: Ends) -> Steps:
    """Its bytes are with the application, which has not read them; and the other way round."""
    ends.client.sendall(ends.header + BYTES)
    yield True
    ends.app.sendall(BYTES)
    yield True
    reset(ends.client)
    yield True
    assert was_reset(ends.app)


def application_resets_in_flight(ends: Ends) -> Steps:
    ends.client.sendall(ends.header + BYTES)
    yield True
    ends.app.sendall(BYTES)
    yield True
    reset(ends.app)
    yield True
    assert was_reset(ends.client)


def both_reset(ends: Ends) -> Steps:
    ends.client.sendall(ends.header)
    yield True
    reset(ends.app)
    reset(ends.client)


# And how the record of each may read. Where nobody waits for the daemon, what it sees first counts.
LIVES: dict[Life, set[str]] = {
    nothing_said: {"header_missing"},
    reset_before_the_header: {"downstream_reset"},
    header_cut_off: {"header_invalid"},
    reset_in_the_header: {"downstream_reset"},
    reset_behind_the_header: {"downstream_reset"},
    end_behind_the_header: {"downstream_fin"},
    client_ends: {"downstream_fin"},
    application_ends: {"upstream_fin"},
    client_resets: {"downstream_reset"},
    application_resets: {"upstream_reset"},
    client_resets_half_closed: {"downstream_reset"},
    application_resets_half_closed: {"upstream_reset"},
    client_resets_in_flight: {"downstream_reset"},
    application_resets_in_flight: {"upstream_reset"},
    both_reset: {"downstream_reset", "upstream_reset"},
}


@pytest.mark.usefixtures("many_files")
def test_storm(net: Topology, figure: Figure) -> None:
    chosen = random.Random(15).choices(list(LIVES), k=BATCH * BATCHES)
    storm = Storm(net)
    with Daemon(net.pod, CONFIG) as daemon:
        workers = daemon.workers()
        files = open_files(workers)
        began = time.monotonic()
        for first in range(0, len(chosen), BATCH):
            storm.batch(chosen[first : first + BATCH], FIRST_PORT + first)
        wait_for(lambda: len(daemon.log()) >= len(chosen), "a line in the log for each")
        took = time.monotonic() - began
        ended = {port_of(record): record["close_reason"] for record in daemon.log()}
        assert len(daemon.log()) == len(ended) == len(chosen), "one line for each"
        wrong = [
            (life.__name__, ended[FIRST_PORT + number])
            for number, life in enumerate(chosen)
            if ended[FIRST_PORT + number] not in LIVES[life]
        ]
        assert wrong == []
        wait_for(lambda: open_files(workers) == files, "their files")
        assert daemon.metric("tproxyd_connections_active") == 0
        assert daemon.metric("tproxyd_connections_total") == len(chosen)
        assert not daemon.bugs()
        assert daemon.workers() == workers

        storm.accept()  # whoever was late
        net.app().settimeout(10)
        client = net.connect()
        client.sendall(v1(V4.stranger, V4.pod))
        assert_talks(Pair(client, net.accept()))
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(ended.values()).most_common())
    figure(f"{len(chosen)} connections of {len(LIVES)} kinds in {took:.1f} s: {reasons}")


class Storm:
    def __init__(self, net: Topology) -> None:
        self._net = net
        self._by_port: dict[int, Ends] = {}  # as the application sees it
        net.app().setblocking(False)

    def batch(self, lives: list[Life], first_port: int) -> None:
        """These lives, side by side: a step of each in turn, if it has what it waits for."""
        walks = []
        for port, life in enumerate(lives, first_port):
            ends = self._by_port[seen_port(port)] = Ends(self._net, port)
            walks.append((ends, life(ends)))
        waits = {walk: next(walk) for _, walk in walks}

        def step() -> bool:
            self.accept()
            for ends, walk in walks.copy():
                if waits[walk] and not ends.arrived:
                    continue
                try:
                    waits[walk] = next(walk)
                except StopIteration:
                    walks.remove((ends, walk))
                    ends.client.close()
            return not walks

        wait_for(step, "the ends of a batch")

    def accept(self) -> None:
        """Whoever has reached the application by now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                app, (_, port) = self._net.app().accept()
                ends = self._by_port[port]
                ends.app, ends.arrived = self._net.keep(app), True


def port_of(record: Record) -> int:
    """Of the client's own socket, whatever its header said."""
    return int(record["downstream_direct_remote_address"].rpartition(":")[2])
