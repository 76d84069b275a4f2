"""The command socket, both ends: a server in this process's loop, and who asks in a thread."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tproxyd import peer
from tproxyd.addr import Endpoint
from tproxyd.config import Config
from tproxyd.errors import ConfigError, KernelError, Problem, Unreachable
from tproxyd.linux import become
from tproxyd.proc import ask as ask_module
from tproxyd.proc import commands
from tproxyd.proc.ask import MAX_REQUEST, Answer, Request, ask, name_of
from tproxyd.proc.commands import CommandServer
from tproxyd.tests.strangers import NOBODY, needs_root, squatter
from tproxyd.tests.talker import patience

NAME = f"\0tproxyd/test/{os.getpid()}"


async def echo(request: Request) -> Answer:
    return {"got": request}


async def kernel(_: Request) -> Answer:
    raise KernelError("do this", "it is forbidden", "ask somebody")


async def config(_: Request) -> Answer:
    raise ConfigError("/a.toml", (Problem("mark", "is no number"), Problem("", "is odd")))


async def bug(_: Request) -> Answer:
    raise RuntimeError("oh")


HANDLERS = {"echo": echo, "kernel": kernel, "config": config, "bug": bug}


def serving(test: Callable[[CommandServer], Awaitable[Any]]) -> Any:  # noqa: ANN401
    async def run() -> Any:  # noqa: ANN401
        server = CommandServer(NAME, HANDLERS)
        await server.start()
        try:
            async with asyncio.timeout(20):
                return await test(server)
        finally:
            await server.finish()

    return asyncio.run(run())


async def asked(request: Request) -> Answer:
    return await asyncio.to_thread(ask, NAME, request)


def test_an_answer_of_any_size() -> None:
    async def test(_: CommandServer) -> None:
        request = {"verb": "echo", "text": "x" * 60_000}
        assert await asked(request) == {"got": request}

    serving(test)


@pytest.mark.parametrize(
    ("verb", "error", "text"),
    [
        ("kernel", KernelError, "can't do this: it is forbidden; ask somebody"),
        (
            "config",
            ConfigError,
            "can't use the configuration /a.toml:\n  mark: is no number\n  is odd",
        ),
        ("nonsense", Unreachable, 'can\'t do "nonsense": the daemon that runs, version '),
        ("bug", Unreachable, "can't do that: RuntimeError('oh'); this is a bug"),
    ],
)
def test_a_refusal_is_raised_again(verb: str, error: type[Exception], text: str) -> None:
    async def test(_: CommandServer) -> None:
        with pytest.raises(error) as caught:
            await asked({"verb": verb})
        assert str(caught.value).startswith(text)

    serving(test)


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b'{"verb": []}\n', b'{"x": 1}\n', b"\xff\n"])
def test_what_is_no_request_gets_an_answer(line: bytes) -> None:
    async def test(_: CommandServer) -> None:
        reader, writer = await asyncio.open_unix_connection(NAME)
        writer.write(line)
        answer = json.loads(await reader.read())
        assert "it is no JSON line" in answer["error"]["other"]
        writer.close()

    serving(test)


def test_a_request_has_64_kib() -> None:
    async def test(_: CommandServer) -> None:
        with pytest.raises(Unreachable, match="a request has at most 65536 bytes; ask for less"):
            await asked({"verb": "echo", "text": "x" * 10 * MAX_REQUEST})
        assert await asked({"verb": "echo"})

    serving(test)


@needs_root
def test_only_root_and_the_daemons_user_may_ask() -> None:
    def as_nobody() -> str:
        """In a process of its own: who connects is the process, not the thread."""
        read, write = os.pipe()
        if not (pid := os.fork()):
            try:
                become(NOBODY, NOBODY, ())
                ask(NAME, {"verb": "echo"})
                os.write(write, b"was let in")
            except BaseException as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            text = said.read()
        os.waitpid(pid, 0)
        return text

    async def test(_: CommandServer) -> None:
        expected = (
            f"can't ask the daemon: only root and its own user may, not uid {NOBODY}; try sudo"
        )
        assert await asyncio.to_thread(as_nobody) == expected

    serving(test)


def test_nobody_listens() -> None:
    with pytest.raises(Unreachable) as caught:
        ask(f"{NAME}/nobody", {"verb": "echo"})
    assert str(caught.value) == (
        "can't ask the daemon: none runs with this configuration in this network namespace;"
        " start it with tproxyd run, or name its configuration with -c"
    )


def test_who_does_not_answer() -> None:
    """Neither when it accepts nothing, nor when its queue is full of those who wait."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{NAME}/silent")
        silent.listen(0)
        for _ in range(2):  # the first one stays in the queue
            with pytest.raises(Unreachable, match=r"no answer within 0\.05 s; it may hang"):
                ask(f"{NAME}/silent", {"verb": "echo"}, timeout=0.05)


def test_more_than_16_at_once_are_closed_and_those_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "REQUEST_TIMEOUT_S", 0.2)

    async def test(server: CommandServer) -> None:
        held = [await asyncio.open_unix_connection(NAME) for _ in range(commands.MAX_CONNECTIONS)]
        with pytest.raises(Unreachable, match="it hung up; it is stopping, or busy with others"):
            await asked({"verb": "echo"})
        for reader, _ in held:
            assert await reader.read() == b""  # dropped: it asked for nothing
        assert await asked({"verb": "echo"})
        for _, writer in held:
            writer.close()

    serving(test)


def test_a_name_moves_at_once_and_who_asked_before_is_answered() -> None:
    async def test(server: CommandServer) -> None:
        asked_already, go_on = asyncio.Event(), asyncio.Event()

        async def slow(_: Request) -> Answer:
            asked_already.set()
            await go_on.wait()
            return {"who": "old"}

        async def new(_: Request) -> Answer:
            return {"who": "new"}

        HANDLERS["slow"] = slow
        try:
            under_way = asyncio.create_task(asked({"verb": "slow"}))
            await asked_already.wait()
            server.close()
            next_one = CommandServer(NAME, {"slow": new})
            await next_one.start(patience_s=0)
            assert await asked({"verb": "slow"}) == {"who": "new"}
            go_on.set()
            assert await under_way == {"who": "old"}
            await next_one.finish()
        finally:
            del HANDLERS["slow"]

    serving(test)


@needs_root
@pytest.mark.parametrize("listens", [True, False])
def test_a_stranger_with_the_name_is_told_as_what_he_is(listens: bool) -> None:
    async def test() -> None:
        second = CommandServer(NAME, HANDLERS)
        with pytest.raises(KernelError) as caught:
            await second.start(patience_s=0)
        who = f"process {os.getpid()} of uid {NOBODY} has its name; end that process"
        mute = "a process that does not answer has its name; find it with ss -xap, and end it"
        what = f"can't listen on the command socket @{NAME[1:]}: "
        assert str(caught.value) == f"{what}{who if listens else mute}"

    with squatter(NAME, listens=listens):
        asyncio.run(test())


@needs_root
def test_a_name_is_taken_as_soon_as_the_stranger_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "AGAIN_S", 0.001)

    async def test() -> None:
        server = CommandServer(NAME, HANDLERS)
        with squatter(NAME), pytest.raises(KernelError):
            await server.start(patience_s=0)
        server.keep_trying()
        for _ in patience("the server to listen"):
            await asyncio.sleep(0)
            if peer.at(NAME) is not None:
                break
        assert await asked({"verb": "echo"})
        await server.finish()
        with squatter(NAME):
            server.keep_trying()
            server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        assert peer.at(NAME) is None

    asyncio.run(test())


@needs_root
def test_a_strangers_answer_is_not_believed() -> None:
    with squatter(NAME), pytest.raises(Unreachable) as caught:
        ask(NAME, {"verb": "echo"})
    assert str(caught.value) == (
        f"can't ask the daemon: process {os.getpid()} of uid {NOBODY} has taken the place of its"
        " command socket; end that process, or, if it is yours, ask as that user"
    )


@needs_root
def test_root_believes_the_user_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "USER", pwd.getpwuid(NOBODY).pw_name)
    with squatter(NAME):
        assert (found := peer.at(NAME))
        assert found.believed


def test_a_name_that_is_taken_is_waited_for_a_moment() -> None:
    async def test(server: CommandServer) -> None:
        second = CommandServer(NAME, HANDLERS)
        with pytest.raises(KernelError) as caught:
            await second.start(patience_s=0)
        assert str(caught.value) == (
            f"can't listen on the command socket @{NAME[1:]}: address already in use; another"
            " tproxyd runs in this network namespace: give each one an"
            ' admin = "ADDRESS:PORT" of its own'
        )
        starting = asyncio.create_task(second.start())
        asyncio.get_running_loop().call_soon(server.close)  # behind the first try of the other
        await starting
        assert await asked({"verb": "echo"})
        await second.finish()

    serving(test)


def test_the_name_is_that_of_the_admin_endpoint() -> None:
    assert name_of(Config()) == "\0tproxyd/command/127.0.0.1:9133"
    assert name_of(Config(admin=Endpoint("::1", 80))) == "\0tproxyd/command/[::1]:80"
    assert name_of(Config(admin=None)) == "\0tproxyd/command/"
    assert ask_module.TIMEOUT_S > 0
