"""A control group for one process of the daemon, with a limit of memory, where we may make one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.waits import wait_for

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited_memory(limit: int) -> Iterator[Path]:
    """A group whose processes are killed when they take more; its file of process ids."""
    if (_V1 / "memory.limit_in_bytes").exists():
        root, name = _V1, "memory.limit_in_bytes"
    elif "memory" in _controllers():
        root, name = _V2, "memory.max"
    else:
        pytest.skip("needs the memory controller of cgroups; there is none here")
    group = root / f"tproxyd-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(f"{limit}\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"can't make a control group: {error}; run on a machine that is ours")
    try:
        yield group / "cgroup.procs"
    finally:
        wait_for(lambda: _gone(group), f"{group} to be empty")


def _controllers() -> str:
    try:
        return (_V2 / "cgroup.subtree_control").read_text()
    except OSError:
        return ""


def _gone(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()
