"""Giving up privileges: an ordinary user, and no capability that is not needed.

Whoever reads what strangers send, bytes of clients or answers of name servers, does it first.
"""

from __future__ import annotations

import logging
import os
import pwd

from tproxyd.linux import CAP_NET_RAW, CAPABILITY_NAMES, become, capabilities, keep_only

log = logging.getLogger(__name__)

UNPRIVILEGED_USERS = ("tproxyd", "nobody")  # the first that exists


def drop(keep: frozenset[int]) -> None:
    """Keep of the capabilities only those in `keep`, and of root nothing."""
    keep &= capabilities()
    if os.geteuid() == 0:
        user = next(filter(None, map(_user, UNPRIVILEGED_USERS)), None)
        if user is not None:
            try:
                become(user.pw_uid, user.pw_gid)
            except OSError as error:  # a user namespace that maps only root
                log.info("staying uid 0 (%s), with few capabilities", error.strerror)
    keep_only(keep)


def drop_for_sockets(*, transparent: bool) -> None:
    """Keep CAP_NET_RAW alone, where sockets are to be transparent; PermissionError without it."""
    if transparent and CAP_NET_RAW not in capabilities():
        raise PermissionError(
            f"can't open transparent sockets: {CAPABILITY_NAMES[CAP_NET_RAW]} "
            "is missing; run as root, with AmbientCapabilities=CAP_NET_RAW, or in a container"
            " with --cap-add NET_RAW"
        )
    drop(frozenset((CAP_NET_RAW,)) if transparent else frozenset())


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None
