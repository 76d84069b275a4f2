"""Everything that istio-iptables can be told and that changes what the kernel holds, as values.

The names of its settings differ between flags, variables and code; here each has one, and the flag
beside it. The defaults are those of that tool (tools/common/config/config.go of istio/istio): by
themselves they capture nothing that comes in, because the list of inbound ports is empty.

What the rules make of each value is said here, so that who writes them (kernel/istio.py) and who
reads the command line (flags.py) need not ask each other:

- Lists keep the order in which they were given, because the rules stand in that order.
- ALL is the "*" of the command line. Only three lists may be it.
- An empty value is that: nothing inbound, nothing outbound. It is not "everything".

Two things are meant otherwise than in that tool, both for the better. Excluded inbound ports count
also where the inbound ports are a list; there, it ignores them. IPv6 is looked at on its own, by
whether this network namespace has it; there, the first address of the host decides, and the rest of
its IPv6 traffic passes by unseen. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum

from tproxyd.addr import IPNetwork

PortRange = tuple[int, int]  # both ends belong to it: (80, 80)
Ports = tuple[PortRange, ...]  # in the order given


class All(Enum):
    """The "*" of a list."""

    ALL = "*"


ALL = All.ALL


class Mode(StrEnum):
    """How connections from elsewhere are handed over."""

    REDIRECT = "REDIRECT"  # by nat: the proxy asks for SO_ORIGINAL_DST, and may not spoof
    TPROXY = "TPROXY"  # as they came


# Fixed numbers of Istio's, that no flag changes.
OUTBOUND_MARK = 1338  # of the proxy's calls to this host's own application, by the pod address
DNS_PORT = 15053  # where the agent answers DNS
PASSTHROUGH_V4, PASSTHROUGH_V6 = "127.0.0.6", "::6"  # the source of the proxy in REDIRECT mode

LOOPBACK = ipaddress.IPv4Network("127.0.0.1/32")


@dataclass(frozen=True, slots=True)
class IstioOptions:
    """One pod's interception. IstioOptions() is istio-iptables without a flag."""

    # -m. Without one that tool does REDIRECT; so do we. A word that is neither is an error.
    mode: Mode = Mode.REDIRECT
    proxy_port: int = 15001  # -p: what the application sends goes here (ISTIO_REDIRECT)
    inbound_port: int = 15006  # -z: what comes in goes here (ISTIO_TPROXY, ISTIO_IN_REDIRECT)
    tunnel_port: int = 15008  # -e: comes in as it is, and is no self-call (nat ISTIO_INBOUND)

    # -u, -g: the proxy itself, whose packets are left alone, uid by uid, then gid by gid. Without
    # -u: the uid of ENVOY_USER (istio-proxy), or 1337; without -g: the numbers of -u.
    proxy_uids: tuple[int, ...] = (1337,)
    proxy_gids: tuple[int, ...] = (1337,)

    # -b: (): no rule and no route for what comes in. -d: RETURN rules before those that take.
    inbound_ports: Ports | All = ()
    inbound_exclude_ports: Ports = ()

    # -i: (): nothing outbound but `outbound_ports`. A range within 127.0.0.0/8 or ::1 also takes
    # away the RETURN of calls through lo, in both families. -x: RETURN rules, always.
    outbound_ranges: tuple[IPNetwork, ...] | All = ()
    outbound_exclude_ranges: tuple[IPNetwork, ...] = ()
    # -q: taken wherever they go, behind the exclusions. -o: RETURN, TCP and UDP, before all else.
    outbound_ports: Ports = ()
    outbound_exclude_ports: Ports = ()

    # ISTIO_OUTBOUND_OWNER_GROUPS: only what these groups send is taken (a single RETURN of what is
    # none of them; of everything, when it is empty). ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: RETURN
    # one by one; asked only while the former is ALL.
    owner_groups: tuple[int, ...] | All = ALL
    owner_groups_exclude: tuple[int, ...] = ()

    # -c: no packet of these is touched, in or out. -k: what comes in here (from a virtual machine)
    # is outbound. Names as iptables has them: a + at the end stands for any ending.
    exclude_interfaces: tuple[str, ...] = ()
    virtual_interfaces: tuple[str, ...] = ()

    # ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: destinations that are this host's own talk with itself.
    loopback: ipaddress.IPv4Network = LOOPBACK

    mark: int = 1337  # -t
    table: int = 133  # -r
    drop_invalid: bool = False  # --drop-invalid: mangle PREROUTING, what conntrack can't place

    # --redirect-dns: DNS to the servers below goes to the agent; --capture-all-dns: to any server.
    # The servers are those of /etc/resolv.conf; without any there is nothing to redirect.
    redirect_dns: bool = False
    capture_all_dns: bool = False
    dns_servers_v4: tuple[str, ...] = ()
    dns_servers_v6: tuple[str, ...] = ()

    # Whether IPv6 has its twins: rules, policy rule, route, and ::6/128 on lo (the last one always,
    # the rule and route only where something inbound is taken by TPROXY).
    ipv6: bool = True

    @property
    def captures_inbound(self) -> bool:
        return bool(self.inbound_list) or self.inbound_ports is ALL

    @property
    def inbound_list(self) -> Ports:
        """Of a list of inbound ports those that are not excluded; () for ALL."""
        if self.inbound_ports is ALL:
            return ()
        return tuple(
            left
            for each in self.inbound_ports
            for left in without(each, self.inbound_exclude_ports)
        )

    @property
    def needs_routes(self) -> bool:
        """Whether marked packets have to be brought home."""
        return self.mode is Mode.TPROXY and self.captures_inbound

    @property
    def takes_loopback(self) -> bool:
        """Whether a loopback range is to be taken, so that calls through lo are looked at."""
        return self.outbound_ranges is not ALL and any(
            each.network_address.is_loopback for each in self.outbound_ranges
        )

    @property
    def redirects_dns(self) -> bool:
        servers = self.dns_servers_v4 or self.dns_servers_v6
        return self.redirect_dns and (self.capture_all_dns or bool(servers))

    def outbound_of(self, version: int) -> tuple[IPNetwork, ...] | All:
        """The ranges of one family, 4 or 6."""
        if self.outbound_ranges is ALL:
            return ALL
        return tuple(each for each in self.outbound_ranges if each.version == version)

    def outbound_exclude_of(self, version: int) -> tuple[IPNetwork, ...]:
        return tuple(each for each in self.outbound_exclude_ranges if each.version == version)


def without(ports: PortRange, excluded: Ports) -> Iterator[PortRange]:
    """What is left of one range."""
    low, high = ports
    for first, last in sorted(excluded):
        if last < low or first > high:
            continue
        if low < first:
            yield low, first - 1
        low = last + 1
    if low <= high:
        yield low, high


# Words -> values; every ValueError says what is wrong with the word -------------------------------


def parse_mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError:
        hint = f"; meant {text.upper()}?" if text.upper() in list(Mode) else ""
        raise ValueError(f'"{text}" is neither TPROXY nor REDIRECT{hint}') from None


def parse_port(text: str) -> int:
    return _number(text, 1, 65535, "a port, a number from 1 to 65535")


def parse_ports(text: str) -> Ports:
    """ "80,8080" or, as iptables has ranges, "8000:8100"; empty entries don't count."""
    return tuple(dict.fromkeys(_port_range(each) for each in words(text)))


def parse_ports_or_all(text: str) -> Ports | All:
    return ALL if text == "*" else parse_ports(text)


def parse_ranges(text: str) -> tuple[IPNetwork, ...]:
    """CIDRs of both families. Bits behind the prefix are cut off, as iptables does."""
    return tuple(dict.fromkeys(_network(each) for each in words(text)))


def parse_ranges_or_all(text: str) -> tuple[IPNetwork, ...] | All:
    return ALL if text == "*" else parse_ranges(text)


def parse_ids(text: str, number_of: Callable[[str], int]) -> tuple[int, ...]:
    """Users or groups, as numbers or as names, which `number_of` knows (or raises KeyError)."""
    return tuple(dict.fromkeys(_id(each, number_of) for each in words(text)))


def parse_ids_or_all(text: str, number_of: Callable[[str], int]) -> tuple[int, ...] | All:
    return ALL if text == "*" else parse_ids(text, number_of)


def parse_interfaces(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_interface(each) for each in words(text)))


def parse_mark(text: str) -> int:
    """Decimal or hexadecimal. 0 is no mark, and 1338 is taken."""
    if "/" in text:
        raise ValueError(f'"{text}": the whole mark is ours, so a mask is not supported')
    mark = _number(text, 1, 0xFFFF_FFFF, "a mark, a number from 1 to 0xffffffff")
    if mark == OUTBOUND_MARK:
        raise ValueError(f'"{text}" is the mark of the proxy\'s calls to this host; take another')
    return mark


def parse_table(text: str) -> int:
    # 253, 254 and 255 are default, main and local (linux/rtnetlink.h): a local default route there
    # would swallow everything that leaves this host.
    table = _number(text, 1, 0xFFFF_FFFF, "a routing table, a number from 1 to 0xffffffff")
    if 253 <= table <= 255:
        raise ValueError(f'"{text}" is a routing table that the system needs; take another')
    return table


def parse_loopback(text: str) -> ipaddress.IPv4Network:
    try:
        network = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        network = None
    if network is None or not network.is_loopback or "/" not in text:
        raise ValueError(f'"{text}" is not a CIDR within 127.0.0.0/8, for example 127.0.0.1/32')
    return network


def words(text: str) -> list[str]:
    return [word for each in text.split(",") if (word := each.strip())]


def _number(text: str, low: int, high: int, what: str) -> int:
    base = 16 if re.fullmatch("0[xX][0-9a-fA-F]+", text) else 10
    if (base == 10 and not re.fullmatch("[0-9]+", text)) or not low <= int(text, base) <= high:
        raise ValueError(f'"{text}" is not {what}')
    return int(text, base)


def _port_range(text: str) -> PortRange:
    if text == "*":
        raise ValueError('"*" stands alone, and not in this list')
    low, colon, high = text.partition(":")
    ends = parse_port(low), parse_port(high if colon else low)
    if ends[0] > ends[1]:
        raise ValueError(f'"{text}" is not a range: the low port comes first')
    return ends


def _network(text: str) -> IPNetwork:
    if text == "*":
        raise ValueError('"*" stands alone, and not in this list')
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'"{text}" is not a CIDR, for example 10.0.0.0/8') from None


def _id(text: str, number_of: Callable[[str], int]) -> int:
    if re.fullmatch("[0-9]+", text) and int(text) < 0xFFFF_FFFF:  # (uid_t)-1 means "none"
        return int(text)
    try:
        return number_of(text)
    except KeyError:
        raise ValueError(f'"{text}" is neither a number nor a name that is known here') from None


def _interface(text: str) -> str:
    # IFNAMSIZ is 16 with the closing NUL (linux/if.h).
    if re.fullmatch(r"[^\s/\"+*]{1,15}|[^\s/\"+*]{1,14}\+", text):
        return text
    raise ValueError(f'"{text}" is not an interface name, for example eth0 or veth+')
