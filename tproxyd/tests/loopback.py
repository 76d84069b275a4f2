"""A relay between two real TCP connections over loopback, driven by a real engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar

from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow.engine import Engine
from tproxyd.flow.relay import Limits, Relay
from tproxyd.flow.stream import Wait
from tproxyd.linux import reset_on_close
from tproxyd.tests.tcpmodel import Outcome

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
    ) -> Generator[Wait, bool, Relay | None]:
        """As serve() does: wait, and end in the relay."""
        try:
            if before is not None:
                yield Wait(self.downstream, before)
        except PeerError as error:
            self.end(Outcome(error.reason, error.detail, 0, 0, aborted=True))
            return None
        self.relay = Passage(self, early, limits)
        return self.relay

    def end(self, outcome: Outcome) -> None:
        """Close, by RST unless both sides ended in order."""
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


class Passage(Relay):
    def __init__(self, rig: Rig, early: bytes, limits: Limits) -> None:
        super().__init__(rig.downstream, rig.upstream, early, limits)
        self.rig = rig

    def finished(self, reason: CloseReason, detail: str, aborted: bool) -> None:
        self.rig.end(Outcome.of(self, reason, detail, aborted))


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


class Alarm:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, then: Callable[[float], object] = float
    ) -> None:
        self.timer: dict[object, None] | None = None
        self.rang: asyncio.Future[float] = loop.create_future()
        self.then = then

    def on_timer(self, now: float) -> None:
        self.then(now)
        self.rang.set_result(now)
