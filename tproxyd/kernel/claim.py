"""Who keeps the kernel state of this network namespace: one process at most, and it can be asked.

The claim is a lock of the namespace (nslock.py). Who has it also listens on an abstract unix socket
and tells who connects what it is called. That is a courtesy: another user may have taken the name,
and then is not believed.
"""

from __future__ import annotations

import contextlib
import logging
import socket

from tproxyd import peer
from tproxyd.errors import KernelError
from tproxyd.kernel import nslock
from tproxyd.kernel.nslock import KEEPER

log = logging.getLogger("tproxyd")

# A holder that was told to leave, or whose daemon was killed, needs a moment: a heal, at most.
PATIENCE_S = 5.0  # of a daemon: one that takes over waits for the one that goes
_BESIDE_PATIENCE_S = 1.0  # of a command that somebody waits for
_ANSWER_S = 0.5


class Claim:
    """Held until it is closed or the process ends."""

    def __init__(self, held: socket.socket, words: str) -> None:
        self._held, self._words = held, words.encode()[:300]
        listens = held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        self._door = held if listens else nslock.listener(KEEPER.name)

    def doors(self) -> tuple[socket.socket, ...]:
        """Where others ask; then `answer`."""
        return () if self._door is None else (self._door,)

    def answer(self) -> None:
        """Tell those who ask."""
        for door in self.doors():
            with contextlib.suppress(OSError):
                while True:
                    asker, _ = door.accept()
                    with asker:
                        asker.setblocking(False)
                        asker.send(self._words)

    def close(self) -> None:
        for each in (*self.doors(), self._held):
            each.close()


def take(action: str, words: str, patience: float = PATIENCE_S) -> Claim:
    """The claim, or KernelError that names who has it; `words` are what others will be told."""
    try:
        held = nslock.take(KEEPER, 0)
        if held is None:
            who = holder() or "another process"
            log.info("waiting for %s to let go of the kernel state, %g s at most", who, patience)
            held = nslock.take(KEEPER, patience)
    except PermissionError as error:
        why = error.strerror or str(error)
        raise KernelError(action, why, "run it as root, or give it CAP_NET_ADMIN") from error
    if held is None:
        raise _taken(action, "stop that one first")
    return Claim(held, words)


def refuse_beside(action: str) -> None:
    """KernelError while a daemon keeps the state: it would undo what is done here."""
    try:
        held = nslock.take(KEEPER, _BESIDE_PATIENCE_S)
    except PermissionError:
        return  # the kernel will refuse more than this
    if held is None:
        hint = "stop it, or change its configuration and reload it (tproxyd reload)"
        raise _taken(action, hint)
    held.close()


def _taken(action: str, hint: str) -> KernelError:
    who = holder() or "another process"
    return KernelError(action, f"{who} already keeps the kernel state here", hint)


def holder() -> str:
    """Who keeps the state, in words; "" where nobody does, or it can't be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_S)
        with contextlib.suppress(OSError):
            sock.connect(KEEPER.name)
            if (there := peer.of(sock)).believed:
                with contextlib.suppress(OSError):  # it is frozen, or busy with the kernel
                    if told := sock.recv(1024).decode(errors="replace"):
                        return told
                return f"tproxyd (process {there.pid})"
    pid = nslock.holder(KEEPER)
    return words(pid) if pid else ""


def words(pid: int) -> str:
    """How a daemon is called, by the process that people know it by."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            line = " ".join(file.read().split("\0")).strip()
    except OSError:
        line = ""
    return f"tproxyd (process {pid}{': ' if line else ''}{line[:200]})"
