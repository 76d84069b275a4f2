"""What comes over the wire, for tests: endpoints, TLVs, headers and their bytes, right and wrong.

The bytes are put together here by hand, field by field as doc/proxy-protocol.txt lists them, and
not by flow/proxyproto.py: a parser tested with its own encoder agrees with its own mistakes.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple

from hypothesis import strategies as st

from tproxyd.addr import Endpoint, fold
from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow.proxyproto import DEFAULT_LIMIT, Header, NoHeader, parse
from tproxyd.flow.tlv import CRC32C, SSL, UNIQUE_ID, Tlv

SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")


class Wire(NamedTuple):
    """The bytes of a header and what they mean."""

    data: bytes
    header: Header


def answer(data: bytes, limit: int = DEFAULT_LIMIT) -> Header | NoHeader | CloseReason:
    """What `parse` says of `data`, a PeerError as its reason; any other exception is a bug."""
    try:
        return parse(data, limit)
    except PeerError as error:
        refusal = error
    # Its text is for a log line: words, of bounded length, in which nothing that the peer sent can
    # forge another line.
    assert 10 < len(refusal.detail) < 200
    assert refusal.detail.isascii()
    assert refusal.detail.isprintable()
    return refusal.reason


def v2(
    ver_cmd: int = 0x21, fam: int = 0x11, body: bytes = b"", *, length: int | None = None
) -> bytes:
    """A v2 header of these parts, right or wrong; the length is that of the body unless given."""
    return (
        SIGNATURE
        + struct.pack(">BBH", ver_cmd, fam, len(body) if length is None else length)
        + body
    )


def raw_tlv(kind: int, value: bytes) -> bytes:
    return struct.pack(">BH", kind, len(value)) + value


def crc32c_by_bit(data: bytes) -> int:
    """CRC-32C as its definition reads, bit by bit, for comparison with the table."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sealed(ver_cmd: int, fam: int, before: bytes, after: bytes = b"") -> bytes:
    """A v2 header with a right CRC32C TLV between `before` and `after`."""
    header = v2(ver_cmd, fam, before + raw_tlv(CRC32C, bytes(4)) + after)
    at = 16 + len(before) + 3
    return header[:at] + struct.pack(">I", crc32c_by_bit(header)) + header[at + 4 :]


ports = st.integers(0, 65535)
endpoints4 = st.builds(Endpoint, st.ip_addresses(v=4).map(str), ports)
endpoints6 = st.builds(
    Endpoint, st.ip_addresses(v=6).map(str).map(fold).filter(lambda host: ":" in host), ports
)
endpoints = endpoints4 | endpoints6

_small = st.binary(max_size=40)


@st.composite
def ssl_tlvs(draw: st.DrawFn) -> Tlv:
    parts = draw(st.lists(st.tuples(st.integers(0, 255), _small), max_size=5))
    client, verified = draw(st.integers(0, 255)), draw(st.integers(0, 2**32 - 1))
    subs = b"".join(raw_tlv(kind, value) for kind, value in parts)
    return Tlv(SSL, struct.pack(">BI", client, verified) + subs)


tlvs = (
    st.builds(
        Tlv,
        st.integers(0, 255).filter(lambda kind: kind not in (CRC32C, SSL, UNIQUE_ID)),
        _small,
    )
    | st.builds(Tlv, st.just(UNIQUE_ID), st.binary(max_size=128))
    | ssl_tlvs()
)
tlv_lists = st.lists(tlvs, max_size=6)


def _spellings6(ip: IPv4Address | IPv6Address) -> st.SearchStrategy[str]:
    """The ways in which a v1 line may spell an address."""
    ways = [ip.compressed, ip.exploded, ip.compressed.upper()]
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ways.append(f"::ffff:{ip.ipv4_mapped}")
    return st.sampled_from(ways)


@st.composite
def v1_wires(draw: st.DrawFn) -> Wire:
    family = draw(st.sampled_from(["TCP4", "TCP6", "UNKNOWN"]))
    if family == "UNKNOWN":
        rest = draw(st.binary(max_size=91).filter(lambda b: b"\r" not in b and b"\n" not in b))
        line = b"PROXY UNKNOWN" + (b" " + rest if rest else b"") + b"\r\n"
        return Wire(line, Header(1, len(line), False, None, None))
    sport, dport = draw(ports), draw(ports)
    if family == "TCP4":
        source, destination = (str(draw(st.ip_addresses(v=4))) for _ in "sd")
    else:
        source, destination = (draw(st.ip_addresses(v=6).flatmap(_spellings6)) for _ in "sd")
    line = f"PROXY {family} {source} {destination} {sport} {dport}\r\n".encode()
    ends = Endpoint(fold(source), sport), Endpoint(fold(destination), dport)
    return Wire(line, Header(1, len(line), False, *ends))


@st.composite
def v2_wires(draw: st.DrawFn) -> Wire:
    """Every kind of v2 header that a sender which follows the text may send."""
    local = draw(st.booleans())
    fam = draw(st.sampled_from([0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32]))
    ends: list[Endpoint] | list[None] = [None, None]
    if fam >> 4 == 0:
        block = b""
    elif fam >> 4 == 3:
        block = draw(st.binary(min_size=216, max_size=216))
    else:
        version: Literal[4, 6] = 4 if fam >> 4 == 1 else 6
        hosts = [draw(st.ip_addresses(v=version)) for _ in "sd"]
        sport, dport = draw(ports), draw(ports)
        block = hosts[0].packed + hosts[1].packed + struct.pack(">HH", sport, dport)
        if not local:
            ends = [
                Endpoint(fold(str(hosts[0])), sport),
                Endpoint(fold(str(hosts[1])), dport),
            ]
    # Under LOCAL a type 0, which is not assigned, says that those are no TLVs.
    listed = st.lists(tlvs.filter(lambda each: not local or each.type > 0), max_size=6)
    before, after = draw(listed), draw(listed)
    bytes_before, bytes_after = (
        b"".join(raw_tlv(t.type, t.value) for t in part) for part in (before, after)
    )
    ver_cmd = 0x20 if local else 0x21
    if draw(st.booleans()):
        data = sealed(ver_cmd, fam, block + bytes_before, bytes_after)
        at = 16 + len(block) + len(bytes_before) + 3
        before.append(Tlv(CRC32C, data[at : at + 4]))
    else:
        data = v2(ver_cmd, fam, block + bytes_before + bytes_after)
    return Wire(data, Header(2, len(data), local, ends[0], ends[1], (*before, *after)))


wires = v1_wires() | v2_wires()
headers = wires.map(lambda wire: wire.header)


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A valid header after a few accidents."""
    data = bytearray(draw(wires).data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["set", "insert", "delete", "cut", "repeat"])):
            case "set" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del data[at : at + draw(st.integers(1, 8))]
            case "cut":
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


# Anything a peer may send first: noise, a signature and noise, a header damaged.
noise = (
    st.binary(max_size=200)
    | st.builds(bytes.__add__, st.sampled_from([b"PROXY ", SIGNATURE]), st.binary(max_size=300))
    | st.builds(
        lambda fam, body: v2(0x21, fam, body), st.integers(0, 0x32), st.binary(max_size=300)
    )
    | st.builds(
        lambda family, rest: b"PROXY " + family + b" " + rest.encode() + b"\r\n",
        st.sampled_from([b"TCP4", b"TCP6", b"UNKNOWN"]),
        st.text("0123456789abcdefF.:% +-\r\n", max_size=95),
    )
    | mutants()
)
