"""`tproxyd top`: the running daemon, live, on a terminal. By rich, an extra of this package.

It asks what `status` asks, once a second, and draws a frame that fits: what is wrong stands first,
then rates, listeners and workers, and as many connections as there are lines left. It draws one
frame where it can't draw the next over it (the output is no terminal, or one with TERM=dumb), where
nobody can press a key, and with --once. As JSON it is an object a line, a second apart, until who
reads it has enough.

When the daemon stops answering, the last frame stays and says so, until it answers again.
"""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tproxyd.config import Config
from tproxyd.errors import Unreachable
from tproxyd.proc import figures, status
from tproxyd.proc.ask import look
from tproxyd.proc.rows import LIMIT, Listing, Row, Sort
from tproxyd.proc.status import Snapshot

EVERY_S = 1.0
# Of each question; a frame that is late is better than one that hangs.
PATIENCE_S = 3.0
_WIDE = 140  # columns from which everything has room
_KEPT = 300

KEYS = {
    "b": Sort.BYTES,
    "r": Sort.RATE,
    "a": Sort.AGE,
    "i": Sort.IDLE,
    "t": Sort.RTT,
    "c": Sort.CLIENT,
}


@dataclass
class Seen:
    """What the daemon said, and when."""

    status: Snapshot
    listing: Listing
    new: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))  # connections/s
    moved: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))  # bytes/s
    last: int = 0
    silent_since: float = 0.0  # 0: it answers
    why: str = ""


def run(config: Config, sort: Sort, *, once: bool, as_json: bool) -> None:
    """Returns when the user quits."""
    if as_json:
        _stream(config, sort, once)
        return
    console = Console(highlight=False)
    if once or console.is_dumb_terminal or not (console.is_terminal and sys.stdin.isatty()):
        if not console.is_terminal:  # rich takes 80 for the width of a file
            columns = os.environ.get("COLUMNS", "")
            console.width = (int(columns) if columns.isdecimal() else 0) or _WIDE
        seen = _ask(config, sort, LIMIT, None)
        console.print(frame(seen, sort, console.width, len(seen.listing["connections"])))
        return
    seen = _ask(config, sort, console.height, None)  # the first must not fail
    with _keys() as key, Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            rows = console.height - _height(seen, sort, console)
            screen.update(frame(seen, sort, console.width, max(1, rows), keys=True), refresh=True)
            pressed = key(EVERY_S)
            if pressed in ("q", "Q", "\x1b"):
                return
            sort = KEYS.get(pressed.lower(), sort)
            seen = _ask(config, sort, console.height, seen)


def _ask(config: Config, sort: Sort, limit: int, before: Seen | None) -> Seen:
    try:
        now = look(config, "/status", PATIENCE_S)
        listed = look(config, f"/connections?sort={sort}&limit={limit}", PATIENCE_S)
        after = before.last if before is not None and before.status["pid"] == now["pid"] else 0
        past = look(config, f"/history?after={after}", PATIENCE_S)
    except Unreachable as error:
        if before is None:
            raise
        before.silent_since = before.silent_since or time.monotonic()
        before.why = str(error)
        return before
    seen = Seen(now, listed, last=past["last"])
    if before is not None and after:
        seen.new, seen.moved = before.new, before.moved
    seen.new.extend(past["connections"])
    seen.moved.extend(a + b for a, b in zip(past["received"], past["sent"], strict=True))
    return seen


def _stream(config: Config, sort: Sort, once: bool) -> None:
    while True:
        seen = _ask(config, sort, LIMIT, None)
        print(json.dumps(seen.status | {"open": seen.listing}), flush=True)
        if once:
            return
        select.select((), (), (), EVERY_S)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Keys as they are pressed; "" when none was in time."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def key(seconds: float) -> str:
        ready, _, _ = select.select((fd,), (), (), seconds)
        return os.read(fd, 32).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(fd)
        yield key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# Drawing ----------------------------------------------------------------------------------------


def frame(seen: Seen, sort: Sort, width: int, rows: int, *, keys: bool = False) -> Group:
    """One screen, with so many connections at the most."""
    parts: list[RenderableType] = [*_above(seen, width), _connections(seen, sort, width, rows)]
    return Group(*parts, *([_footer(sort)] if keys else []))


def _height(seen: Seen, sort: Sort, console: Console) -> int:
    """Of everything but the rows of connections."""
    lines = console.render_lines(frame(seen, sort, console.width, 0, keys=True), pad=False)
    return len(lines)


def _above(seen: Seen, width: int) -> Iterator[RenderableType]:
    s = seen.status
    yield _verdict(seen, width)
    for reason in s["not_ready_because"]:
        yield Text(f"  {reason}", "red")
    yield from (Text(line, "yellow") for line in status.silence(seen.listing))
    yield Text("")
    yield _rates(seen, width)
    yield Text("")
    tables = _listeners(s), _workers(s)
    if width >= _WIDE:
        both = Table.grid(padding=(0, 4))
        both.add_row(*tables)
        yield both
    else:
        yield from tables
    yield Text("")


def _verdict(seen: Seen, width: int) -> Text:
    s = seen.status
    if seen.silent_since:
        seconds = time.monotonic() - seen.silent_since
        text = Text(" NO ANSWER ", "bold white on red")
        return text.append(f" for {figures.age(seconds)}: {seen.why}", "red")
    fine = s["ready"]
    text = Text(" READY " if fine else " NOT READY ", f"bold white on {'green' if fine else 'red'}")
    kernel = s["kernel"]["state"]
    text.append("  kernel state ").append(kernel, "green" if kernel == "ok" else "bold red")
    tail = f"tproxyd {s['version']}  pid {s['pid']}  up {figures.duration(s['uptime_s'])}"
    if (gap := width - len(text) - len(tail)) > 1:
        text.append(" " * gap).append(tail, "dim")
    return text


def _rates(seen: Seen, width: int) -> Table:
    rates, line = seen.status["rates"], max(10, width - 50)
    connect = rates["connect_ms"]
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="left", style="dim", width=11)
    table.add_column(justify="right", style="bold", width=9)
    table.add_column(width=18)
    table.add_column(style="cyan", no_wrap=True)
    table.add_row(
        "connections",
        f"{figures.number(rates['connections'])}/s",
        f"{figures.number(rates['failed'])}/s fail",
        figures.sparkline(seen.new, line),
    )
    table.add_row(
        "bytes",
        figures.rate(rates["received"] + rates["sent"]),
        "connect " + ("-" if connect is None else figures.rtt(connect * 1000)),
        figures.sparkline(seen.moved, line),
    )
    return table


def _table(*columns: str, right: tuple[str, ...] = (), **more: Any) -> Table:  # noqa: ANN401
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", **more)
    for each in columns:
        table.add_column(each, justify="right" if each in right else "left", no_wrap=True)
    return table


def _listeners(s: Snapshot) -> Table:
    table = _table("LISTENER", "PORT", "TAKES", right=("PORT",))
    for each in s["listeners"]:
        table.add_row(Text(each["name"]), str(each["port"]), Text(status.takes(each)))
        for row in status.upstreams(each):
            _, _, address, health = row
            if health not in ("up", "unchecked"):
                table.add_row("", "", Text(f"{address} {health}", "red"))
    return table


def _workers(s: Snapshot) -> Table:
    table = _table("WORKER", "PID", "STATE", "OPEN", right=("PID", "OPEN"))
    for each in s["workers"]:
        # A reload brings workers beside those that serve, which come first, and retires others.
        calm = each["generation"] != s["workers"][0]["generation"] or each["state"] == "draining"
        style = "dim" if calm else "" if each["state"] == "ready" else "red"
        state = Text(each["state"], style)
        table.add_row(str(each["slot"]), str(each["pid"] or "-"), state, str(each["active"]))
    return table


# Of a connection: what stands in each column, whether at the right, and what it is sorted by.
_Cell = Callable[[Row], str]
_COLUMNS: tuple[tuple[str, bool, Sort | None, _Cell], ...] = (
    ("ID", False, None, lambda row: row["id"]),
    ("LISTENER", False, None, lambda row: row["listener"]),
    ("CLIENT", False, Sort.CLIENT, lambda row: row["client"]),
    ("VIA", False, None, lambda row: row["peer"] or "-"),
    ("UPSTREAM", False, None, lambda row: row["upstream"] or row["destination"] or "-"),
    ("AS", False, None, lambda row: row["source"] or "-"),
    ("STATE", False, None, lambda row: row["state"]),
    ("BYTES", True, Sort.BYTES, lambda row: figures.size(row["received"] + row["sent"])),
    ("IN", True, Sort.BYTES, lambda row: figures.size(row["received"])),
    ("OUT", True, Sort.BYTES, lambda row: figures.size(row["sent"])),
    ("RATE", True, Sort.RATE, lambda row: figures.rate(row["rate"])),
    ("AGE", True, Sort.AGE, lambda row: figures.age(row["age_s"])),
    ("IDLE", True, Sort.IDLE, lambda row: figures.age(row["idle_s"])),
    ("RTT", True, Sort.RTT, lambda row: figures.rtt(row["rtt_us"])),
)
# What 80 columns have room for, with what it is sorted by; and a wide screen.
_NARROW = {"ID", "CLIENT", "UPSTREAM", "BYTES", "RATE", "AGE", "RTT"}
_ONLY_NARROW = {"BYTES"}
# What goes where there is no room for all: a figure of which a part is left is none.
_LEAST_FIRST = ("RTT", "ID", "AGE", "UPSTREAM", "RATE")
# Of the others, what may be cut, in this order and to how much: of CLIENT any IPv4 address stays.
_CUT_TO = {"AS": 9, "VIA": 9, "LISTENER": 9, "UPSTREAM": 9, "CLIENT": 15}


def _connections(seen: Seen, sort: Sort, width: int, rows: int) -> Table:
    listing = seen.listing
    names = {name for name, *_ in _COLUMNS} - _ONLY_NARROW if width >= _WIDE else set(_NARROW)
    if sort is Sort.IDLE:
        names.add("IDLE")
    gap = 2 if width >= _WIDE else 1
    widths = {
        name: max(map(len, (name, *map(cell, listing["connections"][:rows]))))
        for name, _, _, cell in _COLUMNS
        if name in names
    }
    _fit(widths, width, gap, sort)
    shown = [each for each in _COLUMNS if each[0] in widths]
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        header_style="dim",
        title=f"{listing['open']} open connections, by {sort}",
        title_justify="left",
        title_style="bold",
    )
    for name, right, by, _ in shown:
        table.add_column(
            Text(name, "bold reverse" if by is sort else "dim"),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=widths[name],
        )
    for row in listing["connections"][:rows]:
        style = "dim" if not row["rate"] else ""
        table.add_row(*(Text(cell(row)) for _, _, _, cell in shown), style=style)
    return table


def _fit(widths: dict[str, int], width: int, gap: int, sort: Sort) -> None:
    """Fewer and narrower columns, until they fit; the one that is sorted by stays."""
    kept = {name for name, _, by, _ in _COLUMNS if by is sort}
    for least in (*_LEAST_FIRST, ""):
        over = sum(widths.values()) + gap * (len(widths) - 1) - width
        spare = sum(max(0, widths.get(name, 0) - to) for name, to in _CUT_TO.items())
        if over <= spare:
            break
        if least not in kept:
            widths.pop(least, None)
    for name, to in _CUT_TO.items():
        if (cut := min(over, widths.get(name, 0) - to)) > 0:
            widths[name] -= cut
            over -= cut


def _footer(sort: Sort) -> Text:
    text = Text("sort by ", "dim")
    for key, each in KEYS.items():
        before, _, after = str(each).partition(key)
        style = "bold reverse" if each is sort else ""
        text.append(before, style).append(key, f"{style} underline").append(after, style)
        text.append(" ")
    return text.append("  q quits", "dim")
