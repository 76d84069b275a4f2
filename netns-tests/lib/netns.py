"""Network namespaces, and sockets of any of them in the hands of the test.

A socket belongs for life to the namespace of the thread that made it. Each Namespace keeps one
thread that has moved inside (setns(2) is per thread), creates its sockets there, and hands them
out: so a test is plain socket code with both ends of a connection in one function, and needs
neither helper processes nor messages between them.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SOCKET_TIMEOUT_S = 10.0  # a test that waits longer for a byte has found something
# What tproxyd writes under /proc/sys, and must give back.
MARK_SYSCTLS = ("net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count(1)


def run(*argv: str, stdin: str | None = None) -> str:
    """The output of a command; AssertionError with what it said when it fails."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {done.stderr}"
    return done.stdout


class Namespace:
    """One network namespace, named after its role and this process, with lo up.

    A new one; or that of the process `of`, which then has a name here for as long as the test.
    """

    def __init__(self, role: str, of: int | None = None) -> None:
        self.name = f"tproxyd-{os.getpid()}-{next(_serial)}-{role}"
        if of is None:
            run("ip", "netns", "add", self.name)
        else:
            run("ip", "netns", "attach", self.name, str(of))
        self._inside = ThreadPoolExecutor(1, self.name, initializer=self._enter)
        self.ip("link set lo up")
        # Duplicate address detection would keep new IPv6 addresses unusable for a second.
        self.sysctl("net/ipv6/conf/default/accept_dad", 0)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.delete()

    def delete(self) -> None:
        self._inside.shutdown()
        subprocess.run(["ip", "netns", "delete", self.name], check=False)

    def _enter(self) -> None:
        fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(fd, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {self.name}")
        finally:
            os.close(fd)

    def inside(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `call` returns when it runs in this namespace."""
        return self._inside.submit(call, *args, **kwargs).result()

    def argv(self, *command: str) -> list[str]:
        """`command` as a command line that runs in this namespace; the process is its own."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str, stdin: str | None = None) -> str:
        return run(*self.argv(*command), stdin=stdin)

    def ip(self, *lines: str) -> None:
        """`ip` once for many changes: a topology costs milliseconds, not a fork per line."""
        run("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines) + "\n")

    def nft(self, script: str) -> str:
        return self.run("nft", "-f", "-", stdin=script)

    def sysctl(self, name: str, value: int | None = None) -> int:
        """The sysctl `name` ("net/ipv4/ip_forward"), set to `value` first where one is given."""
        path = Path("/proc/sys", name)
        if value is not None:
            self.inside(path.write_text, f"{value}\n")
        return int(self.inside(path.read_text))

    def netstat(self, name: str) -> int:
        """A counter of /proc/net/netstat or /proc/net/snmp, for example "SyncookiesRecv"."""

        # /proc/net is a link to /proc/self, so to the thread group's leader: not to us.
        def read(file: str) -> str:
            return Path("/proc/thread-self/net", file).read_text()

        lines = [
            *self.inside(read, "netstat").splitlines(),
            *self.inside(read, "snmp").splitlines(),
        ]
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            fields = dict(zip(names.split(), values.split(), strict=True))
            if name in fields:
                return int(fields[name])
        raise AssertionError(f"no counter {name}")

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM
    ) -> socket.socket:
        sock = self.inside(socket.socket, family, kind)
        sock.settimeout(SOCKET_TIMEOUT_S)
        return sock

    def connect(
        self, host: str, port: int, source: str = "", source_port: int = 0
    ) -> socket.socket:
        """A connection from this namespace, from a port of the kernel's choice unless given."""
        sock = self.open_socket(_family_of(host))
        try:
            if source or source_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source, source_port))
            sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self, host: str, port: int, backlog: int = 4096) -> socket.socket:
        sock = self.open_socket(_family_of(host))
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port))
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
        return sock

    def dump(self) -> str:
        """Everything the kernel holds here that tproxyd could change, as text to compare."""
        parts = [
            f"$ {command}\n{self.run(*command.split())}"
            for command in (
                "nft list ruleset",
                "ip -4 rule show",
                "ip -6 rule show",
                "ip -4 route show table all",
                "ip -6 route show table all",
            )
        ]
        text = "\n".join([*parts, *(f"{name} = {self.sysctl(name)}" for name in MARK_SYSCTLS)])
        # A new veth pair has its carrier a moment after it is up (net/core/link_watch.c).
        return text.replace(" linkdown", "")


def _family_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
