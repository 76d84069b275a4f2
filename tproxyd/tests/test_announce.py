"""The PROXY header that an upstream gets: whatever came, what it reads is what we meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Client, Endpoint, OriginalDst
from tproxyd.config import SendProxy, SendTlvs
from tproxyd.flow import tlv
from tproxyd.flow.announce import Announcement, Announcer, announcer
from tproxyd.flow.proxyproto import Header, encode_v1, encode_v2, parse
from tproxyd.flow.tlv import Tlv

CLIENT = Client(Endpoint("106.52.131.116", 51234))
DST = OriginalDst(Endpoint("10.9.1.1", 80))
VIP = Endpoint("106.52.131.1", 443)
V6 = Client(Endpoint("2001:db8::7", 51234))
LARGEST = 16 + 0xFFFF
EVERYTHING = SendTlvs(forward=None, own=((0xE4, b"own"),), authority="a", unique_id=True)


def announce(kind: str, options: SendTlvs = SendTlvs()) -> Announcer:  # noqa: B008 - frozen
    made = announcer(SendProxy(kind), options, lambda size: b"r" * size)
    assert made is not None
    return made


def came(*tlvs: Tlv, source: Endpoint | None = CLIENT, local: bool = False) -> Header:
    return Header(2, 0, local, source, VIP if source else None, tlvs)


def read(header: bytes) -> Header:
    parsed = parse(header, LARGEST)
    assert isinstance(parsed, Header)
    assert parsed.size == len(header)
    return parsed


def test_off_is_nothing_to_do() -> None:
    assert announcer(SendProxy.OFF, SendTlvs(), bytes) is None


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("client", [CLIENT, V6])
def test_a_client_without_a_header_of_its_own(kind: str, client: Client) -> None:
    header, said = announce(kind)(client, DST, None)
    told = read(header)
    assert told.source == client
    assert told.destination == DST  # folded again: an IPv4 destination beside an IPv6 client
    assert (told.version, told.tlvs) == (said.version, ())
    assert said == Announcement(int(kind[1]))


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_what_the_sender_said_is_passed_on(kind: str) -> None:
    told = read(announce(kind)(CLIENT, DST, came())[0])
    assert (told.source, told.destination) == (CLIENT, VIP)


def test_a_sender_that_says_nothing() -> None:
    """A health check of the balancer stays one."""
    for header in (came(source=None, local=True), came(source=None)):
        assert announce("v1")(CLIENT, DST, header)[0] == encode_v1(None, None)
        assert announce("v2")(CLIENT, DST, header)[0] == encode_v2(None, None)


# TLVs ---------------------------------------------------------------------------------------------

A, B, C = Tlv(0xEA, b"one"), Tlv(0x02, b"example.org"), Tlv(0xEA, b"two")


@pytest.mark.parametrize(
    ("forward", "sent"),
    [
        (frozenset[int](), ()),
        (None, (A, B, C)),
        (frozenset((0xEA,)), (A, C)),
        (frozenset((0x02, 0x99)), (B,)),
    ],
)
def test_forwarded_in_order_and_as_often(
    forward: frozenset[int] | None, sent: tuple[Tlv, ...]
) -> None:
    header, _ = announce("v2", SendTlvs(forward=forward))(CLIENT, DST, came(A, B, C))
    assert read(header).tlvs == sent


def test_a_checksum_is_made_anew_and_padding_left_behind() -> None:
    inbound = came(Tlv(tlv.CRC32C, b"old!"), Tlv(tlv.NOOP, b"..."), A)
    header, _ = announce("v2", SendTlvs(forward=None))(CLIENT, DST, inbound)
    assert read(header).tlvs == (A,)
    header, _ = announce("v2", SendTlvs(forward=None, crc32c=True))(CLIENT, DST, inbound)
    assert [each.type for each in read(header).tlvs] == [0xEA, tlv.CRC32C]
    damaged = header.replace(b"one", b"0ne")
    with pytest.raises(Exception, match="CRC32C does not match"):
        parse(damaged)


def test_what_we_add() -> None:
    header, said = announce("v2", EVERYTHING)(CLIENT, DST, None)
    unique = b"r" * 16
    assert read(header).tlvs == (Tlv(2, b"a"), Tlv(5, unique), Tlv(0xE4, b"own"))
    assert said == Announcement(2, unique.hex())


def test_what_the_client_says_of_itself_is_not_said_twice() -> None:
    header, said = announce("v2", EVERYTHING)(CLIENT, DST, came(B, Tlv(5, b"id")))
    assert read(header).tlvs == (B, Tlv(5, b"id"), Tlv(0xE4, b"own"))
    assert said.unique_id == b"id".hex()


def test_nobody_says_what_is_ours_to_say() -> None:
    forged = Tlv(0xE4, b"forged")
    header, said = announce("v2", EVERYTHING)(CLIENT, DST, came(forged, A))
    assert [each for each in read(header).tlvs if each.type == 0xE4] == [Tlv(0xE4, b"own")]
    assert said.left_out == 0


def test_what_does_not_fit_is_left_out_whole() -> None:
    """Nearly 64 KiB came, over IPv4; the client in it is an IPv6 one, and we add to it."""
    big = Tlv(0xE0, bytes(0xFFFF - 12 - 3 - 3 - len(A.value)))
    header, said = announce("v2", EVERYTHING)(V6, DST, came(A, big, source=V6))
    assert said.left_out == 1
    assert read(header).tlvs == (A, Tlv(2, b"a"), Tlv(5, b"r" * 16), Tlv(0xE4, b"own"))


values = st.builds(Tlv, st.integers(0, 255), st.binary(max_size=40) | st.just(bytes(30_000)))


@given(
    st.lists(values, max_size=6),
    st.none() | st.frozensets(st.integers(0, 255)),
    st.booleans(),
    st.booleans(),
)
def test_the_length_is_exact_whatever_came(
    tlvs: list[Tlv], forward: frozenset[int] | None, crc32c: bool, unique_id: bool
) -> None:
    tlvs = [each for each in tlvs if each.type not in (tlv.CRC32C, tlv.UNIQUE_ID, tlv.SSL)]
    options = SendTlvs(forward=forward, unique_id=unique_id, crc32c=crc32c)
    header, said = announce("v2", options)(V6, DST, came(*tlvs))
    told = read(header)
    assert told.source == CLIENT
    ours = (tlv.UNIQUE_ID, tlv.CRC32C)
    sent = [each for each in told.tlvs if each.type not in ours]
    wanted = [each for each in tlvs if each.type != tlv.NOOP]
    wanted = [each for each in wanted if forward is None or each.type in forward]
    assert len(wanted) - len(sent) == said.left_out
    rest = iter(wanted)
    assert all(each in rest for each in sent), "another order, or what never came"
