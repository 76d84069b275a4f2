"""Memory that is refused: a connection ends by it, or the worker does; nothing in between.

The worker's end is seen from outside, so these children are real. A real limit of memory is in
netns-tests/test_fault_memory.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import uvloop

from tproxyd import child
from tproxyd.errors import CloseReason
from tproxyd.flow.engine import EXIT_NO_MEMORY, Engine, end_by_bug, give_up
from tproxyd.flow.relay import Direction


class Way(Direction):
    """A connection, as far as it can be ended."""

    def __init__(self, cut: Callable[[CloseReason, str], None]) -> None:
        self._cut = cut

    def cut(self, reason: CloseReason, detail: str) -> None:
        self._cut(reason, detail)


def no_memory(*_: object) -> None:
    raise MemoryError


def ending(body: Callable[[], None]) -> int:
    """The exit status of a child that does this."""
    return os.waitstatus_to_exitcode(os.waitpid(child.fork(body, ()), 0)[1])


def test_it_ends_the_connection_that_asked(caplog: pytest.LogCaptureFixture) -> None:
    ends: list[tuple[CloseReason, str]] = []
    end_by_bug(Way(lambda *how: ends.append(how)), MemoryError())
    assert ends == [(CloseReason.INTERNAL, "out of memory")]
    assert caplog.text == ""  # it is no bug


def test_ending_a_connection_needs_some_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert ending(lambda: end_by_bug(Way(no_memory), MemoryError())) == EXIT_NO_MEMORY
    assert capfd.readouterr().err == (
        "tproxyd: a worker has no memory left to go on with: it ends\n"
    )


def test_nobody_in_particular_asked() -> None:
    assert ending(lambda: end_by_bug(object(), MemoryError())) == EXIT_NO_MEMORY


def test_events_that_there_is_no_memory_for() -> None:
    """They are lost: edges come once."""

    def body() -> None:
        loop = uvloop.new_event_loop()
        engine = Engine(loop)
        engine._poll = no_memory  # type: ignore[assignment]
        loop.call_soon(engine._stay)
        loop.call_later(5, loop.stop)
        loop.run_forever()

    assert ending(body) == EXIT_NO_MEMORY


def test_a_deadline_that_there_is_no_memory_for() -> None:
    class Timed:
        timer: dict[object, None] | None = None

        on_timer = no_memory

    def body() -> None:
        loop = uvloop.new_event_loop()
        engine = Engine(loop)
        engine.set_timer(Timed(), engine.now)
        loop.call_later(5, loop.stop)
        loop.run_forever()

    assert ending(body) == EXIT_NO_MEMORY


def test_nobody_reads_what_it_says() -> None:
    def body() -> None:
        os.close(2)
        give_up()

    assert ending(body) == EXIT_NO_MEMORY
