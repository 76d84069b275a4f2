"""Which policy rules of others take packets with our mark, and whose packets ours takes."""

from __future__ import annotations

import socket
import struct

import pytest

from tproxyd.kernel import netlink
from tproxyd.kernel.clashes import of_rule

MARK, TABLE, PRIORITY = 0x539, 133, 1337
INVERT = 0x2
LOOKUP, NOP, UNREACHABLE = 1, 3, 7


def rule(
    at: int,
    *,
    to: int = 77,
    mark: int = 0,
    mask: int | None = None,
    flags: int = 0,
    action: int = LOOKUP,
    tos: int = 0,
    more: dict[int, bytes] | None = None,
) -> netlink.Item:
    """As the kernel lists one: a mark of 0 is left out, a mask is not where there is either."""
    numbers = {netlink.TABLE: to, netlink.PRIORITY: at, netlink.RULE_SUPPRESS_PREFIXLEN: 2**32 - 1}
    if mark:
        numbers[netlink.RULE_MARK] = mark
    if mark or mask is not None:
        numbers[netlink.RULE_MASK] = 2**32 - 1 if mask is None else mask
    values = {kind: struct.pack("=I", number) for kind, number in numbers.items()}
    values[netlink.RULE_PROTOCOL] = b"\3"
    head = struct.pack("=8BI", socket.AF_INET, 0, 0, tos, 0, 0, 0, action, flags)
    body = b"".join(netlink.attribute(*each) for each in (values | (more or {})).items())
    return netlink.item(head + body)


SOURCE = {2: socket.inet_aton("10.0.0.1")}
SUPPRESS = {netlink.RULE_SUPPRESS_PREFIXLEN: struct.pack("=I", 0)}


@pytest.mark.parametrize(
    ("item", "verdict"),
    [
        # Before ours.
        (rule(0, to=255), "no"),  # the kernel's own
        (rule(100, to=255), "no"),  # where Cilium moves it
        (rule(100), "sure"),
        (rule(PRIORITY), "sure"),
        (rule(100, action=UNREACHABLE, to=0), "sure"),
        (rule(100, action=NOP, to=0), "no"),
        (rule(100, mark=MARK), "sure"),
        (rule(100, mark=0x9, mask=0xF), "sure"),
        (rule(100, mark=0x8, mask=0xF), "no"),
        (rule(100, mark=0x80000, mask=0xFF0000), "no"),
        (rule(100, mark=0, mask=0xFF0000), "sure"),
        (rule(100, mark=0xCA6C, flags=INVERT), "sure"),
        (rule(100, mark=MARK, flags=INVERT), "no"),
        (rule(100, flags=INVERT), "no"),
        (rule(100, more=SOURCE), "depends"),
        (rule(100, more=SOURCE, flags=INVERT), "depends"),
        (rule(100, mark=MARK, more=SOURCE), "depends"),
        (rule(100, mark=1, more=SOURCE), "no"),
        (rule(100, mark=1, more=SOURCE, flags=INVERT), "sure"),
        (rule(100, tos=8), "depends"),
        (rule(100, more=SUPPRESS), "depends"),
        (rule(1000, to=0, more={netlink.RULE_L3MDEV: b"\1"}), "no"),
        # Behind it.
        (rule(9000), "no"),
        (rule(5210, mark=0x80000, mask=0xFF0000), "no"),
        (rule(9000, mark=0x10539), "sure"),
        (rule(9000, mark=0x9, mask=0xF), "no"),
        (rule(9000, mark=MARK, flags=INVERT), "no"),
        (rule(9000, to=TABLE, more=SOURCE), "sure"),
        (rule(32766, to=254), "no"),
    ],
)
def test_rules_of_others(item: netlink.Item, verdict: str) -> None:
    clash = of_rule(item, MARK, TABLE, PRIORITY)
    assert verdict == ("no" if clash is None else "sure" if clash.sure else "depends")
    if clash is not None:
        assert f"priority {item.number(netlink.PRIORITY)}" in clash.what
        assert clash.remedy
