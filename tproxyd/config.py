"""The configuration as values: what can be set, what it is called, and its defaults.

The defaults stand here and nowhere else; systemd/tproxyd.toml shows them and a test holds the two
together. Config() is one working sidecar listener that trusts nobody. How a file becomes a Config
is configfile.py's affair. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tproxyd.addr import Endpoint, PrefixSet
from tproxyd.reader import EVERY_PORT, PortRanges


class Backend(StrEnum):
    """Which tool of the kernel's holds the packet rules."""

    AUTO = "auto"
    NFT = "nft"
    IPTABLES_NFT = "iptables-nft"
    IPTABLES_LEGACY = "iptables-legacy"


class Scheme(StrEnum):
    """What the packet rules say."""

    LEAN = "lean"  # no more than is needed
    ISTIO = "istio"  # what istio-iptables programs, rule for rule


class ReturnPath(StrEnum):
    """How the application's answers to a spoofed source find back to us (kernel/desired.py)."""

    AUTO = "auto"
    ACCEPT_MARK = "accept-mark"
    CONNTRACK = "conntrack"


class Guard(StrEnum):
    """What keeps others from changing the packet rules, besides that they are healed."""

    NONE = "none"
    OWNER = "owner"  # nft: the table is the property of the process that keeps it


class OnCrash(StrEnum):
    """What becomes of interception when the daemon is gone without a farewell."""

    CLOSED = "closed"  # the rules stay: clients are refused, nothing goes around the proxy
    OPEN = "open"  # they go: clients reach the application directly


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


JOURNAL = "journal"  # as access log: systemd's, by its own protocol


class Scope(StrEnum):
    """Which connections an intercepting listener can see at all."""

    LOCAL = "local"  # from elsewhere to an address of this host
    FORWARD = "forward"  # from elsewhere to elsewhere: this host is a router
    OUTBOUND = "outbound"  # made on this host, to elsewhere


class Via(StrEnum):
    """How the kernel hands a connection over."""

    TPROXY = "tproxy"  # as it came
    REDIRECT = "redirect"  # by nat, which rewrites its destination and remembers it


class SourceKind(StrEnum):
    """Whose address the upstream sees."""

    CLIENT = "client"
    CLIENT_PORT = "client-port"  # and the client's own port, where it is free
    PROXY = "proxy"


class Balance(StrEnum):
    """Which of several upstreams a connection goes to."""

    ROUND_ROBIN = "round-robin"
    LEAST_CONNECTIONS = "least-connections"
    SOURCE_HASH = "source-hash"  # by the client's address, steady while upstreams come and go


class HeaderPolicy(StrEnum):
    """What a peer in a prefix is expected to send first."""

    REQUIRE = "require"  # a PROXY header, or the connection ends
    OPTIONAL = "optional"  # a PROXY header or payload, told apart by the first bytes
    REJECT = "reject"  # payload; a PROXY header ends the connection


class SendProxy(StrEnum):
    """The PROXY header that we send to the upstream, before any payload."""

    OFF = "off"
    V1 = "v1"
    V2 = "v2"


@dataclass(frozen=True, slots=True)
class Rules:
    backend: Backend = Backend.AUTO
    scheme: Scheme = Scheme.LEAN
    return_path: ReturnPath = ReturnPath.AUTO
    guard: Guard = Guard.NONE
    on_crash: OnCrash = OnCrash.CLOSED


@dataclass(frozen=True, slots=True)
class Log:
    access: str = "-"  # a path, "-" for stdout, JOURNAL, "" for none
    format: LogFormat = LogFormat.JSON  # of the access log, where it is made of lines
    daemon_format: LogFormat = LogFormat.TEXT  # of what we say of ourselves, on stderr


@dataclass(frozen=True, slots=True)
class Intercept:
    """Which connections a listener takes. Everything given must match; an empty set is no limit."""

    scope: Scope = Scope.LOCAL
    via: Via = Via.TPROXY
    ports: PortRanges = EVERY_PORT
    # Istio's own three (agent metrics, health, Envoy metrics): probes must reach them unproxied.
    exclude_ports: PortRanges = ((15020, 15021), (15090, 15090))
    sources: PrefixSet = PrefixSet()
    destinations: PrefixSet = PrefixSet()
    exclude_destinations: PrefixSet = PrefixSet()
    interfaces: tuple[str, ...] = ()  # nft patterns: "eth0", "veth*"
    exclude_uids: tuple[int, ...] = ()  # outbound: whose connections are left alone
    exclude_gids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ProxyProtocol:
    """One entry of a listener's trust list; `peers` is `from` in TOML (a keyword in Python)."""

    peers: PrefixSet
    policy: HeaderPolicy


@dataclass(frozen=True, slots=True)
class SendTlvs:
    """What a v2 header that we send carries behind its addresses."""

    forward: frozenset[int] | None = frozenset()  # types of the client's header; None: all of them
    own: tuple[tuple[int, bytes], ...] = ()  # (type, value)
    authority: str = ""  # the host name that the client asked for; "" = none
    unique_id: bool = False  # one of our own, where none is forwarded
    crc32c: bool = False


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """Active checks of upstreams: a TCP connect, and a PROXY header where we send one."""

    interval_s: float = 0.0  # 0 = none
    timeout_s: float = 1.0
    rise: int = 2  # checks in a row that bring an upstream back
    fall: int = 3  # and that take it away


@dataclass(frozen=True, slots=True)
class PerClient:
    """Limits of one client address, the one that counts after a PROXY header. 0 = none."""

    max_connections: int = 0
    max_new_per_s: int = 0


@dataclass(frozen=True, slots=True)
class Listener:
    name: str = "inbound"
    bind: str = ""  # an ordinary listener's address, "*" for all; "" = it intercepts
    port: int = 15006  # Istio's inbound port: tools and people look for it there
    intercept: Intercept = Intercept()
    upstream: tuple[Endpoint, ...] = ()  # addresses, names, unix sockets; () = where it meant to go
    balance: Balance = Balance.ROUND_ROBIN
    max_connect_attempts: int = 3  # upstreams tried for one connection
    eject_after: int = 3  # failed connects in a row; 0 = never
    eject_s: float = 1.0  # for how long at first; doubled each time, up to a minute
    resolve_every_s: float = 30.0
    health_check: HealthCheck = HealthCheck()
    source: SourceKind = SourceKind.CLIENT  # of an ordinary listener: PROXY
    send_proxy: SendProxy = SendProxy.OFF
    send_tlvs: SendTlvs = SendTlvs()
    max_connections: int = 0  # 0 = what the open-file limit allows
    per_client: PerClient = PerClient()
    # The cap of a whole v2 header. The specification's own goal is to fit into 536 bytes; a client
    # certificate (TLV 0x28) needs one or two thousand.
    max_header_bytes: int = 4096
    header_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0  # of one upstream
    idle_timeout_s: float = 3600.0  # 0 = never
    half_close_timeout_s: float = 60.0
    proxy_protocol: tuple[ProxyProtocol, ...] = ()  # first match wins, no match: never look

    @property
    def intercepts(self) -> bool:
        return not self.bind

    @property
    def spoofs(self) -> bool:
        """Whether its upstreams see the client."""
        return self.source is not SourceKind.PROXY


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
        Our own connections to elsewhere carry it too where outbound ones are intercepted: so they
        are known, and left alone.
        """
        return self.mark + 1

    @property
    def outbound(self) -> bool:
        """Whether connections that are made on this host are intercepted."""
        return any(
            each.intercepts and each.intercept.scope is Scope.OUTBOUND for each in self.listeners
        )

    @property
    def transparent(self) -> bool:
        """Whether anything here needs CAP_NET_RAW: TPROXY, a foreign source address, a mark."""
        return any(
            each.spoofs or (each.intercepts and each.intercept.via is Via.TPROXY)
            for each in self.listeners
        ) or (self.outbound)
