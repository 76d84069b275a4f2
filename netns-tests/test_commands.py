"""The commands: their exit codes, and that a bad configuration is told whole and touches nothing.

0 fine, 1 a problem found, 2 usage or configuration, 3 the kernel refused.
"""

from __future__ import annotations

import json

import pytest
from lib.daemon import Daemon, tproxyd
from lib.topology import Topology

BAD = """
mark = 0
tabel = 7
[[listener]]
port = 99999
intercept = { ports = [] }
[[listener.proxy_protocol]]
from = ["10.0.0.1/8"]
"""


@pytest.mark.parametrize("command", [["check"], ["run"], ["run", "--install"], ["install"]])
def test_bad_configuration(net: Topology, command: list[str]) -> None:
    before = net.pod.dump()
    done = tproxyd(net.pod, *command, config=BAD)
    assert done.returncode == 2
    for words in (
        "mark",
        'tabel: unknown key; did you mean "table"?',
        "listener[0].port",
        "listener[0].intercept.ports",
        "listener[0].proxy_protocol[0].policy",
        "10.0.0.0/8",
    ):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert net.pod.dump() == before


def test_check_of_a_good_one(net: Topology) -> None:
    before = net.pod.dump()
    assert tproxyd(net.pod, "check", config="workers = 2\n").returncode == 0
    assert net.pod.dump() == before


@pytest.mark.parametrize("words", [[], ["runn"], ["run", "--instal-l"]])
def test_usage(net: Topology, words: list[str]) -> None:
    done = tproxyd(net.pod, *words)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_missing_file(net: Topology) -> None:
    done = tproxyd(net.pod, "check", "-c", "/nowhere/tproxyd.toml")
    assert done.returncode == 2
    assert "/nowhere/tproxyd.toml" in done.stderr


def test_port_that_somebody_has(net: Topology) -> None:
    before = net.pod.dump()
    net.keep(net.pod.listen("0.0.0.0", 15006))
    done = tproxyd(net.pod, "run", "--install")
    assert done.returncode == 3
    assert "can't listen on 0.0.0.0:15006" in done.stderr
    assert "ss -ltnp" in done.stderr
    assert net.pod.dump() == before


def test_rules_are_what_nft_accepts(net: Topology) -> None:
    """Printed for people, and every line of it runs: the result is what install makes."""
    done = tproxyd(net.pod, "rules")
    assert done.returncode == 0
    before = net.pod.dump()
    assert tproxyd(net.pod, "install").returncode == 0
    installed = net.pod.run("nft", "list", "table", "inet", "tproxyd")
    assert tproxyd(net.pod, "clean").returncode == 0
    assert net.pod.dump() == before
    start = done.stdout.index("table inet tproxyd")
    script = done.stdout[start:]
    net.pod.nft(script[: script.index("\n}") + 2] + "\n")
    assert net.pod.run("nft", "list", "table", "inet", "tproxyd") == installed


def test_status(net: Topology) -> None:
    nobody = tproxyd(net.pod, "status")
    assert nobody.returncode == 1
    assert "can't" in nobody.stderr
    with Daemon(net.pod, "workers = 2\n"):
        net.pair()
        told = tproxyd(net.pod, "status")
        assert told.returncode == 0
        assert "inbound" in told.stdout
        as_json = tproxyd(net.pod, "status", "--json")
        assert as_json.returncode == 0
        assert len(json.loads(as_json.stdout)["workers"]) == 2
