"""The supervisor's side of what is open: workers here are functions that answer, late or never."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tproxyd.errors import Unreachable
from tproxyd.proc import connections as module
from tproxyd.proc.connections import Connections
from tproxyd.proc.rows import MAX_LIMIT, Listing, Row, Sort


def row(name: str, moved: int = 0, client: str = "10.0.0.1:1") -> Row:
    return {
        "id": name,
        "listener": "inbound",
        "client": client,
        "peer": None,
        "destination": None,
        "upstream": None,
        "source": None,
        "state": "relaying",
        "received": moved,
        "sent": 0,
        "rate": 0.0,
        "age_s": 1.0,
        "idle_s": 1.0,
        "rtt_us": 0,
    }


class Workers:
    """Those that live, by pid, each with the rows that it has."""

    def __init__(self, **rows: list[Row]) -> None:
        self.rows = {int(pid.removeprefix("pid")): each for pid, each in rows.items()}
        self.heard: list[tuple[int, str]] = []
        self.silent: set[int] = set()
        self.connections = Connections(
            lambda: [(pid, lambda word, pid=pid: self.take(pid, word)) for pid in self.rows]  # type: ignore[misc]
        )

    def take(self, pid: int, word: str) -> None:
        self.heard.append((pid, word))
        if pid in self.silent:
            return
        verb, serial, question = word.split(" ", 2)
        asked = json.loads(question)
        answers: list[dict[str, object]]
        if verb == "connections":
            mine = [each | {"listener": asked["sort"]} for each in self.rows[pid][: asked["limit"]]]
            answers = [{"rows": [each]} for each in mine[:-1]]
            answers.append({"rows": mine[-1:], "open": len(self.rows[pid]), "last": True})
        else:
            known = {each["id"] for each in self.rows[pid]}
            there = [each for each in asked["ids"] if each in known]
            missing = [each for each in asked["ids"] if each not in known]
            answers = [{"killed": len(there), "missing": missing, "last": True}]
        for answer in answers:
            asyncio.get_running_loop().call_soon(
                self.connections.heard, pid, f"live {serial} {json.dumps(answer)}\n"
            )


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def ids(listing: Listing) -> list[str]:
    return [each["id"] for each in listing["connections"]]


def test_lists_of_all_workers_are_merged() -> None:
    async def test() -> None:
        workers = Workers(
            pid1=[row("1-a", 90), row("1-b", 50), row("1-c", 10)],
            pid2=[row("2-a", 70), row("2-b", 60)],
            pid3=[],
        )
        listing = await workers.connections.listing(Sort.BYTES, 4)
        assert ids(listing) == ["1-a", "2-a", "2-b", "1-b"]
        assert (listing["open"], listing["sort"], listing["silent"]) == (5, "bytes", [])
        assert len(workers.heard) == 3
        assert ids(await workers.connections.listing(Sort.BYTES, 0)) == []
        await workers.connections.listing(Sort.BYTES, 10**9)
        assert f'"limit": {MAX_LIMIT}' in workers.heard[-1][1]

    run(test)


def test_clients_are_sorted_as_addresses() -> None:
    async def test() -> None:
        mine = [row(each, client=each) for each in ("10.0.0.2:9", "10.0.0.10:1", "[::1]:1")]
        others = [row(each, client=each) for each in ("10.0.0.2:10", "[::1]:2")]
        workers = Workers(pid1=mine, pid2=others)
        assert ids(await workers.connections.listing(Sort.CLIENT)) == [
            *("10.0.0.2:9", "10.0.0.2:10", "10.0.0.10:1", "[::1]:1", "[::1]:2"),
        ]

    run(test)


def test_equals_stand_in_the_same_order_each_time() -> None:
    async def test() -> None:
        workers = Workers(pid1=[row("1-b"), row("1-a")], pid2=[row("2-a")])
        assert ids(await workers.connections.listing()) == ["1-a", "1-b", "2-a"]

    run(test)


def test_who_does_not_answer_is_named_and_his_late_words_are_not_taken_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.02)

    async def test() -> None:
        workers = Workers(pid1=[row("1-a")], pid2=[row("2-a")])
        workers.silent = {2}
        listing = await workers.connections.listing()
        assert (ids(listing), listing["open"], listing["silent"]) == (["1-a"], 1, [2])
        serial = workers.heard[-1][1].split()[1]
        late = {"rows": [row("2-late")], "open": 1, "last": True}
        workers.silent = set()
        asyncio.get_running_loop().call_soon(
            workers.connections.heard, 2, f"live {serial} {json.dumps(late)}\n"
        )
        assert ids(await workers.connections.listing()) == ["1-a", "2-a"]

    run(test)


def test_a_long_answer_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.2)

    async def test() -> None:
        workers = Workers(pid1=[])
        workers.silent = {1}
        loop, parts = asyncio.get_running_loop(), 5
        for i in range(parts):
            part = {"rows": [row(f"1-{i}")], "open": 0, "last": i == parts - 1}
            words = f"live 1 {json.dumps(part)}\n"
            loop.call_later(0.1 * (i + 1), workers.connections.heard, 1, words)
        listing = await workers.connections.listing()
        assert (len(listing["connections"]), listing["silent"]) == (parts, [])

    run(test)


def test_an_answer_to_somebody_who_is_gone_does_no_harm() -> None:
    async def test() -> None:
        workers = Workers(pid1=[row("1-a")])
        workers.silent = {1}
        asking = asyncio.ensure_future(workers.connections.listing())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert workers.heard
        asking.cancel()
        await asyncio.wait([asking])
        workers.connections.heard(1, 'live 1 {"rows": [], "open": 0, "last": true}\n')
        workers.silent = set()
        assert ids(await workers.connections.listing()) == ["1-a"]

    run(test)


def test_a_worker_that_dies_is_not_waited_for() -> None:
    async def test() -> None:
        workers = Workers(pid1=[row("1-a")], pid2=[row("2-a")])
        workers.silent = {2}
        asyncio.get_running_loop().call_soon(workers.connections.gone, 2)
        listing = await workers.connections.listing()
        assert (ids(listing), listing["silent"]) == (["1-a"], [])
        workers.rows.clear()
        assert (await workers.connections.listing())["open"] == 0

    run(test)


def test_two_who_ask_at_once_get_their_own_answers() -> None:
    async def test() -> None:
        workers = Workers(pid1=[row("1-a", 5), row("1-b", 4)])
        one, two = await asyncio.gather(
            workers.connections.listing(Sort.BYTES, 1), workers.connections.listing(Sort.AGE, 2)
        )
        assert [each["listener"] for each in one["connections"]] == ["bytes"]
        assert [each["listener"] for each in two["connections"]] == ["age", "age"]

    run(test)


def test_kill_asks_those_whom_it_concerns(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def test() -> None:
        workers = Workers(pid1=[row("1-5-0000a")], pid2=[row("2-6-0000b")])
        told = await workers.connections.kill(["2-6-0000b", "2-7-0000c", "9-1-00000"], [])
        assert told["killed"] == 1
        assert sorted(told["missing"]) == ["2-7-0000c", "9-1-00000"]
        assert [pid for pid, _ in workers.heard] == [2]
        await workers.connections.kill([], ["10.0.0.0/8"])
        assert [pid for pid, _ in workers.heard] == [2, 1, 2]

    run(test)
    assert caplog.messages == ["ended 1 connection, as asked by tproxyd kill"]


@pytest.mark.parametrize("name", ["", "1", "1-2", "1-2-3", "1-2-0000g", "x-2-00000", "-1-2-00000"])
def test_what_is_no_id(name: str) -> None:
    async def test() -> None:
        with pytest.raises(Unreachable, match="that is no id of a connection; ids are in"):
            await Workers(pid1=[]).connections.kill([name], [])

    run(test)


def test_what_is_no_prefix() -> None:
    async def test() -> None:
        with pytest.raises(Unreachable, match=r'bits set behind its length; meant "10\.0\.0\.0/8"'):
            await Workers(pid1=[]).connections.kill([], ["10.0.0.1/8"])

    run(test)
