"""Whose word counts, and where a connection then goes, as whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import (
    Client,
    Endpoint,
    OriginalDst,
    Peer,
    PrefixSet,
    Upstream,
    fold,
    parse_prefix,
)
from tproxyd.config import HeaderPolicy, Intercept, Listener, ProxyProtocol, Scope, SourceKind, Via
from tproxyd.errors import CloseReason
from tproxyd.flow.policy import Plan, Refusal, client_of, is_own, own_sockets, plan_for, trust
from tproxyd.flow.proxyproto import Header, encode_v2, parse

PEER = Peer(Endpoint("10.9.1.2", 40000))
DST = OriginalDst(Endpoint("10.9.1.1", 80))
DST6 = OriginalDst(Endpoint("fd00::1", 80))
FAR = Endpoint("106.52.131.116", 51234)
FAR6 = Endpoint("2001:db8::7", 51234)
OWN_PORTS = {15006, 15007}
OWN = own_sockets(Listener(port=port) for port in OWN_PORTS)

hosts = st.ip_addresses().map(str).map(fold)


def entry(policy: str, *prefixes: str) -> ProxyProtocol:
    return ProxyProtocol(PrefixSet(map(parse_prefix, prefixes)), HeaderPolicy(policy))


def header(source: Endpoint | None) -> Header:
    return Header(2, 28, source is None, source, None)


def plan(
    dst: OriginalDst = DST,
    claim: Header | None = None,
    source: str = "client",
    kind: str = "",
    peer: Peer = PEER,
) -> Plan | Refusal:
    """The two questions, one after the other, for where the client meant to go on this host."""
    listener = Listener(source=SourceKind(source))
    client = client_of(peer, dst, claim, listener, OWN, lambda _host: kind)
    if isinstance(client, Refusal):
        return client
    return plan_for(client, Upstream(dst), listener, here=True)


# Trust --------------------------------------------------------------------------------------------


@given(hosts)
def test_without_entries_nobody_is_asked(host: str) -> None:
    assert trust(())(host) is None


def test_the_first_match_wins() -> None:
    narrow, wide = entry("require", "10.9.1.2"), entry("reject", "10.0.0.0/8")
    assert trust((narrow, wide))("10.9.1.2") is HeaderPolicy.REQUIRE
    assert trust((wide, narrow))("10.9.1.2") is HeaderPolicy.REJECT
    assert trust((narrow, wide))("10.9.1.3") is HeaderPolicy.REJECT
    assert trust((narrow, wide))("11.9.1.3") is None


def test_an_entry_of_no_prefix_matches_nobody() -> None:
    assert trust((entry("require"), entry("optional", "::/0")))("10.9.1.2") is None


@given(hosts, st.lists(st.sampled_from(list(HeaderPolicy)), min_size=1, max_size=4), st.data())
def test_widening_an_entry_only_adds_peers(
    host: str, policies: list[HeaderPolicy], data: st.DataObject
) -> None:
    """Whoever matched an entry still does when its prefix grows; who matches none is not asked."""
    of_host = parse_prefix(host)
    lengths = [
        data.draw(st.integers(0, of_host.prefixlen), label="prefix length") for _ in policies
    ]
    narrow = tuple(
        ProxyProtocol(PrefixSet([of_host.supernet(new_prefix=length)]), policy)
        for length, policy in zip(lengths, policies, strict=True)
    )
    wider = tuple(
        ProxyProtocol(PrefixSet([of_host.supernet(new_prefix=length // 2)]), policy)
        for length, policy in zip(lengths, policies, strict=True)
    )
    assert trust(narrow)(host) is trust(wider)(host) is policies[0]
    stranger = data.draw(hosts, label="another host")
    expected = next((e.policy for e in narrow if stranger in e.peers), None)
    assert trust(narrow)(stranger) is expected
    if expected is not None:
        assert trust(wider)(stranger) is not None


def test_an_answer_for_one_host_is_not_anothers() -> None:
    """The answers are cached."""
    ask = trust((entry("require", "10.9.1.2"),))
    for _ in range(3):
        assert ask("10.9.1.2") is HeaderPolicy.REQUIRE
        assert ask("10.9.1.3") is None


# Plans --------------------------------------------------------------------------------------------


def test_a_peer_speaks_for_itself() -> None:
    assert plan() == Plan(PEER, DST, spoof=True)  # type: ignore[arg-type]


def test_a_header_speaks_for_its_client() -> None:
    assert plan(claim=header(FAR)) == Plan(FAR, DST, spoof=True)  # type: ignore[arg-type]


def test_a_header_without_endpoints_leaves_the_real_ones() -> None:
    assert plan(claim=header(None)) == plan()


def test_the_proxy_as_the_source() -> None:
    told = plan(claim=header(FAR), source="proxy")
    assert told == Plan(FAR, DST, spoof=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(("claim", "dst"), [(FAR, DST6), (FAR6, DST)])
def test_families_that_do_not_meet(claim: Endpoint, dst: OriginalDst) -> None:
    told = plan(dst, header(claim))
    assert told == Plan(claim, dst, spoof=False, fallback="family")  # type: ignore[arg-type]


def test_asked_for_the_proxy_it_is_no_fallback() -> None:
    told = plan(DST6, header(FAR), source="proxy")
    assert isinstance(told, Plan)
    assert told.fallback == ""


def test_a_mapped_claim_is_of_version_four() -> None:
    parsed = parse(encode_v2(Endpoint("::ffff:106.52.131.116", 51234), Endpoint("fd00::1", 80)))
    assert isinstance(parsed, Header)
    told = plan(claim=parsed)
    assert told == Plan(FAR, DST, spoof=True)  # type: ignore[arg-type]


FORWARD = Intercept(scope=Scope.FORWARD)
REDIRECT = Intercept(via=Via.REDIRECT)


def test_to_another_host() -> None:
    listener = Listener(intercept=FORWARD)
    told = plan_for(Client(PEER), Upstream(DST), listener, here=False)
    assert told == Plan(Client(PEER), Upstream(DST), spoof=True, here=False)


def test_the_clients_own_port() -> None:
    listener = Listener(intercept=FORWARD, source=SourceKind.CLIENT_PORT)
    assert plan_for(Client(PEER), Upstream(DST), listener, here=False).keep_port


@pytest.mark.parametrize(("client", "dst"), [("127.0.0.1", DST), ("::1", DST6)])
def test_a_loopback_address_stays_on_its_host(client: str, dst: OriginalDst) -> None:
    listener, who = Listener(bind="*"), Client(Endpoint(client, 40000))
    told = plan_for(who, Upstream(dst), listener, here=False)
    assert told == Plan(who, Upstream(dst), spoof=False, fallback="loopback", here=False)
    assert plan_for(who, Upstream(dst), listener, here=True).spoof


@pytest.mark.parametrize(
    ("client", "dst"),
    [("fe80::1%eth0", "fd00::1"), ("fe80::1", "fd00::1"), ("fd00::2", "fe80::2%eth0")],
)
def test_a_link_local_address_belongs_to_its_link(client: str, dst: str) -> None:
    who, there = Client(Endpoint(client, 40000)), Upstream(Endpoint(dst, 80))
    told = plan_for(who, there, Listener(), here=True)
    assert told == Plan(who, there, spoof=False, fallback="link-local", here=True)


def test_a_backend_that_is_the_client_sees_the_proxy() -> None:
    """It would take its own address, coming from outside, for a forgery."""
    listener, who = Listener(bind="*"), Client(Endpoint(DST.host, 40000))
    assert plan_for(who, Upstream(DST), listener, here=False).fallback == "hairpin"
    assert plan_for(who, Upstream(DST), listener, here=True).spoof


@pytest.mark.parametrize(("dst", "own"), [(DST, "127.0.0.6"), (DST6, "::6")])
def test_what_was_redirected_comes_from_istios_addresses(dst: OriginalDst, own: str) -> None:
    listener = Listener(intercept=REDIRECT, source=SourceKind.PROXY)
    assert plan_for(Client(PEER), Upstream(dst), listener, here=True).own == own
    outbound = Listener(
        intercept=Intercept(scope=Scope.OUTBOUND, via=Via.REDIRECT), source=SourceKind.PROXY
    )
    assert plan_for(Client(PEER), Upstream(dst), outbound, here=False).own == ""


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", sorted(OWN_PORTS))
@pytest.mark.parametrize("claim", [None, header(FAR), header(None)])
def test_a_loop(port: int, claim: Header | None) -> None:
    told = plan(OriginalDst(Endpoint("10.9.1.1", port)), claim)
    assert told == Refusal(CloseReason.LOOP, f"the destination 10.9.1.1:{port} is our own listener")


def asked(listener: Listener, dst: Endpoint, kind: str) -> Client | Refusal:
    return client_of(PEER, OriginalDst(dst), None, listener, OWN, lambda _host: kind)


def test_our_port_on_another_host_is_no_loop() -> None:
    listener, dst = Listener(intercept=FORWARD), Endpoint("10.9.1.1", 15006)
    assert asked(listener, dst, "") == Client(PEER)
    assert isinstance(asked(listener, dst, "own"), Refusal)


@pytest.mark.parametrize(
    ("bind", "ours", "not_ours"),
    [
        ("", ["10.9.1.1", "fd00::1"], []),
        ("*", ["10.9.1.1", "fd00::1"], []),
        ("0.0.0.0", ["10.9.1.1", "127.0.0.1"], ["fd00::1"]),
        ("::", ["fd00::1", "::1"], ["10.9.1.1"]),
        ("10.9.1.1", ["10.9.1.1"], ["10.9.1.2", "127.0.0.1", "fd00::1"]),
    ],
)
def test_where_we_listen_ourselves(bind: str, ours: list[str], not_ours: list[str]) -> None:
    own = own_sockets([Listener(bind=bind, port=80), Listener(bind="192.0.2.1", port=80)])
    assert all(is_own(Endpoint(host, 80), own) for host in [*ours, "192.0.2.1"])
    assert not any(is_own(Endpoint(host, 80), own) for host in not_ours)
    assert not any(is_own(Endpoint(host, 81), own) for host in ours)


def test_an_ordinary_listener_is_meant_to_be_connected_to() -> None:
    assert asked(Listener(bind="*", port=15006), Endpoint("10.9.1.1", 15006), "own") == Client(PEER)


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("0.0.0.0", "an unspecified address"),
        ("0.1.2.3", "an unspecified address"),
        ("::", "an unspecified address"),
        ("127.0.0.1", "a loopback address"),
        ("127.255.0.9", "a loopback address"),
        ("::1", "a loopback address"),
        ("224.0.0.1", "a multicast address"),
        ("239.255.255.255", "a multicast address"),
        ("ff02::1", "a multicast address"),
        ("255.255.255.255", "a broadcast address"),
    ],
)
def test_what_nobody_may_claim_to_be(host: str, why: str) -> None:
    for source in ("client", "proxy"):
        told = plan(claim=header(Endpoint(host, 51234)), source=source)
        assert told == Refusal(
            CloseReason.CLIENT_REFUSED, f"the header names {Endpoint(host, 51234)}: {why}"
        )


@pytest.mark.parametrize(
    "host", ["::ffff:127.0.0.1", "::ffff:0.0.0.0", "::ffff:224.0.0.1", "::ffff:255.255.255.255"]
)
def test_mapping_does_not_help(host: str) -> None:
    parsed = parse(encode_v2(Endpoint(host, 51234), Endpoint("fd00::1", 80)))
    assert isinstance(parsed, Header)
    told = plan(claim=parsed)
    assert isinstance(told, Refusal)
    assert told.reason is CloseReason.CLIENT_REFUSED
    assert "::ffff" not in told.detail


@pytest.mark.parametrize("claim", [Endpoint("106.52.131.116", 0), Endpoint("2001:db8::7", 0)])
def test_port_zero(claim: Endpoint) -> None:
    told = plan(claim=header(claim))
    assert isinstance(told, Refusal)
    assert told.detail.endswith(": port 0")


@pytest.mark.parametrize("claim", [FAR, FAR6])
@pytest.mark.parametrize(
    ("kind", "why"),
    [("own", "one of this host's own addresses"), ("broadcast", "a broadcast address")],
)
def test_what_only_the_kernel_knows(claim: Endpoint, kind: str, why: str) -> None:
    told = plan(claim=header(claim), kind=kind)
    assert told == Refusal(CloseReason.CLIENT_REFUSED, f"the header names {claim}: {why}")


@given(hosts.filter(lambda host: host != FAR.host))
def test_a_peer_is_never_refused_for_its_own_address(host: str) -> None:
    """It is not a claim: the peer has completed a handshake from there."""
    assert isinstance(plan(peer=Peer(Endpoint(host, 1)), kind="own"), Plan)


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.1.1", "240.0.0.1", "fd00::9", "fe80::1"])
def test_private_addresses_are_clients_like_any_other(host: str) -> None:
    assert isinstance(plan(claim=header(Endpoint(host, 1024))), Plan)
