"""A worker's listening socket, and how many connections it takes at a time.

One, when it has been quiet; twice as many each time that the next round of events finds more. epoll
tells again what is left in the queue, so nobody asks an empty one: an accept that finds nothing
ends in an exception, 2.5 µs.
"""

from __future__ import annotations

import socket
from typing import Protocol

from tproxyd.errors import CloseReason
from tproxyd.flow.connection import Lane
from tproxyd.flow.engine import Engine

# Connections accepted in one go before those already open get their turn.
BATCH = 64


class Acceptor(Protocol):
    """The worker."""

    engine: Engine

    def accept(self, door: Door, count: int) -> bool: ...


class Door:
    __slots__ = ("_count", "_round", "_worker", "lane", "sock")

    def __init__(self, worker: Acceptor, sock: socket.socket, lane: Lane) -> None:
        self._worker, self.sock, self.lane = worker, sock, lane
        self._count = 1
        self._round = 0

    def on_event(self, _events: int) -> None:
        now = self._worker.engine.rounds
        self._count = min(self._count * 2, BATCH) if now <= self._round + 1 else 1
        self._round = now
        self._worker.accept(self, self._count)

    def cut(self, reason: CloseReason, detail: str) -> None:
        """Nothing: no connection of its own."""
