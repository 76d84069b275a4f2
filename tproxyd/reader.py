"""Typed values out of a parsed TOML table; whatever is wrong is written down, with its path.

Nothing here stops at the first problem: a getter notes it and answers with the default, so that a
reader of the file learns everything at once. What the keys are is config.py's affair. Pure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

from tproxyd.addr import Endpoint, PrefixSet, parse_prefix, parse_upstream
from tproxyd.errors import Problem

PortRanges = tuple[tuple[int, int], ...]  # closed ranges, sorted, merged: ((80, 80), (8000, 8100))

EVERY_PORT: PortRanges = ((1, 65535),)

Word = TypeVar("Word", bound=StrEnum)


class Table:
    """One TOML table being read: typed getters that note problems and answer with a default.

    Each getter marks its key as known; `finish` reports the keys that nobody asked for.
    """

    def __init__(self, path: str, data: dict[str, object], problems: list[Problem]) -> None:
        self.path, self.data, self.problems = path, data, problems
        self.known: list[str] = []

    def problem(self, key: str, text: str) -> None:
        self.problems.append(Problem(f"{self.path}.{key}" if self.path else key, text))

    def finish(self) -> None:
        for key in self.data:
            if key not in self.known:
                near = difflib.get_close_matches(key, self.known, n=1)
                hint = (
                    f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(self.known)}"
                )
                self.problem(key, f"unknown key{hint}")

    def _get(self, key: str) -> object | None:
        self.known.append(key)
        return self.data.get(key)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.problem(key, f"{_show(value)} is not a whole number from {low} to {high}")
            return default
        return value

    def seconds(self, key: str, default: float, zero: str = "") -> float:
        """A duration in seconds; 0 is allowed only where it has a meaning, given as `zero`."""
        value = self._get(key)
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A year and above is a typing error; it also keeps inf and nan out.
        if not number or not (0 < value < 31_536_000 or (zero and value == 0)):  # type: ignore[operator]
            allowed = f"more than 0, or 0 ({zero})" if zero else "more than 0"
            self.problem(key, f"{_show(value)} is not a number of seconds, {allowed}")
            return default
        return float(value)  # type: ignore[arg-type]

    def text(self, key: str, default: str) -> str:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(key, f"{_show(value)} is not a text in quotes")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, f"{_show(value)} is neither true nor false")
            return default
        return value

    def word(self, key: str, default: Word) -> Word:
        """One word of the enum that `default` belongs to."""
        value = self._get(key)
        if value is None:
            return default
        words = [str(member) for member in type(default)]
        if not isinstance(value, str) or value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            self.problem(key, f"{_show(value)} is not one of: {', '.join(words)}{hint}")
            return default
        return type(default)(value)

    def table(self, key: str) -> Table:
        value = self._get(key)
        path = f"{self.path}.{key}" if self.path else key
        if isinstance(value, dict):
            return Table(path, value, self.problems)
        if value is not None:
            self.problem(key, f"{_show(value)} is not a table")
        return Table(path, {}, self.problems)

    def tables(self, key: str) -> list[Table]:
        value = self._get(key)
        if value is None:
            return []
        prefix = f"{self.path}.{key}" if self.path else key
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            name = re.sub(r"\[[0-9]+\]", "", prefix)
            self.problem(key, f"is not a list of tables; write [[{name}]] above each")
            return []
        return [Table(f"{prefix}[{i}]", entry, self.problems) for i, entry in enumerate(value)]

    def _each(
        self, key: str, read: Callable[[object], object], example: str
    ) -> list[object] | None:
        """Every entry of a list through `read` (ValueError = a problem); None where absent."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self.problem(key, f"{_show(value)} is not a list, for example {example}")
            return None
        items: list[object] = []
        for i, entry in enumerate(value):
            try:
                items.append(read(entry))
            except ValueError as error:
                self.problem(f"{key}[{i}]", str(error))
        return items

    def prefixes(self, key: str, default: PrefixSet) -> PrefixSet:
        items = self._each(key, lambda entry: parse_prefix(_str(entry)), '["10.0.0.0/8"]')
        return default if items is None else PrefixSet(items)  # type: ignore[arg-type]

    def interfaces(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        items = self._each(key, _interface, '["eth0", "veth*"]')
        return default if items is None else tuple(sorted(set(map(str, items))))

    def upstreams(self, key: str, default: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        """A list of upstreams, or () for "original"."""
        if self.data.get(key) == "original":
            self._get(key)
            return ()
        items = self._each(
            key,
            lambda entry: parse_upstream(_str(entry)),
            '["10.0.0.5:80", "app.example:80"], nor "original"',
        )
        if items == [] and self.data.get(key) == []:
            self.problem(key, 'is empty; name one, or say "original" where it intercepts')
        return default if items is None else tuple(dict.fromkeys(items))  # type: ignore[arg-type]

    def numbers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        items = self._each(key, _id, "[1337]")
        return default if items is None else tuple(sorted(set(items)))  # type: ignore[arg-type]

    def types(self, key: str, default: frozenset[int] | None) -> frozenset[int] | None:
        """TLV types as a list of bytes; None for "all"."""
        if self.data.get(key) == "all":
            self._get(key)
            return None
        items = self._each(key, _byte, '"all" or [0x02, 0xEA]')
        return default if items is None else frozenset(items)  # type: ignore[arg-type]

    def ports(self, key: str, default: PortRanges) -> PortRanges:
        """ "*", or a list of numbers and "low-high" texts, as merged ranges."""
        if self.data.get(key) == "*":
            self._get(key)
            return EVERY_PORT
        items = self._each(key, _port_range, '"*" or [80, "8000-8100"]')
        if key == "ports" and self.data.get(key) == []:
            self.problem(key, 'is empty, so nothing would be taken; write "*" or a list of ports')
        return default if items is None else merge_ranges(items)  # type: ignore[arg-type]


def merge_ranges(ranges: list[tuple[int, int]]) -> PortRanges:
    """Closed ranges in any order, sorted and merged where they touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _port_range(entry: object) -> tuple[int, int]:
    if isinstance(entry, int) and not isinstance(entry, bool):
        low = high = entry
    elif isinstance(entry, str) and (m := re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", entry)):
        low, high = int(m[1]), int(m[2] or m[1])
    else:
        raise ValueError(f'{_show(entry)} is not a port or a range like "8000-8100"')
    if not 1 <= low <= high <= 65535:
        raise ValueError(f"{_show(entry)} is not within 1 to 65535, low before high")
    return low, high


def _byte(entry: object) -> int:
    if isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry <= 0xFF:
        return entry
    raise ValueError(f"{_show(entry)} is not a TLV type, a number from 0 to 255")


def _id(entry: object) -> int:
    # (uid_t)-1 means "none".
    if isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 0xFFFF_FFFF:
        return entry
    raise ValueError(f"{_show(entry)} is not the number of a user or group")


def _interface(entry: object) -> str:
    # IFNAMSIZ is 16 with the closing NUL (linux/if.h); "*" is nft's wildcard, last only.
    if isinstance(entry, str) and re.fullmatch(r"[^\s/\"*]{1,15}|[^\s/\"*]{1,14}\*", entry):
        return entry
    raise ValueError(f'{_show(entry)} is not an interface name, for example "eth0" or "veth*"')


def _str(entry: object) -> str:
    if not isinstance(entry, str):
        raise ValueError(f"{_show(entry)} is not a text in quotes")
    return entry


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
