"""A worker's end of the access log: whatever it is made of, told of each connection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tproxyd.config import JOURNAL, Log
from tproxyd.flow.backlog import Later
from tproxyd.flow.journal import JournalWriter, entry
from tproxyd.flow.lines import LineWriter
from tproxyd.flow.record import Record, formatter
from tproxyd.proc.cells import Counting
from tproxyd.proc.systemd import JOURNAL_SOCKET

log = logging.getLogger(__name__)


class WorkerLog:
    """`tell` is to be called with each connection that is over; None where nobody wants to know."""

    tell: Callable[[Record], None] | None = None

    def __init__(self, config: Log, fd: int | None, later: Later, counts: Counting) -> None:
        self._lines: LineWriter | None = None
        self._journal: JournalWriter | None = None
        now, dropped, fails = time.monotonic, counts.count_log_dropped, counts.log_fails
        if config.access == JOURNAL:
            self._journal = journal = JournalWriter(JOURNAL_SOCKET, later, dropped, fails)
            self.tell = lambda life: journal.write(entry(life, now()))
        elif fd is not None:
            self._lines = lines = LineWriter(fd, later, dropped, fails)
            line = formatter(config.format)
            self.tell = lambda life: lines.write(line(life, now()))

    def use(self, fds: list[int]) -> None:
        """The file was opened anew (proc/accesslog.py)."""
        if not fds:  # the kernel gives none where no descriptor is free
            log.error("can't take the reopened access log: out of files; lines go to the old one")
        elif self._lines is not None:
            self._lines.use(fds[0])

    def close(self) -> None:
        for writer in (self._lines, self._journal):
            if writer is not None:
                writer.close()
