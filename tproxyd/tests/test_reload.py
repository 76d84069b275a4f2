"""Reload: another configuration on the same sockets, or the old one goes on; nobody notices."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tproxyd.proc.ask import PREFIX, ask
from tproxyd.tests.daemons import free_port
from tproxyd.tests.programs import Echo, Program, echoes
from tproxyd.tests.talker import PATIENCE_S, patience

CONFIG = """
admin = "127.0.0.1:ADMIN"
workers = {workers}
drain_timeout_s = {drain}
[log]
access = ""
[[listener]]
name = "web"
bind = "127.0.0.1"
port = {port}
upstream = ["127.0.0.1:{echo}"]
"""


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as echo:
        yield echo


def text(echo: Echo, workers: int = 2, drain: float = 30.0, port: object = "PORT") -> str:
    return CONFIG.format(workers=workers, drain=drain, port=port, echo=echo.port)


def test_open_connections_live_on_and_new_ones_meet_new_workers(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()
        before = {each["pid"] for each in program.status()["workers"]}
        with program.connect() as old:
            assert echoes(old)
            program.signal(signal.SIGHUP)
            program.wait_line(r"reloaded in \d+ ms")
            with program.connect() as new:
                assert echoes(old)
                assert echoes(new)
                status = program.status()
                assert (status["pid"], status["ready"]) == (program.pid, True)
                assert status["reload"]["done"] == 1
                serving = {w["pid"] for w in status["workers"] if w["generation"] == 2}
                retired = [w for w in status["workers"] if w["generation"] == 1]
                assert not serving & before
                assert len(serving) == 2
                # Who has a connection stays for it; the other one may have gone already.
                assert {w["pid"] for w in retired if w["active"]} <= before
                assert {w["state"] for w in retired} == {"draining"}
                assert program.metric('tproxyd_connections_active{listener="web"}') == 2


# The configuration is read for the first time when there is somebody at the gate.
GATE = """
import os
from tproxyd import configsource
read = configsource.read_config
def read_config(*args):
    if os.path.exists({gate!r}):
        open({gate!r}).read()
    return read(*args)
configsource.read_config = read_config
"""


def test_one_that_is_asked_for_early_comes_after_the_start(echo: Echo, tmp_path: Path) -> None:
    """It is not the end of a process that has no handlers yet."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "sitecustomize.py").write_text(GATE.format(gate=str(gate)))
    with Program(text(echo), environment={"PYTHONPATH": str(tmp_path)}) as program:
        with gate.open("w"):
            gate.unlink()
            program.signal(signal.SIGUSR1)
            program.signal(signal.SIGHUP)
        program.wait_ready()
        program.wait_line("reloaded in")


def test_counters_go_on(echo: Echo) -> None:
    ended = 'tproxyd_connections_total{close_reason="downstream_fin",listener="web"}'
    with Program(text(echo)) as program:
        program.wait_ready()
        for count in range(1, 4):
            with program.connect() as sock:
                assert echoes(sock)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
            waiting = patience("the end to be counted")
            while program.metric(ended) < count:
                next(waiting)
            assert program.metric(ended) == count
            program.signal(signal.SIGHUP)
            program.wait_line("reloaded in")
            waiting = patience("the old workers to be gone")
            while len(program.status()["workers"]) > 2:
                next(waiting)
            assert program.metric(ended) == count
        assert program.metric('tproxyd_reloads_total{result="done"}') == 3


MOVES = [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "[::]")]


@pytest.mark.parametrize("how", ["reload", "upgrade"])
@pytest.mark.parametrize(("before", "after"), MOVES)
def test_an_admin_endpoint_moves_to_another_address_with_the_same_port(
    echo: Echo, before: str, after: str, how: str
) -> None:
    """Its own socket is not in its way, at an address that is part of the other."""
    config = text(echo).replace("127.0.0.1:ADMIN", f"{before}:ADMIN")
    with Program(config) as program:
        program.wait_ready()
        program.write(config.replace(f"{before}:ADMIN", f"{after}:ADMIN"))
        said = str(ask(f"{PREFIX}{before}:{program.admin_port}", {"verb": how})["said"])
        new = program.pid if how == "reload" else int(said.split()[1])
        if new != program.pid:
            assert program.process.wait(PATIENCE_S) == 0
        assert program.status()["pid"] == new
        with socket.socket() as elsewhere:  # 127.0.0.1 is not all that lo has
            refused = elsewhere.connect_ex(("127.0.0.2", program.admin_port))
        assert bool(refused) == (after == "127.0.0.1")


OTHER = """
[[listener]]
name = "other"
bind = "127.0.0.1"
port = {port}
upstream = ["127.0.0.1:{echo}"]
[[listener]]
name = "web"
"""


@pytest.mark.parametrize("limit", ["max_connections = 2", "per_client.max_connections = 2"])
def test_what_retired_workers_have_open_is_within_the_limits(echo: Echo, limit: str) -> None:
    config = f"{text(echo)}{limit}\n"
    # The listener has another place after the reload: its name says which it is.
    other = OTHER.format(port=free_port(), echo=echo.port)
    then = config.replace('[[listener]]\nname = "web"\n', other)
    with Program(config) as program:
        program.wait_ready()
        with program.connect() as one, program.connect() as two:
            assert echoes(one)
            assert echoes(two)
            for _ in range(2):  # those before the ones before count as well
                program.write(then)
                program.signal(signal.SIGHUP)
                program.wait_line("reloaded in")
                assert is_over(program)
            one.close()
            waiting = patience("the old workers to notice the end")
            while program.metric('tproxyd_connections_active{listener="web"}') != 1:
                next(waiting)
            with program.connect() as three:
                assert echoes(three)
                assert is_over(program)
                assert echoes(two)


def test_a_wrong_configuration_changes_nothing_and_is_told(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()
        before = [each["pid"] for each in program.status()["workers"]]
        program.write(text(echo).replace("upstream =", "upstreem ="))
        program.signal(signal.SIGHUP)
        program.wait_line('did you mean "upstream"')
        program.wait_line("the configuration of before goes on")
        status = program.status()
        assert "upstreem" in status["reload"]["error"]
        assert (status["reload"]["done"], status["reload"]["failed"]) == (0, 1)
        assert [each["pid"] for each in status["workers"]] == before
        assert program.metric("tproxyd_reload_failed") == 1
        with program.connect() as sock:
            assert echoes(sock)
        program.write(text(echo))
        program.signal(signal.SIGHUP)
        program.wait_line("reloaded in")
        assert program.status()["reload"]["error"] == ""
        assert program.metric("tproxyd_reload_failed") == 0


def test_what_open_connections_depend_on_takes_a_restart(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()
        program.write("mark = 7\n" + text(echo) + "[rules]\nscheme = 'istio'\n")
        program.signal(signal.SIGHUP)
        program.wait_line("mark: stays 1337 as long as this process runs; a restart makes it 7")
        program.wait_line("rules.scheme: stays lean as long as this process runs")
        program.wait_line("the configuration of before goes on")


def test_a_port_that_is_taken_fails_the_reload_as_a_whole(echo: Echo) -> None:
    with Program(text(echo)) as program, socket.create_server(("127.0.0.1", 0)) as other:
        program.wait_ready()
        taken = other.getsockname()[1]
        more = '[[listener]]\nname = "more"\nbind = "127.0.0.1"\n'
        more += f'port = {taken}\nupstream = ["127.0.0.1:{echo.port}"]\n'
        program.write(text(echo, workers=4) + more)
        program.signal(signal.SIGHUP)
        program.wait_line(f"can't listen on 127.0.0.1:{taken}")
        program.wait_line("the configuration of before goes on")
        assert [each["generation"] for each in program.status()["workers"]] == [1, 1]
        for _ in range(20):  # whatever socket they hash to
            with program.connect() as sock:
                assert echoes(sock)


def test_listeners_come_and_go(echo: Echo) -> None:
    second = free_port()
    with Program(text(echo)) as program:
        program.wait_ready()
        more = f'[[listener]]\nname = "more"\nbind = "127.0.0.1"\nport = {second}\n'
        more += f'upstream = ["127.0.0.1:{echo.port}"]\n'
        program.write(text(echo) + more)
        program.signal(signal.SIGHUP)
        program.wait_line("reloaded in")
        with program.connect(second) as open_one:
            assert echoes(open_one)
            program.write(text(echo))
            program.signal(signal.SIGHUP)
            program.wait_line("reloaded in")
            waiting = patience("the retired workers to let go of it")
            while is_served(program, second):
                next(waiting)
            assert echoes(open_one)
            open_one.shutdown(socket.SHUT_WR)
            assert open_one.recv(1) == b""
        # What it has counted is not forgotten, when its last worker is gone either.
        waiting = patience("the old workers to be gone")
        while len(program.status()["workers"]) > 2:
            next(waiting)
        name = 'tproxyd_connections_total{close_reason="downstream_fin",listener="more"}'
        assert program.metric(name) >= 1  # and of those that only looked


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1)])
def test_more_or_fewer_workers(echo: Echo, first: int, then: int) -> None:
    """Each listening socket has somebody who accepts from it, however many there were before."""
    with Program(text(echo, workers=first)) as program:
        program.wait_ready()
        program.write(text(echo, workers=then))
        program.signal(signal.SIGHUP)
        program.wait_line("reloaded in")
        waiting = patience("the old workers to be gone")
        while len(program.status()["workers"]) > then:
            next(waiting)
        for _ in range(40):
            with program.connect() as sock:
                assert echoes(sock)


def test_what_waits_in_a_queue_is_served_by_the_next_ones(echo: Echo) -> None:
    with Program(text(echo, workers=1)) as program:
        program.wait_ready()
        (old,) = program.status()["workers"]
        os.kill(old["pid"], signal.SIGSTOP)
        with program.connect() as waiting:
            program.signal(signal.SIGHUP)
            program.wait_line("reloaded in")
            assert echoes(waiting)
        os.kill(old["pid"], signal.SIGCONT)


def test_what_is_open_when_the_drain_deadline_passes_is_cut(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()
        with program.connect() as sock:
            assert echoes(sock)
            program.write(text(echo, drain=0.05))
            program.signal(signal.SIGHUP)
            program.wait_line("reloaded in")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        name = 'tproxyd_connections_total{close_reason="drain_timeout",listener="web"}'
        waiting = patience("the cut to be counted")
        while program.metric(name) < 1:
            next(waiting)


def test_nobody_replaces_a_retired_worker(echo: Echo) -> None:
    with Program(text(echo, workers=1)) as program:
        program.wait_ready()
        os.kill(program.status()["workers"][0]["pid"], signal.SIGKILL)
        program.wait_line("worker 0 is ready again")
        with program.connect() as held:
            assert echoes(held)
            (old,) = program.status()["workers"]
            program.signal(signal.SIGHUP)
            program.wait_line("reloaded in")
            os.kill(old["pid"], signal.SIGKILL)
            program.wait_line(r"worker 0 \(pid \d+\) was killed by SIGKILL")
            with suppress(ConnectionResetError):
                assert held.recv(1) == b""
        assert [each["generation"] for each in program.status()["workers"]] == [2]
        assert program.metric("tproxyd_worker_restarts_total") == 1


def test_the_admin_endpoint_moves(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()
        old, program.admin_port = program.admin_port, free_port()
        program.write(text(echo))
        program.signal(signal.SIGHUP)
        program.wait_line(f"admin endpoint: http://127.0.0.1:{program.admin_port}/")
        program.wait_line("reloaded in")
        assert program.get("/livez") == (200, "ok\n")
        with pytest.raises(ConnectionRefusedError):
            program.get("/livez", old)


def test_a_stop_in_the_middle_is_a_stop(echo: Echo) -> None:
    """The upstream's name is waited for, and the stop comes first."""
    with Program(text(echo)) as program:
        program.wait_ready()
        program.write(text(echo).replace("127.0.0.1:" + str(echo.port), "no.such.invalid:80"))
        program.signal(signal.SIGHUP)
        program.signal(signal.SIGTERM)
        program.rest()
        assert program.process.wait() == 0
        assert program.lines[-1] == "tproxyd: stopped"


def test_reloads_that_come_at_once_are_made_one_after_the_other(echo: Echo) -> None:
    with Program(text(echo)) as program:
        program.wait_ready()
        for _ in range(5):
            program.signal(signal.SIGHUP)
        program.wait_line("reloaded in")
        with program.connect() as sock:
            assert echoes(sock)
        assert program.metric('tproxyd_reloads_total{result="failed"}') == 0


def is_over(program: Program) -> bool:
    """Whether one more connection is over a limit: it is reset."""
    try:
        with program.connect() as sock:
            return not echoes(sock)
    except (ConnectionResetError, BrokenPipeError):
        return True


def is_served(program: Program, port: int) -> bool:
    try:
        program.connect(port).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # it came between the last accept and the end
        return True
    return True
