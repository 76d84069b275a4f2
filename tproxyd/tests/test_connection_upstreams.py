"""The life of a connection whose listener has a list of upstreams; told as in test_connection."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.config import Listener
from tproxyd.errors import CloseReason
from tproxyd.tests.playbook import (
    AS_PEER,
    ENDED,
    FIN,
    PEER,
    V1,
    Cut,
    Passed,
    Playbook,
    dials,
    lines,
)

A, B, C = (Endpoint(f"10.0.0.{n}", 80) for n in (1, 2, 3))
HERE = Endpoint("10.0.0.8", 80)
UNIX = Endpoint("/run/app:1.sock", 0)
ELSEWHERE = ", elsewhere"
REFUSED = errno.ECONNREFUSED


def gateway(*upstreams: Endpoint, source: str = "proxy", **more: Any) -> Playbook:  # noqa: ANN401
    options = {"name": "web", "bind": "*", "port": 8000, "eject_after": 0, **more}
    listener = Listener(upstream=upstreams, **options)
    return Playbook(
        source=source,
        dst=Endpoint("10.9.1.1", 8000),
        own=(listener,),
        kinds={HERE.host: "own"},
        listener=listener,
        upstreams=upstreams,
    )


def tries(upstream: Endpoint, code: int) -> list[Any]:
    return [*dials("", str(upstream), code=code, where=ELSEWHERE), *lines("close upstream")]


def reaches(upstream: Endpoint) -> list[Any]:
    return [*dials("", str(upstream), where=ELSEWHERE), *lines(("relay", FIN), ENDED)]


def test_an_ordinary_connection() -> None:
    life = (gateway(A) << reaches(A)).play()
    assert (life.upstream, life.dst, life.tried) == (A, Endpoint("10.9.1.1", 8000), ())


def test_the_next_one_is_tried() -> None:
    book = gateway(A, B, C) << tries(A, REFUSED) << "count retry" << tries(B, errno.EHOSTUNREACH)
    life = (book << "count retry" << reaches(C)).play()
    assert life.upstream == C
    assert [upstream for upstream, _ in life.tried] == [A, B]
    assert life.tried[0][1] == "connect to 10.0.0.1:80: Connection refused"


def test_each_has_a_time_of_its_own() -> None:
    book = gateway(A, B)
    book << lines("socket IPv4 as proxy, elsewhere", (f"connect {A}", errno.EINPROGRESS))
    book << lines(("wait for upstream until 5", False), (f"connect {A}", errno.EALREADY))
    book << lines("close upstream", "count retry", "socket IPv4 as proxy, elsewhere")
    book << lines((f"connect {B}", errno.EINPROGRESS), ("wait for upstream until 10", True))
    life = (book << lines((f"connect {B}", 0), ("relay", FIN), ENDED)).play()
    assert life.tried[0][1].endswith(os.strerror(errno.ETIMEDOUT))


def test_no_more_attempts_than_allowed() -> None:
    book = gateway(A, B, C, max_connect_attempts=2)
    book << tries(A, REFUSED) << "count retry" << tries(B, REFUSED)
    life = (book << "end client by RST: upstream_refused").play()
    assert life.upstream == B
    assert life.detail == "connect to 10.0.0.2:80: Connection refused"


def test_none_is_tried_twice() -> None:
    book = gateway(A, max_connect_attempts=5) << tries(A, REFUSED)
    (book << "end client by RST: upstream_refused").play()


def test_one_that_fails_is_left_out_and_comes_back() -> None:
    book = gateway(A, eject_after=1) << tries(A, REFUSED) << f"eject {A} for 1"
    (book << "end client by RST: upstream_refused").play()
    again = gateway(A, eject_after=1)
    assert again.cluster is not None
    member = again.cluster.choose(Client(PEER), (), 0.0)
    assert member is not None
    assert again.cluster.failed(member, Client(PEER), 0.0) == 1.0
    again.clock = 1.0
    again << dials("", str(A), where=ELSEWHERE) << f"{A} is back"
    (again << lines(("relay", FIN), ENDED)).play()


def test_nobody_to_ask() -> None:
    book = gateway(A)
    assert book.cluster is not None
    book.cluster.replace([])
    life = (book << "end client by RST: no_upstream").play()
    assert life.upstream is None


def test_as_the_client_toward_another_host() -> None:
    book = gateway(A, source="client") << dials(AS_PEER, str(A), where=ELSEWHERE)
    life = (book << lines(("relay", FIN), ENDED)).play()
    assert life.asked() == life.source


def test_with_the_clients_own_port() -> None:
    book = gateway(A, source="client-port") << dials(str(PEER), str(A), where=ELSEWHERE)
    life = (book << lines(("relay", FIN), ENDED)).play()
    assert life.source == life.asked() == PEER


def test_the_clients_own_port_is_taken() -> None:
    """By an earlier connection to the same backend, in TIME_WAIT: the port is another, not more."""
    book = gateway(A, source="client-port")
    book << dials(str(PEER), str(A), code=errno.EADDRNOTAVAIL, where=ELSEWHERE)
    book << lines("close upstream", "count port not_available")
    book << dials(AS_PEER, str(A), where=ELSEWHERE) << lines(("relay", FIN), ENDED)
    life = book.play()
    assert life.asked() == PEER != life.source


def test_a_port_that_is_only_roots() -> None:
    client = Endpoint(PEER.host, 1023)
    book = gateway(A, source="client-port")
    book.peer = Client(client)  # type: ignore[assignment]
    book << lines("socket IPv4 as client, elsewhere", (f"bind {client}", PermissionError(13, "")))
    book << lines("close upstream", "count port privileged")
    book << dials(f"{PEER.host}:31023", str(A), where=ELSEWHERE) << lines(("relay", FIN), ENDED)
    book.play()


def test_an_upstream_on_this_host() -> None:
    """Its answers come home by our mark, as in a sidecar."""
    (gateway(HERE, source="client") << dials(AS_PEER, str(HERE)) << "relay" >> FIN << ENDED).play()


def test_an_upstream_that_is_our_own_listener() -> None:
    """No further one is tried: this is a mistake to be found, not an outage."""
    own = Endpoint(HERE.host, 8000)
    life = (gateway(own, A) << "end client by RST: loop").play()
    assert life.detail == "the upstream 10.0.0.8:8000 is our own listener"


def test_another_address_of_this_host_on_the_port_of_our_own() -> None:
    """In front of an application on 127.0.0.1:443, say, bound to 443 of the public one."""
    there = Endpoint(HERE.host, 8000)
    book = gateway(there, bind="10.9.1.1") << dials("", str(there))
    (book << lines(("relay", FIN), ENDED)).play()


def test_a_unix_socket() -> None:
    book = gateway(UNIX) << lines("socket unix as proxy", (f"connect {UNIX}", 0))
    life = (book << lines(("relay", FIN), ENDED)).play()
    assert life.source is None
    assert life.upstream == UNIX


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOENT, "upstream_unreachable"),
        (errno.EACCES, "upstream_unreachable"),
        (errno.ECONNREFUSED, "upstream_refused"),
    ],
)
def test_a_unix_socket_that_does_not_answer(code: int, reason: str) -> None:
    book = gateway(UNIX) << lines("socket unix as proxy", (f"connect {UNIX}", code))
    (book << "close upstream" << f"end client by RST: {reason}").play()


def test_a_unix_socket_whose_queue_is_full_is_waited_for() -> None:
    full = (f"connect {UNIX}", errno.EAGAIN)
    book = gateway(UNIX) << lines("socket unix as proxy", full)
    book << lines(("wait for client until 0.05", Passed(0.05, happened=False)), full)
    book << lines(("wait for client until 0.1", Passed(0.01)), (f"connect {UNIX}", 0))
    (book << lines(("relay", FIN), ENDED)).play()


def test_and_not_longer_than_for_any_other() -> None:
    full = (f"connect {UNIX}", errno.EAGAIN)
    book = gateway(UNIX, connect_timeout_s=0.06) << lines("socket unix as proxy", full)
    book << lines(("wait for client until 0.05", Passed(0.05, happened=False)), full)
    book << lines(("wait for client until 0.06", Passed(0.01, happened=False)), full)
    (book << "close upstream" << "end client by RST: upstream_timeout").play()


def test_no_free_port_says_nothing_about_the_upstream() -> None:
    book = gateway(A, B, eject_after=1)
    book << tries(A, errno.EADDRNOTAVAIL) << "count retry" << reaches(B)
    book.play()


def test_cut_while_it_connects() -> None:
    """A drain deadline: the books of the cluster are right afterwards."""
    book = gateway(A)
    book << lines("socket IPv4 as proxy, elsewhere", (f"connect {A}", errno.EINPROGRESS))
    book << "wait for upstream until 5" >> Cut(CloseReason.DRAIN_TIMEOUT)
    book << "close upstream" << "end client by RST: drain_timeout"
    book.play()
    assert book.cluster is not None
    assert book.cluster._members[Upstream(A)].open == 0


def test_the_header_that_is_sent_on_names_our_own_listener() -> None:
    """It is what the client connected to."""
    book = Playbook(
        source="proxy",
        dst=Endpoint("10.9.1.1", 8000),
        listener=Listener(name="web", bind="*", port=8000, upstream=(A,)),
        upstreams=(A,),
        send_proxy="v1",
    )
    header = b"PROXY TCP4 10.9.1.2 10.9.1.1 40000 8000\r\n"
    book << dials("", str(A), where=ELSEWHERE)
    (book << lines((f"relay, first {header!r}", FIN), ENDED)).play()


@pytest.mark.parametrize("policy", [None, "require"])
def test_a_limit_of_the_client(policy: str | None) -> None:
    """It is the client's that the header names, not its balancer's."""
    book = Playbook(policy=policy, full_for="max_connections = 3")
    if policy:
        book << "client recv" >> V1 << "count header 1 accepted"
    life = (book << "end client by RST: client_overload").play()
    who = "106.52.131.116" if policy else PEER.host
    assert life.detail == f"max_connections = 3 for {who}"
    assert life.client is not None
    assert life.client.host == who
