"""The daemon's own log, on stderr: a line each, for people, or a JSON object for a collector.

    tproxyd: ready in 143 ms
    {"time":"2026-01-31T23:59:59.123Z","level":"info","pid":4711,"message":"ready in 143 ms"}

Where the journal reads stderr ($JOURNAL_STREAM, systemd.exec(5)), each line begins with its level
as <N>, which the journal takes off.

Nothing here blocks: a supervisor, or a worker that says that an upstream fails, that waits for the
reader of its stderr would be a stop of traffic. What is not taken now waits for the next line; over
64 KiB of it is lost, and then the log says how much.
"""

from __future__ import annotations

import json
import logging
import os
import time

from tproxyd.config import LogFormat
from tproxyd.flow.lines import LineWriter
from tproxyd.flow.tally import LogFailure

KEEP_SIZE = 64 * 1024


class Handler(logging.Handler):
    def __init__(self, form: LogFormat = LogFormat.TEXT, fd: int = 2) -> None:
        super().__init__()
        self.setFormatter(_Json() if form is LogFormat.JSON else _TEXT)
        info = os.fstat(fd)
        self._prefixed = os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"
        self._fd, self._pid = fd, 0

    def _mine(self) -> LineWriter:
        """The writer of this process: what waits in one that came by a fork is the parent's."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._lost = 0
            self._failure: LogFailure | None = None
            self._writer = LineWriter(
                self._fd, lambda *_: None, self._lose, self._fail, keep=KEEP_SIZE
            )
        return self._writer

    def _lose(self, lines: int) -> None:
        self._lost += lines

    def _fail(self, why: LogFailure | None) -> None:
        self._failure = why

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        writer = self._mine()
        prefix = self._prefix(record.levelno)
        writer.write("".join(f"{prefix}{line}\n" for line in text.split("\n")))
        writer.flush()
        if self._lost and self._failure is None and not writer.waiting:
            lost, self._lost = self._lost, 0
            note = f"{lost} line{'s' if lost > 1 else ''} of this log could not be written"
            self.emit(logging.LogRecord("tproxyd", logging.WARNING, "", 0, note, (), None))

    def _prefix(self, level: int) -> str:
        if not self._prefixed:
            return ""
        return next((prefix for least, prefix in _LEVELS if level >= least), "<7>")

    def flush(self) -> None:
        self._mine().flush()

    def close(self) -> None:
        self._mine().close()
        super().close()


_LEVELS = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))
_TEXT = logging.Formatter("tproxyd: %(message)s")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, separators=(",", ":"))
