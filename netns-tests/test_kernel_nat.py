"""Redirected and outbound connections, packet by packet.

Without the daemon: its sockets are made here, so that what is shown is the kernel's part.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

import pytest
from lib.standins import accept, af, dial_as, listen, transparent
from lib.streams import assert_talks
from lib.topology import PORT, Family, Pair, Topology
from lib.waits import stays

from tproxyd.addr import PrefixSet, parse_prefix
from tproxyd.config import (
    Config,
    Intercept,
    Listener,
    ReturnPath,
    Rules,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.kernel.reconcile import clean, install
from tproxyd.linux import SO_MARK

OURS = 15006
# include/uapi/linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h, in6.h
SO_ORIGINAL_DST = IP6T_SO_ORIGINAL_DST = 80
IPV6_FREEBIND = 78
USER = 61_337


def redirect(source: SourceKind, path: ReturnPath = ReturnPath.AUTO) -> Config:
    take = Intercept(via=Via.REDIRECT, ports=((PORT, PORT),))
    return Config(
        rules=Rules(return_path=path),
        listeners=(Listener(port=OURS, intercept=take, source=source),),
    )


def outbound(**selectors: object) -> Config:
    take = Intercept(Scope.OUTBOUND, Via.REDIRECT, exclude_ports=(), **selectors)  # type: ignore[arg-type]
    return Config(
        listeners=(Listener("outbound", port=OURS, intercept=take, source=SourceKind.PROXY),)
    )


IN_OUR_NAME = redirect(SourceKind.PROXY)


def original(sock: socket.socket) -> tuple[str, int]:
    """Where the client meant to go."""
    if sock.family == socket.AF_INET:
        data = sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        return socket.inet_ntop(socket.AF_INET, data[4:8]), struct.unpack("!H", data[2:4])[0]
    data = sock.getsockopt(socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, 28)
    return socket.inet_ntop(socket.AF_INET6, data[8:24]), struct.unpack("!H", data[2:4])[0]


def taken(net: Topology, family: Family, listener: socket.socket) -> Pair:
    """A client's connection to the pod and our end of it."""
    client = net.connect(family)
    ours = accept(net, listener)
    assert original(ours) == (family.pod, PORT)
    assert ours.getpeername() == client.getsockname()
    return Pair(client, ours)


def test_redirect(net: Topology, family: Family) -> None:
    """Old connections live, and those of this host's own are none of ours."""
    old = net.pair(family)
    old.app.settimeout(5)
    net.pod.inside(install, IN_OUR_NAME)
    with pytest.raises(ConnectionRefusedError):
        net.connect(family)
    listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
    pair = taken(net, family, listener)
    assert_talks(pair)
    assert_talks(old)
    local = net.keep(net.pod.connect(family.pod, PORT))
    assert_talks(Pair(local, net.accept(family)))
    net.pod.inside(clean)
    assert_talks(net.pair(family))
    assert_talks(old)


def test_a_redirected_connection_outlives_the_rules_in_a_drain(
    net: Topology, family: Family
) -> None:
    net.app(family)
    net.pod.inside(install, IN_OUR_NAME)
    listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
    pair = taken(net, family, listener)
    net.pod.inside(install, IN_OUR_NAME, intercept=False)
    assert_talks(pair)
    direct = net.pair(family)
    assert_talks(direct)
    net.pod.inside(install, IN_OUR_NAME)
    assert_talks(taken(net, family, listener))
    assert_talks(direct)
    assert_talks(pair)


def test_what_an_empty_chain_of_nat_does_not_keep(net: Topology, family: Family) -> None:
    """It fails when a kernel no longer needs the rule that a drain leaves in it."""
    net.pod.inside(install, IN_OUR_NAME)
    listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
    pair = taken(net, family, listener)
    net.pod.inside(install, IN_OUR_NAME, intercept=False)
    assert_talks(pair)
    net.pod.nft("flush chain inet tproxyd nat_prerouting")
    pair.client.settimeout(0.5)
    pair.app.settimeout(0.5)
    with pytest.raises((TimeoutError, ConnectionResetError)):
        assert_talks(pair)


def test_the_address_of_a_proxy_that_redirects(net: Topology, family: Family) -> None:
    """127.0.0.6 and ::6, which no interface has, reach the application and get its answers."""
    host = "127.0.0.6" if family.name == "v4" else "::6"
    app = net.app(family)
    net.pod.inside(install, IN_OUR_NAME)
    sock = net.keep(net.pod.open_socket(af(family)))
    if family.name == "v6":
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    sock.bind((host, 0))
    sock.connect((family.pod, PORT))
    far = accept(net, app)
    assert far.getpeername()[0] == host
    assert_talks(Pair(sock, far))


PATHS = pytest.mark.parametrize("path", [ReturnPath.ACCEPT_MARK, ReturnPath.CONNTRACK], ids=str)


@PATHS
def test_redirect_in_the_clients_name(net: Topology, family: Family, path: ReturnPath) -> None:
    """The application sees the client, another port, and its answers come home."""
    config = redirect(SourceKind.CLIENT, path)
    old = net.pair(family)
    net.pod.inside(install, config)
    listener = listen(net, family, OURS, config.listener_mark)
    pair = taken(net, family, listener)
    upstream = dial_as(net, family, (family.client, 20_000), (family.pod, PORT), config.mark)
    far = net.accept(family)
    assert far.getpeername()[:2] == (family.client, 20_000)
    net.pod.inside(install, config, intercept=False)
    for each in (pair, Pair(upstream, far), old):
        assert_talks(each)


@PATHS
@pytest.mark.parametrize("is_transparent", [True, False])
def test_our_syn_and_a_redirected_connection(
    net: Topology, family: Family, path: ReturnPath, is_transparent: bool
) -> None:
    """A port that the client uses itself: connection tracking takes our SYN for its packet.

    It must not reach that connection, nor give it our mark.
    """
    config = redirect(SourceKind.CLIENT, path)
    net.app(family)
    net.pod.inside(install, config)
    if is_transparent:
        listener = listen(net, family, OURS, config.listener_mark)
    else:
        listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
        listener.setsockopt(socket.SOL_SOCKET, SO_MARK, config.listener_mark)
    pair = taken(net, family, listener)
    challenges = net.pod.netstat("TCPChallengeACK")
    upstream = transparent(net, family, config.mark)
    upstream.bind(pair.client.getsockname()[:2])
    upstream.setblocking(False)
    to = (family.pod, PORT)
    assert upstream.connect_ex(to) in (errno.EINPROGRESS, errno.EAGAIN)
    stays(lambda: upstream.connect_ex(to) == errno.EALREADY, "SYN_SENT", 0.2)
    assert net.pod.netstat("TCPChallengeACK") == challenges
    assert_talks(pair)


def test_each_way_leaves_the_others_connections_alone(net: Topology, family: Family) -> None:
    """The first listener that matches takes, whichever way it does."""
    one = Listener("one", port=1001, intercept=Intercept(ports=((81, 81),)))
    two = Listener("two", port=1002, intercept=Intercept(via=Via.REDIRECT, ports=((80, 82),)))
    three = Listener("three", port=1003, intercept=Intercept())
    net.pod.inside(install, Config(listeners=(one, two, three)))
    listeners = {
        81: listen(net, family, one.port),
        82: listen(net, family, two.port),
        83: listen(net, family, three.port),
    }
    for port, listener in listeners.items():
        client = net.connect(family, port)
        ours = accept(net, listener)
        where = original(ours) if port == 82 else ours.getsockname()[:2]
        assert where == (family.pod, port)
        assert_talks(Pair(client, ours))


# Outbound -----------------------------------------------------------------------------------------


def connect_as(net: Topology, family: Family, user: int, group: int = 0) -> socket.socket:
    """The pod's connection to the neighbour, by that user (of whom a file system would ask)."""
    libc = ctypes.CDLL(None)

    def connect() -> socket.socket:
        libc.setfsgid(group)
        libc.setfsuid(user)
        try:
            sock = socket.socket(af(family))
        finally:
            libc.setfsuid(0)
            libc.setfsgid(0)
        sock.settimeout(10)
        sock.connect((family.beyond, PORT))
        return sock

    return net.keep(net.pod.inside(connect))


def test_outbound(net: Topology, family: Family) -> None:
    """What is made here for elsewhere is taken; but not ours, not old, not for this host."""
    web = net.keep(net.beyond.listen(family.beyond, PORT))
    old = Pair(net.keep(net.pod.connect(family.beyond, PORT)), accept(net, web))
    config = outbound()
    net.pod.inside(install, config)
    with pytest.raises(ConnectionRefusedError):
        net.pod.connect(family.beyond, PORT)
    listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
    client = net.keep(net.pod.connect(family.beyond, PORT))
    ours = accept(net, listener)
    assert original(ours) == (family.beyond, PORT)
    for mark in (config.listener_mark, config.listener_mark | 0x10000, config.mark):
        upstream = net.keep(net.pod.open_socket(af(family)))
        upstream.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        upstream.connect((family.beyond, PORT))
        assert_talks(Pair(upstream, accept(net, web)))
    net.app(family)
    local = net.keep(net.pod.connect(family.pod, PORT))
    assert_talks(Pair(local, net.accept(family)))
    assert_talks(net.pair(family))
    assert_talks(Pair(client, ours))
    assert_talks(old)

    net.pod.inside(install, config, intercept=False)
    direct = Pair(net.keep(net.pod.connect(family.beyond, PORT)), accept(net, web))
    for pair in (direct, old, Pair(client, ours)):
        assert_talks(pair)


def test_whose_outbound_connections_are_left_alone(net: Topology, family: Family) -> None:
    web = net.keep(net.beyond.listen(family.beyond, PORT))
    listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
    net.pod.inside(install, outbound(exclude_uids=(5, USER), exclude_gids=(USER + 1,)))
    for user, group in ((USER, 0), (5, 0), (0, USER + 1), (USER, USER + 1)):
        assert_talks(Pair(connect_as(net, family, user, group), accept(net, web)))
    for user, group in ((0, 0), (USER + 1, 0), (0, USER), (0, 5)):
        assert_talks(Pair(connect_as(net, family, user, group), accept(net, listener)))


def test_where_outbound_connections_are_left_alone(net: Topology, family: Family) -> None:
    web = net.keep(net.beyond.listen(family.beyond, PORT))
    listener = net.keep(net.pod.listen("" if family.name == "v4" else "::", OURS))
    beyond = PrefixSet([parse_prefix(family.beyond)])
    elsewhere = PrefixSet([parse_prefix(family.client)])
    for selectors in (
        {"exclude_destinations": beyond},
        {"destinations": elsewhere},
        {"ports": ((PORT + 1, PORT + 1),)},
    ):
        net.pod.inside(install, outbound(**selectors))
        client = net.keep(net.pod.connect(family.beyond, PORT))
        assert_talks(Pair(client, accept(net, web)))
    for selectors in (
        {"exclude_destinations": elsewhere},
        {"destinations": beyond},
        {"ports": ((PORT, PORT),)},
    ):
        net.pod.inside(install, outbound(**selectors))
        client = net.keep(net.pod.connect(family.beyond, PORT))
        assert_talks(Pair(client, accept(net, listener)))
