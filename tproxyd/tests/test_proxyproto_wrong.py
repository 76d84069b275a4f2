"""PROXY headers that are wrong, each with its verdict, and what is right at their borders.

The inverse, and what holds for every input, is in test_proxyproto.py.
"""

from __future__ import annotations

import struct

import pytest

from tproxyd.addr import Endpoint
from tproxyd.configfile import LARGEST_HEADER
from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow import tlv
from tproxyd.flow.proxyproto import (
    DEFAULT_LIMIT,
    NEED_MORE,
    NOT_PROXY,
    Header,
    NoHeader,
    describe,
    parse,
)
from tproxyd.tests.strategies import SIGNATURE, answer, crc32c_by_bit, raw_tlv, sealed, v2

INVALID = CloseReason.HEADER_INVALID
BLOCK4 = bytes.fromhex("C0000201 C63364FF DC04 01BB")
BLOCK6 = bytes(36)
UNIX = bytes(216)
NOOP3 = raw_tlv(tlv.NOOP, b"")


# v1, by hand. "Any sequence which does not exactly match the protocol must be discarded and cause
# the receiver to abort the connection" (2.1).

V1_VERDICTS: list[tuple[bytes, NoHeader | CloseReason]] = [
    # What may still become a header, and what may not.
    (b"", NEED_MORE),
    (b"P", NEED_MORE),
    (b"PROX", NEED_MORE),
    (b"PROXY", NEED_MORE),
    (b"PROXY ", NEED_MORE),
    (b"PROXY T", NEED_MORE),
    (b"PROXY UNKNOWN\r", NEED_MORE),
    (b"X", NOT_PROXY),
    (b"p", NOT_PROXY),
    (b"proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n", NOT_PROXY),
    (b"PROZ", NOT_PROXY),
    (b"PUT / HTTP/1.1\r\n\r\n", NOT_PROXY),
    (b" PROXY TCP4", NOT_PROXY),
    (b"\0", NOT_PROXY),
    # The signature is "PROXY": "Seeing this string indicates that this is version 1".
    (b"PROXYX", INVALID),
    (b"PROXY\t", INVALID),
    (b"PROXY\r\n", INVALID),
    (b"PROXY\r", INVALID),
    # The protocol word.
    (b"PROXY  ", INVALID),
    (b"PROXY X", INVALID),
    (b"PROXY tcp4", INVALID),
    (b"PROXY TCP5", INVALID),
    (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n", INVALID),
    (b"PROXY TCP46 1.2.3.4 1.2.3.4 1 1\r\n", INVALID),
    (b"PROXY UNKNOWNX\r\n", INVALID),
    (b"PROXY UNKNOW\r\n", INVALID),
    (b"PROXY \r\n", INVALID),
    (b"PROXY TCP4\r\n", INVALID),
    (b"PROXY TCP4 \r\n", INVALID),
    (b"PROXY TCP6\r\n", INVALID),
    # The end of the line: CRLF, and neither half of it alone.
    (b"PROXY TCP4 192.0.2.1\n", INVALID),
    (b"PROXY TCP4 192.0.2.1\rx", INVALID),
    (b"PROXY TCP4 192.0.2.1\r\r", INVALID),
    (b"PROXY TCP4 192.0.2.1\r", NEED_MORE),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324 443\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324 443\n\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324 443\r\r\n", INVALID),
    (b"PROXY UNKNOWN\n", INVALID),
    (b"PROXY UNKNOWN \n\r\n", INVALID),
    (b"PROXY UNKNOWN \r \r\n", INVALID),
    # At most 107 bytes: once 106 hold no CR, or the CR is the 107th, no CRLF can come in time.
    (b"PROXY UNKNOWN " + b"x" * 91, NEED_MORE),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r", NEED_MORE),
    (b"PROXY UNKNOWN " + b"x" * 92, INVALID),
    (b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", INVALID),
    (b"PROXY UNKNOWN " + b"x" * 5000 + b"\r\n", INVALID),
    (b"PROXY TCP6 " + b"0" * 96 + b"\r", INVALID),
    # Exactly one space.
    (b"PROXY TCP4  192.0.2.1 198.51.100.255 56324 443\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1  198.51.100.255 56324 443\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255  56324 443\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324  443\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324 443 \r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1\t198.51.100.255 56324 443\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1 198.51.100.255 56324 443 1\r\n", INVALID),
    (b"PROXY TCP4 192.0.2.1\r\n", INVALID),
]


@pytest.mark.parametrize(("data", "verdict"), V1_VERDICTS, ids=lambda v: ascii(v)[:60])
def test_v1_verdicts(data: bytes, verdict: NoHeader | CloseReason) -> None:
    assert answer(data) is verdict


BAD_IP4 = (
    "01.2.3.4 1.2.3.04 1.2.3.00 256.1.1.1 1.1.1.256 999.1.1.1 1.2.3 1.2.3.4.5 1.2.3. .1.2.3 1..2.3 "
    "1.2.3.4. +1.2.3.4 -1.2.3.4 1.2.3.4:80 0x1.2.3.4 1.2.3.a 1.2.3.\xb2 1.2.3.\xb9 1.2.3.4/32 "
    "16909060 localhost ::1 ::ffff:1.2.3.4 1.2.3.4%lo 1.2.3.4\0 1.2.3.1e1 1.2.3.1_0"
)
BAD_IP6 = (
    "1.2.3.4 : ::: ::1::2 1::2::3 :1 1: 1:2:3:4:5:6:7 1:2:3:4:5:6:7:8:9 12345:: ::g ::-1 ::+1 "
    "fe80::1%eth0 fe80::1% ::1/128 [::1] ::ffff:1.2.3 ::ffff:01.2.3.4 ::ffff:256.1.1.1 "
    "1.2.3.4::ffff ::1\0 ::\xb2 ::\xff"
)
BAD_PORT = (
    "00 01 0443 65536 99999 100000 18446744073709551617 +1 -1 -0 1.0 0x1 1e1 1_0 http \xb2 1\xb9 "
    "1\0 ,"
)


@pytest.mark.parametrize("host", [*BAD_IP4.split(" "), ""], ids=ascii)
def test_v1_bad_ipv4(host: str) -> None:
    for line in (f"PROXY TCP4 {host} 1.2.3.4 1 2", f"PROXY TCP4 1.2.3.4 {host} 1 2"):
        assert answer(line.encode("latin-1") + b"\r\n") is INVALID


@pytest.mark.parametrize("host", [*BAD_IP6.split(" "), ""], ids=ascii)
def test_v1_bad_ipv6(host: str) -> None:
    for line in (f"PROXY TCP6 {host} ::1 1 2", f"PROXY TCP6 ::1 {host} 1 2"):
        assert answer(line.encode("latin-1") + b"\r\n") is INVALID


@pytest.mark.parametrize("port", [*BAD_PORT.split(" "), ""], ids=ascii)
def test_v1_bad_port(port: str) -> None:
    for ends in (f"{port} 2", f"2 {port}"):
        for line in (f"PROXY TCP4 1.2.3.4 1.2.3.4 {ends}", f"PROXY TCP6 ::1 ::1 {ends}"):
            assert answer(line.encode("latin-1") + b"\r\n") is INVALID


def test_v1_every_port_and_octet() -> None:
    for n in (*range(300), *range(65_000, 66_000)):
        for line, highest in (
            (f"PROXY TCP4 1.2.3.4 1.2.3.4 {n} {n}\r\n", 65535),
            (f"PROXY TCP6 ::1 ::1 {n} {n}\r\n", 65535),
            (f"PROXY TCP4 {n}.0.0.{n} 1.{n}.{n}.1 1 2\r\n", 255),
        ):
            assert isinstance(answer(line.encode()), Header) == (n <= highest), line


def test_a_limit_is_not_for_v1() -> None:
    longest = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert answer(longest, 16) == Header(1, 107, False, None, None)


# v2, by hand.


def expected_v2(ver_cmd: int, fam: int) -> str:
    """What 2.2 says of the 13th and the 14th byte, read once more and written differently."""
    if ver_cmd == 0x20:
        return "real endpoints"
    if ver_cmd != 0x21 or fam not in {16 * family + t for family in range(4) for t in range(3)}:
        return "invalid"
    return "header's endpoints" if fam in (0x11, 0x12, 0x21, 0x22) else "real endpoints"


def test_v2_every_command_and_family() -> None:
    seen = {"real endpoints": 0, "header's endpoints": 0, "invalid": 0}
    for ver_cmd in range(256):
        for fam in range(256):
            expected = expected_v2(ver_cmd, fam)
            got = answer(v2(ver_cmd, fam, bytes(216)))
            if expected == "invalid":
                assert got is INVALID
                # and it is said as soon as the byte is there
                early = SIGNATURE + bytes((ver_cmd, fam))
                assert answer(early) is INVALID
                assert (answer(early[:13]) is INVALID) == (ver_cmd != 0x21)
            else:
                assert isinstance(got, Header)
                assert got.size == 16 + 216
                assert got.local == (ver_cmd == 0x20)
                named = expected == "header's endpoints"
                assert (got.source is not None) == (got.destination is not None) == named
            seen[expected] += 1
    assert seen == {"real endpoints": 256 + 8, "header's endpoints": 4, "invalid": 65268}


@pytest.mark.parametrize("at", range(12))
def test_v2_signature(at: int) -> None:
    data = v2(0x21, 0x11, BLOCK4)
    broken = data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]
    assert answer(broken) is NOT_PROXY
    assert answer(broken[: at + 1]) is NOT_PROXY


@pytest.mark.parametrize(
    ("fam", "block"), [(0x11, 12), (0x12, 12), (0x21, 36), (0x22, 36), (0x31, 216), (0x32, 216)]
)
def test_v2_partial_address_block(fam: int, block: int) -> None:
    """Refused as soon as the length is known."""
    for length in range(block):
        assert answer(v2(0x21, fam, length=length)) is INVALID
        assert answer(v2(0x21, fam, bytes(length))) is INVALID
        assert isinstance(answer(v2(0x20, fam, bytes(length))), Header)
    assert answer(v2(0x21, fam, length=block)) is NEED_MORE


def test_v2_limit() -> None:
    """The cap is on the whole header, and known to be passed before the rest is read."""
    for limit in (107, DEFAULT_LIMIT, LARGEST_HEADER - 1):
        for ver_cmd, fam in ((0x21, 0x11), (0x20, 0x00), (0x21, 0x00)):
            assert answer(v2(ver_cmd, fam, length=limit - 16), limit) is NEED_MORE
            assert answer(v2(ver_cmd, fam, length=limit - 15), limit) is INVALID
            fits = v2(ver_cmd, fam, bytes(limit - 16 - (limit - 16) % 3))
            assert isinstance(answer(fits, limit), Header)
    assert answer(v2(0x21, 0x11, length=0xFFFF), LARGEST_HEADER) is NEED_MORE


def test_v2_header_of_the_largest_size_and_many_tlvs() -> None:
    body = BLOCK6 + bytes(3) * ((0xFFFF - 36) // 3)
    got = parse(v2(0x21, 0x21, body), LARGEST_HEADER)
    assert isinstance(got, Header)
    assert len(got.tlvs) == 21833


@pytest.mark.parametrize(
    "options",
    [
        b"\x01",
        b"\x01\x00",
        b"\x01\x00\x01",
        b"\x01\xff\xff",
        NOOP3 + b"\x04",
        b"\x04\x00\x02\x00",  # the length reaches one byte into nothing
        raw_tlv(tlv.UNIQUE_ID, bytes(129)),
        raw_tlv(tlv.SSL, b""),
        raw_tlv(tlv.SSL, bytes(4)),
        raw_tlv(tlv.SSL, bytes(5) + b"\x21"),
        raw_tlv(tlv.SSL, bytes(5) + b"\x21\x00\x01"),
        raw_tlv(tlv.CRC32C, b""),
        raw_tlv(tlv.CRC32C, bytes(3)),
        raw_tlv(tlv.CRC32C, bytes(5)),
    ],
    ids=bytes.hex,
)
def test_v2_broken_tlvs(options: bytes) -> None:
    """Refused where the address block has a known size, whether its addresses are used or not."""
    for fam, block in ((0x11, BLOCK4), (0x22, BLOCK6), (0x31, UNIX)):
        assert answer(v2(0x21, fam, block + options)) is INVALID
    assert answer(v2(0x20, 0x00, options)) == Header(2, 16 + len(options), True, None, None)


def test_v2_unspec_reads_its_tlvs_or_ignores_its_block() -> None:
    assert answer(v2(0x21, 0x00, b"\x01\xff\xff")) == Header(2, 19, False, None, None)
    for bad in (raw_tlv(tlv.CRC32C, bytes(4)), raw_tlv(tlv.UNIQUE_ID, bytes(129))):
        assert answer(v2(0x21, 0x00, bad)) is INVALID


# The checksum.


def test_crc_as_the_load_balancers_send_it() -> None:
    """AWS's own published example of a Network Load Balancer behind Private Link.

    It settles the byte order, which the specification leaves to the reader.
    """
    vpce = b"vpce-08d2bf15fac5001c9"
    data = v2(
        0x21,
        0x11,
        bytes((172, 31, 7, 113, 172, 31, 10, 31))
        + struct.pack(">HH", 51442, 80)
        + raw_tlv(tlv.CRC32C, bytes.fromhex("E8D6892D"))
        + raw_tlv(tlv.AWS, b"\x01" + vpce)
        + raw_tlv(tlv.NOOP, bytes(36)),
    )
    header = parse(data)
    assert isinstance(header, Header)
    assert header.source == Endpoint("172.31.7.113", 51442)
    assert [t.type for t in header.tlvs] == [tlv.CRC32C, tlv.AWS, tlv.NOOP]
    assert describe(header)["aws_vpce_id"] == vpce.decode()


@pytest.mark.parametrize("before", [b"", NOOP3, raw_tlv(tlv.UNIQUE_ID, b"id")])
@pytest.mark.parametrize("after", [b"", NOOP3, raw_tlv(tlv.AUTHORITY, b"x" * 200)])
def test_crc_every_damaged_bit(before: bytes, after: bytes) -> None:
    data = sealed(0x21, 0x11, BLOCK4 + before, after)
    assert isinstance(answer(data), Header)
    for at in range(16, len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            got = answer(bytes(damaged))
            # Damage that turns the checksum's own type into another one cannot be seen.
            hidden = at == 16 + 12 + len(before)
            assert got is INVALID or (hidden and isinstance(got, Header))


def test_crc_twice() -> None:
    once = sealed(0x21, 0x11, BLOCK4)
    right = raw_tlv(tlv.CRC32C, once[-4:])
    assert answer(v2(0x21, 0x11, BLOCK4 + right + right)) is INVALID
    assert answer(sealed(0x21, 0x11, BLOCK4 + raw_tlv(tlv.CRC32C, bytes(4)))) is INVALID
    assert answer(sealed(0x21, 0x11, BLOCK4, raw_tlv(tlv.CRC32C, bytes(4)))) is INVALID


def test_crc_with_a_byte_behind_it() -> None:
    """The first four bytes are right; a CRC32C TLV has no fifth."""
    header = v2(0x21, 0x11, BLOCK4 + raw_tlv(tlv.CRC32C, bytes(5)))
    crc = struct.pack(">I", crc32c_by_bit(header))
    assert answer(header[:-5] + crc + b"\0") is INVALID


def test_crc_of_another_byte_order() -> None:
    data = sealed(0x21, 0x11, BLOCK4)
    assert answer(data[:-4] + data[:-5:-1]) is INVALID


# What the log says.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PROXY HTTP ", "TCP4, TCP6 or UNKNOWN"),
        (b"PROXY TCP4 1.2.3.4\r\n", "got 1 fields"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.04 1 2\r\n", "'1.2.3.04' is not an IPv4 address"),
        (b"PROXY TCP6 ::1 1.2.3.4 1 2\r\n", "'1.2.3.4' is not an IPv6 address"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 02\r\n", "'02' is not a port"),
        (b"PROXY TCP4\n", "LF without CR"),
        (b"PROXY TCP4\r ", "CR without LF"),
        (b"PROXY TCP4 " + b" " * 99, "no CRLF in the first 107 bytes"),
        (v2(0x11), "version is 1, not 2"),
        (v2(0x31), "version is 3, not 2"),
        (v2(0x22), "command 2 is not assigned"),
        (v2(0x21, 0x41), "address family 4 is not assigned"),
        (v2(0x21, 0x13), "transport 3 is not assigned"),
        (v2(0x21, 0x11, bytes(11)), "11 bytes cannot hold an address block of 12"),
        (v2(0x20, 0x00, length=4081), "4097 bytes long, the limit is 4096"),
        (v2(0x21, 0x11, BLOCK4 + b"\1\0"), "2 stray bytes after the last TLV"),
        (v2(0x21, 0x11, BLOCK4 + b"\xe1\0\5ab"), "TLV 0xE1 claims 5 bytes where 2 are left"),
        (v2(0x21, 0x11, BLOCK4 + raw_tlv(tlv.SSL, b"\1")), "SSL TLV has 1 bytes"),
        (v2(0x21, 0x11, BLOCK4 + raw_tlv(tlv.SSL, bytes(6))), "in the SSL TLV: 1 stray"),
        (v2(0x21, 0x11, BLOCK4 + raw_tlv(tlv.CRC32C, bytes(4))), "CRC32C does not match"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_refusal_says_what_is_wrong(data: bytes, words: str) -> None:
    with pytest.raises(PeerError) as refusal:
        parse(data)
    assert words in refusal.value.detail
    assert refusal.value.detail.startswith("v1: " if data[:1] == b"P" else "v2: ")
