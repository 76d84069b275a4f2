"""nft's language: what is written is read back as itself, and foreign edits never pass as ours.

The listing in data/ was captured from nft 1.0.6; netns-tests read the live one.
"""

from __future__ import annotations

import copy
import ctypes
import json
import socket
from pathlib import Path
from typing import Any, get_args

import pytest

from tproxyd import linux
from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.config import Config
from tproxyd.configfile import parse as parse_config
from tproxyd.errors import KernelError
from tproxyd.kernel import firewall, nft
from tproxyd.kernel.desired import Facts, desired
from tproxyd.kernel.firewall import (
    ESTABLISHED,
    FULL_MASK,
    Chain,
    ConnMark,
    DestinationIn,
    Divert,
    Firewall,
    Icmp,
    InInterface,
    IpVersion,
    PacketMark,
    PortIn,
    Rule,
    SetConnMark,
    SetPacketMark,
    SourceIn,
    Syn,
    Tproxy,
    Unknown,
    Verdict,
)
from tproxyd.kernel.nfnetlink import Described, Refused
from tproxyd.kernel.nft import Nft
from tproxyd.kernel.nftjson import parse
from tproxyd.kernel.nftlang import render
from tproxyd.kernel.state import KernelState, diff

DATA = Path(__file__).parent / "data"
FACTS = Facts(ipv6=True, host_netns=True)


def captured() -> list[dict[str, Any]]:
    listing: list[dict[str, Any]] = json.loads((DATA / "nft-1.0.6.json").read_text())["nftables"]
    return listing


def wanted() -> Firewall:
    name = "nft-every-form.toml"
    return desired(parse_config((DATA / name).read_text(), name), facts=FACTS).firewall


def same(have: Firewall, want: Firewall) -> bool:
    return diff(KernelState(firewall=have), KernelState(firewall=want)) == ()


def read_rule(*statements: object) -> Rule | Unknown:
    """The rule that these JSON statements are."""
    listing: list[dict[str, Any]] = [
        {"chain": {"family": "inet", "table": "tproxyd", "name": "c", "handle": 1}},
        {"rule": {"family": "inet", "chain": "c", "handle": 2, "expr": list(statements)}},
    ]
    (chain,) = parse(listing)
    assert isinstance(chain, Chain)
    (rule,) = chain.rules
    return rule


def match(left: object, right: object, op: str = "==") -> dict[str, object]:
    return {"match": {"op": op, "left": left, "right": right}}


ACCEPT = {"accept": None}
TCP = match({"meta": {"key": "l4proto"}}, "tcp")
DPORT = {"payload": {"protocol": "tcp", "field": "dport"}}
FLAGS = {"payload": {"protocol": "tcp", "field": "flags"}}
MARK = {"meta": {"key": "mark"}}
CT_MARK = {"ct": {"key": "mark"}}
SADDR = {"protocol": "ip", "field": "saddr"}
WRITE = {"mangle": {"key": MARK, "value": 1}}


def test_the_captured_listing_is_what_was_wanted() -> None:
    assert same(parse(captured()), wanted())


def test_the_listing_where_nft_knows_no_protocol_names() -> None:
    """Without /etc/protocols (netbase), as in many containers, it has 6 for tcp, and so on."""
    text = json.dumps(captured())
    named = ['"l4proto"}}, "right": "tcp"}', '{"set": ["icmp", "ipv6-icmp"]}']
    numbered = ['"l4proto"}}, "right": 6}', '{"set": [1, 58]}']
    others = ['"l4proto"}}, "right": 17}', '{"set": [1, 59]}']
    for one, two, three in zip(named, numbered, others, strict=True):
        assert one in text
        assert same(parse(json.loads(text.replace(one, two))), wanted())
        assert not same(parse(json.loads(text.replace(one, three))), wanted())


def test_the_order_in_which_nft_lists_chains_does_not_matter() -> None:
    listing = captured()
    chains = [entry for entry in listing if "chain" in entry]
    others = [entry for entry in listing if "chain" not in entry]
    assert same(parse([*chains[::-1], *others]), wanted())


def test_every_foreign_edit_of_a_rule_is_drift() -> None:
    """Take any rule away, double it, comment it, count it, or move it: not what was wanted."""
    listing = captured()
    at = [i for i, entry in enumerate(listing) if "rule" in entry]
    assert len(at) > 10
    for i in at:
        commented, counted = copy.deepcopy(listing), copy.deepcopy(listing)
        commented[i]["rule"]["comment"] = "mine"
        counted[i]["rule"]["expr"].insert(0, {"counter": {"packets": 0, "bytes": 0}})
        edits = [
            listing[:i] + listing[i + 1 :],
            [*listing[:i], listing[i], *listing[i:]],
            commented,
            counted,
        ]
        if i + 1 in at and listing[i]["rule"]["chain"] == listing[i + 1]["rule"]["chain"]:
            edits.append([*listing[:i], listing[i + 1], listing[i], *listing[i + 2 :]])
        for edit in edits:
            assert not same(parse(edit), wanted()), f"unnoticed at {listing[i]}"


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("table", "flags", ["dormant"]),
        ("table", "comment", "mine"),
        ("chain", "policy", "drop"),
        ("chain", "prio", -149),
        ("chain", "hook", "input"),
        ("chain", "type", "nat"),
        ("chain", "dev", "eth0"),
    ],
)
def test_every_foreign_edit_of_table_and_chain_is_drift(kind: str, key: str, value: object) -> None:
    listing = captured()
    next(entry[kind] for entry in listing if kind in entry)[key] = value
    assert not same(parse(listing), wanted())


def test_a_foreign_set_in_our_table_is_drift() -> None:
    extra = {"set": {"family": "inet", "name": "s", "table": "tproxyd", "type": "ipv4_addr"}}
    assert not same(parse([*captured(), extra]), wanted())


def test_an_empty_table_is_not_no_table() -> None:
    """Clean must remove it too."""
    table = {"table": {"family": "inet", "name": "tproxyd", "handle": 1}}
    firewall = parse([{"metainfo": {}}, table])
    assert firewall == (Unknown("an empty table"),)


@pytest.mark.parametrize(
    "flags",
    [
        ["fin", "syn", "rst", "ack"],
        {"|": ["fin", "syn", "rst", "ack"]},
        {"|": [{"|": [{"|": ["fin", "syn"]}, "rst"]}, "ack"]},
        ["ack", "rst", "syn", "fin"],
    ],
)
def test_versions_differ_in_writing_flags(flags: object) -> None:
    rule = read_rule(match({"&": [FLAGS, flags]}, "syn"), {"drop": None})
    assert rule == Rule((Syn(),), Verdict.DROP)


def test_versions_differ_in_what_they_leave_out() -> None:
    source = match(
        {"payload": {"protocol": "ip", "field": "saddr"}},
        {"prefix": {"addr": "10.0.0.0", "len": 8}},
    )
    ipv4 = match({"meta": {"key": "nfproto"}}, "ipv4")
    want = Rule((SourceIn(4, PrefixSet([parse_prefix("10.0.0.0/8")])),), Verdict.ACCEPT)
    assert read_rule(source, ACCEPT) == read_rule(ipv4, source, ACCEPT) == want
    port = Rule((PortIn(((80, 80),)),), Verdict.ACCEPT)
    assert read_rule(match(DPORT, 80), ACCEPT) == read_rule(TCP, match(DPORT, 80), ACCEPT) == port
    tproxy = {"tproxy": {"family": "ip", "port": 1}}
    want = Rule((IpVersion(4),), Tproxy(4, 1))
    assert read_rule(ipv4, tproxy, ACCEPT) == read_rule(ipv4, TCP, tproxy, ACCEPT) == want


@pytest.mark.parametrize(
    "right",
    [
        {"set": [80, 81, {"range": [82, 90]}]},
        {"set": [{"range": [80, 85]}, {"range": [86, 90]}]},
        {"range": [80, 90]},
    ],
)
def test_ports_in_every_layout(right: object) -> None:
    assert read_rule(match(DPORT, right), ACCEPT) == Rule((PortIn(((80, 90),)),), Verdict.ACCEPT)
    negated = Rule((PortIn(((80, 90),), negate=True),), Verdict.ACCEPT)
    assert read_rule(match(DPORT, right, "!="), ACCEPT) == negated


@pytest.mark.parametrize(
    "right",
    [
        {
            "set": [
                {"prefix": {"addr": "10.0.0.0", "len": 8}},
                {"prefix": {"addr": "11.0.0.0", "len": 8}},
            ]
        },
        {"range": ["10.0.0.0", "11.255.255.255"]},
        {
            "set": [
                {"range": ["10.0.0.0", "10.5.255.255"]},
                {"range": ["10.6.0.0", "11.255.255.255"]},
            ]
        },
        {"prefix": {"addr": "10.0.0.0", "len": 7}},
    ],
)
def test_addresses_in_every_layout(right: object) -> None:
    left = {"payload": {"protocol": "ip", "field": "daddr"}}
    want = DestinationIn(4, PrefixSet([parse_prefix("10.0.0.0/7")]))
    assert read_rule(match(left, right), ACCEPT) == Rule((want,), Verdict.ACCEPT)


def test_interfaces_are_sorted() -> None:
    left = {"meta": {"key": "iifname"}}
    want = Rule((InInterface(("eth0", "eth1")),), Verdict.ACCEPT)
    assert read_rule(match(left, {"set": ["eth1", "eth0"]}), ACCEPT) == want


@pytest.mark.parametrize("keep", [0xFFFF_F000, 0xFFFF_F539])
def test_a_mark_write_keeps_the_other_bits_in_either_spelling(keep: int) -> None:
    for key, kind in ((MARK, SetPacketMark), (CT_MARK, SetConnMark)):
        write = {"mangle": {"key": key, "value": {"|": [{"&": [key, keep]}, 0x539]}}}
        assert read_rule(write) == Rule((), kind(0x539, 0xFFF))


def test_marks_are_written_in_front_of_an_accept() -> None:
    write = {"mangle": {"key": MARK, "value": {"|": [{"&": [MARK, 0xFFFF_F000]}, 0x539]}}}
    mark = SetPacketMark(0x539, 0xFFF)
    tproxy = {"tproxy": {"family": "ip6", "port": 1}}
    assert read_rule(write, ACCEPT) == Rule((), Divert(mark))
    assert read_rule(tproxy, write, ACCEPT) == Rule((), Tproxy(6, 1, mark))


@pytest.mark.parametrize("op", ["in", "=="])
def test_versions_differ_in_asking_for_a_state(op: str) -> None:
    state = match({"ct": {"key": "state"}}, "established", op)
    assert read_rule(state, ACCEPT) == Rule((ESTABLISHED,), Verdict.ACCEPT)


@pytest.mark.parametrize("right", [["icmpv6", "icmp"], ["icmp", "ipv6-icmp"], [58, 1]])
def test_icmp_by_every_name(right: list[object]) -> None:
    left = {"meta": {"key": "l4proto"}}
    assert read_rule(match(left, {"set": right}), ACCEPT) == Rule((Icmp(),), Verdict.ACCEPT)


def test_a_mark_write_of_all_ones_has_nothing_to_keep() -> None:
    for key, kind in ((MARK, SetPacketMark), (CT_MARK, SetConnMark)):
        write = {"mangle": {"key": key, "value": {"|": [key, 0xFFF]}}}
        assert read_rule(write) == Rule((), kind(0xFFF, 0xFFF))


def test_marks_of_32_bits_have_no_mask() -> None:
    mark = 0xDEAD_BEEF
    matches = match(MARK, mark), match(CT_MARK, mark)
    rule = read_rule(*matches, {"mangle": {"key": MARK, "value": mark}})
    want = Rule(
        (PacketMark(mark, FULL_MASK), ConnMark(mark, FULL_MASK)), SetPacketMark(mark, FULL_MASK)
    )
    assert rule == want
    text = render((Chain("c", None, (want,)),))
    assert "\t\tmeta mark 0xdeadbeef ct mark 0xdeadbeef meta mark set 0xdeadbeef\n" in text


@pytest.mark.parametrize(
    "statements",
    [
        [],
        [TCP],
        [{"counter": {"packets": 1, "bytes": 1}}, ACCEPT],
        [match({"meta": {"key": "oifname"}}, "lo", "!="), ACCEPT],
        [match({"meta": {"key": "iifname"}}, "lo", "!="), ACCEPT],
        [match({"meta": {"key": "iifname"}}, 1), ACCEPT],
        [match(DPORT, "@bypass"), ACCEPT],
        [match(DPORT, 80, "<"), ACCEPT],
        [match({"&": [FLAGS, ["fin", "syn", "rst"]]}, "syn"), ACCEPT],
        [match({"&": [FLAGS, ["fin", "syn", "rst", "ack"]]}, "ack"), ACCEPT],
        [match({"&": [FLAGS, ["rst", "ack"]]}, "rst"), ACCEPT],
        [match({"ct": {"key": "status"}}, "seen-reply", "in"), ACCEPT],
        [match({"ct": {"key": "status"}}, "assured", "!="), ACCEPT],
        [match({"socket": {"key": "transparent"}}, 2), ACCEPT],
        [match({"socket": {"key": "wildcard"}}, 0), ACCEPT],
        [match({"socket": {"key": "mark"}}, 1), ACCEPT],
        [match({"payload": {"protocol": "ip", "field": "saddr"}}, "@trusted"), ACCEPT],
        [match({"payload": {"protocol": "ip", "field": "saddr"}}, "10.0.0.1", "!="), ACCEPT],
        [match({"ct": {"key": "mark", "dir": "original"}}, 1), ACCEPT],
        [match({"ct": {"key": "direction"}}, "original"), ACCEPT],
        [match({"ct": {"key": "direction"}}, "reply", "!="), ACCEPT],
        [match({"fib": {"result": "type", "flags": ["saddr"]}}, "local", "!="), ACCEPT],
        [{"reject": {"type": "icmp", "expr": "host-unreachable"}}],
        [{"tproxy": {"family": "ip", "port": 1, "addr": "127.0.0.1"}}, ACCEPT],
        [{"tproxy": {"family": "ip", "port": 1}}],
        [{"tproxy": {"family": "ip", "port": 1}}, {"mangle": {"key": CT_MARK, "value": 1}}, ACCEPT],
        [{"tproxy": {"family": "ip", "port": 1}}, WRITE, WRITE, ACCEPT],
        [{"mangle": {"key": CT_MARK, "value": 1}}, ACCEPT],
        [{"mangle": {"key": {"meta": {"key": "priority"}}, "value": 1}}],
        [WRITE, {"drop": None}],
        [{"redirect": None}],
        [{"redirect": {"port": {"range": [1, 2]}}}],
        [{"redirect": {"port": 1, "flags": "random"}}],
        [{"masquerade": None}],
        [match({"ct": {"key": "state"}}, "new", "!="), ACCEPT],
        [match({"meta": {"key": "l4proto"}}, {"set": ["icmp", "udp"]}), ACCEPT],
        [match({"meta": {"key": "l4proto"}}, {"set": ["icmp", ["udp"]]}), ACCEPT],
        [match({"meta": {"key": "l4proto"}}, "icmp"), ACCEPT],
        [match({"meta": {"key": "skuid"}}, "root"), ACCEPT],
        [match({"meta": {"key": "skuid"}}, "root", "!="), ACCEPT],
        [match({"fib": {"result": "type", "flags": ["daddr"]}}, "unicast"), ACCEPT],
        [match({"&": [FLAGS, ["fin", "syn", "rst"]]}, "syn", "!="), ACCEPT],
        [{"mangle": {"key": MARK, "value": {"^": [MARK, 1]}}}],
        [{"mangle": {"key": MARK, "value": {"|": [{"&": [CT_MARK, 0]}, 1]}}}],
        [ACCEPT, {"drop": None}],
        [{"jump": {"target": 1}}],
        [{"snat": {"family": "ip", "addr": "192.0.2.1"}}],
        [{"snat": {"family": "ip", "addr": {"payload": {"protocol": "ip", "field": "daddr"}}}}],
        [{"snat": {"family": "ip", "addr": {"payload": SADDR}, "port": 80}}],
        [{"snat": {"family": "ip6", "addr": {"payload": SADDR}}}],
        ["nonsense"],
        [{"match": {"op": "==", "left": None, "right": None}}, ACCEPT],
    ],
)
def test_what_is_not_in_the_algebra_is_unknown(statements: list[object]) -> None:
    assert isinstance(read_rule(*statements), Unknown)


# Of the istio scheme only; what nft makes of that is tested in namespaces.
OF_ISTIO: set[object] = {firewall.Tcp, firewall.UdpPort}
DONE_BY_ISTIO: set[object] = {
    *(firewall.SaveMark, firewall.RestoreMark, firewall.SetZone),
}


def test_the_sample_has_every_form() -> None:
    """A match or an action that it lacks is one that no version of nft was seen to list."""
    rules = [rule for chain in wanted() if isinstance(chain, Chain) for rule in chain.rules]
    seen = {type(part) for rule in rules if isinstance(rule, Rule) for part in rule.matches}
    assert seen == set(get_args(firewall.Match)) - OF_ISTIO
    done = {type(rule.action) for rule in rules if isinstance(rule, Rule)}
    assert done == set(get_args(firewall.Action)) - DONE_BY_ISTIO
    negated = {repr(m) for r in rules if isinstance(r, Rule) for m in r.matches}
    for name in ("Syn", "ForUs", "PortIn", "DestinationIn"):
        for negate in (True, False):
            assert any(m.startswith(name) and f"negate={negate}" in m for m in negated), name


def test_the_script() -> None:
    assert render(()) == "add table inet tproxyd\ndelete table inet tproxyd\n"
    lines = [
        line for line in render(wanted()).splitlines() if line.strip(" \t")[:1] not in ("", "#")
    ]
    assert "\n".join(lines) + "\n" == (DATA / "nft-every-form.nft").read_text()


def test_comments_stand_above_their_rules_once_for_equal_neighbours() -> None:
    text = render(wanted())
    assert text.count("# connections for listener output\n") == 1
    assert "# only TCP is proxied\n\t\tmeta l4proto != tcp accept\n" in text
    assert all(len(line) <= 100 for line in text.splitlines() if "#" in line)


# The tool -----------------------------------------------------------------------------------------


class Scripted:
    """A tool with prepared answers, which notes what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def run(self, script: str, answer: bool) -> str:
        self.asked.append(script)
        return self.answers.pop(0)


def only_ours(_: int) -> dict[str, Described]:
    return {"tproxyd": Described(0, 0, 1)}


@pytest.fixture
def _privileged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "_may_talk", lambda action: None)


@pytest.mark.usefixtures("_privileged")
def test_only_our_table_is_ever_listed() -> None:
    backend = Nft(tables=lambda _: {"fw4": Described(0, 0, 5)})
    backend._tool = tool = Scripted()
    assert backend.read() == ()
    assert tool.asked == []

    backend = Nft(tables=only_ours)
    backend._tool = tool = Scripted(json.dumps({"nftables": captured()}))
    assert same(backend.read(), wanted())
    assert tool.asked == ["list table inet tproxyd"]


@pytest.mark.usefixtures("_privileged")
@pytest.mark.parametrize(
    ("flags", "objects", "is_fine"),
    [(2, 0, True), (4, 0, True), (6, 0, True), (1, 0, False), (5, 0, False), (2, 1, False)],
)
def test_a_table_with_flags_is_never_listed_whole(flags: int, objects: int, is_fine: bool) -> None:
    """nft 1.0.6 would write broken JSON. Whose it is (2, 4) is no drift; that it sleeps (1) is."""
    entries = [entry for entry in captured() if "table" not in entry]
    chains = [entry for entry in entries if "chain" in entry]
    names = [entry["chain"]["name"] for entry in chains]
    each = [
        [
            e
            for e in entries
            if name in (e.get("chain", {}).get("name"), e.get("rule", {}).get("chain"))
        ]
        for name in names
    ]
    others = {"chain": {"family": "inet", "name": "c", "table": "fw4", "handle": 9}}
    described = Described(flags, 7, objects + len(chains))
    backend = Nft(tables=lambda _: {"tproxyd": described})
    answers = [[*chains, others], *each]
    backend._tool = tool = Scripted(*(json.dumps({"nftables": one}) for one in answers))
    assert same(backend.read(), wanted()) == is_fine
    assert tool.asked[0] == "list chains inet"
    assert tool.asked[1:] == [f"list chain inet tproxyd {name}" for name in names]


@pytest.mark.usefixtures("_privileged")
@pytest.mark.parametrize("answer", ["", "table inet tproxyd {", '{"x": 1}', "[]", "null"])
def test_an_nft_that_speaks_no_json(answer: str) -> None:
    backend = Nft(tables=only_ours)
    backend._tool = Scripted(answer)
    with pytest.raises(KernelError, match="can't read the nft table inet tproxyd: nft answered"):
        backend.read()


@pytest.mark.usefixtures("_privileged")
def test_a_refusal_is_told_in_nfts_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def run(self, script: str, answer: bool) -> str:
            raise Refused("Error: Could not process rule: No such file\nadd rule\n    ^^^\n")

    backend = Nft()
    backend._tool = Refusing()
    with pytest.raises(KernelError) as caught:
        backend.apply(())
    assert caught.value.why == "Could not process rule: No such file"
    assert "nft_tproxy" in caught.value.hint


def test_without_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "capabilities", lambda: frozenset({linux.CAP_NET_RAW}))
    with pytest.raises(KernelError, match="CAP_NET_ADMIN is missing; run it as root"):
        Nft().read()


def test_a_kernel_without_nftables(monkeypatch: pytest.MonkeyPatch) -> None:
    """libnftables would call exit()."""

    def refuse(*_: object) -> socket.socket:
        raise OSError(93, "Protocol not supported")

    monkeypatch.setattr(linux, "capabilities", lambda: frozenset({linux.CAP_NET_ADMIN}))
    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(
        KernelError, match=r"Protocol not supported; .*modprobe nf_tables nft_tproxy"
    ):
        Nft().read()


def test_without_the_library_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: f"/usr/sbin/{name}")
    assert Nft("libnftables.so.none").probe() == "/usr/sbin/nft"


def test_without_either_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(KernelError, match=r"libnftables.so.none.*apt install libnftables1"):
        Nft("libnftables.so.none").probe()


def test_the_library_where_it_is_there() -> None:
    try:
        ctypes.CDLL(nft.LIBRARY)
    except OSError as error:
        pytest.skip(str(error))
    assert Nft().probe() == nft.LIBRARY


def test_the_default_configuration_is_written() -> None:
    text = render(desired(Config(), facts=FACTS).firewall)
    assert "tcp dport != { 15020-15021, 15090 } goto take_inbound" in text
