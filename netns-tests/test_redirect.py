"""Connections to this host taken by nat, which rewrites their destination, instead of by TPROXY.

For where there is no TPROXY, and to compare: as itself the proxy connects from Istio's 127.0.0.6 or
::6, and the application learns nothing of the client; as the client it works by nat too.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time

import pytest
from lib.daemon import Daemon, tproxyd
from lib.headers import v2
from lib.processes import is_gone
from lib.programs import quoted
from lib.streams import (
    Receiving,
    Sending,
    assert_talks,
    pattern,
    receive,
    receive_to_end,
    reset,
    was_reset,
)
from lib.topology import PORT, V6, Family, Pair, Topology, seen_port
from lib.waits import stays, wait_for

LISTENER = 15006


def redirect(selectors: str = "", **options: object) -> str:
    lines = [
        "[[listener]]",
        f'intercept = {{ via = "redirect"{selectors and ", "}{selectors} }}',
        *(f"{key} = {value!r}" for key, value in options.items()),
    ]
    return "\n".join(lines) + "\n"


def proxy_of(family: Family) -> str:
    return "::6" if family is V6 else "127.0.0.6"


def end(pair: Pair) -> None:
    """In order."""
    pair.client.close()
    assert pair.app.recv(1) == b""
    pair.app.close()


def is_taken(net: Topology, family: Family, port: int = PORT) -> bool:
    """Whether a connection goes through the daemon: then both ends disagree on the port."""
    app = net.app(family) if port == PORT else net.keep(net.pod.listen(family.pod, port))
    client = net.connect(family, port)
    accepted = net.keep(app.accept()[0])
    assert_talks(Pair(client, accepted))
    return bool(accepted.getpeername() != client.getsockname())


# What the application sees ----------------------------------------------------------------------


def test_the_proxy_as_with_istio(net: Topology, family: Family) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, redirect(source="proxy") + 'name = "inbound"\n') as daemon:
        assert "tproxy " not in net.pod.run("nft", "list", "ruleset")
        pair = net.pair(family)
        assert_talks(pair)
        seen = pair.app.getpeername()[:2]
        assert seen[0] == proxy_of(family)
        assert pair.app.getsockname()[:2] == (family.pod, PORT)
        name = pair.client.getsockname()[:2]
        end(pair)
        [record] = daemon.wait_log()
        assert daemon.stop() == 0
    assert record["downstream_remote_address"] == quoted(*name)
    assert record["downstream_local_address"] == quoted(family.pod, PORT)
    assert record["upstream_host"] == quoted(family.pod, PORT)
    assert record["upstream_local_address"] == quoted(*seen)
    assert record["close_reason"] == "downstream_fin"
    assert net.pod.dump() == before


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_the_client(net: Topology, family: Family, return_path: str) -> None:
    rules = f'[rules]\nreturn_path = "{return_path}"\n'
    before = net.pod.dump()
    with Daemon(net.pod, rules + redirect()) as daemon:
        assert "tproxy " not in net.pod.run("nft", "list", "ruleset")
        pair = net.pair(family)
        assert_talks(pair)
        host, port = pair.client.getsockname()[:2]
        assert pair.app.getpeername()[:2] == (family.client, seen_port(port))
        end(pair)
        [record] = daemon.wait_log()
        assert daemon.stop() == 0
    assert record["downstream_remote_address"] == quoted(host, port)
    assert record["downstream_local_address"] == quoted(family.pod, PORT)
    assert record["upstream_local_address"] == quoted(family.client, seen_port(port))
    assert net.pod.dump() == before


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_the_original_destination(net: Topology, family: Family, source: str) -> None:
    """Of each connection its own, address and port; also of one from the other side."""
    net.beyond  # noqa: B018  its pod-side address exists from now on
    places = [(host, port) for host in (family.pod, family.pod_beyond) for port in (81, 82)]
    apps = {place: net.keep(net.pod.listen(*place)) for place in places}
    with Daemon(net.pod, redirect(source=source)) as daemon:
        for place in places:
            client = net.keep(net.client.connect(*place))
            app = net.keep(apps[place].accept()[0])
            assert client.getpeername()[:2] == app.getsockname()[:2] == place
            assert_talks(Pair(client, app))
            end(Pair(client, app))
        records = daemon.wait_log(4)
    assert {record["downstream_local_address"] for record in records} == {
        quoted(*place) for place in places
    }


def test_the_client_that_a_header_names(net: Topology, family: Family) -> None:
    config = f"""{redirect()}
[[listener.proxy_protocol]]
from = ["{family.client}"]
policy = "require"
"""
    net.app(family)
    with Daemon(net.pod, config):
        client = net.connect(family)
        client.sendall(v2(family.stranger, family.pod, 40_000) + b"hello")
        app = net.accept(family)
        assert app.getpeername()[:2] == (family.stranger, seen_port(40_000))
        assert receive(app, 5) == b"hello"
        assert_talks(Pair(client, app))


# Its bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_both_directions_to_their_ends(net: Topology, family: Family, source: str) -> None:
    data = pattern(4 << 20)
    with Daemon(net.pod, redirect(source=source)) as daemon:
        pair = net.pair(family)
        there, into_app = Sending(pair.client, data), Receiving(pair.app)
        assert into_app.result() == data
        there.assert_done()
        back = Sending(pair.app, data[::-1])
        assert receive_to_end(pair.client) == data[::-1]
        back.assert_done()
        [record] = daemon.wait_log()
    assert (record["bytes_received"], record["bytes_sent"]) == (len(data), len(data))


@pytest.mark.parametrize("source", ["client", "proxy"])
@pytest.mark.parametrize("who", ["downstream", "upstream"])
def test_a_reset_is_passed_on(net: Topology, family: Family, who: str, source: str) -> None:
    with Daemon(net.pod, redirect(source=source)) as daemon:
        pair = net.pair(family)
        assert_talks(pair)
        gone, left = pair if who == "downstream" else Pair(pair.app, pair.client)
        reset(gone)
        assert was_reset(left)
        assert daemon.wait_log()[0]["close_reason"] == f"{who}_reset"


# What is taken ----------------------------------------------------------------------------------


def test_excluded_ports(net: Topology, family: Family) -> None:
    with Daemon(net.pod, redirect("exclude_ports = [81]")) as daemon:
        assert is_taken(net, family)
        assert not is_taken(net, family, 81)
        assert daemon.metric("tproxyd_connections_active") == 1


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ("ports = [80]", True),
        ("ports = [81]", False),
        ('interfaces = ["p0"]', True),
        ('interfaces = ["p1"]', False),
        ('sources = ["10.9.1.2", "fd00:9:1::2"]', True),
        ('sources = ["10.9.2.0/24", "fd00:9:2::/64"]', False),
        ('destinations = ["10.9.1.1", "fd00:9:1::1"]', True),
        ('destinations = ["10.9.2.1", "fd00:9:2::1"]', False),
        ('exclude_destinations = ["10.9.1.0/24", "fd00:9:1::/64"]', False),
    ],
)
def test_selectors(net: Topology, family: Family, selectors: str, expected: bool) -> None:
    with Daemon(net.pod, redirect(selectors)) as daemon:
        assert is_taken(net, family) == expected
        assert daemon.metric("tproxyd_connections_active") == expected


def test_forwarded_traffic_is_not_taken(net: Topology, family: Family) -> None:
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    server = net.keep(net.beyond.listen(family.beyond, PORT))
    with Daemon(net.pod, redirect()) as daemon:
        client = net.keep(net.client.connect(family.beyond, PORT))
        accepted = net.keep(server.accept()[0])
        assert accepted.getpeername() == client.getsockname()
        assert_talks(Pair(client, accepted))
        assert daemon.metric("tproxyd_connections_active") == 0


def test_beside_tproxy(net: Topology, family: Family) -> None:
    """Two listeners, two ways: each has its own connections, whichever comes first."""
    by_nat = redirect("ports = [80, 8080]", name="nat", port=15007)
    other = '[[listener]]\nname = "rest"\n'
    web = '[[listener]]\nname = "web"\nintercept.ports = [80]\n'
    for config in (by_nat + other, web + by_nat):
        with Daemon(net.pod, config) as daemon:
            assert is_taken(net, family)
            first = "nat" if config.startswith(by_nat) else "web"
            assert daemon.metric("tproxyd_connections_active", listener=first) == 1
            assert daemon.metric("tproxyd_connections_active") == 1


def test_a_connection_to_the_listener_itself(net: Topology, family: Family) -> None:
    with Daemon(net.pod, redirect("ports = [80]")) as daemon:
        net.connect_and_end(family, LISTENER)
        assert daemon.wait_log()[0]["close_reason"] == "loop"
    with Daemon(net.pod, redirect()) as daemon:  # redirected to where it goes anyway
        net.connect_and_end(family, LISTENER)
        assert daemon.wait_log()[0]["close_reason"] == "loop"


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_we_would_show_anothers_port(net: Topology, family: Family, return_path: str) -> None:
    """A client with a NAT in front is at q already, which we show for p: another is found."""
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n' + redirect()) as daemon:
        net.app(family)
        first = Pair(net.connect(family, source_port=seen_port(40_000)), net.accept(family))
        second = Pair(net.connect(family, source_port=40_000), net.accept(family))
        assert_talks(second)
        assert_talks(first)
        assert second.app.getpeername()[0] == family.client
        assert second.app.getpeername()[1] not in (40_000, seen_port(40_000))
        assert daemon.metric("tproxyd_source_port_retries_total", cause="live_downstream") == 1


@pytest.mark.parametrize("first_to_close", ["client", "app"])
def test_a_port_that_was_used_a_moment_ago(
    net: Topology, family: Family, first_to_close: str
) -> None:
    """Nat remembers an ended connection for minutes: it is in nobody's way."""
    net.app(family)
    with Daemon(net.pod, redirect()) as daemon:
        old = Pair(net.connect(family, source_port=seen_port(40_000)), net.accept(family))
        one, other = old if first_to_close == "client" else Pair(old.app, old.client)
        one.close()
        assert other.recv(1) == b""
        other.close()
        daemon.wait_log()
        new = Pair(net.connect(family, source_port=40_000), net.accept(family))
        assert new.app.getpeername()[:2] == (family.client, seen_port(40_000))
        assert_talks(new)


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_from_a_port_that_is_shown_already(net: Topology, family: Family, return_path: str) -> None:
    """The other order: that 4-tuple is the application's own. The newcomer waits until it ends."""
    net.app(family)
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n' + redirect()):
        first = Pair(net.connect(family, source_port=40_000), net.accept(family))
        assert_talks(first)
        assert first.app.getpeername()[1] == seen_port(40_000)
        newcomer = net.keep(net.client.open_socket(first.client.family))
        newcomer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        newcomer.bind(("", seen_port(40_000)))
        newcomer.setblocking(False)
        assert newcomer.connect_ex((family.pod, PORT)) == errno.EINPROGRESS
        assert_talks(first)
        assert newcomer.connect_ex((family.pod, PORT)) == errno.EALREADY
        end(first)
        wait_for(lambda: newcomer.connect_ex((family.pod, PORT)) in (0, errno.EISCONN), "a retry")
        newcomer.settimeout(5)
        assert_talks(Pair(newcomer, net.accept(family)))


# Starting and stopping --------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_an_older_connection_lives_on(net: Topology, family: Family, source: str) -> None:
    old = net.pair(family)
    with Daemon(net.pod, redirect(source=source)) as daemon:
        assert_talks(old)
        new = net.pair(family)
        assert_talks(new)
        assert_talks(old)
        end(new)
        assert daemon.stop() == 0
    assert_talks(old)


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_stop(net: Topology, family: Family, source: str) -> None:
    """What lives needs its translation until it ends; what is new goes to the application."""
    before = net.pod.dump()
    with Daemon(net.pod, redirect(source=source)) as daemon:
        pair = net.pair(family)
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: daemon.has_notified("STOPPING=1"), "STOPPING=1")

        def is_direct() -> bool:
            try:
                client = net.client.connect(family.pod, PORT)
            except (ConnectionRefusedError, ConnectionResetError):
                return False
            with client, net.accept(family) as app:
                return bool(app.getpeername() == client.getsockname())

        wait_for(is_direct, "the end of interception")

        def talks() -> bool:
            assert_talks(pair)
            return True

        stays(talks, "the connection", 1.5)
        end(pair)
        assert daemon.process.wait(10) == 0
    assert net.pod.dump() == before


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_nobody_listens(net: Topology, family: Family, source: str) -> None:
    """The daemon is killed: a client is refused at once, until `clean` lets it pass."""
    net.app(family)
    before = net.pod.dump()
    with Daemon(net.pod, redirect(source=source)) as daemon:
        workers = daemon.workers()
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        wait_for(lambda: all(map(is_gone, workers)), "the workers to follow their supervisor")
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        net.connect(family)
    assert time.monotonic() - began < 0.5
    assert net.app_saw_nothing(family)
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before
    assert not is_taken(net, family)


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_the_application_refuses(net: Topology, family: Family, source: str) -> None:
    with Daemon(net.pod, redirect(source=source)) as daemon:
        net.connect_and_end(family, 81)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "upstream_refused"
    assert record["upstream_host"] == quoted(family.pod, 81)
    assert record["duration"] < 1000
