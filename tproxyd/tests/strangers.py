"""Being another user for a moment, in this process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@contextlib.contextmanager
def stranger() -> Iterator[None]:
    """With the rights of an ordinary user; what listens now, listens as his."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def squatter(name: str, *, listens: bool = True) -> Iterator[None]:
    """An ordinary user has this abstract name."""
    with socket.socket(socket.AF_UNIX) as sock:
        with stranger():
            sock.bind(name)
            if listens:
                sock.listen()
        yield
