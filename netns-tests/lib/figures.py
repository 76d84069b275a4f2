"""What tests have measured, told at the end of a run whatever came of it, even by pytest -q.

A machine under load would make a promise about time fail that holds: so a test asserts states, and
tells its times and sizes, for a reader to compare.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

Figure = Callable[[str], None]  # the fixture of this name: figure("what it came to")


def fixture_of(node: pytest.Item) -> Figure:
    """Kept with the properties of the item, which travel from a process of xdist to its parent."""

    def figure(text: str) -> None:
        node.user_properties.append(("figure", text))

    return figure


class Told:
    """The plugin that collects them and writes the section "figures"."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # the last report of a test, which has them all
            name = report.nodeid.rpartition("/")[2].replace(".py::", ": ")
            figures = [text for key, text in report.user_properties if key == "figure"]
            self._lines += [f"{name}: {text}" for text in figures]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._lines:
            terminalreporter.section("figures")
            for line in sorted(self._lines):
                terminalreporter.line(line)
