"""What a worker gives up before it reads a byte of anybody's.

All but CAP_NET_RAW, which transparent sockets, foreign source addresses and the mark need (SO_MARK
by it alone since Linux 5.17), and that too where the configuration has nothing of the kind.
"""

from __future__ import annotations

import logging
import os
import pwd

from tproxyd.linux import CAP_NET_RAW, CAPABILITY_NAMES, become, capabilities, keep_only

log = logging.getLogger(__name__)

UNPRIVILEGED_USERS = ("tproxyd", "nobody")  # the first that exists


def drop_privileges(transparent: bool) -> None:
    """Become an ordinary user with CAP_NET_RAW alone, or, unless `transparent`, without anything.

    PermissionError names what is lacking.
    """
    if transparent and CAP_NET_RAW not in capabilities():
        raise PermissionError(
            f"can't open transparent sockets: {CAPABILITY_NAMES[CAP_NET_RAW]} "
            f"is missing; run as root or with AmbientCapabilities=CAP_NET_RAW"
        )
    if os.geteuid() == 0:
        user = next(filter(None, map(_user, UNPRIVILEGED_USERS)), None)
        if user is not None:
            try:
                become(user.pw_uid, user.pw_gid)
            except OSError as error:  # a user namespace that maps only root
                left = "CAP_NET_RAW alone" if transparent else "no capability"
                log.info("workers stay uid 0 (%s), with %s", error.strerror, left)
    keep_only(frozenset((CAP_NET_RAW,) if transparent else ()))


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None
