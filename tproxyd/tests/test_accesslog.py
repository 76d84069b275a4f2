"""The supervisor's end of the access log: reopened, followed, and its losses said once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tproxyd.errors import KernelError
from tproxyd.flow.tally import LOG_DROPPED, LOG_FAILING
from tproxyd.proc import accesslog
from tproxyd.proc.accesslog import AccessLog, Losses
from tproxyd.proc.counters import Samples
from tproxyd.tests.alarms import nothing_blocks


class Workers:
    """Who is told of a new file; they write to it."""

    def __init__(self) -> None:
        self.told = 0

    def tell(self, word: str, fd: int) -> None:
        assert word == "log"
        self.told += 1
        os.write(fd, b"new\n")


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    with nothing_blocks():
        yield


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs/access.log"


@pytest.fixture
def log(path: Path, workers: Workers) -> Iterator[AccessLog]:
    it = opened(path, workers)
    yield it
    it.close()


def opened(path: Path | str, workers: Workers) -> AccessLog:
    log = AccessLog(str(path))
    log.tell = workers.tell
    return log


def test_a_file_that_stays_is_left_alone(log: AccessLog, workers: Workers, path: Path) -> None:
    for size in (0, 10):  # and one that logrotate's copytruncate has emptied is the same file
        path.write_text("x" * size)
        log.follow()
    assert workers.told == 0
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_moved_file_is_left_behind(log: AccessLog, workers: Workers, path: Path) -> None:
    path.rename(path.with_suffix(".1"))
    log.follow()
    log.follow()
    assert workers.told == 1
    assert path.read_text() == "new\n"
    assert path.with_suffix(".1").read_text() == ""


def test_a_deleted_file_is_made_again(log: AccessLog, workers: Workers, path: Path) -> None:
    path.unlink()
    log.follow()
    assert workers.told == 1
    assert path.read_text() == "new\n"


def test_a_file_that_logrotate_made_is_taken(log: AccessLog, workers: Workers, path: Path) -> None:
    path.rename(path.with_suffix(".1"))
    path.write_text("")
    log.follow()
    assert workers.told == 1
    assert path.read_text() == "new\n"


def test_reopen_does_it_at_once(log: AccessLog, workers: Workers, path: Path) -> None:
    """Moved or not: what a signal asks for happens."""
    log.reopen()
    path.rename(path.with_suffix(".1"))
    log.reopen()
    assert workers.told == 2
    assert path.read_text() == "new\n"
    assert path.with_suffix(".1").read_text() == "new\n"


def test_no_file_is_left_open(log: AccessLog, path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for i in range(10):
        path.rename(path.with_suffix(f".{i}"))
        log.follow()
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_it_cannot_be_opened_the_old_one_stays(
    log: AccessLog, workers: Workers, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, tried again, and said once more when it works."""
    caplog.set_level("INFO")
    shutil.move(path.parent, path.parent.with_suffix(".old"))
    for _ in range(3):
        log.follow()
    log.reopen()
    assert workers.told == 0
    assert log.fd is not None
    os.write(log.fd, b"goes on\n")
    assert (path.parent.with_suffix(".old") / path.name).read_text() == "goes on\n"
    path.parent.mkdir()
    for _ in range(3):
        log.follow()
    assert workers.told == 1
    failed, again = caplog.messages
    assert failed == (
        f"can't open the access log {path} again: no such file or directory; lines go on into the"
        " old file, and this is tried again every second"
    )
    assert again == f"the access log {path} is open again"


@pytest.mark.parametrize("where", ["", "-"])
def test_what_is_no_file_is_never_reopened(where: str, workers: Workers) -> None:
    log = opened(where, workers)
    assert log.fd == (1 if where else None)
    log.reopen()
    log.follow()
    log.close()
    assert workers.told == 0
    os.fstat(1)


def test_a_named_pipe(path: Path, workers: Workers) -> None:
    """Without a reader it is an error, and not a daemon that waits for ever."""
    os.mkfifo(path)
    with pytest.raises(KernelError, match=r"can't open the access log .*: no such device"):
        AccessLog(str(path))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = opened(path, workers)
    assert log.fd is not None
    assert os.get_blocking(log.fd), "what a worker shares with others is as they know it"
    log.follow()
    assert workers.told == 0
    log.close()
    os.close(reader)


def test_a_path_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"open the access log /.*: is a directory; choose"):
        AccessLog(str(tmp_path))


def test_no_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accesslog, "JOURNAL_SOCKET", "/nonexistent/socket")
    with pytest.raises(KernelError, match="access log journal at /nonexistent/socket: no such"):
        AccessLog("journal")


# What is said of losses ---------------------------------------------------------------------------


def counted(dropped: int, **failing: int) -> dict[str, Samples]:
    causes = ("no_space", "no_reader", "slow_reader", "error")
    values = tuple(((cause,), failing.get(cause, 0)) for cause in causes)
    return {
        LOG_DROPPED.name: Samples(LOG_DROPPED, (((), dropped),)),
        LOG_FAILING.name: Samples(LOG_FAILING, values),
    }


def test_a_trouble_is_said_once_and_its_end_with_the_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    losses = Losses()
    losses.look(counted(0))
    for dropped in (0, 10, 500):
        losses.look(counted(dropped, no_space=2))
    losses.look(counted(712))
    losses.look(counted(712))
    begin, end = caplog.messages
    assert begin == (
        "can't write the access log: no space left for it; make room; lines wait, some ten"
        " thousand a worker, and are then dropped and counted"
    )
    assert end == "the access log is written again; 712 lines were dropped"


def test_each_trouble_has_its_own_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    losses = Losses()
    for dropped, failing in ((0, 1), (7, 0), (7, 1), (7, 0), (8, 1), (9, 0)):
        losses.look(counted(dropped, no_reader=failing))
    ends = [each for each in caplog.messages if "again" in each]
    assert [each.rpartition("; ")[2] for each in ends] == [
        "7 lines were dropped",
        "no line was lost",
        "2 lines were dropped",
    ]


def test_losses_between_two_looks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    losses = Losses()
    losses.look(counted(1))
    losses.look(counted(1))
    losses.end(counted(4))
    assert caplog.messages == ["access log: 1 line was dropped", "access log: 3 lines were dropped"]


def test_what_was_lost_in_all_is_said_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    losses = Losses()
    losses.look(counted(10, no_space=1))
    losses.end(counted(400))
    assert caplog.messages[1:] == ["access log: 400 lines were dropped"]
