"""A generation: the workers that serve one configuration.

A slot is a place for one worker: its listening sockets and its row of counters. They outlive each
worker on it, because closing a listening socket loses what waits in its accept queue: the next
worker serves that, and goes on counting where the last one stopped.

A worker that dies is replaced at once, or, where it lived less than a second, after a pause of
0.1 s that doubles up to 1 s. Only at the start is a failing worker the end: what never worked is
better an error than a loop.

A reload begins a new generation beside this one, on the same sockets; then this one retires: its
workers take no more connections, and end when those they have are done. Nobody replaces them then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from tproxyd import child
from tproxyd.child import ending_of
from tproxyd.config import Config, PerClient
from tproxyd.errors import KernelError
from tproxyd.flow.tally import ACTIVE, Layout
from tproxyd.proc import counters
from tproxyd.proc.accesslog import AccessLog
from tproxyd.proc.clients import ClientTables
from tproxyd.proc.control import Control
from tproxyd.proc.sockets import Listeners
from tproxyd.proc.upstreams import Upstreams

if TYPE_CHECKING:
    from tproxyd.proc.worker import WorkerSpec

log = logging.getLogger("tproxyd")

# A worker is ready within 0.1 s; one that is not after this long hangs.
START_TIMEOUT_S = 10.0
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
        self.births = 0
        self.pid = 0
        self.control: Control | None = None
        self.started_at = 0.0  # time.monotonic()
        self.started = ""  # the same, as people write it
        self.pause = 0.0  # before the last restart
        self.restart: asyncio.TimerHandle | None = None
        self.last_words = ""  # what the worker said about its own failure

    def say(self, word: str, fd: int | None = None) -> None:
        if self.control is not None:
            self.control.say(word, fd)

    def kill(self, why: str) -> None:
        """It is beyond hope. Its connections are lost; its queue is served by the next one."""
        if self.pid:  # else it is reaped, and the number may be a stranger's by now
            log.error("worker %d (pid %d) %s: killed", self.number, self.pid, why)
            os.kill(self.pid, signal.SIGKILL)


class Generation:
    """To be made and used in the supervisor's loop."""

    def __init__(
        self,
        number: int,
        config: Config,
        worker: Callable[[WorkerSpec], None],
        listeners: list[Listeners],
        access_log: AccessLog,
        files: int,
        heard: Callable[[int, str], bool],
        living: Iterable[Generation],
    ) -> None:
        """`listeners` of each slot; `access_log` is its own; `files` a process may have open.

        `heard` gets the pid and each word of a worker's first, and says whether it was for others.
        `living` are the generations that live at the time, the serving one first.
        """
        access_log.tell = self.tell
        self.access_log = access_log
        self.number, self.config = number, config
        self.slots = [Slot(i, each) for i, each in enumerate(listeners)]
        self.page = counters.Page(Layout(config), len(listeners))
        before = next(iter(living), None)
        known: Upstreams | None = None if before is None else before.upstreams
        self.upstreams: Upstreams = Upstreams(config, self.tell, known)
        self._waits = False
        self.restarts = 0
        self.leaving = False
        self.gone = asyncio.Event()  # leaving, and no worker is left
        self._worker, self._others_heard, self._living = worker, heard, living
        self.clients: ClientTables | None = None
        if any(each.per_client != PerClient() for each in config.listeners):
            self.clients = ClientTables(len(listeners), files // 2)
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()

    # Start --------------------------------------------------------------------------------------

    async def known(self, seconds: float, stop: asyncio.Event) -> None:
        """Until it is known where its upstreams are: who would serve clients has to know.

        Or until the time is up, or a stop comes.
        """
        await first_of(seconds, self.upstreams.known, stop)

    def fork(self, *, wait: bool = False) -> None:
        """Start its workers; where they are to `wait`, nobody is accepted before `serve`."""
        self._waits = wait
        for slot in self.slots:
            self._fork_worker(slot)

    def serve(self) -> None:
        self._waits = False
        self.tell("serve")

    async def started(self) -> None:
        """Until every worker is ready; KernelError when one fails."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._started
        except TimeoutError:
            why = f"it is not ready after {START_TIMEOUT_S:g} s"
            raise KernelError("start the workers", why, "try tproxyd doctor") from None

    def settle_start(self, failure: KernelError | None = None) -> None:
        """Whoever waits for the start has waited enough."""
        if not self._started.done():
            if failure is None:
                self._started.set_result(None)
            else:
                self._started.set_exception(failure)

    def _fork_worker(self, slot: Slot) -> None:
        from tproxyd.proc.worker import WorkerSpec  # see supervisor.serve

        slot.restart = None
        slot.births += 1
        slot.started_at = time.monotonic()  # before what may fail: the pauses count from here
        slot.started = datetime.now(UTC).isoformat(timespec="seconds")
        slot.last_words = ""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:  # no more files
            self._replace(slot, f"can't be forked: {error.strerror}")
            return
        spec = WorkerSpec(
            config=self.config,
            slot=slot.number,
            listeners=slot.listeners,
            page=self.page,
            control=theirs,
            access_log=self.access_log.fd,
            upstreams=self.upstreams.picture,
            clients=self.clients,
            waits=self._waits,
            elders=tuple((each.page, each.clients) for each in self._living if each is not self),
        )
        keep = [theirs.fileno(), *(sock.fileno() for _, sock in slot.listeners)]
        if self.access_log.fd is not None:
            keep.append(self.access_log.fd)
        with theirs:
            try:
                slot.pid = child.fork(lambda: self._worker(spec), keep)
            except OSError as error:  # no memory, or no more processes allowed
                ours.close()
                self._replace(slot, f"can't be forked: {error.strerror}")
                return
        pid = slot.pid
        slot.control = Control(self._loop, ours, lambda words: self._heard(slot, pid, words))
        slot.state = SlotState.STARTING

    def _heard(self, slot: Slot, pid: int, words: str) -> None:
        """Never raises: a worker reads what strangers send, and may not be ours any more."""
        try:
            self._understand(slot, pid, words)
        except Exception:
            log.exception("worker %d (pid %d) makes no sense: %.40r", slot.number, pid, words)
            if slot.control is not None:
                slot.control.close()
            slot.kill("is not to be trusted")

    def _understand(self, slot: Slot, pid: int, words: str) -> None:
        if self._others_heard(pid, words):
            return
        if words == "ready\n":
            if slot.state is SlotState.STARTING:
                slot.state = SlotState.READY
            if slot.births > 1:
                log.info("worker %d is ready again, pid %d", slot.number, pid)
            if all(each.state is SlotState.READY for each in self.slots):
                self.settle_start()
        elif words.startswith("failed: "):
            slot.last_words = words.removeprefix("failed: ").strip()

    def tell(self, word: str, fd: int | None = None) -> None:
        for slot in self.slots:
            slot.say(word, fd)

    # Workers that end ---------------------------------------------------------------------------

    def reaped(self, pid: int, code: int) -> bool:
        """Whether the process that just ended was one of ours."""
        slot = next((each for each in self.slots if each.pid == pid), None)
        if slot is None:
            return self.upstreams.reaped(pid, ending_of(code))
        slot.pid = 0
        if slot.control is not None:
            slot.control.read()  # its last words
            slot.control.close()
            slot.control = None
        self.page.reset_gauges(slot.number)
        if self.clients is not None:
            self.clients.reset(slot.number)
        how = slot.last_words or ending_of(code)
        if self.leaving and code:
            log.error("worker %d (pid %d) %s", slot.number, pid, how)
        self._replace(slot, how)
        return True

    def _replace(self, slot: Slot, how: str) -> None:
        """The slot has no process (any more)."""
        was, slot.state = slot.state, SlotState.DOWN
        if self.leaving:
            self._note_if_gone()
            return
        if slot.births == 1 and was is not SlotState.READY:
            why, semicolon, hint = how.rpartition("; ")
            if not semicolon:
                why, hint = how, "the lines above may say more; try tproxyd doctor"
            self.settle_start(KernelError(f"start worker {slot.number}", why, hint))
            return
        if time.monotonic() - slot.started_at >= SOUND_S:
            slot.pause = 0.0
        else:
            slot.pause = min(max(2 * slot.pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        soon = f"in {slot.pause:g} s" if slot.pause else "now"
        log.error("worker %d %s; the next one starts %s", slot.number, how, soon)
        self.restarts += 1
        slot.restart = self._loop.call_later(slot.pause, self._fork_worker, slot)

    # End ----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """A stop: what waits in the queues is served, whoever comes later is refused."""
        self._leave(lambda _: "drain")

    def retire(self, keep: Collection[socket.socket], seconds: float, why: str) -> None:
        """Others serve the listening sockets in `keep` from here on; what else it has are its own.

        `why` is what the log says of connections that are cut after so many seconds.
        """

        def word(slot: Slot) -> str:
            gone = [str(i) for i, (_, sock) in enumerate(slot.listeners) if sock not in keep]
            return " ".join(("retire", f"{seconds:g}", why, *gone))

        self._leave(word)

    def _leave(self, word: Callable[[Slot], str]) -> None:
        self.leaving = True
        self.upstreams.close()
        self.settle_start()
        for slot in self.slots:
            if slot.restart is not None:
                slot.restart.cancel()
            if slot.pid:
                slot.state = SlotState.DRAINING
                slot.say(word(slot))
        self._note_if_gone()

    async def end(self, seconds: float, hurry: asyncio.Event) -> None:
        """Leaving: until all are gone, which takes so long at most; less once there is hurry."""
        await first_of(seconds + GRACE_S, self.gone, hurry)
        if hurry.is_set():
            self.tell("cut")  # end your connections now
            await first_of(GRACE_S, self.gone)
        for slot in self.slots:
            slot.kill("does not end")
        await first_of(GRACE_S, self.gone)  # only a process stuck in the kernel survives this
        self.access_log.close()

    def _note_if_gone(self) -> None:
        if not any(slot.pid for slot in self.slots):
            self.gone.set()

    # What it says of itself ---------------------------------------------------------------------

    def unready(self) -> Iterator[str]:
        for slot in self.slots:
            if slot.state is not SlotState.READY:
                yield f"worker {slot.number} is {slot.state}"

    def ready(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.state is SlotState.READY]

    def families(self, index: int) -> list[str]:
        """Of one listener."""
        listeners = self.slots[0].listeners
        found = dict.fromkeys(sock.family for i, sock in listeners if i == index)
        return ["IPv6" if family == socket.AF_INET6 else "IPv4" for family in found]

    def active(self, slot: Slot) -> int:
        """The connections that it has open."""
        return self.page.get(slot.number, ACTIVE)


async def first_of(seconds: float, *events: asyncio.Event) -> None:
    """Until one of the events is set, or the time is up."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
