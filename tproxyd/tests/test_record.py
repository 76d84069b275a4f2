"""One line a connection: its fields, its quoting, and a writer that never waits for a reader."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Source, Upstream
from tproxyd.config import Listener, LogFormat, SourceKind
from tproxyd.errors import CloseReason
from tproxyd.flow import record
from tproxyd.flow.announce import Announcement
from tproxyd.flow.proxyproto import Header, describe
from tproxyd.flow.record import LineWriter, Record, formatter, timestamp
from tproxyd.flow.tlv import Tlv
from tproxyd.tests import strategies as wire

FIELDS = {  # Envoy's names, and then ours
    "start_time",
    "duration",
    "bytes_received",
    "bytes_sent",
    "downstream_remote_address",
    "downstream_direct_remote_address",
    "downstream_local_address",
    "upstream_local_address",
    "upstream_local_address_asked",
    "upstream_host",
    "upstreams_failed",
    "upstream_cluster",
    "response_flags",
    "connection_termination_details",
    "listener",
    "close_reason",
    "proxy_protocol",
    "upstream_proxy_protocol",
    "source_fallback",
    "rtt_us",
    "retransmits",
}
LISTENER = Listener()
PEER, CLIENT = Peer(Endpoint("10.9.1.2", 40000)), Client(Endpoint("2001:db8::7", 51234))


def full() -> Record:
    life = Record(LISTENER, PEER, started=100.0, wall=1767225599.9996)
    life.client = CLIENT
    life.dst = OriginalDst(Endpoint("10.9.1.1", 80))
    life.upstream = Upstream(life.dst)
    life.source = Source(Endpoint("2001:db8::7", 16722))
    life.header = Header(2, 60, False, CLIENT, life.dst, (Tlv(5, b"id-1"),))
    life.announced = Announcement(2, "00ff", 3)
    life.fallback = "family"
    life.received, life.sent, life.rtt_us, life.retransmits = 3, 5, 250, 2
    life.reason, life.detail = CloseReason.UPSTREAM_FIN, ""
    return life


def parsed(life: Record, now: float = 101.2345) -> dict[str, Any]:
    line = life.json(now)
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    fields: dict[str, Any] = json.loads(line)
    return fields


# The line -----------------------------------------------------------------------------------------


def test_a_full_line() -> None:
    assert parsed(full()) == {
        "start_time": "2025-12-31T23:59:59.999Z",
        "duration": 1234,
        "listener": "inbound",
        "close_reason": "upstream_fin",
        "response_flags": "-",
        "connection_termination_details": None,
        "bytes_received": 3,
        "bytes_sent": 5,
        "downstream_remote_address": "[2001:db8::7]:51234",
        "downstream_direct_remote_address": "10.9.1.2:40000",
        "downstream_local_address": "10.9.1.1:80",
        "upstream_local_address": "[2001:db8::7]:16722",
        "upstream_local_address_asked": None,
        "upstream_host": "10.9.1.1:80",
        "upstreams_failed": None,
        "upstream_cluster": "inbound|80||",
        "proxy_protocol": {
            "version": 2,
            "destination": "10.9.1.1:80",
            "unique_id": parsed(full())["proxy_protocol"]["unique_id"],
        },
        "upstream_proxy_protocol": {"version": 2, "unique_id": "00ff", "tlvs_left_out": 3},
        "source_fallback": "family",
        "rtt_us": 250,
        "retransmits": 2,
    }


def test_a_line_of_a_connection_that_came_to_nothing() -> None:
    """The same fields, null where there is nothing to say; the peer stands in for the client."""
    fields = parsed(Record(LISTENER, PEER, 0.0, 0.0))
    assert fields.keys() == FIELDS == parsed(full()).keys()
    assert fields["downstream_remote_address"] == "10.9.1.2:40000"
    assert fields["close_reason"] == "internal"
    nothing = {name for name, value in fields.items() if value is None}
    assert nothing == {
        "upstream_proxy_protocol",
        "connection_termination_details",
        "downstream_local_address",
        "upstream_local_address",
        "upstream_local_address_asked",
        "upstream_host",
        "upstreams_failed",
        "upstream_cluster",
        "proxy_protocol",
        "source_fallback",
    }


def test_the_source_that_was_to_be() -> None:
    life = full()
    life.fallback = ""
    first = parsed(life)["upstream_local_address_asked"]
    assert first == "[2001:db8::7]:16722" == parsed(life)["upstream_local_address"]
    life.source = Source(Endpoint("2001:db8::7", 56591))
    assert parsed(life)["upstream_local_address_asked"] == first
    life.listener = replace(LISTENER, source=SourceKind.CLIENT_PORT)
    assert parsed(life)["upstream_local_address_asked"] == "[2001:db8::7]:51234"
    life.listener = replace(LISTENER, source=SourceKind.PROXY)
    assert parsed(life)["upstream_local_address_asked"] is None


def test_upstreams_that_were_tried_before() -> None:
    life = full()
    one, two = Upstream(Endpoint("10.0.0.5", 80)), Upstream(Endpoint("/run/app.sock", 0))
    life.listener = replace(LISTENER, upstream=(one, two))
    life.tried, life.upstream, life.source = ((one, "refused"),), two, None
    fields = parsed(life)
    assert fields["upstreams_failed"] == [{"upstream": "10.0.0.5:80", "why": "refused"}]
    assert fields["upstream_host"] == "unix:/run/app.sock"
    assert fields["upstream_cluster"] == "inbound"
    assert " -> unix:/run/app.sock, not 10.0.0.5:80 (refused) upstream_fin " in life.text(101.0)


@given(st.text(min_size=1))
def test_the_detail_is_quoted(detail: str) -> None:
    life = full()
    life.detail = detail
    assert parsed(life)["connection_termination_details"] == detail


@given(wire.headers)
def test_any_header_makes_a_line(header: Header) -> None:
    life = full()
    life.header = header
    assert parsed(life)["proxy_protocol"] == json.loads(json.dumps(describe(header)))


@pytest.mark.parametrize("reason", CloseReason)
def test_every_reason_has_a_flag_that_envoy_knows(reason: CloseReason) -> None:
    life = full()
    life.reason = reason
    fields = parsed(life)
    assert fields["close_reason"] == reason.value
    assert fields["response_flags"] in {
        "-",
        "UF",
        "UC",
        "DC",
        "UO",
        "UH",
        "DPE",
        "UAEX",
        "SI",
        "LR",
        "NC",
    }
    assert (fields["response_flags"] == "-") == reason.value.endswith("_fin")


def test_text() -> None:
    life = full()
    life.detail = "why"
    assert formatter(LogFormat.TEXT)(life, 101.2345) == (
        "2025-12-31T23:59:59.999Z inbound [2001:db8::7]:51234 via 10.9.1.2:40000"
        " -> 10.9.1.1:80 as [2001:db8::7]:16722 upstream_fin (why) 1234ms"
        " 3B up 5B down rtt 250us"
        ' said {"version": 2, "unique_id": "00ff", "tlvs_left_out": 3}\n'
    )
    bare = Record(LISTENER, PEER, 0.0, 0.0)
    assert formatter(LogFormat.TEXT)(bare, 0.5) == (
        "1970-01-01T00:00:00.000Z inbound 10.9.1.2:40000 -> ? internal 500ms"
        " 0B up 0B down rtt 0us\n"
    )
    assert formatter(LogFormat.JSON)(bare, 0.5).startswith("{")


@given(st.floats(0, 4e9))
def test_timestamps(wall: float) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", timestamp(wall))


# The writer ---------------------------------------------------------------------------------------


class Clock:
    """loop.call_later without a loop: `tick` lets all that is waiting fall due."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def later(self, delay: float, what: Callable[[], None]) -> None:
        assert delay == record.FLUSH_AFTER_S
        self.waiting.append(what)

    def tick(self) -> None:
        waiting, self.waiting = self.waiting, []
        for what in waiting:
            what()


class Sink:
    def __init__(self, fd: int) -> None:
        self.clock, self.fd, self.dropped = Clock(), fd, 0
        self.writer = LineWriter(fd, self.clock.later, self._count)

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
def _no_write_may_block() -> Iterator[None]:
    """A write that waits for its reader would wait for ever here."""

    def blocked(*_: object) -> None:
        raise AssertionError("a write blocks")

    before = signal.signal(signal.SIGALRM, blocked)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


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
                while sink.writer._lines:
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


def test_a_slow_reader_never_blocks(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not take is kept, up to a limit; then lines are dropped, and counted."""
    monkeypatch.setattr(record, "_KEEP_SIZE", 256 * 1024)
    sink = Sink(pipe[1])
    lines = [line(1, i) for i in range(2000)]
    for each in lines:
        sink.writer.write(each)
    assert sink.dropped > 0
    data = read_all(pipe[0])
    while sink.clock.waiting:  # it comes back by itself
        sink.clock.tick()
        data += read_all(pipe[0])
    kept = data.decode().splitlines(keepends=True)
    assert kept == lines[: len(kept)]  # the first ones, whole and in order
    assert len(kept) + sink.dropped == len(lines)
    assert sink.writer._size == 0
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


def test_a_full_disk() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(fd)
    for i in range(50):
        sink.writer.write(line(1, i))
    sink.clock.tick()
    os.close(fd)
    assert sink.dropped == 50
    assert not sink.clock.waiting
