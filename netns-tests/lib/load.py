"""A small load whose every answer is timed, while the test does something else to the daemon.

One thread holds both ends and takes one request after the other, so what it measures is the daemon
and the kernel, not a crowd of its own.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from lib.streams import receive
from lib.topology import V4, Topology

_REQUEST = b"GET / HTTP/1.1\r\nHost: app\r\n\r\n"
_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Load:
    """Requests of the client's, each on a connection that begins with `header`."""

    def __init__(self, net: Topology, header: bytes = b"") -> None:
        self._net, self._header = net, header
        self._app = net.app(V4)
        self._kept: tuple[socket.socket, socket.socket] | None = None

    def new(self) -> float:
        """Seconds that a new connection, its request and its answer took."""
        began = time.perf_counter()
        client = self._net.client.connect(V4.pod, 80)
        client.sendall(self._header + _REQUEST)
        app = self._app.accept()[0]
        app.settimeout(10)
        with client, app:
            _exchange(client, app, b"")
            took = time.perf_counter() - began
            app.close()
            assert client.recv(1) == b""
        return took

    def kept_alive(self) -> float:
        """Seconds for a request and its answer on one connection that stays."""
        if self._kept is None:
            client = self._net.connect()
            client.sendall(self._header)
            self._kept = client, self._net.accept()
        began = time.perf_counter()
        _exchange(*self._kept, _REQUEST)
        return time.perf_counter() - began

    def for_(self, seconds: float, between: Callable[[], object]) -> Times:
        """Requests of both kinds in turn, `between` after each."""
        times: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for request in (self.new, self.kept_alive):
                times.append(request())
                between()
        return Times(times)


class Times:
    """How long requests took, in milliseconds."""

    def __init__(self, seconds: list[float]) -> None:
        self._sorted = sorted(1000 * each for each in seconds)

    def percentile(self, percent: float) -> float:
        return self._sorted[min(len(self._sorted) - 1, int(len(self._sorted) * percent / 100))]

    def __str__(self) -> str:
        median, p99, worst = (self.percentile(each) for each in (50, 99, 100))
        return (
            f"{len(self._sorted)} requests, median {median:.2f} ms, p99 {p99:.2f}, max {worst:.2f}"
        )


def _exchange(client: socket.socket, app: socket.socket, request: bytes) -> None:
    client.sendall(request)
    receive(app, len(_REQUEST))
    app.sendall(_ANSWER)
    receive(client, len(_ANSWER))
