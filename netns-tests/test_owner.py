"""guard = "owner": the table is ours alone, while we live and no longer than it should."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from lib.daemon import Daemon, tproxyd
from lib.heals import kernel
from lib.netns import Namespace
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for

OWNER = '[rules]\nbackend = "nft"\nguard = "owner"\n'
QUICK = f"drain_timeout_s = 0.1\n{OWNER}"


def attempt(pod: Namespace, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(pod.argv(*command), capture_output=True, text=True, check=False)


def flags(pod: Namespace) -> str:
    lines = pod.run("nft", "list", "ruleset").splitlines()
    return next((line.strip() for line in lines if line.strip().startswith("flags")), "none")


@pytest.mark.parametrize("on_crash", ["closed", "open"])
def test_others_can_neither_flush_nor_edit(net: Topology, on_crash: str) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, f'{QUICK}on_crash = "{on_crash}"\n') as daemon:
        rules = net.pod.run("nft", "list", "ruleset")
        assert flags(net.pod) == "flags owner"
        net.pod.nft("table ip others {\n}\n")
        assert attempt(net.pod, "nft", "flush", "ruleset").returncode == 0  # passes ours over
        assert "others" not in net.pod.run("nft", "list", "ruleset")
        for words in (
            "delete table inet tproxyd",
            "flush table inet tproxyd",
            "insert rule inet tproxyd prerouting accept",
            "add table inet tproxyd",
        ):
            refused = attempt(net.pod, "nft", *words.split())
            assert (refused.returncode, "not permitted" in refused.stderr) == (1, True), words
        assert net.pod.run("nft", "list", "ruleset") == rules
        assert kernel(daemon)["heals"] == 0
        assert_talks(net.pair())
        # What is not in that table is healed as ever.
        net.pod.run("ip", "rule", "del", "priority", "1337")
        wait_for(lambda: kernel(daemon)["heals"] == 1, "the rule")
        assert daemon.stop() == 0
    assert net.pod.dump() == before


def test_a_table_that_stands_is_taken_over_without_a_gap(net: Topology) -> None:
    """As it does when the guard is switched on over rules that are there: clients keep coming."""
    assert tproxyd(net.pod, "install").returncode == 0
    assert flags(net.pod) == "none"
    with Daemon(net.pod, QUICK, guard=True) as daemon:
        assert flags(net.pod) == "flags owner"
        assert "meanwhile" not in net.pod.run("nft", "list", "ruleset")
        assert_talks(net.pair())
        assert daemon.stop() == 0
    assert flags(net.pod) == "flags"  # persist, a word that nft 1.0.6 does not know
    with Daemon(net.pod, QUICK, guard=True):
        assert flags(net.pod) == "flags owner"
        assert_talks(net.pair())
    # Anybody's again, and clean's too.
    done = tproxyd(net.pod, "clean")
    assert done.returncode == 0, done.stderr
    assert "tproxyd" not in net.pod.run("nft", "list", "ruleset")


def test_what_was_left_meanwhile_is_drift_and_cleaned(net: Topology) -> None:
    """A copy of the table that a takeover made, and was killed over."""
    net.pod.nft("table inet tproxyd-meanwhile {\n chain c {\n }\n}\n")
    assert tproxyd(net.pod, "clean").returncode == 0
    assert "tproxyd" not in net.pod.run("nft", "list", "ruleset")


def test_a_foreign_owner_is_named(net: Topology) -> None:
    """Somebody else holds a table of our name; we say so, and go on when it has gone."""
    hold = net.pod.argv("nft", "-i")
    with subprocess.Popen(hold, stdin=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        other.stdin.write("add table inet tproxyd { flags owner; }\n")
        other.stdin.flush()
        wait_for(lambda: "tproxyd" in net.pod.run("nft", "list", "tables"), "its table")
        with Daemon(net.pod, "drain_timeout_s = 0.1\n", guard=True) as daemon:
            wait_for(lambda: daemon.get("/readyz")[0] == 503, "readyz to say so")
            assert "another process owns that table" in daemon.get("/readyz")[1]
            other.stdin.close()
            other.wait(10)
            wait_for(lambda: daemon.get("/readyz")[0] == 200, "the heal", timeout=20)
            assert_talks(net.pair())


def test_without_libnftables_it_is_refused(net: Topology, tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\nfrom tproxyd.kernel import nft\n"
        "nft.Nft.__init__.__defaults__ = ('lib.so.0', *nft.Nft.__init__.__defaults__[1:])\n"
        "from tproxyd.cli import main\nsys.exit(main())\n"
    )
    with Daemon(net.pod, QUICK, script=str(script), ready=False) as daemon:
        assert daemon.process.wait(15) == 3
        assert 'or set guard = "none"' in daemon.stderr


def test_sigkill_of_the_keeper_leaves_it_to_the_next_one(net: Topology) -> None:
    with Daemon(net.pod, QUICK) as daemon:
        os.kill(daemon.keeper(), signal.SIGSTOP)
        os.kill(daemon.keeper(), signal.SIGKILL)
        wait_for(lambda: "was killed by SIGKILL" in daemon.stderr, "its end")
        wait_for(lambda: flags(net.pod) == "flags owner", "another owner")
        assert attempt(net.pod, "nft", "delete", "table", "inet", "tproxyd").returncode == 1
        assert_talks(net.pair())
