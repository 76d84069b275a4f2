"""Numbers as people read them, for `status` and `top`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
_BARS = "▁▂▃▄▅▆▇█"


def size(count: float) -> str:
    """Bytes: "0 B", "1.5 kB", "23 MB"; by thousands, as links are measured."""
    for unit in _SIZES:
        if count < 999.5 or unit == _SIZES[-1]:
            break
        count /= 1000
    return f"{count:.1f} {unit}" if unit != "B" and count < 9.95 else f"{count:.0f} {unit}"


def rate(count: float) -> str:
    return f"{size(count)}/s"


def number(count: float) -> str:
    """A rate of things: "0", "0.4", "12", "1 234"."""
    return f"{count:.1f}" if 0 < count < 9.95 else f"{count:,.0f}".replace(",", " ")


def duration(seconds: float) -> str:
    """The two biggest units: "2 d 3 h", "4 s"."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, "d"), (h, "h"), (m, "min"), (s, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{number} {unit}" for number, unit in parts[:2])


def age(seconds: float) -> str:
    """In a column: "0.3 s", "42 s", "5 m", "3 h", "12 d"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for length, unit in ((60.0, "s"), (60.0, "m"), (24.0, "h")):
        if seconds < length * 1.5:
            return f"{seconds:.0f} {unit}"
        seconds /= length
    return f"{seconds:.0f} d"


def rtt(microseconds: float) -> str:
    if not microseconds:
        return "-"
    if microseconds < 999.5:
        return f"{microseconds:.0f} µs"
    ms = microseconds / 1000
    return f"{ms:.1f} ms" if ms < 9.95 else f"{ms:.0f} ms"


def sparkline(values: Iterable[float], width: int) -> str:
    """The last so many, the newest at the right; the highest of them is a full block."""
    shown = [*values][-width:] if width > 0 else []
    most = max(shown, default=0) or 1
    bars = (_BARS[round(each / most * (len(_BARS) - 1))] if each else " " for each in shown)
    return "".join(bars).rjust(width)


def columns(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()
) -> Iterator[str]:
    """Lines of a table; the columns in `right` hold numbers."""
    to_the_right = frozenset(right)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            f"{cell:>{width}}" if i in to_the_right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
