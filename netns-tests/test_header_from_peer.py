"""Who may speak for others: a PROXY header counts from a trusted peer and from nobody else.

The client namespace is the trusted load balancer here; `beyond` is a peer that no entry names.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import pytest
from lib.daemon import Daemon
from lib.headers import V1_UNKNOWN, V2_LOCAL, v1, v2
from lib.streams import receive, receive_to_end
from lib.topology import Family, Topology

Make = Callable[..., bytes]


def trusting(policy: str, more: str = "") -> str:
    return f"""
[[listener]]
header_timeout_s = 0.4
{more}
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "{policy}"
"""


@pytest.mark.parametrize("policy", ["require", "optional"])
@pytest.mark.parametrize("make", [v1, v2])
def test_trusted_header_names_the_client(
    net: Topology, family: Family, policy: str, make: Make
) -> None:
    net.app(family)
    with Daemon(net.pod, trusting(policy)) as daemon:
        client = net.connect(family)
        client.sendall(make(family.stranger, family.pod, 40_000, 443) + b"hello")
        app = net.accept(family)
        assert app.getpeername()[0] == family.stranger
        assert receive(app, 5) == b"hello"
        app.sendall(b"answer")
        assert receive(client, 6) == b"answer"
        client.close()
        app.close()
        [record] = daemon.wait_log()
        host = f"[{family.stranger}]" if family.name == "v6" else family.stranger
        peer = f"[{family.client}]" if family.name == "v6" else family.client
        assert record["downstream_remote_address"] == f"{host}:40000"
        assert record["downstream_direct_remote_address"].startswith(f"{peer}:")
        assert record["bytes_received"] == 5
        version = "1" if make is v1 else "2"
        labels = {"version": version, "result": "accepted"}
        assert daemon.metric("tproxyd_proxy_headers_total", **labels) == 1


def test_untrusted_header_is_payload(net: Topology, family: Family) -> None:
    net.app(family)
    forged = v1(family.stranger, family.pod)
    with Daemon(net.pod, trusting("require")):
        neighbour = net.connect_beyond(family)
        neighbour.sendall(forged)
        app = net.accept(family)
        assert app.getpeername()[0] == family.beyond
        assert receive(app, len(forged)) == forged


def test_nobody_is_trusted_by_default(net: Topology) -> None:
    net.app()
    forged = v2("106.52.131.116", "10.9.1.1")
    with Daemon(net.pod):
        client = net.connect()
        client.sendall(forged)
        app = net.accept()
        assert app.getpeername()[0] == "10.9.1.2"
        assert receive(app, len(forged)) == forged


def test_required_header_that_never_comes(net: Topology) -> None:
    with Daemon(net.pod, trusting("require")) as daemon:
        client = net.connect()
        assert receive_to_end_or_reset(client) == b""
        [record] = daemon.wait_log()
        assert record["close_reason"] == "header_timeout"
        assert 350 <= record["duration"] < 2000
        assert net.app_saw_nothing()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "header_missing"),
        (b"", "header_missing"),  # then FIN
        (b"PROXY TCP4 1.2.3.4", "header_invalid"),  # then FIN: whatever it was, it was no header
        (b"PROXY TCP4 1.2.3.4 1.2.3.5 1 65536\r\n", "header_invalid"),
        (v2("1.2.3.4", "1.2.3.5")[:12] + b"\x31\x11\x00\x0c" + b"x" * 12, "header_invalid"),
    ],
)
def test_required_header_that_is_none(net: Topology, sent: bytes, reason: str) -> None:
    with Daemon(net.pod, trusting("require")) as daemon:
        client = net.connect()
        client.sendall(sent)
        with contextlib.suppress(OSError):  # the RST can be here first
            client.shutdown(socket.SHUT_WR)
        assert receive_to_end_or_reset(client) == b""
        [record] = daemon.wait_log()
        assert record["close_reason"] == reason
        assert net.app_saw_nothing()


def test_optional_header_left_out(net: Topology) -> None:
    """The bytes go through as soon as they cannot become a signature any more."""
    net.app()
    with Daemon(net.pod, trusting("optional", "# header_timeout_s = 5")):
        client = net.connect()
        client.sendall(b"PROUD")
        app = net.accept()
        assert app.getpeername()[0] == "10.9.1.2"
        assert receive(app, 5) == b"PROUD"


def test_optional_and_silent_as_clients_of_smtp_are(net: Topology) -> None:
    """The application gets to speak first, once the time for a header is over."""
    net.app()
    with Daemon(net.pod, trusting("optional")):
        client = net.connect()
        app = net.accept()
        assert app.getpeername()[0] == "10.9.1.2"
        app.sendall(b"220 ready")
        assert receive(client, 9) == b"220 ready"


@pytest.mark.parametrize("make", [v1, v2])
def test_rejected_header(net: Topology, make: Make) -> None:
    with Daemon(net.pod, trusting("reject")) as daemon:
        client = net.connect()
        client.sendall(make("106.52.131.116", "10.9.1.1"))
        assert receive_to_end_or_reset(client) == b""
        [record] = daemon.wait_log()
        assert record["close_reason"] == "header_rejected"
        assert net.app_saw_nothing()


def test_plain_bytes_pass_where_headers_are_rejected(net: Topology) -> None:
    net.app()
    with Daemon(net.pod, trusting("reject")):
        client = net.connect()
        client.sendall(b"GET / ")
        app = net.accept()
        assert app.getpeername()[0] == "10.9.1.2"
        assert receive(app, 6) == b"GET / "


@pytest.mark.parametrize("header", [V1_UNKNOWN, V2_LOCAL])
def test_header_without_addresses_means_the_peer(net: Topology, header: bytes) -> None:
    net.app()
    with Daemon(net.pod, trusting("require")):
        client = net.connect()
        client.sendall(header + b"probe")
        app = net.accept()
        assert app.getpeername()[0] == "10.9.1.2"
        assert receive(app, 5) == b"probe"


def test_first_match_wins(net: Topology) -> None:
    net.app()
    config = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2/32"]
policy = "reject"
[[listener.proxy_protocol]]
from = ["10.9.0.0/16"]
policy = "require"
"""
    with Daemon(net.pod, config) as daemon:
        client = net.connect()
        client.sendall(v1("106.52.131.116", "10.9.1.1"))
        assert receive_to_end_or_reset(client) == b""
        assert daemon.wait_log()[0]["close_reason"] == "header_rejected"
        neighbour = net.connect_beyond()
        neighbour.sendall(v1("106.52.131.116", "10.9.2.1"))
        assert net.accept().getpeername()[0] == "106.52.131.116"


def receive_to_end_or_reset(sock: socket.socket) -> bytes:
    try:
        return receive_to_end(sock)
    except ConnectionResetError:
        return b""
