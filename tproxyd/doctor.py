"""Why it does not work: one function per check, each with its remedy.

Called by `tproxyd doctor`. It only reads, with one exception that is the point of it: the spoofed
round trip opens a listener on one of this host's addresses and connects to it as a client that does
not exist (from the documentation ranges 192.0.2.0/24, 2001:db8::/32), through the state that is
installed. That takes the way of every upstream connection: a foreign source, the mark, the policy
rule, the table, lo, and back. Nothing of it can leave this host, unless the way back is broken,
which is what it then says.

What it cannot try from here is the other half, a client's packet arriving from outside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.config import Config, ReturnPath
from tproxyd.errors import KernelError
from tproxyd.flow.connect import Sockets
from tproxyd.flow.listen import has_ipv6
from tproxyd.flow.policy import Plan
from tproxyd.linux import (
    CAP_NET_ADMIN,
    CAP_NET_RAW,
    CAPABILITY_NAMES,
    capabilities,
    interface_is_up,
)

_SYSCTL = Path("/proc/sys")
# The first kernels with: reject in an inet prerouting chain (5.9), SO_MARK by CAP_NET_RAW (5.17).
_OLDEST = (5, 9)
_SO_MARK_BY_RAW = (5, 17)
_ROUND_TRIP_S = 1.0  # all of it stays on this host: tens of microseconds when it works


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""  # what to do, where the verdict is not ok


@dataclass(frozen=True, slots=True)
class Patient:
    """What several checks need to know, found out once."""

    config: Config
    installed: bool  # something of ours is in the kernel
    differs: tuple[str, ...]  # how it differs from what the configuration wants
    clashes: tuple[str, ...]  # what others have where we want to be
    unreadable: str  # why the kernel state cannot be told; "" when it can
    return_path: ReturnPath
    host_netns: bool


def run(config: Config) -> list[Check]:
    """Every check, in the order in which a packet would meet its subject."""
    patient = _examine(config)
    return [check for ask in _CHECKS for check in ask(patient)]


def _examine(config: Config) -> Patient:
    from tproxyd.kernel import desired, reconcile  # only when asked

    facts = reconcile.facts()
    path = desired.return_path(config, facts).path
    try:
        report = reconcile.check(config)
        clashes = reconcile.clashes(config)
    except KernelError as error:
        return Patient(config, False, (), (), str(error), path, facts.host_netns)
    return Patient(config, report.installed, report.differs, clashes, "", path, facts.host_netns)


def privileges(_: Patient) -> Iterator[Check]:
    have = capabilities()
    for number, what in (
        (CAP_NET_RAW, "transparent sockets, foreign source addresses, the mark"),
        (CAP_NET_ADMIN, "installing and reading rules and routes"),
    ):
        name = CAPABILITY_NAMES[number]
        if number in have:
            yield Check(name, Verdict.OK, f"present: {what}")
        else:
            remedy = (
                f"run as root; under systemd AmbientCapabilities={name}; in a container"
                f" add {name.removeprefix('CAP_')} to its capabilities"
            )
            yield Check(name, Verdict.FAIL, f"missing: {what}", remedy)


def kernel(_: Patient) -> Iterator[Check]:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _OLDEST:
        remedy = "use Linux 5.9 or newer"
        yield Check("kernel", Verdict.FAIL, f"Linux {release}: no reject in prerouting", remedy)
    elif version < _SO_MARK_BY_RAW:
        remedy = "give the daemon CAP_NET_ADMIN too, or use Linux 5.17 or newer"
        yield Check("kernel", Verdict.WARN, f"Linux {release}: SO_MARK needs NET_ADMIN", remedy)
    else:
        yield Check("kernel", Verdict.OK, f"Linux {release}")


def transparent_socket(patient: Patient) -> Iterator[Check]:
    try:
        nobody = Endpoint("127.0.0.1", 0)
        plan = Plan(Client(nobody), Upstream(nobody), spoof=True)
        Sockets(patient.config.mark).upstream_socket(plan).close()
    except OSError as error:
        remedy = "see the capabilities above; a seccomp filter or an old kernel can forbid it too"
        detail = f"IP_TRANSPARENT and SO_MARK: {error.strerror}"
        yield Check("transparent socket", Verdict.FAIL, detail, remedy)
    else:
        yield Check("transparent socket", Verdict.OK, "IP_TRANSPARENT and SO_MARK can be set")


def loopback(_: Patient) -> Iterator[Check]:
    if interface_is_up("lo"):
        yield Check("lo", Verdict.OK, "up")
    else:
        remedy = "ip link set lo up, then tproxyd install: table routes over lo went with it"
        yield Check("lo", Verdict.FAIL, "down: every answer comes home over it", remedy)


def ipv6(_: Patient) -> Iterator[Check]:
    if has_ipv6():
        yield Check("IPv6", Verdict.OK, "intercepted like IPv4")
        return
    others = _interfaces_with_ipv6()
    if others:
        yield Check(
            "IPv6",
            Verdict.WARN,
            f"off on lo, on at {', '.join(others)}: IPv6 connections there are refused",
            "sysctl -w net.ipv6.conf.lo.disable_ipv6=0, then restart tproxyd",
        )
    else:
        yield Check("IPv6", Verdict.OK, "none on this machine: IPv4 only")


def sysctls(patient: Patient) -> Iterator[Check]:
    accept_mark = _sysctl("net/ipv4/tcp_fwmark_accept")
    wanted = patient.return_path is ReturnPath.ACCEPT_MARK
    if accept_mark == "1" and patient.host_netns:
        yield Check(
            "tcp_fwmark_accept",
            Verdict.WARN,
            "1 on the host: sockets of every program inherit packet marks here",
            'rules.return_path = "conntrack", and sysctl -w net.ipv4.tcp_fwmark_accept=0,'
            " unless somebody else needs it",
        )
    elif wanted and accept_mark != "1" and patient.installed:
        yield Check(
            "tcp_fwmark_accept",
            Verdict.FAIL,
            f"{accept_mark}, but the return path is accept-mark: answers leave to the client",
            "tproxyd install puts it back; see what else writes this sysctl",
        )
    else:
        yield Check(
            "tcp_fwmark_accept", Verdict.OK, f"{accept_mark}, return path {patient.return_path}"
        )
    if wanted and patient.installed:
        yield from _reflect("ipv4")
        if has_ipv6():
            yield from _reflect("ipv6")
    # Both measured harmless for the lean rules: what comes over lo keeps the route that it left
    # with, and is not validated; what comes from clients carries no mark.
    rp_filter = max(_sysctl(f"net/ipv4/conf/{name}/rp_filter") for name in ("all", "default"))
    yield Check(
        "rp_filter",
        Verdict.OK,
        {"0": "off", "1": "strict", "2": "loose"}.get(rp_filter, rp_filter)
        + ": answers over lo are not judged by it",
    )
    valid_mark = _sysctl("net/ipv4/conf/all/src_valid_mark")
    yield Check(
        "src_valid_mark",
        Verdict.OK,
        f"{valid_mark}: packets from clients carry no mark of ours, so it changes nothing",
    )


def _reflect(version: str) -> Iterator[Check]:
    """Without it accept-mark works but for what no socket sends: the RST of a closed port."""
    name = f"{version}.fwmark_reflect"
    value = _sysctl(f"net/{version}/fwmark_reflect")
    if value != "0":
        yield Check(name, Verdict.OK, f"{value}: refusals come home too")
    else:
        yield Check(
            name,
            Verdict.FAIL,
            "0: refusals leave to the client, and a closed port becomes a timeout",
            "tproxyd install puts it back; see what else writes this sysctl",
        )


def clashes(patient: Patient) -> Iterator[Check]:
    if patient.unreadable:
        return
    if not patient.clashes:
        mark, table = patient.config.mark, patient.config.table
        yield Check("clashes", Verdict.OK, f"mark {mark:#x} and table {table} are ours alone")
    for clash in patient.clashes:
        remedy = "remove it, or give tproxyd another mark, table or listener port in its file"
        yield Check("clashes", Verdict.FAIL, clash, remedy)


def kernel_state(patient: Patient) -> Iterator[Check]:
    listening = tuple(each for each in patient.config.listeners if _someone_listens(each.port))
    for listener in patient.config.listeners:
        if listener in listening:
            yield Check(
                f"listener {listener.name}", Verdict.OK, f"something listens on {listener.port}"
            )
        elif patient.installed:
            yield Check(
                f"listener {listener.name}",
                Verdict.FAIL,
                f"nobody listens on {listener.port}, but the rules stand: clients are refused",
                "start the daemon (tproxyd run), or take the rules away (tproxyd clean)",
            )
        else:
            yield Check(
                f"listener {listener.name}",
                Verdict.WARN,
                f"nobody listens on {listener.port}",
                "start the daemon: tproxyd run --install",
            )
    if patient.unreadable:
        remedy = "run doctor as root"
        yield Check("rules", Verdict.WARN, f"unknown: {patient.unreadable}", remedy)
    elif not patient.installed:
        verdict = Verdict.FAIL if listening else Verdict.WARN
        detail = "none, so nothing is intercepted"
        yield Check("rules", verdict, detail, "tproxyd install, or run with --install")
    elif patient.differs:
        for difference in patient.differs:
            detail = f"not as configured; to do: {difference}"
            yield Check("rules", Verdict.FAIL, detail, "tproxyd install does it")
    else:
        yield Check("rules", Verdict.OK, "rules, routes and sysctls are as configured")


def round_trip(patient: Patient) -> Iterator[Check]:
    """Connect as a client that does not exist to a listener of ours, through what is installed."""
    if not (patient.installed or patient.unreadable) or CAP_NET_RAW not in capabilities():
        return
    for v6, client in ((False, "192.0.2.1"), (True, "2001:db8::1")):
        if v6 and not has_ipv6():
            continue
        name = f"round trip IPv{6 if v6 else 4}"
        own = _own_address(v6)
        if own is None:
            detail = "not tried: this host has no address but loopback ones"
            yield Check(name, Verdict.WARN, detail, "give an interface an address, then try again")
            continue
        try:
            seen = _spoofed_connect(Endpoint(client, 0), own, patient.config.mark)
        except OSError as error:
            yield Check(
                name,
                Verdict.FAIL,
                f"as {client} to {own}: {error.strerror or error}; the way home is broken",
                f"look at: ip rule, ip route show table {patient.config.table},"
                f" nft list table inet tproxyd; tproxyd install puts them right",
            )
        else:
            yield Check(name, Verdict.OK, f"connected as {client}; the far end saw {seen}")


_CHECKS: tuple[Callable[[Patient], Iterator[Check]], ...] = (
    privileges,
    kernel,
    transparent_socket,
    loopback,
    ipv6,
    sysctls,
    clashes,
    kernel_state,
    round_trip,
)


# What the checks look at --------------------------------------------------------------------------


def _spoofed_connect(client: Endpoint, own: str, mark: int) -> Endpoint:
    """Who a listener on `own` sees when we connect to it as `client`. Raises OSError."""
    family = socket.AF_INET6 if client.is_v6 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.bind((own, 0))
        listener.listen(1)
        listener.settimeout(_ROUND_TRIP_S)
        there = Upstream(Endpoint(*listener.getsockname()[:2]))
        spoofed = Sockets(mark).upstream_socket(Plan(Client(client), there, spoof=True))
        stack.callback(spoofed.close)
        spoofed.bind(client)
        code = spoofed.connect_ex(there)
        if code != errno.EINPROGRESS:
            raise OSError(code, os.strerror(code))
        try:
            accepted, address = listener.accept()
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "no answer came back") from None
        accepted.close()
        return Endpoint(address[0], address[1])


def _own_address(v6: bool) -> str | None:
    """An address of this host that is not loopback or link-local."""
    path = "/proc/net/if_inet6" if v6 else "/proc/net/fib_trie"
    with contextlib.suppress(OSError):
        text = Path(path).read_text()
        if v6:  # 32 digits, index, length, scope (00: global), flags, name
            for line in text.splitlines():
                digits, _, _, scope, *_ = line.split()
                if scope == "00":
                    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
        else:  # "|-- 10.9.1.1" and in the next line "/32 host LOCAL"
            for found in re.findall(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL", text):
                if not found.startswith("127."):
                    return str(found)
    return None


def _someone_listens(port: int) -> bool:
    listening = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            if listening.search(Path(f"/proc/net/{table}").read_text()):
                return True
    return False


def _interfaces_with_ipv6() -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return sorted({line.split()[-1] for line in lines} - {"lo"})
    return []


def _sysctl(name: str) -> str:
    try:
        return (_SYSCTL / name).read_text().strip()
    except OSError:
        return "absent"
