"""The command socket of a daemon: what changes it while it runs comes in here.

The admin endpoint is open to whoever reaches its address, and therefore changes nothing. This is an
abstract unix socket, which knows who is at the other end (SO_PEERCRED): the kernel's word, of the
moment of connect(2). Only root may ask, and the daemon's own user; everybody else is told so before
a byte of his is read, and takes no place from others.

It runs in the supervisor's loop and must never hurt it: a request is a line of at most
ask.MAX_REQUEST bytes, sent within 5 seconds, on one of at most 16 connections (the next is closed
at once), answered once and closed. A handler that was begun is finished, whether who asked still
waits or not.

A name has one owner. In an upgrade it moves from one daemon to the next: close() frees it at once,
and start() waits a moment for a name that is still taken. But any user may take it: who could not
have it tries again every few seconds, and serves meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping

from tproxyd import __version__, peer
from tproxyd.errors import KernelError, TproxydError, Unreachable
from tproxyd.proc.ask import MAX_REQUEST, Answer, Request, encoded

log = logging.getLogger("tproxyd")

Handler = Callable[[Request], Awaitable[Answer]]

# People at terminals, and their scripts.
MAX_CONNECTIONS = 16
REQUEST_TIMEOUT_S = 5.0  # for the line to arrive
ANSWER_TIMEOUT_S = 5.0  # for the answer to be taken
# An old daemon frees the name before the new one asks for it. What may hold it a little longer is a
# child being forked just then, until it has closed what it inherited.
BIND_PATIENCE_S, BIND_PAUSE_S = 2.0, 0.02
AGAIN_S = 5.0


class CommandServer:
    """`server = CommandServer(name, {verb: handler, …})`, `await server.start()`, `close()`."""

    def __init__(self, name: str, handlers: Mapping[str, Handler]) -> None:
        self._name, self._handlers = name, handlers
        self._server: asyncio.Server | None = None
        self._trying: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, patience_s: float = BIND_PATIENCE_S) -> None:
        """Listen; KernelError when another process keeps the name that long."""
        sock = await _bound(self._name, patience_s)
        self._server = await asyncio.start_unix_server(
            self._accepted,
            sock=sock,
            limit=MAX_REQUEST,
            backlog=MAX_CONNECTIONS,
            start_serving=False,  # which would be a pause: who is cancelled in it loses the server
        )
        await self._server.start_serving()

    def keep_trying(self) -> None:
        """To start, until it has the name or is closed."""
        self._trying = asyncio.get_running_loop().create_task(self._try())

    async def _try(self) -> None:
        while self._server is None:
            await asyncio.sleep(AGAIN_S)
            with contextlib.suppress(KernelError, OSError):  # a stranger has it; no more files
                await self.start(patience_s=0)
        log.info("the command socket @%s is there now", self._name[1:])

    def close(self) -> None:
        """The name is free now. Requests under way are still answered."""
        if self._trying is not None:
            self._trying.cancel()
            self._trying = None
        if self._server is not None:
            self._server.close()
            self._server = None

    async def finish(self) -> None:
        """The same, and whoever still asks gets no answer: at the very end."""
        self.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = peer.of(writer.get_extra_info("socket")).uid
        if uid not in (0, os.geteuid()):
            why = f"can't ask the daemon: only root and its own user may, not uid {uid}; try sudo"
            writer.write(_line({"error": encoded(Unreachable(why))}))  # fits into its buffer
            writer.close()
        elif len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
        else:
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    line = await reader.readuntil(b"\n")
                answer = await self._answer(line)
            except asyncio.LimitOverrunError:
                why = f"can't ask that: a request has at most {MAX_REQUEST} bytes; ask for less"
                answer = {"error": encoded(Unreachable(why))}
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(_line(answer))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the other end left, or fell silent
        finally:
            writer.transport.abort()

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = json.loads(line)
            handler = self._handlers.get(request["verb"])
        except (ValueError, TypeError, LookupError):
            why = 'can\'t read a request: it is no JSON line with a "verb"; use the tproxyd command'
            return {"error": encoded(Unreachable(why))}
        if handler is None:
            why = (
                f'can\'t do "{request["verb"]}": the daemon that runs, version {__version__}, does'
                " not know it; use the tproxyd of that version, or restart the daemon"
            )
            return {"error": encoded(Unreachable(why))}
        try:
            return await handler(request)
        except TproxydError as error:
            return {"error": encoded(error)}
        except Exception as error:
            log.exception("can't do %r: this is a bug", request)
            why = f"can't do that: {error!r}; this is a bug, and the log of tproxyd says more"
            return {"error": encoded(Unreachable(why))}


async def _bound(name: str, patience_s: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(name)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE and loop.time() < deadline:
                await asyncio.sleep(BIND_PAUSE_S)
                continue
            why, hint = (error.strerror or str(error)).lower(), "try again"
            if error.errno == errno.EADDRINUSE:
                why, hint = _taken(name)
            raise KernelError(f"listen on the command socket @{name[1:]}", why, hint) from error
        sock.setblocking(False)
        return sock


def _taken(name: str) -> tuple[str, str]:
    """By whom, and what to do."""
    there = peer.at(name)
    if there is None:
        return "a process that does not answer has its name", "find it with ss -xap, and end it"
    if not there.believed:
        return f"{there} has its name", "end that process"
    hint = 'give each one an admin = "ADDRESS:PORT" of its own'
    return "address already in use", f"another tproxyd runs in this network namespace: {hint}"


def _line(answer: Answer) -> bytes:
    return json.dumps(answer).encode() + b"\n"
