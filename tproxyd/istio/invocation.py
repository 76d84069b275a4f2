"""What a call of istio-iptables asks for, out of its flags and variables.

Where that tool passes over what it does not understand (a variable that is no boolean, a mode that
is neither, an unknown user), we refuse, with everything that is wrong at once: what is passed over
here is traffic that nobody looks at. Pure: users, groups and resolv.conf are asked of a Host.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tproxyd.errors import ConfigError, Problem
from tproxyd.istio import options as opt
from tproxyd.istio.flags import Given, given
from tproxyd.istio.options import ALL, IstioOptions

T = TypeVar("T")

# All groups that are taken stand in one rule, one match for each, and a rule has its limits; this
# one is Istio's (maxOwnerGroupsInclude).
MOST_OWNER_GROUPS = 64

LEVELS = ("none", "fatal", "error", "warn", "info", "debug")


class Host(Protocol):
    """What a command line means depends on the host a little."""

    def uid(self, name: str) -> int:
        """KeyError when there is none."""
        ...

    def gid(self, name: str) -> int: ...

    def resolv_conf(self) -> str:
        """Raises OSError."""
        ...


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a call of istio-iptables asks for."""

    options: IstioOptions = field(default_factory=IstioOptions)
    dry_run: bool = False
    skip_rule_apply: bool = False
    run_validation: bool = False
    cleanup_only: bool = False
    may_change: bool = True  # False: --reconcile=false, and rules that differ are an error
    backend: str = "auto"  # auto, nft, iptables-nft, iptables-legacy
    network_namespace: str = ""
    cni_mode: bool = False
    probe_port: int = 15002
    probe_timeout_s: float = 5.0
    level: str = "info"
    as_json: bool = False


def parse(argv: Sequence[str], environ: Mapping[str, str], host: Host) -> Invocation | None:
    """What is asked for; None for help. ConfigError with every problem that there is."""
    problems: list[Problem] = []
    values = _Values(given(argv, environ, problems), problems)
    if values.has("help"):
        return None
    invocation = _invocation(values, host)
    if problems:
        raise ConfigError("given to istio-iptables", tuple(problems))
    return invocation


# Reading ------------------------------------------------------------------------------------------


class _Values:
    """What was given; reading it notes what is wrong."""

    def __init__(self, values: dict[str, Given], problems: list[Problem]) -> None:
        self._given, self._problems = values, problems

    def has(self, name: str) -> bool:
        return name in self._given

    def read(self, name: str, parse: Callable[[str], T], default: T, empty: bool = False) -> T:
        """With `empty` an empty text is a value as any other; otherwise it is the default."""
        if name not in self._given or not (empty or self._given[name].text):
            return default
        try:
            return parse(self._given[name].text)
        except ValueError as error:
            self.clash(name, str(error))
            return default

    def switch(self, name: str) -> bool:
        return self.read(name, _boolean, False, empty=True)

    def clash(self, name: str, why: str) -> None:
        problem = Problem(self._given[name].origin, why)
        if problem not in self._problems:  # some are read twice
            self._problems.append(problem)


def _invocation(values: _Values, host: Host) -> Invocation:
    invocation = Invocation(
        options=_options(values, host),
        dry_run=values.switch("dry-run"),
        skip_rule_apply=values.switch("skip-rule-apply"),
        run_validation=values.switch("run-validation"),
        cleanup_only=values.switch("cleanup-only"),
        may_change=not values.has("reconcile") or values.switch("reconcile"),
        backend=_backend(values),
        network_namespace=values.read("network-namespace", str, ""),
        cni_mode=values.switch("cni-mode"),
        probe_port=values.read("iptables-probe-port", opt.parse_port, 15002),
        probe_timeout_s=values.read("probe-timeout", _duration, 5.0),
        level=values.read("log_output_level", _level, "info"),
        as_json=values.switch("log_as_json"),
    )
    # Both are no news with their defaults: they say what happens in any case.
    values.switch("force-apply")
    values.switch("dual-stack")
    _clashes(values, invocation)
    return invocation


def _options(values: _Values, host: Host) -> IstioOptions:
    default = IstioOptions()
    nobody: tuple[int, ...] = ()
    uids = values.read("proxy-uid", lambda text: opt.parse_ids(text, host.uid), nobody)
    if not uids:
        uids = (_envoy_user(values, host),)
    gids = values.read("proxy-gid", lambda text: opt.parse_ids(text, host.gid), nobody)
    redirect_dns = values.switch("redirect-dns")
    capture_all_dns = values.switch("capture-all-dns")
    servers = _dns_servers(values, host) if redirect_dns and not capture_all_dns else ()
    return IstioOptions(
        mode=values.read("istio-inbound-interception-mode", opt.parse_mode, default.mode),
        proxy_port=values.read("envoy-port", opt.parse_port, default.proxy_port),
        inbound_port=values.read("inbound-capture-port", opt.parse_port, default.inbound_port),
        tunnel_port=values.read("inbound-tunnel-port", opt.parse_port, default.tunnel_port),
        proxy_uids=uids,
        proxy_gids=gids or uids,
        inbound_ports=values.read(
            "istio-inbound-ports", opt.parse_ports_or_all, default.inbound_ports
        ),
        inbound_exclude_ports=values.read("istio-local-exclude-ports", opt.parse_ports, ()),
        outbound_ranges=values.read(
            "istio-service-cidr", opt.parse_ranges_or_all, default.outbound_ranges
        ),
        outbound_exclude_ranges=values.read("istio-service-exclude-cidr", opt.parse_ranges, ()),
        outbound_ports=values.read("istio-outbound-ports", opt.parse_ports, ()),
        outbound_exclude_ports=values.read(
            "istio-local-outbound-ports-exclude", opt.parse_ports, ()
        ),
        owner_groups=values.read(
            "ISTIO_OUTBOUND_OWNER_GROUPS",
            lambda text: _owner_groups(text, host),
            default.owner_groups,
            empty=True,
        ),
        owner_groups_exclude=values.read(
            "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
            lambda text: opt.parse_ids(text, host.gid),
            nobody,
        ),
        exclude_interfaces=values.read("istio-exclude-interfaces", opt.parse_interfaces, ()),
        virtual_interfaces=values.read("kube-virt-interfaces", opt.parse_interfaces, ()),
        loopback=values.read(
            "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", opt.parse_loopback, default.loopback, empty=True
        ),
        mark=values.read("istio-inbound-tproxy-mark", opt.parse_mark, default.mark),
        table=values.read("istio-inbound-tproxy-route-table", opt.parse_table, default.table),
        drop_invalid=values.switch("drop-invalid"),
        redirect_dns=redirect_dns,
        capture_all_dns=capture_all_dns,
        dns_servers_v4=tuple(each for each in servers if ":" not in each),
        dns_servers_v6=tuple(each for each in servers if ":" in each),
    )


def _envoy_user(values: _Values, host: Host) -> int:
    """Istio's images have a user istio-proxy; who has not, gets its number all the same."""
    try:
        return host.uid(values.read("ENVOY_USER", str, "istio-proxy"))
    except KeyError:
        if values.read("ENVOY_USER", str, ""):
            values.clash("ENVOY_USER", "there is no such user here; say -u and its number")
        return 1337


def _owner_groups(text: str, host: Host) -> tuple[int, ...] | opt.All:
    groups = opt.parse_ids_or_all(text, host.gid)
    if groups is not ALL and len(groups) > MOST_OWNER_GROUPS:
        raise ValueError(f"{len(groups)} groups; one rule takes {MOST_OWNER_GROUPS} at most")
    return groups


def _dns_servers(values: _Values, host: Host) -> tuple[str, ...]:
    if values.switch("cni-mode"):
        why = (
            "with --cni-mode the resolv.conf here is the host's, not the pod's;"
            " add --capture-all-dns"
        )
        values.clash("redirect-dns", why)
        return ()
    try:
        text = host.resolv_conf()
    except OSError as error:
        why = f"/etc/resolv.conf can't be read: {error.strerror}; or add --capture-all-dns"
        values.clash("redirect-dns", why)
        return ()
    servers = tuple(name_servers(text))
    if not servers:
        why = "/etc/resolv.conf names no server, so nothing is redirected; add --capture-all-dns"
        values.clash("redirect-dns", why)
    return servers


def name_servers(resolv_conf: str) -> Iterator[str]:
    """The addresses of its `nameserver` lines (resolv.conf(5)), without their zones."""
    for line in resolv_conf.splitlines():
        word, *rest = line.split() or [""]
        if word == "nameserver" and rest:
            address = rest[0].partition("%")[0]
            try:
                yield str(ipaddress.ip_address(address))
            except ValueError:
                continue  # as the C library does


def _backend(values: _Values) -> str:
    native = values.switch("native-nftables")
    forced = values.read("force-iptables-binary", _binary, "")
    if native and forced:
        values.clash(
            "force-iptables-binary", "--native-nftables asks for no iptables at all; give one"
        )
    return "nft" if native else forced or "auto"


def _binary(text: str) -> str:
    if text not in ("nft", "legacy"):
        raise ValueError(f'"{text}" is neither nft nor legacy')
    return f"iptables-{text}"


def _clashes(values: _Values, invocation: Invocation) -> None:
    if invocation.cleanup_only and invocation.skip_rule_apply:
        values.clash("skip-rule-apply", "--cleanup-only changes the rules; give one of them")
    if invocation.cleanup_only and invocation.run_validation:
        values.clash("run-validation", "--cleanup-only leaves nothing to validate; give one")
    if invocation.dry_run and invocation.run_validation:
        values.clash("run-validation", "--dry-run makes nothing to validate; give one of them")
    if invocation.cni_mode and not invocation.network_namespace:
        why = "the rules are for a pod, and it does not say which; add --network-namespace"
        values.clash("cni-mode", why)


def _boolean(text: str) -> bool:
    """What strconv.ParseBool takes."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError(f'"{text}" is neither true nor false')


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60, "h": 3600}
_PIECE = rf"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)({'|'.join(_UNITS)})"


def _duration(text: str) -> float:
    """What time.ParseDuration takes, in seconds."""
    seconds = 0.0
    if re.fullmatch(f"\\+?(?:{_PIECE})+", text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PIECE, text))
    if not 0 < seconds < 31_536_000:
        raise ValueError(f'"{text}" is not a time above zero, for example 5s or 1m30s')
    return seconds


def _level(text: str) -> str:
    """The level of what we are, in "default:info,ads:debug": that of `all` or of `default`.

    Scopes are parts of Istio; of those we have none, there is nothing to silence or to show.
    """
    levels = {}
    for each in opt.words(text):
        scope, colon, level = each.rpartition(":")
        if level not in LEVELS:
            raise ValueError(f'"{each}" is not a level: {", ".join(LEVELS)}')
        levels[scope if colon else "default"] = level
    return levels.get("all", levels.get("default", "info"))
