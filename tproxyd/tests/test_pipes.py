"""Pipes between real sockets, and how few of them there are."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from tproxyd.flow.pipes import MAX_PIPES, PIPE_SIZE, Pipe, Pipes
from tproxyd.tests.loopback import pair


@pytest.fixture
def both(server: socket.socket) -> Iterator[tuple[socket.socket, ...]]:
    ends = (*pair(server), *pair(server))
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def lender() -> Iterator[Pipes]:
    lender = Pipes()
    yield lender
    lender.close()


def test_bytes_pass_through(both: tuple[socket.socket, ...], lender: Pipes) -> None:
    client, downstream, app, upstream = both
    pipe = lender.lease()
    assert pipe is not None
    with pytest.raises(BlockingIOError):
        pipe.fill(downstream)
    client.send(b"hello")
    assert pipe.fill(downstream) == pipe.held == 5
    assert pipe.drain(upstream) == 5
    assert pipe.held == 0
    app.setblocking(True)
    assert app.recv(10) == b"hello"
    client.close()
    downstream.setblocking(True)  # the end is known once a blocking look has seen it
    assert downstream.recv(1, socket.MSG_PEEK) == b""
    downstream.setblocking(False)
    assert pipe.fill(downstream) == 0
    lender.give_back(pipe)


def test_what_the_sink_has_no_room_for_stays(
    both: tuple[socket.socket, ...], lender: Pipes
) -> None:
    client, downstream, _, upstream = both
    pipe = lender.lease()
    assert pipe is not None
    client.setblocking(True)
    taken = 0

    def pass_on(pipe: Pipe) -> NoReturn:
        nonlocal taken
        while True:
            client.sendall(bytes(65536))
            pipe.fill(downstream)
            while pipe.held:
                taken += pipe.drain(upstream)

    with pytest.raises(BlockingIOError):
        pass_on(pipe)
    assert taken > 0
    assert 0 < pipe.held <= PIPE_SIZE
    lender.give_back(pipe)
    again = lender.lease()
    assert again is not None
    assert again.held == 0, "somebody else's bytes"
    lender.give_back(again)


def test_a_few_serve_all(lender: Pipes) -> None:
    leased = [lender.lease() for _ in range(MAX_PIPES)]
    assert None not in leased
    assert lender.lease() is None
    for pipe in filter(None, leased):
        lender.give_back(pipe)
    assert lender.lease() in leased
    assert len({id(pipe) for pipe in leased}) == MAX_PIPES


def test_where_no_more_are_to_be_had(lender: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is goes on serving, and the kernel is not asked again for a while."""
    first = lender.lease()
    assert first is not None
    asked: list[int] = []

    def none_left(*_: object) -> Any:  # noqa: ANN401
        asked.append(1)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", none_left)
        assert lender.lease() is lender.lease() is None
        assert asked == [1]
    monkeypatch.setattr(time, "monotonic", lambda: began + 60)
    again = lender.lease()
    assert again is not None
    lender.give_back(again)
    assert lender.lease() is again
    lender.give_back(again)
    lender.give_back(first)
    assert lender.lease() is first
    lender.give_back(first)


def test_a_pipe_that_may_not_be_large_is_not_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """EPERM: the user's share of pipe memory is used up."""

    def refuse(*_: object) -> Any:  # noqa: ANN401
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(PermissionError):
        Pipe()
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)
