"""How many system calls a connection takes: the kernel is most of its cost.

Counted by strace on the workers, so it is the same on a slow machine. Those that serve many
connections at once (epoll_wait, the log's write) depend on how many there are, and are left out.
"""

from __future__ import annotations

import re
import signal
import subprocess

from lib.daemon import Daemon
from lib.streams import receive, receive_to_end
from lib.topology import Topology
from lib.waits import wait_for

CONNECTIONS = 100
SHARED = {"epoll_wait", "epoll_pwait", "write", "fcntl", "poll", "restart_syscall"}
# accept4, getsockname (two: the socket module asks once by itself), recvfrom of what is at hand,
# socket, seven setsockopt, bind, two connect, two epoll_ctl, two sendto, three recvfrom of the
# answer and the ends, shutdown, getsockopt, two close: 26. And one recvfrom that came too early.
MOST = 27


def test_system_calls_per_connection(net: Topology) -> None:
    net.app()
    with Daemon(net.pod) as daemon:
        summary = daemon.scratch / "strace"
        workers = daemon.workers()
        to = [word for pid in workers for word in ("-p", str(pid))]
        told = daemon.scratch / "strace.err"
        with told.open("wb") as err:
            strace = subprocess.Popen(["strace", "-c", "-f", "-o", str(summary), *to], stderr=err)
        try:
            wait_for(lambda: told.read_text().count("attached") == len(workers), "strace")
            for _ in range(CONNECTIONS):
                client = net.connect()
                client.sendall(b"request")
                app = net.accept()
                assert receive(app, 7) == b"request"
                app.sendall(b"answer")
                app.close()
                assert receive_to_end(client) == b"answer"
                client.close()
            daemon.wait_log(CONNECTIONS)
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(10)
        calls = {
            name: int(count) / CONNECTIONS
            for count, name in re.findall(
                r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?([a-z_0-9]+)$", summary.read_text(), re.M
            )
            if name not in SHARED and name != "total"
        }
    assert calls["accept4"] >= 1
    assert sum(calls.values()) <= MOST, calls
