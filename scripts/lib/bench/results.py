"""The results of a run, and what is derived from them: medians, and ratios pair by pair.

A ratio is taken within each repetition, between two measurements that were made minutes apart at
the most, and the median of those ratios is shown: a machine that is slower in one hour than in the
next moves both sides of a pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from bench.measures import Numbers


@dataclass(slots=True)
class Results:
    """`runs[candidate][repetition]` are the numbers of one repetition."""

    about: dict[str, str]  # machine, kernel, versions, load, command: as shown on top
    settings: dict[str, str]  # each candidate's, in words
    runs: dict[str, list[Numbers]]
    failures: list[str] = field(default_factory=list)

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(self.runs)

    def values(self, candidate: str, metric: str) -> list[float]:
        """What was measured, one a repetition; those that failed are left out."""
        return [run[metric] for run in self.runs.get(candidate, ()) if metric in run]

    def median(self, candidate: str, metric: str) -> float | None:
        values = self.values(candidate, metric)
        return median(values) if values else None

    def metrics(self) -> Iterable[str]:
        names = (name for runs in self.runs.values() for run in runs for name in run)
        return dict.fromkeys(names)

    def ratios(self, candidate: str, other: str, metric: str) -> list[float]:
        """candidate ÷ other in each repetition that has both."""
        pairs = zip(self.runs.get(candidate, ()), self.runs.get(other, ()), strict=False)
        return [
            mine[metric] / theirs[metric]
            for mine, theirs in pairs
            if metric in mine and theirs.get(metric)
        ]

    def variants(self, peer: str) -> list[str]:
        """The candidates that are `peer`: "haproxy" and "haproxy-ports" are HAProxy."""
        return [name for name in self.candidates if name.split("-")[0] == peer] or [peer]

    def as_json(self) -> str:
        known = [name for name in self.candidates if name.startswith("tproxyd")]
        derived = {
            "medians": {
                name: {metric: self.median(name, metric) for metric in self.metrics()}
                for name in self.candidates
            },
            "ratios": {
                f"{name} ÷ {other}": {
                    metric: median(ratios)
                    for metric in self.metrics()
                    if (ratios := self.ratios(name, other, metric))
                }
                for name in known
                for other in self.candidates
                if other != name
            },
        }
        return json.dumps(asdict(self) | derived, indent=1, ensure_ascii=False) + "\n"


def read(path: Path) -> Results:
    """Results that `as_json` wrote."""
    data = json.loads(path.read_text())
    return Results(*(data[name] for name in ("about", "settings", "runs", "failures")))
