"""A strict kernel in memory: the World that reconcile changes, with a temper.

It behaves as the kernel does (a route's place can be taken by somebody else, two equal rules are
two rules) and is stricter where that finds mistakes: adding what is there, removing what is not,
writing a value that already stands is an AssertionError, so a reconcile that writes too much fails
its test. It prints itself. Things of other programs are in the same lists and carry other numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tproxyd.errors import KernelError
from tproxyd.kernel.desired import Facts
from tproxyd.kernel.firewall import Firewall
from tproxyd.kernel.state import (
    FWMARK_ACCEPT,
    OURS,
    OURS_AND_SYSCTL,
    Change,
    KernelState,
    PolicyRule,
    Route,
    Sysctl,
    UnknownRoute,
    UnknownRule,
    render,
)


class Crash(BaseException):
    """SIGKILL: nothing runs after it, whatever except clauses there are."""


class FakeKernel:
    """`before_write` is called ahead of each write: it may raise a KernelError, or Crash."""

    def __init__(
        self,
        *,
        ipv6: bool = True,
        host_netns: bool = False,
        accept_mark: int = 0,
        accept_mark_writable: bool = True,
        lo_up: bool = True,
    ) -> None:
        self.ipv6, self.host_netns, self.lo_up = ipv6, host_netns, lo_up
        self.accept_mark, self.accept_mark_writable = accept_mark, accept_mark_writable
        self.routes: list[Route | UnknownRoute] = []
        self.rules: list[PolicyRule | UnknownRule] = []
        self.firewall: Firewall = ()
        self.foreign_tables = ["table ip nat { … }"]
        self.before_write: Callable[[Change], None] = lambda change: None
        self.unreadable: KernelError | None = None  # what read_firewall raises
        self.written: list[str] = []
        self._locked = False

    # The World ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        assert not self._locked, "locked twice"
        self._locked = True
        try:
            yield
        finally:
            self._locked = False

    def facts(self) -> Facts:
        return Facts(
            ipv6=self.ipv6,
            host_netns=self.host_netns,
            accept_mark_before=self.accept_mark == 1 and not self.remembers,
            accept_mark_writable=self.accept_mark_writable,
            lo_up=self.lo_up,
        )

    def read_routing(self) -> KernelState:
        assert self._locked, "read without the lock"
        held = self.remembers and self.accept_mark
        return KernelState(
            sysctls=(Sysctl(FWMARK_ACCEPT, self.accept_mark),) if held else (),
            routes=tuple(filter(is_ours, self.routes)),
            rules=tuple(filter(is_ours, self.rules)),
        )

    def read_firewall(self) -> Firewall:
        assert self._locked, "read without the lock"
        if self.unreadable is not None:
            raise self.unreadable
        return self.firewall

    def apply(self, change: Change) -> None:
        assert self._locked, "written without the lock"
        self.before_write(change)
        match change.old, change.new:
            case _, Sysctl(name, value):
                self._write(name, value)
            case Sysctl(name), None:
                self._write(name, 0)
            case old, Route() as new:
                self._add_route(old, new)
            case (Route() | UnknownRoute()) as old, None:
                self._remove(self.routes, old)
            case old, PolicyRule() as new:
                assert new not in self.rules, f"a second {new}\n{self}"
                self.rules.append(new)
                if old is not None:
                    self._remove(self.rules, old)
            case (PolicyRule() | UnknownRule()) as old, None:
                self._remove(self.rules, old)
            case tuple() as firewall, tuple() as new:
                assert firewall == self.firewall, f"replaces what is not there\n{self}"
                assert firewall != new, f"replaces by the same\n{self}"
                self.firewall = new
            case _:
                raise AssertionError(f"no such change: {change!r}")
        self.written.append(str(change))

    # Behaviour ------------------------------------------------------------------------------------

    @property
    def remembers(self) -> bool:
        """Some item says that tcp_fwmark_accept was 0 before us."""
        return any(
            getattr(item, "protocol", None) == OURS_AND_SYSCTL
            for item in (*self.routes, *self.rules)
        )

    def _write(self, name: str, value: int) -> None:
        assert name == FWMARK_ACCEPT, name
        assert self.remembers, f"{name} is written and nothing would remember it\n{self}"
        assert value != self.accept_mark, f"{name} is {value} already\n{self}"
        if not self.accept_mark_writable:
            raise KernelError(f"set {name}={value}", "Read-only file system", "use conntrack")
        self.accept_mark = value

    def _add_route(self, old: object, new: Route) -> None:
        assert self.ipv6 or new.family == 4, f"{new}, without IPv6"
        if old is not None:
            assert old in self.routes, f"{old} is not there to be replaced\n{self}"
            self.routes[self.routes.index(old)] = new
            return
        taken = [route for route in self.routes if route.slot == new.slot]
        assert not any(map(is_ours, taken)), f"{new} stands in the place of {taken}\n{self}"
        if taken:
            raise KernelError(f"add {new}", "File exists", "choose another table")
        if not self.lo_up:
            raise KernelError(f"add {new}", "Network is down", "ip link set lo up")
        self.routes.append(new)

    def _remove(
        self, items: list[Route | UnknownRoute] | list[PolicyRule | UnknownRule], old: object
    ) -> None:
        assert old in items, f"{old} is not there to be removed\n{self}"
        items.remove(old)  # type: ignore[arg-type]

    def __str__(self) -> str:
        ours = KernelState((), tuple(self.routes), tuple(self.rules), self.firewall)
        return f"{render(ours)}{FWMARK_ACCEPT}={self.accept_mark}\n{self.foreign_tables}\n"


def is_ours(item: Route | UnknownRoute | PolicyRule | UnknownRule) -> bool:
    return getattr(item, "protocol", OURS) in (OURS, OURS_AND_SYSCTL)
