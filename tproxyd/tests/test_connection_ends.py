"""How the life of a connection goes on, or comes to nothing: refusals, families, connecting.

Told as conversations (playbook.py), as in test_connection.py.
"""

from __future__ import annotations

import errno
import os

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import Listener
from tproxyd.errors import CloseReason
from tproxyd.tests.playbook import (
    APP,
    AS_FAR,
    AS_PEER,
    ENDED,
    FAR,
    FIN,
    NOTHING,
    PEER,
    V1,
    Cut,
    Passed,
    Playbook,
    dials,
    lines,
    rotate,
)

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


NO_FILE = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_no_socket_for_the_upstream_yet() -> None:
    """accept took the last one: the client waits for its own, whatever it sends meanwhile."""
    book = (
        Playbook()
        << "socket IPv4 as client"
        >> NO_FILE
        << "out of files"
        << "wait for client until 0.1"
        >> Passed(0.04)
        << "wait for client until 0.1"
        >> False
        << dials(AS_PEER)
        << "relay"
        >> FIN
        << ENDED
    )
    assert book.play().reason == "downstream_fin"


def test_no_socket_for_the_upstream_in_time() -> None:
    book = Playbook(listener=Listener(connect_timeout_s=0.15))
    for until in ("0.1", "0.15"):
        book << "socket IPv4 as client" >> NO_FILE << "out of files"
        book << f"wait for client until {until}" >> False
    book << "socket IPv4 as client" >> NO_FILE
    life = (book << "end client by RST: internal").play()
    assert "Too many open files" in life.detail


def test_a_socket_that_the_kernel_refuses() -> None:
    """There is nothing to wait for."""
    life = (
        Playbook()
        << "socket IPv4 as client"
        >> OSError(errno.EPERM, os.strerror(errno.EPERM))
        << "end client by RST: internal"
    ).play()
    assert "not permitted" in life.detail


def test_no_memory_for_the_upstream() -> None:
    """That connection ends, in order; a MemoryError has no words of its own."""
    life = (
        Playbook() << "socket IPv4 as client" >> MemoryError() << "end client by RST: internal"
    ).play()
    assert life.detail == "out of memory"


def test_every_source_port_is_taken() -> None:
    book = Playbook()
    port = rotate(PEER.port)
    for _ in range(8):
        book << "socket IPv4 as client" << f"bind {PEER.host}:{port}"
        book >> OSError(errno.EADDRINUSE, "in use") << "close upstream" << "count port in_use"
        port = 1024 + (port - 1024 + 39869) % 64512
    for _ in range(3):
        book << "socket IPv4 as client" << "count port kernel_choice" << "leave the port to connect"
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
