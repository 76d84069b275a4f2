"""What a daemon that keeps the kernel state needs of the kernel besides the state itself.

The claim that it is the only one here (claim.py), and to hear what others change (watch.py). The
process that uses it is a child of the daemon, by whose number the claim is known.
"""

from __future__ import annotations

import os
import socket
from typing import Protocol

from tproxyd.config import Backend, Config
from tproxyd.errors import KernelError
from tproxyd.kernel import claim, reconcile
from tproxyd.kernel.desired import backend
from tproxyd.kernel.machine import lasting
from tproxyd.kernel.watch import BUFFER, News, Silent, Watch

_ACTION = "keep the kernel state"


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Guard:
    """Nothing is open until `claim`, nothing is watched until `follow`."""

    def __init__(self, buffer: int = BUFFER) -> None:
        self._buffer = buffer
        self._claim: claim.Claim | None = None
        self._watch: Watch | None = None
        self._silent: Silent | None = None

    def claim(self) -> None:
        """KernelError while another daemon has it, after some patience."""
        if self._claim is None:
            self._claim = claim.take(_ACTION, claim.words(os.getppid()))

    def follow(self, config: Config) -> None:
        """Hear what concerns the state of this configuration."""
        try:
            chosen = lasting().backend or backend(config, reconcile.facts()).backend
        except KernelError:  # the state can't be read either, and the next to look will say so
            chosen = Backend.AUTO
        if self._watch is not None:
            self._watch.close()
        try:
            self._watch = Watch(
                config.table, iptables=chosen is Backend.IPTABLES_NFT, buffer=self._buffer
            )
        except OSError as error:
            why = error.strerror or str(error)
            raise KernelError("watch the kernel state", why, "try tproxyd doctor") from error
        self._silent = Silent(legacy=chosen in (Backend.IPTABLES_LEGACY, Backend.AUTO))

    @property
    def hears(self) -> bool:
        """Whether all that can tell of itself is heard."""
        return self._watch is not None and self._watch.hears_nft

    def files(self) -> tuple[HasFileno, ...]:
        """To wait for; then `read`."""
        sockets: tuple[socket.socket, ...] = () if self._watch is None else self._watch.sockets()
        return sockets if self._claim is None else (*self._claim.doors(), *sockets)

    def read(self) -> News:
        if self._claim is not None:
            self._claim.answer()
        return News() if self._watch is None else self._watch.read()

    def changed(self) -> bool:
        """Whether what sends no events has changed since this was last asked."""
        return self._silent is not None and self._silent.changed()

    def release(self) -> None:
        """Somebody else may keep the state now."""
        for each in (self._watch, self._claim):
            if each is not None:
                each.close()
        self._watch = self._claim = self._silent = None
