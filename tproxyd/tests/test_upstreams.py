"""Upstreams in a running daemon: the process that watches them, and what workers and people see."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from tproxyd import child
from tproxyd.addr import Endpoint
from tproxyd.config import HealthCheck, Listener
from tproxyd.proc import generation, prober, reconciler, supervisor, upstreams, watchdog
from tproxyd.proc.worker import WorkerSpec
from tproxyd.tests.daemons import Daemon, free_port, hear, say
from tproxyd.tests.talker import PATIENCE_S

APP = Endpoint("app.example", 80)
OFTEN = HealthCheck(interval_s=0.002, rise=2, fall=2)


class Names:
    """A resolver whose one answer a test sets, for processes that were forked before, too."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    def set(self, answer: str) -> None:
        self._memory[:] = answer.ljust(4096).encode()

    def __call__(self, _name: str) -> tuple[str, ...]:
        answer = self._memory[:].decode().strip()
        if answer == "silence":
            threading.Event().wait()
        if answer == "bug":
            raise RuntimeError("a bug in the prober")
        if answer.startswith("!"):
            raise socket.gaierror(-2, answer[1:])
        return tuple(answer.split())


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Daemons are forked from here, with these."""
    names = Names()
    monkeypatch.setattr(prober, "look_up", names)
    monkeypatch.setattr(generation, "GRACE_S", 0.1)
    monkeypatch.setattr(supervisor, "FIRST_S", 3600.0)  # no start has to wait for so long
    monkeypatch.setattr(reconciler, "FRESH_S", 0.0)
    monkeypatch.setattr(upstreams, "PAUSE_S", 0.01)
    return names


def tells_upstreams(spec: WorkerSpec) -> None:
    """Says which upstreams it was born with and hears of later; until anything else is said."""
    shown = {i: [str(each) for each in some] for i, some in spec.upstreams.items()}
    say(f"worker {spec.slot} is born with {shown}")
    spec.control.send(b"ready\n")
    while (word := hear(spec)).startswith(("upstreams ", watchdog.PING)):
        if word != watchdog.PING:
            say(f"worker {spec.slot} hears {word}")


def tells_upstreams_and_stays(spec: WorkerSpec) -> None:
    """The same, and leaves only when cut."""
    tells_upstreams(spec)
    say(f"worker {spec.slot} drains")
    while hear(spec) == watchdog.PING:
        pass


def daemon(
    *upstream: Endpoint,
    workers: int = 1,
    entry: Callable[[WorkerSpec], None] = tells_upstreams,
    before: Callable[[], None] = lambda: None,
    **settings: object,
) -> Daemon:
    listener = Listener(
        name="web",
        bind="127.0.0.1",
        port=free_port(),
        upstream=upstream,
        **{"resolve_every_s": 0.002, **settings},  # type: ignore[arg-type]
    )
    return Daemon(entry, workers=workers, before=before, listeners=(listener,))


def probers(daemon: Daemon) -> list[int]:
    found = []
    for pid in daemon.children():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
            if Path(f"/proc/{pid}/comm").read_text() == "tproxyd/prober\n":
                found.append(pid)
    return found


def wait_for(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline


def shown(daemon: Daemon) -> list[object]:
    upstreams: list[object] = daemon.status()["listeners"][0]["upstreams"]
    return upstreams


def part(upstream: str, *addresses: tuple[str, str, str], error: str = "") -> dict[str, object]:
    keys = ("address", "health", "why")
    each = [dict(zip(keys, address, strict=True)) for address in addresses]
    return {"upstream": upstream, "addresses": each, "error": error}


# Without anything to find out ---------------------------------------------------------------------


def test_addresses_need_no_process() -> None:
    with daemon(Endpoint("10.0.0.5", 80), Endpoint("/run/x", 0)) as d:
        d.wait_line(r"worker 0 is born with {0: \['10.0.0.5:80', 'unix:/run/x'\]}")
        d.wait_ready()
        assert probers(d) == []
        assert shown(d) == [
            part("10.0.0.5:80", ("10.0.0.5:80", "unchecked", "")),
            part("unix:/run/x", ("unix:/run/x", "unchecked", "")),
        ]
        assert d.metric('tproxyd_upstreams{listener="web",state="up"}') == 2
        assert d.metric('tproxyd_resolve_failures_total{listener="web"}') == 0


def test_a_listener_for_the_original_destination_has_none() -> None:
    with Daemon(tells_upstreams) as d:
        d.wait_line(r"worker 0 is born with {}")
        d.wait_ready()
        assert probers(d) == shown(d) == []
        assert "tproxyd_upstreams{" not in d.get("/metrics")[1]


# Names --------------------------------------------------------------------------------------------


def test_workers_are_born_with_the_answer_and_told_of_the_next(names: Names) -> None:
    names.set("10.0.0.5 fd00::5")
    with daemon(APP, workers=2) as d:
        for _ in range(2):
            d.wait_line(r"worker . is born with {0: \['10.0.0.5:80', '\[fd00::5\]:80'\]}")
        d.wait_ready()
        port = d.config.listeners[0].port
        assert f"tproxyd: web listens on 127.0.0.1:{port} for app.example:80" in d.lines
        names.set("10.0.0.6")
        told = {d.wait_line(r"worker . hears") for _ in range(2)}
        assert told == {f'worker {i} hears upstreams {{"0":[["10.0.0.6",80]]}}' for i in (0, 1)}
        assert shown(d) == [part("app.example:80", ("10.0.0.6:80", "unchecked", ""))]
        worker = d.status()["workers"][0]["pid"]
        os.kill(worker, signal.SIGKILL)
        d.wait_line(r"worker 0 is born with {0: \['10.0.0.6:80'\]}")
        d.signal(signal.SIGTERM)
        assert d.wait() == 0


def test_a_name_that_stops_resolving_keeps_its_last_answer(names: Names) -> None:
    names.set("10.0.0.5")
    with daemon(APP) as d:
        d.wait_ready()
        names.set("!Gone")
        d.wait_line("web: app.example can't be resolved: gone; the last answer stays")
        assert shown(d) == [part("app.example:80", ("10.0.0.5:80", "unchecked", ""), error="gone")]
        assert d.metric('tproxyd_resolve_failures_total{listener="web"}') >= 1
        assert d.metric('tproxyd_upstreams{listener="web",state="up"}') == 1
        assert d.get("/readyz") == (200, "ok\n")
        names.set("10.0.0.5")
        d.wait_line("web: app.example is resolved again: 10.0.0.5")
        assert not [line for line in d.lines if "hears" in line]  # nothing new for workers


def test_a_name_without_an_answer_is_told_and_no_reason_to_be_unready(names: Names) -> None:
    names.set("!Gone")
    with daemon(APP) as d:
        d.wait_line("web: app.example can't be resolved: gone; connections are refused until it")
        d.wait_line(r"worker 0 is born with {0: \[\]}")
        d.wait_ready()
        assert d.get("/readyz") == (200, "ok\n")
        names.set("10.0.0.5")
        d.wait_line(r'worker 0 hears upstreams {"0":\[\["10.0.0.5",80\]\]}')


def test_a_start_does_not_wait_for_ever(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_S", 0.05)
    names.set("silence")
    with daemon(APP) as d:
        d.wait_ready()
        assert shown(d) == [part("app.example:80", error="no answer yet")]
        d.signal(signal.SIGTERM)
        d.rest()  # every process ends, whatever its threads do
        assert d.wait() == 0


def test_a_stop_while_the_start_waits_is_a_stop(names: Names) -> None:
    names.set("silence")
    with daemon(APP) as d:
        wait_for(lambda: bool(probers(d)))
        d.signal(signal.SIGTERM)
        assert d.rest() == ["tproxyd: stopping", "tproxyd: stopped"]
        assert d.wait() == 0


# Checks -------------------------------------------------------------------------------------------


def test_what_is_down_is_not_in_the_first_picture_and_comes_when_it_is_up(names: Names) -> None:
    names.set("127.0.0.1")
    port = free_port()
    with daemon(Endpoint("app.example", port), health_check=OFTEN) as d:
        d.wait_line(f"web: 127.0.0.1:{port} of app.example:{port} is down: connection refused")
        d.wait_line(r"worker 0 is born with {0: \[\]}")
        d.wait_ready()
        assert shown(d) == [
            part(f"app.example:{port}", (f"127.0.0.1:{port}", "down", "connection refused"))
        ]
        assert d.metric('tproxyd_upstreams{listener="web",state="up"}') == 0
        assert d.metric('tproxyd_upstreams{listener="web",state="down"}') == 1
        assert d.get("/readyz") == (200, "ok\n")
        with socket.create_server(("127.0.0.1", port)):
            d.wait_line(f"web: 127.0.0.1:{port} of app.example:{port} is up again")
            d.wait_line(rf'worker 0 hears upstreams {{"0":\[\["127.0.0.1",{port}\]\]}}')
        d.wait_line("web: no upstream is left; its connections are refused")


# The process --------------------------------------------------------------------------------------


def test_when_it_dies_the_next_one_goes_on_from_what_was_known(names: Names) -> None:
    names.set("10.0.0.5")
    with daemon(APP) as d:
        d.wait_ready()
        names.set("!Gone")
        d.wait_line("the last answer stays")
        (first,) = probers(d)
        os.kill(first, signal.SIGKILL)
        d.wait_line("the process that watches upstreams was killed by SIGKILL; the next one starts")
        failures = 'tproxyd_resolve_failures_total{listener="web"}'
        counted = d.metric(failures)
        wait_for(lambda: d.metric(failures) > counted)
        assert shown(d) == [part("app.example:80", ("10.0.0.5:80", "unchecked", ""), error="gone")]
        assert first not in probers(d)
        names.set("10.0.0.6")
        d.wait_line(r'worker 0 hears upstreams {"0":\[\["10.0.0.6",80\]\]}')
        assert len([line for line in d.lines if "can't be resolved" in line]) == 1
        d.signal(signal.SIGTERM)
        d.rest()
        assert d.wait() == 0


def test_one_that_keeps_dying_is_no_loop_and_no_end(names: Names) -> None:
    names.set("10.0.0.5")
    with daemon(APP) as d:
        d.wait_ready()
        names.set("bug")
        for _ in range(3):
            d.wait_line(r"watches upstreams ended with exit status 70; the next one starts in 0.01")
        assert d.get("/readyz") == (200, "ok\n")
        assert "hears" not in "".join(d.lines)
        d.signal(signal.SIGTERM)
        d.rest()
        assert d.wait() == 0


def test_one_that_lived_long_is_replaced_at_once(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "SOUND_S", 0.0)
    names.set("10.0.0.5")
    with daemon(APP) as d:
        d.wait_ready()
        os.kill(probers(d)[0], signal.SIGKILL)
        d.wait_line("was killed by SIGKILL; the next one starts now")


def test_one_that_cannot_be_forked_is_tried_again(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.set("10.0.0.5")
    failures = [OSError(errno.EAGAIN, "No more processes")] * 2

    class Child:
        @staticmethod
        def fork(body: Callable[[], None], keep: Iterable[int]) -> int:
            if failures:
                raise failures.pop()
            return child.fork(body, keep)

    def before() -> None:
        monkeypatch.setattr(upstreams, "child", Child)

    with daemon(APP, before=before) as d:
        for _ in range(2):
            d.wait_line("upstreams can't be forked: No more processes; the next one starts in 0.01")
        d.wait_line(r"worker 0 is born with {0: \['10.0.0.5:80'\]}")


def test_a_stop_ends_it_first(names: Names) -> None:
    """No connection will be made any more that needs an upstream."""
    names.set("10.0.0.5")
    with daemon(APP, entry=tells_upstreams_and_stays) as d:
        d.wait_ready()
        d.signal(signal.SIGTERM)
        d.wait_line("worker 0 drains")
        wait_for(lambda: not probers(d))
        d.signal(signal.SIGTERM)
        assert "the next one" not in "".join(d.rest())
        assert d.wait() == 0


def test_it_ends_with_the_supervisor(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_S", 0.05)
    names.set("silence")
    with daemon(APP) as d:
        d.wait_ready()
        for pid in probers(d):  # as Ctrl-C and systemd do
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        d.signal(signal.SIGKILL)
        assert "the next one" not in "".join(d.rest())  # to the end: every process has gone


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has anything to give up")
def test_it_has_no_privileges(names: Names) -> None:
    names.set("10.0.0.5")
    with daemon(APP) as d:
        d.wait_ready()
        lines = Path(f"/proc/{probers(d)[0]}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert "0" not in status["Uid"].split()
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert status["NoNewPrivs"] == "1"
