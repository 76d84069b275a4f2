"""Short connections by the tens of thousands leave nothing behind: memory, files, sockets and
conntrack entries return to where they were. FAULTS_FULL=1 makes it a million."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import pytest
from lib.daemon import ROOT, Daemon
from lib.figures import Figure
from lib.processes import open_files, resident_kib
from lib.programs import running
from lib.topology import PORT, Topology
from lib.waits import wait_for

FULL = os.environ.get("FAULTS_FULL") == "1"
COUNT = 1_000_000 if FULL else 15_000
WARM_UP = 4_000  # arenas, caches of addresses, the crowd's 64 sockets
AT_ONCE = 64
# What an allocator may keep that has been used for a while, of each process; a leak of one byte a
# connection would be half of it, for the million.
KEEPS_KIB = 2048
# The supervisor's socket to a reconciler that it has started meanwhile.
OTHER_FILES = 1

_WRK = ("wrk", "-t1", f"-c{AT_ONCE}", "--timeout", "10s", "-s", f"{ROOT}/scripts/lib/bench/wrk.lua")
_NGINX = """
daemon off; master_process off; pid {scratch}/pid; error_log stderr crit;
worker_rlimit_nofile 8192;
events {{ worker_connections 4000; }}
http {{
  access_log off;
  client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f;
  uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;
  server {{
    listen {port} backlog=4096; listen [::]:{port} ipv6only=on backlog=4096;
    return 200 "hello\\n";
  }}
}}
"""


def nginx(scratch: Path) -> str:
    return _NGINX.format(scratch=scratch, port=PORT)


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_short_connections_leave_nothing(net: Topology, return_path: str, figure: Figure) -> None:
    config = f'workers = 2\n[log]\naccess = ""\n[rules]\nreturn_path = "{return_path}"\n'
    with running("nginx", net.pod, PORT, nginx), Daemon(net.pod, config) as daemon:
        if return_path == "conntrack":
            # Else the kernel itself keeps each of them for two minutes.
            for state in ("time_wait", "close", "close_wait", "last_ack"):
                net.pod.sysctl(f"net/netfilter/nf_conntrack_tcp_timeout_{state}", 1)
        pids = [daemon.pid, *daemon.workers()]
        flood(net, daemon, WARM_UP)
        before = at_rest(net, pids)
        began = time.monotonic()
        assert flood(net, daemon, COUNT) == 0
        took = time.monotonic() - began
        after = at_rest(net, pids, before.files + OTHER_FILES, before.sockets)
        assert [daemon.pid, *daemon.workers()] == pids, "a process was replaced"
        for kib, was in zip(after.memory, before.memory, strict=True):
            assert kib - was < KEEPS_KIB, (before.memory, after.memory)
        assert daemon.metric("tproxyd_connections_total", close_reason="internal") == 0
    figure(f"{COUNT:,} in {took:.0f} s, none failed; before: {before}; after: {after}")


def flood(net: Topology, daemon: Daemon, count: int) -> float:
    """At least so many new connections, each a request; how many failed."""
    goal = daemon.metric("tproxyd_connections_total") + count
    failed = 0.0
    while (left := goal - daemon.metric("tproxyd_connections_total")) > 0:
        seconds = max(1, min(20, int(left / 10_000)))
        output = net.client.run(
            *(*_WRK, f"-d{seconds}s", f"http://10.9.1.1:{PORT}/", "--", "close", "none")
        )
        result = json.loads(output.splitlines()[-1])
        failed += result["failed"] + result["timeouts"]
    # wrk leaves the last ones in the middle.
    wait_for(lambda: daemon.metric("tproxyd_connections_active") == 0, "the last ones to end")
    return failed


def at_rest(net: Topology, pids: list[int], files: int = 1 << 30, sockets: int = 1 << 30) -> Held:
    """What there is once no connection is tracked, and there are no more files and sockets than so.

    The daemon is asked nothing meanwhile: its admin port has connections too.
    """

    def look() -> Held | None:
        now = Held(net, pids)
        return now if (now.tracked, now.files <= files, now.sockets <= sockets) == REST else None

    held = wait_for(look, "all to be given back", 30)
    assert held is not None
    return held


REST = (0, True, True)


class Held:
    """What there is: resident memory, files, sockets, conntrack entries."""

    def __init__(self, net: Topology, pids: list[int]) -> None:
        self.memory = [resident_kib(pid) for pid in pids]
        self.files = open_files(pids)
        here = Path(f"/proc/{pids[0]}/net")
        stats = (here / "sockstat").read_text() + (here / "sockstat6").read_text()
        self.sockets = sum(map(int, re.findall(r"^TCP6?: inuse (\d+)", stats, re.M)))
        self.waiting = sum(map(int, re.findall(r"tw (\d+)", stats)))
        with contextlib.suppress(FileNotFoundError):
            # Who reads the table has the kernel drop what is over; it does so by itself too, but
            # takes a minute to come round.
            (here / "nf_conntrack").read_bytes()
        try:
            self.tracked = net.pod.sysctl("net/netfilter/nf_conntrack_count")
        except FileNotFoundError:  # nothing here has ever tracked
            self.tracked = 0

    def __str__(self) -> str:
        supervisor, *workers = self.memory
        return (
            f"supervisor {supervisor} KiB, workers {', '.join(map(str, workers))} KiB,"
            f" {self.files} files, {self.sockets} sockets (and {self.waiting} in TIME_WAIT),"
            f" {self.tracked} conntrack entries"
        )
