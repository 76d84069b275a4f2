"""How the life of a connection begins: its header, and what comes with it.

Told as conversations (playbook.py): no socket, no clock, no kernel. Every playbook also holds for
itself that there is exactly one record and that both streams are closed exactly once.
"""

from __future__ import annotations

import errno

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import SendTlvs
from tproxyd.configfile import LARGEST_HEADER
from tproxyd.errors import CloseReason
from tproxyd.flow.announce import Announcement
from tproxyd.flow.proxyproto import V2_SIGNATURE, encode_v2
from tproxyd.flow.tlv import Tlv
from tproxyd.tests.playbook import (
    APP,
    AS_FAR,
    AS_PEER,
    ENDED,
    EOF,
    FAR,
    FIN,
    NOTHING,
    PEER,
    RESET,
    V1,
    V2,
    Passed,
    Playbook,
    dials,
    rotate,
)
from tproxyd.tests.tcpmodel import Outcome

# Peers that nobody trusts -------------------------------------------------------------------------


def test_a_plain_connection_is_made_as_its_client() -> None:
    life = (Playbook() << dials(AS_PEER) << "relay" >> FIN << ENDED).play()
    assert (life.client, life.peer) == (PEER, PEER)
    assert (life.dst, life.upstream) == (APP, APP)
    assert life.source == Endpoint(PEER.host, rotate(PEER.port))
    assert (life.received, life.sent, life.header, life.detail) == (3, 5, None, "")


@pytest.mark.parametrize("data", [V1, V2, b"PROXY X\r\n", b"GET / HTTP/1.1\r\n", b"P"])
def test_what_an_untrusted_peer_sends_is_payload(data: bytes) -> None:
    """A forged header too: it is neither waited for, nor looked at, nor counted."""
    life = (
        Playbook()
        << "client recv"
        >> data
        << dials(AS_PEER)
        << f"relay, first {data!r}"
        >> FIN
        << ENDED
    ).play()
    assert life.header is None
    assert life.client == PEER


@pytest.mark.parametrize("data", [NOTHING, EOF])
def test_an_untrusted_peer_is_not_waited_for(data: object) -> None:
    (Playbook() << "client recv" >> data << dials(AS_PEER) << "relay" >> FIN << ENDED).play()


def test_an_untrusted_peer_that_is_gone_already() -> None:
    """The application never hears of it."""
    life = (Playbook() << "client recv" >> RESET << "end client by RST: downstream_reset").play()
    assert life.detail == "Connection reset by peer"


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


@pytest.mark.parametrize("policy", ["optional", "reject"])
@pytest.mark.parametrize("said", [b"P", b"\r\n"])
def test_what_may_begin_a_signature_and_goes_no_further_is_payload(
    policy: str, said: bytes
) -> None:
    """Somebody presses Enter, and waits for the application's answer."""
    (
        Playbook(policy=policy)
        << "client recv"
        >> said
        << "client recv"
        >> NOTHING
        << "wait for client until 5"
        >> False
        << "count header - absent"
        << dials(AS_PEER)
        << f"relay, first {said!r}"
        >> FIN
        << ENDED
    ).play()


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


# PROXY headers out --------------------------------------------------------------------------------

FIN_NAMED = Outcome(CloseReason.DOWNSTREAM_FIN, "", 100_000, 5, aborted=False)
SAID = f"PROXY TCP4 {PEER.host} {APP.host} {PEER.port} {APP.port}\r\n".encode()


@pytest.mark.parametrize("data", [b"", b"GET /"])
def test_a_header_goes_ahead_of_the_payload(data: bytes) -> None:
    """In the first segment, together with what is at hand; and it is not counted as payload."""
    done = Outcome(CloseReason.DOWNSTREAM_FIN, "", len(SAID) + 5, 7, aborted=False)
    book = Playbook(send_proxy="v1") << "client recv" >> (data or NOTHING) << dials(AS_PEER)
    life = (book << f"relay, first {SAID + data!r}" >> done << ENDED).play()
    assert (life.received, life.sent) == (5, 7)
    assert life.announced == Announcement(1)


def test_a_header_that_was_not_even_delivered() -> None:
    done = Outcome(CloseReason.UPSTREAM_RESET, "", 3, 0, aborted=True)
    book = Playbook(send_proxy="v1") << dials(AS_PEER) << f"relay, first {SAID!r}" >> done
    life = (book << "end both by RST: upstream_reset").play()
    assert life.received == 0


def test_a_client_that_was_named_is_named_again() -> None:
    book = Playbook(policy="require", send_proxy="v1") << "client recv" >> V1 + b"hello"
    book << "count header 1 accepted" << dials(AS_FAR)
    (book << f"relay, first {V1 + b'hello'!r}" >> FIN_NAMED << ENDED).play()


def test_tlvs_that_do_not_fit_are_counted() -> None:
    big = encode_v2(FAR, APP, [Tlv(0xE0, bytes(65_000))])
    book = Playbook(
        policy="require",
        send_proxy="v2",
        send_tlvs=SendTlvs(forward=None, own=((0xE4, bytes(1000)),)),
        max_header_bytes=LARGEST_HEADER,
    )
    book << "client recv" >> big << "count header 2 accepted" << dials(AS_FAR)
    sent = encode_v2(FAR, APP, [Tlv(0xE4, bytes(1000))])
    (book << "count left out 1" << f"relay, first {sent!r}" >> FIN_NAMED << ENDED).play()


def test_nothing_was_said_to_an_upstream_that_was_never_there() -> None:
    book = Playbook(send_proxy="v1") << "socket IPv4 as client" << f"bind {AS_PEER}"
    book << f"connect {APP}" >> errno.ECONNREFUSED << "close upstream"
    life = (book << "end client by RST: upstream_refused").play()
    assert life.announced is None
