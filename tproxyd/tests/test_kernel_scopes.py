"""What routers, remote backends, redirects and outbound interception ask of the kernel: no more."""

from __future__ import annotations

import inspect

import pytest

from tproxyd.config import Config, ReturnPath
from tproxyd.configfile import parse
from tproxyd.kernel.desired import Facts, desired, dials_here, holds_elsewhere, notes
from tproxyd.kernel.firewall import Chain, Rule
from tproxyd.kernel.reconcile import install
from tproxyd.kernel.state import EMPTY, KernelState, Route, render
from tproxyd.kernel.words import rule_text
from tproxyd.tests.fakes import FakeKernel

POD = Facts(ipv6=True, host_netns=False, own=frozenset(("127.0.0.1", "::1", "10.0.0.1", "fd00::1")))
HOST = Facts(ipv6=True, host_netns=True, own=POD.own)

ROUTER = '[[listener]]\nname = "router"\nport = 15001\nintercept = { scope = "forward"%s }\n'
REDIRECT = '[[listener]]\nname = "inbound"\nintercept = { via = "redirect" }\nsource = "%s"\n'
OUTBOUND = """
[[listener]]
name = "outbound"
port = 15001
source = "proxy"
intercept = { scope = "outbound"%s }
"""
GATEWAY = """
[[listener]]
name = "gateway"
bind = "*"
port = 8000
upstream = [%s]
source = "%s"
"""


def config(text: str) -> Config:
    return parse(text, "test.toml")


def bare(state: KernelState) -> str:
    """The rendered state without the comments."""
    lines = render(state).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def chain(state: KernelState, name: str) -> list[str]:
    """The rules of a chain; [] where there is none."""
    found = (each for each in state.firewall if isinstance(each, Chain) and each.name == name)
    return [rule_text(rule) for each in found for rule in each.rules]


def wish(text: str, facts: Facts = POD, *, intercept: bool = True) -> KernelState:
    return desired(config(text), facts=facts, intercept=intercept)


def test_nothing_for_a_gateway_in_its_own_name() -> None:
    text = GATEWAY % ('"10.0.0.5:80", "app.example:80", "127.0.0.1:80"', "proxy")
    assert wish(text) == wish(text, intercept=False) == EMPTY
    assert notes(config(text), Facts(ipv6=False, host_netns=True)) == ()
    kernel = FakeKernel(lo_up=False)  # which is nothing to it
    report = install(config(text), world=kernel)
    assert (report.changed, report.installed, report.return_path) == ((), False, None)


def test_a_router() -> None:
    assert bare(wish(ROUTER % ', interfaces = ["eth0"], ports = [80]')) == inspect.cleandoc(
        """
        ip -4 route add local default dev lo table 133 proto 133
        ip -6 route add local default dev lo table 133 proto 133
        ip -4 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 133
        ip -6 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 133
        chain prerouting at prerouting behind nat:
            in through lo → accept
            ICMP, not to an address of this host, meets a transparent socket → goto home
            not TCP → accept
            not to an address of this host → goto passing
        chain passing:
            not a SYN, meets a transparent socket → goto home
            not a SYN → accept
            in through eth0, to port 80 → goto take_router
        chain home:
            meets a listener on every address → accept
            anything → set mark 0x539/0xfff and accept
        chain defrag:
            IPv4 → tproxy IPv4 to port 9 and accept, if a socket is there
            IPv6 → tproxy IPv6 to port 9 and accept, if a socket is there
        chain take_router:
            IPv4 → tproxy IPv4 to port 15001, set mark 0x539/0xfff and accept, if a socket is there
            IPv6 → tproxy IPv6 to port 15001, set mark 0x539/0xfff and accept, if a socket is there
            SYN → reject with tcp reset
        """
    )


HOME = """
    ip -4 route add local default dev lo table 133 proto 133
    ip -6 route add local default dev lo table 133 proto 133
    ip -4 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 133
    ip -6 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 133
    chain prerouting at prerouting behind nat:
        in through lo → accept
        ICMP, not to an address of this host, meets a transparent socket → goto home
        not TCP → accept
        not to an address of this host → goto passing
    chain passing:
        not a SYN, meets a transparent socket → goto home
    chain home:
        meets a listener on every address → accept
        anything → set mark 0x539/0xfff and accept
    chain defrag:
        IPv4 → tproxy IPv4 to port 9 and accept, if a socket is there
        IPv6 → tproxy IPv6 to port 9 and accept, if a socket is there
    """


def test_answers_of_remote_backends() -> None:
    for source in ("client", "client-port"):
        text = GATEWAY % ('"10.0.0.5:80"', source)
        assert bare(wish(text)) == inspect.cleandoc(HOME)
        assert wish(text) == wish(text, HOST)


def test_a_drain_brings_home_what_a_router_holds() -> None:
    """Nothing is taken then, and what is forwarded is forwarded."""
    assert bare(wish(ROUTER % "", intercept=False)) == inspect.cleandoc(HOME)


def test_redirect_in_our_own_name() -> None:
    assert bare(wish(REDIRECT % "proxy")) == inspect.cleandoc(
        """
        ip -6 route add local ::6/128 dev lo table 255 proto 133
        chain nat_prerouting at prerouting of nat:
            not TCP → accept
            not to an address of this host → accept
            not a SYN → accept
            not to port 15020-15021, 15090 → redirect to port 15006
        """
    )
    without = Facts(ipv6=False, host_netns=False)
    assert wish(REDIRECT % "proxy", without).routes == ()
    assert any("no IPv6" in note for note in notes(config(REDIRECT % "proxy"), without))


@pytest.mark.parametrize("facts", [POD, HOST], ids=["accept-mark", "conntrack"])
def test_redirect_in_the_clients_name(facts: Facts) -> None:
    """Both guards: by the socket, and by what connection tracking makes of our SYN."""
    state = wish(REDIRECT % "client", facts)
    assert {route.slot for route in state.routes} == {(4, 133, "default"), (6, 133, "default")}
    guards = [
        "meets a transparent socket → jump collided",
        "of an established connection → drop",
    ]
    assert chain(state, "prerouting")[:2] == [
        f"in through lo, mark 0x539/0xfff, SYN, {guard}" for guard in guards
    ]
    taken = "connection mark 0x539/0xfff, SYN → drop"
    assert (taken in chain(state, "prerouting")) == (facts is HOST)
    assert chain(state, "nat_prerouting")[-1].endswith("redirect to port 15006")
    assert not chain(state, "take_inbound")


def test_outbound() -> None:
    more = ", exclude_uids = [1337, 1338, 0], exclude_gids = [7]"
    more += ', exclude_destinations = ["10.0.0.0/8"]'
    rest = "not made by uid 0, 1337-1338, not made by gid 7 → redirect to port 15001"
    assert bare(wish(OUTBOUND % more)) == inspect.cleandoc(
        f"""
        chain nat_output at output of nat:
            mark 0x53a/0xfff → accept
            mark 0x539/0xfff → accept
            not TCP → accept
            to an address of this host → accept
            not a SYN → accept
            not to 10.0.0.0/8, {rest}
            IPv6, {rest}
        """
    )


def test_the_mark_that_outbound_knows_us_by_is_compared_whole() -> None:
    """0xfff and the next number differ in a digit that the mask of the first has not."""
    rules = chain(wish("mark = 0xfff\n" + OUTBOUND % ""), "nat_output")
    assert rules[:2] == ["mark 0x1000/0xffff → accept", "mark 0xfff/0xfff → accept"]


def test_a_drain_keeps_the_translation_of_living_connections() -> None:
    assert bare(wish(REDIRECT % "proxy" + OUTBOUND % "", intercept=False)) == inspect.cleandoc(
        """
        ip -6 route add local ::6/128 dev lo table 255 proto 133
        chain nat_prerouting at prerouting of nat:
            of an established connection → accept
        chain nat_output at output of nat:
            of an established connection → accept
        """
    )


def test_the_first_listener_that_matches_whichever_way_it_takes() -> None:
    text = """
    [[listener]]
    name = "one"
    port = 1
    intercept = { ports = [1], exclude_ports = [] }
    [[listener]]
    name = "two"
    port = 20
    intercept = { ports = [2], exclude_ports = [], via = "redirect" }
    [[listener]]
    name = "three"
    port = 3
    intercept = { exclude_ports = [] }
    """
    state = wish(text)
    # What nat has redirected comes to the listener's own port.
    assert chain(state, "prerouting")[-3:] == [
        "to port 20 → accept",
        "to port 1 → goto take_one",
        "anything → goto take_three",
    ]
    # What listener three takes is asked for behind the last redirect: no rule for it.
    assert chain(state, "nat_prerouting")[-2:] == [
        "to port 1 → accept",
        "to port 2 → redirect to port 20",
    ]


def test_excluded_destinations() -> None:
    """Of one family they leave the other whole; without a match for a family nothing is left."""
    both = ', exclude_destinations = ["10.0.0.0/8", "192.0.2.1", "fd00::/8"]'
    one = ', exclude_destinations = ["fd00::/8"], destinations = ["fc00::/7", "10.0.0.0/8"]'
    none = ', exclude_destinations = ["fd00::/8"], destinations = ["10.0.0.0/8"]'
    assert chain(wish(ROUTER % both), "passing")[2:] == [
        "not to 10.0.0.0/8 nor 192.0.2.1/32 → goto take_router",
        "not to fd00::/8 → goto take_router",
    ]
    assert chain(wish(ROUTER % one), "passing")[2:] == [
        "to 10.0.0.0/8 → goto take_router",
        "to fc00::/7, not to fd00::/8 → goto take_router",
    ]
    assert chain(wish(ROUTER % none), "passing")[2:] == ["to 10.0.0.0/8 → goto take_router"]


INTERCEPTING = '[[listener]]\nupstream = [%s]\nsource = "%s"\n'
TRUSTING = '[[listener.proxy_protocol]]\nfrom = ["10.0.0.0/8"]\npolicy = "require"\n'


@pytest.mark.parametrize(
    ("text", "here", "elsewhere"),
    [
        ("", True, False),
        ('[[listener]]\nsource = "proxy"\n', False, False),
        (ROUTER % "", False, True),
        (ROUTER % "" + 'source = "proxy"\n', False, True),
        (ROUTER % "" + 'upstream = ["10.0.0.1:80"]\n', True, True),
        (GATEWAY % ('"10.0.0.5:80"', "client"), False, True),
        (GATEWAY % ('"app.example:80"', "client"), True, True),
        (GATEWAY % ('"10.0.0.1:80"', "client"), True, False),
        (GATEWAY % ('"[fd00::1]:80"', "client-port"), True, False),
        (GATEWAY % ('"127.1.2.3:80"', "client"), True, False),
        (GATEWAY % ('"[::1]:80"', "client"), True, False),
        (GATEWAY % ('"0.0.0.0:80"', "client"), True, False),
        (GATEWAY % ('"127.0.0.1:80", "10.0.0.5:80"', "client"), True, True),
        (GATEWAY % ('"unix:/run/app.sock"', "proxy"), False, False),
        (INTERCEPTING % ('"10.0.0.5:80"', "client"), False, True),
        (INTERCEPTING % ('"10.0.0.5:80"', "proxy"), False, False),
        (INTERCEPTING % ('"10.0.0.1:80"', "client"), True, False),
        (REDIRECT % "proxy", False, False),
        (REDIRECT % "client", True, False),
        (OUTBOUND % "", False, False),
        # A local client's own address: its answers are for this host.
        ((OUTBOUND % "").replace('"proxy"', '"client"'), False, False),
        # Behind a header it may be anybody's.
        ((OUTBOUND % "").replace('"proxy"', '"client"') + TRUSTING, False, True),
        (OUTBOUND % "" + TRUSTING, False, False),
    ],
)
def test_what_needs_a_way_home(text: str, here: bool, elsewhere: bool) -> None:
    read = config(text)
    assert dials_here(read, POD) == here
    assert holds_elsewhere(read, POD) == elsewhere
    state = desired(read, facts=POD)
    assert bool(state.sysctls) == here
    assert bool(state.rules) == (here or elsewhere)
    assert any(isinstance(each, Route) and each.table == 133 for each in state.routes) == (
        here or elsewhere
    )
    assert any("return path" in note for note in notes(read, POD)) == here
    report = install(read, world=FakeKernel(own=POD.own))
    assert report.return_path is (ReturnPath.ACCEPT_MARK if here else None)


@pytest.mark.parametrize(
    "text",
    [
        ROUTER % "" + OUTBOUND.replace("15001", "15002") % "",
        REDIRECT % "client" + GATEWAY % ('"app.example:80"', "client"),
        REDIRECT % "proxy",
    ],
)
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("facts", [POD, HOST], ids=["accept-mark", "conntrack"])
def test_every_rule_says_why(text: str, intercept: bool, facts: Facts) -> None:
    for each in wish(text, facts, intercept=intercept).firewall:
        assert isinstance(each, Chain)
        for rule in each.rules:
            assert isinstance(rule, Rule)
            assert rule.comment
