"""SIGKILL leaves rules behind, which refuse clients; `clean` then leaves nothing."""

from __future__ import annotations

import os
import signal

import pytest
from lib.daemon import Daemon, tproxyd
from lib.processes import is_gone
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_kill9_then_clean(net: Topology, return_path: str) -> None:
    net.app()
    before = net.pod.dump()
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n') as daemon:
        workers = daemon.workers()
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        wait_for(lambda: all(map(is_gone, workers)), "the workers to follow their supervisor")
    assert net.pod.dump() != before
    with pytest.raises(ConnectionRefusedError):
        net.connect()
    # Without the configuration that installed.
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before
    net.connect()
    assert net.accept().getpeername()[0] == "10.9.1.2"


def test_kill9_then_run_again(net: Topology) -> None:
    before = net.pod.dump()
    with Daemon(net.pod) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
    with Daemon(net.pod, "drain_timeout_s = 0.1\n") as daemon:
        assert_talks(net.pair())
        assert daemon.stop() == 0
    assert net.pod.dump() == before
