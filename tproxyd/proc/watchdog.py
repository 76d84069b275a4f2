"""Whether the workers really accept: a hung one is ended, and systemd hears only what is true.

WATCHDOG=1 that a timer sends says that the timer runs. Here it stands on two proofs, taken of every
serving worker each BEAT_S:

- It answers "ping" from its loop, and says how many connections it has taken so far. A process that
  is stopped, waits in the kernel or turns in a circle does not.
- Nobody waits in its accept queues without being taken. That is read from the listening sockets
  themselves, which are the supervisor's too, so a worker whose loop runs while nothing is accepted
  can't talk its way out. One that has paused for want of files says so: full is not dead.

A worker that fails either for SILENCE_S is killed: its connections are lost, its queue is served by
the next one on its slot. WATCHDOG=1 is sent while at least one worker
has given both proofs in the last PROOF_S. So one bad worker is replaced and the service lives on;
when none comes back, or this process itself hangs, systemd starts everything anew. It does that
with SIGABRT, upon which the log says where each thread of this process was (faulthandler).

If a beat itself comes late, it was we who slept: the whole service stopped, a machine suspended or
starved. Then nobody is blamed for a silence that nobody could break, and everyone starts afresh.
"""

from __future__ import annotations

import asyncio
import faulthandler
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tproxyd.linux import waiting_clients
from tproxyd.proc import systemd

# A look takes 20 µs and one datagram each way for a worker: nothing. Small against SILENCE_S, so
# that a worker has missed several before it is ended.
BEAT_S = 2.0
# A round of a worker's loop takes milliseconds, under the worst loads measured less than 0.1 s; a
# machine that swaps can stop a sound process for seconds. Clients wait for their SYN's first three
# repetitions (1, 3, 7 s) anyway.
SILENCE_S = 10.0
# Of two beats one may fall into a busy moment.
PROOF_S = 2.5 * BEAT_S
# A beat that is this late says that this process did not run.
LATE_S = 2.0

PING = "ping"
_PONG = "pong "


class Worker(Protocol):
    """A worker that serves, as the supervisor knows it."""

    @property
    def number(self) -> int: ...

    @property
    def pid(self) -> int: ...

    @property
    def listeners(self) -> Sequence[tuple[int, socket.socket]]: ...

    def say(self, word: str) -> None: ...

    def kill(self, why: str) -> None: ...


def answer(taken: int, accepting: bool) -> str:
    """What a worker says to PING: connections it has taken so far, and whether it takes more."""
    return f"{_PONG}{taken} {'accepting' if accepting else 'full'}"


@dataclass(slots=True)
class _Pulse:
    """What is known of one worker process. Times are those of the clock that Watchdog is given."""

    answered: float  # its last answer, or when we began to ask
    moved: float  # when nobody waited, it had taken somebody, or had no files to
    taken: int = -1  # as it said last; below 0: it has not said anything yet


class Watchdog:
    """`serving` names the workers to look at; who is beyond hope is killed."""

    def __init__(
        self,
        serving: Callable[[], Iterable[Worker]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving, self._clock = serving, clock
        self._pulses: dict[int, _Pulse] = {}  # by pid
        self._beaten = clock()
        self._fed = float("-inf")
        self._feed_every = systemd.watchdog_interval()

    async def run(self) -> None:
        if self._feed_every is not None:
            faulthandler.enable()
        pause = min(BEAT_S, self._feed_every or BEAT_S)
        while True:
            self.beat()
            await asyncio.sleep(pause)

    def beat(self) -> None:
        """Judge by what came since the last one, tell systemd, and ask anew."""
        now, workers = self._clock(), list(self._serving())
        if now - self._beaten > BEAT_S + LATE_S:
            self._pulses.clear()
        self._beaten = now
        self._pulses = {
            each.pid: self._pulses.get(each.pid) or _Pulse(now, now) for each in workers
        }
        for worker in workers:
            self._judge(worker, self._pulses[worker.pid], now)
            worker.say(PING)
        if self._feed_every is None or now - self._fed < self._feed_every:
            return
        if any(_accepts(each, now) for each in self._pulses.values()):
            self._fed = now
            systemd.notify("WATCHDOG=1")

    def heard(self, pid: int, words: str) -> bool:
        """Whether this word of a worker's was meant for us."""
        if not words.startswith(_PONG):
            return False
        if (pulse := self._pulses.get(pid)) is not None:
            taken, accepting = words.removeprefix(_PONG).split()
            pulse.answered = self._clock()
            if int(taken) != pulse.taken or accepting == "full":
                pulse.moved = pulse.answered
            pulse.taken = int(taken)
        return True

    def _judge(self, worker: Worker, pulse: _Pulse, now: float) -> None:
        clients = sum(waiting_clients(sock) for _, sock in worker.listeners)
        if not clients:
            pulse.moved = now
        if now - pulse.answered >= SILENCE_S:
            why = f"does not answer for {now - pulse.answered:.0f} s"
        elif now - pulse.moved >= SILENCE_S:
            why = f"takes none of {clients} waiting clients for {now - pulse.moved:.0f} s"
        else:
            return
        # A process that is stuck in the kernel outlives SIGKILL for a while: do not say it at
        # every beat.
        pulse.answered = pulse.moved = now
        pulse.taken = -1
        worker.kill(why)


def _accepts(pulse: _Pulse, now: float) -> bool:
    return pulse.taken >= 0 and now - min(pulse.answered, pulse.moved) <= PROOF_S
