"""A worker as a gateway: an ordinary listener and a list of upstreams, over loopback."""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tproxyd.addr import Endpoint, PrefixSet, parse_prefix
from tproxyd.config import HeaderPolicy, ProxyProtocol, SendProxy, SourceKind
from tproxyd.flow.tally import ACTIVE, CONNECTIONS, EJECTIONS, RETRIES
from tproxyd.tests.test_worker import PATIENCE_S, Running, config, running

GATEWAY: dict[str, Any] = {"name": "web", "bind": "*", "source": SourceKind.PROXY}


@contextmanager
def gateway(
    *upstreams: Endpoint,
    known: tuple[Endpoint, ...] | None = None,
    **listener: Any,  # noqa: ANN401
) -> Iterator[Running]:
    """`known`: those that can be used at first; all of them unless said."""
    with running(config(**{**GATEWAY, "upstream": upstreams, **listener})) as worker:
        worker.upstreams = {0: upstreams if known is None else known}
        yield worker.ready()


@pytest.fixture
def backend() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


@pytest.fixture
def closed() -> Endpoint:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Endpoint(*server.getsockname())


def accepted(server: socket.socket) -> socket.socket:
    sock, _ = server.accept()
    sock.settimeout(PATIENCE_S)
    return sock


def where(server: socket.socket) -> Endpoint:
    name = server.getsockname()
    return Endpoint(name, 0) if isinstance(name, str) else Endpoint(*name)


def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return bytes(data)


def end(client: socket.socket, app: socket.socket) -> None:
    """In order."""
    client.close()
    assert app.recv(1) == b""
    app.close()


def test_from_end_to_end(backend: socket.socket) -> None:
    with gateway(where(backend)) as it, it.connect() as client:
        client.sendall(b"hello")
        app = accepted(backend)
        assert receive(app, 5) == b"hello"
        app.sendall(b"back")
        assert receive(client, 4) == b"back"
        port = app.getpeername()[1]
        end(client, app)
        line = it.line()
        assert line["listener"] == line["upstream_cluster"] == "web"
        assert line["downstream_local_address"] == f"127.0.0.1:{it.port}"
        assert line["upstream_host"] == str(where(backend))
        assert line["upstream_local_address"] == f"127.0.0.1:{port}"
        assert line["upstream_local_address_asked"] is None


def test_it_needs_no_privilege_and_has_none(backend: socket.socket) -> None:
    with gateway(where(backend)) as it:
        assert int(it.status("CapEff"), 16) == int(it.status("CapPrm"), 16) == 0


def test_the_next_upstream_takes_it(backend: socket.socket, closed: Endpoint) -> None:
    with gateway(closed, where(backend)) as it:
        for _ in range(2):
            with it.connect() as client:
                end(client, accepted(backend))
        failed = [line["upstreams_failed"] for line in (it.line(), it.line())]
        assert (
            failed
            == [
                [{"upstream": str(closed), "why": f"connect to {closed}: Connection refused"}],
                None,
            ]
            or failed[1] is not None
        )
        assert it.count(RETRIES, "web") == sum(each is not None for each in failed)


def test_all_are_ejected(closed: Endpoint) -> None:
    """The first client that comes when one is back is served."""
    with gateway(closed, eject_after=1, eject_s=60.0) as it:
        for _ in range(3):
            with pytest.raises(ConnectionResetError), it.connect() as client:
                client.recv(1)
            assert it.line()["close_reason"] == "upstream_refused"
        assert it.count(EJECTIONS, "web") == 1
        with socket.create_server(closed) as back:
            back.settimeout(PATIENCE_S)
            with it.connect() as client:
                end(client, accepted(back))


def test_all_are_ejected_and_answer_nothing() -> None:
    """One connection waits to see whether one is back; the others are not kept waiting."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_connection(full.getsockname()),  # its queue has room for one
        gateway(where(full), eject_after=1, eject_s=60.0, connect_timeout_s=0.2) as it,
    ):
        with pytest.raises(ConnectionResetError), it.connect() as client:
            client.recv(1)
        assert it.line()["close_reason"] == "upstream_timeout"
        with it.connect() as first:
            it.until(ACTIVE, "web", value=1)
            with pytest.raises(ConnectionResetError), it.connect() as second:
                second.recv(1)
            line = it.line()
            assert (line["close_reason"], line["response_flags"]) == ("no_upstream", "UH")
            with pytest.raises(ConnectionResetError):
                first.recv(1)
        assert it.line()["close_reason"] == "upstream_timeout"
        assert it.count(EJECTIONS, "web") == 1
        assert it.count(CONNECTIONS, "web", "no_upstream") == 1


def test_it_is_told_who_the_upstreams_are(backend: socket.socket, closed: Endpoint) -> None:
    with gateway(closed, known=()) as it:
        with pytest.raises(ConnectionResetError), it.connect() as client:
            client.recv(1)
        assert it.line()["close_reason"] == "no_upstream"
        picture = json.dumps({"0": [list(where(backend))]})
        it.control.send(f"upstreams {picture}\n".encode())
        while True:  # the control socket and the listening one are two
            with it.connect() as client:
                try:
                    client.sendall(b"x")
                    backend.settimeout(0.1)
                    app, _ = backend.accept()
                    break
                except (TimeoutError, ConnectionError):
                    continue
        assert receive(app, 1) == b"x"
        app.close()
        assert it.drain() == 0  # and that it does not take for the word to leave


@pytest.mark.parametrize("kind", [SendProxy.V1, SendProxy.V2])
def test_a_unix_socket(kind: SendProxy) -> None:
    """Which shows no address: the header does."""
    with tempfile.TemporaryDirectory() as scratch, socket.socket(socket.AF_UNIX) as server:
        path = f"{scratch}/app:1.sock"
        server.bind(path)
        os.chmod(path, 0o777)  # the worker is nobody
        os.chmod(scratch, 0o755)
        server.listen()
        server.settimeout(PATIENCE_S)
        with gateway(Endpoint(path, 0), send_proxy=kind) as it, it.connect() as client:
            app = accepted(server)
            mine = client.getsockname()
            if kind is SendProxy.V1:
                header = f"PROXY TCP4 127.0.0.1 127.0.0.1 {mine[1]} {it.port}\r\n".encode()
            else:
                ends = struct.pack("!4s4sHH", b"\x7f\0\0\1", b"\x7f\0\0\1", mine[1], it.port)
                header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + ends
            assert receive(app, len(header)) == header
            app.sendall(b"back")
            assert receive(client, 4) == b"back"
            data = os.urandom(8 << 20)  # more than any buffer on the way: by splice, too
            for source, sink in ((client, app), (app, client)):
                sending = threading.Thread(target=source.sendall, args=[data], daemon=True)
                sending.start()
                assert receive(sink, len(data)) == data
                sending.join()
            end(client, app)
            line = it.line()
            assert line["upstream_host"] == f"unix:{path}"
            assert line["upstream_local_address"] is None
            assert line["bytes_received"] == len(data)
            assert line["close_reason"] == "downstream_fin"


def test_an_urgent_byte_stays_in_its_place(backend: socket.socket) -> None:
    """Telnet's and FTP's interrupts: what reads a command without it reads another one."""
    with gateway(where(backend)) as it, it.connect() as client:
        app = accepted(backend)
        for one, other in ((client, app), (app, client), (client, app)):
            one.sendall(b"abc")
            one.send(b"!", socket.MSG_OOB)
            one.sendall(b"def")
            assert receive(other, 7) == b"abc!def"
        end(client, app)
        assert it.line()["bytes_received"] == 14


def test_a_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    with gateway(Endpoint(str(tmp_path / "none.sock"), 0)) as it:
        with pytest.raises(ConnectionResetError), it.connect() as client:
            client.recv(1)
        assert it.line()["close_reason"] == "upstream_unreachable"


def test_a_header_in_front(backend: socket.socket) -> None:
    """A balancer before the gateway: its header names the client, and is named on."""
    trusted = (ProxyProtocol(PrefixSet([parse_prefix("127.0.0.0/8")]), HeaderPolicy.REQUIRE),)
    options: dict[str, Any] = {"proxy_protocol": trusted, "send_proxy": SendProxy.V1}
    with gateway(where(backend), **options) as it, it.connect() as client:
        header = b"PROXY TCP4 106.52.131.116 192.0.2.1 40000 443\r\n"
        client.sendall(header + b"hello")
        app = accepted(backend)
        assert receive(app, len(header) + 5) == header + b"hello"
        end(client, app)
        line = it.line()
        assert line["downstream_remote_address"] == "106.52.131.116:40000"
        assert line["downstream_direct_remote_address"].startswith("127.0.0.1:")


@pytest.mark.parametrize("bind", ["127.0.0.9", "::1"])
def test_it_listens_where_it_is_told(bind: str, backend: socket.socket) -> None:
    with gateway(where(backend), bind=bind) as it:
        with pytest.raises(ConnectionRefusedError):
            it.connect("127.0.0.1")
        client = it.connect(bind)
        app = accepted(backend)
        client.sendall(b"x")
        assert receive(app, 1) == b"x"
        with closing(client), closing(app):
            pass
