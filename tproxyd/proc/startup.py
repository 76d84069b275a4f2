"""What the supervisor does to its own process before anything else, and how old it is.

Its libraries without OpenSSL, its log, its limit of open files, and the access log, which is opened
while it may be: workers give up the right to.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
import types

from tproxyd.errors import KernelError


def age_ms() -> int:
    """Milliseconds since this process began, Python's own start included (proc(5), stat, 22)."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    born = ticks / os.sysconf("SC_CLK_TCK")
    return int((time.clock_gettime(time.CLOCK_BOOTTIME) - born) * 1000)


def do_without_openssl() -> None:
    """Keep libcrypto out of this process and its children: 4 MB and 10 ms that serve nothing.

    asyncio, uvloop and prometheus-client import ssl whether or not anybody speaks TLS, and here
    nobody does: they get a module that has every name and nothing behind it. hashlib can be without
    OpenSSL, and then takes the interpreter's own SHA-2. To be called before any of them is
    imported; where ssl is loaded already, it stays.
    """
    if "ssl" not in sys.modules:
        sys.modules["ssl"] = _NoTls("ssl", "There is no TLS in tproxyd: nobody here speaks it.")
        sys.modules["_hashlib"] = None  # type: ignore[assignment]  # the import system's "absent"


class _NoTls(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # the import system and inspect ask for what a module may lack
            raise AttributeError(name)
        return 0 if name.isupper() else type(name, (Exception,), {})


def raise_file_limit() -> int:
    """Each connection takes two files; the usual soft limit of 1024 is for programs that select.

    How many there may be now.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def open_access_log(where: str) -> int | None:
    """A file descriptor, opened before the workers give up the right to open it."""
    if where in ("", "-"):
        return None if where == "" else 1
    try:
        return os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    except OSError as error:
        raise KernelError(
            f"open the access log {where}",
            (error.strerror or str(error)).lower(),
            'choose another path in log.access, "-" for stdout, or "" for none',
        ) from error


def log_to_stderr() -> None:
    """Our own log: one line each; with the level that journald reads where it is listening."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format("tproxyd: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("tproxyd").setLevel(logging.INFO)


class _Format(logging.Formatter):
    _LEVELS = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))

    def __init__(self, form: str) -> None:
        super().__init__(form)
        info = os.fstat(2)
        self._journal = os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        return next((p for level, p in self._LEVELS if record.levelno >= level), "<7>") + text
