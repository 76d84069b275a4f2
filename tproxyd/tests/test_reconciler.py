"""The kernel state as a running daemon handles it: order, drift, and a holder that fails."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tproxyd.config import Config
from tproxyd.proc import generation, keeper, reconciler, supervisor
from tproxyd.proc.means import Kernel, Means, Report, Verb
from tproxyd.tests.daemons import (
    Daemon,
    Quiet,
    cannot_be_read,
    drifts_while,
    fails_halfway,
    never_answers,
    not_installed,
    refuses_install,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons are forked from here, with these."""
    monkeypatch.setattr(generation, "GRACE_S", 0.1)
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)


# The kernel state ---------------------------------------------------------------------------------


def test_interception_begins_last_and_ends_first() -> None:
    with Daemon(install=True) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.rest()
        assert daemon.wait() == 0
        ours = ("kernel:", "worker", "tproxyd: ready")
        story = [re.sub(r" in \d+ ms", "", line) for line in daemon.lines if line.startswith(ours)]
        assert story == [
            "kernel: install",
            "tproxyd: ready",
            "kernel: stop intercepting",
            "worker 0 hears drain",
            "kernel: clean",
        ]


def test_without_install_the_kernel_is_only_read() -> None:
    with Daemon() as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state is as configured")
        assert daemon.status()["kernel"] | {"checked_s_ago": 0} == {
            "state": "ok",
            "detail": [],
            "return_path": "x",
            "checked_s_ago": 0,
            "heals": 0,
            "heal_failures": 0,
            "trouble": "",
            "last_heal": None,
        }
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        assert not [line for line in (*daemon.lines, *daemon.rest()) if line.startswith("kernel:")]


def test_an_install_that_fails_halfway_is_undone() -> None:
    with Daemon(load=fails_halfway, install=True) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-1] == "can't install the kernel state: it is forbidden; ask somebody"
        assert said[-4:-1] == ["kernel: stop intercepting", "worker 0 hears drain", "kernel: clean"]


def test_an_install_that_wrote_nothing_removes_nothing() -> None:
    with Daemon(load=refuses_install, install=True) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 3
        assert said[-2:] == [
            "worker 0 hears drain",
            "can't install the kernel state: it is forbidden; ask somebody",
        ]
        assert not [line for line in said if line.startswith("kernel:")]


def test_drift_is_told_and_counted_once_and_makes_unready(tmp_path: Path) -> None:
    sign = tmp_path / "drift"
    with Daemon(load=drifts_while(sign)) as daemon:
        daemon.wait_ready()
        assert daemon.get("/readyz")[0] == 200
        for times in (1, 2):
            sign.touch()
            for _ in range(3):
                assert daemon.get("/readyz") == (503, "kernel state: drift; to do: add a rule\n")
            assert daemon.metric("tproxyd_kernel_drift_total") == times
            sign.unlink()
            assert daemon.get("/readyz")[0] == 200
        daemon.signal(signal.SIGTERM)
        told = [line for line in daemon.rest() if "kernel state" in line]
        assert (
            told[1:]  # the first says how it began
            == [
                "tproxyd: the kernel state differs from the configuration; to do: add a rule",
                "tproxyd: the kernel state is as configured",
            ]
            * 2
        )


def test_a_keeper_that_hangs_lets_no_probe_wait(tmp_path: Path) -> None:
    """What was read last is said, until it answers or is killed for its silence."""
    sign = tmp_path / "drift"
    sign.touch()
    with Daemon(load=drifts_while(sign)) as daemon:
        daemon.wait_ready()
        daemon.wait_readyz(503)
        keeper = keeper_of(daemon)
        os.kill(keeper, signal.SIGSTOP)
        sign.unlink()
        assert daemon.get("/readyz") == (503, "kernel state: drift; to do: add a rule\n")
        kernel = daemon.status()["kernel"]
        assert (kernel["state"], kernel["checked_s_ago"] is None) == ("drift", False)
        os.kill(keeper, signal.SIGCONT)
        daemon.wait_readyz(200)


def test_a_state_that_is_not_installed_is_not_drift() -> None:
    with Daemon(load=not_installed) as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state is not installed; try tproxyd install")
        assert daemon.get("/readyz") == (503, "kernel state: not installed\n")
        assert daemon.metric("tproxyd_kernel_drift_total") == 0


def test_a_state_that_cannot_be_read_is_unknown_and_no_reason_to_be_unready() -> None:
    with Daemon(load=cannot_be_read) as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state can't be read: it is forbidden; ask somebody")
        assert daemon.get("/readyz")[0] == 200
        assert daemon.status()["kernel"]["state"] == "unknown"


def test_a_kernel_that_never_answers_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "REQUEST_TIMEOUT_S", 0.05)
    with Daemon(load=never_answers) as daemon:
        daemon.wait_ready()
        daemon.wait_line("the kernel state can't be read: no answer within 0.05 s")
        assert daemon.get("/readyz")[0] == 200


def test_a_keeper_that_died_is_forked_again_at_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "CHECK_EVERY_S", 3600.0)  # which would need one, too
    with Daemon(install=True) as daemon:
        daemon.wait_ready()
        os.kill(keeper_of(daemon), signal.SIGKILL)
        daemon.wait_line("the process that holds the kernel state was killed by SIGKILL")
        daemon.wait_line("kernel: install")  # nobody asked
        daemon.signal(signal.SIGTERM)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert [line for line in said if line.startswith("kernel:")] == [
            "kernel: stop intercepting",
            "kernel: clean",
        ]


def keeper_of(daemon: Daemon) -> int:
    workers = [each["pid"] for each in daemon.status()["workers"]]
    (keeper,) = set(daemon.children()) - set(workers)
    return keeper


def test_many_who_ask_cause_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "FRESH_S", 3600.0)
    looks = itertools.count(1)

    def counts_looks(_: Config) -> Kernel:
        return lambda _: Report((), (), (f"look {next(looks)}",), True, "x")

    with Daemon(load=counts_looks) as daemon:
        daemon.wait_ready()
        answers = {daemon.get("/readyz")[1] for _ in range(5)}
        assert answers == {"kernel state: drift; to do: look 1\n"}


@pytest.mark.parametrize("prepare", [True, False])
def test_what_the_first_install_needs_is_loaded_ahead_of_all_else(
    monkeypatch: pytest.MonkeyPatch, *, prepare: bool
) -> None:
    done = []

    def load(_config: Config) -> Kernel:
        done.append("load")
        return lambda _: Report()

    monkeypatch.setattr(keeper, "name_process", lambda _name: None)
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        means = Means(load, Quiet, lambda: done.append("prepare"))
        keeper.serve(theirs, Config(), means, prepare=prepare)
    assert done == ["prepare", "load"][not prepare :]


def test_a_library_that_is_gone_meanwhile_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that cleans loads it then, perhaps weeks after the start."""

    def gone(_config: Config) -> Kernel:
        def kernel(_verb: Verb) -> Report:
            raise ModuleNotFoundError("No module named 'pyroute2'")

        return kernel

    monkeypatch.setattr(keeper, "name_process", lambda _name: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(json.dumps({"verb": Verb.CLEAN, "n": 1}).encode() + b"\n")
        ours.shutdown(socket.SHUT_WR)
        keeper.serve(theirs, Config(), Means(gone, Quiet))
        what, why, hint = json.loads(ours.recv(4096))["error"]
    assert (what, why) == ("load what writes to the kernel", "No module named 'pyroute2'")
    assert "tproxyd clean" in hint
