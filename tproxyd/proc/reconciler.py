"""The kernel state as the supervisor handles it: asks the process that holds it, and listens to it.

That is a process of its own (keeper.py) so that netlink and the use of CAP_NET_ADMIN are in no
worker and not in the supervisor, which must answer signals at once. It imports tproxyd.kernel after
the fork, while the workers start; nothing else in proc/ ever does.

Who guards? Only a daemon that was told to: `install` and `guard` begin it. There is one at most in
a network namespace, and a second one is refused. A daemon that does not guard looks every few
seconds, and says what it sees.

The process is forked again when a request finds none, since rules that were installed must be
cleanable; and at once if it dies while it guards, to go on with that.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tproxyd import child
from tproxyd.config import Config
from tproxyd.errors import KernelError
from tproxyd.proc import keeper, means
from tproxyd.proc.heals import Heals
from tproxyd.proc.means import Kernel, Means, Report, Verb

__all__ = ["Kernel", "Means", "Reconciler", "Report", "State", "Verb", "Verdict"]

log = logging.getLogger("tproxyd")

# A whole install takes tens of milliseconds, waiting for a predecessor to leave seconds; what takes
# this long hangs, and is killed. (Where there was five times as much to do as there are CPUs, the
# end of an nf_tables socket alone was seen to wait ten seconds: nft_rcv_nl_event, __flush_work.)
REQUEST_TIMEOUT_S = 20.0
# Probes may ask more often than the state is worth reading (a check costs milliseconds).
FRESH_S = 1.0
# Nor wait for long: a kubelet gives up after a second, and takes the pod out of its Service.
PATIENCE_S = 0.5
# A process that lived this long was sound, and what killed it may not come again at once.
SOUND_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class State(StrEnum):
    OK = "ok"
    DRIFT = "drift"
    NOT_INSTALLED = "not installed"
    UNKNOWN = "unknown"  # could not be read: not permitted, or the process failed


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the last check said."""

    state: State
    detail: tuple[str, ...] = ()
    return_path: str = ""
    read_at: float = float("-inf")  # time.monotonic()
    trouble: str = ""  # why it is not healed

    @property
    def unready(self) -> str:
        """Why the daemon is not ready, as far as the kernel state goes; "" when it is."""
        if self.state is State.NOT_INSTALLED and not self.trouble:
            return "kernel state: not installed"
        if self.state in (State.DRIFT, State.NOT_INSTALLED):
            fails = f"; healing fails: {self.trouble}" if self.trouble else ""
            return f"kernel state: {self.state}; to do: {'; '.join(self.detail)}{fails}"
        return f"kernel state: healing fails: {self.trouble}" if self.trouble else ""


class Reconciler:
    """The supervisor's side: asks, and remembers what the last check said."""

    def __init__(
        self,
        config: Config,
        load: Callable[[Config], Kernel] = means.load_kernel,
        outside: Callable[[], means.Outside] = means.load_outside,
    ) -> None:
        self._config, self._means = config, Means(load, outside)
        self._lock = asyncio.Lock()
        self._pid = 0
        self._sock: socket.socket | None = None
        self._reading = False
        self._unread = b""
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._number = 0  # of the last request; its answer has it too
        self._wish: Verb | None = None  # what is guarded
        self._forked_at, self._pause = 0.0, 0.0
        self._again: asyncio.TimerHandle | None = None
        self._checking: asyncio.Task[Verdict] | None = None
        self.verdict = Verdict(State.UNKNOWN, ("not read yet",))
        self._told: State | None = None
        self.drifts = 0
        self.heals = Heals()

    # The process --------------------------------------------------------------------------------

    def fork(self, *, prepare: bool = False) -> None:
        """Start it. Called early, so that its imports run beside everything else.

        `prepare`: install is what will be asked, and what that imports runs beside it, too.
        """
        ours, theirs = socket.socketpair()
        config, given, wish = self._config, self._means, self._wish
        with theirs:
            try:
                self._pid = child.fork(
                    lambda: keeper.serve(theirs, config, given, wish, prepare=prepare),
                    keep=(theirs.fileno(),),
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._sock, self._unread, self._reading = ours, b"", False
        self._forked_at = time.monotonic()

    def reaped(self, pid: int) -> bool:
        """Whether the process that just ended was ours; if it guarded, another takes that up."""
        if pid != self._pid:
            return False
        self._pid = 0
        if self._wish is not None:
            sound = time.monotonic() - self._forked_at >= SOUND_S
            self._pause = (
                0.0 if sound else min(max(2 * self._pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            )
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(self._pause, self._take_up)
        return True

    def _take_up(self) -> None:
        if self._pid or self._wish is None:
            return
        self._forget()
        try:
            self.fork()
        except OSError as error:  # no memory, or no more processes allowed
            log.error("can't keep the kernel state: can't fork: %s", error.strerror)
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(LONGEST_PAUSE_S, self._take_up)
        else:
            self._listen()

    def close(self) -> None:
        """Let it go, the state as it is."""
        self._wish = None
        if self._sock is not None:
            with contextlib.suppress(OSError):  # it is dead, or hangs
                self._sock.send(_request(Verb.LEAVE, 0))
        self._forget()

    def _forget(self) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._sock is not None:
            if self._reading:
                asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        self._pid, self._sock, self._again, self._reading = 0, None, None, False

    # What it is asked for -----------------------------------------------------------------------

    async def claim(self) -> None:
        """Be the one who keeps the kernel state here; KernelError that names another daemon."""
        await self._request(Verb.CLAIM)

    async def install(self) -> Report:
        """Make the state, and keep it from now on."""
        report = await self._request(Verb.INSTALL)
        self._guards(report)
        return report

    async def guard(self) -> None:
        """Keep the state: what differs is healed. KernelError only where another daemon does."""
        self._guards(await self._request(Verb.GUARD))

    def _guards(self, report: Report) -> None:
        self._wish = Verb.INSTALL
        self.verdict = Verdict(State.OK, (), report.return_path, time.monotonic())
        self._told = State.OK

    async def stop_intercepting(self) -> Report:
        guarded, self._wish = self._wish, None  # who takes up now must not put it back
        report = await self._request(Verb.STOP_INTERCEPTING)
        if guarded is not None:
            self._wish = Verb.STOP_INTERCEPTING
        return report

    async def clean(self) -> Report:
        self._wish = None
        return await self._request(Verb.CLEAN)

    async def move(self, config: Config) -> Report:
        """From now on the state is that of `config`; KernelError leaves that of the old one."""
        report = await self._request(Verb.MOVE, config=config)
        self._config = config
        if self._wish is not None:
            self._guards(report)
        else:
            self.verdict = Verdict(State.UNKNOWN, ("not read yet",))
        return report

    async def release(self) -> None:
        """Keep the state no longer: it stands, and another daemon may take it over."""
        wish, self._wish = self._wish, None
        try:
            await self._request(Verb.RELEASE)
        except BaseException:
            self._wish = wish
            raise

    # What it says -------------------------------------------------------------------------------

    async def check(self) -> Verdict:
        """What the kernel holds now; at most FRESH_S old, and read once for all who ask.

        Older where that takes longer than PATIENCE_S: then it is what was read last.
        """
        if time.monotonic() - self.verdict.read_at < FRESH_S:
            return self.verdict
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        try:
            async with asyncio.timeout(PATIENCE_S):
                # Shielded: who gives up must not leave the answer to the next request.
                return await asyncio.shield(self._checking)
        except TimeoutError:
            return self.verdict

    async def _check(self) -> Verdict:
        trouble = ""
        try:
            answer = await self._ask(Verb.CHECK)
        except KernelError as error:
            report = Report(differs=(f"{error.why}; {error.hint}",))
            state, trouble = State.UNKNOWN, self.heals.trouble
        else:
            report, trouble = _report(answer["report"]), answer.get("trouble", "")
            state = State.DRIFT if report.installed else State.NOT_INSTALLED
            state = state if report.differs else State.OK
        path = report.return_path
        self.verdict = Verdict(state, report.differs, path, time.monotonic(), trouble)
        if self._told is None and state is State.OK and not report.installed:
            self._told = state  # there is none, and none is wanted
        if self._told != state and self._wish is None:
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

    def _news(self, news: dict[str, Any]) -> None:
        """What it says unasked."""
        self.drifts += self.heals.note(news)
        if news["news"] != "fight":  # what was read before is no longer so
            self.verdict = Verdict(
                self.verdict.state, self.verdict.detail, self.verdict.return_path
            )

    # The exchange -------------------------------------------------------------------------------

    async def _request(self, verb: Verb, config: Config | None = None) -> Report:
        return _report((await self._ask(verb, config))["report"])

    async def _ask(self, verb: Verb, config: Config | None = None) -> dict[str, Any]:
        async with self._lock:
            try:
                if self._sock is None or not self._pid:
                    self._forget()
                    self.fork()
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    answer = await self._exchange(verb, config)
            except TimeoutError:
                if self._pid:  # `reaped` sees to what comes next
                    os.kill(self._pid, signal.SIGKILL)
                why = f"no answer within {REQUEST_TIMEOUT_S:g} s"
                raise KernelError(_ACTIONS[verb], why, "try tproxyd doctor", wrote=True) from None
            except OSError as error:
                why = error.strerror or str(error)
                raise KernelError(_ACTIONS[verb], why, "try tproxyd doctor", wrote=True) from error
        if "error" in answer:
            raise KernelError(*answer["error"], wrote=answer["wrote"])
        return answer

    async def _exchange(self, verb: Verb, config: Config | None) -> dict[str, Any]:
        assert self._sock is not None
        self._listen()
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        self._number += 1
        try:
            await loop.sock_sendall(self._sock, _request(verb, self._number, config))
            return await self._answer
        finally:
            self._answer = None

    def _listen(self) -> None:
        if self._sock is not None and not self._reading:
            asyncio.get_running_loop().add_reader(self._sock, self._read)
            self._reading = True

    def _read(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._reading = False
            if self._answer is not None and not self._answer.done():
                why = "the process that holds the kernel state ended; the log says why"
                self._answer.set_exception(OSError(why))
            return
        self._unread += data
        while b"\n" in self._unread:
            line, _, self._unread = self._unread.partition(b"\n")
            said = json.loads(line)
            if "news" in said:
                self._news(said)
            elif said["n"] != self._number:
                continue  # of a request that nobody waits for any more
            elif self._answer is not None and not self._answer.done():
                self._answer.set_result(said)


def _request(verb: Verb, number: int, config: Config | None = None) -> bytes:
    request: dict[str, object] = {"verb": str(verb), "n": number}
    if config is not None:  # both ends are this very program
        request["config"] = base64.b64encode(pickle.dumps(config)).decode()
    return json.dumps(request).encode() + b"\n"


def _report(said: dict[str, Any]) -> Report:
    return Report(
        changed=tuple(said["changed"]),
        notes=tuple(said["notes"]),
        differs=tuple(said["differs"]),
        installed=said["installed"],
        return_path=said["return_path"],
        wrong=tuple(said["wrong"]),
        replaced=said["replaced"],
    )


_ACTIONS = {
    Verb.CLAIM: "keep the kernel state",
    Verb.INSTALL: "install the kernel state",
    Verb.GUARD: "keep the kernel state",
    Verb.STOP_INTERCEPTING: "stop intercepting",
    Verb.CHECK: "read the kernel state",
    Verb.CLEAN: "remove the kernel state",
    Verb.MOVE: "move the kernel state to another configuration",
    Verb.RELEASE: "give the kernel state up",
    Verb.LEAVE: "give the kernel state up",
}
