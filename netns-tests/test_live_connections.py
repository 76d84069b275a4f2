"""What is open can be seen, in every state, and ended; and looking costs the traffic nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest
from lib.daemon import Daemon, tproxyd
from lib.headers import v1
from lib.streams import assert_talks, receive, was_reset
from lib.topology import PORT, V4, V6, Topology, seen_port
from lib.waits import wait_for

CONFIG = """
workers = 2
[[listener]]
connect_timeout_s = 60
header_timeout_s = 60
[[listener.proxy_protocol]]
from = ["10.9.2.2"]
policy = "require"
"""
MANY = 3000

Row = dict[str, Any]
T = TypeVar("T")


def listed(daemon: Daemon, query: str = "") -> dict[str, Any]:
    code, body = daemon.get(f"/connections{query}")
    assert code == 200, body
    return dict(json.loads(body))


def rows(daemon: Daemon, query: str = "") -> list[Row]:
    return list(listed(daemon, query)["connections"])


def wait_rows(daemon: Daemon, count: int) -> list[Row]:
    wait_for(lambda: listed(daemon)["open"] == count, f"{count} open connections")
    return rows(daemon)


def named(sock: socket.socket) -> str:
    host, port, *_ = sock.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def kill(daemon: Daemon, *args: str) -> tuple[int, str, str]:
    done = tproxyd(daemon.namespace, "kill", *args, config=daemon.config)
    return done.returncode, done.stdout, done.stderr


def test_a_connection_is_shown_as_it_is(net: Topology) -> None:
    with Daemon(net.pod, CONFIG) as daemon:
        pair = net.pair()
        assert_talks(pair)
        pair.client.sendall(b"x" * 968)
        assert receive(pair.app, 968) == b"x" * 968
        (row,) = wait_rows(daemon, 1)
        port = pair.client.getsockname()[1]
        assert (
            row.items()
            >= {
                "listener": "inbound",
                "client": f"{V4.client}:{port}",
                "peer": None,
                "destination": f"{V4.pod}:{PORT}",
                "upstream": f"{V4.pod}:{PORT}",
                "source": f"{V4.client}:{seen_port(port)}",
                "state": "relaying",
                "received": 1000,
                "sent": 32,
            }.items()
        )
        assert row["rtt_us"] > 0
        assert row["age_s"] >= row["idle_s"] >= 0
        (later,) = rows(daemon)
        assert later["id"] == row["id"]
        assert later["age_s"] > row["age_s"]


def test_every_state(net: Topology) -> None:
    """Of a connection whose header is waited for; whose upstream does not answer; half-closed."""
    listener = net.keep(net.pod.listen(V6.pod, PORT, backlog=0))
    with Daemon(net.pod, CONFIG) as daemon:
        silent = net.connect_beyond()
        (header,) = wait_rows(daemon, 1)
        assert header["state"] == "header"
        assert header["client"] == named(silent)

        def state_of(sock: socket.socket) -> str:
            return {each["client"]: str(each["state"]) for each in rows(daemon)}.get(
                named(sock), ""
            )

        # A backlog of 0 takes one connection; SYNs behind it are dropped, and sent again and again.
        first = net.connect(V6)
        wait_for(lambda: state_of(first) == "relaying", "the first one")
        connecting = net.connect(V6)
        wait_for(lambda: state_of(connecting) == "connecting", "the second one")

        first.shutdown(socket.SHUT_WR)
        wait_for(lambda: state_of(first) == "client done", "the client's FIN to be seen")
        app = net.keep(listener.accept()[0])  # which makes room for the other
        wait_for(lambda: state_of(connecting) == "relaying", "the next SYN to be taken")
        other = net.keep(listener.accept()[0])
        other.shutdown(socket.SHUT_WR)
        wait_for(lambda: state_of(connecting) == "upstream done", "the application's FIN")
        assert app.recv(1) == b""


def test_behind_a_header(net: Topology) -> None:
    with Daemon(net.pod, CONFIG) as daemon:
        net.app()
        balancer = net.connect_beyond()
        balancer.sendall(v1(V4.stranger, V4.pod_beyond))
        app = net.accept()
        assert app.getpeername()[0] == V4.stranger
        (row,) = wait_rows(daemon, 1)
        assert row["client"].startswith(f"{V4.stranger}:")
        assert row["peer"] == named(balancer)
        assert row["received"] == 0  # a header is no payload


def test_kill_by_id(net: Topology) -> None:
    with Daemon(net.pod, CONFIG) as daemon:
        ended, spared = net.pair(), net.pair()
        ids = {each["client"]: each["id"] for each in wait_rows(daemon, 2)}
        assert kill(daemon, ids[named(ended.client)]) == (0, "ended 1 connection\n", "")
        assert was_reset(ended.client)
        assert was_reset(ended.app)
        assert_talks(spared)
        (record,) = daemon.wait_log()
        assert record["close_reason"] == "killed"
        assert record["response_flags"] == "LR"
        assert record["connection_termination_details"] == "ended by tproxyd kill"
        assert daemon.metric("tproxyd_connections_total", close_reason="killed") == 1
        # It is no more; and the number of its descriptor is another connection's by now.
        again = net.pair()
        code, out, err = kill(daemon, ids[named(ended.client)], "1-2-00000")
        assert (code, out) == (1, "")
        assert f"tproxyd: {ids[named(ended.client)]} is no open connection (any more)" in err
        assert "tproxyd: 1-2-00000 is no open connection" in err
        assert_talks(again)


def test_kill_in_every_state(net: Topology) -> None:
    net.keep(net.pod.listen(V6.pod, PORT, backlog=0))
    with Daemon(net.pod, CONFIG) as daemon:
        socks = [net.connect_beyond(), net.connect(V6), net.connect(V6)]
        states = {each["state"]: each["id"] for each in wait_rows(daemon, 3)}
        assert states.keys() == {"header", "connecting", "relaying"}
        assert kill(daemon, *states.values()) == (0, "ended 3 connections\n", "")
        assert all(was_reset(sock) for sock in socks)
        assert {each["close_reason"] for each in daemon.wait_log(3)} == {"killed"}


def test_kill_by_client(net: Topology) -> None:
    net.client.ip("addr add 10.9.1.77/24 dev c0")
    net.app()
    with Daemon(net.pod, CONFIG) as daemon:
        ended = [net.keep(net.client.connect(V4.pod, PORT, "10.9.1.77")) for _ in range(5)]
        net.app(V6)
        ended += [net.connect(V6)]
        spared = net.pair()
        wait_rows(daemon, len(ended) + 1)
        prefixes = ("--client", "10.9.1.64/26", "--client", V6.client)
        assert kill(daemon, *prefixes) == (0, f"ended {len(ended)} connections\n", "")
        assert all(was_reset(sock) for sock in ended)
        spared.client.sendall(b"x")
        assert listed(daemon)["open"] == 1
        code, out, err = kill(daemon, "--client", "192.0.2.0/24")
        assert (code, out) == (1, "")
        assert "tproxyd: no open connection is of 192.0.2.0/24; see " in err


def test_without_an_admin_endpoint(net: Topology) -> None:
    with Daemon(net.pod, 'admin = ""\n') as daemon:
        pair = net.pair()
        shown = tproxyd(net.pod, "status", "--connections", config=daemon.config)
        assert shown.returncode == 0, shown.stderr
        assert f" {named(pair.client)} " in shown.stdout
        assert kill(daemon, "--client", V4.client)[0] == 0
        assert was_reset(pair.client)


def test_a_stopped_worker_is_named_and_the_others_are_shown(net: Topology) -> None:
    with Daemon(net.pod, CONFIG) as daemon:
        for _ in range(8):
            net.pair()
        wait_rows(daemon, 8)
        stopped, other = daemon.workers()
        os.kill(stopped, signal.SIGSTOP)
        listing = listed(daemon)
        assert listing["silent"] == [stopped]
        assert {each["id"].split("-")[0] for each in listing["connections"]} <= {str(other)}
        code, _, err = kill(daemon, "--client", V4.client)
        assert code == 1
        assert f"tproxyd: worker {stopped} does not answer: it may end its own later" in err
        os.kill(stopped, signal.SIGCONT)
        assert listed(daemon)["silent"] == []


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * MANY + 200:
        pytest.skip(f"needs {2 * MANY + 200} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


MEASURES: dict[str, Callable[[Row], float]] = {
    "bytes": lambda row: -row["received"] - row["sent"],
    "rate": lambda row: -row["rate"],
    "age": lambda row: -row["age_s"],
    "idle": lambda row: -row["idle_s"],
    "rtt": lambda row: -row["rtt_us"],
    "client": lambda row: int(row["client"].rpartition(":")[2]),
}


@pytest.mark.usefixtures("many_files")
def test_many(net: Topology, capsys: pytest.CaptureFixture[str]) -> None:
    """Thousands in one worker: all are there, in order, and an echo is not kept waiting."""
    listener = net.app()
    with Daemon(net.pod, CONFIG.replace("workers = 2", "workers = 1")) as daemon:
        pairs = []
        for number in range(MANY):
            client = net.connect()
            client.sendall(b"x" * (number % 10))
            pairs.append((client, net.keep(listener.accept()[0])))
        wait_for(
            lambda: sum(each["received"] for each in rows(daemon, "?limit=10000")) == 4.5 * MANY,
            "every byte to be relayed",
        )
        slowest, _ = echo_while(*pairs[-1], partial(daemon.get, "/livez"))
        told = [f"without that an echo took {slowest:.1f} ms"]
        for sort, measure in MEASURES.items():
            began = time.monotonic()
            query = f"?sort={sort}&limit={MANY}"
            slowest, listing = echo_while(*pairs[-1], partial(listed, daemon, query))
            took = time.monotonic() - began
            whole = listing["connections"]
            assert len({each["id"] for each in whole}) == listing["open"] == MANY
            assert [*map(measure, whole)] == sorted(map(measure, whole))
            assert len(rows(daemon, f"?sort={sort}&limit=3")) == 3
            told.append(f"by {sort}: {took * 1000:.0f} ms, the slowest echo {slowest:.1f} ms")
        with capsys.disabled():
            print(f"\n{MANY} connections listed:", *told, sep="\n  ", end="")


def echo_while(client: socket.socket, app: socket.socket, do: Callable[[], T]) -> tuple[float, T]:
    """The slowest round trip made meanwhile, in ms; and what it did."""
    slowest = 0.0
    with ThreadPoolExecutor(1) as other:
        done = other.submit(do)
        while not done.done():
            began = time.monotonic()
            client.sendall(b"?")
            while app.recv(1 << 16)[-1:] != b"?":
                pass
            app.sendall(b"!")
            receive(client, 1)
            slowest = max(slowest, time.monotonic() - began)
        return slowest * 1000, done.result()
