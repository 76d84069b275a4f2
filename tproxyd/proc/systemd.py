"""Telling systemd how we are (sd_notify(3)), and leaving sockets with it, without libsystemd.

One datagram to $NOTIFY_SOCKET. Nothing here ever stops the daemon: who does not run under systemd,
or whose systemd does not listen, is served the same.

The file descriptor store (FileDescriptorStoreMax= of the unit): what is sent with FDSTORE=1 stays
open in systemd while the unit restarts, after a crash too, and the next process finds it from
descriptor 3 on, as LISTEN_FDS says. It keeps a file once, however often it is sent; several may
have one name, and are removed by it together. An upgrade hands sockets on by the same protocol
(proc/upgrade.py).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

FIRST_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
# SCM_MAX_FD, include/net/scm.h: more in one message are EINVAL.
_MOST_FDS = 253

# Where the journal takes entries in its own protocol (flow/journal.py), from everybody.
JOURNAL_SOCKET = "/run/systemd/journal/socket"


def notify(*assignments: str, files: Sequence[socket.socket] = ()) -> bool:
    """Send "READY=1", "STATUS=…", "STOPPING=1" or "WATCHDOG=1"; whether systemd took it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address[0] == "@":  # the abstract namespace: a NUL stands for the @
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(address)
            words = "\n".join(assignments).encode()
            if files:
                socket.send_fds(sock, [words], [each.fileno() for each in files])
            else:
                sock.send(words)
    except OSError:
        return False
    return True


def store(name: str, files: Sequence[socket.socket]) -> bool:
    """Leave them with systemd, by a name without ":"; whether it took the message."""
    return all(
        notify("FDSTORE=1", f"FDNAME={name}", files=files[i : i + _MOST_FDS])
        for i in range(0, len(files), _MOST_FDS)
    )


def forget(name: str) -> bool:
    """Have systemd close what it keeps by this name."""
    return notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def inherited() -> list[tuple[str, socket.socket]]:
    """The sockets that this process was started with, and their names. To be called once.

    The variables are removed: they are not for our children.
    """
    values = {name: os.environ.pop(name, "") for name in _LISTEN}
    if values["LISTEN_PID"] != str(os.getpid()) or not values["LISTEN_FDS"].isdecimal():
        return []
    count = int(values["LISTEN_FDS"])
    names = values["LISTEN_FDNAMES"].split(":") if values["LISTEN_FDNAMES"] else []
    names += [""] * (count - len(names))
    found = []
    for fd, name in zip(range(FIRST_FD, FIRST_FD + count), names, strict=False):
        try:
            os.set_inheritable(fd, False)
            found.append((name, socket.socket(fileno=fd)))
        except OSError:  # it is none, or no socket
            continue
    return found


_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1, half of what WatchdogSec= allows; None when not asked for."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 2e6
