"""nf_tables by netlink, for what nft cannot say: which tables there are, their flags and owners.

- nft 1.0.6, of Debian 12, writes broken JSON for a table with a single flag, out of memory that it
  has just freed: what tables there are is asked here, and a listing in which such a table would
  stand is never made.
- A transaction stands between NFNL_MSG_BATCH_BEGIN and _END, and each message in it is answered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import NamedTuple

from tproxyd.errors import KernelError
from tproxyd.kernel import netlink
from tproxyd.kernel.nftlang import TABLE

# linux/netfilter/nfnetlink.h, nf_tables.h, netlink.h
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
NEWTABLE, _GETTABLE, DELTABLE, _GETCHAIN = 0, 1, 2, 4
_BATCH_BEGIN, _BATCH_END = 16, 17
_TABLE_NAME, _TABLE_FLAGS, _TABLE_USE, _TABLE_OWNER = 1, 2, 3, 7
_CHAIN_NAME = 3
PERSIST, OWNER, _DORMANT = 4, 2, 1
_NETLINK_NETFILTER = 12
INET = 1
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_INTERRUPTED = 0x10
_ATTEMPTS = 10
_BUFFER = 32768  # as much as the kernel fills (netlink_recvmsg)
_MESSAGE, _FAMILY = struct.Struct("=IHHII"), struct.Struct("=BB")
_TIMEOUT_S = 5.0  # the kernel answers at once


class Refused(Exception):
    """nft, or the kernel, said no; its words."""


class Described(NamedTuple):
    """A table, as the kernel has it."""

    flags: int
    owner: int  # a port; 0: nobody
    objects: int  # chains, sets and whatever else is in it

    @property
    def persists(self) -> bool:
        return bool(self.flags & PERSIST)

    @property
    def asleep(self) -> bool:
        """It does nothing (NFT_TABLE_F_DORMANT)."""
        return bool(self.flags & _DORMANT)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()


def _described(values: dict[int, bytes]) -> Described:
    numbers = (values.get(kind, b"") for kind in (_TABLE_FLAGS, _TABLE_OWNER, _TABLE_USE))
    return Described(*(int.from_bytes(number, "big") for number in numbers))


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

    def tables(self, family: int) -> dict[str, Described]:
        """Of one family, by name: NFPROTO_*."""
        each = [netlink.attributes(body, 4) for body in self._dump(_GETTABLE, family)]
        return {_text(values[_TABLE_NAME]): _described(values) for values in each}

    def chains(self, family: int, begin: tuple[str, ...]) -> list[str]:
        """The names of the chains of one family, of those that begin so.

        kube-proxy has ten thousand others: those are not taken apart.
        """
        signs = tuple(map(str.encode, begin))
        bodies = [
            body for body in self._dump(_GETCHAIN, family) if any(sign in body for sign in signs)
        ]
        names = [_text(netlink.attributes(body, 4)[_CHAIN_NAME]) for body in bodies]
        return [name for name in names if name.startswith(begin)]

    def _dump(self, kind: int, family: int) -> list[bytes]:
        """What there is of one family; with gaps, since it changed meanwhile, it is asked again."""
        for _ in range(_ATTEMPTS):
            found = self._dumped(kind, family)
            if found is not None:
                return found
        raise _unheard(OSError(errno.EAGAIN, "it changed under every attempt to read it"))

    def _dumped(self, kind: int, family: int) -> list[bytes] | None:
        self._send(_message(_SUBSYSTEM | kind, _REQUEST | _DUMP, self._next(), family, 0, b""))
        found: list[bytes] = []
        gaps = 0
        while True:
            for kind, flags, sequence, body in netlink.messages(self._receive()):
                if sequence != self._sequence:
                    continue
                gaps |= flags & _DUMP_INTERRUPTED
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    if code := -struct.unpack_from("=i", body)[0]:
                        raise _unheard(OSError(code, os.strerror(code)))
                    return None if gaps else found
                if body[0] == family:  # those of another one, where there is none of this
                    found.append(body)

    def look(self) -> Described | None:
        body = netlink.attribute(_TABLE_NAME, f"{TABLE}\0".encode())
        self._send(_message(_SUBSYSTEM | _GETTABLE, _REQUEST, self._next(), INET, 0, body))
        answer = self._receive()
        if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
            return None
        return _described(netlink.attributes(answer, _MESSAGE.size + 4))

    def change(self, *steps: tuple[int, int | None]) -> None:
        """One transaction of NEWTABLE with flags, or DELTABLE."""
        name = netlink.attribute(_TABLE_NAME, f"{TABLE}\0".encode())
        data = _message(_BATCH_BEGIN, _REQUEST, self._next(), 0, 10, b"")
        for kind, flags in steps:
            body = name
            if flags is not None:
                body += netlink.attribute(_TABLE_FLAGS, struct.pack(">I", flags))
            options = _REQUEST | _ACK | (netlink.CREATE if kind == NEWTABLE else 0)
            data += _message(_SUBSYSTEM | kind, options, self._next(), INET, 0, body)
        self._send(data + _message(_BATCH_END, _REQUEST, self._next(), 0, 10, b""))
        for _ in steps:
            answer = self._receive()
            if code := -struct.unpack_from("=i", answer, _MESSAGE.size)[0]:
                self._pass_over()
                raise Refused(f"{os.strerror(code)} (flags owner, persist: Linux 6.9 has both)")

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_BUFFER)
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
    return KernelError("talk to nf_tables", error.strerror or str(error), "try again")


def _message(
    kind: int, options: int, sequence: int, family: int, subsystem: int, body: bytes
) -> bytes:
    payload = _FAMILY.pack(family, 0) + struct.pack(">H", subsystem) + body
    size = _MESSAGE.size + len(payload)
    return _MESSAGE.pack(size, kind, options, sequence, 0) + payload


def tables(family: int) -> dict[str, Described]:
    """Those of one family, by name."""
    with contextlib.closing(Wire()) as wire:
        return wire.tables(family)


def chains(family: int, begin: tuple[str, ...]) -> list[str]:
    """Wire.chains."""
    with contextlib.closing(Wire()) as wire:
        return wire.chains(family, begin)
