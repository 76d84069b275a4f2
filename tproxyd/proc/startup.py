"""What the supervisor does to its own process before anything else, and how old it is.

Signals that wait, its libraries without OpenSSL, its log, its limit of open files.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
import types

from tproxyd.config import LogFormat
from tproxyd.proc import daemonlog

log = logging.getLogger("tproxyd")


def age_ms() -> int:
    """Milliseconds since this process began, Python's own start included (proc(5), stat, 22)."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    born = ticks / os.sysconf("SC_CLK_TCK")
    return int((time.clock_gettime(time.CLOCK_BOOTTIME) - born) * 1000)


_HELD = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def hold_signals() -> None:
    """What asks a daemon for something would end a process that has no handler yet. It waits.

    Children do not inherit that (child.py).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def hear_signals() -> None:
    """There are handlers: those that came before get theirs now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


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


def log_to_stderr(form: LogFormat = LogFormat.TEXT) -> None:
    """Our own log: one line each, or one JSON object."""
    logging.getLogger().addHandler(daemonlog.Handler(form))
    log.setLevel(logging.INFO)


def say(error: Exception) -> bool:
    """Say it in our log; whether there is one."""
    if not any(isinstance(each, daemonlog.Handler) for each in logging.getLogger().handlers):
        return False
    log.error("%s", error)
    return True
