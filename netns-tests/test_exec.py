"""tproxyd exec: an application that starts behind its proxy, and takes it along when it ends."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest
from lib.daemon import Daemon, children
from lib.processes import is_gone
from lib.streams import receive_to_end
from lib.topology import Family, Topology
from lib.waits import wait_for

CONFIG = '[log]\naccess = ""\n'
# It tells what it finds at its start, then each client who that is, until SIGTERM.
APP = """
import signal, socket, subprocess, sys
listens = ":3A9E " in open("/proc/net/tcp").read()  # 15006
rules = subprocess.run(["ip", "rule"], capture_output=True, text=True).stdout
print("listener", listens, "rule", "lookup 133" in rules, flush=True)
app = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
def end(*_):
    print("ends", flush=True)
    sys.exit(6)
signal.signal(signal.SIGTERM, end)
print("serves", flush=True)
while True:
    client, who = app.accept()
    client.send(who[0].removeprefix("::ffff:").encode())
    client.close()
"""
COMMAND = (sys.executable, "-c", APP)
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def only(capabilities: str) -> tuple[str, ...]:
    """What a container runtime leaves of root."""
    return ("setpriv", "--bounding-set", f"-all{capabilities}", "--no-new-privs")


def said(daemon: Daemon) -> list[str]:
    return (daemon.scratch / "out").read_text().splitlines()


@pytest.mark.parametrize(
    "prefix",
    [(), UNSHARE, only(",+net_admin,+net_raw")],
    ids=["beside others", "as PID 1", "with two capabilities"],
)
def test_the_application_sees_the_client(
    net: Topology, family: Family, prefix: tuple[str, ...]
) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, CONFIG, prefix=prefix, command=COMMAND) as daemon:
        wait_for(lambda: "serves" in said(daemon), "the application")
        assert said(daemon)[0] == "listener True rule True"
        with net.connect(family, 8080) as client:
            assert receive_to_end(client).decode() == family.client
        wait_for(lambda: daemon.metric("tproxyd_connections_total") == 1, "its count")
        workers = daemon.workers()
        daemon.signal(signal.SIGTERM)
        assert daemon.process.wait(10) == 6
        assert said(daemon)[-1] == "ends"
        assert prefix == UNSHARE or all(map(is_gone, workers))
    assert net.pod.dump() == before


def test_killed_application(net: Topology) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, CONFIG, command=COMMAND) as daemon:
        wait_for(lambda: "serves" in said(daemon), "the application")
        [app] = set(children(daemon.pid)) - set(daemon.workers()) - kernel_process(daemon)
        os.kill(app, signal.SIGKILL)
        assert daemon.process.wait(10) == 128 + signal.SIGKILL
    assert net.pod.dump() == before


def kernel_process(daemon: Daemon) -> set[int]:
    """That which checks the rules; there may be none at the moment."""
    names = {pid: _name(pid) for pid in children(daemon.pid)}
    return {pid for pid, name in names.items() if name == "tproxyd/kernel"}


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


@pytest.mark.parametrize(
    ("capabilities", "missing"),
    [("", "NET_ADMIN"), (",+net_raw", "NET_ADMIN"), (",+net_admin", "NET_RAW")],
)
def test_without_a_proxy_no_application(net: Topology, capabilities: str, missing: str) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, CONFIG, prefix=only(capabilities), command=COMMAND, ready=False) as daemon:
        assert daemon.process.wait(10) == 3
        assert said(daemon) == []
        assert set(re.findall("CAP_([A-Z_]+)", daemon.stderr)) == {missing}
    assert net.pod.dump() == before
