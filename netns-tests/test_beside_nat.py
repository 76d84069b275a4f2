"""Beside the nat rules of others: what they translate comes home, and what they send away goes.

With nft, whose chains can be called behind nat. Those of iptables' mangle are called before it, and
cannot tell (`tproxyd doctor` says so). That a client on this host stays who it is, they can say.
"""

from __future__ import annotations

import pytest
from lib.backends import needs_iptc, rules
from lib.daemon import Daemon
from lib.gateway import backend, end, through, to_neighbour
from lib.streams import assert_talks
from lib.topology import PORT, Family, Pair, Topology, seen_port

PUBLISHED = 8080
LISTENER = 15006


@pytest.fixture
def net(net: Topology) -> Topology:
    """The pod forwards between the client and `beyond`."""
    net.beyond  # noqa: B018  it is there from now on
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    return net


def masquerade(net: Topology) -> None:
    """What leaves toward `beyond` does so in the pod's own name, and nobody answers the client."""
    net.pod.nft(
        """
        table inet others {
            chain postrouting {
                type nat hook postrouting priority srcnat
                oifname "p1" masquerade
            }
        }
        """
    )


def publish(net: Topology, family: Family, to: str) -> None:
    """As Docker and NodePorts do: PUBLISHED of the pod is `to`, for others and for itself.

    At firewalld's priority, which is behind ours: the kernel calls all chains of nat at -100.
    """
    version = "ip" if family.name == "v4" else "ip6"
    rule = f"fib daddr type local tcp dport {PUBLISHED} {to.format(ip=version)}"
    net.pod.nft(
        f"""
        table {version} others {{
            chain prerouting {{
                type nat hook prerouting priority dstnat + 10
                {rule}
            }}
            chain output {{
                type nat hook output priority -90
                {rule}
            }}
        }}
        """
    )


def router(source: str) -> str:
    return (
        f'[[listener]]\nname = "router"\nport = {LISTENER}\nsource = "{source}"\n'
        'intercept = { scope = "forward", ports = [80] }\n'
    )


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_a_router_that_masquerades(net: Topology, family: Family, source: str) -> None:
    """The server sees the router, as without us: its answers are the connection's once nat has
    given them back the client's address.
    """
    masquerade(net)
    server = backend(net, family)
    with Daemon(net.pod, router(source)) as daemon:
        pair = Pair(net.keep(net.client.connect(family.beyond, PORT)), net.keep(server.accept()[0]))
        assert pair.app.getpeername()[0] == family.pod_beyond
        assert_talks(pair)
        end(pair)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "downstream_fin"


def test_what_a_router_cannot_masquerade(net: Topology, family: Family) -> None:
    """With the client's own port both connections are one to connection tracking, which nat has
    seen the first packet of. It fails when a kernel tells them apart: then say so in README.md.
    """
    masquerade(net)
    server = backend(net, family)
    with Daemon(net.pod, router("client-port")):
        client = net.keep(net.client.connect(family.beyond, PORT))
        assert net.keep(server.accept()[0]).getpeername() == client.getsockname()


@pytest.mark.parametrize("source", ["client", "client-port"])
def test_a_gateway_that_masquerades(net: Topology, family: Family, source: str) -> None:
    masquerade(net)
    server = backend(net, family)
    with Daemon(net.pod, to_neighbour(family, source=source)):
        pair = through(net, family, server)
        assert pair.app.getpeername()[0] == family.pod_beyond
        assert_talks(pair)


@pytest.mark.parametrize("path", ["accept-mark", "conntrack"])
def test_a_port_that_is_published_for_another_host(
    net: Topology, family: Family, path: str
) -> None:
    """It is no port of this host, though its address is: forwarded, to whom nat says.

    What the host itself asks of it is answered by another than was asked, until nat has seen the
    answer; to know that takes connection tracking.
    """
    host = family.beyond if family.name == "v4" else f"[{family.beyond}]"
    publish(net, family, f"dnat to {host}:{PORT}")
    server = backend(net, family)
    with Daemon(net.pod, f'[rules]\nreturn_path = "{path}"\n') as daemon:
        for source in (net.client, net.pod) if path == "conntrack" else (net.client,):
            client = net.keep(source.connect(family.pod, PUBLISHED))
            far = net.keep(server.accept()[0])
            assert far.getpeername()[1] == client.getsockname()[1]
            assert_talks(Pair(client, far))
        assert daemon.metric("tproxyd_connections_active") == 0
        assert_talks(net.pair(family))  # while what is for the host itself is taken
        assert daemon.metric("tproxyd_connections_active") == 1


@pytest.mark.parametrize("path", ["accept-mark", "conntrack"])
def test_a_port_that_is_published_for_an_application_here(
    net: Topology, family: Family, path: str
) -> None:
    """Ports are those that nat has made: the application's."""
    publish(net, family, f"redirect to :{PORT}")
    take = f'[[listener]]\nname = "inbound"\nintercept = {{ ports = [{PORT}] }}\n'
    app = net.app(family)
    with Daemon(net.pod, f'[rules]\nreturn_path = "{path}"\n{take}') as daemon:
        client = net.connect(family, PUBLISHED)
        pair = Pair(client, net.keep(app.accept()[0]))
        assert pair.app.getpeername()[:2] == (family.client, seen_port(client.getsockname()[1]))
        assert_talks(pair)
        end(pair)
        [record] = daemon.wait_log()
    assert record["downstream_local_address"] == record["upstream_host"]


@pytest.mark.parametrize("source", ["client", "client-port"])
def test_a_router_of_a_published_port(net: Topology, family: Family, source: str) -> None:
    """Taken by where it goes in the end."""
    host = family.beyond if family.name == "v4" else f"[{family.beyond}]"
    publish(net, family, f"dnat to {host}:{PORT}")
    server = backend(net, family)
    with Daemon(net.pod, router(source)) as daemon:
        pair = Pair(net.connect(family, PUBLISHED), net.keep(server.accept()[0]))
        assert pair.app.getpeername()[0] == family.client
        assert_talks(pair)
        end(pair)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "downstream_fin"


def masquerade_containers(net: Topology, family: Family, made_by: str) -> None:
    """As Docker does: what they send to anywhere but their bridge. The client is one of them."""
    v4 = family.name == "v4"
    network = "10.9.1.0/24" if v4 else "fd00:9:1::/64"
    if made_by == "nft":
        rule = f"{'ip' if v4 else 'ip6'} saddr {network} oifname != docker0 masquerade"
        chain = "type nat hook postrouting priority srcnat"
        net.pod.nft(f"table inet docker {{\nchain post {{\n{chain}\n{rule}\n}}\n}}\n")
        return
    command = made_by if v4 else made_by.replace("iptables", "ip6tables")
    words = f"-t nat -I POSTROUTING -s {network} ! -o docker0 -j MASQUERADE"
    net.pod.run(command, *words.split())


@pytest.mark.parametrize(
    ("ours", "made_by"),
    [
        *(("nft", made_by) for made_by in ("nft", "iptables-nft", "iptables-legacy")),
        ("iptables-nft", "iptables-nft"),
        pytest.param("iptables-legacy", "iptables-legacy", marks=needs_iptc),
    ],
)
def test_clients_that_are_masqueraded(
    net: Topology, family: Family, ours: str, made_by: str
) -> None:
    """The application sees the container, though it is reached through no bridge of Docker's.

    What is not ours is masqueraded as before.
    """
    masquerade_containers(net, family, made_by)
    server = backend(net, family)
    with Daemon(net.pod, f'{rules(ours)}return_path = "conntrack"\n'):
        pair = net.pair(family)
        assert pair.app.getpeername()[0] == family.client
        assert_talks(pair)
        client = net.keep(net.client.connect(family.beyond, PORT))
        forwarded = Pair(client, net.keep(server.accept()[0]))
        assert forwarded.app.getpeername()[0] == family.pod_beyond
        assert_talks(forwarded)
