"""PROXY headers of our gateway, read by the servers that people have behind one.

A client in `world` reaches the gateway in `beyond`, which sends its bytes on to nginx, HAProxy or
Envoy in the pod. There is no way from the pod to the client: the header is all the server has.
"""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway, trusting
from lib.headers import v1, v2
from lib.programs import quoted
from lib.servers import Server, serving
from lib.streams import receive, receive_to_end, was_reset
from lib.topology import PORT, V4, V6, Family, Topology

REQUEST = b"GET / HTTP/1.0\r\n\r\n"

servers = pytest.mark.parametrize("program", ["nginx", "haproxy", "envoy"])
versions = pytest.mark.parametrize("version", ["v1", "v2"])


def asks(net: Topology, family: Family, program: str, server: Server) -> int:
    """A client's request is answered, and the server's log names the client; its port."""
    client = net.connect_world(family, GATEWAY_PORT)
    port: int = client.getsockname()[1]
    client.sendall(REQUEST)
    assert program.encode() in receive_to_end(client)
    client.close()
    there = f"{family.beyond_world}:{GATEWAY_PORT}"
    assert server.saw().startswith(f"{family.stranger}:{port} to {there}")
    return port


@servers
@versions
def test_the_client_in_the_log_of_the_server(
    net: Topology, family: Family, program: str, version: str
) -> None:
    config = gateway(quoted(family.pod_beyond, PORT), source="proxy", send_proxy=version)
    with serving(program, net.pod) as server, Daemon(net.beyond, config) as daemon:
        port = asks(net, family, program, server)
        [record] = daemon.wait_log()
        assert record["downstream_remote_address"] == quoted(family.stranger, port)
        assert record["upstream_host"] == quoted(family.pod_beyond, PORT)
        assert record["upstream_local_address"].startswith(quoted(family.beyond, 0)[:-1])
        assert record["upstream_proxy_protocol"] == {"version": int(version[1])}
        assert record["bytes_received"] == len(REQUEST)


@servers
@versions
@pytest.mark.parametrize(("client", "server"), [(V4, V6), (V6, V4)], ids=["4to6", "6to4"])
def test_a_client_of_the_other_family(
    net: Topology, client: Family, server: Family, program: str, version: str
) -> None:
    """The header is about the client's connection, whatever ours is made of."""
    config = gateway(quoted(server.pod_beyond, PORT), source="proxy", send_proxy=version)
    with serving(program, net.pod) as process, Daemon(net.beyond, config) as daemon:
        asks(net, client, program, process)
        [record] = daemon.wait_log()
        assert record["upstream_local_address"].startswith(quoted(server.beyond, 0)[:-1])


@versions
def test_one_that_speaks_as_the_client_and_of_it(
    net: Topology, family: Family, version: str
) -> None:
    """source = "client" and send_proxy together: both tell the same."""
    config = gateway(quoted(family.pod_beyond, PORT), source="client", send_proxy=version)
    with Daemon(net.beyond, config) as daemon, serving("haproxy", net.pod) as server:
        net.pod.ip(f"route add {family.stranger} via {family.beyond}")
        asks(net, family, "haproxy", server)
        [record] = daemon.wait_log()
        assert record["upstream_local_address"].startswith(quoted(family.stranger, 0)[:-1])


def test_a_header_that_is_longer_than_the_cap(net: Topology, family: Family) -> None:
    """The upstream never hears of it, and one that is just as long passes."""
    server = net.app(family)
    tlv = b"\xea" + (400).to_bytes(2) + bytes(400)
    fits = v2(family.stranger, family.beyond_world, tlvs=tlv)
    config = gateway(
        quoted(family.pod_beyond, PORT),
        send_proxy="v1",
        max_header_bytes=len(fits),
        proxy_protocol=trusting(family.stranger),
    )
    with Daemon(net.beyond, config) as daemon:
        longer = v2(family.stranger, family.beyond_world, tlvs=tlv + b"\xeb\x00\x00")
        client = net.connect_world(family, GATEWAY_PORT)
        client.sendall(longer + REQUEST)
        was_reset(client)
        [record] = daemon.wait_log()
        assert (record["close_reason"], record["response_flags"]) == ("header_invalid", "DPE")
        assert record["upstream_host"] is None
        assert net.app_saw_nothing(family)
        assert daemon.metric("tproxyd_proxy_headers_total", result="invalid", version="2") == 1

        client = net.connect_world(family, GATEWAY_PORT)
        client.sendall(fits + REQUEST)
        there = net.keep(server.accept()[0])
        told = v1(family.stranger, family.beyond_world)
        assert receive(there, len(told + REQUEST)) == told + REQUEST


def test_a_header_of_the_clients_own_is_payload(net: Topology, family: Family) -> None:
    """Who is not trusted is not asked: what it sends goes behind the header that we make."""
    server = net.app(family)
    config = gateway(quoted(family.pod_beyond, PORT), send_proxy="v2")
    with Daemon(net.beyond, config):
        client = net.connect_world(family, GATEWAY_PORT)
        port = client.getsockname()[1]
        claim = v2("198.51.100.7", "198.51.100.8")
        client.sendall(claim)
        client.close()
        ours = v2(family.stranger, family.beyond_world, port, GATEWAY_PORT)
        assert receive_to_end(net.keep(server.accept()[0])) == ours + claim
