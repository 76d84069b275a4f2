"""Policy rules and local routes, read and written; and the sysctls.

What is read is read here, with netlink.py; what is written is written by routewriter.py's process,
which the first write starts and `close` ends. What is removed as it was listed needs no such words.
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
import os
from collections.abc import Callable

from tproxyd.addr import fold
from tproxyd.errors import KernelError
from tproxyd.kernel import items, netlink, sysctls
from tproxyd.kernel.desired import Facts
from tproxyd.kernel.firewall import Family, mark_mask
from tproxyd.kernel.netlink import (
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETROUTE,
    RTM_GETRULE,
    Item,
)
from tproxyd.kernel.routewriter import Lost, RouteWriter
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
    """The socket and the process of one reconcile, from the first use; close it."""

    def __init__(self, writer: RouteWriter | None = None) -> None:
        self._netlink: netlink.Netlink | None = None
        self._writer = writer
        self._read: tuple[list[Item], list[Item]] | None = None  # until something is changed

    def close(self) -> None:
        for each in (self._netlink, self._writer):
            if each is not None:
                each.close()
        self._netlink = self._writer = self._read = None

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
                self._write_sysctl(new.name, new.value)
            case Sysctl() as old, None:
                self._write_sysctl(old.name, 0)
            case None, Route() as new:
                self._write(change, "route", "add", items.route_arguments(new))
            case _, Route() as new:
                self._write(change, "route", "replace", items.route_arguments(new))
            case Route() as old, None:
                self._drop(change, "route", items.route_arguments(old))
            case old, Address() as new:
                if isinstance(old, Address):
                    self._drop(change, "addr", items.address_arguments(old))
                self._write(change, "addr", "add", items.address_arguments(new))
            case Address() as old, None:
                self._drop(change, "addr", items.address_arguments(old))
            case old, PolicyRule() as new:
                self._write(change, "rule", "add", items.rule_arguments(new))
                if isinstance(old, PolicyRule):
                    self._drop(change, "rule", items.rule_arguments(old))
            case PolicyRule() as old, None:
                self._drop(change, "rule", items.rule_arguments(old))
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

    def _write(self, action: object, what: str, command: str, fields: dict[str, object]) -> None:
        try:
            if self._writer is None:
                self._writer = RouteWriter()
            self._writer.write(what, command, fields)
        except Lost as error:
            self._writer = None
            raise KernelError(str(action), str(error), "try again") from error
        except OSError as error:
            raise _refusal(action, error) from error

    def _drop(self, action: object, what: str, fields: dict[str, object]) -> None:
        """A removal: that it is gone already is what was wanted."""
        try:
            self._write(action, what, "del", fields)
        except KernelError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _GONE):
                raise

    def _write_sysctl(self, name: str, value: int) -> None:
        try:
            sysctls.write(name, value)
        except OSError as error:
            raise _refusal(f"set {name}={value}", error) from error

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


def in_host_netns() -> bool:
    """The tables of net.core that are not per namespace exist in the first namespace only."""
    return os.path.exists("/proc/sys/net/core/netdev_max_backlog")


def _remembered(routes: list[Item], rules: list[Item]) -> frozenset[str]:
    """The sysctls of which some item of ours says that they were 0 before us."""
    numbers = {item.protocol for item in routes}
    numbers |= {item.number(netlink.RULE_PROTOCOL) or 0 for item in rules}
    return frozenset(name for number in numbers for name in remembered(number))
