"""How scripts/install is called; what it does is for netns-tests/test_systemd_install.py."""

from __future__ import annotations

import subprocess

import pytest

from tproxyd.tests.programs import ROOT


@pytest.mark.parametrize(
    "words", [("--prefix",), ("--prefix", "no/path", "--with"), ("--remove", "--prefix"), ("help",)]
)
def test_wrong_usage_is_2(words: tuple[str, ...]) -> None:
    argv = [f"{ROOT}/scripts/install", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scripts/install [--prefix DIR]")
