"""The supervisor's end of a worker's control socket: one word a datagram, in both directions.

What a worker does not take now, because it is busy or stopped and its queue is full, waits here and
is sent as soon as it can be; of words that begin alike only the newest waits, so a worker gets the
newest list of upstreams, and a stop that comes after a hundred of them is not lost. A word may have
an open file with it (SCM_RIGHTS): a duplicate waits with the word, so the caller may close its own.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

log = logging.getLogger("tproxyd")

# The longest word there may be, and the size of the buffer to read one with: some 8,000 upstreams.
# A datagram has to fit into SO_SNDBUF, whose default, net.core.wmem_default, is 212,992.
MAX_WORD = 200 * 1024
# Words heard in one go: who talks without pause does not keep the supervisor from anything else.
_AT_ONCE = 64
_ONE_FILE = socket.CMSG_SPACE(4)  # with a word comes one at most


class Words:
    """The worker's end: the next word, and the files that came with it.

    The buffer is made once, and its pages are taken by the words that need them: a worker that is
    out of memory must still hear.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._buffer = sock, memoryview(bytearray(MAX_WORD))

    def next(self) -> tuple[bytes, list[int]]:
        """b"" when the supervisor is gone. BlockingIOError when there is none, OSError."""
        size, ancillary, _, _ = self._sock.recvmsg_into([self._buffer], _ONE_FILE)
        fds = [
            int.from_bytes(data, sys.byteorder)
            for level, kind, data in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        ]
        return bytes(self._buffer[:size]), fds


class Control:
    """Calls `heard` with each word of the worker's; EOF closes it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, heard: Callable[[str], None]
    ) -> None:
        sock.setblocking(False)
        self._loop, self._heard = loop, heard
        self._sock: socket.socket | None = sock
        self._unsaid: list[_Unsaid] = []
        loop.add_reader(sock, self._some)

    def say(self, word: str, fd: int | None = None) -> None:
        if self._sock is None:
            return
        kind = word.partition(" ")[0]
        self._forget(each for each in self._unsaid if each.word.partition(" ")[0] == kind)
        try:
            self._unsaid.append(_Unsaid(word, () if fd is None else (os.dup(fd),)))
        except OSError as error:  # no more files
            log.error("a worker can't be told %s: %s", kind, error.strerror)
            return
        self._send()

    def read(self) -> None:
        """Everything that one who is gone has said."""
        while self._next():
            pass

    def _some(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._next():
                return

    def _next(self) -> bool:
        """Hear a word; whether there was one."""
        if self._sock is None:
            return False
        try:
            words = self._sock.recv(MAX_WORD).decode(errors="replace")
        except BlockingIOError:
            return False
        except OSError:
            words = ""
        if words:
            self._heard(words)
        else:
            self.close()
        return bool(words)

    def close(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None
        self._forget(self._unsaid)

    def _forget(self, words: Iterable[_Unsaid]) -> None:
        for each in list(words):
            self._unsaid.remove(each)
            for fd in each.fds:
                os.close(fd)

    def _send(self) -> None:
        while self._unsaid and self._sock is not None:
            first = self._unsaid[0]
            data = f"{first.word}\n".encode()
            try:
                if len(data) > MAX_WORD:
                    raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
                if first.fds:
                    socket.send_fds(self._sock, [data], first.fds)
                else:
                    self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send)
                return
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    self._forget(self._unsaid)  # it is dying: SIGCHLD comes next
                    break
                log.error("a worker can't be told this, %d bytes: %.40s…", len(data), first.word)
            self._forget((first,))
        if self._sock is not None:
            self._loop.remove_writer(self._sock)


class _Unsaid(NamedTuple):
    word: str
    fds: tuple[int, ...]
