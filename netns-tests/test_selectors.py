"""What a listener takes: each key of `intercept` has an effect, and all of them together."""

from __future__ import annotations

import pytest
from lib.backends import BACKENDS, dump, rules
from lib.daemon import Daemon, tproxyd
from lib.netns import Namespace
from lib.topology import PORT, V4, V6, Family, Topology


def is_taken(net: Topology, source: Namespace, host: str, port: int = PORT) -> bool:
    """Whether a connection goes through the daemon: then both ends disagree on the port."""
    family = V6 if ":" in host else V4
    app = net.app(family) if port == PORT else net.keep(net.pod.listen("0.0.0.0", port))
    client = net.keep(source.connect(host, port))
    accepted = net.keep(app.accept()[0])
    assert accepted.getpeername()[0] == client.getsockname()[0]
    return bool(accepted.getpeername() != client.getsockname())


def intercepting(selectors: str) -> str:
    return f"[[listener]]\nintercept = {{ {selectors} }}\n"


def test_ports(net: Topology) -> None:
    with Daemon(net.pod, intercepting('ports = [80, "8000-8010"]')):
        taken = {
            port: is_taken(net, net.client, V4.pod, port) for port in (80, 81, 8000, 8010, 8011)
        }
    assert taken == {80: True, 81: False, 8000: True, 8010: True, 8011: False}


def test_exclude_ports(net: Topology) -> None:
    with Daemon(net.pod, intercepting('exclude_ports = [22, "9000-9001"]')):
        ports = (22, 80, 9000, 9001, 9002, 15020)  # giving the list replaces the default one
        taken = {port: is_taken(net, net.client, V4.pod, port) for port in ports}
    assert taken == {22: False, 80: True, 9000: False, 9001: False, 9002: True, 15020: True}


def test_sources(net: Topology, family: Family) -> None:
    with Daemon(net.pod, intercepting('sources = ["10.9.2.0/24", "fd00:9:2::/64"]')):
        assert is_taken(net, net.beyond, family.pod_beyond)
        assert not is_taken(net, net.client, family.pod)


def test_sources_of_one_family_take_nothing_of_the_other(net: Topology) -> None:
    with Daemon(net.pod, intercepting('sources = ["10.9.1.0/24"]')):
        assert is_taken(net, net.client, V4.pod)
        assert not is_taken(net, net.client, V6.pod)


def test_destinations(net: Topology, family: Family) -> None:
    with Daemon(net.pod, intercepting('destinations = ["10.9.2.1", "fd00:9:2::1"]')):
        assert is_taken(net, net.beyond, family.pod_beyond)
        assert is_taken(net, net.client, family.pod_beyond)
        assert not is_taken(net, net.client, family.pod)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_exclusions(net: Topology, backend: str) -> None:
    """More than a line of iptables-restore can hold; what the first listener leaves the second
    may take.
    """
    hosts = ", ".join(f'"10.1.{number}.1"' for number in range(150))
    uids = ", ".join(map(str, range(2000, 2300, 2)))
    config = f"""
        {rules(backend)}
        [[listener]]
        name = "first"
        port = 15001
        intercept = {{ ports = [80, 81], exclude_destinations = [{hosts}, "10.9.2.1"] }}
        [[listener]]
        name = "second"
        port = 15002
        intercept = {{ ports = [81] }}
        [[listener]]
        name = "out"
        port = 15003
        intercept = {{ scope = "outbound", via = "redirect", exclude_uids = [{uids}] }}
        source = "proxy"
        """
    beyond = net.beyond  # a second network of the pod's, from here on
    before = dump(net.pod)
    with Daemon(net.pod, config) as daemon:
        assert is_taken(net, net.client, V4.pod)
        assert not is_taken(net, beyond, V4.pod_beyond)
        assert is_taken(net, beyond, V4.pod_beyond, 81)
        assert is_taken(net, net.client, V6.pod)
        assert daemon.get("/readyz")[0] == 200
    tproxyd(net.pod, "clean")
    assert dump(net.pod) == before


@pytest.mark.parametrize("interfaces", ['["p1"]', '["lo", "x*", "p1*"]'])
def test_interfaces(net: Topology, family: Family, interfaces: str) -> None:
    net.beyond  # noqa: B018  p1 exists from now on
    with Daemon(net.pod, intercepting(f"interfaces = {interfaces}")):
        assert is_taken(net, net.beyond, family.pod_beyond)
        assert not is_taken(net, net.client, family.pod)


def test_all_must_match(net: Topology) -> None:
    net.beyond  # noqa: B018  its pod-side address exists from now on
    selectors = 'ports = [80], sources = ["10.9.1.0/24"], destinations = ["10.9.1.1"]'
    with Daemon(net.pod, intercepting(selectors)):
        assert is_taken(net, net.client, V4.pod)
        assert not is_taken(net, net.client, V4.pod, 81)
        assert not is_taken(net, net.client, V4.pod_beyond)
        assert not is_taken(net, net.beyond, V4.pod)


def test_two_listeners_share_the_host(net: Topology) -> None:
    config = """
[[listener]]
name = "web"
port = 15006
intercept = { ports = [80] }
[[listener]]
name = "rest"
port = 15007
"""
    with Daemon(net.pod, config) as daemon:
        assert is_taken(net, net.client, V4.pod, 80)
        assert is_taken(net, net.client, V4.pod, 81)
        assert daemon.metric("tproxyd_connections_active", listener="web") == 1
        assert daemon.metric("tproxyd_connections_active", listener="rest") == 1
