"""A relay between two real TCP connections over loopback, driven by a real engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow.engine import Engine
from tproxyd.flow.relay import Limits, Outcome, Relay, reset_on_close
from tproxyd.flow.stream import Wait

T = TypeVar("T")
MiB = 1024 * 1024
NEVER = Limits(0.0, 3600.0)


class Rig:
    """client <-> downstream | relay | upstream <-> app. The outer two are the test's."""

    def __init__(
        self, engine: Engine, loop: asyncio.AbstractEventLoop, server: socket.socket
    ) -> None:
        self.engine, self.loop = engine, loop
        self.client, self.downstream = pair(server)
        self.app, self.upstream = pair(server)
        self.outcome: asyncio.Future[Outcome] = loop.create_future()

    def walk(
        self, limits: Limits = NEVER, early: bytes = b"", before: float | None = None
    ) -> Generator[Any, Any, None]:
        """As serve() does: wait, relay, and close, by RST unless both sides ended in order."""
        outcome = Outcome(CloseReason.INTERNAL, "the walk failed", 0, 0, aborted=True)
        try:
            if before is not None:
                yield Wait(self.downstream, before)
            outcome = yield Relay(self.downstream, self.upstream, early, limits)
        except PeerError as error:
            outcome = Outcome(error.reason, error.detail, 0, 0, aborted=True)
        finally:
            for stream in (self.downstream, self.upstream):
                if outcome.aborted:
                    reset_on_close(stream)
                self.engine.forget(stream)
                stream.close()
            self.outcome.set_result(outcome)

    def run(self, scene: Awaitable[T]) -> T:
        return run(self.loop, scene)

    async def read_all(self, end: socket.socket) -> bytes:
        data = bytearray()
        while piece := await self.loop.sock_recv(end, MiB):
            data += piece
        return bytes(data)

    async def receive(self, end: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await self.loop.sock_recv(end, size - len(data))
        return data

    def send(self, end: socket.socket, data: bytes) -> Awaitable[None]:
        return self.loop.sock_sendall(end, data)

    def close(self) -> None:
        self.client.close()
        self.app.close()


def pair(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A far end, and ours: accepted, or as good as that."""
    far = socket.create_connection(server.getsockname())
    ours, _ = server.accept()
    far.setblocking(False)
    ours.setblocking(False)
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return far, ours


def run(loop: asyncio.AbstractEventLoop, scene: Awaitable[T]) -> T:
    return loop.run_until_complete(asyncio.wait_for(scene, 5))


async def until(state: Callable[[], object]) -> None:
    """Round after round of the loop; `run` gives up after five seconds."""
    while not state():  # noqa: ASYNC110
        await asyncio.sleep(0)
