"""What legacy tables of iptables there are and what is in them, straight from the kernel.

Neither the iptables command nor python-iptables is asked, for two reasons: a look must cost little,
since every check looks for what any backend left; and must not create anything. (Both load the
module of a table that they are asked for, and from then on it is there.) So a table is looked at
only if /proc/net/ip_tables_names, or ip6_, has its name.

The kernel hands a table out as one block (include/uapi/linux/netfilter_ipv4/ip_tables.h, and
ip6_tables.h in the same shape); the names of its chains stand in it as text.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tproxyd import linux
from tproxyd.kernel.firewall import Family

_NAMES: dict[Family, str] = {4: "ip_tables_names", 6: "ip6_tables_names"}
_LEVEL: dict[Family, int] = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}
_AF: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
# IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; IP6T_SO_… are the same.
_GET_INFO, _GET_ENTRIES = 64, 65
# struct ipt_getinfo: name, valid_hooks, hook_entry[5], underflow[5], num_entries, size
_INFO = struct.Struct("32s 13I")
# struct ipt_get_entries: name, size, and entries that are aligned to 8
_ENTRIES = struct.Struct("32s I 4x")


class _Layout(NamedTuple):
    """Of an entry: where the interface stands that a packet leaves by, with its mask behind that of
    the other; what is inverted; the offsets of the target and of the next; and the counters (two of
    64 bits).
    """

    out: int
    inverted: int
    offsets: int
    counters: int


_LAYOUT: dict[Family, _Layout] = {4: _Layout(32, 83, 88, 96), 6: _Layout(80, 132, 140, 152)}
_NAME = 16  # IFNAMSIZ
_INV_VIA_OUT = 0x02  # IPT_INV_VIA_OUT, IP6T_INV_VIA_OUT
# sizeof(struct xt_entry_target). One called "ERROR" begins a chain, whose name stands behind it.
_TARGET = 32
_COUNTERS = bytes(16)


def names(family: Family) -> tuple[str, ...]:
    """The legacy tables that exist in the calling thread's network namespace."""
    try:
        with open(f"/proc/thread-self/net/{_NAMES[family]}", encoding="ascii") as file:
            return tuple(sorted(file.read().split()))
    except OSError:  # no such module, or not permitted
        return ()


def has_rules() -> bool:
    """Whether a legacy table has a rule or a chain, anybody's."""
    families: tuple[Family, ...] = (4, 6)
    return any(
        rules > 0
        for family in families
        for name in names(family)
        for rules in _rule_counts(family, name)
    )


def _rule_counts(family: Family, name: str) -> list[int]:
    with contextlib.suppress(OSError), _socket(family) as sock:
        _, hooks, *_, entries, _ = _info(sock, family, name)
        # A policy for each of the kernel's chains, and an end.
        return [entries - hooks.bit_count() - 1]
    return []


def content(family: Family, name: str) -> bytes:
    """The table as the kernel holds it, with its counters at 0. OSError where it is refused."""
    with _socket(family) as sock:
        while True:
            size = _info(sock, family, name)[-1]
            request = _ENTRIES.pack(name.encode(), size) + bytes(size)
            try:
                answer = linux.ask_socket(sock, _LEVEL[family], _GET_ENTRIES, request)
            except BlockingIOError:  # it has just changed its size
                continue
            return _without_counters(answer[_ENTRIES.size :], family)


class Target(NamedTuple):
    """What a rule does."""

    chain: str  # "" = one of the kernel's
    name: str  # "" = a verdict, or another chain
    on_lo: bool  # not only to what leaves by other interfaces


def targets(family: Family, name: str) -> Iterator[Target]:
    """Of all rules of a table, with its policies. Raises OSError."""
    block, at, layout, chain = content(family, name), 0, _LAYOUT[family], ""
    while at < len(block):
        target_at, step = struct.unpack_from("2H", block, at + layout.offsets)
        entry = block[at : at + step]
        target = _text(entry[target_at + 2 :])  # struct xt_entry_target: its size, its name
        if target == "ERROR":
            chain = _text(entry[target_at + _TARGET :])
        else:
            yield Target(chain, target, _is_for_lo(entry, layout))
        at += step


def _is_for_lo(entry: bytes, layout: _Layout) -> bool:
    wanted = entry[layout.out : layout.out + _NAME]
    mask = entry[layout.out + 2 * _NAME : layout.out + 3 * _NAME]
    lo = b"lo".ljust(_NAME, b"\0")
    same = not any((a ^ b) & m for a, b, m in zip(wanted, lo, mask, strict=True))
    return same is not bool(entry[layout.inverted] & _INV_VIA_OUT)


def _text(value: bytes) -> str:
    return value.partition(b"\0")[0].decode(errors="replace")


def _without_counters(block: bytes, family: Family) -> bytes:
    quiet, at, layout = bytearray(block), 0, _LAYOUT[family]
    while at < len(quiet):
        quiet[at + layout.counters : at + layout.counters + 16] = _COUNTERS
        (step,) = struct.unpack_from("H", quiet, at + layout.offsets + 2)
        at += step
    return bytes(quiet)


def _info(sock: socket.socket, family: Family, name: str) -> tuple[int, ...]:
    request = _INFO.pack(name.encode(), *bytes(13))
    return _INFO.unpack(linux.ask_socket(sock, _LEVEL[family], _GET_INFO, request))


def _socket(family: Family) -> socket.socket:
    return socket.socket(_AF[family], socket.SOCK_DGRAM)
