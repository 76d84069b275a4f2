"""Telling systemd how we are (sd_notify(3)), without libsystemd: one datagram to $NOTIFY_SOCKET.

Nothing here ever stops the daemon: who does not run under systemd, or whose systemd does not
listen, is served the same.
"""

from __future__ import annotations

import os
import socket

# Where the journal takes entries in its own protocol (flow/journal.py), from everybody.
JOURNAL_SOCKET = "/run/systemd/journal/socket"


def notify(*assignments: str) -> bool:
    """Send "READY=1", "STATUS=…", "STOPPING=1" or "WATCHDOG=1"; whether systemd took it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address[0] == "@":  # the abstract namespace: a NUL stands for the @
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(address)
            sock.send("\n".join(assignments).encode())
    except OSError:
        return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1, half of what WatchdogSec= allows; None when not asked for."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 2e6
