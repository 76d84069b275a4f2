"""The supervisor: owns the listening sockets, forks the workers, obeys signals. No traffic here.

The order of a start is such that no client is ever refused or missed: the listening sockets listen,
the workers accept, then the kernel state intercepts (with --install), then READY=1. A stop is the
same backwards: intercept no more (what is new goes straight to the application), drain the workers,
remove the kernel state, leave.

A slot is a place for one worker: its listening sockets and its row of counters. They belong to the
slot and outlive each worker on it, because closing a listening socket loses what waits in its
accept queue: the next worker serves that, and goes on counting where the last one stopped.

A worker that dies is replaced at once, or, where it lived less than a second, after a pause of
0.1 s that doubles up to 1 s. Only at the start is a failing worker the end: what never worked is
better an exit code than a loop. Child deaths come as SIGCHLD to one reaper, which waits for every
child of this process, known or not: as PID 1 of a container it also inherits orphans.

The loop is stock asyncio: it does nothing in a second, and a supervisor wants little to go wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from tproxyd import __version__
from tproxyd.config import Config, PerClient
from tproxyd.errors import KernelError
from tproxyd.flow.tally import ACTIVE, Layout
from tproxyd.proc import admin, child, counters, status, systemd
from tproxyd.proc.clients import ClientTables
from tproxyd.proc.control import Control
from tproxyd.proc.reconciler import Reconciler
from tproxyd.proc.startup import age_ms, log_to_stderr, open_access_log, raise_file_limit
from tproxyd.proc.upstreams import FIRST_S, Upstreams

if TYPE_CHECKING:
    from tproxyd.proc.run_command import Command
    from tproxyd.proc.worker import WorkerSpec

log = logging.getLogger("tproxyd")

Listeners = list[tuple[int, socket.socket]]

_STOP = (signal.SIGTERM, signal.SIGINT)
# A worker is ready within 0.1 s; one that is not after this long hangs.
START_TIMEOUT_S = 10.0
# Between two looks at the kernel state when nobody asks for it.
CHECK_EVERY_S = 5.0
# A worker that lived this long was sound, and what killed it may not come again at once.
SOUND_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
# Workers end their connections themselves when the drain deadline passes; this is for those that
# do not.
GRACE_S = 1.0


class SlotState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DOWN = "down"  # there is no process; the next one starts soon


class Slot:
    """A place for one worker, and the worker that now has it."""

    def __init__(self, number: int, listeners: Listeners) -> None:
        self.number = number
        self.listeners = listeners
        self.state = SlotState.DOWN
        self.generation = 0
        self.pid = 0
        self.control: Control | None = None
        self.started_at = 0.0  # time.monotonic()
        self.started = ""  # the same, as people write it
        self.pause = 0.0  # before the last restart
        self.restart: asyncio.TimerHandle | None = None
        self.last_words = ""  # what the worker said about its own failure

    def say(self, word: str) -> None:
        if self.control is not None:
            self.control.say(word)


class Supervisor:
    """`Supervisor(config, kernel, …).run()` returns when stopped; KernelError if it can't start."""

    def __init__(
        self,
        config: Config,
        kernel: Reconciler,
        *,
        install: bool,
        guard: bool = False,
        worker: Callable[[WorkerSpec], None],
        open_listeners: Callable[[Config], Listeners],
        command: Command | None = None,
    ) -> None:
        self._config, self._install, self._guard, self._kernel = config, install, guard, kernel
        self._command = command
        self._worker, self._open_listeners = worker, open_listeners
        self._upstreams = Upstreams(config, self._tell_workers)
        self._slots: list[Slot] = []
        self._clients: ClientTables | None = None
        self._access_log: int | None = None
        self._admin: admin.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._restarts = 0
        self._ready = False
        self._installed = False
        self._stop = asyncio.Event()  # the first SIGTERM or SIGINT
        self._hurry = asyncio.Event()  # the second
        self._ending = False
        self._gone = asyncio.Event()  # while ending: no worker is left

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        signals = _STOP if self._command is None else self._command.signals
        for number in signals:
            self._loop.add_signal_handler(number, self._on_signal, number)
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._reap()  # the reconciler may have ended before there was a handler
        try:
            await self._start()
            await self._stop.wait()
        finally:
            await self._end()
            # A signal that came while the loop closes would be written to a closed wake-up socket.
            for number in (*signals, signal.SIGCHLD):
                self._loop.remove_signal_handler(number)
            for number in signals:
                signal.signal(number, signal.SIG_IGN)

    # Start --------------------------------------------------------------------------------------

    async def _start(self) -> None:
        files = raise_file_limit()
        if self._install or self._guard:
            await self._kernel.claim()
        self._upstreams.start()
        self._access_log = open_access_log(self._config.log.access)
        number_of_slots = self._config.workers or len(os.sched_getaffinity(0))
        self._page = counters.Page(Layout(self._config), number_of_slots)
        if any(each.per_client != PerClient() for each in self._config.listeners):
            self._clients = ClientTables(number_of_slots, files // 2)
        for number in range(number_of_slots):
            self._slots.append(Slot(number, self._open_listeners(self._config)))
        if self._config.admin is not None:
            sock = admin.open_socket(self._config.admin)
            self._admin = await admin.Server.start(sock, self)
        # Who would serve clients has to know where to.
        await _first_of(FIRST_S, self._upstreams.known, self._stop)
        if self._stop.is_set():
            return
        for slot in self._slots:
            self._fork_worker(slot)
        self._describe()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._started
        except TimeoutError:
            why = f"it is not ready after {START_TIMEOUT_S:g} s"
            raise KernelError("start the workers", why, "try tproxyd doctor") from None
        if self._stop.is_set():
            return
        if self._install:
            self._installed = True  # from here on there may be something to remove
            for note in (await self._kernel.install()).notes:
                log.info("%s", note)
        elif self._guard:
            await self._kernel.guard()
        self._ready = True
        systemd.notify("READY=1", "STATUS=Serving")
        log.info("ready in %d ms", age_ms())
        self._tasks.append(self._loop.create_task(self._watch_kernel()))
        if (interval := systemd.watchdog_interval()) is not None:
            self._tasks.append(self._loop.create_task(_feed_watchdog(interval)))
        if self._command is not None:
            for _ in range(3):  # a signal that came before is heard first: wake-up, reader, handler
                await asyncio.sleep(0)
            if not self._stop.is_set():
                self._command.start()

    def _describe(self) -> None:
        workers = f"{len(self._slots)} worker{'s' if len(self._slots) > 1 else ''}"
        log.info("version %s, pid %d, %s", __version__, os.getpid(), workers)
        for i, listener in enumerate(self._config.listeners):
            families = self._families(i)
            log.info("%s", status.introduce(listener, families))
            if "IPv6" not in families and listener.bind in ("", "*"):
                log.warning("%s: this machine has no IPv6: IPv4 only", listener.name)
        if self._config.admin is not None:
            log.info("admin endpoint: http://%s/", self._config.admin)

    def _families(self, index: int) -> list[str]:
        families = [sock.family for i, sock in self._slots[0].listeners if i == index]
        return ["IPv6" if family == socket.AF_INET6 else "IPv4" for family in families]

    async def _watch_kernel(self) -> None:
        while True:
            await self._kernel.check()
            await asyncio.sleep(CHECK_EVERY_S)

    # Workers ------------------------------------------------------------------------------------

    def _fork_worker(self, slot: Slot) -> None:
        from tproxyd.proc.worker import WorkerSpec  # see serve

        slot.restart = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec = WorkerSpec(
            config=self._config,
            slot=slot.number,
            listeners=slot.listeners,
            rows=self._page.rows,
            control=theirs,
            access_log=self._access_log,
            upstreams=self._upstreams.picture,
            clients=self._clients,
        )
        keep = [theirs.fileno(), *(sock.fileno() for _, sock in slot.listeners)]
        if self._access_log is not None:
            keep.append(self._access_log)
        slot.generation += 1
        slot.started_at = time.monotonic()
        slot.started = datetime.now(UTC).isoformat(timespec="seconds")
        slot.last_words = ""
        with theirs:
            try:
                slot.pid = child.fork(lambda: self._worker(spec), keep)
            except OSError as error:  # no memory, or no more processes allowed
                ours.close()
                self._replace(slot, f"can't be forked: {error.strerror}")
                return
        slot.control = Control(self._loop, ours, lambda words: self._heard(slot, words))
        slot.state = SlotState.STARTING

    def _heard(self, slot: Slot, words: str) -> None:
        if words == "ready\n":
            if slot.state is SlotState.STARTING:
                slot.state = SlotState.READY
            if slot.generation > 1:
                log.info("worker %d is ready again, pid %d", slot.number, slot.pid)
            if all(each.state is SlotState.READY for each in self._slots):
                self._settle_start(None)
        elif words.startswith("failed: "):
            slot.last_words = words.removeprefix("failed: ").strip()

    def _tell_workers(self, word: str) -> None:
        for slot in self._slots:
            slot.say(word)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, code = ended[0], os.waitstatus_to_exitcode(ended[1])
                slot = next((each for each in self._slots if each.pid == pid), None)
                if slot is not None:
                    self._worker_ended(slot, code)
                elif self._command is not None and self._command.reaped(pid, code):
                    log.info("%s %s: stopping", self._command, _ending_of(code))
                    self._stop.set()
                elif self._kernel.reaped(pid) and not self._ending:
                    log.error("the process that holds the kernel state %s", _ending_of(code))
                else:
                    self._upstreams.reaped(pid, _ending_of(code))

    def _worker_ended(self, slot: Slot, code: int) -> None:
        if slot.control is not None:
            slot.control.read()  # its last words
            slot.control.close()
            slot.control = None
        self._page.reset_gauges(slot.number)
        if self._clients is not None:
            self._clients.reset(slot.number)
        how = slot.last_words or _ending_of(code)
        if self._ending and code:
            log.error("worker %d (pid %d) %s", slot.number, slot.pid, how)
        slot.pid = 0
        self._replace(slot, how)

    def _replace(self, slot: Slot, how: str) -> None:
        """The slot has no process (any more)."""
        was, slot.state = slot.state, SlotState.DOWN
        if self._ending:
            self._note_if_gone()
            return
        if slot.generation == 1 and was is not SlotState.READY:
            why, semicolon, hint = how.rpartition("; ")
            if not semicolon:
                why, hint = how, "the lines above may say more; try tproxyd doctor"
            self._settle_start(KernelError(f"start worker {slot.number}", why, hint))
            return
        if time.monotonic() - slot.started_at >= SOUND_S:
            slot.pause = 0.0
        else:
            slot.pause = min(max(2 * slot.pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        soon = f"in {slot.pause:g} s" if slot.pause else "now"
        log.error("worker %d %s; the next one starts %s", slot.number, how, soon)
        self._restarts += 1
        slot.restart = self._loop.call_later(slot.pause, self._fork_worker, slot)

    def _settle_start(self, failure: KernelError | None) -> None:
        if not self._started.done():
            if failure is None:
                self._started.set_result(None)
            else:
                self._started.set_exception(failure)

    # Stop ---------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if self._command is not None and self._command.takes(number):
            return
        if self._stop.is_set():
            self._hurry.set()
            return
        log.info("stopping")
        self._stop.set()
        self._settle_start(None)

    async def _end(self) -> None:
        """Leave in order, however far the start came."""
        self._ending = True
        systemd.notify("STOPPING=1", "STATUS=Draining")
        for task in self._tasks:
            task.cancel()
        self._upstreams.close()
        failure = None
        if self._installed:
            try:
                await self._kernel.stop_intercepting()
            except KernelError as error:
                log.error("%s", error)
        await self._end_workers()
        if self._installed:
            try:
                await self._kernel.clean()
            except KernelError as error:
                failure = error
        self._kernel.close()
        if self._admin is not None:
            await self._admin.close()
        if failure is not None:
            raise failure
        if self._stop.is_set():
            log.info("stopped")

    async def _end_workers(self) -> None:
        for slot in self._slots:
            if slot.restart is not None:
                slot.restart.cancel()
            if slot.pid:
                slot.state = SlotState.DRAINING
                slot.say("drain")
        self._note_if_gone()
        patience = self._config.drain_timeout_s + GRACE_S
        await _first_of(patience, self._gone, self._hurry)
        if self._hurry.is_set():
            for slot in self._slots:
                slot.say("cut")  # end your connections now
            await _first_of(GRACE_S, self._gone)
        for slot in self._slots:
            if slot.pid:
                log.error("worker %d (pid %d) does not end: killed", slot.number, slot.pid)
                os.kill(slot.pid, signal.SIGKILL)
        await _first_of(GRACE_S, self._gone)  # only a process stuck in the kernel survives this

    def _note_if_gone(self) -> None:
        if not any(slot.pid for slot in self._slots):
            self._gone.set()

    # What the admin endpoint asks (admin.Provider) ----------------------------------------------

    async def unready(self) -> list[str]:
        if self._ending:
            return ["stopping"]
        reasons = [] if self._ready else ["starting"]
        reasons += [
            f"worker {slot.number} is {slot.state}"
            for slot in self._slots
            if slot.state is not SlotState.READY
        ]
        if why := (await self._kernel.check()).unready:
            reasons.append(why)
        return reasons

    async def status(self) -> status.Snapshot:
        reasons = await self.unready()
        now = time.monotonic()
        counted = counters.samples(self._page.layout.cells, self._page.sums())
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(age_ms() / 1000, 1),
            "ready": not reasons,
            "not_ready_because": reasons,
            "listeners": [
                status.listener_part(listener, self._families(i), self._upstreams.entries(i))
                for i, listener in enumerate(self._config.listeners)
            ],
            "workers": [
                {
                    "slot": slot.number,
                    "pid": slot.pid,
                    "state": slot.state,
                    "active": self._page.get(slot.number, ACTIVE),
                    "started": slot.started,
                }
                for slot in self._slots
            ],
            "connections": status.connections_part(counted),
            "counters": status.counters_part(counted),
            "kernel": status.kernel_part(self._kernel.verdict, self._kernel.heals, now),
        }

    def metrics(self) -> tuple[bytes, str]:
        ready = sum(slot.state is SlotState.READY for slot in self._slots)
        heals = self._kernel.heals.counts()
        upstreams = self._upstreams.counts()
        own = counters.Own(ready, self._restarts, self._kernel.drifts, upstreams, heals)
        return counters.exposition(self._page, own)


async def _feed_watchdog(interval: float) -> None:
    while True:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(interval)


async def _first_of(seconds: float, *events: asyncio.Event) -> None:
    """Until one of the events is set, or the time is up."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _ending_of(code: int) -> str:
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"was killed by {names.get(-code, f'signal {-code}')}"  # real-time ones have none
    return f"ended with exit status {code}"


def serve(
    config: Config, *, install: bool, guard: bool = False, command: Command | None = None
) -> None:
    """`tproxyd run` and `exec`: returns when stopped by a signal, or by the end of the command."""
    log_to_stderr()
    kernel = Reconciler(config)
    kernel.fork()
    # uvloop and the data plane, imported only now: its child imports the control plane meanwhile.
    from tproxyd.flow.listen import open_listeners
    from tproxyd.proc.worker import run

    Supervisor(
        config,
        kernel,
        install=install,
        guard=guard,
        worker=run,
        open_listeners=open_listeners,
        command=command,
    ).run()
