"""The units, run by systemd itself: a machine boots, and everything here happens inside it.

One boot serves all of these tests; each finds the service running, and leaves it so.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from lib.figures import Figure
from lib.machine import Machine
from lib.streams import receive
from lib.topology import V4, Family, Pair, Topology, seen_port
from lib.waits import wait_for

from tproxyd.flow import journal

DAEMON, RULES = "tproxyd.service", "tproxyd-rules.service"
CONFIG = "/etc/tproxyd/tproxyd.toml"
CAP_NET_RAW, CAP_NET_ADMIN = 1 << 13, 1 << 12
CAPS = CAP_NET_RAW | CAP_NET_ADMIN | 1 << 10  # and NET_BIND_SERVICE
# Systemd takes the unit's own settings for this long; a test does not have that much time.
WATCHDOG = "[Service]\nWatchdogSec=3\n"


@pytest.fixture(scope="module")
def installed() -> Iterator[Machine]:
    with Machine() as machine:
        machine.install()
        yield machine


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    installed.systemctl("start", "tproxyd")
    installed.turn_page()
    try:
        yield installed
    except BaseException as error:
        error.add_note("\n".join(installed.journal()[-60:]))
        raise
    finally:
        installed.sh("rm -rf /run/systemd/system/tproxyd*.d; systemctl daemon-reload")
        installed.sh(
            f"systemctl reset-failed; cp /usr/local/share/doc/tproxyd/tproxyd.toml {CONFIG}"
        )
        installed.systemctl("restart", "tproxyd-rules", "tproxyd")


def speak(pair: Pair) -> None:
    """Both ways, so the connection lives."""
    pair.client.sendall(b"question")
    assert receive(pair.app, 8) == b"question"
    pair.app.sendall(b"answer")
    assert receive(pair.client, 6) == b"answer"


def through(net: Topology, family: Family = V4) -> Pair:
    """A connection that has gone through the proxy: the application sees the client, and where the
    client's port is moved to.
    """
    pair = net.pair(family)
    host, port = pair.app.getpeername()[:2]
    assert (host, port) == (family.client, seen_port(pair.client.getsockname()[1]))
    speak(pair)
    return pair


def refused(net: Topology) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        net.connect().close()
        return False
    return net.app_saw_nothing()


def drop_in(machine: Machine, text: str, *units: str) -> None:
    for unit in units or (DAEMON,):
        where = f"/run/systemd/system/{unit}.d"
        machine.sh(f"mkdir -p {where}; cat >{where}/test.conf <<'END'\n{text}\nEND\n")
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "tproxyd")


def process(machine: Machine, pid: int) -> dict[str, str]:
    lines = machine.path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


class Visitors:
    """Clients that come all the time, and how each got on: the application tells him his port."""

    def __init__(self, net: Topology) -> None:
        self._net = net
        self.ended: Counter[str] = Counter()
        self._over = threading.Event()
        self._app = threading.Thread(target=self._serve, args=(net.app(),), daemon=True)
        self._clients = threading.Thread(target=self._come, daemon=True)

    def __enter__(self) -> Visitors:
        self._app.start()
        self._clients.start()
        self.wait_served()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._clients.join()
        self._app.join()

    def wait_served(self) -> None:
        """Somebody more was served."""
        before = self.ended["served"]
        wait_for(lambda: self.ended["served"] > before, "a client to be served", 30)

    def _serve(self, listener: socket.socket) -> None:
        listener.settimeout(0.1)
        while not self._over.is_set() or self._clients.is_alive():
            with contextlib.suppress(TimeoutError):
                sock, (_, port) = listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.sendall(f"{port:5}".encode())

    def _come(self) -> None:
        while not self._over.wait(0.002):
            self.ended[self._one()] += 1

    def _one(self) -> str:
        try:
            with self._net.client.connect(V4.pod, 80) as sock:
                own = sock.getsockname()[1]
                told = sock.recv(5)
        except OSError as error:
            return type(error).__name__
        if not told:
            return "closed"
        return "served" if int(told) == seen_port(own) else f"around the proxy: {own} is {told!r}"

    def told(self) -> str:
        return ", ".join(f"{count} {how}" for how, count in self.ended.most_common())


# Start and stop -----------------------------------------------------------------------------------


def test_it_serves(machine: Machine, family: Family) -> None:
    assert machine.active(DAEMON) == machine.active(RULES) == "active"
    assert machine.show(DAEMON, "StatusText") == "Serving"  # it came with READY=1
    through(machine.net, family)


def test_units_are_clean(machine: Machine) -> None:
    where = "/usr/local/lib/systemd/system"
    done = machine.try_run("systemd-analyze", "verify", f"{where}/{DAEMON}", f"{where}/{RULES}")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_privileges(machine: Machine) -> None:
    main = process(machine, machine.main_pid())
    assert int(main["CapPrm"], 16) == int(main["CapBnd"], 16) == CAPS
    assert (
        int(main["CapEff"], 16) == CAPS & ~CAP_NET_ADMIN
    )  # which the keeper of the rules takes up
    for pid in machine.workers():
        worker = process(machine, pid)
        assert int(worker["CapEff"], 16) == int(worker["CapPrm"], 16) == CAP_NET_RAW
        assert int(worker["CapAmb"], 16) == 0
    uid = machine.run("id", "-u", "tproxyd").strip()
    for pid in (machine.main_pid(), *machine.workers()):
        told = process(machine, pid)
        assert set(told["Uid"].split()) == {uid}
        assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")


def test_the_rules_outlive_the_daemon(machine: Machine) -> None:
    rules = machine.run("nft", "-a", "list", "table", "inet", "tproxyd")
    machine.systemctl("stop", "tproxyd")
    assert (machine.active(DAEMON), machine.active(RULES)) == ("inactive", "active")
    assert refused(machine.net)
    assert machine.run("nft", "-a", "list", "table", "inet", "tproxyd") == rules
    machine.systemctl("start", "tproxyd")
    through(machine.net)


def test_stopping_the_rules_stops_the_daemon_first(machine: Machine) -> None:
    machine.systemctl("stop", "tproxyd-rules")
    assert (machine.active(DAEMON), machine.active(RULES)) == ("inactive", "inactive")
    at = "ActiveExitTimestampMonotonic"
    assert int(machine.show(DAEMON, "InactiveEnterTimestampMonotonic")) <= int(
        machine.show(RULES, at)
    )
    assert "tproxyd" not in machine.run("nft", "list", "ruleset")
    assert "lookup 133" not in machine.run("ip", "rule")
    pair = machine.net.pair()  # nobody is in between
    assert pair.app.getpeername() == pair.client.getsockname()


def test_a_wrong_configuration_is_not_tried_again(machine: Machine) -> None:
    machine.systemctl("stop", "tproxyd")
    machine.sh(f"echo 'marc = 1' >{CONFIG}")
    assert machine.try_run("systemctl", "start", "tproxyd").returncode != 0
    assert machine.active(DAEMON) == "failed"
    assert machine.show(DAEMON, "ExecMainStatus") == "2"
    assert machine.show(DAEMON, "NRestarts") == "0"
    assert any("marc: unknown key" in line for line in machine.journal())


def test_iptables_works_for_that_user(machine: Machine) -> None:
    machine.sh(f'sed -i \'s/^backend = "auto"/backend = "iptables-nft"/\' {CONFIG}')
    machine.systemctl("restart", "tproxyd-rules")  # and the daemon, which needs them
    wait_for(lambda: machine.active(DAEMON) == "active", "the daemon")
    assert "TPROXYD" in machine.run("iptables-nft-save", "-t", "mangle")
    through(machine.net)


def test_connections_are_entries_of_the_journal(machine: Machine) -> None:
    machine.sh(f"sed -i 's/^access = .*/access = \"journal\"/' {CONFIG}")
    machine.systemctl("reload", "tproxyd")
    pair = through(machine.net)
    host, port = pair.client.getsockname()
    pair.client.close()
    pair.app.close()
    by = (f"TPROXYD_CLIENT={host}", f"TPROXYD_CLIENT_PORT={port}")

    def told() -> str:
        return machine.run("journalctl", "--no-pager", "-o", "json", "-t", "tproxyd", *by).strip()

    entry = json.loads(wait_for(told, "the entry"))
    assert entry["_SYSTEMD_UNIT"] == DAEMON
    assert (entry["MESSAGE_ID"], entry["PRIORITY"]) == (journal.MESSAGE_ID, "6")
    assert entry["TPROXYD_CLOSE_REASON"] == "downstream_fin"
    assert entry["TPROXYD_BYTES_RECEIVED"] == str(len(b"question"))


def test_an_entry_that_is_larger_than_a_datagram(machine: Machine) -> None:
    """It goes as a sealed file, which only the journal itself can say that it takes."""
    script = (
        "from tproxyd.flow.journal import JournalWriter\n"
        "lost = []\n"
        "writer = JournalWriter('/run/systemd/journal/socket', print, lost.append)\n"
        "writer.write(b'SYSLOG_IDENTIFIER=tproxyd-large\\nMESSAGE=' + b'x' * 500_000 + b'\\n')\n"
        "writer.close()\n"
        "assert not lost\n"
    )
    machine.run("env", "PYTHONPATH=/src", "python3", "-c", script)

    def arrived() -> str:
        return machine.run("journalctl", "--no-pager", "-o", "cat", "-a", "-t", "tproxyd-large")

    assert wait_for(arrived, "the entry").strip() == 500_000 * "x"


def test_it_comes_at_boot_and_goes_at_shutdown(machine: Machine) -> None:
    machine.systemctl("enable", "tproxyd")
    plan = machine.run("systemctl", "list-dependencies", "--plain", "multi-user.target")
    assert DAEMON in plan
    order = machine.show(RULES, "After").split()
    assert {"network-pre.target", "nftables.service", "firewalld.service"} <= set(order)
    assert "network.target" in machine.show(RULES, "Before").split()
    assert {"shutdown.target"} <= set(machine.show(RULES, "Conflicts").split())
    machine.systemctl("disable", "tproxyd")


# What goes wrong ----------------------------------------------------------------------------------


def test_crash(machine: Machine, figure: Figure) -> None:
    """Nothing goes around the proxy; systemd starts it again; the rules do not notice."""
    since = machine.show(RULES, "ActiveEnterTimestampMonotonic")
    before = machine.main_pid()
    with Visitors(machine.net) as visitors:
        machine.kill(signal.SIGKILL, before)
        wait_for(lambda: machine.main_pid() not in (0, before), "the next process", 30)
        wait_for(lambda: machine.active(DAEMON) == "active", "it to be ready", 30)
        visitors.wait_served()
    assert not [how for how in visitors.ended if "around" in how]
    assert machine.show(DAEMON, "NRestarts") == "1"
    assert machine.show(RULES, "ActiveEnterTimestampMonotonic") == since
    figure(f"SIGKILL of the main process: {visitors.told()}")
    through(machine.net)


@pytest.mark.parametrize(
    "harm",
    [
        "nft flush ruleset",
        "ip rule del lookup 133",
        "echo 0 >/proc/sys/net/ipv4/tcp_fwmark_accept",
        "ip route flush table 133",
    ],
)
def test_the_daemon_may_heal_from_inside_its_sandbox(machine: Machine, harm: str) -> None:
    kernel = machine.net.pod.dump()
    machine.sh(harm)
    wait_for(lambda: machine.net.pod.dump() == kernel, "the kernel state to be whole again")
    through(machine.net)


def test_a_hung_worker_is_replaced(machine: Machine) -> None:
    main, (hung, *_) = machine.main_pid(), machine.workers()
    machine.kill(signal.SIGSTOP, hung)
    wait_for(lambda: hung not in machine.workers(), "another worker in its place", 30)
    assert any("does not answer for" in line for line in machine.journal())
    assert machine.main_pid() == main
    through(machine.net)


@pytest.mark.parametrize("who", ["the main process", "every worker"])
def test_when_nobody_serves_systemd_starts_it_anew(machine: Machine, who: str) -> None:
    drop_in(machine, WATCHDOG)
    main = machine.main_pid()
    for pid in [main] if who == "the main process" else machine.workers():
        machine.kill(signal.SIGSTOP, pid)
    wait_for(lambda: machine.main_pid() not in (0, main), "the next process", 30)
    wait_for(lambda: machine.active(DAEMON) == "active", "it to be ready", 30)
    said = machine.journal()
    assert any("Watchdog timeout" in line for line in said)
    assert any("Fatal Python error: Aborted" in line for line in said)  # and where it was
    through(machine.net)


def test_it_is_left_alone_while_it_serves(machine: Machine) -> None:
    drop_in(machine, WATCHDOG)
    main = machine.main_pid()
    fed = [machine.show(DAEMON, "WatchdogTimestampMonotonic")]
    wait_for(
        lambda: _new(fed, machine.show(DAEMON, "WatchdogTimestampMonotonic")) > 4, "WATCHDOG=1"
    )
    assert machine.main_pid() == main


def _new(seen: list[str], now: str) -> int:
    if now != seen[-1]:
        seen.append(now)
    return len(seen)


# No connection lost -------------------------------------------------------------------------------


def test_restart(machine: Machine, figure: Figure) -> None:
    """The sockets wait in systemd's keeping: nobody is refused, and open connections live on."""
    main, old = machine.main_pid(), through(machine.net)
    rules = machine.run("nft", "-a", "list", "table", "inet", "tproxyd")
    with Visitors(machine.net) as visitors:
        for _ in range(3):
            machine.systemctl("restart", "tproxyd")
            visitors.wait_served()
    assert machine.main_pid() != main
    figure(f"3 restarts: {visitors.told()}")
    assert visitors.ended.keys() == {"served"}
    speak(old)
    assert machine.run("nft", "-a", "list", "table", "inet", "tproxyd") == rules


def test_reload(machine: Machine, figure: Figure) -> None:
    main, old = machine.main_pid(), through(machine.net)
    with Visitors(machine.net) as visitors:
        machine.sh(f"sed -i 's/^max_connections = 0/max_connections = 5000/' {CONFIG}")
        machine.systemctl("reload", "tproxyd")
        visitors.wait_served()
    figure(f"a reload: {visitors.told()}")
    assert visitors.ended.keys() == {"served"}
    assert machine.main_pid() == main
    assert machine.status()["reload"]["done"] == 1
    speak(old)


def test_a_reload_of_nonsense_fails_and_the_old_one_goes_on(machine: Machine) -> None:
    main = machine.main_pid()
    machine.sh(f"echo 'marc = 1' >{CONFIG}")
    assert machine.try_run("systemctl", "reload", "tproxyd").returncode != 0
    assert (machine.active(DAEMON), machine.main_pid()) == ("active", main)
    assert "marc: unknown key" in machine.status()["reload"]["error"]
    assert any("marc: unknown key" in line for line in machine.journal())
    through(machine.net)


def test_upgrade_to_another_version(machine: Machine, figure: Figure) -> None:
    """The program is replaced beneath the running daemon; then it hands over to the new one."""
    main, old = machine.main_pid(), through(machine.net)
    version = machine.status()["version"]
    machine.sh(
        "cp -r /src/. /tmp/next && sed -i 's/^__version__ = .*/__version__ = \"9.9.9\"/'"
        " /tmp/next/tproxyd/__init__.py"
    )
    try:
        said = machine.run("/tmp/next/scripts/install")
        assert "the running daemon is still the old one" in said
        assert "stays: a daemon runs it" in said
        assert (machine.main_pid(), machine.status()["version"]) == (main, version)
        through(machine.net)
        # The new one opens sockets of its own, too, and leaves them with systemd before it is known
        # as the main process (NotifyAccess=).
        machine.sh(f"sed -i 's/^workers = 0/workers = 5/' {CONFIG}")
        with Visitors(machine.net) as visitors:
            machine.run("tproxyd", "upgrade")
            wait_for(lambda: machine.main_pid() not in (0, main), "systemd to know the new one")
            visitors.wait_served()
        figure(f"an upgrade: {visitors.told()}")
        assert visitors.ended.keys() == {"served"}
        assert machine.status()["version"] == "9.9.9"
        assert machine.active(DAEMON) == "active"
        assert machine.show(DAEMON, "NRestarts") == "0"
        speak(old)
        assert machine.show(DAEMON, "NFileDescriptorStore") == "10"  # IPv4 and IPv6 of each
        # systemd notices the end of the new one as it would have that of the first.
        main = machine.main_pid()
        machine.kill(signal.SIGKILL, main)
        wait_for(lambda: machine.main_pid() not in (0, main), "the next process", 30)
    finally:
        machine.install()
        machine.sh("rm -r /tmp/next")


# Legacy tables ------------------------------------------------------------------------------------


def test_legacy_tables_as_the_unit_says(machine: Machine) -> None:
    """With the drop-in that its comments give, word for word."""
    unit = machine.path(f"/usr/local/lib/systemd/system/{RULES}").read_text()
    advice = unit.partition("then, by systemctl edit")[2].partition("[Service]")[2]
    lines = [
        line.removeprefix("#").strip() for line in advice.partition("\nUser=tproxyd")[0].split("\n")
    ]
    machine.install("--with", "legacy")
    try:
        machine.sh(f'sed -i \'s/^backend = "auto"/backend = "iptables-legacy"/\' {CONFIG}')
        drop_in(machine, "\n".join(("[Service]", *lines)), DAEMON, RULES)
        machine.systemctl("restart", "tproxyd-rules")
        wait_for(lambda: machine.active(DAEMON) == "active", "the daemon")
        assert "TPROXYD" in machine.run("iptables-legacy-save", "-t", "mangle")
        through(machine.net)
        machine.run("iptables-legacy", "-t", "mangle", "-F")
        wait_for(lambda: machine.status()["kernel"]["heals"], "the daemon to heal it")
        through(machine.net)
        machine.systemctl("stop", "tproxyd-rules")
        assert "TPROXYD" not in machine.run("iptables-legacy-save", "-t", "mangle")
    finally:
        machine.install()


# Hardening ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [DAEMON, RULES])
def test_exposure(machine: Machine, unit: str, figure: Figure) -> None:
    """2.0 at most, of 10."""
    told = machine.try_run("systemd-analyze", "security", "--no-pager", "--threshold=20", unit)
    (level,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", told.stdout)
    figure(f"systemd-analyze security {unit}: {level}")
    assert told.returncode == 0, told.stdout
