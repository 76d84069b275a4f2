"""Thousands of damaged PROXY headers over real sockets, in pieces of any size: each connection ends
with one log line that says what was wrong; where nothing was, the payload is there to the byte.

What `parse` must say of any bytes is tested without a socket, and fuzzed (scripts/fuzz); here its
answers are what is expected of the daemon.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator

from lib.daemon import Daemon
from lib.figures import Figure
from lib.headers import SIGNATURE, V1_UNKNOWN, V2_LOCAL, v1, v2
from lib.streams import receive_to_end
from lib.topology import Family, Topology

from tproxyd.errors import CloseReason, PeerError
from tproxyd.flow.proxyproto import NoHeader, parse

COUNT = 1500
AT_ONCE = 50
FIRST_PORT = 20_000  # of the client: one each, so that a log line names its connection
CONFIG = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "require"
"""
# A header that is right may still name somebody who can't be served: nobody's address, or one of
# the other family, which the pod has no route for.
SERVED = {CloseReason.DOWNSTREAM_FIN}
NOT_SERVED = {CloseReason.CLIENT_REFUSED, CloseReason.UPSTREAM_UNREACHABLE}


def test_fuzzed_headers(net: Topology, family: Family, figure: Figure) -> None:
    rng = random.Random(2)
    cases = [damaged(rng, family) for _ in range(COUNT)]
    reasons: Counter[str] = Counter()
    answers: list[bytes] = []
    with Daemon(net.pod, CONFIG) as daemon, echoing(net.app(family)):
        workers = daemon.workers()
        for start in range(0, COUNT, AT_ONCE):
            clients = [begin(net, family, start + i, cases[start + i], rng) for i in range(AT_ONCE)]
            answers += map(answer_of, clients)
        records = {
            int(record["downstream_direct_remote_address"].rpartition(":")[2]): record
            for record in daemon.wait_log(COUNT)
        }
        for i, case in enumerate(cases):
            record = records.pop(FIRST_PORT + i)
            fits = fitting(case)
            assert record["close_reason"] in fits, (case, record)
            assert fits & SERVED or record["connection_termination_details"], record
            served = record["close_reason"] in SERVED
            assert answers[i] == (payload_of(case) if served else b""), (case, answers[i], record)
            reasons[record["close_reason"]] += 1
        assert not records
        assert daemon.workers() == workers, "one of them crashed"
        assert not daemon.bugs()
        assert daemon.metric("tproxyd_connections_active") == 0
    assert min(reasons["header_invalid"], reasons["header_missing"]) > COUNT // 20, reasons
    assert reasons["downstream_fin"] > COUNT // 20, reasons
    figure(f"{COUNT} headers: " + ", ".join(f"{n} {word}" for word, n in reasons.most_common()))


def damaged(rng: random.Random, family: Family) -> bytes:
    """A header and a payload, after no, one or a few accidents."""
    size = 16 if ":" in family.pod else 4
    source = str(ipaddress.ip_address(rng.randbytes(size)))
    ports = rng.randrange(1, 65536), rng.randrange(1, 65536)
    tlvs = b"".join(
        struct.pack("!BH", rng.choice([1, 2, 3, 4, 5, 0x20, 0xE0, 0xEA]), len(value)) + value
        for value in (rng.randbytes(rng.randrange(20)) for _ in range(rng.randrange(3)))
    )
    header = rng.choice(
        [
            v1(source, family.pod, *ports),
            v1(source, family.pod, *ports),
            v2(source, family.pod, *ports, tlvs),
            v2(source, family.pod, *ports, tlvs),
            V1_UNKNOWN,
            V2_LOCAL,
            SIGNATURE + rng.randbytes(rng.randrange(60)),
            rng.randbytes(rng.randrange(40)),
        ]
    )
    data = bytearray(header)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at:at] = rng.randbytes(rng.randrange(1, 6))
            case 2:
                del data[at : at + rng.randrange(1, 6)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case _:
                del data[at:]
                return bytes(data)  # and it ends there
    return bytes(data) + os.urandom(rng.choice([0, 1, 300]))


def payload_of(case: bytes) -> bytes | None:
    """What the application is to get; None when it is to know nothing of the connection."""
    try:
        header = parse(case)
    except PeerError:
        return None
    return None if isinstance(header, NoHeader) else case[header.size :]


def fitting(case: bytes) -> set[CloseReason]:
    """The reasons that a log line may give."""
    try:
        header = parse(case)
    except PeerError as error:
        return {error.reason}
    if isinstance(header, NoHeader):
        signed = case.startswith((b"PROXY", SIGNATURE))  # cut off
        return {CloseReason.HEADER_INVALID if signed else CloseReason.HEADER_MISSING}
    return SERVED | NOT_SERVED


def begin(
    net: Topology, family: Family, number: int, case: bytes, rng: random.Random
) -> socket.socket:
    """A connection that has sent its case, in pieces, and FIN."""
    client = net.client.connect(family.pod, 80, source_port=FIRST_PORT + number)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # ended before it was through: for a wrong start
        at = 0
        while at < len(case):
            size = rng.choice([1, 2, 7, 30, len(case)])
            client.sendall(case[at : at + size])
            at += size
        client.shutdown(socket.SHUT_WR)
    return client


def answer_of(client: socket.socket) -> bytes:
    with client:
        try:
            return receive_to_end(client)
        except ConnectionResetError:
            return b""


@contextlib.contextmanager
def echoing(listener: socket.socket) -> Iterator[None]:
    """An application that reads to the end and says it all again."""

    def serve() -> None:
        while True:
            try:
                sock = listener.accept()[0]
            except OSError:  # not listening any more
                return
            sock.settimeout(10)
            with sock, contextlib.suppress(OSError):
                sock.sendall(receive_to_end(sock))

    listener.settimeout(None)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
