"""Bytes that arrive with the header, or before the application is connected, are not lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lib.daemon import Daemon
from lib.headers import v1, v2
from lib.streams import Sending, pattern, receive_to_end
from lib.topology import Family, Topology

CONFIG = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "require"
"""


@pytest.mark.parametrize("make", [v1, v2])
@pytest.mark.parametrize("size", [1, 10_000, 3_000_000])
def test_payload_right_behind_the_header(
    net: Topology, family: Family, make: Callable[..., bytes], size: int
) -> None:
    """3 MB are more than the header's buffer, the relay's buffer and the loopback window."""
    net.app(family)
    payload = pattern(size)
    with Daemon(net.pod, CONFIG) as daemon:
        client = net.connect(family)
        sending = Sending(client, make(family.stranger, family.pod) + payload)
        app = net.accept(family)
        assert receive_to_end(app) == payload
        sending.assert_done()
        app.close()
        client.close()
        [record] = daemon.wait_log()
        assert record["bytes_received"] == size


def test_payload_and_fin_before_the_application_accepts(net: Topology) -> None:
    net.app()
    with Daemon(net.pod):
        client = net.connect()
        Sending(client, b"all I have to say").assert_done()
        assert receive_to_end(net.accept()) == b"all I have to say"
