"""May this peer speak for others, who is the client, and where do we connect, as whom?

Trust fails closed: a peer that no entry names is never asked for a header, whatever it sends is
payload, and it speaks only for itself. An entry's order is the operator's: the first match wins.

A header is only a claim. The addresses it may not name are those with which it could do harm on
this host: one of our own or loopback (what the application trusts as local), unspecified,
multicast and broadcast (no host's address), port 0 (no port). Pure: what only the kernel knows of
an address comes in as `kind_of` (linux.AddressKinds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Upstream, parse_ip
from tproxyd.config import HeaderPolicy, ProxyProtocol, SourceKind
from tproxyd.errors import CloseReason
from tproxyd.flow.proxyproto import Header


class Plan(NamedTuple):
    client: Client  # who it is
    upstream: Upstream  # where to connect
    spoof: bool  # as the client; else from the proxy's own address
    fallback: str = ""  # why not as the client, where that was asked for


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: CloseReason
    detail: str


def trust(entries: tuple[ProxyProtocol, ...]) -> Callable[[str], HeaderPolicy | None]:
    """A function from a peer's host to what it is expected to send; None: never look.

    Cached for the 4096 hosts seen last: on a busy listener the same balancers come again.
    """

    @lru_cache(maxsize=4096)
    def expectation(host: str) -> HeaderPolicy | None:
        for entry in entries:
            if host in entry.peers:
                return entry.policy
        return None

    if not entries:
        return lambda _host: None
    return expectation


def plan_for(
    peer: Peer,
    dst: OriginalDst,
    header: Header | None,
    source: SourceKind,
    own_ports: frozenset[int],
    kind_of: Callable[[str], str],
) -> Plan | Refusal:
    """Who the client is and how to reach its destination; or why not.

    `own_ports` are the ports of our listeners: only local destinations are intercepted, so a
    connection to one of them would come straight back to us.
    """
    if dst.port in own_ports:
        return Refusal(CloseReason.LOOP, f"the destination {dst} is our own listener")
    client = Client(peer)
    if header is not None and header.source is not None:
        why = _unclaimable(header.source, kind_of)
        if why:
            return Refusal(CloseReason.CLIENT_REFUSED, f"the header names {header.source}: {why}")
        client = Client(header.source)
    upstream = Upstream(dst)
    if source is SourceKind.PROXY:
        return Plan(client, upstream, False)
    if (":" in client.host) != (":" in upstream.host):
        return Plan(client, upstream, False, "family")
    return Plan(client, upstream, True)


def _unclaimable(claim: Endpoint, kind_of: Callable[[str], str]) -> str:
    """Why nobody may claim to be this address; "" when anyone may."""
    if claim.port == 0:
        return "port 0"
    ip = parse_ip(claim.host)
    if ip.is_unspecified or (ip.version == 4 and ip.packed[0] == 0):
        return "an unspecified address"  # 0.0.0.0/8: "this network", RFC 1122 3.2.1.3
    if ip.is_loopback:
        return "a loopback address"
    if ip.is_multicast:
        return "a multicast address"
    if claim.host == "255.255.255.255":
        return "a broadcast address"
    kind = kind_of(claim.host)
    if kind == "own":
        return "one of this host's own addresses"
    if kind == "broadcast":
        return "a broadcast address"
    return ""
