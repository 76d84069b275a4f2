"""A client at the far end of a wire, in the same network namespace.

Rules for what comes in are only tried by packets that come in: those of an ordinary socket here go
over lo, which Istio's rules treat apart. A second network namespace would need CAP_SYS_ADMIN, and
an init container has CAP_NET_ADMIN and CAP_NET_RAW. So the client is one that the kernel knows
nothing of: a veth pair of which one end has an address, and a packet socket at the other end that
speaks as much TCP as a handshake and a few bytes take.

    NEAR  192.0.2.2  ═════════  FAR  192.0.2.1, made up here

The kernel sends its answers to a hardware address that the far end does not have. So the packet
socket sees them, and the IP layer there drops them at once (PACKET_OTHERHOST, ip_rcv_core) instead
of running them through the rules a second time.

The addresses are for documentation (RFC 5737, RFC 3849): no route that matters is in their way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import time
from types import TracebackType
from typing import NamedTuple

from tproxyd.addr import Endpoint
from tproxyd.kernel.netlink import Netlink, attribute

NEAR, FAR = "tproxyd-near", "tproxyd-far"
HERE = {False: "192.0.2.2", True: "2001:db8::2"}  # by whether it is IPv6
THERE = {False: "192.0.2.1", True: "2001:db8::1"}
_LENGTH = {False: 30, True: 126}
_NEAR_MAC, _NOBODYS_MAC = bytes.fromhex("027470787902"), bytes.fromhex("027470787901")

# linux/rtnetlink.h, linux/netlink.h
_NEWLINK, _DELLINK, _NEWADDR, _NEWNEIGH = 16, 17, 20, 28
_NEW = 0x600  # NLM_F_CREATE | NLM_F_EXCL
_UP = 1  # IFF_UP
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO = 1, 3, 18
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_F_NODAD = 1, 2, 8, 0x02
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80

_ETHERTYPE = {False: 0x0800, True: 0x86DD}
_FIN, _SYN, _RST, _PSH, _ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_RESEND_S = 0.2


class Wire:
    """`with Wire(ipv6) as wire:`, and gone afterwards. Raises OSError where it can't be made."""

    def __init__(self, ipv6: bool) -> None:
        self._families = [False, True] if ipv6 else [False]

    def __enter__(self) -> Wire:
        remove()
        peer = _link(0) + attribute(_IFLA_IFNAME, FAR.encode() + b"\0")
        data = attribute(_INFO_DATA, attribute(_VETH_PEER, peer))
        _ask(
            _NEWLINK,
            _NEW,
            _link(0)
            + attribute(_IFLA_IFNAME, NEAR.encode() + b"\0")
            + attribute(_IFLA_ADDRESS, _NEAR_MAC)
            + attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, b"veth") + data),
        )
        try:
            for name in (FAR, NEAR):  # which can't be made so: one end alone does not come up
                _ask(_NEWLINK, 0, _link(socket.if_nametoindex(name), _UP))
            for v6 in self._families:
                self._address(v6)
        except BaseException:
            remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        remove()

    def _address(self, v6: bool) -> None:
        family, index = _family(v6), socket.if_nametoindex(NEAR)
        here, there = (socket.inet_pton(family, ends[v6]) for ends in (HERE, THERE))
        _ask(
            _NEWADDR,
            _NEW,
            struct.pack("=BBBBi", family, _LENGTH[v6], 0, 0, index)
            + attribute(_IFA_LOCAL, here)
            + attribute(_IFA_ADDRESS, here)
            + attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_NODAD)),
        )
        _ask(
            _NEWNEIGH,
            _NEW,
            struct.pack("=BxxxiHBB", family, index, _NUD_PERMANENT, 0, 0)
            + attribute(_NDA_DST, there)
            + attribute(_NDA_LLADDR, _NOBODYS_MAC),
        )


def _family(v6: bool) -> socket.AddressFamily:
    return socket.AF_INET6 if v6 else socket.AF_INET


def remove() -> bool:
    """Whether there was one, left by a killed process. Raises OSError."""
    try:
        index = socket.if_nametoindex(NEAR)
    except OSError:
        return False
    _ask(_DELLINK, 0, _link(index))
    return True


def _link(index: int, flags: int = 0) -> bytes:
    """An ifinfomsg; flags are those to be set."""
    return struct.pack("=BxHiII", 0, 0, index, flags, flags)


def _ask(kind: int, flags: int, body: bytes) -> None:
    with contextlib.closing(Netlink()) as netlink:
        netlink.write(kind, body, flags)


# The client -------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    source: int
    destination: int
    number: int
    acknowledged: int
    flags: int
    payload: bytes


class FarClient:
    """A TCP client on the wire, in the least words. What it waits for in vain is a TimeoutError."""

    def __init__(self, v6: bool) -> None:
        self._v6 = v6
        self.address = Endpoint(THERE[v6], random.randrange(32768, 61000))
        self._next = random.randrange(1 << 32)
        self._expected = 0
        kind = _ETHERTYPE[v6]
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(kind))
        self._sock.bind((FAR, kind))

    def close(self) -> None:
        """The other end is reset, if it is there."""
        with contextlib.suppress(OSError):
            if self._expected:
                self._send(_RST | _ACK)
        self._sock.close()

    def connect(self, where: Endpoint, until: float) -> None:
        self._where = where
        while True:
            self._send(_SYN)
            answer = self._receive(min(until, time.monotonic() + _RESEND_S))
            if answer and answer.flags & _RST:
                raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            if answer and answer.flags & (_SYN | _ACK) == _SYN | _ACK:
                break
            if time.monotonic() >= until:
                raise TimeoutError
        self._next = _wrap(self._next + 1)
        self._expected = _wrap(answer.number + 1)
        self._send(_ACK)

    def receive(self, until: float) -> bytes:
        """The bytes of the next segment that has some."""
        while True:
            segment = self._receive(until)
            if segment is None:
                raise TimeoutError
            if segment.flags & _RST:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            if segment.payload and segment.number == self._expected:
                self._expected = _wrap(self._expected + len(segment.payload))
                self._send(_ACK)
                return segment.payload

    def _receive(self, until: float) -> _Segment | None:
        waiting = select.poll()
        waiting.register(self._sock, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if waiting.poll(left * 1000):
                segment = _parse(self._sock.recv(65536), self._v6)
                ends = (self._where.port, self.address.port)
                if segment and (segment.source, segment.destination) == ends:
                    return segment
        return None

    def _send(self, flags: int) -> None:
        source = socket.inet_pton(_family(self._v6), self.address.host)
        there = socket.inet_pton(_family(self._v6), self._where.host)
        ports = self.address.port, self._where.port
        tcp = struct.pack(
            "!HHIIBBHHH", *ports, self._next, self._expected, 5 << 4, flags, 65535, 0, 0
        )
        pseudo = source + there + struct.pack("!II", len(tcp), socket.IPPROTO_TCP)
        tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
        if self._v6:
            head = struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64) + source + there
        else:
            head = _ipv4_header(len(tcp), source, there)
        kind = _ETHERTYPE[self._v6]
        self._sock.sendto(head + tcp, (FAR, kind, 0, 0, _NEAR_MAC))


def _ipv4_header(size: int, source: bytes, there: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
    head += source + there
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:]


def _parse(packet: bytes, v6: bool) -> _Segment | None:
    if v6:
        protocol, tcp = packet[6], packet[40 : 40 + struct.unpack_from("!H", packet, 4)[0]]
    else:
        protocol = packet[9]
        tcp = packet[(packet[0] & 0xF) * 4 : struct.unpack_from("!H", packet, 2)[0]]
    if protocol != socket.IPPROTO_TCP or len(tcp) < 20:
        return None
    source, destination, number, acknowledged, offset, flags = struct.unpack_from("!HHIIBB", tcp)
    return _Segment(source, destination, number, acknowledged, flags, tcp[(offset >> 4) * 4 :])


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _wrap(number: int) -> int:
    return number & 0xFFFF_FFFF
