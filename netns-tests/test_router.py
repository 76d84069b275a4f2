"""A router takes connections that only pass through it, and makes them again as the client.

client ── pod ── beyond: nothing is in the pod but tproxyd. What is not selected is forwarded as if
nobody were there.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
from lib.daemon import Daemon, tproxyd
from lib.headers import v1, v2
from lib.netns import Namespace
from lib.processes import is_gone
from lib.programs import quoted
from lib.streams import (
    Receiving,
    Sending,
    assert_talks,
    fill,
    pattern,
    receive,
    receive_to_end,
    reset,
    was_reset,
)
from lib.topology import PORT, V4, V6, Family, Pair, Topology, seen_port
from lib.waits import wait_for

Make = Callable[..., bytes]

LISTENER = 15006
OTHER_PORT = 81


def router(selectors: str = "ports = [80]", **options: object) -> str:
    name = options.pop("name", "router")
    port = options.pop("port", LISTENER)
    lines = [
        "[[listener]]",
        f"name = {name!r}",
        f"port = {port}",
        f'intercept = {{ scope = "forward", {selectors} }}',
        *(f"{key} = {value!r}" for key, value in options.items()),
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def net(net: Topology) -> Topology:
    """The pod forwards between the client and `beyond`."""
    net.beyond  # noqa: B018  it is there from now on
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    return net


def serve(net: Topology, family: Family, port: int = PORT) -> socket.socket:
    return net.keep(net.beyond.listen(family.beyond, port))


def through(net: Topology, family: Family, server: socket.socket, source_port: int = 0) -> Pair:
    """A connection from the client to a server in `beyond`."""
    port = server.getsockname()[1]
    client = net.keep(net.client.connect(family.beyond, port, source_port=source_port))
    return Pair(client, net.keep(server.accept()[0]))


def end(pair: Pair) -> None:
    """In order."""
    pair.client.close()
    assert pair.app.recv(1) == b""
    pair.app.close()


def connect_and_end(net: Topology, host: str, port: int = PORT) -> None:
    """A connection that the daemon ends at once, before or after connect() returns."""
    try:
        client = net.keep(net.client.connect(host, port))
        assert client.recv(1) == b""
    except ConnectionResetError:
        pass


def is_taken(net: Topology, source: Namespace, server: socket.socket) -> bool:
    """Whether a connection goes through the daemon: then both ends disagree on the port."""
    host, port = server.getsockname()[:2]
    client = net.keep(source.connect(host, port))
    accepted = net.keep(server.accept()[0])
    assert_talks(Pair(client, accepted))
    assert accepted.getpeername()[0] == client.getsockname()[0]
    return bool(accepted.getpeername() != client.getsockname())


# What the server sees ---------------------------------------------------------------------------


@pytest.mark.parametrize("rp_filter", [0, 1])
@pytest.mark.parametrize("source", ["client", "client-port", "proxy"])
def test_the_server_sees(net: Topology, family: Family, source: str, rp_filter: int) -> None:
    for name in ("all", "p0", "p1"):
        net.pod.sysctl(f"net/ipv4/conf/{name}/rp_filter", rp_filter)
    server = serve(net, family)
    with Daemon(net.pod, router(source=source)) as daemon:
        pair = through(net, family, server)
        assert_talks(pair)
        host, port = pair.client.getsockname()[:2]
        seen = pair.app.getpeername()[:2]
        expected = {
            "client": (family.client, seen_port(port)),
            "client-port": (family.client, port),
            "proxy": (family.pod_beyond, seen[1]),
        }
        assert seen == expected[source]
        assert pair.client.getpeername()[:2] == (family.beyond, PORT)
        end(pair)
        [record] = daemon.wait_log()
    assert record["downstream_remote_address"] == quoted(host, port)
    assert record["downstream_direct_remote_address"] == quoted(host, port)
    assert record["downstream_local_address"] == quoted(family.beyond, PORT)
    assert record["upstream_local_address"] == quoted(*seen)
    assert record["upstream_host"] == quoted(family.beyond, PORT)
    assert (record["bytes_received"], record["bytes_sent"]) == (32, 32)
    assert record["close_reason"] == "downstream_fin"


def test_both_directions_to_their_ends(net: Topology, family: Family) -> None:
    """Megabytes each way at once, and each end closes its half on its own."""
    data = pattern(4 << 20)
    server = serve(net, family)
    with Daemon(net.pod, router()) as daemon:
        pair = through(net, family, server)
        there, into_server = Sending(pair.client, data), Receiving(pair.app)
        assert into_server.result() == data
        there.assert_done()
        back = Sending(pair.app, data[::-1])  # the client's half is closed for long
        assert receive_to_end(pair.client) == data[::-1]
        back.assert_done()
        [record] = daemon.wait_log()
    assert (record["bytes_received"], record["bytes_sent"]) == (len(data), len(data))
    assert record["close_reason"] == "downstream_fin"


@pytest.mark.parametrize("who", ["downstream", "upstream"])
def test_a_reset_is_passed_on(net: Topology, family: Family, who: str) -> None:
    server = serve(net, family)
    with Daemon(net.pod, router()) as daemon:
        pair = through(net, family, server)
        assert_talks(pair)
        gone, left = pair if who == "downstream" else Pair(pair.app, pair.client)
        reset(gone)
        assert was_reset(left)
        assert daemon.wait_log()[0]["close_reason"] == f"{who}_reset"


def test_the_clients_own_port_again_and_again(net: Topology, family: Family) -> None:
    """Of the last connection it is in TIME_WAIT here; a client's SYN from it is taken again.

    Handed to what is left of the old connection, it would be passed to who listens at the port
    here, whoever that is.
    """
    server = serve(net, family)
    net.app(family)
    with Daemon(net.pod, router(source="client-port")) as daemon:
        for _ in range(3):
            pair = through(net, family, server, source_port=40_000)
            assert_talks(pair)
            pair.app.close()
            assert pair.client.recv(1) == b""
            pair.client.close()
        records = daemon.wait_log(3)
        assert net.app_saw_nothing(family)
    assert {record["downstream_remote_address"] for record in records} == {
        quoted(family.client, 40_000)
    }


# What is selected -------------------------------------------------------------------------------


def test_ports(net: Topology, family: Family) -> None:
    selected, other = serve(net, family), serve(net, family, OTHER_PORT)
    with Daemon(net.pod, router()) as daemon:
        assert is_taken(net, net.client, selected)
        assert not is_taken(net, net.client, other)
        assert daemon.metric("tproxyd_connections_total", listener="router") == 0
        assert daemon.metric("tproxyd_connections_active", listener="router") == 1


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ('exclude_ports = ["80-90"]', False),
        ('exclude_ports = ["81-90"]', True),
        ('interfaces = ["p0"]', True),
        ('interfaces = ["p1", "lo"]', False),
        ('sources = ["10.9.1.0/24", "fd00:9:1::/64"]', True),
        ('sources = ["10.9.2.0/24", "fd00:9:2::/64"]', False),
        ('destinations = ["10.9.2.2", "fd00:9:2::2"]', True),
        ('destinations = ["10.9.2.1", "fd00:9:2::1"]', False),
        ('exclude_destinations = ["10.9.2.0/24", "fd00:9:2::/64"]', False),
        ('exclude_destinations = ["10.9.1.0/24", "fd00:9:1::/64"]', True),
        ('destinations = ["0.0.0.0/0", "::/0"], exclude_destinations = ["10.9.2.2"]', None),
    ],
)
def test_selectors(net: Topology, family: Family, selectors: str, expected: bool | None) -> None:
    """What is not taken goes its way; the log knows nothing of it."""
    server = serve(net, family)
    taken = family is V6 if expected is None else expected
    with Daemon(net.pod, router(selectors)) as daemon:
        assert is_taken(net, net.client, server) == taken
        assert daemon.metric("tproxyd_connections_active") == taken
        assert daemon.log() == []


def test_only_one_direction(net: Topology, family: Family) -> None:
    """The interface says who is asked: others reach the client as before."""
    server = net.keep(net.client.listen(family.client, PORT))
    with Daemon(net.pod, router('interfaces = ["p0"], ports = [80]')):
        assert not is_taken(net, net.beyond, server)
        assert is_taken(net, net.client, serve(net, family))


def test_what_is_for_the_router_itself(net: Topology, family: Family) -> None:
    """A server on the router, at the same port, is none of a forwarding listener's business."""
    app = net.app(family)
    with Daemon(net.pod, router()) as daemon:
        for host in (family.pod, family.pod_beyond):
            client = net.keep(net.client.connect(host, PORT))
            accepted = net.accept(family)
            assert accepted.getpeername() == client.getsockname()
            assert_talks(Pair(client, accepted))
        assert app.getsockname()[1] == PORT
        assert daemon.metric("tproxyd_connections_active") == 0


def test_an_older_connection_lives_on(net: Topology, family: Family) -> None:
    """Forwarded before the rules, with them, and after them."""
    server = serve(net, family)
    old = through(net, family, server)
    with Daemon(net.pod, router()) as daemon:
        assert_talks(old)
        new = through(net, family, server)
        assert_talks(new)
        assert_talks(old)
        assert daemon.metric("tproxyd_connections_active") == 1
        end(new)
        assert daemon.stop() == 0
        assert len(daemon.log()) == 1
    assert_talks(old)


# Starting and stopping --------------------------------------------------------------------------


def test_stop(net: Topology, family: Family) -> None:
    """What is open is carried to its end, what is new is forwarded, and nothing stays behind."""
    data = pattern(8 << 20)
    server = serve(net, family)
    before = net.pod.dump()
    with Daemon(net.pod, router()) as daemon:
        pair = through(net, family, server)
        sent = fill(pair.client, data, quiet_s=0.2)
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: daemon.has_notified("STOPPING=1"), "STOPPING=1")

        def is_forwarded() -> bool:
            try:
                client = net.client.connect(family.beyond, PORT)
            except (ConnectionRefusedError, ConnectionResetError):
                return False
            with client, server.accept()[0] as accepted:
                return bool(accepted.getpeername() == client.getsockname())

        wait_for(is_forwarded, "the end of interception")
        received = Receiving(pair.app)
        pair.client.sendall(data[sent:])
        pair.client.shutdown(socket.SHUT_WR)
        assert received.result() == data
        pair.app.sendall(b"got it")
        pair.app.close()
        assert receive(pair.client, 6) == b"got it"
        assert daemon.process.wait(10) == 0
    assert net.pod.dump() == before


def test_nobody_listens(net: Topology, family: Family) -> None:
    """The daemon is killed: a client is refused at once, until `clean` lets it pass."""
    server = serve(net, family)
    before = net.pod.dump()
    with Daemon(net.pod, router()) as daemon:
        end(through(net, family, server))
        daemon.wait_log()
        workers = daemon.workers()
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        wait_for(lambda: all(map(is_gone, workers)), "the workers to follow their supervisor")
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        net.client.connect(family.beyond, PORT)
    assert time.monotonic() - began < 0.5
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before
    assert not is_taken(net, net.client, server)


# What goes wrong --------------------------------------------------------------------------------


def test_a_connection_to_the_listener_itself(net: Topology, family: Family) -> None:
    with Daemon(net.pod, router()) as daemon:
        for count, host in enumerate((family.pod, family.pod_beyond), 1):
            connect_and_end(net, host, LISTENER)
            assert daemon.wait_log(count)[-1]["close_reason"] == "loop"


def test_the_port_of_the_listener_on_another_host(net: Topology, family: Family) -> None:
    """Is a port like any other."""
    server = serve(net, family, LISTENER)
    with Daemon(net.pod, router('ports = "*"')):
        assert is_taken(net, net.client, server)


def test_the_server_refuses(net: Topology, family: Family) -> None:
    with Daemon(net.pod, router()) as daemon:
        connect_and_end(net, family.beyond)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "upstream_refused"
    assert record["upstream_host"] == quoted(family.beyond, PORT)
    assert record["duration"] < 1000


def test_the_server_is_a_black_hole(net: Topology, family: Family) -> None:
    net.beyond.nft(
        "table inet hole { chain input { type filter hook input priority 0; "
        "tcp dport 80 drop\n }\n }\n"
    )
    with Daemon(net.pod, router(connect_timeout_s=0.5)) as daemon:
        connect_and_end(net, family.beyond)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "upstream_timeout"
    assert 450 <= record["duration"] < 2000


def test_nobody_has_the_address(net: Topology, family: Family) -> None:
    """The neighbour says so, by ICMP to the client whose name we use: that is for us to hear."""
    far = "192.0.2.1" if family is V4 else "2001:db8:bad::1"
    net.pod.ip(f"route add {far} via {family.beyond}")
    net.beyond.sysctl("net/ipv4/ip_forward", 1)
    net.beyond.sysctl("net/ipv6/conf/all/forwarding", 1)
    net.beyond.ip(f"route add unreachable {far}")
    with Daemon(net.pod, router()) as daemon:
        connect_and_end(net, far)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "upstream_unreachable"


def test_a_path_with_a_smaller_mtu(net: Topology, family: Family) -> None:
    """Likewise: what is too big for the next link comes back as ICMP to the client's address."""
    net.world.ip("link set w0 mtu 1300")
    net.beyond.ip("link set b1 mtu 1300")
    net.beyond.sysctl("net/ipv4/ip_forward", 1)
    net.beyond.sysctl("net/ipv6/conf/all/forwarding", 1)
    net.pod.ip(f"route add {family.stranger} via {family.beyond}")
    # The server does not know of its link: else it would ask for small segments from the start.
    net.world.ip(f"route change default via {family.beyond_world} advmss 1400")
    net.world.ip(f"route add {family.client} via {family.beyond_world} advmss 1400")
    server = net.keep(net.world.listen(family.stranger, PORT))
    data = pattern(1 << 20)
    with Daemon(net.pod, router()):
        client = net.keep(net.client.connect(family.stranger, PORT))
        app = net.keep(server.accept()[0])
        assert app.getpeername()[:2] == (family.client, seen_port(client.getsockname()[1]))
        received = Receiving(app)
        Sending(client, data).assert_done()
        assert received.result() == data


# Together with others ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [v1, v2])
def test_behind_a_balancer(net: Topology, family: Family, make: Make) -> None:
    """The balancer's header names the client, and the server sees that one's address."""
    config = f"""{router()}
[[listener.proxy_protocol]]
from = ["{family.client}"]
policy = "require"
"""
    header = make(family.stranger, family.beyond, 40_000)
    server = serve(net, family)
    with Daemon(net.pod, config) as daemon:
        client = net.keep(net.client.connect(family.beyond, PORT))
        client.sendall(header + b"hello")
        app = net.keep(server.accept()[0])
        assert app.getpeername()[:2] == (family.stranger, seen_port(40_000))
        assert receive(app, 5) == b"hello"
        pair = Pair(client, app)
        assert_talks(pair)
        name = client.getsockname()[:2]
        end(pair)
        [record] = daemon.wait_log()
    assert record["downstream_remote_address"] == quoted(family.stranger, 40_000)
    assert record["downstream_direct_remote_address"] == quoted(*name)


def test_two_routers_and_a_sidecar(net: Topology, family: Family) -> None:
    """Each takes its own, in one daemon."""
    config = (
        router(name="web", source="client-port")
        + router(f"ports = [{OTHER_PORT}]", name="other", port=15007)
        + '[[listener]]\nname = "inbound"\nport = 15008\n'
    )
    web, other = serve(net, family), serve(net, family, OTHER_PORT)
    with Daemon(net.pod, config) as daemon:
        pair = through(net, family, web)
        assert pair.app.getpeername() == pair.client.getsockname()
        pairs = [pair, through(net, family, other), net.pair(family)]
        for each in pairs:
            assert_talks(each)
            assert each.app.getpeername()[0] == family.client
            port = each.client.getsockname()[1]
            assert each is pair or each.app.getpeername()[1] == seen_port(port)
        for name in ("web", "other", "inbound"):
            assert daemon.metric("tproxyd_connections_active", listener=name) == 1
        for each in pairs:
            end(each)
        records = daemon.wait_log(3)
    assert {(r["listener"], r["close_reason"]) for r in records} == {
        (name, "downstream_fin") for name in ("web", "other", "inbound")
    }
