"""A model of TCP and of edge-triggered epoll that tells no more than the kernel promises.

And no earlier (epoll(7), net/ipv4/tcp.c):

- an edge comes when data, FIN or RST arrive, and when room becomes available after a send that
  found too little; what an epoll_wait returns is the state of that moment, and it is told once;
- room is announced only when a third of the send buffer is free (sk_stream_write_space);
- anything may happen between two system calls of the relay, not only between two events.

Bytes are numbered by their position in the stream, so that one lost, doubled or out of order is
seen at once. An action of the relay that makes no sense on a socket fails.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from tproxyd.errors import CloseReason
from tproxyd.flow.pipes import Pipe
from tproxyd.flow.relay import Direction, Relay
from tproxyd.flow.stream import Bytes, Stream

BUFFER = 16  # so that every way round a buffer is gone in a few steps
PIPE = 24  # neither a multiple nor a fraction of it
IN, OUT, HUP, ERR = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLERR
RDHUP = select.EPOLLRDHUP
BLOCKED = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def payload(position: int, size: int) -> bytes:
    """The bytes that belong at this position of a stream: 251 is prime, so no buffer fits it."""
    return bytes((position + i) % 251 for i in range(size))


class Outcome(NamedTuple):
    """What a relay says when it is over, and the bytes that it has delivered."""

    reason: CloseReason
    detail: str
    received: int  # from downstream
    sent: int  # to downstream
    aborted: bool

    @classmethod
    def of(cls, relay: Relay, reason: CloseReason, detail: str, aborted: bool) -> Outcome:
        return cls(reason, detail, relay.up.delivered, relay.down.delivered, aborted)


class Net:
    """What happens meanwhile: actions of the far ends, done between two system calls."""

    def __init__(self) -> None:
        self.meanwhile: deque[Callable[[], None]] = deque()

    def syscall(self) -> None:
        if self.meanwhile:
            self.meanwhile.popleft()()


class FakeTcp:
    """Our socket of one connection, and (far_*) what its other end does and has seen."""

    def __init__(self, net: Net, name: str, number: int, window: int) -> None:
        self.net, self.name, self.number, self.window = net, name, number, window
        self.inbox = bytearray()  # arrived, not yet read by the relay
        self.outbox = bytearray()  # sent by the relay, not yet read by the far end
        self.far_sent = 0
        self.far_got = 0
        self.far_fin = False  # the far end sent FIN
        self.far_rst = False
        self.fin = False  # the relay sent FIN
        self.error = 0  # sk_err
        self.wants_room = False  # SOCK_NOSPACE
        self.ready = False  # in epoll's ready list
        self.interest = 0  # what epoll was asked to tell; HUP and ERR it always tells
        self.held = 0  # of the outbox: sent with MSG_MORE, waits for more
        self.closed = False  # by the walk, when the relay is over
        self.lies = False  # the next splice says "end" where there is none: an urgent byte

    # The far end -------------------------------------------------------------------------------

    def far_write(self, size: int) -> None:
        size = min(size, self.window - len(self.inbox))
        if size <= 0 or self.far_fin or self.far_rst:
            return
        self.inbox += payload(self.far_sent, size)
        self.far_sent += size
        self.wake()

    def far_finish(self) -> None:
        if not (self.far_fin or self.far_rst):
            self.far_fin = True
            self.wake()

    def far_reset(self) -> None:
        if not self.far_rst:
            self.far_rst = True
            self.error = errno.EPIPE if self.far_fin else errno.ECONNRESET  # tcp_reset()
            self.outbox.clear()
            self.held = 0
            self.wake()

    def far_read(self, size: int) -> None:
        got = bytes(self.outbox[: min(size, len(self.outbox) - self.held)])
        del self.outbox[: len(got)]
        assert got == payload(self.far_got, len(got)), f"{self.name} got other bytes than were sent"
        self.far_got += len(got)
        if (
            self.wants_room
            and self.interest & OUT
            and 3 * (self.window - len(self.outbox)) >= self.window
        ):
            self.wants_room = False
            self.wake()

    # epoll -------------------------------------------------------------------------------------

    def wake(self) -> None:
        self.ready = bool(self.told())

    def told(self) -> int:
        """What an epoll_wait now would return for this socket."""
        return self.mask() & (self.interest | HUP | ERR) if self.interest else 0

    def mask(self) -> int:
        """tcp_poll()"""
        events = 0
        if self.inbox:
            events |= IN
        if self.far_fin or self.far_rst:
            events |= IN | RDHUP
        if self.far_rst or (self.far_fin and self.fin):
            events |= HUP
        if self.error:
            events |= ERR
        if self.fin or self.far_rst or 3 * (self.window - len(self.outbox)) >= self.window:
            events |= OUT
        return events

    # Stream ------------------------------------------------------------------------------------

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int, flags: int) -> int:
        self._syscall()
        assert flags & socket.MSG_DONTWAIT
        size = min(nbytes, len(self.inbox))
        if not size:
            if self.far_fin:  # SOCK_DONE: an end stays an end, whatever came after it
                return 0
            if self.error:
                raise self._take_error()
            if self.far_rst:
                return 0
            raise BLOCKED
        buffer[:size] = self.inbox[:size]
        del self.inbox[:size]
        return size

    def send(self, data: Bytes, flags: int) -> int:
        self._syscall()
        assert flags & socket.MSG_DONTWAIT
        assert flags & socket.MSG_NOSIGNAL
        assert len(data), "an empty send"
        assert not self.fin, "a send after the end"
        if self.error:
            raise self._take_error()
        if self.far_rst:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        size = min(len(data), self.window - len(self.outbox))
        if size < len(data):
            self.wants_room = True
        if not size:
            raise BLOCKED
        self.outbox += data[:size]
        # One that finds too little room pushes all the same (tcp_sendmsg_locked).
        more = flags & socket.MSG_MORE and size == len(data)
        self.held = self.held + size if more else 0
        return size

    def shutdown(self, how: int) -> None:
        self._syscall()
        assert how == socket.SHUT_WR
        assert not self.fin, "shut down twice"
        if self.far_rst:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self.fin = True
        self.held = 0

    def setsockopt(self, level: int, name: int, value: int | bytes) -> None:
        self._syscall()
        assert (level, value) == (socket.IPPROTO_TCP, 1)
        assert name in (socket.TCP_NODELAY, socket.TCP_QUICKACK)
        if name == socket.TCP_NODELAY:
            self.held = 0  # tcp_push_pending_frames()

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        self._syscall()
        assert (level, name) == (socket.SOL_SOCKET, socket.SO_ERROR)
        code, self.error = self.error, 0
        return code.to_bytes(size, "little")

    def _syscall(self) -> None:
        assert not self.closed, f"{self.name} is used after it was closed"
        self.net.syscall()

    def _take_error(self) -> OSError:
        code, self.error = self.error, 0
        return OSError(code, os.strerror(code))

    def fileno(self) -> int:
        return self.number

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def _never(self, *_: object) -> Any:  # noqa: ANN401
        raise AssertionError("a relay does not do this")

    getsockname = bind = connect_ex = close = _never


class FakePipe(Pipe):
    """As splice(2) with a pipe between two sockets behaves."""

    def __init__(self) -> None:
        self.held = 0
        self._bytes = b""

    def fill(self, source: Stream) -> int:
        assert isinstance(source, FakeTcp)
        assert not self.held
        if source.lies:
            source.lies = False
            return 0
        view = memoryview(bytearray(PIPE))
        self.held = source.recv_into(view, PIPE, socket.MSG_DONTWAIT)
        self._bytes = bytes(view[: self.held])
        return self.held

    def drain(self, sink: Stream) -> int:
        sent = sink.send(self._bytes, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        self._bytes = self._bytes[sent:]
        self.held -= sent
        return sent

    def close(self) -> None:
        raise AssertionError("a relay gives back what was lent to it")


class FakeDriver:
    """The engine as a relay sees it, with so many pipes."""

    def __init__(self, *streams: FakeTcp, pipes: int) -> None:
        self.view = memoryview(bytearray(BUFFER))
        self.now = 0.0
        self.streams = streams
        self.handlers: dict[FakeTcp, Direction] = {}
        self.pipes: list[Pipe] = [FakePipe() for _ in range(pipes)]
        self.tasks: deque[Direction] = deque()
        self.due: float | None = None

    def watch(self, stream: Any, handler: Direction) -> bool:  # noqa: ANN401
        first = not stream.interest
        self.handlers[stream] = handler
        if first:
            stream.interest = IN | RDHUP
            stream.wake()  # EPOLL_CTL_ADD looks once
        return first

    def watch_for_room(self, stream: Any) -> None:  # noqa: ANN401
        stream.interest |= OUT
        stream.wake()  # and so does EPOLL_CTL_MOD

    def again(self, way: Direction) -> None:
        self.tasks.append(way)

    def set_timer(self, item: Relay, due: float) -> None:
        self.due = due

    def cancel_timer(self, item: Relay) -> None:
        self.due = None
        item.timer = None

    def lease_pipe(self) -> Pipe | None:
        return self.pipes.pop() if self.pipes else None

    def return_pipe(self, pipe: Pipe) -> None:
        assert pipe not in self.pipes, "given back twice"
        self.pipes.append(FakePipe())
