"""Namespace tests: each file checks one promise, on real sockets through a real kernel.

They need root (network namespaces, rules); without it every one of them is skipped and says so.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `lib`

from lib.figures import Figure, Told, fixture_of
from lib.topology import V4, V6, Family, Topology

MANY_FILES = 8200


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Told())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root; try: sudo scripts/test"))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """`figure("p99 3 ms")`: shown at the end of the run, under the name of the test."""
    return fixture_of(request.node)


@pytest.fixture
def net() -> Iterator[Topology]:
    with Topology() as net:
        yield net


@pytest.fixture(params=[V4, V6], ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as may be: both ends of thousands of connections are ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < MANY_FILES:
        pytest.skip(f"needs {MANY_FILES} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
