"""The routing that istio-iptables itself has left, in the place of which ours comes.

That program forgets its policy rules, routes and address: its own cleaning leaves them, and they
carry no name. But they have one shape each, for a mark and a table, and that is what is looked for:

    ip rule add fwmark MARK lookup TABLE            of any priority, as often as it ran
    ip route add local default dev lo table TABLE
    ip -6 addr add ::6/128 dev lo

Only where istio-iptables is spoken for, by its own command line: to other commands they are some
other program's.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tproxyd.errors import KernelError
from tproxyd.istio.options import PASSTHROUGH_V6
from tproxyd.kernel import netlink
from tproxyd.kernel.netlink import RTM_DELROUTE, RTM_DELRULE, RTM_GETROUTE, RTM_GETRULE, Netlink
from tproxyd.kernel.state import NUMBERS

_LO = 1
_FULL_MASK = 0xFFFF_FFFF
# linux/rtnetlink.h, fib_rules.h, if_addr.h
_RTM_DELADDR = 21
_RTN_LOCAL, _FR_ACT_TO_TBL = 2, 1
_IFA_LOCAL = 2
_UNSPEC, _BOOT = 0, 3  # protocol numbers: of Go's netlink, and of `ip`
_RULE_HAS = {
    *(netlink.TABLE, netlink.PRIORITY, netlink.RULE_PROTOCOL),
    *(netlink.RULE_MARK, netlink.RULE_MASK, netlink.RULE_SUPPRESS_PREFIXLEN),
}


class Leftover(NamedTuple):
    text: str
    removal: int  # the kind of message, and its body
    body: bytes


def find(mark: int, table: int) -> list[Leftover]:
    """Raises KernelError."""
    try:
        with contextlib.closing(Netlink()) as reader:
            return list(_found(reader, mark, table))
    except OSError as error:
        action = "look for what istio-iptables has left"
        raise KernelError(action, error.strerror or str(error), "try again") from error


def remove(leftovers: list[Leftover]) -> None:
    """Raises KernelError."""
    for each in leftovers:
        try:
            with contextlib.closing(Netlink()) as writer:
                writer.write(each.removal, each.body)
        except OSError as error:
            hint = "run it as root, or give it CAP_NET_ADMIN"
            action = f"remove {each.text}"
            raise KernelError(action, error.strerror or str(error), hint) from error


def _found(reader: Netlink, mark: int, table: int) -> Iterator[Leftover]:
    for family in (socket.AF_INET, socket.AF_INET6):
        ip = "ip -6" if family == socket.AF_INET6 else "ip -4"
        for rule in _list(reader, RTM_GETRULE, family, 0):
            if _is_rule(rule, mark, table):
                text = f"istio-iptables' {ip} rule fwmark {mark:#x} lookup {table}"
                yield Leftover(text, RTM_DELRULE, rule.raw)
        for route in _list(reader, RTM_GETROUTE, family, table):
            if _is_route(route, table):
                text = f"istio-iptables' {ip} route local default dev lo table {table}"
                yield Leftover(text, RTM_DELROUTE, route.raw)
    with contextlib.suppress(OSError):  # no IPv6
        for address, length, protocol in reader.addresses(_LO):
            if (address, length) == (PASSTHROUGH_V6, 128) and protocol not in NUMBERS:
                packed = socket.inet_pton(socket.AF_INET6, address)
                body = struct.pack("=BBBBi", socket.AF_INET6, length, 0, 0, _LO)
                body += struct.pack("=HH", 20, _IFA_LOCAL) + packed
                yield Leftover(f"istio-iptables' {address}/128 on lo", _RTM_DELADDR, body)


def _list(reader: Netlink, kind: int, family: int, table: int) -> list[netlink.Item]:
    try:
        return [each for each in reader.list(kind, family, table=table) if each.family == family]
    except OSError:  # there is no such table, or no IPv6: nothing has been left there
        return []


def _is_rule(rule: netlink.Item, mark: int, table: int) -> bool:
    return (
        rule.action == _FR_ACT_TO_TBL
        and rule.dst_len == rule.src_len == rule.tos == rule.flags == 0
        and rule.number(netlink.RULE_MARK) == mark
        and rule.number(netlink.RULE_MASK) in (None, _FULL_MASK)
        and rule.number(netlink.TABLE) == table
        and rule.number(netlink.RULE_PROTOCOL) in (None, _UNSPEC, _BOOT)
        and rule.number(netlink.RULE_SUPPRESS_PREFIXLEN) in (None, _FULL_MASK)
        and rule.attributes.keys() <= _RULE_HAS
    )


def _is_route(route: netlink.Item, table: int) -> bool:
    return (
        route.action == _RTN_LOCAL
        and route.dst_len == route.src_len == route.tos == 0
        and route.number(netlink.OIF) == _LO
        and route.number(netlink.TABLE) == table
        and route.protocol in (_UNSPEC, _BOOT)
    )
