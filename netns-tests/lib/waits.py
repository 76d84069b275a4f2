"""Waiting for a state that can be observed; never for time to pass.

The only place of netns-tests that lets time go by. A test names what it waits for, and the name is
what a reader gets when it does not come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Long enough for a loaded machine, short enough that a hung test is noticed by its reader.
PATIENCE_S = 10.0


def wait_for(look: Callable[[], T], what: str, timeout: float = PATIENCE_S) -> T:
    """The first truthy answer of `look`; AssertionError naming `what` when none came in time."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        if answer := look():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}; last seen: {answer!r}")
        pause.wait(0.01)


def stays(look: Callable[[], bool], what: str, seconds: float) -> None:
    """`look` holds now and for `seconds` more: for promises that something does *not* happen."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < deadline:
        assert look(), f"{what} did not last for {seconds:g} s"
        pause.wait(0.02)
