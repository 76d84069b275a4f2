"""stdin, stdout and stderr as the rest of the program counts on them.

- All three are open. One that comes closed (`tproxyd run >&-`, and parents that forget it) is
  /dev/null from here on, as in git. Else the next file that is opened would get its number, and
  every child, which inherits 0 to 2 without being asked: the access log on stdout would then be
  written into the socket of the keeper of the kernel state.
- stdout shows as "?" what its encoding has no letters for.
- What stdout does not take is a StdoutError, which no other failure can be taken for.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class StdoutError(OSError):
    """stdout can't be written to: its disk is full, its terminal or its reader is gone."""


def prepare() -> None:
    """To be called before any other file is opened. OSError where there is no /dev/null."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(fd, True)
    # Python has none for what was closed at its start.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(1, "w", closefd=False)),
        encoding=sys.stdout.encoding if sys.stdout else None,
        errors="replace",
        line_buffering=os.isatty(1),
    )


class _Stdout(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select((), (self,), ())  # a stranger has made it O_NONBLOCK
            return written
        except OSError as error:
            raise StdoutError(error.errno, error.strerror) from error


def forget() -> None:
    """What is left in the buffer of stdout, which the interpreter flushes at the end, is lost."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
