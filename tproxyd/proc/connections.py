"""The open connections of all workers, as the supervisor knows them: by asking.

It has no part in traffic and no list of its own. A question goes to every worker that lives, those
that only serve what they still have too, and what comes back is merged (proc/lister.py is the other
end). One question is under way at a time, whoever asks. When nothing has come for two seconds the
workers that are still to answer, because they are stopped or have more to do than they can, are
named, and the others' answers are given: whoever looks wants to see them now.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypedDict

from tproxyd.addr import parse_prefix
from tproxyd.errors import Unreachable
from tproxyd.proc.rows import KEYS, LIMIT, MAX_LIMIT, Listing, Row, Sort

log = logging.getLogger("tproxyd")

ANSWER_S = 2.0
WORD = "live "  # what a worker's answers begin with

_ID = re.compile(r"(\d{1,10})-\d{1,9}-[0-9a-f]{5}")

Worker = tuple[int, Callable[[str], None]]  # its pid, and Control.say


class Killed(TypedDict):
    killed: int
    missing: list[str]  # ids that are no open connection
    silent: list[int]


class Connections:
    """`workers` gives those that live now, whatever they are doing."""

    def __init__(self, workers: Callable[[], Iterable[Worker]]) -> None:
        self._workers = workers
        self._lock = asyncio.Lock()
        self._serial = 0
        self._parts: dict[int, list[dict[str, Any]]] = {}  # by the pids of those that were asked
        self._waiting: set[int] = set()
        self._all_told = asyncio.Event()
        self._patience: asyncio.Timeout | None = None

    def heard(self, pid: int, words: str) -> None:
        """A word of a worker's that begins with WORD."""
        _, serial, answer = words.split(" ", 2)
        if int(serial) == self._serial and pid in self._waiting:
            part = json.loads(answer)
            self._parts[pid].append(part)
            if self._patience is not None and not self._patience.expired():
                self._patience.reschedule(asyncio.get_running_loop().time() + ANSWER_S)
            if part.get("last"):
                self.gone(pid)

    def gone(self, pid: int) -> None:
        """Nothing more comes from that worker."""
        self._waiting.discard(pid)
        if not self._waiting:
            self._all_told.set()

    async def listing(self, sort: Sort = Sort.BYTES, limit: int = LIMIT) -> Listing:
        limit = max(0, min(limit, MAX_LIMIT))
        key = KEYS[sort]
        async with self._lock:
            silent = await self._ask({"connections": {"sort": sort, "limit": limit}})
            rows: list[list[Row]] = [
                [row for part in parts for row in part["rows"]] for parts in self._parts.values()
            ]
            there = sum(part.get("open", 0) for parts in self._parts.values() for part in parts)
        # Each worker's are in order but for what moved while it told them.
        for each in rows:
            each.sort(key=lambda row: (key(row), row["id"]))
        merged = heapq.merge(*rows, key=lambda row: (key(row), row["id"]))
        return {
            "open": there,
            "sort": sort,
            "connections": [*islice(merged, limit)],
            "silent": silent,
        }

    async def kill(self, ids: Iterable[str], clients: Iterable[str]) -> Killed:
        """End them; Unreachable for what is no id or no prefix."""
        by_pid: dict[int, list[str]] = {}
        for each in ids:
            found = _ID.fullmatch(each)
            if found is None:
                raise Unreachable(
                    f'can\'t end "{each}": that is no id of a connection; ids are in'
                    " tproxyd status --connections"
                )
            by_pid.setdefault(int(found[1]), []).append(each)
        clients = list(clients)
        for each in clients:
            try:
                parse_prefix(each)
            except ValueError as error:
                raise Unreachable(
                    f"can't end connections: {error}; try --client 10.0.0.0/8"
                ) from None
        async with self._lock:
            orders = {
                pid: {"kill": {"ids": by_pid.get(pid, []), "clients": clients}}
                for pid, _ in self._workers()
                if clients or pid in by_pid
            }
            missing = [each for pid, names in by_pid.items() if pid not in orders for each in names]
            silent = await self._ask_each(orders)
            last = [part for parts in self._parts.values() for part in parts]
        killed = sum(part["killed"] for part in last)
        if killed:
            log.info("ended %d connection%s, as asked by tproxyd kill", killed, "s"[: killed != 1])
        missing += [each for part in last for each in part["missing"]]
        return {"killed": killed, "missing": missing, "silent": silent}

    async def on_kill(self, request: dict[str, Any]) -> dict[str, Any]:
        """The same by the command socket."""
        return {**await self.kill(request["ids"], request["clients"])}

    async def _ask(self, question: dict[str, Any]) -> list[int]:
        return await self._ask_each({pid: question for pid, _ in self._workers()})

    async def _ask_each(self, questions: dict[int, dict[str, Any]]) -> list[int]:
        """Put the questions, wait for _parts; who did not answer in time."""
        self._serial += 1
        self._parts = {pid: [] for pid in questions}
        self._waiting = set(questions)
        self._all_told.clear()
        for pid, say in self._workers():
            for verb, what in questions.get(pid, {}).items():
                say(f"{verb} {self._serial} {json.dumps(what)}")
        if self._waiting:
            try:
                async with asyncio.timeout(ANSWER_S) as self._patience:
                    await self._all_told.wait()
            except TimeoutError:
                log.warning("no answer about connections from %s", sorted(self._waiting))
            finally:
                self._patience = None  # who asked may be gone, and answers still come
        silent, self._waiting = sorted(self._waiting), set()
        return silent
