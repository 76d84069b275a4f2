"""Packet rules as a script in nft's language; nftjson.py reads them back. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import NamedTuple, assert_never

from tproxyd.addr import IPNetwork
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Action,
    Chain,
    ConnMark,
    DestinationIn,
    Divert,
    Family,
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
    Verdict,
    ranges_text,
)

TABLE = "tproxyd"
# Stands in while the table of that name is made anew (nftowner.py).
MEANWHILE = "tproxyd-meanwhile"


class Base(NamedTuple):
    """Where nft hangs a base chain."""

    type: str
    hook: str
    priority: int


# include/uapi/linux/netfilter_ipv4.h: NF_IP_PRI_RAW, _MANGLE, _NAT_DST, _NAT_SRC. The kernel calls
# all chains of nat at one of the last two, in the order of their own priorities. _NAT is written
# as a number: nft has a name for it at the hook prerouting only.
_RAW, _MANGLE, _NAT, _NAT_SRC = -300, -150, -100, 100
_NAMES = {_MANGLE: "mangle", _NAT + 1: "dstnat + 1", _NAT_SRC - 1: "srcnat - 1"}
BASES = {
    Hook.BEHIND_NAT: Base("filter", "prerouting", _NAT + 1),
    Hook.PREROUTING: Base("filter", "prerouting", _MANGLE),
    Hook.OUTPUT: Base("route", "output", _MANGLE),
    Hook.NAT_PREROUTING: Base("nat", "prerouting", _NAT),
    Hook.NAT_OUTPUT: Base("nat", "output", _NAT),
    Hook.NAT_POSTROUTING: Base("nat", "postrouting", _NAT_SRC - 1),
    Hook.RAW_PREROUTING: Base("filter", "prerouting", _RAW),
    Hook.RAW_OUTPUT: Base("filter", "output", _RAW),
}


def render(firewall: Firewall) -> str:
    """The script that replaces our table by this, in one transaction; for () it removes it."""
    head = f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
    return head + (table_text(firewall) if firewall else "")


def table_text(firewall: Firewall, name: str = TABLE, *, owned: bool = False) -> str:
    """The table as a declaration, for where there is none of that name."""
    lines = [f"table inet {name} {{", *(["\tflags owner"] if owned else [])]
    for chain in firewall:
        assert isinstance(chain, Chain), "only what is wanted is written"
        lines += [f"\t{line}" if line else "" for line in _chain(chain)]
    return "\n".join([*lines, "}"]) + "\n"


def refill(firewall: Firewall, before: Iterable[str]) -> str:
    """The script that puts this in the place of the chains that are there; the table stays.

    The table itself is not named by a statement: that would be a change of its flags.
    """
    lines = [f"flush table inet {TABLE}"]
    lines += [f"delete chain inet {TABLE} {name}" for name in before]
    for chain in firewall:
        assert isinstance(chain, Chain), "only what is wanted is written"
        base = "" if chain.hook is None else f" {{\n\t{_base(chain.hook)}\n}}"
        lines.append(f"add chain inet {TABLE} {chain.name}{base}")
    for chain in firewall:
        assert isinstance(chain, Chain), "only what is wanted is written"
        for rule in chain.rules:
            assert isinstance(rule, Rule), "only what is wanted is written"
            lines.append(f"add rule inet {TABLE} {chain.name} {_rule(rule)}")
    return "\n".join(lines) + "\n"


def _base(hook: Hook) -> str:
    kind, at, priority = BASES[hook]
    name = _NAMES.get(priority, priority)
    return f"type {kind} hook {at} priority {name}; policy accept;"


def _chain(chain: Chain) -> list[str]:
    lines = [f"chain {chain.name} {{"]
    if chain.hook is not None:
        lines.append(f"\t{_base(chain.hook)}")
    said = ""
    for rule in chain.rules:
        assert isinstance(rule, Rule), "only what is wanted is written"
        if rule.comment not in ("", said):
            said = rule.comment
            lines += ["", *(f"\t# {line}" for line in textwrap.wrap(said, 80))]
        lines.append("\t" + _rule(rule))
    return [*lines, "}"]


def _rule(rule: Rule) -> str:
    action = _action(rule.action)
    if isinstance(rule.action, Redirect) and not any(isinstance(m, UdpPort) for m in rule.matches):
        action = f"meta l4proto tcp {action}"  # it insists on a protocol in its own rule
    return " ".join((*map(_match, rule.matches), action))


def _match(match: Match) -> str:
    match match:
        case InInterface(names):
            return f"iifname {_set(f'{chr(34)}{name}{chr(34)}' for name in names)}"
        case OutInterface(name):
            return f'oifname "{name}"'
        case IpVersion(family):
            return f"meta nfproto ipv{family}"
        case Tcp():
            return "meta l4proto tcp"
        case NotTcp():
            return "meta l4proto != tcp"
        case Icmp():
            return "meta l4proto { icmp, icmpv6 }"  # keywords, whatever /etc/protocols says
        case SourceIn(family, prefixes):
            return f"{_IP[family]} saddr {_set(map(_address, prefixes.networks))}"
        case DestinationIn(family, prefixes, negate):
            return f"{_IP[family]} daddr {_not(negate)}{_set(map(_address, prefixes.networks))}"
        case PortIn(ranges, negate):
            return f"tcp dport {_not(negate)}{_ranges(ranges)}"
        case UdpPort(end, ports):
            return f"udp {end[0]}port {_ranges((ports,))}"
        case ForUs(negate):
            return f"fib daddr type {_not(negate)}local"
        case Syn(negate):
            return f"tcp flags & (fin | syn | rst | ack) {'!=' if negate else '=='} syn"
        case MadeBy(owner, ranges, negate):
            return f"meta sk{owner} {_not(negate)}{_ranges(ranges)}"
        case PacketMark(value, mask, negate):
            return f"meta mark {_masked(value, mask, negate)}"
        case ConnMark(value, mask):
            return f"ct mark {_masked(value, mask)}"
        case Tracked(states):
            return f"ct state {','.join(states)}"
        case Reply():
            return "ct direction reply"
        case MeetsTransparentSocket():
            return "socket transparent 1"
        case MeetsWildcardListener():
            return "socket wildcard 1"
        case _:
            assert_never(match)


def _action(action: Action) -> str:
    match action:
        case Verdict():
            return str(action)
        case Goto(chain):
            return f"goto {chain}"
        case Jump(chain):
            return f"jump {chain}"
        case Tproxy(family, port, mark):  # it insists on a TCP match in its own rule
            marked = "" if mark is None else f" {_action(mark)}"
            return f"meta l4proto tcp tproxy {_IP[family]} to :{port}{marked} accept"
        case Redirect(port):
            return f"redirect to :{port}"
        case KeepSource(family):
            return f"snat {_IP[family]} to {_IP[family]} saddr"
        case Divert(mark):
            return f"{_action(mark)} accept"
        case SetPacketMark(value, mask):
            return _set_mark("meta mark", value, mask)
        case SetConnMark(value, mask):
            return _set_mark("ct mark", value, mask)
        case SaveMark():
            return "ct mark set meta mark"
        case RestoreMark():
            return "meta mark set ct mark"
        case SetZone(zone):
            return f"ct zone set {zone}"
        case _:
            assert_never(action)


_IP: dict[Family, str] = {4: "ip", 6: "ip6"}


def _not(negate: bool) -> str:
    return "!= " if negate else ""


def _ranges(ranges: PortRanges) -> str:
    return _set(ranges_text(ranges).split(", "))


def _set(texts: Iterable[str]) -> str:
    items = list(texts)
    return items[0] if len(items) == 1 else f"{{ {', '.join(items)} }}"


def _address(network: IPNetwork) -> str:
    single = network.prefixlen == network.max_prefixlen
    return str(network.network_address if single else network)


def _masked(value: int, mask: int, negate: bool = False) -> str:
    if mask == FULL_MASK:
        return f"{_not(negate)}{value:#x}"
    return f"& {mask:#x} {'!=' if negate else '=='} {value:#x}"


def _set_mark(key: str, value: int, mask: int) -> str:
    if mask == FULL_MASK:
        return f"{key} set {value:#x}"
    return f"{key} set {key} & {FULL_MASK ^ mask:#x} | {value:#x}"
