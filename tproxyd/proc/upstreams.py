"""The supervisor's side of who the upstreams are: holds the facts, and the process that finds them.

Where no listener has a name to resolve or anything to check there is no process: the configuration
says it all. Otherwise a child (proc/prober.py) tells all facts, as a JSON line, whenever one has
changed. When it dies the facts stay as they are and the next one is born with them, so a name that
can't be resolved just then keeps its addresses, and what was down is not tried by clients first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

from tproxyd import child
from tproxyd.config import Config
from tproxyd.proc import picture
from tproxyd.proc.counters import UpstreamCounts
from tproxyd.proc.picture import Entry, Health, Picture

log = logging.getLogger("tproxyd")

# How long a start waits for names and first checks before clients are served all the same.
FIRST_S = 3.0
# A prober that did not live this long is followed by the next one only after a pause.
SOUND_S, PAUSE_S = 1.0, 1.0


class Upstreams:
    """`changed` is called with each new picture, as the word for a worker's control socket."""

    def __init__(
        self,
        config: Config,
        changed: Callable[[str], None],
        before: Upstreams | None = None,
    ) -> None:
        """`before`: those of the configuration that this one replaces."""
        self._config, self._changed = config, changed
        self._names = [each.name for each in config.listeners]
        known = None if before is None else (before._config, before._facts)
        self._facts: picture.Facts = picture.initial(config, known)
        self.picture: Picture = picture.picture(self._facts)
        self.known = asyncio.Event()  # every name was tried once, and every check made once
        self._pid = 0
        self._sock: socket.socket | None = None
        self._unread = b""
        self._started_at = 0.0  # time.monotonic()
        self._closed = False
        self._restart: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._facts.complete:
            self.known.set()
        else:
            self._fork()

    def close(self) -> None:
        """Let the child go: EOF, and it exits."""
        if self._restart is not None:
            self._restart.cancel()
        self._hang_up()
        self._closed = True

    def reaped(self, pid: int, how: str) -> bool:
        """Whether the process that just ended was ours; the next one comes by itself."""
        if pid != self._pid:
            return False
        self._pid = 0
        if self._sock is not None:
            self._read()  # up to EOF
            self._hang_up()
        if not self._closed:
            self._again(how)
        return True

    def entries(self, index: int) -> tuple[Entry, ...]:
        return self._facts.entries.get(index, ())

    def counts(self) -> tuple[UpstreamCounts, ...]:
        return tuple(
            UpstreamCounts(
                self._names[i],
                up=len(self.picture[i]),
                down=sum(each.health == Health.DOWN for each in picture.distinct(entries).values()),
                resolve_failures=self._facts.failures[i],
            )
            for i, entries in self._facts.entries.items()
        )

    def _fork(self) -> None:
        from tproxyd.proc import prober  # few daemons need it

        self._restart = None
        self._started_at, self._unread = time.monotonic(), b""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # no more files
            self._again(f"can't be forked: {error.strerror}")
            return
        with theirs:
            try:
                self._pid = child.fork(
                    lambda: prober.serve(theirs, self._config, self._facts), (theirs.fileno(),)
                )
            except OSError as error:  # no memory, or no more processes allowed
                ours.close()
                self._again(f"can't be forked: {error.strerror}")
                return
        ours.setblocking(False)
        self._sock = ours
        asyncio.get_running_loop().add_reader(ours, self._read)

    def _again(self, how: str) -> None:
        pause = 0.0 if time.monotonic() - self._started_at >= SOUND_S else PAUSE_S
        soon = f"in {pause:g} s" if pause else "now"
        log.error("the process that watches upstreams %s; the next one starts %s", how, soon)
        self._restart = asyncio.get_running_loop().call_later(pause, self._fork)

    def _hang_up(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock = None

    def _read(self) -> None:
        while self._sock is not None:
            try:
                data = self._sock.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._hang_up()
                return
            *lines, self._unread = (self._unread + data).split(b"\n")
            if lines:
                self._learn(lines[-1])

    def _learn(self, line: bytes) -> None:
        before, self._facts = self._facts, picture.decode(line)
        for bad, text in picture.changes(self._names, before, self._facts):
            log.log(logging.WARNING if bad else logging.INFO, "%s", text)
        if self._facts.complete:
            self.known.set()
        now = picture.picture(self._facts)
        if now != self.picture:
            self.picture = now
            self._changed(picture.word(now))
