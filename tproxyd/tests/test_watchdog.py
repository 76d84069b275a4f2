"""Who is fed, who is ended, and who is forgiven: by a clock and workers of the test's own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tproxyd.linux import waiting_clients
from tproxyd.proc import systemd, watchdog
from tproxyd.proc.watchdog import BEAT_S, PROOF_S, SILENCE_S, Watchdog, answer

FED = "WATCHDOG=1"


class Worker:
    def __init__(self, number: int) -> None:
        self.number, self.pid = number, 100 + number
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        self.listeners = [(0, sock)]
        self.clients: list[socket.socket] = []
        self.taken = 0
        self.asked = 0
        self.killed: list[str] = []

    def say(self, word: str) -> None:
        assert word == watchdog.PING
        self.asked += 1

    def kill(self, why: str) -> None:
        self.killed.append(f"worker {self.number} {why}")

    def called(self) -> None:
        """A client comes and waits."""
        self.clients.append(socket.create_connection(self.listeners[0][1].getsockname()))

    def take(self) -> None:
        self.listeners[0][1].accept()[0].close()
        self.taken += 1

    def close(self) -> None:
        for sock in (self.listeners[0][1], *self.clients):
            sock.close()


class World:
    """Two workers, a clock that only the test moves, and what came of it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.workers = [Worker(0), Worker(1)]
        self.dog = Watchdog(lambda: self.workers, lambda: self.now)

    @property
    def ended(self) -> list[str]:
        return [why for each in self.workers for why in each.killed]

    def beat(self, *answering: Worker, accepting: bool = True, seconds: float = BEAT_S) -> None:
        """Time passes, a beat comes, and these workers answer."""
        self.now += seconds
        self.dog.beat()
        for worker in answering:
            assert self.dog.heard(worker.pid, f"{answer(worker.taken, accepting)}\n")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What systemd heard; it wants to hear at every beat."""
    heard: list[str] = []
    monkeypatch.setattr(systemd, "notify", heard.append)
    monkeypatch.setattr(systemd, "watchdog_interval", lambda: BEAT_S)
    return heard


@pytest.fixture
def world(told: list[str]) -> Iterator[World]:
    world = World()
    yield world
    for worker in world.workers:
        worker.close()


def test_nobody_is_believed_before_he_has_answered(world: World, told: list[str]) -> None:
    world.beat()
    world.beat()
    assert told == []
    assert [each.asked for each in world.workers] == [2, 2]
    world.beat(world.workers[0])
    world.beat()
    assert told == [FED]


def test_one_that_accepts_is_enough(world: World, told: list[str]) -> None:
    sound, _ = world.workers
    world.beat(sound)
    for _ in range(4):
        world.beat(sound)
    assert told == [FED] * 4
    assert world.ended == []


def test_without_answers_it_is_over(world: World, told: list[str]) -> None:
    world.beat(*world.workers)
    beats = int(PROOF_S / BEAT_S)  # that an old answer is good for
    for _ in range(beats + 2):
        world.beat()
    assert told == [FED] * beats


def test_it_is_fed_no_more_often_than_asked(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "watchdog_interval", lambda: 3 * BEAT_S)
    world = World()
    for _ in range(7):
        world.beat(*world.workers)
    assert told == [FED, FED]
    for worker in world.workers:
        worker.close()


def test_a_silent_worker_is_ended_and_the_other_lives(world: World, told: list[str]) -> None:
    sound, hung = world.workers
    world.beat(sound, hung)
    for _ in range(int(SILENCE_S / BEAT_S)):
        assert world.ended == []
        world.beat(sound)
    assert world.ended == [f"worker 1 does not answer for {SILENCE_S:g} s"]
    assert told[-1] == FED
    world.beat(sound)  # it dies slowly: that is said once
    assert len(world.ended) == 1


def test_a_new_process_on_the_slot_starts_afresh(world: World) -> None:
    sound, hung = world.workers
    world.beat(sound)
    for _ in range(int(SILENCE_S / BEAT_S)):
        world.beat(sound)
    hung.pid += 100
    world.beat(sound, hung)
    for _ in range(int(SILENCE_S / BEAT_S) - 1):
        world.beat(sound)
    assert len(world.ended) == 1


def test_one_that_answers_and_takes_nobody_is_ended(world: World, told: list[str]) -> None:
    worker, other = world.workers
    world.workers = [worker]
    other.close()
    world.beat(worker)
    worker.called()
    worker.called()
    beats = int(SILENCE_S / BEAT_S)
    for _ in range(beats):
        assert world.ended == []
        world.beat(worker)
    assert world.ended == [f"worker 0 takes none of 2 waiting clients for {SILENCE_S:g} s"]
    assert told == [FED] * int(PROOF_S / BEAT_S)  # systemd had fallen silent long before


def test_a_queue_that_moves_is_alive(world: World, told: list[str]) -> None:
    """It never gets empty, and everybody gets his turn."""
    busy, other = world.workers
    world.workers = [busy]
    other.close()
    busy.called()
    beats = 2 * int(SILENCE_S / BEAT_S)
    for _ in range(beats):
        busy.called()
        busy.take()
        world.beat(busy)
    assert world.ended == []
    assert len(told) == beats - 1


def test_full_is_not_dead(world: World, told: list[str]) -> None:
    full, other = world.workers
    world.workers = [full]
    other.close()
    full.called()
    for _ in range(2 * int(SILENCE_S / BEAT_S)):
        world.beat(full, accepting=False)
    assert world.ended == []
    assert len(told) >= SILENCE_S / BEAT_S


def test_when_we_slept_nobody_is_blamed(world: World) -> None:
    world.beat(*world.workers)
    world.beat(seconds=10 * SILENCE_S)
    assert world.ended == []
    for _ in range(int(SILENCE_S / BEAT_S)):
        world.beat(world.workers[0])
    assert world.ended == [f"worker 1 does not answer for {SILENCE_S:g} s"]


def test_other_words_are_not_its_own(world: World) -> None:
    assert not world.dog.heard(100, "ready\n")


def test_an_answer_of_one_that_is_gone_is_no_error(world: World) -> None:
    assert world.dog.heard(4711, f"{answer(1, True)}\n")


def test_a_socket_that_is_shut_down_has_nobody_waiting() -> None:
    worker = Worker(0)
    worker.called()
    sock = worker.listeners[0][1]
    assert waiting_clients(sock) == 1
    sock.shutdown(socket.SHUT_RD)
    assert waiting_clients(sock) == 0
    worker.close()
