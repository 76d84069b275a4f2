"""Guarding: when it looks, what it says, when it pauses, and what it does at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tproxyd.config import Config, OnCrash, Rules
from tproxyd.errors import KernelError
from tproxyd.kernel.watch import News
from tproxyd.proc import generation, keeper, pace, reconciler, supervisor
from tproxyd.proc.heals import BOUNDS, Heals
from tproxyd.proc.means import Kernel, Means, Report, Verb
from tproxyd.proc.pace import CALM_S, FIRST_S, FREE_HEALS, LONGEST_S, SOON_S, Pace
from tproxyd.proc.reconciler import State, Verdict
from tproxyd.tests.daemons import Daemon, Quiet, say
from tproxyd.tests.talker import patience

# When to try again --------------------------------------------------------------------------------


def test_a_heal_costs_no_pause_until_it_is_a_fight() -> None:
    pace, now, pauses = Pace(), 1000.0, []
    for times in range(1, FREE_HEALS + 11):
        assert pace.healed(now, ["a rule"]) == times
        pauses.append(round(pace.not_before - now, 6))
        assert pace.fighting == (times > FREE_HEALS)
        now = pace.not_before + 0.05
    assert pauses[:FREE_HEALS] == [0.0] * FREE_HEALS
    assert pauses[FREE_HEALS : FREE_HEALS + 8] == [FIRST_S * 2**n for n in range(7)] + [LONGEST_S]
    assert pauses[-1] == LONGEST_S


def test_different_things_are_no_fight() -> None:
    pace = Pace()
    for number in range(3 * FREE_HEALS):
        assert pace.healed(1000.0 + number / 10, [f"rule {number}"]) == 1
    assert not pace.fighting


@pytest.mark.parametrize("end", ["healed", "failed"])
def test_a_calm_ends_a_row(end: str) -> None:
    pace, now = Pace(), 1000.0
    for _ in range(FREE_HEALS + 4):
        pace.healed(now, ["a rule"])
        now = pace.not_before
    now += max(CALM_S, 2 * 0.8) + 0.01
    if end == "healed":
        assert pace.healed(now, ["a rule"]) == 1
        assert (pace.fighting, pace.not_before) == (False, now)
    else:
        pace.failed(now)
        assert pace.not_before == pytest.approx(now + FIRST_S)


def test_a_failure_pauses_at_once_and_longer_each_time() -> None:
    pace, now, pauses = Pace(), 1000.0, []
    for _ in range(10):
        pace.failed(now)
        pauses.append(round(pace.not_before - now, 6))
        now = pace.not_before
    assert pauses == [min(FIRST_S * 2**n, LONGEST_S) for n in range(10)]
    # Something that was in the way may have moved.
    assert pace.try_soon() == pace.not_before == pytest.approx(now - pauses[-1] + SOON_S)
    pace.hurry()
    assert pace.not_before == -inf


# What is told -------------------------------------------------------------------------------------


def healed(seconds: float = 0.02, by: tuple[str, ...] = ("nft (process 7)",)) -> dict[str, Any]:
    done = {"wrong": ["a rule was gone", "x=0"], "done": ["add a rule", "set x=1"]}
    return {"news": "healed", "seconds": seconds, "by": list(by), **done}


def test_heals_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    heals = Heals()
    assert heals.note(healed()) == 1
    assert heals.last is not None
    assert heals.last["by"] == ["nft (process 7)"]
    assert heals.last["wrong"] == ["a rule was gone", "x=0"]
    assert caplog.messages == [
        "the kernel state was changed by nft (process 7); healed in 20 ms: a rule was gone; x=0"
    ]
    assert heals.note(healed(99.0, ())) == 1
    assert caplog.messages[1].startswith("the kernel state was changed; healed in 99000 ms")
    counts = heals.counts()
    assert (counts.healed, counts.failed, counts.seconds) == (2, 0, 99.02)
    assert counts.buckets == tuple(int(i in (1, len(BOUNDS))) for i in range(len(BOUNDS) + 1))


def test_a_failure_is_one_drift_and_told_once_for_each_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heals, failed = Heals(), {"news": "failed", "why": "can't", "new": True}
    assert heals.note(failed) == 1
    assert heals.note({**failed, "new": False}) == 0
    assert heals.note({**failed, "why": "can't either"}) == 0
    assert heals.trouble == "can't either"
    assert heals.note(healed()) == 0  # the drift that it heals was counted
    heals.note({"news": "well"})
    assert (heals.trouble, heals.healed, heals.failed) == ("", 1, 3)
    assert [message.rpartition(": ")[2] for message in caplog.messages[:2]] == [
        "can't",
        "can't either",
    ]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict(State.OK), ""),
        (Verdict(State.UNKNOWN, ("not read yet",)), ""),
        (Verdict(State.NOT_INSTALLED, ("add x",)), "kernel state: not installed"),
        (Verdict(State.DRIFT, ("add x", "add y")), "kernel state: drift; to do: add x; add y"),
        (
            Verdict(State.DRIFT, ("add x",), trouble="can't"),
            "kernel state: drift; to do: add x; healing fails: can't",
        ),
        (
            Verdict(State.NOT_INSTALLED, ("add x",), trouble="can't"),
            "kernel state: not installed; to do: add x; healing fails: can't",
        ),
        (Verdict(State.OK, trouble="lo is down"), "kernel state: healing fails: lo is down"),
        (Verdict(State.UNKNOWN, trouble="can't"), "kernel state: healing fails: can't"),
    ],
)
def test_why_it_is_not_ready(verdict: Verdict, said: str) -> None:
    assert verdict.unready == said


# The loop, with a kernel that is a directory ------------------------------------------------------


class Bell(Quiet):
    """Rings when somebody writes to a pipe; claims and follows are written down."""

    def __init__(self, here: Path) -> None:
        self.here = here
        os.set_blocking(fd := os.open(here / "bell", os.O_RDWR), False)
        self.file = open(fd, "rb", buffering=0)  # noqa: SIM115 -- it lives as long as this does

    def files(self) -> tuple[Any, ...]:
        return (self.file,)

    def claim(self) -> None:
        if (self.here / "taken").exists():
            raise KernelError("keep the kernel state", "another does", "stop that")
        say("claimed")

    def release(self) -> None:
        say("released")

    def read(self) -> News:
        rung = self.file.read(1000) or b""
        authors = ("somebody",) if b"!" in rung else ()
        return News(bool(rung), b"r" in rung, False, authors)

    def changed(self) -> bool:
        return (self.here / "silent").exists()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "bell")
    return tmp_path


def kernel_in(here: Path) -> Callable[[Config], Kernel]:
    """The state is the file "state", with the configuration's table in it."""

    def load(config: Config) -> Kernel:
        def kernel(verb: Verb) -> Report:
            if verb is Verb.RELEASE:
                say("kernel: release")
                return Report()
            want = {Verb.CLEAN: "", Verb.STOP_INTERCEPTING: "drain"}.get(verb, f"{config.table}")
            is_now = (here / "state").read_text() if (here / "state").exists() else ""
            if verb is Verb.CHECK or is_now == want:
                differs = () if is_now == want else (f"add {want}",)
                return Report((), (), differs, bool(is_now), "x")
            if (here / "refused").exists() or config.table == 666:
                raise KernelError(f"add {want}", "File exists", "remove that")
            (here / "state").write_text(want)
            return Report((f"add {want}",), (), (), True, "x", (f"{is_now} instead of {want}",))

        return kernel

    return load


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GRACE_S", 0.1)
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)
    # Nothing but what is rung for.
    monkeypatch.setattr(keeper, "POLL_S", 3600.0)
    monkeypatch.setattr(keeper, "LOOK_S", 3600.0)
    monkeypatch.setattr(supervisor, "CHECK_EVERY_S", 3600.0)


def ring(here: Path, tone: str = "!") -> None:
    (here / "bell").write_text(tone)


CLOSED = Rules()


def guarded(
    here: Path, *, install: bool = True, guard: bool = False, rules: Rules = CLOSED
) -> Daemon:
    return Daemon(
        load=kernel_in(here),
        outside=lambda: Bell(here),
        install=install,
        guard=guard,
        table=133,
        rules=rules,
    )


def test_what_is_heard_is_healed_and_told(here: Path) -> None:
    with guarded(here) as daemon:
        daemon.wait_ready()
        for times in (1, 2):
            (here / "state").write_text("rubbish")
            ring(here)
            daemon.wait_line(r"changed by somebody; healed in \d+ ms: rubbish instead of 133$")
            assert (here / "state").read_text() == "133"
            assert daemon.metric("tproxyd_kernel_drift_total") == times
            assert daemon.metric('tproxyd_kernel_heals_total{result="healed"}') == times
            assert daemon.metric("tproxyd_kernel_heal_seconds_count") == times
        assert daemon.status()["kernel"]["last_heal"]["by"] == ["somebody"]
        daemon.signal(signal.SIGTERM)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert (here / "state").read_text() == ""
        assert "released" in said


@pytest.mark.parametrize("means", ["POLL_S", "LOOK_S"])
def test_what_sends_no_event_is_looked_at(
    here: Path, means: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, means, 0.01)
    (here / "silent").touch()
    with guarded(here) as daemon:
        daemon.wait_ready()
        daemon.get("/readyz")  # behind the look with which it begins
        (here / "state").write_text("rubbish")
        daemon.wait_line("the kernel state was changed; healed in")


def test_a_check_heals_too(here: Path) -> None:
    with guarded(here) as daemon:
        daemon.wait_ready()
        (here / "state").write_text("rubbish")
        assert daemon.get("/readyz") == (200, "ok\n")
        assert (here / "state").read_text() == "133"


def test_a_storm_is_a_look_now_and_then(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand events, rung one by one: not a thousand looks."""
    looks = 0
    ours, theirs = socket.socketpair()
    load = kernel_in(here)

    def counting(config: Config) -> Kernel:
        kernel = load(config)

        def count(verb: Verb) -> Report:
            nonlocal looks
            looks += verb is Verb.INSTALL
            return kernel(verb)

        return count

    with running(theirs, counting, here):
        ask(ours, Verb.INSTALL)
        for _ in range(1000):
            ring(here)
        (here / "state").write_text("rubbish")
        ring(here)
        assert json.loads(ours.recv(4096))["news"] == "healed"
        ours.close()
    assert 2 <= looks < 100


@pytest.mark.parametrize("cost", [0.001, 0.2])
def test_however_dear_a_look_is_a_storm_takes_its_share(
    here: Path, cost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a router with a million routes, or among ten thousand chains."""
    spent = 0.0
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    monkeypatch.setattr("time.process_time", lambda: spent)

    def dear(_: Config) -> Kernel:
        def kernel(_: Verb) -> Report:
            nonlocal spent
            spent += cost
            return Report(installed=True)

        return kernel

    ours, theirs = socket.socketpair()
    bell = Bell(here)
    with ours, theirs, bell.file:
        kept = keeper.Keeper(theirs, Config(), Means(dear, lambda: bell))
        kept.take_up(Verb.INSTALL)
        kept._act()
        ring(here)
        kept._hear()
        assert kept._look_at == pytest.approx(1000.0 + max(keeper.GAP_S, keeper.SHARE * cost))


def test_a_failure_is_told_once_tried_again_and_healed(here: Path) -> None:
    with guarded(here) as daemon:
        daemon.wait_ready()
        (here / "refused").touch()
        (here / "state").write_text("rubbish")
        ring(here)
        said = "can't add 133: File exists; remove that"
        daemon.wait_line(f"healing it fails: {said}")
        why = daemon.wait_readyz(503)
        assert why == f"kernel state: drift; to do: add 133; healing fails: {said}\n"
        assert daemon.status()["kernel"]["trouble"] == said
        waiting = patience("three failures")
        while daemon.metric('tproxyd_kernel_heals_total{result="failed"}') < 3:
            next(waiting)
        (here / "refused").unlink()
        ring(here, "r")  # something moved that may have been in the way
        daemon.wait_line("healed in")
        assert daemon.get("/readyz")[0] == 200
        assert daemon.status()["kernel"]["trouble"] == ""
        assert daemon.metric("tproxyd_kernel_drift_total") == 1
        assert sum("healing it fails" in line for line in daemon.lines) == 1


def test_a_fight_is_told_and_paused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_S", 60.0)
    monkeypatch.setattr(pace, "LONGEST_S", 60.0)
    with guarded(here) as daemon:
        daemon.wait_ready()
        for _ in range(FREE_HEALS + 1):
            (here / "state").write_text("rubbish")
            ring(here)
            daemon.wait_line("healed in")
        daemon.wait_line("another program undoes what is healed, 6 times by now")
        (here / "state").write_text("rubbish")
        ring(here)
        undone = "another program undoes what is healed, again and again"
        assert daemon.wait_readyz(503).endswith(f"healing fails: {undone}\n")


# Who keeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["install", "guard"])
def test_another_keeper_ends_the_start(here: Path, how: str) -> None:
    (here / "taken").touch()
    with guarded(here, install=how == "install", guard=how == "guard") as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert "can't keep the kernel state: another does; stop that" in said
        assert not (here / "state").exists()


def test_guard_heals_at_the_start_and_leaves_the_state(here: Path) -> None:
    with guarded(here, install=False, guard=True) as daemon:
        daemon.wait_line("healed in")
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert {"kernel: release", "released"} <= set(said)
        assert (here / "state").read_text() == "133"


def test_guard_starts_even_where_it_cannot_heal_yet(here: Path) -> None:
    (here / "refused").touch()
    with guarded(here, install=False, guard=True) as daemon:
        daemon.wait_ready()
        assert "healing fails: can't add 133" in daemon.wait_readyz(503)
        (here / "refused").unlink()
        daemon.wait_readyz(200)


def test_a_drain_is_guarded_too(here: Path) -> None:
    """Nothing is put back that the stop has taken away."""
    ours, theirs = socket.socketpair()
    with running(theirs, kernel_in(here), here):
        ask(ours, Verb.INSTALL)
        ask(ours, Verb.STOP_INTERCEPTING)
        (here / "state").write_text("rubbish")
        ring(here)
        assert json.loads(ours.recv(4096))["done"] == ["add drain"]
        ask(ours, Verb.CLEAN)
        (here / "state").write_text("rubbish")
        ring(here)
        assert ask(ours, Verb.CHECK)["report"]["changed"] == []
        assert (here / "state").read_text() == "rubbish"
        ours.close()


# The end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", OnCrash)
@pytest.mark.parametrize("how", ["install", "guard", "neither"])
def test_without_a_farewell_the_policy_counts(here: Path, policy: OnCrash, how: str) -> None:
    (here / "state").write_text("133")
    rules = Rules(on_crash=policy)
    with guarded(here, install=how == "install", guard=how == "guard", rules=rules) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGKILL)
        said = "\n".join(daemon.rest())
        opened = policy is OnCrash.OPEN and how != "neither"
        assert (here / "state").read_text() == ("drain" if opened else "133")
        assert ("clients reach the application directly" in said) == opened
        closed = policy is OnCrash.CLOSED and how != "neither"
        assert ("the rules stay, and clients are refused" in said) == closed


# Move and release ---------------------------------------------------------------------------------


def test_move(here: Path) -> None:
    ours, theirs = socket.socketpair()
    with running(theirs, kernel_in(here), here):
        ask(ours, Verb.INSTALL)
        assert ask(ours, Verb.MOVE, table=7)["report"]["changed"] == ["add 7"]
        (here / "state").write_text("rubbish")
        ring(here)
        assert json.loads(ours.recv(4096))["done"] == ["add 7"]
        # Not to where it is refused: then it is the old one again, at once and later.
        assert ask(ours, Verb.MOVE, table=666)["error"][0] == "add 666"
        assert (here / "state").read_text() == "7"
        (here / "state").write_text("rubbish")
        ring(here)
        assert json.loads(ours.recv(4096))["done"] == ["add 7"]
        assert ask(ours, Verb.RELEASE)["report"]["changed"] == []
        (here / "state").write_text("rubbish")
        assert ask(ours, Verb.CHECK)["report"]["differs"] == ["add 7"]
        # Who does not keep it only looks at it from then on.
        assert ask(ours, Verb.MOVE, table=8)["report"]["changed"] == []
        assert ask(ours, Verb.CHECK)["report"]["differs"] == ["add 8"]
        ours.close()


def ask(sock: socket.socket, verb: Verb, **config: int) -> dict[str, Any]:
    moved = dataclasses.replace(Config(), **config) if config else None  # type: ignore[arg-type]
    sock.sendall(reconciler._request(verb, 1, moved))
    return dict(json.loads(sock.recv(65536)))


class running:
    """A keeper in a thread of the test."""

    def __init__(self, sock: socket.socket, load: Callable[[Config], Kernel], here: Path) -> None:
        self._sock, self._bell = sock, Bell(here)
        means = Means(load, lambda: self._bell)
        self._thread = threading.Thread(
            target=lambda: keeper.Keeper(sock, Config(), means).run(), daemon=True
        )

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._sock.close()
        self._bell.file.close()
