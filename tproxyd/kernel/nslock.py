"""Locks of a network namespace: one process at a time holds each, and it takes CAP_NET_ADMIN.

The kernel gives a group of NFLOG to the first netlink socket that binds it and takes it back when
that is closed, however its process ended (nfnetlink_log.c, instance_create, nfulnl_rcv_nl_event).
So a lock belongs to the namespace, as the state does; it needs no file, which containers with a
read-only root would not have; the containers of a pod share it, whatever each sees of the others'
processes; and nobody can take it who could not change the state as well. Taken and given back, it
costs 10 µs (Linux 6.18). An abstract unix socket has all of this but the last: any user may bind
any name.

A kernel without nfnetlink_log has nothing better than such a name. One that a stranger holds then
locks nothing: he can undo the exclusion there, and not keep anybody out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from typing import NamedTuple

from tproxyd import peer
from tproxyd.kernel import netlink

_PAUSE_S = 0.005

# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_log.h
_NETLINK_NETFILTER = 12
_NOOP = 1  # NLMSG_NOOP
_REQUEST, _ACK = 1, 4
_CONFIGURE = 4 << 8 | 1  # NFNL_SUBSYS_ULOG, NFULNL_MSG_CONFIG
_COMMAND, _BIND = 1, 1  # NFULA_CFG_CMD, NFULNL_CFG_CMD_BIND
_MESSAGE, _ERROR = struct.Struct("=IHHII"), struct.Struct("=i")
_HIGHEST_PID = 1 << 22  # PID_MAX_LIMIT, linux/threads.h
_GROUPS = "/proc/thread-self/net/netfilter/nfnetlink_log"


class Lock(NamedTuple):
    group: int  # of NFLOG: numbers that no rule logs to
    name: str  # where the kernel has no such groups


STATE = Lock(0x7470, "\0tproxyd/kernel")  # of one reconcile
KEEPER = Lock(0x7471, "\0tproxyd/keeper")  # of the daemon that keeps the state


class _NoGroups(Exception):
    """This kernel has no nfnetlink_log."""


def take(lock: Lock, patience: float) -> socket.socket | None:
    """What holds it until it is closed; None where another process had it for so long.

    PermissionError for who may not change the state.
    """
    deadline = time.monotonic() + patience
    way = _group
    while True:
        try:
            held = way(lock)
        except _NoGroups:
            way = _name
            continue
        if held is not None:
            return held
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE_S)
    if way is _name and not _believed(lock.name):
        return socket.socket(socket.AF_UNIX)
    return None


def holder(lock: Lock) -> int:
    """The number of the process that holds it; 0 where nobody does, or it can't be told."""
    try:
        with open(_GROUPS, encoding="ascii") as file:
            ports = {group: port for group, port, *_ in (map(int, each.split()) for each in file)}
    except OSError:  # this kernel has no groups, or we no right to look at them
        there = _believed(lock.name)
        return 0 if there is None else there.pid
    port = ports.get(lock.group, 0)  # a socket's is the number of its process, where it was free
    return port if port <= _HIGHEST_PID else 0


def _group(lock: Lock) -> socket.socket | None:
    with contextlib.ExitStack() as stack:
        try:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        except OSError as error:
            if error.errno == errno.EPROTONOSUPPORT:
                raise _NoGroups from error
            raise
        stack.enter_context(sock)
        command = netlink.attribute(_COMMAND, bytes([_BIND]))
        refused = _asked(sock, _CONFIGURE, struct.pack(">BBH", 0, 0, lock.group) + command)
        if refused == 0:
            stack.pop_all()
            return sock
        if refused == errno.EINVAL:
            raise _NoGroups
        # Both who comes second and who has no right is told EPERM. What means nothing is
        # acknowledged, to who has the right.
        if refused == errno.EPERM and _asked(sock, _NOOP, b"") == 0:
            return None
        raise OSError(refused, os.strerror(refused))


def _asked(sock: socket.socket, kind: int, body: bytes) -> int:
    """The kernel's answer, which it gives within send(2)."""
    size = _MESSAGE.size + len(body)
    sock.send(_MESSAGE.pack(size, kind, _REQUEST | _ACK, 1, 0) + body)
    return -int(_ERROR.unpack_from(sock.recv(4096), _MESSAGE.size)[0])


def _name(lock: Lock) -> socket.socket | None:
    return listener(lock.name)


def listener(name: str) -> socket.socket | None:
    """An abstract unix socket that listens; None where another process has its name."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(name)
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    sock.listen(128)  # who asks a holder that does not answer stays in its queue
    return sock


def _believed(name: str) -> peer.Peer | None:
    there = peer.at(name)
    return there if there is not None and there.believed else None
