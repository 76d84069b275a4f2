"""Two clients behind one address whose ports collide after the rotation.

The application knows the client at port p by port q = seen_port(p). When another live connection of
the same address is at q itself, both would be one 4-tuple in one kernel: the new SYN would meet the
other connection's socket. (A NAT in front of many clients makes this ordinary.)
"""

from __future__ import annotations

import errno
import socket
import time

import pytest
from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import PORT, Family, Pair, Topology, seen_port
from lib.waits import wait_for

P = 40_000
Q = seen_port(P)
RETURN_PATHS = pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])


@RETURN_PATHS
def test_seen_port_is_another_clients(net: Topology, family: Family, return_path: str) -> None:
    net.app(family)
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n') as daemon:
        first = Pair(net.connect(family, source_port=Q), net.accept(family))
        second = Pair(net.connect(family, source_port=P), net.accept(family))
        assert_talks(first)
        assert_talks(second)
        assert first.app.getpeername()[1] == seen_port(Q)
        assert second.app.getpeername()[0] == family.client
        assert second.app.getpeername()[1] not in (P, Q, seen_port(Q))
        assert daemon.metric("tproxyd_source_port_retries_total") >= 1
        assert_talks(first)


def test_port_that_is_seen_already(net: Topology, family: Family) -> None:
    """The other order: P is live and the application knows it as Q when a client comes from Q.

    That 4-tuple is taken by the application's own socket, so the newcomer cannot be served. What
    matters is that it is told so at once, and that the live connection does not notice.
    """
    net.app(family)
    with Daemon(net.pod, '[rules]\nreturn_path = "accept-mark"\n'):
        first = Pair(net.connect(family, source_port=P), net.accept(family))
        assert_talks(first)
        assert first.app.getpeername()[1] == Q
        began = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            net.connect(family, source_port=Q)
        assert time.monotonic() - began < 0.5
        assert_talks(first)
        assert_talks(net.pair(family))


def test_port_that_is_seen_already_by_conntrack(net: Topology, family: Family) -> None:
    """There a refusal would count as the live connection's end, so the newcomer is kept waiting.

    Its next try gets through when the port is free.
    """
    net.app(family)
    with Daemon(net.pod, '[rules]\nreturn_path = "conntrack"\n'):
        first = Pair(net.connect(family, source_port=P), net.accept(family))
        assert_talks(first)
        assert first.app.getpeername()[1] == Q
        newcomer = net.keep(
            net.client.open_socket(socket.AF_INET6 if ":" in family.pod else socket.AF_INET)
        )
        newcomer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        newcomer.bind(("", Q))
        newcomer.setblocking(False)
        assert newcomer.connect_ex((family.pod, PORT)) == errno.EINPROGRESS
        assert_talks(first)
        assert newcomer.connect_ex((family.pod, PORT)) == errno.EALREADY
        first.client.close()
        first.app.close()
        wait_for(lambda: newcomer.connect_ex((family.pod, PORT)) in (0, errno.EISCONN), "a retry")
        newcomer.settimeout(5)
        assert_talks(Pair(newcomer, net.accept(family)))
