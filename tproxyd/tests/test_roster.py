"""Which generations live, and what is counted of those that are gone."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tproxyd.proc.roster import Roster


class Generation:
    """Ends when it is told to."""

    def __init__(self, restarts: int, *pids: int, drain_timeout_s: float = 30.0) -> None:
        self.restarts, self.page, self._pids = restarts, object(), pids
        self.config = SimpleNamespace(drain_timeout_s=drain_timeout_s)
        self.may_end = asyncio.Event()
        self.told: tuple[object, ...] = ()

    def retire(self, keep: object, seconds: float, why: str) -> None:
        self.told = ("retire", keep, seconds, why)

    def drain(self) -> None:
        self.told = ("drain",)

    async def end(self, seconds: float, hurry: asyncio.Event) -> None:
        await self.may_end.wait()

    def reaped(self, pid: int, code: int) -> bool:
        return pid in self._pids


class Totals:
    def __init__(self) -> None:
        self.folded: list[object] = []

    def fold(self, page: object) -> None:
        self.folded.append(page)


def roster(serving: Any) -> tuple[Roster, Totals]:  # noqa: ANN401 - a stand-in
    totals: Any = Totals()
    made = Roster(totals, asyncio.Event())
    made.serving = serving
    return made, totals


def test_one_that_retires_lives_until_its_workers_are_gone() -> None:
    async def main() -> None:
        old, new = Generation(2, 11, drain_timeout_s=1), Generation(1, 22, drain_timeout_s=5)
        lives, totals = roster(old)
        lives.coming = new  # type: ignore[assignment]
        assert [*lives] == [old, new]
        lives.serving, lives.coming = new, None  # type: ignore[assignment]
        lives.retire(old, [], "reload")  # type: ignore[arg-type]
        assert old.told == ("retire", [], 5, "reload")  # as long as what serves now says
        assert [*lives] == [new, old]
        assert [lives.reaped(pid, 0) for pid in (11, 22, 33)] == [True, True, False]
        assert (lives.restarts, totals.folded) == (3, [])
        old.may_end.set()
        await lives.gone()
        assert [*lives] == [new]
        assert not lives.reaped(11, 0)
        assert (lives.restarts, totals.folded) == (3, [old.page])

    asyncio.run(main())


def test_restarts_are_counted_once_when_the_last_one_ends() -> None:
    async def main() -> None:
        last = Generation(4)
        lives, totals = roster(last)
        lives.drain()
        assert last.told == ("drain",)
        assert [*lives] == [last]
        last.may_end.set()
        await lives.gone()
        assert [*lives] == [last]  # what is asked about it until the very end
        assert (lives.restarts, totals.folded) == (4, [last.page])

    asyncio.run(main())
