"""What scripts/fuzz has found worth keeping is replayed.

headers.b64 has inputs that together take every step of the code which reads and writes headers, as
`scripts/fuzz --keep` chose them; found.b64 has whatever once broke the invariant, by a bug that was
there or one that was planted.
"""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tproxyd.tests import invariant

CORPUS = Path(__file__).parent / "data/corpus"
LINES = [*(CORPUS / "headers.b64").read_text().split(), *(CORPUS / "found.b64").read_text().split()]


def test_it_is_small_and_without_doubles() -> None:
    assert 10 <= len(LINES) == len(set(LINES)) <= 200


@pytest.mark.parametrize("line", LINES)
def test_the_invariant_holds(line: str) -> None:
    invariant.check(base64.b64decode(line))
