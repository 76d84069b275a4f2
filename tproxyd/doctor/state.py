"""What the kernel holds for us, what others hold in our place, and whether anybody listens."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tproxyd.config import Guard, OnCrash
from tproxyd.doctor.check import Check, Patient, Verdict
from tproxyd.linux import CAP_NET_ADMIN, CAPABILITY_NAMES, capabilities


def clashes(patient: Patient) -> Iterator[Check]:
    if patient.unreadable or not patient.wants_state:
        return
    if not patient.clashes:
        mark, table = patient.config.mark, patient.config.table
        yield Check("clashes", Verdict.OK, f"mark {mark:#x} and table {table} are ours alone")
    for clash in patient.clashes:
        remedy = "remove it, or give tproxyd another mark, table or listener port in its file"
        yield Check("clashes", Verdict.FAIL, clash, remedy)


def listeners(patient: Patient) -> Iterator[Check]:
    for listener in patient.config.listeners:
        name, port = f"listener {listener.name}", listener.port
        if _someone_listens(port):
            yield Check(name, Verdict.OK, f"something listens on {port}")
        elif patient.installed and listener.intercepts:
            yield Check(
                name,
                Verdict.FAIL,
                f"nobody listens on {port}, but the rules stand: clients are refused",
                f"{patient.start}; or take the rules away: tproxyd clean",
            )
        else:
            yield Check(name, Verdict.WARN, f"nobody listens on {port}", patient.start)


def rules(patient: Patient) -> Iterator[Check]:
    if patient.unreadable:
        error = patient.unreadable
        detail = f"unknown: can't {error.action}: {error.why}"
        remedy = error.hint
        if CAP_NET_ADMIN not in capabilities():
            able = "as root" if os.geteuid() else f"with {CAPABILITY_NAMES[CAP_NET_ADMIN]}"
            remedy = f"run doctor {able}"
        yield Check("rules", Verdict.WARN, detail, remedy)
    elif not patient.wants_state and not patient.installed:
        yield Check("rules", Verdict.OK, "none, and none are needed: nothing is intercepted")
    elif not patient.installed:
        serving = any(_someone_listens(each.port) for each in patient.config.listeners)
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


def _someone_listens(port: int) -> bool:
    listening = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            if listening.search(Path(f"/proc/net/{table}").read_text()):
                return True
    return False
