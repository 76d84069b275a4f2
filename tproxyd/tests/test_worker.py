"""A worker process, really forked, over real loopback sockets and without any kernel state.

Without TPROXY the destination of a connection is the listening socket itself. So either that is
refused as a loop, or, where a connection is to go through, the trick is: the client connects to a
worker's socket on 0.0.0.0 while nobody else listens; then the application listens on 127.0.0.1 and
the same port, which the kernel prefers from then on, and finds the worker at its door.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tproxyd import child, linux
from tproxyd.addr import Endpoint, PrefixSet, parse_prefix
from tproxyd.config import Config, HeaderPolicy, Listener, ProxyProtocol
from tproxyd.errors import KernelError
from tproxyd.flow import listen
from tproxyd.flow.tally import (
    ACCEPT_PAUSES,
    ACTIVE,
    BYTES,
    CONNECT_SECONDS,
    CONNECTIONS,
    HEADERS,
    Layout,
    Metric,
)
from tproxyd.linux import CAP_NET_RAW, capabilities, reset_on_close
from tproxyd.proc import worker
from tproxyd.proc.counters import Page
from tproxyd.proc.door import Door
from tproxyd.tests.daemons import listeners_of
from tproxyd.tests.playbook import rotate

pytestmark = pytest.mark.skipif(
    CAP_NET_RAW not in capabilities(), reason="transparent sockets need CAP_NET_RAW: run as root"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have something to lose")

SILENT = (ProxyProtocol(PrefixSet([parse_prefix("127.0.0.0/8")]), HeaderPolicy.REQUIRE),)
PATIENCE_S = 10.0


def config(drain_timeout_s: float = 30.0, **listener: Any) -> Config:  # noqa: ANN401
    return Config(listeners=(Listener(**listener),), drain_timeout_s=drain_timeout_s)


class Running:
    """A worker, and what the supervisor would have of it."""

    def __init__(self, config: Config, before: Callable[[], object] = bool) -> None:
        self.config = config
        self.page = Page(Layout(config), 1)
        with socket.socket() as free:  # a port that nobody has
            free.bind(("0.0.0.0", 0))
            self.port: int = free.getsockname()[1]
        on_port = replace(config.listeners[0], port=self.port)
        self.listeners = listeners_of(replace(config, listeners=(on_port,)))
        self.log, self._log_end = os.pipe()
        self.control, self._control_end = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.control.settimeout(PATIENCE_S)
        self.before = before
        self.upstreams: dict[int, tuple[Endpoint, ...]] = {}
        self.pid = 0
        self._unread = b""

    def start(self) -> Running:
        spec = worker.WorkerSpec(
            self.config,
            0,
            self.listeners,
            self.page,
            self._control_end,
            self._log_end,
            self.upstreams,
        )
        keep = [self._control_end.fileno(), self._log_end]
        keep += [sock.fileno() for _, sock in self.listeners]

        def body() -> None:
            self.before()
            worker.run(spec)

        self.pid = child.fork(body, keep)
        return self

    def ready(self) -> Running:
        assert self.start().control.recv(100) == b"ready\n"
        return self

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        far = socket.create_connection((host, self.port), timeout=PATIENCE_S)
        far.settimeout(PATIENCE_S)
        return far

    def line(self) -> dict[str, Any]:
        """The next line of the access log."""
        while b"\n" not in self._unread:
            assert select.select([self.log], [], [], PATIENCE_S)[0], "no line in the access log"
            self._unread += os.read(self.log, 65536)
        line, _, self._unread = self._unread.partition(b"\n")
        fields: dict[str, Any] = json.loads(line)
        return fields

    def count(self, metric: Metric, *labels: str) -> int:
        return int(self.page.rows[0][self.page.layout.index(metric, *labels)])

    def until(self, metric: Metric, *labels: str, value: int) -> None:
        """Wait for a count; the page has no bell to ring."""
        deadline = time.monotonic() + PATIENCE_S
        while self.count(metric, *labels) != value:
            assert time.monotonic() < deadline, f"{metric.name} is {self.count(metric, *labels)}"
            os.sched_yield()

    def status(self, name: str) -> str:
        found = re.search(
            rf"^{name}:[ \t]*(.*?) *$", Path(f"/proc/{self.pid}/status").read_text(), re.M
        )
        assert found is not None
        return found[1]

    def exit_code(self) -> int:
        pidfd = os.pidfd_open(self.pid)
        try:
            assert select.select([pidfd], [], [], PATIENCE_S)[0], "it does not leave"
        finally:
            os.close(pidfd)
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def drain(self) -> int:
        self.control.send(b"drain\n")
        return self.exit_code()

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for sock in (self.control, self._control_end, *(sock for _, sock in self.listeners)):
            sock.close()
        os.close(self.log)
        os.close(self._log_end)


@contextmanager
def running(config: Config, before: Callable[[], object] = bool) -> Iterator[Running]:
    with closing(Running(config, before)) as it:
        yield it


@contextmanager
def application(port: int) -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.settimeout(PATIENCE_S)
        server.bind(("127.0.0.1", port))
        server.listen()
        yield server


def refused(far: socket.socket) -> None:
    """By RST, and not by an end that looks like one."""
    with far, pytest.raises(ConnectionResetError):
        far.recv(1)


def refused_at_once(it: Running, host: str) -> None:
    """Perhaps before connect has even returned."""
    with pytest.raises(ConnectionResetError), it.connect(host) as far:
        far.recv(1)


def knock(it: Running) -> None:
    """Connect for as long as somebody accepts."""
    while True:
        it.connect().close()


def test_listening_sockets_that_were_shut_down() -> None:
    """By the worker before this one on the slot: accept says EINVAL, for ever."""
    with running(config()) as it:
        it.ready()
        for _, sock in it.listeners:
            sock.shutdown(socket.SHUT_RD)
        assert it.drain() == 0


# A whole connection -------------------------------------------------------------------------------


def test_a_connection_from_end_to_end() -> None:
    with running(config()) as it:
        client = socket.socket()
        client.settimeout(PATIENCE_S)
        client.bind(("127.0.0.5", 0))
        client.connect(("127.0.0.1", it.port))
        port = client.getsockname()[1]
        with client, application(it.port) as server:
            it.ready()
            app, seen = server.accept()
            with app:
                assert seen == ("127.0.0.5", rotate(port))  # the client, on the port a log explains
                it.until(ACTIVE, "inbound", value=1)
                client.sendall(b"ping")
                assert app.recv(10) == b"ping"
                client.shutdown(socket.SHUT_WR)
                assert app.recv(10) == b""
                app.sendall(b"ping pong")
                assert client.recv(10) == b"ping pong"
            assert client.recv(10) == b""
        line = it.line()
        assert line["close_reason"] == "downstream_fin"
        assert line["downstream_remote_address"] == f"127.0.0.5:{port}"
        assert line["downstream_local_address"] == f"127.0.0.1:{it.port}"
        assert line["upstream_local_address"] == f"127.0.0.5:{rotate(port)}"
        assert (line["bytes_received"], line["bytes_sent"]) == (4, 9)
        assert line["rtt_us"] > 0
        assert it.drain() == 0
        assert it.count(CONNECTIONS, "inbound", "downstream_fin") == 1
        assert it.count(ACTIVE, "inbound") == 0
        assert (it.count(BYTES, "received"), it.count(BYTES, "sent")) == (4, 9)
        connects = [cell for cell in it.page.layout.cells if cell.metric is CONNECT_SECONDS]
        assert sum(it.count(*_args(cell)) for cell in connects if cell.labels != ("sum",)) == 1


def _args(cell: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return (cell.metric, *cell.labels)


def test_a_loop_is_refused_logged_and_counted() -> None:
    with running(config()) as it:
        own = replace(it.config.listeners[0], port=it.port)
        it.config = replace(it.config, listeners=(own,))
        it.ready()
        for i in range(1, 4):
            refused_at_once(it, "127.0.0.1")
            assert it.line()["close_reason"] == "loop"
            it.until(CONNECTIONS, "inbound", "loop", value=i)
        assert it.drain() == 0


def test_ipv6_has_a_socket_of_its_own() -> None:
    if not listen.has_ipv6():
        pytest.skip("no IPv6 here")
    with running(config()) as it:
        it.config = replace(it.config, listeners=(replace(it.config.listeners[0], port=it.port),))
        it.ready()
        refused_at_once(it, "::1")
        assert it.line()["downstream_local_address"] == f"[::1]:{it.port}"
        assert it.drain() == 0


def test_no_access_log() -> None:
    with running(config(proxy_protocol=SILENT)) as it:
        spec_log, it._log_end = it._log_end, os.open("/dev/null", os.O_WRONLY)
        os.close(spec_log)
        it.ready()
        with it.connect() as far:
            far.send(b"GET /")
            refused(far)
        it.until(HEADERS, "-", "missing", value=1)
        assert it.drain() == 0


# Privileges ---------------------------------------------------------------------------------------


@needs_root
def test_a_worker_has_cap_net_raw_and_no_more() -> None:
    with running(config()) as it:
        it.ready()
        only = f"{1 << CAP_NET_RAW:016x}"
        assert it.status("CapEff") == it.status("CapPrm") == only
        assert it.status("CapInh") == it.status("CapAmb") == f"{0:016x}"
        assert it.status("NoNewPrivs") == "1"
        assert "0" not in it.status("Uid").split()
        assert "0" not in it.status("Gid").split()
        assert it.status("Groups") == ""
        assert it.status("Name") == "tproxyd/0"
        assert it.drain() == 0


def test_a_worker_that_may_not_says_so() -> None:
    with running(config(), before=lambda: linux.keep_only(frozenset())) as it:
        it.start()
        told = it.control.recv(1000).decode()
        assert told.startswith("failed: can't open transparent sockets: CAP_NET_RAW is missing; ")
        assert told.endswith("\n")
        assert told.count("\n") == 1
        assert it.exit_code() == 3


# Stopping -----------------------------------------------------------------------------------------


def test_drain_lets_connections_end() -> None:
    with running(config(proxy_protocol=SILENT)) as it:
        it.ready()
        with it.connect() as far:
            it.until(ACTIVE, "inbound", value=1)
            it.control.send(b"drain\n")
            with pytest.raises(OSError, match=r"refused|reset"):  # nobody accepts any more
                knock(it)
            assert it.count(ACTIVE, "inbound") >= 1
            far.send(b"GET /")
            with pytest.raises(ConnectionResetError):
                far.recv(1)
        assert it.exit_code() == 0
        assert it.count(CONNECTIONS, "inbound", "header_missing") >= 1


def test_drain_serves_what_waits_in_the_queue() -> None:
    """Accepted before it leaves, however late it was told so."""
    with running(config(proxy_protocol=SILENT)) as it:
        far = [it.connect() for _ in range(100)]  # more than one batch; the worker is not there yet
        it.control.send(b"drain\n")
        it.ready()
        for each in far:
            each.send(b"GET /")
            refused(each)
        assert it.exit_code() == 0
        assert it.count(CONNECTIONS, "inbound", "header_missing") == 100


def test_the_drain_deadline() -> None:
    with running(config(drain_timeout_s=0.05, proxy_protocol=SILENT)) as it:
        it.ready()
        far = it.connect()
        it.until(ACTIVE, "inbound", value=1)
        assert it.drain() == 0
        refused(far)
        line = it.line()
        assert line["close_reason"] == "drain_timeout"
        assert line["connection_termination_details"] == "still open 0.05 s after the stop"


@pytest.mark.parametrize("words", [(b"drain\n", b"cut\n"), (b"cut\n",)])
def test_the_drain_is_cut_short(words: tuple[bytes, ...]) -> None:
    with running(config(proxy_protocol=SILENT)) as it:
        it.ready()
        far = it.connect()
        it.until(ACTIVE, "inbound", value=1)
        for word in words:
            it.control.send(word)
        assert it.exit_code() == 0
        refused(far)
        assert it.line()["connection_termination_details"] == "the stop was cut short"


def test_the_supervisor_is_gone() -> None:
    with running(config(proxy_protocol=SILENT)) as it:
        it.ready()
        far = it.connect()
        it.until(ACTIVE, "inbound", value=1)
        it._control_end.close()
        it.control.close()
        far.send(b"GET /")  # what is open ends in its own time
        refused(far)
        assert it.exit_code() == 0


def test_signals_are_the_supervisors_business() -> None:
    """Ctrl-C and systemd signal the whole group at once; a worker goes when it is told to."""
    with running(config(proxy_protocol=SILENT)) as it:
        it.ready()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(it.pid, number)
            with it.connect() as far:
                far.send(b"GET /")
                refused(far)
            assert it.line()["close_reason"] == "header_missing"
        assert it.drain() == 0


def test_the_next_worker_serves_what_a_dead_one_left() -> None:
    with running(config(proxy_protocol=SILENT)) as it:
        it.ready()
        os.kill(it.pid, signal.SIGSTOP)
        far = it.connect()
        os.kill(it.pid, signal.SIGKILL)
        assert it.exit_code() == -signal.SIGKILL
        it.ready()  # on the same listening socket
        far.send(b"GET /")
        refused(far)
        assert it.line()["close_reason"] == "header_missing"
        assert it.drain() == 0


# Limits -------------------------------------------------------------------------------------------


def test_max_connections() -> None:
    with running(config(proxy_protocol=SILENT, max_connections=2)) as it:
        it.ready()
        far = [it.connect() for _ in range(2)]
        it.until(ACTIVE, "inbound", value=2)
        refused_at_once(it, "127.0.0.1")
        line = it.line()
        assert line["close_reason"] == "overload"
        assert line["response_flags"] == "UO"
        it.until(ACTIVE, "inbound", value=2)
        far[0].send(b"GET /")
        refused(far[0])
        assert it.line()["close_reason"] == "header_missing"
        it.until(ACTIVE, "inbound", value=1)
        with it.connect():
            it.until(ACTIVE, "inbound", value=2)  # there is room again
        far[1].close()
        assert it.drain() == 0


def open_files(limit: int, used: int = 0) -> Callable[[], None]:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        for _ in range(used):
            os.open("/dev/null", os.O_RDONLY)

    return lower


def test_as_many_connections_as_there_are_files_for() -> None:
    """64 are reserved and one for each listening socket, two for each connection; above that,
    clients wait in the queue.
    """
    listening = 2 if listen.has_ipv6() else 1
    with running(config(proxy_protocol=SILENT), before=open_files(68 + listening)) as it:
        it.ready()
        far = [it.connect() for _ in range(5)]
        it.until(ACCEPT_PAUSES, value=1)
        it.until(ACTIVE, "inbound", value=2)
        for done in range(1, 6):
            far[done - 1].send(b"GET /")
            refused(far[done - 1])
            it.until(ACTIVE, "inbound", value=min(2, 5 - done))
        assert it.count(ACCEPT_PAUSES) <= 4  # once, and then after each that took a place
        assert it.drain() == 0


def test_it_tells_the_supervisor_that_it_accepts_and_when_it_is_full() -> None:
    listening = 2 if listen.has_ipv6() else 1
    with running(config(proxy_protocol=SILENT), before=open_files(68 + listening)) as it:
        it.ready()

        def pong() -> str:
            it.control.send(b"ping\n")
            return it.control.recv(100).decode()

        assert pong() == "pong 0 accepting\n"
        with it.connect() as one:
            it.until(ACTIVE, "inbound", value=1)
            one.send(b"GET /")
            refused(one)
        it.until(ACTIVE, "inbound", value=0)
        far = [it.connect() for _ in range(3)]
        it.until(ACCEPT_PAUSES, value=1)
        assert pong() == "pong 3 full\n"
        for each in far:
            each.close()
        assert it.drain() == 0


def test_out_of_files_before_that() -> None:
    """Other things may have used them up. Accepting pauses, does not spin, and goes on."""
    with running(config(proxy_protocol=SILENT), before=open_files(130, used=95)) as it:
        it.ready()
        far = [it.connect() for _ in range(33)]
        deadline = time.monotonic() + PATIENCE_S
        while not it.count(ACCEPT_PAUSES):
            assert time.monotonic() < deadline
            os.sched_yield()
        open_now = it.count(ACTIVE, "inbound")
        assert 0 < open_now < 33
        before = cpu_seconds(it.pid)
        it.until(
            ACCEPT_PAUSES, value=it.count(ACCEPT_PAUSES) + 2
        )  # it tries again, ten times a second
        assert cpu_seconds(it.pid) - before < 0.1
        for each in far:
            each.send(b"GET /")
            refused(each)
        it.until(CONNECTIONS, "inbound", "header_missing", value=33)
        assert it.count(ACTIVE, "inbound") == 0
        assert it.drain() == 0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Listening ----------------------------------------------------------------------------------------


def test_a_listening_socket_that_somebody_shuts_down_listens_again() -> None:
    """`ss -K` ends listeners too. It would be an event that never ends, and nobody served."""
    with running(config(proxy_protocol=SILENT)) as it:
        it.ready()
        for _ in range(2):
            (_, sock), *_ = it.listeners
            sock.shutdown(socket.SHUT_RD)
            deadline = time.monotonic() + PATIENCE_S
            while not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                assert time.monotonic() < deadline
                os.sched_yield()
            with it.connect() as far:
                far.send(b"GET /")
                refused(far)
            assert it.line()["close_reason"] == "header_missing"
        assert it.drain() == 0


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(KernelError, match=rf"can't listen on 0\.0\.0\.0:{port}.*ss -ltnp"):
            listeners_of(config(port=port))


def test_what_a_connection_inherits_from_its_listener() -> None:
    with running(config()) as it:
        (_, sock), *_ = it.listeners
        with it.connect() as far:
            reset_on_close(far)
            accepted, peer = listen.accept(sock)
            with closing(accepted):
                assert peer == far.getsockname()
                assert accepted.getsockopt(socket.SOL_SOCKET, linux.SO_MARK) == 0x53A
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 300
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert accepted.getsockopt(socket.IPPROTO_IP, linux.IP_TRANSPARENT)
                assert not os.get_inheritable(accepted.fileno())
        with pytest.raises(BlockingIOError):
            listen.accept(sock)


def test_how_many_are_accepted_at_a_time() -> None:
    """One after a silence; twice as many for as long as each round of events finds more. In a crowd
    of more ready sockets than one epoll_wait tells, a round is several turns of the engine.
    """
    taken: list[int] = []
    worker_ = SimpleNamespace(engine=SimpleNamespace(rounds=0))
    worker_.accept = lambda _door, count: taken.append(count)
    with socket.socket() as sock:
        door = Door(worker_, sock, None)  # type: ignore[arg-type]
        for worker_.engine.rounds in (5, 6, 7, 7, 7, 8, 9, 10, 20):
            door.on_event(1)
    assert taken == [1, 2, 4, 8, 16, 32, 64, 64, 1]
