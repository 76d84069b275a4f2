"""Reloads and upgrades that fail late, or come at a bad moment: what was before goes on, whole."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import Config, Listener, Log
from tproxyd.errors import KernelError
from tproxyd.flow import listen
from tproxyd.proc import counters, generation, picture, reconciler, upgrade
from tproxyd.proc.picture import Address, Entry, Facts, Health
from tproxyd.proc.reconciler import Kernel, Reconciler, Report, Verb
from tproxyd.proc.sockets import Sockets
from tproxyd.proc.worker import WorkerSpec
from tproxyd.tests.daemons import (
    Daemon,
    OnLoopback,
    Quiet,
    free_port,
    leaves_only_when_cut,
    say,
    worker,
)
from tproxyd.tests.programs import Echo, Program, echoes
from tproxyd.tests.talker import PATIENCE_S, patience
from tproxyd.tests.test_reload import text
from tproxyd.tests.test_upgrade import Upgradable, assert_goes_on


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons are forked from here, with these."""
    monkeypatch.setattr(generation, "GRACE_S", 0.1)
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as echo:
        yield echo


# An upgrade ---------------------------------------------------------------------------------------

# The new process fails when everything has been let go for it.
LATE = """
from tproxyd.proc import supervisor
from tproxyd.errors import KernelError
async def refuse(self):
    raise KernelError("do this", "it is forbidden", "ask somebody")
supervisor.Supervisor._keep_kernel = refuse
"""


def test_a_successor_that_fails_late_leaves_what_it_was_lent(echo: Echo, tmp_path: Path) -> None:
    """Listening sockets, kernel state, and the word with systemd."""
    notify = str(tmp_path / "notify")
    (tmp_path / "code").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "code"), "NOTIFY_SOCKET": notify}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(notify)
        with Upgradable(text(echo), environment=environment) as program:
            program.wait_ready()
            before = program.processes()
            program.next.write_text(LATE)
            # More workers than before: their listening sockets were never lent.
            program.write(text(echo, workers=5))
            program.signal(signal.SIGUSR2)
            line = program.wait_line("can't upgrade: the new process can't do this")
            assert "it is forbidden" in line
            waiting = patience("the new process to have done what it does at its end")
            while program.processes() - before:
                next(waiting)
            assert_goes_on(program)
            for _ in range(50):
                with program.connect() as sock:
                    assert echoes(sock)
            told = [words for words, _ in said_to(manager)]
    assert not [each for each in told if b"STOPPING" in each or b"MAINPID" in each]


def test_sockets_that_a_failed_change_opened_are_not_left_with_systemd(
    echo: Echo, tmp_path: Path
) -> None:
    notify = str(tmp_path / "notify")
    (tmp_path / "code").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "code"), "NOTIFY_SOCKET": notify}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(notify)
        with Upgradable(text(echo), "--keep-sockets", environment=environment) as program:
            program.wait_ready()
            program.next.write_text(LATE)
            program.write(text(echo, workers=5))
            program.signal(signal.SIGUSR2)
            program.wait_line("can't upgrade")
            kept = sum(files for _, files in said_to(manager))
    assert kept == 2


def said_to(manager: socket.socket) -> Iterator[tuple[bytes, int]]:
    """What it has heard so far: words, and how many files came with them."""
    manager.setblocking(False)
    while True:
        try:
            words, files, _, _ = socket.recv_fds(manager, 4096, 300)
        except BlockingIOError:
            return
        for fd in files:
            os.close(fd)
        yield words, len(files)


def test_one_that_hangs_when_it_is_dismissed_is_killed(echo: Echo, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from tproxyd.proc import upgrade\n"
        "upgrade.DISMISSED_S, upgrade.UPGRADE_TIMEOUT_S = 0.1, 1\n"
    )
    with Upgradable(text(echo), environment={"PYTHONPATH": str(tmp_path)}) as program:
        program.wait_ready()
        program.next.write_text(
            "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "while True: signal.pause()\n"
        )
        program.signal(signal.SIGUSR2)
        pid = int(program.wait_line(r"the new process is \d+").split()[-1])
        program.wait_line("is not done after 1 s")
        waiting = patience("it to be gone")
        while Path(f"/proc/{pid}").exists():
            next(waiting)
        assert_goes_on(program)


def test_the_old_process_takes_no_more_orders(echo: Echo, tmp_path: Path) -> None:
    with Upgradable(text(echo), environment={"PYTHONPATH": str(tmp_path)}) as program:
        program.wait_ready()
        with program.connect() as held:
            assert echoes(held)
            program.signal(signal.SIGUSR2)
            program.wait_line("serves from here on")
            program.signal(signal.SIGHUP)
            program.signal(signal.SIGUSR2)
            status = program.status()
            assert echoes(held)
        assert program.process.wait(10) == 0
        assert not [line for line in program.lines if "reloaded" in line]
        program.signal(signal.SIGTERM, status["pid"])
        assert not [line for line in program.rest() if "reloaded" in line]


# A reload -----------------------------------------------------------------------------------------


def again(**changes: object) -> Callable[[Config], Config]:
    """What a reload reads: this, and a mark for the stand-ins below."""
    return lambda config: dataclasses.replace(config, drain_timeout_s=7, **changes)  # type: ignore[arg-type]


def is_second(config: Config) -> bool:
    return config.drain_timeout_s == 7


def fails_second(spec: WorkerSpec) -> None:
    if is_second(spec.config):
        spec.control.send(b"failed: can't do this: it is forbidden; ask somebody\n")
        sys.exit(3)
    worker(spec)


def test_a_worker_that_cannot_start_says_why_at_once() -> None:
    with Daemon(fails_second, reread=again()) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGHUP)
        daemon.wait_line("reload: can't start worker 0: can't do this: it is forbidden; ask")
        daemon.wait_line("the configuration of before goes on")
        assert daemon.ask() == daemon.status()["workers"][0]["pid"]


def test_more_workers_that_cannot_start_have_met_no_client() -> None:
    """What only they would have listened with has never listened."""
    ended: Counter[str] = Counter()

    def come(daemon: Daemon) -> None:
        try:
            ended["served" if daemon.ask() else "?"] += 1
        except (OSError, ValueError) as error:
            ended[type(error).__name__] += 1

    with Daemon(fails_second, reread=again(workers=4)) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGHUP)
        threads = [threading.Thread(target=come, args=(daemon,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        daemon.wait_line("the configuration of before goes on")
        for thread in threads:
            thread.join()
    assert ended == {"served": 40}


def moves_slowly(config: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        if verb is Verb.INSTALL and is_second(config):
            say("moving")
            wait_for_gate()
        return Report((), (), (), True, "x")

    return kernel


def wait_for_gate() -> None:
    """Until the test lets go: the gate is a file that it removes."""
    waiting = patience("the gate to open")
    while os.path.exists(GATE):
        next(waiting)


GATE = f"/tmp/tproxyd-test-gate-{os.getpid()}"
BEGUN = f"{GATE}-begun"


@pytest.fixture
def gate() -> Iterator[Path]:
    path = Path(GATE)
    path.touch()
    yield path
    for each in (GATE, BEGUN):
        Path(each).unlink(missing_ok=True)


def test_a_generation_for_which_there_is_no_memory_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()

    def with_memory_for_one() -> None:
        page, rest = counters.Page, iter([True])

        def one(*args: object) -> counters.Page:
            if next(rest, False):
                return page(*args)  # type: ignore[arg-type]
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        counters.Page = one  # type: ignore[misc, assignment]

    log = Log(access=str(path))
    with Daemon(before=with_memory_for_one, reread=again(), log=log) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGHUP)
        daemon.wait_line("reload: can't reload: Cannot allocate memory")
        daemon.wait_line("the configuration of before goes on")
        files = [os.path.realpath(each) for each in Path(f"/proc/{daemon.pid}/fd").iterdir()]
        assert files.count(str(path)) == 1


def test_a_new_worker_that_dies_before_all_is_done_is_replaced(gate: Path) -> None:
    with Daemon(load=moves_slowly, reread=again(), install=True) as daemon:
        daemon.wait_ready()
        old = set(daemon.children())
        daemon.signal(signal.SIGHUP)
        daemon.wait_line("moving")
        (new,) = set(daemon.children()) - old
        os.kill(new, signal.SIGKILL)
        daemon.wait_line("worker 0 was killed by SIGKILL; the next one starts")
        daemon.wait_line("worker 0 is ready again")
        gate.unlink()
        daemon.wait_line("reloaded in")
        assert daemon.ask() not in (new, *old)


def test_a_stop_in_the_middle_is_answered_by_what_was_asked(gate: Path) -> None:
    """A request that was given up leaves its answer to nobody."""

    async def scene() -> list[tuple[str, ...]]:
        kernel = Reconciler(Config(), tells_what_it_did, Quiet)
        await kernel.install()
        moving = asyncio.ensure_future(kernel.move(Config(workers=3, drain_timeout_s=7)))
        while not os.path.exists(BEGUN):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0)
        moving.cancel()
        await asyncio.wait([moving])
        os.unlink(gate)
        did = [(await kernel.stop_intercepting()).notes, (await kernel.clean()).notes]
        kernel.close()
        return did

    assert asyncio.run(scene()) == [(Verb.STOP_INTERCEPTING,), (Verb.CLEAN,)]


def tells_what_it_did(config: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        if verb is Verb.INSTALL and is_second(config):
            Path(BEGUN).touch()
            wait_for_gate()
        return Report((), (str(verb),), (), True, "x")

    return kernel


def dies_in_the_move(config: Config) -> Kernel:
    def kernel(verb: Verb) -> Report:
        if verb is Verb.INSTALL and is_second(config):
            os._exit(9)
        if verb is Verb.INSTALL:
            say("kernel: the old state")
        return Report((), (), (), True, "x")

    return kernel


def test_a_keeper_that_dies_in_the_move_is_followed_by_one_that_keeps_the_old_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "tproxyd.proc.supervisor.CHECK_EVERY_S", 3600.0
    )  # which would need one, too
    with Daemon(load=dies_in_the_move, reread=again(), install=True) as daemon:
        daemon.wait_line("kernel: the old state")
        daemon.wait_ready()
        daemon.signal(signal.SIGHUP)
        daemon.wait_line("the process that holds the kernel state ended with exit status 9|goes on")
        daemon.wait_line("kernel: the old state")


def test_no_reload_once_there_is_to_be_a_stop() -> None:
    with Daemon(leaves_only_when_cut, reread=again(), install=True, drain_timeout_s=60) as daemon:
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        daemon.wait_line("hears drain")
        daemon.signal(signal.SIGHUP)
        assert daemon.get("/livez") == (200, "ok\n")  # that was heard
        daemon.signal(signal.SIGTERM)
        said = daemon.rest()
        assert daemon.wait() == 0
        assert not [line for line in said if "reload" in line or "kernel: install" in line]


def test_a_worker_that_cannot_be_forked_for_want_of_files_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not at once, however long the one before it has lived."""
    monkeypatch.setattr(generation, "SOUND_S", 0.03)

    def without_files() -> None:
        real = socket.socketpair
        calls = iter(range(1000))

        def socketpair(*args: int) -> tuple[socket.socket, socket.socket]:
            if args and next(calls) in (1, 2):  # after the first worker
                raise OSError(23, "Too many open files in system")
            return real(*args)

        socket.socketpair = socketpair  # type: ignore[assignment]

    with Daemon(before=without_files) as daemon:
        daemon.wait_ready()
        sound = time.monotonic() + 2 * generation.SOUND_S
        while time.monotonic() < sound:
            daemon.get("/livez")
        os.kill(daemon.ask(), signal.SIGKILL)
        daemon.wait_line("the next one starts now")
        why = "worker 0 can't be forked: Too many open files in system; the next one starts in"
        daemon.wait_line(f"{why} 0.1 s")
        daemon.wait_line(f"{why} 0.2 s")
        daemon.wait_line("worker 0 is ready again")


def test_a_successor_for_which_there_are_no_files_leaves_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", pipe)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KernelError, match="too many open files; allow more processes, files"):
        upgrade.Successor([])
    assert os.listdir("/proc/self/fd") == before


# What a reload takes along ------------------------------------------------------------------------


def test_a_lo_that_is_down_takes_no_listener_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks as if there were no IPv6."""
    config = Config(listeners=(Listener(name="web", bind="*", port=free_port()),))
    sockets = Sockets(listen)
    sockets.assign(config, 1)
    sockets.commit()
    sockets.settle()
    both = sockets.all()
    monkeypatch.setattr(listen, "has_ipv6", lambda: False)
    assert len(sockets.assign(config, 1)[0]) == 2
    sockets.go_back()
    assert sockets.all() == both
    sockets.assign(config, 1)
    sockets.commit()
    sockets.settle()
    assert sockets.all() == both
    sockets.close()


def test_what_is_opened_listens_only_when_somebody_accepts() -> None:
    config = Config(listeners=(Listener(name="web", bind="127.0.0.1", port=free_port()),))
    sockets = Sockets(listen)
    ((_, sock),) = sockets.assign(config, 1)[0]
    assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    sockets.commit()
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    sockets.settle()
    sockets.assign(config, 3)
    sockets.go_back()
    assert sockets.all() == [sock]
    sockets.close()


def test_a_socket_that_the_kernel_refuses_takes_no_other_along() -> None:
    class Refusing(OnLoopback):
        def open_at(self, config: Config, index: int, where: object) -> socket.socket:
            if index == 1:
                raise KernelError("listen", "it is taken", "take another")
            return super().open_at(config, index, where)  # type: ignore[arg-type]

    config = Config(listeners=(Listener(port=free_port()), Listener(name="b", port=free_port())))
    sockets = Sockets(Refusing())
    with pytest.raises(KernelError, match="it is taken"):
        sockets.assign(config, 2)
    assert sockets.all() == []


def test_upstreams_that_are_known_stay_known() -> None:
    """A name that can't be resolved just then keeps its addresses, and no count goes back."""
    where = Endpoint("app.example", 80)
    address = Address(Endpoint("10.0.0.5", 80), Health.DOWN, "refused")
    listener = dataclasses.replace(
        Listener(name="web", bind="*", upstream=(where,)),
        health_check=dataclasses.replace(Listener().health_check, interval_s=1.0),
    )
    before = Config(listeners=(Listener(name="other"), listener))
    facts = Facts({1: (Entry(where, (address,)),)}, {1: 3}, complete=True)
    after = picture.initial(Config(listeners=(listener,)), (before, facts))
    assert after.entries == {0: (Entry(where, (address,)),)}
    assert after.failures == {0: 3}
    # Where nothing is checked any more, nothing is down.
    unchecked = dataclasses.replace(listener, health_check=Listener().health_check)
    (entry,) = picture.initial(Config(listeners=(unchecked,)), (before, facts)).entries[0]
    assert entry.addresses == (Address(address.where),)


def test_no_file_is_left_after_many_changes(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()

        def files() -> int:
            return len(os.listdir(f"/proc/{program.pid}/fd"))

        def settled() -> bool:
            return len(program.status()["workers"]) == 2

        before = files()
        for i in range(9):
            wrong = text(echo).replace("upstream =", "upstreem =")
            program.write(wrong if i % 3 == 2 else text(echo, workers=1 + i % 2))
            program.signal(signal.SIGHUP)
            program.wait_line("reloaded in|goes on")
        program.write(text(echo))
        program.signal(signal.SIGHUP)
        program.wait_line("reloaded in")
        deadline = time.monotonic() + PATIENCE_S
        while not settled() or files() > before:
            assert time.monotonic() < deadline, (files(), before)
