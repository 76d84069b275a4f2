"""Pipes through which bulk streams pass by splice: their pages change hands, nothing is copied.

Measured with one stream through a plain relay, two CPUs, client and application beside it (medians
of three, Gbit/s up and down): 256 KiB buffers 12.6 and 11.0, pipes of 64 KiB 10 and 12, of 512 KiB
13.9 and 15.2, of 1 MiB 13.6 and 15.7; direct made 18 and 16. A gigabyte costs six tenths of the CPU
time that copying takes. Small streams are quicker copied: two splices cost more than their bytes.

A pipe is lent for a turn, and longer only while it holds what the receiver has no room for; so a
few serve all streams of a worker, and where none is left a stream is copied as before.
"""

from __future__ import annotations

import fcntl
import os

from tproxyd.flow.stream import Stream

# Larger ones gained nothing. Of these an unprivileged user may have 128 (pipe-user-pages-soft).
PIPE_SIZE = 512 * 1024
# Per worker: as many bulk streams may stall at once before others are copied.
MAX_PIPES = 16
_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class Pipe:
    """An empty pipe, unless `held` says how many bytes are in it."""

    __slots__ = ("_from", "_to", "held")

    def __init__(self) -> None:
        """Raises OSError: no file descriptors, or no more pipe memory for this user."""
        self.held = 0
        self._from, self._to = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self._to, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            self.close()
            raise

    def fill(self, source: Stream) -> int:
        """How many bytes of `source` are in it now. Raises OSError, of which BlockingIOError.

        The socket must not be in blocking mode: tcp_splice_read() looks at that alone.
        """
        self.held = os.splice(source.fileno(), self._to, PIPE_SIZE, flags=_FLAGS)
        return self.held

    def drain(self, sink: Stream) -> int:
        """How many of its bytes `sink` took. Raises OSError, of which BlockingIOError."""
        sent = os.splice(self._from, sink.fileno(), self.held, flags=_FLAGS)
        self.held -= sent
        return sent

    def close(self) -> None:
        os.close(self._from)
        os.close(self._to)


class Pipes:
    """The pipes of one worker."""

    def __init__(self) -> None:
        self._free: list[Pipe] = []
        self._more = MAX_PIPES  # may still be made

    def lease(self) -> Pipe | None:
        """An empty pipe, if there is one to be had."""
        if self._free:
            return self._free.pop()
        if not self._more:
            return None
        self._more -= 1
        try:
            return Pipe()
        except OSError:  # what there is must do: asking again and again would cost more than a copy
            self._more = 0
            return None

    def give_back(self, pipe: Pipe) -> None:
        """It is free again; what it holds is thrown away."""
        if pipe.held:
            pipe.close()
            self._more += 1
        else:
            self._free.append(pipe)

    def close(self) -> None:
        while self._free:
            self._free.pop().close()
