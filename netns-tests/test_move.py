"""The kernel state moves from one configuration to another, and from one daemon to the next, and
all the while no client gets around the proxy.
"""

from __future__ import annotations

import itertools

import pytest
from lib.backends import BACKENDS, dump
from lib.netns import Namespace
from lib.reconciler import Knocking, Supervisor
from lib.topology import Topology
from lib.waits import stays, wait_for

GUARDS = [
    pytest.param(f'guard = "{guard}"\non_crash = "{crash}"\n', id=f"{guard}-{crash}")
    for guard, crash in itertools.product(("none", "owner"), ("closed", "open"))
]


def config(rules: str = "", listener: str = "", top: str = "") -> str:
    return f"{top}\n[rules]\n{rules}\n[[listener]]\n{listener}\n"


OTHER = "intercept.ports = [80, 443]\n"


def fresh(pod: Namespace, text: str) -> str:
    """What a start with this configuration makes."""
    with Supervisor(pod, text) as one:
        assert one.do("install")["changed"]
        made = dump(pod)
        one.do("clean")
        one.do("close")
    return made


@pytest.mark.parametrize("guard", GUARDS)
def test_move(net: Topology, guard: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = dump(net.pod)
    texts = [config(guard), config(guard, OTHER), config(guard, OTHER, "mark = 0x77\ntable = 99")]
    want = [fresh(net.pod, text) for text in texts]
    assert len(set(want)) == 3
    with Supervisor(net.pod, texts[0]) as one:
        assert one.do("install")["changed"]
        with Knocking(net) as knocking:
            for _ in range(3):
                for text, wanted in zip((*texts[1:], texts[0]), (*want[1:], want[0]), strict=True):
                    assert one.do("move", text)["changed"]
                    assert dump(net.pod) == wanted
                    assert one.do("move", text)["changed"] == []
        assert knocking.met_a_closed_door(), vars(knocking)
        with capsys.disabled():
            print(f"\n  9 moves ({guard.replace(chr(10), ' ')}): {knocking.refused} refused, 0 by")
        # It is the new one that is kept from now on.
        one.do("move", texts[2])
        net.pod.run("ip", "rule", "del", "priority", "1337")
        wait_for(lambda: dump(net.pod) == want[2], "a heal of the new state")
        one.do("clean")
    assert dump(net.pod) == before


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_move_iptables(net: Topology, backend: str) -> None:
    texts = [config(f'backend = "{backend}"\n', listener) for listener in ("", OTHER)]
    want = [fresh(net.pod, text) for text in texts]
    with Supervisor(net.pod, texts[0]) as one:
        one.do("install")
        for text, wanted in zip(texts[::-1], want[::-1], strict=True):
            assert one.do("move", text)["changed"]
            assert dump(net.pod) == wanted
        one.do("clean")


def test_the_guard_is_switched_on_and_off(net: Topology) -> None:
    """Over a table that stands: a copy of it intercepts while it gets an owner."""
    kinds = ['guard = "none"\n', 'guard = "owner"\n', 'guard = "owner"\non_crash = "open"\n']
    with Supervisor(net.pod, config(kinds[0])) as one:
        one.do("install")
        with Knocking(net) as knocking:
            for kind in (*kinds[1:], *kinds[1::-1], kinds[2], *kinds):
                assert "error" not in one.do("move", config(kind))
                flags = "flags owner" in net.pod.run("nft", "list", "ruleset")
                assert flags == ("owner" in kind)
                assert "meanwhile" not in net.pod.run("nft", "list", "ruleset")
        assert knocking.met_a_closed_door(), vars(knocking)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_move_that_fails_changes_nothing(net: Topology, guard: str) -> None:
    """Another program's route is in the way of the new table."""
    net.pod.ip("route add local default dev lo table 99 proto 7")
    with Supervisor(net.pod, config(guard)) as one:
        one.do("install")
        made = dump(net.pod)
        with Knocking(net) as knocking:
            refusal = one.do("move", config(guard, OTHER, "mark = 0x77\ntable = 99"))["error"]
            assert "another program's is in its place" in refusal
            assert dump(net.pod) == made
        assert knocking.met_a_closed_door(), vars(knocking)
        wait_for(lambda: one.do("check")["state"] == "ok", "it to be read")
        net.pod.run("ip", "rule", "del", "priority", "1337")
        wait_for(lambda: dump(net.pod) == made, "a heal of the old state")


@pytest.mark.parametrize("guard", GUARDS)
def test_release_and_a_successor(net: Topology, guard: str) -> None:
    """As in an upgrade: the state stands all the while, and never does nobody know whose it is."""
    before = dump(net.pod)
    with Supervisor(net.pod, config(guard)) as old, Supervisor(net.pod, config(guard)) as new:
        old.do("install")
        made = dump(net.pod)
        with Knocking(net) as knocking:
            new.begin("claim")
            stays(lambda: dump(net.pod) == made, "the state", 0.3)
            assert old.do("release") == {"changed": [], "state": ""}
            assert "error" not in new.end()
            report = new.do("install")
            assert dump(net.pod) == made
            assert (report["changed"] == []) == ('"none"' in guard)
            old.do("close")
            stays(lambda: dump(net.pod) == made, "the state", 0.3)
            net.pod.run("ip", "rule", "del", "priority", "1337")
            wait_for(lambda: dump(net.pod) == made, "a heal by the new one")
        assert knocking.met_a_closed_door(), vars(knocking)
        new.do("clean")
    assert dump(net.pod) == before


def test_who_has_released_only_watches(net: Topology) -> None:
    with Supervisor(net.pod, config()) as one:
        one.do("install")
        one.do("release")
        net.pod.run("ip", "rule", "del", "priority", "1337")
        stays(lambda: "1337:" not in net.pod.run("ip", "rule"), "its absence", 1.0)
        wait_for(lambda: one.do("check")["state"] == "drift", "it to be read")
