"""What a connection costs: counted, not timed, so that it fails on every machine alike.

A worker lives in this process and is turned by hand; client and application are here too. A bound
is a tenth above what was counted when it was set: whoever needs more says why, and raises it.
The system calls of a whole daemon are counted in netns-tests/test_system_calls.py.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import uvloop

from tproxyd.addr import Endpoint, OriginalDst
from tproxyd.config import Config, Listener
from tproxyd.flow import connection, origdst
from tproxyd.flow.stream import Stream
from tproxyd.flow.tally import Layout
from tproxyd.linux import CAP_NET_RAW, capabilities
from tproxyd.proc import worker as worker_module
from tproxyd.proc.counters import Page
from tproxyd.proc.worker import Worker, WorkerSpec
from tproxyd.tests.daemons import listeners_of

pytestmark = pytest.mark.skipif(
    CAP_NET_RAW not in capabilities(), reason="transparent sockets need CAP_NET_RAW: run as root"
)

PACKAGE = Path(connection.__file__).resolve().parents[1]
CONNECTIONS = 50
PYTHON_CALLS = 68  # 62 counted: accept to access log, one request, ended by the application
C_CALLS = 86  # 78
BYTES_OPEN = 1024  # 942: one that has carried a request and waits for the next


class Proxied:
    """A worker in front of an application. TPROXY would tell it where to; here a stand-in does."""

    def __init__(self, worker: Worker, port: int, app: socket.socket) -> None:
        self.worker, self.port, self.app = worker, port, app
        self.turn: Callable[[], object] = worker.engine.turn
        self.ends: list[socket.socket] = []

    def open(self) -> tuple[socket.socket, socket.socket]:
        """A connection that has carried a request and an answer: the client's end, and the
        application's.
        """
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(b"request")
        self.turn()
        far, _ = self.app.accept()
        assert far.recv(100) == b"request"
        far.sendall(b"answer")
        self.turn()
        assert client.recv(100) == b"answer"
        self.ends += (client, far)
        return client, far

    def serve(self) -> None:
        """A whole life."""
        client, far = self.open()
        far.close()
        self.turn()
        assert client.recv(100) == b""
        client.close()
        self.turn()
        self.ends.clear()


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Proxied]:  # noqa: ANN401
    config = Config(listeners=(Listener(),))
    loop = uvloop.new_event_loop()
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    log = os.open(tmp_path / "access.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with ours, theirs, socket.create_server(("127.0.0.1", 0), backlog=1000) as app:
        app.settimeout(10)
        there = OriginalDst(Endpoint("127.0.0.1", app.getsockname()[1]))
        real = origdst.original_destination

        def original_destination(downstream: Stream) -> OriginalDst:
            real(downstream)
            return there

        monkeypatch.setattr(worker_module, "original_destination", original_destination)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        on_port = replace(config, listeners=(replace(config.listeners[0], port=port),))
        listeners = listeners_of(on_port)
        page = Page(Layout(config), 1)
        worker = Worker(WorkerSpec(config, 0, listeners, page, theirs, log), loop)
        proxied = Proxied(worker, port, app)
        for _ in range(100):  # caches, and specialised bytecode
            proxied.serve()
        yield proxied
        for end in proxied.ends:
            end.close()
        while worker.engine.turn():
            pass
        worker.finish()
        for _, sock in listeners:
            sock.close()
    loop.close()
    os.close(log)
    for number, handler in kept:
        signal.signal(number, handler)


def test_calls_per_connection(proxied: Proxied) -> None:
    calls: Counter[str] = Counter()
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, what: Any) -> None:  # noqa: ANN401
        calls[event] += 1
        if event == "call":
            counted[frame.f_code.co_qualname] += 1

    turn = proxied.turn

    def counted_turn() -> None:
        sys.setprofile(count)
        try:
            turn()
        finally:
            sys.setprofile(None)

    proxied.turn = counted_turn
    for _ in range(CONNECTIONS):
        proxied.serve()
    proxied.turn = turn
    most = "\n".join(f"{n / CONNECTIONS:5.1f} {name}" for name, n in counted.most_common())
    assert calls["call"] / CONNECTIONS <= PYTHON_CALLS, most
    assert calls["c_call"] / CONNECTIONS <= C_CALLS, most


def test_nothing_is_kept_of_a_message(proxied: Proxied) -> None:
    """A thousand requests on one connection, and not one object more than before."""
    client, far = proxied.open()

    def exchange() -> None:
        client.sendall(b"request")
        proxied.turn()
        far.recv(100)
        far.sendall(b"answer")
        proxied.turn()
        client.recv(100)

    for _ in range(10):
        exchange()
    assert kept_by(exchange, 1000) < 1000, "bytes of a thousand messages"


def test_nothing_is_kept_of_a_connection(proxied: Proxied) -> None:
    """And no collector has to look for it: there are no cycles in what it was."""
    gc.collect()
    gc.disable()
    try:
        kept = kept_by(proxied.serve, 300)
        assert gc.collect() == 0
    finally:
        gc.enable()
    # Lines of the log wait for company: half a kilobyte each, 64 KiB at the most.
    assert kept < 300 * 600


def test_the_memory_of_an_open_connection(proxied: Proxied) -> None:
    proxied.open()
    assert kept_by(proxied.open, 300) / 300 <= BYTES_OPEN


def kept_by(do: Callable[[], object], times: int) -> int:
    """The bytes that our own lines have allocated in so many calls, and still hold."""
    tracemalloc.start()
    try:
        for _ in range(times):
            do()
        ours = tracemalloc.Filter(True, f"{PACKAGE}/*"), tracemalloc.Filter(False, __file__)
        lines = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
    finally:
        tracemalloc.stop()
    return sum(each.size for each in lines)
