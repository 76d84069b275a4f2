"""Numbers as `status` and `top` show them."""

from __future__ import annotations

import pytest

from tproxyd.proc import figures


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9940, "9.9 kB"),
        (9960, "10 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (5.6e9, "5.6 GB"),
        (2e18, "2000 PB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert figures.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (42, "42 s"), (100, "2 m"), (7200, "2 h"), (864_000, "10 d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert figures.age(seconds) == text


def test_sparklines() -> None:
    assert figures.sparkline([0, 1, 7, 3.5], 6) == "   ▂█▅"
    assert figures.sparkline([1, 2, 3], 2) == "▆█"
    assert figures.sparkline([], 3) == "   "
