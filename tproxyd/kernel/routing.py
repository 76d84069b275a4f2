"""Policy rules and local routes, read and written; and the sysctls. The only pyroute2 importer.

What is read is read with netlink.py, what is written goes through pyroute2. That is imported for
the first write, since it is 10 MB in a process that may only ever look, and in part (`_Pyroute2`);
it runs an event loop of its own inside, so nothing here may be called where an asyncio loop runs.
What is built on:

- Ours is what carries one of our protocol numbers (state.py), in every table.
- A route that somebody else has put at our place is not replaced (NLM_F_EXCL): it would be gone
  after clean. One of ours that only has the other number is replaced, which is atomic.
- The kernel takes two rules that differ in their protocol number only, or not even in that if they
  have no priority. Deleting compares the number, so a foreign twin of our rule survives. (Run on
  Linux 6.18; FRA_PROTOCOL is older than anything we support: 4.17.)
- `ip link set lo down` deletes the IPv6 routes, and `lo up` does not bring them back.
- The loopback device has index 1 in every network namespace (LOOPBACK_IFINDEX, net/flow.h).
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from tproxyd.addr import fold
from tproxyd.errors import KernelError
from tproxyd.kernel import items, netlink, sysctls
from tproxyd.kernel.chains import mark_mask
from tproxyd.kernel.desired import Facts
from tproxyd.kernel.firewall import Family
from tproxyd.kernel.netlink import RTM_DELROUTE, RTM_DELRULE, RTM_GETROUTE, RTM_GETRULE, Item
from tproxyd.kernel.state import (
    MARK_SYSCTLS,
    NUMBERS,
    Address,
    Change,
    KernelState,
    PolicyRule,
    Route,
    Sysctl,
    UnknownRoute,
    UnknownRule,
    remembered,
)

_LENGTH: dict[Family, int] = {4: 32, 6: 128}  # of an address in bits

# include/uapi/linux/rtnetlink.h, if.h
_RT_TABLE_LOCAL = 255
_IFF_UP = 1
_HINTS = {
    errno.EPERM: "run it as root, or give it CAP_NET_ADMIN",
    errno.EAGAIN: "try again",
    errno.EACCES: "run it as root, or give it CAP_NET_ADMIN",
    errno.EROFS: 'set it from outside (docker: --sysctl), or use return_path = "conntrack"',
    errno.EEXIST: "another program's is in its place: remove that, or choose another `table`",
    errno.ENETDOWN: "ip link set lo up",
    errno.EOPNOTSUPP: "does this kernel have policy routing (CONFIG_IP_MULTIPLE_TABLES)?",
    errno.EAFNOSUPPORT: "does this kernel have policy routing (CONFIG_IPV6_MULTIPLE_TABLES)?",
}
_NO_HINT = "`tproxyd doctor` looks at everything that this needs"
_GONE = (errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL)
_NO_FAMILY = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT)


class Routing:
    """The sockets of one reconcile, opened on first use; close it."""

    def __init__(self) -> None:
        self._netlink: netlink.Netlink | None = None
        self._pyroute2: Any = None
        self._read: tuple[list[Item], list[Item]] | None = None  # until something is changed

    def close(self) -> None:
        for each in (self._netlink, self._pyroute2):
            if each is not None:
                each.close()
        self._netlink = self._pyroute2 = self._read = None

    def facts(self) -> Facts:
        """What `desired` must know of this machine."""
        owned = _remembered(*self._ours())
        return Facts(
            ipv6=sysctls.ipv6(),
            host_netns=in_host_netns(),
            set_before=frozenset(name for name in MARK_SYSCTLS if sysctls.value(name)) - owned,
            sysctls_writable=all(sysctls.is_writable(name) for name in MARK_SYSCTLS),
            lo_up=self._lo_up(),
            own=self._own(),
            ip_tables=(4, 6) if os.path.exists("/proc/net/if_inet6") else (4,),
        )

    def read(self) -> KernelState:
        """Ours, without the firewall; a sysctl only while something remembers that it is ours."""
        routes, rules = self._ours()
        owned = _remembered(routes, rules)
        values = ((name, sysctls.value(name)) for name in MARK_SYSCTLS if name in owned)
        return KernelState(
            sysctls=tuple(Sysctl(name, value) for name, value in values if value),
            routes=tuple(map(items.route, routes)),
            rules=tuple(map(items.rule, rules)),
            addresses=tuple(self._addresses()),
        )

    def _addresses(self) -> list[Address]:
        try:
            found = self._reader().addresses(items.LO)
        except OSError as error:
            if error.errno in _NO_FAMILY:
                return []
            raise _refusal("read the addresses of lo", error) from error
        return [
            Address(address, protocol)
            for address, length, protocol in found
            if protocol in NUMBERS and length == 128
        ]

    def apply(self, change: Change) -> None:
        """Make one change to a sysctl, route or rule; KernelError when the kernel refuses."""
        self._read = None
        match change.old, change.new:
            case _, Sysctl() as new:
                self._write(new.name, new.value)
            case Sysctl() as old, None:
                self._write(old.name, 0)
            case None, Route() as new:
                self._ask(change, "route", "add", **items.route_arguments(new))
            case _, Route() as new:
                self._ask(change, "route", "replace", **items.route_arguments(new))
            case Route() as old, None:
                self._drop(change, "route", "del", **items.route_arguments(old))
            case None, Address() as new:
                self._ask(change, "addr", "add", **items.address_arguments(new))
            case Address() as old, Address() as new:
                self._drop(change, "addr", "del", **items.address_arguments(old))
                self._ask(change, "addr", "add", **items.address_arguments(new))
            case Address() as old, None:
                self._drop(change, "addr", "del", **items.address_arguments(old))
            case None, PolicyRule() as new:
                self._ask(change, "rule", "add", **items.rule_arguments(new))
            case PolicyRule() as old, PolicyRule() as new:
                self._ask(change, "rule", "add", **items.rule_arguments(new))
                self._drop(change, "rule", "del", **items.rule_arguments(old))
            case PolicyRule() as old, None:
                self._drop(change, "rule", "del", **items.rule_arguments(old))
            case (UnknownRoute() | UnknownRule()) as old, None:
                self._drop_unknown(change, old)
            case _:
                raise AssertionError(f"not for routing: {change}")

    def clashes(self, mark: int, table: int, priority: int) -> tuple[str, ...]:
        """What others have in our way, in sentences: routes in our table, rules for our mark."""
        found: list[str] = []
        ours = mark_mask(mark)
        for family in items.AF:
            for item in self._list(RTM_GETROUTE, family, table=table):
                if item.protocol not in NUMBERS and item.number(netlink.TABLE) == table:
                    where = f"{item.address(netlink.DST) or 'default'}/{item.dst_len}"
                    found.append(f"table {table} has another program's IPv{family} route: {where}")
            for item in self._list(RTM_GETRULE, family):
                if item.number(netlink.RULE_PROTOCOL) in NUMBERS:
                    continue
                at, to = item.number(netlink.PRIORITY) or 0, item.number(netlink.TABLE)
                rule = f"another program's IPv{family} rule at priority {at}"
                value, mask = item.number(netlink.RULE_MARK), items.mask_of(item)
                if to == table:
                    found.append(f"{rule} sends packets to table {table}")
                elif value is not None and not (mark ^ value) & mask & ours:
                    found.append(f"{rule} is for packets of mark {value:#x}, which is ours")
                elif at == priority:
                    found.append(f"{rule} has the place of ours")
        return tuple(found)

    def _ask(self, action: object, method: str, *words: str, **fields: object) -> None:
        """Call a method of pyroute2's socket; KernelError for this action where it is refused."""
        pyroute2 = _pyroute2()
        if self._pyroute2 is None:
            self._pyroute2 = pyroute2.IPRoute(strict_check=True)
        try:
            list(getattr(self._pyroute2, method)(*words, **fields))
        except pyroute2.NetlinkError as error:
            raise _refusal(action, OSError(error.code, os.strerror(error.code))) from error

    def _write(self, name: str, value: int) -> None:
        try:
            sysctls.write(name, value)
        except OSError as error:
            raise _refusal(f"set {name}={value}", error) from error

    def _drop(self, action: object, method: str, *words: str, **fields: object) -> None:
        """A removal: that it is gone already is what was wanted."""
        try:
            self._ask(action, method, *words, **fields)
        except KernelError as error:
            if error.__cause__.code not in _GONE:  # type: ignore[union-attr]
                raise

    def _drop_unknown(self, action: object, what: UnknownRoute | UnknownRule) -> None:
        """The first that reads so: of two equal ones only one goes."""
        routes, rules = self._ours()
        is_route = isinstance(what, UnknownRoute)
        read: Callable[[Item], object] = items.route if is_route else items.rule
        found = next((item for item in (routes if is_route else rules) if read(item) == what), None)
        self._read = None
        if found is None:
            return
        try:
            kind = RTM_DELROUTE if is_route else RTM_DELRULE
            self._reader().remove(kind, found)
        except OSError as error:
            if error.errno not in _GONE:
                raise _refusal(action, error) from error

    def _ours(self) -> tuple[list[Item], list[Item]]:
        """Our routes and our rules, as they are listed."""
        if self._read is not None:
            return self._read
        routes: list[Item] = []
        rules: list[Item] = []
        for family in items.AF:
            for number in NUMBERS:
                found = self._list(RTM_GETROUTE, family, protocol=number)
                routes += [item for item in found if item.protocol == number]
            found = self._list(RTM_GETRULE, family)
            rules += [item for item in found if item.number(netlink.RULE_PROTOCOL) in NUMBERS]
        self._read = routes, rules
        return self._read

    def _own(self) -> frozenset[str]:
        """The addresses of this host, without those that are such through us."""
        return frozenset(
            fold(host)
            for family in items.AF
            for item in self._list(
                RTM_GETROUTE, family, table=_RT_TABLE_LOCAL, action=items.RTN_LOCAL
            )
            if item.action == items.RTN_LOCAL and item.dst_len == _LENGTH[family]
            if item.protocol not in NUMBERS and (host := item.address(netlink.DST))
        )

    def _list(self, kind: int, family: Family, **only: int) -> list[Item]:
        try:
            listed = self._reader().list(kind, items.AF[family], **only)
        except OSError as error:
            # There is no such table; or no IPv6.
            if error.errno in _GONE or (family == 6 and error.errno in _NO_FAMILY):
                return []
            raise _refusal(f"read the IPv{family} routes and rules", error) from error
        # A kernel without IPv6 may also answer with what it has of all families.
        return [item for item in listed if item.family == items.AF[family]]

    def _reader(self) -> netlink.Netlink:
        if self._netlink is None:
            self._netlink = netlink.Netlink()
        return self._netlink

    def _lo_up(self) -> bool:
        try:
            return bool(self._reader().link_flags(items.LO) & _IFF_UP)
        except OSError as error:
            raise _refusal("look at lo", error) from error


def _refusal(action: object, error: OSError) -> KernelError:
    hint = _HINTS.get(error.errno or 0, _NO_HINT)
    return KernelError(str(action), error.strerror or str(error), hint)


def prepare() -> None:
    """Import now what the first write needs."""
    _pyroute2()


def in_host_netns() -> bool:
    """The tables of net.core that are not per namespace exist in the first namespace only."""
    return os.path.exists("/proc/sys/net/core/netdev_max_backlog")


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


def _remembered(routes: list[Item], rules: list[Item]) -> frozenset[str]:
    """The sysctls of which some item of ours says that they were 0 before us."""
    numbers = {item.protocol for item in routes}
    numbers |= {item.number(netlink.RULE_PROTOCOL) or 0 for item in rules}
    return frozenset(name for number in numbers for name in remembered(number))
