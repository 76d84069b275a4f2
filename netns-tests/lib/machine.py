"""A whole machine whose systemd runs the units: a Debian root, booted by systemd-nspawn.

It boots from .cache/machine (scripts/machine/build-here) with a layer of its own above it, so each
boot finds the machine as if new, and nothing is left of it. It has its own network, of which the
test has both ends (lib/topology.py, the machine is the pod), this checkout at /src, and the wheels
that scripts/install needs at /wheels.

systemd-nspawn wants a place in /run/systemd and a tty for its console, but neither machined nor a
systemd on this side. Commands get inside by nsenter(1).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from lib.daemon import ADMIN_PORT, ROOT, children
from lib.netns import Namespace
from lib.topology import Topology
from lib.waits import wait_for

CACHE = ROOT / ".cache" / "machine"
_CANNOT = 75  # EX_TEMPFAIL, of build-here: nothing to do with us
BOOT_S = 90.0  # two seconds, when nobody else wants the processors
COMMAND_S = 120.0
_serial = itertools.count(1)

# Where cgroups are: both versions, or version 2 alone. systemd-nspawn puts the machine into the one
# that it is started in, and two machines must not meet there.
_CGROUPS = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")
_BOOT = """
set -e
for at in $CGROUPS; do
    [ ! -e "$at/cgroup.procs" ] || { mkdir "$at/$NAME" && echo $$ >"$at/$NAME/cgroup.procs"; }
done
mount --make-rprivate /
mount -t tmpfs tmpfs /run/systemd
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs "$SCRATCH"
mkdir "$SCRATCH/upper" "$SCRATCH/work" "$SCRATCH/root"
mount -t overlay overlay "$SCRATCH/root" \
    -o "lowerdir=$CACHE/root,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work"
exec systemd-nspawn --boot --quiet --directory="$SCRATCH/root" --machine="$NAME" \
    --register=no --keep-unit --private-network --capability=all --console=read-only \
    --bind-ro="$CHECKOUT:/src" --bind-ro="$CACHE/wheels:/wheels"
"""


def _removed(cgroup: Path) -> bool:
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


class Machine:
    """`with Machine() as machine:`, from boot until it is gone; skipped where that can't be.

    `machine.net` is its network, with a client.
    """

    def __enter__(self) -> Machine:
        built = subprocess.run(
            [str(ROOT / "scripts/machine/build-here")], capture_output=True, text=True, check=False
        )
        if built.returncode == _CANNOT:
            pytest.skip(f"the units are not tested: {built.stderr.strip()}")
        assert built.returncode == 0, built.stderr
        self._exit = contextlib.ExitStack()
        try:
            self._boot()
        except BaseException as error:
            error.add_note(f"--- the machine's console ---\n{self.console[-6000:]}")
            self._exit.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _boot(self) -> None:
        self._name = f"tproxyd-{os.getpid()}-{next(_serial)}"
        scratch = tempfile.mkdtemp(prefix="tproxyd-")
        self._exit.callback(shutil.rmtree, scratch)
        self._console = Path(f"{scratch}.console")
        self._exit.callback(self._console.unlink, missing_ok=True)
        with self._console.open("wb") as console:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _BOOT],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "SCRATCH": scratch,
                    "CACHE": str(CACHE),
                    "CHECKOUT": str(ROOT),
                    "NAME": self._name,
                    "CGROUPS": " ".join(_CGROUPS),
                },
            )
        self._exit.callback(self._end)
        self.leader = wait_for(self._leader, "the machine's first process", BOOT_S)
        wait_for(lambda: "running" in self.state() or self._gone(), "its boot", BOOT_S)
        pod = self._exit.enter_context(Namespace("machine", of=self.leader))
        self.net = self._exit.enter_context(Topology(pod))

    def _leader(self) -> int:
        assert not self._gone(), "systemd-nspawn ended"
        # Until it has executed systemd it is a copy of systemd-nspawn, in other namespaces.
        with contextlib.suppress(IndexError, FileNotFoundError, ProcessLookupError):  # in between
            found = children(self.process.pid)[0]
            if Path(f"/proc/{found}/comm").read_text() == "systemd\n":
                return found
        return 0

    def _gone(self) -> bool:
        return self.process.poll() is not None

    def _end(self) -> None:
        """As by the power switch: the end of its first process is that of all others."""
        for pid in children(self.process.pid) or [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        for at in _CGROUPS:
            # Deepest first; the kernel counts a process out a moment after it is gone.
            for where in sorted(Path(at, self._name).glob("**/"), reverse=True):
                wait_for(partial(_removed, where), f"{where} to be empty")

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace") if hasattr(self, "_console") else ""

    def state(self) -> str:
        return self.try_run("systemctl", "is-system-running").stdout

    # Commands ------------------------------------------------------------------------------------

    def try_run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command inside, to its end."""
        enter = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        return subprocess.run(
            ["nsenter", "--target", str(self.leader), *enter, "--", *argv],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_S,
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
                "HOME": "/root",
                "PIP_FIND_LINKS": "/wheels",
                "PIP_NO_INDEX": "1",
            },
        )

    def run(self, *argv: str) -> str:
        """Its output; AssertionError with what it said when it fails."""
        done = self.try_run(*argv)
        told = f"{' '.join(argv)}: exit {done.returncode}:\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, told
        return done.stdout

    def sh(self, script: str) -> str:
        return self.run("bash", "-c", f"set -euo pipefail\n{script}")

    def install(self, *args: str) -> str:
        return self.run("/src/scripts/install", *args)

    def path(self, path: str) -> Path:
        """A file of the machine, as it is reached from here."""
        return Path(f"/proc/{self.leader}/root{path}")

    # Units ---------------------------------------------------------------------------------------

    def systemctl(self, *args: str) -> str:
        """AssertionError with the journal's last lines when it fails."""
        try:
            return self.run("systemctl", *args)
        except AssertionError as error:
            error.add_note(self.run("journalctl", "--no-pager", "-n", "60", "-o", "short-precise"))
            raise

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def active(self, unit: str) -> str:
        return self.show(unit, "ActiveState")

    def main_pid(self) -> int:
        """Of the daemon, as the machine counts."""
        return int(self.show("tproxyd", "MainPID"))

    def kill(self, number: signal.Signals, pid: int) -> None:
        self.sh(f"kill -{int(number)} {pid}")

    def turn_page(self) -> None:
        """The journal begins here."""
        told = self.run("journalctl", "--no-pager", "-n", "0", "--show-cursor")
        self._page = told.rpartition("-- cursor: ")[2].strip()

    def journal(self, unit: str = "tproxyd") -> list[str]:
        since = f"--after-cursor={self._page}"
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, since).splitlines()

    def status(self) -> dict[str, Any]:
        """Of the running daemon, whatever has become of its configuration file."""
        with self.net.pod.connect("127.0.0.1", ADMIN_PORT) as sock:
            sock.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        return dict(json.loads(answer.partition("\r\n\r\n")[2]))

    def workers(self) -> list[int]:
        return [each["pid"] for each in self.status()["workers"] if each["pid"]]
