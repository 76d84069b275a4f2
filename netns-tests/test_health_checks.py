"""Active health checks: what they say to the backend, and what clients get of what they find."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway
from lib.programs import quoted
from lib.servers import greeting, serving
from lib.streams import receive_to_end
from lib.topology import PORT, V4, Family, Topology
from lib.waits import wait_for

# An idle address is seen to be down after 20 to 40 ms, and to be up again after as many.
OFTEN = {"interval_s": 0.02, "timeout_s": 1.0, "rise": 2, "fall": 2}
OTHER_PORT = 81
SIDECAR = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.2.2", "fd00:9:2::2"]
policy = "require"
"""

versions = pytest.mark.parametrize("version", ["v1", "v2"])


@pytest.mark.parametrize("program", ["nginx", "haproxy", "envoy"])
@versions
def test_servers_that_require_a_header_have_nothing_to_say_against_them(
    net: Topology, family: Family, program: str, version: str
) -> None:
    config = gateway(quoted(family.pod_beyond, PORT), send_proxy=version, health_check=OFTEN)
    with serving(program, net.pod) as server, Daemon(net.beyond, config) as daemon:
        wait_for(lambda: server.silent() >= 5, "five checks")
        assert server.complaints() == []
        assert addresses(daemon) == {quoted(family.pod_beyond, PORT): ("up", "")}
        if program == "haproxy":  # the only one that says who came without asking for anything
            to = f" to {family.pod_beyond}:{PORT}"
            assert server.saw().startswith(f"{family.beyond}:")
            assert to in server.saw()

        # And they do speak up: one without a header.
        stranger = net.keep(net.beyond.connect(family.pod_beyond, PORT))
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert receive_to_end(stranger) == b""
        wait_for(server.complaints, "a complaint")


@versions
def test_a_sidecar_that_requires_a_header(net: Topology, family: Family, version: str) -> None:
    """The gateway's own connections, as v2 says by LOCAL and v1 by the addresses."""
    own: dict[str, object] = {"version": 2, "local": True}
    if version == "v1":
        own = {"version": 1, "destination": quoted(family.pod_beyond, PORT)}
    config = gateway(quoted(family.pod_beyond, PORT), send_proxy=version, health_check=OFTEN)
    net.beyond  # noqa: B018  its address in the pod is there before the sidecar
    with (
        greeting(net.app(family)) as hosts,
        Daemon(net.pod, SIDECAR) as sidecar,
        Daemon(net.beyond, config) as daemon,
    ):
        wait_for(lambda: len(sidecar.log()) >= 5, "five checks")
        for record in sidecar.log():
            assert record["proxy_protocol"] == own
            client = record["downstream_remote_address"]
            assert client == record["downstream_direct_remote_address"]
            assert client.startswith(quoted(family.beyond, 0)[:-1])
            assert record["close_reason"] in ("downstream_fin", "upstream_fin")
            assert record["bytes_received"] == 0
        assert set(hosts) == {family.beyond}
        assert addresses(daemon) == {quoted(family.pod_beyond, PORT): ("up", "")}
        good, other = ("local", "accepted") if version == "v2" else ("accepted", "local")
        assert sidecar.metric("tproxyd_proxy_headers_total", result=good) >= 5
        for bad in (other, "absent", "missing", "invalid", "rejected", "refused", "timeout"):
            assert sidecar.metric("tproxyd_proxy_headers_total", result=bad) == 0, bad
        assert daemon.log() == []  # a check is nobody's connection


def test_without_send_proxy_they_send_nothing(net: Topology, family: Family) -> None:
    server = net.app(family)
    config = gateway(quoted(family.pod_beyond, PORT), health_check=OFTEN)
    with Daemon(net.beyond, config):
        for _ in range(3):
            check = net.keep(server.accept()[0])
            assert receive_to_end(check) == b""


def test_a_backend_that_stops_and_comes_back(net: Topology, family: Family) -> None:
    one, other = quoted(family.pod_beyond, PORT), quoted(family.pod_beyond, OTHER_PORT)
    config = "workers = 1\n" + gateway(one, other, health_check=OFTEN)
    net.beyond  # noqa: B018  its address in the pod is there before the backends
    with backend(net, family, PORT) as seen, contextlib.ExitStack() as stop_other:
        stop_other.enter_context(backend(net, family, OTHER_PORT))
        with Daemon(net.beyond, config) as daemon:
            assert addresses(daemon) == {one: ("up", ""), other: ("up", "")}
            assert {word(net, family) for _ in range(4)} == {"80", "81"}

            stop_other.close()
            wait_for(lambda: count(daemon, "down") == 1, "it to be taken out")
            assert count(daemon, "up") == 1
            assert addresses(daemon) == {one: ("up", ""), other: ("down", "connection refused")}
            assert f"web: {other} is down: connection refused" in daemon.stderr
            daemon.wait_log(4)
            assert [word(net, family) for _ in range(8)] == ["80"] * 8
            records = daemon.wait_log(12)[4:]
            # Nobody was sent there first: to find out is the checks' affair, not the clients'.
            assert all(record["upstreams_failed"] is None for record in records)
            assert daemon.metric("tproxyd_upstream_retries_total") == 0

            with backend(net, family, OTHER_PORT):
                wait_for(lambda: count(daemon, "down") == 0, "it to be taken in again")
                assert f"web: {other} is up again" in daemon.stderr
                assert addresses(daemon) == {one: ("up", ""), other: ("up", "")}
                assert {word(net, family) for _ in range(4)} == {"80", "81"}
            assert family.beyond in seen


@pytest.mark.parametrize("workers", [1, 2])
def test_all_are_down(net: Topology, family: Family, workers: int) -> None:
    """Refused at once, without a connect; served when one is back."""
    one, other = quoted(family.pod_beyond, PORT), quoted(family.pod_beyond, OTHER_PORT)
    config = f"workers = {workers}\n" + gateway(one, other, health_check=OFTEN)
    net.beyond  # noqa: B018  its address in the pod is there before the backend
    with Daemon(net.beyond, config) as daemon:
        # Ready although nobody is there: the first checks count, and it goes on looking.
        assert daemon.get("/readyz")[0] == 200
        assert count(daemon, "down") == 2
        assert "no upstream is left" in daemon.stderr
        for _ in range(3):
            assert word(net, family) == ""
        for record in daemon.wait_log(3):
            assert (record["close_reason"], record["response_flags"]) == ("no_upstream", "UH")
            assert record["upstream_host"] is None
            assert record["duration"] < 1000
        with backend(net, family, OTHER_PORT):
            wait_for(lambda: count(daemon, "down") == 1, "it to be taken in")
            for _ in range(4):
                assert word(net, family) == "81"


def test_one_that_is_silent(net: Topology) -> None:
    """Black-holed: no answer within timeout_s is an answer."""
    to = quoted(V4.pod_beyond, PORT)
    checks = OFTEN | {"timeout_s": 0.1}
    with backend(net, V4, PORT), Daemon(net.beyond, gateway(to, health_check=checks)) as daemon:
        assert addresses(daemon) == {to: ("up", "")}
        net.pod.nft(
            "table inet hole { chain input { type filter hook input priority 0; "
            "tcp dport 80 drop\n }\n }\n"
        )
        wait_for(lambda: count(daemon, "down") == 1, "it to be taken out")
        assert addresses(daemon) == {to: ("down", "no answer within 0.1 s")}
        assert word(net, V4) == ""


@contextlib.contextmanager
def backend(net: Topology, family: Family, port: int) -> Iterator[list[str]]:
    """One in the pod, which greets everybody with its port; the hosts that came."""
    any_host = "::" if ":" in family.pod else "0.0.0.0"
    listener = net.pod.listen(any_host, port)
    with contextlib.closing(listener), greeting(listener, str(port).encode()) as hosts:
        yield hosts


def word(net: Topology, family: Family) -> str:
    """What a client hears; "" where it is turned away."""
    try:
        with contextlib.closing(net.connect_world(family, GATEWAY_PORT)) as client:
            return receive_to_end(client).decode()
    except ConnectionResetError:
        return ""


def addresses(daemon: Daemon) -> dict[str, tuple[str, str]]:
    """What /status says of each address: its health, and why."""
    [listener] = daemon.status()["listeners"]
    return {
        each["address"]: (each["health"], each["why"])
        for upstream in listener["upstreams"]
        for each in upstream["addresses"]
    }


def count(daemon: Daemon, state: str) -> float:
    return daemon.metric("tproxyd_upstreams", listener="web", state=state)
