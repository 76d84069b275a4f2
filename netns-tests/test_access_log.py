"""A rotated access log loses no line, and one that can't be written disturbs no traffic."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lib.daemon import ROOT, Daemon, Record, descendants
from lib.headers import v2
from lib.loglines import Load, dropped, ended, refusing
from lib.processes import is_gone, resident_kib, stopped
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for

from tproxyd.flow.lines import LineWriter


@pytest.fixture
def logs() -> Iterator[Path]:
    """A directory that the daemon may write to."""
    path = Path(tempfile.mkdtemp(prefix="tproxyd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def small(logs: Path) -> Iterator[Path]:
    """The same with room for 64 KiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(logs)], check=True)
    yield logs
    subprocess.run(["umount", "--lazy", str(logs)], check=True)


def resize(path: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)


def records(*paths: Path) -> list[Record]:
    """Every line of these files; each has to be one."""
    found = []
    for path in paths:
        text = path.read_bytes().decode()
        assert text[-1:] in ("", "\n"), f"{path} ends in {text[-100:]!r}"
        found += [json.loads(line) for line in text.splitlines()]
    return found


def is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


# Rotation -----------------------------------------------------------------------------------------


def test_rotation_under_load(net: Topology, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a signal and without one, made by logrotate or not, also while a worker is stopped."""
    path = logs / "access.log"
    rotated = 0

    def rotate() -> None:
        nonlocal rotated
        rotated += 1
        path.rename(logs / f"access.log.{rotated}")

    config = refusing("workers = 2", f'log.access = "{path}"')
    with Daemon(net.pod, config, install=False) as daemon:
        with Load(net.pod) as load:
            for _ in range(5):
                load.wait_for_more(100)
                rotate()
                daemon.signal(signal.SIGUSR1)
                wait_for(lambda: is_written(path), "lines in the new file")
            for _ in range(2):
                load.wait_for_more(100)
                rotate()
                wait_for(lambda: is_written(path), "lines in the new file, without a signal")
            load.wait_for_more(100)
            rotate()
            path.touch()  # as logrotate's `create`
            wait_for(lambda: is_written(path), "lines in the file that was made")
            with stopped(daemon.workers()[:1]):
                for _ in range(3):
                    rotate()
                    daemon.signal(signal.SIGUSR1)
                    wait_for(path.exists, "the new file")
            load.wait_for_more(100)
        count = load.stop()
        files = list(logs.iterdir())
        wait_for(lambda: len(records(*files)) >= count, f"{count} lines")
        found = records(*files)
        assert ended(daemon) == count
        assert dropped(daemon) == 0
        assert len(found) == count
        apart = {(each["downstream_remote_address"], each["start_time"]) for each in found}
        assert len(apart) == count, "a line is there twice"
        assert len(files) == rotated + 1
        with capsys.disabled():
            print(f"\n{count} connections, {rotated} rotations: {len(found)} lines, all whole")


def test_logrotate_as_it_is_installed(net: Topology, logs: Path) -> None:
    path = logs / "access.log"
    text = (ROOT / "systemd/tproxyd.logrotate").read_text()
    (logs / "logrotate.conf").write_text(text.replace("/var/log/tproxyd", str(logs)))
    state = logs / "state"
    with Daemon(net.pod, refusing(f'log.access = "{path}"'), install=False) as daemon:
        with Load(net.pod) as load:
            for older in ("access.log.1", "access.log.2.gz"):
                load.wait_for_more(50)
                wait_for(lambda: is_written(path), "lines")
                conf = str(logs / "logrotate.conf")
                subprocess.run(["logrotate", "-f", "-s", str(state), conf], check=True)
                assert (logs / older).exists()
                wait_for(lambda: is_written(path), "lines in the new file")
        count = load.stop()
        subprocess.run(["gunzip", str(logs / "access.log.2.gz")], check=True)
        files = [path, logs / "access.log.1", logs / "access.log.2"]
        wait_for(lambda: len(records(*files)) == count, f"{count} lines")
        assert dropped(daemon) == 0


def test_workers_that_retire_follow_too(net: Topology, logs: Path) -> None:
    """After a reload two generations write one log, the old one until its connections are done."""
    path = logs / "access.log"
    with Daemon(net.pod, f'log.access = "{path}"') as daemon:
        old = net.pair()
        assert_talks(old)
        workers = daemon.workers()
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: "tproxyd: reloaded in" in daemon.stderr, "the reload")
        moved = path.rename(logs / "access.log.1")
        daemon.signal(signal.SIGUSR1)
        everybody = (*descendants(daemon.pid), daemon.pid)
        wait_for(lambda: not any(has_open(pid, moved) for pid in everybody), "the new file")
        for end in old:
            end.close()
        wait_for(lambda: len(records(path)) == 1, "the line of the connection of before")
        wait_for(lambda: all(map(is_gone, workers)), "the old workers to leave")
        new = net.pair()
        for end in new:
            end.close()
        wait_for(lambda: len(records(path)) == 2, "that of a new one")
        assert records(moved) == []


def has_open(pid: int, path: Path) -> bool:
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(fd.readlink())
    return path in found


def test_a_signal_for_everybody(net: Topology, logs: Path) -> None:
    """`systemctl kill -s USR1` means each process of the unit."""
    path = logs / "access.log"
    with Daemon(net.pod, f'log.access = "{path}"') as daemon:
        workers = daemon.workers()
        path.unlink()
        everybody = (*descendants(daemon.pid), daemon.pid)
        for pid in everybody:
            os.kill(pid, signal.SIGUSR1)
        wait_for(path.exists, "the new file")
        for pid in everybody[:-1]:
            os.kill(pid, signal.SIGHUP)
            os.kill(pid, signal.SIGUSR2)
        assert daemon.workers() == workers
        assert daemon.get("/readyz")[0] == 200


# No room ------------------------------------------------------------------------------------------


def long(size: int) -> bytes:
    """A header that makes the line so much longer: fewer of them are more than a worker keeps."""
    return v2("192.0.2.1", "192.0.2.2", tlvs=b"\x02" + struct.pack("!H", size) + b"x" * size)


def test_a_disk_that_fills_up(
    net: Topology, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines wait for room: none is torn, none is lost, nobody notices."""
    path = small / "access.log"
    config = refusing("workers = 2", f'log.access = "{path}"')
    with Daemon(net.pod, config, install=False) as daemon:
        with Load(net.pod) as load:
            for room in (64, 100, 140, 200, 300):
                resize(small, f"{room}k")
                wait_for(lambda: _is_full(daemon), f"{room} KiB to be full", 30.0)
                load.wait_for_more(50)
            resize(small, "64m")
            wait_for(lambda: not _is_full(daemon), "room")
            load.wait_for_more(50)
        count = load.stop()
        wait_for(lambda: len(records(path)) == count, f"{count} lines")
        assert dropped(daemon) == 0
        with capsys.disabled():
            print(f"\nfull five times under {count} connections: as many lines, all whole")


WRITERS, LINES = 3, 4000


def test_writers_at_the_edge_of_a_full_disk(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that meet the end of the room all the time, in the middle of their lines."""
    path = small / "lines"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    children = [fork_writer(fd, number) for number in range(WRITERS)]
    rooms = 0
    for room in range(64, 4096, 4):
        rooms += 1
        resize(small, f"{room}k")
        if not any(map(alive, children)):
            break
        wait_for(lambda: room_left(small) == 0 or not any(map(alive, children)), "no room")
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    os.close(fd)
    assert ends == [0] * WRITERS, "lines were dropped"
    found = path.read_text().splitlines()
    want = [written(number, i) for number in range(WRITERS) for i in range(LINES)]
    assert sorted(found) == sorted(want)
    with capsys.disabled():
        print(f"\n{WRITERS} writers, out of room {rooms} times: {len(found)} lines, all whole")


def written(number: int, i: int) -> str:
    return f"{number}:{i}:".ljust(60 + i % 70, "x")


def fork_writer(fd: int, number: int) -> int:
    """One of the processes; it ends when everything is written, with 1 where something was lost."""
    pid = os.fork()
    if pid == 0:
        lost: list[int] = []
        try:
            writer = LineWriter(fd, lambda *_: None, lost.append)
            for i in range(LINES):
                writer.write(written(number, i) + "\n")
                if i % 3 == 0:
                    writer.flush()
            while writer.waiting:
                os.sched_yield()
                writer.flush()
        finally:
            os._exit(bool(lost))
    return pid


def alive(pid: int) -> bool:
    return not is_gone(pid)


def room_left(path: Path) -> int:
    return os.statvfs(path).f_bavail


def test_a_disk_that_stays_full(
    net: Topology, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines are dropped, counted, and that is said once; then they go on, whole."""
    path = small / "access.log"
    config = refusing("workers = 2", f'log.access = "{path}"', headers=True)
    with Daemon(net.pod, config, install=False) as daemon:
        with Load(net.pod, long(20_000)) as load:
            wait_for(lambda: dropped(daemon) > 100, "lines to be dropped", 60.0)
            wait_for(lambda: "can't write the access log" in daemon.stderr, "what is said of it")
            resize(small, "64m")
            wait_for(lambda: not _is_full(daemon), "room", 30.0)
            load.wait_for_more(50)
        count = load.stop()
        lost = int(dropped(daemon))
        wait_for(lambda: len(records(path)) == count - lost, f"{count} - {lost} lines")
        wait_for(lambda: "is written again" in daemon.stderr, "what is said of it")
        assert daemon.stderr.count("can't write the access log: no space left") == 1
        assert daemon.stderr.count(f"is written again; {lost} lines were dropped") == 1
        assert daemon.stop() == 0
        with capsys.disabled():
            print(f"\n{count} connections, no room for {lost} of their lines, the others whole")


def _is_full(daemon: Daemon) -> bool:
    return daemon.metric("tproxyd_access_log_failing", cause="no_space") > 0


# No reader ----------------------------------------------------------------------------------------


class Pipes:
    """stdout and stderr of a daemon as named pipes, whose readers come and go."""

    def __init__(self, at: Path) -> None:
        self.paths = [at / "stdout", at / "stderr"]
        for path in self.paths:
            os.mkfifo(path)
        self.readers: list[int] = []
        self.open()
        out, err = self.paths
        self.prefix = ("sh", "-c", f'exec "$@" >{out} 2>{err}', "sh")

    def open(self) -> None:
        self.readers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in self.paths]

    def read(self) -> str:
        """What stdout has given so far."""
        data = b""
        try:
            while piece := os.read(self.readers[0], 1 << 16):
                data += piece
        except BlockingIOError:
            pass
        return data.decode()

    def close(self) -> None:
        while self.readers:
            os.close(self.readers.pop())


@pytest.fixture
def pipes(logs: Path) -> Iterator[Pipes]:
    it = Pipes(logs)
    yield it
    it.close()


def test_pipes_that_were_closed(
    net: Topology, pipes: Pipes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reader of both logs dies: what it would have read is counted, and all goes on."""
    config = refusing("workers = 2")
    with Daemon(net.pod, config, install=False, prefix=pipes.prefix) as daemon:
        workers = daemon.workers()
        with Load(net.pod) as load:
            load.wait_for_more(20)
            wait_for(pipes.read, "a line")
            pipes.close()
            load.wait_for_more(200)
            assert daemon.metric("tproxyd_access_log_failing", cause="no_reader") == 2
            os.kill(workers[0], signal.SIGKILL)  # which stderr would be told of
            wait_for(lambda: len(set(daemon.workers()) - {0, *workers}) == 1, "the next one")
        load.stop()
        assert dropped(daemon) >= 200
        assert daemon.get("/readyz")[0] == 200
        pipes.open()
        with Load(net.pod) as load:
            load.wait_for_more(20)
        line = wait_for(pipes.read, "a line for the new reader").splitlines()[-1]
        assert json.loads(line)["close_reason"] == "upstream_refused"
        lost = dropped(daemon)
        pipes.close()
        assert daemon.stop() == 0
        with capsys.disabled():
            print(f"\npipes closed: {lost:g} lines counted as dropped, no connection disturbed")


def test_a_reader_that_does_not_read(
    net: Topology, pipes: Pipes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = refusing("workers = 1", headers=True)
    with Daemon(net.pod, config, install=False, prefix=pipes.prefix) as daemon:
        [worker] = daemon.workers()
        before = resident_kib(worker)
        with Load(net.pod, long(3_000)) as load:
            wait_for(lambda: dropped(daemon) > 50, "lines to be dropped", 60.0)
            grown = resident_kib(worker) - before
            assert grown < 24 * 1024, f"{grown} KiB; 8 MiB of lines are kept"
            text = ""

            def until_it_has_caught_up() -> bool:
                nonlocal text
                text += pipes.read()
                return daemon.metric("tproxyd_access_log_failing") == 0

            load.stop()
            wait_for(until_it_has_caught_up, "a reader that reads", 30.0)
        count, lost = load.stop(), int(dropped(daemon))

        def is_all_there() -> bool:
            nonlocal text
            text += pipes.read()
            return text.count("\n") == count - lost

        wait_for(is_all_there, f"{count} - {lost} lines")
        for line in text.splitlines():
            assert json.loads(line)["close_reason"] == "upstream_refused"
        with capsys.disabled():
            print(f"\nno reader: {lost} of {count} lines dropped, the worker grew {grown} KiB")
