"""The listening sockets: they outlive workers, configurations and, handed on, the program itself.

Closing one loses what waits in its accept queue, so none is closed while its place, an address
and a port, is still to be listened at. A place has at least one socket a worker; when there are
fewer workers than before, some get several.

A new configuration gets its sockets in steps, so that one that fails has changed nothing. `assign`
opens those that are missing; a client can't meet them yet, since they do not listen. `commit` makes
all of them what the configuration says (transparent or not, the mark) and has them listen, when
there is somebody who accepts; `settle` lets go of what only the old one wanted, `go_back` of what
only the new one did.

Sockets that systemd kept, or that a predecessor handed on, are taken by their place.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from tproxyd.addr import Endpoint
from tproxyd.config import Config
from tproxyd.proc import systemd

# (index of the listener in config.listeners, listening socket): what a worker accepts from.
Listeners = list[tuple[int, socket.socket]]


class Listening(Protocol):
    """How to listen: flow/listen.py, or a test's stand-in."""

    def places(self, config: Config, *, ipv6: bool = ...) -> list[tuple[int, Endpoint]]: ...
    def open_at(self, config: Config, index: int, where: Endpoint) -> socket.socket: ...
    def prepare(self, sock: socket.socket, config: Config, index: int) -> None: ...


class _Plan(NamedTuple):
    config: Config
    places: list[tuple[int, Endpoint]]
    opened: list[socket.socket]


class Sockets:
    def __init__(
        self, how: Listening, inherited: Iterable[socket.socket] = (), *, store: bool = False
    ) -> None:
        """`store`: systemd gets a copy of each."""
        self._how, self._store = how, store
        self._at: dict[Endpoint, list[socket.socket]] = {}
        self._now: _Plan | None = None  # what serves
        self._next: _Plan | None = None  # what is to
        for sock in inherited:
            host, port = sock.getsockname()[:2]
            self._at.setdefault(Endpoint(host, port), []).append(sock)

    def all(self) -> list[socket.socket]:
        return [sock for sockets in self._at.values() for sock in sockets]

    def assign(self, config: Config, slots: int) -> list[Listeners]:
        """The sockets of each slot. KernelError when one can't be had: nothing has changed then."""
        # lo may be down just now, which looks as if there were no IPv6.
        known = any(where.is_v6 for where in self._at)
        plan = _Plan(config, self._how.places(config, ipv6=known), [])
        assigned: list[Listeners] = [[] for _ in range(slots)]
        added: list[tuple[Endpoint, socket.socket]] = []
        try:
            for index, where in plan.places:
                sockets = list(self._at.get(where, ()))
                while len(sockets) < slots:
                    sockets.append(self._how.open_at(config, index, where))
                    added.append((where, sockets[-1]))
                for i, sock in enumerate(sockets):
                    assigned[i % slots].append((index, sock))
        except BaseException:
            for _, sock in added:
                sock.close()
            raise
        for where, sock in added:
            self._at.setdefault(where, []).append(sock)
            plan.opened.append(sock)
        self._next = plan
        return assigned

    def commit(self) -> None:
        """There is somebody who accepts. KernelError."""
        assert self._next is not None, "assign comes first"
        self._prepare(self._next)

    def _prepare(self, plan: _Plan) -> None:
        for index, where in plan.places:
            for sock in self._at[where]:
                self._how.prepare(sock, plan.config, index)

    def settle(self) -> None:
        """What was committed serves from here on."""
        assert self._next is not None, "commit comes first"
        self._now, self._next = self._next, None
        places = {where for _, where in self._now.places}
        for where in self._at.keys() - places:
            for sock in self._at.pop(where):
                sock.close()
            if self._store:
                systemd.forget(_name(where))
        if self._store:
            for where, sockets in self._at.items():
                systemd.store(_name(where), sockets)

    def go_back(self) -> None:
        """What was assigned is not to be: as before. KernelError where the kernel refuses."""
        plan, self._next = self._next, None
        if plan is None:
            return
        for where in [*self._at]:
            keep = [sock for sock in self._at[where] if sock not in plan.opened]
            self._at[where] = keep
            if not keep:
                del self._at[where]
        for sock in plan.opened:
            sock.close()
        if self._now is not None:
            self._prepare(self._now)

    def close(self) -> None:
        for sock in self.all():
            sock.close()
        self._at.clear()


def _name(where: Endpoint) -> str:
    """Of a place, in systemd's store: no ":" may be in it."""
    return f"{where.host}-{where.port}".replace(":", "_")
