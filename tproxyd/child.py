"""Forking a child that shares nothing with its parent but what it is given.

The supervisor forks its workers and the keeper of the kernel state, and that one forks who writes
routes, without exec: what is imported is shared memory, and a worker that replaces a dead one
starts at once. The price is that a child is born inside the parent's event loop, with the parent's
sockets. So, in this order:

- every signal is blocked across the fork: a handler of the parent, run in the child, would write to
  the wake-up pipe that both now share;
- everything that exists is frozen (gc.freeze): an object of the parent that the child's collector
  found would close its file descriptor, whose number the child may be using for something else;
- every file descriptor but the kept ones is closed, whoever opened it: the epoll and wake-up pair
  of the loop, admin connections, the other children's control sockets. Above all those: a child
  learns of the supervisor's death by EOF on its own, and a copy in a sibling would hide it;
- signals have their defaults again, but those that ask the supervisor for something are ignored:
  Ctrl-C, KillMode=control-group and `systemctl kill -s USR1` reach every process at once, and what
  a child should do, and when, the supervisor tells it over its socket.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable

log = logging.getLogger("tproxyd")

# To stop, to read the configuration, to open the access log anew, to begin anew itself.
FOR_THE_SUPERVISOR = (
    *(signal.SIGTERM, signal.SIGINT),
    *(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
)

EXIT_BUG = 70  # an exception nobody expected: EX_SOFTWARE of sysexits.h


def fork(body: Callable[[], None], keep: Iterable[int]) -> int:
    """Run `body` in a child process, which then exits 0, or as SystemExit says; its pid.

    stdin, stdout, stderr and the file descriptors in `keep` stay open in the child. OSError when
    there can be no more processes.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = EXIT_BUG
    try:
        gc.freeze()
        close_all_but({0, 1, 2, *keep})
        _default_signals()
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_BUG
    except BaseException:
        log.critical("a process of ours ends by a bug", exc_info=True)
    finally:
        _flush()
        os._exit(code)  # neither atexit nor the parent's finally blocks are ours to run


def ending_of(code: int) -> str:
    """How a process ended, by os.waitstatus_to_exitcode."""
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"was killed by {names.get(-code, f'signal {-code}')}"  # real-time ones have none
    return f"ended with exit status {code}"


def close_all_but(keep: Collection[int]) -> None:
    """Not by os.closerange(): where close_range(2) is not to be had (a sandbox, a Python that was
    built for an old libc) that tries 2^30 numbers, for minutes.
    """
    try:
        numbers: Iterable[int] = map(int, os.listdir("/proc/self/fd"))
    except OSError:  # no number is free to read it by: then these are no more than are open
        numbers = range(os.sysconf("SC_OPEN_MAX"))
    for fd in numbers:
        if fd not in keep:
            with contextlib.suppress(OSError):  # the one that it was read by
                os.close(fd)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # SIGPIPE and SIGXFSZ stay ignored, as in every Python: their errno says it better.
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in FOR_THE_SUPERVISOR:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
