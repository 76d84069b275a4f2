"""Addresses: parsing, folding, and sets of prefixes."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Endpoint, PrefixSet, fold, parse_endpoint, parse_ip, parse_prefix
from tproxyd.flow.listen import endpoint

addresses = st.ip_addresses()
prefixes = st.builds(
    lambda ip, cut: ip_network((ip, int(ip.max_prefixlen * cut)), strict=False),
    addresses,
    st.floats(0, 1),
)


# Endpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("[::1]:9133", "::1", 9133),
        ("[FD00:0::1]:65535", "fd00::1", 65535),
        ("[::ffff:10.0.0.1]:80", "10.0.0.1", 80),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
    ],
)
def test_parse_endpoint(text: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == Endpoint(host, port)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not ADDRESS:PORT"),
        ("127.0.0.1", "is not ADDRESS:PORT"),
        ("127.0.0.1:", "is not ADDRESS:PORT"),
        ("127.0.0.1:http", "is not ADDRESS:PORT"),
        ("127.0.0.1:-1", "is not ADDRESS:PORT"),
        ("127.0.0.1:+1", "is not ADDRESS:PORT"),
        ("127.0.0.1:65536", "is not ADDRESS:PORT"),
        ("127.0.0.1:٨٠", "is not ADDRESS:PORT"),
        ("::1:80", "write an IPv6 address in brackets"),
        ("fd00::1:9133", r'as in "\[::1\]:9133"'),
        ("localhost:80", '"localhost" is not an IP address'),
        (":80", '"" is not an IP address'),
        ("[]:80", '"" is not an IP address'),
        ("10.0.0.256:80", "is not an IP address"),
        ("010.0.0.1:80", "is not an IP address"),
    ],
)
def test_parse_endpoint_says_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_endpoint(text)


@given(addresses, st.integers(0, 65535))
def test_an_endpoint_reads_back_what_it_writes(ip: object, port: int) -> None:
    written = Endpoint(fold(str(ip)), port)
    assert parse_endpoint(str(written)) == written
    assert written.is_v6 == (":" in written.host)


def test_an_endpoint_is_what_the_socket_module_takes() -> None:
    with socket.socket() as sock:
        sock.bind(Endpoint("127.0.0.1", 0))
        assert endpoint(sock.getsockname()).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (("10.0.0.1", 80), "10.0.0.1:80"),
        (("fd00::1", 80, 0, 0), "[fd00::1]:80"),
        (("::ffff:10.0.0.1", 80, 0, 0), "10.0.0.1:80"),
        (("fe80::1", 80, 0, 3), "[fe80::1%3]:80"),
        (("::", 0, 0, 0), "[::]:0"),
    ],
)
def test_the_endpoint_of_a_socket(address: tuple[object, ...], expected: str) -> None:
    assert str(endpoint(address)) == expected


# Folding ------------------------------------------------------------------------------------------


@given(st.ip_addresses(v=4))
def test_mapped_addresses_are_folded(ip: object) -> None:
    assert fold(f"::ffff:{ip}") == fold(f"::FFFF:{ip}") == fold(str(ip)) == str(ip)


@given(st.ip_addresses(v=6))
def test_all_spellings_of_an_address_are_one(ip: object) -> None:
    exploded = ip_address(str(ip)).exploded
    assert fold(exploded) == fold(exploded.upper()) == fold(str(ip))
    assert parse_ip(exploded) == parse_ip(str(ip))


def test_only_mapped_addresses_are_folded() -> None:
    for host in ("::10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"):
        assert fold(host) == str(ip_address(host))
        assert ":" in fold(host)


@pytest.mark.parametrize("text", ["", "host", "1.2.3", "1.2.3.4.5", "::g", "1.2.3.4/8", " ::1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        fold(text)


# Prefixes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("fd00::/8", "fd00::/8"),
        ("::1", "::1/128"),
        ("::/0", "::/0"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ],
)
def test_parse_prefix(text: str, prefix: str) -> None:
    assert parse_prefix(text) == ip_network(prefix)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.0.1/8", r'bits set behind its length; meant "10\.0\.0\.0/8"\?'),
        ("fd00::1/8", r'meant "fd00::/8"\?'),
        ("10.0.0.0/33", "is not an IP prefix"),
        ("10.0.0", "is not an IP prefix"),
        ("fd00::1%eth0", "a prefix has no zone"),
        ("any", "is not an IP prefix"),
        ("", "is not an IP prefix"),
    ],
)
def test_parse_prefix_says_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_prefix(text)


def test_an_empty_set_contains_nothing() -> None:
    empty = PrefixSet()
    assert "127.0.0.1" not in empty
    assert "::1" not in empty
    assert not empty
    assert repr(empty) == "PrefixSet(empty)"


@given(st.lists(prefixes, max_size=6), addresses)
def test_a_set_contains_what_one_of_its_prefixes_contains(some: list[object], ip: object) -> None:
    networks = [ip_network(str(each)) for each in some]
    host = fold(str(ip))
    expected = any(ip_address(host) in network for network in networks)
    assert (host in PrefixSet(networks)) == expected


@given(st.lists(prefixes, max_size=6), st.randoms())
def test_sets_that_cover_the_same_are_equal(some: list[object], random: object) -> None:
    networks = [ip_network(str(each)) for each in some]
    halves = [
        half for each in networks for half in (each.subnets() if each.prefixlen < 32 else [each])
    ]
    random.shuffle(halves)  # type: ignore[attr-defined]
    one, other = PrefixSet(networks), PrefixSet(halves)
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)


def test_a_set_by_version() -> None:
    both = PrefixSet(map(parse_prefix, ["fd00::/8", "10.0.0.0/8", "::1", "9.0.0.0/8"]))
    assert list(map(str, both.networks)) == ["9.0.0.0/8", "10.0.0.0/8", "::1/128", "fd00::/8"]
    assert both
    assert both != "10.0.0.0/8"


@pytest.mark.parametrize("host", ["10.1.2.3", "::ffff:10.1.2.3", "fe80::1%eth0"])
def test_hosts_are_folded_before_they_are_looked_for(host: str) -> None:
    assert host in PrefixSet(map(parse_prefix, ["10.0.0.0/8", "fe80::/10"]))
    assert host not in PrefixSet(map(parse_prefix, ["11.0.0.0/8", "fc00::/7"]))


@given(st.ip_addresses(v=4))
def test_every_v6_address_is_not_every_address(ip: object) -> None:
    assert str(ip) not in PrefixSet([parse_prefix("::/0")])
    assert str(ip) in PrefixSet([parse_prefix("0.0.0.0/0")])
