"""What doctor concludes and proposes, from what it was told."""

from __future__ import annotations

import os

import pytest

from tproxyd.configsource import command_line

# Commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "variables", "line"),
    [
        (None, {}, "tproxyd install"),
        ("my.toml", {}, "tproxyd install -c my.toml"),
        ("a b.toml", {}, "tproxyd install -c 'a b.toml'"),
        (None, {"TPROXYD_CONFIG": "/c"}, "tproxyd install -c /c"),
        ("mine", {"TPROXYD_CONFIG": "/c"}, "tproxyd install -c mine"),
        (
            "f",
            {"TPROXYD_PORTS": "80, 81", "TPROXYD_PORT": "15050"},
            "TPROXYD_PORT=15050 TPROXYD_PORTS='80, 81' tproxyd install -c f",
        ),
        (None, {"TPROXYD_ADMIN": ""}, "TPROXYD_ADMIN='' tproxyd install"),
    ],
)
def test_a_command_for_the_same_configuration(
    path: str | None, variables: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.startswith("TPROXYD_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command_line("install", path) == line
