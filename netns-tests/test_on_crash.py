"""SIGKILL of the daemon, of the process that keeps its rules, and of both at once.

Whatever was asked for with `on_crash` holds, a connection that is open when the keeper dies lives
on, and starting again makes everything whole.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from lib.backends import BACKENDS
from lib.daemon import Daemon, children, tproxyd
from lib.netns import Namespace
from lib.processes import is_gone
from lib.streams import assert_talks
from lib.topology import V4, V6, Topology
from lib.waits import stays, wait_for

POLICIES = ["closed", "open"]
GUARDS = ["none", "owner"]


def rules(on_crash: str, guard: str = "none", backend: str = "nft", path: str = "auto") -> str:
    return (
        f'drain_timeout_s = 0.1\n[rules]\nbackend = "{backend}"\nguard = "{guard}"\n'
        f'on_crash = "{on_crash}"\nreturn_path = "{path}"\n'
    )


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that none sees another one's end
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_daemon(daemon: Daemon, *, keeper_too: bool) -> None:
    family = [daemon.pid, *children(daemon.pid)]
    kill(daemon.pid, *([daemon.keeper()] if keeper_too else []))
    daemon.process.wait()
    wait_for(lambda: all(map(is_gone, family)), "its children to follow")


def is_refused(net: Topology) -> bool:
    try:
        net.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def reaches_application(net: Topology) -> bool:
    """Directly: the application sees the client's own port."""
    net.app()
    try:
        client = net.connect()
    except ConnectionRefusedError:
        return False
    with client, net.accept() as app:
        return bool(app.getpeername() == client.getsockname())


def is_whole_again(net: Topology, config: str, before: str) -> None:
    """A new daemon starts at once, serves, and leaves nothing."""
    with Daemon(net.pod, config) as daemon:
        for family in (V4, V6):
            pair = net.pair(family)
            assert_talks(pair)
            assert pair.app.getpeername() != pair.client.getsockname()
        assert daemon.stop() == 0
    assert net.pod.dump() == before


@pytest.mark.parametrize("keeper_too", [False, True], ids=["daemon", "both"])
@pytest.mark.parametrize("guard", GUARDS)
def test_closed(net: Topology, guard: str, keeper_too: bool) -> None:
    before, config = net.pod.dump(), rules("closed", guard)
    with Daemon(net.pod, config) as daemon:
        net.app()
        kill_daemon(daemon, keeper_too=keeper_too)
        assert is_refused(net)
        stays(lambda: is_refused(net), "refusing", 0.5)
        assert net.app_saw_nothing()
        if not keeper_too:
            assert "the rules stay, and clients are refused" in daemon.stderr
    is_whole_again(net, config, before)


@pytest.mark.parametrize("guard", GUARDS)
def test_open_when_the_daemon_dies(
    net: Topology, guard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, config = net.pod.dump(), rules("open", guard)
    with Daemon(net.pod, config) as daemon:
        net.app()
        since = time.monotonic()
        kill_daemon(daemon, keeper_too=False)
        wait_for(lambda: reaches_application(net), "clients to reach the application")
        with capsys.disabled():
            took = (time.monotonic() - since) * 1000
            print(f'\n  open {took:.0f} ms after SIGKILL of the daemon (guard "{guard}")', end="")
        stays(lambda: reaches_application(net), "reaching it", 0.5)
    is_whole_again(net, config, before)


def test_open_when_both_die_at_once(net: Topology) -> None:
    """The kernel itself sees to it: the table goes with its owner."""
    before, config = net.pod.dump(), rules("open", "owner")
    with Daemon(net.pod, config) as daemon:
        net.app()
        kill_daemon(daemon, keeper_too=True)
        wait_for(lambda: reaches_application(net), "clients to reach the application")
    is_whole_again(net, config, before)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (rules("open"), 'guard = "owner" would make it hold without'),
        (rules("open", backend="iptables-nft"), "rules of iptables end with no process"),
        (rules("open", "owner", path="conntrack"), "open connections need these rules"),
        (rules("closed", "owner", "iptables-nft"), "tables of iptables have no owner"),
    ],
)
def test_what_does_not_hold_is_told(net: Topology, config: str, said: str) -> None:
    with Daemon(net.pod, config) as daemon:
        assert said in daemon.stderr


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("policy", POLICIES)
def test_iptables(net: Topology, backend: str, policy: str) -> None:
    before, config = net.pod.dump(), rules(policy, backend=backend)
    with Daemon(net.pod, config) as daemon:
        net.app()
        kill_daemon(daemon, keeper_too=False)
        if policy == "open":
            wait_for(lambda: reaches_application(net), "clients to reach the application")
        else:
            assert "the rules stay" in daemon.stderr
            assert "TPROXYD" in saved(net.pod, backend)
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before


def saved(pod: Namespace, backend: str) -> str:
    return pod.run(f"iptables-{backend.removeprefix('iptables-')}-save")


@pytest.mark.parametrize("path", ["accept-mark", "conntrack"])
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_keeper_dies(
    net: Topology, policy: str, guard: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one takes over; open connections do not notice, under traffic, five times over."""
    wait_for(lambda: "fe80" in net.pod.run("ip", "-6", "route"), "the link's own address")
    before = net.pod.dump()
    with Daemon(net.pod, rules(policy, guard, path=path)) as daemon:
        held = [net.pair(family) for family in (V4, V6) for _ in range(5)]
        whole, took = net.pod.dump(), 0.0
        for _ in range(5):
            killed, since = daemon.keeper(), time.monotonic()
            kill(killed)

            def is_whole(killed: int = killed) -> bool:
                for pair in held:
                    assert_talks(pair)
                return killed not in children(daemon.pid) and net.pod.dump() == whole

            wait_for(is_whole, "another keeper, and everything as it was")
            took = took or time.monotonic() - since  # later ones wait: they die too quickly
            net.pod.run("ip", "rule", "del", "priority", "1337")
            wait_for(lambda: net.pod.dump() == whole, "its first heal")
            for pair in held:
                assert_talks(pair)
            assert_talks(net.pair())
        with capsys.disabled():
            what = f"on_crash {policy}, guard {guard}, {path}"
            print(
                f"\n  whole {took * 1000:.0f} ms after the first SIGKILL of the keeper ({what})",
                end="",
            )
        assert daemon.stderr.count("the process that holds the kernel state was killed") == 5
        assert daemon.stop() == 0
    assert net.pod.dump() == before
