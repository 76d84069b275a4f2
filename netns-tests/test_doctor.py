"""`tproxyd doctor` finds each fault that it claims to know, says the remedy, and is quiet else."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lib.backends import BACKENDS
from lib.daemon import ROOT, TPROXYD, Daemon, tproxyd
from lib.netns import MARK_SYSCTLS
from lib.topology import V4, V6, Family, Topology

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
        assert "way home" in shown.stdout


def test_round_trip_leaves_nothing(net: Topology) -> None:
    with Daemon(net.pod):
        before = net.pod.dump()
        tproxyd(net.pod, "doctor")
        assert net.pod.dump() == before


def test_missing_capability(net: Topology) -> None:
    """Root is not told to become root, and others are not told that they are."""
    for user, told in (("root", "root lacks it here"), ("nobody", "run as root")):
        argv = net.pod.argv("setpriv", f"--reuid={user}", "--bounding-set=-net_admin,-net_raw")
        done = subprocess.run(
            [*argv, *TPROXYD, "doctor", "--json"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 1
        found = complaints(done)
        assert found["CAP_NET_RAW"]["remedy"].startswith(told)
        assert ("as root" in found["rules"]["remedy"]) == (user != "root")
        assert "as root" not in found["rules"]["detail"]


def test_rules_and_nobody_listening(net: Topology) -> None:
    tproxyd(net.pod, "install")
    done = tproxyd(net.pod, "doctor", "--json")
    assert done.returncode == 1
    found = complaints(done)["listener inbound"]
    assert found["detail"].startswith("nobody listens on 15006, but the rules stand")
    # What `run` alone would find here, it would leave behind too.
    assert found["remedy"].startswith("start the daemon: tproxyd run --install;")


def test_a_remedy_is_for_this_configuration(net: Topology, tmp_path: Path) -> None:
    """Typed as it is told, it makes this configuration's state, not that of the defaults."""
    config = tmp_path / "on port 15050.toml"
    config.write_text("[[listener]]\nport = 15050\nintercept = { ports = [80] }\n")
    tproxyd(net.pod, "install", "-c", str(config))
    with Daemon(net.pod, config.read_text(), install=False):
        net.pod.ip("rule del fwmark 0x539/0xfff lookup 133")
        told = complaints(tproxyd(net.pod, "doctor", "--json", "-c", str(config)))
        assert told.keys() == {"rules", "way home IPv4"}
        words = shlex.split(told["rules"]["remedy"].removesuffix(" puts it right"))
        assert words == ["tproxyd", "install", "-c", str(config)]
        assert told["way home IPv4"]["remedy"] == f"see rules, above: {told['rules']['remedy']}"
        tproxyd(net.pod, *words[1:])
        assert complaints(tproxyd(net.pod, "doctor", "--json", "-c", str(config))) == {}


def test_rules_that_the_running_daemon_does_not_serve(net: Topology) -> None:
    """Installed with a configuration that is not the daemon's, as when -c was left out."""
    config = "[[listener]]\nport = 15050\n"
    assert tproxyd(net.pod, "install", config=config).stderr == ""  # nobody runs yet
    with Daemon(net.pod, config, install=False):
        assert tproxyd(net.pod, "install", config=config).stderr == ""
        done = tproxyd(net.pod, "install", config="")
        assert done.returncode == 0
        assert done.stderr.startswith("tproxyd: nobody listens on 15006, where these rules send")


def test_another_program_has_the_port(net: Topology, family: Family) -> None:
    """TPROXY passes it over: its socket is not transparent."""
    tproxyd(net.pod, "install")
    net.keep(net.pod.listen("::" if family is V6 else "0.0.0.0", 15006))
    with pytest.raises(ConnectionRefusedError):
        net.connect(family)
    found = doctor(net)
    assert found.keys() == {"listener inbound"}
    assert found["listener inbound"]["detail"].startswith("another program listens on 15006")


def test_no_such_interface(net: Topology) -> None:
    config = '[[listener]]\nintercept = { interfaces = ["p0", "p*", "nope0", "nope*"] }\n'
    with Daemon(net.pod, config):
        done = tproxyd(net.pod, "doctor", "--json", config=config)
        assert complaints(done).keys() == {"interface nope0", "interface nope*"}
        assert done.returncode == 0


def test_listener_and_no_rules(net: Topology) -> None:
    with Daemon(net.pod, install=False):
        assert doctor(net)["rules"]["remedy"] == "tproxyd install, or run with --install"


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
    assert guard["remedy"].startswith("tproxyd run --install -c ")


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
            if check["name"] in ("clashes", "way home IPv4") and check["verdict"] != "ok"
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
    words = "tproxyd install puts it right; see what else writes this sysctl"
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


NAT = {
    "nft": (
        "nft add table inet fw",
        "nft add chain inet fw post { type nat hook postrouting priority srcnat; }",
        "nft add rule inet fw post oifname p1 masquerade",
    ),
    "iptables-nft": ("iptables-nft -t nat -A POSTROUTING -o p1 -j MASQUERADE",),
    "iptables-legacy": ("iptables-legacy -t nat -A POSTROUTING -o p1 -j MASQUERADE",),
}


@pytest.mark.parametrize("made_by", NAT)
def test_nat_of_others(net: Topology, made_by: str) -> None:
    """With iptables it comes behind interception, with nft before; a chain without a rule is none.

    And nowhere does it know a router's connection from the client's own, which has the same port.
    """
    forward = 'intercept = { scope = "forward" }\n'
    router = f'[[listener]]\nname = "router"\nsource = "client-port"\n{forward}'
    configs = ['[rules]\nbackend = "iptables-nft"\n', '[rules]\nbackend = "nft"\n']
    configs.append(configs[-1] + router)

    def told() -> list[str]:
        found = (complaints(tproxyd(net.pod, "doctor", "--json", config=c)) for c in configs)
        return [each["nat"]["detail"] if "nat" in each else "" for each in found]

    *made, rule = NAT[made_by]
    for command in made:
        net.pod.run(*command.split(maxsplit=6))
    assert told() == ["", "", ""]
    net.pod.run(*rule.split())
    behind, nothing, masqueraded = told()
    assert "behind interception" in behind
    assert nothing == ""
    assert "router are not masqueraded" in masqueraded


WHAT_OTHERS_MASQUERADE = [
    ("", True),
    ("-s {client} ! -o docker0", True),  # as Docker does
    ("-o l+", True),
    ("-o p1", False),
    ("! -o lo", False),
]


@pytest.mark.parametrize(("which", "told"), WHAT_OTHERS_MASQUERADE)
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_others_that_masquerade_our_connections(
    net: Topology, family: Family, variant: str, which: str, told: bool
) -> None:
    """Under accept-mark nothing of ours keeps them from it."""
    command = f"{'iptables' if family is V4 else 'ip6tables'}-{variant}"
    rule = f"{command} -t nat -A POSTROUTING {which.format(client=family.client)} -j MASQUERADE"
    net.pod.run(*rule.split())

    def nat(path: str, backend: str = "nft") -> str:
        config = f'[rules]\nreturn_path = "{path}"\nbackend = "{backend}"\n'
        check = complaints(tproxyd(net.pod, "doctor", "--json", config=config)).get("nat")
        return check["detail"] if check else ""

    assert ("does not see the client" in nat("accept-mark")) is told
    assert nat("conntrack") == ""


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_nat_of_ours_and_of_dockers_resolver(net: Topology, backend: str) -> None:
    """It is not that of others; and what the resolver in a container has, takes nothing of ours."""
    config = f'[rules]\nreturn_path = "conntrack"\nbackend = "{backend}"\n'
    for rule in (
        "-N DOCKER_POSTROUTING",
        "-A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING",
        "-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p udp --sport 4053 -j SNAT --to-source :53",
    ):
        net.pod.run(backend, "-t", "nat", *rule.split())
    tproxyd(net.pod, "install", config=config)
    assert "TPROXYD_POSTROUTING" in net.pod.run(backend, "-t", "nat", "-S")
    assert "nat" not in complaints(tproxyd(net.pod, "doctor", "--json", config=config))


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
        assert found.keys() == {"way home IPv4", "way home IPv6"}
        assert "ip route get 192.0.2.1" in found["way home IPv4"]["remedy"]
        net.pod.ip("route add default via 10.9.1.2", "route add default via fd00:9:1::2")
        assert complaints(tproxyd(net.pod, "doctor", "--json", config=config)) == {}


# Others in the way ------------------------------------------------------------------------------

NFT_DROPS = """
table inet filter {
    chain input {
        type filter hook input priority 0; policy drop;
        iifname "p0" accept
    }
    chain forward {
        type filter hook forward priority 0; policy drop;
    }
}
"""
NFT_REJECTS = """
table inet filter {
    chain strangers {
        reject with icmpx admin-prohibited
    }
    chain input {
        type filter hook input priority 0; policy accept;
        iifname "lo" jump strangers
    }
    chain output {
        type filter hook output priority 0; policy accept;
        oifname "p0" accept
    }
}
"""


def ways_home(net: Topology) -> list[Check]:
    """All that is complained of, for IPv4 and IPv6. It is not ours, so no install is offered."""
    found = doctor(net)
    assert found.keys() == {"way home IPv4", "way home IPv6"}
    assert not any("tproxyd" in check["remedy"] for check in found.values())
    return [found["way home IPv4"], found["way home IPv6"]]


@pytest.mark.parametrize(
    ("ruleset", "how"), [(NFT_DROPS, "policy drop"), (NFT_REJECTS, "a rule drops or rejects")]
)
def test_a_firewall_drops_the_answers(net: Topology, ruleset: str, how: str) -> None:
    """It is named, with what to type; and that helps."""
    net.pod.nft(ruleset)
    with Daemon(net.pod):
        for each in ways_home(net):
            assert each["detail"].endswith(f"these can: chain input of table inet filter ({how})")
            remedy = each["remedy"].removeprefix("let pass what goes over lo: ")
        net.pod.run(*remedy.split())
        assert doctor(net) == {}


def test_iptables_drops_the_answers(net: Topology) -> None:
    net.pod.run("iptables-nft", "-P", "INPUT", "DROP")
    net.pod.run("ip6tables-nft", "-A", "INPUT", "-i", "lo", "-j", "REJECT")
    with Daemon(net.pod):
        for each, tool in zip(ways_home(net), ("iptables", "ip6tables"), strict=True):
            remedy = each["remedy"].removeprefix("let pass what goes over lo: ")
            assert remedy == f"{tool} -t filter -I INPUT -i lo -j ACCEPT"
            net.pod.run(*remedy.replace("tables", "tables-nft", 1).split())
        assert doctor(net) == {}


@pytest.mark.parametrize("kind", ["unreachable default", "default via {client}"])
def test_another_policy_rule_takes_the_answers(net: Topology, kind: str) -> None:
    """It is named, with what to do; and that helps."""
    for version, family in (("-4", V4), ("-6", V6)):
        for line in (
            f"route add {kind.format(client=family.client)} table 200",
            "rule add priority 90 fwmark 0x77 lookup 200",
            "rule add priority 100 lookup 200",
        ):
            net.pod.run("ip", version, *line.split())
    with Daemon(net.pod):
        told = doctor(net)
        assert told.keys() == {"clashes", "way home IPv4", "way home IPv6"}
        assert "rule at priority 100 stands before ours" in told["clashes"]["detail"]
        assert "priority above 1337" in told["clashes"]["remedy"]
        for name in ("way home IPv4", "way home IPv6"):
            assert "answers are routed" in told[name]["detail"]
            assert told[name]["remedy"].startswith("see clashes, above; ")
        for version in ("-4", "-6"):  # as it says
            for line in ("rule del priority 100", "rule add priority 2000 lookup 200"):
                net.pod.run("ip", version, *line.split())
        assert doctor(net) == {}
