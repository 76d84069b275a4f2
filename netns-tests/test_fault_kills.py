"""SIGKILL of supervisor, reconciler and worker, in every combination, while clients come and go.

What the policy says: a worker takes its own connections with it and no others, and is replaced; a
reconciler is not missed; without a supervisor the workers finish what they have and take no more,
and the rules stay, so that clients are refused and never meet the application around the proxy.
Then a restart makes it whole, and what that leaves behind is nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from lib.daemon import Daemon, children
from lib.figures import Figure
from lib.netns import run
from lib.processes import is_gone
from lib.streams import assert_talks, receive
from lib.topology import V4, Pair, Topology
from lib.waits import wait_for

ROLES = ("supervisor", "reconciler", "worker")
COMBINATIONS = [some for count in (1, 2, 3) for some in combinations(ROLES, count)]
HELD = 20  # connections that live through it, as far as their worker does
CONFIG = "workers = 2\n"


@pytest.mark.parametrize("roles", COMBINATIONS, ids="+".join)
def test_killed(net: Topology, roles: tuple[str, ...], figure: Figure) -> None:
    net.app()
    before = net.pod.dump()
    with Daemon(net.pod, CONFIG) as daemon, contextlib.ExitStack() as stack:
        held = [net.pair() for _ in range(HELD)]
        workers = daemon.workers()
        stack.callback(kill, workers)  # whatever a failing test leaves
        active = {worker["pid"]: worker["active"] for worker in daemon.status()["workers"]}
        assert sum(active.values()) == HELD
        victim = max(active, key=lambda pid: active[pid])
        pids = {
            "supervisor": daemon.pid,
            "reconciler": wait_for(lambda: reconcilers(daemon), "the reconciler")[0],
            "worker": victim,
        }
        killed = [pids[role] for role in roles]
        expected_to_live = HELD - (active[victim] if "worker" in roles else 0)

        with Churn(net) as churn:
            churn.wait_ok(20)
            kill(killed)
            wait_for(lambda: all(map(is_gone, killed)), "the killed to be gone")
            alive = [pair for pair in held if lives(pair)]
            assert len(alive) == expected_to_live
            if "supervisor" in roles:
                told = without_supervisor(net, churn, alive, workers)
            else:
                told = with_supervisor(daemon, churn, killed)
        assert not churn.wrong, churn.wrong
        figure(f"{HELD - len(alive)} of {HELD} connections lost; {told}")

        if "supervisor" in roles:
            # Those workers that live still serve; the next daemon does not mind.
            with Daemon(net.pod, CONFIG) as again:
                is_whole(net, again, alive)
                for pair in alive:
                    end(pair)
                wait_for(lambda: all(map(is_gone, workers)), "the old workers, done, to leave")
                is_whole(net, again, [])
                assert again.stop() == 0
        else:
            is_whole(net, daemon, alive)
            for pair in alive:
                end(pair)
            assert daemon.stop() == 0
    assert net.pod.dump() == before
    assert not leftovers(net)


def test_what_a_supervisor_leaves_ends_with_the_drain(net: Topology, figure: Figure) -> None:
    """A client that never finishes is no reason to stay for ever."""
    with Daemon(net.pod, f"{CONFIG}drain_timeout_s = 1.5\n") as daemon:
        held = [net.pair() for _ in range(HELD)]
        workers = daemon.workers()
        began = time.monotonic()
        kill([daemon.pid])
        daemon.process.wait()
        for pair in held:
            assert_talks(pair)
        wait_for(lambda: all(map(is_gone, workers)), "the workers to end")
        took = time.monotonic() - began
        reasons = Counter(record["close_reason"] for record in daemon.wait_log(HELD))
        assert reasons == {"drain_timeout": HELD}
    figure(f"drain_timeout_s = 1.5: the workers were gone after {took:.2f} s")


# What is done, and what is seen of it -------------------------------------------------------------


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def reconcilers(daemon: Daemon) -> list[int]:
    daemon.status()  # who asks for the kernel state has one started, where there is none

    def name(pid: int) -> str:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/comm").read_text()
        return ""

    return [pid for pid in children(daemon.pid) if name(pid).startswith("tproxyd/kernel")]


def lives(pair: Pair) -> bool:
    try:
        assert_talks(pair)
    except (AssertionError, ConnectionError):
        return False
    return True


def end(pair: Pair) -> None:
    pair.client.close()
    pair.app.close()


def leftovers(net: Topology) -> str:
    """Processes that still run in the pod."""
    return run("ip", "netns", "pids", net.pod.name)


def with_supervisor(daemon: Daemon, churn: Churn, killed: list[int]) -> str:
    """It mends what is missing, and clients hardly notice."""
    began = time.monotonic()
    wait_for(
        lambda: daemon.status()["ready"] and not {*killed} & {*daemon.workers()}, "all to be whole"
    )
    took = time.monotonic() - began
    churn.wait_ok(50)
    assert churn.outcomes["refused"] == 0
    # What was with the killed worker at that moment: one thread has one connection at a time.
    assert churn.outcomes["lost"] <= 1
    return f"whole again after {1000 * took:.0f} ms; clients meanwhile: {churn}"


def without_supervisor(net: Topology, churn: Churn, alive: list[Pair], workers: list[int]) -> str:
    """Clients are refused, whom the workers serve they go on serving."""
    churn.wait_refused(20)
    for pair in alive:
        assert_talks(pair)
    if alive:
        assert not all(map(is_gone, workers))
    with pytest.raises(ConnectionRefusedError):
        net.client.connect(V4.pod, 80)
    return f"clients: {churn}"


def is_whole(net: Topology, daemon: Daemon, pairs: list[Pair]) -> None:
    # What was asked of a reconciler that was killed is not known until it is asked again.
    wait_for(lambda: daemon.status()["kernel"]["state"] == "ok", "the kernel state to be read")
    assert daemon.get("/readyz") == (200, "ok\n")
    status = daemon.status()
    assert [worker["state"] for worker in status["workers"]] == ["ready", "ready"]
    new = net.pair()
    for pair in (*pairs, new):
        assert_talks(pair)
    end(new)


class Churn:
    """`with Churn(net) as churn:`, one client after the other, each a short echo, and an
    application for them: how they fared, in a word each."""

    def __init__(self, net: Topology) -> None:
        self._net, self._over = net, threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._serve, self._come)
        ]

    def __enter__(self) -> Churn:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {word}" for word, n in self.outcomes.most_common())
        return f"{counts}, the slowest {1000 * self.slowest:.0f} ms"

    def wait_ok(self, count: int) -> None:
        self._wait("ok", count)

    def wait_refused(self, count: int) -> None:
        self._wait("refused", count)

    def _wait(self, word: str, more: int) -> None:
        goal = self.outcomes[word] + more
        wait_for(lambda: self.wrong or self.outcomes[word] >= goal, f"{more} more to be {word}")

    def _come(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            began = time.monotonic()
            word = number.to_bytes(8, "big")
            try:
                with self._net.client.connect(V4.pod, 80) as sock:
                    sock.sendall(word)
                    if receive(sock, 8) != word or sock.recv(1):
                        self.wrong.append(f"the answer to {number}")
                self.outcomes["ok"] += 1
            except ConnectionRefusedError:
                self.outcomes["refused"] += 1
            except (ConnectionError, AssertionError):
                self.outcomes["lost"] += 1
            except TimeoutError:
                self.wrong.append(f"{number} hung")
            self.slowest = max(self.slowest, time.monotonic() - began)

    def _serve(self) -> None:
        listener = self._net.app()
        listener.settimeout(0.1)
        while not self._over.is_set():
            try:
                sock, peer = listener.accept()
            except TimeoutError:
                continue
            sock.settimeout(10)
            with sock, contextlib.suppress(OSError, AssertionError):
                if peer[0] != V4.client:
                    self.wrong.append(f"{peer} came to the application")
                sock.sendall(receive(sock, 8))
        listener.settimeout(10)
