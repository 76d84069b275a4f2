"""What README shows of the configuration is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tproxyd.configfile import parse

TEXT = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"^```toml\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_there_are_some() -> None:
    assert len(SNIPPETS) >= 10


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_it_is_valid(snippet: str) -> None:
    assert parse(snippet, "README.md").listeners


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([a-z-]+)\)", TEXT))))
def test_its_contents_are_there(link: str) -> None:
    titles = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    assert link in {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}
