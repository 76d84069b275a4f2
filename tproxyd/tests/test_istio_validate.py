"""Which port the validation asks for, and when there is nothing to ask for.

What it finds through rules is in netns-tests.
"""

from __future__ import annotations

import struct

import pytest

from tproxyd.istio.options import ALL, IstioOptions, parse_ports
from tproxyd.istio.validate import Invalid, captured_port, validate
from tproxyd.istio.wire import checksum


def options(ports: str, excluded: str = "") -> IstioOptions:
    return IstioOptions(
        inbound_ports=ALL if ports == "*" else parse_ports(ports),
        inbound_exclude_ports=parse_ports(excluded),
    )


@pytest.mark.parametrize(
    ("ports", "excluded", "expected"),
    [
        ("*", "15090", 15002),
        ("*", "15002,15003", 15004),
        ("*", "15002:65535", 1),
        ("80,443", "", 80),
        ("80,15002", "", 15002),
        ("15000:15010", "", 15002),
        ("15006,15008,443", "", 443),  # the proxy's own, and that of tunnels
        ("15000:15010", "15002", 15000),
    ],
)
def test_the_port_is_one_that_is_taken(ports: str, excluded: str, expected: int) -> None:
    assert captured_port(options(ports, excluded), 15002) == expected


def test_every_port_is_excluded() -> None:
    with pytest.raises(Invalid, match="every port is excluded"):
        captured_port(options("*", "1:65535"), 15002)


def test_nothing_to_validate() -> None:
    for each in options(""), options("80", "80"):
        (found,) = validate(each, port=15002, timeout_s=1)
        assert found.startswith("nothing inbound is intercepted")


def test_checksum() -> None:
    """The IPv4 header of RFC 1071's readers: 0xb861, and 0 over all of it."""
    header = bytes.fromhex("45000073000040004011 0000 c0a80001c0a800c7".replace(" ", ""))
    assert checksum(header) == 0xB861
    assert checksum(header[:10] + struct.pack("!H", 0xB861) + header[12:]) == 0
