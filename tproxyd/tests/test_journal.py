"""Connections as journal entries, and a writer that never waits for the journal."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Source, Upstream
from tproxyd.config import Listener
from tproxyd.errors import CloseReason
from tproxyd.flow import backlog
from tproxyd.flow.announce import Announcement
from tproxyd.flow.journal import MESSAGE_ID, JournalWriter, entry
from tproxyd.flow.proxyproto import Header
from tproxyd.flow.record import Record
from tproxyd.flow.tally import LogFailure
from tproxyd.flow.tlv import Tlv
from tproxyd.tests.alarms import nothing_blocks
from tproxyd.tests.journals import Journal, parse

PEER = Peer(Endpoint("10.9.1.2", 40000))


def life(detail: str = "") -> Record:
    client = Client(Endpoint("2001:db8::7", 51234))
    it = Record(Listener(), PEER, started=100.0, wall=1767225599.9996)
    it.client, it.dst = client, OriginalDst(Endpoint("10.9.1.1", 80))
    it.upstream = Upstream(it.dst)
    it.source = Source(Endpoint("2001:db8::7", 16722))
    it.header = Header(2, 60, False, client, it.dst, (Tlv(5, b"id-1"),))
    it.announced = Announcement(2, "00ff", 3)
    it.fallback = "family"
    it.received, it.sent, it.rtt_us, it.retransmits = 3, 5, 250, 2
    it.reason, it.detail = CloseReason.UPSTREAM_FIN, detail
    return it


# An entry -----------------------------------------------------------------------------------------


def test_a_full_entry() -> None:
    got = {key: value for key, (value,) in parse(entry(life("why"), 101.2345)).items()}
    header = got.pop("TPROXYD_PROXY_PROTOCOL")
    assert header.startswith('{"version": 2, "destination": "10.9.1.1:80", "unique_id": ')
    assert got.pop("MESSAGE").startswith("inbound [2001:db8::7]:51234 via 10.9.1.2:40000 -> 10.9")
    assert got == {
        "SYSLOG_IDENTIFIER": "tproxyd",
        "MESSAGE_ID": MESSAGE_ID,
        "PRIORITY": "6",
        "TPROXYD_LISTENER": "inbound",
        "TPROXYD_CLOSE_REASON": "upstream_fin",
        "TPROXYD_DETAIL": "why",
        "TPROXYD_CLIENT": "2001:db8::7",
        "TPROXYD_CLIENT_PORT": "51234",
        "TPROXYD_PEER": "10.9.1.2",
        "TPROXYD_PEER_PORT": "40000",
        "TPROXYD_DESTINATION": "10.9.1.1",
        "TPROXYD_DESTINATION_PORT": "80",
        "TPROXYD_UPSTREAM": "10.9.1.1:80",
        "TPROXYD_SOURCE": "[2001:db8::7]:16722",
        "TPROXYD_SOURCE_FALLBACK": "family",
        "TPROXYD_UNIQUE_ID": "00ff",
        "TPROXYD_DURATION_MS": "1234",
        "TPROXYD_BYTES_RECEIVED": "3",
        "TPROXYD_BYTES_SENT": "5",
        "TPROXYD_RTT_US": "250",
        "TPROXYD_RETRANSMITS": "2",
    }


def test_the_fields_are_those_that_readme_names() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    named = set(re.findall(r"`([A-Z_]+)`", text[text.index("Its fields are") :].split("\n\n")[0]))
    it = life("why")
    it.tried = ((Upstream(Endpoint("10.0.0.5", 80)), "refused"),)
    keys = {key.removeprefix("TPROXYD_") for key in parse(entry(it, 1.0)) if key[:8] == "TPROXYD_"}
    ports = {"CLIENT_PORT", "PEER_PORT", "DESTINATION_PORT"}
    assert named - {"TPROXYD_", "_PORT"} == keys - ports


def test_what_is_not_known_has_no_field() -> None:
    got = parse(entry(Record(Listener(), PEER, 0.0, 0.0), 0.5))
    assert got["TPROXYD_CLIENT"] == ["10.9.1.2"]
    assert got["PRIORITY"] == ["3"], "internal: a bug"
    absent = ("DETAIL", "DESTINATION", "UPSTREAM", "SOURCE", "PROXY_PROTOCOL", "UNIQUE_ID")
    assert not {f"TPROXYD_{key}" for key in absent} & got.keys()


def test_upstreams_that_were_tried_before() -> None:
    it = life()
    failed = [Upstream(Endpoint("10.0.0.5", 80)), Upstream(Endpoint("/run/app.sock", 0))]
    it.listener = replace(it.listener, upstream=tuple(failed))
    it.tried = tuple((each, "refused") for each in failed)
    got = parse(entry(it, 101.0))
    assert got["TPROXYD_UPSTREAM_FAILED"] == ["10.0.0.5:80", "unix:/run/app.sock"]


@given(st.text(min_size=1))
def test_no_value_becomes_a_field(detail: str) -> None:
    """A newline in what a stranger said must not begin one of its own choice."""
    got = parse(entry(life(detail), 101.0))
    assert got["TPROXYD_DETAIL"] == [detail]
    assert detail in got["MESSAGE"][0]
    assert got["TPROXYD_LISTENER"] == ["inbound"]


def test_a_forged_field() -> None:
    got = parse(entry(life("x\nPRIORITY=0\n_UID=0"), 101.0))
    assert got["PRIORITY"] == ["6"]
    assert "_UID" not in got


# The writer ---------------------------------------------------------------------------------------


made: list[Writing] = []


class Writing:
    def __init__(self, path: Path, keep: int = backlog.KEEP_SIZE) -> None:
        made.append(self)
        self.waiting: list[Callable[[], None]] = []
        self.dropped = 0
        self.failures: list[LogFailure | None] = []
        self.writer = JournalWriter(str(path), self._later, self._count, self.failures.append, keep)

    def _later(self, delay: float, what: Callable[[], None]) -> None:
        assert delay == backlog.FLUSH_AFTER_S
        self.waiting.append(what)

    def _count(self, entries: int) -> None:
        self.dropped += entries

    def tick(self) -> None:
        waiting, self.waiting = self.waiting, []
        for what in waiting:
            what()


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    with nothing_blocks():
        yield


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while made:
        made.pop().writer.close()


@pytest.fixture
def path() -> Iterator[Path]:
    """Not tmp_path: a unix socket's path has 107 bytes."""
    scratch = Path(tempfile.mkdtemp(prefix="tproxyd-"))
    yield scratch / "socket"
    shutil.rmtree(scratch)


def messages(journal: Journal) -> list[str]:
    return [each["MESSAGE"][0] for each in journal.read()]


def test_an_entry_goes_at_once(path: Path) -> None:
    with closing(Journal(path)) as journal:
        writing = Writing(path)
        writing.writer.write(b"MESSAGE=one\n")
        assert messages(journal) == ["one"]
        assert not writing.waiting


def test_a_journal_that_does_not_read(path: Path) -> None:
    """What it does not take is kept, up to a limit; then entries are dropped, and counted."""
    with closing(Journal(path)) as journal:
        writing = Writing(path, keep=30_000)
        sent = [f"{i}".ljust(1000) for i in range(1000)]
        for each in sent[:20]:
            writing.writer.write(b"MESSAGE=%s\n" % each.encode())
        assert not writing.failures, "nothing is lost yet"
        for each in sent[20:]:
            writing.writer.write(b"MESSAGE=%s\n" % each.encode())
        assert writing.dropped > 0
        assert writing.failures == [LogFailure.SLOW_READER]
        got = messages(journal)
        while writing.waiting:
            writing.tick()
            got += messages(journal)
        assert got == sent[: len(got)]
        assert len(got) + writing.dropped == len(sent)
        assert writing.failures == [LogFailure.SLOW_READER, None]


@pytest.mark.parametrize("there", [True, False], ids=["refuses", "is not there"])
def test_a_journal_that_restarts(path: Path, there: bool) -> None:
    """What comes meanwhile is kept; a new socket of the same name is found."""
    writing = Writing(path)
    with closing(Journal(path)) as journal:
        writing.writer.write(b"MESSAGE=one\n")
        assert messages(journal) == ["one"]
        if there:
            journal.sock.close()
            writing.writer.write(b"MESSAGE=two\n")
    writing.writer.write(b"MESSAGE=three\n")
    writing.tick()
    assert writing.failures == [LogFailure.NO_READER]
    with closing(Journal(path)) as journal:
        writing.tick()
        assert messages(journal) == [*["two"] * there, "three"]
    assert writing.failures == [LogFailure.NO_READER, None]
    assert writing.dropped == 0


def test_what_it_never_took_is_counted_at_the_end(path: Path) -> None:
    writing = Writing(path)
    for _ in range(3):
        writing.writer.write(b"MESSAGE=x\n")
    writing.writer.close()
    assert writing.dropped == 3


@pytest.mark.parametrize("size", [100_000, 250_000, 3_000_000])
def test_an_entry_of_any_size(path: Path, size: int) -> None:
    """What is too large for a datagram goes as a sealed file."""
    with closing(Journal(path)) as journal:
        writing = Writing(path)
        writing.writer.write(b"MESSAGE=%s\n" % (b"x" * size))
        writing.writer.write(b"MESSAGE=next\n")
        assert messages(journal) == ["x" * size, "next"]
        assert journal.in_files == (size > 212_992)
        assert writing.dropped == 0
