"""log.access = "journal": connections as entries, sent by workers without privileges."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lib.daemon import Daemon
from lib.headers import v2
from lib.loglines import Load, dropped, once, refusing
from lib.topology import Topology
from lib.waits import wait_for

from tproxyd.tests.journals import Entry, Journal

CONFIG = refusing("workers = 2", 'log.access = "journal"', headers=True)
SMALL = v2("192.0.2.1", "192.0.2.2", source_port=4711)
# An entry of more than a datagram's 212,992 bytes: escaped, these are 4 for 1.
LARGE = v2("192.0.2.1", "192.0.2.2", tlvs=b"\x02\xf2\x30" + b"\xff" * 62_000)


class Place:
    """/run/systemd/journal as the daemon sees it, in a mount namespace of its own."""

    def __init__(self, at: Path, net: Topology) -> None:
        self.at, self.net = at, net
        script = (
            "mount -t tmpfs none /run && mkdir -p /run/systemd/journal"
            f' && mount --bind {at} /run/systemd/journal && exec "$@"'
        )
        self.prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
        net.pod.sysctl("net/unix/max_dgram_qlen", 512)  # as systemd sets it (sysctl.d)
        self.open()

    def open(self) -> None:
        self.journal = self.net.pod.inside(Journal, self.at / "socket")


@pytest.fixture
def place(net: Topology) -> Iterator[Place]:
    path = Path(tempfile.mkdtemp(prefix="tproxyd-"))
    path.chmod(0o755)
    it = Place(path, net)
    yield it
    it.journal.sock.close()
    shutil.rmtree(path)


def test_an_entry_for_each_connection(net: Topology, place: Place) -> None:
    with Daemon(net.pod, CONFIG, install=False, prefix=place.prefix) as daemon:
        entries: list[Entry] = []
        with Load(net.pod, SMALL) as load:
            while len(entries) < 300:
                entries += wait_for(place.journal.read, "entries")
        count = load.stop()

        def all_are_there() -> bool:
            entries.extend(place.journal.read())
            return len(entries) == count

        wait_for(all_are_there, f"{count} entries")
        assert dropped(daemon) == 0
    for each in entries:
        assert each["SYSLOG_IDENTIFIER"] == ["tproxyd"]
        assert each["TPROXYD_CLIENT"] == ["192.0.2.1"]
        assert each["TPROXYD_CLIENT_PORT"] == ["4711"]
        assert each["TPROXYD_PEER"] == ["127.0.0.1"]
        assert each["TPROXYD_CLOSE_REASON"] == ["upstream_refused"]
        assert each["MESSAGE"][0].startswith("web 192.0.2.1:4711 via 127.0.0.1:")
    assert len({each["TPROXYD_PEER_PORT"][0] for each in entries}) > 100


def test_a_large_entry_comes_as_a_file(net: Topology, place: Place) -> None:
    with Daemon(net.pod, CONFIG, install=False, prefix=place.prefix):
        once(net.pod, LARGE)
        [entry] = wait_for(place.journal.read, "an entry")
    assert len(entry["TPROXYD_PROXY_PROTOCOL"][0]) > 212_992
    assert place.journal.in_files == 1


def test_a_journal_that_does_not_read_and_then_restarts(net: Topology, place: Place) -> None:
    """Traffic goes on; what waited comes when there is a journal again."""
    with Daemon(net.pod, CONFIG, install=False, prefix=place.prefix) as daemon:
        with Load(net.pod, SMALL) as load:
            load.wait_for_more(100)
            place.journal.close()
            load.wait_for_more(100)
            wait_for(
                lambda: daemon.metric("tproxyd_access_log_failing", cause="no_reader") > 0,
                "what the metrics say of it",
            )
            place.open()
            entries: list[Entry] = []

            def caught_up() -> bool:
                entries.extend(place.journal.read())
                return daemon.metric("tproxyd_access_log_failing") == 0

            wait_for(caught_up, "a journal that reads")
        load.stop()
        assert dropped(daemon) == 0
        assert len(entries) > 100


def test_no_journal_is_an_error_at_the_start(net: Topology, place: Place) -> None:
    place.journal.close()
    with Daemon(net.pod, CONFIG, install=False, prefix=place.prefix, ready=False) as daemon:
        assert daemon.process.wait(10) == 3
        assert "can't open the access log journal at /run/systemd/journal/socket" in daemon.stderr
