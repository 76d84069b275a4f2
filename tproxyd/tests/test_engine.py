"""The engine on a real uvloop, with real TCP over loopback: bytes, ends, deadlines, fairness.

Nothing here sleeps: a test waits for what it expects, and only a failure waits five seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from tproxyd.errors import CloseReason
from tproxyd.flow import pipes as pipes_module
from tproxyd.flow import relay as relay_module
from tproxyd.flow.engine import READ_AND_WRITE, Engine
from tproxyd.flow.pipes import PIPE_SIZE, Pipe
from tproxyd.flow.relay import BUFFER_SIZE, Direction, Limits, Relay
from tproxyd.flow.stream import Wait
from tproxyd.linux import reset_on_close
from tproxyd.tests.loopback import Alarm, MiB, Rig, pair, run, until
from tproxyd.tests.tcpmodel import Outcome


class Seen(Direction):
    """A handler that passes on what it is told."""

    def __init__(
        self, tell: Callable[[int], object] = int, go_on: Callable[[], object] = bool
    ) -> None:
        self.tell, self.then = tell, go_on

    def on_event(self, events: int) -> None:
        self.tell(events)

    def go_on(self) -> None:
        self.then()

    def cut(self, reason: CloseReason, detail: str) -> None:
        pass


def bug(*_: object) -> Any:  # noqa: ANN401
    raise ZeroDivisionError("of ours")


@pytest.fixture
def rig(engine: Engine, loop: asyncio.AbstractEventLoop, server: socket.socket) -> Iterator[Rig]:
    rig = Rig(engine, loop, server)
    yield rig
    rig.close()


# Relaying -----------------------------------------------------------------------------------------


def test_ten_megabytes_both_ways(rig: Rig) -> None:
    there, back = os.urandom(10 * MiB), os.urandom(10 * MiB)
    rig.engine.start(rig.walk())

    async def far(end: socket.socket, data: bytes) -> bytes:
        received = asyncio.ensure_future(rig.read_all(end))
        await rig.send(end, data)
        end.shutdown(socket.SHUT_WR)
        return await received

    async def scene() -> tuple[bytes, bytes, Outcome]:
        return await asyncio.gather(far(rig.client, there), far(rig.app, back), rig.outcome)

    at_client, at_app, outcome = rig.run(scene())
    assert hashlib.sha256(at_client).digest() == hashlib.sha256(back).digest()
    assert hashlib.sha256(at_app).digest() == hashlib.sha256(there).digest()
    assert (outcome.received, outcome.sent) == (10 * MiB, 10 * MiB)
    assert rig.engine._pipes._free, "all of it was copied"
    assert outcome.reason in (CloseReason.DOWNSTREAM_FIN, CloseReason.UPSTREAM_FIN)
    assert not outcome.aborted


@pytest.mark.parametrize("first", ["client", "app"])
def test_ten_megabytes_after_a_half_close(rig: Rig, first: str) -> None:
    one, other = (rig.client, rig.app)[:: 1 if first == "client" else -1]
    data = os.urandom(10 * MiB)
    rig.engine.start(rig.walk())

    async def scene() -> bytes:
        await rig.send(one, b"request")
        one.shutdown(socket.SHUT_WR)
        assert await rig.read_all(other) == b"request"  # up to its end, and only now comes
        received = asyncio.ensure_future(rig.read_all(one))
        await rig.send(other, data)
        other.shutdown(socket.SHUT_WR)
        return await received

    assert rig.run(scene()) == data
    outcome = rig.run(rig.outcome)
    assert outcome.reason == ("downstream_fin" if first == "client" else "upstream_fin")
    assert not outcome.aborted


def test_early_bytes_and_what_came_while_it_waited(rig: Rig) -> None:
    """The downstream socket is registered by the wait, and its edges are spent there."""
    rig.engine.start(rig.walk(early=b"one ", before=time.monotonic() + 5))
    rig.client.send(b"two")
    rig.client.shutdown(socket.SHUT_WR)
    assert rig.run(rig.read_all(rig.app)) == b"one two"
    rig.app.close()
    assert rig.run(rig.outcome).reason is CloseReason.DOWNSTREAM_FIN


@pytest.mark.parametrize(
    ("first", "reason"), [("client", "downstream_reset"), ("app", "upstream_reset")]
)
def test_rst_is_passed_on_as_rst(rig: Rig, first: str, reason: str) -> None:
    one, other = (rig.client, rig.app)[:: 1 if first == "client" else -1]
    rig.engine.start(rig.walk())
    reset_on_close(one)
    one.close()
    with pytest.raises(ConnectionResetError):
        rig.run(rig.read_all(other))
    outcome = rig.run(rig.outcome)
    assert outcome.reason == reason
    assert outcome.aborted


def test_rst_after_a_fin_is_not_overlooked(rig: Rig) -> None:
    """The application closes for good; what the client still says is answered with RST."""
    rig.engine.start(rig.walk())

    async def scene() -> Outcome:
        rig.app.close()
        assert await rig.read_all(rig.client) == b""
        await rig.send(rig.client, b"late")
        return await rig.outcome

    assert rig.run(scene()).reason is CloseReason.UPSTREAM_RESET
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        rig.run(rig.send(rig.client, bytes(64 * MiB)))


def test_a_torn_answer_does_not_look_whole(rig: Rig) -> None:
    """The reset is found by sending: recv then answers 0 behind the data, which is no end."""
    rig.client.send(b"request")
    rig.app.send(b"half an ans")
    reset_on_close(rig.app)
    rig.app.close()
    rig.engine.start(rig.walk())  # its first step is to send the request on
    with pytest.raises(ConnectionResetError):
        rig.run(rig.read_all(rig.client))
    outcome = rig.run(rig.outcome)
    assert outcome[:5] == (CloseReason.UPSTREAM_RESET, "", 0, 11, True)


def test_an_urgent_byte_holds_nothing_up(rig: Rig) -> None:
    """recv stops short of it, though more has come; telnet and FTP still send such bytes."""
    rig.engine.start(rig.walk())
    rig.engine.turn()
    for _ in range(3):
        rig.client.send(b"abc")
        rig.client.send(b"!", socket.MSG_OOB)
        rig.client.send(b"def")
        assert rig.run(rig.receive(rig.app, 6)) == b"abcdef"
    rig.close()
    rig.run(rig.outcome)


def test_a_stalled_reader_costs_one_buffer(rig: Rig) -> None:
    """The sender is stopped by its window; then the reader reads, and all of it is there."""
    rig.engine.start(rig.walk())
    data = os.urandom(64 * MiB)  # more than any send and receive buffer in between
    sender = asyncio.ensure_future(rig.send(rig.client, data), loop=rig.loop)
    way = rig.relay.up

    rig.run(until(lambda: way.rest and not rig.engine.turn()))
    held = way.rest.held if isinstance(way.rest, Pipe) else len(way.rest)
    assert 0 < held <= max(PIPE_SIZE, BUFFER_SIZE)
    assert not sender.done()

    async def the_rest() -> bytes:
        received = asyncio.ensure_future(rig.read_all(rig.app))
        await sender
        rig.client.shutdown(socket.SHUT_WR)
        return await received

    assert rig.run(the_rest()) == data
    rig.app.close()
    rig.run(rig.outcome)


def test_idle_connections_end(rig: Rig) -> None:
    rig.engine.start(rig.walk(Limits(0.05, 5.0)))
    outcome = rig.run(rig.outcome)
    assert outcome.reason is CloseReason.IDLE_TIMEOUT
    with pytest.raises(ConnectionResetError):
        rig.client.recv(1)


def test_half_closed_connections_end(rig: Rig) -> None:
    rig.engine.start(rig.walk(Limits(5.0, 0.05)))
    rig.client.shutdown(socket.SHUT_WR)
    assert rig.run(rig.outcome).reason is CloseReason.HALF_CLOSE_TIMEOUT


# Fairness -----------------------------------------------------------------------------------------


def test_a_task_that_comes_again_and_again_lets_others_live(
    engine: Engine, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events, timers and the loop itself have their turns in between; one turn asks for one."""
    done = loop.create_future()
    asked = tasks = 0
    call_soon = engine._ask_for_turn

    def again() -> None:
        nonlocal tasks
        tasks += 1
        if not done.done():
            engine.again(greedy)

    greedy = Seen(go_on=again)

    def counted() -> None:
        nonlocal asked
        asked += not engine._turn_asked
        call_soon()

    monkeypatch.setattr(engine, "_ask_for_turn", counted)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine.watch(ours, Seen(lambda events: events & select.EPOLLIN and done.cancel()))
        engine.again(greedy)
        loop.call_later(0.02, theirs.send, b"x")
        run(loop, until(done.done))
        engine.forget(ours)
    assert tasks > 10
    assert asked <= tasks + 1

    run(loop, until(lambda: not engine._again))


def test_turns_are_not_asked_for_twice(
    engine: Engine, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is asked for one when the engine leaves it something, not for every task."""
    asked = tasks = 0
    ask = engine._asked_turn

    def counted() -> None:
        nonlocal asked
        asked += 1
        ask()

    monkeypatch.setattr(engine, "_asked_turn", counted)

    def again() -> None:
        nonlocal tasks
        tasks += 1
        if tasks < 10_000:
            engine.again(greedy)

    greedy = Seen(go_on=again)

    engine.again(greedy)
    run(loop, until(lambda: not engine._again))
    assert tasks == 10_000
    assert 1 <= asked <= tasks / 4


@pytest.mark.parametrize(("pipe_size", "share"), [(0, 2 * 4096), (8192, 4096 + 8192)])
def test_a_small_message_overtakes_a_bulk_stream(
    engine: Engine,
    loop: asyncio.AbstractEventLoop,
    server: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    pipe_size: int,
    share: int,
) -> None:
    """Both are there before the engine looks: after one turn the small one is delivered whole,
    the bulk one has had its share and no more, whether it is copied or goes by pipe.
    """
    monkeypatch.setattr(relay_module, "BUFFER_SIZE", 4096)
    monkeypatch.setattr(pipes_module, "PIPE_SIZE", pipe_size)
    if not pipe_size:
        monkeypatch.setattr(engine, "lease_pipe", lambda: None)
    bulk, small = (Rig(engine, loop, server) for _ in range(2))
    for rig in (bulk, small):
        engine.start(rig.walk())
    bulk.client.setblocking(True)
    bulk.client.sendall(bytes(64 * 1024))
    small.client.send(b"ping")
    engine.turn()
    assert small.app.recv(10) == b"ping"
    assert len(bulk.app.recv(MiB)) == share
    for rig in (bulk, small):
        rig.close()
        rig.run(rig.outcome)


# Bugs and stale events ----------------------------------------------------------------------------


def test_a_bug_ends_one_connection_and_not_the_turn(
    engine: Engine,
    loop: asyncio.AbstractEventLoop,
    server: socket.socket,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pump = Relay.pump
    broken, sound = (Rig(engine, loop, server) for _ in range(2))
    for rig in (broken, sound):
        engine.start(rig.walk())
    monkeypatch.setattr(
        Relay,
        "pump",
        lambda relay, *a, **k: bug() if relay is broken.relay else pump(relay, *a, **k),
    )
    broken.client.send(b"x")
    sound.client.send(b"ping")
    with caplog.at_level(logging.ERROR):
        engine.turn()
    assert sound.app.recv(10) == b"ping"
    outcome = broken.run(broken.outcome)
    assert outcome.reason is CloseReason.INTERNAL
    assert "ZeroDivisionError" in outcome.detail
    assert "ZeroDivisionError" in caplog.text
    broken.close()
    sound.close()
    sound.run(sound.outcome)


def test_a_bug_in_a_deadline_or_a_turn_harms_no_other(
    engine: Engine, loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Alarm(loop, bug), Alarm(loop)
    due = time.monotonic() + 0.02
    engine.set_timer(bad, due)
    engine.set_timer(good, due)
    later: asyncio.Future[None] = loop.create_future()
    engine.again(Seen(go_on=bug))
    engine.again(Seen(go_on=lambda: later.set_result(None)))
    run(loop, later)
    run(loop, good.rang)
    assert caplog.text.count("ZeroDivisionError: ") == 2


def test_a_walk_that_fails_leaves_nothing_behind(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def walk() -> Generator[Wait, bool, None]:
        yield from ()
        raise KeyError("of ours")

    engine.start(walk())
    assert "of ours" in caplog.text


def test_a_socket_that_cannot_be_watched_ends_its_walk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ENOSPC: fs.epoll.max_user_watches is used up."""

    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rig.engine, "watch", full)
    rig.engine.start(rig.walk(before=time.monotonic() + 5))
    assert "No space left" in rig.outcome.result().detail


def test_cut(engine: Engine, loop: asyncio.AbstractEventLoop, server: socket.socket) -> None:
    waiting, relaying = (Rig(engine, loop, server) for _ in range(2))
    engine.start(waiting.walk(before=time.monotonic() + 3600))
    engine.start(relaying.walk(Limits(3600.0, 60.0)))
    handlers = [handler for handler in engine._handlers if handler]
    assert len(handlers) == 3
    engine.cut(CloseReason.DRAIN_TIMEOUT, "why")
    engine.cut(CloseReason.DRAIN_TIMEOUT, "twice is nothing")
    for rig in (waiting, relaying):
        assert rig.outcome.result()[:2] == (CloseReason.DRAIN_TIMEOUT, "why")
        rig.close()
    assert not any(engine._timers._buckets.values()), "a deadline was left behind"


def test_nothing_is_left_of_a_connection(rig: Rig) -> None:
    numbers = [rig.downstream.fileno(), rig.upstream.fileno()]
    rig.engine.start(rig.walk(Limits(3600.0, 60.0), before=time.monotonic() + 3600))
    rig.client.send(b"x")
    rig.client.close()
    rig.app.close()
    rig.run(rig.outcome)
    assert not any(rig.engine._handlers[number] for number in numbers)
    assert not any(rig.engine._timers._buckets.values())


def test_a_file_descriptor_that_is_used_again(rig: Rig, server: socket.socket) -> None:
    """One batch has events of two sockets. The first handler closes the second socket, and a new
    connection gets its number: the stale event reaches that one, and does it no harm."""
    (a_far, a), (b_far, b) = pair(server), pair(server)
    number = b.fileno()
    stale: list[int] = []

    def replace(_events: int) -> None:
        rig.engine.forget(b)
        b.close()
        rig.downstream = rig.downstream.dup()  # the lowest free number, as accept() takes
        assert rig.downstream.fileno() == number
        rig.engine.start(rig.walk())
        handler = rig.engine._handlers[number]
        assert handler is not None
        rig.engine._handlers[number] = Seen(
            lambda events: stale.append(events) or handler.on_event(events)  # type: ignore[func-returns-value]
        )

    original = rig.downstream
    rig.engine.watch(a, Seen(replace), READ_AND_WRITE)
    rig.engine.watch(b, Seen(lambda _: pytest.fail("its socket is closed")), READ_AND_WRITE)
    rig.engine.turn()  # both are writable: that is told first, in this order
    assert len(stale) == 1
    assert stale[0] & select.EPOLLOUT
    rig.client.send(b"ping")
    assert rig.run(rig.receive(rig.app, 4)) == b"ping"
    rig.app.send(b"pong")
    assert rig.run(rig.receive(rig.client, 4)) == b"pong"
    rig.close()
    original.close()
    rig.run(rig.outcome)
    rig.engine.forget(a)
    for sock in (a, a_far, b_far):
        sock.close()


def test_watch_registers_once(engine: Engine) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first: list[int] = []
        second: list[int] = []
        assert engine.watch(ours, Seen(first.append), READ_AND_WRITE) is True
        assert engine.watch(ours, Seen(second.append)) is False
        engine.turn()
        assert (len(first), len(second)) == (0, 1)
        engine.forget(ours)
        theirs.send(b"x")
        engine.turn()
        assert len(second) == 1
    engine.forget(ours)  # closed: no number any more


def test_descriptors_beyond_the_first_thousand(engine: Engine) -> None:
    ours, theirs = socket.socketpair()
    high = os.dup2(ours.fileno(), 1500)
    seen: list[int] = []
    with ours, theirs, socket.socket(fileno=high) as far:
        engine.watch(far, Seen(seen.append), READ_AND_WRITE)
        engine.turn()
        assert seen
        engine.forget(far)


def test_listening_is_level_triggered(engine: Engine, server: socket.socket) -> None:
    server.setblocking(False)
    calls: list[int] = []
    engine.listen(server, Seen(calls.append))
    with socket.create_connection(server.getsockname()):
        engine.turn()
        engine.turn()
        assert len(calls) == 2
        engine.unlisten(server)
        engine.turn()
        assert len(calls) == 2
        engine.listen(server, Seen(calls.append))
        engine.turn()
        assert len(calls) == 3
        server.accept()[0].close()
        engine.turn()
        assert len(calls) == 3
        engine.unlisten(server)


def test_the_loop_runs_the_engine(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    happened: asyncio.Future[int] = loop.create_future()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine.watch(ours, Seen(happened.set_result), READ_AND_WRITE)
        assert run(loop, happened) & select.EPOLLOUT
        engine.forget(ours)


def test_a_bug_in_its_deadline_ends_a_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no deadline any more, so nothing else would."""
    monkeypatch.setattr(Relay, "on_timer", bug)
    rig.engine.start(rig.walk(Limits(0.05, 5.0)))
    assert rig.run(rig.outcome).reason is CloseReason.INTERNAL
    assert "ZeroDivisionError" in caplog.text
