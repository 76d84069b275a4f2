"""The engine's deadlines on a real loop. Nothing sleeps: a test waits for what it expects."""

from __future__ import annotations

import asyncio
import time

from tproxyd.flow.engine import Engine
from tproxyd.tests.loopback import Alarm, run


def test_a_deadline_falls_due_in_time(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    alarm = Alarm(loop)
    due = time.monotonic() + 0.06
    engine.set_timer(alarm, due)
    rang = run(loop, alarm.rang)
    assert due <= rang <= due + 1  # never early
    assert alarm.timer is None


def test_a_nearer_deadline_set_later_comes_first(
    engine: Engine, loop: asyncio.AbstractEventLoop
) -> None:
    far, near = Alarm(loop), Alarm(loop)
    engine.set_timer(far, time.monotonic() + 3600)
    engine.set_timer(near, time.monotonic() + 0.02)
    run(loop, near.rang)
    assert not far.rang.done()
    engine.cancel_timer(far)


def test_cancelled_and_set_anew(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    never, moved, last = Alarm(loop), Alarm(loop), Alarm(loop)
    start = time.monotonic()
    engine.set_timer(never, start + 0.02)
    engine.set_timer(moved, start + 0.02)
    engine.set_timer(last, start + 0.11)
    engine.cancel_timer(never)
    engine.cancel_timer(never)
    engine.set_timer(moved, start + 3600)
    run(loop, last.rang)
    assert not never.rang.done()
    assert not moved.rang.done()
    engine.cancel_timer(moved)


def test_one_deadline_may_cancel_another_of_the_same_moment(
    engine: Engine, loop: asyncio.AbstractEventLoop
) -> None:
    other = Alarm(loop)
    one = Alarm(loop, lambda _now: engine.cancel_timer(other))
    due = time.monotonic() + 0.02
    engine.set_timer(one, due)
    engine.set_timer(other, due)
    assert one.timer is other.timer
    run(loop, one.rang)
    assert not other.rang.done()


def test_a_deadline_may_be_set_from_a_deadline(
    engine: Engine, loop: asyncio.AbstractEventLoop
) -> None:
    other = Alarm(loop)
    one = Alarm(loop, lambda now: engine.set_timer(other, now - 1))
    engine.set_timer(one, time.monotonic() - 1)
    run(loop, other.rang)


def test_far_deadlines_share_a_second(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    """A thousand connections with an hour of idle time are one entry a second, not twenty."""
    alarms = [Alarm(loop) for _ in range(100)]
    for i, alarm in enumerate(alarms):
        engine.set_timer(alarm, engine.now + 3600 + i / 100)
    assert len({id(alarm.timer) for alarm in alarms}) <= 2
    near = [Alarm(loop) for _ in range(100)]
    for i, alarm in enumerate(near):
        engine.set_timer(alarm, engine.now + 10 + i / 100)
    assert len({id(alarm.timer) for alarm in near}) >= 20
    assert len(engine._timers._buckets) <= 25
    for alarm in (*alarms, *near):
        engine.cancel_timer(alarm)
        assert alarm.timer is None
