"""What this machine, its kernel and its settings allow."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.config import Backend, ReturnPath, Scheme, Scope
from tproxyd.doctor.check import Check, Patient, Verdict, interfaces, sysctl
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

# The first kernels with: nft's "socket wildcard" (5.12), SO_MARK by CAP_NET_RAW (5.17).
_OLDEST = (5, 12)
_SO_MARK_BY_RAW = (5, 17)


def privileges(patient: Patient) -> Iterator[Check]:
    have = capabilities()
    for number, what, needed in (
        (
            CAP_NET_RAW,
            "transparent sockets, foreign source addresses, the mark",
            patient.config.transparent,
        ),
        (CAP_NET_ADMIN, "installing and reading rules and routes", patient.wants_state),
    ):
        name = CAPABILITY_NAMES[number]
        if not needed:
            yield Check(name, Verdict.OK, "not needed by this configuration")
        elif number in have:
            yield Check(name, Verdict.OK, f"present: {what}")
        else:
            short = name.removeprefix("CAP_")
            if os.geteuid() == 0:
                who, unit = "root lacks it here", f"CapabilityBoundingSet= must hold {name}"
            else:
                who, unit = "run as root", f"AmbientCapabilities={name}"
            remedy = f"{who}; under systemd {unit}; in a container add {short} to its capabilities"
            yield Check(name, Verdict.FAIL, f"missing: {what}", remedy)


def kernel(_: Patient) -> Iterator[Check]:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _OLDEST:
        remedy = "use Linux 5.12 or newer"
        yield Check("kernel", Verdict.FAIL, f"Linux {release}: no socket wildcard in nft", remedy)
    elif version < _SO_MARK_BY_RAW:
        remedy = "give the daemon CAP_NET_ADMIN too, or use Linux 5.17 or newer"
        yield Check("kernel", Verdict.WARN, f"Linux {release}: SO_MARK needs NET_ADMIN", remedy)
    else:
        yield Check("kernel", Verdict.OK, f"Linux {release}")


def transparent_socket(patient: Patient) -> Iterator[Check]:
    if not patient.config.transparent:
        return
    sockets = Sockets(patient.config.mark)
    try:
        nobody = Endpoint("127.0.0.1", 0)
        plan = Plan(Client(nobody), Upstream(nobody), spoof=True)
        sockets.upstream_socket(plan).close()
    except OSError as error:
        remedy = "see the capabilities above; a seccomp filter or an old kernel can forbid it too"
        detail = f"IP_TRANSPARENT and SO_MARK: {error.strerror}"
        yield Check("transparent socket", Verdict.FAIL, detail, remedy)
    else:
        yield Check("transparent socket", Verdict.OK, "IP_TRANSPARENT and SO_MARK can be set")
    finally:
        sockets.finish()


def loopback(patient: Patient) -> Iterator[Check]:
    if interface_is_up("lo"):
        yield Check("lo", Verdict.OK, "up")
    else:
        remedy = "ip link set lo up"
        if not patient.keeper:
            remedy += f", then {patient.command('install')}: routes over lo went with it"
        yield Check("lo", Verdict.FAIL, "down: every answer comes home over it", remedy)


def ipv6(_: Patient) -> Iterator[Check]:
    if has_ipv6():
        yield Check("IPv6", Verdict.OK, "served like IPv4")
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
    accept_mark = sysctl("net/ipv4/tcp_fwmark_accept")
    wanted = patient.dials_here and patient.return_path is ReturnPath.ACCEPT_MARK
    is_on = accept_mark not in ("0", "absent")
    if is_on and patient.host_netns:
        yield Check(
            "tcp_fwmark_accept",
            Verdict.WARN,
            f"{accept_mark} on the host: sockets of every program inherit packet marks here",
            'rules.return_path = "conntrack", and sysctl -w net.ipv4.tcp_fwmark_accept=0,'
            " unless somebody else needs it",
        )
    elif wanted and not is_on and patient.installed:
        yield Check(
            "tcp_fwmark_accept",
            Verdict.FAIL,
            f"{accept_mark}, but the return path is accept-mark: answers leave to the client",
            f"{patient.put_right}; see what else writes this sysctl",
        )
    elif patient.dials_here:
        yield Check(
            "tcp_fwmark_accept", Verdict.OK, f"{accept_mark}, return path {patient.return_path}"
        )
    if wanted and patient.installed:
        yield from _reflect("ipv4", patient)
        if has_ipv6():
            yield from _reflect("ipv6", patient)
    if patient.holds_elsewhere or patient.config.rules.scheme is Scheme.ISTIO:
        yield _marked_packets()
    elif patient.wants_state:
        # Both measured harmless for local destinations: what comes over lo keeps the route that it
        # left with, and is not validated; what comes from clients carries no mark.
        yield Check("src_valid_mark", Verdict.OK, "packets from clients carry no mark of ours")
    if patient.dials_here:
        strictness = max(sysctl(f"net/ipv4/conf/{name}/rp_filter") for name in ("all", "default"))
        word = {"0": "off", "1": "strict", "2": "loose"}.get(strictness, strictness)
        yield Check("rp_filter", Verdict.OK, f"{word}: answers over lo are not judged by it")


def _marked_packets() -> Check:
    """With src_valid_mark, marked packets that arrive are dropped: see kernel/desired.py."""

    def setting(name: str, key: str) -> int:
        """Of both kinds IPv4 takes the larger (IN_DEV_ORCONF, IN_DEV_MAXCONF)."""
        values = (sysctl(f"net/ipv4/conf/{each}/{key}") for each in ("all", name))
        return max(int(value) if value.isdigit() else 0 for value in values)

    broken = [
        name
        for name in interfaces()
        if setting(name, "src_valid_mark")
        and not (setting(name, "accept_local") and setting(name, "rp_filter") in (0, 2))
    ]
    if not broken:
        return Check("src_valid_mark", Verdict.OK, "off, or with what it needs: answers arrive")
    names = ", ".join(broken)
    return Check(
        "src_valid_mark",
        Verdict.FAIL,
        f"1 at {names}: IPv4 packets that we mark are dropped there",
        "sysctl -w net.ipv4.conf.all.src_valid_mark=0 (WireGuard's wg-quick sets it), or"
        " accept_local=1 with rp_filter=2 at these interfaces",
    )


def forwarding(patient: Patient) -> Iterator[Check]:
    """What a router needs besides rules."""
    takes = [each.intercept.scope for each in patient.config.listeners if each.intercepts]
    if Scope.FORWARD in takes:
        yield from _router()
    by_nft = patient.backend is Backend.NFT  # with iptables its connections are tagged
    if (Scope.FORWARD in takes and by_nft) or patient.config.rules.scheme is Scheme.ISTIO:
        yield _cookies()


def _router() -> Iterator[Check]:
    for version, name in (("4", "net/ipv4/ip_forward"), ("6", "net/ipv6/conf/all/forwarding")):
        if version == "6" and not has_ipv6():
            continue
        if sysctl(name) == "1":
            yield Check(f"forwarding IPv{version}", Verdict.OK, "on")
        else:
            yield Check(
                f"forwarding IPv{version}",
                Verdict.WARN,
                "off: what is not taken by a listener is dropped, not forwarded",
                f"sysctl -w {name.replace('/', '.')}=1",
            )


def _cookies() -> Check:
    if sysctl("net/ipv4/tcp_syncookies") != "2":
        return Check("tcp_syncookies", Verdict.OK, "only where a listener's queue overflows")
    return Check(
        "tcp_syncookies",
        Verdict.FAIL,
        "2: the end of such a handshake belongs to no socket, and these rules lose it",
        "sysctl -w net.ipv4.tcp_syncookies=1",
    )


def _reflect(version: str, patient: Patient) -> Iterator[Check]:
    """Without it accept-mark works but for what no socket sends: the RST of a closed port."""
    name = f"{version}.fwmark_reflect"
    value = sysctl(f"net/{version}/fwmark_reflect")
    if value != "0":
        yield Check(name, Verdict.OK, f"{value}: refusals come home too")
    else:
        yield Check(
            name,
            Verdict.FAIL,
            "0: refusals leave to the client, and a closed port becomes a timeout",
            f"{patient.put_right}; see what else writes this sysctl",
        )


def _interfaces_with_ipv6() -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return sorted({line.split()[-1] for line in lines} - {"lo"})
    return []
