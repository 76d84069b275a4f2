"""The admin endpoint over real sockets, and what it bears."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
from collections.abc import Awaitable, Callable, Mapping

import pytest

from tproxyd.addr import Endpoint
from tproxyd.errors import KernelError
from tproxyd.proc import admin
from tproxyd.proc.rows import Sort

GET = b"GET /livez HTTP/1.1\r\n\r\n"
LOOPBACK = Endpoint("127.0.0.1", 0)


class Provider:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.broken = False

    async def unready(self) -> list[str]:
        return self.reasons

    async def status(self) -> Mapping[str, object]:
        return {"ready": True}

    async def open_connections(self, sort: Sort, limit: int) -> Mapping[str, object]:
        return {"sort": sort, "limit": limit}

    def past(self, after: int) -> Mapping[str, object]:
        return {"after": after}

    def metrics(self) -> tuple[bytes, str]:
        if self.broken:
            raise RuntimeError("a bug")
        return b"tproxyd_workers 2\n", "text/plain; version=0.0.4"


class Scene:
    """A server, its provider, and a client for it."""

    server: admin.Server

    def __init__(self, sock: socket.socket) -> None:
        self.where = sock.getsockname()[:2]
        self.provider = Provider()

    async def send(self, request: bytes) -> tuple[str, str]:
        """Head and body of the answer, which ends the connection."""
        with await self.connect() as client:
            return await self.ask(client, request)

    async def connect(self) -> socket.socket:
        client = socket.create_connection(self.where)
        client.setblocking(False)
        return client

    async def ask(self, client: socket.socket, request: bytes) -> tuple[str, str]:
        loop, answer = asyncio.get_running_loop(), b""
        await loop.sock_sendall(client, request)
        async with asyncio.timeout(5):
            while data := await loop.sock_recv(client, 65536):
                answer += data
        head, _, body = answer.decode().partition("\r\n\r\n")
        return head, body

    async def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        head, body = await self.send(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        return int(head.split()[1]), head, body


def in_scene(
    test: Callable[[Scene], Awaitable[None]], where: Endpoint = LOOPBACK
) -> list[Mapping[str, object]]:
    """Run a test against a server; what its loop was bothered with."""
    bothered: list[Mapping[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: bothered.append(about))
        sock = admin.open_socket(where)
        scene = Scene(sock)
        scene.server = server = await admin.Server.start(sock, scene.provider)
        try:
            await test(scene)
        finally:
            await server.close()

    asyncio.run(main())
    return bothered


def test_livez() -> None:
    async def test(scene: Scene) -> None:
        code, head, body = await scene.get("/livez")
        assert (code, body) == (200, "ok\n")
        assert "Connection: close" in head

    assert not in_scene(test)


def test_readyz_says_why_not() -> None:
    async def test(scene: Scene) -> None:
        assert (await scene.get("/readyz"))[0] == 200
        scene.provider.reasons = ["worker 1 is down", "kernel state: drift: no rule"]
        code, _, body = await scene.get("/readyz")
        assert (code, body) == (503, "worker 1 is down\nkernel state: drift: no rule\n")

    assert not in_scene(test)


def test_metrics_and_status() -> None:
    async def test(scene: Scene) -> None:
        code, head, body = await scene.get("/metrics?name=x")
        assert (code, body) == (200, "tproxyd_workers 2\n")
        assert "Content-Type: text/plain; version=0.0.4\r\n" in head
        code, head, body = await scene.get("/status")
        assert json.loads(body) == {"ready": True}
        assert "Content-Type: application/json\r\n" in head

    assert not in_scene(test)


def test_connections_and_history() -> None:
    async def test(scene: Scene) -> None:
        for path, told in {
            "/connections": {"sort": "bytes", "limit": 20},
            "/connections?": {"sort": "bytes", "limit": 20},
            "/connections?limit=10000&sort=rtt": {"sort": "rtt", "limit": 10000},
            "/history": {"after": 0},
            "/history?after=17": {"after": 17},
        }.items():
            code, head, body = await scene.get(path)
            assert (code, json.loads(body)) == (200, told)
            assert "Content-Type: application/json\r\n" in head

    assert not in_scene(test)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/connections?sort=size", "'size' is not a valid Sort"),
        ("/connections?limit=-1", "limit is a number up to 10000"),
        ("/connections?limit=10001", "limit is a number up to 10000"),
        ("/connections?limit=", "limit is a number"),
        ("/connections?x", "bad query field"),
        ("/history?after=x", "after is a number"),
    ],
)
def test_a_query_that_makes_no_sense_is_400(path: str, why: str) -> None:
    async def test(scene: Scene) -> None:
        code, _, body = await scene.get(path)
        assert code == 400
        assert why in body
        assert "?sort=bytes|" in body or "?after=N" in body

    assert not in_scene(test)


@pytest.mark.parametrize(
    ("where", "hosts", "code"),
    [
        ("127.0.0.1", ["", "localhost", "LOCALHOST:9133", "127.0.0.1", "10.1.2.3:80"], 200),
        ("::1", ["[::1]", "[::ffff:127.0.0.1]:9133", "[fd00::7]:80"], 200),
        ("127.0.0.1", ["a.example", "a.example:9133", "localhost.example", "1.a", "x@[::1]"], 421),
        ("::1", ["a.example"], 421),
        ("0.0.0.0", ["a.example", "node-7:9133"], 200),
    ],
)
def test_a_name_that_anybody_may_have_made_up(where: str, hosts: list[str], code: int) -> None:
    """A web page reads what its own name is resolved to, 127.0.0.1 too: DNS rebinding. Where others
    may ask, they do so by any name.
    """

    async def test(scene: Scene) -> None:
        for host in hosts:
            for line in (f"Host: {host}", f"x: localhost\r\nhost:{host} \r\nHost: {host}"):
                head, body = await scene.send(f"GET /livez HTTP/1.1\r\n{line}\r\n\r\n".encode())
                assert head.startswith(f"HTTP/1.1 {code} "), line
                assert ("ok" if code == 200 else "localhost") in body
        head, _ = await scene.send(b"GET /livez HTTP/1.0\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 ")

    assert not in_scene(test, Endpoint(where, 0))


def test_the_page_is_whole_and_forbids_all_else() -> None:
    """netns-tests/test_status_page.py looks at it in a browser."""

    async def test(scene: Scene) -> None:
        code, head, body = await scene.get("/")
        assert code == 200
        assert "Content-Type: text/html; charset=utf-8\r\n" in head
        (policy,) = re.findall("Content-Security-Policy: (.*)\r\n", head)
        allowed = dict(each.strip().split(" ", 1) for each in policy.split(";"))
        assert allowed["default-src"] == "'none'"
        assert allowed["connect-src"] == "'self'"
        for tag in ("script", "style"):
            (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
        assert "url(" not in body
        outside = set(re.findall(r"https?://[^'\" ]*", body))
        assert outside == {"http://www.w3.org/2000/svg"}, "a name space is no address"

    assert not in_scene(test)


def test_head_has_the_length_and_no_body() -> None:
    async def test(scene: Scene) -> None:
        code, head, body = await scene.get("/metrics", "HEAD")
        assert (code, body) == (200, "")
        assert "Content-Length: 18\r\n" in head

    assert not in_scene(test)


def test_ipv6() -> None:
    async def test(scene: Scene) -> None:
        assert (await scene.get("/livez"))[0] == 200

    assert not in_scene(test, Endpoint("::1", 0))


@pytest.mark.parametrize("path", ["/metric", "/livez/", "//livez", "/page.html", "/%00"])
def test_another_path_is_404_and_names_those_there_are(path: str) -> None:
    async def test(scene: Scene) -> None:
        code, _, body = await scene.get(path)
        assert code == 404
        assert all(known in body for known in ("/livez", "/readyz", "/metrics", "/status"))

    assert not in_scene(test)


@pytest.mark.parametrize("method", ["POST", "DELETE", "get", "OPTIONS"])
def test_another_method_is_405(method: str) -> None:
    async def test(scene: Scene) -> None:
        code, head, _ = await scene.get("/livez", method)
        assert code == 405
        assert "Allow: GET, HEAD" in head

    assert not in_scene(test)


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"GET  /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/2\r\n\r\n",
        b"GET http://x/livez HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # who speaks TLS to us
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n\r\n",
    ],
)
def test_what_is_not_http_is_400(request_: bytes) -> None:
    async def test(scene: Scene) -> None:
        head, _ = await scene.send(request_)
        assert head.startswith("HTTP/1.1 400 ")

    assert not in_scene(test)


def test_a_head_has_8_kib() -> None:
    async def test(scene: Scene) -> None:
        start = b"GET /livez HTTP/1.1\r\nX: "
        fits = start + b"x" * (admin.MAX_HEAD - len(start) - 4) + b"\r\n\r\n"
        assert (await scene.send(fits))[0].startswith("HTTP/1.1 200 ")
        one_more = fits[:-4] + b"x" + fits[-4:]
        assert (await scene.send(one_more))[0].startswith("HTTP/1.1 400 ")
        endless = start + b"x" * (2 * admin.MAX_HEAD)
        assert (await scene.send(endless))[0].startswith("HTTP/1.1 400 ")

    assert not in_scene(test)


def test_a_silent_client_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "HEAD_TIMEOUT_S", 0.02)

    async def test(scene: Scene) -> None:
        assert await scene.send(b"GET /livez HTT") == ("", "")

    assert not in_scene(test)


def test_a_client_that_takes_no_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "ANSWER_TIMEOUT_S", 0.02)

    async def test(scene: Scene) -> None:
        large = b"x" * 50_000_000  # more than any socket buffer takes
        scene.provider.metrics = lambda: (large, "text/plain")  # type: ignore[method-assign]
        with await scene.connect() as client:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, b"GET /metrics HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(5):
                await scene.get("/livez")  # accepted behind it
                while scene.server._busy:
                    await scene.get("/livez")

    assert not in_scene(test)


async def hold(scene: Scene, count: int, said: bytes = b"") -> list[socket.socket]:
    """So many clients that say this, or nothing, and are known to the server."""
    held = [await scene.connect() for _ in range(count)]
    for client in held:
        if said:
            await asyncio.get_running_loop().sock_sendall(client, said)
    await scene.get("/livez")  # accepted behind them
    return held


def is_open(client: socket.socket) -> bool:
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.parametrize("said", [b"", b"GET /livez HTTP/1.1\r\nX: "], ids=["nothing", "a part"])
def test_where_all_are_taken_the_longest_idle_goes(said: bytes) -> None:
    async def test(scene: Scene) -> None:
        held = await hold(scene, admin.MAX_CONNECTIONS - 1, said)
        newcomers = await hold(scene, 3)
        # The 66th, 67th and the probe behind it each took the place of one.
        assert [is_open(client) for client in held[:4]] == [False, False, False, True]
        assert all(map(is_open, newcomers))
        for client in [*held[3:], *newcomers]:
            _, body = await scene.ask(client, b"\r\n\r\n" if said and client in held else GET)
            assert body == "ok\n"
        for client in [*held, *newcomers]:
            client.close()

    assert not in_scene(test)


def test_many_who_take_their_answer_and_stay_keep_nobody_out() -> None:
    async def test(scene: Scene) -> None:
        held = await hold(scene, admin.MAX_CONNECTIONS, GET)
        assert (await scene.get("/livez"))[0] == 200
        for client in held:
            client.close()

    assert not in_scene(test)


def test_who_is_being_answered_stays() -> None:
    """The one that waits longest is not idle: it is we who take our time."""

    async def test(scene: Scene) -> None:
        asked, answer = asyncio.Event(), asyncio.Event()

        async def slow() -> list[str]:
            asked.set()
            await answer.wait()
            return []

        scene.provider.unready = slow  # type: ignore[method-assign]
        with await scene.connect() as first:
            asking = asyncio.create_task(scene.ask(first, b"GET /readyz HTTP/1.1\r\n\r\n"))
            await asked.wait()
            held = await hold(scene, 2 * admin.MAX_CONNECTIONS)
            answer.set()
            assert (await asking)[1] == "ok\n"
        for client in held:
            client.close()

    assert not in_scene(test)


def test_a_probe_in_the_middle_of_a_flood_is_answered() -> None:
    """It has sent its head, and hundreds come behind it before the server looks at any."""

    async def test(scene: Scene) -> None:
        before = [socket.create_connection(scene.where) for _ in range(200)]
        probe = socket.create_connection(scene.where)
        probe.sendall(GET)
        probe.setblocking(False)
        behind = [socket.create_connection(scene.where) for _ in range(400)]
        assert (await scene.ask(probe, b""))[1] == "ok\n"
        for client in [*before, probe, *behind]:
            client.close()
        await scene.get("/livez")  # accepted behind them: none is half accepted at the end

    assert not in_scene(test)


def test_a_client_that_leaves_does_no_harm() -> None:
    async def test(scene: Scene) -> None:
        for request in (b"", b"GET /li", b"GET /metrics HTTP/1.1\r\n\r\n"):
            client = socket.create_connection(scene.where)
            client.send(request)
            linger = b"\1\0\0\0\0\0\0\0"  # close with RST
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
        assert (await scene.get("/livez"))[0] == 200

    assert not in_scene(test)


def test_a_bug_is_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(scene: Scene) -> None:
        scene.provider.broken = True
        assert (await scene.get("/metrics"))[0] == 500
        assert (await scene.get("/livez"))[0] == 200

    assert not in_scene(test)
    assert "this is a bug" in caplog.text


def test_a_port_that_is_taken_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint("127.0.0.1", other.getsockname()[1])
        with pytest.raises(KernelError) as caught:
            admin.open_socket(taken)
    assert str(caught.value) == (
        f"can't listen on {taken} for the admin endpoint: address already in use;"
        ' choose another address with admin = "ADDRESS:PORT", or none with admin = ""'
    )
