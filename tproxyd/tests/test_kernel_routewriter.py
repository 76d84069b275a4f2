"""The process that writes routes: what it is asked, how it ends, and that nothing is left of it.

It is forked, so what a test puts in the place of pyroute2 is there, too; no kernel is written to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tproxyd import child
from tproxyd.errors import KernelError
from tproxyd.kernel import routewriter
from tproxyd.kernel.routewriter import Lost, RouteWriter
from tproxyd.kernel.routing import Routing
from tproxyd.kernel.state import Change, PolicyRule, Route, Stage
from tproxyd.tests.alarms import nothing_blocks

RULE = Change(Stage.ADD_RULE, None, PolicyRule(4, 1337, 0x539, 0xFFF, 133, 135))
ROUTE = Change(Stage.ADD_ROUTE, None, Route(4, 133, 135, "default"))


class Refusal(Exception):
    """As pyroute2's NetlinkError."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def pyroute2_that(monkeypatch: pytest.MonkeyPatch, **methods: Callable[..., object]) -> None:
    """In its place, in the processes that are forked from now on: one with these methods."""

    class IPRoute:
        def __init__(self, *, strict_check: bool) -> None:
            assert strict_check

        def __getattr__(self, name: str) -> Callable[..., object]:
            return methods[name]

    made = routewriter._Pyroute2(IPRoute, Refusal)
    monkeypatch.setattr(routewriter, "_pyroute2", lambda: made)


def refuses(code: int) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise Refusal(code)

    return refuse


def does_nothing(*_: object, **__: object) -> tuple[object, ...]:
    return ()


def dies(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A process that does not end would be waited for for ever."""
    with nothing_blocks(30.0):
        yield


@pytest.fixture
def writer() -> Iterator[Callable[[], RouteWriter]]:
    with contextlib.ExitStack() as stack:

        def make() -> RouteWriter:
            return stack.enter_context(contextlib.closing(RouteWriter()))

        yield make


def files_of(pid: int | str) -> dict[str, str]:
    root = Path(f"/proc/{pid}/fd")
    found = {}
    for name in os.listdir(root):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[name] = os.readlink(root / name)
    return found


_before: set[int] = set()  # of other tests, in the same process of pytest


@pytest.fixture(autouse=True)
def _children_of_others() -> None:
    _before.clear()
    _before.update(children())


def children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split() if int(pid) not in _before]


# What it is asked ---------------------------------------------------------------------------------


def test_a_call_comes_through_as_it_is(
    monkeypatch: pytest.MonkeyPatch, writer: Callable[[], RouteWriter]
) -> None:
    def route(*words: str, **fields: object) -> Iterator[object]:
        assert words == ("add",)
        assert fields == {"dst": "::/0", "table": 4_294_967_295, "family": socket.AF_INET6}
        yield "an answer"
        raise Refusal(errno.ENOTTY)  # seen only when the answers are read to their end

    pyroute2_that(monkeypatch, route=route)
    fields = {"dst": "::/0", "table": 4_294_967_295, "family": socket.AF_INET6}
    with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)) as caught:
        writer().write("route", "add", fields)
    assert caught.value.errno == errno.ENOTTY


def test_it_goes_on_after_a_refusal(
    monkeypatch: pytest.MonkeyPatch, writer: Callable[[], RouteWriter]
) -> None:
    def no_socket(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, "no more")

    pyroute2_that(monkeypatch, rule=refuses(errno.EPERM), route=no_socket, addr=does_nothing)
    asked = writer()
    with pytest.raises(PermissionError):
        asked.write("rule", "add", {})
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        asked.write("route", "add", {})
    asked.write("addr", "add", {})
    assert len(children()) == 1


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EEXIST, "File exists; another program's is in its place: remove that, or choose"),
        (errno.EPERM, "Operation not permitted; run it as root, or give it CAP_NET_ADMIN"),
        (errno.ENETDOWN, "Network is down; ip link set lo up"),
    ],
)
def test_a_refusal_says_what_to_try(monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    pyroute2_that(monkeypatch, rule=refuses(code))
    with contextlib.closing(Routing()) as routing, pytest.raises(KernelError) as caught:
        routing.apply(RULE)
    assert str(caught.value).startswith(f"can't {RULE}: {says}")


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL])
def test_what_is_gone_is_removed(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    pyroute2_that(monkeypatch, rule=refuses(code), route=refuses(errno.EBUSY))
    with contextlib.closing(Routing()) as routing:
        routing.apply(replace(RULE, old=RULE.new, new=None))
        with pytest.raises(KernelError, match="busy"):
            routing.apply(replace(ROUTE, old=ROUTE.new, new=None))


# Without pyroute2 ---------------------------------------------------------------------------------


def test_without_pyroute2_the_first_write_says_so(
    monkeypatch: pytest.MonkeyPatch, writer: Callable[[], RouteWriter]
) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    asked = writer()
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="pyroute2"):
            asked.write("rule", "add", {})


def test_its_name_is_free_again_for_the_whole_of_it() -> None:
    code = """
import sys
from tproxyd.kernel import routewriter
parts = routewriter._pyroute2()
assert "pyroute2" not in sys.modules
import pyroute2
assert pyroute2.__file__ and pyroute2.IPRoute and pyroute2.NDB
assert pyroute2.NetlinkError is parts.NetlinkError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Its end ------------------------------------------------------------------------------------------


def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pyroute2_that(monkeypatch, rule=does_nothing)
    before, count = files_of("self"), len(children())
    routewriter.prepare()
    routing = Routing(routewriter.prepared())
    assert len(children()) == count + 1
    assert routewriter.prepared() is None
    for _ in range(3):
        routing.apply(RULE)
        assert len(children()) == count + 1
        routing.close()
        assert len(children()) == count  # and no zombie: those are listed, too
        assert files_of("self") == before


def test_it_has_nothing_open_but_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a control socket would hide the end of the process at the other end."""
    pyroute2_that(monkeypatch, rule=does_nothing)
    left, right = socket.socketpair()
    with left, right, contextlib.closing(Routing()) as routing:
        os.set_inheritable(left.fileno(), True)
        routing.apply(RULE)
        (pid,) = children()
        assert Path(f"/proc/{pid}/comm").read_text() == "tproxyd/routes\n"
        found = files_of(pid)
        (own,) = found.keys() - {"0", "1", "2"}
        assert found[own].startswith("socket:")
        assert found[own] not in files_of("self").values()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_ends_the_daemon_is_not_for_it(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Signals reach a whole control group at once, and the rules must go before it does."""
    pyroute2_that(monkeypatch, rule=does_nothing)
    with contextlib.closing(Routing()) as routing:
        routing.apply(RULE)
        os.kill(children()[0], number)
        routing.apply(RULE)


def test_killed_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    pyroute2_that(monkeypatch, rule=dies, route=does_nothing)
    with contextlib.closing(Routing()) as routing:
        with pytest.raises(KernelError) as caught:
            routing.apply(RULE)
        why = "the process that writes it was killed by SIGKILL; try again"
        assert str(caught.value) == f"can't {RULE}: {why}"
        assert children() == []
        routing.apply(ROUTE)


def test_killed_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pyroute2_that(monkeypatch, rule=does_nothing)
    with contextlib.closing(Routing()) as routing:
        routing.apply(RULE)
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(KernelError, match="was killed by SIGKILL; try again"):
            routing.apply(RULE)
        routing.apply(RULE)


def test_a_bug_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> NoReturn:
        raise TypeError("what pyroute2 cannot do")

    pyroute2_that(monkeypatch, rule=broken)
    with contextlib.closing(Routing()) as routing, pytest.raises(KernelError, match="status 70"):
        routing.apply(RULE)


def test_where_sigchld_is_ignored(
    monkeypatch: pytest.MonkeyPatch, writer: Callable[[], RouteWriter]
) -> None:
    pyroute2_that(monkeypatch, rule=dies)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        asked = writer()
        with pytest.raises(Lost, match="ended"):
            asked.write("rule", "add", {})
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_it_dies_with_who_forked_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a write that hangs, where it would not see EOF."""
    reader, told = os.pipe()

    def hangs(*_: object, **__: object) -> None:
        os.write(told, b"%d" % os.getpid())
        signal.pause()

    monkeypatch.setattr(child, "close_all_but", lambda _: None)  # `told` is for the test
    pyroute2_that(monkeypatch, rule=hangs)

    def forks() -> None:
        os.close(reader)
        RouteWriter().write("rule", "add", {})

    pid = child.fork(forks, keep=())
    os.close(told)
    with contextlib.closing(os.fdopen(reader, "rb", 0)) as hears:
        writing = int(hears.read(20))
        process = os.pidfd_open(writing)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ended, _, _ = select.select([process], [], [], 10)
        os.close(process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(writing, signal.SIGKILL)
    assert ended, "it lives on"


def test_the_kernels_own_refusal(writer: Callable[[], RouteWriter]) -> None:
    """pyroute2 itself and the real kernel, in which nothing is changed: there is no such rule."""
    gone: dict[str, Any] = {"family": 2, "priority": 31337, "fwmark": 0x7A3, "table": 4_000_000_001}
    with pytest.raises(OSError) as caught:
        writer().write("rule", "del", gone)
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
