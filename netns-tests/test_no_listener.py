"""Rules and nobody behind them: the client is refused at once and never gets past the proxy."""

from __future__ import annotations

import time

import pytest
from lib.daemon import Daemon, tproxyd
from lib.streams import assert_talks
from lib.topology import Family, Topology


def test_rules_without_a_daemon(net: Topology, family: Family) -> None:
    net.app(family)
    assert tproxyd(net.pod, "install").returncode == 0
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        net.connect(family)
    assert time.monotonic() - began < 0.5
    assert net.app_saw_nothing(family)

    assert tproxyd(net.pod, "clean").returncode == 0
    net.connect(family)
    assert net.accept(family).getpeername()[0] == family.client


def test_daemon_takes_over_standing_rules(net: Topology) -> None:
    """`install` from one unit and `run` from another, and the rules outlive the daemon."""
    assert tproxyd(net.pod, "install").returncode == 0
    with Daemon(net.pod, "drain_timeout_s = 0.1\n", install=False) as daemon:
        assert_talks(net.pair())
        assert daemon.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        net.connect()
