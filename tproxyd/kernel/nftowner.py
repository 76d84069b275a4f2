"""Our nft table as our own: nobody else can flush or edit it (NFT_TABLE_F_OWNER, Linux ≥ 5.12).

The owner is a netlink socket, so the process that keeps the state keeps one: that of a libnftables
context, through which the table is written. Facts (run on Linux 6.18 with nft 1.0.6, which knows
the word `owner` and not `persist`):

- `nft flush ruleset` of others passes an owned table over and succeeds; every other write to it,
  `add table` of the same name too, is EPERM. Reading is everybody's.
- When the socket closes, however its process ended, the kernel removes the table; with
  NFT_TABLE_F_PERSIST (Linux ≥ 6.9) the table stays, with its rules and without an owner, and who
  sends its flags again adopts it. That flag can be given at the creation only.
- Flags never change otherwise: EOPNOTSUPP. So a script for an owned table must not name the table
  in a statement (that sends flags, of 0); and giving up ownership means replacing the table in one
  transaction, or with `persist` closing the socket.
- nft 1.0.6 lists the owner as a comment, `# progname python3`; NFTA_TABLE_OWNER is its port.

A table with `persist` is thus made in a transaction of our own and filled in a second one. Where a
table stands already, and only there (the guard is switched on over rules that stand), a copy under
another name intercepts meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from tproxyd.errors import KernelError
from tproxyd.kernel import netlink
from tproxyd.kernel.firewall import Firewall
from tproxyd.kernel.nftjson import Listing
from tproxyd.kernel.nftlang import MEANWHILE, TABLE, refill, table_text
from tproxyd.kernel.ownership import Own

# linux/netfilter/nfnetlink.h, nf_tables.h, netlink.h
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_BATCH_BEGIN, _BATCH_END = 16, 17
_TABLE_NAME, _TABLE_FLAGS, _TABLE_OWNER = 1, 2, 7
_PERSIST, _OWNER, _DORMANT = 4, 2, 1
_NETLINK_NETFILTER = 12
_NFPROTO_INET = 1
_REQUEST, _ACK = 1, 4
_NLMSG_ERROR = 2
_MESSAGE, _FAMILY = struct.Struct("=IHHII"), struct.Struct("=BB")
_TIMEOUT_S = 5.0  # the kernel answers at once


class Refused(Exception):
    """nft, or the kernel, said no; its words."""


class Context(Protocol):
    """What libnftables has."""

    fd: int

    def run(self, script: str, answer: bool = False) -> str: ...
    def close(self) -> None: ...


class Described(NamedTuple):
    """Our table, as the kernel has it."""

    flags: int
    owner: int  # a port; 0: nobody

    @property
    def asleep(self) -> bool:
        """It does nothing (NFT_TABLE_F_DORMANT)."""
        return bool(self.flags & _DORMANT)


class Owner:
    """The table while it is owned, from the first `write` to `release`."""

    def __init__(self, context: Context, how: Own, ask: Callable[[str, str], Listing]) -> None:
        self.how, self._context, self._ask = how, context, ask
        self._wire = Wire(socket.socket(fileno=os.dup(context.fd)))

    def owns(self) -> bool:
        there = self._wire.look()
        return there is not None and there.owner == self._wire.port

    def write(self, firewall: Firewall) -> None:
        there = self._wire.look()
        if not firewall:
            if there is not None:
                self._context.run(f"delete table inet {TABLE}\n")
            return
        if self.how is Own.WHILE_ALIVE:
            before = "" if there is None else f"delete table inet {TABLE}\n"
            self._context.run(before + table_text(firewall, owned=True))
            return
        chains = None if there is None else self._chains()
        if there is not None and there.flags & _PERSIST and chains is not None:
            if not self.owns():
                self._wire.change((_NEWTABLE, _OWNER | _PERSIST))
            self._context.run(refill(firewall, chains))
            return
        if there is None:
            self._wire.change((_NEWTABLE, _OWNER | _PERSIST))
        else:
            again = f"add table inet {MEANWHILE}\ndelete table inet {MEANWHILE}\n"
            self._context.run(again + table_text(firewall, MEANWHILE))
            self._wire.change((_DELTABLE, None), (_NEWTABLE, _OWNER | _PERSIST))
        self._context.run(refill(firewall, ()))

    def release(self) -> None:
        """The table stays, as anybody's."""
        try:
            if self.how is Own.WHILE_ALIVE and self.owns():
                firewall = self._ask_text()
                self._context.run(f"delete table inet {TABLE}\n{firewall}")
        finally:
            self._wire.close()
            self._context.close()

    def _ask_text(self) -> str:
        """The table as nft itself writes it, without its flags."""
        lines = self._context.run(f"list table inet {TABLE}\n").splitlines(keepends=True)
        return "".join(line for line in lines if line.strip() != "flags owner")

    def _chains(self) -> list[str] | None:
        """Of the table; None where it holds more than chains."""
        listing = self._ask(f"read the nft table inet {TABLE}", f"list table inet {TABLE}")
        kinds = {kind for entry in listing for kind in entry}
        if not kinds <= {"metainfo", "table", "chain", "rule"}:
            return None
        return [entry["chain"]["name"] for entry in listing if "chain" in entry]


class Wire:
    """nfnetlink, for what nft cannot say: flags, and who owns. With a socket that is its own."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        self._socket = sock or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        self._socket.close()

    def look(self) -> Described | None:
        body = netlink.attribute(_TABLE_NAME, f"{TABLE}\0".encode())
        self._send(_message(_SUBSYSTEM | _GETTABLE, _REQUEST, self._next(), _NFPROTO_INET, 0, body))
        answer = self._receive()
        if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
            return None
        values = netlink.attributes(answer, _MESSAGE.size + 4)
        flags, owner = (values.get(kind, b"") for kind in (_TABLE_FLAGS, _TABLE_OWNER))
        return Described(int.from_bytes(flags, "big"), int.from_bytes(owner, "big"))

    def change(self, *steps: tuple[int, int | None]) -> None:
        """One transaction of _NEWTABLE with flags, or _DELTABLE."""
        name = netlink.attribute(_TABLE_NAME, f"{TABLE}\0".encode())
        data = _message(_BATCH_BEGIN, _REQUEST, self._next(), 0, 10, b"")
        for kind, flags in steps:
            body = name
            if flags is not None:
                body += netlink.attribute(_TABLE_FLAGS, struct.pack(">I", flags))
            options = _REQUEST | _ACK | (netlink.CREATE if kind == _NEWTABLE else 0)
            data += _message(_SUBSYSTEM | kind, options, self._next(), _NFPROTO_INET, 0, body)
        self._send(data + _message(_BATCH_END, _REQUEST, self._next(), 0, 10, b""))
        for _ in steps:
            answer = self._receive()
            if code := -struct.unpack_from("=i", answer, _MESSAGE.size)[0]:
                self._pass_over()
                raise Refused(f"{os.strerror(code)} (flags owner, persist: Linux 6.9 has both)")

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(8192)
        except OSError as error:
            raise _unheard(error) from error

    def _pass_over(self) -> None:
        """What else answers a transaction that failed: libnftables must not find it."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(8192):
                pass
        self._socket.settimeout(_TIMEOUT_S)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise _unheard(error) from error

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


def _unheard(error: OSError) -> KernelError:
    return KernelError(f"own the nft table inet {TABLE}", error.strerror or str(error), "try again")


def _message(
    kind: int, options: int, sequence: int, family: int, subsystem: int, body: bytes
) -> bytes:
    payload = _FAMILY.pack(family, 0) + struct.pack(">H", subsystem) + body
    size = _MESSAGE.size + len(payload)
    return _MESSAGE.pack(size, kind, options, sequence, 0) + payload
