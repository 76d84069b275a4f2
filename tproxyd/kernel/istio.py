"""The istio scheme: what istio-iptables programs, chain for chain and rule for rule.

For people and tools that look for those chains, and as a reference beside the lean scheme, which
does the same with less. The source is tools/istio-iptables/pkg/capture/run.go of istio/istio, and
what its tests expect of it; from 1.13 to 1.31 the rules of TPROXY mode are the same. They stand
here in the order of that program, which is the order in the chains.

In TPROXY mode, where C is the client, P the pod, and 1337 the mark:

    C → P      ISTIO_INBOUND: of a connection that is known, ISTIO_DIVERT marks it for this host;
               a new one goes to the listener (ISTIO_TPROXY)
    we as C → P    carry the mark and are let through; their connection keeps it (CONNMARK)
    P → C      gets the mark of its connection and is routed to us
    the pod → its own service address    leaves as the proxy's call to P over lo, with mark 1338,
               and so is inbound once more

Known to fail by these very rules, whoever programs them: clients while SYN cookies are in use, all
of them where src_valid_mark is 1, and, under iptables, connections that are older than the rules.
The lean scheme has none of the three.

Under nft it is one table, ours, where a chain has its table's name in front (mangle_ISTIO_INBOUND).
One rule is added there: nft's tproxy lets pass what nobody listens for, where xt_TPROXY drops it,
so what follows it refuses. Pure.
"""

from __future__ import annotations

import difflib
import ipaddress
from dataclasses import replace

from tproxyd.addr import IPNetwork, PrefixSet
from tproxyd.istio.options import (
    ALL,
    DNS_PORT,
    OUTBOUND_MARK,
    PASSTHROUGH_V4,
    PASSTHROUGH_V6,
    IstioOptions,
    Mode,
)
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Action,
    Chain,
    ConnMark,
    DestinationIn,
    Family,
    Firewall,
    Goto,
    InInterface,
    IpVersion,
    Jump,
    MadeBy,
    Match,
    OutInterface,
    PacketMark,
    PortIn,
    Redirect,
    RestoreMark,
    Rule,
    SaveMark,
    SetPacketMark,
    SetZone,
    SourceIn,
    Syn,
    Table,
    Tcp,
    Tproxy,
    Tracked,
    UdpPort,
    Verdict,
)
from tproxyd.kernel.iptchains import HOOKS, PREFIX, lowered
from tproxyd.kernel.iptlang import ordered
from tproxyd.reader import merge_ranges

MARKER = f"{PREFIX}ISTIO"
_DNS = 53
_INBOUND, _DIVERT, _TPROXY, _DROP = "ISTIO_INBOUND", "ISTIO_DIVERT", "ISTIO_TPROXY", "ISTIO_DROP"
_REDIRECT, _IN_REDIRECT = "ISTIO_REDIRECT", "ISTIO_IN_REDIRECT"
_OUTPUT, _OUTPUT_DNS = "ISTIO_OUTPUT", "ISTIO_OUTPUT_DNS"
MANGLE, NAT, RAW = Table.MANGLE, Table.NAT, Table.RAW
_RETURN = Verdict.RETURN
_LO = OutInterface("lo")


def chains(options: IstioOptions, family: Family) -> Firewall:
    """For iptables, with the empty chain in each table that says that they are ours."""
    made = [
        Chain(name, HOOKS.get((table, name)), tuple(rules), table)
        for (table, name), rules in _Program(options, family).rules().items()
    ]
    markers = [Chain(MARKER, None, (), table) for table in {chain.table for chain in made}]
    return lowered([*made, *markers], family)


def nft_chains(options: IstioOptions) -> Firewall:
    """The same for both IP versions as one table of nft."""
    families: tuple[Family, ...] = (4, 6) if options.ipv6 else (4,)
    found = [_Program(options, family).rules() for family in families]
    merged = []
    for table, name in dict.fromkeys(where for each in found for where in each):
        four, *six = (each.get((table, name), []) for each in found)
        rules = [_in_nft(rule, table) for rule in _both(four, six[0] if six else [])]
        if name == _TPROXY:
            rules += [_refusal(rule) for rule in rules]
        merged.append(Chain(f"{table}_{name}", HOOKS.get((table, name)), tuple(rules)))
    return tuple(merged)


class _Program:
    """The rules of one IP version, as they come."""

    def __init__(self, options: IstioOptions, family: Family) -> None:
        self.options, self.family = options, family
        self._chains: dict[tuple[Table, str], list[Rule]] = {}
        self._tproxy = options.mode is Mode.TPROXY
        self._host = self._to(options.loopback if family == 4 else ipaddress.ip_network("::1/128"))
        self._not_host = replace(self._host, negate=True)
        self._passthrough = PASSTHROUGH_V4 if family == 4 else PASSTHROUGH_V6

    def rules(self) -> dict[tuple[Table, str], list[Rule]]:
        """By chain. To be asked once."""
        self._interfaces()
        self._invalid()
        self._redirects()
        self._inbound()
        self._outbound()
        if self._tproxy:
            self._marks()
        return self._chains

    def _append(self, table: Table, chain: str, action: Action, *matches: Match) -> None:
        self._chains.setdefault((table, chain), []).append(Rule(ordered(list(matches)), action))

    def _insert(self, table: Table, chain: str, at: int, action: Action, *matches: Match) -> None:
        """`at` counts from 1."""
        rules = self._chains.setdefault((table, chain), [])
        rules.insert(at - 1, Rule(ordered(list(matches)), action))

    def _to(self, network: IPNetwork) -> DestinationIn:
        return DestinationIn(self.family, PrefixSet([network]))

    def _at(self, address: str) -> IPNetwork:
        return ipaddress.ip_network(address)

    # What both modes have -------------------------------------------------------------------------

    def _interfaces(self) -> None:
        excluded = [_star(name) for name in self.options.exclude_interfaces]
        for table in (NAT, MANGLE) if self._tproxy else (NAT,):
            for name in excluded:
                self._append(table, "PREROUTING", _RETURN, InInterface((name,)))
                self._append(table, "OUTPUT", _RETURN, OutInterface(name))
        for name in self.options.virtual_interfaces:
            self._insert(NAT, "PREROUTING", 1, _RETURN, InInterface((_star(name),)))

    def _invalid(self) -> None:
        if self.options.drop_invalid:
            self._append(MANGLE, "PREROUTING", Jump(_DROP), Tracked(("invalid",)))
            self._append(MANGLE, _DROP, Verdict.DROP)

    def _redirects(self) -> None:
        options = self.options
        self._append(NAT, _INBOUND, _RETURN, _port(options.tunnel_port))
        self._append(NAT, _REDIRECT, Redirect(options.proxy_port))
        self._append(NAT, _IN_REDIRECT, Redirect(options.inbound_port))

    # What comes in --------------------------------------------------------------------------------

    def _inbound(self) -> None:
        options = self.options
        if not options.captures_inbound:
            return
        table = MANGLE if self._tproxy else NAT
        if self._tproxy:
            mark = SetPacketMark(options.mark, FULL_MASK)
            self._append(MANGLE, _DIVERT, mark)
            self._append(MANGLE, _DIVERT, Verdict.ACCEPT)
            take = Tproxy(self.family, options.inbound_port, mark)
            self._append(MANGLE, _TPROXY, take, self._not_host)
        self._append(table, "PREROUTING", Jump(_INBOUND), Tcp())
        if options.inbound_ports is ALL:
            for ports in options.inbound_exclude_ports:
                self._append(table, _INBOUND, _RETURN, PortIn((ports,)))
            self._take(Tcp())
        for ports in options.inbound_list:
            self._take(PortIn((ports,)))

    def _take(self, what: Match) -> None:
        if self._tproxy:
            known = Tracked(("established", "related"))
            self._append(MANGLE, _INBOUND, Jump(_DIVERT), what, known)
            self._append(MANGLE, _INBOUND, Jump(_TPROXY), what)
        else:
            self._append(NAT, _INBOUND, Jump(_IN_REDIRECT), what)

    # What the pod sends ---------------------------------------------------------------------------

    def _outbound(self) -> None:
        options = self.options
        self._append(NAT, "OUTPUT", Jump(_OUTPUT))
        for ports in options.outbound_exclude_ports:
            self._append(NAT, _OUTPUT, _RETURN, PortIn((ports,)))
            self._append(NAT, _OUTPUT, _RETURN, UdpPort("destination", ports))
        source = SourceIn(self.family, PrefixSet([self._at(self._passthrough)]))
        self._append(NAT, _OUTPUT, _RETURN, _LO, source)
        for uid in options.proxy_uids:
            self._of_proxy(MadeBy("uid", ((uid, uid),)), dns=options.redirects_dns)
        for gid in options.proxy_gids:
            self._of_proxy(MadeBy("gid", ((gid, gid),)), dns=False)
        self._groups()
        if options.redirects_dns:
            self._dns()
        self._append(NAT, _OUTPUT, _RETURN, self._host)
        for network in options.outbound_exclude_of(self.family):
            self._append(NAT, _OUTPUT, _RETURN, self._to(network))
        for ports in options.outbound_ports:
            self._append(NAT, _OUTPUT, Jump(_REDIRECT), PortIn((ports,)))
        self._ranges()

    def _of_proxy(self, owner: MadeBy, *, dns: bool) -> None:
        """Its calls to the pod itself are inbound; those of others through lo, and the rest of its
        own, are left alone. A server for DNS on this host may be one to be captured.
        """
        tunnel = (self.options.tunnel_port, self.options.tunnel_port)
        not_to = merge_ranges([tunnel, (_DNS, _DNS)] if dns else [tunnel])
        self_call = (_LO, self._not_host, PortIn(not_to, negate=True), owner)
        self._append(NAT, _OUTPUT, Jump(_IN_REDIRECT), *self_call)
        if not self.options.takes_loopback:
            others: list[Match] = [_LO, replace(owner, negate=True)]
            if self.options.redirects_dns:
                others.append(PortIn(((_DNS, _DNS),), negate=True))
            self._append(NAT, _OUTPUT, _RETURN, *others)
        self._append(NAT, _OUTPUT, _RETURN, owner)

    def _groups(self) -> None:
        options = self.options
        if options.owner_groups is ALL:
            for gid in options.owner_groups_exclude:
                self._append(NAT, _OUTPUT, _RETURN, MadeBy("gid", ((gid, gid),)))
            return
        groups = merge_ranges([(gid, gid) for gid in options.owner_groups])
        none_of = [MadeBy("gid", groups, negate=True)] if groups else []
        self._append(NAT, _OUTPUT, _RETURN, *none_of)

    def _ranges(self) -> None:
        options = self.options
        wanted = options.outbound_of(self.family)
        # An order as if all had been inserted in front of each other, in turn.
        for to in [None] if wanted is ALL else [self._to(network) for network in wanted]:
            where = () if to is None else (to,)
            if to is None:
                self._append(NAT, _OUTPUT, Jump(_REDIRECT))
            for name in options.virtual_interfaces:
                came = InInterface((_star(name),))
                self._insert(NAT, "PREROUTING", 1, Jump(_REDIRECT), came, *where)
            if to is not None:
                self._append(NAT, _OUTPUT, Jump(_REDIRECT), to)

    # DNS ------------------------------------------------------------------------------------------

    def _dns(self) -> None:
        options = self.options
        self._append(RAW, "OUTPUT", Jump(_OUTPUT_DNS))
        servers: list[IPNetwork | None] = [None]
        if not options.capture_all_dns:
            named = options.dns_servers_v4 if self.family == 4 else options.dns_servers_v6
            servers = [self._at(server) for server in named]
        to = [(self._to(server),) if server is not None else () for server in servers]
        if servers:
            self._append(NAT, _OUTPUT, Jump(_OUTPUT_DNS))
        for where in to:
            self._append(NAT, _OUTPUT_DNS, Redirect(DNS_PORT), _port(_DNS), *where)
        asks = UdpPort("destination", (_DNS, _DNS))
        for where in to:
            self._append(NAT, _OUTPUT_DNS, Redirect(DNS_PORT), asks, *where)
        self._zones(servers)

    def _zones(self, servers: list[IPNetwork | None]) -> None:
        """The agent's own questions are tracked apart from those that it answers: otherwise two
        of one port are one connection.
        """
        options = self.options
        owners = [MadeBy("uid", ((uid, uid),)) for uid in options.proxy_uids]
        owners += [MadeBy("gid", ((gid, gid),)) for gid in options.proxy_gids]
        asks = UdpPort("destination", (_DNS, _DNS))
        for owner in owners:
            self._append(RAW, _OUTPUT_DNS, SetZone(1), asks, owner)
            answers = UdpPort("source", (DNS_PORT, DNS_PORT))
            self._append(RAW, _OUTPUT_DNS, SetZone(2), answers, owner)
        if servers:
            self._append(RAW, "PREROUTING", Jump(_INBOUND))
        for server in servers:
            to = () if server is None else (self._to(server),)
            by = () if server is None else (SourceIn(self.family, PrefixSet([server])),)
            self._append(RAW, _OUTPUT_DNS, SetZone(2), asks, *to)
            self._append(RAW, _INBOUND, SetZone(1), UdpPort("source", (_DNS, _DNS)), *by)

    # The marks of TPROXY mode ---------------------------------------------------------------------

    def _marks(self) -> None:
        options = self.options
        ours = PacketMark(options.mark, FULL_MASK)
        self._append(MANGLE, "PREROUTING", SaveMark(), Tcp(), ours)
        self._append(MANGLE, "OUTPUT", _RETURN, Tcp(), _LO, ours)
        owners = [MadeBy("uid", ((uid, uid),)) for uid in options.proxy_uids]
        owners += [MadeBy("gid", ((gid, gid),)) for gid in options.proxy_gids]
        for owner in owners:
            call = SetPacketMark(OUTBOUND_MARK, FULL_MASK)
            self._append(MANGLE, "OUTPUT", call, self._not_host, Tcp(), _LO, owner)
        answer = ConnMark(options.mark, FULL_MASK)
        self._append(MANGLE, "OUTPUT", RestoreMark(), Tcp(), answer)
        lo = InInterface(("lo",))
        source = SourceIn(self.family, PrefixSet([self._at(self._passthrough)]))
        no_call = PacketMark(OUTBOUND_MARK, FULL_MASK, negate=True)
        self._insert(MANGLE, _INBOUND, 1, _RETURN, Tcp(), ours)
        self._insert(MANGLE, _INBOUND, 2, _RETURN, Tcp(), source, lo)
        self._insert(MANGLE, _INBOUND, 3, _RETURN, Tcp(), lo, no_call)


def _port(port: int) -> PortIn:
    return PortIn(((port, port),))


def _star(interface: str) -> str:
    """A wildcard as this project writes it."""
    return f"{interface[:-1]}*" if interface.endswith("+") else interface


# As one table of nft ------------------------------------------------------------------------------


def _both(four: list[Rule], six: list[Rule]) -> list[Rule]:
    """In an order in which each IP version finds its own; what is equal in both stands once."""
    rules: list[Rule] = []
    for what, a, b, c, d in difflib.SequenceMatcher(None, four, six, False).get_opcodes():
        if what == "equal":
            rules += four[a:b]
        else:
            rules += [
                *(_only(4, rule) for rule in four[a:b]),
                *(_only(6, rule) for rule in six[c:d]),
            ]
    return rules


def _only(family: Family, rule: Rule) -> Rule:
    if any(isinstance(match, SourceIn | DestinationIn) for match in rule.matches):
        return rule
    return replace(rule, matches=(IpVersion(family), *rule.matches))


def _in_nft(rule: Rule, table: Table) -> Rule:
    if isinstance(rule.action, Jump | Goto):
        return replace(rule, action=Jump(f"{table}_{rule.action.chain}"))
    return rule


def _refusal(rule: Rule) -> Rule:
    why = "nobody listens: refuse at once; without it the connection would bypass the proxy"
    return Rule((*rule.matches, Syn()), Verdict.RESET, why)
