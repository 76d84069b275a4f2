"""A unix socket as the upstream: it shows no address at all, so the header is what tells of one."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lib.daemon import Daemon
from lib.gateway import GATEWAY_PORT, gateway
from lib.headers import V2_LOCAL, v1, v2
from lib.streams import Receiving, Sending, assert_talks, pattern, receive, receive_to_end
from lib.topology import Family, Pair, Topology
from lib.waits import wait_for


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket. Not pytest's tmp_path: that of a socket has 107 bytes, test names are long."""
    with tempfile.TemporaryDirectory(prefix="tproxyd-") as directory:
        yield Path(directory, "app.sock")


def listening(net: Topology, path: Path) -> socket.socket:
    listener = net.keep(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.settimeout(10)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_bytes_pass_both_ways(net: Topology, family: Family, path: Path) -> None:
    listener = listening(net, path)
    with Daemon(net.pod, gateway(f"unix:{path}", source="proxy")) as daemon:
        client = net.connect(family, GATEWAY_PORT)
        pair = Pair(client, net.keep(listener.accept()[0]))
        assert_talks(pair)
        data = pattern(4 << 20)
        for one, other in (pair, Pair(pair.app, pair.client)):
            receiving = Receiving(other)
            Sending(one, data).assert_done()
            assert receiving.result() == data
        [record] = daemon.wait_log()
        assert record["upstream_host"] == f"unix:{path}"
        assert record["upstream_local_address"] is None
        assert record["close_reason"] == "downstream_fin"
        assert record["bytes_received"] == record["bytes_sent"] == len(data) + 32


@pytest.mark.parametrize(("version", "make"), [("v1", v1), ("v2", v2)])
def test_the_header_tells_of_the_client(
    net: Topology, family: Family, path: Path, version: str, make: object
) -> None:
    assert callable(make)
    listener = listening(net, path)
    with Daemon(net.pod, gateway(f"unix:{path}", send_proxy=version)):
        client = net.connect(family, GATEWAY_PORT)
        client.sendall(b"hello")
        told = make(family.client, family.pod, client.getsockname()[1], GATEWAY_PORT) + b"hello"
        app = net.keep(listener.accept()[0])
        assert receive(app, len(told)) == told
        app.sendall(b"hello yourself")
        app.close()
        assert receive_to_end(client) == b"hello yourself"


def test_nobody_listens(net: Topology, family: Family, path: Path) -> None:
    """A path that is not there, one that nobody listens at, and then one that somebody does."""
    with Daemon(net.pod, gateway(f"unix:{path}", eject_after=0)) as daemon:
        net.connect_and_end(family, GATEWAY_PORT)
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(path))
        left.close()
        net.connect_and_end(family, GATEWAY_PORT)
        for record in daemon.wait_log(2):
            assert record["response_flags"] == "UF", record
            assert record["duration"] < 1000
        os.unlink(path)
        listener = listening(net, path)
        client = net.connect(family, GATEWAY_PORT)
        assert_talks(Pair(client, net.keep(listener.accept()[0])))


def test_one_that_may_not_be_opened(net: Topology, path: Path) -> None:
    """The workers have no capability to get past permissions, even as root."""
    listening(net, path)
    os.chown(path, 65534, 65534)
    os.chmod(path, 0o600)
    checks = {"interval_s": 0.02}
    with Daemon(net.pod, gateway(f"unix:{path}", health_check=checks)) as daemon:
        assert f"unix:{path} is down: permission denied" in daemon.stderr
        net.connect_and_end(port=GATEWAY_PORT)
        assert daemon.wait_log()[0]["response_flags"] == "UH"
        os.chmod(path, 0o666)
        wait_for(lambda: daemon.metric("tproxyd_upstreams", state="up") == 1, "it to be up")


@pytest.mark.parametrize(
    ("version", "told"), [("off", b""), ("v1", b"PROXY UNKNOWN\r\n"), ("v2", V2_LOCAL)]
)
def test_health_checks(net: Topology, path: Path, version: str, told: bytes) -> None:
    """There are no addresses to name: v1 says so too."""
    listener = listening(net, path)
    checks = {"interval_s": 0.02}
    config = gateway(f"unix:{path}", health_check=checks, send_proxy=version)
    with Daemon(net.pod, config) as daemon:
        for _ in range(3):
            with contextlib.closing(listener.accept()[0]) as check:
                check.settimeout(10)
                assert receive_to_end(check) == told
        assert daemon.metric("tproxyd_upstreams", state="up") == 1
