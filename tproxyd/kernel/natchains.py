"""The chains of nat, for listeners that it redirects to: first packets of what comes in or is made.

Facts (nft 1.0.6, Linux 6.18):
- Connection tracking takes a connection up in its middle, as new, and nat would redirect it (an old
  connection then dies, by timeout). So nat is for SYNs.
- A connection that is made here has passed nat at the hook output, and is not shown to the chain at
  prerouting when it comes through lo: our own upstream connections need no bypass there.
- A connection that nat has redirected needs it as long as it lives. Both must stay: a chain of nat,
  at whatever hook (with the last one its hooks go), and a rule that asks connection tracking (with
  the last one that goes, whatever chains are left). An empty chain of nat is not enough: within a
  second the living connection was reset or silent. The table replaced in one transaction does no
  harm, nor does a time without it in which the connection is silent.
- Our connection to an application on this host has a client's address, and leaves through lo. To
  what masquerades this host's containers (Docker: their addresses, by any interface but their
  bridge) it is one of theirs that goes to elsewhere, and the application sees the host. The kernel
  asks the chains of nat one after another, accepted or not, until one has mapped the source: so
  nft's maps it to itself, before others. iptables has one chain that all share, which accepting
  ends; ours is first in it when it is made, and what is inserted there later comes before it.

Pure.
"""

from __future__ import annotations

from tproxyd.config import Config, Listener, Scope, Via
from tproxyd.kernel.firewall import (
    ESTABLISHED,
    Family,
    ForUs,
    KeepSource,
    Match,
    OutInterface,
    PacketMark,
    Redirect,
    Rule,
    Syn,
    Verdict,
    mark_mask,
)
from tproxyd.kernel.selectors import OTHER_PROTOCOLS, ordinary, reason, selection, with_scope

NOT_NEW = Rule(
    (Syn(negate=True),),
    Verdict.ACCEPT,
    "connection tracking takes an older connection up in its middle, as new: redirected, it ends",
)
# What lives needs nat until it ends.
KEPT = Rule(
    (ESTABLISHED,),
    Verdict.ACCEPT,
    "never true of a first packet. But a rule must ask connection tracking for it to be at work,"
    " and the translation of living connections with it",
)


def nat_prerouting(config: Config, intercept: bool) -> tuple[Rule, ...]:
    local = with_scope(config, Scope.LOCAL)
    if not any(each.intercept.via is Via.REDIRECT for each in local):
        return ()
    if not intercept:
        return (KEPT,)
    forwarded = Rule((ForUs(negate=True),), Verdict.ACCEPT, "forwarded traffic goes its way")
    takes = (*ordinary(config), *_redirects(local))
    return (OTHER_PROTOCOLS, forwarded, NOT_NEW, *takes)


def nat_output(config: Config, intercept: bool) -> tuple[Rule, ...]:
    listeners = with_scope(config, Scope.OUTBOUND)
    if not listeners:
        return ()
    if not intercept:
        return (KEPT,)
    mask = mark_mask(config.listener_mark)
    bypasses = (
        Rule(
            (PacketMark(config.listener_mark, mask),),
            Verdict.ACCEPT,
            "our own connections to elsewhere; without it, the proxy would catch itself",
        ),
        Rule(
            (PacketMark(config.mark, mark_mask(config.mark)),),
            Verdict.ACCEPT,
            "and those to an application on this host",
        ),
        OTHER_PROTOCOLS,
        Rule((ForUs(),), Verdict.ACCEPT, "what is made here for here does not go out"),
        NOT_NEW,
    )
    return (*bypasses, *_redirects(listeners))


def upstream(config: Config) -> tuple[Match, ...]:
    """Our connections to applications on this host, as they leave."""
    return OutInterface("lo"), PacketMark(config.mark, mark_mask(config.mark))


KEPT_SOURCE = (
    "the application sees the client; without it, what masquerades containers takes it away"
)


def nat_postrouting(config: Config, families: tuple[Family, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(upstream(config), KeepSource(family), KEPT_SOURCE) for family in families)


def _redirects(listeners: list[Listener]) -> list[Rule]:
    """The selections of those that nat serves. What a listener before them takes is left to it."""
    rules: list[Rule] = []
    others: list[Rule] = []
    for each in listeners:
        if each.intercept.via is Via.TPROXY:
            comment = f"connections for listener {each.name}: tproxy takes them"
            others += selection(each.intercept, Verdict.ACCEPT, comment)
        elif own := selection(each.intercept, Redirect(each.port), reason(each)):
            rules += [*others, *own]
            others = []
    return rules
