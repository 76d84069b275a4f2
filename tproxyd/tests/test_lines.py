"""Lines into files and pipes: whole, without blocking, and what is lost is counted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tproxyd.flow import backlog
from tproxyd.flow.lines import LineWriter
from tproxyd.flow.tally import LogFailure
from tproxyd.tests.alarms import nothing_blocks


class Clock:
    """loop.call_later without a loop: `tick` lets all that is waiting fall due."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def later(self, delay: float, what: Callable[[], None]) -> None:
        assert delay == backlog.FLUSH_AFTER_S
        self.waiting.append(what)

    def tick(self) -> None:
        waiting, self.waiting = self.waiting, []
        for what in waiting:
            what()


class Sink:
    def __init__(self, fd: int, keep: int = backlog.KEEP_SIZE) -> None:
        self.clock, self.fd, self.dropped = Clock(), fd, 0
        self.failures: list[LogFailure | None] = []
        self.writer = LineWriter(fd, self.clock.later, self._count, self.failures.append, keep)

    def _count(self, lines: int) -> None:
        self.dropped += lines


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    with nothing_blocks():
        yield


def read_all(fd: int) -> bytes:
    data = b""
    try:
        while piece := os.read(fd, 1 << 20):
            data += piece
    except BlockingIOError:
        pass
    return data


def line(worker: int, i: int, size: int = 300) -> str:
    return f"{worker}:{i}:".ljust(size, "x") + "\n"


def test_lines_wait_for_company(pipe: tuple[int, int]) -> None:
    sink = Sink(pipe[1])
    sink.writer.write("one\n")
    sink.writer.write("two\n")
    assert read_all(pipe[0]) == b""
    assert len(sink.clock.waiting) == 1
    sink.clock.tick()
    assert read_all(pipe[0]) == b"one\ntwo\n"
    assert not sink.clock.waiting  # nothing to come back for
    sink.writer.write("three\n")
    assert len(sink.clock.waiting) == 1


def test_many_lines_do_not_wait(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sink = Sink(fd)
    for i in range(1000):
        sink.writer.write(line(1, i))
    assert (tmp_path / "log").stat().st_size > 200 * 1024
    sink.writer.flush()
    os.close(fd)
    assert (tmp_path / "log").read_text() == "".join(line(1, i) for i in range(1000))
    assert sink.dropped == 0


def test_lines_of_several_workers_into_a_file_stay_whole(tmp_path: Path) -> None:
    """As with O_APPEND, whatever is written in between."""
    path = tmp_path / "log"
    fds = [os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for _ in range(3)]
    sinks = [Sink(fd) for fd in fds]
    for i in range(300):
        for worker, sink in enumerate(sinks):
            sink.writer.write(line(worker, i, 200 + 37 * worker))
            if i % (7 + worker) == 0:
                sink.writer.flush()
    for sink, fd in zip(sinks, fds, strict=True):
        sink.writer.flush()
        assert sink.dropped == 0
        os.close(fd)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(
        line(worker, i, 200 + 37 * worker) for i in range(300) for worker in range(3)
    )


def test_lines_of_several_workers_into_a_pipe_stay_whole(pipe: tuple[int, int]) -> None:
    """Processes of their own, and a reader that is slower than they are."""
    reader, writer = pipe
    children = []
    for worker in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                sink = Sink(writer)
                for i in range(300):
                    sink.writer.write(line(worker, i, 200 + 37 * worker))
                    if i % 7 == 0:
                        sink.writer.flush()
                while sink.writer.waiting:
                    sink.writer._poll.poll()
                    sink.writer.flush()
                os._exit(0 if sink.dropped == 0 else 1)
            finally:
                os._exit(2)
        children.append(pid)
    os.close(writer)
    os.set_blocking(reader, True)
    data = b""
    while piece := os.read(reader, 1000):
        data += piece
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert sorted(data.decode().splitlines(keepends=True)) == sorted(
        line(worker, i, 200 + 37 * worker) for i in range(300) for worker in range(3)
    )


def test_a_slow_reader_never_blocks(pipe: tuple[int, int]) -> None:
    """What it does not take is kept, up to a limit; then lines are dropped, and counted."""
    sink = Sink(pipe[1], keep=256 * 1024)
    lines = [line(1, i) for i in range(2000)]
    for each in lines[:500]:
        sink.writer.write(each)
    assert not sink.failures, "nothing is lost yet"
    for each in lines[500:]:
        sink.writer.write(each)
    assert sink.dropped > 0
    assert sink.failures == [LogFailure.SLOW_READER]
    data = read_all(pipe[0])
    while sink.clock.waiting:  # it comes back by itself
        sink.clock.tick()
        data += read_all(pipe[0])
    kept = data.decode().splitlines(keepends=True)
    assert kept == lines[: len(kept)]  # the first ones, whole and in order
    assert len(kept) + sink.dropped == len(lines)
    assert sink.writer._size == 0
    assert sink.failures == [LogFailure.SLOW_READER, None]
    sink.writer.write("and on it goes\n")
    sink.clock.tick()
    assert read_all(pipe[0]) == b"and on it goes\n"


@pytest.mark.parametrize("size", [5_000, 60_000])
@pytest.mark.parametrize("left", [4096, 8192, 20_000])
def test_a_line_longer_than_a_pipe_takes_at_once(
    pipe: tuple[int, int], size: int, left: int
) -> None:
    """poll() promises room for PIPE_BUF bytes. For more, it waits until the pipe is empty."""
    reader, writer = pipe
    filler = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) - left
    os.write(writer, bytes(filler))
    sink = Sink(writer)
    long = line(1, 1, size)
    sink.writer.write(long)
    sink.clock.tick()
    assert read_all(reader)[:filler] == bytes(filler)
    sink.clock.tick()
    assert not sink.clock.waiting
    assert sink.dropped == 0


def test_a_line_longer_than_a_whole_pipe_is_dropped(pipe: tuple[int, int]) -> None:
    sink = Sink(pipe[1])
    sink.writer.write(line(1, 1, 70_000))
    sink.writer.write("short\n")
    sink.clock.tick()
    assert read_all(pipe[0]) == b"short\n"
    assert sink.dropped == 1
    assert sink.writer._size == 0


def test_a_long_first_line_is_not_forgotten(pipe: tuple[int, int]) -> None:
    """Longer than what is flushed at once, while the reader is slow: it comes back for it."""
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(writer, bytes(1 << 20))
    sink = Sink(writer)
    long = line(1, 1, 70_000)
    sink.writer.write(long)
    read_all(reader)
    sink.clock.tick()
    assert read_all(reader) == long.encode()


def test_a_reader_that_is_gone(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"unread")
    os.close(pipe[0])
    sink = Sink(pipe[1])
    for size in (100, 100, 5_000):
        sink.writer.write(line(1, 1, size))
    sink.clock.tick()
    assert sink.dropped == 3
    assert not sink.clock.waiting


def test_a_reader_that_comes_back(tmp_path: Path) -> None:
    """Of a named pipe: lines go on; the one of stdout never does."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = Sink(os.open(path, os.O_WRONLY))
    os.close(reader)
    sink.writer.write("lost\n")
    sink.clock.tick()
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink.writer.write("there\n")
    sink.clock.tick()
    assert os.read(reader, 100) == b"there\n"
    assert (sink.dropped, sink.failures) == (1, [LogFailure.NO_READER, None])
    os.close(reader)
    os.close(sink.fd)


def test_a_stranger_has_made_stdout_nonblocking(pipe: tuple[int, int]) -> None:
    """O_NONBLOCK is the open file's. Nothing is lost by it, and a long line may go in parts."""
    os.set_blocking(pipe[1], False)
    sink = Sink(pipe[1])
    os.write(pipe[1], bytes(60_000))
    wrote = [line(1, 0, 65_000), line(1, 1)]
    for each in wrote:
        sink.writer.write(each)
    read_all(pipe[0])
    data = b""
    while sink.clock.waiting:
        sink.clock.tick()
        data += read_all(pipe[0])
    assert data.decode() == "".join(wrote)
    assert sink.dropped == 0


def test_another_writer_was_quicker(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our poll and our write: nobody waits for the reader."""
    sink = Sink(pipe[1])

    def fill(_timeout: int) -> list[tuple[int, int]]:
        os.write(pipe[1], bytes(65_536))
        return [(pipe[1], select.POLLOUT)]

    with monkeypatch.context() as patch:
        patch.setattr(sink.writer, "_poll", SimpleNamespace(poll=fill))
        sink.writer.write("one\n")
        sink.clock.tick()
    assert read_all(pipe[0]) == bytes(65_536)
    sink.clock.tick()
    assert read_all(pipe[0]) == b"one\n"
    assert (sink.dropped, sink.failures) == (0, [])


def test_a_kernel_whose_pipes_know_no_nowait(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def unknown(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "pwritev", unknown)
    sink = Sink(pipe[1])
    for _ in range(2):
        sink.writer.write("one\n")
        sink.clock.tick()
    assert read_all(pipe[0]) == b"one\n" * 2
    assert (len(asked), sink.dropped, sink.failures) == (1, 0, [])


def test_the_last_lines_wait_for_a_reader_that_is_slow(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], bytes(65_536))
    sink = Sink(pipe[1])
    for i in range(3):
        sink.writer.write(line(1, i))
    reader = threading.Thread(target=os.read, args=(pipe[0], 65_536))
    threading.Timer(0.05, reader.start).start()
    sink.writer.close()
    assert sink.dropped == 0
    assert read_all(pipe[0]).count(b"\n") == 3


def test_the_last_lines_do_not_wait_for_ever(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], bytes(65_536))
    sink = Sink(pipe[1])
    for i in range(3):
        sink.writer.write(line(1, i))
    sink.writer.close()
    assert sink.dropped == 3


# Another file -------------------------------------------------------------------------------------


def test_what_waits_goes_to_the_new_file(tmp_path: Path) -> None:
    one, two = (os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in "ab")
    sink = Sink(one)
    sink.writer.write("first\n")
    sink.writer.flush()
    sink.writer.write("second\n")
    sink.writer.use(two)
    sink.writer.write("third\n")
    sink.writer.flush()
    assert (tmp_path / "a").read_text() == "first\n"
    assert (tmp_path / "b").read_text() == "second\nthird\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(one)
    os.close(two)


def test_from_a_pipe_to_a_file(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """Each is written in its own way."""
    os.write(pipe[1], bytes(65_536))
    sink = Sink(os.dup(pipe[1]))
    long = line(1, 1, 60_000)
    sink.writer.write(long)
    sink.clock.tick()
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sink.writer.use(file)
    assert (tmp_path / "log").read_text() == long
    sink.writer.write(line(1, 2, 100_000))
    assert sink.dropped == 0
    os.close(file)


# A full disk --------------------------------------------------------------------------------------


class Limited:
    """A file system with room for so many bytes, by the limit on the size of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines(keepends=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Limited]:
    it = Limited(tmp_path / "log")
    yield it
    resource.setrlimit(resource.RLIMIT_FSIZE, it.before)


def test_a_full_device() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(fd)
    for i in range(50):
        sink.writer.write(line(1, i))
    sink.clock.tick()
    os.close(fd)
    assert sink.failures == [LogFailure.NO_SPACE]
    assert sink.dropped == 50  # no file: there will never be room
    assert not sink.clock.waiting


def test_a_disk_that_stays_full(disk: Limited) -> None:
    """What does not go in waits; over the limit it is dropped, and counted."""
    disk.room(0)
    fd = os.open(disk.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sink = Sink(fd, keep=10 * 301)
    for i in range(50):
        sink.writer.write(line(1, i))
        sink.clock.tick()
    assert sink.dropped == 40
    sink.writer.close()
    assert sink.dropped == 50, "and at the end, all that waited"
    assert sink.failures == [LogFailure.NO_SPACE]
    os.close(fd)


@pytest.mark.parametrize("append", [os.O_APPEND, 0])
@pytest.mark.parametrize("room", [0, 1, 300, 301, 302, 4500, 4815])
def test_a_line_that_went_in_by_half_is_taken_back(disk: Limited, room: int, append: int) -> None:
    """And goes in whole when there is room: nothing is torn, nothing is lost, nothing is twice."""
    fd = os.open(disk.path, os.O_WRONLY | os.O_CREAT | append)
    sink = Sink(fd)
    wrote = [line(1, i) for i in range(16)]
    disk.room(room)
    for each in wrote:
        sink.writer.write(each)
    sink.clock.tick()
    assert disk.lines() == wrote[: room // 301]
    assert sink.failures == [LogFailure.NO_SPACE]
    sink.clock.tick()
    disk.room(100_000)
    sink.clock.tick()
    assert disk.lines() == wrote
    assert (sink.failures, sink.dropped) == ([LogFailure.NO_SPACE, None], 0)
    assert not sink.clock.waiting
    os.close(fd)


def test_a_file_that_may_only_grow(disk: Limited, monkeypatch: pytest.MonkeyPatch) -> None:
    """chattr +a: the torn line stays, and the next one does not continue it."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "ftruncate", refuse)
    fd = os.open(disk.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sink = Sink(fd)
    wrote = [line(1, i) for i in range(16)]
    disk.room(1000)
    for each in wrote:
        sink.writer.write(each)
    sink.clock.tick()
    disk.room(2000)
    sink.clock.tick()
    disk.room(100_000)
    sink.clock.tick()
    assert [each for each in disk.lines() if each in wrote] == wrote
    assert [each for each in disk.lines() if each not in wrote] == [
        wrote[3][: 1000 - 3 * 301] + "\n",
        wrote[6][: 2000 - 1001 - 3 * 301] + "\n",
    ]
    assert sink.dropped == 0
    os.close(fd)


def test_what_a_stranger_wrote_behind_it_is_not_cut_off(
    disk: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(disk.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sink = Sink(fd)
    write = os.write

    def write_and_be_followed(to: int, data: bytes) -> int:
        wrote = write(to, data)
        if wrote < len(data):
            disk.room(100_000)
            other = os.open(disk.path, os.O_WRONLY | os.O_APPEND)
            write(other, b"...a stranger's\n")
            os.close(other)
        return wrote

    monkeypatch.setattr(os, "write", write_and_be_followed)
    disk.room(500)
    for i in range(2):
        sink.writer.write(line(1, i))
    sink.writer.flush()
    torn = line(1, 1)[: 500 - 301] + "...a stranger's\n"
    assert disk.lines()[:2] == [line(1, 0), torn]
    assert disk.lines()[-1] == line(1, 1)
    os.close(fd)


def test_another_writer_in_the_middle_of_a_write_is_waited_for(tmp_path: Path) -> None:
    """Not for longer than a round: the lines wait, the worker does not."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    held, release = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        os.write(held[1], b"x")
        os.close(release[1])
        os.read(release[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    sink = Sink(fd)
    try:
        sink.writer.write("one\n")
        sink.clock.tick()
        assert path.read_text() == ""
        assert len(sink.clock.waiting) == 1
    finally:
        os.close(release[1])
        os.waitpid(pid, 0)
    sink.clock.tick()
    assert path.read_text() == "one\n"
    assert not sink.failures
    for each in (fd, *held, release[0]):
        os.close(each)
