"""The command line: exit codes, what it says, and what it never loads."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tproxyd import __version__, cli, doctor
from tproxyd.config import Config
from tproxyd.doctor import Check, Verdict
from tproxyd.errors import KernelError
from tproxyd.kernel import reconcile
from tproxyd.proc import supervisor
from tproxyd.proc.run_command import Command
from tproxyd.proc.status import Snapshot, draw

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


# The configuration --------------------------------------------------------------------------------


def test_check_says_what_is_there(tproxyd: Shown, toml: Callable[[str], str]) -> None:
    two = '[[listener]]\nname = "a"\nport = 1\n[[listener]]\nname = "b"\nport = 2\n'
    path = toml(two)
    said = f"{path}: fine: 2 listeners: a on port 1, b on port 2\n"
    assert tproxyd("check", "-c", path) == (0, said, "")


def test_every_problem_at_once(tproxyd: Shown, toml: Callable[[str], str]) -> None:
    path = toml('tabel = 1\nmark = "x"\n[[listener]]\nport = 0\n')
    said = (
        f"tproxyd: can't use the configuration {path}:\n"
        "  listener[0].port: 0 is not a whole number from 1 to 65535\n"
        '  mark: "x" is not a whole number from 1 to 4294967294\n'
        '  tabel: unknown key; did you mean "table"?\n'
    )
    assert tproxyd("check", "-c", path) == (2, "", said)


@pytest.mark.parametrize("verb", ["run", "install", "rules", "check", "doctor", "status"])
def test_a_file_that_was_named_must_be_there(verb: str, tproxyd: Shown, tmp_path: Path) -> None:
    path = f"{tmp_path}/none.toml"
    said = f"tproxyd: can't use the configuration {path}:\n  there is no such file\n"
    assert tproxyd(verb, "-c", path) == (2, "", said)


def test_a_file_that_cannot_be_read(tproxyd: Shown, tmp_path: Path) -> None:
    said = f"tproxyd: can't use the configuration {tmp_path}:\n  can't be read: Is a directory\n"
    assert tproxyd("check", "-c", str(tmp_path)) == (2, "", said)


def test_a_file_that_is_not_text(tproxyd: Shown, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"mark = \xff")
    code, _, err = tproxyd("check", "-c", str(path))
    assert (code, err.splitlines()[1]) == (2, "  not UTF-8, which TOML is: byte 7")


def test_without_the_default_file_the_defaults(
    tproxyd: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEFAULT_FILE", "/nonexistent/tproxyd.toml")
    assert tproxyd("check") == (
        0,
        "built-in defaults: fine: 1 listener: inbound on port 15006\n",
        "tproxyd: no /nonexistent/tproxyd.toml: using the built-in defaults\n",
    )


def test_the_default_file_is_used_and_its_errors_count(
    tproxyd: Shown, toml: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEFAULT_FILE", toml("workers = 1"))
    assert tproxyd("check")[0] == 0
    monkeypatch.setattr(cli, "DEFAULT_FILE", toml("workers = -1"))
    assert tproxyd("check")[0] == 2


# Usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("dance",),
        ("run", "--now"),
        ("rules", "--backend", "x"),
        ("check", "-c"),
        ("exec", "--"),
    ],
)
def test_wrong_usage_is_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert "usage: tproxyd" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"tproxyd {__version__}\n")


# Verbs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (
            reconcile.Report(("add x", "set y"), (), ("return path z",)),
            "add x\nset y\nreturn path z\n",
        ),
        (reconcile.Report((), (), ("return path z",)), "nothing to change\n"),
    ],
)
def test_install_says_what_it_changed(
    report: reconcile.Report,
    said: str,
    tproxyd: Shown,
    toml: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed: list[Config] = []

    def make(config: Config) -> reconcile.Report:
        installed.append(config)
        return report

    monkeypatch.setattr(reconcile, "install", make)
    assert tproxyd("install", "-c", toml("table = 7")) == (0, said, "")
    assert installed == [Config(table=7)]


@pytest.mark.parametrize(
    ("changed", "said"), [(("remove x",), "remove x\n"), ((), "nothing to remove\n")]
)
def test_clean_needs_no_configuration(
    changed: tuple[str, ...], said: str, tproxyd: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "clean", lambda: reconcile.Report(changed))
    assert tproxyd("clean") == (0, said, "")
    assert tproxyd("clean", "-c", "/nonexistent") == (0, said, "")


def test_what_the_kernel_refuses_is_3(
    tproxyd: Shown, toml: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise KernelError("do this", "it is forbidden", "ask somebody")

    monkeypatch.setattr(reconcile, "install", refuse)
    monkeypatch.setattr(reconcile, "clean", refuse)
    monkeypatch.setattr(supervisor, "serve", refuse)
    for verb in ("install", "clean", "run"):
        said = "tproxyd: can't do this: it is forbidden; ask somebody\n"
        assert tproxyd(verb, "-c", toml("")) == (3, "", said)


def test_run_serves(
    tproxyd: Shown, toml: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[Config, bool, bool]] = []

    def serve(config: Config, *, install: bool, guard: bool) -> None:
        served.append((config, install, guard))

    monkeypatch.setattr(supervisor, "serve", serve)
    assert tproxyd("run", "-c", toml("table = 7")) == (0, "", "")
    assert tproxyd("run", "--install", "-c", toml("table = 8")) == (0, "", "")
    assert tproxyd("run", "--guard", "-c", toml("table = 9")) == (0, "", "")
    assert served == [
        (Config(table=7), False, False),
        (Config(table=8), True, False),
        (Config(table=9), False, True),
    ]
    with pytest.raises(SystemExit, match="2"):
        tproxyd("run", "--install", "--guard")


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        (("--", "sh", "-c", "true", "--", "x"), ["sh", "-c", "true", "--", "x"]),
        (("sh",), ["sh"]),
    ],
)
def test_exec_runs_a_command(
    words: tuple[str, ...],
    argv: list[str],
    tproxyd: Shown,
    toml: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serve(config: Config, *, install: bool, command: Command) -> None:
        assert (config, install, command._argv) == (Config(table=7), True, argv)
        command.takes(signal.SIGHUP)

    monkeypatch.setattr(supervisor, "serve", serve)
    assert tproxyd("exec", "-c", toml("table = 7"), *words) == (128 + signal.SIGHUP, "", "")


@pytest.mark.parametrize(("starts", "code"), [(False, 3), (True, 5)])
def test_exec_of_what_the_kernel_refuses(
    starts: bool,
    code: int,
    tproxyd: Shown,
    toml: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until CMD has run the failure is what the exit code says; then CMD's own is worth more."""

    def refuse(_: Config, *, install: bool, command: Command) -> None:
        if starts:
            command._ended = 5
        raise KernelError("do this", "it is forbidden", "ask somebody")

    monkeypatch.setattr(supervisor, "serve", refuse)
    said = "tproxyd: can't do this: it is forbidden; ask somebody\n"
    assert tproxyd("exec", "-c", toml(""), "--", "x") == (code, "", said)


def test_exec_as_nobody_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["exec", "--user", "nobdy", "--", "x"])
    assert end.value.code == 2
    assert 'argument --user: there is no user "nobdy" here' in capsys.readouterr().err


# Nouns --------------------------------------------------------------------------------------------


def test_rules_are_what_nft_accepts_and_name_the_rest(
    tproxyd: Shown, toml: Callable[[str], str]
) -> None:
    code, out, _ = tproxyd("rules", "-c", toml(""))
    assert code == 0
    assert "# ip -4 rule add " in out
    assert "table inet tproxyd {" in out
    assert tproxyd("rules", "--backend", "nft", "-c", toml("")) == (0, out, "")


CHECKS = [
    Check("CAP_NET_RAW", Verdict.OK, "present"),
    Check("lo", Verdict.WARN, "odd", "look at it"),
    Check("rules", Verdict.FAIL, "missing", "tproxyd install"),
]


def test_doctor_shows_remedies(
    tproxyd: Shown, toml: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run", lambda _: CHECKS)
    said = (
        "ok    CAP_NET_RAW  present\n"
        "warn  lo           odd\n"
        "                   → look at it\n"
        "fail  rules        missing\n"
        "                   → tproxyd install\n"
    )
    assert tproxyd("doctor", "-c", toml("")) == (1, said, "")
    code, out, _ = tproxyd("doctor", "--json", "-c", toml(""))
    assert code == 1
    assert json.loads(out)[1] == {
        "name": "lo",
        "verdict": "warn",
        "detail": "odd",
        "remedy": "look at it",
    }


def test_a_warning_is_not_a_problem(
    tproxyd: Shown, toml: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run", lambda _: CHECKS[:2])
    assert tproxyd("doctor", "-c", toml(""))[0] == 0


SNAPSHOT: Snapshot = {
    "version": "0.1.0",
    "pid": 4711,
    "uptime_s": 93784.2,
    "ready": False,
    "not_ready_because": ["worker 1 is down"],
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
        {"slot": 0, "pid": 4712, "state": "ready", "active": 3, "started": "2026-01-02T03:04:05Z"},
        {"slot": 1, "pid": 0, "state": "down", "active": 0, "started": "2026-01-02T03:04:06Z"},
    ],
    "connections": {
        "active": 3,
        "total": 1200,
        "by_close_reason": {"downstream_fin": 1197, "upstream_fin": 0, "idle_timeout": 3},
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

upstream connect: 0.50 ms on average

bytes:
  received      5
  sent      12345

proxy headers:
  1 accepted  7

accept pauses: 2
"""


class AdminPort:
    """Answers one request with what it was given, then closes."""

    def __init__(self, answer: bytes) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.toml = f'admin = "127.0.0.1:{self.sock.getsockname()[1]}"'
        self.request = b""
        self.thread = threading.Thread(target=self._serve, args=(answer,))
        self.thread.start()

    def _serve(self, answer: bytes) -> None:
        client, _ = self.sock.accept()
        with client:
            while b"\r\n\r\n" not in self.request:
                self.request += client.recv(1000)
            client.sendall(answer)


@pytest.fixture
def admin_port() -> Iterator[Callable[[bytes], AdminPort]]:
    ports: list[AdminPort] = []

    def start(answer: bytes) -> AdminPort:
        ports.append(AdminPort(answer))
        return ports[-1]

    yield start
    for port in ports:
        port.thread.join()
        port.sock.close()


def test_status_draws_what_the_daemon_says(
    tproxyd: Shown,
    toml: Callable[[str], str],
    admin_port: Callable[[bytes], AdminPort],
) -> None:
    answer = b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n" + json.dumps(SNAPSHOT).encode()
    port = admin_port(answer)
    assert tproxyd("status", "-c", toml(port.toml)) == (0, SCREEN, "")
    assert port.request.startswith(b"GET /status HTTP/1.1\r\n")
    code, out, _ = tproxyd("status", "--json", "-c", toml(admin_port(answer).toml))
    assert (code, json.loads(out)) == (0, SNAPSHOT)
    assert draw(SNAPSHOT) == SCREEN


def test_status_without_a_daemon(tproxyd: Shown, toml: Callable[[str], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    said = (
        f"tproxyd: can't ask the daemon at 127.0.0.1:{port}: {os.strerror(errno.ECONNREFUSED)};"
        " start it with tproxyd run, or name its configuration with -c\n"
    )
    assert tproxyd("status", "-c", toml(f'admin = "127.0.0.1:{port}"')) == (1, "", said)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 404 Not Found\r\n\r\n"])
def test_status_of_something_else(
    answer: bytes,
    tproxyd: Shown,
    toml: Callable[[str], str],
    admin_port: Callable[[bytes], AdminPort],
) -> None:
    code, out, err = tproxyd("status", "-c", toml(admin_port(answer).toml))
    assert (code, out) == (1, "")
    said = answer.decode().partition("\r\n")[0] or "nothing"
    assert f": it answered {said}; is that tproxyd?" in err


def test_status_without_an_admin_endpoint(tproxyd: Shown, toml: Callable[[str], str]) -> None:
    said = (
        'tproxyd: can\'t ask the daemon: admin = "" in its configuration;'
        ' set admin = "127.0.0.1:9133"\n'
    )
    assert tproxyd("status", "-c", toml('admin = ""')) == (1, "", said)


# As a process -------------------------------------------------------------------------------------


def test_check_loads_nothing_heavy(toml: Callable[[str], str]) -> None:
    code = (
        "import sys; from tproxyd.cli import main; main(['check', '-c', sys.argv[1]]);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, toml("")], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"asyncio", "uvloop", "prometheus_client", "ctypes", "logging"}


def test_a_reader_that_leaves_early_is_no_error(toml: Callable[[str], str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tproxyd", "check", "-c", toml("")],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
