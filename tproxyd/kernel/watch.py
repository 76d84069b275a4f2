"""Hearing what others change: netlink's events, with the standard library alone.

The kernel multicasts a message for each route, rule, address and link that changes (rtnetlink), and
for each transaction of nf_tables. Sysctls and legacy tables of iptables send nothing: those are for
a look now and then (`Silent`). Facts:

- A route daemon writes a million routes, and every listener is woken for each. Here the kernel
  filters for us (classic BPF on the socket, as FRR does it): a route passes that is of our table or
  carries a number of ours, a link that is lo. 20,000 routes of others cost this process nothing.
- Messages of nf_tables come many to a datagram, all objects of a transaction and at its end
  NFT_MSG_NEWGEN with the number and name of the process that made it (as the first pid namespace
  has it). A datagram in which our table's name does not stand, NUL and all, is not taken apart.
- rtnetlink names the writer by its port, which is its process's number unless it has several
  netlink sockets; 0 is the kernel itself. Who it was is looked up at once, and still may be gone.
- A full receive buffer is ENOBUFS at the next read; what came meanwhile is lost, not the socket.
  The answer is to read on and to look at everything.
- `ip link set lo down` takes the IPv4 routes of lo without a message for any; the link's own comes.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from tproxyd import linux
from tproxyd.kernel import items, netlink, sysctls, xtables
from tproxyd.kernel.firewall import Family, Table
from tproxyd.kernel.nftlang import TABLE
from tproxyd.kernel.state import MARK_SYSCTLS, NUMBERS

# Room for some 2,000 messages that nobody has read; the kernel counts twice what it is asked for.
BUFFER = 1 << 20
# What is read at a time, so that a flood leaves time to look.
_DATAGRAMS = 1000

# linux/netlink.h, rtnetlink.h, netfilter/nfnetlink.h, nf_tables.h, asm-generic/socket.h
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUPS = (1, 5, 7, 8, 9, 11, 19)  # link; v4 address, route, rule; v6 address, route, rule
_NETLINK_NETFILTER, _NFNLGRP_NFTABLES = 12, 7
_NFT_MSG_NEWGEN = 10 << 8 | 15
_GEN_PROC_PID, _GEN_PROC_NAME = 2, 3
_SO_RCVBUFFORCE = 33
_RT_TABLE_COMPAT = 252  # a table whose number needs an attribute
_HEAD = struct.Struct("=IHHII")  # nlmsghdr
_NFGENMSG = 4
_MOST_PIDS = 1 << 22  # PID_MAX_LIMIT: a port above is no process's number


class News(NamedTuple):
    """What was heard at one go."""

    concerns_us: bool = False
    routing: bool = False  # a route, rule, address or link: what stood in our way may be gone
    lost: bool = False  # there was more than could be kept
    authors: tuple[str, ...] = ()


class Watch:
    """The sockets. OSError where they are refused; nft's may be missing (`hears_nft`)."""

    def __init__(self, table: int, *, iptables: bool = False, buffer: int = BUFFER) -> None:
        """`table`: of the routes. `iptables`: ours are in the tables of iptables-nft."""
        names = (TABLE, *map(str, Table)) if iptables else (TABLE,)
        self._names = tuple(name.encode() + b"\0" for name in names)
        self._table = table
        self._touched = False  # the transaction that is being told has to do with us
        self._routing = _socket(socket.NETLINK_ROUTE, _GROUPS, buffer)
        linux.filter_arrivals(self._routing, program(table))
        self._nft: socket.socket | None = None
        with suppress(OSError):  # no nf_tables here, or not permitted
            self._nft = _socket(_NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,), buffer)

    @property
    def hears_nft(self) -> bool:
        return self._nft is not None

    def sockets(self) -> tuple[socket.socket, ...]:
        return (self._routing,) if self._nft is None else (self._routing, self._nft)

    def close(self) -> None:
        for sock in self.sockets():
            sock.close()

    def read(self) -> News:
        """Everything that has come, without waiting."""
        concerns_us = lost = False
        authors: dict[str, None] = {}
        ports: set[int] = set()  # of those who have written to the routes
        for sock in self.sockets():
            for data in _datagrams(sock):
                if data is None:
                    lost = True
                elif sock is self._nft:
                    for author in self._of_nft(data):
                        concerns_us = True
                        authors[author] = None
                else:
                    ports.update(self._of_routing(data))
        authors |= dict.fromkeys(map(process, sorted(ports)))
        concerns_us = concerns_us or lost or bool(ports)
        return News(concerns_us, bool(ports), lost, tuple(filter(None, authors)))

    def _of_nft(self, data: bytes) -> Iterator[str]:
        """Who made each transaction that concerns us."""
        if not self._touched and not any(name in data for name in self._names):
            return
        for kind, port, body in _messages(data):
            if kind != _NFT_MSG_NEWGEN:
                # The table's name is attribute 1 of every object that is in one.
                name = netlink.attributes(body, _NFGENMSG).get(1)
                self._touched = self._touched or name in self._names
            elif self._touched:
                self._touched = False
                values = netlink.attributes(body, _NFGENMSG)
                pid = int.from_bytes(values.get(_GEN_PROC_PID, b""), "big") or port
                yield process(pid, values.get(_GEN_PROC_NAME, b"").rstrip(b"\0").decode())

    def _of_routing(self, data: bytes) -> Iterator[int]:
        """Who wrote what concerns us, by port."""
        for kind, port, body in _messages(data):
            if kind in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE):
                item = netlink.item(body)
                table = item.number(netlink.TABLE) or item.table
                if table != self._table and item.protocol not in NUMBERS:
                    continue
            yield port


def _socket(protocol: int, groups: tuple[int, ...], buffer: int) -> socket.socket:
    flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, flags, protocol)
    try:
        try:  # beyond net.core.rmem_max, with CAP_NET_ADMIN
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.bind((0, 0))  # one without a port of its own gets nothing of what is multicast
        for group in groups:
            sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except OSError:
        sock.close()
        raise
    return sock


def _datagrams(sock: socket.socket) -> Iterator[bytes | None]:
    """None for a gap."""
    for _ in range(_DATAGRAMS):
        try:
            yield sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, the writer's port and the body of each."""
    at = 0
    while at < len(data):
        size, kind, _, _, port = _HEAD.unpack_from(data, at)
        yield kind, port, data[at + _HEAD.size : at + size]
        at += -(-size // 4) * 4


def process(pid: int, name: str = "") -> str:
    """Who a process is, as far as it can be told; "" for the kernel itself."""
    if not 0 < pid < _MOST_PIDS:
        return name
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            called = file.read().strip()
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            line = " ".join(file.read().split("\0")).strip()[:100]
    except OSError:
        return f"{name} (process {pid})" if name else f"process {pid}"
    if name and name != called:  # another pid namespace's number
        return f"{name} (process {pid})"
    return f"{called} (process {pid}: {line})" if line else f"{called} (process {pid})"


# What the kernel filters --------------------------------------------------------------------------


def program(table: int) -> bytes:
    """Classic BPF over one message of rtnetlink: 0 drops it."""
    load_8, load_16, load_32 = 0x30, 0x28, 0x20
    equal, greater, at_least, answer = 0x15, 0x25, 0x35, 0x06
    accept, drop = 13, 14
    # The kernel loads in network order what netlink wrote in the machine's.
    new_route, del_route = socket.htons(netlink.RTM_NEWROUTE), socket.htons(netlink.RTM_DELROUTE)
    new_link, del_link = socket.htons(netlink.RTM_NEWLINK), socket.htons(netlink.RTM_DELLINK)
    small = table if table < 256 else _RT_TABLE_COMPAT
    lines = [
        (load_16, 0, 0, 4),  # 0: nlmsg_type
        (equal, 6, 2, new_route),
        (equal, 6, 3, del_route),
        (equal, 11, 4, new_link),
        (equal, 11, accept, del_link),
        (answer, 0, 0, 0),  # 5: never reached
        (load_8, 0, 0, 20),  # 6: rtm_table
        (equal, accept, 8, small),
        (load_8, 0, 0, 21),  # 8: rtm_protocol
        (at_least, 10, drop, NUMBERS.start),
        (greater, drop, accept, NUMBERS.stop - 1),
        (load_32, 0, 0, 20),  # 11: ifi_index
        (equal, accept, drop, socket.htonl(items.LO)),
        (answer, 0, 0, 0xFFFF_FFFF),  # 13
        (answer, 0, 0, 0),  # 14
    ]
    code = b""
    for at, (what, then, otherwise, value) in enumerate(lines):
        jumps = what in (equal, greater, at_least)
        yes, no = (then - at - 1, otherwise - at - 1) if jumps else (0, 0)
        code += struct.pack("HBBI", what, yes, no, value)
    return code


# What sends no events -----------------------------------------------------------------------------


class Silent:
    """The sysctls and, where ours are in them, the legacy tables: as they were at the last look."""

    def __init__(self, *, legacy: bool) -> None:
        self._legacy = legacy
        self._seen = self._look()

    def changed(self) -> bool:
        """Since this was last asked."""
        before, self._seen = self._seen, self._look()
        return self._seen != before

    def _look(self) -> tuple[object, ...]:
        seen: list[object] = [sysctls.value(name) for name in MARK_SYSCTLS]
        families: tuple[Family, ...] = (4, 6) if self._legacy else ()
        for family in families:
            for name in xtables.names(family):
                if name in {*map(str, Table)}:
                    with suppress(OSError):
                        seen.append((family, name, xtables.content(family, name)))
        return tuple(seen)
