"""Rules as lines of iptables, there and back; whose a line is; the script between two states."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.config import (
    Backend,
    Config,
    Intercept,
    Listener,
    Rules,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.errors import KernelError
from tproxyd.kernel import firewall
from tproxyd.kernel.desired import Facts, desired
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Chain,
    ConnMark,
    DestinationIn,
    Family,
    ForUs,
    Goto,
    Hook,
    Icmp,
    InInterface,
    Jump,
    MadeBy,
    Match,
    MeetsTransparentSocket,
    NotTcp,
    OutInterface,
    PacketMark,
    PortIn,
    Redirect,
    RestoreMark,
    Rule,
    SaveMark,
    SetConnMark,
    SetPacketMark,
    SetZone,
    SourceIn,
    Syn,
    Table,
    Tcp,
    Tproxy,
    Tracked,
    UdpPort,
    Unknown,
    Verdict,
)
from tproxyd.kernel.iptchains import lowered
from tproxyd.kernel.iptlang import ordered, words
from tproxyd.kernel.iptread import parse
from tproxyd.kernel.iptsave import Listing, ours, read_save, render, script, strangers
from tproxyd.kernel.state import KernelState, Tables, diff
from tproxyd.kernel.words import rule_text

FACTS = Facts(ipv6=True, host_netns=True)
IPTABLES = [Backend.IPTABLES_NFT, Backend.IPTABLES_LEGACY]


def prefixes(*texts: str) -> PrefixSet:
    return PrefixSet(map(parse_prefix, texts))


def rule(action: firewall.Action, *matches: Match) -> Rule:
    return Rule(ordered(list(matches)), action)


# Lines as iptables-save 1.8.9 prints them, both variants, and what they say.
SAVED: list[tuple[str, Rule]] = [
    ("-j RETURN", rule(Verdict.RETURN)),
    ("-s 10.0.0.0/8 -j ACCEPT", rule(Verdict.ACCEPT, SourceIn(4, prefixes("10.0.0.0/8")))),
    (
        "! -d 127.0.0.1/32 -o lo -p tcp -m owner --uid-owner 7 -j MARK --set-xmark 0x5/0xffffffff",
        rule(
            SetPacketMark(5, FULL_MASK),
            DestinationIn(4, prefixes("127.0.0.1"), negate=True),
            OutInterface("lo"),
            Tcp(),
            MadeBy("uid", ((7, 7),)),
        ),
    ),
    (
        (
            "-m iprange ! --dst-range 10.0.0.0-10.255.255.255"
            " -m iprange ! --dst-range 192.0.2.1-192.0.2.1 -j DROP"
        ),
        rule(Verdict.DROP, DestinationIn(4, prefixes("10.0.0.0/8", "192.0.2.1"), negate=True)),
    ),
    ("-i veth+ -p icmp -j DROP", rule(Verdict.DROP, InInterface(("veth*",)), Icmp())),
    ("! -p tcp -j RETURN", rule(Verdict.RETURN, NotTcp())),
    (
        "-p tcp -m tcp --dport 80:90 --tcp-flags FIN,SYN,RST,ACK SYN -g TPROXYD_15006",
        rule(Goto("TPROXYD_15006"), PortIn(((80, 90),)), Syn()),
    ),
    (
        "-p tcp -m multiport ! --dports 22,80:81 -j TPROXYD_15006",
        rule(Jump("TPROXYD_15006"), PortIn(((22, 22), (80, 81)), negate=True)),
    ),
    (
        "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m connmark --mark 0x53b/0xfff -j DROP",
        rule(Verdict.DROP, Syn(negate=True), ConnMark(0x53B, 0xFFF)),
    ),
    (
        "-m owner ! --gid-owner 3 -m owner ! --gid-owner 7-10 -j RETURN",
        rule(Verdict.RETURN, MadeBy("gid", ((3, 3), (7, 10)), negate=True)),
    ),
    (
        "-p tcp -m mark ! --mark 0x53a -j RETURN",
        rule(Verdict.RETURN, Tcp(), PacketMark(0x53A, FULL_MASK, negate=True)),
    ),
    (
        "-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT",
        rule(Jump("ISTIO_DIVERT"), Tcp(), Tracked(("established", "related"))),
    ),
    (
        "-m addrtype ! --dst-type LOCAL -m socket --transparent -j TPROXYD_DIVERT",
        rule(Jump("TPROXYD_DIVERT"), ForUs(negate=True), MeetsTransparentSocket()),
    ),
    (
        "-p tcp -j TPROXY --on-port 15006 --on-ip 0.0.0.0 --tproxy-mark 0x0/0x0",
        rule(Tproxy(4, 15006)),
    ),
    (
        "-p tcp -j TPROXY --on-port 15006 --on-ip 0.0.0.0 --tproxy-mark 0x539/0xfff",
        rule(Tproxy(4, 15006, SetPacketMark(0x539, 0xFFF))),
    ),
    ("-p tcp -j REDIRECT --to-ports 15001", rule(Redirect(15001))),
    (
        "-p udp -m udp --dport 53 -j REDIRECT --to-ports 15053",
        rule(Redirect(15053), UdpPort("destination", (53, 53))),
    ),
    (
        "-p udp -m udp --sport 15053:15054 -j CT --zone 2",
        rule(SetZone(2), UdpPort("source", (15053, 15054))),
    ),
    ("-j CONNMARK --set-xmark 0x53b/0xfff", rule(SetConnMark(0x53B, 0xFFF))),
    ("-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff", rule(SaveMark())),
    ("-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", rule(RestoreMark())),
]


@pytest.mark.parametrize(("line", "meant"), SAVED)
def test_what_iptables_save_prints(line: str, meant: Rule) -> None:
    assert parse(line, 4) == meant


@pytest.mark.parametrize("meant", [meant for _, meant in SAVED], ids=str)
def test_what_is_written_is_read(meant: Rule) -> None:
    assert parse(words(meant, 4), 4) == meant


def test_the_lines_have_every_form() -> None:
    """All but what only nft can say in one rule."""
    matches = {type(match) for _, meant in SAVED for match in meant.matches}
    of_nft = {firewall.IpVersion, firewall.MeetsWildcardListener, firewall.Reply}
    assert matches == set(get_args(firewall.Match)) - of_nft
    actions = {type(meant.action) for _, meant in SAVED}
    assert actions == set(get_args(firewall.Action)) - {firewall.Divert, firewall.KeepSource}


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("-p 6 -m tcp --dport 80 -j DROP", "-p tcp -m tcp --dport 80:80 -j DROP"),
        ("-j TPROXY --on-port 1 -p tcp", "nothing"),
        ("-p tcp -m multiport --dports 81,80 -j DROP", "-p tcp -m tcp --dport 80:81 -j DROP"),
        ("-i lo -m mark --mark 1337 -j DROP", "-m mark --mark 0x539/0xffffffff -i lo -j DROP"),
    ],
)
def test_layouts(line: str, same: str) -> None:
    if same == "nothing":
        assert isinstance(parse(line, 4), Unknown)
    else:
        assert parse(line, 4) == parse(same, 4) != Unknown(f"rule {line}")


def test_ipv6() -> None:
    assert parse("-p ipv6-icmp -j DROP", 6) == rule(Verdict.DROP, Icmp())
    assert parse("-p icmp -j DROP", 6) == Unknown("rule -p icmp -j DROP")
    line = "-p tcp -j TPROXY --on-port 15006 --on-ip :: --tproxy-mark 0x0/0x0"
    assert parse(line, 6) == rule(Tproxy(6, 15006))
    assert words(rule(Verdict.DROP, Icmp()), 6) == "-p ipv6-icmp -j DROP"


@pytest.mark.parametrize(
    "line",
    [
        "-p udp -j TPROXY --on-port 1",
        "-p tcp -j TPROXY --on-port 1 --on-ip 127.0.0.1",
        "-p tcp -m tcp --sport 80 -j DROP",
        "! -s 10.0.0.0/8 -j DROP",
        "! -i lo -j DROP",
        "-p udp -j DROP",
        "-m connmark ! --mark 0x1 -j DROP",
        "-m socket --nowildcard --transparent -j DROP",
        "-m addrtype --src-type LOCAL -j DROP",
        "-m comment --comment mine -j DROP",
        "-m conntrack ! --ctstate NEW -j DROP",
        "-p tcp -j REDIRECT --to-ports 1-2",
        "-j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff",
        "-j LOG --log-prefix x",
        "-j MASQUERADE",
        "-g TPROXYD_X --and more",
        "-i lo",
        "-j",
        "",
    ],
)
def test_what_is_not_in_the_algebra(line: str) -> None:
    assert parse(line, 4) == Unknown(f"rule {line}")


# One rule says one thing --------------------------------------------------------------------------


def lower(family: Family, *rules: Rule) -> list[str]:
    (chain,) = lowered([Chain("TPROXYD_C", None, rules)], family)
    assert isinstance(chain, Chain)
    return [words(each, family) for each in chain.rules if isinstance(each, Rule)]


def test_several_of_a_kind_are_several_rules() -> None:
    sources, there = prefixes("10.0.0.0/8", "192.0.2.1"), prefixes("10.9.0.0/16")
    matches = InInterface(("a", "b")), SourceIn(4, sources), DestinationIn(4, there)
    assert lower(4, Rule(matches, Verdict.DROP)) == [
        f"-s {source} -d 10.9.0.0/16 -i {name} -j DROP"
        for name in ("a", "b")
        for source in ("10.0.0.0/8", "192.0.2.1/32")
    ]
    assert lower(6, Rule(matches, Verdict.DROP)) == []


def test_more_ports_than_a_match_holds() -> None:
    odd = tuple((port, port) for port in range(1, 41, 2))
    for_these = lower(4, Rule((PortIn(odd),), Verdict.DROP))
    assert [line.count(",") for line in for_these] == [14, 4]
    (but_these,) = lower(4, Rule((PortIn(odd, negate=True),), Verdict.DROP))
    assert but_these.count("-m multiport ! --dports") == 2
    ranges = tuple((port, port + 1) for port in range(1, 60, 3))
    assert [line.count(":") for line in lower(4, Rule((PortIn(ranges),), Verdict.DROP))] == [
        *(7, 7, 6)
    ]


def test_everywhere_is_no_match() -> None:
    everywhere = DestinationIn(4, prefixes("0.0.0.0/0"))
    assert lower(4, Rule((everywhere,), Verdict.DROP)) == ["-j DROP"]
    nowhere = DestinationIn(4, prefixes("0.0.0.0/0"), negate=True)
    assert lower(4, Rule((nowhere,), Verdict.DROP)) == []


def test_what_we_let_pass_is_left_to_others() -> None:
    assert lower(4, Rule((NotTcp(),), Verdict.ACCEPT)) == ["! -p tcp -j RETURN"]


# Whose it is --------------------------------------------------------------------------------------

SAVE = """\
# Generated by iptables-nft-save
*mangle
:PREROUTING ACCEPT [1:60]
:OUTPUT DROP [0:0]
:OTHERS - [0:0]
:TPROXYD_MADE_OUTPUT - [0:0]
:TPROXYD_PREROUTING - [0:0]
-A PREROUTING -j OTHERS
-A PREROUTING -m comment --comment tproxyd -j TPROXYD_PREROUTING
-A PREROUTING -m comment --comment "not tproxyd" -j OTHERS
-A OTHERS -j RETURN
-A TPROXYD_PREROUTING -i lo -j RETURN
COMMIT
*filter
:INPUT ACCEPT [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_OUTPUT
COMMIT
"""
HELD = Tables(
    Backend.IPTABLES_NFT,
    4,
    (
        Chain("PREROUTING", Hook.PREROUTING, (rule(Jump("TPROXYD_PREROUTING")),)),
        Chain("TPROXYD_PREROUTING", None, (rule(Verdict.RETURN, InInterface(("lo",))),)),
    ),
)


def test_ours_in_a_listing() -> None:
    listings = read_save(SAVE)
    assert set(listings) == {Table.MANGLE, Table.NAT}
    assert listings[Table.MANGLE].policies == {"PREROUTING": "ACCEPT", "OUTPUT": "DROP"}
    assert listings[Table.MANGLE].made == ["OUTPUT"]
    assert ours(listings, Backend.IPTABLES_NFT, 4) == HELD


def test_nothing_of_ours() -> None:
    text = "\n".join(line for line in SAVE.splitlines() if "TPROXYD" not in line)
    assert ours(read_save(text), Backend.IPTABLES_NFT, 4) is None
    assert script(read_save(text), (), 4) == ""


def test_a_mark_alone_is_ours() -> None:
    """Of an install that was killed, or whose chains somebody has removed."""
    listings = {Table.RAW: Listing({"OUTPUT": []}, {"TPROXYD_MADE_OUTPUT": []})}
    assert ours(listings, Backend.IPTABLES_NFT, 4) == Tables(Backend.IPTABLES_NFT, 4)


@pytest.mark.parametrize("line", ["-j TPROXYD_PREROUTING", "-i lo -g TPROXYD_PREROUTING"])
def test_a_jump_to_us_without_a_comment_is_drift(line: str) -> None:
    listing = Listing({"PREROUTING": [line]}, {"TPROXYD_PREROUTING": []})
    tables = ours({Table.MANGLE: listing}, Backend.IPTABLES_NFT, 4)
    assert tables is not None
    drift = Unknown(f"rule without a comment: {line}")
    assert Chain("PREROUTING", Hook.PREROUTING, (drift,)) in tables.chains


def test_a_line_that_is_no_words_is_not_ours() -> None:
    """iptables-save quotes no name of xt_recent: -m recent --set --name it's."""
    line = "-m recent --set --name it's --mask 255.255.255.255 --rsource"
    listings = read_save(f"*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING {line}\nCOMMIT\n")
    assert ours(listings, Backend.IPTABLES_NFT, 4) is None
    assert line not in script(listings, HELD.chains, 4)


def test_the_script_from_one_state_to_another() -> None:
    want = lowered(
        [
            Chain("PREROUTING", Hook.PREROUTING, (Rule((), Jump("TPROXYD_NEW")),)),
            Chain("TPROXYD_NEW", None, (Rule((Tcp(),), Verdict.RETURN, "why"),)),
        ],
        4,
    )
    assert script(read_save(SAVE), want, 4, [(Table.MANGLE, "PREROUTING")]) == (
        "*mangle\n"
        ":TPROXYD_MADE_OUTPUT - [0:0]\n"
        ":TPROXYD_MADE_PREROUTING - [0:0]\n"
        ":TPROXYD_NEW - [0:0]\n"
        ":TPROXYD_PREROUTING - [0:0]\n"
        "# why\n"
        "-A TPROXYD_NEW -p tcp -j RETURN\n"
        "-D PREROUTING -m comment --comment tproxyd -j TPROXYD_PREROUTING\n"
        "-I PREROUTING 1 -m comment --comment tproxyd -j TPROXYD_NEW\n"
        "-X TPROXYD_PREROUTING\n"
        "COMMIT\n"
    )


def test_the_script_that_cleans_names_nothing_of_others() -> None:
    assert script(read_save(SAVE), (), 4) == (
        "*mangle\n"
        ":TPROXYD_MADE_OUTPUT - [0:0]\n"
        ":TPROXYD_PREROUTING - [0:0]\n"
        "-D PREROUTING -m comment --comment tproxyd -j TPROXYD_PREROUTING\n"
        "-X TPROXYD_MADE_OUTPUT\n"
        "-X TPROXYD_PREROUTING\n"
        "COMMIT\n"
    )


def test_istio_iptables_chains_are_not_ours_unless_adopted() -> None:
    want = (Chain("ISTIO_OUTPUT", None, (), Table.NAT),)
    assert strangers(read_save(SAVE), want) == ["ISTIO_OUTPUT (nat)"]
    assert strangers(read_save(SAVE, adopt=0x539), want) == []
    ours_by_mark = SAVE.replace(":ISTIO_OUTPUT", ":TPROXYD_ISTIO - [0:0]\n:ISTIO_OUTPUT")
    assert strangers(read_save(ours_by_mark), want) == []
    assert "-D PREROUTING -j ISTIO_OUTPUT" in script(read_save(SAVE, adopt=0x539), (), 4)


ISTIOS = [
    ("PREROUTING", "-p tcp -m mark --mark 0x539 -j CONNMARK --save-mark"),
    ("OUTPUT", "-o lo -p tcp -m mark --mark 0x539 -j RETURN"),
    ("OUTPUT", "! -d ::1/128 -o lo -p tcp -m owner --gid-owner 7 -j MARK --set-xmark 0x53a"),
    ("OUTPUT", "-p tcp -m connmark --mark 0x539 -j CONNMARK --restore-mark"),
]
OTHERS = [
    ("PREROUTING", "-p tcp -m mark --mark 0x77 -j CONNMARK --save-mark"),
    ("PREROUTING", "-p tcp -m mark --mark 0x539/0xfff -j CONNMARK --save-mark"),
    ("PREROUTING", "-p tcp -m mark ! --mark 0x539 -j CONNMARK --save-mark"),
    ("PREROUTING", "-p tcp -m connmark --mark 0x539 -j CONNMARK --restore-mark"),
    ("PREROUTING", "-i nic -j RETURN"),
    ("OUTPUT", "-p tcp -m mark --mark 0x539 -j CONNMARK --save-mark"),
    ("OUTPUT", "-p tcp -m connmark --mark 0x88 -j CONNMARK --restore-mark"),
    ("OUTPUT", "-p tcp -m connmark --mark 0x539 -j MARK --set-xmark 0x539"),
    ("OUTPUT", "-o tun0 -p tcp -m mark --mark 0x539 -j RETURN"),
    ("OUTPUT", "-o lo -p tcp -m mark --mark 0x99 -j RETURN"),
    ("OUTPUT", "-p tcp -m mark --mark 0x539 -j RETURN"),
    ("OUTPUT", "-o lo -p tcp -m owner --gid-owner 7 -j MARK --set-xmark 0x53a"),
    ("OUTPUT", "! -d ::1/128 -o lo -p tcp -m owner --gid-owner 7 -j MARK --set-xmark 0x53b"),
    ("OUTPUT", "! -d ::1/128 -o tun0 -p tcp -m owner --gid-owner 7 -j MARK --set-xmark 0x53a"),
    ("OUTPUT", "-j LOG"),
]


@pytest.mark.parametrize(("chain", "line"), ISTIOS)
def test_rules_of_istio_iptables_without_a_chain(chain: str, line: str) -> None:
    assert Listing(adopt=0x539).is_our_rule(Table.MANGLE, chain, line)
    assert not Listing(adopt=0x539).is_our_rule(Table.NAT, chain, line)
    assert not Listing().is_our_rule(Table.MANGLE, chain, line)


@pytest.mark.parametrize(("chain", "line"), OTHERS)
def test_rules_of_others_that_resemble_them(chain: str, line: str) -> None:
    assert not Listing(adopt=0x539).is_our_rule(Table.MANGLE, chain, line)


# The lean scheme ----------------------------------------------------------------------------------


def config(chosen: Backend, *listeners: Listener) -> Config:
    return Config(rules=Rules(backend=chosen), listeners=listeners or (Listener(),))


def test_the_default_sidecar() -> None:
    wish = desired(config(Backend.IPTABLES_NFT), facts=FACTS)
    assert wish.firewall == ()
    lines = [line for line in render(wish.iptables).splitlines() if not line.startswith("#")]
    syn = "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
    to = "-A TPROXYD_PREROUTING"
    assert lines == [
        "*mangle",
        ":TPROXYD_15006 - [0:0]",
        ":TPROXYD_OUTPUT - [0:0]",
        ":TPROXYD_PREROUTING - [0:0]",
        "-I OUTPUT 1 -m comment --comment tproxyd -j TPROXYD_OUTPUT",
        "-I PREROUTING 1 -m comment --comment tproxyd -j TPROXYD_PREROUTING",
        f"-A TPROXYD_15006 -p tcp {syn} -j CONNMARK --set-xmark 0x53b/0xfff",
        "-A TPROXYD_15006 -p tcp -j TPROXY --on-port 15006",
        "-A TPROXYD_OUTPUT -m connmark --mark 0x539/0xfff -j MARK --set-xmark 0x539/0xfff",
        f"{to} -i lo -p tcp {syn} -m mark --mark 0x539/0xfff -m socket --transparent -j DROP",
        f"{to} -i lo -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x539/0xfff",
        f"{to} -i lo -j RETURN",
        f"{to} ! -p tcp -j RETURN",
        f"{to} -m addrtype ! --dst-type LOCAL -j RETURN",
        (
            f"{to} -p tcp {syn.replace('--tcp', '! --tcp')} -m connmark --mark 0x53b/0xfff"
            " -g TPROXYD_15006"
        ),
        f"{to} -p tcp {syn.replace('--tcp', '! --tcp')} -j RETURN",
        f"{to} -p tcp {syn} -m connmark --mark 0x539/0xfff -j DROP",
        f"{to} -p tcp -m multiport ! --dports 15020:15021,15090 -g TPROXYD_15006",
        "COMMIT",
        "*nat",
        ":TPROXYD_POSTROUTING - [0:0]",
        (
            "-I POSTROUTING 1 -o lo -m mark --mark 0x539/0xfff -m comment --comment tproxyd"
            " -j TPROXYD_POSTROUTING"
        ),
        "-A TPROXYD_POSTROUTING -j ACCEPT",
        "COMMIT",
    ]


def test_listeners_have_tags_of_their_own() -> None:
    forward = Listener("c", port=3, intercept=Intercept(Scope.FORWARD))
    wish = desired(
        config(Backend.IPTABLES_NFT, Listener("a", port=1), Listener("b", port=2), forward),
        facts=FACTS,
    )
    text = render(wish.iptables)
    for port, tag in ((1, "0x53b"), (2, "0x53c"), (3, "0x53d")):
        assert f"-m connmark --mark {tag}/0xfff -g TPROXYD_{port}\n" in text
        assert f"SYN -j CONNMARK --set-xmark {tag}/0xfff\n" in text
    assert "-A TPROXYD_3 -p tcp -j TPROXY --on-port 3 --tproxy-mark 0x539/0xfff\n" in text


def test_a_mark_without_room_for_the_tags() -> None:
    listeners = tuple(Listener(f"l{port}", port=port) for port in range(1, 15))
    with pytest.raises(KernelError, match="leaves 13 numbers for 14 listeners; use a longer"):
        desired(Config(mark=1, rules=Rules(Backend.IPTABLES_NFT), listeners=listeners), facts=FACTS)


def test_an_ip_version_that_we_do_not_serve_is_dropped_not_let_by() -> None:
    facts = Facts(ipv6=False, host_netns=True)
    four, six = desired(config(Backend.IPTABLES_NFT), facts=facts).iptables
    (take,) = (each for each in six.chains if isinstance(each, Chain) and "15006" in each.name)
    assert [rule_text(each) for each in take.rules] == ["anything → drop"]
    gone = Facts(ipv6=False, host_netns=True, ip_tables=(4,))
    assert desired(config(Backend.IPTABLES_NFT), facts=gone).iptables == (four,)


def test_redirect_is_in_nat() -> None:
    listener = Listener(intercept=Intercept(via=Via.REDIRECT), source=SourceKind.PROXY)
    text = render(desired(config(Backend.IPTABLES_LEGACY, listener), facts=FACTS).iptables)
    assert text.startswith("*nat\n")
    assert "! --dports 15020:15021,15090 -j REDIRECT --to-ports 15006\n" in text
    assert "*mangle" not in text


@pytest.mark.parametrize("backend", IPTABLES)
def test_much_that_is_excluded_has_chains_of_its_own(backend: Backend) -> None:
    """iptables-restore takes 255 words a line; what comes behind the rule still does."""
    hosts = prefixes(*(f"10.0.{number}.1" for number in range(100)), "fd00::/8")
    uids = tuple(range(1000, 1400, 2))
    listeners = (
        Listener("a", port=1, intercept=Intercept(ports=((80, 89),), exclude_destinations=hosts)),
        Listener("b", port=2, intercept=Intercept(exclude_ports=(), via=Via.REDIRECT)),
        Listener("c", port=3, intercept=Intercept(Scope.OUTBOUND, Via.REDIRECT, exclude_uids=uids)),
    )
    wish = desired(config(backend, *listeners), facts=FACTS)
    text = render(wish.iptables)
    assert max(len(line.split()) for line in text.splitlines() if line[:1] == "-") < 200
    four, six = (
        {(each.table, each.name): each.rules for each in tables.chains if isinstance(each, Chain)}
        for tables in wish.iptables
    )
    assert list(map(rule_text, four[Table.MANGLE, "TPROXYD_PREROUTING"][-2:])) == [
        "to port 80-89 → goto TPROXYD_PREROUTING-1X",
        "anything → goto TPROXYD_PREROUTING-1",
    ]
    through = list(map(rule_text, four[Table.MANGLE, "TPROXYD_PREROUTING-1X"]))
    assert through[0].endswith("10.0.0.1/32 → goto TPROXYD_PREROUTING-1")
    assert (len(through), through[-1]) == (102, "anything → goto TPROXYD_1")  # ports too
    behind = list(map(rule_text, four[Table.MANGLE, "TPROXYD_PREROUTING-1"]))
    assert behind == ["anything → return"]  # to nat, as listener b's
    assert (Table.MANGLE, "TPROXYD_PREROUTING-1") not in six
    made_here = list(map(rule_text, six[Table.NAT, "TPROXYD_OUTPUT-1X"]))
    assert (len(made_here), made_here[1]) == (202, "made by uid 1000 → return")  # ports too
    assert (Table.NAT, "TPROXYD_OUTPUT-1") not in six
    for tables in wish.iptables:
        for chain in tables.chains:
            assert isinstance(chain, Chain)
            for each in chain.rules:
                assert isinstance(each, Rule)
                assert parse(words(each, tables.family), tables.family) == replace(each, comment="")


def test_a_drain_takes_nothing_new() -> None:
    wish = desired(config(Backend.IPTABLES_NFT), facts=FACTS, intercept=False)
    text = render(wish.iptables)
    assert "TPROXY " not in text
    assert "-A TPROXYD_OUTPUT -m connmark --mark 0x539/0xfff" in text


def test_tables_in_a_change() -> None:
    (change,) = diff(KernelState(iptables=(HELD,)), KernelState())
    assert str(change) == "remove the firewall rules (iptables-nft, IPv4)"
