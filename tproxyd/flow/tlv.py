"""The options at the end of a PROXY v2 header: type, length, value.

flow/proxyproto.py calls `walk` and `verify` while it reads a header, `encode` while it writes one
and `describe` when a connection is logged. Section numbers are those of HAProxy's
doc/proxy-protocol.txt in its revision of 2026-04-27, which added the TLS group, the signature
scheme and the client certificate (0x26 to 0x28).

What is checked here is what section 2.2 gives a shape: the lengths add up, a CRC32C is four bytes,
comes once and matches, a UNIQUE_ID has at most 128 bytes, an SSL value and its sub-TLVs fill their
TLV exactly. Everything else is opaque: section 2.2 lets a receiver "skip over and ignore the TLVs
it is not interested in", and the vendors' types lie in 0xE0-0xEF, which 2.2.8 leaves to every
application. So 0xEA is AWS's only when it looks like it; otherwise it is an unknown type, no error.

What is wrong is said by Malformed; whose fault that is, the caller knows. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Section 2.2, "The following types have already been registered".
ALPN = 0x01
AUTHORITY = 0x02
CRC32C = 0x03
NOOP = 0x04
UNIQUE_ID = 0x05
SSL = 0x20
SSL_VERSION = 0x21
SSL_CN = 0x22
SSL_CIPHER = 0x23
SSL_SIG_ALG = 0x24
SSL_KEY_ALG = 0x25
SSL_GROUP = 0x26
SSL_SIG_SCHEME = 0x27
SSL_CLIENT_CERT = 0x28
NETNS = 0x30
# The clouds' own, each from its vendor's documentation.
GCP = 0xE0  # Private Service Connect: pscConnectionId, 8 bytes, network order
AWS = 0xEA  # Network Load Balancer: a subtype byte, then its value
AZURE = 0xEE  # Private Link: a subtype byte, then its value
AWS_VPCE_ID = 0x01
AZURE_LINKID = 0x01  # 4 bytes, little endian

LONGEST_UNIQUE_ID = 128  # 2.2.5: "an opaque byte sequence of up to 128 bytes"
LONGEST_VALUE = 0xFFFF  # a TLV's length has 16 bits

_HEAD = struct.Struct(">BH")  # type, length
_SSL_HEAD = struct.Struct(">BI")  # 2.2.6: client and verify; "packed", so five bytes
_CHECKSUM_SIZE = 4


class Malformed(ValueError):
    """Bytes that are no PROXY header, or values that cannot become one; the text says why."""


@dataclass(frozen=True, slots=True)
class Tlv:
    type: int
    value: bytes


def walk(data: bytes, start: int) -> tuple[Tlv, ...]:
    """The TLVs that fill `data` from `start` to its end, in order, duplicates too."""
    tlvs = []
    end = len(data)
    while start < end:
        value = start + _HEAD.size
        if value > end:
            raise Malformed(f"{end - start} stray bytes after the last TLV")
        kind, length = _HEAD.unpack_from(data, start)
        start = value + length
        if start > end:
            left = end - value
            raise Malformed(f"TLV 0x{kind:02X} claims {length} bytes where {left} are left")
        tlvs.append(Tlv(kind, data[value:start]))
    return tuple(tlvs)


def verify(header: bytes, start: int, tlvs: Iterable[Tlv]) -> None:
    """Check the TLVs that have a prescribed shape; they begin at `start` of the whole `header`.

    A header with a checksum that does not match "MUST" be treated as invalid (2.2.3). Two of them
    cannot both be right, for each is computed with only its own field zeroed: refused before
    anything is computed, so the whole check reads the header once however many there are.
    """
    checksum = 0
    at = start
    for tlv in tlvs:
        at += _HEAD.size
        if tlv.type == CRC32C:
            if checksum:
                raise Malformed("more than one CRC32C TLV")
            if len(tlv.value) != _CHECKSUM_SIZE:
                raise Malformed(f"the CRC32C TLV has {len(tlv.value)} bytes, not 4")
            checksum = at
        elif tlv.type == UNIQUE_ID and len(tlv.value) > LONGEST_UNIQUE_ID:
            raise Malformed(f"the UNIQUE_ID TLV has {len(tlv.value)} bytes, more than 128")
        elif tlv.type == SSL:
            _ssl_parts(tlv.value)
        at += len(tlv.value)
    if checksum and header[checksum : checksum + _CHECKSUM_SIZE] != _checksum(header, checksum):
        raise Malformed("the CRC32C does not match the header")


def encode(tlvs: Iterable[Tlv]) -> bytes:
    """The TLVs one after the other. A value that does not fit is refused, never cut."""
    parts: list[bytes] = []
    for tlv in tlvs:
        if not 0 <= tlv.type <= 0xFF:
            raise Malformed(f"TLV type {tlv.type} is not a byte")
        if len(tlv.value) > LONGEST_VALUE:
            raise Malformed(f"TLV 0x{tlv.type:02X}: {len(tlv.value)} bytes do not fit 16 bits")
        parts += _HEAD.pack(tlv.type, len(tlv.value)), tlv.value
    return b"".join(parts)


def seal(header: bytes) -> bytes:
    """`header`, which ends with a CRC32C TLV of zeroes, with the checksum filled in."""
    at = len(header) - _CHECKSUM_SIZE
    return header[:at] + _checksum(header, at)


def _crc32c_table() -> tuple[int, ...]:
    """One entry a byte value, for the reflected Castagnoli polynomial 0x1EDC6F41; 0.2 ms, once."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
        table.append(byte)
    return tuple(table)


_TABLE = _crc32c_table()


def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C (RFC 4960, appendix B).

    zlib.crc32 is another polynomial, and the standard library has no third. This loop costs about
    0.1 µs a byte: 4 µs for an ordinary header, 0.4 ms for one of 4,096 bytes, 7 ms for the longest
    that there can be. Only headers that carry a checksum pay.
    """
    crc = 0xFFFFFFFF
    table = _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _checksum(header: bytes, at: int) -> bytes:
    """The four bytes that belong at `at`: the CRC of the header with zeroes there (2.2.3).

    In network order. Appendix B of RFC 4960, which 2.2.3 cites, would have the bytes swapped; what
    HAProxy and AWS's load balancers send is not, and they are the protocol.
    """
    zeroed = bytearray(header)
    zeroed[at : at + _CHECKSUM_SIZE] = bytes(_CHECKSUM_SIZE)
    return crc32c(zeroed).to_bytes(_CHECKSUM_SIZE, "big")


def _ssl_parts(value: bytes) -> tuple[int, int, tuple[Tlv, ...]]:
    """The client flags, the verify result and the sub-TLVs of an SSL value (2.2.6)."""
    if len(value) < _SSL_HEAD.size:
        raise Malformed(f"the SSL TLV has {len(value)} bytes, fewer than 5")
    client, verified = _SSL_HEAD.unpack_from(value)
    try:
        return client, verified, walk(value, _SSL_HEAD.size)
    except Malformed as error:
        raise Malformed(f"in the SSL TLV: {error}") from None


# From here on: for the access log. A decoder answers None when the value is not what its type
# should hold; it is then listed with the unknown ones.


def describe(tlvs: Iterable[Tlv]) -> dict[str, object]:
    """What the TLVs say, ready for JSON; only what is there, in the order it came.

    A type that comes twice gets a list. Types that we do not know are under "tlvs" by number, with
    how often they came and how many bytes they held together: at most 256 entries, however long
    the header is. NOOP says nothing.
    """
    return _describe(tlvs, _DECODERS)


_Decoder = Callable[[bytes], object]


def _describe(tlvs: Iterable[Tlv], decoders: dict[int, tuple[str, _Decoder]]) -> dict[str, object]:
    found: dict[str, list[object]] = {}
    unknown: dict[str, dict[str, int]] = {}
    for tlv in tlvs:
        if tlv.type == NOOP:
            continue
        name, decode = decoders.get(tlv.type, _UNKNOWN)
        meaning = decode(tlv.value)
        if meaning is not None:
            found.setdefault(name, []).append(meaning)
        else:
            seen = unknown.setdefault(f"0x{tlv.type:02X}", {"count": 0, "bytes": 0})
            seen["count"] += 1
            seen["bytes"] += len(tlv.value)
    told: dict[str, object] = {
        name: meanings if len(meanings) > 1 else meanings[0] for name, meanings in found.items()
    }
    if unknown:
        told["tlvs"] = unknown
    return told


def _text(value: bytes) -> str:
    """`value` as text that no log line can be forged with: what is not printable is escaped."""
    text = value.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


_CLIENT_FLAGS = {0x01: "ssl", 0x02: "cert_conn", 0x04: "cert_sess"}  # PP2_CLIENT_*


def _ssl(value: bytes) -> dict[str, object]:
    """`verify` is zero when a certificate was presented and found good. Never fails: verified."""
    client, verified, parts = _ssl_parts(value)
    flags = [_CLIENT_FLAGS.get(bit, f"0x{bit:02X}") for bit in _BITS if client & bit]
    return {"client": flags, "verify": verified} | _describe(parts, _SSL_DECODERS)


_BITS = tuple(1 << n for n in range(8))


def _fingerprint(value: bytes) -> str:
    """A certificate as everybody looks it up: the SHA-256 of its DER bytes."""
    return hashlib.sha256(value).hexdigest()


def _aws_vpce_id(value: bytes) -> str | None:
    return _text(value[1:]) if value[:1] == bytes((AWS_VPCE_ID,)) else None


def _azure_linkid(value: bytes) -> int | None:
    if len(value) != 5 or value[0] != AZURE_LINKID:
        return None
    return int.from_bytes(value[1:], "little")


def _gcp_psc_id(value: bytes) -> str | None:
    """Decimal text, as Google's own API prints it: JSON readers round numbers above 2^53."""
    return str(int.from_bytes(value, "big")) if len(value) == 8 else None


def _unknown(value: bytes) -> None:
    return None


_UNKNOWN: tuple[str, _Decoder] = ("", _unknown)

_DECODERS: dict[int, tuple[str, _Decoder]] = {
    ALPN: ("alpn", _text),
    AUTHORITY: ("authority", _text),
    CRC32C: ("crc32c", bytes.hex),
    UNIQUE_ID: ("unique_id", bytes.hex),
    SSL: ("ssl", _ssl),
    NETNS: ("netns", _text),
    GCP: ("gcp_psc_id", _gcp_psc_id),
    AWS: ("aws_vpce_id", _aws_vpce_id),
    AZURE: ("azure_linkid", _azure_linkid),
}

_SSL_DECODERS: dict[int, tuple[str, _Decoder]] = {
    SSL_VERSION: ("version", _text),
    SSL_CN: ("cn", _text),
    SSL_CIPHER: ("cipher", _text),
    SSL_SIG_ALG: ("sig_alg", _text),
    SSL_KEY_ALG: ("key_alg", _text),
    SSL_GROUP: ("group", _text),
    SSL_SIG_SCHEME: ("sig_scheme", _text),
    SSL_CLIENT_CERT: ("client_cert_sha256", _fingerprint),
}
