"""Netlink messages: as the kernel sends them, with gaps, refusals and answers to somebody else."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator

import pytest

from tproxyd.kernel import netlink
from tproxyd.kernel.netlink import RTM_GETROUTE, RTM_GETRULE, Netlink

if sys.byteorder != "little":
    pytest.skip("the samples are of a little-endian kernel", allow_module_level=True)

# ip route add local default dev lo table 70000 proto 140, as Linux 6.18 lists it.
ROUTE = bytes.fromhex(
    "020000 00 fc8cfe02 00000000"  # IPv4, /0; table RT_TABLE_COMPAT, 140, host, local
    "08000f00 70110100"  # RTA_TABLE
    "08000400 01000000"  # RTA_OIF
)
# ip -6 rule add to 2001:db8::/33 fwmark 0x539 lookup 133 priority 1337 protocol 140
RULE = bytes.fromhex(
    "0a210000 85000001 00000000"
    "14000100 20010db8000000000000000000000000"  # FRA_DST
    "08000f00 85000000 08000600 39050000 08000a00 39050000 08001000 ffffffff"
    "05001500 8c000000"  # FRA_PROTOCOL: one byte, and three that align
)
DONE, ERROR, MULTI, INTERRUPTED = 3, 2, 0x2, 0x12


def message(kind: int, body: bytes, *, flags: int = MULTI, number: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def done(code: int = 0, **more: int) -> bytes:
    return message(DONE, struct.pack("=i", -code), **more)


class FakeSocket:
    def __init__(self, *answers: bytes) -> None:
        self.answers, self.sent = list(answers), list[bytes]()

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def recv(self, _: int) -> bytes:
        return self.answers.pop(0)


@pytest.fixture
def asked() -> Iterator[Netlink]:
    kernel = Netlink()
    real = kernel._socket
    yield kernel
    real.close()


def answer(kernel: Netlink, *answers: bytes) -> FakeSocket:
    kernel._socket = fake = FakeSocket(*answers)  # type: ignore[assignment]
    return fake


def test_a_route() -> None:
    item = netlink.item(ROUTE)
    assert (item.family, item.dst_len, item.protocol, item.action) == (2, 0, 140, 2)
    assert (item.number(netlink.TABLE), item.number(netlink.OIF)) == (70_000, 1)
    assert item.number(netlink.PRIORITY) is None
    assert item.address(netlink.DST) is None
    assert item.raw == ROUTE


def test_a_rule() -> None:
    item = netlink.item(RULE)
    assert (item.family, item.dst_len, item.action, item.table) == (10, 33, 1, 133)
    assert item.address(netlink.DST) == "2001:db8::"
    assert item.number(netlink.RULE_PROTOCOL) == 140
    assert item.number(netlink.RULE_MASK) == 0xFFFFFFFF


def test_a_list_over_several_reads(asked: Netlink) -> None:
    route, rule = message(24, ROUTE), message(24, RULE)
    fake = answer(asked, route + rule, route, done())
    found = asked.list(RTM_GETROUTE, socket.AF_INET, action=2)
    assert [item.raw for item in found] == [ROUTE, RULE, ROUTE]
    (sent,) = fake.sent
    assert sent == message(RTM_GETROUTE, b"\2\0\0\0\0\0\0\2" + bytes(4), flags=0x301)


def test_messages_are_aligned() -> None:
    odd = message(24, b"odd")
    found = netlink.messages(odd + b"\0" + message(3, b"even"))
    assert [body for _, _, _, body in found] == [b"odd", b"even"]


def test_the_table_is_asked_for_whole(asked: Netlink) -> None:
    fake = answer(asked, done())
    assert asked.list(RTM_GETROUTE, socket.AF_INET, table=70_000) == []
    assert fake.sent[0].endswith(bytes.fromhex("08000f0070110100"))


def test_a_list_with_gaps_is_asked_for_again(asked: Netlink) -> None:
    gaps = message(32, RULE, flags=INTERRUPTED) + done()
    whole = message(32, RULE, number=2) + message(32, RULE, number=2) + done(number=2)
    fake = answer(asked, gaps, whole)
    assert len(asked.list(RTM_GETRULE, socket.AF_INET6)) == 2
    assert len(fake.sent) == 2


def test_addresses_with_gaps_are_asked_for_again(asked: Netlink) -> None:
    here = struct.pack("=4BI", socket.AF_INET6, 128, 0, 0, 1)
    here += netlink.attribute(1, socket.inet_pton(socket.AF_INET6, "::6"))
    gaps = message(20, here, flags=INTERRUPTED) + done()
    answer(asked, gaps, message(20, here, number=2) + done(number=2))
    assert asked.addresses(1) == [("::6", 128, 0)]


def test_gaps_every_time(asked: Netlink) -> None:
    answer(asked, *(done(flags=INTERRUPTED, number=number) for number in range(1, 11)))
    with pytest.raises(OSError, match="under every attempt") as caught:
        asked.list(RTM_GETRULE, socket.AF_INET6)
    assert caught.value.errno == errno.EAGAIN


@pytest.mark.parametrize("kind", [ERROR, DONE])
def test_a_refusal(asked: Netlink, kind: int) -> None:
    """At once, or in the middle of a list."""
    refusal = message(kind, struct.pack("=i", -errno.EOPNOTSUPP))
    answer(asked, message(24, ROUTE) * (kind == DONE), refusal)
    with pytest.raises(OSError, match="not supported") as caught:
        asked.list(RTM_GETROUTE, socket.AF_INET)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_the_rest_of_an_answer_that_was_given_up_is_read_over(asked: Netlink) -> None:
    answer(asked, done(errno.EPERM), message(24, ROUTE) + done(), done(number=2))
    with pytest.raises(PermissionError):
        asked.list(RTM_GETROUTE, socket.AF_INET)
    assert asked.list(RTM_GETROUTE, socket.AF_INET) == []


def test_the_flags_of_lo(asked: Netlink) -> None:
    link = struct.pack("=BxHiII", 0, 772, 1, 0x49, 0) + b"\x07\0\x03\0lo\0\0"
    answer(asked, message(16, link, flags=0) + message(ERROR, bytes(20), flags=0))
    assert asked.link_flags(1) == 0x49


def test_an_item_is_sent_back_to_be_removed(asked: Netlink) -> None:
    fake = answer(asked, message(ERROR, bytes(20), flags=0))
    asked.remove(netlink.RTM_DELRULE, netlink.item(RULE))
    assert fake.sent == [message(33, RULE, flags=0x5)]


def test_the_real_kernel_lists_its_tables() -> None:
    """Anybody may look: the rules local, main and default are there, or others in their place."""
    kernel = Netlink()
    try:
        rules = kernel.list(RTM_GETRULE, socket.AF_INET)
        assert {item.family for item in rules} <= {socket.AF_INET}
        assert kernel.link_flags(1) & 0x8, "IFF_LOOPBACK"
    finally:
        kernel.close()
