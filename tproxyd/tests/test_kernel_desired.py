"""What a configuration asks of the kernel, as golden text; and how the return path is chosen."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.config import Config, ReturnPath
from tproxyd.configfile import parse
from tproxyd.kernel.desired import Facts, desired, notes, return_path
from tproxyd.kernel.firewall import Chain, Goto, Rule, mark_mask
from tproxyd.kernel.state import (
    EMPTY,
    FWMARK_ACCEPT,
    MARK_SYSCTLS,
    OURS,
    REFLECT_V4,
    REFLECT_V6,
    KernelState,
    render,
)
from tproxyd.kernel.words import rule_text

POD = Facts(ipv6=True, host_netns=False)
HOST = Facts(ipv6=True, host_netns=True)
ALL = frozenset(MARK_SYSCTLS)


def config(text: str) -> Config:
    return parse(inspect.cleandoc(text), "test.toml")


def bare(state: KernelState) -> str:
    """The rendered state without the comments."""
    lines = render(state).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def selectors(text: str) -> list[str]:
    """The rules that lead into listeners' chains, for a configuration of one listener."""
    state = desired(config(text), facts=POD)
    chain = state.firewall[0]
    assert isinstance(chain, Chain)
    return [rule_text(r) for r in chain.rules if isinstance(r, Rule) and isinstance(r.action, Goto)]


def test_the_default_in_a_pod() -> None:
    assert bare(desired(Config(), facts=POD)) == inspect.cleandoc(
        """
        ip -4 route add local default dev lo table 133 proto 140
        ip -6 route add local default dev lo table 133 proto 140
        sysctl -w net.ipv4.tcp_fwmark_accept=133
        sysctl -w net.ipv4.fwmark_reflect=133
        sysctl -w net.ipv6.fwmark_reflect=133
        ip -4 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 140
        ip -6 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 140
        chain prerouting at prerouting behind nat:
            in through lo, mark 0x539/0xfff, SYN, meets a transparent socket → jump collided
            in through lo → accept
            not TCP → accept
            not to an address of this host → accept
            not to port 15020-15021, 15090 → goto take_inbound
        chain collided:
            meets a listener on every address → return
            anything → drop
        chain take_inbound:
            IPv4 → tproxy IPv4 to port 15006 and accept, if a socket is there
            IPv6 → tproxy IPv6 to port 15006 and accept, if a socket is there
            SYN → reject with tcp reset
        """
    )


def test_conntrack_on_a_host() -> None:
    assert bare(desired(Config(), facts=HOST)) == inspect.cleandoc(
        """
        ip -4 route add local default dev lo table 133 proto 133
        ip -6 route add local default dev lo table 133 proto 133
        ip -4 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 133
        ip -6 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 133
        chain prerouting at prerouting behind nat:
            in through lo, mark 0x539/0xfff, SYN, meets a transparent socket → jump collided
            in through lo, mark 0x539/0xfff → set connection mark 0x539/0xfff
            in through lo → accept
            not TCP → accept
            not to an address of this host → accept
            not a SYN, an answer → accept
            connection mark 0x539/0xfff, SYN → drop
            not to port 15020-15021, 15090 → goto take_inbound
        chain collided:
            meets a listener on every address → return
            anything → drop
        chain output at output:
            connection mark 0x539/0xfff → set mark 0x539/0xfff
        chain take_inbound:
            IPv4 → tproxy IPv4 to port 15006 and accept, if a socket is there
            IPv6 → tproxy IPv6 to port 15006 and accept, if a socket is there
            SYN → reject with tcp reset
        chain nat_postrouting at postrouting of nat:
            out through lo, mark 0x539/0xfff → keep the IPv4 source from nat
            out through lo, mark 0x539/0xfff → keep the IPv6 source from nat
        """
    )


def test_without_ipv6() -> None:
    facts = Facts(ipv6=False, host_netns=False)
    assert bare(desired(Config(), facts=facts)) == inspect.cleandoc(
        """
        ip -4 route add local default dev lo table 133 proto 136
        sysctl -w net.ipv4.tcp_fwmark_accept=133
        sysctl -w net.ipv4.fwmark_reflect=133
        ip -4 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 136
        chain prerouting at prerouting behind nat:
            in through lo, mark 0x539/0xfff, SYN, meets a transparent socket → jump collided
            in through lo → accept
            not TCP → accept
            not to an address of this host → accept
            not to port 15020-15021, 15090 → goto take_inbound
        chain collided:
            meets a listener on every address → return
            anything → drop
        chain take_inbound:
            IPv4 → tproxy IPv4 to port 15006 and accept, if a socket is there
            SYN → reject with tcp reset
        """
    )
    assert any("no IPv6" in note for note in notes(Config(), facts))
    assert not any("IPv6" in note for note in notes(Config(), POD))


@pytest.mark.parametrize("facts", [POD, HOST], ids=["accept-mark", "conntrack"])
def test_a_drain_keeps_everything_that_brings_answers_home(facts: Facts) -> None:
    whole = desired(Config(), facts=facts)
    drain = desired(Config(), facts=facts, intercept=False)
    assert (drain.sysctls, drain.routes, drain.rules) == (
        whole.sysctls,
        whole.routes,
        whole.rules,
    )
    text = bare(drain)
    assert "meets a transparent socket → jump collided" in text
    assert ("connection mark" in text) == (facts is HOST)
    assert "goto" not in text
    assert "tproxy IPv4" not in text


def test_a_mark_and_a_table_of_ones_own() -> None:
    text = bare(desired(config("mark = 0x20000\ntable = 7"), facts=HOST))
    assert "lookup 7 " in text
    assert "table 7 " in text
    assert "fwmark 0x20000/0xfffff" in text
    assert "set connection mark 0x20000/0xfffff" in text


def test_every_selector() -> None:
    text = """
    [[listener]]
    [listener.intercept]
    ports = [80, "8000-8100"]
    exclude_ports = [8001]
    sources = ["10.0.0.0/8", "fd00::/8"]
    destinations = ["10.1.1.1", "fd01::1"]
    interfaces = ["eth0", "eth1", "veth*"]
    """
    ports = "to port 80, 8000-8100, not to port 8001 → goto take_inbound"
    assert selectors(text) == [
        f"in through {interface}, from {source}, to {destination}, {ports}"
        for interface in ("eth0 or eth1", "veth*")
        for source, destination in (
            ("10.0.0.0/8", "10.1.1.1/32"),
            ("fd00::/8", "fd01::1/128"),
        )
    ]


def test_one_rule_for_both_families_where_no_address_is_given() -> None:
    text = """
    [[listener]]
    intercept = { exclude_ports = [] }
    """
    assert selectors(text) == ["anything → goto take_inbound"]


def test_a_list_of_one_family_takes_nothing_of_the_other() -> None:
    text = """
    [[listener]]
    intercept = { sources = ["10.0.0.0/8"], exclude_ports = [] }
    """
    assert selectors(text) == ["from 10.0.0.0/8 → goto take_inbound"]


def test_families_that_cannot_meet_take_nothing_and_say_so() -> None:
    text = """
    [[listener]]
    intercept = { sources = ["10.0.0.0/8"], destinations = ["fd00::/8"] }
    """
    assert selectors(text) == []
    assert any("inbound takes nothing" in note for note in notes(config(text), POD))
    assert not any("takes nothing" in note for note in notes(Config(), POD))


def test_listeners_in_their_order_with_names_that_clash_with_nothing() -> None:
    text = """
    [[listener]]
    name = "output"
    port = 1001
    intercept = { ports = [80], exclude_ports = [] }
    [[listener]]
    name = "prerouting"
    port = 1002
    intercept = { exclude_ports = [] }
    """
    assert selectors(text) == [
        "to port 80 → goto take_output",
        "anything → goto take_prerouting",
    ]
    state = desired(config(text), facts=HOST)
    names = [chain.name for chain in state.firewall if isinstance(chain, Chain)]
    assert names[:3] == ["prerouting", "collided", "output"]
    assert names[3:] == ["take_output", "take_prerouting", "nat_postrouting"]
    assert "IPv4 → tproxy IPv4 to port 1002" in bare(state)


@pytest.mark.parametrize("facts", [POD, HOST], ids=["accept-mark", "conntrack"])
def test_every_rule_says_why(facts: Facts) -> None:
    for chain in desired(Config(), facts=facts).firewall:
        assert isinstance(chain, Chain)
        for rule in chain.rules:
            assert isinstance(rule, Rule)
            assert rule.comment


@pytest.mark.parametrize(
    ("facts", "path", "word"),
    [
        (POD, ReturnPath.ACCEPT_MARK, "not the host's"),
        (HOST, ReturnPath.CONNTRACK, "the host's"),
        (Facts(True, True, ALL), ReturnPath.CONNTRACK, "the host's"),
        (
            Facts(True, False, sysctls_writable=False),
            ReturnPath.CONNTRACK,
            "cannot be written",
        ),
        (
            Facts(True, False, ALL, sysctls_writable=False),
            ReturnPath.ACCEPT_MARK,
            "set here already",
        ),
    ],
)
def test_return_path_auto(facts: Facts, path: ReturnPath, word: str) -> None:
    choice = return_path(Config(), facts)
    assert choice.path is path
    assert word in choice.why
    assert choice.why in notes(Config(), facts)


@pytest.mark.parametrize("path", [ReturnPath.ACCEPT_MARK, ReturnPath.CONNTRACK])
@pytest.mark.parametrize("facts", [POD, HOST])
def test_return_path_given(path: ReturnPath, facts: Facts) -> None:
    choice = return_path(config(f'rules.return_path = "{path}"'), facts)
    assert choice.path is path
    assert "configuration" in choice.why


@pytest.mark.parametrize(
    ("path", "before", "number"),
    [
        ("accept-mark", frozenset(), 140),
        ("accept-mark", {FWMARK_ACCEPT}, 139),
        ("accept-mark", {REFLECT_V4, REFLECT_V6}, 134),
        ("accept-mark", ALL, OURS),  # they were set before us: nothing to give back
        ("conntrack", frozenset(), OURS),
        ("conntrack", ALL, OURS),
    ],
)
def test_the_number_remembers_the_sysctls(path: str, before: frozenset[str], number: int) -> None:
    facts = Facts(True, True, before)
    state = desired(config(f'rules.return_path = "{path}"'), facts=facts)
    wanted = MARK_SYSCTLS if path == "accept-mark" else ()
    assert {sysctl.name for sysctl in state.sysctls} == set(wanted) - before
    numbers = [getattr(item, "protocol", None) for item in (*state.routes, *state.rules)]
    assert numbers == [number] * 4
    assert state != EMPTY


def test_without_ipv6_its_sysctl_is_left_alone() -> None:
    state = desired(config('rules.return_path = "accept-mark"'), facts=Facts(False, False))
    assert [sysctl.name for sysctl in state.sysctls] == [FWMARK_ACCEPT, REFLECT_V4]


@given(st.integers(1, 0xFFFF_FFFE))
def test_the_mask_covers_the_mark_and_tells_the_listeners_apart(mark: int) -> None:
    mask = mark_mask(mark)
    assert mark & mask == mark
    assert mask.bit_length() % 4 == 0
    assert mask < mark * 16
    assert Config(mark=mark).listener_mark & mask != mark


def test_the_mask_of_the_default() -> None:
    assert mark_mask(Config().mark) == 0xFFF
