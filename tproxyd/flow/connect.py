"""The upstream socket: whose address it carries, and from which port.

Facts about source ports when proxy and application share a network namespace. The client connects
from C:p to P:80. Two more sockets come to life here: ours toward the application, bound to C:q, and
the one the application accepts, whose 4-tuple is (P:80, C:q), in the same table of the same kernel
as our own downstream socket (P:80, C:p).
- So q = p is impossible; and q must not be the port of *another* live connection of this client to
  P:80. Our SYN would meet that connection's downstream socket, draw a challenge ACK, and our answer
  to it, an RST with exactly the expected sequence number, would kill it.
- bind(C, 0) and IP_BIND_ADDRESS_NO_PORT both draw q from the range the clients draw theirs from.
  Measured with one client that keeps its connections open: the first collision after 25 to 1,611
  connections in two proxies that do so.

What we do:
- q is p rotated by 30,000 within the ports from 1024 up. That maps Linux' range 32768-60999 and
  IANA's 49152-65535 outside themselves, two ports never rotate to one, workers need not agree on
  anything, and whoever reads a log finds p from q. A rotation by half, 32,256, would be its own
  inverse, and wrong for just that: whichever of p and q came first, its upstream socket would hold
  the tuple of the other, and the other's SYN could not be received at all.
- A collision is left for a client that uses p and q at once, a NAT in front. If p comes first, the
  application's socket holds (P:80, C:q), and no software can give that tuple to a second one: the
  SYN from q is answered with RST, so that the client can take another port, or, by conntrack,
  dropped, so that it tries again (kernel/chains.py).
  If q comes first, we take another port for p. The kernel sees it for us: the rule called collision
  guard (kernel/chains.py) drops a SYN of ours that would meet a transparent connection, before it
  can do harm. A local connect is complete when connect returns, the whole handshake runs inside it;
  one that is not gets looked up (linux.TupleLookup), and where the tuple is held by another
  connection the next port is tried. It costs nothing when nothing collides, and sees connections of
  other workers and such as still wait in an accept queue.
- EADDRINUSE (a listener on *:q) and EADDRNOTAVAIL (the tuple is in TIME_WAIT) happen: then other
  ports, at last the kernel's own choice. Each cause is counted.
- An explicit port needs SO_REUSEADDR, because of TIME_WAIT, and does not go together with
  IP_BIND_ADDRESS_NO_PORT; the kernel's choice wants exactly that one.

Toward a backend on another host nothing of that can happen: its connections have their own tuples
here. What is left is the same backend and the same source again within TIME_WAIT (EADDRNOTAVAIL).
So there the client's own port can be kept, where it is asked for and free. The socket carries no
mark, which would send its packets to lo; how the answers come home is kernel/desired.py's affair.

And about the handshake: when the client's first bytes are at hand before we connect, they can carry
the last ACK of the handshake (TCP_QUICKACK off delays it, tcp_rcv_synsent_state_process). That
saves a segment and wakes the application once instead of twice: 77 µs against 88 for a connection
to a local nginx, request and answer included. The relay turns quick ACKs on again behind those
bytes, or an application that writes in small pieces would wait for delayed ones.

Where accept took the last file descriptor there is none for the upstream: the client waits until
one is free, as those do that are still in the queue, and accepting stands back behind it.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, NamedTuple, Protocol

from tproxyd.addr import Endpoint, Source, Upstream, endpoint_of, is_unix
from tproxyd.errors import CloseReason, UpstreamError
from tproxyd.flow.listen import KEEPALIVE_IDLE_S
from tproxyd.flow.policy import Plan
from tproxyd.flow.stream import Address, Step, Stream, Wait
from tproxyd.flow.tally import PortCause
from tproxyd.linux import (
    IP_BIND_ADDRESS_NO_PORT,
    IP_TRANSPARENT,
    IPV6_FREEBIND,
    IPV6_TRANSPARENT,
    SO_MARK,
    TCP_LISTEN,
    TCP_NEW_SYN_RECV,
    TCP_SYN_RECV,
    TupleLookup,
)

_LOWEST = 1024  # below are the ports that need CAP_NET_BIND_SERVICE
_PORTS = 65536 - _LOWEST
# Anything from 28,232 (the width of Linux' range) to 36,280 but the half keeps the promises above;
# a round number is the one that a reader of logs can subtract in his head.
_SHIFT = 30_000
# A prime near the golden section of the range: successive tries spread over all of it.
_STRIDE = 39_869
# With N live connections of one client one try is taken with probability N/64512; even at 30,000
# seven more all fail less than once in two hundred, and then the kernel looks through all the rest.
_OWN_CHOICES = 8
_KERNEL_CHOICES = 3
ATTEMPTS = _OWN_CHOICES + _KERNEL_CHOICES
# How soon an unfinished connect is looked up once more: the look-up right after connect can come
# while the connection that is in the way is itself still in its handshake.
_SECOND_LOOK_S = 0.05
# What a kernel says that has no file descriptor, or no memory for one.
NO_FILES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_FILES_AGAIN_S = 0.1  # how soon one is asked for again
_ROOM_AGAIN_S = 0.05  # how soon the queue of a unix socket is tried again; an engine's tick


_INET, _INET6, _UNIX = int(socket.AF_INET), int(socket.AF_INET6), int(socket.AF_UNIX)
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class Dialled(NamedTuple):
    stream: Stream
    source: Source | None  # what the upstream sees; a unix socket sees nothing


class Network(Protocol):
    """The kernel as dialling needs it."""

    def upstream_socket(self, plan: Plan, speaks: bool) -> Stream: ...
    def late_bind(self, stream: Stream) -> None: ...
    def close(self, stream: Stream) -> None: ...
    def tuple_state(self, local: Endpoint, remote: Endpoint) -> int: ...
    def now(self) -> float: ...
    def count_port_retry(self, cause: PortCause) -> None: ...
    def out_of_files(self) -> None:
        """There was no file descriptor for an upstream, whose client waits: it comes first."""
        ...


def source_port(client_port: int, attempt: int, keep: bool = False) -> int:
    """The port to try, best first; 0 means that the kernel chooses.

    The first is a bijection of 1024..65535; a port below that maps into it.
    With `keep` the client's own is before it. Otherwise that is never among them (shift and stride
    see to that): on one host its tuple is the downstream socket itself.
    """
    if keep:
        if attempt == 0:
            return client_port
        attempt -= 1
    if attempt >= _OWN_CHOICES:
        return 0
    return _LOWEST + (client_port - _LOWEST + _SHIFT + attempt * _STRIDE) % _PORTS


def dial(
    plan: Plan, deadline: float, downstream: Stream, network: Network, speaks: bool = False
) -> Step[Dialled]:
    """A connected upstream socket with the planned source. Raises UpstreamError, OSError.

    `deadline` is for all attempts together. `speaks`: the caller has bytes that it sends as soon as
    it is connected.
    """
    client, upstream, spoof = plan.client, plan.upstream, plan.spoof
    unix = upstream.host[0] == "/"
    where: Address = upstream.host if unix else upstream
    if "%" in upstream.host and not unix:
        where = _in_zone(upstream)
    for attempt in range(ATTEMPTS + plan.keep_port if spoof else 1):
        source: Source | None = None  # the kernel's choice
        while True:
            try:
                stream = network.upstream_socket(plan, speaks)
                break
            except OSError as error:
                yield from _wait_for_files(error, deadline, downstream, network)
        connected = False
        port = 0
        try:
            if spoof:
                port = source_port(client.port, attempt, plan.keep_port)
                if port == 0:
                    network.count_port_retry(PortCause.KERNEL_CHOICE)
                    network.late_bind(stream)
                source = Source(endpoint_of((client.host, port)))
                stream.bind(source)
            elif plan.own:
                network.late_bind(stream)
                stream.bind(endpoint_of((plan.own, 0)))
            code = stream.connect_ex(where)
            if code == errno.EINPROGRESS:
                # 0 if an upstream on this host is there already.
                code = stream.connect_ex(where) if plan.here else errno.EALREADY
            if code == errno.EALREADY:
                code = yield from _unfinished(stream, where, plan, deadline, network)
            elif code == errno.EAGAIN:
                code = yield from _full(stream, where, deadline, downstream, network)
            if code in (0, errno.EISCONN):
                if not unix and (source is None or source.port == 0):
                    host, port, *_ = stream.getsockname()
                    source = Source(Endpoint(host, port))
                connected = True
                return Dialled(stream, source)
            cause = _CAUSES.get(code)
            if cause is None:
                raise _failure(code, plan)
        except OSError as error:  # of bind
            cause = _BIND_CAUSES.get(error.errno or 0)
            if error.errno == errno.EACCES and 0 < port < _LOWEST:
                cause = PortCause.PRIVILEGED
            if cause is None:
                raise
        finally:
            if not connected:
                network.close(stream)
        if spoof:
            network.count_port_retry(cause)
    of = f" of {client.host}" if spoof else ""
    raise UpstreamError(CloseReason.NO_SOURCE_PORT, f"no free source port{of} toward {upstream}")


# What means that another port should be tried: to connect, and to bind.
_CAUSES = {
    errno.EADDRNOTAVAIL: PortCause.NOT_AVAILABLE,
    errno.EADDRINUSE: PortCause.NOT_AVAILABLE,
    errno.EEXIST: PortCause.LIVE_DOWNSTREAM,  # _unfinished()
}
_BIND_CAUSES = {
    errno.EADDRINUSE: PortCause.IN_USE,
    errno.EADDRNOTAVAIL: PortCause.NOT_AVAILABLE,
}


def _wait_for_files(
    error: OSError, deadline: float, downstream: Stream, network: Network
) -> Step[None]:
    """Until a file descriptor may be free. Raises `error` where it is another one, or too late."""
    now = network.now()
    if error.errno not in NO_FILES or now >= deadline:
        raise error
    network.out_of_files()
    until = min(deadline, now + _FILES_AGAIN_S)
    while network.now() < until:
        yield Wait(downstream, until)


def _in_zone(upstream: Upstream) -> Address:
    """As connect() wants it: of two parts, the zone in an address is lost (CPython's setipaddr).

    OSError where there is no such interface.
    """
    zone = upstream.host.partition("%")[2]  # a number if the kernel said it, a name if people did
    scope = int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    return upstream.host, upstream.port, 0, scope


def _full(
    stream: Stream, where: Address, deadline: float, downstream: Stream, network: Network
) -> Step[int]:
    """Until the queue of a unix socket has room; its errno.

    TCP drops a SYN that finds none, and sends it again. Here nothing tells when there is room.
    """
    code = errno.EAGAIN
    while code == errno.EAGAIN:
        now = network.now()
        if now >= deadline:
            return errno.ETIMEDOUT
        yield Wait(downstream, min(deadline, now + _ROOM_AGAIN_S))
        code = stream.connect_ex(where)
    return code


def _unfinished(
    stream: Stream, where: Address, plan: Plan, deadline: float, network: Network
) -> Step[int]:
    """Wait for a connect in progress; its errno, 0 for success, EEXIST for a held tuple."""
    # Times, not a count: a spurious event, say the client's, must not use up the second look.
    now = network.now()
    looks = [now, now + _SECOND_LOOK_S] if plan.spoof and plan.here else []
    while True:
        if looks and now >= looks[0]:
            del looks[0]
            if _held(stream, plan, network):
                # Ours after all, if the handshake ended after connect: we are connected before
                # the application's side is, so then connect knows.
                code = stream.connect_ex(where)
                return errno.EEXIST if code == errno.EALREADY else code
        yield Wait(stream, min(deadline, *looks) if looks else deadline, connecting=True)
        code = stream.connect_ex(where)
        if code != errno.EALREADY:
            return code
        now = network.now()
        if now >= deadline:
            return errno.ETIMEDOUT


def _held(stream: Stream, plan: Plan, network: Network) -> bool:
    """Whether a connection of this host holds the tuple that our SYN was sent to.

    A listener is where the SYN belongs. One in its handshake may be our own, seen from the other
    side; if it is not, the second look finds it established. Of a connection that nat has
    redirected, the socket is behind the door.
    """
    host, port, *_ = stream.getsockname()
    ours = Endpoint(host, port)
    doors = (plan.upstream,) if plan.door is None else (plan.upstream, plan.door)
    return any(network.tuple_state(door, ours) not in _NOT_IN_THE_WAY for door in doors)


_NOT_IN_THE_WAY = (0, TCP_LISTEN, TCP_SYN_RECV, TCP_NEW_SYN_RECV)


def _failure(code: int, plan: Plan) -> Exception:
    what = f"connect to {plan.upstream}: {os.strerror(code)}"
    if code == errno.EACCES and is_unix(plan.upstream):
        what += f" for uid {os.geteuid()}"  # which is not the one that started us
    if code == errno.ECONNREFUSED:
        return UpstreamError(CloseReason.UPSTREAM_REFUSED, what)
    if code == errno.ETIMEDOUT:
        return UpstreamError(CloseReason.UPSTREAM_TIMEOUT, what)
    if code in _UNREACHABLE:
        return UpstreamError(CloseReason.UPSTREAM_UNREACHABLE, what)
    if code == errno.ECONNRESET:
        return UpstreamError(CloseReason.UPSTREAM_RESET, what)
    return OSError(code, what)


_UNREACHABLE = frozenset(
    (
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.EACCES,  # an ip rule of type prohibit
        errno.EPERM,  # a firewall's verdict on the SYN
        errno.EINVAL,  # a route of type blackhole
        errno.ENOPROTOOPT,  # ICMP protocol unreachable
        errno.ECONNABORTED,
        errno.ENOENT,  # no such unix socket
        errno.ENOTDIR,
        errno.EPROTOTYPE,  # a unix socket of another type
    )
)


class Sockets:
    """Upstream sockets, really.

    `mark` is that of spoofed sockets on this host, `own_mark` that of all others, 0 for none.
    """

    def __init__(self, mark: int, own_mark: int = 0) -> None:
        self._mark, self._own_mark = mark, own_mark
        self._lookup = TupleLookup()

    def upstream_socket(self, plan: Plan, speaks: bool = False) -> socket.SocketType:
        host, spoof, here = plan.upstream.host, plan.spoof, plan.here
        if host[0] == "/":
            return UnixSocket(_UNIX, _STREAM)
        v6 = ":" in host
        sock = socket.SocketType(_INET6 if v6 else _INET, _STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Or recv would leave out an urgent byte (telnet's and FTP's interrupts): it goes on in
            # its place, as an ordinary one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            if speaks:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            if not here:  # when an upstream on this host goes, its kernel tells
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            if spoof:
                if v6:
                    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            elif plan.own and v6:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # ::6 is on no interface
            mark = self._mark if spoof and here else self._own_mark
            if mark:
                sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        except BaseException:
            sock.close()
            raise
        return sock

    def late_bind(self, stream: Stream) -> None:
        """Let connect, which knows the whole tuple, choose the port."""
        stream.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)

    def tuple_state(self, local: Endpoint, remote: Endpoint) -> int:
        return self._lookup.state(local, remote)

    def finish(self) -> None:
        self._lookup.close()


class UnixSocket(socket.SocketType):
    """A unix socket that may be told what only a TCP one needs to hear."""

    __slots__ = ()

    def setsockopt(self, level: int, *option: Any) -> None:  # noqa: ANN401
        if level != socket.IPPROTO_TCP:
            super().setsockopt(level, *option)
