"""Routes, policy rules and addresses as netlink has them, to and from the state."""

from __future__ import annotations

import socket

from tproxyd.kernel import netlink
from tproxyd.kernel.firewall import FULL_MASK, Family
from tproxyd.kernel.netlink import Item
from tproxyd.kernel.state import Address, PolicyRule, Route, UnknownRoute, UnknownRule

LO = 1
AF: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}

# include/uapi/linux/rtnetlink.h, fib_rules.h
RTN_LOCAL = 2
_RT_SCOPE_HOST = 254
_FR_ACT_TO_TBL = 1
# The metric that IPv6 gives to a route without one (IP6_RT_PRIO_USER, include/linux/ipv6_route.h).
_METRIC_V6 = 1024
_ROUTE_ATTRIBUTES = {
    *(netlink.DST, netlink.TABLE, netlink.OIF, netlink.PRIORITY),
    *(netlink.ROUTE_CACHEINFO, netlink.ROUTE_PREF),
}
_RULE_ATTRIBUTES = {
    *(netlink.TABLE, netlink.PRIORITY, netlink.RULE_PROTOCOL),
    *(netlink.RULE_MARK, netlink.RULE_MASK),
    netlink.RULE_SUPPRESS_PREFIXLEN,  # always listed; all ones = not used
}


def route(item: Item) -> Route | UnknownRoute:
    family: Family = 4 if item.family == socket.AF_INET else 6
    table, number = item.number(netlink.TABLE) or item.table, item.protocol
    where = f"{item.address(netlink.DST) or 'default'}/{item.dst_len}"
    destination = "default" if item.dst_len == 0 else where
    usual = (
        item.action == RTN_LOCAL
        and item.src_len == item.tos == 0
        and item.number(netlink.OIF) == LO
        and item.number(netlink.PRIORITY) in (None, _METRIC_V6)
        and item.attributes.keys() <= _ROUTE_ATTRIBUTES
    )
    if usual:
        return Route(family, table, number, destination)
    via = f"via {item.address(netlink.GATEWAY)} dev {item.number(netlink.OIF)}"
    metric = f"metric {item.number(netlink.PRIORITY)}"
    text = f"{where} type {item.action} {via} {metric} table {table} proto {number}"
    return UnknownRoute(family, text)


def route_arguments(route: Route) -> dict[str, object]:
    everything = "default" if route.family == 4 else "::/0"
    return {
        "family": AF[route.family],
        "type": "local",
        "dst": everything if route.destination == "default" else route.destination,
        "oif": LO,
        "scope": _RT_SCOPE_HOST,
        "table": route.table,
        "proto": route.protocol,
    }


def address_arguments(address: Address) -> dict[str, object]:
    return {
        "family": socket.AF_INET6,
        "address": address.address,
        "prefixlen": 128,
        "index": LO,
        "proto": address.protocol,
    }


def rule(item: Item) -> PolicyRule | UnknownRule:
    family: Family = 4 if item.family == socket.AF_INET else 6
    mark, table = item.number(netlink.RULE_MARK), item.number(netlink.TABLE) or item.table
    priority = item.number(netlink.PRIORITY) or 0
    number = item.number(netlink.RULE_PROTOCOL) or 0
    usual = (
        mark is not None
        and item.action == _FR_ACT_TO_TBL
        and item.dst_len == item.src_len == item.tos == item.flags == 0
        and item.number(netlink.RULE_SUPPRESS_PREFIXLEN) in (None, FULL_MASK)
        and item.attributes.keys() <= _RULE_ATTRIBUTES
    )
    if usual and mark is not None:
        return PolicyRule(family, priority, mark, mask_of(item), table, number)
    more = " ".join(f"{kind}={value.hex()}" for kind, value in sorted(item.attributes.items()))
    return UnknownRule(family, f"priority {priority} action {item.action} protocol {number} {more}")


def mask_of(item: Item) -> int:
    mask = item.number(netlink.RULE_MASK)
    return FULL_MASK if mask is None else mask


def rule_arguments(rule: PolicyRule) -> dict[str, object]:
    return {
        "family": AF[rule.family],
        "priority": rule.priority,
        "fwmark": rule.mark,
        "fwmask": rule.mask,
        "table": rule.table,
        "protocol": rule.protocol,
    }
