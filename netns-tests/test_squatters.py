"""An ordinary user who binds our abstract names keeps nobody from anything.

Such names belong to the network namespace, and any user in it may bind any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lib.daemon import Daemon, tproxyd
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for

from tproxyd.tests.strangers import NOBODY, squatter

COMMAND = "\0tproxyd/command/127.0.0.1:9133"
NAMES = ("\0tproxyd/kernel", "\0tproxyd/keeper", COMMAND)
QUICK = "drain_timeout_s = 0.1\n"


@pytest.fixture(params=[True, False], ids=["listens", "silent"])
def squatted(net: Topology, request: pytest.FixtureRequest) -> Iterator[ExitStack]:
    """Until it is closed."""
    with ExitStack() as names:

        def squat() -> None:
            for name in NAMES:
                names.enter_context(squatter(name, listens=request.param))

        net.pod.inside(squat)
        yield names


@pytest.mark.usefixtures("squatted")
def test_install_and_clean(net: Topology) -> None:
    before = net.pod.dump()
    assert tproxyd(net.pod, "install").returncode == 0
    assert net.pod.dump() != before
    done = tproxyd(net.pod, "clean")
    assert (done.returncode, done.stderr) == (0, "")
    assert net.pod.dump() == before


def test_a_daemon_serves_and_guards(net: Topology, squatted: ExitStack) -> None:
    with Daemon(net.pod, QUICK, guard=True) as daemon:
        assert f"can't listen on the command socket @{COMMAND[1:]}: " in daemon.stderr
        assert "SIGHUP reloads" in daemon.stderr
        assert "another tproxyd" not in daemon.stderr
        assert_talks(net.pair())
        net.pod.nft("flush ruleset")
        wait_for(lambda: "tproxyd" in net.pod.run("nft", "list", "ruleset"), "the rules")
        told = tproxyd(net.pod, "clean")
        assert told.returncode == 3
        assert f"tproxyd (process {daemon.keeper()}: " in told.stderr
        told = tproxyd(net.pod, "reload")
        assert told.returncode == 1
        assert f"of uid {NOBODY} has taken" in told.stderr or "none runs" in told.stderr
        squatted.close()
        wait_for(lambda: "is there now" in daemon.stderr, "the command socket")
        assert tproxyd(net.pod, "reload").returncode == 0
        assert daemon.stop() == 0
    assert tproxyd(net.pod, "clean").returncode == 0
