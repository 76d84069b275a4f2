"""The life of a connection, told as conversations (playbook.py): no socket, no clock, no kernel.

Every playbook here also holds for itself that there is exactly one record and that both streams
are closed exactly once.
"""

from __future__ import annotations

import errno
import os

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import LARGEST_HEADER
from tproxyd.errors import CloseReason
from tproxyd.flow.connect import rotate
from tproxyd.flow.proxyproto import V2_SIGNATURE, encode_v2
from tproxyd.flow.relay import Outcome
from tproxyd.flow.tlv import Tlv
from tproxyd.tests.playbook import (
    APP,
    EOF,
    FIN,
    NOTHING,
    PEER,
    Cut,
    Passed,
    Playbook,
    dials,
    lines,
)

RESET = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
FAR = Endpoint("106.52.131.116", 51234)  # the client that headers name here
V1 = f"PROXY TCP4 {FAR.host} 10.9.1.1 {FAR.port} 80\r\n".encode()
V2 = encode_v2(FAR, APP, [Tlv(5, b"id-1")])
AS_PEER = f"{PEER.host}:{rotate(PEER.port)}"
AS_FAR = f"{FAR.host}:{rotate(FAR.port)}"
ENDED = "end both by FIN: downstream_fin"


# Peers that nobody trusts -------------------------------------------------------------------------


def test_a_plain_connection_is_made_as_its_client() -> None:
    life = (Playbook() << dials(AS_PEER) << "relay" >> FIN << ENDED).play()
    assert (life.client, life.peer) == (PEER, PEER)
    assert (life.dst, life.upstream) == (APP, APP)
    assert life.source == Endpoint(PEER.host, rotate(PEER.port))
    assert (life.received, life.sent, life.header, life.detail) == (3, 5, None, "")


def test_an_untrusted_peer_is_never_asked_for_a_header() -> None:
    """No recv before the relay: whatever it sends, a forged header too, is payload."""
    life = (Playbook(policy=None) << dials(AS_PEER) << "relay" >> FIN << ENDED).play()
    assert life.header is None
    assert life.client == PEER


def test_the_proxy_as_the_source() -> None:
    life = (Playbook(source="proxy") << dials("") << "relay" >> FIN << ENDED).play()
    assert life.source == Endpoint("10.9.1.1", 45678)
    assert life.fallback == ""


def test_the_relay_has_the_last_word() -> None:
    outcome = Outcome(CloseReason.UPSTREAM_RESET, "why", 7, 11, aborted=True)
    life = (
        Playbook() << dials(AS_PEER) << "relay" >> outcome << "end both by RST: upstream_reset"
    ).play()
    assert (life.detail, life.received, life.sent) == ("why", 7, 11)


# Headers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["require", "optional"])
@pytest.mark.parametrize(("header", "version"), [(V1, 1), (V2, 2)])
def test_a_header_names_the_client(policy: str, header: bytes, version: int) -> None:
    life = (
        Playbook(policy=policy)
        << "client recv"
        >> header
        << f"count header {version} accepted"
        << dials(AS_FAR)
        << "relay"
        >> FIN
        << ENDED
    ).play()
    assert life.client == FAR
    assert life.peer == PEER
    assert life.header is not None
    assert life.header.version == version


@pytest.mark.parametrize("header", [V1, V2])
def test_a_header_in_two_pieces(header: bytes) -> None:
    """Wherever it is split: the walk waits, with one deadline for the whole header."""
    for cut in range(1, len(header)):
        life = (
            Playbook(policy="require")
            << "client recv"
            >> header[:cut]
            << "client recv"
            >> NOTHING
            << "wait for client until 5"
            >> Passed(4.5)
            << "client recv"
            >> header[cut:] + b"GET /"
            << f"count header {1 if header is V1 else 2} accepted"
            << dials(AS_FAR)
            << "relay, first b'GET /'"
            >> FIN
            << ENDED
        ).play()
        assert life.client == FAR


def test_a_header_byte_by_byte() -> None:
    book = Playbook(policy="require")
    for i in range(len(V2)):
        book << "client recv" >> V2[i : i + 1]
    (book << "count header 2 accepted" << dials(AS_FAR) << "relay" >> FIN << ENDED).play()


def test_the_largest_header_arrives() -> None:
    """More than one buffer of the walk: max_header_bytes bounds each read, not the sum of two."""
    tlvs = [Tlv(0xE0, bytes(60_000)), Tlv(0xE1, bytes(LARGEST_HEADER - 16 - 12 - 60_006))]
    header = encode_v2(FAR, APP, tlvs)
    assert len(header) == LARGEST_HEADER
    (
        Playbook(policy="require", max_header_bytes=LARGEST_HEADER)
        << "client recv"
        >> header[:60_000]
        << "client recv"
        >> header[60_000:] + b"early"
        << "count header 2 accepted"
        << dials(AS_FAR)
        << "relay, first b'early'"
        >> FIN
        << ENDED
    ).play()


def test_data_before_the_upstream_is_there() -> None:
    """What came with the header is the first that goes up, however long the connect takes."""
    life = (
        Playbook(policy="require")
        << "client recv"
        >> V1 + b"early"
        << "count header 1 accepted"
        << "socket IPv4 as client"
        << f"bind {AS_FAR}"
        << f"connect {APP}"
        >> errno.EINPROGRESS
        << f"connect {APP}"
        >> errno.EALREADY
        << f"who holds {APP} <- {AS_FAR}"
        >> 0
        << "wait for upstream until 0.05"
        >> Passed(0.02)
        << f"connect {APP}"
        >> 0
        << "relay, first b'early'"
        >> FIN
        << ENDED
    ).play()
    assert life.client == FAR


def test_local_and_unknown_speak_for_the_peer() -> None:
    for header, version in ((b"PROXY UNKNOWN\r\n", 1), (encode_v2(None, None), 2)):
        life = (
            Playbook(policy="require")
            << "client recv"
            >> header
            << f"count header {version} local"
            << dials(AS_PEER)
            << "relay"
            >> FIN
            << ENDED
        ).play()
        assert life.client == PEER
        assert life.header is not None


def test_optional_and_payload() -> None:
    life = (
        Playbook(policy="optional")
        << "client recv"
        >> b"GET / HTTP/1.1\r\n"
        << "count header - absent"
        << dials(AS_PEER)
        << r"relay, first b'GET / HTTP/1.1\r\n'"
        >> FIN
        << ENDED
    ).play()
    assert life.client == PEER


def test_optional_waits_only_while_it_can_still_be_a_signature() -> None:
    """POST begins like PROXY. One byte settles it: nothing is read, or waited for, after that."""
    (
        Playbook(policy="optional")
        << "client recv"
        >> b"P"
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> True
        << "client recv"
        >> b"O"
        << "count header - absent"
        << dials(AS_PEER)
        << "relay, first b'PO'"
        >> FIN
        << ENDED
    ).play()


@pytest.mark.parametrize("policy", ["optional", "reject"])
def test_a_silent_peer_waits_for_the_application_to_speak_first(policy: str) -> None:
    (
        Playbook(policy=policy)
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> False
        << "count header - absent"
        << dials(AS_PEER)
        << "relay"
        >> FIN
        << ENDED
    ).play()


def test_a_silent_peer_that_must_speak() -> None:
    life = (
        Playbook(policy="require")
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> False
        << "count header - timeout"
        << "end client by RST: header_timeout"
    ).play()
    assert life.detail == "0 bytes, no whole header, in 5 s"
    assert (life.client, life.upstream, life.source) == (None, None, None)


@pytest.mark.parametrize("policy", ["require", "optional", "reject"])
def test_half_a_header_is_not_waited_for_for_ever(policy: str) -> None:
    """Events do not push the deadline: a byte every four seconds gets no more than five."""
    life = (
        Playbook(policy=policy)
        << "client recv"
        >> b"PRO"
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> Passed(4.0)
        << "client recv"
        >> b"XY"
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> False
        << "count header - timeout"
        << "end client by RST: header_timeout"
    ).play()
    assert life.detail.startswith("5 bytes")


def test_a_wait_that_ends_early_for_no_reason() -> None:
    (
        Playbook(policy="require")
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> Passed(1.0, happened=False)
        << "client recv"
        >> V1
        << "count header 1 accepted"
        << dials(AS_FAR)
        << "relay"
        >> FIN
        << ENDED
    ).play()


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"GET / HTTP/1.1\r\n", "a PROXY header is required: 16 bytes of payload came"),
        (EOF, "a PROXY header is required: it closed without a byte"),
    ],
)
def test_a_required_header_is_missing(data: bytes, detail: str) -> None:
    life = (
        Playbook(policy="require")
        << "client recv"
        >> data
        << "count header - missing"
        << "end client by RST: header_missing"
    ).play()
    assert life.detail == detail


@pytest.mark.parametrize("policy", ["require", "optional", "reject"])
@pytest.mark.parametrize(
    ("data", "version"),
    [
        (b"PROXYX", 1),
        (b"PROXY TCP4 1.2.3.4\r\n", 1),
        (V2_SIGNATURE + b"\x31", 2),
        (V2_SIGNATURE + b"\x21\x11\xff\xff", 2),  # longer than max_header_bytes
    ],
)
def test_a_broken_header(policy: str, data: bytes, version: int) -> None:
    life = (
        Playbook(policy=policy)
        << "client recv"
        >> data
        << f"count header {version} invalid"
        << "end client by RST: header_invalid"
    ).play()
    assert life.detail


@pytest.mark.parametrize("policy", ["require", "optional", "reject"])
@pytest.mark.parametrize(
    ("data", "version"), [(b"PROXY", 1), (V1[:-1], 1), (V2_SIGNATURE, 2), (V2[:-1], 2)]
)
def test_a_header_that_ends_in_the_middle(policy: str, data: bytes, version: int) -> None:
    life = (
        Playbook(policy=policy)
        << "client recv"
        >> data
        << "client recv"
        >> EOF
        << f"count header {version} invalid"
        << "end client by RST: header_invalid"
    ).play()
    assert life.detail == f"it ends after {len(data)} bytes"


@pytest.mark.parametrize("data", [b"P", b"PROX", V2_SIGNATURE[:11]])
def test_payload_that_ends_like_the_start_of_a_signature(data: bytes) -> None:
    """ "P" and goodbye is a whole conversation, if a header is not required."""
    (
        Playbook(policy="optional")
        << "client recv"
        >> data
        << "client recv"
        >> EOF
        << "count header - absent"
        << dials(AS_PEER)
        << f"relay, first {data!r}"
        >> FIN
        << ENDED
    ).play()
    (
        Playbook(policy="require")
        << "client recv"
        >> data
        << "client recv"
        >> EOF
        << "count header - missing"
        << "end client by RST: header_missing"
    ).play()


@pytest.mark.parametrize("policy", ["optional", "reject"])
def test_a_peer_that_closes_at_once_is_still_relayed(policy: str) -> None:
    """It may wait for what the application says: its EOF is a half-close like any other."""
    (
        Playbook(policy=policy)
        << "client recv"
        >> EOF
        << "count header - absent"
        << dials(AS_PEER)
        << "relay"
        >> FIN
        << ENDED
    ).play()


@pytest.mark.parametrize(("header", "version"), [(V1, 1), (V2, 2), (b"PROXY UNKNOWN\r\n", 1)])
def test_a_header_that_may_not_be_sent(header: bytes, version: int) -> None:
    life = (
        Playbook(policy="reject")
        << "client recv"
        >> header
        << f"count header {version} rejected"
        << "end client by RST: header_rejected"
    ).play()
    assert life.header is None


def test_reject_lets_payload_through() -> None:
    (
        Playbook(policy="reject")
        << "client recv"
        >> b"SSH-2.0"
        << "count header - absent"
        << dials(AS_PEER)
        << "relay, first b'SSH-2.0'"
        >> FIN
        << ENDED
    ).play()


@pytest.mark.parametrize("before", [b"", b"PROXY TCP4 "])
def test_rst_while_the_header_is_awaited(before: bytes) -> None:
    book = Playbook(policy="require")
    if before:
        book << "client recv" >> before
    life = (
        book
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> True
        << "client recv"
        >> RESET
        << "end client by RST: downstream_reset"
    ).play()
    assert life.detail == "Connection reset by peer"


# Refusals -----------------------------------------------------------------------------------------


def test_a_claim_that_nobody_may_make() -> None:
    life = (
        Playbook(policy="require", kinds={FAR.host: "own"})
        << "client recv"
        >> V1
        << "count header 1 refused"
        << "end client by RST: client_refused"
    ).play()
    assert life.detail == f"the header names {FAR}: one of this host's own addresses"
    assert (life.client, life.upstream) == (None, None)
    assert life.header is not None  # what it claimed is on record


def test_a_loop_is_refused() -> None:
    life = (Playbook(dst=Endpoint("10.9.1.1", 15006)) << "end client by RST: loop").play()
    assert "10.9.1.1:15006" in life.detail


def test_a_loop_behind_a_header() -> None:
    (
        Playbook(policy="require", dst=Endpoint("10.9.1.1", 15006))
        << "client recv"
        >> V1
        << "count header 1 refused"
        << "end client by RST: loop"
    ).play()


def test_overload() -> None:
    life = (Playbook(full=True) << "end client by RST: overload").play()
    assert life.detail == "max_connections = 7"


def test_gone_before_we_know_where_it_went() -> None:
    gone = OSError(errno.EINVAL, "Invalid argument")
    life = (Playbook(dst=gone) << "end client by RST: internal").play()
    assert "Invalid argument" in life.detail


# Families -----------------------------------------------------------------------------------------

APP6 = Endpoint("fd00::1", 80)


def test_a_v4_client_of_a_v6_upstream() -> None:
    life = (
        Playbook(policy="require", peer=Endpoint("fd00::9", 40000), dst=APP6)
        << "client recv"
        >> V1
        << "count header 1 accepted"
        << "count fallback family"
        << dials("", to=str(APP6), v=6)
        << "relay"
        >> FIN
        << ENDED
    ).play()
    assert life.client == FAR
    assert life.fallback == "family"
    assert life.source == Endpoint("fd00::1", 45678)


def test_a_v6_client_of_a_v4_upstream() -> None:
    life = (
        Playbook(policy="require")
        << "client recv"
        >> b"PROXY TCP6 2001:db8::7 fd00::1 51234 80\r\n"
        << "count header 1 accepted"
        << "count fallback family"
        << dials("")
        << "relay"
        >> FIN
        << ENDED
    ).play()
    assert life.client == Endpoint("2001:db8::7", 51234)


def test_v6_all_the_way() -> None:
    life = (
        Playbook(peer=Endpoint("fd00::9", 40000), dst=APP6)
        << dials(f"[fd00::9]:{rotate(40000)}", to="[fd00::1]:80", v=6)
        << "relay"
        >> FIN
        << ENDED
    ).play()
    assert life.fallback == ""


def test_a_mapped_client_is_folded() -> None:
    life = (
        Playbook(policy="require")
        << "client recv"
        >> b"PROXY TCP6 ::ffff:106.52.131.116 ::ffff:10.9.1.1 51234 80\r\n"
        << "count header 1 accepted"
        << dials(AS_FAR)
        << "relay"
        >> FIN
        << ENDED
    ).play()
    assert life.client == FAR


# Connecting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ECONNREFUSED, "upstream_refused"),
        (errno.ETIMEDOUT, "upstream_timeout"),
        (errno.ECONNRESET, "upstream_reset"),
        (errno.ENETUNREACH, "upstream_unreachable"),
        (errno.EHOSTUNREACH, "upstream_unreachable"),
        (errno.EACCES, "upstream_unreachable"),
        (errno.EPERM, "upstream_unreachable"),
        (errno.EAFNOSUPPORT, "internal"),
    ],
)
def test_a_connect_that_fails(code: int, reason: str) -> None:
    life = (
        Playbook()
        << "socket IPv4 as client"
        << f"bind {AS_PEER}"
        << f"connect {APP}"
        >> code
        << "close upstream"
        << f"end client by RST: {reason}"
    ).play()
    assert os.strerror(code) in life.detail
    assert life.upstream == APP  # where we tried to go is on record,
    assert life.source is None  # and that nobody was reached


def test_a_connect_that_takes_too_long() -> None:
    book = (
        Playbook()
        << "socket IPv4 as client"
        << f"bind {AS_PEER}"
        << f"connect {APP}"
        >> errno.EINPROGRESS
        << f"connect {APP}"
        >> errno.EALREADY
        << f"who holds {APP} <- {AS_PEER}"
        >> 0
        << "wait for upstream until 0.05"
        >> False
        << f"connect {APP}"
        >> errno.EALREADY
        << f"who holds {APP} <- {AS_PEER}"
        >> 0
        << "wait for upstream until 5"
        >> False
        << f"connect {APP}"
        >> errno.EALREADY
        << "close upstream"
        << "end client by RST: upstream_timeout"
    )
    book.play()
    assert book.connect_seconds == []


def test_how_long_a_connect_took_is_counted() -> None:
    book = (
        Playbook(source="proxy")
        << "socket IPv4 as proxy"
        << f"connect {APP}"
        >> errno.EINPROGRESS
        << f"connect {APP}"
        >> errno.EALREADY
        << "wait for upstream until 5"
        >> Passed(1.25)
        << f"connect {APP}"
        >> 0
        << "relay"
        >> FIN
        << ENDED
    )
    book.play()
    assert book.connect_seconds == [1.25]


def test_no_socket_for_the_upstream() -> None:
    life = (
        Playbook()
        << "socket IPv4 as client"
        >> OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        << "end client by RST: internal"
    ).play()
    assert "Too many open files" in life.detail


def test_every_source_port_is_taken() -> None:
    book = Playbook()
    port = rotate(PEER.port)
    for _ in range(8):
        book << "socket IPv4 as client" << f"bind {PEER.host}:{port}"
        book >> OSError(errno.EADDRINUSE, "in use") << "close upstream" << "count port in_use"
        port = 1024 + (port - 1024 + 39869) % 64512
    for _ in range(3):
        book << "count port kernel_choice" << "socket IPv4 as client" << "leave the port to connect"
        book << f"bind {PEER.host}:0" << f"connect {APP}" >> errno.EADDRNOTAVAIL
        book << "close upstream" << "count port not_available"
    life = (book << "end client by RST: no_source_port").play()
    assert PEER.host in life.detail


# Ended from outside -------------------------------------------------------------------------------


def test_cut_while_the_header_is_awaited() -> None:
    life = (
        Playbook(policy="require")
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> Cut(CloseReason.DRAIN_TIMEOUT)
        << "end client by RST: drain_timeout"
    ).play()
    assert life.detail == "from outside"


def test_cut_while_connecting() -> None:
    (
        Playbook(source="proxy")
        << lines("socket IPv4 as proxy", (f"connect {APP}", errno.EINPROGRESS))
        << lines((f"connect {APP}", errno.EALREADY))
        << "wait for upstream until 5"
        >> Cut(CloseReason.DRAIN_TIMEOUT)
        << "close upstream"
        << "end client by RST: drain_timeout"
    ).play()


def test_a_bug_of_ours_leaves_a_record_too() -> None:
    """Anything that nobody expected is told upwards, and the connection still ends in order."""
    book = Playbook(dst=Endpoint("not an address", 80))
    book.client.local = None  # the fake's assertion stands for any exception
    with pytest.raises(AssertionError, match="has no name yet"):
        (book << "end client by RST: internal").play()
    assert [life.reason for life in book.lives] == [CloseReason.INTERNAL]
    assert book.client.closed


# The playbook itself is strict --------------------------------------------------------------------


def test_a_call_that_is_not_written_fails() -> None:
    book = Playbook() << "socket IPv4 as client" << f"connect {APP}" >> 0
    with pytest.raises(AssertionError, match=r"(?s)<< socket IPv4 as client.*!! bind 10\.9\.1\.2"):
        book.play()


def test_a_line_that_does_not_happen_fails() -> None:
    book = Playbook() << dials(AS_PEER) << "relay" >> FIN << ENDED << "close upstream"
    with pytest.raises(AssertionError, match=r"(?s)has ended.*still written: << close upstream"):
        book.play()
