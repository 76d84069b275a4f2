"""The worker's own epoll and its deadlines: resumes connections, moves bytes.

uvloop runs the worker (signals, timers, the control socket); traffic does not pass through it. The
engine has an epoll instance of its own, whose file descriptor uvloop watches like any other, and
drains it with epoll.poll(0). Measured with 64 keep-alive connections: raw sockets this way do 1.4
times the requests of uvloop's transports; the kernel is most of the cost, so the shortest way to
the kernel wins. While there is traffic the engine stays: it waits for the next event itself, for a
moment, and gives the loop its turn after ten milliseconds, when one of its own ends. A request on a
keep-alive connection cost 4.2 µs of user time when each turn went through the loop, and 3.1 since.

Handlers stand in a list indexed by file descriptor. Events of one batch can be stale (relay.py's
head says what that means); a handler that is gone is simply not there any more.

Deadlines are kept in coarse buckets, because nearly all of them are cancelled before they fall due:
setting or cancelling one is a dict operation, and one timer of the loop serves them all.

Memory that is refused ends the connection that asked for it. Where even that needs some, or where
nobody in particular asked, books may be wrong now and edges lost: then the worker ends, and the
next one on its slot has memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Generator
from typing import Any, NoReturn, Protocol

from tproxyd.errors import NO_MEMORY, CloseReason, PeerError
from tproxyd.flow.pipes import Pipes
from tproxyd.flow.relay import BUFFER_SIZE, Direction, Relay
from tproxyd.flow.stream import Stream, Wait

# HUP and ERR always come. PRI: a recv stops at an urgent byte, though more lies behind it.
READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
READ_AND_WRITE = READ | select.EPOLLOUT
_BATCH = 256  # events per drain: uvloop's other descriptors get their turn in between
# How long traffic may keep the loop waiting: its timers have ticks of five times that.
_STAY_S = 0.01
# How long to wait for more of it: epoll's shortest.
_LINGER_S = 0.001
_TICK_S = 0.05  # how late a deadline may fall due; a second for those of half a minute and more
_COARSE_TICKS = 20
_COARSE_FROM_S = 30.0

EXIT_NO_MEMORY = 71  # EX_OSERR of sysexits.h
_NO_MEMORY = b"tproxyd: a worker has no memory left to go on with: it ends\n"

log = logging.getLogger(__name__)

Walk = Generator[Wait, bool, Relay | None]


class Handler(Protocol):
    """What the events of a file descriptor are for."""

    def on_event(self, events: int) -> None: ...

    def cut(self, reason: CloseReason, detail: str) -> None:
        """End that connection, whatever it is doing."""


class Timed(Protocol):
    timer: dict[object, None] | None

    def on_timer(self, now: float) -> None: ...


class Engine:
    """One worker's event engine. Single-threaded; everything happens inside `turn`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.view = memoryview(bytearray(BUFFER_SIZE))
        self.now = time.monotonic()
        self.rounds = 0  # turns that took all that was ready: the last of a crowd, or the only one
        self._loop = loop
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._register = self._epoll.register
        self._handlers: list[Handler | None] = [None] * 1024
        self._again: deque[Direction] = deque()
        self._turn_asked = False
        self._timers = Timers(loop, self)
        self.set_timer, self.cancel_timer = self._timers.set, self._timers.cancel
        self._pipes = Pipes()
        self.lease_pipe, self.return_pipe = self._pipes.lease, self._pipes.give_back
        loop.add_reader(self._epoll.fileno(), self._stay)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._timers.close()
        self._epoll.close()
        self._pipes.close()

    def _stay(self) -> None:
        """Called by the loop when something has happened: turns, for as long as there is more."""
        try:
            leave_at = time.monotonic() + _STAY_S
            self.turn()
            while self.now < leave_at and self.turn(_LINGER_S):
                pass
        except MemoryError:
            give_up()

    def turn(self, wait_s: float = 0) -> bool:
        """Handle what has happened since the last turn; whether anything had."""
        again, handlers = self._again, self._handlers
        # Work left over from this turn is done in the next one, after new events had theirs.
        leftover = len(again)
        batch = self._poll(0 if leftover else wait_s, _BATCH)
        self.now = time.monotonic()
        self.rounds += len(batch) < _BATCH
        for fd, events in batch:
            handler = handlers[fd]
            if handler is not None:
                try:
                    handler.on_event(events)
                except Exception as error:
                    end_by_bug(handler, error)
        for _ in range(leftover):
            way = again.popleft()
            try:
                way.go_on()
            except Exception as error:
                end_by_bug(way, error)
        if again:
            self._ask_for_turn()
        return bool(batch or leftover)

    def again(self, way: Direction) -> None:
        """Let it go on in the next turn, behind the events that wait by then."""
        self._again.append(way)
        self._ask_for_turn()

    def _ask_for_turn(self) -> None:
        if not self._turn_asked:  # one is enough: two would ask for two each, and so on
            self._turn_asked = True
            self._loop.call_soon(self._asked_turn)

    def _asked_turn(self) -> None:
        self._turn_asked = False
        if self._again:
            self._stay()

    def listen(self, sock: socket.socket, handler: Handler) -> None:
        """Watch a listening socket, level-triggered: what is left in its queue is told again."""
        self._make_room(sock.fileno())
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def unlisten(self, sock: socket.socket) -> None:
        self._handlers[sock.fileno()] = None
        self._epoll.unregister(sock.fileno())

    def watch(self, stream: Stream, handler: Handler, events: int = READ) -> bool:
        """Have `handler` told the events of a socket; it is registered with epoll once.

        True the first time: then the events of the past are told again. `forget` before close().
        """
        fd = stream.fileno()
        handlers = self._handlers
        if fd >= len(handlers):
            self._make_room(fd)
        first = handlers[fd] is None
        handlers[fd] = handler
        if first:
            self._register(fd, events)
        return first

    def watch_for_room(self, stream: Stream) -> None:
        """From now on tell its handler too when there is room to write, as there may be already."""
        self._epoll.modify(stream.fileno(), READ_AND_WRITE)

    def _make_room(self, fd: int) -> None:
        while fd >= len(self._handlers):
            self._handlers.extend([None] * len(self._handlers))

    def forget(self, stream: Stream) -> None:
        """A socket is about to be closed (which takes it out of epoll)."""
        fd = stream.fileno()
        if 0 <= fd < len(self._handlers):
            self._handlers[fd] = None

    def cut(self, reason: CloseReason, detail: str) -> None:
        """End every connection."""
        for handler in tuple(filter(None, self._handlers)):
            try:
                handler.cut(reason, detail)
            except Exception as error:
                end_by_bug(handler, error)

    def start(self, walk: Walk) -> None:
        """Begin a connection's walk; it runs until it first waits, or is over."""
        try:
            step = next(walk)
        except StopIteration as end:
            self._relay(end.value)
        except Exception:
            log.exception("a connection ended by a bug of ours")
        else:
            Walker(self, walk).wait(step)

    def _relay(self, relay: Relay | None) -> None:
        """A walk is over, and this is what it ended in."""
        if relay is not None:
            try:
                relay.start(self)
            except Exception as error:
                end_by_bug(relay, error)


def end_by_bug(owner: object, error: Exception) -> None:
    """A bug of ours ends the connection that it met, never the turn: edges come once.

    So does want of memory, of which ending it gives some back.
    """
    connection = owner if isinstance(owner, Walker | Relay | Direction) else None
    try:
        if not isinstance(error, MemoryError):
            log.error("can't go on with a connection: this is a bug", exc_info=error)
            if connection is not None:
                connection.cut(CloseReason.INTERNAL, repr(error))
        elif connection is not None:
            connection.cut(CloseReason.INTERNAL, NO_MEMORY)
        else:
            give_up()
    except MemoryError:
        give_up()
    except Exception:
        log.exception("can't end a connection: this is a bug")


def give_up() -> NoReturn:
    """End this process, which has no memory. Nothing here needs any."""
    try:
        os.write(2, _NO_MEMORY)
    finally:
        os._exit(EXIT_NO_MEMORY)


class Walker:
    """A walk that waits. Most never do: they are over when `start` returns."""

    __slots__ = ("_engine", "_walk", "timer")

    def __init__(self, engine: Engine, walk: Walk) -> None:
        self._engine = engine
        self._walk: Walk | None = walk
        self.timer: dict[object, None] | None = None

    def wait(self, step: Wait) -> None:
        try:
            self._engine.watch(step.stream, self, READ_AND_WRITE if step.connecting else READ)
            self._engine.set_timer(self, step.deadline)
        except Exception as error:
            end_by_bug(self, error)

    def on_event(self, _events: int) -> None:
        self._resume(True)

    def on_timer(self, now: float) -> None:
        self._resume(False)

    def _resume(self, happened: bool) -> None:
        self._engine.cancel_timer(self)
        walk = self._walk
        if walk is None:
            return
        try:
            step = walk.send(happened)
        except StopIteration as end:
            self._walk = None
            self._engine._relay(end.value)
        except Exception:
            self._walk = None
            log.exception("a connection ended by a bug of ours")
        else:
            self.wait(step)

    def cut(self, reason: CloseReason, detail: str) -> None:
        """End this walk from outside, wherever it is."""
        walk, self._walk = self._walk, None
        if walk is None:
            return
        self._engine.cancel_timer(self)
        with contextlib.suppress(StopIteration):
            walk.throw(PeerError(reason, detail))


class Timers:
    """Deadlines in buckets of _TICK_S, or of a second for the far ones."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
        self._loop, self._engine = loop, engine
        self._buckets: dict[int, dict[object, None]] = {}
        self._ticks: list[int] = []  # a heap of the keys of _buckets
        self._handle: asyncio.TimerHandle | None = None
        self._armed_for = 0

    def set(self, item: Timed, due: float) -> None:
        """Call item.on_timer at `due` or up to a tick later, unless cancelled or set anew."""
        if item.timer is not None:
            del item.timer[item]
        tick = int(due / _TICK_S) + 1
        if due - self._engine.now >= _COARSE_FROM_S:
            tick += -tick % _COARSE_TICKS
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = {}
            heapq.heappush(self._ticks, tick)
            if self._handle is None or tick < self._armed_for:
                self._arm()
        bucket[item] = None
        item.timer = bucket

    def cancel(self, item: Timed) -> None:
        if item.timer is not None:
            del item.timer[item]
            item.timer = None

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._armed_for = self._ticks[0]
        delay = self._armed_for * _TICK_S - time.monotonic()
        self._handle = self._loop.call_later(max(0.0, delay), self._on_time)

    def _on_time(self) -> None:
        try:
            self._ring()
        except MemoryError:
            give_up()

    def _ring(self) -> None:
        self._handle = None
        now = self._engine.now = time.monotonic()
        while self._ticks and self._ticks[0] * _TICK_S <= now:
            bucket = self._buckets.pop(heapq.heappop(self._ticks))
            while bucket:
                item: Any = next(iter(bucket))
                del bucket[item]
                item.timer = None
                try:
                    item.on_timer(now)
                except Exception as error:
                    end_by_bug(item, error)
        if self._ticks:
            self._arm()
