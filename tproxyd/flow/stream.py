"""What the walk of a connection stands on: a socket by its few methods, and how it waits.

The walk (connection.py and what it calls with `yield from`) is a generator. It never blocks: when
a socket has nothing for it, it yields a Wait; whoever drives it (engine.py, or a test) resumes it
with True when something happened on that socket, False when the deadline passed first. True is a
hint, not a promise: the walk tries again, and may wait again. Pure.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol, TypeVar

from tproxyd.addr import Endpoint

Bytes = bytes | bytearray | memoryview
# The path of a unix socket; of IPv6 also with flow info and scope.
Address = Endpoint | str | tuple[str, int, int, int]
Result = TypeVar("Result")


class Stream(Protocol):
    """A connected, or connecting, TCP socket that never blocks: the socket module's own methods.

    A protocol, so that a test can pass an object without a kernel behind it.
    """

    def fileno(self) -> int: ...
    def getsockname(self) -> Any: ...  # noqa: ANN401 - as the socket module declares it
    def bind(self, address: Endpoint, /) -> None: ...
    def connect_ex(self, address: Address, /) -> int: ...
    def recv_into(self, buffer: bytearray | memoryview, nbytes: int, flags: int, /) -> int: ...
    def send(self, data: Bytes, flags: int, /) -> int: ...
    def setsockopt(self, level: int, name: int, value: int | bytes, /) -> None: ...
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...
    def shutdown(self, how: int, /) -> None: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def close(self) -> None: ...


class Wait(NamedTuple):
    """Resume me when something happened on `stream`, or at `deadline` (monotonic seconds)."""

    stream: Stream
    deadline: float
    connecting: bool = False  # which ends as room to write


Step = Generator[Wait, bool, Result]  # a part of the walk that ends with a Result
