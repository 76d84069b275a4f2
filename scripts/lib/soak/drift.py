"""What the daemon's processes and its namespace hold, sampled; and the table of how it has moved.

Two comparisons, each with a bound that was chosen before the first run: at rest before the load and
after it, where what was borrowed must have been given back; and the first against the last fifth of
the run, under the same load, where nothing may grow with time.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.daemon import Daemon, children

Numbers = dict[str, float]


class Bound(NamedTuple):
    """What a later value may be, given an earlier one."""

    text: str
    most: Callable[[float], float]


def _at_most(factor: float, more: float, unit: str = "") -> Bound:
    text = f"× {factor:g} + {more:g}{unit}" if factor != 1 else f"+ {more:g}{unit}"
    return Bound(text, lambda before: before * factor + more)


# Memory: an allocator that has met its peak keeps some of it, and a worker that was killed is
# replaced by one that has met nothing; a leak of one object a connection would be tens of
# megabytes. Files: a worker keeps up to 16 pipes for bulk, two files each. Sockets: what TIME_WAIT
# holds is no part of them: a minute's worth of connections, whatever the proxy does.
_MEMORY = _at_most(1.15, 3, " MiB")
BOUNDS: dict[str, Bound] = {
    "supervisor PSS MiB": _MEMORY,
    "supervisor RSS MiB": _MEMORY,
    "reconciler PSS MiB": _MEMORY,
    "reconciler RSS MiB": _MEMORY,
    "workers' PSS MiB, each": _MEMORY,
    "workers' RSS MiB, the largest": _MEMORY,
    "supervisor files": _at_most(1, 4),
    "reconciler files": _at_most(1, 4),
    "workers' files, each": _at_most(1, 34),
    "sockets in use": _at_most(1, 8),
    "conntrack entries": _at_most(1, 0),
}
# Of sockets and files under load: as many connections as there happen to be, and workers that drain
# after a reload. Counted, not judged.
AT_REST_ONLY = {"workers' files, each", "supervisor files", "sockets in use"}
# Of short connections, at the median and the 99th percentile: beside them some go by the proxy, to
# the same application, and what those have become slower by is the machine's doing.
LATENCY = (("p50", _at_most(1.5, 2, " ms")), ("p99", _at_most(2, 20, " ms")))


def sample(daemon: Daemon) -> Numbers:
    """One look at everything in BOUNDS."""
    status = daemon.status()
    supervisor, workers = status["pid"], [worker["pid"] for worker in status["workers"]]
    numbers: Numbers = {}
    names = {pid: _name(pid) for pid in children(supervisor)}
    kernel = [pid for pid, name in names.items() if name.startswith("tproxyd/kernel")]
    for role, pids in (("supervisor", [supervisor]), ("reconciler", kernel)):
        for pid in pids:
            _add(numbers, role, pid)
    each: list[Numbers] = []
    for pid in workers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found: Numbers = {}
            _add(found, "worker", pid)
            each.append(found)
    if each:
        mean = statistics.fmean
        numbers["workers' PSS MiB, each"] = mean(one["worker PSS MiB"] for one in each)
        numbers["workers' RSS MiB, the largest"] = max(one["worker RSS MiB"] for one in each)
        numbers["workers' files, each"] = mean(one["worker files"] for one in each)
    numbers["sockets in use"] = _sockets(supervisor)
    numbers["conntrack entries"] = _conntrack(daemon)
    return numbers


def _add(numbers: Numbers, role: str, pid: int) -> None:
    sizes = _rollup(pid)
    numbers[f"{role} PSS MiB"] = sizes["Pss"] / 1024
    numbers[f"{role} RSS MiB"] = sizes["Rss"] / 1024
    numbers[f"{role} files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _rollup(pid: int) -> dict[str, int]:
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0])
    return sizes


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _sockets(pid: int) -> int:
    """TCP sockets of its network namespace, both families, with those that no process holds.

    (What else those files say, orphans too, is of the whole machine.)
    """
    texts = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("sockstat", "sockstat6")]
    return sum(map(int, re.findall(r"^TCP6?: inuse (\d+)", "".join(texts), re.M)))


def _conntrack(daemon: Daemon) -> int:
    """0 where nothing has asked for connection tracking."""
    try:
        return daemon.namespace.sysctl("net/netfilter/nf_conntrack_count")
    except FileNotFoundError:
        return 0


class Row(NamedTuple):
    """One line of the table."""

    name: str
    values: tuple[float, float, float, float]  # at rest before, first fifth, last, at rest after
    bound: str
    broken: str  # why, or ""


def table(
    before: Numbers,
    samples: Sequence[Numbers],
    after: Numbers,
    latency: Mapping[str, Sequence[Sequence[float]]],
) -> list[Row]:
    """`latency`: by kind, for each fifth, the seconds at the median and at the 99th percentile."""
    fifth = max(1, len(samples) // 5)
    first, last = _mean(samples[:fifth]), _mean(samples[-fifth:])
    rows = []
    for name, bound in BOUNDS.items():
        values = tuple(one.get(name, float("nan")) for one in (before, first, last, after))
        broken = "grown at rest" if after[name] > bound.most(before[name]) else ""
        if name not in AT_REST_ONLY and last[name] > bound.most(first[name]):
            broken = broken or "grown under load"
        rows.append(Row(name, _four(values), bound.text, broken))
    nan = float("nan")
    for place, (name, bound) in enumerate(LATENCY):
        times = {
            kind: [1000 * fifths[i][place] for i in (0, -1)] for kind, fifths in latency.items()
        }
        (one, other), (direct, direct_later) = times["short"], times["direct"]
        slower = max(1.0, direct_later / direct) if direct else 1.0
        broken = "grown under load" if other > bound.most(slower * one) else ""
        rows.append(Row(f"through the proxy {name} ms", (nan, one, other, nan), bound.text, broken))
        rows.append(Row(f"beside it {name} ms", (nan, direct, direct_later, nan), "", ""))
    return rows


def _four(values: tuple[float, ...]) -> tuple[float, float, float, float]:
    a, b, c, d = values
    return a, b, c, d


def _mean(samples: Sequence[Numbers]) -> Numbers:
    return {
        name: statistics.fmean(one[name] for one in samples if name in one)
        for name in BOUNDS
        if any(name in one for one in samples)
    }


def written(rows: Sequence[Row]) -> str:
    head = ("", "rest before", "first fifth", "last fifth", "rest after", "bound", "")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        shown = (f"{value:.1f}" if value == value else "" for value in row.values)
        lines.append((row.name, *shown, row.bound, row.broken))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 5, 6) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
