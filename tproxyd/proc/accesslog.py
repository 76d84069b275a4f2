"""The access log as the supervisor has it: opened, followed when it moves, and watched.

Workers write (flow/lines.py, flow/journal.py); they have given up the right to open. So the
supervisor opens, and hands the open file to each worker over its control socket (SCM_RIGHTS, with
the word `log`). What a worker holds back at that moment goes into the new file: no line is lost,
doubled or torn.

A rotated file is noticed by itself, within a second: where the path leads to another file than
ours, or to none, it is opened again, or made. `reopen` does the same at once, for a signal or a
reload. Where it can't be opened, the old file stays in use; that is said once, and tried again
every second.

What workers can't write they count in the shared page (flow/tally.py), with the reason; here that
becomes two lines of our log: one when it begins, one with the number when it is over.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Mapping

from tproxyd.config import JOURNAL
from tproxyd.errors import KernelError
from tproxyd.flow.tally import LOG_DROPPED, LOG_FAILING, LogFailure
from tproxyd.proc.counters import Samples
from tproxyd.proc.systemd import JOURNAL_SOCKET

log = logging.getLogger("tproxyd")

WORD = "log"  # to a worker, with the file
FOLLOW_EVERY_S = 1.0

_WHY = {
    LogFailure.NO_SPACE: "no space left for it; make room",
    LogFailure.NO_READER: "nobody reads it (any more); restart what did",
    LogFailure.SLOW_READER: "its reader is too slow; see what keeps it",
    LogFailure.ERROR: "writing fails; dmesg may say more",
}
assert _WHY.keys() == set(LogFailure)


class AccessLog:
    """That of one generation of workers."""

    def __init__(self, where: str) -> None:
        self._where = where
        # Says a word to every worker, and passes it a file.
        self.tell: Callable[[str, int], None] = lambda *_: None
        self._is_file = where not in ("", "-", JOURNAL)
        self._failed = False  # to open it again
        try:
            self.fd: int | None = self._open() if self._is_file else 1 if where == "-" else None
            if where == JOURNAL:
                os.stat(JOURNAL_SOCKET)
        except OSError as error:
            what = f"{JOURNAL} at {JOURNAL_SOCKET}" if where == JOURNAL else where
            raise KernelError(
                f"open the access log {what}",
                (error.strerror or str(error)).lower(),
                'choose another path in log.access, "-" for stdout, or "" for none',
            ) from error

    def _open(self) -> int:
        # O_NONBLOCK: a FIFO that nobody reads is an error, not a daemon that waits for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._where, flags, 0o640)
        os.set_blocking(fd, True)
        return fd

    def reopen(self) -> None:
        """Open it anew, and hand it to the workers; for stdout and the journal there is no need."""
        if self.fd is None or not self._is_file:
            return
        try:
            fd = self._open()
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.error(
                    "can't open the access log %s again: %s; lines go on into the old file, and"
                    " this is tried again every second",
                    self._where,
                    (error.strerror or str(error)).lower(),
                )
            return
        if self._failed:
            self._failed = False
            log.info("the access log %s is open again", self._where)
        os.close(self.fd)
        self.fd = fd
        self.tell(WORD, fd)

    def follow(self) -> None:
        """Reopen it where the path no longer leads to it."""
        if self.fd is not None and self._is_file and (self._failed or self._moved(self.fd)):
            self.reopen()

    def _moved(self, fd: int) -> bool:
        ours = os.fstat(fd)
        if not stat.S_ISREG(ours.st_mode):
            return False
        try:
            theirs = os.stat(self._where)
        except OSError:
            return True
        return (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino)

    def close(self) -> None:
        if self.fd is not None and self._is_file:
            os.close(self.fd)
        self.fd = None


class Losses:
    """What is said of lines that can't be written."""

    def __init__(self) -> None:
        self._dropped, self._before = 0, 0  # lines: at the last look, and when the trouble began
        self._trouble = False

    def look(self, counted: Mapping[str, Samples]) -> None:
        """To be called once a second."""
        dropped, failing = counted[LOG_DROPPED.name].only(), counted[LOG_FAILING.name].by("cause")
        causes = [why for cause, why in _WHY.items() if failing[cause]]
        if causes and not self._trouble:
            self._trouble, self._before = True, self._dropped
            log.error(
                "can't write the access log: %s; lines wait, some ten thousand a worker, and are"
                " then dropped and counted",
                ", and ".join(causes),
            )
        elif self._trouble and not causes:
            self._trouble = False
            log.info("the access log is written again; %s", _lines(dropped - self._before))
        elif dropped > self._dropped and not causes:
            log.error("access log: %s", _lines(dropped - self._dropped))
        self._dropped = dropped

    def end(self, counted: Mapping[str, Samples]) -> None:
        """There are no workers any more."""
        dropped = counted[LOG_DROPPED.name].only()
        lost = dropped - (self._before if self._trouble else self._dropped)
        if lost:
            log.error("access log: %s", _lines(lost))


def _lines(count: int) -> str:
    if not count:
        return "no line was lost"
    return f"{count} line{'s were' if count > 1 else ' was'} dropped"
