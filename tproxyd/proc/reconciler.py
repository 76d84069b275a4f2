"""The one process that holds the kernel state: a child of the supervisor, asked over a socketpair.

In a process of its own so that netlink, pyroute2 (45 ms to import, 10 MB) and the use of
CAP_NET_ADMIN are in no worker and not in the supervisor, which must answer signals at once. It
imports tproxyd.kernel after the fork, while the workers start; nothing else in proc/ ever does.
pyroute2 only writes (kernel/routing.py), so the process that has installed is let go, and the next
one, which checks for as long as the daemon lives, imports it no sooner than it has to clean.

Requests and answers are JSON lines, one at a time: install, stop intercepting (no new connection is
taken; the rules that bring answers home stay), check, clean.

EOF on its socket means that the supervisor is gone without a farewell. It then exits and **leaves
the rules where they are**: with nobody listening, intercepted connections are refused, and traffic
never reaches the application around the proxy. Who wants that says `tproxyd clean`.

It is forked again when a request finds none: rules that were installed must be cleanable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum

from tproxyd.config import Config
from tproxyd.errors import KernelError
from tproxyd.linux import name_process
from tproxyd.proc import child

log = logging.getLogger("tproxyd")

# A whole install takes tens of milliseconds; what takes this long hangs, and is killed.
REQUEST_TIMEOUT_S = 10.0
# Probes may ask more often than the state is worth reading (a check costs milliseconds).
FRESH_S = 1.0


class State(StrEnum):
    OK = "ok"
    DRIFT = "drift"
    NOT_INSTALLED = "not installed"
    UNKNOWN = "unknown"  # could not be read: not permitted, or the reconciler failed


@dataclass(frozen=True, slots=True)
class Report:
    """A kernel.reconcile.Report as it comes over the socket; sentences, but for `return_path`."""

    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    installed: bool = False
    return_path: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the last check said."""

    state: State
    detail: tuple[str, ...] = ()
    return_path: str = ""
    read_at: float = float("-inf")  # time.monotonic()


class Verb(StrEnum):
    INSTALL = "install"
    STOP_INTERCEPTING = "stop intercepting"
    CHECK = "check"
    CLEAN = "clean"


Kernel = Callable[[Verb], Report]


def load_kernel(config: Config) -> Kernel:
    """The real one. Called in the child only."""
    from tproxyd.kernel import reconcile

    def do(verb: Verb) -> Report:
        match verb:
            case Verb.INSTALL:
                report = reconcile.install(config)
            case Verb.STOP_INTERCEPTING:
                report = reconcile.install(config, intercept=False)
            case Verb.CHECK:
                report = reconcile.check(config)
            case Verb.CLEAN:
                report = reconcile.clean()
        path = report.return_path or ""
        return Report(report.changed, report.notes, report.differs, report.installed, path)

    return do


def load_to_install(config: Config) -> Kernel:
    """The same, when install is what will be asked: with pyroute2 there before that comes."""
    from tproxyd.kernel import routing

    kernel = load_kernel(config)
    routing.prepare()
    return kernel


# In the child -----------------------------------------------------------------------------------


def serve(sock: socket.socket, config: Config, load: Callable[[Config], Kernel]) -> None:
    """Answer requests until the supervisor is gone."""
    name_process("tproxyd/kernel")
    kernel = load(config)
    sock.setblocking(True)
    with contextlib.suppress(ConnectionError), sock.makefile("rw", encoding="utf-8") as stream:
        for line in stream:
            answer: dict[str, object]
            try:
                answer = {"report": asdict(kernel(Verb(json.loads(line))))}
            except KernelError as error:
                answer = {"error": [error.action, error.why, error.hint]}
            except ImportError as error:  # replaced or removed since the start
                again = "install tproxyd again, then: tproxyd clean"
                answer = {"error": ["load what writes to the kernel", str(error), again]}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


# In the supervisor ------------------------------------------------------------------------------


class Reconciler:
    """The supervisor's side: asks, and remembers what the last check said."""

    def __init__(self, config: Config, load: Callable[[Config], Kernel] = load_kernel) -> None:
        self._config, self._load = config, load
        self._lock = asyncio.Lock()
        self._pid = 0
        self._sock: socket.socket | None = None
        self._checking: asyncio.Task[Verdict] | None = None
        self.verdict = Verdict(State.UNKNOWN, ("not read yet",))
        self._told: State | None = None
        self.drifts = 0
        self._installed = False

    def fork(self, load: Callable[[Config], Kernel] | None = None) -> None:
        """Start the child. Called early, so that its imports run beside everything else.

        `load` is for this child instead of the usual one.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._pid = child.fork(
                lambda: serve(theirs, self._config, load or self._load), keep=(theirs.fileno(),)
            )
        ours.setblocking(False)
        self._sock = ours

    def reaped(self, pid: int) -> bool:
        """Whether the process that just ended was ours; the next request forks another.

        The socket stays: a request under way finds EOF on it, where closing would strand it.
        """
        if pid != self._pid:
            return False
        self._pid = 0
        return True

    def close(self) -> None:
        """Let the child go: EOF, and it exits."""
        self._forget()

    def _forget(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._pid, self._sock = 0, None

    async def install(self) -> Report:
        report = await self._request(Verb.INSTALL)
        self._forget()  # that process has pyroute2 in it; the next one only looks, till the end
        self.verdict = Verdict(State.OK, (), report.return_path, time.monotonic())
        self._told = State.OK
        self._installed = True
        return report

    async def stop_intercepting(self) -> Report:
        return await self._request(Verb.STOP_INTERCEPTING)

    async def clean(self) -> Report:
        return await self._request(Verb.CLEAN)

    async def move(self, config: Config) -> Report:
        """The wish is another from here on; KernelError, and it is the old one again."""
        old = self._config
        await self._wish(config)
        if not self._installed:
            return Report()
        try:
            return await self.install()
        except KernelError:
            await self._wish(old)
            await self.install()
            raise

    async def _wish(self, config: Config) -> None:
        async with self._lock:  # a request under way would wait for ever on a closed socket
            self._config = config
            self._forget()

    async def release(self) -> None:
        """Another process takes over."""

    async def take_back(self) -> None:
        """It did not."""

    async def check(self) -> Verdict:
        """What the kernel holds now; at most FRESH_S old, and read once for all who ask."""
        if time.monotonic() - self.verdict.read_at < FRESH_S:
            return self.verdict
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        # Shielded: a probe that gives up must not leave the answer to the next request.
        return await asyncio.shield(self._checking)

    async def _check(self) -> Verdict:
        try:
            report = await self._request(Verb.CHECK)
        except KernelError as error:
            report = Report(differs=(f"{error.why}; {error.hint}",))
            state = State.UNKNOWN
        else:
            state = State.DRIFT if report.installed else State.NOT_INSTALLED
            state = state if report.differs else State.OK
        self.verdict = Verdict(state, report.differs, report.return_path, time.monotonic())
        if self._told is None and state is State.OK and not report.installed:
            self._told = state  # there is none, and none is wanted
        if self._told != state:
            self._tell(self._told)
        return self.verdict

    def _tell(self, before: State | None) -> None:
        """Log a change of the verdict, and count it where something has drifted away."""
        self._told = self.verdict.state
        now, why = self.verdict.state, "; ".join(self.verdict.detail)
        if now is State.DRIFT or (now is State.NOT_INSTALLED and before is State.OK):
            self.drifts += 1
            log.warning("the kernel state differs from the configuration; to do: %s", why)
        elif now is State.NOT_INSTALLED:
            log.warning("the kernel state is not installed; try tproxyd install")
        elif now is State.UNKNOWN:
            log.warning("the kernel state can't be read: %s", why)
        elif now is State.OK:
            log.info("the kernel state is as configured")

    async def _request(self, verb: Verb) -> Report:
        async with self._lock:
            try:
                if not self._pid:
                    self._forget()
                    self.fork()
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    answer = json.loads(await self._exchange(json.dumps(verb) + "\n"))
            except TimeoutError:
                if self._pid:
                    os.kill(self._pid, signal.SIGKILL)
                self._forget()
                why = f"no answer within {REQUEST_TIMEOUT_S:g} s"
                raise KernelError(_ACTIONS[verb], why, "try tproxyd doctor") from None
            except OSError as error:
                self._forget()
                why = error.strerror or str(error)
                raise KernelError(_ACTIONS[verb], why, "try tproxyd doctor") from error
        if "error" in answer:
            raise KernelError(*answer["error"])
        return _report(**answer["report"])

    async def _exchange(self, line: str) -> bytes:
        assert self._sock is not None
        sock, loop = self._sock, asyncio.get_running_loop()
        await loop.sock_sendall(sock, line.encode())
        answer = b""
        while not answer.endswith(b"\n"):
            data = await loop.sock_recv(sock, 65536)
            if not data:
                raise OSError("the process that holds the kernel state ended; the log says why")
            answer += data
        return answer


def _report(
    changed: list[str],
    notes: list[str],
    differs: list[str],
    installed: bool,
    return_path: str,
) -> Report:
    return Report(tuple(changed), tuple(notes), tuple(differs), installed, return_path)


_ACTIONS = {
    Verb.INSTALL: "install the kernel state",
    Verb.STOP_INTERCEPTING: "stop intercepting",
    Verb.CHECK: "read the kernel state",
    Verb.CLEAN: "remove the kernel state",
}
