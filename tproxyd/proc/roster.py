"""The generations that live: the one that serves, one that a reload brings, those that retire."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Iterator

from tproxyd.proc import counters
from tproxyd.proc.background import told
from tproxyd.proc.generation import Generation


class Roster:
    """To be made and used in the supervisor's loop."""

    def __init__(self, totals: counters.Totals, hurry: asyncio.Event) -> None:
        """`hurry`: set once connections are to be cut rather than waited for."""
        self.serving: Generation | None = None
        self.coming: Generation | None = None  # of a reload that is under way
        self._leaving: dict[Generation, asyncio.Task[None]] = {}
        self._totals, self._hurry = totals, hurry
        self._restarts = 0  # of workers of generations that are gone

    def __iter__(self) -> Iterator[Generation]:
        """The serving one first."""
        named = [each for each in (self.serving, self.coming) if each is not None]
        yield from [*named, *(each for each in self._leaving if each not in named)]

    @property
    def now(self) -> Generation:
        """The one that serves, for who comes after the start."""
        assert self.serving is not None, "there is one as soon as the start has its sockets"
        return self.serving

    @property
    def restarts(self) -> int:
        """Of workers, since the start."""
        return self._restarts + sum(each.restarts for each in self)

    def retire(self, generation: Generation, keep: Collection[socket.socket], why: str) -> None:
        """See Generation.retire; it has as long as what serves now says."""
        seconds = self.now.config.drain_timeout_s
        generation.retire(keep, seconds, why)
        self._see_off(generation, seconds)

    def drain(self) -> None:
        """A stop: nobody serves after the one that serves."""
        self.now.drain()
        self._see_off(self.now, self.now.config.drain_timeout_s)

    def _see_off(self, generation: Generation, seconds: float) -> None:
        self._leaving[generation] = told(asyncio.ensure_future(self._bury(generation, seconds)))

    async def _bury(self, generation: Generation, seconds: float) -> None:
        await generation.end(seconds, self._hurry)
        self._totals.fold(generation.page)
        self._restarts += generation.restarts
        generation.restarts = 0  # after a stop it is named on as the one that serves
        self._leaving.pop(generation, None)

    async def gone(self) -> None:
        """Until all that leave are gone."""
        await asyncio.gather(*self._leaving.values())

    def reaped(self, pid: int, code: int) -> bool:
        """Whether the process that just ended was one of theirs."""
        return any(each.reaped(pid, code) for each in self)
