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
from tproxyd.kernel import items, netlink
from tproxyd.kernel.firewall import FULL_MASK
from tproxyd.kernel.items import LO
from tproxyd.kernel.netlink import RTM_DELROUTE, RTM_DELRULE, RTM_GETROUTE, RTM_GETRULE, Netlink
from tproxyd.kernel.state import NUMBERS, PolicyRule, Route

_RTM_DELADDR = 21  # linux/rtnetlink.h
_IFA_LOCAL = 2  # linux/if_addr.h
_UNSPEC, _BOOT = 0, 3  # protocol numbers: of Go's netlink, and of `ip`


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
        for address, length, protocol in reader.addresses(LO):
            if (address, length) == (PASSTHROUGH_V6, 128) and protocol not in NUMBERS:
                packed = socket.inet_pton(socket.AF_INET6, address)
                body = struct.pack("=BBBBi", socket.AF_INET6, length, 0, 0, LO)
                body += netlink.attribute(_IFA_LOCAL, packed)
                yield Leftover(f"istio-iptables' {address}/128 on lo", _RTM_DELADDR, body)


def _list(reader: Netlink, kind: int, family: int, table: int) -> list[netlink.Item]:
    try:
        return [each for each in reader.list(kind, family, table=table) if each.family == family]
    except OSError:  # there is no such table, or no IPv6: nothing has been left there
        return []


def _is_rule(item: netlink.Item, mark: int, table: int) -> bool:
    match items.rule(item):
        case PolicyRule(_, _, value, mask, to, protocol):
            return (value, mask, to) == (mark, FULL_MASK, table) and protocol in (_UNSPEC, _BOOT)
    return False


def _is_route(item: netlink.Item, table: int) -> bool:
    match items.route(item):
        case Route(_, of, protocol, destination):
            return (of, destination) == (table, "default") and protocol in (_UNSPEC, _BOOT)
    return False
