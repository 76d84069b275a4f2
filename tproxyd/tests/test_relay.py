"""The relay against the model of TCP and epoll in tcpmodel.py, driven by hypothesis.

On top of what the model does by itself, events may be stale here: flags of another socket that had
the file descriptor before.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tproxyd.errors import CloseReason
from tproxyd.flow import relay as relay_module
from tproxyd.flow.pipes import Pipe
from tproxyd.flow.relay import Direction, Limits
from tproxyd.tests.relayplay import Op, Play
from tproxyd.tests.tcpmodel import BUFFER, ERR, HUP, IN, OUT, PIPE, RDHUP, payload

sides = st.sampled_from(["client", "app"])
moves = st.builds(
    Op,
    sides,
    st.sampled_from(["write", "write", "read", "write", "read", "lie"]),
    st.integers(1, 150),
    st.booleans(),
)
fins = st.builds(Op, sides, st.just("fin"), st.just(0), st.booleans())
resets = st.builds(Op, sides, st.just("rst"), st.just(0), st.booleans())
polls = st.builds(Op, st.just("poll"), st.just(""), st.integers(0, 1))
flags = st.lists(st.sampled_from([IN, OUT, RDHUP, HUP, ERR]), max_size=5).map(
    lambda some: sum(set(some))
)
stale = st.builds(Op, st.just("stale"), sides, flags)
orderly = st.lists(st.one_of(moves, polls, moves, polls, stale, fins), max_size=40)
rough = st.lists(st.one_of(moves, polls, moves, polls, stale, fins, resets), max_size=40)
starts = st.tuples(
    st.integers(0, 40),  # early bytes
    st.sampled_from([1, 5, 16, 40, 100, 400]),  # window, both ways
    st.booleans(),  # the client's socket was watched before, and its edges are spent
    st.booleans(),  # likewise the upstream's
    st.integers(0, 2),  # pipes
)
Start = tuple[int, int, bool, bool, int]


@pytest.fixture(autouse=True, scope="module")
def _small_buffer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay_module, "BUFFER_SIZE", BUFFER)
        patch.setattr(relay_module, "BULK_SIZE", 20)
        yield


class Deaf(Direction):
    def __init__(self) -> None:
        pass

    def on_event(self, events: int) -> None:
        pass


def begun(start: Start, before: list[Op]) -> Play:
    early, window, *watched, pipes = start
    play = Play(payload(0, early), window, pipes=pipes)
    for stream, was in zip((play.client, play.app), watched, strict=True):
        if was:
            play.driver.watch(stream, Deaf())
    for op in before:
        op(play)
    play.client.ready = play.app.ready = False
    play.start()
    return play


@settings(max_examples=250, deadline=None)
@given(starts, orderly, orderly)
@example(  # told of an end that does not come: what waits for it in the kernel fills the window
    (0, 1, False, False, 1),
    [],
    [
        Op("app", "write", 1),
        Op("poll"),
        Op("client", "read", 1),
        Op("app", "write", 1),
        Op("client", "read", 0, True),
        Op("app", "write", 1, True),
        Op("stale", "app", RDHUP),
    ],
)
def test_every_byte_arrives_once_and_in_order(
    start: Start, before: list[Op], after: list[Op]
) -> None:
    """Without RST: whatever the order of events, all that was sent arrives, and each end too."""
    play = begun(start, before)
    for op in after:
        op(play)
    play.settle()
    client, app = play.client, play.app
    assert app.far_got == client.far_sent, "bytes from the client are stuck or lost"
    assert client.far_got == app.far_sent, "bytes from the application are stuck or lost"
    if client.far_fin and app.far_fin:
        (outcome,) = play.outcomes
        assert not outcome.aborted
        assert outcome.reason in (CloseReason.DOWNSTREAM_FIN, CloseReason.UPSTREAM_FIN)
        assert outcome.detail == ""
        assert (outcome.received, outcome.sent) == (app.far_got, client.far_got)
    else:
        assert not play.over, "it ended with one side still open"
        assert (app.fin, client.fin) == (client.far_fin, app.far_fin), "a half-close is not kept"


@settings(max_examples=250, deadline=None)
@given(starts, rough, rough)
@example(  # the application closed for good, and a late byte of the client made it say so
    (0, 40, False, False, 1),
    [],
    [
        Op("app", "fin"),
        Op("poll"),
        Op("client", "write", 3),
        Op("poll"),
        Op("app", "rst"),
    ],
)
@example(  # the client has come and gone while its header was awaited: its edges are spent
    (0, 40, True, False, 1),
    [Op("client", "fin"), Op("client", "rst")],
    [],
)
@example(  # likewise the application, while it was connected to
    (0, 40, False, True, 1),
    [Op("app", "fin"), Op("app", "rst")],
    [],
)
@example(  # its end, and its RST, come behind more than one turn's worth of bytes
    (0, 100, False, False, 1),
    [],
    [
        Op("client", "write", 4 * BUFFER),
        Op("client", "fin"),
        Op("client", "rst"),
        Op("poll"),
    ],
)
def test_a_reset_ends_it_once(start: Start, before: list[Op], after: list[Op]) -> None:
    """What arrived is right, and no RST is ever overlooked: nothing waits for a deadline."""
    play = begun(start, before)
    for op in after:
        op(play)
    play.settle()
    client, app = play.client, play.app
    assert app.far_got <= client.far_sent
    assert client.far_got <= app.far_sent
    if not play.over:
        assert not client.far_rst
        assert not app.far_rst
        return
    (outcome,) = play.outcomes
    match outcome.reason:
        case CloseReason.DOWNSTREAM_RESET:
            assert client.far_rst
        case CloseReason.UPSTREAM_RESET:
            assert app.far_rst
        case _:
            assert client.far_fin
            assert app.far_fin
    assert outcome.aborted == outcome.reason.endswith("reset")


@settings(max_examples=80, deadline=None)
@given(starts, rough, rough)
def test_cut_from_outside(start: Start, before: list[Op], after: list[Op]) -> None:
    play = begun(start, before)
    for op in after:
        op(play)
    was_over = play.over
    play.relay.cut(CloseReason.DRAIN_TIMEOUT, "why")
    play.relay.cut(CloseReason.DRAIN_TIMEOUT, "why")
    play.settle()
    (outcome,) = play.outcomes
    assert was_over or outcome[:2] == (CloseReason.DRAIN_TIMEOUT, "why")
    assert was_over or outcome.aborted


# Single scenes ------------------------------------------------------------------------------------


def test_the_last_bytes_leave_with_the_fin() -> None:
    """One segment for both; and where the event was stale, the bytes do not wait for a FIN."""
    play = Play()
    play.start()
    play.client.far_write(5)
    play.client.far_finish()
    sent: list[int] = []
    send = play.app.send
    play.app.send = lambda data, flags: sent.append(flags) or send(data, flags)  # type: ignore[func-returns-value, method-assign]
    play.poll()
    assert [bool(flags & socket.MSG_MORE) for flags in sent] == [True]
    assert (play.app.fin, play.app.held, len(play.app.outbox)) == (True, 0, 5)

    play = Play()
    play.start()
    play.client.far_write(5)
    play.event(play.client, IN | RDHUP)
    assert (play.app.fin, play.app.held, len(play.app.outbox)) == (False, 0, 5)

    for _ in range(2):  # a byte more between every two of its system calls: a whole turn of them
        play.net.meanwhile += [lambda: None, lambda: play.client.far_write(1)]
    play.client.far_write(1)
    play.event(play.client, IN | RDHUP)
    assert (play.app.fin, play.app.held, len(play.app.outbox)) == (False, 0, 5 + 2)


def test_room_is_asked_for_only_where_a_write_came_up_short() -> None:
    play = Play(window=10)
    play.start()
    assert not play.app.interest & OUT
    play.client.far_write(10)
    play.poll()
    assert not play.app.interest & OUT
    play.client.far_write(10)
    play.poll()
    assert play.app.interest & OUT
    assert not play.client.interest & OUT


def test_what_came_before_the_sockets_were_registered_is_told() -> None:
    play = Play()
    play.client.far_write(10)
    play.app.far_write(5)
    play.start()
    play.poll()
    assert (len(play.app.outbox), len(play.client.outbox)) == (10, 5)


def test_early_bytes_go_first() -> None:
    play = Play(early=payload(0, 9))
    play.client.far_write(10)
    play.start()
    assert play.app.outbox == payload(0, 9)
    play.poll()
    assert play.app.outbox == payload(0, 19)


@pytest.mark.parametrize("first", ["client", "app"])
def test_who_finished_first(first: str) -> None:
    play = Play()
    play.start()
    one, other = (play.client, play.app)[:: 1 if first == "client" else -1]
    one.far_finish()
    play.poll()
    assert other.fin
    assert not play.over
    other.far_write(7)  # a half-close: the other way still carries
    play.poll()
    one.far_read(100)
    assert one.far_got == 7
    other.far_finish()
    play.poll()
    (outcome,) = play.outcomes
    assert outcome.reason == ("downstream_fin" if first == "client" else "upstream_fin")
    assert not one.fin, "a shutdown right before the close that says it anyway"


def test_a_stalled_reader_costs_one_buffer() -> None:
    play = Play(window=30)
    play.start()
    for _ in range(100):
        play.client.far_write(1000)
        play.poll()
    assert play.client.far_sent <= 30 + 30 + PIPE  # inbox, outbox and what we hold
    assert not play.client.far_rst
    play.settle()
    assert play.app.far_got == play.client.far_sent


def test_a_stalled_reader_does_not_stop_the_other_way() -> None:
    play = Play(window=30)
    play.start()
    for _ in range(10):
        play.client.far_write(1000)
        play.app.far_write(10)
        play.poll()
        play.client.far_read(1000)
    assert play.client.far_got == 100


def test_rst_reaches_past_a_stalled_reader() -> None:
    play = Play(window=30)
    play.start()
    for _ in range(10):
        play.client.far_write(1000)
        play.poll()
    play.client.far_reset()
    play.poll()
    (outcome,) = play.outcomes
    assert outcome.reason is CloseReason.DOWNSTREAM_RESET
    assert outcome.aborted


def test_what_was_sent_before_a_reset_is_delivered_first() -> None:
    """The sink is found gone by a send; what it had said before is read first."""
    play = Play()
    play.start()
    play.client.far_write(3)
    play.app.far_write(25)
    play.app.far_reset()
    play.app.ready = False  # the client's event comes first
    play.poll()
    play.client.far_read(100)
    assert play.client.far_got == 25
    (outcome,) = play.outcomes
    assert outcome[:5] == (CloseReason.UPSTREAM_RESET, "", 0, 25, True)


def test_an_answer_in_front_of_a_reset_arrives() -> None:
    """Who answers and closes without having read all, as with 413, resets behind its answer."""
    play = Play()
    play.start()
    play.app.far_write(5)
    play.app.far_reset()
    play.poll()
    play.client.far_read(100)
    assert play.client.far_got == 5
    (outcome,) = play.outcomes
    assert outcome[:5] == (CloseReason.UPSTREAM_RESET, "", 0, 5, True)


def test_an_error_that_is_no_reset_says_what_it_was() -> None:
    """ETIMEDOUT by keep-alive, EHOSTUNREACH by ICMP."""
    play = Play()
    play.start()
    play.app.far_reset()
    play.app.error = errno.ETIMEDOUT
    play.poll()
    assert play.outcomes[0][:2] == (CloseReason.UPSTREAM_RESET, os.strerror(errno.ETIMEDOUT))


@pytest.mark.parametrize(
    ("pipes", "first", "later"), [(0, 2 * BUFFER, 2 * BUFFER), (1, BUFFER + PIPE, PIPE)]
)
def test_a_bulk_stream_takes_turns(pipes: int, first: int, later: int) -> None:
    """Two buffers at a time; or one, which shows that it is a bulk stream, and one pipe from then
    on. The rest in later turns, without another event.
    """
    play = Play(window=400, pipes=pipes)
    play.start()
    play.client.far_write(400)
    events = play.client.told()
    play.client.ready = False
    play.event(play.client, events)
    assert len(play.app.outbox) == first
    assert len(play.driver.tasks) == 1
    play.poll()
    assert len(play.app.outbox) == first + later
    while play.driver.tasks:
        play.poll()
    assert len(play.app.outbox) == 400


def test_a_bulk_stream_that_is_none_any_more_is_copied() -> None:
    """It is judged by what the last turn moved; and what splice could not see is found by recv."""
    play = Play(window=400)
    play.start()
    play.client.far_write(BUFFER + 3 * PIPE)
    play.poll()
    while play.driver.tasks:
        play.poll()
    assert play.relay.up.bulk
    play.client.far_write(12)
    play.client.lies = True
    play.poll()
    assert len(play.app.outbox) == 100
    assert not play.relay.up.bulk


def test_a_stalled_bulk_stream_keeps_its_pipe() -> None:
    """And no more than that; when it is cut, the pipe is back."""
    play = Play(window=200)
    play.app.window = 50
    play.start()
    for _ in range(10):
        play.client.far_write(1000)
        play.poll()
    assert isinstance(play.relay.up.rest, Pipe)
    assert play.driver.pipes == []
    play.relay.cut(CloseReason.DRAIN_TIMEOUT)
    play.check()
    assert len(play.driver.pipes) == 1


def test_its_memory_is_free_when_it_is_over() -> None:
    """Nothing of it points at itself: no collector has to run."""
    gc.collect()
    gc.disable()
    try:
        play = Play()
        play.start()
        play.client.far_write(5)
        play.poll()
        play.client.far_finish()
        play.app.far_finish()
        play.poll()
        assert play.over
        play.driver.handlers.clear()
        del play.relay
        assert gc.collect() == 0
    finally:
        gc.enable()


# Deadlines ----------------------------------------------------------------------------------------


def test_idle() -> None:
    play = Play()
    play.start()
    assert play.driver.due == 30.0  # it looks on the way,
    for play.driver.now, due in ((30.0, 60.0), (60.0, 90.0), (90.0, 100.0)):
        play.relay.on_timer(play.driver.now)
        assert play.driver.due == due
    play.client.far_write(1)
    play.poll()
    assert play.driver.due == 100.0  # activity moves no timer,
    play.driver.now = 100.0
    play.relay.on_timer(100.0)
    assert play.driver.due == 130.0
    play.driver.now = 190.0 - 1
    play.relay.on_timer(play.driver.now)
    assert play.driver.due == 190.0  # and it is a hundred seconds after the last byte
    assert not play.over
    play.relay.on_timer(190.0)
    assert play.outcomes[0][:2] == (CloseReason.IDLE_TIMEOUT, "nothing moved for 100 s")
    assert play.outcomes[0].aborted


def test_half_close() -> None:
    play = Play()
    play.start()
    play.driver.now = 50.0
    play.client.far_finish()
    play.poll()
    assert play.driver.due == 60.0
    play.driver.now = 55.0
    play.app.far_write(1)  # it still speaks
    play.poll()
    play.relay.on_timer(60.0)
    assert play.driver.due == 65.0
    play.relay.on_timer(65.0)
    assert play.outcomes[0][:2] == (CloseReason.HALF_CLOSE_TIMEOUT, "nothing moved for 10 s")


def test_never_idle() -> None:
    play = Play(limits=Limits(0.0, 10.0))
    play.start()
    assert play.driver.due is None
    play.client.far_finish()
    play.poll()
    assert play.driver.due == 10.0  # but half-closed is another matter
