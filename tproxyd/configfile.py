"""A configuration: TOML text, and variables over it -> frozen Config, or every problem at once.

Reading is two-staged. reader.Table pulls typed values out of the parsed TOML and writes down each
thing that is wrong with its path; it never stops at the first. What only makes sense across values
(an option of another kind of listener) is checked once the values stand, and what does across
listeners in configchecks.py.
Pure: the caller reads the file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from types import MappingProxyType

from tproxyd.addr import Endpoint, PrefixSet, is_unix, parse_endpoint, parse_ip
from tproxyd.config import (
    JOURNAL,
    Config,
    HeaderPolicy,
    HealthCheck,
    Intercept,
    Listener,
    Log,
    PerClient,
    ProxyProtocol,
    Rules,
    Scope,
    SendProxy,
    SendTlvs,
    SourceKind,
    Via,
)
from tproxyd.configchecks import across, never_reached, open_ports
from tproxyd.environment import Overrides
from tproxyd.errors import ConfigError, Problem
from tproxyd.reader import Table

NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
# The longest v2 header that the format can express: 16 fixed bytes and a 16-bit length.
LARGEST_HEADER = 16 + 0xFFFF
# The longest v1 header, without TLVs, is 107 bytes; a v2 one over TCP6 is 16 + 36. A cap below
# this would refuse headers that have no option in them.
SMALLEST_HEADER_CAP = 107


# RFC 1035, 2.3.4. And what a receiver is sure to take: HAProxy reads a whole header into one
# buffer, 16 KiB by default, together with what follows.
LONGEST_AUTHORITY = 255
LONGEST_OWN_VALUE = 1024
LONGEST_OWN = 8192


def parse(text: str, origin: str, variables: Mapping[str, str] = NO_VARIABLES) -> Config:
    """The Config that TOML `text` describes, with what environment variables say in its stead.

    Raises ConfigError with every problem found; `origin` is the file's name in the message.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(origin, (Problem("", f"not TOML: {error}"),)) from None
    problems: list[Problem] = []
    overrides = Overrides(variables)
    overrides.lay_over(data, problems)
    config = _config(Table("", data, problems))
    problems += across(config)
    if not problems:  # else a wrong value stands here as the default
        problems += never_reached(config)
    if problems:
        raise ConfigError(origin, tuple(map(overrides.rename, problems)))
    return config


def only_admin(text: str, origin: str, variables: Mapping[str, str] = NO_VARIABLES) -> Config:
    """A Config of the admin endpoint alone, whatever else is wrong; ConfigError if that is, too.

    It says which daemon a file is of.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(origin, (Problem("", f"not TOML: {error}"),)) from None
    problems: list[Problem] = []
    Overrides(variables).lay_over(data, [])
    admin = _admin(Table("", {k: v for k, v in data.items() if k == "admin"}, problems), None)
    if problems:
        raise ConfigError(origin, tuple(problems))
    return Config(admin=admin)


def _config(t: Table) -> Config:
    d = Config()
    rules = t.table("rules")
    log = t.table("log")
    # `[[listener]]` absent means the default sidecar; `listener = []` is a daemon without a job.
    listeners = tuple(_listener(entry) for entry in t.tables("listener"))
    if t.data.get("listener") == []:
        t.problem("listener", "there must be at least one [[listener]]")
    config = Config(
        mark=t.integer("mark", d.mark, 1, 0xFFFF_FFFE),
        table=t.integer("table", d.table, 1, 0xFFFF_FFFF),
        workers=t.integer("workers", d.workers, 0, 1024),
        admin=_admin(t, d.admin),
        drain_timeout_s=t.seconds("drain_timeout_s", d.drain_timeout_s, zero="stop at once"),
        rules=Rules(
            backend=rules.word("backend", d.rules.backend),
            scheme=rules.word("scheme", d.rules.scheme),
            return_path=rules.word("return_path", d.rules.return_path),
            guard=rules.word("guard", d.rules.guard),
            on_crash=rules.word("on_crash", d.rules.on_crash),
        ),
        log=_log(log),
        listeners=listeners or d.listeners,
    )
    for table in (rules, log, t):
        table.finish()
    return config


def _log(t: Table) -> Log:
    d = Log()
    log = Log(
        access=t.text("access", d.access),
        format=t.word("format", d.format),
        daemon_format=t.word("daemon_format", d.daemon_format),
    )
    if log.access not in ("", "-", JOURNAL) and not log.access.startswith("/"):
        why = "and the working directory of a daemon is no place"
        t.problem("access", f'"{log.access}" is neither "-", "{JOURNAL}" nor a path from /, {why}')
    if log.access == JOURNAL and log.format != d.format:  # the default may stand in an example
        why = "means nothing in the journal, whose entries have fields"
        t.problem("format", f"{why}; leave it away, or name a file by its path from /")
    return log


def _admin(t: Table, default: Endpoint | None) -> Endpoint | None:
    text = t.text("admin", str(Config().admin))
    if not text:
        return None
    try:
        return parse_endpoint(text)
    except ValueError as error:
        t.problem("admin", str(error))
        return default


def _listener(t: Table) -> Listener:
    d = Listener()
    name = t.text("name", d.name)
    # It becomes an nft chain, a metric label and a field of log lines.
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
        t.problem("name", f'"{name}" must be a-z, 0-9, _ and -, a letter first, 31 at most')
    bind = _bind(t)
    listener = Listener(
        name=name,
        bind=bind,
        port=t.integer("port", d.port, 1, 65535),
        intercept=_intercept(t.table("intercept")),
        upstream=t.upstreams("upstream", d.upstream),
        balance=t.word("balance", d.balance),
        max_connect_attempts=t.integer("max_connect_attempts", d.max_connect_attempts, 1, 100),
        eject_after=t.integer("eject_after", d.eject_after, 0, 1_000_000),
        eject_s=t.seconds("eject_s", d.eject_s),
        resolve_every_s=t.seconds("resolve_every_s", d.resolve_every_s),
        health_check=_health_check(t.table("health_check")),
        # Toward another host the client's address needs routes back through this one: for an
        # ordinary listener that is to be asked for.
        source=t.word("source", SourceKind.PROXY if bind else d.source),
        send_proxy=t.word("send_proxy", d.send_proxy),
        send_tlvs=_send_tlvs(t.table("send_tlvs")),
        max_connections=t.integer("max_connections", d.max_connections, 0, 10_000_000),
        per_client=_per_client(t.table("per_client")),
        max_header_bytes=t.integer(
            "max_header_bytes", d.max_header_bytes, SMALLEST_HEADER_CAP, LARGEST_HEADER
        ),
        header_timeout_s=t.seconds("header_timeout_s", d.header_timeout_s),
        connect_timeout_s=t.seconds("connect_timeout_s", d.connect_timeout_s),
        idle_timeout_s=t.seconds("idle_timeout_s", d.idle_timeout_s, zero="never"),
        half_close_timeout_s=t.seconds("half_close_timeout_s", d.half_close_timeout_s),
        proxy_protocol=tuple(_proxy_protocol(entry) for entry in t.tables("proxy_protocol")),
    )
    _kinds(t, listener)
    t.finish()
    return listener


def _bind(t: Table) -> str:
    text = t.text("bind", Listener().bind)
    if text in ("", "*"):
        return text
    try:
        return str(parse_ip(text))
    except ValueError:
        t.problem("bind", f'"{text}" is neither an IP address nor "*", for all of this host')
        return "*"


def _intercept(t: Table) -> Intercept:
    d = Intercept()
    scope = t.word("scope", d.scope)
    outbound = scope is Scope.OUTBOUND
    intercept = Intercept(
        scope=scope,
        # The kernel has no TPROXY for packets that are made here.
        via=t.word("via", Via.REDIRECT if outbound else d.via),
        ports=t.ports("ports", d.ports),
        # Istio's probes go to this host.
        exclude_ports=t.ports("exclude_ports", d.exclude_ports if scope is Scope.LOCAL else ()),
        sources=t.prefixes("sources", d.sources),
        destinations=t.prefixes("destinations", d.destinations),
        exclude_destinations=t.prefixes("exclude_destinations", d.exclude_destinations),
        interfaces=t.interfaces("interfaces", d.interfaces),
        exclude_uids=t.numbers("exclude_uids", d.exclude_uids),
        exclude_gids=t.numbers("exclude_gids", d.exclude_gids),
    )
    if intercept.ports and not open_ports(intercept):
        but = ", ".join(
            f"{low}-{high}" if low < high else f"{low}" for low, high in intercept.exclude_ports
        )
        t.problem("ports", f"all of them are in exclude_ports ({but}), so nothing would be taken")
    if scope is Scope.FORWARD and intercept.via is not Via.TPROXY:
        t.problem("via", 'forwarded connections are taken by "tproxy" only')
    if outbound and intercept.via is not Via.REDIRECT:
        t.problem("via", 'outbound connections are taken by "redirect" only')
    if outbound and intercept.interfaces:
        t.problem("interfaces", "outbound connections arrive at none; use destinations")
    for key, owners in (("uids", intercept.exclude_uids), ("gids", intercept.exclude_gids)):
        if owners and not outbound:
            t.problem(f"exclude_{key}", "only outbound connections have an owner here: scope")
    t.finish()
    return intercept


def _health_check(t: Table) -> HealthCheck:
    d = HealthCheck()
    check = HealthCheck(
        interval_s=t.seconds("interval_s", d.interval_s, zero="no checks"),
        timeout_s=t.seconds("timeout_s", d.timeout_s),
        rise=t.integer("rise", d.rise, 1, 1000),
        fall=t.integer("fall", d.fall, 1, 1000),
    )
    t.finish()
    return check


def _per_client(t: Table) -> PerClient:
    d = PerClient()
    limits = PerClient(
        max_connections=t.integer("max_connections", d.max_connections, 0, 10_000_000),
        max_new_per_s=t.integer("max_new_per_s", d.max_new_per_s, 0, 10_000_000),
    )
    t.finish()
    return limits


# What only a list of upstreams gives a meaning to.
_OF_LISTS = (
    *("balance", "max_connect_attempts", "eject_after", "eject_s", "resolve_every_s"),
    "health_check",
)


def _kinds(t: Table, listener: Listener) -> None:
    """Options that do not go together."""
    d = Listener()
    named = t.data.get("upstream", "original") != "original"  # be it wrongly
    if listener.bind:
        if listener.intercept != d.intercept:
            t.problem(
                "intercept", "a listener with `bind` is an ordinary one and intercepts nothing"
            )
        if not named:
            t.problem("upstream", 'a listener with `bind` needs one: upstream = ["10.0.0.5:80"]')
    if not named:
        for key in _OF_LISTS:
            if getattr(listener, key) != getattr(d, key):
                t.problem(key, 'means nothing without a list: upstream = ["10.0.0.5:80"]')
    made_or_ended_here = listener.intercepts and listener.intercept.scope is not Scope.FORWARD
    own_port = listener.source is SourceKind.CLIENT_PORT and not listener.upstream
    if own_port and made_or_ended_here:
        text = 'on one host the client\'s own port is taken, by its connection to us; use "client"'
        t.problem("source", text)
    if listener.spoofs and any(map(is_unix, listener.upstream)):
        text = (
            'a unix socket shows no address: source = "proxy", and send_proxy tells of the client'
        )
        t.problem("source", text)
    if listener.send_tlvs != SendTlvs() and listener.send_proxy is not SendProxy.V2:
        t.problem("send_tlvs", 'only a v2 header has TLVs: send_proxy = "v2"')


def _send_tlvs(t: Table) -> SendTlvs:
    d = SendTlvs()
    authority = t.text("authority", d.authority)
    if len(authority.encode()) > LONGEST_AUTHORITY:
        t.problem("authority", f"is longer than {LONGEST_AUTHORITY} bytes, which is no host name")
    tlvs = SendTlvs(
        forward=t.types("forward", d.forward),
        own=tuple(_own_tlv(entry) for entry in t.tables("own")),
        authority=authority,
        unique_id=t.flag("unique_id", d.unique_id),
        crc32c=t.flag("crc32c", d.crc32c),
    )
    if tlvs.forward is not None and tlvs.forward & {0x03, 0x04}:
        text = "0x03, a checksum, is never forwarded (crc32c = true makes one), nor 0x04, padding"
        t.problem("forward", text)
    if sum(3 + len(value) for _, value in tlvs.own) > LONGEST_OWN:
        t.problem("own", f"takes more than {LONGEST_OWN} bytes together")
    t.finish()
    return tlvs


def _own_tlv(t: Table) -> tuple[int, bytes]:
    for key in ("type", "value"):
        if key not in t.data:
            t.problem(key, 'is missing; an own TLV is { type = 0xE4, value = "text" }')
    # 2.2.8: 0xE0-0xEF are for applications, 0xF0-0xF7 for experiments. Others mean something.
    kind = t.integer("type", 0xE0, 0xE0, 0xF7)
    value = t.text("value", "").encode()
    if len(value) > LONGEST_OWN_VALUE:
        t.problem("value", f"is longer than {LONGEST_OWN_VALUE} bytes")
    t.finish()
    return kind, value


def _proxy_protocol(t: Table) -> ProxyProtocol:
    for key in ("from", "policy"):  # no default for either: trust is never implied
        if key not in t.data:
            t.problem(key, "is missing; say both from = [prefixes] and policy = …")
    entry = ProxyProtocol(
        peers=t.prefixes("from", PrefixSet()),
        policy=t.word("policy", HeaderPolicy.REQUIRE),
    )
    t.finish()
    return entry
