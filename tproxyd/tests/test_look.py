"""What `status`, `top` and `kill` ask of a daemon, and how they show what it says."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from tproxyd import cli
from tproxyd.proc import ask as ask_module
from tproxyd.proc import top
from tproxyd.proc.rows import Listing
from tproxyd.proc.status import Snapshot, draw
from tproxyd.proc.worker import WorkerSpec
from tproxyd.tests.daemons import Daemon

Shown = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tproxyd(capsys: pytest.CaptureFixture[str]) -> Shown:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    """A configuration file with this text; its path."""

    def write(text: str) -> str:
        path = tmp_path / "tproxyd.toml"
        path.write_text(text)
        return str(path)

    return write


SNAPSHOT: Snapshot = {
    "version": "0.1.0",
    "pid": 4711,
    "uptime_s": 93784.2,
    "ready": False,
    "not_ready_because": ["worker 1 is down"],
    "reload": {"done": 0, "failed": 0, "last": "", "error": ""},
    "listeners": [
        {
            "name": "inbound",
            "bind": "",
            "port": 15006,
            "families": ["IPv4", "IPv6"],
            "intercept": "every port",
            "upstreams": [],
        },
        {
            "name": "a-longer-one",
            "bind": "0.0.0.0",
            "port": 80,
            "families": ["IPv4"],
            "intercept": "",
            "upstreams": [
                {
                    "upstream": "app.example:80",
                    "addresses": [
                        {"address": "10.0.0.5:80", "health": "up", "why": ""},
                        {"address": "[fd00::5]:80", "health": "down", "why": "connection refused"},
                    ],
                    "error": "name or service not known",
                },
                {
                    "upstream": "10.0.0.6:80",
                    "addresses": [{"address": "10.0.0.6:80", "health": "unchecked", "why": ""}],
                    "error": "",
                },
            ],
        },
        {
            "name": "lost",
            "bind": "",
            "port": 81,
            "families": ["IPv4"],
            "intercept": "ports 81",
            "upstreams": [{"upstream": "db.example:81", "addresses": [], "error": "no answer yet"}],
        },
    ],
    "workers": [
        {
            "slot": 0,
            "generation": 1,
            "pid": 4712,
            "state": "ready",
            "active": 3,
            "started": "2026-01-02T03:04:05Z",
        },
        {
            "slot": 1,
            "generation": 1,
            "pid": 0,
            "state": "down",
            "active": 0,
            "started": "2026-01-02T03:04:06Z",
        },
    ],
    "connections": {
        "active": 3,
        "total": 1200,
        "by_close_reason": {"downstream_fin": 1197, "upstream_fin": 0, "idle_timeout": 3},
    },
    "rates": {
        "over_s": 5.0,
        "connections": 34.2,
        "failed": 0.0,
        "received": 1234.0,
        "sent": 5_600_000.0,
        "connect_ms": 0.5,
    },
    "counters": {
        "tproxyd_bytes": {"received": 5, "sent": 12345},
        "tproxyd_proxy_headers": {"1": {"accepted": 7, "local": 0}, "2": {"accepted": 0}},
        "tproxyd_upstream_connect_seconds": {"count": 1200, "seconds": 0.6},
        "tproxyd_source_port_retries": {"in_use": 0},
        "tproxyd_accept_pauses": 2,
        "tproxyd_access_log_lines_dropped": 0,
    },
    "kernel": {
        "state": "drift",
        "detail": ["add ip -4 rule"],
        "return_path": "accept-mark",
        "checked_s_ago": 0.4,
        "heals": 2,
        "heal_failures": 1,
        "trouble": "can't add it: File exists; remove that",
        "last_heal": {
            "at": "2026-01-02T03:04:05.678+00:00",
            "wrong": ["the firewall rules (nft table inet tproxyd) were gone"],
            "done": ["add the firewall rules (nft table inet tproxyd)"],
            "by": ["nft (process 12: nft flush ruleset)"],
            "seconds": 0.0234,
        },
    },
}

SCREEN = """\
tproxyd 0.1.0, not ready, pid 4711, up 1 d 2 h
  worker 1 is down

kernel state: drift, answers come home by accept-mark (0 s ago)
  add ip -4 rule
  healing fails: can't add it: File exists; remove that
  healed 2 times; last at 2026-01-02T03:04:05.678+00:00 in 23 ms, changed by\
 nft (process 12: nft flush ruleset):
    the firewall rules (nft table inet tproxyd) were gone

LISTENER      PORT   FAMILIES   TAKES
inbound       15006  IPv4+IPv6  every port
a-longer-one  80     IPv4       0.0.0.0:80 → app.example:80, 10.0.0.6:80
lost          81     IPv4       ports 81 → db.example:81

LISTENER      UPSTREAM        ADDRESS       HEALTH
a-longer-one  app.example:80  -             can't be resolved: name or service not known
a-longer-one  app.example:80  10.0.0.5:80   up
a-longer-one  app.example:80  [fd00::5]:80  down: connection refused
a-longer-one  10.0.0.6:80     10.0.0.6:80   unchecked
lost          db.example:81   -             can't be resolved: no answer yet
lost          -               -             none can be used: connections are refused

WORKER  PID   STATE  CONNECTIONS  STARTED
0       4712  ready  3            2026-01-02T03:04:05Z
1       -     down   0            2026-01-02T03:04:06Z

connections: 3 open, 1200 ended
  downstream_fin  1197
  idle_timeout       3
in the last 5 s: 34 new/s, 1.2 kB/s in, 5.6 MB/s out

upstream connect: 0.50 ms on average

bytes:
  received      5
  sent      12345

proxy headers:
  v1 accepted  7

accept pauses: 2
"""


LISTING: Listing = {
    "open": 3,
    "sort": "rate",
    "connections": [
        {
            "id": "4712-17-0c0de",
            "listener": "inbound",
            "client": "[fd00::7]:40000",
            "peer": "10.0.0.1:5000",
            "destination": "10.0.0.2:80",
            "upstream": "10.0.0.2:80",
            "source": "[fd00::7]:5488",
            "state": "relaying",
            "received": 1234,
            "sent": 5_600_000,
            "rate": 1_000_000.0,
            "age_s": 125.0,
            "idle_s": 0.04,
            "rtt_us": 1234,
        },
        {
            "id": "4712-19-0c0df",
            "listener": "inbound",
            "client": "10.0.0.9:40000",
            "peer": None,
            "destination": None,
            "upstream": None,
            "source": None,
            "state": "header",
            "received": 0,
            "sent": 0,
            "rate": 0.0,
            "age_s": 2.0,
            "idle_s": 2.0,
            "rtt_us": 0,
        },
    ],
    "silent": [4713],
}

LISTED = """
open connections: 2 of 3, by rate
  worker 4713 does not answer: its own are missing
ID             LISTENER  CLIENT           VIA            UPSTREAM     AS              STATE\
         IN     OUT      RATE    AGE   IDLE     RTT
4712-17-0c0de  inbound   [fd00::7]:40000  10.0.0.1:5000  10.0.0.2:80  [fd00::7]:5488  relaying\
  1.2 kB  5.6 MB  1.0 MB/s    2 m  0.0 s  1.2 ms
4712-19-0c0df  inbound   10.0.0.9:40000   -              -            -               header\
       0 B     0 B     0 B/s  2.0 s  2.0 s       -
"""

PAST = {
    "every_s": 1.0,
    "last": 3,
    "open": [1, 3],
    "connections": [1.0, 34.0],
    "failed": [0.0, 0.0],
    "received": [0.0, 1234.0],
    "sent": [0.0, 5e6],
    "connect_ms": [None, 0.5],
}


class AdminPort:
    """Answers requests with what it was given, each on a connection of its own."""

    def __init__(self, *answers: bytes) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.toml = f'admin = "127.0.0.1:{self.sock.getsockname()[1]}"'
        self.requests: list[str] = []
        self.thread = threading.Thread(target=self._serve, args=(answers,))
        self.thread.start()

    def _serve(self, answers: tuple[bytes, ...]) -> None:
        for answer in answers:
            client, _ = self.sock.accept()
            with client:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1000)
                self.requests.append(head.decode().partition(" HTTP/")[0])
                client.sendall(answer)


def ok(what: object) -> bytes:
    return b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n" + json.dumps(what).encode()


@pytest.fixture
def admin_port() -> Iterator[Callable[..., AdminPort]]:
    ports: list[AdminPort] = []

    def start(*answers: bytes) -> AdminPort:
        ports.append(AdminPort(*answers))
        return ports[-1]

    yield start
    for port in ports:
        port.thread.join()
        port.sock.close()


Start = Callable[..., AdminPort]
Toml = Callable[[str], str]


def test_status_draws_what_the_daemon_says(tproxyd: Shown, toml: Toml, admin_port: Start) -> None:
    port = admin_port(ok(SNAPSHOT))
    assert tproxyd("status", "-c", toml(port.toml)) == (0, SCREEN, "")
    assert port.requests == ["GET /status"]
    code, out, _ = tproxyd("status", "--json", "-c", toml(admin_port(ok(SNAPSHOT)).toml))
    assert (code, json.loads(out)) == (0, SNAPSHOT)
    assert draw(SNAPSHOT) == SCREEN


def test_status_with_connections(tproxyd: Shown, toml: Toml, admin_port: Start) -> None:
    port = admin_port(ok(SNAPSHOT), ok(LISTING))
    said = tproxyd("status", "--connections", "2", "--sort", "rate", "-c", toml(port.toml))
    assert said == (0, SCREEN + LISTED, "")
    assert port.requests == ["GET /status", "GET /connections?sort=rate&limit=2"]
    port = admin_port(ok(SNAPSHOT), ok(LISTING))
    _, out, _ = tproxyd("status", "--connections", "--json", "-c", toml(port.toml))
    assert json.loads(out) == SNAPSHOT | {"open": LISTING}
    assert port.requests[1] == "GET /connections?sort=bytes&limit=20"


def test_status_without_a_daemon(tproxyd: Shown, toml: Toml) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    said = (
        f"tproxyd: can't ask the daemon at 127.0.0.1:{port}: {os.strerror(errno.ECONNREFUSED)};"
        " start it with tproxyd run, or name its configuration with -c\n"
    )
    assert tproxyd("status", "-c", toml(f'admin = "127.0.0.1:{port}"')) == (1, "", said)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "nothing"),
        (b"SSH-2.0-x\r\n", "SSH-2.0-x"),
        (b"\xff\0\x1b[2J" * 20, ("\ufffd??[2J" * 20)[:76]),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP/1.1 404 Not Found"),
        (b"HTTP/1.1 200 OK\r\n\r\n<p>It works!", "something else at /status"),
        (b"HTTP/1.1 200 OK\r\n\r\n\xff", "something else at /status"),
        (b'HTTP/1.1 200 OK\r\n\r\n["status"]', "something else at /status"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"status": "UP"}', "something else at /status"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"version": "0.1', "something else at /status"),
    ],
)
@pytest.mark.parametrize("noun", ["status", "top"])
def test_something_else_answers(
    noun: str, answer: bytes, said: str, tproxyd: Shown, toml: Toml, admin_port: Start
) -> None:
    code, out, err = tproxyd(noun, "-c", toml(admin_port(answer).toml))
    assert (code, out) == (1, "")
    assert f": it answered {said}; is that tproxyd? ss -ltnp" in err


# kill ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "answer", "out", "err"),
    [
        (("1-2-00003",), {"killed": 1}, "ended 1 connection", ""),
        (("--client", "::1", "--client", "::2"), {"killed": 7}, "ended 7 connections", ""),
        (
            ("--client", "10.0.0.0/8", "--client", "::1"),
            {"killed": 0},
            "",
            "no open connection is of 10.0.0.0/8 or ::1",
        ),
        (
            ("1-2-00003", "1-4-00004"),
            {"killed": 1, "missing": ["1-4-00004"]},
            "ended 1 connection",
            "1-4-00004 is no open connection (any more)",
        ),
        (
            ("--client", "::1"),
            {"killed": 0, "silent": [17]},
            "",
            "worker 17 does not answer: it may end its own later",
        ),
    ],
)
def test_kill_says_what_came_of_it(
    argv: tuple[str, ...],
    answer: dict[str, Any],
    out: str,
    err: str,
    tproxyd: Shown,
    toml: Toml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def ask(name: str, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        assert name == "\0tproxyd/command/127.0.0.1:7"
        return {"missing": [], "silent": []} | answer

    monkeypatch.setattr(ask_module, "ask", ask)
    assert tproxyd("kill", "-c", toml('admin = "127.0.0.1:7"'), *argv) == (
        1 if err else 0,
        f"{out}\n" if out else "",
        f"tproxyd: {err}; see tproxyd status --connections\n" if err else "",
    )
    ids = [each for each in argv if each[0].isdecimal() and each.count("-") == 2]
    clients = [] if ids else [*argv[1::2]]
    assert asked == [{"verb": "kill", "ids": ids, "clients": clients}]


@pytest.mark.parametrize(
    "argv", [(), ("1-2-00003", "--client", "::1"), ("--client", "10.0.0.1/8"), ("--client", "x")]
)
def test_kill_used_wrongly_is_2(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["kill", *argv])
    assert caught.value.code == 2


def test_kill_reaches_the_daemon_of_its_configuration(tproxyd: Shown, toml: Toml) -> None:
    with Daemon() as daemon, Daemon() as other:
        path = toml(f'admin = "{daemon.wait_ready().config.admin}"')
        other.wait_ready()
        (pid,) = (each["pid"] for each in daemon.status()["workers"])
        (elsewhere,) = (each["pid"] for each in other.status()["workers"])
        gone = f"{elsewhere}-1-00000"
        code, _, err = tproxyd("kill", "-c", path, gone)
        assert (code, err.count("no open connection (any more)")) == (1, 1)
        code, _, err = tproxyd("kill", "-c", path, "nonsense")
        assert code == 1
        assert 'can\'t end "nonsense": that is no id of a connection; ids are in' in err
        # This one's worker is a stand-in, which takes the question for its stop.
        tproxyd("kill", "-c", path, f"{pid}-1-00000")
        daemon.wait_line("worker 0 hears kill ")


# top ----------------------------------------------------------------------------------------------

TOP = [ok(SNAPSHOT), ok(LISTING), ok(PAST)]


def test_top_into_a_file_is_one_frame(
    tproxyd: Shown, toml: Toml, admin_port: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    port = admin_port(*TOP)
    code, out, err = tproxyd("top", "-c", toml(port.toml), "--sort", "rate")
    assert (code, err) == (0, "")
    assert port.requests[1:] == ["GET /connections?sort=rate&limit=20", "GET /history?after=0"]
    for each in (
        "NOT READY   kernel state drift",
        "worker 1 is down",
        "34/s",
        "a-longer-one",
        "[fd00::5]:80 down: connection refused",
        "worker 4713 does not answer",
        "3 open connections, by rate",
        "4712-17-0c0de  inbound   [fd00::7]:40000  10.0.0.1:5000  10.0.0.2:80",
    ):
        assert each in out
    assert not any(line != line.rstrip() for line in out.splitlines() if not line.strip())


def test_top_of_a_reload_is_red_only_where_a_worker_is_missing() -> None:
    workers = [(2, "ready"), (2, "down"), (3, "starting"), (1, "draining")]
    some = [
        SNAPSHOT["workers"][0] | {"generation": generation, "state": state}
        for generation, state in workers
    ]
    table = top._workers(SNAPSHOT | {"workers": some})
    states = [cell for cell in table.columns[2].cells if isinstance(cell, Text)]
    assert [str(each.style) for each in states] == ["", "red", "dim", "dim"]


@pytest.mark.parametrize(("columns", "width"), [("", 140), ("x", 140), ("0", 140), ("90", 90)])
def test_top_into_a_file_as_wide_as_one_wants(
    columns: str,
    width: int,
    tproxyd: Shown,
    toml: Toml,
    admin_port: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = tproxyd("top", "--once", "-c", toml(admin_port(*TOP).toml))
    assert (code, err) == (0, "")
    assert len(out.splitlines()[0]) == width


@pytest.mark.parametrize("columns", [*range(36, 150, 3), 60, 80, 139, 140, 200])
def test_top_cuts_no_figure(
    columns: int, tproxyd: Shown, toml: Toml, admin_port: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = tproxyd("top", "-c", toml(admin_port(*TOP).toml), "--sort", "age")
    head, first, second = out.splitlines()[-3:]
    for name, one, other in (
        *(("BYTES", "5.6 MB", "0 B"), ("IN", "1.2 kB", "0 B"), ("OUT", "5.6 MB", "0 B")),
        *(("RATE", "1.0 MB/s", "0 B/s"), ("AGE", "2 m", "2.0 s"), ("RTT", "1.2 ms", "-")),
        ("ID", "4712-17-0c0de", "4712-19-0c0df"),
    ):
        assert name not in head.split() or (one in first and other in second)
    assert ("IN" if columns >= 140 else "BYTES") in head.split()
    assert "AGE" in head.split()  # by which it is sorted
    assert max(map(len, (head, first, second))) <= columns


def test_top_as_json_is_an_object_a_line(tproxyd: Shown, toml: Toml, admin_port: Start) -> None:
    _, out, _ = tproxyd("top", "--once", "--json", "-c", toml(admin_port(*TOP).toml))
    (line,) = out.splitlines()
    assert json.loads(line) == SNAPSHOT | {"open": LISTING}


def test_top_without_rich_says_how_to_get_it(toml: Toml) -> None:
    code = "import sys; sys.modules['rich'] = None; from tproxyd.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "top", "-c", toml("")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "tproxyd: can't draw top: the package rich is not installed; try scripts/install"
        " --with top, or tproxyd status --connections\n"
    )


class Terminal:
    """`tproxyd top` at a terminal of this size."""

    def __init__(self, path: str, columns: int, lines: int, term: str = "xterm-256color") -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            size = {"COLUMNS": str(columns), "LINES": str(lines), "TERM": term}
            argv = [sys.executable, "-m", "tproxyd", "top", "-c", path]
            os.execve(sys.executable, argv, {**os.environ, **size})
        self.text = ""

    def wait_for(self, what: str) -> None:
        """Its screen is drawn anew each second: what it shows from now on."""
        deadline = time.monotonic() + 20
        self.text = ""
        while what not in self.text:
            assert select.select((self.fd,), (), (), deadline - time.monotonic())[0], self.text
            self.text += os.read(self.fd, 1 << 16).decode(errors="replace")

    def press(self, key: str) -> None:
        os.write(self.fd, key.encode())

    def end(self) -> int:
        """Reads on: who is not read can't end."""
        try:
            while os.read(self.fd, 1 << 16):
                pass
        except OSError:
            pass  # a terminal whose other end is closed
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])
def test_top_at_a_terminal(columns: int, lines: int, toml: Toml) -> None:
    """It follows keys, says when the daemon is gone, and gives the terminal back."""
    with Daemon(answers_questions) as daemon:
        path = toml(f'admin = "{daemon.wait_ready().config.admin}"')
        terminal = Terminal(path, columns, lines)
        terminal.wait_for("\x1b[?1049h")  # the other screen of the terminal
        terminal.wait_for("open connections, by bytes")
        terminal.press("r")
        terminal.wait_for("open connections, by rate")
        terminal.press("c")
        terminal.wait_for("open connections, by client")
        daemon.signal(signal.SIGKILL)
        terminal.wait_for("NO ANSWER")
        terminal.press("q")
        assert terminal.end() == 0


def test_top_at_a_terminal_that_can_draw_nothing_over(toml: Toml, admin_port: Start) -> None:
    terminal = Terminal(toml(admin_port(*TOP).toml), 80, 24, "dumb")
    terminal.wait_for("open connections, by bytes")
    assert "\x1b" not in terminal.text
    assert terminal.end() == 0


def answers_questions(spec: WorkerSpec) -> None:
    """A worker that has no connections, and says so."""
    spec.control.send(b"ready\n")
    while (word := spec.control.recv(1000)) not in (b"", b"drain\n", b"cut\n"):
        serial = word.split()[1].decode()
        spec.control.send(f'live {serial} {{"rows": [], "open": 0, "last": true}}\n'.encode())
