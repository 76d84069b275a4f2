"""Which source ports are tried, and what each answer of the kernel leads to."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.errors import UpstreamError
from tproxyd.flow.connect import ATTEMPTS, Dialled, Sockets, dial, source_port
from tproxyd.flow.policy import Plan
from tproxyd.linux import (
    CAP_NET_RAW,
    IP_BIND_ADDRESS_NO_PORT,
    SO_MARK,
    TCP_LISTEN,
    TCP_NEW_SYN_RECV,
    TCP_SYN_RECV,
    capabilities,
)
from tproxyd.tests.playbook import APP, KERNEL_PORT, PEER, Passed, Playbook, dials, lines, rotate

TCP_ESTABLISHED, TCP_TIME_WAIT, TCP_CLOSE_WAIT = 1, 6, 8

PLAN = Plan(Client(PEER), Upstream(APP), spoof=True)
OWN = Plan(Client(PEER), Upstream(APP), spoof=False)


def source_ports(client_port: int) -> list[int]:
    return [source_port(client_port, attempt) for attempt in range(ATTEMPTS)]


PORTS = source_ports(PEER.port)
FIRST, SECOND = (f"{PEER.host}:{port}" for port in PORTS[:2])


def dialling(plan: Plan, book: Playbook) -> Dialled:
    return book.drive(dial(plan, 5.0, book.client, book))


def port_of(dialled: Dialled) -> int:
    assert dialled.source is not None
    return dialled.source.port


def tried(source: str, code: int, *then: str) -> list[Any]:
    return lines(
        "socket IPv4 as client",
        f"bind {source}",
        (f"connect {APP}", code),
        "close upstream",
        *then,
    )


def unfinished(source: str) -> list[Any]:
    return lines(
        "socket IPv4 as client",
        f"bind {source}",
        (f"connect {APP}", errno.EINPROGRESS),
        (f"connect {APP}", errno.EALREADY),
    )


def asks(source: str, state: int) -> list[Any]:
    return lines((f"who holds {APP} <- {source}", state))


STILL = lines((f"connect {APP}", errno.EALREADY))


# The choice of ports ------------------------------------------------------------------------------


def test_the_rotation_is_a_bijection() -> None:
    ports = range(1024, 65536)
    assert sorted(map(rotate, ports)) == list(ports)


def test_the_rotation_leaves_the_ranges_that_clients_use() -> None:
    for low, high in ((32768, 60999), (49152, 65535)):  # Linux, IANA
        assert not any(low <= rotate(port) <= high for port in range(low, high + 1))


def test_the_rotation_is_not_its_own_inverse() -> None:
    """Else a client on p and one on rotate(p) would each hold the other's tuple, for good."""
    assert not any(rotate(rotate(port)) == port for port in range(1024, 65536))


def test_privileged_ports_rotate_into_the_unprivileged() -> None:
    assert all(rotate(port) >= 1024 for port in range(1024))


@given(st.integers(1, 65535))
def test_what_is_tried(client_port: int) -> None:
    ports = source_ports(client_port)
    own = list(takewhile(bool, ports))
    assert own[0] == rotate(client_port)
    assert client_port not in own
    assert len(set(own)) == len(own) == 8
    assert all(1024 <= port <= 65535 for port in own)
    assert ports[len(own) :] == [0, 0, 0]  # and then the kernel's choice, a few times


def test_no_clients_own_port_is_ever_tried() -> None:
    assert not any(port in source_ports(port) for port in range(1, 65536))


# One try after the other --------------------------------------------------------------------------


def test_the_first_port() -> None:
    dialled = dialling(PLAN, Playbook() << dials(FIRST))
    assert dialled.source == Endpoint(PEER.host, rotate(PEER.port))


def test_a_local_upstream_is_there_at_the_second_connect() -> None:
    book = Playbook() << "socket IPv4 as client" << f"bind {FIRST}"
    book << f"connect {APP}" >> errno.EINPROGRESS << f"connect {APP}" >> 0
    assert dialling(PLAN, book).source == Endpoint(PEER.host, PORTS[0])


@pytest.mark.parametrize(
    ("code", "cause"),
    [(errno.EADDRINUSE, "in_use"), (errno.EADDRNOTAVAIL, "not_available")],
)
def test_bind_refuses_a_port(code: int, cause: str) -> None:
    book = Playbook() << "socket IPv4 as client" << f"bind {FIRST}" >> OSError(code, "")
    dialled = dialling(PLAN, book << "close upstream" << f"count port {cause}" << dials(SECOND))
    assert port_of(dialled) == PORTS[1]


@pytest.mark.parametrize("code", [errno.EADDRNOTAVAIL, errno.EADDRINUSE])
def test_connect_refuses_a_port(code: int) -> None:
    book = Playbook() << tried(FIRST, code, "count port not_available") << dials(SECOND)
    assert port_of(dialling(PLAN, book)) == PORTS[1]


def test_bind_fails_in_a_way_that_no_other_port_cures() -> None:
    book = Playbook() << "socket IPv4 as client" << f"bind {FIRST}"
    with pytest.raises(OSError, match="not permitted"):
        dialling(PLAN, book >> OSError(errno.EPERM, "not permitted") << "close upstream")


def test_the_kernel_chooses_at_last() -> None:
    book = Playbook()
    for port in PORTS[:8]:
        source = f"{PEER.host}:{port}"
        book << tried(source, errno.EADDRNOTAVAIL, "count port not_available")
    book << "socket IPv4 as client" << "count port kernel_choice" << "leave the port to connect"
    dialled = dialling(PLAN, book << f"bind {PEER.host}:0" << f"connect {APP}" >> 0)
    assert dialled.source == Endpoint(PEER.host, KERNEL_PORT)


def test_the_proxys_own_address_has_one_try() -> None:
    book = Playbook() << "socket IPv4 as proxy" << f"connect {APP}" >> errno.EADDRNOTAVAIL
    with pytest.raises(UpstreamError, match="no_source_port"):
        dialling(OWN, book << "close upstream")


def test_the_proxys_own_address_is_not_looked_up() -> None:
    """The kernel never gives us a tuple that is in use, unless we ask for it by bind."""
    book = Playbook() << "socket IPv4 as proxy"
    book << f"connect {APP}" >> errno.EINPROGRESS << STILL
    book << "wait for upstream until 5" >> True << f"connect {APP}" >> errno.EISCONN
    assert dialling(OWN, book).source == Endpoint("10.9.1.1", KERNEL_PORT)


# A tuple that another connection holds ------------------------------------------------------------


@pytest.mark.parametrize("state", [TCP_ESTABLISHED, TCP_CLOSE_WAIT, TCP_TIME_WAIT])
def test_a_held_tuple_is_left_alone(state: int) -> None:
    book = Playbook() << unfinished(FIRST) << asks(FIRST, state) << STILL << "close upstream"
    dialled = dialling(PLAN, book << "count port live_downstream" << dials(SECOND))
    assert port_of(dialled) == PORTS[1]


def test_the_connection_that_holds_the_tuple_may_be_our_own() -> None:
    """The handshake may end between connect and the look-up. We are connected before the
    application's side is, so one more connect tells the two apart."""
    book = Playbook() << unfinished(FIRST) << asks(FIRST, TCP_ESTABLISHED)
    assert port_of(dialling(PLAN, book << f"connect {APP}" >> 0)) == PORTS[0]


@pytest.mark.parametrize("state", [TCP_ESTABLISHED, TCP_CLOSE_WAIT, TCP_TIME_WAIT])
def test_one_that_nat_has_redirected_is_behind_the_door(state: int) -> None:
    """Of the tuple itself nobody knows then; the rule that dropped our SYN does, by conntrack."""
    door = Endpoint("10.9.1.1", 15006)
    book = Playbook() << unfinished(FIRST) << asks(FIRST, 0)
    book << f"who holds {door} <- {FIRST}" >> state << STILL << "close upstream"
    dialled = dialling(
        PLAN._replace(door=door), book << "count port live_downstream" << dials(SECOND)
    )
    assert port_of(dialled) == PORTS[1]


@pytest.mark.parametrize("state", [0, TCP_LISTEN, TCP_SYN_RECV, TCP_NEW_SYN_RECV])
def test_where_a_syn_belongs_it_is_waited_for(state: int) -> None:
    book = Playbook() << unfinished(FIRST) << asks(FIRST, state)
    book << "wait for upstream until 0.05" >> Passed(0.01) << f"connect {APP}" >> 0
    assert port_of(dialling(PLAN, book)) == PORTS[0]


def test_the_second_look() -> None:
    """The connection in the way was still in its handshake at the first."""
    book = Playbook() << unfinished(FIRST) << asks(FIRST, TCP_SYN_RECV)
    book << "wait for upstream until 0.05" >> False << STILL
    book << asks(FIRST, TCP_ESTABLISHED) << STILL << "close upstream"
    dialled = dialling(PLAN, book << "count port live_downstream" << dials(SECOND))
    assert port_of(dialled) == PORTS[1]


def test_events_do_not_use_up_the_second_look() -> None:
    """An event may be the client's: its socket is watched since its header was read."""
    book = Playbook() << unfinished(FIRST) << asks(FIRST, TCP_SYN_RECV)
    for _ in range(3):
        book << "wait for upstream until 0.05" >> Passed(0.01) << STILL
    book << "wait for upstream until 0.05" >> False << STILL
    book << asks(FIRST, TCP_ESTABLISHED) << STILL << "close upstream"
    dialled = dialling(PLAN, book << "count port live_downstream" << dials(SECOND))
    assert port_of(dialled) == PORTS[1]


def test_there_is_no_third_look() -> None:
    book = Playbook() << unfinished(FIRST) << asks(FIRST, 0)
    book << "wait for upstream until 0.05" >> False << STILL << asks(FIRST, 0)
    for _ in range(3):
        book << "wait for upstream until 5" >> Passed(0.5) << STILL
    book << "wait for upstream until 5" >> True << f"connect {APP}" >> 0
    assert port_of(dialling(PLAN, book)) == PORTS[0]


def test_the_deadline_is_one_for_all_tries() -> None:
    book = Playbook()
    book << unfinished(FIRST) << asks(FIRST, 0)
    book << "wait for upstream until 0.05" >> Passed(4.98, happened=False) << STILL
    book << asks(FIRST, TCP_ESTABLISHED) << STILL << "close upstream"
    book << "count port live_downstream" << unfinished(SECOND) << asks(SECOND, 0)
    book << "wait for upstream until 5" >> False << STILL << "close upstream"
    with pytest.raises(UpstreamError, match="upstream_timeout"):
        dialling(PLAN, book)
    assert book.clock == 5.0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ECONNREFUSED, "upstream_refused"),
        (errno.ETIMEDOUT, "upstream_timeout"),
        (errno.EHOSTUNREACH, "upstream_unreachable"),
        (errno.ECONNRESET, "upstream_reset"),
    ],
)
def test_the_answer_comes_later(code: int, reason: str) -> None:
    book = Playbook() << unfinished(FIRST) << asks(FIRST, 0)
    book << "wait for upstream until 0.05" >> True << f"connect {APP}" >> code
    with pytest.raises(UpstreamError, match=f"{reason}: .*{os.strerror(code)}"):
        dialling(PLAN, book << "close upstream")


def test_an_end_that_no_other_port_cures_is_not_tried_again() -> None:
    with pytest.raises(UpstreamError, match="upstream_refused"):
        dialling(PLAN, Playbook() << tried(FIRST, errno.ECONNREFUSED))


# Real sockets -------------------------------------------------------------------------------------

needs_raw = pytest.mark.skipif(
    CAP_NET_RAW not in capabilities(), reason="needs CAP_NET_RAW: run as root"
)


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets(0x539)
    yield sockets
    sockets.finish()


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def plan_to(host: str, **how: Any) -> Plan:  # noqa: ANN401
    return Plan(Client(PEER), Upstream(Endpoint(host, 80)), **how)


@needs_raw
def test_a_spoofed_socket(host: str, sockets: Sockets) -> None:
    v6 = ":" in host
    with closing(sockets.upstream_socket(plan_to(host, spoof=True))) as sock:
        foreign = "2001:db8::7" if v6 else "203.0.113.7"
        sock.bind((foreign, 0))  # only IP_TRANSPARENT allows that
        assert sock.getsockname()[0] == foreign
        assert sock.getsockopt(socket.SOL_SOCKET, SO_MARK) == 0x539
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getblocking()
        assert not os.get_inheritable(sock.fileno())


def test_a_socket_of_the_proxys_own(host: str, sockets: Sockets) -> None:
    with closing(sockets.upstream_socket(plan_to(host, spoof=False))) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, SO_MARK) == 0
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_port_is_left_to_connect(host: str, sockets: Sockets) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as server,
        closing(sockets.upstream_socket(plan_to(host, spoof=False))) as sock,
    ):
        sockets.late_bind(sock)
        sock.bind((host, 0))
        assert sock.getsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT)
        assert sock.getsockname()[1] == 0  # not yet
        assert sock.connect_ex(server.getsockname()) in (0, errno.EINPROGRESS)
        assert sock.getsockname()[1] != 0


def test_who_holds_a_tuple(sockets: Sockets) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        local = Endpoint(*server.getsockname())
        with socket.create_connection(local) as client:
            remote = Endpoint(*client.getsockname())
            accepted = server.accept()[0]
            assert sockets.tuple_state(local, remote) == TCP_ESTABLISHED
            accepted.close()
        assert sockets.tuple_state(local, Endpoint("127.0.0.9", 9)) == TCP_LISTEN
    assert sockets.tuple_state(local, Endpoint("127.0.0.9", 9)) == 0
