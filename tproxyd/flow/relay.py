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
- A direction moves at most TURN_READS buffers, or a pipe's worth, and then queues up behind the
  others, so that a bulk stream does not starve small ones.
- Where a whole buffer was waiting it is a bulk stream: from then on its bytes go through a pipe, by
  splice, and are never copied (pipes.py).

A Relay is also its own timer: activity only stores a time, and the deadline, when it comes, looks
whether it still stands. A far one is looked at on the way there: a bucket of the engine's timers is
a dict that keeps the room of all that were ever in it, and with an hour's worth of buckets that was
127 MiB at a thousand short connections a second.
"""

from __future__ import annotations

import errno
import select
import socket
from typing import NamedTuple, Protocol

from tproxyd.errors import CloseReason
from tproxyd.flow.pipes import Pipe
from tproxyd.flow.stream import Stream

# What pipes.py was measured against; a mebibyte gained nothing over it in a plain relay.
BUFFER_SIZE = 256 * 1024
_LOOK_S = 30.0  # the farthest that a timer is set
TURN_READS = 2  # half a mebibyte; by pipe it is one of half that size
# What a burst must have moved for the next one to go by pipe too. Not measured: a few pages are
# where handing them over gets cheaper than copying them.
BULK_SIZE = 32 * 1024

# Plain integers: an operation on the socket module's own flags makes an enum member, 3 µs.
DONTWAIT = int(socket.MSG_DONTWAIT)
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_SEND_MORE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | socket.MSG_MORE)
_IN = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_OUT = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
# There is an end to be read, or an urgent byte, at which a recv stops short.
_LAST = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_FIN = select.EPOLLRDHUP  # an end, with nothing to come behind what is here
_ERR = select.EPOLLERR
_SO_ERROR_SIZE = 4


class Limits(NamedTuple):
    idle_s: float  # 0: none
    half_close_s: float


class Driver(Protocol):
    """What a relay needs of the engine."""

    view: memoryview
    now: float

    def watch(self, stream: Stream, handler: Direction) -> bool: ...
    def watch_for_room(self, stream: Stream) -> None: ...
    def again(self, way: Direction) -> None: ...
    def set_timer(self, item: Relay, due: float) -> None: ...
    def cancel_timer(self, item: Relay) -> None: ...
    def lease_pipe(self) -> Pipe | None: ...
    def return_pipe(self, pipe: Pipe) -> None: ...


class Direction:
    """One way: bytes from `source` to where `back`, the other way, comes from.

    The engine calls it with the events of `source`. It and its relay point at each other until that
    is over; then they are parted, so that no collector has to look for them.
    """

    __slots__ = (
        "back",
        "bulk",
        "delivered",
        "ended",
        "queued",
        "relay",
        "rest",
        "source",
        "stop_reading",
    )

    back: Direction

    def __init__(self, relay: Relay, source: Stream, rest: bytes) -> None:
        self.relay: Relay | None = relay  # None: it is over
        self.source = source
        self.rest: memoryview | bytes | Pipe = rest  # read, not yet delivered
        self.delivered = 0
        self.bulk = 0  # of a bulk stream: what this burst has moved, 1 at least
        self.queued = False  # for another turn
        self.stop_reading = False  # EOF was read
        self.ended = False  # EOF was read and everything delivered

    def on_event(self, events: int) -> None:
        relay = self.relay
        if relay is None:
            return
        relay.last_active = relay.driver.now
        if events & _OUT and self.back.rest:
            relay.flush(self.back)
        if events & _IN and not relay.over:
            if not (self.rest or self.stop_reading):
                relay.pump(self, events & _LAST, events & _FIN)
            if events & _ERR:
                relay.check_unread(self)

    def go_on(self) -> None:
        """Its next turn: it had more than its share to move."""
        self.queued = False
        relay = self.relay
        if relay is not None and not self.rest:
            relay.pump(self, thorough=True)
            relay.check_unread(self)

    def cut(self, reason: CloseReason, detail: str) -> None:
        if self.relay is not None:
            self.relay.cut(reason, detail)


class Relay:
    """Both directions of one connection. A walk ends in it, and the engine calls start().

    A subclass says what `finished` does.
    """

    __slots__ = (
        "_first",
        "_limits",
        "_torn",
        "down",
        "driver",
        "last_active",
        "over",
        "timer",
        "up",
    )

    driver: Driver
    last_active: float

    def __init__(self, downstream: Stream, upstream: Stream, early: bytes, limits: Limits) -> None:
        self.up = Direction(self, downstream, early)
        self.down = Direction(self, upstream, b"")
        self.up.back, self.down.back = self.down, self.up
        self._limits = limits
        self._first: Direction | None = None  # the one that ended first
        self._torn: Direction | None = None  # the one that has no end, only an RST
        self.over = False
        self.timer: dict[object, None] | None = None  # engine.Timers' own

    def finished(self, reason: CloseReason, detail: str, aborted: bool) -> None:
        """Called once, from within an event or start(). The sockets are open, and to be closed:
        by RST where it was `aborted`.
        """
        raise NotImplementedError

    def start(self, driver: Driver) -> None:
        """Begin moving bytes."""
        up, down = self.up, self.down
        self.driver = driver
        self.last_active = driver.now
        # Registering a socket reports what it holds by then. One that was registered before, while
        # the walk waited for it, has had its edges already: it is read until it says so.
        new_downstream = driver.watch(up.source, up)
        new_upstream = driver.watch(down.source, down)
        if up.rest and self._deliver(up):
            # They carried the ACK of the handshake (connect.py); from here on it is as usual.
            down.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not (new_downstream or self.over or up.rest):
            self.pump(up, thorough=True)
        if not (new_upstream or self.over):
            self.pump(down, thorough=True)
        if not new_downstream:
            self.check_unread(up)
        if not new_upstream:
            self.check_unread(down)
        if not self.over:
            self._set_timer()

    def pump(self, way: Direction, thorough: int, fin: int = 0) -> None:
        """Move what is there, up to TURN_READS buffers; `thorough`: until recv says so.

        `fin`: the end of the stream is behind it, said an event (which may be stale).
        """
        if way.stop_reading or (way.bulk and self._by_pipe(way)):
            return
        view, source, sink = self.driver.view, way.source, way.back.source
        held = False  # MSG_MORE holds bytes back
        for _ in range(TURN_READS):
            try:
                n = source.recv_into(view, BUFFER_SIZE, DONTWAIT)
            except BlockingIOError:
                if held:  # `fin` was stale
                    self._let_go(sink)
                return
            except OSError as error:
                if held:  # an RST is an end, too, and our own throws away what has not left
                    self._let_go(sink)
                self._reset(way, error)
                return
            if n == 0:
                self._eof(way)
                return
            more = fin and n < BUFFER_SIZE
            try:
                sent = sink.send(view[:n], _SEND_MORE if more else _SEND)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._sink_gone(way, error)
                return
            way.delivered += sent
            if sent < n:
                way.rest = bytes(view[sent:n])
                if held:
                    self._let_go(sink)
                self.driver.watch_for_room(sink)
                return
            if n < BUFFER_SIZE:
                held = bool(more)
                if not thorough:
                    return
            elif not way.bulk:
                way.bulk = n
                self.up.source.setblocking(False)  # accept left it in that mode (listen.py)
                if self._by_pipe(way):
                    return
        if held:
            self._let_go(sink)
        self._queue(way)

    def _by_pipe(self, way: Direction) -> bool:
        """Move a turn's share by splice; whether that is all for now. If not, recv goes on.

        recv has the last word on whether there is more, or an end: splice says nothing, and even
        end, where it meets an urgent byte (__tcp_read_sock in net/ipv4/tcp.c).
        """
        pipe = self.driver.lease_pipe()
        if pipe is None:
            return False
        try:
            n = pipe.fill(way.source)
        except BlockingIOError:
            n = 0
        except OSError as error:
            self.driver.return_pipe(pipe)
            self._reset(way, error)
            return True
        if n == 0:
            self.driver.return_pipe(pipe)
            way.bulk = 1 if way.bulk >= BULK_SIZE else 0
            return False
        way.bulk += n
        way.rest = pipe
        if self._deliver(way):
            self._queue(way)
        return True

    def _let_go(self, sink: Stream) -> None:
        """Send what MSG_MORE holds back: setting TCP_NODELAY anew does that (tcp(7))."""
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _queue(self, way: Direction) -> None:
        if not way.queued:
            way.queued = True
            self.driver.again(way)

    def flush(self, way: Direction) -> None:
        """Deliver what was left over, then read on: edges were ignored meanwhile."""
        if self._deliver(way):
            if way.stop_reading:
                self._end(way)
            else:
                self.pump(way, thorough=True)

    def _deliver(self, way: Direction) -> bool:
        """Send what was left over; whether all of it went."""
        rest, sink = way.rest, way.back.source
        try:
            if isinstance(rest, Pipe):
                while rest.held:
                    way.delivered += rest.drain(sink)
                self.driver.return_pipe(rest)
            else:
                rest = memoryview(rest)
                while rest:
                    sent = sink.send(rest, _SEND)
                    way.delivered += sent
                    rest = rest[sent:]
        except BlockingIOError:
            way.rest = rest
            self.driver.watch_for_room(sink)
            return False
        except OSError as error:
            self._sink_gone(way, error)
            return False
        way.rest = b""
        return True

    def _drop_rest(self, way: Direction) -> None:
        if isinstance(way.rest, Pipe):
            self.driver.return_pipe(way.rest)
        way.rest = b""

    def _eof(self, way: Direction) -> None:
        way.stop_reading = True
        if not way.rest and way is not self._torn:
            self._end(way)

    def _end(self, way: Direction) -> None:
        """Everything of this direction is delivered, its end too."""
        way.ended = True
        if way.back.ended:
            first = self._first
            reason = CloseReason.DOWNSTREAM_FIN if first is self.up else CloseReason.UPSTREAM_FIN
            self._finish(reason, "", aborted=False)
            return
        self._first = way
        try:
            way.back.source.shutdown(socket.SHUT_WR)
        except OSError as error:  # ENOTCONN: reset in this very moment
            self._sink_gone(way, error)
            return
        self._set_timer()

    def _sink_gone(self, way: Direction, error: OSError) -> None:
        """The receiver of `way` is gone: deliver what it sent before that, then pass it on."""
        other = way.back
        self._drop_rest(way)
        way.stop_reading = True
        if error.errno not in (errno.EPIPE, errno.ENOTCONN):
            # RST, and this was its one error report: recv will answer 0 where the data ends, and
            # that is not to be told as an orderly end. (Behind a FIN the report is EPIPE.)
            self._torn = other
        while not self.over and not other.rest and not other.stop_reading:
            before = other.delivered
            self.pump(other, thorough=True)
            if other.delivered == before:
                break
        self._reset(other, error)

    def check_unread(self, way: Direction) -> None:
        """Look for an RST where no recv will find it, after its edge or where that is spent.

        We do not read because the other side stalls, or because this one has finished, and then
        closed altogether and was sent more. An RST must wait for neither.
        """
        if self.over or not (way.rest or way.stop_reading):
            return
        code = int.from_bytes(
            way.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR, _SO_ERROR_SIZE), "little"
        )
        if code:
            self._reset(way, OSError(code, errno.errorcode.get(code, str(code))))

    def _reset(self, way: Direction, error: OSError) -> None:
        """The socket that `way` reads says that its connection is broken."""
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            detail = ""
        else:  # ETIMEDOUT by keep-alive or retransmission, EHOSTUNREACH by ICMP …
            detail = error.strerror or str(error)
        downstream = way is self.up
        self._finish(
            CloseReason.DOWNSTREAM_RESET if downstream else CloseReason.UPSTREAM_RESET,
            detail,
            aborted=True,
        )

    def cut(self, reason: CloseReason, detail: str = "") -> None:
        """End it from outside (a drain deadline, `tproxyd kill`)."""
        self._finish(reason, detail, aborted=True)

    def on_timer(self, now: float) -> None:
        half = self._first is not None
        limit = self._limits.half_close_s if half else self._limits.idle_s
        if now - self.last_active < limit:
            self._set_timer()
            return
        reason = CloseReason.HALF_CLOSE_TIMEOUT if half else CloseReason.IDLE_TIMEOUT
        self._finish(reason, f"nothing moved for {limit:g} s", aborted=True)

    def _set_timer(self) -> None:
        limit = self._limits.half_close_s if self._first is not None else self._limits.idle_s
        if limit:
            due, far = self.last_active + limit, self.driver.now + _LOOK_S
            self.driver.set_timer(self, due if due < far else far)

    def _finish(self, reason: CloseReason, detail: str, aborted: bool) -> None:
        if self.over:
            return
        self.over = True
        if self.timer is not None:
            self.driver.cancel_timer(self)
        up, down = self.up, self.down
        if up.rest:
            self._drop_rest(up)
        if down.rest:
            self._drop_rest(down)
        try:
            self.finished(reason, detail, aborted)
        finally:
            del up.back, down.back
            up.relay = down.relay = None
