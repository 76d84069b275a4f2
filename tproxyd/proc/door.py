"""A worker's listening sockets: when it accepts from them, how many at a time, how it leaves them.

One, when it has been quiet; twice as many each time that the next round of events finds more. epoll
tells again what is left in the queue, so nobody asks an empty one: an accept that finds nothing
ends in an exception, 2.5 µs.

Out of file descriptors, accepting pauses: what waits in a queue stays there, and is served when a
connection has ended or, where the kernel's limit was met first, soon after. Who leaves a socket
that is nobody's from then on goes on like that until its queue is empty, and then the kernel
refuses whoever comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Collection, Iterable
from enum import Enum

from tproxyd.errors import CloseReason
from tproxyd.flow import listen
from tproxyd.flow.connect import NO_FILES
from tproxyd.flow.connection import Lane, World, serve
from tproxyd.flow.engine import Engine

log = logging.getLogger(__name__)

# Connections accepted in one go before those already open get their turn.
BATCH = 64
# How soon accepting is tried again when the kernel, not our own limit, had refused a descriptor.
_RETRY_ACCEPT_S = 0.1
# And where it was the upstream's: behind clients that ask for theirs every tenth of a second, and a
# tick of their timers.
_STAND_BACK_S = 0.2

Later = Callable[[float, Callable[[], None]], asyncio.TimerHandle]


class Queue(Enum):
    """What is left to accept."""

    EMPTY = "empty"
    MORE = "more"  # or so it seems
    NO_ROOM = "no room"  # for what there may be


class Door:
    """One listening socket."""

    __slots__ = ("_count", "_doors", "_round", "lane", "sock", "watched")

    def __init__(self, doors: Doors, sock: socket.socket, lane: Lane) -> None:
        self._doors, self.sock, self.lane = doors, sock, lane
        self.watched = False  # by the engine
        self._count = 1
        self._round = 0

    def on_event(self, _events: int) -> None:
        now = self._doors.engine.rounds
        self._count = min(self._count * 2, BATCH) if now <= self._round + 1 else 1
        self._round = now
        self._doors.accept(self, self._count)

    def cut(self, reason: CloseReason, detail: str) -> None:
        """Nothing: no connection of its own."""


class Doors:
    def __init__(
        self,
        engine: Engine,
        later: Later,
        listeners: Iterable[tuple[socket.socket, Lane]],
        capacity: int,
        world: World,
        paused: Callable[[], None],
    ) -> None:
        """`capacity` is for connections at once, `world` what they live in, `paused` counts.

        Nobody is accepted before `open`.
        """
        self.engine, self._later, self._capacity = engine, later, capacity
        self._world, self._paused = world, paused
        self.active = 0  # connections; the worker counts them
        self.accepting = False
        self._doors = [Door(self, sock, lane) for sock, lane in listeners]
        self._open = False
        self._left: list[Door] | None = None  # what is still to be emptied, once we leave
        self._shut = self._emptying = False
        self._standing_back: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Accept from now on."""
        self._open = True
        self.resume()

    def resume(self) -> None:
        """There may be room again."""
        if self._left is not None:
            self._empty()
            return
        if self.accepting or not self._open or self._standing_back is not None:
            return
        if self.active >= self._capacity:
            return
        self.accepting = True
        for door in self._doors:
            if not door.watched:
                try:
                    self.engine.listen(door.sock, door)
                except OSError:  # no memory, or epoll's watches are used up
                    self.accepting = False
                else:
                    door.watched = True
        if not self.accepting:
            self._later(_RETRY_ACCEPT_S, self.resume)

    def _pause(self) -> None:
        if self.accepting:
            self._paused()
        self._unwatch()

    def _unwatch(self) -> None:
        self.accepting = False
        for door in self._doors:
            if door.watched:
                door.watched = False
                self.engine.unlisten(door.sock)

    def accept(self, door: Door, count: int) -> Queue:
        """Take up to so many waiting connections."""
        for _ in range(count):
            if self.active >= self._capacity:
                self._pause()
                return Queue.NO_ROOM
            try:
                downstream, peer = listen.accept(door.sock)
            except BlockingIOError:
                return Queue.EMPTY
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self._shut_down(door)
                    return Queue.EMPTY
                if error.errno not in NO_FILES:
                    continue  # that one connection failed before it was ours (accept(2))
                self._pause()
                self._later(_RETRY_ACCEPT_S, self.resume)
                return Queue.NO_ROOM
            self.engine.start(serve(downstream, peer, door.lane, self._world))
        return Queue.MORE

    def _shut_down(self, door: Door) -> None:
        """Its socket listens no more. Somebody did that from outside (`ss -K`): it is ours."""
        if self._left is not None:
            return
        try:
            door.sock.listen(listen.BACKLOG)
        except OSError as error:
            how = f"can't be made to listen again: {error.strerror}; restart tproxyd"
            door.watched = False
            self.engine.unlisten(door.sock)
        else:
            how = "listens again"
        log.error("%s: somebody shut a listening socket down; it %s", door.lane.listener.name, how)

    def out_of_files(self) -> None:
        """There was none for an upstream, whose client waits: it comes first."""
        if self._standing_back is not None:
            self._standing_back.cancel()
        self._pause()
        self._standing_back = self._later(_STAND_BACK_S, self._come_forward)

    def _come_forward(self) -> None:
        self._standing_back = None
        self.resume()

    # Leaving ------------------------------------------------------------------------------------

    def leave(self, gone: Collection[int], *, shut: bool) -> None:
        """Take no more connections but those that wait in queues that are nobody's from here on.

        Those are the ones at the numbers in `gone`; the queues of the others are served by others.
        `shut`: then the kernel is to refuse whoever comes. Without the supervisor nobody knows: a
        queue that lives on (in systemd's keeping) is the next one's.
        """
        self._unwatch()
        self._left, self._shut = [], shut
        for i, door in enumerate(self._doors):
            if i in gone:
                self._left.append(door)
            else:
                door.sock.close()
        self._empty()

    def _empty(self) -> None:
        if self._emptying:  # a connection that began in there has ended already
            return
        self._emptying = True
        for door in tuple(self._left or ()):
            while (left := self.accept(door, BATCH)) is Queue.MORE:
                pass
            if left is Queue.EMPTY:
                self._close(door)
        self._emptying = False

    def _close(self, door: Door) -> None:
        assert self._left is not None
        self._left.remove(door)
        if self._shut:
            # The supervisor has it open too: this makes the kernel refuse all the same.
            with contextlib.suppress(OSError):
                door.sock.shutdown(socket.SHUT_RD)
        door.sock.close()

    def give_up(self) -> None:
        """Whoever still waits is refused."""
        for door in tuple(self._left or ()):
            self._close(door)

    @property
    def done(self) -> bool:
        """It has left, and all that it let in are gone."""
        return self._left == [] and not self.active
