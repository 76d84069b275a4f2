"""May this peer speak for others, who is the client, and where do we connect, as whom?

Trust fails closed: a peer that no entry names is never asked for a header, whatever it sends is
payload, and it speaks only for itself. An entry's order is the operator's: the first match wins.

A header is only a claim. The addresses it may not name are those with which it could do harm on
this host: one of our own or loopback (what the application trusts as local), unspecified,
multicast and broadcast (no host's address), port 0 (no port). Pure: what only the kernel knows of
an address comes in as `kind_of` (linux.AddressKinds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Upstream, parse_ip
from tproxyd.config import HeaderPolicy, Listener, ProxyProtocol, Scope, SourceKind, Via
from tproxyd.errors import CloseReason
from tproxyd.flow.proxyproto import Header

# Istio's InboundPassthroughBindIpv4 and ...Ipv6 (pilot/pkg/networking/core/listener_inbound.go).
REDIRECTED_V4, REDIRECTED_V6 = "127.0.0.6", "::6"


class Plan(NamedTuple):
    client: Client  # who it is
    upstream: Upstream  # where to connect
    spoof: bool  # as the client; else from an address of our own
    fallback: str = ""  # why not as the client, where that was asked for
    here: bool = True  # the upstream is on this host: its answers come home by our mark
    keep_port: bool = False  # try the client's own port first
    own: str = ""  # the address of our own; "": the kernel's choice
    door: Endpoint | None = None  # where nat delivers what clients send to the upstream


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


# Where we listen ourselves: the addresses of each port, 0.0.0.0 and :: for all of a family.
OwnSockets = Mapping[int, frozenset[str]]


def own_sockets(listeners: Iterable[Listener]) -> OwnSockets:
    found: dict[int, frozenset[str]] = {}
    for each in listeners:
        hosts = ("0.0.0.0", "::") if each.bind in ("", "*") else (each.bind,)
        found[each.port] = found.get(each.port, frozenset()).union(hosts)
    return found


def is_own(where: Endpoint, own: OwnSockets) -> bool:
    """Whether a connection to there comes to us, as far as this host has the address."""
    hosts = own.get(where.port, ())
    return where.host in hosts or ("::" if ":" in where.host else "0.0.0.0") in hosts


def client_of(
    peer: Peer,
    dst: OriginalDst,
    header: Header | None,
    listener: Listener,
    own: OwnSockets,
    kind_of: Callable[[str], str],
) -> Client | Refusal:
    """Who the client is; or why it is not served.

    A connection that was made to one of our `own` sockets, and not taken on its way to somewhere
    else, would come straight back to us.
    """
    if dst.port in own and not listener.bind and is_own(dst, own):
        here = listener.intercept.scope is Scope.LOCAL  # no other destinations are taken
        if here or kind_of(dst.host) == "own":
            return Refusal(CloseReason.LOOP, f"the destination {dst} is our own listener")
    if header is None or header.source is None:
        return Client(peer)
    why = _unclaimable(header.source, kind_of)
    if why:
        return Refusal(CloseReason.CLIENT_REFUSED, f"the header names {header.source}: {why}")
    return Client(header.source)


def plan_for(
    client: Client, upstream: Upstream, listener: Listener, here: bool, door: Endpoint | None = None
) -> Plan:
    """Where to connect, as whom. `here`: the upstream is on this host."""
    source = listener.source
    if source is not SourceKind.PROXY:
        fallback = ""
        v6 = ":" in upstream.host
        if (":" in client.host) != v6:
            fallback = "family"
        elif v6 and (_is_link_local(client.host) or _is_link_local(upstream.host)):
            fallback = "link-local"  # it binds a socket to its interface: no answer comes by lo
        elif not here and client.host == upstream.host:
            fallback = "hairpin"  # no host takes packets that come from outside as from itself
        elif not here and parse_ip(client.host).is_loopback:
            fallback = "loopback"  # which means nothing on another host, nor leaves this one
        if not fallback:
            keep = source is SourceKind.CLIENT_PORT
            return Plan(client, upstream, True, "", here, keep, "", door)
        return Plan(client, upstream, False, fallback, here, False, own_source(listener, upstream))
    return Plan(client, upstream, False, "", here, False, own_source(listener, upstream))


def _is_link_local(host: str) -> bool:
    return "%" in host or parse_ip(host).is_link_local


def own_source(listener: Listener, upstream: Upstream) -> str:
    """Of our own addresses the one to connect from; "" where the kernel may choose.

    Istio's two for redirected connections: the application sees that it is the proxy who calls, and
    rules that take what this host sends can tell.
    """
    take = listener.intercept
    if listener.bind or take.via is not Via.REDIRECT or take.scope is not Scope.LOCAL:
        return ""
    if listener.upstream:
        return ""  # which may be anywhere
    return REDIRECTED_V6 if ":" in upstream.host else REDIRECTED_V4


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
