"""What we tell an upstream that reads PROXY headers: who the client is, and what came with it.

The header goes out before any payload, in the first segment together with what is at hand. Where
the sender of an inbound header had nothing to say (LOCAL, UNKNOWN), we say nothing either: v2
LOCAL, v1 UNKNOWN; the upstream then takes the connection for what it is.

TLVs of the inbound header are forwarded as they came: those of the types asked for, in their order,
duplicates too. Never the checksum, which was right for another header. A header's length has 16
bits, and so all of it may not fit any more (addresses grow from IPv4 to IPv6, TLVs of our own are
added): what does not fit beside ours is left out whole and counted. A length that wrapped round
would let a client write a header of its choice (CVE-2026-47692). Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tproxyd.addr import Client, Endpoint, OriginalDst
from tproxyd.config import SendProxy, SendTlvs
from tproxyd.flow import tlv
from tproxyd.flow.proxyproto import Header, encode_v1, encode_v2
from tproxyd.flow.tlv import Tlv

# Of the 16-bit length, what addresses and the checksum take at most: two IPv6 addresses, two ports.
_ROOM = 0xFFFF - 36 - 7
_TLV_HEAD = 3
_UNIQUE_ID_SIZE = 16


class Announcement(NamedTuple):
    """What the access log says of a header that was sent."""

    version: int
    unique_id: str = ""  # hexadecimal; "" where there is none
    left_out: int = 0  # TLVs that did not fit


Announcer = Callable[[Client, OriginalDst, Header | None], tuple[bytes, Announcement]]


def announcer(
    kind: SendProxy, options: SendTlvs, random: Callable[[int], bytes]
) -> Announcer | None:
    """A function that makes the header for a connection; None where none is to be sent.

    `random`: so many random bytes (os.urandom).
    """
    if kind is SendProxy.OFF:
        return None
    if kind is SendProxy.V1:
        return _announce_v1

    def announce_v2(
        client: Client, dst: OriginalDst, header: Header | None
    ) -> tuple[bytes, Announcement]:
        source, destination = _ends(client, dst, header)
        came, ours = _tlvs(options, header.tlvs if header is not None else (), random)
        sent = (*_fitting(came, ours), *ours)
        unique = next((each.value.hex() for each in sent if each.type == tlv.UNIQUE_ID), "")
        made = encode_v2(source, destination, sent, crc32c=options.crc32c)
        return made, Announcement(2, unique, len(came) + len(ours) - len(sent))

    return announce_v2


def _announce_v1(
    client: Client, dst: OriginalDst, header: Header | None
) -> tuple[bytes, Announcement]:
    return encode_v1(*_ends(client, dst, header)), Announcement(1)


def _ends(
    client: Client, dst: OriginalDst, header: Header | None
) -> tuple[Endpoint | None, Endpoint | None]:
    """Who speaks, and where it wanted to go; twice None when the sender did not say."""
    if header is None:
        return client, dst
    return header.source, header.destination


def _tlvs(
    options: SendTlvs, came: tuple[Tlv, ...], random: Callable[[int], bytes]
) -> tuple[list[Tlv], list[Tlv]]:
    """Those to be forwarded, and ours. What has the type of an own one is nobody else's to say."""
    wanted, barred = options.forward, {tlv.CRC32C, tlv.NOOP, *(kind for kind, _ in options.own)}
    forwarded = [
        each for each in came if each.type not in barred and (wanted is None or each.type in wanted)
    ]
    there = {each.type for each in forwarded}
    ours = []
    if options.authority and tlv.AUTHORITY not in there:
        ours.append(Tlv(tlv.AUTHORITY, options.authority.encode()))
    if options.unique_id and tlv.UNIQUE_ID not in there:
        ours.append(Tlv(tlv.UNIQUE_ID, random(_UNIQUE_ID_SIZE)))
    ours += (Tlv(kind, value) for kind, value in options.own)
    return forwarded, ours


def _fitting(tlvs: list[Tlv], ours: list[Tlv]) -> list[Tlv]:
    """Those for which there is room beside ours, in order."""
    room = _ROOM - sum(_TLV_HEAD + len(each.value) for each in ours)
    fitting = []
    for each in tlvs:
        size = _TLV_HEAD + len(each.value)
        if size <= room:
            room -= size
            fitting.append(each)
    return fitting
