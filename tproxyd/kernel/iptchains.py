"""The lean scheme for iptables: the chains of one IP version.

As in chains.py, with four differences that come from iptables itself.

**TPROXY drops** a packet whose established socket is not transparent, and one that nobody listens
for (nft's statement lets the next rule run). So it must never see a connection that is older than
the rules. A connection is tagged at its SYN, in its connection mark, with a number of its listener;
TPROXY gets SYNs and tagged packets only. Of those most find their socket without it; it is the last
ACK of a handshake with SYN cookies, which has no socket, that needs it. (On a router too, where nft
cannot have it.)

Nobody listens: the client's SYNs are dropped, and it waits until it gives up, or until we listen
again. To refuse it is not possible here: REJECT is for the chains of the table filter, which come
later, and no match asks for a listener on a port that is not the packet's own.

**ACCEPT** ends the walk through the whole table, other programs' rules included. So what is not
ours is returned, and only two things are accepted: what we divert, and in nat our connections to
applications, which are to keep their source.

**Mangle comes before nat**, and no table with TPROXY behind it. So what nat translates as well does
not work here: answers to what this host masquerades are not found to be ours, and a port that is
published for another host is taken. (`tproxyd doctor` says so where there are rules of nat.)

**A rule has one of everything**: of several prefixes, interfaces or more ports than a match holds,
each has a rule of its own. What a rule excludes stands in it, a match each, up to EXCLUDED; more of
them have a chain, and what comes behind the rule has another, to which that one goes on.

The tags are the numbers after the listeners' mark; 16 or 256 or more of them, as the mark is long.
With the kernel's `iptables-legacy` nothing differs. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tproxyd.addr import PrefixSet
from tproxyd.config import Config, Listener, ReturnPath, Scope, Via
from tproxyd.errors import KernelError
from tproxyd.kernel.chains import LO, on_lo, recall
from tproxyd.kernel.firewall import (
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
    MadeBy,
    Match,
    MeetsTransparentSocket,
    PortIn,
    Rule,
    SetConnMark,
    SetPacketMark,
    SourceIn,
    Syn,
    Table,
    Tproxy,
    Verdict,
    mark_mask,
)
from tproxyd.kernel.iptlang import ordered, port_sets
from tproxyd.kernel.natchains import KEPT_SOURCE, nat_output, nat_prerouting, upstream
from tproxyd.kernel.selectors import OTHER_PROTOCOLS, ordinary, reason, selection, with_scope

# iptables-restore takes 255 words a line (iptables/xshared.h, MAX_ARGC), and each of these is five.
EXCLUDED = 32

PREFIX = "TPROXYD_"
_PREROUTING, _PASSING, _OUTPUT, _POSTROUTING, _DIVERT = (
    f"{PREFIX}{name}" for name in ("PREROUTING", "PASSING", "OUTPUT", "POSTROUTING", "DIVERT")
)


def chains(
    config: Config,
    family: Family,
    *,
    served: bool,
    path: ReturnPath | None,
    home: bool,
    intercept: bool,
) -> Firewall:
    """`served`: whether we listen over this IP version. The rest is as in chains.firewall."""
    mark = SetPacketMark(config.mark, mark_mask(config.mark))
    local = with_scope(config, Scope.LOCAL) if intercept else []
    local = [each for each in local if each.intercept.via is Via.TPROXY]
    forward = with_scope(config, Scope.FORWARD) if intercept else []
    tags = _tags(config, [*local, *forward])
    tracked = path is ReturnPath.CONNTRACK
    recalls = (recall(mark),) if tracked else ()
    keeps = (Rule((), Verdict.ACCEPT, KEPT_SOURCE),) if tracked else ()
    mangle = [
        Chain(_PREROUTING, None, _prerouting(config, mark, local, tags, path, home)),
        Chain(_PASSING, None, _passing(mark, forward, tags) if home else ()),
        Chain(_OUTPUT, None, recalls),
        *(_take(each, family, served, tags, None) for each in local),
        *(_take(each, family, served, tags, mark) for each in forward),
        Chain(_DIVERT, None, (Rule((), mark), Rule((), Verdict.ACCEPT)) if home else ()),
    ]
    nat = [
        Chain(_PREROUTING, None, nat_prerouting(config, intercept)),
        Chain(_OUTPUT, None, nat_output(config, intercept)),
        Chain(_POSTROUTING, None, keeps),
    ]
    wanted = [chain for chain in mangle if chain.rules]
    wanted += [replace(chain, table=Table.NAT) for chain in nat if chain.rules]
    asked = {_POSTROUTING: upstream(config)}
    wanted = [
        _called(chain, asked.get(chain.name, ())) for chain in wanted if chain.name in _CALLED
    ] + wanted
    fitting = itertools.chain.from_iterable(_fitting(each, family) for each in wanted)
    return lowered(fitting, family)


_CALLED = {_PREROUTING: "PREROUTING", _OUTPUT: "OUTPUT", _POSTROUTING: "POSTROUTING"}
HOOKS = {
    (Table.MANGLE, "PREROUTING"): Hook.PREROUTING,
    (Table.MANGLE, "OUTPUT"): Hook.OUTPUT,
    (Table.NAT, "PREROUTING"): Hook.NAT_PREROUTING,
    (Table.NAT, "OUTPUT"): Hook.NAT_OUTPUT,
    (Table.NAT, "POSTROUTING"): Hook.NAT_POSTROUTING,
    (Table.RAW, "PREROUTING"): Hook.RAW_PREROUTING,
    (Table.RAW, "OUTPUT"): Hook.RAW_OUTPUT,
}


def _called(chain: Chain, matches: tuple[Match, ...]) -> Chain:
    """The kernel's own chain, of which one rule is ours."""
    name = _CALLED[chain.name]
    return Chain(name, HOOKS[chain.table, name], (Rule(matches, Jump(chain.name)),), chain.table)


# The chains ---------------------------------------------------------------------------------------


def _tags(config: Config, listeners: list[Listener]) -> dict[str, ConnMark]:
    """By the name of the listener."""
    mask = mark_mask(config.mark)
    taken = (config.mark, config.listener_mark & mask, 0)
    free = (at & mask for at in range(config.mark + 2, config.mark + 2 + mask))
    free = (tag for tag in free if tag not in taken)
    tags = {each.name: ConnMark(tag, mask) for each, tag in zip(listeners, free, strict=False)}
    if len(tags) < len(listeners):
        why = f"mark {config.mark:#x} leaves {len(tags)} numbers for {len(listeners)} listeners"
        raise KernelError("write iptables rules", why, "use a longer mark, such as 0x539")
    return tags


def _prerouting(
    config: Config,
    mark: SetPacketMark,
    local: list[Listener],
    tags: dict[str, ConnMark],
    path: ReturnPath | None,
    home: bool,
) -> tuple[Rule, ...]:
    rules = on_lo(config, mark, path, Verdict.DROP)
    takes: list[Rule] = []
    if local:
        takes = [*_tagged(local, tags), OLDER]
        if path is ReturnPath.CONNTRACK:
            takes.append(
                Rule(
                    (ConnMark(mark.value, mark.mask), Syn()),
                    Verdict.DROP,
                    "a client at the port of a living upstream connection of ours",
                )
            )
        takes += [*ordinary(config), *_selected(config)]
    if not takes and not home:
        return rules
    icmp = Rule((Icmp(), ForUs(negate=True), MeetsTransparentSocket()), Divert(mark))
    away: Rule = Rule((ForUs(negate=True),), Goto(_PASSING) if home else Verdict.RETURN)
    return (*rules, LO, *((icmp,) if home else ()), OTHER_PROTOCOLS, away, *takes)


OLDER = Rule(
    (Syn(negate=True),),
    Verdict.RETURN,
    "only a SYN begins a connection; without it, connections older than these rules would end",
)


def _tagged(listeners: list[Listener], tags: dict[str, ConnMark]) -> list[Rule]:
    """What was taken by its SYN stays with its listener."""
    return [
        Rule((Syn(negate=True), tags[each.name]), Goto(_name(each)), reason(each))
        for each in listeners
    ]


def _selected(config: Config) -> list[Rule]:
    """SYNs, by the first listener that selects them; those of nat are left to it."""
    rules: list[Rule] = []
    for each in with_scope(config, Scope.LOCAL):
        ours = each.intercept.via is Via.TPROXY
        action = Goto(_name(each)) if ours else Verdict.RETURN
        rules += selection(each.intercept, action, reason(each))
    return rules


def _passing(
    mark: SetPacketMark, forward: list[Listener], tags: dict[str, ConnMark]
) -> tuple[Rule, ...]:
    home = Rule((Syn(negate=True), MeetsTransparentSocket()), Divert(mark), "of a socket of ours")
    takes = [
        rule
        for each in forward
        for rule in selection(each.intercept, Goto(_name(each)), reason(each))
    ]
    return (home, *_tagged(forward, tags), OLDER, *takes) if takes else (home,)


def _take(
    listener: Listener,
    family: Family,
    served: bool,
    tags: dict[str, ConnMark],
    mark: SetPacketMark | None,
) -> Chain:
    if not served:
        drop = Rule((), Verdict.DROP, "we do not listen over this IP version: never around us")
        return Chain(_name(listener), None, (drop,))
    tag = tags[listener.name]
    return Chain(
        _name(listener),
        None,
        (
            Rule(
                (Syn(),), SetConnMark(tag.value, tag.mask), "the rest of it will be known by this"
            ),
            Rule((), Tproxy(family, listener.port, mark)),
        ),
    )


def _name(listener: Listener) -> str:
    """By the port, of which there is one each; a name may be too long (XT_EXTENSION_MAXNAMELEN)."""
    return f"{PREFIX}{listener.port}"


# What one rule of iptables can say ----------------------------------------------------------------


def lowered(wanted: Iterable[Chain], family: Family) -> Firewall:
    """The chains as iptables can hold them, for one IP version, in the order of state.Tables."""
    made = []
    for chain in wanted:
        rules = [rule for rule in chain.rules if isinstance(rule, Rule)]
        parts = itertools.chain.from_iterable(_rules(rule, family) for rule in rules)
        made.append(replace(chain, rules=tuple(parts)))
    return sorted_chains(made)


def sorted_chains(made: Iterable[Chain]) -> Firewall:
    return tuple(sorted(made, key=lambda chain: (chain.table, chain.name)))


def _rules(rule: Rule, family: Family) -> Iterator[Rule]:
    """None where it is of the other IP version, several where it says more than one can."""
    if isinstance(rule.action, Tproxy) and rule.action.family != family:
        return
    action = rule.action
    # Nothing that our chains accept is to be kept from other programs' rules.
    if action is Verdict.ACCEPT and rule.matches:
        action = Verdict.RETURN
    elif isinstance(action, Divert):
        action = Jump(_DIVERT)
    choices = [_choices(match, family) for match in rule.matches]
    for matches in itertools.product(*choices):
        kept = [match for match in matches if match is not None]
        yield Rule(ordered(kept), action, rule.comment)


def _fitting(chain: Chain, family: Family, number: int = 1) -> Iterator[Chain]:
    """The same in several chains where one of its rules excludes more than a line can hold.

    With nothing but gotos: whatever the action is, RETURN too, it does what it did in one chain.
    """
    rules = [rule for rule in chain.rules if isinstance(rule, Rule)]
    rules = [rule for rule in rules if any(_rules(rule, family))]  # of this IP version
    for at, rule in enumerate(rules):
        excluded = [match for match in rule.matches if _excluded(match, family)]
        if sum(_excluded(match, family) for match in excluded) <= EXCLUDED:
            continue
        name, _, _ = chain.name.partition("-")
        behind = replace(chain, name=f"{name}-{number}", hook=None, rules=tuple(rules[at + 1 :]))
        onward = Goto(behind.name) if behind.rules else Verdict.RETURN
        passes = [Rule((_positive(match),), onward, "excluded") for match in excluded]
        through = Chain(f"{behind.name}X", None, (*passes, Rule((), rule.action)), chain.table)
        needs = tuple(match for match in rule.matches if match not in excluded)
        to_it = Rule(needs, Goto(through.name), rule.comment)
        yield replace(chain, rules=(*rules[:at], to_it, Rule((), onward)))
        yield through
        if behind.rules:
            yield from _fitting(behind, family, number + 1)
        return
    yield chain


def _excluded(match: Match, family: Family) -> int:
    """How many matches it takes to say what is excluded; 0 where that is nothing."""
    match match:
        case DestinationIn(of, prefixes, True):
            return len(prefixes.networks) if of == family else 0
        case PortIn(ranges, True):
            return len(port_sets(ranges))
        case MadeBy(_, ranges, True):
            return len(ranges)
        case _:
            return 0


def _positive(match: Match) -> Match:
    assert isinstance(match, DestinationIn | PortIn | MadeBy)
    return replace(match, negate=False)


def _choices(match: Match, family: Family) -> list[Match | None]:
    """Matches of which one must hold; None always holds, and of [] none can."""
    match match:
        case IpVersion(of):
            return [None] if of == family else []
        case SourceIn(of) | DestinationIn(of) if of != family:
            return []
        case SourceIn(of, prefixes):
            return [
                None if not each.prefixlen else SourceIn(of, PrefixSet([each]))
                for each in prefixes.networks
            ]
        case DestinationIn(of, prefixes, negate):
            if any(not each.prefixlen for each in prefixes.networks):
                return [] if negate else [None]
            if negate:
                return [match]
            return [DestinationIn(of, PrefixSet([each])) for each in prefixes.networks]
        case InInterface(names):
            return [InInterface((name,)) for name in names]
        case PortIn(ranges, False):
            return [PortIn(some) for some in port_sets(ranges)]
        case MadeBy(owner, ranges, False):
            return [MadeBy(owner, (span,)) for span in ranges]
        case _:
            return [match]
