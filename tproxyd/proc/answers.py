"""What a running daemon says of itself, at its admin endpoint and its command socket.

It reads what the supervisor and its parts hold, and changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from tproxyd import __version__
from tproxyd.proc import counters, status
from tproxyd.proc.connections import Connections
from tproxyd.proc.generation import Generation
from tproxyd.proc.history import History, HistoryPart
from tproxyd.proc.reconciler import Reconciler
from tproxyd.proc.rows import Listing, Sort
from tproxyd.proc.startup import age_ms


class Standing(NamedTuple):
    """Where the supervisor is in its life."""

    phase: str  # "starting", "ready", "stopping"
    generations: list[Generation]  # the one that serves, then those that retire
    restarts: int  # of workers, since the start
    reload: status.ReloadPart


class Answers:
    """pages.Provider."""

    def __init__(
        self,
        standing: Callable[[], Standing],
        kernel: Reconciler,
        totals: counters.Totals,
        live: Connections,
    ) -> None:
        self._standing, self._kernel, self._totals, self._live = standing, kernel, totals, live
        self.history = History(totals.samples)

    async def unready(self) -> list[str]:
        now = self._standing()
        if now.phase == "stopping":
            return ["stopping"]
        reasons = [] if now.phase == "ready" else ["starting"]
        reasons += now.generations[0].unready()
        if why := (await self._kernel.check()).unready:
            reasons.append(why)
        return reasons

    async def status(self) -> status.Snapshot:
        reasons = await self.unready()
        counted, standing = self._totals.samples(), self._standing()
        serving = standing.generations[0]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(age_ms() / 1000, 1),
            "ready": not reasons,
            "not_ready_because": reasons,
            "reload": standing.reload,
            "listeners": [
                status.listener_part(listener, serving.families(i), serving.upstreams.entries(i))
                for i, listener in enumerate(serving.config.listeners)
            ],
            "workers": [
                {
                    "slot": slot.number,
                    "generation": each.number,
                    "pid": slot.pid,
                    "state": slot.state,
                    "active": each.active(slot),
                    "started": slot.started,
                }
                for each in standing.generations
                for slot in each.slots
                if slot.pid or each is serving
            ],
            "connections": status.connections_part(counted),
            "rates": self.history.rates(),
            "counters": status.counters_part(counted),
            "kernel": status.kernel_part(
                self._kernel.verdict, self._kernel.heals, time.monotonic()
            ),
        }

    async def open_connections(self, sort: Sort, limit: int) -> Listing:
        return await self._live.listing(sort, limit)

    def past(self, after: int) -> HistoryPart:
        return self.history.part(after)

    def metrics(self) -> tuple[bytes, str]:
        standing = self._standing()
        serving = standing.generations[0]
        own = counters.Own(
            workers=len(serving.ready()),
            worker_restarts=standing.restarts,
            kernel_drift=self._kernel.drifts,
            upstreams=serving.upstreams.counts(),
            heals=self._kernel.heals.counts(),
            reloads=(standing.reload["done"], standing.reload["failed"]),
            reload_failed=bool(standing.reload["error"]),
        )
        return counters.exposition(self._totals, own)
