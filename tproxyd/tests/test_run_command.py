"""`tproxyd exec`: when CMD starts, what it is given and what not, its signals and its exit code."""

from __future__ import annotations

import ctypes
import os
import pty
import pwd
import re
import resource
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tproxyd.config import Config
from tproxyd.errors import KernelError
from tproxyd.linux import CAP_SETGID
from tproxyd.proc import generation, reconciler, run_command, startup
from tproxyd.proc.reconciler import Kernel, Report, Verb
from tproxyd.proc.run_command import Command, User, user
from tproxyd.tests.daemons import (
    PR_SET_CHILD_SUBREAPER,
    Daemon,
    crashes_at_start,
    ignores_drain,
    never_ready,
    refuses_install,
    tells_verbs,
)
from tproxyd.tests.talker import PATIENCE_S

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons are forked from here, with these."""
    monkeypatch.setattr(generation, "GRACE_S", 0.1)
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)


def shell(script: str) -> tuple[str, ...]:
    """CMD; what it says is to go to stderr, which is what a test reads."""
    return ("sh", "-c", f"exec >&2; {script}")


def waits(script: str = "") -> tuple[str, ...]:
    """CMD that says so and then waits for signals.

    In short naps: a signal that comes just before a shell's read or wait begins is heard at its
    end only.
    """
    return shell(f"{script} echo CMD waits; while :; do sleep 0.02; done")


# Its life -----------------------------------------------------------------------------------------


def test_no_signal_waits_for_it() -> None:
    """As those of the daemon do, until it has handlers."""
    argv = shell("grep SigBlk /proc/self/status")
    with Daemon(argv=argv, before=startup.hold_signals) as daemon:
        daemon.wait_line(r"^SigBlk:\s0{16}$")


def test_it_starts_when_everything_stands_and_ends_everything() -> None:
    with Daemon(install=True, workers=2, argv=shell("echo CMD runs; exit 5")) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 5
    order = [
        "kernel: install",
        r"tproxyd: ready in \d+ ms",
        r"tproxyd: started sh, pid \d+",
        "CMD runs",
        "tproxyd: sh ended with exit status 5: stopping",
        "kernel: stop intercepting",
        "worker 0 hears drain",
        "kernel: clean",
        "tproxyd: stopped",
    ]
    places = [next(i for i, line in enumerate(said) if re.fullmatch(each, line)) for each in order]
    assert places[3:] == sorted(places[3:])
    assert places[:2] == sorted(places[:2])
    assert places[1] < places[3]


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137), ("kill -37 $$", 128 + 37)],
)
def test_its_exit_code_is_ours(script: str, code: int) -> None:
    with Daemon(argv=shell(script)) as daemon:
        said = daemon.rest()
        assert daemon.wait() == code
        assert said[-1] == "tproxyd: stopped"


@pytest.mark.parametrize(
    ("argv", "code", "why"),
    [
        (("/no/such",), 127, "can't run /no/such: no such file or directory; is it in"),
        (("no-such-command",), 127, "can't run no-such-command: no such file or directory; "),
        (("/etc/passwd",), 126, "can't run /etc/passwd: permission denied; "),
    ],
)
def test_what_cannot_be_run(argv: tuple[str, ...], code: int, why: str) -> None:
    with Daemon(install=True, argv=argv) as daemon:
        said = daemon.rest()
        assert daemon.wait() == code
        assert [line for line in said if why in line]
        assert "kernel: clean" in said


@pytest.mark.parametrize("failure", [{"entry": crashes_at_start}, {"load": refuses_install}])
def test_it_never_starts_where_the_proxy_cannot(failure: dict[str, Callable[..., None]]) -> None:
    argv = shell("echo CMD runs")
    with Daemon(install=True, argv=argv, **failure) as daemon:  # type: ignore[arg-type]
        said = daemon.rest()
        assert daemon.wait() == 3
        assert "CMD runs" not in said


def test_orphans_it_leaves_are_reaped() -> None:
    """As PID 1 would: the daemon is made the one that inherits them."""

    def subreaper() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

    script = "(sleep 60 & echo left $!) & wait;"
    with Daemon(argv=waits(script), before=subreaper) as daemon:
        orphan = int(daemon.wait_line(r"^left ").split()[-1])
        daemon.wait_line("CMD waits")
        _until(lambda: orphan in daemon.children())
        os.kill(orphan, signal.SIGKILL)
        _until(lambda: orphan not in daemon.children())


def _until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH"])
def test_signals_are_its(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    with Daemon(argv=waits(f"trap 'echo CMD hears {name}; exit 7' {name};")) as daemon:
        daemon.wait_line("CMD waits")
        daemon.signal(number)
        daemon.wait_line(f"CMD hears {name}")
        assert daemon.wait() == 7


def test_one_that_kills_it() -> None:
    with Daemon(argv=waits()) as daemon:
        daemon.wait_line("CMD waits")
        daemon.signal(signal.SIGTERM)
        daemon.wait_line("sh was killed by SIGTERM: stopping")
        assert daemon.wait() == 128 + signal.SIGTERM


def test_while_it_shuts_down_connections_are_served() -> None:
    script = "trap 'echo CMD hears TERM' TERM; trap 'exit 0' USR1;"
    with Daemon(install=True, argv=waits(script)) as daemon:
        daemon.wait_line("CMD waits")
        daemon.signal(signal.SIGTERM)
        daemon.wait_line("CMD hears TERM")
        assert daemon.ask()
        assert daemon.get("/readyz")[0] == 200
        daemon.signal(signal.SIGUSR1)
        assert "kernel: clean" in daemon.rest()
        assert daemon.wait() == 0


def test_before_it_runs_a_signal_is_a_stop() -> None:
    argv = shell("echo CMD runs")
    with Daemon(never_ready, argv=argv, drain_timeout_s=0.01) as daemon:
        daemon.wait_line("admin endpoint")
        daemon.signal(signal.SIGUSR1)
        assert daemon.get("/readyz")[1].startswith("starting")  # it means nothing to us
        daemon.signal(signal.SIGHUP)
        assert "CMD runs" not in daemon.rest()
        assert daemon.wait() == 128 + signal.SIGHUP


def stops_us_while_it_installs(config: Config) -> Kernel:
    kernel = tells_verbs(config)

    def do(verb: Verb) -> Report:
        if verb is Verb.INSTALL:
            os.kill(os.getppid(), signal.SIGTERM)
        return kernel(verb)

    return do


def test_a_stop_while_rules_are_made_is_no_start() -> None:
    argv = shell("echo CMD runs")
    with Daemon(load=stops_us_while_it_installs, install=True, argv=argv) as daemon:
        said = daemon.rest()
        assert daemon.wait() == 128 + signal.SIGTERM
        assert "kernel: clean" in said
        assert "CMD runs" not in said


def test_after_its_end_a_signal_cuts_the_drain_short() -> None:
    with Daemon(ignores_drain, argv=shell("exit 4"), drain_timeout_s=3600.0) as daemon:
        daemon.wait_line("ended with exit status 4: stopping")
        daemon.signal(signal.SIGTERM)
        daemon.wait_line(r"does not end: killed")
        assert daemon.wait() == 4


# What it is given ---------------------------------------------------------------------------------


def status(daemon: Daemon) -> dict[str, str]:
    """/proc/PID/status of a CMD that printed it, up to its last line."""
    daemon.wait_line("nonvoluntary_ctxt_switches")
    pairs = (line.partition(":\t") for line in daemon.lines if ":\t" in line)
    return {name: value.strip() for name, _, value in pairs}


SHOW = ("sh", "-c", "exec cat /proc/self/status >&2")


def test_it_has_no_capability_and_gets_none() -> None:
    """As uid 0 the exec alone would give it all of the bounding set."""
    with Daemon(argv=SHOW) as daemon:
        shown = status(daemon)
        assert {shown[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
        assert shown["NoNewPrivs"] == "1"
        assert daemon.wait() == 0


def test_it_has_signals_and_limits_as_the_daemon_found_them() -> None:
    def before() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup tproxyd exec … &
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with Daemon(argv=SHOW, before=before) as daemon:
        shown = status(daemon)
        assert shown["SigBlk"] == "0" * 16
        assert int(shown["SigIgn"], 16) == 1 << (signal.SIGHUP - 1) | 1 << (signal.SIGINT - 1)
        assert daemon.wait() == 0
    with Daemon(argv=shell("ulimit -Sn"), before=before) as daemon:
        daemon.wait_line("^200$")


def test_it_has_no_file_but_its_three() -> None:
    with Daemon(argv=shell("ls /proc/self/fd; echo listed")) as daemon:
        daemon.wait_line("listed")
        shown = [int(line) for line in daemon.lines if line.isdecimal()]
        assert shown == [0, 1, 2, 3]  # 3 is the directory that is being listed


def test_what_systemd_asked_of_us_is_not_for_it() -> None:
    def before() -> None:
        os.environ.update(NOTIFY_SOCKET="/nowhere", WATCHDOG_USEC="1000000", THEIRS="stays")

    with Daemon(argv=shell("env; echo listed"), before=before) as daemon:
        daemon.wait_line("listed")
        assert "THEIRS=stays" in daemon.lines
        assert not [line for line in daemon.lines if re.match("NOTIFY_|WATCHDOG_", line)]


def test_it_has_the_terminal() -> None:
    """Ctrl-C is typed: CMD hears it once, and from the terminal; the daemon does not."""
    pid, terminal = pty.fork()
    if pid == 0:
        with Daemon(argv=waits("trap 'echo CMD hears INT' INT; trap 'exit 9' QUIT;")) as daemon:
            for line in iter(lambda: daemon.wait_line(""), ""):
                os.write(1, f"{line}\n".encode())
                if "stopped" in line:
                    os._exit(daemon.wait())
    shown = b""
    typed = {b"CMD waits": b"\x03", b"CMD hears INT": b"\x1c"}
    with suppress(OSError):  # EIO: the other side is gone
        while select.select([terminal], (), (), PATIENCE_S)[0]:
            shown += os.read(terminal, 1000)
            for said in [each for each in typed if each in shown]:
                os.write(terminal, typed.pop(said))
    os.close(terminal)  # who is still there is told so by SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, shown.decode()
    assert shown.count(b"CMD hears INT") == 1


# As whom ------------------------------------------------------------------------------------------


def test_users() -> None:
    nobody = pwd.getpwnam("nobody")
    assert user("nobody") == User(nobody.pw_uid, nobody.pw_gid, (nobody.pw_gid,), nobody.pw_dir)
    assert user(str(nobody.pw_uid)) == user("nobody")
    assert user("nobody:0") == User(nobody.pw_uid, 0, (), nobody.pw_dir)
    assert user("nobody:root").gid == 0
    assert user("54321") == User(54321, 54321, (), "/")
    assert user("54321:7") == User(54321, 7, (), "/")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nobdy", 'there is no user "nobdy" here'),
        ("", 'there is no user "" here'),
        ("0:nogroop", 'there is no group "nogroop" here'),
        ("0:", '"0:" names no group'),
        ("4294967295", "is not the number of a user or group"),
    ],
)
def test_nobodies(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        user(text)


@root
def test_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_another(argv: tuple[str, ...], _: None) -> Command:
        return Command(argv, User(54321, 54322, (7, 8), "/tmp"))

    monkeypatch.setattr("tproxyd.tests.daemons.Command", as_another)
    with Daemon(argv=("sh", "-c", "exec >&2; echo $HOME; cat /proc/self/status")) as daemon:
        shown = status(daemon)
        assert daemon.lines.count("/tmp") == 1
        assert shown["Uid"].split() == ["54321"] * 4
        assert shown["Gid"].split() == ["54322"] * 4
        assert shown["Groups"] == "7 8"
        assert {shown[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
        assert daemon.wait() == 0


def test_becoming_another_user_needs_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_command, "capabilities", lambda: frozenset({CAP_SETGID}))
    Command(["x"], User(os.geteuid(), os.getegid(), (), "/")).check()
    with pytest.raises(KernelError, match="can't run x as user 54321: CAP_SETUID missing; give"):
        Command(["/bin/x"], User(54321, 54321, (), "/")).check()


def test_its_name() -> None:
    assert str(Command(["/usr/bin/env", "x"], None)) == "env"
