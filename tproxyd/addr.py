"""Addresses: one type per role, prefix sets, and the folding of v4-mapped ones.

Peer, Client, OriginalDst, Upstream and Source are all (host, port); giving each its own name lets
the type checker find the swap that no test would. An Endpoint is a plain tuple on purpose: the
socket module takes it as it is, so nothing is converted on the way to bind() or connect().

Hosts are canonical text (what getnameinfo prints), because that is what both the socket module
and the access log want. `fold` is called exactly where foreign text or a dual-stack socket enters.
Pure: no sockets here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import NamedTuple, NewType

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Endpoint(NamedTuple):
    """An IP address as canonical text and a TCP port.

    Of an upstream also: a name and a port; or the path of a unix socket, and port 0.
    """

    host: str
    port: int

    @property
    def is_v6(self) -> bool:
        return ":" in self.host

    def __str__(self) -> str:
        if self.host.startswith("/"):
            return f"unix:{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# Endpoint from a pair (host, port), by the constructor of tuple: 0.1 µs, not 0.3.
endpoint_of = partial(tuple.__new__, Endpoint)

Peer = NewType("Peer", Endpoint)  # who really connected to us: the far end of the socket
Client = NewType("Client", Endpoint)  # who it is on behalf of: the peer, or what its header says
OriginalDst = NewType("OriginalDst", Endpoint)  # where the peer meant to go
Upstream = NewType("Upstream", Endpoint)  # where we connect
Source = NewType("Source", Endpoint)  # what the upstream sees as its peer


@lru_cache(maxsize=4096)
def parse_ip(host: str) -> IPAddress:
    """The address that `host` spells, v4-mapped IPv6 folded to IPv4; ValueError if it is none.

    Cached: on a busy listener the same few hosts come again and again. 4096 of them take 0.6 MiB.
    A zone ("fe80::1%eth0") is kept.
    """
    ip = ipaddress.ip_address(host)
    if ip.version == 6 and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def fold(host: str) -> str:
    """Canonical text of `host` with ::ffff:a.b.c.d folded to a.b.c.d; ValueError if no address."""
    return str(parse_ip(host))


def parse_endpoint(text: str) -> Endpoint:
    """ "127.0.0.1:80" or "[::1]:80" as an Endpoint; ValueError that says what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'"{text}" is not ADDRESS:PORT, for example "127.0.0.1:9133"')
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f'"{text}": write an IPv6 address in brackets, as in "[::1]:{port}"')
    try:
        return Endpoint(fold(host), int(port))
    except ValueError:
        raise ValueError(f'"{text}": "{host}" is not an IP address') from None


def is_unix(upstream: Endpoint) -> bool:
    return upstream.host.startswith("/")


def is_name(upstream: Endpoint) -> bool:
    """Whether its host has to be looked up."""
    if is_unix(upstream):
        return False
    try:
        ipaddress.ip_address(upstream.host)
    except ValueError:
        return True
    return False


# sun_path of sockaddr_un has 108 bytes, one of them for the closing NUL (linux/un.h).
_LONGEST_PATH = 107
# RFC 1123, 2.1, and the underscore that people use all the same. The last label has a letter: what
# has none is an address with a mistake in it.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"({_LABEL}\.)*(?=[a-z0-9_-]*[a-z]){_LABEL}\.?", re.IGNORECASE)


def parse_upstream(text: str) -> Endpoint:
    """ "10.0.0.5:80", "[fd00::5]:80", "app.example:80" or "unix:/run/app.sock".

    ValueError that says what is wrong.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path or len(path.encode()) > _LONGEST_PATH:
            raise ValueError(
                f'"{text}": the path of a unix socket begins with / and has at most'
                f" {_LONGEST_PATH} bytes"
            )
        return Endpoint(path, 0)
    host, _, port = text.rpartition(":")
    if _NAME.fullmatch(host) and len(host) <= 253 and port.isascii() and port.isdigit():
        where = Endpoint(host.lower(), int(port))
    else:
        try:
            where = parse_endpoint(text)
        except ValueError:
            raise ValueError(
                f'"{text}" is not ADDRESS:PORT, NAME:PORT or unix:/PATH,'
                ' for example "10.0.0.5:80" or "[fd00::5]:80"'
            ) from None
    if not 1 <= where.port <= 65535:
        raise ValueError(f'"{text}": a port is a number from 1 to 65535')
    return where


class PrefixSet:
    """A set of IP prefixes that answers whether an address is in it. Immutable and hashable.

    An empty set contains nothing: what is not listed is not trusted. The prefixes are collapsed,
    so two sets that cover the same addresses are equal.
    """

    __slots__ = ("networks",)

    def __init__(self, networks: Iterable[IPNetwork] = ()) -> None:
        v4: list[ipaddress.IPv4Network] = []
        v6: list[ipaddress.IPv6Network] = []
        for network in networks:
            if isinstance(network, ipaddress.IPv4Network):
                v4.append(network)
            else:
                v6.append(network)
        self.networks: tuple[IPNetwork, ...] = (
            *ipaddress.collapse_addresses(v4),
            *ipaddress.collapse_addresses(v6),
        )

    def __contains__(self, host: str) -> bool:
        ip = parse_ip(host)
        return any(ip in network for network in self.networks if network.version == ip.version)

    def covers(self, other: PrefixSet) -> bool:
        """Whether every address of `other` is in this one."""
        return PrefixSet((*self.networks, *other.networks)) == self

    def __bool__(self) -> bool:
        return bool(self.networks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrefixSet) and self.networks == other.networks

    def __hash__(self) -> int:
        return hash(self.networks)

    def __repr__(self) -> str:
        return f"PrefixSet({', '.join(map(str, self.networks)) or 'empty'})"


def parse_prefix(text: str) -> IPNetwork:
    """ "10.0.0.0/8", "fd00::/8" or a bare address; ValueError that says what is wrong.

    A v4-mapped prefix (::ffff:10.0.0.0/104) is folded: addresses are, so it would never match.
    """
    if "%" in text:  # ipaddress keeps it, and the kernel has no field for it
        raise ValueError(f'"{text}": a prefix has no zone ("%")')
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        try:
            loose = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValueError(f'"{text}" is not an IP prefix, for example "10.0.0.0/8"') from None
        raise ValueError(f'"{text}" has bits set behind its length; meant "{loose}"?') from None
    mapped = network.network_address.ipv4_mapped if network.version == 6 else None
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network
