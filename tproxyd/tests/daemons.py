"""A daemon for tests: the real supervisor in a forked process, stand-in workers and kernels.

What its processes write to stderr comes to the test through a pipe: waiting for a line is waiting
for a state, and its end means that every process is gone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tproxyd.addr import Endpoint
from tproxyd.config import Config, Listener, Log
from tproxyd.errors import KernelError
from tproxyd.flow import listen
from tproxyd.flow.tally import ACTIVE, BYTES, Layout
from tproxyd.kernel.watch import News
from tproxyd.proc import startup, supervisor, watchdog
from tproxyd.proc.means import Outside
from tproxyd.proc.reconciler import Kernel, Reconciler, Report, Verb
from tproxyd.proc.run_command import Command
from tproxyd.proc.sockets import Listeners, Sockets
from tproxyd.proc.worker import WorkerSpec
from tproxyd.tests.talker import PATIENCE_S, Talker

PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


def say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


class OnLoopback:
    """How stand-ins listen (proc/sockets.py)."""

    def places(self, config: Config, *, ipv6: bool = False) -> list[tuple[int, Endpoint]]:
        return [(i, Endpoint("127.0.0.1", each.port)) for i, each in enumerate(config.listeners)]

    def open_at(self, config: Config, index: int, where: Endpoint) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
        return sock

    def prepare(self, sock: socket.socket, config: Config, index: int) -> None:
        sock.listen()


def listeners_of(config: Config) -> Listeners:
    """The real ones, as the supervisor gives them to a lone worker. KernelError."""
    sockets = Sockets(listen)
    (listeners,) = sockets.assign(config, 1)
    sockets.commit()
    return listeners


# Workers ------------------------------------------------------------------------------------------


def hear(spec: WorkerSpec, taken: int = 0) -> str:
    """The next word of the supervisor's, "" at its end; or "ping", which has been answered."""
    try:
        word = spec.control.recv(10_000).decode().strip()
    except ConnectionResetError:  # it was killed, and had not read what we said
        return ""
    if word == watchdog.PING:
        with suppress(BrokenPipeError):  # it was killed since
            spec.control.send(f"{watchdog.answer(taken, accepting=True)}\n".encode())
    return word


def worker(spec: WorkerSpec) -> None:
    """Answers each connection with its pid, counting, until told to drain or left alone."""
    layout, row = Layout(spec.config), spec.page.rows[spec.slot]
    spec.control.send(b"ready\n")
    sockets = [sock for _, sock in spec.listeners]
    while True:
        readable, _, _ = select.select([spec.control, *sockets], (), ())
        if spec.control in readable:
            word = hear(spec, row[layout.index(ACTIVE, spec.config.listeners[0].name)])
            if word in (watchdog.PING, "serve"):
                continue
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


def accepts_nothing(spec: WorkerSpec) -> None:
    """Its loop runs; it says that it accepts, and does not."""
    spec.control.send(b"ready\n")
    while hear(spec):
        pass


def talks_nonsense(spec: WorkerSpec) -> None:
    """To its first client, as one would that strangers have made theirs; and ends, or stays."""
    spec.control.send(b"ready\n")
    client, _ = spec.listeners[0][1].accept()
    for _ in range(9):  # more than are read before a signal is heard
        spec.control.send(b"pong nonsense\n")
    if client.recv(10) == b"stay":
        signal.pause()
    with suppress(BlockingIOError):  # what it leaves unread would be a reset, and its words lost
        while spec.control.recv(100, socket.MSG_DONTWAIT):
            pass


def leaves_only_when_cut(spec: WorkerSpec) -> None:
    """For it has a connection."""
    spec.page.rows[spec.slot][Layout(spec.config).index(ACTIVE, spec.config.listeners[0].name)] = 1
    spec.control.send(b"ready\n")
    while (word := hear(spec)) not in ("cut", ""):
        if word != watchdog.PING:
            say(f"worker {spec.slot} hears {word}")


def sound_once(spec: WorkerSpec) -> None:
    """The first generation serves, those behind it fail."""
    cell = Layout(spec.config).index(BYTES, "received")
    spec.page.rows[spec.slot][cell] += 1
    if spec.page.rows[spec.slot][cell] > 1:
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
    """The first one on its slot does; the test ends that orphan."""
    cell = Layout(spec.config).index(BYTES, "received")
    spec.page.rows[spec.slot][cell] += 1
    if spec.page.rows[spec.slot][cell] == 1:
        orphan = os.fork()
        if orphan == 0:
            signal.alarm(60)  # whatever becomes of the test
            signal.pause()
            os._exit(0)
        say(f"worker {spec.slot} has child {orphan}")
    worker(spec)


# Kernels ------------------------------------------------------------------------------------------


class Quiet:
    """The rest of the kernel for one who guards: nobody else is there, and nothing happens."""

    hears = True

    def claim(self) -> None:
        pass

    def follow(self, config: Config) -> None:
        pass

    def files(self) -> tuple[socket.socket, ...]:
        return ()

    def read(self) -> News:
        return News()

    def changed(self) -> bool:
        return False

    def release(self) -> None:
        pass


def tells_verbs(_: Config) -> Kernel:
    """As the real one: what it is asked for twice it does once."""
    last = Verb.CHECK

    def kernel(verb: Verb) -> Report:
        nonlocal last
        changed = () if verb in (Verb.CHECK, last) else ("a rule",)
        if changed:
            say(f"kernel: {verb}")
            last = verb
        return Report(changed, ("return path x: because",), (), True, "x", changed)

    return kernel


def refuses_install(config: Config, *, wrote: bool = False) -> Kernel:
    def kernel(verb: Verb) -> Report:
        if verb is Verb.INSTALL:
            why = "it is forbidden"
            raise KernelError("install the kernel state", why, "ask somebody", wrote=wrote)
        return tells_verbs(config)(verb)

    return kernel


def fails_halfway(config: Config) -> Kernel:
    return refuses_install(config, wrote=True)


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


# systemd ------------------------------------------------------------------------------------------


class Systemd:
    """What a daemon would tell systemd. `Daemon(before=systemd.adopt)` is one that does."""

    def __init__(self, **environment: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="tproxyd-")  # a short path
        self._path = f"{self._scratch.name}/notify"
        self._environment = environment
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self._path)
        self._sock.settimeout(PATIENCE_S)

    def adopt(self) -> None:
        os.environ.update(self._environment, NOTIFY_SOCKET=self._path)
        os.environ.pop("WATCHDOG_PID", None)

    def hear(self) -> str:
        return self._sock.recv(1000).decode()

    def wait_for(self, word: str) -> None:
        """A new message that begins so."""
        self._forget()
        while not self.hear().startswith(word):
            pass

    def wait_silence(self, seconds: float) -> None:
        """Nothing was said for so long; what came before does not count."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self._forget()
            readable, _, _ = select.select([self._sock], (), (), seconds)
            if not readable:
                return
            assert time.monotonic() < deadline, "it does not fall silent"

    def _forget(self) -> None:
        while select.select([self._sock], (), (), 0)[0]:
            self.hear()

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self._scratch.cleanup()


# A daemon -----------------------------------------------------------------------------------------


# Below net.ipv4.ip_local_port_range: nobody's outgoing connection takes one between our look and
# the daemon's bind.
_ports = itertools.cycle(random.sample(range(12_000, 32_000), 5_000))


def free_port() -> int:
    for port in _ports:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


class Daemon(Talker):
    def __init__(
        self,
        entry: Callable[[WorkerSpec], None] = worker,
        load: Callable[[Config], Kernel] = tells_verbs,
        *,
        install: bool = False,
        guard: bool = False,
        outside: Callable[[], Outside] = Quiet,
        before: Callable[[], None] = lambda: None,
        argv: tuple[str, ...] = (),  # of `tproxyd exec`
        reread: Callable[[Config], Config] | None = None,  # at a reload, from the one of the start
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
        super().__init__()
        self.admin_port = self.config.admin.port if self.config.admin else 0
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(write, 2)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                # A shell without job control has what it puts into the background ignore them.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGQUIT, signal.SIG_DFL)
                before()
                kernel = Reconciler(self.config, load, outside)
                code = self._run(entry, kernel, install, guard, argv, reread)
            finally:
                os._exit(code)
        os.close(write)
        self.stderr = read

    def _run(
        self,
        entry: Callable[[WorkerSpec], None],
        kernel: Reconciler,
        install: bool,
        guard: bool,
        argv: tuple[str, ...],
        reread: Callable[[Config], Config] | None,
    ) -> int:
        command = Command(argv, None) if argv else None
        startup.log_to_stderr()
        try:
            kernel.fork()
            supervisor.Supervisor(
                self.config,
                kernel,
                install=install,
                guard=guard,
                worker=entry,
                listening=OnLoopback(),
                reread=reread and (lambda: reread(self.config)),
                command=command,
            ).run()
        except KernelError as error:
            say(f"{error}")
            return 3
        return command.code if command else 0

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

    def wait_readyz(self, code: int) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while (got := self.get("/readyz"))[0] != code:
            assert time.monotonic() < deadline, got
        return got[1]
