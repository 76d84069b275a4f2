"""Who listens on this host's TCP ports, by sock_diag(7): no look at every connection, as /proc has.

A socket that intercepts is transparent, and the kernel hands a TPROXY rule no other one
(nf_tproxy_sk_is_transparent, in nft_tproxy.c and xt_TPROXY.c): one that is not was opened by
somebody who knows nothing of us. Older kernels don't tell (INET_DIAG_SOCKOPT: Linux 5.10).
"""

from __future__ import annotations

import contextlib
import socket
import struct

from tproxyd.kernel import netlink
from tproxyd.kernel.netlink import Netlink
from tproxyd.linux import TCP_LISTEN

# include/uapi/linux/sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2: family, protocol, extensions, states
_MESSAGE_SIZE = 72  # inet_diag_msg
_SOURCE_PORT = struct.Struct("!4xH")
_SOCKOPT, _TRANSPARENT = 22, 1 << 5

Listening = dict[int, tuple[bool, ...]]


def listening() -> Listening:
    """The ports on which anybody listens, and of each socket there whether it may be transparent.

    Raises OSError.
    """
    found: Listening = {}
    with contextlib.closing(Netlink(_NETLINK_SOCK_DIAG)) as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << TCP_LISTEN)
            for body in kernel.dump(_SOCK_DIAG_BY_FAMILY, request):
                (port,) = _SOURCE_PORT.unpack_from(body)
                options = netlink.attributes(body, _MESSAGE_SIZE).get(_SOCKOPT)
                transparent = options is None or bool(options[0] & _TRANSPARENT)
                found[port] = (*found.get(port, ()), transparent)
    return found
