"""The wall clock jumps by a day, and nothing but what is written as a date takes notice.

The machine's clock is left alone: libfaketime stands between the daemon and the clock, and moves
CLOCK_REALTIME only. What it says is in a file, read anew at each question.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from lib.daemon import Daemon
from lib.figures import Figure
from lib.streams import assert_talks
from lib.topology import Pair, Topology
from lib.waits import stays, wait_for

LIMIT_S = 1.5
CONFIG = f"""
[[listener]]
header_timeout_s = {LIMIT_S}
idle_timeout_s = {LIMIT_S}
half_close_timeout_s = {LIMIT_S}
[[listener.proxy_protocol]]
from = ["10.9.1.2"]
policy = "require"
"""


class Clock:
    """What the daemon takes for the time of day."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self.jump(0)
        self._file.chmod(0o644)  # workers read it too, as another user
        self.prefix = (
            "env",
            f"LD_PRELOAD={library()}",
            f"FAKETIME_TIMESTAMP_FILE={self._file}",
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "DONT_FAKE_MONOTONIC=1",  # its older name
        )

    def jump(self, days: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{days:+}d\n")
        new.replace(self._file)


def library() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("needs libfaketime; try: apt-get install faketime")
    return str(found[0])


@pytest.fixture
def clock() -> Iterator[Clock]:
    directory = Path(tempfile.mkdtemp(prefix="tproxyd-clock-"))
    directory.chmod(0o755)
    yield Clock(directory)
    shutil.rmtree(directory)


@pytest.mark.parametrize("days", [1, -1])
def test_clock_jumps(net: Topology, clock: Clock, days: int, figure: Figure) -> None:
    net.app()
    with Daemon(net.pod, CONFIG, prefix=clock.prefix) as daemon:

        def from_beyond() -> Pair:  # whose peer owes no header
            return Pair(net.connect_beyond(), net.accept())

        busy, idle, half_closed = from_beyond(), from_beyond(), from_beyond()
        for pair in (busy, idle, half_closed):
            assert_talks(pair)
        half_closed.client.shutdown(socket.SHUT_WR)
        assert half_closed.app.recv(1) == b""
        net.connect()  # and says nothing

        clock.jump(days)
        later = from_beyond()
        later.client.close()
        assert later.app.recv(1) == b""
        later.app.close()
        [record] = daemon.wait_log(1)
        assert record["close_reason"] == "downstream_fin"
        off = datetime.fromisoformat(record["start_time"]).timestamp() - time.time() - days * 86400
        assert abs(off) < 60, "the log does not follow the clock"
        assert record["duration"] < 60_000

        def talks() -> bool:
            assert_talks(busy)
            return True

        wait_for(lambda: talks() and len(daemon.log()) == 4, "the deadlines")
        stays(lambda: talks() and len(daemon.log()) == 4, "the busy connection", LIMIT_S)
        durations = {each["close_reason"]: each["duration"] for each in daemon.log()[1:]}
        assert durations.keys() == {"header_timeout", "idle_timeout", "half_close_timeout"}
        for duration in durations.values():  # a jump would make it a day
            assert 1000 * LIMIT_S <= duration < 60_000
        assert 0 < daemon.status()["uptime_s"] < 60
        assert daemon.get("/readyz")[0] == 200
        assert not daemon.bugs()
    figure(f"{days:+} day: deadlines of {LIMIT_S:g} s came after {durations} ms")
