"""In the place of istio-iptables: its words make the interception, `tproxyd run` serves it.

In the pod, instead of istio-init; `run` installs nothing here, as beside an init container.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lib.daemon import ROOT, TPROXYD, Daemon
from lib.netns import Namespace
from lib.topology import PORT, V4, V6, Family, Topology

# What Istio's injector writes.
INJECTED = (
    *("-p", "15001", "-z", "15006", "-u", "1337", "-g", "1337", "-m", "TPROXY"),
    *("-i", "*", "-x", "", "-b", "*", "-d", "15090,15021,15020"),
)
# Istio names no backend, and takes what the node has.
LEGACY = ("--force-iptables-binary", "legacy")
BACKENDS = {
    "as-found": (),
    "nft": ("--native-nftables",),
    "iptables-nft": ("--force-iptables-binary", "nft"),
    "iptables-legacy": LEGACY,
}
NEEDS_LEGACY = pytest.mark.skipif(
    importlib.util.find_spec("iptc") is None, reason="needs python-iptables, the extra `legacy`"
)


def istio_iptables(
    where: Namespace, *words: str, prefix: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        where.argv(*prefix, *TPROXYD, "istio-iptables", *words),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=30,
        env={**os.environ, **environ},
    )


def done(where: Namespace, *words: str, **environ: str) -> str:
    """What it printed; it must end well."""
    found = istio_iptables(where, *words, prefix=(), **environ)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(
    params=[
        pytest.param(name, marks=[NEEDS_LEGACY] if words is LEGACY else [])
        for name, words in BACKENDS.items()
    ]
)
def backend(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return BACKENDS[request.param]


def serves(net: Topology, family: Family) -> None:
    """The application sees the client, and both hear each other."""
    with Daemon(net.pod, install=False):
        pair = net.pair(family)
        assert pair.app.getpeername()[0] == family.client
        pair.client.sendall(b"ping")
        assert pair.app.recv(4) == b"ping"
        pair.app.sendall(b"pong")
        assert pair.client.recv(4) == b"pong"


def test_in_place_of_istio_init(net: Topology, family: Family, backend: tuple[str, ...]) -> None:
    before = net.pod.dump()
    done(net.pod, *INJECTED, *backend)
    serves(net, family)
    done(net.pod, "--cleanup-only")
    assert net.pod.dump() == before
    if backend is LEGACY:  # which the dump has not
        for command in "iptables-legacy-save", "ip6tables-legacy-save":
            assert not [each for each in net.pod.run(command).splitlines() if "-A" in each]


def test_redirect_mode(net: Topology, family: Family, backend: tuple[str, ...]) -> None:
    """The application sees Istio's 127.0.0.6 or ::6, as it does there."""
    before = net.pod.dump()
    done(net.pod, *INJECTED, "-m", "REDIRECT", *backend)
    listener = '[[listener]]\nsource = "proxy"\nintercept = { via = "redirect" }\n'
    with Daemon(net.pod, listener, install=False):
        pair = net.pair(family)
        assert pair.app.getpeername()[0] == ("::6" if family is V6 else "127.0.0.6")
        pair.app.sendall(b"pong")
        assert pair.client.recv(4) == b"pong"
    done(net.pod, "--cleanup-only")
    assert net.pod.dump() == before


def test_twice_is_harmless(net: Topology, backend: tuple[str, ...]) -> None:
    done(net.pod, *INJECTED, *backend)
    once = net.pod.dump()
    assert done(net.pod, *INJECTED, *backend) == "nothing to change\n"
    done(net.pod, *INJECTED, *backend, "--force-apply")
    assert net.pod.dump() == once


def test_variables_alone(net: Topology) -> None:
    done(net.pod, *INJECTED)
    by_flags = net.pod.dump()
    done(net.pod, "--cleanup-only")
    done(
        net.pod,
        ENVOY_PORT="15001",
        INBOUND_CAPTURE_PORT="15006",
        PROXY_UID="1337",
        PROXY_GID="1337",
        ISTIO_INBOUND_INTERCEPTION_MODE="TPROXY",
        ISTIO_SERVICE_CIDR="*",
        ISTIO_SERVICE_EXCLUDE_CIDR="",
        ISTIO_INBOUND_PORTS="*",
        ISTIO_LOCAL_EXCLUDE_PORTS="15090,15021,15020",
        ISTIO_INBOUND_TPROXY_MARK="0x539",
    )
    assert net.pod.dump() == by_flags


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "NONE"],
        ["-b", "http"],
        ["--no-such-flag"],
        ["--iptables-trace-logging"],
        ["--cni-mode"],
        ["-t", "1338"],
    ],
    ids=" ".join,
)
def test_wrong_words_touch_nothing(net: Topology, words: list[str]) -> None:
    before = net.pod.dump()
    found = istio_iptables(net.pod, *INJECTED, *words)
    assert found.returncode == 2
    assert words[0] in found.stderr
    assert "Traceback" not in found.stderr
    assert net.pod.dump() == before


@pytest.mark.parametrize("mode", ["TPROXY", "REDIRECT"])
def test_dry_run_is_what_iptables_restore_reads(net: Topology, mode: str) -> None:
    words = (*INJECTED, "-m", mode, "--force-iptables-binary", "nft")
    before = net.pod.dump()
    text = done(net.pod, *words, "--dry-run")
    assert net.pod.dump() == before
    for command in "iptables-nft-restore", "ip6tables-nft-restore":
        net.pod.run(command, "--noflush", stdin=text)
    by_hand = net.pod.run("iptables-nft-save"), net.pod.run("ip6tables-nft-save")
    net.pod.nft("flush ruleset")
    done(net.pod, *words)
    by_us = net.pod.run("iptables-nft-save"), net.pod.run("ip6tables-nft-save")
    assert [_rules(each) for each in by_us] == [_rules(each) for each in by_hand]
    routes = "ip -4 rule add", "ip -6 rule add", "ip -4 route add local", "ip -6 route add local"
    for command in routes:
        assert (command in text) == (mode == "TPROXY")


def _rules(saved: str) -> list[str]:
    """iptables-save without remarks, which have the time, counters, and the empty chains that say
    what was not there before.
    """
    remarks = ("#", ":TPROXYD_MADE_")
    lines = [each for each in saved.splitlines() if not each.startswith(remarks)]
    return [each.partition(" [")[0] if each.startswith(":") else each for each in lines]


def test_drift_is_healed_and_reconcile_false_forbids_it(net: Topology) -> None:
    done(net.pod, *INJECTED)
    as_asked = net.pod.dump()
    words = (*INJECTED, "-d", "15090")
    found = istio_iptables(net.pod, *words, "--reconcile=false")
    assert found.returncode == 1
    assert "--reconcile=false" in found.stderr
    assert net.pod.dump() == as_asked
    done(net.pod, *words)
    assert net.pod.dump() != as_asked
    done(net.pod, *INJECTED, "--reconcile=false", "-d", "15090")  # as it stands
    net.pod.run("ip", "-4", "rule", "del", "fwmark", "1337")
    net.pod.run("ip", "-6", "rule", "del", "fwmark", "1337")
    done(net.pod, *INJECTED, "--reconcile")
    assert net.pod.dump() == as_asked


def test_lists_of_ports_and_their_exclusions(net: Topology) -> None:
    """-d counts for a list as well, which istio-iptables passes over."""
    done(net.pod, *INJECTED, "-b", f"{PORT},8080", "-d", "8080")
    with Daemon(net.pod, install=False) as daemon:
        assert net.pair().app.getpeername()[0] == V4.client
        other = net.keep(net.pod.listen("0.0.0.0", 8080))
        net.keep(net.client.connect(V4.pod, 8080))
        net.keep(other.accept()[0])
        assert daemon.metric("tproxyd_connections_active") == 1


def test_another_mark_and_table(net: Topology, family: Family) -> None:
    before = net.pod.dump()
    done(net.pod, *INJECTED, "-t", "0x1234", "-r", "99")
    assert "fwmark 0x1234" in net.pod.run("ip", "rule")
    with Daemon(net.pod, "mark = 0x1234\ntable = 99\n", install=False):
        assert net.pair(family).app.getpeername()[0] == family.client
    done(net.pod, "--cleanup-only")
    assert net.pod.dump() == before


def test_in_the_group_of_the_proxy(net: Topology) -> None:
    """As Istio runs its proxy in TPROXY mode: not as the user, in the group."""
    done(net.pod, *INJECTED)
    prefix = ("setpriv", "--regid", "1337", "--clear-groups")
    with Daemon(net.pod, install=False, prefix=prefix):
        assert net.pair().app.getpeername()[0] == V4.client


def test_in_another_namespace_by_its_path(net: Topology) -> None:
    before = net.client.dump()
    path = f"/run/netns/{net.pod.name}"
    done(net.client, *INJECTED, "--network-namespace", path, "--cni-mode")
    assert net.client.dump() == before
    serves(net, V4)
    assert istio_iptables(net.client, "--network-namespace", "/nowhere").returncode == 3


@NEEDS_LEGACY
def test_cni_mode_does_not_wait_for_the_lock_of_the_host(net: Topology) -> None:
    with Path("/run/xtables.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = f"/run/netns/{net.pod.name}"
        words = ("--network-namespace", path, "--cni-mode", *LEGACY)
        assert "legacy" in done(net.client, *INJECTED, *words)


def test_without_ipv6(net: Topology) -> None:
    net.pod.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    done(net.pod, *INJECTED)
    serves(net, V4)
    assert done(net.pod, *INJECTED) == "nothing to change\n"


def test_ipv6_is_taken_though_the_first_address_is_not(net: Topology) -> None:
    """The pod's first address is an IPv4 one, where istio-iptables without --dual-stack stops."""
    done(net.pod, *INJECTED, "--dual-stack=false")
    serves(net, V6)


# In the very place of istio-iptables --------------------------------------------------------------

# What that program leaves in a namespace, as far as it has no name; the rule of two runs.
LEFT = (
    "ip -4 rule add fwmark 1337 lookup 133",
    "ip -4 rule add priority 30000 fwmark 1337 lookup 133",
    "ip -6 rule add fwmark 1337 lookup 133",
    "ip -4 route add local default dev lo table 133",
    "ip -6 route add local default dev lo table 133",
    "ip -6 addr add ::6/128 dev lo",
)
# And what is not of its shape.
OTHERS = (
    "ip -4 rule add priority 100 fwmark 1337/0xffff lookup 133",
    "ip -4 rule add priority 101 from 10.9.1.2 fwmark 1337 lookup 133",
    "ip -4 rule add priority 102 fwmark 1337 lookup 134",
    "ip -4 rule add priority 103 protocol 99 fwmark 1337 lookup 133",
    "ip -4 route add local 198.51.100.0/24 dev lo table 133",
    "ip -4 route add default dev p0 table 134",
    "ip -6 addr add ::7/128 dev lo",
)


def leave_chains(net: Topology, words: tuple[str, ...]) -> None:
    """Chains as istio-iptables has made them: without our marks on them."""
    text = done(net.pod, *words, "--force-iptables-binary", "nft", "--dry-run")
    lines = [each for each in text.splitlines() if "TPROXYD" not in each]
    plain = "\n".join(lines).replace(" -m comment --comment tproxyd", "") + "\n"
    assert "ISTIO_INBOUND" in plain
    assert "tproxyd" not in plain.lower()
    for command in "iptables-nft-restore", "ip6tables-nft-restore":
        net.pod.run(command, "--noflush", stdin=plain)


def test_what_istio_iptables_left_goes_and_nothing_else(net: Topology) -> None:
    for each in OTHERS:
        net.pod.run(*each.split())
    before = _without_tables(net.pod.dump())
    for each in LEFT:
        net.pod.run(*each.split())
    leave_chains(net, INJECTED)
    assert "remove istio-iptables' ip -4 rule" in done(net.pod, "--cleanup-only", "--dry-run")
    done(net.pod, "--cleanup-only")
    assert _without_tables(net.pod.dump()) == before
    assert done(net.pod, "--cleanup-only") == "nothing to remove\n"


def test_marks_of_others_stay(net: Topology) -> None:
    """Saved, restored and passed over as istio-iptables does it with its own."""
    theirs = (
        "PREROUTING -p tcp -m mark --mark 0x77 -j CONNMARK --save-mark",
        "OUTPUT -p tcp -m connmark --mark 0x88 -j CONNMARK --restore-mark",
        "OUTPUT -o tun0 -p tcp -m mark --mark 0x539 -j RETURN",
    )
    for each in theirs:
        net.pod.run("iptables-nft", "-t", "mangle", "-A", *each.split())
    before = net.pod.run("iptables-nft-save", "-t", "mangle")
    leave_chains(net, INJECTED)
    assert net.pod.run("iptables-nft-save", "-t", "mangle") != before
    done(net.pod, "--cleanup-only")
    assert _rules(net.pod.run("iptables-nft-save", "-t", "mangle")) == _rules(before)


def test_installs_in_the_place_of_istio_iptables(net: Topology, family: Family) -> None:
    for each in LEFT:
        net.pod.run(*each.split())
    leave_chains(net, INJECTED)
    found = istio_iptables(net.pod, *INJECTED, "--reconcile=false")
    assert found.returncode == 1
    done(net.pod, *INJECTED)
    assert done(net.pod, *INJECTED) == "nothing to change\n"
    assert net.pod.run("ip", "rule").count("lookup 133") == 1
    serves(net, family)


def test_what_works_stays_where_nothing_can_be_installed(net: Topology, tmp_path: Path) -> None:
    """Without its rule and route, what the chains intercept would be lost."""
    for each in LEFT:
        net.pod.run(*each.split())
    for each in ("-N ISTIO_INBOUND", "-A PREROUTING -p tcp -j ISTIO_INBOUND"):
        net.pod.run("iptables-legacy", "-t", "mangle", *each.split())
    before = net.pod.dump()
    (tmp_path / "iptc.py").write_text("raise ImportError(\"No module named 'iptc'\")\n")
    found = istio_iptables(net.pod, *INJECTED, PYTHONPATH=str(tmp_path))
    assert (found.returncode, found.stdout) == (3, "")
    assert "No module named 'iptc'" in found.stderr
    assert net.pod.dump() == before


def _without_tables(dump: str) -> str:
    """Empty tables of iptables stay where others have made them, and do nothing."""
    return dump.partition("$ ip -4 rule show")[2]


# The validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["TPROXY", "REDIRECT"])
def test_validation(net: Topology, backend: tuple[str, ...], mode: str) -> None:
    before = net.pod.dump()
    told = done(net.pod, *INJECTED, "-m", mode, *backend, "--run-validation")
    seen = ("192.0.2.1", "2001:db8::1") if mode == "TPROXY" else ("127.0.0.6", "::6")
    lines = [each for each in told.splitlines() if each.startswith("validated: ")]
    for line, source, version in zip(lines, seen, (4, 6), strict=True):
        assert line.startswith(f"validated: IPv{version}, over a wire: ")
        assert line.endswith(f"; the application saw {source}, and its answer came back")
    done(net.pod, "--cleanup-only")
    assert net.pod.dump() == before  # the wire is gone too


def test_the_wire_of_a_killed_validation_goes(net: Topology) -> None:
    before = net.pod.run("ip", "link")
    net.pod.ip("link add tproxyd-near type veth peer name tproxyd-far")
    done(net.pod, *INJECTED, "--run-validation")
    assert net.pod.run("ip", "link") == before
    net.pod.ip("link add tproxyd-near type veth peer name tproxyd-far")
    assert "remove tproxyd-near" in done(net.pod, "--cleanup-only")
    assert net.pod.run("ip", "link") == before


BREAKS = {
    "no-rules": "",
    "no-rule": "ip rule del fwmark 1337",
    "no-route": "ip route flush table 133",
    "no-rules-v6": "ip -6 rule del fwmark 1337",
}


@pytest.mark.parametrize("how", BREAKS)
def test_validation_finds_what_is_broken(net: Topology, how: str) -> None:
    done(net.pod, *INJECTED, "--native-nftables")
    if BREAKS[how]:
        net.pod.run(*BREAKS[how].split())
    else:
        net.pod.nft("flush ruleset")
    before = net.pod.dump()
    words = ("--run-validation", "--skip-rule-apply", "--probe-timeout", "300ms")
    found = istio_iptables(net.pod, *INJECTED, *words)
    assert found.returncode == 126  # Istio's own, which its CNI repair looks for
    assert f"IPv{6 if 'v6' in how else 4}, over a wire" in found.stderr
    assert net.pod.dump() == before


def as_user(user: int, group: int, *capabilities: str) -> tuple[str, ...]:
    held = "-all" + "".join(f",+{each}" for each in capabilities)
    return (
        *("setpriv", "--reuid", str(user), "--regid", str(group), "--clear-groups"),
        *("--inh-caps", held, "--ambient-caps", held, "--bounding-set", held),
    )


@pytest.fixture
def readable() -> None:
    """The source tree must be readable by other users."""
    if not all(os.stat(each).st_mode & 0o001 for each in [ROOT, *ROOT.parents]):
        pytest.skip("other users can't read the source tree")
    if not os.stat(Path(sys.executable).resolve()).st_mode & 0o001:
        pytest.skip("other users can't run this Python")


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("who", "way"),
    [
        (as_user(1000, 1000, "net_raw"), "over lo, as a call of the proxy's: "),
        (as_user(1337, 1337), "over lo, by nat only: "),  # the istio-validation container
    ],
    ids=["net_raw", "proxy"],
)
def test_validation_with_less(net: Topology, who: tuple[str, ...], way: str) -> None:
    done(net.pod, *INJECTED)
    net.pod.ip(f"route add default via {V4.client}", f"route add default via {V6.client}")
    words = (*INJECTED, "--run-validation", "--skip-rule-apply", "--probe-timeout", "300ms")
    found = istio_iptables(net.pod, *words, prefix=who)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(way) == 2
    done(net.pod, "--cleanup-only")
    assert istio_iptables(net.pod, *words, prefix=who).returncode == 126


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("who", "said"),
    [
        (as_user(1000, 1337), "or to run as the user of the proxy"),
        (as_user(1337, 1337, "net_raw", "net_admin"), "run as another user of group 1337"),
    ],
    ids=["nothing", "as-the-proxy"],
)
def test_validation_says_what_it_lacks(net: Topology, who: tuple[str, ...], said: str) -> None:
    done(net.pod, *INJECTED)
    words = (*INJECTED, "--run-validation", "--skip-rule-apply", "--probe-timeout", "300ms")
    found = istio_iptables(net.pod, *words, prefix=who)
    assert found.returncode == 126
    assert said in found.stderr


def test_validation_while_the_proxy_runs(net: Topology) -> None:
    done(net.pod, *INJECTED)
    with Daemon(net.pod, install=False):
        found = istio_iptables(net.pod, *INJECTED, "--run-validation", "--skip-rule-apply")
    assert found.returncode == 126
    assert "validate before the proxy runs" in found.stderr
