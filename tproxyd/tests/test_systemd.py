"""sd_notify, as systemd would hear it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tproxyd.proc.systemd import notify, watchdog_interval


@pytest.fixture
def scratch() -> Iterator[Path]:
    # Not tmp_path: a unix socket's path has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="tproxyd-") as path:
        yield Path(path)


@pytest.mark.parametrize("abstract", [False, True])
def test_the_message_arrives(
    abstract: bool, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"@tproxyd-test-{os.getpid()}" if abstract else str(scratch / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0") if abstract else address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1", "STATUS=Serving")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=Serving"


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "relative", "@tproxyd-nobody"])
def test_nobody_listening_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_no_systemd_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


def test_a_full_socket_does_not_block(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(scratch / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(scratch / "notify"))
        assert any(not notify("WATCHDOG=1") for _ in range(10_000))


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("30000000", "", 15.0),
        ("30000000", "own", 15.0),
        ("30000000", "1", None),  # meant for another process
        ("0", "own", None),
        ("soon", "own", None),
        ("", "", None),
    ],
)
def test_watchdog_interval(
    usec: str, pid: str, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert watchdog_interval() == interval
