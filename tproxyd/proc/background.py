"""Tasks that nobody waits for. asyncio keeps their exceptions for whoever asks, and nobody does."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

log = logging.getLogger("tproxyd")

_T = TypeVar("_T")


def told(task: asyncio.Task[_T], *expected: type[Exception]) -> asyncio.Task[_T]:
    """The same; what it ends by, other than `expected`, is told to the log at once."""

    def done(task: asyncio.Task[_T]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, expected):
            what = getattr(task.get_coro(), "__qualname__", task)
            log.critical("%s has ended by a bug; the rest goes on", what, exc_info=error)

    task.add_done_callback(done)
    return task
