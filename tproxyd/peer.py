"""Who is at the other end of a unix socket, and whether he is to be believed.

Abstract names belong to a network namespace, and any user in it may bind any of them: who answers
to a name of ours need not be one of us. The kernel knows who he is (SO_PEERCRED): of a process that
listens, what it was when it called listen(2).
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
from typing import NamedTuple, Protocol

USER = "tproxyd"  # that of the service (systemd/tproxyd.sysusers.conf)

_UCRED = struct.Struct("@iII")  # pid, uid, gid


class HasOption(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


class Peer(NamedTuple):
    pid: int  # 0: of a PID namespace that we can't see into
    uid: int

    @property
    def believed(self) -> bool:
        """Root, our own user, or that of the service: the others are any local users."""
        return self.uid in (0, os.geteuid()) or self.uid == _service()

    def __str__(self) -> str:
        return f"process {self.pid} of uid {self.uid}"


def of(sock: HasOption) -> Peer:
    """Of a connected one."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


def at(name: str) -> Peer | None:
    """Who listens at this address; None where nobody does, or so many wait that none can ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(name)
        except OSError:
            return None
        return of(sock)


def _service() -> int | None:
    try:
        return pwd.getpwnam(USER).pw_uid
    except KeyError:
        return None
