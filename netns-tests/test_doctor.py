"""`tproxyd doctor` finds each fault that it claims to know, says the remedy, and is quiet else."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from lib.daemon import ROOT, TPROXYD, Daemon, tproxyd
from lib.netns import MARK_SYSCTLS
from lib.topology import V4, V6, Topology

Check = dict[str, Any]
CHECKS = dict(
    zip(
        MARK_SYSCTLS,
        ("tcp_fwmark_accept", "ipv4.fwmark_reflect", "ipv6.fwmark_reflect"),
        strict=True,
    )
)


def complaints(done: subprocess.CompletedProcess[str]) -> dict[str, Check]:
    """The checks that are not fine, by name; each of them says what to do."""
    checks: list[Check] = json.loads(done.stdout)
    bad = {check["name"]: check for check in checks if check["verdict"] != "ok"}
    assert all(check["remedy"] for check in bad.values()), bad
    return bad


def doctor(net: Topology) -> dict[str, Check]:
    return complaints(tproxyd(net.pod, "doctor", "--json"))


def test_healthy(net: Topology) -> None:
    with Daemon(net.pod):
        done = tproxyd(net.pod, "doctor", "--json")
        assert complaints(done) == {}
        assert done.returncode == 0
        shown = tproxyd(net.pod, "doctor")
        assert shown.returncode == 0
        assert "round trip" in shown.stdout


def test_round_trip_leaves_nothing(net: Topology) -> None:
    with Daemon(net.pod):
        before = net.pod.dump()
        tproxyd(net.pod, "doctor")
        assert net.pod.dump() == before


def test_missing_capability(net: Topology) -> None:
    argv = net.pod.argv("setpriv", "--bounding-set=-net_admin,-net_raw", *TPROXYD)
    done = subprocess.run(
        [*argv, "doctor", "--json"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert any("CAP_NET_RAW" in str(check) for check in complaints(done).values())


def test_rules_and_nobody_listening(net: Topology) -> None:
    tproxyd(net.pod, "install")
    done = tproxyd(net.pod, "doctor", "--json")
    assert done.returncode == 1
    assert any("listen" in check["detail"] for check in complaints(done).values())


def test_listener_and_no_rules(net: Topology) -> None:
    with Daemon(net.pod, install=False):
        assert any("tproxyd install" in check["remedy"] for check in doctor(net).values())


def test_who_keeps_the_rules(net: Topology) -> None:
    """It is named; and what only such a one can do is worth nothing without."""
    config = '[rules]\nguard = "owner"\non_crash = "open"\n'
    with Daemon(net.pod, config) as daemon:
        done = tproxyd(net.pod, "doctor", "--json", config=config)
        (rules,) = [check for check in json.loads(done.stdout) if check["name"] == "rules"]
        assert f"kept so by tproxyd (process {daemon.pid}: " in rules["detail"]
        assert complaints(done) == {}
        assert daemon.stop() == 0
    tproxyd(net.pod, "install", config=config)
    (guard,) = [
        check
        for name, check in complaints(tproxyd(net.pod, "doctor", "--json", config=config)).items()
        if name == "guard"
    ]
    assert guard["detail"].startswith('guard = "owner" and on_crash = "open", but no daemon')
    assert guard["remedy"] == "run with --install or --guard"


def test_lo_is_down(net: Topology) -> None:
    with Daemon(net.pod):
        net.pod.ip("link set lo down")
        try:
            assert any("ip link set lo up" in check["remedy"] for check in doctor(net).values())
        finally:
            net.pod.ip("link set lo up")


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("ip rule add priority 100 fwmark 0x539 lookup 77", "0x539"),  # takes our packets
        ("ip rule add priority 9000 fwmark 0x539 lookup 77", "0x539"),  # we take its packets
        ("ip rule add priority 1337 from 192.0.2.1 lookup 77", "1337"),
        ("ip rule add priority 9000 from 192.0.2.1 lookup 133", "133"),
        ("ip route add 192.0.2.0/24 dev p0 table 133", "133"),
    ],
)
def test_somebody_elses(net: Topology, fault: str, word: str) -> None:
    """The mark, the priority or the table is in use by others already."""
    net.pod.run(*fault.split())
    with Daemon(net.pod):
        assert any(word in check["detail"] for check in doctor(net).values())


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ("priority 5210 fwmark 0x80000/0xff0000 lookup main", "ok"),  # Tailscale's
        ("priority 1000 fwmark 0x80000/0xff0000 lookup main", "ok"),
        ("priority 32764 not fwmark 0xca6c lookup 51820", "ok"),  # wg-quick's
        ("priority 100 not fwmark 0xca6c lookup 51820", "fail"),
        ("priority 100 from all lookup 51820", "fail"),
        ("priority 100 from 10.9.1.1 lookup 51820", "warn"),
    ],
)
def test_rules_beside_ours(net: Topology, rule: str, verdict: str) -> None:
    """The verdict on it, and that a client is served where it is ok, and not where it is none."""
    if "51820" in rule:
        net.pod.ip(f"route add default via {V4.client} table 51820")
    with Daemon(net.pod):
        net.pod.run("ip", "rule", "add", *rule.split())
        told = [
            check
            for check in json.loads(tproxyd(net.pod, "doctor", "--json").stdout)
            if check["name"] in ("clashes", "round trip IPv4") and check["verdict"] != "ok"
        ]
        assert [check["verdict"] for check in told] == {
            "ok": [],
            "warn": ["warn", "fail"],
            "fail": ["fail", "fail"],
        }[verdict]
        if told:
            assert rule.split()[1] in told[0]["detail"]
            assert "a priority above 1337" in told[0]["remedy"]
            assert "clashes" in told[1]["remedy"]
            assert "tproxyd install" not in told[1]["remedy"]


def test_src_valid_mark(net: Topology) -> None:
    """Told only when it does harm: with the lean rules and rp_filter it does none."""
    for where in ("all", "p0"):
        net.pod.sysctl(f"net/ipv4/conf/{where}/src_valid_mark", 1)
        net.pod.sysctl(f"net/ipv4/conf/{where}/rp_filter", 1)
    with Daemon(net.pod):
        told = tproxyd(net.pod, "doctor").stdout
        assert "src_valid_mark" in told
        assert "rp_filter" in told


@pytest.mark.parametrize("name", MARK_SYSCTLS)
def test_a_sysctl_is_put_back_by_others(net: Topology, name: str) -> None:
    """Told of the one that it is, by its own name, and only where it is needed."""
    words = "tproxyd install puts it back"
    tproxyd(net.pod, "install")
    with Daemon(net.pod, install=False):
        net.pod.sysctl(name, 0)
        told = [check for check in doctor(net).values() if words in check["remedy"]]
        assert [check["name"] for check in told] == [CHECKS[name]]
        tproxyd(net.pod, "install")
        assert doctor(net) == {}
    conntrack = '[rules]\nreturn_path = "conntrack"\n'
    # An answer that conntrack is to bring home needs a route toward the client before that.
    net.pod.ip(f"route add default via {V4.client}", f"route add default via {V6.client}")
    with Daemon(net.pod, conntrack):
        assert net.pod.sysctl(name) == 0
        assert complaints(tproxyd(net.pod, "doctor", "--json", config=conntrack)) == {}


def test_ipv6_is_off(net: Topology) -> None:
    net.pod.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    with Daemon(net.pod):
        assert "IPv6" in tproxyd(net.pod, "doctor").stdout


def test_the_istio_scheme(net: Topology) -> None:
    """What its rules are known to lose."""
    config = '[rules]\nscheme = "istio"\n'
    net.pod.ip("route add default via 10.9.1.2", "route add default via fd00:9:1::2")
    with Daemon(net.pod, config):
        assert complaints(tproxyd(net.pod, "doctor", "--json", config=config)) == {}
        net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
        net.pod.sysctl("net/ipv4/conf/all/src_valid_mark", 1)
        found = complaints(tproxyd(net.pod, "doctor", "--json", config=config))
        assert found.keys() == {"tcp_syncookies", "src_valid_mark"}


def test_conntrack_without_a_route_to_clients(net: Topology) -> None:
    config = '[rules]\nreturn_path = "conntrack"\n'
    with Daemon(net.pod, config):
        found = complaints(tproxyd(net.pod, "doctor", "--json", config=config))
        assert found.keys() == {"round trip IPv4", "round trip IPv6"}
        assert "ip route get 192.0.2.1" in found["round trip IPv4"]["remedy"]
        net.pod.ip("route add default via 10.9.1.2", "route add default via fd00:9:1::2")
        assert complaints(tproxyd(net.pod, "doctor", "--json", config=config)) == {}
