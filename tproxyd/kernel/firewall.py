"""Packet rules as plain values: what a packet must be, and what then happens to it.

A small closed algebra and not the text of one tool, so that what a backend read back can be
compared exactly with what is wanted, however the tool lays it out. A backend writes every Match and
Action that it can be given; what it reads and cannot express is an Unknown, which never equals
anything wanted: a foreign edit of our table, or the leftover of another version of us, shows as
drift and is replaced. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from tproxyd.addr import PrefixSet

Family = Literal[4, 6]
PortRanges = tuple[tuple[int, int], ...]

FULL_MASK = 0xFFFF_FFFF


def mark_mask(mark: int) -> int:
    """All ones up to the mark's highest hexadecimal digit: 0x539 → 0xfff.

    Others may OR bits above ours into a packet's mark; compared whole, 0x10539 would not be 0x539
    and its packet would leave toward the client.
    """
    return (1 << (mark.bit_length() + 3) // 4 * 4) - 1


def ranges_text(ranges: PortRanges) -> str:
    """ "80, 8000-8100"."""
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


# What a packet must be ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InInterface:
    """Came in through one of these; a name that ends in "*" stands alone."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OutInterface:
    """Leaves through this one."""

    name: str


@dataclass(frozen=True, slots=True)
class IpVersion:
    family: Family


@dataclass(frozen=True, slots=True)
class Tcp:
    """What ports, SYN and most actions imply; it stands where nothing else does."""


@dataclass(frozen=True, slots=True)
class NotTcp:
    pass


@dataclass(frozen=True, slots=True)
class Icmp:
    """ICMP of either IP version."""


@dataclass(frozen=True, slots=True)
class SourceIn:
    """Implies the IP version: the prefixes are of one."""

    family: Family
    prefixes: PrefixSet


@dataclass(frozen=True, slots=True)
class DestinationIn:
    family: Family
    prefixes: PrefixSet
    negate: bool = False


@dataclass(frozen=True, slots=True)
class PortIn:
    """TCP, and its destination port is, or is not, in these closed, merged ranges."""

    ranges: PortRanges
    negate: bool = False


@dataclass(frozen=True, slots=True)
class UdpPort:
    """UDP, from or to a port in this closed range."""

    end: Literal["source", "destination"]
    ports: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ForUs:
    """The destination is a local address. Negated: forwarded, broadcast or multicast."""

    negate: bool = False


@dataclass(frozen=True, slots=True)
class Syn:
    """A TCP segment that opens a connection: SYN without FIN, RST and ACK. Negated: any other."""

    negate: bool = False


@dataclass(frozen=True, slots=True)
class MadeBy:
    """Made here, by a socket whose user, or group, is in these closed, merged ranges, or not."""

    owner: Literal["uid", "gid"]
    ranges: PortRanges
    negate: bool = False


@dataclass(frozen=True, slots=True)
class PacketMark:
    value: int
    mask: int
    negate: bool = False


@dataclass(frozen=True, slots=True)
class ConnMark:
    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class Tracked:
    """In one of these states of connection tracking, sorted."""

    states: tuple[str, ...]


# Of a connection of which packets were seen in both directions.
ESTABLISHED = Tracked(("established",))


@dataclass(frozen=True, slots=True)
class Reply:
    """On the way back to who has begun the connection, as connection tracking knows it."""


@dataclass(frozen=True, slots=True)
class MeetsTransparentSocket:
    """A socket with IP_TRANSPARENT has this packet's addresses, or listens at its destination.

    Or has those of the packet that an ICMP error is about. nft's looks at what listens on every
    address as well, which iptables' does not: see MeetsWildcardListener.
    """


@dataclass(frozen=True, slots=True)
class MeetsWildcardListener:
    """No connection has this packet's addresses, and a socket listens on its port, everywhere.

    Negated it would not tell the same from the rest: it fails too at what is no full socket yet, or
    no more (a handshake without its last ACK, TIME_WAIT).
    """


Match = (
    InInterface
    | OutInterface
    | IpVersion
    | Tcp
    | NotTcp
    | Icmp
    | SourceIn
    | DestinationIn
    | PortIn
    | UdpPort
    | ForUs
    | Syn
    | MadeBy
    | PacketMark
    | ConnMark
    | Tracked
    | Reply
    | MeetsTransparentSocket
    | MeetsWildcardListener
)


# What then happens to it --------------------------------------------------------------------------


class Verdict(StrEnum):
    ACCEPT = "accept"
    DROP = "drop"
    RETURN = "return"  # to the chain that called this one, or to what the base chain does
    RESET = "reject with tcp reset"


@dataclass(frozen=True, slots=True)
class Goto:
    chain: str


@dataclass(frozen=True, slots=True)
class Jump:
    """Like Goto, and what returns from there runs on here."""

    chain: str


@dataclass(frozen=True, slots=True)
class SetPacketMark:
    """Write the bits of `mask`; keep the others, which are other programs'. The next rule runs."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class Tproxy:
    """Deliver to the connection's socket, else to the transparent listener on `port`, and accept.

    Without either the next rule is tried, and the mark is not written.
    """

    family: Family
    port: int
    mark: SetPacketMark | None = None


@dataclass(frozen=True, slots=True)
class Divert:
    """Write the mark, by which the packet is routed to this host, and accept."""

    mark: SetPacketMark


@dataclass(frozen=True, slots=True)
class Redirect:
    """Rewrite the destination of the connection to this host and `port`; for chains of nat."""

    port: int


@dataclass(frozen=True, slots=True)
class KeepSource:
    """Map the source of the connection to itself; no chain of nat that comes later maps it again.

    To accept it would not do: the kernel then asks the next chain.
    """

    family: Family


@dataclass(frozen=True, slots=True)
class SetConnMark:
    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class SaveMark:
    """The whole mark of the packet becomes that of its connection."""


@dataclass(frozen=True, slots=True)
class RestoreMark:
    """And back."""


@dataclass(frozen=True, slots=True)
class SetZone:
    """Connection tracking keeps the packet's connection apart from those of other zones."""

    zone: int


Action = (
    Verdict
    | Goto
    | Jump
    | Tproxy
    | Divert
    | Redirect
    | KeepSource
    | SetPacketMark
    | SetConnMark
    | SaveMark
    | RestoreMark
    | SetZone
)


# Rules and chains ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unknown:
    """Under our name or number, but nothing that this version can express."""

    text: str

    def __str__(self) -> str:
        return f"something unknown: {self.text}"


@dataclass(frozen=True, slots=True)
class Rule:
    """All matches, then the action. The comment explains; it is not in the kernel."""

    matches: tuple[Match, ...]
    action: Action
    comment: str = field(default="", compare=False)


class Hook(StrEnum):
    """Where a base chain is called: behind nat, with the addresses that it has made; at priority
    mangle, behind conntrack and before nat; as nat; or raw, before conntrack.

    A chain of nat sees the first packet of a connection only.
    """

    BEHIND_NAT = "prerouting behind nat"
    PREROUTING = "prerouting"
    OUTPUT = "output"  # of type route: a changed mark asks the routing tables again
    NAT_PREROUTING = "prerouting of nat"
    NAT_OUTPUT = "output of nat"
    NAT_POSTROUTING = "postrouting of nat"  # before others, where it can be said
    RAW_PREROUTING = "prerouting of raw"
    RAW_OUTPUT = "output of raw"


class Table(StrEnum):
    """Of iptables, where chains of two tables may share a name. nft has ours in a single one."""

    MANGLE = "mangle"
    NAT = "nat"
    RAW = "raw"


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    hook: Hook | None
    rules: tuple[Rule | Unknown, ...]
    table: Table = Table.MANGLE  # means nothing to nft


Firewall = tuple[Chain | Unknown, ...]
