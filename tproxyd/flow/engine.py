"""The worker's own epoll and its deadlines: resumes connections, moves bytes.

uvloop runs the worker (signals, timers, the control socket); traffic does not pass through it. The
engine has an epoll instance of its own, whose file descriptor uvloop watches like any other, and
drains it with epoll.poll(0). Measured with 64 keep-alive connections: raw sockets this way do 1.4
times the requests of uvloop's transports; the kernel is most of the cost, so the shortest way to
the kernel wins.

Handlers stand in a list indexed by file descriptor. Events of one batch can be stale (relay.py's
head says what that means); a handler that is gone is simply not there any more.

Deadlines are kept in coarse buckets, because nearly all of them are cancelled before they fall due:
setting or cancelling one is a dict operation, and one timer of the loop serves them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Protocol

from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow.relay import BUFFER_SIZE, Outcome, Relay
from tproxyd.flow.stream import Stream, Wait

# HUP and ERR always come. PRI: a recv stops at an urgent byte, though more lies behind it.
READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
READ_AND_WRITE = READ | select.EPOLLOUT
_BATCH = 256  # events per drain: uvloop's other descriptors get their turn in between
_TICK_S = 0.05  # how late a deadline may fall due; a second for those of half a minute and more
_COARSE_TICKS = 20
_COARSE_FROM_S = 30.0

log = logging.getLogger(__name__)

Handler = Callable[[int], object]
Walk = Generator[Any, Any, None]  # yields Wait, and once its Relay


class Timed(Protocol):
    timer: dict[object, None] | None

    def on_timer(self, now: float) -> None: ...


class Engine:
    """One worker's event engine. Single-threaded; everything happens inside `turn`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.view = memoryview(bytearray(BUFFER_SIZE))
        self.now = time.monotonic()
        self.walks: set[Walker] = set()
        self._loop = loop
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._handlers: list[Handler | None] = [None] * 1024
        self._again: deque[Callable[[], None]] = deque()
        self._turn_asked = False
        self._timers = Timers(loop, self)
        loop.add_reader(self._epoll.fileno(), self.turn)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._timers.close()
        self._epoll.close()

    def turn(self) -> None:
        """Handle what has happened since the last turn. Called by the loop."""
        self.now = time.monotonic()
        handlers = self._handlers
        # Work left over from this turn is done in the next one, after new events had theirs.
        leftover = len(self._again)
        for fd, events in self._poll(0, _BATCH):
            handler = handlers[fd]
            if handler is not None:
                try:
                    handler(events)
                except Exception as error:
                    end_by_bug(handler, error)
        for _ in range(leftover):
            task = self._again.popleft()
            try:
                task()
            except Exception as error:
                end_by_bug(task, error)
        if self._again:
            self._ask_for_turn()

    def again(self, task: Callable[[], None]) -> None:
        """Run `task` in the next turn, behind the events that wait by then."""
        self._again.append(task)
        self._ask_for_turn()

    def _ask_for_turn(self) -> None:
        if not self._turn_asked:  # one is enough: two would ask for two each, and so on
            self._turn_asked = True
            self._loop.call_soon(self._asked_turn)

    def _asked_turn(self) -> None:
        self._turn_asked = False
        if self._again:
            self.turn()

    def listen(self, sock: socket.socket, handler: Handler) -> None:
        """Watch a listening socket, level-triggered: what is left in its queue is told again."""
        self._set_handler(sock.fileno(), handler)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def unlisten(self, sock: socket.socket) -> None:
        self._handlers[sock.fileno()] = None
        self._epoll.unregister(sock.fileno())

    def watch(self, stream: Stream, handler: Handler, events: int = READ) -> bool:
        """Have `handler` called with the events of a socket; it is registered with epoll once.

        True the first time: then the events of the past are told again. `forget` before close().
        """
        fd = stream.fileno()
        first = fd >= len(self._handlers) or self._handlers[fd] is None
        self._set_handler(fd, handler)
        if first:
            self._epoll.register(fd, events)
        return first

    def watch_for_room(self, stream: Stream) -> None:
        """From now on tell its handler too when there is room to write, as there may be already."""
        self._epoll.modify(stream.fileno(), READ_AND_WRITE)

    def _set_handler(self, fd: int, handler: Handler) -> None:
        while fd >= len(self._handlers):
            self._handlers.extend([None] * len(self._handlers))
        self._handlers[fd] = handler

    def forget(self, stream: Stream) -> None:
        """A socket is about to be closed (which takes it out of epoll)."""
        fd = stream.fileno()
        if 0 <= fd < len(self._handlers):
            self._handlers[fd] = None

    def set_timer(self, item: Timed, due: float) -> None:
        self._timers.set(item, due)

    def cancel_timer(self, item: Timed) -> None:
        self._timers.cancel(item)

    def start(self, walk: Walk) -> None:
        """Begin a connection's walk; it runs until it first waits."""
        walker = Walker(self, walk)
        self.walks.add(walker)
        walker.resume(None)


def end_by_bug(task: Callable[..., object], error: Exception) -> None:
    """A bug of ours ends the connection whose task this is, never the turn: edges come once."""
    owner = getattr(task, "__self__", None)
    log.error("can't go on with a connection: this is a bug", exc_info=error)
    if isinstance(owner, Walker | Relay):
        try:
            owner.cut(CloseReason.INTERNAL, repr(error))
        except Exception:
            log.exception("can't end a connection: this is a bug")


class Walker:
    """A walk and what it waits for."""

    __slots__ = ("_engine", "_relay", "_send", "_walk", "timer")

    def __init__(self, engine: Engine, walk: Walk) -> None:
        self._engine, self._walk, self._send = engine, walk, walk.send
        self._relay: Relay | None = None
        self.timer: dict[object, None] | None = None

    def resume(self, value: object) -> None:
        try:
            step = self._send(value)
        except StopIteration:
            self._engine.walks.discard(self)
            return
        except Exception:
            self._engine.walks.discard(self)
            log.exception("a connection ended by a bug of ours")
            return
        try:
            self._await(step)
        except Exception as error:
            end_by_bug(self.resume, error)

    def _await(self, step: Wait | Relay) -> None:
        engine = self._engine
        if isinstance(step, Wait):
            # A connect in progress ends as room to write.
            engine.watch(step.stream, self._on_event, READ_AND_WRITE)
            engine.set_timer(self, step.deadline)
        else:
            self._relay = step
            step.start(engine, self._on_outcome)

    def _on_event(self, _events: int) -> None:
        self._engine.cancel_timer(self)
        self.resume(True)

    def on_timer(self, now: float) -> None:
        self.resume(False)

    def _on_outcome(self, outcome: Outcome) -> None:
        relay, self._relay = self._relay, None
        if relay is not None:
            self._engine.cancel_timer(relay)
        self.resume(outcome)

    def cut(self, reason: CloseReason, detail: str) -> None:
        """End this walk from outside, whatever it is doing."""
        if self._relay is not None:
            self._relay.cut(reason, detail)
            return
        if self not in self._engine.walks:
            return
        self._engine.cancel_timer(self)
        self._engine.walks.discard(self)
        with contextlib.suppress(StopIteration):
            self._walk.throw(PeerError(reason, detail))


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
        self.cancel(item)
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
                    end_by_bug(item.on_timer, error)
        if self._ticks:
            self._arm()
