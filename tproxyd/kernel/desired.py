"""What the kernel should hold for a Config: how packets of its connections find us.

C is the client, P an address of this host, B one of another.

**On this host.** A client comes to P, and we connect to the application as the client:

    C:p → P:80     prerouting takes it: tproxy hands the packet to our listener without changing it
    C:q → P:80     our upstream socket spoofs C. Its packets carry the mark, the policy rule sends
                   them to our table, whose only route delivers them through lo; the mark survives
    P:80 → C:q     the application's answer. It must come back to us through lo **instead of leaving
                   toward the real client**, which would answer RST. So it must carry the mark too

Two ways to mark the answer (`return_path`), where a listener may have such a connection at all:

- accept-mark: the sysctl net.ipv4.tcp_fwmark_accept=1 (which serves IPv6 as well) makes the
  application's accepted socket inherit the mark of the SYN. What answers without a socket, the RST
  of a closed port or an ICMP error, needs fwmark_reflect=1 (one for IPv4, one for IPv6): without it
  such an answer leaves toward the client, and a refused connection ends as a timeout. No conntrack,
  the fastest, but the sysctls apply to the whole namespace: right in a pod, wrong as a silent
  default on a host whose other programs mark packets. Our own listeners carry another mark, so that
  they inherit none.
- conntrack: the connection is marked when its packets pass lo, its answers get the mark from it.
  An answer is first routed without the mark, so there must be some route toward the client.
  It also knows the answers to what this host itself asks of others; where nat has sent such a
  question elsewhere (the chains of nat at output, kube-proxy's say), only it does, and under
  accept-mark they would be taken for a client's packets.

No DIVERT rule and no mark on the way in: a local destination is delivered locally in any case, and
tproxy finds the established socket first, the listener second. Flows that are older than the rules
have a socket that is not transparent; tproxy lets those pass.

**To another host**, as the client: C:q → B:80 leaves unmarked by the usual route, and B must route
its answers through us. B:80 → C:q is not for an address of this host; a rule finds that we have a
socket for it (`home`), and the mark, the same policy rule and the same route deliver it here. ICMP
errors about the connection likewise.

**On a router**, C:p → B:80 is taken by its SYN, with the mark; the rest of its packets find their
socket by the rule `home`. So what is older, or not selected, is forwarded untouched. Measured, and
not to be had otherwise:

- A SYN cookie's ACK has no socket to be found by, and is forwarded to B, which resets the client.
  So where the queue of the listener overflows, or with net.ipv4.tcp_syncookies=2, connections of a
  router are refused; with 0 they wait for their SYN to be sent again. To hand the listener every
  ACK without a socket would end all older connections; to tell them apart takes connection
  tracking, or a memory of SYNs, which is what cookies are to do without.
- With src_valid_mark=1 on the interface, IPv4 asks for the way back to the sender with the mark of
  the packet, and finds our table (__fib_validate_source). Then the packets of `home` and of a
  router arrive only with accept_local=1 and an rp_filter of 0 or 2; otherwise every one is dropped.
  Without src_valid_mark all values of the two work.
- With the client's own port, ours to B is the client's connection to connection tracking: a rule of
  nat that would masquerade it is not asked, and it leaves as C.

**By nat** (`via = "redirect"`, and what is made on this host): the destination is rewritten to our
listener, which asks for the original one. Where we then connect as ourselves, no mark is needed.
Istio's 127.0.0.6 is local by itself; ::6 becomes so by a route of its own, with which a socket that
is bound to it with IPV6_FREEBIND reaches every local address and gets its answers.

How the rules say it is in chains.py. Pure.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import NamedTuple

from tproxyd.addr import Endpoint, is_name, is_unix
from tproxyd.config import Backend, Config, Listener, ReturnPath, Scheme, Scope, SourceKind, Via
from tproxyd.istio.options import PASSTHROUGH_V6, IstioOptions
from tproxyd.kernel.chains import firewall
from tproxyd.kernel.firewall import FULL_MASK, Family, mark_mask
from tproxyd.kernel.selectors import takes_nothing
from tproxyd.kernel.state import (
    MARK_SYSCTLS,
    OURS,
    REFLECT_V6,
    Address,
    KernelState,
    PolicyRule,
    Route,
    Sysctl,
    Tables,
    number_for,
)

# The mark in decimal (0x539), for whoever reads `ip rule`. Behind `local` (0); before Tailscale's
# 5210 and its siblings, wg-quick's 32764 and `main` (32766), any of which would send the packets
# away; and with room before it for an administrator who must overrule us.
PRIORITY = 1337
_TABLE_LOCAL = 255  # RT_TABLE_LOCAL, include/uapi/linux/rtnetlink.h


@dataclass(frozen=True, slots=True)
class Facts:
    """What the wish depends on and only the machine can tell (routing.facts)."""

    ipv6: bool
    host_netns: bool  # this is the host's own network namespace
    set_before: frozenset[str] = frozenset()  # those of MARK_SYSCTLS that were not 0 before us
    sysctls_writable: bool = True  # or set; false where containers get /proc/sys read-only
    lo_up: bool = True
    own: frozenset[str] = frozenset()  # the addresses of this host
    ip_tables: tuple[Family, ...] = (4, 6)  # IP versions of the kernel, whether used or not
    legacy_rules: bool = False  # legacy tables have rules
    nft: bool = True  # there is a library or a command for it
    # What AUTO has come to already, here or in the life of the process that asks.
    backend: Backend | None = None
    path: ReturnPath | None = None


# What is needed -----------------------------------------------------------------------------------


def dials_here(config: Config, facts: Facts) -> bool:
    """Whether a connection to an address of this host may carry a foreign source address."""
    return any(
        _shows_strangers(each)
        and (
            any(_may_be_here(upstream, facts) for upstream in each.upstream)
            or (not each.upstream and each.intercepts and each.intercept.scope is Scope.LOCAL)
        )
        for each in config.listeners
    )


def holds_elsewhere(config: Config, facts: Facts) -> bool:
    """Whether there may be sockets for connections of which neither end is an address of ours."""
    return any(
        (each.intercepts and each.intercept.scope is Scope.FORWARD)
        or (
            _shows_strangers(each)
            and (
                any(_may_be_elsewhere(upstream, facts) for upstream in each.upstream)
                or (not each.upstream and _is_outbound(each))
            )
        )
        for each in config.listeners
    )


def _shows_strangers(listener: Listener) -> bool:
    """Whether upstreams may see an address that is none of this host's."""
    local_clients = _is_outbound(listener) and not listener.proxy_protocol
    return listener.spoofs and not local_clients


def _is_outbound(listener: Listener) -> bool:
    return listener.intercepts and listener.intercept.scope is Scope.OUTBOUND


def _may_be_here(upstream: Endpoint, facts: Facts) -> bool:
    return not is_unix(upstream) and (is_name(upstream) or _is_own(upstream, facts))


def _may_be_elsewhere(upstream: Endpoint, facts: Facts) -> bool:
    return not is_unix(upstream) and (is_name(upstream) or not _is_own(upstream, facts))


def _is_own(upstream: Endpoint, facts: Facts) -> bool:
    ip = ipaddress.ip_address(upstream.host)
    return ip.is_loopback or ip.is_unspecified or upstream.host in facts.own


class BackendChoice(NamedTuple):
    backend: Backend  # never AUTO
    why: str


def backend(config: Config, facts: Facts) -> BackendChoice:
    """Who holds the packet rules, and a sentence that says why."""
    chosen = config.rules.backend
    if chosen is not Backend.AUTO:
        return BackendChoice(chosen, f"backend {chosen}: it was asked for")
    if facts.backend is not None:
        chosen, why = facts.backend, "rules of ours are there"
    elif facts.legacy_rules:
        chosen, why = Backend.IPTABLES_LEGACY, "the legacy tables have rules here"
    elif facts.nft:
        chosen, why = Backend.NFT, "nftables is there, and no legacy tables are in use"
    else:
        chosen, why = Backend.IPTABLES_NFT, "there is no nft, library or command"
    return BackendChoice(chosen, f"backend {chosen}: {why}")


class Choice(NamedTuple):
    path: ReturnPath  # never AUTO
    why: str


def return_path(config: Config, facts: Facts) -> Choice:
    """How answers on this host find home (if `dials_here`), and a sentence that says why."""
    if config.rules.scheme is Scheme.ISTIO:
        return Choice(ReturnPath.CONNTRACK, "return path conntrack: scheme istio has no other")
    chosen = config.rules.return_path
    if chosen is not ReturnPath.AUTO:
        return Choice(chosen, f"return path {chosen}: the configuration says so")
    if facts.path is not None:
        return Choice(facts.path, f"return path {facts.path}: open connections have it")
    if backend(config, facts).backend is not Backend.NFT:
        path, why = ReturnPath.CONNTRACK, "the rules for iptables track connections in any case"
    elif facts.host_netns:
        path, why = ReturnPath.CONNTRACK, "this is the host's network namespace, where others mark"
    elif not _to_be_set(facts):
        path, why = ReturnPath.ACCEPT_MARK, "its sysctls are set here already"
    elif not facts.sysctls_writable:
        path, why = ReturnPath.CONNTRACK, "sysctls cannot be written here"
    else:
        path, why = ReturnPath.ACCEPT_MARK, "this network namespace is not the host's"
    return Choice(path, f"return path {path}: {why}")


def _to_be_set(facts: Facts) -> tuple[str, ...]:
    """The sysctls of accept-mark that were not set before us."""
    needed = (name for name in MARK_SYSCTLS if facts.ipv6 or name != REFLECT_V6)
    return tuple(name for name in needed if name not in facts.set_before)


# The wish -----------------------------------------------------------------------------------------


def desired(config: Config, *, facts: Facts, intercept: bool = True) -> KernelState:
    """The whole state; without `intercept` only what brings answers home, for the time of a drain.

    Connections that live then need no interception: their packets find their sockets.
    """
    if config.rules.scheme is Scheme.ISTIO:
        return istio_state(config, facts, intercept)
    way, here = return_path(config, facts).path, dials_here(config, facts)
    path = way if here else None
    home = holds_elsewhere(config, facts)
    sysctls = _to_be_set(facts) if path is ReturnPath.ACCEPT_MARK else ()
    protocol = number_for(sysctls)
    mask = mark_mask(config.mark)
    families: tuple[Family, ...] = (4, 6) if facts.ipv6 else (4,)
    marked = families if home or path is not None else ()
    routes = [Route(family, config.table, protocol) for family in marked]
    if facts.ipv6 and any(map(_redirected_and_ourselves, config.listeners)):
        routes.append(Route(6, _TABLE_LOCAL, protocol, f"{PASSTHROUGH_V6}/128"))
    chosen = backend(config, facts).backend
    nft = chosen is Backend.NFT
    tables: tuple[Tables, ...] = ()
    if not nft:
        from tproxyd.kernel.iptchains import chains  # a quarter of a mebibyte, for few

        tables = tuple(
            Tables(
                chosen,
                family,
                chains(
                    *(config, family),
                    served=family in families,
                    path=path,
                    home=home,
                    intercept=intercept,
                ),
            )
            for family in facts.ip_tables
        )
    return KernelState(
        sysctls=tuple(Sysctl(name, OURS) for name in sysctls),
        routes=tuple(routes),
        rules=tuple(
            PolicyRule(family, PRIORITY, config.mark, mask, config.table, protocol)
            for family in marked
        ),
        firewall=firewall(config, families, way, here, home, intercept) if nft else (),
        iptables=tuple(each for each in tables if each.chains),
    )


def _redirected_and_ourselves(listener: Listener) -> bool:
    take = listener.intercept
    redirected = listener.intercepts and take.scope is Scope.LOCAL and take.via is Via.REDIRECT
    return redirected and listener.source is SourceKind.PROXY


def istio_state(config: Config, facts: Facts, intercept: bool = True) -> KernelState:
    """As istio-iptables would make it for the same connections."""
    from tproxyd.kernel.istioconfig import istio_options  # half a mebibyte, for few

    options = istio_options(config, ipv6=facts.ipv6)
    return desired_istio(options, backend(config, facts).backend, intercept)


def desired_istio(options: IstioOptions, chosen: Backend, intercept: bool = True) -> KernelState:
    """The state that istio-iptables is told to make. Without `intercept`, no new connection is
    taken.
    """
    from tproxyd.kernel import istio

    families: tuple[Family, ...] = (4, 6) if options.ipv6 else (4,)
    marked = families if options.needs_routes else ()
    taking = options
    if not intercept:
        taking = replace(options, inbound_ports=(), outbound_ranges=(), outbound_ports=())
    nft = chosen is Backend.NFT
    return KernelState(
        routes=tuple(Route(family, options.table, OURS) for family in marked),
        addresses=(Address(PASSTHROUGH_V6, OURS),) if options.ipv6 else (),
        rules=tuple(
            PolicyRule(family, PRIORITY, options.mark, FULL_MASK, options.table, OURS)
            for family in marked
        ),
        firewall=istio.nft_chains(taking) if nft else (),
        iptables=tuple(
            Tables(chosen, family, istio.chains(taking, family))
            for family in (() if nft else families)
        ),
    )


def notes(config: Config, facts: Facts) -> tuple[str, ...]:
    """What the operator should hear about this wish, in sentences."""
    said: list[str] = []
    intercepting = [each for each in config.listeners if each.intercepts]
    chosen = backend(config, facts)
    if chosen.backend is not Backend.NFT:
        said.append(chosen.why)
        if any(each.intercept.via is Via.TPROXY for each in intercepting):
            said.append(
                "under iptables, clients are not refused while nobody listens: they wait, since its"
                " TPROXY drops what it finds no listener for"
            )
    if config.rules.scheme is Scheme.ISTIO:
        said.append(
            "scheme istio, as istio-iptables has it: no connection while SYN cookies are in use,"
            " none where src_valid_mark is 1, and under iptables older connections end"
        )
    elif dials_here(config, facts):
        said.append(return_path(config, facts).why)
    if intercepting and not facts.ipv6:
        said.append("no IPv6 on this machine (or on lo): IPv4 only, IPv6 connections are refused")
    said += [
        f"listener {listener.name} takes nothing: its sources and destinations are of two families"
        for listener in intercepting
        if takes_nothing(listener.intercept)
    ]
    return tuple(said)
