"""The configuration: TOML text -> frozen Config, or every problem at once.

The defaults stand here and nowhere else; systemd/tproxyd.toml shows them and a test holds the two
together. Without a file, Config() is one working sidecar listener that trusts nobody.

Reading is two-staged. reader.Table pulls typed values out of the parsed TOML and writes down each
thing that is wrong with its path; it never stops at the first. What only makes sense across values
(two listeners on one port) is checked once the values stand. Pure: the caller reads the file.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum

from tproxyd.addr import Endpoint, PrefixSet, parse_endpoint
from tproxyd.errors import ConfigError, Problem
from tproxyd.reader import EVERY_PORT, PortRanges, Table

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


class Backend(StrEnum):
    AUTO = "auto"
    NFT = "nft"


class Scheme(StrEnum):
    LEAN = "lean"


class ReturnPath(StrEnum):
    """How the application's answers to a spoofed source find back to us (kernel/desired.py)."""

    AUTO = "auto"
    ACCEPT_MARK = "accept-mark"
    CONNTRACK = "conntrack"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


class UpstreamKind(StrEnum):
    ORIGINAL = "original"  # the original destination


class SourceKind(StrEnum):
    """Whose address the upstream sees."""

    CLIENT = "client"
    PROXY = "proxy"


class HeaderPolicy(StrEnum):
    """What a peer in a prefix is expected to send first."""

    REQUIRE = "require"  # a PROXY header, or the connection ends
    OPTIONAL = "optional"  # a PROXY header or payload, told apart by the first bytes
    REJECT = "reject"  # payload; a PROXY header ends the connection


@dataclass(frozen=True, slots=True)
class Rules:
    backend: Backend = Backend.AUTO
    scheme: Scheme = Scheme.LEAN
    return_path: ReturnPath = ReturnPath.AUTO


@dataclass(frozen=True, slots=True)
class Log:
    access: str = "-"  # a path, "-" for stdout, "" for none
    format: LogFormat = LogFormat.JSON


@dataclass(frozen=True, slots=True)
class Intercept:
    """Which connections a listener takes. Everything given must match; an empty set is no limit."""

    ports: PortRanges = EVERY_PORT
    # Istio's own three (agent metrics, health, Envoy metrics): probes must reach them unproxied.
    exclude_ports: PortRanges = ((15020, 15021), (15090, 15090))
    sources: PrefixSet = PrefixSet()
    destinations: PrefixSet = PrefixSet()
    interfaces: tuple[str, ...] = ()  # nft patterns: "eth0", "veth*"


@dataclass(frozen=True, slots=True)
class ProxyProtocol:
    """One entry of a listener's trust list; `peers` is `from` in TOML (a keyword in Python)."""

    peers: PrefixSet
    policy: HeaderPolicy


class SendProxy(StrEnum):
    """The PROXY header that we send to the upstream, before any payload."""

    OFF = "off"
    V1 = "v1"
    V2 = "v2"


@dataclass(frozen=True, slots=True)
class SendTlvs:
    """What a v2 header that we send carries behind its addresses."""

    forward: frozenset[int] | None = frozenset()  # types of the client's header; None: all of them
    own: tuple[tuple[int, bytes], ...] = ()  # (type, value)
    authority: str = ""  # the host name that the client asked for; "" = none
    unique_id: bool = False  # one of our own, where none is forwarded
    crc32c: bool = False


@dataclass(frozen=True, slots=True)
class Listener:
    name: str = "inbound"
    port: int = 15006  # Istio's inbound port: tools and people look for it there
    intercept: Intercept = Intercept()
    upstream: UpstreamKind = UpstreamKind.ORIGINAL
    source: SourceKind = SourceKind.CLIENT
    send_proxy: SendProxy = SendProxy.OFF
    send_tlvs: SendTlvs = SendTlvs()
    max_connections: int = 0  # 0 = what the open-file limit allows
    max_header_bytes: int = 4096
    header_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 3600.0  # 0 = never
    half_close_timeout_s: float = 60.0
    proxy_protocol: tuple[ProxyProtocol, ...] = ()  # first match wins, no match: never look


@dataclass(frozen=True, slots=True)
class Config:
    mark: int = 0x539  # Istio's TPROXY mark, 1337
    table: int = 133  # Istio's TPROXY routing table
    workers: int = 0  # 0 = one per CPU
    admin: Endpoint | None = Endpoint("127.0.0.1", 9133)
    drain_timeout_s: float = 30.0
    rules: Rules = Rules()
    log: Log = Log()
    listeners: tuple[Listener, ...] = field(default=(Listener(),))

    @property
    def listener_mark(self) -> int:
        """The mark of our listening sockets, and so of our answers to clients.

        With tcp_fwmark_accept=1 an accepted socket inherits the mark of the SYN unless its
        listener has one of its own; without this, a client whose packets happen to carry our
        mark would have its answers routed to lo. Istio too uses the number behind the first.
        """
        return self.mark + 1


def parse(text: str, origin: str) -> Config:
    """The Config that TOML `text` describes.

    Raises ConfigError with every problem found; `origin` is the file's name in the message.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(origin, (Problem("", f"not TOML: {error}"),)) from None
    problems: list[Problem] = []
    config = _config(Table("", data, problems))
    _cross_checks(config, problems)
    if problems:
        raise ConfigError(origin, tuple(problems))
    return config


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
        ),
        log=Log(
            access=log.text("access", d.log.access),
            format=log.word("format", d.log.format),
        ),
        listeners=listeners or d.listeners,
    )
    for table in (rules, log, t):
        table.finish()
    return config


def _admin(t: Table, default: Endpoint | None) -> Endpoint | None:
    text = t.text("admin", str(default))
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
    take = t.table("intercept")
    intercept = Intercept(
        ports=take.ports("ports", d.intercept.ports),
        exclude_ports=take.ports("exclude_ports", d.intercept.exclude_ports),
        sources=take.prefixes("sources", d.intercept.sources),
        destinations=take.prefixes("destinations", d.intercept.destinations),
        interfaces=take.interfaces("interfaces", d.intercept.interfaces),
    )
    listener = Listener(
        name=name,
        port=t.integer("port", d.port, 1, 65535),
        intercept=intercept,
        upstream=t.word("upstream", d.upstream),
        source=t.word("source", d.source),
        send_proxy=t.word("send_proxy", d.send_proxy),
        send_tlvs=_send_tlvs(t.table("send_tlvs")),
        max_connections=t.integer("max_connections", d.max_connections, 0, 10_000_000),
        max_header_bytes=t.integer(
            "max_header_bytes", d.max_header_bytes, SMALLEST_HEADER_CAP, LARGEST_HEADER
        ),
        header_timeout_s=t.seconds("header_timeout_s", d.header_timeout_s),
        connect_timeout_s=t.seconds("connect_timeout_s", d.connect_timeout_s),
        idle_timeout_s=t.seconds("idle_timeout_s", d.idle_timeout_s, zero="never"),
        half_close_timeout_s=t.seconds("half_close_timeout_s", d.half_close_timeout_s),
        proxy_protocol=tuple(_proxy_protocol(entry) for entry in t.tables("proxy_protocol")),
    )
    if listener.send_tlvs != SendTlvs() and listener.send_proxy is not SendProxy.V2:
        t.problem("send_tlvs", 'only a v2 header has TLVs: send_proxy = "v2"')
    take.finish()
    t.finish()
    return listener


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


def _cross_checks(config: Config, problems: list[Problem]) -> None:
    seen: dict[str, dict[object, int]] = {"name": {}, "port": {}}
    for i, listener in enumerate(config.listeners):
        for what, value in (("name", listener.name), ("port", listener.port)):
            first = seen[what].setdefault(value, i)
            if first != i:
                shown = f'"{value}"' if isinstance(value, str) else str(value)
                text = f"{shown} is also the {what} of listener[{first}]"
                problems.append(Problem(f"listener[{i}].{what}", text))
        if config.admin is not None and config.admin.port == listener.port:
            text = f"{listener.port} is the admin port too; change one of them"
            problems.append(Problem(f"listener[{i}].port", text))
    if config.table in (253, 254, 255):
        text = f"{config.table} is one of the kernel's own tables (default, main, local)"
        problems.append(Problem("table", text))
