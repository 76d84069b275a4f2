"""A real loop, an engine on it, and a server to connect to: for the tests of the data plane."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tproxyd.flow.engine import Engine

# A deadline would measure the machine, which other tests share; linear time is tested by counting.
# Here, since each test takes what is set when its module is imported.
settings.register_profile("tproxyd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tproxyd")


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop()
    problems: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: problems.append(context))
    yield loop
    loop.close()
    assert not problems, problems


@pytest.fixture
def engine(loop: asyncio.AbstractEventLoop) -> Iterator[Engine]:
    engine = Engine(loop)
    yield engine
    assert not any(engine._handlers), "a socket was never forgotten"
    engine.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
