"""Our SYN never reaches a living connection of the client as whom we dial; any other SYN passes.

Without the daemon: its two kinds of socket are made here, so that the dialler can be made to draw
exactly the port that another connection of the same client has.
"""

from __future__ import annotations

import errno
import socket

import pytest
from lib.netns import SOCKET_TIMEOUT_S
from lib.standins import accept, listen, transparent
from lib.streams import assert_talks
from lib.topology import PORT, Family, Pair, Topology
from lib.waits import stays

from tproxyd.config import Config, ReturnPath, Rules
from tproxyd.kernel.reconcile import install

CLIENT_PORT = 40_000
NOT_COMPLETED = (errno.EINPROGRESS, errno.EAGAIN)


@pytest.fixture(params=[ReturnPath.ACCEPT_MARK, ReturnPath.CONNTRACK], ids=str)
def config(request: pytest.FixtureRequest) -> Config:
    return Config(rules=Rules(return_path=request.param))


def proxied(net: Topology, family: Family, config: Config) -> Pair:
    """A client's connection and our end of it, at our transparent listener."""
    net.app(family)
    listener = listen(net, family, config.listeners[0].port, mark=config.listener_mark)
    client = net.connect(family, source_port=CLIENT_PORT)
    ours = net.keep(listener.accept()[0])
    ours.settimeout(SOCKET_TIMEOUT_S)
    assert ours.getsockname()[:2] == (family.pod, PORT)
    return Pair(client, ours)


def dial(net: Topology, family: Family, config: Config, port: int) -> tuple[socket.socket, int]:
    """Our connection to the application as the client, from that port; what connect answered."""
    sock = transparent(net, family, config.mark)
    sock.bind((family.client, port))
    sock.setblocking(False)
    return sock, sock.connect_ex((family.pod, PORT))


def test_a_living_connection_does_not_notice(net: Topology, family: Family, config: Config) -> None:
    net.pod.inside(install, config)
    downstream = proxied(net, family, config)
    challenges = net.pod.netstat("TCPChallengeACK")
    upstream, answer = dial(net, family, config, CLIENT_PORT)
    assert answer in NOT_COMPLETED
    # Its first retransmission would come after a second; what it did, it has done at once.
    stays(lambda: upstream.connect_ex((family.pod, PORT)) == errno.EALREADY, "SYN_SENT", 0.2)
    assert net.pod.netstat("TCPChallengeACK") == challenges
    assert_talks(downstream)

    other, answer = dial(net, family, config, CLIENT_PORT + 1)
    assert answer in (0, *NOT_COMPLETED)
    app = net.accept(family)
    assert app.getpeername()[:2] == (family.client, CLIENT_PORT + 1)
    other.settimeout(5)
    assert_talks(Pair(other, app))
    assert_talks(downstream)


def test_an_application_that_listens_transparently(
    net: Topology, family: Family, config: Config
) -> None:
    """Its listener is no connection of the client's: our SYN is for it."""
    net.pod.inside(install, config)
    app = listen(net, family, PORT + 1)
    sock = transparent(net, family, config.mark)
    sock.bind((family.client, CLIENT_PORT + 1))
    sock.connect((family.pod, PORT + 1))
    far = accept(net, app)
    assert far.getpeername()[:2] == (family.client, CLIENT_PORT + 1)
    assert_talks(Pair(sock, far))


def test_what_the_guard_prevents(net: Topology, family: Family, config: Config) -> None:
    """It fails when a kernel no longer needs the guard: the living connection answers our SYN.

    By conntrack the answer is brought home to us, and our RST ends the connection. Otherwise it
    goes to the client, who ignores it, and our connect would wait for its first retransmission.
    """
    net.pod.inside(install, config)
    (handle,) = [
        line.rpartition(" ")[2]
        for line in net.pod.run("nft", "-a", "list", "table", "inet", "tproxyd").splitlines()
        if "socket transparent 1 jump collided" in line
    ]
    net.pod.nft(f"delete rule inet tproxyd prerouting handle {handle}\n")
    downstream = proxied(net, family, config)
    challenges = net.pod.netstat("TCPChallengeACK")
    _, answer = dial(net, family, config, CLIENT_PORT)
    assert answer in NOT_COMPLETED
    assert net.pod.netstat("TCPChallengeACK") == challenges + 1
    if config.rules.return_path is ReturnPath.CONNTRACK:
        with pytest.raises(ConnectionResetError):
            downstream.app.recv(1)
    else:
        assert_talks(downstream)


def test_a_closed_connection_in_time_wait_is_spared_too(
    net: Topology, family: Family, config: Config
) -> None:
    """Its last packets may still be on their way; another port costs nothing."""
    net.pod.inside(install, config)
    downstream = proxied(net, family, config)
    downstream.app.shutdown(socket.SHUT_WR)  # the first FIN is ours, so TIME_WAIT is
    assert downstream.client.recv(1) == b""
    downstream.client.close()
    assert downstream.app.recv(1) == b""
    downstream.app.close()
    upstream, answer = dial(net, family, config, CLIENT_PORT)
    assert answer in NOT_COMPLETED
    stays(lambda: upstream.connect_ex((family.pod, PORT)) == errno.EALREADY, "SYN_SENT", 0.2)
