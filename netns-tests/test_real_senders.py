"""PROXY headers of the load balancers that people have, read by our sidecar.

A client in `world` reaches HAProxy, nginx or Envoy in `beyond`, which sends the bytes on to the pod
behind a header; tproxyd trusts `beyond` and takes nothing from it without one.
"""

from __future__ import annotations

import socket

import pytest
from lib.daemon import Daemon
from lib.headers import v1
from lib.programs import quoted
from lib.senders import BALANCER_PORT, sending
from lib.servers import greeting
from lib.streams import Sending, assert_talks, pattern, receive, receive_to_end
from lib.topology import PORT, V6, Family, Pair, Topology
from lib.waits import wait_for

TRUSTING = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.2.2", "fd00:9:2::2"]
policy = "require"
"""

senders = pytest.mark.parametrize(
    ("program", "version"),
    [("haproxy", "v1"), ("haproxy", "v2"), ("nginx", "v1"), ("envoy", "v1"), ("envoy", "v2")],
)
checkers = pytest.mark.parametrize(
    ("program", "version"),
    [("haproxy", "v1"), ("haproxy", "v2"), ("envoy", "v1"), ("envoy", "v2")],
)


@senders
def test_the_application_sees_the_client_of_the_balancer(
    net: Topology, family: Family, program: str, version: str
) -> None:
    """Even before the client has said a word: of the protocols people use, many begin so."""
    net.app(family)
    with (
        Daemon(net.pod, TRUSTING) as daemon,
        sending(program, net.beyond, (family.pod_beyond, PORT), version),
    ):
        client = net.connect_world(family, BALANCER_PORT)
        app = net.accept(family)
        assert app.getpeername()[0] == family.stranger
        app.sendall(b"220 ready")
        assert receive(client, 9) == b"220 ready"
        assert_talks(Pair(client, app))
        port = client.getsockname()[1]
        client.shutdown(socket.SHUT_WR)
        assert receive_to_end(app) == b""
        app.close()
        assert receive_to_end(client) == b""
        [record] = daemon.wait_log()
        assert record["downstream_remote_address"] == quoted(family.stranger, port)
        assert host_of(record["downstream_direct_remote_address"]) == family.beyond
        assert record["proxy_protocol"] == {
            "version": int(version[1]),
            "destination": quoted(family.beyond_world, BALANCER_PORT),
        }
        assert record["bytes_received"] == 32
        assert record["bytes_sent"] == 9 + 32


@senders
def test_bytes_that_come_with_the_header(
    net: Topology, family: Family, program: str, version: str
) -> None:
    """Nothing of the client's is taken for a part of the header, not even a header of its own."""
    data = v1("198.51.100.7", "198.51.100.8") + pattern(1 << 20)
    net.app(family)
    with (
        Daemon(net.pod, TRUSTING),
        sending(program, net.beyond, (family.pod_beyond, PORT), version),
    ):
        client = net.connect_world(family, BALANCER_PORT)
        there = Sending(client, data)
        app = net.accept(family)
        assert app.getpeername()[0] == family.stranger
        assert receive_to_end(app) == data
        there.assert_done()


def test_an_ipv6_client_of_a_balancer_that_reaches_the_pod_over_ipv4(net: Topology) -> None:
    """The application has an IPv4 socket, which cannot show such a client: the log does."""
    net.app()
    with (
        Daemon(net.pod, TRUSTING) as daemon,
        sending("haproxy", net.beyond, ("10.9.2.1", PORT), "v2"),
    ):
        client = net.connect_world(V6, BALANCER_PORT)
        app = net.accept()
        assert_talks(Pair(client, app))
        port = client.getsockname()[1]
        client.close()
        app.close()
        [record] = daemon.wait_log()
        assert record["downstream_remote_address"] == quoted(V6.stranger, port)
        assert record["source_fallback"] == "family"


def test_options_of_haproxy(net: Topology, family: Family) -> None:
    """Its checksum holds (a wrong one would end the connection), its unique id is in our log."""
    net.app(family)
    to = (family.pod_beyond, PORT)
    with (
        Daemon(net.pod, TRUSTING) as daemon,
        sending("haproxy", net.beyond, to, "v2", v2_options="crc32c,unique-id"),
    ):
        client = net.connect_world(family, BALANCER_PORT)
        app = net.accept(family)
        assert app.getpeername()[0] == family.stranger
        port = client.getsockname()[1]
        client.close()
        app.close()
        [record] = daemon.wait_log()
        told = record["proxy_protocol"]
        unique = f"balancer-{family.stranger}-{port}"
        assert bytes.fromhex(told["unique_id"]).decode() == unique
        assert len(told["crc32c"]) == 8


@checkers
def test_health_checks_of_the_balancer(
    net: Topology, family: Family, program: str, version: str
) -> None:
    """They are the balancer's own connections, as v2 says by LOCAL and v1 by the addresses."""
    own: dict[str, object] = {"version": 2, "local": True}
    if version == "v1":
        own = {"version": 1, "destination": quoted(family.pod_beyond, PORT)}
    to = (family.pod_beyond, PORT)
    with (
        Daemon(net.pod, TRUSTING) as daemon,
        greeting(net.app(family)) as peers,
        sending(program, net.beyond, to, version, check="ready") as balancer,
    ):
        wait_for(lambda: len(daemon.log()) >= 3, "three health checks")
        for record in daemon.log():
            assert record["proxy_protocol"] == own
            client = record["downstream_remote_address"]
            assert client == record["downstream_direct_remote_address"]
            assert host_of(client) == family.beyond
            assert record["bytes_sent"] == len("ready")
        assert set(peers) == {family.beyond}
        # The balancer, for its part, is content: it would send nobody to a dead server.
        client = net.connect_world(family, BALANCER_PORT)
        assert receive(client, 5) == b"ready"
        assert set(peers) == {family.beyond, family.stranger}
        assert not [line for line in balancer.said() if "DOWN" in line]


def host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")
