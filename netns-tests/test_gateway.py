"""An ordinary listener in front of backends on other hosts, which know nothing of PROXY headers.

The client's address arrives there as the source of the connection itself, where the backend's
answers come back through the gateway; or it does not arrive, and the gateway's is seen.
"""

from __future__ import annotations

import select
import socket
from collections import Counter

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, at, backend, end, through, to_neighbour, trusting
from lib.headers import v1
from lib.streams import Receiving, Sending, assert_talks, pattern, receive, was_reset
from lib.topology import V6, Family, Pair, Topology, seen_port


def test_without_anything_the_backend_sees_the_gateway(net: Topology, family: Family) -> None:
    """And the kernel is left alone: an ordinary proxy needs nothing of it."""
    server = backend(net, family)
    before = net.pod.dump()
    with Daemon(net.pod, to_neighbour(family)) as daemon:
        pair = through(net, family, server)
        assert pair.app.getpeername()[0] == family.pod_beyond
        assert_talks(pair)
        assert net.pod.dump() == before
        seen = at(*pair.app.getpeername()[:2])
        end(pair)
        [record] = daemon.wait_log()
        assert record["downstream_remote_address"].startswith(at(family.client, 0)[:-1])
        assert record["upstream_host"] == at(family.beyond)
        assert record["upstream_local_address"] == seen


@pytest.mark.parametrize("rp_filter", [0, 1])
def test_as_the_client(net: Topology, family: Family, rp_filter: int) -> None:
    server = backend(net, family)
    for name in ("all", "p0", "p1"):
        net.pod.sysctl(f"net/ipv4/conf/{name}/rp_filter", rp_filter)
    with Daemon(net.pod, to_neighbour(family, source="client")) as daemon:
        pair = through(net, family, server)
        port = pair.client.getsockname()[1]
        assert pair.app.getpeername()[:2] == (family.client, seen_port(port))
        assert_talks(pair)
        data = pattern(4 << 20)
        for one, other in (pair, Pair(pair.app, pair.client)):
            receiving = Receiving(other)
            Sending(one, data).assert_done()
            assert receiving.result() == data
        [record] = daemon.wait_log()
        asked = record["upstream_local_address_asked"]
        assert asked == record["upstream_local_address"] == at(family.client, seen_port(port))


def test_with_the_clients_own_port(net: Topology, family: Family) -> None:
    server = backend(net, family)
    with Daemon(net.pod, to_neighbour(family, source="client-port")) as daemon:
        pair = through(net, family, server)
        name = pair.client.getsockname()
        assert pair.app.getpeername() == name
        assert_talks(pair)
        end(pair)
        [record] = daemon.wait_log()
        assert record["upstream_local_address"] == at(*name[:2])


def test_the_clients_own_port_where_it_is_not_free(net: Topology, family: Family) -> None:
    """Its last connection to this backend is still in TIME_WAIT there: another port, no failure."""
    server = backend(net, family)
    config = to_neighbour(family, source="client-port")
    config += to_neighbour(family, source="client-port", name="same", port=GATEWAY_PORT + 1)
    with Daemon(net.pod, config) as daemon:
        first = through(net, family, server, source_port=40_000)
        assert first.app.getpeername()[:2] == (family.client, 40_000)
        second = net.connect(family, GATEWAY_PORT + 1, source_port=40_000)
        pair = Pair(second, net.keep(server.accept()[0]))
        assert pair.app.getpeername()[:2] == (family.client, seen_port(40_000))
        assert_talks(pair)
        assert_talks(first)
        end(pair)
        [record] = daemon.wait_log()
        assert record["upstream_local_address_asked"] == at(family.client, 40_000)
        assert record["upstream_local_address"] == at(family.client, seen_port(40_000))
        assert daemon.metric("tproxyd_source_port_retries_total", cause="not_available") == 1


def test_a_backend_that_is_the_client(net: Topology, family: Family) -> None:
    """It would drop what comes from outside in its own name; so it sees the gateway."""
    server = backend(net, family)
    with Daemon(net.pod, to_neighbour(family, source="client")) as daemon:
        client = net.connect_beyond(family, GATEWAY_PORT)
        pair = Pair(client, net.keep(server.accept()[0]))
        assert pair.app.getpeername()[0] == family.pod_beyond
        assert_talks(pair)
        end(pair)
        [record] = daemon.wait_log()
        assert record["source_fallback"] == "hairpin"


def test_answers_that_do_not_come_home(net: Topology, family: Family) -> None:
    """The backend has a way to the client that avoids us: the deadline ends it."""
    backend(net, family)
    net.beyond.ip(f"route add blackhole {family.client}")
    with Daemon(net.pod, to_neighbour(family, source="client", connect_timeout_s=0.5)) as daemon:
        net.connect_and_end(family, GATEWAY_PORT)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "upstream_timeout"
        assert record["upstream_host"] == at(family.beyond)


def test_the_backend_refuses(net: Topology, family: Family) -> None:
    """The RST for a foreign address comes home too: the client hears of it at once."""
    net.beyond.ip("link set lo up")  # it is there, and nobody listens
    with Daemon(net.pod, to_neighbour(family, source="client")) as daemon:
        net.connect_and_end(family, GATEWAY_PORT)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "upstream_refused"
        assert record["duration"] < 1000


def test_a_backend_down_and_another_up(net: Topology, family: Family) -> None:
    server = backend(net, family)
    config = to_neighbour(family, at(family.beyond, 81), at(family.beyond), source="client")
    with Daemon(net.pod, config) as daemon:
        for _ in range(8):
            pair = through(net, family, server)
            assert_talks(pair)
            end(pair)
        records = daemon.wait_log(8)
        assert {record["upstream_host"] for record in records} == {at(family.beyond)}
        failed = [each for record in records for each in record["upstreams_failed"] or ()]
        assert failed
        assert all(each["upstream"] == at(family.beyond, 81) for each in failed)
        assert daemon.metric("tproxyd_upstream_retries_total") == len(failed)


def test_all_are_ejected(net: Topology, family: Family) -> None:
    """Refused at once, and served again by the first that is back."""
    net.beyond.ip("link set lo up")  # it is there, and nobody listens
    config = "workers = 1\n" + to_neighbour(family, eject_after=2, eject_s=60.0)
    with Daemon(net.pod, config) as daemon:
        for _ in range(3):
            net.connect_and_end(family, GATEWAY_PORT)
        records = daemon.wait_log(3)
        ends = [(record["close_reason"], record["response_flags"]) for record in records]
        assert ends == [("upstream_refused", "UF")] * 3
        assert daemon.metric("tproxyd_upstream_ejections_total", listener="web") == 1
        assert "left out for 60 s" in daemon.stderr
        server = backend(net, family)

        assert_talks(through(net, family, server))
        assert "takes connections again" in daemon.stderr


def test_a_backend_that_is_black_holed(net: Topology, family: Family) -> None:
    """It costs one connect_timeout_s, then the next one is tried."""
    server = backend(net, family)
    net.pod.nft(
        "table inet hole { chain output { type filter hook output priority 0; "
        "tcp dport 81 drop\n }\n }\n"
    )
    config = to_neighbour(
        family, at(family.beyond, 81), at(family.beyond), connect_timeout_s=0.3, eject_after=1
    )
    with Daemon(net.pod, "workers = 1\n" + config) as daemon:
        for _ in range(2):
            pair = through(net, family, server)
            assert_talks(pair)
            end(pair)
        first, second = daemon.wait_log(2)
        assert first["upstreams_failed"][0]["why"].endswith("Connection timed out")
        assert first["duration"] >= 300
        assert second["upstreams_failed"] is None  # it is ejected


def test_whom_the_backends_turn_away_takes_them_from_nobody(net: Topology, family: Family) -> None:
    """They see the clients' addresses, and have a firewall that drops what comes from one."""
    v6 = family is V6
    banned, sound = ("2001:db8::66", "2001:db8::7") if v6 else ("198.51.100.66", "198.51.100.7")
    servers = [backend(net, family, port) for port in (81, 82)]
    net.beyond.nft(
        "table inet wall { chain input { type filter hook input priority 0; "
        f"{'ip6' if v6 else 'ip'} saddr {banned} drop\n }}\n }}\n"
    )
    config = to_neighbour(
        family,
        at(family.beyond, 81),
        at(family.beyond, 82),
        **{"source": "client", "connect_timeout_s": 0.2, "eject_after": 2},
        proxy_protocol=trusting(family.client),
    )

    def connect(client: str) -> socket.socket:
        sock = net.connect(family, GATEWAY_PORT)
        sock.sendall(v1(client, family.pod) + b"hello")
        return sock

    rounds, crowd = 5, 3
    with Daemon(net.pod, "workers = 1\n" + config) as daemon:
        for done in range(rounds):
            with connect(sound):
                ready, _, _ = select.select(servers, (), (), 10)
                app = net.keep(ready[0].accept()[0])
                assert app.getpeername()[0] == sound
                assert receive(app, 5) == b"hello"
            app.close()
            for sock in [connect(banned) for _ in range(crowd)]:
                assert was_reset(sock)
            records = daemon.wait_log((done + 1) * (1 + crowd))
        ends = Counter(record["close_reason"] for record in records)
        assert ends["upstream_timeout"] == rounds * crowd
        assert daemon.metric("tproxyd_upstream_ejections_total", listener="web") == 0
