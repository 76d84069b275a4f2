"""The supervisor as a real process: start, stop, and workers that die or do not leave."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import Log
from tproxyd.proc import accesslog, generation, reconciler, supervisor, watchdog
from tproxyd.tests.daemons import (
    PR_SET_CHILD_SUBREAPER,
    Daemon,
    Systemd,
    accepts_nothing,
    cannot_be_read,
    crashes_at_start,
    ignores_drain,
    leaves_an_orphan,
    leaves_only_when_cut,
    never_ready,
    refuses,
    say,
    sound_once,
    talks_nonsense,
    tells_its_files,
)
from tproxyd.tests.talker import PATIENCE_S, patience


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons are forked from here, with these."""
    monkeypatch.setattr(generation, "GRACE_S", 0.1)
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)


# Start and stop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(number: int) -> None:
    with Daemon(workers=2) as daemon:
        daemon.wait_ready()
        status = daemon.status()
        assert daemon.ask() in [each["pid"] for each in status["workers"]]
        assert [each["state"] for each in status["workers"]] == ["ready", "ready"]
        assert (status["ready"], status["pid"]) == (True, daemon.pid)
        assert status["listeners"][0]["families"] == ["IPv4"]
        assert daemon.get("/readyz") == (200, "ok\n")
        assert daemon.metric("tproxyd_workers") == 2
        daemon.signal(number)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert {"worker 0 hears drain", "worker 1 hears drain"} <= set(said)
        assert said[-1] == "tproxyd: stopped"


def test_what_it_says_at_the_start() -> None:
    with Daemon(install=True) as daemon:
        daemon.wait_ready()
        port = daemon.config.listeners[0].port
        shown = [re.sub(r"\d+ ms", "N ms", line) for line in daemon.lines]
        assert shown == [
            f"tproxyd: version 0.1.0, pid {daemon.pid}, 1 worker",
            f"tproxyd: inbound listens on port {port} (IPv4) for every port but 15020-15021, 15090",
            "tproxyd: inbound: this machine has no IPv6: IPv4 only",
            f"tproxyd: admin endpoint: http://{daemon.config.admin}/",
            "kernel: install",
            "tproxyd: return path x: because",
            "tproxyd: ready in N ms",
        ]


def test_no_admin_endpoint_is_fine() -> None:
    with Daemon(admin=None) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_stop_during_the_start_is_a_stop() -> None:
    with Daemon(never_ready, drain_timeout_s=0.01) as daemon:
        daemon.wait_line("admin endpoint")
        daemon.signal(signal.SIGTERM)
        daemon.wait_line("does not end: killed")
        assert daemon.wait() == 0


def test_systemd_is_told() -> None:
    with (
        Systemd(WATCHDOG_USEC="20000") as systemd,
        Daemon(install=True, before=systemd.adopt) as daemon,
    ):
        assert systemd.hear() == "READY=1\nSTATUS=Serving"
        daemon.wait_line("kernel: install")  # it was written before READY=1 was sent
        assert systemd.hear() == systemd.hear() == "WATCHDOG=1"
        daemon.signal(signal.SIGTERM)
        said = iter(systemd.hear, "STOPPING=1\nSTATUS=Draining")
        assert set(said) <= {"WATCHDOG=1"}


# What can't start ---------------------------------------------------------------------------------


def test_a_worker_that_refuses_to_start_ends_it_all_with_the_reason() -> None:
    with Daemon(refuses, workers=2) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-1] == ("can't start worker 1: can't do this: it is forbidden; ask somebody")
        assert "worker 0 hears drain" in said


def test_a_worker_that_crashes_at_the_start_ends_it_all() -> None:
    with Daemon(crashes_at_start) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert "RuntimeError: a bug in the worker" in said
        assert said[-1].startswith("can't start worker 0: ended with exit status 70; ")


def test_a_worker_that_is_never_ready_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "START_TIMEOUT_S", 0.05)
    with Daemon(never_ready, drain_timeout_s=0.01) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-1].startswith("can't start the workers: it is not ready after 0.05 s; ")


def test_an_access_log_that_cannot_be_opened(tmp_path: Path) -> None:
    with Daemon(log=Log(access=str(tmp_path / "no" / "such"))) as daemon:
        (said,) = daemon.rest()
        assert said == (
            f"can't open the access log {tmp_path}/no/such: no such file or directory; choose"
            ' another path in log.access, "-" for stdout, or "" for none'
        )
        assert daemon.wait() == 3


def test_an_admin_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint("127.0.0.1", other.getsockname()[1])
        with Daemon(admin=taken) as daemon:
            (said,) = daemon.rest()
            assert said.startswith(f"can't listen on {taken} for the admin endpoint: ")
            assert daemon.wait() == 3


def tells_its_wakeup_fd() -> None:
    close = asyncio.SelectorEventLoop.close

    def spy(loop: asyncio.SelectorEventLoop) -> None:
        fd = signal.set_wakeup_fd(-1)  # what it was before
        signal.set_wakeup_fd(fd)
        say(f"its loop closes, and {'no' if fd < 0 else 'a'} signal is written to it")
        close(loop)

    asyncio.SelectorEventLoop.close = spy  # type: ignore[method-assign, assignment]


def test_nothing_is_heard_once_the_loop_closes_however_it_ended() -> None:
    """Python would say "Exception ignored when trying to write to the signal wakeup fd"."""
    with Daemon(load=cannot_be_read, install=True, before=tells_its_wakeup_fd) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-2:] == [
            "its loop closes, and no signal is written to it",
            "can't read the kernel state: it is forbidden; ask somebody",
        ]


def test_a_bug_in_what_goes_on_for_ever_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(accesslog.AccessLog, "follow", fails)
    monkeypatch.setattr(supervisor, "FOLLOW_EVERY_S", 0.01)
    with Daemon() as daemon:
        daemon.wait_line(r"Supervisor\._watch_logs has ended by a bug; the rest goes on")
        daemon.wait_line("RuntimeError: a bug")
        assert daemon.get("/readyz")[0] == 200


# Workers that die ---------------------------------------------------------------------------------


def test_the_next_worker_serves_what_waited_and_counts_on() -> None:
    with Daemon() as daemon:
        daemon.wait_ready()
        first = daemon.ask()
        os.kill(first, signal.SIGSTOP)
        with daemon.connect() as waiting:  # in the accept queue of the stopped one
            os.kill(first, signal.SIGKILL)
            daemon.wait_line("worker 0 was killed by SIGKILL; the next one starts")
            second = int(waiting.recv(100))
        assert second != first
        daemon.wait_line("worker 0 is ready again")
        assert daemon.metric('tproxyd_bytes_total{direction="sent"}') == 200
        assert daemon.metric('tproxyd_connections_active{listener="inbound"}') == 1
        assert daemon.metric("tproxyd_worker_restarts_total") == 1
        assert daemon.status()["workers"][0]["pid"] == second


def test_workers_that_keep_dying_are_tried_again_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generation, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(generation, "LONGEST_PAUSE_S", 0.05)
    with Daemon(sound_once) as daemon:
        daemon.wait_ready()
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("killed by SIGKILL; the next one starts in 0.01 s")
        for pause in ("0.02", "0.04", "0.05", "0.05"):
            daemon.wait_line(f"worker 0 no longer; the next one starts in {pause} s")
        assert "worker 0 is " in daemon.wait_readyz(503)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_worker_that_lived_long_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SOUND_S", 0.0)
    with Daemon() as daemon:
        daemon.wait_ready()
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("the next one starts now")
        daemon.wait_line("worker 0 is ready again")


def test_a_worker_gets_no_file_but_its_own(tmp_path: Path) -> None:
    def with_a_low_limit() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    log = Log(access=str(tmp_path / "log"))
    daemon = Daemon(tells_its_files, workers=2, log=log, before=with_a_low_limit)
    with daemon:
        for _ in range(2):
            daemon.wait_line(r"worker . has stray \[\], all of its files True")
        daemon.wait_ready()
        assert daemon.config.admin is not None
        with socket.create_connection(daemon.config.admin):  # the loop holds more files now
            daemon.get("/livez")
            os.kill(daemon.ask(), signal.SIGKILL)
            daemon.wait_line(r"worker . has stray \[\], all of its files True")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640


def test_orphans_are_reaped() -> None:
    """As PID 1 would: the daemon is made the one that inherits them."""

    def subreaper() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

    with Daemon(leaves_an_orphan, before=subreaper) as daemon:
        orphan = int(daemon.wait_line("has child").split()[-1])
        daemon.wait_ready()
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("worker 0 is ready again")
        assert orphan in daemon.children()
        os.kill(orphan, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while orphan in daemon.children():
            assert time.monotonic() < deadline


def test_children_outlive_neither_the_supervisor_nor_ctrl_c() -> None:
    with Daemon(workers=2) as daemon:
        daemon.wait_ready()
        for pid in daemon.children():  # as Ctrl-C and systemd do
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert daemon.get("/readyz")[0] == 200
        daemon.signal(signal.SIGKILL)
        said = daemon.rest()  # to the end: every process has gone
        assert {"worker 0 hears nobody", "worker 1 hears nobody"} <= set(said)


# Workers that are not ours any more ---------------------------------------------------------------


def test_a_worker_that_makes_no_sense_is_ended() -> None:
    with Daemon(talks_nonsense) as daemon:
        daemon.wait_ready()
        with daemon.connect() as client:
            client.sendall(b"stay")
            daemon.wait_line(r"worker 0 \(pid \d+\) is not to be trusted: killed")
            daemon.wait_line("worker 0 was killed by SIGKILL; the next one starts")
            daemon.wait_line("worker 0 is ready again")


def test_last_words_that_make_no_sense_keep_nobody_from_being_replaced() -> None:
    with Daemon(talks_nonsense) as daemon:
        daemon.wait_ready()
        (worker,) = (each["pid"] for each in daemon.status()["workers"])
        daemon.signal(signal.SIGSTOP)  # so that it hears of words and end at once
        with daemon.connect() as client:
            client.sendall(b"end")
            waiting = patience("the worker to have ended")
            while "\nState:\tZ" not in Path(f"/proc/{worker}/status").read_text():
                next(waiting)
            daemon.signal(signal.SIGCONT)
            daemon.wait_line("worker 0 ended with exit status 0; the next one starts")
            daemon.wait_line("worker 0 is ready again")


def test_who_is_reaped_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    slot = generation.Slot(0, [])
    slot.kill("does not end")
    slot.pid = 4711
    slot.kill("does not end")
    assert killed == [4711]


def test_a_child_whose_end_is_a_bug_takes_no_other_along() -> None:
    def one_that_fails() -> None:
        reaped = supervisor.Supervisor._reaped
        once = iter([RuntimeError("a bug")])

        def fails_once(self: supervisor.Supervisor, pid: int, code: int) -> None:
            for error in once:
                raise error
            reaped(self, pid, code)

        supervisor.Supervisor._reaped = fails_once  # type: ignore[method-assign]

    with Daemon(workers=2, before=one_that_fails) as daemon:
        daemon.wait_ready()
        workers = [each["pid"] for each in daemon.status()["workers"]]
        daemon.signal(signal.SIGSTOP)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        daemon.signal(signal.SIGCONT)
        daemon.wait_line(r"the end of process \d+ is not seen to: this is a bug")
        daemon.wait_line("RuntimeError: a bug")
        daemon.wait_line("was killed by SIGKILL; the next one starts")


# Workers that hang --------------------------------------------------------------------------------


def test_a_worker_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    _quick_watchdog(monkeypatch)
    with Daemon() as daemon:
        daemon.wait_ready()
        hung = daemon.ask()
        os.kill(hung, signal.SIGSTOP)
        with daemon.connect() as waiting:
            daemon.wait_line(rf"worker 0 \(pid {hung}\) does not answer for \d+ s: killed")
            daemon.wait_line("worker 0 is ready again")
            assert int(waiting.recv(100)) != hung  # its queue is the next one's


def test_a_worker_that_answers_but_accepts_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _quick_watchdog(monkeypatch)
    with Daemon(accepts_nothing) as daemon:
        daemon.wait_ready()
        with daemon.connect():
            daemon.wait_line(r"worker 0 \(pid \d+\) takes none of 1 waiting clients for .*: killed")
            daemon.wait_line("worker 0 is ready again")


def test_systemd_is_fed_only_while_a_worker_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    _quick_watchdog(monkeypatch)
    monkeypatch.setattr(watchdog, "SILENCE_S", PATIENCE_S)  # nobody is replaced here
    with Systemd(WATCHDOG_USEC="20000") as systemd, Daemon(before=systemd.adopt) as daemon:
        daemon.wait_ready()
        systemd.wait_for("WATCHDOG=1")
        worker = daemon.ask()
        os.kill(worker, signal.SIGSTOP)
        systemd.wait_silence(watchdog.PROOF_S * 2)
        os.kill(worker, signal.SIGCONT)
        systemd.wait_for("WATCHDOG=1")


def _quick_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BEAT_S", 0.02), ("SILENCE_S", 0.3), ("PROOF_S", 0.2)):
        monkeypatch.setattr(watchdog, name, value)


# Workers that do not leave ------------------------------------------------------------------------


def test_a_worker_that_ignores_the_drain_is_killed() -> None:
    with Daemon(ignores_drain, drain_timeout_s=0.05) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.wait_line(r"worker 0 \(pid \d+\) does not end: killed")
        assert daemon.wait() == 0


def test_a_second_signal_cuts_the_drain_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GRACE_S", PATIENCE_S)
    with Daemon(leaves_only_when_cut, drain_timeout_s=3600.0) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.wait_line(
            "1 connection is open: waiting 3600 s at most; a second signal cuts that short"
        )
        daemon.wait_line("worker 0 hears drain")
        assert daemon.get("/readyz") == (503, "stopping\n")
        assert daemon.status()["workers"][0]["state"] == "draining"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert not [line for line in daemon.rest() if "killed" in line]
