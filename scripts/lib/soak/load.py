"""The load, in the client's namespace: connections of every kind, at a bounded rate.

    python -m soak.load SEED RATE      stdin: "run SECONDS", again and again

Each "run" ends when everything that it began has ended, and answers one line: what was done, and
how long the short connections took in each fifth of the time. Failures are told as they happen.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from lib.headers import v1, v2

from soak.wire import DIRECT_PORT, LONGEST, PORT, Hello, Kind, Stream

PATIENCE_S = 15.0  # for anything that a healthy proxy does in milliseconds
FIFTHS = 5


class Way(NamedTuple):
    """From where, to where."""

    pod: str
    plain: str  # its own addresses: nobody special
    balancer: str  # trusted: a PROXY header comes first
    stranger: str  # whom the header names


WAYS = (
    Way("10.9.1.1", "10.9.1.2", "10.9.1.3", "106.52.131.116"),
    Way("fd00:9:1::1", "fd00:9:1::2", "fd00:9:1::3", "2001:db8:6a::34"),
)

# Connections of each kind a second, as parts of the rate; bulk and the idle ones are a fixed few.
SHORT, DIRECT, ABORTED, REFUSED = 0.83, 0.10, 0.05, 0.02
BULK_STREAMS, BULK_BYTES, BULK_BYTES_PER_S = 2, 32 << 20, 8 << 20
IDLE, IDLE_SPEAKS_EVERY_S = 200, 10.0
IDLE_FOR_S = 90.0  # well within drain_timeout_s: a reload must not cost one
STALLED, STALLED_BYTES, STALLED_FOR_S = 4, 8 << 20, 4.0


class Lost(Exception):
    """The connection ended early."""


class Wrong(Exception):
    """Bytes that are not those that were sent."""


class Load:
    def __init__(self, seed: int, rate: float) -> None:
        self.random, self.rate = random.Random(seed), rate
        self.number = 0
        self.done: Counter[str] = Counter()
        self.moved = 0
        # When it began, how long: short connections, and such as go by the proxy.
        self.took: dict[str, list[tuple[float, float]]] = {"short": [], "direct": []}
        self.tasks: set[asyncio.Task[None]] = set()
        self.ends = 0.0

    async def run(self, seconds: float) -> None:
        began = time.monotonic()
        self.done.clear()
        for calls in self.took.values():
            calls.clear()
        self.moved, self.ends = 0, began + seconds
        steady = [(self.bulk, BULK_STREAMS), (self.idle, IDLE), (self.stalled, STALLED)]
        async with asyncio.TaskGroup() as group:
            for kind, count in steady:
                for _ in range(count):
                    group.create_task(self.again(kind))
            group.create_task(self.pace())
        while self.tasks:
            await asyncio.wait(self.tasks)
        fifths = {}
        for name, calls in self.took.items():
            parts: list[list[float]] = [[] for _ in range(FIFTHS)]
            for at, took in calls:
                parts[min(FIFTHS - 1, int(FIFTHS * (at - began) / seconds))].append(took)
            ordered = map(sorted, parts)
            fifths[name] = [[share(part, 0.5), share(part, 0.99)] for part in ordered]
        worst = {
            name: max((took for _, took in calls), default=0) for name, calls in self.took.items()
        }
        say(done=self.done, moved=self.moved, fifths=fifths, worst=worst)

    async def pace(self) -> None:
        """Short-lived ones, begun at the rate whatever becomes of those before."""
        kinds = [self.short, self.direct, self.aborted, self.refused]
        due = time.monotonic()
        while due < self.ends:
            [kind] = self.random.choices(kinds, [SHORT, DIRECT, ABORTED, REFUSED])
            task = asyncio.create_task(self.told(kind))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            due += self.random.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def again(self, kind: Callable[[], Awaitable[None]]) -> None:
        # Not all at once: the idle ones are no storm.
        await asyncio.sleep(self.random.uniform(0, min(3.0, self.left())))
        while self.left() > 0:
            await self.told(kind)

    async def told(self, kind: Callable[[], Awaitable[None]]) -> None:
        """One connection; if it fails, a line that says how."""
        name, began = kind.__name__, time.monotonic()
        try:
            await kind()
            self.done[name] += 1
            return
        except Wrong as error:
            what, detail = "wrong", str(error)
        except TimeoutError:
            what, detail = "stuck", "no progress"
        except ConnectionRefusedError as error:
            what, detail = "refused", str(error)
        except (OSError, Lost) as error:
            what, detail = "lost", str(error) or type(error).__name__
        say(began=began, at=time.monotonic(), what=what, detail=f"{name}: {detail}")
        await asyncio.sleep(0.1)  # where it failed at once it would do so at once again

    def left(self) -> float:
        return self.ends - time.monotonic()

    # Kinds of connections ------------------------------------------------------------------------

    async def short(self, port: int = PORT) -> None:
        began = time.monotonic()
        kind = self.random.choice([Kind.CLIENT_FIRST, Kind.APP_FIRST])
        sizes = self.random.choice([(100, 1000), (0, 200), (5000, 0), (70_000, 70_000)])
        header = port == PORT and self.random.random() < 0.5
        sock, hello = await self.connect(kind, *sizes, header=header, port=port)
        with sock:
            await self.exchange(sock, hello)
        self.took["short" if port == PORT else "direct"].append((began, time.monotonic() - began))

    async def direct(self) -> None:
        """The same without the proxy: what the machine itself is doing meanwhile."""
        await self.short(DIRECT_PORT)

    async def bulk(self) -> None:
        sizes = self.random.choice([(BULK_BYTES, 0), (0, BULK_BYTES), (BULK_BYTES, BULK_BYTES)])
        sock, hello = await self.connect(Kind.APP_FIRST, *sizes)
        with sock:
            await self.exchange(sock, hello, BULK_BYTES_PER_S)

    async def idle(self) -> None:
        """Says something now and then, for a while."""
        until = self.left() - self.random.uniform(0.5, 1.5) * IDLE_FOR_S
        sock, hello = await self.connect(Kind.ECHO, 0, 0, header=self.random.random() < 0.5)
        stream, expected = Stream(hello.number, up=True), Stream(hello.number, up=True)
        loop = asyncio.get_running_loop()
        with sock:
            while self.left() > max(0.0, until):
                await self.send(sock, stream.take(64))
                while expected.done < stream.done:
                    data = await self.receive(sock, stream.done - expected.done)
                    if not expected.is_next(data):
                        raise Wrong(f"the echo before byte {expected.done} of {hello}")
                wait = self.random.uniform(0.5, 1.5) * IDLE_SPEAKS_EVERY_S
                try:  # nothing comes unasked; a reset does, and is to be noticed when it does
                    async with asyncio.timeout(max(0.01, min(wait, self.left()))):
                        data = await loop.sock_recv(sock, 1)
                except TimeoutError:
                    continue
                raise Wrong(f"{data!r} unasked of {hello}") if data else Lost("an end unasked")
            sock.shutdown(socket.SHUT_WR)
            await self.finish(sock, expected, expected.done)

    async def stalled(self) -> None:
        """Asks for much, and does not read for a while."""
        sock, hello = await self.connect(Kind.CLIENT_FIRST, 0, STALLED_BYTES)
        with sock:
            sock.shutdown(socket.SHUT_WR)
            await asyncio.sleep(min(STALLED_FOR_S, max(0.0, self.left())))
            await self.finish(sock, Stream(hello.number, up=False), hello.down)

    async def aborted(self) -> None:
        """Resets in the middle."""
        sock, hello = await self.connect(Kind.ABORT, 200_000, 0, header=self.random.random() < 0.5)
        with sock:
            stream = Stream(hello.number, up=True)
            for _ in range(self.random.randrange(4)):
                await self.send(sock, stream.take(50_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def refused(self) -> None:
        """A broken header: the connection is ended, and the application knows nothing of it."""
        way = self.random.choice(WAYS)
        sock = await self.open(way, way.balancer)
        with sock:
            await self.send(sock, b"PROXY TCP4 nobody\r\n")
            try:
                data = await self.receive(sock, 1)
            except (ConnectionResetError, Lost):
                return
            raise Wrong(f"{data!r} in answer to a broken header")

    # What they are made of -----------------------------------------------------------------------

    async def open(self, way: Way, source: str, port: int = PORT) -> socket.socket:
        family = socket.AF_INET6 if ":" in way.pod else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.get_running_loop().sock_connect(sock, (way.pod, port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def connect(
        self, kind: Kind, up: int, down: int, header: bool = False, port: int = PORT
    ) -> tuple[socket.socket, Hello]:
        """A connection that has said hello; a header comes in one piece, or in several."""
        way = self.random.choice(WAYS)
        sock = await self.open(way, way.balancer if header else way.plain, port)
        self.number += 1
        source = way.stranger if header else way.plain
        hello = Hello(kind, self.number & 0xFFFFFFFF, up, down, source, sock.getsockname()[1])
        first = hello.encode()
        try:
            if header:
                make = self.random.choice([v1, v2])
                said = make(way.stranger, way.pod, self.random.randrange(1024, 65536), PORT)
                cut = self.random.randrange(len(said) + 1) if self.random.random() < 0.3 else 0
                if cut:
                    await self.send(sock, said[:cut])
                    await asyncio.sleep(0.001)
                first = said[cut:] + first
            await self.send(sock, first)
        except BaseException:
            sock.close()
            raise
        return sock, hello

    async def exchange(self, sock: socket.socket, hello: Hello, per_s: float = 0.0) -> None:
        """Both directions at once, to the end of both."""
        finishing = asyncio.create_task(
            self.finish(sock, Stream(hello.number, up=False), hello.down, per_s)
        )
        try:
            stream, began = Stream(hello.number, up=True), time.monotonic()
            while left := hello.up - stream.done:
                await self.send(sock, stream.take(min(left, LONGEST)))
                if per_s:
                    await asyncio.sleep(began + stream.done / per_s - time.monotonic())
            sock.shutdown(socket.SHUT_WR)
            await finishing
        finally:
            finishing.cancel()

    async def finish(
        self, sock: socket.socket, expected: Stream, size: int, per_s: float = 0.0
    ) -> None:
        """Everything up to the end, which comes after exactly `size` bytes of the stream."""
        loop, began = asyncio.get_running_loop(), time.monotonic()
        while True:
            async with asyncio.timeout(PATIENCE_S):
                data = await loop.sock_recv(sock, LONGEST)
            if not data:
                break
            self.moved += len(data)
            if not expected.is_next(data):
                raise Wrong(f"{len(data)} bytes up to {expected.done} of {size}")
            if expected.done > size:
                raise Wrong(f"{expected.done - size} bytes too many of {size}")
            if per_s:
                await asyncio.sleep(began + expected.done / per_s - time.monotonic())
        if expected.done < size:
            raise Lost(f"the end after {expected.done} bytes of {size}")

    async def send(self, sock: socket.socket, data: bytes | memoryview) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(sock, data)
        self.moved += len(data)

    async def receive(self, sock: socket.socket, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            data = await asyncio.get_running_loop().sock_recv(sock, size)
        if not data:
            raise Lost("the end")
        self.moved += len(data)
        return data


_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: the kernel chooses the port at connect()


def share(values: list[float], part: float) -> float:
    """The value below which that part of the sorted ones lies."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


async def main() -> None:
    load = Load(int(sys.argv[1]), float(sys.argv[2]))
    say(ready=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        await load.run(float(line.split()[1]))


if __name__ == "__main__":
    asyncio.run(main())
