"""What others do to the kernel state is put right within a second, and traffic flows again.

The figures are printed; the tests themselves are more patient, for the sake of crowded machines.
"""

from __future__ import annotations

import functools
import signal

import pytest
from lib.backends import BACKENDS, dump, rules
from lib.daemon import Daemon, descendants, tproxyd
from lib.figures import Figure
from lib.heals import figure as took
from lib.heals import healed_after, kernel
from lib.netns import Namespace
from lib.processes import holds, open_files, proportional_kib, resident_kib
from lib.streams import assert_talks
from lib.topology import V4, V6, Topology
from lib.waits import stays, wait_for

FIREWALLD = """
flush ruleset
table inet firewalld {
    chain filter_INPUT {
        type filter hook input priority 10; policy accept;
        ct state invalid drop
    }
}
"""
NFT = {
    "nft flush ruleset": "nft flush ruleset",
    "nft delete table": "nft delete table inet tproxyd",
    "a rule inserted": "nft insert rule inet tproxyd prerouting tcp dport 80 accept",
    "a chain flushed": "nft flush chain inet tproxyd prerouting",
    "a table put to sleep": "nft 'add table inet tproxyd { flags dormant ; }'",
}
ROUTING = {
    "ip rule del": "ip rule del priority 1337",
    "ip -6 rule del": "ip -6 rule del priority 1337",
    "ip route flush table 133": "ip route flush table 133",
    "ip -6 route flush table 133": "ip -6 route flush table 133",
    "a twin of our rule": "ip rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 135",
    "lo down and up": "sh -c 'ip link set lo down && ip link set lo up'",
}
IPTABLES = {
    "iptables -t mangle -F": "{} -t mangle -F",
    "iptables -F and -X": "sh -c '{0} -t mangle -F && {0} -t mangle -X'",
    "a rule deleted": "{} -t mangle -D TPROXYD_OUTPUT 1",
    "a rule inserted": "{} -t mangle -I TPROXYD_PREROUTING -p tcp --dport 80 -j ACCEPT",
}


def shell(pod: Namespace, command: str) -> str:
    return pod.run("sh", "-c", command)


def heals(
    net: Topology, config: str, damages: dict[str, str], say: pytest.CaptureFixture[str]
) -> None:
    """Each of these, one after the other, on one daemon: back to what it was, byte for byte."""
    with Daemon(net.pod, config) as daemon:
        held = net.pair()
        installed = dump(net.pod)
        for what, command in damages.items():
            now, seconds = healed_after(daemon, functools.partial(shell, net.pod, command))
            wait_for(lambda: dump(net.pod) == installed, f"everything after: {what}")
            with say.disabled():
                print(took(what, now, seconds), end="")
            for family in (V4, V6):
                pair = net.pair(family)
                assert_talks(pair)
                assert pair.app.getpeername()[0] == family.client
                pair.client.close()
                pair.app.close()
            assert_talks(held)
            assert daemon.get("/readyz")[0] == 200
        # All of them were the proxy's: a client that reaches the application directly logs nothing.
        daemon.wait_log(2 * len(damages))


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_nft(net: Topology, return_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = f'[rules]\nbackend = "nft"\nreturn_path = "{return_path}"\n'
    heals(net, config, {**NFT, **ROUTING}, capsys)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_iptables(net: Topology, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    tool = f"iptables{backend.removeprefix('iptables')}"
    damages = {what: command.format(tool) for what, command in IPTABLES.items()}
    six = {what: command.replace("iptables-", "ip6tables-") for what, command in damages.items()}
    damages |= {what.replace("iptables", "ip6tables") + ", IPv6": six[what] for what in six}
    heals(net, rules(backend), {**damages, **ROUTING}, capsys)


def test_a_sysctl(net: Topology, capsys: pytest.CaptureFixture[str]) -> None:
    """It sends no event: it is looked at."""
    names = ["net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"]
    heals(net, "", {name: f"sysctl -qw {name}=0" for name in names}, capsys)


def test_a_reload_of_firewalld(net: Topology, capsys: pytest.CaptureFixture[str]) -> None:
    """It flushes everything and makes its own, which stays."""
    with Daemon(net.pod) as daemon:
        for _ in range(3):
            now, seconds = healed_after(daemon, lambda: net.pod.nft(FIREWALLD))
            with capsys.disabled():
                print(took("a reload of firewalld", now, seconds), end="")
            assert_talks(net.pair())
            assert "table inet firewalld" in net.pod.run("nft", "list", "ruleset")


def test_a_legacy_rule_of_somebodys_moves_nothing(net: Topology) -> None:
    """Not even where there is nothing of ours to stay with, since that was flushed."""
    with Daemon(net.pod) as daemon:
        held = net.pair()
        command = "iptables-legacy -A INPUT -p tcp --dport 9 -j ACCEPT"
        net.pod.run(*command.split())
        installed = dump(net.pod)
        healed_after(daemon, lambda: net.pod.run("nft", "flush", "ruleset"))
        wait_for(lambda: dump(net.pod) == installed, "everything as it was")
        assert_talks(held)
        assert_talks(net.pair())
        assert daemon.get("/readyz")[0] == 200


def test_who_did_it_and_what_was_wrong_is_told(net: Topology) -> None:
    with Daemon(net.pod) as daemon:
        now, _ = healed_after(daemon, lambda: net.pod.run("nft", "flush", "ruleset"))
        last = now["last_heal"]
        assert last["wrong"] == ["the firewall rules (nft table inet tproxyd) were gone"]
        assert last["done"] == ["add the firewall rules (nft table inet tproxyd)"]
        (by,) = last["by"]
        assert by.startswith("nft (process ")
        assert f"the kernel state was changed by {by}; healed in " in daemon.stderr
        assert daemon.metric("tproxyd_kernel_drift_total") == 1
        assert daemon.metric("tproxyd_kernel_heals_total", result="healed") == 1
        assert daemon.metric("tproxyd_kernel_heal_seconds_count") == 1
        assert daemon.metric("tproxyd_kernel_heal_seconds_sum") == pytest.approx(last["seconds"])
        assert "healed 1 times; last at " in tproxyd(net.pod, "status").stdout


def test_lo_down_is_told_and_healed_when_it_is_up(
    net: Topology, capsys: pytest.CaptureFixture[str]
) -> None:
    with Daemon(net.pod) as daemon:
        net.pod.ip("link set lo down")
        # The admin port listens on lo, as most people's: so the log is what can be read.
        wait_for(lambda: "lo is down" in daemon.stderr, "the log to say so")
        stays(lambda: daemon.stderr.count("lo is down") == 1, "saying it once", 1.0)
        net.pod.ip("link set lo up")
        wait_for(lambda: daemon.stderr.count("the kernel state is as configured") == 1, "a heal")
        with capsys.disabled():
            print(took("lo up again", kernel(daemon), kernel(daemon)["last_heal"]["seconds"]))
        for family in (V4, V6):
            assert_talks(net.pair(family))
        assert daemon.get("/readyz") == (200, "ok\n")


def test_what_writes_routes_leaves_nothing_behind(net: Topology, figure: Figure) -> None:
    """Who guards stays small: pyroute2 is in another process, and that only while it writes."""

    def at_rest(what: str) -> None:
        keeper = daemon.keeper()
        wait_for(lambda: not descendants(keeper), "an end of who writes routes")
        assert holds(keeper, b"tproxyd/kernel/routewriter.py")  # as every module that is loaded
        assert not holds(keeper, b"pyroute2/iproute/linux.py")
        whole = proportional_kib([daemon.pid, *descendants(daemon.pid)])
        resident = resident_kib(keeper)
        figure(f"{what}: {whole / 1024:.1f} MiB the daemon; {resident / 1024:.1f} its keeper, RSS")

    with Daemon(net.pod, install=False) as daemon:
        wait_for(lambda: "the kernel state is not installed" in daemon.stderr, "a look")
        at_rest("nothing installed")
    with Daemon(net.pod) as daemon:
        files = open_files([daemon.keeper()])
        at_rest("installed")
        for command in ("ip rule del priority 1337", "ip -6 route flush table 133"):
            now, seconds = healed_after(daemon, functools.partial(shell, net.pod, command))
            noticed = now["last_heal"]["seconds"]
            figure(f"{command}: {seconds * 1000:.0f} ms after it, {noticed * 1000:.0f} noticed")
            at_rest(f"after {command}")
        assert open_files([daemon.keeper()]) == files


# What stays ill -----------------------------------------------------------------------------------


def test_a_heal_that_fails_is_told_and_tried_again(
    net: Topology, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program has put its route in the place of ours."""
    with Daemon(net.pod) as daemon:
        net.pod.run(
            *("ip", "-batch", "-"),
            stdin="route del local default dev lo table 133\n"
            "route add local default dev lo table 133 proto 7\n",
        )
        wait_for(lambda: daemon.get("/readyz")[0] == 503, "readyz to say so")
        why = daemon.get("/readyz")[1]
        assert "to do: add ip -4 route local default dev lo table 133" in why
        assert "healing fails: can't add ip -4 route local default dev lo table 133" in why
        assert "another program's is in its place" in why
        assert daemon.metric("tproxyd_kernel_heals_total", result="failed") >= 1
        assert daemon.metric("tproxyd_kernel_drift_total") == 1
        wait_for(
            lambda: daemon.metric("tproxyd_kernel_heals_total", result="failed") >= 4, "more tries"
        )
        assert daemon.stderr.count("healing it fails") == 1

        def out_of_the_way() -> None:
            net.pod.run("ip", "route", "del", "local", "default", "dev", "lo", "table", "133")

        now, seconds = healed_after(daemon, out_of_the_way)
        with capsys.disabled():
            print(took("another program's route gone", now, seconds))
        assert daemon.get("/readyz")[0] == 200
        assert kernel(daemon)["trouble"] == ""


def test_a_fight_is_told_and_gets_slower(net: Topology, capsys: pytest.CaptureFixture[str]) -> None:
    with Daemon(net.pod, "drain_timeout_s = 0.1\n") as daemon:
        undone = 0

        def undo() -> bool:
            nonlocal undone
            if "1337:" in net.pod.run("ip", "rule"):
                net.pod.run("ip", "rule", "del", "priority", "1337")
                undone += 1
            return "another program undoes what is healed" in daemon.stderr

        wait_for(undo, "the log to say so")
        assert kernel(daemon)["heals"] >= 5
        wait_for(lambda: undo() and undone >= 8, "some more rounds", timeout=20)
        with capsys.disabled():
            print(f"\n  a fight: {undone} rounds, then every round twice as long as the last")

        def unready() -> bool:
            undo()
            return daemon.get("/readyz")[0] == 503

        wait_for(unready, "readyz to say so: what was read just before lasts for a second")
        wait_for(lambda: daemon.get("/readyz")[0] == 200, "the heal that nobody undoes", timeout=20)
        assert daemon.stderr.count("another program undoes what is healed") == 1
        assert daemon.stop() == 0


# Who heals ----------------------------------------------------------------------------------------


def test_a_daemon_that_only_runs_does_not_heal(net: Topology) -> None:
    assert tproxyd(net.pod, "install").returncode == 0
    with Daemon(net.pod, install=False) as daemon:
        net.pod.run("nft", "flush", "ruleset")
        wait_for(lambda: daemon.get("/readyz")[0] == 503, "readyz to say so", timeout=20)
        stays(lambda: "tproxyd" not in net.pod.run("nft", "list", "tables"), "keeping off", 1.5)
        assert kernel(daemon)["heals"] == 0


def test_guard_keeps_what_install_made_and_leaves_it(net: Topology) -> None:
    assert tproxyd(net.pod, "install").returncode == 0
    installed = net.pod.dump()
    with Daemon(net.pod, "drain_timeout_s = 0.1\n", guard=True) as daemon:
        healed_after(daemon, lambda: net.pod.run("nft", "flush", "ruleset"))
        assert_talks(net.pair())
        assert daemon.stop() == 0
    assert net.pod.dump() == installed


def test_a_stop_removes_what_is_healed_until_then(net: Topology) -> None:
    """Nothing is put back behind its back, whatever others do meanwhile."""
    before = net.pod.dump()
    with Daemon(net.pod, "drain_timeout_s = 2\n") as daemon:
        pair = net.pair()
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: daemon.has_notified("STOPPING=1"), "STOPPING=1")
        wait_for(lambda: ":15006" not in net.pod.run("nft", "list", "ruleset"), "the first step")
        # What the drain needs is kept meanwhile.
        net.pod.run("ip", "rule", "del", "priority", "1337")
        wait_for(lambda: "1337:" in net.pod.run("ip", "rule"), "the drain's own heal")
        assert_talks(pair)
        assert ":15006" not in net.pod.run("nft", "list", "ruleset")
        pair.client.close()
        pair.app.close()
        assert daemon.process.wait(10) == 0
    assert net.pod.dump() == before
