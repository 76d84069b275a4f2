"""What /proc says about the daemon's processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from lib.netns import run
from lib.waits import wait_for


def state(pid: int) -> str:
    """R, S, T (stopped), Z, … or "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu_s(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_kib(pids: list[int]) -> int:
    """Resident memory of these processes that they share with nobody."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1])
    return total


def proportional_kib(pids: list[int]) -> int:
    """Resident memory of these processes, what is shared counted once: their parts of it (PSS)."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in texts)


def holds(pid: int, words: bytes) -> bool:
    """Whether these stand anywhere in the memory that a process may write."""
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            start, _, end = place.partition("-")
            if rights.startswith("rw"):
                memory.seek(int(start, 16))
                if words in memory.read(int(end, 16) - int(start, 16)):
                    return True
    return False


def address_space(pid: int) -> int:
    """In bytes, used or not: what RLIMIT_AS is about."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def resident_kib(pid: int) -> int:
    """Resident memory, with what it shares: that does not change when the others come and go."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def open_files(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def soft_limit(pid: int, name: str) -> int:
    """A resource limit of a process, by the name that /proc has for it ("Max open files")."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith(name):
            return int(line.removeprefix(name).split()[0])
    raise AssertionError(f"no limit {name}")


def set_soft_limit(pid: int, name: str, value: int) -> None:
    """A resource limit of a process that runs, by prlimit(1)'s name for it ("nofile", "as").

    Set by the user that the process has become: one's own processes need no CAP_SYS_RESOURCE.
    """
    status = dict(line.split(":\t", 1) for line in _status(pid))
    uid, gid = status["Uid"].split()[0], status["Gid"].split()[0]
    who = ("setpriv", "--reuid", uid, "--regid", gid, "--clear-groups")
    run(*who, "prlimit", "--pid", str(pid), f"--{name}={value}:")


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()


def is_gone(pid: int) -> bool:
    return state(pid) in ("", "Z")


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """These processes frozen, as far as they still live when it ends."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: all(state(pid) == "T" for pid in pids), f"{pids} to stop")
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
