"""A header, even a trusted one, may not name a client that nobody can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from lib.daemon import Daemon
from lib.headers import v1, v2
from lib.streams import receive, was_reset
from lib.topology import Topology

Make = Callable[..., bytes]

CONFIG = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "require"
"""


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Topology, Daemon]]:
    """One daemon for all: a refusal leaves nothing behind, and the last test says so."""
    with Topology() as net:
        net.app()
        net.beyond  # noqa: B018  its pod-side address is one of the host's own
        with Daemon(net.pod, CONFIG) as daemon:
            yield net, daemon


@pytest.mark.parametrize("make", [v1, v2])
@pytest.mark.parametrize(
    ("client", "port"),
    [
        ("0.0.0.0", 4000),
        ("127.0.0.1", 4000),
        ("127.9.9.9", 4000),
        ("224.0.0.1", 4000),
        ("255.255.255.255", 4000),
        ("10.9.1.1", 4000),  # this host's own address
        ("10.9.2.1", 4000),  # and its other one
        ("106.52.131.116", 0),
        ("::", 4000),
        ("::1", 4000),
        ("ff02::1", 4000),
        ("fd00:9:1::1", 4000),
        ("::ffff:127.0.0.1", 4000),
    ],
)
def test_forbidden_client_is_refused(
    place: tuple[Topology, Daemon], client: str, port: int, make: Make
) -> None:
    net, daemon = place
    before = len(daemon.log())
    destination = "fd00:9:1::1" if ":" in client else "10.9.1.1"
    sock = net.connect()
    sock.sendall(make(client, destination, port) + b"payload")
    was_reset(sock)  # or closed: what matters is that it ends
    record = daemon.wait_log(before + 1)[-1]
    assert record["close_reason"] == "client_refused"
    assert record["downstream_direct_remote_address"].startswith("10.9.1.2:")
    assert net.app_saw_nothing()


def test_an_allowed_client_still_passes(place: tuple[Topology, Daemon]) -> None:
    net, _ = place
    sock = net.connect()
    sock.sendall(v2("106.52.131.116", "10.9.1.1") + b"payload")
    app = net.accept()
    assert app.getpeername()[0] == "106.52.131.116"
    assert receive(app, 7) == b"payload"
