"""Giving up privileges: an ordinary user, and no capability that is not needed.

Whoever reads what strangers send, bytes of clients or answers of name servers, does it first.
"""

from __future__ import annotations

import logging
import os
import pwd

from tproxyd.linux import become, capabilities, keep_only

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


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None
