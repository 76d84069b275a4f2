"""The packet rules for a Config, in the order in which a packet meets them, each with its reason.

Eight chains may be called by the kernel or by another, one never is, and the rest are one for each
listener:

    prerouting      what comes in, behind nat and before it is routed: our own packets on lo, the
                    bypasses, then the listeners for this host's addresses
    passing         what is not for an address of this host: packets of connections that we hold,
                    and the listeners of a router
    home            what meets a transparent socket there
    defrag          nothing: its being there is what counts
    collided        our SYN to an application that meets one
    output          the answers of applications, where connection tracking brings them home
    nat_prerouting  first packets of what comes in, for listeners that nat redirects
    nat_output      first packets of what is made here
    nat_postrouting
                    first packets of ours to applications: the client's address stays

Only what somebody needs is there, and a chain with nothing in it is not.

Facts (nft 1.0.6, Linux 6.18):
- A tproxy that finds neither socket nor listener lets the next rule run. So a listener's chain ends
  with a refusal of SYNs: without it, a connection would silently bypass us whenever nobody listens.
  For the connections of a router, the mark is written behind tproxy, and not before: the refusal of
  a marked packet is itself marked where net.ipv4.fwmark_reflect is 1, goes to lo, and the client
  waits for its timeout.
- The addresses of a packet are those of the host that has it only behind nat. Before, an answer to
  what this host masquerades is for this host itself, and would not be found to be ours (the connect
  times out); and a port that is published for another host (Docker, NodePorts) looks like one of
  this host: taken by tproxy, and then sent away by nat, its connections hang. So "prerouting" is
  called behind nat, anybody's. Where both ways of ours are in use, the chain of nat lets pass what
  tproxy is to take; what it has redirected is at the port of its listener.

Pure.
"""

from __future__ import annotations

from tproxyd.config import Config, Listener, ReturnPath, Scope, Via
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
    Jump,
    MeetsTransparentSocket,
    MeetsWildcardListener,
    PacketMark,
    PortIn,
    Reply,
    Rule,
    SetConnMark,
    SetPacketMark,
    Syn,
    Tproxy,
    Verdict,
    mark_mask,
)
from tproxyd.kernel.natchains import nat_output, nat_postrouting, nat_prerouting
from tproxyd.kernel.selectors import OTHER_PROTOCOLS, ordinary, reason, selection, with_scope


def firewall(
    config: Config,
    families: tuple[Family, ...],
    path: ReturnPath,
    here: bool,
    home: bool,
    intercept: bool,
) -> Firewall:
    """`path`: how answers on this host find home, if there are any (`here`); `home`: from others.

    Without `intercept` what living connections need.
    """
    mark = SetPacketMark(config.mark, mark_mask(config.mark))
    local = with_scope(config, Scope.LOCAL) if intercept else []
    forward = with_scope(config, Scope.FORWARD) if intercept else []
    tracked = here and path is ReturnPath.CONNTRACK
    chains = [
        Chain("prerouting", Hook.BEHIND_NAT, _prerouting(config, mark, local, path, here, home)),
        Chain("collided", None, COLLIDED if here else ()),
        Chain("passing", None, _passing(forward) if home else ()),
        Chain("home", None, _home(mark) if home else ()),
        Chain("defrag", None, _defrag(families) if home else ()),
        Chain("output", Hook.OUTPUT, (recall(mark),) if tracked else ()),
        *(_take(each, families, None) for each in local if each.intercept.via is Via.TPROXY),
        *(_take(each, families, mark) for each in forward),
        Chain("nat_prerouting", Hook.NAT_PREROUTING, nat_prerouting(config, intercept)),
        Chain("nat_output", Hook.NAT_OUTPUT, nat_output(config, intercept)),
        Chain(
            "nat_postrouting",
            Hook.NAT_POSTROUTING,
            nat_postrouting(config, families) if tracked else (),
        ),
    ]
    return tuple(chain for chain in chains if chain.rules)


# What comes in ------------------------------------------------------------------------------------

LO = Rule(
    (InInterface(("lo",)),),
    Verdict.ACCEPT,
    "what comes through lo is this host's own: our upstream connections would loop to us",
)


def _prerouting(
    config: Config,
    mark: SetPacketMark,
    local: list[Listener],
    path: ReturnPath,
    here: bool,
    home: bool,
) -> tuple[Rule, ...]:
    rules = on_lo(config, mark, path if here else None, Jump("collided"))
    own = _taken(local)
    takes = [*ordinary(config), *_redirected(local), *own] if own else []
    if local and here and path is ReturnPath.CONNTRACK:
        taken = Rule(
            (ConnMark(mark.value, mark.mask), Syn()),
            Verdict.DROP,
            "a client at the port of a living upstream connection of ours: a refusal would end that"
            " connection in conntrack's books, and lose its answers; the client tries again by"
            " itself",
        )
        takes.insert(0, taken)
    if own and path is ReturnPath.CONNTRACK:
        answer = Rule(
            (Syn(negate=True), Reply()),
            Verdict.ACCEPT,
            "what another host answers to this one. Where nat has sent the question there, the"
            " answer gets the address that was asked only later, and by the one that it has no"
            " socket is found: it would be handed to our listener, and the connection reset",
        )
        takes.insert(0, answer)
    if not takes and not home:
        return rules
    icmp = Rule(
        (Icmp(), ForUs(negate=True), MeetsTransparentSocket()),
        Goto("home"),
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


def on_lo(
    config: Config, mark: SetPacketMark, path: ReturnPath | None, collided: Action
) -> tuple[Rule, ...]:
    """Our own connections, to the application; `collided` drops a SYN that meets another."""
    if path is None:
        return ()
    ours = (InInterface(("lo",)), PacketMark(mark.value, mark.mask))
    rules = [
        Rule(
            (*ours, Syn(), MeetsTransparentSocket()),
            collided,
            "our SYN to the application meets a living connection of the same client. Delivered, it"
            " is answered there, our connect stalls, and with conntrack it has given that"
            " connection our mark. Dropped, it is missed at once by our dialler, which takes"
            " another port",
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


COLLIDED = (
    Rule(
        (MeetsWildcardListener(),),
        Verdict.RETURN,
        "no connection: the application listens with IP_TRANSPARENT itself, and our SYN is for it",
    ),
    Rule((), Verdict.DROP, "a connection of the client as whom we dial"),
)


def _home(mark: SetPacketMark) -> tuple[Rule, ...]:
    return (
        Rule(
            (MeetsWildcardListener(),),
            Verdict.ACCEPT,
            "of no connection: it is for a port of another host at which somebody listens on this"
            " one, as we do. Without it, this host would answer with a reset",
        ),
        Rule((), Divert(mark), "routed to this host by the mark"),
    )


def _passing(forward: list[Listener]) -> tuple[Rule, ...]:
    home = Rule(
        (Syn(negate=True), MeetsTransparentSocket()),
        Goto("home"),
        "to somebody's address, but of a connection that we hold in that name. Without it, it goes"
        " to that somebody, who resets the connection. Never a SYN: it may meet what is left of an"
        " older connection, and only tproxy tells the two apart",
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


_DISCARD = 9  # RFC 863; any port would do


def _defrag(families: tuple[Family, ...]) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            (IpVersion(family),),
            Tproxy(family, _DISCARD),
            "never called: while there is a tproxy, the kernel puts fragments together before it"
            " asks any chain. For a socket match it does not: of an answer in fragments that finds"
            " the socket of the first only, and the rest leave toward somebody",
        )
        for family in families
    )


# Listeners ----------------------------------------------------------------------------------------


def _taken(listeners: list[Listener]) -> list[Rule]:
    """The selections of those that tproxy serves, the first that matches first."""
    return [
        rule
        for each in listeners
        if each.intercept.via is Via.TPROXY
        for rule in selection(each.intercept, Goto(_chain_name(each)), reason(each))
    ]


def _redirected(listeners: list[Listener]) -> list[Rule]:
    return [
        Rule(
            (PortIn(((each.port, each.port),)),),
            Verdict.ACCEPT,
            f"connections that nat has redirected to listener {each.name}",
        )
        for each in listeners
        if each.intercept.via is Via.REDIRECT
    ]


def _chain_name(listener: Listener) -> str:
    """Prefixed: a listener may be called "output"."""
    return f"take_{listener.name}"
