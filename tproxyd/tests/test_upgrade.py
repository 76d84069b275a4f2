"""The four promises of an upgrade (proc/upgrade.py), each broken by a program that fails its part.

The new program is what the old one was started as; a package in front of it on PYTHONPATH, read by
the new process only, stands for a version that behaves otherwise.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tproxyd import child
from tproxyd.errors import KernelError
from tproxyd.proc import systemd
from tproxyd.proc import upgrade as upgrading
from tproxyd.tests.programs import ROOT, Echo, Program, echoes
from tproxyd.tests.talker import PATIENCE_S, patience
from tproxyd.tests.test_reload import text


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as echo:
        yield echo


class Upgradable(Program):
    """Its next process begins with the Python code in `self.next`, if there is any."""

    def __enter__(self) -> Upgradable:
        super().__enter__()
        return self

    @property
    def next(self) -> Path:
        return Path(self._environment["PYTHONPATH"], "sitecustomize.py")


@pytest.fixture
def program(echo: Echo, tmp_path: Path) -> Iterator[Upgradable]:
    with Upgradable(text(echo), environment={"PYTHONPATH": str(tmp_path)}) as program:
        program.wait_ready()
        yield program


def upgrade(program: Program) -> int:
    """Start one; the pid of the new process once it serves."""
    program.signal(signal.SIGUSR2)
    line = program.wait_line(r"process \d+ serves from here on")
    (pid,) = re.findall(r"process (\d+)", line)
    return int(pid)


def test_the_new_process_is_nobodys_child(program: Upgradable) -> None:
    """systemd takes it for its own, and hears of its end, only as a child of init."""
    with program.connect() as sock:
        assert echoes(sock)  # so that the old one has something to wait for
        parent = parent_of(upgrade(program))
        assert exists(program.pid)
        assert os.getsid(parent) != os.getsid(program.pid)  # no process of ours at all


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (parent,) = map(int, re.findall(r"^PPid:\s*(\d+)$", status, re.MULTILINE))
    return parent


def test_the_old_process_holds_nothing_of_the_new_ones(program: Upgradable) -> None:
    """When the new one ends while the old one still drains, its ports are free."""
    with program.connect() as sock:
        assert echoes(sock)
        new = upgrade(program)
        program.signal(signal.SIGKILL, new)
        for port in (program.port, program.admin_port):
            deadline = time.monotonic() + PATIENCE_S
            while not is_free(port):
                assert time.monotonic() < deadline, f"port {port} is still taken"
        assert exists(program.pid)
        assert echoes(sock)


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["python3", "-m", "tproxyd", "run"], ("/py", ["python3", "-m", "tproxyd", "run"])),
        (["python3", "/etc/passwd", "run"], ("/py", ["python3", "/etc/passwd", "run"])),
        (["python3", "/bin/sh", "run"], ("/bin/sh", ["/bin/sh", "run"])),
    ],
)
def test_a_script_is_run_by_its_own_first_line(
    argv: list[str], what: tuple[str, list[str]]
) -> None:
    """A new version may have another interpreter."""
    assert upgrading.program("/py", argv) == what


def test_a_reload_names_the_file_and_takes_no_other(program: Upgradable, tmp_path: Path) -> None:
    assert command("reload", program).stdout.endswith(f" ms from {program.file}\n")
    other = tmp_path / "other.toml"
    other.write_text(f'admin = "127.0.0.1:{program.admin_port}"\nworkers = "wrong"\n')
    done = command("reload", program, other)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{other}:\n  was not read: the daemon that runs reads {program.file}\n" in done.stderr
    assert program.status()["reload"]["done"] == 1
    other.unlink()
    other.symlink_to(program.file)
    assert command("reload", program, other).returncode == 0


@pytest.mark.parametrize("verb", ["reload", "upgrade"])
def test_by_command(program: Upgradable, verb: str) -> None:
    done = command(verb, program)
    assert (done.returncode, done.stderr) == (0, "")
    said = {"reload": "reloaded in ", "upgrade": "process "}[verb]
    assert done.stdout.startswith(said)
    assert (program.status()["pid"] == program.pid) == (verb == "reload")


def test_a_command_that_fails_says_why(program: Upgradable, echo: Echo) -> None:
    program.write(text(echo) + "what = 1\n")
    done = command("reload", program)
    assert (done.returncode, done.stdout) == (2, "")
    assert "what: unknown key" in done.stderr
    assert "what: unknown key" in program.status()["reload"]["error"]
    program.write(text(echo))
    program.next.write_text("import os; os._exit(9)")
    # Not the command itself, which is a Python program, too.
    done = command("upgrade", program, PYTHONPATH="")
    assert (done.returncode, done.stdout) == (3, "")
    assert "can't upgrade: the new process ended with exit status 9" in done.stderr


def test_a_stop_answers_who_waits_for_a_change(program: Upgradable) -> None:
    gate = program.scratch / "gate"
    os.mkfifo(gate)
    program.next.write_text(f"open({str(gate)!r}).read()\n")
    asking = start_command("upgrade", program, PYTHONPATH="")
    program.wait_line(r"upgrade: the new process is \d+")
    with gate.open("w"):
        program.signal(signal.SIGTERM)
        _, said = asking.communicate(timeout=10)
    assert asking.returncode == 3
    assert "can't upgrade: the daemon is stopping" in said


def start_command(
    verb: str, program: Program, file: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tproxyd", verb, "-c", str(file or program.file)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(
    verb: str, program: Program, file: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    asking = start_command(verb, program, file, **environment)
    out, err = asking.communicate(timeout=30)
    return subprocess.CompletedProcess(asking.args, asking.returncode, out, err)


def exists(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_the_new_process_serves_and_the_old_one_ends(program: Upgradable) -> None:
    """Promise 1."""
    with program.connect() as old:
        assert echoes(old)
        new = upgrade(program)
        assert new != program.pid
        status = program.status()
        assert (status["pid"], status["ready"]) == (new, True)
        assert echoes(old)  # the old one drains
        assert exists(program.pid)
        for _ in patience("the old workers to hear that they retire"):
            with program.connect() as sock:
                assert echoes(sock)
                pids = [each["pid"] for each in program.status()["workers"] if each["active"]]
                if len(pids) == 1:
                    break
    assert program.process.wait(10) == 0
    program.signal(signal.SIGTERM, new)
    program.rest()


def test_time_to_prepare(program: Upgradable) -> None:
    """Promise 2: as long as the new one is not ready, the old one serves."""
    gate = program.scratch / "gate"
    os.mkfifo(gate)
    program.next.write_text(f"open({str(gate)!r}).read()\n")
    program.signal(signal.SIGUSR2)
    program.wait_line(r"upgrade: the new process is \d+")
    with gate.open("w"):  # it has begun
        with program.connect() as sock:
            assert echoes(sock)
        assert program.status()["pid"] == program.pid
        assert program.get("/readyz")[0] == 200
    program.wait_line("serves from here on")


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os._exit(9)", "ended with exit status 9"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
    ],
)
def test_a_crash_at_the_start_does_no_harm(program: Upgradable, code: str, how: str) -> None:
    """Promise 3."""
    program.next.write_text(code)
    program.signal(signal.SIGUSR2)
    line = program.wait_line("can't upgrade")
    assert f"the new process {how}" in line
    assert "the old process goes on" in line
    assert_goes_on(program)


def test_a_configuration_that_is_wrong_by_now_does_no_harm(program: Upgradable, echo: Echo) -> None:
    """Promise 3."""
    program.write(text(echo) + "what = 1\n")
    program.signal(signal.SIGUSR2)
    program.wait_line("what: unknown key")
    program.wait_line("can't upgrade: the new process ended with exit status 2")
    assert_goes_on(program)


def test_a_crash_when_all_is_let_go_does_no_harm(program: Upgradable) -> None:
    """Promise 3, at its worst moment: the old one has let go of its admin endpoint already."""
    program.next.write_text(
        "from tproxyd.proc import upgrade\n"
        "import os\n"
        "upgrade.Inheritance.settle = lambda self: os._exit(9)\n"
    )
    program.signal(signal.SIGUSR2)
    program.wait_line("can't upgrade: the new process ended with exit status 9")
    assert_goes_on(program)


AT_ITS_START = "open({gate!r}).read()\n"
# When the old process has let go of everything.
AT_ITS_END = """
from tproxyd.proc import supervisor
async def wait(self):
    open({gate!r}).read()
supervisor.Supervisor._keep_kernel = wait
"""


@pytest.mark.parametrize("when", [AT_ITS_START, AT_ITS_END])
def test_the_old_process_dies_and_the_new_one_serves(program: Upgradable, when: str) -> None:
    """As nobody's child: what stood between the two is gone as well."""
    new = killed_in_the_middle(program, when)
    program.wait_line(r"ready in \d+ ms")
    status = program.status()
    assert (status["pid"], status["ready"]) == (new, True)
    waiting = patience("the new process to be nobody's child")
    while parent_of(new) in program.processes():
        next(waiting)
    with program.connect() as sock:
        assert echoes(sock)


@pytest.mark.parametrize("when", [AT_ITS_START, AT_ITS_END])
def test_the_old_process_dies_and_a_service_manager_starts_another(
    echo: Echo, tmp_path: Path, when: str
) -> None:
    """Which finds the place free."""
    environment = {"PYTHONPATH": str(tmp_path), "NOTIFY_SOCKET": str(tmp_path / "notify")}
    with Upgradable(text(echo), environment=environment) as program:
        program.wait_ready()
        killed_in_the_middle(program, when)
        said = program.rest()  # until all are gone
    assert "can't take over: the process that is to be replaced is gone" in said[-1]


def killed_in_the_middle(program: Upgradable, when: str) -> int:
    """The pid of the new process, which goes on when there is no old one any more."""
    gate = program.scratch / "gate"
    os.mkfifo(gate)
    program.next.write_text(when.format(gate=str(gate)))
    program.signal(signal.SIGUSR2)
    new = int(program.wait_line(r"upgrade: the new process is \d+").split()[-1])
    with gate.open("w"):
        program.signal(signal.SIGKILL)
        program.process.wait()
    return new


# The time is over in the moment when the new process says that it serves.
TOO_LATE = """
from tproxyd.proc import upgrade
takes_over = upgrade.Successor.takes_over
async def too_late(self):
    await takes_over(self)
    raise TimeoutError
upgrade.Successor.takes_over = too_late
"""


def test_one_that_is_ready_too_late_leaves_without_a_trace(echo: Echo, tmp_path: Path) -> None:
    """Promise 3."""
    notify = str(tmp_path / "notify")
    environment = {"PYTHONPATH": str(tmp_path), "NOTIFY_SOCKET": notify}
    (tmp_path / "sitecustomize.py").write_text(TOO_LATE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(notify)
        manager.settimeout(PATIENCE_S)
        with Upgradable(text(echo), environment=environment) as program:
            program.wait_ready()
            before = program.processes()
            program.next.write_text("")
            program.signal(signal.SIGUSR2)
            program.wait_line("can't upgrade: the new process is not done after 30 s")
            waiting = patience("the new process to be gone")
            while program.processes() - before:
                next(waiting)
            assert_goes_on(program)
            program.signal(signal.SIGKILL)
            told = iter(lambda: manager.recv(1000), b"READY=1\nSTATUS=Serving")
            assert list(told) == []
            manager.setblocking(False)
            with pytest.raises(BlockingIOError):
                manager.recv(1000)


def test_a_new_process_that_cannot_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one that is to stand between: its pid is not that of the new process."""
    monkeypatch.setattr(child, "fork", lambda _body, _keep: 4711)
    with pytest.raises(KernelError, match="start the new process: it can't be forked; allow more"):
        upgrading.Successor([])


def test_one_that_says_why_it_cannot(program: Upgradable, echo: Echo) -> None:
    """Promise 3."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        more = '[[listener]]\nname = "more"\nbind = "127.0.0.1"\n'
        more += f'port = {taken}\nupstream = ["127.0.0.1:{echo.port}"]\n'
        program.write(text(echo) + more)
        program.signal(signal.SIGUSR2)
        program.wait_line(f"can't upgrade: the new process can't listen on 127.0.0.1:{taken}")
    assert_goes_on(program)


def test_one_at_a_time(program: Upgradable) -> None:
    """Promise 4: a second one waits until the first has come to nothing."""
    gate = program.scratch / "gate"
    os.mkfifo(gate)
    program.next.write_text(f"open({str(gate)!r}).read()\nimport os; os._exit(9)\n")
    program.signal(signal.SIGUSR2)
    first = program.wait_line(r"upgrade: the new process is \d+")
    program.signal(signal.SIGUSR2)
    program.signal(signal.SIGHUP)
    with gate.open("w"):
        assert program.get("/readyz")[0] == 200
        assert not [line for line in program.lines if "reloaded" in line]
        program.next.write_text("")
    program.wait_line("can't upgrade: the new process ended with exit status 9")
    second = program.wait_line(r"upgrade: the new process is \d+")
    assert first != second
    program.wait_line("serves from here on")


def test_again_and_again(program: Upgradable, echo: Echo) -> None:
    pid = program.pid
    for workers in (3, 1, 2):
        program.write(text(echo, workers=workers))
        program.signal(signal.SIGUSR2, pid)
        line = program.wait_line(r"process \d+ serves from here on")
        pid = int(re.findall(r"process (\d+)", line)[0])
        assert program.status()["pid"] == pid
        assert len(program.status()["workers"]) == workers
        for _ in range(20):
            with program.connect() as sock:
                assert echoes(sock)


def test_a_stop_in_the_middle_is_a_stop_of_both(program: Upgradable) -> None:
    gate = program.scratch / "gate"
    os.mkfifo(gate)
    program.next.write_text(f"open({str(gate)!r}).read()\n")
    program.signal(signal.SIGUSR2)
    program.wait_line(r"upgrade: the new process is \d+")
    with gate.open("w"):
        program.signal(signal.SIGTERM)
        program.rest()
    assert program.process.wait() == 0


def assert_goes_on(program: Program) -> None:
    """With everything that it had."""
    assert program.status()["pid"] == program.pid
    assert program.get("/readyz")[0] == 200
    for _ in range(20):
        with program.connect() as sock:
            assert echoes(sock)


@pytest.mark.parametrize("end", [signal.SIGUSR2, signal.SIGTERM])
def test_who_drains_follows_its_access_log(echo: Echo, tmp_path: Path, end: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from tproxyd.proc import accesslog\naccesslog.FOLLOW_EVERY_S = 0.02\n"
    )
    path = tmp_path / "access.log"
    config = text(echo, workers=1).replace('access = ""', f'access = "{path}"')
    with Upgradable(config, environment={"PYTHONPATH": str(tmp_path)}) as program:
        program.wait_ready()
        (worker,) = (each["pid"] for each in program.status()["workers"])
        with program.connect() as held:
            assert echoes(held)
            program.signal(end)
            program.wait_line("serves from here on|stopping")
            path.rename(tmp_path / "rotated")
            waiting = patience("the old worker to have the new file")
            while str(path) not in files_of(worker):
                next(waiting)
        assert program.process.wait(PATIENCE_S) == 0
    assert len(path.read_text().splitlines()) == 1
    assert (tmp_path / "rotated").read_text() == ""


def files_of(pid: int) -> set[str]:
    return {os.path.realpath(each) for each in Path(f"/proc/{pid}/fd").iterdir()}


# Sockets of systemd's keeping ---------------------------------------------------------------------


def test_a_restart_finds_the_sockets_that_systemd_kept(echo: Echo, tmp_path: Path) -> None:
    """What waits in a queue while there is no process is served by the next."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(10)
        environment = {"NOTIFY_SOCKET": path}
        with Program(text(echo), "--keep-sockets", environment=environment) as first:
            kept: list[int] = []
            while True:
                words, files, _, _ = socket.recv_fds(manager, 4096, 300)
                kept += files
                if b"READY=1" in words:
                    break
                assert words.startswith(b"FDSTORE=1\nFDNAME=127.0.0.1-")
            assert len(kept) == 2  # one a worker
            with first.connect() as open_one:
                assert echoes(open_one)
                first.signal(signal.SIGTERM)
                assert first.process.wait(10) == 0
                with first.connect() as waiting:  # there is nobody now
                    waiting.sendall(b"anybody?")
                    # Whoever was busy with a connection still is.
                    assert echoes(open_one)
                    first.again(kept)
                    first.wait_line(r"ready in \d+ ms")
                    assert waiting.recv(8) == b"anybody?"


def test_without_systemd_there_is_nobody_to_keep_them(echo: Echo) -> None:
    with Program(text(echo), "--keep-sockets", environment={"NOTIFY_SOCKET": ""}) as program:
        assert "NOTIFY_SOCKET is not set" in program.rest()[-1]
        assert program.process.wait() == 3


def test_what_is_no_socket_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "3")
    assert systemd.inherited() == []
    assert "LISTEN_FDS" not in os.environ


def test_a_copy_of_the_admin_socket_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether accept waits is a property of the open file, which the predecessor has, too."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        given = socket.socket(fileno=os.dup(listening.fileno()))
        monkeypatch.setattr(systemd, "inherited", lambda: [(upgrading.ADMIN, given)])
        admin = upgrading.Inheritance().admin
        assert admin is not None
        with admin, admin.dup():
            assert not os.get_blocking(listening.fileno())
