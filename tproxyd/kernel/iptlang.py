"""Packet rules as lines of iptables-restore; iptread.py reads them back.

A rule is of one IP version here, so nothing says which. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never, get_args

from tproxyd.addr import PrefixSet
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Action,
    ConnMark,
    DestinationIn,
    Divert,
    Family,
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
    Verdict,
)

# include/uapi/linux/netfilter/xt_multiport.h, XT_MULTI_PORTS; a range takes two.
MULTIPORT = 15

_ORDER = {kind: at for at, kind in enumerate(get_args(Match))}


def ordered(matches: list[Match]) -> tuple[Match, ...]:
    """The order of matches has no meaning: one of all that say the same."""
    return tuple(sorted(matches, key=lambda match: (_ORDER[type(match)], repr(match))))


# To words -----------------------------------------------------------------------------------------


def words(rule: Rule, family: Family) -> str:
    """The rule without its chain, in the order in which iptables-save writes."""
    head, more = _Words(), _Words()
    tcp: list[str] = []
    protocol = "-p tcp" if implies_tcp(rule) else ""
    for match in rule.matches:
        match match:
            case SourceIn(prefixes=prefixes):
                head.add("-s", _only(prefixes))
            case DestinationIn(prefixes=prefixes, negate=negate):
                if len(prefixes.networks) == 1:
                    head.add("-d", _only(prefixes), negate)
                else:
                    for network in prefixes.networks:
                        ends = f"{network.network_address}-{network.broadcast_address}"
                        more.add("-m iprange", "")
                        more.add("--dst-range", ends, negate)
            case InInterface(names):
                (name,) = names
                head.add("-i", _plus(name))
            case OutInterface(name):
                head.add("-o", _plus(name))
            case Tcp():
                protocol = "-p tcp"
            case NotTcp():
                protocol = "! -p tcp"
            case Icmp():
                protocol = "-p icmp" if family == 4 else "-p ipv6-icmp"
            case UdpPort(end, ports):
                protocol = "-p udp"
                more.add(f"-m udp --{end[0]}port", _ports((ports,)))
            case PortIn(ranges, negate):
                if len(ranges) == 1:
                    tcp.append(f"{'! ' * negate}--dport {_ports(ranges)}")
                else:
                    for some in _in_multiports(ranges):
                        more.add("-m multiport", "")
                        more.add("--dports", _ports(some), negate)
            case Syn(negate):
                tcp.append(f"{'! ' * negate}--tcp-flags FIN,SYN,RST,ACK SYN")
            case ForUs(negate):
                more.add("-m addrtype", "")
                more.add("--dst-type", "LOCAL", negate)
            case MadeBy(owner, ranges, negate):
                for low, high in ranges:
                    more.add("-m owner", "")
                    span = str(low) if low == high else f"{low}-{high}"
                    more.add(f"--{owner}-owner", span, negate)
            case PacketMark(value, mask, negate):
                more.add("-m mark", "")
                more.add("--mark", _masked(value, mask), negate)
            case ConnMark(value, mask):
                more.add("-m connmark --mark", _masked(value, mask))
            case Tracked(states):
                more.add("-m conntrack --ctstate", ",".join(states).upper())
            case MeetsTransparentSocket():
                more.add("-m socket", "--transparent")
            case IpVersion() | MeetsWildcardListener() | Reply():
                raise ValueError("only rules of nft ask for that")
            case _:
                assert_never(match)
    head.sort(key=lambda text: "sdio".index(text.lstrip("! -")[0]))
    flags = ["-m tcp", *tcp] if tcp else []
    return " ".join(filter(None, [*head, protocol, *flags, *more, _target(rule.action)]))


class _Words(list[str]):
    def add(self, option: str, value: str, negate: bool = False) -> None:
        self.append(f"{'! ' * negate}{option} {value}".strip())


def implies_tcp(rule: Rule) -> bool:
    return (
        isinstance(rule.action, Tproxy | Redirect)
        and not any(isinstance(match, UdpPort) for match in rule.matches)
    ) or any(isinstance(match, PortIn | Syn) for match in rule.matches)


def _target(action: Action) -> str:
    match action:
        case Verdict.RESET:
            return "-j REJECT --reject-with tcp-reset"
        case Verdict():
            return f"-j {action.name}"
        case Goto(chain):
            return f"-g {chain}"
        case Jump(chain):
            return f"-j {chain}"
        case Tproxy(port=port, mark=mark):
            marked = "" if mark is None else f" --tproxy-mark {mark.value:#x}/{mark.mask:#x}"
            return f"-j TPROXY --on-port {port}{marked}"
        case Redirect(port):
            return f"-j REDIRECT --to-ports {port}"
        case SetPacketMark(value, mask):
            return f"-j MARK --set-xmark {value:#x}/{mask:#x}"
        case SetConnMark(value, mask):
            return f"-j CONNMARK --set-xmark {value:#x}/{mask:#x}"
        case SaveMark():
            return "-j CONNMARK --save-mark"
        case RestoreMark():
            return "-j CONNMARK --restore-mark"
        case SetZone(zone):
            return f"-j CT --zone {zone}"
        case Divert():
            raise ValueError("two targets are two rules here")
        case KeepSource():
            raise ValueError("what is accepted keeps its source here")
        case _:
            assert_never(action)


def _plus(interface: str) -> str:
    """The sign for any ending."""
    return f"{interface[:-1]}+" if interface.endswith("*") else interface


def _only(prefixes: PrefixSet) -> str:
    (network,) = prefixes.networks
    return str(network)


def _ports(ranges: PortRanges) -> str:
    return ",".join(str(low) if low == high else f"{low}:{high}" for low, high in ranges)


def _in_multiports(ranges: PortRanges) -> Iterator[PortRanges]:
    """As many as one match can hold."""
    some: list[tuple[int, int]] = []
    room = MULTIPORT
    for low, high in ranges:
        takes = 1 if low == high else 2
        if takes > room:
            yield tuple(some)
            some, room = [], MULTIPORT
        some.append((low, high))
        room -= takes
    yield tuple(some)


def port_sets(ranges: PortRanges) -> list[PortRanges]:
    """The same ports in sets that fit into one match each."""
    return list(_in_multiports(ranges))


def _masked(value: int, mask: int) -> str:
    return f"{value:#x}" if mask == FULL_MASK else f"{value:#x}/{mask:#x}"
