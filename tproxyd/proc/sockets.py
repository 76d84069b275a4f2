"""The listening sockets: they outlive workers, configurations and, handed on, the program itself.

Closing one loses what waits in its accept queue, so none is closed while its place, an address
and a port, is still to be listened at. A place has at least one socket a worker; when there are
fewer workers than before, some get several. What a configuration says about a socket (transparent
or not, the mark) is set anew each time; where a new configuration fails, the old one is set again.

Sockets that systemd kept, or that a predecessor handed on, are taken by their place.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Protocol

from tproxyd.addr import Endpoint
from tproxyd.config import Config
from tproxyd.proc import systemd

# (index of the listener in config.listeners, listening socket): what a worker accepts from.
Listeners = list[tuple[int, socket.socket]]


class Listening(Protocol):
    """How to listen: flow/listen.py, or a test's stand-in."""

    def places(self, config: Config) -> list[tuple[int, Endpoint]]: ...
    def open_at(self, config: Config, index: int, where: Endpoint) -> socket.socket: ...
    def prepare(self, sock: socket.socket, config: Config, index: int) -> None: ...


class Sockets:
    def __init__(
        self, how: Listening, inherited: Iterable[socket.socket] = (), *, store: bool = False
    ) -> None:
        """`store`: systemd gets a copy of each."""
        self._how, self._store = how, store
        self._at: dict[Endpoint, list[socket.socket]] = {}
        for sock in inherited:
            host, port = sock.getsockname()[:2]
            self._at.setdefault(Endpoint(host, port), []).append(sock)

    def all(self) -> list[socket.socket]:
        return [sock for sockets in self._at.values() for sock in sockets]

    def assign(self, config: Config, slots: int) -> list[Listeners]:
        """The sockets of each slot; opens those that are missing.

        KernelError when one can't be opened: then none of them is.
        """
        opened: list[tuple[Endpoint, socket.socket]] = []
        assigned: list[Listeners] = [[] for _ in range(slots)]
        try:
            for index, where in self._how.places(config):
                have = self._at.get(where, [])
                for sock in have:
                    self._how.prepare(sock, config, index)
                missing = range(len(have), slots)
                new = []
                for _ in missing:
                    new.append(self._how.open_at(config, index, where))
                    opened.append((where, new[-1]))
                for i, sock in enumerate([*have, *new]):
                    assigned[i % slots].append((index, sock))
        except BaseException:
            for _, sock in opened:
                sock.close()
            raise
        for where, sock in opened:
            self._at.setdefault(where, []).append(sock)
        if self._store:
            for where in dict.fromkeys(where for where, _ in opened):
                systemd.store(_name(where), self._at[where])
        return assigned

    def settle(self, config: Config) -> None:
        """Let go of the places that this configuration, which serves from here on, lacks."""
        wanted = {where for _, where in self._how.places(config)}
        for where in self._at.keys() - wanted:
            self._let_go(where, [])

    def go_back(self, config: Config, before: list[socket.socket]) -> None:
        """A newer configuration has failed: as it was, with the sockets that there were then."""
        wanted = {where: index for index, where in self._how.places(config)}
        for where in [*self._at]:
            keep = [sock for sock in self._at[where] if sock in before]
            self._let_go(where, keep)
            for sock in keep:
                self._how.prepare(sock, config, wanted[where])

    def _let_go(self, where: Endpoint, keep: list[socket.socket]) -> None:
        gone = [sock for sock in self._at.pop(where) if sock not in keep]
        if gone and self._store:
            systemd.forget(_name(where))
        if keep:
            self._at[where] = keep
            if gone and self._store:
                systemd.store(_name(where), keep)
        for sock in gone:
            sock.close()

    def close(self) -> None:
        for sock in self.all():
            sock.close()
        self._at.clear()


def _name(where: Endpoint) -> str:
    """Of a place, in systemd's store: no ":" may be in it."""
    return f"{where.host}-{where.port}".replace(":", "_")
