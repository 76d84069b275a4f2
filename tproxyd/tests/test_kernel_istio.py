"""The istio scheme against what istio-iptables programs.

The lines are what the tests of istio/istio expect of that tool for the same settings
(tools/istio-iptables/pkg/capture/testdata), in the layout of iptables-save.
"""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network

import pytest

from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.config import (
    Backend,
    Config,
    Intercept,
    Listener,
    ReturnPath,
    Rules,
    Scheme,
    Scope,
    Via,
)
from tproxyd.errors import KernelError
from tproxyd.istio.options import ALL, IstioOptions, Mode
from tproxyd.kernel import istio
from tproxyd.kernel.desired import Facts, desired, desired_istio, notes
from tproxyd.kernel.firewall import Chain, Family, Rule
from tproxyd.kernel.iptread import parse
from tproxyd.kernel.istioconfig import istio_options
from tproxyd.kernel.nftlang import render
from tproxyd.kernel.reconcile import check, check_istio, clean, clean_istio, install, install_istio
from tproxyd.kernel.state import OURS, Address, PolicyRule, Route
from tproxyd.kernel.words import rule_text
from tproxyd.tests.fakes import FakeKernel

FACTS = Facts(ipv6=True, host_netns=False)
TPROXY = IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL, ipv6=False)
NOTHING = IstioOptions(ipv6=False)


def expected(text: str, family: Family = 4) -> dict[tuple[str, str], list[object]]:
    """Rules by table and chain, of "table CHAIN rule" lines."""
    found: dict[tuple[str, str], list[object]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        table, chain, *rule = line.split(" ", 2)
        found.setdefault((table, chain), []).extend(parse(each, family) for each in rule)
    return found


def made(options: IstioOptions, family: Family = 4) -> dict[tuple[str, str], list[object]]:
    chains = istio.chains(options, family)
    return {
        (str(each.table), each.name): list(each.rules)
        for each in chains
        if isinstance(each, Chain) and each.name != istio.MARKER
    }


def in_words(rules: list[object]) -> list[str]:
    return [rule_text(rule) for rule in rules if isinstance(rule, Rule)]


NAT = """
    nat OUTPUT -j ISTIO_OUTPUT
    nat ISTIO_INBOUND -p tcp -m tcp --dport 15008 -j RETURN
    nat ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
    nat ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
    nat ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
    nat ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008 \
        -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
    nat ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
    nat ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
    nat ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008 \
        -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
    nat ISTIO_OUTPUT -o lo -m owner ! --gid-owner 1337 -j RETURN
    nat ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
    nat ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
"""
MANGLE = """
    mangle PREROUTING -p tcp -j ISTIO_INBOUND
    mangle PREROUTING -p tcp -m mark --mark 0x539 -j CONNMARK --save-mark
    mangle OUTPUT -o lo -p tcp -m mark --mark 0x539 -j RETURN
    mangle OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m owner --uid-owner 1337 -j MARK --set-xmark 0x53a
    mangle OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m owner --gid-owner 1337 -j MARK --set-xmark 0x53a
    mangle OUTPUT -p tcp -m connmark --mark 0x539 -j CONNMARK --restore-mark
    mangle ISTIO_DIVERT -j MARK --set-xmark 0x539
    mangle ISTIO_DIVERT -j ACCEPT
    mangle ISTIO_TPROXY ! -d 127.0.0.1/32 -p tcp -j TPROXY \
        --on-port 15006 --tproxy-mark 0x539/0xffffffff
    mangle ISTIO_INBOUND -p tcp -m mark --mark 0x539 -j RETURN
    mangle ISTIO_INBOUND -s 127.0.0.6/32 -i lo -p tcp -j RETURN
    mangle ISTIO_INBOUND -i lo -p tcp -m mark ! --mark 0x53a -j RETURN
"""
TAKE_ALL = """
    mangle ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
    mangle ISTIO_INBOUND -p tcp -j ISTIO_TPROXY
"""


def test_without_a_flag() -> None:
    assert made(NOTHING) == expected(NAT)


def test_tproxy() -> None:
    assert made(TPROXY) == expected(NAT + MANGLE + TAKE_ALL)


def test_tproxy_over_ipv6() -> None:
    both = IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL)
    text = (NAT + MANGLE + TAKE_ALL).replace("127.0.0.6/32", "::6/128")
    assert made(both, 6) == expected(text.replace("127.0.0.1/32", "::1/128"), 6)
    assert made(both, 4) == made(TPROXY)


def test_excluded_ports_come_before_the_rest() -> None:
    options = IstioOptions(
        mode=Mode.TPROXY,
        inbound_ports=ALL,
        inbound_exclude_ports=((22, 22), (80, 81)),
        ipv6=False,
    )
    excluded = """
    mangle ISTIO_INBOUND -p tcp -m tcp --dport 22 -j RETURN
    mangle ISTIO_INBOUND -p tcp -m tcp --dport 80:81 -j RETURN
    """
    assert made(options) == expected(NAT + MANGLE + excluded + TAKE_ALL)


def test_a_list_of_ports_without_the_excluded_ones() -> None:
    options = IstioOptions(
        mode=Mode.TPROXY,
        inbound_ports=((32000, 32000), (31000, 31000), (80, 80)),
        inbound_exclude_ports=((80, 80),),
        ipv6=False,
    )
    ports = """
    mangle ISTIO_INBOUND -p tcp -m tcp --dport 32000 \
        -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
    mangle ISTIO_INBOUND -p tcp -m tcp --dport 32000 -j ISTIO_TPROXY
    mangle ISTIO_INBOUND -p tcp -m tcp --dport 31000 \
        -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
    mangle ISTIO_INBOUND -p tcp -m tcp --dport 31000 -j ISTIO_TPROXY
    """
    assert made(options) == expected(NAT + MANGLE + ports)


def test_redirect() -> None:
    take = """
    nat PREROUTING -p tcp -j ISTIO_INBOUND
    nat ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
    """
    assert made(IstioOptions(inbound_ports=ALL, ipv6=False)) == expected(NAT + take)
    take = take.replace("_INBOUND -p tcp -j", "_INBOUND -p tcp -m tcp --dport 80 -j")
    assert made(IstioOptions(inbound_ports=((80, 80),), ipv6=False)) == expected(NAT + take)


def test_interfaces() -> None:
    options = IstioOptions(
        mode=Mode.TPROXY,
        inbound_ports=ALL,
        outbound_ranges=(ip_network("10.0.0.0/8"),),
        exclude_interfaces=("nic", "veth+"),
        virtual_interfaces=("eth1", "eth2"),
        ipv6=False,
    )
    excluded = "".join(
        f"{table} PREROUTING -i {nic} -j RETURN\n{table} OUTPUT -o {nic} -j RETURN\n"
        for table in ("nat", "mangle")
        for nic in ("nic", "veth+")
    )
    virtual = """\
nat PREROUTING -d 10.0.0.0/8 -i eth2 -j ISTIO_REDIRECT
nat PREROUTING -d 10.0.0.0/8 -i eth1 -j ISTIO_REDIRECT
nat PREROUTING -i eth2 -j RETURN
nat PREROUTING -i eth1 -j RETURN
"""
    rest = NAT + MANGLE + TAKE_ALL
    end = "nat ISTIO_OUTPUT -d 10.0.0.0/8 -j ISTIO_REDIRECT\n"
    assert made(options) == expected(virtual + excluded + rest + end)


def test_outbound() -> None:
    options = IstioOptions(
        outbound_ranges=ALL,
        outbound_exclude_ranges=(ip_network("1.1.0.0/16"), ip_network("2001:db8::/32")),
        outbound_ports=((32000, 32000),),
        outbound_exclude_ports=((91, 91),),
        owner_groups_exclude=(888,),
        loopback=IPv4Network("127.0.0.0/8"),
    )
    output = in_words(made(options)["nat", "ISTIO_OUTPUT"])
    assert output[:3] == [
        "to port 91 → return",
        "UDP to port 91 → return",
        "out through lo, from 127.0.0.6/32 → return",
    ]
    assert output[-5:] == [
        "made by gid 888 → return",
        "to 127.0.0.0/8 → return",
        "to 1.1.0.0/16 → return",
        "to port 32000 → jump ISTIO_REDIRECT",
        "anything → jump ISTIO_REDIRECT",
    ]
    output = in_words(made(options, 6)["nat", "ISTIO_OUTPUT"])
    assert output[-4:-2] == ["to ::1/128 → return", "to 2001:db8::/32 → return"]


def test_a_range_of_the_loopback_lets_its_calls_be_looked_at() -> None:
    options = IstioOptions(outbound_ranges=(ip_network("127.1.2.3/32"),), ipv6=False)
    text = "".join(line for line in NAT.splitlines(True) if "-o lo -m owner !" not in line)
    text += "    nat ISTIO_OUTPUT -d 127.1.2.3/32 -j ISTIO_REDIRECT\n"
    assert made(options) == expected(text)


@pytest.mark.parametrize(
    ("groups", "rule"),
    [
        ((202, 7), "-m owner ! --gid-owner 202 -m owner ! --gid-owner 7 -j RETURN"),
        ((), "-j RETURN"),
    ],
)
def test_only_some_groups(groups: tuple[int, ...], rule: str) -> None:
    lines = NAT.splitlines(True)
    lines.insert(-1, f"    nat ISTIO_OUTPUT {rule}\n")
    assert made(IstioOptions(owner_groups=groups, ipv6=False)) == expected("".join(lines))


def test_invalid_packets() -> None:
    drop = """
    mangle PREROUTING -m conntrack --ctstate INVALID -j ISTIO_DROP
    mangle ISTIO_DROP -j DROP
    """
    assert made(IstioOptions(drop_invalid=True, ipv6=False)) == expected(NAT + drop)


def test_dns() -> None:
    options = IstioOptions(
        redirect_dns=True,
        dns_servers_v4=("127.0.0.53",),
        proxy_uids=(3,),
        proxy_gids=(1,),
    )
    assert made(options) == expected("""
    nat OUTPUT -j ISTIO_OUTPUT
    nat ISTIO_INBOUND -p tcp -m tcp --dport 15008 -j RETURN
    nat ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
    nat ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
    nat ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
    nat ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m multiport ! --dports 53,15008 \
        -m owner --uid-owner 3 -j ISTIO_IN_REDIRECT
    nat ISTIO_OUTPUT -o lo -p tcp -m tcp ! --dport 53 -m owner ! --uid-owner 3 -j RETURN
    nat ISTIO_OUTPUT -m owner --uid-owner 3 -j RETURN
    nat ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008 \
        -m owner --gid-owner 1 -j ISTIO_IN_REDIRECT
    nat ISTIO_OUTPUT -o lo -p tcp -m tcp ! --dport 53 -m owner ! --gid-owner 1 -j RETURN
    nat ISTIO_OUTPUT -m owner --gid-owner 1 -j RETURN
    nat ISTIO_OUTPUT -j ISTIO_OUTPUT_DNS
    nat ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
    nat ISTIO_OUTPUT_DNS -d 127.0.0.53/32 -p tcp -m tcp --dport 53 -j REDIRECT --to-ports 15053
    nat ISTIO_OUTPUT_DNS -d 127.0.0.53/32 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
    raw OUTPUT -j ISTIO_OUTPUT_DNS
    raw ISTIO_OUTPUT_DNS -p udp -m udp --dport 53 -m owner --uid-owner 3 -j CT --zone 1
    raw ISTIO_OUTPUT_DNS -p udp -m udp --sport 15053 -m owner --uid-owner 3 -j CT --zone 2
    raw ISTIO_OUTPUT_DNS -p udp -m udp --dport 53 -m owner --gid-owner 1 -j CT --zone 1
    raw ISTIO_OUTPUT_DNS -p udp -m udp --sport 15053 -m owner --gid-owner 1 -j CT --zone 2
    raw ISTIO_OUTPUT_DNS -d 127.0.0.53/32 -p udp -m udp --dport 53 -j CT --zone 2
    raw PREROUTING -j ISTIO_INBOUND
    raw ISTIO_INBOUND -s 127.0.0.53/32 -p udp -m udp --sport 53 -j CT --zone 1
    """)
    six = made(options, 6)
    assert ("nat", "ISTIO_OUTPUT_DNS") not in six
    assert ("raw", "PREROUTING") not in six
    assert len(six["raw", "ISTIO_OUTPUT_DNS"]) == 4


def test_each_table_says_that_it_is_ours() -> None:
    tables = {each.table for each in istio.chains(TPROXY, 4) if isinstance(each, Chain)}
    marked = [
        each.table
        for each in istio.chains(TPROXY, 4)
        if isinstance(each, Chain) and each.name == "TPROXYD_ISTIO"
    ]
    assert sorted(marked) == sorted(tables)


# Under nft ----------------------------------------------------------------------------------------


def test_both_ip_versions_in_one_table() -> None:
    chains = {
        each.name: [rule_text(rule) for rule in each.rules]
        for each in istio.nft_chains(IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL))
        if isinstance(each, Chain)
    }
    assert chains["mangle_PREROUTING"] == [
        "TCP → jump mangle_ISTIO_INBOUND",
        "TCP, mark 0x539/0xffffffff → the connection gets the packet's mark",
    ]
    assert chains["mangle_ISTIO_INBOUND"] == [
        "TCP, mark 0x539/0xffffffff → return",
        "in through lo, TCP, from 127.0.0.6/32 → return",
        "in through lo, TCP, from ::6/128 → return",
        "in through lo, TCP, not mark 0x53a/0xffffffff → return",
        "TCP, of an established or related connection → jump mangle_ISTIO_DIVERT",
        "TCP → jump mangle_ISTIO_TPROXY",
    ]
    tproxy = chains["mangle_ISTIO_TPROXY"]
    assert [line.split(" → ")[1].split()[0] for line in tproxy] == [
        *("tproxy", "tproxy", "reject", "reject")
    ]


def test_a_rule_of_one_ip_version_says_so_there() -> None:
    options = IstioOptions(
        redirect_dns=True, dns_servers_v4=("192.0.2.1",), outbound_ranges=(ip_network("::/1"),)
    )
    text = render(istio.nft_chains(options))
    assert "\t\tmeta nfproto ipv4 jump nat_ISTIO_OUTPUT_DNS\n" in text
    assert "\t\tip6 daddr ::/1 jump nat_ISTIO_REDIRECT\n" in text
    assert "\t\tip daddr 192.0.2.1 udp dport 53 redirect to :15053\n" in text


# The rest of the state ----------------------------------------------------------------------------


def test_routes_and_address() -> None:
    both = IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL, mark=7, table=8)
    state = desired_istio(both, Backend.NFT)
    assert state.routes == (Route(4, 8, OURS), Route(6, 8, OURS))
    assert state.rules == tuple(
        PolicyRule(family, 1337, 7, 0xFFFF_FFFF, 8, OURS) for family in (4, 6)
    )
    assert state.addresses == (Address("::6", OURS),)
    redirect = desired_istio(IstioOptions(inbound_ports=ALL), Backend.NFT)
    assert (redirect.routes, redirect.rules) == ((), ())
    assert redirect.addresses == state.addresses
    assert desired_istio(TPROXY, Backend.NFT).addresses == ()


@pytest.mark.parametrize("chosen", list(Backend)[1:])
def test_install_twice_and_clean(chosen: Backend) -> None:
    kernel = FakeKernel()
    before = str(kernel)
    options = IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL)
    assert install_istio(options, chosen, world=kernel).changed
    assert install_istio(options, chosen, world=kernel).changed == ()
    assert check_istio(options, chosen, world=kernel).differs == ()
    assert clean_istio(options, world=kernel).changed
    assert str(kernel) == before


def test_room_is_made_just_before_the_first_write() -> None:
    kernel = FakeKernel()
    order: list[str] = []
    kernel.before_write = lambda change: order.append("write")

    def make_room() -> list[str]:
        order.append("room")
        return ["remove the old rule"]

    report = install_istio(TPROXY, make_room=make_room, world=kernel)
    assert order[0] == "room"
    assert order.count("room") == 1
    assert report.changed[0] == "remove the old rule"


def test_no_room_is_made_before_all_is_read() -> None:
    """What intercepts there would have lost its way home."""
    kernel = FakeKernel()
    kernel.unreadable = KernelError("read the tables", "no iptc", "install it")

    def make_room() -> list[str]:
        pytest.fail("room was made")

    with pytest.raises(KernelError, match="no iptc"):
        install_istio(TPROXY, make_room=make_room, world=kernel)


# In a configuration -------------------------------------------------------------------------------


def config(*listeners: Listener, return_path: ReturnPath = ReturnPath.AUTO) -> Config:
    rules = Rules(scheme=Scheme.ISTIO, return_path=return_path)
    return Config(rules=rules, listeners=listeners or (Listener(),))


OUTBOUND = Intercept(
    Scope.OUTBOUND,
    Via.REDIRECT,
    exclude_ports=((22, 22),),
    exclude_destinations=PrefixSet([parse_prefix("10.0.0.0/8")]),
    exclude_uids=(1337,),
)


def test_a_configuration_in_that_tools_words() -> None:
    assert istio_options(config(), ipv6=True) == IstioOptions(
        mode=Mode.TPROXY,
        inbound_ports=ALL,
        inbound_exclude_ports=((15020, 15021), (15090, 15090)),
    )
    inbound = Listener(port=5, intercept=Intercept(via=Via.REDIRECT, ports=((80, 90),)))
    ordinary = Listener("web", bind="*", port=8000)
    outbound = Listener("out", port=6, intercept=OUTBOUND)
    assert istio_options(config(inbound, ordinary, outbound), ipv6=False) == IstioOptions(
        inbound_port=5,
        inbound_ports=((80, 90),),
        inbound_exclude_ports=((15020, 15021), (15090, 15090), (8000, 8000)),
        proxy_port=6,
        outbound_ranges=ALL,
        outbound_exclude_ranges=(ip_network("10.0.0.0/8"),),
        outbound_exclude_ports=((22, 22),),
        proxy_uids=(1337,),
        proxy_gids=(),
        ipv6=False,
    )


@pytest.mark.parametrize(
    ("listeners", "why"),
    [
        ((Listener("a", port=1), Listener("b", port=2)), "two listeners with scope"),
        ((Listener(intercept=Intercept(Scope.FORWARD)),), "only pass through this host"),
        ((Listener(intercept=Intercept(interfaces=("eth0",))),), "intercept.interfaces"),
        (
            (Listener(intercept=Intercept(sources=PrefixSet([parse_prefix("10.0.0.0/8")]))),),
            "intercept.sources",
        ),
        (
            (Listener(intercept=Intercept(Scope.OUTBOUND, Via.REDIRECT)),),
            "does not say as whom this proxy runs; intercept.exclude_uids",
        ),
    ],
)
def test_what_that_tool_cannot_be_told(listeners: tuple[Listener, ...], why: str) -> None:
    with pytest.raises(KernelError, match=why):
        desired(config(*listeners), facts=FACTS)


def test_accept_mark_is_not_istios() -> None:
    with pytest.raises(KernelError, match="accept-mark"):
        desired(config(return_path=ReturnPath.ACCEPT_MARK), facts=FACTS)


def test_a_configuration_is_installed() -> None:
    kernel = FakeKernel()
    before = str(kernel)
    assert install(config(), world=kernel).return_path is ReturnPath.CONNTRACK
    assert check(config(), world=kernel).differs == ()
    assert not any(kernel.sysctls.values())
    clean(world=kernel)
    assert str(kernel) == before


def test_a_drain_keeps_the_way_home() -> None:
    state = desired(config(), facts=FACTS, intercept=False)
    chains = [each for each in state.firewall if isinstance(each, Chain)]
    rules = [rule_text(rule) for each in chains for rule in each.rules if isinstance(rule, Rule)]
    assert not any("tproxy" in rule for rule in rules)
    assert any("the packet gets the connection's mark" in rule for rule in rules)
    assert len(state.routes) == len(state.rules) == 2


def test_what_it_cannot_do_is_said() -> None:
    assert any("SYN cookies" in note for note in notes(config(), FACTS))
