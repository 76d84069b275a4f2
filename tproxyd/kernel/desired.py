"""What the kernel should hold for a Config: the rule tables, each rule with its reason.

The walk of one connection on this host, C the client, P the pod's address:

    C:p → P:80     prerouting takes it: tproxy hands the packet to our listener without changing it
    C:q → P:80     our upstream socket spoofs C. Its packets carry the mark, the policy rule sends
                   them to our table, whose only route delivers them through lo; the mark survives
    P:80 → C:q     the application's answer. It must come back to us through lo **instead of leaving
                   toward the real client**, which would answer RST. So it must carry the mark too

Two ways to mark the answer (`return_path`):

- accept-mark: the sysctl net.ipv4.tcp_fwmark_accept=1 (which serves IPv6 as well) makes the
  application's accepted socket inherit the mark of the SYN. What answers without a socket, the RST
  of a closed port or an ICMP error, needs fwmark_reflect=1 (one for IPv4, one for IPv6): without it
  such an answer leaves toward the client, and a refused connection ends as a timeout. No conntrack,
  the fastest, but the sysctls apply to the whole namespace: right in a pod, wrong as a silent
  default on a host whose other programs mark packets. Our own listeners carry another mark, so that
  they inherit none.
- conntrack: the connection is marked when its packets pass lo, its answers get the mark from it.
  An answer is first routed without the mark, so there must be some route toward the client.

No DIVERT rule and no mark on the way in: a local destination is delivered locally in any case, and
tproxy finds the established socket first, the listener second. Flows that are older than the rules
have a socket that is not transparent; tproxy lets those pass. Only what may be ours is touched:
packets from outside, TCP, for an address of this host. Forwarded traffic goes its way.

In nft a tproxy that finds no socket lets the next rule run. So the last rule of a listener's chain
refuses a SYN: without it, a connection would silently bypass us whenever nobody listens. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tproxyd.addr import PrefixSet
from tproxyd.config import Config, Intercept, Listener, ReturnPath
from tproxyd.kernel.firewall import (
    Chain,
    ConnMark,
    DestinationIn,
    Family,
    Firewall,
    Goto,
    Hook,
    InInterface,
    IpVersion,
    Match,
    MeetsTransparentSocket,
    NotForUs,
    NotTcp,
    PacketMark,
    PortIn,
    Rule,
    SetConnMark,
    SetPacketMark,
    SourceIn,
    Syn,
    Tproxy,
    Verdict,
)
from tproxyd.kernel.state import (
    MARK_SYSCTLS,
    REFLECT_V6,
    KernelState,
    PolicyRule,
    Route,
    Sysctl,
    number_for,
)
from tproxyd.reader import EVERY_PORT

# The mark in decimal (0x539), for whoever reads `ip rule`. Behind `local` (0); before Tailscale's
# 5210 and its siblings, wg-quick's 32764 and `main` (32766), any of which would send the packets
# away; and with room before it for an administrator who must overrule us.
PRIORITY = 1337


@dataclass(frozen=True, slots=True)
class Facts:
    """What the wish depends on and only the machine can tell (routing.facts)."""

    ipv6: bool
    host_netns: bool  # this is the host's own network namespace
    set_before: frozenset[str] = frozenset()  # those of MARK_SYSCTLS that were not 0 before us
    sysctls_writable: bool = True  # false where containers get /proc/sys read-only
    lo_up: bool = True


class Choice(NamedTuple):
    path: ReturnPath  # never AUTO
    why: str


def return_path(config: Config, facts: Facts) -> Choice:
    """How answers find home, and a sentence for the log that says why."""
    chosen = config.rules.return_path
    if chosen is not ReturnPath.AUTO:
        return Choice(chosen, f"return path {chosen}: the configuration says so")
    if facts.host_netns:
        path, why = ReturnPath.CONNTRACK, "this is the host's network namespace, where others mark"
    elif not _to_be_set(facts):
        path, why = ReturnPath.ACCEPT_MARK, "its sysctls are set here already"
    elif not facts.sysctls_writable:
        path, why = ReturnPath.CONNTRACK, "sysctls cannot be written here"
    else:
        path, why = ReturnPath.ACCEPT_MARK, "this network namespace is not the host's"
    return Choice(path, f"return path {path}: {why}")


def desired(config: Config, *, facts: Facts, intercept: bool = True) -> KernelState:
    """The whole state; without `intercept` only what brings answers home, for the time of a drain.

    Connections that live then need no interception: their packets find their sockets.
    """
    path = return_path(config, facts).path
    sysctls = _to_be_set(facts) if path is ReturnPath.ACCEPT_MARK else ()
    protocol = number_for(sysctls)
    mask = mark_mask(config.mark)
    families: tuple[Family, ...] = (4, 6) if facts.ipv6 else (4,)
    return KernelState(
        sysctls=tuple(Sysctl(name, 1) for name in sysctls),
        routes=tuple(Route(family, config.table, protocol) for family in families),
        rules=tuple(
            PolicyRule(family, PRIORITY, config.mark, mask, config.table, protocol)
            for family in families
        ),
        firewall=_firewall(config, facts, path, intercept),
    )


def _to_be_set(facts: Facts) -> tuple[str, ...]:
    """The sysctls of accept-mark that were not set before us."""
    needed = (name for name in MARK_SYSCTLS if facts.ipv6 or name != REFLECT_V6)
    return tuple(name for name in needed if name not in facts.set_before)


def notes(config: Config, facts: Facts) -> tuple[str, ...]:
    """What the operator should hear about this wish, in sentences."""
    said = [return_path(config, facts).why]
    if not facts.ipv6:
        said.append("no IPv6 on this machine (or on lo): IPv4 only, IPv6 connections are refused")
    said += [
        f"listener {listener.name} takes nothing: its sources and destinations are of two families"
        for listener in config.listeners
        if not _address_matches(listener.intercept)
    ]
    return tuple(said)


def mark_mask(mark: int) -> int:
    """All ones up to the mark's highest hexadecimal digit: 0x539 → 0xfff.

    Others may OR bits above ours into a packet's mark; compared whole, 0x10539 would not be 0x539
    and its packet would leave toward the client.
    """
    return (1 << (mark.bit_length() + 3) // 4 * 4) - 1


# The rules, in the order in which a packet meets them ---------------------------------------------


def _firewall(config: Config, facts: Facts, path: ReturnPath, intercept: bool) -> Firewall:
    mark, mask = config.mark, mark_mask(config.mark)
    ours_on_lo = (InInterface(("lo",)), PacketMark(mark, mask))
    guard = Rule(
        (*ours_on_lo, Syn(), MeetsTransparentSocket()),
        Verdict.DROP,
        "our SYN to the application meets a living connection of the same client. Delivered, it is"
        " answered there, our connect stalls, and with conntrack it has given that connection our"
        " mark. Dropped, it is missed at once by our dialler, which takes another port. (The"
        " application's own listener is not transparent.)",
    )
    remember = Rule(
        ours_on_lo,
        SetConnMark(mark, mask),
        "keep the mark of our upstream connection for its answers; without it they leave toward the"
        " real client, which resets the connection",
    )
    taken = Rule(
        (ConnMark(mark, mask), Syn()),
        Verdict.DROP,
        "a client at the port of a living upstream connection of ours: a refusal would end that"
        " connection in conntrack's books, and lose its answers; the client tries again by itself",
    )
    recall = Rule(
        (ConnMark(mark, mask),),
        SetPacketMark(mark, mask),
        "the application's answer gets the mark of its connection and is routed once more, to lo",
    )
    bypasses = (
        Rule(
            (InInterface(("lo",)),),
            Verdict.ACCEPT,
            "what comes through lo is this host's own: our upstream connections would loop to us",
        ),
        Rule((NotTcp(),), Verdict.ACCEPT, "only TCP is proxied"),
        Rule(
            (NotForUs(),),
            Verdict.ACCEPT,
            "forwarded traffic goes its way; without it, a node would take its pods' connections",
        ),
    )
    conntrack = path is ReturnPath.CONNTRACK
    takes = [rule for listener in config.listeners for rule in _selectors(listener)]
    prerouting = (
        guard,
        *((remember,) if conntrack else ()),
        *(bypasses if intercept else ()),
        *((taken,) if intercept and conntrack else ()),
        *(takes if intercept else ()),
    )
    chains = [Chain("prerouting", Hook.PREROUTING, prerouting)]
    if conntrack:
        chains.append(Chain("output", Hook.OUTPUT, (recall,)))
    if intercept:
        chains += [_take(listener, facts) for listener in config.listeners]
    return tuple(chains)


def _chain_name(listener: Listener) -> str:
    """Prefixed: a listener may be called "output"."""
    return f"take_{listener.name}"


def _selectors(listener: Listener) -> list[Rule]:
    """One rule into the listener's chain for each combination that a single rule cannot say."""
    take = listener.intercept
    ports: tuple[Match, ...] = ()
    if take.ports != EVERY_PORT:
        ports += (PortIn(take.ports),)
    if take.exclude_ports:
        ports += (PortIn(take.exclude_ports, negate=True),)
    return [
        Rule(
            (*interface, *addresses, *ports),
            Goto(_chain_name(listener)),
            f"connections for listener {listener.name}",
        )
        for interface in _interface_matches(take)
        for addresses in _address_matches(take)
    ]


def _interface_matches(take: Intercept) -> list[tuple[Match, ...]]:
    """Plain names share a rule; a wildcard has its own, since older nft takes none in a set."""
    plain = tuple(name for name in take.interfaces if not name.endswith("*"))
    wild = [name for name in take.interfaces if name.endswith("*")]
    matches: list[tuple[Match, ...]] = [(InInterface(plain),)] if plain else []
    matches += [(InInterface((name,)),) for name in wild]
    return matches or [()]


def _address_matches(take: Intercept) -> list[tuple[Match, ...]]:
    """One rule for both families, or one for each that can match; a v4 list takes no IPv6."""
    if not take.sources and not take.destinations:
        return [()]
    matches: list[tuple[Match, ...]] = []
    families: tuple[Family, ...] = (4, 6)
    for family in families:
        sources, destinations = _of(take.sources, family), _of(take.destinations, family)
        if (sources or not take.sources) and (destinations or not take.destinations):
            source: tuple[Match, ...] = (SourceIn(family, sources),) if sources else ()
            matches.append(
                (*source, *((DestinationIn(family, destinations),) if destinations else ()))
            )
    return matches


def _of(prefixes: PrefixSet, family: Family) -> PrefixSet:
    return PrefixSet(network for network in prefixes.networks if network.version == family)


def _take(listener: Listener, facts: Facts) -> Chain:
    families: tuple[Family, ...] = (4, 6) if facts.ipv6 else (4,)
    return Chain(
        _chain_name(listener),
        None,
        (
            *(
                Rule(
                    (IpVersion(family),),
                    Tproxy(family, listener.port),
                    f"IPv{family}: to the connection's own socket, else to our listener",
                )
                for family in families
            ),
            Rule(
                (Syn(),),
                Verdict.RESET,
                "nobody listens: refuse at once; without it the connection would bypass the proxy",
            ),
        ),
    )
