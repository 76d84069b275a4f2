"""A gateway that has run out of source ports says so at once, and goes on when one is free.

Every upstream has all of the ports of ip_local_port_range for itself: a port is chosen by connect,
which knows the whole tuple (IP_BIND_ADDRESS_NO_PORT, or no bind at all). What is left is that range
times the upstreams, and the ports that wait in TIME_WAIT.
"""

from __future__ import annotations

import contextlib
import select
import time

from lib.daemon import Daemon
from lib.figures import Figure
from lib.gateway import GATEWAY_PORT, at, backend, end, through, to_neighbour
from lib.streams import assert_talks
from lib.topology import V4, Family, Pair, Topology
from lib.waits import wait_for

# 11 ports. Of a range of that size connect would leave one out, now and then: it walks the even and
# the odd ones in as many steps (__inet_hash_connect). So there are twelve, and one is reserved.
FIRST, LAST = 40_000, 40_010
RANGE = (
    f"net.ipv4.ip_local_port_range={FIRST} {LAST + 1}",
    f"net.ipv4.ip_local_reserved_ports={LAST + 1}",
)
PORTS = LAST - FIRST + 1
UPSTREAMS = (80, 81)
TOO_MANY = 20


def test_no_source_port_left(net: Topology, family: Family, figure: Figure) -> None:
    net.pod.run("sysctl", "-qw", *RANGE)
    servers = [backend(net, family, port) for port in UPSTREAMS]
    upstreams = [at(family.beyond, port) for port in UPSTREAMS]
    config = "workers = 1\n" + to_neighbour(family, *upstreams)
    with Daemon(net.pod, config) as daemon:

        def one_more() -> Pair:
            client = net.connect(family, GATEWAY_PORT)
            [server, *_], _, _ = select.select(servers, [], [], 10)
            return Pair(client, net.keep(server.accept()[0]))

        pairs = [one_more() for _ in range(PORTS * len(servers))]
        for server, port in zip(servers, UPSTREAMS, strict=True):
            theirs = [pair.app for pair in pairs if pair.app.getsockname()[1] == port]
            taken = sorted(app.getpeername()[1] for app in theirs)
            assert taken == list(range(FIRST, LAST + 1)), server

        for _ in range(TOO_MANY):
            net.connect_and_end(family, GATEWAY_PORT)
        records = daemon.wait_log(TOO_MANY)
        assert {record["close_reason"] for record in records} == {"no_source_port"}
        for record in records:  # every upstream was asked, and none of them is to blame
            assert {each["upstream"] for each in record["upstreams_failed"]} == set(upstreams)
        assert daemon.metric("tproxyd_upstream_ejections_total") == 0
        for pair in pairs:
            assert_talks(pair)

        free = pairs[::2]
        for pair in free:  # ended by the backend, whose side keeps TIME_WAIT
            pair.app.close()
            assert pair.client.recv(1) == b""
            pair.client.close()
        daemon.wait_log(TOO_MANY + len(free))
        wait_for(lambda: not net.pod.run("ss", "-Htn", "state", "last-ack"), "the last ACKs")
        again = [one_more() for _ in free]
        for pair in (*again, *pairs[1::2]):
            assert_talks(pair)
        slowest = max(record["duration"] for record in records)
    figure(
        f"{len(pairs)} connections from {PORTS} ports to {len(servers)} backends; "
        f"{TOO_MANY} more were told within {slowest} ms; then {len(again)} again"
    )


def test_ports_in_time_wait(net: Topology, figure: Figure) -> None:
    """Where clients end first, ours is the side that waits; net.ipv4.tcp_tw_reuse=1 shortens it."""
    net.pod.run("sysctl", "-qw", *RANGE)
    net.pod.sysctl("net/ipv4/tcp_tw_reuse", 0)
    server = backend(net, V4)
    server.settimeout(0.2)
    with Daemon(net.pod, "workers = 1\n" + to_neighbour(V4)) as daemon:
        for _ in range(PORTS):
            end(through(net, V4, server))
        daemon.wait_log(PORTS)
        net.connect_and_end(V4, GATEWAY_PORT)
        assert daemon.wait_log(PORTS + 1)[-1]["close_reason"] == "no_source_port"

        net.pod.sysctl("net/ipv4/tcp_tw_reuse", 1)
        began = time.monotonic()

        def served() -> Pair | None:
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                client = net.connect(V4, GATEWAY_PORT)
                return Pair(client, net.keep(server.accept()[0]))
            return None

        pair = wait_for(served, "a port that may be used again")
        assert pair is not None
        assert_talks(pair)
        took = time.monotonic() - began
    figure(f"{PORTS} ports in TIME_WAIT; with tcp_tw_reuse=1 one could be used after {took:.1f} s")
