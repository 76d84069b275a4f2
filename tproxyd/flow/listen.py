"""The listening sockets of a worker slot, and accepting from them.

One socket per slot, listener and family. They share their port by SO_REUSEPORT and belong to the
supervisor: closing such a socket loses what waits in its accept queue (net.ipv4.tcp_migrate_req is
0), so a worker only borrows it, and the next one on the slot serves what the last one left. They
also outlive a configuration, and the program itself (proc/sockets.py): what depends on either is
set anew each time (`prepare`).

What is set on a listener is inherited by what it accepts and costs nothing per connection
(inet_csk_clone_lock copies the socket): IP_TRANSPARENT, the mark, TCP_NODELAY, SO_OOBINLINE,
keep-alive.

IPv4 and IPv6 have sockets of their own (IPV6_V6ONLY), so families never mix on the wire and a
machine without IPv6 just has one socket less.
"""

from __future__ import annotations

import errno
import socket
from functools import lru_cache
from typing import Any

from tproxyd.addr import Endpoint, Peer, endpoint_of, fold
from tproxyd.config import Config, Listener, Scope, Via
from tproxyd.errors import KernelError
from tproxyd.linux import IP_TRANSPARENT, IPV6_TRANSPARENT, SO_MARK

# What a burst may queue while the worker is busy; the kernel clamps it to net.core.somaxconn
# (4096 by default since Linux 5.4).
BACKLOG = 4096
_INET, _INET6 = int(socket.AF_INET), int(socket.AF_INET6)
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
# Seconds of silence before the kernel asks whether the other end is still there. Below the 350 s of
# cloud balancers and the usual NAT time-outs, so that a quiet connection keeps its entry there.
KEEPALIVE_IDLE_S = 300


def places(config: Config, *, ipv6: bool = False) -> list[tuple[int, Endpoint]]:
    """Where to listen: (index of the listener in config, address), IPv4 first.

    IPv6 is left out where the machine has none; `ipv6` says that it has.
    """
    families = [socket.AF_INET, *([socket.AF_INET6] if ipv6 or has_ipv6() else [])]
    return [
        (i, _where(listener, family))
        for i, listener in enumerate(config.listeners)
        for family in (families if listener.bind in ("", "*") else [_family(listener.bind)])
    ]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _where(listener: Listener, family: socket.AddressFamily) -> Endpoint:
    """What a listener is bound to.

    Nat sends what leaves this host to its loopback address (nf_nat_redirect.c): from outside nobody
    needs to reach that listener.
    """
    v6 = family == socket.AF_INET6
    if listener.bind not in ("", "*"):
        return Endpoint(listener.bind, listener.port)
    if listener.intercepts and listener.intercept.scope is Scope.OUTBOUND:
        return Endpoint("::1" if v6 else "127.0.0.1", listener.port)
    return Endpoint("::" if v6 else "0.0.0.0", listener.port)


def has_ipv6() -> bool:
    """Whether an IPv6 socket can be made and bound here (ipv6.disable=1 and its kin say no)."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def open_at(config: Config, index: int, where: Endpoint) -> socket.socket:
    """A socket for config.listeners[index], bound and not listening yet.

    KernelError that says what to try.
    """
    listener = config.listeners[index]
    family = _family(where.host)
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise _failure(error, listener, config, where) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _set_options(sock, listener, config)
        sock.bind(where)
    except OSError as error:
        sock.close()
        raise _failure(error, listener, config, where) from error
    return sock


def prepare(sock: socket.socket, config: Config, index: int) -> None:
    """Have it listen, and be what `open_at` would make it. KernelError."""
    listener = config.listeners[index]
    try:
        _set_options(sock, listener, config)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.listen(BACKLOG)
    except OSError as error:
        raise _failure(error, listener, config, endpoint(sock.getsockname())) from error


def _set_options(sock: socket.socket, listener: Listener, config: Config) -> None:
    transparent = listener.intercepts and listener.intercept.via is Via.TPROXY
    level, option = socket.IPPROTO_IP, IP_TRANSPARENT
    if sock.family == socket.AF_INET6:
        level, option = socket.IPPROTO_IPV6, IPV6_TRANSPARENT
    if transparent != bool(sock.getsockopt(level, option)):
        sock.setsockopt(level, option, transparent)
    mark = config.listener_mark if config.transparent else 0
    if mark != sock.getsockopt(socket.SOL_SOCKET, SO_MARK):
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # as in connect.py


def _failure(error: OSError, listener: Listener, config: Config, where: Endpoint) -> KernelError:
    action = f'listen on {where} for the listener "{listener.name}"'
    return KernelError(action, error.strerror or str(error), _hint(error, listener, config))


def _hint(error: OSError, listener: Listener, config: Config) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"see who has it: ss -ltnp sport = :{listener.port}"
    if error.errno == errno.EADDRNOTAVAIL:
        return 'no interface here has it: see ip address; bind = "*" is all of them'
    if error.errno in (errno.EPERM, errno.EACCES) and config.transparent:
        low = " and CAP_NET_BIND_SERVICE" if listener.port < 1024 else ""
        return (
            f"a transparent socket needs CAP_NET_RAW{low}: run as root, with "
            "AmbientCapabilities=, or in a container with --cap-add"
            " (SO_MARK by CAP_NET_RAW alone needs Linux 5.17)"
        )
    if error.errno == errno.EACCES:
        return (
            "a port below 1024 needs CAP_NET_BIND_SERVICE: run as root, or with"
            " AmbientCapabilities=CAP_NET_BIND_SERVICE"
        )
    return "see tproxyd doctor"


def endpoint(address: Any) -> Endpoint:  # noqa: ANN401 - what the socket module returns
    """A socket address as an Endpoint, v4-mapped folded: the one place where that is done.

    A link-local IPv6 address keeps its zone, without which it means nothing. Equal hosts are one
    string: thousands of connections have few of them.
    """
    host: str = address[0]
    if ":" in host:
        if host.startswith("::ffff:"):
            host = fold(host)
        elif address[3]:
            host = f"{host}%{address[3]}"
    return endpoint_of((_one(host), address[1]))


@lru_cache(maxsize=4096)
def _one(host: str) -> str:
    """The first of equal strings. (sys.intern would keep them for ever, in some Pythons 3.12.)"""
    return host


# For addresses of which there are few, those of our own side: one object for all.
local_endpoint = lru_cache(maxsize=1024)(endpoint)


def accept(listener: socket.socket) -> tuple[socket.SocketType, Peer]:
    """The next waiting connection. Raises BlockingIOError when there is none, OSError otherwise.

    Not socket.accept(): that makes two Python objects and asks for a time-out twice. The file
    descriptor stays in blocking mode (accept4 is called without SOCK_NONBLOCK by CPython, and an
    ioctl to change it would cost 0.3 µs); every call on it carries MSG_DONTWAIT instead.
    """
    fd, address = listener._accept()  # type: ignore[attr-defined]
    family = _INET if len(address) == 2 else _INET6  # asking the listener makes an enum: 0.5 µs
    return socket.SocketType(family, _STREAM, 0, fd), Peer(endpoint(address))
