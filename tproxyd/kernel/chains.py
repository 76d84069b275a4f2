"""The packet rules for a Config, in the order in which a packet meets them, each with its reason.

Five chains may be called by the kernel or by another, the rest are one for each listener:

    prerouting      what comes in, before it is routed: our own packets on lo, the bypasses, then
                    the listeners for this host's addresses
    passing         what is not for an address of this host: packets of connections that we hold,
                    and the listeners of a router
    output          the answers of applications, where connection tracking brings them home
    nat_prerouting  first packets of what comes in, for listeners that nat redirects
    nat_output      first packets of what is made here

Only what somebody needs is there, and a chain with nothing in it is not.

Facts (nft 1.0.6, Linux 6.18):
- A tproxy that finds neither socket nor listener lets the next rule run. So a listener's chain ends
  with a refusal of SYNs: without it, a connection would silently bypass us whenever nobody listens.
  For the connections of a router, the mark is written behind tproxy, and not before: the refusal of
  a marked packet is itself marked where net.ipv4.fwmark_reflect is 1, goes to lo, and the client
  waits for its timeout.
- "accept" ends a chain, not the walk: what tproxy took comes by the chains of nat too. So where
  both are in use each names the other's listeners, in the order of the configuration.
- Connection tracking takes a connection up in its middle, as new, and nat would redirect it (an old
  connection then dies, by timeout). So nat is for SYNs.
- A connection that is made here has passed nat at the hook output, and is not shown to the chain at
  prerouting when it comes through lo: our own upstream connections need no bypass there.
- A connection that nat has redirected needs it as long as it lives. Both must stay: a chain of nat,
  at whatever hook (with the last one its hooks go), and a rule that asks connection tracking (with
  the last one that goes, whatever chains are left). An empty chain of nat is not enough: within a
  second the living connection was reset or silent. The table replaced in one transaction does no
  harm, nor does a time without it in which the connection is silent.

Pure.
"""

from __future__ import annotations

from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.config import Config, Intercept, Listener, ReturnPath, Scope, Via
from tproxyd.kernel.firewall import (
    ESTABLISHED,
    Action,
    Chain,
    ConnMark,
    Divert,
    Family,
    Firewall,
    ForUs,
    Goto,
    Hook,
    Icmp,
    InInterface,
    IpVersion,
    MeetsTransparentSocket,
    NotTcp,
    PacketMark,
    Redirect,
    Rule,
    SetConnMark,
    SetPacketMark,
    Syn,
    Tproxy,
    Verdict,
)
from tproxyd.kernel.selectors import selection


def mark_mask(mark: int) -> int:
    """All ones up to the mark's highest hexadecimal digit: 0x539 → 0xfff.

    Others may OR bits above ours into a packet's mark; compared whole, 0x10539 would not be 0x539
    and its packet would leave toward the client.
    """
    return (1 << (mark.bit_length() + 3) // 4 * 4) - 1


def firewall(
    config: Config,
    families: tuple[Family, ...],
    path: ReturnPath | None,
    home: bool,
    intercept: bool,
) -> Firewall:
    """`path`: how answers on this host find home, where there are any; `home`: those from others.

    Without `intercept` what living connections need.
    """
    mark = SetPacketMark(config.mark, mark_mask(config.mark))
    local = with_scope(config, Scope.LOCAL) if intercept else []
    forward = with_scope(config, Scope.FORWARD) if intercept else []
    chains = [
        Chain("prerouting", Hook.PREROUTING, _prerouting(config, mark, local, path, home)),
        Chain("passing", None, _passing(mark, forward) if home else ()),
        Chain("output", Hook.OUTPUT, (recall(mark),) if path is ReturnPath.CONNTRACK else ()),
        *(_take(each, families, None) for each in local if each.intercept.via is Via.TPROXY),
        *(_take(each, families, mark) for each in forward),
        Chain("nat_prerouting", Hook.NAT_PREROUTING, nat_prerouting(config, intercept)),
        Chain("nat_output", Hook.NAT_OUTPUT, nat_output(config, intercept)),
    ]
    return tuple(chain for chain in chains if chain.rules)


def with_scope(config: Config, scope: Scope) -> list[Listener]:
    return [each for each in config.listeners if each.intercepts and each.intercept.scope is scope]


# What comes in ------------------------------------------------------------------------------------

LO = Rule(
    (InInterface(("lo",)),),
    Verdict.ACCEPT,
    "what comes through lo is this host's own: our upstream connections would loop to us",
)
OTHER_PROTOCOLS = Rule((NotTcp(),), Verdict.ACCEPT, "only TCP is proxied")


def _prerouting(
    config: Config,
    mark: SetPacketMark,
    local: list[Listener],
    path: ReturnPath | None,
    home: bool,
) -> tuple[Rule, ...]:
    rules = on_lo(config, mark, path)
    takes = [*ordinary(config), *own] if (own := selections(local, Via.TPROXY)) else []
    if local and path is ReturnPath.CONNTRACK:
        taken = Rule(
            (ConnMark(mark.value, mark.mask), Syn()),
            Verdict.DROP,
            "a client at the port of a living upstream connection of ours: a refusal would end that"
            " connection in conntrack's books, and lose its answers; the client tries again by"
            " itself",
        )
        takes.insert(0, taken)
    if not takes and not home:
        return rules
    icmp = Rule(
        (Icmp(), ForUs(negate=True), MeetsTransparentSocket()),
        Divert(mark),
        "an ICMP error about a connection that we hold in somebody's name is for us. Without it,"
        " that somebody gets it: a path with a smaller MTU stalls, a host that cannot be reached is"
        " a timeout",
    )
    passing = Rule(
        (ForUs(negate=True),),
        Goto("passing"),
        "what is not for this host: forwarded on, unless it is a connection of ours",
    )
    forwarded = Rule(
        (ForUs(negate=True),),
        Verdict.ACCEPT,
        "forwarded traffic goes its way; without it, a node would take its pods' connections",
    )
    return (
        *rules,
        LO,
        *((icmp,) if home else ()),
        OTHER_PROTOCOLS,
        passing if home else forwarded,
        *takes,
    )


def on_lo(config: Config, mark: SetPacketMark, path: ReturnPath | None) -> tuple[Rule, ...]:
    """Our own connections, to the application."""
    if path is None:
        return ()
    ours = (InInterface(("lo",)), PacketMark(mark.value, mark.mask))
    rules = [
        Rule(
            (*ours, Syn(), MeetsTransparentSocket()),
            Verdict.DROP,
            "our SYN to the application meets a living connection of the same client. Delivered, it"
            " is answered there, our connect stalls, and with conntrack it has given that"
            " connection our mark. Dropped, it is missed at once by our dialler, which takes"
            " another port. (The application's own listener is not transparent.)",
        )
    ]
    if any(each.intercept.via is Via.REDIRECT for each in with_scope(config, Scope.LOCAL)):
        rules.append(
            Rule(
                (*ours, Syn(), ESTABLISHED),
                Verdict.DROP,
                "the same where nat has redirected the living connection: our SYN is taken for one"
                " of its packets",
            )
        )
    if path is ReturnPath.CONNTRACK:
        remember = "keep the mark of our upstream connection for its answers; without it they"
        remember += " leave toward the real client, which resets the connection"
        rules.append(Rule(ours, SetConnMark(mark.value, mark.mask), remember))
    return tuple(rules)


def _passing(mark: SetPacketMark, forward: list[Listener]) -> tuple[Rule, ...]:
    home = Rule(
        (Syn(negate=True), MeetsTransparentSocket()),
        Divert(mark),
        "to somebody's address, but of a connection that we hold in that name: routed here by the"
        " mark. Without it, it goes to that somebody, who resets the connection. Never a SYN: it"
        " may meet what is left of an older connection, and only tproxy tells the two apart",
    )
    takes = [
        rule
        for listener in forward
        for rule in selection(listener.intercept, Goto(_chain_name(listener)), reason(listener))
    ]
    older = Rule(
        (Syn(negate=True),),
        Verdict.ACCEPT,
        "only a SYN begins a connection; without it, connections older than these rules would end",
    )
    return (home, older, *takes) if takes else (home,)


def _take(listener: Listener, families: tuple[Family, ...], mark: SetPacketMark | None) -> Chain:
    return Chain(
        _chain_name(listener),
        None,
        (
            *(
                Rule(
                    (IpVersion(family),),
                    Tproxy(family, listener.port, mark),
                    f"IPv{family}: to the connection's own socket, else to our listener"
                    + (", which the mark makes a delivery to this host" if mark else ""),
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


def recall(mark: SetPacketMark) -> Rule:
    return Rule(
        (ConnMark(mark.value, mark.mask),),
        mark,
        "the application's answer gets the mark of its connection and is routed once more, to lo",
    )


# By nat -------------------------------------------------------------------------------------------

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
    takes = (*ordinary(config), *selections(local, Via.REDIRECT))
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
    return (*bypasses, *selections(listeners, Via.REDIRECT))


# Listeners ----------------------------------------------------------------------------------------


def ordinary(config: Config) -> list[Rule]:
    """What is made to our ordinary listeners: taken, it would have our own port as destination."""
    rules: list[Rule] = []
    for listener in config.listeners:
        if listener.intercepts:
            continue
        everywhere = listener.bind in ("*", "0.0.0.0", "::")
        there = (
            PrefixSet()
            if everywhere
            else PrefixSet([parse_prefix(listener.bind.partition("%")[0])])
        )
        ports = ((listener.port, listener.port),)
        comment = f"connections to listener {listener.name} itself"
        rules += selection(
            Intercept(ports=ports, exclude_ports=(), destinations=there), Verdict.ACCEPT, comment
        )
    return rules


def selections(listeners: list[Listener], via: Via) -> list[Rule]:
    """The selections of those that are taken in this way, the first that matches first.

    What a listener before them takes in the other way is left to it.
    """
    rules: list[Rule] = []
    others: list[Rule] = []
    for listener in listeners:
        take: Intercept = listener.intercept
        if take.via is not via:
            comment = f"connections for listener {listener.name}: {take.via} takes them"
            others += selection(take, Verdict.ACCEPT, comment)
            continue
        action: Action = Goto(_chain_name(listener))
        if via is Via.REDIRECT:
            action = Redirect(listener.port)
        if own := selection(take, action, reason(listener)):
            rules += [*others, *own]
            others = []
    return rules


def reason(listener: Listener) -> str:
    return f"connections for listener {listener.name}"


def _chain_name(listener: Listener) -> str:
    """Prefixed: a listener may be called "output"."""
    return f"take_{listener.name}"
