"""The admin endpoint: HTTP/1.1, read-only; what is at which path, proc/pages.py says.

For probes, Prometheus, `tproxyd status` and browsers. It runs in the supervisor's loop and so must
never hurt it: a request is a head of at most 8 KiB, sent within 5 seconds, on one of at most 64
connections, answered once and closed; whatever goes wrong ends that connection and nothing else.

Where all 64 are taken, it is the one that has been idle for longest that goes, and the newcomer is
served: clients that open connections and say nothing must not keep out a kubelet, which would
restart a container whose /livez does not answer. A probe sends its head at once, and is answered
before the 64th behind it is accepted (ACCEPT_AT_ONCE).

No TLS and no authentication: it listens on 127.0.0.1 unless told otherwise, and changes nothing.
There a Host that is a name other than localhost is refused: it would be a web page whose own name
was made to mean 127.0.0.1, so that its script may read what is here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Iterator

from tproxyd.addr import Endpoint, parse_ip
from tproxyd.errors import KernelError
from tproxyd.proc.pages import Found, Provider, find

log = logging.getLogger("tproxyd")

# What Apache and nginx allow one line of a request; a probe's whole head has 200 bytes.
MAX_HEAD = 8192
# For the head to arrive, and again for the answer to be taken. Kubernetes gives up after 1 s,
# Prometheus after 10.
HEAD_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0
# Far more than probes and scrapers ever hold open at once; 64 heads are 512 KiB.
MAX_CONNECTIONS = 64
# In one turn of the loop; asyncio's streams take four turns from an accepted connection to the head
# that waits on it, so that half of MAX_CONNECTIONS are newer than a probe when it is read.
ACCEPT_AT_ONCE = 8
# A probe whose SYN finds no room comes again a second later, when kubelet has given up.
BACKLOG = 1024

_END = b"\r\n\r\n"
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}
_REASONS |= {421: "Misdirected Request", 500: "Internal Server Error", 503: "Service Unavailable"}

_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r]*)", re.IGNORECASE)
_OF_LOOPBACK = re.compile(rb"(localhost|[\d.]+|\[[\da-f:.]+\])?(:\d*)?[ \t]*", re.IGNORECASE)


def open_socket(where: Endpoint, beside: socket.socket | None = None) -> socket.socket:
    """The listening socket; KernelError that says what to try.

    `beside` listens for us, too, until this one is sure to take its place: no reason to fail.
    """
    sock = socket.socket(
        socket.AF_INET6 if where.is_v6 else socket.AF_INET,
        socket.SOCK_STREAM | socket.SOCK_NONBLOCK,
    )
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        same_port = beside is not None and beside.getsockname()[1] == where.port
        with _sharing(sock, beside if same_port else None):
            sock.bind(where)
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise KernelError(
            f"listen on {where} for the admin endpoint",
            (error.strerror or str(error)).lower(),
            'choose another address with admin = "ADDRESS:PORT", or none with admin = ""',
        ) from error
    return sock


@contextlib.contextmanager
def _sharing(sock: socket.socket, beside: socket.socket | None) -> Iterator[None]:
    """In here the two may have one port, at addresses of which one is every address.

    The kernel asks both when one is bound, and when it listens (inet_csk_bind_conflict). Later it
    asks nobody; then nobody else is to be let in.
    """
    both = [] if beside is None else [sock, beside]
    try:
        for each in both:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield
    finally:
        for each in both:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


class Server:
    """`server = await Server.start(sock, provider)`, and `await server.close()` at the end."""

    def __init__(self, provider: Provider, loopback: bool) -> None:
        """`loopback`: only this host can ask."""
        self._provider, self._loopback = provider, loopback
        # The oldest first: those whose turn it is to say something, and those being answered.
        self._idle: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._busy: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @classmethod
    async def start(cls, sock: socket.socket, provider: Provider) -> Server:
        host, _ = sock.getsockname()[:2]
        server = cls(provider, parse_ip(host).is_loopback)
        # readuntil() compares its limit with what stands before the blank line.
        limit = MAX_HEAD - len(_END)
        server._server = await asyncio.start_server(
            server._accepted, sock=sock, limit=limit, backlog=ACCEPT_AT_ONCE
        )
        sock.listen(BACKLOG)  # asyncio has one number for both, and has just set the smaller one
        return server

    _server: asyncio.Server

    async def close(self) -> None:
        """Stop listening; answers under way get no further."""
        self._server.close()
        tasks = [*self._idle, *self._busy]
        for task in tasks:
            self._drop(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._idle) + len(self._busy) >= MAX_CONNECTIONS:
            self._drop(next(iter(self._idle or self._busy)))
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._idle[task] = writer
        task.add_done_callback(self._forget)

    def _drop(self, task: asyncio.Task[None]) -> None:
        """End it at once. A task that has not begun yet would never come to its `finally`."""
        task.cancel()
        if (writer := self._forget(task)) is not None:
            writer.transport.abort()

    def _forget(self, task: asyncio.Task[None]) -> asyncio.StreamWriter | None:
        return self._idle.pop(task, None) or self._busy.pop(task, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            head = await _read_head(reader)
            self._busy[task] = self._idle.pop(task)
            answer = await self._answer(head)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(answer)
                await writer.drain()
                writer.write_eof()
                self._idle[task] = self._busy.pop(task)
                # A close over bytes that nobody read is a reset, which overtakes the answer.
                while await reader.read(MAX_HEAD):
                    pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the other end left, or fell silent
        finally:
            writer.transport.abort()

    async def _answer(self, head: bytes | None) -> bytes:
        if head is None:
            return _plain(400, f"the head of a request may have {MAX_HEAD} bytes here")
        match head.split(b"\r\n", 1)[0].split(b" "):
            case [method, target, b"HTTP/1.0" | b"HTTP/1.1"] if target.startswith(b"/"):
                pass
            case _:
                return _plain(400, "this is not an HTTP/1.1 request")
        if self._loopback and not all(map(_OF_LOOPBACK.fullmatch, _HOST.findall(head))):
            why = "another name may be that of a web page which was made to mean this host"
            return _plain(421, f"only localhost and addresses are answered as Host here: {why}")
        if method not in (b"GET", b"HEAD"):
            return _plain(405, "only GET and HEAD are answered here", "Allow: GET, HEAD\r\n")
        try:
            answer = _response(await find(self._provider, target.decode("latin-1")))
        except Exception:
            log.exception("the admin endpoint could not answer %r; this is a bug", target)
            answer = _plain(500, "this is a bug; the log of tproxyd says more")
        return answer.partition(_END)[0] + _END if method == b"HEAD" else answer


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """None when it is too long."""
    try:
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            return await reader.readuntil(_END)
    except asyncio.LimitOverrunError:
        return None


def _plain(code: int, text: str, headers: str = "") -> bytes:
    return _response(Found(code, f"{text}\n".encode(), headers=headers))


def _response(found: Found) -> bytes:
    head = (
        f"HTTP/1.1 {found.code} {_REASONS[found.code]}\r\nContent-Type: {found.kind}\r\n"
        f"Content-Length: {len(found.body)}\r\nConnection: close\r\n{found.headers}\r\n"
    )
    return head.encode() + found.body
