"""Why it does not work: one function per check, each with its remedy.

Called by `tproxyd doctor`. It only reads, with one exception that is the point of it: it connects
as a client that does not exist, from the documentation ranges 192.0.2.0/24 and 2001:db8::/32, the
way that every upstream connection goes (trips.py). What it cannot try from here is the other half,
a client's packet arriving from outside: only an interface brings packets to the rules that
intercept, and to make one would be a change. So for that half the parts are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tproxyd.config import Config
from tproxyd.doctor import host, state, trips
from tproxyd.doctor.check import Check, Patient, Verdict
from tproxyd.errors import KernelError

__all__ = ["Check", "Verdict", "run"]

# In the order in which a packet would meet their subjects.
_CHECKS: tuple[Callable[[Patient], Iterator[Check]], ...] = (
    host.privileges,
    host.kernel,
    host.transparent_socket,
    host.loopback,
    host.ipv6,
    host.sysctls,
    host.forwarding,
    state.clashes,
    state.nat,
    state.listeners,
    state.interfaces,
    state.rules,
    state.guard,
    trips.way_home,
    trips.names,
    trips.backends,
)


def run(config: Config, command: Callable[[str], str]) -> list[Check]:
    """Every check. `command(verb)` is that command of tproxyd, with this configuration."""
    patient = _examine(config, command)
    return [check for ask in _CHECKS for check in ask(patient)]


def _examine(config: Config, command: Callable[[str], str]) -> Patient:
    from tproxyd.kernel import claim, desired, others, reconcile  # only when asked
    from tproxyd.kernel.listening import listening as who_listens
    from tproxyd.kernel.state import KernelState

    facts = reconcile.facts()
    unreadable: KernelError | None = None
    try:
        report, clashes = reconcile.check(config), reconcile.clashes(config)
    except KernelError as error:
        report, clashes, unreadable = reconcile.Report(), (), error
    try:
        listening = who_listens()
    except OSError:
        listening = None
    return Patient(
        config=config,
        command=command,
        installed=report.installed,
        differs=report.differs,
        listening=listening,
        clashes=clashes,
        nat=others.nat(),
        keeper=claim.holder(),
        unreadable=unreadable,
        backend=desired.backend(config, facts).backend,
        return_path=desired.return_path(config, facts).path,
        host_netns=facts.host_netns,
        wants_state=desired.desired(config, facts=facts) != KernelState(),
        dials_here=desired.dials_here(config, facts),
        holds_elsewhere=desired.holds_elsewhere(config, facts),
    )
