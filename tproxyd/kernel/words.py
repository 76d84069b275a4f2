"""Packet rules in words, for people. Pure."""

from __future__ import annotations

from typing import assert_never

from tproxyd.kernel.firewall import (
    Action,
    ConnMark,
    DestinationIn,
    Divert,
    Firewall,
    ForUs,
    Goto,
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
    ranges_text,
)


def in_words(firewall: Firewall) -> list[str]:
    """Chain by chain, each rule above its reason."""
    lines: list[str] = []
    for chain in firewall:
        if isinstance(chain, Unknown):
            lines.append(str(chain))
            continue
        lines.append(f"chain {chain.name}" + (f" at {chain.hook}:" if chain.hook else ":"))
        for rule in chain.rules:
            lines.append(f"    {rule_text(rule)}")
            if isinstance(rule, Rule) and rule.comment:
                lines.append(f"        # {rule.comment}")
    return lines


def rule_text(rule: Rule | Unknown) -> str:
    if isinstance(rule, Unknown):
        return str(rule)
    what = ", ".join(map(match_text, rule.matches)) or "anything"
    return f"{what} → {action_text(rule.action)}"


def match_text(match: Match) -> str:
    """A match in words."""
    match match:
        case InInterface(names):
            return f"in through {' or '.join(names)}"
        case OutInterface(name):
            return f"out through {name}"
        case IpVersion(family):
            return f"IPv{family}"
        case Tcp():
            return "TCP"
        case NotTcp():
            return "not TCP"
        case Icmp():
            return "ICMP"
        case SourceIn(prefixes=prefixes):
            return f"from {' or '.join(map(str, prefixes.networks))}"
        case DestinationIn(prefixes=prefixes, negate=negate):
            where = (" nor " if negate else " or ").join(map(str, prefixes.networks))
            return f"{'not ' if negate else ''}to {where}"
        case PortIn(ranges, negate):
            return f"{'not ' if negate else ''}to port {ranges_text(ranges)}"
        case UdpPort(end, ports):
            return f"UDP {'from' if end == 'source' else 'to'} port {ranges_text((ports,))}"
        case ForUs(negate):
            return f"{'not ' if negate else ''}to an address of this host"
        case Syn(negate):
            return "not a SYN" if negate else "SYN"
        case MadeBy(owner, ranges, negate):
            return f"{'not ' if negate else ''}made by {owner} {ranges_text(ranges)}"
        case PacketMark(value, mask, negate):
            return f"{'not ' if negate else ''}mark {value:#x}/{mask:#x}"
        case ConnMark(value, mask):
            return f"connection mark {value:#x}/{mask:#x}"
        case Tracked(states):
            return f"of an {' or '.join(states)} connection"
        case Reply():
            return "an answer"
        case MeetsTransparentSocket():
            return "meets a transparent socket"
        case MeetsWildcardListener():
            return "meets a listener on every address"
        case _:
            assert_never(match)


def action_text(action: Action) -> str:
    """An action in words."""
    match action:
        case Verdict():
            return str(action)
        case Goto(chain):
            return f"goto {chain}"
        case Jump(chain):
            return f"jump {chain}"
        case Tproxy(family, port, mark):
            marked = "" if mark is None else f", {action_text(mark)}"
            return f"tproxy IPv{family} to port {port}{marked} and accept, if a socket is there"
        case Divert(mark):
            return f"{action_text(mark)} and accept"
        case Redirect(port):
            return f"redirect to port {port}"
        case KeepSource(family):
            return f"keep the IPv{family} source from nat"
        case SetPacketMark(value, mask):
            return f"set mark {value:#x}/{mask:#x}"
        case SetConnMark(value, mask):
            return f"set connection mark {value:#x}/{mask:#x}"
        case SaveMark():
            return "the connection gets the packet's mark"
        case RestoreMark():
            return "the packet gets the connection's mark"
        case SetZone(zone):
            return f"track in zone {zone}"
        case _:
            assert_never(action)
