"""Whether the process that keeps the state owns nft's table, and how; and what that is worth. Pure.

Two wishes pull at the table's lifetime. `on_crash = "closed"` wants it to outlive its owner
(`persist`); `"open"` wants it to go, and that holds even where every process of ours is killed at
once: the kernel does it when the socket closes. But then it also goes when only its keeper is
killed, until the next one has put it back some hundredths of a second later. Connections that are
open must not feel that. They do not where the table only takes new ones in: where they are for this
host's own addresses and their answers find home by a mark that the sockets inherit. They would
where it restores marks (conntrack), diverts answers or forwarded packets, or rewrites addresses:
there the table stays, and "open" holds as long as one of the two processes lives to see to it.
"""

from __future__ import annotations

from enum import Enum

from tproxyd.config import Backend, Config, Guard, OnCrash
from tproxyd.kernel.desired import Facts, backend, desired
from tproxyd.kernel.firewall import Chain, Firewall, Goto, Jump, Rule, Tproxy, Verdict


class Own(Enum):
    """How nft's table belongs to the process that keeps it."""

    NOT = "no"
    WHILE_ALIVE = "owner"  # it goes with that process
    FOR_GOOD = "owner and persist"  # it outlives it


_ONE_LIVES = 'on_crash = "open" holds while the daemon or the process that keeps its rules lives'


def ownership(config: Config, facts: Facts) -> tuple[Own, tuple[str, ...]]:
    """How the table is to be owned, and what the operator should hear."""
    wanted, opens = config.rules.guard is Guard.OWNER, config.rules.on_crash is OnCrash.OPEN
    if backend(config, facts).backend is not Backend.NFT:
        said = ['guard = "owner" is of no use: tables of iptables have no owner'] if wanted else []
        said += [f"{_ONE_LIVES}: rules of iptables end with no process"] if opens else []
        return Own.NOT, tuple(said)
    if not wanted:
        said = [f'{_ONE_LIVES}; guard = "owner" would make it hold without'] if opens else []
        return Own.NOT, tuple(said)
    if not opens:
        return Own.FOR_GOOD, ()
    if _only_takes_in(desired(config, facts=facts).firewall):
        return Own.WHILE_ALIVE, ()
    why = "open connections need these rules, so they must outlive the process that owns them"
    return Own.FOR_GOOD, (f"{_ONE_LIVES}: {why}",)


def _only_takes_in(firewall: Firewall) -> bool:
    actions = [
        rule.action
        for chain in firewall
        if isinstance(chain, Chain)
        for rule in chain.rules
        if isinstance(rule, Rule)
    ]
    return all(
        isinstance(action, Verdict | Goto | Jump)
        or (isinstance(action, Tproxy) and action.mark is None)
        for action in actions
    )
