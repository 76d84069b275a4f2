"""Upstreams that have names: who answers to one now, and what happens when nobody does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway
from lib.names import Names, naming
from lib.programs import quoted
from lib.servers import greeting
from lib.streams import receive_to_end
from lib.topology import PORT, V4, V6, Family, Topology
from lib.waits import stays, wait_for

NAME = "app.test"
UPSTREAM = f"{NAME}:{PORT}"
EVERY_S = 0.05
SECOND = {"v4": "10.9.2.3", "v6": "fd00:9:2::3"}  # another address of the neighbour's
CANT = f"web: {NAME} can't be resolved"


@pytest.fixture
def names(net: Topology) -> Iterator[Names]:
    """Of the pod, whose neighbour has a second address of each family."""
    net.beyond.ip("addr add 10.9.2.3/24 dev b0", "addr add fd00:9:2::3/64 dev b0")
    with naming(net.pod) as names:
        yield names


@contextlib.contextmanager
def at(net: Topology, *hosts: str) -> Iterator[None]:
    """Backends at these addresses of the neighbour, each of which greets with its own."""
    with contextlib.ExitStack() as stack:
        for host in hosts:
            listener = stack.enter_context(contextlib.closing(net.beyond.listen(host, PORT)))
            stack.enter_context(greeting(listener, host.encode()))
        yield


def served_by(net: Topology, family: Family = V4) -> str:
    """The address of the backend that a client gets; "" when it is turned away."""
    try:
        with contextlib.closing(net.connect(family, GATEWAY_PORT)) as client:
            return receive_to_end(client).decode()
    except ConnectionResetError:
        return ""


def config(**options: object) -> str:
    return "workers = 1\n" + gateway(UPSTREAM, resolve_every_s=EVERY_S, **options)


def known(daemon: Daemon) -> list[str]:
    """The addresses of the name, as /status has them."""
    [upstream] = daemon.status()["listeners"][0]["upstreams"]
    return [each["address"] for each in upstream["addresses"]]


def failures(daemon: Daemon) -> float:
    return daemon.metric("tproxyd_resolve_failures_total", listener="web")


def test_two_addresses_in_turn(net: Topology, names: Names, family: Family) -> None:
    hosts = [family.beyond, SECOND[family.name]]
    names.say({NAME: hosts})
    with at(net, *hosts), Daemon(net.pod, config()) as daemon:
        turns = [served_by(net, family) for _ in range(6)]
        assert set(turns[:2]) == set(hosts)
        assert turns == turns[:2] * 3
        records = daemon.wait_log(6)
        assert [record["upstream_host"] for record in records] == [
            quoted(host, PORT) for host in turns
        ]


def test_the_name_changes(net: Topology, names: Names, family: Family) -> None:
    """New connections go to its new address; those that are open stay where they are."""
    first, second = family.beyond, SECOND[family.name]
    names.say({NAME: [first]})
    old = net.keep(net.beyond.listen(first, PORT))
    with Daemon(net.pod, config()) as daemon, at(net, second):
        open_one = net.connect(family, GATEWAY_PORT)
        there = net.keep(old.accept()[0])
        names.say({NAME: [second]})
        wait_for(lambda: known(daemon) == [quoted(second, PORT)], "the new address")
        assert [served_by(net, family) for _ in range(4)] == [second] * 4
        there.sendall(b"still here")
        there.close()
        assert receive_to_end(open_one) == b"still here"
        assert failures(daemon) == 0


def test_the_name_stops_resolving(net: Topology, names: Names, family: Family) -> None:
    """No answer is not the answer "nobody": the last good one stays, and the log says so, once."""
    names.say({NAME: [family.beyond]})
    with at(net, family.beyond, SECOND[family.name]), Daemon(net.pod, config()) as daemon:
        assert served_by(net, family) == family.beyond
        names.say({})
        wait_for(lambda: failures(daemon) >= 3, "three failures")
        assert [served_by(net, family) for _ in range(4)] == [family.beyond] * 4
        [line] = [line for line in daemon.stderr.splitlines() if NAME in line and "can't" in line]
        assert line.endswith("; the last answer stays")
        assert line.startswith(f"tproxyd: {CANT}: ")
        [listener] = daemon.status()["listeners"]
        assert listener["upstreams"][0]["error"]

        names.say({NAME: [SECOND[family.name]]})
        wait_for(lambda: known(daemon) == [quoted(SECOND[family.name], PORT)], "the new address")
        assert served_by(net, family) == SECOND[family.name]
        again = f"web: {NAME} is resolved again: {SECOND[family.name]}"
        assert again in daemon.stderr


def test_a_name_that_never_resolved(net: Topology, names: Names, family: Family) -> None:
    """Its clients are refused, and all the rest is served; it, too, as soon as it can be."""
    here = quoted(family.beyond, PORT)
    both = config() + gateway(here, name="other", port=GATEWAY_PORT + 1)
    with at(net, family.beyond), Daemon(net.pod, both) as daemon:
        assert daemon.get("/readyz")[0] == 200
        assert f"{CANT}: " in daemon.stderr
        assert "connections are refused until it can" in daemon.stderr
        assert served_by(net, family) == ""
        [record] = daemon.wait_log()
        assert (record["close_reason"], record["response_flags"]) == ("no_upstream", "UH")
        assert receive_to_end(net.connect(family, GATEWAY_PORT + 1)).decode() == family.beyond

        names.say({NAME: [family.beyond]})
        wait_for(lambda: known(daemon)[:1] == [here], "an address")
        assert served_by(net, family) == family.beyond


def test_a_client_goes_to_the_address_of_its_own_family(net: Topology, names: Names) -> None:
    """While it is to be kept: an IPv4 connection can't come from an IPv6 address."""
    names.say({NAME: [V4.beyond, V6.beyond]})
    with (
        at(net, V4.beyond, V6.beyond),
        Daemon(net.pod, config(source="client")) as daemon,
    ):
        for family in (V4, V6):
            assert [served_by(net, family) for _ in range(4)] == [family.beyond] * 4
        assert all(record["source_fallback"] is None for record in daemon.wait_log(8))

        # The other family is better than nobody.
        names.say({NAME: [V4.beyond]})
        wait_for(lambda: known(daemon) == [quoted(V4.beyond, PORT)], "the new address")
        assert served_by(net, V6) == V4.beyond
        assert daemon.wait_log(9)[-1]["source_fallback"] == "family"


def test_an_address_that_is_gone_is_no_longer_checked(net: Topology, names: Names) -> None:
    """What was known of it goes with it; nobody knocks there any more."""
    first, second = V4.beyond, SECOND["v4"]
    names.say({NAME: [first, second]})
    checks = {"interval_s": 0.02, "rise": 1, "fall": 1}
    with at(net, first), Daemon(net.pod, config(health_check=checks)) as daemon:
        assert [served_by(net) for _ in range(4)] == [first] * 4
        assert daemon.metric("tproxyd_upstreams", state="down") == 1
        names.say({NAME: [first]})
        wait_for(lambda: daemon.metric("tproxyd_upstreams", state="down") == 0, "it to be gone")
        listener = net.keep(net.beyond.listen(second, PORT))
        listener.setblocking(False)

        def nobody_comes() -> bool:
            with contextlib.suppress(BlockingIOError):
                net.keep(listener.accept()[0])
                return False
            return True

        stays(nobody_comes, "silence at the old address", 0.3)


@pytest.mark.usefixtures("names")
def test_the_resolver_does_not_hold_up_a_stop(net: Topology) -> None:
    """It is waiting for a name server that says nothing."""
    silent = net.keep(net.pod.open_socket(socket.AF_INET, socket.SOCK_DGRAM))
    silent.bind(("127.0.0.1", 53))
    with Daemon(net.pod, config()) as daemon:
        assert silent.recv(512)
        assert daemon.stop(timeout=5) == 0
