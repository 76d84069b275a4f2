"""A worker's answers about what is open: bounded slices, its own counts, nothing kept."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tproxyd.addr import Endpoint, OriginalDst, Peer
from tproxyd.config import Config, Listener
from tproxyd.errors import CloseReason
from tproxyd.flow.connection import Lane, Passage
from tproxyd.flow.engine import Engine
from tproxyd.flow.record import Record
from tproxyd.flow.relay import Limits
from tproxyd.flow.tally import BYTES, MOVED, Layout
from tproxyd.proc import lister as module
from tproxyd.proc.cells import Cells
from tproxyd.proc.control import MAX_WORD
from tproxyd.proc.counters import Page
from tproxyd.proc.lister import Lister, Meter

LISTENER = Listener()


class World:
    """Of connections that were made without a walk."""

    def __init__(self) -> None:
        self.ends: list[tuple[CloseReason, str]] = []

    def ended(
        self, lane: Lane, life: Record, down: socket.socket, up: socket.socket, aborted: bool
    ) -> None:
        self.ends.append((life.reason, life.detail))
        down.close()
        up.close()


class Scene:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = Engine(self.loop)
        self.world = World()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        self.ours.settimeout(0)
        self.theirs = theirs
        self.lister = Lister(self.engine, self.loop, theirs)
        self.far: list[socket.socket] = []

    def open(self, number: int) -> Passage:
        client, downstream = socket.socketpair()
        upstream, app = socket.socketpair()
        downstream.setblocking(False)
        upstream.setblocking(False)
        self.far += [client, app]
        life = Record(LISTENER, Peer(Endpoint("10.0.0.1", number)), self.engine.now - number, 0.0)
        life.dst = OriginalDst(Endpoint("10.0.0.2", 80))
        lane = Lane(LISTENER, lambda _: None, {}, Limits(0, 60))
        relay = Passage(lane, life, self.world, (downstream, upstream), b"", 0)  # type: ignore[arg-type]
        relay.start(self.engine)
        relay.up.delivered = number
        return relay

    def ask(self, word: str) -> None:
        assert self.lister.hears(word.encode())

    def step(self) -> None:
        """One turn of the loop."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def answers(self, serial: int) -> list[dict[str, Any]]:
        got: list[dict[str, Any]] = []
        for _ in range(100_000):
            self.step()
            try:
                data = self.ours.recv(MAX_WORD + 1)
            except BlockingIOError:
                continue
            assert len(data) <= MAX_WORD
            word, told, answer = data.decode().split(" ", 2)
            assert word == "live"
            if int(told) == serial:
                got.append(json.loads(answer))
                if got[-1].get("last"):
                    return got
        raise AssertionError(got)

    def close(self) -> None:
        self.engine.cut(CloseReason.INTERNAL, "")
        self.engine.close()
        for sock in (*self.far, self.ours, self.theirs):
            sock.close()
        self.loop.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


def asked(serial: int, sort: str = "bytes", limit: int = 10_000) -> str:
    return f'connections {serial} {{"sort": "{sort}", "limit": {limit}}}\n'


def test_rows_come_in_order_in_datagrams_that_fit(scene: Scene) -> None:
    for number in range(300):
        scene.open(number)
    scene.ask(asked(1))
    parts = scene.answers(1)
    assert len(parts) > 3
    rows = [row for part in parts for row in part["rows"]]
    assert [row["received"] for row in rows] == [*range(299, -1, -1)]
    assert len({row["id"] for row in rows}) == 300
    assert parts[-1]["open"] == 300
    scene.ask(asked(2, "client", 2))
    (part,) = scene.answers(2)
    assert [row["client"] for row in part["rows"]] == ["10.0.0.1:0", "10.0.0.1:1"]
    assert part["open"] == 300


def test_it_stands_still_while_nobody_reads_and_goes_on(scene: Scene) -> None:
    for number in range(300):
        scene.open(number)
    for serial in range(1, 20):  # far more than a socket takes
        scene.ask(f'kill {serial} {{"ids": ["{"1-2-00000"}"], "clients": []}}\n')
        scene.ask(asked(serial + 100))
        for _ in range(2000):
            scene.step()
    rows = [row for part in scene.answers(119) for row in part["rows"]]
    assert len(rows) == 300


def test_work_is_done_in_slices(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them ends when its time is up; here it is up at once."""
    monkeypatch.setattr(module, "_SLICE_S", -1.0)
    scene.open(1)
    scene.ask(asked(1))
    for _ in range(50):
        scene.step()
    with pytest.raises(BlockingIOError):
        scene.ours.recv(MAX_WORD)
    monkeypatch.setattr(module, "_SLICE_S", 0.001)
    assert len(scene.answers(1)) == 1


def test_what_ends_while_it_is_listed_is_left_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    relays = [scene.open(number) for number in range(300)]
    monkeypatch.setattr(module, "_SLICE_S", 0.00005)
    scene.ask(asked(1))
    scene.step()
    scene.step()
    for relay in relays[::2]:
        relay.cut(CloseReason.INTERNAL)
    rows = [row for part in scene.answers(1) for row in part["rows"]]
    assert sorted(row["received"] for row in rows) == [*range(1, 300, 2)]


def test_kill(scene: Scene) -> None:
    for number in range(4):
        scene.open(number)
    scene.ask(asked(1))
    (part,) = scene.answers(1)
    names = [row["id"] for row in part["rows"]]
    pid, fd, start = names[0].split("-")
    other = f"{pid}-{fd}-{(int(start, 16) + 1) % (1 << 20):05x}"  # one that had its descriptor
    scene.ask(f'kill 2 {{"ids": ["{names[1]}", "{other}"], "clients": []}}\n')
    assert scene.answers(2) == [{"killed": 1, "missing": [other], "last": True}]
    assert scene.world.ends == [(CloseReason.KILLED, "ended by tproxyd kill")]
    scene.ask('kill 3 {"ids": [], "clients": ["10.0.0.1/32"]}\n')
    assert scene.answers(3) == [{"killed": 3, "missing": [], "last": True}]
    scene.ask('kill 4 {"ids": [], "clients": ["10.0.0.1/32"]}\n')
    assert scene.answers(4) == [{"killed": 0, "missing": [], "last": True}]


def test_a_rate_is_since_the_last_look(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    now = scene.engine.now
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(module, "_SLICE_S", 1e-9)
    relay = scene.open(100)  # 100 bytes in the 100 seconds before
    scene.ask(asked(1))
    assert scene.answers(1)[0]["rows"][0]["rate"] == 1.0
    now += 2.0
    relay.down.delivered += 5000
    newer = scene.open(0)
    newer.life.started = now - 1.0
    newer.up.delivered = 700
    scene.ask(asked(2, "rate"))
    rows = scene.answers(2)[0]["rows"]
    assert [row["rate"] for row in rows] == [2500.0, 700.0]
    now += 0.1  # somebody else looks, and does not take the first one's measure away
    relay.down.delivered += 300
    scene.ask(asked(3))
    assert scene.answers(3)[0]["rows"][0]["rate"] == 3000.0
    now += 0.9
    scene.ask(asked(4))
    assert scene.answers(4)[0]["rows"][0]["rate"] == 300.0


def test_other_words_are_not_for_it(scene: Scene) -> None:
    for word in (b"", b"drain\n", b"cut\n", b"upstreams {}\n"):
        assert not scene.lister.hears(word)


# Bytes --------------------------------------------------------------------------------------------


def test_the_meter_counts_what_is_open_and_never_twice(scene: Scene) -> None:
    config = Config(listeners=(LISTENER,))
    layout = Layout(config)
    row = Page(layout, 1).rows[0]
    ended, moved = layout.index(BYTES, "received"), layout.index(MOVED, "received")
    row[ended] = row[moved] = 1000  # of the worker before this one
    meter = Meter(scene.engine, row, Cells(layout, config), scene.loop)
    assert row[moved] == 1000
    relay = scene.open(50)
    scene.open(7)
    meter.count()
    assert row[moved] == 1057
    relay.up.delivered = 80
    meter.count()
    assert row[moved] == 1087
    relay.cut(CloseReason.INTERNAL)
    row[ended] += 80
    meter.count()
    assert row[moved] == 1087
