"""The last minutes, as the supervisor saw them: one sample a second, for rates and charts.

A counter says how much there ever was; whether traffic flows is a difference. So the supervisor
reads the page of counters once a second (some 0.1 ms) and keeps five minutes: 300 tuples of a few
integers, 60 KB. Nobody has to look for it to be there, so a chart is full as soon as it is opened.

What is sampled only ever grows, but for the number of open connections: a rate is what was added
between two samples, divided by the time that really passed between them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypedDict

from tproxyd.errors import CloseReason
from tproxyd.flow.tally import ACTIVE, CONNECT_SECONDS, CONNECTIONS, MOVED
from tproxyd.proc.counters import Histogram, Samples
from tproxyd.proc.status import RatesPart

EVERY_S = 1.0
KEPT = 300
# What "now" means where one number is shown: a mean over this many samples.
RECENT = 5

# The ends of connections that had an upstream: whatever ended them, they were served.
_SERVED = frozenset(
    (
        CloseReason.DOWNSTREAM_FIN,
        CloseReason.UPSTREAM_FIN,
        CloseReason.DOWNSTREAM_RESET,
        CloseReason.UPSTREAM_RESET,
        CloseReason.IDLE_TIMEOUT,
        CloseReason.HALF_CLOSE_TIMEOUT,
        CloseReason.DRAIN_TIMEOUT,
        CloseReason.KILLED,
    )
)


class Sample(NamedTuple):
    at: float  # time.monotonic()
    open: int
    ended: int
    failed: int  # of those: without having reached an upstream
    received: int
    sent: int
    connects: int
    connect_us: int  # all of them took together


class HistoryPart(TypedDict):
    """Columns, oldest first; each entry is about the second before it."""

    every_s: float
    last: int  # the number of the last entry; it grows by one each second
    open: list[int]
    connections: list[float]
    failed: list[float]
    received: list[float]
    sent: list[float]
    connect_ms: list[float | None]


def sample(at: float, of: dict[str, Samples]) -> Sample:
    ended = of[CONNECTIONS.name].by("close_reason")
    moved = of[MOVED.name].by("direction")
    connects = Histogram.of(of[CONNECT_SECONDS.name])
    total = sum(ended.values())
    return Sample(
        at,
        sum(of[ACTIVE.name].by("listener").values()),
        total,
        total - sum(ended[reason] for reason in _SERVED),
        moved["received"],
        moved["sent"],
        connects.observed,
        round(connects.seconds * 1e6),
    )


def until_next(now: float, offset: float = 0.0) -> float:
    """How long to wait for the next full second, or so much behind it.

    Workers add up what moved at each full second of the clock that all processes share, and samples
    are taken half a second later: so every one of them has exactly one such sum more.
    """
    wait = EVERY_S - (now - offset) % EVERY_S
    return wait if wait > EVERY_S / 10 else wait + EVERY_S  # a timer may be early


class History:
    """`read` gives the counters now, by metric name."""

    def __init__(self, read: Callable[[], dict[str, Samples]]) -> None:
        self._read = read
        self._samples: deque[Sample] = deque(maxlen=KEPT + 1)
        self._last = 0

    async def run(self) -> None:
        """For as long as the daemon serves."""
        while True:
            self.take(time.monotonic())
            await asyncio.sleep(until_next(time.monotonic(), EVERY_S / 2))

    def take(self, now: float) -> None:
        self._samples.append(sample(now, self._read()))
        self._last += 1

    def rates(self) -> RatesPart:
        if len(self._samples) < 2:
            return _between(None, None)
        return _between(self._samples[max(0, len(self._samples) - 1 - RECENT)], self._samples[-1])

    def part(self, after: int = 0) -> HistoryPart:
        """Those behind number `after`: who polls gets each one once."""
        samples = list(self._samples)
        new = max(0, min(self._last - after, len(samples) - 1))
        steps = [*pairwise(samples)][len(samples) - 1 - new :]
        rates = [_between(*step) for step in steps]
        return {
            "every_s": EVERY_S,
            "last": self._last,
            "open": [now.open for _, now in steps],
            "connections": [each["connections"] for each in rates],
            "failed": [each["failed"] for each in rates],
            "received": [each["received"] for each in rates],
            "sent": [each["sent"] for each in rates],
            "connect_ms": [each["connect_ms"] for each in rates],
        }


def _between(before: Sample | None, now: Sample | None) -> RatesPart:
    if before is None or now is None:
        nothing = dict.fromkeys(("connections", "failed", "received", "sent"), 0.0)
        return {"over_s": 0.0, "connect_ms": None, **nothing}  # type: ignore[typeddict-item]
    seconds = max(now.at - before.at, 0.001)
    connects = now.connects - before.connects

    def rate(*pairs: tuple[int, int]) -> float:
        # A worker that died took its open connections along uncounted.
        return round(max(0, sum(b - a for a, b in pairs)) / seconds, 1)

    return {
        "over_s": round(seconds, 1),
        "connections": rate((before.ended, now.ended), (before.open, now.open)),
        "failed": rate((before.failed, now.failed)),
        "received": rate((before.received, now.received)),
        "sent": rate((before.sent, now.sent)),
        "connect_ms": (
            round((now.connect_us - before.connect_us) / connects / 1000, 3) if connects else None
        ),
    }
