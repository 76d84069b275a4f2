"""What other programs' routes and policy rules do to packets with our mark.

- The kernel asks the rules by priority, equal ones in the order in which they were added, and the
  first that matches and whose table has a route decides. Ours has one for everything: what stands
  behind it gets no packet with our mark.
- A rule without a mark matches all. One with `not` matches what its selectors do not, all of them
  together (fib_rule_match): wg-quick's `not fwmark 0xca6c lookup 51820` takes ours.
- Packets carry our mark and nothing else, unless others add to it. So a rule for some other bits,
  such as Tailscale's 0x80000/0xff0000, does not match them, wherever it stands.
"""

from __future__ import annotations

import socket
from enum import Enum
from typing import NamedTuple

from tproxyd.kernel import netlink
from tproxyd.kernel.firewall import FULL_MASK, mark_mask
from tproxyd.kernel.netlink import Item

# include/uapi/linux/fib_rules.h, rtnetlink.h
_INVERT = 0x2
_FR_ACT_NOP = 3
_RT_TABLE_LOCAL = 255
# What says nothing of the packet.
_NO_SELECTORS = {
    *(netlink.TABLE, netlink.PRIORITY, netlink.RULE_PROTOCOL, netlink.RULE_GOTO),
    *(netlink.RULE_MARK, netlink.RULE_MASK, netlink.RULE_FLOW, netlink.RULE_PAD),
}


class Clash(NamedTuple):
    what: str
    remedy: str
    sure: bool = True  # or it depends on the packet


class _Takes(Enum):
    """Which of the packets with our mark."""

    NONE = "none"
    SOME = "some"
    ALL = "all"


def of_route(item: Item, table: int) -> Clash:
    """A route of another program's in our table."""
    family = 4 if item.family == socket.AF_INET else 6
    where = f"{item.address(netlink.DST) or 'default'}/{item.dst_len}"
    what = f"table {table} has another program's IPv{family} route: {where}"
    return Clash(what, "remove it, or give tproxyd another `table`")


def of_rule(item: Item, mark: int, table: int, priority: int) -> Clash | None:
    """A rule of another program's, beside ours; None where it is not in our way, nor we in its."""
    family = 4 if item.family == socket.AF_INET else 6
    at, to = item.number(netlink.PRIORITY) or 0, item.number(netlink.TABLE) or item.table
    rule = f"another program's IPv{family} rule at priority {at}"
    if to == table:
        return Clash(f"{rule} sends packets to table {table}", "give tproxyd another `table`")
    value = item.number(netlink.RULE_MARK) or 0
    if at > priority:
        if not item.flags & _INVERT and value & mark_mask(mark) == mark:
            what = f"{rule} is for packets of mark {value:#x}, which is ours"
            return Clash(what, "give tproxyd another `mark`")
        return None
    takes = _takes(item, mark)
    if takes is _Takes.NONE or to == _RT_TABLE_LOCAL:  # the kernel's own, wherever it was moved
        return None
    remedy = f"make it a rule behind ours (ip rule, a priority above {priority})"
    if takes is _Takes.SOME:
        what = f"{rule} stands before ours, and takes packets of ours that it matches"
        return Clash(what, f"{remedy}, if clients are among those", sure=False)
    if value and not item.flags & _INVERT:
        what = f"{rule} is for packets of mark {value:#x}, which is ours"
        return Clash(what, f"{remedy}, or give tproxyd another `mark`")
    return Clash(f"{rule} stands before ours, and takes our packets", remedy)


def _takes(item: Item, mark: int) -> _Takes:
    if item.action == _FR_ACT_NOP or netlink.RULE_L3MDEV in item.attributes:  # lo is in no VRF
        return _Takes.NONE
    mask = item.number(netlink.RULE_MASK)
    if mask is None:
        mask = FULL_MASK if netlink.RULE_MARK in item.attributes else 0
    carries = mark & mask == (item.number(netlink.RULE_MARK) or 0)
    selectors = item.attributes.keys() - _NO_SELECTORS
    if item.number(netlink.RULE_SUPPRESS_PREFIXLEN) == FULL_MASK:  # always listed; this is none
        selectors -= {netlink.RULE_SUPPRESS_PREFIXLEN}
    narrow = bool(selectors or item.tos)
    inverted = bool(item.flags & _INVERT)
    if carries and narrow:
        return _Takes.SOME
    if carries is inverted:
        return _Takes.NONE
    return _Takes.SOME if netlink.RULE_SUPPRESS_PREFIXLEN in selectors else _Takes.ALL
