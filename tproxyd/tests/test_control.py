"""The control socket of a worker, when it reads and when it does not."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from tproxyd.proc import control as control_module
from tproxyd.proc.control import Control

PATIENCE_S = 10.0


@pytest.fixture
def line() -> Iterator[tuple[asyncio.AbstractEventLoop, Control, socket.socket, list[str]]]:
    loop, heard = asyncio.new_event_loop(), list[str]()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(PATIENCE_S)
    control = Control(loop, ours, heard.append)
    with theirs:
        yield loop, control, theirs, heard
        control.close()
    loop.close()


Line = tuple[asyncio.AbstractEventLoop, Control, socket.socket, list[str]]


async def datagram(sock: socket.socket) -> str:
    sock.setblocking(False)
    async with asyncio.timeout(PATIENCE_S):
        return (await asyncio.get_running_loop().sock_recv(sock, control_module.MAX_WORD)).decode()


def test_a_worker_that_was_busy_gets_the_newest_picture_and_the_stop(line: Line) -> None:
    loop, control, theirs, _ = line
    for i in range(2000):
        control.say(f"upstreams {i}")
        if i == 1000:
            control.say("drain")

    async def words() -> list[str]:
        got = [await datagram(theirs)]
        while not {"upstreams 1999\n", "drain\n"} <= set(got):
            got.append(await datagram(theirs))
        control.say("cut")
        return [*got, await datagram(theirs)]

    got = loop.run_until_complete(words())
    assert len(got) < 1000
    assert sorted(got[-3:]) == ["cut\n", "drain\n", "upstreams 1999\n"]


def test_the_longest_word_goes_through_and_a_longer_one_is_told(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    _, end, theirs, _ = line
    longest = "x" * (control_module.MAX_WORD - 1)
    end.say(longest)
    assert theirs.recv(control_module.MAX_WORD).decode() == longest + "\n"
    end.say("upstreams " + longest)
    end.say("drain")
    assert theirs.recv(100) == b"drain\n"
    assert "a worker can't be told this, 204810 bytes: upstreams xxx" in caplog.text


def test_what_a_worker_says_is_heard_up_to_its_end(line: Line) -> None:
    loop, control, theirs, heard = line
    theirs.send(b"ready\n")
    theirs.send(b"failed: x\n")
    control.read()
    assert heard == ["ready\n", "failed: x\n"]
    longest = "live 1 " + "x" * (control_module.MAX_WORD - 8) + "\n"
    theirs.send(longest.encode())
    control.read()
    assert heard[2:] == [longest]
    theirs.shutdown(socket.SHUT_RDWR)
    control.say("drain")  # to nobody
    control.read()
    control.say("drain")
    loop.run_until_complete(asyncio.sleep(0))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_who_talks_without_pause_does_not_keep_the_loop() -> None:
    loop, heard = asyncio.new_event_loop(), list[str]()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer(word: str) -> None:
        heard.append(word)
        if len(heard) < 10_000:
            theirs.send(b"and again\n")

    control = Control(loop, ours, answer)
    theirs.send(b"once\n")
    with theirs:
        loop.run_until_complete(asyncio.sleep(0.001))
        assert 0 < len(heard) < 10_000
        control.close()
    loop.close()


def test_a_file_goes_with_a_word(line: Line) -> None:
    _, control, theirs, _ = line
    before = open_files()
    reader, writer = os.pipe()
    control.say("log", writer)
    os.close(writer)
    data, (fd,), _, _ = socket.recv_fds(theirs, 100, 1)
    assert data == b"log\n"
    os.write(fd, b"x")
    assert os.read(reader, 10) == b"x"
    os.close(fd)
    os.close(reader)
    assert open_files() == before


def test_the_newest_file_waits_for_a_worker_that_is_busy(line: Line) -> None:
    """And no other stays open; the caller has closed its own meanwhile."""
    loop, control, theirs, _ = line
    before = open_files()
    for _ in range(2000):
        control.say("cut")
    for i in range(5):
        reader, writer = os.pipe()
        os.write(writer, b"%d" % i)
        control.say("log", reader)
        os.close(reader)
        os.close(writer)
    assert open_files() == before + 1

    async def newest() -> int:
        theirs.setblocking(False)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    data, fds, _, _ = socket.recv_fds(theirs, 100, 1)
                except BlockingIOError:
                    await asyncio.sleep(0)
                    continue
                if data == b"log\n":
                    return fds[0]

    fd = loop.run_until_complete(newest())
    assert os.read(fd, 10) == b"4"
    os.close(fd)
    assert open_files() == before


def test_a_file_for_a_worker_that_is_gone_is_closed(line: Line) -> None:
    _, control, _, _ = line
    before = open_files()
    for _ in range(2000):
        control.say("cut")
    with socket.socket() as file:
        control.say("log", file.fileno())
    control.close()
    assert open_files() == before - 1  # the socket itself
    with socket.socket() as file:
        control.say("log", file.fileno())
    assert open_files() == before - 1
