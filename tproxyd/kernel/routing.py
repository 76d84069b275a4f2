"""Policy rules, local routes and the sysctl: read and written; the only importer of pyroute2.

pyroute2 is imported on first use, since neither workers nor commands that touch no route should pay
for it, and in part (`_Pyroute2`). It runs an event loop of its own inside, so nothing here may be
called where an asyncio loop runs. What is built on:

- Ours is what carries one of our protocol numbers (state.py), in every table. The kernel
  filters the dump of routes (NETLINK_GET_STRICT_CHK, Linux ≥ 4.20): a router may have a million.
- A route that somebody else has put at our place is not replaced (NLM_F_EXCL): it would be gone
  after clean. One of ours that only has the other number is replaced, which is atomic.
- The kernel takes two rules that differ in their protocol number only, or not even in that if they
  have no priority. Deleting compares the number, so a foreign twin of our rule survives. (Run on
  Linux 6.18; FRA_PROTOCOL is older than anything we support: 4.17.)
- `ip link set lo down` deletes the IPv6 route, and `lo up` does not bring it back.
- /proc/sys/net is that of the calling thread's network namespace. It may be written with
  CAP_NET_ADMIN, but in most containers it is mounted read-only.
- The loopback device has index 1 in every network namespace (LOOPBACK_IFINDEX, net/flow.h).
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tproxyd.errors import KernelError
from tproxyd.kernel.desired import Facts, mark_mask
from tproxyd.kernel.firewall import FULL_MASK, Family
from tproxyd.kernel.state import (
    MARK_SYSCTLS,
    NUMBERS,
    Change,
    KernelState,
    PolicyRule,
    Route,
    Sysctl,
    UnknownRoute,
    UnknownRule,
    remembered,
)

_LO = 1
_AF: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}

# include/uapi/linux/rtnetlink.h, fib_rules.h, if.h
_RTN_LOCAL = 2
_RT_SCOPE_HOST = 254
_FR_ACT_TO_TBL = 1
_IFF_UP = 1
# The metric that IPv6 gives to a route without one (IP6_RT_PRIO_USER, include/linux/ipv6_route.h).
_METRIC_V6 = 1024
_ROUTE_ATTRIBUTES = {"RTA_TABLE", "RTA_OIF", "RTA_PRIORITY", "RTA_CACHEINFO", "RTA_PREF"}
_RULE_ATTRIBUTES = {
    *("FRA_TABLE", "FRA_PROTOCOL", "FRA_PRIORITY", "FRA_FWMARK", "FRA_FWMASK"),
    "FRA_SUPPRESS_PREFIXLEN",  # always listed; all ones = not used
}
# A dump during which somebody changed a table comes with gaps and says so; then it is repeated.
_DUMP_ATTEMPTS = 10

_HINTS = {
    errno.EPERM: "run it as root, or give it CAP_NET_ADMIN",
    errno.EACCES: "run it as root, or give it CAP_NET_ADMIN",
    errno.EROFS: 'set it from outside (docker: --sysctl), or use return_path = "conntrack"',
    errno.EEXIST: "another program's is in its place: remove that, or choose another `table`",
    errno.ENETDOWN: "ip link set lo up",
    errno.EOPNOTSUPP: "does this kernel have policy routing (CONFIG_IP_MULTIPLE_TABLES)?",
    errno.EAFNOSUPPORT: "does this kernel have policy routing (CONFIG_IPV6_MULTIPLE_TABLES)?",
}
_NO_HINT = "`tproxyd doctor` looks at everything that this needs"
_GONE = (errno.ENOENT, errno.ESRCH)
_NO_FAMILY = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT)


class Routing:
    """One netlink socket, opened on first use, for one reconcile; close it."""

    def __init__(self) -> None:
        self._socket: Any = None
        self._read: tuple[list[Any], list[Any]] | None = None  # until something is changed

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._read = None

    def facts(self) -> Facts:
        """What `desired` must know of this machine."""
        owned = _remembered(*self._ours())
        return Facts(
            ipv6=_ipv6(),
            host_netns=in_host_netns(),
            set_before=frozenset(name for name in MARK_SYSCTLS if _value(name)) - owned,
            sysctls_writable=all(_writable(name) for name in MARK_SYSCTLS),
            lo_up=self._lo_up(),
        )

    def read(self) -> KernelState:
        """Ours, without the firewall; a sysctl only while something remembers that it is ours."""
        routes, rules = self._ours()
        owned = _remembered(routes, rules)
        values = ((name, _value(name)) for name in MARK_SYSCTLS if name in owned)
        return KernelState(
            sysctls=tuple(Sysctl(name, value) for name, value in values if value),
            routes=tuple(map(_route, routes)),
            rules=tuple(map(_rule, rules)),
        )

    def apply(self, change: Change) -> None:
        """Make one change to a sysctl, route or rule; KernelError when the kernel refuses."""
        self._read = None
        match change.old, change.new:
            case _, Sysctl() as new:
                _write(new.name, new.value)
            case Sysctl() as old, None:
                _write(old.name, 0)
            case None, Route() as new:
                self._ask(change, "route", "add", **_route_arguments(new))
            case _, Route() as new:
                self._ask(change, "route", "replace", **_route_arguments(new))
            case Route() as old, None:
                self._drop(change, "route", "del", **_route_arguments(old))
            case None, PolicyRule() as new:
                self._ask(change, "rule", "add", **_rule_arguments(new))
            case PolicyRule() as old, PolicyRule() as new:
                self._ask(change, "rule", "add", **_rule_arguments(new))
                self._drop(change, "rule", "del", **_rule_arguments(old))
            case PolicyRule() as old, None:
                self._drop(change, "rule", "del", **_rule_arguments(old))
            case UnknownRoute() as old, None:
                match = _first(old, _route)
                self._drop(change, "flush_routes", family=_AF[old.family], match=match)
            case UnknownRule() as old, None:
                match = _first(old, _rule)
                self._drop(change, "flush_rules", family=_AF[old.family], match=match)
            case _:
                raise AssertionError(f"not for routing: {change}")

    def clashes(self, mark: int, table: int, priority: int) -> tuple[str, ...]:
        """What others have in our way, in sentences: routes in our table, rules for our mark."""
        found: list[str] = []
        ours = mark_mask(mark)
        for family, address_family in _AF.items():
            for message in self._dump(family, "route", {"family": address_family, "table": table}):
                if message["proto"] not in NUMBERS and message.get("table") == table:
                    where = f"{message.get('dst') or 'default'}/{message['dst_len']}"
                    found.append(f"table {table} has another program's IPv{family} route: {where}")
            for message in self._dump(family, "rule", {"family": address_family}):
                if message.get("protocol") in NUMBERS:
                    continue
                at, to = message.get("priority", 0), message.get("table")
                rule = f"another program's IPv{family} rule at priority {at}"
                value, mask = message.get("fwmark"), message.get("fwmask", FULL_MASK)
                if to == table:
                    found.append(f"{rule} sends packets to table {table}")
                elif value is not None and not (mark ^ value) & mask & ours:
                    found.append(f"{rule} is for packets of mark {value:#x}, which is ours")
                elif at == priority:
                    found.append(f"{rule} has the place of ours")
        return tuple(found)

    def _ask(self, action: object, method: str, *words: str, **fields: object) -> list[Any]:
        """Call a method of pyroute2's socket: the answers, or a KernelError for this action."""
        pyroute2 = _pyroute2()
        if self._socket is None:
            self._socket = pyroute2.IPRoute(strict_check=True)
        try:
            return list(getattr(self._socket, method)(*words, **fields))
        except pyroute2.NetlinkError as error:
            hint = _HINTS.get(error.code, _NO_HINT)
            raise KernelError(str(action), os.strerror(error.code), hint) from error

    def _drop(self, action: object, method: str, *words: str, **fields: object) -> None:
        """A removal: that it is gone already is what was wanted."""
        try:
            self._ask(action, method, *words, **fields)
        except KernelError as error:
            if _code(error) not in _GONE:
                raise

    def _ours(self) -> tuple[list[Any], list[Any]]:
        """Our routes and our rules, as netlink messages."""
        if self._read is not None:
            return self._read
        routes: list[Any] = []
        rules: list[Any] = []
        for family in _AF:
            for number in NUMBERS:
                routes += self._dump(family, "route", _of_protocol(family, number))
            found = self._dump(family, "rule", {"family": _AF[family]})
            rules += [message for message in found if message.get("protocol") in NUMBERS]
        self._read = routes, rules
        return self._read

    def _dump(self, family: Family, method: str, query: dict[str, object]) -> list[Any]:
        action = f"read the IPv{family} routes and rules"
        for _ in range(_DUMP_ATTEMPTS):
            try:
                messages = self._ask(action, method, "dump", **query)
            except _pyroute2().NetlinkDumpInterrupted:
                continue
            except KernelError as error:
                if family == 6 and _code(error) in _NO_FAMILY:
                    return []
                raise
            # A kernel without IPv6 may also answer with what it has of all families.
            return [message for message in messages if message["family"] == _AF[family]]
        raise KernelError(action, "they changed under every attempt to read them", "try again")

    def _lo_up(self) -> bool:
        (link,) = self._ask("look at lo", "link", "get", index=_LO)
        return bool(link["flags"] & _IFF_UP)


def in_host_netns() -> bool:
    """The tables of net.core that are not per namespace exist in the first namespace only."""
    return Path("/proc/sys/net/core/netdev_max_backlog").exists()


class _Pyroute2(NamedTuple):
    IPRoute: Any
    NetlinkError: Any
    NetlinkDumpInterrupted: Any
    RequestProcessor: Any


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
        from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError
        from pyroute2.requests.main import RequestProcessor
    finally:
        if stand_in is not None:
            del sys.modules["pyroute2"]
    return _Pyroute2(IPRoute, NetlinkError, NetlinkDumpInterrupted, RequestProcessor)


# Messages and items -------------------------------------------------------------------------------


def _of_protocol(family: Family, number: int) -> dict[str, object]:
    """Asks the kernel for one protocol's routes; pyroute2 would read all and filter by itself."""
    header = {"family": _AF[family], "proto": number}
    return {
        "request_filter": _pyroute2().RequestProcessor(context=header, prime=header),
        "dump_filter": lambda message: message["proto"] == number,  # where the kernel did not
    }


def _route(message: Any) -> Route | UnknownRoute:  # noqa: ANN401
    family: Family = 4 if message["family"] == socket.AF_INET else 6
    table, number = message.get("table"), message["proto"]
    usual = (
        message["type"] == _RTN_LOCAL
        and message["dst_len"] == message["src_len"] == message["tos"] == 0
        and message.get("oif") == _LO
        and message.get("priority") in (None, _METRIC_V6)
        and {name for name, _ in message["attrs"]} <= _ROUTE_ATTRIBUTES
    )
    if usual:
        return Route(family, table, number)
    where = f"{message.get('dst') or 'default'}/{message['dst_len']}"
    via = "".join(f" {key} {message.get(key)}" for key in ("gateway", "oif", "priority"))
    return UnknownRoute(family, f"{where} type {message['type']}{via} table {table} proto {number}")


def _route_arguments(route: Route) -> dict[str, object]:
    return {
        "family": _AF[route.family],
        "type": "local",
        "dst": "default" if route.family == 4 else "::/0",
        "oif": _LO,
        "scope": _RT_SCOPE_HOST,
        "table": route.table,
        "proto": route.protocol,
    }


def _rule(message: Any) -> PolicyRule | UnknownRule:  # noqa: ANN401
    family: Family = 4 if message["family"] == socket.AF_INET else 6
    mark, table = message.get("fwmark"), message.get("table")
    priority, number = message.get("priority", 0), message.get("protocol")
    usual = (
        mark is not None
        and message["action"] == _FR_ACT_TO_TBL
        and message["dst_len"] == message["src_len"] == message["tos"] == message["flags"] == 0
        and message.get("suppress_prefixlen") in (None, FULL_MASK)
        and {name for name, _ in message["attrs"]} <= _RULE_ATTRIBUTES
    )
    if usual:
        mask = message.get("fwmask", FULL_MASK)
        return PolicyRule(family, priority, mark, mask, table, number)
    return UnknownRule(family, f"priority {priority} {message['attrs']} protocol {number}")


def _rule_arguments(rule: PolicyRule) -> dict[str, object]:
    return {
        "family": _AF[rule.family],
        "priority": rule.priority,
        "fwmark": rule.mark,
        "fwmask": rule.mask,
        "table": rule.table,
        "protocol": rule.protocol,
    }


def _first(item: object, read: Callable[[Any], object]) -> Callable[[Any], bool]:
    """A filter for the first message that reads as `item`: of two equal ones only one goes."""
    seen: list[Any] = []

    def first(message: Any) -> bool:  # noqa: ANN401
        number = message["proto"] if "proto" in message else message.get("protocol")
        if seen or number not in NUMBERS or read(message) != item:
            return False
        seen.append(message)
        return True

    return first


def _remembered(routes: list[Any], rules: list[Any]) -> frozenset[str]:
    """The sysctls of which some item of ours says that they were 0 before us."""
    numbers = {message["proto"] for message in routes}
    numbers |= {message.get("protocol") for message in rules}
    return frozenset(name for number in numbers for name in remembered(number))


def _code(error: KernelError) -> int | None:
    return getattr(error.__cause__, "code", None)


# /proc/sys ----------------------------------------------------------------------------------------


def _path(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


def _value(name: str) -> int:
    """0 where the kernel has no such sysctl."""
    try:
        return int(_path(name).read_text())
    except OSError:
        return 0


def _writable(name: str) -> bool:
    """Opening says it without a change; access(2) asks for the real user, not the capabilities."""
    path = _path(name)
    if not path.exists():  # without IPv6: then it is not written either
        return True
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _write(name: str, value: int) -> None:
    try:
        _path(name).write_text(f"{value}\n")
    except OSError as error:
        why = error.strerror or str(error)
        hint = _HINTS.get(error.errno or 0, _NO_HINT)
        raise KernelError(f"set {name}={value}", why, hint) from error


def _ipv6() -> bool:
    """IPv6 sockets can be made, and lo has IPv6: without it our route has no device."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    name = "net.ipv6.conf.lo.disable_ipv6"
    return _path(name).exists() and _value(name) == 0
