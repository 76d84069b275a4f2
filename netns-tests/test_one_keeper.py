"""Two daemons cannot keep one kernel state: the second refuses, and names the first."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time

import pytest
from lib.daemon import ROOT, TPROXYD, Daemon, tproxyd
from lib.reconciler import Supervisor
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for

QUICK = "drain_timeout_s = 0.1\n"


@pytest.mark.parametrize("guard", [False, True], ids=["install", "guard"])
def test_the_second_daemon_refuses(net: Topology, guard: bool) -> None:
    other = f'admin = ""\n{QUICK}[[listener]]\nport = 15007\n'
    with Daemon(net.pod, QUICK) as first:
        made = net.pod.dump()
        with Daemon(net.pod, other, guard=guard, ready=False) as second:
            assert second.process.wait(15) == 3
            name = f"tproxyd (process {first.pid}: "
            assert f"tproxyd: waiting for {name}" in second.stderr
            assert f"tproxyd: can't keep the kernel state: {name}" in second.stderr
            assert "already keeps the kernel state here; stop that one first" in second.stderr
        assert net.pod.dump() == made
        assert_talks(net.pair())
        assert first.stop() == 0


@pytest.mark.parametrize("verb", ["install", "clean", "istio-iptables"])
def test_commands_that_would_be_undone_are_refused(net: Topology, verb: str) -> None:
    with Daemon(net.pod, QUICK) as daemon:
        made = net.pod.dump()
        done = tproxyd(net.pod, verb)
        assert done.returncode != 0
        assert f"tproxyd (process {daemon.pid}: " in done.stderr
        assert "stop it, or change its configuration and reload it" in done.stderr
        assert net.pod.dump() == made
        assert daemon.stop() == 0
    assert tproxyd(net.pod, "clean").returncode == 0


def test_a_daemon_that_only_runs_is_no_keeper(net: Topology) -> None:
    with Daemon(net.pod, install=False):
        assert tproxyd(net.pod, "install").returncode == 0
        assert tproxyd(net.pod, "clean").returncode == 0


def test_rules_of_another_configuration_are_not_replaced_in_silence(net: Topology) -> None:
    said = "rules of another configuration stood here, and were replaced"
    assert tproxyd(net.pod, "install").returncode == 0
    with Daemon(net.pod) as daemon:  # the same
        assert said not in daemon.stderr
        os.kill(daemon.pid, signal.SIGKILL)
    with Daemon(net.pod, "table = 7\n") as daemon:
        assert said in daemon.stderr
        assert daemon.stop() == 0


def test_another_network_namespace_is_another_state(net: Topology) -> None:
    with Daemon(net.pod), Daemon(net.beyond):
        assert_talks(net.pair())


def test_a_restart_after_sigkill_need_not_wait(
    net: Topology, capsys: pytest.CaptureFixture[str]
) -> None:
    with Daemon(net.pod) as first:
        os.kill(first.pid, signal.SIGKILL)
        since = time.monotonic()
        with Daemon(net.pod, QUICK) as second:
            with capsys.disabled():
                print(f"\n  ready {(time.monotonic() - since) * 1000:.0f} ms after SIGKILL", end="")
            assert_talks(net.pair())
            assert second.stop() == 0


def test_a_keeper_that_is_about_to_go_is_waited_for(net: Topology) -> None:
    with Supervisor(net.pod, "") as old:
        assert "error" not in old.do("claim")
        with Daemon(net.pod, QUICK, ready=False) as daemon:
            wait_for(lambda: "listens on" in daemon.stderr or _has_asked(daemon), "its question")
            old.do("close")
            wait_for(lambda: daemon.has_notified("READY=1"), "READY=1")
            assert daemon.stop() == 0


def _has_asked(daemon: Daemon) -> bool:
    try:
        return bool(daemon.keeper())
    except (AssertionError, OSError):
        return False


def test_one_that_is_frozen_is_named_all_the_same(net: Topology) -> None:
    """It can't say who it is; the kernel can."""
    with Daemon(net.pod) as daemon:
        keeper = daemon.keeper()
        os.kill(keeper, signal.SIGSTOP)
        try:
            done = tproxyd(net.pod, "clean")
        finally:
            os.kill(keeper, signal.SIGCONT)
        assert done.returncode == 3
        assert f"tproxyd (process {keeper}) already keeps" in done.stderr


@pytest.mark.parametrize("words", [("clean",), ("run", "--install"), ("exec", "--", "true")])
def test_what_may_not_write_takes_nothing_from_what_serves(
    net: Topology, words: tuple[str, ...]
) -> None:
    """Root without CAP_NET_ADMIN could still set the sysctls back, and no answer came home."""
    assert tproxyd(net.pod, "install").returncode == 0
    with Daemon(net.pod, install=False):
        pair, made = net.pair(), net.pod.dump()
        without = net.pod.argv("setpriv", "--bounding-set=-net_admin", *TPROXYD)
        verb, *rest = words
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write('admin = ""\n[[listener]]\nport = 15007\n')
            file.flush()
            done = subprocess.run(
                [*without, verb, "-c", file.name, *rest],
                capture_output=True,
                text=True,
                check=False,
                cwd=ROOT,
                timeout=30,
            )
        assert done.returncode == 3
        assert "CAP_NET_ADMIN" in done.stderr
        assert "done all the same" not in done.stderr
        assert "nft_compat" not in done.stderr
        assert net.pod.dump() == made
        assert_talks(pair)
        assert_talks(net.pair())
    assert tproxyd(net.pod, "clean").returncode == 0
