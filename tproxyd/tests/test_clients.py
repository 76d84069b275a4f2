"""What a client may have and how fast, counted by several workers in shared memory."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tproxyd.config import PerClient
from tproxyd.flow.clients import SEED, SMALLEST, ClientCounts, table_size
from tproxyd.proc.clients import ClientTables

HOST = "192.0.2.1"
ENTRIES = SMALLEST // 32  # of the smallest table, which is one bucket
T = 1000.0  # some time
TWO = "per_client.max_connections = 2"
THREE_PER_S = "per_client.max_new_per_s = 3"


def crew(
    workers: int, *limits: PerClient, size: int = 16 * SMALLEST, seed: bytes = bytes(SEED)
) -> list[ClientCounts]:
    tables = [mmap.mmap(-1, size) for _ in range(workers)]
    return [ClientCounts(tables, i, named(*limits), seed) for i in range(workers)]


def named(*limits: PerClient) -> dict[str, PerClient]:
    return {f"listener {i}": each for i, each in enumerate(limits)}


def host(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def times_admitted(worker: ClientCounts, attempts: int, now: float, who: str = HOST) -> int:
    """Of so many attempts at one moment; each that is admitted ends at once."""
    admitted = 0
    for _ in range(attempts):
        if not worker.enter(0, who, now):
            worker.leave(0, who)
            admitted += 1
    return admitted


# Connections --------------------------------------------------------------------------------------


def test_connections_count_wherever_they_are() -> None:
    one, other = crew(2, PerClient(max_connections=2))
    assert one.enter(0, HOST, T) == ""
    assert other.enter(0, HOST, T) == ""
    assert one.enter(0, HOST, T) == other.enter(0, HOST, T) == TWO
    one.leave(0, HOST)
    assert other.enter(0, HOST, T) == ""
    assert one.enter(0, HOST, T) == TWO


def test_listeners_count_apart() -> None:
    (worker,) = crew(1, PerClient(max_connections=2), PerClient(max_connections=1))
    assert worker.enter(1, HOST, T) == ""
    assert worker.enter(1, HOST, T) == "per_client.max_connections = 1"
    assert worker.enter(0, HOST, T) == worker.enter(0, HOST, T) == ""
    assert worker.enter(0, HOST, T) == TWO


def test_without_limits_nothing_is_counted() -> None:
    (worker,) = crew(1, PerClient(), PerClient(max_connections=1))
    assert {worker.enter(0, HOST, T) for _ in range(100)} == {""}
    worker.leave(0, HOST)
    assert not any(bytes(worker._memory))
    assert worker.enter(1, HOST, T) == ""
    assert not any(worker._cells[worker._counts + 1 :: 2])  # no rates where none is limited


@pytest.mark.parametrize(
    "others",
    [
        ["192.0.2.2", "192.0.2.10", "192.0.2.11"],
        ["2001:db8::1", "2001:db8::2", "2001:db8::1:1"],
        ["fe80::1", "fe80::1%eth0", "fe80::1%eth1"],
        ["::", "0.0.0.0", "::c000:201"],
    ],
    ids=lambda hosts: hosts[0],
)
def test_clients_count_apart(others: list[str]) -> None:
    one, other = crew(2, PerClient(max_connections=1))
    for each in (HOST, *others):
        assert one.enter(0, each, T) == ""
    for each in (HOST, *others):
        assert other.enter(0, each, T) != ""
    one.leave(0, others[0])
    assert other.enter(0, HOST, T) != ""
    assert other.enter(0, others[0], T) == ""


def test_who_never_entered_cannot_leave() -> None:
    (worker,) = crew(1, PerClient(max_connections=1))
    with pytest.raises(KeyError):
        worker.leave(0, HOST)
    assert worker.enter(0, HOST, T) == ""
    worker.leave(0, HOST)
    with pytest.raises(ValueError):
        worker.leave(0, HOST)


# New connections per second -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "admitted"),
    [
        (0.999, 0),
        (1.0, 0),  # all three of the second before still lie in the window
        (1.25, 0),
        (1.375, 1),  # 3 * 0.625 + 1 <= 3
        (1.75, 2),
        (1.999, 2),
        (2.0, 3),
        (60.0, 3),
    ],
)
def test_a_full_second_and_what_follows(offset: float, admitted: int) -> None:
    one, other = crew(2, PerClient(max_new_per_s=3))
    assert times_admitted(one, 5, T) == 3
    assert times_admitted(other, 5, T) == 0
    assert times_admitted(other, 5, T + offset) == admitted
    assert one.enter(0, HOST, T + offset) == THREE_PER_S


def test_who_hammers_gets_the_rate_and_no_more() -> None:
    workers = crew(3, PerClient(max_new_per_s=3))
    admitted = [
        sum(times_admitted(worker, 5, T + i / 16) for worker in workers) for i in range(20 * 16)
    ]
    seconds = [sum(admitted[i : i + 16]) for i in range(0, len(admitted), 16)]
    assert max(seconds) == 3
    assert sum(seconds) >= 20 * 3 * 2 // 3
    assert max(sum(admitted[i : i + 16]) for i in range(len(admitted))) < 6


def test_connections_are_named_before_the_rate_and_count_for_neither() -> None:
    (worker,) = crew(1, PerClient(max_connections=2, max_new_per_s=3))
    assert worker.enter(0, HOST, T) == worker.enter(0, HOST, T) == ""
    for _ in range(10):
        assert worker.enter(0, HOST, T) == TWO
    worker.leave(0, HOST)
    assert worker.enter(0, HOST, T) == ""
    worker.leave(0, HOST)
    assert worker.enter(0, HOST, T) == THREE_PER_S


def test_a_worker_whose_clock_was_read_later_counts_as_of_now() -> None:
    early, late = crew(2, PerClient(max_new_per_s=3))
    assert times_admitted(late, 1, T + 0.999) == 1
    assert times_admitted(late, 2, T + 1.75) == 2
    assert early.enter(0, HOST, T + 0.999) == THREE_PER_S


def test_more_than_can_be_told_apart_are_many() -> None:
    one, other = crew(2, PerClient(max_new_per_s=65536 + 10))
    assert times_admitted(one, 65536 + 10, T) == 65536 + 10  # the last 11 add nothing
    assert times_admitted(other, 12, T) == 11
    assert times_admitted(one, 1, T + 1) == 0
    assert times_admitted(one, 1, T + 2) == 1


# Against a model ----------------------------------------------------------------------------------

LIMITS = (PerClient(3, 0), PerClient(0, 3), PerClient(2, 4))
WORKERS = 3
HOSTS = ("10.0.0.1", "10.0.0.2", "fe80::1%eth0")


class Model:
    """Plain lists of who is there and of who came when."""

    def __init__(self) -> None:
        self.live: list[tuple[int, int, str]] = []  # worker, listener, host
        self.came: list[tuple[int, int, str, int]] = []  # …, second

    def verdict(self, listener: int, who: str, now: float) -> str:
        limits, second = LIMITS[listener], int(now)
        live = sum(each[1:] == (listener, who) for each in self.live)
        if limits.max_connections and live >= limits.max_connections:
            return f"per_client.max_connections = {limits.max_connections}"
        recent = sum(each[1:] == (listener, who, second) for each in self.came)
        last = sum(each[1:] == (listener, who, second - 1) for each in self.came)
        window = recent + 1 + last * (1 - now % 1)
        if limits.max_new_per_s and window > limits.max_new_per_s:
            return f"per_client.max_new_per_s = {limits.max_new_per_s}"
        return ""

    def enter(self, worker: int, listener: int, who: str, now: float) -> str:
        verdict = self.verdict(listener, who, now)
        if not verdict:
            self.live.append((worker, listener, who))
            self.came.append((worker, listener, who, int(now)))
        return verdict

    def die(self, worker: int) -> None:
        self.live = [each for each in self.live if each[0] != worker]
        self.came = [each for each in self.came if each[0] != worker]


ENTER = st.tuples(
    st.just("enter"),
    st.tuples(st.integers(0, WORKERS - 1), st.integers(0, len(LIMITS) - 1), st.sampled_from(HOSTS)),
)
STEPS = st.one_of(
    ENTER,
    ENTER,
    st.tuples(st.just("leave"), st.integers(0, 1000)),
    st.tuples(st.just("pass"), st.sampled_from([0.125, 0.5, 0.875, 1, 2, 3, 4])),
    st.tuples(st.just("die"), st.integers(0, WORKERS - 1)),
)


@settings(deadline=None)
@given(st.lists(STEPS, max_size=120), st.sampled_from([0.0, T + 0.5]))
def test_every_verdict_is_the_models(steps: list[tuple[str, Any]], now: float) -> None:
    tables = ClientTables(WORKERS, 1)
    model = Model()

    def worker(slot: int) -> ClientCounts:
        return ClientCounts(tables.tables, slot, named(*LIMITS), tables.seed)

    workers = [worker(i) for i in range(WORKERS)]
    for step, what in steps:
        if step == "enter":
            slot, listener, who = what
            told = workers[slot].enter(listener, who, now)
            assert told == model.enter(slot, listener, who, now)
        elif step == "leave" and model.live:
            slot, listener, who = model.live.pop(what % len(model.live))
            workers[slot].leave(listener, who)
        elif step == "pass":
            now += what
        elif step == "die":
            tables.reset(what)
            workers[what] = worker(what)
            model.die(what)


# Entries ------------------------------------------------------------------------------------------


def test_an_entry_is_reused_when_its_client_has_gone() -> None:
    (worker,) = crew(1, PerClient(max_connections=1), size=SMALLEST)
    for i in range(10 * ENTRIES):
        assert worker.enter(0, host(i), T) == ""
        assert worker.enter(0, host(i), T) != ""
        worker.leave(0, host(i))
    assert worker.overflows == 0


@pytest.mark.parametrize("start", [T, 0.0])
def test_an_entry_of_a_rate_is_reused_after_two_seconds(start: float) -> None:
    (worker,) = crew(1, PerClient(max_new_per_s=1), size=SMALLEST)
    for later in (0, 3, 6):
        for i in range(ENTRIES):
            assert times_admitted(worker, 2, start + later, host(later * ENTRIES + i)) == 1
    assert worker.overflows == 0
    assert times_admitted(worker, 2, start + 8.5, host(1)) == 1  # not yet: there is no room
    assert worker.overflows == 1


def test_a_refused_client_that_is_new_takes_no_room() -> None:
    one, other = crew(2, PerClient(2, 1), size=SMALLEST)
    for i in range(10 * ENTRIES):
        assert times_admitted(one, 1, T, host(i)) == 1
        assert times_admitted(other, 1, T, host(i)) == (i >= ENTRIES)  # those one could not show
        if i < ENTRIES:
            assert not any(other._cells[other._counts :])


def test_a_full_bucket_and_whom_it_has_no_room_for() -> None:
    one, other = crew(2, PerClient(2, 3), size=SMALLEST)
    crowd = [host(i) for i in range(ENTRIES + 8)]
    for who in crowd:
        assert one.enter(0, who, T) == one.enter(0, who, T) == ""
        assert one.enter(0, who, T) == TWO
    assert one.overflows == 8
    for who in crowd[:ENTRIES]:
        assert other.enter(0, who, T) == TWO
    assert other.enter(0, crowd[-1], T) == ""  # weaker: one's count of it is not seen
    other.leave(0, crowd[-1])
    for who in crowd:
        one.leave(0, who)
        one.leave(0, who)
        assert times_admitted(one, 2, T, who) == (who != crowd[-1])  # it had one at other
        assert one.enter(0, who, T) == THREE_PER_S
    for who in crowd[-4:]:
        assert one.enter(0, who, T + 5) == one.enter(0, who, T + 5) == ""
    assert one.overflows == 8  # there was room in the table again
    assert other.enter(0, crowd[-2], T + 5) == TWO


def test_whom_there_was_no_room_for_is_forgotten_in_the_end() -> None:
    (worker,) = crew(1, PerClient(2, 2), size=SMALLEST)
    for i in range(ENTRIES):
        assert worker.enter(0, host(i), T) == ""
    for i in range(1000):
        assert times_admitted(worker, 3, T + i, host(ENTRIES + i)) == 2
    assert len(worker._outside) <= 3


def test_a_count_is_never_read_as_another_clients() -> None:
    class Meddled(mmap.mmap):
        """A table whose writer is quick: right after it has been searched, something happens."""

        meddle: Callable[[], object] | None = None

        def find(self, *args: Any) -> int:  # noqa: ANN401
            found = super().find(*args)
            meddle, self.meddle = self.meddle, None
            if meddle is not None:
                meddle()
            return found

    mine, theirs = Meddled(-1, SMALLEST), Meddled(-1, SMALLEST)
    limits, seed = named(PerClient(max_connections=1)), bytes(SEED)
    one = ClientCounts([mine, theirs], 0, limits, seed)
    other = ClientCounts([mine, theirs], 1, limits, seed)
    assert other.enter(0, HOST, T) == ""
    other.leave(0, HOST)
    theirs.meddle = lambda: other.enter(0, "192.0.2.2", T)
    assert one.enter(0, HOST, T) == ""
    assert one.enter(0, "192.0.2.2", T) != ""  # it did happen, and took the same entry
    assert not any(other._cells[other._counts + 1 :])


def test_the_fence_stands_between_what_is_stored_and_what_is_read() -> None:
    one, other = crew(2, PerClient(max_connections=1))

    def meanwhile(act: Callable[[], object]) -> None:
        release, acquire = one._fence
        one._fence = (lambda: (release(), act())[0], acquire)

    told = []
    meanwhile(lambda: told.append(other.enter(0, HOST, T)))
    assert one.enter(0, HOST, T) == ""
    assert told == ["per_client.max_connections = 1"]  # ours was stored

    one, other = crew(2, PerClient(max_connections=1))
    other.enter(0, HOST, T)
    meanwhile(lambda: other.leave(0, HOST))
    assert one.enter(0, HOST, T) == ""  # theirs had not been read


def test_the_seed_decides_where_a_client_is_and_all_workers_agree() -> None:
    def places(workers: Sequence[ClientCounts]) -> list[int]:
        for who in map(host, range(32)):
            for each in workers:
                each.enter(0, who, T)
        first, *others = (bytes(each._memory) for each in workers)
        assert all(each == first for each in others)
        return [i for i in range(0, len(first), 16) if any(first[i : i + 16])]

    limits = PerClient(max_connections=10)
    ours = places(crew(2, limits, seed=bytes(SEED)))
    assert ours == places(crew(2, limits, seed=bytes(SEED)))
    assert ours != places(crew(2, limits, seed=b"\1" * SEED))
    found = find_spec(ClientTables.__module__)
    assert found is not None
    assert found.loader is not None
    found.loader.exec_module(elsewhere := module_from_spec(found))  # as in another process
    assert elsewhere.ClientTables.seed != ClientTables.seed


def test_a_table_has_twice_the_room_that_is_needed() -> None:
    assert table_size(10_000) == 2 * 1024 * 1024
    for connections in (1, 1000, 10_000, 12_768, 12_769, 262_144):
        entries = table_size(connections) // 32
        assert 2 * (connections + 20_000) <= entries <= 4.01 * (connections + 20_000)
    (worker,) = crew(1, PerClient(max_connections=1), size=table_size(10_000))
    for i in range(30_000):
        worker.enter(0, host(i), T)
    assert worker.overflows <= 2


# Processes ----------------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def test_workers_that_race_never_exceed_a_limit() -> None:
    workers, rounds, attempts = 4, 400, 6
    limits = named(PerClient(max_connections=3), PerClient(max_new_per_s=3))
    tables = ClientTables(workers, 1)
    arrived = memoryview(mmap.mmap(-1, 8 * 64 * workers)).cast("Q")
    admitted = memoryview(mmap.mmap(-1, workers * rounds * 2))

    def work(slot: int) -> None:
        counts = ClientCounts(tables.tables, slot, limits, tables.seed)
        for r in range(rounds):
            arrived[64 * slot] = r + 1
            while min(arrived[64 * i] for i in range(workers)) <= r:
                os.sched_yield()
            for _ in range(attempts):
                for listener in (0, 1):
                    if not counts.enter(listener, host(r), T):
                        admitted[(r * workers + slot) * 2 + listener] += 1

    pids = [fork(partial(work, slot)) for slot in range(workers)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * workers
    late = ClientCounts(tables.tables, 0, limits, tables.seed)
    for r in range(rounds):
        for listener in (0, 1):
            of_round = admitted[r * workers * 2 : (r + 1) * workers * 2]
            total = sum(of_round[listener::2])
            assert total <= 3, f"round {r}: {total}"
            while not late.enter(listener, host(r), T):
                total += 1
            assert total == 3  # what was refused in a tie is not lost


def test_a_killed_workers_connections_are_free_again() -> None:
    tables = ClientTables(2, 1)
    limits = named(PerClient(max_connections=2))

    def work() -> None:
        worker = ClientCounts(tables.tables, 1, limits, tables.seed)
        worker.enter(0, HOST, T)
        worker.enter(0, HOST, T)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(work)
    os.waitpid(pid, 0)
    survivor = ClientCounts(tables.tables, 0, limits, tables.seed)
    assert survivor.enter(0, HOST, T) == TWO
    tables.reset(1)
    assert survivor.enter(0, HOST, T) == survivor.enter(0, HOST, T) == ""
    assert survivor.enter(0, HOST, T) == TWO  # and only the dead one's


def test_a_table_is_emptied_even_where_pages_cannot_be_given_back() -> None:
    class Locked(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError

    tables = ClientTables(1, 1)
    tables.tables[0] = Locked(-1, SMALLEST)
    tables.tables[0][:] = b"x" * SMALLEST
    tables.reset(0)
    assert not any(bytes(tables.tables[0]))
