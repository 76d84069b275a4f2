"""The inputs worth keeping: one base64 line each, in a file that an ordinary test replays.

Kept is the smallest set (greedily) in which every step from line to line of the code under test
that any input takes is taken by several: one alone would show little of what goes wrong there.
libFuzzer's own measure is finer, and its working corpus much larger; it lives in .cache/fuzz and is
only ever an acceleration.
"""

from __future__ import annotations

import base64
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / "tproxyd/tests/data/corpus/headers.b64"
FOUND = KEPT.with_name("found.b64")  # what once broke the invariant; written by hand only
WORKING = ROOT / ".cache/fuzz"
_UNDER_TEST = tuple(
    str(ROOT / "tproxyd" / name)
    for name in ("flow/proxyproto.py", "flow/tlv.py", "flow/announce.py", "addr.py")
)

SEVERAL = 6

Step = tuple[str, int, int]  # a file, a line, the one after it


def kept() -> list[bytes]:
    lines = KEPT.read_text().split() + FOUND.read_text().split()
    return [base64.b64decode(line) for line in lines]


def keep(inputs: Iterable[bytes]) -> None:
    lines = [base64.b64encode(each).decode() for each in inputs]
    found = FOUND.read_text().split()
    KEPT.write_text("".join(f"{line}\n" for line in lines if line not in found))


def steps(call: Callable[[bytes], None], data: bytes) -> set[Step]:
    """The steps that `call(data)` takes in the code under test."""
    taken: set[Step] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> object:
        file = frame.f_code.co_filename
        if file not in _UNDER_TEST:
            return None
        line = frame.f_lineno
        taken.add((file, last.get(frame, 0), line))
        last[frame] = line
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        call(data)
    finally:
        sys.settrace(None)
    return taken


def smallest(call: Callable[[bytes], None], inputs: Iterable[bytes]) -> list[bytes]:
    """Of `inputs` those that are needed for every step SEVERAL times; short ones first, sorted."""
    candidates = {each: steps(call, each) for each in sorted(set(inputs), key=_rank)}
    left = Counter(step for taken in candidates.values() for step in taken)
    left = Counter({step: min(count, SEVERAL) for step, count in left.items()})
    chosen = []
    while left:
        best = max(candidates, key=lambda each: len(candidates[each] & left.keys()))
        left.subtract(candidates.pop(best) & left.keys())
        left = +left
        chosen.append(best)
    return sorted(chosen, key=_rank)


def _rank(data: bytes) -> tuple[int, bytes]:
    return len(data), data
