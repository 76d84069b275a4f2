"""What is open in a worker right now, found by walking through its engine's handlers.

Nothing is kept per connection for this: a connection that is never looked at costs what it cost
before. The engine's list of handlers, by file descriptor, leads to the two directions of a relay
and so to its record; a walk that still waits is asked for the local variables of `serve`.

A connection's name is (file descriptor of its downstream socket, microsecond of its start): the
descriptor is its own while it lives, the second part tells it from those that had it before.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tproxyd.addr import Endpoint
from tproxyd.errors import CloseReason
from tproxyd.flow.connection import Passage
from tproxyd.flow.engine import Handler, Walker
from tproxyd.flow.record import Record
from tproxyd.flow.relay import Direction

Handlers = Sequence[Handler | None]

_STARTS = 1 << 20  # a second of microseconds tells apart who had a descriptor before


class Open(NamedTuple):
    """An open connection: what is known of it, and by whom to end it."""

    fd: int
    life: Record
    owner: Passage | Walker
    downstream: Any  # its socket
    dialled: bool  # a walk: whether it is past the header

    @property
    def start(self) -> int:
        return start_of(self.life)

    @property
    def alive(self) -> bool:
        owner = self.owner
        return not owner.over if isinstance(owner, Passage) else owner.variables is not None

    def client(self) -> Endpoint:
        """The peer, while no header has said whom it speaks for."""
        return self.life.client or self.life.peer

    def moved(self) -> tuple[int, int]:
        if isinstance(self.owner, Passage):
            # What precedes the payload, our own header, is counted below zero.
            return max(self.owner.up.delivered, 0), self.owner.down.delivered
        return 0, 0

    def last_active(self) -> float:
        return self.owner.last_active if isinstance(self.owner, Passage) else self.life.started

    def cut(self, reason: CloseReason, detail: str) -> None:
        self.owner.cut(reason, detail)


def start_of(life: Record) -> int:
    return int(life.started * 1e6) % _STARTS


def every(handlers: Handlers) -> Iterator[Open | None]:
    """Each connection once; None for a descriptor that leads to none, so that the caller can pause
    anywhere. Others may come and go meanwhile: what it yields was there when it was yielded.
    """
    walkers: set[Walker] = set()
    fd = 0
    while fd < len(handlers):
        handler = handlers[fd]
        found = None
        if isinstance(handler, Direction):
            found = _passage(fd, handler)
        elif isinstance(handler, Walker) and handler not in walkers:
            walkers.add(handler)  # it may wait for its upstream, and stand for both sockets
            found = _walk(handler)
        yield found
        fd += 1


def at(handlers: Handlers, fd: int) -> Open | None:
    """The connection whose downstream socket that is, if it is watched: one that waits for its
    upstream only is not, and found by `every`.
    """
    handler = handlers[fd] if 0 <= fd < len(handlers) else None
    found = None
    if isinstance(handler, Direction):
        found = _passage(fd, handler)
    elif isinstance(handler, Walker):
        found = _walk(handler)
    return found if found is not None and found.fd == fd else None


def _passage(fd: int, way: Direction) -> Open | None:
    relay = way.relay
    if isinstance(relay, Passage) and way is relay.up:
        return Open(fd, relay.life, relay, way.source, True)
    return None


def _walk(walker: Walker) -> Open | None:
    variables = walker.variables
    if variables is None or not isinstance(life := variables.get("life"), Record):
        return None
    downstream = variables["downstream"]
    return Open(downstream.fileno(), life, walker, downstream, life.client is not None)


class Baseline:
    """What every connection had moved at an earlier look: 8 bytes each, by file descriptor."""

    def __init__(self, now: float, size: int) -> None:
        self.taken = now
        self._moved = array("q", bytes(8 * size))

    def note(self, fd: int, moved: int) -> None:
        if fd < len(self._moved):
            self._moved[fd] = moved

    def rate(self, each: Open, moved: int, now: float) -> float:
        """Bytes per second since then; over its life where it began only later."""
        if each.life.started < self.taken and each.fd < len(self._moved):
            return max(0, moved - self._moved[each.fd]) / max(now - self.taken, 0.001)
        return whole_rate(each, moved, now)


def whole_rate(each: Open, moved: int, now: float) -> float:
    return moved / max(now - each.life.started, 0.001)


def bytes_moved(handlers: Handlers) -> tuple[int, int]:
    """What the connections that are now open have moved, each way: received, sent.

    In one go, so that none is counted twice that ends meanwhile: 1.5 ms for 9,000 connections.
    """
    received = sent = 0
    for handler in handlers:
        if isinstance(handler, Direction) and (relay := handler.relay) is not None:
            if relay.up is handler:
                received += max(handler.delivered, 0)
            else:
                sent += handler.delivered
    return received, sent
