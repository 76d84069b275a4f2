"""What README shows of the configuration is one, and what it points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tproxyd import environment
from tproxyd.configfile import parse

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```toml\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_there_are_some() -> None:
    assert len(SNIPPETS) >= 10


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_it_is_valid(snippet: str) -> None:
    assert parse(snippet, "README.md").listeners


def test_it_has_every_variable() -> None:
    (table,) = re.findall(r"^\| variable \| setting \|\n(.*?)\n\n", TEXT, re.MULTILINE | re.DOTALL)
    told = set(re.findall(r"`TPROXYD(_[A-Z_]+)`|`(_[A-Z_]+)`", table))
    assert {"TPROXYD" + (one or other) for one, other in told} == {
        *environment.VARIABLES,
        environment.FILE,
    }


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([a-z-]+)\)", TEXT))))
def test_its_contents_are_there(link: str) -> None:
    titles = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    assert link in {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!#|https?:)([^)]+)\)", TEXT))))
def test_what_it_points_at_is_there(path: str) -> None:
    assert (ROOT / path).exists()
