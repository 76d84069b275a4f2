"""What each backend writes and leaves: around what others have there, and by whatever hand."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lib.backends import BACKENDS, dump, rules
from lib.daemon import ROOT, TPROXYD, tproxyd
from lib.netns import Namespace
from lib.waits import stays, wait_for

from tproxyd import doctor
from tproxyd.config import Backend, Config, Intercept, Listener, Rules, Scheme, Scope, Via
from tproxyd.istio.options import ALL, IstioOptions, Mode
from tproxyd.kernel import iptables, legacy, reconcile, xtables
from tproxyd.kernel.desired import backend as choose
from tproxyd.kernel.firewall import Family

OUTBOUND = Intercept(Scope.OUTBOUND, Via.REDIRECT, exclude_uids=(1337, 1400))
LISTENERS = {
    "sidecar": (Listener(),),
    "router": (Listener(intercept=Intercept(Scope.FORWARD, interfaces=("eth0", "veth*"))),),
    "outbound": (Listener("a"), Listener("b", port=15001, intercept=OUTBOUND)),
}
CONFIGS = [
    *(Config(listeners=listeners) for listeners in LISTENERS.values()),
    *(
        Config(rules=Rules(scheme=Scheme.ISTIO), listeners=LISTENERS[name])
        for name in ("sidecar", "outbound")
    ),
]
NAMES = ["lean-sidecar", "lean-router", "lean-outbound", "istio-sidecar", "istio-outbound"]


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with Namespace("pod") as pod:
        yield pod


@pytest.fixture
def neighbours(pod: Namespace) -> Namespace:
    """Rules of others in every place where ours come."""
    pod.nft(
        "table inet mine {\n set s {\n type ipv4_addr; elements = { 192.0.2.1 }\n }\n"
        " chain c {\n type filter hook prerouting priority mangle;\n ip saddr @s accept\n }\n}\n"
    )
    for command in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
        script = (
            "*mangle\n:MINE - [0:0]\n:POSTROUTING DROP [0:0]\n-A PREROUTING -j MINE\n"
            "-A MINE -p tcp -m tcp --dport 22 -j ACCEPT\n"
            '-A OUTPUT -m comment --comment "not tproxyd" -j RETURN\nCOMMIT\n'
            "*nat\n:ISTIO_MINE - [0:0]\n-A OUTPUT -p tcp -j ISTIO_MINE\nCOMMIT\n"
        )
        pod.run(f"{command}-restore", "--noflush", stdin=script.replace("DROP", "ACCEPT"))
        # Which iptables-save does not quote.
        recent = ("-m", "recent", "--set", "--name", "it's")
        pod.run(command, "-t", "mangle", "-A", "PREROUTING", *recent)
    pod.ip(
        "rule add priority 1337 fwmark 0x10 lookup 133 protocol 7",
        "route add 192.0.2.0/24 dev lo table 133 proto 7",
        "addr add 2001:db8::6/128 dev lo",
    )
    pod.run("ip", "-6", "rule", "add", "priority", "99", "lookup", "133", "protocol", "7")
    return pod


def with_backend(config: Config, backend: str) -> Config:
    return replace(config, rules=replace(config.rules, backend=Backend(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_around_others(neighbours: Namespace, config: Config, backend: str) -> None:
    pod, config = neighbours, with_backend(config, backend)
    before = dump(pod)
    assert pod.inside(reconcile.install, config).changed
    installed = dump(pod)
    assert pod.inside(reconcile.install, config).changed == ()
    assert pod.inside(reconcile.check, config).differs == ()
    assert dump(pod) == installed != before
    for line in before.splitlines():
        assert line in installed or line.startswith("net/ipv")  # sysctls, which have one value
    assert pod.inside(reconcile.clean).changed
    assert dump(pod) == before
    assert pod.inside(reconcile.clean).changed == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_where_nothing_was(pod: Namespace, config: Config, backend: str) -> None:
    before = dump(pod)
    pod.inside(reconcile.install, with_backend(config, backend))
    pod.inside(reconcile.clean)
    assert dump(pod) == before


def test_clean_removes_what_every_backend_left(pod: Namespace) -> None:
    """Three tools have been at work here: each left its own, as text that was loaded by hand."""
    pytest.importorskip("iptc")
    facts = pod.inside(reconcile.facts)
    for name in ("nft", "iptables-nft", "iptables-legacy"):
        text = reconcile.rules(with_backend(CONFIGS[0], name), facts=facts)
        if name == "nft":
            pod.nft(text)
            continue
        for command in ("iptables", "ip6tables"):
            pod.run(command + name.removeprefix("iptables") + "-restore", "--noflush", stdin=text)
    changed = pod.inside(reconcile.clean).changed
    assert len(changed) == 5
    for command in ("iptables-save", "ip6tables-save"):
        assert "TPROXYD" not in pod.run(command.replace("-", "-nft-"))
        assert "TPROXYD" not in pod.run(command.replace("-", "-legacy-"))
    assert "tproxyd" not in pod.run("nft", "list", "ruleset")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_text_is_what_install_makes(pod: Namespace, config: Config, backend: str) -> None:
    config = with_backend(config, backend)
    text = reconcile.rules(config, facts=pod.inside(reconcile.facts))
    if backend == "nft":
        pod.nft(text)
    else:
        for command in ("iptables", "ip6tables"):
            tool = command + backend.removeprefix("iptables")
            pod.run(f"{tool}-restore", "--noflush", "-w", stdin=text)
    differs = pod.inside(reconcile.check, config).differs
    assert not [change for change in differs if "firewall" in change]


# Looking changes nothing --------------------------------------------------------------------------


def test_auto_only_reads(pod: Namespace) -> None:
    before = dump(pod)
    facts = pod.inside(reconcile.facts)
    assert choose(Config(), facts).backend is Backend.NFT
    pod.inside(reconcile.check, Config())
    pod.inside(reconcile.clean)
    assert dump(pod) == before
    assert pod.inside(xtables.names, 4) == pod.inside(xtables.names, 6) == ()


def test_auto_stays_with_legacy_rules(pod: Namespace) -> None:
    pod.run("iptables-legacy", "-t", "nat", "-L")  # which makes the table
    assert pod.inside(xtables.names, 4) == ("nat",)
    assert not pod.inside(reconcile.facts).legacy_rules
    pod.run("ip6tables-legacy", "-A", "INPUT", "-p", "tcp", "-j", "ACCEPT")
    facts = pod.inside(reconcile.facts)
    assert choose(Config(), facts).backend is Backend.IPTABLES_LEGACY
    assert pod.inside(xtables.names, 6) == ("filter",)


def test_an_unchanged_legacy_table_is_read_once(
    pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("iptc")
    config = with_backend(CONFIGS[0], "iptables-legacy")
    pod.inside(reconcile.install, config)

    def no_child(*_: object) -> dict[str, object]:
        raise AssertionError("a process was started")

    monkeypatch.setattr(legacy, "_ask", no_child)
    pod.run("iptables-legacy", "-t", "mangle", "-Z")  # counters are no change
    assert pod.inside(reconcile.check, config).differs == ()
    pod.run("iptables-legacy", "-t", "mangle", "-D", "TPROXYD_OUTPUT", "1")
    with pytest.raises(AssertionError, match="a process was started"):
        pod.inside(reconcile.check, config)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_legacy_tables_are_bit_for_bit_those_of_iptables(pod: Namespace, config: Config) -> None:
    """A listing does not show everything: python-iptables' rules for "lo" once matched "p1"."""
    pytest.importorskip("iptc")
    pod.inside(reconcile.install, with_backend(config, "iptables-legacy"))
    families: tuple[Family, ...] = (4, 6)
    for family in families:
        command = "iptables-legacy" if family == 4 else "ip6tables-legacy"
        names = pod.inside(xtables.names, family)
        assert "mangle" in names
        ours = {name: pod.inside(xtables.content, family, name) for name in names}
        pod.run(f"{command}-restore", stdin=pod.run(f"{command}-save"))
        for name in names:
            assert pod.inside(xtables.content, family, name) == ours[name], name


# What goes wrong ----------------------------------------------------------------------------------


def test_without_python_iptables(
    pod: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tmp_path, "iptc.py").write_text("raise ImportError(\"No module named 'iptc'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = dump(pod)
    done = tproxyd(pod, "install", config=rules("iptables-legacy"))
    assert done.returncode == 3
    assert "No module named 'iptc'; scripts/install --with legacy" in done.stderr
    assert tproxyd(pod, "clean").returncode == 0
    assert dump(pod) == before


def test_without_iptables(pod: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(Exception, match="no iptables-nft-restore; install it: apt install"):
        pod.inside(reconcile.install, with_backend(CONFIGS[0], "iptables-nft"))


def test_the_lock_of_iptables_is_waited_for(pod: Namespace) -> None:
    pytest.importorskip("iptc")
    lock = os.open(legacy.LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = pod.argv(*TPROXYD, "install", "--backend", "iptables-legacy")
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as process:
            wait_for(lambda: "lookup 133" in pod.run("ip", "rule"), "the policy rule")
            stays(lambda: process.poll() is None, "waiting for the lock", 0.5)
            assert pod.inside(xtables.names, 4) == ()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert process.wait(20) == 0
    finally:
        os.close(lock)
    assert "TPROXYD" in pod.run("iptables-legacy-save")


# In the place of istio-iptables -------------------------------------------------------------------

OPTIONS = IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL)
ISTIO_CONFIG = CONFIGS[NAMES.index("istio-sidecar")]


def as_istio_iptables(pod: Namespace, backend: str) -> None:
    """What that program leaves: the same rules without a sign of ours."""
    pod.inside(reconcile.install_istio, OPTIONS, Backend(backend))
    variant = backend.removeprefix("iptables-")
    for command in ("iptables", "ip6tables"):
        saved = pod.run(f"{command}-{variant}-save", "-t", "mangle")
        nat = pod.run(f"{command}-{variant}-save", "-t", "nat")
        theirs = "".join(
            f"{line.replace('-m comment --comment tproxyd ', '')}\n"
            for line in (*saved.splitlines(), *nat.splitlines())
            if "TPROXYD_" not in line
        )
        pod.run(f"{command}-{variant}-restore", stdin=theirs)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_chains_of_istio_iptables(pod: Namespace, backend: str) -> None:
    as_istio_iptables(pod, backend)
    theirs = dump(pod)
    with pytest.raises(Exception, match="another program has made ISTIO_DIVERT"):
        pod.inside(reconcile.install, with_backend(ISTIO_CONFIG, backend))
    pod.inside(reconcile.clean)
    firewall = [line for line in theirs.splitlines() if "ISTIO" in line or "mark" in line]
    after = dump(pod)
    assert all(line in after for line in firewall if not line.startswith(("1337:", "local")))
    report = pod.inside(reconcile.install_istio, OPTIONS, Backend(backend))
    assert any("replace the firewall rules" in change for change in report.changed)
    assert pod.inside(reconcile.install_istio, OPTIONS, Backend(backend)).changed == ()
    as_istio_iptables(pod, backend)
    pod.inside(reconcile.clean_istio, OPTIONS)
    assert "ISTIO" not in dump(pod)
    assert "mark" not in dump(pod).split("tcp_fwmark_accept")[0].replace("fwmark", "")


# Among others, and without the tools of iptables --------------------------------------------------


def test_foreign_tables_of_iptables_need_no_iptables(
    pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that masquerades by nft has a `table ip nat`, and no iptables."""
    pod.nft(
        "table ip nat {\n chain postrouting {\n"
        " type nat hook postrouting priority srcnat; masquerade\n }\n}\n"
    )
    before = dump(pod)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert pod.inside(reconcile.install, CONFIGS[0]).changed
    assert pod.inside(reconcile.check, CONFIGS[0]).differs == ()
    pod.inside(reconcile.clean)
    assert dump(pod) == before


def test_what_iptables_has_made_of_ours_needs_iptables(
    pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says that there is nothing of ours where it cannot be read."""
    pod.inside(reconcile.install, with_backend(CONFIGS[0], "iptables-nft"))
    with monkeypatch.context() as hidden:
        hidden.setattr("shutil.which", lambda *_, **__: None)
        with pytest.raises(Exception, match="there is no iptables-nft-save; install it"):
            pod.inside(reconcile.clean)
        checks = pod.inside(doctor.run, CONFIGS[0], "tproxyd {}".format)
        (said,) = [each for each in checks if each.name == "rules"]
        assert said.verdict == "fail"
        assert said.remedy == "install it: apt install iptables"
    pod.inside(reconcile.clean)
    assert "TPROXYD" not in dump(pod)


def test_foreign_rules_of_iptables_are_not_listed(
    neighbours: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be thousands, and a daemon looks at every change of its namespace."""

    def no_command(*_: object, **__: object) -> str:
        raise AssertionError("iptables was run")

    config = CONFIGS[0]
    neighbours.inside(reconcile.install, with_backend(config, "nft"))
    monkeypatch.setattr(iptables, "_call", no_command)
    assert neighbours.inside(reconcile.check, with_backend(config, "nft")).differs == ()
