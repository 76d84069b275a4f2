"""Lines of several processes into one file, pipe or terminal: whole, in batches, never blocking.

A line of the access log is kept for a moment, so that many cost one write. What the other end does
not take now is kept longer, up to a limit; what comes then is dropped and counted: losing lines is
better than losing connections.

- A pipe or terminal takes pieces up to PIPE_BUF whole, and one that poll() calls writable takes
  such a piece without blocking; a longer line (tens of TLVs) goes alone, and into a pipe only when
  that is empty. (O_NONBLOCK would say the same, but belongs to the open file, which on stdout we
  share with strangers.) Another worker may be quicker between poll and write: into a pipe each
  write says itself that it must not wait (RWF_NOWAIT), where the kernel knows that of pipes.
  A reader that is gone does not come back: its lines are dropped at once.
- A regular file that is open with O_APPEND takes each write as one piece, and where its file system
  fills up, the beginning of one: POSIX promises no more. The torn line is then taken back, and goes
  again when there is room. That another worker's line is not taken with it, nor glued to it, is the
  business of a record lock (fcntl(2)) around every write: two system calls a batch, and gone with a
  process that dies. Whoever holds it for long is stopped; the others' lines wait.

A moved file is followed by proc/accesslog.py, which gives us the new one: `use`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
import termios
import time
from collections.abc import Callable

from tproxyd.flow.backlog import KEEP_SIZE, Backlog, Fails, Later
from tproxyd.flow.tally import LogFailure

_FLUSH_SIZE = 64 * 1024
# For how long the last lines of a process may wait for a reader that is slow. A stop has to end.
PATIENCE_S = 0.25


class LineWriter(Backlog):
    def __init__(
        self,
        fd: int,
        later: Later,
        dropped: Callable[[int], None],
        fails: Fails = lambda _: None,
        keep: int = KEEP_SIZE,
    ) -> None:
        super().__init__(later, dropped, fails, keep)
        self._open(fd)

    def _open(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._fd = fd
        self._flush = self._flush_file if stat.S_ISREG(mode) else self._flush_stream
        self._piece_size = _FLUSH_SIZE if stat.S_ISREG(mode) else select.PIPE_BUF
        self._put = self._into_pipe if stat.S_ISFIFO(mode) else self._into_other
        self._pipe_size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) if stat.S_ISFIFO(mode) else 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._refuses = False
        self._torn = False  # a file ends in the beginning of a line, which could not be taken back

    def use(self, fd: int) -> None:
        """Write to this from now on, what waits as well; the one before is closed."""
        old = self._fd
        self._open(fd)
        if old > 2:
            os.close(old)
        self.flush()

    def write(self, line: str) -> None:
        data = line.encode()
        if self._size >= self._keep:
            self._overflow()
            return
        if 0 < self._pipe_size < len(data):
            self._dropped(1)
            return
        self._kept.append(data)
        self._size += len(data)
        if self._size >= _FLUSH_SIZE and not self._refuses:
            self.flush()
        if not self._scheduled:
            self._schedule()

    def flush(self) -> None:
        if self._kept:
            self._flush()

    def close(self) -> None:
        """The last lines; what nobody takes within a moment is dropped and counted."""
        end = time.monotonic() + PATIENCE_S
        self.flush()
        while self._kept and not self._refuses and time.monotonic() < end:
            time.sleep(0.005)
            self.flush()
        self._drop_all()

    def _take(self) -> list[bytes]:
        """The next lines that go together."""
        piece = [self._kept.popleft()]
        size = len(piece[0])
        while self._kept and size + len(self._kept[0]) <= self._piece_size:
            piece.append(self._kept.popleft())
            size += len(piece[-1])
        self._size -= size
        return piece

    def _put_back(self, piece: list[bytes]) -> None:
        self._kept.extendleft(reversed(piece))
        self._size += sum(map(len, piece))

    # A pipe, a terminal, a socket -----------------------------------------------------------------

    def _flush_stream(self) -> None:
        failure = None
        while self._kept and (ready := self._poll.poll(0)):
            if not self._fits(len(self._kept[0])) and not ready[0][1] & select.POLLERR:
                return
            piece = self._take()
            try:
                data = b"".join(piece)
                written = self._put(data)
            except MemoryError:
                self._dropped(len(piece))
                return
            except BlockingIOError:  # another was quicker; or a stranger has made it O_NONBLOCK
                self._put_back(piece)
                return
            except OSError as error:
                failure = LogFailure.of(error.errno)
                self._dropped(len(piece))
            else:
                if written < len(data):  # the same: a line longer than PIPE_BUF has begun
                    self._put_back([data[written:]])
        if failure is not None or not self._kept:  # a slow one is slow until nothing waits
            self._set_failure(failure)

    def _into_pipe(self, data: bytes) -> int:
        try:
            return os.pwritev(self._fd, [data], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        self._put = self._into_other
        return self._put(data)

    def _into_other(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def _fits(self, size: int) -> bool:
        """Whether a line of this size can be written to a writable file without blocking."""
        if size <= select.PIPE_BUF or not self._pipe_size:
            return True
        waiting = fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4))
        return not int.from_bytes(waiting, sys.byteorder)

    # A regular file -------------------------------------------------------------------------------

    def _flush_file(self) -> None:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another worker writes at this moment
            return
        except OSError:  # a file system without locks
            self._append_all()
            return
        try:
            self._append_all()
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _append_all(self) -> None:
        while self._kept:
            piece = self._take()
            try:
                data = (b"\n" if self._torn else b"") + b"".join(piece)
                written = os.write(self._fd, data)
            except MemoryError:
                self._dropped(len(piece))
                return
            except OSError as error:
                self._put_back(piece)
                self._refused(LogFailure.of(error.errno))
                return
            if written == len(data):
                self._torn = False
            elif not self._keep_whole(piece, written - self._torn):
                self._refused(LogFailure.NO_SPACE)
                return
        self._refuses = False
        self._set_failure(None)

    def _refused(self, why: LogFailure) -> None:
        """There may be room later: nothing is lost yet."""
        self._refuses = True
        self._set_failure(why)

    def _keep_whole(self, piece: list[bytes], written: int) -> bool:
        """Only so much of `piece` went in; what did not whole goes again. Whether any line did."""
        if written < 0:
            self._put_back(piece)
            return False
        self._torn = False
        for number, line in enumerate(piece):
            if written < len(line):
                self._put_back(piece[number:])
                self._torn = written > 0 and not self._taken_back(written)
                return number > 0
            written -= len(line)
        raise AssertionError("a short write that was not short")

    def _taken_back(self, torn: int) -> bool:
        """The last bytes of what was just written, gone from the file again."""
        try:
            # Where we wrote last is where the file ends, or a stranger has written behind it, or
            # cut it off (logrotate's copytruncate).
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
            if os.fstat(self._fd).st_size != end:
                return False
            os.ftruncate(self._fd, end - torn)
            os.lseek(self._fd, end - torn, os.SEEK_SET)  # stdout may be open without O_APPEND
        except OSError:  # chattr +a: it may only grow
            return False
        return True
