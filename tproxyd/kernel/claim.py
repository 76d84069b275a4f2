"""Who keeps the kernel state of this network namespace: one process at most, and it can be asked.

As the lock of one reconcile (machine.py) this is an abstract unix socket: it belongs to the
namespace, as the state does, needs no file, and is free again the moment its holder is gone,
however that died. Who connects is told who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time

from tproxyd.errors import KernelError

NAME = "\0tproxyd/keeper"
# A holder that was told to leave, or whose daemon was killed, needs a moment: a heal, at most.
PATIENCE_S = 5.0  # of a daemon: one that takes over waits for the one that goes
_BESIDE_PATIENCE_S = 1.0  # of a command that somebody waits for
_ANSWER_S = 0.5
_PAUSE_S = 0.02


class Claim:
    """The name, held until it is closed or the process ends."""

    def __init__(self, sock: socket.socket, words: str) -> None:
        self._sock, self._words = sock, words.encode()[:300]

    def fileno(self) -> int:
        return self._sock.fileno()

    def answer(self) -> None:
        """Tell those who ask."""
        with contextlib.suppress(OSError):
            while True:
                asker, _ = self._sock.accept()
                with asker:
                    asker.setblocking(False)
                    asker.send(self._words)

    def close(self) -> None:
        self._sock.close()


def take(action: str, words: str, patience: float = PATIENCE_S) -> Claim:
    """The claim, or KernelError that names who has it; `words` are what others will be told."""
    sock = _bound(patience)
    if sock is None:
        raise _taken(action, "stop that one first")
    return Claim(sock, words)


def refuse_beside(action: str) -> None:
    """KernelError while a daemon keeps the state: it would undo what is done here."""
    sock = _bound(_BESIDE_PATIENCE_S)
    if sock is None:
        hint = "stop it, or change its configuration and reload it (tproxyd reload)"
        raise _taken(action, hint)
    sock.close()


def _taken(action: str, hint: str) -> KernelError:
    return KernelError(action, f"{holder()} already keeps the kernel state here", hint)


def _bound(patience: float) -> socket.socket | None:
    deadline = time.monotonic() + patience
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(NAME)
            sock.listen(16)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return sock
        if time.monotonic() >= deadline:
            return None
        time.sleep(_PAUSE_S)


def holder() -> str:
    """Who keeps the state, in words; "" where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_S)
        try:
            sock.connect(NAME)
        except ConnectionRefusedError:
            return ""
        except OSError:
            return "another process"
        with contextlib.suppress(OSError):  # it is frozen, or busy with the kernel
            if words := sock.recv(1024).decode(errors="replace"):
                return words
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return f"tproxyd (process {struct.unpack('3i', raw)[0]})"


def words(pid: int) -> str:
    """How a daemon is called, by the process that people know it by."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            line = " ".join(file.read().split("\0")).strip()
    except OSError:
        line = ""
    return f"tproxyd (process {pid}{': ' if line else ''}{line[:200]})"
