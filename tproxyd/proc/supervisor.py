"""The supervisor: owns the listening sockets, forks the workers, obeys signals. No traffic here.

The order of a start is such that no client is ever refused or missed: the listening sockets listen,
the workers accept, then the kernel state intercepts (with --install), then READY=1. A stop is the
same backwards: intercept no more (what is new goes straight to the application), drain the workers,
remove the kernel state, leave.

A reload (SIGHUP, `tproxyd reload`) begins with the new configuration as a whole. Where anything of
it can't be had, its reason is told and the old one goes on; nobody has noticed. Else new workers
accept on the same listening sockets, the kernel state moves, and the old workers retire. An upgrade
(SIGUSR2, `tproxyd upgrade`) is the same with a new process: upgrade.py. Both in a row, never at
once: each begins where the one before has ended.

A stop under systemd with a file descriptor store (--keep-sockets) may be a restart. The sockets are
in systemd's keeping, so workers retire by themselves and the supervisor leaves at once: the next
one serves what waits in the queues, or systemd closes them.

Child deaths come as SIGCHLD to one reaper, which waits for every child of this process, known or
not: as PID 1 of a container it also inherits orphans.

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
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from tproxyd import __version__
from tproxyd.child import ending_of
from tproxyd.config import Config
from tproxyd.errors import KernelError, TproxydError
from tproxyd.linux import CAP_NET_ADMIN, lay_down
from tproxyd.proc import change, connections, counters, pages, status, systemd, upgrade
from tproxyd.proc.accesslog import FOLLOW_EVERY_S, AccessLog, Losses
from tproxyd.proc.answers import Answers, Standing
from tproxyd.proc.background import told
from tproxyd.proc.change import Changes
from tproxyd.proc.commands import Handler
from tproxyd.proc.connections import Connections
from tproxyd.proc.endpoints import Endpoints
from tproxyd.proc.generation import Generation
from tproxyd.proc.reconciler import Reconciler
from tproxyd.proc.roster import Roster
from tproxyd.proc.sockets import Listening, Sockets
from tproxyd.proc.startup import age_ms, hear_signals, log_to_stderr, raise_file_limit
from tproxyd.proc.upstreams import FIRST_S
from tproxyd.proc.watchdog import Watchdog

if TYPE_CHECKING:
    from tproxyd.proc.run_command import Command
    from tproxyd.proc.worker import WorkerSpec

log = logging.getLogger("tproxyd")

_STOP = (signal.SIGTERM, signal.SIGINT)
# Between two looks at the kernel state when nobody asks for it.
CHECK_EVERY_S = 5.0


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
        listening: Listening,
        reread: Callable[[], Config] | None = None,
        origin: Callable[[], str] = lambda: "its configuration",
        command: Command | None = None,
        keep_sockets: bool = False,
        inheritance: upgrade.Inheritance | None = None,
    ) -> None:
        """`reread` gives the configuration as it is now, for a reload; `origin` says from where."""
        self._config, self._install, self._guard, self._kernel = config, install, guard, kernel
        self._command, self._keep_sockets = command, keep_sockets
        self._reread, self._origin = reread, origin
        self._worker = worker
        self._inheritance = inheritance or upgrade.Inheritance()
        self._lent = list(self._inheritance.listeners)
        self._on_trial = self._inheritance.predecessor is not None  # which goes on if we fail
        self._sockets = Sockets(listening, self._inheritance.listeners, store=keep_sockets)
        self._born = 0
        self._totals = counters.Totals()
        self._losses = Losses()
        self._stop = asyncio.Event()  # the first SIGTERM or SIGINT
        self._hurry = asyncio.Event()  # the second
        self._roster = Roster(self._totals, self._hurry)
        self._watchdog = Watchdog(lambda: self._roster.now.ready())
        self._live = Connections(
            lambda: [(s.pid, s.say) for g in self._roster for s in g.slots if s.pid]
        )
        self._answers = Answers(self._standing, kernel, self._totals, self._live)
        self._endpoints: Endpoints | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._logs: asyncio.Task[None] | None = None
        self._changes = Changes(self._stop, reload=self.reload, upgrade=self.upgrade)
        self._reload: status.ReloadPart = {"done": 0, "failed": 0, "last": "", "error": ""}
        self._successor: upgrade.Successor | None = None
        self._handed_over = self._to_take_back = False
        self._ready = False
        self._installed = False
        self._ending = False

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        signals = _STOP if self._command is None else self._command.signals
        for number in signals:
            self._loop.add_signal_handler(number, self._on_signal, number)
        if self._command is None:
            self._loop.add_signal_handler(signal.SIGHUP, self._changes.begin, "reload")
            self._loop.add_signal_handler(signal.SIGUSR2, self._changes.begin, "upgrade")
            # Those of `exec` are CMD's; a file that moves is noticed by itself, too.
            self._loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)
        hear_signals()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._reap()  # the reconciler may have ended before there was a handler
        try:
            async with self._changes.turn:
                await self._start()
            await self._stop.wait()
        except BaseException as error:
            if isinstance(error, Exception):
                self._inheritance.failed(error)
            raise
        finally:
            try:
                await self._end()
            finally:
                self._hear_no_signals(signals)

    def _hear_no_signals(self, signals: Iterable[int]) -> None:
        """One that came while the loop closes would be written to a closed wake-up socket."""
        ours = (*signals, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        for number in (*ours, signal.SIGCHLD):
            self._loop.remove_signal_handler(number)
        for number in ours:
            signal.signal(number, signal.SIG_IGN)

    # Start --------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._files = raise_file_limit()
        if (self._install or self._guard) and self._inheritance.predecessor is None:
            await self._kernel.claim()
        generation = self._roster.serving = self._beget(self._config)
        if not self._on_trial:
            self._sockets.commit()
        self._spawn(self._answers.history.run())
        endpoints = self._endpoints = self._open_endpoints(self._config, self._inheritance.admin)
        if self._inheritance.admin is not None:
            self._inheritance.admin.close()
        if self._inheritance.predecessor is None:
            await endpoints.serve()
        await generation.known(FIRST_S, self._stop)
        if self._stop.is_set():
            return
        generation.fork(wait=self._on_trial)
        workers = f"{len(generation.slots)} worker{'s' if len(generation.slots) > 1 else ''}"
        log.info("version %s, pid %d, %s", __version__, os.getpid(), workers)
        self._describe(generation)
        await generation.started()
        if self._stop.is_set():
            return
        if self._on_trial:
            self._on_trial = await self._inheritance.take_over()
            if self._stop.is_set():
                return
            self._sockets.commit()
            generation.serve()
        await endpoints.serve()
        self._installed = self._install  # from here on there may be something to remove
        try:
            await self._keep_kernel()
        except KernelError as error:  # what stood before and stands yet is not ours to remove
            self._installed = self._install and error.wrote
            raise
        self._ready = True
        await self._inheritance.settle()
        self._on_trial = False
        self._sockets.settle()
        systemd.notify("READY=1", "STATUS=Serving")
        log.info("ready in %d ms", age_ms())
        self._spawn(self._watch_kernel())
        self._logs = told(self._loop.create_task(self._watch_logs()))
        self._spawn(self._watchdog.run())
        if self._command is not None:
            for _ in range(3):  # a signal that came before is heard first: wake-up, reader, handler
                await asyncio.sleep(0)
            if not self._stop.is_set():
                self._command.start()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """Until the end comes, or its own."""
        self._tasks.append(told(self._loop.create_task(work)))

    def _beget(self, config: Config) -> Generation:
        """A generation for this configuration, with its sockets; no worker yet. KernelError."""
        self._born += 1
        access_log = AccessLog(config.log.access)
        try:
            slots = config.workers or len(os.sched_getaffinity(0))
            listeners = self._sockets.assign(config, slots)
            generation = Generation(
                self._born,
                config,
                self._worker,
                listeners,
                access_log,
                self._files,
                heard=self._heard,
                living=self._roster,
            )
        except BaseException:
            access_log.close()
            raise
        self._totals.add(generation.page)
        generation.upstreams.start()
        return generation

    def _heard(self, pid: int, words: str) -> bool:
        """Whether this word of a worker's was not for its generation."""
        if words.startswith(connections.WORD):
            self._live.heard(pid, words)
            return True
        return self._watchdog.heard(pid, words)

    def _open_endpoints(self, config: Config, before: socket.socket | None) -> Endpoints:
        commands: dict[str, Handler] = {
            "reload": change.of_its_file(self._changes.handler("reload"), self._origin),
            "upgrade": self._changes.handler("upgrade"),
            "kill": self._live.on_kill,
            "get": partial(pages.get, self._answers),
        }
        return Endpoints(config, self._answers, commands, before)

    def _describe(self, generation: Generation) -> None:
        config = generation.config
        for i, listener in enumerate(config.listeners):
            families = generation.families(i)
            log.info("%s", status.introduce(listener, families))
            if "IPv6" not in families and listener.bind in ("", "*"):
                log.warning("%s: this machine has no IPv6: IPv4 only", listener.name)
        if config.admin is not None:
            log.info("admin endpoint: http://%s/", config.admin)

    async def _keep_kernel(self) -> None:
        """Make, or keep, the kernel state, where that is for us to do."""
        if self._install:
            report = await self._kernel.install()
            for note in report.notes:
                log.info("%s", note)
            if report.replaced:
                log.warning("rules of another configuration stood here, and were replaced")
        elif self._guard:
            await self._kernel.guard()

    async def _watch_kernel(self) -> None:
        while True:
            if self._to_take_back:
                async with self._changes.turn:  # not in the middle of another upgrade
                    await self._take_back()
            await self._kernel.check()
            await asyncio.sleep(CHECK_EVERY_S)

    async def _watch_logs(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            for generation in self._roster:
                generation.access_log.follow()
            self._losses.look(self._totals.samples())
            for handler in logging.getLogger().handlers:
                handler.flush()  # what the reader of our own log had not taken

    def _reopen_logs(self) -> None:
        for generation in self._roster:
            generation.access_log.reopen()

    # Changes ------------------------------------------------------------------------------------

    async def reload(self) -> str:
        """Serve by the configuration as it is now; a sentence that says so.

        ConfigError or KernelError when it can't be: then the old one goes on.
        """
        self._reload["last"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            said = await change.no_os_error("reload", self._reloaded)
        except TproxydError as error:
            self._reload["failed"] += 1
            self._reload["error"] = str(error)
            log.error("reload: %s", error)
            log.error("the configuration of before goes on")
            raise
        self._reload["done"] += 1
        self._reload["error"] = ""
        log.info("%s", said)
        return said

    async def _reloaded(self) -> str:
        if self._reread is None:
            raise KernelError("reload", "this process has no configuration to read", "restart it")
        began, old = time.monotonic(), self._roster.now
        config = self._reread()
        change.check(old.config, config)
        before = self._sockets.all()
        new: Generation | None = None
        endpoints: Endpoints | None = None
        try:
            if config.admin != old.config.admin:
                assert self._endpoints is not None, "changes wait for the start"
                endpoints = self._open_endpoints(config, self._endpoints.socket)
            new = self._roster.coming = self._beget(config)
            await new.known(FIRST_S, self._stop)
            new.fork(wait=True)
            await new.started()
            self._sockets.commit()
            new.serve()
            for note in (await self._kernel.move(config)).notes:
                log.info("%s", note)
        except BaseException:
            self._roster.coming = None
            if new is not None:
                self._roster.retire(new, before, "reload")
            self._go_back()
            if endpoints is not None:
                await endpoints.finish()
            raise
        self._roster.serving, self._roster.coming = new, None
        self._sockets.settle()
        self._roster.retire(old, self._sockets.all(), "reload")
        if endpoints is not None:
            await self._move_to(endpoints)
        self._describe(new)
        took_ms = (time.monotonic() - began) * 1000
        return f"reloaded in {took_ms:.0f} ms from {self._origin()}"

    def _go_back(self) -> None:
        try:
            self._sockets.go_back()
        except KernelError as error:
            log.error("%s", error)

    async def _move_to(self, endpoints: Endpoints) -> None:
        old, self._endpoints = self._endpoints, endpoints
        await endpoints.serve()
        if old is not None:
            await old.close()
            if old.socket is not None:
                old.socket.close()

    async def upgrade(self) -> str:
        """Hand everything over to a new process; a sentence that says so.

        KernelError when that fails: then this process goes on.
        """
        try:
            said = await change.no_os_error("upgrade", self._upgraded)
        except KernelError as error:
            log.error("%s", error)
            raise
        log.info("%s", said)
        return said

    async def _upgraded(self) -> str:
        if self._command is not None or os.getpid() == 1:
            who = "tproxyd exec" if self._command is not None else "the container's first process"
            why = f"{who} can't be replaced while it runs"
            raise KernelError("upgrade", why, "start a new container")
        files = [(upgrade.LISTENER, sock) for sock in self._sockets.all()]
        assert self._endpoints is not None, "changes wait for the start"
        if self._endpoints.socket is not None:
            files.append((upgrade.ADMIN, self._endpoints.socket))
        successor = self._successor = upgrade.Successor(files)
        log.info("upgrade: the new process is %d", successor.pid)
        try:
            async with asyncio.timeout(upgrade.UPGRADE_TIMEOUT_S):
                await successor.is_ready()
                await self._endpoints.close()
                await self._kernel.release()
                await successor.takes_over()
        except BaseException as error:
            successor.dismiss()
            self._spawn(successor.is_gone())
            await self._take_back()
            if isinstance(error, TimeoutError):
                why = f"the new process is not done after {upgrade.UPGRADE_TIMEOUT_S:g} s"
                raise KernelError("upgrade", why, "the old process goes on") from None
            raise
        successor.close()
        self._handed_over = True
        systemd.notify(f"MAINPID={successor.pid}")
        self._stop.set()
        return f"process {successor.pid} serves from here on"

    async def _take_back(self) -> None:
        """What was let go for a successor that came to nothing; again later, where that fails."""
        assert self._endpoints is not None
        self._to_take_back = False
        for again in (self._keep_kernel, self._endpoints.serve):
            try:
                await again()
            except (KernelError, OSError) as error:
                log.error("%s", error)
                self._to_take_back = True

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                try:
                    self._reaped(ended[0], os.waitstatus_to_exitcode(ended[1]))
                except Exception:  # those behind it have ended as well
                    log.exception("the end of process %d is not seen to: this is a bug", ended[0])

    def _reaped(self, pid: int, code: int) -> None:
        self._live.gone(pid)
        if self._roster.reaped(pid, code):
            return
        if self._command is not None and self._command.reaped(pid, code):
            log.info("%s %s: stopping", self._command, ending_of(code))
            self._stop.set()
        elif self._successor is not None and self._successor.parent == pid:
            self._successor.ending = ending_of(code)
            self._successor.gone.set()
        elif self._kernel.reaped(pid) and not self._ending:
            log.error("the process that holds the kernel state %s", ending_of(code))

    # Stop ---------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if self._command is not None and self._command.takes(number):
            return
        if self._stop.is_set():
            self._hurry.set()
            return
        log.info("stopping")
        self._stop.set()
        if self._roster.serving is not None:
            self._roster.serving.settle_start()

    async def _end(self) -> None:
        """Leave in order, however far the start came."""
        self._ending = True
        await self._changes.end()
        for task in self._tasks:
            task.cancel()
        others = self._handed_over or self._on_trial  # kernel state, sockets and unit are another's
        installed = self._installed and not others
        if not others:
            systemd.notify("STOPPING=1", "STATUS=Draining")
        failure = None
        if installed:
            try:
                await self._kernel.stop_intercepting()
            except KernelError as error:
                log.error("%s", error)
        await self._end_workers()
        if self._logs is not None:
            self._logs.cancel()
        if self._roster.serving is not None:
            self._losses.end(self._totals.samples())
        if installed:
            try:
                await self._kernel.clean()
            except KernelError as error:
                failure = error
        self._kernel.close()
        if self._endpoints is not None:
            await self._endpoints.finish()
        if failure is not None:
            raise failure
        if self._stop.is_set():
            log.info("stopped")

    async def _end_workers(self) -> None:
        generation, keep = self._roster.serving, self._sockets.all()
        if generation is None:
            return
        if self._handed_over:
            self._roster.retire(generation, keep, "upgrade")
            # We must not hold, while we drain, what is the new one's: when that ends or lets go of
            # it, it has to be free, and whoever connects must not wait in a queue of nobody's.
            self._sockets.close()
            if self._endpoints is not None and self._endpoints.socket is not None:
                self._endpoints.socket.close()
        elif self._on_trial:
            self._roster.retire(generation, self._lent, "upgrade")
            return  # who goes on takes back now what we had taken over
        elif self._keep_sockets:
            self._roster.retire(generation, keep, "stop")
            return  # who is the next to serve should not have to wait for them
        else:
            self._say_what_is_open(generation.config.drain_timeout_s)
            self._roster.drain()
        await self._roster.gone()

    def _say_what_is_open(self, seconds: float) -> None:
        count = sum(each.active(slot) for each in self._roster for slot in each.slots)
        if count and not self._hurry.is_set():
            connections = "1 connection is" if count == 1 else f"{count} connections are"
            text = "%s open: waiting %g s at most; a second signal cuts that short"
            log.info(text, connections, seconds)

    def _standing(self) -> Standing:
        phase = "stopping" if self._ending else "ready" if self._ready else "starting"
        return Standing(phase, [*self._roster], self._roster.restarts, self._reload)


def serve(
    config: Config,
    *,
    install: bool,
    guard: bool = False,
    reread: Callable[[], Config],
    origin: Callable[[], str],
    command: Command | None = None,
    keep_sockets: bool = False,
) -> None:
    """`tproxyd run` and `exec`: returns when stopped by a signal, or by the end of the command."""
    log_to_stderr(config.log.daemon_format)
    if keep_sockets and not os.environ.get("NOTIFY_SOCKET"):
        why = "NOTIFY_SOCKET is not set, so there is no systemd to leave them with"
        hint = "leave --keep-sockets away, or start the unit"
        raise KernelError("keep the listening sockets", why, hint)
    inheritance = upgrade.Inheritance()
    kernel = Reconciler(config)
    lay_down(CAP_NET_ADMIN)  # the child that needs it takes it up
    kernel.fork(prepare=install and inheritance.predecessor is None)
    # uvloop and the data plane, imported only now: its child imports the control plane meanwhile.
    from tproxyd.flow import listen
    from tproxyd.proc.worker import run

    Supervisor(
        config,
        kernel,
        install=install,
        guard=guard,
        worker=run,
        listening=listen,
        reread=reread,
        origin=origin,
        command=command,
        keep_sockets=keep_sockets,
        inheritance=inheritance,
    ).run()
