"""Waiting for what the keeper of the kernel state does, and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lib.daemon import Daemon
from lib.waits import wait_for

Kernel = dict[str, Any]  # `kernel` of /status


def kernel(daemon: Daemon) -> Kernel:
    return dict(daemon.status()["kernel"])


def healed_after(daemon: Daemon, damage: Callable[[], object]) -> tuple[Kernel, float]:
    """`kernel` of /status once what `damage` does is healed, and the seconds since it was done."""
    before = heals(daemon)
    damage()
    since = time.monotonic()
    wait_for(lambda: heals(daemon) > before, "a heal")
    seconds = time.monotonic() - since
    return kernel(daemon), seconds


def heals(daemon: Daemon) -> float:
    """So many by now. Of /metrics: who asks for /status has the kernel looked at."""
    return daemon.metric("tproxyd_kernel_heals_total", result="healed")


def figure(what: str, kernel: Kernel, seconds: float) -> str:
    by = ", ".join(kernel["last_heal"]["by"]) or "nobody that the kernel names"
    took = (
        f"{seconds * 1000:4.0f} ms after it, {kernel['last_heal']['seconds'] * 1000:3.0f} noticed"
    )
    return f"\n  healed {took}: {what} (by {by})"
