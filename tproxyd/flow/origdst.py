"""Where the client meant to go.

Facts about TPROXY, run on Linux 6.18:
- nf_tproxy assigns the packet to our listener without rewriting it. The accepted socket's local
  address is the destination that the client dialled: getsockname() is the answer.
- SO_ORIGINAL_DST reads the conntrack entry of a nat REDIRECT. It is not needed there, and asks for
  a conntrack entry that NOTRACK may have forbidden, so it can answer with an error or with an old
  connection's destination.

With REDIRECT it is the only answer: the packet was rewritten to our listener's port.
"""

from __future__ import annotations

import errno
import socket
import struct

from tproxyd.addr import Endpoint, OriginalDst
from tproxyd.flow.listen import local_endpoint
from tproxyd.flow.stream import Stream
from tproxyd.linux import SO_ORIGINAL_DST


def original_destination(downstream: Stream) -> OriginalDst:
    """The address and port that the client connected to. Raises OSError if it is gone already."""
    return OriginalDst(local_endpoint(downstream.getsockname()))


def redirected_destination(downstream: Stream) -> OriginalDst:
    """Where the client connected to before nat rewrote it. Raises OSError.

    Of a connection that nat never saw, one made to our port itself, that is our port.
    """
    here = local_endpoint(downstream.getsockname())
    try:
        if ":" in here.host:
            raw = downstream.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, _SOCKADDR_IN6)
            host = socket.inet_ntop(socket.AF_INET6, raw[8:24])
        else:
            raw = downstream.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, _SOCKADDR_IN)
            host = socket.inet_ntop(socket.AF_INET, raw[4:8])
    except OSError as error:
        if error.errno == errno.ENOENT:  # there is no conntrack entry
            return OriginalDst(here)
        raise
    return OriginalDst(Endpoint(host, struct.unpack_from("!H", raw, 2)[0]))


# struct sockaddr_in and sockaddr_in6: family, port, address at 4 and 8.
_SOCKADDR_IN, _SOCKADDR_IN6 = 16, 28
