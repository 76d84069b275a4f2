"""Connections that are made on this host, to elsewhere, taken by nat; the proxy's own are not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time

import pytest
from lib.daemon import Daemon, tproxyd
from lib.netns import Namespace
from lib.processes import is_gone
from lib.programs import quoted
from lib.streams import (
    Receiving,
    Sending,
    assert_talks,
    pattern,
    receive_to_end,
    reset,
    was_reset,
)
from lib.topology import PORT, V6, Family, Pair, Topology, seen_port
from lib.waits import stays, wait_for

LISTENER = 15001
OTHER_PORT = 81
NOBODY = 65_534

_libc = ctypes.CDLL(None)


def outbound(selectors: str = "", **options: object) -> str:
    lines = [
        "[[listener]]",
        'name = "outbound"',
        f"port = {LISTENER}",
        f'intercept = {{ scope = "outbound"{selectors and ", "}{selectors} }}',
        *(f"{key} = {value!r}" for key, value in options.items()),
    ]
    return "\n".join(lines) + "\n"


def serve(net: Topology, family: Family, port: int = PORT) -> socket.socket:
    return net.keep(net.beyond.listen(family.beyond, port))


def out(net: Topology, server: socket.socket) -> Pair:
    """A connection that a program in the pod makes to `server`."""
    client = net.keep(net.pod.connect(*server.getsockname()[:2]))
    return Pair(client, net.keep(server.accept()[0]))


def end(pair: Pair) -> None:
    """In order."""
    pair.client.close()
    assert pair.app.recv(1) == b""
    pair.app.close()


def was_taken(pair: Pair) -> bool:
    """Whether it goes through the daemon: then both ends disagree on the port."""
    assert_talks(pair)
    assert pair.app.getpeername()[0] == pair.client.getsockname()[0]
    return bool(pair.app.getpeername() != pair.client.getsockname())


def connect_and_end(namespace: Namespace, host: str, port: int = PORT) -> None:
    """A connection that the daemon ends at once, before or after connect() returns."""
    with contextlib.suppress(ConnectionResetError), namespace.connect(host, port) as client:
        assert client.recv(1) == b""


# Who is seen, and who is not caught -------------------------------------------------------------


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_the_server_sees_this_host(net: Topology, family: Family, source: str) -> None:
    server = serve(net, family)
    before = net.pod.dump()
    with Daemon(net.pod, outbound(source=source)) as daemon:
        pair = out(net, server)
        assert was_taken(pair)
        seen = pair.app.getpeername()[:2]
        name = pair.client.getsockname()[:2]
        assert seen[0] == family.pod_beyond
        assert pair.client.getpeername()[:2] == (family.beyond, PORT)
        end(pair)
        [record] = daemon.wait_log()
        assert daemon.stop() == 0
    assert record["listener"] == "outbound"
    assert record["downstream_remote_address"] == quoted(*name)
    assert record["downstream_local_address"] == quoted(family.beyond, PORT)
    assert record["upstream_host"] == quoted(family.beyond, PORT)
    assert record["upstream_local_address"] == quoted(*seen)
    assert record["close_reason"] == "downstream_fin"
    assert net.pod.dump() == before


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_the_proxy_does_not_catch_itself(net: Topology, family: Family, source: str) -> None:
    """One connection, one record."""
    server = serve(net, family)
    with Daemon(net.pod, outbound(source=source)) as daemon:
        for _ in range(10):
            pair = out(net, server)
            assert was_taken(pair)
            end(pair)
        records = daemon.wait_log(10)
        assert daemon.metric("tproxyd_connections_active") == 0
    assert {record["close_reason"] for record in records} == {"downstream_fin"}


@pytest.mark.parametrize("source", ["client", "proxy"])
def test_nor_its_gateway(net: Topology, family: Family, source: str) -> None:
    """What an ordinary listener of the same daemon connects is its own too, and so are checks.

    Its clients come to it, though a sidecar's listener takes every port.
    """
    gateway = f"""[[listener]]
name = "web"
bind = "*"
port = 8000
upstream = ["{quoted(family.beyond, PORT)}"]
source = "{source}"
health_check = {{ interval_s = 0.1 }}
"""
    server = serve(net, family)
    with Daemon(net.pod, gateway + outbound() + "[[listener]]\n") as daemon:
        with server.accept()[0] as check:
            assert check.recv(1) == b""
        client = net.connect(family, 8000)
        with client:
            client.sendall(b"hello")

            def asks() -> socket.socket | None:
                accepted = net.keep(server.accept()[0])
                if accepted.recv(5) == b"hello":
                    return accepted
                accepted.close()
                return None

            app = wait_for(asks, "the gateway's connection among the checks")
            assert app
            expected = family.client if source == "client" else family.pod_beyond
            assert app.getpeername()[0] == expected
            assert_talks(Pair(client, app))
        app.close()
        [record] = daemon.wait_log()
        assert record["listener"] == "web"
        for counter in ("total", "active"):
            assert daemon.metric(f"tproxyd_connections_{counter}", listener="outbound") == 0


@pytest.mark.parametrize("via", ["tproxy", "redirect"])
@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_with_a_sidecar(net: Topology, family: Family, return_path: str, via: str) -> None:
    """In and out of one pod: each connection belongs to one listener, once."""
    config = f"""[rules]
return_path = "{return_path}"
[[listener]]
name = "inbound"
port = 15006
intercept = {{ via = "{via}" }}
{outbound()}"""
    server = serve(net, family)
    with Daemon(net.pod, config) as daemon:
        inward = net.pair(family)
        assert was_taken(inward)
        outward = out(net, server)
        assert was_taken(outward)
        for name in ("inbound", "outbound"):
            assert daemon.metric("tproxyd_connections_active", listener=name) == 1
        assert_talks(inward)
        end(inward)
        end(outward)
        records = daemon.wait_log(2)
    # By listener: two workers promise no order.
    assert {r["listener"]: r["downstream_local_address"] for r in records} == {
        "inbound": quoted(family.pod, PORT),
        "outbound": quoted(family.beyond, PORT),
    }


def test_ports_of_programs_here(net: Topology, family: Family) -> None:
    """What we show for p may be the port of another program's connection to the same server.

    While that lives another port is found; when it has ended it is in nobody's way, though nat
    remembers it for minutes.
    """
    server = serve(net, family)

    def pair_from(port: int) -> Pair:
        client = net.keep(net.pod.connect(family.beyond, PORT, source_port=port))
        return Pair(client, net.keep(server.accept()[0]))

    with Daemon(net.pod, outbound()) as daemon:
        first = pair_from(seen_port(40_000))
        second = pair_from(40_000)
        assert second.app.getpeername()[1] not in (40_000, seen_port(40_000))
        assert_talks(first)
        assert_talks(second)
        assert daemon.metric("tproxyd_source_port_retries_total", cause="not_available") == 1
        for client, app in (first, second):
            app.close()
            assert client.recv(1) == b""
            client.close()
        daemon.wait_log(2)
        third = pair_from(40_000)
        assert third.app.getpeername()[:2] == (family.pod_beyond, seen_port(40_000))
        assert_talks(third)


# What is taken ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ("", True),
        ("ports = [80]", True),
        ("ports = [81]", False),
        ('exclude_ports = ["80-90"]', False),
        ("exclude_ports = [81]", True),
        ('destinations = ["10.9.2.0/24", "fd00:9:2::/64"]', True),
        ('destinations = ["10.9.1.0/24", "fd00:9:1::/64"]', False),
        ('exclude_destinations = ["10.9.2.2", "fd00:9:2::2"]', False),
        ('exclude_destinations = ["10.9.1.0/24", "fd00:9:1::/64"]', True),
        ('sources = ["10.9.2.1", "fd00:9:2::1"]', True),
        ('sources = ["10.9.1.1", "fd00:9:1::1"]', False),
        ("exclude_uids = [0]", False),
        ("exclude_gids = [0]", False),
        ("exclude_uids = [1, 2, 65534]", True),
        ("exclude_gids = [1, 2, 65534]", True),
    ],
)
def test_selectors(net: Topology, family: Family, selectors: str, expected: bool) -> None:
    server = serve(net, family)
    with Daemon(net.pod, outbound(selectors)) as daemon:
        assert was_taken(out(net, server)) == expected
        assert daemon.metric("tproxyd_connections_active") == expected
        assert daemon.log() == []


def out_as(net: Topology, server: socket.socket, uid: int, gid: int) -> Pair:
    """A connection of another user: the socket's owner is whoever made it."""

    def make() -> socket.socket:
        # Of this one thread, as the kernel asks for at the making of a file.
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)
        try:
            return socket.socket(server.family)
        finally:
            _libc.setfsuid(0)
            _libc.setfsgid(0)

    client = net.keep(net.pod.inside(make))
    client.settimeout(10)
    client.connect(server.getsockname())
    return Pair(client, net.keep(server.accept()[0]))


def test_owners(net: Topology, family: Family) -> None:
    """Either excludes: the user or the group."""
    server = serve(net, family)
    with Daemon(net.pod, outbound("exclude_uids = [1337, 65534], exclude_gids = [1337]")):
        assert was_taken(out_as(net, server, 0, 0))
        assert was_taken(out_as(net, server, 1000, NOBODY))
        assert not was_taken(out_as(net, server, NOBODY, 1000))
        assert not was_taken(out_as(net, server, 1337, 1000))
        assert not was_taken(out_as(net, server, 1000, 1337))


def test_what_stays_on_this_host(net: Topology, family: Family) -> None:
    """Loopback and the pod's own addresses are not elsewhere."""
    net.beyond  # noqa: B018  its pod-side address exists from now on
    net.app(family)
    loopback = "::1" if family is V6 else "127.0.0.1"
    with Daemon(net.pod, outbound()) as daemon:
        for host in (loopback, family.pod, family.pod_beyond):
            client = net.keep(net.pod.connect(host, PORT))
            assert not was_taken(Pair(client, net.accept(family)))
        assert daemon.metric("tproxyd_connections_active") == 0


def test_what_comes_from_elsewhere(net: Topology, family: Family) -> None:
    """To this host, or through it: nobody made it here."""
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    server = serve(net, family)
    with Daemon(net.pod, outbound()) as daemon:
        assert not was_taken(net.pair(family))
        client = net.keep(net.client.connect(family.beyond, PORT))
        assert not was_taken(Pair(client, net.keep(server.accept()[0])))
        assert daemon.metric("tproxyd_connections_active") == 0


def test_a_connection_to_the_listener_itself(net: Topology, family: Family) -> None:
    loopback = "::1" if family is V6 else "127.0.0.1"
    with Daemon(net.pod, outbound()) as daemon:
        connect_and_end(net.pod, loopback, LISTENER)
        assert daemon.wait_log()[0]["close_reason"] == "loop"
        with pytest.raises(ConnectionRefusedError):  # it is there for this host only
            net.client.connect(family.pod, LISTENER)


def test_the_port_of_the_listener_on_another_host(net: Topology, family: Family) -> None:
    with Daemon(net.pod, outbound()):
        assert was_taken(out(net, serve(net, family, LISTENER)))


# Its bytes and its end --------------------------------------------------------------------------


def test_both_directions_to_their_ends(net: Topology, family: Family) -> None:
    data = pattern(4 << 20)
    server = serve(net, family)
    with Daemon(net.pod, outbound()) as daemon:
        pair = out(net, server)
        there, into_server = Sending(pair.client, data), Receiving(pair.app)
        assert into_server.result() == data
        there.assert_done()
        back = Sending(pair.app, data[::-1])
        assert receive_to_end(pair.client) == data[::-1]
        back.assert_done()
        [record] = daemon.wait_log()
    assert (record["bytes_received"], record["bytes_sent"]) == (len(data), len(data))


@pytest.mark.parametrize("who", ["downstream", "upstream"])
def test_a_reset_is_passed_on(net: Topology, family: Family, who: str) -> None:
    server = serve(net, family)
    with Daemon(net.pod, outbound()) as daemon:
        pair = out(net, server)
        assert_talks(pair)
        gone, left = pair if who == "downstream" else Pair(pair.app, pair.client)
        reset(gone)
        assert was_reset(left)
        assert daemon.wait_log()[0]["close_reason"] == f"{who}_reset"


def test_the_server_refuses(net: Topology, family: Family) -> None:
    net.beyond  # noqa: B018  it is there, and nobody listens
    with Daemon(net.pod, outbound()) as daemon:
        connect_and_end(net.pod, family.beyond)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "upstream_refused"
    assert record["duration"] < 1000


def test_the_server_is_a_black_hole(net: Topology, family: Family) -> None:
    net.beyond.nft(
        "table inet hole { chain input { type filter hook input priority 0; "
        "tcp dport 80 drop\n }\n }\n"
    )
    with Daemon(net.pod, outbound(connect_timeout_s=0.5)) as daemon:
        connect_and_end(net.pod, family.beyond)
        [record] = daemon.wait_log()
    assert record["close_reason"] == "upstream_timeout"
    assert 450 <= record["duration"] < 2000


# Starting and stopping --------------------------------------------------------------------------


def test_an_older_connection_lives_on(net: Topology, family: Family) -> None:
    server = serve(net, family)
    old = out(net, server)
    with Daemon(net.pod, outbound()) as daemon:
        assert_talks(old)
        new = out(net, server)
        assert was_taken(new)
        assert not was_taken(old)
        end(new)
        assert daemon.stop() == 0
    assert_talks(old)


def test_stop(net: Topology, family: Family) -> None:
    """What lives needs its translation until it ends; what is new goes out directly."""
    server = serve(net, family)
    before = net.pod.dump()
    with Daemon(net.pod, outbound()) as daemon:
        pair = out(net, server)
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: daemon.has_notified("STOPPING=1"), "STOPPING=1")

        def is_direct() -> bool:
            try:
                client = net.pod.connect(family.beyond, PORT)
            except (ConnectionRefusedError, ConnectionResetError):
                return False
            with client, server.accept()[0] as app:
                return bool(app.getpeername() == client.getsockname())

        wait_for(is_direct, "the end of interception")

        def talks() -> bool:
            assert_talks(pair)
            return True

        stays(talks, "the connection", 1.5)
        end(pair)
        assert daemon.process.wait(10) == 0
    assert net.pod.dump() == before


def test_nobody_listens(net: Topology, family: Family) -> None:
    """The daemon is killed: programs here are refused at once, until `clean` lets them pass."""
    server = serve(net, family)
    before = net.pod.dump()
    with Daemon(net.pod, outbound()) as daemon:
        workers = daemon.workers()
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        wait_for(lambda: all(map(is_gone, workers)), "the workers to follow their supervisor")
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        net.pod.connect(family.beyond, PORT)
    assert time.monotonic() - began < 0.5
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before
    assert not was_taken(out(net, server))
