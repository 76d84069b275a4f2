"""The numbers and calls of Linux that Python's standard library lacks. Nobody else knows numbers.

Numbers are from the kernel's uapi headers, which never change them; each names its header. The
functions are thin: they do one thing, raise OSError, and decide nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from tproxyd.addr import Endpoint

# include/uapi/linux/in.h, in6.h
IP_TRANSPARENT = 19
IP_BIND_ADDRESS_NO_PORT = 24
IPV6_TRANSPARENT = 75
IPV6_FREEBIND = 78
SO_ORIGINAL_DST = 80  # include/uapi/linux/netfilter_ipv4.h, and the same for IPv6
# include/uapi/asm-generic/socket.h
_SO_ATTACH_FILTER = 26
SO_MARK = 36
# include/uapi/linux/sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
# include/uapi/linux/rtnetlink.h
_RTM_GETROUTE = 26
_RTA_DST = 1
_RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST = 2, 3, 4
_KINDS = {_RTN_LOCAL: "own", _RTN_ANYCAST: "own", _RTN_BROADCAST: "broadcast"}
# include/net/tcp_states.h
TCP_LISTEN = 10
TCP_SYN_RECV = 3
TCP_NEW_SYN_RECV = 12
# include/uapi/linux/capability.h
CAP_SETGID = 6
CAP_SETUID = 7
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAPABILITY_NAMES = {
    CAP_SETGID: "CAP_SETGID",
    CAP_SETUID: "CAP_SETUID",
    CAP_NET_ADMIN: "CAP_NET_ADMIN",
    CAP_NET_RAW: "CAP_NET_RAW",
}
_CAPABILITY_VERSION_3 = 0x20080522
# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_SET_NAME = 15
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# Capabilities ----------------------------------------------------------------------------------


def capabilities() -> frozenset[int]:
    """The effective capabilities of this process, by number."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    low, _, _, high, _, _ = struct.unpack("=6I", data.raw)
    bits = low | high << 32
    return frozenset(i for i in range(64) if bits >> i & 1)


def lay_down(capability: int) -> None:
    """Make it ineffective in this process, and in what it forks, until `take_up`."""
    _set_effective(lambda effective, permitted: effective & ~(1 << capability))


def take_up() -> None:
    """Make every permitted capability effective."""
    _set_effective(lambda effective, permitted: permitted)


def _set_effective(choose: Callable[[int, int], int]) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    low, permitted, inheritable, high, permitted_, inheritable_ = struct.unpack("=6I", data.raw)
    bits = choose(low | high << 32, permitted | permitted_ << 32)
    packed = (bits & 0xFFFF_FFFF, permitted, inheritable, bits >> 32, permitted_, inheritable_)
    _check(_libc.capset(header, struct.pack("=6I", *packed)), "capset")


def keep_only(wanted: frozenset[int]) -> None:
    """Give up every capability but `wanted`, in all sets, for this process and what it executes."""
    bits = sum(1 << number for number in wanted)
    low, high = bits & 0xFFFF_FFFF, bits >> 32
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(NO_NEW_PRIVS)")
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl(CAP_AMBIENT)")
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", low, low, 0, high, high, 0)  # effective, permitted, inheritable
    _check(_libc.capset(header, data), "capset")


def become(uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """Change to another user, keeping the permitted capabilities (`keep_only` comes next)."""
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl(KEEPCAPS)")
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def name_process(name: str) -> None:
    """The name that ps -o comm, top and /proc/PID/comm show: 15 bytes at most."""
    _check(_libc.prctl(_PR_SET_NAME, name.encode()[:15] + b"\0", 0, 0, 0), "prctl(NAME)")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends, however it does."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PDEATHSIG)")


_CLONE_NEWNET = 0x40000000  # linux/sched.h


def enter_network_namespace(path: str) -> None:
    """Of the calling thread, and of the threads and processes that it starts."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET), "setns")
    finally:
        os.close(fd)


# Interfaces ------------------------------------------------------------------------------------

_SIOCGIFFLAGS = 0x8913  # include/uapi/linux/sockios.h
_IFF_UP = 1  # include/uapi/linux/if.h


def ask_socket(sock: socket.socket, level: int, option: int, request: bytes) -> bytes:
    """getsockopt(2) with a question in the buffer, which Python's own cannot send."""
    buffer = ctypes.create_string_buffer(request, len(request))
    size = ctypes.c_uint32(len(request))
    result = _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(size))
    _check(result, "getsockopt")
    return buffer.raw[: size.value]


def filter_arrivals(sock: socket.socket, program: bytes) -> None:
    """SO_ATTACH_FILTER: what this program of classic BPF lets pass is all that `sock` receives."""
    code = ctypes.create_string_buffer(program, len(program))
    size = len(program) // 8  # struct sock_filter, linux/filter.h
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", size, ctypes.addressof(code))
    )


def interface_is_up(name: str) -> bool:
    """Whether an interface of this network namespace is up (/sys may show another one)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16s16x", name.encode())
        answer = fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, request)
    return bool(struct.unpack_from("=H", answer, 16)[0] & _IFF_UP)


# Sockets ---------------------------------------------------------------------------------------


class AddressKinds:
    """Asks what an address is on this host. Good for one process; `close` it.

    One RTM_GETROUTE, which needs no privilege, 4 µs; the answer's type says it. Two cheaper
    questions have wrong answers: bind() takes every address for our own under ip_nonlocal_bind=1,
    and the source that a UDP connect picks is not the address itself when that is a secondary one.
    """

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, flags)

    def kind(self, host: str) -> str:
        """ "own", "broadcast" or "", as the routing tables of this namespace see it."""
        if ":" in host:
            question = _ASK_V6 + _packed(socket.AF_INET6, host)
        else:
            question = _ASK_V4 + _packed(socket.AF_INET, host)
        self._sock.send(question)
        reply = self._sock.recv(4096)
        if reply[4:6] == _ERROR:
            return ""  # no route to it: then it is nobody here
        return _KINDS.get(reply[16 + 7], "")  # rtm_type

    def close(self) -> None:
        self._sock.close()


def _ask_route(family: int, size: int) -> bytes:
    """RTM_GETROUTE up to the address of `size` bytes: nlmsghdr, rtmsg, RTA_DST's head."""
    route = struct.pack("=BBBBBBBBI", family, size * 8, 0, 0, 0, 0, 0, 0, 0)
    attribute = struct.pack("=HH", 4 + size, _RTA_DST)
    length = 16 + len(route) + len(attribute) + size
    return struct.pack("=IHHII", length, _RTM_GETROUTE, _NLM_F_REQUEST, 0, 0) + route + attribute


_ASK_V4, _ASK_V6 = _ask_route(socket.AF_INET, 4), _ask_route(socket.AF_INET6, 16)
_ERROR = struct.pack("=H", _NLMSG_ERROR)


class HasOptions(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...
    def setsockopt(self, level: int, name: int, value: int | bytes, /) -> None: ...


def reset_on_close(sock: HasOptions) -> None:
    """Have close() send RST: the other side learns that this was no orderly end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)


_ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s


_TCP_INFO_SIZE = 104


def rtt_and_retransmits(sock: HasOptions) -> tuple[int, int]:
    """Smoothed round-trip time in µs and total retransmitted segments (struct tcp_info)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    rtt, retransmits = _RTT_AND_RETRANSMITS(info)
    return rtt, retransmits


_RTT_AND_RETRANSMITS = struct.Struct("=68xI28xI").unpack  # tcpi_rtt, tcpi_total_retrans


def waiting_clients(listening: socket.socket) -> int:
    """How many connections wait in its accept queue; 0 once it listens no more.

    Of a listening socket TCP_INFO tells sk_ack_backlog as tcpi_unacked (net/ipv4/tcp.c,
    tcp_get_info); any other state has another meaning for that field.
    """
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    state, unacked = _STATE_AND_UNACKED(info)
    return unacked if state == TCP_LISTEN else 0


_STATE_AND_UNACKED = struct.Struct("=B23xI76x").unpack


class TupleLookup:
    """Asks the kernel which TCP socket holds a 4-tuple (sock_diag, one exact look-up).

    4.4 µs, no privilege needed. Without NLM_F_DUMP inet_diag looks the tuple up as an arriving
    packet would (net/ipv4/inet_diag.c, inet_diag_find_one_icsk): the connection first, then
    TIME_WAIT, then a listener.
    """

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, flags, _NETLINK_SOCK_DIAG)

    def state(self, local: Endpoint, remote: Endpoint) -> int:
        """The TCP state (tcp_states.h) of the socket that `remote -> local` reaches; 0 for none."""
        family = socket.AF_INET6 if local.is_v6 else socket.AF_INET
        request = struct.pack(
            "=IHHIIBBBxIHH16s16sI8s",
            72,  # the whole message
            _SOCK_DIAG_BY_FAMILY,
            _NLM_F_REQUEST,
            0,
            0,
            family,
            socket.IPPROTO_TCP,
            0,
            0xFFFF_FFFF,  # any state
            socket.htons(local.port),
            socket.htons(remote.port),
            _packed(family, local.host),
            _packed(family, remote.host),
            0,
            b"\xff" * 8,  # INET_DIAG_NOCOOKIE
        )
        self._sock.send(request)
        reply = self._sock.recv(4096)
        if struct.unpack_from("=H", reply, 4)[0] == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", reply, 16)[0]
            if code == errno.ENOENT:
                return 0
            raise OSError(code, f"sock_diag: {os.strerror(code)}")
        return reply[17]  # idiag_state

    def close(self) -> None:
        self._sock.close()


def _packed(family: int, host: str) -> bytes:
    return socket.inet_pton(family, host.partition("%")[0])
