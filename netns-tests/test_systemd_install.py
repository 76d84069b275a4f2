"""scripts/install on a machine that has never seen tproxyd; what is left when it is taken away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lib.machine import Machine
from lib.topology import seen_port
from lib.waits import wait_for

CONFIG = "/etc/tproxyd/tproxyd.toml"
# What systemd and its journal write at any time; and the backups that useradd and userdel make.
_OTHERS = r"/(run|tmp|var/log/journal|var/lib/systemd|var/tmp)(/.*)?"
_BACKUPS = "^/etc/(passwd|shadow|group|gshadow|subuid|subgid)- "


@pytest.fixture(scope="module")
def booted() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    try:
        yield booted
    finally:
        booted.sh(f"/src/scripts/install --remove || true; rm -rf {CONFIG} /var/log/tproxyd")
        booted.sh("rmdir /etc/tproxyd 2>/dev/null || true")


def files(machine: Machine) -> str:
    """Every name with its kind, mode and owner; and who there is."""
    listed = machine.sh(
        f"find / -xdev -regextype egrep -regex '{_OTHERS}' -prune"
        rf" -o -printf '%p %M %U\n' | grep -vE '{_BACKUPS}'"
    )
    return "\n".join([*sorted(listed.splitlines()), machine.sh("cat /etc/passwd /etc/group")])


def test_nothing_is_left(machine: Machine) -> None:
    """Enabled, started, used, and taken away while it serves."""
    before, kernel = files(machine), machine.net.pod.dump()
    machine.install()
    machine.systemctl("enable", "--now", "tproxyd")
    pair = machine.net.pair()
    assert pair.app.getpeername()[1] == seen_port(pair.client.getsockname()[1])
    machine.install("--remove")
    assert files(machine) == before
    assert machine.net.pod.dump() == kernel
    assert machine.sh("pgrep -f tproxyd || true") == ""
    assert machine.try_run("systemctl", "cat", "tproxyd").returncode != 0
    pair = machine.net.pair()
    assert pair.app.getpeername() == pair.client.getsockname()


def test_an_edited_configuration_is_never_touched(machine: Machine) -> None:
    machine.install()
    machine.sh(f"echo '# mine' >>{CONFIG}")
    mine = machine.path(CONFIG).read_text()
    assert f"{CONFIG} is yours and stays as it is" in machine.install()
    assert f"{CONFIG} is yours and stays" in machine.install("--remove")
    assert machine.path(CONFIG).read_text() == mine
    assert f"{CONFIG} is yours and stays as it is" in machine.install()
    assert machine.path(CONFIG).read_text() == mine


def test_an_unedited_configuration_follows_the_example(machine: Machine) -> None:
    machine.install()
    machine.sh("cp -r /src/. /tmp/next && echo '# new' >>/tmp/next/systemd/tproxyd.toml")
    machine.run("/tmp/next/scripts/install")
    machine.sh("rm -r /tmp/next")
    assert machine.path(CONFIG).read_text().endswith("# new\n")


def test_a_second_run_changes_nothing(machine: Machine) -> None:
    machine.install()
    before = files(machine)
    said = machine.install()
    assert said.splitlines() == [
        "tproxyd: to start it, now and at each boot: systemctl enable --now tproxyd"
    ]
    assert files(machine) == before


def test_access_logs_are_not_thrown_away(machine: Machine) -> None:
    machine.install()
    machine.sh(f"sed -i 's|^access = .*|access = \"/var/log/tproxyd/access\"|' {CONFIG}")
    machine.systemctl("start", "tproxyd")
    for sock in machine.net.pair():
        sock.close()
    log = machine.path("/var/log/tproxyd/access")
    wait_for(lambda: log.exists() and log.read_text(), "a line in the access log")
    assert "/var/log/tproxyd has access logs and stays" in machine.install("--remove")
    assert log.exists()


def test_another_prefix(machine: Machine) -> None:
    before = files(machine)
    machine.install("--prefix", "/opt/proxy")
    assert machine.run("/opt/proxy/sbin/tproxyd", "--version").startswith("tproxyd ")
    machine.systemctl("start", "tproxyd")
    assert machine.run("readlink", f"/proc/{machine.main_pid()}/exe") != ""
    assert "/opt/proxy/" in machine.sh(f"tr '\\0' ' ' </proc/{machine.main_pid()}/cmdline")
    machine.install("--prefix", "/opt/proxy", "--remove")
    assert files(machine) == before


def test_an_upgrade_keeps_the_extras(machine: Machine) -> None:
    machine.install("--with", "legacy")
    has_it = ("/usr/local/lib/tproxyd/current/bin/python3", "-c", "import iptc")
    assert machine.try_run(*has_it).returncode == 0
    machine.sh("cp -r /src/. /tmp/next && echo '# new' >>/tmp/next/tproxyd/__init__.py")
    machine.run("/tmp/next/scripts/install")
    machine.sh("rm -r /tmp/next")
    assert machine.try_run(*has_it).returncode == 0


def test_an_extra_that_there_is_not(machine: Machine) -> None:
    before = files(machine)
    done = machine.try_run("/src/scripts/install", "--with", "legacy,nonsense")
    assert done.returncode == 1
    assert 'there is no extra "nonsense"; try one of: legacy, top' in done.stderr
    assert files(machine) == before


def test_help(machine: Machine) -> None:
    done = machine.try_run("/src/scripts/install", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "[--with EXTRA,...]" in done.stdout
    assert "An upgrade keeps those of before" in done.stdout


def test_a_failed_installation_leaves_the_old_one(machine: Machine) -> None:
    machine.install()
    before = files(machine)
    machine.sh("cp -r /src/. /tmp/next && echo 'no toml' >>/tmp/next/pyproject.toml")
    done = machine.try_run("/tmp/next/scripts/install")
    machine.sh("rm -r /tmp/next")
    assert done.returncode == 1
    assert "can't install the program" in done.stderr
    assert files(machine) == before
    assert machine.run("tproxyd", "--version").startswith("tproxyd ")


def test_what_is_not_there_can_not_be_removed(machine: Machine) -> None:
    done = machine.try_run("/src/scripts/install", "--remove")
    assert done.returncode == 1
    assert "can't remove: nothing of tproxyd is installed in /usr/local" in done.stderr


def test_manual_and_completion_are_found(machine: Machine) -> None:
    machine.install()
    assert machine.run("man", "-w", "tproxyd").strip().endswith("/man/man8/tproxyd.8")
    found = machine.sh(
        "set +u; source /usr/share/bash-completion/bash_completion;"
        " _completion_loader tproxyd || true; complete -p tproxyd"
    )
    assert "_tproxyd" in found
