"""Routers and remote backends, packet by packet: what we hold comes home, all else is forwarded.

Without the daemon: its sockets are made here, so that what is shown is the kernel's part.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator

import pytest
from lib.netns import Namespace
from lib.standins import accept, af, dial_as, listen, transparent
from lib.streams import assert_talks, receive, reset
from lib.topology import PORT, V4, Family, Pair, Topology

from tproxyd.addr import Endpoint, PrefixSet, parse_prefix
from tproxyd.config import Config, Intercept, Listener, Scope, SourceKind
from tproxyd.kernel.reconcile import clean, install

OURS, OTHER_PORT = 15001, 81
SOON_S = 0.7  # less than the second after which a lost SYN is sent again


def router(**selectors: object) -> Config:
    take = Intercept(Scope.FORWARD, exclude_ports=(), **selectors)  # type: ignore[arg-type]
    return Config(listeners=(Listener("router", port=OURS, intercept=take),))


ROUTER = router(ports=((PORT, PORT),))
GATEWAY = Config(
    listeners=(
        Listener(
            "gateway",
            bind="*",
            port=8000,
            upstream=(Endpoint("192.0.2.1", PORT),),
            source=SourceKind.CLIENT,
        ),
    )
)


@pytest.fixture
def net() -> Iterator[Topology]:
    """The pod forwards, and believes no source address that its routes do not lead back to."""
    with Topology() as net:
        net.beyond  # noqa: B018
        net.pod.sysctl("net/ipv4/ip_forward", 1)
        net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
        for_each_interface(net.pod, "rp_filter", 1)
        yield net


def for_each_interface(where: Namespace, name: str, value: int) -> None:
    for interface in ("all", "p0", "p1"):
        where.sysctl(f"net/ipv4/conf/{interface}/{name}", value)


def server(net: Topology, family: Family, port: int = PORT) -> socket.socket:
    return net.keep(net.beyond.listen(family.beyond, port))


def through(net: Topology, family: Family, server: socket.socket, port: int = PORT) -> Pair:
    """A client's connection that nobody took: the server sees the client itself."""
    client = net.keep(net.client.connect(family.beyond, port))
    far = accept(net, server)
    assert far.getpeername() == client.getsockname()
    return Pair(client, far)


class Taken:
    """A client's connection that our listener took, and ours to the server, as the client."""

    def __init__(
        self,
        net: Topology,
        family: Family,
        listener: socket.socket,
        server: socket.socket,
        client_port: int = 0,
    ) -> None:
        self.client = net.keep(net.client.connect(family.beyond, PORT, source_port=client_port))
        self.ours = accept(net, listener)
        assert self.ours.getpeername() == self.client.getsockname()
        assert self.ours.getsockname()[:2] == (family.beyond, PORT)
        source = self.client.getsockname()[:2]
        self.upstream = dial_as(net, family, source, (family.beyond, PORT))
        self.far = accept(net, server)
        assert self.far.getpeername()[:2] == source, "the client's own port too"

    def assert_talks(self) -> None:
        assert_talks(Pair(self.client, self.ours))
        assert_talks(Pair(self.upstream, self.far))


def test_a_router(net: Topology, family: Family) -> None:
    """What is selected is taken, at both ends in the other's name; all else is forwarded."""
    web, other = server(net, family), server(net, family, OTHER_PORT)
    old = through(net, family, web)
    net.pod.inside(install, ROUTER)
    listener = listen(net, family, OURS, ROUTER.listener_mark)
    first, second = Taken(net, family, listener, web), Taken(net, family, listener, web)
    first.assert_talks()
    second.assert_talks()
    assert_talks(old)
    unselected = through(net, family, other, OTHER_PORT)
    assert_talks(unselected)

    # A drain takes nothing new and keeps what lives.
    net.pod.inside(install, ROUTER, intercept=False)
    first.assert_talks()
    direct = through(net, family, web)
    for pair in (old, unselected, direct):
        assert_talks(pair)
    # And back again: the rules are of no age, only connections are.
    net.pod.inside(install, ROUTER)
    second.assert_talks()
    assert_talks(direct)
    Taken(net, family, listener, web).assert_talks()

    for sock in (first.ours, first.upstream, second.ours, second.upstream):
        reset(sock)
    net.pod.inside(clean)
    for pair in (old, unselected, direct):
        assert_talks(pair)


def test_connections_to_the_port_of_our_listener(net: Topology, family: Family) -> None:
    """Of another host: forwarded like any other, older or not selected. That we listen on every
    address does not make their packets ours.
    """
    other = server(net, family, OURS)
    old = through(net, family, other, OURS)
    listener = listen(net, family, OURS)
    net.pod.inside(install, ROUTER)
    assert_talks(old)
    assert_talks(through(net, family, other, OURS))
    Taken(net, family, listener, server(net, family)).assert_talks()


def test_what_is_for_the_router_itself_is_its_own(net: Topology, family: Family) -> None:
    net.pod.inside(install, ROUTER)
    assert_talks(net.pair(family))


@pytest.mark.parametrize("reflect", [0, 1])
def test_nobody_listens(net: Topology, family: Family, reflect: int) -> None:
    """Refused at once, in the server's name, also where refusals get the mark of what they refuse.

    And not forwarded: that would bypass the proxy.
    """
    net.pod.sysctl("net/ipv4/fwmark_reflect", reflect)
    net.pod.sysctl("net/ipv6/fwmark_reflect", reflect)
    web = server(net, family)
    net.pod.inside(install, ROUTER)
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        net.client.connect(family.beyond, PORT)
    assert time.monotonic() - began < SOON_S
    web.setblocking(False)
    with pytest.raises(BlockingIOError):
        web.accept()


def test_selectors_hold_for_forwarded_traffic(net: Topology, family: Family) -> None:
    """By interface, and by the destinations that are left alone."""
    web = server(net, family)
    for config in (
        router(interfaces=("p1",)),
        router(exclude_destinations=PrefixSet([parse_prefix(family.beyond)])),
        router(sources=PrefixSet([parse_prefix(family.pod)])),
    ):
        net.pod.inside(install, config)
        assert_talks(through(net, family, web))
    listener = listen(net, family, OURS)
    for config in (
        router(interfaces=("p0",)),
        router(exclude_destinations=PrefixSet([parse_prefix(family.client)])),
        router(sources=PrefixSet([parse_prefix(family.client)])),
    ):
        net.pod.inside(install, config)
        Taken(net, family, listener, web).assert_talks()


def test_a_client_that_uses_its_port_again(net: Topology, family: Family) -> None:
    """Its SYN meets our end of the old connection in TIME_WAIT, and still goes to our listener.

    And not to another that this host has on the port.
    """
    web = server(net, family)
    net.app(family)
    net.pod.inside(install, ROUTER)
    listener = listen(net, family, OURS)
    first = Taken(net, family, listener, web, client_port=40_000)
    first.ours.shutdown(socket.SHUT_WR)  # the first FIN is ours, so TIME_WAIT is
    assert first.client.recv(1) == b""
    first.client.close()
    assert first.ours.recv(1) == b""
    first.ours.close()
    reset(first.upstream)
    Taken(net, family, listener, web, client_port=40_000).assert_talks()
    assert net.app_saw_nothing(family)


def test_what_syn_cookies_cannot_do(net: Topology, family: Family) -> None:
    """It fails when a kernel brings a cookie's ACK home: then say so in kernel/desired.py."""
    net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
    server(net, family)
    net.pod.inside(install, ROUTER)
    listener = listen(net, family, OURS)
    listener.setblocking(False)
    with pytest.raises(ConnectionResetError):
        net.keep(net.client.connect(family.beyond, PORT)).recv(1)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize(
    ("src_valid_mark", "rp_filter", "accept_local", "works"),
    [
        (0, 0, 0, True),
        (0, 2, 1, True),
        (1, 0, 0, False),
        (1, 0, 1, True),
        (1, 1, 0, False),
        (1, 1, 1, False),
        (1, 2, 0, False),
        (1, 2, 1, True),
    ],
)
def test_what_src_valid_mark_asks_for(
    net: Topology, src_valid_mark: int, rp_filter: int, accept_local: int, works: bool
) -> None:
    """Of routers and of remote backends alike: where it does not work, nothing comes home."""
    for_each_interface(net.pod, "src_valid_mark", src_valid_mark)
    for_each_interface(net.pod, "rp_filter", rp_filter)
    for_each_interface(net.pod, "accept_local", accept_local)
    web, other = server(net, V4), server(net, V4, OTHER_PORT)
    net.pod.inside(install, ROUTER)
    listener = listen(net, V4, OURS)
    if works:
        Taken(net, V4, listener, web).assert_talks()
        upstream = dial_as(net, V4, (V4.client, 40_000), (V4.beyond, OTHER_PORT))
        assert_talks(Pair(upstream, accept(net, other)))
        return
    client = net.keep(net.client.open_socket())
    client.settimeout(SOON_S / 2)
    with pytest.raises(TimeoutError):
        client.connect((V4.beyond, PORT))
    assert unanswered(net, V4, (V4.beyond, OTHER_PORT))


def unanswered(net: Topology, family: Family, to: tuple[str, int]) -> bool:
    """Whether a connection of ours as the client hears nothing."""
    sock = transparent(net, family)
    sock.settimeout(SOON_S / 2)
    sock.bind((family.client, 0))
    try:
        sock.connect(to)
    except TimeoutError:
        return True
    return False


# Backends on other hosts --------------------------------------------------------------------------


def test_a_remote_backend_sees_the_client(net: Topology, family: Family) -> None:
    """Its answers come home, with nothing that intercepts; and so they do in a drain."""
    web = server(net, family)
    old = through(net, family, web)
    to = (family.beyond, PORT)
    assert unanswered(net, family, to), "it must need the rule"
    net.pod.inside(install, GATEWAY)
    upstream = dial_as(net, family, (family.client, 40_000), to)
    pair = Pair(upstream, accept(net, web))
    assert pair.app.getpeername()[:2] == (family.client, 40_000)
    assert_talks(pair)
    assert_talks(old)
    assert_talks(through(net, family, web))
    net.pod.inside(install, GATEWAY, intercept=False)
    assert_talks(pair)
    with pytest.raises(ConnectionRefusedError):
        dial_as(net, family, (family.client, 40_001), (family.beyond, OTHER_PORT))


FAR = {"v4": ("10.9.3.1", "10.9.3.2"), "v6": ("fd00:9:3::1", "fd00:9:3::2")}


@pytest.fixture
def far(net: Topology) -> Iterator[Namespace]:
    """A host behind `beyond`, over a link with a smaller MTU."""
    with Namespace("far") as far:
        far.ip(f"link add f0 type veth peer name b1 netns {net.beyond.name}")
        for near, end in FAR.values():
            length = 64 if ":" in near else 24
            net.beyond.ip(f"addr add {near}/{length} dev b1")
            far.ip(f"addr add {end}/{length} dev f0")
        net.beyond.ip("link set b1 up mtu 1300")
        far.ip("link set f0 up", *(f"route add default via {near}" for near, _ in FAR.values()))
        net.pod.ip("route add 10.9.3.0/24 via 10.9.2.2", "route add fd00:9:3::/64 via fd00:9:2::2")
        net.beyond.sysctl("net/ipv4/ip_forward", 1)
        net.beyond.sysctl("net/ipv6/conf/all/forwarding", 1)
        yield far


def test_a_path_with_a_smaller_mtu(net: Topology, family: Family, far: Namespace) -> None:
    """The router that says so says it to the client, whose name our packets carry."""
    host = FAR[family.name][1]
    listener = net.keep(far.listen(host, PORT))
    net.pod.inside(install, GATEWAY)
    upstream = dial_as(net, family, (family.client, 40_000), (host, PORT))
    app = accept(net, listener)
    upstream.sendall(bytes(20_000))
    assert receive(app, 20_000) == bytes(20_000)


def test_no_chain_sees_a_fragment(net: Topology, family: Family) -> None:
    """A datagram, since TCP over IPv6 is hardly ever fragmented."""
    net.pod.inside(install, GATEWAY)
    net.pod.nft(
        "table inet other { chain c { type filter hook prerouting priority mangle; "
        "ip frag-off & 0x3fff != 0 drop\n exthdr frag exists drop\n }\n }\n"
    )
    there = net.keep(net.beyond.open_socket(af(family), socket.SOCK_DGRAM))
    there.bind((family.beyond, PORT))
    here = net.keep(net.client.open_socket(af(family), socket.SOCK_DGRAM))
    here.sendto(bytes(4_000), (family.beyond, PORT))
    assert there.recv(5_000) == bytes(4_000)


@pytest.mark.parametrize("config", [GATEWAY, ROUTER], ids=["gateway", "router in a drain"])
def test_answers_in_fragments(net: Topology, far: Namespace, config: Config) -> None:
    """Of a backend that lets routers fragment: all of them are of our connection, not the first.

    Nothing else has the kernel put them together here: no connection tracking, no interception.
    """
    host = FAR["v4"][1]
    far.sysctl("net/ipv4/ip_no_pmtu_disc", 1)
    net.beyond.ip("link set b0 mtu 600")
    listener = net.keep(far.listen(host, PORT))
    net.pod.inside(install, config, intercept=False)
    upstream = dial_as(net, V4, (V4.client, 40_000), (host, PORT))
    accept(net, listener).sendall(bytes(20_000))
    assert receive(upstream, 20_000) == bytes(20_000)
    assert net.beyond.netstat("FragCreates")


def test_a_smaller_mtu_for_a_client_at_the_port_of_our_listener(
    net: Topology, family: Family, far: Namespace
) -> None:
    """What is told to a client about a connection that is forwarded is for the client to hear."""
    host = FAR[family.name][1]
    far_listener = net.keep(far.listen(host, OTHER_PORT))
    listen(net, family, OURS)
    net.pod.inside(install, ROUTER)
    client = net.keep(net.client.connect(host, OTHER_PORT, source_port=OURS))
    app = accept(net, far_listener)
    assert app.getpeername() == client.getsockname()
    client.sendall(bytes(20_000))
    assert receive(app, 20_000) == bytes(20_000)


def test_a_backend_that_cannot_be_reached(net: Topology, family: Family, far: Namespace) -> None:
    """Told by a router on the way: an error soon, and no timeout."""
    host = FAR[family.name][1]
    version = "-4" if family.name == "v4" else "-6"
    net.beyond.run("ip", version, "route", "add", "unreachable", host)
    net.pod.inside(install, GATEWAY)
    with pytest.raises(OSError, match=r"unreachable|No route") as caught:
        dial_as(net, family, (family.client, 40_000), (host, PORT))
    assert caught.value.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
