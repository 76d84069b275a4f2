"""One world: a client and a pod as fresh network namespaces, the application in it, nothing else.

    client                     pod
    10.9.1.2 (.3, .4)  eth0 ══ eth0  10.9.1.1      nginx :80, and :81 for PROXY headers without a
    fd00:9:1::2                      fd00:9:1::1   proxy; the candidate on :15006; iperf3 :5201

Every measurement gets a new one, so that no candidate meets another's TIME_WAIT sockets, conntrack
entries or rules. Whatever happens, its processes are ended by their ids and its namespaces are
deleted; one that was left by a SIGKILL is removed by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

CLIENT, POD = "10.9.1.2", "10.9.1.1"
CROWD = ("10.9.1.3", "10.9.1.4")
CLIENT_V6, POD_V6 = "fd00:9:1::2", "fd00:9:1::1"
STRANGER = "106.52.131.116"  # the client that PROXY headers name
PORT, HEADER_PORT, BULK_PORT = 80, 81, 5201

_LIBRARY = Path(__file__).resolve().parent.parent
_PREFIX = "tproxyd-bench-"
_TEMPORARY = Path("/tmp")  # short: unix sockets live there, whose names have 107 bytes
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
_serial = itertools.count(1)
_TICKS = os.sysconf("SC_CLK_TCK")

# One worker: with wrk's one thread it fills two CPUs; a second made no difference that stood out
# from the noise. Its answers are as small as they can be: what is measured is the proxy. The limits
# are those that would otherwise end the tests early.
_NGINX = """
daemon off; user root; worker_processes 1; worker_rlimit_nofile {files};
pid {scratch}/nginx.pid; error_log {scratch}/nginx.err error;
events {{ worker_connections {connections}; }}
http {{
  access_log off; server_tokens off;
  keepalive_timeout 1h; keepalive_requests 1000000000; client_header_timeout 1h;
  client_body_temp_path {scratch}/1; proxy_temp_path {scratch}/2; fastcgi_temp_path {scratch}/3;
  uwsgi_temp_path {scratch}/4; scgi_temp_path {scratch}/5;
  server {{
    listen {port} backlog=4096; listen [::]:{port} backlog=4096;
    listen {header_port} proxy_protocol backlog=4096;
    location = / {{ return 200 "hello\\n"; }}
    location = /who {{ return 200 "$remote_addr $remote_port $proxy_protocol_addr\\n"; }}
  }}
}}
"""


class Failed(Exception):
    """Something of the bench did not work; says what, with what it said itself."""


class Cpu(NamedTuple):
    """Seconds that processes have spent."""

    user: float
    system: float

    def __sub__(self, other: object) -> Cpu:
        assert isinstance(other, Cpu)
        return Cpu(self.user - other.user, self.system - other.system)


class Running:
    """A process that we started, and all that descend from it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    @property
    def pids(self) -> list[int]:
        return [self.process.pid, *_descendants(self.process.pid)]

    def cpu(self) -> Cpu:
        """Of those that live; what has ended before is in no sum, and nothing here ends early."""
        user = system = 0
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                user, system = user + int(fields[11]), system + int(fields[12])
        return Cpu(user / _TICKS, system / _TICKS)

    def pss_kib(self) -> int:
        """Memory: private pages, and the shared ones divided by those who share them.

        The interpreter of this program is a copy of its own (scripts/bench), so it takes no part
        in a Python candidate's pages; other programs of the machine may.
        """
        total = 0
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        return total

    def say(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def check(self) -> None:
        if self.process.poll() is not None:
            raise Failed(f"{self.log.stem} ended with {self.process.returncode}: {self.say()}")

    def end(self) -> None:
        for pid in reversed(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class World:
    """`with World() as world:`; the application answers when the body begins."""

    def __init__(self) -> None:
        number = next(_serial)
        self.client = f"{_PREFIX}{os.getpid()}-{number}-client"
        self.pod = f"{_PREFIX}{os.getpid()}-{number}-pod"
        self.running: list[Running] = []

    def __enter__(self) -> World:
        self.scratch = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_TEMPORARY))
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _build(self) -> None:
        for name in (self.client, self.pod):
            run("ip", "netns", "add", name)
            # Duplicate address detection would keep the IPv6 addresses unusable for a second, and
            # the host's reverse path filter (a new namespace inherits it) is no candidate's fault.
            self.sysctl(name, "net/ipv6/conf/default/accept_dad", "0")
            # And BBR, where a machine prefers it, paces: bulk would show that, and nothing else.
            # (Reno, because a namespace may not choose CUBIC where that is not the machine's own.)
            self.sysctl(name, "net/ipv4/tcp_congestion_control", "reno")
            for scope in ("all", "default"):
                self.sysctl(name, f"net/ipv4/conf/{scope}/rp_filter", "0")
        here, there = self.client, self.pod
        _ip(here, "link set lo up", f"link add eth0 type veth peer name eth0 netns {there}")
        for name, addresses, router in (
            (there, (f"{POD}/24", f"{POD_V6}/64"), (CLIENT, CLIENT_V6)),
            (
                here,
                (*(f"{each}/24" for each in (CLIENT, *CROWD)), f"{CLIENT_V6}/64"),
                (POD, POD_V6),
            ),
        ):
            _ip(
                name,
                "link set lo up",
                *(f"addr add {address} dev eth0" for address in addresses),
                "link set eth0 up",
                *(f"route add default via {address}" for address in router),
            )
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        config = self.scratch / "nginx.conf"
        config.write_text(
            _NGINX.format(
                scratch=self.scratch,
                files=files,
                connections=files - 100,
                port=PORT,
                header_port=HEADER_PORT,
            )
        )
        nginx = self.start(
            "nginx", "nginx", "-e", "stderr", "-p", str(self.scratch), "-c", str(config)
        )
        self.serves("--direct", give_up=nginx)

    def _remove(self) -> None:
        for running in self.running[::-1]:
            running.end()
        remove_namespaces(self.client, self.pod)
        shutil.rmtree(self.scratch, ignore_errors=True)

    # ----- processes in it

    def start(self, name: str, *argv: str, client: bool = False) -> Running:
        """A process in the pod; what it writes goes to a file that `Running.say` reads."""
        log = self.scratch / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                inside(self.client if client else self.pod, *argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                text=True,
                preexec_fn=_die_with_us,
            )
        self.running.append(Running(process, log))
        return self.running[-1]

    def helper(self, *arguments: str) -> Helper:
        """Our own client (client.py), in the client's namespace."""
        return Helper(self, arguments)

    def ask(self, *arguments: str, timeout: float = 60) -> dict[str, Any]:
        """What our own client answers once it is done."""
        helper = self.helper(*arguments)
        try:
            return helper.answer(timeout)
        finally:
            helper.running.end()

    def serves(self, *arguments: str, give_up: Running) -> None:
        """Waits until the client is served as `client.py first` is told to expect."""
        helper = self.helper("first", *arguments)
        try:
            helper.answer(30, give_up)
            helper.answer(30, give_up)
        finally:
            helper.running.end()

    def sysctl(self, namespace: str, name: str, value: str) -> None:
        run(*inside(namespace, "tee", f"/proc/sys/{name}"), stdin=f"{value}\n")

    def in_pod(self, *argv: str, stdin: str | None = None) -> None:
        run(*inside(self.pod, *argv), stdin=stdin)

    def from_client(self, *argv: str, timeout: float) -> str:
        return run(*inside(self.client, *argv), timeout=timeout)

    def syn_retransmits(self) -> int:
        """SYNs sent again, in both namespaces: each one is a connection that waited for a second.

        wrk does not see the client's, because it starts its watch after the connect.
        """
        total = 0
        for name in (self.client, self.pod):
            lines = run(*inside(name, "cat", "/proc/net/netstat")).splitlines()
            for names, values in itertools.pairwise(lines):
                if names.startswith("TcpExt:") and "TCPSynRetrans" in names:
                    total += int(values.split()[names.split().index("TCPSynRetrans")])
                    break
        return total


class Helper:
    """client.py at work: one JSON line for each request, the first of them in its arguments."""

    def __init__(self, world: World, arguments: Sequence[str]) -> None:
        log = world.scratch / "client.err"
        with log.open("w") as err:
            self.process = subprocess.Popen(
                inside(world.client, sys.executable, str(_LIBRARY / "bench/client.py"), *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                preexec_fn=_die_with_us,
            )
        self.running = Running(self.process, log)
        world.running.append(self.running)

    def answer(self, timeout: float, give_up: Running | None = None) -> dict[str, Any]:
        """The next line; Failed when there is none in time, or when `give_up` has ended."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while not select.select([self.process.stdout], [], [], 0.05)[0]:
            if give_up is not None:
                give_up.check()
            if time.monotonic() > deadline:
                raise Failed(f"the client did not answer in {timeout:g} s: {self.process.args!r}")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Failed(f"the client ended: {self.running.say()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()


def inside(namespace: str, *argv: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *argv]


def run(*argv: str, stdin: str | None = None, timeout: float = 30) -> str:
    """The output of a command; Failed with what it said when it does not succeed in time."""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            preexec_fn=_die_with_us,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(argv)}: not done after {timeout:g} s") from None
    if done.returncode != 0:
        raise Failed(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def remove_namespaces(*names: str) -> None:
    """What still runs in them is ended first: a process would keep its namespace alive."""
    known = set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()
    for name in known.intersection(names):
        for pid in run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        run("ip", "netns", "delete", name)


def remove_left_behind(ours: bool = False) -> None:
    """What runs left whose process is no more; with `ours`, what this one has left too."""

    def left(name: str) -> bool:
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        dead = not os.path.exists(f"/proc/{pid}") or (ours and pid == str(os.getpid()))
        return name.startswith(_PREFIX) and dead

    if os.path.isdir("/run/netns"):
        remove_namespaces(*filter(left, os.listdir("/run/netns")))
    for name in filter(left, os.listdir(_TEMPORARY)):
        shutil.rmtree(_TEMPORARY / name, ignore_errors=True)


def _ip(namespace: str, *lines: str) -> None:
    run("ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        found = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in " ".join(found).split():
        yield int(child)
        yield from _descendants(int(child))


def _die_with_us() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
