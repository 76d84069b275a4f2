"""Packet rules as nft lists them: its JSON back to the algebra.

nft lays out what it lists in its own way: it merges neighbouring address ranges, writes bare what
was a set of one, leaves out a protocol match that another match implies, and its versions differ
(forms of 1.0.6 and later ones are accepted). Reading therefore goes back to the algebra, in which
one meaning has one form, and anything else is an Unknown. libnftables-json(5) has the format. Pure.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any, Literal

from tproxyd.addr import IPNetwork, PrefixSet
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Action,
    Chain,
    ConnMark,
    DestinationIn,
    Divert,
    Firewall,
    ForUs,
    Goto,
    Hook,
    Icmp,
    InInterface,
    IpVersion,
    Jump,
    KeepSource,
    MadeBy,
    Match,
    MeetsTransparentSocket,
    MeetsWildcardListener,
    NotTcp,
    OutInterface,
    PacketMark,
    PortIn,
    PortRanges,
    Redirect,
    Reply,
    RestoreMark,
    Rule,
    SaveMark,
    SetConnMark,
    SetPacketMark,
    SetZone,
    SourceIn,
    Syn,
    Tcp,
    Tproxy,
    Tracked,
    UdpPort,
    Unknown,
    Verdict,
)
from tproxyd.kernel.nftlang import BASES
from tproxyd.reader import merge_ranges

# The array "nftables" of nft's JSON. Any: it is taken apart by pattern here and nowhere else.
Listing = list[dict[str, Any]]


def parse(listing: Listing) -> Firewall:
    """The firewall that a listing of our table describes. Never (): the table is there."""
    hooks: dict[str, Hook | None] = {}
    rules: dict[str, list[Rule | Unknown]] = {}
    unknown: list[Unknown] = []
    for entry in listing:
        match entry:
            case {"metainfo": _}:
                pass
            case {"table": {"family": "inet", "name": _, "handle": _, **more}} if not more:
                pass
            case {"chain": {"name": str(name), "family": _, "table": _, "handle": _, **base}}:
                hooks[name] = _hook(base)
                rules[name] = []
                if base and hooks[name] is None:
                    unknown.append(Unknown(f"chain {name} {json.dumps(base)}"))
            case {"rule": {"chain": str(name), "expr": list(statements), **more}} if name in rules:
                # A comment in the kernel is not ours: we write none there.
                foreign = "comment" in more
                rules[name].append(_unknown(statements) if foreign else _rule(statements))
            case _:
                unknown.append(Unknown(json.dumps(entry)))
    chains = [Chain(name, hook, tuple(rules[name])) for name, hook in hooks.items()]
    return (*chains, *unknown) or (Unknown("an empty table"),)


def _hook(base: dict[Any, Any]) -> Hook | None:
    for hook, (kind, at, priority) in BASES.items():
        if base == {"type": kind, "hook": at, "prio": priority, "policy": "accept"}:
            return hook
    return None


def _unknown(statements: list[object]) -> Unknown:
    return Unknown(f"rule {json.dumps(statements)}")


# By number where there is no /etc/protocols; "icmpv6" where that is its name.
_ICMP: dict[str | int, int] = {"icmp": 4, 1: 4, "ipv6-icmp": 6, "icmpv6": 6, 58: 6}


def _rule(statements: list[object]) -> Rule | Unknown:
    try:
        matches: list[Match] = []
        for at, statement in enumerate(statements):
            match statement:
                case {"match": {"op": str(op), "left": left, "right": right}}:
                    matches.append(_parse_match(op, left, right))
                case _:
                    action = _parse_action(statements[at:])
                    return Rule(_without_implied(matches, action), action)
        return _unknown(statements)
    except (ValueError, TypeError):
        return _unknown(statements)


def _without_implied(matches: list[Match], action: Action) -> tuple[Match, ...]:
    """Without what another part of the rule says already: nft versions differ in listing that."""
    parts = (*matches, action)
    families = {
        part.family for part in parts if isinstance(part, SourceIn | DestinationIn | KeepSource)
    }
    tcp = isinstance(action, Tproxy | Redirect) or any(isinstance(m, PortIn | Syn) for m in matches)
    kept: list[Match] = []
    for match in matches:
        implied = (tcp and isinstance(match, Tcp)) or (
            isinstance(match, IpVersion) and match.family in families
        )
        if not implied:
            kept.append(match)
    return tuple(kept)


def _parse_match(op: str, left: object, right: object) -> Match:
    match left, op, right:
        case {"meta": {"key": "iifname"}}, "==", _:
            return InInterface(tuple(sorted(_text(name) for name in _elements(right))))
        case {"meta": {"key": "oifname"}}, "==", str(name):
            return OutInterface(name)
        case {"meta": {"key": "nfproto"}}, "==", "ipv4":
            return IpVersion(4)
        case {"meta": {"key": "nfproto"}}, "==", "ipv6":
            return IpVersion(6)
        # A number where there is no /etc/protocols (netbase), as in many containers.
        case {"meta": {"key": "l4proto"}}, "==", "tcp" | 6:
            return Tcp()
        case {"meta": {"key": "l4proto"}}, "!=", "tcp" | 6:
            return NotTcp()
        case {"meta": {"key": "l4proto"}}, "==", {"set": [_, _]}:
            if {_ICMP.get(_scalar(one)) for one in _elements(right)} == {4, 6}:
                return Icmp()
        case {"payload": {"protocol": "ip" | "ip6" as ip, "field": "saddr"}}, "==", _:
            return SourceIn(4 if ip == "ip" else 6, _prefixes(right))
        case {"payload": {"protocol": "ip" | "ip6" as ip, "field": "daddr"}}, "==" | "!=", _:
            return DestinationIn(4 if ip == "ip" else 6, _prefixes(right), op == "!=")
        case {"payload": {"protocol": "tcp", "field": "dport"}}, "==" | "!=", _:
            return PortIn(_ranges(right), negate=op == "!=")
        case {"payload": {"protocol": "udp", "field": "sport" | "dport" as key}}, "==", _:
            (ports,) = _ranges(right)
            return UdpPort("source" if key == "sport" else "destination", ports)
        case {"meta": {"key": "skuid" | "skgid" as key}}, "==" | "!=", _:
            owner: Literal["uid", "gid"] = "uid" if key == "skuid" else "gid"
            return MadeBy(owner, _ranges(right), negate=op == "!=")
        case {"fib": {"result": "type", "flags": ["daddr"] | "daddr"}}, "==" | "!=", "local":
            return ForUs(negate=op == "!=")
        case (
            {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, flags]},
            "==" | "!=",
            "syn",
        ):
            if _flags(flags) == {"fin", "syn", "rst", "ack"}:
                return Syn(negate=op == "!=")
        case {"&": [{"meta": {"key": "mark"}}, int(mask)]}, "==" | "!=", int(value):
            return PacketMark(value, mask, negate=op == "!=")
        case {"meta": {"key": "mark"}}, "==" | "!=", int(value):
            return PacketMark(value, FULL_MASK, negate=op == "!=")
        case {"&": [{"ct": {"key": "mark", **more}}, int(mask)]}, "==", int(value) if not more:
            return ConnMark(value, mask)
        case {"ct": {"key": "mark", **more}}, "==", int(value) if not more:
            return ConnMark(value, FULL_MASK)
        case {"ct": {"key": "state", **more}}, "in" | "==", _ if not more:
            return Tracked(tuple(sorted(map(_text, _flags(right)))))
        case {"ct": {"key": "direction", **more}}, "==", "reply" if not more:
            return Reply()
        case {"socket": {"key": "transparent"}}, "==", 1:
            return MeetsTransparentSocket()
        case {"socket": {"key": "wildcard"}}, "==", 1:
            return MeetsWildcardListener()
    raise ValueError(left)


def _parse_action(statements: list[object]) -> Action:
    match statements:
        case [{"accept": None}]:
            return Verdict.ACCEPT
        case [{"drop": None}]:
            return Verdict.DROP
        case [{"return": None}]:
            return Verdict.RETURN
        case [{"jump": {"target": str(chain)}}]:
            return Jump(chain)
        case [{"reject": {"type": "tcp reset", **more}}] if not more:
            return Verdict.RESET
        case [{"goto": {"target": str(chain)}}]:
            return Goto(chain)
        case [
            {"tproxy": {"family": "ip" | "ip6" as ip, "port": int(port), **more}},
            *marks,
            {"accept": None},
        ] if not more and len(marks) < 2:
            mark = _packet_mark(marks[0]) if marks else None
            return Tproxy(4 if ip == "ip" else 6, port, mark)
        case [{"redirect": {"port": int(port), **more}}] if not more:
            return Redirect(port)
        case [{"snat": {"family": "ip" | "ip6" as ip, "addr": {"payload": field}, **more}}] if (
            not more and field == {"protocol": ip, "field": "saddr"}
        ):
            return KeepSource(4 if ip == "ip" else 6)
        case [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"ct": {"key": "mark"}}}}]:
            return RestoreMark()
        case [{"mangle": {"key": {"ct": {"key": "mark"}}, "value": {"meta": {"key": "mark"}}}}]:
            return SaveMark()
        case [{"mangle": {"key": {"ct": {"key": "zone"}}, "value": int(zone)}}]:
            return SetZone(zone)
        case [{"mangle": _} as write, {"accept": None}]:
            return Divert(_packet_mark(write))
        case [{"mangle": {"key": {"meta": _}}} as write]:
            return _packet_mark(write)
        case [{"mangle": {"key": {"ct": {"key": "mark"}} as key, "value": value}}]:
            return SetConnMark(*_mark_write(key, value))
    raise ValueError(statements)


def _packet_mark(statement: object) -> SetPacketMark:
    match statement:
        case {"mangle": {"key": {"meta": {"key": "mark"}} as key, "value": value}}:
            return SetPacketMark(*_mark_write(key, value))
    raise ValueError(statement)


def _mark_write(key: object, value: object) -> tuple[int, int]:
    """(value, mask) of `key set key & keep | value`: all bits that the result does not keep.

    nft 1.0.6 lists `keep` with the bits of `value` set, which means the same, and leaves it out
    where that makes it all ones.
    """
    match value:
        case int(full):
            return full, FULL_MASK
        case {"|": [{"&": [old, int(keep)]}, int(bits)]} if old == key:
            return bits, FULL_MASK ^ keep | bits
        case {"|": [old, int(bits)]} if old == key:
            return bits, bits
    raise ValueError(value)


def _elements(right: object) -> list[object]:
    """The elements of an anonymous set; a set of one is listed bare."""
    match right:
        case {"set": list(elements)}:
            return elements
        case list():
            raise ValueError("a list of flags")
        case _:
            return [right]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _scalar(value: object) -> str | int:
    if not isinstance(value, str | int):
        raise TypeError(value)
    return value


def _ranges(right: object) -> PortRanges:
    ranges: list[tuple[int, int]] = []
    for element in _elements(right):
        match element:
            case int(number):
                ranges.append((number, number))
            case {"range": [int(low), int(high)]}:
                ranges.append((low, high))
            case _:
                raise ValueError(element)
    return merge_ranges(ranges)


def _prefixes(right: object) -> PrefixSet:
    networks: list[IPNetwork] = []
    for element in _elements(right):
        match element:
            case str(address):
                networks.append(ipaddress.ip_network(address))
            case {"prefix": {"addr": str(address), "len": int(length)}}:
                networks.append(ipaddress.ip_network(f"{address}/{length}"))
            case {"range": [str(low), str(high)]}:
                ends = ipaddress.ip_address(low), ipaddress.ip_address(high)
                networks += ipaddress.summarize_address_range(*ends)
            case _:
                raise ValueError(element)
    return PrefixSet(networks)


def _flags(value: object) -> set[object]:
    """["fin", "syn"] or, in other versions, {"|": ["fin", "syn"]}, nested too."""
    match value:
        case list(flags) | {"|": list(flags)}:
            return {flag for part in flags for flag in _flags(part)}
        case _:
            return {value}
