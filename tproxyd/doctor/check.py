"""What a check is given, what it answers, and how it looks at this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from tproxyd.config import Backend, Config, ReturnPath
from tproxyd.errors import KernelError
from tproxyd.kernel.listening import Listening

if TYPE_CHECKING:
    from tproxyd.kernel.clashes import Clash
    from tproxyd.kernel.others import Nat

_SYSCTL = Path("/proc/sys")


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""  # what to do, where the verdict is not ok


@dataclass(frozen=True, slots=True)
class Patient:
    """What several checks need to know, found out once."""

    config: Config
    command: Callable[[str], str]  # a verb of tproxyd, as it is typed for this configuration
    installed: bool  # something of ours is in the kernel
    differs: tuple[str, ...]  # how it differs from what the configuration wants
    listening: Listening | None  # None: the kernel does not tell
    clashes: tuple[Clash, ...]  # what others have where we want to be
    nat: tuple[Nat, ...]  # the tables in which others translate
    keeper: str  # the daemon that keeps the state as it should be; "" = nobody does
    unreadable: KernelError | None  # why the kernel state cannot be told
    backend: Backend  # never AUTO
    return_path: ReturnPath
    host_netns: bool
    wants_state: bool  # the configuration needs anything of the kernel at all
    dials_here: bool  # upstreams on this host may see clients
    holds_elsewhere: bool  # and those on others, or connections are forwarded

    @property
    def put_right(self) -> str:
        """What helps where the kernel state is not as configured. A keeper suffers no install."""
        if self.keeper:
            return f"the log of {self.keeper} says why it does not heal that"
        return f"{self.command('install')} puts it right"

    @property
    def start(self) -> str:
        """With --install where rules are needed, and where they stand: plain run cleans nothing."""
        needed = self.wants_state or self.installed
        return f"start the daemon: {self.command('run --install' if needed else 'run')}"


def sysctl(name: str) -> str:
    try:
        return (_SYSCTL / name).read_text().strip()
    except OSError:
        return "absent"


def interfaces() -> list[str]:
    """Those that have settings of their own, without lo."""
    found = (_SYSCTL / "net/ipv4/conf").iterdir()
    return sorted({path.name for path in found} - {"all", "default", "lo"})
