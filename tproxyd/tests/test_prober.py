"""Names that resolve and fail to, and checks against real sockets on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import Config, HealthCheck, Intercept, Listener, Scope, SendProxy, Via
from tproxyd.flow.proxyproto import Header, encode_v1, encode_v2, parse
from tproxyd.linux import CAP_NET_ADMIN, CAP_NET_RAW, SO_MARK, capabilities
from tproxyd.proc import picture, prober
from tproxyd.proc.picture import NOT_YET, Address, Entry, Facts, Health
from tproxyd.proc.prober import Prober, Verdict

PATIENCE_S = 10.0
APP = Endpoint("app.example", 80)
ONE, TWO, SIX = Endpoint("127.0.0.1", 80), Endpoint("127.0.0.2", 80), Endpoint("::1", 80)
UNIX = Endpoint("/run/app.sock", 0)
OFTEN = HealthCheck(interval_s=0.002, timeout_s=PATIENCE_S, rise=2, fall=2)
SELDOM = HealthCheck(interval_s=1e6, timeout_s=PATIENCE_S)


def config(*upstream: Endpoint, **settings: object) -> Config:
    return Config(listeners=(Listener(upstream=upstream, **settings),))  # type: ignore[arg-type]


# Verdicts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "healths"),
    [
        ("+", "u"),
        ("-", "d"),
        ("+---", "uuud"),
        ("+--+---", "uuuuuud"),  # three in a row
        ("-++", "ddu"),
        ("-+-++", "ddddu"),
        ("+---++---", "uuudduuud"),
    ],
)
def test_fall_takes_away_and_rise_brings_back(checks: str, healths: str) -> None:
    verdict, seen = Verdict(), ""
    for check in checks:
        verdict.add("" if check == "+" else "refused", HealthCheck(rise=2, fall=3))
        seen += verdict.health.value[0]
        assert verdict.why == ("refused" if verdict.health == Health.DOWN else "")
    assert seen == healths


def test_the_newest_reason_counts() -> None:
    verdict = Verdict()
    for why in ("refused", "silent"):
        verdict.add(why, HealthCheck())
    assert verdict.why == "silent"


def up(where: Endpoint) -> Address:
    return Address(where, Health.UP)


# Names --------------------------------------------------------------------------------------------


class Names:
    """A resolver whose answers a test sets: addresses, or why there are none."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.asked = 0
        self.silent = threading.Event()

    def __call__(self, name: str) -> tuple[str, ...]:
        self.asked += 1
        answer = self.answers[name]
        if answer == "silence":
            assert self.silent.wait(PATIENCE_S)
        if answer.startswith("!"):
            raise socket.gaierror(-2, answer[1:])
        return tuple(answer.split())


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    names = Names()
    monkeypatch.setattr(prober, "look_up", names)
    yield names
    names.silent.set()


class Watched:
    """A prober at work in this loop."""

    def __init__(self, config: Config, known: Facts | None = None) -> None:
        self._news = asyncio.Event()
        self.prober = Prober(config, known or picture.initial(config), self._news.set)

    async def until(self, holds: Callable[[Facts], bool]) -> Facts:
        async with asyncio.timeout(PATIENCE_S):
            while not holds(facts := self.prober.facts()):
                self._news.clear()
                await self._news.wait()
        return facts

    async def until_picture(self, *wanted: Endpoint) -> Facts:
        return await self.until(lambda facts: picture.picture(facts)[0] == wanted)


@asynccontextmanager
async def watched(config: Config, known: Facts | None = None) -> AsyncIterator[Watched]:
    watch = Watched(config, known)
    task = asyncio.create_task(watch.prober.run())
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_a_name_stands_for_its_addresses_where_it_stands(names: Names) -> None:
    names.answers = {"app.example": "127.0.0.9 127.0.0.2 ::1"}
    nine = Endpoint("127.0.0.9", 80)

    async def test() -> None:
        async with watched(config(UNIX, APP, TWO, ONE)) as watch:
            facts = await watch.until_picture(UNIX, nine, TWO, SIX, ONE)
            assert facts.complete
            assert names.asked == 1

    asyncio.run(test())


def test_the_answer_changes(names: Names) -> None:
    names.answers = {"app.example": "127.0.0.1"}

    async def test() -> None:
        async with watched(config(APP, resolve_every_s=0.001)) as watch:
            await watch.until_picture(ONE)
            names.answers = {"app.example": "127.0.0.2"}
            await watch.until_picture(TWO)

    asyncio.run(test())


@pytest.mark.parametrize(("answer", "why"), [("!Gone", "gone"), ("", "the answer is empty")])
def test_the_last_answer_stays_while_there_is_no_other(
    names: Names, answer: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "RETRY_S", 3600.0)  # not used: its own interval is shorter
    names.answers = {"app.example": "127.0.0.1"}

    async def test() -> None:
        async with watched(config(APP, resolve_every_s=0.001)) as watch:
            await watch.until_picture(ONE)
            names.answers = {"app.example": answer}
            facts = await watch.until(lambda facts: facts.failures[0] >= 3)
            assert facts.entries[0] == (Entry(APP, (Address(ONE),), why),)
            names.answers = {"app.example": "127.0.0.2"}
            facts = await watch.until_picture(TWO)
            assert facts.entries[0][0].error == ""

    asyncio.run(test())


def test_after_a_failure_it_is_asked_again_sooner(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "RETRY_S", 0.001)
    names.answers = {"app.example": "!Gone"}

    async def test() -> None:
        async with watched(config(APP, resolve_every_s=3600.0)) as watch:
            facts = await watch.until(lambda facts: facts.failures[0] >= 3)
            assert facts.complete  # it was tried
            assert facts.entries[0] == (Entry(APP, (), "gone"),)
            names.answers = {"app.example": "127.0.0.1"}
            await watch.until_picture(ONE)

    asyncio.run(test())


def test_a_silent_server_delays_no_other_name(names: Names) -> None:
    slow = [Endpoint(f"slow{i}.example", 80) for i in range(40)]  # more than threads by default
    names.answers = {each.host: "silence" for each in slow} | {"app.example": "127.0.0.1"}

    async def test() -> None:
        async with watched(config(*slow, APP)) as watch:
            facts = await watch.until_picture(ONE)
            assert not facts.complete
            assert facts.entries[0][0] == Entry(slow[0], (), NOT_YET)

    asyncio.run(test())


def test_a_second_prober_knows_what_the_first_one_knew(names: Names) -> None:
    names.answers = {"app.example": "!Gone"}
    known = Facts({0: (Entry(APP, (Address(ONE, Health.DOWN, "x"), up(TWO))),)}, {0: 7}, True)

    async def test() -> None:
        async with watched(config(APP), known) as watch:
            facts = await watch.until(lambda facts: facts.failures[0] == 8)
            assert facts.entries[0] == (
                Entry(APP, (Address(ONE, Health.DOWN, "x"), up(TWO)), "gone"),
            )

    asyncio.run(test())


def test_the_real_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "127.0.0.1" in prober.look_up("localhost")
    with pytest.raises(socket.gaierror):
        prober.look_up("x" * 64 + ".example")  # a label has 63: no server is asked
    answer = [
        (0, 0, 0, "", address)
        for address in (
            ("::ffff:10.0.0.9", 0, 0, 0),
            ("10.0.0.10", 0),
            ("fe80::1", 0, 0, 3),
            ("10.0.0.9", 0),
            ("fd00::a", 0, 0, 0),
        )
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert prober.look_up("x") == ("10.0.0.9", "10.0.0.10", "fd00::a", "fe80::1%3")


# Checks -------------------------------------------------------------------------------------------


def server(host: str = "127.0.0.1", port: int = 0, backlog: int = 100) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def unix_server(path: Path, backlog: int = 100) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def where(sock: socket.socket) -> Endpoint:
    if sock.family == socket.AF_UNIX:
        return Endpoint(sock.getsockname(), 0)
    return Endpoint(*sock.getsockname()[:2])


def test_what_refuses_is_down_and_what_comes_back_is_up() -> None:
    async def test() -> None:
        with server() as lives, server() as dies:
            one, two = where(lives), where(dies)
            async with watched(config(two, one, health_check=OFTEN)) as watch:
                facts = await watch.until(lambda facts: facts.complete)
                assert picture.picture(facts)[0] == (two, one)
                dies.close()
                facts = await watch.until_picture(one)
                assert facts.entries[0] == (
                    Entry(two, (Address(two, Health.DOWN, "connection refused"),)),
                    Entry(one, (up(one),)),
                )
                with server(*two):
                    await watch.until_picture(two, one)

    asyncio.run(test())


def test_without_checks_nobody_is_bothered() -> None:
    async def test() -> None:
        with server() as quiet:
            async with watched(config(where(quiet), health_check=HealthCheck())):
                for _ in range(100):
                    await asyncio.sleep(0)
            with pytest.raises(BlockingIOError):
                quiet.accept()

    asyncio.run(test())


def test_a_silent_one_is_down_when_the_time_is_up() -> None:
    impatient = HealthCheck(interval_s=0.001, timeout_s=0.05)

    async def test() -> None:
        with server(backlog=0) as full, socket.create_connection(where(full)):
            async with watched(config(where(full), health_check=impatient)) as watch:
                facts = await watch.until_picture()
                assert facts.entries[0][0].addresses[0].why == "no answer within 0.05 s"

    asyncio.run(test())


def test_unix_sockets_are_checked(tmp_path: Path) -> None:
    async def test() -> None:
        full, fine, none = (Endpoint(str(tmp_path / name), 0) for name in ("full", "fine", "none"))
        with (
            unix_server(tmp_path / "full", backlog=0) as stuffed,
            unix_server(tmp_path / "fine"),
            socket.socket(socket.AF_UNIX) as waits,
        ):
            waits.connect(stuffed.getsockname())
            async with watched(config(full, fine, none, health_check=OFTEN)) as watch:
                facts = await watch.until(lambda facts: facts.complete)
                assert [each.addresses[0] for each in facts.entries[0]] == [
                    Address(full, Health.DOWN, "its accept queue is full"),
                    up(fine),
                    Address(none, Health.DOWN, "no such file or directory"),
                ]

    asyncio.run(test())


async def received(listening: socket.socket, greeting: bytes) -> tuple[bytes, Endpoint]:
    """What a check sends to a server that speaks first, and from where; it ends in order."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE_S):
        sock, peer = await loop.sock_accept(listening)
        with sock:
            await loop.sock_sendall(sock, greeting)
            data = b""
            while part := await loop.sock_recv(sock, 1000):
                data += part
            await loop.sock_sendall(sock, greeting)  # it still listens
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            return data, Endpoint(*peer[:2]) if peer else UNIX


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "unix"])
@pytest.mark.parametrize("send", SendProxy)
def test_a_check_says_that_it_is_our_own_and_ends_in_order(
    send: SendProxy, host: str, tmp_path: Path
) -> None:
    async def test() -> None:
        with unix_server(tmp_path / "x") if host == "unix" else server(host) as listening:
            there = where(listening)
            async with watched(config(there, health_check=SELDOM, send_proxy=send)) as watch:
                data, peer = await received(listening, b"220 ready\r\n")
                if send is SendProxy.V2:
                    assert data == encode_v2(None, None)
                    assert parse(data) == Header(2, 16, True, None, None)
                elif send is SendProxy.V1 and host == "unix":
                    assert data == b"PROXY UNKNOWN\r\n"
                elif send is SendProxy.V1:
                    assert data == encode_v1(peer, there)
                else:
                    assert data == b""
                await watch.until_picture(there)

    asyncio.run(test())


def test_a_server_that_never_stops_talking_is_left() -> None:
    async def talk(sock: socket.socket) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await asyncio.get_running_loop().sock_sendall(sock, b"x" * 100_000)

    async def test() -> None:
        with server() as listening:
            async with watched(config(where(listening), health_check=SELDOM)):
                sock, _ = await asyncio.get_running_loop().sock_accept(listening)
                with sock, pytest.raises(ConnectionError):
                    await talk(sock)

    asyncio.run(test())


def test_addresses_that_vanish_are_checked_no_more(names: Names) -> None:
    async def accepted(sock: socket.socket) -> None:
        async with asyncio.timeout(PATIENCE_S):
            (await asyncio.get_running_loop().sock_accept(sock))[0].close()

    async def test() -> None:
        with server("127.0.0.1") as old, server("127.0.0.2", where(old).port) as new:
            names.answers = {"app.example": "127.0.0.1"}
            app = Endpoint("app.example", where(old).port)
            async with watched(config(app, resolve_every_s=0.001, health_check=OFTEN)) as watch:
                await accepted(old)
                names.answers = {"app.example": "127.0.0.2"}
                await watch.until_picture(where(new))
                with suppress(BlockingIOError):
                    while True:
                        old.accept()[0].close()
                for _ in range(10):
                    await accepted(new)
                with pytest.raises(BlockingIOError):
                    old.accept()

    asyncio.run(test())


def test_an_address_of_two_entries_is_one_check(names: Names) -> None:
    names.answers = {"app.example": "127.0.0.1"}

    async def test() -> None:
        with server() as listening:
            there = where(listening)
            app = Endpoint("app.example", there.port)
            async with watched(config(there, app, health_check=SELDOM)) as watch:
                facts = await watch.until(lambda facts: facts.complete)
                assert facts.entries[0] == (Entry(there, (up(there),)), Entry(app, (up(there),)))
                listening.accept()[0].close()
                with pytest.raises(BlockingIOError):
                    listening.accept()

    asyncio.run(test())


def test_checks_do_not_come_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes after a part of the interval, those behind it after all of it."""
    pauses: list[float] = []

    async def no_sleep(seconds: float) -> None:
        pauses.append(seconds)
        await original(0)

    async def no_knock(*_: object) -> socket.socket:
        raise ConnectionRefusedError(111, "")

    original = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    monkeypatch.setattr(prober, "knock", no_knock)
    monkeypatch.setattr(prober, "random", lambda: 0.25)

    async def test() -> None:
        async with watched(config(ONE, health_check=HealthCheck(interval_s=100.0))):
            while len(pauses) < 3:
                await original(0)

    asyncio.run(test())
    assert [round(each) for each in pauses[:3]] == [25, 100, 100]


def test_checks_carry_a_mark_where_our_own_rules_would_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks: list[int] = []

    async def knock(_where: Endpoint, _send: SendProxy, mark: int) -> socket.socket:
        marks.append(mark)
        raise ConnectionRefusedError(111, "")

    monkeypatch.setattr(prober, "knock", knock)
    listener = Listener(upstream=(ONE,), health_check=OFTEN)
    outbound = Listener(intercept=Intercept(scope=Scope.OUTBOUND, via=Via.REDIRECT))

    async def test(config: Config) -> None:
        async with watched(config) as watch:
            await watch.until_picture()

    asyncio.run(test(Config(listeners=(listener,))))
    asyncio.run(test(Config(mark=0x100, listeners=(listener, outbound))))
    assert set(marks) == {0, 0x101}


@pytest.mark.skipif(
    not capabilities() & {CAP_NET_RAW, CAP_NET_ADMIN}, reason="who sets a mark needs CAP_NET_RAW"
)
def test_the_mark_is_on_the_socket() -> None:
    async def test() -> None:
        with (
            server() as listening,
            await prober.knock(where(listening), SendProxy.OFF, 7) as sock,
        ):
            assert sock.getsockopt(socket.SOL_SOCKET, SO_MARK) == 7

    asyncio.run(test())


def test_a_check_leaves_no_file_open() -> None:
    async def test() -> None:
        with server() as fine, server() as gone:
            gone.close()
            before = len(os.listdir("/proc/self/fd"))
            for there in (where(fine), Endpoint("127.0.0.1", 1), UNIX):
                with suppress(OSError):
                    await prober.take_leave(await prober.knock(there, SendProxy.OFF, 0), 0.0)
            assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(test())
