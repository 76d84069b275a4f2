"""Headers of peers that may not speak for others: bytes like any others, or the end; never a name.

What a trusted peer's header does is in test_header_from_peer.py.
"""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from socket import SHUT_WR

import pytest
from lib.daemon import Daemon
from lib.figures import Figure
from lib.gateway import at
from lib.headers import SIGNATURE, V1_UNKNOWN, V2_LOCAL, v1, v2
from lib.streams import receive_to_end, was_reset
from lib.topology import V4, V6, Family, Topology, seen_port

PAYLOAD = b"GET / HTTP/1.1\r\n\r\n"
TLVS = b"\x01\x00\x02h2" + b"\x02\x00\x0bexample.com" + b"\x05\x00\x04id-1" + b"\x04\x00\x03\0\0\0"


def whole(family: Family) -> dict[str, bytes]:
    """Headers that a trusted peer might send."""
    other = V6 if family is V4 else V4
    return {
        "v1": v1(family.stranger, family.pod),
        "v1, as this host": v1(family.pod, family.pod),
        "v1, unknown": V1_UNKNOWN,
        "v2": v2(family.stranger, family.pod),
        "v2, as loopback": v2("127.0.0.1", "127.0.0.1"),
        "v2, with TLVs": v2(family.stranger, family.pod, tlvs=TLVS),
        "v2, local": V2_LOCAL,
        "v2, another family": v2(other.stranger, other.pod),
    }


def broken(family: Family) -> dict[str, bytes]:
    """Which nobody may send."""
    good = v2(family.stranger, family.pod, tlvs=TLVS)
    return {
        "v1, cut off": v1(family.stranger, family.pod)[:-6],
        "v1, endless": b"PROXY TCP4 " + b"1" * 2000,
        "v2, cut off": good[:-9],
        "v2, the signature alone": SIGNATURE,
        "v2, 65,535 bytes announced": SIGNATURE
        + struct.pack("!BBH", 0x21, 0x11, 0xFFFF)
        + good[16:],
        "v2, a TLV beyond its end": v2(family.stranger, family.pod, tlvs=b"\x04\xff\xffxx"),
        "v2, version 3": SIGNATURE + b"\x31" + good[13:],
    }


# The client namespace is the one that is named here; `beyond` is not.
NAMED = """
[[listener]]
header_timeout_s = 0.5
max_header_bytes = 1024
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "{policy}"
"""


@pytest.mark.parametrize("policy", ["require", "optional", "reject"])
def test_of_a_peer_that_is_not_named(
    net: Topology, family: Family, policy: str, figure: Figure
) -> None:
    """They arrive byte by byte as they were sent, under the peer's own address."""
    forged = whole(family) | broken(family)
    net.app(family)
    with Daemon(net.pod, NAMED.format(policy=policy)) as daemon:
        for what, header in forged.items():
            for at_once in (header + PAYLOAD, header, header[:1]):
                data = header + PAYLOAD
                peer = net.connect_beyond(family)
                peer.sendall(at_once)
                peer.sendall(data[len(at_once) :])
                peer.shutdown(SHUT_WR)
                app = net.accept(family)
                assert app.getpeername()[0] == family.beyond, what
                assert receive_to_end(app) == data, what
                app.close()
                assert receive_to_end(peer) == b""
        records = daemon.wait_log(3 * len(forged))
        assert {record["proxy_protocol"] for record in records} == {None}
        peers = {record["downstream_remote_address"].rpartition(":")[0] for record in records}
        assert peers == {at(family.beyond).rpartition(":")[0]}
        assert {record["close_reason"] for record in records} == {"downstream_fin"}
        assert daemon.metric("tproxyd_proxy_headers_total") == 0
    figure(f"{len(records)} connections with {len(forged)} forgeries: all payload")


def test_of_a_peer_that_must_not_send_one(net: Topology, family: Family, figure: Figure) -> None:
    """Those that are headers are rejected, those that cannot become one are invalid."""
    counts = Counter[str]()
    good, bad = whole(family), broken(family)
    with Daemon(net.pod, NAMED.format(policy="reject")) as daemon:
        for what, header in (good | bad).items():
            client = net.connect(family)
            client.sendall(header if what in bad else header + PAYLOAD)
            if what in bad:
                with contextlib.suppress(OSError):  # the RST can be here first
                    client.shutdown(SHUT_WR)
            assert was_reset(client), what
            [record] = daemon.wait_log(counts.total() + 1)[-1:]
            counts[record["close_reason"]] += 1
            reason = "header_rejected" if what in good else "header_invalid"
            assert record["close_reason"] == reason, what
            assert record["upstream_host"] is None
        assert net.app_saw_nothing(family)
    figure(f"{counts.total()} forgeries: {dict(counts)}")


def test_behind_a_header_that_counts(net: Topology, family: Family) -> None:
    """One names the client; what looks like another one is the client's own, and so payload."""
    net.app(family)
    forged = [*whole(family).values(), *broken(family).values()]
    with Daemon(net.pod, NAMED.format(policy="require")):
        for number, second in enumerate(forged):
            client = net.connect(family)
            client.sendall(v2(family.stranger, family.pod, 40_000 + number) + second)
            client.shutdown(SHUT_WR)
            app = net.accept(family)
            assert app.getpeername()[:2] == (family.stranger, seen_port(40_000 + number))
            assert receive_to_end(app) == second
            app.close()
            assert receive_to_end(client) == b""
