"""The command line: exit codes, what it says, and what it never loads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tproxyd import __version__, cli, configsource, doctor
from tproxyd.config import Config
from tproxyd.doctor import Check, Verdict
from tproxyd.errors import KernelError
from tproxyd.kernel import reconcile
from tproxyd.proc import supervisor
from tproxyd.proc.run_command import Command

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
    one = '[[listener]]\nname = "a"\nport = 1\nintercept.ports = [80]\n'
    two = f'{one}[[listener]]\nname = "b"\nport = 2\n'
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


@pytest.mark.parametrize(
    "verb",
    ["run", "install", "reload", "upgrade", "rules", "check", "doctor", "status"],
)
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
    monkeypatch.setattr(configsource, "DEFAULT_FILE", "/nonexistent/tproxyd.toml")
    assert tproxyd("check") == (
        0,
        "built-in defaults: fine: 1 listener: inbound on port 15006\n",
        "tproxyd: no /nonexistent/tproxyd.toml: using the built-in defaults\n",
    )


def test_the_default_file_is_used_and_its_errors_count(
    tproxyd: Shown, toml: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configsource, "DEFAULT_FILE", toml("workers = 1"))
    assert tproxyd("check")[0] == 0
    monkeypatch.setattr(configsource, "DEFAULT_FILE", toml("workers = -1"))
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


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (("chek",), "; did you mean check?"),
        (("rules", "--backend", "ntf"), "; did you mean nft?"),
        (("check", "bad.toml"), "unrecognized arguments: bad.toml; did you mean -c bad.toml?"),
        (("run", "etc/x"), "; did you mean -c etc/x?"),
        (("check", "--file=x.toml"), "unrecognized arguments: --file=x.toml"),
        (("dance",), "'istio-iptables')"),
    ],
)
def test_what_may_have_been_meant(
    argv: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert capsys.readouterr().err.endswith(f"{hint}\n")


def test_exec_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["exec", "--help"])
    out = capsys.readouterr().out
    assert out.startswith(
        "usage: tproxyd exec [-h] [-c FILE] [--user USER[:GROUP]] -- CMD [ARG ...]\n"
    )
    listed = set(re.findall(r"^  (?:-\w, |-\w \w+, )?(--\w+)", out, re.MULTILINE))
    assert listed == {"--help", "--config", "--user"}  # as in the line above


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
    monkeypatch.setattr(cli, "_unserved", lambda _: [])  # other tests have daemons of their own
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

    def serve(
        config: Config,
        *,
        install: bool,
        guard: bool,
        reread: Callable[[], Config],
        origin: Callable[[], str],
        keep_sockets: bool,
    ) -> None:
        assert origin() == toml(Path(origin()).read_text())
        assert (reread(), keep_sockets) == (config, guard)
        served.append((config, install, guard))

    monkeypatch.setattr(supervisor, "serve", serve)
    assert tproxyd("run", "-c", toml("table = 7")) == (0, "", "")
    assert tproxyd("run", "--install", "-c", toml("table = 8")) == (0, "", "")
    assert tproxyd("run", "--guard", "--keep-sockets", "-c", toml("table = 9")) == (0, "", "")
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
    def serve(config: Config, *, install: bool, command: Command, **_: object) -> None:
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

    def refuse(_: Config, *, install: bool, command: Command, **__: object) -> None:
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
    monkeypatch.setattr(doctor, "run", lambda *_: CHECKS)
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
    monkeypatch.setattr(doctor, "run", lambda *_: CHECKS[:2])
    assert tproxyd("doctor", "-c", toml(""))[0] == 0


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
