"""The bars that tproxyd has set itself, and whether a run reached them.

Ratios are medians of the pairs; where the promise is "never" the worst repetition counts. A bar on
several values (both directions of bulk, every number of workers) is judged by the worst of them,
and one on a peer that was measured in several variants by each of them in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from bench.measures import CURVE_OPEN, CURVE_WORKERS, LIVE_CAP
from bench.results import Results


class Bar(NamedTuple):
    what: str
    wanted: str
    got: str
    reached: bool | None  # None: not measured


def judge(results: Results, name: str) -> Iterator[Bar]:
    """Every bar for the candidate `name`, in the order of the table."""

    def least(what: str, bars: dict[str, float], *metrics: str) -> Iterator[Bar]:
        for peer, factor in bars.items():
            for variant in results.variants(peer):
                each = [results.ratios(name, variant, metric) for metric in metrics]
                worst = min(each, key=median) if all(each) else []
                met = median(worst) >= factor if worst else None
                yield Bar(what, f"≥ {factor:g} × {variant}", _spread(worst), met)

    def limit(what: str, most: float, unit: str, values: list[float], worst: bool) -> Bar:
        wanted = f"≤ {most:g} {unit}" if most else "none"
        if not values:
            return Bar(what, wanted, "", None)
        got = max(values) if worst else median(values)
        return Bar(what, wanted, f"{got:.3g} {unit}".strip(), got <= most)

    def of(metric: str) -> list[float]:
        return results.values(name, metric)

    bars: dict[str, float] = {"envoy": 2, "haproxy": 1.5, "direct": 0.7}
    yield from least("connections/s", bars, "churn_rps")
    yield limit("worst latency there, of all repetitions", 50, "ms", of("churn_worst_ms"), True)
    yield limit("failed requests there", 0, "", of("churn_failed"), True)
    yield limit("SYNs sent again there, each a stall of 1 s", 0, "", of("churn_syn_again"), True)
    yield from least("keep-alive requests/s", {"envoy": 1.4, "haproxy": 1.2}, "keep_rps")
    for variant in results.variants("haproxy"):
        p50 = results.ratios(name, variant, "single_p50_us")
        met = median(p50) <= 1 if p50 else None
        yield Bar("p50 of a single connection", f"≤ 1 × {variant}", _spread(p50), met)
    for streams, word in ((1, "one stream"), (8, "eight streams")):
        bars = {"envoy": 1.4, "haproxy": 1.5, "direct": 0.9}
        both = (f"bulk_up{streams}_gbit", f"bulk_down{streams}_gbit")
        yield from least(f"bulk, {word}, the worse direction", bars, *both)
    yield _live(results, name)
    yield limit("memory of an idle connection", 1, "KiB", of("idle_kib"), False)
    yield limit("memory at rest, two workers", 40, "MiB", of("rest_mib"), False)
    yield limit("ready after start", 300, "ms", of("startup_ms"), False)
    yield _flat(results, name)
    yield limit("p99 of small requests beside a bulk stream", 3, "×", of("beside_ratio"), False)


def _live(results: Results, name: str) -> Bar:
    what, wanted = "live connections from one address", f"{LIVE_CAP:,}, none hung, none lost"
    counts = results.values(name, "live_count")
    if not counts:
        return Bar(what, wanted, "", None)
    hung = sum(results.values(name, "live_hung"))
    dead = sum(results.values(name, "live_dead"))
    got = f"{min(counts):,.0f}, {hung:.0f} hung, {dead:.0f} lost"
    return Bar(what, wanted, got, min(counts) >= LIVE_CAP and not hung and not dead)


def _flat(results: Results, name: str) -> Bar:
    """CPU time of the proxy for a connection with the most others open, to that with the fewest."""
    few, many = CURVE_OPEN[0], CURVE_OPEN[-1]
    what, wanted = f"cost per connection, {many:,} open to {few}", "0.85 to 1.15 ×"
    each = []
    for workers in CURVE_WORKERS:
        ratios = [
            run[f"curve_{workers}_{many}_cpu_us"] / run[f"curve_{workers}_{few}_cpu_us"]
            for run in results.runs.get(name, ())
            if f"curve_{workers}_{many}_cpu_us" in run
        ]
        if ratios:
            each.append(ratios)
    if not each:
        return Bar(what, wanted, "", None)
    worst = max(each, key=lambda ratios: abs(median(ratios) - 1))
    return Bar(what, wanted, _spread(worst), 0.85 <= median(worst) <= 1.15)


def _spread(ratios: list[float]) -> str:
    if not ratios:
        return ""
    text = f"{median(ratios):.2f} ×"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}–{max(ratios):.2f})"
