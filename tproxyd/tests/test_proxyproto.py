"""PROXY headers in, as they should be: whole, split, truncated, followed by payload; their cost;
and headers out. The wrong ones are in test_proxyproto_wrong.py.

The bytes are made by tests/strategies.py or by hand. The invariant of everything here: whatever
comes, `parse` answers Header, NEED_MORE or NOT_PROXY, or raises PeerError, and an answer once given
stays whatever comes behind it.
"""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tproxyd.addr import Endpoint, fold
from tproxyd.configfile import LARGEST_HEADER
from tproxyd.errors import CloseReason
from tproxyd.flow import tlv
from tproxyd.flow.proxyproto import NEED_MORE, Header, describe, encode_v1, encode_v2, parse
from tproxyd.flow.tlv import Tlv
from tproxyd.tests import strategies as wire
from tproxyd.tests.strategies import SIGNATURE, answer, raw_tlv, v2

A4, B4 = Endpoint("192.0.2.1", 56324), Endpoint("198.51.100.255", 443)
A6, B6 = Endpoint("2001:db8::1", 0), Endpoint("2001:db8:ffff::", 65535)
TCP4 = b"PROXY TCP4 192.0.2.1 198.51.100.255 56324 443\r\n"
BLOCK4 = bytes.fromhex("C0000201 C63364FF DC04 01BB")
BLOCK6 = bytes.fromhex(
    "20010DB8000000000000000000000001 20010DB8FFFF00000000000000000000 0000 FFFF"
)
UNIX = b"/run/a.sock".ljust(108, b"\0") + b"/run/b.sock".ljust(108, b"\0")
NOOP3 = raw_tlv(tlv.NOOP, b"")
FULL6 = Endpoint("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
FULL4 = Endpoint("255.255.255.255", 65535)
NULL4 = Endpoint("0.0.0.0", 0)


def v1(
    line: str, source: Endpoint | None = None, destination: Endpoint | None = None
) -> tuple[bytes, Header]:
    data = line.encode("latin-1") + b"\r\n"
    return data, Header(1, len(data), False, source, destination)


def of_v2(
    data: bytes,
    source: Endpoint | None = None,
    destination: Endpoint | None = None,
    *tlvs: Tlv,
    local: bool = False,
) -> tuple[bytes, Header]:
    return data, Header(2, len(data), local, source, destination, tlvs)


VALID = {
    "v1 tcp4": v1("PROXY TCP4 192.0.2.1 198.51.100.255 56324 443", A4, B4),
    "v1 tcp4 longest, 56 bytes": v1(
        "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535", FULL4, FULL4
    ),
    "v1 tcp4 shortest": v1("PROXY TCP4 0.0.0.0 0.0.0.0 0 0", NULL4, NULL4),
    "v1 tcp6": v1("PROXY TCP6 2001:db8::1 2001:db8:ffff:: 0 65535", A6, B6),
    "v1 tcp6 upper case, zeroes": v1(
        "PROXY TCP6 2001:DB8:0:0:0:0:0:1 2001:0db8:ffff:0000:0000:0000:0000:0000 0 65535", A6, B6
    ),
    "v1 tcp6 longest, 104 bytes": v1(
        f"PROXY TCP6 {FULL6.host} {FULL6.host} 65535 65535", FULL6, FULL6
    ),
    "v1 tcp6 v4-mapped": v1("PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:c633:64ff 56324 443", A4, B4),
    "v1 tcp6 one mapped": v1("PROXY TCP6 ::ffff:192.0.2.1 2001:db8:ffff:: 56324 65535", A4, B6),
    "v1 unknown": v1("PROXY UNKNOWN"),
    "v1 unknown, a space": v1("PROXY UNKNOWN "),
    "v1 unknown, addresses": v1("PROXY UNKNOWN 192.0.2.1 198.51.100.255 56324 443"),
    "v1 unknown, noise": v1("PROXY UNKNOWN \0\xff PROXY TCP4  1"),
    "v1 unknown, 107 bytes": v1(f"PROXY UNKNOWN {FULL6.host} {FULL6.host} 65535 65535"),
    "v2 tcp4": of_v2(v2(0x21, 0x11, BLOCK4), A4, B4),
    "v2 udp4": of_v2(v2(0x21, 0x12, BLOCK4), A4, B4),
    "v2 tcp6": of_v2(v2(0x21, 0x21, BLOCK6), A6, B6),
    "v2 udp6": of_v2(v2(0x21, 0x22, BLOCK6), A6, B6),
    "v2 tcp6 v4-mapped": of_v2(
        v2(0x21, 0x21, b"".join([bytes(10), b"\xff\xff", BLOCK4[:4]] * 2) + BLOCK4[8:]),
        A4,
        Endpoint("192.0.2.1", 443),
    ),
    "v2 unix stream": of_v2(v2(0x21, 0x31, UNIX)),
    "v2 unix datagram, a tlv": of_v2(v2(0x21, 0x32, UNIX + NOOP3), None, None, Tlv(4, b"")),
    "v2 unspec": of_v2(v2(0x21, 0x00)),
    "v2 unspec, a tlv": of_v2(v2(0x21, 0x00, NOOP3), None, None, Tlv(4, b"")),
    "v2 unspec, addresses of no known shape": of_v2(v2(0x21, 0x00, b"\xff" * 20)),
    "v2 inet, transport unspec": of_v2(v2(0x21, 0x10, BLOCK4)),
    "v2 inet, transport unspec, no ports": of_v2(v2(0x21, 0x10, BLOCK4[:8])),
    "v2 inet6, transport unspec, a tlv": of_v2(
        v2(0x21, 0x20, BLOCK6 + NOOP3), None, None, Tlv(4, b"")
    ),
    "v2 unspec stream": of_v2(v2(0x21, 0x01)),
    "v2 local": of_v2(v2(0x20, 0x00), local=True),
    "v2 local with addresses": of_v2(v2(0x20, 0x11, BLOCK4), local=True),
    "v2 local with a partial block": of_v2(v2(0x20, 0x11, BLOCK4[:5]), local=True),
    "v2 local of no assigned family": of_v2(v2(0x20, 0xFF, b"junk"), local=True),
    "v2 local with a tlv": of_v2(
        v2(0x20, 0x00, raw_tlv(5, b"check")), None, None, Tlv(5, b"check"), local=True
    ),
    # As an AWS network load balancer sends it (a capture in kubernetes/kubernetes#57250).
    "v2 local of aws": of_v2(
        v2(0x20, 0x11, raw_tlv(3, b"\xbc\xe5\x95\x1f") + raw_tlv(4, bytes(74))),
        None,
        None,
        Tlv(3, b"\xbc\xe5\x95\x1f"),
        Tlv(4, bytes(74)),
        local=True,
    ),
    "v2 local with a tlv behind no address": of_v2(
        v2(0x20, 0x11, bytes(12) + raw_tlv(5, b"check")), None, None, Tlv(5, b"check"), local=True
    ),
    "v2 local with zeros": of_v2(v2(0x20, 0x11, bytes(18)), local=True),
    "v2 local with broken tlvs": of_v2(v2(0x20, 0x00, b"\x01\xff\xff\0"), local=True),
    "v2 local with a wrong checksum": of_v2(
        v2(0x20, 0x00, raw_tlv(5, b"check") + raw_tlv(3, b"\0\0\0\0")), local=True
    ),
    "v2 tlvs in order, twice, empty, unknown": of_v2(
        v2(0x21, 0x11, BLOCK4 + b"".join(raw_tlv(*t) for t in [(2, b"a"), (0xF0, b""), (2, b"b")])),
        A4,
        B4,
        *[Tlv(2, b"a"), Tlv(0xF0, b""), Tlv(2, b"b")],
    ),
    "v2 unique id of 128 bytes": of_v2(
        v2(0x21, 0x11, BLOCK4 + raw_tlv(5, bytes(128))), A4, B4, Tlv(5, bytes(128))
    ),
    "v2 longest": of_v2(
        v2(0x21, 0x21, BLOCK6 + raw_tlv(0xE5, bytes(0xFFFF - 39))), A6, B6, Tlv(0xE5, bytes(65496))
    ),
}


@pytest.fixture(params=list(VALID.values()), ids=list(VALID))
def valid(request: pytest.FixtureRequest) -> tuple[bytes, Header]:
    case: tuple[bytes, Header] = request.param
    return case


def lengths(size: int) -> list[int]:
    """Every length below `size`; of a very long header the first and the last few hundred."""
    return [*range(min(size, 400)), *range(max(400, size - 400), size)]


def test_whole(valid: tuple[bytes, Header]) -> None:
    data, header = valid
    for form in (bytes, bytearray, memoryview):
        assert parse(form(data), LARGEST_HEADER) == header


def test_byte_by_byte_and_truncated(valid: tuple[bytes, Header]) -> None:
    data, _ = valid
    for length in lengths(len(data)):
        assert answer(data[:length], LARGEST_HEADER) is NEED_MORE, length


def test_what_follows_is_payload(valid: tuple[bytes, Header]) -> None:
    data, header = valid
    for payload in (b"x", b"\r\n", data, SIGNATURE, b"\xff" * 5000):
        assert parse(data + payload, LARGEST_HEADER) == header
        assert header.size == len(data)


@given(wire.wires, st.binary(max_size=20))
def test_every_valid_header(case: wire.Wire, payload: bytes) -> None:
    for length in range(len(case.data)):
        assert answer(case.data[:length]) is NEED_MORE
    assert parse(case.data + payload) == case.header


@given(wire.noise, st.integers(16, 400))
@example(b"PROXY TCP4 1.2.3.4 ", 107)
def test_an_answer_once_given_stays(data: bytes, limit: int) -> None:
    """Never anything but the four answers, and the same one for every way to split the bytes."""
    whole = answer(data, limit)
    for length in range(len(data)):
        early = answer(data[:length], limit)
        assert early is NEED_MORE or early == whole, length


# The cost.


class Ledger:
    """Bytes that can be read by index or slice only, and write down how many were."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | slice) -> int | bytes:
        part = self.data[key]
        self.read += 1 if isinstance(part, int) else len(part)
        return part


@pytest.mark.parametrize(
    "data",
    [
        v2(0x21, 0x11, BLOCK4 + raw_tlv(0xE5, bytes(0xFFFF - 15))),
        v2(0x20, 0x00, bytes(0xFFFF)),
        TCP4,
        b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n",
    ],
    ids=lambda data: f"{data[:6]!r} {len(data)}",
)
def test_a_header_byte_by_byte_costs_linear_time(data: bytes) -> None:
    """An unfinished header costs at most 107 bytes of reading a call, a finished one its size."""
    for length in lengths(len(data)):
        ledger = Ledger(data[:length])
        assert parse(ledger, LARGEST_HEADER) is NEED_MORE  # type: ignore[arg-type]
        assert ledger.read <= 107
    ledger = Ledger(data + bytes(100_000))
    assert isinstance(parse(ledger, LARGEST_HEADER), Header)  # type: ignore[arg-type]
    assert ledger.read <= 107 + len(data)


def test_a_checksum_is_computed_at_most_once(monkeypatch: pytest.MonkeyPatch) -> None:
    summed = []

    def counted(data: bytes) -> int:
        summed.append(len(data))
        return 0

    monkeypatch.setattr(tlv, "crc32c", counted)
    many = v2(0x21, 0x11, BLOCK4 + raw_tlv(tlv.CRC32C, bytes(4)) * 9000)
    assert answer(many, LARGEST_HEADER) is CloseReason.HEADER_INVALID
    assert summed == []
    one = v2(0x21, 0x11, BLOCK4 + raw_tlv(tlv.CRC32C, bytes(4)) + bytes(60_000))
    assert isinstance(answer(one, LARGEST_HEADER), Header)
    assert summed == [len(one)]


# Writing.


@given(wire.endpoints, wire.endpoints)
def test_v1_round_trip(source: Endpoint, destination: Endpoint) -> None:
    data = encode_v1(source, destination)
    assert parse(data + b"x") == Header(1, len(data), False, source, destination)
    assert data.startswith(b"PROXY TCP6 " if source.is_v6 or destination.is_v6 else b"PROXY TCP4 ")


@given(wire.endpoints, wire.endpoints, wire.tlv_lists, st.booleans(), st.booleans())
def test_v2_round_trip(
    source: Endpoint, destination: Endpoint, tlvs: list[Tlv], crc32c: bool, local: bool
) -> None:
    data = encode_v2(source, destination, tlvs, crc32c=crc32c, local=local)
    got = parse(data + b"x")
    assert isinstance(got, Header)
    seal = (Tlv(tlv.CRC32C, data[-4:]),) if crc32c else ()
    here, there = (None, None) if local else (source, destination)
    assert got == Header(2, len(data), local, here, there, (*tlvs, *seal))
    if crc32c:
        assert data[-4:] == struct.pack(">I", wire.crc32c_by_bit(data[:-4] + bytes(4)))


def test_written_by_hand() -> None:
    assert encode_v1(A4, B4) == TCP4
    assert encode_v1(A6, B6) == b"PROXY TCP6 2001:db8::1 2001:db8:ffff:: 0 65535\r\n"
    assert encode_v1(A4, B6) == b"PROXY TCP6 ::ffff:c000:0201 2001:db8:ffff:: 56324 65535\r\n"
    assert encode_v2(A4, B4) == v2(0x21, 0x11, BLOCK4)
    assert encode_v2(A6, B6, [Tlv(4, b"")]) == v2(0x21, 0x21, BLOCK6 + NOOP3)
    mapped = bytes(10) + b"\xff\xff" + BLOCK4[:4]
    assert encode_v2(A4, B6) == v2(
        0x21, 0x21, mapped + BLOCK6[16:32] + struct.pack(">HH", 56324, 65535)
    )


@pytest.mark.parametrize("ends", [(None, None), (A4, None), (None, B6)])
def test_written_without_endpoints(ends: tuple[Endpoint | None, Endpoint | None]) -> None:
    assert encode_v1(*ends) == b"PROXY UNKNOWN\r\n"
    assert encode_v2(*ends) == v2(0x20, 0x00) == encode_v2(A4, B4, local=True)
    assert encode_v2(*ends, [Tlv(5, b"id")]) == v2(0x20, 0x00, raw_tlv(5, b"id"))


def test_written_hosts_are_folded_and_lose_their_zone() -> None:
    here, there = Endpoint("::ffff:192.0.2.1", 56324), Endpoint("198.51.100.255", 443)
    assert encode_v1(here, there) == TCP4
    assert encode_v2(here, there) == v2(0x21, 0x11, BLOCK4)
    local = Endpoint("fe80::1%eth0", 1)
    assert encode_v1(local, local) == b"PROXY TCP6 fe80::1 fe80::1 1 1\r\n"
    bare = Endpoint("fe80::1", 1)
    assert parse(encode_v2(local, local)) == Header(2, 52, False, bare, bare)


def test_written_longest() -> None:
    """A 16-bit length, exactly; one byte more is refused and not cut."""
    room = 0xFFFF - 12 - 3
    data = encode_v2(A4, B4, [Tlv(0xE5, bytes(room))])
    assert len(data) == LARGEST_HEADER
    assert data[14:16] == b"\xff\xff"
    assert parse(data, LARGEST_HEADER) == Header(
        2, LARGEST_HEADER, False, A4, B4, (Tlv(0xE5, bytes(room)),)
    )
    for tlvs, crc32c in (
        ([Tlv(0xE5, bytes(room + 1))], False),
        ([Tlv(0xE5, bytes(room - 6))], True),
        ([Tlv(0xE5, bytes(0xFFFF))], False),
        ([Tlv(0xE5, bytes(0x10000))], False),
        ([Tlv(0xE5, bytes(0x8000))] * 2, False),
    ):
        with pytest.raises(ValueError, match="bit"):
            encode_v2(A4, B4, tlvs, crc32c=crc32c)


@pytest.mark.parametrize(
    "item",
    [
        Tlv(256, b""),
        Tlv(-1, b""),
        Tlv(tlv.UNIQUE_ID, bytes(129)),
        Tlv(tlv.SSL, b"shrt"),
        Tlv(tlv.CRC32C, bytes(4)),
    ],
    ids=str,
)
def test_not_written_what_would_not_be_read(item: Tlv) -> None:
    with pytest.raises(ValueError):
        encode_v2(A4, B4, [item])


def test_not_written_a_checksum_that_was_read() -> None:
    """Not even where it happens to be right still: the next header's would not be."""
    header = parse(encode_v2(A4, B4, crc32c=True))
    assert isinstance(header, Header)
    with pytest.raises(ValueError, match="ask for a new one"):
        encode_v2(A4, B4, header.tlvs)


@pytest.mark.parametrize("bad", [Endpoint("x", 1), Endpoint("1.2.3.4", -1), Endpoint("::1", 65536)])
def test_not_written_what_is_no_endpoint(bad: Endpoint) -> None:
    for encode in (encode_v1, encode_v2):
        for ends in ((bad, A4), (A4, bad)):
            with pytest.raises(ValueError):
                encode(*ends)


# For the access log.


@given(wire.headers)
def test_described_as_json(header: Header) -> None:
    told = describe(header)
    assert json.loads(json.dumps(told)) == told
    assert told["version"] == header.version
    assert ("local" in told) == header.local
    assert ("destination" in told) == (header.destination is not None)


def test_described() -> None:
    assert describe(Header(1, 15, False, None, None)) == {"version": 1}
    assert describe(Header(2, 16, True, None, None)) == {"version": 2, "local": True}
    assert describe(Header(2, 28, False, A6, B6, (Tlv(tlv.ALPN, b"h2"),))) == {
        "version": 2,
        "destination": "[2001:db8:ffff::]:65535",
        "alpn": "h2",
    }


@given(wire.wires)
def test_endpoints_are_canonical_and_folded(case: wire.Wire) -> None:
    header = parse(case.data)
    assert isinstance(header, Header)
    for end in (header.source, header.destination):
        if end is not None:
            assert type(end) is Endpoint
            assert end.host == fold(end.host)
