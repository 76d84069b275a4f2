"""Which connections a listener takes, as the fewest rules that can say it. Pure."""

from __future__ import annotations

from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.config import Config, Intercept, Listener, Scope
from tproxyd.kernel.firewall import (
    Action,
    DestinationIn,
    Family,
    InInterface,
    IpVersion,
    MadeBy,
    Match,
    NotTcp,
    PortIn,
    Rule,
    SourceIn,
    Verdict,
)
from tproxyd.reader import EVERY_PORT, merge_ranges

OTHER_PROTOCOLS = Rule((NotTcp(),), Verdict.ACCEPT, "only TCP is proxied")


def with_scope(config: Config, scope: Scope) -> list[Listener]:
    return [each for each in config.listeners if each.intercepts and each.intercept.scope is scope]


def reason(listener: Listener) -> str:
    return f"connections for listener {listener.name}"


def selection(take: Intercept, action: Action, comment: str) -> list[Rule]:
    """`action` for what `take` selects: a rule for each combination that a single one cannot say.

    () where the families of its sources and destinations cannot meet.
    """
    ports: tuple[Match, ...] = ()
    if take.ports != EVERY_PORT:
        ports += (PortIn(take.ports),)
    if take.exclude_ports:
        ports += (PortIn(take.exclude_ports, negate=True),)
    return [
        Rule((*interface, *addresses, *ports, *_owners(take)), action, comment)
        for interface in _interfaces(take)
        for addresses in _addresses(take)
    ]


def takes_nothing(take: Intercept) -> bool:
    return not _addresses(take)


def _interfaces(take: Intercept) -> list[tuple[Match, ...]]:
    """Plain names share a rule; a wildcard has its own, since older nft takes none in a set."""
    plain = tuple(name for name in take.interfaces if not name.endswith("*"))
    wild = [name for name in take.interfaces if name.endswith("*")]
    matches: list[tuple[Match, ...]] = [(InInterface(plain),)] if plain else []
    matches += [(InInterface((name,)),) for name in wild]
    return matches or [()]


def _addresses(take: Intercept) -> list[tuple[Match, ...]]:
    """One rule for both families, or one for each that can match.

    A list of one family takes nothing of the other, and excludes nothing of it.
    """
    if not take.sources and not take.destinations and not take.exclude_destinations:
        return [()]
    matches: list[tuple[Match, ...]] = []
    families: tuple[Family, ...] = (4, 6)
    for family in families:
        sources, destinations = _of(take.sources, family), _of(take.destinations, family)
        excluded = _of(take.exclude_destinations, family)
        if (take.sources and not sources) or (take.destinations and not destinations):
            continue
        each: tuple[Match, ...] = ()
        if sources:
            each += (SourceIn(family, sources),)
        if destinations:
            each += (DestinationIn(family, destinations),)
        if excluded:
            each += (DestinationIn(family, excluded, negate=True),)
        matches.append(each or (IpVersion(family),))
    return matches


def _of(prefixes: PrefixSet, family: Family) -> PrefixSet:
    return PrefixSet(network for network in prefixes.networks if network.version == family)


def _owners(take: Intercept) -> tuple[Match, ...]:
    matches: tuple[Match, ...] = ()
    if take.exclude_uids:
        matches += (
            MadeBy("uid", merge_ranges([(uid, uid) for uid in take.exclude_uids]), negate=True),
        )
    if take.exclude_gids:
        matches += (
            MadeBy("gid", merge_ranges([(gid, gid) for gid in take.exclude_gids]), negate=True),
        )
    return matches


def ordinary(config: Config) -> list[Rule]:
    """What is made to our ordinary listeners: taken, it would have our own port as destination."""
    rules: list[Rule] = []
    for listener in config.listeners:
        if listener.intercepts:
            continue
        everywhere = listener.bind in ("*", "0.0.0.0", "::")
        host, _, _ = listener.bind.partition("%")
        there = PrefixSet() if everywhere else PrefixSet([parse_prefix(host)])
        ports = ((listener.port, listener.port),)
        comment = f"connections to listener {listener.name} itself"
        rules += selection(
            Intercept(ports=ports, exclude_ports=(), destinations=there), Verdict.ACCEPT, comment
        )
    return rules
