"""TLVs: what each one says in the access log, and the checksum.

How TLVs make a header right or wrong is tested in test_proxyproto.py, where the header is.
"""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.flow import tlv
from tproxyd.flow.tlv import Malformed, Tlv, crc32c, describe
from tproxyd.tests import strategies as wire
from tproxyd.tests.strategies import raw_tlv


@given(st.lists(st.builds(Tlv, st.integers(0, 255), st.binary(max_size=50)), max_size=10))
def test_walk_reads_what_encode_writes(tlvs: list[Tlv]) -> None:
    data = tlv.encode(tlvs)
    assert data == b"".join(raw_tlv(t.type, t.value) for t in tlvs)
    assert tlv.walk(b"??" + data, 2) == tuple(tlvs)


@given(st.binary(max_size=100))
def test_walk_of_anything(data: bytes) -> None:
    """Either the TLVs account for every byte, or it is malformed."""
    try:
        tlvs = tlv.walk(data, 0)
    except Malformed:
        return
    assert tlv.encode(tlvs) == data


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4, and the check value of the CRC catalogues
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc == wire.crc32c_by_bit(data)


@given(st.binary(max_size=200))
def test_crc32c_of_anything(data: bytes) -> None:
    assert crc32c(data) == crc32c(bytearray(data)) == wire.crc32c_by_bit(data)


DER = b"0\x82\x01\x72 not much of a certificate"
DESCRIBED: list[tuple[int, bytes, dict[str, object]]] = [
    (0x01, b"h2", {"alpn": "h2"}),
    (0x02, "例え.example".encode(), {"authority": "例え.example"}),
    (0x02, b"a\nb\x1b[0m\xff\xe2\x80\xae", {"authority": r"a\nb\x1b[0m\xff\u202e"}),
    (0x02, b"", {"authority": ""}),
    (0x03, b"\xe8\xd6\x89\x2d", {"crc32c": "e8d6892d"}),
    (0x04, b"padding", {}),
    (0x05, b"\x00id\xff", {"unique_id": "006964ff"}),
    (0x30, b"blue", {"netns": "blue"}),
    (0x20, b"\x00\x00\x00\x00\x00", {"ssl": {"client": [], "verify": 0}}),
    (
        0x20,
        b"\x07\x00\x00\x00\x0a",
        {"ssl": {"client": ["ssl", "cert_conn", "cert_sess"], "verify": 10}},
    ),
    (
        0x20,
        b"\x89\x80\x00\x00\x00",
        {"ssl": {"client": ["ssl", "0x08", "0x80"], "verify": 1 << 31}},
    ),
    # AWS: subtype 1 is the VPC endpoint; another one, or none, we do not know.
    (0xEA, b"\x01vpce-08d2bf15fac5001c9", {"aws_vpce_id": "vpce-08d2bf15fac5001c9"}),
    (0xEA, b"\x02vpce", {"tlvs": {"0xEA": {"count": 1, "bytes": 5}}}),
    (0xEA, b"", {"tlvs": {"0xEA": {"count": 1, "bytes": 0}}}),
    # Azure: "LinkID", 32 bits, little endian.
    (0xEE, b"\x01\xc1\x45\x00\x21", {"azure_linkid": 0x210045C1}),
    (0xEE, b"\x02\xc1\x45\x00\x21", {"tlvs": {"0xEE": {"count": 1, "bytes": 5}}}),
    (0xEE, b"\x01\xc1\x45\x00", {"tlvs": {"0xEE": {"count": 1, "bytes": 4}}}),
    # Google: 64 bits in network order; as text, because 2^53 is where JSON readers begin to round.
    (0xE0, b"\xff\xff\xff\xff\xc0\xa8\x64\x02", {"gcp_psc_id": "18446744072646845442"}),
    (0xE0, b"\x00" * 7, {"tlvs": {"0xE0": {"count": 1, "bytes": 7}}}),
    (0xF0, b"?", {"tlvs": {"0xF0": {"count": 1, "bytes": 1}}}),
    # The sub-types mean nothing outside of SSL.
    (0x21, b"TLSv1.3", {"tlvs": {"0x21": {"count": 1, "bytes": 7}}}),
]


@pytest.mark.parametrize(("kind", "value", "told"), DESCRIBED, ids=lambda v: ascii(v)[:40])
def test_describe_one(kind: int, value: bytes, told: dict[str, object]) -> None:
    assert describe([Tlv(kind, value)]) == told


def test_describe_ssl() -> None:
    subs = [
        (0x21, b"TLSv1.3", "version"),
        (0x22, "Zoë".encode(), "cn"),
        (0x23, b"TLS_AES_128_GCM_SHA256", "cipher"),
        (0x24, b"RSA-SHA256", "sig_alg"),
        (0x25, b"RSA2048", "key_alg"),
        (0x26, b"x25519", "group"),
        (0x27, b"rsa_pss_rsae_sha256", "sig_scheme"),
    ]
    value = struct.pack(">BI", 5, 0) + b"".join(raw_tlv(kind, text) for kind, text, _ in subs)
    value += raw_tlv(0x28, DER) + raw_tlv(0x04, b"pad") + raw_tlv(0x99, b"new")
    expected: dict[str, object] = {"client": ["ssl", "cert_sess"], "verify": 0}
    expected |= {name: text.decode() for _, text, name in subs}
    expected["client_cert_sha256"] = hashlib.sha256(DER).hexdigest()
    expected["tlvs"] = {"0x99": {"count": 1, "bytes": 3}}
    assert describe([Tlv(tlv.SSL, value)]) == {"ssl": expected}


def test_describe_duplicates_in_order() -> None:
    tlvs = [
        Tlv(2, b"b"),
        Tlv(0xF1, b"xx"),
        Tlv(1, b"h2"),
        Tlv(2, b"a"),
        Tlv(0xF1, b""),
        Tlv(2, b"b"),
    ]
    assert describe(tlvs) == {
        "authority": ["b", "a", "b"],
        "alpn": "h2",
        "tlvs": {"0xF1": {"count": 2, "bytes": 2}},
    }


def test_describe_nothing() -> None:
    assert describe([]) == {}


def test_describe_of_a_header_full_of_unknown_ones_is_short() -> None:
    told = describe([Tlv(n % 256, b"") for n in range(20_000) if n % 256 >= 0xF0])
    assert told == {"tlvs": {f"0x{n:02X}": {"count": 78, "bytes": 0} for n in range(0xF0, 0x100)}}


@given(wire.tlv_lists)
def test_described_text_cannot_forge_a_log_line(tlvs: list[Tlv]) -> None:
    told = json.loads(json.dumps(describe(tlvs)))
    texts: list[object] = [told]
    while texts:
        item = texts.pop()
        match item:
            case dict():
                texts += [*item.keys(), *item.values()]
            case list():
                texts += item
            case str():
                assert item.isprintable()
