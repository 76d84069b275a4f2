"""What the kernel holds for us, what others hold in our place, and whether anybody listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator

from tproxyd.config import (
    Backend,
    Guard,
    Listener,
    OnCrash,
    ReturnPath,
    Scheme,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.doctor.check import Check, Patient, Verdict
from tproxyd.linux import CAP_NET_ADMIN, CAPABILITY_NAMES, capabilities


def clashes(patient: Patient) -> Iterator[Check]:
    if patient.unreadable or not patient.wants_state:
        return
    if not patient.clashes:
        mark, table = patient.config.mark, patient.config.table
        yield Check("clashes", Verdict.OK, f"mark {mark:#x} and table {table} are ours alone")
    for clash in patient.clashes:
        verdict = Verdict.FAIL if clash.sure else Verdict.WARN
        yield Check("clashes", verdict, clash.what, clash.remedy)


def nat(patient: Patient) -> Iterator[Check]:
    """What it does to interception, and the other way round: see kernel/chains.py, natchains.py.

    Not asked where rules of nat may be our own.
    """
    if not patient.nat or patient.config.rules.scheme is Scheme.ISTIO:
        return
    takes = [each for each in patient.config.listeners if each.intercepts]
    takes = [each for each in takes if each.intercept.via is Via.TPROXY]
    where = _where(each.table for each in patient.nat)
    keeping = [
        each.name
        for each in takes
        if each.intercept.scope is Scope.FORWARD and each.source is SourceKind.CLIENT_PORT
    ]
    if patient.backend is not Backend.NFT and (takes or patient.holds_elsewhere):
        yield Check(
            "nat",
            Verdict.WARN,
            f"{where}; with iptables they come behind interception, and what is for both hangs",
            'rules.backend = "nft" intercepts behind nat; or exclude the ports that nat publishes,'
            " and masquerade nothing that goes to backends or through a router",
        )
    elif keeping:
        yield Check(
            "nat",
            Verdict.WARN,
            f"{where}; with the client's own port, connections of {', '.join(keeping)} are not"
            " masqueraded",
            'source = "client", where the router is to masquerade',
        )
    on_lo = [each.table for each in patient.nat if each.on_lo]
    if on_lo and patient.dials_here and patient.return_path is ReturnPath.ACCEPT_MARK:
        yield Check(
            "nat",
            Verdict.WARN,
            f"{_where(on_lo)}; where they masquerade what leaves through lo from a client, as our"
            " connections to the application do, it does not see the client",
            'rules.return_path = "conntrack" keeps those from nat',
        )


def _where(tables: Iterable[str]) -> str:
    return f"there are rules of nat ({', '.join(tables)})"


def listeners(patient: Patient) -> Iterator[Check]:
    for listener in patient.config.listeners:
        yield Check(f"listener {listener.name}", *_listener(patient, listener))


def _listener(patient: Patient, listener: Listener) -> tuple[Verdict, str, str]:
    port = listener.port
    if patient.listening is None:
        detail = f"unknown whether anybody listens on {port}: this kernel has no sock_diag"
        return Verdict.WARN, detail, f"look at: ss -ltn sport = :{port}; modprobe tcp_diag"
    sockets = patient.listening.get(port)
    if sockets is None:
        if not (patient.installed and listener.intercepts):
            return Verdict.WARN, f"nobody listens on {port}", patient.start
        detail = f"nobody listens on {port}, but the rules stand: clients are refused"
        return Verdict.FAIL, detail, f"{patient.start}; or take the rules away: tproxyd clean"
    if listener.intercepts and listener.intercept.via is Via.TPROXY and not all(sockets):
        who = f"another program listens on {port}, by a socket that is not transparent"
        remedy = f"end it, or give this listener another port; who it is: ss -ltnp sport = :{port}"
        return Verdict.FAIL, f"{who}: no client gets there", remedy
    return Verdict.OK, f"something listens on {port}", ""


def interfaces(patient: Patient) -> Iterator[Check]:
    """A rule for an interface that is not there is no error, it may come; but it takes nothing."""
    here = [name for _, name in socket.if_nameindex()]

    def there(wanted: str) -> bool:
        if wanted.endswith("*"):
            return any(name.startswith(wanted[:-1]) for name in here)
        return wanted in here

    for listener in patient.config.listeners:
        for wanted in listener.intercept.interfaces if listener.intercepts else ():
            if not there(wanted):
                detail = f"there is none: the listener {listener.name} takes nothing from it"
                remedy = "correct intercept.interfaces, or make it; look at: ip -br link"
                yield Check(f"interface {wanted}", Verdict.WARN, detail, remedy)


def rules(patient: Patient) -> Iterator[Check]:
    if error := patient.unreadable:
        # Who lacks the capability was told so above, and has not found anything wrong.
        able = CAP_NET_ADMIN in capabilities()
        remedy = error.hint
        if not able:
            who = "as root" if os.geteuid() else f"with {CAPABILITY_NAMES[CAP_NET_ADMIN]}"
            remedy = f"run doctor {who}"
        verdict = Verdict.FAIL if able else Verdict.WARN
        yield Check("rules", verdict, f"can't {error.action}: {error.why}", remedy)
    elif not patient.wants_state and not patient.installed:
        yield Check("rules", Verdict.OK, "none, and none are needed: nothing is intercepted")
    elif not patient.installed:
        serving = any(each.port in (patient.listening or ()) for each in patient.config.listeners)
        verdict = Verdict.FAIL if serving else Verdict.WARN
        lacking = "so nothing is intercepted"
        if not any(each.intercepts for each in patient.config.listeners):
            lacking = "so upstreams that see the client can't answer us"
        remedy = f"{patient.command('install')}, or run with --install"
        yield Check("rules", verdict, f"none, {lacking}", remedy)
    elif patient.differs:
        for difference in patient.differs:
            detail = f"not as configured; to do: {difference}"
            yield Check("rules", Verdict.FAIL, detail, patient.put_right)
    else:
        kept = f", and kept so by {patient.keeper}" if patient.keeper else ""
        yield Check("rules", Verdict.OK, f"rules, routes and sysctls are as configured{kept}")


def guard(patient: Patient) -> Iterator[Check]:
    """Only a daemon that keeps the rules can own them, or take them away when it is killed."""
    rules = patient.config.rules
    asked = [f'guard = "{rules.guard}"'] if rules.guard is not Guard.NONE else []
    asked += [f'on_crash = "{rules.on_crash}"'] if rules.on_crash is not OnCrash.CLOSED else []
    if asked and patient.installed and not patient.keeper:
        detail = f"{' and '.join(asked)}, but no daemon keeps the rules, which then means nothing"
        remedy = f"{patient.command('run --install')} keeps them; or with --guard, after install"
        yield Check("guard", Verdict.WARN, detail, remedy)
