"""What was healed, for the log, /status and /metrics; in the supervisor, as its keeper tells it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypedDict

log = logging.getLogger("tproxyd")

# Seconds: nft heals in hundredths, legacy tables in tenths, a pause after a fight takes seconds.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class HealPart(TypedDict):
    """The last heal, in /status."""

    at: str  # ISO 8601, UTC
    wrong: list[str]
    done: list[str]
    by: list[str]  # who had changed it, where the kernel tells
    seconds: float  # from the first sign of it


class HealCounts(NamedTuple):
    """For /metrics."""

    healed: int = 0
    failed: int = 0
    seconds: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)  # each its own share; the last is beyond


@dataclass(slots=True)
class Heals:
    healed: int = 0
    failed: int = 0
    seconds: float = 0.0
    trouble: str = ""  # why healing fails now
    last: HealPart | None = None
    _buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def counts(self) -> HealCounts:
        return HealCounts(self.healed, self.failed, self.seconds, tuple(self._buckets))

    def note(self, news: Mapping[str, Any]) -> int:
        """Take in what the keeper says, and log it; how many drifts that makes."""
        match news:
            case {"news": "healed", "seconds": seconds, "by": by, "wrong": wrong, "done": done}:
                drift = not self.trouble  # else it was counted when healing first failed
                self.healed += 1
                self.seconds += seconds
                self._buckets[sum(seconds > bound for bound in BOUNDS)] += 1
                at = datetime.now(UTC).isoformat(timespec="milliseconds")
                self.last = HealPart(at=at, wrong=wrong, done=done, by=by, seconds=seconds)
                whose = f" by {', '.join(by)}" if by else ""
                took = f"{seconds * 1000:.0f} ms"
                what = "; ".join(wrong)
                log.warning("the kernel state was changed%s; healed in %s: %s", whose, took, what)
                return int(drift)
            case {"news": "failed", "why": why, "new": new}:
                drift = not self.trouble
                self.failed += 1
                self.trouble = why
                if new:
                    log.error("the kernel state differs, and healing it fails: %s", why)
                return int(drift)
            case {"news": "fight", "times": times, "wrong": wrong}:
                log.error(
                    "another program undoes what is healed, %d times by now (%s); healing goes on,"
                    " with pauses of up to 10 s: find that program, or stop tproxyd",
                    *(times, "; ".join(wrong)),
                )
            case {"news": "well"}:
                self.trouble = ""
                log.info("the kernel state is as configured")
        return 0
