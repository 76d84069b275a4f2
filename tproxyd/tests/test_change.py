"""Who asks for a change gets one that begins after the question, and no more than that is made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tproxyd.errors import KernelError
from tproxyd.proc.background import told
from tproxyd.proc.change import Changes


class World:
    """Changes that end when they are let, and say how many were made by then."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.gate = asyncio.Event()
        self.stop = asyncio.Event()
        self.failure: Exception | None = None
        self.changes = Changes(self.stop, reload=self.reload, upgrade=self.upgrade)

    async def reload(self) -> str:
        return await self._make("reload")

    async def upgrade(self) -> str:
        return await self._make("upgrade")

    async def _make(self, what: str) -> str:
        self.made.append(what)
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return f"{what} {len(self.made)}"

    async def begun(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.made) < count:  # noqa: ASYNC110
                await asyncio.sleep(0)

    def ask(self, what: str) -> Awaitable[dict[str, object]]:
        return asyncio.ensure_future(self.changes.handler(what)({"verb": what}))


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def scene() -> None:
        await test(World())

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_one_that_waits_is_for_all_who_ask_until_it_begins() -> None:
    async def test(world: World) -> None:
        first = world.ask("reload")
        await world.begun(1)
        for _ in range(12):
            world.changes.begin("reload")
        then = [world.ask("reload"), world.ask("reload")]
        other = world.ask("upgrade")
        await asyncio.sleep(0)
        world.gate.set()
        assert (await first)["said"] == "reload 1"
        assert [(await each)["said"] for each in then] == ["reload 2", "reload 2"]
        assert (await other)["said"] == "upgrade 3"
        assert (await world.ask("reload"))["said"] == "reload 4"

    run(test)


def test_a_failure_is_the_answer_to_all_who_asked(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.failure = KernelError("reload", "it is forbidden", "ask somebody")
        world.gate.set()
        for asked in [world.ask("reload"), world.ask("reload")]:
            with pytest.raises(KernelError, match="it is forbidden"):
                await asked
        assert world.made == ["reload"]

    run(test)
    assert caplog.records == []  # but what the change itself has to say


def test_none_begins_once_there_is_to_be_a_stop() -> None:
    async def test(world: World) -> None:
        world.changes.begin("reload")
        await world.begun(1)
        waiting = world.ask("upgrade")
        await asyncio.sleep(0)
        world.stop.set()
        world.gate.set()
        with pytest.raises(KernelError, match="can't upgrade: the daemon is stopping"):
            await waiting
        world.changes.begin("reload")
        await world.changes.end()
        with pytest.raises(KernelError, match="can't reload: the daemon is stopping"):
            await world.ask("reload")

    run(test)


def test_a_bug_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Although somebody keeps the task, and with it the exception."""

    async def test(world: World) -> None:
        world.failure = RuntimeError("a bug")
        world.gate.set()
        world.changes.begin("reload")
        await world.begun(1)
        kept = told(asyncio.ensure_future(world.reload()), KernelError)
        await asyncio.wait([kept])
        await asyncio.sleep(0)
        names = [each.getMessage().partition(" ")[0] for each in caplog.records]
        assert names == ["Changes._alone", "World.reload"]

    run(test)
    assert "RuntimeError: a bug" in caplog.text
