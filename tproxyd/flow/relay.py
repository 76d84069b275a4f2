"""Two half-duplex directions until both have ended. The hot loop of tproxyd.

Facts about edge-triggered epoll that shape this file:
- Each socket is registered once, edge-triggered. An edge says that something changed, once. Whoever
  ignores one must look for himself later. Room to write is asked for when a write came up short,
  once more per socket: from the start, it would be one event per socket that says nothing.
- A recv that returns less than asked has emptied the queue (epoll(7)), so the usual turn is one
  recv and one send, without a second recv to be told EAGAIN. A FIN that came with the last bytes
  shows as EPOLLRDHUP in the same event: then we do read on, to its 0, and send those bytes with
  MSG_MORE, so that they leave in one segment with the FIN that follows them.
- Events can be stale: the file descriptor was closed earlier in the same batch and its number used
  again. So flags are only hints where to look; every verdict comes from recv, send or SO_ERROR.

What follows from that:
- A direction whose receiver is full keeps the rest (at most one buffer: that is all a stalled
  reader costs), stops reading, and so the sender's window closes. When the receiver has room again
  the rest goes first, and then the sender is read until EAGAIN: its edges were ignored meanwhile.
- End of stream is a state of one direction: what is left is delivered, then the receiver gets our
  FIN (shutdown), unless the other direction has ended too: then close() says it, one call less.
- RST is passed on as RST (close with SO_LINGER 0). When sending fails because the receiver is gone,
  what it had sent before is still read and delivered first.
- One buffer per worker serves every connection; nothing is allocated per turn but a slice.
- A direction moves at most TURN_READS buffers at a time and then queues up behind the others, so
  that a bulk stream does not starve small ones.

A Relay is also its own timer: activity only stores a time, and the deadline, when it comes, looks
whether it still stands.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from tproxyd.errors import CloseReason
from tproxyd.flow.stream import Stream

# A prototype with this size moved 10-16 Gbit/s in one stream, where direct made 15-19 and HAProxy
# 10 with 128 KiB and 5-6 with its default. Other sizes were not measured.
BUFFER_SIZE = 256 * 1024
TURN_READS = 4

_DONTWAIT = socket.MSG_DONTWAIT
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_MORE = socket.MSG_MORE
_IN = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_OUT = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
# There is an end to be read, or an urgent byte, at which a recv stops short.
_LAST = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_FIN = select.EPOLLRDHUP  # an end, with nothing to come behind what is here
_ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s
_SO_ERROR_SIZE = 4


def reset_on_close(stream: Stream) -> None:
    """Have close() send RST: the other side learns that this was no orderly end."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)


def receive(stream: Stream, view: memoryview, size: int) -> int | None:
    """How many bytes came into `view`: 0 at the end of the stream, None when there are none yet."""
    try:
        return stream.recv_into(view, size, _DONTWAIT)
    except BlockingIOError:
        return None


class Limits(NamedTuple):
    idle_s: float  # 0: none
    half_close_s: float


class Outcome(NamedTuple):
    reason: CloseReason
    detail: str
    received: int  # bytes from downstream that were delivered upstream
    sent: int  # bytes from upstream that were delivered downstream
    aborted: bool  # the sockets, still open, are to be closed by RST


class Driver(Protocol):
    """What a relay needs of the engine."""

    view: memoryview
    now: float

    def watch(self, stream: Stream, handler: Callable[[int], None]) -> bool: ...
    def watch_for_room(self, stream: Stream) -> None: ...
    def again(self, task: Callable[[], None]) -> None: ...
    def set_timer(self, item: Relay, due: float) -> None: ...


class Direction:
    """One way: bytes from `source` to `sink`."""

    __slots__ = ("delivered", "ended", "read", "rest", "sink", "source", "stop_reading", "write")

    def __init__(self, source: Stream, sink: Stream) -> None:
        self.source, self.sink = source, sink
        self.read, self.write = source.recv_into, sink.send
        self.rest: memoryview | bytes = b""  # read, not yet delivered
        self.delivered = 0
        self.stop_reading = False  # EOF was read
        self.ended = False  # EOF was read and everything delivered


class Relay:
    """Both directions of one connection. The walk yields it; the engine calls start()."""

    __slots__ = (
        "_downstream",
        "_driver",
        "_finished",
        "_first",
        "_last_active",
        "_limits",
        "_over",
        "_queued",
        "_torn",
        "_upstream",
        "down",
        "timer",
        "up",
    )

    def __init__(self, downstream: Stream, upstream: Stream, early: bytes, limits: Limits) -> None:
        self._downstream, self._upstream = downstream, upstream
        self.up = Direction(downstream, upstream)
        self.down = Direction(upstream, downstream)
        self.up.rest = early
        self._limits = limits
        self._first: Direction | None = None  # the one that ended first
        self._torn: Direction | None = None  # the one that has no end, only an RST
        self._over = False
        self._queued = False
        self.timer: dict[object, None] | None = None  # engine.Timers' own

    def start(self, driver: Driver, finished: Callable[[Outcome], None]) -> None:
        """Begin moving bytes; `finished` is called once, from within an event or at once."""
        self._driver, self._finished = driver, finished
        self._last_active = driver.now
        # Registering a socket reports what it holds by then. One that was registered before, while
        # the walk waited for it, has had its edges already: it is read until it says so.
        new_downstream = driver.watch(self._downstream, self.on_downstream)
        new_upstream = driver.watch(self._upstream, self.on_upstream)
        if self.up.rest and self._deliver(self.up):
            # They carried the ACK of the handshake (connect.py); from here on it is as usual.
            self._upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not (self._over or self.up.rest or new_downstream):
            self._pump(self.up, thorough=True)
        if not (self._over or new_upstream):
            self._pump(self.down, thorough=True)
        if not new_downstream:
            self._check_unread(self.up)
        if not new_upstream:
            self._check_unread(self.down)
        if not self._over:
            self._set_timer()

    def on_downstream(self, events: int) -> None:
        self._on_event(self.up, self.down, events)

    def on_upstream(self, events: int) -> None:
        self._on_event(self.down, self.up, events)

    def _on_event(self, inward: Direction, outward: Direction, events: int) -> None:
        """`inward` comes from the socket that has the events, `outward` goes to it."""
        self._last_active = self._driver.now
        if events & _OUT and outward.rest:
            self._flush(outward)
        if events & _IN and not self._over:
            if not (inward.rest or inward.stop_reading):
                self._pump(inward, bool(events & _LAST), bool(events & _FIN))
            if events & select.EPOLLERR:
                self._check_unread(inward)

    def _pump(self, way: Direction, thorough: bool, fin: bool = False) -> None:
        """Move what is there, up to TURN_READS buffers; `thorough`: until recv says so.

        `fin`: the end of the stream is behind it, said an event (which may be stale).
        """
        if way.stop_reading:
            return
        view = self._driver.view
        held = False  # MSG_MORE holds bytes back
        for _ in range(TURN_READS):
            try:
                n = way.read(view, BUFFER_SIZE, _DONTWAIT)
            except BlockingIOError:
                if held:  # `fin` was stale
                    self._let_go(way)
                return
            except OSError as error:
                self._reset(way.source, error)
                return
            if n == 0:
                self._eof(way)
                return
            more = fin and n < BUFFER_SIZE
            try:
                sent = way.write(view[:n], _SEND_FLAGS | _MORE if more else _SEND_FLAGS)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._sink_gone(way, error)
                return
            way.delivered += sent
            if sent < n:
                way.rest = bytes(view[sent:n])
                if held:
                    self._let_go(way)
                self._driver.watch_for_room(way.sink)
                return
            held = more
            if n < BUFFER_SIZE and not thorough:
                return
        if held:
            self._let_go(way)
        if not self._queued:
            self._queued = True
            self._driver.again(self._continue)

    def _let_go(self, way: Direction) -> None:
        """Send what MSG_MORE holds back: setting TCP_NODELAY anew does that (tcp(7))."""
        way.sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _continue(self) -> None:
        """The next turn of whichever direction had more than its share to move."""
        self._queued = False
        for way in (self.up, self.down):
            if not self._over and not way.rest:
                self._pump(way, thorough=True)
                self._check_unread(way)

    def _flush(self, way: Direction) -> None:
        """Deliver what was left over, then read on: edges were ignored meanwhile."""
        if self._deliver(way):
            if way.stop_reading:
                self._end(way)
            else:
                self._pump(way, thorough=True)

    def _deliver(self, way: Direction) -> bool:
        """Send what was left over; whether all of it went."""
        rest = memoryview(way.rest)
        while rest:
            try:
                sent = way.write(rest, _SEND_FLAGS)
            except BlockingIOError:
                way.rest = rest
                self._driver.watch_for_room(way.sink)
                return False
            except OSError as error:
                self._sink_gone(way, error)
                return False
            way.delivered += sent
            rest = rest[sent:]
        way.rest = b""
        return True

    def _eof(self, way: Direction) -> None:
        way.stop_reading = True
        if not way.rest and way is not self._torn:
            self._end(way)

    def _end(self, way: Direction) -> None:
        """Everything of this direction is delivered, its end too."""
        way.ended = True
        other = self.down if way is self.up else self.up
        if other.ended:
            first = self._first
            reason = CloseReason.DOWNSTREAM_FIN if first is self.up else CloseReason.UPSTREAM_FIN
            self._finish(reason, "", aborted=False)
            return
        self._first = way
        try:
            way.sink.shutdown(socket.SHUT_WR)
        except OSError as error:  # ENOTCONN: reset in this very moment
            self._sink_gone(way, error)
            return
        self._set_timer()

    def _sink_gone(self, way: Direction, error: OSError) -> None:
        """The receiver of `way` is gone: deliver what it sent before that, then pass it on."""
        other = self.down if way is self.up else self.up
        way.rest = b""
        way.stop_reading = True
        if error.errno not in (errno.EPIPE, errno.ENOTCONN):
            # RST, and this was its one error report: recv will answer 0 where the data ends, and
            # that is not to be told as an orderly end. (Behind a FIN the report is EPIPE.)
            self._torn = other
        while not self._over and not other.rest and not other.stop_reading:
            before = other.delivered
            self._pump(other, thorough=True)
            if other.delivered == before:
                break
        self._reset(way.sink, error)

    def _check_unread(self, way: Direction) -> None:
        """Look for an RST where no recv will find it, after its edge or where that is spent.

        We do not read because the other side stalls, or because this one has finished, and then
        closed altogether and was sent more. An RST must wait for neither.
        """
        if self._over or not (way.rest or way.stop_reading):
            return
        code = int.from_bytes(
            way.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR, _SO_ERROR_SIZE), "little"
        )
        if code:
            self._reset(way.source, OSError(code, errno.errorcode.get(code, str(code))))

    def _reset(self, stream: Stream, error: OSError) -> None:
        downstream = stream is self._downstream
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            detail = ""
        else:  # ETIMEDOUT by keep-alive or retransmission, EHOSTUNREACH by ICMP …
            detail = error.strerror or str(error)
        self._finish(
            CloseReason.DOWNSTREAM_RESET if downstream else CloseReason.UPSTREAM_RESET,
            detail,
            aborted=True,
        )

    def cut(self, reason: CloseReason, detail: str = "") -> None:
        """End it from outside (a drain deadline)."""
        if not self._over:
            self._finish(reason, detail, aborted=True)

    def on_timer(self, now: float) -> None:
        half = self._first is not None
        limit = self._limits.half_close_s if half else self._limits.idle_s
        if now - self._last_active < limit:
            self._set_timer()
            return
        reason = CloseReason.HALF_CLOSE_TIMEOUT if half else CloseReason.IDLE_TIMEOUT
        self._finish(reason, f"nothing moved for {limit:g} s", aborted=True)

    def _set_timer(self) -> None:
        limit = self._limits.half_close_s if self._first is not None else self._limits.idle_s
        if limit:
            self._driver.set_timer(self, self._last_active + limit)

    def _finish(self, reason: CloseReason, detail: str, aborted: bool) -> None:
        if self._over:
            return
        self._over = True
        self._finished(Outcome(reason, detail, self.up.delivered, self.down.delivered, aborted))
