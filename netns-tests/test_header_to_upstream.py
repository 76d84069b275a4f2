"""PROXY headers that we send, read by the programs that people have: nginx, HAProxy, Envoy."""

from __future__ import annotations

import struct

import pytest
from lib.daemon import Daemon
from lib.headers import V2_LOCAL, v1, v2
from lib.servers import serving
from lib.streams import receive, receive_to_end
from lib.topology import PORT, Family, Topology

REQUEST = b"GET / HTTP/1.0\r\n\r\n"
TRUSTING = """
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "optional"
"""

readers = pytest.mark.parametrize("program", ["haproxy", "envoy"])


def sending(kind: str, tlvs: str = "") -> str:
    return f'[[listener]]\nsend_proxy = "{kind}"\n{tlvs}\n{TRUSTING}'


@pytest.mark.parametrize("program", ["nginx", "haproxy", "envoy"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_client_in_the_log_of_the_application(
    net: Topology, family: Family, program: str, kind: str
) -> None:
    with serving(program, net.pod) as server, Daemon(net.pod, sending(kind)) as daemon:
        client = net.connect(family)
        port = client.getsockname()[1]
        client.sendall(REQUEST)
        assert program.encode() in receive_to_end(client)
        assert server.saw().startswith(f"{family.client}:{port} to {family.pod}:{PORT}")
        client.close()
        [record] = daemon.wait_log()
        assert record["upstream_proxy_protocol"] == {"version": int(kind[1])}
        assert record["bytes_received"] == len(REQUEST)


@readers
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("make", [v1, v2])
def test_a_client_named_by_a_balancer_is_named_again(
    net: Topology, family: Family, program: str, kind: str, make: object
) -> None:
    assert callable(make)
    with serving(program, net.pod) as server, Daemon(net.pod, sending(kind)):
        client = net.connect(family)
        client.sendall(make(family.stranger, family.pod, 40_000, 443) + REQUEST)
        assert program.encode() in receive_to_end(client)
        assert server.saw().startswith(f"{family.stranger}:40000 to {family.pod}:443")


@readers
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_an_ipv6_client_before_an_ipv4_destination(net: Topology, program: str, kind: str) -> None:
    """One header cannot hold both families: the IPv4 address is written as a mapped one."""
    with serving(program, net.pod) as server, Daemon(net.pod, sending(kind)):
        client = net.connect()
        client.sendall(v1("2001:db8:6a::34", "::ffff:10.9.1.1") + REQUEST)
        assert program.encode() in receive_to_end(client)
        assert server.saw().startswith("2001:db8:6a::34:40000 to ::ffff:10.9.1.1:80")


@readers
def test_options_with_a_checksum(net: Topology, program: str) -> None:
    """Both say what they got; HAProxy checks the CRC32C, and Envoy at least steps over it."""
    options = "[listener.send_tlvs]\nforward = [0x02]\nunique_id = true\ncrc32c = true"
    authority = struct.pack("!BH", 2, 11) + b"example.org"
    with serving(program, net.pod) as server, Daemon(net.pod, sending("v2", options)) as daemon:
        client = net.connect()
        client.sendall(v2("106.52.131.116", "10.9.1.1", tlvs=authority) + REQUEST)
        assert program.encode() in receive_to_end(client)
        client.close()
        [record] = daemon.wait_log()
        unique = record["upstream_proxy_protocol"]["unique_id"]
        assert len(unique) == 32
        told = f" id {unique.upper()}" if program == "haproxy" else ""
        assert server.saw() == f"106.52.131.116:40000 to 10.9.1.1:80{told} for example.org"


@readers
def test_a_health_check_stays_one(net: Topology, family: Family, program: str) -> None:
    """LOCAL in, LOCAL out: the application takes the connection for what it is."""
    with serving(program, net.pod) as server, Daemon(net.pod, sending("v2")):
        client = net.connect(family)
        client.sendall(V2_LOCAL + REQUEST)
        assert program.encode() in receive_to_end(client)
        assert server.saw().startswith(f"{family.client}:")


def test_an_application_that_speaks_first(net: Topology) -> None:
    """The header does not wait for payload that may never come."""
    net.app()
    with Daemon(net.pod, '[[listener]]\nsend_proxy = "v1"\n'):
        client = net.connect()
        app = net.accept()
        port = client.getsockname()[1]
        header = f"PROXY TCP4 10.9.1.2 10.9.1.1 {port} {PORT}\r\n".encode()
        assert receive(app, len(header)) == header
        app.sendall(b"220 hello")
        assert receive(client, 9) == b"220 hello"
