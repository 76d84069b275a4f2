"""Where a daemon is asked: a name that is taken."""

from __future__ import annotations

import asyncio
import os

import pytest

from tproxyd.config import Config
from tproxyd.proc import ask
from tproxyd.proc.commands import CommandServer
from tproxyd.proc.endpoints import Endpoints
from tproxyd.tests.test_admin import Provider


def test_a_daemon_without_an_admin_endpoint_does_not_wait_for_the_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may live without one, too, and have it for as long as they do."""
    # Other daemons of this machine have the usual one.
    monkeypatch.setattr(ask, "PREFIX", f"\0tproxyd/test/{os.getpid()}/")

    async def waits(_seconds: float) -> None:
        raise AssertionError("it waits")

    async def test() -> None:
        config = Config(admin=None)
        another = CommandServer(ask.name_of(config), {})
        await another.start()
        endpoints = Endpoints(config, Provider(), {})
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "sleep", waits)
            await endpoints.serve()
        await endpoints.finish()
        await another.finish()

    asyncio.run(test())
    assert [each.levelname for each in caplog.records] == ["WARNING"]
