"""The application, in the pod: judges what reaches it, and answers.

It tells what is wrong, a JSON line each; silence means that every byte was right.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable

from soak.wire import DIRECT_PORT, HELLO_SIZE, LONGEST, PORT, Hello, Kind, Stream

QUIET_S = 120.0  # a connection on which nothing comes for so long is stuck


class Wrong(Exception):
    """What the application got is not what it should; `what` is a word that the run counts."""

    def __init__(self, what: str, detail: str) -> None:
        self.what, self.detail = what, detail
        super().__init__(f"{what}: {detail}")


OWN = ("10.9.1.", "fd00:9:1:")  # the clients of load.py, by their own addresses


async def serve(sock: socket.socket, peer: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()
    head = b""
    while len(head) < HELLO_SIZE:
        try:
            data = await loop.sock_recv(sock, HELLO_SIZE - len(head))
        except ConnectionResetError:
            return  # a client that aborts may be that quick; one that was cut off says so itself
        if not data:
            raise Wrong("lost", f"the end after {len(head)} bytes of the hello")
        head += data
    try:
        hello = Hello.decode(head)
    except ValueError as error:
        # A PROXY header that nobody has taken off, v1 or v2.
        passed_by = head.startswith((b"PROXY", b"\r\n\r\n\0\r\nQUIT\n"))
        raise Wrong("bypassed" if passed_by else "wrong", str(error)) from None
    # Of a client that a header names the port is anybody's, by chance the same now and then.
    own = peer[0].startswith(OWN)
    if own and peer[1] == hello.port and sock.getsockname()[1] != DIRECT_PORT:
        raise Wrong("bypassed", f"{peer} is the client's own socket")
    if peer[0] != hello.source:
        raise Wrong("wrong", f"{peer} should be {hello.source}")
    match hello.kind:
        case Kind.CLIENT_FIRST:
            await receive(sock, hello)
            await send(sock, hello)
        case Kind.APP_FIRST:
            receiving = asyncio.create_task(receive(sock, hello))
            try:
                await send(sock, hello)
                await receiving
            finally:
                receiving.cancel()
        case Kind.ECHO:
            await echo(sock, hello)
        case Kind.ABORT:
            try:
                await receive(sock, hello)
            except ConnectionResetError:
                return
            raise Wrong("wrong", "the client has reset, and what came was a proper end")


async def receive(sock: socket.socket, hello: Hello) -> None:
    loop, expected = asyncio.get_running_loop(), Stream(hello.number, up=True)
    while data := await asyncio.wait_for(loop.sock_recv(sock, LONGEST), QUIET_S):
        if not expected.is_next(data):
            raise Wrong("wrong", f"bytes {expected.done - len(data)} to {expected.done} of {hello}")
    if expected.done > hello.up:
        raise Wrong("wrong", f"{expected.done - hello.up} bytes too many of {hello}")
    if expected.done < hello.up:
        raise Wrong("lost", f"the end after {expected.done} bytes of {hello}")


async def send(sock: socket.socket, hello: Hello) -> None:
    loop, stream = asyncio.get_running_loop(), Stream(hello.number, up=False)
    while left := hello.down - stream.done:
        await asyncio.wait_for(loop.sock_sendall(sock, stream.take(min(left, LONGEST))), QUIET_S)
    sock.shutdown(socket.SHUT_WR)


async def echo(sock: socket.socket, hello: Hello) -> None:
    loop, expected = asyncio.get_running_loop(), Stream(hello.number, up=True)
    while data := await asyncio.wait_for(loop.sock_recv(sock, LONGEST), QUIET_S):
        if not expected.is_next(data):
            raise Wrong("wrong", f"bytes {expected.done - len(data)} to {expected.done} of {hello}")
        await loop.sock_sendall(sock, data)


async def judged(sock: socket.socket, peer: tuple[str, int], tell: Callable[..., None]) -> None:
    began = time.monotonic()
    with sock:
        try:
            await serve(sock, peer)
        except Wrong as wrong:
            tell(began, wrong.what, wrong.detail)
        except TimeoutError:
            tell(began, "stuck", f"nothing from or to {peer} for {QUIET_S:g} s")
        except OSError as error:
            tell(began, "lost", f"{peer}: {error}")


def tell(began: float, what: str, detail: str) -> None:
    line = {"began": began, "at": time.monotonic(), "what": what, "detail": detail}
    print(json.dumps(line), flush=True)


async def accepting(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    while True:
        sock, peer = await loop.sock_accept(listener)
        task = loop.create_task(judged(sock, peer[:2], tell))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def main() -> None:
    listeners = []
    hosts = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))
    for (family, host), port in itertools.product(hosts, (PORT, DIRECT_PORT)):
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(4096)
        listeners.append(listener)
    print(json.dumps({"ready": True}), flush=True)
    await asyncio.gather(*map(accepting, listeners))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
