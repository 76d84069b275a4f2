"""The report: what was measured on what, one table with ratios, the curve, the bars."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from bench.bars import judge
from bench.measures import CURVE_OPEN, CURVE_WORKERS, IDLE
from bench.results import Results

WIDTH = 120


class Row(NamedTuple):
    """A metric as a row: its label, how a value is written, whether a ratio of it says anything."""

    metric: str
    label: str
    form: str = ",.0f"
    compared: bool = True


SECTIONS: tuple[tuple[str, tuple[Row, ...]], ...] = (
    (
        "a new connection for each request, 64 at once",
        (
            Row("churn_rps", "connections/s"),
            Row("churn_p99_ms", "p99, ms", ".1f", False),
            Row("churn_worst_ms", "worst, ms", ",.1f", False),
            Row("churn_failed", "failed", compared=False),
            Row("churn_syn_again", "SYNs sent again (a stall of 1 s each)", compared=False),
            Row("churn_user_us", "proxy CPU, user, µs each", ".1f", False),
            Row("churn_system_us", "proxy CPU, system, µs each", ".1f", False),
            Row("churn_cpu_us", "proxy CPU, µs each", ".1f"),
            Row("syscalls", "system calls of the proxy each", ".1f"),
        ),
    ),
    (
        "keep-alive, 64 connections",
        (
            Row("keep_rps", "requests/s"),
            Row("keep_p99_ms", "p99, ms", ".1f", False),
            Row("keep_worst_ms", "worst, ms", ",.1f", False),
            Row("keep_failed", "failed", compared=False),
            Row("keep_user_us", "proxy CPU, user, µs each", ".1f", False),
            Row("keep_system_us", "proxy CPU, system, µs each", ".1f", False),
            Row("keep_cpu_us", "proxy CPU, µs each", ".1f"),
        ),
    ),
    (
        "keep-alive, 1 connection",
        (
            Row("single_rps", "requests/s"),
            Row("single_p50_us", "p50, µs"),
            Row("single_p99_us", "p99, µs"),
            Row("single_worst_ms", "worst, ms", ",.1f", False),
            Row("single_failed", "failed", compared=False),
        ),
    ),
    (
        "bulk, Gbit/s",
        (
            Row("bulk_up1_gbit", "one stream, from the client", ".1f"),
            Row("bulk_down1_gbit", "one stream, to the client", ".1f"),
            Row("bulk_up8_gbit", "eight streams, from the client", ".1f"),
            Row("bulk_down8_gbit", "eight streams, to the client", ".1f"),
        ),
    ),
    (
        "8 keep-alive connections beside one bulk stream to the client",
        (
            Row("beside_alone_p99_us", "p99 without the stream, µs", ",.0f", False),
            Row("beside_p99_us", "p99 beside it, µs", ",.0f", False),
            Row("beside_ratio", "the second by the first", ".2f", False),
        ),
    ),
    (
        "many connections",
        (
            Row("live_count", "live from one address until one hangs"),
            Row("live_dead", "of them lost by then", compared=False),
            Row("idle_kib", f"KiB for each of {IDLE:,} idle ones", ".2f"),
        ),
    ),
    (
        "the process",
        (
            Row("rest_mib", "MiB at rest", ".1f"),
            Row("startup_ms", "ms from start to the first connection served"),
        ),
    ),
    (
        "a PROXY v1 header in front (direct: nginx reads it)",
        (
            Row("header_churn_rps", "connections/s"),
            Row("header_churn_worst_ms", "worst, ms", ",.1f", False),
            Row("header_churn_failed", "failed", compared=False),
            Row("header_churn_cpu_us", "proxy CPU, µs each", ".1f"),
            Row("header_keep_rps", "keep-alive requests/s"),
            Row("header_keep_worst_ms", "worst, ms", ",.1f", False),
            Row("header_keep_failed", "failed", compared=False),
        ),
    ),
)


def draw(results: Results) -> str:
    lines = [*_about(results), *_table(results), *_curve(results), *_syscalls(results)]
    lines += [*_bars(results), *_failures(results)]
    return "\n".join(lines) + "\n"


def _about(results: Results) -> Iterator[str]:
    width = max(map(len, (*results.about, *results.candidates))) + 2
    for key, value in (results.about | results.settings).items():
        yield textwrap.fill(
            value, WIDTH, initial_indent=f"{key:<{width}}", subsequent_indent=" " * width
        )


def _table(results: Results) -> Iterator[str]:
    names = results.candidates
    mine = next((name for name in names if name.startswith("tproxyd")), None)
    others = [name for name in names if mine and not name.startswith("tproxyd")]
    labels = max(len(row.label) for _, rows in SECTIONS for row in rows) + 2
    widths = [max(9, len(name) + 2) for name in names]
    head = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    ratio_widths = [len(name) + 4 for name in others]
    ratios = "".join(
        f"{'÷ ' + name:>{width}}" for name, width in zip(others, ratio_widths, strict=True)
    )
    yield ""
    yield f"{'medians':<{labels + 2}}{head}" + (f"   {mine}{ratios}" if others else "")
    for title, rows in SECTIONS:
        known = [row for row in rows if any(results.values(name, row.metric) for name in names)]
        if not known:
            continue
        yield title
        for row in known:
            cells = [_cell(results.median(name, row.metric), row.form) for name in names]
            line = f"  {row.label:<{labels}}"
            line += "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            if mine and row.compared:
                line += " " * (3 + len(mine))
                for other, width in zip(others, ratio_widths, strict=True):
                    ratio = results.ratios(mine, other, row.metric)
                    line += f"{f'{median(ratio):.2f}' if ratio else '':>{width}}"
            yield line.rstrip()


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _curve(results: Results) -> Iterator[str]:
    metrics = set(results.metrics())
    names = [name for name in results.candidates if name != "direct"]
    points = [
        (workers, count)
        for workers in CURVE_WORKERS
        for count in CURVE_OPEN
        if f"curve_{workers}_{count}_rps" in metrics
    ]
    if not points:
        return
    yield ""
    yield (
        "a new connection for each request, 64 at once, beside open ones:"
        " connections/s, p99, proxy CPU each"
    )
    yield f"{'workers':>9}{'open':>8}" + "".join(f"{name:>26}" for name in names)
    for workers, count in points:
        line = f"{workers:>9}{count:>8,}"
        for name in names:
            at = f"curve_{workers}_{count}"
            values = [results.median(name, f"{at}_{end}") for end in ("rps", "p99_ms", "cpu_us")]
            rps, p99, cpu = values
            text = ""
            if rps is not None and p99 is not None and cpu is not None:
                text = f"{rps:,.0f}{p99:>6,.0f} ms{cpu:>5,.0f} µs"
            line += f"{text:>26}"
        yield line


def _syscalls(results: Results) -> Iterator[str]:
    """Which calls, for tproxyd."""
    for name in results.candidates:
        calls = {
            metric.removeprefix("syscall_"): value
            for metric in results.metrics()
            if metric.startswith("syscall_") and (value := results.median(name, metric))
        }
        if calls and name.startswith("tproxyd"):
            ordered = sorted(calls.items(), key=lambda item: -item[1])
            text = ", ".join(f"{call} {each:.2f}" for call, each in ordered if each >= 0.005)
            yield ""
            indent = "    "
            title = f"system calls of {name} per connection: "
            yield textwrap.fill(title + text, WIDTH, subsequent_indent=indent)


def _bars(results: Results) -> Iterator[str]:
    for name in results.candidates:
        bars = list(judge(results, name)) if name.startswith("tproxyd") else []
        measured = [bar for bar in bars if bar.reached is not None]
        if not measured:
            continue
        yield ""
        yield f"{f'the bars, for {name}':<48}{'wanted':<30}measured"
        for bar in measured:
            verdict = "reached" if bar.reached else "NOT reached"
            yield f"  {bar.what:<46}{bar.wanted:<30}{bar.got:<28}{verdict}"
        reached = sum(bar.reached is True for bar in measured)
        yield f"  {reached} of {len(measured)} reached, {len(bars) - len(measured)} not measured"


def _failures(results: Results) -> Iterator[str]:
    if results.failures:
        yield ""
        yield "what did not work:"
        yield from (f"  {failure}" for failure in results.failures)
