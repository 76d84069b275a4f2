"""Rates of the last minutes, from counters that a test sets."""

from __future__ import annotations

import pytest

from tproxyd.config import Config, Listener
from tproxyd.errors import CloseReason
from tproxyd.flow.tally import ACTIVE, CONNECT_SECONDS, CONNECTIONS, MOVED, Layout
from tproxyd.proc import counters
from tproxyd.proc.counters import Page, Samples
from tproxyd.proc.history import KEPT, History, until_next

LAYOUT = Layout(Config(listeners=(Listener(name="a"), Listener(name="b", port=2))))


class Counted:
    """A page of two slots, and its history; each `second` takes a sample."""

    def __init__(self) -> None:
        self.page = Page(LAYOUT, 2)
        self.history = History(self.read)
        self.now = 1000.0
        self.second()

    def read(self) -> dict[str, Samples]:
        return counters.samples(LAYOUT.cells, self.page.sums())

    def second(self, length: float = 1.0) -> None:
        self.history.take(self.now)
        self.now += length

    def moves(self, received: int, sent: int, slot: int = 0) -> None:
        self.page.rows[slot][LAYOUT.index(MOVED, "received")] += received
        self.page.rows[slot][LAYOUT.index(MOVED, "sent")] += sent

    def opens(self, count: int, slot: int = 0) -> None:
        self.page.rows[slot][LAYOUT.index(ACTIVE, "a")] += count

    def ends(self, count: int, reason: CloseReason, slot: int = 0) -> None:
        self.opens(-count, slot)
        self.page.rows[slot][LAYOUT.index(CONNECTIONS, "a", reason.value)] += count


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_before_there_are_two_samples(counted: Counted) -> None:
    assert counted.history.rates()["over_s"] == 0
    assert counted.history.part()["open"] == []
    assert counted.history.part()["last"] == 1


def test_what_was_added_in_a_second(counted: Counted) -> None:
    counted.opens(10)
    counted.opens(5, slot=1)
    counted.ends(3, CloseReason.DOWNSTREAM_FIN)
    counted.ends(1, CloseReason.UPSTREAM_RESET)
    counted.ends(2, CloseReason.UPSTREAM_REFUSED, slot=1)
    counted.moves(1000, 20)
    counted.moves(1, 2, slot=1)
    for bound, count in (("0.001", 3), ("sum", 6000)):
        counted.page.rows[0][LAYOUT.index(CONNECT_SECONDS, bound)] += count
    counted.second()
    assert counted.history.part() == {
        "every_s": 1.0,
        "last": 2,
        "open": [9],
        "connections": [15.0],
        "failed": [2.0],
        "received": [1001.0],
        "sent": [22.0],
        "connect_ms": [2.0],
    }
    counted.second()
    assert counted.history.part()["connections"] == [15.0, 0.0]
    assert counted.history.part()["connect_ms"] == [2.0, None]


def test_a_late_sample_is_no_burst(counted: Counted) -> None:
    counted.now += 1.0  # it comes two seconds after the last one
    counted.moves(1000, 0)
    counted.second()
    assert counted.history.part()["received"] == [500.0]


def test_the_rate_now_is_a_mean_of_five_seconds(counted: Counted) -> None:
    counted.moves(10**6, 0)
    counted.second()
    for _ in range(5):
        counted.moves(100, 0)
        counted.second()
    rates = counted.history.rates()
    assert (rates["over_s"], rates["received"]) == (5.0, 100.0)


def test_who_polls_gets_each_entry_once_and_five_minutes_at_first(counted: Counted) -> None:
    for second in range(KEPT + 50):
        counted.moves(second, 0)
        counted.second()
    whole = counted.history.part()
    assert whole["last"] == KEPT + 51
    assert whole["received"] == [float(each) for each in range(50, KEPT + 50)]
    assert counted.history.part(whole["last"])["received"] == []
    counted.moves(7, 0)
    counted.second()
    assert counted.history.part(whole["last"])["received"] == [7.0]
    assert counted.history.part(10**9)["received"] == []


def test_a_dead_workers_connections_are_not_negative_rates(counted: Counted) -> None:
    counted.opens(100)
    counted.second()
    counted.page.reset_gauges(0)
    counted.second()
    assert counted.history.part()["connections"] == [100.0, 0.0]


def test_samples_fall_between_the_sums_of_workers() -> None:
    assert until_next(17.25) == 0.75
    assert until_next(17.25, 0.5) == 0.25
    assert until_next(17.0) == 1.0
    assert until_next(16.99) == pytest.approx(1.01)  # a timer that was early
