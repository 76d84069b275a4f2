"""The inputs worth keeping: one base64 line each, in a file that an ordinary test replays.

Kept is the smallest set (greedily) that takes every step from line to line that any of them takes
in the code under test. libFuzzer's own measure is finer, and its working corpus fifty times larger;
it lives in .cache/fuzz and is only ever an acceleration.
"""

from __future__ import annotations

import base64
import sys
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
    """Of `inputs` those that are needed for every step; short ones first, and sorted."""
    candidates = sorted(set(inputs), key=lambda each: (len(each), each))
    taken = {each: steps(call, each) for each in candidates}
    left = set[Step]().union(*taken.values())
    chosen = []
    while left:
        best = max(candidates, key=lambda each: (len(taken[each] & left), -len(each)))
        chosen.append(best)
        left -= taken[best]
    return sorted(chosen, key=lambda each: (len(each), each))
