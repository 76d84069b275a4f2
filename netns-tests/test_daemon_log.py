"""The daemon's own log as JSON: every line of it, the reason of a failed start too."""

from __future__ import annotations

import json
import os
import signal

from lib.daemon import Daemon
from lib.topology import Topology
from lib.waits import wait_for

CONFIG = 'workers = 1\nlog.daemon_format = "json"\n'


def said(daemon: Daemon) -> list[str]:
    lines = [json.loads(line) for line in daemon.stderr.splitlines()]
    assert all(line.keys() == {"time", "level", "pid", "message"} for line in lines)
    return [f"{line['level']}: {line['message']}" for line in lines]


def test_a_life_of_the_daemon(net: Topology) -> None:
    with Daemon(net.pod, CONFIG) as daemon:
        [worker] = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: daemon.workers() not in ([worker], [0]), "the next worker")
        wait_for(lambda: "is ready again" in daemon.stderr, "what is said of it")
        with Daemon(net.pod, CONFIG, ready=False) as second:
            assert second.process.wait(10) == 3
            assert any(line.startswith("error: can't ") for line in said(second))
        assert daemon.stop() == 0
        lines = said(daemon)
    assert lines[0].startswith("info: version ")
    assert any(line.startswith("info: ready in ") for line in lines)
    assert any(line.startswith("error: worker 0 was killed by SIGKILL") for line in lines)
    assert lines[-1] == "info: stopped"
