"""The comparison as a picture. The only importer of matplotlib, which lives in the bench's own
environment: so it is imported by name, and the type checker need not know it.

Every axis starts at zero, every bar carries its number, and the spread of the repetitions is drawn
as a line on it: nothing is cut off or left out.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.results import Results

OURS, THEIRS, BASE = "#2a7de1", "#9aa5b1", "#d5dae0"


class Panel(NamedTuple):
    metric: str
    title: str
    form: str
    more: bool  # is better


PANELS = (
    Panel("churn_rps", "connections/s\n(new one per request, 64 at once)", ",.0f", True),
    Panel("churn_worst_ms", "worst latency there, ms", ",.0f", False),
    Panel("keep_rps", "keep-alive requests/s\n(64 connections)", ",.0f", True),
    Panel("single_p50_us", "latency p50, µs\n(1 connection)", ",.0f", False),
    Panel("bulk_down1_gbit", "bulk to the client, Gbit/s\n(1 stream)", ".1f", True),
    Panel("churn_cpu_us", "proxy CPU per connection, µs", ",.0f", False),
    Panel("live_count", "live connections from one\naddress until one hangs", ",.0f", True),
    Panel("idle_kib", "memory per idle connection, KiB", ".1f", False),
)


def save(results: Results, path: Path) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    matplotlib.rcParams["svg.hashsalt"] = "tproxyd"  # equal results, equal file
    panels = [p for p in PANELS if any(results.values(n, p.metric) for n in results.candidates)]
    rows = -(-len(panels) // 2)
    count = len(results.candidates)
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, rows * (0.8 + 0.24 * count) + 0.5), squeeze=False
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, results)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    about = results.about
    caption = f"{about.get('date', '')} · {about.get('kernel', '')} · {about.get('machine', '')}"
    repetitions = max(map(len, results.runs.values()), default=0)
    if repetitions > 1:
        caption += f"\nbars: medians of {repetitions} repetitions; lines: least to most"
    figure.text(0.5, 0.005, caption, fontsize=8, color="#555555", ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.035, 1, 1), h_pad=1.6, w_pad=2.5)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _draw(axis, panel: Panel, results: Results) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    ticker = importlib.import_module("matplotlib.ticker")
    shown = [name for name in results.candidates if results.values(name, panel.metric)]
    top = max(max(results.values(name, panel.metric)) for name in shown) or 1.0
    for place, name in enumerate(shown):
        values = results.values(name, panel.metric)
        middle = median(values)
        color = OURS if name.startswith("tproxyd") else BASE if name == "direct" else THEIRS
        axis.barh(place, middle, 0.7, color=color)
        axis.plot([min(values), max(values)], [place, place], color="#333333", linewidth=1)
        axis.text(
            max(values) + top * 0.015, place, f"{middle:{panel.form}}", va="center", fontsize=8
        )
    axis.set_yticks(range(len(shown)), shown, fontsize=8)
    axis.set_ylim(len(results.candidates) - 0.5, -0.5)  # the same thickness everywhere
    axis.set_xlim(0, top * 1.16)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.tick_params(axis="x", labelsize=7, colors="#777777")
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#bbbbbb")
    better = "more is better" if panel.more else "less is better"
    axis.set_title(f"{panel.title} · {better}", fontsize=9, loc="left")
