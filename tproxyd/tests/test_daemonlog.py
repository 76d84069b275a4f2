"""The daemon's own log: its forms, and that nobody ever waits for its reader."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator

import pytest

from tproxyd.config import LogFormat
from tproxyd.proc.daemonlog import Handler
from tproxyd.tests.alarms import nothing_blocks

TEXT, JSON = LogFormat.TEXT, LogFormat.JSON


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


def record(text: str, level: int = logging.INFO, *args: object) -> logging.LogRecord:
    return logging.LogRecord("tproxyd", level, "", 0, text, args, None)


def said(fd: int) -> str:
    data = b""
    try:
        while piece := os.read(fd, 1 << 16):
            data += piece
    except BlockingIOError:
        pass
    return data.decode()


def test_text(pipe: tuple[int, int]) -> None:
    handler = Handler(TEXT, pipe[1])
    handler.emit(record("%d of %s", logging.ERROR, 3, "four"))
    assert said(pipe[0]) == "tproxyd: 3 of four\n"


def test_json(pipe: tuple[int, int]) -> None:
    """One object a line, whatever is in the message."""
    handler = Handler(JSON, pipe[1])
    handler.emit(record('two\nlines "…"', logging.WARNING))
    line = said(pipe[0])
    assert line.count("\n") == 1
    it = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", it.pop("time"))
    assert it == {"level": "warning", "pid": os.getpid(), "message": 'two\nlines "…"'}


def test_json_of_a_bug(pipe: tuple[int, int]) -> None:
    handler = Handler(JSON, pipe[1])
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        it = record("can't", logging.ERROR)
        it.exc_info = sys.exc_info()
    handler.emit(it)
    exception = json.loads(said(pipe[0]))["exception"]
    assert exception.startswith("Traceback")
    assert exception.endswith("RuntimeError: a bug")


@pytest.mark.parametrize("form", [TEXT, JSON])
def test_the_journal_is_told_the_level(
    pipe: tuple[int, int], form: LogFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = os.fstat(pipe[1])
    monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
    handler = Handler(form, pipe[1])
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
        handler.emit(record("x", level))
    assert [line[:3] for line in said(pipe[0]).splitlines()] == ["<3>", "<3>", "<4>", "<6>", "<7>"]
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    Handler(form, pipe[1]).emit(record("x"))
    assert said(pipe[0])[0] in "t{"


def test_the_journal_is_told_the_level_of_every_line(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes an entry of each, and `journalctl -p err` is to show the reasons too."""
    info = os.fstat(pipe[1])
    monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
    handler = Handler(TEXT, pipe[1])
    handler.emit(record("reload: can't use x.toml:\n  mark: a\u2028b\n  table: c", logging.ERROR))
    said_of_it = "<3>tproxyd: reload: can't use x.toml:\n<3>  mark: a\u2028b\n<3>  table: c\n"
    assert said(pipe[0]) == said_of_it
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        it = record("can't", logging.WARNING)
        it.exc_info = sys.exc_info()
    handler.emit(it)
    lines = said(pipe[0]).splitlines()
    assert lines[-1] == "<4>RuntimeError: a bug"
    assert all(line.startswith("<4>") for line in lines)


def test_a_reader_that_does_not_read(pipe: tuple[int, int]) -> None:
    """What it has no room for waits; over a limit lines are lost, and the log then says so."""
    handler = Handler(TEXT, pipe[1])
    lines = [f"{i:04}".ljust(200, "x") for i in range(1000)]
    for line in lines:
        handler.emit(record(line))
    got = said(pipe[0])
    for _ in range(50):
        handler.flush()
        got += said(pipe[0])
    handler.emit(record("and on"))
    *kept, last, note = (got + said(pipe[0])).splitlines()
    assert last == "tproxyd: and on"
    assert kept == [f"tproxyd: {line}" for line in lines[: len(kept)]]
    assert 110 * 1024 <= len(got) <= 140 * 1024  # 64 KiB of ours, and the pipe's, less its gaps
    assert note == f"tproxyd: {len(lines) - len(kept)} lines of this log could not be written"


def test_a_reader_that_is_gone(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    handler = Handler(TEXT, pipe[1])
    for _ in range(10):
        handler.emit(record("x"))
    handler.flush()
    handler.close()


def test_what_waits_is_not_written_twice_after_a_fork(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = Handler(TEXT, writer)
    os.write(writer, bytes(65_536))
    handler.emit(record("the parent's"))
    os.read(reader, 65_536)
    pid = os.fork()
    if pid == 0:
        handler.emit(record("the child's"))
        handler.close()
        os._exit(0)
    os.waitpid(pid, 0)
    handler.close()
    assert said(reader).splitlines() == ["tproxyd: the child's", "tproxyd: the parent's"]
