"""The command istio-iptables: read what is asked for, do it, say what was done.

Everything is asked of a Kernel, so that what it does in which order is tested without one. Whatever
stood there before, an installation ends with what was asked for, changed in one step: there is no
moment without interception, and no second policy rule after a second run.
"""

from __future__ import annotations

import datetime
import grp
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from tproxyd.errors import ConfigError, KernelError, TproxydError
from tproxyd.istio.flags import usage
from tproxyd.istio.invocation import LEVELS, Invocation, parse
from tproxyd.istio.options import IstioOptions
from tproxyd.istio.validate import Invalid, validate
from tproxyd.linux import enter_network_namespace

FINE, DIFFERS, USAGE, REFUSED = 0, 1, 2, 3
INVALID = 126  # Istio's, and what its CNI repair looks for in a pod's status

Validate = Callable[..., Iterator[str]]


class Outcome(NamedTuple):
    """What was done, or would be; and what should be heard about it."""

    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    installed: bool = False  # the kernel holds something of ours


class Kernel(Protocol):
    """What stands in the kernel; every call may raise KernelError."""

    def has_ipv6(self) -> bool: ...

    def install(self, options: IstioOptions, backend: str) -> Outcome: ...

    def differs(self, options: IstioOptions, backend: str) -> Outcome:
        """Read only: what install would do."""
        ...

    def rules(self, options: IstioOptions, backend: str) -> str:
        """Read only: what install makes, as a text."""
        ...

    def clean(self, options: IstioOptions) -> Outcome:
        """Of the options only the mark and the table count, and only for what is not ours."""
        ...

    def left(self, options: IstioOptions) -> Outcome:
        """Read only: what clean would do."""
        ...


class Differs(TproxydError):
    """Other rules stand there, and may not be changed."""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command; its exit code."""
    log = Log()
    try:
        invocation = parse(argv, environ, _Files())
        if invocation is None:
            sys.stdout.write(usage())
            return FINE
        log = Log(invocation.level, invocation.as_json)
        if invocation.network_namespace:
            _enter(invocation)
        if invocation.cni_mode:
            # The lock of legacy iptables is a file of the host's, and the tables are a pod's: its
            # namespace stands in, which is what Istio does with that variable of iptables'.
            os.environ["XTABLES_LOCKFILE"] = invocation.network_namespace
        from tproxyd.istio.machine import Machine

        carry_out(invocation, Machine(), log)
    except ConfigError as error:
        return log.failed(error, USAGE)
    except KernelError as error:
        return log.failed(error, REFUSED)
    except Differs as error:
        return log.failed(error, DIFFERS)
    except Invalid as error:
        return log.failed(error, INVALID)
    return FINE


def carry_out(
    invocation: Invocation, kernel: Kernel, log: Log, validate: Validate = validate
) -> None:
    """Do what is asked for. Raises Differs, KernelError, Invalid."""
    options = replace(invocation.options, ipv6=kernel.has_ipv6())
    if invocation.cleanup_only:
        _clean(invocation, kernel, log)
    elif invocation.dry_run:
        if not invocation.skip_rule_apply:
            sys.stdout.write(kernel.rules(options, invocation.backend))
    elif not invocation.skip_rule_apply:
        _install(invocation, options, kernel, log)
    if invocation.run_validation:
        _validate(invocation, options, log, validate)


def _clean(invocation: Invocation, kernel: Kernel, log: Log) -> None:
    if invocation.dry_run:
        for line in kernel.left(invocation.options).changes or ("nothing to remove",):
            sys.stdout.write(f"# {line}\n")
        return
    log.tell(kernel.clean(invocation.options), "nothing to remove")


def _install(invocation: Invocation, options: IstioOptions, kernel: Kernel, log: Log) -> None:
    if log.shows("debug"):
        log.write("debug", kernel.rules(options, invocation.backend))
    if not invocation.may_change:
        found = kernel.differs(options, invocation.backend)
        if found.installed and found.changes:
            lines = "".join(f"\n  {line}" for line in found.changes)
            raise Differs(
                "can't install the interception: what stands there differs, and --reconcile=false"
                f" forbids to change it; leave that out, or --cleanup-only first{lines}"
            )
    log.tell(kernel.install(options, invocation.backend), "nothing to change")


def _validate(invocation: Invocation, options: IstioOptions, log: Log, validate: Validate) -> None:
    for found in validate(
        options, port=invocation.probe_port, timeout_s=invocation.probe_timeout_s
    ):
        log.write("info", f"validated: {found}")


def _enter(invocation: Invocation) -> None:
    path = invocation.network_namespace
    try:
        enter_network_namespace(path)
    except OSError as error:
        hint = "it takes CAP_SYS_ADMIN and a path such as /run/netns/NAME or /proc/PID/ns/net"
        raise KernelError(
            f"enter the network namespace {path}", error.strerror or str(error), hint
        ) from None


class _Files:
    """The Host that this process runs on."""

    def uid(self, name: str) -> int:
        return pwd.getpwnam(name).pw_uid

    def gid(self, name: str) -> int:
        return grp.getgrnam(name).gr_gid

    def resolv_conf(self) -> str:
        return Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace")


# What it says -----------------------------------------------------------------------------------


class Log:
    """What was done on stdout, what failed on stderr; as lines, or as Istio's JSON."""

    def __init__(self, level: str = "info", as_json: bool = False) -> None:
        self._level, self._as_json = level, as_json

    def shows(self, level: str) -> bool:
        return LEVELS.index(level) <= LEVELS.index(self._level)

    def write(self, level: str, text: str) -> None:
        if not self.shows(level):
            return
        if self._as_json:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            line = {"level": level, "time": now.replace("+00:00", "Z"), "msg": text}
            text = json.dumps(line, ensure_ascii=False)
        elif level == "error":
            text = f"istio-iptables: {text}"
        print(text.rstrip("\n"), file=sys.stderr if level in ("error", "warn") else sys.stdout)

    def tell(self, outcome: Outcome, nothing: str) -> None:
        for line in outcome.changes or (nothing,):
            self.write("info", line)
        for line in outcome.notes:
            self.write("warn", line)

    def failed(self, error: TproxydError, code: int) -> int:
        self.write("error", str(error))
        return code
