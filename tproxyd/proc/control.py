"""The supervisor's end of a worker's control socket: one word a datagram, in both directions.

What a worker does not take now, because it is busy or stopped and its queue is full, waits here and
is sent as soon as it can be; of words that begin alike only the newest waits, so a worker gets the
newest list of upstreams, and a stop that comes after a hundred of them is not lost.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

log = logging.getLogger("tproxyd")

# The longest word there may be, and the size of the buffer to read one with: some 8,000 upstreams.
# A datagram has to fit into SO_SNDBUF, whose default, net.core.wmem_default, is 212,992.
MAX_WORD = 200 * 1024


class Control:
    """Calls `heard` with each word of the worker's; EOF closes it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, heard: Callable[[str], None]
    ) -> None:
        sock.setblocking(False)
        self._loop, self._heard = loop, heard
        self._sock: socket.socket | None = sock
        self._unsaid: list[str] = []
        loop.add_reader(sock, self.read)

    def say(self, word: str) -> None:
        kind = word.partition(" ")[0]
        self._unsaid = [each for each in self._unsaid if each.partition(" ")[0] != kind]
        self._unsaid.append(word)
        self._send()

    def read(self) -> None:
        """Everything that it has said up to now."""
        while self._sock is not None:
            try:
                words = self._sock.recv(MAX_WORD).decode(errors="replace")
            except BlockingIOError:
                return
            except OSError:
                words = ""
            if not words:
                self.close()
                return
            self._heard(words)

    def close(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None

    def _send(self) -> None:
        while self._unsaid and self._sock is not None:
            data = f"{self._unsaid[0]}\n".encode()
            try:
                if len(data) > MAX_WORD:
                    raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
                self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send)
                return
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    self._unsaid.clear()  # it is dying: SIGCHLD comes next
                    break
                log.error("a worker can't be told this, %d bytes: %.40s…", len(data), data.decode())
            del self._unsaid[0]
        if self._sock is not None:
            self._loop.remove_writer(self._sock)
