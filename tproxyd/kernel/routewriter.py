"""Who writes routes, policy rules and addresses: pyroute2, in a process of one reconcile.

The process that keeps the kernel state lives as long as the daemon and should hold little, and
pyroute2 is 10 MB and 45 ms (EPYC, Python 3.11). So the first write of a reconcile forks a process
that imports it, and that ends with the reconcile: what only looks never pays for it, and what has
written does not go on paying. What is read is read without it (netlink.py).

- It is asked over a socketpair: one JSON list a request, and one an answer. Nothing else is open in
  it, nobody else has the other end, and EOF on it is its end.
- It dies with whoever forked it (PR_SET_PDEATHSIG: the thread), so that after a SIGKILL nothing is
  written that the next reconcile, which has the lock by then, would not have read.
- It is in the network namespace of the thread that forked it, with its user and capabilities.
- pyroute2's synchronous calls run an event loop of their own inside, so there must not be a running
  one in their process. That of a parent does not count: asyncio looks at the process number.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import os
import socket
import sys
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from tproxyd import child
from tproxyd.linux import die_with_parent, name_process

_MESSAGE = 65536  # more than any message: a dozen short values


class Lost(Exception):
    """The process ended before it answered: why. Whether it has written is not known."""


class RouteWriter:
    """The process; close it. OSError when there can be none."""

    def __init__(self) -> None:
        # Messages, not a stream: each recv is a whole one.
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            parent = os.getpid()
            try:
                self._pid = child.fork(lambda: _serve(theirs, parent), keep=(theirs.fileno(),))
            except BaseException:
                self._sock.close()
                raise

    def write(self, what: str, command: str, fields: Mapping[str, object]) -> None:
        """A call of pyroute2: `what` is route, rule or addr. OSError when the kernel refuses.

        ImportError when there is no pyroute2, Lost when the process is no more.
        """
        try:
            self._sock.sendall(json.dumps([what, command, fields]).encode())
            answer = self._sock.recv(_MESSAGE)
        except ConnectionError:
            answer = b""
        if not answer:
            raise Lost(f"the process that writes it {self.close()}")
        kind, code, text = json.loads(answer)
        if kind == "missing":
            raise ModuleNotFoundError(text)
        if kind == "refused":
            raise OSError(code, os.strerror(code))

    def close(self) -> str:
        """Let it end, wait until it has, and say how."""
        self._sock.close()
        try:
            return child.ending_of(os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]))
        except ChildProcessError:  # who started us ignores SIGCHLD, and so do we
            return "ended"


_ahead: list[RouteWriter] = []


def prepare() -> None:
    """Start one now, before anything else of tproxyd.kernel is imported: for `prepared`."""
    with contextlib.suppress(OSError):  # the first write will say so
        _ahead.append(RouteWriter())


def prepared() -> RouteWriter | None:
    """What `prepare` has started, once; whoever takes it closes it."""
    return _ahead.pop() if _ahead else None


# In that process ----------------------------------------------------------------------------------


def _serve(sock: socket.socket, parent: int) -> None:
    """Until EOF."""
    name_process("tproxyd/routes")
    die_with_parent()
    if os.getppid() != parent:
        return
    gc.disable()  # a tenth of the import, and it will be gone before there is much garbage
    # Imported before it is asked: who knows that a write will come has it ready by then.
    missing = ""
    try:
        pyroute2 = _pyroute2()
    except ImportError as error:
        missing = str(error)
    kernel: Any = None
    while request := sock.recv(_MESSAGE):
        answer: tuple[str, int, str] = ("done", 0, "")
        if missing:
            answer = ("missing", 0, missing)
        else:
            what, command, fields = json.loads(request)
            try:
                if kernel is None:
                    kernel = pyroute2.IPRoute(strict_check=True)
                list(getattr(kernel, what)(command, **fields))
            except pyroute2.NetlinkError as error:
                answer = ("refused", error.code, "")
            except OSError as error:
                answer = ("refused", error.errno or 0, "")
        sock.sendall(json.dumps(answer).encode())


class _Pyroute2(NamedTuple):
    IPRoute: Any
    NetlinkError: Any


@functools.cache
def _pyroute2() -> _Pyroute2:
    """The parts of pyroute2 that are needed here.

    Its __init__ imports all of it: 110 ms and 13 MB where asyncio is loaded already, against 45 ms
    for these. So an empty package of its name stands in for it meanwhile; whoever imports pyroute2
    later gets the real one.
    """
    stand_in = None
    if "pyroute2" not in sys.modules and (spec := importlib.util.find_spec("pyroute2")):
        stand_in = types.ModuleType("pyroute2")
        stand_in.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["pyroute2"] = stand_in
    try:
        from pyroute2.iproute.linux import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    finally:
        if stand_in is not None:
            del sys.modules["pyroute2"]
    return _Pyroute2(IPRoute, NetlinkError)
