"""The program with stdin, stdout and stderr as it may find them: closed, full, poor in letters."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from tproxyd.tests.programs import Echo, Program, echoes
from tproxyd.tests.talker import patience
from tproxyd.tests.test_reload import text

# Closed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_daemon_opens_what_came_closed(closed: tuple[int, ...]) -> None:
    """Its number must be nobody else's: the access log would go to the keeper's socket."""
    with Echo() as echo:
        config = text(echo, workers=1).replace('access = ""', 'access = "-"')
        with Program(config, closed=closed) as program:
            for _ in patience("ready"):
                with suppress(ConnectionError):
                    if program.get("/readyz")[0] == 200:
                        break
            processes = program.processes()
            assert len(processes) >= 3  # supervisor, keeper, worker
            for pid in processes:
                for fd in closed:
                    assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
            with program.connect() as sock:
                assert echoes(sock)
            program.signal(signal.SIGTERM)
            assert program.process.wait() == 0


def test_what_is_executed_inherits_them() -> None:
    """A successor, and the command of `tproxyd exec`, do not find them closed again."""
    code = (
        "import os, sys; from tproxyd import stdio; stdio.prepare();"
        "os.execv('/bin/readlink', ['readlink', '/proc/self/fd/0'])"
    )
    argv = [sys.executable, "-c", code]
    assert subprocess.check_output(argv, preexec_fn=lambda: os.close(0)) == b"/dev/null\n"


def test_nothing_is_said_in_the_place_of_a_closed_file(tmp_path: Path) -> None:
    assert check(tmp_path, "", closed=1) == (0, "", "")
    assert check(tmp_path, "workers = -1", closed=2) == (2, "", "")


def check(
    scratch: Path, config: str, *words: str, closed: int | None = None, stdout: int | None = None
) -> tuple[int, str, str]:
    """`tproxyd check` of that, as a process: exit code, stdout, stderr."""
    (scratch / "tproxyd.toml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "tproxyd", "check", "-c", scratch / "tproxyd.toml", *words],
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        preexec_fn=None if closed is None else lambda: os.close(closed),
        text=True,
        check=False,
    )
    return done.returncode, done.stdout or "", done.stderr


# Full ---------------------------------------------------------------------------------------------

LISTENER = '[[listener]]\nname = "x{0}"\nport = {0}\nintercept.ports = [{0}]\n'


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", ()),
        ("".join(LISTENER.format(each) for each in range(1, 1000)), ()),  # more than its buffer
        ("", ("--help",)),
    ],
    ids=["short", "long", "help"],
)
def test_a_full_disk_is_one_sentence(config: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        said = "tproxyd: can't write to stdout: no space left on device; see where it goes\n"
        assert check(tmp_path, config, *words, stdout=full.fileno()) == (1, "", said)


def test_a_stranger_has_made_stdout_nonblocking() -> None:
    """Who shares the open file may have: then it is waited for as if nobody had."""
    code = (
        "import sys; from tproxyd import stdio; stdio.prepare();"
        "print('x' * 300_000); sys.stdout.flush()"
    )
    read, write = os.pipe()
    os.set_blocking(write, False)
    size = fcntl.fcntl(write, fcntl.F_GETPIPE_SZ)
    with subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=write) as process:
        os.close(write)
        for _ in patience("a full pipe"):
            waiting = fcntl.ioctl(read, termios.FIONREAD, bytes(4))
            if int.from_bytes(waiting, sys.byteorder) == size:
                break
        got = b"".join(iter(lambda: os.read(read, 1 << 16), b""))
        os.close(read)
        assert process.wait() == 0
    assert got == b"x" * 300_000 + b"\n"


# Poor in letters ---------------------------------------------------------------------------------


def test_letters_that_stdout_has_not() -> None:
    code = "from tproxyd import stdio; stdio.prepare(); print('naïve → \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (b"na\xefve ? ?\n", b"")
