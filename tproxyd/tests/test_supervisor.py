"""The supervisor as a real process, with stand-in workers and a stand-in kernel.

Each scene forks a daemon. What its processes write to stderr comes to the test through a pipe:
waiting for a line is waiting for a state, and its end means that every process is gone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import Config, Listener, Log
from tproxyd.errors import KernelError
from tproxyd.flow.tally import ACTIVE, BYTES, Layout
from tproxyd.proc import reconciler, startup, supervisor
from tproxyd.proc.reconciler import Kernel, Reconciler, Report, Verb
from tproxyd.proc.worker import WorkerSpec

PATIENCE_S = 10.0
PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


def say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def open_listeners(config: Config) -> list[tuple[int, socket.socket]]:
    return [
        (i, socket.create_server(("127.0.0.1", each.port), reuse_port=True))
        for i, each in enumerate(config.listeners)
    ]


# Workers ------------------------------------------------------------------------------------------


def worker(spec: WorkerSpec) -> None:
    """Answers each connection with its pid, counting, until told to drain or left alone."""
    layout, row = Layout(spec.config), spec.rows[spec.slot]
    spec.control.send(b"ready\n")
    sockets = [sock for _, sock in spec.listeners]
    while True:
        readable, _, _ = select.select([spec.control, *sockets], (), ())
        if spec.control in readable:
            word = spec.control.recv(100).decode().strip()
            say(f"worker {spec.slot} hears {word or 'nobody'}")
            return
        for sock in readable:
            client, _ = sock.accept()
            row[layout.index(ACTIVE, spec.config.listeners[0].name)] += 1
            row[layout.index(BYTES, "sent")] += 100
            client.send(f"{os.getpid()}".encode())
            client.close()


def refuses(spec: WorkerSpec) -> None:
    if spec.slot == 1:
        spec.control.send(b"failed: can't do this: it is forbidden; ask somebody\n")
        sys.exit(3)
    worker(spec)


def crashes_at_start(_: WorkerSpec) -> None:
    raise RuntimeError("a bug in the worker")


def never_ready(_: WorkerSpec) -> None:
    signal.pause()


def ignores_drain(spec: WorkerSpec) -> None:
    spec.control.send(b"ready\n")
    while True:
        signal.pause()


def leaves_only_when_cut(spec: WorkerSpec) -> None:
    spec.control.send(b"ready\n")
    while (word := spec.control.recv(100)) != b"cut\n":
        say(f"worker {spec.slot} hears {word.decode().strip()}")


def sound_once(spec: WorkerSpec) -> None:
    """The first generation serves, those behind it fail."""
    cell = Layout(spec.config).index(BYTES, "received")
    spec.rows[spec.slot][cell] += 1
    if spec.rows[spec.slot][cell] > 1:
        spec.control.send(b"failed: no longer\n")
        sys.exit(3)
    worker(spec)


def tells_its_files(spec: WorkerSpec) -> None:
    given = {spec.control.fileno(), *(sock.fileno() for _, sock in spec.listeners)}
    if spec.access_log is not None:
        given.add(spec.access_log)
    fds = {int(fd) for fd in os.listdir("/proc/self/fd")}
    stray = {fd for fd in fds - given - {0, 1, 2} if os.path.exists(f"/proc/self/fd/{fd}")}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    say(f"worker {spec.slot} has stray {sorted(stray)}, all of its files {soft == hard}")
    worker(spec)


def leaves_an_orphan(spec: WorkerSpec) -> None:
    orphan = os.fork()
    if orphan == 0:
        signal.pause()
    say(f"worker {spec.slot} has child {orphan}")
    worker(spec)


# Kernels ------------------------------------------------------------------------------------------


def tells_verbs(_: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        if verb is not Verb.CHECK:
            say(f"kernel: {verb}")
        return Report(("a rule",), ("return path x: because",), (), True, "x")

    return kernel


def refuses_install(config: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        if verb is Verb.INSTALL:
            raise KernelError("install the kernel state", "it is forbidden", "ask somebody")
        return tells_verbs(config)(verb)

    return kernel


def cannot_be_read(_: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        raise KernelError("read the kernel state", "it is forbidden", "ask somebody")

    return kernel


def never_answers(_: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        signal.pause()
        return Report()

    return kernel


def drifts_while(sign: Path) -> Callable[[Config], Kernel]:
    def load(_: Config) -> Kernel:
        return lambda _: Report((), (), ("add a rule",) if sign.exists() else (), True, "x")

    return load


def not_installed(_: Config) -> Kernel:
    return lambda _: Report((), (), ("add a table", "add a rule"), False, "x")


# A daemon -----------------------------------------------------------------------------------------


# Below net.ipv4.ip_local_port_range: nobody's outgoing connection takes one between our look and
# the daemon's bind.
_ports = itertools.cycle(random.sample(range(12_000, 32_000), 5_000))


def free_port() -> int:
    for port in _ports:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


class Daemon:
    def __init__(
        self,
        entry: Callable[[WorkerSpec], None] = worker,
        load: Callable[[Config], Kernel] = tells_verbs,
        *,
        install: bool = False,
        before: Callable[[], None] = lambda: None,
        **settings: object,
    ) -> None:
        self.config = dataclasses.replace(
            Config(
                workers=1,
                admin=Endpoint("127.0.0.1", free_port()),
                listeners=(Listener(port=free_port()),),
                log=Log(access=""),
            ),
            **settings,  # type: ignore[arg-type]
        )
        self.lines: list[str] = []
        self._unread = b""
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(write, 2)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                before()
                code = self._run(entry, load, install)
            finally:
                os._exit(code)
        os.close(write)
        self.stderr = read

    def _run(
        self,
        entry: Callable[[WorkerSpec], None],
        load: Callable[[Config], Kernel],
        install: bool,
    ) -> int:
        startup.log_to_stderr()
        try:
            kernel = Reconciler(self.config, load)
            kernel.fork()
            supervisor.Supervisor(
                self.config,
                kernel,
                install=install,
                worker=entry,
                open_listeners=open_listeners,
            ).run()
        except KernelError as error:
            say(f"{error}")
            return 3
        return 0

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever the test did: nothing of it lives on."""
        for pid in (*self.children(), self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self.stderr)

    # What it says

    def wait_line(self, pattern: str) -> str:
        """The next line of any of its processes that matches; those before it are read over."""
        for line in self._read():
            if re.search(pattern, line):
                return line
        raise AssertionError(f"ended without {pattern!r}:\n" + "\n".join(self.lines))

    def rest(self) -> list[str]:
        """What is said until every process is gone."""
        return list(self._read())

    def _read(self) -> Iterator[str]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                self.lines.append(line.decode())
                yield self.lines[-1]
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.stderr], (), (), max(0, left))
            assert ready, f"no such line in {PATIENCE_S} s:\n" + "\n".join(self.lines)
            data = os.read(self.stderr, 65536)
            if not data:
                return
            self._unread += data

    def wait_ready(self) -> Daemon:
        self.wait_line(r"tproxyd: ready in \d+ ms")
        return self

    # What one can do to it

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def children(self) -> list[int]:
        try:
            return [
                *map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
            ]
        except FileNotFoundError:
            return []

    def connect(self) -> socket.socket:
        where = ("127.0.0.1", self.config.listeners[0].port)
        return socket.create_connection(where, timeout=PATIENCE_S)

    def ask(self) -> int:
        """The pid of the worker that answers a connection."""
        with self.connect() as client:
            return int(b"".join(iter(lambda: client.recv(100), b"")))

    def get(self, path: str) -> tuple[int, str]:
        assert self.config.admin is not None
        with socket.create_connection(self.config.admin, timeout=PATIENCE_S) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            head, _, body = (
                b"".join(iter(lambda: client.recv(65536), b"")).decode().partition("\r\n\r\n")
            )
        return int(head.split()[1]), body

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/status")[1]))

    def metric(self, name: str) -> float:
        (line,) = re.findall(rf"^{re.escape(name)} (.*)$", self.get("/metrics")[1], re.MULTILINE)
        return float(line)

    def wait_readyz(self, code: int) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while (got := self.get("/readyz"))[0] != code:
            assert time.monotonic() < deadline, got
        return got[1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons are forked from here, with these."""
    monkeypatch.setattr(supervisor, "GRACE_S", 0.1)
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)


# Start and stop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(number: int) -> None:
    with Daemon(workers=2) as daemon:
        daemon.wait_ready()
        status = daemon.status()
        assert daemon.ask() in [each["pid"] for each in status["workers"]]
        assert [each["state"] for each in status["workers"]] == ["ready", "ready"]
        assert (status["ready"], status["pid"]) == (True, daemon.pid)
        assert status["listeners"][0]["families"] == ["IPv4"]
        assert daemon.get("/readyz") == (200, "ok\n")
        assert daemon.metric("tproxyd_workers") == 2
        daemon.signal(number)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert {"worker 0 hears drain", "worker 1 hears drain"} <= set(said)
        assert said[-1] == "tproxyd: stopped"


def test_what_it_says_at_the_start() -> None:
    with Daemon(install=True) as daemon:
        daemon.wait_ready()
        port = daemon.config.listeners[0].port
        shown = [re.sub(r"\d+ ms", "N ms", line) for line in daemon.lines]
        assert shown == [
            f"tproxyd: version 0.1.0, pid {daemon.pid}, 1 worker",
            f"tproxyd: inbound listens on port {port} (IPv4) for every port but 15020-15021, 15090",
            "tproxyd: inbound: this machine has no IPv6: IPv4 only",
            f"tproxyd: admin endpoint: http://{daemon.config.admin}/",
            "kernel: install",
            "tproxyd: return path x: because",
            "tproxyd: ready in N ms",
        ]


def test_no_admin_endpoint_is_fine() -> None:
    with Daemon(admin=None) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_stop_during_the_start_is_a_stop() -> None:
    with Daemon(never_ready, drain_timeout_s=0.01) as daemon:
        daemon.wait_line("admin endpoint")
        daemon.signal(signal.SIGTERM)
        daemon.wait_line("does not end: killed")
        assert daemon.wait() == 0


def test_systemd_is_told() -> None:
    path = f"/tmp/tproxyd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ExitStack() as stack:
        systemd.bind(path)
        stack.callback(os.unlink, path)
        systemd.settimeout(PATIENCE_S)

        def under_systemd() -> None:
            os.environ.update(NOTIFY_SOCKET=path, WATCHDOG_USEC="20000")
            os.environ.pop("WATCHDOG_PID", None)

        with Daemon(install=True, before=under_systemd) as daemon:
            assert systemd.recv(1000) == b"READY=1\nSTATUS=Serving"
            daemon.wait_line("kernel: install")  # it was written before READY=1 was sent
            assert systemd.recv(1000) == systemd.recv(1000) == b"WATCHDOG=1"
            daemon.signal(signal.SIGTERM)
            said = iter(lambda: systemd.recv(1000), b"STOPPING=1\nSTATUS=Draining")
            assert set(said) <= {b"WATCHDOG=1"}


# What can't start ---------------------------------------------------------------------------------


def test_a_worker_that_refuses_to_start_ends_it_all_with_the_reason() -> None:
    with Daemon(refuses, workers=2) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-1] == ("can't start worker 1: can't do this: it is forbidden; ask somebody")
        assert "worker 0 hears drain" in said


def test_a_worker_that_crashes_at_the_start_ends_it_all() -> None:
    with Daemon(crashes_at_start) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert "RuntimeError: a bug in the worker" in said
        assert said[-1].startswith("can't start worker 0: ended with exit status 70; ")


def test_a_worker_that_is_never_ready_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_TIMEOUT_S", 0.05)
    with Daemon(never_ready, drain_timeout_s=0.01) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-1].startswith("can't start the workers: it is not ready after 0.05 s; ")


def test_an_access_log_that_cannot_be_opened(tmp_path: Path) -> None:
    with Daemon(log=Log(access=str(tmp_path / "no" / "such"))) as daemon:
        (said,) = daemon.rest()
        assert said == (
            f"can't open the access log {tmp_path}/no/such: no such file or directory; choose"
            ' another path in log.access, "-" for stdout, or "" for none'
        )
        assert daemon.wait() == 3


def test_an_admin_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint("127.0.0.1", other.getsockname()[1])
        with Daemon(admin=taken) as daemon:
            (said,) = daemon.rest()
            assert said.startswith(f"can't listen on {taken} for the admin endpoint: ")
            assert daemon.wait() == 3


# Workers that die ---------------------------------------------------------------------------------


def test_the_next_worker_serves_what_waited_and_counts_on() -> None:
    with Daemon() as daemon:
        daemon.wait_ready()
        first = daemon.ask()
        os.kill(first, signal.SIGSTOP)
        with daemon.connect() as waiting:  # in the accept queue of the stopped one
            os.kill(first, signal.SIGKILL)
            daemon.wait_line("worker 0 was killed by SIGKILL; the next one starts")
            second = int(waiting.recv(100))
        assert second != first
        daemon.wait_line("worker 0 is ready again")
        assert daemon.metric('tproxyd_bytes_total{direction="sent"}') == 200
        assert daemon.metric('tproxyd_connections_active{listener="inbound"}') == 1
        assert daemon.metric("tproxyd_worker_restarts_total") == 1
        assert daemon.status()["workers"][0]["pid"] == second


def test_workers_that_keep_dying_are_tried_again_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.05)
    with Daemon(sound_once) as daemon:
        daemon.wait_ready()
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("killed by SIGKILL; the next one starts in 0.01 s")
        for pause in ("0.02", "0.04", "0.05", "0.05"):
            daemon.wait_line(f"worker 0 no longer; the next one starts in {pause} s")
        assert "worker 0 is " in daemon.wait_readyz(503)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_worker_that_lived_long_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SOUND_S", 0.0)
    with Daemon() as daemon:
        daemon.wait_ready()
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("the next one starts now")
        daemon.wait_line("worker 0 is ready again")


def test_a_worker_gets_no_file_but_its_own(tmp_path: Path) -> None:
    def with_a_low_limit() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    log = Log(access=str(tmp_path / "log"))
    daemon = Daemon(tells_its_files, workers=2, log=log, before=with_a_low_limit)
    with daemon:
        for _ in range(2):
            daemon.wait_line(r"worker . has stray \[\], all of its files True")
        daemon.wait_ready()
        assert daemon.config.admin is not None
        with socket.create_connection(daemon.config.admin):  # the loop holds more files now
            daemon.get("/livez")
            os.kill(daemon.ask(), signal.SIGKILL)
            daemon.wait_line(r"worker . has stray \[\], all of its files True")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640


def test_orphans_are_reaped() -> None:
    """As PID 1 would: the daemon is made the one that inherits them."""

    def subreaper() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

    with Daemon(leaves_an_orphan, before=subreaper) as daemon:
        orphan = int(daemon.wait_line("has child").split()[-1])
        daemon.wait_ready()
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("worker 0 is ready again")
        assert orphan in daemon.children()
        os.kill(orphan, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while orphan in daemon.children():
            assert time.monotonic() < deadline


def test_children_outlive_neither_the_supervisor_nor_ctrl_c() -> None:
    with Daemon(workers=2) as daemon:
        daemon.wait_ready()
        for pid in daemon.children():  # as Ctrl-C and systemd do
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert daemon.get("/readyz")[0] == 200
        daemon.signal(signal.SIGKILL)
        said = daemon.rest()  # to the end: every process has gone
        assert {"worker 0 hears nobody", "worker 1 hears nobody"} <= set(said)


# Workers that do not leave ------------------------------------------------------------------------


def test_a_worker_that_ignores_the_drain_is_killed() -> None:
    with Daemon(ignores_drain, drain_timeout_s=0.05) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.wait_line(r"worker 0 \(pid \d+\) does not end: killed")
        assert daemon.wait() == 0


def test_a_second_signal_cuts_the_drain_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", PATIENCE_S)
    with Daemon(leaves_only_when_cut, drain_timeout_s=3600.0) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.wait_line("worker 0 hears drain")
        assert daemon.get("/readyz") == (503, "stopping\n")
        assert daemon.status()["workers"][0]["state"] == "draining"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert not [line for line in daemon.rest() if "killed" in line]


# The kernel state ---------------------------------------------------------------------------------


def test_interception_begins_last_and_ends_first() -> None:
    with Daemon(install=True) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.rest()
        assert daemon.wait() == 0
        ours = ("kernel:", "worker", "tproxyd: ready")
        story = [re.sub(r" in \d+ ms", "", line) for line in daemon.lines if line.startswith(ours)]
        assert story == [
            "kernel: install",
            "tproxyd: ready",
            "kernel: stop intercepting",
            "worker 0 hears drain",
            "kernel: clean",
        ]


def test_without_install_the_kernel_is_only_read() -> None:
    with Daemon() as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state is as configured")
        assert daemon.status()["kernel"] | {"checked_s_ago": 0} == {
            "state": "ok",
            "detail": [],
            "return_path": "x",
            "checked_s_ago": 0,
        }
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        assert not [line for line in (*daemon.lines, *daemon.rest()) if line.startswith("kernel:")]


def test_an_install_that_is_refused_is_undone() -> None:
    with Daemon(load=refuses_install, install=True) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-1] == "can't install the kernel state: it is forbidden; ask somebody"
        assert said[-4:-1] == ["kernel: stop intercepting", "worker 0 hears drain", "kernel: clean"]


def test_drift_is_told_and_counted_once_and_makes_unready(tmp_path: Path) -> None:
    sign = tmp_path / "drift"
    with Daemon(load=drifts_while(sign), install=True) as daemon:
        daemon.wait_ready()
        assert daemon.get("/readyz")[0] == 200
        for times in (1, 2):
            sign.touch()
            for _ in range(3):
                assert daemon.get("/readyz") == (503, "kernel state: drift; to do: add a rule\n")
            assert daemon.metric("tproxyd_kernel_drift_total") == times
            sign.unlink()
            assert daemon.get("/readyz")[0] == 200
        daemon.signal(signal.SIGTERM)
        told = [line for line in daemon.rest() if "kernel state" in line]
        assert (
            told
            == [
                "tproxyd: the kernel state differs from the configuration; to do: add a rule",
                "tproxyd: the kernel state is as configured",
            ]
            * 2
        )


def test_a_state_that_is_not_installed_is_not_drift() -> None:
    with Daemon(load=not_installed) as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state is not installed; try tproxyd install")
        assert daemon.get("/readyz") == (503, "kernel state: not installed\n")
        assert daemon.metric("tproxyd_kernel_drift_total") == 0


def test_a_state_that_cannot_be_read_is_unknown_and_no_reason_to_be_unready() -> None:
    with Daemon(load=cannot_be_read) as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state can't be read: it is forbidden; ask somebody")
        assert daemon.get("/readyz")[0] == 200
        assert daemon.status()["kernel"]["state"] == "unknown"


def test_a_kernel_that_never_answers_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "REQUEST_TIMEOUT_S", 0.05)
    with Daemon(load=never_answers) as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state can't be read: no answer within 0.05 s")
        assert daemon.get("/readyz")[0] == 200


def test_a_reconciler_that_died_is_forked_again_to_clean() -> None:
    with Daemon(install=True) as daemon:
        daemon.wait_ready()
        workers = [each["pid"] for each in daemon.status()["workers"]]
        (holder,) = (pid for pid in daemon.children() if pid not in workers)
        os.kill(holder, signal.SIGKILL)
        daemon.wait_line("the process that holds the kernel state was killed by SIGKILL")
        daemon.signal(signal.SIGTERM)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert [line for line in said if line.startswith("kernel:")] == [
            "kernel: stop intercepting",
            "kernel: clean",
        ]


def test_many_who_ask_cause_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "FRESH_S", 3600.0)
    looks = itertools.count(1)

    def counts_looks(_: Config) -> Kernel:
        return lambda _: Report((), (), (f"look {next(looks)}",), True, "x")

    with Daemon(load=counts_looks) as daemon:
        daemon.wait_ready()
        answers = {daemon.get("/readyz")[1] for _ in range(5)}
        assert answers == {"kernel state: drift; to do: look 1\n"}
