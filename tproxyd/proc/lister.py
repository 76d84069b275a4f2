"""A worker's answers about its open connections: lists them, ends them, counts their bytes.

The supervisor asks on the control socket, `connections N {…}` or `kill N {…}`, and is answered in
datagrams `live N {…}`, the last of which says so. However many connections there are, traffic comes
first: the work is done in slices of a millisecond, between which the loop serves whoever waits, and
it stands still while the supervisor does not read. The kernel is asked (TCP_INFO) about the rows
that go out, and about all only when they are to be sorted by what it says.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.errors import CloseReason
from tproxyd.flow import live
from tproxyd.flow.connection import Passage
from tproxyd.flow.engine import Engine
from tproxyd.flow.live import Baseline, Open
from tproxyd.linux import rtt_and_retransmits
from tproxyd.proc.cells import Cells
from tproxyd.proc.history import until_next
from tproxyd.proc.rows import Row, Sort, State, client_key

log = logging.getLogger(__name__)

_SLICE_S = 0.001
_ROWS = 64  # in a datagram: some 25 KB
_SORTED_AT_ONCE = 512  # 0.2 ms
# A baseline younger than this says too little about a rate; one that nobody has used for so long is
# let go.
_FRESH_S, _STALE_S = 0.9, 30.0
_KILLED = "ended by tproxyd kill"

_Key = tuple[Any, int, Open]


class Lister:
    def __init__(
        self, engine: Engine, loop: asyncio.AbstractEventLoop, control: socket.socket
    ) -> None:
        self._engine, self._loop, self._control = engine, loop, control
        self._pid = os.getpid()
        self._work: deque[Iterator[None]] = deque()
        self._listing: Iterator[None] = iter(())
        self._unsent: deque[bytes] = deque()
        self._baseline: Baseline | None = None
        self._driving = False

    def hears(self, word: bytes) -> bool:
        """Whether it was a question to us; the answer comes by itself."""
        kind, _, rest = word.partition(b" ")
        if kind == b"connections":
            if self._listing in self._work:  # who asked for that one has given up
                self._work.remove(self._listing)
            work = self._listing = self._list(*_asked(rest))
        elif kind == b"kill":
            work = self._kill(*_asked(rest))
        else:
            return False
        self._work.append(work)
        if not self._driving:
            self._driving = True
            self._loop.call_soon(self._drive)
        return True

    def _drive(self) -> None:
        """A slice of work."""
        until = time.monotonic() + _SLICE_S
        while self._work and time.monotonic() < until:
            if self._unsent and not self._send():
                self._loop.add_writer(self._control.fileno(), self._drive)
                return
            try:
                next(self._work[0])
            except StopIteration:
                self._work.popleft()
            except Exception:
                self._work.popleft()
                log.exception("can't tell of connections: this is a bug")
        if self._work or self._unsent:
            self._loop.call_soon(self._drive)
        else:
            self._driving = False

    def _send(self) -> bool:
        try:
            while self._unsent:
                self._control.send(self._unsent[0])
                del self._unsent[0]
        except BlockingIOError:
            return False
        except OSError:  # the supervisor is gone: the reader of this socket sees to that
            self._unsent.clear()
        self._loop.remove_writer(self._control.fileno())
        return True

    def _tell(self, serial: int, **what: Any) -> None:  # noqa: ANN401
        self._unsent.append(f"live {serial} {json.dumps(what)}\n".encode())

    # The list -----------------------------------------------------------------------------------

    def _list(self, serial: int, question: dict[str, Any]) -> Iterator[None]:
        sort, limit, now = Sort(question["sort"]), question["limit"], time.monotonic()
        handlers = self._engine.handlers
        before, after = self._baselines(now, len(handlers))
        chunks: list[list[_Key]] = [[]]
        number = count()
        for each in live.every(handlers):
            if each is not None:
                moved = sum(each.moved())
                if after is not None:
                    after.note(each.fd, moved)
                chunks[-1].append((_key(sort, each, moved, before, now), next(number), each))
                if len(chunks[-1]) == _SORTED_AT_ONCE:
                    chunks[-1].sort()
                    chunks.append([])
            yield
        chunks[-1].sort()
        rows: list[Row] = []
        for _, _, each in islice(heapq.merge(*chunks), limit):
            if each.alive:
                rows.append(self._row(each, before, now))
            if len(rows) == _ROWS:
                self._tell(serial, rows=rows)
                rows = []
            yield
        if after is not None:
            self._keep(after)
        self._tell(serial, rows=rows, open=next(number), last=True)
        yield

    def _baselines(self, now: float, size: int) -> tuple[Baseline | None, Baseline | None]:
        """What to measure rates against, and what the next look will."""
        before = self._baseline
        if before is not None and now - before.taken < _FRESH_S:
            return before, None
        return before, Baseline(now, size)

    def _keep(self, baseline: Baseline) -> None:
        self._baseline = baseline
        self._loop.call_later(_STALE_S, self._forget, baseline)

    def _forget(self, baseline: Baseline) -> None:
        if self._baseline is baseline:
            self._baseline = None

    def _row(self, each: Open, before: Baseline | None, now: float) -> Row:
        life = each.life
        received, sent = each.moved()
        client = each.client()
        return {
            "id": f"{self._pid}-{each.fd}-{each.start:05x}",
            "listener": life.listener.name,
            "client": str(client),
            "peer": None if client == life.peer else str(life.peer),
            "destination": None if life.dst is None else str(life.dst),
            "upstream": None if life.upstream is None else str(life.upstream),
            "source": None if life.source is None else str(life.source),
            "state": _state(each),
            "received": received,
            "sent": sent,
            "rate": round(_rate(each, received + sent, before, now), 1),
            "age_s": round(max(0.0, now - life.started), 3),
            "idle_s": round(max(0.0, now - each.last_active()), 3),
            "rtt_us": _rtt(each),
        }

    # The end ------------------------------------------------------------------------------------

    def _kill(self, serial: int, question: dict[str, Any]) -> Iterator[None]:
        handlers, killed = self._engine.handlers, 0
        clients = PrefixSet([parse_prefix(each) for each in question["clients"]])
        wanted = {_place(name): name for name in question["ids"]}
        for place in tuple(wanted):
            each = live.at(handlers, place[0])
            if each is not None and each.start == place[1]:
                each.cut(CloseReason.KILLED, _KILLED)
                killed += 1
                del wanted[place]
            yield
        if wanted or clients:
            for each in live.every(handlers):
                if each is not None and (
                    (each.fd, each.start) in wanted or each.client().host in clients
                ):
                    wanted.pop((each.fd, each.start), None)
                    each.cut(CloseReason.KILLED, _KILLED)
                    killed += 1
                yield
        self._tell(serial, killed=killed, missing=list(wanted.values()), last=True)
        yield


def _asked(rest: bytes) -> tuple[int, dict[str, Any]]:
    serial, _, question = rest.partition(b" ")
    return int(serial), json.loads(question)


def _place(name: str) -> tuple[int, int]:
    """The descriptor and the start in an id; its form was looked at by who asks."""
    _, fd, start = name.split("-")
    return int(fd), int(start, 16)


def _key(sort: Sort, each: Open, moved: int, before: Baseline | None, now: float) -> object:
    """The same order as rows.KEYS, from what is cheap to have."""
    match sort:
        case Sort.BYTES:
            return -moved
        case Sort.RATE:
            return -_rate(each, moved, before, now)
        case Sort.AGE:
            return each.life.started
        case Sort.IDLE:
            return each.last_active()
        case Sort.RTT:
            return -_rtt(each)
        case Sort.CLIENT:
            return client_key(*each.client())


def _rate(each: Open, moved: int, before: Baseline | None, now: float) -> float:
    return before.rate(each, moved, now) if before else live.whole_rate(each, moved, now)


def _rtt(each: Open) -> int:
    try:
        return rtt_and_retransmits(each.downstream)[0]
    except OSError:
        return 0  # it is ending just now


def _state(each: Open) -> State:
    if isinstance(each.owner, Passage):
        if each.owner.up.stop_reading:
            return State.CLIENT_DONE
        return State.UPSTREAM_DONE if each.owner.down.stop_reading else State.RELAYING
    return State.CONNECTING if each.dialled else State.HEADER


class Meter:
    """Adds to a worker's row, once a second, what its connections have moved.

    The count of bytes proper grows when a connection ends; a download of an hour would show as
    nothing, and then as everything at once. A look through all connections costs less than a count
    at every send: 1.5 ms a second for 9,000 connections, and nothing for each byte.
    """

    def __init__(
        self, engine: Engine, row: memoryview, cells: Cells, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._engine, self._row, self._loop = engine, row, loop
        self._ended, self._moved = (cells.received, cells.sent), cells.moved
        # The row was begun by others: what they have moved was counted by them.
        self._before = [row[cell] for cell in self._ended]
        self._on_time()

    def count(self) -> None:
        row = self._row
        for way, still_open in enumerate(live.bytes_moved(self._engine.handlers)):
            now = row[self._ended[way]] + still_open
            row[self._moved[way]] += now - self._before[way]
            self._before[way] = now

    def _on_time(self) -> None:
        self.count()
        self._loop.call_later(until_next(time.monotonic()), self._on_time)
