"""What is said when legacy tables can't be had; netns-tests/test_backends*.py do the rest."""

from __future__ import annotations

import pytest

from tproxyd.kernel import legacy
from tproxyd.linux import CAP_NET_ADMIN, CAP_NET_RAW

SAID = "can't initialize mangle: b'Permission denied (you must be root)'"


@pytest.mark.parametrize(
    ("has", "hint"),
    [
        ((), "run it as root, with CAP_NET_ADMIN and CAP_NET_RAW"),
        ((CAP_NET_ADMIN,), "run it as root, with CAP_NET_RAW"),
        ((CAP_NET_ADMIN, CAP_NET_RAW), "does the kernel have ip_tables"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, has: tuple[int, ...], hint: str
) -> None:
    monkeypatch.setattr(legacy, "capabilities", lambda: frozenset(has))
    why, told = legacy._in_words(SAID, 4)
    assert why == "can't initialize mangle: Permission denied (you must be root)"
    assert told.startswith(hint)
