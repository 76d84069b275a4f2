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
    MARK_SYSCTLS,
    NUMBERS,
    OURS,
    REFLECT_V6,
    Address,
    Change,
    KernelState,
    PolicyRule,
    Route,
    Sysctl,
    Tables,
    UnknownRoute,
    UnknownRule,
    remembered,
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
        sysctls: tuple[int, int, int] = (0, 0, 0),
        writable: bool = True,
        lo_up: bool = True,
        own: frozenset[str] = frozenset(),
        legacy_rules: bool = False,
        nft: bool = True,
    ) -> None:
        self.legacy_rules, self.nft = legacy_rules, nft
        self.tables: dict[tuple[object, ...], Tables] = {}
        self.addresses: list[Address] = []
        self.ipv6, self.host_netns, self.lo_up, self.own = ipv6, host_netns, lo_up, own
        self.sysctls = dict(zip(MARK_SYSCTLS, sysctls, strict=True))
        self.writable = writable
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
            set_before=frozenset(n for n, value in self.sysctls.items() if value) - self.remembers,
            sysctls_writable=self.writable,
            lo_up=self.lo_up,
            own=self.own,
            legacy_rules=self.legacy_rules,
            nft=self.nft,
        )

    def read_routing(self) -> KernelState:
        assert self._locked, "read without the lock"
        held = self.remembers
        return KernelState(
            sysctls=tuple(
                Sysctl(name, OURS) for name, value in self.sysctls.items() if value and name in held
            ),
            routes=tuple(filter(is_ours, self.routes)),
            rules=tuple(filter(is_ours, self.rules)),
            addresses=tuple(self.addresses),
        )

    def read_firewall(self) -> Firewall:
        assert self._locked, "read without the lock"
        if self.unreadable is not None:
            raise self.unreadable
        return self.firewall

    def read_tables(self) -> tuple[Tables, ...]:
        assert self._locked, "read without the lock"
        return tuple(self.tables.values())

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
            case None, Address() as new:
                assert new not in self.addresses, f"{new} is there already\n{self}"
                self.addresses.append(new)
            case Address() as old, None:
                self.addresses.remove(old)
            case old, Tables() as tables:
                assert self.tables.get(tables.slot) == old, f"replaces what is not there\n{self}"
                assert tables != old, f"replaces by the same\n{self}"
                self.tables[tables.slot] = tables
            case Tables() as old, None:
                assert self.tables.pop(old.slot, None) == old, f"{old} is not there\n{self}"
            case _:
                raise AssertionError(f"no such change: {change!r}")
        self.written.append(str(change))

    # Behaviour ------------------------------------------------------------------------------------

    @property
    def remembers(self) -> frozenset[str]:
        """The sysctls of which they themselves or some item says that they were 0 before us."""
        items = (*self.routes, *self.rules)
        told = (name for item in items for name in remembered(getattr(item, "protocol", None)))
        return frozenset((*told, *(n for n, value in self.sysctls.items() if value == OURS)))

    def _write(self, name: str, value: int) -> None:
        assert name in self.remembers, f"{name} is written, nothing would remember it\n{self}"
        assert value != self.sysctls[name], f"{name} is {value} already\n{self}"
        assert self.ipv6 or name != REFLECT_V6, f"{name}, without IPv6"
        if not self.writable:
            raise KernelError(f"set {name}={value}", "Read-only file system", "use conntrack")
        self.sysctls[name] = value

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
        tables = tuple(self.tables.values())
        addresses = tuple(self.addresses)
        ours = KernelState(
            *((), tuple(self.routes), tuple(self.rules), self.firewall, tables, addresses)
        )
        return f"{render(ours)}{self.sysctls}\n{self.foreign_tables}\n"


def is_ours(item: Route | UnknownRoute | PolicyRule | UnknownRule) -> bool:
    return getattr(item, "protocol", OURS) in NUMBERS
