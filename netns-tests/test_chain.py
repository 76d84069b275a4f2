"""A client's address through every hop: a balancer, our gateway, our sidecar, the application.

    world            beyond         pod                  client
    the client  ──▶  HAProxy  ──▶   our gateway   ──▶    our sidecar ──▶ the application
                     :8080          :8000                :80

Each hop believes the one before it and nobody else; no host but the balancer has a way to the
client. And what it is all about, in the smallest form: an application behind a gateway.
"""

from __future__ import annotations

import socket

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway, trusting
from lib.headers import v2
from lib.netns import Namespace
from lib.programs import quoted
from lib.senders import BALANCER_PORT, sending
from lib.streams import Sending, assert_talks, pattern, receive_to_end, was_reset
from lib.topology import PORT, Family, Pair, Topology, seen_port

SIDECAR = """
[[listener]]
[[listener.proxy_protocol]]
from = ["{peer}"]
policy = "require"
"""


def host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def application(net: Topology, namespace: Namespace, family: Family) -> socket.socket:
    return net.keep(namespace.listen("::" if ":" in family.client else "0.0.0.0", PORT))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_application_sees_the_client_of_the_balancer(
    net: Topology, family: Family, version: str
) -> None:
    """Whatever version each of the two headers has, both daemons log who was peer, who client."""
    app = application(net, net.client, family)
    tlvs = {"send_tlvs": {"forward": "all"}} if version == "v2" else {}
    trusted = trusting(family.beyond)
    to = quoted(family.client, PORT)
    front = gateway(to, source="proxy", send_proxy=version, proxy_protocol=trusted, **tlvs)
    balancer = sending(
        "haproxy",
        net.beyond,
        (family.pod_beyond, GATEWAY_PORT),
        "v2",
        v2_options="crc32c,unique-id",
    )
    with (
        Daemon(net.client, SIDECAR.format(peer=family.pod)) as sidecar,
        Daemon(net.pod, front) as between,
        balancer,
    ):
        client = net.connect_world(family, BALANCER_PORT)
        port = client.getsockname()[1]
        pair = Pair(client, net.keep(app.accept()[0]))
        assert pair.app.getpeername()[:2] == (family.stranger, seen_port(port))
        assert_talks(pair)
        data = pattern(1 << 20)
        there = Sending(client, data)
        assert receive_to_end(pair.app) == data
        there.assert_done()
        pair.app.close()
        assert receive_to_end(client) == b""

        [first], [second] = between.wait_log(), sidecar.wait_log()
        for record, peer in ((first, family.beyond), (second, family.pod)):
            assert record["downstream_remote_address"] == quoted(family.stranger, port)
            assert host_of(record["downstream_direct_remote_address"]) == peer
            told = record["proxy_protocol"]["destination"]
            assert told == quoted(family.beyond_world, BALANCER_PORT)
            assert record["close_reason"] == "downstream_fin"
            assert (record["bytes_received"], record["bytes_sent"]) == (32 + len(data), 32)
        assert second["downstream_direct_remote_address"] == first["upstream_local_address"]
        assert first["proxy_protocol"]["version"] == 2
        assert first["upstream_proxy_protocol"]["version"] == int(version[1])
        assert second["proxy_protocol"]["version"] == int(version[1])
        unique = f"balancer-{family.stranger}-{port}".encode().hex()
        assert first["proxy_protocol"]["unique_id"] == unique
        assert second["proxy_protocol"].get("unique_id") == (unique if version == "v2" else None)


def test_each_hop_believes_only_the_one_before_it(net: Topology, family: Family) -> None:
    """Who reaches a later hop past the earlier one can claim nothing."""
    app = application(net, net.client, family)
    trusted = trusting(family.beyond)
    to = quoted(family.client, PORT)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    claim = v2(family.stranger, family.pod)
    with (
        Daemon(net.client, SIDECAR.format(peer=family.pod)) as sidecar,
        Daemon(net.pod, gateway(to, send_proxy="v2", proxy_protocol=trusted)) as between,
    ):
        # To the sidecar a header of anybody but the gateway is payload, as is one to the gateway of
        # anybody but the balancer, and then the client is who it is.
        past = net.keep(net.beyond.connect(family.client, PORT))
        past.sendall(claim)
        there = net.keep(app.accept()[0])
        assert there.getpeername()[0] == family.beyond
        past.close()
        assert receive_to_end(there) == claim
        there.close()
        [record] = sidecar.wait_log()
        assert record["proxy_protocol"] is None

        source = net.keep(net.client.connect(family.pod, GATEWAY_PORT))
        source.sendall(claim)
        was_reset(source)  # the sidecar's own address, in a header to the sidecar
        assert sidecar.wait_log(2)[1]["close_reason"] == "client_refused"
        [record] = between.wait_log()
        assert record["proxy_protocol"] is None
        assert host_of(record["downstream_remote_address"]) == family.client


def test_an_application_behind_a_gateway(net: Topology, family: Family) -> None:
    """Without PROXY headers it sees the gateway's address; with them, the client's."""
    app = application(net, net.beyond, family)
    to = quoted(family.beyond, PORT)

    def seen() -> str:
        client = net.connect(family, GATEWAY_PORT)
        pair = Pair(client, net.keep(app.accept()[0]))
        assert_talks(pair)
        return str(pair.app.getpeername()[0])

    with Daemon(net.pod, gateway(to)), Daemon(net.beyond, "[[listener]]\n"):
        assert seen() == family.pod_beyond
    with (
        Daemon(net.pod, gateway(to, send_proxy="v1")),
        Daemon(net.beyond, SIDECAR.format(peer=family.pod_beyond)),
    ):
        assert seen() == family.client
