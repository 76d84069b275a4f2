"""A header may come in pieces of any size, and what follows it is payload to the byte."""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
from collections.abc import Callable

import pytest
from lib.daemon import Daemon
from lib.headers import v1, v2
from lib.streams import receive
from lib.topology import Family, Topology
from lib.waits import wait_for

CONFIG = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "require"
"""


def unsent(sock: socket.socket) -> int:
    """Bytes in the send queue that are not acknowledged."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("make", [v1, v2])
def test_header_byte_by_byte(net: Topology, family: Family, make: Callable[..., bytes]) -> None:
    net.app(family)
    with Daemon(net.pod, CONFIG):
        client = net.connect(family)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in make(family.stranger, family.pod) + b"payload":
            # Nothing on the way may join two of them: each is acknowledged before the next goes.
            client.sendall(bytes([byte]))
            wait_for(lambda: unsent(client) == 0, "the acknowledgement")
        app = net.accept(family)
        assert app.getpeername()[0] == family.stranger
        assert receive(app, 7) == b"payload"
