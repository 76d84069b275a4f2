"""Pipes through which bulk streams pass by splice: their pages change hands, nothing is copied.

Measured with one stream, two CPUs, both ends of iperf3 beside the proxy (medians of three, Gbit/s
from and to the client): copied through 256 KiB of buffer 25.6 and 28.9, by pipes of 256 KiB 27.7
and 30.2, of 512 KiB 27.6 and 29.8, of 1 MiB 27.5 and 30.0; direct made 36. What counts more: a
gigabyte costs 0.15 s of CPU time by pipe, and 0.28 s copied. (By Reno: BBR's pacing halves it all.)
Small messages are quicker copied: two splices cost more than their bytes.

A pipe is lent for a turn, and longer only while it holds what the receiver has no room for; so a
few serve all streams of a worker, and where none is left a stream is copied as before.
"""

from __future__ import annotations

import fcntl
import os
import time

from tproxyd.flow.stream import Stream

# Larger ones gained nothing. Of these an unprivileged user may have 256 (pipe-user-pages-soft).
PIPE_SIZE = 256 * 1024
# Per worker: as many bulk streams may stall at once before others are copied.
MAX_PIPES = 16
_AGAIN_S = 10.0  # how soon the kernel is asked again for what it had refused
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
        self._refused_until = 0.0  # time.monotonic()

    def lease(self) -> Pipe | None:
        """An empty pipe, if there is one to be had."""
        if self._free:
            return self._free.pop()
        if not self._more or time.monotonic() < self._refused_until:
            return None
        try:
            pipe = Pipe()
        except OSError:  # what there is must do: asking each time would cost more than a copy
            self._refused_until = time.monotonic() + _AGAIN_S
            return None
        self._more -= 1
        return pipe

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
