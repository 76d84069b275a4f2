"""The configuration: TOML text -> frozen Config, or every problem at once.

The defaults stand here and nowhere else; systemd/tproxyd.toml shows them and a test holds the two
together. Without a file, Config() is one working sidecar listener that trusts nobody.

Reading is two-staged. `_Table` pulls typed values out of the parsed TOML and writes down each thing
that is wrong with its path; it never stops at the first. What only makes sense across values
(two listeners on one port) is checked once the values stand. Pure: the caller reads the file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from tproxyd.addr import Endpoint, PrefixSet, parse_endpoint, parse_prefix
from tproxyd.errors import ConfigError, Problem

PortRanges = tuple[tuple[int, int], ...]  # closed ranges, sorted, merged: ((80, 80), (8000, 8100))

EVERY_PORT: PortRanges = ((1, 65535),)

# The longest v2 header that the format can express: 16 fixed bytes and a 16-bit length.
LARGEST_HEADER = 16 + 0xFFFF
# The longest v1 header, without TLVs, is 107 bytes; a v2 one over TCP6 is 16 + 36. A cap below
# this would refuse headers that have no option in them.
SMALLEST_HEADER_CAP = 107


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


@dataclass(frozen=True, slots=True)
class Listener:
    name: str = "inbound"
    port: int = 15006  # Istio's inbound port: tools and people look for it there
    intercept: Intercept = Intercept()
    upstream: UpstreamKind = UpstreamKind.ORIGINAL
    source: SourceKind = SourceKind.CLIENT
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
    config = _config(_Table("", data, problems))
    _cross_checks(config, problems)
    if problems:
        raise ConfigError(origin, tuple(problems))
    return config


def _config(t: _Table) -> Config:
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


def _admin(t: _Table, default: Endpoint | None) -> Endpoint | None:
    text = t.text("admin", str(default))
    if not text:
        return None
    try:
        return parse_endpoint(text)
    except ValueError as error:
        t.problem("admin", str(error))
        return default


def _listener(t: _Table) -> Listener:
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
    take.finish()
    t.finish()
    return listener


def _proxy_protocol(t: _Table) -> ProxyProtocol:
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


_Word = TypeVar("_Word", bound=StrEnum)


class _Table:
    """One TOML table being read: typed getters that note problems and answer with a default.

    Each getter marks its key as known; `finish` reports the keys that nobody asked for.
    """

    def __init__(self, path: str, data: dict[str, object], problems: list[Problem]) -> None:
        self.path, self.data, self.problems = path, data, problems
        self.known: list[str] = []

    def problem(self, key: str, text: str) -> None:
        self.problems.append(Problem(f"{self.path}.{key}" if self.path else key, text))

    def finish(self) -> None:
        for key in self.data:
            if key not in self.known:
                near = difflib.get_close_matches(key, self.known, n=1)
                hint = (
                    f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(self.known)}"
                )
                self.problem(key, f"unknown key{hint}")

    def _get(self, key: str) -> object | None:
        self.known.append(key)
        return self.data.get(key)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.problem(key, f"{_show(value)} is not a whole number from {low} to {high}")
            return default
        return value

    def seconds(self, key: str, default: float, zero: str = "") -> float:
        """A duration in seconds; 0 is allowed only where it has a meaning, given as `zero`."""
        value = self._get(key)
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A year and above is a typing error; it also keeps inf and nan out.
        if not number or not (0 < value < 31_536_000 or (zero and value == 0)):  # type: ignore[operator]
            allowed = f"more than 0, or 0 ({zero})" if zero else "more than 0"
            self.problem(key, f"{_show(value)} is not a number of seconds, {allowed}")
            return default
        return float(value)  # type: ignore[arg-type]

    def text(self, key: str, default: str) -> str:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(key, f"{_show(value)} is not a text in quotes")
            return default
        return value

    def word(self, key: str, default: _Word) -> _Word:
        """One word of the enum that `default` belongs to."""
        value = self._get(key)
        if value is None:
            return default
        words = [str(member) for member in type(default)]
        if not isinstance(value, str) or value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            self.problem(key, f"{_show(value)} is not one of: {', '.join(words)}{hint}")
            return default
        return type(default)(value)

    def table(self, key: str) -> _Table:
        value = self._get(key)
        path = f"{self.path}.{key}" if self.path else key
        if isinstance(value, dict):
            return _Table(path, value, self.problems)
        if value is not None:
            self.problem(key, f"{_show(value)} is not a table")
        return _Table(path, {}, self.problems)

    def tables(self, key: str) -> list[_Table]:
        value = self._get(key)
        if value is None:
            return []
        prefix = f"{self.path}.{key}" if self.path else key
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            name = re.sub(r"\[[0-9]+\]", "", prefix)
            self.problem(key, f"is not a list of tables; write [[{name}]] above each")
            return []
        return [_Table(f"{prefix}[{i}]", entry, self.problems) for i, entry in enumerate(value)]

    def _each(
        self, key: str, read: Callable[[object], object], example: str
    ) -> list[object] | None:
        """Every entry of a list through `read` (ValueError = a problem); None where absent."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self.problem(key, f"{_show(value)} is not a list, for example {example}")
            return None
        items: list[object] = []
        for i, entry in enumerate(value):
            try:
                items.append(read(entry))
            except ValueError as error:
                self.problem(f"{key}[{i}]", str(error))
        return items

    def prefixes(self, key: str, default: PrefixSet) -> PrefixSet:
        items = self._each(key, lambda entry: parse_prefix(_str(entry)), '["10.0.0.0/8"]')
        return default if items is None else PrefixSet(items)  # type: ignore[arg-type]

    def interfaces(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        items = self._each(key, _interface, '["eth0", "veth*"]')
        return default if items is None else tuple(sorted(set(map(str, items))))

    def ports(self, key: str, default: PortRanges) -> PortRanges:
        """ "*", or a list of numbers and "low-high" texts, as merged ranges."""
        if self.data.get(key) == "*":
            self._get(key)
            return EVERY_PORT
        items = self._each(key, _port_range, '"*" or [80, "8000-8100"]')
        if key == "ports" and self.data.get(key) == []:
            self.problem(key, 'is empty, so nothing would be taken; write "*" or a list of ports')
        return default if items is None else merge_ranges(items)  # type: ignore[arg-type]


def merge_ranges(ranges: list[tuple[int, int]]) -> PortRanges:
    """Closed ranges in any order, sorted and merged where they touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _port_range(entry: object) -> tuple[int, int]:
    if isinstance(entry, int) and not isinstance(entry, bool):
        low = high = entry
    elif isinstance(entry, str) and (m := re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", entry)):
        low, high = int(m[1]), int(m[2] or m[1])
    else:
        raise ValueError(f'{_show(entry)} is not a port or a range like "8000-8100"')
    if not 1 <= low <= high <= 65535:
        raise ValueError(f"{_show(entry)} is not within 1 to 65535, low before high")
    return low, high


def _interface(entry: object) -> str:
    # IFNAMSIZ is 16 with the closing NUL (linux/if.h); "*" is nft's wildcard, last only.
    if isinstance(entry, str) and re.fullmatch(r"[^\s/\"*]{1,15}|[^\s/\"*]{1,14}\*", entry):
        return entry
    raise ValueError(f'{_show(entry)} is not an interface name, for example "eth0" or "veth*"')


def _str(entry: object) -> str:
    if not isinstance(entry, str):
        raise ValueError(f"{_show(entry)} is not a text in quotes")
    return entry


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
