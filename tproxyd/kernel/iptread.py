"""Lines of iptables-save back to the algebra.

Both variants of iptables, and all versions seen, agree in what a line means but not in its layout
(the order of matches, `--syn` or `--tcp-flags`, a mask left out or written). So a line is read into
the algebra, in which one meaning has one form: matches in one order, the prefixes, ports and owners
of several matches together. What it cannot say is an Unknown. Pure.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Iterator
from typing import Literal, NamedTuple

from tproxyd.addr import IPNetwork, PrefixSet
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Action,
    ConnMark,
    DestinationIn,
    Family,
    ForUs,
    Goto,
    Icmp,
    InInterface,
    Jump,
    MadeBy,
    Match,
    MeetsTransparentSocket,
    NotTcp,
    OutInterface,
    PacketMark,
    PortIn,
    Redirect,
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
from tproxyd.kernel.iptlang import implies_tcp, ordered
from tproxyd.reader import merge_ranges


class _Option(NamedTuple):
    name: str
    value: str
    negate: bool


_BARE = ("--transparent", "--save-mark", "--restore-mark")
# What an option names itself, and `-m` in front of it only repeats; in other lines they differ.
_MATCHES = (
    *("tcp", "udp", "multiport", "addrtype", "owner", "mark", "connmark", "conntrack"),
    *("socket", "iprange"),
)


def parse(line: str, family: Family) -> Rule | Unknown:
    """A rule without its chain, as iptables-save writes it."""
    try:
        found = _Reader(family)
        for option in _options(shlex.split(line)):
            found.take(option)
        return found.rule()
    except (ValueError, StopIteration):
        return Unknown(f"rule {line}")


def _options(tokens: list[str]) -> Iterator[_Option]:
    """Every option, with what follows it up to the next."""
    negate, at = False, 0
    while at < len(tokens):
        name = tokens[at]
        at += 1
        if name == "!":
            negate = True
            continue
        count = 0 if name in _BARE else 2 if name == "--tcp-flags" else 1
        values = tokens[at : at + count]
        if not name.startswith("-") or len(values) < count:
            raise ValueError(name)
        at += count
        yield _Option(name, " ".join(values), negate)
        negate = False


class _Reader:
    """Collects the parts of one line."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._matches: list[Match] = []
        self._module = ""
        self._protocol: tuple[str, bool] | None = None
        self._target = ""
        self._goto = False
        self._of_target: dict[str, str] = {}
        # What several matches say together: all of them must hold.
        self._not_to: list[tuple[int, int]] = []
        self._ranges: list[IPNetwork] = []
        self._owned: dict[Literal["uid", "gid"], list[tuple[int, int]]] = {}

    def take(self, option: _Option) -> None:
        if self._target:
            if option.negate or option.name in self._of_target:
                raise ValueError(option.name)
            self._of_target[option.name] = option.value
            return
        name, value, negate = option
        match name:
            case "-j" | "-g" if not negate:
                self._target, self._goto = value, name == "-g"
            case "-m" if value in _MATCHES and not negate:
                self._module = value
            case "--mark" if self._module == "mark":
                self._matches.append(PacketMark(*_mark(value), negate))
            case "--mark" if self._module == "connmark" and not negate:
                self._matches.append(ConnMark(*_mark(value)))
            case "-p":
                self._protocol = value, negate
            case "--dport" | "--dports" | "--sport":
                self._port(option)
            case "--dst-range" if negate:
                low, high = map(ipaddress.ip_address, value.split("-"))
                self._ranges += ipaddress.summarize_address_range(low, high)
            case "--uid-owner" | "--gid-owner":
                self._owner("uid" if name == "--uid-owner" else "gid", option)
            case _:
                self._matches.append(self._match(option))

    def _port(self, option: _Option) -> None:
        ranges = merge_ranges([_range(text, ":") for text in option.value.split(",")])
        if self._protocol == ("udp", False):
            (ports,) = ranges
            if option.negate or option.name == "--dports":
                raise ValueError(option)
            end: Literal["source", "destination"]
            end = "source" if option.name == "--sport" else "destination"
            self._matches.append(UdpPort(end, ports))
        elif option.name == "--sport":
            raise ValueError(option)
        elif option.negate:
            self._not_to += ranges
        else:
            self._matches.append(PortIn(ranges))

    def _owner(self, owner: Literal["uid", "gid"], option: _Option) -> None:
        span = _range(option.value, "-")
        if option.negate:
            self._owned.setdefault(owner, []).append(span)
        else:
            self._matches.append(MadeBy(owner, (span,)))

    def _match(self, option: _Option) -> Match:
        match option:
            case _Option("-s", value, False):
                return SourceIn(self._family, PrefixSet([ipaddress.ip_network(value)]))
            case _Option("-d", value, negate):
                there = PrefixSet([ipaddress.ip_network(value)])
                return DestinationIn(self._family, there, negate)
            case _Option("-i", value, False):
                return InInterface((_star(value),))
            case _Option("-o", value, False):
                return OutInterface(_star(value))
            case _Option("--tcp-flags", "FIN,SYN,RST,ACK SYN", negate):
                return Syn(negate)
            case _Option("--dst-type", "LOCAL", negate):
                return ForUs(negate)
            case _Option("--ctstate", value, False):
                return Tracked(tuple(sorted(value.lower().split(","))))
            case _Option("--transparent", _, False):
                return MeetsTransparentSocket()
        raise ValueError(option)

    def rule(self) -> Rule:
        action = self._action()
        matches = list(self._matches)
        if self._not_to:
            matches.append(PortIn(merge_ranges(self._not_to), negate=True))
        if self._ranges:
            matches.append(DestinationIn(self._family, PrefixSet(self._ranges), negate=True))
        for owner, spans in self._owned.items():
            matches.append(MadeBy(owner, merge_ranges(spans), negate=True))
        matches += self._of_protocol(matches, action)
        return Rule(ordered(matches), action)

    def _of_protocol(self, matches: list[Match], action: Action) -> list[Match]:
        implied = implies_tcp(Rule(tuple(matches), action))
        icmp = ("icmp", "1") if self._family == 4 else ("ipv6-icmp", "icmpv6", "58")
        match self._protocol:
            case None if not implied:
                return []
            case ("tcp" | "6", False):
                return [] if implied else [Tcp()]
            case ("tcp" | "6", True) if not implied:
                return [NotTcp()]
            case ("udp" | "17", False) if any(isinstance(match, UdpPort) for match in matches):
                return []
            case (name, False) if name in icmp and not implied:
                return [Icmp()]
        raise ValueError(self._protocol)

    def _action(self) -> Action:
        more = self._of_target
        if self._goto and not more:
            return Goto(self._target)
        match self._target:
            case "ACCEPT" | "DROP" | "RETURN" if not more:
                return Verdict[self._target]
            case "TPROXY" if more.keys() <= {"--on-port", "--on-ip", "--tproxy-mark"}:
                if int(ipaddress.ip_address(more.get("--on-ip", "::"))) != 0:
                    raise ValueError(more)
                value, mask = _mark(more.get("--tproxy-mark", "0x0/0x0"))
                mark = SetPacketMark(value, mask) if mask else None
                return Tproxy(self._family, int(more["--on-port"]), mark)
            case "REDIRECT" if more.keys() == {"--to-ports"}:
                return Redirect(int(more["--to-ports"]))
            case "MARK" if more.keys() == {"--set-xmark"}:
                return SetPacketMark(*_mark(more["--set-xmark"]))
            case "CONNMARK" if more.keys() == {"--set-xmark"}:
                return SetConnMark(*_mark(more["--set-xmark"]))
            case "CONNMARK" if all(
                int(more.get(key, "0xffffffff"), 16) == FULL_MASK
                for key in ("--nfmask", "--ctmask")
            ):
                rest = more.keys() - {"--nfmask", "--ctmask"}
                if rest == {"--save-mark"}:
                    return SaveMark()
                if rest == {"--restore-mark"}:
                    return RestoreMark()
            case "CT" if more.keys() == {"--zone"}:
                return SetZone(int(more["--zone"]))
            case name if "_" in name and not more:  # as in every chain of ours, and in no target
                return Jump(name)
        raise ValueError(self._target)


def _star(interface: str) -> str:
    return f"{interface[:-1]}*" if interface.endswith("+") else interface


def _range(text: str, sign: str) -> tuple[int, int]:
    low, _, high = text.partition(sign)
    return int(low), int(high or low)


def _mark(text: str) -> tuple[int, int]:
    value, _, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if mask else FULL_MASK
