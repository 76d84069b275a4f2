"""The page of counters that workers write and the supervisor reads, and its export.

Anonymous shared memory, made before the first worker of a generation (proc/generation.py) is
forked. A row belongs to a slot, not to a process: the worker that replaces a dead one goes on
adding where that one stopped, so no counter ever goes backwards; only gauges, which described the
dead process, return to zero. flow/tally.py says which cell means what.

A cell is one aligned 64-bit store of one writer, which x86-64 and arm64 never tear; a reader may
see one cell of a row a moment newer than another, and nothing here depends on more.

prometheus-client turns the sums into text, and nothing else of it is used: its process, platform
and gc collectors would describe the supervisor, which carries no traffic.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tproxyd import __version__
from tproxyd.flow.tally import Cell, Kind, Layout, Metric
from tproxyd.proc.heals import BOUNDS, HealCounts

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

# Rows start on cache lines of their own: two workers adding to one line would slow each other down.
_CACHE_LINE = 64


class Page:
    """One row of 64-bit cells per worker slot."""

    def __init__(self, layout: Layout, slots: int) -> None:
        self.layout = layout
        stride = -(-len(layout) * 8 // _CACHE_LINE) * _CACHE_LINE
        memory = memoryview(mmap.mmap(-1, stride * slots))  # shared with every later fork
        self.rows: list[memoryview] = [
            memory[i * stride : i * stride + len(layout) * 8].cast("q") for i in range(slots)
        ]

    def sums(self) -> list[int]:
        """Every cell of the layout, added up over the slots."""
        return [sum(column) for column in zip(*self.rows, strict=True)]

    def samples(self) -> dict[str, Samples]:
        return samples(self.layout.cells, self.sums())

    def cells(self, metric: Metric, *labels: str) -> list[memoryview]:
        """That cell of every row, each to be read at [0]; none where the layout has it not."""
        try:
            i = self.layout.index(metric, *labels)
        except KeyError:
            return []
        return [row[i : i + 1] for row in self.rows]

    def get(self, slot: int, metric: Metric) -> int:
        """The cells of `metric` in one slot, added up over its labels."""
        row = self.rows[slot]
        return sum(row[i] for i, cell in enumerate(self.layout.cells) if cell.metric is metric)

    def reset_gauges(self, slot: int) -> None:
        """The slot's worker is gone, and what it had open with it."""
        for i in self.layout.gauges():
            self.rows[slot][i] = 0


class Totals:
    """The pages of all generations of workers, and what those that are gone have counted.

    So a reload, which begins a new page, takes no counter back.
    """

    def __init__(self) -> None:
        self._pages: list[Page] = []
        self._base: dict[Cell, int] = {}

    def add(self, page: Page) -> None:
        self._pages.append(page)

    def fold(self, page: Page) -> None:
        """Its workers are gone."""
        self._pages.remove(page)
        for cell, value in zip(page.layout.cells, page.sums(), strict=True):
            left = 0 if cell.metric.kind is Kind.GAUGE else value
            self._base[cell] = self._base.get(cell, 0) + left

    def samples(self) -> dict[str, Samples]:
        """By metric name; those of the newest configuration first."""
        sums: dict[Cell, int] = {}
        for page in reversed(self._pages):
            for cell, value in zip(page.layout.cells, page.sums(), strict=True):
                sums[cell] = sums.get(cell, 0) + value
        for cell, value in self._base.items():
            sums[cell] = sums.get(cell, 0) + value
        return samples(sums.keys(), sums.values())


class Samples(NamedTuple):
    """A metric's cells and their sums."""

    metric: Metric
    values: tuple[tuple[tuple[str, ...], int], ...]  # (label values, sum)

    def only(self) -> int:
        """The value of a metric without labels."""
        ((_, value),) = self.values
        return value

    def by(self, label: str) -> dict[str, int]:
        """Sums by one label."""
        at = self.metric.labels.index(label)
        sums: dict[str, int] = {}
        for labels, value in self.values:
            sums[labels[at]] = sums.get(labels[at], 0) + value
        return sums


def samples(cells: Iterable[Cell], sums: Iterable[int]) -> dict[str, Samples]:
    """The sums by metric name."""
    found: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    metrics: dict[str, Metric] = {}
    for cell, value in zip(cells, sums, strict=True):
        metrics[cell.metric.name] = cell.metric
        found.setdefault(cell.metric.name, []).append((cell.labels, value))
    return {name: Samples(metric, tuple(found[name])) for name, metric in metrics.items()}


class Histogram(NamedTuple):
    """Bucket cells, which each hold their own share only, as Prometheus and people read them."""

    observed: int
    seconds: float
    cumulative: tuple[tuple[str, int], ...]  # (upper bound, observations up to it), "+Inf" last

    @classmethod
    def of(cls, of: Samples) -> Histogram:
        cells = dict(of.values)
        microseconds = cells.pop(("sum",))
        total = 0
        cumulative: list[tuple[str, int]] = []
        for (bound,), value in cells.items():
            total += value
            cumulative.append((bound, total))
        return cls(total, microseconds / 1e6, tuple(cumulative))


class UpstreamCounts(NamedTuple):
    """Of one listener that has a list of upstreams."""

    listener: str
    up: int  # addresses that may be used now, checked or not
    down: int
    resolve_failures: int


class Own(NamedTuple):
    """What the supervisor counts itself."""

    workers: int  # ready now
    worker_restarts: int
    kernel_drift: int
    upstreams: tuple[UpstreamCounts, ...] = ()
    reloads: tuple[int, int] = (0, 0)  # those that worked, and those that failed
    reload_failed: bool = False  # the last one
    heals: HealCounts = HealCounts()


def exposition(counted: Page | Totals, own: Own) -> tuple[bytes, str]:
    """The body of /metrics and its content type."""
    # Imported at the first scrape: 60 ms and 5.5 MB that a daemon nobody scrapes need not spend,
    # and a start none should wait for.
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Once(Collector):
        def collect(self) -> Iterator[Family]:
            return _families(counted.samples(), own)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8"


def _families(of: dict[str, Samples], own: Own) -> Iterator[Family]:
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    for name, each in of.items():
        about, labels = each.metric.help, each.metric.labels
        if each.metric.kind is Kind.HISTOGRAM:
            histogram = Histogram.of(each)
            yield HistogramMetricFamily(
                name, about, buckets=histogram.cumulative, sum_value=histogram.seconds
            )
            continue
        family: CounterMetricFamily | GaugeMetricFamily
        if each.metric.kind is Kind.COUNTER:
            family = CounterMetricFamily(name, about, labels=labels)
        else:
            family = GaugeMetricFamily(name, about, labels=labels)
        for values, number in each.values:
            family.add_metric(values, number)
        yield family
    yield GaugeMetricFamily("tproxyd_workers", "Workers that accept now.", own.workers)
    yield CounterMetricFamily(
        "tproxyd_worker_restarts", "Workers that died and were replaced.", own.worker_restarts
    )
    yield CounterMetricFamily(
        "tproxyd_kernel_drift",
        "Times the kernel state stopped being what the configuration asks for.",
        own.kernel_drift,
    )
    reloads = CounterMetricFamily("tproxyd_reloads", "Reloads.", labels=("result",))
    reloads.add_metric(("done",), own.reloads[0])
    reloads.add_metric(("failed",), own.reloads[1])
    yield reloads
    yield GaugeMetricFamily(
        "tproxyd_reload_failed",
        "1 while an older configuration is served, since the last reload failed.",
        int(own.reload_failed),
    )
    heals = CounterMetricFamily(
        "tproxyd_kernel_heals",
        "Attempts to put right what others had changed of the kernel state.",
        labels=("result",),
    )
    heals.add_metric(("healed",), own.heals.healed)
    heals.add_metric(("failed",), own.heals.failed)
    yield heals
    totals = tuple(itertools.accumulate(own.heals.buckets))
    bounds = (*map(str, BOUNDS), "+Inf")
    yield HistogramMetricFamily(
        "tproxyd_kernel_heal_seconds",
        "From the first sign that the kernel state was changed until it was right again.",
        buckets=list(zip(bounds, totals, strict=True)),
        sum_value=own.heals.seconds,
    )
    upstreams = GaugeMetricFamily(
        "tproxyd_upstreams",
        "Addresses of upstreams, by what active health checks say; up where there are none.",
        labels=("listener", "state"),
    )
    failures = CounterMetricFamily(
        "tproxyd_resolve_failures",
        "Times the name of an upstream could not be resolved.",
        labels=("listener",),
    )
    for one in own.upstreams:
        upstreams.add_metric((one.listener, "up"), one.up)
        upstreams.add_metric((one.listener, "down"), one.down)
        failures.add_metric((one.listener,), one.resolve_failures)
    yield upstreams
    yield failures
    build = GaugeMetricFamily("tproxyd_build_info", "Always 1.", labels=("version",))
    build.add_metric((__version__,), 1)
    yield build
