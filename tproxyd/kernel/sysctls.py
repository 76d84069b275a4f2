"""/proc/sys: reading and writing sysctls, and what it tells of IPv6.

/proc/sys/net is that of the calling thread's network namespace. It may be written with
CAP_NET_ADMIN, but in most containers it is mounted read-only.
"""

from __future__ import annotations

import os
import socket


def _path(name: str) -> str:
    return f"/proc/sys/{name.replace('.', '/')}"


def value(name: str) -> int:
    """0 where the kernel has no such sysctl."""
    try:
        with open(_path(name), "rb") as file:
            return int(file.read())
    except OSError:
        return 0


def is_writable(name: str) -> bool:
    """Opening says it without a change; access(2) asks for the real user, not the capabilities."""
    path = _path(name)
    if not os.path.exists(path):  # without IPv6: then it is not written either
        return True
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def write(name: str, value: int) -> None:
    """OSError when the kernel refuses."""
    with open(_path(name), "w", encoding="ascii") as file:
        file.write(f"{value}\n")


def ipv6() -> bool:
    """IPv6 sockets can be made, and lo has IPv6: without it our route has no device."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    name = "net.ipv6.conf.lo.disable_ipv6"
    return os.path.exists(_path(name)) and value(name) == 0
