"""Packet rules in nft's language: the algebra to a script, a JSON listing back to the algebra.

nft lays out what it lists in its own way: it merges neighbouring address ranges, writes bare what
was a set of one, leaves out a protocol match that another match implies, and its versions differ
(forms of 1.0.6 and later ones are accepted). Reading therefore goes back to the algebra, in which
one meaning has one form, and anything else is an Unknown. libnftables-json(5) has the format. Pure.
"""

from __future__ import annotations

import ipaddress
import json
import textwrap
from collections.abc import Iterable
from typing import Any

from tproxyd.addr import IPNetwork, PrefixSet
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Action,
    Chain,
    ConnMark,
    DestinationIn,
    Family,
    Firewall,
    Goto,
    Hook,
    InInterface,
    IpVersion,
    Match,
    MeetsTransparentSocket,
    NotForUs,
    NotTcp,
    PacketMark,
    PortIn,
    PortRanges,
    Rule,
    SetConnMark,
    SetPacketMark,
    SourceIn,
    Syn,
    Tproxy,
    Unknown,
    Verdict,
    ranges_text,
)
from tproxyd.reader import merge_ranges

TABLE = "tproxyd"

# The array "nftables" of nft's JSON. Any: it is taken apart by pattern here and nowhere else.
Listing = list[dict[str, Any]]

_MANGLE = -150  # include/uapi/linux/netfilter_ipv4.h, NF_IP_PRI_MANGLE
_TYPES = {Hook.PREROUTING: "filter", Hook.OUTPUT: "route"}


# From the algebra to a script ---------------------------------------------------------------------


def render(firewall: Firewall) -> str:
    """The script that replaces our table by this, in one transaction; for () it removes it."""
    lines = [f"add table inet {TABLE}", f"delete table inet {TABLE}"]
    if firewall:
        lines.append(f"table inet {TABLE} {{")
        for chain in firewall:
            assert isinstance(chain, Chain), "only what is wanted is written"
            lines += [f"\t{line}" if line else "" for line in _chain(chain)]
        lines.append("}")
    return "\n".join(lines) + "\n"


def _chain(chain: Chain) -> list[str]:
    lines = [f"chain {chain.name} {{"]
    if chain.hook is not None:
        kind = _TYPES[chain.hook]
        lines.append(f"\ttype {kind} hook {chain.hook} priority mangle; policy accept;")
    said = ""
    for rule in chain.rules:
        assert isinstance(rule, Rule), "only what is wanted is written"
        if rule.comment not in ("", said):
            said = rule.comment
            lines += ["", *(f"\t# {line}" for line in textwrap.wrap(said, 80))]
        lines.append("\t" + " ".join((*map(_match, rule.matches), _action(rule.action))))
    return [*lines, "}"]


def _match(match: Match) -> str:
    match match:
        case InInterface(names):
            return f"iifname {_set(f'{chr(34)}{name}{chr(34)}' for name in names)}"
        case IpVersion(family):
            return f"meta nfproto ipv{family}"
        case NotTcp():
            return "meta l4proto != tcp"
        case SourceIn(family, prefixes):
            return f"{_IP[family]} saddr {_set(map(_address, prefixes.networks))}"
        case DestinationIn(family, prefixes):
            return f"{_IP[family]} daddr {_set(map(_address, prefixes.networks))}"
        case PortIn(ranges, negate):
            return f"tcp dport {'!= ' if negate else ''}{_set(ranges_text(ranges).split(', '))}"
        case NotForUs():
            return "fib daddr type != local"
        case Syn():
            return "tcp flags & (fin | syn | rst | ack) == syn"
        case PacketMark(value, mask):
            return f"meta mark {_masked(value, mask)}"
        case ConnMark(value, mask):
            return f"ct mark {_masked(value, mask)}"
        case MeetsTransparentSocket():
            return "socket transparent 1"


def _action(action: Action) -> str:
    match action:
        case Verdict():
            return str(action)
        case Goto(chain):
            return f"goto {chain}"
        case Tproxy(family, port):
            # The statement insists on a TCP match in its own rule.
            return f"meta l4proto tcp tproxy {_IP[family]} to :{port} accept"
        case SetPacketMark(value, mask):
            return _set_mark("meta mark", value, mask)
        case SetConnMark(value, mask):
            return _set_mark("ct mark", value, mask)


_IP: dict[Family, str] = {4: "ip", 6: "ip6"}


def _set(texts: Iterable[str]) -> str:
    items = list(texts)
    return items[0] if len(items) == 1 else f"{{ {', '.join(items)} }}"


def _address(network: IPNetwork) -> str:
    single = network.prefixlen == network.max_prefixlen
    return str(network.network_address if single else network)


def _masked(value: int, mask: int) -> str:
    return f"{value:#x}" if mask == FULL_MASK else f"& {mask:#x} == {value:#x}"


def _set_mark(key: str, value: int, mask: int) -> str:
    if mask == FULL_MASK:
        return f"{key} set {value:#x}"
    return f"{key} set {key} & {FULL_MASK ^ mask:#x} | {value:#x}"


# From nft's JSON to the algebra (libnftables-json(5)) ---------------------------------------------


def lists_our_table(listing: Listing) -> bool:
    return any(
        isinstance(entry.get("table"), dict) and entry["table"].get("name") == TABLE
        for entry in listing
    )


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
    for hook, kind in _TYPES.items():
        if base == {"type": kind, "hook": str(hook), "prio": _MANGLE, "policy": "accept"}:
            return hook
    return None


def _unknown(statements: list[object]) -> Unknown:
    return Unknown(f"rule {json.dumps(statements)}")


class _IsTcp:
    """What `meta l4proto tcp` says; in the algebra always part of something else."""


def _rule(statements: list[object]) -> Rule | Unknown:
    try:
        matches: list[Match | _IsTcp] = []
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


def _without_implied(matches: list[Match | _IsTcp], action: Action) -> tuple[Match, ...]:
    """Without what another part of the rule says already: nft versions differ in listing that."""
    families = {match.family for match in matches if isinstance(match, SourceIn | DestinationIn)}
    tcp = isinstance(action, Tproxy) or any(isinstance(m, PortIn | Syn) for m in matches)
    kept: list[Match] = []
    for match in matches:
        if isinstance(match, _IsTcp):
            if not tcp:
                raise ValueError("a TCP match on its own is not ours")
        elif not (isinstance(match, IpVersion) and match.family in families):
            kept.append(match)
    return tuple(kept)


def _parse_match(op: str, left: object, right: object) -> Match | _IsTcp:
    match left, op, right:
        case {"meta": {"key": "iifname"}}, "==", _:
            return InInterface(tuple(sorted(_text(name) for name in _elements(right))))
        case {"meta": {"key": "nfproto"}}, "==", "ipv4":
            return IpVersion(4)
        case {"meta": {"key": "nfproto"}}, "==", "ipv6":
            return IpVersion(6)
        # A number where there is no /etc/protocols (netbase), as in many containers.
        case {"meta": {"key": "l4proto"}}, "==", "tcp" | 6:
            return _IsTcp()
        case {"meta": {"key": "l4proto"}}, "!=", "tcp" | 6:
            return NotTcp()
        case {"payload": {"protocol": "ip" | "ip6" as ip, "field": "saddr"}}, "==", _:
            return SourceIn(4 if ip == "ip" else 6, _prefixes(right))
        case {"payload": {"protocol": "ip" | "ip6" as ip, "field": "daddr"}}, "==", _:
            return DestinationIn(4 if ip == "ip" else 6, _prefixes(right))
        case {"payload": {"protocol": "tcp", "field": "dport"}}, "==" | "!=", _:
            return PortIn(_ports(right), negate=op == "!=")
        case {"fib": {"result": "type", "flags": ["daddr"] | "daddr"}}, "!=", "local":
            return NotForUs()
        case {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, flags]}, "==", "syn":
            if _flags(flags) == {"fin", "syn", "rst", "ack"}:
                return Syn()
        case {"&": [{"meta": {"key": "mark"}}, int(mask)]}, "==", int(value):
            return PacketMark(value, mask)
        case {"meta": {"key": "mark"}}, "==", int(value):
            return PacketMark(value, FULL_MASK)
        case {"&": [{"ct": {"key": "mark", **more}}, int(mask)]}, "==", int(value) if not more:
            return ConnMark(value, mask)
        case {"ct": {"key": "mark", **more}}, "==", int(value) if not more:
            return ConnMark(value, FULL_MASK)
        case {"socket": {"key": "transparent"}}, "==", 1:
            return MeetsTransparentSocket()
    raise ValueError(left)


def _parse_action(statements: list[object]) -> Action:
    match statements:
        case [{"accept": None}]:
            return Verdict.ACCEPT
        case [{"drop": None}]:
            return Verdict.DROP
        case [{"reject": {"type": "tcp reset", **more}}] if not more:
            return Verdict.RESET
        case [{"goto": {"target": str(chain)}}]:
            return Goto(chain)
        case [
            {"tproxy": {"family": "ip" | "ip6" as ip, "port": int(port), **more}},
            {"accept": None},
        ]:
            if not more:
                return Tproxy(4 if ip == "ip" else 6, port)
        case [{"mangle": {"key": {"meta": {"key": "mark"}} as key, "value": value}}]:
            return SetPacketMark(*_mark_write(key, value))
        case [{"mangle": {"key": {"ct": {"key": "mark"}} as key, "value": value}}]:
            return SetConnMark(*_mark_write(key, value))
    raise ValueError(statements)


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


def _ports(right: object) -> PortRanges:
    ranges: list[tuple[int, int]] = []
    for element in _elements(right):
        match element:
            case int(port):
                ranges.append((port, port))
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
