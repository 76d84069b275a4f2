"""What is done to the daemon while it serves, and what that excuses.

Each fault is a window of time. A connection that lived through the death of a worker may have been
lost with it; one that was made while the rules were flushed may have passed by the proxy; nothing
excuses a wrong byte, a client that was refused, or a connection that got stuck.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lib.daemon import Daemon, tproxyd
from lib.waits import wait_for

from soak.load import PATIENCE_S

Failure = dict[str, Any]  # as app.py and load.py tell it: began, at, what, detail

# Everything that a fault may lose is told within this time: a reader that stalls for 4 s notices
# its loss when it reads again.
AFTERMATH_S = 10.0
# Within which what a fault broke must be whole again: a worker replaced, rules healed, …
MENDED_S = 15.0

WORKER_KILLED = "worker killed"


class Excuse(Enum):
    """What a fault excuses: of which connections, and what may become of them."""

    NOTHING = "nothing"
    DEATH = "a connection that lived through it is lost"
    BYPASS = "one that began meanwhile has passed by the proxy; the application then ends it"


@dataclass
class Window:
    """One fault: from `began`, mended at `mended`; `cost` is how many connections it may lose."""

    name: str
    excuse: Excuse
    began: float
    mended: float
    cost: float = float("inf")
    lost: int = 0

    def covers(self, failure: Failure) -> bool:
        began, at, what = failure["began"], failure["at"], failure["what"]
        # Who has passed by with words that are no hello is waited for by both ends, in patience.
        last = self.mended + AFTERMATH_S + (PATIENCE_S if self.excuse is Excuse.BYPASS else 0)
        if at < self.began or at > last:
            return False
        match self.excuse:
            case Excuse.NOTHING:
                return False
            case Excuse.DEATH:
                return bool(what == "lost" and began <= self.mended)
            case Excuse.BYPASS:
                meanwhile = self.began - 0.1 <= began <= self.mended
                return meanwhile and what in ("bypassed", "lost", "stuck")


@dataclass
class Fault:
    """`do` returns when it is mended, and says how many connections it may have cost."""

    name: str
    every_s: float
    excuse: Excuse
    do: Callable[[Daemon, random.Random], float]


@dataclass
class Faults:
    """They come at random, each about as often as it says."""

    daemon: Daemon
    random: random.Random
    faults: list[Fault]
    windows: list[Window] = field(default_factory=list)
    due: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        now = time.monotonic()
        for fault in self.faults:
            self.due[fault.name] = now + self._pause(fault)

    def step(self) -> None:
        """Do what is due, one at a time; AssertionError when it does not mend."""
        for fault in self.faults:
            if time.monotonic() >= self.due[fault.name]:
                began = time.monotonic()
                cost = fault.do(self.daemon, self.random)
                self.windows.append(Window(fault.name, fault.excuse, began, time.monotonic(), cost))
                self.due[fault.name] = time.monotonic() + self._pause(fault)

    def _pause(self, fault: Fault) -> float:
        return fault.every_s * self.random.uniform(0.5, 1.5)

    def unexcused(self, failures: Iterable[Failure]) -> list[Failure]:
        """Those that no window covers, or that are more than its fault could cost.

        A connection that a worker takes with it is told by both of its ends, so twice its cost.
        """
        left = []
        for failure in failures:
            for window in self.windows:
                if window.covers(failure) and window.lost < 2 * window.cost:
                    window.lost += 1
                    break
            else:
                left.append(failure)
        return left


def kill_worker(daemon: Daemon, rng: random.Random) -> float:
    worker = rng.choice(daemon.status()["workers"])
    pid = int(worker["pid"])
    os.kill(pid, signal.SIGKILL)
    _whole(daemon, lambda status: pid not in _ready(status))
    # Those that it had, and those that it took between the look and the kill.
    return float(worker["active"]) + 50


def reload(daemon: Daemon, rng: random.Random) -> float:
    """SIGHUP: the same configuration, on new workers."""
    before = daemon.status()
    old = {worker["pid"] for worker in before["workers"]}
    os.kill(before["pid"], signal.SIGHUP)
    _whole(daemon, lambda status: not old & _ready(status))
    return 0.0


def upgrade(daemon: Daemon, rng: random.Random) -> float:
    old = daemon.status()["pid"]
    done = tproxyd(daemon.namespace, "upgrade", "-c", str(daemon.scratch / "tproxyd.toml"))
    assert done.returncode == 0, f"tproxyd upgrade: exit {done.returncode}: {done.stderr}"
    _whole(daemon, lambda status: status["pid"] != old)
    return 0.0


def flush(daemon: Daemon, rng: random.Random) -> float:
    daemon.namespace.run("nft", "flush", "ruleset")
    wait_for(
        lambda: "table inet tproxyd" in daemon.namespace.run("nft", "list", "tables"),
        "the rules to be healed",
        MENDED_S,
    )
    _whole(daemon)
    return float("inf")


def _ready(status: dict[str, Any]) -> set[int]:
    return {worker["pid"] for worker in status["workers"] if worker["state"] == "ready"}


def _whole(daemon: Daemon, also: Callable[[dict[str, Any]], bool] = lambda status: True) -> None:
    def look() -> bool:
        status = daemon.status()
        return bool(status["ready"]) and also(status)

    wait_for(look, "the daemon to be whole again", MENDED_S)


def available(daemon: Daemon) -> list[Fault]:
    """Those that this version has an answer to; to the others it would just be ended."""
    faults = [Fault(WORKER_KILLED, 45, Excuse.DEATH, kill_worker)]
    for verb, do in (("reload", reload), ("upgrade", upgrade)):
        if tproxyd(daemon.namespace, verb, "--help").returncode == 0:
            every = 30 if verb == "reload" else 120
            faults.append(Fault(verb, every, Excuse.NOTHING, do))
    heals = tproxyd(daemon.namespace, "check", config='[rules]\non_crash = "closed"\n')
    if heals.returncode == 0:
        faults.append(Fault("rules flushed", 60, Excuse.BYPASS, flush))
    return faults
