"""A conversation between a walk and the world, written down before it happens.

    Playbook(policy="require")
    << "client recv"                >> b"PROXY TCP4 106.52.131.116 "
    << "client recv"                >> NOTHING
    << "wait for client until 5"    >> True
    ...

`<<` is what the walk does, `>>` what the world answers. A playbook is strict: the walk must do
exactly this, in this order, and nothing is answered that is not written. The first deviation fails
with the conversation up to there. No socket is involved: the playbook is the World and its streams.

Written down is what a connection does to sockets, when it waits, and what it counts. Not written
down, because nothing depends on its order: asking for the time (the clock starts at 0 and moves
only while the walk waits) and for the names of sockets.

After the last line the playbook itself checks what holds for every connection: exactly one record,
every stream closed exactly once, nobody touched after it was closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, TypeVar

from tproxyd.addr import Client, Endpoint, Peer, Upstream, parse_prefix
from tproxyd.addr import PrefixSet as Prefixes
from tproxyd.config import (
    HeaderPolicy,
    Listener,
    ProxyProtocol,
    SendProxy,
    SendTlvs,
    SourceKind,
)
from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow import policy as policies
from tproxyd.flow.announce import announcer
from tproxyd.flow.balance import Cluster
from tproxyd.flow.connect import source_port
from tproxyd.flow.connection import Lane, serve
from tproxyd.flow.policy import Plan
from tproxyd.flow.proxyproto import encode_v2
from tproxyd.flow.record import Record
from tproxyd.flow.relay import Limits
from tproxyd.flow.stream import Address, Bytes, Stream, Wait
from tproxyd.flow.tally import HeaderResult, PortCause
from tproxyd.flow.tlv import Tlv
from tproxyd.tests.tcpmodel import Outcome

Result = TypeVar("Result")


def rotate(port: int) -> int:
    """The source port for a client's, when it is free."""
    return source_port(port, 0)


PEER = Endpoint("10.9.1.2", 40000)
APP = Endpoint("10.9.1.1", 80)
KERNEL_PORT = 45678  # what the kernel chooses in a playbook, when it is left to it
FIN = Outcome(CloseReason.DOWNSTREAM_FIN, "", 3, 5, aborted=False)
ENDED = "end both by FIN: downstream_fin"  # and what the walk does then
RESET = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
AS_PEER = f"{PEER.host}:{rotate(PEER.port)}"
FAR = Endpoint("106.52.131.116", 51234)  # the client that headers name here
AS_FAR = f"{FAR.host}:{rotate(FAR.port)}"
V1 = f"PROXY TCP4 {FAR.host} {APP.host} {FAR.port} {APP.port}\r\n".encode()
V2 = encode_v2(FAR, APP, [Tlv(5, b"id-1")])


class _Word:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


NOTHING: Final = _Word("NOTHING")  # recv: no bytes yet
EOF: Final = b""
_UNANSWERED: Final = _Word("no answer")


@dataclass(frozen=True)
class Passed:
    """Answers a wait: something happened, or the deadline passed, after so many seconds."""

    seconds: float
    happened: bool = True


@dataclass(frozen=True)
class Cut:
    """Answers a wait: the walk is ended from outside, as by a drain deadline."""

    reason: CloseReason


@dataclass
class Line:
    call: str
    answer: Any = _UNANSWERED

    def __str__(self) -> str:
        return f"<< {self.call}" + (
            "" if self.answer is _UNANSWERED else f"\n    >> {self.answer!r}"
        )


class FakeStream:
    """A socket that says what the playbook says."""

    def __init__(self, book: Playbook, name: str, number: int, local: Endpoint | None) -> None:
        self.book, self.name, self.number, self.local = book, name, number, local
        self.closed = False

    def fileno(self) -> int:
        return self.number

    def getsockname(self) -> Any:  # noqa: ANN401
        self._open()
        if isinstance(self.local, OSError):
            raise self.local
        assert self.local is not None, f"{self.name} has no name yet"
        return (*self.local, 0, 0) if self.local.is_v6 else tuple(self.local)

    def bind(self, address: Endpoint) -> None:
        self._open()
        self.book.call(f"bind {Endpoint(*address)}", default=None)
        host, port = address
        self.local = Endpoint(host, port)

    def connect_ex(self, address: Address) -> int:
        self._open()
        if isinstance(address, str):
            answer: int = self.book.call(f"connect {Endpoint(address, 0)}")
            return answer
        answer = self.book.call(f"connect {Endpoint(*address[:2])}")
        if self.local is None:
            self.local = Endpoint("fd00::1" if ":" in address[0] else "10.9.1.1", KERNEL_PORT)
        elif self.local.port == 0:
            self.local = Endpoint(self.local.host, KERNEL_PORT)
        return answer

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int, flags: int) -> int:
        self._open()
        if not self.book.has_policy and not self.book.is_next(f"{self.name} recv"):
            # The look for bytes at hand that every client gets: where it is not written, none.
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        answer = self.book.call(f"{self.name} recv")
        if answer is NOTHING:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        assert len(answer) <= nbytes, f"asked for {nbytes} bytes, the script has {len(answer)}"
        buffer[: len(answer)] = answer
        return len(answer)

    def send(self, data: Bytes, flags: int) -> int:
        raise AssertionError("the walk itself never sends")

    def setsockopt(self, level: int, name: int, value: int | bytes) -> None:
        raise AssertionError("the walk itself sets no option")

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        raise AssertionError("the walk itself asks for no option")

    def shutdown(self, how: int) -> None:
        raise AssertionError("the walk itself shuts nothing down")

    def setblocking(self, flag: bool) -> None:
        raise AssertionError("the walk itself sets no mode")

    def close(self) -> None:
        self._open()
        self.closed = True

    def _open(self) -> None:
        assert not self.closed, f"{self.name} is used after it was closed"


class Playbook:
    """The World of one connection, and the script of what happens in it."""

    def __init__(
        self,
        *,
        policy: str | None = None,
        source: str = "client",
        peer: Endpoint = PEER,
        dst: Endpoint | OSError = APP,
        own: Iterable[Listener] = (Listener(),),
        kinds: dict[str, str] | None = None,  # linux.AddressKinds: host -> "own", "broadcast"
        full: bool = False,
        max_header_bytes: int = 4096,
        send_proxy: str = "off",
        send_tlvs: SendTlvs = SendTlvs(),  # noqa: B008 - frozen
        listener: Listener = Listener(),  # noqa: B008 - what the words above do not say
        upstreams: Iterable[Endpoint] = (),
        full_for: str = "",  # the limit that stands against the client
    ) -> None:
        entries = (
            (ProxyProtocol(Prefixes([parse_prefix(peer.host)]), HeaderPolicy(policy)),)
            if policy
            else ()
        )
        listener = replace(
            listener,
            source=SourceKind(source),
            proxy_protocol=entries,
            max_connections=7,
            max_header_bytes=max_header_bytes,
        )
        self.full_for = full_for
        self.kinds = kinds or {}
        self.cluster = (
            Cluster(listener, upstreams, lambda host: self.kinds.get(host) == "own")
            if upstreams
            else None
        )
        self.lane = Lane(
            listener,
            policies.trust(entries),
            policies.own_sockets(own),
            Limits(3600.0, 60.0),
            announcer(SendProxy(send_proxy), send_tlvs, bytes),
            self.cluster,
            counts_clients=bool(full_for),
        )
        self.has_policy = policy is not None
        self.speaks = False
        self.peer, self.full = Peer(peer), full
        self.view = memoryview(bytearray(65536))
        self.client = FakeStream(self, "client", 10, dst)  # type: ignore[arg-type]
        self.streams: list[FakeStream] = [self.client]
        self.lives: list[Record] = []
        self.clock = 0.0
        self.connect_seconds: list[float] = []
        self._script: list[Line] = []
        self._told: list[Line] = []
        self._failed: AssertionError | None = None

    # Writing the script ------------------------------------------------------------------------

    def __lshift__(self, calls: str | list[Line]) -> Playbook:
        self._script += [Line(calls)] if isinstance(calls, str) else calls
        return self

    def __rshift__(self, answer: object) -> Playbook:
        assert self._script[-1].answer is _UNANSWERED, f"answered twice: {self._script[-1]}"
        self._script[-1].answer = answer
        return self

    # Playing it --------------------------------------------------------------------------------

    def play(self) -> Record:
        """The whole life of a connection; what is on record of it."""
        self.drive(self._serve())
        assert len(self.lives) == 1, f"{len(self.lives)} records"
        assert all(stream.closed for stream in self.streams), "a stream was left open"
        return self.lives[0]

    def _serve(self) -> Generator[Any, Any, None]:
        relay = yield from serve(self.client, self.peer, self.lane, self)
        if relay is not None:
            assert (relay.up.source, relay.down.source) == (self.client, self.streams[-1])
            assert relay._limits is self.lane.limits
            early = relay.up.rest
            assert isinstance(early, bytes)
            assert self.speaks == bool(early), "the handshake's ACK waits for bytes, or does not"
            answer = self.call(f"relay, first {early!r}" if early else "relay")
            relay.up.delivered += answer.received
            relay.down.delivered = answer.sent
            relay.finished(answer.reason, answer.detail, answer.aborted)

    def drive(self, walk: Generator[Any, Any, Result]) -> Result:
        """Any part of a walk; its result."""
        try:
            return self._drive(walk)
        finally:
            if self._failed is not None:  # the first deviation, not what came of it
                raise self._failed

    def _drive(self, walk: Generator[Any, Any, Result]) -> Result:
        step: Callable[[], Any] = lambda: next(walk)  # noqa: E731
        try:
            while True:
                answer = self._answer(step())
                if isinstance(answer, Cut):
                    error = PeerError(answer.reason, "from outside")
                    step = lambda: walk.throw(error)  # noqa: B023,E731
                else:
                    step = lambda: walk.send(answer)  # noqa: B023,E731
        except StopIteration as end:
            if self._script:
                self._fail("the walk has ended", f"still written: {self._script[0]}")
            result: Result = end.value
            return result

    def _answer(self, yielded: Wait) -> object:
        stream, deadline, connecting = yielded
        assert connecting == (stream is not self.client)
        assert isinstance(stream, FakeStream)
        answer = self.call(f"wait for {stream.name} until {deadline:g}")
        if isinstance(answer, Passed):
            self.clock += answer.seconds
            return answer.happened
        if answer is False:
            self.clock = max(self.clock, deadline)
        return answer

    def call(self, call: str, default: object = _UNANSWERED) -> Any:  # noqa: ANN401
        """The walk does this: is it what is written, and what is the answer?"""
        if self._failed is not None:
            raise self._failed
        if not self._script or self._script[0].call != call:
            return self._fail(call, f"written: {self._script[0] if self._script else 'nothing'}")
        line = self._script.pop(0)
        self._told.append(line)
        if isinstance(line.answer, OSError | MemoryError):
            raise line.answer
        if line.answer is not _UNANSWERED:
            return line.answer
        return default if default is not _UNANSWERED else self._fail(call, "has no answer")

    def is_next(self, call: str) -> bool:
        return bool(self._script) and self._script[0].call == call

    def note(self, call: str) -> None:
        self.call(call, default=None)

    def _fail(self, call: str, why: str) -> NoReturn:
        story = "".join(f"{line}\n" for line in self._told)
        self._failed = AssertionError(f"the conversation:\n{story}!! {call}\n   {why}")
        raise self._failed

    # World -------------------------------------------------------------------------------------

    def now(self) -> float:
        return self.clock

    def opened(self, lane: Lane) -> bool:
        assert lane is self.lane
        return not self.full

    def kind_of(self, host: str) -> str:
        return self.kinds.get(host, "")

    def upstream_socket(self, plan: Plan, speaks: bool) -> Stream:
        assert self.streams[-1] is self.client or self.streams[-1].closed, "two upstream sockets"
        host = plan.upstream.host
        kind = "unix" if host.startswith("/") else "IPv6" if ":" in host else "IPv4"
        there = "" if plan.here or kind == "unix" else ", elsewhere"
        self.note(f"socket {kind} as {'client' if plan.spoof else 'proxy'}{there}")
        self.speaks = speaks
        self.streams.append(FakeStream(self, "upstream", 10 + len(self.streams), None))
        return self.streams[-1]

    def late_bind(self, stream: Stream) -> None:
        assert stream is self.streams[-1]
        self.note("leave the port to connect")

    def tuple_state(self, local: Endpoint, remote: Endpoint) -> int:
        state: int = self.call(f"who holds {local} <- {remote}")
        return state

    def close(self, stream: Stream) -> None:
        assert isinstance(stream, FakeStream)
        self.note(f"close {stream.name}")
        stream.close()

    def count_header(self, version: str, result: HeaderResult) -> None:
        self.note(f"count header {version} {result}")

    def count_port_retry(self, cause: PortCause) -> None:
        self.note(f"count port {cause}")

    def out_of_files(self) -> None:
        self.note("out of files")

    def count_fallback(self, cause: str) -> None:
        self.note(f"count fallback {cause}")

    def count_left_out(self, tlvs: int) -> None:
        self.note(f"count left out {tlvs}")

    def count_retry(self, lane: Lane) -> None:
        assert lane is self.lane
        self.note("count retry")

    def admits(self, lane: Lane, client: Client) -> str:
        assert lane is self.lane
        return self.full_for

    def ejected(self, lane: Lane, upstream: Upstream, seconds: float, why: str) -> None:
        self.note(f"eject {upstream} for {seconds:g}")

    def returned(self, lane: Lane, upstream: Upstream) -> None:
        self.note(f"{upstream} is back")

    def connected(self, seconds: float) -> None:
        self.connect_seconds.append(seconds)

    def ended(
        self, lane: Lane, life: Record, downstream: Stream, upstream: Stream | None, aborted: bool
    ) -> None:
        assert lane is self.lane
        assert downstream is self.client
        assert upstream is None or upstream is self.streams[-1]
        self.lives.append(life)
        if self.cluster is not None and upstream is not None:
            assert life.upstream is not None
            self.cluster.left(life.upstream)
        both = "both" if upstream is not None else "client"
        self.note(f"end {both} by {'RST' if aborted else 'FIN'}: {life.reason}")
        for stream in filter(None, (downstream, upstream)):
            stream.close()


def lines(*calls: str | tuple[str, object]) -> list[Line]:
    return [Line(call) if isinstance(call, str) else Line(*call) for call in calls]


def dials(
    source: str, to: str = str(APP), v: int = 4, code: int = 0, where: str = ""
) -> list[Line]:
    """A connect that is through, or not, at once, from this source; "" for the proxy's own."""
    if not source:
        return lines(f"socket IPv{v} as proxy{where}", (f"connect {to}", code))
    return lines(f"socket IPv{v} as client{where}", f"bind {source}", (f"connect {to}", code))
