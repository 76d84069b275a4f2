"""What the kernel holds for us, what others hold in our place, and whether anybody listens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from tproxyd.config import Guard, OnCrash
from tproxyd.doctor.check import Check, Patient, Verdict
from tproxyd.linux import CAP_NET_ADMIN, capabilities


def clashes(patient: Patient) -> Iterator[Check]:
    if patient.unreadable or not patient.wants_state:
        return
    if not patient.clashes:
        mark, table = patient.config.mark, patient.config.table
        yield Check("clashes", Verdict.OK, f"mark {mark:#x} and table {table} are ours alone")
    for clash in patient.clashes:
        verdict = Verdict.FAIL if clash.sure else Verdict.WARN
        yield Check("clashes", verdict, clash.what, clash.remedy)


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
                "start the daemon (tproxyd run), or take the rules away (tproxyd clean)",
            )
        else:
            run = "tproxyd run --install" if patient.wants_state else "tproxyd run"
            yield Check(name, Verdict.WARN, f"nobody listens on {port}", f"start the daemon: {run}")


def rules(patient: Patient) -> Iterator[Check]:
    if error := patient.unreadable:
        # Who lacks the capability was told so above, and has not found anything wrong.
        verdict = Verdict.FAIL if CAP_NET_ADMIN in capabilities() else Verdict.WARN
        yield Check("rules", verdict, f"can't {error.action}: {error.why}", error.hint)
    elif not patient.wants_state and not patient.installed:
        yield Check("rules", Verdict.OK, "none, and none are needed: nothing is intercepted")
    elif not patient.installed:
        serving = any(_someone_listens(each.port) for each in patient.config.listeners)
        verdict = Verdict.FAIL if serving else Verdict.WARN
        lacking = "so nothing is intercepted"
        if not any(each.intercepts for each in patient.config.listeners):
            lacking = "so upstreams that see the client can't answer us"
        remedy = "tproxyd install, or run with --install"
        yield Check("rules", verdict, f"none, {lacking}", remedy)
    elif patient.differs:
        for difference in patient.differs:
            detail = f"not as configured; to do: {difference}"
            log = f"the log of {patient.keeper} says why it does not heal that"
            remedy = log if patient.keeper else "tproxyd install does it"
            yield Check("rules", Verdict.FAIL, detail, remedy)
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
        yield Check("guard", Verdict.WARN, detail, "run with --install or --guard")


def _someone_listens(port: int) -> bool:
    listening = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            if listening.search(Path(f"/proc/net/{table}").read_text()):
                return True
    return False
