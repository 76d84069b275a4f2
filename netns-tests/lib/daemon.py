"""The daemon as a test sees it: a process in the pod, its access log, its admin port.

Ready means what systemd would take for it: READY=1 on a NOTIFY_SOCKET that we listen on. (An
abstract socket name would not do: those are per network namespace; a path is not.)
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lib.netns import Namespace
from lib.waits import wait_for

ROOT = Path(__file__).resolve().parents[2]
TPROXYD = (sys.executable, "-m", "tproxyd")
ADMIN_PORT = 9133  # the default

Record = dict[str, Any]  # one access-log line, foreign JSON to us


def tproxyd(
    namespace: Namespace, *args: str, config: str | None = None
) -> subprocess.CompletedProcess[str]:
    """One tproxyd command in a namespace, to its end; `config` is the text of its -c FILE."""
    with tempfile.TemporaryDirectory(prefix="tproxyd-") as scratch:
        if config is not None:
            path = Path(scratch, "tproxyd.toml")
            path.write_text(config)
            args = (*args, "-c", str(path))
        return subprocess.run(
            namespace.argv(*TPROXYD, *args),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=30,
        )


class Daemon:
    """`with Daemon(pod, config) as daemon:`, from READY until it is gone.

    `install=False` leaves the kernel alone, `guard` keeps what is there, `nofile` is its limit of
    open files, `prefix` a command that starts it (unshare …), `ready=False` does not wait;
    `script` is a Python file in the place of tproxyd's own; with `command` it is `tproxyd exec`.
    """

    def __init__(
        self,
        namespace: Namespace,
        config: str = "",
        *,
        install: bool = True,
        guard: bool = False,
        nofile: int | None = None,
        prefix: tuple[str, ...] = (),
        ready: bool = True,
        script: str = "",
        command: tuple[str, ...] = (),
    ) -> None:
        self.namespace = namespace
        self.config, self.nofile, self.prefix = config, nofile, prefix
        self.program = (sys.executable, script) if script else TPROXYD
        self.keeps = "--guard" if guard else "--install" if install else ""
        self.wait_ready, self.command = ready, command
        # Not pytest's tmp_path: a unix socket's path has 107 bytes, test names are long.
        self.scratch = Path(tempfile.mkdtemp(prefix="tproxyd-"))
        self.notified: list[str] = []
        self.successors: list[int] = []  # supervisors that took over from it

    def __enter__(self) -> Daemon:
        try:
            self._start()
        except BaseException as error:
            self._end()
            error.add_note(self.told())
            shutil.rmtree(self.scratch)
            raise
        return self

    def _start(self) -> None:
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.setblocking(False)
        self.notify.bind(str(self.scratch / "notify"))
        config = self.scratch / "tproxyd.toml"
        config.write_text(self.config)
        verb = ["exec"] if self.command else ["run", *self.keeps.split()]
        command = ["--", *self.command] if self.command else []
        argv = [*self.prefix, *self.program, *verb, "-c", str(config), *command]
        with (self.scratch / "out").open("wb") as out, (self.scratch / "err").open("wb") as err:
            self.process = subprocess.Popen(
                self.namespace.argv(*argv),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(self.scratch / "notify"),
                    "PYTHONPATH": str(ROOT),
                },
                preexec_fn=self._limit_files if self.nofile else None,
            )
        if self.wait_ready:
            wait_for(self._is_ready_or_dead, "READY=1", timeout=15)
            assert self.process.poll() is None, f"tproxyd ended: exit {self.process.returncode}"

    def _limit_files(self) -> None:
        assert self.nofile is not None
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.nofile, self.nofile))

    def _is_ready_or_dead(self) -> bool:
        return self.has_notified("READY=1") or self.process.poll() is not None

    def has_notified(self, word: str) -> bool:
        """Whether sd_notify has sent a line that starts with `word`."""
        while True:
            try:
                self.notified += self.notify.recv(4096).decode().splitlines()
            except BlockingIOError:
                return any(line.startswith(word) for line in self.notified)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if error is not None:
            error.add_note(self.told())
        shutil.rmtree(self.scratch)

    def _end(self) -> None:
        """Gone whatever happened; a daemon that a test did not stop itself need not drain."""
        if process := getattr(self, "process", None):
            supervisors = [process.pid, *self.successors]
            for pid in [pid for each in supervisors for pid in [*descendants(each), each]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        if notify := getattr(self, "notify", None):
            notify.close()

    def told(self) -> str:
        """What it wrote, for the reader of a failure."""
        parts = []
        for name in ("tproxyd.toml", "err", "out"):
            path = self.scratch / name
            text = path.read_text(errors="replace") if path.exists() else ""
            parts.append(f"--- tproxyd's {name} ---\n{text[-6000:]}")
        return "\n".join(parts)

    @property
    def stderr(self) -> str:
        return (self.scratch / "err").read_text()

    def bugs(self) -> list[str]:
        """What its own log says of bugs. (A failed "not in" would keep pytest busy for hours.)"""
        return [each for each in self.stderr.splitlines() if "bug" in each or "Traceback" in each]

    # ----- its processes

    @property
    def pid(self) -> int:
        """Of the supervisor, seen from here."""
        if "--fork" in self.prefix:  # unshare stays and waits for it
            return wait_for(lambda: children(self.process.pid), "the daemon's process")[0]
        return self.process.pid

    def workers(self) -> list[int]:
        return [worker["pid"] for worker in self.status()["workers"]]

    def keeper(self) -> int:
        """The process that holds the kernel state."""
        for pid in children(self.pid):
            if Path(f"/proc/{pid}/comm").read_text() == "tproxyd/kernel\n":
                return pid
        raise AssertionError("there is no keeper")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM; its exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout)

    # ----- its access log

    def log(self) -> list[Record]:
        """The access log so far: the lines of stdout that are whole."""
        text = (self.scratch / "out").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def wait_log(self, count: int = 1, timeout: float = 10.0) -> list[Record]:
        """The access log, once it has `count` lines."""
        wait_for(lambda: len(self.log()) >= count, f"{count} access-log lines", timeout)
        records = self.log()
        assert len(records) == count, records
        return records

    def wait_record(self, matches: Callable[[Record], bool], what: str) -> Record:
        """The first access-log line that `matches`."""
        return wait_for(lambda: [r for r in self.log() if matches(r)], what)[0]

    # ----- its admin port

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, str]:
        """Status and body of GET `path` at the admin port."""
        with self.namespace.connect("127.0.0.1", ADMIN_PORT) as sock:
            sock.settimeout(timeout)
            sock.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]), body

    def status(self) -> dict[str, Any]:
        code, body = self.get("/status")
        assert code == 200, body
        return dict(json.loads(body))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 when there is none."""
        _, body = self.get("/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """Deepest first."""
    found: list[int] = []
    for child in children(pid):
        found += [*descendants(child), child]
    return found
